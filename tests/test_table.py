"""QuantizedTable: what it says of itself, its values, indexing as NumPy's, copies and pickles, pruning."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import numpy as np
import pytest

import qembag
import reference
from qembag import QuantizedTable
from support.layouts import LAYOUTS, packed_rows

MAPPING = np.array([2, -1, 0, 3, -1, 1, 1], dtype=np.int32)
NUM_ROWS = 4


def codes_bytes(dim: int, bits: int) -> int:
    return -(-dim * bits // 8)


@pytest.fixture(params=[False, True], ids=["whole", "pruned"])
def pruned(request):
    return request.param


@pytest.fixture
def rows(rng, packed_rows, bits):
    return packed_rows(rng, NUM_ROWS, 13, bits)


@pytest.fixture
def table(rows, bits, pruned):
    """Four rows of an odd dim; pruned, seven logical ones."""
    return QuantizedTable(rows, bits, dim=13, compressed_indices_mapping=MAPPING if pruned else None)


@pytest.fixture
def values(rows, bits, pruned):
    """What the oracle says that the table holds."""
    stored = reference.dequantize(rows, bits, 13)
    return np.where(MAPPING[:, None] < 0, np.float32(0), stored[MAPPING]) if pruned else stored


# ---- What it says of itself ----------------------------------------------------------------------------------------


def test_attributes_are_as_given(table, rows, bits, pruned):
    assert table.bits == bits
    assert table.dim == 13
    assert table.num_rows == NUM_ROWS
    assert table.num_embeddings == len(table) == (7 if pruned else NUM_ROWS)
    assert table.shape == (table.num_embeddings, 13)
    assert table.row_bytes == rows.shape[1]
    assert table.nbytes == rows.nbytes + (MAPPING.nbytes if pruned else 0)
    assert np.array_equal(table.data, rows)
    if pruned:
        assert np.array_equal(table.compressed_indices_mapping, MAPPING)
        assert table.compressed_indices_mapping.dtype == np.int32
    else:
        assert table.compressed_indices_mapping is None
    for number in (table.bits, table.dim, table.num_rows, table.num_embeddings, table.row_bytes, table.nbytes):
        assert type(number) is int


def test_attributes_cannot_be_changed(table):
    for name in (
        "data",
        "bits",
        "dim",
        "num_rows",
        "num_embeddings",
        "shape",
        "row_bytes",
        "nbytes",
        "scales",
        "biases",
    ):
        with pytest.raises(AttributeError):
            setattr(table, name, getattr(table, name))
    with pytest.raises(AttributeError):
        table.something = 1


def test_nbytes_count_the_rows_of_a_strided_table_not_its_gaps(rng, packed_rows, bits):
    wide = packed_rows(rng, 20, 12, bits)
    assert QuantizedTable(wide[::4], bits).nbytes == 5 * wide.shape[1]


def test_repr_tells_stored_rows_only_where_pruned(bits):
    table = qembag.quantize(np.ones((3, 5), np.float32), bits)
    row_bytes = LAYOUTS[bits].row_bytes(5)
    assert repr(table) == f"QuantizedTable(num_embeddings=3, dim=5, bits={bits}, nbytes={3 * row_bytes})"
    nbytes = row_bytes + 12
    expected = f"QuantizedTable(num_embeddings=3, num_rows=1, dim=5, bits={bits}, nbytes={nbytes})"
    assert repr(table.prune([1])) == expected


def test_codes_scales_and_biases_are_the_stored_rows_own(table, rows, bits, same_bits):
    codes, scales, biases = reference.unpack(rows, bits, 13)
    same_bits(table.codes(), codes.astype(np.uint8))
    same_bits(table.scales, scales)
    same_bits(table.biases, biases)


def test_codes_scales_and_biases_are_copies(table, rows):
    before = rows.copy()
    for part in (table.codes(), table.scales, table.biases):
        assert not np.shares_memory(part, table.data)
        assert part.flags.writeable
        part[...] = 1
    assert np.array_equal(rows, before)


def test_the_tail_is_little_endian(same_bits):
    rows = np.frombuffer(bytes([7]) + bytes.fromhex("0000803f 000000c0"), dtype=np.uint8)[None]
    table = QuantizedTable(rows, 8)
    assert (table.scales[0], table.biases[0]) == (1, -2)
    same_bits(table[0], np.array([5], np.float32))
    rows = np.frombuffer(bytes([0x21]) + bytes.fromhex("003c 00c0"), dtype=np.uint8)[None]
    same_bits(QuantizedTable(rows, 4)[0], np.array([-1, 0], np.float32))
    rows = np.frombuffer(bytes([0b11100100]) + bytes.fromhex("003c 00c0"), dtype=np.uint8)[None]
    same_bits(QuantizedTable(rows, 2)[0], np.array([-2, -1, 0, 1], np.float32))


# ---- Wrapping ------------------------------------------------------------------------------------------------------


def test_rows_are_wrapped_not_copied(rows, bits):
    table = QuantizedTable(rows, bits)
    assert np.shares_memory(table.data, rows)
    assert type(table.data) is np.ndarray
    before = table[0]
    rows[0, 0] ^= 1
    assert not np.array_equal(table[0], before)


def test_a_table_keeps_its_shape_when_the_callers_array_is_reshaped(rows, bits):
    table = QuantizedTable(rows, bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        rows.shape = (rows.size,)
    assert table.data.ndim == 2
    assert table.dequantize().shape == table.shape


def test_read_only_rows_are_wrapped(rows, bits):
    rows.flags.writeable = False
    table = QuantizedTable(rows, bits)
    assert np.shares_memory(table.data, rows)
    assert not table.data.flags.writeable
    assert QuantizedTable(np.frombuffer(rows.tobytes(), np.uint8).reshape(rows.shape), bits).num_rows == NUM_ROWS


def test_a_mapped_file_stays_mapped(rows, bits, tmp_path, same_bits):
    (tmp_path / "rows").write_bytes(rows.tobytes())
    mapped = np.memmap(tmp_path / "rows", dtype=np.uint8, mode="r", shape=rows.shape)
    table = QuantizedTable(mapped, bits)
    assert np.shares_memory(table.data, mapped)
    same_bits(table.dequantize(), reference.dequantize(rows, bits, table.dim))


def test_a_table_keeps_its_memory_alive(rng, packed_rows, bits, same_bits):
    rows = packed_rows(rng, 500, 64, bits)
    expected = reference.dequantize(rows, bits, 64)
    table = QuantizedTable(rows.copy(), bits)
    gc.collect()
    same_bits(table.dequantize(), expected)


def test_tables_can_be_referred_to_weakly(table):
    assert weakref.ref(table)() is table


@pytest.mark.parametrize(("bits", "row_bytes", "most"), [(8, 13, 5), (4, 7, 6), (2, 6, 8)])
def test_dim_is_any_that_a_row_has_room_for(bits, row_bytes, most):
    data = np.zeros((2, row_bytes), np.uint8)
    assert QuantizedTable(data, bits).dim == most
    for dim in range(-1, 12):
        if 1 <= dim <= most:
            assert QuantizedTable(data, bits, dim=dim).dim == dim
            assert QuantizedTable(data, bits, dim=np.int64(dim)).codes().shape == (2, dim)
        else:
            message = rf"^dim must be from 1 to {most} for rows of {row_bytes} bytes at {bits} bits, got {dim}$"
            with pytest.raises(ValueError, match=message):
                QuantizedTable(data, bits, dim=dim)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (np.zeros((2, 20), np.int8), TypeError, "^data must be an array of uint8, got an int8 array of shape"),
        (np.zeros((2, 20)), TypeError, "^data must be an array of uint8"),
        (np.zeros((2, 20), bool), TypeError, "^data must be an array of uint8"),
        ([[1, 2]], TypeError, "^data must be an array of uint8"),
        (None, TypeError, "^data must be an array, got None$"),
        (b"bytes", TypeError, "^data must be an array of uint8"),
        (np.zeros(20, np.uint8), ValueError, "^data must have 2 dimensions"),
        (np.zeros((2, 3, 20), np.uint8), ValueError, "^data must have 2 dimensions"),
        (np.zeros((2, 8), np.uint8), ValueError, "^data must have rows of at least 9 bytes at 8 bits"),
        (np.zeros((2, 0), np.uint8), ValueError, "^data must have rows of at least 9 bytes at 8 bits"),
        (np.zeros((2, 40), np.uint8)[:, ::2], ValueError, "^data must have the bytes of a row side by side"),
        (np.zeros((2, 20), np.uint8)[:, ::-1], ValueError, "^data must have the bytes of a row side by side"),
        (np.zeros((2, 20), np.uint8, order="F"), ValueError, "^data must have the bytes of a row side by side"),
    ],
)
def test_data_that_are_not_packed_rows_are_an_error(data, error, message):
    with pytest.raises(error, match=message):
        QuantizedTable(data, 8)


@pytest.mark.parametrize("bits", [4, 2])
def test_rows_of_a_tail_alone_are_an_error(bits):
    with pytest.raises(ValueError, match=rf"^data must have rows of at least 5 bytes at {bits} bits"):
        QuantizedTable(np.zeros((2, 4), np.uint8), bits)
    assert QuantizedTable(np.zeros((2, 5), np.uint8), bits).dim == 8 // bits


def test_options_of_a_wrong_type_are_an_error():
    data = np.zeros((2, 12), np.uint8)
    for bits, error in [(3, ValueError), (16, ValueError), (8.0, TypeError), (None, TypeError), (True, TypeError)]:
        with pytest.raises(error, match=r"^bits must be "):
            QuantizedTable(data, bits)
    for dim in (4.0, "4", True):
        with pytest.raises(TypeError, match=r"^dim must be a whole number"):
            QuantizedTable(data, 8, dim=dim)
    with pytest.raises(TypeError):
        QuantizedTable(data, 8, 4)


# ---- Mappings ---------------------------------------------------------------------------------------------------------


def test_a_mapping_of_exactly_zero_means_that_nothing_is_pruned(rows, bits):
    for mapping in ([0], np.zeros(1, np.int32), np.zeros(1, np.dtype(np.int32).newbyteorder())):
        table = QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
        assert table.compressed_indices_mapping is None
        assert len(table) == NUM_ROWS
    assert len(QuantizedTable(rows, bits, compressed_indices_mapping=[1])) == 1
    assert len(QuantizedTable(rows, bits, compressed_indices_mapping=[-1])) == 1
    assert len(QuantizedTable(rows, bits, compressed_indices_mapping=[0, 0])) == 2
    assert len(QuantizedTable(rows, bits, compressed_indices_mapping=[])) == 0


def test_a_plain_mapping_is_not_copied_and_others_are_converted(rows, bits, same_bits):
    mapping = MAPPING.copy()
    assert np.shares_memory(
        QuantizedTable(rows, bits, compressed_indices_mapping=mapping).compressed_indices_mapping, mapping
    )
    strided = np.repeat(mapping, 2)[::2]
    swapped = mapping.astype(mapping.dtype.newbyteorder())
    expected = QuantizedTable(rows, bits, compressed_indices_mapping=mapping).dequantize()
    for other in (strided, swapped, mapping.tolist(), tuple(mapping.tolist()), mapping[::-1].copy()[::-1]):
        table = QuantizedTable(rows, bits, compressed_indices_mapping=other)
        same_bits(table.compressed_indices_mapping, mapping)
        same_bits(table.dequantize(), expected)


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        (np.array([0, 4], np.int32), IndexError, r"^compressed_indices_mapping\[1\] is 4: .* in a table of 4 rows$"),
        (np.array([0, 9, -2], np.int32), IndexError, r"^compressed_indices_mapping\[1\] is 9: "),
        (
            np.array([0, -2, 9], np.int32),
            IndexError,
            r"^compressed_indices_mapping\[1\] is -2: must be -1 or the number",
        ),
        ([0, 1, 2**40], IndexError, r"^compressed_indices_mapping\[2\] is 1099511627776: "),
        (
            np.array([0, 1], np.int64),
            TypeError,
            "^compressed_indices_mapping must be an array of int32, got an int64 array",
        ),
        (np.array([0, 1], np.uint32), TypeError, "^compressed_indices_mapping must be an array of int32"),
        (np.array([0.0, 1]), TypeError, "^compressed_indices_mapping must be an array of int32"),
        ([True, False], TypeError, "^compressed_indices_mapping must be an array of int32"),
        (np.zeros((1, 2), np.int32), ValueError, "^compressed_indices_mapping must have 1 dimension"),
        (np.int32(1), ValueError, "^compressed_indices_mapping must have 1 dimension"),
    ],
)
def test_a_bad_mapping_is_an_error(rows, bits, mapping, error, message):
    with pytest.raises(error, match=message):
        QuantizedTable(rows, bits, compressed_indices_mapping=mapping)


# ---- Values ------------------------------------------------------------------------------------------------------------


def test_dequantize_gives_the_oracles_values(level, table, values, same_bits):
    same_bits(table.dequantize(), values)
    same_bits(np.asarray(table), values)
    numbers = np.array([[0, 2], [3, 1]], dtype=np.int32)
    same_bits(table.dequantize(numbers), values[numbers])
    same_bits(table.dequantize([]), values[:0])
    same_bits(table.dequantize(2), values[2])


def test_dequantize_writes_into_out(level, table, values, same_bits):
    out = np.full(table.shape, 77, np.float32)
    assert table.dequantize(out=out) is out
    same_bits(out, values)
    wide = np.full((3, 20), 77, np.float32)
    out = wide[:, 2:15]
    assert table.dequantize([3, 0, 1], out=out) is out
    same_bits(out.copy(), values[[3, 0, 1]])
    out[...] = 77
    assert (wide == 77).all()
    for bad in (np.zeros(table.shape), np.zeros((1, 13), np.float32), np.zeros(table.shape, np.float16)):
        with pytest.raises(ValueError, match=r"^out must be a float32 array of shape"):
            table.dequantize(out=bad)


def test_dequantize_wants_rows_from_0(table):
    """Only `table[i]` follows NumPy."""
    for number in (-1, len(table)):
        with pytest.raises(IndexError, match=rf"^rows\[1\] is {number}: out of range for a "):
            table.dequantize([0, number])
    with pytest.raises(TypeError, match=r"^rows must be an array of integers"):
        table.dequantize([0.0])
    with pytest.raises(TypeError, match=r"^rows must be an array of integers"):
        table.dequantize(np.ones(len(table), bool))


def test_asarray_takes_a_dtype_and_copies(table, values, same_bits):
    same_bits(np.asarray(table, dtype=np.float64), values.astype(np.float64))
    same_bits(np.asarray(table, np.float16), values.astype(np.float16))
    same_bits(np.array(table, copy=True), values)
    assert np.asarray(table).flags.writeable
    assert np.asarray(table) is not np.asarray(table)
    same_bits(np.stack([table, table]), np.stack([values, values]))
    with pytest.raises(ValueError, match="without a copy"):
        table.__array__(copy=False)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(ValueError, match="copy"):
            np.array(table, copy=False)


# ---- Indexing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        0,
        3,
        -1,
        -4,
        np.int32(2),
        np.int64(-2),
        np.uint8(1),
        slice(None),
        slice(1, 3),
        slice(None, None, -1),
        slice(-2, None),
        slice(3, 1),
        slice(0, 100, 2),
        slice(None, None, 2**70),
        slice(None, None, -(2**70)),
        slice(2**70, -(2**70), -(2**63)),
        [0, 2],
        [-1, 0, -1],
        [],
        np.array([1, 1, 0], np.int32),
        np.array([[0, 1], [-1, -2]]),
        np.zeros((0, 2), np.int64),
        np.array(2),
        ...,
        None,
    ],
    ids=repr,
)
def test_indexing_follows_numpy(table, values, item, same_bits):
    same_bits(table[item], values[item])
    assert table[item].dtype == np.float32


def test_a_mask_chooses_logical_rows(table, values, rng, same_bits):
    for mask in (rng.random(len(table)) < 0.5, np.zeros(len(table), bool), np.ones(len(table), bool)):
        same_bits(table[mask], values[mask])
        same_bits(table[mask.tolist()], values[mask])


def test_indexing_out_of_range_is_an_index_error(table):
    count = len(table)
    for item in (count, -count - 1, 10**30, [0, count], np.array([-count - 1]), np.ones(count + 1, bool)):
        with pytest.raises(IndexError):
            table[item]


@pytest.mark.parametrize("item", [1.0, "a", [0.5], np.array([1.0])], ids=repr)
def test_indexing_by_what_is_no_number_is_an_index_error(table, item):
    with pytest.raises(IndexError):
        table[item]


@pytest.mark.parametrize("item", [(0, 1), (0,), (), (slice(None), 0)], ids=repr)
def test_a_table_is_indexed_along_its_rows_only(table, item):
    with pytest.raises(IndexError, match=rf"along its rows only, got {len(item)} indices"):
        table[item]


def test_rows_come_one_by_one(table, values, same_bits):
    assert len(list(table)) == len(table)
    same_bits(np.stack(list(table)), values)
    assert all(row.shape == (13,) for row in table)
    same_bits(np.stack(list(reversed(table))), values[::-1])


def test_a_row_is_a_copy(table, values, same_bits):
    table[2][...] = 5
    table[:][...] = 5
    same_bits(table.dequantize(), values)


# ---- Copies -------------------------------------------------------------------------------------------------------------


def assert_same_table(a, b):
    assert type(a) is type(b)
    assert (a.bits, a.dim, a.shape, a.num_rows) == (b.bits, b.dim, b.shape, b.num_rows)
    assert np.array_equal(a.data, b.data)
    assert (a.compressed_indices_mapping is None) == (b.compressed_indices_mapping is None)
    if a.compressed_indices_mapping is not None:
        assert np.array_equal(a.compressed_indices_mapping, b.compressed_indices_mapping)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_the_same_table(table, protocol):
    again = pickle.loads(pickle.dumps(table, protocol))
    assert_same_table(again, table)
    assert not np.shares_memory(again.data, table.data)


def test_a_pickle_holds_the_rows_not_the_array_around_them(rng, packed_rows, bits):
    rows = packed_rows(rng, 10_000, 12, bits)
    small = QuantizedTable(rows[::1000], bits)
    assert len(pickle.dumps(small)) < 2000
    assert_same_table(pickle.loads(pickle.dumps(small)), small)


def test_rows_can_be_pickled_out_of_band(table):
    buffers = []
    head = pickle.dumps(table, 5, buffer_callback=buffers.append)
    assert buffers
    assert_same_table(pickle.loads(head, buffers=buffers), table)


def test_a_pickle_of_a_subclass_is_of_the_subclass(table):
    own = Own(table.data, table.bits, dim=13, compressed_indices_mapping=table.compressed_indices_mapping)
    assert_same_table(pickle.loads(pickle.dumps(own)), own)
    assert repr(own).startswith("Own(")
    assert type(own.prune([0])) is Own


class Own(QuantizedTable):
    """A caller's own kind of table."""


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_another_table_of_the_same_rows(table, copied):
    table = QuantizedTable(
        table.data,
        table.bits,
        dim=table.dim,
        compressed_indices_mapping=table.compressed_indices_mapping,
        row_weights=np.arange(table.num_embeddings, dtype=np.float32),
    )
    again = copied(table)
    assert again is not table
    assert_same_table(again, table)
    for part in ("data", "compressed_indices_mapping", "row_weights"):
        one, other = getattr(again, part), getattr(table, part)
        assert (one is None) == (other is None)
        assert one is None or np.shares_memory(one, other)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_padded_rows_is_of_the_same_rows(copied):
    table = qembag.quantize(np.eye(3, 20, dtype=np.float32), row_alignment=64)
    assert np.shares_memory(copied(table).data, table.data)
    assert copied(table).layout == table.layout


def test_deep_copies_share_a_list_of_tables_as_they_did(table):
    first, second = copy.deepcopy([table, table])
    assert first is second
    assert type(copy.deepcopy(Own(table.data, table.bits, dim=table.dim))) is Own


@pytest.mark.parametrize("kind", [QuantizedTable, qembag.FloatTable])
def test_a_copy_of_a_table_that_was_never_made_is_an_error(kind):
    with pytest.raises(AttributeError, match="not initialized"):
        copy.deepcopy(kind.__new__(kind))


# ---- Pruning -------------------------------------------------------------------------------------------------------------


def kept_values(values, keep):
    result = np.zeros_like(values)
    result[keep] = values[keep]
    return result


@pytest.mark.parametrize(
    "keep", [[0, 2], [2, 0], [3, 3, 1], [], [0, 1, 2, 3], np.array([1], np.uint8), np.array([3], ">i4")]
)
def test_pruned_rows_are_zeros_and_kept_ones_stay(level, table, values, keep, same_bits):
    mask = np.zeros(len(table), bool)
    mask[np.asarray(keep, np.int64)] = True
    for given in (keep, mask, mask.tolist()):
        small = table.prune(given)
        assert small.shape == table.shape
        same_bits(small.dequantize(), kept_values(values, mask))
        indices = np.arange(len(table))[None]
        same_bits(
            qembag.embedding_bag(small, indices),
            reference.embedding_bag(small.data, table.bits, 13, indices, mapping=small.compressed_indices_mapping),
        )


def test_a_pruned_table_stores_the_kept_rows_alone(rows, bits):
    table = QuantizedTable(rows, bits)
    small = table.prune([3, 1])
    assert np.array_equal(small.data, rows[[1, 3]])
    assert small.compressed_indices_mapping.tolist() == [-1, 0, -1, 1]
    assert (small.num_rows, small.num_embeddings) == (2, 4)
    assert small.nbytes == 2 * rows.shape[1] + 16
    assert not np.shares_memory(small.data, table.data)
    assert small.dim == table.dim


def test_pruning_nothing_and_all(level, table, values, same_bits):
    same_bits(table.prune(np.ones(len(table), bool)).dequantize(), values)
    same_bits(table.prune(range(len(table))).dequantize(), values)
    for none in ([], np.zeros(len(table), bool), np.zeros(0, np.int64)):
        empty = table.prune(none)
        assert empty.num_rows == 0
        assert empty.shape == table.shape
        assert not empty.dequantize().any()
        assert not qembag.embedding_bag(empty, [list(range(len(table)))]).any()
        assert_same_table(pickle.loads(pickle.dumps(empty)), empty)


def test_pruning_twice_keeps_what_both_keep(table, values, same_bits):
    twice = table.prune([0, 1, 2]).prune([2, 3, 0])
    same_bits(twice.dequantize(), kept_values(values, [0, 2]))
    mapping = table.compressed_indices_mapping
    assert twice.num_rows == 2 if mapping is None else len({mapping[i] for i in (0, 2)} - {-1})
    assert twice.prune([1]).num_rows == 0


def test_pruning_a_table_of_one_row(bits, same_bits):
    """Its mapping, kept, is [0]: the reference's way to say that nothing is pruned, and here nothing is."""
    table = qembag.quantize(np.array([[1, 2, 3]], np.float32), bits)
    same_bits(table.prune([0]).dequantize(), table.dequantize())
    assert len(table.prune([0])) == 1
    assert not table.prune([]).dequantize().any()


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([0, 99], IndexError, r"^keep\[1\] is 99: out of range for a table of \d rows$"),
        ([-1], IndexError, r"^keep\[0\] is -1: out of range"),
        (np.array([0, 2**64 - 1], np.uint64), IndexError, r"^keep\[1\] is 18446744073709551615: out of range"),
        ([True], ValueError, r"^keep must have shape \(\d,\) as a mask, got a bool array of shape \(1,\)$"),
        (np.ones((2, 2), bool), ValueError, r"^keep must have shape \(\d,\) as a mask"),
        ([[0, 1]], ValueError, "^keep must have 1 dimension"),
        (0, ValueError, "^keep must have 1 dimension"),
        ([0.5], TypeError, "^keep must be an array of integers"),
        (["a"], TypeError, "^keep must be an array of integers"),
        (None, TypeError, "^keep must be an array, got None$"),
    ],
)
def test_pruning_by_what_names_no_rows_is_an_error(table, keep, error, message):
    with pytest.raises(error, match=message):
        table.prune(keep)


def test_pruning_leaves_the_table_and_the_mask_as_they_were(table, values, same_bits):
    mask = np.ones(len(table), bool)
    table.prune([0])
    table.prune(mask).prune(mask)
    assert mask.all()
    same_bits(table.dequantize(), values)


# ---- What a caller does to the arrays of a table ---------------------------------------------------------------------


def test_nobody_reshapes_a_table_through_its_attributes(rng):
    rows = packed_rows(rng, 10, 8, 4)
    table = qembag.QuantizedTable(rows, 4, compressed_indices_mapping=np.arange(10, dtype=np.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy 2.5 would rather not have it, and does it
        table.data.shape = (20, 4)
        table.data.dtype = np.int8
        table.compressed_indices_mapping.shape = (2, 5)
    assert table.shape == (10, 8)
    assert table.scales.shape == (10,)
    assert qembag.embedding(table, [1]).shape == (1, 8)


def test_a_mapping_that_becomes_zero_later_still_prunes(rng, level, same_bits):
    mapping = np.array([3], dtype=np.int32)
    rows = packed_rows(rng, 10, 16, 8)
    table = qembag.QuantizedTable(rows, 8, compressed_indices_mapping=mapping)
    mapping[0] = 0
    assert table.shape == np.asarray(table).shape == (1, 16)
    same_bits(table[0], reference.dequantize(rows[:1], 8, 16)[0])
    with pytest.raises(IndexError, match=r"^indices\[0\] is 5: out of range for a pruned table of 1 rows$"):
        qembag.embedding(table, [5])


@pytest.mark.parametrize("row", [99, -5])
def test_pruning_checks_the_mapping_as_it_is_then(rng, row):
    mapping = np.array([3, 4], dtype=np.int32)
    table = qembag.QuantizedTable(packed_rows(rng, 10, 16, 8), 8, compressed_indices_mapping=mapping)
    mapping[0] = row
    message = rf"^compressed_indices_mapping\[0\] is {row}: must be -1 or the number of a row, in a table of 10 rows$"
    with pytest.raises(IndexError, match=message):
        table.prune([0])
    with pytest.raises(IndexError, match=message):
        table[0]


def test_numpys_whole_numbers_choose_rows_too(rng, same_bits):
    rows = packed_rows(rng, 10, 16, 8)
    table = qembag.QuantizedTable(rows, 8)
    for number in (np.int64(-1), np.uint8(9), 9, -1):
        same_bits(table[number], reference.dequantize(rows[9:], 8, 16)[0])
    for number in (10, -11, np.int64(10)):
        with pytest.raises(IndexError, match=rf"^index {number} is out of range for a table of 10 rows$"):
            table[number]


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_an_index_of_any_integer_type_counts_by_value(dtype):
    table = qembag.quantize(np.arange(900, dtype=np.float32).reshape(300, 3))
    item = np.array([3, 100, 0], dtype=dtype)
    assert np.array_equal(table[item], table[[3, 100, 0]])
    assert np.array_equal(table[item[:0]], np.empty((0, 3), np.float32))
    if dtype[0] == "i":
        assert np.array_equal(table[-item], table[[-3, -100, 0]])
