"""Contenders of one case in processes of their own, which take turns round by round."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import tables
from .cases import Case

ROOT = Path(__file__).resolve().parents[1]
# Timed work of a turn; shorter ones are disturbed more, longer ones leave more time between the two of a ratio.
TURN_SECONDS = 0.01
# How often the contenders of a case whose table is soon made are started anew, each time for a part of the rounds. Where
# the system happens to put a process's arrays is with it for life: bags of one row came out 0.90 to 1.12 times as fast
# as in another process of the same build, each time with quartiles of 0.02.
STARTS = 3
# Rounds after each start before the first that counts; each corrects the number of calls a turn.
WARM_UPS = 3
MOST_CALLS = 20_000
# NumPy takes about ten times as long.
NUMPY_SHARE = 8

Worker = subprocess.Popen[str]


def environment(name: str, case: Case, against: Path | None) -> dict[str, str]:
    """One level for all where the case names it, and only "other" may see the package in `against`."""
    # A pool of BLAS would start threads that nothing here uses.
    settings = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    for variable in ("QEMBAG_KERNELS", "FBGEMM_ENABLE_INSTRUCTIONS"):
        settings.pop(variable, None)
    if case.level:
        settings["QEMBAG_KERNELS"] = case.level
    if case.level == "avx2":
        settings["FBGEMM_ENABLE_INSTRUCTIONS"] = "AVX2"
    if name == "other":
        settings["PYTHONPATH"] = os.pathsep.join([str(against), *filter(None, [os.environ.get("PYTHONPATH")])])
    return settings


def start(name: str, case: Case, against: Path | None = None, path: str | None = None) -> Worker:
    job = json.dumps({"contender": name, "case": dataclasses.asdict(case), "path": path})
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(name, case, against),
    )


def answer_of(worker: Worker) -> Any:
    assert worker.stdout
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a contender died with status {worker.wait()}: {worker.args}")
    return json.loads(line)


def turn(worker: Worker, seed: int, calls: int, rows: int) -> list[Any]:
    assert worker.stdin
    worker.stdin.write(f"{json.dumps([seed, max(calls, 1), rows])}\n")
    worker.stdin.flush()
    return answer_of(worker)


@contextlib.contextmanager
def working(names: list[str], case: Case, against: Path | None = None) -> Iterator[dict[str, Worker]]:
    """A worker for each contender, ready. They start together, so that the making of their tables overlaps."""
    with contextlib.ExitStack() as stack:
        path = None
        if case.pages == "file":
            path = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "table")
            tables.write_file(case, path)
        workers = {}
        try:
            for name in names:
                workers[name] = start(name, case, against, path)
            for name, worker in workers.items():
                check_origin(name, answer_of(worker), against)
            yield workers
        finally:
            for worker in workers.values():
                worker.kill()
                worker.communicate()


def check_origin(name: str, modules: dict[str, str], against: Path | None) -> None:
    """A comparison of one build with itself says nothing, and looks as if it did."""
    if against is None or name not in ("qembag", "other"):
        return
    inside = Path(modules["qembag"]).resolve().is_relative_to(against.resolve())
    if inside != (name == "other"):
        raise SystemExit(f"{name} imported {modules['qembag']}, with --against {against}")


def take_turns(workers: dict[str, Worker], seed: int, calls: int, rows: int) -> dict[str, list[Any]]:
    """One round, in changing order."""
    names = list(workers) if seed % 2 else list(workers)[::-1]
    return {name: turn(workers[name], seed, calls // NUMPY_SHARE if name == "numpy" else calls, rows) for name in names}


def calls_for(seconds: float, calls: int) -> int:
    """How many calls make a turn, from what so many took."""
    return int(np.clip(calls * TURN_SECONDS / seconds, 1, MOST_CALLS))


def measure(case: Case, rounds: int, against: Path | None = None) -> dict[str, Any]:
    """Median ns a row of each contender, and the median and quartiles of the rounds' ratios, theirs over ours."""
    rival = "other" if against else "torch"
    compared = ["qembag", rival]
    names = [*compared, *([] if against else case.extras)]
    nanoseconds: dict[str, list[float]] = {name: [] for name in names}
    starts = STARTS if tables.is_cached(case, case.rows) else 1
    equal, calls = True, 2
    seeds = itertools.count()
    for begun in range(min(starts, rounds)):
        with working(names, case, against) as workers:
            for number in range(WARM_UPS + len(range(begun, rounds, starts))):
                turns = take_turns(workers, next(seeds), calls, case.rows)
                equal = equal and turns["qembag"][2] == turns[rival][2]
                if number < WARM_UPS:
                    calls = calls_for(max(turns[name][0] for name in compared), calls)
                    continue
                for name, (seconds, indices, _) in turns.items():
                    nanoseconds[name].append(seconds / indices * 1e9)
    ratios = np.array(nanoseconds[rival]) / nanoseconds["qembag"]
    return {
        "ns": {name: float(np.median(times)) for name, times in nanoseconds.items()},
        "ratio": float(np.median(ratios)),
        "quartiles": [float(quartile) for quartile in np.percentile(ratios, [25, 75])],
        "equal": equal,
        "calls": calls,
        "rounds": rounds,
        "date": datetime.date.today().isoformat(),
    }
