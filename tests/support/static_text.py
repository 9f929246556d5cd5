"""Models of static text, written by hand, and a small tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"f2": "F16", "f4": "F32", "f8": "F64", "i1": "I8", "i4": "I32", "i8": "I64", "u1": "U8", "u2": "U16"}
WORDS = [
    "a",
    "b",
    "bag",
    "c",
    "cat",
    "dog",
    "e",
    "embedding",
    "fast",
    "in",
    "is",
    "kernel",
    "of",
    "on",
    "quick",
    "row",
    "sum",
    "table",
    "the",
    "word",
]
TEXTS = ["a cat", "", "the quick dog is in the table", "unknown", "sum of the row", "b", "e unknown c of " * 9]


def safetensors(
    tensors: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The file, as the official library writes it except for the order of tensors; dtypes by name where NumPy has
    none."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in tensors.items():
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        kind = (dtypes or {}).get(name, KINDS[array.dtype.str[1:]])
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_model2vec(folder: Path, **tensors: np.ndarray) -> None:
    """What model2vec 0.10.0 writes, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    config = {"normalize": True, "max_length": 512, "embedding_dtype": tensors["embeddings"].dtype.name}
    (folder / "config.json").write_text(json.dumps(config))
    write_modules(folder, ".")


def write_sentence_transformers(folder: Path, rows: np.ndarray, place: str) -> None:
    """What sentence-transformers writes, without a tokenizer; version 6.2.0 at the folder's root."""
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / "model.safetensors").write_bytes(safetensors({"embedding.weight": rows}))
    write_modules(folder, place)


def write_modules(folder: Path, place: str) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": place, "type": "sentence_transformers.models.StaticEmbedding"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def tokenizer_of(tokenizers: Any) -> Any:
    """A word a token, of the package `tokenizers`."""
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(["[UNK]", *WORDS])}, "[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def bags_of(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Indices, and offsets with the last one."""
    indices = np.array([token for some in ids for token in some], np.int64)
    return indices, np.cumsum([0, *map(len, ids)])
