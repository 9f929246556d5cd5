"""Squared errors and cosines between exact and approximate vectors, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

# Histogram edges of ``1 - cosine``, about 24 bins a decade. Values outside count in the first or the last bin.
EDGES = np.logspace(-8, np.log10(2), 201)


class Cosines(NamedTuple):
    """The cosines between many approximate vectors and the exact ones, summarized.

    Attributes
    ----------
    mean, first_percentile, worst : float
        `first_percentile` is ``numpy.percentile(cosines, 1)``. All are nan if `num_vectors` is 0.
    num_vectors : int
        Vectors that have a cosine. If the exact vector is zero, it has no direction, and the pair is left out. If only
        the approximate one is zero, the cosine is 0.
    histogram : tuple of int
        How many vectors have a ``1 - cosine`` in each bin of `EDGES`.
    """

    mean: float
    first_percentile: float
    worst: float
    num_vectors: int
    histogram: tuple[int, ...]


class Distance(NamedTuple):
    """The error of approximate vectors: sums of squares over all elements, and each vector's cosine, nan if it has
    none."""

    squared_error: float
    squares: float
    cosines: NDArray[np.float64]

    @property
    def relative_squared_error(self) -> float:
        """``squared_error / squares``. If all exact vectors are zero, 0 if there is no error, else inf."""
        if self.squares == 0:
            return np.inf if self.squared_error else 0.0
        return self.squared_error / self.squares


def distance(blocks: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Distance:
    """The distance of approximate vectors from exact ones; `blocks` has pairs of (exact, approximate) arrays."""
    errors, squares, cosines = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
    # Float32 sums in the vectors may be infinite. In float64 even the square of the smallest float32 is not zero.
    with np.errstate(invalid="ignore", over="ignore"):
        for exact, approximate in blocks:
            a, b = exact.astype(np.float64), approximate.astype(np.float64)
            sizes, sizes_b, products = _dot(a, a), _dot(b, b), _dot(a, b)
            lengths = np.sqrt(sizes) * np.sqrt(sizes_b)
            has_cosine = (lengths > 0) & np.isfinite(lengths)
            found = np.divide(products, lengths, out=np.zeros(len(a)), where=has_cosine)
            found[(sizes == 0) | ~np.isfinite(sizes)] = np.nan
            b -= a
            errors.append(_dot(b, b))
            squares.append(sizes)
            cosines.append(np.clip(found, -1, 1))
    # One number per vector is kept, so that the result does not depend on the block size.
    return Distance(float(np.concatenate(errors).sum()), float(np.concatenate(squares).sum()), np.concatenate(cosines))


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = np.einsum("ij,ij->i", a, b)
    return product


def summary(cosines: NDArray[np.float64]) -> Cosines:
    """Summarize cosines; nan entries are left out."""
    there = cosines[~np.isnan(cosines)]
    counts = np.histogram(np.clip(1 - there, EDGES[0], EDGES[-1]), EDGES)[0]
    if not len(there):
        return Cosines(np.nan, np.nan, np.nan, 0, tuple(counts.tolist()))
    return Cosines(
        float(there.mean()), float(np.percentile(there, 1)), float(there.min()), len(there), tuple(counts.tolist())
    )


def lowest(cosines: NDArray[np.float64], numbers: NDArray[np.int64], most: int) -> tuple[tuple[int, float], ...]:
    """The numbers and cosines of the `most` worst vectors, the worst first; ties in their order."""
    order = np.argsort(cosines, kind="stable")[:most]  # nan comes last
    return tuple((int(numbers[place]), float(cosines[place])) for place in order if not np.isnan(cosines[place]))
