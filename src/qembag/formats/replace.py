"""Writes a file whole, or not at all."""

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

# The errors of file systems that cannot flush a folder.
CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write to, which replaces `path` once everything is written and flushed to disk.

    Until then it has a temporary name in the same folder (``.NAME.TOKEN.tmp``). After an error the temporary file is
    removed, and `path` is as before. After a crash `path` is the old file or the whole new one; a temporary file may be
    left. The new file gets the permissions of the old one, or the default ones. A symbolic link is followed.

    Raises
    ------
    OSError
        Names `path`: if the file cannot be created, written or renamed, or if `path` is not a regular file.
    """
    target = Path(os.path.realpath(path))
    # 20 characters of the name are at most 80 of the 255 bytes that a name may have.
    temporary = target.with_name(f".{target.name[:20]}.{os.urandom(8).hex()}.tmp")
    try:
        mode = mode_of(target)
        # If there is an old file, nobody else can read the new one before it has the old one's permissions.
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
    """The permissions of the existing file, or None. Raises OSError if it is not a regular file."""
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
    """The error, with the path that the caller gave."""
    text = error.strerror
    if os.name == "nt" and isinstance(error, PermissionError):
        text = f"{text} (on Windows no file is replaced while it is mapped or open)"
    return OSError(error.errno, text, os.fspath(path))


def flush(file: IO[bytes]) -> None:
    """Flush the file to disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the folder's names to disk, if the system can."""
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
