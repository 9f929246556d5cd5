"""Which rows of a batch cannot be looked up, and why. Asked only after a lookup has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Lists(NamedTuple):
    """The elements of a column of lists, one after the other."""

    values: Any
    """A pyarrow array."""
    lengths: NDArray[np.int64]
    """Of each list; 0 for null ones."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        offsets = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets


class Bad(NamedTuple):
    """What is wrong with a row."""

    kind: type[Exception]
    reason: str


def lists_of(column: Any, name: str) -> Lists:
    """Of a column of lists of any kind, in one piece. Raises TypeError for another type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return Lists(pa.array([], pa.int64()), np.zeros(len(column), np.int64))
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list and not pa.types.is_fixed_size_list(column.type):
        raise TypeError(f"column {name!r} must have lists, got {column.type}")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = pc.list_flatten(column)
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    return Lists(values, lengths)


def bad_rows(column: str, lists: Lists, num_rows: int | None) -> dict[int, Bad]:
    """Rows that have a null element, or one that is out of range for a table of so many rows; None: any is in range.

    In a row with several such elements, the first is told.
    """
    nulls = lists.values.is_null().to_numpy(zero_copy_only=False)
    wrong = nulls
    values = lists.values
    if num_rows is not None and not pa.types.is_null(values.type):
        numbers = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
        wrong = nulls | (numbers < 0) | (numbers >= num_rows)
    offsets = lists.offsets
    found: dict[int, Bad] = {}
    places = np.flatnonzero(wrong)
    rows = offsets.searchsorted(places, "right") - 1
    for row, first in zip(*np.unique(rows, return_index=True), strict=True):
        place = int(places[first])
        spot = f"{column}[{place - int(offsets[row])}]"
        if nulls[place]:
            found[int(row)] = Bad(ValueError, f"{spot} is null: must be a number")
        else:
            found[int(row)] = Bad(IndexError, f"{spot} is {values[place]}: out of range for a table of {num_rows} rows")
    return found


def of_other_lengths(column: str, weights: Lists, indices_column: str, indices: Lists) -> dict[int, Bad]:
    """Rows that have more or fewer weights than indices."""
    return {
        int(row): Bad(
            ValueError,
            f"{column} must have as many elements as {indices_column}, {indices.lengths[row]}, "
            f"got {weights.lengths[row]}",
        )
        for row in np.flatnonzero(weights.lengths != indices.lengths)
    }
