"""The tables of `benchmarks.collection`, and what is looked up in them.

All contenders have the same values: quantized rows have half scales and biases, which each library's rows can hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

# Rows that the sets of a turn touch: more than the caches hold, so that each call has rows that are new to it.
TOUCHED_BYTES, MOST_SETS = 96 << 20, 400
# Between two tables in FBGEMM's memory.
TABLE_ALIGNMENT = 128
BITS = (8, 4, 2, 32)


class Shape(NamedTuple):
    """Tables of (bits, rows, dim), and how many indices a bag of each has."""

    tables: tuple[tuple[int, int, int], ...]
    lengths: tuple[int, ...]

    @property
    def dim(self) -> int:
        return sum(dim for _, _, dim in self.tables)


def mixed(count: int, per_bag: int, rows: tuple[int, int] = (10_000, 100_000)) -> Shape:
    """8, 4, 2 bits and floats in turn, of 16 to 256 elements. Fewer tables are the first ones of more."""
    tables = []
    for number in range(count):
        rng = np.random.default_rng(number)
        dim, low, high = 16 * int(rng.integers(1, 17)), *np.log(rows)
        tables.append((BITS[number % len(BITS)], round(math.exp(rng.uniform(low, high))), dim))
    return Shape(tuple(tables), (per_bag,) * count)


def alike(count: int, rows: int, lengths: tuple[int, ...]) -> Shape:
    """8 bits, 64 elements."""
    return Shape(((8, rows, 64),) * count, lengths)


SHAPES: dict[str, Callable[[], Shape]] = {
    **{str(count): functools.partial(mixed, count, 10) for count in (1, 4, 16, 26, 64, 100, 256)},
    "100, bags of 20": functools.partial(mixed, 100, 20),
    "26 alike": functools.partial(alike, 26, 10_000, (20,) * 26),
    # 9 of 10 rows are looked up in the first table, or all in the only one.
    "skewed": lambda: Shape(((8, 100_000, 64),) + ((8, 10_000, 64),) * 99, (1782,) + (2,) * 99),
    "even": functools.partial(alike, 1, 100_000, (1980,)),
    "tiny": functools.partial(mixed, 5, 3, (10, 50)),
}


# ---- Tables ----------------------------------------------------------------------------------------------------------


def row_bytes(bits: int, dim: int) -> int:
    """In FBGEMM's layout. Rows that begin at multiples of 16 bytes, as TorchRec has them, make it no faster."""
    return 4 * dim if bits == 32 else 4 + dim * bits // 8


def blob_of(shape: Shape) -> np.ndarray:
    """All tables in one array, as FBGEMM's operator has them: half scale and bias, then codes; or floats."""
    starts = [0]
    for bits, rows, dim in shape.tables:
        starts.append(-(-(starts[-1] + rows * row_bytes(bits, dim)) // TABLE_ALIGNMENT) * TABLE_ALIGNMENT)
    blob = np.empty(starts[-1], np.uint8)
    for number, (start, (bits, rows, dim)) in enumerate(zip(starts, shape.tables, strict=False)):
        rng = np.random.default_rng([1, number])
        size = rows * row_bytes(bits, dim)
        part = blob[start : start + size]
        if bits == 32:
            rng.random(dtype=np.float32, out=part.view(np.float32))
            continue
        part[:] = np.frombuffer(rng.bytes(size), np.uint8)
        pairs = rng.uniform([0.001, -1], [0.01, 0], (rows, 2)).astype("<f2")
        part.reshape(rows, -1)[:, :4] = pairs.view(np.uint8)
    return blob


def tables_of(shape: Shape, blob: np.ndarray) -> dict[str, Any]:
    """qembag's, as views of the blob."""
    from qembag.interop import fbgemm

    specs = [(f"t{number}", rows, dim, bits) for number, (bits, rows, dim) in enumerate(shape.tables)]
    return fbgemm.from_blob(blob, specs)


def as_torch_has(shape: Shape) -> list[Any]:
    """The same values in qembag's tables with arrays of their own: rows as PyTorch packs them, or floats."""
    import qembag

    found: list[Any] = []
    for table in tables_of(shape, blob_of(shape)).values():
        if isinstance(table, qembag.FloatTable):
            found.append(qembag.FloatTable(table.data.copy()))
        else:
            found.append(table.to_layout())
    return found


# ---- Traffic ---------------------------------------------------------------------------------------------------------


def sets(shape: Shape, batch: int, seed: int, most: int = MOST_SETS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of all tables, one table after the other, and the ends of their bags."""
    rng = np.random.default_rng([batch, seed])
    ends = np.zeros(len(shape.tables) * batch + 1, np.int64)
    np.cumsum(np.repeat(shape.lengths, batch), out=ends[1:])
    each = sum(
        length * row_bytes(bits, dim) for length, (bits, _, dim) in zip(shape.lengths, shape.tables, strict=True)
    )
    high = np.repeat([rows for _, rows, _ in shape.tables], np.multiply(shape.lengths, batch))
    for _ in range(min(max(TOUCHED_BYTES // max(batch * each, 1), 2), most)):
        yield rng.integers(0, high), ends


def parts(shape: Shape, indices: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and ends of each table, whose bags begin at 0."""
    batch = (len(ends) - 1) // len(shape.tables)
    for number in range(len(shape.tables)):
        own = ends[number * batch : (number + 1) * batch + 1]
        yield indices[own[0] : own[-1]], own - own[0]
