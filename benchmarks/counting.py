"""Instructions a row, for machines whose clock cannot be trusted: by `perf stat`, or where it cannot count, by callgrind.

A contender runs in a process of its own, once with some calls and once with twice as many; the difference is free of all
that both have in common, such as imports and making the table. Instructions are not time: a loop that waits for memory or
for itself has few.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .cases import CASES, Case
from .measure import ROOT, environment

SETS = 4
SEED = 1
# Rows of the shorter run, and at least so many calls. callgrind counts the same at each run, to some thousand instructions
# of hundreds of millions; perf counts what the kernel's interruptions change, but is fifty times as fast.
ROWS = 100_000
LEAST_CALLS = 8
MOST_CALLS = 2_000
PERF_SHARE = 50


class Counter(NamedTuple):
    name: str
    command: list[str]  # before the command whose instructions it counts
    count: Callable[[str], int | None]  # from what it writes to stderr
    longer: int  # so many times as many calls


def perf_count(text: str) -> int | None:
    """None where the machine does not count, or does not say."""
    found = re.search(r"^(\d+),[^,]*,instructions", text, re.MULTILINE)
    return int(found[1]) if found else None


def callgrind_count(text: str) -> int | None:
    found = re.search(r"^==\d+== Collected : (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


PERF = Counter("perf", ["perf", "stat", "-x,", "-e", "instructions:u", "--"], perf_count, PERF_SHARE)
CALLGRIND = Counter(
    "callgrind", ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}"], callgrind_count, 1
)


@functools.cache
def counter() -> Counter:
    if shutil.which("perf"):
        done = subprocess.run([*PERF.command, "true"], text=True, capture_output=True, check=False)
        if perf_count(done.stderr) is not None:
            return PERF
    if shutil.which("valgrind"):
        return CALLGRIND
    raise SystemExit("--count needs a perf that counts instructions here, or valgrind")


def countable(names: list[str], levels: list[str]) -> list[Case]:
    """Those that are cached and use one thread, at a level that is here."""
    cases = [CASES[name] for name in names if name in CASES]
    chosen = [case for case in cases if case.group == "cached" and case.threads == 1 and case.level in (None, *levels)]
    if not chosen:
        raise SystemExit("--count is for cached cases of one thread, and none of those was chosen")
    return chosen


def level_of(case: Case, counter_name: str, levels: list[str]) -> str | None:
    """The one to run at: valgrind knows no AVX-512."""
    if case.level is None and counter_name == "callgrind" and levels[-1] == "avx512":
        return "avx2"
    return case.level


def note(counter_name: str, levels: list[str]) -> str:
    """What was counted, for the reader of the numbers."""
    if counter_name == "perf":
        return f"Instructions in user space by perf, level {levels[-1]} where the name says no other."
    limited = " (valgrind knows no AVX-512)" if levels[-1] == "avx512" else ""
    return (
        f"Instructions by callgrind, level {'avx2' if limited else levels[-1]}{limited} where the name says no other."
    )


def calls_of(case: Case) -> int:
    """How many calls the shorter run makes: a multiple of the sets, so that the longer one looks up twice the rows."""
    rows = case.bags * (40 if case.length == "mixed" else int(case.length))
    return int(np.clip(ROWS // rows, LEAST_CALLS, MOST_CALLS)) // SETS * SETS


def run(counter: Counter, name: str, case: Case, against: Path | None, calls: int) -> tuple[int, int]:
    """Instructions of a process that makes so many calls, and how many rows these look up."""
    job = json.dumps({"contender": name, "case": dataclasses.asdict(case), "path": None, "own_output": True})
    done = subprocess.run(
        [*counter.command, sys.executable, "-m", "benchmarks.counting", job, str(calls)],
        cwd=ROOT,
        env=environment(case, against if name == "other" else None) | {"PYTHONHASHSEED": "0"},
        text=True,
        capture_output=True,
        check=False,
    )
    instructions = counter.count(done.stderr)
    if done.returncode or instructions is None:
        raise SystemExit(f"{counter.name} did not count {case.name} of {name}:\n{done.stderr}")
    return instructions, json.loads(done.stdout)


def count(case: Case, levels: list[str], against: Path | None = None) -> dict[str, float]:
    """Instructions a row of each contender."""
    by = counter()
    case = dataclasses.replace(case, level=level_of(case, by.name, levels))
    names = ["other"] if against else ["plain"] if case.optional else []
    calls = calls_of(case) * by.longer
    jobs = list(itertools.product([*names, "qembag"], (calls, 2 * calls)))
    # Counts do not mind neighbours.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = dict(zip(jobs, pool.map(lambda job: run(by, job[0], case, against, job[1]), jobs), strict=True))
    per_row = {}
    for name in [*names, "qembag"]:
        (few, rows), (many, more_rows) = counts[name, calls], counts[name, 2 * calls]
        per_row[name] = (many - few) / (more_rows - rows)
    return per_row


def main() -> None:
    from .worker import prepare, rows_of, traffic_of

    job, calls = json.loads(sys.argv[1]), int(sys.argv[2])
    case, contender = prepare(job)
    traffic = traffic_of(case, case.rows, (SEED, 0), SETS)
    prepared = [contender.arguments(*arrays) for arrays in traffic]
    for some in itertools.islice(itertools.cycle(prepared), calls):
        contender.call(*some)
    print(json.dumps(rows_of(case, case.rows, contender, traffic, calls)))


if __name__ == "__main__":
    main()
