"""Collections from the files that `load_tables` reads, ours and other libraries'."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import _arguments
from ..formats.collections import Saved, check_tables, saved_in
from ..formats.saving import as_path
from .load import errors_name, loaded, open_foreign, wanted_of

if TYPE_CHECKING:
    from ..collection import EmbeddingBagCollection, EmbeddingCollection

Collection = TypeVar("Collection", bound="EmbeddingBagCollection | EmbeddingCollection")

NOTHING = Saved(None, {})


def open_collection(
    kind: type[Collection],
    path: str | os.PathLike[str],
    features: Mapping[str, str] | None,
    options: Mapping[str, Any],
    names: str | list[str] | tuple[str, ...] | None,
    mmap: bool,
) -> Collection:
    """A collection of this class, of the tables of a file. `options` are the class's; None leaves one to the file."""
    whole = Path(os.path.abspath(as_path(path)))
    mapped = _arguments.flag(mmap, "mmap")
    found = open_foreign(whole, None, wanted_of(None, None, names))
    tables = loaded(found, whole, mapped=mapped)
    saved = NOTHING
    if found.collection is not None:
        with errors_name(whole):
            saved = saved_in(found.collection)
            if names is not None:
                there = {name: feature for name, feature in saved.features.items() if feature.table in tables}
                saved = saved._replace(features=there)
            check_tables(saved, tables)
    if features is None and saved.features:
        features = {name: feature.table for name, feature in saved.features.items()}
    chosen = {name: name for name in tables} if features is None else features
    return kind(tables, features, **_merged(options, saved, chosen))


def _merged(options: Mapping[str, Any], saved: Saved, features: object) -> dict[str, Any]:
    """The caller's options, and the file's for features and tables that are its own."""
    chosen = dict(features) if isinstance(features, Mapping) else {}
    own = {name: feature for name, feature in saved.features.items() if chosen.get(name) == feature.table}
    merged: dict[str, Any] = {"dtype": saved.dtype if options["dtype"] is None else options["dtype"]}
    for option in ("mode", "padding_idx", "invalid"):
        if option not in options:
            continue
        given = options[option]
        if given is None or isinstance(given, Mapping):
            of_file = {name: getattr(feature, option) for name, feature in own.items()}
            # A feature that was saved without pooling has no mode.
            merged[option] = {name: value for name, value in of_file.items() if value is not None} | dict(given or {})
        else:
            merged[option] = given
    return merged
