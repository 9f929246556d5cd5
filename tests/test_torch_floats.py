"""Live differential tests: bags of float rows are those of torch.nn.functional.embedding_bag in every bit.

Except where torch rounds twice: means of float16, and weights beside padding_idx.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import qembag
from support.floats import full_range, rows_of
from support.layouts import bag_offsets

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

DIMS = [*range(1, 41), 47, 48, 63, 64, 65, 96, 100, 127, 128, 129, 160, 200, 255, 256, 257, 300, 512, 529, 1024]
NUM_ROWS = 50
INTEGERS = [np.int32, np.int64]
KINDS = ["float32", "float16"]
# Enough elements in a call for the kernels to take a second thread.
PARALLEL_WORK = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _the_reference() -> None:
    if not torch.__version__.startswith("2.13.0"):
        pytest.skip(f"the reference is torch 2.13.0, got {torch.__version__}")


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of torch's, and of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    qembag.set_num_threads(request.param)
    yield request.param
    qembag.set_num_threads(None)
    torch.set_num_threads(before)


def theirs(
    rows: np.ndarray, indices: np.ndarray, offsets: np.ndarray | None = None, *, weights: Any = None, **options: Any
) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.functional.embedding_bag(
            torch.from_numpy(indices), torch.from_numpy(rows), None if offsets is None else torch.from_numpy(offsets),
            per_sample_weights=None if weights is None else torch.from_numpy(weights), **options,
        ).numpy()  # fmt: skip


def check(rows: np.ndarray, same_bits: Any, *bags: np.ndarray, weights: Any = None, **options: Any) -> None:
    """A table and a plain array, with an output and without one. Torch's output has the type of its table."""
    expected = theirs(rows, *bags, weights=weights, **options)
    given = {"per_sample_weights": weights, **options}
    for table in (qembag.FloatTable(rows), rows):
        same_bits(qembag.embedding_bag(table, *bags, dtype=expected.dtype, **given), expected)
    out = np.full(expected.shape, np.nan, expected.dtype)
    qembag.embedding_bag(rows, *bags, out=out, **given)
    same_bits(out, expected)


def bags_of(rng: np.random.Generator, index_type: Any, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices, ends and weights, of the type of the table, as torch wants them."""
    ends = bag_offsets(rng, 12, 9).astype(index_type)
    indices = rng.integers(0, NUM_ROWS, ends[-1]).astype(index_type)
    return indices, ends, rng.normal(size=len(indices)).astype(kind)


@pytest.mark.parametrize("index_type", INTEGERS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_weighted_sums_are_torchs(level, kind, index_type, rng, same_bits):
    for dim in DIMS:
        rows = rows_of(rng, kind, NUM_ROWS, dim)
        indices, ends, weights = bags_of(rng, index_type, kind)
        starts = np.ascontiguousarray(ends[:-1])
        check(rows, same_bits, indices, starts, mode="sum")
        check(rows, same_bits, indices, ends, mode="sum", include_last_offset=True)
        check(rows, same_bits, indices, starts, mode="sum", weights=weights)
        square = indices[:10].reshape(2, 5)
        check(rows, same_bits, square, mode="sum")
        check(rows, same_bits, square, mode="sum", weights=weights[:10].reshape(2, 5))


@pytest.mark.parametrize("index_type", INTEGERS)
def test_means_and_maxima_of_float32_are_torchs(level, index_type, rng, same_bits):
    for dim in DIMS:
        rows = rows_of(rng, "float32", NUM_ROWS, dim)
        indices, ends, _ = bags_of(rng, index_type, "float32")
        for mode in ("mean", "max"):
            check(rows, same_bits, indices, np.ascontiguousarray(ends[:-1]), mode=mode)
            check(rows, same_bits, indices, ends, mode=mode, include_last_offset=True)
            check(rows, same_bits, indices[:12].reshape(3, 4), mode=mode)


@pytest.mark.parametrize("index_type", INTEGERS)
def test_maxima_of_float16_are_torchs(level, index_type, rng, same_bits):
    for dim in DIMS[::3]:
        rows = rows_of(rng, "float16", NUM_ROWS, dim)
        indices, ends, _ = bags_of(rng, index_type, "float16")
        check(rows, same_bits, indices, np.ascontiguousarray(ends[:-1]), mode="max")


@pytest.mark.parametrize("padding_idx", [0, 7, -1, -NUM_ROWS])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_padding_is_left_out_as_torch_does(level, mode, padding_idx, rng, same_bits):
    for dim, index_type in itertools.product(DIMS[::4], INTEGERS):
        rows = rows_of(rng, "float32", NUM_ROWS, dim)
        indices, ends, _ = bags_of(rng, index_type, "float32")
        indices[rng.random(len(indices)) < 0.3] = padding_idx % NUM_ROWS
        check(rows, same_bits, indices, np.ascontiguousarray(ends[:-1]), mode=mode, padding_idx=padding_idx)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_any_exponent_are_torchs(level, kind, rng, same_bits):
    for dim in (1, 5, 16, 33, 64, 100, 300):
        rows = full_range(rng, kind, NUM_ROWS, dim)
        indices, ends, _ = bags_of(rng, np.int64, kind)
        weights = full_range(rng, kind, 1, len(indices))[0]
        starts = np.ascontiguousarray(ends[:-1])
        check(rows, same_bits, indices, starts, mode="sum")
        check(rows, same_bits, indices, starts, mode="sum", weights=weights)
        if kind == "float32":
            check(rows, same_bits, indices, starts, mode="mean")
            check(rows, same_bits, indices, starts, mode="max")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_large_lookups_are_torchs_at_one_and_two_threads(level, torch_threads, kind, is_weighted, rng, same_bits):
    for dim in (32, 100, 512):
        rows = full_range(rng, kind, 500, dim)
        ends = bag_offsets(rng, PARALLEL_WORK // (dim * 5) + 1, 10)
        indices = rng.integers(0, 500, ends[-1])
        weights = rng.normal(size=len(indices)).astype(kind) if is_weighted else None
        modes = ["sum"] if is_weighted or kind == "float16" else ["sum", "mean", "max"]
        for mode in modes:
            check(rows, same_bits, indices, ends, mode=mode, weights=weights, include_last_offset=True)


def test_single_rows_are_torchs(level, rng, same_bits):
    rows = full_range(rng, "float32", NUM_ROWS, 37)
    indices = rng.integers(0, NUM_ROWS, (4, 5, 6))
    expected = torch.nn.functional.embedding(torch.from_numpy(indices), torch.from_numpy(rows)).numpy()
    same_bits(qembag.FloatTable(rows).dequantize(indices), expected)
    same_bits(qembag.embedding(rows, indices), expected + np.float32(0))
