"""Every bad input gets the right answer or a clear error, and after an error `out` is bit for bit what it was.

Each message is written out here. That it comes where it must, and nowhere else, is also what the rules in
`support/rules.py` say, and each test asks them too. Objects that are no arrays at all are in `test_hostile.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from array import array as Buffer
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import qembag
import reference
from conftest import child_environment
from qembag import ops
from support import fenced
from support.arrays import PLACES, Answers, empty, place, same_bits
from support.layouts import MODES, NAMES, packed_rows
from support.lookups import Bags, SingleRows, Table
from support.packing import Packing

DIM = 12
NUM_ROWS = 10
INDICES = np.array([3, 1, 4, 1, 5, 9], dtype=np.int64)
SQUARE = INDICES.reshape(3, 2)
OFFSETS = np.array([0, 2, 2], dtype=np.int64)
ONES = np.ones(6, dtype=np.float32)
MAPPING = "compressed_indices_mapping"
TABLE = "a table of 10 rows"
BAD_ROW = "must be -1 or the number of a row, in a table of 10 rows"


@pytest.fixture
def rows(bits: int, rng: np.random.Generator) -> np.ndarray:
    return packed_rows(rng, NUM_ROWS, DIM, bits)


@dataclass
class Ask:
    """Makes calls for bags of `rows`, by the public function or one of the reference's two operators of this width."""

    family: str
    bits: int
    rows: np.ndarray

    def __call__(self, indices: Any = INDICES, offsets: Any = OFFSETS, *, rows: Any = None, **given: Any) -> Bags:
        rows, mapping = self.rows if rows is None else rows, given.pop("mapping", None)
        if self.family == "public":
            return Bags("public", Table(rows, self.bits, mapping=mapping), indices, offsets, **given)
        if "mode" in given:
            given["mode"] = MODES.index(given["mode"])
        pruned = {"pruned": mapping is not None, "mapping": mapping}
        return Bags(self.family, Table(rows, self.bits), indices, offsets, **pruned, **given)


@pytest.fixture(params=["public", "rowwise", "packed"])
def ask(request: pytest.FixtureRequest, level: str, bits: int, rows: np.ndarray) -> Ask:
    return Ask(request.param, bits, rows)


@pytest.fixture
def table(bits: int, rows: np.ndarray) -> Table:
    return Table(rows, bits)


@pytest.fixture
def public(level: str, bits: int, rows: np.ndarray) -> Ask:
    return Ask("public", bits, rows)


def fresh_out(shape: tuple[int, ...] = (3, DIM)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint32).view(np.float32).reshape(shape)


def raises(error: type[Exception], message: str, call: Callable[..., Any], *out: Any, whole: bool = True) -> None:
    """Exactly this error, with this text or, if not the whole one, one that begins so."""
    before = [given.tobytes() for given in out]
    with pytest.raises(error) as caught:
        call(*out)
    assert type(caught.value) is error
    assert str(caught.value) == message if whole else str(caught.value).startswith(message), caught.value
    assert [given.tobytes() for given in out] == before


def refused(call: Any, error: type[Exception], message: str, whole: bool = True) -> None:
    """A call without an `out` and with one, which it leaves alone. The rules know of this error and no other."""
    verdict = call.judge()
    assert verdict.faults == {(error, message.split("[")[0].split()[0])}, message
    raises(error, message, call, whole=whole)
    if getattr(call, "takes_out", True):
        raises(error, message, call, fresh_out(verdict.shape or (3, DIM)), whole=whole)


def answered(call: Any, expected: np.ndarray | None = None) -> None:
    """A call without an `out` and with one gives what is expected, which is what the oracle says."""
    verdict = call.judge()
    assert not verdict.faults
    if expected is None:
        expected = verdict.expected()
    same_bits(verdict.expected(), expected)
    same_bits(call(), expected)
    out = np.full(expected.shape, np.nan, dtype=expected.dtype)
    assert call(out) is out
    same_bits(out, expected)


# ---- The table of what torch 2.13.0 does wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 5, 7])
def test_per_sample_weights_of_another_length_are_refused(ask: Ask, length: int) -> None:
    message = f"per_sample_weights must have the shape of indices, (6,), got ({length},)"
    refused(ask(weights=np.ones(length, dtype=np.float32)), ValueError, message)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1), (1, 3, 2), ()])
def test_per_sample_weights_of_another_shape_are_refused(ask: Ask, shape: tuple[int, ...]) -> None:
    message = f"per_sample_weights must have the shape of indices, (3, 2), got {shape}"
    refused(ask(SQUARE, None, weights=np.ones(shape, dtype=np.float32)), ValueError, message)


@pytest.mark.parametrize("value", [-2, -(2**31), 10, 11, 2**30, 2**31 - 1])
def test_mapping_values_that_are_no_rows_are_refused(ask: Ask, value: int) -> None:
    mapping = np.array([0, 9, -1, 8, value, 7, 6, 5, 4, -1, value], dtype=np.int32)
    place = "" if ask.family == "public" else " (indices[2], bag 2)"
    refused(ask(mapping=mapping), IndexError, f"{MAPPING}[4] is {value}{place}: {BAD_ROW}")


def test_a_bad_mapping_value_that_no_index_leads_to_is_never_used(level: str, bits: int, rows: np.ndarray) -> None:
    mapping = np.array([0, 9, -2, 8, -1, 7, 2**30, 5, 4, 3], dtype=np.int32)
    answered(Ask("rowwise", bits, rows)(mapping=mapping))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_a_first_offset_above_zero_starts_the_first_bag_there(ask: Ask, kind: type) -> None:
    indices = INDICES.copy()
    indices[0] = 2**40  # belongs to no bag, so it is never read
    answered(ask(indices, np.array([1, 3, 3, 4], dtype=kind)))


@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_decreasing_offsets_are_refused(ask: Ask, include_last_offset: bool, kind: type) -> None:
    call = ask(offsets=np.array([0, 4, 3, 6, 2], dtype=kind), include_last_offset=include_last_offset)
    refused(call, ValueError, "offsets[2] is 3: must not be below the offset before it")


@pytest.mark.parametrize("value", [-1, 7, 2**31 - 1, 2**32 + 2, 2**63 - 1, -(2**63), -(2**32) + 2])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_offsets_beyond_the_indices_are_refused(ask: Ask, value: int, include_last_offset: bool) -> None:
    for number in range(3):
        offsets = OFFSETS.copy()
        offsets[number] = value
        message = f"offsets[{number}] is {value}: must be from 0 to 6, the number of indices"
        for kind in [np.int64] if abs(value) >= 2**31 else [np.int32, np.int64]:
            call = ask(offsets=offsets.astype(kind), include_last_offset=include_last_offset)
            refused(call, ValueError, message)


def test_indices_after_the_last_offset_belong_to_no_bag(ask: Ask) -> None:
    indices, offsets = np.concatenate([INDICES, [-7, 2**62]]), np.array([0, 2, 2, 6])
    answered(ask(indices, offsets, include_last_offset=True), ask(offsets=offsets[:-1]).judge().expected())


def test_include_last_offset_is_ignored_with_two_dimensional_indices(ask: Ask) -> None:
    answered(ask(SQUARE, None, include_last_offset=True), ask(SQUARE, None).judge().expected())


@pytest.mark.parametrize("way", [*PLACES, "broadcast"])
def test_arrays_in_any_memory_count_as_what_they_hold(ask: Ask, way: str) -> None:
    mapping = np.arange(15, dtype=np.int32) % NUM_ROWS
    mapping[::3] = -1
    for kind in (np.int32, np.int64, np.int16, np.uint64):
        answered(ask(place(INDICES.astype(kind), way).value))
        answered(ask(offsets=place(OFFSETS.astype(kind), way).value))
    for kind in (np.float32, np.float16):
        answered(ask(weights=place(np.linspace(-1, 2, 6).astype(kind), way).value))
    answered(ask(mapping=place(mapping, way).value))


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_obeyed(ask: Ask, mode: str) -> None:
    answered(ask(mode=mode))


def test_unknown_modes_are_refused(level: str, table: Table) -> None:
    for mode in (99, 3, -1, 2**40):
        for family in ("rowwise", "packed"):
            message = f"mode must be 0 (sum), 1 (mean) or 2 (max), got {mode}"
            refused(Bags(family, table, INDICES, OFFSETS, mode), ValueError, message)
    for mode in ("average", 0, b"none", "SUM", ["sum"], b"sum"):
        message = f"mode must be 'sum', 'mean' or 'max', got {mode!r}"
        refused(Bags("public", table, INDICES, OFFSETS, mode), ValueError, message)
    call = lambda *out: qembag.embedding_bag(table.make(), INDICES, OFFSETS, mode=None, out=out[0])
    raises(ValueError, "mode must be 'sum', 'mean' or 'max', got None", call, fresh_out())


def test_weights_with_max_are_refused(ask: Ask) -> None:
    message = "per_sample_weights must be None in mode 'max', got a float32 array of shape (6,)"
    refused(ask(weights=ONES, mode="max"), ValueError, message)


def test_a_packed_table_of_another_width_is_refused(level: str, bits: int, table: Table) -> None:
    made = table.make()
    for other in {8, 4, 2} - {bits}:
        message = f"weight must be a table of {other} bits, got one of {bits}"
        bags, single = getattr(ops, f"embedding_bag_{NAMES[other]}"), getattr(ops, f"embedding_{NAMES[other]}")
        raises(ValueError, message, lambda *out, o=bags: o(made, INDICES, OFFSETS, out=out[0]), fresh_out())
        raises(ValueError, message, lambda o=single: o(made, INDICES))


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
        f"[2] must have a minimum and a scale that its tail can hold as {tail} at {pack.bits} bits, "
        f"got values from {low:g} to {high:g}"
    )
    for call in pack(weights):
        refused(call, ValueError, call.name + text)


@pytest.mark.parametrize(("width", "value"), [(4, 1e6), (2, 2.1e5)])
def test_rows_whose_scale_overflows_float16_are_refused(level: str, width: int, value: float) -> None:
    weights = np.zeros((3, 8), dtype=np.float32)
    weights[1, 4] = value
    call = Packing("prepack", weights, width)
    assert call.judge().faults == {(ValueError, "weight")}
    with pytest.raises(ValueError, match=rf"^weight\[1\] must have .* got values from 0 to {re.escape(f'{value:g}')}$"):
        call()


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


# ---- Indices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, NUM_ROWS, 2**31 - 1, -(2**31), 2**31, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_indices_out_of_range_are_refused(ask: Ask, value: int) -> None:
    for number, bag in ((0, 0), (1, 0), (2, 2), (5, 2)):
        indices = INDICES.copy()
        indices[number] = value
        message = f"indices[{number}] is {value} (bag {bag}): out of range for {TABLE}"
        for kind in [np.int64] if not -(2**31) <= value < 2**31 else [np.int32, np.int64]:
            refused(ask(indices.astype(kind)), IndexError, message)
    square = np.zeros((3, 2), dtype=np.int64)
    square[1, 1] = square[2, 0] = value
    refused(ask(square, None), IndexError, f"indices[1, 1] is {value} (bag 1): out of range for {TABLE}")


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_the_first_and_the_last_row_are_found(ask: Ask, kind: type) -> None:
    answered(ask(np.array([0, NUM_ROWS - 1], dtype=kind), [0, 1]))


@pytest.mark.parametrize("value", [2**63, 2**63 + 5, 2**64 - 1])
def test_unsigned_numbers_beyond_int64_are_shown_as_they_are(ask: Ask, table: Table, value: int) -> None:
    indices = np.array([0, value, 3], dtype=np.uint64)
    for given in (indices, indices[::-1].copy()[::-1]):
        refused(ask(given, [0]), IndexError, f"indices[1] is {value} (bag 0): out of range for {TABLE}")
    message = f"offsets[1] is {value}: must be from 0 to 3, the number of indices"
    refused(ask(INDICES[:3], np.array([0, value], dtype=np.uint64)), ValueError, message)
    for given in ([value], Buffer("Q", [value]), memoryview(np.array([value], dtype=np.uint64))):
        refused(ask(given, [0]), IndexError, f"indices[0] is {value} (bag 0): out of range for {TABLE}")
        message = f"indices[0] is {value}: out of range for {TABLE}"
        refused(SingleRows("embedding", table, given), IndexError, message)
    refused(SingleRows("embedding", table, indices), IndexError, f"indices[1] is {value}: out of range for {TABLE}")
    refused(SingleRows("dequantize", table, indices), IndexError, f"rows[1] is {value}: out of range", whole=False)


KINDS = ["?", "f4", "f8", "c8", "O", "U3", "S3", "M8[s]", "m8[s]", [("index", "i8")]]


@pytest.mark.parametrize("wrong", [*[np.zeros(6, kind) for kind in KINDS], np.zeros(0)], ids=str)
def test_arrays_that_are_not_integers_are_refused(ask: Ask, table: Table, wrong: np.ndarray) -> None:
    text = f"must be an array of integers, got a {wrong.dtype} array of shape {wrong.shape}"
    refused(ask(wrong), TypeError, f"indices {text}")
    refused(ask(offsets=wrong), TypeError, f"offsets {text}")
    refused(SingleRows("embedding", table, wrong), TypeError, f"indices {text}")


def test_lists_that_are_not_integers_are_refused_by_name(ask: Ask) -> None:
    for wrong in ([1.0], [True], [1j], ["1"], [None], [2**64], [{}], [-1, 2**63]):
        for name, call in (("indices", ask(wrong, [0])), ("offsets", ask(offsets=wrong))):
            refused(call, TypeError, f"{name} must ", whole=False)


def test_ragged_lists_are_refused_by_name(ask: Ask) -> None:
    ragged = [[1, 2], [3]]
    for name, call in (
        ("indices", ask(ragged, None)),
        ("offsets", ask(offsets=ragged)),
        ("per_sample_weights", ask([[1, 2], [3, 4]], None, weights=ragged)),
        (MAPPING, ask([[1]], None, mapping=ragged)),
    ):
        assert call.judge().faults == {(TypeError, name), (ValueError, name)}
        raises(ValueError, name, call, fresh_out(), whole=False)


@pytest.mark.parametrize("shape", [(), (1, 2, 3), (2, 1, 1, 3)])
def test_indices_and_offsets_of_another_number_of_dimensions_are_refused(ask: Ask, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, dtype=np.int64)
    came = f"got a int64 array of shape {shape}"
    message = f"indices must have 1 dimension (with offsets) or 2 (a row a bag), {came}"
    refused(ask(array), ValueError, message)
    refused(ask(offsets=array), ValueError, f"offsets must have 1 dimension, {came}")


def test_offsets_are_given_with_one_dimension_and_not_with_two(ask: Ask) -> None:
    refused(ask(offsets=None), ValueError, "offsets must be given for indices of 1 dimension, got None")
    message = "offsets must be None for indices of 2 dimensions, whose rows are the bags, got offsets"
    refused(ask(SQUARE), ValueError, message)
    message = "offsets must hold at least the end of the last bag with include_last_offset, got none"
    refused(ask(offsets=np.empty(0, dtype=np.int64), include_last_offset=True), ValueError, message)


# ---- The lowest bad position, with threads ---------------------------------------------------------------------------


def test_the_lowest_bad_position_of_a_large_call_is_named(
    public: Ask, table: Table, threads: int, rng: np.random.Generator
) -> None:
    size = 30_000
    offsets = np.arange(0, size, 3)
    mapping = rng.integers(-1, NUM_ROWS, 50).astype(np.int32)
    mapping[40:] = NUM_ROWS
    for _ in range(5):
        indices = rng.integers(0, NUM_ROWS, size)
        places = np.sort(rng.choice(size, 20, replace=False))
        indices[places] = rng.choice([-1, 10, 2**62], 20)
        first, bag = places[0], places[0] // 3
        refused(
            public(indices, offsets),
            IndexError,
            f"indices[{first}] is {indices[first]} (bag {bag}): out of range for {TABLE}",
        )
        message = f"indices[{first}] is {indices[first]}: out of range for {TABLE}"
        refused(SingleRows("embedding", table, indices), IndexError, message)
        wrong = offsets.copy()
        wrong[bag + 1 :: 7] = size + 1
        if bag + 1 < len(wrong):
            message = f"offsets[{bag + 1}] is {size + 1}: must be from 0 to {size}, the number of indices"
            refused(public(indices, wrong), ValueError, message)
        logical = rng.integers(0, 40, size)
        logical[places] = 45
        message = f"{MAPPING}[45] is 10 (indices[{first}], bag {bag}): {BAD_ROW}"
        refused(Ask("rowwise", table.bits, table.rows)(logical, offsets, mapping=mapping), IndexError, message)


def test_the_lowest_bad_row_of_a_large_table_to_quantize_is_named(
    level: str, threads: int, bits: int, rng: np.random.Generator
) -> None:
    weights = rng.normal(size=(40_000, 16)).astype(np.float32)
    places = np.sort(rng.choice(len(weights), 9, replace=False))
    weights[places, rng.integers(0, 16, 9)] = np.nan
    with pytest.raises(ValueError, match=rf"^weights\[{places[0]}\] must be finite"):
        qembag.quantize(weights, bits)


# ---- Objects in the place of arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError, OSError, RecursionError])
@pytest.mark.parametrize("argument", ["indices", "offsets", "weights", "mapping"])
def test_what_an_array_method_raises_reaches_the_caller_and_spares_out(
    ask: Ask, argument: str, error: type[Exception]
) -> None:
    call, out = ask(**{argument: Answers(error("boom"))}), fresh_out()
    before = out.tobytes()
    with pytest.raises((error, TypeError, ValueError)):
        call(out)
    assert out.tobytes() == before


def test_an_array_method_that_changes_its_answer_is_asked_once(ask: Ask) -> None:
    class Fickle:
        answers = 0

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            self.answers += 1
            return INDICES if self.answers == 1 else np.full(99, 2**62)

    indices = Fickle()
    same_bits(ask(indices)(), ask()())
    assert indices.answers == 1


def test_an_array_that_lies_about_itself_crashes_nothing(ask: Ask) -> None:
    class Liar(np.ndarray):
        shape = property(lambda self: (6,))  # type: ignore[assignment]
        size = property(lambda self: 6)  # type: ignore[assignment]
        ndim = property(lambda self: 1)  # type: ignore[assignment]

    short, out = np.zeros(2, dtype=np.float32).view(Liar), fresh_out()
    before = out.tobytes()
    for weights in (short, short.astype(np.float16)):
        with pytest.raises((TypeError, ValueError, SystemError)):
            ask(weights=weights)(out)
        assert out.tobytes() == before
    with pytest.raises((TypeError, ValueError, SystemError)):
        ask()(np.zeros((1, 1), dtype=np.float32).view(Liar))


def test_buffers_lists_and_matrices_are_read_as_arrays(ask: Ask, table: Table) -> None:
    expected = ask().judge().expected()
    for indices in (Buffer("q", INDICES), Buffer("i", INDICES), bytearray(INDICES.tolist()), memoryview(INDICES)):
        answered(ask(indices), expected)
    answered(ask(INDICES.tolist(), tuple(OFFSETS.tolist())), expected)
    answered(ask(offsets=Buffer("i", OFFSETS)), expected)
    matrix = np.ndarray.__new__(np.matrix, SQUARE.shape, SQUARE.dtype)
    matrix[:] = SQUARE
    answered(ask(matrix, None), ask(SQUARE, None).judge().expected())
    answered(SingleRows("embedding", table, matrix), SingleRows("embedding", table, SQUARE).judge().expected())


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10, -11, 2**31, 2**63, -(2**63) - 1, 2**100])
def test_a_padding_idx_out_of_range_is_refused(public: Ask, value: int) -> None:
    message = f"padding_idx must be from -10 to 9 for a table of 10 embeddings, got {value}"
    refused(public(padding_idx=value), ValueError, message)


def test_masks_of_another_length_are_refused(bits: int, rows: np.ndarray) -> None:
    table = qembag.QuantizedTable(rows, bits)
    for length in (0, 9, 11):
        message = f"keep must have shape (10,) as a mask, got a bool array of shape ({length},)"
        raises(ValueError, message, lambda n=length: table.prune(np.ones(n, dtype=np.bool_)))
        if length:  # which NumPy lets pass
            with pytest.raises(IndexError):
                table[np.ones(length, dtype=np.bool_)]
    for value in (-1, 10, 2**63 - 1):
        message = f"keep[1] is {value}: out of range for {TABLE}"
        raises(IndexError, message, lambda v=value: table.prune([0, v, 3]))


@pytest.mark.parametrize("value", [0, -1, -(2**70), 1.5, True, np.bool_(True), "2", np.float32(2)])
def test_numbers_of_threads_that_are_none_are_refused(public: Ask, table: Table, value: Any) -> None:
    error = ValueError if type(value) is int else TypeError
    text = f"must be at least 1, got {value}" if error is ValueError else "must be a whole number, got "
    for call in (
        public(num_threads=value),
        SingleRows("embedding", table, INDICES[:3], num_threads=value),
        Packing("public", np.ones((2, 4), dtype=np.float32), table.bits, num_threads=value),
    ):
        refused(call, error, f"num_threads {text}", whole=False)
    before = qembag.get_num_threads()
    raises(error, f"n {text}", lambda: qembag.set_num_threads(value), whole=False)
    assert qembag.get_num_threads() == before


@pytest.mark.parametrize("value", ["no", 2, 1.0, None, np.array([0, 1])], ids=str)
def test_flags_are_true_or_false(ask: Ask, value: Any) -> None:
    refused(ask(include_last_offset=value), TypeError, "include_last_offset must be True or False, got ", whole=False)
    call = Packing("prepack", np.ones((2, 8), dtype=np.float32), 4, optimized=value)
    refused(call, TypeError, "optimized_qparams must be True or False, got ", whole=False)


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
        message = f"{MAPPING} must be an array of int32, got a {mapping.dtype} array of shape (10,)"
        refused(ask(mapping=mapping), TypeError, message)
    for shape in [(), (2, 5), (1, 1)]:
        message = f"{MAPPING} must have 1 dimension, got a int32 array of shape {shape}"
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
        (rows.astype(np.int8), TypeError, "must be an array of uint8, got a int8 array of shape"),
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


# ---- out -------------------------------------------------------------------------------------------------------------


def refuses_out(call: Any, out: np.ndarray, message: str, memory: np.ndarray | None = None, whole: bool = True) -> None:
    """The memory behind it, its own if no other is named, is left alone."""
    assert call.judge().with_out(out) == {(ValueError, "out")}
    memory = out if memory is None else memory
    before = memory.tobytes()
    raises(ValueError, message, lambda: call(out), whole=whole)
    assert memory.tobytes() == before


def test_outputs_of_another_shape_or_type_are_refused(ask: Ask) -> None:
    for shape in [(2, DIM), (4, DIM), (3, DIM - 1), (3, DIM + 1), (3 * DIM,), (1, 3, DIM), (), (0, DIM), (0,)]:
        message = f"out must be a float32 array of shape (3, 12), got a float32 array of shape {shape}"
        refuses_out(ask(), np.ones(shape, dtype=np.float32), message)
    for kind in (np.float64, np.int32, np.uint32, np.complex64, np.dtype(np.float32).newbyteorder()):
        message = "out must be a float32 array of shape (3, 12), got a "
        refuses_out(ask(), np.ones((3, DIM), dtype=kind), message, whole=False)


def test_outputs_that_rows_cannot_be_written_to_are_refused(ask: Ask) -> None:
    read_only = place(np.ones((3, DIM), dtype=np.float32), "read-only")
    refuses_out(ask(), read_only.value, "out must be writeable, got a read-only array", read_only.block)
    base = np.ones(400, dtype=np.float32)
    side_by_side = "out must have the elements of a row side by side, got strides"
    overlap = "out must have rows that lie apart, one after the other, got strides"
    strided = np.lib.stride_tricks.as_strided
    for out, text in [
        (base[: 6 * DIM].reshape(3, 2 * DIM)[:, ::2], side_by_side),
        (base[: 3 * DIM].reshape(DIM, 3).T, side_by_side),
        (base[: 3 * DIM].reshape(3, DIM)[:, ::-1], side_by_side),
        (strided(base, (3, DIM), (4 * DIM, 0)), side_by_side),
        (strided(base, (3, DIM), (0, 4)), overlap),
        (strided(base, (3, DIM), (4, 4)), overlap),
        (strided(base, (3, DIM), (4 * DIM - 4, 4)), overlap),
        (strided(base[200:], (3, DIM), (-4 * DIM + 4, 4)), overlap),
    ]:
        refuses_out(ask(), out, text, base, whole=False)


@pytest.mark.parametrize("way", ["plain", "gaps", "odd gaps", "far", "reversed", "misaligned"])
def test_outputs_at_any_distance_between_rows_are_written_and_nothing_between(ask: Ask, way: str) -> None:
    call = ask()
    out, block = empty((3, DIM), np.float32, way)
    before = block.tobytes()
    kept = out.copy()
    assert not call.judge().with_out(out)
    assert call(out) is out
    same_bits(out.copy(), call.judge().expected())
    out[...] = kept
    assert block.tobytes() == before


ARRAYS = {
    "rows": "the table",
    "indices": "indices",
    "offsets": "offsets",
    "weights": "per_sample_weights",
    "mapping": MAPPING,
}


def plain_arrays(rows: np.ndarray) -> dict[str, np.ndarray]:
    mapping = np.arange(NUM_ROWS, dtype=np.int32)
    return {"rows": rows, "indices": INDICES, "offsets": OFFSETS, "weights": ONES, "mapping": mapping}


@pytest.mark.parametrize("disguise", [lambda array: array, memoryview, Answers], ids=["plain", "buffer", "__array__"])
@pytest.mark.parametrize("argument", ARRAYS)
def test_an_output_that_shares_memory_with_an_input_is_refused(
    ask: Ask, argument: str, disguise: Callable[[np.ndarray], Any]
) -> None:
    memory = np.zeros(4096, dtype=np.uint8)
    out = memory[: 3 * DIM * 4].view(np.float32).reshape(3, DIM)
    array = plain_arrays(ask.rows)[argument]
    message = f"out must share no memory with {ARRAYS[argument]}, got an array that does"
    for first in (0, 3 * DIM * 4 - 8, 3 * DIM * 4):
        inside = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
        inside[:] = array
        call = ask(**{argument: disguise(inside)})
        if first < 3 * DIM * 4:
            refuses_out(call, out, message, memory)
        else:
            assert call(out) is out


def test_an_output_that_shares_memory_with_a_mapping_to_be_copied_is_refused(table: Table) -> None:
    """Found by fuzzing: the copy lies apart from the output, and so the caller's own mapping was written over."""
    memory = np.zeros((3, DIM), dtype=np.float32)
    mapping = memory.view(np.int32).reshape(-1)[NUM_ROWS - 1 :: -1]
    mapping[:] = np.arange(NUM_ROWS)
    message = f"out must share no memory with {MAPPING}, got "
    for family in ("rowwise", "packed"):
        call = Bags(family, table, INDICES, OFFSETS, pruned=True, mapping=mapping)
        refuses_out(call, memory, message, whole=False)


def test_a_mapping_is_converted_once_for_its_rows_and_for_where_it_lies(table: Table) -> None:
    """What it answers the second time lies elsewhere."""
    memory = np.zeros((3, DIM), dtype=np.float32)
    answers = [memory.view(np.int32).reshape(-1)[NUM_ROWS - 1 :: -1]]

    class Mapping:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            return answers.pop() if answers else np.arange(NUM_ROWS, dtype=np.int32)

    answers[0][:] = np.arange(NUM_ROWS)
    call = Bags("rowwise", table, INDICES, OFFSETS, pruned=True, mapping=Mapping())
    raises(ValueError, f"out must share no memory with {MAPPING}, got ", call, memory, whole=False)


@pytest.mark.parametrize("argument", ARRAYS)
def test_an_output_between_the_elements_of_an_input_is_taken(ask: Ask, argument: str) -> None:
    arrays = {
        "indices": INDICES % 6,
        "offsets": np.array([0, 2, 2, 4, 5, 6]),
        "weights": np.linspace(-1, 1, 6).astype(np.float32),
        "mapping": np.array([5, 1, -1, 2, 3, 4], dtype=np.int32),
        "rows": ask.rows[:6],
    }
    array = arrays[argument]
    together = np.zeros(6, dtype=[("out", np.float32, (DIM,)), ("in", array.dtype, array.shape[1:])])
    together["in"] = array
    out, given = together["out"], {"indices": arrays["indices"], "offsets": arrays["offsets"]}
    call = ask(**given | {argument: together["in"]})
    assert not call.judge().with_out(out)
    assert call(out) is out
    same_bits(out.copy(), ask(**given | {argument: array}).judge().expected())
    np.testing.assert_array_equal(together["in"], array)


def test_outputs_of_single_rows_are_checked_like_those_of_bags(level: str, table: Table) -> None:
    call = SingleRows("embedding", table, SQUARE)
    for shape in [(3, 2, DIM - 1), (6, DIM), (2, 3, DIM), (3, 2), (3, 2, DIM, 1)]:
        message = f"out must be a float32 array of shape (3, 2, 12), got a float32 array of shape {shape}"
        refuses_out(call, np.ones(shape, dtype=np.float32), message)
    base = np.ones((3, 4, DIM + 3), dtype=np.float32)
    out = base[:, ::2, 1:-2]
    assert call(out) is out
    np.testing.assert_array_equal(out, call())
    out[:] = 1
    assert (base == 1).all()
    wrong = SQUARE.copy()
    wrong[2, 1] = 10
    message = "indices[2, 1] is 10: out of range for a table of 10 rows"
    refused(SingleRows("embedding", table, wrong), IndexError, message)
    memory = np.zeros(6 * DIM, dtype=np.float32)
    inside = memory.view(np.int64)[:6].reshape(3, 2)
    inside[:] = SQUARE
    out = memory.reshape(3, 2, DIM)
    refuses_out(SingleRows("embedding", table, inside), out, "out must share no memory with indices", whole=False)


def test_dtypes_that_are_none_of_the_outputs_are_refused(public: Ask) -> None:
    swapped = ">f4" if sys.byteorder == "little" else "<f4"
    for dtype in (np.float64, np.int32, "complex64", swapped):
        call = public(dtype=dtype)
        assert call.judge().faults == {(TypeError, "dtype"), (ValueError, "dtype")}
        raises(ValueError, "dtype must be float32 or float16", call, whole=False)
        raises(ValueError, "dtype must be float32 or float16", call, fresh_out(), whole=False)
    message = "out must be a float16 array of shape (3, 12), got a float32 array of shape (3, 12)"
    refuses_out(public(dtype=np.float16), fresh_out(), message)


@pytest.mark.parametrize(
    "dtype", ["nonsense", "f4,(", "(-1,)f4", {"names": ["a"], "formats": []}, ("f4", -1)], ids=repr
)
def test_what_numpy_cannot_read_as_a_dtype_is_refused_by_name(public: Ask, dtype: Any) -> None:
    """Found by fuzzing: NumPy raises SyntaxError, or ValueError, for some."""
    call, message = public(dtype=dtype), f"dtype must be float32 or float16, got {dtype!r}"
    raises(TypeError, message, call)
    raises(TypeError, message, call, fresh_out())


def test_a_masked_output_is_refused(table: Table) -> None:
    out = np.ma.zeros((1, DIM), dtype=np.float32)
    call = Bags("public", table, [0], [0])
    assert call.judge().with_out(out) == {(TypeError, "out")}
    raises(TypeError, "out must be an array without a mask, got MaskedArray", lambda: call(out))


@pytest.mark.parametrize("dim", [8, 300, 3000])
@pytest.mark.parametrize("offset", [-1, 4])
def test_the_end_of_no_bags_must_lie_within_the_indices_too(level: str, dim: int, offset: int) -> None:
    table = Table(qembag.quantize(np.ones((4, dim), dtype=np.float32)).data, 8)
    message = f"offsets[0] is {offset}: must be from 0 to 3, the number of indices"
    refused(Bags("public", table, [0, 1, 2], [offset], include_last_offset=True), ValueError, message)
    answered(Bags("public", table, [0, 1, 2], [3], include_last_offset=True), np.empty((0, dim), np.float32))


@fenced.needs_fences
@pytest.mark.parametrize("end", [-(2**63), -(2**63) + 1, -(2**63) + 7, -1])
def test_no_end_makes_a_lookup_read_beyond_its_indices(public: Ask, end: int) -> None:
    """So far below zero that a distance subtracted from it comes out above: found by UndefinedBehaviorSanitizer."""
    indices = fenced.copy(np.arange(200) % NUM_ROWS)
    ends = np.array([0, 100, 200, 200, end])
    for options in ({}, {"weights": np.ones(200, np.float32)}, {"padding_idx": 0}, {"mode": "max"}):
        call = public(indices, ends, include_last_offset=True, **options)
        refused(call, ValueError, f"offsets[4] is {end}: ", whole=False)


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
