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


def element_type(kind: Any, name: str) -> Any:
    """The type of the elements of a type of lists; null for a column of nulls. Raises TypeError if it is no list."""
    lists = _plain_type(kind)
    if pa.types.is_null(lists):
        return lists
    if not (pa.types.is_list(lists) or pa.types.is_large_list(lists) or pa.types.is_fixed_size_list(lists)):
        raise TypeError(f"column {name!r} must have lists (List, LargeList or FixedSizeList), got {kind}")
    return _plain_type(lists.value_type)


def lists_of(column: Any) -> Lists:
    """Of a chunked column of lists, in one piece."""
    if column.num_chunks == 0:
        return Lists(pa.nulls(0), np.zeros(0, np.int64))
    pieces = [_of_array(chunk) for chunk in column.chunks]
    if len(pieces) == 1:
        return pieces[0]
    # Elements, not lists: those may have too many for offsets of 32 bits.
    values = pa.concat_arrays([piece.values for piece in pieces])
    return Lists(values, np.concatenate([piece.lengths for piece in pieces]))


def _of_array(array: Any) -> Lists:
    array = _plain(array)
    if pa.types.is_null(array.type):
        return Lists(pa.nulls(0), np.zeros(len(array), np.int64))
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return Lists(_plain(pc.list_flatten(array)), lengths.astype(np.int64))


def _plain_type(kind: Any) -> Any:
    """Without what an extension type or a dictionary adds."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    return _plain_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _plain(array: Any) -> Any:
    if isinstance(array, pa.ExtensionArray):
        return _plain(array.storage)
    return _plain(array.dictionary_decode()) if isinstance(array, pa.DictionaryArray) else array


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
