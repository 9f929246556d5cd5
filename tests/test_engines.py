"""A Scorer gives each row the vector that a call of its own gives, in any layout of Arrow's, and keeps what else there is.

No engine is needed here; `test_engines_ray.py` and its like have those.
"""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import re
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nanoarrow")
pa = pytest.importorskip("pyarrow", minversion="16")

import pyarrow.dataset
import pyarrow.parquet as pq

import qembag
from qembag.engines import Scorer, opened
from qembag.engines.bad_rows import element_type, lists_of
from qembag.interop import arrow
from support import engines
from support.arrays import same_bits
from support.documents import blocks
from support.layouts import packed_rows
from test_processes import said

NUM_ROWS, DIM = 50, 8
BAGS = [[3, 1], [], None, [49, 0, 3], [7], None, [2, 2, 2, 2], [5]]
WEIGHTS = [[0.5, -1.0], [], [], [2.0, 0.25, 1.5], [float("nan")], None, [1.0, 2.0, 3.0, 4.0], [float("inf")]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two tables: "songs" of 4 bits, "words" of 8."""
    rng = np.random.default_rng(3)
    tables = {
        "songs": qembag.QuantizedTable(packed_rows(rng, NUM_ROWS, DIM, 4), 4),
        "words": qembag.QuantizedTable(packed_rows(rng, 9, 4, 8), 8),
    }
    target = tmp_path_factory.mktemp("tables") / "tables.safetensors"
    qembag.EmbeddingBagCollection(tables, mode={"words": "mean"}).save(target)
    return target


@pytest.fixture(scope="module")
def songs(path: Path) -> Any:
    return qembag.open_table(path, "songs")


@pytest.fixture
def scorer(path: Path) -> Scorer:
    return Scorer(path, names="songs")


def expected(table: Any, bags: list[Any], weights: list[Any] | None = None, mode: str = "sum") -> np.ndarray:
    """Row by row."""
    made = np.zeros((len(bags), table.dim), np.float32)
    for number, bag in enumerate(bags):
        own = None if weights is None else np.array(weights[number] or [], np.float32)
        made[number] = qembag.embedding_bag(
            table, np.array(bag or [], np.int64), [0], per_sample_weights=own, mode=mode
        )
    return made


def vectors(column: Any) -> np.ndarray:
    """A column without nulls as an array."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    assert column.null_count == 0
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1) if len(column) else values.reshape(0, 0)


# ---- Columns -----------------------------------------------------------------------------------------------------------


class Ids(pa.ExtensionType):
    def __init__(self, storage: Any) -> None:
        super().__init__(storage, "qembag.test.ids")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, _: bytes) -> Any:
        return cls(storage)


INTEGERS = [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]


def hidden(bags: list[Any]) -> Any:
    """Null lists that hide elements."""
    full = pa.array([[48] * 3 if bag is None else bag for bag in bags], pa.list_(pa.int64()))
    return pa.ListArray.from_arrays(full.offsets, full.values, mask=pa.array([bag is None for bag in bags], pa.bool_()))


def dictionary_of_lists(bags: list[Any]) -> Any:
    known = list({tuple(bag): None for bag in bags if bag is not None})
    codes = pa.array([None if bag is None else known.index(tuple(bag)) for bag in bags], pa.int8())
    return pa.DictionaryArray.from_arrays(codes, pa.array([list(bag) for bag in known], pa.list_(pa.int64())))


def dictionary_of_integers(bags: list[Any]) -> Any:
    plain = pa.array(bags, pa.list_(pa.int64()))
    mask = None if plain.null_count == 0 else plain.is_null()
    return pa.ListArray.from_arrays(plain.offsets, plain.values.dictionary_encode(), mask=mask)


def sliced(bags: list[Any]) -> Any:
    return pa.array([[1, 2, 3], *bags, [4], None], pa.list_(pa.int32())).slice(1, len(bags))


def in_struct(bags: list[Any]) -> Any:
    """The column of a slice of a struct."""
    around = pa.array([[9], *bags, None], pa.list_(pa.int64()))
    return pa.StructArray.from_arrays([around], ["songs"]).slice(1, len(bags)).flatten()[0]


def fixed(bags: list[Any]) -> Any:
    """Of all bags of two."""
    return pa.array([None if bag is None else [*bag, 6, 7][:2] for bag in bags], pa.list_(pa.int64(), 2))


LAYOUTS: dict[str, Any] = {
    **{f"list of {kind}": lambda bags, kind=kind: pa.array(bags, pa.list_(kind)) for kind in INTEGERS},
    "large lists": lambda bags: pa.array(bags, pa.large_list(pa.int64())),
    "fixed-size lists": fixed,
    "fixed-size lists, sliced": lambda bags: fixed([[1], *bags, [1]]).slice(1, len(bags)),
    "fixed-size lists of nothing": lambda bags: pa.array([bag and [] for bag in bags], pa.list_(pa.int64(), 0)),
    "null lists that hide elements": hidden,
    "slices": sliced,
    "slices of structs": in_struct,
    "dictionary of lists": dictionary_of_lists,
    "dictionary of integers": dictionary_of_integers,
    "extension of lists": lambda bags: pa.ExtensionArray.from_storage(Ids(pa.list_(pa.int32())), sliced(bags)),
    "nulls alone": lambda bags: pa.nulls(len(bags)),
    "lists of nulls": lambda bags: pa.array([bag and [] for bag in bags], pa.list_(pa.null())),
}


def chunked(array: Any, lengths: list[int]) -> Any:
    starts = np.cumsum([0, *lengths])
    assert starts[-1] == len(array)
    return pa.chunked_array(
        [array.slice(start, count) for start, count in zip(starts, lengths, strict=False)], array.type
    )


CHUNKS = {"one": [8], "three": [3, 4, 1], "empty ones": [0, 0, 5, 0, 3, 0], "rows": [1] * 8}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_lists_is_read_as_its_elements(
    scorer: Scorer, songs: Any, layout: str, chunks: list[int]
) -> None:
    column = chunked(LAYOUTS[layout](BAGS), chunks)
    bags = column.to_pylist()
    batch = pa.table({"songs": column})
    same_bits(vectors(scorer(batch)["vector"]), expected(songs, bags))
    [record] = batch.combine_chunks().to_batches()
    same_bits(vectors(scorer(record)["vector"]), expected(songs, bags))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_and_lengths_are_those_that_the_collection_reads(layout: str) -> None:
    """What is asked for bad rows, and for rows with weights, agrees with the way that has neither."""
    for bags in (BAGS, [[1, 2]], [None], []):
        for chunks in ([len(bags)], [len(bags) // 2, len(bags) - len(bags) // 2], []):
            if not chunks and bags:
                continue
            column = chunked(LAYOUTS[layout](bags), chunks)
            assert str(element_type(column.type, "a")) in {"null", *map(str, INTEGERS)}
            ours = lists_of(column)
            theirs = arrow.bags_of(column, "indices")
            assert theirs is not None
            lengths, values = [], []
            for part in theirs:
                if part.offsets is None:
                    lengths += [part.indices.shape[1]] * len(part.indices)
                    values += part.indices.ravel().tolist()
                else:
                    lengths += np.diff(part.offsets).tolist()
                    values += part.indices[part.offsets[0] : part.offsets[-1]].tolist()
            assert ours.lengths.tolist() == lengths
            assert ours.values.to_pylist() == values


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.float64(), pa.int8(), pa.int64(), pa.uint64()])
@pytest.mark.parametrize("lists", [pa.list_, pa.large_list], ids=["list", "large"])
@pytest.mark.parametrize("chunks", [[8], [2, 6], [1] * 8])
def test_weights_of_each_type_are_those_of_a_call(path: Path, songs: Any, kind: Any, lists: Any, chunks: Any) -> None:
    weights: list[Any] = WEIGHTS
    if not pa.types.is_floating(kind):
        weights = [bag and [len(bag) + place for place in range(len(bag))] for bag in BAGS]
    numpy_kind = kind.to_pandas_dtype()
    column = pa.array([bag and [numpy_kind(weight) for weight in bag] for bag in weights], lists(kind))
    batch = pa.table({"songs": chunked(pa.array(BAGS), chunks), "w": chunked(column, CHUNKS["three"])})
    made = Scorer(path, names="songs", weights={"songs": "w"})(batch)
    same_bits(vectors(made["vector"]), expected(songs, BAGS, weights))


def test_weights_beyond_float32_are_infinite_as_in_a_call(path: Path, songs: Any) -> None:
    batch = pa.table({"songs": [[1, 2]], "w": [[1e300, 1.0]]})
    made = Scorer(path, names="songs", weights={"songs": "w"})(batch)
    same_bits(vectors(made["vector"]), qembag.embedding_bag(songs, [[1, 2]], per_sample_weights=np.array([[1e300, 1]])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_stand_beside_each_layout_of_indices(path: Path, songs: Any, layout: str) -> None:
    column = chunked(LAYOUTS[layout](BAGS), [3, 5])
    bags = column.to_pylist()
    weights = [bag and [0.5 + place for place in range(len(bag))] for bag in bags]
    batch = pa.table({"songs": column, "w": pa.array(weights, pa.list_(pa.float32()))})
    made = Scorer(path, names="songs", weights={"songs": "w"})(batch)
    same_bits(vectors(made["vector"]), expected(songs, bags, weights))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([1, 2]), r"column 'songs' must have lists \(List, LargeList or FixedSizeList\), got int64"),
        (pa.array(["a", "b"]), "column 'songs' must have lists .*, got string"),
        (pa.array(["a", "b"], pa.string_view()), "column 'songs' must have lists .*, got string_view"),
        (pa.array([[1.0], []]), "column 'songs' must have lists of integers, got lists of double"),
        (pa.array([["a"], []]), "column 'songs' must have lists of integers, got lists of string"),
        (pa.array([[True], []]), "column 'songs' must have lists of integers, got lists of bool"),
        (pa.array([[[1]], []]), "column 'songs' must have lists of integers, got lists of list"),
        (pa.array([[1], []], pa.list_view(pa.int64())), "column 'songs' must have lists .*, got list_view"),
        (pa.array([[(1, 2)], []], pa.map_(pa.int64(), pa.int64())), "column 'songs' must have lists .*, got map"),
    ],
)
@pytest.mark.parametrize("errors", ["raise", "null"])
def test_columns_of_other_types_are_refused_by_their_names(path: Path, column: Any, words: str, errors: str) -> None:
    for batch in (pa.table({"songs": column}), pa.table({"songs": column.slice(0, 0)})):
        with pytest.raises(TypeError, match=f"^{words}"):
            Scorer(path, names="songs", errors=errors)(batch)


def test_weights_of_other_types_are_refused_by_their_names(path: Path) -> None:
    scorer = Scorer(path, names="songs", weights={"songs": "w"}, errors="null")
    for column, kind in ((["a"], "string"), ([True], "bool"), ([datetime.date(2026, 1, 1)], "date32")):
        words = f"column 'w' must have lists of numbers, for weights, got lists of {kind}"
        with pytest.raises(TypeError, match=words):
            scorer(pa.table({"songs": [[1]], "w": [column]}))
    with pytest.raises(TypeError, match="column 'w' must have lists"):
        scorer(pa.table({"songs": [[1]], "w": [1.0]}))


# ---- What is kept, and what is made ------------------------------------------------------------------------------------


def others() -> pa.Table:
    """Columns of many types, one name twice, and metadata."""
    fields = [
        pa.field("id", pa.int64(), nullable=False, metadata={"a": "b"}),
        pa.field("songs", pa.list_(pa.int64())),
        pa.field("when", pa.timestamp("us", "Europe/Zurich")),
        pa.field("twice", pa.string()),
        pa.field("twice", pa.binary()),
        pa.field("view", pa.string_view()),
        pa.field("kind", pa.dictionary(pa.int8(), pa.string())),
        pa.field("pair", pa.struct([("x", pa.int8())])),
    ]
    values = [
        [1, 2, 3],
        [[1, 2], None, [4]],
        [None, datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), None],
        ["a", None, "b"],
        [b"a", None, b"b"],
        ["x" * 20, None, "y"],
        ["p", None, "p"],
        [{"x": 1}, None, {"x": None}],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(values, fields, strict=True)]
    return pa.table(arrays, schema=pa.schema(fields, {"made by": "a test"}))


def test_other_columns_metadata_and_order_are_kept(scorer: Scorer, songs: Any) -> None:
    batch = others()
    made = scorer(batch)
    assert made.schema.names == [*batch.schema.names, "vector"]
    assert made.drop_columns(["vector"]).equals(batch)
    assert made.schema.remove(made.schema.get_field_index("vector")).equals(batch.schema, check_metadata=True)
    same_bits(vectors(made["vector"]), expected(songs, batch["songs"].to_pylist()))
    for record in batch.to_batches(max_chunksize=2):
        kept = scorer(record)
        assert kept.schema.remove(len(batch.schema)).equals(batch.schema, check_metadata=True)
        assert kept.schema.equals(made.schema, check_metadata=True)
        assert all(kept.column(place).equals(record.column(place)) for place in range(record.num_columns))


@pytest.mark.parametrize("list_size", ["variable", "fixed"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_the_column_is_of_one_type_with_and_without_rows(path: Path, dtype: Any, list_size: str) -> None:
    scorer = Scorer(path, dtype=dtype, list_size=list_size)
    element = pa.float16() if dtype == "float16" else pa.float32()
    kind = pa.list_(element) if list_size == "variable" else pa.list_(element, DIM + 4)
    collection = qembag.EmbeddingBagCollection.from_file(path, dtype=dtype)
    for songs, words in (([[1, 2], None], [[0], [8, 8]]), ([], [])):
        for integers in (pa.int64(), pa.null()):
            batch = pa.table(
                {"songs": pa.array(songs if integers != pa.null() else [None] * len(songs), pa.list_(integers)),
                 "words": pa.array(words, pa.list_(pa.int64()))}
            )  # fmt: skip
            for made in (
                scorer(batch),
                pa.Table.from_batches([scorer(batch.combine_chunks().to_batches()[0])]) if songs else scorer(batch),
            ):
                assert made.schema.field("vector").type == kind
                asked = {name: batch[name] for name in ("songs", "words")}
                if songs:
                    same_bits(vectors(made["vector"]), collection(asked))
                assert made.num_rows == len(songs)


def test_a_table_of_no_chunks_gives_no_rows(path: Path) -> None:
    for weights in (None, {"songs": "w"}):
        schema = pa.schema(
            [("songs", pa.list_(pa.int64())), ("words", pa.list_(pa.int32())), ("w", pa.list_(pa.float32()))]
        )
        for output in ("vector", {"songs": "a", "words": "b"}):
            made = Scorer(path, weights=weights, output=output)(pa.Table.from_batches([], schema))
            assert made.num_rows == 0
            assert made.num_columns == 4 + isinstance(output, dict)
        with pytest.raises(ValueError, match="the batch must have one column 'songs', got columns"):
            Scorer(path, weights=weights)(pa.table({}))


def test_outputs_by_feature_are_the_collections_columns(path: Path) -> None:
    batch = pa.table({"songs": BAGS, "words": [[1], [2, 3], [], None, [8], [0, 0], [4], [5]]})
    whole = Scorer(path)(batch)["vector"]
    by_feature = Scorer(path, output={"words": "w", "songs": "s"})(batch)
    assert by_feature.schema.names == ["songs", "words", "s", "w"]
    same_bits(np.concatenate([vectors(by_feature["s"]), vectors(by_feature["w"])], axis=1), vectors(whole))


def test_features_may_share_a_table_and_a_column_and_have_their_modes(path: Path, songs: Any) -> None:
    features = {f"f{number}": "songs" for number in range(30)}
    modes = {"f0": "max", "f1": "mean", "f2": "sqrtn"}
    scorer = Scorer(path, features, mode=modes, columns=dict.fromkeys(features, "ids"))
    made = vectors(scorer(pa.table({"ids": BAGS}))["vector"])
    for number, feature in enumerate(features):
        same_bits(made[:, number * DIM : (number + 1) * DIM], expected(songs, BAGS, mode=modes.get(feature, "sum")))


def test_padding_and_invalid_are_the_collections(path: Path, songs: Any) -> None:
    bags = [[3, 1], [99, 3], [-5]]
    made = Scorer(path, names="songs", padding_idx=3, invalid="skip")(pa.table({"songs": bags}))
    same_bits(vectors(made["vector"]), expected(songs, [[1], [], []]))
    with pytest.raises(ValueError, match=r"row 1: songs\[1\] is null: must be a number"):
        Scorer(path, names="songs", invalid="skip")(pa.table({"songs": [[1], [99, None]]}))


def test_pruned_tables_have_the_rows_that_they_had(tmp_path: Path, songs: Any) -> None:
    pruned = songs.prune([3, 49])
    qembag.save_tables(tmp_path / "pruned.safetensors", {"songs": pruned})
    scorer = Scorer(tmp_path / "pruned.safetensors", errors="null")
    made = scorer(pa.table({"songs": [[3, 48], [49], [50]]}))["vector"]
    assert made.is_null().to_pylist() == [False, False, True]
    same_bits(vectors(made.slice(0, 2)), expected(pruned, [[3, 48], [49]]))


# ---- Bad rows ------------------------------------------------------------------------------------------------------------


def test_the_first_bad_row_is_an_error_with_its_keys_and_the_reason(path: Path) -> None:
    rows = {"file": ["a.parquet", "a.parquet", "b.parquet"], "id": [7, 8, 9], "songs": [[1], [2, 50], [-1]]}
    batch = pa.table(rows)
    scorer = Scorer(path, names="songs", row_id=["file", "id"])
    reason = r"songs\[1\] is 50: out of range for a table of 50 rows"
    words = rf"^row 1, file='a.parquet', id=8: {reason} \(tables: .*tables.safetensors\)$"
    for given in (batch, batch.to_batches()[0]):
        with pytest.raises(IndexError, match=words):
            scorer(given)
    with pytest.raises(IndexError, match=f"^row 1, id=8: {reason}"):
        Scorer(path, names="songs", row_id="id")(batch)
    with pytest.raises(IndexError, match=f"^row 1: {reason}"):
        Scorer(path, names="songs")(batch)
    with pytest.raises(ValueError, match="the batch must have one column 'key'"):
        Scorer(path, names="songs", row_id="key")(batch)
    with pytest.raises(IndexError, match=rf"^row 4, file='a.parquet', id=8: {reason}"):
        list(scorer.map_arrow([batch.slice(0, 1).to_batches()[0]] * 3 + batch.to_batches()))


REASONS = {
    (1, 2): None,
    (1, None): "songs[1] is null: must be a number",
    (None, 50): "songs[0] is null: must be a number",
    (50, None): "songs[0] is 50: out of range for a table of 50 rows",
    (-1,): "songs[0] is -1: out of range for a table of 50 rows",
    (2**62, 1): f"songs[0] is {2**62}: out of range for a table of 50 rows",
    (): None,
}


@pytest.mark.parametrize("list_size", ["variable", "fixed"])
@pytest.mark.parametrize("chunks", [[7], [2, 0, 5], [1] * 7])
def test_bad_rows_are_null_counted_and_explained_and_others_are_right(
    path: Path, songs: Any, list_size: str, chunks: list[int]
) -> None:
    scorer = Scorer(path, names="songs", errors="null", reasons="why", list_size=list_size)
    bags = [list(bag) for bag in REASONS]
    made = scorer(pa.table({"songs": chunked(pa.array(bags), chunks)}))
    assert made["why"].to_pylist() == list(REASONS.values())
    assert made["why"].type == pa.string()
    assert made["vector"].is_null().to_pylist() == [why is not None for why in REASONS.values()]
    good = [place for place, why in enumerate(REASONS.values()) if why is None]
    same_bits(vectors(made["vector"].take(good)), expected(songs, [bags[place] for place in good]))
    assert scorer.null_rows == 5
    assert scorer(pa.table({"songs": [[1]]}))["why"].to_pylist() == [None]
    assert scorer.null_rows == 5
    made.validate(full=True)


def test_wrong_weights_make_a_row_bad(path: Path) -> None:
    batch = pa.table(
        {
            "songs": [[1, 2], [1, 2], None, [1], [1], [99], [1]],
            "w": [[1.0, 2.0], [1.0], [1.0], None, [None], [None], [float("nan")]],
        }
    )
    scorer = Scorer(path, names="songs", weights={"songs": "w"}, errors="null", reasons="why")
    made = scorer(batch)
    assert made["why"].to_pylist() == [
        None,
        "w must have as many elements as songs, 2, got 1",
        "w must have as many elements as songs, 0, got 1",
        "w must have as many elements as songs, 1, got 0",
        "w[0] is null: must be a number",
        "songs[0] is 99: out of range for a table of 50 rows",
        None,
    ]
    assert made["vector"].is_null().to_pylist() == [False, True, True, True, True, True, False]
    with pytest.raises(ValueError, match=r"^row 1: w must have as many elements as songs, 2, got 1"):
        Scorer(path, names="songs", weights={"songs": "w"})(batch)


def test_only_the_columns_of_a_bad_feature_are_null(path: Path) -> None:
    batch = pa.table({"songs": [[1], [99], [2], [77]], "words": [[1], [2], [9], [-3]]})
    scorer = Scorer(path, output={"songs": "s", "words": "w"}, errors="null", reasons="why")
    made = scorer(batch)
    assert made["s"].is_null().to_pylist() == [False, True, False, True]
    assert made["w"].is_null().to_pylist() == [False, False, True, True]
    assert made["why"].to_pylist()[3] == (
        "songs[0] is 77: out of range for a table of 50 rows; words[0] is -3: out of range for a table of 9 rows"
    )
    assert scorer.null_rows == 3
    whole = Scorer(path, errors="null")(batch)["vector"]
    assert whole.is_null().to_pylist() == [False, True, True, True]


def test_features_of_one_column_tell_a_fault_once(path: Path) -> None:
    scorer = Scorer(path, {"a": "songs", "b": "songs"}, columns={"a": "ids", "b": "ids"}, errors="null", reasons="why")
    why = scorer(pa.table({"ids": [[99]]}))["why"].to_pylist()
    assert why == ["ids[0] is 99: out of range for a table of 50 rows"]


def random_batch(rng: np.random.Generator, weighted: bool) -> tuple[pa.Table, list[Any], list[Any]]:
    """Rows of which some are bad, in a random layout and random chunks."""
    count = int(rng.integers(0, 12))
    bags: list[Any] = [
        None if rng.random() < 0.1 else [
            None if rng.random() < 0.03 else int(rng.integers(-1 if rng.random() < 0.1 else 0, 52 if rng.random() < 0.1 else 50))
            for _ in range(rng.integers(0, 5))
        ]
        for _ in range(count)
    ]  # fmt: skip
    make = rng.choice(["list of int64", "list of int8", "large lists", "slices", "null lists that hide elements"])
    column = LAYOUTS[str(make)](bags)
    weights: list[Any] = [
        None if bag is None and rng.random() < 0.5 else [
            None if rng.random() < 0.02 else float(np.float32(rng.normal())) for _ in range(len(bag or []) + (rng.random() < 0.05))
        ]
        for bag in bags
    ]  # fmt: skip
    cut = int(rng.integers(0, count + 1))
    other = int(rng.integers(0, count + 1))
    columns = {"songs": chunked(column, [cut, count - cut])}
    columns["w"] = chunked(pa.array(weights, pa.list_(pa.float32())), [other, count - other])
    return pa.table(columns), bags, weights if weighted else [None] * count


def one_row(table: Any, bag: Any, weights: Any, weighted: bool) -> np.ndarray | None:
    """A row's vector by a lookup of its own; None if that refuses it."""
    own = np.array(weights or [], np.float32) if weighted else None
    if None in (bag or []) or (weighted and (None in (weights or []) or len(weights or []) != len(bag or []))):
        return None
    try:
        return qembag.embedding_bag(table, np.array(bag or [], np.int64), [0], per_sample_weights=own)[0]
    except IndexError:
        return None


@pytest.mark.parametrize("weighted", [False, True])
def test_random_batches_give_what_lookups_row_by_row_give(path: Path, songs: Any, weighted: bool) -> None:
    rng = np.random.default_rng(1700 + weighted)
    weights_of = {"songs": "w"} if weighted else None
    lenient = Scorer(path, names="songs", weights=weights_of, errors="null", reasons="why", num_threads=1)
    strict = Scorer(path, names="songs", weights=weights_of, num_threads=1)
    null_rows = 0
    for _ in range(300):
        batch, bags, weights = random_batch(rng, weighted)
        rows = [one_row(songs, bag, own, weighted) for bag, own in zip(bags, weights, strict=True)]
        made = lenient(batch)
        null_rows += sum(row is None for row in rows)
        assert lenient.null_rows == null_rows
        for row, found, why in zip(rows, made["vector"].to_pylist(), made["why"].to_pylist(), strict=True):
            assert (row is None) == (found is None) == (why is not None)
            if row is not None:
                same_bits(np.array(found, np.float32), row)
        bad = next((number for number, row in enumerate(rows) if row is None), None)
        if bad is None:
            assert strict(batch)["vector"].equals(made["vector"])
        else:
            with pytest.raises((IndexError, ValueError), match=f"^row {bad}: "):
                strict(batch)
    assert null_rows > 80


# ---- Batches that are refused --------------------------------------------------------------------------------------------


def test_columns_that_are_missing_twice_or_there_already_are_refused(scorer: Scorer, path: Path) -> None:
    column = pa.array([[1]])
    with pytest.raises(ValueError, match="the batch must have one column 'songs', got columns"):
        scorer(pa.table({"song": column}))
    with pytest.raises(ValueError, match="the batch must have one column 'songs', got columns"):
        scorer(pa.table([column, column], names=["songs", "songs"]))
    with pytest.raises(ValueError, match="the batch must not have a column 'vector' yet"):
        scorer(pa.table({"songs": column, "vector": [1]}))
    with pytest.raises(ValueError, match="the batch must not have a column 'why' yet"):
        Scorer(path, names="songs", errors="null", reasons="why")(pa.table({"songs": column, "why": [1]}))
    with pytest.raises(ValueError, match="the batch must not have a column 'songs' yet"):
        Scorer(path, names="songs", output="songs")(pa.table({"songs": column}))


def test_other_batches_are_refused_with_what_to_give(scorer: Scorer) -> None:
    for batch in ({"songs": np.array([[1]])}, [[1]], None, pa.array([[1]])):
        with pytest.raises(TypeError, match=r"batch must be a pyarrow Table or RecordBatch .*batch_format='pyarrow'"):
            scorer(batch)
        with pytest.raises(TypeError, match="frame must be a pandas DataFrame, got"):
            scorer.map_pandas(batch)
    with pytest.raises(TypeError, match=r"batches must be of pyarrow.RecordBatch, got .*Table"):
        list(scorer.map_arrow([pa.table({"songs": [[1]]})]))


def test_arguments_that_are_wrong_are_refused_when_the_scorer_is_made(path: Path) -> None:
    for words, kind, given in (
        ("output must be a column's name, or a dict of feature to column, got", TypeError, {"output": ["a"]}),
        ("output must name a column for each feature, got none for 'words'", ValueError, {"output": {"songs": "a"}}),
        ("output must have features of the collection only, got 'x'", ValueError, {"output": {"x": "a"}}),
        (r"output and reasons must be .* different names", ValueError, {"output": {"songs": "a", "words": "a"}}),
        ("output and reasons must be", ValueError, {"output": "a", "reasons": "a", "errors": "null"}),
        ("reasons must be None with errors='raise', got 'a'", ValueError, {"reasons": "a"}),
        ("reasons must be a column's name, got", TypeError, {"reasons": 1, "errors": "null"}),
        ("row_id must be a column's name, got", TypeError, {"row_id": 1}),
        (r"row_id\[1\] must be a column's name, got", TypeError, {"row_id": ["a", 1]}),
        ("columns must be a dict of feature to column, got", TypeError, {"columns": ["a"]}),
        (r"columns\['songs'\] must be a column's name, got", TypeError, {"columns": {"songs": 1}}),
        ("weights must have features of the collection only, got 'x'", ValueError, {"weights": {"x": "a"}}),
        (
            "weights must not have feature 'songs', whose mode is 'max'",
            ValueError,
            {"weights": {"songs": "a"}, "mode": "max"},
        ),
        ("errors must be 'raise' or 'null', got 'ignore'", ValueError, {"errors": "ignore"}),
        ("list_size must be 'variable' or 'fixed', got 'b'", ValueError, {"list_size": "b"}),
        ("dtype must be float32 or float16, got bfloat16", TypeError, {"dtype": "bfloat16"}),
        ("num_threads must be", ValueError, {"num_threads": 0}),
        ("padding_idx must be", TypeError, {"padding_idx": True}),
    ):
        with pytest.raises(kind, match=words):
            Scorer(path, **given)
    with pytest.raises(FileNotFoundError):
        Scorer(path.with_name("none.safetensors"))


# ---- Data frames ---------------------------------------------------------------------------------------------------------


def test_frames_of_polars_keep_their_columns_and_types(path: Path, songs: Any) -> None:
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"id": [3, 1, 2], "kind": pl.Series(["a", "b", "a"], dtype=pl.Categorical), "songs": BAGS[:3]})
    frame = frame.with_columns(when=pl.lit(datetime.datetime(2026, 1, 1)), pair=pl.struct("id"))
    scorer = Scorer(path, names="songs")
    for given in (frame, frame[1:], pl.concat([frame, frame[:2]], rechunk=False), frame.clear()):
        made = scorer(given)
        assert made.columns == [*given.columns, "vector"]
        assert made.schema["vector"] == pl.List(pl.Float32)
        assert made.drop("vector").equals(given)
        assert dict(made.drop("vector").schema) == dict(given.schema)
        if given.height:
            same_bits(vectors(pa.chunked_array(made["vector"])), expected(songs, given["songs"].to_list()))
    fixed = frame.with_columns(songs=pl.Series([[1, 2], [3, 4], [5, 6]], dtype=pl.Array(pl.UInt8, 2)))
    made = Scorer(path, names="songs", list_size="fixed")(fixed)
    assert made.schema["vector"] == pl.Array(pl.Float32, DIM)
    same_bits(made["vector"].to_numpy(), expected(songs, fixed["songs"].to_list()))
    with pytest.raises(IndexError, match=r"^row 1, id=1, kind='b': songs\[0\] is 99"):
        Scorer(path, names="songs", row_id=["id", "kind"])(frame.with_columns(songs=pl.Series([[1], [99], None])))
    with pytest.raises(TypeError, match=r"batch must be .* polars DataFrame, got .*LazyFrame"):
        scorer(frame.lazy())
    lazy = frame.lazy().map_batches(scorer, schema=scorer(frame.clear()).schema)
    assert lazy.collect().equals(scorer(frame))
    with pytest.raises(TypeError, match="column 'songs' must have lists"):
        scorer(pl.DataFrame({"songs": [object()]}))


def test_frames_of_pandas_keep_index_attributes_and_columns(path: Path, songs: Any) -> None:
    pd = pytest.importorskip("pandas")
    scorer = Scorer(path, names="songs", row_id="id")
    ids = pd.Categorical(["a", "b", "a", "c"])
    for column in (
        pd.Series([[1, 2], None, [], [3]]),
        pd.Series([np.array([1, 2]), float("nan"), np.array([], np.int64), (3,)]),
        pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([[[1, 2], None], [[], [3]]]))),
    ):
        frame = pd.DataFrame({"id": ids, 5: 1.5, "songs": column})
        frame.index = pd.MultiIndex.from_tuples([(1, "x"), (1, "y"), (1, "y"), (2, "x")], names=["n", "m"])
        frame.attrs["made by"] = "a test"
        for given in (frame, frame.iloc[:0], frame.iloc[1:]):
            made = scorer.map_pandas(given)
            assert made.attrs == given.attrs
            pd.testing.assert_frame_equal(made.drop(columns="vector"), given)
            assert made["vector"].dtype == pd.ArrowDtype(pa.list_(pa.float32()))
            if len(given):
                bags = [[1, 2], [], [], [3]][-len(given) :]
                same_bits(vectors(made["vector"].array.__arrow_array__()), expected(songs, bags))
    frame = pd.DataFrame({"id": ids, "songs": [[1], [2], [None], [3]]}, index=[4, 3, 2, 1])
    with pytest.raises(ValueError, match=r"^row 2, id='a': songs\[0\] is null"):
        scorer.map_pandas(frame)
    with pytest.raises(ValueError, match=r"^row 2, id=7: songs\[0\] is null"):
        scorer.map_pandas(frame.assign(id=np.int64(7)))
    with pytest.raises(TypeError, match="column 'songs' must have lists, got what pyarrow cannot convert"):
        scorer.map_pandas(frame.assign(songs=[[1], 2, "x", object()]))
    with pytest.raises(ValueError, match="one column 'songs'"):
        scorer.map_pandas(pd.concat([frame, frame[["songs"]]], axis=1))
    kind = type("Frame", (pd.DataFrame,), {"_constructor": property(lambda self: type(self))})
    assert type(scorer.map_pandas(kind(frame.assign(songs=[[1]] * 4)))) is kind


def test_duckdb_gives_batches_and_takes_them(path: Path, songs: Any) -> None:
    duckdb = pytest.importorskip("duckdb")
    scorer = Scorer(path, names="songs")
    with duckdb.connect() as connection:
        query = "select i as id, [i % 50, (7 * i) % 50] as songs from range(5000) t(i) order by id"
        reader = connection.sql(query).to_arrow_reader(1000)
        schema = scorer(reader.schema.empty_table()).schema
        scored = pa.RecordBatchReader.from_batches(schema, scorer.map_arrow(reader))
        made = scored.read_all()
        same_bits(vectors(made["vector"]), expected(songs, [[i % 50, 7 * i % 50] for i in range(5000)]))
        assert connection.sql("select sum(len(vector)) from made").fetchall() == [(5000 * DIM,)]


def test_datasets_are_scored_batch_by_batch_into_parquet(path: Path, songs: Any, tmp_path: Path) -> None:
    for list_size in ("variable", "fixed"):
        # Older ones cannot read null lists of a fixed size back.
        has_nulls = list_size == "variable" or int(pa.__version__.partition(".")[0]) >= 26
        scorer = Scorer(path, names="songs", list_size=list_size, errors="null")
        folder = tmp_path / list_size
        for number in range(3):
            bags = [[number, row] for row in range(48)] + [[99 if has_nulls else 9, 1]]
            folder.mkdir(exist_ok=True)
            pq.write_table(pa.table({"id": range(49), "songs": bags}), folder / f"{number}.parquet", row_group_size=20)
        found = pyarrow.dataset.dataset(folder)
        made = pa.RecordBatchReader.from_batches(
            scorer(found.schema.empty_table()).schema, scorer.map_arrow(found.to_batches())
        )
        pyarrow.dataset.write_dataset(made, tmp_path / f"{list_size}-out", format="parquet")
        assert scorer.null_rows == (3 if has_nulls else 0)
        back = pyarrow.dataset.dataset(tmp_path / f"{list_size}-out").to_table()
        assert back["vector"].null_count == (3 if has_nulls else 0)
        good = back.filter(back["vector"].is_valid())
        same_bits(vectors(good["vector"]), expected(songs, good["songs"].to_pylist()))


# ---- Processes and threads -----------------------------------------------------------------------------------------------


def test_a_scorer_pickles_as_a_path_and_options(path: Path, songs: Any) -> None:
    scorer = Scorer(path, names=["songs"], errors="null", reasons="why", output={"songs": "v"}, row_id="id")
    batch = pa.table({"id": [1, 2], "songs": [[1, 2], [99]]})
    made = scorer(batch)
    opened_before = len(opened._opened)
    cloudpickle = pytest.importorskip("cloudpickle")
    for twin in (
        pickle.loads(pickle.dumps(scorer)),
        cloudpickle.loads(cloudpickle.dumps(scorer)),
        copy.copy(scorer),
        copy.deepcopy(scorer),
    ):
        assert twin.null_rows == 0
        assert twin(batch).equals(made)
        assert twin.null_rows == 1
        assert repr(twin) == repr(scorer)
        assert twin.collection is scorer.collection  # opened once
    assert len(opened._opened) == opened_before
    assert len(pickle.dumps(scorer)) < 2000


def test_a_file_that_was_replaced_since_is_refused_by_those_made_before(tmp_path: Path, songs: Any) -> None:
    path = tmp_path / "tables.safetensors"
    batch = pa.table({"songs": [[1, 2]]})
    qembag.save_tables(path, {"songs": songs})
    scorer = Scorer(path)
    made, pickled = scorer(batch), pickle.dumps(scorer)
    os.utime(path, ns=(1, 1))  # of a copy, as another host has it
    assert pickle.loads(pickled)(batch).equals(made)
    qembag.save_tables(path, {"songs": songs.prune(range(10)).to_layout(scale_dtype="float32")})
    with pytest.raises(
        ValueError, match=r"tables.safetensors must be the file that this Scorer was made with, got anoth"
    ):
        pickle.loads(pickled)(batch)
    assert scorer(batch).equals(made)  # which has it open
    assert Scorer(path)(batch)["vector"].type == made["vector"].type
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)(batch)


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(
    tmp_path: Path, songs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tables.safetensors"
    qembag.save_tables(path, {"songs": songs})
    pickled, check_of = pickle.dumps(Scorer(path)), opened.check_of

    def replaced(name: str) -> str:
        found = check_of(name)
        qembag.save_tables(path, {"songs": songs.prune(range(10))})
        return found

    monkeypatch.setattr(opened, "check_of", replaced)
    with pytest.raises(OSError, match=r"tables.safetensors: was changed while it was opened"):
        _ = pickle.loads(pickled).collection
    with pytest.raises(OSError, match=r"tables.safetensors: was changed while it was opened"):
        Scorer(path)


def test_a_file_of_the_same_size_and_time_is_another_one(tmp_path: Path, songs: Any) -> None:
    path, batch = tmp_path / "tables.safetensors", pa.table({"songs": [[1, 2]]})
    rows = np.eye(4, dtype=np.float32)
    qembag.save_tables(path, {"songs": qembag.quantize(rows, bits=8)})
    found, made = path.stat(), Scorer(path)(batch)
    qembag.save_tables(path, {"songs": qembag.quantize(2 * rows, bits=8)})
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as archives and copies have it
    assert path.stat().st_size == found.st_size
    assert not Scorer(path)(batch).equals(made)


def test_a_process_keeps_the_last_used_of_many_files_open(tmp_path: Path, songs: Any) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(opened.MOST_OPEN + 1)]
    for path in paths:
        qembag.save_tables(path, {"songs": songs})
    scorers = [Scorer(path) for path in paths[:-1]]
    assert Scorer(paths[0]).collection is scorers[0].collection
    Scorer(paths[-1])
    assert len(opened._opened) == opened.MOST_OPEN
    assert Scorer(paths[0]).collection is scorers[0].collection
    assert Scorer(paths[1]).collection is not scorers[1].collection
    assert scorers[1](pa.table({"songs": [[1]]})).num_rows == 1


def test_a_folder_of_another_librarys_model_is_told_by_its_files(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 4)).astype(np.float32)
    save_file({"embeddings": rows}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "model2vec"}')
    scorer = Scorer(tmp_path, features={"ids": "embeddings"})
    batch = pa.table({"ids": [[1, 2]]})
    pickled = pickle.dumps(scorer)
    same_bits(vectors(pickle.loads(pickled)(batch)["vector"]), expected(qembag.FloatTable(rows), [[1, 2]]))
    save_file({"embeddings": rows + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must be the file that this Scorer was made with"):
        pickle.loads(pickled)(batch)


def test_an_index_is_told_by_the_files_that_it_names(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    rows = np.ones((8, 4), np.float32)
    save_file({"songs": rows}, tmp_path / "1.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"metadata": {}, "weight_map": {"songs": "1.safetensors"}}')
    pickled = pickle.dumps(Scorer(path))
    assert pickle.loads(pickled)(pa.table({"songs": [[1, 2]]}))["vector"].to_pylist() == [[2.0] * 4]
    save_file({"songs": rows + 1}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match="must be the file that this Scorer was made with"):
        pickle.loads(pickled)(pa.table({"songs": [[1, 2]]}))


def test_threads_share_a_scorer_and_count_all_null_rows(path: Path) -> None:
    scorer = Scorer(path, names="songs", errors="null", num_threads=1)
    batch = pa.table({"songs": [[1], [99], [2, 3], [-1]] * 10})
    made, failed = scorer(batch), []

    def work(own: Scorer) -> None:
        try:
            for _ in range(50):
                assert own(batch).equals(made)
                assert pickle.loads(pickle.dumps(own))(batch).equals(made)
        except BaseException as error:
            failed.append(error)
            raise

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(scorer,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    assert scorer.null_rows == 20 * 201


@pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_children_score_while_another_thread_of_the_parent_opens(path: Path) -> None:
    scorer = Scorer(path, names="songs")
    batch = pa.table({"songs": BAGS})
    made = scorer(batch)
    with opened._lock:  # as that thread would hold it
        child = os.fork()
        if child == 0:
            os._exit(42 if pickle.loads(pickle.dumps(scorer))(batch).equals(made) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_true_is_no_padding_index_of_a_scorer_that_was_made_with_one(path: Path) -> None:
    Scorer(path, names="songs", padding_idx=1)
    with pytest.raises(TypeError, match="padding_idx must be"):
        Scorer(path, names="songs", padding_idx=True)


# ---- Without ---------------------------------------------------------------------------------------------------------------


def without(*packages: str) -> str:
    return "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in packages)


@pytest.mark.parametrize("package", ["pyarrow", "nanoarrow"])
def test_a_package_that_is_missing_is_one_clear_line(package: str) -> None:
    code = without(package) + textwrap.dedent("""
        try:
            import qembag.engines
        except ImportError as error:
            print(error, error.__suppress_context__)
        """)
    assert said(code) == "qembag.engines needs pyarrow and nanoarrow: pip install 'qembag[engines]' True"


def test_no_engine_and_no_library_of_frames_is_needed_or_imported(path: Path) -> None:
    packages = [
        "ray",
        "pyspark",
        "dask",
        "distributed",
        "polars",
        "duckdb",
        "torch",
        "starlette",
    ]  # pyarrow imports pandas
    code = f"""
    from qembag.engines import Scorer
    import pyarrow as pa
    scorer = Scorer({str(path)!r}, names="songs")
    made = scorer(pa.table({{"songs": [[1, 2], None]}}))
    print(sorted(set({packages}) & set(sys.modules)), made.num_rows)
    sys.modules["pyspark"] = None
    try:
        scorer.spark_schema(None)
    except ImportError as error:
        print(error)
    """
    shown = said("import sys\n" + textwrap.dedent(code)).splitlines()
    assert shown[0] == "[] 2"
    assert "'qembag[spark]'" in shown[1]
    assert len(shown) == 2


@pytest.mark.skipif(not engines.PAGE.exists(), reason="the documents are not beside the tests")
def test_each_engine_on_the_page_has_a_test_that_runs_it() -> None:
    text = engines.PAGE.read_text()
    titles = re.findall(r"(?m)^## (.*)$", text)
    on_engines = {title for title in titles if blocks(engines.section(text, title), "py")}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_engines_*.py"))
    assert on_engines == set(re.findall(r'engines\.run_the_page\("(.*)"\)', tests)) == {"Ray Data", "Spark", "Dask"}


def test_the_core_imports_none_of_it() -> None:
    code = (
        "import sys, qembag, qembag.cli; print([n for n in sys.modules if n.startswith(('qembag.engines', 'pyarrow'))])"
    )
    assert said(code) == "[]"
