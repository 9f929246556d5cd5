"""Tables larger than memory: from float rows to a file of codes, block by block."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .. import _arguments, _errors
from ..quantize import quantize_part
from .progress import check, reporting
from .safetensors_file import header_bytes
from .saving import INDEX_SUFFIX, as_path, describe
from .sources import Source, file_source, is_path, open_source
from .stored import ROW_WEIGHTS, listed, stored_floats
from .table_file import RESERVED, ROWS
from .unfinished import Unfinished, journal_size

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from ..layout import RowLayout
    from .progress import Progress, Report

# A resumed run makes the last this many rows again and compares them, to find a source that has changed.
CHECKED_ROWS = 64
# If the length of the source is unknown, the header has room for this many rows.
MAX_ROWS = 10**15


def quantize_to_file(
    source: str | os.PathLike[str] | ArrayLike | Iterable[ArrayLike],
    path: str | os.PathLike[str],
    bits: int = 8,
    *,
    method: Literal["minmax", "greedy", "lsq"] = "minmax",
    importance: ArrayLike | None = None,
    scale_dtype: DTypeLike | None = None,
    scale_first: bool = False,
    group_size: int | None = None,
    row_alignment: int = 1,
    tensors: str | Sequence[str] | None = None,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    num_threads: int | None = None,
    progress: Progress = False,
    resume: bool = False,
) -> None:
    """Quantize rows that need not fit in memory, to a file as `save_tables` writes it.

    Rows are written to ``path.part``, which is renamed to `path` when it is complete. An interruption (Ctrl-C, a kill,
    an exception in the source or in `progress`) leaves ``path.part``; the same call with ``resume=True`` continues from
    it. It is removed if the data is invalid or a write fails, as on a full disk.

    Parameters
    ----------
    source : path, 2-D array of floats, table, or iterable of 2-D arrays of floats
        A path is that of a ``.npy`` file, a ``.safetensors`` file (F16, BF16, F32 or F64) or an ``.index.json`` of
        several; files are read in blocks of some megabytes. A memory-mapped array works too, but the system may count
        its pages as this process's memory: prefer the path of its file. An iterable gives blocks of rows with the same
        dim, each of any number of rows; a block must fit in memory. All logical rows of a table are taken, also of one
        in a file; pruned ones are zeros.
    path : path
        The file to write. An existing file is replaced when the new one is complete.
    bits, method, importance, scale_dtype, scale_first, group_size, row_alignment, num_threads
        As for `quantize`.
    tensors : str or sequence of str, optional
        Names or patterns (``"*.embed_tokens.weight"``) of tensors in the source file. Each tensor becomes a table with
        the same name; all tables go to the one new file. If not given, the file must have only one 2-D tensor of
        floats.
    name : str, optional
        The name of the table, if there is only one; by default the tensor's name, or "table".
    metadata : mapping of str to str, optional
        Strings to save with the tables; see `save_tables`.
    progress : bool or callable
        True shows rows, bytes a second and the time left on standard error (``pip install 'qembag[progress]'``).
        A function is called as ``progress(rows_done, rows_total, bytes_done)`` after each block. Bytes are those of
        `source`; `rows_total` is None if it is not known.
    resume : bool
        Continue from ``path.part`` if it exists, else start. All other arguments must be as before. An iterable must
        give the same rows again from the first one; finished rows are skipped, and blocks may be divided differently.
        The last finished rows are made again and compared, which detects most sources that have changed.

    Raises
    ------
    TypeError, ValueError
        As for `quantize`, with row numbers counted from the start of the tensor or source; if `source` or `tensors`
        names nothing that can be quantized; with ``resume=True``, if ``path.part`` was begun with other arguments or
        has other rows than `source`.
    OSError
        If a file cannot be read or written, or another process is writing to ``path.part``.
    ImportError
        If ``progress=True`` and tqdm is not installed.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np, qembag
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "table.safetensors")
    >>> blocks = (np.full((3, 4), number, np.float32) for number in range(5))
    >>> qembag.quantize_to_file(blocks, path, bits=4)
    >>> qembag.open_table(path)
    QuantizedTable(num_embeddings=15, dim=4, bits=4, nbytes=90)
    >>> folder.cleanup()
    """
    options: dict[str, Any] = {
        "bits": bits,
        "method": method,
        "importance": importance,
        "scale_dtype": scale_dtype,
        "scale_first": scale_first,
        "group_size": group_size,
        "row_alignment": row_alignment,
        "num_threads": num_threads,
    }
    check(progress)
    goes_on = _arguments.flag(resume, "resume")
    target = as_path(path)
    if target.name.endswith(INDEX_SUFFIX):
        raise ValueError(f"path must be the name of one file, got an index, {_errors.shown(str(target))}")
    sources = _sources(source, tensors, name)
    for path_read in {one.path for one in sources.values() if one.path is not None}:
        if target.exists() and target.samefile(path_read):
            raise ValueError(f"path must be another file than source, got {_errors.shown(str(target))} for both")
    job = Job(_tables(sources, options), options, metadata)
    part = Unfinished(target)
    try:
        job.start(part, goes_on)
        done = part.rows_done
        total = None if job.num_rows is None else job.source_bytes_of(job.num_rows)
        so_far = job.source_bytes_of(done)
        with reporting(progress, job.num_rows, total, rows_done=done, bytes_done=so_far) as report:
            job.run(part, report)
        job.end(part)
    except BaseException:
        part.is_spoiled |= any(source.refused for source in sources.values())
        part.leave()
        raise
    finally:
        part.close()


class Table(NamedTuple):
    """A table to make."""

    name: str
    source: Source
    layout: RowLayout

    @property
    def rows_name(self) -> str:
        return self.name + ROWS

    @property
    def name_in_errors(self) -> str:
        """The tensor's own name if it has one, since there may be several."""
        return "source" if self.source.name == "table" else self.source.name


# ---- What is asked for -----------------------------------------------------------------------------------------------


def _sources(source: object, tensors: object, name: object) -> dict[str, Source]:
    """The sources, by the names of the tables to make."""
    table_name = None if name is None else _table_name(name)
    if tensors is None:
        found = [open_source(source)]
    else:
        patterns = [tensors] if isinstance(tensors, str) else tensors
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"tensors must be a string or a list of strings, got {_errors.kind_of(tensors)}")
        if not is_path(source):
            raise ValueError(f"tensors must be None for a source that is no file, got {_errors.shown(tensors)}")
        found = _matches(Path(source), patterns)  # type: ignore[arg-type]
    if table_name is None:
        return {one.name: one for one in found}
    if len(found) != 1:
        raise ValueError(f"name must be None for several tables, got {_errors.shown(table_name)} for {len(found)}")
    return {table_name: found[0]}


def _table_name(name: object) -> str:
    """The argument `name`, checked."""
    if type(name) is not str:
        raise TypeError(f"name must be a str or None, got {_errors.kind_of(name)}")
    is_text = name.isascii() or name == name.encode("utf-8", "ignore").decode()  # without lone surrogates
    if name in ("", "__metadata__") or not is_text:
        raise ValueError(f"name must be a text other than '' and '__metadata__', got {_errors.shown(name)}")
    return name


def _matches(path: Path, patterns: Sequence[str]) -> list[Source]:
    there = stored_floats(path)
    chosen: dict[str, None] = {}
    for pattern in patterns:
        # An exact name first: brackets in it would mean something else in a pattern.
        matched = [pattern] if pattern in there else fnmatch.filter(there, pattern)
        if not matched:
            raise ValueError(
                f"tensors must match 2-D tensors of floats, got {_errors.shown(pattern)}; in {path} {listed(there)}"
            )
        chosen |= dict.fromkeys(matched)
    if not chosen:
        raise ValueError("tensors must name at least one tensor, got none")
    return [file_source(there[name], name) for name in chosen]


def _tables(sources: dict[str, Source], options: dict[str, Any]) -> list[Table]:
    """The tables in file order. Quantizing an empty array checks the options."""
    tables = []
    for name, source in sources.items():
        empty = np.empty((0, source.dim), np.float32)
        tables.append(Table(name, source, quantize_part(empty, name="weights", first_row=0, **options).layout))
    return sorted(tables, key=lambda table: table.rows_name)


# ---- The work --------------------------------------------------------------------------------------------------------


class Job:
    """The work of one call of `quantize_to_file`.

    Attributes
    ----------
    num_rows : int or None
        Rows of all tables; None for an iterable, whose length is not known before its end.
    """

    def __init__(self, tables: list[Table], options: dict[str, Any], metadata: Mapping[str, str] | None) -> None:
        self._tables, self._options = tables, options
        self._metadata = describe({table.name: table.layout for table in tables}, metadata)
        weights = {table.name + ROW_WEIGHTS: table.source.row_weights for table in tables}
        self._weights = [(name, array) for name, array in weights.items() if array is not None]
        self._text = json.dumps(_description(tables, options, self._metadata)).encode()
        # Only an iterable has an unknown number of rows, and then it is the only table.
        self.num_rows = None
        self._header_size = 0
        if tables[0].source.num_rows is not None:
            self.num_rows = sum(table.source.num_rows or 0 for table in tables)
            self._data_start = len(self._header(self.num_rows))
            self._journal_at = self._end_of(self.num_rows)
        else:
            self._journal_at = len(self._header(MAX_ROWS))
            self._header_size = self._journal_at + journal_size(self._text)
            self._data_start = len(self._header(MAX_ROWS))

    def _lengths(self, num_rows: int) -> Iterator[tuple[Table, int]]:
        """How many of the first `num_rows` rows belong to each table."""
        for table in self._tables:
            length = num_rows if table.source.num_rows is None else min(table.source.num_rows, num_rows)
            num_rows -= length
            yield table, length

    def _bytes_of(self, num_rows: int) -> int:
        """The bytes of the first `num_rows` rows in the new file."""
        return sum(table.layout.bytes_of(length) for table, length in self._lengths(num_rows))

    def _end_of(self, num_rows: int) -> int:
        """Where the new file ends: row weights come after all rows."""
        return self._data_start + self._bytes_of(num_rows) + sum(weights.nbytes for _, weights in self._weights)

    def source_bytes_of(self, num_rows: int) -> int:
        """The bytes of the first `num_rows` rows in their sources."""
        return sum(table.source.row_nbytes * length for table, length in self._lengths(num_rows))

    def _header(self, num_rows: int) -> bytes:
        tensors = [
            (table.rows_name, "U8", (length, table.layout.row_bytes)) for table, length in self._lengths(num_rows)
        ]
        tensors += [(name, "F32", weights.shape) for name, weights in self._weights]
        return header_bytes(tensors, self._metadata, self._header_size)

    def start(self, part: Unfinished, resume: bool) -> None:
        """Continue the unfinished file, or begin it."""
        if resume:
            # The last run was killed at its very end: the file has all rows, and the header except trailing spaces.
            rows = self.num_rows
            if rows is None:
                rows = self._tables[0].layout.rows_in(max(part.size - self._data_start, 0))
            if part.has_header(self._header(rows)):
                part.rows_done = rows
                return
            if part.resume(self._text):
                if part.rows_done and part.size < self._data_start + self._bytes_of(part.rows_done):
                    raise ValueError(f"resume must be False where {part.path} lost rows at its end")
                return
        part.begin(self._text, self._journal_at)

    def run(self, part: Unfinished, report: Report) -> None:
        """Make all rows that are not done yet. The last few that are done are made again and compared."""
        done = part.rows_done
        # A complete file has no journal left that would tell another source: all of its rows are compared.
        first = 0 if part.is_whole else max(done - CHECKED_ROWS, 0)
        before = bytes_before = 0  # the rows of the tables before this one, and their bytes in the sources
        start = self._data_start
        for table in self._tables:
            source, layout = table.source, table.layout
            row = max(first - before, 0)
            if source.num_rows is not None:
                row = min(row, source.num_rows)
            with contextlib.closing(source.blocks(row)) as blocks:
                for block in blocks:
                    codes = self._codes(part, table, block, row)
                    self._put(part, codes, start + layout.bytes_of(row), before + row, done)
                    row += len(codes)
                    if before + row > done:
                        part.rows_done = before + row
                        part.note()
                        report(part.rows_done, bytes_before + source.row_nbytes * row)
            before, bytes_before, start = (
                before + row,
                bytes_before + source.row_nbytes * row,
                start + layout.bytes_of(row),
            )
        if before < done:
            raise ValueError(f"source must have the {done} rows that {part.path} has already, got fewer")

    def _codes(self, part: Unfinished, table: Table, block: NDArray[Any], row: int) -> NDArray[np.uint8]:
        try:
            return quantize_part(block, name=table.name_in_errors, first_row=row, **self._options).data
        except (TypeError, ValueError):
            part.is_spoiled = True
            raise

    @staticmethod
    def _put(part: Unfinished, codes: NDArray[np.uint8], position: int, row: int, done: int) -> None:
        """Compare the rows that are already done, and write the others."""
        old = codes[: max(done - row, 0)]
        is_longer = part.is_whole and len(old) < len(codes)
        if is_longer or (len(old) and part.read(position, old.nbytes) != old.tobytes()):
            raise ValueError(
                f"resume must go on with the rows that {part.path} was begun with, got others from row {row} on"
            )
        if len(old) < len(codes):
            part.write(position + old.nbytes, codes[len(old) :])

    def end(self, part: Unfinished) -> None:
        position = self._data_start + self._bytes_of(part.rows_done)
        for _, weights in self._weights:
            part.write(position, weights.astype("<f4").view(np.uint8)[None])
            position += weights.nbytes
        part.finish(self._header(part.rows_done), position)


def _description(tables: list[Table], options: dict[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is made from what, for the journal. A run can be resumed only with the same description."""
    layout = tables[0].layout
    importance = options["importance"]
    if importance is not None:
        import hashlib  # not for each `import qembag`

        importance = hashlib.sha256(np.ascontiguousarray(importance, np.float64).tobytes()).hexdigest()
    described = {
        "bits": layout.bits,
        "method": str(options["method"]),
        "scale_dtype": layout.scale_dtype.name,
        "scale_first": layout.scale_first,
        "group_size": _number(options["group_size"]),
        "row_alignment": _number(options["row_alignment"]),
        "importance": importance,
        "metadata": {key: value for key, value in metadata.items() if not key.startswith(RESERVED)},
        "the names of tables": [table.name for table in tables],
    }
    for table in tables:
        described |= {f"{table.name}'s {key}": value for key, value in table.source.identity.items()}
    return described


def _number(value: Any) -> int | None:
    """The option as a Python int of limited length."""
    return None if value is None else min(int(value), sys.maxsize)
