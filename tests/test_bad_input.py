"""Every bad input gets the right answer or a clear error, and after an error `out` is bit for bit what it was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from array import array as Buffer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import qembag
import reference
from conftest import child_environment
from qembag import ops
from support import fenced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMES = {8: "byte", 4: "4bit", 2: "2bit"}
DIM = 12
NUM_ROWS = 10
INDICES = np.array([3, 1, 4, 1, 5, 9], dtype=np.int64)
OFFSETS = np.array([0, 2, 2], dtype=np.int64)
MODES = ["sum", "mean", "max"]
TABLE = "a table of 10 rows"
BAD_ROW = "must be -1 or the number of a row, in a table of 10 rows"


@pytest.fixture
def rows(bits: int, rng: np.random.Generator, packed_rows: Callable[..., np.ndarray]) -> np.ndarray:
    return packed_rows(rng, NUM_ROWS, DIM, bits)


@pytest.fixture(params=["public", "rowwise_offsets", "packed"])
def look_up(request: pytest.FixtureRequest, bits: int, rows: np.ndarray) -> Callable[..., np.ndarray]:
    """Bags of `rows` by the public function, and by the reference's two operators of this width."""

    def public(
        indices: Any,
        offsets: Any = None,
        *,
        weights: Any = None,
        mapping: Any = None,
        include_last_offset: bool = False,
        mode: int = 0,
        out: Any = None,
        rows: np.ndarray = rows,
    ) -> np.ndarray:
        table = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
        return qembag.embedding_bag(
            table, indices, offsets, mode=MODES[mode], per_sample_weights=weights,
            include_last_offset=include_last_offset, out=out,
        )  # fmt: skip

    def operator(
        indices: Any,
        offsets: Any = None,
        *,
        weights: Any = None,
        mapping: Any = None,
        include_last_offset: bool = False,
        mode: int = 0,
        out: Any = None,
        rows: np.ndarray = rows,
    ) -> np.ndarray:
        packed = request.param == "packed"
        name = f"embedding_bag_{NAMES[bits]}" + ("" if packed else "_rowwise_offsets")
        weight = qembag.QuantizedTable(rows, bits) if packed else rows
        return getattr(ops, name)(
            weight, indices, offsets, False, mode, mapping is not None, weights, mapping, include_last_offset, out=out
        )

    return public if request.param == "public" else operator


def fresh_out(num_bags: int = 3, dim: int = DIM) -> np.ndarray:
    return np.arange(num_bags * dim, dtype=np.uint32).view(np.float32).reshape(num_bags, dim)


def assert_refused(call: Callable[[Any], Any], error: type[Exception], message: str, out: np.ndarray) -> None:
    """`call(out)` raises exactly this, without an `out` and with one, which it leaves alone."""
    for given in (None, out):
        before = out.tobytes()
        with pytest.raises(error) as caught:
            call(given)
        assert type(caught.value) is error
        assert str(caught.value) == message
        assert out.tobytes() == before


def assert_raises(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message


def assert_answered(
    call: Callable[[Any], Any], expected: np.ndarray, same_bits: Callable[..., None], out: np.ndarray | None = None
) -> None:
    same_bits(call(None), expected)
    out = np.full(expected.shape, np.nan, dtype=expected.dtype)
    assert call(out) is out
    same_bits(out, expected)


# ---- The table of what torch 2.13.0 does wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 5, 7])
def test_per_sample_weights_of_another_length_are_refused(
    level: str, look_up: Callable[..., np.ndarray], length: int
) -> None:
    weights = np.ones(length, dtype=np.float32)
    message = f"per_sample_weights must have the shape of indices, (6,), got ({length},)"
    assert_refused(lambda out: look_up(INDICES, OFFSETS, weights=weights, out=out), ValueError, message, fresh_out())


def test_per_sample_weights_of_another_shape_are_refused(level: str, look_up: Callable[..., np.ndarray]) -> None:
    square = INDICES.reshape(3, 2)
    for shape in [(6,), (2, 3), (3, 1), (1, 3, 2), ()]:
        message = f"per_sample_weights must have the shape of indices, (3, 2), got {shape}"
        weights = np.ones(shape, dtype=np.float32)
        assert_refused(lambda out, w=weights: look_up(square, weights=w, out=out), ValueError, message, fresh_out())


@pytest.mark.parametrize("value", [-2, -(2**31), 10, 11, 2**30, 2**31 - 1])
def test_mapping_values_that_are_no_rows_are_refused(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], value: int, request: Any
) -> None:
    mapping = np.array([0, 9, -1, 8, value, 7, 6, 5, 4, -1, value], dtype=np.int32)
    place = "" if request.node.callspec.params["look_up"] == "public" else " (indices[2], bag 2)"
    message = f"compressed_indices_mapping[4] is {value}{place}: {BAD_ROW}"
    assert_refused(lambda out: look_up(INDICES, OFFSETS, mapping=mapping, out=out), IndexError, message, fresh_out())


def test_a_bad_mapping_value_that_no_index_leads_to_is_never_used(
    level: str, bits: int, rows: np.ndarray, same_bits: Callable[..., None]
) -> None:
    mapping = np.array([0, 9, -2, 8, -1, 7, 2**30, 5, 4, 3], dtype=np.int32)
    operator = getattr(ops, f"embedding_bag_{NAMES[bits]}_rowwise_offsets")
    expected = reference.embedding_bag(rows, bits, DIM, INDICES, OFFSETS, mapping=mapping)
    assert_answered(
        lambda out: operator(rows, INDICES, OFFSETS, False, 0, True, None, mapping, out=out), expected, same_bits
    )


def test_a_first_offset_above_zero_starts_the_first_bag_there(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    indices = INDICES.copy()
    indices[0] = 2**40  # belongs to no bag, so it is never read
    for kind in (np.int32, np.int64):
        offsets = np.array([1, 3, 3, 4], dtype=kind)
        expected = reference.embedding_bag(rows, bits, DIM, indices, offsets)
        assert_answered(lambda out, o=offsets: look_up(indices, o, out=out), expected, same_bits)


@pytest.mark.parametrize("include_last_offset", [False, True])
def test_decreasing_offsets_are_refused(
    level: str, look_up: Callable[..., np.ndarray], include_last_offset: bool
) -> None:
    for kind in (np.int32, np.int64):
        offsets = np.array([0, 4, 3, 6, 2], dtype=kind)
        assert_refused(
            lambda out, o=offsets: look_up(INDICES, o, include_last_offset=include_last_offset, out=out),
            ValueError,
            "offsets[2] is 3: must not be below the offset before it",
            fresh_out(5 - include_last_offset),
        )


@pytest.mark.parametrize("value", [-1, 7, 2**31 - 1, 2**32 + 2, 2**63 - 1, -(2**63), -(2**32) + 2])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_offsets_beyond_the_indices_are_refused(
    level: str, look_up: Callable[..., np.ndarray], value: int, include_last_offset: bool
) -> None:
    for place in range(3):
        offsets = OFFSETS.copy()
        offsets[place] = value
        message = f"offsets[{place}] is {value}: must be from 0 to 6, the number of indices"
        kinds = [np.int64] if abs(value) >= 2**31 else [np.int32, np.int64]
        for kind in kinds:
            given = offsets.astype(kind)
            assert_refused(
                lambda out, o=given: look_up(INDICES, o, include_last_offset=include_last_offset, out=out),
                ValueError,
                message,
                fresh_out(3 - include_last_offset),
            )


def test_indices_after_the_last_offset_belong_to_no_bag(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    indices = np.concatenate([INDICES, [-7, 2**62]])
    offsets = np.array([0, 2, 2, 6])
    expected = reference.embedding_bag(rows, bits, DIM, INDICES, offsets[:-1])
    assert_answered(lambda out: look_up(indices, offsets, include_last_offset=True, out=out), expected, same_bits)


def test_include_last_offset_is_ignored_with_two_dimensional_indices(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    square = INDICES.reshape(3, 2)
    expected = reference.embedding_bag(rows, bits, DIM, square)
    assert_answered(lambda out: look_up(square, include_last_offset=True, out=out), expected, same_bits)


def test_strided_and_expanded_weights_count_as_what_they_hold(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    for kind in (np.float32, np.float16):
        whole = np.linspace(-1, 2, 12).astype(kind)
        swapped = np.linspace(1, 2, 6).astype(np.dtype(kind).newbyteorder())
        misaligned = np.zeros(6 * whole.itemsize + 1, dtype=np.uint8)[1:].view(kind)
        misaligned[:] = whole[:6]
        for weights in (whole[::2], whole[::-2], np.broadcast_to(whole[:1], (6,)), swapped, misaligned):
            expected = reference.embedding_bag(rows, bits, DIM, INDICES, OFFSETS, weights=weights)
            assert_answered(lambda out, w=weights: look_up(INDICES, OFFSETS, weights=w, out=out), expected, same_bits)


def test_a_strided_mapping_counts_as_what_it_holds(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    whole = np.arange(40, dtype=np.int32) % NUM_ROWS
    whole[::3] = -1
    for mapping in (
        whole[::2],
        whole[::-1],
        np.broadcast_to(whole[4:5], (15,)),
        whole.astype(whole.dtype.newbyteorder()),
    ):
        expected = reference.embedding_bag(rows, bits, DIM, INDICES, OFFSETS, mapping=mapping)
        assert_answered(lambda out, m=mapping: look_up(INDICES, OFFSETS, mapping=m, out=out), expected, same_bits)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_modes_are_obeyed(
    level: str,
    bits: int,
    rows: np.ndarray,
    look_up: Callable[..., np.ndarray],
    mode: int,
    same_bits: Callable[..., None],
) -> None:
    expected = reference.embedding_bag(rows, bits, DIM, INDICES, OFFSETS, mode=MODES[mode])
    assert_answered(lambda out: look_up(INDICES, OFFSETS, mode=mode, out=out), expected, same_bits)


def test_unknown_modes_are_refused(level: str, bits: int, rows: np.ndarray) -> None:
    table = qembag.QuantizedTable(rows, bits)
    for mode in (99, 3, -1, 2**40):
        for name, weight in (("_rowwise_offsets", rows), ("", table)):
            operator = getattr(ops, f"embedding_bag_{NAMES[bits]}{name}")
            message = f"mode must be 0 (sum), 1 (mean) or 2 (max), got {mode}"
            assert_refused(
                lambda out, o=operator, w=weight, m=mode: o(w, INDICES, OFFSETS, mode=m, out=out),
                ValueError,
                message,
                fresh_out(),
            )
    for mode in ("average", 0, None, "SUM", ["sum"], b"sum"):
        assert_refused(
            lambda out, m=mode: qembag.embedding_bag(table, INDICES, OFFSETS, mode=m, out=out),
            ValueError,
            f"mode must be 'sum', 'mean' or 'max', got {mode!r}",
            fresh_out(),
        )


def test_weights_with_max_are_refused(level: str, look_up: Callable[..., np.ndarray]) -> None:
    weights = np.ones(6, dtype=np.float32)
    message = "per_sample_weights must be None in mode 'max', got a float32 array of shape (6,)"
    assert_refused(
        lambda out: look_up(INDICES, OFFSETS, weights=weights, mode=2, out=out), ValueError, message, fresh_out()
    )


def test_half_weights_are_taken_at_every_width(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    weights = np.linspace(-1, 1, 6).astype(np.float16)
    expected = reference.embedding_bag(rows, bits, DIM, INDICES, OFFSETS, weights=weights)
    assert_answered(lambda out: look_up(INDICES, OFFSETS, weights=weights, out=out), expected, same_bits)


def test_a_packed_table_of_another_width_is_refused(level: str, bits: int, rows: np.ndarray) -> None:
    table = qembag.QuantizedTable(rows, bits)
    for other in {8, 4, 2} - {bits}:
        message = f"weight must be a table of {other} bits, got one of {bits}"
        operator = getattr(ops, f"embedding_bag_{NAMES[other]}")
        assert_refused(lambda out, o=operator: o(table, INDICES, OFFSETS, out=out), ValueError, message, fresh_out())
        assert_raises(ValueError, message, lambda o=other: getattr(ops, f"embedding_{NAMES[o]}")(table, INDICES))


PREPACK = [
    (8, "embedding_bag_byte_prepack", ()),
    (4, "embedding_bag_4bit_prepack", ()),
    (4, "embedding_bag_4bit_prepack", (True,)),
    (2, "embedding_bag_2bit_prepack", ()),
    (2, "embedding_bag_2bit_prepack", (True,)),
]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("width", "name", "options"), PREPACK)
def test_rows_that_are_not_finite_are_refused(
    level: str, width: int, name: str, options: tuple[Any, ...], bad: float
) -> None:
    for kind in (np.float32, np.float16):
        for place in (0, 7, 19):
            weights = np.linspace(-1, 1, 120).reshape(6, 20).astype(kind)
            weights[3, place] = weights[5, 0] = bad
            assert_raises(
                ValueError,
                "weight[3] must be finite to be quantized, got a NaN or an infinity",
                lambda w=weights: getattr(ops, name)(w, *options),
            )
            assert_raises(
                ValueError,
                "weights[3] must be finite to be quantized, got a NaN or an infinity",
                lambda w=weights: qembag.quantize(w, width, method="greedy" if options else "minmax"),
            )


@pytest.mark.parametrize(("width", "name", "options"), PREPACK)
def test_rows_that_their_tail_cannot_hold_are_refused(
    level: str, width: int, name: str, options: tuple[Any, ...]
) -> None:
    weights = np.linspace(-1, 1, 120, dtype=np.float32).reshape(6, 20)
    low = -100_000 if width != 8 else -3e38
    high = 1 if width != 8 else 3e38
    weights[2, 3], weights[2, 5], weights[4] = low, high, weights[4] * 3e38
    tail = "float32" if width == 8 else "float16"
    text = (
        f"[2] must have a minimum and a scale that its tail can hold as {tail} at {width} bits, "
        f"got values from {low:g} to {high:g}"
    )
    assert_raises(ValueError, "weight" + text, lambda: getattr(ops, name)(weights, *options))
    assert_raises(
        ValueError, "weights" + text, lambda: qembag.quantize(weights, width, method="greedy" if options else "minmax")
    )


@pytest.mark.parametrize(("width", "value"), [(4, 1e6), (2, 2.1e5)])
def test_rows_whose_scale_overflows_float16_are_refused(level: str, width: int, value: float) -> None:
    weights = np.zeros((3, 8), dtype=np.float32)
    weights[1, 4] = value
    with pytest.raises(ValueError, match=rf"^weight\[1\] must have .* got values from 0 to {re.escape(f'{value:g}')}$"):
        getattr(ops, f"embedding_bag_{NAMES[width]}_prepack")(weights)


def test_bounds_that_are_not_finite_are_refused(level: str, bits: int) -> None:
    weights = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
    for bad in (np.nan, np.inf, -np.inf):
        for column in (0, 1):
            bounds = np.tile(np.float32([-1, 1]), (3, 1))
            bounds[1, column] = bad
            with pytest.raises(ValueError, match=r"\[1\]"):
                getattr(ops, f"embedding_bag_{NAMES[bits]}_prepack_with_rowwise_min_max")(weights, bounds)


def test_a_tiny_8_bit_range_keeps_torchs_bytes(level: str) -> None:
    weights = np.float32([[1, 1 + 2**-23, 1], [0, 5e-9, 1e-9], [0, 1e-12, 0], [7, 7, 7]])
    np.testing.assert_array_equal(ops.embedding_bag_byte_prepack(weights), reference.quantize(weights, 8))
    assert (ops.embedding_bag_byte_prepack(weights)[2, :3] == 0).all()


# ---- Indices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, NUM_ROWS, 2**31 - 1, -(2**31), 2**31, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_indices_out_of_range_are_refused(level: str, look_up: Callable[..., np.ndarray], value: int) -> None:
    for place, bag in ((0, 0), (1, 0), (2, 2), (5, 2)):
        indices = INDICES.copy()
        indices[place] = value
        for kind in [np.int64] if not -(2**31) <= value < 2**31 else [np.int32, np.int64]:
            message = f"indices[{place}] is {value} (bag {bag}): out of range for {TABLE}"
            given = indices.astype(kind)
            assert_refused(lambda out, i=given: look_up(i, OFFSETS, out=out), IndexError, message, fresh_out())
    square = np.zeros((3, 2), dtype=np.int64)
    square[1, 1] = square[2, 0] = value
    message = f"indices[1, 1] is {value} (bag 1): out of range for {TABLE}"
    assert_refused(lambda out: look_up(square, out=out), IndexError, message, fresh_out())


def test_the_first_and_the_last_row_are_found(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        indices = np.array([0, NUM_ROWS - 1], dtype=kind)
        expected = reference.embedding_bag(rows, bits, DIM, indices, np.array([0, 1]))
        assert_answered(lambda out, i=indices: look_up(i, [0, 1], out=out), expected, same_bits)


@pytest.mark.parametrize("value", [2**63, 2**63 + 5, 2**64 - 1])
def test_unsigned_indices_beyond_int64_are_shown_as_they_are(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], value: int
) -> None:
    indices = np.array([0, value, 3], dtype=np.uint64)
    message = f"indices[1] is {value} (bag 0): out of range for {TABLE}"
    assert_refused(lambda out: look_up(indices, [0], out=out), IndexError, message, fresh_out(1))
    assert_refused(lambda out: look_up(indices[::-1][::-1], [0], out=out), IndexError, message, fresh_out(1))
    offsets = np.array([0, value], dtype=np.uint64)
    message = f"offsets[1] is {value}: must be from 0 to 3, the number of indices"
    assert_refused(lambda out: look_up(INDICES[:3], offsets, out=out), ValueError, message, fresh_out(2))
    table = qembag.QuantizedTable(rows, bits)
    message = f"indices[1] is {value}: out of range for {TABLE}"
    assert_refused(lambda out: qembag.embedding(table, indices, out=out), IndexError, message, fresh_out(3))
    with pytest.raises(IndexError, match=f"^rows.1. is {value}: out of range"):
        table.dequantize(indices)


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_unsigned_numbers_beyond_int64_in_lists_and_buffers_are_shown_as_they_are(
    bits: int, rows: np.ndarray, value: int
) -> None:
    table = qembag.QuantizedTable(rows, bits)
    for indices in ([value], Buffer("Q", [value]), memoryview(np.array([value], dtype=np.uint64))):
        message = f"indices[0] is {value} (bag 0): out of range for {TABLE}"
        assert_refused(
            lambda out, i=indices: qembag.embedding_bag(table, i, [0], out=out), IndexError, message, fresh_out(1)
        )
        message = f"indices[0] is {value}: out of range for {TABLE}"
        assert_refused(lambda out, i=indices: qembag.embedding(table, i, out=out), IndexError, message, fresh_out(1))


NOT_INTEGERS = [
    np.zeros(6, dtype=np.bool_),
    np.zeros(6, dtype=np.float32),
    np.zeros(6),
    np.zeros(6, dtype=np.complex64),
    np.zeros(6, dtype=object),
    np.zeros(6, dtype="U3"),
    np.zeros(6, dtype="S3"),
    np.zeros(6, dtype="M8[s]"),
    np.zeros(6, dtype="m8[s]"),
    np.zeros(6, dtype=[("index", "i8")]),
    np.zeros(0),
]


@pytest.mark.parametrize("wrong", NOT_INTEGERS, ids=lambda wrong: f"{wrong.dtype}-{wrong.size}")
def test_arrays_that_are_not_integers_are_refused(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], wrong: np.ndarray
) -> None:
    came = f"got a {wrong.dtype} array of shape {wrong.shape}"
    message = f"indices must be an array of integers, {came}"
    assert_refused(lambda out: look_up(wrong, OFFSETS, out=out), TypeError, message, fresh_out())
    table = qembag.QuantizedTable(rows, bits)
    assert_refused(lambda out: qembag.embedding(table, wrong, out=out), TypeError, message, fresh_out(6))
    message = f"offsets must be an array of integers, {came}"
    assert_refused(lambda out: look_up(INDICES, wrong, out=out), TypeError, message, fresh_out())


def test_lists_that_are_not_integers_are_refused(level: str, look_up: Callable[..., np.ndarray]) -> None:
    for wrong in ([1.0], [True], [1j], ["1"], [None], [2**64], [{}], [-1, 2**63]):
        assert_fails_naming("indices", lambda out, w=wrong: look_up(w, [0], out=out), fresh_out(1))
        assert_fails_naming("offsets", lambda out, w=wrong: look_up(INDICES, w, out=out), fresh_out(1))


def test_ragged_lists_are_refused(level: str, look_up: Callable[..., np.ndarray]) -> None:
    ragged = [[1, 2], [3]]
    assert_fails_naming("indices", lambda out: look_up(ragged, out=out), fresh_out(2), ValueError)
    assert_fails_naming("offsets", lambda out: look_up(INDICES, ragged, out=out), fresh_out(2), ValueError)
    assert_fails_naming(
        "per_sample_weights", lambda out: look_up([[1, 2], [3, 4]], weights=ragged, out=out), fresh_out(2), ValueError
    )
    assert_fails_naming("compressed_indices_mapping", lambda out: look_up([[1]], mapping=ragged, out=out), fresh_out(1))


@pytest.mark.parametrize("shape", [(), (1, 2, 3), (2, 1, 1, 3)])
def test_indices_and_offsets_of_another_number_of_dimensions_are_refused(
    level: str, look_up: Callable[..., np.ndarray], shape: tuple[int, ...]
) -> None:
    array = np.zeros(shape, dtype=np.int64)
    came = f"got a int64 array of shape {shape}"
    message = f"indices must have 1 dimension (with offsets) or 2 (a row a bag), {came}"
    assert_refused(lambda out: look_up(array, OFFSETS, out=out), ValueError, message, fresh_out())
    message = f"offsets must have 1 dimension, {came}"
    assert_refused(lambda out: look_up(INDICES, array, out=out), ValueError, message, fresh_out())


def test_offsets_are_given_with_one_dimension_and_not_with_two(level: str, look_up: Callable[..., np.ndarray]) -> None:
    message = "offsets must be given for indices of 1 dimension, got None"
    assert_refused(lambda out: look_up(INDICES, out=out), ValueError, message, fresh_out())
    message = "offsets must be None for indices of 2 dimensions, whose rows are the bags, got offsets"
    square = INDICES.reshape(3, 2)
    assert_refused(lambda out: look_up(square, OFFSETS, out=out), ValueError, message, fresh_out())
    message = "offsets must hold at least the end of the last bag with include_last_offset, got none"
    nothing = np.empty(0, dtype=np.int64)
    assert_refused(
        lambda out: look_up(INDICES, nothing, include_last_offset=True, out=out), ValueError, message, fresh_out()
    )


def test_strided_swapped_and_misaligned_integers_count_as_what_they_hold(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    expected = reference.embedding_bag(rows, bits, DIM, INDICES, OFFSETS)

    def odd_ones(plain: np.ndarray) -> Iterator[np.ndarray]:
        for kind in (np.int32, np.int64, np.int16, np.uint64):
            yield np.repeat(plain, 2).astype(kind)[::2]
            yield plain[::-1].astype(kind)[::-1]
            yield plain.astype(np.dtype(kind).newbyteorder())
            misaligned = np.zeros(plain.size * np.dtype(kind).itemsize + 1, dtype=np.uint8)[1:].view(kind)
            misaligned[:] = plain
            yield misaligned

    for indices, offsets in zip(odd_ones(INDICES), odd_ones(OFFSETS), strict=True):
        assert_answered(lambda out, i=indices: look_up(i, OFFSETS, out=out), expected, same_bits)
        assert_answered(lambda out, o=offsets: look_up(INDICES, o, out=out), expected, same_bits)


def test_matrices_are_arrays_like_others(bits: int, rows: np.ndarray, same_bits: Callable[..., None]) -> None:
    table = qembag.QuantizedTable(rows, bits)
    square = INDICES.reshape(3, 2)
    matrix = np.ndarray.__new__(np.matrix, square.shape, square.dtype)
    matrix[:] = square
    same_bits(np.asarray(qembag.embedding_bag(table, matrix)), qembag.embedding_bag(table, square))
    same_bits(np.asarray(qembag.embedding(table, matrix)), qembag.embedding(table, square))


# ---- The lowest bad position, with threads -------------------------------------------------------------------------------


def test_the_lowest_bad_position_of_a_large_call_is_named(
    level: str, threads: int, bits: int, rng: np.random.Generator, rows: np.ndarray
) -> None:
    table = qembag.QuantizedTable(rows, bits)
    size = 30_000
    offsets = np.arange(0, size, 3)
    out = fresh_out(len(offsets))
    for _ in range(5):
        indices = rng.integers(0, NUM_ROWS, size)
        places = np.sort(rng.choice(size, 20, replace=False))
        indices[places] = rng.choice([-1, 10, 2**62], 20)
        message = f"indices[{places[0]}] is {indices[places[0]]} (bag {places[0] // 3}): out of range for {TABLE}"
        assert_refused(
            lambda out, i=indices: qembag.embedding_bag(table, i, offsets, out=out), IndexError, message, out
        )
        message = f"indices[{places[0]}] is {indices[places[0]]}: out of range for {TABLE}"
        assert_refused(lambda out, i=indices: qembag.embedding(table, i, out=out), IndexError, message, fresh_out(size))
        wrong = offsets.copy()
        wrong[places[0] // 3 + 1 :: 7] = size + 1
        message = f"offsets[{places[0] // 3 + 1}] is {size + 1}: must be from 0 to {size}, the number of indices"
        if places[0] // 3 + 1 < len(wrong):
            assert_refused(
                lambda out, i=indices, w=wrong: qembag.embedding_bag(table, i, w, out=out), ValueError, message, out
            )
        mapping = rng.integers(-1, NUM_ROWS, 50).astype(np.int32)
        mapping[40:] = NUM_ROWS
        logical = rng.integers(0, 40, size)
        logical[places] = 45
        message = f"compressed_indices_mapping[45] is 10 (indices[{places[0]}], bag {places[0] // 3}): {BAD_ROW}"
        operator = getattr(ops, f"embedding_bag_{NAMES[bits]}_rowwise_offsets")
        assert_refused(
            lambda out, i=logical, m=mapping, o=operator: o(rows, i, offsets, False, 0, True, None, m, out=out),
            IndexError,
            message,
            out,
        )


def test_the_lowest_bad_row_of_a_large_table_to_quantize_is_named(
    level: str, threads: int, bits: int, rng: np.random.Generator
) -> None:
    weights = rng.normal(size=(40_000, 16)).astype(np.float32)
    places = np.sort(rng.choice(len(weights), 9, replace=False))
    weights[places, rng.integers(0, 16, 9)] = np.nan
    with pytest.raises(ValueError, match=rf"^weights\[{places[0]}\] must be finite"):
        qembag.quantize(weights, bits)


# ---- Wrong objects in every argument ---------------------------------------------------------------------------------------


class Hostile:
    """An `__array__` that raises what it is told to, or returns it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class HostileInterface:
    def __init__(self, interface: Any) -> None:
        self.__array_interface__ = interface


WRONG = {
    "None": None,
    "object": object(),
    "text": "text",
    "bytes": b"bytes",
    "float": 3.5,
    "complex": 1j,
    "dict": {"a": 1},
    "set": {1, 2},
    "function": len,
    "class": int,
    "ellipsis": ...,
    "NaN": float("nan"),
    "ragged": [[1, 2], [3]],
    "objects": [object()],
    "dates": np.array(["2020-01-01"], dtype="M8[D]"),
    "__array__ returns text": Hostile("text"),
    "__array__ returns None": Hostile(None),
    "__array__ returns a list": Hostile([1, 2]),
    "__array__ returns text array": Hostile(np.array(["a"])),
    "__array__ returns 5 dimensions": Hostile(np.zeros((2, 1, 1, 1, 2), dtype="M8[D]")),
    "__array__ raises ValueError": Hostile(ValueError("boom")),
    "__array__ raises TypeError": Hostile(TypeError("boom")),
    "interface is a number": HostileInterface(5),
    "interface is empty": HostileInterface({}),
    "interface of a bad shape": HostileInterface({"shape": "x", "typestr": "<i8", "version": 3}),
    "interface of a negative shape": HostileInterface({"shape": (-3,), "typestr": "<i8", "version": 3}),
    "interface of a bad type": HostileInterface({"shape": (3,), "typestr": "garbage", "version": 3}),
}


def assert_fails_naming(
    argument: str,
    call: Callable[[Any], Any],
    out: np.ndarray,
    error: type[Exception] | tuple[type[Exception], ...] = (TypeError, ValueError),
) -> None:
    for given in (None, out):
        before = out.tobytes()
        with pytest.raises(error) as caught:
            call(given)
        assert str(caught.value).startswith(argument), f"{type(caught.value).__name__}: {caught.value}"
        assert out.tobytes() == before


MAY_BE_NONE = ("per_sample_weights", "compressed_indices_mapping")


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        (argument, wrong)
        for argument in ("indices", "offsets", *MAY_BE_NONE)
        for wrong in WRONG
        if wrong != "None" or argument not in MAY_BE_NONE
    ],
)
def test_wrong_objects_as_arrays_of_a_lookup_are_refused_by_name(
    look_up: Callable[..., np.ndarray], argument: str, wrong: str
) -> None:
    given = {"indices": INDICES, "offsets": OFFSETS}
    short = {"per_sample_weights": "weights", "compressed_indices_mapping": "mapping"}
    given[short.get(argument, argument)] = WRONG[wrong]
    assert_fails_naming(argument, lambda out: look_up(**given, out=out), fresh_out())


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_objects_in_the_public_functions_are_refused_by_name(bits: int, rows: np.ndarray, wrong: str) -> None:
    table, value, out = qembag.QuantizedTable(rows, bits), WRONG[wrong], fresh_out()
    weights = np.ones((2, 4), dtype=np.float32)

    def bag(**named: Any) -> Callable[[Any], Any]:
        given = {"table": table, "indices": INDICES, "offsets": OFFSETS, **named}
        return lambda out: qembag.embedding_bag(**{"out": out, **given})

    assert_fails_naming("table", bag(table=value), out)
    assert_fails_naming("mode", bag(mode=value), out)
    assert_fails_naming("table", lambda out: qembag.embedding(value, INDICES, out=out), out)
    assert_fails_naming("indices", lambda out: qembag.embedding(table, value, out=out), fresh_out(6))
    assert_fails_naming("bits", lambda out: qembag.quantize(weights, value), out)
    assert_fails_naming("method", lambda out: qembag.quantize(weights, method=value), out)
    assert_fails_naming("weights", lambda out: qembag.quantize(value, bits), out)
    assert_fails_naming("data", lambda out: qembag.QuantizedTable(value, bits), out)
    assert_fails_naming("bits", lambda out: qembag.QuantizedTable(rows, value), out)
    assert_fails_naming("keep", lambda out: table.prune(value), out)
    if value is not None:
        assert_fails_naming("padding_idx", bag(padding_idx=value), out)
        assert_fails_naming("num_threads", bag(num_threads=value), out)
        assert_fails_naming("num_threads", lambda out: qembag.quantize(weights, num_threads=value), out)
        assert_fails_naming("n must", lambda out: qembag.set_num_threads(value), out)
        assert_fails_naming("out", bag(out=value), out)
        assert_fails_naming("dtype", bag(dtype=value), out)
        assert_fails_naming("dim", lambda out: qembag.QuantizedTable(rows, bits, dim=value), out)
        assert_fails_naming("rows", lambda out: table.dequantize(value), out)
        assert_fails_naming(
            "compressed_indices_mapping",
            lambda out: qembag.QuantizedTable(rows, bits, compressed_indices_mapping=value),
            out,
        )


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_objects_in_the_operators_are_refused_by_name(bits: int, rows: np.ndarray, wrong: str) -> None:
    table, value, out = qembag.QuantizedTable(rows, bits), WRONG[wrong], fresh_out()
    stem = f"embedding_bag_{NAMES[bits]}"
    operators = {name: getattr(ops, name) for name in dir(ops) if name.startswith(stem)}
    weights = np.ones((2, 8), dtype=np.float32)
    bounds = np.tile(np.float32([0, 1]), (2, 1))
    for name, operator in operators.items():
        rest: tuple[Any, ...] = (INDICES, OFFSETS)
        if "pack" in name:
            rest = (bounds,) if "min_max" in name else ()
        assert_fails_naming("weight", lambda out, o=operator, r=rest: o(value, *r), out)
    for name, weight in (("_rowwise_offsets", rows), ("", table)):
        operator = operators[stem + name]
        assert_fails_naming("mode", lambda out, o=operator, w=weight: o(w, INDICES, OFFSETS, mode=value, out=out), out)
        if value is not None:
            assert_fails_naming("out", lambda _, o=operator, w=weight: o(w, INDICES, OFFSETS, out=value), out)
    meta = operators[f"{stem}_rowwise_offsets_meta"]
    assert_fails_naming("indices", lambda out: meta(rows, value, OFFSETS), out)
    assert_fails_naming("offsets", lambda out: meta(rows, INDICES, value), out)
    single = getattr(ops, f"embedding_{NAMES[bits]}")
    assert_fails_naming("weight", lambda out: single(value, INDICES), out)
    assert_fails_naming("indices", lambda out: single(table, value), out)
    bounded = operators[f"{stem}_prepack_with_rowwise_min_max"]
    assert_fails_naming("rowwise_min_max", lambda out: bounded(weights, value), out)
    codes, ones = np.ones((2, 4), dtype=np.uint8), np.ones(2, dtype=np.float32)
    assert_fails_naming("codes", lambda out: ops.embedding_bag_prepack(value, ones, ones, bits), out)
    assert_fails_naming("scales", lambda out: ops.embedding_bag_prepack(codes, value, ones, bits), out)
    assert_fails_naming("zero_points", lambda out: ops.embedding_bag_prepack(codes, ones, value, bits), out)
    assert_fails_naming("bits", lambda out: ops.embedding_bag_prepack(codes, ones, ones, value), out)
    assert_fails_naming("packed", lambda out: ops.embedding_bag_unpack(value), out)
    if bits != 8:
        prepack = operators[f"{stem}_prepack"]
        assert_fails_naming("nbins", lambda out: prepack(weights, True, value), out)
        if wrong != "float":
            assert_fails_naming("ratio", lambda out: prepack(weights, True, 200, value), out)


@pytest.mark.parametrize("ratio", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_a_greedy_ratio_that_is_no_share_is_refused(ratio: float) -> None:
    weights = np.ones((2, 8), dtype=np.float32)  # constant rows: the search would end at once
    with pytest.raises(ValueError, match=r"^ratio"):
        ops.embedding_bag_4bit_prepack(weights, True, 200, ratio)


def test_a_greedy_number_of_bins_beyond_int64_is_refused_by_name() -> None:
    weights = np.ones((2, 8), dtype=np.float32)
    for nbins in (0, -1, 2**70):
        with pytest.raises(ValueError, match=r"^nbins"):
            ops.embedding_bag_4bit_prepack(weights, True, nbins)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError, OSError, RecursionError])
@pytest.mark.parametrize("argument", ["indices", "offsets", "weights", "mapping"])
def test_what_an_array_method_raises_reaches_the_caller_and_spares_out(
    look_up: Callable[..., np.ndarray], argument: str, error: type[Exception]
) -> None:
    given = {"indices": INDICES, "offsets": OFFSETS, argument: Hostile(error("boom"))}
    out = fresh_out()
    before = out.tobytes()
    with pytest.raises((error, TypeError, ValueError)):
        look_up(**given, out=out)
    assert out.tobytes() == before


def test_an_array_method_that_changes_its_answer_is_asked_once(look_up: Callable[..., np.ndarray]) -> None:
    class Fickle:
        answers = 0

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            self.answers += 1
            return INDICES if self.answers == 1 else np.full(99, 2**62)

    indices = Fickle()
    np.testing.assert_array_equal(look_up(indices, OFFSETS), look_up(INDICES, OFFSETS))
    assert indices.answers == 1


def test_an_array_that_lies_about_itself_crashes_nothing(look_up: Callable[..., np.ndarray]) -> None:
    class Liar(np.ndarray):
        shape = property(lambda self: (6,))  # type: ignore[assignment]
        size = property(lambda self: 6)  # type: ignore[assignment]
        ndim = property(lambda self: 1)  # type: ignore[assignment]

    short = np.zeros(2, dtype=np.float32).view(Liar)
    out = fresh_out()
    before = out.tobytes()
    for given in ({"weights": short}, {"weights": short.astype(np.float16)}):
        with pytest.raises((TypeError, ValueError, SystemError)):
            look_up(INDICES, OFFSETS, **given, out=out)
        assert out.tobytes() == before
    with pytest.raises((TypeError, ValueError, SystemError)):
        look_up(INDICES, OFFSETS, out=np.zeros((1, 1), dtype=np.float32).view(Liar))


def test_buffers_are_read_as_arrays(
    bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    expected = look_up(INDICES, OFFSETS)
    for indices in (
        Buffer("q", INDICES),
        Buffer("i", INDICES),
        bytearray(INDICES.tolist()),
        memoryview(INDICES),
    ):
        same_bits(look_up(indices, OFFSETS), expected)
    same_bits(look_up(INDICES.tolist(), tuple(OFFSETS.tolist())), expected)
    same_bits(look_up(INDICES, Buffer("i", OFFSETS)), expected)


# ---- padding_idx, masks, num_threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10, -11, 2**31, 2**63, -(2**63) - 1, 2**100])
def test_a_padding_idx_out_of_range_is_refused(level: str, bits: int, rows: np.ndarray, value: int) -> None:
    table = qembag.QuantizedTable(rows, bits)
    message = f"padding_idx must be from -10 to 9 for a table of 10 embeddings, got {value}"
    assert_refused(
        lambda out: qembag.embedding_bag(table, INDICES, OFFSETS, padding_idx=value, out=out),
        ValueError,
        message,
        fresh_out(),
    )


def test_masks_of_another_length_are_refused(bits: int, rows: np.ndarray) -> None:
    table = qembag.QuantizedTable(rows, bits)
    for length in (0, 9, 11):
        assert_raises(
            ValueError,
            f"keep must have shape (10,) as a mask, got a bool array of shape ({length},)",
            lambda n=length: table.prune(np.ones(n, dtype=np.bool_)),
        )
        if length:  # which NumPy lets pass
            with pytest.raises(IndexError):
                table[np.ones(length, dtype=np.bool_)]
    for value in (-1, 10, 2**63 - 1):
        with pytest.raises(IndexError) as caught:
            table.prune([0, value, 3])
        assert str(caught.value) == f"keep[1] is {value}: out of range for a table of 10 rows"


@pytest.mark.parametrize("value", [0, -1, -(2**70), 1.5, True, np.bool_(True), "2", np.float32(2)])
def test_numbers_of_threads_that_are_none_are_refused(level: str, bits: int, rows: np.ndarray, value: Any) -> None:
    table = qembag.QuantizedTable(rows, bits)
    error = ValueError if type(value) is int else TypeError
    text = f"must be at least 1, got {value}" if error is ValueError else "must be a whole number, got "
    calls = [
        lambda out: qembag.embedding_bag(table, INDICES, OFFSETS, num_threads=value, out=out),
        lambda out: qembag.embedding(table, INDICES[:3], num_threads=value, out=out),
    ]
    for call in calls:
        assert_fails_naming(f"num_threads {text}", call, fresh_out(), error)
    with pytest.raises(error, match=f"^num_threads {text}"):
        qembag.quantize(np.ones((2, 4), dtype=np.float32), bits, num_threads=value)
    before = qembag.get_num_threads()
    with pytest.raises(error, match=f"^n {text}"):
        qembag.set_num_threads(value)
    assert qembag.get_num_threads() == before


MANY_THREADS = """
import numpy as np, qembag
rng = np.random.default_rng(0)
weights = rng.normal(size=(9000, 64)).astype(np.float32)
indices = rng.integers(0, 9000, (2000, 10))
table = qembag.quantize(weights, num_threads=1)
expected = qembag.embedding_bag(table, indices, num_threads=1)
assert np.array_equal(qembag.embedding_bag(table, indices, num_threads={n}), expected)
assert np.array_equal(qembag.quantize(weights, num_threads={n}).data, table.data)
qembag.set_num_threads({n})
assert np.array_equal(qembag.embedding_bag(table, indices, out=np.zeros_like(expected)), expected)
"""


def run(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child_environment(),
        check=False,
    )


@pytest.mark.parametrize("number", [1000, 10**6, 2**28, 2**29, 2**31 - 1, 2**40])
def test_any_number_of_threads_gives_the_same_bits(number: int) -> None:
    done = run(MANY_THREADS.format(n=number))
    assert done.returncode == 0, done.stderr


# ---- The table's rows and its mapping ---------------------------------------------------------------------------------------


def test_a_mapping_is_checked_when_a_table_is_made_and_again_when_it_is_used(
    level: str, bits: int, rows: np.ndarray, same_bits: Callable[..., None]
) -> None:
    mapping = np.arange(NUM_ROWS, dtype=np.int32)
    table = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
    before = qembag.embedding_bag(table, INDICES, OFFSETS)
    for value in (10, -2, 2**31 - 1, -(2**31)):
        mapping[4] = value
        message = f"compressed_indices_mapping[4] is {value} (indices[2], bag 2): {BAD_ROW}"
        assert_refused(
            lambda out: qembag.embedding_bag(table, INDICES, OFFSETS, out=out), IndexError, message, fresh_out()
        )
        message = f"compressed_indices_mapping[4] is {value} (indices[2]): {BAD_ROW}"
        assert_refused(lambda out: qembag.embedding(table, INDICES, out=out), IndexError, message, fresh_out(6))
        with pytest.raises(IndexError, match=rf"compressed_indices_mapping\[4\] is {value}"):
            table.dequantize()
        with pytest.raises(IndexError):
            qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
    mapping[4] = 4
    same_bits(qembag.embedding_bag(table, INDICES, OFFSETS), before)


def test_a_mapping_that_changes_its_shape_or_type_changes_no_table(
    bits: int, rows: np.ndarray, same_bits: Callable[..., None]
) -> None:
    mapping = np.arange(NUM_ROWS, dtype=np.int32)
    table = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
    before = qembag.embedding_bag(table, INDICES, OFFSETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy 2.5
        mapping.shape = (2, 5)
    assert mapping.shape == (2, 5)
    assert table.num_embeddings == NUM_ROWS
    same_bits(qembag.embedding_bag(table, INDICES, OFFSETS), before)


def test_an_index_beyond_the_mapping_is_refused(level: str, look_up: Callable[..., np.ndarray]) -> None:
    mapping = np.array([0, 1, -1, 2, 3, 4], dtype=np.int32)
    message = "indices[5] is 9 (bag 2): out of range for a pruned table of 6 rows"
    assert_refused(lambda out: look_up(INDICES, OFFSETS, mapping=mapping, out=out), IndexError, message, fresh_out())


def test_mappings_of_another_type_or_shape_are_refused(level: str, look_up: Callable[..., np.ndarray]) -> None:
    name = "compressed_indices_mapping"
    for kind in (np.int64, np.float64, np.uint32, np.int16):
        mapping = np.arange(10, dtype=kind)
        message = f"{name} must be an array of int32, got a {mapping.dtype} array of shape (10,)"
        assert_refused(
            lambda out, m=mapping: look_up(INDICES, OFFSETS, mapping=m, out=out), TypeError, message, fresh_out()
        )
    for shape in [(), (2, 5), (1, 1)]:
        message = f"{name} must have 1 dimension, got a int32 array of shape {shape}"
        mapping = np.zeros(shape, dtype=np.int32)
        assert_refused(
            lambda out, m=mapping: look_up(INDICES, OFFSETS, mapping=m, out=out), ValueError, message, fresh_out()
        )


def test_pruned_weights_without_a_mapping_are_refused(level: str, bits: int, rows: np.ndarray) -> None:
    table = qembag.QuantizedTable(rows, bits)
    message = "compressed_indices_mapping must be given with pruned_weights=True, got None"
    for name, weight in (("_rowwise_offsets", rows), ("", table)):
        operator = getattr(ops, f"embedding_bag_{NAMES[bits]}{name}")
        assert_refused(
            lambda out, o=operator, w=weight: o(w, INDICES, OFFSETS, pruned_weights=True, out=out),
            ValueError,
            message,
            fresh_out(),
        )
    assert_raises(
        ValueError, message, lambda: getattr(ops, f"embedding_{NAMES[bits]}")(table, INDICES, pruned_weights=True)
    )


def test_rows_of_another_type_shape_or_layout_are_refused(level: str, bits: int, rows: np.ndarray) -> None:
    for wrong, error, text in [
        (rows.astype(np.int8), TypeError, "must be an array of uint8, got a int8 array of shape"),
        (rows[0], ValueError, "must have 2 dimensions (rows, bytes of a row), got a uint8 array of shape"),
        (rows[None], ValueError, "must have 2 dimensions (rows, bytes of a row), got a uint8 array of shape"),
        (rows[:, ::2], ValueError, "must have the bytes of a row side by side, got strides"),
        (rows[:, ::-1], ValueError, "must have the bytes of a row side by side, got strides"),
        (rows.T, ValueError, "must have the bytes of a row side by side, got strides"),
        (rows[:, :4], ValueError, f"must have rows of at least {9 if bits == 8 else 5} bytes at {bits} bits"),
        (rows[:, :0], ValueError, f"must have rows of at least {9 if bits == 8 else 5} bytes at {bits} bits"),
    ]:
        operator = getattr(ops, f"embedding_bag_{NAMES[bits]}_rowwise_offsets")
        assert_fails_naming(
            f"weight {text}", lambda out, w=wrong, o=operator: o(w, INDICES, OFFSETS, out=out), fresh_out(), error
        )
        assert_fails_naming(f"data {text}", lambda out, w=wrong: qembag.QuantizedTable(w, bits), fresh_out(), error)


def test_rows_at_any_stride_and_read_only_are_read(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    row_bytes = rows.shape[1]
    wide = np.zeros((NUM_ROWS, row_bytes + 5), dtype=np.uint8)
    wide[:, 3:-2] = rows
    backwards = rows[::-1].copy()[::-1]
    read_only = rows.copy()
    read_only.flags.writeable = False
    expected = reference.embedding_bag(rows, bits, DIM, INDICES, OFFSETS)
    for given in (wide[:, 3:-2], np.repeat(rows, 2, axis=0)[::2], backwards, read_only):
        assert_answered(lambda out, r=given: look_up(INDICES, OFFSETS, rows=r, out=out), expected, same_bits)
    same = np.broadcast_to(rows[:1], rows.shape)
    expected = reference.embedding_bag(same, bits, DIM, INDICES, OFFSETS)
    assert_answered(lambda out: look_up(INDICES, OFFSETS, rows=same, out=out), expected, same_bits)


# ---- Nothing --------------------------------------------------------------------------------------------------------------------


def test_no_indices_no_bags_and_no_rows(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    nothing = np.empty(0, dtype=np.int64)
    zeros = np.zeros((3, DIM), dtype=np.float32)
    square = np.empty((3, 0), dtype=np.int64)
    for given in (rows, rows[:0]):
        for indices in (nothing, nothing.astype(np.int32), []):
            assert_answered(lambda out, i=indices, r=given: look_up(i, [0, 0, 0], rows=r, out=out), zeros, same_bits)
            assert_answered(
                lambda out, i=indices, r=given: look_up(i, [0] * 4, include_last_offset=True, rows=r, out=out),
                zeros,
                same_bits,
            )
            assert_answered(lambda out, i=indices, r=given: look_up(i, [], rows=r, out=out), zeros[:0], same_bits)
            assert_answered(
                lambda out, i=indices, r=given: look_up(i, [0], include_last_offset=True, rows=r, out=out),
                zeros[:0],
                same_bits,
            )
        assert_answered(lambda out, r=given: look_up(square, rows=r, out=out), zeros, same_bits)
        assert_answered(lambda out, r=given: look_up(square.T, rows=r, out=out), zeros[:0], same_bits)


def test_a_table_without_rows_is_a_table(
    level: str, bits: int, rows: np.ndarray, same_bits: Callable[..., None]
) -> None:
    for empty in (rows[:0], np.empty((0, rows.shape[1]), dtype=np.uint8)):
        table = qembag.QuantizedTable(empty, bits)
        assert table.shape == (0, DIM)
        nothing = np.empty((0, DIM), dtype=np.float32)
        same_bits(table.dequantize(), nothing)
        same_bits(qembag.embedding(table, []), nothing)
        same_bits(qembag.embedding(table, np.empty((2, 0), np.int32)), nothing.reshape(2, 0, DIM))
        assert table.codes().shape == (0, DIM)
        assert table.scales.shape == table.biases.shape == (0,)
        assert_refused(
            lambda out, t=table: qembag.embedding(t, [0], out=out),
            IndexError,
            "indices[0] is 0: out of range for a table of 0 rows",
            fresh_out(1),
        )
        all_pruned = qembag.QuantizedTable(empty, bits, compressed_indices_mapping=np.full(4, -1, dtype=np.int32))
        same_bits(qembag.embedding(all_pruned, [0, 3]), np.zeros((2, DIM), dtype=np.float32))
    assert qembag.quantize(np.empty((0, DIM), dtype=np.float32), bits).shape == (0, DIM)


# ---- out ---------------------------------------------------------------------------------------------------------------------------


def test_outputs_of_another_shape_or_type_are_refused(
    level: str, bits: int, look_up: Callable[..., np.ndarray]
) -> None:
    for shape in [(2, DIM), (4, DIM), (3, DIM - 1), (3, DIM + 1), (3 * DIM,), (1, 3, DIM), (), (0, DIM), (0,)]:
        out = np.ones(shape, dtype=np.float32)
        assert_raises(
            ValueError,
            f"out must be a float32 array of shape (3, 12), got a float32 array of shape {shape}",
            lambda o=out: look_up(INDICES, OFFSETS, out=o),
        )
        assert (out == 1).all()
    for kind in (np.float64, np.int32, np.uint32, np.complex64, np.dtype(np.float32).newbyteorder()):
        out = np.ones((3, DIM), dtype=kind)
        with pytest.raises(ValueError, match=r"^out must be a float32 array of shape \(3, 12\), got a "):
            look_up(INDICES, OFFSETS, out=out)
        assert (out == 1).all()


def test_outputs_that_rows_cannot_be_written_to_are_refused(level: str, look_up: Callable[..., np.ndarray]) -> None:
    read_only = np.ones((3, DIM), dtype=np.float32)
    read_only.flags.writeable = False
    base = np.ones(400, dtype=np.float32)
    side_by_side = "out must have the elements of a row side by side, got strides"
    overlap = "out must have rows that lie apart, one after the other, got strides"
    strided = np.lib.stride_tricks.as_strided
    for out, text in [
        (read_only, "out must be writeable, got a read-only array"),
        (base[: 6 * DIM].reshape(3, 2 * DIM)[:, ::2], side_by_side),
        (base[: 3 * DIM].reshape(DIM, 3).T, side_by_side),
        (base[: 3 * DIM].reshape(3, DIM)[:, ::-1], side_by_side),
        (strided(base, (3, DIM), (4 * DIM, 0)), side_by_side),
        (strided(base, (3, DIM), (0, 4)), overlap),
        (strided(base, (3, DIM), (4, 4)), overlap),
        (strided(base, (3, DIM), (4 * DIM - 4, 4)), overlap),
        (strided(base[200:], (3, DIM), (-4 * DIM + 4, 4)), overlap),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            look_up(INDICES, OFFSETS, out=out)
        assert (base == 1).all()
        assert (read_only == 1).all()


def test_outputs_at_any_distance_between_rows_are_written_and_nothing_between(
    level: str, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    expected = look_up(INDICES, OFFSETS)
    base = np.ones((6, DIM + 5), dtype=np.float32)
    for out in (base[:3, 2 : DIM + 2], base[::2, 5:], base[::-2, :DIM], base[4:1:-1, 1 : DIM + 1]):
        base[:] = 1
        assert look_up(INDICES, OFFSETS, out=out) is out
        same_bits(out.copy(), expected)
        out[:] = 1
        assert (base == 1).all()
    odd = np.zeros(3 * DIM * 4 + 1, dtype=np.uint8)[1:].view(np.float32).reshape(3, DIM)
    look_up(INDICES, OFFSETS, out=odd)
    same_bits(odd.copy(), expected)


def test_an_output_that_shares_memory_with_an_input_is_refused(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray]
) -> None:
    memory = np.zeros(4096, dtype=np.uint8)
    out = memory[: 3 * DIM * 4].view(np.float32).reshape(3, DIM)

    def within(array: np.ndarray, place: int) -> np.ndarray:
        given = memory[place : place + array.nbytes].view(array.dtype).reshape(array.shape)
        given[:] = array
        return given

    mapping = np.arange(NUM_ROWS, dtype=np.int32)
    weights = np.ones(6, dtype=np.float32)
    for name, argument, array in [
        ("the table", "rows", rows),
        ("indices", "indices", INDICES),
        ("offsets", "offsets", OFFSETS),
        ("per_sample_weights", "weights", weights),
        ("compressed_indices_mapping", "mapping", mapping),
    ]:
        for place in (0, 3 * DIM * 4 - 8):
            given = {"indices": INDICES, "offsets": OFFSETS, "rows": rows, argument: within(array, place)}
            before = memory.tobytes()
            assert_raises(
                ValueError,
                f"out must share no memory with {name}, got an array that does",
                lambda g=given: look_up(**g, out=out),
            )
            assert memory.tobytes() == before
        given[argument] = within(array, 3 * DIM * 4)
        look_up(**given, out=out)


@pytest.mark.parametrize("disguise", [memoryview, lambda array: Hostile(array)], ids=["buffer", "__array__"])
@pytest.mark.parametrize("argument", ["indices", "offsets", "weights", "mapping", "rows"])
def test_an_output_that_shares_memory_with_an_input_behind_a_buffer_is_refused(
    bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], argument: str, disguise: Callable[..., Any]
) -> None:
    arrays = {
        "indices": INDICES,
        "offsets": OFFSETS,
        "weights": np.ones(6, dtype=np.float32),
        "mapping": np.arange(NUM_ROWS, dtype=np.int32),
        "rows": rows,
    }
    memory = np.zeros(1024, dtype=np.uint8)
    out = memory[: 3 * DIM * 4].view(np.float32).reshape(3, DIM)
    array = arrays[argument]
    inside = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    inside[:] = array
    given = {"indices": INDICES, "offsets": OFFSETS, "rows": rows, argument: disguise(inside)}
    before = memory.tobytes()
    with pytest.raises(ValueError, match=r"^out must share no memory with "):
        look_up(**given, out=out)
    assert memory.tobytes() == before


def test_an_output_that_shares_memory_with_a_mapping_to_be_copied_is_refused(bits: int, rows: np.ndarray) -> None:
    """Found by fuzzing: the copy lies apart from the output, and so the caller's own mapping was written over."""
    operators = {f"embedding_bag_{NAMES[bits]}_rowwise_offsets": rows}
    operators[f"embedding_bag_{NAMES[bits]}"] = qembag.QuantizedTable(rows, bits)
    memory = np.zeros(3 * DIM, dtype=np.float32)
    mapping = memory.view(np.int32)[NUM_ROWS - 1 :: -1]
    mapping[:] = np.arange(NUM_ROWS)
    before = memory.tobytes()
    for name, weight in operators.items():
        with pytest.raises(ValueError, match=r"^out must share no memory with compressed_indices_mapping, got "):
            getattr(ops, name)(
                weight,
                INDICES,
                OFFSETS,
                pruned_weights=True,
                compressed_indices_mapping=mapping,
                out=memory.reshape(3, DIM),
            )
        assert memory.tobytes() == before


def test_a_mapping_is_converted_once_for_its_rows_and_for_where_it_lies(bits: int, rows: np.ndarray) -> None:
    """What it answers the second time lies elsewhere."""
    memory = np.zeros(3 * DIM, dtype=np.float32)
    answers = [memory.view(np.int32)[NUM_ROWS - 1 :: -1]]

    class Mapping:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            return answers.pop() if answers else np.arange(NUM_ROWS, dtype=np.int32)

    answers[0][:] = np.arange(NUM_ROWS)
    before = memory.tobytes()
    with pytest.raises(ValueError, match=r"^out must share no memory with compressed_indices_mapping, got "):
        getattr(ops, f"embedding_bag_{NAMES[bits]}_rowwise_offsets")(
            rows,
            INDICES,
            OFFSETS,
            pruned_weights=True,
            compressed_indices_mapping=Mapping(),
            out=memory.reshape(3, DIM),
        )
    assert memory.tobytes() == before


def test_an_output_between_the_elements_of_an_input_is_taken(
    level: str, bits: int, rows: np.ndarray, look_up: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    arrays = {
        "indices": INDICES,
        "offsets": np.array([0, 2, 2, 4, 5, 6]),
        "weights": np.linspace(-1, 1, 6).astype(np.float32),
        "mapping": np.array([5, 1, -1, 2, 3, 4], dtype=np.int32),
        "rows": rows[:6],
    }
    for argument, array in arrays.items():
        given = {"indices": INDICES % 6, "offsets": arrays["offsets"], argument: array}
        if argument == "indices":
            given["indices"] = array % 6
        expected = look_up(**given)
        together = np.zeros(6, dtype=[("out", np.float32, (DIM,)), ("in", array.dtype, array.shape[1:])])
        together["in"] = given[argument]
        kept = together["in"].copy()
        out = together["out"]
        given[argument] = together["in"]
        assert look_up(**given, out=out) is out
        same_bits(out.copy(), expected)
        np.testing.assert_array_equal(together["in"], kept)


def test_outputs_of_single_rows_are_checked_like_those_of_bags(level: str, bits: int, rows: np.ndarray) -> None:
    table = qembag.QuantizedTable(rows, bits)
    square = INDICES.reshape(3, 2)
    for shape in [(3, 2, DIM - 1), (6, DIM), (2, 3, DIM), (3, 2), (3, 2, DIM, 1)]:
        out = np.ones(shape, dtype=np.float32)
        message = f"out must be a float32 array of shape (3, 2, 12), got a float32 array of shape {shape}"
        assert_raises(ValueError, message, lambda o=out: qembag.embedding(table, square, out=o))
        assert (out == 1).all()
    base = np.ones((3, 4, DIM + 3), dtype=np.float32)
    out = base[:, ::2, 1:-2]
    assert qembag.embedding(table, square, out=out) is out
    np.testing.assert_array_equal(out, qembag.embedding(table, square))
    out[:] = 1
    assert (base == 1).all()
    square[2, 1] = 10
    out = np.ones((3, 2, DIM), dtype=np.float32)
    with pytest.raises(IndexError, match=r"^indices\[2, 1\] is 10: out of range for a table of 10 rows$"):
        qembag.embedding(table, square, out=out)
    assert (out == 1).all()
    square[2, 1] = 9
    memory = np.zeros(6 * DIM, dtype=np.float32)
    inside = memory.view(np.int64)[:6].reshape(3, 2)
    inside[:] = square
    with pytest.raises(ValueError, match=r"^out must share no memory with indices"):
        qembag.embedding(table, inside, out=memory.reshape(3, 2, DIM))


def test_dtypes_that_are_none_of_the_outputs_are_refused(level: str, bits: int, rows: np.ndarray) -> None:
    table = qembag.QuantizedTable(rows, bits)
    for dtype in (np.float64, np.int32, "complex64", ">f4" if sys.byteorder == "little" else "<f4"):
        assert_fails_naming(
            "dtype must be float32 or float16",
            lambda out, d=dtype: qembag.embedding_bag(table, INDICES, OFFSETS, dtype=d, out=out),
            fresh_out(),
            ValueError,
        )
    message = "out must be a float16 array of shape (3, 12), got a float32 array of shape (3, 12)"
    out = fresh_out()
    assert_raises(ValueError, message, lambda: qembag.embedding_bag(table, INDICES, OFFSETS, dtype=np.float16, out=out))


@pytest.mark.parametrize(
    "dtype", ["nonsense", "f4,(", "(-1,)f4", {"names": ["a"], "formats": []}, ("f4", -1)], ids=repr
)
def test_what_numpy_cannot_read_as_a_dtype_is_refused_by_name(bits: int, rows: np.ndarray, dtype: Any) -> None:
    """Found by fuzzing: NumPy raises SyntaxError, or ValueError, for some."""
    table = qembag.QuantizedTable(rows, bits)
    message = f"dtype must be float32 or float16, got {dtype!r}"
    assert_refused(
        lambda out: qembag.embedding_bag(table, INDICES, OFFSETS, dtype=dtype, out=out), TypeError, message, fresh_out()
    )


# ---- What torch does with it -------------------------------------------------------------------------------------------------------


CRASHES = """
import os, sys, json
import numpy as np
import torch, qembag
from qembag import ops

names = {8: "byte", 4: "4bit", 2: "2bit"}
indices, offsets = np.array([3, 1, 4, 1, 5, 9]), np.array([0, 2, 2])
mapping = np.arange(10, dtype=np.int32)
bad = {value: np.where(mapping == 4, value, mapping).astype(np.int32) for value in (-2, 12, 2**30)}
rows = {
    "no weights": ((indices, offsets), dict(per_sample_weights=np.empty(0, np.float32)), ValueError),
    "short weights": ((indices, offsets), dict(per_sample_weights=np.ones(2, np.float32)), ValueError),
    **{f"mapping {value}": ((indices, offsets), dict(pruned_weights=True, compressed_indices_mapping=wrong), IndexError)
       for value, wrong in bad.items()},
    "decreasing offsets": ((indices, np.array([0, 4, 2])), {}, ValueError),
    "negative offset": ((indices, np.array([-1, 2, 2])), {}, ValueError),
    "last offset beyond": ((indices, np.array([0, 2, 2000])), dict(include_last_offset=True), ValueError),
    "offset that wraps": ((indices, np.array([0, 2, 2**32 + 2])), {}, ValueError),
    "negative index": ((np.array([-1]), np.array([0])), {}, IndexError),
    "huge index": ((np.array([2**60]), np.array([0])), {}, IndexError),
}

def in_child(call):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = call()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def tensor(value):
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value) if value.size else torch.empty(0)  # whose memory is at NULL

report = {}
for name, (arguments, named, error) in rows.items():
    for bits, width in names.items():
        weight = np.ones((10, 16), dtype=np.uint8)
        operator = f"embedding_bag_{width}_rowwise_offsets"

        def theirs():
            torch_operator = getattr(torch.ops.quantized, operator)
            try:
                torch_operator(tensor(weight), *map(tensor, arguments), **{k: tensor(v) for k, v in named.items()})
            except RuntimeError:
                return 3
            return 0

        def ours():
            before = np.full((3 - named.get("include_last_offset", 0), 0), 0)
            try:
                getattr(ops, operator)(weight, *arguments, **named)
            except error:
                return 7
            return 0

        report[f"{name}, {bits} bits"] = in_child(theirs), in_child(ours)
print(json.dumps(report))
"""


@pytest.mark.torch
def test_what_crashes_torch_is_an_error_of_ours_in_the_same_process() -> None:
    """How torch ends (a signal's number, negative; 3: it raised; 0: it answered something) is printed, not asserted."""
    pytest.importorskip("torch")
    done = run(CRASHES, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 33
    for name, (theirs, ours) in report.items():
        print(f"{name}: torch {theirs}")
        assert ours == 7, (name, theirs, ours, done.stderr)


# ---- Flags, codes, and numbers beyond float32 ------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["no", 2, 1.0, None, np.array([0, 1])])
def test_flags_are_true_or_false(look_up: Callable[..., np.ndarray], value: Any) -> None:
    with pytest.raises(TypeError, match=r"^include_last_offset must be True or False, got "):
        look_up(INDICES, OFFSETS, include_last_offset=value)
    with pytest.raises(TypeError, match=r"^optimized_qparams must be True or False, got "):
        ops.embedding_bag_4bit_prepack(np.ones((2, 8), dtype=np.float32), value)


def test_a_code_that_is_too_large_is_named() -> None:
    with pytest.raises(ValueError, match=r"^codes\[1, 1\] is 16: must be from 0 to 15 at 4 bits$"):
        ops.embedding_bag_prepack(np.array([[1, 2], [3, 16]], dtype=np.uint8), [1, 2], [0, 1], 4)


def test_numbers_beyond_float32_warn_nobody() -> None:
    with pytest.raises(ValueError, match=r"^weights\[0\] must be finite"):
        qembag.quantize([[1e300, 0]])
    table = qembag.quantize(np.ones((2, 4), dtype=np.float32))
    assert not np.isfinite(qembag.embedding_bag(table, [0], [0], per_sample_weights=[1e300])).any()


def test_a_masked_output_is_refused(rows: np.ndarray, bits: int) -> None:
    table = qembag.QuantizedTable(rows, bits)
    out = np.ma.zeros((1, table.dim), dtype=np.float32)
    with pytest.raises(TypeError, match=r"^out must be an array without a mask, got MaskedArray$"):
        qembag.embedding_bag(table, [0], [0], out=out)


@pytest.mark.parametrize("dim", [8, 300, 3000])
@pytest.mark.parametrize("offset", [-1, 4])
def test_the_end_of_no_bags_must_lie_within_the_indices_too(level: str, dim: int, offset: int) -> None:
    table = qembag.quantize(np.ones((4, dim), dtype=np.float32))
    with pytest.raises(ValueError, match=rf"^offsets\[0\] is {offset}: must be from 0 to 3, the number of indices$"):
        qembag.embedding_bag(table, [0, 1, 2], [offset], include_last_offset=True)
    assert qembag.embedding_bag(table, [0, 1, 2], [3], include_last_offset=True).shape == (0, dim)


@fenced.needs_fences
@pytest.mark.parametrize("end", [-(2**63), -(2**63) + 1, -(2**63) + 7, -1])
def test_no_end_makes_a_lookup_read_beyond_its_indices(level: str, bits: int, rows: np.ndarray, end: int) -> None:
    """So far below zero that a distance subtracted from it comes out above: found by UndefinedBehaviorSanitizer."""
    indices = fenced.empty(200, "i8", at="end")
    indices[:] = np.arange(200) % NUM_ROWS
    table = qembag.QuantizedTable(rows, bits)
    for options in ({}, {"per_sample_weights": np.ones(200, np.float32)}, {"padding_idx": 0}, {"mode": "max"}):
        with pytest.raises(ValueError, match=rf"^offsets\[4\] is {end}: "):
            qembag.embedding_bag(table, indices, np.array([0, 100, 200, 200, end]), include_last_offset=True, **options)
