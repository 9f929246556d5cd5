"""The oracle: what a lookup and a quantizer must return. Written to be obviously right, not fast.

It shares no code with the package. It unpacks rows byte by byte, and each rounding is explicit. Sums run row by row in
plain Python; only the elements of one row are computed together, by NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

PAIRS = {8: "<f4", 4: "<f2", 2: "<f2"}  # the types of scale and bias, where nothing else is said


# ---- One rounding ------------------------------------------------------------------------------------------------


def round_to_float32(exact: Fraction) -> np.float32:
    """The float32 nearest to an exact number, ties to even."""
    with np.errstate(over="ignore"):
        guess = np.float32(float(exact)) if abs(exact) < 2**129 else np.float32(np.inf if exact > 0 else -np.inf)
    largest = np.finfo(np.float32).max
    if np.isinf(guess):
        # From halfway between the largest float and the next power of two on, the result is infinity.
        if abs(exact) >= Fraction(float(largest)) + Fraction(2) ** 103:
            return guess
        return np.copysign(largest, guess)
    with np.errstate(over="ignore", under="ignore"):
        near = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    near = [value for value in near if np.isfinite(value)]
    return min(near, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1))


def fma_exactly(a: float, b: float, c: float) -> np.float32:
    """The finite a * b + c, rounded once, by rational arithmetic. An exact zero gets the sign that IEEE 754 gives."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        with np.errstate(all="ignore"):
            return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    return np.copysign(round_to_float32(exact), np.float32(1 if exact > 0 else -1))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The same for arrays. In float64 the product of two float32 is exact. The sum is rounded to odd, so that rounding
    it to float32 gives the result of one rounding. `test_reference` compares this with `fma_exactly`."""
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = np.broadcast_to(c, product.shape).astype(np.float64)
        total = product + addend
        shifted = total - product
        error = (product - (total - shifted)) + (addend - shifted)
        inexact = np.isfinite(error) & (error != 0) & np.isfinite(total)
        even = (total.view(np.int64) & 1) == 0
        away = np.where(error > 0, np.inf, -np.inf)
        return np.where(inexact & even, np.nextafter(total, away), total).astype(np.float32)


# ---- Rows -----------------------------------------------------------------------------------------------------------


def unpack(
    rows: np.ndarray,
    bits: int,
    dim: int,
    *,
    pair: str | None = None,
    first: bool = False,
    group_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases of packed rows. Scales and biases are one a row; with a `group_size` one a group."""
    kind = np.dtype(pair or PAIRS[bits])
    per_byte = 8 // bits
    codes_bytes = -(-dim // per_byte)
    num_groups = 1 if group_size is None else -(-dim // group_size)
    pairs_bytes = num_groups * 2 * kind.itemsize
    codes_start, pairs_start = (pairs_bytes, 0) if first else (0, codes_bytes)
    # Divided by Python: NumPy 1.24 of 32-bit x86 divides arrays of int32 wrongly.
    byte = rows[:, [codes_start + element // per_byte for element in range(dim)]].astype(np.int64)
    shifts = np.array([bits * (element % per_byte) for element in range(dim)], np.int64)  # even where there are none
    codes = (byte >> shifts & 2**bits - 1).astype(np.float32)
    stored = rows[:, pairs_start : pairs_start + pairs_bytes].tobytes()
    pairs = np.frombuffer(stored, dtype=kind).reshape(len(rows), num_groups, 2).astype(np.float32)
    scales, biases = pairs[:, :, 0], pairs[:, :, 1]
    return (codes, scales[:, 0], biases[:, 0]) if group_size is None else (codes, scales, biases)


def elements(rows: np.ndarray, bits: int, dim: int, **layout: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The code, the scale and the bias of each element: three arrays of shape (num_rows, dim)."""
    codes, scales, biases = unpack(rows, bits, dim, **layout)
    if scales.ndim == 1:
        scales, biases = scales[:, None], biases[:, None]
    group_of = [element // max(min(layout.get("group_size") or dim, dim), 1) for element in range(dim)]
    return codes, scales[:, group_of], biases[:, group_of]


def dequantize(rows: np.ndarray, bits: int, dim: int, **layout: Any) -> np.ndarray:
    codes, scales, biases = elements(rows, bits, dim, **layout)
    return fma(scales, codes, biases)


def widen(rows: np.ndarray) -> np.ndarray:
    """The float32 of float rows. Those of uint16 hold the bits of bfloat16: the upper half of a float32's."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    assert rows.dtype in (np.float32, np.float16)
    return rows.astype(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; a NaN stays one."""
    whole = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    upper, lower = whole >> 16, whole & 0xFFFF
    is_up = (lower > 0x8000) | ((lower == 0x8000) & (upper & 1 == 1))
    return np.where(np.isnan(values), upper | 0x40, upper + is_up).astype(np.uint16)


# ---- Bags -----------------------------------------------------------------------------------------------------------


def embedding_bag(
    rows: np.ndarray,
    bits: int,
    dim: int,
    indices: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    pair: str | None = None,
    first: bool = False,
    group_size: int | None = None,
    **bags: Any,
) -> np.ndarray:
    """Bags of packed rows. The other arguments are those of `_look_up`."""
    codes, scales, biases = elements(rows, bits, dim, pair=pair, first=first, group_size=group_size)

    def value(row: int) -> np.ndarray:
        return fma(scales[row], codes[row], biases[row])

    def add(total: np.ndarray, row: int, weight: np.float32 | None) -> np.ndarray:
        scale, bias = scales[row], biases[row]
        if weight is not None:
            scale, bias = weight * scale, weight * bias
        return fma(scale, codes[row], total + bias)

    def mean(total: np.ndarray, count: int) -> np.ndarray:
        return total * (np.float32(1) / np.float32(count))

    return _look_up((len(rows), dim), value, add, mean, indices, offsets, **bags)


def float_embedding_bag(
    rows: np.ndarray, indices: np.ndarray, offsets: np.ndarray | None = None, **bags: Any
) -> np.ndarray:
    """Bags of float rows: float32, float16, or the bits of bfloat16 as uint16."""
    values = widen(rows)

    def value(row: int) -> np.ndarray:
        return values[row]

    def add(total: np.ndarray, row: int, weight: np.float32 | None) -> np.ndarray:
        if weight is None:
            return total + values[row]
        return fma(np.full(values.shape[1], weight), values[row], total)

    def mean(total: np.ndarray, count: int) -> np.ndarray:
        return total / np.float32(count)

    return _look_up(values.shape, value, add, mean, indices, offsets, **bags)


def _look_up(
    shape: tuple[int, int],
    value: Callable[[int], np.ndarray],
    add: Callable[[np.ndarray, int, np.float32 | None], np.ndarray],
    mean: Callable[[np.ndarray, int], np.ndarray],
    indices: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    mode: str = "sum",
    weights: np.ndarray | None = None,
    mapping: np.ndarray | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    invalid: str = "raise",
    half: bool = False,
    bfloat16: bool = False,
) -> np.ndarray:
    """Bags of a table of this shape. `value` is that of a row, `add` adds a row to a sum, `mean` divides a sum. Float32
    comes back, or float16 or the bits of bfloat16."""
    if mapping is not None and mapping.tolist() == [0]:
        mapping = None
    num_embeddings = shape[0] if mapping is None else len(mapping)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += num_embeddings
    bags = _places(indices, offsets, include_last_offset)
    result = np.zeros((len(bags), shape[1]), dtype=np.float32)
    with np.errstate(all="ignore"):
        for bag, places in enumerate(bags):
            counted = []  # rows and weights
            for place in places:
                index = int(indices[place])
                is_absent = invalid == "skip" and not 0 <= index < num_embeddings
                if is_absent or (padding_idx is not None and index == padding_idx):
                    continue
                row = index if mapping is None else int(mapping[index])
                counted.append((row, None if weights is None else np.float32(weights[place])))
            result[bag] = _one_bag(shape[1], counted, mode, value, add, mean)
        if bfloat16:
            return to_bfloat16(result)
        return result.astype(np.float16) if half else result


def _places(indices: np.ndarray, offsets: np.ndarray | None, include_last_offset: bool) -> list[list[tuple[int, ...]]]:
    """Where in the indices those of each bag stand."""
    if indices.ndim == 2:
        return [[(bag, i) for i in range(indices.shape[1])] for bag in range(indices.shape[0])]
    ends = [int(offset) for offset in offsets] + ([] if include_last_offset else [len(indices)])
    return [[(i,) for i in range(ends[bag], ends[bag + 1])] for bag in range(len(ends) - 1)]


def _one_bag(
    dim: int,
    counted: list[tuple[int, np.float32 | None]],
    mode: str,
    value: Callable[[int], np.ndarray],
    add: Callable[[np.ndarray, int, np.float32 | None], np.ndarray],
    mean: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """Of rows in order, -1 for one that is pruned, with their weights."""
    total = np.zeros(dim, dtype=np.float32)
    survivors = [(row, weight) for row, weight in counted if row != -1]
    if mode == "max":
        for number, (row, _) in enumerate(survivors):
            later = value(row)
            total = later if number == 0 else np.where(later > total, later, total)
        return total
    for row, weight in survivors:
        total = add(total, row, weight)
    if mode == "mean" and counted:
        return mean(total, len(counted))
    if mode in ("average", "sqrtn"):
        divisor = _divisor(mode, [np.float32(1) if weight is None else weight for _, weight in counted])
        return np.zeros(dim, dtype=np.float32) if divisor == 0 else total / divisor
    return total


def _divisor(mode: str, weights: list[np.float32]) -> np.float32:
    """The sum of the weights, or the square root of the sum of their squares. Each operation is rounded."""
    total = np.float32(0)
    for weight in weights:
        total = total + (weight if mode == "average" else weight * weight)
    return total if mode == "average" else np.sqrt(total)


# ---- Quantizing -----------------------------------------------------------------------------------------------------


def _pack(
    codes: list[int], bits: int, pairs: list[np.float32], kind: np.dtype[Any], first: bool, row_alignment: int
) -> bytes:
    per_byte = 8 // bits
    packed = bytearray(-(-len(codes) // per_byte))
    for element, code in enumerate(codes):
        packed[element // per_byte] |= code << bits * (element % per_byte)
    stored = np.array(pairs).astype(kind).tobytes()
    row = stored + bytes(packed) if first else bytes(packed) + stored
    return row + bytes(-len(row) % row_alignment)


def _stored(value: np.float32, kind: np.dtype[Any]) -> np.float32:
    return np.float32(value.astype(kind))


def _parameters(low: np.float32, high: np.float32, top: int, kind: np.dtype[Any]) -> tuple[np.float32, np.float32]:
    """Bias and scale, both as they are stored."""
    bias = _stored(low, kind)
    width = high - bias
    scale = _stored(np.float32(1) if width == 0 else width / np.float32(top), kind)
    return bias, scale


def quantize(
    weights: np.ndarray,
    bits: int,
    *,
    bounds: np.ndarray | None = None,
    method: str = "minmax",
    importance: np.ndarray | None = None,
    nbins: int = 200,
    ratio: float = 0.16,
    pair: str | None = None,
    first: bool = False,
    group_size: int | None = None,
    row_alignment: int = 1,
) -> np.ndarray:
    """Rows of bytes. With a `group_size` each so many elements are quantized by themselves; with `bounds`, which are a
    row's, none is given. `importance` is for "lsq"."""
    kind, dim = np.dtype(pair or PAIRS[bits]), weights.shape[1]
    size = dim if group_size is None else group_size
    num_groups = -(-dim // size)
    counts = np.ones(dim) if importance is None else np.asarray(importance, np.float64)
    counts = np.concatenate([scaled(counts[start : start + size]) for start in range(0, dim, size)])
    packed = []
    with np.errstate(all="ignore"):
        for number, row in enumerate(weights.astype(np.float32)):
            codes: list[int] = []
            pairs: list[np.float32] = []
            for elements in (slice(place * size, (place + 1) * size) for place in range(num_groups)):
                group = row[elements]
                low, high = group.min(), group.max()
                if method == "greedy":
                    low, high = _greedy_bounds(group, low, high, 2**bits - 1, kind, nbins, ratio)
                elif bounds is not None:
                    low, high = np.float32(bounds[number, 0]), np.float32(bounds[number, 1])
                scale, bias, inverse = _pair(low, high, bits, kind)
                if method == "lsq":
                    scale, bias, inverse = _least_squares(group, counts[elements], bits, kind, (scale, bias, inverse))
                group_codes = _codes(group, bias, inverse, bits).astype(int).tolist()
                codes += group_codes
                pairs += [scale, bias]
            packed.append(_pack(codes, bits, pairs, kind, first, row_alignment))
    row_bytes = -(-dim * bits // 8) + num_groups * 2 * kind.itemsize
    row_bytes += -row_bytes % row_alignment
    return np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(weights), row_bytes)


def scaled(counts: np.ndarray) -> np.ndarray:
    """Weights of a group, the largest as 1."""
    return (counts / (counts.max() or 1)).astype(np.float32)


def _pair(
    low: np.float32, high: np.float32, bits: int, kind: np.dtype[Any]
) -> tuple[np.float32, np.float32, np.float32]:
    """Scale, bias, and what differences from the bias are multiplied by. Only 8 bits with a float32 of each have a
    formula of their own."""
    top = 2**bits - 1
    if bits == 8 and kind.itemsize == 4:
        width = high - low
        return width / np.float32(255), low, np.float32(255) / (width + np.float32(1e-8))
    bias, scale = _parameters(low, high, top, kind)
    if scale == 0:
        scale = np.float32(1)
    inverse = np.float32(1) / scale
    if np.isinf(inverse):
        scale = inverse = np.float32(1)
    return scale, bias, inverse


def _codes(values: np.ndarray, bias: np.float32, inverse: np.float32, bits: int) -> np.ndarray:
    codes: np.ndarray = np.clip(np.nan_to_num(np.rint((values - bias) * inverse), nan=0.0), 0, np.float32(2**bits - 1))
    return codes


# Shares of the range to start from; then scales, and shifts in codes, from which to go on from the best pair.
WIDTHS = np.float32([1, 0.85, 0.7, 0.55, 0.4, 0.25])
NUDGES = [(scale, shift) for scale in np.float32([0.96, 1.04]) for shift in np.float32([-0.4, -0.2, 0.2, 0.4])]


def _least_squares(
    values: np.ndarray, counts: np.ndarray, bits: int, kind: np.dtype[Any], given: tuple[np.float32, ...]
) -> tuple[np.float32, ...]:
    """The best pair that the search meets, and its inverse; `given` unless the squared error is less."""
    top, half, one = np.float32(2**bits - 1), np.float32(0.5), np.float32(1)
    low, high, total = values.min(), values.max(), _in_order(counts)
    width, middle = high - low, half * low + half * high
    best = (np.float32(np.inf), given[0], given[1])

    def step(scale: np.float32, bias: np.float32) -> tuple[np.float32, np.float32]:
        nonlocal best
        scale, bias = _stored(scale, kind) or one, _stored(bias, kind)
        x, codes = values - bias, _codes(values, bias, one / scale, bits)
        error = x - scale * codes
        loss = _in_order(counts * error * error)
        if loss < best[0]:
            best = (loss, scale, bias)
        sum_c, sum_x = _in_order(counts * codes), _in_order(counts * x)
        products, squares = _in_order(counts * x * codes), _in_order(counts * codes * codes)
        found = (total * products - sum_c * sum_x) / ((total * squares - sum_c * sum_c) or one)
        return found, bias + (sum_x - found * sum_c) / (total or one)

    for part in WIDTHS:
        step(part * width / top, middle - half * (part * width))
    for factor, shift in [(one, np.float32(0)), *NUDGES]:
        _, kept, start = best
        scale = kept * factor
        bias = start + (kept - scale) * (half * top) + shift * kept
        for _ in range(4):
            scale, bias = step(scale, bias)
    _, scale, bias = best
    found = (scale, bias, one / scale)
    is_less = _squared_error(values, counts, bits, found) < _squared_error(values, counts, bits, given) * (1 - 1e-9)
    return found if is_less else given


def _in_order(numbers: np.ndarray) -> Any:
    """Their sum from left to right, each addition rounded."""
    return np.cumsum(np.concatenate([[0], numbers]), dtype=numbers.dtype)[-1]


def _squared_error(values: np.ndarray, counts: np.ndarray, bits: int, pair: tuple[np.float32, ...]) -> np.float64:
    scale, bias, inverse = pair
    codes = _codes(values, bias, inverse, bits).astype(np.float64)
    read = (codes * np.float64(scale) + np.float64(bias)).astype(np.float32)
    return _in_order(counts * (values.astype(np.float64) - read) ** 2)


def _greedy_bounds(
    row: np.ndarray, low: np.float32, high: np.float32, top: int, kind: np.dtype[Any], nbins: int, ratio: float
) -> tuple[np.float32, np.float32]:
    def loss(low: np.float32, high: np.float32) -> np.float32:
        bias, scale = _parameters(low, high, top, kind)
        inverse = np.float32(1) if scale == 0 else np.float32(1) / scale
        codes = np.clip(np.rint((row - bias) * inverse), 0, np.float32(top))
        error = row - (codes * scale + bias)
        norm = np.float32(0)
        for square in error * error:  # in order: the bytes depend on the order of the additions
            norm = norm + square
        return np.sqrt(norm)

    step = (high - low) / np.float32(nbins)
    threshold = np.float32(np.float64(np.float32(nbins)) * (1.0 - ratio)) * step
    best = last = loss(low, high)
    found = low, high
    while low + threshold < high:
        raised, lowered = loss(low + step, high), loss(low, high - step)
        if last < raised and last < lowered and last < best:
            best, found = last, (low, high)
        moved, loss_there = ((low + step, high), raised) if raised < lowered else ((low, high - step), lowered)
        if moved == (low, high):
            break  # rounding loses the step: PyTorch loops forever here, and finds no better pair
        (low, high), last = moved, loss_there
    return found
