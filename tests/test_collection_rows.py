"""`EmbeddingCollection`: the rows of each feature, bit for bit those of `embedding`, however the indices come."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

import qembag
from support import fenced
from support.arrays import same_bits
from support.many_tables import KINDS, OPTIONS, PLACES, Many, batch_of, check_dict, of_every_kind, plain, table_of

OUTPUTS = {"float32": None, "float16": np.float16, "bfloat16": "bfloat16"}
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def one_by_one(many: Many, indices: dict[str, Any]) -> dict[str, np.ndarray]:
    """By one call a table, on one thread."""
    return {
        feature: qembag.embedding(
            many.table(feature).made,
            given,
            invalid=many.option(feature)[2],
            dtype=many.dtype,
            num_threads=1,
        )
        for feature, given in indices.items()
    }


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_kind_of_table_gives_the_rows_of_embedding(level: str, threads: int, kind: str) -> None:
    rng = np.random.default_rng(41)
    many = of_every_kind(rng, OUTPUTS[kind])
    batch = batch_of(rng, many, 5)
    collection, expected = many.make_of_rows(), one_by_one(many, batch.indices)
    check_dict(collection(*batch.flat()), expected)
    check_dict(collection(batch.flat()[0], lengths=batch.lengths()), expected)
    check_dict(collection(batch.pairs()), expected)
    check_dict(collection(batch.indices), expected)
    check_dict(collection(batch.pairs(np.int32, np.int32)), expected)


@pytest.mark.parametrize("index_type", [np.int32, np.int64, np.uint8, np.uint64, ">i4", "<i8"])
def test_arrays_of_any_shape_keep_it(level: str, index_type: Any, rng: np.random.Generator) -> None:
    many = plain(7)
    shapes = [(), (3,), (0,), (2, 3), (2, 0, 3), (1, 2, 3, 2), (5, 1)]
    indices = {
        feature: rng.integers(0, 10, shape).astype(index_type)
        for feature, shape in zip(many.features, shapes, strict=True)
    }
    collection, expected = many.make_of_rows(), one_by_one(many, indices)
    found = collection(indices)
    check_dict(found, expected)
    assert [value.shape for value in found.values()] == [(*shape, 8) for shape in shapes]
    outs = {feature: np.empty_like(value) for feature, value in expected.items()}
    assert collection(indices, out=outs) is outs
    check_dict(outs, expected)
    turned = {feature: given.T.copy().T if given.ndim > 1 else given for feature, given in indices.items()}
    check_dict(collection(turned), expected)
    lists = {feature: given.tolist() if given.size else given for feature, given in indices.items()}
    check_dict(collection(lists), expected)


def test_features_have_as_many_indices_as_they_like(level: str, threads: int, rng: np.random.Generator) -> None:
    """Nothing, one, many: enough for threads, in the first, the last or a middle one."""
    for large in range(4):
        many = Many(
            {f"f{n}": table_of(rng, KINDS[3 * n + large], 50, 40 + n) for n in range(4)},
            {f"f{n}": f"f{n}" for n in range(4)},
        )
        sizes = [0, 1, 7, 0]
        sizes[large] = 20_000
        indices = {f"f{n}": rng.integers(0, 50, size) for n, size in enumerate(sizes)}
        check_dict(many.make_of_rows()(indices), one_by_one(many, indices))


@pytest.mark.parametrize("sizes", [(0, 400_000, 0, 3, 400_000), (400_000, 0, 0, 0, 0), (0, 0, 1, 0, 700_000)])
def test_a_long_call_in_pieces_gives_the_same_bits(
    level: str, sizes: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Pieces end within features and between them; some have nothing."""
    many = Many(
        {f"f{n}": table_of(rng, KINDS[n], 100, 16 + n) for n in range(5)},
        {f"f{n}": f"f{n}" for n in range(5)},
    )
    indices = {f"f{n}": rng.integers(0, 100, size) for n, size in enumerate(sizes)}
    collection, expected = many.make_of_rows(), one_by_one(many, indices)
    for num_threads in (1, 2):
        check_dict(collection(indices, num_threads=num_threads), expected)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_written_and_nothing_beside_them(level: str, kind: str, rng: np.random.Generator) -> None:
    many = plain(3)
    many.dtype = OUTPUTS[kind]
    stored = np.dtype(STORED[kind])
    indices = {"f0": rng.integers(0, 10, 6), "f1": rng.integers(0, 10, (2, 3)), "f2": rng.integers(0, 10, (3, 2))}
    expected = one_by_one(many, indices)
    filler = np.frombuffer(b"\x55" * stored.itemsize, stored)[0]
    memory = np.full((40, 30), filler, stored)
    outs = {"f0": memory[:12:2, 1:9], "f1": memory[1:13:2, 11:19].reshape(2, 3, 8), "f2": memory[39:33:-1, 3:11]}
    outs["f1"] = np.lib.stride_tricks.as_strided(
        memory[14:, 3:], (2, 3, 8), (240 * stored.itemsize, 60 * stored.itemsize, stored.itemsize)
    )
    outs["f2"] = np.lib.stride_tricks.as_strided(
        memory[:, 12:], (3, 2, 8), (90 * stored.itemsize, 30 * stored.itemsize, stored.itemsize)
    )
    collection = many.make_of_rows()
    assert collection(indices, out=outs) is outs
    check_dict(outs, expected)
    for out in outs.values():
        out[...] = filler
    assert (memory == filler).all()


def test_indices_that_no_bag_has_are_no_rows(rng: np.random.Generator) -> None:
    """Before the first offset and after the last: as for bags."""
    many = plain(3)
    batch = batch_of(rng, many, 4)
    expected = one_by_one(many, batch.indices)
    wrong = np.array([-7, 10, 2**31 - 1])
    pairs = {
        feature: (np.concatenate([wrong, given, wrong]), ends + 3) for feature, (given, ends) in batch.pairs().items()
    }
    collection = many.make_of_rows()
    check_dict(collection(pairs), expected)
    indices, offsets = batch.flat()
    check_dict(collection(np.concatenate([wrong, indices, wrong]), offsets + 3), expected)


def test_nothing_gives_nothing() -> None:
    collection = of_every_kind(np.random.default_rng(0)).make_of_rows()
    nothing = np.empty(0, np.int64)
    for given in ((dict.fromkeys(collection.features, nothing),), (nothing, [0]), (nothing, [0] * 65)):
        found = collection(*given)
        assert [value.shape for value in found.values()] == [(0, dim) for dim in collection.dims.values()]


def test_features_share_tables_and_options(rng: np.random.Generator) -> None:
    tables = {"a": table_of(rng, KINDS[0], 10, 6), "b": table_of(rng, "float16", 5, 3, is_pruned=True)}
    many = Many(tables, {"x": "b", "y": "a", "z": "b"}, {"x": ("sum", None, "skip"), "z": ("sum", None, "raise")})
    collection = many.make_of_rows()
    indices = {"x": np.array([4, -1, 9, 0]), "y": np.array([[9]]), "z": np.array([0, 4])}
    check_dict(collection(indices), one_by_one(many, indices))
    assert not collection(indices)["x"][1:3].any()
    assert collection.invalid == {"x": "skip", "y": "raise", "z": "raise"}
    assert collection.dims == {"x": 3, "y": 6, "z": 3}


@settings(max_examples=60, deadline=None)
@given_by(st.data())
def test_any_collection_gives_the_rows_of_embedding(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    number = data.draw(st.integers(1, 5))
    tables = {
        f"t{n}": table_of(
            rng,
            data.draw(st.sampled_from(KINDS)),
            data.draw(st.integers(4, 12)),
            data.draw(st.integers(1, 70)),
            data.draw(st.booleans()),
            data.draw(st.sampled_from(PLACES)),
        )
        for n in range(number)
    }
    names = itertools.cycle(tables)
    features = {f"f{n}": next(names) for n in range(data.draw(st.integers(1, 8)))}
    options = {feature: data.draw(st.sampled_from(OPTIONS)) for feature in features}
    many = Many(tables, features, options, data.draw(st.sampled_from(list(OUTPUTS.values()))))
    batch = batch_of(rng, many, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 20)))
    collection, expected = many.make_of_rows(), one_by_one(many, batch.indices)
    check_dict(collection(*batch.flat()), expected)
    check_dict(collection(batch.indices, num_threads=data.draw(st.integers(1, 3))), expected)


@fenced.needs_fences
@pytest.mark.parametrize("at", ["end", "start"])
def test_nothing_outside_a_callers_arrays_is_touched(level: str, at: str, rng: np.random.Generator) -> None:
    many = of_every_kind(rng)
    batch = batch_of(rng, many, 3, 5)
    collection, expected = many.make_of_rows(), one_by_one(many, batch.indices)
    for kind in (np.int32, np.int64):
        indices = {feature: fenced.copy(given.astype(kind), at=at) for feature, given in batch.indices.items()}
        outs = {feature: fenced.empty(value.shape, np.float32, at=at) for feature, value in expected.items()}
        collection(indices, out=outs)
        check_dict(outs, expected)
        same_bits(collection(*(fenced.copy(given.astype(kind), at=at) for given in batch.flat()))["f3"], expected["f3"])
