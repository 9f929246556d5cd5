"""The oracle: what a lookup and a quantizer must return. Written to be obviously right, not fast.

It shares no code with the package. It unpacks rows byte by byte, and each rounding is explicit. Sums run row by row in
plain Python; only the elements of one row are computed together, by NumPy.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

PAIRS = {8: "<f4", 4: "<f2", 2: "<f2"}  # the types of scale and bias, which end a row


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


def unpack(rows: np.ndarray, bits: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases of packed rows."""
    pair = np.dtype((PAIRS[bits], 2))
    per_byte = 8 // bits
    codes = np.zeros((len(rows), dim), dtype=np.float32)
    for element in range(dim):
        byte = rows[:, element // per_byte].astype(np.int64)
        codes[:, element] = byte >> bits * (element % per_byte) & 2**bits - 1
    ends = rows[:, rows.shape[1] - pair.itemsize :].tobytes()
    scales, biases = np.frombuffer(ends, dtype=PAIRS[bits]).reshape(len(rows), 2).astype(np.float32).T
    return codes, scales, biases


def dequantize(rows: np.ndarray, bits: int, dim: int) -> np.ndarray:
    codes, scales, biases = unpack(rows, bits, dim)
    return fma(scales[:, None], codes, biases[:, None])


def embedding_bag(
    rows: np.ndarray,
    bits: int,
    dim: int,
    indices: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    mode: str = "sum",
    weights: np.ndarray | None = None,
    mapping: np.ndarray | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    half: bool = False,
) -> np.ndarray:
    codes, scales, biases = unpack(rows, bits, dim)
    if indices.ndim == 2:
        bags = [[(b, i) for i in range(indices.shape[1])] for b in range(indices.shape[0])]
    else:
        ends = [int(o) for o in offsets] + ([] if include_last_offset else [len(indices)])
        bags = [[(i,) for i in range(ends[b], ends[b + 1])] for b in range(len(ends) - 1)]
    if mapping is not None and mapping.tolist() == [0]:
        mapping = None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(rows) if mapping is None else len(mapping)
    result = np.zeros((len(bags), dim), dtype=np.float32)
    with np.errstate(all="ignore"):
        for bag, places in enumerate(bags):
            total = np.zeros(dim, dtype=np.float32)
            count, survivors = 0, 0
            for place in places:
                index = int(indices[place])
                if padding_idx is not None and index == padding_idx:
                    continue
                count += 1
                row = index if mapping is None else int(mapping[index])
                if row == -1:
                    continue
                scale, bias = scales[row], biases[row]
                if weights is not None:
                    weight = np.float32(weights[place])
                    scale, bias = weight * scale, weight * bias
                if mode == "max":
                    value = fma(scale, codes[row], np.full(dim, bias))
                    total = value if survivors == 0 else np.where(value > total, value, total)
                else:
                    total = fma(scale, codes[row], total + bias)
                survivors += 1
            if mode == "mean" and count > 0:
                total = total * (np.float32(1) / np.float32(count))
            result[bag] = total
        return result.astype(np.float16) if half else result


# ---- Quantizing -----------------------------------------------------------------------------------------------------


def _pack(codes: np.ndarray, bits: int, scale: np.float32, bias: np.float32) -> bytes:
    per_byte = 8 // bits
    packed = bytearray(-(-len(codes) // per_byte))
    for element, code in enumerate(codes):
        packed[element // per_byte] |= int(code) << bits * (element % per_byte)
    return bytes(packed) + np.array([scale, bias]).astype(PAIRS[bits]).tobytes()


def _few_bit_parameters(low: np.float32, high: np.float32, top: int) -> tuple[np.float32, np.float32]:
    """Bias and scale, both representable in float16."""
    bias = np.float32(np.float16(low))
    width = high - bias
    scale = np.float32(np.float16(np.float32(1) if width == 0 else width / np.float32(top)))
    return bias, scale


def quantize(
    weights: np.ndarray,
    bits: int,
    *,
    bounds: np.ndarray | None = None,
    greedy: bool = False,
    nbins: int = 200,
    ratio: float = 0.16,
) -> np.ndarray:
    top = 2**bits - 1
    packed = []
    with np.errstate(all="ignore"):
        for number, row in enumerate(weights.astype(np.float32)):
            low, high = row.min(), row.max()
            if greedy:
                low, high = _greedy_bounds(row, low, high, top, nbins, ratio)
            elif bounds is not None:
                low, high = np.float32(bounds[number, 0]), np.float32(bounds[number, 1])
            if bits == 8:
                width = high - low
                bias, scale = low, width / np.float32(255)
                inverse = np.float32(255) / (width + np.float32(1e-8))
            else:
                bias, scale = _few_bit_parameters(low, high, top)
                if scale == 0:
                    scale = np.float32(1)
                inverse = np.float32(1) / scale
                if np.isinf(inverse):
                    scale = inverse = np.float32(1)
            codes = np.clip(np.nan_to_num(np.rint((row - bias) * inverse), nan=0.0), 0, top)
            packed.append(_pack(codes, bits, scale, bias))
    row_bytes = -(-weights.shape[1] * bits // 8) + 2 * np.dtype(PAIRS[bits]).itemsize
    return np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(weights), row_bytes)


def _greedy_bounds(
    row: np.ndarray, low: np.float32, high: np.float32, top: int, nbins: int, ratio: float
) -> tuple[np.float32, np.float32]:
    def loss(low: np.float32, high: np.float32) -> np.float32:
        bias, scale = _few_bit_parameters(low, high, top)
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
