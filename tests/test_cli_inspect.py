"""`qembag inspect`."""

from __future__ import annotations

import json

import numpy as np
import pytest

import qembag
from qembag.cli import contents
from support.commands import float_rows


def odd_rows() -> np.ndarray:
    """Rows 7 of zeros, 9 of one value, 20 far out."""
    rows = float_rows()
    rows[7], rows[9] = 0, 1.5
    rows[20] *= 1000
    return rows


def as_json(command, path, *options):
    return json.loads(command("inspect", path, "--json", *options))


def found(entry):
    return {reason: (some["rows"], some["first"]) for reason, some in entry["suspicious"].items()}


@pytest.fixture(params=[1, 1 << 20])
def at_once(request, monkeypatch):
    """Blocks of one row, and of all."""
    monkeypatch.setattr(contents, "AT_ONCE", request.param)


def test_quantized_tables(command, tmp_path, at_once):
    rows = odd_rows()
    table = qembag.quantize(rows, 4, scale_dtype="float32", scale_first=True, row_alignment=64)
    grouped = qembag.quantize(rows, 8, group_size=16)
    path = tmp_path / "a.safetensors"
    qembag.save_tables(path, {"plain": table, "grouped": grouped}, metadata={"from": "a test"})
    whole = as_json(command, path)
    assert whole["metadata"] == {"from": "a test"}
    assert whole["tensors"] == {}
    plain = whole["tables"]["plain"]
    assert plain["layout"] == {"bits": 4, "scale_dtype": "float32", "scale_first": True, "group_size": None}
    assert (plain["num_embeddings"], plain["num_rows"], plain["dim"]) == (300, 300, 32)
    assert (plain["row_bytes"], plain["bytes"]) == (64, table.nbytes)
    for name, one in (("plain", table), ("grouped", grouped)):
        scales = one.scales
        assert whole["tables"][name]["scales"] == {
            "min": scales.min(),
            "median": pytest.approx(np.median(scales)),
            "max": scales.max(),
            "zero": np.mean(scales == 0),
            "negative": 0,
        }
        assert found(whole["tables"][name])["zero"] == (1, [7])
        assert found(whole["tables"][name])["wide"] == (1, [20])
    assert found(whole["tables"]["grouped"])["constant"] == (1, [9])
    assert found(whole["tables"]["grouped"])["scale_zero"] == (2, [7, 9])


def test_scales_that_are_no_numbers_or_negative(command, tmp_path, at_once):
    table = qembag.quantize(float_rows(), 8)
    pairs = table.data[:, 32:].view("<f4")
    pairs[3, 0], pairs[4, 1], pairs[5, 0] = np.nan, np.inf, -1
    for row in range(10, 20):
        pairs[row, 0] = np.nan
    qembag.save_tables(tmp_path / "a.safetensors", table)
    entry = as_json(command, tmp_path / "a.safetensors")["tables"]["table"]
    assert found(entry) == {"not_finite": (12, [3, 4, 10, 11, 12])}
    assert entry["scales"]["negative"] == 1 / 300
    assert entry["scales"]["min"] == -1
    printed = command("inspect", tmp_path / "a.safetensors")
    assert "\n  table: 12 rows with a NaN or an infinity: 3, 4, 10, 11, 12, ...\n" in printed


def test_rows_of_a_pruned_table_have_their_logical_numbers(command, tmp_path, at_once):
    rows = odd_rows()
    for name, table in (("codes", qembag.quantize(rows, 2)), ("floats", qembag.FloatTable(rows))):
        path = tmp_path / f"{name}.safetensors"
        table.prune(np.arange(8, 300)).save(path, name="pruned")
        entry = as_json(command, path)["tables"]["pruned"]
        assert (entry["num_embeddings"], entry["num_rows"]) == (300, 292)
        assert found(entry)["wide"] == (1, [20])
        assert "zero" not in found(entry)
        assert as_json(command, path)["tensors"] == {}


def test_a_table_of_which_all_is_pruned(command, tmp_path):
    qembag.quantize(float_rows()).prune([]).save(tmp_path / "a.safetensors")
    entry = as_json(command, tmp_path / "a.safetensors")["tables"]["table"]
    assert set(entry["scales"].values()) == {None}
    assert "no suspicious rows" in command("inspect", tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_floats_in_npy(command, tmp_path, dtype):
    rows = float_rows().astype(dtype)
    rows[7], rows[9, 1], rows[10, 2] = 0, np.nan, -np.inf
    np.save(tmp_path / "a.npy", rows)
    entry = as_json(command, tmp_path / "a.npy")["tables"]["a"]
    assert entry["type"] == np.dtype(dtype).name
    assert entry["bytes"] == rows.nbytes
    assert found(entry) == {"not_finite": (2, [9, 10]), "zero": (1, [7])}
    spans = np.ptp(np.delete(rows.astype(float), [9, 10], axis=0), axis=1)
    assert entry["range"]["max"] == pytest.approx(spans.max(), rel=1e-3)
    assert "scale" not in command("inspect", tmp_path / "a.npy").splitlines()[4]


def test_ranges_beyond_float32_and_float16(command, tmp_path):
    for dtype in (np.float16, np.float32):
        most = np.finfo(dtype).max
        rows = float_rows().astype(dtype)
        rows[4, :2] = most, -most
        np.save(tmp_path / "a.npy", rows)
        entry = as_json(command, tmp_path / "a.npy")["tables"]["a"]
        assert entry["range"]["max"] == 2 * float(most)
        assert found(entry) == {"wide": (1, [4])}


def test_signalling_nans_are_found_quietly(command, tmp_path):
    rows = float_rows()
    rows.view(np.uint32)[5, 2] = 0x7F800001
    np.save(tmp_path / "a.npy", rows)
    assert found(as_json(command, tmp_path / "a.npy")["tables"]["a"]) == {"not_finite": (1, [5])}


def test_npy_that_is_no_table(command, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(6, dtype=np.int64))
    assert as_json(command, tmp_path / "ids.npy")["tensors"] == {"ids": {"dtype": "int64", "shape": [6], "bytes": 48}}
    assert "0 tables, 1 other tensor, 48 B" in command("inspect", tmp_path / "ids.npy")


def test_files_of_others(command, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "a.safetensors"
    numpy.save_file({"wide": float_rows().astype(float), "ids": np.arange(6).reshape(2, 3)}, path, {"format": "pt"})
    whole = as_json(command, path)
    assert whole["tensors"] == {"ids": {"dtype": "I64", "shape": [2, 3], "bytes": 48}}
    assert whole["tables"]["wide"]["type"] == "float64"
    assert whole["metadata"] == {"format": "pt"}
    printed = command("inspect", path)
    assert "\nids            I64  2 x 3   48 B\n" in printed
    assert "metadata\n  format = pt\n" in printed
    numpy.save_file({"ids": np.arange(6)}, path)
    assert "0 tables, 1 other tensor" in command("inspect", path)


def test_an_index_of_several_files(command, tmp_path):
    path = tmp_path / "a.index.json"
    tables = {name: qembag.quantize(float_rows(), 4) for name in ("a", "b", "c")}
    qembag.save_tables(path, tables, metadata={"k": "v"}, max_shard_bytes=10_000)
    whole = as_json(command, path)
    assert [*whole["tables"]] == ["a", "b", "c"]
    assert whole["tensors"] == {}
    assert whole["metadata"] == {"k": "v"}


def test_a_header_is_read_without_rows(command, tmp_path):
    qembag.quantize(odd_rows()).save(tmp_path / "a.safetensors")
    entry = as_json(command, tmp_path / "a.safetensors", "--header")["tables"]["table"]
    assert not {"range", "scales", "suspicious"} & entry.keys()
    assert "suspicious" not in command("inspect", tmp_path / "a.safetensors", "--header", "--quiet")


def test_files_that_cannot_be_inspected(command, tmp_path):
    for name, content in (("a.safetensors", b"x" * 100), ("a.npy", b"PK"), ("a.index.json", b"{}"), ("a.txt", b"")):
        (tmp_path / name).write_bytes(content)
        assert command.fails("inspect", tmp_path / name).startswith(str(tmp_path / name))
    assert command.fails("inspect", tmp_path / "no.npy") == f"{tmp_path / 'no.npy'}: No such file or directory"
    # Windows denies to open a folder, with other words.
    assert command.fails("inspect", tmp_path).startswith(str(tmp_path))
