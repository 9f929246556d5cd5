"""Row weights: kept with a table, through every change of it; applied where the caller asks."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import qembag
from support.functions import DIM, FLOAT_ROWS, MAPPING, NUM_ROWS, ROWS

WEIGHTS = np.random.default_rng(20261127).normal(size=NUM_ROWS).astype(np.float32)


def tables(**more):
    made = {f"{bits}-bit": qembag.QuantizedTable(rows.copy(), bits, **more) for bits, rows in ROWS.items()}
    return made | {kind: qembag.FloatTable(rows.copy(), dtype=kind, **more) for kind, rows in FLOAT_ROWS.items()}


KINDS = list(tables())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_with_a_table(kind, tmp_path):
    table = tables(row_weights=WEIGHTS, compressed_indices_mapping=MAPPING)[kind]
    path = tmp_path / "saved.safetensors"
    table.save(path)
    others = {
        "pickle": pickle.loads(pickle.dumps(table)),
        "copy": copy.deepcopy(table),
        "prune": table.prune([0, 3]),
        "file": qembag.open_table(path),
        "file, read": qembag.open_table(path, mmap=False),
        "mapped file, pickled": pickle.loads(pickle.dumps(qembag.open_table(path))),
        "load_tables": qembag.load_tables(path)["table"],
        "load_tables, read": qembag.load_tables(path, mmap=False)["table"],
    }
    if isinstance(table, qembag.QuantizedTable):
        others["layout"] = table.to_layout(scale_first=True, row_alignment=16)
    for way, other in others.items():
        np.testing.assert_array_equal(other.row_weights, WEIGHTS, err_msg=way)
        assert other.nbytes - table.nbytes == other.num_rows * other.row_bytes - table.num_rows * table.row_bytes, way


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_weights_has_none(kind, tmp_path):
    table = tables()[kind]
    path = tmp_path / "saved.safetensors"
    table.save(path)
    assert [one.row_weights for one in (table, pickle.loads(pickle.dumps(table)), qembag.open_table(path))] == [
        None
    ] * 3
    with pytest.raises(ValueError, match="apply_row_weights needs a table that has row_weights"):
        table.apply_row_weights()


@pytest.mark.parametrize("kind", KINDS)
def test_lookups_do_not_apply_weights_by_themselves(kind):
    weighted, plain = (made[kind] for made in (tables(row_weights=WEIGHTS), tables()))
    indices = [[1, 2, 2], [3, 0, 9]]
    np.testing.assert_array_equal(qembag.embedding_bag(weighted, indices), qembag.embedding_bag(plain, indices))


@pytest.mark.parametrize("kind", KINDS)
def test_applied_weights_are_rounded_products(kind):
    table = tables(row_weights=WEIGHTS, compressed_indices_mapping=MAPPING)[kind]
    applied = table.apply_row_weights()
    assert (applied.dtype, applied.shape, applied.row_weights) == ("float32", (NUM_ROWS, DIM), None)
    np.testing.assert_array_equal(applied.data, table.dequantize() * WEIGHTS[:, None])


def test_applied_weights_leave_pruned_rows_zero():
    weights = np.full(NUM_ROWS, np.inf, np.float32)
    table = qembag.FloatTable(FLOAT_ROWS["float32"], compressed_indices_mapping=MAPPING, row_weights=weights)
    applied = table.apply_row_weights().data
    assert not applied[MAPPING < 0].any()
    assert np.isinf(applied[MAPPING >= 0]).all()


def test_applying_takes_many_rows(monkeypatch):
    monkeypatch.setattr("qembag.base.WEIGHTED_AT_ONCE", 3 * DIM)
    table = tables(row_weights=WEIGHTS)["8-bit"]
    np.testing.assert_array_equal(table.apply_row_weights().data, table.dequantize() * WEIGHTS[:, None])


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4", ">f8"])
def test_weights_become_float32(kind):
    table = qembag.FloatTable(FLOAT_ROWS["float32"], row_weights=WEIGHTS.astype(kind))
    assert table.row_weights.dtype == np.float32
    np.testing.assert_array_equal(table.row_weights, WEIGHTS.astype(kind).astype(np.float32))


@pytest.mark.parametrize("shape", [(), (NUM_ROWS - 1,), (NUM_ROWS + 1,), (NUM_ROWS, 1), (0,)])
def test_there_is_a_weight_for_each_logical_row(shape):
    with pytest.raises(ValueError, match=rf"row_weights must have shape \({NUM_ROWS},\), one for each row, got"):
        qembag.FloatTable(FLOAT_ROWS["float32"], row_weights=np.zeros(shape, np.float32))
    table = qembag.FloatTable(FLOAT_ROWS["float32"], compressed_indices_mapping=[1, 1, 1], row_weights=[1, 2, 3])
    assert table.row_weights.tolist() == [1, 2, 3]


def test_a_table_of_floats_may_have_a_name_like_that_of_weights(tmp_path):
    """As in files that were written before tables had weights."""
    save_file = pytest.importorskip("safetensors.numpy").save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "a.row_weights": np.zeros((4, 5), np.float32)}, path)
    opened = qembag.open_tables(path)
    assert {name: (table.shape, table.row_weights) for name, table in opened.items()} == {
        "a": ((2, 3), None),
        "a.row_weights": ((4, 5), None),
    }


def test_weights_reserve_their_name(tmp_path):
    array = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"'a' and 'a\.row_weights' would both need 'a\.row_weights'"):
        qembag.save_tables(tmp_path / "x.safetensors", {"a": array, "a.row_weights": array})


def test_weights_of_another_length_in_a_file_are_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "a.row_weights": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: table 'a': row_weights must have shape \(2,\)"):
        qembag.open_tables(path)


def test_quantizing_to_a_file_keeps_the_weights(tmp_path):
    table = qembag.FloatTable(FLOAT_ROWS["float32"], compressed_indices_mapping=MAPPING, row_weights=WEIGHTS)
    table.save(tmp_path / "floats.safetensors", name="a")
    for number, source in enumerate((table, tmp_path / "floats.safetensors")):
        path = tmp_path / f"{number}.safetensors"
        qembag.quantize_to_file(source, path, bits=4, name="b")
        made = qembag.open_table(path, "b")
        np.testing.assert_array_equal(made.row_weights, WEIGHTS)
        np.testing.assert_array_equal(made.data, qembag.quantize(table[:], bits=4).data)


def test_work_that_goes_on_keeps_the_weights(tmp_path):
    rows = np.random.default_rng(1).normal(size=(100, 16)).astype(np.float32)
    qembag.FloatTable(rows, row_weights=np.arange(100.0)).save(tmp_path / "floats.safetensors", name="a")
    path = tmp_path / "codes.safetensors"

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qembag.quantize_to_file(tmp_path / "floats.safetensors", path, bits=8, progress=stop)
    assert not path.exists()
    qembag.quantize_to_file(tmp_path / "floats.safetensors", path, bits=8, resume=True)
    np.testing.assert_array_equal(qembag.open_table(path).row_weights, np.arange(100))
    assert qembag.open_table(path, mmap=False).row_weights.tolist() == list(range(100))


def test_weights_of_another_length_are_refused_by_quantizing(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    path = tmp_path / "other.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "a.row_weights": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: tensor 'a': row_weights must have shape \(2,\)"):
        qembag.quantize_to_file(path, tmp_path / "codes.safetensors", bits=8)
