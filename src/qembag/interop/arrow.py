"""Columns of lists in Arrow's memory as bags, and vectors as a column of lists.

The package nanoarrow reads the structs of Arrow's C interface. It checks the lengths that they state, copies nothing,
and its buffers keep what they show alive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _arguments, _errors
from .arrow_lists import bags_of_lists, check, check_elements, is_list, nanoarrow, type_of, unreadable, valid_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

    from .._batches import Bags

STRUCT = "+s"  # a format string of Arrow's
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
    if not is_list(schema, name):
        return None
    check_elements(schema, name)
    bags, first = [], 0
    for array in arrays:
        check(array, name)
        bags.append(bags_of_lists(array, 0, array.length, None, name, first))
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
        raise TypeError(f"{name} must be a table or a column of structs, got a column of {type_of(schema)}")
    places = _places(schema, name, None if wanted is None else set(wanted))
    for column, place in places.items():
        spot = f"{name}[{column!r}]"
        if not is_list(schema.child(place), spot):
            raise TypeError(f"{spot} must be a column of lists, got one of {type_of(schema.child(place))}")
        check_elements(schema.child(place), spot)
    columns: dict[str, list[Bags]] = {column: [] for column in places}
    first = 0
    for array in arrays:
        if array.null_count or array.n_children != schema.n_children:
            check(array, name)
        valid = valid_of(array, 0, array.length)
        # A slice of structs leaves its columns as they are.
        start, stop = array.offset, array.offset + array.length
        for column, place in places.items():
            spot, lists = f"{name}[{column!r}]", array.child(place)
            check(lists, spot)
            if not 0 <= start <= stop <= lists.length:
                raise ValueError(
                    unreadable(spot, f"a column of {lists.length} for rows {start} to {stop}", "too short")
                )
            columns[column].append(bags_of_lists(lists, start, stop, valid, spot, first))
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
    package = nanoarrow()
    (count, dim), size = array.shape, array.size
    kind = package.float32() if array.dtype == np.float32 else package.float16()
    elements = package.c_array_from_buffers(kind, size, [None, array.reshape(-1)], null_count=0)
    if list_size == "fixed":
        kind, buffers = package.fixed_size_list(kind, dim), [None]
    else:
        is_large = size > INT32_MAX
        kind = package.large_list(kind) if is_large else package.list_(kind)
        offsets = np.arange(count + 1, dtype=np.int64) * dim
        buffers = [None, offsets if is_large else offsets.astype(np.int32)]
    return package.c_array_from_buffers(kind, count, buffers, null_count=0, children=[elements])


# ---- What came -------------------------------------------------------------------------------------------------------


def _is_for_numpy(value: Any) -> bool:
    """A data frame or a column of numbers: NumPy makes an array of it, and needs no package for that."""
    dtype = getattr(value, "dtype", None)
    is_table = isinstance(shape := getattr(value, "shape", ()), tuple) and len(shape) == 2
    return is_table or (isinstance(dtype, np.dtype) and dtype.kind != "O")


def _read(value: Any, name: str) -> _Chunks:
    """Its type and its chunks. What a producer raises is told with the argument's name."""
    package = nanoarrow()
    if hasattr(getattr(value, "dtype", None), "pyarrow_dtype") and not hasattr(value, "__arrow_c_stream__"):
        value = getattr(value, "array", value).__arrow_array__()  # pandas' array, or its Series before 3.0
    try:
        if hasattr(value, "__arrow_c_stream__"):
            stream = package.c_array_stream(value)
            schema, arrays = stream.get_schema(), list(stream)
        else:
            arrays = [package.c_array(value)]
            schema = arrays[0].schema
        _ = schema.format, [array.length for array in arrays]  # raises for what is released or negative
    except (MemoryError, RecursionError, ImportError):
        raise  # of the process, not of this value
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(unreadable(name, type(value).__name__, error)) from error
    return _Chunks(schema, arrays)


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
