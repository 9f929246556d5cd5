"""GGUF files by hand: what the package's writer would not write too."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Numbers of types of tensors, bytes of a block of 32 elements, or of one element.
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
# Types of values.
UINT8, UINT32, TEXT, LIST = 0, 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def a_list(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def vocabulary(words: Sequence[str]) -> bytes:
    return key("tokenizer.ggml.tokens", LIST, a_list(TEXT, len(words), b"".join(map(text, words))))


def tensor(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole(
    keys: Sequence[bytes], infos: Sequence[bytes], data: bytes, counts: tuple[int, int] | None = None, version: int = 3
) -> bytes:
    """A file; `counts` of tensors and keys other than there are."""
    tensors, values = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join([*keys, *infos])
    return head + bytes(-len(head) % 32) + data


def of_blocks(tables: Mapping[str, tuple[str, np.ndarray]], keys: Sequence[bytes] = ()) -> bytes:
    """A file of tensors, each as its type and its rows' bytes."""
    infos, data = [], b""
    for name, (kind, rows) in tables.items():
        raw = rows.tobytes()
        infos.append(tensor(name, [elements_of(kind, rows), len(rows)], TYPES[kind], len(data)))
        data += raw + bytes(-len(raw) % 32)
    return whole(keys, infos, data)


def elements_of(kind: str, rows: np.ndarray) -> int:
    """Of a row of those bytes."""
    if kind in BLOCKS:
        return rows.shape[1] // BLOCKS[kind] * 32
    return rows.shape[1] // (4 if kind == "F32" else 2)


def blocks_of(kind: str, num_rows: int, num_blocks: int, rng: np.random.Generator, scales: Any = None) -> np.ndarray:
    """Random blocks: of any bits, or with scales chosen from those."""
    raw = rng.integers(0, 256, (num_rows, num_blocks, BLOCKS[kind]), dtype=np.uint8)
    if scales is not None:
        some = rng.choice(np.asarray(scales, np.float16), (num_rows, num_blocks)).astype("<f2")
        raw[:, :, :2] = some.view(np.uint8).reshape(num_rows, num_blocks, 2)
    return raw.reshape(num_rows, -1)
