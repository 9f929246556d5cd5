"""`qembag bench`: lookups from a file's table on this machine, against NumPy and torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from .._runtime import show_config
from ..table import QuantizedTable
from ..verdict.text import aligned
from ..verdict.traffic import traffic
from .arguments import TABLES, count, from_zero, positive
from .contents import stored_table
from .output import Failure, about, printable, progress, show

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from .contents import AnyTable


EXAMPLE = """\
  qembag bench words.safetensors
  qembag bench words.safetensors --threads 2 --seconds 10 --json
"""
PACKAGE = __package__.rpartition(".")[0]
ROOT = Path(__file__).resolve().parents[len(PACKAGE.split("."))]
# A turn times this many batches, after one to warm up. Medians are of at least MIN_ROUNDS rounds.
BATCHES, MIN_ROUNDS = 8, 3
# Answers may differ by this share of the largest value, since contenders add in different orders.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help=f"{TABLES}; or floats in a .npy file")
    add("--table", metavar="NAME", help="which table, if the file has several")
    add("--bags", metavar="N", type=count, default=1000, help="bags in a batch (default: %(default)s)")
    add("--length", metavar="N", type=count, default=50, help="mean rows per bag (default: %(default)s)")
    add("--threads", metavar="N", type=count, default=1, help="of a lookup; NumPy uses one (default: %(default)s)")
    add("--seconds", metavar="X", type=positive, default=5.0, help="how long to measure (default: %(default)s)")
    add("--seed", metavar="N", type=from_zero, default=0, help="seed of the bags (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("-q", "--quiet", action="store_true", help="show no progress")


class Contender(NamedTuple):
    """A process that does lookups, its times, and the file where it puts its vectors."""

    name: str
    process: subprocess.Popen[str]
    answer: Path
    ns_a_row: list[float]


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    with about(options.file):
        table = stored_table(options.file, options.table)
        if not table.num_embeddings:
            raise ValueError("the table must have rows, got none")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        jobs, notes = jobs_of(table, options, folder)
        contenders = [stack.enter_context(started(job)) for job in jobs]
        measure(contenders, table.num_embeddings, options, folder)
    medians = {contender.name: float(np.median(contender.ns_a_row)) for contender in contenders}
    rounds = len(contenders[0].ns_a_row)
    if options.json:
        config = show_config()
        whole = {"file": str(options.file), "table": repr(table), "ns_a_row": medians, "rounds": rounds}
        keys = ("bags", "length", "threads", "seed")
        show(json.dumps(whole | {key: getattr(options, key) for key in keys} | {"level": config["level"]}, indent=2))
        return
    lines = [["lookup", "ns a row", "million rows/s", "times as long"]]
    for key, ns in medians.items():
        lines.append([key, f"{ns:.2f}", f"{1e3 / ns:,.1f}", f"{ns / medians['qembag']:.2f}"])
    show("\n\n".join([aligned(lines), caption(table, options, rounds), *notes]))


def jobs_of(table: AnyTable, options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The job of each process, and notes on why one is missing."""
    job = {"root": str(ROOT), "package": PACKAGE, "file": str(options.file), "table": options.table}
    job |= {"threads": options.threads}
    jobs = [job | {"contender": name, "answer": str(folder / f"{name}.npy")} for name in ("qembag", "numpy")]
    if importlib.util.find_spec("torch") is None:
        return jobs, []
    mapping = table.compressed_indices_mapping
    if isinstance(table, QuantizedTable):
        try:
            rows = table.to_layout().data
        except ValueError:
            return jobs, ["torch has no operator for this layout of rows."]
    elif table.data.dtype == np.float32 and mapping is None:
        rows = table.data
    else:
        return jobs, ["torch is measured on float32 tables only, and on those that are not pruned."]
    files = {"rows": rows} | ({} if mapping is None else {"mapping": mapping})
    for name, array in files.items():
        np.save(folder / f"torch_{name}.npy", array)
    paths = {name: str(folder / f"torch_{name}.npy") if name in files else None for name in ("rows", "mapping")}
    more = {"contender": "torch", "answer": str(folder / "torch.npy"), "bits": getattr(table, "bits", None)}
    return [*jobs, job | paths | more], []


@contextlib.contextmanager
def started(job: dict[str, Any]) -> Iterator[Contender]:
    """A contender that is ready; its process is killed at the end."""
    # -P: modules beside the script have the names of standard ones, such as inspect.
    command = [sys.executable, "-P", str(Path(__file__).with_name("bench_worker.py")), json.dumps(job)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            answer_of(job["contender"], process)
            yield Contender(job["contender"], process, Path(job["answer"]), [])
        finally:
            process.kill()


def answer_of(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise Failure(f"{name}: its process ended with status {process.wait()}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise Failure(f"{name}: {answer['error']}")
    return answer


def measure(contenders: list[Contender], num_rows: int, options: argparse.Namespace, folder: Path) -> None:
    """Rounds in which each contender takes a turn on the same bags, until the time is over."""
    rng = np.random.default_rng(options.seed)
    draw = traffic(rng, num_rows, options.bags, options.length)
    batches = folder / "batches.npz"
    start, done, rounds = time.monotonic(), 0, 0
    with progress(quiet=options.quiet) as report:
        while rounds < MIN_ROUNDS or time.monotonic() - start < options.seconds:
            drawn = [draw() for _ in range(BATCHES + 1)]
            np.savez(
                batches, **{f"{key}{n}": array for n, some in enumerate(drawn) for key, array in some._asdict().items()}
            )
            timed = sum(len(some.indices) for some in drawn[1:])
            # In random order: otherwise each contender would always find the caches as the same other one left them.
            for number in rng.permutation(len(contenders)):
                contender = contenders[number]
                assert contender.process.stdin is not None
                contender.process.stdin.write(f"{json.dumps(str(batches))}\n")
                contender.process.stdin.flush()
                seconds = answer_of(contender.name, contender.process)["seconds"]
                contender.ns_a_row.append(seconds * 1e9 / timed)
                done += timed
                if report is not None:
                    report(done, None, 0)
            rounds += 1
            check_answers(contenders)


def check_answers(contenders: list[Contender]) -> None:
    first, *others = (np.load(contender.answer) for contender in contenders)
    for contender, vectors in zip(contenders[1:], others, strict=True):
        limit = TOLERANCE * float(np.abs(first).max(initial=0))
        if vectors.shape != first.shape or not np.allclose(vectors, first, rtol=0, atol=limit, equal_nan=True):
            raise Failure(f"{contender.name}: its sums are not those of {contenders[0].name}")


def caption(table: AnyTable, options: argparse.Namespace, rounds: int) -> str:
    config = show_config()
    return (
        f"{printable(str(options.file))}: {table!r}\n"
        f"{options.bags:,} bags a batch, {options.length:,} rows a bag on average, Zipf-like traffic. numpy: float32 "
        f"rows, bag by bag.\nMedian of {rounds} rounds; each contender in a process of its own, which take turns on "
        f"the same bags and whose sums agree.\nqembag {config['version']}, {config['level']}, NumPy {np.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}. Threads: {options.threads}, of numpy 1."
    )
