"""quantize against the oracle, byte for byte: at every level and thread count, from every kind of array."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import qembag
import reference
from support import fenced, levels
from support.arrays import same_rows
from support.layouts import LAYOUTS, NAMES

DIMS = [*range(1, 41), 47, 48, 49, 63, 64, 65, 100, 127, 128, 129, 255, 300, 1000]
GREEDY_DIMS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 70]


def float_rows(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Rows of many sizes and shapes, all of which a float16 tail holds."""
    normal = rng.normal(size=(12, dim))
    scales = np.array([1, 1e-3, 1e-6, 1e-8, 1e-9, 1e-20, 1e-39, 100, 3000, 1, 1, 1])[:, None]
    rows = (normal * scales).astype(np.float32)
    rows[9] += 1000  # a range that is small beside the values
    rows[10] = rng.integers(0, 4, dim)  # ties in the rounding of codes
    rows[11] = rng.integers(0, 2, dim) * -0.5
    constants = np.repeat(np.array([0, 1.0004, 1.0006, -1.0004, 1e-8, -3e4, 0.1], np.float32)[:, None], dim, axis=1)
    return np.concatenate([rows, constants])


@functools.cache
def case_of_dim(bits: int, dim: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([5, bits, dim])
    weights = float_rows(rng, dim)
    return weights, reference.quantize(weights, bits, method=method)


@pytest.mark.parametrize("dim", DIMS)
def test_every_level_gives_the_oracles_bytes_at_every_dim(level, bits, dim):
    weights, expected = case_of_dim(bits, dim, "minmax")
    table = qembag.quantize(weights, bits)
    assert (table.bits, table.dim, table.num_embeddings) == (bits, dim, len(weights))
    same_rows(table.data, expected, bits)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dim", GREEDY_DIMS)
def test_every_level_gives_the_oracles_bytes_of_the_greedy_search(level, bits, dim):
    weights, expected = case_of_dim(bits, dim, "greedy")
    same_rows(qembag.quantize(weights, bits, method="greedy").data, expected, bits)


def test_the_greedy_search_is_closer_than_the_minimum_and_maximum(rng):
    """On rows with a few values far out, by far at 4 bits; that is what it is for."""
    weights = rng.standard_t(2, (50, 64)).astype(np.float32)
    for bits, share in ((4, 0.9), (2, 1)):
        errors = [
            np.square(qembag.quantize(weights, bits, method=method).dequantize() - weights).sum()
            for method in ("minmax", "greedy")
        ]
        assert errors[1] < share * errors[0]


# ---- Kinds of array ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ">f4", ">f2", ">f8"])
@pytest.mark.parametrize(
    ("bits", "method"), [(8, "minmax"), (4, "minmax"), (2, "minmax"), (4, "greedy"), (2, "greedy")]
)
def test_every_type_of_float_gives_the_bytes_of_its_float32(rng, bits, dtype, method):
    weights = rng.normal(size=(5, 19)).astype(dtype)
    expected = reference.quantize(weights.astype(np.float32), bits, method=method)
    same_rows(qembag.quantize(weights, bits, method=method).data, expected, bits)


@pytest.mark.parametrize(
    "way", ["every second column", "every second row", "transposed", "reversed", "misaligned", "read-only", "memmap"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_in_any_memory_give_the_same(rng, bits, way, dtype, tmp_path):
    plain = rng.normal(size=(6, 22)).astype(dtype)
    if way == "every second column":
        given = np.repeat(plain, 2, axis=1)[:, ::2]
    elif way == "every second row":
        given = np.repeat(plain, 2, axis=0)[::2]
    elif way == "transposed":
        given = np.ascontiguousarray(plain.T).T
    elif way == "reversed":
        given = plain[::-1, ::-1].copy()[::-1, ::-1]
    elif way == "misaligned":
        memory = np.zeros(plain.nbytes + 1, dtype=np.uint8)
        given = memory[1:].view(dtype).reshape(plain.shape)
        given[...] = plain
    elif way == "read-only":
        given = plain.copy()
        given.flags.writeable = False
    else:
        plain.tofile(tmp_path / "weights.bin")
        given = np.memmap(tmp_path / "weights.bin", dtype=dtype, mode="r", shape=plain.shape)
    before = np.array(given)
    same_rows(qembag.quantize(given, bits).data, reference.quantize(plain, bits), bits)
    assert np.array_equal(before, given)


def test_lists_are_float32(bits):
    for weights in ([[0.1, 0.2, 0.7], [1, 2, 3]], [[0, 1, 5]], ((0.5, 1.5),)):
        expected = reference.quantize(np.array(weights, dtype=np.float32), bits)
        same_rows(qembag.quantize(weights, bits).data, expected, bits)


def test_no_rows_make_a_table_without_rows(bits):
    table = qembag.quantize(np.zeros((0, 5), dtype=np.float32), bits)
    assert table.shape == (0, 5)
    assert table.dequantize().shape == (0, 5)


# ---- Odd rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 7, 17, 33])
def test_unused_high_bits_are_zero(level, rng, bits, dim):
    weights = rng.normal(size=(20, dim)).astype(np.float32)
    weights[:, -1] = 9  # the largest code stands last
    used = dim * bits % 8
    rows = qembag.quantize(weights, bits).data
    last = rows[:, -(-dim * bits // 8) - 1]
    assert (last >> used if used else 0 * last).max() == 0
    assert (rows[:, : -LAYOUTS[bits].pair_bytes].max() > 0) or dim == 1


def test_a_constant_row_comes_back(level, bits):
    """Exactly where the tail holds the value; a float16 tail's rounding is made up for by scale and code as far as it goes."""
    values = np.array([0, 1, -1, 0.5, 65504, -65504, 2.0**-24, 1024, -3], dtype=np.float32)
    for dim in (1, 16, 21):
        weights = np.repeat(values[:, None], dim, axis=1)
        table = qembag.quantize(weights, bits)
        assert np.array_equal(table.dequantize(), weights)
        assert not table.codes().any()


def test_the_scale_is_negative_where_a_constant_rounds_up(level):
    """1.0006 is 1.001 in float16: the row's width, from there, is below zero."""
    weights = np.full((1, 18), 1.0006, dtype=np.float32)
    for bits in (4, 2):
        table = qembag.quantize(weights, bits)
        assert table.scales[0] < 0
        same_rows(table.data, reference.quantize(weights, bits), bits)
        assert np.abs(table.dequantize() - weights).max() < np.abs(table.biases[0] - weights).max()


def test_rows_of_the_widest_and_the_narrowest_ranges(level):
    largest, smallest = np.finfo(np.float32).max, np.float32(2.0**-149)
    weights = np.array(
        [
            [0, largest],
            [-largest, 0],
            [-largest / 2, largest / 2],
            [0, smallest],
            [-smallest, smallest],
            [1, np.nextafter(np.float32(1), np.float32(2))],
            [0, 1e-8],
            [0, 255],
            [largest, largest],
            [1e-38, 3e-38],
        ],
        dtype=np.float32,
    )
    same_rows(qembag.quantize(weights, 8).data, reference.quantize(weights, 8), 8)
    narrow = np.clip(weights, -60000, 60000)
    for bits in (4, 2):
        same_rows(qembag.quantize(narrow, bits).data, reference.quantize(narrow, bits), bits)
        greedy = reference.quantize(narrow[:5], bits, method="greedy")
        same_rows(qembag.quantize(narrow[:5], bits, method="greedy").data, greedy, bits)


def test_a_minimum_of_zero_of_either_sign(level, bits):
    weights = np.array([[0.0, -0.0, 1], [-0.0, 0.0, 1], [-0.0, -0.0, -0.0], [0.0, -0.0, -1]], dtype=np.float32)
    for dim in (3, 30):
        repeated = np.tile(weights, (1, dim // 3))
        same_rows(qembag.quantize(repeated, bits).data, reference.quantize(repeated, bits), bits)


def test_codes_at_ties_are_rounded_to_even(level):
    """Codes of 0.5, 1.5, 2.5, ... at a scale of exactly 1."""
    for bits, top in ((4, 15), (2, 3)):
        weights = np.array([[0, top, *(np.arange(top) + 0.5)]], dtype=np.float32)
        expected = np.array([[0, top, *np.rint(np.arange(top) + 0.5)]], dtype=np.uint8)
        assert np.array_equal(qembag.quantize(weights, bits).codes(), expected)


def test_the_greedy_search_ends_where_its_step_is_lost_in_rounding():
    """The reference never returns from such rows. In a process of its own: a search without end holds the interpreter."""
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, qembag, reference
from support import levels
rows = np.array([
    [1024, 1024 + 2**-11, 1024 + 2**-12, 1024 + 2**-13],
    [-1024, -1024 - 2**-11, -1024 - 2**-12, -1024 - 2**-13],
    [1, 1 + 2**-23, 1, 1],
    [-1, -1 + 2**-24, -1, -1],
    [30000, 30000 + 2**-9, 30000, 30000],
    [0, 2**-149, 2**-148, 0],
    [-1, 1, 2**-24, 1],
], dtype=np.float32)
for level in levels.levels():
    levels.serve(level)
    for bits in (4, 2):
        for wide in (rows, np.tile(rows, (1, 9))):
            greedy = qembag.quantize(wide, bits, method="greedy")
            plain = qembag.quantize(wide, bits)
            # Where the step is lost at once, the bounds stay the row's own.
            assert greedy.data[0].tobytes() == plain.data[0].tobytes(), (level, bits)
            assert np.array_equal(greedy.data, reference.quantize(wide, bits, method="greedy")), (level, bits)
"""
    command = [sys.executable, "-c", script, str(pathlib.Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# ---- Threads ---------------------------------------------------------------------------------------------------------------

# Elements that make the kernels share a call out: MIN_PARALLEL_WORK in _kernels.pyx, and some more.
BIG_ROWS, BIG_DIM = 5500, 100


@functools.cache
def big_weights(dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(6).normal(size=(BIG_ROWS, BIG_DIM)).astype(dtype)


@functools.cache
def big_expected(bits: int) -> np.ndarray:
    return reference.quantize(big_weights(), bits)


def test_every_thread_count_gives_the_oracles_bytes(level, threads, bits):
    same_rows(qembag.quantize(big_weights(), bits).data, big_expected(bits), bits)


def test_an_argument_beats_the_process_limit_and_keeps_the_bytes(level, bits):
    for num_threads in (1, 2, 3, 64, 5000):
        same_rows(qembag.quantize(big_weights(), bits, num_threads=num_threads).data, big_expected(bits), bits)


@functools.cache
def few_long_rows() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(3, 200_000)).astype(np.float32)


def test_fewer_rows_than_threads_have_chunks(level, threads):
    same_rows(qembag.quantize(few_long_rows(), 8).data, few_long_expected(), 8)


@functools.cache
def few_long_expected() -> np.ndarray:
    return reference.quantize(few_long_rows(), 8)


def test_the_greedy_search_is_the_same_at_every_thread_count(level, threads):
    """The oracle on a sample: its search takes milliseconds a row."""
    weights = big_weights()
    table = qembag.quantize(weights, 4, method="greedy")
    same_rows(table.data[greedy_sample()], greedy_sample_expected(), 4)
    baseline = greedy_baseline()
    assert np.array_equal(table.data, baseline)


def greedy_sample() -> np.ndarray:
    return np.array([0, 1, 17, 2600, BIG_ROWS - 1])


@functools.cache
def greedy_sample_expected() -> np.ndarray:
    return reference.quantize(big_weights()[greedy_sample()], 4, method="greedy")


@functools.cache
def greedy_baseline() -> np.ndarray:
    with levels.use(levels.levels()[0]):
        return qembag.quantize(big_weights(), 4, method="greedy", num_threads=1).data


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_first_bad_row_is_named_at_every_thread_count(level, threads, bits, dtype):
    """float64 and float16 go in pieces of a million elements, some of them bad rows in more than one."""
    weights = np.concatenate([big_weights(dtype)] * 3)
    for bad in ([13_000], [12_000, 16_000], [2, 40, 5600, 11_000], [len(weights) - 1], [0, 1]):
        spoiled = weights.copy()
        spoiled[bad, 7] = np.nan
        spoiled[bad[-1] + 1 :, -1] = np.inf
        with pytest.raises(ValueError, match=rf"^weights\[{bad[0]}\] must be finite to be quantized"):
            qembag.quantize(spoiled, bits)


def test_the_first_bad_row_is_named_whatever_is_wrong_with_it(threads):
    weights = big_weights().copy()
    weights[5000, 3] = np.nan
    weights[4000, 3] = -70000
    with pytest.raises(ValueError, match=r"^weights\[4000\] must have a minimum and a scale that its row can hold"):
        qembag.quantize(weights, 4)
    weights[3999, -1] = np.inf
    with pytest.raises(ValueError, match=r"^weights\[3999\] must be finite"):
        qembag.quantize(weights, 4)
    with pytest.raises(ValueError, match=r"^weights\[3999\] must be finite"):
        qembag.quantize(weights, 8)


# ---- Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 33, 64])
def test_a_row_that_is_not_finite_is_named_wherever_it_is_so(level, bits, bad, dim):
    for column in range(dim):
        weights = np.ones((3, dim), dtype=np.float32)
        weights[1, column] = bad
        with pytest.raises(
            ValueError, match=r"^weights\[1\] must be finite to be quantized, got a NaN or an infinity$"
        ):
            qembag.quantize(weights, bits)


@pytest.mark.parametrize(
    ("row", "bits"),
    [
        ([-65520, 0], 4),
        ([65520, 65520], 4),
        ([0, 65520 * 15], 4),
        ([0, 65520 * 3], 2),
        ([-65520, 0], 2),
        ([1e6, 1e6], 2),
        ([-3e38, 3e38], 8),
    ],
)
def test_a_row_that_its_tail_cannot_hold_is_named(level, row, bits):
    tail = "float32" if bits == 8 else "float16"
    for method in ["minmax"] if bits == 8 else ["minmax", "greedy"]:
        message = rf"^weights\[1\] must have a minimum and a scale that its row can hold as {tail} at {bits} bits"
        with pytest.raises(ValueError, match=message):
            qembag.quantize(np.array([[0, 1], row], dtype=np.float32), bits, method=method)


def test_the_widest_rows_that_a_tail_holds_are_quantized(level):
    """One step inside the bounds of the test above."""
    for row, bits in [([-65519, 0], 4), ([0, 65519 * 15], 4), ([0, 65519 * 3], 2), ([-1.7e38, 1.7e38], 8)]:
        weights = np.array([row], dtype=np.float32)
        same_rows(qembag.quantize(weights, bits).data, reference.quantize(weights, bits), bits)


def test_float64_beyond_float32_is_not_finite(level, bits):
    with pytest.raises(ValueError, match=r"^weights\[1\] must be finite to be quantized"):
        qembag.quantize(np.array([[0, 1], [0, 1e39]]), bits)
    table = qembag.quantize(np.array([[1e-60, 1e-60], [0, 1]]), bits)
    assert not table.dequantize([0]).any()


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((2, 3), np.int64),
        np.zeros((2, 3), np.uint8),
        np.zeros((2, 3), bool),
        np.zeros((2, 3), np.complex64),
        np.zeros((2, 3), object),
        np.zeros((2, 3), np.longdouble),
        np.array([["a"]]),
        None,
        "text",
        [["a", "b"]],
        [[True, False]],
    ],
    ids=str,
)
def test_weights_that_are_not_floats_are_a_type_error(weights):
    with pytest.raises(TypeError, match=r"^weights must be an array"):
        qembag.quantize(weights)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 0), (0, 0)])
def test_weights_of_another_shape_are_a_value_error(shape):
    with pytest.raises(ValueError, match=r"^weights must have 2 dimensions \(rows, dim\) and a dim of 1 or more"):
        qembag.quantize(np.zeros(shape, np.float32))


def test_ragged_lists_are_a_value_error():
    with pytest.raises(ValueError, match=r"^weights must be an array"):
        qembag.quantize([[1.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        (3, ValueError, "^bits must be 8, 4 or 2, got 3$"),
        (0, ValueError, "^bits must be 8, 4 or 2, got 0$"),
        (-8, ValueError, "^bits must be 8, 4 or 2, got -8$"),
        (10**30, ValueError, "^bits must be 8, 4 or 2"),
        (8.0, TypeError, "^bits must be a whole number, got float 8.0$"),
        ("8", TypeError, "^bits must be a whole number, got str '8'$"),
        (True, TypeError, "^bits must be a whole number, got bool True$"),
        (None, TypeError, "^bits must be a whole number, got NoneType$"),
    ],
)
def test_other_bits_are_an_error(bits, error, message):
    with pytest.raises(error, match=message):
        qembag.quantize(np.ones((2, 3), np.float32), bits)


def test_other_methods_are_an_error():
    weights = np.ones((2, 3), np.float32)
    for method in ("best", "", None, 1, ["minmax"]):
        with pytest.raises(ValueError, match=r"^method must be 'minmax', 'greedy' or 'lsq', got "):
            qembag.quantize(weights, 4, method=method)
    with pytest.raises(ValueError, match=r"^method must be 'minmax' or 'lsq' at 8 bits, got 'greedy'"):
        qembag.quantize(weights, 8, method="greedy")


def test_other_thread_counts_are_an_error():
    weights = np.ones((2, 3), np.float32)
    for num_threads, error in [
        (0, ValueError),
        (-1, ValueError),
        (1.0, TypeError),
        ("2", TypeError),
        (True, TypeError),
    ]:
        with pytest.raises(error, match=r"^num_threads must be"):
            qembag.quantize(weights, num_threads=num_threads)
    assert qembag.quantize(weights, num_threads=np.int8(2)).num_rows == 2


# ---- At the edge of memory ------------------------------------------------------------------------------------------------


@fenced.needs_fences
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_outside_weights_and_bounds_is_read(level, bits, at, rng):
    for dim in [*range(1, 41), 63, 64, 65, 130]:
        weights = fenced.copy(rng.normal(size=(3, dim)).astype(np.float32), at=at)
        same_rows(qembag.quantize(weights, bits).data, reference.quantize(weights, bits), bits)
        if bits != 8:
            qembag.quantize(weights, bits, method="greedy")
        if dim % LAYOUTS[bits].per_byte == 0:
            bounds = fenced.copy(np.array([[-1, 1]] * 3, dtype=np.float32), at=at)
            packed = getattr(qembag.ops, f"embedding_bag_{NAMES[bits]}_prepack_with_rowwise_min_max")(weights, bounds)
            same_rows(packed, reference.quantize(weights, bits, bounds=bounds), bits)
