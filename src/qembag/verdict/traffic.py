"""Random bags of rows, as skewed as in practice, for comparisons, the demo and the benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


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
