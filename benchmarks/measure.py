"""Contenders of one case in processes of their own, which take turns round by round."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import tables
from .cases import Case
from .intervals import summary
from .packages import check_origin, copy, package_of

ROOT = Path(__file__).resolve().parents[1]
# Timed work of a turn; shorter ones are disturbed more, longer ones leave more time between the two of a ratio.
TURN_SECONDS = 0.01
# Rounds after each start before the first that counts; each corrects the number of calls a turn.
WARM_UPS = 2
MOST_CALLS = 20_000
# NumPy takes about ten times as long.
NUMPY_SHARE = 8

Worker = subprocess.Popen[str]


def environment(case: Case, folder: Path | None) -> dict[str, str]:
    """One level for all where the case names it, and first of all what is in `folder`."""
    # A pool of BLAS would start threads that nothing here uses.
    settings = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    for variable in ("QEMBAG_KERNELS", "FBGEMM_ENABLE_INSTRUCTIONS"):
        settings.pop(variable, None)
    if case.level:
        settings["QEMBAG_KERNELS"] = case.level
    if case.level == "avx2":
        settings["FBGEMM_ENABLE_INSTRUCTIONS"] = "AVX2"
    if folder:
        settings["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return settings


def start(name: str, case: Case, folder: Path | None, path: str | None, own_output: bool, number: int) -> Worker:
    job = json.dumps(
        {
            "contender": name,
            "case": dataclasses.asdict(case),
            "path": path,
            "own_output": own_output,
            "start": number,
        }
    )
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(case, folder),
    )


def answer_of(worker: Worker) -> Any:
    assert worker.stdout
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a contender died with status {worker.wait()}: {worker.args}")
    return json.loads(line)


def turn(worker: Worker, seed: int, calls: int, checked: bool = False) -> list[Any]:
    assert worker.stdin
    worker.stdin.write(f"{json.dumps([seed, max(calls, 1), checked])}\n")
    worker.stdin.flush()
    return answer_of(worker)


@contextlib.contextmanager
def working(names: list[str], case: Case, against: Path | None = None, number: int = 0) -> Iterator[dict[str, Worker]]:
    """A worker for each contender, ready. They start together, so that the making of their tables overlaps."""
    with contextlib.ExitStack() as stack:
        room, path = Path(stack.enter_context(tempfile.TemporaryDirectory())), None
        if case.pages == "file":
            path = str(room / "table")
            tables.write_file(case, path)
        workers: dict[str, Worker] = {}
        folders: dict[str, Path] = {}
        try:
            for place, name in enumerate(names):
                if package := package_of(name, against):
                    folders[name] = room / str(place)
                    copy(package, folders[name])
                workers[name] = start(name, case, folders.get(name), path, "torch" not in names, number)
            for name, worker in workers.items():
                modules = answer_of(worker)
                if name in folders:
                    check_origin(modules, folders[name])
            yield workers
        finally:
            for worker in workers.values():
                worker.kill()
                worker.communicate()


def calls_for(seconds: float, calls: int) -> int:
    """How many calls make a turn, from what so many took."""
    return int(np.clip(calls * TURN_SECONDS / seconds, 1, MOST_CALLS))


def rival_of(case: Case, against: Path | None) -> str | None:
    """Whose time is measured beside ours; nobody's where torch has no such operator."""
    return "other" if against else None if case.beyond_torch else "torch"


def compared_with(case: Case, against: Path | None) -> str | None:
    """Whose answers are compared with ours: the rival's, or of another layout those of torch's layout."""
    return rival_of(case, against) or ("plain" if case.other_layout else None)


def agree(case: Case, rival: str, ours: list[int], theirs: list[int]) -> bool:
    """In all bits; torch's bfloat16 in all but the last one.

    Both sum in float32, to the same bits. Then torch rounds a tie away from zero, and qembag to even; of sums of 40
    bfloat16 about 1 % are ties.
    """
    if case.element != "bfloat16" or rival != "torch":
        return ours == theirs
    # After two checksums: bits of a sign and a magnitude, of which neighbours differ by 1.
    return len(ours) == len(theirs) and max(abs(a - b) for a, b in zip(ours[2:], theirs[2:], strict=True)) <= 1


def contenders_of(case: Case, against: Path | None) -> list[str]:
    rival = rival_of(case, against)
    names = ["qembag", *([rival] if rival else [])]
    return names if against else [*names, *(["plain"] if case.optional else []), *case.extras]


def take_turns(
    workers: dict[str, Worker], seed: int, calls: int, order: random.Random, checked: bool
) -> dict[str, list[Any]]:
    """One round, in random order."""
    names = order.sample(list(workers), len(workers))
    return {
        name: turn(workers[name], seed, calls // NUMPY_SHARE if name == "numpy" else calls, checked) for name in names
    }


def measure_start(
    case: Case, number: int, rounds: int, against: Path | None, calls: int
) -> tuple[dict[str, list[float]], bool, int]:
    """Ns a row of each contender in each round of one start, whether the answers are equal, and how many calls made a
    turn."""
    names, judge = contenders_of(case, against), compared_with(case, against)
    nanoseconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(f"{case.name}/{number}")
    equal = True
    with working(order.sample(names, len(names)), case, against, number) as workers:
        for place in range(WARM_UPS + rounds):
            last = place == WARM_UPS + rounds - 1
            turns = take_turns(workers, number * (WARM_UPS + rounds) + place, calls, order, last)
            if last and judge:
                equal = agree(case, judge, turns["qembag"][2], turns[judge][2])
            if place < WARM_UPS:
                calls = calls_for(max(turns[name][0] for name in names if name not in case.extras), calls)
                continue
            for name, (seconds, rows, _) in turns.items():
                nanoseconds[name].append(seconds / rows * 1e9)
    return nanoseconds, equal, calls


def median_ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return float(np.median(np.array(times[above]) / times[below]))


def measure(case: Case, starts: int, rounds: int, against: Path | None = None) -> dict[str, Any]:
    """Median ns a row of each contender; `ratio`, the rival's time over ours, where the case has an option or a layout
    `cost`, our time over the plain loop's, and where floats are copied `copies`, our time over the copy's: of each start
    the median of its rounds, and over starts their median and interval."""
    rival, calls = rival_of(case, against), 2
    measured, equal = [], True
    for number in range(starts):
        nanoseconds, same, calls = measure_start(case, number, rounds, against, calls)
        measured.append(nanoseconds)
        equal = equal and same
    result: dict[str, Any] = {
        "ns": {name: float(np.median([np.median(times[name]) for times in measured])) for name in measured[0]},
        "equal": equal if compared_with(case, against) else None,
        "calls": calls,
        "rounds": rounds,
        "date": datetime.date.today().isoformat(),
    }
    if rival:
        result["ratio"] = summary([median_ratio(times, rival, "qembag") for times in measured])
    for key, below in (("cost", "plain"), ("copies", "copy")):
        if below in measured[0]:
            result[key] = summary([median_ratio(times, "qembag", below) for times in measured])
    return result
