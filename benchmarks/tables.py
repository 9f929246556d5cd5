"""The tables and the traffic. Each contender makes its own from the same seeds, so that nothing large is sent."""

from __future__ import annotations

import functools
import mmap
import random
from collections.abc import Iterator

import numpy as np

from .cases import LAYOUTS, Case, plain

PIECE_BYTES = 64 << 20
# A table below this stays in the caches of most machines, so sets of indices may come again.
CACHED_BYTES = 16 << 20
CACHED_SETS = 64
# Spreads the popular rows of Zipf traffic over the table. A prime above the number of rows: no two of them meet.
SCATTER = 2_654_435_761
ZIPF_EXPONENT = 1.05
PADDING_SHARE = 0.3
# Arrays start at a random cache line of the first 4 KiB of their memory, because an array's address changes the speed of the
# loops that read it, by up to 10 %. All contenders of a start use the same places; the next start has others.
PLACES = random.Random(0)
PLACES_BYTES = 4096


def random_place() -> int:
    return 64 * PLACES.randrange(PLACES_BYTES // 64)


def reserve(num_bytes: int, pages: str = "numpy", path: str | None = None) -> np.ndarray:
    """Bytes that start at a random cache line."""
    if pages == "file":
        # "c" is private and writeable: torch warns about arrays that are not. The pages are the page cache's.
        return np.memmap(path, dtype=np.uint8, mode="c", shape=(num_bytes,))
    if pages == "4k":
        memory = mmap.mmap(-1, num_bytes + PLACES_BYTES)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        room = np.frombuffer(memory, dtype=np.uint8)
    else:
        room = np.empty(num_bytes + PLACES_BYTES + 64, dtype=np.uint8)
    start = -room.ctypes.data % 64 + random_place()
    return room[start : start + num_bytes]


def placed(array: np.ndarray) -> np.ndarray:
    """A copy at a random cache line."""
    copy = reserve(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def packed_table(case: Case, path: str | None = None, stored: Case | None = None) -> np.ndarray:
    """Rows of full-range codes. Only one piece is drawn, the others are it with other codes: fast, and no two alike.

    With `stored`, the same values in the layout of that case."""
    stored = stored or case
    table = reserve(stored.rows * stored.row_bytes, case.pages, path).reshape(stored.rows, stored.row_bytes)
    if case.pages == "file":
        np.add.reduce(table.reshape(-1)[::4096])  # maps every page now: a page fault is not a lookup
    else:
        fill(table, case, stored)
    return table


def fill(table: np.ndarray, case: Case, stored: Case) -> None:
    """The same values in every layout: groups of a row have the same pair, rounded to what both `stored` and torch's layout
    can hold. So answers can be compared bit for bit; no loop looks at what the pairs are."""
    rng = np.random.default_rng(0)
    codes_bytes, pairs_bytes = stored.codes_bytes, stored.pairs_bytes
    codes_start, pairs_start = (pairs_bytes, 0) if LAYOUTS[stored.layout].scale_first else (0, codes_bytes)
    piece_rows = min(case.rows, PIECE_BYTES // codes_bytes)
    codes = np.frombuffer(rng.bytes(piece_rows * codes_bytes), dtype=np.uint8).reshape(piece_rows, -1)
    pairs = 0.1 * rng.standard_normal((piece_rows, 2))
    for pair_type in (case.pair_type, plain(case).pair_type, stored.pair_type):
        pairs = pairs.astype(pair_type)
    pairs = np.tile(pairs.astype(pairs.dtype.newbyteorder("<")).view(np.uint8), stored.groups)
    for number, start in enumerate(range(0, case.rows, piece_rows)):
        part = table[start : start + piece_rows]
        part_codes = part[:, codes_start : codes_start + codes_bytes]
        np.bitwise_xor(codes[: len(part)], np.uint8(number % 256), out=part_codes)
        part[:, pairs_start : pairs_start + pairs_bytes] = pairs[: len(part)]
        part[:, codes_bytes + pairs_bytes :] = 0


def write_file(case: Case, path: str) -> None:
    """The table of a case on mapped pages, for all its contenders."""
    fill(np.memmap(path, dtype=np.uint8, mode="w+", shape=(case.rows, case.row_bytes)), case, case)


def float_table(case: Case) -> np.ndarray:
    """Rows of floats: float32 for NumPy's lookups, for quantizing and copying; where a case's rows are floats, of its type,
    of bfloat16 the bits."""
    piece = np.random.default_rng(0).standard_normal(min(case.rows * case.dim, PIECE_BYTES // 4), dtype=np.float32)
    if case.element == "float16":
        piece = piece.astype(np.float16)
    elif case.element == "bfloat16":
        piece = (piece.view(np.uint32) >> 16).astype(np.uint16)
    table = reserve(piece.itemsize * case.rows * case.dim).view(piece.dtype)
    for start in range(0, table.size, piece.size):
        part = table[start : start + piece.size]
        part[:] = piece[: part.size]
    return table.reshape(case.rows, case.dim)


def mapping_of(case: Case) -> np.ndarray | None:
    """Every other logical row is pruned."""
    if not case.pruned:
        return None
    mapping = np.full(2 * case.rows, -1, dtype=np.int32)
    mapping[::2] = np.arange(case.rows)
    return placed(mapping)


def is_cached(case: Case, rows: int) -> bool:
    return rows * case.row_bytes <= CACHED_BYTES


def number_of_sets(case: Case, rows: int, calls: int) -> int:
    """A fresh set for each call from memory, because a repeated one sits in the cache and measures nothing of memory.

    In cache a set may come again, and thousands of small ones would only measure how far away Python's objects are.
    """
    if case.work != "lookup":
        return 1
    return min(calls, CACHED_SETS) if is_cached(case, rows) else calls


@functools.lru_cache(maxsize=1)
def zipf_sums(rows: int) -> np.ndarray:
    return np.cumsum(np.arange(1, rows + 1) ** -ZIPF_EXPONENT)


def padding_idx(case: Case, rows: int) -> int | None:
    """The last row: no other index is drawn where a case has padding."""
    return None if case.padding == "none" else rows - 1


def pad(indices: np.ndarray, lengths: np.ndarray, padding: int) -> None:
    """The last 30 % of each bag."""
    ends = np.cumsum(lengths)
    place_from_end = np.repeat(ends, lengths) - np.arange(len(indices))
    indices[place_from_end <= np.repeat(np.rint(PADDING_SHARE * lengths), lengths)] = padding


def counted(case: Case, rows: int, indices: np.ndarray) -> int:
    """Of the indices, those whose rows count: neither pruned nor padding."""
    if case.pruned:
        return int(np.count_nonzero(indices % 2 == 0))
    padding = padding_idx(case, rows)
    return len(indices) if padding is None else int(np.count_nonzero(indices != padding))


def sets(case: Case, rows: int, seed: tuple[int, ...], count: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Indices and offsets of `count` calls, and weights where the case has them."""
    padding = padding_idx(case, rows)
    drawn = 2 * rows if case.pruned else rows if padding is None else padding
    rng = np.random.default_rng(seed)
    for _ in range(count):
        if case.length == "mixed":
            lengths = rng.integers(0, 81, case.bags)
        else:
            lengths = np.full(case.bags, case.length)
        ends = np.cumsum(lengths)
        if case.traffic == "zipf":
            sums = zipf_sums(rows)
            indices = np.searchsorted(sums, rng.random(ends[-1]) * sums[-1]) * SCATTER % rows
        else:
            indices = rng.integers(0, drawn, ends[-1])
        if case.padding == "30%":
            pad(indices, lengths, rows - 1)
        traffic = indices.astype(case.index_dtype, copy=False), (ends - lengths).astype(case.offsets_dtype, copy=False)
        yield (*traffic, rng.standard_normal(ends[-1], dtype=np.float32)) if case.weighted else traffic
