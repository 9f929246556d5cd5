"""Columns of lists in Arrow's memory, from pyarrow, polars, pandas and nanoarrow, and columns that vectors become.

What must come out is made of `column.to_pylist()` by a plain loop, and looked up by the oracle.
"""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qembag
import reference
from qembag.interop import arrow
from support.arrays import same_bits

nanoarrow = pytest.importorskip("nanoarrow")
pa = pytest.importorskip("pyarrow")

NUM_ROWS, DIM = 50, 5
TABLE = np.random.default_rng(20261127).normal(size=(NUM_ROWS, DIM)).astype(np.float32)
# The same examples on every run: a failure is never a matter of luck.
modestly = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
INTEGERS = [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]
LISTS = [[1, 2], None, [3], [], [4, 5, 6]]


def flat(lists):
    """Indices and offsets of lists, one after the other."""
    indices, offsets = [], [0]
    for items in lists:
        indices += items or []
        offsets.append(len(indices))
    return np.array(indices, np.int64), np.array(offsets, np.int64)


def lists_of(bags):
    """What `Bags` say, as lists."""
    found = []
    for indices, offsets, weights in bags:
        assert weights is None
        if offsets is None:
            found += indices.tolist()
        else:
            found += [indices[offsets[i] : offsets[i + 1]].tolist() for i in range(len(offsets) - 1)]
    return found


def plain(column):
    return [items or [] for items in column.to_pylist()]


def same_as_oracle(column, lists, **options):
    indices, offsets = flat(lists)
    expected = reference.float_embedding_bag(TABLE, indices, offsets, include_last_offset=True, **options)
    same_bits(qembag.embedding_bag(TABLE, column, **options), expected)


# ---- Any column ------------------------------------------------------------------------------------------------------


def bitmap(valid):
    return pa.py_buffer(np.packbits(np.array(valid, bool), bitorder="little").tobytes())


def with_hidden(kind, lists, valid, elements):
    """A column whose null lists keep their elements. `elements` begin with some that no list has."""
    offset_type = np.int64 if pa.types.is_large_list(kind) else np.int32
    offsets = np.cumsum([elements.unused, *map(len, lists)]).astype(offset_type)
    buffers = [bitmap(valid), pa.py_buffer(offsets.tobytes())]
    return pa.Array.from_buffers(kind, len(lists), buffers, children=[elements.array])


class Elements:
    """Those of lists, after some that no list has, in an array that is a slice of a larger one."""

    def __init__(self, lists, kind, unused, before, encode):
        values = [99] * (before + unused) + [item for items in lists for item in items]
        array = pa.array(values, kind)
        self.array = (array.dictionary_encode() if encode else array)[before:]
        self.unused = unused


@st.composite
def columns(draw):
    """A column of any type and its lists. Null lists hide elements or not; it is sliced, encoded and cut into chunks."""
    kind = draw(st.sampled_from(INTEGERS))
    size = draw(st.none() | st.integers(0, 3))
    items = st.lists(
        st.integers(0, NUM_ROWS - 1), min_size=0 if size is None else size, max_size=5 if size is None else size
    )
    lists = draw(st.lists(items, max_size=12))
    valid = draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists)))
    before, unused = draw(st.integers(0, 9)), 0 if size is not None else draw(st.integers(0, 3))
    elements = Elements(lists, kind, unused, before, draw(st.booleans()))
    if size is None:
        make = draw(st.sampled_from([pa.list_, pa.large_list]))
        column = with_hidden(make(elements.array.type), lists, valid, elements)
    else:
        kind = pa.list_(elements.array.type, size)
        column = pa.Array.from_buffers(kind, len(lists), [bitmap(valid)], children=[elements.array])
    if lists and draw(st.booleans()):
        codes = draw(st.lists(st.none() | st.integers(0, len(lists) - 1), max_size=12))
        column = pa.DictionaryArray.from_arrays(
            pa.array(codes, draw(st.sampled_from([pa.int8(), pa.uint64()]))), column
        )
    cuts = sorted(draw(st.lists(st.integers(0, len(column)), min_size=2, max_size=4)))
    parts = [column[start:stop] for start, stop in itertools.pairwise(cuts)]
    return pa.chunked_array(parts) if len(parts) > 1 or draw(st.booleans()) else parts[0]


@modestly
@given(columns(), st.sampled_from(["sum", "mean", "max"]))
def test_a_column_gives_the_bits_of_its_lists(column, mode):
    lists = plain(column)
    assert lists_of(arrow.bags_of(column, "indices")) == lists
    same_as_oracle(column, lists, mode=mode)


@modestly
@given(st.lists(columns(), min_size=1, max_size=3), st.data())
def test_a_struct_gives_the_lists_of_its_columns(found, data):
    length = min(map(len, found))
    fields = [part.combine_chunks() if isinstance(part, pa.ChunkedArray) else part for part in found]
    fields = [part.chunk(0) if isinstance(part, pa.ChunkedArray) else part for part in fields]
    fields = [part[len(part) - length :] for part in fields]
    names = [f"f{number}" for number in range(len(fields))]
    nulls = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    struct = pa.StructArray.from_arrays(fields, names, mask=pa.array(nulls, pa.bool_()))
    start = data.draw(st.integers(0, length))
    struct = struct[start : data.draw(st.integers(start, length))]
    expected = {name: [(row or {}).get(name) or [] for row in struct.to_pylist()] for name in names}
    assert {name: lists_of(bags) for name, bags in arrow.columns_of(struct, "indices").items()} == expected


# ---- No copy ---------------------------------------------------------------------------------------------------------


def whole(kind):
    return pa.array(LISTS, kind)


@pytest.mark.parametrize("integer", [pa.int32(), pa.int64(), pa.uint8(), pa.uint64()], ids=str)
@pytest.mark.parametrize(("make", "width"), [(pa.list_, 4), (pa.large_list, 8)], ids=["List", "LargeList"])
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 5), (2, 4), (3, 3)])
def test_lists_are_used_in_place(make, width, integer, start, stop):
    column = whole(make(integer))
    (bags,) = arrow.bags_of(column[start:stop], "indices")
    assert bags.indices.ctypes.data == column.values.buffers()[1].address
    if start < stop:
        assert bags.offsets.ctypes.data == column.buffers()[1].address + start * width
    assert bags.indices.dtype == integer.to_pandas_dtype()
    assert bags.offsets.dtype == f"i{width}"
    assert not bags.indices.flags.writeable


def test_fixed_lists_are_rows_in_place():
    column = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2))
    (bags,) = arrow.bags_of(column[1:], "indices")
    assert bags.offsets is None
    assert bags.indices.tolist() == [[3, 4], [5, 6]]
    assert bags.indices.ctypes.data == column.values.buffers()[1].address + 16


def test_null_lists_that_hide_nothing_are_used_in_place():
    column = whole(pa.list_(pa.int64()))
    assert column.null_count == 1
    (bags,) = arrow.bags_of(column, "indices")
    assert bags.indices.ctypes.data == column.values.buffers()[1].address
    assert bags.offsets.ctypes.data == column.buffers()[1].address


def test_chunks_and_tables_are_used_in_place():
    parts = [whole(pa.list_(pa.int32())) for _ in range(3)]
    column = pa.chunked_array(parts)
    for found in (arrow.bags_of(column, "x"), arrow.columns_of(pa.table({"a": column}), "x")["a"]):
        assert [bags.indices.ctypes.data for bags in found] == [part.values.buffers()[1].address for part in parts]


def numbered():
    return pa.array([list(range(1000))] * 100)


@pytest.mark.parametrize(
    "make",
    [
        numbered,
        lambda: numbered()[10:],
        lambda: pa.chunked_array([numbered()]),
        lambda: nanoarrow.Array(numbered()),
        lambda: pa.table({"a": numbered()}),
    ],
)
@pytest.mark.parametrize("kept", ["indices", "offsets"])
def test_each_view_keeps_the_column_alive_and_no_longer(make, kept):
    gc.collect()
    before = pa.total_allocated_bytes()
    column = make()
    size = pa.total_allocated_bytes()
    found = arrow.columns_of(column, "x")["a"] if isinstance(column, pa.Table) else arrow.bags_of(column, "x")
    view = getattr(found[0], kept)
    del column, found
    gc.collect()
    # The whole column, and some structs of pyarrow's.
    assert before < size <= pa.total_allocated_bytes() < size + 10_000
    assert view[-1] == (999 if kept == "indices" else 100_000)
    del view
    gc.collect()
    assert pa.total_allocated_bytes() == before


# ---- Other libraries -------------------------------------------------------------------------------------------------


def test_polars_columns_are_looked_up():
    pl = pytest.importorskip("polars")
    series = pl.Series("a", LISTS)
    same_as_oracle(series, LISTS)
    same_as_oracle(series[1:4], LISTS[1:4])
    same_as_oracle(pl.concat([series, series], rechunk=False), LISTS * 2)
    same_as_oracle(pl.Series([[1, 2], None, [3, 4]], dtype=pl.Array(pl.Int32, 2)), [[1, 2], None, [3, 4]])
    frame = pl.DataFrame({"a": series, "text": ["x"] * 5})
    assert lists_of(arrow.columns_of(frame, "indices", ["a", "b"])["a"]) == [items or [] for items in LISTS]


def test_polars_columns_are_used_in_place():
    pl = pytest.importorskip("polars")
    column = pa.array([[1, 2], [3], [4, 5, 6]], pa.large_list(pa.int64()))
    series = pl.Series("a", column)
    (bags,) = arrow.bags_of(series, "indices")
    assert bags.indices.ctypes.data == series.to_arrow().values.buffers()[1].address
    assert bags.offsets.ctypes.data == series.to_arrow().buffers()[1].address
    assert arrow.bags_of(series, "indices")[0].indices.ctypes.data == bags.indices.ctypes.data


def test_pandas_columns_are_looked_up_and_used_in_place():
    pd = pytest.importorskip("pandas")
    column = whole(pa.list_(pa.int64()))
    series = pd.Series(column, dtype=pd.ArrowDtype(column.type))
    same_as_oracle(series, LISTS)
    same_as_oracle(series[1:4], LISTS[1:4])
    (bags,) = arrow.bags_of(series, "indices")
    assert bags.indices.ctypes.data == column.values.buffers()[1].address
    frame = pd.DataFrame({"a": series, "text": ["x"] * 5}).set_index("text")
    (bags,) = arrow.columns_of(frame, "indices", ["a"])["a"]
    assert bags.indices.ctypes.data == column.values.buffers()[1].address


def test_frames_of_numbers_are_rows_as_numpy_reads_them():
    expected = qembag.embedding_bag(TABLE, np.array([[1, 2], [3, 4]]))
    for name in ("polars", "pandas"):
        frame = pytest.importorskip(name).DataFrame({"a": [1, 3], "b": [2, 4]})
        same_bits(qembag.embedding_bag(TABLE, frame), expected)
        with pytest.raises(ValueError, match=r"^offsets or lengths must be given"):
            qembag.embedding_bag(TABLE, frame["a"])
    same_bits(qembag.embedding_bag(TABLE, pa.table({"a": [1, 3], "b": [2, 4]})), expected)


def test_duckdbs_results_are_columns():
    duckdb = pytest.importorskip("duckdb")
    result = duckdb.sql("select [1, 2] as a, 'x' as b union all select null, 'y' union all select [3], 'z'")
    assert sorted(lists_of(arrow.columns_of(result, "indices", {"a"})["a"])) == [[], [1, 2], [3]]


def test_extension_types_are_what_they_store():
    kind = pa.fixed_shape_tensor(pa.int64(), (2,))
    storage = pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
    same_as_oracle(pa.ExtensionArray.from_storage(kind, storage), [[1, 2], [3, 4]])


# ---- Collections -----------------------------------------------------------------------------------------------------


def test_a_table_is_a_collections_batch():
    collection = qembag.EmbeddingBagCollection({"a": TABLE, "b": TABLE[::2].copy()}, mode={"b": "mean"})
    batch = pa.table({"user": ["x"] * 5, "b": pa.chunked_array([[[1]], [[2, 3], [], None, [4]]]), "a": LISTS})
    expected = np.hstack(
        [
            qembag.embedding_bag(TABLE, batch["a"]),
            qembag.embedding_bag(TABLE[::2].copy(), batch["b"], mode="mean"),
        ]
    )
    same_bits(collection(batch), expected)
    same_bits(collection({"a": batch["a"], "b": batch["b"]}), expected)
    for part in batch.to_batches():
        assert len(collection(part)) == len(part)
    same_bits(collection(pa.RecordBatchReader.from_batches(batch.schema, batch.to_batches())), expected)
    same_bits(collection(pytest.importorskip("polars").DataFrame(batch)), expected)
    pd = pytest.importorskip("pandas")
    same_bits(collection(batch.to_pandas(types_mapper=pd.ArrowDtype)), expected)
    with pytest.raises(ValueError, match=r"^indices must hold each feature, got none for 'b'$"):
        collection(batch.select(["a"]))
    with pytest.raises(ValueError, match=r"^indices\['b'\]\[1\]\[0\] is null: must be an integer$"):
        collection(pa.table({"a": [[1], [2]], "b": [[1], [None]]}))
    with pytest.raises(IndexError, match=r"^indices\['b'\]\[1\]\[0\] is 25: out of range for a table of 25 rows"):
        collection(pa.table({"a": [[1], [2]], "b": [[1], [25]]}))


def test_a_column_of_integers_with_offsets_is_an_array():
    collection = qembag.EmbeddingBagCollection({"a": TABLE, "b": TABLE})
    expected = collection(np.array([1, 2, 3, 4]), np.array([0, 1, 3, 4, 4]))
    for column in (pa.array([1, 2, 3, 4]), pa.chunked_array([[1], [2, 3, 4]])):
        same_bits(collection(column, pa.array([0, 1, 3, 4, 4])), expected)
        same_bits(collection(column, lengths=pa.array([1, 2, 1, 0])), expected)
        same_bits(qembag.embedding_bag(TABLE, column, [0, 1]), qembag.embedding_bag(TABLE, [1, 2, 3, 4], [0, 1]))
    for name in ("polars", "pandas"):
        series = pytest.importorskip(name).Series([1, 2, 3, 4])
        same_bits(collection(series, [0, 1, 3, 4, 4]), expected)


def test_an_output_on_the_columns_memory_is_refused():
    memory = np.arange(100, dtype=np.int32) % NUM_ROWS
    column = pa.FixedSizeListArray.from_arrays(pa.array(memory), 5)
    out = memory.view(np.float32).reshape(20, DIM)
    with pytest.raises(ValueError, match=r"^out must share no memory with indices"):
        qembag.embedding_bag(TABLE, column, out=out)


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
def test_a_null_element_is_refused_with_its_place_in_the_column(make):
    good, bad = [[1, 2], None, [3, 4]], [None, [5, 6], [7, None]]
    column = pa.chunked_array([pa.array(good, make(pa.int64())), pa.array(bad, make(pa.int64()))])
    with pytest.raises(ValueError, match=r"^indices\[5\]\[1\] is null: must be an integer$"):
        qembag.embedding_bag(TABLE, column)
    with pytest.raises(ValueError, match=r"^indices\[4\]\[1\] is null"):
        qembag.embedding_bag(TABLE, column[1:])
    with pytest.raises(ValueError, match=r"^indices\[0\]\[1\] is null"):
        qembag.embedding_bag(TABLE, column[5:])
    with pytest.raises(ValueError, match=r"^indices\[1\]\[0\] is null"):
        qembag.embedding_bag(TABLE, pa.array([[1, 2], [None, 3]], make(pa.int64())))
    same_as_oracle(column[:5], good + bad[:2])
    with pytest.raises(ValueError, match=r"^indices\['a'\]\[5\]\[1\] is null"):
        arrow.columns_of(pa.table({"a": column}), "indices")


def test_a_null_of_a_dictionary_is_refused_where_it_is_used():
    values = pa.array([5, None, 7])
    for codes, place in (([0, 2, 1], r"\[1\]\[0\]"), ([0, None, 2], r"\[0\]\[1\]")):
        column = pa.ListArray.from_arrays([0, 2, 3], pa.DictionaryArray.from_arrays(pa.array(codes), values))
        with pytest.raises(ValueError, match=rf"^indices{place} is null: must be an integer$"):
            qembag.embedding_bag(TABLE, column)
    column = pa.ListArray.from_arrays([0, 2, 3], pa.DictionaryArray.from_arrays(pa.array([0, 2, 0]), values))
    same_as_oracle(column, [[5, 7], [5]])


def test_null_elements_that_no_list_has_are_not_looked_at():
    column = pa.ListArray.from_arrays([1, 2, 3], pa.array([None, 1, 2, None]))
    same_as_oracle(column, [[1], [2]])
    same_as_oracle(pa.array([[None], [1], [2], [None]])[1:3], [[1], [2]])


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (pa.list_(pa.string()), "string"),
        (pa.list_(pa.float64()), "double"),
        (pa.list_(pa.bool_()), "bool"),
        (pa.list_(pa.list_(pa.int64())), "list"),
        (pa.large_list(pa.timestamp("us")), "timestamp"),
        (pa.list_(pa.struct({"a": pa.int64()})), "struct"),
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), "string"),
        (pa.list_(pa.decimal128(5), 2), "decimal128"),
    ],
    ids=str,
)
def test_lists_of_anything_but_integers_are_refused(kind, named):
    for column in (pa.array([], kind), pa.chunked_array([], kind), pa.array([None], kind)):
        with pytest.raises(TypeError, match=rf"^indices must be a column of lists of integers, got lists of {named}$"):
            qembag.embedding_bag(TABLE, column)
        with pytest.raises(TypeError, match=rf"^x\['a'\] must be a column of lists of integers, got lists of {named}$"):
            arrow.columns_of(pa.table({"a": column}), "x")
        assert arrow.columns_of(pa.table({"a": column}), "x", []) == {}


def test_list_views_are_refused():
    column = pa.array([[1], [2]], pa.list_view(pa.int64()))
    with pytest.raises(
        TypeError, match=r"^indices must be a column of List, LargeList or FixedSizeList, got list views"
    ):
        qembag.embedding_bag(TABLE, column)


def test_other_columns_are_numpys():
    for column in (pa.array([1, 2]), pa.array(["a"]), pa.chunked_array([[1], [2]]), pa.array([{"a": [1]}])):
        assert arrow.bags_of(column, "indices") is None
    with pytest.raises(ValueError, match=r"^offsets or lengths must be given"):
        qembag.embedding_bag(TABLE, pa.array([1, 2]))
    same_bits(qembag.embedding_bag(TABLE, pa.array([1, 2]), pa.array([0, 1])), TABLE[[1, 2]])


def test_what_is_no_table_of_lists_is_refused():
    for column, named in ((pa.array([1]), "int64"), (pa.array([[1]]), "list"), (pa.array(["a"]), "string")):
        with pytest.raises(TypeError, match=rf"^x must be a table or a column of structs, got a column of {named}$"):
            arrow.columns_of(column, "x")
    with pytest.raises(TypeError, match=r"^x\['b'\] must be a column of lists, got one of int64$"):
        arrow.columns_of(pa.table({"a": [[1]], "b": [1]}), "x")
    twice = pa.Table.from_arrays([pa.array([[1]])] * 2, ["a", "a"])
    with pytest.raises(ValueError, match=r"^x must have one column 'a', got two$"):
        arrow.columns_of(twice, "x")
    assert arrow.columns_of(twice, "x", ["b"]) == {}


def test_a_stream_that_fails_half_way_is_told():
    def batches():
        yield pa.record_batch({"a": [[1]]})
        raise OSError("the disk is gone")

    reader = pa.RecordBatchReader.from_batches(pa.schema({"a": pa.list_(pa.int64())}), batches())
    with pytest.raises(ValueError, match=r"^x must be readable through Arrow's C interface, .*the disk is gone"):
        arrow.columns_of(reader, "x")
    # It is spent, and an empty stream has no chunks.
    reader = pa.RecordBatchReader.from_batches(pa.schema({"a": pa.list_(pa.int64())}), [])
    assert arrow.columns_of(reader, "x") == {"a": []}


def test_a_column_without_chunks_is_no_bags():
    column = pa.chunked_array([], pa.list_(pa.int64()))
    assert arrow.bags_of(column, "indices") == []
    assert qembag.embedding_bag(TABLE, column).shape == (0, DIM)
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int8()), pa.list_(pa.int64(), 3), pa.list_(pa.int64(), 0)):
        assert qembag.embedding_bag(TABLE, pa.array([], kind)).shape == (0, DIM)
        assert not qembag.embedding_bag(TABLE, pa.array([None, None], kind)).any()


def test_rows_out_of_range_are_refused():
    with pytest.raises(IndexError, match="out of range for a table of 50 rows"):
        qembag.embedding_bag(TABLE, pa.array([[1], [2, 50]]))
    with pytest.raises(IndexError, match="is 18446744073709551615"):
        qembag.embedding_bag(TABLE, pa.array([[2**64 - 1]], pa.list_(pa.uint64())))


# ---- Vectors as a column ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("list_size", ["fixed", "variable"])
def test_vectors_become_a_column_without_a_copy(dtype, list_size):
    vectors = TABLE.astype(dtype)
    column = pa.array(arrow.to_arrow(vectors, list_size))
    column.validate(full=True)
    value = pa.float32() if dtype == np.float32 else pa.float16()
    assert column.type == (pa.list_(value, DIM) if list_size == "fixed" else pa.list_(value))
    assert column.values.buffers()[1].address == vectors.ctypes.data
    assert np.array_equal(column.to_pylist(), vectors)
    assert pa.array(arrow.to_arrow(vectors[:0], list_size)).to_pylist() == []
    assert pa.array(arrow.to_arrow(vectors[:, :0], list_size)).to_pylist() == [[]] * NUM_ROWS


@pytest.mark.parametrize("list_size", ["fixed", "variable"])
def test_polars_and_pandas_take_vectors(list_size):
    made = arrow.to_arrow(TABLE, list_size)
    pl = pytest.importorskip("polars")
    series = pl.Series("v", made)
    assert series.dtype == (pl.Array(pl.Float32, DIM) if list_size == "fixed" else pl.List(pl.Float32))
    assert np.array_equal(series.to_list(), TABLE)
    pd = pytest.importorskip("pandas")
    column = pa.array(made)
    assert np.array_equal(pd.Series(column, dtype=pd.ArrowDtype(column.type)).tolist(), TABLE)


def test_a_column_keeps_its_vectors_alive_and_no_longer():
    vectors = type("Vectors", (np.ndarray,), {})(TABLE.shape, np.float32)
    vectors[:] = TABLE
    alive = weakref.ref(vectors)
    column = pa.array(arrow.to_arrow(vectors))
    del vectors
    gc.collect()
    assert alive() is not None
    assert column.to_pylist()[3] == TABLE[3].tolist()
    del column
    gc.collect()
    assert alive() is None


def test_vectors_that_lie_apart_are_copied():
    for vectors in (TABLE[::2], TABLE[:, 1:3], TABLE[::-1], TABLE.astype(">f4"), np.asfortranarray(TABLE)):
        assert np.array_equal(pa.array(arrow.to_arrow(vectors)).to_pylist(), vectors)


def test_more_elements_than_int32_counts_become_a_large_list(monkeypatch):
    monkeypatch.setattr(arrow, "INT32_MAX", TABLE.size)
    assert pa.types.is_list(pa.array(arrow.to_arrow(TABLE, "variable")).type)
    monkeypatch.setattr(arrow, "INT32_MAX", TABLE.size - 1)
    column = pa.array(arrow.to_arrow(TABLE, "variable"))
    column.validate(full=True)
    assert pa.types.is_large_list(column.type)
    assert column.values.buffers()[1].address == TABLE.ctypes.data
    assert np.array_equal(column.to_pylist(), TABLE)


def test_other_vectors_are_refused():
    with pytest.raises(TypeError, match=r"^vectors must be an array of float32 or float16, got a float64 array"):
        arrow.to_arrow(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"^vectors must have 2 dimensions, got a float32 array of shape"):
        arrow.to_arrow(TABLE[0])
    for wrong in ("small", None, 3):
        with pytest.raises(ValueError, match=r"^list_size must be 'fixed' or 'variable', got "):
            arrow.to_arrow(TABLE, wrong)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match=r"^vectors must be float32 or float16, got bfloat16"):
        arrow.to_arrow(TABLE.astype(ml_dtypes.bfloat16))


def test_lists_without_any_elements_are_empty_bags_whatever_type_they_were_given():
    """Producers that infer types give them the type null: pandas, pyarrow and polars of Python's lists."""
    expected = np.zeros((2, DIM), np.float32)
    for column in (
        pa.array([[], None]),
        pa.array([None, None]),
        pa.nulls(2),
        pa.array([[], []], pa.list_(pa.null(), 0)),
    ):
        same_bits(qembag.embedding_bag(TABLE, column), expected)
    batch = pa.table({"a": [[1], [2]], "b": [[], None], "c": [None, None]})
    collection = qembag.EmbeddingBagCollection([TABLE] * 3, {"a": "0", "b": "1", "c": "2"})
    same_bits(collection(batch)[:, DIM:], np.zeros((2, 2 * DIM), np.float32))
    with pytest.raises(ValueError, match=r"^indices\[1\]\[0\] is null: must be an integer"):
        qembag.embedding_bag(TABLE, pa.array([[], [None]]))


def test_lists_without_any_elements_are_empty_bags_in_polars_too():
    """Its arrays of the type null have a buffer, which Arrow's specification does not give them."""
    pl = pytest.importorskip("polars")
    for column in (pl.Series([[], []]), pl.Series([[], None]), pl.Series([None, None])):
        same_bits(qembag.embedding_bag(TABLE, column), np.zeros((2, DIM), np.float32))
    frame = pl.DataFrame({"a": [[1], [2]], "b": [[], None], "c": [None, None]})
    collection = qembag.EmbeddingBagCollection([TABLE] * 3, {"a": "0", "b": "1", "c": "2"})
    same_bits(collection(frame)[:, DIM:], np.zeros((2, 2 * DIM), np.float32))


def test_a_table_without_chunks_is_a_batch_of_no_bags():
    empty = pa.schema([("a", pa.list_(pa.int32()))]).empty_table()
    for batch in (empty, pa.table({"a": pa.chunked_array([], pa.list_(pa.int64()))})):
        assert qembag.EmbeddingBagCollection({"a": TABLE})(batch).shape == (0, DIM)
        assert qembag.EmbeddingCollection({"a": TABLE})(batch)["a"].shape == (0, DIM)


def test_a_column_with_offsets_is_refused():
    for name, value in ("offsets", [0, 1]), ("lengths", [1]):
        with pytest.raises(ValueError, match=f"^{name} must be None for a column or a matrix, got list"):
            qembag.embedding_bag(TABLE, pa.array([[1], [2]]), **{name: value})
