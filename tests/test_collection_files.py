"""Collections in files: tables, features and options come back; a damaged description is refused."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from qembag import EmbeddingBagCollection, EmbeddingCollection
from qembag.formats.table_file import COLLECTION_KEY
from support.arrays import same_bits
from support.files import rewritten, same_tables, tables_of_every_kind

FEATURES = {"b": "wide", "a": "small", "ä": "wide"}
INDICES = {
    "a": (np.array([0, 5, 2, 2]), np.array([0, 1, 4])),
    "b": (np.array([7, 1, 0]), np.array([0, 3, 3])),
    "ä": (np.array([3, 3]), np.array([0, 0, 2])),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def tables(rng: np.random.Generator) -> dict[str, Any]:
    weights = rng.normal(size=(8, 24)).astype(np.float32)
    small = qembag.quantize(weights[:6, :16], bits=2, group_size=16).prune([0, 2, 5])
    return {"wide": qembag.quantize(weights, bits=4), "small": small, "unused": qembag.FloatTable(weights)}


@pytest.fixture
def collection(tables: dict[str, Any]) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables,
        FEATURES,
        mode={"a": "mean", "b": "max", "ä": "sum"},
        dtype="float16",
        padding_idx={"a": np.int8(-1)},
        invalid={"b": "skip"},
    )


def options_of(collection: EmbeddingBagCollection) -> tuple[Any, ...]:
    padding = {
        feature: None if number is None else number % collection.tables[collection.features[feature]].num_embeddings
        for feature, number in collection.padding_idx.items()
    }
    return list(collection.features.items()), collection.modes, padding, collection.invalid, np.dtype(collection.dtype)


# ---- Saved and opened ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_collection_comes_back_as_it_was(collection, tmp_path, mmap, name):
    collection.save(tmp_path / name)
    opened = EmbeddingBagCollection.from_file(tmp_path / name, mmap=mmap)
    assert options_of(opened) == options_of(collection)
    assert sorted(opened.tables) == sorted(collection.tables)
    for table, own in opened.tables.items():
        same_tables(own, collection.tables[table])
        if table != "unused":  # floats are copied by a big-endian host
            assert own.data.flags.writeable != mmap
    same_bits(opened(INDICES), collection(INDICES))


def test_tables_of_every_kind_and_bfloat16_come_back(path):
    tables = tables_of_every_kind()
    EmbeddingBagCollection(tables, dtype="bfloat16", mode="sqrtn").save(path)
    opened = EmbeddingBagCollection.from_file(path)
    assert list(opened.features) == list(tables)  # not sorted, as the file's tables are
    assert opened.dtype == "bfloat16"
    assert set(opened.modes.values()) == {"sqrtn"}
    for name, table in tables.items():
        same_tables(opened.tables[name], table)


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses to replace a file that is mapped")
def test_a_collection_is_saved_over_the_file_that_it_is_mapped_from(collection, path):
    collection.save(path)
    expected = collection(INDICES)
    opened = EmbeddingBagCollection.from_file(path)
    opened.save(path)
    same_bits(opened(INDICES), expected)
    same_bits(EmbeddingBagCollection.from_file(path)(INDICES), expected)


def test_readers_of_tables_ignore_the_collection(collection, path, tmp_path):
    collection.save(path)
    opened = qembag.open_tables(path)
    assert list(opened) == ["small", "unused", "wide"]
    assert opened.metadata == {}
    assert list(qembag.load_tables(path)) == ["small", "unused", "wide"]
    # All but the one string is what save_tables writes.
    qembag.save_tables(tmp_path / "plain.safetensors", collection.tables)
    without = rewritten(path, lambda header: header["__metadata__"].pop(COLLECTION_KEY))
    plain = rewritten(tmp_path / "plain.safetensors", lambda header: None)
    assert without.read_bytes() == plain.read_bytes()


def test_a_collection_without_pooling_comes_back_and_is_summed_if_asked_for_bags(tables, path):
    EmbeddingCollection(tables, FEATURES, dtype=np.float32, invalid={"a": "skip"}).save(path)
    opened = EmbeddingCollection.from_file(path)
    assert list(opened.features.items()) == list(FEATURES.items())
    assert opened.dtype == "float32"
    assert opened.invalid == {"a": "skip", "b": "raise", "ä": "raise"}
    bags = EmbeddingBagCollection.from_file(path)
    assert set(bags.modes.values()) == {"sum"}
    assert set(EmbeddingBagCollection.from_file(path, mode={"a": "mean"}).modes.items()) == {
        ("a", "mean"), ("b", "sum"), ("ä", "sum")
    }  # fmt: skip


def test_bags_open_as_rows(collection, path):
    collection.save(path)
    opened = EmbeddingCollection.from_file(path, dtype="float32")
    assert list(opened.features.items()) == list(FEATURES.items())
    assert opened.invalid == collection.invalid
    found = opened({"a": [2, 5], "b": [[1], [2]], "ä": []})
    same_bits(found["b"], collection.tables["wide"][[[1], [2]]])
    assert found["ä"].shape == (0, 24)


# ---- The caller's options --------------------------------------------------------------------------------------------


def test_options_of_the_caller_win(collection, path):
    collection.save(path)
    opened = EmbeddingBagCollection.from_file(
        path, mode="sum", dtype="float32", padding_idx={"a": None, "b": 3}, invalid={"a": "skip"}
    )
    assert set(opened.modes.values()) == {"sum"}
    assert opened.dtype == "float32"
    assert opened.padding_idx == {"a": None, "b": 3, "ä": None}
    assert opened.invalid == {"a": "skip", "b": "skip", "ä": "raise"}


def test_features_of_the_caller_keep_the_file_s_options_where_they_have_the_same_table(collection, path):
    collection.save(path)
    opened = EmbeddingBagCollection.from_file(path, {"new": "unused", "a": "small", "b": "unused"})
    assert list(opened.features.items()) == [("new", "unused"), ("a", "small"), ("b", "unused")]
    assert opened.modes == {"new": "sum", "a": "mean", "b": "sum"}
    assert opened.padding_idx == {"new": None, "a": 5, "b": None}
    assert opened.invalid == {"new": "raise", "a": "raise", "b": "raise"}


def test_names_choose_tables_and_their_features(collection, path):
    collection.save(path)
    opened = EmbeddingBagCollection.from_file(path, names=["wide"])
    assert list(opened.tables) == ["wide"]
    assert opened.features == {"b": "wide", "ä": "wide"}
    assert opened.modes == {"b": "max", "ä": "sum"}
    assert EmbeddingBagCollection.from_file(path, names="unused").features == {"unused": "unused"}
    with pytest.raises(ValueError, match=r"features\['a'\] must be the name of a table, got 'small'"):
        EmbeddingBagCollection.from_file(path, {"a": "small"}, names="wide")


def test_files_without_a_collection_have_a_feature_a_table(tables, tmp_path):
    qembag.save_tables(tmp_path / "a.safetensors", tables)
    qembag.save_tables(tmp_path / "b.index.json", tables, max_shard_bytes=1)
    for name in ("a.safetensors", "b.index.json"):
        opened = EmbeddingBagCollection.from_file(tmp_path / name, mode="mean")
        assert list(opened.features.items()) == [(name, name) for name in sorted(tables)]
        assert set(opened.modes.values()) == {"mean"}
        assert opened.dtype is None
    np.save(tmp_path / "words.npy", np.eye(3, dtype=np.float16))
    opened = EmbeddingCollection.from_file(tmp_path / "words.npy", invalid="skip")
    assert opened.features == {"words": "words"}
    same_bits(opened({"words": [2, 3]})["words"], np.float32([[0, 0, 1], [0, 0, 0]]))


def test_files_of_other_libraries_are_collections():
    path = Path(__file__).parent / "golden" / "torch" / "torchrec-split.pt"
    tables = qembag.load_tables(path)
    opened = EmbeddingBagCollection.from_file(path, {"user": next(iter(tables))}, mode="mean")
    assert list(opened.tables) == list(tables)
    expected = qembag.embedding_bag(next(iter(tables.values())), [[0, 1]], mode="mean")
    same_bits(opened({"user": [[0, 1]]}), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"features": ["a"]}, TypeError, "features must be a dict"),
        ({"features": {"a": "none"}}, ValueError, "must be the name of a table, got 'none'"),
        ({"mode": "median"}, ValueError, "mode must be"),
        ({"mode": {"x": "sum"}}, ValueError, "mode must name features"),
        ({"padding_idx": 7}, ValueError, "padding_idx must be from -6 to 5"),
        ({"invalid": "ignore"}, ValueError, "invalid must be"),
        ({"dtype": "int8"}, ValueError, "dtype must be"),
        ({"names": "none"}, ValueError, "names must name tables of .*model.safetensors"),
        ({"mmap": "yes"}, TypeError, "mmap must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(collection, path, arguments, error, words):
    collection.save(path)
    with pytest.raises(error, match=words):
        EmbeddingBagCollection.from_file(path, **arguments)


def test_what_cannot_be_saved_is_refused(tables, path):
    with pytest.raises(ValueError, match="names of features must be text without lone surrogates"):
        EmbeddingCollection(tables, {"\ud800": "wide"}).save(path)
    with pytest.raises(ValueError, match="tables must have names other than"):
        EmbeddingCollection({"": tables["wide"]}).save(path)
    with pytest.raises(TypeError, match="path must be"):
        EmbeddingCollection(tables).save(None)
    assert not path.exists()


# ---- Files that are not to be trusted --------------------------------------------------------------------------------


def a_feature(**changes: Any) -> dict[str, Any]:
    whole = {"name": "f", "table": "wide", "mode": "sum", "padding_idx": None, "invalid": "raise"} | changes
    return {key: value for key, value in whole.items() if value != "gone"}


def described(*features: Any, **changes: Any) -> str:
    return json.dumps({"dtype": None, "features": list(features)} | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object of dtype, features"),
        ("3", "must be an object"),
        (described(), r"must have a list of features, got \[\]"),
        (described(features={"f": "wide"}), "must have a list of features"),
        (described(a_feature(), dtype="float64"), "must have a dtype of float32, float16, bfloat16 or null"),
        (described(a_feature(), dtype=[]), "must have a dtype"),
        (described(a_feature(), more=1), "must be an object of dtype, features"),
        (described("f"), "must have features of"),
        (described(a_feature(invalid="gone")), "must have features of"),
        (described(a_feature(more=1)), "must have features of"),
        (described(a_feature(name=3)), "must have a name and a table"),
        (described(a_feature(table=None)), "must have a name and a table"),
        (described(a_feature(table="none")), "must name tables of the file, got 'none' for feature 'f'"),
        (described(a_feature(), a_feature()), "must have each feature once, got 'f' twice"),
        (described(a_feature(mode="median")), "mode must be one of sum, mean, max"),
        (described(a_feature(mode={})), "mode must be one of"),
        (described(a_feature(invalid=None)), "invalid must be one of raise, skip, got None"),
        (described(a_feature(padding_idx=8)), "padding_idx must be below 8, the rows of its table, got 8"),
        (described(a_feature(padding_idx=True)), "padding_idx must be a whole number or null, got True"),
        (described(a_feature(padding_idx=-1)), "must be a whole number from 0"),
        (described(a_feature(padding_idx=1.5)), "must be a whole number from 0"),
        (described(a_feature(padding_idx=10**30)), "must be a whole number from 0"),
        ('{"dtype":null,"dtype":null,"features":[]}', "has the name 'dtype' twice"),
        ('{"dtype":null,"features":[{"name":"\\ud800"}]}', "has a lone surrogate"),
        ("[" * 5000, "nests too deeply|is not JSON"),
    ],
)
@pytest.mark.parametrize("kind", [EmbeddingBagCollection, EmbeddingCollection])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_description_that_is_not_as_it_must_be_is_refused(collection, tmp_path, text, words, kind, name):
    path = tmp_path / name
    collection.save(path)
    if name.endswith(".json"):
        index = json.loads(path.read_text())
        index["metadata"][COLLECTION_KEY] = text
        path.write_text(json.dumps(index))
    else:
        path = rewritten(path, lambda header: header["__metadata__"].update({COLLECTION_KEY: text}))
    with pytest.raises(ValueError, match=words) as caught:
        kind.from_file(path)
    assert str(caught.value).startswith(f"{path}: {COLLECTION_KEY}")
    assert len(str(caught.value)) < 1000
    assert len(qembag.open_tables(path)) == 3


def test_metadata_of_the_user_may_not_have_the_name(tables, path):
    with pytest.raises(ValueError, match=r"metadata must not have keys that begin with qembag\."):
        qembag.save_tables(path, tables, metadata={COLLECTION_KEY: "{}"})


# ---- Pickles and copies ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses to replace a file that is mapped")
def test_a_mapped_collection_pickles_as_its_path(tmp_path):
    path = tmp_path / "big.safetensors"
    big = qembag.quantize(np.ones((50_000, 16), np.float32))
    EmbeddingBagCollection({"big": big}, {"f": "big", "g": "big"}, mode="mean").save(path)
    opened = EmbeddingBagCollection.from_file(path)
    pickled = pickle.dumps(opened)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    assert again.features == opened.features
    assert again.modes == opened.modes
    assert not again.tables["big"].data.flags.writeable
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(ValueError, match="changed since"):
        pickle.loads(pickled)


def test_a_collection_in_memory_pickles_with_its_rows(collection):
    again = pickle.loads(pickle.dumps(collection))
    assert options_of(again) == options_of(collection)
    same_bits(again(INDICES), collection(INDICES))


def test_copies_are_collections(collection, path):
    collection.save(path)
    for made in (collection, EmbeddingBagCollection.from_file(path)):
        for copied in (copy.copy(made), copy.deepcopy(made)):
            assert options_of(copied) == options_of(made)
            same_bits(copied(INDICES), made(INDICES))


def look_up(collection: EmbeddingBagCollection, queue: Any) -> None:
    queue.put(collection(INDICES))


@pytest.mark.slow
def test_other_processes_map_the_file(collection, path):
    collection.save(path)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=look_up, args=(EmbeddingBagCollection.from_file(path), queue))
    child.start()
    same_bits(queue.get(), collection(INDICES))
    child.join()
    assert child.exitcode == 0


# ---- The command -----------------------------------------------------------------------------------------------------


def test_inspect_shows_the_collection(collection, path, command):
    collection.save(path)
    text = command("inspect", path, "--header")
    assert "collection of 3 features, float16: b of wide (max), a of small (mean), ä of wide (sum)" in text
    whole = json.loads(command("inspect", path, "--header", "--json"))
    assert whole["metadata"] == {}
    assert list(whole["collection"]["features"]) == list(FEATURES)
    assert whole["collection"]["dtype"] == "float16"
    assert whole["collection"]["features"]["a"] == {
        "table": "small", "mode": "mean", "padding_idx": 5, "invalid": "raise"
    }  # fmt: skip
    EmbeddingCollection({"t": np.ones((2, 3), np.float32)}, {f"f{number}": "t" for number in range(30)}).save(path)
    text = command("inspect", path)
    assert "collection of 30 features: f0 of t, f1 of t" in text
    assert "f19 of t, ..." in text
    assert "f20" not in text


def test_commands_that_write_a_file_anew_keep_the_collection(collection, path, tmp_path, command):
    collection.save(path)
    for name, *arguments in (
        ("convert", path, tmp_path / "converted.index.json"),
        ("prune", path, tmp_path / "pruned.safetensors", "--table", "unused", "--keep", tmp_path / "keep.npy"),
    ):
        np.save(tmp_path / "keep.npy", np.array([0, 3]))
        command(name, *arguments)
        opened = EmbeddingBagCollection.from_file(arguments[1])
        assert options_of(opened) == options_of(collection)
        same_bits(opened(INDICES), collection(INDICES))
    # Tables that features need are missing.
    command("convert", path, tmp_path / "one.safetensors", "--table", "wide")
    assert EmbeddingBagCollection.from_file(tmp_path / "one.safetensors").features == {"wide": "wide"}
