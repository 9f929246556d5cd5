"""Rows, mappings and floats that are wrong, and tables without any: the right answer or a clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

import qembag
import reference
from qembag import ops
from support.arrays import an_array, place, same_bits
from support.asking import BAD_ROW, DIM, INDICES, NUM_ROWS, OFFSETS, Ask, answered, raises, refused
from support.lookups import Bags, SingleRows, Table
from support.packing import Packing
from support.rules import MAPPING

# ---- The table's rows and its mapping --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10, -2, 2**31 - 1, -(2**31)])
def test_a_mapping_is_checked_when_a_table_is_made_and_again_when_it_is_used(
    level: str, bits: int, rows: np.ndarray, value: int
) -> None:
    mapping = np.arange(NUM_ROWS, dtype=np.int32)
    table = Table(rows, bits, mapping=mapping)
    table.made = table.make()
    bags, single = Bags("public", table, INDICES, OFFSETS), SingleRows("embedding", table, INDICES)
    answered(bags)
    mapping[4] = value
    refused(bags, IndexError, f"{MAPPING}[4] is {value} (indices[2], bag 2): {BAD_ROW}")
    refused(single, IndexError, f"{MAPPING}[4] is {value} (indices[2]): {BAD_ROW}")
    with pytest.raises(IndexError, match=rf"{MAPPING}\[4\] is {value}"):
        table.made.dequantize()
    with pytest.raises(IndexError):
        qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
    mapping[4] = 4
    answered(bags)


def test_a_mapping_that_changes_its_shape_or_type_changes_no_table(bits: int, rows: np.ndarray) -> None:
    mapping = np.arange(NUM_ROWS, dtype=np.int32)
    table = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
    before = qembag.embedding_bag(table, INDICES, OFFSETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy 2.5
        mapping.shape = (2, 5)
    assert mapping.shape == (2, 5)
    assert table.num_embeddings == NUM_ROWS
    same_bits(qembag.embedding_bag(table, INDICES, OFFSETS), before)


def test_an_index_beyond_the_mapping_is_refused(ask: Ask) -> None:
    mapping = np.array([0, 1, -1, 2, 3, 4], dtype=np.int32)
    refused(ask(mapping=mapping), IndexError, "indices[5] is 9 (bag 2): out of range for a pruned table of 6 rows")


def test_mappings_of_another_type_or_shape_are_refused(ask: Ask) -> None:
    for kind in (np.int64, np.float64, np.uint32, np.int16):
        mapping = np.arange(10, dtype=kind)
        message = f"{MAPPING} must be an array of int32, got {an_array(mapping)} of shape (10,)"
        refused(ask(mapping=mapping), TypeError, message)
    for shape in [(), (2, 5), (1, 1)]:
        message = f"{MAPPING} must have 1 dimension, got an int32 array of shape {shape}"
        refused(ask(mapping=np.zeros(shape, dtype=np.int32)), ValueError, message)


def test_pruned_weights_without_a_mapping_are_refused(level: str, table: Table) -> None:
    message = f"{MAPPING} must be given with pruned_weights=True, got None"
    for family in ("rowwise", "packed"):
        refused(Bags(family, table, INDICES, OFFSETS, pruned=True), ValueError, message)
    refused(SingleRows("packed", table, INDICES, pruned=True), ValueError, message)


def test_rows_of_another_type_shape_or_layout_are_refused(level: str, bits: int, rows: np.ndarray) -> None:
    side_by_side = "must have the bytes of a row side by side, got strides"
    matrix = "must have 2 dimensions (rows, bytes of a row), got a uint8 array of shape"
    too_short = f"must have rows of at least {9 if bits == 8 else 5} bytes at {bits} bits"
    for wrong, error, text in [
        (rows.astype(np.int8), TypeError, "must be an array of uint8, got an int8 array of shape"),
        (rows[0], ValueError, matrix),
        (rows[None], ValueError, matrix),
        (rows[:, ::2], ValueError, side_by_side),
        (rows[:, ::-1], ValueError, side_by_side),
        (rows.T, ValueError, side_by_side),
        (rows[:, :4], ValueError, too_short),
        (rows[:, :0], ValueError, too_short),
    ]:
        refused(Ask("rowwise", bits, wrong)(), error, f"weight {text}", whole=False)
        refused(Ask("public", bits, wrong)(), error, f"data {text}", whole=False)


@pytest.mark.parametrize("way", ["gaps", "odd gaps", "far", "reversed", "misaligned", "read-only", "mapped"])
def test_rows_at_any_stride_and_read_only_are_read(ask: Ask, way: str) -> None:
    answered(ask(rows=place(ask.rows, way).value))


def test_rows_may_all_be_one(ask: Ask) -> None:
    answered(ask(rows=np.broadcast_to(ask.rows[:1], ask.rows.shape)))


# ---- Nothing ---------------------------------------------------------------------------------------------------------


def test_no_indices_no_bags_and_no_rows(ask: Ask) -> None:
    nothing, zeros = np.empty(0, dtype=np.int64), np.zeros((3, DIM), dtype=np.float32)
    square = np.empty((3, 0), dtype=np.int64)
    for rows in (ask.rows, ask.rows[:0]):
        for indices in (nothing, nothing.astype(np.int32), []):
            answered(ask(indices, [0, 0, 0], rows=rows), zeros)
            answered(ask(indices, [0] * 4, include_last_offset=True, rows=rows), zeros)
            answered(ask(indices, [], rows=rows), zeros[:0])
            answered(ask(indices, [0], include_last_offset=True, rows=rows), zeros[:0])
        answered(ask(square, None, rows=rows), zeros)
        answered(ask(square.T, None, rows=rows), zeros[:0])


def test_a_table_without_rows_is_a_table(level: str, bits: int, rows: np.ndarray) -> None:
    nothing = np.empty((0, DIM), dtype=np.float32)
    for empty_rows in (rows[:0], np.empty((0, rows.shape[1]), dtype=np.uint8)):
        table = Table(empty_rows, bits)
        made = table.make()
        assert made.shape == made.codes().shape == (0, DIM)
        assert made.scales.shape == made.biases.shape == (0,)
        answered(SingleRows("dequantize", table, None), nothing)
        answered(SingleRows("embedding", table, []), nothing)
        answered(SingleRows("embedding", table, np.empty((2, 0), np.int32)), nothing.reshape(2, 0, DIM))
        message = "indices[0] is 0: out of range for a table of 0 rows"
        refused(SingleRows("embedding", table, [0]), IndexError, message)
        all_pruned = Table(empty_rows, bits, mapping=np.full(4, -1, dtype=np.int32))
        answered(SingleRows("embedding", all_pruned, [0, 3]), np.zeros((2, DIM), dtype=np.float32))
    assert qembag.quantize(nothing, bits).shape == (0, DIM)


# ---- Quantizing ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(8, False), (4, False), (4, True), (2, False), (2, True)], ids=str)
def pack(request: pytest.FixtureRequest, level: str) -> Callable[..., list[Packing]]:
    """Calls that pack floats by the public function and by the reference's operator, at each width, greedy and not."""
    bits, greedy = request.param

    def calls(weights: np.ndarray) -> list[Packing]:
        public = Packing("public", weights, bits, "greedy" if greedy else "minmax")
        return [public, Packing("prepack", weights, bits, optimized=greedy)]

    calls.bits = bits
    return calls


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_rows_that_are_not_finite_are_refused(pack: Callable[..., list[Packing]], bad: float, kind: type) -> None:
    for number in (0, 7, 19):
        weights = np.linspace(-1, 1, 120).reshape(6, 20).astype(kind)
        weights[3, number] = weights[5, 0] = bad
        for call in pack(weights):
            refused(call, ValueError, f"{call.name}[3] must be finite to be quantized, got a NaN or an infinity")


def test_rows_that_their_tail_cannot_hold_are_refused(pack: Callable[..., list[Packing]]) -> None:
    weights = np.linspace(-1, 1, 120, dtype=np.float32).reshape(6, 20)
    low, high, tail = (-3e38, 3e38, "float32") if pack.bits == 8 else (-100_000, 1, "float16")
    weights[2, 3], weights[2, 5], weights[4] = low, high, weights[4] * 3e38
    text = (
        f"[2] must have a minimum and a scale that its row can hold as {tail} at {pack.bits} bits, "
        f"got values from {low:g} to {high:g}"
    )
    for call in pack(weights):
        refused(call, ValueError, call.name + text)


@pytest.mark.parametrize(("width", "value"), [(4, 1e6), (2, 2.1e5)])
def test_rows_whose_scale_overflows_float16_are_refused(level: str, width: int, value: float) -> None:
    weights = np.zeros((3, 8), dtype=np.float32)
    weights[1, 4] = value
    refused(
        Packing("prepack", weights, width),
        ValueError,
        f"weight[1] must have a minimum and a scale that its row can hold as float16 at {width} bits, "
        f"got values from 0 to {value:g}",
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1])
def test_bounds_that_are_not_finite_are_refused(level: str, bits: int, bad: float, column: int) -> None:
    bounds = np.tile(np.float32([-1, 1]), (3, 1))
    bounds[1, column] = bad
    call = Packing("bounds", np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8), bits, bounds=bounds)
    assert call.judge().faults
    with pytest.raises(ValueError, match=r"^(weight|rowwise_min_max)\[1\]"):
        call()


def test_a_tiny_8_bit_range_keeps_torchs_bytes(level: str) -> None:
    weights = np.float32([[1, 1 + 2**-23, 1], [0, 5e-9, 1e-9], [0, 1e-12, 0], [7, 7, 7]])
    np.testing.assert_array_equal(ops.embedding_bag_byte_prepack(weights), reference.quantize(weights, 8))
    assert (ops.embedding_bag_byte_prepack(weights)[2, :3] == 0).all()


@pytest.mark.parametrize("ratio", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_a_greedy_ratio_that_is_no_share_is_refused(ratio: float) -> None:
    # Constant rows: the search would end at once.
    call = Packing("prepack", np.ones((2, 8), dtype=np.float32), 4, optimized=True, ratio=ratio)
    refused(call, ValueError, "ratio", whole=False)


@pytest.mark.parametrize("nbins", [0, -1, 2**70])
def test_a_greedy_number_of_bins_beyond_int64_is_refused_by_name(nbins: int) -> None:
    call = Packing("prepack", np.ones((2, 8), dtype=np.float32), 4, optimized=True, nbins=nbins)
    refused(call, ValueError, "nbins", whole=False)


def test_a_code_that_is_too_large_is_named() -> None:
    message = "codes[1, 1] is 16: must be from 0 to 15 at 4 bits"
    codes = np.array([[1, 2], [3, 16]], dtype=np.uint8)
    raises(ValueError, message, lambda: ops.embedding_bag_prepack(codes, [1, 2], [0, 1], 4))


def test_numbers_beyond_float32_warn_nobody() -> None:
    with pytest.raises(ValueError, match=r"^weights\[0\] must be finite"):
        qembag.quantize([[1e300, 0]])
    table = qembag.quantize(np.ones((2, 4), dtype=np.float32))
    assert not np.isfinite(qembag.embedding_bag(table, [0], [0], per_sample_weights=[1e300])).any()
