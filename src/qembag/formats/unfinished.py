"""The file `PATH.part` that a table is written to until it is complete, with a journal to resume from.

Everything is at its final place except the header. In its place, a front of 16 bytes says where the journal is: after
the data if its size is known, else after the space reserved for the header. The journal is a length and a checksum, two
slots that are written in turn, and a JSON text that says what is being made from what. A slot is a number of rows that
are safely in the file, and a checksum; of two valid slots the larger number counts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows, where no process may rename or delete a file that is open
    HAS_LOCKS = False

from .replace import flush_folder, mode_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# Read as the length of a safetensors header, this is beyond the limit: no reader takes an unfinished file as complete.
MAGIC = b"qembag\xff\xff"
FRONT = struct.Struct("<8sQ")  # MAGIC, where the journal is
TEXT = struct.Struct("<QI4x")  # length and checksum of the JSON text
SLOT = struct.Struct("<QI4x")  # rows done, checksum
SLOTS = 2
# A crash loses about this much work at most.
SECONDS_BETWEEN_SLOTS = 1.0
# Small blocks of rows are gathered into writes of this size.
BUFFER_BYTES = 1 << 20

_sync = getattr(os, "fdatasync", os.fsync)


class Unfinished:
    """The open, locked `PATH.part`.

    Attributes
    ----------
    path : Path
        The path of the unfinished file.
    rows_done : int
        Rows that were written; some of them may still be in buffers.
    is_whole : bool
        Whether an earlier run wrote everything, and died before the file was renamed.
    is_spoiled : bool
        Whether this file can no longer become the result.
    """

    def __init__(self, target: Path) -> None:
        # A symbolic link is followed, as in `replacing`.
        self.target = Path(os.path.realpath(target))
        self.path = Path(f"{self.target}.part")
        mode_of(self.target)  # raises before the work if `target` cannot be replaced
        self.rows_done = 0
        self.is_whole = self.is_spoiled = self._is_final = False
        self._file = _opened_alone(self.path)
        self._slots_at = 0  # 0: there is no journal yet
        self._next_slot = 0
        self._check = 0  # checksum of the journal's text, which seeds that of its slots
        self._last_slot = time.monotonic()

    # ---- The journal ------------------------------------------------------------------------------------------------

    def begin(self, text: bytes, journal_at: int) -> None:
        """Make an empty file with a journal. `text` is a JSON object."""
        with self._writing():
            self._file.truncate(0)
            self._slots_at, self._check = journal_at + TEXT.size, _check_of(text)
            slots = b"".join(self._slot(0) for _ in range(SLOTS))
            self._put(journal_at, TEXT.pack(len(text), self._check) + slots + text)
            self._sync()
            # Last: if there is a front, there is a journal. It lies in one sector, so it is there whole or not at all.
            self._put(0, FRONT.pack(MAGIC, journal_at))

    def has_header(self, header: bytes) -> bool:
        """Whether the file begins with `header`, apart from its trailing spaces."""
        wanted = header.rstrip()
        self.is_whole = self._get(0, len(wanted)) == wanted
        return self.is_whole

    def resume(self, expected: bytes) -> bool:
        """Take `rows_done` from the journal. False if no run got as far as to write one.

        Raises
        ------
        ValueError
            If the journal is damaged, missing, or of another job.
        """
        front = self._get(0, FRONT.size)
        if not any(front):
            return False
        magic, journal_at = FRONT.unpack(front.ljust(FRONT.size))
        if magic != MAGIC or journal_at > self.size:
            raise self._no_journal()
        head = self._get(journal_at, journal_size(b""))
        if len(head) < journal_size(b""):
            raise self._no_journal()
        length, check = TEXT.unpack_from(head)
        text = self._get(journal_at + len(head), min(length, self.size))
        if len(text) != length or _check_of(text) != check:
            raise self._no_journal()
        begun, now = json.loads(text), json.loads(expected)
        for key in now | begun:
            if begun.get(key) != now.get(key):
                raise ValueError(
                    f"resume must go on with what {self.path} was begun with: {key} was {begun.get(key)!r}, "
                    f"got {now.get(key)!r}"
                )
        self._slots_at, self._check = journal_at + TEXT.size, check
        for number in range(SLOTS):
            slot = head[TEXT.size + number * SLOT.size :][: SLOT.size]
            rows, _ = SLOT.unpack(slot)
            # The next slot replaces the older one.
            if slot == self._slot(rows) and rows >= self.rows_done:
                self.rows_done, self._next_slot = rows, 1 - number
        return True

    def _no_journal(self) -> ValueError:
        return ValueError(
            f"resume must be False where {self.path} is no unfinished file that can go on: its journal is damaged or "
            "missing"
        )

    def _slot(self, rows: int) -> bytes:
        return SLOT.pack(rows, zlib.crc32(rows.to_bytes(8, "little"), self._check))

    def note(self, *, now: bool = False) -> None:
        """Write a slot for the rows that are done, if `now` or if a second has passed since the last slot.

        Flushing in a thread, while the next rows are made, was no faster.
        """
        if not self._slots_at or (not now and time.monotonic() - self._last_slot < SECONDS_BETWEEN_SLOTS):
            return
        with self._writing():
            # The rows must be on disk before the slot that counts them.
            self._sync()
            position = self._file.tell()
            self._put(self._slots_at + self._next_slot * SLOT.size, self._slot(self.rows_done))
            self._file.seek(position)
        self._next_slot = 1 - self._next_slot
        self._last_slot = time.monotonic()

    # ---- Data -------------------------------------------------------------------------------------------------------

    def write(self, position: int, data: Any) -> None:
        with self._writing():
            if self._file.tell() != position:
                self._file.seek(position)
            self._file.write(data)

    def read(self, position: int, count: int) -> bytes:
        with self._writing():
            self._file.flush()
        return self._get(position, count)

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _get(self, position: int, count: int) -> bytes:
        self._file.seek(position)
        return self._file.read(count)

    def _put(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        self._file.write(data)
        self._file.flush()

    def _sync(self) -> None:
        self._file.flush()
        _sync(self._file.fileno())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """After a failed write, the error names the file, and the file is spoiled."""
        try:
            yield
        except OSError as error:
            self.is_spoiled = True
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from error

    # ---- Ends -------------------------------------------------------------------------------------------------------

    def finish(self, header: bytes, data_end: int) -> None:
        """Write the header, and rename the file to `target`.

        Whenever the process dies, either the journal is readable or the header is complete except trailing spaces.
        """
        self.note(now=True)
        self._slots_at = 0  # no more slots: they would overwrite final bytes
        with self._writing():
            spaces = len(header.rstrip())
            self._put(FRONT.size, header[FRONT.size : spaces])
            self._sync()
            self._put(0, header[: FRONT.size])
            self._put(spaces, header[spaces:])
            self._file.truncate(data_end)
            mode = mode_of(self.target)
            if mode is not None:
                with contextlib.suppress(OSError):  # some file systems have no permissions
                    os.chmod(self.path, mode)
            os.fsync(self._file.fileno())
        # From here on nothing is removed: if renaming fails, as on Windows while the old file is mapped, the complete
        # file waits for `resume=True`.
        self._is_final = True
        if not HAS_LOCKS:
            self._file.close()
        os.replace(self.path, self.target)
        flush_folder(self.target.parent)

    def leave(self) -> None:
        """After an error or an interruption: keep the file if it can be resumed, else remove it."""
        if self._is_final:
            return
        is_useless = self.is_spoiled
        if not is_useless:
            # If this fails, the older slot counts.
            with contextlib.suppress(OSError):
                self.note(now=True)
                is_useless = self.size == 0
        if is_useless:
            if not HAS_LOCKS:
                self.close()
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def close(self) -> None:
        """Close the file, which releases the lock."""
        # No slot counts what is still in buffers; on a full disk it cannot be written.
        with contextlib.suppress(OSError):
            self._file.close()


def _check_of(text: bytes) -> int:
    """The checksum; not 0 for an empty text, so that zeros in a hole of the file are not a valid journal."""
    return zlib.crc32(MAGIC + text)


def journal_size(text: bytes) -> int:
    return TEXT.size + SLOTS * SLOT.size + len(text)


def _opened_alone(path: Path) -> BinaryIO:
    """The file, created if need be, with a lock that ends with the process."""
    while True:
        file = open(path, "r+b", buffering=BUFFER_BYTES, opener=_made)  # noqa: SIM115 (the caller closes it)
        try:
            if not HAS_LOCKS:
                return file
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have finished or removed it between our opening and our lock.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise BlockingIOError(error.errno, "another process is writing it", str(path)) from None
            return file  # some file systems have no locks
        except BaseException:
            file.close()
            raise
        file.close()


def _made(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)
