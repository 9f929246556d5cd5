"""An `out` is written where it may be, nothing between its rows is, and an error leaves it as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qembag
from support import fenced
from support.arrays import Answers, an_array, empty, place, same_bits
from support.asking import (
    DIM,
    INDICES,
    NUM_ROWS,
    OFFSETS,
    ONES,
    SQUARE,
    Ask,
    answered,
    fresh_out,
    raises,
    refused,
    refuses_out,
)
from support.lookups import Bags, SingleRows, Table
from support.rules import MAPPING

# ---- out -------------------------------------------------------------------------------------------------------------


def test_outputs_of_another_shape_or_type_are_refused(ask: Ask) -> None:
    for shape in [(2, DIM), (4, DIM), (3, DIM - 1), (3, DIM + 1), (3 * DIM,), (1, 3, DIM), (), (0, DIM), (0,)]:
        message = f"out must be a float32 array of shape (3, 12), got a float32 array of shape {shape}"
        refuses_out(ask(), np.ones(shape, dtype=np.float32), message)
    for kind in (np.float64, np.int32, np.uint32, np.complex64, np.dtype(np.float32).newbyteorder()):
        wrong = np.ones((3, DIM), dtype=kind)
        message = f"out must be a float32 array of shape (3, 12), got {an_array(wrong)} of shape"
        refuses_out(ask(), wrong, message, whole=False)


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
        raises(ValueError, "dtype must be float32, float16 or bfloat16", call, whole=False)
        raises(ValueError, "dtype must be float32, float16 or bfloat16", call, fresh_out(), whole=False)
    message = "out must be a float16 array of shape (3, 12), got a float32 array of shape (3, 12)"
    refuses_out(public(dtype=np.float16), fresh_out(), message)


@pytest.mark.parametrize(
    "dtype", ["nonsense", "f4,(", "(-1,)f4", {"names": ["a"], "formats": []}, ("f4", -1)], ids=repr
)
def test_what_numpy_cannot_read_as_a_dtype_is_refused_by_name(public: Ask, dtype: Any) -> None:
    """Found by fuzzing: NumPy raises SyntaxError, or ValueError, for some."""
    call, message = public(dtype=dtype), f"dtype must be float32, float16 or bfloat16, got {dtype!r}"
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
