"""load_tables: the tables of any file that is known, told by its content."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _arguments, _errors
from ..formats.safetensors_file import MAX_HEADER, brief
from ..formats.saving import INDEX_SUFFIX, as_path
from ..formats.stored import stored_array
from ..formats.table_file import NUM_SAMPLES, SAMPLE_BYTES, VERSION_KEY
from ..formats.tables import listed, open_tables
from .foreign import ByName, Foreign, Memory, Refused, Wanted, check_copies

if TYPE_CHECKING:
    from ..float_table import FloatTable
    from ..table import QuantizedTable

FORMATS = ("qembag", "torch", "model2vec", "sentence-transformers", "wordllama", "gguf")
STATIC_TEXT = FORMATS[2:5]
# What a torch file's parameters are called, behind the name of their module.
PARAMETER = ".weight"


def load_tables(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    bits: int | Mapping[str, int] | None = None,
    dims: int | Mapping[str, int] | None = None,
    names: str | list[str] | tuple[str, ...] | None = None,
    mmap: bool = True,
) -> dict[str, QuantizedTable | FloatTable]:
    """Load the tables of a file or folder that another library wrote, or qembag. The library itself is not needed.

    Known are files of torch (``.pt``: float embeddings, ``torch.ao.nn.quantized``, TorchRec, torchao), models of
    model2vec, sentence-transformers and WordLlama, GGUF files (with ``pip install 'qembag[gguf]'``), safetensors and
    ``.npy`` files. Nothing in a file is executed. ``docs/coming-from.md`` says what is exact.

    Parameters
    ----------
    path : str or path
        A file, or the folder of a model.
    format : {"qembag", "torch", "model2vec", "sentence-transformers", "wordllama", "gguf"}, optional
        What the file is; told by its content if not given. "qembag" stands for safetensors and ``.npy`` files.
    bits : {8, 4, 2, 16, 32}, or dict of them by name, optional
        Bits of an element, for tables whose file does not say (TorchRec); 16 and 32 are rows of floats. Names in a dict
        are those of tables, or their last part: ``t1`` for ``embedding_bags.t1``.
    dims : int, or dict of ints by name, optional
        Elements of a row, for tables whose file does not say.
    names : str or list of str, optional
        Load only these tables, by name or by the last part of it.
    mmap : bool
        Map the file: tables that need no repacking are views of it, read-only, and pickle as the file's path. False
        gives tables in memory of their own. A mapped file must not be truncated; see `open_tables`.

    Returns
    -------
    dict of QuantizedTable or FloatTable
        By the file's own names, less a parameter's suffix (``.weight``), in the order of the file.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        Names the file and what is wrong: if it is of an unknown kind or damaged, has no table or not those in `names`,
        or does not say what `bits` or `dims` must; if a value is out of range.
    TypeError
        If an argument has a wrong type.
    ImportError
        If the file needs a package that is not installed (GGUF).

    Examples
    --------
    >>> import numpy as np, qembag, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> np.save(f"{folder.name}/words.npy", np.eye(3, dtype=np.float16))
    >>> tables = qembag.load_tables(f"{folder.name}/words.npy")
    >>> tables
    {'words': FloatTable(num_embeddings=3, dim=3, dtype=float16, nbytes=18)}
    >>> del tables; folder.cleanup()
    """
    whole = Path(os.path.abspath(as_path(path)))
    mapped = _arguments.flag(mmap, "mmap")
    found = open_foreign(whole, _format(format), wanted_of(bits, dims, names))
    return loaded(found, whole, mapped=mapped)


def loaded(found: Found, path: Path, *, mapped: bool) -> dict[str, QuantizedTable | FloatTable]:
    """The tables that were found, made."""
    with errors_name(path):
        if found.file is not None:
            check_copies(found.tables.values(), found.file.num_bytes, mapped=mapped)
        return {name: found.table(name, mapped=mapped) for name in found.tables}


class Found(NamedTuple):
    """The tables of a file, before any is made, and which kind of file it is."""

    format: str
    tables: Mapping[str, Foreign]
    ready: Mapping[str, QuantizedTable | FloatTable]  # tables of our own files
    file: MappedTables | None
    metadata: Mapping[str, str] = MappingProxyType({})  # of our own files
    refused: Refused | None = None  # why there are not more
    collection: str | None = None  # the description in a file of ours, not checked yet

    def table(self, name: str, *, mapped: bool) -> QuantizedTable | FloatTable:
        if name in self.ready and mapped:
            return self.ready[name]
        foreign = self.tables[name]
        table = foreign.table(mapped=mapped)
        if self.file is not None and mapped and foreign.is_mapped:
            table._source = (self.file, name)
        return table

    def release(self) -> None:
        """Let the system take back the pages that were read of the tables' files."""
        files = {table._source[0] for table in self.ready.values() if table._source is not None}
        for file in files if self.file is None else {self.file}:
            file.release()


def open_foreign(path: Path, format: str | None, wanted: Wanted) -> Found:
    """Find the tables of a file or folder; see `load_tables`."""
    with errors_name(path):
        found = open_others(path, format, wanted) or open_ours(path)
        if found.refused is not None:
            raise found.refused
    return _chosen(found, wanted, path)


def open_others(path: Path, format: str | None, wanted: Wanted) -> Found | None:
    """Find the tables of a file or folder of another library; None for safetensors of no library.

    They are all there, whatever `wanted` names; those that it must say more of are in `refused`.
    """
    if path.is_dir():
        return _in_folder(path, format, wanted)
    found = None if path.name.endswith(INDEX_SUFFIX) else _in_file(path, format, wanted)
    if found is None:
        _check_format("qembag", format)
    return found


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Put the file's path before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{path}") else f"{path}: {text}") from None


def _in_folder(path: Path, format: str | None, wanted: Wanted) -> Found:
    from .static_text import read_folder

    if format is not None and format not in STATIC_TEXT:
        raise ValueError(f"must be a file for format {format!r}, got a folder")
    memory, kind, tables = read_folder(path, wanted)
    return _found(kind, tables, format, memory, path, wanted)


def _in_file(path: Path, format: str | None, wanted: Wanted) -> Found | None:
    memory = Memory(path)
    kind = _kind_of(memory)
    if kind == "torch":
        from .torch_file import read as read_torch

        try:
            return _found(kind, read_torch(memory, wanted), format, memory, path, wanted)
        except Refused as error:
            return _found(kind, error.tables, format, memory, path, wanted)._replace(refused=error)
    if kind == "gguf":
        from .gguf_file import read as read_gguf

        return _found(kind, read_gguf(memory, wanted), format, memory, path, wanted)
    if kind == "npy":
        return _found("qembag", {path.stem: _array(memory, path)}, format, memory, path, wanted)
    if kind == "safetensors":
        from .static_text import read_safetensors

        is_ours = format == "qembag" or not _is_foreign(path)
        known = None if is_ours else read_safetensors(memory, wanted)
        if known is not None:
            return _found(*known, format, memory, path, wanted)
    return None


def _kind_of(memory: Memory) -> str:
    head = memory.bytes[:9].tobytes()
    if not head:
        raise ValueError("is empty")
    # Asked before any magic number of a byte or two, with which the length of a header may begin.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head.startswith(b"PK") or head[:1] == b"\x80" or memory.bytes[257:262].tobytes() == b"ustar":
        return "torch"  # in zip files; others of torch are refused by its reader, which says why
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    raise ValueError(
        "is none of the files that load_tables knows: of torch (zip), model2vec, sentence-transformers, WordLlama, "
        f"GGUF, safetensors (an index of several ends in {INDEX_SUFFIX}) or .npy; it begins with {head[:8]!r}"
    )


def _found(
    kind: str, tables: Mapping[str, Foreign], format: str | None, memory: Memory, path: Path, wanted: Wanted
) -> Found:
    _check_format(kind, format)
    return Found(kind, tables, {}, MappedTables(path, kind, wanted, memory, tables))


def _array(memory: Memory, path: Path) -> Foreign:
    """The table of a .npy file."""
    stored = stored_array(path)
    if stored.by_columns or stored.element.newbyteorder("=") not in (np.float32, np.float16):
        order = ", column by column" if stored.by_columns else ""
        raise ValueError(f"must hold rows of float32 or float16, got {stored.kind}{order}")
    end = stored.start + stored.shape[0] * stored.shape[1] * stored.element.itemsize
    rows = memory.bytes[stored.start : end].view(stored.element).reshape(stored.shape)
    return Foreign.as_it_is(path.stem, rows)


def open_ours(path: Path) -> Found:
    """The tables of a safetensors file or an index."""
    opened = open_tables(path)
    is_foreign = _is_foreign(path)
    ready = {_short(name, opened): table for name, table in opened.items()} if is_foreign else dict(opened)
    tables = {name: Foreign.of_table(name, table) for name, table in ready.items()}
    collection = None if is_foreign else opened._collection
    return Found("qembag", tables, ready, None, opened.metadata, collection=collection)


def _is_foreign(path: Path) -> bool:
    """Whether a safetensors file has no description of ours: its names are those of parameters."""
    from ..formats.safetensors_file import read_header

    if path.name.endswith(INDEX_SUFFIX):
        return False
    with open(path, "rb") as file:
        return VERSION_KEY not in read_header(file, path).metadata


def _short(name: str, others: Mapping[str, Any]) -> str:
    short = name.removesuffix(PARAMETER)
    return short if short and short not in others else name


# ---- Arguments -------------------------------------------------------------------------------------------------------


def wanted_of(bits: object, dims: object, names: object) -> Wanted:
    """The arguments of `load_tables`, checked."""
    return Wanted(_by_name(bits, "bits", (8, 4, 2, 16, 32)), _by_name(dims, "dims", None), _names(names))


def _format(format: object) -> str | None:
    if format is None:
        return None
    text = _arguments.exact_text(format)
    if text not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {_errors.shown(format)}")
    return str(text)


def _check_format(kind: str, format: str | None) -> None:
    # Files of these two differ in nothing that must be so.
    are_alike = {kind, format} == {"sentence-transformers", "wordllama"}
    if format is not None and format != kind and not are_alike:
        raise ValueError(f"format must be what the file is, {kind}, got {format}")


def _by_name(value: object, argument: str, allowed: tuple[int, ...] | None) -> ByName:
    """One number for all tables, or numbers by name."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        found = {}
        for name, number in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{argument} must be a dict by name, got a key of {_errors.kind_of(name)}")
            found[name] = _number(number, f"{argument}[{_errors.shown(name)}]", allowed)
        return found
    return _number(value, argument, allowed)


def _number(value: object, argument: str, allowed: tuple[int, ...] | None) -> int:
    number = _arguments.whole_number(value, argument)
    if allowed is not None and number not in allowed:
        raise ValueError(f"{argument} must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, got {number}")
    if number < 1:
        raise ValueError(f"{argument} must be 1 or more, got {_errors.shown(number)}")
    return number


def _names(names: object) -> tuple[str, ...] | None:
    if names is None:
        return None
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"names must be a str or a list of str, got {_errors.kind_of(names)}")
    if not given:
        raise ValueError("names must have at least one name, got none")
    return tuple(map(str, given))


def _chosen(found: Found, wanted: Wanted, path: Path) -> Found:
    """Only the wanted tables. Raises ValueError if one is not there, or `bits` or `dims` name one that is not."""
    # Of tables that are not wanted, a reader may not know even the names.
    asked = {"bits": wanted.bits, "dims": wanted.dims} if wanted.names is None else {"names": wanted.names}
    there = {part for name in found.tables for part in (name, name.rpartition(".")[2])}
    for argument, given in asked.items():
        for name in given if isinstance(given, (tuple, Mapping)) else ():
            if name not in there:
                tables = listed(map(brief, found.tables)) or "none"
                raise ValueError(f"{argument} must name tables of {path}: {tables}; got {brief(name)}")
    kept = {name: table for name, table in found.tables.items() if wanted.wants(name)}
    return found._replace(tables=kept)


# ---- Pickling --------------------------------------------------------------------------------------------------------


class MappedTables:
    """A file of another library that is mapped. Its tables pickle as this object, and this object as the file's path,
    the arguments that it was read with, and a hash."""

    __slots__ = ("_memory", "_tables", "_wanted", "format", "path")

    def __init__(self, path: Path, format: str, wanted: Wanted, memory: Memory, tables: Mapping[str, Foreign]) -> None:
        self.path, self.format = path, format
        self._wanted, self._memory, self._tables = wanted, memory, tables

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return len(self._memory.bytes)

    def release(self) -> None:
        """Let the system take back the pages that were read."""
        self._memory.release()

    def __deepcopy__(self, memo: object) -> MappedTables:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, (str(self.path), self.format, tuple(self._wanted), self._check()))

    def reduced(self, table: Any, name: str) -> tuple[Any, ...]:
        """The pickle of a table of this file."""
        return (_table_of_file, (self, name))

    def _check(self) -> bytes:
        """A hash of the file's size, and of its bytes in a few places."""
        import hashlib  # takes a millisecond: not for each load

        whole = self._memory.bytes
        found = hashlib.blake2b(str(len(whole)).encode(), digest_size=16)
        last = max(len(whole) - SAMPLE_BYTES, 0)
        for number in range(NUM_SAMPLES):
            start = last * number // (NUM_SAMPLES - 1)
            found.update(whole[start : start + SAMPLE_BYTES].data)
        return found.digest()


def _reopened(path: str, format: str, wanted: tuple[Any, ...], check: bytes) -> MappedTables:
    file = open_foreign(Path(path), format, Wanted(*wanted)).file
    if file is None or file._check() != check:
        raise ValueError(f"{path}: changed since its tables were pickled")
    return file


def _table_of_file(file: MappedTables, name: str) -> QuantizedTable | FloatTable:
    with errors_name(file.path):
        # The hash is of a few places.
        if name not in file._tables:
            raise ValueError(f"changed since its tables were pickled: it has no table {brief(name)}")
        table = file._tables[name].table(mapped=True)
    table._source = (file, name)
    return table
