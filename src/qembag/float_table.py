"""FloatTable: rows of floats, and which of them are pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arguments, _errors, _handle
from .base import Table
from .layout import FloatLayout

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


class FloatTable(Table):
    """An embedding table of float32, float16 or bfloat16 rows, summed in float32.

    Wraps an array without copying it. In the place of a table a plain 2-D array of such floats is short for this.

    Parameters
    ----------
    data : ndarray of float32, float16 or bfloat16, shape (num_rows, dim)
        In the host's byte order, the elements of a row side by side. Rows may lie at any stride and address, and be
        read-only or memory-mapped. bfloat16 is the type that other packages add to NumPy's, such as ml_dtypes; or its
        bits as uint16, with ``dtype="bfloat16"``.
    dtype : {"float32", "float16", "bfloat16"}, optional
        What `data` holds; only to tell bits of bfloat16 from other uint16.
    compressed_indices_mapping : array_like of int32, shape (num_embeddings,), optional
        As for `QuantizedTable`.
    row_weights : array_like of floats, shape (num_embeddings,), optional
        As for `QuantizedTable`.

    Attributes
    ----------
    data : ndarray
        As given; a new view at each access, of the same memory.
    dtype : {"float32", "float16", "bfloat16"}
        The type of an element.
    compressed_indices_mapping, row_weights, dim, num_rows, num_embeddings, shape, row_bytes, nbytes
        As for `QuantizedTable`.

    Raises
    ------
    TypeError
        If `data` holds something else, or the mapping is not int32.
    ValueError
        If a shape or a byte order is wrong.
    IndexError
        If the mapping names a row that is not there.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.FloatTable(np.eye(3, dtype=np.float16))
    >>> table
    FloatTable(num_embeddings=3, dim=3, dtype=float16, nbytes=18)
    >>> qembag.embedding_bag(table, [[0, 2], [1, 1]], mode="mean")
    array([[0.5, 0. , 0.5],
           [0. , 1. , 0. ]], dtype=float32)
    """

    __slots__ = ()

    def __init__(
        self,
        data: NDArray[Any],
        *,
        dtype: DTypeLike | None = None,
        compressed_indices_mapping: ArrayLike | None = None,
        row_weights: ArrayLike | None = None,
    ) -> None:
        rows, layout = _rows_of(_arguments.float_rows(data, "data", dtype), "data")
        mapping = _arguments.mapping(compressed_indices_mapping, check_rows=len(rows))
        handle = _handle.TableHandle(rows, layout, mapping)
        self._set(handle, _arguments.row_weights(row_weights, handle.num_embeddings))

    @property
    def _layout(self) -> FloatLayout:
        layout: FloatLayout = self._handle.layout  # type: ignore[assignment]
        return layout

    @property
    def data(self) -> NDArray[Any]:
        return self._handle.rows.view(self._layout.stored)

    @property
    def dtype(self) -> str:
        return self._layout.name

    def __repr__(self) -> str:
        return self._repr(f"dtype={self.dtype}")

    def _reduced(self) -> tuple[Any, ...]:
        # As floats: NumPy notes their byte order.
        return (table_of, (type(self), self.data, self.compressed_indices_mapping, self.row_weights))


def table_of(
    kind: type[FloatTable],
    data: NDArray[Any],
    mapping: NDArray[np.int32] | None,
    row_weights: NDArray[np.float32] | None = None,
) -> FloatTable:
    """A table of its parts, whatever arguments a subclass takes; floats in the other byte order are copied."""
    floats = data if data.dtype.isnative else data.astype(data.dtype.newbyteorder("="))
    return kind._of(*_rows_of(floats, "data"), mapping, row_weights)


def _rows_of(floats: NDArray[Any], name: str) -> tuple[NDArray[np.uint8], FloatLayout]:
    """Rows of floats as the bytes that they are."""
    if floats.shape[1] == 0:
        raise ValueError(f"{name} must have a dim of 1 or more, got {_errors.kind_of(floats)}")
    stored = _arguments.float_name(floats.dtype)
    return floats.view(np.uint8), FloatLayout(stored, floats.shape[1], floats.dtype)


def handle_of_array(table: object) -> _handle.TableHandle:
    """Of a plain array in the place of a table, or of another library's."""
    return _handle.TableHandle(*_rows_of(_arguments.float_rows(table, "table", None), "table"), None)


_handle.register_arrays(handle_of_array)
