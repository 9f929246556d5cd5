"""A process of one contender: makes its table, then takes a turn for each line that comes in.

A line is ``[seed, calls, rows, checked]``: so many calls, on the first `rows` rows of the table. The answer is
``[seconds, rows that count, checksums]`` of the timed calls; checksums of those that are to be checked.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
import zlib
from typing import Any

import numpy as np

from .cases import Case
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


def take_core(number: int) -> None:
    """One core for all contenders of a round, another one in the next. Left alone, each contender stays on a core of its
    own, and where one core is slower than the other (a neighbour on a shared machine), so is its contender."""
    if CORES:
        os.sched_setaffinity(0, {CORES[number % len(CORES)]})


def turn(case: Case, rows: int, contender: Contender, seed: int, calls: int, checked: bool = False) -> list[Any]:
    """Seconds of the calls, how many rows they looked up, and checksums of the answers."""
    if case.threads == 1:
        take_core(seed)
    call, arguments, all_count = contender
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
    checksums = [checksum([answer]), checksum(call(*some) for some in again)] if checked else None
    if case.work != "lookup":
        per_call = [rows]
    else:
        per_call = [len(indices) if all_count else counted(case, rows, indices) for indices, *_ in traffic]
    return [seconds, sum(itertools.islice(itertools.cycle(per_call), calls)), checksums]


def main() -> None:
    job = json.loads(sys.argv[1])
    case, name = Case(**job["case"]), job["contender"]
    PLACES.seed(job["start"])
    shift = reserve(random_place())  # noqa: F841  moves what malloc hands out from here on
    if name == "numpy" or case.work in ("prepack", "greedy"):
        table = float_table(case)
    else:
        table = packed_table(case, job["path"])
    mapping = mapping_of(case)
    contender = build(name, case, table, mapping, job["own_output"])
    gc.disable()
    modules = {module: sys.modules[module].__file__ for module in ("qembag", "torch") if module in sys.modules}
    print(json.dumps(modules), flush=True)
    for line in sys.stdin:
        seed, calls, rows, checked = json.loads(line)
        if case.threads > 1:
            time.sleep(IDLE)
        checked = checked and name not in ("numpy", "floor")
        print(json.dumps(turn(case, rows, contender, seed, calls, checked)), flush=True)


if __name__ == "__main__":
    main()
