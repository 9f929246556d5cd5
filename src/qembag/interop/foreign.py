"""Tables as other libraries' files hold them, before they are tables of ours.

A reader turns a mapped file into `Foreign` tables. It reads names, shapes and, where it needs them, scales, but no
rows: so a large file opens in little memory. `Foreign.table` makes a table of one, `Foreign.blocks` streams its rows.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import numpy as np

from .. import _arguments, float_table
from .. import table as code_table
from ..float_table import FloatTable
from ..formats.safetensors_file import brief
from ..formats.table_file import map_file, release_pages
from ..layout import FloatLayout, RowLayout, table_bytes
from ..table import QuantizedTable

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

    from numpy.typing import NDArray

# Rows are repacked, and handed to a writer, about this many bytes at a time.
AT_ONCE = 1 << 22
# Copied tables may take so much more than the file: narrow rows grow by their scales, and two tables may be one.
MAX_COPIES, FREE_BYTES = 2, 32 << 20
# The types of floats that tables may have.
FLOATS = ("float32", "float16", "bfloat16")
# An error says of so many tables why they cannot be had.
MAX_REASONS = 5
OVERLAP = "its rows overlap in the file, and can only be mapped"
ByName: TypeAlias = int | Mapping[str, int] | None


class Wanted(NamedTuple):
    """What the caller says of tables whose file does not say it: one value for all, or by name."""

    bits: ByName = None
    dims: ByName = None
    names: tuple[str, ...] | None = None  # the tables to load; all if not given

    def wants(self, name: str) -> bool:
        """Whether the table of that name is to be loaded; names match whole or by their last part.

        A reader asks before it demands what its file does not say.
        """
        return self.names is None or name in self.names or name.rpartition(".")[2] in self.names

    def bits_of(self, name: str) -> int | None:
        """The bits for the table of that name, or None; names match whole or by their last part."""
        return _value_of(self.bits, name)

    def dim_of(self, name: str) -> int | None:
        """The dim for the table of that name, or None; names match whole or by their last part."""
        return _value_of(self.dims, name)


def _value_of(given: ByName, name: str) -> int | None:
    if given is None or isinstance(given, int):
        return given
    return given[name] if name in given else given.get(name.rpartition(".")[2])


def said(given: ByName, value: int | None, argument: str, allowed: tuple[int, ...]) -> int:
    """What the caller says of a table that tells itself: the first of `allowed` if nothing.

    One value for all tables is meant for those whose file does not say it; one by name must fit.
    """
    if value is None or (isinstance(given, int) and value not in allowed):
        return allowed[0]
    if value not in allowed:
        raise ValueError(f"must have {argument} of {' or '.join(map(str, allowed))}, as in the file, got {value}")
    return value


class Refused(ValueError):
    """Some tables of a file cannot be had, or only if the caller says what the file does not.

    Attributes
    ----------
    tables : dict of Foreign
        The others.
    refused : dict of str
        Why, by name.
    hint : str
        What the caller is to give; empty if nothing helps.
    """

    def __init__(self, tables: dict[str, Foreign], refused: dict[str, str], hint: str = "") -> None:
        texts = [f"table {brief(name)} {reason}" for name, reason in itertools.islice(refused.items(), MAX_REASONS)]
        more = [f"and {len(refused) - MAX_REASONS} more"] if len(refused) > MAX_REASONS else []
        super().__init__("; ".join(filter(None, [*texts, *more, hint])))
        self.tables, self.refused, self.hint = tables, refused, hint


class Memory:
    """A file, mapped read-only.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is no regular file: without the path, which the caller adds.
    """

    __slots__ = ("_map", "bytes", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir():
            raise ValueError("must be a regular file or a folder")
        self._map: mmap.mmap | None = None
        self.bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size:
                self._map, self.bytes = map_file(file.fileno())

    def release(self) -> None:
        """Let the system take back the pages that were read; see `release_pages`."""
        release_pages(self._map)


class Foreign:
    """One table of a file: as it lies there, or as it can be repacked.

    Attributes
    ----------
    name : str
        The file's own name less the suffix that names a parameter.
    num_rows : int
        Stored rows.
    layout : RowLayout or FloatLayout
        Of the rows of the table it becomes.
    mapping : ndarray of int32, or None
        As a table's `compressed_indices_mapping`.
    row_weights : ndarray of float32, or None
        As a table's.
    """

    __slots__ = ("_pack", "_rows", "layout", "mapping", "name", "num_rows", "row_weights")

    layout: RowLayout | FloatLayout

    def __init__(
        self,
        name: str,
        num_rows: int,
        layout: RowLayout | FloatLayout,
        mapping: NDArray[np.int32] | None,
        row_weights: NDArray[np.float32] | None,
        rows: NDArray[Any] | None,
        pack: Callable[[int, int], NDArray[Any]] | None,
    ) -> None:
        self.name, self.num_rows, self.layout = name, num_rows, layout
        self.mapping, self.row_weights = mapping, row_weights
        self._rows, self._pack = rows, pack

    @classmethod
    def as_it_is(
        cls,
        name: str,
        rows: NDArray[Any],
        layout: RowLayout | None = None,
        *,
        mapping: NDArray[np.int32] | None = None,
        row_weights: NDArray[np.float32] | None = None,
    ) -> Self:
        """A table whose rows need no repacking: a view of the file, at any row stride.

        Parameters
        ----------
        rows : ndarray, shape (num_rows, row_bytes) or (num_rows, dim)
            uint8 with a `layout`; without one, float32 or float16 in any byte order, or bfloat16's bits as uint16;
            or float64, which becomes float32.
            The elements of a row must lie side by side.
        """
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ValueError(f"table {brief(name)} must have 2 dimensions and a dim of 1 or more, got {rows.shape}")
        if rows.shape[1] > 1 and rows.size and rows.strides[1] != rows.itemsize:
            raise ValueError(f"table {brief(name)} must have the elements of a row side by side")
        of_rows: RowLayout | FloatLayout
        if layout is None:
            stored = np.dtype(np.float32) if rows.dtype.itemsize == 8 else rows.dtype.newbyteorder("=")
            of_rows = FloatLayout(_arguments.float_name(stored), rows.shape[1], stored)
        else:
            of_rows = layout
        return cls(name, len(rows), of_rows, mapping, row_weights, rows, None)

    @classmethod
    def packed(
        cls,
        name: str,
        num_rows: int,
        layout: RowLayout | FloatLayout,
        pack: Callable[[int, int], NDArray[Any]],
        *,
        mapping: NDArray[np.int32] | None = None,
        row_weights: NDArray[np.float32] | None = None,
    ) -> Self:
        """A table whose rows must be repacked: ``pack(start, stop)`` gives some, in `layout`, as a fresh array: packed
        rows, or floats in the host's byte order."""
        return cls(name, num_rows, layout, mapping, row_weights, None, pack)

    @classmethod
    def of_table(cls, name: str, table: QuantizedTable | FloatTable) -> Self:
        """A table of ours, for code that handles all alike."""
        layout = table.layout if isinstance(table, QuantizedTable) else None
        weights, mapping = table.row_weights, table.compressed_indices_mapping
        data = table.data if layout is not None else table.data.view(_plain(table.data.dtype))
        return cls.as_it_is(name, data, layout, mapping=mapping, row_weights=weights)

    @property
    def num_embeddings(self) -> int:
        return self.num_rows if self.mapping is None else len(self.mapping)

    @property
    def dim(self) -> int:
        return self.layout.dim

    @property
    def nbytes(self) -> int:
        """Bytes of the table it becomes."""
        others = sum(part.nbytes for part in (self.mapping, self.row_weights) if part is not None)
        return table_bytes(self.layout, self.num_rows) + others

    @property
    def is_mapped(self) -> bool:
        """Whether a table can be a view of the file."""
        return self._rows is not None and self._rows.dtype == self._stored

    @property
    def overlaps(self) -> bool:
        """Whether rows lie in one another's bytes, such as those of an expanded tensor."""
        rows = self._rows
        return rows is not None and len(rows) > 1 and rows.strides[0] < rows.shape[1] * rows.itemsize

    @property
    def _stored(self) -> np.dtype[Any]:
        """The type of the rows' elements in memory."""
        return np.dtype(np.uint8) if isinstance(self.layout, RowLayout) else self.layout.stored

    def table(self, *, mapped: bool) -> QuantizedTable | FloatTable:
        """The table: a view of the file where it needs no repacking and `mapped` is true, else a copy.

        Raises
        ------
        ValueError
            If the mapping or a weight is wrong, or a copy would take more memory than the file's rows.
        """
        rows = self._rows
        if rows is None:
            whole = np.empty((self.num_rows, self.layout.row_bytes), np.uint8)
            start = 0
            for block in self.blocks():
                whole[start : start + len(block)] = block.view(np.uint8)
                start += len(block)
            rows = whole if isinstance(self.layout, RowLayout) else whole.view(self.layout.stored)
        elif not (mapped and self.is_mapped):
            self.check_apart()
            rows = _arguments.quietly(rows.astype, self._stored, "C")
        weights = self.row_weights if mapped or self.row_weights is None else self.row_weights.copy()
        try:
            return self.part(rows, self.mapping, weights)
        except (IndexError, ValueError) as error:
            raise ValueError(f"table {brief(self.name)}: {error}") from None

    def blocks(self) -> Iterator[NDArray[Any]]:
        """The stored rows in blocks, in order: packed with zeros for padding, or floats in the host's byte order."""
        at_once = max(AT_ONCE // max(self.layout.row_bytes, 1), 1)
        self.check_apart()
        for start in range(0, self.num_rows, at_once):
            yield self.rows(start, min(start + at_once, self.num_rows))

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some stored rows, as `blocks` gives them."""
        if self._pack is not None:
            return self._pack(start, stop)
        assert self._rows is not None
        rows = self._rows[start:stop]
        if isinstance(self.layout, RowLayout):
            return np.ascontiguousarray(self.layout.taken(rows, slice(None)))
        return _arguments.quietly(np.ascontiguousarray, rows, self._stored)

    def part(
        self,
        rows: NDArray[Any],
        mapping: NDArray[np.int32] | None = None,
        row_weights: NDArray[np.float32] | None = None,
    ) -> QuantizedTable | FloatTable:
        """A table of some rows, as `blocks` gives them."""
        if isinstance(self.layout, RowLayout):
            return code_table.table_of(QuantizedTable, rows, self.layout, mapping, row_weights=row_weights)
        return float_table.table_of(FloatTable, rows, mapping, row_weights)

    def check_apart(self) -> None:
        """Raise if rows overlap: there could be any number of them, whatever the file's size. Going over all of them
        could take for ever, and a copy any memory."""
        if self.overlaps:
            raise ValueError(f"table {brief(self.name)}: {OVERLAP}")


def most_copied(num_bytes: int) -> int:
    """What copies of the tables of a file of so many bytes may take."""
    return MAX_COPIES * num_bytes + FREE_BYTES


def check_copies(tables: Iterable[Foreign], num_bytes: int, *, mapped: bool) -> None:
    """Raise if tables of a file of so many bytes lie over one another there, and copies would take much memory."""
    copied = sum(table_bytes(table.layout, table.num_rows) for table in tables if not (mapped and table.is_mapped))
    if copied > most_copied(num_bytes):
        raise ValueError(
            f"has tables of {copied} bytes that must be copied, in {num_bytes} bytes: several lie in the same ones; "
            "choose some by names="
        )


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float32 and float16 as they are; bfloat16 of another package as its bits."""
    return dtype if dtype.kind == "f" else np.dtype(np.uint16)
