"""How rows are laid out: the only place that counts bytes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._handle import LayoutFields, register_packed_layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS = (8, 4, 2)


class RowLayout(LayoutFields):
    """A row of packed codes, then a scale and a bias: how FBGEMM and PyTorch lay them out.

    Codes stand side by side, the first one in a byte's lowest bits. Scale and bias are little-endian, at any address, float32
    at 8 bits and float16 at 4 and 2.

    Parameters
    ----------
    bits : {8, 4, 2}
        Bits of a code.
    dim : int
        Elements of a row, 1 or more.

    Attributes
    ----------
    row_bytes : int
        Bytes of a row.
    codes_start, codes_bytes : int
        Where in a row its codes stand.
    pairs_start, pair_size : int
        Where the scale stands, which the bias follows, and how many bytes each of them has.
    group_size : int
        Elements that share a scale and a bias: `dim`.

    Examples
    --------
    >>> from qembag.layout import RowLayout
    >>> layout = RowLayout(4, 33)
    >>> layout.codes_bytes, layout.row_bytes
    (17, 21)
    """

    __slots__ = ()

    def __new__(cls, bits: int, dim: int) -> Self:
        codes_bytes = -(-dim * bits // 8)
        pair_size = 4 if bits == 8 else 2
        return super().__new__(cls, bits, dim, codes_bytes + 2 * pair_size, 0, codes_bytes, pair_size, dim)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowLayout) and (self.bits, self.dim) == (other.bits, other.dim)

    def __hash__(self) -> int:
        return hash((self.bits, self.dim))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits}, dim={self.dim})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.bits, self.dim))

    @property
    def codes_per_byte(self) -> int:
        return 8 // self.bits

    @property
    def pairs_bytes(self) -> int:
        return 2 * self.pair_size

    @property
    def pair_dtype(self) -> np.dtype[Any]:
        """Of a scale or a bias as it is stored."""
        return np.dtype(f"<f{self.pair_size}")

    def pairs(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale and bias of each row: shape (num_rows, 2)."""
        stored = np.ascontiguousarray(rows[:, self.pairs_start : self.pairs_start + self.pairs_bytes])
        return stored.view(self.pair_dtype).reshape(-1, 2).astype(np.float32)

    def codes(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The codes of each row, one a byte: shape (num_rows, dim), a copy."""
        packed = rows[:, self.codes_start : self.codes_start + self.codes_bytes]
        if self.codes_per_byte == 1:
            return packed.copy()
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        codes = (packed[:, :, None] >> shifts) & np.uint8(2**self.bits - 1)
        return np.ascontiguousarray(codes.reshape(len(rows), self.codes_bytes * self.codes_per_byte)[:, : self.dim])

    def pack(self, codes: NDArray[np.integer[Any]], pairs: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """Rows of codes (num_rows, dim), none too large, and pairs of scale and bias (num_rows, 2)."""
        rows = np.zeros((len(codes), self.row_bytes), dtype=np.uint8)
        packed = rows[:, self.codes_start : self.codes_start + self.codes_bytes]
        for place in range(self.codes_per_byte):
            some = codes[:, place :: self.codes_per_byte].astype(np.uint8)
            packed[:, : some.shape[1]] |= some << np.uint8(place * self.bits)
        stored = np.ascontiguousarray(pairs, dtype=self.pair_dtype)
        rows[:, self.pairs_start : self.pairs_start + self.pairs_bytes] = stored.view(np.uint8)
        return rows


def smallest(bits: int) -> RowLayout:
    """The layout of the shortest rows."""
    return RowLayout(bits, 1)


def dims(bits: int, row_bytes: int) -> range:
    """The dims that rows of so many bytes can have; none where they are too short."""
    codes_bytes = row_bytes - smallest(bits).pairs_bytes
    per_byte = 8 // bits
    return range((codes_bytes - 1) * per_byte + 1, codes_bytes * per_byte + 1) if codes_bytes > 0 else range(0)


def packed_layout(bits: int, row_bytes: int) -> RowLayout | None:
    """The layout of rows that hold as many elements as they can, as PyTorch's do; None where they are too short."""
    possible = dims(bits, row_bytes)
    return RowLayout(bits, possible[-1]) if possible else None


# `ops` asks at each call. Not a decorator, which would hide the signature from mypy.
register_packed_layout(functools.lru_cache(maxsize=256)(packed_layout))
