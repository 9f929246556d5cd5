"""The zip archive that `torch.save` writes: where each record lies in the file.

Only what torch writes is read: records stored without compression, their sizes in the central directory at the end.
The rest of what a zip may be is refused. No number in the file is trusted.
"""

from __future__ import annotations

import zlib
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..formats.safetensors_file import brief
from .budget import ITEM, OBJECT, Budget, characters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from .foreign import Memory

# The records of the format, less their four bytes of signature.
_END = Struct("<4H2LH")
_LOCATOR = Struct("<LQL")
_END_64 = Struct("<Q2H2L4Q")
_ENTRY = Struct("<6H3L5H2L")
_LOCAL = Struct("<5H3L2H")
SIGNATURE = 4
END, LOCATOR, END_64, ENTRY, LOCAL = b"PK\5\6", b"PK\6\7", b"PK\6\6", b"PK\1\2", b"PK\3\4"
# What stands in a field of 16 or 32 bits if the number is in a field of the zip64 extension.
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF
ZIP64_EXTRA = 1
ENCRYPTED = 0x2041  # bits 0, 6 and 13
STORED = 0
PICKLE = "data.pkl"
# torch 2.13 writes 3, and reads up to 10.
VERSIONS = range(1, 11)

SAVE = "save a state dict: torch.save(model.state_dict(), path)"


class Record(NamedTuple):
    """Where a record's bytes lie in the file."""

    start: int
    nbytes: int


class _Entry(NamedTuple):
    """An entry of the central directory: where the record's own header lies."""

    header: int
    nbytes: int  # as stored
    crc: int
    is_plain: bool  # neither compressed nor encrypted


class Archive:
    """A file of `torch.save`: the directory of its records. A record's own header is read when it is asked for.

    Attributes
    ----------
    big_endian : bool
        Whether the writer's numbers are.

    Raises
    ------
    ValueError
        If it is none, or is damaged.
    """

    def __init__(self, memory: Memory, budget: Budget) -> None:
        self._raw = raw = memoryview(memory.bytes.data)
        _refuse_other_beginnings(raw)
        start, end, count = _directory(raw)
        self._entries = _entries(raw[:end], start, count, budget)
        self._limits = _limits(self._entries, start)
        # torch finds records whatever their case.
        self._folded = set(map(str.lower, self._entries))
        if len(self._folded) < len(self._entries):
            raise ValueError("must have records whose names differ otherwise than by case")
        _refuse_other_archives(self._entries)
        pickles = [name for name in self._entries if name.endswith("/" + PICKLE)]
        if len(pickles) != 1:
            many = ", ".join(map(brief, pickles[:3])) or "none"
            raise ValueError(f"is no file of torch.save: it must have one record {PICKLE} in a folder, got {many}")
        self._stem = pickles[0].removesuffix(PICKLE)
        self._check_version()
        self.big_endian = self._is_big_endian()

    def record(self, name: str) -> Record | None:
        """Where a record lies, or None if there is no such; names are without the folder that all have."""
        whole = self._stem + name
        entry = self._entries.get(whole)
        if entry is None and whole.lower() in self._folded:
            raise ValueError(f"must have record {brief(name)} in lower case, as torch.save writes it")
        return None if entry is None else self._record(whole, entry)

    def pickle(self) -> memoryview:
        """The bytes of the pickle, of which alone the checksum is checked: the others are not read here."""
        entry = self._entries[self._stem + PICKLE]
        record = self._record(self._stem + PICKLE, entry)
        data = self._raw[record.start : record.start + record.nbytes]
        # Without checksums torch writes 0.
        if entry.crc and zlib.crc32(data) != entry.crc:
            raise ValueError("is damaged: data.pkl does not have the CRC-32 that the archive gives")
        return data

    def _record(self, name: str, entry: _Entry) -> Record:
        if not entry.is_plain:
            raise ValueError(
                f"must be stored without compression or encryption, as torch.save does: record {brief(name)} is not"
            )
        _, flags, method, _, _, _, packed, nbytes, name_bytes, extra_bytes = _unpack(
            _LOCAL, LOCAL, self._raw, entry.header, f"header of record {brief(name)}"
        )
        begin = entry.header + SIGNATURE + _LOCAL.size
        start = begin + name_bytes + extra_bytes
        if start + entry.nbytes > self._limits[int(np.searchsorted(self._limits, entry.header, "right"))]:
            raise ValueError(f"is damaged: record {brief(name)} of {entry.nbytes} bytes overlaps what comes after it")
        own = bytes(self._raw[begin : begin + name_bytes])
        if own != name.encode() or method != STORED or flags & ENCRYPTED:
            raise ValueError(f"is damaged: record {brief(name)} has a header that differs from the directory")
        # 0 if a data descriptor follows the data, as torch has it.
        if any(size not in (0, FULL_32, entry.nbytes) for size in (packed, nbytes)):
            raise ValueError(f"is damaged: record {brief(name)} has another size in its header than in the directory")
        return Record(start, entry.nbytes)

    def _text(self, name: str) -> bytes | None:
        """A record of a few characters."""
        record = self.record(name)
        return None if record is None else bytes(self._raw[record.start : record.start + min(record.nbytes, 40)])

    def _check_version(self) -> None:
        for name in ("version", ".data/version"):
            version = self._text(name)
            if version is not None and (not version.strip().isdigit() or int(version) not in VERSIONS):
                raise ValueError(
                    f"must be of version {VERSIONS[0]} to {VERSIONS[-1]} of torch's format, got {version!r}"
                )

    def _is_big_endian(self) -> bool:
        # torch did not say so before 2.1, and wrote on little-endian hosts.
        order = self._text("byteorder")
        if order not in (None, b"little", b"big"):
            raise ValueError(f"must have the record byteorder say little or big, got {order!r}")
        return order == b"big"


def _refuse_other_beginnings(raw: memoryview) -> None:
    if len(raw) == 0:
        raise ValueError("is empty")
    beginning = bytes(raw[:4])
    if beginning == b"\x80\2\x8a\n" or bytes(raw[257:262]) == b"ustar":
        raise ValueError("is in torch's old format, from before 1.6, which is not read: load it in torch, and " + SAVE)
    if beginning[:1] == b"\x80":
        raise ValueError("is a pickle outside an archive, which is not read: load it where it is trusted, and " + SAVE)
    if beginning[:2] != b"PK":
        raise ValueError(f"is no file of torch.save: it must be a zip archive, got one that begins {beginning!r}")


# ---- The central directory -------------------------------------------------------------------------------------------


def _unpack(layout: Struct, signature: bytes, raw: memoryview, at: int, what: str) -> tuple[int, ...]:
    begin, end = at + SIGNATURE, at + SIGNATURE + layout.size
    if at < 0 or end > len(raw) or bytes(raw[at:begin]) != signature:
        raise ValueError(f"is cut short, or no zip archive: it has no {what} at byte {at}")
    return layout.unpack(raw[begin:end])


def _directory(raw: memoryview) -> tuple[int, int, int]:
    """Where the central directory begins and ends, and how many entries it has."""
    at = len(raw) - _END.size - SIGNATURE
    disk, first_disk, here, count, nbytes, start, comment = _unpack(_END, END, raw, at, "end record")
    end, disks = at, 1
    locator = at - _LOCATOR.size - SIGNATURE
    if locator >= 0 and bytes(raw[locator : locator + SIGNATURE]) == LOCATOR:
        _, end, disks = _unpack(_LOCATOR, LOCATOR, raw, locator, "zip64 locator")
        if end + _END_64.size + SIGNATURE != locator:
            # Two archives one after the other look so: which one is meant?
            raise ValueError(f"is damaged: the zip64 end record must be before byte {locator}, got byte {end}")
        _, _, _, disk, first_disk, here, count, nbytes, start = _unpack(_END_64, END_64, raw, end, "zip64 end record")
    if disk or first_disk or here != count or disks != 1:
        raise ValueError("must be an archive in one file, got one of several disks")
    if comment:
        raise ValueError("is cut short, or no archive of torch's: it has a comment")
    if start + nbytes != end:
        raise ValueError(
            f"is damaged: the directory of the archive takes bytes {start} to {start + nbytes}, and must end at {end}"
        )
    return start, end, count


def _entries(raw: memoryview, at: int, count: int, budget: Budget) -> dict[str, _Entry]:
    """The entries of the directory, from `at` to the end of `raw`, by name."""
    entries: dict[str, _Entry] = {}
    while at < len(raw):
        begin = at + SIGNATURE + _ENTRY.size
        fields = _unpack(_ENTRY, ENTRY, raw, at, "entry of the directory")
        flags, method, crc, packed, nbytes, name_bytes, extra_bytes, comment_bytes, disk = (*fields[2:4], *fields[6:13])
        extra = begin + name_bytes
        at = extra + extra_bytes + comment_bytes
        if at > len(raw):
            raise ValueError(f"is damaged: an entry of its directory goes on to byte {at}, the directory to {len(raw)}")
        values = [nbytes, packed, fields[15]]
        if FULL_32 in values:
            values = _from_zip64(raw[extra : extra + extra_bytes], values)
        nbytes, packed, header = values
        if disk not in (0, FULL_16):
            raise ValueError("must be an archive in one file, got one of several disks")
        name = bytes(raw[begin:extra])
        budget.spend(ITEM + 3 * OBJECT + characters(name))
        text = _text_of(name)
        if text in entries:
            raise ValueError(f"must have each name once, got {brief(text)} twice")
        entries[text] = _Entry(header, packed, crc, method == STORED and nbytes == packed and not flags & ENCRYPTED)
    if len(entries) != count:
        raise ValueError(f"is damaged: its directory has {len(entries)} entries, and says {count}")
    return entries


def _limits(entries: dict[str, _Entry], end: int) -> NDArray[np.int64]:
    """Where headers of records begin, in order, and the directory after them. Raises ValueError if records overlap."""
    if any(max(entry.header, entry.nbytes) >= end for entry in entries.values()):
        raise ValueError("is damaged: a record lies beyond the archive's directory")
    headers = np.fromiter((entry.header for entry in entries.values()), np.int64, len(entries))
    sizes = np.fromiter((entry.nbytes for entry in entries.values()), np.int64, len(entries))
    order = np.argsort(headers)
    limits = np.append(headers[order], end)
    if np.any(limits[:-1] + sizes[order] + SIGNATURE + _LOCAL.size > limits[1:]):
        raise ValueError("is damaged: records overlap")
    return limits


def _from_zip64(extra: memoryview, values: list[int]) -> list[int]:
    """The values, those that are full replaced by numbers of the zip64 field, in their order."""
    while len(extra) >= 4:
        kind, nbytes = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        field, extra = extra[4 : 4 + nbytes], extra[4 + nbytes :]
        if kind == ZIP64_EXTRA and len(field) == nbytes >= 8 * values.count(FULL_32):
            numbers = iter(range(0, nbytes, 8))
            return [
                int.from_bytes(field[(at := next(numbers)) : at + 8], "little") if value == FULL_32 else value
                for value in values
            ]
    raise ValueError("is damaged: an entry of its directory lacks the zip64 field that it needs")


def _text_of(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"must have names in UTF-8, got {brief(name)}") from None


# ---- What kind of archive it is --------------------------------------------------------------------------------------


def _refuse_other_archives(names: Iterable[str]) -> None:
    """Raise if it is an archive of a known kind that is not torch.save's, and say what to do."""
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise ValueError("is a TorchScript archive, which is not read: load it with torch.jit.load, and " + SAVE)
    if "archive_format" in inside or any(name.startswith("data/weights/") for name in inside):
        raise ValueError(
            "is an archive of torch.export, which is not read: load it with torch.export.load, "
            "and torch.save(program.state_dict, path)"
        )
    if any(name.endswith(".npy") for name in names):
        raise ValueError("is a .npz archive of NumPy: save its arrays one by one, with numpy.save")
