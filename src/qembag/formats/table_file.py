"""A file of tables: which tensors make up which table; tables of a mapped file, which pickle as its path."""

from __future__ import annotations

import mmap
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from .. import float_table
from .. import layout as layouts
from .. import table as code_table
from ..float_table import FloatTable
from ..table import QuantizedTable
from .safetensors_file import Header, Tensor, brief, read_header, read_json
from .stored import MAPPING, ROW_WEIGHTS, is_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..base import Table

VERSION = 1
RESERVED = "qembag."
VERSION_KEY, TABLES_KEY = "qembag.version", "qembag.tables"
COLLECTION_KEY = "qembag.collection"
ROWS = ".rows"
DESCRIPTION = {"bits", "dim", "scale_dtype", "scale_first", "group_size"}
FLOATS = {"F32", "F16", "BF16"}
# The types of a file as NumPy's; bfloat16 as its bits.
_KINDS = {"U8": "u1", "I32": "<i4", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
STORED = {name: np.dtype(kind) for name, kind in _KINDS.items()}
READ_AT_ONCE = 1 << 26
# To check that a table's bytes are still those that were pickled, this many places of this many bytes are hashed.
NUM_SAMPLES, SAMPLE_BYTES = 16, 4096


class Plan(NamedTuple):
    """The tensors of a table, and for codes the file's description of their layout, not checked yet."""

    rows: Tensor
    mapping: Tensor | None
    row_weights: Tensor | None
    description: Any

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.rows, self.mapping, self.row_weights) if tensor is not None]


def plans_of(header: Header) -> dict[str, Plan]:
    """The tables of a file, sorted by name."""
    tensors = header.tensors
    plans: dict[str, Plan] = {}

    def plan_of(name: str, rows: Tensor, description: Any) -> Plan:
        weights = tensors.get(name + ROW_WEIGHTS)
        return Plan(rows, tensors.get(name + MAPPING), weights if is_weights(weights) else None, description)

    for name, description in _descriptions(header.metadata).items():
        rows = tensors.get(name + ROWS)
        if rows is None:
            raise ValueError(f"table {brief(name)} has no tensor {brief(name + ROWS)}")
        plans[name] = plan_of(name, rows, description)
    parts = {tensor.name for plan in plans.values() for tensor in plan.tensors}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and len(tensor.shape) == 2 and tensor.shape[1] > 0 and name not in parts:
            if name in plans:
                raise ValueError(f"has two tables {brief(name)}, one of codes and one of floats")
            plans[name] = plan_of(name, tensor, None)
    return dict(sorted(plans.items()))


def _descriptions(metadata: Mapping[str, str]) -> dict[str, Any]:
    version, described = metadata.get(VERSION_KEY), metadata.get(TABLES_KEY)
    if version is None and described is None:
        return {}
    if version is None or described is None:
        raise ValueError(f"__metadata__ must have both {VERSION_KEY} and {TABLES_KEY}, or neither")
    if version != str(VERSION):
        hint = ", a newer one: update qembag" if version.isdecimal() and version[0] != "0" else ""
        raise ValueError(f"{VERSION_KEY} must be '{VERSION}', got {brief(version)}{hint}")
    try:
        tables = read_json(described)
    except ValueError as error:
        raise ValueError(f"{TABLES_KEY} {error}") from None
    if type(tables) is not dict:
        raise ValueError(f"{TABLES_KEY} must be an object, got {brief(tables)}")
    return tables


def _layout_of(plan: Plan) -> layouts.RowLayout:
    rows, given = plan.rows, plan.description
    if rows.dtype != "U8" or len(rows.shape) != 2:
        raise ValueError(f"{brief(rows.name)} must be U8 of 2 dimensions, got {rows.dtype} of {brief(rows.shape)}")
    if type(given) is not dict or given.keys() != DESCRIPTION:
        raise ValueError(f"its description must have {', '.join(sorted(DESCRIPTION))}, got {brief(given)}")
    for key, kinds, words in (
        ("bits", [int], "a whole number"),
        ("dim", [int], "a whole number"),
        ("scale_first", [bool], "true or false"),
        ("group_size", [int, type(None)], "a whole number or null"),
    ):
        if type(given[key]) not in kinds:  # True is an int for isinstance
            raise ValueError(f"{key} must be {words}, got {brief(given[key])}")
    if given["scale_dtype"] not in ("float32", "float16"):
        raise ValueError(f"scale_dtype must be float32 or float16, got {brief(given['scale_dtype'])}")
    bits = given["bits"]
    if bits not in (8, 4, 2):
        raise ValueError(f"bits must be 8, 4 or 2, got {bits}")
    others = {key: value for key, value in given.items() if key != "bits"}
    # Not the tensor's own name: `of_rows` caches by its arguments.
    return layouts.of_rows(rows.shape[1], bits, "its tensor", **others)


# ---- Files -----------------------------------------------------------------------------------------------------------


class TableFile:
    """A file of tables, mapped or open for reading.

    Mapped tables refer to it, and pickle as this object and their name; this object pickles as its path and a check. So
    a pickle of many tables names the file once, and unpickling opens it once.
    """

    __slots__ = ("_map", "_memory", "_stream", "header", "path", "plans")

    def __init__(self, path: Path, *, mapped: bool) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._memory: NDArray[np.uint8] | None = None
        self._stream = path.open("rb")
        try:
            self.header = read_header(self._stream, path)
            try:
                self.plans = plans_of(self.header)
                if mapped:
                    self._map, self._memory = map_file(self._stream.fileno())
                    if len(self._memory) != self.size:
                        raise ValueError("changed while it was opened")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        except BaseException:
            self.close()
            raise
        if mapped:
            self.close()

    def close(self) -> None:
        """Close the stream. Memory stays mapped while anything uses it."""
        self._stream.close()

    def release(self) -> None:
        """Let the system take back the pages that were read; see `release_pages`."""
        release_pages(self._map)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes of the file, which ends where its last tensor ends."""
        return max(
            (tensor.start + tensor.nbytes for tensor in self.header.tensors.values()), default=self.header.data_start
        )

    def table(self, name: str, kind: Any = None) -> QuantizedTable | FloatTable:
        """The table of that name, of class `kind` if given."""
        plan = self.plans[name]
        table: QuantizedTable | FloatTable
        try:
            mapping = None if plan.mapping is None else self._mapping(plan.mapping)
            weights = None if plan.row_weights is None else self._array(plan.row_weights)
            if plan.description is None:
                table = float_table.table_of(kind or FloatTable, self._array(plan.rows), mapping, weights)
            else:
                layout, rows = _layout_of(plan), self._array(plan.rows)
                table = code_table.table_of(kind or QuantizedTable, rows, layout, mapping, row_weights=weights)
        except (IndexError, ValueError) as error:
            raise ValueError(f"{self.path}: table {brief(name)}: {error}") from None
        if self._memory is not None:
            table._source = (self, name)
        return table

    def _mapping(self, tensor: Tensor) -> NDArray[np.int32]:
        if tensor.dtype != "I32" or len(tensor.shape) != 1:
            found = f"{tensor.dtype} of {brief(tensor.shape)}"
            raise ValueError(f"{brief(tensor.name)} must be I32 of 1 dimension, got {found}")
        return self._array(tensor)

    def _array(self, tensor: Tensor) -> NDArray[Any]:
        """A tensor in the host's byte order: a view of mapped memory if possible, else a copy."""
        dtype = STORED[tensor.dtype]
        array: NDArray[Any]
        if tensor.nbytes == 0:
            array = np.empty(tensor.shape, dtype)
        elif self._memory is not None:
            array = self._memory[tensor.start : tensor.start + tensor.nbytes].view(dtype).reshape(tensor.shape)
        else:
            array = self._read(tensor).view(dtype).reshape(tensor.shape)
        return array if dtype.isnative else array.astype(dtype.newbyteorder("="))

    def _read(self, tensor: Tensor) -> NDArray[np.uint8]:
        array = np.empty(tensor.nbytes, np.uint8)
        left = array.data
        self._stream.seek(tensor.start)
        while left:
            count = self._stream.readinto(left[:READ_AT_ONCE])
            if not count:
                raise ValueError("the file was cut short while it was read")
            left = left[count:]
        return array

    # ---- Pickling ----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: object) -> TableFile:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, (str(self.path), self.size, self._hash_of([(0, self.header.data_start)])))

    def reduced(self, table: Table, name: str) -> tuple[Any, ...]:
        """The pickle of a table of this file."""
        return (_table_of_file, (type(table), self, name, self.check(name)))

    def check(self, name: str) -> bytes:
        """A hash of the table's bytes, sampled in a few places."""
        plan = self.plans[name]
        pieces: list[tuple[int, int]] = []
        for tensor in plan.tensors:
            pieces += samples_of(tensor.start, tensor.nbytes)
        return self._hash_of(pieces)

    def _hash_of(self, pieces: list[tuple[int, int]]) -> bytes:
        import hashlib  # takes a millisecond: not for each `import qembag`

        found = hashlib.blake2b(digest_size=16)
        for start, length in pieces:
            found.update(self._memory[start : start + length].data)  # type: ignore[index]
        return found.digest()


def samples_of(start: int, nbytes: int) -> list[tuple[int, int]]:
    """Where some bytes are sampled, and how many in each place: all of them, if they are few."""
    if nbytes <= NUM_SAMPLES * SAMPLE_BYTES:
        return [(start, nbytes)]
    last = nbytes - SAMPLE_BYTES
    return [(start + last * number // (NUM_SAMPLES - 1), SAMPLE_BYTES) for number in range(NUM_SAMPLES)]


def map_file(descriptor: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    """An open file that is not empty, mapped read-only, and an array of its bytes."""
    if sys.version_info >= (3, 13) and os.name != "nt":
        memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ, trackfd=False)
    else:
        # Here mmap keeps a descriptor of its own.
        memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    # This array exports the map's buffer, so that nobody can close the map; an array made by `ndarray` would not.
    return memory, np.frombuffer(memory, np.uint8)


def release_pages(mapped: mmap.mmap | None) -> None:
    """Let the system take back the pages that were read: they stay in its cache, but not in this process's memory."""
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _reopened(path: str, size: int, header_hash: bytes) -> TableFile:
    from pathlib import Path

    file = TableFile(Path(path), mapped=True)
    if file.size != size or file._hash_of([(0, file.header.data_start)]) != header_hash:
        raise ValueError(f"{path}: changed since its tables were pickled")
    return file


def _table_of_file(kind: type[Table], file: TableFile, name: str, check: bytes) -> QuantizedTable | FloatTable:
    if file.check(name) != check:
        raise ValueError(f"{file.path}: table {brief(name)} changed since it was pickled")
    return file.table(name, kind)
