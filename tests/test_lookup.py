"""embedding_bag and embedding against the oracle: the same bits at every level and at 1, 2 and 3 threads.

The oracle is slow, so what it says of a case is computed once and kept for the other levels and thread counts.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import qembag
import reference
from qembag import QuantizedTable
from support import fenced, levels
from support.arrays import PLACES, WRAPPERS, empty, place
from support.layouts import LAYOUTS, bag_offsets, packed_rows

# Each remainder of every block of lanes, each count of blocks up to several passes over a bag, and two long rows.
DIMS = sorted({*range(1, 41), *(m + d for m in range(16, 513, 16) for d in (-1, 0, 1)), 1000, 3000})

VARIANTS: dict[str, dict[str, Any]] = {
    "sum": {},
    "int32": {"index_type": np.int32},
    "weighted": {"weighted": True},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "half": {"half": True},
}


def table_of(rows: np.ndarray, bits: int, dim: int, mapping: np.ndarray | None = None) -> QuantizedTable:
    return QuantizedTable(rows, bits, dim=dim, compressed_indices_mapping=mapping)


# ---- Every dim ---------------------------------------------------------------------------------------------------


# Kernels unpack otherwise where bags are long.
LENGTHS = {"short": [0, 0, 1, 3, 3, 10], "long": [0, 0, 30]}


@functools.cache
def bags_of_dim(bits: int, dim: int, length: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([bits, dim])
    rows = packed_rows(rng, 7, dim, bits)
    offsets = np.array(LENGTHS[length])
    count = offsets[-1] + 2
    indices = rng.integers(0, 7, count)
    return rows, indices, offsets, rng.normal(size=count).astype(np.float32)


@functools.cache
def expected_of_dim(bits: int, dim: int, length: str, variant: str) -> np.ndarray:
    rows, indices, offsets, weights = bags_of_dim(bits, dim, length)
    options = VARIANTS[variant]
    return reference.embedding_bag(
        rows,
        bits,
        dim,
        indices,
        offsets,
        mode=options.get("mode", "sum"),
        weights=weights if options.get("weighted") else None,
        half=options.get("half", False),
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", DIMS)
def test_every_level_gives_the_oracles_bits_at_every_dim(level, bits, dim, length, same_bits):
    rows, indices, offsets, weights = bags_of_dim(bits, dim, length)
    table = table_of(rows, bits, dim)
    for variant, options in VARIANTS.items():
        ours = qembag.embedding_bag(
            table,
            indices.astype(options.get("index_type", np.int64)),
            offsets,
            mode=options.get("mode", "sum"),
            per_sample_weights=weights if options.get("weighted") else None,
            dtype=np.float16 if options.get("half") else None,
        )
        same_bits(ours, expected_of_dim(bits, dim, length, variant))
    same_bits(qembag.embedding(table, np.arange(7)), reference.embedding_bag(rows, bits, dim, np.arange(7)[:, None]))
    same_bits(table.dequantize(), reference.dequantize(rows, bits, dim))


@pytest.mark.parametrize("dim", [1, 7, 16, 20, 32, 33, 48, 63, 64, 65, 130, 200, 300, 1000])
@pytest.mark.parametrize("length", [3, 20])
def test_rows_of_near_and_of_far_tables_are_the_same(level, bits, dim, length, rng, same_bits):
    """Kernels have other loops for tables that a cache may hold, up to 8 MiB."""
    near = packed_rows(rng, 100, dim, bits)
    far = np.zeros(((9 << 20) // near.shape[1], near.shape[1]), dtype=np.uint8)
    far[:100] = near
    offsets = bag_offsets(rng, 9, 2 * length)
    indices = rng.integers(0, 100, offsets[-1] + length)
    weights = rng.normal(size=len(indices)).astype(np.float32)
    for given in (None, weights, weights.astype(np.float16)):
        expected = reference.embedding_bag(near, bits, dim, indices, offsets, weights=given)
        for index_type in (np.int32, np.int64):
            for rows in (near, far):
                table = table_of(rows, bits, dim)
                same_bits(
                    qembag.embedding_bag(table, indices.astype(index_type), offsets, per_sample_weights=given), expected
                )


@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_bags_of_pruned_rows_and_padding_of_any_length(level, bits, length, share, rng, same_bits):
    """Rows are gathered in batches: bags end within, at and beyond their ends."""
    rows = packed_rows(rng, 50, 80, bits)
    mapping = np.where(rng.random(90) < share, -1, rng.integers(0, 50, 90)).astype(np.int32)
    lengths = np.array([0, 31, 32, 33, 1, 64, 65, 0, 200, 0])
    if length == "short":
        lengths = np.concatenate([lengths, np.zeros(100, int)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    indices = rng.integers(0, 90, offsets[-1])
    weights = rng.normal(size=len(indices)).astype(np.float32)
    for options in ({}, {"mode": "mean", "padding_idx": 3}, {"mode": "max", "padding_idx": 3}, {"weights": weights}):
        given = {("per_sample_weights" if name == "weights" else name): value for name, value in options.items()}
        ours = qembag.embedding_bag(
            table_of(rows, bits, 80, mapping), indices, offsets, include_last_offset=True, **given
        )
        expected = reference.embedding_bag(
            rows, bits, 80, indices, offsets, include_last_offset=True, mapping=mapping, **options
        )
        same_bits(ours, expected)


def test_pruned_rows_of_a_table_beyond_the_caches(level, bits, rng, same_bits):
    """Rows and mapping are prefetched only where they are too large for the second-level cache."""
    rows = packed_rows(rng, 40_000, 80, bits)
    mapping = rng.integers(-1, len(rows), 70_000).astype(np.int32)
    offsets = bag_offsets(rng, 9, 100)
    indices = rng.integers(0, len(mapping), offsets[-1] + 100)
    for index_type in (np.int32, np.int64):
        ours = qembag.embedding_bag(table_of(rows, bits, 80, mapping), indices.astype(index_type), offsets)
        same_bits(ours, reference.embedding_bag(rows, bits, 80, indices, offsets, mapping=mapping))


@pytest.mark.parametrize("position", [0, 7, 8, 62, 63, 64, 65, 127, 128, 129])
def test_a_fault_is_found_wherever_it_stands_in_a_batch(level, position, rng):
    """The mapping is right when the table is made, and changes afterwards."""
    mapping = rng.integers(-1, 50, 90).astype(np.int32)
    table = table_of(packed_rows(rng, 50, 20, 8), 8, 20, mapping)
    indices = np.where(np.arange(130) % 90 == 5, 6, np.arange(130) % 90)
    indices[position] = 90
    with pytest.raises(IndexError, match=rf"indices\[{position}\] is 90"):
        qembag.embedding_bag(table, indices, [0])
    indices[position] = 5
    for row in (50, -2, 2**31 - 1, -(2**31)):
        mapping[5] = row
        with pytest.raises(IndexError, match=rf"compressed_indices_mapping\[5\] is {row}\b.*indices\[{position}\]"):
            qembag.embedding_bag(table, indices, [0])
        assert np.isfinite(qembag.embedding_bag(table, indices, [0], padding_idx=5)).all()


@pytest.mark.parametrize("dim", [1, 3, 16, 17, 64, 129])
def test_a_constant_code_is_read_wherever_it_stands(level, bits, dim, same_bits):
    """Each element alone set, all others zero: a code taken from a neighbour's place would show."""
    rows = np.zeros((dim, LAYOUTS[bits].row_bytes(dim)), dtype=np.uint8)
    LAYOUTS[bits].set_pairs(rows, np.array([[1, 0]] * dim))
    per_byte = 8 // bits
    for element in range(dim):
        rows[element, element // per_byte] = (2**bits - 1) << bits * (element % per_byte)
    expected = np.eye(dim, dtype=np.float32) * np.float32(2**bits - 1)
    same_bits(table_of(rows, bits, dim).dequantize(), expected)


def test_unused_high_bits_of_the_last_byte_are_ignored(level, rng, same_bits):
    for bits, dim in [(4, 1), (4, 33), (2, 1), (2, 2), (2, 3), (2, 67)]:
        rows = packed_rows(rng, 3, dim, bits)
        last = -(-dim * bits // 8) - 1
        used = (1 << (dim * bits - 8 * last)) - 1
        clean, dirty = rows.copy(), rows.copy()
        clean[:, last] &= used
        dirty[:, last] |= 255 - used
        indices = np.array([[0, 1, 2]])
        ours = [qembag.embedding_bag(table_of(r, bits, dim), indices) for r in (clean, dirty)]
        same_bits(ours[0], ours[1])
        same_bits(ours[0], reference.embedding_bag(clean, bits, dim, indices))


# ---- Every kind of argument ----------------------------------------------------------------------------------------

NUM_ROWS = 30
NUM_EMBEDDINGS = 50


@functools.cache
def mixed_bags(bits: int, dim: int) -> dict[str, np.ndarray]:
    """Bags of mixed lengths over a pruned and a whole table; few enough logical rows that padding is met often."""
    rng = np.random.default_rng([1, bits, dim])
    mapping = np.full(NUM_EMBEDDINGS, -1, dtype=np.int32)
    mapping[rng.permutation(NUM_EMBEDDINGS)[:NUM_ROWS]] = rng.permutation(NUM_ROWS)
    ends = bag_offsets(rng, 9, 4)
    indices = rng.integers(0, NUM_ROWS, ends[-1])
    indices[rng.random(len(indices)) < 0.15] = 3
    indices[rng.random(len(indices)) < 0.15] = NUM_ROWS - 1
    start = int(ends[-2])
    indices[start:] = 3  # a bag of padding alone, where that is what is padded
    weights = rng.normal(size=len(indices)).astype(np.float32)
    return {
        "rows": packed_rows(rng, NUM_ROWS, dim, bits),
        "mapping": mapping,
        "indices": indices,
        "ends": ends,
        "float32": weights,
        "float16": weights.astype(np.float16),
    }


@functools.cache
def mixed_expected(
    bits: int, dim: int, mode: str, weights: str | None, pruned: bool, padding_idx: int | None, last: bool, half: bool
) -> np.ndarray:
    case = mixed_bags(bits, dim)
    return reference.embedding_bag(
        case["rows"],
        bits,
        dim,
        case["indices"],
        case["ends"] if last else case["ends"][:-1],
        mode=mode,
        weights=None if weights is None else case[weights],
        mapping=case["mapping"] if pruned else None,
        include_last_offset=last,
        padding_idx=padding_idx,
        half=half,
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dim", [5, 16, 150])
def test_every_combination_of_arguments_gives_the_oracles_bits(level, bits, dim, mode, same_bits):
    case = mixed_bags(bits, dim)
    for pruned in (False, True):
        table = table_of(case["rows"], bits, dim, case["mapping"] if pruned else None)
        for weights, padding_idx, last, half in itertools.product(
            [None] if mode == "max" else [None, "float32", "float16"],
            [None, 3, -1, -27] if not pruned else [None, 3, 3 - NUM_EMBEDDINGS],
            [False, True],
            [False, True],
        ):
            expected = mixed_expected(bits, dim, mode, weights, pruned, padding_idx, last, half)
            for index_type, offset_type in itertools.product([np.int32, np.int64], repeat=2):
                ours = qembag.embedding_bag(
                    table,
                    case["indices"].astype(index_type),
                    (case["ends"] if last else case["ends"][:-1]).astype(offset_type),
                    mode=mode,
                    per_sample_weights=None if weights is None else case[weights],
                    include_last_offset=last,
                    padding_idx=padding_idx,
                    dtype=np.float16 if half else np.float32,
                )
                same_bits(ours, expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (4, 7), (0, 0)])
def test_each_row_of_two_dimensional_indices_is_a_bag(level, bits, rng, shape, same_bits):
    rows = packed_rows(rng, 6, 21, bits)
    table = table_of(rows, bits, 21)
    indices = rng.integers(0, 6, shape)
    weights = rng.normal(size=shape).astype(np.float32)
    for mode, given in [("sum", None), ("sum", weights), ("mean", weights), ("max", None)]:
        expected = reference.embedding_bag(rows, bits, 21, indices, mode=mode, weights=given)
        for last in (False, True):  # says nothing of bags without offsets
            ours = qembag.embedding_bag(
                table, indices.astype(np.int32), mode=mode, per_sample_weights=given, include_last_offset=last
            )
            same_bits(ours, expected)


def test_indices_before_the_first_offset_and_after_the_last_belong_to_no_bag(level, bits, rng, same_bits):
    rows = packed_rows(rng, 6, 21, bits)
    table = table_of(rows, bits, 21)
    indices = rng.integers(0, 6, 40)
    poisoned = indices.copy()
    poisoned[:5] = 10**12
    poisoned[33:] = -1
    ends = np.array([5, 5, 9, 33])
    expected = reference.embedding_bag(rows, bits, 21, indices, ends, include_last_offset=True)
    same_bits(qembag.embedding_bag(table, indices, ends, include_last_offset=True), expected)
    same_bits(qembag.embedding_bag(table, poisoned, ends, include_last_offset=True), expected)
    open_end = reference.embedding_bag(rows, bits, 21, indices[:33], ends[:-1])
    same_bits(qembag.embedding_bag(table, poisoned[:33], ends[:-1]), open_end)
    out = np.zeros_like(expected)
    assert qembag.embedding_bag(table, poisoned, ends, include_last_offset=True, out=out) is out
    same_bits(out, expected)


@pytest.mark.parametrize(
    ("num_indices", "offsets", "last", "num_bags"),
    [
        (0, [], False, 0),
        (4, [], False, 0),
        (0, [0], True, 0),
        (4, [2], True, 0),
        (0, [0], False, 1),
        (0, [0, 0, 0], False, 3),
        (4, [4, 4], False, 2),
        (4, [0, 0, 0], True, 2),
        (4, [4, 4], True, 1),
    ],
)
def test_no_bags_and_empty_bags(level, bits, rng, num_indices, offsets, last, num_bags):
    table = table_of(packed_rows(rng, 3, 9, bits), bits, 9)
    for mode in ("sum", "mean", "max"):
        ours = qembag.embedding_bag(
            table,
            np.zeros(num_indices, np.int64),
            np.array(offsets, dtype=np.int64),
            include_last_offset=last,
            mode=mode,
        )
        assert ours.shape == (num_bags, 9)
        assert ours.dtype == np.float32
        assert not ours.view(np.uint32).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_no_bags_go_into_an_output_without_rows(level, bits, rng, dtype):
    """NumPy 2.3 and later give an array of no elements strides of 0."""
    table = table_of(packed_rows(rng, 3, 9, bits), bits, 9)
    for out in (np.empty((0, 9), dtype), np.empty((5, 9), dtype)[:0], np.empty((4, 20), dtype)[:0, 2:11]):
        assert qembag.embedding_bag(table, np.zeros((0, 2), np.int64), out=out) is out
        assert qembag.embedding_bag(table, [], [], out=out) is out
        assert qembag.embedding(table, np.zeros(0, np.int64), out=out) is out


def test_a_table_without_rows_serves_empty_bags(level, bits, rng):
    table = table_of(packed_rows(rng, 0, 9, bits), bits, 9)
    assert not qembag.embedding_bag(table, np.zeros(0, np.int64), np.zeros(3, np.int64)).any()
    assert qembag.embedding(table, np.zeros((0, 2), np.int64)).shape == (0, 2, 9)
    with pytest.raises(IndexError, match=r"indices\[0\] is 0 \(bag 0\): out of range for a table of 0 rows"):
        qembag.embedding_bag(table, [0], [0])


# ---- Numbers at the ends of their range ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_extreme_scales_and_biases_give_the_oracles_bits(level, bits, rng, mode, same_bits):
    """Denormals, infinities, NaN from their differences, zeros of both signs, overflow in the sum."""
    for dim in (3, 16, 37, 144):
        rows = packed_rows(rng, 64, dim, bits, extremes=True)
        table = table_of(rows, bits, dim)
        ends = np.sort(rng.integers(0, 150, 40))
        ends[[0, -1]] = 0, 150
        indices = rng.integers(0, 64, 150)
        weights = rng.choice([0, -0.0, 1, -1, 1e-30, 1e-40, 3e38, np.inf, np.nan], 150).astype(np.float32)
        for given in [None] if mode == "max" else [None, weights]:
            for half in (False, True):
                expected = reference.embedding_bag(rows, bits, dim, indices, ends, mode=mode, weights=given, half=half)
                dtype = np.float16 if half else np.float32
                ours = qembag.embedding_bag(table, indices, ends, mode=mode, per_sample_weights=given, dtype=dtype)
                same_bits(ours, expected)


def tail_rows(bits: int, dim: int, tails: list[tuple[float, float]], code: int = 0) -> np.ndarray:
    """Rows of one code throughout, with these scales and biases."""
    byte = sum(code << shift for shift in range(0, 8, bits))
    rows = np.full((len(tails), LAYOUTS[bits].row_bytes(dim)), byte, dtype=np.uint8)
    LAYOUTS[bits].set_pairs(rows, np.array(tails))
    return rows


def test_max_keeps_the_first_of_equals_and_a_later_nan_loses(level, bits, same_bits):
    """`v > acc ? v : acc`: a NaN that comes first stays, one that comes later never wins; of +0 and -0 the first
    stays. The first row counts even where all are negative."""
    rows = tail_rows(bits, 18, [(0, 0.0), (-0.0, -0.0), (0, np.nan), (0, 1), (0, -2), (0, -np.inf), (0, np.inf)])
    table = table_of(rows, bits, 18)
    zero, negative_zero, nan, one, minus_two, minus_inf, inf = range(7)
    bags = {
        (zero, negative_zero): 0.0,
        (negative_zero, zero): -0.0,
        (nan, one): np.nan,
        (one, nan): 1,
        (one, nan, inf): np.inf,
        (minus_two, minus_inf): -2,
        (minus_inf, minus_two): -2,
        (minus_inf,): -np.inf,
        (negative_zero,): -0.0,
        (minus_two, negative_zero, zero): -0.0,
        (nan, nan, minus_inf): np.nan,
    }
    for bag, value in bags.items():
        ours = qembag.embedding_bag(table, np.array([bag]), mode="max")
        same_bits(ours, np.full((1, 18), value, dtype=np.float32))
        same_bits(ours, reference.embedding_bag(rows, bits, 18, np.array([bag]), mode="max"))


def test_a_sum_starts_from_positive_zero(level, bits, same_bits):
    """So a row of negative zeros looks up as positive ones, and dequantizes as negative ones."""
    rows = tail_rows(bits, 18, [(-0.0, -0.0)])
    table = table_of(rows, bits, 18)
    same_bits(qembag.embedding(table, [0]), np.zeros((1, 18), np.float32))
    same_bits(table.dequantize(), np.full((1, 18), -0.0, np.float32))


def test_float16_output_is_rounded_once_to_nearest_even(level, same_bits):
    """Through an 8-bit table, whose biases can be any float32: ties of normals and denormals, both sides of overflow."""
    values = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-20, 65504, 65519.996, 65520, -65520, 1e38]
    values += [2.0**-25, 2.0**-25 * (1 + 2.0**-20), 3 * 2.0**-25, 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-26, -(2.0**-26)]
    values += [np.inf, -np.inf, np.nan, 0.0, 1e-45, 2049, 2051]
    for dim in (1, 15, 16, 17, 40):
        rows = tail_rows(8, dim, [(0, value) for value in values])
        table = table_of(rows, 8, dim)
        with np.errstate(over="ignore"):
            expected = np.repeat(np.array(values, dtype=np.float32)[:, None], dim, axis=1).astype(np.float16)
        ours = qembag.embedding_bag(table, np.arange(len(values))[:, None], dtype="float16")
        same_bits(ours, expected)
        same_bits(qembag.embedding(table, np.arange(len(values)), dtype=np.float16), ours)


def test_every_float16_comes_back_as_itself(level, same_bits):
    """All 65,536 halves as biases of a 4-bit table, in float32 and in float16; but a code of 0 times a scale of 0, added
    to -0, is +0."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    rows = np.zeros((2**16, 5), dtype=np.uint8)
    rows[:, 3:] = halves.astype("<f2")[:, None].view(np.uint8)
    table = table_of(rows, 4, 1)
    with np.errstate(invalid="ignore"):
        expected = halves + np.float16(0)
        same_bits(table.dequantize()[:, 0], expected.astype(np.float32))
    same_bits(qembag.embedding(table, np.arange(2**16), dtype=np.float16)[:, 0], expected)


def test_a_mean_multiplies_by_the_reciprocal(level, bits, rng, same_bits):
    """Division would give other bits for 3, 5, 6, 7, ... rows."""
    rows = packed_rows(rng, 9, 33, bits)
    for count in range(1, 60):
        indices = rng.integers(0, 9, (1, count))
        ours = qembag.embedding_bag(table_of(rows, bits, 33), indices, mode="mean")
        same_bits(ours, reference.embedding_bag(rows, bits, 33, indices, mode="mean"))


# ---- Threads -----------------------------------------------------------------------------------------------------------

# Rows times (dim + 64) that make the kernels share a call out: MIN_PARALLEL_WORK in _kernels.pyx, and some more.
ENOUGH_WORK = 2**19 * 1.25
THREAD_DIM = 33


@functools.cache
def many_bags(bits: int, shape: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([2, bits])
    num_indices = int(ENOUGH_WORK / (THREAD_DIM + 64))
    mapping = rng.integers(-1, 200, 300).astype(np.int32)
    lengths = {
        "mixed": np.where(rng.random(3000) < 1 / 3, 0, rng.integers(0, 8, 3000)),
        "one long among many short": np.where(np.arange(800) == 300, num_indices, rng.integers(0, 3, 800)),
        "one long first": np.where(np.arange(5) == 0, num_indices, 1),
        "one long last": np.where(np.arange(5) == 4, num_indices, 1),
        "two": np.full(2, num_indices // 2),
        "one": np.full(1, num_indices),
        "ones": np.full(num_indices, 1),
    }[shape]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ends += 2  # the first two indices belong to no bag
    indices = rng.integers(0, 200, max(ends[-1], num_indices) + 1)
    return {
        "rows": packed_rows(rng, 200, THREAD_DIM, bits),
        "mapping": mapping,
        "indices": indices,
        "ends": ends,
        "weights": rng.normal(size=len(indices)).astype(np.float32),
    }


BIG_VARIANTS: dict[str, dict[str, Any]] = {
    "sum": {},
    "weighted mean, pruned and padded": {"mode": "mean", "pruned": True, "weighted": True, "padding_idx": 7},
    "max": {"mode": "max"},
}


@functools.cache
def many_expected(bits: int, shape: str, variant: str) -> np.ndarray:
    case, options = many_bags(bits, shape), BIG_VARIANTS[variant]
    return reference.embedding_bag(
        case["rows"],
        bits,
        THREAD_DIM,
        case["indices"],
        case["ends"],
        mode=options.get("mode", "sum"),
        weights=case["weights"] if options.get("weighted") else None,
        mapping=case["mapping"] if options.get("pruned") else None,
        padding_idx=options.get("padding_idx"),
        include_last_offset=True,
    )


@pytest.mark.parametrize(
    "shape", ["mixed", "one long among many short", "one long first", "one long last", "two", "one", "ones"]
)
def test_every_thread_count_gives_the_oracles_bits(level, threads, bits, shape, same_bits):
    case = many_bags(bits, shape)
    for variant, options in BIG_VARIANTS.items():
        if shape not in ("mixed", "one long among many short") and variant != "sum":
            continue
        table = table_of(case["rows"], bits, THREAD_DIM, case["mapping"] if options.get("pruned") else None)
        expected = many_expected(bits, shape, variant)
        arguments = {
            "mode": options.get("mode", "sum"),
            "per_sample_weights": case["weights"] if options.get("weighted") else None,
            "padding_idx": options.get("padding_idx"),
            "include_last_offset": True,
        }
        same_bits(qembag.embedding_bag(table, case["indices"], case["ends"], **arguments), expected)
        out = np.full(expected.shape, np.nan, dtype=np.float32)
        qembag.embedding_bag(table, case["indices"], case["ends"], out=out, **arguments)
        same_bits(out, expected)


def test_an_argument_beats_the_process_limit_and_keeps_the_bits(level, bits, same_bits):
    case = many_bags(bits, "mixed")
    table = table_of(case["rows"], bits, THREAD_DIM)
    for num_threads in (1, 2, 3, 7, 64):
        ours = qembag.embedding_bag(
            table, case["indices"], case["ends"], include_last_offset=True, num_threads=num_threads
        )
        same_bits(ours, many_expected(bits, "mixed", "sum"))


def test_many_bags_all_empty_are_zeros_at_every_thread_count(level, threads, bits, rng):
    table = table_of(packed_rows(rng, 5, 64, bits), bits, 64)
    indices = np.full(9000, 10**9)  # never read
    for ends in (np.zeros(9001, np.int64), np.full(9001, 9000), np.full(9001, 4321, np.int32)):
        for mode in ("sum", "mean", "max"):
            out = np.full((9000, 64), np.nan, dtype=np.float32)
            qembag.embedding_bag(table, indices, ends, include_last_offset=True, mode=mode, out=out)
            assert not out.view(np.uint32).any()


def test_single_rows_and_whole_tables_are_the_same_at_every_thread_count(level, threads, bits, rng, same_bits):
    rows = packed_rows(rng, 6000, 40, bits)
    table = table_of(rows, bits, 40)
    expected = reference.dequantize(rows, bits, 40)
    same_bits(table.dequantize(), expected)
    indices = rng.integers(0, 6000, (70, 100))
    same_bits(table.dequantize(indices), expected[indices])
    # A sum starts from +0, which no value here needs.
    same_bits(qembag.embedding(table, indices), expected[indices] + np.float32(0))
    same_bits(qembag.embedding(table, indices, dtype=np.float16), (expected[indices]).astype(np.float16))


def test_a_large_lookup_is_the_same_at_every_level_and_thread_count(level, threads, bits, same_bits):
    """A hundred times what is shared out: compared with the baseline on one thread, and a sample with the oracle."""
    table, indices, ends, expected = large_lookup(bits)
    same_bits(qembag.embedding_bag(table, indices, ends), expected)
    bags = np.random.default_rng(3).integers(0, len(ends) - 1, 20)
    for bag in bags:
        alone = indices[ends[bag] : ends[bag + 1]][None]
        same_bits(expected[bag : bag + 1], reference.embedding_bag(table.data, bits, table.dim, alone))


@functools.cache
def large_lookup(bits: int) -> tuple[QuantizedTable, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([4, bits])
    table = table_of(packed_rows(rng, 1000, 200, bits), bits, 200)
    ends = np.sort(rng.integers(0, 200_000, 20_000))
    ends[0] = 0
    indices = rng.integers(0, 1000, 200_000)
    with levels.use(levels.levels()[0]):
        expected = qembag.embedding_bag(table, indices, ends, num_threads=1)
    return table, indices, ends, expected


# ---- Arrays as they come -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*PLACES, *WRAPPERS])
@pytest.mark.parametrize("index_type", [np.int32, np.int64])
def test_index_arrays_in_any_memory_give_the_same(level, rng, way, index_type, same_bits):
    rows = packed_rows(rng, 9, 19, 4)
    table = table_of(rows, 4, 19)
    indices = rng.integers(0, 9, 24).astype(index_type)
    offsets = np.array([0, 3, 3, 20], dtype=index_type)
    weights = rng.normal(size=24).astype(np.float32)

    def changed(array: np.ndarray) -> Any:
        return place(array, way).value

    expected = reference.embedding_bag(rows, 4, 19, indices, offsets, weights=weights)
    same_bits(qembag.embedding_bag(table, changed(indices), offsets, per_sample_weights=weights), expected)
    same_bits(qembag.embedding_bag(table, indices, changed(offsets), per_sample_weights=weights), expected)
    same_bits(qembag.embedding_bag(table, indices, offsets, per_sample_weights=changed(weights)), expected)
    half = weights.astype(np.float16)
    expected = reference.embedding_bag(rows, 4, 19, indices, offsets, weights=half)
    same_bits(qembag.embedding_bag(table, indices, offsets, per_sample_weights=changed(half)), expected)
    square, square_weights = indices.reshape(4, 6), weights.reshape(4, 6)
    expected = reference.embedding_bag(rows, 4, 19, square, weights=square_weights)
    ours = qembag.embedding_bag(table, changed(square), per_sample_weights=changed(square_weights))
    same_bits(ours, expected)
    single = reference.embedding_bag(rows, 4, 19, indices[:, None])
    same_bits(qembag.embedding(table, changed(indices)), single)
    same_bits(qembag.embedding(table, changed(square)), single.reshape(4, 6, 19))


@pytest.mark.parametrize("index_type", ["i1", "i2", "u1", "u2", "u4", "u8", ">u8", ">i2", "p"])
def test_other_integer_types_are_converted(rng, index_type, same_bits):
    rows = packed_rows(rng, 9, 19, 2)
    table = table_of(rows, 2, 19)
    indices, offsets = rng.integers(0, 9, 24), np.array([0, 3, 3, 20])
    expected = reference.embedding_bag(rows, 2, 19, indices, offsets)
    same_bits(qembag.embedding_bag(table, indices.astype(index_type), offsets.astype(index_type)), expected)
    single = reference.embedding_bag(rows, 2, 19, indices[:, None])
    same_bits(qembag.embedding(table, indices.astype(index_type)), single)


def test_an_empty_list_is_no_indices(bits, rng):
    table = table_of(packed_rows(rng, 3, 7, bits), bits, 7)
    assert qembag.embedding_bag(table, [], [0, 0]).shape == (2, 7)
    assert qembag.embedding_bag(table, [], []).shape == (0, 7)
    assert qembag.embedding(table, []).shape == (0, 7)


OF_ROWS = ("plain", "gaps", "odd gaps", "far", "reversed", "misaligned", "read-only", "mapped")


@pytest.mark.parametrize("way", [*OF_ROWS, "a mapped file", "bytes"])
def test_tables_in_any_memory_give_the_same_uncopied(level, bits, rng, way, tmp_path, same_bits):
    for dim in (1, 15, 33, 260):
        rows = packed_rows(rng, 11, dim, bits)
        if way == "a mapped file":
            (tmp_path / "rows.bin").write_bytes(b"head" + rows.tobytes())
            lying = np.memmap(tmp_path / "rows.bin", dtype=np.uint8, mode="r", offset=4, shape=rows.shape)
        elif way == "bytes":
            lying = np.frombuffer(rows.tobytes(), dtype=np.uint8).reshape(rows.shape)
        else:
            lying = place(rows, way).value
        table = table_of(lying, bits, dim)
        assert np.shares_memory(table.data, lying)
        indices, offsets = rng.integers(0, 11, 40), np.array([0, 13, 13])
        for mode in ("sum", "max"):
            expected = reference.embedding_bag(rows, bits, dim, indices, offsets, mode=mode)
            same_bits(qembag.embedding_bag(table, indices, offsets, mode=mode), expected)
        same_bits(table.dequantize(), reference.dequantize(rows, bits, dim))
        del table, lying


def test_rows_may_all_be_one(level, bits, rng, same_bits):
    """A stride of zero, as np.broadcast_to makes."""
    row = packed_rows(rng, 1, 20, bits)
    table = table_of(np.broadcast_to(row, (1000, row.shape[1])), bits, 20)
    same_bits(qembag.embedding(table, [0, 999]), reference.embedding_bag(row, bits, 20, np.zeros((2, 1), np.int64)))


# ---- Output of the caller's ----------------------------------------------------------------------------------------------


OUTPUTS = ("plain", "gaps", "odd gaps", "far", "reversed", "misaligned")


def is_untouched_beside(whole: np.ndarray, out: np.ndarray) -> bool:
    """Whether all outside `out` still is 77, bytes or floats; `out` becomes so too."""
    out[...] = np.frombuffer(bytes([77] * out.itemsize), out.dtype) if whole.dtype == np.uint8 else 77
    return bool((whole == 77).all())


@pytest.mark.parametrize("way", OUTPUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_output_is_written_and_nothing_beside_it(level, bits, rng, way, dtype, same_bits):
    for dim in (1, 2, 5, 15, 16, 17, 31, 33, 127, 130, 300):
        rows = packed_rows(rng, 11, dim, bits)
        table = table_of(rows, bits, dim)
        indices, offsets = rng.integers(0, 11, 40), np.array([0, 13, 13, 14])
        expected = reference.embedding_bag(rows, bits, dim, indices, offsets, half=dtype == np.float16)
        out, whole = empty((4, dim), dtype, way, margin=64)
        assert qembag.embedding_bag(table, indices, offsets, out=out) is out
        same_bits(out.copy(), expected)
        assert is_untouched_beside(whole, out)
        assert qembag.embedding(table, indices[:4], out=out) is out
        same_bits(out.copy(), reference.embedding_bag(rows, bits, dim, indices[:4, None], half=dtype == np.float16))
        assert is_untouched_beside(whole, out)


def test_threads_write_into_strided_outputs(level, threads, bits, same_bits):
    case = many_bags(bits, "mixed")
    expected = many_expected(bits, "mixed", "sum")
    table = table_of(case["rows"], bits, THREAD_DIM)
    for way in OUTPUTS:
        out, whole = empty(expected.shape, np.float32, way, margin=64)
        qembag.embedding_bag(table, case["indices"], case["ends"], include_last_offset=True, out=out)
        same_bits(out.copy(), expected)
        assert is_untouched_beside(whole, out)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 3, 4), (0, 3), (2, 0, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_single_rows_follow_indices_of_any_shape(level, bits, rng, shape, dtype, same_bits):
    rows = packed_rows(rng, 11, 21, bits)
    table = table_of(rows, bits, 21)
    indices = rng.integers(0, 11, shape)
    flat = reference.embedding_bag(rows, bits, 21, indices.reshape(-1, 1), half=dtype == np.float16)
    expected = flat.reshape(*shape, 21)
    same_bits(qembag.embedding(table, indices, dtype=dtype), expected)
    contiguous = np.full((*shape, 21), 77, dtype=dtype)
    assert qembag.embedding(table, indices, out=contiguous) is contiguous
    same_bits(contiguous, expected)
    wide = np.full((*(2 * n for n in shape), 30), 77, dtype=dtype)
    inner = wide[(*(slice(None, None, 2) for _ in shape), slice(4, 25))]
    assert qembag.embedding(table, indices, out=inner) is inner
    same_bits(inner.copy(), expected)
    assert is_untouched_beside(wide, inner)


def test_an_output_may_be_every_second_of_an_odd_number_of_rows(level, bits, rng, same_bits):
    """The last row of a plane is not followed by a gap, and the next plane begins sooner than a row's stride says."""
    rows = packed_rows(rng, 11, 21, bits)
    indices = rng.integers(0, 11, (2, 3))
    whole = np.full((2, 5, 30), 77, np.float32)
    out = whole[:, ::2, :21]
    assert qembag.embedding(table_of(rows, bits, 21), indices, out=out) is out
    same_bits(out.copy(), reference.embedding_bag(rows, bits, 21, indices.reshape(-1, 1)).reshape(2, 3, 21))
    assert is_untouched_beside(whole, out)


def test_single_rows_go_into_a_transposed_output(level, bits, rng, same_bits):
    rows = packed_rows(rng, 11, 21, bits)
    indices = rng.integers(0, 11, (4, 6))
    out = np.zeros((6, 4, 21), np.float32).transpose(1, 0, 2)
    assert qembag.embedding(table_of(rows, bits, 21), indices, out=out) is out
    same_bits(out.copy(), reference.embedding_bag(rows, bits, 21, indices.reshape(-1, 1)).reshape(4, 6, 21))


def test_single_rows_that_are_pruned_are_zeros(level, bits, rng, same_bits):
    rows = packed_rows(rng, 4, 21, bits)
    mapping = np.array([2, -1, 0, 3, -1, 1, 1], dtype=np.int32)
    indices = np.array([[0, 1, 2], [4, 5, 6]])
    expected = reference.embedding_bag(rows, bits, 21, indices.reshape(-1, 1), mapping=mapping).reshape(2, 3, 21)
    out = np.full((2, 3, 21), 77, np.float32)
    for index_type in (np.int32, np.int64):
        same_bits(qembag.embedding(table_of(rows, bits, 21, mapping), indices.astype(index_type)), expected)
    same_bits(qembag.embedding(table_of(rows, bits, 21, mapping), indices, out=out), expected)
    assert not expected[0, 1].view(np.uint32).any()


# ---- At the edge of memory -------------------------------------------------------------------------------------------


@fenced.needs_fences
@pytest.mark.parametrize(("at", "offset"), [("start", -1), ("end", 0)])
def test_a_fence_kills_whoever_touches_it(at, offset):
    """That the tests below can fail at all."""
    script = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import ctypes
from support import fenced
array = fenced.empty(100, "u1", at={at!r})
beyond = array.ctypes.data + (100 if {at!r} == "end" else 0) + {offset}
ctypes.string_at(beyond - {offset} - ({at!r} == "end"), 1)
print("inside", flush=True)
ctypes.string_at(beyond, 1)
print("outside", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["inside"]
    assert done.returncode < 0


@fenced.needs_fences
@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dim", [*range(1, 41), 63, 64, 65, 127, 128, 129, 143, 257])
@pytest.mark.parametrize("length", LENGTHS)
def test_nothing_outside_a_callers_arrays_is_touched(level, bits, dim, length, at, same_bits):
    """Each array lies beside a page that may not be touched. Prefetches may go there: they never fault."""
    rows, indices, offsets, weights = bags_of_dim(bits, dim, length)
    table = table_of(fenced.copy(rows, at=at), bits, dim)
    for variant, options in VARIANTS.items():
        dtype = np.float16 if options.get("half") else np.float32
        out = fenced.empty((len(offsets), dim), dtype, at=at)
        qembag.embedding_bag(
            table,
            fenced.copy(indices.astype(options.get("index_type", np.int64)), at=at),
            fenced.copy(offsets.astype(np.int32 if variant == "mean" else np.int64), at=at),
            mode=options.get("mode", "sum"),
            per_sample_weights=fenced.copy(weights, at=at) if options.get("weighted") else None,
            out=out,
        )
        same_bits(out, expected_of_dim(bits, dim, length, variant))
    single = fenced.empty((7, dim), np.float32, at=at)
    qembag.embedding(table, fenced.copy(np.arange(7)), out=single)
    same_bits(single, reference.embedding_bag(rows, bits, dim, np.arange(7)[:, None]))
    same_bits(table.dequantize(out=single), reference.dequantize(rows, bits, dim))


@fenced.needs_fences
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_outside_strided_or_pruned_arrays_is_touched(level, bits, rng, at, same_bits):
    """The gap after the last row of a strided table need not exist."""
    for dim in (1, 2, 7, 15, 16, 17, 33):
        rows = packed_rows(rng, 5, dim, bits)
        row_bytes = rows.shape[1]
        memory = fenced.empty(5 * row_bytes + 4 * 11, np.uint8, at=at)
        for stride in (row_bytes + 11, -row_bytes - 11):
            first = 0 if stride > 0 else 4 * -stride
            lying = np.lib.stride_tricks.as_strided(memory[first:], rows.shape, (stride, 1))
            lying[...] = rows
            mapping = fenced.copy(np.array([4, -1, 0], dtype=np.int32), at=at)
            weights = fenced.copy(np.array([1, 2, 3, 4], dtype=np.float16), at=at)
            indices = fenced.copy(np.array([0, 2, 1, 0]), at=at)
            offsets = fenced.copy(np.array([0, 1], dtype=np.int32), at=at)
            ours = qembag.embedding_bag(
                table_of(lying, bits, dim, mapping), indices, offsets, per_sample_weights=weights, padding_idx=1
            )
            expected = reference.embedding_bag(
                rows, bits, dim, indices, offsets, weights=weights, mapping=mapping, padding_idx=1
            )
            same_bits(ours, expected)


@fenced.needs_fences
def test_a_bag_longer_than_any_prefetch_stays_inside(level, bits, rng, same_bits):
    """Row numbers are read ahead of the bag: never beyond the indices."""
    rows = packed_rows(rng, 50, 24, bits)
    for count in (1, 7, 8, 9, 63, 64, 65, 129, 300):
        for index_type in (np.int32, np.int64):
            indices = fenced.copy(rng.integers(0, 50, count).astype(index_type))
            offsets = fenced.copy(np.array([0, count // 2, count], dtype=index_type))
            ours = qembag.embedding_bag(table_of(fenced.copy(rows), bits, 24), indices, offsets)
            same_bits(ours, reference.embedding_bag(rows, bits, 24, indices, offsets))
