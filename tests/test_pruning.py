"""`choose_rows`: which rows are kept, what is lost with the others, for each kind of table."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import tracemalloc

import numpy as np
import pytest

import qembag
from support.floats import stored_as

NUM_ROWS, DIM = 40, 24


@pytest.fixture
def rows(rng):
    return (rng.standard_normal((NUM_ROWS, DIM)) * rng.exponential(size=(NUM_ROWS, 1))).astype(np.float32)


@pytest.fixture
def counts(rng):
    """Some are equal."""
    return rng.integers(0, 12, NUM_ROWS)


@pytest.fixture(params=["8 bits", "4 bits", "padded", "pruned", "float32", "float16", "bfloat16", "pruned floats"])
def table(request, rows):
    kept = np.arange(NUM_ROWS) % 4 > 0
    return {
        "8 bits": lambda: qembag.quantize(rows),
        "4 bits": lambda: qembag.quantize(rows, 4),
        "padded": lambda: qembag.quantize(rows, 2, group_size=16, row_alignment=32),
        "pruned": lambda: qembag.quantize(rows).prune(kept),
        "float32": lambda: qembag.FloatTable(rows),
        "float16": lambda: qembag.FloatTable(rows.astype(np.float16)),
        "bfloat16": lambda: qembag.FloatTable(stored_as(rows, "bfloat16"), dtype="bfloat16"),
        "pruned floats": lambda: qembag.FloatTable(rows).prune(kept),
    }[request.param]()


def expected(table, counts=None, min_norm=0.0, min_count=0, max_rows=10**9):
    """By sorting in Python: the rows that are kept."""
    norms = [sum(float(x) ** 2 for x in row) ** 0.5 for row in table.dequantize()]
    mapping = table.compressed_indices_mapping
    used = [0] * NUM_ROWS if counts is None else counts.tolist()
    there = [row for row in range(NUM_ROWS) if mapping is None or mapping[row] >= 0]
    good = [row for row in there if norms[row] >= min_norm and used[row] >= min_count]
    best = sorted(good, key=lambda row: (-used[row], -norms[row], row))[:max_rows]
    return sorted(best), there, norms


CONDITIONS = [
    {"min_norm": 2.5},
    {"min_count": 3},
    {"max_rows": 7},
    {"max_rows": 0},
    {"min_norm": 1.5, "max_rows": 11},
    {"min_norm": 1.5, "min_count": 5, "max_rows": 11},
    {"min_count": 99},
    {"max_rows": 10**30},
    {"min_count": 2**70},
]


@pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
@pytest.mark.parametrize("with_counts", [False, True])
def test_rows_are_chosen_as_by_sorting(table, counts, conditions, with_counts):
    used = counts if with_counts or "min_count" in conditions else None
    choice = qembag.choose_rows(table, counts=used, **conditions)
    kept, there, norms = expected(table, used, **conditions)
    assert np.flatnonzero(choice.keep).tolist() == kept
    assert choice.keep.dtype == np.bool_
    assert (choice.num_kept, choice.num_dropped) == (len(kept), len(there) - len(kept))
    dropped = sorted(set(there) - set(kept))
    weights = [1] * NUM_ROWS if used is None else used.tolist()
    lost = sum(weights[row] * norms[row] ** 2 for row in dropped)
    assert choice.error == pytest.approx(lost / sum(w * norm**2 for w, norm in zip(weights, norms, strict=True)))
    if used is None:
        assert choice.traffic_dropped is None
    else:
        assert choice.traffic_dropped == pytest.approx(used[dropped].sum() / used.sum())


@pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
def test_a_choice_prunes_and_says_the_bytes(table, counts, conditions):
    choice = qembag.choose_rows(table, counts=counts, **conditions)
    pruned = table.prune(choice)
    assert pruned.num_rows == choice.num_kept
    assert (choice.nbytes_before, choice.nbytes_after) == (table.nbytes, pruned.nbytes)
    np.testing.assert_array_equal(pruned.dequantize(), np.where(choice.keep[:, None], table.dequantize(), 0))


def test_the_error_is_that_of_the_pruned_table(table):
    choice = qembag.choose_rows(table, max_rows=9)
    before, after = (part.dequantize().astype(np.float64) for part in (table, table.prune(choice)))
    assert choice.error == pytest.approx(((before - after) ** 2).sum() / (before**2).sum())


def test_as_many_rows_as_fit_are_kept(table):
    """Within any number of bytes, one more row would be too much."""
    least = 4 * NUM_ROWS
    for max_bytes in range(least, table.nbytes + least + 3, 7):
        choice = qembag.choose_rows(table, max_bytes=max_bytes)
        assert choice.nbytes_after <= max_bytes
        rows_there = choice.num_kept + choice.num_dropped
        assert choice.num_kept == rows_there or choice.nbytes_after + table.row_bytes > max_bytes
        assert choice.keep.tolist() == qembag.choose_rows(table, max_rows=choice.num_kept).keep.tolist()
    with pytest.raises(ValueError, match=rf"^max_bytes must be at least {least} for the mapping, got {least - 1}$"):
        qembag.choose_rows(table, max_bytes=least - 1)


def test_of_equals_the_higher_numbers_go_first():
    rows = np.ones((6, 4), np.float32)
    assert qembag.choose_rows(rows, max_rows=2).keep.tolist() == [True, True, False, False, False, False]
    rows[4] = 2
    assert np.flatnonzero(qembag.choose_rows(rows, max_rows=2).keep).tolist() == [0, 4]
    chosen = qembag.choose_rows(rows, max_rows=2, counts=[0, 1, 0, 1, 0, 0])
    assert np.flatnonzero(chosen.keep).tolist() == [1, 3]


def test_a_norm_that_equals_the_limit_is_kept():
    rows = np.float32([[3, 4], [0, 4.9999995]])
    assert qembag.choose_rows(rows, min_norm=5).keep.tolist() == [True, False]


def test_norms_neither_overflow_nor_vanish():
    rows = np.float32([[3e38, 3e38], [1e-45, 0], [0, 0]])
    assert qembag.choose_rows(rows, min_norm=1e-45).keep.tolist() == [True, True, False]
    assert qembag.choose_rows(rows, min_norm=4e38).keep.tolist() == [True, False, False]


def test_counts_of_any_integer_type_are_taken():
    rows = np.ones((3, 4), np.float32)
    for kind in (np.int8, np.uint16, ">i4", np.int64, np.uint64):
        assert qembag.choose_rows(rows, min_count=3, counts=np.array([2, 3, 4], kind)).keep.tolist() == [
            False,
            True,
            True,
        ]
    large = np.array([2**63, 2**64 - 1, 2**63 + 1], np.uint64)
    assert qembag.choose_rows(rows, min_count=2**63 + 1, counts=large).keep.tolist() == [False, True, True]
    assert qembag.choose_rows(rows, max_rows=1, counts=large).keep.tolist() == [False, True, False]


def test_nothing_to_lose_is_no_error():
    choice = qembag.choose_rows(np.zeros((3, 4), np.float32), min_norm=1, counts=[0, 0, 0])
    assert (choice.num_dropped, choice.error, choice.traffic_dropped) == (3, 0, 0)
    empty = qembag.choose_rows(np.zeros((0, 4), np.float32), max_rows=1, counts=[])
    assert (empty.num_kept, empty.error, empty.nbytes_after) == (0, 0, 0)


@pytest.mark.parametrize("elements", [1, 5 * DIM + 1])
def test_the_size_of_blocks_changes_nothing(table, elements, monkeypatch):
    before = qembag.choose_rows(table, min_norm=2.5)
    monkeypatch.setattr(sys.modules["qembag.pruning"], "ELEMENTS_AT_ONCE", elements)
    after = qembag.choose_rows(table, min_norm=2.5)
    assert before.keep.tolist() == after.keep.tolist()
    assert before.error == after.error


def test_memory_is_bounded():
    table = qembag.quantize(np.zeros((200_000, 64), np.float32), 4)
    counts = np.zeros(200_000, np.int64)
    tracemalloc.start()
    try:
        qembag.choose_rows(table, max_rows=1000, counts=counts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000 * 50 + 5e6 < 200_000 * 64 * 4


def test_a_choice_says_in_words_what_is_lost(rows, counts):
    text = str(qembag.choose_rows(rows, max_rows=10, counts=counts))
    assert text.startswith("Keeps 10 rows and drops 30 with ")
    assert "\n" not in text
    for part in ("% of the lookups", "relative squared error 0.", "3.8 KiB before, 1.1 KiB after"):
        assert part in text
    assert "lookups" not in str(qembag.choose_rows(rows, max_rows=10))
    assert repr(qembag.choose_rows(rows, max_rows=10)).startswith("RowChoice(num_kept=10, num_dropped=30, error=0.")


def test_a_choice_is_an_array_a_value_and_pickles(rows):
    choice = qembag.choose_rows(rows, max_rows=10)
    assert np.asarray(choice) is choice.keep
    assert np.array(choice) is not choice.keep
    assert np.asarray(choice, np.int8).sum() == 10
    again = pickle.loads(pickle.dumps(choice))
    assert again.keep.tolist() == choice.keep.tolist()
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.error = 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "min_norm, min_count, max_rows or max_bytes must be given"),
        ({"counts": [1] * NUM_ROWS}, ValueError, "min_norm, min_count, max_rows or max_bytes must be given"),
        ({"min_count": 1}, ValueError, "min_count must come with counts"),
        ({"max_rows": -1}, ValueError, "max_rows must be at least 0, got -1"),
        ({"max_rows": 1.5}, TypeError, "max_rows must be a whole number, got float 1.5"),
        ({"min_norm": -1}, ValueError, "min_norm must be 0 or more"),
        ({"min_norm": np.nan}, ValueError, "min_norm must be 0 or more"),
        ({"min_norm": np.inf}, ValueError, "min_norm must be 0 or more"),
        ({"min_norm": "1"}, TypeError, "min_norm must be a number"),
        ({"min_norm": True}, TypeError, "min_norm must be a number"),
        ({"max_rows": 1, "counts": [1, 2]}, ValueError, r"counts must have shape \(40,\)"),
        ({"max_rows": 1, "counts": [1.0] * NUM_ROWS}, TypeError, "counts must be an array of integers"),
        ({"max_rows": 1, "counts": [0] * 39 + [-2]}, ValueError, "counts must not be below 0, got -2 for row 39"),
        ({"table": np.zeros((3, 4)), "max_rows": 1}, TypeError, "table must be a QuantizedTable, a FloatTable or"),
        ({"table": np.zeros(3, np.float32), "max_rows": 1}, ValueError, "table must have 2 dimensions"),
        ({"table": np.float32([[1], [np.nan]]), "max_rows": 1}, ValueError, "table must have finite rows, got row 1"),
    ],
)
def test_wrong_arguments_are_refused(rows, change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        qembag.choose_rows(**{"table": rows, **change})
