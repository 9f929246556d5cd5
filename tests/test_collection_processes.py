"""What a server does to a collection while it works: forks, signals, threads, and arrays that others let go of."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import sys
import textwrap
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

import qembag
from support.arrays import same_bits
from support.layouts import packed_rows
from support.many_tables import Many, batch_of, check, of_every_kind, plain
from test_processes import FORKS_UNDER_LOAD, interrupt, said

__all__ = ["interrupt"]  # a fixture

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork")
needs_timers = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="for systems with timers")

# Each call is work for several threads: children that wait for their parent's hang.
COLLECTION = """
kinds = 8, 4, 2
tables = {str(n): qembag.quantize(rng.normal(size=(1000, 16 + n)).astype(np.float32), kinds[n % 3]) for n in range(20)}
collection = qembag.EmbeddingBagCollection(tables)
ids, lengths = rng.integers(0, 1000, 20 * 100 * 10), np.full((20, 100), 10)
expected_of_all = collection(ids, lengths=lengths, num_threads=1)

def look_up(num_threads=3):
    assert np.array_equal(collection(ids, lengths=lengths, num_threads=num_threads), expected_of_all)
"""


def says(code: str) -> str:
    return said(COLLECTION + textwrap.dedent(code))


# ---- Forks -----------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.slow
def test_children_and_parent_work_on_after_forks_under_load() -> None:
    assert says(FORKS_UNDER_LOAD.format(count=30)) == "30"


@needs_fork
@pytest.mark.slow
def test_a_child_works_after_a_parallel_call_and_its_own_children_do() -> None:
    code = """
    def generations(left):
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            look_up()
            os._exit(42 if left == 0 or generations(left - 1) else 1)
        return ended_well(child)
    look_up()
    print(generations(2), ended_well(in_child(ctypes.PyDLL(None).fork)))
    look_up()
    """
    assert says(code) == "True True"


@needs_fork
@pytest.mark.slow
def test_a_pool_of_processes_gets_a_collection_and_looks_up_in_it() -> None:
    code = """
    import multiprocessing
    look_up()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = [pool.apply_async(collection, (ids,), {"lengths": lengths}) for _ in range(4)]
        look_up()
        print(all(np.array_equal(result.get(100), expected_of_all) for result in results))
    """
    assert says(code) == "True"


# ---- Signals ---------------------------------------------------------------------------------------------------------


@needs_timers
@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("bag", [1000, 20_000_000], ids=["many bags", "one giant bag"])
def test_a_long_call_answers_a_signal(level: str, interrupt: Any, num_threads: int, bag: int, rng: Any) -> None:
    """Ctrl-C is one. What is left of the output says that the call ended early."""
    large = qembag.quantize(rng.normal(size=(2000, 1024)).astype(np.float32), 4)
    small = qembag.quantize(rng.normal(size=(10, 8)).astype(np.float32))
    collection = qembag.EmbeddingBagCollection({"a": small, "b": large, "c": large})
    ids = np.resize(rng.integers(0, 2000, 40_000, dtype=np.int32), 20_000_000)
    ends = np.arange(0, len(ids) + 1, bag)
    num_bags = len(ends) - 1
    few = (np.zeros(num_bags, np.int32), np.arange(num_bags + 1))
    out = np.full((num_bags, collection.dim), np.nan, np.float32)
    interrupt(0.1)
    with pytest.raises(Exception, match=r"^$") as caught:
        collection({"a": few, "b": (ids, ends), "c": (ids, ends)}, out=out, num_threads=num_threads)
    assert type(caught.value).__name__ == "Interrupted"
    assert np.isnan(out[-1, -1024:]).all(), "the call had ended"
    given = dict.fromkeys(("a", "b", "c"), np.arange(10).reshape(5, 2))
    same_bits(collection(given, num_threads=num_threads), collection(given, num_threads=1))


@needs_timers
@pytest.mark.slow
def test_what_a_signals_handler_does_to_the_arguments_does_not_count(rng: np.random.Generator) -> None:
    handled = []
    rows = packed_rows(rng, 500, 1024, 8)
    one = qembag.QuantizedTable(rows.copy(), 8)
    collection = qembag.EmbeddingBagCollection({"a": one, "b": one})
    lengths = np.full((2, 5000), 300)
    given = {"indices": rng.integers(0, 500, 3_000_000), "out": np.zeros((5000, 2048), np.float32)}
    small = np.arange(4).reshape(2, 2)
    expected = collection(given["indices"].copy(), lengths=lengths)
    memory = memoryview(given["out"])

    def handler(*_: Any) -> None:
        if handled:
            return
        handled.append(time.perf_counter())
        same_bits(collection({"a": small, "b": small})[:, :1024], qembag.embedding_bag(one, small))
        for array in (given["indices"], given["out"], one.data.base):
            with pytest.raises(ValueError, match="resize"):
                array.resize(10)
        one.__init__(packed_rows(rng, 2, 8, 8), 8)  # type: ignore[misc]
        given.clear()
        gc.collect()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        collection(given["indices"], lengths=lengths, out=given["out"], num_threads=2)
        ended = time.perf_counter()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled
    assert handled[0] < ended
    same_bits(np.asarray(memory), expected)


# ---- What others do to tables and arrays -----------------------------------------------------------------------------


def test_a_table_that_gets_other_rows_leaves_the_collection_with_those_it_was_made_of() -> None:
    many = plain(3)
    batch = batch_of(np.random.default_rng(2), many, 4)
    collection = many.make()
    expected = batch.one_by_one(many, weighted=False)
    for table in many.tables.values():
        table.made.__init__(np.zeros((2, 12), np.uint8), 8)
    gc.collect()
    check(collection(*batch.flat()), expected, collection)
    check(collection(batch.pairs()), expected, collection)
    assert collection.dim == 24


def test_a_collection_keeps_the_memory_of_its_tables(rng: np.random.Generator) -> None:
    data, mapping = packed_rows(rng, 10, 8, 8), np.arange(10, dtype=np.int32)
    one = qembag.QuantizedTable(data, 8, compressed_indices_mapping=mapping)
    square = rng.integers(0, 10, (5, 3))
    expected = qembag.embedding_bag(one, square)
    collection = qembag.EmbeddingBagCollection([one])
    del one
    gc.collect()
    for array in (data, mapping):
        with pytest.raises(ValueError, match="resize"):
            array.resize(1)
    del data, mapping, array
    gc.collect()
    filler = [np.full(size, 255, np.uint8) for size in (160, 40) for _ in range(50)]
    same_bits(collection({"0": square}), expected)
    del filler


def test_calls_keep_no_reference(rng: np.random.Generator) -> None:
    """Neither those that answer nor those that fail."""
    many = plain(5)
    batch = batch_of(rng, many, 4)
    collection = many.make()
    indices, offsets = batch.flat()
    pairs, out = batch.pairs(), np.zeros((4, collection.dim), np.float32)
    outs = collection.split(out)
    wrong = np.full_like(indices, 10)
    weights = batch.weights_by_feature()
    arrays = [
        indices,
        offsets,
        out,
        wrong,
        *outs.values(),
        *weights.values(),
        *(a for pair in pairs.values() for a in pair),
    ]
    gc.collect()
    before = [sys.getrefcount(array) for array in arrays]
    for _ in range(30):
        collection(indices, offsets, out=out)
        collection(pairs, per_sample_weights=weights, out=outs)
        for given in (
            (wrong, offsets),
            (indices, offsets[1:]),
            (pairs | {"f3": (wrong, offsets)},),
            (pairs | {"f4": 1},),
        ):
            for how in ({"out": out}, {"out": outs}, {"out": out[1:]}, {"per_sample_weights": weights["f0"]}):
                with pytest.raises((TypeError, ValueError, IndexError)):
                    collection(*given, **how)
    del given, how
    gc.collect()
    assert [sys.getrefcount(array) for array in arrays] == before


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_of_a_collection_give_the_same(again: Any, rng: np.random.Generator) -> None:
    many = of_every_kind(rng, np.float16)
    batch = batch_of(rng, many, 3)
    collection = many.make()
    other = again(collection)
    check(other(batch.pairs()), batch.one_by_one(many, weighted=False), other)
    for name in ("features", "modes", "padding_idx", "invalid", "dims", "columns", "dtype", "nbytes"):
        assert getattr(other, name) == getattr(collection, name), name


# ---- Memory ----------------------------------------------------------------------------------------------------------


def peak_of(call: Any) -> int:
    for _ in range(3):
        call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_call_makes_nothing_that_grows_with_the_batch_but_its_output(num_threads: int, rng: Any) -> None:
    """As NumPy and Python say; `test_memory.py` asks the allocator."""
    many = Many(plain(20).tables, plain(20).features)
    collection = many.make()
    grown: dict[str, list[int]] = {}
    for num_bags in (50, 500):
        batch = batch_of(rng, many, num_bags, width=10)
        indices, offsets = batch.flat()
        weights, pairs, by_feature = batch.flat_weights(), batch.pairs(), batch.weights_by_feature()
        squares = {feature: given.reshape(num_bags, 10) for feature, given in batch.indices.items()}
        out = np.empty((num_bags, collection.dim), np.float32)
        outs = collection.split(out)
        for name, given in {
            "flat": ((indices, offsets), {"per_sample_weights": weights}),
            "int32": ((indices.astype(np.int32), offsets.astype(np.int32)), {}),
            "pairs": ((pairs,), {"per_sample_weights": by_feature}),
            "squares": ((squares,), {}),
        }.items():
            for kind, how in (("", {}), (", out", {"out": out}), (", outs", {"out": outs})):
                call = lambda g=given, h=how: collection(*g[0], **g[1], **h, num_threads=num_threads)
                grown.setdefault(name + kind, []).append(peak_of(call) - (0 if how else out.nbytes))
    for name, (small, large) in grown.items():
        assert large - small < 2000, (name, small, large)
        assert large < 30_000, (name, large)
