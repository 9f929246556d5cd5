"""torchao's weights of 1 to 8 bits, one code a byte: IntxUnpackedToInt8Tensor."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments
from ..formats.safetensors_file import brief
from ..layout import RowLayout
from .foreign import Foreign, Memory, Wanted, said
from .inert_pickle import what
from .torch_tensors import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .torch_tensors import Wrapped

CLASSES = {"torchao.quantization.IntxUnpackedToInt8Tensor"}
INTX = re.compile(r"(?:torch\.)?int([1-8])")
FLOATS = ("float32", "float16", "bfloat16")
HALVES = FLOATS[1:]
# What makes signed codes of so many bits unsigned.
MIDDLES = {8: 128, 4: 8, 2: 2}
SCALES_AT_ONCE = 1 << 18


def table(name: str, wrapped: Wrapped, wanted: Wanted, memory: Memory) -> Foreign:
    """The table of such a tensor. Raises ValueError if it is none."""
    codes, scales, zero_points = (_tensor(wrapped, part) for part in ("qdata", "scale", "zero_point"))
    kind = wrapped.state.get("target_dtype")
    target = INTX.fullmatch(kind) if isinstance(kind, str) else None
    if target is None:
        raise ValueError(f"must have a target_dtype of int1 to int8, got {what(kind)}")
    if len(codes.shape) != 2 or 0 in codes.shape[1:] or codes.dtype != "int8":
        raise ValueError(f"must have 2 dimensions of int8, got {codes.dtype} {codes.shape}")
    if scales.dtype not in FLOATS or zero_points.dtype not in ("int8", *FLOATS):
        raise ValueError(
            f"must have float scales and int8 or float zero points, got {scales.dtype}, {zero_points.dtype}"
        )
    num_rows, dim = codes.shape
    group_size = _group_size(wrapped, (num_rows, dim), scales.shape, zero_points.shape)
    # Each scale is looked at below. Rows of an expanded tensor, which share theirs, may be of any number.
    if math.prod(scales.shape) > len(memory.bytes):
        raise ValueError(f"must have scales for each row in the file, got {brief(scales.shape)} that share bytes")
    # Each width is exact at the next one that there is.
    bits = next(width for width in (2, 4, 8) if width >= int(target[1]))
    said(wanted.bits, wanted.bits_of(name), "bits", (bits,))
    said(wanted.dims, wanted.dim_of(name), "dims", (dim,))
    pair = "float16" if _fit_halves(scales, zero_points, bits, memory) else "float32"
    layout = RowLayout(bits, dim, scale_dtype=pair, group_size=group_size)

    def pack(start: int, stop: int) -> NDArray[np.uint8]:
        some = slice(start, stop)
        try:
            return rows_of_intx(codes.array()[some], as_floats(scales, some), as_floats(zero_points, some), layout)
        except ValueError as error:
            raise ValueError(f"table {brief(name)}: rows {start} to {stop - 1} {error}") from None

    return Foreign.packed(name, num_rows, layout, pack)


def rows_of_intx(
    codes: NDArray[np.int8], scales: NDArray[Any], zero_points: NDArray[Any], layout: RowLayout
) -> NDArray[np.uint8]:
    """Rows in `layout` of torchao's codes: values are ``(code - zero_point) * scale``.

    They are exact where ``(zero_point + 2**(bits - 1)) * scale`` is exact in the layout's `scale_dtype`: for zero
    points of 0 always at float32. Else the bias is the nearest one.

    Parameters
    ----------
    codes : ndarray of int8, shape (num_rows, dim)
    scales, zero_points : ndarray of float32, shape (num_rows, num_groups)
    layout : RowLayout

    Raises
    ------
    ValueError
        If a code does not fit in the layout's bits.
    """
    middle = MIDDLES[layout.bits]
    if codes.size and not (-middle <= codes.min() and codes.max() < middle):
        raise ValueError(f"must have codes from {-middle} to {middle - 1}, got {codes.min()} to {codes.max()}")
    shifted = codes.view(np.uint8) + np.uint8(middle)  # modulo 256
    return layout.pack(shifted, _pairs(scales, zero_points, middle, layout.pair_dtype))


def _pairs(scales: NDArray[Any], zero_points: NDArray[Any], middle: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Scale and bias of each group, shape (num_rows, num_groups, 2); the bias is rounded once."""

    def computed() -> NDArray[Any]:
        wide = scales.astype(np.float64)
        return np.stack([wide, -(zero_points.astype(np.float64) + middle) * wide], axis=-1).astype(dtype)

    # Scales may be NaNs or infinities, as torchao's would be.
    return _arguments.quietly(computed)


def as_floats(tensor: Tensor, rows: slice) -> NDArray[Any]:
    """Some rows of a tensor; bits of bfloat16 become float32."""
    array = tensor.array()[rows]
    if tensor.dtype != "bfloat16":
        return array
    wide = array.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _tensor(wrapped: Wrapped, part: str) -> Tensor:
    found = wrapped.state.get(part)
    if isinstance(found, Tensor):
        return found
    raise ValueError(f"must have a tensor {part!r} in its {wrapped.cls}")


def _group_size(wrapped: Wrapped, shape: tuple[int, int], *of_scales: tuple[int, ...]) -> int | None:
    """Elements that share a scale; None for a whole row."""
    block = wrapped.state.get("block_size")
    if not isinstance(block, (tuple, list)) or len(block) != 2 or not all(type(size) is int for size in block):
        raise ValueError(f"must have a block_size of two whole numbers, got {what(block)}")
    rows, elements = block
    num_rows, dim = shape
    if rows != 1 or elements < 1 or dim % elements != 0:
        raise ValueError(
            f"must have groups of elements of one row that divide a dim of {dim}, got blocks of {brief(block)}"
        )
    if any(given != (num_rows, dim // elements) for given in of_scales):
        raise ValueError(f"must have scales and zero points of shape {(num_rows, dim // elements)}, got {of_scales}")
    if elements == dim:
        return None
    if elements % 16 != 0:
        raise ValueError(
            f"must have groups of a multiple of 16 elements, or of whole rows, got groups of {elements}: "
            "quantize with PerAxis(0) or PerGroup(32)"
        )
    return int(elements)


def _fit_halves(scales: Tensor, zero_points: Tensor, bits: int, memory: Memory) -> bool:
    """Whether float16 holds each scale and each bias exactly."""
    if scales.dtype not in HALVES or zero_points.dtype != "int8":
        return False
    num_rows, num_groups = scales.shape
    at_once = max(SCALES_AT_ONCE // max(num_groups, 1), 1)
    for start in range(0, num_rows, at_once):
        some = slice(start, start + at_once)
        scale, zero_point = as_floats(scales, some), as_floats(zero_points, some)
        exact = _pairs(scale, zero_point, MIDDLES[bits], np.dtype(np.float64))
        if not np.array_equal(_arguments.quietly(exact.astype, np.float16), exact):
            return False
        memory.release()
    return True
