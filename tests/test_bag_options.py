"""Options of bags, for quantized tables of several layouts: `lengths`, `invalid`, averages, weights of float64, outputs
of bfloat16. The oracle's bits, and the errors' texts. `test_float_tables.py` runs the same variants over floats."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import qembag
import reference
from qembag import ops
from support.arrays import place
from support.floats import same_floats
from support.layouts import LAYOUTS, Layout, bag_offsets, rows_of, spread
from support.variants import VARIANTS, Parts, parts_of

NUM_ROWS = 9
KINDS = [*LAYOUTS.values(), *(layout for layout in spread(13) if layout not in LAYOUTS.values())]
DIMS = (1, 5, 16, 33, 70, 150)
ENDS = {"short": np.array([0, 0, 1, 3, 3, 10, 12]), "long": np.array([0, 0, 30, 33])}

over_kinds = pytest.mark.parametrize("layout", KINDS, ids=str)


@dataclass(frozen=True)
class Case:
    layout: Layout
    dim: int
    length: str
    extremes: bool = False

    @functools.cached_property
    def rows(self) -> np.ndarray:
        return rows_of(np.random.default_rng([self.dim, 1]), self.layout, NUM_ROWS, self.dim, self.extremes)

    @functools.cached_property
    def parts(self) -> Parts:
        return parts_of(np.random.default_rng([self.dim, 2]), NUM_ROWS, ENDS[self.length], self.extremes)

    def ours(self, variant: str, **more: Any) -> np.ndarray:
        table = qembag.QuantizedTable(
            self.rows, self.layout.bits, dim=self.dim, **self.layout.keywords(),
            compressed_indices_mapping=VARIANTS[variant].mapping(self.parts),
        )  # fmt: skip
        return VARIANTS[variant].ours(table, self.parts, **more)

    @functools.cache  # noqa: B019  # for as long as the tests run
    def expected(self, variant: str) -> np.ndarray:
        oracle = functools.partial(
            reference.embedding_bag, self.rows, self.layout.bits, self.dim, **self.layout.reading()
        )
        return VARIANTS[variant].expected(oracle, self.parts)


case_of = functools.cache(Case)


@over_kinds
@pytest.mark.parametrize("length", ENDS)
def test_every_option_gives_the_oracles_bits(level, layout, length, same_bits):
    for dim in DIMS:
        case = case_of(layout, dim, length)
        for variant in VARIANTS:
            same_floats(case.ours(variant), case.expected(variant))


@over_kinds
def test_extremes_give_the_oracles_bits(level, layout, same_bits):
    """Of scales, biases and weights: divisors that are infinite, NaN, denormal, 0 or -0 too."""
    for dim in (3, 40):
        case = case_of(layout, dim, "short", True)
        for variant in VARIANTS:
            same_floats(case.ours(variant), case.expected(variant))


@pytest.mark.parametrize("output", ["float16", "bfloat16"])
def test_an_output_of_two_bytes_is_written_and_nothing_beside_it(level, bits, output, same_bits):
    variant = {"float16": "float16", "bfloat16": "bfloat16"}[output]
    for dim in (1, 3, 15, 16, 17, 40, 150):
        case = case_of(LAYOUTS[bits], dim, "short")
        expected = case.expected(variant)
        whole = np.full((len(expected), dim + 5), 77, expected.dtype)
        out = whole[:, 3 : 3 + dim]
        assert case.ours(variant, out=out) is out
        same_bits(out.copy(), expected)
        out[...] = 77
        assert (whole == 77).all()


@functools.cache
def many_bags(bits: int, mode: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(bits)
    rows = rows_of(rng, LAYOUTS[bits], 50, 130)
    ends = bag_offsets(rng, 1000, 10)
    indices, weights = rng.integers(-2, 53, ends[-1]), rng.normal(size=ends[-1])
    expected = reference.embedding_bag(
        rows, bits, 130, indices, ends, mode=mode, weights=weights, include_last_offset=True, invalid="skip",
        padding_idx=1, bfloat16=True,
    )  # fmt: skip
    return rows, indices, ends, weights, expected


@pytest.mark.parametrize("mode", ["sum", "average", "sqrtn"])
def test_every_thread_count_gives_the_oracles_bits(level, threads, bits, mode, same_bits):
    rows, indices, ends, weights, expected = many_bags(bits, mode)
    table = qembag.QuantizedTable(rows, bits, dim=130)
    given = {"mode": mode, "per_sample_weights": weights, "invalid": "skip", "padding_idx": 1, "dtype": "bfloat16"}
    same_bits(qembag.embedding_bag(table, indices, ends, include_last_offset=True, **given), expected)
    same_bits(qembag.embedding_bag(table, indices, lengths=np.diff(ends), **given), expected)


# ---- One table of each sort --------------------------------------------------------------------------------------------

DIM = 6
VALUES = np.arange(60, dtype=np.float32).reshape(10, DIM)
TABLES = {
    "8 bits": lambda mapping: qembag.QuantizedTable(
        qembag.quantize(VALUES, 8).data, 8, compressed_indices_mapping=mapping
    ),
    "2 bits, grouped": lambda mapping: qembag.QuantizedTable(
        qembag.quantize(VALUES, 2, group_size=16).data, 2, dim=DIM, group_size=16, compressed_indices_mapping=mapping
    ),
    "floats": lambda mapping: qembag.FloatTable(VALUES, compressed_indices_mapping=mapping),
    "halves": lambda mapping: qembag.FloatTable(VALUES.astype(np.float16), compressed_indices_mapping=mapping),
}
over_tables = pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)


def refused(error: type[Exception], message: str, call: Any, shape: tuple[int, ...] = (3, DIM)) -> None:
    """Without an output, and with one of each type, which is left alone."""
    outs = [np.full(shape, 77, np.float32), np.full(shape, 77, np.float16)]
    for given in ({}, *({"out": out} for out in outs)):
        with pytest.raises(error) as caught:
            call(**given)
        assert type(caught.value) is error
        assert re.match(message, str(caught.value)), str(caught.value)
    assert all((out == 77).all() for out in outs)


INDICES = np.array([3, 1, 4, 1, 5, 9])
LENGTHS = np.array([2, 0, 4])
OFFSETS = np.array([0, 2, 2])


# ---- lengths -----------------------------------------------------------------------------------------------------------


@over_tables
@pytest.mark.parametrize("kind", ["i4", "i8", "u8", "i2", "u1", "list", ">i4", ">i8"])
def test_lengths_of_any_integers_are_the_same_bags(level, make, kind, same_bits):
    lengths = LENGTHS.tolist() if kind == "list" else LENGTHS.astype(kind)
    weights = np.linspace(-1, 2, 6, dtype=np.float32)
    for index_type in (np.int32, np.int64):
        for given in ({}, {"per_sample_weights": weights}, {"mode": "mean"}, {"mode": "max"}, {"padding_idx": 1}):
            ours = qembag.embedding_bag(make(None), INDICES.astype(index_type), lengths=lengths, **given)
            same_bits(ours, qembag.embedding_bag(make(None), INDICES, OFFSETS, **given))


@over_tables
@pytest.mark.parametrize("way", ["strided", "reversed", "misaligned", "swapped", "read-only", "subclass", "method"])
def test_lengths_in_any_memory_are_the_same_bags(level, make, way, same_bits):
    expected = qembag.embedding_bag(make(None), INDICES, OFFSETS)
    for kind in (np.int32, np.int64):
        lengths = place(LENGTHS.astype(kind), way).value
        same_bits(qembag.embedding_bag(make(None), INDICES, lengths=lengths), expected)


@over_tables
def test_lengths_of_many_bags_are_those_of_offsets(level, threads, make, rng, same_bits):
    ends = bag_offsets(rng, 3000, 12)
    indices = rng.integers(0, 10, ends[-1])
    ours = qembag.embedding_bag(make(None), indices, lengths=np.diff(ends))
    same_bits(ours, qembag.embedding_bag(make(None), indices, ends, include_last_offset=True))


@over_tables
def test_no_lengths_are_no_bags(level, make):
    for lengths in ([], np.zeros(0, np.int32)):
        assert qembag.embedding_bag(make(None), [], lengths=lengths).shape == (0, DIM)
    zeros = qembag.embedding_bag(make(None), [], lengths=[0, 0])
    assert zeros.shape == (2, DIM)
    assert not zeros.any()


@over_tables
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, -1, 5], r"lengths\[1\] is -1"),
        ([-1, -1, 8], r"lengths\[0\] is -1"),
        ([2, 0, -(2**63)], rf"lengths\[2\] is {-(2**63)}"),
        ([2, 0, 3], "lengths .*5"),
        ([2, 0, 5], "lengths .*7"),
        ([0, 0, 0], "lengths "),
        ([], "lengths "),
        ([2**62, 2**62, 2**62], "lengths"),
        ([2**62, 2**62, 6], "lengths"),
        ([2**63 - 1, 2**63 - 1, 8], "lengths"),
        ([2**63 - 1, 1, 0], "lengths"),
        (np.array([2**64 - 1, 7, 0], np.uint64), "lengths"),
        (np.array([2**64 - 6, 6, 6], np.uint64), "lengths"),
        (np.array([2**63, 2**63, 6], np.uint64), "lengths"),
        (np.array([2**31 - 1, 2**31 - 1, 8], np.int32), "lengths"),
        (np.array([-(2**31), 2**31 - 1, 7], np.int32), r"lengths\[0\] is -2147483648"),
        ([[2, 4]], "lengths must have 1 dimension"),
        (6, "lengths must have 1 dimension"),
    ],
)
def test_wrong_lengths_are_refused(level, make, lengths, message):
    num_bags = np.asarray(lengths).shape[0] if np.ndim(lengths) else 3
    call = functools.partial(qembag.embedding_bag, make(None), INDICES, lengths=lengths)
    refused(ValueError, message, call, (num_bags, DIM))
    refused(ValueError, message, functools.partial(call, invalid="skip", mode="average"), (num_bags, DIM))


@over_tables
@pytest.mark.parametrize("lengths", ["no", 1.5, [2.0, 4.0], [True, False], np.array([2, 4], object), {2, 4}])
def test_lengths_of_no_integers_are_refused(make, lengths):
    refused(
        TypeError,
        "lengths must be an array",
        functools.partial(qembag.embedding_bag, make(None), INDICES, lengths=lengths),
    )


@over_tables
def test_lengths_stand_alone(make):
    call = functools.partial(qembag.embedding_bag, make(None), lengths=LENGTHS)
    words = "(lengths|offsets|include_last_offset|indices) "
    refused(ValueError, words, functools.partial(call, INDICES, OFFSETS))
    refused(ValueError, words, functools.partial(call, INDICES, include_last_offset=True))
    refused(ValueError, words, functools.partial(call, INDICES.reshape(3, 2)))
    refused(ValueError, words, functools.partial(call, INDICES.reshape(3, 2), OFFSETS))
    refused(ValueError, "offsets ", functools.partial(qembag.embedding_bag, make(None), INDICES))


@over_tables
def test_an_index_out_of_range_names_its_bag_of_lengths(level, make):
    indices = INDICES.copy()
    indices[3] = 10
    call = functools.partial(qembag.embedding_bag, make(None), indices, lengths=LENGTHS)
    refused(IndexError, r"indices\[3\] is 10 \(bag 2\): out of range for a table of 10 rows", call)


def test_an_output_shares_no_memory_with_lengths():
    memory = np.zeros(3 * DIM, np.float32)
    lengths = memory.view(np.int64)[:3]
    lengths[...] = LENGTHS
    for given in (lengths, lengths[::1]):
        with pytest.raises(ValueError, match=r"^out must share no memory with lengths"):
            qembag.embedding_bag(TABLES["floats"](None), INDICES, lengths=given, out=memory.reshape(3, DIM))
    assert lengths.tolist() == LENGTHS.tolist()


# ---- invalid -----------------------------------------------------------------------------------------------------------


@over_tables
@pytest.mark.parametrize("invalid", ["Raise", "", None, 0, True, b"skip", ["skip"], "ignore", "skip "])
def test_another_word_for_invalid_is_refused(make, invalid):
    message = "invalid must be 'raise' or 'skip', got "
    refused(ValueError, message, functools.partial(qembag.embedding_bag, make(None), INDICES, OFFSETS, invalid=invalid))
    refused(ValueError, message, functools.partial(qembag.embedding, make(None), INDICES, invalid=invalid), (6, DIM))


WRONG = [-1, 10, -10, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)]


@over_tables
@pytest.mark.parametrize("index_type", [np.int32, np.int64])
def test_an_index_out_of_range_is_as_if_it_were_not_there(level, make, index_type, same_bits):
    """In bags of each mode, and for each number of indices to skip."""
    weights = np.linspace(-1, 2, 6)
    for wrong in WRONG[: 5 if index_type is np.int32 else None]:
        for places in ([0], [3], [5], [0, 1], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]):
            indices = INDICES.astype(index_type)
            indices[places] = wrong
            kept = np.setdiff1d(np.arange(6), places)
            lengths = [int((kept < 2).sum()), 0, int((kept >= 2).sum())]
            for mode in ("sum", "mean", "max", "average", "sqrtn"):
                given = {} if mode == "max" else {"per_sample_weights": weights}
                less = {} if mode == "max" else {"per_sample_weights": weights[kept]}
                ours = qembag.embedding_bag(make(None), indices, OFFSETS, mode=mode, invalid="skip", **given)
                theirs = qembag.embedding_bag(make(None), INDICES[kept], lengths=lengths, mode=mode, **less)
                same_bits(ours, theirs)
            square = qembag.embedding_bag(make(None), indices.reshape(1, 6), invalid="skip")
            same_bits(square, qembag.embedding_bag(make(None), INDICES[kept], [0]))


@over_tables
def test_skipping_is_as_if_they_were_padding(level, make, same_bits):
    """With pruned rows, which are counted, padding, which is not, and weights."""
    mapping = np.int32([3, -1, 0, -1, 9, 5])
    indices = np.array([0, -1, 1, 2, 6, 3, 5, 2, 4, 77])
    padded = np.where((indices < 0) | (indices > 5), 2, indices)
    weights = np.linspace(-1, 2, 10)
    for mode in ("sum", "mean", "average", "sqrtn"):
        for given in ({}, {"per_sample_weights": weights}):
            ours = qembag.embedding_bag(
                make(mapping), indices, [0, 4, 4], mode=mode, padding_idx=2, invalid="skip", **given
            )
            same_bits(ours, qembag.embedding_bag(make(mapping), padded, [0, 4, 4], mode=mode, padding_idx=2, **given))


@over_tables
def test_single_rows_out_of_range_are_zeros(level, make, same_bits):
    mapping = np.int32([3, -1, 0])
    for by, count in ((None, 10), (mapping, 3)):
        table = make(by)
        indices = np.array([[0, -1, count - 1], [count, 2**40, 1], [-(2**63), 2, 2**63 - 1]])
        is_right = (indices >= 0) & (indices < count)
        expected = np.where(is_right[..., None], table.dequantize(np.where(is_right, indices, 0)), np.float32(0))
        same_bits(qembag.embedding(table, indices, invalid="skip"), expected)
        for kind in (np.float32, np.float16):
            out = np.full((3, 3, DIM), 77, kind)
            assert qembag.embedding(table, indices, invalid="skip", out=out) is out
            same_bits(out, expected.astype(kind))
        with pytest.raises(IndexError, match=r"^indices\[0, 1\] is -1|^indices\[1\] is -1"):
            qembag.embedding(table, indices)
        with pytest.raises(IndexError, match=r"^indices"):
            qembag.embedding(table, indices, invalid="raise")
    same_bits(qembag.embedding(make(None), np.uint64([2**64 - 1, 3]), invalid="skip")[0], np.zeros(DIM, np.float32))


@over_tables
def test_offsets_are_checked_where_indices_are_skipped(level, make):
    for offsets in ([0, 7, 7], [0, 3, 2], [-1, 2, 2], [0, 2, 2**40]):
        refused(
            ValueError,
            r"offsets\[\d\] is",
            functools.partial(qembag.embedding_bag, make(None), INDICES, offsets, invalid="skip"),
        )


@over_tables
def test_a_mapped_row_out_of_range_is_an_error_where_indices_are_skipped(level, make):
    mapping = np.int32([3, 1, 0])
    table = make(mapping)
    mapping[1] = 10
    call = functools.partial(qembag.embedding_bag, table, [0, -1, 1], [0, 1, 1], invalid="skip")
    refused(IndexError, r"compressed_indices_mapping\[1\] is 10", call)
    call = functools.partial(qembag.embedding, table, [0, -1, 1], invalid="skip")
    refused(IndexError, r"compressed_indices_mapping\[1\] is 10", call)


# ---- Averages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["average", "sqrtn"])
@over_tables
def test_a_divisor_of_zero_gives_zero(level, make, mode):
    cases = [[0, 0], [-0.0, 0]] + ([[1, -1], [3e38, -3e38]] if mode == "average" else [[1e-30, -1e-30]])
    for weights in cases:
        for output in (None, np.float16, "bfloat16"):
            ours = qembag.embedding_bag(make(None), [[8, 9]], mode=mode, per_sample_weights=[weights], dtype=output)
            assert not ours.view(np.uint8).any()
    assert not qembag.embedding_bag(make(None), [], [0, 0], mode=mode).view(np.uint8).any()
    assert not qembag.embedding_bag(make(None), [[3, 3]], mode=mode, padding_idx=3).view(np.uint8).any()
    assert not qembag.embedding_bag(make(None), [[-3, 33]], mode=mode, invalid="skip").view(np.uint8).any()


@over_tables
def test_an_average_is_what_its_name_says(level, make, rng):
    """Near what NumPy and TensorFlow's definitions give in float64."""
    table = make(None)
    values = table.dequantize().astype(np.float64)
    indices, weights = rng.integers(0, 10, (5, 7)), rng.random((5, 7)).astype(np.float32)
    rows = values[indices]
    plain = {"per_sample_weights": weights}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    close(
        qembag.embedding_bag(table, indices, mode="average", **plain),
        [np.average(bag, axis=0, weights=given) for bag, given in zip(rows, weights, strict=True)],
    )
    root = np.sqrt((weights.astype(np.float64) ** 2).sum(axis=1))
    close(
        qembag.embedding_bag(table, indices, mode="sqrtn", **plain),
        (rows * weights[..., None]).sum(axis=1) / root[:, None],
    )
    close(qembag.embedding_bag(table, indices, mode="average"), rows.mean(axis=1))
    close(qembag.embedding_bag(table, indices, mode="sqrtn"), rows.sum(axis=1) / np.sqrt(7))


@over_tables
def test_another_mode_is_refused(make):
    for mode in ("Average", "sqrt", "avg", 3, 4, None):
        call = functools.partial(qembag.embedding_bag, make(None), INDICES, OFFSETS, mode=mode)
        refused(ValueError, "mode must be ", call)


def test_operators_have_three_modes(bits):
    rows = rows_of(np.random.default_rng(0), LAYOUTS[bits], 10, 8)
    name = {8: "byte", 4: "4bit", 2: "2bit"}[bits]
    for mode in (3, 4):
        with pytest.raises(ValueError, match=r"^mode must be 0 \(sum\), 1 \(mean\) or 2 \(max\), got "):
            getattr(ops, f"embedding_bag_{name}_rowwise_offsets")(rows, INDICES, OFFSETS, mode=mode)


# ---- Weights of float64, outputs of bfloat16 ---------------------------------------------------------------------------


@over_tables
def test_weights_of_float64_are_rounded_once(level, make, same_bits):
    weights = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e300, -1e-300, np.nan, 0.1])
    with np.errstate(over="ignore", under="ignore"):
        rounded = weights.astype(np.float32)
    for mode in ("sum", "mean", "average", "sqrtn"):
        ours = qembag.embedding_bag(make(None), INDICES, OFFSETS, mode=mode, per_sample_weights=weights)
        theirs = qembag.embedding_bag(make(None), INDICES, OFFSETS, mode=mode, per_sample_weights=rounded)
        same_bits(ours, theirs)
    for way in ("strided", "reversed", "misaligned", "swapped", "read-only", "subclass"):
        lying = place(weights, way).value
        same_bits(
            qembag.embedding_bag(make(None), INDICES, OFFSETS, per_sample_weights=lying),
            qembag.embedding_bag(make(None), INDICES, OFFSETS, per_sample_weights=rounded),
        )


@over_tables
def test_weights_of_float64_are_checked_as_others_are(make):
    call = functools.partial(qembag.embedding_bag, make(None), INDICES, OFFSETS)
    refused(ValueError, "per_sample_weights ", functools.partial(call, per_sample_weights=np.ones(5)))
    refused(ValueError, "per_sample_weights ", functools.partial(call, per_sample_weights=np.ones(0)))
    refused(ValueError, "per_sample_weights ", functools.partial(call, per_sample_weights=np.ones(6), mode="max"))
    refused(TypeError, "per_sample_weights ", functools.partial(call, per_sample_weights=np.ones(6, np.longdouble)))


def test_operators_take_no_weights_of_float64(bits):
    rows = rows_of(np.random.default_rng(0), LAYOUTS[bits], 10, 8)
    name = {8: "byte", 4: "4bit", 2: "2bit"}[bits]
    with pytest.raises(TypeError, match=r"^per_sample_weights must be"):
        getattr(ops, f"embedding_bag_{name}_rowwise_offsets")(rows, INDICES, OFFSETS, per_sample_weights=np.ones(6))


@over_tables
def test_an_output_of_bfloat16_is_asked_for(level, make, same_bits):
    expected = reference.to_bfloat16(qembag.embedding_bag(make(None), INDICES, OFFSETS))
    same_bits(qembag.embedding_bag(make(None), INDICES, OFFSETS, dtype="bfloat16"), expected)
    out = np.zeros((3, DIM), np.uint16)
    assert qembag.embedding_bag(make(None), INDICES, OFFSETS, dtype="bfloat16", out=out) is out
    same_bits(out, expected)
    rows = reference.to_bfloat16(make(None).dequantize() + np.float32(0))
    same_bits(qembag.embedding(make(None), np.arange(10), dtype="bfloat16"), rows)
    # uint16 without the word is no output; nor is another type with it.
    for given, kind in (({}, np.uint16), ({"dtype": "bfloat16"}, np.float32), ({"dtype": "bfloat16"}, np.int16),
                        ({"dtype": np.float16}, np.uint16)):  # fmt: skip
        wrong = np.full((3, DIM), 77, kind)
        with pytest.raises(ValueError, match=r"^out must"):
            qembag.embedding_bag(make(None), INDICES, OFFSETS, out=wrong, **given)
        assert (wrong == 77).all()
    for dtype in (np.uint16, "u2", np.int16):
        with pytest.raises(ValueError, match=r"^dtype must be"):
            qembag.embedding_bag(make(None), INDICES, OFFSETS, dtype=dtype)


@over_tables
def test_a_dtype_of_ml_dtypes_gives_arrays_of_it(level, make, same_bits):
    kind = pytest.importorskip("ml_dtypes").bfloat16
    expected = reference.to_bfloat16(qembag.embedding_bag(make(None), INDICES, OFFSETS))
    ours = qembag.embedding_bag(make(None), INDICES, OFFSETS, dtype=kind)
    assert ours.dtype == kind
    same_bits(ours.view(np.uint16), expected)
    out = np.zeros((3, DIM), kind)
    for given in ({}, {"dtype": kind}, {"dtype": "bfloat16"}):
        assert qembag.embedding_bag(make(None), INDICES, OFFSETS, out=out, **given) is out
        same_bits(out.view(np.uint16), expected)
    for wrong in (np.zeros((3, DIM), np.float16), np.zeros((3, DIM), np.int16), np.zeros((3, DIM), "V2")):
        with pytest.raises(ValueError, match=r"^out must"):
            qembag.embedding_bag(make(None), INDICES, OFFSETS, out=wrong, dtype=kind)
