"""The header of a safetensors file, and the index of several files, read without trusting them.

No number in a file is trusted: allocations depend on what was read, and arithmetic uses Python's unbounded integers.
A file is refused for everything that the format's README forbids, even if the official library accepts it (for example,
it takes the last of two equal names).
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

from .._errors import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import BinaryIO

# The limit of the format.
MAX_HEADER = 100_000_000
# NumPy's limit. The format has none, but no library that writes it has arrays of more dimensions.
MAX_RANK = 64
MAX_NUMBER = 2**63 - 1
# What a list, an object and an item of them take at least when JSON is read; and how much of that any file may have,
# beside its own size. A tensor takes about 500 bytes by this count: 60,000 of no elements are allowed.
LIST_BYTES, OBJECT_BYTES, ITEM_BYTES = 64, 184, 40
FREE_BYTES = 32 << 20
ALIGNMENT = 64
LENGTH_BYTES = 8

# Bits of an element.
DTYPES = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8"], 8),
    **dict.fromkeys(["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
}
ENTRY = {"dtype", "shape", "data_offsets"}


class Tensor(NamedTuple):
    """Where a tensor lies; `start` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Header(NamedTuple):
    """What a file holds: tensors in the order of their data."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    data_start: int


# Shows any value from a file in an error message, in bounded memory and depth.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100
brief = _repr.repr


class _Fault(ValueError):
    """What is wrong with a JSON text."""


# ---- JSON ------------------------------------------------------------------------------------------------------------


def read_json(text: str | bytes, *, only_whole_numbers: bool = True) -> Any:
    """The value of a JSON text.

    Raises
    ------
    ValueError
        If it is not JSON or not UTF-8, has a name twice, nests too deeply, or has lone surrogates; and, if
        `only_whole_numbers`, if it has a number other than a whole one from 0 to 2**63 - 1.
    """
    kinds: dict[str, Any] = {"parse_int": _whole_number, "parse_float": _no_number} if only_whole_numbers else {}
    try:
        whole = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(whole, object_pairs_hook=_unique, parse_constant=_no_number, **kinds)
        if "\\u" in whole:
            # Lone surrogates cannot be in UTF-8, only in escapes.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _Fault:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate in a text") from None
    except RecursionError:
        raise ValueError("nests too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Fault(f"has the name {brief(name)} twice")
            seen.add(name)
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > 19 or digits[0] == "-" or (number := int(digits)) > MAX_NUMBER:
        _no_number(digits)
    return number


def _no_number(text: str) -> NoReturn:
    raise _Fault(f"has the number {text[:40]}: must be a whole number from 0 to 2**63 - 1")


# ---- The header ------------------------------------------------------------------------------------------------------


def read_header(file: BinaryIO, path: Path) -> Header:
    """The header of a safetensors file, from its beginning.

    Raises
    ------
    ValueError
        Begins with `path`: if the file is not in the format, or its data is incomplete.
    """
    try:
        return header_of(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def header_of(file: IO[bytes]) -> Header:
    """As `read_header`, with errors that do not name the file."""
    size = file.seek(0, 2)
    file.seek(0)
    beginning = file.read(LENGTH_BYTES)
    if len(beginning) < LENGTH_BYTES:
        raise ValueError(f"is too short for a safetensors file, which begins with 8 bytes of a length: {size} bytes")
    length = int.from_bytes(beginning, "little")
    if length > MAX_HEADER:
        raise ValueError(f"is no safetensors file, or has a header of {length} bytes: at most {MAX_HEADER} are allowed")
    if length > size - LENGTH_BYTES:
        raise ValueError(f"is cut short: the header takes {length} bytes of {size}, after the first 8")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("was cut short while it was read")
    if text[:1] != b"{":
        raise ValueError(f"is no safetensors file: the header must begin with '{{', got {text[:1]!r}")
    try:
        check_memory(text, size)
        header = read_json(text)
    except ValueError as error:
        raise ValueError(f"the header {error}") from None
    metadata = texts(header.pop("__metadata__", {}), "__metadata__")
    start = LENGTH_BYTES + length
    tensors = [_tensor(name, entry, start) for name, entry in header.items()]
    return Header(_in_order(tensors, start, size), metadata, start)


def check_memory(text: bytes, size: int) -> None:
    """Raise ValueError if JSON, read from a file of this size, would take much more memory than the file."""
    needed = LIST_BYTES * text.count(b"[") + OBJECT_BYTES * text.count(b"{") + ITEM_BYTES * text.count(b",")
    if needed > size + FREE_BYTES:
        raise ValueError(f"would take {needed} bytes of memory, in a file of {size} bytes")


def texts(value: Any, name: str) -> dict[str, str]:
    """A JSON object of strings."""
    if type(value) is not dict:
        raise ValueError(f"{name} must be an object of strings, got {brief(value)}")
    for key, text in value.items():
        if type(text) is not str:
            raise ValueError(f"{name} must have strings only, got {brief(text)} for {brief(key)}")
    return value


def _tensor(name: str, entry: Any, data_start: int) -> Tensor:
    if type(entry) is not dict or entry.keys() != ENTRY:
        raise ValueError(f"tensor {brief(name)} must have dtype, shape and data_offsets, got {brief(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"tensor {brief(name)} has an unknown dtype: {brief(dtype)}")
    if not _are_numbers(shape) or len(shape) > MAX_RANK:
        raise ValueError(
            f"tensor {brief(name)} must have a shape of at most {MAX_RANK} whole numbers, got {brief(shape)}"
        )
    if not _are_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {brief(name)} must have data_offsets of two whole numbers, got {brief(offsets)}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype]
    if needed % 8:
        raise ValueError(f"tensor {brief(name)} ends within a byte: {brief(shape)} of {dtype} are {shown(needed)} bits")
    if needed // 8 != end - begin:
        raise ValueError(
            f"tensor {brief(name)} has data_offsets of {end - begin} bytes, and takes {shown(needed // 8)}: "
            f"{brief(shape)} of {dtype}"
        )
    return Tensor(name, dtype, tuple(shape), data_start + begin, end - begin)


def _are_numbers(value: Any) -> bool:
    # For Python True is an int; in the format it is not a number.
    return type(value) is list and all(type(number) is int for number in value)


def _in_order(tensors: list[Tensor], start: int, size: int) -> dict[str, Tensor]:
    """The tensors by position. Raises ValueError unless they fill the file from `start` on without gap or overlap."""
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    last = None
    end = start
    for tensor in tensors:
        if tensor.start != end:
            what = "leaves a gap after" if tensor.start > end else "overlaps"
            before = "the header" if last is None else f"tensor {brief(last)}, which ends at {end - start}"
            raise ValueError(f"tensor {brief(tensor.name)} {what} {before}: it begins at {tensor.start - start}")
        last, end = tensor.name, tensor.start + tensor.nbytes
    if end != size:
        what = "is cut short" if end > size else "goes on after its tensors"
        raise ValueError(f"{what}: header and tensors take {end} bytes, the file has {size}")
    return {tensor.name: tensor for tensor in tensors}


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], size: int = 0
) -> bytes:
    """A header for tensors, given as (name, dtype, shape), whose data follow one another in this order.

    It is padded with spaces, so that the data begins at a multiple of 64, and not before `size`.

    Raises
    ------
    ValueError
        If the header would be longer than the format allows.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPES[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    length = max(LENGTH_BYTES + len(text), size)
    length += -length % ALIGNMENT - LENGTH_BYTES
    if length > MAX_HEADER:
        raise ValueError(f"tables must have a header of at most {MAX_HEADER} bytes, got one of {length}")
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)


# ---- The index of several files --------------------------------------------------------------------------------------


def read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor that an `*.index.json` names. The files are beside it or in folders below.

    Raises
    ------
    ValueError
        Begins with `path`: if the file is not an index, or names files outside its folder.
    """
    return read_whole_index(path)[0]


def read_whole_index(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """As `read_index`, and the strings in the metadata of the index."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        # `read` allocates the size that it is asked for, not the size that is there.
        text = file.read(min(size, MAX_HEADER))
    try:
        if size > MAX_HEADER:
            raise ValueError(f"is longer than {MAX_HEADER} bytes")
        check_memory(text, size)
        index = read_json(text, only_whole_numbers=False)
        if type(index) is not dict or "weight_map" not in index:
            raise ValueError("is no index: it must be an object with a weight_map")
        names = texts(index["weight_map"], "weight_map")
        metadata = index.get("metadata", {})
        if type(metadata) is not dict:
            raise ValueError(f"metadata must be an object, got {brief(metadata)}")
        folder = path.parent
        if path.is_symlink() and not all(os.path.lexists(folder.joinpath(name)) for name in names.values()):
            # A link to an index that stands beside its files elsewhere. In Hugging Face's cache they are all links.
            folder = path.resolve().parent
        files = {name: inside(folder, name) for name in set(names.values())}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # Other values are numbers, such as total_size.
    kept = {key: value for key, value in metadata.items() if type(value) is str}
    return {name: files[file] for name, file in names.items()}, kept


def inside(folder: Path, name: str) -> Path:
    """The path of that file. Raises ValueError unless it lies in the folder."""
    parts = name.split("/")
    # On Windows a backslash separates folders; a colon names a drive, or a stream of a file.
    if any(part in ("", ".", "..") for part in parts) or any(character in name for character in "\\:\0"):
        raise ValueError(f"must name files in its own folder, got {brief(name)}")
    path = folder.joinpath(*parts)
    try:
        target, real = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):
        raise ValueError(f"must name files in its own folder, got {brief(name)}, a loop of links") from None
    # In the cache of Hugging Face, `snapshots/REVISION` has links to `blobs`.
    blobs = [real.parent.parent / "blobs"] if real.parent.name == "snapshots" else []
    if not any(target.is_relative_to(root) for root in [real, *blobs]):
        raise ValueError(f"must name files in its own folder, got {brief(name)}, a link to {target}")
    return path
