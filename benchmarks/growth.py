"""ns a row as a table grows from the first cache to memory that no translation buffer covers."""

from __future__ import annotations

import datetime
import os
from typing import Any

import numpy as np

from .cases import Case
from .measure import WARM_UPS, calls_for, turn, working

CONTENDERS = ("qembag", "torch", "floor")
SMALLEST_ROWS = 1_000
LARGEST_BYTES = 8 << 30
STEP = 2.5
# Of the machine's free memory, what one table may take.
MEMORY_SHARE = 0.6


def largest_bytes() -> int:
    """8 GiB, or what fits here."""
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return LARGEST_BYTES
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(LARGEST_BYTES, int(MEMORY_SHARE * free))


def measure_growth(bits: int, rounds: int, num_bytes: int | None = None) -> dict[str, Any]:
    """One contender after another, because three of the largest tables do not fit; so there are no ratios here.

    Each makes the largest table once; the smaller ones are its first rows.
    """
    row_bytes = Case("", 1, 64, bits).row_bytes
    largest = (num_bytes or largest_bytes()) // row_bytes
    steps = max(round(np.log(largest / SMALLEST_ROWS) / np.log(STEP)), 1)
    sizes = [int(rows) for rows in np.geomspace(SMALLEST_ROWS, largest, steps + 1)]
    case = Case(f"growth/{bits}bit", largest, 64, bits, bags=512)
    medians: dict[str, list[float]] = {}
    for name in CONTENDERS:
        medians[name] = []
        with working([name], case) as workers:
            for rows in sizes:
                calls, times = 2, []
                for number in range(WARM_UPS + rounds):
                    seconds, indices, _ = turn(workers[name], number, calls, rows)
                    if number < WARM_UPS:
                        calls = calls_for(seconds, calls)
                    else:
                        times.append(seconds / indices * 1e9)
                medians[name].append(float(np.median(times)))
    return {
        "ns": medians,
        "rows": sizes,
        "bytes": [rows * row_bytes for rows in sizes],
        "rounds": rounds,
        "date": datetime.date.today().isoformat(),
    }
