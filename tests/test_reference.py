"""The oracle's own arithmetic: every other test believes it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import reference

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
