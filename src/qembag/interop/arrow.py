"""Columns of lists in Arrow's memory as bags, and vectors as a column of lists.

The package nanoarrow reads the structs of Arrow's C interface. It checks the lengths that they state, copies nothing,
and its buffers keep what they show alive.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from .. import _arguments, _errors
from .._batches import Bags

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

    from numpy.typing import ArrayLike, NDArray

    Mask: TypeAlias = NDArray[np.bool_]
    Places: TypeAlias = NDArray[np.int64]

# Arrow's format strings.
OFFSETS: dict[str, np.dtype[Any]] = {"+l": np.dtype(np.int32), "+L": np.dtype(np.int64)}
FIXED = "+w:"
LIST_VIEWS = ("+vl", "+vL")
STRUCT = "+s"
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
INT32_MAX = np.iinfo(np.int32).max


class _Chunks(NamedTuple):
    """A column, or a table as an array of structs."""

    schema: Any
    arrays: list[Any]


# ---- Public ----------------------------------------------------------------------------------------------------------


def bags_of(value: Any, name: str) -> list[Bags] | None:
    """The bags of a column of lists of integers, one `Bags` a chunk.

    Parameters
    ----------
    value
        An object with ``__arrow_c_stream__`` or ``__arrow_c_array__``; or a pandas Series of an ``ArrowDtype``. List,
        LargeList or FixedSizeList, also dictionary-encoded, of integers of any type, also dictionary-encoded. Null
        lists are empty bags.
    name : str
        Of the argument, for errors.

    Returns
    -------
    list of Bags or None
        Views of the column's memory, which keep it alive. Copied are the lists of a chunk that has null lists of some
        elements, and what is dictionary-encoded. None for anything else than a column of lists.

    Raises
    ------
    TypeError
        If the elements are no integers, or the lists are list views.
    ValueError
        If a list has a null element, or the object does not give what Arrow's C interface asks for.
    ImportError
        If nanoarrow is not installed: ``pip install 'qembag[arrow]'``.
    """
    if _is_for_numpy(value):
        return None
    schema, arrays = _read(value, name)
    if not _is_list(schema, name):
        return None
    _check_elements(schema, name)
    bags, first = [], 0
    for array in arrays:
        _check(array, name)
        bags.append(_bags(array, 0, array.length, None, name, first))
        first += array.length
    return bags


def columns_of(value: Any, name: str, wanted: Iterable[str] | None = None) -> dict[str, list[Bags]]:
    """The bags of each column of a table: a record batch, a data frame, an array of structs.

    Parameters
    ----------
    value
        An object with ``__arrow_c_stream__`` or ``__arrow_c_array__``. A null row is an empty bag of each column.
    name : str
        Of the argument, for errors.
    wanted : iterable of str, optional
        Columns to read. Others may be of any type, and are not looked at. By default all are read.

    Returns
    -------
    dict of str to list of Bags
        As `bags_of` gives them. Wanted columns that the table does not have are not in it.

    Raises
    ------
    TypeError
        If it is no table, or if a column is not of lists of integers.
    ValueError
        As for `bags_of`, and for two columns of one name.
    ImportError
        If nanoarrow is not installed: ``pip install 'qembag[arrow]'``.
    """
    schema, arrays = _read(value, name)
    if schema.format != STRUCT or schema.dictionary is not None:
        raise TypeError(f"{name} must be a table or a column of structs, got a column of {_type_of(schema)}")
    places = _places(schema, name, None if wanted is None else set(wanted))
    for column, place in places.items():
        spot = f"{name}[{column!r}]"
        if not _is_list(schema.child(place), spot):
            raise TypeError(f"{spot} must be a column of lists, got one of {_type_of(schema.child(place))}")
        _check_elements(schema.child(place), spot)
    columns: dict[str, list[Bags]] = {column: [] for column in places}
    first = 0
    for array in arrays:
        if array.null_count or array.n_children != schema.n_children:
            _check(array, name)
        valid = _valid(array, 0, array.length)
        # A slice of structs leaves its columns as they are.
        start, stop = array.offset, array.offset + array.length
        for column, place in places.items():
            spot, lists = f"{name}[{column!r}]", array.child(place)
            _check(lists, spot)
            if not 0 <= start <= stop <= lists.length:
                raise ValueError(
                    _unreadable(spot, f"a column of {lists.length} for rows {start} to {stop}", "too short")
                )
            columns[column].append(_bags(lists, start, stop, valid, spot, first))
        first += array.length
    return columns


def to_arrow(vectors: ArrayLike, list_size: str = "fixed") -> Any:
    """Vectors as an Arrow array of lists, without a copy.

    Parameters
    ----------
    vectors : array of float32 or float16
        Of shape (n, dim), as lookups return them. Rows that lie apart are copied into one piece; others are not, so
        that what is written to `vectors` later shows in the Arrow array too.
    list_size : {"fixed", "variable"}
        "fixed" makes a FixedSizeList. "variable" makes a List, for readers that know no fixed ones, such as Spark; or
        a LargeList where there are more than 2**31 - 1 elements.

    Returns
    -------
    nanoarrow.c_array.CArray
        An object with ``__arrow_c_array__``: ``pyarrow.array(it)`` and ``polars.Series(it)`` take it as it is. It keeps
        the vectors alive.

    Raises
    ------
    TypeError
        If the vectors are not of float32 or float16. Arrow has no bfloat16.
    ValueError
        If they do not have two dimensions, or for another `list_size`.
    ImportError
        If nanoarrow is not installed: ``pip install 'qembag[arrow]'``.
    """
    if list_size not in ("fixed", "variable"):
        raise ValueError(f"list_size must be 'fixed' or 'variable', got {_errors.shown(list_size)}")
    array = _arguments.as_array(vectors, "vectors")
    if _arguments.is_bfloat16(array.dtype):
        raise TypeError(
            "vectors must be float32 or float16, got bfloat16, which Arrow has no type for: look up "
            "with dtype='float32', or convert with vectors.astype('float32')"
        )
    if array.dtype.newbyteorder("=") not in (np.float32, np.float16):
        raise TypeError(f"vectors must be an array of float32 or float16, got {_errors.kind_of(array)}")
    if array.ndim != 2:
        raise ValueError(f"vectors must have 2 dimensions, got {_errors.kind_of(array)}")
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"])
    package = _package()
    (count, dim), size = array.shape, array.size
    kind = package.float32() if array.dtype == np.float32 else package.float16()
    elements = package.c_array_from_buffers(kind, size, [None, array.reshape(-1)], null_count=0)
    if list_size == "fixed":
        kind, buffers = package.fixed_size_list(kind, dim), [None]
    else:
        is_large = size > INT32_MAX
        kind = package.large_list(kind) if is_large else package.list_(kind)
        buffers = [None, np.arange(count + 1, dtype=np.int64 if is_large else np.int32) * dim]
    return package.c_array_from_buffers(kind, count, buffers, null_count=0, children=[elements])


# ---- What came -------------------------------------------------------------------------------------------------------


def _package() -> ModuleType:
    try:
        return importlib.import_module("nanoarrow")
    except ImportError:
        raise ImportError("Arrow columns need the package nanoarrow: pip install 'qembag[arrow]'") from None


def _is_for_numpy(value: Any) -> bool:
    """A data frame or a column of numbers: NumPy makes an array of it, and needs no package for that."""
    dtype = getattr(value, "dtype", None)
    is_table = isinstance(shape := getattr(value, "shape", ()), tuple) and len(shape) == 2
    return is_table or (isinstance(dtype, np.dtype) and dtype.kind != "O")


def _read(value: Any, name: str) -> _Chunks:
    """Its type and its chunks. What a producer raises is told with the argument's name."""
    package = _package()
    if hasattr(getattr(value, "dtype", None), "pyarrow_dtype") and not hasattr(value, "__arrow_c_stream__"):
        value = value.array.__arrow_array__()  # pandas before 3.0
    try:
        if hasattr(value, "__arrow_c_stream__"):
            stream = package.c_array_stream(value)
            schema, arrays = stream.get_schema(), list(stream)
        else:
            arrays = [package.c_array(value)]
            schema = arrays[0].schema
        if not schema.is_valid():
            raise ValueError("its schema is released")
        _ = schema.format, [array.length for array in arrays]  # raises for what is released or negative
    except (MemoryError, RecursionError):
        raise  # of the process, not of this value
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(_unreadable(name, type(value).__name__, error)) from error
    return _Chunks(schema, arrays)


def _unreadable(name: str, what: str, why: object) -> str:
    return f"{name} must be readable through Arrow's C interface, got {what}: {why}"


def _check(array: Any, name: str) -> None:
    """Compare an array with its schema, and the lengths that it states with each other."""
    try:
        array.view()
        _ = [child.length for child in _undictionaried(array).children]  # raises for what is released
    except RuntimeError as error:
        raise ValueError(_unreadable(name, "an array that does not fit its schema", error)) from error


def _undictionaried(either: Any) -> Any:
    """An array or a schema; of what is dictionary-encoded, that of the dictionary."""
    return either if either.dictionary is None else either.dictionary


def _places(schema: Any, name: str, wanted: set[str] | None) -> dict[str, int]:
    """The number of each column."""
    places: dict[str, int] = {}
    for place in range(schema.n_children):
        column = schema.child(place).name or ""
        if wanted is None or column in wanted:
            if column in places:
                raise ValueError(f"{name} must have one column {column!r}, got two")
            places[column] = place
    return places


def _is_list(schema: Any, name: str) -> bool:
    form = _undictionaried(schema).format or ""
    if form in LIST_VIEWS:
        raise TypeError(f"{name} must be a column of List, LargeList or FixedSizeList, got list views: cast them")
    return form in OFFSETS or form.startswith(FIXED)


def _check_elements(schema: Any, name: str) -> None:
    lists = _undictionaried(schema)
    if lists.n_children != 1:
        raise ValueError(_unreadable(name, "a schema of lists", f"it has {lists.n_children} types of elements"))
    elements = lists.child(0)
    values = _undictionaried(elements)
    # Of what is dictionary-encoded, the schema's own format is that of the codes.
    if elements.format not in INTEGERS or values.format not in INTEGERS or values.dictionary is not None:
        raise TypeError(f"{name} must be a column of lists of integers, got lists of {_type_of(values)}")


def _type_of(schema: Any) -> str:
    try:
        return str(_package().Schema(schema).type.name).lower()
    except (ValueError, RuntimeError):  # newer types than the package knows
        return f"Arrow's format {schema.format!r}"


# ---- Bags ------------------------------------------------------------------------------------------------------------


def _bags(array: Any, start: int, stop: int, valid: Mask | None, name: str, first: int) -> Bags:
    """The lists `start` to `stop` of an array. `first` is the number of the first of them in its column, and `valid`
    says which of them the struct around them has."""
    valid = _both(valid, _valid(array, start, stop))
    if array.dictionary is not None:
        elements, starts, lengths = _entries(array, start, stop, valid, name)
        return _gathered(elements, starts, lengths, name, first)
    elements = array.child(0)
    if array.schema.format.startswith(FIXED):
        size = int(array.schema.format[len(FIXED) :])
        begin, end = (array.offset + start) * size, (array.offset + stop) * size
        if not 0 <= begin <= end <= elements.length:
            raise ValueError(_unreadable(name, f"lists of {size}", f"it has {elements.length} elements"))
        if valid is None and elements.dictionary is None and _valid(elements, begin, end) is None:
            return Bags(_values(elements)[begin:end].reshape(stop - start, size), None)
    offsets = _offsets(array, start, stop)
    if elements.dictionary is not None or (valid is not None and np.diff(offsets)[~valid].any()):
        starts, lengths = _spans(offsets, valid, elements.length, name)
        return _gathered(elements, starts, lengths, name, first)
    begin, end = int(offsets[0]), int(offsets[-1])
    if 0 <= begin <= end <= elements.length:  # else the lookup refuses them
        _refuse_nulls(_valid(elements, begin, end), offsets, begin, name, first)
    return Bags(_values(elements), offsets)


def _offsets(array: Any, start: int, stop: int) -> NDArray[Any]:
    """Where in the elements each list starts, and where the last ends."""
    form, start, stop = array.schema.format, array.offset + start, array.offset + stop
    if form.startswith(FIXED):
        return np.arange(start, stop + 1, dtype=np.int64) * int(form[len(FIXED) :])
    if start == stop:
        return np.zeros(1, OFFSETS[form])  # it may have no buffer
    return _numbers(array.view().buffer(1), OFFSETS[form])[start : stop + 1]


def _values(array: Any) -> NDArray[Any]:
    """Integers; or the codes of those that are dictionary-encoded."""
    kind = INTEGERS[array.schema.format]
    return _numbers(array.view().buffer(1), kind)[array.offset : array.offset + array.length]


def _numbers(buffer: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(buffer, dtype) if len(buffer) else np.empty(0, dtype)


def _valid(array: Any, start: int, stop: int) -> Mask | None:
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
    starts, lengths = _spans(_offsets(lists, 0, count), _valid(lists, 0, count), lists.child(0).length, name)
    codes = _codes(_values(array)[start:stop], count, valid, name)
    # A null is one more entry, which is empty.
    return lists.child(0), np.append(starts, 0)[codes], np.append(lengths, 0)[codes]


def _codes(codes: NDArray[Any], count: int, valid: Mask | None, name: str) -> Places:
    """Numbers of a dictionary's entries; `count` for a null."""
    codes = codes.astype(np.int64)
    if valid is not None:
        codes[~valid] = count
    wrong = (codes < 0) | (codes > count) | ((codes == count) & (valid is None or valid))
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(f"{name} must have codes from 0 to {count - 1}, of its dictionary, got {codes[place]}")
    return codes


def _gathered(elements: Any, starts: Places, lengths: Places, name: str, first: int) -> Bags:
    """The lists one after the other, with nothing between them."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    places = np.repeat(starts - offsets[:-1], lengths.astype(np.intp)) + np.arange(offsets[-1])
    valid = _valid(elements, 0, elements.length)
    _refuse_nulls(None if valid is None else valid[places], offsets, 0, name, first)
    values = _values(elements)[places]
    dictionary = elements.dictionary
    if dictionary is not None:
        codes = _codes(values, dictionary.length, None, name)
        valid = _valid(dictionary, 0, dictionary.length)
        _refuse_nulls(None if valid is None else valid[codes], offsets, 0, name, first)
        values = _values(dictionary)[codes]
    return Bags(values, offsets)
