"""Layouts of rows, and tables of rows laid out so: how they are made, what they say, and how rows go from one to another."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import struct
import sys
from typing import Any

import numpy as np
import pytest

import qembag
from qembag import QuantizedTable, ops
from qembag.layout import RowLayout

USUAL = {8: "float32", 4: "float16", 2: "float16"}
OTHER = {8: "float16", 4: "float32", 2: "float32"}


def layouts_of(bits: int, dim: int) -> list[RowLayout]:
    return [
        RowLayout(bits, dim, scale_dtype=scale_dtype, scale_first=first, group_size=group_size)
        for scale_dtype, first, group_size in itertools.product(
            ("float32", "float16"), (False, True), (None, 16, 32, 48, 64)
        )
    ]


def some_parts(layout: RowLayout, num_rows: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and pairs that float16 holds."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**layout.bits, (num_rows, layout.dim), dtype=np.uint8)
    pairs = rng.normal(size=(num_rows, layout.num_groups, 2)).astype(np.float16).astype(np.float32)
    return codes, pairs


def row_by_hand(layout: RowLayout, codes: np.ndarray, pairs: np.ndarray) -> bytes:
    number = sum(int(code) << place * layout.bits for place, code in enumerate(codes))
    packed = number.to_bytes(-(-layout.dim * layout.bits // 8), "little")
    stored = struct.pack(f"<{pairs.size}{'f' if layout.scale_dtype == np.float32 else 'e'}", *pairs.ravel().tolist())
    used = stored + packed if layout.scale_first else packed + stored
    return used + bytes(layout.row_bytes - len(used))


def table_of(layout: RowLayout, rows: np.ndarray, **more: Any) -> QuantizedTable:
    options = {name: value for name, value in layout.not_default().items() if name != "row_bytes"}
    return QuantizedTable(rows, layout.bits, dim=layout.dim, **options, **more)


# ---- RowLayout -------------------------------------------------------------------------------------------------------


def test_where_codes_and_pairs_stand(bits: int) -> None:
    for dim in (1, 7, 16, 17, 40, 64, 100):
        codes_bytes = -(-dim * bits // 8)
        for layout in layouts_of(bits, dim):
            group_size = min(layout.group_size, dim)
            num_groups = -(-dim // group_size)
            pairs_bytes = num_groups * 2 * layout.scale_dtype.itemsize
            assert (layout.codes_bytes, layout.pairs_bytes) == (codes_bytes, pairs_bytes)
            assert layout.num_groups == num_groups
            assert layout.row_bytes == layout.used_bytes == codes_bytes + pairs_bytes
            starts = (pairs_bytes, 0) if layout.scale_first else (0, codes_bytes)
            assert (layout.codes_start, layout.pairs_start) == starts
            padded = RowLayout(
                bits, dim, scale_dtype=layout.scale_dtype, scale_first=layout.scale_first, group_size=layout.group_size
                if num_groups > 1 else None, row_bytes=layout.used_bytes + 3,
            )  # fmt: skip
            assert (padded.used_bytes, padded.row_bytes) == (layout.used_bytes, layout.used_bytes + 3)
            assert (padded.codes_start, padded.pairs_start) == starts


def test_the_defaults_are_pytorchs(bits: int) -> None:
    layout = RowLayout(bits, 13)
    assert layout == RowLayout(bits, 13, scale_dtype=USUAL[bits], scale_first=False, group_size=16)
    assert layout.scale_dtype == np.dtype(USUAL[bits])
    assert (layout.num_groups, layout.group_size, layout.scale_first) == (1, 13, False)
    assert RowLayout(bits, 48, group_size=48) == RowLayout(bits, 48, group_size=2**80) == RowLayout(bits, 48)


def test_rows_are_packed_and_read_as_by_hand(bits: int) -> None:
    for dim in (1, 3, 16, 33, 50, 64):
        for tight in layouts_of(bits, dim):
            for more in (0, 5):
                options = {name: value for name, value in tight.not_default().items() if name != "row_bytes"}
                layout = RowLayout(bits, dim, **options, row_bytes=tight.used_bytes + more)
                codes, pairs = some_parts(layout)
                rows = layout.pack(codes, pairs)
                assert [row.tobytes() for row in rows] == list(map(row_by_hand, [layout] * 5, codes, pairs))
                assert np.array_equal(layout.codes(rows), codes)
                assert np.array_equal(layout.pairs(rows), pairs)
                assert layout.pairs(rows).dtype == np.float32
                assert layout.pairs(rows[:0]).shape == (0, layout.num_groups, 2)
                assert layout.pack(codes[:0], pairs[:0]).shape == (0, layout.row_bytes)


def test_layouts_are_equal_where_all_is(bits: int) -> None:
    made = layouts_of(bits, 96) + layouts_of(bits, 97) + [RowLayout(bits, 96, row_bytes=400)]
    made += [RowLayout(bits, 96, row_bytes=401), RowLayout(bits, 96, row_bytes=400, scale_first=True)]
    for one, other in itertools.product(made, made):
        assert (one == other) == (one is other)
        assert one is not other or hash(one) == hash(other)
    for one in made:
        again = eval(repr(one), {"RowLayout": RowLayout})
        for same in (again, pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
            assert same == one
            assert hash(same) == hash(one)
            assert repr(same) == repr(one)
    assert RowLayout(bits, 5) != "RowLayout"


def test_the_repr_of_a_layout_shows_what_is_not_default() -> None:
    assert repr(RowLayout(4, 33)) == "RowLayout(bits=4, dim=33)"
    assert repr(RowLayout(4, 33, scale_dtype="float16", group_size=48)) == "RowLayout(bits=4, dim=33)"
    layout = RowLayout(4, 33, scale_dtype=np.float32, scale_first=True, group_size=16, row_bytes=64)
    shown = "RowLayout(bits=4, dim=33, scale_dtype='float32', scale_first=True, group_size=16, row_bytes=64)"
    assert repr(layout) == shown


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bits": 3}, ValueError, "bits must be 8, 4 or 2, got 3"),
        ({"dim": 0}, ValueError, "dim must be from 1 to "),
        ({"dim": 2**70}, ValueError, "dim must be from 1 to "),
        ({"dim": 1.5}, TypeError, "dim must be a whole number, got float 1.5"),
        ({"scale_dtype": "float64"}, ValueError, "scale_dtype must be float32 or float16, got float64"),
        ({"scale_dtype": "so"}, TypeError, "scale_dtype must be float32 or float16, got 'so'"),
        ({"scale_first": 3}, TypeError, "scale_first must be True or False, got int 3"),
        ({"group_size": 20}, ValueError, "group_size must be a multiple of 16, at least 16, got 20"),
        ({"row_bytes": 19}, ValueError, f"row_bytes must be from 20 to {sys.maxsize} for codes and pairs of a dim of 32"),
        ({"row_bytes": 2**64}, ValueError, "row_bytes must be from 20 to "),
        ({"row_bytes": "20"}, TypeError, "row_bytes must be a whole number, got str '20'"),
    ],
)  # fmt: skip
def test_a_layout_of_wrong_numbers_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        RowLayout(**({"bits": 4, "dim": 32} | given))
    assert str(caught.value).startswith(message)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_a_table_has_the_layout_of_its_arguments(bits: int) -> None:
    for layout in layouts_of(bits, 100):
        codes, pairs = some_parts(layout)
        rows = layout.pack(codes, pairs)
        table = table_of(layout, rows)
        assert table.layout == layout
        assert type(table.layout) is RowLayout
        assert np.array_equal(table.codes(), codes)
        expected = pairs if layout.num_groups > 1 else pairs[:, 0]
        for part, name in enumerate(("scales", "biases")):
            given = getattr(table, name)
            assert given.dtype == np.float32
            assert given.flags.c_contiguous
            assert np.array_equal(given, expected[..., part])
        assert np.shares_memory(table.data, rows)
        assert table.row_bytes == layout.row_bytes


def test_without_dim_a_row_is_full(bits: int) -> None:
    """The largest dim whose codes and pairs are as many bytes; where there is none, the error says that `dim` may be."""
    for scale_dtype, group_size in itertools.product(("float32", "float16"), (None, 16, 32, 64)):
        options = {"scale_dtype": scale_dtype, "group_size": group_size}
        used = [RowLayout(bits, dim, **options).used_bytes for dim in range(1, 400)]
        for row_bytes in range(100):
            data = np.zeros((2, row_bytes), np.uint8)
            fitting = [dim for dim, size in enumerate(used, 1) if size == row_bytes]
            smaller = [dim for dim, size in enumerate(used, 1) if size <= row_bytes]
            if fitting:
                assert QuantizedTable(data, bits, **options).dim == fitting[-1]
            elif smaller:
                with pytest.raises(
                    ValueError, match=r"^data must have rows that .*, or dim must be given, which makes "
                ):
                    QuantizedTable(data, bits, **options)
            else:
                with pytest.raises(ValueError, match=r"^data must have rows of at least [359] bytes at \d bits"):
                    QuantizedTable(data, bits, **options)
            for dim in {1, 5, 16, 17, (smaller or [1])[-1]} & set(smaller):
                layout = QuantizedTable(data, bits, dim=dim, **options).layout
                assert (layout.dim, layout.row_bytes, layout.used_bytes) == (dim, row_bytes, used[dim - 1])
            if smaller:
                message = rf"^dim must be from 1 to {smaller[-1]} for rows of {row_bytes} bytes at {bits} bits, got "
                for dim in (smaller[-1] + 1, 0, -1, 10**30):
                    with pytest.raises(ValueError, match=message):
                        QuantizedTable(data, bits, dim=dim, **options)


def test_padding_is_not_read(bits: int) -> None:
    """What stands in it changes nothing that a table says."""
    for tight in layouts_of(bits, 40):
        codes, pairs = some_parts(tight)
        rows = np.full((5, tight.used_bytes + 7), 255, np.uint8)
        rows[:, : tight.used_bytes] = tight.pack(codes, pairs)
        table = table_of(tight, rows)
        assert table.layout.used_bytes == tight.used_bytes
        assert table.row_bytes == rows.shape[1]
        assert np.array_equal(table.codes(), codes)
        assert np.array_equal(table.layout.pairs(rows), pairs)


def test_the_repr_of_a_table_shows_what_is_not_default() -> None:
    data = np.zeros((3, 64), np.uint8)
    expected = "QuantizedTable(num_embeddings=3, dim=56, bits=8, nbytes=192)"
    assert repr(QuantizedTable(data, 8)) == repr(QuantizedTable(data, 8, scale_dtype="f4", group_size=64)) == expected
    table = QuantizedTable(data, 4, dim=20, scale_dtype="float32", scale_first=True, group_size=16)
    assert repr(table) == (
        "QuantizedTable(num_embeddings=3, dim=20, bits=4, scale_dtype=float32, scale_first=True, group_size=16, "
        "row_bytes=64, nbytes=192)"
    )


def some_table(layout: RowLayout) -> QuantizedTable:
    rows = layout.pack(*some_parts(layout))
    return table_of(layout, rows, compressed_indices_mapping=[3, -1, 0, 4, 4])


def test_copies_and_pruned_tables_keep_the_layout(bits: int) -> None:
    for tight in layouts_of(bits, 70):
        layout = RowLayout(bits, 70, **tight.not_default(), row_bytes=tight.used_bytes + 2)
        table = some_table(layout)
        for again in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            other = again(table)
            assert other.layout == layout
            assert np.array_equal(other.data, table.data)
            assert np.array_equal(other.compressed_indices_mapping, [3, -1, 0, 4, 4])
        small = table.prune([0, 1, 3])
        assert small.layout == layout
        assert np.array_equal(small.compressed_indices_mapping, [0, -1, -1, 1, -1])
        assert np.array_equal(small.data, table.data[[3, 4]])


def test_a_subclass_of_other_arguments_keeps_the_layout() -> None:
    class Own(QuantizedTable):
        __slots__ = ()

        def __init__(self) -> None:
            super().__init__(np.zeros((2, 24), np.uint8), 8, dim=5, scale_first=True)

    own = Own()
    for other in (own.prune([0]), own.to_layout(scale_first=True, row_alignment=24), copy.copy(own)):
        assert type(other) is Own
        assert other.layout == own.layout


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"scale_dtype": "int8"}, ValueError, "scale_dtype must be float32 or float16, got int8"),
        ({"scale_dtype": [1, 2]}, TypeError, "scale_dtype must be float32 or float16, got [1, 2]"),
        ({"scale_first": "yes"}, TypeError, "scale_first must be True or False, got str 'yes'"),
        ({"group_size": 17}, ValueError, "group_size must be a multiple of 16, at least 16, got 17"),
        ({"group_size": "16"}, TypeError, "group_size must be a whole number, got str '16'"),
    ],
)
def test_wrong_options_are_refused(bits: int, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        QuantizedTable(np.zeros((2, 40), np.uint8), bits, **given)


# ---- From one layout to another --------------------------------------------------------------------------------------


def test_a_table_goes_to_every_layout_and_back(bits: int) -> None:
    """From one group to smaller ones and back, float16 to float32 and back; into other orders and lengths."""
    for dim in (1, 16, 50, 96, 130):
        plain = RowLayout(bits, dim, scale_dtype="float16")
        table = some_table(plain)
        codes, pairs = table.codes(), plain.pairs(table.data)
        for scale_dtype, first, group_size, alignment in itertools.product(
            ("float32", "float16"), (False, True), (None, 16, 48, 64), (1, 16)
        ):
            options = {"scale_dtype": scale_dtype, "scale_first": first, "group_size": group_size}
            other = table.to_layout(**options, row_alignment=alignment)
            used = RowLayout(bits, dim, **options).used_bytes
            layout = RowLayout(bits, dim, **options, row_bytes=-(-used // alignment) * alignment)
            assert other.layout == layout
            expected = layout.pack(codes, np.repeat(pairs, layout.num_groups, axis=1))
            assert np.array_equal(other.data, expected)
            assert np.array_equal(other.compressed_indices_mapping, table.compressed_indices_mapping)
            assert not np.shares_memory(other.compressed_indices_mapping, table.compressed_indices_mapping)
            assert not np.shares_memory(other.data, table.data)
            back = other.to_layout(scale_dtype="float16")
            assert np.array_equal(back.data, table.data)
            assert back.layout == plain


def test_without_arguments_it_is_pytorchs_layout(bits: int) -> None:
    weights = np.random.default_rng(2).normal(size=(30, 45)).astype(np.float32)
    table = qembag.quantize(weights, bits)
    other = table.to_layout(scale_first=True, group_size=16, row_alignment=64)
    assert other.layout != table.layout
    assert np.array_equal(other.to_layout().data, table.data)
    assert other.to_layout().layout == RowLayout(bits, 45)


def test_padding_and_unused_bits_are_written_as_0(bits: int) -> None:
    dim = 17
    rows = np.full((3, 40), 255, np.uint8)
    rows[:, 5:] = 0xF8
    table = QuantizedTable(rows, bits, dim=dim, scale_dtype="float16")
    other = table.to_layout(scale_dtype="float16", row_alignment=64)
    assert np.array_equal(other.data, RowLayout(bits, dim, scale_dtype="float16", row_bytes=64).pack(
        table.codes(), table.layout.pairs(rows)
    ))  # fmt: skip


def test_groups_that_do_not_divide_each_other(bits: int) -> None:
    """Groups of 48 into groups of 32: the second of these has elements of two, and the fifth."""
    layout = RowLayout(bits, 150, group_size=48)
    codes, pairs = some_parts(layout)
    pairs[:, 1], pairs[:, 3] = pairs[:, 0], pairs[:, 2]
    rows = layout.pack(codes, pairs)
    target = RowLayout(bits, 150, group_size=32)
    with pytest.raises(ValueError, match=r"got row 0 with scale .* for elements 48 to 95, and .* elements 96 to 143$"):
        table_of(layout, rows).to_layout(group_size=64)
    other = table_of(layout, rows).to_layout(group_size=32)
    assert np.array_equal(other.data, target.pack(codes, pairs[:, [0, 0, 1, 2, 2]]))
    with pytest.raises(ValueError, match=r"^group_size must not join groups whose scales or biases differ, got row 0 "):
        table_of(layout, rows).to_layout()


@pytest.mark.parametrize(("part", "value"), [(0, 2.0), (1, 2.0), (1, -0.0)])
def test_the_first_row_whose_groups_differ_in_a_bit_is_named(bits: int, part: int, value: float) -> None:
    layout = RowLayout(bits, 64, group_size=16)
    rows = np.zeros((100_000, layout.row_bytes), np.uint8)
    pairs = np.zeros((1, 4, 2), np.float32)
    pairs[0, 2, part] = value
    rows[70_001] = rows[99_999] = layout.pack(np.zeros((1, 64), np.uint8), pairs)[0]
    table = table_of(layout, rows)
    shown = ["0", "0"]
    shown[part] = f"{value:.9g}"
    message = (
        "group_size must not join groups whose scales or biases differ, got row 70001 with scale 0 and bias 0 for "
        f"elements 16 to 31, and scale {shown[0]} and bias {shown[1]} for elements 32 to 47"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        table.to_layout()
    with pytest.raises(ValueError, match=r"got row 70001 .* for elements 32 to 47, and .* for elements 48 to 63$"):
        table.to_layout(group_size=32)
    rows[70_001] = rows[99_999] = 0
    assert table.to_layout(group_size=32).layout.num_groups == 2


@pytest.mark.parametrize(
    ("scale", "bias", "what"),
    [
        (0.1, 0, "a scale of 0.100000001"),
        (1, 65520, "a bias of 65520"),
        (1, -70000, "a bias of -70000"),
        (2.0**-25, 0, "a scale of 2.98023224e-08"),
        (1, 1 + 2.0**-11, "a bias of 1.00048828"),
    ],
)
def test_the_first_row_whose_pair_is_no_half_is_named(bits: int, scale: float, bias: float, what: str) -> None:
    layout = RowLayout(bits, 40, scale_dtype="float32", group_size=16)
    pairs = np.ones((9, 3, 2), np.float32)
    pairs[6, 1] = pairs[8, 0] = scale, bias
    table = table_of(layout, layout.pack(np.zeros((9, 40), np.uint8), pairs))
    start = "scale_dtype must be float32 where float16 does not hold each scale and bias exactly, got row 6"
    message = re.escape(f"{start} (group 1, elements 16 to 31) with {what}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        table.to_layout(scale_dtype="float16", group_size=16)
    one_group = table_of(RowLayout(bits, 16, scale_dtype="float32"), RowLayout(bits, 16, scale_dtype="float32").pack(
        np.zeros((9, 16), np.uint8), pairs[:, 1:2]
    ))  # fmt: skip
    with pytest.raises(ValueError, match=f"^{re.escape(f'{start} with {what}')}$"):
        one_group.to_layout(scale_dtype="float16")


def test_whichever_row_is_first_is_named() -> None:
    layout = RowLayout(8, 32, group_size=16)
    pairs = np.ones((5, 2, 2), np.float32)
    pairs[2, :, 0] = 0.1
    pairs[3, 1, 0] = 2
    for first, message in [(0, "^scale_dtype must .* got row 2 "), (3, "^group_size must .* got row 0 ")]:
        table = table_of(layout, layout.pack(np.zeros((5, 32), np.uint8), pairs)[first:])
        with pytest.raises(ValueError, match=message):
            table.to_layout(scale_dtype="float16")


def test_halves_of_every_kind_go_to_float32_and_back() -> None:
    """Each of the 65,536, so denormals, infinities and NaN too; of NaN the payload may change."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    layout = RowLayout(4, 2)
    with np.errstate(invalid="ignore"):
        rows = np.zeros((65536, layout.row_bytes), np.uint8)
        rows[:, 1:] = np.stack([halves, halves[::-1]], axis=1).astype("<f2").view(np.uint8)
        wide = QuantizedTable(rows, 4).to_layout(scale_dtype="float32")
        back = wide.to_layout()
    pairs = back.data[:, 1:].copy().view("<f2")
    given = rows[:, 1:].copy().view("<f2")
    same = (pairs.view(np.uint16) == given.view(np.uint16)) | (np.isnan(pairs) & np.isnan(given))
    assert same.all()
    assert (wide.scales[~np.isnan(halves)] == halves[~np.isnan(halves)]).all()


def test_an_infinity_and_a_nan_are_halves_and_equal_in_their_bits() -> None:
    layout = RowLayout(2, 32, scale_dtype="float32", group_size=16)
    pairs = np.array([[[np.inf, -np.inf]] * 2, [[np.nan, 1]] * 2], np.float32)
    table = table_of(layout, layout.pack(np.zeros((2, 32), np.uint8), pairs)).to_layout()
    assert table.scales[0] == np.inf
    assert table.biases[0] == -np.inf
    assert np.isnan(table.scales[1])


def test_tables_without_rows_change_their_layout(bits: int) -> None:
    for layout in layouts_of(bits, 50):
        table = table_of(layout, np.zeros((0, layout.row_bytes), np.uint8))
        for target in layouts_of(bits, 50):
            assert table.to_layout(**target.not_default() | {"scale_dtype": target.scale_dtype}).layout == target
        assert table.prune([]).layout == layout


def test_strided_rows_change_their_layout(bits: int) -> None:
    layout = RowLayout(bits, 50)
    rows = layout.pack(*some_parts(layout, 12))
    for given in (rows[::-3], np.repeat(rows, 2, axis=1)[:, : layout.row_bytes], np.broadcast_to(rows[:1], rows.shape)):
        table = QuantizedTable(given, bits, dim=50)
        other = table.to_layout(scale_first=True)
        assert np.array_equal(other.codes(), table.codes())
        assert np.array_equal(other.scales, table.scales, equal_nan=True)


# ---- PyTorch's operators ---------------------------------------------------------------------------------------------


def test_unpacking_per_channel_tables_of_several_groups_is_refused(bits: int) -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(2, 32) % 4
    table = ops.embedding_bag_prepack(codes, [1.0, 2.0], [0.0, 1.0], bits)
    other = table.to_layout(scale_first=True, row_alignment=32)
    for given, expected in zip(ops.embedding_bag_unpack(other), (codes, [1, 2], [0, 1]), strict=True):
        assert np.array_equal(given, expected)
    with pytest.raises(ValueError, match=r"^packed must have one scale a row, got rows of 2 groups$"):
        ops.embedding_bag_unpack(table.to_layout(group_size=16))


# ---- Padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [lambda table: table.prune([0, 2]), lambda table: pickle.loads(pickle.dumps(table))],
                         ids=["prune", "pickle"])  # fmt: skip
def test_the_padding_of_copies_is_zeros(copied):
    """What stands there may be another's."""
    table = QuantizedTable(np.full((3, 64), 0xAB, np.uint8), 8, dim=32, scale_dtype="float16", scale_first=True)
    found = copied(table)
    assert found.layout == table.layout
    assert (found.data[:, :36] == 0xAB).all()
    assert (found.data[:, 36:] == 0).all()
