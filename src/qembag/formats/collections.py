"""Collections in files of tables: features and how they are looked up. The format is in `docs/format.md`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import _arguments
from .safetensors_file import brief, read_json
from .saving import as_path, checked_text, contents_of, save_contents
from .table_file import COLLECTION_KEY

if TYPE_CHECKING:
    import os
    from collections.abc import Container, Mapping

    from ..collection import EmbeddingBagCollection, EmbeddingCollection
    from ..float_table import FloatTable
    from ..table import QuantizedTable

DTYPES = ("float32", "float16", "bfloat16")
KEYS = {"dtype", "features"}
FEATURE_KEYS = {"name", "table", "mode", "padding_idx", "invalid"}


class Feature(NamedTuple):
    """A feature of a file; its mode is None if it was saved without pooling."""

    table: str
    mode: str | None
    padding_idx: int | None
    invalid: str


class Saved(NamedTuple):
    """What a file says of its collection."""

    dtype: str | None
    features: dict[str, Feature]


# ---- Saving ----------------------------------------------------------------------------------------------------------


def save(collection: EmbeddingBagCollection | EmbeddingCollection, path: str | os.PathLike[str]) -> None:
    """Save a collection's tables, features and options; see `save_tables`."""
    target, text = as_path(path), text_of(collection)
    save_contents(target, contents_of(collection.tables), {COLLECTION_KEY: text})


def text_of(collection: EmbeddingBagCollection | EmbeddingCollection) -> str:
    """The description of a collection: JSON."""
    modes: Mapping[str, str] = getattr(collection, "modes", {})
    padding: Mapping[str, int | None] = getattr(collection, "padding_idx", {})
    tables, invalid, dtype = collection.tables, collection.invalid, collection.dtype
    features = []
    for feature, table in collection.features.items():
        number = _arguments.padding_number(padding.get(feature), tables[table].num_embeddings)
        features.append(
            {
                "name": checked_text(feature, "names of features"),
                "table": table,
                "mode": modes.get(feature),
                "padding_idx": None if number < 0 else number,
                "invalid": invalid[feature],
            }
        )
    whole = {
        "dtype": None if dtype is None else DTYPES[_arguments.out_type(dtype, None).number],
        "features": features,
    }
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":"))


def kept(text: str | None, names: Container[str]) -> dict[str, str]:
    """The metadata for a file of these tables that is made of one with this description: none if it needs others."""
    tables = set() if text is None else {feature.table for feature in saved_in(text).features.values()}
    return {COLLECTION_KEY: text} if text is not None and all(table in names for table in tables) else {}


# ---- Reading ---------------------------------------------------------------------------------------------------------


def saved_in(text: str) -> Saved:
    """What a description says, checked but for the tables. Raises ValueError."""
    try:
        found = _saved(read_json(text))
    except ValueError as error:
        raise ValueError(f"{COLLECTION_KEY} {error}") from None
    return found


def _saved(found: Any) -> Saved:
    if type(found) is not dict or found.keys() != KEYS:
        raise ValueError(f"must be an object of {', '.join(sorted(KEYS))}, got {brief(found)}")
    dtype, listed = found["dtype"], found["features"]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"must have a dtype of {', '.join(DTYPES)} or null, got {brief(dtype)}")
    if type(listed) is not list or not listed:
        raise ValueError(f"must have a list of features, got {brief(listed)}")
    features: dict[str, Feature] = {}
    for entry in listed:
        name, feature = _feature(entry)
        if name in features:
            raise ValueError(f"must have each feature once, got {brief(name)} twice")
        features[name] = feature
    return Saved(dtype, features)


def _feature(entry: Any) -> tuple[str, Feature]:
    if type(entry) is not dict or entry.keys() != FEATURE_KEYS:
        raise ValueError(f"must have features of {', '.join(sorted(FEATURE_KEYS))}, got {brief(entry)}")
    name, table = entry["name"], entry["table"]
    if type(name) is not str or type(table) is not str:
        raise ValueError(f"must have a name and a table for each feature, got {brief(name)} and {brief(table)}")
    for key, allowed in (("mode", (*_arguments.MODES, None)), ("invalid", ("raise", "skip"))):
        if entry[key] not in allowed:
            shown = ", ".join("null" if value is None else value for value in allowed)
            raise ValueError(f"feature {brief(name)}: {key} must be one of {shown}, got {brief(entry[key])}")
    padding = entry["padding_idx"]
    if padding is not None and type(padding) is not int:  # True is an int for isinstance
        raise ValueError(f"feature {brief(name)}: padding_idx must be a whole number or null, got {brief(padding)}")
    return name, Feature(table, entry["mode"], padding, entry["invalid"])


def check_tables(saved: Saved, tables: Mapping[str, QuantizedTable | FloatTable]) -> None:
    """Raise ValueError unless each feature's table is there, with its padding index."""
    for name, feature in saved.features.items():
        if feature.table not in tables:
            raise ValueError(
                f"{COLLECTION_KEY} must name tables of the file, got {brief(feature.table)} for feature {brief(name)}"
            )
        rows = tables[feature.table].num_embeddings
        if feature.padding_idx is not None and feature.padding_idx >= rows:
            raise ValueError(
                f"{COLLECTION_KEY} feature {brief(name)}: padding_idx must be below {rows}, the rows of its table, "
                f"got {feature.padding_idx}"
            )
