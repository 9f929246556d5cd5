"""Collections that are opened once a process, however many copies of a scorer or replicas it holds."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..collection import EmbeddingBagCollection
from ..formats.saving import as_path

if TYPE_CHECKING:
    from collections.abc import Mapping


class Stamp(NamedTuple):
    """What tells a version of a file from another that took its name."""

    changed_ns: int
    nbytes: int


class Opening(NamedTuple):
    """What to open, and how: what `EmbeddingBagCollection.from_file` takes."""

    path: str
    """Absolute."""
    features: Mapping[str, str] | None
    options: Mapping[str, Any]

    def key(self) -> tuple[Any, ...]:
        return (self.path, _frozen(self.features), _frozen(self.options))


def opening(path: str | os.PathLike[str], features: Mapping[str, str] | None, options: Mapping[str, Any]) -> Opening:
    return Opening(os.path.abspath(as_path(path)), features, options)


def stamp_of(path: str) -> Stamp:
    found = Path(path).stat()
    return Stamp(found.st_mtime_ns, found.st_size)


# What tells a file's content from another's: its size, its head, and this many pieces of this many bytes.
HEAD, NUM_PIECES, PIECE = 1 << 16, 16, 4096


def check_of(path: str) -> str:
    """A hash of a file's size and of samples of it: the same for copies on other hosts, whenever those were made.

    Of a folder, which a model of another library's may be: of its files.
    """
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(entry.path for entry in os.scandir(path) if entry.is_file()) if os.path.isdir(path) else [path]:
        with open(name, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            found.update(nbytes.to_bytes(8, "little") + file.read(HEAD))
            for number in range(NUM_PIECES):
                file.seek(max(0, nbytes - PIECE) * (number + 1) // NUM_PIECES)
                found.update(file.read(PIECE))
    return found.hexdigest()


def opened(wanted: Opening) -> tuple[EmbeddingBagCollection, Stamp]:
    """The collection, mapped, and the version of the file that it is of.

    Opened anew where the file has changed. Whoever holds the collection of an earlier version keeps that.
    """
    key = wanted.key()
    if not _can_be_a_key(key):  # for an argument is wrong, which the collection names
        return EmbeddingBagCollection.from_file(wanted.path, wanted.features, **wanted.options), stamp_of(wanted.path)
    with _lock:
        stamp = stamp_of(wanted.path)
        if key not in _opened or _opened[key][1] != stamp:
            collection = EmbeddingBagCollection.from_file(wanted.path, wanted.features, **wanted.options)
            if stamp_of(wanted.path) != stamp:
                raise OSError(f"{wanted.path}: was changed while it was opened")
            _opened[key] = collection, stamp
        return _opened[key]


def let_go(wanted: Opening) -> None:
    """For a process that will not ask for it again: whoever holds the collection keeps it, this module does not."""
    with _lock:
        _opened.pop(wanted.key(), None)


_opened: dict[tuple[Any, ...], tuple[EmbeddingBagCollection, Stamp]] = {}
_lock = threading.Lock()


def _new_lock() -> None:
    """A child's: another thread of its parent may hold the lock for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def _can_be_a_key(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _frozen(value: Any) -> Any:
    """As a key: the order of features is that of columns."""
    if hasattr(value, "items"):
        return tuple((key, _frozen(own)) for key, own in value.items())
    if isinstance(value, list):
        return tuple(value)
    return type(value), value  # for True is 1
