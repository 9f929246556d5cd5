"""Tables of every kind that files hold, and how two tables are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import qembag

AnyTable = qembag.QuantizedTable | qembag.FloatTable


def tables_of_every_kind() -> dict[str, AnyTable]:
    """The same on every run: all widths, layouts, padding, pruning, no rows, and floats of each type."""
    rng = np.random.default_rng(20261127)
    weights = rng.normal(size=(9, 40)).astype(np.float32)
    keep = np.array([True, False, True, True, False, True, False, True, True])
    tables: dict[str, AnyTable] = {}
    for bits in (8, 4, 2):
        other = "float16" if bits == 8 else "float32"
        tables[f"{bits} bits"] = qembag.quantize(weights, bits)
        tables[f"{bits} bits, groups"] = qembag.quantize(
            weights, bits, scale_dtype=other, scale_first=True, group_size=16, row_alignment=64
        )
        tables[f"{bits} bits, pruned"] = qembag.quantize(weights[:, :7], bits, row_alignment=16).prune(keep)
        tables[f"{bits} bits, no rows"] = qembag.quantize(weights[:0], bits)
    bits_of_bfloat16 = (weights.view(np.uint32) >> 16).astype(np.uint16)
    tables["float32"] = qembag.FloatTable(weights)
    tables["float16"] = qembag.FloatTable(weights[:, :3].astype(np.float16))
    tables["bfloat16"] = qembag.FloatTable(bits_of_bfloat16, dtype="bfloat16")
    tables["float32, pruned"] = qembag.FloatTable(weights[:, :5].copy()).prune(keep)
    tables["float16, nothing left"] = qembag.FloatTable(weights.astype(np.float16)).prune([])
    tables["größe/ü 😀 \n"] = qembag.quantize(weights[:1])
    return tables


def same_tables(one: AnyTable, other: AnyTable) -> None:
    """Of one type and layout, with the same bytes: padding too."""
    assert type(one) is type(other)
    if isinstance(one, qembag.QuantizedTable):
        assert one.layout == other.layout
        assert np.array_equal(one.data, other.data)
    else:
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.array_equal(bits_of(one), bits_of(other))
    mappings = (one.compressed_indices_mapping, other.compressed_indices_mapping)
    assert (mappings[0] is None) == (mappings[1] is None)
    assert mappings[0] is None or np.array_equal(*mappings)


def bits_of(table: qembag.FloatTable) -> np.ndarray:
    return np.ascontiguousarray(table.data).view(f"u{table.data.itemsize}")


def rewritten(path: Path, change: Any, data: Any = None) -> Path:
    """The file with another header, and other data if a function says which; lengths are made to fit."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    rest = raw[8 + length :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + (rest if data is None else data(rest)))
    return path


def describing(change: Any) -> Any:
    """For `rewritten`: changes the JSON that describes the tables of codes."""

    def changed(header: dict[str, Any]) -> None:
        described = json.loads(header["__metadata__"]["qembag.tables"])
        change(described)
        header["__metadata__"]["qembag.tables"] = json.dumps(described)

    return changed
