"""GGUF files, through the package `gguf`: Q8_0, Q4_0, Q4_1 and floats. Blocks of 32 elements become groups of 32.

The package reads what the file says of tensors. Two things it is not trusted with: reading beyond the file, which it
does not notice, and lists in the metadata, of which it makes three Python objects an element (a vocabulary of 150,000
takes it 600 MB and 8 seconds). They are stepped over here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from .. import _arguments
from ..formats.safetensors_file import brief
from ..layout import RowLayout
from .foreign import Foreign, Memory, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from numpy.typing import NDArray

BLOCK = 32
LARGEST_HALF = 65504.0
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# The package makes some 2 KB of Python objects for each; models have about a thousand tensors and fifty keys.
MAX_ENTRIES = 8192
# The main table: a file is refused if it is of a type that does not fit, not silently left without it.
MAIN = "token_embd.weight"
SUFFIX = ".weight"
# Blocks whose scales are looked at before the system may take their pages back.
SCALES_AT_ONCE = 1 << 20


class Blocks(NamedTuple):
    """How a type of the format stores 32 elements."""

    bits: int
    parts: np.dtype[Any]
    # What to take from a code before it is multiplied by the scale; None where a block has a bias.
    zero: int | None


def _blocks(bits: int, zero: int | None) -> Blocks:
    halves = [("d", "<f2")] if zero is not None else [("d", "<f2"), ("m", "<f2")]
    return Blocks(bits, np.dtype([*halves, ("q", "u1", (BLOCK if bits == 8 else BLOCK // 2,))]), zero)


TYPES = {"Q8_0": _blocks(8, 128), "Q4_0": _blocks(4, 8), "Q4_1": _blocks(4, None)}


class Entry(NamedTuple):
    """A tensor of 2 dimensions."""

    key: str
    kind: str
    num_rows: int
    dim: int
    start: int
    nbytes: int


def read(memory: Memory, wanted: Wanted) -> dict[str, Foreign]:
    """The tables of a GGUF file.

    Raises
    ------
    ValueError
        Without the path: if the file is damaged or big-endian, or if a table that is asked for, or the main one, is of
        a type that does not fit.
    ImportError
        If the package is not installed.
    """
    entries = _entries(memory)
    keys = {entry.key for entry in entries}
    tables, others = {}, {}
    for entry in entries:
        short = entry.key.removesuffix(SUFFIX)
        name = short if short and short not in keys else entry.key
        if not wanted.wants(name):
            continue
        if entry.kind in FLOATS or entry.kind in TYPES:
            tables[name] = _table(memory, name, entry)
        elif wanted.names is not None or entry.key == MAIN:
            raise ValueError(
                f"tensor {brief(entry.key)} must be {', '.join([*TYPES, *FLOATS])}, whose scales fit a table's, "
                f"got {entry.kind}"
            )
        else:
            others[entry.key] = entry.kind
    if not tables and wanted.names is None:
        raise ValueError(
            f"must have 2-D tensors of {', '.join([*TYPES, *FLOATS])}, got {brief(others) if others else 'none'}"
        )
    return tables


def _table(memory: Memory, name: str, entry: Entry) -> Foreign:
    raw = memory.bytes[entry.start : entry.start + entry.nbytes]
    if entry.kind in FLOATS:
        return Foreign.as_it_is(name, raw.view(FLOATS[entry.kind]).reshape(entry.num_rows, entry.dim))
    bits, parts, zero = TYPES[entry.kind]
    blocks = raw.view(parts).reshape(entry.num_rows, entry.dim // BLOCK)
    largest = 0.0 if zero is None else _largest_scale(memory, name, blocks["d"].reshape(-1))
    # The bias is the scale times a power of 2: a half holds it unless it is too large.
    halves = zero is None or largest * zero <= LARGEST_HALF
    layout = RowLayout(bits, entry.dim, scale_dtype="float16" if halves else "float32", group_size=BLOCK)

    def pack(start: int, stop: int) -> NDArray[np.uint8]:
        some = blocks[start:stop]
        scales = some["d"].astype(np.float32)
        # NaN where the scale is one.
        biases = some["m"].astype(np.float32) if zero is None else _arguments.quietly(np.multiply, scales, -zero)
        pairs = np.stack([scales, biases], axis=2)
        return layout.pack(_codes(some["q"], bits).reshape(len(some), entry.dim), pairs)

    return Foreign.packed(name, entry.num_rows, layout, pack)


def _codes(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return stored ^ np.uint8(128)  # from int8
    # Low nibbles are the elements 0 to 15 of a block, high ones 16 to 31.
    return np.concatenate([stored & np.uint8(15), stored >> np.uint8(4)], axis=2)


def _largest_scale(memory: Memory, name: str, scales: NDArray[np.float16]) -> float:
    """The largest magnitude. Raises ValueError if it is infinite: then values are infinities of both signs, which no
    scale and bias give."""
    found = 0.0
    for start in range(0, len(scales), SCALES_AT_ONCE):
        # As bits without the sign, which are in the order of the values; NaN comes after infinity.
        bits = scales[start : start + SCALES_AT_ONCE].astype(np.float16).view(np.uint16) & np.uint16(0x7FFF)
        if (bits == np.uint16(0x7C00)).any():
            raise ValueError(f"table {brief(name)} has a block with an infinite scale")
        numbers = bits[bits < np.uint16(0x7C00)]
        found = max(found, float(numbers.max().view(np.float16))) if numbers.size else found
        memory.release()
    return found


# ---- The file --------------------------------------------------------------------------------------------------------


def _entries(memory: Memory) -> list[Entry]:
    """The tensors of 2 dimensions, in the order of the file; none overlap."""
    # Below the magic number the version, small in the writer's byte order.
    if memory.bytes[4:6].any() == memory.bytes[6:8].any():
        raise ValueError("is not a GGUF file: it has no version")
    if memory.bytes[6:8].any():
        raise ValueError("must be little-endian, got a big-endian GGUF file")
    package = _package()
    try:
        # Its arithmetic with NumPy's numbers would warn of those that overflow.
        reader = _arguments.quietly(_reader_of(package, memory.bytes.data), memory.path)
    except (OSError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 (of a damaged file it raises whatever comes)
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"is not a readable GGUF file: {kind}{str(error)[:200]}") from None
    size, entries = len(memory.bytes), []
    end = int(reader.data_offset)
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        # Counted again: the package multiplies in 64 bits.
        shape, kind = [int(length) for length in tensor.shape], tensor.tensor_type
        block, block_bytes = package.GGML_QUANT_SIZES[kind]
        num_rows = 1
        for length in shape[1:]:
            num_rows *= length
        nbytes, rest = divmod((shape[0] if shape else 1) * num_rows * block_bytes, block)
        start = int(tensor.data_offset)
        if rest or start < end or start + nbytes > size:
            raise ValueError(f"tensor {brief(tensor.name)} overlaps another, or is not within the file")
        end = start + nbytes
        if len(shape) == 2 and shape[0] and shape[0] % block == 0:
            entries.append(Entry(tensor.name, kind.name, num_rows, shape[0], start, nbytes))
    return entries


def _package() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install 'qembag[gguf]'") from None


def _reader_of(package: ModuleType, raw: memoryview) -> Callable[[Path], Any]:
    """The package's reader, which stays within the file, steps over lists of metadata, and makes few objects."""
    header = _Header(raw)
    base: Any = package.GGUFReader

    class _Reader(base):  # type: ignore[misc]
        def _get(self, offset: Any, dtype: Any, count: Any = 1, *more: Any, **others: Any) -> Any:
            header.check(int(offset), np.dtype(dtype).itemsize * int(count))
            return super()._get(offset, dtype, count, *more, **others)

        def _build_fields(self, offset: Any, count: Any) -> Any:
            for _ in range(_few(count, "keys")):
                end = header.end(int(offset))
                offset = super()._build_fields(offset, 1) if end is None else end
            return offset

        def _build_tensor_info(self, offset: Any, count: Any) -> Any:
            fields: list[Any] = []
            for _ in range(_few(count, "tensors")):
                header.check_tensor(int(offset))
                offset, found = super()._build_tensor_info(offset, 1)
                fields += found
            return offset, fields

    return _Reader


def _few(count: Any, what: str) -> int:
    if count > MAX_ENTRIES:
        raise ValueError(f"it says that it has {count} {what}: at most {MAX_ENTRIES} are read")
    return int(count)


class _Header:
    """The header's numbers, read within the file."""

    LIST, TEXT = 9, 8
    # Bytes of a value by its type.
    SIZES: ClassVar[dict[int, int]] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    MAX_NAME, MAX_RANK = 65535, 4

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw

    def check(self, start: int, nbytes: int) -> int:
        """The end. Raises ValueError if it is not within the file."""
        end = start + nbytes
        if end > len(self._raw):
            raise ValueError(f"it is cut short: byte {end} of {len(self._raw)} is needed")
        return end

    def _number(self, start: int, nbytes: int) -> int:
        return int.from_bytes(self._raw[start : self.check(start, nbytes)], "little")

    def _after_name(self, start: int) -> int:
        length = self._number(start, 8)
        if length > self.MAX_NAME:
            raise ValueError(f"it has a name of {length} bytes: at most {self.MAX_NAME} are allowed")
        return self.check(start + 8, length)

    def end(self, start: int) -> int | None:
        """Where the key that begins here ends with its value, if that is a list; else None."""
        start = self._after_name(start)
        if self._number(start, 4) != self.LIST:
            return None
        kind, count = self._number(start + 4, 4), self._number(start + 8, 8)
        start += 16
        if kind in self.SIZES:
            return self.check(start, count * self.SIZES[kind])
        if kind != self.TEXT:
            raise ValueError(f"it has a list of type {kind}: must be of numbers or texts")
        # Most of the time goes here: a vocabulary, and its merges.
        number, check = self._number, self.check
        for _ in range(count):
            start = check(start + 8, number(start, 8))
        return start

    def check_tensor(self, start: int) -> None:
        """Raises ValueError if the tensor described here has a name or a rank beyond the format's."""
        rank = self._number(self._after_name(start), 4)
        if rank > self.MAX_RANK:
            raise ValueError(f"it has a tensor of {rank} dimensions: at most {self.MAX_RANK} are allowed")
