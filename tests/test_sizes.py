"""Sizes whose products outgrow an address, of 64 bits or (where these tests run on 32-bit x86 too) of 32."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import qembag

DIM = 64
ROW_BYTES = 4 * DIM
# Rows of output whose bytes outgrow an address, by one and by far; NumPy itself has arrays of so many.
TOO_MANY = [sys.maxsize // ROW_BYTES + 1, sys.maxsize // 16]


@pytest.fixture
def table(rng, bits):
    return qembag.quantize(rng.normal(size=(5, DIM)).astype(np.float32), bits)


@pytest.mark.parametrize("num_bags", TOO_MANY)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_an_output_too_large_for_memory_is_an_error(level, table, num_bags, mode):
    """Bags of no indices cost no memory, however many; their sums do."""
    indices = np.empty((num_bags, 0), dtype=np.int64)
    with pytest.raises((MemoryError, ValueError)):
        qembag.embedding_bag(table, indices, mode=mode)


@pytest.mark.parametrize("count", TOO_MANY)
def test_more_rows_than_memory_holds_are_an_error(level, table, count):
    with pytest.raises((MemoryError, ValueError)):
        qembag.embedding(table, np.broadcast_to(np.int32(3), (count,)))


def test_a_table_of_one_row_many_times_is_looked_up_to_its_end(level, bits, rng, packed_rows, same_bits):
    """A row stride of 0: the floats of all rows outgrow any address."""
    row = packed_rows(rng, 1, DIM, bits)
    num_rows = sys.maxsize // 100  # NumPy's own limit is the number of elements
    table = qembag.QuantizedTable(np.broadcast_to(row, (num_rows, row.shape[1])), bits)
    assert table.num_embeddings == num_rows
    indices = np.array([[num_rows - 1, 0], [num_rows // 2, 7]])
    expected = qembag.embedding_bag(qembag.QuantizedTable(row, bits), np.zeros_like(indices))
    same_bits(qembag.embedding_bag(table, indices), expected)
    with pytest.raises(IndexError, match=rf"^indices\[0\] is {num_rows}: out of range"):
        qembag.embedding(table, [num_rows])
    with pytest.raises((MemoryError, ValueError)):
        table.dequantize()


@pytest.mark.parametrize("shape", [(sys.maxsize // 3, 1), (1, sys.maxsize // 3)])
def test_more_weights_than_memory_holds_are_an_error(bits, shape):
    """As float32, that is: four bytes each are more than any address."""
    with pytest.raises((MemoryError, ValueError)):
        qembag.quantize(np.broadcast_to(np.float16(1), shape), bits)


def test_many_rows_shared_out_among_many_threads_are_quantized_once_each(level, bits, rng):
    """2,048 chunks of two million rows: 2^32, were the two multiplied in 32 bits."""
    weights = rng.normal(size=(2**21 + 7, 1)).astype(np.float32)
    expected = qembag.quantize(weights, bits, num_threads=1).data
    np.testing.assert_array_equal(qembag.quantize(weights, bits, num_threads=1000).data, expected)


@pytest.mark.slow
def test_a_row_whose_codes_have_2_to_the_31_bits_is_quantized(bits):
    weights = np.zeros((1, 2**28), dtype=np.float32)
    weights[0, -1] = 1
    table = qembag.quantize(weights, bits, num_threads=1)
    codes = table.data[0, : -(8 if bits == 8 else 4)]
    assert np.flatnonzero(codes).tolist() == [len(codes) - 1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_all_rows_of_a_table_so_wide_that_a_row_is_a_piece(bits):
    """A long call in the main thread goes row by row, and looks for signals within a row's bag."""
    row = np.arange(1 << 24, dtype=np.float32) % 3
    table = qembag.quantize(np.stack([row, row + 1, row]), bits)
    values = table.dequantize()
    assert np.array_equal(values[:, :6], table.dequantize([0, 1, 2])[:, :6])
    assert np.array_equal(values[0], values[2])
