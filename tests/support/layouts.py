"""The layouts of rows, as tests make and read them. One more of torch's is one more entry of `LAYOUTS`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

NAMES = {8: "byte", 4: "4bit", 2: "2bit"}
MODES = ("sum", "mean", "max")  # as the reference's operators number them
ALL_MODES = (*MODES, "average", "sqrtn")


@dataclass(frozen=True)
class Layout:
    """Codes of `bits` bits, the first element in the lowest bits of a byte, and pairs of scale and bias: one a row, or
    one for each `group_size` elements. The pairs stand behind the codes or `first`; padding ends the row."""

    bits: int
    pair: str  # the type of scale and bias
    first: bool = False
    group_size: int | None = None
    padding: int = 0  # bytes
    alignment: int = 1  # of the bytes of a row, by more padding

    def __str__(self) -> str:
        parts = [f"{self.bits}bit", self.pair[1:], "first" if self.first else "behind"]
        parts += [f"groups{self.group_size}"] if self.group_size else []
        parts += [f"padding{self.padding}"] if self.padding else []
        return "-".join(parts + ([f"aligned{self.alignment}"] if self.alignment > 1 else []))

    # ---- Bytes -------------------------------------------------------------------------------------------------------

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def pair_bytes(self) -> int:
        """Of one pair."""
        return 2 * np.dtype(self.pair).itemsize

    def num_groups(self, dim: int) -> int:
        return -(-dim // self.group_size) if self.group_size else 1

    def codes_bytes(self, dim: int) -> int:
        return -(-dim // self.per_byte)

    def pairs_bytes(self, dim: int) -> int:
        return self.num_groups(dim) * self.pair_bytes

    def used_bytes(self, dim: int) -> int:
        """Of a row without its padding."""
        return self.codes_bytes(dim) + self.pairs_bytes(dim)

    def row_bytes(self, dim: int) -> int:
        return -(-(self.used_bytes(dim) + self.padding) // self.alignment) * self.alignment

    def codes_start(self, dim: int) -> int:
        return self.pairs_bytes(dim) if self.first else 0

    def pairs_start(self, dim: int) -> int:
        return 0 if self.first else self.codes_bytes(dim)

    def dim(self, row_bytes: int) -> int:
        """The most elements that such a row can hold, if none of it is padding; below 1 if it can hold none."""
        if not self.group_size:
            return (row_bytes - self.pair_bytes) * self.per_byte
        groups, rest = divmod(row_bytes, self.codes_bytes(self.group_size) + self.pair_bytes)
        return groups * self.group_size + max(rest - self.pair_bytes, 0) * self.per_byte

    # ---- Codes and pairs ---------------------------------------------------------------------------------------------

    def _place_of_pairs(self, rows: np.ndarray, dim: int | None) -> slice:
        """Without a dim: of rows with one pair and no padding."""
        if dim is None:
            assert not self.group_size
            assert not self.padding
            dim = self.dim(rows.shape[-1])
        return slice(self.pairs_start(dim), self.pairs_start(dim) + self.pairs_bytes(dim))

    def pairs(self, rows: np.ndarray, dim: int | None = None) -> np.ndarray:
        """Scale and bias of each row; of groups, those of each of them: shape (num_rows, num_groups, 2)."""
        stored = np.ascontiguousarray(rows[..., self._place_of_pairs(rows, dim)]).view(self.pair)
        return stored.reshape(*stored.shape[:-1], stored.shape[-1] // 2, 2) if self.group_size else stored

    def set_pairs(self, rows: np.ndarray, pairs: np.ndarray, dim: int | None = None) -> None:
        place = self._place_of_pairs(rows, dim)
        with np.errstate(all="ignore"):
            stored = np.ascontiguousarray(pairs).astype(self.pair)
        rows[..., place] = stored.view(np.uint8).reshape(rows[..., place].shape)

    def pack(self, codes: np.ndarray, pairs: np.ndarray, pad: int = 0) -> np.ndarray:
        """Rows of these codes, one an element, and pairs (num_rows, 2) or (num_rows, num_groups, 2). All padding is
        `pad`."""
        num_rows, dim = codes.shape
        rows = np.full((num_rows, self.row_bytes(dim)), pad, dtype=np.uint8)
        start = self.codes_start(dim)
        rows[:, start : start + self.codes_bytes(dim)] = 0
        for place in range(self.per_byte):
            some = codes[:, place :: self.per_byte].astype(np.uint8)
            rows[:, start : start + some.shape[1]] |= some << np.uint8(self.bits * place)
        self.set_pairs(rows, pairs, dim)
        return rows

    def unsigned(self, rows: np.ndarray, dim: int | None = None) -> np.ndarray:
        """The rows with +0 for each scale or bias of -0: which of the two is the minimum of a row is left open."""
        alike = rows.copy()
        self.set_pairs(alike, self.pairs(rows, dim) + np.zeros((), self.pair), dim)
        return alike

    def with_one_nan(self, rows: np.ndarray, dim: int) -> np.ndarray:
        """The rows with the same NaN for each scale or bias that is any: a conversion may change its payload."""
        alike = rows.copy()
        pairs = self.pairs(rows, dim)
        self.set_pairs(alike, np.where(np.isnan(pairs), np.full((), np.nan, self.pair), pairs), dim)
        return alike

    def is_of(self, table: Any, dim: int) -> bool:
        """Whether a `QuantizedTable` of this dim says that its rows are laid out so."""
        told = table.layout
        size = min(self.group_size or dim, dim)
        places = told.codes_start, told.pairs_start, told.used_bytes, told.row_bytes
        return (
            (told.bits, told.dim, told.group_size, told.num_groups) == (self.bits, dim, size, self.num_groups(dim))
            and places == (self.codes_start(dim), self.pairs_start(dim), self.used_bytes(dim), self.row_bytes(dim))
            and (told.scale_first, told.scale_dtype) == (self.first, np.dtype(self.pair[1:]))
            and table.row_bytes == self.row_bytes(dim)
        )

    # ---- Arguments ---------------------------------------------------------------------------------------------------

    def keywords(self) -> dict[str, Any]:
        """The arguments of a `QuantizedTable` of such rows, besides bits and dim: those that are no defaults."""
        given: dict[str, Any] = {}
        if self.pair != LAYOUTS[self.bits].pair:
            given["scale_dtype"] = np.dtype(self.pair[1:]).type
        if self.first:
            given["scale_first"] = True
        if self.group_size:
            given["group_size"] = self.group_size
        return given

    def reading(self) -> dict[str, Any]:
        """The oracle's arguments, besides bits and dim."""
        return {"pair": self.pair, "first": self.first, "group_size": self.group_size}


LAYOUTS = {8: Layout(8, "<f4"), 4: Layout(4, "<f2"), 2: Layout(2, "<f2")}
# Of FBGEMM's table-batched operator.
PAIRS_FIRST = {bits: Layout(bits, "<f2", first=True) for bits in LAYOUTS}

GROUP_SIZES = (None, 16, 32, 48, 64, 256)
PADDINGS = (1, 7, 64)


def _all_kinds() -> list[Layout]:
    kinds = []
    for bits, pair, size, first in itertools.product((8, 4, 2), ("<f4", "<f2"), GROUP_SIZES, (False, True)):
        plain = Layout(bits, pair, first, size)
        kinds += [plain, replace(plain, padding=PADDINGS[len(kinds) // 2 % len(PADDINGS)])]
    return kinds


# Each kind of layout there is, without padding and with some.
ALL_KINDS = _all_kinds()


def spread(count: int) -> list[Layout]:
    """So many of `ALL_KINDS`, of every sort: each step goes about 0.618 of the list further."""
    return [ALL_KINDS[number * 89 % len(ALL_KINDS)] for number in range(count)]


# ---- Makers ----------------------------------------------------------------------------------------------------------

EXTREMES = (0.0, -0.0, np.inf, -np.inf, 6e-8, 1e-40, -1e-44, 65504.0, 3e38, -3e38)


def rows_of(rng: np.random.Generator, layout: Layout, num_rows: int, dim: int, extremes: bool = False) -> np.ndarray:
    """Rows of full-range codes, scales and biases of either sign, and padding of any bytes; with `extremes`, some of
    the scales and biases are denormal, huge, zero or infinite."""
    rows = rng.integers(0, 256, (num_rows, layout.row_bytes(dim)), dtype=np.uint8)
    pairs = rng.normal(size=(num_rows, 2 * layout.num_groups(dim)))
    if extremes:
        picks = rng.integers(0, 4 * len(EXTREMES), pairs.shape)
        pairs = np.where(picks < len(EXTREMES), np.resize(EXTREMES, 4 * len(EXTREMES))[picks], pairs)
    layout.set_pairs(rows, pairs, dim)
    return rows


def packed_rows(rng: np.random.Generator, num_rows: int, dim: int, bits: int, extremes: bool = False) -> np.ndarray:
    """Those of torch's layout."""
    return rows_of(rng, LAYOUTS[bits], num_rows, dim, extremes)


def bag_offsets(rng: np.random.Generator, num_bags: int, longest: int) -> np.ndarray:
    """Starts and the last end of bags of mixed lengths: a third empty, one long."""
    lengths = rng.integers(0, longest + 1, num_bags)
    lengths[rng.random(num_bags) < 1 / 3] = 0
    if num_bags:
        lengths[rng.integers(num_bags)] = 5 * longest
    return np.concatenate([[0], np.cumsum(lengths)])
