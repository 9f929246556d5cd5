"""What tables of codes and tables of floats have in common: rows, which of them are pruned, and values to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import _arguments, _errors, _handle

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from numpy.typing import ArrayLike, NDArray

    from .float_table import FloatTable
    from .formats.progress import Progress
    from .formats.table_file import TableFile
    from .interop.load import MappedTables


# Rows are weighted about this many elements at a time.
WEIGHTED_AT_ONCE = 1 << 18


class Table(_handle.HandleOwner):
    """A thin object over a compiled handle: the base of `QuantizedTable` and `FloatTable`, not used by itself."""

    __slots__ = ("_owners", "_row_weights", "_source")

    _row_weights: NDArray[np.float32] | None
    _source: tuple[TableFile | MappedTables, str] | None

    def _set(self, handle: _handle.TableHandle, row_weights: NDArray[np.float32] | None = None) -> None:
        # The mapped file that the table comes from, and its name there.
        self._source = None
        self._handle = handle
        self._row_weights = row_weights
        # The owners of the memory. Without this second reference, NumPy's `table.data.base.resize` would count only
        # the view's and the call's own, and free memory that is still in use.
        self._owners = (handle.rows.base, None if handle.mapping is None else handle.mapping.base)

    @classmethod
    def _of(
        cls,
        data: NDArray[np.uint8],
        layout: _handle.LayoutFields,
        mapping: NDArray[np.int32] | None,
        row_weights: NDArray[np.float32] | None = None,
    ) -> Self:
        """A table made from its parts, whatever arguments a subclass's constructor takes."""
        rows = _arguments.rows(data, "data").view()
        table = cls.__new__(cls)
        handle = _handle.TableHandle(rows, layout, _arguments.mapping(mapping, check_rows=len(rows)))
        table._set(handle, _arguments.row_weights(row_weights, handle.num_embeddings))
        return table

    @property
    def dim(self) -> int:
        return self._handle.layout.dim

    @property
    def compressed_indices_mapping(self) -> NDArray[np.int32] | None:
        mapping = self._handle.mapping
        return None if mapping is None else mapping.view()

    @property
    def row_weights(self) -> NDArray[np.float32] | None:
        weights = self._row_weights
        return None if weights is None else weights.view()

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
        return self._handle.layout.row_bytes

    @property
    def nbytes(self) -> int:
        parts = (self._handle.rows, self._handle.mapping, self._row_weights)
        return sum(part.nbytes for part in parts if part is not None)

    def _repr(self, more: str) -> str:
        rows = "" if self._handle.mapping is None else f", num_rows={self.num_rows}"
        return (
            f"{type(self).__name__}(num_embeddings={self.num_embeddings}{rows}, dim={self.dim}, {more}, "
            f"nbytes={self.nbytes})"
        )

    def dequantize(
        self, rows: ArrayLike | None = None, *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The table's values as float32: ``fma(code, scale, bias)`` for codes; floats as they are.

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
            raise IndexError(f"a table is indexed along its rows only, got {len(item)} indices")
        if isinstance(item, slice):
            start, stop, step = item.indices(count)
            # A longer step takes the first row alone too, and may be beyond int64.
            return _handle.dequantize(self._handle, np.arange(start, stop, min(max(step, -count - 1), count + 1)), None)
        if isinstance(item, np.ma.MaskedArray):
            raise TypeError(f"index must be an array without a mask, got {type(item).__name__}")
        return _handle.dequantize(self._handle, self._numbers(item), None)

    def _taken(self, numbers: Any) -> NDArray[np.uint8]:
        """The stored rows with these numbers."""
        rows: NDArray[np.uint8] = self._handle.rows[numbers]
        return rows

    def _numbers(self, item: Any) -> NDArray[Any]:
        """The numbers, from 0, of the rows that an index chooses; takes time in proportion to the index."""
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

    def _stored_rows(self, rows: Any) -> NDArray[np.integer[Any]]:
        """The numbers of the stored rows for logical ones. Raises ValueError if one of them is pruned."""
        array = _arguments.integers(rows, "rows")
        if array.ndim != 1:
            raise ValueError(f"rows must have 1 dimension, got {_errors.kind_of(array)}")
        numbers = self._in_range(array, "rows")
        if self._handle.mapping is None:
            return numbers
        # Copied, then checked again: the caller may have written to the mapping since the table was made.
        mapping = _arguments.checked_mapping(self._handle.mapping.copy(), self.num_rows)
        stored: NDArray[np.integer[Any]] = mapping[numbers]
        pruned = np.flatnonzero(stored < 0)
        if pruned.size:
            place = int(pruned[0])
            raise ValueError(f"rows[{place}] must be a row that is not pruned, got {array[place]}")
        return stored

    def _in_range(self, array: NDArray[Any], name: str) -> NDArray[np.integer[Any]]:
        """1-D integers as row numbers. Raises IndexError if one is out of range."""
        count = self.num_embeddings
        numbers: NDArray[np.integer[Any]] = _arguments.plain_integers(array).copy()  # safe from later writes
        wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
        if wrong.size:
            place = int(wrong[0])
            raise IndexError(f"{name}[{place}] is {array[place]}: out of range for a table of {count} rows")
        return numbers

    def __len__(self) -> int:
        return self.num_embeddings

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self[number] for number in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"a {type(self).__name__} cannot become an array without a copy")
        values = self.dequantize()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __copy__(self) -> Self:
        """Another table of the same rows, mapping and row weights."""
        again = type(self).__new__(type(self))
        again._share(self)
        return again

    def __deepcopy__(self, memo: object) -> Self:
        """The same. Nothing is copied: scikit-learn's `clone` copies an estimator's parameters deeply, and the rows may
        be most of the memory. For rows of its own, pickle a table, or make one of ``table.data.copy()``."""
        return self.__copy__()

    def _share(self, other: Self) -> None:
        """Be a table of another one's parts."""
        self._set(other._handle, other._row_weights)
        self._source = other._source

    def __reduce__(self) -> tuple[Any, ...]:
        if self._source is None:
            return self._reduced()
        file, name = self._source
        return file.reduced(self, name)

    def _reduced(self) -> tuple[Any, ...]:
        """The pickle of a table that is not mapped: with its rows."""
        raise NotImplementedError

    def save(
        self, path: str | os.PathLike[str], *, name: str = "table", metadata: Mapping[str, str] | None = None
    ) -> None:
        """Save this table to a file; `save_tables` saves several to one file.

        Parameters
        ----------
        path : str or path
            The file to write; see `save_tables`.
        name : str
            The table's name in the file.
        metadata : dict of str, optional
            Strings to save with it. Keys must not begin with ``qembag.``.

        Raises
        ------
        TypeError, ValueError, IndexError, OSError
            As for `save_tables`.

        Examples
        --------
        >>> import numpy as np, qembag, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> qembag.quantize(np.eye(3, dtype=np.float32)).save(f"{folder.name}/table.safetensors")
        >>> qembag.open_table(f"{folder.name}/table.safetensors")
        QuantizedTable(num_embeddings=3, dim=3, bits=8, nbytes=33)
        >>> folder.cleanup()
        """
        from .formats.saving import checked_text, save_tables

        save_tables(path, {checked_text(name, "name"): self}, metadata=metadata)

    def prefault(self, *, progress: Progress = False) -> None:
        """Read rows and mapping once, so that lookups in a mapped file do not wait for the disk.

        The system may drop the pages again if memory is short. A table that is already in memory does not need this;
        the call then takes little time.

        Parameters
        ----------
        progress : bool or callable
            True shows a bar on standard error (tqdm, ``pip install 'qembag[progress]'``). A callable is called as
            ``progress(rows_done, num_rows, bytes_done)``; an exception from it ends the reading and propagates.

        Raises
        ------
        TypeError
            If `progress` is neither a bool nor a callable.
        ImportError
            If tqdm is not installed.

        Examples
        --------
        >>> import numpy as np, qembag
        >>> qembag.quantize(np.eye(3, dtype=np.float32)).prefault(progress=print)
        3 3 33
        """
        from .formats.prefault import prefault

        prefault([self], progress)

    def apply_row_weights(self) -> FloatTable:
        """A table of each row times its weight.

        Its means are those of model2vec, bit for bit: there the product is rounded before it is added, while a lookup
        with `per_sample_weights` adds it by a fused multiply-add.

        Returns
        -------
        FloatTable
            float32, shape (num_embeddings, dim): the dequantized rows times `row_weights`, each product rounded once.
            Pruned rows are zeros.

        Raises
        ------
        ValueError
            If the table has no row weights.

        Examples
        --------
        >>> import numpy as np, qembag
        >>> qembag.FloatTable(np.eye(2, dtype=np.float32), row_weights=[2, 0.5]).apply_row_weights()[:]
        array([[2. , 0. ],
               [0. , 0.5]], dtype=float32)
        """
        from .float_table import FloatTable  # which imports this module

        weights = self._row_weights
        if weights is None:
            raise ValueError("apply_row_weights needs a table that has row_weights")
        values = self.dequantize()
        at_once = max(WEIGHTED_AT_ONCE // self.dim, 1)
        with np.errstate(all="ignore"):
            for start in range(0, len(values), at_once):
                values[start : start + at_once] *= weights[start : start + at_once, None]
        mapping = self._handle.mapping
        if mapping is not None:
            values[mapping < 0] = 0  # also where the weight is infinite
        return FloatTable(values)

    def prune(self, keep: ArrayLike) -> Self:
        """A table without some of the rows. Row numbers stay the same: pruned rows are looked up as zeros.

        Parameters
        ----------
        keep : array_like of bool, shape (num_embeddings,), or of integers
            The logical rows to keep, as a mask or as numbers. Rows that are already pruned stay pruned.

        Returns
        -------
        The same kind of table
            A copy of the kept rows, with a `compressed_indices_mapping`.

        Raises
        ------
        TypeError, ValueError, IndexError
            If `keep` is neither a mask nor integers; if a mask has a wrong length; if a number is out of range.

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
            if array.ndim != 1:
                raise ValueError(f"keep must have 1 dimension, got {_errors.kind_of(array)}")
            kept = np.zeros(count, dtype=np.bool_)
            kept[self._in_range(array, "keep")] = True
        rows: NDArray[np.integer[Any]]
        if self._handle.mapping is None:
            rows = np.flatnonzero(kept)
        else:
            # Copied, then checked again, as in `_stored_rows`.
            stored = _arguments.checked_mapping(self._handle.mapping.copy(), self.num_rows)
            kept &= stored >= 0
            rows = stored[kept].astype(np.intp)
        mapping = np.full(count, -1, dtype=np.int32)
        mapping[kept] = np.arange(len(rows), dtype=np.int32)
        weights = None if self._row_weights is None else self._row_weights.copy()
        return self._of(self._taken(rows), self._handle.layout, mapping, weights)
