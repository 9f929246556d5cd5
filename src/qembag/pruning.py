"""Which rows of a table to keep, and what dropping the others costs."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arguments, _errors
from .base import Table
from .float_table import FloatTable
from .layout import rows_within, table_bytes
from .verdict.text import human_bytes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# Norms are computed for about this many elements at a time, which fit in the cache as float64.
ELEMENTS_AT_ONCE = 1 << 17


@dataclasses.dataclass(frozen=True, eq=False)
class RowChoice:
    """The rows to keep, for ``table.prune(choice)``, and what dropping the others costs.

    Attributes
    ----------
    keep : ndarray of bool, shape (num_embeddings,)
        Which logical rows are kept; False for rows that are already pruned.
    num_kept, num_dropped : int
        How many rows are kept, and how many are dropped; rows that are already pruned count as neither.
    traffic_dropped : float or None
        The share of lookups, from 0 to 1, that hit a dropped row; None without `counts`, 0 if all are zero.
    error : float
        The relative squared error that dropping causes: ``sum(norms[dropped]**2) / sum(norms**2)``; with `counts`
        ``sum(counts[dropped] * norms[dropped]**2) / sum(counts * norms**2)``. 0 if the denominator is zero.
    nbytes_before, nbytes_after : int
        Bytes of the table, and of ``table.prune(choice)``, including its mapping.
    """

    keep: NDArray[np.bool_]
    num_kept: int
    num_dropped: int
    traffic_dropped: float | None
    error: float
    nbytes_before: int
    nbytes_after: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.keep, dtype=dtype) if copy else np.asarray(self.keep, dtype=dtype)

    def __repr__(self) -> str:
        return f"RowChoice(num_kept={self.num_kept}, num_dropped={self.num_dropped}, error={self.error:.6g})"

    def __str__(self) -> str:
        traffic = "" if self.traffic_dropped is None else f" with {self.traffic_dropped:.3%} of the lookups"
        weighted = "" if self.traffic_dropped is None else ", weighted by lookups"
        return (
            f"Keeps {self.num_kept:,} rows and drops {self.num_dropped:,}{traffic}; "
            f"relative squared error {self.error:.6f}{weighted}; "
            f"{human_bytes(self.nbytes_before)} before, {human_bytes(self.nbytes_after)} after."
        )


def choose_rows(
    table: Table | ArrayLike,
    *,
    min_norm: float | None = None,
    min_count: int | None = None,
    max_rows: int | None = None,
    max_bytes: int | None = None,
    counts: ArrayLike | None = None,
) -> RowChoice:
    """Choose the rows of a table that are worth their bytes; `prune` drops the others.

    Parameters
    ----------
    table : QuantizedTable, FloatTable, or array_like of floats, shape (num_rows, dim)
        An array as for `FloatTable`. Rows that are already pruned stay pruned.
    min_norm : float, optional
        Keep only rows whose Euclidean norm is at least this.
    min_count : int, optional
        Keep only rows that were looked up at least this often. Needs `counts`.
    max_rows : int, optional
        Keep at most this many rows.
    max_bytes : int, optional
        Keep so few rows that the pruned table takes at most this many bytes, with its mapping of 4 bytes a logical row.
    counts : array_like of integers, shape (num_embeddings,), optional
        How often each logical row was looked up.

    Returns
    -------
    RowChoice

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; if no condition is given; if the mapping alone takes more than `max_bytes`; if the norm
        of a row is not finite.

    Notes
    -----
    A kept row meets all conditions. If more rows do than `max_rows` or `max_bytes` allows, the least used are dropped
    first (with `counts`), then those with the smallest norms, then those with the highest numbers. Norms are of the
    values that a lookup gives, in float64. The table is read in blocks; the call needs about 30 bytes a row besides.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.diag([5, 1, 3, 4]).astype(np.float32))
    >>> choice = qembag.choose_rows(table, max_rows=2, counts=[7, 100, 0, 20])
    >>> choice.keep
    array([False,  True, False,  True])
    >>> print(choice)  # doctest: +NORMALIZE_WHITESPACE
    Keeps 2 rows and drops 2 with 5.512% of the lookups; relative squared error 0.294118, weighted by lookups;
    48 B before, 40 B after.
    >>> table.prune(choice).num_rows
    2
    """
    kind = table if isinstance(table, Table) else FloatTable(_arguments.float_rows(table, "table", None))
    layout, mapping = kind._handle.layout, kind.compressed_indices_mapping
    count = kind.num_embeddings
    used = None if counts is None else _counts(counts, count)
    if min_norm is min_count is max_rows is max_bytes is None:
        raise ValueError("min_norm, min_count, max_rows or max_bytes must be given, got none of them")
    if min_count is not None and used is None:
        raise ValueError("min_count must come with counts, got none")
    most = [count if max_rows is None else _at_least(max_rows, 0, "max_rows")]
    if max_bytes is not None:
        least = table_bytes(layout, 0, count)
        most.append(rows_within(layout, _at_least(max_bytes, least, "max_bytes", " for the mapping"), count))
    there = np.ones(count, np.bool_) if mapping is None else mapping >= 0
    norms = norms_of(kind)
    keep = there.copy()
    if min_norm is not None:
        keep &= norms >= _norm(min_norm)
    if used is not None and min_count is not None:
        # A NumPy number: some versions of NumPy cannot compare an array with a Python int beyond its type.
        keep &= used >= np.uint64(min(_at_least(min_count, 0, "min_count"), 2**64 - 1))
    drop_least(keep, min(most), norms, used)
    dropped = there & ~keep
    weights = norms**2 if used is None else norms**2 * used
    num_kept = int(keep.sum())
    return RowChoice(
        keep=keep,
        num_kept=num_kept,
        num_dropped=int(dropped.sum()),
        traffic_dropped=None if used is None else _share(used.astype(np.float64), dropped),
        error=_share(weights, dropped),
        nbytes_before=kind.nbytes,
        nbytes_after=table_bytes(layout, num_kept, count),
    )


def norms_of(table: Table) -> NDArray[np.float64]:
    """The norm of each logical row; 0 if it is pruned."""
    norms = np.empty(table.num_embeddings)
    step = max(ELEMENTS_AT_ONCE // table.dim, 1)
    for start in range(0, len(norms), step):
        rows = table[start : start + step].astype(np.float64)
        norms[start : start + step] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    wrong = np.flatnonzero(~np.isfinite(norms))
    if len(wrong):
        raise ValueError(f"table must have finite rows, got row {wrong[0]} with a norm of {norms[wrong[0]]}")
    return norms


def drop_least(
    keep: NDArray[np.bool_], most: int, norms: NDArray[np.float64], counts: NDArray[np.uint64] | None
) -> None:
    """Clear entries of `keep` until at most `most` are left."""
    candidates = np.flatnonzero(keep)
    if len(candidates) <= most:
        return
    keys = [-candidates, norms[candidates]] + ([] if counts is None else [counts[candidates]])
    keep[candidates[np.lexsort(keys)[: len(candidates) - most]]] = False


def _share(amounts: NDArray[np.float64], part: NDArray[np.bool_]) -> float:
    total = float(amounts.sum())
    return float(amounts[part].sum()) / total if total else 0.0


def _counts(value: object, num_embeddings: int) -> NDArray[np.uint64]:
    counts = _arguments.integers(value, "counts")
    if counts.shape != (num_embeddings,):
        raise ValueError(f"counts must have shape ({num_embeddings},), a number a row, got {_errors.kind_of(counts)}")
    wrong = np.flatnonzero(counts < 0)
    if len(wrong):
        raise ValueError(f"counts must not be below 0, got {counts[wrong[0]]} for row {wrong[0]}")
    return counts.astype(np.uint64)


def _at_least(value: object, least: int, name: str, why: str = "") -> int:
    number = _arguments.whole_number(value, name)
    if number < least:
        raise ValueError(f"{name} must be at least {least}{why}, got {_errors.shown(number)}")
    return number


def _norm(value: object) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"min_norm must be a number, got {_errors.kind_of(value)}")
    try:
        number = float(value)  # a subclass may compare in its own way
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"min_norm must be 0 or more, and finite, got {number}")
    return number
