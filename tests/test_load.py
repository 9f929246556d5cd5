"""load_tables: which file is which, names, arguments, memory and pickles. Each kind of file has tests of its own."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

import qembag
from conftest import child_environment
from support.static_text import safetensors, write_model2vec

LITTLE = sys.byteorder == "little"
RNG = np.random.default_rng(20261127)
ROWS = RNG.normal(size=(50, 6)).astype(np.float32)


def write(path, tensors, metadata=None):
    path.write_bytes(safetensors(tensors, metadata=metadata))
    return path


# ---- Which file it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["<f4", "<f2", ">f4", ">f2"])
def test_an_array_file_is_a_table_of_its_stem(tmp_path, kind):
    np.save(tmp_path / "words.npy", ROWS.astype(kind))
    for mmap in (True, False):
        ((name, table),) = qembag.load_tables(tmp_path / "words.npy", mmap=mmap).items()
        assert (name, table.dtype) == ("words", np.dtype(kind).newbyteorder("=").name)
        np.testing.assert_array_equal(table.data, ROWS.astype(kind))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.asfortranarray(ROWS), "must hold rows of float32 or float16, got float32, column by column"),
        (ROWS.astype(np.float64), "must hold rows of float32 or float16, got float64"),
        (ROWS.astype(np.int32), "must hold float16, float32 or float64, got int32"),
        (ROWS[0], "must have 2 dimensions"),
    ],
    ids=["by columns", "float64", "int32", "1-D"],
)
def test_an_array_that_is_no_table_is_refused(tmp_path, array, text):
    path = tmp_path / "words.npy"
    np.save(path, array)
    with pytest.raises(ValueError, match=text) as caught:
        qembag.load_tables(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_parameters_lose_their_suffix(tmp_path):
    tensors = {"a.weight": ROWS, "b.weight": ROWS[:2], "b": ROWS[:3], "weight": ROWS[:4], "c.bias": ROWS[:5]}
    path = write(tmp_path / "m.safetensors", tensors)
    found = {name: len(table) for name, table in qembag.load_tables(path).items()}
    assert found == {"a": 50, "b.weight": 2, "b": 3, "weight": 4, "c.bias": 5}


def test_files_of_ours_keep_their_names(tmp_path):
    tables = {"a.weight": qembag.quantize(ROWS, bits=4), "b.weight": ROWS}
    qembag.save_tables(tmp_path / "m.safetensors", tables)
    qembag.save_tables(tmp_path / "m.index.json", tables)
    for name in ("m.safetensors", "m.index.json"):
        assert list(qembag.load_tables(tmp_path / name)) == ["a.weight", "b.weight"]


@pytest.mark.parametrize("content", [b"x", b"12345678", b"\x93NUMPX", b"<html>" * 9, bytes(300), b"[1, 2]", b"{}"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is none of the files that load_tables knows") as caught:
        qembag.load_tables(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'file'))}: is empty$"):
        qembag.load_tables(tmp_path / "file")


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors", ".gguf", ".bin", ""])
def test_content_tells_whatever_the_suffix(tmp_path, suffix):
    array, tables = tmp_path / f"array{suffix}", tmp_path / f"tables{suffix}"
    with array.open("wb") as file:
        np.save(file, ROWS)
    assert np.array_equal(qembag.load_tables(array)["array"].data, ROWS)
    qembag.save_tables(tables, {"t": qembag.quantize(ROWS, bits=4)})
    assert list(qembag.load_tables(tables)) == ["t"]


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        qembag.load_tables(tmp_path / "nothing")
    with pytest.raises(ValueError, match="folder"):
        qembag.load_tables(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a regular file or a folder"):
        qembag.load_tables(tmp_path / "pipe")


# ---- Arguments -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "m.safetensors", {"x.t1.weight": ROWS, "x.t2.weight": ROWS[:2], "y.t2.weight": ROWS[:3]})


@pytest.mark.parametrize(
    ("names", "found"),
    [("t1", ["x.t1"]), (["x.t1"], ["x.t1"]), ("t2", ["x.t2", "y.t2"]), (("y.t2", "t1"), ["x.t1", "y.t2"])],
)
def test_names_are_whole_or_the_last_part(model, names, found):
    assert list(qembag.load_tables(model, names=names)) == found


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        (
            {"names": "t3"},
            ValueError,
            r"names must name tables of .*m\.safetensors: 'x\.t1', 'x\.t2', 'y\.t2'; got 't3'",
        ),
        ({"names": []}, ValueError, "names must have at least one"),
        ({"names": [1]}, TypeError, "names must be a str or a list of str"),
        ({"names": {"t1"}}, TypeError, "names must be a str or a list of str"),
        ({"bits": 3}, ValueError, "bits must be 8, 4, 2, 16 or 32, got 3"),
        ({"bits": {"t1": 64}}, ValueError, r"bits\['t1'\] must be 8, 4, 2, 16 or 32, got 64"),
        ({"bits": {"t3": 8}}, ValueError, "bits must name tables of"),
        ({"bits": {1: 8}}, TypeError, "bits must be a dict by name, got a key of int"),
        ({"bits": "8"}, TypeError, "bits must be"),
        ({"dims": 0}, ValueError, "dims must be 1 or more, got 0"),
        ({"dims": {"t1": -1}}, ValueError, r"dims\['t1'\] must be 1 or more, got -1"),
        ({"dims": 1.5}, TypeError, "dims must be"),
        ({"dims": {"t1": True}}, TypeError, r"dims\['t1'\] must be"),
        ({"format": "gguf"}, ValueError, "format must be what the file is, qembag, got gguf"),
        ({"format": "pt"}, ValueError, "format must be one of qembag, torch, model2vec"),
        ({"format": 1}, ValueError, "format must be one of"),
        ({"mmap": 2}, (TypeError, ValueError), "mmap must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_by_name(model, more, error, text):
    with pytest.raises(error, match=text):
        qembag.load_tables(model, **more)


def test_what_a_file_says_itself_may_be_given_for_tables_that_are_not_wanted(model):
    assert list(qembag.load_tables(model, names="t1", dims={"t2": 8})) == ["x.t1"]


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["npy", "model2vec", "safetensors"])
def mapped_file(request, tmp_path):
    if request.param == "model2vec":
        write_model2vec(tmp_path / "model", embeddings=ROWS)
        return tmp_path / "model"
    if request.param == "safetensors":
        return write(tmp_path / "m.safetensors", {"x.weight": ROWS})
    np.save(tmp_path / "words.npy", ROWS)
    return tmp_path / "words.npy"


def test_a_mapped_table_is_a_view_and_pickles_as_its_path(mapped_file):
    ((name, table),) = qembag.load_tables(mapped_file).items()
    if LITTLE:
        with pytest.raises(ValueError, match="read-only"):
            table.data[0, 0] = 1
        assert len(pickle.dumps(table)) < 1000 < table.nbytes
    again = pickle.loads(pickle.dumps({name: table, "again": table}))
    assert again[name] is again["again"]
    np.testing.assert_array_equal(again[name].data, ROWS)


def test_a_table_in_memory_of_its_own_can_be_written(mapped_file):
    (table,) = qembag.load_tables(mapped_file, mmap=False).values()
    table.data[0, 0] = 7
    (again,) = qembag.load_tables(mapped_file).values()
    np.testing.assert_array_equal(again.data, ROWS)
    assert len(pickle.dumps(table)) > table.nbytes


def test_tables_of_a_file_pickle_with_the_file_once(tmp_path):
    tensors = {f"t{number}.weight": ROWS for number in range(100)}
    (tmp_path / "m").mkdir()
    write(tmp_path / "m" / "model.safetensors", tensors)
    tables = qembag.load_tables(tmp_path / "m" / "model.safetensors")
    assert pickle.dumps(tables).count(b"model.safetensors") == 1


@pytest.mark.skipif(not LITTLE, reason="tables are not mapped here")
@pytest.mark.parametrize("change", ["rows", "length"])
def test_a_pickle_of_a_file_that_changed_is_refused(tmp_path, change):
    write_model2vec(tmp_path / "model", embeddings=ROWS)
    file = tmp_path / "model" / "model.safetensors"
    kept = pickle.dumps(qembag.load_tables(tmp_path / "model"))
    other = ROWS + 1 if change == "rows" else ROWS[:-1]
    file.unlink()  # a mapped file is not written over
    write_model2vec(tmp_path / "model", embeddings=other)
    with pytest.raises(ValueError, match="model: changed since its tables were pickled"):
        pickle.loads(kept)


@pytest.mark.skipif(not LITTLE, reason="tables are not mapped here")
def test_a_pickle_of_a_table_that_is_no_longer_in_the_file_is_refused(tmp_path):
    """The hash is of a few places: another name may stand between them."""
    np.save(tmp_path / "words.npy", ROWS)
    (table,) = qembag.load_tables(tmp_path / "words.npy").values()
    function, (file, _) = table.__reduce__()
    with pytest.raises(ValueError, match=r"words\.npy: changed since its tables were pickled: it has no table 'other'"):
        function(file, "other")


def test_loading_needs_no_other_library(mapped_file):
    program = f"""
import sys, qembag
assert not any(name.startswith("qembag.interop") for name in sys.modules)
qembag.load_tables({str(mapped_file)!r})
heavy = {{"torch", "gguf", "safetensors", "model2vec"}} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-W", "error", "-c", program]
    ended = subprocess.run(command, env=child_environment(), timeout=120, check=False)
    assert ended.returncode == 0
