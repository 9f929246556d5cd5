"""The bytes of an input, read as choices, and the values from which an input chooses."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.layouts import EXTREMES

_random = np.random.default_rng(20261125)
POOL = _random.integers(0, 256, 1 << 17, dtype=np.uint8)
ODD = np.array([*EXTREMES, np.nan, 1, -1, 0.5], np.float32)
FLOATS = _random.normal(size=1 << 14).astype(np.float32)
WILD = np.where(_random.random(FLOATS.shape) < 0.25, _random.choice(ODD, FLOATS.shape), FLOATS)
WIDE = (FLOATS * 10.0 ** _random.integers(-38, 38, FLOATS.shape)).clip(-3e38, 3e38).astype(np.float32)
# Of so many tables and weights, one has wide rows: their calls and the oracle take up to a hundred times as long.
WIDE_ROWS = 32
MOST_DIM = 20_000
# The longest call looks up so many elements.
MOST_ELEMENTS = 1 << 16
INTEGERS = (-1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), -(2**63) + 7, 2**32 + 2, -(2**32), 2**64 - 1, 2**53 + 1)


class Source:
    """The bytes of an input, one after the other. Behind its end all are zero, the plainest choice."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def below(self, end: int) -> int:
        return (self.byte() if end <= 256 else self.byte() | self.byte() << 8) % end

    def pick(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def within(self, shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
        """As much of a shape of indices as keeps a lookup of rows of this dim short."""
        most, cut = max(MOST_ELEMENTS // dim, 1), []
        for length in shape:
            cut.append(min(length, most))
            most = max(most // max(length, 1), 1)
        return tuple(cut)

    @property
    def is_at_end(self) -> bool:
        return self.at >= len(self.data)

    def rarely(self, times: int = 16) -> bool:
        """Once in so many times; never behind the end."""
        return self.byte() % times == times - 1

    def whole(self) -> int:
        """Any whole number up to 64 bits and a sign."""
        return int.from_bytes(bytes(self.byte() for _ in range(8)), "little", signed=True)

    def values(self, pool: np.ndarray, count: int) -> np.ndarray:
        start = self.below(1 << 14) % max(len(pool) - count, 1)
        return pool[start : start + count].copy() if count <= len(pool) else np.resize(pool, count)

    def shape(self) -> tuple[int, ...]:
        """Of a small array of any number of dimensions."""
        return tuple(self.below(5) for _ in range(self.pick([1, 2, 0, 3, 1, 2, 4])))

    def rows_and_dim(self, most_rows: int) -> tuple[int, int]:
        """How many rows, and their elements: now and then few wide ones, which the loops take in several passes."""
        if self.rarely(WIDE_ROWS):
            return self.below(4), 300 + self.below(self.pick([700, 4000, MOST_DIM - 299]))
        return self.below(most_rows + 1), self.dim()

    def dim(self) -> int:
        kind = self.below(8)
        if kind < 5:
            return 1 + self.below(40)
        return 1 + self.below(300) if kind < 7 else 16 * (1 + self.below(20))
