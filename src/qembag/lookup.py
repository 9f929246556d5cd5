"""Looking rows up in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from . import _arguments
from ._calls import look_up_bags, look_up_rows
from .table import QuantizedTable

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


def embedding_bag(
    table: QuantizedTable,
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    *,
    mode: Literal["sum", "mean", "max"] = "sum",
    per_sample_weights: ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    out: NDArray[Any] | None = None,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Sums, means or maxima of bags of rows.

    Parameters
    ----------
    table : QuantizedTable
    indices : array_like of integers, 1-D or 2-D
        Logical row numbers, from 0 to ``table.num_embeddings - 1``. Each row of a 2-D array is a bag. int32 and int64 arrays in
        one piece are used as they are.
    offsets : array_like of integers, 1-D, optional
        For 1-D indices: bag b is ``indices[offsets[b]:offsets[b + 1]]``. They must not decrease. Indices before the
        first offset, or after a last one that `include_last_offset` makes an end, belong to no bag.
    mode : {"sum", "mean", "max"}
        Means divide by the bag's number of indices, pruned ones counted, padding not. An empty bag is 0 in each mode.
    per_sample_weights : array_like of float32 or float16, optional
        One for each index, of the shape of `indices`. Not with ``mode="max"``.
    include_last_offset : bool
        The last offset is the end of the last bag, not the start of one more.
    padding_idx : int, optional
        Entries with this index count as absent. Negative numbers count from the table's end.
    out : ndarray of shape (num_bags, dim), optional
        Where to put the result: writeable, the elements of a row side by side, sharing no memory with another
        argument. After an error in the arguments it holds what it held before; after an exception from a signal's
        handler (KeyboardInterrupt) some of its rows are written. Long calls in the main thread see to signals about
        each 50 ms.
    dtype : {float32, float16}, optional
        The result's type, of `out` or float32 if not given. float16 is rounded once, from the float32 result.
    num_threads : int, optional
        For this call; see `set_num_threads`.

    Returns
    -------
    ndarray of shape (num_bags, dim)
        `out`, where it is given.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If a shape, a length, an offset or an option is wrong.
    IndexError
        If an index is out of range.

    Notes
    -----
    For each row of a bag in turn, with weight w: ``acc = fma(w * scale, code, acc + w * bias)`` in float32, from 0.
    These are the bits of PyTorch's ``quantized::embedding_bag_*`` operators (FBGEMM's kernels), on every processor
    and at any number of threads. The mean is the sum times ``float32(1) / float32(count)``.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.arange(12, dtype=np.float32).reshape(4, 3))
    >>> qembag.embedding_bag(table, [0, 3, 1], offsets=[0, 2]).round(1)
    array([[ 9., 11., 13.],
           [ 3.,  4.,  5.]], dtype=float32)
    """
    if not isinstance(table, QuantizedTable):
        raise TypeError(f"table must be a QuantizedTable, got {_arguments.kind_of(table)}")
    return look_up_bags(
        table._data,
        table._bits,
        table._dim,
        table._mapping,
        indices,
        offsets,
        mode=_arguments.mode(mode),
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
        out=out,
        half=_arguments.is_half(dtype, out),
        num_threads=num_threads,
    )


def embedding(
    table: QuantizedTable,
    indices: ArrayLike,
    *,
    out: NDArray[Any] | None = None,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Single rows, each a bag of its own.

    Parameters
    ----------
    table : QuantizedTable
    indices : array_like of integers, of any shape
        Row numbers, from 0 to ``table.num_embeddings - 1``. A pruned row is zeros.
    out, dtype, num_threads
        As for `embedding_bag`; `out` has shape ``indices.shape + (dim,)``.

    Returns
    -------
    ndarray of shape indices.shape + (dim,)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `embedding_bag`.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.arange(12, dtype=np.float32).reshape(4, 3))
    >>> qembag.embedding(table, [[0, 3], [1, 1]]).shape
    (2, 2, 3)
    """
    if not isinstance(table, QuantizedTable):
        raise TypeError(f"table must be a QuantizedTable, got {_arguments.kind_of(table)}")
    return look_up_rows(
        table._data,
        table._bits,
        table._dim,
        table._mapping,
        indices,
        out=out,
        half=_arguments.is_half(dtype, out),
        num_threads=num_threads,
    )
