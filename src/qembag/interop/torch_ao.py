"""torch's quantized tensors: those of torch.ao.nn.quantized.Embedding and EmbeddingBag, and others saved as such."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments
from ..formats.safetensors_file import brief
from ..layout import RowLayout
from .foreign import Foreign, Wanted, said
from .torch_tensors import QTensor, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bits of a code, by the class of the storage. A state dict's own entry for it may be wrong.
BITS = {"quint8": 8, "quint4x2": 4}
# What torch.ao.nn.quantized.Linear saves: a tuple of its weight and its bias.
OF_LINEAR = re.compile(r"(^|\.)_packed_params\._packed_params(\.\d+)?$")
TINY = np.finfo(np.float32).tiny


def is_table(key: str, tensor: QTensor) -> bool:
    """Whether it may be an embedding: per-tensor scales and the weights of linear layers are not."""
    has_rows = len(tensor.shape) == 2 and tensor.shape[1] > 0
    return has_rows and tensor.scheme.startswith("per_channel") and not OF_LINEAR.search(key)


def table(name: str, tensor: QTensor, wanted: Wanted) -> Foreign:
    """The table of a tensor with a scale and a zero point a row. Raises ValueError if it is none."""
    bits = BITS.get(tensor.kind)
    if bits is None:
        raise ValueError(f"must be quint8 or quint4x2, got {tensor.kind}; save tensor.dequantize() instead")
    if tensor.axis != 0:
        raise ValueError(f"must have its scales along axis 0, got axis {tensor.axis}")
    scales, zero_points = _floats(tensor.scales), _floats(tensor.zero_points)
    num_rows, columns = tensor.shape
    # At 4 bits torch's modules round an odd dim up, and leave the last code as it was in memory.
    dims = (columns, columns - 1) if bits == 4 and columns > 1 and columns % 2 == 0 else (columns,)
    dim = said(wanted.dims, wanted.dim_of(name), "dims", dims)
    said(wanted.bits, wanted.bits_of(name), "bits", (bits,))
    layout = RowLayout(bits, dim)
    codes = tensor.codes

    def pack(start: int, stop: int) -> NDArray[np.uint8]:
        some = slice(start, stop)
        _check_qparams(name, scales[some], zero_points[some], start)
        return rows_of_per_channel(codes[some], scales[some], zero_points[some], bits, dim)

    return Foreign.packed(name, num_rows, layout, pack)


def rows_of_per_channel(
    codes: NDArray[np.uint8], scales: NDArray[Any], zero_points: NDArray[Any], bits: int, dim: int
) -> NDArray[np.uint8]:
    """Rows in ``RowLayout(bits, dim)`` whose lookups have the bits of torch's own.

    Parameters
    ----------
    codes : ndarray of uint8, shape (num_rows, bytes)
        Packed codes as torch stores them, the first one in a byte's lowest bits; more bytes than `dim` needs are cut.
    scales, zero_points : ndarray of float32, shape (num_rows,)
    bits : {8, 4}
    dim : int
    """
    layout = RowLayout(bits, dim)
    with_pairs = np.empty((len(codes), 1, 2), np.float32)
    with_pairs[:, 0, 0] = scales
    # As torch's prepack computes it: the product is rounded to float32, and at 4 bits both to half.
    with_pairs[:, 0, 1] = _arguments.quietly(np.multiply, with_pairs[:, 0, 0], zero_points.astype(np.float32))
    np.negative(with_pairs[:, 0, 1], out=with_pairs[:, 0, 1])
    pairs = _arguments.quietly(with_pairs.astype, layout.pair_dtype)
    return layout.pack_bytes(codes[:, : layout.codes_bytes], pairs)


def _floats(values: object) -> NDArray[Any]:
    """Scales or zero points, if they are as embeddings have them."""
    kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
    if not isinstance(values, Tensor) or kind != "float32":
        raise ValueError(
            "must have scales and zero points of float32 (torch.per_channel_affine_float_qparams), as embeddings do, "
            f"got {kind}: no float32 bias holds their values exactly; save tensor.dequantize() instead"
        )
    return values.array()


def _check_qparams(name: str, scales: NDArray[Any], zero_points: NDArray[Any], first_row: int) -> None:
    """Raise if they are not scales and zero points, but what freed memory was used for.

    Pointers and small integers, which such memory is full of, are subnormal as floats. Scales that torch's observers
    choose never are. Zero points may be 0, and where the scale is 1, anything: observers choose that scale for a row of
    values that are too small to have another, and then minus the least of them.
    """
    never = np.zeros(len(scales), bool)
    for what, values, may_be_tiny in (("scale", scales, never), ("zero point", zero_points, scales == 1)):
        size = np.abs(values)
        wrong = np.flatnonzero(~np.isfinite(size) | ((size > 0) & (size < TINY) & ~may_be_tiny))
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"table {brief(name)}: row {first_row + row} has a {what} of {values[row]:g}, which is none. torch's "
                "state_dict() of quantized embeddings does not keep its scales alive: save it while the module is "
                "still there"
            )
