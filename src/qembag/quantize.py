"""Float rows to codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _arguments, _errors, _handle, _runtime
from .layout import RowLayout
from .table import QuantizedTable

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# The reference's defaults for the greedy search: the range in this many bins, of which it may give up this share.
GREEDY_BINS = 200
GREEDY_RATIO = 0.16
# Rows that are not float32 in one piece are converted this many elements at a time.
CONVERTED_AT_ONCE = 1 << 20


def quantize(
    weights: ArrayLike,
    bits: int = 8,
    *,
    method: Literal["minmax", "greedy"] = "minmax",
    num_threads: int | None = None,
) -> QuantizedTable:
    """Quantize each row to codes with a scale and a bias.

    Parameters
    ----------
    weights : array_like of float32, float16 or float64, shape (num_rows, dim)
        float64 is rounded to float32 first.
    bits : {8, 4, 2}
        Bits of a code. A row takes ``dim + 8`` bytes at 8 bits, ``ceil(dim / 2) + 4`` at 4, ``ceil(dim / 4) + 4`` at 2.
    method : {"minmax", "greedy"}
        "minmax" spreads the codes from the row's minimum to its maximum. "greedy" (4 and 2 bits) narrows that range
        step by step while the squared error falls; slower, and closer at 4 bits.
    num_threads : int, optional
        For this call; see `set_num_threads`.

    Returns
    -------
    QuantizedTable

    Raises
    ------
    TypeError
        If `weights` is not an array of floats.
    ValueError
        If `weights` is not 2-D or a row is empty; if a row holds a NaN or an infinity, or values that its scale and
        bias cannot hold (float16 at 4 and 2 bits); if an option is unknown.

    Notes
    -----
    The bytes are those of PyTorch's ``quantized::embedding_bag_{byte,4bit,2bit}_prepack``, for "greedy" with
    ``optimized_qparams=True``.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), bits=2)
    >>> table.codes()
    array([[0, 1, 2, 3],
           [0, 1, 2, 3]], dtype=uint8)
    """
    bits = _arguments.bits(bits)
    greedy = _arguments.is_greedy(method, bits)
    array = _arguments.floats(weights, "weights", allow_double=True)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(
            f"weights must have 2 dimensions (rows, dim) and a dim of 1 or more, got {_errors.kind_of(array)}"
        )
    packed = pack_rows(array, bits, "weights", greedy=greedy, num_threads=num_threads)
    return QuantizedTable(packed, bits, dim=array.shape[1])


def pack_rows(
    weights: NDArray[Any],
    bits: int,
    name: str,
    *,
    bounds: NDArray[np.float32] | None = None,
    greedy: bool = False,
    num_bins: int = GREEDY_BINS,
    ratio: float = GREEDY_RATIO,
    num_threads: int | None = None,
) -> NDArray[np.uint8]:
    """The packed rows of a 2-D array of floats; `bounds` (num_rows, 2) in place of their own minima and maxima."""
    num_rows, dim = weights.shape
    layout = RowLayout(bits, dim)
    threads = _runtime.resolve_threads(num_threads)
    packed = np.empty((num_rows, layout.row_bytes), dtype=np.uint8)
    is_plain = weights.dtype == np.float32 and weights.flags.c_contiguous and weights.flags.aligned
    at_once = max(num_rows if is_plain else CONVERTED_AT_ONCE // max(dim, 1), 1)
    for start in range(0, num_rows, at_once):
        part = slice(start, start + at_once)
        rows = _arguments.as_float32(weights[part])
        part_bounds = None if bounds is None else np.require(bounds[part], np.float32, ["C", "A"])
        fault = _handle.quantize(rows, layout, packed[part], part_bounds, greedy, num_bins, ratio, threads)
        if fault is not None:
            what, row = fault
            used = rows[row] if part_bounds is None or greedy else part_bounds[row]
            raise _errors.of_row(what, start + row, layout, (float(used.min()), float(used.max())), name)
    return packed
