"""Calls from several Python threads at once, most of them in several threads of their own: each gives the right bits.

`tools/test_races` runs this file under ThreadSanitizer too, which sees a race also where it does no harm that time.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import qembag
from qembag import ops
from support.arrays import same_bits
from support.layouts import NAMES, packed_rows
from support.many_tables import batch_of, of_every_kind

# Enough of each to be shared out among threads; see MIN_PARALLEL_WORK.
NUM_ROWS, DIM, NUM_BAGS, BAG = 500, 40, 300, 20
ROUNDS = 4


def at_once(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> None:
    """Each call in a Python thread of its own, all let go together; raises what one of them raised."""
    start = threading.Barrier(len(calls))

    def repeat(call: Callable[[], object]) -> None:
        start.wait(60)
        for _ in range(rounds):
            call()

    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(repeat, call) for call in calls]:
            future.result()


class Case:
    """A table, whole and pruned, arguments of lookups in it, and what each lookup gives on one thread."""

    def __init__(self, bits: int, seed: int) -> None:
        rng = np.random.default_rng([seed, bits])
        rows = packed_rows(rng, NUM_ROWS, DIM, bits)
        whole = qembag.QuantizedTable(rows, bits)
        mapping = np.where(rng.random(NUM_ROWS) < 0.2, -1, rng.permutation(NUM_ROWS)).astype(np.int32)
        pruned = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
        indices = rng.integers(0, NUM_ROWS, NUM_BAGS * BAG)
        narrow = indices.astype(np.int32)
        ends = np.sort(rng.integers(0, len(indices), NUM_BAGS + 1))
        weights = rng.normal(size=len(indices)).astype(np.float32)
        bag, row = qembag.embedding_bag, qembag.embedding
        self.wrong = np.where(np.arange(len(indices)) == 4321, NUM_ROWS, indices)
        self.table = whole
        self.indices = indices
        self.lookups: list[Callable[..., np.ndarray]] = [
            lambda **how: bag(whole, indices, ends, include_last_offset=True, **how),
            lambda **how: bag(whole, narrow, ends[:-1].astype(np.int32), mode="mean", **how),
            lambda **how: bag(
                whole, indices.reshape(NUM_BAGS, BAG), per_sample_weights=weights.reshape(NUM_BAGS, BAG), **how
            ),
            lambda **how: bag(pruned, narrow.reshape(NUM_BAGS, BAG), mode="max", padding_idx=3, **how),
            lambda **how: row(whole, narrow, **how),
            lambda **how: row(pruned, indices, dtype=None if "out" in how else np.float16, **how),
        ]
        self.expected = [lookup(num_threads=1) for lookup in self.lookups]

    def check(self, number: int, **how: Any) -> None:
        same_bits(self.lookups[number](**how), self.expected[number])


@pytest.fixture(scope="module", params=[8, 4, 2])
def cases(request: pytest.FixtureRequest) -> list[Case]:
    return [Case(request.param, seed) for seed in range(3)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_look_up_in_one_table(level, cases, num_threads):
    case = cases[0]
    at_once([lambda n=n: case.check(n, num_threads=num_threads) for n in range(len(case.lookups))])


def test_threads_look_up_in_tables_of_their_own(level, cases):
    numbers = itertools.product(range(3), (2, 3))
    at_once([lambda k=k, n=n: cases[k].check((k + n) % 6, num_threads=n) for k, n in numbers])


def test_threads_write_into_neighbouring_rows_of_one_array(level, cases):
    """No lookup stores outside its own output, not even what its neighbour stores there too."""
    case = cases[0]
    out = np.full((4 * NUM_BAGS + 1, DIM), np.nan, dtype=np.float32)
    parts = [out[k * NUM_BAGS : (k + 1) * NUM_BAGS] for k in range(4)]
    at_once([lambda k=k: case.check(k, out=parts[k], num_threads=1 + k % 3) for k in range(4)])
    for part, expected in zip(parts, case.expected, strict=False):
        same_bits(part, expected)
    assert np.isnan(out[-1]).all()


def test_threads_dequantize_and_read_one_table(level, cases):
    table = cases[0].table
    values, scales, codes = table.dequantize(), table.scales, table.codes()

    def check() -> None:
        same_bits(table.dequantize(), values)
        same_bits(table[3:60], values[3:60])
        same_bits(table.scales, scales)
        assert np.array_equal(table.codes(), codes)

    at_once([check] * 4)


def test_threads_that_make_mistakes_disturb_no_others(level, cases):
    case = cases[0]

    def mistake() -> None:
        with pytest.raises(IndexError, match=rf"^indices\[216, 1\] is {NUM_ROWS} \(bag 216\): "):
            qembag.embedding_bag(case.table, case.wrong.reshape(NUM_BAGS, BAG), num_threads=2)

    at_once([mistake, mistake, *(lambda n=n: case.check(n, num_threads=2) for n in range(4))])


@pytest.fixture(scope="module")
def many() -> tuple[Any, list[Callable[..., np.ndarray]], list[np.ndarray]]:
    """A collection of many tables, lookups in it, small ones and such as are shared out, and what each gives."""
    rng = np.random.default_rng(31)
    tables = of_every_kind(rng)
    collection, lookups = tables.make(), []
    for num_bags, longest in ((1, 3), (4, 10), (60, 15)):
        batch = batch_of(rng, tables, num_bags, longest)
        flat, pairs, weights = batch.flat(np.int32), batch.pairs(), batch.weights_by_feature()
        lookups += [
            lambda flat=flat, **how: collection(*flat, **how),
            lambda pairs=pairs, weights=weights, **how: collection(pairs, per_sample_weights=weights, **how),
        ]
    return collection, lookups, [lookup(num_threads=1) for lookup in lookups]


def test_32_threads_look_up_in_one_collection(level, many):
    collection, lookups, expected = many
    outs = [np.empty_like(expected[n % len(lookups)]) for n in range(32)]

    def check(number: int) -> None:
        lookup, right, out = lookups[number % len(lookups)], expected[number % len(lookups)], outs[number]
        same_bits(lookup(num_threads=1 + number % 3), right)
        given = collection.split(out) if number % 2 else out
        assert lookup(out=given, num_threads=1 + number % 2) is given
        same_bits(out, right)

    at_once([lambda n=n: check(n) for n in range(32)], rounds=3)


def test_threads_that_make_mistakes_in_a_collection_disturb_no_others(level, many):
    collection, lookups, expected = many
    out = np.full((300, collection.dim), np.float32(7))
    wrong = dict.fromkeys(collection.features, (np.full(6000, 2**31 - 1, np.int32), np.arange(0, 6001, 20)))

    def mistake() -> None:
        with pytest.raises(IndexError, match=r"^indices\['f0'\]\[0\] is 2147483647 \(bag 0\): "):
            collection(wrong, out=out, num_threads=2)

    def check(number: int) -> None:
        same_bits(lookups[number](num_threads=2), expected[number])

    at_once([mistake, mistake, *(lambda n=n: check(n) for n in range(len(lookups)))])
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("bits", "method"), [(8, "minmax"), (4, "minmax"), (2, "minmax"), (4, "greedy"), (2, "greedy")]
)
def test_threads_quantize_one_array(level, bits, method):
    weights = np.random.default_rng(bits).normal(size=(200 if method == "greedy" else 6000, DIM)).astype(np.float32)
    expected = qembag.quantize(weights, bits, method=method, num_threads=1).data
    wrong = weights.copy()
    wrong[150, 7] = np.inf

    def check(num_threads: int) -> None:
        assert np.array_equal(qembag.quantize(weights, bits, method=method, num_threads=num_threads).data, expected)

    def mistake() -> None:
        with pytest.raises(ValueError, match=r"^weights\[150\] must be finite"):
            qembag.quantize(wrong, bits, method=method, num_threads=3)

    at_once([lambda: check(1), lambda: check(2), lambda: check(3), mistake], rounds=2)


def test_the_number_of_threads_changes_while_others_work(level, cases):
    case = cases[0]
    operator = getattr(ops, f"embedding_bag_{NAMES[case.table.bits]}_rowwise_offsets")
    offsets = np.arange(0, NUM_BAGS * BAG, BAG)
    expected = operator(case.table.data, case.indices, offsets)
    turns = itertools.cycle([1, 2, 3, None])

    def change() -> None:
        for _ in range(20):
            qembag.set_num_threads(next(turns))
            case.check(0)

    try:
        at_once(
            [change, *[lambda: same_bits(operator(case.table.data, case.indices, offsets), expected)] * 3], rounds=5
        )
    finally:
        qembag.set_num_threads(None)
