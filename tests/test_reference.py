"""The oracle's own arithmetic: every other test believes it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import reference

FLOAT32 = np.float32
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
    powers = np.ldexp(np.float32(1), rng.integers(-149, 128, count // 8)).astype(np.float32)
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
    away = np.ldexp(1 + rng.random(4000), rng.integers(-30, 31, 4000)) * rng.choice([-1, 1], 4000)
    away[:1000] = -1
    with np.errstate(all="ignore"):
        c = (product * away).astype(np.float32)
    c = np.where(np.isfinite(c), c, np.float32(-1))
    assert_fma_rounds_once(a, b, c, same_bits)


def test_fma_rounds_ties_and_their_neighbours_once(rng, same_bits):
    """The addend any float32, the product half its last bit, or that by a hair less or more: where two roundings go
    wrong. In float64 the hair is lost next to a tie."""
    addend = any_float32(rng, 3000)
    addend = np.where(np.abs(addend) == LARGEST, np.float32(1), addend)
    half_exponents = np.maximum(np.frexp(np.abs(addend))[1] - 24, -149) - 1
    first = half_exponents // 2
    a = np.ldexp(np.float32(1), first).astype(np.float32)
    b = np.ldexp(np.float32(1), half_exponents - first).astype(np.float32) * rng.choice([-1, 1], 3000).astype(np.float32)
    steps = rng.integers(-1, 2, 3000)
    with np.errstate(under="ignore"):
        a = np.where(steps > 0, np.nextafter(a, np.float32(4)), np.where(steps < 0, np.nextafter(a, np.float32(0)), a))
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


def test_a_second_rounding_would_show():
    """That the tests above can fail at all: multiply-and-add in float64, rounded again, is wrong here."""
    a, b, c = np.float32(1 + 2.0**-23), np.float32(1 + 2.0**-23), np.float32(2.0**54)
    c = np.float32(2.0**-24 + 2.0**-47)
    twice = np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    a, b, c = np.float32(2.0**-12), np.float32(2.0**-12 * (1 + 2.0**-23)), np.float32(1)
    # 1 + 2**-24 + 2**-47: above the tie; float64 keeps it.
    assert reference.fma_exactly(a, b, c) == np.float32(1 + 2.0**-23)
    a, b, c = np.float32(2.0**-75), np.float32(2.0**-75 * (1 + 2.0**-23)), np.float32(2.0**-149 * 2**23)
    assert reference.fma_exactly(a, b, c) == reference.fma(np.array([a]), np.array([b]), np.array([c]))[0]
    assert twice == twice
