"""Rows of every layout: pairs of each type before or behind the codes, groups, padding. The oracle's bits at every level.

`ALL_KINDS` has 144 layouts. Each of them meets some dims here, so that all together meet every dim; `slow` tests take
each of them at every dim.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import qembag
import reference
from qembag import QuantizedTable
from support import fenced, levels
from support.arrays import place
from support.layouts import ALL_KINDS, LAYOUTS, Layout, bag_offsets, rows_of, spread

NUMBERS = {layout: number for number, layout in enumerate(ALL_KINDS)}
GROUPED = [layout for layout in ALL_KINDS if layout.group_size]
PADDED = [layout for layout in ALL_KINDS if layout.padding]

SMALL = range(1, 41)
LARGER = [47, 48, 49, 63, 64, 65, 79, 81, 95, 96, 97, 100, 111, 113, 127, 128, 129, 130, 143, 145, 160, 175, 177, 191]
LARGER += [192, 193, 200, 207, 209, 223, 225, 239, 240, 241, 255, 256, 257, 271, 273, 287, 289, 300]
WIDE = [512 + 17, 1024, 1500]

NUM_ROWS = 7
# Kernels unpack otherwise where bags are long.
ENDS = {"short": np.array([0, 0, 1, 3, 3, 10, 12]), "long": np.array([0, 0, 30, 33])}
VARIANTS: dict[str, dict[str, Any]] = {
    "sum": {},
    "weighted, int32": {"weights": "<f4", "index_type": np.int32},
    "mean": {"mode": "mean", "offset_type": np.int32},
    "max": {"mode": "max"},
    "float16": {"dtype": np.float16},
    "pruned": {"is_pruned": True},
    "pruned, padded and weighted mean": {"mode": "mean", "is_pruned": True, "padding_idx": 3, "weights": "<f2"},
}

over_all = pytest.mark.parametrize("layout", ALL_KINDS, ids=str)


def over(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", spread(count), ids=str)


def dims_of(layout: Layout) -> list[int]:
    """Some dims for each layout, other ones for its neighbours in the list."""
    number = NUMBERS[layout]
    few = [dim for dim in SMALL if (dim + number) % 4 == 0]
    return [*few, *LARGER[number % 11 :: 11][:4], WIDE[number // 2 % len(WIDE)]]


def table_of(rows: np.ndarray, layout: Layout, dim: int, mapping: np.ndarray | None = None) -> QuantizedTable:
    return QuantizedTable(rows, layout.bits, dim=dim, compressed_indices_mapping=mapping, **layout.keywords())


@dataclass(frozen=True)
class Case:
    """A table of a layout, bags of it, and what the oracle says of them: asked once for all levels and threads."""

    layout: Layout
    dim: int
    length: str = "short"
    num_rows: int = NUM_ROWS
    extremes: bool = False

    @functools.cached_property
    def parts(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([NUMBERS.get(self.layout, 1000), self.dim, self.num_rows])
        rows = rows_of(rng, self.layout, self.num_rows, self.dim, self.extremes)
        if self.extremes:
            pairs = self.layout.pairs(rows, self.dim).reshape(self.num_rows, -1)
            pairs[0, rng.integers(pairs.shape[1])] = np.nan
            self.layout.set_pairs(rows, pairs, self.dim)
        num_embeddings = self.num_rows + 2
        count = int(ENDS[self.length][-1])
        weights = rng.normal(size=count)
        if self.extremes:
            weights = rng.choice([0, -0.0, 1, -1, 1e-30, 1e-40, 3e38, np.inf, np.nan], count)
        return {
            "rows": rows,
            "mapping": np.maximum(rng.permutation(num_embeddings).astype(np.int32) - 2, -1),  # two are pruned
            "indices": rng.integers(0, self.num_rows, count),
            "ends": ENDS[self.length],
            "weights": weights,
        }

    def table(self, is_pruned: bool = False, rows: np.ndarray | None = None) -> QuantizedTable:
        rows = self.parts["rows"] if rows is None else rows
        return table_of(rows, self.layout, self.dim, self.parts["mapping"] if is_pruned else None)

    def weights(self, kind: str | None) -> np.ndarray | None:
        with np.errstate(all="ignore"):
            return None if kind is None else self.parts["weights"].astype(kind[1:])

    def ours(self, variant: str, **more: Any) -> np.ndarray:
        options, parts = VARIANTS[variant], self.parts
        return qembag.embedding_bag(
            self.table(options.get("is_pruned", False), more.pop("rows", None)),
            parts["indices"].astype(options.get("index_type", np.int64)),
            parts["ends"].astype(options.get("offset_type", np.int64)),
            mode=options.get("mode", "sum"),
            per_sample_weights=self.weights(options.get("weights")),
            padding_idx=options.get("padding_idx"),
            include_last_offset=True,
            dtype=options.get("dtype"),
            **more,
        )

    @functools.cache  # noqa: B019  # for as long as the tests run
    def expected(self, variant: str) -> np.ndarray:
        options, parts = VARIANTS[variant], self.parts
        return reference.embedding_bag(
            parts["rows"],
            self.layout.bits,
            self.dim,
            parts["indices"],
            parts["ends"],
            mode=options.get("mode", "sum"),
            weights=self.weights(options.get("weights")),
            mapping=self.parts["mapping"] if options.get("is_pruned") else None,
            padding_idx=options.get("padding_idx"),
            include_last_offset=True,
            half=options.get("dtype") == np.float16,
            **self.layout.reading(),
        )

    @functools.cached_property
    def values(self) -> np.ndarray:
        return reference.dequantize(self.parts["rows"], self.layout.bits, self.dim, **self.layout.reading())


@functools.cache
def case_of(layout: Layout, dim: int, **options: Any) -> Case:
    """One object for a case, which holds what has been asked."""
    return Case(layout, dim, **options)


def length_of(dim: int) -> str:
    return "long" if dim // 4 % 2 else "short"


def check_case(case: Case, same_bits: Any) -> None:
    for variant in VARIANTS:
        same_bits(case.ours(variant), case.expected(variant))
    table = case.table()
    same_bits(table.dequantize(), case.values)
    # A sum starts from +0.
    with np.errstate(invalid="ignore"):
        same_bits(qembag.embedding(table, np.arange(case.num_rows)), case.values + np.float32(0))


# ---- Every layout, every dim -------------------------------------------------------------------------------------------


@over_all
def test_every_level_gives_the_oracles_bits_for_every_layout(level, layout, same_bits):
    for dim in dims_of(layout):
        check_case(case_of(layout, dim, length=length_of(dim)), same_bits)


# Rows of more passes than a plan holds (16) at blocks of 4, 6 and 8 vectors, and about there: odd and even numbers of
# vectors, the last one whole and not.
VERY_WIDE = [16 * 16 * most + 16 * more for most in (4, 6, 8) for more in (-1, 0, 1, 2, 17)] + [1953, 2049, 3000, 4096]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("size", [None, 32, 48, 64])
def test_very_wide_rows_are_whole(level, bits, size, same_bits):
    layout = Layout(bits, "<f4" if size is None and bits < 8 else "<f2", False, size)
    for dim in VERY_WIDE:
        case = case_of(layout, dim, num_rows=3)
        out = np.full((len(case.parts["ends"]) - 1, dim), -777, np.float32)
        parts = case.parts
        mapping = np.minimum(parts["indices"], 2)
        bags = qembag.embedding_bag(case.table(), mapping, parts["ends"], include_last_offset=True, out=out)
        expected = reference.embedding_bag(
            parts["rows"], bits, dim, mapping, parts["ends"], include_last_offset=True, **layout.reading()
        )
        same_bits(bags, expected)


def spanning(size: int) -> list[int]:
    """Dims at which groups end beside or within the last sixteen elements."""
    return [size - 1, size, size + 1, size + 8, size + 15, 2 * size - 1, 2 * size + 5, 3 * size + 13]


@pytest.mark.parametrize("layout", GROUPED, ids=str)
def test_the_last_sixteen_elements_may_span_two_groups(level, layout, same_bits):
    dims = spanning(layout.group_size)
    for dim in dims[NUMBERS[layout] % 2 :: 2]:
        case = case_of(layout, dim, length="short")
        for variant in ("sum", "max", "pruned, padded and weighted mean"):
            same_bits(case.ours(variant), case.expected(variant))
        same_bits(case.table().dequantize(), case.values)


@pytest.mark.slow
@over_all
def test_every_layout_at_every_dim(layout, same_bits):
    dims = {*range(1, 131), *LARGER, *WIDE, *(spanning(layout.group_size) if layout.group_size else [])}
    for dim in sorted(dims):
        case = Case(layout, dim, length_of(dim))
        for level in levels.levels():
            with levels.use(level):
                check_case(case, same_bits)


def test_every_dim_is_met_by_layouts_of_every_width():
    for bits in LAYOUTS:
        kinds = [layout for layout in ALL_KINDS if layout.bits == bits]
        met = {dim for layout in kinds for dim in dims_of(layout)}
        assert met == {*SMALL, *LARGER, *WIDE}


@over(36)
def test_extreme_scales_and_biases_give_the_oracles_bits(level, layout, same_bits):
    """Denormals, infinities, NaN, zeros of both signs, overflow; each in one group beside others."""
    for dim in (3, 37, 150):
        case = case_of(layout, dim, length="short", num_rows=40, extremes=True)
        for variant in VARIANTS:
            same_bits(case.ours(variant), case.expected(variant))
        same_bits(case.table().dequantize(), case.values)


# ---- Layouts against each other ----------------------------------------------------------------------------------------


@over_all
def test_a_layout_gives_what_torchs_layout_gives_for_the_same_numbers(level, layout, rng, same_bits):
    """All groups of a row have one pair, of halves, which each layout can hold."""
    for dim in (5, 16, 31, 70, 300):
        codes = rng.integers(0, 2**layout.bits, (NUM_ROWS, dim))
        pairs = rng.normal(size=(NUM_ROWS, 1, 2)).astype(np.float16)
        tables = []
        for kind in (LAYOUTS[layout.bits], layout):
            rows = kind.pack(codes, np.repeat(pairs, kind.num_groups(dim), axis=1), pad=0xFF)
            tables.append(table_of(rows, kind, dim))
        bags = rng.integers(0, NUM_ROWS, (4, 9))
        weights = rng.normal(size=bags.shape).astype(np.float32)
        for options in ({}, {"per_sample_weights": weights}, {"mode": "mean"}, {"mode": "max"}):
            ours, torchs = (qembag.embedding_bag(table, bags, **options) for table in tables)
            same_bits(ours, torchs)
        same_bits(tables[0].dequantize(), tables[1].dequantize())


@over_all
def test_a_constant_code_is_read_wherever_it_stands(level, layout, same_bits):
    """Each element alone set; group g's scale is g + 1, so that a scale of another group would show."""
    for dim in (1, 3, 16, 17, 64, 85):
        groups = np.arange(layout.num_groups(dim)) + 1
        pairs = np.stack([np.tile(groups, (dim, 1)), np.zeros((dim, len(groups)))], axis=-1)
        codes = np.eye(dim, dtype=np.int64) * (2**layout.bits - 1)
        scales = groups[[element // (layout.group_size or dim) for element in range(dim)]]
        table = table_of(layout.pack(codes, pairs, pad=0xFF), layout, dim)
        same_bits(table.dequantize(), (codes * scales).astype(np.float32))
        same_bits(qembag.embedding(table, np.arange(dim)), (codes * scales).astype(np.float32))


@over_all
def test_a_table_shows_its_codes_scales_and_biases(layout, same_bits):
    for dim in (1, 18, 100):
        case = case_of(layout, dim, length="short")
        table = case.table()
        read = reference.unpack(case.parts["rows"], layout.bits, dim, **layout.reading())
        same_bits(table.codes().astype(np.float32), read[0])
        for shown, stored in zip((table.scales, table.biases), read[1:], strict=True):
            same_bits(shown.reshape(NUM_ROWS, -1), stored.reshape(NUM_ROWS, -1))
        told = table.layout
        assert (told.bits, told.dim, told.row_bytes) == (layout.bits, dim, layout.row_bytes(dim))
        assert (told.codes_start, told.codes_bytes) == (layout.codes_start(dim), layout.codes_bytes(dim))
        assert (told.pairs_start, 2 * told.pair_size) == (layout.pairs_start(dim), layout.pair_bytes)
        assert (told.num_groups, told.used_bytes) == (layout.num_groups(dim), layout.used_bytes(dim))


def test_defaults_said_outright_are_the_same(bits, rng, same_bits):
    rows = rows_of(rng, LAYOUTS[bits], NUM_ROWS, 40)
    plain = QuantizedTable(rows, bits)
    kind = np.float32 if bits == 8 else np.float16
    outright = QuantizedTable(rows, bits, dim=40, scale_dtype=kind, scale_first=False, group_size=None)
    one_group = QuantizedTable(rows, bits, dim=40, group_size=48)
    for table in (outright, one_group):
        same_bits(table.dequantize(), plain.dequantize())
        same_bits(qembag.embedding_bag(table, [[0, 3, 6]]), qembag.embedding_bag(plain, [[0, 3, 6]]))
    assert outright.layout == plain.layout


@over_all
def test_unused_high_bits_of_the_last_byte_are_ignored(level, layout, rng, same_bits):
    if layout.bits == 8:
        layout = replace(layout, bits=2)
    for dim in (1, 33, 67):
        codes = rng.integers(0, 2**layout.bits, (3, dim))
        pairs = rng.normal(size=(3, layout.num_groups(dim), 2))
        clean = layout.pack(codes, pairs)
        dirty = clean.copy()
        used = (1 << (dim * layout.bits - 8 * (layout.codes_bytes(dim) - 1))) - 1
        dirty[:, layout.codes_start(dim) + layout.codes_bytes(dim) - 1] |= 255 - used
        ours = [qembag.embedding_bag(table_of(rows, layout, dim), [[0, 1, 2]]) for rows in (clean, dirty)]
        same_bits(ours[0], ours[1])


# ---- Threads, large tables, memory -------------------------------------------------------------------------------------

# Rows times (dim + 64) that make the kernels share a call out, and some more.
ENOUGH_WORK = 2**19 * 1.25


@functools.cache
def many_bags(layout: Layout, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([5, NUMBERS[layout]])
    lengths = np.full(int(ENOUGH_WORK / (dim + 64) / 5) + 1, 5)
    lengths[::3], lengths[1::3] = 0, 10
    ends = np.concatenate([[0], np.cumsum(lengths)])
    rows = rows_of(rng, layout, 50, dim)
    indices = rng.integers(0, 50, ends[-1])
    expected = reference.embedding_bag(
        rows, layout.bits, dim, indices, ends, include_last_offset=True, **layout.reading()
    )
    return rows, indices, ends, expected


@over(13)
def test_every_thread_count_gives_the_oracles_bits(level, threads, layout, same_bits):
    rows, indices, ends, expected = many_bags(layout, 130)
    ours = qembag.embedding_bag(table_of(rows, layout, 130), indices, ends, include_last_offset=True)
    same_bits(ours, expected)


@over(13)
def test_single_rows_are_the_same_at_every_thread_count(level, threads, layout, rng, same_bits):
    rows = rows_of(rng, layout, 6000, 40)
    expected = reference.dequantize(rows, layout.bits, 40, **layout.reading())
    table = table_of(rows, layout, 40)
    same_bits(table.dequantize(), expected)
    indices = rng.integers(0, 6000, (70, 100))
    same_bits(qembag.embedding(table, indices), expected[indices] + np.float32(0))


@over(13)
def test_rows_of_near_and_of_far_tables_are_the_same(level, layout, rng, same_bits):
    """Kernels have other loops for tables that a cache may hold, up to 8 MiB."""
    for dim in (20, 64, 200):
        near = rows_of(rng, layout, 100, dim)
        far = np.zeros(((9 << 20) // near.shape[1], near.shape[1]), dtype=np.uint8)
        far[:100] = near
        offsets = bag_offsets(rng, 9, 20)
        indices = rng.integers(0, 100, offsets[-1] + 3)
        mapping = np.append(np.arange(100), -1).astype(np.int32)
        expected = reference.embedding_bag(near, layout.bits, dim, indices, offsets, **layout.reading())
        for rows, by in itertools.product((near, far), (None, mapping)):
            same_bits(qembag.embedding_bag(table_of(rows, layout, dim, by), indices, offsets), expected)


OF_ROWS = ("gaps", "odd gaps", "far", "reversed", "misaligned", "read-only", "mapped")


@over(26)
def test_tables_in_any_memory_give_the_same_uncopied(level, layout, same_bits):
    for number, way in enumerate(OF_ROWS):
        case = case_of(layout, 15 + 11 * number, length="long")
        lying = place(case.parts["rows"], way).value
        assert np.shares_memory(case.table(rows=lying).data, lying)
        for variant in ("sum", "max", "pruned"):
            same_bits(case.ours(variant, rows=lying), case.expected(variant))


@over(26)
def test_an_output_of_the_callers_is_written_and_nothing_beside_it(level, layout, same_bits):
    for dim, dtype in itertools.product((1, 17, 33, 150), (np.float32, np.float16)):
        case = case_of(layout, dim, length="short")
        expected = case.expected("float16" if dtype == np.float16 else "sum")
        whole = np.full((len(expected), dim + 9), 77, dtype)
        out = whole[:, 4 : 4 + dim]
        assert case.ours("sum", out=out) is out
        same_bits(out.copy(), expected)
        out[...] = 77
        assert (whole == 77).all()


# ---- At the edge of memory ---------------------------------------------------------------------------------------------


def fenced_dims(layout: Layout) -> list[int]:
    """Tiny ones for each layout, and some of the others."""
    edges = spanning(layout.group_size)[2:5] if layout.group_size else []
    return [*range(1, 21), *LARGER[NUMBERS[layout] % 11 :: 11][:2], *edges]


OVERREAD = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from support import fenced, levels
rows = fenced.rows_over_the_fence(np.ones((2, 9), np.uint8), 2)
print(rows[1, 6], flush=True)
print(rows[1, 7], flush=True)
"""


@fenced.needs_fences
def test_reading_padding_kills():
    """That the next test can fail."""
    script = OVERREAD.format(tests=str(pathlib.Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["1"]
    assert done.returncode < 0


@fenced.needs_fences
@over_all
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_outside_a_table_is_read(level, layout, at, same_bits):
    """The first byte follows a page that may not be touched, or the last byte that is no padding precedes one."""
    for dim in fenced_dims(layout):
        case = case_of(layout, dim, length="short" if dim <= 20 else length_of(dim))
        rows = case.parts["rows"]
        lying = fenced.copy(rows, at="start") if at == "start" else fenced.rows_over_the_fence(rows, layout.padding)
        table = case.table(rows=lying)
        # Its bags have the last row in the last place, so that reading ahead would be seen.
        last = np.full((1, 5), NUM_ROWS - 1)
        with np.errstate(invalid="ignore"):
            alone = case.values[-1:] + np.float32(0)
        same_bits(qembag.embedding(table, last[0, :1]), alone)
        same_bits(qembag.embedding_bag(table, last, mode="max"), case.values[-1:])
        same_bits(case.ours("sum", rows=lying), case.expected("sum"))
        if dim % 3 == 0:
            same_bits(case.ours("pruned, padded and weighted mean", rows=lying),
                      case.expected("pruned, padded and weighted mean"))  # fmt: skip
        same_bits(table.dequantize(), case.values)


@fenced.needs_fences
@over_all
def test_one_row_alone_between_fences(level, layout, same_bits):
    """Short bags of one row, and long ones, which may be read ahead of."""
    for dim in (1, 2, 7, 15, 16, 17, 31, 33):
        case = case_of(layout, dim, length="short")
        row = case.parts["rows"][:1]
        for lying in (fenced.rows_over_the_fence(row, layout.padding), fenced.copy(row, at="start")):
            table = table_of(lying, layout, dim)
            with np.errstate(invalid="ignore"):
                same_bits(qembag.embedding(table, [0, 0, 0]), np.repeat(case.values[:1], 3, axis=0) + np.float32(0))
            same_bits(qembag.embedding_bag(table, np.zeros((2, 40), int), mode="max"), case.values[[0, 0]])


@pytest.mark.parametrize("layout", PADDED, ids=str)
def test_padding_of_any_bytes_gives_the_same(level, layout, same_bits):
    for dim in (9, 60):
        case = case_of(layout, dim, length="short")
        for byte in (0, 0xFF):
            rows = case.parts["rows"].copy()
            rows[:, layout.used_bytes(dim) :] = byte
            for variant in ("sum", "max"):
                same_bits(case.ours(variant, rows=rows), case.expected(variant))
