"""The archive of a file of torch.save: what is read, and each thing that is refused with a sentence."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qembag.interop.budget import Budget
from qembag.interop.foreign import Memory
from qembag.interop.torch_zip import Archive, Record
from support.torch_files import Entry, archive_of, entries_of, pickled

PICKLE = pickled({"a": 1})
DATA = bytes(range(100))
Open = Callable[..., Archive]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    def open_it(raw: bytes, budget: int = 10**6) -> Archive:
        path = tmp_path / "a.pt"
        path.write_bytes(raw)
        return Archive(Memory(path), Budget("its directory", budget))

    return open_it


def whole(**options: object) -> bytes:
    return archive_of(entries_of(PICKLE, {"0": DATA}), **options)


@pytest.mark.parametrize("zip64", [True, False])
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
def test_records_are_found_where_they_lie(opened, zip64, descriptors, checksums):
    raw = whole(zip64=zip64, descriptors=descriptors, checksums=checksums)
    archive = opened(raw)
    record = archive.record("data/0")
    assert record == Record(raw.index(DATA), 100)
    assert record.start % 64 == 0
    assert bytes(archive.pickle()) == PICKLE
    assert archive.record("data/1") is None
    assert archive.record("../archive/data/0") is None


@pytest.mark.parametrize("stem", ["archive", "my.model.v2", "a/b/c", "größe", " "])
def test_the_folder_of_the_records_may_have_any_name(opened, stem):
    archive = opened(archive_of(entries_of(PICKLE, {"0": DATA}, stem=stem)))
    assert archive.record("data/0").nbytes == 100


def test_what_the_standard_library_writes_is_read(opened):
    """Someone may have repacked the file: without alignment, with folders and more files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/", b"")
        archive.writestr("model/data/", b"")
        archive.writestr("model/data.pkl", PICKLE)
        archive.writestr("model/data/0", DATA)
        archive.writestr("readme", b"hello")
    found = opened(file.getvalue())
    assert found.record("data/0").start == file.getvalue().index(DATA)
    assert not found.big_endian


def test_numbers_of_64_bits_are_read_from_their_field(opened):
    entries = entries_of(PICKLE, {"0": DATA})
    raw = archive_of(entries)
    at = raw.index(b"PK\3\4", raw.index(b"data/0") - 40)
    full = {"size": 2**32 - 1, "packed": 2**32 - 1, "header": 2**32 - 1}
    numbers = b"".join(number.to_bytes(8, "little") for number in (100, 100, at))
    other = b"\x99\x99\2\0ab"
    entries[4] = entries[4]._replace(central=full, extra=other + b"\1\0\x18\0" + numbers)
    assert opened(archive_of(entries)).record("data/0").nbytes == 100
    for extra in (b"", other, b"\1\0\x10\0" + numbers[:16], b"\1\0\x18\0" + numbers[:20], b"\1\0\x18"):
        entries[4] = entries[4]._replace(extra=extra)
        with pytest.raises(ValueError, match="lacks the zip64 field"):
            opened(archive_of(entries))


@pytest.mark.parametrize(("order", "big_endian"), [(b"little", False), (b"big", True), (None, False)])
def test_the_byte_order_is_the_writers(opened, order, big_endian):
    assert opened(archive_of(entries_of(PICKLE, {}, byteorder=order))).big_endian is big_endian


def test_an_unknown_byte_order_or_version_is_refused(opened):
    for order in (b"BIG", b"", b"little\n", b"x" * 10_000):
        with pytest.raises(ValueError, match="must have the record byteorder say little or big"):
            opened(archive_of(entries_of(PICKLE, {}, byteorder=order)))
    for version, is_right in (
        (b"1", True),
        (b"10\n", True),
        (b"11", False),
        (b"0", False),
        (b"-1", False),
        (b"", False),
    ):
        entries = [entry for entry in entries_of(PICKLE, {}) if not entry.name.endswith(b"version")]
        raw = archive_of([*entries, Entry(b"archive/version", version)])
        if is_right:
            opened(raw)
        else:
            with pytest.raises(ValueError, match="must be of version 1 to 10"):
                opened(raw)


# ---- Other files -------------------------------------------------------------------------------------------------------


def zipped(*names: str, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in names:
            archive.writestr(name, b"x" * 1000)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(3))
    return file.getvalue()


OTHERS = {
    "nothing": (b"", "is empty"),
    "a pickle": (pickled({}), "is a pickle outside an archive"),
    "torch before 1.6": (
        b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        r"torch's old format.*torch.save\(model.state_dict",
    ),
    "torch's first": (tar(), "torch's old format"),
    "a text": (b"hello, this is no archive", "must be a zip archive, got one that begins b'hell'"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}" + b" " * 14, "must be a zip archive"),
    "TorchScript": (zipped("s/data.pkl", "s/code/m.py", "s/constants.pkl"), "TorchScript.*torch.jit.load"),
    "torch.export": (zipped("m/archive_format", "m/models/model.json"), "torch.export.load"),
    "NumPy": (npz(), "npz.*numpy.save"),
    "a document": (zipped("word/document.xml"), "must have one record data.pkl in a folder, got none"),
    "no folder": (zipped("data.pkl"), "got none"),
    "two pickles": (zipped("a/data.pkl", "b/data.pkl"), "got 'a/data.pkl', 'b/data.pkl'"),
    "compressed": (zipped("a/data.pkl"), "must be stored without compression or encryption"),
    "no entry": (zipped(), "got none|must have"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_kinds_are_refused_by_name(opened, kind):
    raw, words = OTHERS[kind]
    with pytest.raises(ValueError, match=words) as caught:
        opened(raw).pickle()
    assert type(caught.value) is ValueError


# ---- Damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 4, 21, 22, 500, -1, -22, -42, -98])
def test_a_file_that_is_cut_short_is_refused(opened, kept):
    with pytest.raises(ValueError, match=r"cut short|no file of torch.save|is damaged"):
        opened(whole()[:kept])


@pytest.mark.parametrize("more", [b"\0", b"PK", b"x" * 100, b"PK\5\6" + bytes(17)])
def test_a_file_that_goes_on_is_refused(opened, more):
    with pytest.raises(ValueError, match=r"cut short|directory"):
        opened(whole() + more)
    with pytest.raises(ValueError, match=r"begins|directory|zip64 end record"):
        opened(more + whole())


@pytest.mark.parametrize("zip64", [True, False])
@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"disk": 1}, "one file"),
        ({"first": 1}, "one file"),
        ({"here": 3}, "one file"),
        ({"count": 2, "here": 2}, "its directory has 7 entries, and says 2"),
        ({"count": 60_000, "here": 60_000}, "its directory has 7 entries, and says 60000"),
        ({"start": 0}, "must end at"),
        ({"bytes": 2**31}, "must end at"),
        ({"bytes": 0}, "must end at"),
    ],
)
def test_an_end_record_that_lies_is_refused(opened, zip64, end, words):
    with pytest.raises(ValueError, match=words):
        opened(whole(zip64=zip64, **end))


def test_a_zip64_record_that_lies_is_refused(opened):
    for end in ({"at": 2**64 - 1}, {"at": 0}, {"start": 2**64 - 1}, {"bytes": 2**64 - 1}):
        with pytest.raises(ValueError, match=r"zip64 end record|must end at"):
            opened(whole(**end))
    with pytest.raises(ValueError, match=r"zip64 end record must be before byte"):
        opened(whole() + whole())
    with pytest.raises(ValueError, match="one file"):
        opened(whole(disks=2))


def test_a_comment_is_refused(opened):
    raw = bytearray(whole(zip64=False))
    raw[-2] = 1
    with pytest.raises(ValueError, match="comment"):
        opened(bytes(raw))


LIES = {
    "compressed": ({"method": 8}, {}, "without compression or encryption"),
    "encrypted": ({"flags": 1}, {}, "without compression or encryption"),
    "encrypted strongly": ({"flags": 0x40}, {}, "without compression or encryption"),
    "two sizes": ({"size": 99}, {}, "without compression or encryption"),
    "too long": ({"size": 5000, "packed": 5000}, {}, "overlap|beyond"),
    "one byte too long for its place": ({"size": 200, "packed": 200}, {}, "overlap"),
    "longer than the file": ({"size": 2**31, "packed": 2**31}, {}, "beyond"),
    "before all others": ({"header": 0}, {}, "overlap"),
    "beyond the end": ({"header": 2**31}, {}, "beyond"),
    "no header there": ({"header": 1}, {}, "overlap|has no header"),
    "another disk": ({"disk": 1}, {}, "one file"),
    "a name beyond the directory": ({"name": 60_000}, {}, "goes on"),
    "a comment beyond the directory": ({"comment": 60_000}, {}, "goes on|entry of the directory"),
    "another name in its header": ({}, {"name": 3}, "differs"),
    "data beyond its place": ({}, {"extra": 60_000}, "overlaps what comes after"),
    "compressed in its header": ({}, {"method": 8}, "differs"),
    "encrypted in its header": ({}, {"flags": 1}, "differs"),
    "another size in its header": ({}, {"packed": 99, "size": 99}, "another size"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(opened, lie):
    central, local, words = LIES[lie]
    entries = entries_of(PICKLE, {"0": DATA})
    entries[4] = entries[4]._replace(central=central, local=local)
    with pytest.raises(ValueError, match=words) as caught:
        opened(archive_of(entries)).record("data/0")
    assert type(caught.value) is ValueError


def test_names_twice_and_names_that_are_no_text_are_refused(opened):
    entries = entries_of(PICKLE, {"0": DATA})
    with pytest.raises(ValueError, match=re.escape("must have each name once, got 'archive/data/0' twice")):
        opened(archive_of([*entries, entries[4]]))
    with pytest.raises(ValueError, match="UTF-8"):
        opened(archive_of([*entries, Entry(b"archive/\xff", b"")]))


def test_names_in_another_case_are_refused(opened):
    """PyTorch would find the record: the byte order of numbers depends on it."""
    entries = entries_of(PICKLE, {"0": DATA}, stem="My.Model", byteorder=b"big")
    assert opened(archive_of(entries)).big_endian
    other = [entry._replace(name=entry.name.replace(b"byteorder", b"byteordEr")) for entry in entries]
    with pytest.raises(ValueError, match=re.escape("must have record 'byteorder' in lower case")):
        opened(archive_of(other))
    with pytest.raises(ValueError, match="names differ otherwise than by case"):
        opened(archive_of([*entries, Entry(b"My.Model/VERSION", b"3")]))
    other = [entry._replace(name=entry.name.replace(b"data/0", b"DATA/0")) for entry in entries]
    with pytest.raises(ValueError, match=re.escape("must have record 'data/0' in lower case")):
        opened(archive_of(other)).record("data/0")


def test_a_pickle_with_another_checksum_is_refused(opened):
    raw = bytearray(whole())
    raw[raw.index(PICKLE) + 5] ^= 1
    with pytest.raises(ValueError, match="CRC-32"):
        opened(bytes(raw)).pickle()
    raw = bytearray(whole(checksums=False))
    raw[raw.index(PICKLE) + 5] ^= 1
    assert bytes(opened(bytes(raw)).pickle()) != PICKLE


def test_a_directory_takes_no_more_memory_than_it_may(opened):
    entries = [*entries_of(PICKLE, {}), *(Entry(b"archive/%d" % number, b"") for number in range(2000))]
    raw = archive_of(entries, descriptors=False)
    assert opened(raw).record("1999") is not None
    with pytest.raises(ValueError, match="its directory must not need more than 100000 bytes of memory"):
        opened(raw, 10**5)
