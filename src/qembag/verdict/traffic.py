"""Random bags of rows, as skewed as in practice, and rounds of lookups that are timed in turns."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray


B = TypeVar("B")
# Medians are stable within 30 rounds. After MAX_SECONDS no new round starts.
MAX_ROUNDS, MIN_ROUNDS, MAX_SECONDS = 30, 3, 3.0


class Batch(NamedTuple):
    """Bags as `embedding_bag` takes them; the offsets do not include the end of the last bag."""

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]


def traffic(rng: np.random.Generator, num_rows: int, num_bags: int, mean_length: int) -> Callable[[], Batch]:
    """Return a function that draws batches. Rows are skewed like words and clicks; popular ones are scattered.

    The row of popularity rank r has a probability of ``log(1 + 1 / r) / log(num_rows + 1)``: Zipf's law.
    """
    row_of_rank = rng.permutation(num_rows)

    def draw() -> Batch:
        lengths = rng.integers(1, 2 * mean_length, num_bags)
        ranks = (num_rows + 1) ** rng.random(lengths.sum())
        # Rounding can make a power equal its limit, num_rows + 1.
        indices = row_of_rank[np.minimum(ranks.astype(np.int64), num_rows) - 1]
        return Batch(indices, np.cumsum(lengths) - lengths)

    return draw


def time_rounds(
    jobs: Sequence[Callable[[B], object]], draw: Callable[[], B], rng: np.random.Generator
) -> Iterator[tuple[B, list[int]]]:
    """Yield, for each round, a fresh batch and the nanoseconds that each job took with it."""
    end = time.perf_counter() + MAX_SECONDS
    number = 0
    while number < MIN_ROUNDS or (number < MAX_ROUNDS and time.perf_counter() < end):
        batch = draw()
        times = [0] * len(jobs)
        # In random order: otherwise each job would always find the caches as the same other one left them.
        for job in rng.permutation(len(jobs)):
            start = time.perf_counter_ns()
            jobs[job](batch)
            times[job] = time.perf_counter_ns() - start
        yield batch, times
        number += 1
