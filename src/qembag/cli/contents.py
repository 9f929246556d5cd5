"""What files hold, for the commands that read them: tables, tensors of floats, and the rest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from .._arguments import as_float32
from ..float_table import FloatTable
from ..formats.safetensors_file import Tensor, read_header, read_index
from ..formats.sources import Source, float_tensors, open_source, read_rows
from ..formats.tables import Tables, listed, open_tables
from ..interop.foreign import OVERLAP, Foreign, Refused, Wanted
from ..interop.load import Found, open_others, open_ours
from ..table import QuantizedTable
from .arrays import load_array
from .output import Failure, complain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from ..layout import FloatLayout, RowLayout

AnyTable: TypeAlias = QuantizedTable | FloatTable
# Values are made about this many bytes at a time.
AT_ONCE = 8 << 20
# Bytes of a sample, and runs of rows of which it is made: each run reads pages of its own.
SAMPLE, NUM_RUNS = 8 << 20, 64


class Block(NamedTuple):
    """Some stored rows: logical numbers, values, and for codes the pairs of scale and bias, else None."""

    numbers: NDArray[np.int64]
    values: NDArray[Any]
    pairs: NDArray[np.float32] | None


def nothing() -> None:
    """Does nothing."""


class Contents(NamedTuple):
    """Tables by name, tensors that belong to no table, and the file's metadata except qembag's own.

    Of another library's file also the format, and why there are not more tables; of ours the description of
    its collection. `release` lets the system take back the pages of mapped files that were read.
    """

    tables: dict[str, AnyTable | Source | Foreign]
    tensors: list[Tensor]
    metadata: dict[str, str]
    format: str | None = None
    refused: Refused | None = None
    release: Callable[[], None] = nothing
    collection: str | None = None


def contents_of(path: Path, format: str | None = None, wanted: Wanted | None = None) -> Contents:
    """What is in a file, in the files that an index names, or in the folder of a model.

    Raises
    ------
    OSError, ValueError
        If a file cannot be read, or is not in its format.
    """
    tables: dict[str, AnyTable | Source | Foreign] = {}
    others = others_of(path, format, wanted)
    if others is not None:
        refused = {} if others.refused is None else dict(others.refused.refused)
        for name, table in others.tables.items():
            if table.overlaps:
                refused[name] = OVERLAP
            else:
                tables[name] = streamed(others, name)
        why = Refused({}, refused, "" if others.refused is None else others.refused.hint) if refused else None
        return Contents(tables, [], {}, others.format, why, others.release)
    if path.suffix.lower() == ".npy":
        array = load_array(path)
        if array.dtype.kind == "f" and array.ndim == 2:
            return Contents({path.stem: open_source(path)}, [], {})
        return Contents({}, [Tensor(path.stem, str(array.dtype), array.shape, 0, array.nbytes)], {})
    tensors, headers = tensors_of(path)
    described = any("qembag.tables" in metadata for metadata in headers)
    release: Callable[[], None] = nothing
    collection = None
    metadata = {key: value for some in headers for key, value in some.items() if not key.startswith("qembag.")}
    floats = float_tensors(path)
    # A float64 tensor is not a table, but it can be quantized.
    if described or any(dtype != "float64" for dtype, _ in floats.values()):
        stored = open_tables(path)
        tables |= stored
        metadata, collection = stored.metadata, stored._collection
        release = Found("qembag", {}, stored, None).release
    for name in floats:
        if name not in tables:
            tables[name] = open_source(path, name)
    return Contents(tables, in_no_table(tensors, tables), metadata, release=release, collection=collection)


def others_of(path: Path, format: str | None = None, wanted: Wanted | None = None) -> Found | None:
    """The tables of another library's file or folder; None for those of qembag, if they have its suffixes."""
    name = path.name.lower()
    if format is None and not path.is_dir():
        if name.endswith((".npy", ".index.json")):
            return None
        if name.endswith(".safetensors"):
            tensors_of(path)  # raises what readers of our own files say of one that is damaged
    whole = Path(os.path.abspath(path))
    found = open_others(whole, format, wanted or Wanted())
    return open_ours(whole) if found is None and not name.endswith((".safetensors", ".index.json")) else found


def opened(path: Path, name: str | None = None) -> tuple[Tables, bool]:
    """The tables of a file, or the one of that name; and whether the file is another library's."""
    others = others_of(path, wanted=Wanted(names=None if name is None else (name,)))
    if others is None:
        return open_tables(path), False
    if others.refused is not None:
        raise ValueError(f"{others.refused}; `qembag convert` takes --dims and --bits")
    names = others.tables if name is None else [chosen(others.tables, name)]
    for each in names:
        others.tables[each].check_apart()
    return Tables({name: others.table(name, mapped=True) for name in names}), True


def streamed(found: Found, name: str) -> AnyTable | Foreign:
    """A table as a view of its file; if it must be repacked, and would take memory, to be read in blocks."""
    foreign = found.tables[name]
    return found.table(name, mapped=True) if foreign.is_mapped or foreign.mapping is not None else foreign


def in_no_table(tensors: list[Tensor], tables: Iterable[str]) -> list[Tensor]:
    """The tensors that belong to none of the tables."""
    suffixes = ("", ".rows", ".compressed_indices_mapping", ".row_weights")
    parts = {name + suffix for name in tables for suffix in suffixes}
    return [tensor for tensor in tensors if tensor.name not in parts]


def tell_what_is_left_out(
    prog: str, source: Path, target: Path, tables: Mapping[str, AnyTable], *, is_foreign: bool
) -> None:
    """Say which tensors of the source are in none of the tables; refuse to lose them by replacing their file."""
    replaces = target.exists() and target.samefile(source)
    if is_foreign:
        if replaces:
            raise Failure(f"{target}: is another library's file, which could not read it any more")
        return
    tensors, _ = tensors_of(source)
    names = [tensor.name for tensor in in_no_table(tensors, tables)]
    if not names:
        return
    if replaces:
        raise Failure(f"{target}: has tensors that are no tables, and would lose them: {listed(map(repr, names))}")
    complain(prog, f"leaves out tensors that are no tables: {listed(map(repr, names))}")


def tensors_of(path: Path) -> tuple[list[Tensor], list[dict[str, str]]]:
    """The tensors of a file or of all files of an index, and the metadata of each file."""
    if not path.name.endswith(".index.json"):
        with path.open("rb") as file:
            header = read_header(file, path)
        return list(header.tensors.values()), [header.metadata]
    tensors, metadata = [], []
    index = read_index(path)
    for shard in sorted(set(index.values())):
        with shard.open("rb") as file:
            header = read_header(file, shard)
        tensors += [tensor for tensor in header.tensors.values() if index.get(tensor.name) == shard]
        metadata.append(header.metadata)
    return tensors, metadata


def stored_table(path: Path, name: str | None) -> AnyTable:
    """The table of that name, or the only one; for a .npy file a table of its floats."""
    if path.suffix.lower() != ".npy" or path.is_dir():
        tables, _ = opened(path, name)
        return tables[chosen(tables, name)]
    if name is not None:
        raise ValueError("--table is for files of tables with names, not for .npy")
    array = load_array(path)
    if array.dtype.kind == "f" and array.dtype.itemsize == 8:
        return FloatTable(as_float32(array))
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return FloatTable(np.ascontiguousarray(native) if native.ndim == 2 else native)


def chosen(tables: Mapping[str, object], name: str | None) -> str:
    """The table of that name, or the only one whose name ends so; if None, the only table."""
    if name is None and len(tables) == 1:
        return next(iter(tables))
    ends = [known for known in tables if name is not None and known.endswith(f".{name}")]
    if name not in tables and len(ends) == 1:
        return ends[0]
    if name is None or name not in tables:
        got = "" if name is None else f", got {name!r}"
        raise ValueError(f"--table must be one of {listed(map(repr, tables))}{got}")
    return name


def float_rows(path: Path, tensor: str | None) -> NDArray[np.float32]:
    """All rows of a tensor of floats."""
    source = open_source(path, tensor)
    if not source.num_rows:
        raise ValueError("the table must have rows, got none")
    rows = np.empty((source.num_rows, source.dim), np.float32)
    start = 0
    for block in source.blocks():
        rows[start : start + len(block)] = as_float32(block)
        start += len(block)
    return rows


def layout_of(table: AnyTable | Foreign) -> RowLayout | FloatLayout:
    return table.layout if isinstance(table, (Foreign, QuantizedTable)) else table._layout


# ---- Block by block --------------------------------------------------------------------------------------------------


def rows_at_once(table: AnyTable | Source) -> int:
    """How many rows of values to make at a time."""
    return rows_in(AT_ONCE, table)


def rows_in(nbytes: int, table: AnyTable | Source | Foreign) -> int:
    """How many rows of values are about so many bytes; at least 1."""
    return max(nbytes // (np.dtype(np.float32).itemsize * table.dim), 1)


def numbers_of(table: AnyTable) -> Iterator[NDArray[np.int64]]:
    """All logical rows, as many at a time as `rows_at_once` says."""
    step = rows_at_once(table)
    for start in range(0, table.num_embeddings, step):
        yield np.arange(start, min(start + step, table.num_embeddings))


def num_stored(table: AnyTable | Source | Foreign) -> int:
    return (table.num_rows or 0) if isinstance(table, Source) else table.num_rows


def blocks_of(table: AnyTable | Source | Foreign) -> Iterator[Block]:
    """All rows that are not pruned, some megabytes of values at a time."""
    if isinstance(table, Foreign):
        start = 0
        for block in table.blocks():
            numbers, part = np.arange(start, start + len(block)), table.part(block)
            yield from (some._replace(numbers=numbers[some.numbers]) for some in blocks_of(part))
            start += len(block)
        return
    if isinstance(table, Source):
        start = 0
        for values in table.blocks():
            yield Block(np.arange(start, start + len(values)), values, None)
            start += len(values)
        return
    for numbers in numbers_of(table):
        yield from some_of(table, numbers)


def some_of(table: AnyTable, numbers: NDArray[np.int64]) -> Iterator[Block]:
    """A block of those of the logical rows `numbers` that are not pruned, if any."""
    mapping = table.compressed_indices_mapping
    stored = numbers if mapping is None else mapping[numbers]
    numbers, stored = numbers[stored >= 0], stored[stored >= 0]
    if len(numbers):
        pairs = table.layout.pairs(table.data[stored]) if isinstance(table, QuantizedTable) else None
        yield Block(numbers, table.dequantize(numbers), pairs)


def sample_of(table: AnyTable | Source | Foreign) -> NDArray[Any]:
    """Values of rows here and there that are not pruned."""
    most = rows_in(SAMPLE, table)
    if isinstance(table, Foreign):
        numbers = spaced(table.num_rows, most)
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
        values = [table.part(table.rows(int(run[0]), int(run[-1]) + 1)).dequantize() for run in runs]
        return np.concatenate([np.empty((0, table.dim), np.float32), *values])
    if isinstance(table, Source):
        return read_rows(table, spaced(table.num_rows or 0, most))
    mapping = table.compressed_indices_mapping
    if mapping is None:
        return table.dequantize(spaced(table.num_embeddings, most))
    there = np.flatnonzero(mapping >= 0)
    return table.dequantize(there[spaced(len(there), most)])


def spaced(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers below `count`, sorted: all of them, or evenly spaced runs."""
    length = 1 if count <= most else max(most // NUM_RUNS, 1)
    starts = np.linspace(0, count - length, min(count, most) // length).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(length))
