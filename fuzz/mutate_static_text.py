"""Damages models of static text, and GGUF files where the package `gguf` is installed, and loads them.

    python fuzz/mutate_static_text.py COUNT [SEED [FIRST]]

As mutate_files.py. A table that is loaded must have the values that the official library and NumPy, or the package,
find in the file.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mutate_files
import qembag
from file_damage import FILE_DAMAGES, Files, flip, spoil_json
from mutate_files import Finding, alarm, look_up, opened, safetensors
from support import gguf_files
from support.static_text import safetensors as file_of
from support.static_text import write_model2vec, write_sentence_transformers

try:
    gguf: Any = importlib.import_module("gguf")
except ImportError:
    gguf = None

MODEL = "model.safetensors"
NAMES = {"embeddings": "embeddings", "embedding": "embedding.weight"}
NUMBERS = [0, 1, 2, 8, 9, 31, 33, 255, 2**15, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 32, 2**64 - 1]


# ---- Files to begin with ---------------------------------------------------------------------------------------------


def bases(folder: Path) -> list[Files]:
    """Files by name. Where the first one is a path in a folder, the folder is loaded."""
    rng = np.random.default_rng(15)
    rows = rng.normal(size=(7, 5)).astype(np.float32)
    codes = rng.integers(-128, 128, (7, 5)).astype(np.int8)
    mapping = np.array([6, 6, 0, 3, 1, 2, 0, 5, 4], np.int32)
    weights = np.linspace(0.25, 3, len(mapping)).astype(np.float32)

    def written(write: Callable[..., None], *arguments: Any, **named: Any) -> Files:
        place = folder / "made"
        write(place, *arguments, **named)
        paths = sorted((path for path in place.rglob("*") if path.is_file()), key=lambda path: path.name != MODEL)
        made = {f"model/{path.relative_to(place).as_posix()}": path.read_bytes() for path in paths}
        shutil.rmtree(place)
        return made

    found = [
        written(write_model2vec, embeddings=rows),
        written(write_model2vec, mapping=mapping, weights=weights, embeddings=codes),
        written(write_model2vec, embeddings=rows.astype(np.float16), mapping=mapping.astype(np.int64), weights=weights),
        written(write_sentence_transformers, rows, "0_StaticEmbedding"),
        written(write_sentence_transformers, rows.astype(np.float16), ""),
        # With another model beside it, which its paths must not reach.
        written(write_sentence_transformers, rows, "0_A") | {f"other/{MODEL}": file_of({"embedding.weight": -rows})},
        {MODEL: file_of({"embedding.weight": rows.astype(np.float16)})},
        {MODEL: file_of({"embeddings": codes, "mapping": mapping, "weights": weights.astype(np.float64)})},
    ]
    return found + ([{"a.gguf": raw} for raw in gguf_bases(np.random.default_rng(16))] if gguf else [])


def gguf_bases(rng: np.random.Generator) -> list[bytes]:
    rows = rng.normal(size=(6, 64)).astype(np.float32)
    bits = (rows.view(np.uint32) >> 16).astype("<u2")
    floats = {"F32": rows.astype("<f4"), "F16": rows.astype("<f2"), "BF16": bits}
    tensors = {kind: (kind, gguf_files.blocks_of(kind, 6, 2, rng, [1e-3, 2.0, 500.0])) for kind in gguf_files.BLOCKS}
    tensors |= {kind: (kind, array.view(np.uint8)) for kind, array in floats.items()}
    keys = [gguf_files.key("general.alignment", 4, b"\x20\0\0\0"), gguf_files.vocabulary(["a", "b", "cd"])]
    one = {"token_embd.weight": tensors["Q4_0"]}
    return [gguf_files.of_blocks(tensors, keys), gguf_files.of_blocks(one), gguf_files.of_blocks(one, keys)]


# ---- Damage ----------------------------------------------------------------------------------------------------------


def change_number(raw: bytes, rng: random.Random) -> bytes:
    """A number of the header, as far as it can be guessed where one is."""
    size = rng.choice([4, 8])
    place = rng.choice([8, 16, 24, rng.randrange(min(len(raw), 400))])
    old = int.from_bytes(raw[place : place + size], "little")
    value = rng.choice([*NUMBERS, old + 1, old - 1, 2 * old]) % 2 ** (8 * size)
    return raw[:place] + value.to_bytes(size, "little") + raw[place + size :]


def any_tensors(raw: bytes, rng: random.Random) -> bytes:
    """A file of tensors of all kinds of shapes at all kinds of places."""
    infos = []
    for number in range(rng.choice([1, 2, 5])):
        shape = [rng.choice([32, 64, 1, 0, 3, 2**20, *NUMBERS]) for _ in range(rng.choice([2, 2, 2, 1, 3, 0]))]
        kind = rng.choice([*gguf_files.TYPES.values(), 4, 39])
        infos.append(gguf_files.tensor(f"t{number}.weight", shape, kind, rng.choice([0, 32, 96, 1000, *NUMBERS])))
    return gguf_files.whole([], infos, raw[-rng.randrange(1, 600) :])


def spoil_gguf(raw: bytes, rng: random.Random) -> bytes:
    return rng.choice([*FILE_DAMAGES[:4], change_number, change_number, change_number, any_tensors])(raw, rng)


def spoil_modules(raw: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    if kind < 3:
        return spoil_json(raw, rng, kind)
    modules = json.loads(raw)
    rng.choice(modules)["path"] = rng.choice(["../other", "../other", "..", "/etc", "", ".", "0_A", "0_A/", "a\\b"])
    return json.dumps(modules).encode()


def damaged(files: Files, rng: random.Random) -> Files:
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(list(files))
        raw = files[name]
        try:
            if name.endswith(".json"):
                files[name] = spoil_modules(raw, rng)
            else:
                files[name] = (spoil_gguf if name.endswith(".gguf") else rng.choice(FILE_DAMAGES))(raw, rng)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
            files[name] = flip(raw, rng) if raw else raw  # too far gone to be edited
    if len(files) > 1 and rng.random() < 0.05:
        del files[rng.choice(list(files))]
    return files


# ---- Verdicts --------------------------------------------------------------------------------------------------------


def loads(folder: Path) -> Callable[[random.Random], str]:
    """Plays a case."""
    kinds = bases(folder)

    def play(rng: random.Random) -> str:
        files = damaged(rng.choice(kinds), rng)
        place = folder / "case"
        for name, raw in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(raw)
        try:
            first = next(iter(files))
            with alarm():
                return verdict(place / ("model" if "/" in first else first), files, rng.random() < 0.5)
        finally:
            shutil.rmtree(place)

    return play


def verdict(path: Path, files: Files, mmap: bool) -> str:
    tables = opened(qembag.load_tables, path, sum(map(len, files.values())), mmap)
    if isinstance(tables, str):
        return tables
    for name, table in tables.items():
        look_up(name, table)
    if path.suffix == ".gguf":
        judge_gguf(path, tables)
    elif safetensors is not None:
        judge(next(raw for name, raw in files.items() if name.endswith(MODEL)), tables)
    return "opened"


def judge(raw: bytes, tables: dict[str, Any]) -> None:
    """The official library and NumPy must find the same values."""
    try:
        tensors = {name: (tensor["dtype"], tensor) for name, tensor in safetensors.deserialize(raw)}
    except safetensors.SafetensorError as error:
        raise Finding(f"loaded what the official library refuses: {error}") from None
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1", "I32": "<i4", "I64": "<i8"}
    arrays = {
        name: np.frombuffer(bytes(tensor["data"]), kinds[dtype]).reshape(tensor["shape"])
        for name, (dtype, tensor) in tensors.items()
        if dtype in kinds
    }
    for name, table in tables.items():
        rows = arrays.get(NAMES.get(name, name))
        if rows is None:
            continue  # a file that damage has made into one of another kind
        with np.errstate(all="ignore"):
            values = rows.astype(np.float32)
            weights = None if table.row_weights is None else arrays["weights"].astype(np.float32)
        expected = values[arrays["mapping"]] if table.compressed_indices_mapping is not None else values
        if not np.array_equal(table[:], expected[: len(table)], equal_nan=True):
            raise Finding(f"table {name!r} has other values than in the official library")
        if weights is not None and not np.array_equal(table.row_weights, weights, equal_nan=True):
            raise Finding(f"table {name!r} has other weights than in the official library")


def judge_gguf(path: Path, tables: dict[str, Any]) -> None:
    try:
        with np.errstate(all="ignore"):
            tensors = gguf.GGUFReader(str(path)).tensors
    except (ValueError, KeyError, IndexError, OverflowError):
        return  # it reads the lists of metadata, which are stepped over here
    for tensor in tensors:
        table = tables.get(tensor.name.removesuffix(".weight"), tables.get(tensor.name))
        if table is not None and len(table):
            with np.errstate(all="ignore"):
                expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if not np.array_equal(table[:], expected, equal_nan=True):
                raise Finding(f"table {tensor.name!r} has other values than in the package")


run = functools.partial(mutate_files.run, player=loads)

if __name__ == "__main__":
    sys.exit(mutate_files.main(sys.argv[1:], __file__, run))
