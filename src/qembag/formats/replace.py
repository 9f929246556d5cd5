"""A file that is there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

# What a file system says that cannot flush a folder.
CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write to, which takes the place of `path` when all is written and flushed to disk.

    Until then it lies in the same folder under another name (``.NAME.TOKEN.tmp``). After an error, that one is gone and
    what was at `path` is still there. After a crash the old file is there or the new one, whole; the other name may be
    left. The new file gets the permissions of the old one, or those of any new file. A link is followed.

    Raises
    ------
    OSError
        That names `path`, if the file cannot be made, written or renamed, or if `path` is no regular file.
    """
    target = Path(os.path.realpath(path))
    # Of a long name the beginning: 20 characters are at most 80 bytes of the 255 that a name may have.
    temporary = target.with_name(f".{target.name[:20]}.{os.urandom(8).hex()}.tmp")
    try:
        mode = mode_of(target)
        # Where the old file has permissions of its own, nobody else reads the new one before it has them.
        with open(temporary, "x+b", opener=None if mode is None else _open_for_us) as file:
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
            flush(file)
        os.replace(temporary, target)
        flush_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary), temporary):
            raise _named(error, path) from error
        raise


def _open_for_us(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def mode_of(target: Path) -> int | None:
    """The permissions of the file that is there."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "must be a regular file, to be replaced", str(target))
    return stat.S_IMODE(mode)


def _named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The error, naming the file that was asked for."""
    text = error.strerror
    if os.name == "nt" and isinstance(error, PermissionError):
        text = f"{text} (on Windows no file is replaced while it is mapped or open)"
    return OSError(error.errno, text, os.fspath(path))


def flush(file: IO[bytes]) -> None:
    """Have it on disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have its names on disk, where the system has a way to say so."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
