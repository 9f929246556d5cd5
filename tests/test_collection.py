"""Collections: bit for bit what one call a table gives, and what the oracle says, however the batch comes.

Expected bits are computed once, on one thread of the best level, and kept for the other levels and thread counts.
"""

from __future__ import annotations

import functools
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
from support.layouts import ALL_MODES, LAYOUTS
from support.many_tables import (
    KINDS,
    OPTIONS,
    PLACES,
    Batch,
    Many,
    batch_of,
    check,
    check_dict,
    of_every_kind,
    plain,
    side_by_side,
    table_of,
)

OUTPUTS = {"float32": None, "float16": np.float16, "bfloat16": "bfloat16"}
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


# ---- Every table -----------------------------------------------------------------------------------------------------


@functools.cache
def every_kind(kind: str) -> tuple[Many, Batch, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The bags of every kind of table and feature, with weights and without: what the oracle says."""
    rng = np.random.default_rng(20261127)
    many = of_every_kind(rng, OUTPUTS[kind])
    batch = batch_of(rng, many, 6)
    return many, batch, batch.by_oracle(many, weighted=False), batch.by_oracle(many)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_kind_of_table_gives_the_oracles_bits(level: str, threads: int, kind: str) -> None:
    many, batch, expected, weighted = every_kind(kind)
    collection = many.make()
    check(collection(batch.pairs()), expected, collection)
    check(collection(*batch.flat()), expected, collection)
    check(collection(batch.pairs(), per_sample_weights=batch.weights_by_feature()), weighted, collection)


def test_one_call_a_table_gives_the_oracles_bits() -> None:
    """Which other tests take for the oracle, as it is fast."""
    for kind in OUTPUTS:
        many, batch, expected, weighted = every_kind(kind)
        check_dict(batch.one_by_one(many, weighted=False), expected)
        check_dict(batch.one_by_one(many), weighted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tables_of_every_dim_stand_side_by_side(level: str, kind: Any, rng: np.random.Generator) -> None:
    """No feature's columns reach into its neighbours', whatever the remainder of a block of lanes."""
    dims = rng.permutation([*range(1, 35), 47, 48, 49, 63, 65, 79, 96, 127, 129, 160, 191, 192, 255, 257, 299, 300])
    tables = {str(dim): table_of(rng, kind, 12, int(dim), place=PLACES[dim % 3]) for dim in dims}
    many = Many(tables, {name: name for name in tables})
    batch = batch_of(rng, many, 3)
    collection = many.make()
    expected = batch.one_by_one(many)
    check(collection(batch.pairs(), per_sample_weights=batch.weights_by_feature()), expected, collection)
    check(collection(*batch.flat(), per_sample_weights=batch.flat_weights()), expected, collection)


def test_one_table_makes_a_collection(level: str, rng: np.random.Generator) -> None:
    for kind in KINDS:
        many = Many({"only": table_of(rng, kind, 20, 33)}, {"only": "only"})
        batch = batch_of(rng, many, 7)
        same_bits(many.make()(*batch.flat()), batch.one_by_one(many, weighted=False)["only"])


def test_a_hundred_tables_give_the_bits_of_a_hundred_calls(level: str, threads: int, rng: np.random.Generator) -> None:
    kinds = [*LAYOUTS.values(), "float32", "float16"]
    dims = rng.integers(16, 257, 100)
    tables = {f"t{n}": table_of(rng, kinds[n % len(kinds)], 50, int(dim)) for n, dim in enumerate(dims)}
    many = Many(tables, {name: name for name in tables}, {f"t{n}": OPTIONS[n % 5] for n in range(100)})
    for num_bags in (1, 8, 40):
        batch = batch_of(rng, many, num_bags, 20)
        collection = many.make()
        check(collection(*batch.flat()), batch.one_by_one(many, weighted=False), collection)


# ---- Ways for a batch to come ----------------------------------------------------------------------------------------

INTEGERS = (np.int32, np.int64, np.uint8, np.int16, np.uint64)


@pytest.mark.parametrize("index_type", INTEGERS)
@pytest.mark.parametrize("offset_type", INTEGERS)
def test_indices_and_offsets_of_any_integers(index_type: Any, offset_type: Any, rng: np.random.Generator) -> None:
    many = plain(5)
    batch = batch_of(rng, many, 4, 3)
    collection, expected = many.make(), batch.one_by_one(many, weighted=False)
    indices, offsets = batch.flat(index_type, offset_type)
    check(collection(indices, offsets), expected, collection)
    check(collection(indices, lengths=batch.lengths().astype(offset_type)), expected, collection)
    check(collection(indices, lengths=batch.lengths().ravel().astype(offset_type)), expected, collection)
    check(collection(batch.pairs(index_type, offset_type)), expected, collection)


def test_each_feature_has_integers_of_its_own(level: str, rng: np.random.Generator) -> None:
    many = plain(8)
    batch = batch_of(rng, many, 5)
    pairs = batch.pairs()
    for number, (index_type, offset_type) in enumerate(itertools.product((np.int32, np.int64), repeat=2)):
        for feature in (f"f{number}", f"f{number + 4}"):
            indices, ends = pairs[feature]
            pairs[feature] = indices.astype(index_type), ends.astype(offset_type)
    collection = many.make()
    check(collection(pairs), batch.one_by_one(many, weighted=False), collection)


def test_lists_of_numbers_are_batches_too(rng: np.random.Generator) -> None:
    many = plain(3)
    batch = batch_of(rng, many, 4)
    collection, expected = many.make(), batch.one_by_one(many, weighted=False)
    indices, offsets = batch.flat()
    check(collection(indices.tolist(), offsets.tolist()), expected, collection)
    check(collection(indices.tolist(), lengths=batch.lengths().tolist()), expected, collection)
    lists = {feature: (given.tolist(), ends.tolist()) for feature, (given, ends) in batch.pairs().items()}
    check(collection(lists), expected, collection)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.int16])
def test_each_row_of_a_features_matrix_is_a_bag(level: str, kind: Any, rng: np.random.Generator) -> None:
    """Beside features with offsets; matrices may be of different widths."""
    many = plain(6)
    batch = batch_of(rng, many, 5)
    values: dict[str, Any] = batch.pairs()
    for number, width in enumerate((4, 0, 1)):
        feature = f"f{2 * number}"
        batch.indices[feature] = rng.integers(0, 10, 5 * width)
        batch.ends[feature] = np.arange(6) * width
        batch.weights[feature] = rng.normal(size=5 * width).astype(np.float32)
        values[feature] = batch.indices[feature].reshape(5, width).astype(kind)
    collection = many.make()
    check(collection(values), batch.one_by_one(many, weighted=False), collection)
    weights = batch.weights_by_feature()
    for feature, value in values.items():
        if not isinstance(value, tuple):
            weights[feature] = weights[feature].reshape(value.shape)
    check(collection(values, per_sample_weights=weights), batch.one_by_one(many), collection)


def test_matrices_in_any_memory(rng: np.random.Generator) -> None:
    many = plain(4)
    square = rng.integers(0, 10, (5, 6))
    values = {"f0": square, "f1": square.T.copy().T, "f2": square[:, ::2], "f3": square[::-1].astype(">i4")}
    collection = many.make()
    expected = {feature: qembag.embedding_bag(many.table(feature).made, value) for feature, value in values.items()}
    check(collection(values), expected, collection)


def test_features_may_stand_in_a_dict_in_any_order(rng: np.random.Generator) -> None:
    many = plain(5)
    batch = batch_of(rng, many, 4)
    collection, pairs = many.make(), batch.pairs()
    expected = batch.one_by_one(many, weighted=False)
    check(collection({feature: pairs[feature] for feature in reversed(pairs)}), expected, collection)
    check_dict(collection({feature: pairs[feature] for feature in reversed(pairs)}, as_dict=True), expected)


def test_bags_may_start_and_end_anywhere_in_a_features_indices(level: str, rng: np.random.Generator) -> None:
    """As with `embedding_bag`: indices before the first offset and after the last belong to no bag."""
    many = plain(3)
    batch = batch_of(rng, many, 4)
    collection, expected = many.make(), batch.one_by_one(many, weighted=False)
    wrong = np.array([-7, 10, 2**31 - 1])
    pairs = {
        feature: (np.concatenate([wrong, given, wrong]), ends + 3) for feature, (given, ends) in batch.pairs().items()
    }
    check(collection(pairs), expected, collection)
    indices, offsets = batch.flat()
    check(collection(np.concatenate([wrong, indices, wrong]), offsets + 3), expected, collection)


def test_features_may_share_one_array_of_indices(rng: np.random.Generator) -> None:
    many = plain(4)
    indices, ends = rng.integers(0, 10, 20), np.array([0, 5, 5, 20])
    collection = many.make()
    expected = {
        feature: qembag.embedding_bag(many.table(feature).made, indices, ends, include_last_offset=True)
        for feature in many.features
    }
    check(collection(dict.fromkeys(many.features, (indices, ends))), expected, collection)


class Jagged:
    """What a collection knows a KeyedJaggedTensor by."""

    def __init__(self, batch: Batch, keys: list[str], weighted: bool) -> None:
        self.batch = Batch(*({key: part[key] for key in keys} for part in (batch.indices, batch.ends, batch.weights)))
        self.weighted = weighted

    def keys(self) -> list[str]:
        return list(self.batch.indices)

    def values(self) -> np.ndarray:
        return self.batch.flat()[0]

    def offsets(self) -> np.ndarray:
        return self.batch.flat()[1]

    def lengths(self) -> np.ndarray:
        return self.batch.lengths().ravel()

    def weights_or_none(self) -> np.ndarray | None:
        return self.batch.flat_weights() if self.weighted else None


@pytest.mark.parametrize("weighted", [False, True])
def test_a_jagged_batch_is_looked_up_by_its_keys(weighted: bool, rng: np.random.Generator) -> None:
    many = plain(4)
    batch = batch_of(rng, many, 5)
    collection, expected = many.make(), batch.one_by_one(many, weighted)
    for keys in (list(many.features), list(reversed(many.features))):
        check(collection(Jagged(batch, keys, weighted)), expected, collection)
    with pytest.raises(ValueError, match=r"^indices .*'f3'"):
        collection(Jagged(batch, ["f0", "f1", "f2"], weighted))


@pytest.mark.parametrize("kind", ["float16", np.dtype(np.float32), "bfloat16"])
def test_a_jagged_batch_is_recognized_whatever_the_outputs_type_is_called(
    kind: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = plain(4)
    many.dtype = kind
    batch = batch_of(rng, many, 5)
    collection = many.make()
    monkeypatch.delattr("qembag._slow_collection.look_up_bags")
    ours = collection(Jagged(batch, list(many.features), weighted=False))
    assert ours.tobytes() == collection(*batch.flat()).tobytes()


# ---- Options by feature ----------------------------------------------------------------------------------------------


def test_modes_padding_and_what_is_invalid_are_each_features_own(level: str, threads: int) -> None:
    rng = np.random.default_rng(3)
    tables = {f"t{number}": table_of(rng, kind, 15, 24, is_pruned=number % 2 == 0) for number, kind in enumerate(KINDS)}
    names = itertools.cycle(tables)
    features = {f"f{number}": next(names) for number in range(3 * len(OPTIONS))}
    many = Many(tables, features, {feature: OPTIONS[n % len(OPTIONS)] for n, feature in enumerate(features)})
    batch = batch_of(rng, many, 9, 12)
    collection = many.make()
    check(collection(*batch.flat()), batch.one_by_one(many, weighted=False), collection)
    check(collection(batch.pairs()), batch.one_by_one(many, weighted=False), collection)
    check(collection(batch.pairs(), per_sample_weights=batch.weights_by_feature()), batch.one_by_one(many), collection)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize(("padding", "invalid"), [(None, "raise"), (3, "raise"), (-1, "skip")])
def test_one_option_is_for_all_features(mode: str, padding: Any, invalid: str, rng: np.random.Generator) -> None:
    many = plain(4)
    many.options = dict.fromkeys(many.features, (mode, padding, invalid))
    batch = batch_of(rng, many, 5)
    tables = {name: table.made for name, table in many.tables.items()}
    collection = qembag.EmbeddingBagCollection(tables, mode=mode, padding_idx=padding, invalid=invalid)
    check(collection(*batch.flat()), batch.one_by_one(many, weighted=False), collection)
    assert collection.modes == dict.fromkeys(many.features, mode)
    assert collection.padding_idx == dict.fromkeys(many.features, padding)
    assert collection.invalid == dict.fromkeys(many.features, invalid)


def test_features_that_a_dict_of_options_leaves_out_have_the_default() -> None:
    collection = qembag.EmbeddingBagCollection(
        [np.ones((3, 2), np.float32)] * 3, mode={"1": "max"}, padding_idx={"0": 2}, invalid={"2": "skip"}
    )
    assert collection.modes == {"0": "sum", "1": "max", "2": "sum"}
    assert collection.padding_idx == {"0": 2, "1": None, "2": None}
    assert collection.invalid == {"0": "raise", "1": "raise", "2": "skip"}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_weights_of_any_floats(level: str, kind: Any, rng: np.random.Generator) -> None:
    many = Many(
        {f"f{n}": table_of(rng, table_kind, 10, 20) for n, table_kind in enumerate(KINDS)},
        {f"f{n}": f"f{n}" for n in range(len(KINDS))},
        {f"f{n}": (("sum", "mean", "average", "sqrtn")[n % 4], None, "raise") for n in range(len(KINDS))},
    )
    batch = batch_of(rng, many, 6)
    batch.weights = {feature: given.astype(kind) for feature, given in batch.weights.items()}
    collection, expected = many.make(), batch.one_by_one(many)
    check(collection(*batch.flat(), per_sample_weights=batch.flat_weights(kind)), expected, collection)
    check(collection(batch.pairs(), per_sample_weights=batch.weights_by_feature(kind)), expected, collection)


def test_weights_may_be_of_some_features_only(level: str, rng: np.random.Generator) -> None:
    """In a dict: others are summed without."""
    many = plain(4)
    batch = batch_of(rng, many, 5)
    batch.weights["f1"] = batch.weights["f3"] = None
    given = batch.weights_by_feature()
    assert list(given) == ["f0", "f2"]
    collection, expected = many.make(), batch.one_by_one(many)
    check(collection(batch.pairs(), per_sample_weights=given), expected, collection)
    check(collection(batch.pairs(), per_sample_weights=given | {"f1": None}), expected, collection)


# ---- Little or nothing to do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3])
def test_bags_that_are_all_empty_are_zeros(level: str, num_threads: int) -> None:
    many = of_every_kind(np.random.default_rng(0))
    collection, number = many.make(), len(many.features)
    nothing = np.empty(0, np.int64)
    for num_bags in (0, 1, 7):
        offsets = np.zeros(number * num_bags + 1, np.int64)
        pairs = dict.fromkeys(many.features, (nothing, np.zeros(num_bags + 1, np.int32)))
        matrices = dict.fromkeys(many.features, np.empty((num_bags, 0), np.int64))
        for output in (
            collection(nothing, offsets, num_threads=num_threads),
            collection(nothing, lengths=np.zeros((number, num_bags), np.int32), num_threads=num_threads),
            collection(pairs, num_threads=num_threads),
            collection(matrices, num_threads=num_threads),
        ):
            assert output.shape == (num_bags, collection.dim)
            assert output.dtype == np.float32
            assert not output.view(np.uint32).any()


def test_no_bags_go_into_outputs_without_rows() -> None:
    collection = plain(3).make()
    nothing, offsets = np.empty(0, np.int64), np.zeros(1, np.int64)
    for out in (np.empty((0, 24), np.float32), np.empty((5, 30), np.float32)[:0, 3:27]):
        assert collection(nothing, offsets, out=out) is out
    outs = {feature: np.empty((0, 8), np.float32) for feature in collection.features}
    assert collection(nothing, offsets, out=outs) is outs
    assert collection(nothing, offsets, as_dict=True)["f2"].shape == (0, 8)


def test_a_table_without_rows_serves_empty_bags_beside_others(rng: np.random.Generator) -> None:
    many = plain(3)
    many.tables["f1"] = table_of(rng, LAYOUTS[4], 0, 5)
    batch = batch_of(rng, many, 4)
    batch.indices["f1"], batch.ends["f1"] = np.empty(0, np.int64), np.zeros(5, np.int64)
    collection = many.make()
    check(collection(*batch.flat()), batch.one_by_one(many, weighted=False), collection)
    with pytest.raises(IndexError, match=r"^indices\['f1'\]\[0\] is 0 \(bag 3\): out of range for a table of 0 rows$"):
        collection(batch.pairs() | {"f1": (np.zeros(1, np.int64), np.array([0, 0, 0, 0, 1]))})


# ---- Outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=OUTPUTS)
def asked(request: pytest.FixtureRequest) -> tuple[Many, Batch, dict[str, np.ndarray], np.dtype[Any]]:
    """A collection with an output type, a batch, what its features give, and how an array of it is stored."""
    rng = np.random.default_rng(11)
    many = of_every_kind(rng, OUTPUTS[request.param])
    batch = batch_of(rng, many, 5)
    return many, batch, batch.one_by_one(many, weighted=False), np.dtype(STORED[request.param])


def test_an_output_is_written_and_nothing_beside_it(level: str, asked: Any) -> None:
    many, batch, expected, kind = asked
    collection = many.make()
    width = collection.dim
    filler = np.frombuffer(b"\x55" * kind.itemsize, kind)[0]
    memory = np.full((11, width + 5), filler, kind)
    for out in (memory[:5, :width], memory[1:11:2, 4:-1], memory[8:3:-1, 2:-3]):
        for given in (batch.flat(), (batch.pairs(),)):
            assert collection(*given, out=out) is out
            check(out, expected, collection)
            out[...] = filler
            assert (memory == filler).all()


def test_a_dict_of_outputs_comes_back_as_it_was_given(level: str, threads: int, asked: Any) -> None:
    many, batch, expected, kind = asked
    collection = many.make()
    apart = {feature: np.empty((5, dim), kind) for feature, dim in many.dims.items()}
    wide = np.zeros((5, collection.dim + 2 * len(apart)), kind)
    views, start = {}, 1
    for feature, dim in reversed(many.dims.items()):  # in another order than the features'
        views[feature] = wide[:, start : start + dim]
        start += dim + 2
    whole = np.empty((5, collection.dim), kind)
    split = collection.split(whole)
    for given in (batch.flat(), (batch.pairs(),)):
        for outs in (apart, views, split):
            for out in outs.values():
                out[...] = 1
            before = dict(outs)
            assert collection(*given, out=outs) is outs
            assert all(outs[feature] is before[feature] for feature in before)
            check_dict({feature: outs[feature] for feature in many.features}, expected)
    same_bits(whole, side_by_side(expected))
    for view in views.values():
        view[...] = 0
    assert not wide.any()


def test_outputs_by_feature_are_views_of_one_array(asked: Any) -> None:
    many, batch, expected, kind = asked
    collection = many.make()
    found = collection(*batch.flat(), as_dict=True)
    check_dict(found, expected)
    whole = next(iter(found.values())).base
    assert whole.shape == (5, collection.dim)
    assert all(view.base is whole for view in found.values())
    out = np.empty((5, collection.dim), kind)
    found = collection(*batch.flat(), out=out, as_dict=True)
    check_dict(found, expected)
    assert all(np.shares_memory(view, out) for view in found.values())


def test_the_type_of_an_output_is_the_collections_or_else_its_own(level: str, rng: np.random.Generator) -> None:
    many = plain(3)
    batch = batch_of(rng, many, 4)
    collection = many.make()
    out = np.empty((4, collection.dim), np.float16)
    assert collection(*batch.flat(), out=out) is out
    many.dtype = np.float16
    check(out, batch.one_by_one(many, weighted=False), collection)


def test_an_output_of_bfloat16_has_its_own_type(rng: np.random.Generator) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    many = plain(3)
    many.dtype = ml_dtypes.bfloat16
    batch = batch_of(rng, many, 4)
    collection = many.make()
    expected = side_by_side(batch.one_by_one(many, weighted=False))
    for ours in (collection(*batch.flat()), collection(*batch.flat(), out=np.empty((4, 24), ml_dtypes.bfloat16))):
        assert ours.dtype == ml_dtypes.bfloat16
        same_bits(ours.view(np.uint16), expected.view(np.uint16))


# ---- What a collection is --------------------------------------------------------------------------------------------


def test_a_collection_says_what_it_is(rng: np.random.Generator) -> None:
    words, pixels = table_of(rng, LAYOUTS[8], 10, 4).made, table_of(rng, "float16", 6, 7).made
    collection = qembag.EmbeddingBagCollection(
        {"words": words, "pixels": pixels}, {"title": "words", "image": "pixels", "body": "words"}, dtype=np.float16
    )
    assert list(collection.tables) == ["words", "pixels"]
    assert collection.tables["words"] is words
    assert collection.tables["pixels"] is pixels
    assert list(collection.features.items()) == [("title", "words"), ("image", "pixels"), ("body", "words")]
    assert collection.dims == {"title": 4, "image": 7, "body": 4}
    assert collection.dim == 15
    assert collection.columns == {"title": slice(0, 4), "image": slice(4, 11), "body": slice(11, 15)}
    assert collection.nbytes == words.nbytes + pixels.nbytes
    assert collection.dtype == np.float16


def test_nobody_changes_a_collection_by_what_it_gives_away(rng: np.random.Generator) -> None:
    many = plain(3)
    batch = batch_of(rng, many, 4)
    given = {name: table.made for name, table in many.tables.items()}
    features, modes = dict(many.features), dict.fromkeys(many.features, "mean")
    collection = qembag.EmbeddingBagCollection(given, features, mode=modes)
    expected = collection(*batch.flat())
    for owned in (given, features, modes):
        owned.clear()
    for name in ("tables", "features", "modes", "padding_idx", "invalid", "dims", "columns"):
        getattr(collection, name).clear()
        assert list(getattr(collection, name)) == ["f0", "f1", "f2"]
    same_bits(collection(*batch.flat()), expected)


def test_tables_in_a_sequence_are_named_by_their_numbers(rng: np.random.Generator) -> None:
    many = plain(3)
    tables = [table.made for table in many.tables.values()]
    batch = batch_of(rng, many, 4)
    expected = side_by_side(batch.one_by_one(many, weighted=False))
    for given in (tables, tuple(tables)):
        collection = qembag.EmbeddingBagCollection(given)
        assert list(collection.features.items()) == [("0", "0"), ("1", "1"), ("2", "2")]
        same_bits(collection(*batch.flat()), expected)


def test_plain_arrays_of_floats_are_tables(level: str, rng: np.random.Generator) -> None:
    arrays = [rng.normal(size=(9, dim)).astype(kind) for dim, kind in ((4, np.float32), (7, np.float16))]
    collection = qembag.EmbeddingBagCollection(arrays)
    square = rng.integers(0, 9, (5, 3))
    expected = {str(number): qembag.embedding_bag(array, square) for number, array in enumerate(arrays)}
    check(collection({"0": square, "1": square}), expected, collection)
    assert all(isinstance(table, qembag.FloatTable) for table in collection.tables.values())


def test_rows_that_are_written_to_serve_from_then_on(level: str, rng: np.random.Generator) -> None:
    """A collection holds the tables' own memory."""
    weights = rng.normal(size=(10, 8)).astype(np.float32)
    tables = [qembag.quantize(weights, 8), qembag.FloatTable(weights.copy())]
    collection = qembag.EmbeddingBagCollection(tables)
    square = np.arange(10).reshape(5, 2)
    before = collection({"0": square, "1": square})
    tables[0].update(np.arange(10), -weights)
    after = collection({"0": square, "1": square})
    same_bits(after[:, :8], qembag.embedding_bag(tables[0], square))
    same_bits(after[:, 8:], before[:, 8:])
    assert (after[:, :8] != before[:, :8]).any()


def test_tables_and_arrays_live_as_long_as_the_collection(rng: np.random.Generator) -> None:
    array = rng.normal(size=(10, 8)).astype(np.float32)
    square = rng.integers(0, 10, (5, 2))
    expected = qembag.embedding_bag(array, square)
    rows = array.copy()
    collection = qembag.EmbeddingBagCollection([rows])
    with pytest.raises(ValueError, match="resize"):
        rows.resize(1)
    del rows
    filler = [np.full((10, 8), np.nan, np.float32) for _ in range(20)]  # where freed rows may have been
    same_bits(collection({"0": square}), expected)
    del filler


# ---- Threads ---------------------------------------------------------------------------------------------------------


def shared_out(kind: str) -> tuple[Many, Batch]:
    """Enough work for a parallel region, which the features have very different parts of."""
    rng = np.random.default_rng(17)
    small = [table_of(rng, KINDS[n % len(KINDS)], 30, 8 + n, is_pruned=n % 4 == 0) for n in range(99)]
    # The dim takes most of the work: 64 units are for a row as such.
    tables = [*small[:57], table_of(rng, LAYOUTS[4], 2000, 200), *small[57:]] if kind != "even" else small
    if kind == "the last":
        tables = [*small, tables[57]]
    names = {f"f{n}": f"f{n}" for n in range(len(tables))}
    many = Many(dict(zip(names, tables, strict=True)), names, {f"f{n}": OPTIONS[n % 5] for n in range(len(tables))})
    num_bags = {"even": 40, "one giant bag": 1}.get(kind, 30)
    batch = batch_of(rng, many, num_bags, {"even": 6, "the last": 0, "no offsets": 3}.get(kind, 2))
    giant = "f99" if kind == "the last" else "f57"
    if kind != "even":
        count = 4000
        batch.indices[giant] = rng.integers(0, 2000, count)
        batch.weights[giant] = None if many.option(giant)[0] == "max" else rng.normal(size=count).astype(np.float32)
        cuts = np.sort(rng.integers(0, count, num_bags - 1))
        batch.ends[giant] = np.concatenate([[0], cuts, [count]])
    return many, batch


SHARES = ("even", "one giant table", "one giant bag", "the last")


@functools.cache
def shared_out_once(kind: str) -> tuple[Many, Batch, dict[str, np.ndarray], dict[str, np.ndarray]]:
    many, batch = shared_out(kind)
    work = sum(len(given) * (many.dims[feature] + 64) for feature, given in batch.indices.items())
    assert work > 1 << 19, work
    return many, batch, batch.one_by_one(many, weighted=False), batch.one_by_one(many)


@pytest.mark.parametrize("kind", SHARES)
def test_work_is_shared_among_threads_in_any_parts(level: str, threads: int, kind: str) -> None:
    many, batch, expected, weighted = shared_out_once(kind)
    collection = many.make()
    check(collection(*batch.flat(np.int32)), expected, collection)
    check(collection(batch.pairs(np.int64, np.int32)), expected, collection)
    outs = {feature: np.empty((batch.size, dim), np.float32) for feature, dim in many.dims.items()}
    check_dict(
        collection(batch.pairs(), per_sample_weights=batch.weights_by_feature(), out=outs, num_threads=threads),
        weighted,
    )


@pytest.mark.parametrize("num_threads", [2, 7, 100, 10**6, 2**100])
def test_more_threads_than_bags_or_processors_give_the_same_bits(num_threads: int) -> None:
    many, batch, expected, _ = shared_out_once("one giant bag")
    collection = many.make()
    check(collection(*batch.flat(), num_threads=num_threads), expected, collection)


@pytest.mark.parametrize("kind", ["even", "one giant table"])
def test_a_long_call_in_pieces_gives_the_same_bits(level: str, kind: str, rng: np.random.Generator) -> None:
    """The main thread looks for signals between two pieces of its work."""
    dims = (64,) * 6 if kind == "even" else (8, 8, 8, 256, 8, 8)
    many = Many(
        {f"f{n}": table_of(rng, list(LAYOUTS.values())[n % 3], 500, dim) for n, dim in enumerate(dims)},
        {f"f{n}": f"f{n}" for n in range(6)},
        {f"f{n}": OPTIONS[n % 5] for n in range(6)},
    )
    batch = batch_of(rng, many, 5000, 80 if kind == "even" else 16)
    collection, expected = many.make(), batch.one_by_one(many, weighted=False)
    given = batch.flat(np.int32)
    for num_threads in (1, 2):
        check(collection(*given, num_threads=num_threads), expected, collection)


# ---- Any collection --------------------------------------------------------------------------------------------------


@st.composite
def collections(draw: st.DrawFn) -> tuple[Many, Batch, bool]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    number = draw(st.integers(1, 6))
    tables = {}
    for name in range(number):
        kind, dim, num_rows = (draw(st.sampled_from(KINDS)), draw(st.integers(1, 70)), draw(st.integers(4, 12)))
        tables[f"t{name}"] = table_of(rng, kind, num_rows, dim, draw(st.booleans()), draw(st.sampled_from(PLACES)))
    chosen = draw(st.lists(st.sampled_from(list(tables)), min_size=1, max_size=10))
    features = {f"f{position}": name for position, name in enumerate(chosen)}
    options = {feature: draw(st.sampled_from(OPTIONS)) for feature in features}
    many = Many(tables, features, options, draw(st.sampled_from(list(OUTPUTS.values()))))
    batch = batch_of(rng, many, draw(st.integers(0, 6)), draw(st.integers(0, 20)))
    weighted = draw(st.booleans())
    return many, batch, weighted


@settings(max_examples=60, deadline=None)
@given_by(
    collections(), st.sampled_from([np.int32, np.int64]), st.sampled_from([np.int32, np.int64]), st.integers(1, 3)
)
def test_any_collection_gives_the_oracles_bits(
    case: tuple[Many, Batch, bool], index_type: Any, offset_type: Any, num_threads: int
) -> None:
    many, batch, weighted = case
    collection, expected = many.make(), batch.by_oracle(many, weighted)
    weights = batch.weights_by_feature() if weighted else None
    given = batch.pairs(index_type, offset_type)
    check(collection(given, per_sample_weights=weights, num_threads=num_threads), expected, collection)
    if weighted and any(mode == "max" for mode, _, _ in many.options.values()):
        return
    flat = batch.flat_weights() if weighted else None
    ours = collection(*batch.flat(index_type, offset_type), per_sample_weights=flat, num_threads=num_threads)
    check(ours, expected, collection)


# ---- Nothing outside the arrays --------------------------------------------------------------------------------------


@fenced.needs_fences
@pytest.mark.parametrize("at", ["end", "start"])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_nothing_outside_a_callers_arrays_is_touched(level: str, threads: int, at: str, kind: Any) -> None:
    rng = np.random.default_rng(23)
    tables = {}
    for number, dim in enumerate((1, 5, 16, 31, 64, 100, 8, 129, 3, 40, 65, 24, 48)):
        made = table_of(rng, KINDS[number % len(KINDS)], 7, dim, is_pruned=number % 2 == 0)
        made.rows = fenced.copy(made.rows, at=at)
        made.mapping = None if made.mapping is None else fenced.copy(made.mapping, at=at)
        made.made = None
        made.made = made.make()
        tables[f"t{number}"] = made
    many = Many(tables, {name: name for name in tables}, {f"t{n}": OPTIONS[n % len(OPTIONS)] for n in range(13)})
    batch = batch_of(rng, many, 3, 5)
    collection = many.make()
    expected, weighted = batch.one_by_one(many, weighted=False), batch.one_by_one(many)

    def fence(array: np.ndarray) -> np.ndarray:
        return fenced.copy(array, at=at)

    out = fenced.empty((3, collection.dim), np.float32, at=at)
    indices, offsets = (fence(given.astype(kind)) for given in batch.flat())
    collection(indices, offsets, out=out)
    check(out, expected, collection)
    collection(indices, lengths=fence(batch.lengths().astype(kind)), out=out)
    check(out, expected, collection)
    outs = {feature: fenced.empty((3, dim), np.float32, at=at) for feature, dim in many.dims.items()}
    pairs = {feature: (fence(given), fence(ends)) for feature, (given, ends) in batch.pairs(kind, kind).items()}
    weights = {feature: fence(given) for feature, given in batch.weights_by_feature().items()}
    collection(pairs, per_sample_weights=weights, out=outs)
    check_dict(outs, weighted)
