"""What files hold, for the commands that read them: tables of the package's, tensors of floats, and the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..formats.safetensors_file import Tensor, read_header, read_index
from ..formats.sources import Source, float_tensors, open_source
from ..formats.tables import open_table, open_tables
from ..float_table import FloatTable
from ..table import QuantizedTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..base import Table

# Values are made about this many bytes at a time.
AT_ONCE = 8 << 20


class Block(NamedTuple):
    """Some rows that are stored: their logical numbers, their values, and of codes the pairs of scale and bias."""

    numbers: NDArray[np.int64]
    values: NDArray[Any]
    pairs: NDArray[np.float32] | None


class Contents(NamedTuple):
    """Tables by name, tensors that are no part of one, and the metadata of whoever wrote the file."""

    tables: dict[str, Table | Source]
    tensors: list[Tensor]
    metadata: dict[str, str]


def contents_of(path: Path) -> Contents:
    """What is in a .npy or .safetensors file, or in the files that an index names.

    Raises
    ------
    OSError, ValueError
        If a file cannot be read, or is not in its format.
    """
    if path.suffix == ".npy":
        return Contents({name: open_source(path) for name in float_tensors(path)}, [], {})
    tensors, headers = tensors_of(path)
    described = any("qembag.tables" in metadata for metadata in headers)
    tables: dict[str, Table | Source] = {}
    metadata = {key: value for some in headers for key, value in some.items() if not key.startswith("qembag.")}
    if described or any(tensor.dtype in ("F32", "F16", "BF16") and len(tensor.shape) == 2 for tensor in tensors):
        opened = open_tables(path)
        tables, metadata = dict(opened), opened.metadata
    # float64 is no type of a table's; it can be quantized.
    for name in float_tensors(path):
        if name not in tables:
            tables[name] = open_source(path, name)
    parts = {part for name in tables for part in (name, f"{name}.rows", f"{name}.compressed_indices_mapping")}
    return Contents(tables, [tensor for tensor in tensors if tensor.name not in parts], metadata)


def tensors_of(path: Path) -> tuple[list[Tensor], list[dict[str, str]]]:
    """The tensors of a file or of all files of an index, and the metadata of each file."""
    if not path.name.endswith(".index.json"):
        with path.open("rb") as file:
            header = read_header(file, path)
        return list(header.tensors.values()), [header.metadata]
    tensors, metadata = [], []
    index = read_index(path)
    for shard in sorted(set(index.values())):
        with shard.open("rb") as file:
            header = read_header(file, shard)
        tensors += [tensor for tensor in header.tensors.values() if index.get(tensor.name) == shard]
        metadata.append(header.metadata)
    return tensors, metadata
