"""QuantizedTable: rows of codes with their scales and biases, and which of them are pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from . import _arguments, _handle
from . import layout as layouts
from .base import Table

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

# Rows go from one layout to another about this many bytes at a time.
CONVERTED_AT_ONCE = 1 << 20


class QuantizedTable(Table):
    """An embedding table stored as 8-, 4- or 2-bit codes.

    Wraps packed rows without copying them; `quantize` makes a table from floats.

    Parameters
    ----------
    data : ndarray of uint8, shape (num_rows, row_bytes)
        Packed rows: the codes, lowest bits first, then scale and bias, little-endian. By default as FBGEMM and
        PyTorch's prepack operators lay them out; see `qembag.layout.RowLayout` for others. Rows may lie at any stride
        and be read-only or memory-mapped (``numpy.load(path, mmap_mode="r")``). A mapped file that is truncated while
        in use ends the process: the system sends SIGBUS for rows that the file no longer has, and no library can catch
        that. Where files may change, load a copy (``numpy.load(path)``).
    bits : {8, 4, 2}
        Bits of a code.
    dim : int, optional
        Elements of a row. What is left of a row after codes, scales and biases is padding. If not given, the largest
        dim with which they fill a row exactly.
    scale_dtype : {float32, float16}, optional
        The stored type of scales and biases; float32 at 8 bits and float16 at 4 and 2 if not given.
    scale_first : bool
        Whether scales and biases come before the codes.
    group_size : int, optional
        Elements that share a scale and a bias, a multiple of 16; a whole row if not given.
    compressed_indices_mapping : array_like of int32, shape (num_embeddings,), optional
        For a pruned table: the row of each logical index, -1 for one that is pruned. As in PyTorch, a mapping of
        exactly ``[0]`` means that the table is not pruned.
    row_weights : array_like of floats, shape (num_embeddings,), optional
        A weight for each logical row, which the table only keeps: lookups do not apply it by themselves. Look up with
        ``per_sample_weights=table.row_weights[indices]``, or make another table with `apply_row_weights`.

    Attributes
    ----------
    data, bits, dim
        As given; `data` is a new view at each access, of the same memory.
    layout : RowLayout
        How rows are laid out.
    compressed_indices_mapping : ndarray of int32, or None
        None where nothing is pruned.
    row_weights : ndarray of float32, or None
        As given, rounded to float32.
    num_rows : int
        Stored rows.
    num_embeddings : int
        Logical rows: as many as the mapping has entries, or the stored ones where there is none.
    shape : tuple of int
        ``(num_embeddings, dim)``.
    row_bytes : int
        Bytes of a row: codes, scales, biases and padding.
    nbytes : int
        Bytes of rows, mapping and row weights.

    Raises
    ------
    TypeError
        If `data` is not uint8 or the mapping is not int32.
    ValueError
        If a shape, `bits`, `dim` or an option of the layout is wrong; if `dim` is not given, and no dim fills a row.
    IndexError
        If the mapping names a row that is not there.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(15 * np.eye(4, dtype=np.float32), bits=4)
    >>> table
    QuantizedTable(num_embeddings=4, dim=4, bits=4, nbytes=24)
    >>> table[1]
    array([ 0., 15.,  0.,  0.], dtype=float32)
    >>> qembag.QuantizedTable(np.zeros((3, 64), np.uint8), 4, dim=100, scale_first=True)
    QuantizedTable(num_embeddings=3, dim=100, bits=4, scale_first=True, row_bytes=64, nbytes=192)
    """

    __slots__ = ("_per_channel",)

    def __init__(
        self,
        data: NDArray[np.uint8],
        bits: int,
        *,
        dim: int | None = None,
        scale_dtype: DTypeLike | None = None,
        scale_first: bool = False,
        group_size: int | None = None,
        compressed_indices_mapping: ArrayLike | None = None,
        row_weights: ArrayLike | None = None,
    ) -> None:
        bits = _arguments.bits(bits)
        # A view of the table's own: nobody else can reshape it.
        rows = _arguments.rows(data, "data").view()
        row_layout = layouts.of_rows(
            rows.shape[1],
            bits,
            "data",
            dim=dim,
            scale_dtype=scale_dtype,
            scale_first=scale_first,
            group_size=group_size,
        )
        mapping = _arguments.mapping(compressed_indices_mapping, check_rows=len(rows))
        # All at once, so that arguments that are refused leave a table as it was.
        handle = _handle.TableHandle(rows, row_layout, mapping)
        self._set(handle, _arguments.row_weights(row_weights, handle.num_embeddings))

    def _set(
        self,
        handle: _handle.TableHandle,
        row_weights: NDArray[np.float32] | None = None,
        per_channel: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> None:
        super()._set(handle, row_weights)
        # The scales and zero points that `ops.embedding_bag_prepack` was given, for its unpack.
        self._per_channel = per_channel

    def _share(self, other: Self) -> None:
        super()._share(other)
        self._per_channel = other._per_channel

    @property
    def layout(self) -> layouts.RowLayout:
        layout: layouts.RowLayout = self._handle.layout  # type: ignore[assignment]
        return layout

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._handle.rows.view()

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def scales(self) -> NDArray[np.float32]:
        """The scales of the stored rows: float32, shape (num_rows,), or (num_rows, num_groups) where rows have several
        groups; decoded at each access."""
        return self._parts_of_pairs(0)

    @property
    def biases(self) -> NDArray[np.float32]:
        """The biases of the stored rows: float32, shape (num_rows,), or (num_rows, num_groups) where rows have several
        groups; decoded at each access."""
        return self._parts_of_pairs(1)

    def _parts_of_pairs(self, part: int) -> NDArray[np.float32]:
        parts = self.layout.pairs(self._handle.rows)[:, :, part]
        return (parts if self.layout.num_groups > 1 else parts[:, 0]).copy()

    def codes(self) -> NDArray[np.uint8]:
        """The codes of the stored rows, one a byte: uint8, shape (num_rows, dim), a copy."""
        return self.layout.codes(self._handle.rows)

    def __repr__(self) -> str:
        more = "".join(f", {name}={value}" for name, value in self.layout.not_default().items())
        return self._repr(f"bits={self.bits}{more}")

    def _taken(self, numbers: Any) -> NDArray[np.uint8]:
        return self.layout.taken(self._handle.rows, numbers)

    def _reduced(self) -> tuple[Any, ...]:
        parts = (self._taken(slice(None)), self.layout, self.compressed_indices_mapping, self._per_channel)
        return (table_of, (type(self), *parts, self.row_weights))

    def update(
        self,
        rows: ArrayLike,
        weights: ArrayLike,
        *,
        method: Literal["minmax", "greedy", "lsq"] = "minmax",
        importance: ArrayLike | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Quantize new values for some rows, in place.

        Not atomic: a lookup that runs at the same time in another thread may read a row half old and half new. To
        refresh a model while it serves, make a new table and swap it in: ``docs/updating.md`` shows how.
        Copies of the table by the module `copy`, deep ones too, are of the same rows, and change with it.
        If an error is raised, the table is unchanged.

        Parameters
        ----------
        rows : array_like of integers, shape (n,)
            Logical rows, from 0. If a row is given twice, its last values count.
        weights : array_like of float32, float16, float64 or bfloat16, shape (n, dim)
            Their new values.
        method, importance, num_threads
            As for `quantize`. The table keeps its layout.

        Raises
        ------
        TypeError
            If `rows` is not of integers or `weights` not of floats.
        ValueError
            If the table's rows are read-only; if a shape is wrong; if a row is pruned; if an option is wrong; if
            `weights` cannot be quantized.
        IndexError
            If a row is out of range.

        Examples
        --------
        >>> import numpy as np, qembag
        >>> table = qembag.quantize(np.zeros((3, 4), np.float32), bits=4)
        >>> table.update([1], [[0, 5, 10, 15]])
        >>> table[:]
        array([[ 0.,  0.,  0.,  0.],
               [ 0.,  5., 10., 15.],
               [ 0.,  0.,  0.,  0.]], dtype=float32)
        """
        from .quantize import update_rows  # `quantize` imports this module

        update_rows(self, rows, weights, method, importance, num_threads)

    def _put(self, numbers: NDArray[np.integer[Any]], packed: NDArray[np.uint8]) -> None:
        """Overwrite the stored rows with these numbers by packed rows."""
        self.layout.put(self._handle.rows, numbers, packed)
        # The rows no longer hold what `ops.embedding_bag_prepack` was given.
        self._per_channel = None

    def to_layout(
        self,
        *,
        scale_dtype: DTypeLike | None = None,
        scale_first: bool = False,
        group_size: int | None = None,
        row_alignment: int = 1,
    ) -> QuantizedTable:
        """A table of the same codes and values in another layout of rows; without arguments, in PyTorch's.

        Parameters
        ----------
        scale_dtype, scale_first, group_size, row_alignment
            As for `quantize`.

        Returns
        -------
        QuantizedTable
            With copied rows, and copies of the mapping and the row weights.

        Raises
        ------
        TypeError
            If an argument has a wrong type.
        ValueError
            If an argument is out of range, or if a value would change: a float32 scale or bias that float16 does not
            hold exactly, or groups that are joined and whose scales or biases differ in a bit.

        Examples
        --------
        >>> import numpy as np, qembag
        >>> table = qembag.quantize(np.eye(32, dtype=np.float32), bits=4)
        >>> table.to_layout(scale_dtype="float32", group_size=16, row_alignment=64)
        QuantizedTable(num_embeddings=32, dim=32, bits=4, scale_dtype=float32, group_size=16, row_bytes=64, nbytes=2048)
        >>> np.array_equal(_.to_layout().data, table.data)
        True
        """
        target = layouts.aligned(self.bits, self.dim, scale_dtype, scale_first, group_size, row_alignment)
        rows = self._handle.rows
        converted = np.empty((len(rows), target.row_bytes), dtype=np.uint8)
        at_once = max(CONVERTED_AT_ONCE // max(target.row_bytes, self.row_bytes), 1)
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            target.convert(rows[part], self.layout, converted[part], start)
        mapping = self._handle.mapping
        copied = None if mapping is None else mapping.copy()
        weights = None if self._row_weights is None else self._row_weights.copy()
        return table_of(type(self), converted, target, copied, self._per_channel, weights)


def table_of(
    kind: type[QuantizedTable],
    data: NDArray[np.uint8],
    layout: layouts.RowLayout,
    mapping: NDArray[np.int32] | None,
    per_channel: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    row_weights: NDArray[np.float32] | None = None,
) -> QuantizedTable:
    """A table of its parts, whatever arguments a subclass takes."""
    table = kind._of(data, layout, mapping, row_weights)
    table._per_channel = per_channel
    return table
