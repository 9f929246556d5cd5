"""Opening files of tables. The format is in `docs/format.md`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _arguments
from .prefault import prefault
from .progress import check as check_progress
from .safetensors_file import brief, read_whole_index
from .saving import INDEX_SUFFIX, as_path, checked_text, describe, save_tables
from .stored import MAPPING, ROW_WEIGHTS
from .table_file import COLLECTION_KEY, RESERVED, TableFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..float_table import FloatTable
    from ..table import QuantizedTable
    from .progress import Progress

__all__ = ["Tables", "describe", "open_table", "open_tables", "save_tables"]


class Tables(dict[str, "QuantizedTable | FloatTable"]):
    """The tables of a file by name, with the file's metadata.

    Attributes
    ----------
    metadata : dict of str
        The `metadata` that `save_tables` was given, or another writer's strings.
    """

    metadata: dict[str, str]
    # The description of the file's collection, not checked yet: see `collections`.
    _collection: str | None = None

    def __init__(self, tables: Any = (), metadata: dict[str, str] | None = None) -> None:
        super().__init__(tables)
        self.metadata = {} if metadata is None else metadata


# ---- Opening ---------------------------------------------------------------------------------------------------------


def open_tables(
    path: str | os.PathLike[str], *, mmap: bool = True, populate: bool = False, progress: Progress = False
) -> Tables:
    """Open the tables of a file that `save_tables` wrote, or the float tables of any safetensors file.

    Parameters
    ----------
    path : str or path
        A safetensors file; or, if its name ends in ``.index.json``, an index of several.
    mmap : bool
        Map the file into memory: rows are read when they are looked up, and processes share the memory. Mapped tables
        are read-only. They pickle as the file's path, their name and a check, so that other processes map the file too.
        If the file is truncated while in use, the system ends the process; replace it instead, as `save_tables` does.
        False reads the tables into memory of their own, which is writable.
    populate : bool
        Read mapped tables into memory now, as `QuantizedTable.prefault` does.
    progress : bool or callable
        For `populate`; see `QuantizedTable.prefault`.

    Returns
    -------
    Tables
        A dict sorted by name, with an attribute `metadata`: tables of codes, and each 2-D tensor of float32, float16
        or bfloat16.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        Names the file and what is wrong: if it is not a safetensors file, damaged, or of a newer version of the
        format; if a table is not as the file describes it; if there is no table; if an index names files outside its
        folder.
    ImportError
        If ``progress=True`` and tqdm is not installed.

    Examples
    --------
    >>> import numpy as np, qembag, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = f"{folder.name}/tables.safetensors"
    >>> users = qembag.quantize(np.eye(4, dtype=np.float32), bits=4)
    >>> qembag.save_tables(path, {"users": users, "items": np.ones((2, 3), np.float16)}, metadata={"from": "eye"})
    >>> tables = qembag.open_tables(path)
    >>> tables["items"], tables["users"]  # doctest: +NORMALIZE_WHITESPACE
    (FloatTable(num_embeddings=2, dim=3, dtype=float16, nbytes=12),
     QuantizedTable(num_embeddings=4, dim=4, bits=4, nbytes=24))
    >>> tables.metadata
    {'from': 'eye'}
    >>> del tables; folder.cleanup()
    """
    populate = _arguments.flag(populate, "populate")
    check_progress(progress)
    tables = _open(path, mmap, _every)
    if populate:
        prefault(tables.values(), progress)
    return tables


def open_table(
    path: str | os.PathLike[str], name: str | None = None, *, mmap: bool = True, populate: bool = False
) -> QuantizedTable | FloatTable:
    """Open one table of a file; see `open_tables`.

    Parameters
    ----------
    path, mmap, populate
        As for `open_tables`.
    name : str, optional
        The table's name. May be omitted if the file has only one table.

    Returns
    -------
    QuantizedTable or FloatTable

    Raises
    ------
    OSError, ValueError
        As for `open_tables`; ValueError also if there is no table `name`, or no name is given and there are several.

    Examples
    --------
    >>> import numpy as np, qembag, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = f"{folder.name}/table.safetensors"
    >>> qembag.quantize(np.eye(4, dtype=np.float32)).save(path)
    >>> table = qembag.open_table(path)
    >>> table[1].round(6)
    array([0., 1., 0., 0.], dtype=float32)
    >>> del table; folder.cleanup()
    """
    if name is not None:
        name = checked_text(name, "name")
    populate = _arguments.flag(populate, "populate")
    (table,) = _open(path, mmap, _only(name)).values()
    if populate:
        prefault([table], False)
    return table


def _open(path: str | os.PathLike[str], mmap: bool, choose: Callable[[Path, list[str]], list[str]]) -> Tables:
    """The chosen tables of a file, or of an index. `choose` gets the path and all names, and returns some."""
    whole = Path(os.path.abspath(as_path(path)))
    mapped = _arguments.flag(mmap, "mmap")
    with contextlib.ExitStack() as stack:
        if whole.name.endswith(INDEX_SUFFIX):
            files, metadata = _files_of_index(whole, mapped, stack)
        else:
            files = [stack.enter_context(TableFile(whole, mapped=mapped))]
            metadata = files[0].header.metadata
        where = {name: file for file in files for name in file.plans}
        if not where:
            tensors = [tensor for file in files for tensor in file.header.tensors.values()]
            there = listed(f"{brief(tensor.name)} ({tensor.dtype}, {brief(tensor.shape)})" for tensor in tensors)
            raise ValueError(
                f"{whole}: has no table: neither codes that qembag saved nor a 2-D tensor of F32, F16 or BF16; "
                f"it has {there or 'no tensor at all'}"
            )
        tables = {name: where[name].table(name) for name in choose(whole, sorted(where))}
    found = Tables(tables, {key: value for key, value in metadata.items() if not key.startswith(RESERVED)})
    found._collection = metadata.get(COLLECTION_KEY)
    return found


def _files_of_index(path: Path, mapped: bool, stack: contextlib.ExitStack) -> tuple[list[TableFile], dict[str, str]]:
    """The files that an index names, and the strings in its metadata."""
    tensors, metadata = read_whole_index(path)
    files: dict[Path, TableFile] = {}
    seen: dict[str, Path] = {}
    for shard in sorted(set(tensors.values())):
        try:
            file = files[shard] = stack.enter_context(TableFile(shard, mapped=mapped))
        except OSError as error:
            raise ValueError(f"{path}: names {brief(shard.name)}, which cannot be read: {error.strerror}") from error
        for name in file.header.tensors:
            if name in seen:
                raise ValueError(f"{path}: tensor {brief(name)} is both in {seen[name].name} and in {shard.name}")
            seen[name] = shard
    for name, shard in tensors.items():
        if seen.get(name) != shard:
            raise ValueError(f"{path}: names tensor {brief(name)} in {shard.name}, which does not have it")
    tables: dict[str, Path] = {}
    for shard, file in files.items():
        for name in file.plans:
            if name in tables:
                raise ValueError(f"{path}: table {brief(name)} is both in {tables[name].name} and in {shard.name}")
            if any(seen.get(name + suffix, shard) != shard for suffix in (MAPPING, ROW_WEIGHTS)):
                raise ValueError(f"{path}: table {brief(name)}, its mapping and its row weights must be in one file")
            tables[name] = shard
    return list(files.values()), metadata


def _every(path: Path, names: list[str]) -> list[str]:
    return names


def _only(wanted: str | None) -> Callable[[Path, list[str]], list[str]]:
    """The table of that name, or the only one."""

    def choose(path: Path, names: list[str]) -> list[str]:
        if wanted is None and len(names) == 1:
            return names
        if wanted not in names:
            there = listed(map(brief, names))
            raise ValueError(f"name must be one of the tables of {path}: {there}; got {brief(wanted)}")
        return [wanted]

    return choose


def listed(names: Iterable[str]) -> str:
    """Names for an error message: the first 20, and how many more."""
    some = list(names)
    return ", ".join(some[:20]) + (f" and {len(some) - 20} more" if len(some) > 20 else "")
