"""TorchRec's quantized collections in state dicts: rows of FBGEMM's table-batched lookups, or their parts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats.safetensors_file import brief
from ..layout import RowLayout, largest_dim
from .foreign import Foreign, Wanted, said
from .torch_tensors import QTensor, Tensor, Wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# Bits of a code, by class. Plain uint8 may be codes of 8 bits, or floats.
CLASSES = {"torchrec.tensor_types.UInt4Tensor": 4, "torchrec.tensor_types.UInt2Tensor": 2}
KEY = re.compile(r"(?:^|\.)(?:embedding_bags|embeddings)\.[^.]+\.weight$")
# Views of the same tables, which register_tbes adds.
IGNORED = re.compile(r"(?:^|\.)tbes\.\d+\.")
SCALE, BIAS = "_qscale", "_qbias"
# Rows are padded to a multiple of this, unless TorchRec is told otherwise.
ROW_ALIGNMENT = 16
FLOATS: dict[int, np.dtype[Any]] = {16: np.dtype("<f2"), 32: np.dtype("<f4")}
# The widths that plain uint8 may have.
PLAIN = (8, *FLOATS)


def table(name: str, key: str, tensors: Mapping[str, Any], wanted: Wanted, *, big_endian: bool) -> Foreign:
    """The table of a key. Raises ValueError if it is none, or if `wanted` must say what the file does not."""
    codes, bits = codes_of(tensors[key])
    if codes is None:
        raise ValueError(f"must be uint8 with 2 dimensions, got {kind_of(tensors[key])}")
    parts = [tensors.get(key + part) for part in (SCALE, BIAS)]
    if any(part is not None for part in parts):
        return _split(name, codes, bits or 8, parts, wanted)
    if big_endian:
        raise ValueError(
            "must come from a little-endian machine: TorchRec's rows hold half floats within bytes, which nothing swaps"
        )
    num_bytes = codes.shape[1]
    dim = wanted.dim_of(name)
    if bits is None:
        bits = wanted.bits_of(name) or _only_width(num_bytes, dim)
    else:
        said(wanted.bits, wanted.bits_of(name), "bits", (bits,))
    if dim is None or bits is None:
        raise _unsaid(num_bytes, dim, bits)
    if bits in FLOATS:
        return float_rows(name, codes, dim, FLOATS[bits])
    most = largest_dim(bits, num_bytes, 2, None)
    if dim > most:
        raise ValueError(f"has rows of {num_bytes} bytes, which hold a dim of at most {most} at {bits} bits, got {dim}")
    layout = RowLayout(bits, dim, scale_dtype="float16", scale_first=True, row_bytes=num_bytes)
    return Foreign.as_it_is(name, codes, layout)


def codes_of(entry: object) -> tuple[NDArray[np.uint8] | None, int | None]:
    """The bytes of rows, and the bits of a code where the class says; None if it has none."""
    bits = None
    if isinstance(entry, Wrapped):
        bits, entry = CLASSES.get(entry.cls), entry.state.get("elem")
    if not isinstance(entry, Tensor) or entry.dtype != "uint8" or len(entry.shape) != 2 or entry.shape[1] == 0:
        return None, bits
    return bytes_of(entry), bits


def bytes_of(rows: Tensor) -> NDArray[np.uint8]:
    """Rows of bytes, as they lie."""
    if rows.shape[1] > 1 and rows.stride[1] != 1:
        raise ValueError(f"must have the bytes of a row side by side, got strides {brief(rows.stride)}")
    return rows.array()


def kind_of(entry: object) -> str:
    """What an entry of a file is, for errors."""
    if isinstance(entry, QTensor):
        return f"{entry.kind} {brief(entry.shape)}, {entry.scheme}"
    if isinstance(entry, Wrapped):
        return f"{entry.cls} {brief(entry.shape)}"
    return f"{entry.dtype} {brief(entry.shape)}" if isinstance(entry, Tensor) else "none"


def float_rows(name: str, rows: NDArray[np.uint8], dim: int, element: np.dtype[Any]) -> Foreign:
    """A table of floats in rows of bytes, which may be longer."""
    needed = dim * element.itemsize
    if needed > rows.shape[1]:
        most = rows.shape[1] // element.itemsize
        raise ValueError(
            f"has rows of {rows.shape[1]} bytes, which hold a dim of at most {most} as {element.name}, got {dim}"
        )
    return Foreign.as_it_is(name, rows[:, :needed].view(element))


def _split(name: str, codes: NDArray[np.uint8], bits: int, parts: list[Any], wanted: Wanted) -> Foreign:
    """A table whose scales and biases are tensors of their own."""
    num_rows = len(codes)
    for part, what in zip(parts, (SCALE, BIAS), strict=True):
        if not isinstance(part, Tensor) or part.dtype != "float16" or part.shape != (num_rows, 1):
            raise ValueError(f"must have a weight{what} of float16, shape {(num_rows, 1)}, got {kind_of(part)}")
    said(wanted.bits, wanted.bits_of(name), "bits", (bits,))
    columns = int(codes.shape[1]) * {8: 1, 4: 2, 2: 4}[bits]
    dim = said(wanted.dims, wanted.dim_of(name), "dims", (columns,))
    layout = RowLayout(bits, dim, scale_dtype="float16", scale_first=True)
    scales, biases = (part.array() for part in parts)

    def pack(start: int, stop: int) -> NDArray[np.uint8]:
        some = slice(start, stop)
        return layout.pack_bytes(codes[some], np.stack([scales[some], biases[some]], axis=-1))

    return Foreign.packed(name, num_rows, layout, pack)


def _most(bits: int, num_bytes: int) -> int:
    """The largest dim that so many bytes hold."""
    return num_bytes // FLOATS[bits].itemsize if bits in FLOATS else largest_dim(bits, num_bytes, 2, None)


def _only_width(num_bytes: int, dim: int | None) -> int | None:
    """8, if rows of plain bytes are too short for floats and no longer than TorchRec pads them; else None."""
    if dim is None or dim <= _most(16, num_bytes):
        return None
    return 8 if _most(8, num_bytes - ROW_ALIGNMENT) < dim <= _most(8, num_bytes) else None


def _unsaid(num_bytes: int, dim: int | None, bits: int | None) -> Unsaid:
    widths = PLAIN if bits is None else (bits,)
    most = {width: _most(width, num_bytes) for width in widths}
    if dim is not None and dim > max(most.values()):
        raise ValueError(f"has rows of {num_bytes} bytes, which hold a dim of at most {max(most.values())}, got {dim}")
    # A dim below that would have shorter rows.
    holds = ", or ".join(
        f"{_most(width, max(num_bytes - ROW_ALIGNMENT, 0)) + 1} to {most[width]} at {width} bits"
        for width in widths
        if most[width]
    )
    return Unsaid(
        f"has rows of {num_bytes} bytes, padded to a multiple of {ROW_ALIGNMENT}: a dim of {holds or 'none'}",
        max(most.values()) if dim is None else None,
        widths[0] if bits is None else None,
    )


class Unsaid(ValueError):
    """That a file does not say what the caller must: an example of a dim, and of bits, where it is needed."""

    def __init__(self, message: str, dim: int | None, bits: int | None) -> None:
        super().__init__(message)
        self.dim, self.bits = dim, bits
