"""Headers and indices of safetensors files: what is read, and each thing that is refused, by its words."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from qembag.formats import safetensors_file
from qembag.formats.safetensors_file import DTYPES, header_bytes, read_header, read_index

PATH = Path("some.safetensors")


def file_of(header: str | bytes | dict[str, Any], data: int | bytes = b"", length: int | None = None) -> io.BytesIO:
    """With the entry of a tensor of one byte for each @ in a text."""
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.replace("@", json.dumps(entry(0, 1))) if isinstance(text, str) else text
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    data = bytes(data) if isinstance(data, int) else data
    return io.BytesIO((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(file: io.BytesIO) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (each test looks at the words)
        read_header(file, PATH)
    assert type(caught.value) is ValueError
    text = str(caught.value)
    assert text.startswith(f"{PATH}: ")
    assert len(text) < 500
    return text.removeprefix(f"{PATH}: ")


# ---- What is read ----------------------------------------------------------------------------------------------------


def test_tensors_come_in_the_order_of_their_data_whatever_that_of_their_names():
    header = {"b": entry(4, 6), "empty": entry(4, 4, [0, 7]), "a": entry(0, 4, [2, 2]), "__metadata__": {"k": "v"}}
    file = file_of(header, 6)
    found = read_header(file, PATH)
    start = len(file.getvalue()) - 6
    assert found.metadata == {"k": "v"}
    assert found.data_start == start
    assert list(found.tensors.values()) == [
        ("a", "U8", (2, 2), start, 4),
        ("empty", "U8", (0, 7), start + 4, 0),
        ("b", "U8", (2,), start + 4, 2),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_takes_its_bits(dtype):
    size = DTYPES[dtype]
    assert read_header(file_of({"a": entry(0, size, [2, 4], dtype)}, size), PATH).tensors["a"].nbytes == size
    assert "takes" in refusal(file_of({"a": entry(0, size + 1, [2, 4], dtype)}, size + 1))


def test_the_librarys_dtypes_are_known():
    safetensors = pytest.importorskip("safetensors")
    with pytest.raises(safetensors.SafetensorError, match="expected one of") as caught:
        safetensors.deserialize(file_of({"a": entry(0, 1, [1], "X")}, 1).getvalue())
    theirs = str(caught.value).partition("expected one of")[2].partition(" at line")[0]
    assert set(theirs.replace("`", "").replace(",", " ").split()) <= set(DTYPES)


@pytest.mark.parametrize("space", [" ", "   ", "\n", "\t\r\n "])
def test_space_behind_the_header_is_taken_as_the_library_takes_it(space):
    assert list(read_header(file_of(json.dumps({"a": entry(0, 1)}) + space, 1), PATH).tensors) == ["a"]


def test_a_file_without_tensors_is_one():
    assert read_header(file_of("{}"), PATH) == ({}, {}, 10)


def test_escapes_of_whole_characters_are_read():
    assert list(read_header(file_of('{"\\ud83d\\ude00\\n":@}', 1), PATH).tensors) == ["😀\n"]


@pytest.mark.parametrize("size", [0, 64, 65, 1000])
def test_a_header_that_is_written_is_read_and_data_begin_at_a_multiple_of_64(size):
    tensors = [("ä", "F32", (3, 5)), ("b", "U8", (0, 9)), ("c", "F4", (4,)), ("d", "I32", ())]
    raw = header_bytes(tensors, {"note": "ü"}, size)
    assert len(raw) % 64 == 0
    assert len(raw) >= size
    found = read_header(io.BytesIO(raw + bytes(60 + 2 + 4)), PATH)
    assert found.data_start == len(raw)
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found.tensors.values()] == tensors
    assert found.metadata == {"note": "ü"}


def test_no_header_is_written_that_nobody_may_read(monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 1000)
    assert len(header_bytes([], {"a": "b" * 900})) == 960
    with pytest.raises(ValueError, match="tables must have a header of at most 1000 bytes, got one of"):
        header_bytes([], {"a": "b" * 1000})


# ---- What is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[io.BytesIO, str]] = {
    "nothing": (io.BytesIO(), "too short"),
    "7 bytes": (io.BytesIO(b"\2" + bytes(6)), "too short"),
    "long header": (file_of("{}", length=100_000_001), "has a header of 100000001 bytes: at most 100000000"),
    "endless header": (file_of("{}", length=2**64 - 1), "has a header of 18446744073709551615 bytes"),
    "header beyond the file": (file_of("{}", length=3), "is cut short: the header takes 3 bytes of 10"),
    "no header": (file_of(""), "must begin with '{', got b''"),
    "another file": (io.BytesIO(b"\x93NUMPY\1\0v\0{'descr': '<f4'}"), "is no safetensors file"),
    "space before": (file_of(' {"a":@}', 1), "must begin with '{', got b' '"),
    "byte order mark": (file_of('\ufeff{"a":@}', 1), "must begin with '{'"),
    "array": (file_of("[]"), "must begin with '{'"),
    "no JSON": (file_of('{"a":}'), "the header is not JSON: Expecting value"),
    "more behind": (file_of('{"a":@}x', 1), "the header is not JSON: Extra data"),
    "zeros behind": (file_of('{"a":@}\0', 1), "the header is not JSON: Extra data"),
    "raw control character": (file_of('{"a\n":@}', 1), "the header is not JSON: Invalid control character"),
    "no UTF-8": (file_of(b'{"a\xff":1}'), "the header is not UTF-8 at byte 3"),
    "surrogate in UTF-8": (file_of('{"\ud800":@}', 1), "the header is not UTF-8"),
    "escaped surrogate": (file_of('{"\\ud800":@}', 1), "lone surrogate"),
    "surrogate in metadata": (file_of('{"__metadata__":{"a":"\\udc00"}}'), "lone surrogate"),
    "two tensors of a name": (file_of('{"a":@,"a":@}', 1), "the header has the name 'a' twice"),
    "two names by an escape": (file_of('{"a":@,"\\u0061":@}', 1), "the header has the name 'a' twice"),
    "metadata twice": (file_of('{"__metadata__":{},"__metadata__":{}}'), "has the name '__metadata__' twice"),
    "two texts of a name": (file_of('{"__metadata__":{"k":"a","k":"b"}}'), "the header has the name 'k' twice"),
    "two dtypes": (file_of('{"a":{"dtype":"U8","dtype":"U8"}}'), "the header has the name 'dtype' twice"),
    "metadata of numbers": (file_of({"__metadata__": {"k": 1}}), "__metadata__ must have strings only, got 1 for 'k'"),
    "no metadata": (file_of({"__metadata__": None}), "__metadata__ must be an object of strings, got None"),
    "metadata of a tensor": (file_of({"__metadata__": entry(0, 1)}, 1), "__metadata__ must have strings only"),
    "deep arrays": (file_of('{"a":' + "[" * 200_000), "the header nests too deeply"),
    "deep objects": (file_of('{"a":' * 100_000), "the header nests too deeply"),
    "entry of a list": (file_of({"a": ["U8", [1], [0, 1]]}, 1), "tensor 'a' must have dtype, shape and data_offsets"),
    "entry with more": (file_of({"a": {**entry(0, 1), "z": 1}}, 1), "tensor 'a' must have dtype, shape and data_off"),
    "entry with less": (file_of({"a": {"dtype": "U8", "shape": [1]}}, 1), "tensor 'a' must have dtype, shape and"),
    "large entry": (file_of({"a": [list(range(10**4))] * 50}), "tensor 'a' must have dtype, shape and data_offsets"),
    "unknown dtype": (file_of({"a": entry(0, 1, [1], "U9")}, 1), "tensor 'a' has an unknown dtype: 'U9'"),
    "dtype of a list": (file_of({"a": {**entry(0, 1), "dtype": ["U8"]}}, 1), "tensor 'a' has an unknown dtype"),
    "within a byte": (file_of({"a": entry(0, 2, [3], "F4")}, 2), "tensor 'a' ends within a byte: [3] of F4 are 12 bit"),
    "shape of a float": (
        file_of('{"a":{"shape":[1.0]}}'),
        "has the number 1.0: must be a whole number from 0 to 2**63",
    ),
    "shape of an exponent": (file_of('{"a":{"shape":[1e3]}}'), "the header has the number 1e3"),
    "shape of a NaN": (file_of('{"a":{"shape":[NaN]}}'), "the header has the number NaN"),
    "negative shape": (file_of('{"a":{"shape":[-1]}}'), "the header has the number -1"),
    "negative zero": (file_of('{"a":{"shape":[-0]}}'), "the header has the number -0"),
    "large number": (file_of({"a": entry(0, 0, [0, 2**63])}), "the header has the number 9223372036854775808"),
    "huge number": (file_of('{"a":{"shape":[%s]}}' % ("1" * 100_000)), "the header has the number 1111"),
    "leading zero": (file_of('{"a":{"shape":[01]}}'), "the header is not JSON"),
    "true": (file_of({"a": entry(0, 1, [True])}, 1), "must have a shape of at most 64 whole numbers, got [True]"),
    "no shape": (file_of({"a": {**entry(0, 1), "shape": None}}, 1), "must have a shape of at most 64 whole numbers"),
    "too many dimensions": (file_of({"a": entry(0, 1, [1] * 65)}, 1), "must have a shape of at most 64 whole numbers"),
    "three offsets": (file_of({"a": {**entry(0, 1), "data_offsets": [0, 1, 1]}}, 1), "data_offsets of two whole"),
    "product beyond 64 bits": (file_of({"a": entry(0, 0, [2**32, 2**32])}), "takes 18446744073709551616"),
    "product far beyond": (file_of({"a": entry(0, 0, [2**62] * 64)}), "takes a number of"),
    "short offsets": (file_of({"a": entry(0, 3, [4])}, 3), "has data_offsets of 3 bytes, and takes 4: [4] of U8"),
    "offsets backwards": (file_of({"a": entry(4, 0, [4])}, 4), "has data_offsets of -4 bytes, and takes 4"),
    "first gap": (file_of({"a": entry(1, 2)}, 2), "tensor 'a' leaves a gap after the header: it begins at 1"),
    "gap": (file_of({"a": entry(0, 2), "b": entry(3, 4)}, 4), "tensor 'b' leaves a gap after tensor 'a', which ends a"),
    "overlap": (file_of({"a": entry(0, 2), "b": entry(1, 3)}, 3), "tensor 'b' overlaps tensor 'a', which ends at 2"),
    "same place": (file_of({"a": entry(0, 2), "b": entry(0, 2)}, 2), "tensor 'b' overlaps tensor 'a'"),
    "empty within": (file_of({"a": entry(0, 2), "b": entry(1, 1)}, 2), "tensor 'b' overlaps tensor 'a'"),
    "short file": (file_of({"a": entry(0, 9)}, 8), "is cut short: header and tensors take 77 bytes, the file has 76"),
    "long file": (file_of({"a": entry(0, 8)}, 9), "goes on after its tensors: header and tensors take 76 bytes"),
    "data without tensors": (file_of("{}", 1), "goes on after its tensors"),
    "huge offsets": (file_of({"a": entry(2**62, 2**62 + 1)}, 1), "tensor 'a' leaves a gap after the header"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_forbids_is_refused(name):
    file, words = REFUSED[name]
    assert words in refusal(file)


@pytest.mark.parametrize("name", REFUSED)
def test_the_library_refuses_it_too_or_its_readme_does(name):
    safetensors = pytest.importorskip("safetensors")
    # The library takes the last of two equal names, fields that it does not know, fields without names; the README
    # forbids the first, has no others, and has the header begin with {. Dimensions beyond 64 no array has.
    lenient = {
        "space before", "two tensors of a name", "two names by an escape", "two texts of a name", "no metadata",
        "entry of a list", "entry with more", "too many dimensions", "large number",
    }  # fmt: skip
    raw = REFUSED[name][0].getvalue()
    if name in lenient:
        safetensors.deserialize(raw)
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(raw)


def test_a_header_that_shrinks_while_it_is_read_is_refused():
    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(size)[: 8 if size == 8 else 1]

    assert refusal(Shrinking(file_of({"a": entry(0, 1)}, 1).getvalue())) == "was cut short while it was read"


# ---- The index -------------------------------------------------------------------------------------------------------


def index(folder: Path, content: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_an_index_names_files_beside_it(tmp_path):
    names = {"a": "1.safetensors", "b": "sub/2.safetensors"}
    # Sizes are floats in some.
    path = index(tmp_path, {"metadata": {"total_size": 1.5e9}, "weight_map": names, "other": -1})
    assert read_index(path) == {name: tmp_path / file for name, file in names.items()}


OUTSIDE = [
    "../a.safetensors", "/etc/passwd", "a/../../b", "..", ".", "", "a//b", "./a", "C:/a", "a\\b", "..\\a", "a\0b",
    "file:a",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_no_file_outside_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="must name files in its own folder") as caught:
        read_index(index(tmp_path, {"weight_map": {"a": name}}))
    assert str(caught.value).startswith(str(tmp_path))


@pytest.fixture
def links(tmp_path):
    try:
        (tmp_path / "probe").symlink_to(tmp_path)
    except (OSError, NotImplementedError):
        pytest.skip("no links here")


@pytest.mark.usefixtures("links")
def test_an_index_leaves_its_folder_by_no_link(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").touch()
    (folder / "inside").touch()
    (folder / "good").symlink_to("inside")
    (folder / "bad").symlink_to("../outside")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    assert read_index(index(folder, {"weight_map": {"a": "good"}})) == {"a": folder / "good"}
    for name in ("bad", "up/outside"):
        with pytest.raises(ValueError, match=r"must name files in its own folder, got .*, a link to"):
            read_index(index(folder, {"weight_map": {"a": name}}))


@pytest.mark.usefixtures("links")
def test_the_links_of_hugging_faces_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    index(blobs, {"weight_map": {"a": "1.safetensors"}}).rename(blobs / "f00")
    path = snapshot / "model.safetensors.index.json"
    path.symlink_to("../../blobs/f00")
    (snapshot / "1.safetensors").symlink_to("../../blobs/ba5e")
    assert read_index(path) == {"a": snapshot / "1.safetensors"}
    (snapshot / "1.safetensors").unlink()
    (snapshot / "1.safetensors").symlink_to("../../refs")
    with pytest.raises(ValueError, match="a link to"):
        read_index(path)


INDICES = {
    "no JSON": (b"{", "is not JSON"),
    "no UTF-8": (b'"\xff"', "is not UTF-8 at byte 1"),
    "deep": (b"[" * 200_000, "nests too deeply"),
    "huge number": (b'{"metadata": %s}' % (b"1" * 10_000), "is not JSON"),
    "not a number": (b'{"metadata": NaN}', "has the number NaN"),
    "name twice": (b'{"weight_map": {"a": "b", "a": "b"}}', "has the name 'a' twice"),
    "surrogate": (b'{"weight_map": {"a": "\\ud800"}}', "lone surrogate"),
    "list": ([], "is no index: it must be an object with a weight_map"),
    "no weight_map": ({"a": {}}, "is no index"),
    "list of files": ({"weight_map": ["a"]}, "weight_map must be an object of strings"),
    "number of a file": ({"weight_map": {"a": 1}}, "weight_map must have strings only, got 1 for 'a'"),
    "metadata of a list": ({"weight_map": {}, "metadata": []}, r"metadata must be an object, got \[\]"),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_wrong_index_is_refused(tmp_path, name):
    content, words = INDICES[name]
    with pytest.raises(ValueError, match=words) as caught:
        read_index(index(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path))


def test_an_index_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 100)
    with pytest.raises(ValueError, match="is longer than 100 bytes"):
        read_index(index(tmp_path, {"weight_map": {"a": "b" * 100}}))


# ---- Both ways with the library --------------------------------------------------------------------------------------


def test_what_the_library_writes_is_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    kinds = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]
    arrays = {
        f"{kind} {shape}": np.ones(shape, kind) for kind in kinds for shape in ((), (0,), (3, 0), (3, 5), (2, 1, 4))
    }
    path = tmp_path / "theirs.safetensors"
    library.save_file(arrays, path, metadata={"ä": "ö"})
    with path.open("rb") as file:
        header = read_header(file, path)
    assert header.metadata == {"ä": "ö"}
    raw = path.read_bytes()
    for name, array in arrays.items():
        tensor = header.tensors[name]
        assert tensor.shape == array.shape
        assert raw[tensor.start : tensor.start + tensor.nbytes] == array.astype(array.dtype.newbyteorder("<")).tobytes()
    assert header.data_start + sum(array.nbytes for array in arrays.values()) == os.path.getsize(path)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["[],", '{"":0},', '"",'])
def test_a_header_that_would_take_much_more_memory_than_the_file_is_refused(tmp_path, part, monkeypatch):
    monkeypatch.setattr(safetensors_file, "FREE_BYTES", 1 << 20)
    inner = part * (2_000_000 // len(part)) if part != '"",' else part * 200_000
    text = f'{{"__metadata__":{{}},"a":[{inner[:-1]}]}}'.encode()
    path = tmp_path / "small.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"small\.safetensors: the header would take \d+ bytes of memory, in a file of"
    ):
        qembag.open_tables(path)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(text) + (2 << 20)
    tracemalloc.stop()
    (tmp_path / "small.index.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"small\.index\.json: would take \d+ bytes of memory"):
        qembag.open_tables(tmp_path / "small.index.json")


def test_many_tensors_are_no_attack(tmp_path):
    names = [f"model.layers.{number}.weight" for number in range(50_000)]
    entries = {name: {"dtype": "F32", "shape": [0, 8], "data_offsets": [0, 0]} for name in names}
    text = json.dumps(entries, separators=(",", ":")).encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert len(qembag.open_tables(path)) == len(names)
