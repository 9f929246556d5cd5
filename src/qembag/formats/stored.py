"""Where rows of floats lie in a file: .npy, .safetensors, or an index of several .safetensors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .safetensors_file import Tensor, brief, read_header, read_index

if TYPE_CHECKING:
    from pathlib import Path

MAPPING = ".compressed_indices_mapping"
ROW_WEIGHTS = ".row_weights"
# Types of floats, as safetensors and as NumPy name them.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Stored(NamedTuple):
    """Where rows of floats lie in a file."""

    path: Path
    start: int
    dtype: str  # NumPy's, with the byte order; or "bfloat16", which is little-endian
    shape: tuple[int, int]
    by_columns: bool = False
    mapping: Tensor | None = None  # of a pruned table: the row of each logical row, -1 for none
    row_weights: Tensor | None = None

    @property
    def logical_shape(self) -> tuple[int, int]:
        """With the rows that are pruned."""
        return self.shape if self.mapping is None else (self.mapping.shape[0], self.shape[1])

    @property
    def kind(self) -> str:
        return self.dtype if self.dtype == "bfloat16" else np.dtype(self.dtype).name

    @property
    def element(self) -> np.dtype[Any]:
        """The dtype to read elements with; for bfloat16 that of its bits."""
        return np.dtype("<u2" if self.dtype == "bfloat16" else self.dtype)


def is_weights(tensor: Tensor | None) -> bool:
    """Whether a tensor called so is row weights: a table of floats may have that name, and is a table of its own."""
    return tensor is not None and (tensor.dtype, len(tensor.shape)) == ("F32", 1)


def listed(found: dict[str, Stored]) -> str:
    names = sorted(found)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"there are: {', '.join(map(repr, names[:20]))}{more}" if names else "there is none"


def stored_floats(path: Path) -> dict[str, Stored]:
    """The 2-D tensors of floats in a file, by name.

    Raises
    ------
    ValueError, OSError
        Names the file: if it has another suffix, is damaged, or cannot be read.
    """
    name = path.name.lower()
    if name.endswith(".npy"):
        return {path.stem: stored_array(path)}
    if name.endswith(".safetensors"):
        return _tables({tensor: (entry, path) for tensor, entry in _tensors(path).items()})
    if name.endswith(".index.json"):
        index = read_index(path)
        shards = {shard: _tensors(shard) for shard in sorted(set(index.values()))}
        for tensor, shard in index.items():
            if tensor not in shards[shard]:
                raise ValueError(f"{path}: names tensor {tensor!r} of {shard.name}, which has none")
        return _tables({tensor: (shards[shard][tensor], shard) for tensor, shard in index.items()})
    raise ValueError(f"source must be a .npy, a .safetensors or an .index.json file, got {path} (see `qembag convert`)")


def _tensors(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        return read_header(file, path).tensors


def _tables(tensors: dict[str, tuple[Tensor, Path]]) -> dict[str, Stored]:
    found = {}
    for name, (tensor, path) in tensors.items():
        if tensor.dtype in FLOATS and len(tensor.shape) == 2 and tensor.shape[1] > 0:
            kind = FLOATS[tensor.dtype]
            dtype = kind if kind == "bfloat16" else np.dtype(kind).newbyteorder("<").str
            mapping = _mapping_of(name, tensors, path)
            weights, where = tensors.get(name + ROW_WEIGHTS, (None, path))
            weights = weights if where == path and is_weights(weights) else None
            found[name] = Stored(path, tensor.start, dtype, (tensor.shape[0], tensor.shape[1]), False, mapping, weights)
    return found


def _mapping_of(name: str, tensors: dict[str, tuple[Tensor, Path]], path: Path) -> Tensor | None:
    mapping, where = tensors.get(name + MAPPING, (None, path))
    if mapping is not None and (mapping.dtype != "I32" or len(mapping.shape) != 1 or where != path):
        raise ValueError(f"{path}: {brief(mapping.name)} must be I32 of 1 dimension, in the file of its table")
    return mapping


def stored_array(path: Path) -> Stored:
    """The array of a .npy file. Never reads a pickle."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"its version is {version}")
            # Version 3 differs from 2 only in the encoding of field names, which arrays of floats do not have.
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
        except (MemoryError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 (for example from Python's parser, which reads the header)
            raise ValueError(f"{path}: not a readable .npy file: {type(error).__name__}: {error}") from None
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    kind = dtype.newbyteorder("=")
    if kind.kind != "f" or kind not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{path}: must hold float16, float32 or float64, got {kind}")
    if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
        raise ValueError(f"{path}: must have 2 dimensions (rows, dim) and a dim of 1 or more, got shape {shape}")
    if size - start < shape[0] * shape[1] * dtype.itemsize:
        raise ValueError(f"{path}: is too short for its {kind} array of shape {shape}: {size} bytes")
    return Stored(path, start, dtype.str, shape, by_columns)
