"""How far vectors are from what they should be: squared errors and cosines, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

# Of histograms: edges of ``1 - cosine``, some 24 bins a decade. What is below the first or above the last counts there.
EDGES = np.logspace(-8, np.log10(2), 201)


class Cosines(NamedTuple):
    """Those of many vectors with what they should be.

    Attributes
    ----------
    mean, first_percentile, worst : float
        ``numpy.percentile(cosines, 1)`` is the second one. nan where `num_vectors` is 0.
    num_vectors : int
        Vectors that have a cosine: those that should be zero have no direction, and are left out. One that should not
        be zero, and is, counts with a cosine of 0.
    histogram : tuple of int
        How many have a ``1 - cosine`` between each two of `EDGES`.
    """

    mean: float
    first_percentile: float
    worst: float
    num_vectors: int
    histogram: tuple[int, ...]


class Distance(NamedTuple):
    """Of approximate vectors from exact ones: sums of squares over all elements, and a cosine a vector, nan where
    there is none."""

    squared_error: float
    squares: float
    cosines: NDArray[np.float64]

    @property
    def relative_squared_error(self) -> float:
        """0 where all is zero, and is so exactly."""
        if self.squares == 0:
            return np.inf if self.squared_error else 0.0
        return self.squared_error / self.squares


def distance(blocks: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Distance:
    """Of the second from the first of two arrays of vectors, which come in blocks."""
    errors, squares, cosines = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
    # Sums of float32 may have overflowed. In float64 the square of the smallest float32 is not zero.
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
    # A number a vector is kept, so that the result does not depend on the size of blocks.
    return Distance(float(np.concatenate(errors).sum()), float(np.concatenate(squares).sum()), np.concatenate(cosines))


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = np.einsum("ij,ij->i", a, b)
    return product


def summary(cosines: NDArray[np.float64]) -> Cosines:
    """Of cosines of which some are nan."""
    there = cosines[~np.isnan(cosines)]
    counts = np.histogram(np.clip(1 - there, EDGES[0], EDGES[-1]), EDGES)[0]
    if not len(there):
        return Cosines(np.nan, np.nan, np.nan, 0, tuple(counts.tolist()))
    return Cosines(
        float(there.mean()), float(np.percentile(there, 1)), float(there.min()), len(there), tuple(counts.tolist())
    )


def lowest(cosines: NDArray[np.float64], numbers: NDArray[np.int64], most: int) -> tuple[tuple[int, float], ...]:
    """The numbers and cosines of the worst vectors, the worst one first; of equals the first ones."""
    order = np.argsort(cosines, kind="stable")[:most]  # nan comes last
    return tuple((int(numbers[place]), float(cosines[place])) for place in order if not np.isnan(cosines[place]))
