"""Models in folders: what each library's files say of table, tokenizer and rules."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.replace import replacing
from ..formats.safetensors_file import brief, inside, read_json
from ..formats.saving import as_path
from ..formats.tables import open_tables
from ..interop.load import errors_name, load_tables, open_others, wanted_of
from ..interop.static_text import MODEL2VEC, MODULE, MODULES, json_of, modules_of
from . import tokenizer as tokenizers

if TYPE_CHECKING:
    from ..base import Table
    from ..formats.tables import Tables

# The files that `save` writes, and the key of its options in the table's file.
TABLE, TOKENIZER, OPTIONS = "table.safetensors", "tokenizer.json", "text_embedder"
# model2vec's default, of files that do not say it.
MAX_LENGTH = 512
RULES = {
    "mode": "mean",
    "normalize": False,
    "max_length": None,
    "max_characters": None,
    "drop_unknown": False,
    "invalid": "raise",
}


def load(path: Any, table: Any, tokenizer: Any, normalize: Any, mmap: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The table, the tokenizer and the options of a model; see `TextEmbedder.load`."""
    whole = Path(os.path.abspath(as_path(path)))
    with errors_name(whole):
        # Without our options it is a table that a user has put into a folder of another library.
        ours = open_tables(inside(whole, TABLE), mmap=mmap) if (whole / TABLE).is_file() else None
        if ours is not None and OPTIONS in ours.metadata:
            found, text, options = _of_ours(whole, ours, table, tokenizer)
        else:
            found, text, options = _of_others(whole, table, tokenizer, mmap)
    if normalize is not None:
        options["normalize"] = normalize
    return found, text, options


def save(path: Any, table: Table, tokenizer: Any, options: dict[str, Any]) -> None:
    folder = as_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TOKENIZER) as file:
        file.write(tokenizer.to_str().encode())
    table.save(folder / TABLE, metadata={OPTIONS: json.dumps(options)})


def _of_ours(folder: Path, tables: Tables, table: Any, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    from .embedder import checked_options  # which imports this module when it is asked to load

    try:
        options = read_json(tables.metadata[OPTIONS])
        if len(tables) != 1 or type(options) is not dict or not options.keys() <= RULES.keys():
            raise ValueError("it has others")
        options = checked_options(**(RULES | options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{TABLE}: must hold a table and options that TextEmbedder.save wrote: {error}") from None
    if table is None:
        (table,) = tables.values()
    return table, _tokenizer(folder, tokenizer), options


def _of_others(path: Path, table: Any, tokenizer: Any, mmap: Any) -> tuple[Any, Any, dict[str, Any]]:
    found = open_others(path, None, wanted_of(None, None, None))
    kind = None if found is None else found.format
    if path.is_dir():
        if kind == MODEL2VEC:
            text, options = _model2vec(path, tokenizer)
        else:
            text, options = _sentence_transformers(path, tokenizer)
    elif found is None or found.file is None or set(found.tables) != {"embedding"}:
        raise ValueError("must be the folder of a model, or the weights of WordLlama")
    else:
        text, options = _wordllama(path, tokenizer)
    if table is None:
        (table,) = load_tables(path, mmap=mmap).values()
        if table.row_weights is not None:
            # A row for each token, whose means have the library's bits.
            table = table.apply_row_weights()
    return table, text, options


def _model2vec(folder: Path, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    config = json_of(folder, "config.json")
    if type(config) is not dict:
        raise ValueError("config.json: must be an object")
    text = _tokenizer(folder, tokenizer)
    text.no_truncation()
    max_length = config.get("max_length", MAX_LENGTH)
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"config.json: max_length must be a number from 1 on or null, got {brief(max_length)}")
    normalize = config.get("normalize", False)
    if type(normalize) is not bool:
        raise ValueError(f"config.json: normalize must be true or false, got {brief(normalize)}")
    most = None if max_length is None else max(max_length * tokenizers.median_length(text), 1)
    rules = {"normalize": normalize, "max_length": max_length, "max_characters": most, "drop_unknown": True}
    return text, RULES | rules


def _sentence_transformers(folder: Path, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    place, normalize = "", False
    if (folder / MODULES).is_file():
        modules = modules_of(folder)
        kinds = [kind for kind, _ in modules]
        if kinds[:1] != [MODULE] or kinds[1:] not in ([], ["Normalize"]):
            raise ValueError(
                f"{MODULES}: must name a {MODULE}, and a Normalize or nothing after it, got {brief(kinds)}"
            )
        place, normalize = modules[0][1], len(kinds) > 1
    name = "config_sentence_transformers.json"
    if (folder / name).is_file():
        config = json_of(folder, name)
        for key in ("default_prompt_name", "truncate_dim"):
            if type(config) is not dict or config.get(key) is not None:
                raise ValueError(f"{name}: must be an object without {key}, which TextEmbedder does not know")
    text = _tokenizer(folder, tokenizer, f"{place}/{TOKENIZER}" if place else TOKENIZER)
    return text, RULES | {"normalize": normalize}


def _wordllama(path: Path, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Of a package or a cache: ``weights/NAME_DIM.safetensors`` and ``tokenizers/NAME_tokenizer_config.json``."""
    own = path.parent.parent / "tokenizers" / f"{path.stem.rpartition('_')[0]}_tokenizer_config.json"
    text = tokenizers.read(own) if tokenizer is None and own.is_file() else _tokenizer(path.parent, tokenizer)
    text.no_truncation()
    return text, RULES | {"invalid": "clip"}


def _tokenizer(folder: Path, given: Any, name: str = TOKENIZER) -> Any:
    """The tokenizer that is given, also as a file, or the one in the folder."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return tokenizers.copied(given)
    return tokenizers.read(inside(folder, name) if given is None else as_path(given))
