"""Collections that are opened once a process, however many copies of a scorer or replicas it holds."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..collection import EmbeddingBagCollection
from ..formats.safetensors_file import read_index
from ..formats.saving import INDEX_SUFFIX, as_path
from ..formats.table_file import samples_of

if TYPE_CHECKING:
    from collections.abc import Mapping


class Stamp(NamedTuple):
    """What tells a version of a file from another that took its name."""

    changed_ns: int
    nbytes: int
    inode: int
    """For files of one size that were given one time, as archives and copying tools do."""


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
    return Stamp(found.st_mtime_ns, found.st_size, found.st_ino)


# Collections that a process keeps without a holder. A worker may live for months, and each version of the tables has a
# name of its own: the last used stay.
MOST_OPEN = 16

# What tells a file's content from another's: its size, so many bytes of its head, and samples.
HEAD = 1 << 16


def check_of(path: str) -> str:
    """A hash of a file's size and of samples of it: the same for copies on other hosts, whenever those were made.

    Of a folder, which a model of another library's may be: of its files. Of an index: of itself and the files it names.
    """
    found = hashlib.blake2b(digest_size=16)
    for name in _files_of(path):
        with open(name, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            found.update(nbytes.to_bytes(8, "little") + file.read(HEAD))
            for start, length in samples_of(0, nbytes):
                file.seek(start)
                found.update(file.read(length))
    return found.hexdigest()


def _files_of(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(entry.path for entry in os.scandir(path) if entry.is_file())
    if path.endswith(INDEX_SUFFIX):
        return [path, *sorted({str(file) for file in read_index(Path(path)).values()})]
    return [path]


def opened(wanted: Opening) -> tuple[EmbeddingBagCollection, Stamp]:
    """The collection, mapped, and the version of the file that it is of.

    Opened anew where the file has changed. Whoever holds the collection of an earlier version keeps that.
    """
    key = wanted.key()
    if not _can_be_a_key(key):  # for an argument is wrong, which the collection names
        return EmbeddingBagCollection.from_file(wanted.path, wanted.features, **wanted.options), stamp_of(wanted.path)
    with _lock:
        stamp = stamp_of(wanted.path)
        found = _opened.pop(key, None)  # to the end, as the last used
        if found is None or found[1] != stamp:
            collection = EmbeddingBagCollection.from_file(wanted.path, wanted.features, **wanted.options)
            if stamp_of(wanted.path) != stamp:
                raise OSError(f"{wanted.path}: was changed while it was opened")
            found = collection, stamp
        _opened[key] = found
        while len(_opened) > MOST_OPEN:
            del _opened[next(iter(_opened))]
        return found


def opened_as(wanted: Opening, check: str | None) -> tuple[EmbeddingBagCollection, str]:
    """The collection, and the hash of the file that it is of. That must be `check`, where it is given."""
    stamp, own = stamp_of(wanted.path), check_of(wanted.path)
    if check is not None and own != check:
        raise ValueError(
            f"{wanted.path} must be the file that this Scorer was made with, got another: give each version of the "
            "tables a name of its own"
        )
    collection, found = opened(wanted)
    if found != stamp:  # or the hash would be that of another file
        raise OSError(f"{wanted.path}: was changed while it was opened")
    return collection, own


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
