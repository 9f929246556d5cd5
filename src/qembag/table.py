"""QuantizedTable: rows of codes with their scales and biases, and which of them are pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arguments, _errors, _handle
from . import layout as layouts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, DTypeLike, NDArray

# Rows go from one layout to another about this many bytes at a time.
CONVERTED_AT_ONCE = 1 << 20


class QuantizedTable:
    """An embedding table stored as 8-, 4- or 2-bit codes.

    Wraps packed rows without copying them; `quantize` makes a table from floats.

    Parameters
    ----------
    data : ndarray of uint8, shape (num_rows, row_bytes)
        Packed rows: the codes, lowest bits first, then scale and bias, little-endian. By default as FBGEMM and PyTorch's
        prepack operators lay them out; see `RowLayout` for others. Rows may lie at any stride and be read-only
        or memory-mapped (``numpy.load(path, mmap_mode="r")``). A mapped file that is truncated while in use
        ends the process: the system sends SIGBUS for rows that the file no longer has, and no library can catch that.
        Where files may change, load a copy (``numpy.load(path)``).
    bits : {8, 4, 2}
        Bits of a code.
    dim : int, optional
        Elements of a row. What is left of a row after codes, scales and biases is padding. If not given, the largest dim
        with which they fill a row exactly.
    scale_dtype : {float32, float16}, optional
        The stored type of scales and biases; float32 at 8 bits and float16 at 4 and 2 if not given.
    scale_first : bool
        Whether scales and biases come before the codes.
    group_size : int, optional
        Elements that share a scale and a bias, a multiple of 16; a whole row if not given.
    compressed_indices_mapping : array_like of int32, shape (num_embeddings,), optional
        For a pruned table: the row of each logical index, -1 for one that is pruned. As in PyTorch, a mapping of
        exactly ``[0]`` means that the table is not pruned.

    Attributes
    ----------
    data, bits, dim
        As given; `data` is a new view at each access, of the same memory.
    layout : RowLayout
        How rows are laid out.
    compressed_indices_mapping : ndarray of int32, or None
        None where nothing is pruned.
    num_rows : int
        Stored rows.
    num_embeddings : int
        Logical rows: as many as the mapping has entries, or the stored ones where there is none.
    shape : tuple of int
        ``(num_embeddings, dim)``.
    row_bytes : int
        Bytes of a row: codes, scales, biases and padding.
    nbytes : int
        Bytes of rows and mapping.

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

    __slots__ = ("__weakref__", "_handle", "_owners", "_per_channel")

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
        self._set(_handle.TableHandle(rows, row_layout, mapping), None)

    def _set(
        self,
        handle: _handle.TableHandle,
        per_channel: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    ) -> None:
        self._handle: _handle.TableHandle = handle
        # Whose memory it is. With this second reference NumPy's `resize` refuses to free it: of `table.data.base.resize`
        # it would count no more than two, a view's and the call's own, and take that for nobody else.
        self._owners = (handle.rows.base, None if handle.mapping is None else handle.mapping.base)
        # The scales and zero points that `ops.embedding_bag_prepack` was given, for its unpack.
        self._per_channel = per_channel

    @property
    def layout(self) -> layouts.RowLayout:
        return self._handle.layout

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._handle.rows.view()

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def dim(self) -> int:
        return self.layout.dim

    @property
    def compressed_indices_mapping(self) -> NDArray[np.int32] | None:
        mapping = self._handle.mapping
        return None if mapping is None else mapping.view()

    @property
    def num_rows(self) -> int:
        return len(self._handle.rows)

    @property
    def num_embeddings(self) -> int:
        return self._handle.num_embeddings

    @property
    def shape(self) -> tuple[int, int]:
        return (self.num_embeddings, self.dim)

    @property
    def row_bytes(self) -> int:
        return self.layout.row_bytes

    @property
    def nbytes(self) -> int:
        mapping = self._handle.mapping
        return self._handle.rows.nbytes + (0 if mapping is None else mapping.nbytes)

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

    def dequantize(
        self, rows: ArrayLike | None = None, *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The table's values: ``fma(code, scale, bias)`` in float32.

        Parameters
        ----------
        rows : array_like of integers, optional
            Logical rows, from 0; all of them if not given.
        out : ndarray of float32, optional
            Where to put the result; as for `embedding_bag`.

        Returns
        -------
        ndarray of float32, shape (num_embeddings, dim) or rows.shape + (dim,)
            Pruned rows are zeros.

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `embedding`.

        Examples
        --------
        >>> import numpy as np, qembag
        >>> qembag.quantize(np.eye(3, dtype=np.float32)).dequantize([2]).round(6)
        array([[0., 0., 1.]], dtype=float32)
        """
        return _handle.dequantize(self._handle, rows, out)

    def __getitem__(self, item: Any) -> NDArray[np.float32]:
        """Dequantized rows, chosen as NumPy chooses along a first axis: a number, a slice, an array or a mask."""
        count = self.num_embeddings
        if isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            number = _arguments.whole_number(item, "index")
            if not -count <= number < count:
                raise IndexError(f"index {_errors.shown(number)} is out of range for a table of {count} rows")
            row = _handle.dequantized_row(self._handle, number % count)
            return (
                row if isinstance(row, np.ndarray) else _handle.dequantize(self._handle, np.array(number % count), None)
            )
        if isinstance(item, tuple):
            raise IndexError(f"a QuantizedTable is indexed along its rows only, got {len(item)} indices")
        if isinstance(item, slice):
            start, stop, step = item.indices(count)
            # A longer step takes the first row alone too, and may be beyond int64.
            return _handle.dequantize(self._handle, np.arange(start, stop, min(max(step, -count - 1), count + 1)), None)
        if isinstance(item, np.ma.MaskedArray):
            raise TypeError(f"index must be an array without a mask, got {type(item).__name__}")
        return _handle.dequantize(self._handle, self._numbers(item), None)

    def _numbers(self, item: Any) -> NDArray[Any]:
        """The rows that an index chooses, from 0, in time of its own size."""
        count = self.num_embeddings
        if isinstance(item, (list, np.ndarray)):
            array = _arguments.as_array(item, "index")
            if array.size == 0 and isinstance(item, list):
                array = array.astype(np.int64)
            if array.dtype.kind in "iu":
                # See `ops.embedding_bag_prepack` for why not with plain numbers.
                wrong = np.argwhere((array < np.int64(-count)) | (array >= np.int64(count)))
                if len(wrong):
                    number = array[tuple(wrong[0])]
                    raise IndexError(f"index {number} is out of range for a table of {count} rows")
                array = array.astype(np.int64)
                return np.where(array < 0, array + count, array)
        # A mask, Ellipsis and the like: NumPy's own rules, over the numbers of all rows.
        numbers: NDArray[Any] = np.arange(count)[item]
        return numbers

    def __len__(self) -> int:
        return self.num_embeddings

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self[number] for number in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a QuantizedTable cannot become an array without a copy")
        values = self.dequantize()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __repr__(self) -> str:
        rows = "" if self._handle.mapping is None else f", num_rows={self.num_rows}"
        more = "".join(f", {name}={value}" for name, value in self.layout.not_default().items())
        return (
            f"{type(self).__name__}(num_embeddings={self.num_embeddings}{rows}, dim={self.dim}, "
            f"bits={self.bits}{more}, nbytes={self.nbytes})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.data, self.layout, self.compressed_indices_mapping)
        return (table_of, (type(self), *parts, self._per_channel))

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
            With copied rows, and a copy of the mapping.

        Raises
        ------
        TypeError
            If an argument has a wrong type.
        ValueError
            If an argument is out of range, or if a value would change: a float32 scale or bias that float16 does not hold
            exactly, or groups that are joined and whose scales or biases differ in a bit.

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
        return table_of(type(self), converted, target, copied, self._per_channel)

    def prune(self, keep: ArrayLike) -> QuantizedTable:
        """A table without some of the rows; logical numbers stay as they are.

        Parameters
        ----------
        keep : array_like of bool, shape (num_embeddings,), or of integers
            Which logical rows to keep, or their numbers. Rows pruned already stay so.

        Returns
        -------
        QuantizedTable
            With the kept rows, copied, and a `compressed_indices_mapping`.

        Raises
        ------
        TypeError, ValueError, IndexError
            If `keep` is neither; if a mask has another length; if a number is out of range.

        Examples
        --------
        >>> import numpy as np, qembag
        >>> small = qembag.quantize(np.eye(4, dtype=np.float32)).prune([0, 2])
        >>> small.num_rows, small.num_embeddings
        (2, 4)
        >>> small[1]
        array([0., 0., 0., 0.], dtype=float32)
        """
        count = self.num_embeddings
        array = _arguments.integers(keep, "keep", or_mask=True)
        if array.dtype == np.bool_:
            if array.shape != (count,):
                raise ValueError(f"keep must have shape ({count},) as a mask, got {_errors.kind_of(array)}")
            kept = array.copy()
        else:
            numbers = _arguments.plain_integers(array)
            if numbers.ndim != 1:
                raise ValueError(f"keep must have 1 dimension, got {_errors.kind_of(array)}")
            wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
            if wrong.size:
                place = int(wrong[0])
                raise IndexError(f"keep[{place}] is {array[place]}: out of range for a table of {count} rows")
            kept = np.zeros(count, dtype=np.bool_)
            kept[numbers] = True
        rows: NDArray[np.integer[Any]]
        if self._handle.mapping is None:
            rows = np.flatnonzero(kept)
        else:
            # Checked once more, in a copy: the caller may have written to the mapping since the table was made.
            stored = _arguments.checked_mapping(self._handle.mapping.copy(), self.num_rows)
            kept &= stored >= 0
            rows = stored[kept].astype(np.intp)
        mapping = np.full(count, -1, dtype=np.int32)
        mapping[kept] = np.arange(len(rows), dtype=np.int32)
        return table_of(type(self), self._handle.rows[rows], self.layout, mapping)


def table_of(
    kind: type[QuantizedTable],
    data: NDArray[np.uint8],
    layout: layouts.RowLayout,
    mapping: NDArray[np.int32] | None,
    per_channel: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> QuantizedTable:
    """A table of its parts, whatever arguments a subclass takes."""
    rows = _arguments.rows(data, "data").view()
    table = kind.__new__(kind)
    table._set(_handle.TableHandle(rows, layout, _arguments.mapping(mapping, check_rows=len(rows))), per_channel)
    return table


_handle.register_table_class(QuantizedTable)
