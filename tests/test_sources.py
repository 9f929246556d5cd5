"""Rows of floats from files, arrays, tables and iterables: each block, each sample, each refusal."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from qembag.formats import sources
from qembag.formats.safetensors_file import header_bytes
from qembag.formats.sources import float_tensors, open_source, read_rows

NUM_ROWS, DIM = 37, 6
KINDS = ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    """Exact in each type of floats."""
    return rng.integers(-100, 100, size=(NUM_ROWS, DIM)).astype(np.float32) / 4


def bits_of(weights: np.ndarray) -> np.ndarray:
    """The weights as bfloat16, which holds them exactly."""
    return (np.asarray(weights, np.float32).view(np.uint32) >> 16).astype("<u2")


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    entries = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    path.write_bytes(header_bytes(entries, {}) + b"".join(array.tobytes() for _, array in tensors.values()))
    return path


def rows_of(source: sources.Source, *arguments: Any) -> np.ndarray:
    """All that its blocks hold, each taken before the next is asked for."""
    blocks = [np.array(block, np.float32) for block in source.blocks(*arguments)]
    return np.concatenate(blocks) if blocks else np.empty((0, source.dim), np.float32)


def every_source(weights: np.ndarray, folder: Path) -> dict[str, Any]:
    """What `open_source` takes, and the type of its elements, by a name."""
    made: dict[str, Any] = {}
    for kind in KINDS:
        for order in "CF":
            path = folder / f"{kind[1:]}{'little' if kind[0] == '<' else 'big'}{order}.npy"
            np.save(path, np.asarray(weights, kind, order=order))
            made[path.stem] = path
    for name, kind in (("F16", "<f2"), ("F32", "<f4"), ("F64", "<f8")):
        others = {"head": ("U8", np.arange(3, dtype=np.uint8)), "list": ("F32", np.ones(5, "<f4"))}
        tensors = {"table": (name, weights.astype(kind)), **others}
        made[name] = write_safetensors(folder / f"{name}.safetensors", tensors)
    made["BF16"] = write_safetensors(folder / "BF16.safetensors", {"table": ("BF16", bits_of(weights))})
    (folder / "all.index.json").write_text(json.dumps({"weight_map": {"table": "BF16.safetensors"}}))
    made["index"] = folder / "all.index.json"
    made["array"] = weights
    made["array at strides"] = np.repeat(weights, 2, axis=1)[:, ::2]
    made["array of float64"] = weights.astype(np.float64)
    made["mapped"] = np.load(folder / "f4littleC.npy", mmap_mode="r")
    made["FloatTable"] = qembag.FloatTable(weights.astype(np.float16))
    made["FloatTable of bfloat16"] = qembag.FloatTable(bits_of(weights).astype(np.uint16), dtype="bfloat16")
    return made


@pytest.fixture
def made(weights: np.ndarray, tmp_path: Path) -> dict[str, Any]:
    return every_source(weights, tmp_path)


@pytest.mark.parametrize("max_rows", [1, 5, 36, 37, 1000, None])
def test_every_source_gives_its_rows_in_blocks(made, weights, max_rows):
    for name, given in made.items():
        source = open_source(given)
        assert (source.num_rows, source.dim, source.name) == (NUM_ROWS, DIM, "table"), name
        for start in (0, 1, 36, 37):
            assert np.array_equal(rows_of(source, start, max_rows), weights[start:]), (name, start)
        longest = max(len(block) for block in source.blocks(0, max_rows))
        assert longest == min(max_rows or NUM_ROWS, NUM_ROWS), name


def test_blocks_are_of_bounded_size(made, weights, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    for name, given in made.items():
        source = open_source(given)
        assert all(len(block) * source.row_nbytes <= 100 for block in source.blocks()), name
        assert np.array_equal(rows_of(source), weights), name


@pytest.mark.parametrize("numbers", [[], [0], [36], [0, 1, 2, 7, 8, 36], range(NUM_ROWS)])
def test_a_sample_of_rows_is_read(made, weights, numbers, monkeypatch):
    for size in (30, sources.BLOCK_BYTES):
        monkeypatch.setattr(sources, "BLOCK_BYTES", size)
        for name, given in made.items():
            sample = read_rows(open_source(given), np.array(numbers, np.int64))
            assert sample.dtype == np.float32, name
            assert np.array_equal(sample, weights[list(numbers)]), name


def test_an_iterable_has_no_sample(weights):
    with pytest.raises(TypeError, match=r"^source must be an array or a file for a sample of its rows"):
        read_rows(open_source([weights]), np.array([0]))


def test_a_sample_of_a_file_is_not_the_whole_file(weights, tmp_path):
    """The file is all holes: reading it would take long."""
    path = tmp_path / "large.npy"
    header = np.lib.format.header_data_from_array_1_0(weights)
    rows = (1 << 40) // weights[0].nbytes
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, DIM)})
        try:
            file.truncate(file.tell() + rows * weights[0].nbytes)
        except OSError:
            pytest.skip("this file system has no files of 1 TiB")
    assert not read_rows(open_source(path), np.array([5, rows - 1])).any()


def test_float_tensors_lists_tables_alone(made, tmp_path):
    assert float_tensors(made["F16"]) == {"table": ("float16", (NUM_ROWS, DIM))}
    assert float_tensors(str(made["index"])) == {"table": ("bfloat16", (NUM_ROWS, DIM))}
    assert float_tensors(made["f8bigF"]) == {"f8bigF": ("float64", (NUM_ROWS, DIM))}


def test_sources_say_how_their_floats_are_stored(made):
    kinds = {name: open_source(given).dtype for name, given in made.items()}
    assert kinds["BF16"] == kinds["index"] == kinds["FloatTable of bfloat16"] == "bfloat16"
    assert kinds["f2bigC"] == kinds["F16"] == kinds["FloatTable"] == "float16"
    assert kinds["mapped"] == "float32"
    assert kinds["F64"] == kinds["array of float64"] == "float64"


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_is_read(weights, tmp_path, version):
    with open(tmp_path / "table.npy", "wb") as file:
        np.lib.format.write_array(file, weights, version=version)
    assert np.array_equal(rows_of(open_source(tmp_path / "table.npy")), weights)


def test_pruned_rows_are_zeros(weights):
    table = qembag.FloatTable(weights).prune([0, 3])
    expected = np.zeros_like(weights)
    expected[[0, 3]] = weights[[0, 3]]
    assert np.array_equal(rows_of(open_source(table)), expected)


def test_bfloat16_of_another_package_is_taken(weights, same_bits):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source = open_source(weights.astype(ml_dtypes.bfloat16))
    assert source.dtype == "bfloat16"
    same_bits(read_rows(source, np.arange(NUM_ROWS)), weights)


# ---- Iterables -------------------------------------------------------------------------------------------------------


def test_an_iterable_gives_rows_at_any_borders(weights):
    borders = [0, 0, 1, 1, 20, 36, 37, 37]
    pieces = [weights[a:b] for a, b in itertools.pairwise(borders)]
    for start in (0, 1, 2, 30, 37, 50):
        for max_rows in (1, 7, 1000):
            source = open_source(iter(pieces))
            assert (source.num_rows, source.dim) == (None, DIM)
            assert np.array_equal(rows_of(source, start, max_rows), weights[start:])


@pytest.mark.parametrize(
    ("block", "error", "text"),
    [
        (
            np.ones((2, 5), "f4"),
            ValueError,
            r"source's block 1 must have 2 dimensions \(rows, dim\) and a dim of 6, got",
        ),
        (np.ones((0, 5), "f4"), ValueError, "source's block 1 must have 2 dimensions"),
        (np.ones(6, "f4"), ValueError, "source's block 1 must have 2 dimensions"),
        (np.ones((2, 6), int), TypeError, "source's block 1 must be an array of float32, float16, float64 or bfloat16"),
        (None, TypeError, "source's block 1 must be an array, got None"),
        ("a", TypeError, "source's block 1 must be an array of float32"),
    ],
)
def test_a_block_that_is_none_is_refused(weights, block, error, text):
    source = open_source([weights, block])
    assert not source.refused
    with pytest.raises(error, match=f"^{text}"):
        rows_of(source)
    assert source.refused


def test_an_error_of_an_iterable_passes_through(weights):
    def broken():
        yield weights
        raise ValueError("of the caller's own")

    source = open_source(broken())
    with pytest.raises(ValueError, match=r"^of the caller's own$"):
        rows_of(source)
    assert not source.refused


def test_an_iterable_is_run_through_once(weights):
    source = open_source([weights])
    rows_of(source)
    with pytest.raises(ValueError, match=r"^source must be an iterable that was not run through yet"):
        rows_of(source)


# ---- What is no source -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ([], ValueError, "source must give at least one block of rows"),
        (np.ones(3, "f4"), ValueError, "source must have 2 dimensions"),
        (np.ones((3, 0), "f4"), ValueError, "source must have 2 dimensions"),
        (np.ones((3, 2), int), TypeError, "source must be an array of float32"),
        (np.ma.ones((3, 2)), TypeError, "source must be an array without a mask"),
        (5, TypeError, "source must be a path, a 2-D array of floats or an iterable of such arrays, got int 5"),
        (None, TypeError, "source must be a path"),
        (b"a.npy", TypeError, "source must be a path"),
        ({"a": 1}, TypeError, "source must be a path"),
        ("a.bin", ValueError, "source must be a .npy, a .safetensors or an .index.json file, got a.bin"),
    ],
)
def test_what_is_no_source_is_refused(source, error, text):
    with pytest.raises(error, match=f"^{text}"):
        open_source(source)


def test_a_file_that_is_not_there_is_an_oserror(tmp_path):
    for name in ("a.npy", "a.safetensors", "a.index.json"):
        with pytest.raises(FileNotFoundError):
            open_source(tmp_path / name)


def test_an_array_has_no_tensors(weights):
    with pytest.raises(ValueError, match=r"^tensor must be None for a source that is no file"):
        open_source(weights, "a")


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


HEADER = "{{'descr': {0!r}, 'fortran_order': False, 'shape': {1}}}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a readable .npy file"),
        (b"PK\x03\x04" * 9, "not a readable .npy file"),
        (npy("{"), "not a readable .npy file"),
        (npy("[" * 5000), "not a readable .npy file"),
        (npy("{'descr': '<f4', 'shape': (1, 1)}"), "not a readable .npy file"),
        (npy(HEADER.format("<f4", "(1, 1)"), version=4), "not a readable .npy file: ValueError: its version is"),
        (npy(HEADER.format("<f4", "(2, 2)"), bytes(15)), r"is too short for its float32 array of shape \(2, 2\): 8"),
        (npy(HEADER.format("<f4", f"({10**30}, {10**30})")), "is too short"),
        (npy(HEADER.format("<f4", "(-1, 4)"), bytes(16)), "must have 2 dimensions"),
        (npy(HEADER.format("<f4", "(4,)"), bytes(16)), "must have 2 dimensions"),
        (npy(HEADER.format("<f4", "(4, 0)"), bytes(16)), "must have 2 dimensions"),
        (npy(HEADER.format("<i4", "(2, 2)"), bytes(16)), "must hold float16, float32 or float64, got int32"),
        (npy(HEADER.format("|O", "(2, 2)"), bytes(32)), "must hold float16, float32 or float64, got object"),
        (npy(HEADER.format("<c8", "(2, 2)"), bytes(32)), "must hold float16, float32 or float64, got complex64"),
    ],
)
def test_what_is_no_npy_of_floats_is_refused_by_name(tmp_path, content, text):
    path = tmp_path / "table.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_which_tensor_must_be_said(weights, tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", {"x": ("F32", weights), "y": ("F32", weights[:2])})
    assert open_source(path, "y").num_rows == 2
    with pytest.raises(ValueError, match="must hold one 2-D tensor of floats where none is named; there are: 'x', 'y'"):
        open_source(path)
    with pytest.raises(ValueError, match="there is no 2-D tensor of floats 'z'; there are: 'x', 'y'"):
        open_source(path, "z")
    path = write_safetensors(tmp_path / "b.safetensors", {"x": ("U8", np.ones((2, 2), np.uint8))})
    with pytest.raises(ValueError, match="where none is named; there is none"):
        open_source(path)


def test_an_index_that_names_what_its_shard_has_not_is_refused(made, tmp_path):
    (tmp_path / "b.index.json").write_text(json.dumps({"weight_map": {"other": "BF16.safetensors"}}))
    with pytest.raises(ValueError, match=r"names tensor 'other' of BF16.safetensors, which has none"):
        open_source(tmp_path / "b.index.json")


# ---- Files that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f4littleC", "F32", "BF16"])
def test_a_file_that_was_changed_since_is_found(made, name):
    source = open_source(made[name])
    os.utime(made[name], ns=(1, 1))
    with pytest.raises(OSError, match="was changed while it was being read"):
        next(source.blocks())
    with pytest.raises(OSError, match="was changed while it was being read"):
        read_rows(source, np.array([0]))


def test_a_file_that_is_cut_while_it_is_read_is_an_oserror(made):
    blocks = open_source(made["f4littleC"]).blocks(0, 1)
    next(blocks)
    os.truncate(made["f4littleC"], 200)
    with pytest.raises(OSError, match="was cut short while it was being read"):
        for _ in blocks:
            pass


def test_reading_ahead_leaves_no_thread_and_no_open_file(made):
    before = threading.active_count()
    blocks = open_source(made["f4littleC"]).blocks(0, 1)
    next(blocks)
    assert threading.active_count() == before + 1
    blocks.close()
    assert threading.active_count() == before


# ---- Pruned tables in files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_pruned_table_in_a_file_has_its_logical_rows(weights, tmp_path, dtype):
    pruned = qembag.FloatTable(weights.astype(dtype)).prune([3, 5, 6, 36])
    pruned.save(tmp_path / "pruned.safetensors")
    assert float_tensors(tmp_path / "pruned.safetensors")["table"][1] == (NUM_ROWS, DIM)
    source = open_source(tmp_path / "pruned.safetensors")
    assert (source.num_rows, source.dim) == (NUM_ROWS, DIM)
    for max_rows in (None, 1, 5):
        assert np.array_equal(rows_of(source, 2, max_rows), pruned.dequantize()[2:])
    assert np.array_equal(read_rows(source, np.array([0, 5, 36])), pruned.dequantize([0, 5, 36]))


def test_a_mapping_may_be_in_any_order(weights, tmp_path):
    mapping = np.array([4, -1, 0, 4, 36], np.int32)
    table = qembag.FloatTable(weights, compressed_indices_mapping=mapping)
    table.save(tmp_path / "a.safetensors")
    assert np.array_equal(rows_of(open_source(tmp_path / "a.safetensors")), table.dequantize())


def test_a_mapping_that_lies_is_refused(weights, tmp_path):
    name = "a.compressed_indices_mapping"
    for dtype, mapping, text in [
        ("I32", np.int32([0, 99]), "99"),
        ("I32", np.int32([[0]]), "I32 of 1"),
        ("U8", b"a", "I32 of 1"),
    ]:
        array = np.frombuffer(mapping, np.uint8) if isinstance(mapping, bytes) else mapping.astype("<i4")
        tensors = {"a": ("F32", weights.astype("<f4")), name: (dtype, array)}
        with pytest.raises(ValueError, match=text):
            open_source(write_safetensors(tmp_path / "a.safetensors", tensors))
