"""What is wrong with a call of a collection is named: the feature, the bag, and the position in the array that the caller
gave. After an error each output is bit for bit what it was."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER
from support.arrays import an_array
from support.layouts import ALL_MODES, LAYOUTS
from support.many_tables import Batch, Many, batch_of, check, plain, table_of
from support.rules import MAPPING

NUM_BAGS, WIDTH, NUMBER = 4, 5, 100
SIZE = NUM_BAGS * WIDTH  # indices of a feature
TABLE = "a table of 10 rows"


@pytest.fixture(scope="module")
def many() -> Many:
    return plain(NUMBER)


@pytest.fixture(scope="module")
def collection(many: Many) -> qembag.EmbeddingBagCollection:
    return many.make()


@pytest.fixture
def batch(many: Many) -> Batch:
    return batch_of(np.random.default_rng(4), many, NUM_BAGS, width=WIDTH)


def whole(many: Many, num_bags: int = NUM_BAGS) -> np.ndarray:
    dim = sum(many.dims.values())
    return np.arange(num_bags * dim, dtype=np.uint32).view(np.float32).reshape(num_bags, dim)


def refused(
    kind: type[Exception],
    message: str,
    call: Callable[..., Any],
    many: Many,
    exactly: bool = True,
    num_bags: int = NUM_BAGS,
) -> None:
    """Without an output, with one, and with one a feature: exactly this error, and the outputs are left alone. A message
    that is no whole one is a pattern of its beginning."""
    out = whole(many, num_bags)
    outs = {feature: np.full((num_bags, dim), 7, np.float32) for feature, dim in many.dims.items()}
    for given in ({}, {"out": out}, {"out": outs}, {"as_dict": True}):
        with pytest.raises(kind) as caught:
            call(**given)
        assert type(caught.value) is kind
        if exactly:
            assert str(caught.value) == message
        else:
            assert re.match(message, str(caught.value)), str(caught.value)
    assert out.tobytes() == whole(many, num_bags).tobytes()
    assert all((given == 7).all() for given in outs.values())


# ---- Indices ---------------------------------------------------------------------------------------------------------

WHERE = [("f0", 0), ("f57", 12), ("f99", SIZE - 1)]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("value", [-1, 10, 2**32 + 1, -(2**63)])
@pytest.mark.parametrize(("feature", "place"), WHERE)
def test_an_index_out_of_range_is_named(
    level: str, many: Many, collection: Any, batch: Batch, feature: str, place: int, value: int, num_threads: int
) -> None:
    kinds = (np.int32, np.int64) if -(2**31) <= value < 2**31 else (np.int64,)
    batch.indices[feature] = batch.indices[feature].astype(np.int64)
    batch.indices[feature][place] = value
    first = int(feature[1:]) * SIZE + place
    for kind in kinds:
        flat = batch.flat(kind)
        message = f"indices[{first}] is {value} (feature '{feature}', bag {place // WIDTH}): out of range for {TABLE}"
        refused(IndexError, message, lambda f=flat, **how: collection(*f, **how, num_threads=num_threads), many)
        message = f"indices['{feature}'][{place}] is {value} (bag {place // WIDTH}): out of range for {TABLE}"
        pairs = batch.pairs(kind)
        refused(IndexError, message, lambda p=pairs, **how: collection(p, **how, num_threads=num_threads), many)


def test_an_index_out_of_range_in_a_matrix_is_named(level: str, many: Many, collection: Any, batch: Batch) -> None:
    values: dict[str, Any] = batch.pairs()
    square = batch.indices["f57"].reshape(NUM_BAGS, WIDTH).copy()
    square[2, 3] = 10
    values["f57"] = square
    message = f"indices['f57'][2, 3] is 10 (bag 2): out of range for {TABLE}"
    refused(IndexError, message, lambda **how: collection(values, **how), many)


def test_indices_beyond_int64_are_shown_as_they_are(many: Many, collection: Any, batch: Batch) -> None:
    indices, offsets = batch.flat(np.uint64)
    place = 57 * SIZE + 12
    indices[place] = 2**63 + 5
    message = f"indices[{place}] is {2**63 + 5} (feature 'f57', bag 2): out of range for {TABLE}"
    refused(IndexError, message, lambda **how: collection(indices, offsets, **how), many)
    pairs = batch.pairs(np.uint64)
    pairs["f57"][0][12] = 2**64 - 1
    message = f"indices['f57'][12] is {2**64 - 1} (bag 2): out of range for {TABLE}"
    refused(IndexError, message, lambda **how: collection(pairs, **how), many)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_fault_is_found_in_every_mode_and_spares_the_output(level: str, mode: str, rng: np.random.Generator) -> None:
    many = plain(NUMBER)
    many.options = {"f57": (mode, None, "raise"), "f58": ("sum", 3, "skip")}
    batch = batch_of(rng, many, NUM_BAGS, width=WIDTH)
    batch.indices["f57"][7] = 10
    collection = many.make()
    message = f"indices[{57 * SIZE + 7}] is 10 (feature 'f57', bag 1): out of range for {TABLE}"
    refused(IndexError, message, lambda **how: collection(*batch.flat(), **how), many)


def test_a_pruned_table_says_what_it_is(level: str, rng: np.random.Generator) -> None:
    many = plain(3)
    many.tables["f1"] = table_of(rng, LAYOUTS[4], 10, 8)
    mapping = np.array([5, 1, -1, 2, 3, 4, 0, 6, 9, 8, -1, 7], np.int32)
    table = many.tables["f1"].made
    many.tables["f1"].made = qembag.QuantizedTable(table.data, 4, dim=8, compressed_indices_mapping=mapping)
    batch = batch_of(rng, many, NUM_BAGS, width=WIDTH)
    batch.indices["f1"][9] = 12
    collection = many.make()
    message = f"indices[{SIZE + 9}] is 12 (feature 'f1', bag 1): out of range for a pruned table of 12 rows"
    refused(IndexError, message, lambda **how: collection(*batch.flat(), **how), many)


def test_a_mapping_that_its_owner_spoils_is_named(level: str, rng: np.random.Generator) -> None:
    many = plain(3)
    mapping = np.array([5, 1, -1, 2, 3, 4, 0, 6, 9, 8, -1, 7], np.int32)
    data = many.tables["f1"].made.data
    many.tables["f1"].made = qembag.QuantizedTable(data, 8, compressed_indices_mapping=mapping)
    batch = batch_of(rng, many, NUM_BAGS, width=WIDTH)
    batch.indices["f1"] = np.zeros(SIZE, np.int64)
    batch.indices["f1"][9] = 4
    collection = many.make()
    mapping[4] = 10
    text = rf"{MAPPING}\[4\] is 10 \(.*{{}}.*bag 1\): must be -1 or the number of a row, in a table of 10 rows$"
    refused(IndexError, text.format("f1"), lambda **how: collection(*batch.flat(), **how), many, exactly=False)
    text = rf"{MAPPING}\[4\] is 10 \(indices\['f1'\]\[9\], bag 1\): must be -1 or the number of a row"
    refused(IndexError, text, lambda **how: collection(batch.pairs(), **how), many, exactly=False)


def test_the_first_of_several_faults_is_named(level: str, threads: int, rng: np.random.Generator) -> None:
    """The first of the first feature, in a call large enough for threads, which find others before."""
    many = plain(6, num_rows=50, dim=64)
    collection = many.make()
    for _ in range(5):
        batch = batch_of(rng, many, 200, width=20)
        indices, offsets = batch.flat()
        places = np.sort(rng.choice(len(indices), 12, replace=False))
        indices[places] = rng.choice([-1, 50, 2**62], 12)
        feature, rest = divmod(int(places[0]), 4000)
        text = f"is {indices[places[0]]} (%sbag {rest // 20}): out of range for a table of 50 rows"
        message = f"indices[{places[0]}] " + text % f"feature 'f{feature}', "
        refused(IndexError, message, lambda i=indices, o=offsets, **how: collection(i, o, **how), many, num_bags=200)
        pairs = {
            name: (indices[number * 4000 : (number + 1) * 4000], batch.ends[name])
            for number, name in enumerate(many.features)
        }
        message = f"indices['f{feature}'][{rest}] " + text % ""
        refused(IndexError, message, lambda p=pairs, **how: collection(p, **how), many, num_bags=200)


def test_a_fault_in_one_giant_bag_among_small_ones_is_named(level: str, threads: int, rng: np.random.Generator) -> None:
    many = plain(20, dim=64)
    batch = batch_of(rng, many, 2, 3)
    batch.indices["f13"] = rng.integers(0, 10, 20_000)
    batch.ends["f13"] = np.array([0, 1, 20_000])
    batch.indices["f13"][17_001] = 10
    collection = many.make()
    message = f"indices['f13'][17001] is 10 (bag 1): out of range for {TABLE}"
    refused(IndexError, message, lambda **how: collection(batch.pairs(), **how), many, num_bags=2)


# ---- Offsets and lengths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, NUMBER * SIZE + 1, 2**32 + 2, -(2**63)])
@pytest.mark.parametrize("place", [0, 57 * NUM_BAGS, 57 * NUM_BAGS + 2, NUMBER * NUM_BAGS])
def test_offsets_beyond_the_indices_are_named(
    level: str, many: Many, collection: Any, batch: Batch, place: int, value: int
) -> None:
    feature = f"f{max(place - 1, 0) // NUM_BAGS}"
    message = (
        f"offsets[{place}] is {value} (feature '{feature}'): must be from 0 to {NUMBER * SIZE}, the number of indices"
    )
    for kind in (np.int32, np.int64) if abs(value) < 2**31 else (np.int64,):
        flat = batch.flat(offset_type=kind)
        flat[1][place] = value
        refused(ValueError, message, lambda f=flat, **how: collection(*f, **how), many)


@pytest.mark.parametrize("place", [1, 57 * NUM_BAGS, 57 * NUM_BAGS + 2, NUMBER * NUM_BAGS])
def test_falling_offsets_are_named(level: str, many: Many, collection: Any, batch: Batch, place: int) -> None:
    indices, offsets = batch.flat()
    offsets[place] = offsets[place - 1] - 1 if place > 1 else 0
    if place == 1:
        offsets[0] = 3
    message = f"offsets[{place}] is {offsets[place]} (feature 'f{(place - 1) // NUM_BAGS}'): must not be below the offset before it"
    refused(ValueError, message, lambda **how: collection(indices, offsets, **how), many)


@pytest.mark.parametrize("feature", ["f0", "f57", "f99"])
def test_a_features_own_offsets_are_named(level: str, many: Many, collection: Any, batch: Batch, feature: str) -> None:
    for place, value, text in [
        (2, -1, f"must be from 0 to {SIZE}, the number of indices$"),
        (4, SIZE + 1, f"must be from 0 to {SIZE}, the number of indices$"),
        (0, 2**62, f"must be from 0 to {SIZE}, the number of indices$"),
        (2, 3, "must not be below the offset before it$"),
        (4, 14, "must not be below the offset before it$"),
    ]:
        pairs = batch.pairs()
        pairs[feature][1][place] = value
        message = rf"offsets\['{feature}'\]\[{place}\] is {value}: {text}"
        refused(ValueError, message, lambda p=pairs, **how: collection(p, **how), many, exactly=False)


def test_a_number_of_offsets_that_is_no_batch_of_the_features_is_refused(
    many: Many, collection: Any, batch: Batch
) -> None:
    indices, offsets = batch.flat()
    for wrong in (offsets[:-1], offsets[1:-1], np.append(offsets, len(indices)), offsets[:0], np.zeros(2, np.int64)):
        refused(ValueError, "offsets must ", lambda w=wrong, **how: collection(indices, w, **how), many, exactly=False)
    for wrong in (offsets.reshape(1, -1), np.zeros((), np.int64)):
        refused(ValueError, "offsets must ", lambda w=wrong, **how: collection(indices, w, **how), many, exactly=False)


def test_lengths_that_are_no_batch_of_the_features_are_refused(many: Many, collection: Any, batch: Batch) -> None:
    indices, lengths = batch.flat()[0], batch.lengths()
    flat = lengths.ravel().astype(np.int64)
    below, above, beyond = flat.copy(), flat.copy(), flat.copy()
    below[57], above[57], beyond[[3, 4]] = -1, WIDTH + 1, 2**62
    for wrong in (
        flat[:-1], np.append(flat, 0), flat[:0], lengths.T, lengths.reshape(NUMBER, 2, -1), lengths[:-1], lengths[:, :-1],
        np.zeros((), np.int64), below, above, beyond, np.zeros((NUMBER + 1, NUM_BAGS), np.int64),
        np.zeros((0, NUM_BAGS), np.int64),
    ):  # fmt: skip
        refused(
            ValueError, "lengths(\\[57\\])? (must|is)", lambda w=wrong, **how: collection(indices, lengths=w, **how), many,
            exactly=False,
        )  # fmt: skip


def test_exactly_one_of_offsets_and_lengths_is_given(many: Many, collection: Any, batch: Batch) -> None:
    indices, offsets = batch.flat()
    text = "(offsets|lengths) "
    refused(ValueError, text, lambda **how: collection(indices, **how), many, exactly=False)
    both = {"offsets": offsets, "lengths": batch.lengths()}
    refused(ValueError, text, lambda **how: collection(indices, **both, **how), many, exactly=False)
    for name, value in both.items():
        refused(
            ValueError, f"{name} must", lambda n=name, v=value, **how: collection(batch.pairs(), **{n: v}, **how), many,
            exactly=False,
        )  # fmt: skip


def test_indices_of_all_features_have_one_dimension(many: Many, collection: Any, batch: Batch) -> None:
    indices, offsets = batch.flat()
    for shape in [(NUMBER * NUM_BAGS, WIDTH), (1, -1), (NUMBER, NUM_BAGS, WIDTH)]:
        wrong = indices.reshape(shape)
        refused(ValueError, "indices must ", lambda w=wrong, **how: collection(w, offsets, **how), many, exactly=False)
    text = "(indices|offsets) "
    wrong = indices.reshape(NUMBER * NUM_BAGS, WIDTH)
    refused(ValueError, text, lambda **how: collection(wrong, **how), many, exactly=False)
    refused(ValueError, "indices must ", lambda **how: collection(np.int64(3), offsets, **how), many, exactly=False)


# ---- Features --------------------------------------------------------------------------------------------------------


def test_features_that_are_missing_or_unknown_are_named(many: Many, collection: Any, batch: Batch) -> None:
    pairs = batch.pairs()
    less = {feature: value for feature, value in pairs.items() if feature != "f57"}
    refused(ValueError, "indices must .*'f57'", lambda **how: collection(less, **how), many, exactly=False)
    more = pairs | {"f57 ": pairs["f57"]}
    refused(ValueError, "indices must .*'f57 '", lambda **how: collection(more, **how), many, exactly=False)
    for key in (5, None, ("f57",), b"f57", 1.5):
        wrong = less | {key: pairs["f57"]}
        with pytest.raises((TypeError, ValueError), match=r"^indices must "):
            collection(wrong)
    refused(ValueError, "indices must ", lambda **how: collection({}, **how), many, exactly=False)


@pytest.mark.parametrize("feature", ["f1", "f57", "f99"])
@pytest.mark.parametrize("more", [-1, 1])
def test_features_of_different_numbers_of_bags_are_named(
    many: Many, collection: Any, batch: Batch, feature: str, more: int
) -> None:
    pairs = batch.pairs()
    ends = pairs[feature][1]
    pairs[feature] = (pairs[feature][0], ends[:-1] if more < 0 else np.append(ends, ends[-1]))
    text = rf"indices\['{feature}'\] must .*{NUM_BAGS}.* got {NUM_BAGS + more}"
    refused(ValueError, text, lambda **how: collection(pairs, **how), many, exactly=False)
    square: dict[str, Any] = batch.pairs()
    square[feature] = np.zeros((NUM_BAGS + more, 3), np.int64)
    refused(ValueError, text, lambda **how: collection(square, **how), many, exactly=False)


WRONG_VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "text": lambda: "text",
    "number": lambda: 3,
    "floats": lambda: np.zeros((4, 5)),
    "truths": lambda: np.zeros((4, 5), bool),
    "objects": lambda: np.zeros((4, 5), object),
    "flat, without offsets": lambda: np.zeros(20, np.int64),
    "three dimensions": lambda: np.zeros((4, 5, 1), np.int64),
    "a tuple of three": lambda: (np.zeros(20, np.int64), np.arange(5) * 5, None),
    "an empty tuple": lambda: (),
    "offsets of floats": lambda: (np.zeros(20, np.int64), np.arange(5) * 5.0),
    "indices of floats": lambda: (np.zeros(20), np.arange(5) * 5),
    "no offsets": lambda: (np.zeros(20, np.int64), None),
    "no indices": lambda: (None, np.arange(5) * 5),
    "empty offsets": lambda: (np.zeros(20, np.int64), np.zeros(0, np.int64)),
    "offsets in a square": lambda: (np.zeros(20, np.int64), np.zeros((1, 5), np.int64)),
    "offsets of a matrix": lambda: (np.zeros((4, 5), np.int64), np.arange(5) * 5),
    "texts": lambda: ("a", "b"),
    "dict": lambda: {"indices": np.zeros(20, np.int64), "offsets": np.arange(5) * 5},
    "masked": lambda: np.ma.zeros((4, 5), np.int64),
    "ragged": lambda: [[1, 2], [3], [], [4]],
    "object": object,
}


@pytest.mark.parametrize("value", WRONG_VALUES)
@pytest.mark.parametrize("feature", ["f0", "f57", "f99"])
def test_what_is_wrong_with_one_features_value_is_named_after_it(
    many: Many, collection: Any, batch: Batch, feature: str, value: str
) -> None:
    pairs = batch.pairs() | {feature: WRONG_VALUES[value]()}
    out, outs = whole(many), {name: np.full((NUM_BAGS, 8), 7, np.float32) for name in many.features}
    for given in ({}, {"out": out}, {"out": outs}):
        with pytest.raises((TypeError, ValueError), match=rf"^(indices|offsets)\['{feature}'\] ?") as caught:
            collection(pairs, **given)
        assert type(caught.value) in (TypeError, ValueError)
    assert out.tobytes() == whole(many).tobytes()
    assert all((given == 7).all() for given in outs.values())


def test_arrays_of_no_integers_are_refused(many: Many, collection: Any, batch: Batch) -> None:
    indices, offsets = batch.flat()
    for wrong in (indices.astype(np.float64), indices.astype(bool), indices.astype(object), indices.astype("M8[s]")):
        text = f"must be an array of integers, got {an_array(wrong)} of shape"
        refused(
            TypeError,
            f"indices {re.escape(text)}",
            lambda w=wrong, **how: collection(w, offsets, **how),
            many,
            exactly=False,
        )
    for wrong in (offsets.astype(np.float32), offsets.astype(str)):
        refused(
            TypeError,
            "offsets must be an array of integers",
            lambda w=wrong, **how: collection(indices, w, **how),
            many,
            exactly=False,
        )
        refused(
            TypeError,
            "lengths must be an array of integers",
            lambda w=wrong[1:], **how: collection(indices, lengths=w, **how),
            many,
            exactly=False,
        )
    for wrong in (None, object(), "text", 1.5, [[1], [1, 2]]):
        with pytest.raises((TypeError, ValueError), match=r"^indices must "):
            collection(wrong, offsets)


# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_weights_of_another_shape_or_type_are_refused(many: Many, collection: Any, batch: Batch) -> None:
    indices, offsets = batch.flat()
    weights = batch.flat_weights()
    for wrong in (weights[:-1], np.append(weights, 1).astype(np.float32), weights[:0], weights.reshape(NUMBER, -1)):
        message = f"per_sample_weights must have the shape of indices, {indices.shape}, got {wrong.shape}"
        refused(
            ValueError, message, lambda w=wrong, **how: collection(indices, offsets, per_sample_weights=w, **how), many
        )
    for wrong in (weights.astype(np.int32), weights.astype(bool), weights.astype(complex), weights.astype(object)):
        refused(
            TypeError, "per_sample_weights must be an array of float",
            lambda w=wrong, **how: collection(indices, offsets, per_sample_weights=w, **how), many, exactly=False,
        )  # fmt: skip


def test_weights_of_a_dict_are_a_dict_and_of_an_array_an_array(many: Many, collection: Any, batch: Batch) -> None:
    indices, offsets = batch.flat()
    for given, weights in (
        ((batch.pairs(),), batch.flat_weights()),
        ((indices, offsets), batch.weights_by_feature()),
        ((batch.pairs(),), "text"),
        ((batch.pairs(),), list(batch.weights_by_feature().values())),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^per_sample_weights must "):
            collection(*given, per_sample_weights=weights)


@pytest.mark.parametrize("feature", ["f0", "f57", "f99"])
def test_what_is_wrong_with_one_features_weights_is_named_after_it(
    many: Many, collection: Any, batch: Batch, feature: str
) -> None:
    weights = batch.weights_by_feature()
    for wrong in (
        weights[feature][:-1],
        np.float32(1),
        np.ones((NUM_BAGS, WIDTH), np.float32),
        np.ones(SIZE, int),
        "a",
    ):
        given = weights | {feature: wrong}
        with pytest.raises((TypeError, ValueError), match=rf"^per_sample_weights\['{feature}'\]"):
            collection(batch.pairs(), per_sample_weights=given)
    with pytest.raises(ValueError, match=r"^per_sample_weights must .*'unknown'"):
        collection(batch.pairs(), per_sample_weights=weights | {"unknown": weights["f0"]})


def test_weights_with_max_are_refused(rng: np.random.Generator) -> None:
    """Of all features where they come in one array, which has some for each; of the feature itself in a dict."""
    many = plain(NUMBER)
    many.options = {"f57": ("max", None, "raise")}
    batch = batch_of(rng, many, NUM_BAGS, width=WIDTH)
    collection, ones = many.make(), np.ones(SIZE, np.float32)
    text = "per_sample_weights.* must be None in mode 'max'"
    refused(
        ValueError, text,
        lambda **how: collection(*batch.flat(), per_sample_weights=np.ones(NUMBER * SIZE, np.float32), **how), many,
        exactly=False,
    )  # fmt: skip
    refused(
        ValueError, r"per_sample_weights\['f57'\]:? .*must be None in mode 'max'",
        lambda **how: collection(batch.pairs(), per_sample_weights={"f57": ones}, **how), many, exactly=False,
    )  # fmt: skip
    others = batch.weights_by_feature()
    check(collection(batch.pairs(), per_sample_weights=others), batch.one_by_one(many), collection)


# ---- Outputs ---------------------------------------------------------------------------------------------------------


def refuses_out(collection: Any, batch: Batch, out: Any, memory: Any, text: str) -> None:
    memory = memory if isinstance(memory, list) else [memory]
    before = [array.tobytes() for array in memory]
    for given in (batch.flat(), (batch.pairs(),)):
        with pytest.raises((TypeError, ValueError), match=text):
            collection(*given, out=out)
    assert [array.tobytes() for array in memory] == before


def test_outputs_of_another_shape_type_or_place_are_refused(many: Many, collection: Any, batch: Batch) -> None:
    width = collection.dim
    for shape in [(3, width), (5, width), (4, width - 1), (4, width + 1), (4 * width,), (1, 4, width), (), (0, width)]:
        out = np.ones(shape, np.float32)
        refuses_out(
            collection, batch, out, out, rf"^out must be a float32 array of shape \(4, {width}\), got a float32"
        )
    for kind in (np.float64, np.int32, ">f4" if np.little_endian else "<f4"):
        out = np.ones((4, width), kind)
        refuses_out(collection, batch, out, out, "^out must be a float32 array of shape")
    memory = np.ones((8, 2 * width), np.float32)
    frozen = memory[:4, :width].view()
    frozen.flags.writeable = False
    strided = np.lib.stride_tricks.as_strided
    for out, text in [
        (frozen, "^out must be writeable"),
        (memory[:4, ::2], "^out must have the elements of a row side by side"),
        (memory[:4, width - 1 :: -1], "^out must have the elements of a row side by side"),
        (strided(memory, (4, width), (0, 4)), "^out must have rows that lie apart"),
        (strided(memory, (4, width), (4 * width - 4, 4)), "^out must have rows that lie apart"),
        (np.broadcast_to(memory[0, :width], (4, width)), "^out must "),
    ]:
        refuses_out(collection, batch, out, memory, text)
    masked = np.ma.zeros((4, width), np.float32)
    refuses_out(collection, batch, masked, masked.data, "^out must be an array without a mask")
    for out in ("text", 5, [[1.0]], object(), memory.tolist(), memoryview(memory)):
        refuses_out(collection, batch, out, memory, "^out must ")


def test_each_of_a_dict_of_outputs_is_checked(many: Many, collection: Any, batch: Batch) -> None:
    fresh = lambda: {feature: np.full((NUM_BAGS, 8), 7, np.float32) for feature in many.features}
    frozen = np.full((NUM_BAGS, 8), 7, np.float32)
    frozen.flags.writeable = False
    for feature in ("f0", "f57", "f99"):
        for wrong in (
            np.ones((NUM_BAGS, 7), np.float32), np.ones((NUM_BAGS + 1, 8), np.float32), np.ones(32, np.float32),
            np.ones((NUM_BAGS, 8), np.float64), np.ones((8, NUM_BAGS), np.float32).T, frozen, None, "text", [1.0],
            np.ma.zeros((NUM_BAGS, 8), np.float32), np.broadcast_to(np.float32(1), (NUM_BAGS, 8)),
        ):  # fmt: skip
            outs = fresh() | {feature: wrong}
            refuses_out(
                collection, batch, outs, [value for name, value in outs.items() if name != feature],
                rf"^out.*'{feature}'",
            )  # fmt: skip
        outs = fresh()
        del outs[feature]
        refuses_out(collection, batch, outs, list(outs.values()), rf"^out must .*'{feature}'")
    outs = fresh() | {"unknown": np.ones((NUM_BAGS, 8), np.float32)}
    refuses_out(collection, batch, outs, list(outs.values()), "^out must .*'unknown'")
    refuses_out(collection, batch, {}, [], "^out must ")


def test_outputs_of_different_types_are_refused(many: Many, collection: Any, batch: Batch) -> None:
    outs = {feature: np.full((NUM_BAGS, 8), 7, np.float32) for feature in many.features}
    outs["f57"] = np.full((NUM_BAGS, 8), 7, np.float16)
    refuses_out(collection, batch, outs, list(outs.values()), r"^out\['f57'\]:? .*must ")


def test_outputs_that_overlap_each_other_are_refused(many: Many, collection: Any, batch: Batch) -> None:
    """Wherever they lie and in any order; some that only lie among each other are taken."""
    names = list(many.features)
    memory = np.full((NUMBER + 1) * NUM_BAGS * 8, 7, np.float32)
    apart = dict(zip(names, memory.reshape(-1, NUM_BAGS, 8)[:-1], strict=True))
    for first, second in (("f0", "f99"), ("f56", "f57"), ("f99", "f0"), ("f57", "f56")):
        same = apart | {second: apart[first]}
        refuses_out(collection, batch, same, memory, "^out.*(share|overlap|apart)")
        place = names.index(first) * NUM_BAGS * 8
        for shift in (7, 8, 31):
            shifted = memory[place + shift : place + shift + NUM_BAGS * 8].reshape(NUM_BAGS, 8)
            refuses_out(collection, batch, apart | {second: shifted}, memory, "^out.*(share|overlap|apart)")
    wide = np.full((NUM_BAGS, NUMBER * 8), 7, np.float32)
    columns = {name: wide[:, number * 8 : number * 8 + 8] for number, name in enumerate(names)}
    refuses_out(
        collection, batch, columns | {"f57": wide[:, 57 * 8 + 1 : 58 * 8 + 1]}, wide, "^out.*(share|overlap|apart)"
    )
    # Their reaches cross everywhere, and no two share an element.
    rows = np.full((NUM_BAGS, NUMBER, 8), 7, np.float32)
    among = {name: rows[:: (-1) ** number, number] for number, name in enumerate(names)}
    assert collection(*batch.flat(), out=among) is among


@pytest.mark.parametrize("by_feature", [False, True])
def test_outputs_that_share_memory_with_an_input_are_refused(rng: np.random.Generator, by_feature: bool) -> None:
    many = plain(NUMBER)
    width = NUMBER * 8
    memory = np.zeros(64 << 10, np.uint8)
    out = memory[: NUM_BAGS * width * 4].view(np.float32).reshape(NUM_BAGS, width)
    outs = {name: out[:, number * 8 : number * 8 + 8] for number, name in enumerate(many.features)}
    target: Any = outs if by_feature else out

    made = many.make()

    def inside(array: np.ndarray, first: int) -> np.ndarray:
        """A copy of it that begins at some byte of the memory of the output, in its last element's."""
        copied = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
        copied[...] = array
        return copied

    def refuses(*given: Any, collection: Any = made, name: str, **how: Any) -> None:
        before = memory.tobytes()
        with pytest.raises(ValueError, match=f"^out.* must share no memory with .*{name}"):
            collection(*given, **how, out=target)
        assert memory.tobytes() == before

    batch = batch_of(rng, many, NUM_BAGS, width=WIDTH)
    indices, offsets = batch.flat()
    weights = batch.flat_weights()
    for first in (0, out.nbytes - 8):
        refuses(inside(indices, first), offsets, name="indices")
        refuses(indices, inside(offsets, first), name="offsets")
        refuses(indices, lengths=inside(batch.lengths(), first), name="lengths")
        refuses(indices, offsets, per_sample_weights=inside(weights, first), name="per_sample_weights")
        for feature in ("f0", "f57", "f99"):
            given, ends = batch.pairs()[feature]
            refuses(batch.pairs() | {feature: (inside(given, first), ends)}, name="indices")
            refuses(batch.pairs() | {feature: (given, inside(ends, first))}, name="offsets")
            refuses(batch.pairs() | {feature: inside(given.reshape(NUM_BAGS, WIDTH), first)}, name="indices")
            some = {feature: inside(batch.weights[feature], first)}
            refuses(batch.pairs(), per_sample_weights=some, name="per_sample_weights")
    for feature in ("f0", "f57", "f99"):
        lying = plain(NUMBER)
        mapping = np.arange(10, dtype=np.int32)
        for rows, by, name in (
            (inside(lying.tables[feature].rows, 64), None, "table"),
            (lying.tables[feature].rows, inside(mapping, out.nbytes - 4), MAPPING),
        ):
            lying.tables[feature].made = qembag.QuantizedTable(rows, 8, compressed_indices_mapping=by)
            refuses(indices, offsets, collection=lying.make(), name=name)
            refuses(batch.pairs(), collection=lying.make(), name=name)


# ---- Constructors ----------------------------------------------------------------------------------------------------

ROWS = np.ones((10, 8), np.float32)
TABLES = {"a": ROWS, "b": ROWS}
BOTH = [qembag.EmbeddingBagCollection, qembag.EmbeddingCollection]


@pytest.mark.parametrize("kind", BOTH)
def test_tables_that_are_none_are_refused(kind: Any) -> None:
    for tables in (None, "text", 5, ROWS, qembag.quantize(ROWS), {"a", "b"}, object(), iter([ROWS])):
        with pytest.raises(TypeError, match=r"^tables must "):
            kind(tables)
    for tables in ({}, [], ()):
        with pytest.raises(ValueError, match=r"^tables must "):
            kind(tables)
    for tables in ({1: ROWS}, {None: ROWS}, {b"a": ROWS}):
        with pytest.raises(TypeError, match=r"^tables must have strings as names"):
            kind(tables)
    for table in (None, "text", 5, ROWS.astype(np.float64), ROWS.astype(int), ROWS[0], ROWS[:, :0], [[1.0]], object()):
        for tables, name in ({"a": ROWS, "b": table}, "b"), ([ROWS, table], "1"):
            with pytest.raises((TypeError, ValueError), match=rf"^tables\['{name}'\]:? .*must "):
                kind(tables)


@pytest.mark.parametrize("kind", BOTH)
def test_features_without_a_table_are_refused(kind: Any) -> None:
    for features in ("text", ["a", "b"], 5, {"a", "b"}, object()):
        with pytest.raises(TypeError, match=r"^features must "):
            kind(TABLES, features)
    with pytest.raises(ValueError, match=r"^features must "):
        kind(TABLES, {})
    for key in (1, None, b"f", ("f",)):
        with pytest.raises(TypeError, match=r"^features must have strings as names"):
            kind(TABLES, {key: "a"})
    for name in ("c", "", None, 0, b"a", ROWS, ["a"]):
        with pytest.raises(ValueError, match=r"^features\['g'\] must be the name of a table, got "):
            kind(TABLES, {"f": "a", "g": name})


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("mode", ["Sum", 0, None, b"sum", ["sum"], object()]),
        ("padding_idx", [10, -11, 2**40, 1.5, "1", True, [1], object()]),
        ("invalid", ["ignore", None, 0, True, b"raise", object()]),
    ],
)
def test_options_that_are_none_are_refused(option: str, wrong: list[Any]) -> None:
    for value in wrong:
        for given in (value, {"b": value}, {"a": None if option == "padding_idx" else "sum", "b": value}):
            if option == "invalid" and isinstance(given, dict):
                given = {"b": value}
            with pytest.raises((TypeError, ValueError), match=f"^{option}") as caught:
                qembag.EmbeddingBagCollection(TABLES, **{option: given})
            assert not isinstance(given, dict) or "'b'" in str(caught.value)
    for key in ("c", 1, None):
        with pytest.raises((TypeError, ValueError), match=f"^{option} must name features of the collection"):
            qembag.EmbeddingBagCollection(TABLES, **{option: {key: "sum"}})


@pytest.mark.parametrize("kind", BOTH)
def test_dtypes_that_are_none_of_an_output_are_refused(kind: Any) -> None:
    for dtype in (np.float64, "i4", "nonsense", 5, object(), "f4,(", {"a": np.float32}):
        with pytest.raises((TypeError, ValueError), match=r"^dtype must be float32, float16 or bfloat16"):
            kind(TABLES, dtype=dtype)


@pytest.mark.parametrize("value", [0, -1, 1.5, "1", True, [1]])
def test_numbers_of_threads_that_are_none_are_refused(many: Many, collection: Any, batch: Batch, value: Any) -> None:
    out = whole(many)
    for given in (batch.flat(), (batch.pairs(),)):
        with pytest.raises((TypeError, ValueError), match=r"^num_threads must "):
            collection(*given, num_threads=value, out=out)
    assert out.tobytes() == whole(many).tobytes()


@pytest.mark.parametrize("value", [2, None, "yes", 1.0])
def test_as_dict_is_true_or_false(many: Many, collection: Any, batch: Batch, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^as_dict must be True or False"):
        collection(*batch.flat(), as_dict=value)
    out = whole(many)
    with pytest.raises(TypeError, match=r"^as_dict must be True or False"):
        collection(*batch.flat(), as_dict=value, out=out)
    assert out.tobytes() == whole(many).tobytes()


def test_only_an_output_of_all_features_is_split(collection: Any) -> None:
    width = collection.dim
    assert [view.shape for view in collection.split(np.zeros((0, width))).values()] == [(0, 8)] * NUMBER
    for wrong in (np.zeros((4, width - 1)), np.zeros((4, width + 1)), np.zeros(width), np.zeros((2, 2, width))):
        with pytest.raises(ValueError, match=r"^output must "):
            collection.split(wrong)
    for wrong in (None, "text", 5, [1.0]):
        with pytest.raises((TypeError, ValueError), match=r"^output must "):
            collection.split(wrong)


# ---- Sizes that no memory holds --------------------------------------------------------------------------------------


@pytest.mark.skipif(np.intp(0).itemsize < 8, reason="for addresses of 64 bits")
def test_outputs_beyond_all_memory_are_errors() -> None:
    """Bags, and bags times dims, of more bytes than there are addresses: no product wraps to a small one."""
    features = {f"f{n}": "a" for n in range(64)}
    tables = {"a": np.ones((3, 1024), np.float32)}
    bags, rows = qembag.EmbeddingBagCollection(tables, features), qembag.EmbeddingCollection(tables, features)
    assert bags.dim == 2**16
    for number in (2**44, 2**45, 2**46, 2**47, 2**60 - 1):
        with pytest.raises((MemoryError, ValueError)):
            bags(dict.fromkeys(features, np.empty((number, 0), np.int8)))
        with contextlib.suppress(MemoryError, ValueError):
            assert rows(dict.fromkeys(features, np.empty((number, 0), np.int8)))["f63"].shape == (number, 0, 1024)


@pytest.mark.skipif(UNDER_SANITIZER, reason="a sanitizer marks all memory that is asked for")
@pytest.mark.skipif(np.intp(0).itemsize < 8, reason="for addresses of 64 bits")
def test_positions_beyond_int32_are_read_as_they_are(level: str, rng: np.random.Generator) -> None:
    """More than 2**31 indices, almost all in memory that is never touched."""
    number = 2**31 + 10
    try:
        indices = np.zeros(number, np.int32)
    except MemoryError:
        pytest.skip("the system promises no memory beyond what it has")
    many = plain(3)
    collection = many.make()
    indices[-6:] = rng.integers(0, 10, 6)
    offsets = np.array([2**31 - 1, 2**31, 2**31, number - 3, number - 2, number - 1, number])
    expected = {
        feature: qembag.embedding_bag(
            many.table(feature).made, indices[offsets[2 * k] :], offsets[2 * k : 2 * k + 3] - offsets[2 * k],
            include_last_offset=True,
        )
        for k, feature in enumerate(many.features)
    }  # fmt: skip
    check(collection(indices, offsets), expected, collection)
    pairs = {feature: (indices, offsets[2 * k : 2 * k + 3]) for k, feature in enumerate(many.features)}
    check(collection(pairs), expected, collection)
    indices[-2] = 10
    with pytest.raises(IndexError, match=rf"^indices\[{number - 2}\] is 10 \(feature 'f2', bag 0\): "):
        collection(indices, offsets)
    offsets[-1] = number + 1
    with pytest.raises(
        ValueError, match=rf"^offsets\[6\] is {number + 1} \(feature 'f2'\): must be from 0 to {number}, "
    ):
        collection(indices, offsets)


# ---- Rows without pooling --------------------------------------------------------------------------------------------


def test_rows_of_all_features_are_named_where_one_is_out_of_range(rng: np.random.Generator) -> None:
    many = plain(NUMBER)
    batch = batch_of(rng, many, NUM_BAGS, width=WIDTH)
    batch.indices["f57"][12] = 10
    collection = many.make_of_rows()
    outs = {feature: np.full((SIZE, 8), 7, np.float32) for feature in many.features}
    for given, text in (
        (batch.flat(), rf"^indices\[{57 * SIZE + 12}\] is 10 \(.*'f57'.*\): out of range for {TABLE}$"),
        ((batch.pairs(),), rf"^indices\['f57'\]\[12\] is 10.*: out of range for {TABLE}$"),
        ((dict(batch.indices),), r"^indices\['f57'\]\[12\] is 10.*: out of range"),
    ):
        for how in ({}, {"out": outs}):
            with pytest.raises(IndexError, match=text):
                collection(*given, **how)
    assert all((out == 7).all() for out in outs.values())


def test_bad_input_of_rows_is_refused(rng: np.random.Generator) -> None:
    many = plain(4)
    batch = batch_of(rng, many, NUM_BAGS, width=WIDTH)
    collection = many.make_of_rows()
    indices, offsets = batch.flat()
    for given, text in (
        ((indices,), "(offsets|lengths) "),
        ((indices, offsets[:-1]), "offsets must "),
        ((indices, np.where(offsets == 15, 99, offsets)), r"offsets\[3\] is 99"),
        ((indices.reshape(2, -1), offsets), "indices must "),
        ((indices.astype(float), offsets), "indices must "),
        (({},), "indices must "),
        ((batch.pairs() | {"f2": None},), r"indices\['f2'\]"),
        ((batch.pairs() | {"f9": indices},), "indices must .*'f9'"),
        (({name: array * 1.0 for name, array in batch.indices.items()},), r"indices\['f0'\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{text}"):
            collection(*given)
    outs = {feature: np.full((SIZE, 8), 7, np.float32) for feature in many.features}
    for wrong in (
        {name: out for name, out in outs.items() if name != "f3"},
        outs | {"f9": np.zeros((SIZE, 8), np.float32)},
        outs | {"f2": outs["f1"]},
        outs | {"f2": outs["f2"][:-1]},
        outs | {"f2": outs["f2"].astype(np.float64)},
        list(outs.values()),
        np.zeros((4 * SIZE, 8), np.float32),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^out"):
            collection(indices, offsets, out=wrong)
    assert all((out == 7).all() for out in outs.values())


def test_an_output_of_another_type_than_the_first_is_the_one_that_is_named() -> None:
    many = plain(3)
    batch = batch_of(np.random.default_rng(5), many, NUM_BAGS)
    outs = {feature: np.full((NUM_BAGS, dim), 7, np.float32) for feature, dim in many.dims.items()}
    outs["f2"] = outs["f2"].astype(np.float16)
    with pytest.raises(ValueError, match=r"^out\['f2'\]: out must be a float32 array .* got a float16 array"):
        many.make()(*batch.flat(), out=outs)
    assert all((out == 7).all() for out in outs.values())
