"""ns a row as a table grows from the first cache to memory that no translation buffer covers."""

from __future__ import annotations

import datetime
import gc
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np

from .cases import Case
from .contenders import build
from .measure import ROOT, WARM_UPS, calls_for
from .tables import packed_table
from .worker import turn

CONTENDERS = ("qembag", "torch", "floor")
SMALLEST_ROWS = 1_000
LARGEST_BYTES = 8 << 30
STEP = 2.5
# Of the machine's free memory, what one table may take.
MEMORY_SHARE = 0.6
THREADS = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def largest_bytes() -> int:
    """8 GiB, or what fits here."""
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return LARGEST_BYTES
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(LARGEST_BYTES, int(MEMORY_SHARE * free))


def measure_growth(bits: int, rounds: int, num_bytes: int | None = None) -> dict[str, Any]:
    """In one process, apart from this one: so the memory is the same for all, and gone when it is done."""
    command = [sys.executable, "-m", "benchmarks.growth", json.dumps([bits, rounds, num_bytes])]
    done = subprocess.run(command, cwd=ROOT, env=THREADS, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def grow(bits: int, rounds: int, num_bytes: int | None) -> dict[str, Any]:
    """Turns on the first rows of one table, which is as large as fits. With one thread each, the contenders have no
    pools that could disturb each other."""
    row_bytes = Case("", 1, 64, bits).row_bytes
    largest = (num_bytes or largest_bytes()) // row_bytes
    steps = max(round(np.log(largest / SMALLEST_ROWS) / np.log(STEP)), 1)
    sizes = [int(rows) for rows in np.geomspace(SMALLEST_ROWS, largest, steps + 1)]
    case = Case(f"growth/{bits}bit", largest, 64, bits, bags=512)
    table = packed_table(case)
    gc.disable()
    medians: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for rows in sizes:
        np.add.reduce(table[:rows].reshape(-1)[::4096])  # pages that the system, or its host, has put aside
        contenders = {name: build(name, case, table[:rows], None) for name in CONTENDERS}
        calls, times = 2, {name: [] for name in CONTENDERS}
        for number in range(WARM_UPS + rounds):
            longest = 0.0
            for place in range(len(CONTENDERS)):
                name = CONTENDERS[(place + number) % len(CONTENDERS)]
                # Each with rows of its own: whoever came first would warm the others' up.
                seed = number * len(CONTENDERS) + place
                seconds, indices, _ = turn(case, rows, contenders[name], seed, calls, False)
                longest = max(longest, seconds)
                times[name].append(seconds / indices * 1e9)
            if number < WARM_UPS:
                calls = calls_for(longest, calls)
        for name in CONTENDERS:
            medians[name].append(float(np.median(times[name][WARM_UPS:])))
    return {
        "ns": medians,
        "rows": sizes,
        "bytes": [rows * row_bytes for rows in sizes],
        "rounds": rounds,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    print(json.dumps(grow(*json.loads(sys.argv[1]))))
