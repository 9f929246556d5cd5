"""Sources of float rows: files, arrays, tables and iterables, read block by block in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

from .. import _arguments, _errors
from ..base import Table
from .stored import Stored, listed, stored_floats

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import NDArray

    from .safetensors_file import Tensor

Read = TypeVar("Read")
# Rows are read in blocks of about this many bytes. On an AMD Zen 4, blocks of 4 and 8 MiB were the fastest; blocks of
# 32 MiB took 1.3 times as long, since caches do not hold two of them. posix_fadvise made no difference.
BLOCK_BYTES = 8 << 20


class Source:
    """Rows of floats that are read in order.

    Attributes
    ----------
    name : str
        Its name in errors and files: the tensor's own name, else "table".
    num_rows : int or None
        None for an iterable, whose length is not known before its end.
    dim : int
        Elements of a row.
    dtype : str
        The stored type: "float32", "float16", "float64" or "bfloat16"; for an iterable that of its first block.
    row_nbytes : int
        Bytes of a row as it is stored.
    refused : bool
        Whether the rows themselves were invalid, as opposed to a failure to read them.
    path : Path or None
        The file that is read.
    """

    path: Path | None = None

    def __init__(self, name: str, num_rows: int | None, dim: int, dtype: str, row_nbytes: int) -> None:
        self.name, self.num_rows, self.dim, self.dtype, self.row_nbytes = name, num_rows, dim, dtype, row_nbytes
        self.refused = False
        self.row_weights: NDArray[np.float32] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Values by name that identify this source. All can be written as JSON."""
        return {"rows": self.num_rows, "dim": self.dim}

    def blocks(self, start_row: int = 0, max_rows: int | None = None) -> Generator[NDArray[Any], None, None]:
        """The rows from `start_row` on, in blocks of at most `max_rows` rows, or of some megabytes if None: 2-D arrays
        of float16, float32 or float64 in any byte order; bfloat16 comes as float32. A block is valid until the next one
        is requested, which may reuse its memory."""
        raise NotImplementedError

    def read_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows with these numbers, ascending, as float32. See the function `read_rows`."""
        raise NotImplementedError

    def _at_once(self, max_rows: int | None) -> int:
        return max(BLOCK_BYTES // self.row_nbytes, 1) if max_rows is None else max_rows


# ---- Rows in memory --------------------------------------------------------------------------------------------------


class ArraySource(Source):
    """Rows of an array, or of a table; its pruned rows are zeros."""

    def __init__(self, rows: NDArray[Any] | Table, name: str, dtype: str) -> None:
        size = 4 if isinstance(rows, Table) else rows.itemsize
        super().__init__(name, len(rows), rows.shape[1], dtype, rows.shape[1] * size)
        self._rows = rows
        if isinstance(rows, Table):
            self.row_weights = rows.row_weights

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"dtype": self.dtype}

    def blocks(self, start_row: int = 0, max_rows: int | None = None) -> Generator[NDArray[Any], None, None]:
        at_once = self._at_once(max_rows)
        for start in range(start_row, len(self._rows), at_once):
            yield self._rows[start : start + at_once]

    def read_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        return _arguments.as_float32(self._rows[numbers])


# ---- Rows in files ---------------------------------------------------------------------------------------------------


class FileSource(Source):
    """Rows of a file, which is read, not mapped: mapped pages would count as this process's memory."""

    def __init__(self, stored: Stored, name: str) -> None:
        num_rows, dim = stored.shape
        super().__init__(name, num_rows, dim, stored.kind, dim * stored.element.itemsize)
        self.path = stored.path
        self._stored = stored
        self._stamp = _stamp(os.stat(stored.path))

    @property
    def identity(self) -> dict[str, Any]:
        size, changed = self._stamp
        return super().identity | {"dtype": self._stored.dtype, "file's size": size, "file's time": changed}

    def blocks(self, start_row: int = 0, max_rows: int | None = None) -> Generator[NDArray[Any], None, None]:
        at_once = self._at_once(max_rows)
        num_rows, dim = self._stored.shape
        starts = range(start_row, num_rows, at_once)
        buffers = [np.empty(min(at_once, num_rows - start_row) * dim, self._stored.element) for _ in starts[:2]]
        with self.opened() as file:

            def read(number: int) -> NDArray[Any]:
                start = starts[number]
                return self._read(file, start, min(at_once, num_rows - start), buffers[number % 2])

            for rows in read_ahead(read, len(starts)):
                yield _as_floats(rows)

    def read_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.empty((len(numbers), self.dim), np.float32)
        if self._stored.by_columns:  # a row is not contiguous: reading all rows takes no longer
            position = 0
            for block in self.blocks():
                low, high = np.searchsorted(numbers, [position, position + len(block)])
                found[low:high] = _arguments.as_float32(block[numbers[low:high] - position])
                position += len(block)
            return found
        at_once = self._at_once(None)
        # Neighbouring rows are read at once.
        ends = [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        begin = 0
        with self.opened() as file:
            for end in ends:
                for low in range(begin, end, at_once):
                    part = slice(low, min(low + at_once, end))
                    buffer = np.empty((part.stop - low) * self.dim, self._stored.element)
                    rows = self._read(file, int(numbers[low]), part.stop - low, buffer)
                    found[part] = _arguments.as_float32(_as_floats(rows))
                begin = end
        return found

    def opened(self) -> BinaryIO:
        """The open file. Raises OSError if it changed since this source was made."""
        file = open(self._stored.path, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
        if _stamp(os.fstat(file.fileno())) != self._stamp:
            file.close()
            raise OSError(f"{self._stored.path}: was changed while it was being read")
        return file

    def _read(self, file: BinaryIO, start_row: int, count: int, buffer: NDArray[Any]) -> NDArray[Any]:
        """Read `count` rows of the file into the buffer; returns a 2-D view of it."""
        begin, (num_rows, dim) = self._stored.start, self._stored.shape
        if not self._stored.by_columns:
            rows = buffer[: count * dim].reshape(count, dim)
            self.fill(file, begin + start_row * self.row_nbytes, rows)
            return rows
        columns = buffer[: count * dim].reshape(dim, count)
        for number, column in enumerate(columns):
            self.fill(file, begin + (number * num_rows + start_row) * buffer.itemsize, column)
        return columns.T

    def fill(self, file: BinaryIO, position: int, out: NDArray[Any]) -> None:
        file.seek(position)
        waiting = out.reshape(-1).view(np.uint8).data
        while len(waiting):
            count = file.readinto(waiting)  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{self._stored.path}: was cut short while it was being read")
            waiting = waiting[count:]


class PrunedSource(Source):
    """The logical rows of a pruned table in a file, as float32; pruned rows are zeros."""

    def __init__(self, stored: FileSource, mapping: Tensor) -> None:
        self._stored = stored
        numbers = np.empty(mapping.shape, "<i4")
        with stored.opened() as file:
            stored.fill(file, mapping.start, numbers)
        try:
            self._mapping = _arguments.checked_mapping(numbers.astype(np.int32), stored.num_rows or 0)
        except IndexError as error:
            raise ValueError(f"{stored.path}: tensor {stored.name!r}: {error}") from None
        size = np.dtype(np.float32).itemsize
        super().__init__(stored.name, len(numbers), stored.dim, stored.dtype, stored.dim * size)
        self.path = stored.path

    @property
    def identity(self) -> dict[str, Any]:
        return self._stored.identity | super().identity

    def blocks(self, start_row: int = 0, max_rows: int | None = None) -> Generator[NDArray[Any], None, None]:
        at_once = self._at_once(max_rows)
        for start in range(start_row, len(self._mapping), at_once):
            yield self.read_rows(np.arange(start, min(start + at_once, len(self._mapping))))

    def read_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.zeros((len(numbers), self.dim), np.float32)
        stored = self._mapping[numbers]
        # Each stored row is read once, in the order of the file.
        unique, places = np.unique(stored[stored >= 0].astype(np.int64), return_inverse=True)
        found[stored >= 0] = self._stored.read_rows(unique)[places]
        return found


def read_ahead(read: Callable[[int], Read], count: int) -> Generator[Read, None, None]:
    """Yield ``read(0)`` to ``read(count - 1)``; a thread reads the next while the caller works on the current one."""
    from concurrent.futures import ThreadPoolExecutor  # imports logging: not for each `import qembag`

    if count == 0:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="qembag reads ahead") as reader:
        waiting = reader.submit(read, 0)
        for number in range(1, count + 1):
            found = waiting.result()
            if number < count:
                waiting = reader.submit(read, number)
            yield found


def _as_floats(rows: NDArray[Any]) -> NDArray[Any]:
    """Bits of bfloat16 as float32, exactly: they are its upper half. Other rows as they are."""
    if rows.dtype.kind != "u":
        return rows
    wide = rows.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


# ---- Rows from the caller's code -------------------------------------------------------------------------------------


class IterableSource(Source):
    """Rows of an iterable of blocks, which is consumed once."""

    def __init__(self, blocks: Iterable[object], name: str) -> None:
        self._taken = 0
        self._rest = iter(blocks)
        # The first block tells the dim. It is kept: an iterable gives its rows only once.
        first = next(self._rest, self)
        if first is self:
            raise ValueError("source must give at least one block of rows, got an iterable of none")
        self._first: NDArray[Any] | None = self._checked(first, None)
        dim = self._first.shape[1]
        super().__init__(name, None, dim, self._first.dtype.name, dim * self._first.itemsize)

    def blocks(self, start_row: int = 0, max_rows: int | None = None) -> Generator[NDArray[Any], None, None]:
        if self._first is None:
            raise ValueError("source must be an iterable that was not run through yet")
        at_once = self._at_once(max_rows)
        skipped = 0
        block, self._first = self._first, None
        while True:
            begin = min(start_row - skipped, len(block))
            skipped += begin
            for start in range(begin, len(block), at_once):
                yield block[start : start + at_once]
            following = next(self._rest, self)
            if following is self:
                return
            try:
                block = self._checked(following, self.dim)
            except (TypeError, ValueError):
                self.refused = True
                raise

    def _checked(self, block: object, dim: int | None) -> NDArray[Any]:
        name = f"source's block {self._taken}"
        self._taken += 1
        return _float_array(block, name, dim)


def _float_array(value: object, name: str, dim: int | None = None) -> NDArray[Any]:
    array = _arguments.floats(value, name, allow_double=True, allow_bfloat16=True)
    if array.ndim != 2 or array.shape[1] == 0 or dim not in (None, array.shape[1]):
        wanted = "1 or more" if dim is None else str(dim)
        raise ValueError(
            f"{name} must have 2 dimensions (rows, dim) and a dim of {wanted}, got {_errors.kind_of(array)}"
        )
    return array


# ---- Which source it is ----------------------------------------------------------------------------------------------


def is_path(source: object) -> bool:
    return isinstance(source, (str, os.PathLike))


def open_source(source: object, tensor: str | None = None) -> Source:
    """The source of rows that the argument means.

    Parameters
    ----------
    source : path, 2-D array of floats, table, or iterable of 2-D arrays of floats
        A path is that of a ``.npy`` file, a ``.safetensors`` file or an ``.index.json`` of several.
    tensor : str, optional
        The name of a tensor in the file. If not given, the file must have only one 2-D tensor of floats.

    Raises
    ------
    TypeError, ValueError, OSError
        If `source` is none of these; if a file cannot be read, or has no such tensor.

    Examples
    --------
    >>> import numpy as np
    >>> from qembag.formats.sources import open_source
    >>> source = open_source(np.ones((5, 3), np.float32))
    >>> source.num_rows, source.dim, [len(block) for block in source.blocks(start_row=1, max_rows=3)]
    (5, 3, [3, 1])
    """
    if is_path(source):
        path = Path(source)  # type: ignore[arg-type]
        found = stored_floats(path)
        name = _only(found, path) if tensor is None else tensor
        if name not in found:
            raise ValueError(f"{path}: there is no 2-D tensor of floats {name!r}; {listed(found)}")
        return file_source(found[name], name)
    if tensor is not None:
        raise ValueError(f"tensor must be None for a source that is no file, got {_errors.shown(tensor)}")
    if isinstance(source, Table):
        return ArraySource(source, "table", getattr(source, "dtype", "float32"))
    # Lists are iterables of blocks. Tensors of other libraries are iterable too, but count as arrays.
    if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        array = _float_array(source, "source")
        return ArraySource(array, "table", array.dtype.name)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray, memoryview, dict)):
        return IterableSource(source, "table")
    raise TypeError(
        f"source must be a path, a 2-D array of floats or an iterable of such arrays, got {_errors.kind_of(source)}"
    )


def file_source(stored: Stored, name: str) -> Source:
    """The source for a tensor of that name. The array of a ``.npy`` file has no name: it is called "table"."""
    stored_rows = FileSource(stored, "table" if stored.path.suffix.lower() == ".npy" else name)
    source: Source = stored_rows if stored.mapping is None else PrunedSource(stored_rows, stored.mapping)
    if stored.row_weights is not None:
        weights = np.empty(stored.row_weights.shape, "<f4")
        with stored_rows.opened() as file:
            stored_rows.fill(file, stored.row_weights.start, weights)
        try:
            source.row_weights = _arguments.row_weights(weights, source.num_rows or 0)
        except ValueError as error:
            raise ValueError(f"{stored.path}: tensor {name!r}: {error}") from None
    return source


def float_tensors(path: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, int]]]:
    """The dtype and shape of each 2-D tensor of floats in a file, by name; for a ``.npy`` file the name is its stem."""
    return {name: (stored.kind, stored.logical_shape) for name, stored in stored_floats(Path(path)).items()}


def read_rows(source: Source, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some rows of an array or a file, without reading all of it.

    Parameters
    ----------
    source : Source
        Not an `IterableSource`.
    numbers : ndarray of int64, shape (count,)
        The numbers of the rows, ascending.

    Returns
    -------
    ndarray of float32, shape (count, dim)
        float64 is rounded; values beyond float32 become infinities.

    Raises
    ------
    TypeError
        If `source` is an iterable.
    OSError
        If the file cannot be read, or changed.

    Examples
    --------
    >>> import numpy as np
    >>> from qembag.formats.sources import open_source, read_rows
    >>> read_rows(open_source(np.eye(4)), np.array([1, 3]))
    array([[0., 1., 0., 0.],
           [0., 0., 0., 1.]], dtype=float32)
    """
    if isinstance(source, IterableSource):
        raise TypeError("source must be an array or a file for a sample of its rows, got an iterable of blocks")
    return source.read_rows(numbers)


def _only(found: dict[str, Stored], path: Path) -> str:
    """The name of the only tensor. Raises ValueError if there are none or several."""
    if len(found) != 1:
        raise ValueError(f"{path}: must hold one 2-D tensor of floats where none is named; {listed(found)}")
    return next(iter(found))
