"""Saving tables to files. The format is in `docs/format.md`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from .. import _arguments, float_table
from .._errors import kind_of, shown
from ..base import Table
from ..float_table import FloatTable
from ..layout import FloatLayout, RowLayout, table_bytes
from .replace import replacing
from .safetensors_file import brief, header_bytes, read_index
from .stored import MAPPING, ROW_WEIGHTS
from .table_file import RESERVED, ROWS, TABLES_KEY, VERSION, VERSION_KEY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .._handle import LayoutFields, TableHandle

AnyTable: TypeAlias = Table | np.ndarray[Any, np.dtype[Any]]
INDEX_SUFFIX = ".index.json"
FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Rows are written, and copied if need be, this many bytes at a time.
WRITTEN_AT_ONCE = 1 << 23


def save_tables(
    path: str | os.PathLike[str],
    tables: AnyTable | Mapping[str, AnyTable],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Save tables to a safetensors file, which `open_tables` opens.

    Parameters
    ----------
    path : str or path
        The file to write. If its name ends in ``.index.json``, it becomes an index, as Hugging Face writes it, and the
        tables go to one or several files beside it: ``model.safetensors.index.json`` and, for example,
        ``model-1f3a9c04-00001-of-00002.safetensors``.
    tables : QuantizedTable, FloatTable, array of floats, or dict of them by name
        A single table gets the name "table". Arrays have shape (num_rows, dim) and are float32, float16 or bfloat16.
    metadata : dict of str, optional
        Strings to save with the tables. Keys must not begin with ``qembag.``.
    max_shard_bytes : int, optional
        For an index: begin a new file when the current one would hold more than this many bytes of tables. A table is
        never split, even if it is larger.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If a name is empty, or two tables would take the same name in the file; if `metadata` has a key that is not
        allowed; if `max_shard_bytes` is given and `path` is not an index.
    IndexError
        If a mapping was changed since its table was made, and names a row that does not exist.
    OSError
        Names `path`: if the file cannot be written.

    Notes
    -----
    The new file replaces `path` once everything is written and flushed to disk: after an error or a crash, `path` is
    the old file or the new one. Tables may be saved to the file that they are mapped from; they keep the old file,
    which lives on without a name. (Not on Windows, which refuses to replace a mapped file.) With an index, every save
    uses new file names, and removes the files of the old index last. A crash may leave files that no index names.

    Padding bytes of rows are saved as zeros. The scales and zero points that `ops.embedding_bag_prepack` was
    given, for its unpack, are not saved.

    Examples
    --------
    >>> import numpy as np, qembag, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = f"{folder.name}/tables.safetensors"
    >>> table = qembag.quantize(np.eye(4, dtype=np.float32), bits=2)
    >>> qembag.save_tables(path, {"a": table, "b": table.prune([0, 3])}, metadata={"made by": "an example"})
    >>> list(qembag.open_tables(path))
    ['a', 'b']
    >>> folder.cleanup()
    """
    target = as_path(path)
    contents = contents_of(tables)
    limit = None if max_shard_bytes is None else _arguments.whole_number(max_shard_bytes, "max_shard_bytes")
    if limit is not None and limit < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {shown(limit)}")
    kept = _metadata(metadata)
    if limit is not None and not target.name.endswith(INDEX_SUFFIX):
        raise ValueError(f"max_shard_bytes must come with a path that ends in {INDEX_SUFFIX}, got {brief(str(target))}")
    save_contents(target, contents, kept, limit)


def save_contents(
    target: Path, contents: Mapping[str, Content], metadata: dict[str, str], max_shard_bytes: int | None = None
) -> None:
    """Write a file, or an index and its files. See `save_tables`; `metadata` is checked, and may have reserved keys."""
    _check_apart(contents)
    if target.name.endswith(INDEX_SUFFIX):
        _save_shards(target, contents, metadata, max_shard_bytes)
    else:
        with replacing(target) as file:
            _write(file, contents, metadata)


def as_path(path: object) -> Path:
    """The argument `path`, checked."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {kind_of(path)}")
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path must be a str or a path of str, got one of {kind_of(name)}")
    name = _arguments.exact_text(name)
    if not name or "\0" in name:
        raise ValueError(f"path must name a file, got {shown(name)}")
    return Path(name)


# ---- What is saved ---------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """What is saved of a table. `rows` gives its stored rows in order, in blocks: packed, with zeros for padding, or
    floats in the host's byte order."""

    layout: LayoutFields
    num_rows: int
    rows: Callable[[], Iterator[NDArray[Any]]]
    mapping: NDArray[np.int32] | None
    row_weights: NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        others = sum(part.nbytes for part in (self.mapping, self.row_weights) if part is not None)
        return table_bytes(self.layout, self.num_rows) + others


def contents_of(tables: object) -> dict[str, Content]:
    """What is saved of each table, by name."""
    if isinstance(tables, (Table, np.ndarray)):
        return {"table": _content_of(tables, "tables")}
    if not isinstance(tables, Mapping):
        raise TypeError(f"tables must be a table or a dict of tables by name, got {kind_of(tables)}")
    found: dict[str, Content] = {}
    for name, table in tables.items():
        text = checked_name(name)
        if text in found:  # keys of a subclass of str may differ and have the same text
            raise ValueError(f"tables must have each name once, got {shown(text)} twice")
        found[text] = _content_of(table, f"tables[{shown(text)}]")
    if not found:
        raise ValueError("tables must have at least one table, got none")
    return found


def checked_name(name: object) -> str:
    """The name of a table, if a file can have it."""
    text = checked_text(name, "tables must be a dict by name; its keys")
    if text in ("", "__metadata__"):
        raise ValueError(f"tables must have names other than '' and '__metadata__', got {shown(text)}")
    return text


def _content_of(table: object, name: str) -> Content:
    if not isinstance(table, Table):
        if not isinstance(table, np.ndarray):
            raise TypeError(
                f"{name} must be a QuantizedTable, a FloatTable or an array of floats, got {kind_of(table)}"
            )
        floats = _arguments.float_rows(table, name, None)
        table = FloatTable._of(*float_table._rows_of(floats, name), None)
    handle = table._handle
    blocks = functools.partial(_rows_of, handle)
    # Copied, and checked again: the caller may have written to it since the table was made.
    mapping = None if handle.mapping is None else _arguments.checked_mapping(handle.mapping.copy(), len(handle.rows))
    return Content(handle.layout, len(handle.rows), blocks, mapping, table._row_weights)


def _check_apart(contents: Mapping[str, Content]) -> None:
    """Raise if tensor names collide. A reader finds mappings and weights by name, so each table reserves theirs."""
    owners: dict[str, str] = {}
    for name, content in contents.items():
        rows = name + ROWS if isinstance(content.layout, RowLayout) else name
        for tensor in (rows, name + MAPPING, name + ROW_WEIGHTS):
            other = owners.setdefault(tensor, name)
            if other != name:
                raise ValueError(
                    f"tables must not have names that collide: {shown(other)} and {shown(name)} would both need "
                    f"{shown(tensor)}"
                )


def checked_text(value: object, what: str) -> str:
    """The text as a plain str, not a subclass. Raises ValueError if it cannot be encoded as UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be str, got {kind_of(value)}")
    text = _arguments.exact_text(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be text without lone surrogates, got {shown(text)}") from None
    return text


def _metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dict of str, got {kind_of(metadata)}")
    kept: dict[str, str] = {}
    for key, value in metadata.items():
        text = checked_text(key, "metadata must be a dict of str; its keys")
        if text.startswith(RESERVED):
            raise ValueError(f"metadata must not have keys that begin with {RESERVED}, got {shown(text)}")
        kept[text] = checked_text(value, f"metadata[{shown(text)}]")
    return kept


def describe(layouts: Mapping[str, RowLayout], metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The `__metadata__` of a file: the layouts of its tables of codes, by name, and the user's `metadata`."""
    described = {
        name: {
            "bits": layout.bits,
            "dim": layout.dim,
            "scale_dtype": layout.scale_dtype.name,
            "scale_first": layout.scale_first,
            "group_size": layout.group_size if layout.num_groups > 1 else None,
        }
        for name, layout in sorted(layouts.items())
    }
    own = {VERSION_KEY: str(VERSION), TABLES_KEY: json.dumps(described, ensure_ascii=False, separators=(",", ":"))}
    return own | dict(sorted(_metadata(metadata).items()))


# ---- One file --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A tensor of a table."""

    itemsize: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[NDArray[Any]]]


def _parts(contents: Mapping[str, Content]) -> list[_Part]:
    """The tensors in file order: larger elements first, so that each tensor is aligned."""
    parts = []
    for name, content in contents.items():
        layout, num_rows = content.layout, content.num_rows
        if isinstance(layout, FloatLayout):
            kind = FLOAT_NAMES[layout.name]
            parts.append(_Part(layout.stored.itemsize, name, kind, (num_rows, layout.dim), content.rows))
        else:
            parts.append(_Part(1, name + ROWS, "U8", (num_rows, layout.row_bytes), content.rows))
        for suffix, kind, array in ((MAPPING, "I32", content.mapping), (ROW_WEIGHTS, "F32", content.row_weights)):
            if array is not None:
                parts.append(_Part(4, name + suffix, kind, array.shape, functools.partial(_whole, array)))
    return sorted(parts, key=lambda part: (-part.itemsize, part.name))


def _write(file: IO[bytes], contents: Mapping[str, Content], metadata: Mapping[str, str]) -> None:
    """Write the header, then the tensors."""
    parts = _parts(contents)
    layouts = {name: content.layout for name, content in contents.items() if isinstance(content.layout, RowLayout)}
    strings = describe(layouts, None) | dict(sorted(metadata.items()))
    file.write(header_bytes([(part.name, part.dtype, part.shape) for part in parts], strings))
    for part in parts:
        for block in part.blocks():
            if block.size:
                # The file is little-endian. Rows of codes (itemsize 1) are so in memory already.
                swapped = sys.byteorder == "big" and part.itemsize > 1
                file.write(block.view(f"u{part.itemsize}").byteswap().data if swapped else block.data)


def _whole(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    yield np.ascontiguousarray(array)


def _rows_of(handle: TableHandle) -> Iterator[NDArray[np.uint8]]:
    """The rows in blocks, with zeros for padding."""
    rows, layout = handle.rows, handle.layout
    at_once = max(WRITTEN_AT_ONCE // max(layout.row_bytes, 1), 1)
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        block = layout.taken(rows, part) if isinstance(layout, RowLayout) else rows[part]
        yield np.ascontiguousarray(block)


# ---- Several files ---------------------------------------------------------------------------------------------------


def _save_shards(path: Path, contents: Mapping[str, Content], metadata: dict[str, str], limit: int | None) -> None:
    if "total_size" in metadata:
        raise ValueError("metadata must not have the key total_size, which the index itself uses")
    path = Path(os.path.realpath(path))  # a link is followed, and the files lie beside the index itself
    stem = path.name.removesuffix(INDEX_SUFFIX).removesuffix(".safetensors")
    shards = _shards(contents, limit)
    # New names, so that after a crash the old index or the new one has all its files.
    token = os.urandom(4).hex()
    names = [f"{stem}-{token}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    placed = {part.name: name for name, shard in zip(names, shards, strict=True) for part in _parts(shard)}
    size = sum(content.nbytes for content in contents.values())
    index = {"metadata": metadata | {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
    text = json.dumps(index, ensure_ascii=False, indent=2).encode("utf-8") + b"\n"
    old = _old_shards(path, stem)
    try:
        for name, shard in zip(names, shards, strict=True):
            with replacing(path.with_name(name)) as file:
                _write(file, shard, {})
        with replacing(path) as file:
            file.write(text)
    except BaseException:
        if not _holds(path, text):
            _remove(path.with_name(name) for name in names)
        raise
    _remove(old)


def _shards(contents: Mapping[str, Content], limit: int | None) -> list[dict[str, Content]]:
    """The tables of each file, in order."""
    shards: list[dict[str, Content]] = [{}]
    size = 0
    for name, content in contents.items():
        if limit is not None and shards[-1] and size + content.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = content
        size += content.nbytes
    return shards


def _old_shards(path: Path, stem: str) -> list[Path]:
    """The files of the existing index whose names follow the pattern of this module."""
    named = re.compile(rf"{re.escape(stem)}-[0-9a-f]{{8}}-\d{{5,}}-of-\d{{5,}}\.safetensors")
    try:
        files = set(read_index(path).values())
    except (OSError, ValueError):
        return []
    return [file for file in files if file.parent == path.parent and named.fullmatch(file.name)]


def _holds(path: Path, text: bytes) -> bool:
    try:
        return path.read_bytes() == text
    except OSError:
        return False


def _remove(paths: Any) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
