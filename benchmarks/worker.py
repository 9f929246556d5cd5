"""A process of one contender: makes its table, then takes a turn for each line that comes in.

A line is ``[seed, calls, checked]``: make so many calls. The answer is ``[seconds, rows that count, checksums]`` of the
timed calls; checksums only of those that are to be checked, and of bfloat16 also the bits of some answers.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from .cases import Case, plain
from .contenders import Contender, build
from .tables import (
    PLACES,
    counted,
    float_table,
    mapping_of,
    number_of_sets,
    packed_table,
    placed,
    random_place,
    reserve,
    sets,
)

# Threads of a pool spin for a while after their work, and would take the next contender's core.
IDLE = 0.05
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
# Of the calls of a turn, how many go before the clock starts: they wake threads and bring a cached table in.
WARM_UP_SHARE = 8
# Bags of bfloat16 whose bits are sent: torch rounds ties in another way, so a checksum is not enough.
SENT_BAGS = 64
# NumPy's rows are not quantized, and the others look nothing up.
UNCHECKED = ("numpy", "floor", "copy")


def traffic_of(case: Case, rows: int, seed: tuple[int, ...], count: int) -> list[tuple[np.ndarray, ...]]:
    """What each call is given beside the table; to quantize or unpack, nothing."""
    if case.work != "lookup":
        return [()] * count
    return [tuple(map(placed, arrays)) for arrays in sets(case, rows, seed, count)]


def checksum(answers: Any) -> int:
    total = 0
    for answer in answers:
        total = zlib.crc32(np.ascontiguousarray(answer), total)
    return total


def compared(case: Case, answer: np.ndarray, others: Iterable[np.ndarray]) -> list[int]:
    """What is compared of the last answer, and of each set's: checksums, and of bfloat16 also bits of the last."""
    sent = answer[:SENT_BAGS].ravel().tolist() if case.element == "bfloat16" else []
    return [checksum([answer]), checksum(others), *sent]


def take_core(number: int) -> None:
    """One core for all contenders of a round, another one in the next. Left alone, each contender stays on a core of its
    own, and where one core is slower than the other (a neighbour on a shared machine), so is its contender."""
    if CORES:
        os.sched_setaffinity(0, {CORES[number % len(CORES)]})


def rows_of(case: Case, rows: int, contender: Contender, traffic: list[tuple[np.ndarray, ...]], calls: int) -> int:
    """How many rows so many calls look up, pruned ones and padding left out; or quantize."""
    if case.work != "lookup":
        return calls * rows
    per_call = [len(indices) if contender.all_count else counted(case, rows, indices) for indices, *_ in traffic]
    return sum(itertools.islice(itertools.cycle(per_call), calls))


def turn(case: Case, rows: int, contender: Contender, seed: int, calls: int, checked: bool = False) -> list[Any]:
    """Seconds of the calls, how many rows they looked up, and checksums of the answers."""
    if case.threads == 1:
        take_core(seed)
    call, arguments, _, array = contender
    count = number_of_sets(case, rows, calls)
    traffic = traffic_of(case, rows, (seed, 0), count)
    prepared = [arguments(*arrays) for arrays in traffic]
    timed = list(itertools.islice(itertools.cycle(prepared), calls))
    first = traffic_of(case, rows, (seed, 1), -(-count // WARM_UP_SHARE))
    for arrays in first:
        call(*arguments(*arrays))

    start = time.perf_counter()
    for some in timed:
        answer = call(*some)
    seconds = time.perf_counter() - start

    # The answers are not kept while the clock runs: that would measure fresh pages. Each set is looked up again.
    again = prepared if case.work == "lookup" else []
    checksums = compared(case, array(answer), (array(call(*some)) for some in again)) if checked else None
    return [seconds, rows_of(case, rows, contender, traffic, calls), checksums]


def prepare(job: dict[str, Any]) -> tuple[Case, Contender]:
    """The case of a job, and its contender with a table."""
    case, name = Case(**job["case"]), job["contender"]
    if name in ("numpy", "copy") or case.work in ("prepack", "greedy", "lsq") or case.of_floats:
        table = float_table(case)
    else:
        table = packed_table(case, job["path"], plain(case) if name == "plain" else case)
    return case, build(name, case, table, mapping_of(case), job["own_output"])


def main() -> None:
    job = json.loads(sys.argv[1])
    PLACES.seed(job["start"])
    shift = reserve(random_place())  # noqa: F841 -- kept: moves what malloc hands out from here on
    case, contender = prepare(job)
    # Least squares have other codes than torch's.
    checkable = job["contender"] not in UNCHECKED and case.work != "lsq"
    gc.disable()
    modules = {module: sys.modules[module].__file__ for module in ("qembag", "torch") if module in sys.modules}
    print(json.dumps(modules), flush=True)
    for line in sys.stdin:
        seed, calls, checked = json.loads(line)
        if case.threads > 1:
            time.sleep(IDLE)
        print(json.dumps(turn(case, case.rows, contender, seed, calls, checked and checkable)), flush=True)


if __name__ == "__main__":
    main()
