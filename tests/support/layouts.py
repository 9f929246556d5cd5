"""The layouts of rows, as tests make and read them. One more layout is one more entry of `LAYOUTS`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = {8: "byte", 4: "4bit", 2: "2bit"}
MODES = ("sum", "mean", "max")


@dataclass(frozen=True)
class Layout:
    """Codes of `bits` bits, the first element in the lowest bits of a byte; then a pair of scale and bias."""

    bits: int
    pair: str  # the type of scale and bias

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def pair_bytes(self) -> int:
        return 2 * np.dtype(self.pair).itemsize

    def codes_bytes(self, dim: int) -> int:
        return -(-dim // self.per_byte)

    def row_bytes(self, dim: int) -> int:
        return self.codes_bytes(dim) + self.pair_bytes

    def dim(self, row_bytes: int) -> int:
        """The most elements that such a row can hold; below 1 if it can hold none."""
        return (row_bytes - self.pair_bytes) * self.per_byte

    def pairs(self, rows: np.ndarray) -> np.ndarray:
        """Scale and bias of each row."""
        return np.ascontiguousarray(rows[..., rows.shape[-1] - self.pair_bytes :]).view(self.pair)

    def set_pairs(self, rows: np.ndarray, pairs: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            stored = np.ascontiguousarray(pairs).astype(self.pair)
        rows[..., rows.shape[-1] - self.pair_bytes :] = stored.view(np.uint8)

    def unsigned(self, rows: np.ndarray) -> np.ndarray:
        """The rows with +0 for each scale or bias of -0: which of the two is the minimum of a row is left open."""
        alike = rows.copy()
        self.set_pairs(alike, self.pairs(rows) + np.zeros((), self.pair))
        return alike


LAYOUTS = {8: Layout(8, "<f4"), 4: Layout(4, "<f2"), 2: Layout(2, "<f2")}

EXTREMES = (0.0, -0.0, np.inf, -np.inf, 6e-8, 1e-40, -1e-44, 65504.0, 3e38, -3e38)


def packed_rows(rng: np.random.Generator, num_rows: int, dim: int, bits: int, extremes: bool = False) -> np.ndarray:
    """Rows of full-range codes, scales and biases of either sign; with `extremes`, some of them denormal, huge, zero or
    infinite."""
    layout = LAYOUTS[bits]
    rows = rng.integers(0, 256, (num_rows, layout.row_bytes(dim)), dtype=np.uint8)
    pairs = rng.normal(size=(num_rows, 2))
    if extremes:
        picks = rng.integers(0, 4 * len(EXTREMES), pairs.shape)
        pairs = np.where(picks < len(EXTREMES), np.resize(EXTREMES, 4 * len(EXTREMES))[picks], pairs)
    layout.set_pairs(rows, pairs)
    return rows


def bag_offsets(rng: np.random.Generator, num_bags: int, longest: int) -> np.ndarray:
    """Starts and the last end of bags of mixed lengths: a third empty, one long."""
    lengths = rng.integers(0, longest + 1, num_bags)
    lengths[rng.random(num_bags) < 1 / 3] = 0
    if num_bags:
        lengths[rng.integers(num_bags)] = 5 * longest
    return np.concatenate([[0], np.cumsum(lengths)])
