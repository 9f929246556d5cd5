"""Float rows to codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _arguments, _errors, _handle, _runtime
from .layout import aligned
from .table import QuantizedTable, table_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from .layout import RowLayout

# PyTorch's defaults for the greedy search: the range has this many bins, and the search may drop this share of them.
GREEDY_BINS = 200
GREEDY_RATIO = 0.16
# Rows that are not contiguous float32 are converted this many elements at a time.
CONVERTED_AT_ONCE = 1 << 20


def quantize(
    weights: ArrayLike,
    bits: int = 8,
    *,
    method: Literal["minmax", "greedy", "lsq"] = "minmax",
    importance: ArrayLike | None = None,
    scale_dtype: DTypeLike | None = None,
    scale_first: bool = False,
    group_size: int | None = None,
    row_alignment: int = 1,
    num_threads: int | None = None,
) -> QuantizedTable:
    """Quantize each row, or each group of a row, to codes with a scale and a bias.

    Parameters
    ----------
    weights : array_like of float32, float16, float64 or bfloat16, shape (num_rows, dim)
        float64 is rounded to float32 first. bfloat16 is the type that other packages add to NumPy's, such as ml_dtypes.
    bits : {8, 4, 2}
        Bits of a code. By default a row takes ``dim + 8`` bytes at 8 bits, ``ceil(dim / 2) + 4`` at 4,
        ``ceil(dim / 4) + 4`` at 2.
    method : {"minmax", "greedy", "lsq"}
        "minmax" spreads the codes from the minimum to the maximum. "greedy" (4 and 2 bits) narrows that range
        step by step while the squared error falls, as PyTorch does. "lsq" searches for the scale and bias with the
        smallest squared error. On no row is the error above that of "minmax"; at 2 bits it is about half of
        PyTorch's, in the same bytes. The result is the same on every processor.
    importance : array_like of floats, shape (dim,), optional
        For "lsq": the weight of each column's squared error, 0 or more; only ratios matter. Equal if not given.
    scale_dtype : {float32, float16}, optional
        The stored type of scales and biases; float32 at 8 bits and float16 at 4 and 2 if not given.
    scale_first : bool
        Put scales and biases before the codes of a row, as FBGEMM's table-batched operator and TorchRec do.
    group_size : int, optional
        Elements that share a scale and a bias: a multiple of 16. The last group of a row may be shorter. If not given,
        a row is one group.
    row_alignment : int
        Pad rows with zeros to a multiple of this many bytes.
    num_threads : int, optional
        Threads for this call; see `set_num_threads`.

    Returns
    -------
    QuantizedTable

    Raises
    ------
    TypeError
        If `weights` is not an array of floats, or an option has a wrong type.
    ValueError
        If `weights` is not 2-D or a row is empty; if a row holds a NaN or an infinity, or values that its scale and
        bias cannot hold as `scale_dtype`; if an option is unknown or out of range; if `importance` has a wrong shape,
        only zeros, or a number that is negative or not finite, or if the method is not "lsq".

    Notes
    -----
    By default the bytes are those of PyTorch's ``quantized::embedding_bag_{byte,4bit,2bit}_prepack``, for "greedy" with
    ``optimized_qparams=True``. 8 bits with float16 scales use the formula of 4 bits with 256 codes, as TorchRec does;
    4 and 2 bits with float32 scales use their own formula without rounding to float16.

    "lsq" alternates between the nearest codes for a scale and bias, and the scale and bias of the linear regression of
    the values on those codes (Lloyd's method), starting from several ranges. Scales may be negative. A group keeps the
    bytes of "minmax" unless its error becomes smaller.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), bits=2)
    >>> table.codes()
    array([[0, 1, 2, 3],
           [0, 1, 2, 3]], dtype=uint8)
    >>> rows = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    >>> closer = qembag.quantize(rows, bits=2, method="lsq")
    >>> error = np.square(closer.dequantize() - rows).sum() / np.square(rows).sum()
    >>> print(f"{error:.2f}")
    0.10
    """
    return quantize_part(
        weights,
        bits,
        "weights",
        0,
        method=method,
        importance=importance,
        scale_dtype=scale_dtype,
        scale_first=scale_first,
        group_size=group_size,
        row_alignment=row_alignment,
        num_threads=num_threads,
    )


def quantize_part(
    weights: ArrayLike,
    bits: int,
    name: str,
    first_row: int,
    *,
    method: str,
    importance: ArrayLike | None,
    scale_dtype: DTypeLike | None,
    scale_first: bool,
    group_size: int | None,
    row_alignment: int,
    num_threads: int | None,
) -> QuantizedTable:
    """`quantize` for a part of a table: errors call it `name` and count rows from `first_row`."""
    bits = _arguments.bits(bits)
    chosen = _arguments.method(method, bits)
    array = _arguments.floats(weights, name, allow_double=True, allow_bfloat16=True)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(
            f"{name} must have 2 dimensions (rows, dim) and a dim of 1 or more, got {_errors.kind_of(array)}"
        )
    layout = aligned(bits, array.shape[1], scale_dtype, scale_first, group_size, row_alignment)
    counted = _arguments.importance(importance, layout.dim, chosen)
    packed = pack_rows(
        array, layout, name, first_row=first_row, method=chosen, importance=counted, num_threads=num_threads
    )
    return table_of(QuantizedTable, packed, layout, None)


def update_rows(
    table: QuantizedTable,
    rows: ArrayLike,
    weights: ArrayLike,
    method: str,
    importance: ArrayLike | None,
    num_threads: int | None,
) -> None:
    """See `QuantizedTable.update`. Everything is checked and quantized before any row is written."""
    chosen = _arguments.method(method, table.bits)
    counted = _arguments.importance(importance, table.dim, chosen)
    numbers = table._stored_rows(rows)
    if not table.data.flags.writeable:
        raise ValueError("table must have rows that can be written to, got read-only ones")
    array = _arguments.floats(weights, "weights", allow_double=True, allow_bfloat16=True)
    if array.shape != (len(numbers), table.dim):
        raise ValueError(
            f"weights must have shape ({len(numbers)}, {table.dim}), a row for each of rows, got "
            f"{_errors.kind_of(array)}"
        )
    packed = pack_rows(array, table.layout, "weights", method=chosen, importance=counted, num_threads=num_threads)
    table._put(numbers, packed)


def pack_rows(
    weights: NDArray[Any],
    layout: RowLayout,
    name: str,
    *,
    first_row: int = 0,
    bounds: NDArray[np.float32] | None = None,
    method: str = "minmax",
    importance: NDArray[np.float32] | None = None,
    num_bins: int = GREEDY_BINS,
    ratio: float = GREEDY_RATIO,
    num_threads: int | None = None,
) -> NDArray[np.uint8]:
    """The packed rows of a 2-D array of floats. `bounds`, of shape (num_rows, 2), replaces their own minima and maxima;
    it needs a layout with one group a row. Errors count rows from `first_row`."""
    num_rows = len(weights)
    threads = _runtime.resolve_threads(num_threads)
    packed = np.empty((num_rows, layout.row_bytes), dtype=np.uint8)
    is_plain = weights.dtype == np.float32 and weights.flags.c_contiguous and weights.flags.aligned
    at_once = max(num_rows if is_plain else CONVERTED_AT_ONCE // layout.dim, 1)
    for start in range(0, num_rows, at_once):
        part = slice(start, start + at_once)
        rows = _arguments.as_float32(weights[part])
        part_bounds = None if bounds is None else np.require(bounds[part], np.float32, ["C", "A"])
        fault = _handle.quantize(
            rows, layout, packed[part], part_bounds, _arguments.METHODS[method], importance, num_bins, ratio, threads
        )
        if fault is not None:
            what, row, group = fault
            used = rows[row, layout.elements(group)] if part_bounds is None or method == "greedy" else part_bounds[row]
            number = first_row + start + row
            raise _errors.of_row(what, number, group, layout, (float(used.min()), float(used.max())), name)
    return packed
