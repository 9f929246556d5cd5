"""Least squares: the oracle's bytes on every level, thread count and layout, and less error than the other methods."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import qembag
import reference
from support import fenced, levels

DIMS = [1, 3, 16, 17, 33, 64, 100]


def rows_of_all_kinds(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Normal ones of many sizes, few values far out, ties, a small range beside large values, constants."""
    normal = rng.normal(size=(19, dim))
    scales = np.array([1] * 6 + [1e-3, 1e-8, 1e-20, 1e-39, 100, 3000] + [1] * 7)[:, None]
    rows = (normal * scales).astype(np.float32)
    rows[12] = rng.standard_t(2, dim)
    rows[13] += 1000
    rows[14] = rng.integers(0, 4, dim)
    rows[15] = np.where(np.arange(dim) == 0, 50, rows[15])
    rows[16] = 0
    rows[17] = 1.0004
    rows[18] = np.abs(rows[18])
    return rows


@functools.cache
def case(bits: int, dim: int, pair: str, group_size: int | None, weighs: bool) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng([14, bits, dim])
    weights, importance = rows_of_all_kinds(rng, dim), rng.choice([0, 0.5, 1, 7], dim)
    importance[0] = 3
    options = {"pair": pair, "group_size": group_size if group_size and group_size < dim else None}
    counted = importance if weighs else None
    return weights, importance, reference.quantize(weights, bits, method="lsq", importance=counted, **options)


def squared_errors(table: qembag.QuantizedTable, weights: np.ndarray, importance: object = None) -> np.ndarray:
    """Of each row, by NumPy alone."""
    squares = np.square(table.dequantize().astype(np.float64) - weights)
    return (squares if importance is None else squares * importance).sum(axis=1)


def relative(table: qembag.QuantizedTable, weights: np.ndarray) -> float:
    return float(squared_errors(table, weights).sum() / np.square(weights, dtype=np.float64).sum())


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("pair", ["<f4", "<f2"])
def test_every_level_gives_the_oracles_bytes(level, bits, pair, group_size, weighs):
    scale_dtype = np.dtype(pair).newbyteorder("=").name
    for dim in DIMS:
        weights, importance, expected = case(bits, dim, pair, group_size, weighs)
        table = qembag.quantize(
            weights,
            bits,
            method="lsq",
            importance=importance if weighs else None,
            scale_dtype=scale_dtype,
            group_size=group_size,
        )
        assert np.array_equal(table.data, expected), dim


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"scale_first": True, "row_alignment": 16}])
def test_every_thread_count_gives_the_same_bytes(level, threads, bits, options):
    weights = np.random.default_rng(3).normal(size=(5000, 40)).astype(np.float32)
    with levels.use(levels.levels()[0]):
        expected = qembag.quantize(weights, bits, method="lsq", num_threads=1, **options).data
    assert np.array_equal(qembag.quantize(weights, bits, method="lsq", **options).data, expected)


def test_a_row_has_the_same_bytes_whatever_rows_stand_beside_it(level, bits):
    weights = rows_of_all_kinds(np.random.default_rng(8), 48)
    together = qembag.quantize(weights, bits, method="lsq", group_size=32).data
    for number, row in enumerate(weights):
        assert np.array_equal(qembag.quantize(row[None], bits, method="lsq", group_size=32).data[0], together[number])


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("group_size", [None, 16, 48])
def test_no_row_is_worse_than_by_its_minimum_and_maximum(level, bits, scale_dtype, group_size):
    for dim in (5, 64, 100):
        weights = np.concatenate([rows_of_all_kinds(np.random.default_rng([seed, dim]), dim) for seed in range(20)])
        options = {"scale_dtype": scale_dtype, "group_size": group_size}
        least = squared_errors(qembag.quantize(weights, bits, method="lsq", **options), weights)
        by_range = squared_errors(qembag.quantize(weights, bits, **options), weights)
        assert (least <= by_range).all(), np.flatnonzero(least > by_range)
        assert least.sum() < by_range.sum()


@pytest.mark.parametrize(
    ("bits", "dim", "most"), [(2, 64, 0.104), (2, 256, 0.116), (4, 64, 0.0068), (4, 256, 0.0097), (2, 16, 0.068)]
)
def test_normal_rows_have_as_little_error_as_promised(level, bits, dim, most):
    weights = np.random.default_rng(dim).normal(size=(2000, dim)).astype(np.float32)
    assert relative(qembag.quantize(weights, bits, method="lsq"), weights) <= most


def test_a_value_far_out_does_not_cost_the_others(level):
    """At 2 bits min-max gives all other values one code."""
    weights = np.random.default_rng(1).normal(size=(200, 128)).astype(np.float32)
    weights[:, 5] = 12
    errors = [relative(qembag.quantize(weights, 2, method=method), weights) for method in ("minmax", "lsq")]
    assert errors[1] < 0.4 * errors[0]


# ---- What columns count ------------------------------------------------------------------------------------------------


def test_columns_that_count_more_have_less_error(level, bits, rng):
    weights = rng.normal(size=(300, 64)).astype(np.float32)
    importance = np.where(np.arange(64) < 8, 20.0, 1.0)
    plain, weighted = (qembag.quantize(weights, bits, method="lsq", importance=used) for used in (None, importance))
    assert squared_errors(weighted, weights, importance).sum() < squared_errors(plain, weights, importance).sum()
    by_range = squared_errors(qembag.quantize(weights, bits), weights, importance)
    assert (squared_errors(weighted, weights, importance) <= by_range).all()


@pytest.mark.parametrize("equal", [np.ones(40), np.full(40, 1e300), np.full(40, 3, np.float16), [0.1] * 40])
def test_columns_that_count_alike_change_nothing(bits, rng, equal):
    weights = rng.normal(size=(40, 40)).astype(np.float32)
    plain = qembag.quantize(weights, bits, method="lsq", group_size=16).data
    assert np.array_equal(qembag.quantize(weights, bits, method="lsq", group_size=16, importance=equal).data, plain)


@pytest.mark.parametrize("factor", [1e-25, 1e-300, 1e30])
def test_only_ratios_within_a_group_matter(bits, rng, factor):
    weights, importance = rng.normal(size=(40, 64)).astype(np.float32), rng.random(64)
    options = {"method": "lsq", "group_size": 32}
    plain = qembag.quantize(weights, bits, importance=importance, **options)
    importance[32:] *= factor
    assert np.array_equal(qembag.quantize(weights, bits, importance=importance, **options).data, plain.data)


def test_a_group_in_which_no_column_counts_is_as_by_its_minimum_and_maximum(level, bits, rng):
    weights = rng.normal(size=(40, 32)).astype(np.float32)
    importance = np.repeat([0, 1], 16)
    options = {"group_size": 16, "scale_dtype": "float32"}
    table = qembag.quantize(weights, bits, method="lsq", importance=importance.astype(float), **options)
    by_range = qembag.quantize(weights, bits, **options)
    assert np.array_equal(table.codes()[:, :16], by_range.codes()[:, :16])
    assert np.array_equal(table.scales[:, 0], by_range.scales[:, 0])
    assert not np.array_equal(table.codes()[:, 16:], by_range.codes()[:, 16:])


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (np.ones(3), ValueError, r"^importance must have shape \(4,\), a number for each column, got a float64 array"),
        (np.ones((1, 4)), ValueError, r"^importance must have shape \(4,\)"),
        (np.zeros(4), ValueError, "^importance must have a number above 0, got zeros only$"),
        (np.array([1, -1.0, 1, 1]), ValueError, r"^importance\[1\] must be finite and not negative, got -1$"),
        (np.array([1, 1, np.nan, 1]), ValueError, r"^importance\[2\] must be finite and not negative, got nan$"),
        (np.array([1, 1, 1, np.inf]), ValueError, r"^importance\[3\] must be finite and not negative, got inf$"),
        (np.arange(4), TypeError, "^importance must be"),
        ("1111", TypeError, "^importance must be"),
    ],
)
def test_what_columns_cannot_count_is_refused(importance, error, message):
    with pytest.raises(error, match=message):
        qembag.quantize(np.ones((2, 4), np.float32), 4, method="lsq", importance=importance)


@pytest.mark.parametrize("method", ["minmax", "greedy"])
def test_other_methods_take_no_importance(method):
    with pytest.raises(ValueError, match=r"^importance must come with method='lsq', got method='"):
        qembag.quantize(np.ones((2, 4), np.float32), 4, method=method, importance=np.ones(4))


# ---- What is wrong -----------------------------------------------------------------------------------------------------


def test_the_first_bad_row_is_named(level, threads, bits):
    weights = np.random.default_rng(6).normal(size=(5000, 20)).astype(np.float32)
    for bad in ([0], [17, 18], [4000, 4999]):
        spoiled = weights.copy()
        spoiled[bad, 7] = np.nan
        with pytest.raises(ValueError, match=rf"^weights\[{bad[0]}\] must be finite to be quantized"):
            qembag.quantize(spoiled, bits, method="lsq")


@pytest.mark.parametrize("row", [[1e38, -1e38], [3.4e38, -3.4e38], [1e20, -1e20], [1e-45, 0]])
def test_rows_whose_squares_are_beyond_float32_are_as_good_as_by_their_bounds(level, row):
    weights = np.float32([row * 20, [value / 3 for value in row] * 20])
    for bits in (8, 4, 2):
        try:
            by_range = qembag.quantize(weights, bits, scale_dtype="float32")
        except ValueError as error:
            with pytest.raises(ValueError, match="must have a minimum and a scale"):
                qembag.quantize(weights, bits, scale_dtype="float32", method="lsq")
            if "must have a minimum and a scale" not in str(error):
                raise
            continue
        least = qembag.quantize(weights, bits, scale_dtype="float32", method="lsq")
        assert (squared_errors(least, weights) <= squared_errors(by_range, weights)).all()


@fenced.needs_fences
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_outside_weights_and_importance_is_read(level, bits, at, rng):
    for dim in [*range(1, 41), 63, 64, 65]:
        weights = fenced.copy(rng.normal(size=(3, dim)).astype(np.float32), at=at)
        importance = fenced.copy(np.ones(dim, np.float32), at=at)
        for group_size in (None, 16):
            plain, counted = (
                qembag.quantize(weights, bits, method="lsq", group_size=group_size, importance=given).data
                for given in (None, importance)
            )
            assert np.array_equal(plain, counted)
