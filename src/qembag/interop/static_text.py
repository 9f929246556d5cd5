"""Static text models: the table of word pieces of model2vec, sentence-transformers (StaticEmbedding) and WordLlama.

Each keeps its table in a safetensors file of few tensors. A folder is searched for that file; its tokenizer and its
configuration are not needed for the table, and not read.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments
from ..formats.safetensors_file import LENGTH_BYTES, Tensor, brief, header_of, inside, read_json
from ..layout import RowLayout
from .foreign import Foreign, Memory, Wanted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

# The tensor that holds the rows, and the table's name. Beside it there may be two more.
ROWS = {"embeddings": "embeddings", "embedding.weight": "embedding"}
WEIGHTS, MAPPING = "weights", "mapping"
# Types of tensors as NumPy's; bfloat16 as its bits.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
KINDS = FLOATS | {"I8": "i1"}
INTEGERS = {"I32": "<i4", "I64": "<i8"}
# A longer header or modules.json is no static text model's. JSON takes up to thirty times its length when it is read.
MAX_JSON = 1 << 20
MODULES, MODULE = "modules.json", "StaticEmbedding"
MODEL2VEC, SENTENCE_TRANSFORMERS, WORDLLAMA = "model2vec", "sentence-transformers", "wordllama"
# What a module's parameters are saved as; the second one with safe_serialization=False.
FILES = ("model.safetensors", "pytorch_model.bin")


def read_folder(folder: Path, wanted: Wanted) -> tuple[Memory, str, dict[str, Foreign]]:
    """The file with the table of a model's folder, whose model it is, and the table.

    Raises
    ------
    ValueError
        Without the folder's path: if it is no such model's, if a path in it leads out of it, or a file is damaged.
    OSError
        If a file cannot be read.
    """
    has_modules = os.path.isfile(folder / MODULES)
    name = _file_of(folder, _places_of_modules(folder) if has_modules else [""])
    try:
        memory = Memory(folder / name)
        if name.endswith(FILES[1]):
            from .torch_file import read as read_torch

            return memory, SENTENCE_TRANSFORMERS, read_torch(memory, wanted)
        found = read_safetensors(memory, wanted)
        if found is None:
            raise ValueError("has no table of a static text model: a tensor 'embeddings' or 'embedding.weight' alone")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    kind, tables = found
    return memory, SENTENCE_TRANSFORMERS if kind == WORDLLAMA and has_modules else kind, tables


def _file_of(folder: Path, places: list[str]) -> str:
    """The file with the table, in one of these folders of the folder."""
    for place in places:
        for file in FILES:
            name = f"{place}/{file}" if place else file
            if os.path.isfile(inside(folder, name)):
                return name
    where = " or ".join(brief(place) if place else "the folder" for place in places)
    raise ValueError(f"is no folder of a static text model: {where} must hold {FILES[0]}")


def _places_of_modules(folder: Path) -> list[str]:
    """Where the parameters of the StaticEmbedding are: "" is the folder itself."""
    modules = modules_of(folder)
    kinds = [kind for kind, _ in modules]
    if MODULE not in kinds:
        raise ValueError(f"{MODULES}: must name a {MODULE}, the only module that is a table, got {brief(kinds)}")
    return [place for kind, place in modules if kind == MODULE]


def modules_of(folder: Path) -> list[tuple[str, str]]:
    """The kind of each module of a model, and its folder: "" is the model's own."""
    modules = json_of(folder, MODULES)
    if type(modules) is not list or not all(
        type(module) is dict and type(module.get("type")) is str and type(module.get("path")) is str
        for module in modules
    ):
        raise ValueError(f"{MODULES}: must be a list of objects with a type and a path")
    found = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    return [(kind, "" if place == "." else place) for kind, place in found]


def json_of(folder: Path, name: str) -> Any:
    """What a file of JSON in the folder says. Raises ValueError, which names the file, if it is too long or none."""
    with inside(folder, name).open("rb") as file:
        text = file.read(MAX_JSON + 1)
    try:
        if len(text) > MAX_JSON:
            raise ValueError(f"is longer than {MAX_JSON} bytes")
        return read_json(text, only_whole_numbers=False)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_safetensors(memory: Memory, wanted: Wanted) -> tuple[str, dict[str, Foreign]] | None:
    """Whose model a safetensors file is, and its table; None if it is no static text model's.

    Raises
    ------
    ValueError
        Without the path: if the file is damaged.
    """
    if int.from_bytes(memory.bytes[:LENGTH_BYTES].tobytes(), "little") > MAX_JSON:
        return None
    with memory.path.open("rb") as file:
        tensors = header_of(file).tensors
    if sum(tensor.nbytes for tensor in tensors.values()) > len(memory.bytes):
        raise ValueError("changed while it was opened")
    names = [name for name in tensors if name in ROWS]
    if len(names) != 1 or not tensors.keys() <= {names[0], WEIGHTS, MAPPING}:
        return None
    rows = tensors[names[0]]
    if rows.dtype not in KINDS or len(rows.shape) != 2 or 0 in rows.shape:
        return None
    table = _table(memory, ROWS[names[0]], rows, tensors)
    if names[0] == "embeddings":
        return MODEL2VEC, {table.name: table}
    # These two differ in nothing but the type that they are usually saved in.
    return SENTENCE_TRANSFORMERS if rows.dtype == "F32" else WORDLLAMA, {table.name: table}


def _table(memory: Memory, name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Foreign:
    rows = _array(memory, tensor)
    mapping = weights = None
    if MAPPING in tensors:
        mapping = _mapping(memory, tensors[MAPPING], len(rows))
        if len(mapping) == 1 and mapping[0] == 0:
            # On a table, that mapping stands for none.
            rows, mapping = rows[:1], None
    num_embeddings = len(rows if mapping is None else mapping)
    if WEIGHTS in tensors:
        weights = _weights(memory, tensors[WEIGHTS], num_embeddings)
    if tensor.dtype != "I8":
        return Foreign.as_it_is(name, rows, mapping=mapping, row_weights=weights)
    # The value is the code itself, which has a sign: with a bias of -128 it has none. Halves hold both exactly.
    layout = RowLayout(8, rows.shape[1], scale_dtype=np.float16)

    def pack(start: int, stop: int) -> NDArray[np.uint8]:
        codes = rows[start:stop].view(np.uint8) ^ np.uint8(128)
        return layout.pack(codes, np.full((len(codes), 1, 2), [1, -128], np.float16))

    return Foreign.packed(name, len(rows), layout, pack, mapping=mapping, row_weights=weights)


def _mapping(memory: Memory, tensor: Tensor, num_rows: int) -> NDArray[np.int32]:
    """The row of each token. model2vec prunes none: a negative number would count from the end there."""
    if tensor.dtype not in INTEGERS or len(tensor.shape) != 1:
        raise ValueError(f"{MAPPING} must be I32 or I64 of 1 dimension, got {tensor.dtype} of {brief(tensor.shape)}")
    mapping = _array(memory, tensor)
    wrong = _arguments.first_beyond(mapping, 0, num_rows)
    if wrong is not None:
        raise ValueError(f"{MAPPING}[{wrong}] must be from 0 to {num_rows - 1}, got {mapping[wrong]}")
    return mapping.astype(np.int32)


def _weights(memory: Memory, tensor: Tensor, num_embeddings: int) -> NDArray[np.float32]:
    if tensor.dtype not in ("F64", "F32", "F16") or tensor.shape != (num_embeddings,):
        raise ValueError(
            f"{WEIGHTS} must be F32, F16 or F64 of shape ({num_embeddings},), one for each token, "
            f"got {tensor.dtype} of {brief(tensor.shape)}"
        )
    return _arguments.as_float32(_array(memory, tensor))


def _array(memory: Memory, tensor: Tensor) -> NDArray[Any]:
    """A tensor in the file's byte order, at any address: a view."""
    raw = memory.bytes[tensor.start : tensor.start + tensor.nbytes]
    array: NDArray[Any] = raw.view((KINDS | INTEGERS)[tensor.dtype]).reshape(tensor.shape)
    return array
