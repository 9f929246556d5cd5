"""Rows of a table quantized again in place."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import qembag

NUM_ROWS, DIM = 40, 48
LAYOUTS = [{}, {"group_size": 32}, {"scale_first": True, "scale_dtype": "float16", "row_alignment": 64}]


def floats(seed: int, num_rows: int = NUM_ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)


@pytest.mark.parametrize("method", ["minmax", "greedy", "lsq"])
@pytest.mark.parametrize("options", LAYOUTS)
def test_updated_rows_are_as_in_a_table_quantized_anew(level, threads, bits, method, options):
    if bits == 8 and method == "greedy":
        pytest.skip("8 bits have no greedy search")
    old, new, rows = floats(1), floats(2, 5), np.array([7, 0, 39, 12, 3])
    table = qembag.quantize(old, bits, method=method, **options)
    table.update(rows, new, method=method)
    old[rows] = new
    assert np.array_equal(table.data, qembag.quantize(old, bits, method=method, **options).data)


def test_the_importance_of_columns_is_passed_on(bits):
    importance = np.arange(DIM, dtype=np.float32)
    table = qembag.quantize(floats(1), bits)
    table.update(np.arange(NUM_ROWS), floats(2), method="lsq", importance=importance)
    assert np.array_equal(table.data, qembag.quantize(floats(2), bits, method="lsq", importance=importance).data)


def test_lookups_find_the_new_rows_at_once(bits):
    table = qembag.quantize(np.zeros((4, 4), np.float32), bits)
    table.update([2], [[0, 5, 10, 15]])
    assert table[2].round(4).tolist() == [0, 5, 10, 15]
    assert qembag.embedding_bag(table, [[2, 2]]).round(4).tolist() == [[0, 10, 20, 30]]


def test_a_callers_array_is_written_and_its_padding_is_not(bits):
    layout = qembag.layout.RowLayout(bits, DIM, row_bytes=100)
    data = np.full((NUM_ROWS, 100), 0xA5, np.uint8)
    table = qembag.QuantizedTable(data, bits, dim=DIM)
    table.update([3], floats(1, 1))
    assert np.array_equal(data[3, : layout.used_bytes], qembag.quantize(floats(1, 1), bits).data[0])
    assert (data[3, layout.used_bytes :] == 0xA5).all()
    assert (np.delete(data, 3, axis=0) == 0xA5).all()


def test_rows_that_lie_apart_are_found(bits):
    table = qembag.quantize(floats(1), bits)
    spread = np.zeros((NUM_ROWS, 3, table.row_bytes), np.uint8)
    spread[:, 1] = table.data
    apart = qembag.QuantizedTable(spread[::-1, 1], bits, dim=DIM)
    apart.update([0, 5], floats(2, 2))
    expected = qembag.quantize(floats(2, 2), bits).data
    assert np.array_equal(spread[[NUM_ROWS - 1, NUM_ROWS - 6], 1], expected)
    assert not spread[:, [0, 2]].any()


def test_rows_of_a_pruned_table_are_logical_ones(bits):
    table = qembag.quantize(floats(1), bits).prune(np.arange(0, NUM_ROWS, 2))
    table.update([4, 38], floats(2, 2))
    assert np.array_equal(table.data[[2, 19]], qembag.quantize(floats(2, 2), bits).data)
    before = table.data.copy()
    with pytest.raises(ValueError, match=r"^rows\[1\] must be a row that is not pruned, got 5$"):
        table.update([4, 5], floats(3, 2))
    assert np.array_equal(table.data, before)


def test_of_a_row_that_comes_twice_the_last_counts(bits):
    table = qembag.quantize(floats(1), bits)
    table.update([6, 6, 6], floats(2, 3))
    assert np.array_equal(table.data[6], qembag.quantize(floats(2, 3), bits).data[2])


def test_no_rows_are_nothing_to_do(bits):
    table = qembag.quantize(floats(1), bits)
    before = table.data.copy()
    table.update([], np.empty((0, DIM), np.float32))
    assert np.array_equal(table.data, before)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
def test_other_floats_are_taken(bits, dtype):
    table = qembag.quantize(floats(1), bits)
    given = floats(2, 2).astype(dtype)
    table.update(np.array([1, 2], np.int16), given)
    assert np.array_equal(table.data[1:3], qembag.quantize(given, bits).data)


@pytest.mark.parametrize(
    ("rows", "weights", "error", "message"),
    [
        ([40], floats(2, 1), IndexError, r"^rows\[0\] is 40: out of range for a table of 40 rows$"),
        ([0, -1], floats(2, 2), IndexError, r"^rows\[1\] is -1: out of range for a table of 40 rows$"),
        ([2**63], floats(2, 1), IndexError, r"^rows\[0\] is 9223372036854775808: out of range"),
        ([[0]], floats(2, 1), ValueError, r"^rows must have 1 dimension, got an int\d+ array"),
        ([0.0], floats(2, 1), TypeError, "^rows must be an array of integers, got"),
        ([True], floats(2, 1), TypeError, "^rows must be an array of integers, got"),
        ([0, 1], floats(2, 1), ValueError, r"^weights must have shape \(2, 48\), a row for each of rows, got"),
        ([0], floats(2, 1)[0], ValueError, r"^weights must have shape \(1, 48\), a row for each of rows, got"),
        ([0], np.zeros((1, DIM), int), TypeError, "^weights must be"),
        ([0, 1], floats(2, 2) * np.float32([[1], [np.nan]]), ValueError, r"^weights\[1\] must be finite"),
    ],
)
def test_what_is_wrong_is_named_and_the_table_is_as_it_was(bits, rows, weights, error, message):
    table = qembag.quantize(floats(1), bits)
    before = table.data.copy()
    with pytest.raises(error, match=message):
        table.update(rows, weights)
    assert np.array_equal(table.data, before)


def test_options_are_those_of_quantize():
    table = qembag.quantize(floats(1), 8)
    with pytest.raises(ValueError, match=r"^method must be 'minmax', 'greedy' or 'lsq', got 'best'"):
        table.update([0], floats(2, 1), method="best")
    with pytest.raises(ValueError, match=r"^method must be 'minmax' or 'lsq' at 8 bits"):
        table.update([0], floats(2, 1), method="greedy")
    with pytest.raises(ValueError, match=r"^importance must come with method='lsq'"):
        table.update([0], floats(2, 1), importance=np.ones(DIM))


def test_read_only_rows_are_refused(bits):
    data = qembag.quantize(floats(1), bits).data
    data.flags.writeable = False
    with pytest.raises(ValueError, match=r"^table must have rows that can be written to, got read-only ones$"):
        qembag.QuantizedTable(data, bits).update([0], floats(2, 1))


def test_what_embedding_bag_unpack_would_return_is_forgotten():
    codes = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4
    packed = qembag.ops.embedding_bag_prepack(codes, np.ones(3), np.zeros(3), 4)
    packed.update([0], [[0, 1, 2, 3]])
    with pytest.raises(ValueError, match="packed"):
        qembag.ops.embedding_bag_unpack(packed)


def test_a_table_updated_in_one_thread_is_read_in_others_without_harm():
    """Each row read is the old one, the new one, or a mixture: its elements come from the two."""
    table = qembag.quantize(np.zeros((64, DIM), np.float32), 8)
    ends, stop = [np.full((64, DIM), value, np.float32) for value in (0, 1)], threading.Event()

    def write() -> None:
        while not stop.is_set():
            for values in ends:
                table.update(np.arange(64), values)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert np.isfinite(qembag.embedding(table, np.arange(64))).all()
    finally:
        stop.set()
        writer.join()
