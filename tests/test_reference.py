"""The oracle's own arithmetic: every other test believes it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import reference
from support.layouts import ALL_KINDS, GROUP_SIZES, PADDINGS, spread

LARGEST = np.finfo(np.float32).max
SMALLEST = np.float32(2.0**-149)


def any_float32(rng: np.random.Generator, count: int) -> np.ndarray:
    """Finite float32 of every exponent and sign: random bits, then denormals, zeros, powers of two and the ends."""
    values = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(1))
    special = np.array([0, -0.0, 1, -1, 1.5, LARGEST, -LARGEST, SMALLEST, -SMALLEST, 2.0**-126, 2.0**64], np.float32)
    values[: count // 8] = rng.choice(special, count // 8)
    denormals = rng.integers(1, 2**23, count // 8, dtype=np.uint32).view(np.float32)
    values[count // 8 : 2 * (count // 8)] = denormals
    powers = np.ldexp(np.float32(1), rng.integers(-149, 128, count // 8, dtype=np.int32)).astype(np.float32)
    values[2 * (count // 8) : 3 * (count // 8)] = powers
    return rng.permutation(values)


def assert_fma_rounds_once(a: np.ndarray, b: np.ndarray, c: np.ndarray, same_bits) -> None:
    exactly = np.array([reference.fma_exactly(*abc) for abc in zip(a, b, c, strict=True)], dtype=np.float32)
    same_bits(reference.fma(a, b, c), exactly)


def test_fma_rounds_once_at_every_exponent(rng, same_bits):
    a, b, c = (any_float32(rng, 4000) for _ in range(3))
    assert_fma_rounds_once(a, b, c, same_bits)


def test_fma_rounds_once_where_product_and_addend_are_of_one_size(rng, same_bits):
    """Random exponents seldom let the two meet; here they overlap by 0 to 60 bits, and often nearly cancel."""
    a, b = (any_float32(rng, 4000) for _ in range(2))
    product = a.astype(np.float64) * b.astype(np.float64)
    away = np.ldexp(1 + rng.random(4000), rng.integers(-30, 31, 4000, dtype=np.int32)) * rng.choice([-1, 1], 4000)
    away[:1000] = -1
    with np.errstate(all="ignore"):
        c = (product * away).astype(np.float32)
    c = np.where(np.isfinite(c), c, np.float32(-1))
    assert_fma_rounds_once(a, b, c, same_bits)


def test_fma_rounds_ties_and_their_neighbours_once(rng, same_bits):
    """The addend any float32, the product half its last bit, or that by a hair less or more: where two roundings go
    wrong. The hair of (1 + e) (1 - e) = 1 - e**2 is so fine that float64 loses it next to the addend."""
    count = 4000
    addend = any_float32(rng, count)
    addend = np.where(np.abs(addend) == LARGEST, np.float32(1), addend)
    half_exponents = np.maximum(np.frexp(np.abs(addend))[1] - 24, -149) - 1
    hairs = rng.choice([0, 2.0**-23, 2.0**-18, 2.0**-12], count)
    other_hairs = np.where(rng.random(count) < 1 / 3, 0, -hairs)
    signs = rng.choice([-1, 1], count)
    a = np.ldexp(1 + hairs, half_exponents // 2).astype(np.float32)
    b = (signs * np.ldexp(1 + other_hairs, half_exponents - half_exponents // 2)).astype(np.float32)
    assert_fma_rounds_once(a, b, addend, same_bits)


def test_fma_rounds_once_at_the_largest_and_the_smallest_number(same_bits):
    cases = [
        (LARGEST, 1, SMALLEST),
        (LARGEST, 1, 2.0**103),  # halfway to the number that would follow: infinity
        (LARGEST, 1, np.nextafter(np.float32(2.0**103), np.float32(0))),
        (LARGEST, LARGEST, -LARGEST),
        (-LARGEST, LARGEST, LARGEST),
        (LARGEST, 2, -LARGEST),
        (2.0**-75, 2.0**-75, 0),  # half of the smallest: to even, zero
        (-(2.0**-75), 2.0**-75, 0),  # and it keeps its sign
        (2.0**-75, 2.0**-75, SMALLEST),
        (2.0**-75, np.nextafter(np.float32(2.0**-75), np.float32(1)), 0),
        (SMALLEST, SMALLEST, 0),
        (SMALLEST, SMALLEST, SMALLEST),
        (SMALLEST, -SMALLEST, SMALLEST),
        (SMALLEST, 0.5, SMALLEST),
        (1, 1, -1),
        (-1, 1, 1),
        (-1, 0, -0.0),
        (1, 0, -0.0),
        (0, 0, -0.0),
        (-0.0, 0, 0),
    ]
    a, b, c = (np.array(column, dtype=np.float32) for column in zip(*cases, strict=True))
    assert_fma_rounds_once(a, b, c, same_bits)


def test_a_second_rounding_would_show(same_bits):
    """That the tests above can fail: here float64's own sum falls on a tie, and rounding that again goes the wrong way."""
    a = np.array([2.0**-12 * (1 + 2.0**-18)], dtype=np.float32)
    b = np.array([2.0**-12 * (1 - 2.0**-18)], dtype=np.float32)
    c = np.array([1 + 2.0**-23], dtype=np.float32)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert twice[0] == np.float32(1 + 2.0**-22)
    assert reference.fma_exactly(a[0], b[0], c[0]) == c[0]
    same_bits(reference.fma(a, b, c), c)


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (np.inf, 1, 0, np.inf),
        (np.inf, -1, 5, -np.inf),
        (np.inf, 0, 1, np.nan),
        (0, -np.inf, 1, np.nan),
        (np.inf, 1, -np.inf, np.nan),
        (np.inf, 1, np.inf, np.inf),
        (2, 3, np.inf, np.inf),
        (LARGEST, LARGEST, -np.inf, -np.inf),
        (np.nan, 1, 0, np.nan),
        (0, np.nan, 0, np.nan),
        (1, 1, np.nan, np.nan),
        (np.nan, 0, np.inf, np.nan),
    ],
)
def test_fma_of_infinities_and_nans_is_ieee_754s(a, b, c, expected, same_bits):
    arrays = (np.array([value], dtype=np.float32) for value in (a, b, c))
    same_bits(reference.fma(*arrays), np.array([expected], dtype=np.float32))


def test_fma_broadcasts_its_addend(same_bits):
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    same_bits(reference.fma(a, b, np.float32([[1], [2]])), np.float32([[3, 3, 3], [4, 4, 4]]))


def test_round_to_float32_agrees_with_the_processor(rng, same_bits):
    """A float64 is exact, and the processor rounds it once."""
    doubles = rng.integers(0, 2**64, 1000, dtype=np.uint64).view(np.float64)
    hairs = rng.choice([0, 2.0**-24, -(2.0**-24), 1e-9, 2.0**-52], 3000)
    near = any_float32(rng, 3000).astype(np.float64) * (1 + hairs)
    doubles = np.concatenate([doubles[np.isfinite(doubles)], near])
    with np.errstate(all="ignore"):
        processor = doubles.astype(np.float32)
    # An exact number has no sign of zero.
    ours = np.array([reference.round_to_float32(Fraction(float(x))) for x in doubles], dtype=np.float32)
    same_bits(np.abs(ours), np.abs(processor))
    assert np.array_equal(np.sign(ours), np.sign(processor))


@pytest.mark.parametrize("low", [1.0, 1 + 2.0**-23, 2.0**-149, 2.0**-126 - 2.0**-149, 2.0**100, 2.0**127])
def test_round_to_float32_sees_any_hair_beside_a_tie(low):
    """A hair that no float64 could hold."""
    low = np.float32(low)
    step = Fraction(float(np.spacing(low)))
    high = low + np.float32(float(step))
    tie = Fraction(float(low)) + step / 2
    hair = step / 2**200
    even = low if int(low.view(np.uint32)) % 2 == 0 else high
    for sign in (1, -1):
        assert reference.round_to_float32(sign * (tie - hair)) == sign * low
        assert reference.round_to_float32(sign * (tie + hair)) == sign * high
        assert reference.round_to_float32(sign * tie) == sign * even


def test_round_to_float32_overflows_where_ieee_754_does():
    most = Fraction(float(LARGEST)) + Fraction(2) ** 103
    for sign in (1, -1):
        assert reference.round_to_float32(sign * most) == sign * np.inf
        assert reference.round_to_float32(sign * (most - 1)) == sign * LARGEST
        assert reference.round_to_float32(sign * Fraction(2) ** 2000) == sign * np.inf
    assert reference.round_to_float32(Fraction(0)) == 0
    assert reference.round_to_float32(Fraction(1, 2**150)) == 0
    assert reference.round_to_float32(Fraction(1, 2**150) + Fraction(1, 2**400)) == SMALLEST


# ---- Rows of each layout, by hand --------------------------------------------------------------------------------------

# Halves: 1 is 3c00, 2 is 4000, 0.5 is 3800, -1 is bc00. Floats: 1 is 3f800000, 2 is 40000000, 0.5 is 3f000000.
BY_HAND = {
    "8 bits, floats behind": ("01 02 ff 0000803f 00000040", 8, {}),
    "8 bits, halves behind": ("01 02 ff 003c 0040", 8, {"pair": "<f2"}),
    "8 bits, halves first": ("003c 0040 01 02 ff", 8, {"pair": "<f2", "first": True}),
    "8 bits, padding": ("003c 0040 01 02 ff 99 99", 8, {"pair": "<f2", "first": True}),
    "4 bits, halves behind": ("21 0f 003c 0040", 4, {}),
    "4 bits, floats behind, padding": ("21 0f 0000803f 00000040 99", 4, {"pair": "<f4"}),
    "4 bits, floats first": ("0000803f 00000040 21 0f", 4, {"pair": "<f4", "first": True}),
    "2 bits, halves behind": ("39 003c 0040", 2, {}),
    "2 bits, unused bits set": ("f9 003c 0040 99", 2, {}),
    "2 bits, one short group": ("39 003c 0040", 2, {"group_size": 16}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_rows_are_read_as_by_hand(name, same_bits):
    """Three elements: codes 1, 2 and the largest; scale 1, bias 2."""
    text, bits, layout = BY_HAND[name]
    rows = np.frombuffer(bytes.fromhex(text), np.uint8)[None]
    top = 3 if bits == 2 else 2**bits - 1
    codes, scales, biases = reference.unpack(rows, bits, 3, **layout)
    same_bits(codes, np.float32([[1, 2, top]]))
    shape = (1, 1) if "group_size" in layout else (1,)
    same_bits(scales, np.full(shape, 1, np.float32))
    same_bits(biases, np.full(shape, 2, np.float32))
    same_bits(reference.dequantize(rows, bits, 3, **layout), np.float32([[3, 4, top + 2]]))
    bag = reference.embedding_bag(rows, bits, 3, np.array([[0, 0]]), **layout)
    same_bits(bag, np.float32([[6, 8, 2 * top + 4]]))


def test_each_group_has_its_own_scale_and_bias(same_bits):
    """18 elements of code 1 in groups of 16: scale 1, bias 2, then scale 0.5, bias -1."""
    pairs = bytes.fromhex("003c 0040 0038 00bc")
    expected = np.float32([[3] * 16 + [-0.5] * 2])
    for bits, codes in ((8, b"\1" * 18), (4, b"\x11" * 9), (2, b"\x55" * 4 + b"\x05")):
        for first in (False, True):
            row = (pairs + codes if first else codes + pairs) + b"\x99"
            layout = {"pair": "<f2", "first": first, "group_size": 16}
            rows = np.frombuffer(row, np.uint8)[None]
            same_bits(reference.dequantize(rows, bits, 18, **layout), expected)
            _, scales, biases = reference.unpack(rows, bits, 18, **layout)
            same_bits(scales, np.float32([[1, 0.5]]))
            same_bits(biases, np.float32([[2, -1]]))
            weights = np.float32([[2, -1, 4]])
            bag = reference.embedding_bag(rows, bits, 18, np.zeros((1, 3), int), weights=weights, **layout)
            same_bits(bag, 5 * expected)


def test_packing_is_the_opposite_of_reading(rng, same_bits):
    """The tests' own packing, which they make rows with, and the oracle's reading, for each kind of layout."""
    for layout in ALL_KINDS:
        for dim in (1, 17, 67, 300):
            codes = rng.integers(0, 2**layout.bits, (3, dim))
            pairs = rng.normal(size=(3, layout.num_groups(dim), 2)).astype(layout.pair)
            rows = layout.pack(codes, pairs, pad=0xFF)
            assert rows.shape[1] == layout.used_bytes(dim) + layout.padding
            back = reference.unpack(rows, layout.bits, dim, **layout.reading())
            same_bits(back[0], codes.astype(np.float32))
            same_bits(np.stack(back[1:], axis=-1).reshape(pairs.shape), pairs.astype(np.float32))
            same_bits(layout.pairs(rows, dim).reshape(pairs.shape), pairs)


def test_the_largest_dim_that_fits_is_found():
    for layout in ALL_KINDS:
        for dim in range(layout.per_byte, 200, layout.per_byte):
            assert layout.dim(layout.used_bytes(dim)) == dim
            # A byte more holds more codes, but for a byte of a pair that is not whole.
            assert layout.dim(layout.used_bytes(dim) + 1) in (dim, dim + layout.per_byte)


def test_a_spread_sample_has_layouts_of_every_sort():
    assert len(ALL_KINDS) == len(set(ALL_KINDS)) == 3 * 2 * 6 * 2 * 2
    for kinds in (spread(18), ALL_KINDS):
        for attribute, values in (
            ("bits", {8, 4, 2}), ("pair", {"<f4", "<f2"}), ("first", {False, True}), ("group_size", {*GROUP_SIZES}),
            ("padding", {0, *PADDINGS}),
        ):  # fmt: skip
            assert {getattr(layout, attribute) for layout in kinds} == values


# ---- Float tables ------------------------------------------------------------------------------------------------------

HALF_A_STEP = 2.0**-24  # of the float32 after 1


def test_float_rows_are_added_one_after_the_other(same_bits):
    """1 + half a step + half a step is 1; the halves first, it is the next number."""
    rows = np.float32([[1], [HALF_A_STEP]])
    bags = np.array([[0, 1, 1], [1, 1, 0]])
    same_bits(reference.float_embedding_bag(rows, bags), np.float32([[1], [1 + 2 * HALF_A_STEP]]))
    same_bits(reference.float_embedding_bag(-rows * 0, bags), np.float32([[0], [0]]))  # sums start from +0


def test_float_rows_of_each_type_are_widened_exactly(same_bits):
    values = np.float32([[1.5, -2, 0, np.inf, 2.0**-14]])
    for rows in (values, values.astype(np.float16), np.uint16([[0x3FC0, 0xC000, 0, 0x7F80, 0x3880]])):
        same_bits(reference.widen(rows), values)
        same_bits(reference.float_embedding_bag(rows, np.array([[0]])), values)


def test_weighted_float_rows_are_fused(same_bits):
    """(1 + e)(1 - e) - 1 is -e**2, which a rounded product loses."""
    tiny = 2.0**-13
    rows = np.float32([[-1], [1 + tiny]])
    weights = np.float32([[1, 1 - tiny]])
    ours = reference.float_embedding_bag(rows, np.array([[0, 1]]), weights=weights)
    same_bits(ours, np.float32([[-(tiny**2)]]))
    same_bits(reference.float_embedding_bag(rows, np.array([[0, 1]]), weights=weights.astype(np.float64)), ours)


def test_there_are_two_means(same_bits):
    """41 ones by 41 are 1; times the rounded reciprocal of 41 they are not."""
    floats, bag = np.ones((1, 1), np.float32), np.zeros((1, 41), int)
    same_bits(reference.float_embedding_bag(floats, bag, mode="mean"), np.float32([[1]]))
    packed = np.frombuffer(bytes.fromhex("01 0000803f 00000000"), np.uint8)[None]
    ours = reference.embedding_bag(packed, 8, 1, bag, mode="mean")
    same_bits(ours, np.float32([[np.float32(41) * (np.float32(1) / np.float32(41))]]))
    assert ours[0, 0] != 1
    same_bits(reference.embedding_bag(packed, 8, 1, bag, mode="average"), np.float32([[1]]))


def test_the_maximum_of_float_rows_keeps_the_first_of_equals(same_bits):
    rows = np.float32([[0.0], [-0.0], [np.nan], [-3]])
    bags = {(0, 1): 0.0, (1, 0): -0.0, (2, 3): np.nan, (3, 2): -3, (3,): -3}
    for bag, expected in bags.items():
        same_bits(reference.float_embedding_bag(rows, np.array([bag]), mode="max"), np.float32([[expected]]))


# ---- Modes, and what counts --------------------------------------------------------------------------------------------

ROWS_1_2_4 = np.float32([[1], [2], [4]])


@pytest.mark.parametrize(
    ("mode", "weights", "expected"),
    [
        ("average", None, 7 / 3),
        ("average", [1, 1, 2], 11 / 4),
        ("average", [3, -1, -2], 0),  # a divisor of 0
        ("average", [0, 0, 0], 0),
        ("sqrtn", None, 7 / np.sqrt(np.float32(3))),
        ("sqrtn", [2, 4, 4], 26 / 6),
        ("sqrtn", [2, -4, 4], 10 / 6),
        ("sqrtn", [0, 0, 0], 0),
        ("sqrtn", [2.0**-80, 0, 0], 0),  # whose square is too small for a float32
        ("mean", [2, 4, 4], 26 / 3),
    ],
)
def test_weighted_means_by_hand(mode, weights, expected, same_bits):
    given = None if weights is None else np.float32([weights])
    ours = reference.float_embedding_bag(ROWS_1_2_4, np.array([[0, 1, 2]]), mode=mode, weights=given)
    same_bits(ours, np.float32([[expected]]))


def test_weights_are_added_up_in_order(same_bits):
    weights = np.float32([[1, HALF_A_STEP, HALF_A_STEP], [HALF_A_STEP, HALF_A_STEP, 1]])
    rows = np.float32([[0], [1]])
    ours = reference.float_embedding_bag(rows, np.array([[1, 0, 0], [0, 0, 1]]), mode="average", weights=weights)
    same_bits(ours, np.float32([[1], [1 / (1 + np.float32(2 * HALF_A_STEP))]]))


def test_pruned_rows_count_and_padding_and_skipped_ones_do_not(same_bits):
    """Logical rows: 1, a pruned one, 4, and 2, which is padding."""
    mapping = np.int32([0, -1, 2, 1])
    indices, weights = np.array([[0, 1, 2, 3]]), np.float32([[1, 2, 3, 9]])
    expected = {"sum": 13, "mean": 13 / 3, "average": 13 / 6, "sqrtn": 13 / np.sqrt(np.float32(14))}
    for mode, value in expected.items():
        given = {"mode": mode, "mapping": mapping}
        for padding in (3, -1):
            ours = reference.float_embedding_bag(ROWS_1_2_4, indices, weights=weights, padding_idx=padding, **given)
            same_bits(ours, np.float32([[value]]))
        for absent in (4, -1, 2**40):
            skipped = np.where(indices == 3, absent, indices)
            ours = reference.float_embedding_bag(ROWS_1_2_4, skipped, weights=weights, invalid="skip", **given)
            same_bits(ours, np.float32([[value]]))
    for mode in ("sum", "mean", "max", "average", "sqrtn"):
        ours = reference.float_embedding_bag(ROWS_1_2_4, np.array([[-1, 3]]), mode=mode, invalid="skip")
        same_bits(ours, np.float32([[0]]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 0x3F80),
        (-0.0, 0x8000),
        (1 + 2.0**-8, 0x3F80),  # ties go to even
        (1 + 3 * 2.0**-8, 0x3F82),
        (1 + 2.0**-8 + 2.0**-23, 0x3F81),
        (1 + 2.0**-8 - 2.0**-23, 0x3F80),
        (float(LARGEST), 0x7F80),
        (-float(LARGEST), 0xFF80),
        (2.0**-134, 0x0000),  # half of the smallest
        (2.0**-134 + 2.0**-149, 0x0001),
        (np.inf, 0x7F80),
    ],
)
def test_bfloat16_output_is_the_nearest_even_one(value, expected):
    assert reference.to_bfloat16(np.float32([value])).tolist() == [expected]
    ours = reference.float_embedding_bag(np.float32([[value]]), np.array([[0]]), bfloat16=True)
    assert ours.tolist() == [[expected if value else 0]]


def test_every_nan_stays_one_in_bfloat16():
    nans = np.uint32([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF]).view(np.float32)
    assert np.isnan(reference.widen(reference.to_bfloat16(nans))).all()


def test_bfloat16_rounding_agrees_with_exact_numbers(rng):
    values = np.abs(any_float32(rng, 3000))
    values = values[values < 2.0**127]
    ours = reference.to_bfloat16(values)
    for value, bits in zip(values, ours, strict=True):
        near = [abs(Fraction(float(x)) - Fraction(float(value))) for x in reference.widen(bits + np.uint16([0, 1]))]
        assert near[0] < near[1] or (near[0] == near[1] and bits % 2 == 0)
        if bits:
            below = abs(Fraction(float(reference.widen(bits[None] - np.uint16(1))[0])) - Fraction(float(value)))
            assert near[0] < below or (near[0] == below and bits % 2 == 0)
