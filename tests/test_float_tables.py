"""`FloatTable`, and plain arrays of floats in its place: the oracle's bits at every level and thread count."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import qembag
import reference
from qembag import ops
from support import fenced
from support.arrays import place
from support.floats import KINDS, STORED, full_range, rows_of, same_floats, stored_as
from support.layouts import bag_offsets
from support.variants import VARIANTS, Parts, parts_of, table_of

SMALL = list(range(1, 41))
LARGER = [47, 48, 49, 63, 64, 65, 79, 96, 100, 127, 128, 129, 144, 175, 192, 200, 223, 255, 256, 257, 288, 300]
WIDE = [512 + 17, 1024, 1500]
NUM_ROWS = 7
ENDS = {"short": np.array([0, 0, 1, 3, 3, 10, 12]), "long": np.array([0, 0, 30, 33])}

over_kinds = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Case:
    """A table of floats, bags of it, and what the oracle says of them: asked once for all levels and threads."""

    kind: str
    dim: int
    length: str = "short"
    num_rows: int = NUM_ROWS
    extremes: bool = False

    @functools.cached_property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng([KINDS.index(self.kind), self.dim, self.num_rows, self.extremes])

    @functools.cached_property
    def rows(self) -> np.ndarray:
        return rows_of(self.rng, self.kind, self.num_rows, self.dim, self.extremes)

    @functools.cached_property
    def parts(self) -> Parts:
        assert self.rows.size  # made first, of the same numbers
        return parts_of(self.rng, self.num_rows, ENDS[self.length], self.extremes)

    @functools.cached_property
    def values(self) -> np.ndarray:
        return reference.widen(self.rows)

    @functools.cached_property
    def bags_of_one(self) -> np.ndarray:
        """A sum starts from +0."""
        with np.errstate(invalid="ignore"):
            return self.values + np.float32(0)

    def table(self, variant: str = "sum", rows: np.ndarray | None = None) -> Any:
        return table_of(self.rows if rows is None else rows, VARIANTS[variant].mapping(self.parts))

    def ours(self, variant: str, rows: np.ndarray | None = None, **more: Any) -> np.ndarray:
        return VARIANTS[variant].ours(self.table(variant, rows), self.parts, **more)

    @functools.cache  # noqa: B019  # for as long as the tests run
    def expected(self, variant: str) -> np.ndarray:
        return VARIANTS[variant].expected(functools.partial(reference.float_embedding_bag, self.rows), self.parts)


@functools.cache
def case_of(kind: str, dim: int, **options: Any) -> Case:
    """One object for a case, which holds what has been asked."""
    return Case(kind, dim, **options)


def length_of(dim: int) -> str:
    return "long" if dim // 4 % 2 else "short"


# ---- The oracle's bits -------------------------------------------------------------------------------------------------


@over_kinds
@pytest.mark.parametrize("dims", [SMALL[:20], SMALL[20:], LARGER, WIDE], ids=["tiny", "small", "larger", "wide"])
def test_every_level_gives_the_oracles_bits_at_every_dim(level, kind, dims, same_bits):
    for dim in dims:
        case = case_of(kind, dim, length=length_of(dim))
        for variant in VARIANTS:
            same_floats(case.ours(variant), case.expected(variant))
        same_bits(case.table().dequantize(), case.values)
        same_bits(qembag.embedding(case.table(), np.arange(NUM_ROWS)), case.bags_of_one)


@over_kinds
def test_extreme_values_give_the_oracles_bits(level, kind, same_bits):
    """Denormals, infinities, NaN, zeros of both signs, sums that overflow; weights of the same sort."""
    for dim in (3, 16, 37, 150):
        case = case_of(kind, dim, num_rows=40, extremes=True)
        for variant in VARIANTS:
            same_floats(case.ours(variant), case.expected(variant))
        same_bits(case.table().dequantize(), case.values)


@over_kinds
def test_values_of_any_exponent_give_the_oracles_bits(level, kind, rng, same_bits):
    rows = full_range(rng, kind, 50, 45)
    offsets = bag_offsets(rng, 20, 8)
    indices = rng.integers(0, 50, offsets[-1])
    weights = full_range(rng, "float32", 1, len(indices))[0]
    for mode, given, output in itertools.product(("sum", "mean", "max"), (None, weights), (None, *KINDS[1:])):
        if mode == "max" and given is not None:
            continue
        ours = qembag.embedding_bag(table_of(rows), indices, offsets, mode=mode, per_sample_weights=given, dtype=output)
        expected = reference.float_embedding_bag(
            rows, indices, offsets, mode=mode, weights=given, half=output == "float16", bfloat16=output == "bfloat16"
        )
        same_floats(ours, expected)


@over_kinds
@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16"])
def test_every_value_of_two_bytes_is_widened_and_narrowed(level, kind, output, same_bits):
    """All values of float16 or bfloat16; of float32 those beside the middle of two values of bfloat16."""
    if kind == "float32":
        upper = np.arange(2**16, dtype=np.uint32) << 16
        rows = (upper[:, None] + np.uint32([0, 0x7FFF, 0x8000, 0x8001])).view(np.float32).reshape(-1, 32)
    else:
        rows = np.arange(2**16, dtype=np.uint16).view(STORED[kind]).reshape(-1, 32)
    values = reference.widen(rows)
    same_bits(table_of(rows).dequantize(), values)
    with np.errstate(all="ignore"):
        narrowed = stored_as(values + np.float32(0), output)
    ours = qembag.embedding(table_of(rows), np.arange(len(rows)), dtype=output)
    assert ours.dtype == narrowed.dtype
    same_floats(ours, narrowed)


# ---- Threads, large tables ---------------------------------------------------------------------------------------------

# Rows times (dim + 64) that make the kernels share a call out, and some more.
ENOUGH_WORK = 2**19 * 1.25


@functools.cache
def many_bags(kind: str, dim: int, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([5, dim])
    lengths = np.full(int(ENOUGH_WORK / (dim + 64) / 5) + 1, 5)
    lengths[::3], lengths[1::3] = 0, 10
    ends = np.concatenate([[0], np.cumsum(lengths)])
    rows = rows_of(rng, kind, 50, dim)
    indices = rng.integers(-1, 52, ends[-1])
    weights = rng.normal(size=len(indices)).astype(np.float32)
    expected = reference.float_embedding_bag(
        rows, indices, ends, mode=mode, weights=weights, include_last_offset=True, invalid="skip"
    )
    return rows, indices, ends, weights, expected


@over_kinds
@pytest.mark.parametrize(("dim", "mode"), [(130, "sum"), (130, "average"), (600, "mean")])
def test_every_thread_count_gives_the_oracles_bits(level, threads, kind, dim, mode, same_bits):
    rows, indices, ends, weights, expected = many_bags(kind, dim, mode)
    table = table_of(rows)
    given = {"mode": mode, "per_sample_weights": weights, "invalid": "skip"}
    same_bits(qembag.embedding_bag(table, indices, ends, include_last_offset=True, **given), expected)
    same_bits(qembag.embedding_bag(table, indices, lengths=np.diff(ends), **given), expected)


@over_kinds
def test_single_rows_are_the_same_at_every_thread_count(level, threads, kind, rng, same_bits):
    rows = rows_of(rng, kind, 6000, 40)
    values = reference.widen(rows)
    table = table_of(rows)
    same_bits(table.dequantize(), values)
    indices = rng.integers(0, 6000, (70, 100))
    same_bits(qembag.embedding(table, indices), values[indices] + np.float32(0))
    indices[3, 5], indices[69, 99] = -1, 6000
    expected = np.where(((indices >= 0) & (indices < 6000))[..., None], values[indices.clip(0, 5999)], np.float32(0))
    same_bits(qembag.embedding(table, indices, invalid="skip"), expected + np.float32(0))


@over_kinds
def test_rows_of_near_and_of_far_tables_are_the_same(level, kind, rng, same_bits):
    """Kernels have other loops for tables that a cache may hold, up to 8 MiB."""
    for dim in (20, 64, 200):
        near = rows_of(rng, kind, 100, dim)
        far = np.zeros(((9 << 20) // (dim * near.itemsize), dim), near.dtype)
        far[:100] = near
        offsets = bag_offsets(rng, 9, 20)
        indices = rng.integers(0, 100, offsets[-1] + 3)
        mapping = np.append(np.arange(100), -1).astype(np.int32)
        expected = reference.float_embedding_bag(near, indices, offsets)
        for rows, by in itertools.product((near, far), (None, mapping)):
            same_bits(qembag.embedding_bag(table_of(rows, by), indices, offsets), expected)


# ---- Memory ------------------------------------------------------------------------------------------------------------

OF_ROWS = ("gaps", "odd gaps", "far", "reversed", "misaligned", "read-only", "mapped")


@over_kinds
@pytest.mark.parametrize("way", OF_ROWS)
def test_tables_in_any_memory_give_the_same_uncopied(level, kind, way, same_bits):
    for dim in (1, 7, 26, 48, 150):
        case = case_of(kind, dim, length="long")
        lying = place(case.rows, way).value
        table = case.table(rows=lying)
        assert np.shares_memory(table.data, lying)
        same_bits(table.dequantize(), case.values)
        for variant in ("sum", "max", "pruned", "weighted average, all at once"):
            same_bits(case.ours(variant, rows=lying), case.expected(variant))
        if kind != "bfloat16":
            same_bits(VARIANTS["sum"].ours(lying, case.parts), case.expected("sum"))


@over_kinds
def test_rows_at_an_odd_address_of_a_buffer(level, kind, same_bits):
    for dim, shift in itertools.product((1, 5, 16, 33), (1, 2, 3)):
        case = case_of(kind, dim)
        buffer = bytes(shift) + case.rows.tobytes()
        lying = np.frombuffer(buffer, case.rows.dtype, offset=shift).reshape(case.rows.shape)
        for variant in ("sum", "max", "pruned, padded and weighted mean"):
            same_bits(case.ours(variant, rows=lying), case.expected(variant))


@over_kinds
def test_a_mapped_file_is_a_table(level, kind, tmp_path, same_bits):
    case = case_of(kind, 33)
    np.save(tmp_path / "rows.npy", case.rows)
    lying = np.load(tmp_path / "rows.npy", mmap_mode="r")
    same_bits(case.ours("sum", rows=lying), case.expected("sum"))
    assert np.shares_memory(case.table(rows=lying).data, lying)


def test_a_table_reads_its_array_as_it_is_now(same_bits):
    rows = np.ones((2, 3), np.float32)
    table = qembag.FloatTable(rows)
    rows[1] = 7
    same_bits(qembag.embedding(table, [1]), np.full((1, 3), 7, np.float32))


@over_kinds
def test_an_output_of_the_callers_is_written_and_nothing_beside_it(level, kind, same_bits):
    for dim, (output, variant) in itertools.product(
        (1, 17, 33, 150), [(np.float32, "sum"), (np.float16, "float16"), (np.uint16, "bfloat16")]
    ):
        case = case_of(kind, dim)
        expected = case.expected(variant)
        whole = np.full((len(expected), dim + 9), 77, output)
        out = whole[:, 4 : 4 + dim]
        assert case.ours(variant, out=out) is out
        same_bits(out.copy(), expected)
        out[...] = 77
        assert (whole == 77).all()


def lie_at_a_fence(rows: np.ndarray, at: str, gap: int) -> np.ndarray:
    """Rows with so many bytes between them, of which the first byte follows a guard page, or the last precedes one."""
    num_rows, dim = rows.shape
    stride = dim * rows.itemsize + gap
    memory = fenced.empty((num_rows - 1) * stride + dim * rows.itemsize, np.uint8, at=at)
    lying = np.ndarray(rows.shape, rows.dtype, memory, 0, (stride, rows.itemsize))
    lying[...] = rows
    return lying


@fenced.needs_fences
@over_kinds
@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("gap", [0, 3])
def test_nothing_outside_a_table_is_read(level, kind, at, gap, same_bits):
    for dim in (*range(1, 36), 47, 63, 65, 100, 129, 300, 529):
        case = case_of(kind, dim, length=length_of(dim))
        lying = lie_at_a_fence(case.rows, at, gap)
        table = case.table(rows=lying)
        edge = 0 if at == "start" else NUM_ROWS - 1
        # Bags with the row at the edge in the first and the last place: reading ahead would be seen.
        same_bits(qembag.embedding(table, [edge]), case.bags_of_one[[edge]])
        for length in (5, 40):
            same_bits(qembag.embedding_bag(table, np.full((2, length), edge), mode="max"), case.values[[edge, edge]])
        for variant in ("sum", "weighted, int32", "pruned, padded and weighted mean", "skipped"):
            same_bits(case.ours(variant, rows=lying), case.expected(variant))
        same_bits(table.dequantize(), case.values)


@fenced.needs_fences
@over_kinds
def test_one_row_alone_between_fences(level, kind, same_bits):
    for dim, at in itertools.product((1, 2, 7, 8, 15, 16, 17, 31, 33), ("start", "end")):
        case = case_of(kind, dim)
        table = table_of(fenced.copy(case.rows[:1], at=at))
        same_bits(qembag.embedding(table, [0, 0, 0]), case.bags_of_one[[0, 0, 0]])
        same_bits(qembag.embedding_bag(table, np.zeros((2, 40), int), mode="max"), case.values[[0, 0]])


@fenced.needs_fences
@over_kinds
def test_nothing_outside_an_output_is_written(level, kind, same_bits):
    for dim, variant in itertools.product((1, 3, 15, 16, 17, 33), ("sum", "float16", "bfloat16")):
        case = case_of(kind, dim)
        expected = case.expected(variant)
        for at in ("start", "end"):
            out = fenced.empty(expected.shape, expected.dtype, at=at)
            case.ours(variant, out=out)
            same_bits(out, expected)


# ---- Making a table ----------------------------------------------------------------------------------------------------

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def swapped(kind: str) -> np.dtype[Any]:
    """In the byte order that is not the host's."""
    return np.dtype(kind).newbyteorder()


@over_kinds
def test_a_table_says_what_it_is(kind):
    rows = rows_of(np.random.default_rng(1), kind, 4, 3)
    table = table_of(rows)
    size = STORED[kind].itemsize
    assert (table.dtype, table.dim, table.shape, len(table)) == (kind, 3, (4, 3), 4)
    assert (table.num_rows, table.num_embeddings) == (4, 4)
    assert (table.row_bytes, table.nbytes) == (3 * size, 12 * size)
    assert table.compressed_indices_mapping is None
    assert table.data.tobytes() == rows.tobytes()
    assert np.shares_memory(table.data, rows)
    assert repr(table).startswith("FloatTable(")
    assert kind in repr(table)


@over_kinds
def test_a_pruned_table_says_what_it_is(kind, same_bits):
    rows = rows_of(np.random.default_rng(1), kind, 2, 3)
    mapping = np.int32([1, -1, 0, -1, 1])
    table = table_of(rows, mapping)
    size = STORED[kind].itemsize
    assert (table.num_rows, table.num_embeddings, len(table), table.shape) == (2, 5, 5, (5, 3))
    assert table.nbytes == 6 * size + 20
    same_bits(table.compressed_indices_mapping, mapping)
    values = np.concatenate([reference.widen(rows), np.zeros((1, 3), np.float32)])[mapping]
    same_bits(table.dequantize(), values)
    same_bits(np.asarray(table), values)
    same_bits(np.stack(list(table)), values)
    same_bits(table[2], values[2])
    same_bits(table[-1], values[-1])
    same_bits(table[::-2], values[::-2])
    same_bits(table[[0, -5, 1]], values[[0, -5, 1]])
    same_bits(np.asarray(table, dtype=np.float64), values.astype(np.float64))
    with pytest.raises(ValueError, match="copy"):
        table.__array__(copy=False)
    with pytest.raises(IndexError):
        table[5]


def test_a_mapping_of_zero_alone_prunes_nothing():
    table = qembag.FloatTable(ROWS, compressed_indices_mapping=[0])
    assert table.compressed_indices_mapping is None
    assert table.num_embeddings == 4


@over_kinds
def test_dequantize_keeps_each_bit_of_a_value(level, kind, same_bits):
    case = case_of(kind, 20, num_rows=40, extremes=True)
    table = case.table()
    numbers = np.array([[3, 3], [39, 0]])
    same_bits(table.dequantize(numbers), case.values[numbers])
    out = np.full((2, 2, 20), np.nan, np.float32)
    assert table.dequantize(numbers, out=out) is out
    same_bits(out, case.values[numbers])
    negative = table_of(stored_as(np.float32([[-0.0]]), kind))
    assert np.signbit(negative.dequantize()).all()
    assert np.signbit(negative[0]).all()
    assert not np.signbit(qembag.embedding(negative, [0])).any()
    for wrong in ([-1], [40]):
        with pytest.raises(IndexError, match=r"^rows\[0\] is"):
            table.dequantize(wrong)


@over_kinds
def test_pruning_keeps_the_chosen_rows(kind, same_bits):
    case = case_of(kind, 20)
    values = case.values.copy()
    values[[1, 3, 4]] = 0
    for keep in ([0, 2, 5, 6], np.array([1, 0, 1, 0, 0, 1, 1], bool)):
        pruned = case.table().prune(keep)
        assert (pruned.num_rows, pruned.num_embeddings, pruned.dtype) == (4, NUM_ROWS, kind)
        assert not np.shares_memory(pruned.data, case.rows)
        same_bits(pruned.dequantize(), values)
        same_bits(pruned.prune([0, 1, 6]).dequantize(), np.where(np.isin(np.arange(7), [0, 6])[:, None], values, 0))
    with pytest.raises(IndexError, match=r"^keep\[0\] is 7"):
        case.table().prune([7])
    with pytest.raises(ValueError, match=r"^keep must have shape"):
        case.table().prune([True])


@over_kinds
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))])
@pytest.mark.parametrize("way", ["plain", "gaps", "read-only"])
def test_copies_are_the_same_table(kind, again, way, same_bits):
    case = case_of(kind, 20)
    for mapping in (None, case.parts.mapping):
        table = table_of(place(case.rows, way).value, mapping)
        other = again(table)
        assert type(other) is qembag.FloatTable
        assert (other.dtype, other.shape) == (kind, table.shape)
        same_bits(other.data.copy(), case.rows)
        same_bits(other.dequantize(), table.dequantize())
        assert (other.compressed_indices_mapping is None) == (mapping is None)


def test_a_subclass_keeps_its_class():
    class Named(qembag.FloatTable):
        pass

    assert type(copy.copy(Named(ROWS))) is Named
    assert type(Named(ROWS).prune([0])) is Named
    assert repr(Named(ROWS)).startswith("Named(")
    assert qembag.embedding_bag(Named(ROWS), [[1]]).tolist() == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("float32", [np.float32, "float32", "f4", np.dtype("f4"), None]),
        ("float16", [np.float16, "float16", "e", np.dtype("f2"), None]),
        ("bfloat16", ["bfloat16"]),
    ],
)
def test_a_dtype_may_be_said(kind, names, same_bits):
    rows = stored_as(ROWS, kind)
    for name in names:
        table = qembag.FloatTable(rows, dtype=name)
        assert table.dtype == kind
        same_bits(table.dequantize(), ROWS)


@pytest.mark.parametrize(
    ("data", "dtype", "error", "name"),
    [
        (ROWS.astype(np.float64), None, TypeError, "data"),
        (ROWS.astype(np.int32), None, TypeError, "data"),
        (ROWS.astype(np.uint8), None, TypeError, "data"),
        (ROWS.astype(np.uint16), None, TypeError, "data"),
        (ROWS.astype(np.int16), "bfloat16", (TypeError, ValueError), "d"),
        (ROWS.astype(bool), None, TypeError, "data"),
        (ROWS.astype(object), None, TypeError, "data"),
        (ROWS.astype(swapped("f4")), None, ValueError, "data"),
        (ROWS.astype(swapped("f2")), None, ValueError, "data"),
        (ROWS.astype(swapped("u2")), "bfloat16", (TypeError, ValueError), "data"),
        (ROWS.view("V4"), None, TypeError, "data"),
        (ROWS.astype(np.float16).view("V2"), "bfloat16", (TypeError, ValueError), "d"),
        (None, None, TypeError, "data"),
        ("rows", None, TypeError, "data"),
        (np.ma.MaskedArray(ROWS), None, TypeError, "data"),
        (ROWS[0], None, ValueError, "data"),
        (ROWS[None], None, ValueError, "data"),
        (np.float32(1), None, ValueError, "data"),
        (ROWS[:, ::2], None, ValueError, "data"),
        (ROWS.T, None, ValueError, "data"),
        (np.asfortranarray(ROWS), None, ValueError, "data"),
        (ROWS[:, ::-1], None, ValueError, "data"),
        (ROWS[:, :0], None, ValueError, "data"),
        (ROWS, "float16", (TypeError, ValueError), "d"),
        (ROWS, "bfloat16", (TypeError, ValueError), "d"),
        (ROWS.astype(np.float16), np.float32, (TypeError, ValueError), "d"),
        (ROWS.astype(np.float16), "bfloat16", (TypeError, ValueError), "d"),
        (ROWS.astype(np.uint16), np.uint16, (TypeError, ValueError), "d"),
        (ROWS.astype(np.uint16), "float16", (TypeError, ValueError), "d"),
        (ROWS, "float64", (TypeError, ValueError), "d"),
        (ROWS, "nonsense", (TypeError, ValueError), "dtype"),
        (ROWS, 5, (TypeError, ValueError), "dtype"),
        (ROWS, swapped("f4"), (TypeError, ValueError), "d"),
    ],
)
def test_what_is_no_table_is_refused(data, dtype, error, name):
    with pytest.raises(error) as caught:
        qembag.FloatTable(data, dtype=dtype)
    words = {"d": "(data|dtype)"}.get(name, name)
    assert re.match(rf"{words} ", str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "error"),
    [([4], IndexError), ([-2, 0], IndexError), ([2**40], IndexError), (np.int64([0]), TypeError), ([[0]], ValueError)],
)
def test_a_wrong_mapping_is_refused(mapping, error):
    with pytest.raises(error, match=r"^compressed_indices_mapping"):
        qembag.FloatTable(ROWS, compressed_indices_mapping=mapping)


def test_a_mapped_row_out_of_range_is_found_when_it_is_used(level):
    mapping = np.int32([0, 1, -1])
    table = qembag.FloatTable(ROWS, compressed_indices_mapping=mapping)
    for wrong in (4, -2, 2**31 - 1, -(2**31)):
        mapping[1] = wrong
        for invalid in ("raise", "skip"):
            qembag.embedding_bag(table, [[0, 2]], invalid=invalid)
            for call in (
                lambda invalid=invalid: qembag.embedding_bag(table, [[0, 1]], invalid=invalid),
                lambda invalid=invalid: qembag.embedding(table, [0, 1], invalid=invalid),
            ):
                with pytest.raises(IndexError, match=rf"^compressed_indices_mapping\[1\] is {wrong}"):
                    call()


def test_arguments_that_are_refused_leave_a_table_as_it_was(same_bits):
    table = qembag.FloatTable(ROWS)
    for data, options in [
        (ROWS.astype(np.float64), {}),
        (ROWS[0], {}),
        (ROWS.astype(np.float16), {"dtype": "bfloat16"}),
        (ROWS.astype(np.float16), {"compressed_indices_mapping": [99]}),
    ]:
        with pytest.raises((TypeError, ValueError, IndexError)):
            table.__init__(data, **options)  # type: ignore[misc]
    assert table.dtype == "float32"
    same_bits(table.dequantize(), ROWS)


def test_lists_are_tables_of_float32(same_bits):
    for rows in (ROWS.tolist(), ROWS.astype(int).tolist(), tuple(map(tuple, ROWS.tolist()))):
        table = qembag.FloatTable(rows)
        assert table.dtype == "float32"
        same_bits(table.dequantize(), ROWS)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 1), (12, 5)), ((1, 3), (sys.maxsize // 8 * 4, 4)), ((1, 3), (-4, 4)), ((0, 3), (4, 8)), ((4, 3), (0, 4))],
)
def test_the_strides_of_what_is_alone_say_nothing(level, shape, strides, same_bits):
    """NumPy lets that of a single element or a single row be any number. Rows may also lie on each other."""
    lying = np.lib.stride_tricks.as_strided(ROWS, shape, strides)
    for table in (qembag.FloatTable(lying), lying):
        same_bits(qembag.embedding(table, np.arange(len(lying))), lying.copy())
        same_bits(
            qembag.embedding_bag(table, [np.arange(len(lying))] * 2, mode="max")[:1], lying.max(axis=0, initial=0)[None]
        )


@over_kinds
def test_tables_of_no_rows_have_empty_bags(level, kind, same_bits):
    table = table_of(np.zeros((0, 5), STORED[kind]))
    same_bits(qembag.embedding_bag(table, [], [0, 0]), np.zeros((2, 5), np.float32))
    same_bits(qembag.embedding_bag(table, [3], [0], invalid="skip"), np.zeros((1, 5), np.float32))
    same_bits(table.dequantize(), np.zeros((0, 5), np.float32))
    with pytest.raises(IndexError, match=r"^indices\[0\] is 0"):
        qembag.embedding_bag(table, [0], [0])


def test_the_operators_of_torch_take_no_table_of_floats():
    for call in (
        ops.embedding_bag_byte,
        ops.embedding_bag_4bit,
        ops.embedding_bag_2bit,
        ops.embedding_bag_byte_rowwise_offsets,
    ):
        for weight in (qembag.FloatTable(ROWS), ROWS):
            with pytest.raises(TypeError, match=r"^weight must be"):
                call(weight, [0], [0])
    with pytest.raises(TypeError, match=r"^weight must be"):
        ops.embedding_byte(qembag.FloatTable(ROWS), [0])


# ---- Plain arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_plain_array_is_short_for_its_table(level, kind, same_bits):
    for dim in (1, 8, 33, 300):
        case = case_of(kind, dim, length=length_of(dim))
        for name, variant in VARIANTS.items():
            if not variant.is_pruned:
                same_bits(variant.ours(case.rows, case.parts), case.expected(name))
        same_bits(qembag.embedding(case.rows, np.arange(NUM_ROWS)), case.bags_of_one)


@pytest.mark.parametrize(
    "table",
    [
        None, 1.0, "table", [[1.0, 2.0]], ROWS.tolist(), ROWS.astype(np.float64), ROWS.astype(np.uint8),
        ROWS.astype(np.uint16), ROWS.astype(np.int64), ROWS.astype(object), memoryview(ROWS), np.ma.MaskedArray(ROWS),
        np.zeros((2, 12), np.uint8), np.float32(1),
    ],
    ids=repr,
)  # fmt: skip
def test_anything_else_in_the_place_of_a_table_is_refused(table):
    for call in (lambda: qembag.embedding_bag(table, [0], [0]), lambda: qembag.embedding(table, [0])):
        with pytest.raises(TypeError, match=r"^table must be"):
            call()


@pytest.mark.parametrize("table", [ROWS[0], ROWS[None], ROWS[:, ::2], ROWS.T, ROWS.astype(swapped("f4")), ROWS[:, :0]])
def test_an_array_of_floats_that_is_no_table_is_refused(table):
    for call in (lambda: qembag.embedding_bag(table, [0], [0]), lambda: qembag.embedding(table, [0])):
        with pytest.raises((TypeError, ValueError), match=r"^table must"):
            call()


def test_an_output_shares_no_memory_with_a_plain_array():
    rows = ROWS.copy()
    for table in (rows, qembag.FloatTable(rows)):
        for indices in ([[0, 1]], np.array([[0, 1]])):
            with pytest.raises(ValueError, match=r"^out must share no memory with the table"):
                qembag.embedding_bag(table, indices, out=rows[2:3])
    assert (rows == ROWS).all()


# ---- ml_dtypes ---------------------------------------------------------------------------------------------------------


def test_rows_of_ml_dtypes_are_those_of_their_bits(level, same_bits):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dim in (1, 17, 64, 300):
        case = case_of("bfloat16", dim)
        typed = case.rows.view(ml_dtypes.bfloat16)
        for dtype in (None, ml_dtypes.bfloat16, "bfloat16"):
            table = qembag.FloatTable(typed, dtype=dtype)
            assert table.dtype == "bfloat16"
            assert np.shares_memory(table.data, typed)
            assert table.data.tobytes() == typed.tobytes()
            same_bits(VARIANTS["sum"].ours(table, case.parts), case.expected("sum"))
        same_bits(VARIANTS["sum"].ours(typed, case.parts), case.expected("sum"))
        same_bits(qembag.embedding(typed, np.arange(NUM_ROWS)), case.bags_of_one)
        again = pickle.loads(pickle.dumps(qembag.FloatTable(typed)))
        assert again.dtype == "bfloat16"
        same_bits(again.dequantize(), case.values)


@over_kinds
def test_outputs_of_ml_dtypes_are_the_bits_of_the_others(level, kind, same_bits):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    case = case_of(kind, 33)
    indices, ends = case.parts.indices, case.parts.ends
    given = {"include_last_offset": True, "per_sample_weights": case.parts.weights.astype(np.float32)}
    expected = case.expected("bfloat16")
    for dtype in (ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        ours = qembag.embedding_bag(case.table(), indices, ends, dtype=dtype, **given)
        assert ours.dtype == ml_dtypes.bfloat16
        same_bits(ours.view(np.uint16), expected)
        out = np.zeros(expected.shape, ml_dtypes.bfloat16)
        assert qembag.embedding_bag(case.table(), indices, ends, out=out, **given) is out
        same_bits(out.view(np.uint16), expected)
    rows = qembag.embedding(case.table(), [[0, 1]], dtype=ml_dtypes.bfloat16)
    assert rows.dtype == ml_dtypes.bfloat16
    same_bits(rows.view(np.uint16)[0], reference.to_bfloat16(case.bags_of_one[:2]))


def test_ml_dtypes_rounds_as_the_oracle_does():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = full_range(np.random.default_rng(3), "float32", 100, 100)
    with np.errstate(all="ignore"):
        theirs = values.astype(ml_dtypes.bfloat16)
    assert theirs.tobytes() == reference.to_bfloat16(values).tobytes()
