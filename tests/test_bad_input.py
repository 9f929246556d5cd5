"""Every bad input gets the right answer or a clear error, and after an error `out` is bit for bit what it was.

Each message is written out here. That it comes where it must, and nowhere else, is also what the rules in
`support/rules.py` say, and each test asks them too. Objects that are no arrays at all are in `test_hostile.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from array import array as Buffer
from typing import Any

import numpy as np
import pytest

import qembag
from conftest import child_environment
from qembag import ops
from support.arrays import PLACES, Answers, an_array, place, same_bits
from support.asking import (
    BAD_ROW,
    INDICES,
    NUM_ROWS,
    OFFSETS,
    ONES,
    SQUARE,
    TABLE,
    Ask,
    answered,
    fresh_out,
    raises,
    refused,
)
from support.layouts import MODES, NAMES
from support.lookups import Bags, SingleRows, Table
from support.packing import Packing
from support.rules import MAPPING

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
    for mode in ("Average", 0, b"none", "SUM", ["sum"], b"sum"):
        message = f"mode must be 'sum', 'mean', 'max', 'average' or 'sqrtn', got {mode!r}"
        refused(Bags("public", table, INDICES, OFFSETS, mode), ValueError, message)
    call = lambda *out: qembag.embedding_bag(table.make(), INDICES, OFFSETS, mode=None, out=out[0])
    raises(ValueError, "mode must be 'sum', 'mean', 'max', 'average' or 'sqrtn', got None", call, fresh_out())


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
    text = f"must be an array of integers, got {an_array(wrong)} of shape {wrong.shape}"
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
    came = f"got an int64 array of shape {shape}"
    message = f"indices must have 1 dimension (with offsets) or 2 (a row a bag), {came}"
    refused(ask(array), ValueError, message)
    refused(ask(offsets=array), ValueError, f"offsets must have 1 dimension, {came}")


def test_offsets_are_given_with_one_dimension_and_not_with_two(ask: Ask) -> None:
    refused(ask(offsets=None), ValueError, "offsets or lengths must be given for indices of 1 dimension, got None")
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


# ---- What torch does with it -------------------------------------------------------------------------------------------------------


CRASHES = """
import os, sys, json
import numpy as np
import torch, qembag
from qembag import ops

from support.layouts import NAMES as names
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
