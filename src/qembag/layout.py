"""How rows are laid out: the only place that counts bytes."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import _arguments
from ._errors import not_exact, not_joined, shown
from ._handle import FLOAT_ELEMENTS, LayoutFields, register_packed_layout

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


class RowLayout(LayoutFields):
    """A row of packed codes, and pairs of a scale and a bias: by default as FBGEMM and PyTorch lay them out.

    Codes stand side by side, the first one in a byte's lowest bits. Scales and biases are little-endian, at any
    address.

    Parameters
    ----------
    bits : {8, 4, 2}
        Bits of a code.
    dim : int
        Elements of a row, 1 or more.
    scale_dtype : {float32, float16}, optional
        Of a scale and of a bias; float32 at 8 bits and float16 at 4 and 2 if not given, as in PyTorch.
    scale_first : bool
        Whether the pairs come before the codes, as in FBGEMM's table-batched operator and TorchRec.
    group_size : int, optional
        Elements that share a pair, a multiple of 16: the first so many the first pair, and so on; the last group may be
        shorter. The pairs stand side by side, in the order of groups. If not given, or not below `dim`, a row is one
        group.
    row_bytes : int, optional
        Bytes of a row; more than codes and pairs take is padding at its end.

    Attributes
    ----------
    bits, dim, scale_first
        As given.
    row_bytes : int
        Bytes of a row, with its padding.
    used_bytes : int
        Bytes of its codes and pairs.
    codes_start, codes_bytes : int
        Where in a row its codes stand.
    pairs_start, pairs_bytes : int
        Where in a row its pairs stand.
    pair_size : int
        Bytes of a scale, and of a bias.
    group_size : int
        Elements that share a scale and a bias: `dim` where a row is one group.
    num_groups : int
        Groups of a row.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.

    Examples
    --------
    >>> from qembag.layout import RowLayout
    >>> layout = RowLayout(4, 33)
    >>> layout.codes_bytes, layout.row_bytes
    (17, 21)
    >>> RowLayout(4, 128, group_size=32, row_bytes=128)
    RowLayout(bits=4, dim=128, group_size=32, row_bytes=128)
    >>> _.num_groups, _.used_bytes
    (4, 80)
    """

    __slots__ = ()

    def __new__(
        cls,
        bits: int,
        dim: int,
        *,
        scale_dtype: DTypeLike | None = None,
        scale_first: bool = False,
        group_size: int | None = None,
        row_bytes: int | None = None,
    ) -> Self:
        bits = _arguments.bits(bits)
        dim = _arguments.whole_number(dim, "dim")
        # No row is longer than its elements' floats can be counted.
        if not 1 <= dim <= sys.maxsize // 4:
            raise ValueError(f"dim must be from 1 to {sys.maxsize // 4}, got {shown(dim)}")
        pair_size = _arguments.scale_dtype(scale_dtype, bits).itemsize
        group = _arguments.group_size(group_size)
        group = dim if group is None else min(group, dim)
        codes_bytes = -(-dim * bits // 8)
        pairs_bytes = 2 * pair_size * -(-dim // group)
        used_bytes = codes_bytes + pairs_bytes
        length = used_bytes if row_bytes is None else _arguments.whole_number(row_bytes, "row_bytes")
        if not used_bytes <= length <= sys.maxsize:
            raise ValueError(
                f"row_bytes must be from {used_bytes} to {sys.maxsize} for codes and pairs of a dim of {dim} at "
                f"{bits} bits, got {shown(length)}"
            )
        pairs_come_first = _arguments.flag(scale_first, "scale_first")
        codes_start = pairs_bytes if pairs_come_first else 0
        pairs_start = 0 if pairs_come_first else codes_bytes
        return super().__new__(cls, bits, dim, length, codes_start, pairs_start, pair_size, group)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowLayout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, ...]:
        return (self.bits, self.dim, self.row_bytes, self.pair_size, self.pairs_start, self.group_size)

    def __repr__(self) -> str:
        more = "".join(f", {name}={value!r}" for name, value in self.not_default().items())
        return f"{type(self).__name__}(bits={self.bits}, dim={self.dim}{more})"

    def taken(self, rows: NDArray[np.uint8], numbers: Any) -> NDArray[np.uint8]:
        """Some of the rows; their padding, which is not read, as zeros."""
        used: NDArray[np.uint8] = rows[:, : self.used_bytes][numbers]
        if self.used_bytes == self.row_bytes:
            return used
        padded = np.zeros((len(used), self.row_bytes), dtype=np.uint8)
        padded[:, : self.used_bytes] = used
        return padded

    def put(self, rows: NDArray[np.uint8], numbers: NDArray[np.integer[Any]], packed: NDArray[np.uint8]) -> None:
        """Overwrite the rows with these numbers by packed rows; their padding stays as it is."""
        rows[:, : self.used_bytes][numbers] = packed[:, : self.used_bytes]

    def __reduce__(self) -> tuple[Any, ...]:
        return (functools.partial(type(self), **self.not_default()), (self.bits, self.dim))

    def not_default(self) -> dict[str, Any]:
        """The arguments, other than `bits` and `dim`, that are not as in PyTorch's layout."""
        found: dict[str, Any] = {}
        if self.scale_dtype != _arguments.scale_dtype(None, self.bits):
            found["scale_dtype"] = self.scale_dtype.name
        if self.scale_first:
            found["scale_first"] = True
        if self.num_groups > 1:
            found["group_size"] = self.group_size
        if self.row_bytes != self.used_bytes:
            found["row_bytes"] = self.row_bytes
        return found

    def bytes_of(self, num_rows: int) -> int:
        """The bytes of `num_rows` rows."""
        return num_rows * self.row_bytes

    def rows_in(self, num_bytes: int) -> int:
        """How many whole rows fit in `num_bytes` bytes."""
        return num_bytes // self.row_bytes

    @property
    def codes_per_byte(self) -> int:
        return 8 // self.bits

    @property
    def pairs_bytes(self) -> int:
        return 2 * self.pair_size * self.num_groups

    @property
    def scale_first(self) -> bool:
        return self.pairs_start < self.codes_start

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        """Of a scale or a bias: float32 or float16."""
        return np.dtype(f"f{self.pair_size}")

    @property
    def pair_dtype(self) -> np.dtype[Any]:
        """Of a scale or a bias as it is stored: little-endian."""
        return np.dtype(f"<f{self.pair_size}")

    def elements(self, group: int) -> slice:
        """Those of a group."""
        return slice(group * self.group_size, min((group + 1) * self.group_size, self.dim))

    # ---- What rows hold ---------------------------------------------------------------------------------------------

    def stored_pairs(self, rows: NDArray[np.uint8]) -> NDArray[Any]:
        """Scale and bias of each group as they are stored, a copy: shape (num_rows, num_groups, 2)."""
        stored = rows[:, self.pairs_start : self.pairs_start + self.pairs_bytes].copy()
        return stored.view(self.pair_dtype).reshape(len(rows), self.num_groups, 2)

    def pairs(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale and bias of each group: shape (num_rows, num_groups, 2)."""
        return self.stored_pairs(rows).astype(np.float32)

    def packed_codes(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The bytes of the codes, a view: shape (num_rows, codes_bytes)."""
        return rows[:, self.codes_start : self.codes_start + self.codes_bytes]

    def codes(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The codes of each row, one a byte: shape (num_rows, dim), a copy."""
        packed = self.packed_codes(rows)
        if self.codes_per_byte == 1:
            return packed.copy()
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        codes = (packed[:, :, None] >> shifts) & np.uint8(2**self.bits - 1)
        return np.ascontiguousarray(codes.reshape(len(rows), self.codes_bytes * self.codes_per_byte)[:, : self.dim])

    def pack(self, codes: NDArray[np.integer[Any]], pairs: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """Rows of codes (num_rows, dim), none too large, and of pairs (num_rows, num_groups, 2); padding is 0."""
        rows = np.zeros((len(codes), self.row_bytes), dtype=np.uint8)
        packed = self.packed_codes(rows)
        for place in range(self.codes_per_byte):
            some = codes[:, place :: self.codes_per_byte].astype(np.uint8)
            packed[:, : some.shape[1]] |= some << np.uint8(place * self.bits)
        self._set_pairs(rows, pairs)
        return rows

    def pack_bytes(self, packed: NDArray[np.uint8], pairs: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """As `pack`, of bytes that hold codes already, (num_rows, codes_bytes); bits beyond the last code become 0."""
        rows = np.zeros((len(packed), self.row_bytes), dtype=np.uint8)
        codes = self.packed_codes(rows)
        codes[...] = packed
        self._clear_unused(codes)
        self._set_pairs(rows, pairs)
        return rows

    def _clear_unused(self, codes: NDArray[np.uint8]) -> None:
        used_bits = self.dim * self.bits % 8
        if used_bits:
            codes[:, -1] &= np.uint8(2**used_bits - 1)

    def _set_pairs(self, rows: NDArray[np.uint8], pairs: NDArray[np.floating[Any]]) -> None:
        stored = np.ascontiguousarray(pairs, dtype=self.pair_dtype).reshape(len(rows), 2 * self.num_groups)
        rows[:, self.pairs_start : self.pairs_start + self.pairs_bytes] = stored.view(np.uint8)

    # ---- From one layout to another ---------------------------------------------------------------------------------

    def convert(self, rows: NDArray[np.uint8], source: RowLayout, out: NDArray[np.uint8], first_row: int) -> None:
        """Rows of the layout `source`, of the same bits and dim, into `out`, with the same codes and values of pairs.

        Raises
        ------
        ValueError
            That names the first row which this layout cannot hold; `first_row` is the number of the first one here.
        """
        given = source.stored_pairs(rows)
        starts = range(0, self.dim, self.group_size)
        # The groups in `source` of each group's first and last element.
        firsts = np.array([start // source.group_size for start in starts], np.intp)
        lasts = np.array(
            [(min(start + self.group_size, self.dim) - 1) // source.group_size for start in starts], np.intp
        )
        joined = self._first_joined(given, firsts, lasts)
        kept = given[:, firsts]
        pairs = _arguments.quietly(kept.astype, self.pair_dtype)
        lost = self._first_lost(kept, pairs)
        if joined is not None and (lost is None or joined[0] <= lost[0]):
            row, group = joined
            raise not_joined(first_row + row, [(source.elements(g), given[row, g]) for g in (group - 1, group)])
        if lost is not None:
            row, group, part = lost
            raise not_exact(first_row + row, group, part, float(kept[lost]), self)
        codes = self.packed_codes(out)
        codes[...] = source.packed_codes(rows)
        self._clear_unused(codes)
        self._set_pairs(out, pairs)
        out[:, self.used_bytes :] = 0

    @staticmethod
    def _first_joined(given: NDArray[Any], firsts: NDArray[np.intp], lasts: NDArray[np.intp]) -> tuple[int, int] | None:
        """The first row in which groups that are to share a pair differ in it, and the group that differs from its
        predecessor."""
        if np.array_equal(firsts, lasts):
            return None
        raw = given.view(f"u{given.itemsize}")
        changes = np.zeros(given.shape[:2], dtype=np.intp)
        changes[:, 1:] = (raw[:, 1:] != raw[:, :-1]).any(axis=2)
        counts = changes.cumsum(axis=1)
        wrong = np.argwhere(counts[:, firsts] != counts[:, lasts])
        if not len(wrong):
            return None
        row, group = wrong[0]
        return int(row), int(firsts[group] + 1 + np.argmax(changes[row, firsts[group] + 1 :]))

    def _first_lost(self, kept: NDArray[Any], pairs: NDArray[Any]) -> tuple[int, int, int] | None:
        """The first row, its group, and 0 or 1 for its scale or bias, which is not exact in `pairs`."""
        if pairs.itemsize >= kept.itemsize:
            return None
        wrong = np.argwhere((pairs.astype(kept.dtype).view("u4") != kept.view("u4")) & ~np.isnan(kept))
        return tuple(wrong[0].tolist()) if len(wrong) else None


class FloatLayout(LayoutFields):
    """A row of floats in the host's byte order.

    Parameters
    ----------
    name : {"float32", "float16", "bfloat16"}
        The type of an element.
    dim : int
        Elements of a row, 1 or more.
    stored : dtype
        The array's: of bfloat16 that of another package, or uint16.

    Examples
    --------
    >>> import numpy as np
    >>> from qembag.layout import FloatLayout
    >>> FloatLayout("float16", 100, np.dtype(np.float16)).row_bytes
    200
    """

    __slots__ = ("name", "stored")

    name: str
    stored: np.dtype[Any]

    def __new__(cls, name: str, dim: int, stored: np.dtype[Any]) -> Self:
        layout = super().__new__(cls, FLOAT_ELEMENTS[name], dim, dim * stored.itemsize)
        layout.name, layout.stored = name, stored
        return layout

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.name, self.dim, self.stored))


def _smallest(bits: int, scale_dtype: np.dtype[Any] | None = None) -> RowLayout:
    """The layout of the shortest rows: PyTorch's, or with scales of another type."""
    return RowLayout(bits, 1, scale_dtype=scale_dtype)


# Not a decorator: stubtest would take its signature for the function's.
smallest = functools.cache(_smallest)


def aligned(
    bits: int, dim: int, scale_dtype: object, scale_first: object, group_size: object, row_alignment: object
) -> RowLayout:
    """The layout of rows whose length is a multiple of `row_alignment`."""
    options: dict[str, Any] = {"scale_dtype": scale_dtype, "scale_first": scale_first, "group_size": group_size}
    multiple = _arguments.row_alignment(row_alignment)
    tight = RowLayout(bits, dim, **options)
    if tight.row_bytes % multiple == 0:
        return tight
    return RowLayout(bits, dim, **options, row_bytes=-(-tight.row_bytes // multiple) * multiple)


# ---- Whole tables ----------------------------------------------------------------------------------------------------


def table_bytes(layout: LayoutFields, num_rows: int, num_embeddings: int | None = None) -> int:
    """Bytes of `num_rows` rows and, for a pruned table, of its int32 mapping of `num_embeddings` entries."""
    mapping = 0 if num_embeddings is None else np.dtype(np.int32).itemsize * num_embeddings
    return layout.row_bytes * num_rows + mapping


def rows_within(layout: LayoutFields, num_bytes: int, num_embeddings: int) -> int:
    """How many rows a pruned table of `num_bytes` bytes may have; below 0 if the mapping alone takes more."""
    return (num_bytes - table_bytes(layout, 0, num_embeddings)) // layout.row_bytes


# ---- Of rows that are there ------------------------------------------------------------------------------------------


def largest_dim(bits: int, row_bytes: int, pair_size: int, group_size: int | None) -> int:
    """The most elements that rows of so many bytes can have; 0 where they are too short for one."""
    per_byte, pair = 8 // bits, 2 * pair_size
    if group_size is None:
        return max(row_bytes - pair, 0) * per_byte
    groups, rest = divmod(row_bytes, group_size // per_byte + pair)
    return groups * group_size + max(rest - pair, 0) * per_byte


def of_rows(
    row_bytes: int,
    bits: int,
    name: str,
    *,
    dim: object = None,
    scale_dtype: object = None,
    scale_first: object = False,
    group_size: object = None,
) -> RowLayout:
    """The layout of an argument's rows. Without `dim`, of the largest dim whose codes and pairs fill them exactly."""
    return _cached_of_rows(
        row_bytes,
        bits,
        name,
        None if dim is None else _arguments.whole_number(dim, "dim"),
        _arguments.scale_dtype(scale_dtype, bits),
        _arguments.flag(scale_first, "scale_first"),
        _arguments.group_size(group_size),
    )


def _of_rows(
    row_bytes: int,
    bits: int,
    name: str,
    dim: int | None,
    scale_dtype: np.dtype[Any],
    scale_first: bool,
    group_size: int | None,
) -> RowLayout:
    options: dict[str, Any] = {"scale_dtype": scale_dtype, "scale_first": scale_first, "group_size": group_size}
    most = largest_dim(bits, row_bytes, scale_dtype.itemsize, group_size)
    if most < 1:
        pair = smallest(bits, scale_dtype).pairs_bytes
        raise ValueError(
            f"{name} must have rows of at least {pair + 1} bytes at {bits} bits "
            f"(codes, and {pair} bytes of scale and bias), got rows of {row_bytes}"
        )
    if dim is not None:
        if not 1 <= dim <= most:
            raise ValueError(
                f"dim must be from 1 to {most} for rows of {row_bytes} bytes at {bits} bits, got {shown(dim)}"
            )
        return RowLayout(bits, dim, **options, row_bytes=row_bytes)
    found = RowLayout(bits, most, **options)
    if found.row_bytes != row_bytes:
        raise ValueError(
            f"{name} must have rows that codes and pairs fill exactly, or dim must be given, which makes the rest of a "
            f"row padding; got rows of {row_bytes} bytes at {bits} bits in groups of {group_size}, which no dim fills"
        )
    return found


# A table is made in 5 us, of which this would be 4.
_cached_of_rows = functools.lru_cache(maxsize=256)(_of_rows)


def packed_layout(bits: int, row_bytes: int) -> RowLayout | None:
    """The layout of rows that hold as many elements as they can, as PyTorch's do; None where they are too short."""
    dim = largest_dim(bits, row_bytes, smallest(bits).pair_size, None)
    return RowLayout(bits, dim) if dim else None


# `ops` asks at each call. Not a decorator, which would hide the signature from mypy.
register_packed_layout(functools.lru_cache(maxsize=256)(packed_layout))
