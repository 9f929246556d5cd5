"""torch's quantized tensors: those of torch.ao.nn.quantized.Embedding and EmbeddingBag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments
from ..layout import RowLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS = {"quint8": 8, "quint4x2": 4}


def rows_of_per_channel(
    codes: NDArray[np.uint8], scales: NDArray[Any], zero_points: NDArray[Any], bits: int, dim: int
) -> NDArray[np.uint8]:
    """Rows in ``RowLayout(bits, dim)`` whose lookups have the bits of torch's own."""
    layout = RowLayout(bits, dim)
    pairs = np.empty((len(codes), 1, 2), np.float32)
    pairs[:, 0, 0] = scales
    pairs[:, 0, 1] = -_arguments.quietly(np.multiply, pairs[:, 0, 0], zero_points.astype(np.float32))
    rows = np.zeros((len(codes), layout.row_bytes), np.uint8)
    whole = np.zeros((len(codes), 1, 2), layout.pair_dtype)
    whole[...] = _arguments.quietly(pairs.astype, layout.pair_dtype)
    plain = layout.packed_codes(rows)
    plain[...] = codes[:, : layout.codes_bytes]
    return layout.pack(layout.codes(rows), whole)
