"""Quantizing to every layout of rows, byte for byte as a slow oracle of these tests has it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

import qembag
from qembag.layout import RowLayout
from support import fenced, levels

F32 = np.float32


# ---- The oracle ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """A layout of rows, as `quantize` is asked for it."""

    bits: int
    scale_dtype: str
    scale_first: bool = False
    group_size: int | None = None
    row_alignment: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "bits"}

    def quantize(self, weights: np.ndarray, greedy: bool = False) -> np.ndarray:
        """Rows made of bytes, one after the other."""
        rows = []
        for row in weights.astype(F32):
            codes, pairs = [], b""
            for start in range(0, len(row), self.group_size or len(row)):
                group = row[start : start + (self.group_size or len(row))]
                scale, bias, group_codes = quantized(group, self.bits, self.scale_dtype, greedy)
                codes += group_codes
                pairs += np.array([scale, bias]).astype("<f4" if self.scale_dtype == "float32" else "<f2").tobytes()
            packed = packed_codes(codes, self.bits)
            used = pairs + packed if self.scale_first else packed + pairs
            rows.append(used + bytes(-len(used) % self.row_alignment))
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(weights), -1)


def packed_codes(codes: list[int], bits: int) -> bytes:
    number = sum(code << place * bits for place, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


def quantized(row: np.ndarray, bits: int, scale_dtype: str, greedy: bool) -> tuple[np.float32, np.float32, list[int]]:
    """Scale, bias and codes of one group, in float32 throughout."""
    low, high, top = row.min(), row.max(), F32(2**bits - 1)
    with np.errstate(all="ignore"):
        if greedy:
            low, high = greedy_bounds(row, low, high, top, scale_dtype)
        if bits == 8 and scale_dtype == "float32":
            width = high - low
            scale, bias, inverse = width / top, low, top / (width + F32(1e-8))
        else:
            bias = stored(low, scale_dtype)
            width = high - bias
            scale = stored(F32(1) if width == 0 else width / top, scale_dtype)
            if scale == 0:
                scale = F32(1)
            inverse = F32(1) / scale
            if np.isinf(inverse):
                scale = inverse = F32(1)
        codes = np.clip(np.rint((row - bias) * inverse), 0, top)
    return scale, bias, codes.astype(int).tolist()


def stored(value: np.float32, scale_dtype: str) -> np.float32:
    return F32(np.dtype(scale_dtype).type(value))


def greedy_bounds(row: np.ndarray, low: np.float32, high: np.float32, top: np.float32, scale_dtype: str) -> Any:
    def loss(low: np.float32, high: np.float32) -> np.float32:
        bias = stored(low, scale_dtype)
        width = high - bias
        scale = stored(F32(1) if width == 0 else width / top, scale_dtype)
        inverse = F32(1) if scale == 0 else F32(1) / scale
        error = row - (np.clip(np.rint((row - bias) * inverse), F32(0), top) * scale + bias)
        total = F32(0)
        for square in error * error:
            total = total + square
        return np.sqrt(total)

    step = (high - low) / F32(200)
    threshold = F32(200 * (1 - 0.16)) * step
    found, best = (low, high), loss(low, high)
    last = best
    while low + threshold < high:
        raised, lowered = loss(low + step, high), loss(low, high - step)
        if last < raised and last < lowered and last < best:
            found, best = (low, high), last
        before = low, high
        low, high, last = (low + step, high, raised) if raised < lowered else (low, high - step, lowered)
        if (low, high) == before:
            break
    return found


# ---- Every layout ----------------------------------------------------------------------------------------------------

PAIRS = [(bits, scale_dtype) for bits in (8, 4, 2) for scale_dtype in ("float32", "float16")]
DIMS = [1, 2, 3, 5, 15, 16, 17, 18, 31, 32, 33, 47, 63, 64, 65, 80, 95, 100, 127, 129, 160, 200, 257, 300]


def some_weights(seed: int, num_rows: int, dim: int) -> np.ndarray:
    """Rows of several magnitudes; one constant, one of zeros, one with few values."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(num_rows, dim)) * 10.0 ** rng.integers(-3, 3, (num_rows, 1))
    weights[0] = rng.normal()
    if num_rows > 2:
        weights[1] = 0
        weights[2] = rng.integers(-2, 3, dim)
    return weights.astype(F32)


def same_rows(table: qembag.QuantizedTable, rows: Rows, weights: np.ndarray, expected: np.ndarray) -> None:
    layout = RowLayout(
        rows.bits,
        weights.shape[1],
        scale_dtype=rows.scale_dtype,
        scale_first=rows.scale_first,
        group_size=rows.group_size,
        row_bytes=expected.shape[1],
    )
    assert table.layout == layout
    assert table.data.shape == expected.shape
    # Which zero is the minimum of zeros of both signs is left open.
    assert np.array_equal(unsigned(table.data, layout), unsigned(expected, layout)), rows


def unsigned(rows: np.ndarray, layout: RowLayout) -> np.ndarray:
    return np.concatenate(
        [
            layout.codes(rows),
            (layout.pairs(rows) + 0).reshape(len(rows), -1).view(np.uint8),
            rows[:, layout.used_bytes :],
        ],
        axis=1,
    )


@pytest.mark.parametrize(("bits", "scale_dtype"), PAIRS)
@pytest.mark.parametrize("group_size", [None, 16, 32, 48, 64, 128, 256])
def test_every_layout_has_the_oracles_bytes(level: str, bits: int, scale_dtype: str, group_size: int | None) -> None:
    for number, dim in enumerate(DIMS):
        rows = Rows(bits, scale_dtype, number % 2 == 0, group_size, (1, 4, 16, 64, 7)[number % 5])
        weights = some_weights(dim, 18 if dim < 70 else 5, dim)
        expected = rows.quantize(weights)
        same_rows(qembag.quantize(weights, bits, **rows.options), rows, weights, expected)


@pytest.mark.parametrize(("bits", "scale_dtype"), [pair for pair in PAIRS if pair[0] != 8])
@pytest.mark.parametrize("group_size", [None, 16, 64])
def test_the_greedy_search_has_the_oracles_bytes(
    level: str, bits: int, scale_dtype: str, group_size: int | None
) -> None:
    for number, dim in enumerate([1, 7, 16, 30, 64, 83]):
        rows = Rows(bits, scale_dtype, number % 2 == 1, group_size, (1, 16)[number % 2])
        weights, expected = greedy_case(rows, dim)
        table = qembag.quantize(weights, bits, method="greedy", **rows.options)
        same_rows(table, rows, weights, expected)


@functools.cache
def greedy_case(rows: Rows, dim: int) -> tuple[np.ndarray, np.ndarray]:
    weights = some_weights(dim, 4, dim)
    return weights, rows.quantize(weights, greedy=True)


@pytest.mark.parametrize(("bits", "scale_dtype"), PAIRS)
def test_defaults_are_pytorchs(level: str, bits: int, scale_dtype: str) -> None:
    weights = some_weights(1, 20, 70)
    usual = scale_dtype == ("float32" if bits == 8 else "float16")
    for one_group in (None, 80, 2**40):
        table = qembag.quantize(weights, bits, scale_dtype=scale_dtype, group_size=one_group)
        assert np.array_equal(table.data, qembag.quantize(weights, bits).data) == usual
        assert table.layout.num_groups == 1
    assert qembag.quantize(weights, bits).layout == RowLayout(bits, 70)


def test_rows_of_the_widest_and_the_narrowest_ranges(level: str) -> None:
    largest, tiny = np.finfo(F32).max, F32(2.0**-149)
    narrow = [[0, tiny], [-tiny, tiny], [0, 2.0**-127], [0, 2.0**-126], [-1e-39, 3e-39], [1, 1 + 2.0**-23], [7, 7]]
    wide = [[0, largest], [-largest, 0], [-largest / 2, largest / 2], [largest, largest], [1e-38, 3e-38], [0, 1e-8]]
    for bits, scale_dtype in PAIRS:
        weights = np.array(narrow + (wide if scale_dtype == "float32" else [[0, 65504], [-65504, 0]]), dtype=F32)
        for dim in (2, 16, 40):
            repeated = np.tile(weights, (1, dim // 2))
            for method in ("minmax", "greedy")[: 1 if bits == 8 else 2]:
                rows = Rows(bits, scale_dtype, group_size=16)
                given = repeated if method == "minmax" else repeated[: len(narrow)]
                expected = rows.quantize(given, greedy=method == "greedy")
                same_rows(qembag.quantize(given, bits, method=method, **rows.options), rows, given, expected)


def test_a_scale_whose_inverse_overflows_is_one(level: str) -> None:
    table = qembag.quantize(F32([[0, 2.0**-140], [0, 3]]), 2, scale_dtype="float32")
    assert table.scales.tolist() == [1, 1]
    assert table.codes().tolist() == [[0, 0], [0, 3]]


def test_8_bits_with_half_pairs_are_the_half_formula(level: str) -> None:
    weights = F32([[-0.1, 0.2, 0.7]])
    table = qembag.quantize(weights, 8, scale_dtype="float16")
    bias = F32(np.float16(-0.1))
    scale = F32(np.float16((F32(0.7) - bias) / F32(255)))
    assert (table.scales[0], table.biases[0]) == (scale, bias)
    assert table.codes().tolist() == [np.rint((weights[0] - bias) * (1 / scale)).clip(0, 255).tolist()]
    assert table.row_bytes == 7


# ---- Threads ---------------------------------------------------------------------------------------------------------

BIG = Rows(4, "float32", scale_first=True, group_size=32, row_alignment=16)


@functools.cache
def big_weights() -> np.ndarray:
    return np.random.default_rng(6).normal(size=(5500, 100)).astype(F32)


@functools.cache
def big_expected(rows: Rows) -> np.ndarray:
    with levels.use(levels.levels()[0]):
        return qembag.quantize(big_weights(), rows.bits, num_threads=1, **rows.options).data


@pytest.mark.parametrize(("bits", "scale_dtype"), PAIRS)
def test_every_thread_count_gives_the_same_bytes(level: str, threads: int, bits: int, scale_dtype: str) -> None:
    """The oracle on a sample: it takes long."""
    rows = dataclasses.replace(BIG, bits=bits, scale_dtype=scale_dtype)
    table = qembag.quantize(big_weights(), bits, **rows.options)
    assert np.array_equal(table.data, big_expected(rows))
    sample = [0, 1, 17, 2749, 2750, 5499]
    assert np.array_equal(table.data[sample], rows.quantize(big_weights()[sample]))


def test_few_long_rows_of_many_groups_are_shared_out(level: str, threads: int) -> None:
    weights = np.random.default_rng(7).normal(size=(3, 200_010)).astype(F32)
    table = qembag.quantize(weights, 8, scale_dtype="float16", group_size=128)
    assert table.scales.shape == (3, -(-200_010 // 128))
    whole = weights[:, :199_936].reshape(-1, 128)
    one_group = qembag.quantize(whole, 8, scale_dtype="float16")
    assert np.array_equal(table.codes()[:, :199_936].reshape(-1, 128), one_group.codes())
    assert np.array_equal(table.scales[:, :1562].reshape(-1), one_group.scales)
    assert np.array_equal(table.biases[:, :1562].reshape(-1), one_group.biases)


# ---- Weights of other types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", "<f4"])
def test_other_floats_are_converted_first(dtype: str) -> None:
    rows = Rows(4, "float32", group_size=16, row_alignment=8)
    weights = some_weights(3, 6, 40).astype(dtype)
    same_rows(qembag.quantize(weights, 4, **rows.options), rows, weights, rows.quantize(weights))


def test_bfloat16_is_widened_exactly() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weights = some_weights(4, 9, 33).astype(ml_dtypes.bfloat16)
    wide = weights.astype(F32)
    for given in (weights, np.asfortranarray(weights), weights[::-1, ::-1][::-1, ::-1], np.repeat(weights, 2, 0)[::2]):
        for bits in (8, 4, 2):
            assert np.array_equal(qembag.quantize(given, bits).data, qembag.quantize(wide, bits).data)
    with pytest.raises(ValueError, match=r"^weights\[1\] must be finite"):
        qembag.quantize(np.array([[0, 1], [np.nan, 1]], ml_dtypes.bfloat16))
    with pytest.raises(TypeError, match=r"^weight must be an array of float32 or float16, got a bfloat16 array"):
        qembag.ops.embedding_bag_byte_prepack(weights)


def test_another_type_of_two_bytes_is_no_bfloat16() -> None:
    message = r"^weights must be an array of float32, float16, float64 or bfloat16, got a \|V2 array"
    with pytest.raises(TypeError, match=message):
        qembag.quantize(np.zeros((2, 3), "V2"))


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_is_named(level: str, threads: int, bad: float) -> None:
    for bits, scale_dtype in PAIRS:
        for column, group in [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (39, 2)]:
            weights = np.ones((40, 40), F32)
            weights[19, column] = weights[20, 0] = weights[39, 39] = bad
            last = (15, 31, 39)[group]
            where = rf"^weights\[19\] \(group {group}, elements {16 * group} to {last}\) must be finite to be quantized"
            with pytest.raises(ValueError, match=where):
                qembag.quantize(weights, bits, scale_dtype=scale_dtype, group_size=16)
            with pytest.raises(ValueError, match=r"^weights\[19\] must be finite"):
                qembag.quantize(weights, bits, scale_dtype=scale_dtype)


@pytest.mark.parametrize(
    ("bits", "scale_dtype", "values"),
    [
        (8, "float16", [-65520, 0]),
        (8, "float16", [0, 65520 * 255]),
        (4, "float16", [0, 65520 * 15]),
        (4, "float32", [-3e38, 3e38]),
        (2, "float32", [-3e38, 3e38]),
        (8, "float32", [-3e38, 3e38]),
    ],
)
def test_a_group_whose_pair_overflows_is_named(level: str, bits: int, scale_dtype: str, values: list[float]) -> None:
    weights = np.ones((20, 40), F32)
    weights[7, 20:22] = values
    weights[7, 35] = np.nan
    low, high = min(*values, 1), max(*values, 1)
    message = (
        rf"^weights\[7\] \(group 1, elements 16 to 31\) must have a minimum and a scale that its row can hold as {scale_dtype} at "
        rf"{bits} bits, got values from {low:g} to {high:g}$"
    )
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        qembag.quantize(weights, bits, scale_dtype=scale_dtype, group_size=16)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("scale_dtype", "float64", ValueError, "scale_dtype must be float32 or float16, got float64"),
        ("scale_dtype", np.int8, ValueError, "scale_dtype must be float32 or float16, got int8"),
        ("scale_dtype", "half a float", TypeError, "scale_dtype must be float32 or float16, got 'half a float'"),
        ("scale_dtype", 5, TypeError, "scale_dtype must be float32 or float16, got 5"),
        ("scale_first", 2, TypeError, "scale_first must be True or False, got int 2"),
        ("scale_first", None, TypeError, "scale_first must be True or False, got NoneType"),
        ("group_size", 0, ValueError, "group_size must be a multiple of 16, at least 16, got 0"),
        ("group_size", -16, ValueError, "group_size must be a multiple of 16, at least 16, got -16"),
        ("group_size", 24, ValueError, "group_size must be a multiple of 16, at least 16, got 24"),
        ("group_size", 8, ValueError, "group_size must be a multiple of 16, at least 16, got 8"),
        ("group_size", 16.0, TypeError, "group_size must be a whole number, got float 16.0"),
        ("group_size", True, TypeError, "group_size must be a whole number, got bool True"),
        ("row_alignment", 0, ValueError, "row_alignment must be from 1 to "),
        ("row_alignment", -1, ValueError, "row_alignment must be from 1 to "),
        ("row_alignment", 2**100, ValueError, "row_alignment must be from 1 to "),
        ("row_alignment", 1.0, TypeError, "row_alignment must be a whole number, got float 1.0"),
        ("row_alignment", None, TypeError, "row_alignment must be a whole number, got NoneType"),
    ],
)
def test_wrong_options_are_refused(bits: int, name: str, value: Any, error: type[Exception], message: str) -> None:
    weights = np.ones((2, 40), F32)
    for call in (
        lambda: qembag.quantize(weights, bits, **{name: value}),
        lambda: qembag.quantize(weights, bits).to_layout(**{name: value}),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_the_greedy_search_is_for_4_and_2_bits(scale_dtype: str) -> None:
    message = r"^method must be 'minmax' or 'lsq' at 8 bits, got 'greedy', which is for 4 and 2 bits$"
    with pytest.raises(ValueError, match=message):
        qembag.quantize(np.ones((2, 3), F32), 8, method="greedy", scale_dtype=scale_dtype)


def test_numpys_numbers_and_types_count_as_pythons() -> None:
    weights = some_weights(5, 4, 40)
    expected = qembag.quantize(
        weights, 4, scale_dtype="float32", scale_first=True, group_size=16, row_alignment=8, num_threads=1
    )
    for scale_dtype in (np.float32, np.dtype(np.float32), "f4", "single"):
        table = qembag.quantize(
            weights,
            np.int8(4),
            scale_dtype=scale_dtype,
            scale_first=np.True_,
            group_size=np.uint8(16),
            row_alignment=np.int64(8),
        )
        assert np.array_equal(table.data, expected.data)
        assert table.layout == expected.layout


# ---- At the edge of memory -------------------------------------------------------------------------------------------


@fenced.needs_fences
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_outside_weights_is_read(level: str, bits: int, at: str) -> None:
    for dim in [1, 3, 15, 16, 17, 31, 33, 40, 48, 63, 65, 130]:
        plain = some_weights(dim, 3, dim)
        weights = fenced.copy(plain, at=at)
        for group_size in (16, 32):
            rows = Rows(bits, "float16", True, group_size, 4)
            expected = rows.quantize(plain)
            same_rows(qembag.quantize(weights, bits, **rows.options), rows, plain, expected)
            if bits != 8:
                qembag.quantize(weights, bits, method="greedy", **rows.options)
