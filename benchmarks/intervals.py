"""What the starts of a case say together: a median, and an interval that says how far to believe it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

CONFIDENCE = 0.95
# Of fewer starts no interval holds the median with even 90 %, and no case is called slower or faster.
LEAST_STARTS = 5


def coverage(count: int, left_out: int) -> float:
    """How likely the true median is between the values that remain when `left_out` are left out at each end.

    Each value is above or below it with equal chance. It is outside when all but `left_out` of them, or more, are on one
    side.
    """
    return 1 - 2 * sum(math.comb(count, number) for number in range(left_out + 1)) / 2**count


def left_out(count: int) -> int:
    """How many of the values at each end the interval does not need."""
    number = 0
    while coverage(count, number + 1) >= CONFIDENCE:
        number += 1
    return number


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what the values are drawn from, however they are spread.

    From the smallest value to the largest; of nine or more some at the ends are left out, as many as 95 % allow.
    """
    ordered = sorted(values)
    unneeded = left_out(len(ordered))
    return ordered[unneeded], ordered[-1 - unneeded]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Of a case's ratios, one of each start."""
    return {"median": median(values), "interval": list(interval(values)), "starts": list(values)}


def is_slower(ratio: dict[str, Any], bound: float = 1) -> bool:
    """The whole interval is below the bound, and there were enough starts to say so."""
    return len(ratio["starts"]) >= LEAST_STARTS and ratio["interval"][1] < bound


def is_faster(ratio: dict[str, Any], bound: float = 1) -> bool:
    """The same above it."""
    return len(ratio["starts"]) >= LEAST_STARTS and ratio["interval"][0] > bound


def by_chance(ratios: Iterable[dict[str, Any]]) -> float:
    """How many cases would be called slower, and as many faster, if nothing but noise told the contenders apart."""
    counts = [len(ratio["starts"]) for ratio in ratios]
    return sum((1 - coverage(count, left_out(count))) / 2 for count in counts if count >= LEAST_STARTS)
