"""Arrays and tables as tensors, and back, in the same memory."""

from __future__ import annotations

import ctypes
import functools
import json
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..float_table import FloatTable
from ..interop.tensors import array_of
from ..layout import packed_layout
from ..table import QuantizedTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# No layout's text is longer; a longer one is not ours.
LONGEST_TEXT = 1000


def tensor_over(array: NDArray[Any]) -> torch.Tensor:
    """A tensor in an array's memory, read-only or not; in a copy where torch has no such strides or alignment."""
    if not array.flags.aligned or any(step % array.itemsize or step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array if array.flags.writeable else _as_writeable(array))


def _as_writeable(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory as an array that says it can be written to. torch has no read-only tensors, and would warn."""
    if array.size == 0:
        return np.empty_like(array)
    last = sum((count - 1) * step for count, step in zip(array.shape, array.strides, strict=True))
    memory = (ctypes.c_ubyte * (last + array.itemsize)).from_address(array.ctypes.data)
    memory.owner = array  # keeps it alive
    return np.ndarray(array.shape, array.dtype, memory, strides=array.strides)


def rows_of(table: QuantizedTable | FloatTable) -> torch.Tensor:
    """A table's rows as a tensor: uint8, or floats of the table's type."""
    if isinstance(table, QuantizedTable) or table.dtype != "bfloat16":
        return tensor_over(table.data)
    return tensor_over(table.data.view(np.int16)).view(torch.bfloat16)


def layout_text(table: QuantizedTable | FloatTable) -> str:
    """How a table's rows are to be read, as operators take it: JSON; empty for floats, which say it themselves."""
    if isinstance(table, FloatTable):
        return ""
    options = {"bits": table.bits, "dim": table.dim, **table.layout.not_default()}
    options.pop("row_bytes", None)  # the tensor's width
    return json.dumps(options)


def packed_text(bits: int) -> str:
    """Of packed rows as torch has them, of any dim."""
    return json.dumps({"bits": bits})


def _layout_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text) if len(text) <= LONGEST_TEXT else None
    except (ValueError, RecursionError):
        options = None
    allowed = {"bits", "dim", "scale_dtype", "scale_first", "group_size"}
    if not isinstance(options, dict) or not {"bits"} <= options.keys() <= allowed:
        raise ValueError(f"layout must be a layout that qembag.torch wrote, got {text[:80]!r}")
    return options


layout_options = functools.lru_cache(maxsize=256)(_layout_options)


def largest_dim(bits: int, row_bytes: int) -> int:
    layout = packed_layout(bits, row_bytes)
    return 0 if layout is None else layout.dim


def dim_of(rows: torch.Tensor, layout: str) -> Any:
    """Elements of a row; where the layout does not say, as many as torch's packed rows of this width have."""
    if not layout:
        return rows.shape[1]
    options = layout_options(layout)
    return options["dim"] if "dim" in options else largest_dim(options["bits"], rows.shape[1])


class _Made(NamedTuple):
    table: QuantizedTable | FloatTable
    source: weakref.ref[torch.Tensor]
    key: tuple[Any, ...]


# Tables by the id of their tensor of rows. To make one takes 3 us, and longer for a long mapping. An entry goes when
# its tensor does. It counts only while the tensors of a call are in the memory that it was made of: no entry is ever
# used for memory that has changed hands. A table reads its memory anew at each lookup, so what is in it may change.
_made: dict[int, _Made] = {}


def table_of(rows: torch.Tensor, mapping: torch.Tensor | None, layout: str) -> QuantizedTable | FloatTable:
    """The table in these tensors' memory."""
    key: tuple[Any, ...] = (rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, layout)
    if mapping is not None:
        key += (mapping.data_ptr(), mapping.shape, mapping.stride(), mapping.dtype)
    number = id(rows)
    made = _made.get(number)
    if made is not None and made.key == key and made.source() is rows:
        return made.table
    table = _new_table(rows, mapping, layout)
    # A mapping of one entry may say that nothing is pruned: what such a table is depends on what it holds.
    if mapping is None or len(mapping) != 1:
        _made[number] = _Made(table, weakref.ref(rows, lambda source: _forget(number, source)), key)
    return table


def _forget(number: int, source: weakref.ref[torch.Tensor]) -> None:
    # By then the id may be another tensor's.
    made = _made.get(number)
    if made is not None and made.source is source:
        del _made[number]


def _new_table(rows: torch.Tensor, mapping: torch.Tensor | None, layout: str) -> QuantizedTable | FloatTable:
    # Of detached tensors: an array keeps its tensor alive, and the entry of a table must not keep its own key alive.
    return new_table(array_of(rows, "rows"), None if mapping is None else array_of(mapping, "mapping"), layout, None)


def new_table(
    rows: NDArray[Any], mapping: NDArray[Any] | None, layout: str, row_weights: NDArray[Any] | None
) -> QuantizedTable | FloatTable:
    """A table of its parts; bfloat16 rows as their bits."""
    parts: dict[str, Any] = {"compressed_indices_mapping": mapping, "row_weights": row_weights}
    if layout:
        return QuantizedTable(rows, **layout_options(layout), **parts)
    return FloatTable(rows, dtype="bfloat16" if rows.dtype == np.uint16 else None, **parts)
