"""Damages files of tables in every way that it knows, and opens them.

    python fuzz/mutate_files.py COUNT [SEED [FIRST]]

Each file must open right or be refused by a ValueError that names it. One that opens must be one for the official
library too, where that is installed, with the same bytes; names must stand in it once; and looking up rows of its tables
must work. Nothing may take longer than `SECONDS`, or more memory than the file's size and `MEMORY` bytes.

Case N of a seed is always the same: `python fuzz/mutate_files.py 1 SEED N` repeats it. The cases run in a process of
their own, so that a crash is told, with its case.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np

import qembag
from file_damage import INDEX, Files, damaged, split, with_header
from support.files import tables_of_every_kind

try:
    import safetensors
except ImportError:
    safetensors = None

SEED = 20261127
SECONDS = 5
MEMORY = 50_000_000
ONE = "one.safetensors"


class Finding(AssertionError):
    """What must not be."""


# ---- Files to begin with ---------------------------------------------------------------------------------------------


def bases(folder: Path) -> list[Files]:
    """One or several files of each kind."""
    tables = tables_of_every_kind()
    weights = np.arange(96, dtype=np.float32).reshape(12, 8)
    codes = qembag.quantize(weights, 4)

    def saved(name: str, *arguments: Any, **named: Any) -> Files:
        for path in folder.iterdir():
            path.unlink()
        qembag.save_tables(folder / name, *arguments, **named)
        paths = sorted(folder.iterdir(), key=lambda path: path.name != name)
        # The names of shards are new each time.
        names = {path.name: name if path.name == name else f"{number}.safetensors" for number, path in enumerate(paths)}
        found = {}
        for path in paths:
            data = path.read_bytes()
            for old, new in names.items():
                data = data.replace(old.encode(), new.encode()) if path.suffix == ".json" else data
            found[names[path.name]] = data
        return found

    some = {name: tables[name] for name in ("4 bits", "2 bits, pruned", "float32, pruned", "bfloat16")}
    return [
        saved(ONE, codes),
        saved(ONE, codes.prune([0, 3, 4])),
        saved(ONE, tables, metadata={"a": "b", "ä": "\n\\"}),
        saved(ONE, some),
        saved(ONE, weights),
        {ONE: of_another_library()},
        saved(INDEX, some, max_shard_bytes=1),
        {INDEX: b'{"metadata":{"total_size":1e3},"weight_map":{"x":"0.safetensors"}}', "0.safetensors": one_tensor()},
    ]


def one_tensor() -> bytes:
    return with_header({"x": {"dtype": "F16", "shape": [3, 4], "data_offsets": [0, 24]}}, bytes(range(24)))


def of_another_library() -> bytes:
    """Tensors of many types, unaligned, in no order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kinds = {"U8": 8, "BF16": 16, "F32": 32, "F4": 4, "F64": 64, "I32": 32, "F16": 16, "BOOL": 8, "C64": 64}
    end = 0
    for number, (dtype, bits) in enumerate(kinds.items()):
        begin, end = end, end + 6 * bits // 8
        header[f"{9 - number}"] = {"dtype": dtype, "shape": [3, 2], "data_offsets": [begin, end]}
    header["empty"] = {"dtype": "F32", "shape": [0, 5], "data_offsets": [end, end]}
    return with_header(dict(sorted(header.items())), bytes(range(end)))


# ---- Verdicts --------------------------------------------------------------------------------------------------------


@contextmanager
def alarm() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Finding(f"took longer than {SECONDS} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def opened(open_tables: Callable[..., dict[str, Any]], path: Path, size: int, mmap: bool) -> dict[str, Any] | str:
    """The tables of files of so many bytes, or the refusal. Raises `Finding`."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        return open_tables(path, mmap=mmap)
    except ValueError as error:
        if type(error) is not ValueError or str(path.parent) not in str(error):
            raise Finding(f"refused without its name: {error!r}") from error
        if len(str(error)) > 1000 + 10 * len(str(path)):
            raise Finding(f"refused by {len(str(error))} characters") from error
        return str(error).replace(str(path.parent), "")
    finally:
        used = tracemalloc.get_traced_memory()[1] - before
        if used > size + MEMORY:
            raise Finding(f"took {used} bytes of memory for files of {size}")


def verdict(path: Path, files: Files, mmap: bool) -> str:
    """What comes of opening the files: "opened", or the refusal. Raises `Finding`."""
    tables = opened(qembag.open_tables, path, sum(map(len, files.values())), mmap)
    if isinstance(tables, str):
        return tables
    for name, table in tables.items():
        look_up(name, table)
    del tables
    for name, raw in files.items():
        if not name.endswith(".json"):
            judge(path.with_name(name), raw)
    return "opened"


def look_up(name: str, table: Any) -> None:
    count = len(table)
    numbers = np.array([0, count // 2, count - 1]) if count else np.empty(0, np.int64)
    try:
        repr(table)
        if table.dim < 10**6:
            qembag.embedding_bag(table, numbers, [0])
            qembag.embedding(table, numbers)
    except Exception as error:
        raise Finding(f"table {name!r} opened, and cannot be looked up: {error!r}") from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise Finding("opened with a name twice")
    return dict(pairs)


def judge(path: Path, raw: bytes) -> None:
    """Others must read what we do."""
    try:
        tables = qembag.open_tables(path, mmap=False)
    except (ValueError, OSError):
        return  # a part of several files that none of them needs
    header = json.loads(split(raw)[0], object_pairs_hook=unique)
    json.loads(header.get("__metadata__", {}).get("qembag.tables", "{}"), object_pairs_hook=unique)
    if safetensors is None:
        return
    try:
        theirs = {name: (tensor["shape"], bytes(tensor["data"])) for name, tensor in safetensors.deserialize(raw)}
    except safetensors.SafetensorError as error:
        raise Finding(f"opened what the official library refuses: {error}") from None
    for name, table in tables.items():
        shape, data = theirs.get(f"{name}.rows", theirs.get(name, ((), b"")))
        if tuple(shape) != table.data.shape or table.data.tobytes() != (
            data
            if sys.byteorder == "little" or table.data.itemsize == 1
            else np.frombuffer(data, table.data.dtype).byteswap().tobytes()
        ):
            raise Finding(f"table {name!r} has other bytes than in the official library")


def ours(folder: Path) -> Callable[[random.Random], str]:
    """Plays a case with files of qembag's."""
    kinds = bases(folder)

    def play(rng: random.Random) -> str:
        files = damaged(rng.choice(kinds), rng)
        for path in folder.iterdir():
            path.unlink()
        for file, raw in files.items():
            (folder / file).write_bytes(raw)
        with alarm():
            return verdict(folder / next(iter(files)), files, rng.random() < 0.5)

    return play


def run(
    count: int,
    seed: int = SEED,
    first: int = 0,
    *,
    note: Callable[[int], object] = lambda case: None,
    player: Callable[[Path], Callable[[random.Random], str]] = ours,
) -> Counter[str]:
    """How many files were opened, and how many refused by which words. Raises `Finding`."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="qembag-") as name:
        play = player(Path(name))
        traced_before = tracemalloc.is_tracing()
        tracemalloc.start()
        try:
            for case in range(first, first + count):
                note(case)
                try:
                    outcomes[play(random.Random(f"{seed} {case}"))] += 1
                except Exception as error:
                    raise Finding(f"case {case} of seed {seed}: {type(error).__name__}: {error}") from error
        finally:
            if not traced_before:
                tracemalloc.stop()
    return outcomes


def main(arguments: list[str], script: str = __file__, play: Callable[..., Counter[str]] = run) -> int:
    """Runs `play` in another process: the script, started once more."""
    count, seed, first = [*map(int, arguments), *(0, SEED, 0)[len(arguments) :]]
    if "QEMBAG_CASE" not in os.environ:
        with tempfile.NamedTemporaryFile() as case:
            done = subprocess.run(
                [sys.executable, script, *arguments], env=os.environ | {"QEMBAG_CASE": case.name}, check=False
            )
            if done.returncode < 0:
                number = case.read().decode().strip()
                print(
                    f"case {number} of seed {seed}: ended by {signal.Signals(-done.returncode).name}", file=sys.stderr
                )
                return 1
            return done.returncode
    descriptor = os.open(os.environ["QEMBAG_CASE"], os.O_WRONLY)
    started = time.perf_counter()
    try:
        outcomes = play(count, seed, first, note=lambda case: os.pwrite(descriptor, b"%d\n" % case, 0))
    except Finding as finding:
        print(finding, file=sys.stderr)
        return 1
    right = outcomes["opened"]
    print(
        f"{count} files of seed {seed} in {time.perf_counter() - started:.0f} s: {right} opened, {count - right} refused"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
