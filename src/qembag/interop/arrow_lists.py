"""Bags of an array of lists, as nanoarrow shows it: views where the layout allows them, else copies.

`array` and `schema` are nanoarrow's `CArray` and `CSchema`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .._batches import Bags
from .tensors import imported

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Places: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

# Arrow's format strings.
OFFSETS: dict[str, np.dtype[Any]] = {"+l": np.dtype(np.int32), "+L": np.dtype(np.int64)}
FIXED = "+w:"
NULLS = "n"  # the type of a column of nulls alone, which is what producers make of lists without elements
LIST_VIEWS = ("+vl", "+vL")
INTEGERS: dict[str, np.dtype[Any]] = {
    "c": np.dtype(np.int8),
    "C": np.dtype(np.uint8),
    "s": np.dtype(np.int16),
    "S": np.dtype(np.uint16),
    "i": np.dtype(np.int32),
    "I": np.dtype(np.uint32),
    "l": np.dtype(np.int64),
    "L": np.dtype(np.uint64),
}


def nanoarrow() -> Any:
    return imported("nanoarrow", "'qembag[arrow]'")


# ---- Checks ----------------------------------------------------------------------------------------------------------


def unreadable(name: str, what: str, why: object) -> str:
    return f"{name} must be readable through Arrow's C interface, got {what}: {why}"


def check(array: Any, name: str) -> None:
    """Compare an array with its schema, and the lengths that it states with each other."""
    try:
        if _holds_nothing(array):
            return  # polars gives an array of Arrow's null type a buffer, which nanoarrow refuses
        array.view()
        _ = [child.length for child in _undictionaried(array).children]  # raises for what is released
    except RuntimeError as error:
        raise ValueError(unreadable(name, "an array that does not fit its schema", error)) from error


def _undictionaried(either: Any) -> Any:
    """An array or a schema; of what is dictionary-encoded, that of the dictionary."""
    return either if either.dictionary is None else either.dictionary


def _holds_nothing(array: Any) -> bool:
    """A column of nulls alone, or of lists of them without an element: nothing is read but its length."""
    if array.dictionary is not None or array.schema.format == NULLS:
        return bool(array.dictionary is None)
    if array.schema.format.startswith(FIXED) or array.n_children != 1:
        return False
    elements = array.child(0)
    return bool(elements.dictionary is None and elements.schema.format == NULLS and elements.length == 0)


def is_list(schema: Any, name: str) -> bool:
    form = _undictionaried(schema).format or ""
    if form in LIST_VIEWS:
        raise TypeError(f"{name} must be a column of List, LargeList or FixedSizeList, got list views")
    return form in OFFSETS or form.startswith(FIXED) or form == NULLS


def check_elements(schema: Any, name: str) -> None:
    lists = _undictionaried(schema)
    if lists.format == NULLS:
        return
    if lists.n_children != 1:
        raise ValueError(unreadable(name, "a schema of lists", f"it has {lists.n_children} types of elements"))
    elements = lists.child(0)
    values = _undictionaried(elements)
    # Of what is dictionary-encoded, the schema's own format is that of the codes.
    if elements.format == NULLS:
        return
    if elements.format not in INTEGERS or values.format not in INTEGERS or values.dictionary is not None:
        raise TypeError(f"{name} must be a column of lists of integers, got lists of {type_of(values)}")


def type_of(schema: Any) -> str:
    try:
        return str(nanoarrow().Schema(schema).type.name).lower()
    except (ValueError, RuntimeError):  # newer types than the package knows
        return f"Arrow's format {schema.format!r}"


# ---- Bags ------------------------------------------------------------------------------------------------------------


def bags_of_lists(array: Any, start: int, stop: int, valid: Mask | None, name: str, first: int) -> Bags:
    """The lists `start` to `stop` of an array. `first` is the number of the first of them in its column, and `valid`
    says which of them the struct around them has."""
    if _holds_nothing(array) or _undictionaried(array).schema.format == NULLS:
        return Bags(np.empty(0, np.int64), np.zeros(stop - start + 1, np.int64))
    valid = _both(valid, valid_of(array, start, stop))
    if array.dictionary is not None:
        elements, starts, lengths = _entries(array, start, stop, valid, name)
        return _gathered(elements, starts, lengths, name, first)
    elements = array.child(0)
    if array.schema.format.startswith(FIXED):
        size = int(array.schema.format[len(FIXED) :])
        begin, end = (array.offset + start) * size, (array.offset + stop) * size
        if not 0 <= begin <= end <= elements.length:
            raise ValueError(unreadable(name, f"lists of {size}", f"it has {elements.length} elements"))
        is_plain = elements.dictionary is None and elements.schema.format != NULLS
        if valid is None and is_plain and valid_of(elements, begin, end) is None:
            return Bags(_values(elements)[begin:end].reshape(stop - start, size), None)
    offsets = _offsets(array, start, stop, name)
    if (
        elements.dictionary is not None
        or elements.schema.format == NULLS
        or (valid is not None and np.diff(offsets)[~valid].any())
    ):
        starts, lengths = _spans(offsets, valid, elements.length, name)
        return _gathered(elements, starts, lengths, name, first)
    begin, end = int(offsets[0]), int(offsets[-1])
    if 0 <= begin <= end <= elements.length:  # else the lookup refuses them
        _refuse_nulls(valid_of(elements, begin, end), offsets, begin, name, first)
    return Bags(_values(elements), offsets)


def _offsets(array: Any, start: int, stop: int, name: str) -> NDArray[Any]:
    """Where in the elements each list starts, and where the last ends."""
    form, start, stop = array.schema.format, array.offset + start, array.offset + stop
    if form.startswith(FIXED):
        return np.arange(start, stop + 1, dtype=np.int64) * int(form[len(FIXED) :])
    if start == stop:
        return np.zeros(1, OFFSETS[form])  # it may have no buffer
    offsets = _numbers(array.view().buffer(1), OFFSETS[form])[start : stop + 1]
    if len(offsets) != stop + 1 - start:  # nanoarrow before 0.7 lets offset + length wrap
        raise ValueError(unreadable(name, "an array that does not fit its schema", f"it has {len(offsets)} offsets"))
    return offsets


def _values(array: Any) -> NDArray[Any]:
    """Integers; or the codes of those that are dictionary-encoded."""
    kind = INTEGERS[array.schema.format]
    return _numbers(array.view().buffer(1), kind)[array.offset : array.offset + array.length]


def _numbers(buffer: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(buffer, dtype) if len(buffer) else np.empty(0, dtype)


def valid_of(array: Any, start: int, stop: int) -> Mask | None:
    """Which of some elements are not null; None if all are not."""
    bitmap = _numbers(array.view().buffer(0), np.dtype(np.uint8)) if array.null_count else ()
    if len(bitmap) == 0:
        return None
    start, stop = array.offset + start, array.offset + stop
    bits = np.unpackbits(bitmap[start // 8 : -(-stop // 8)], bitorder="little")
    valid = bits[start % 8 :][: stop - start].view(np.bool_)
    return None if valid.all() else valid


def _both(one: Mask | None, other: Mask | None) -> Mask | None:
    return other if one is None else one if other is None else one & other


def _refuse_nulls(valid: Mask | None, offsets: NDArray[Any], begin: int, name: str, first: int) -> None:
    """`valid` tells of the elements from `begin` on."""
    if valid is not None and not valid.all():
        place = begin + int(valid.argmin())
        number = int(offsets.searchsorted(place, "right")) - 1
        raise ValueError(f"{name}[{first + number}][{place - offsets[number]}] is null: must be an integer")


# ---- Copied: null lists that hide elements, and what is dictionary-encoded -------------------------------------------


def _spans(offsets: NDArray[Any], valid: Mask | None, length: int, name: str) -> tuple[Places, Places]:
    """Where each list starts, and how long it is."""
    offsets = offsets.astype(np.int64)  # a copy, which nobody else writes to
    if offsets[0] < 0 or offsets[-1] > length or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{name} must have list offsets that go up, from 0 to {length}, got others")
    lengths = np.diff(offsets)
    if valid is not None:
        lengths[~valid] = 0
    return offsets[:-1], lengths


def _entries(array: Any, start: int, stop: int, valid: Mask | None, name: str) -> tuple[Any, Places, Places]:
    """The lists of a dictionary that codes name: their elements, where each list starts, and how long it is."""
    lists = array.dictionary
    count = lists.length
    starts, lengths = _spans(_offsets(lists, 0, count, name), valid_of(lists, 0, count), lists.child(0).length, name)
    codes = _codes(_values(array)[start:stop], count, valid, name)
    # A null is one more entry, which is empty.
    return lists.child(0), np.append(starts, 0)[codes], np.append(lengths, 0)[codes]


def _codes(codes: NDArray[Any], count: int, valid: Mask | None, name: str) -> Places:
    """Numbers of a dictionary's entries; `count` for a null."""
    codes = codes.astype(np.int64)  # a copy, which nobody else writes to
    wrong = (codes < 0) | (codes >= count)
    if valid is not None:
        wrong &= valid
        codes[~valid] = count
    if wrong.any():
        code = codes[wrong.argmax()]
        raise ValueError(f"{name} must have codes from 0 to {count - 1}, of its dictionary, got {code}")
    return codes


def _gathered(elements: Any, starts: Places, lengths: Places, name: str, first: int) -> Bags:
    """The lists one after the other, with nothing between them."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if elements.schema.format == NULLS:
        _refuse_nulls(np.zeros(offsets[-1], np.bool_), offsets, 0, name, first)
        return Bags(np.empty(0, np.int64), offsets)
    places = np.repeat(starts - offsets[:-1], lengths.astype(np.intp)) + np.arange(offsets[-1])
    valid = valid_of(elements, 0, elements.length)
    _refuse_nulls(None if valid is None else valid[places], offsets, 0, name, first)
    values = _values(elements)[places]
    dictionary = elements.dictionary
    if dictionary is not None:
        codes = _codes(values, dictionary.length, None, name)
        valid = valid_of(dictionary, 0, dictionary.length)
        _refuse_nulls(None if valid is None else valid[codes], offsets, 0, name, first)
        values = _values(dictionary)[codes]
    return Bags(values, offsets)
