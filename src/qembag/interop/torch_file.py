"""The tables of a file of torch.save: which of its tensors are tables, and what they are called."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from ..formats.safetensors_file import brief
from ..formats.tables import listed
from ..layout import FloatLayout, of_rows
from . import torch_ao, torchao_file, torchrec_file
from .foreign import FLOATS, MAX_REASONS, Foreign, Memory, Refused, Wanted, most_copied, said
from .torch_tensors import Entries, QTensor, Tensor, Wrapped, read_entries

if TYPE_CHECKING:
    from collections.abc import Iterable

# Makes the table of a name, or raises ValueError: "must ...", without the name.
Maker: TypeAlias = Callable[[str, Wanted], Foreign]
# What names a parameter behind its module's name.
SUFFIXES = ("._packed_params._packed_weight", ".weight")


def read(memory: Memory, wanted: Wanted) -> dict[str, Foreign]:
    """The tables of a ``.pt`` file by name, in its order.

    Float tensors with 2 dimensions are tables, as are torch's quantized ones with a scale a row, TorchRec's and
    torchao's. Other tensors of uint8 with 2 dimensions are the rows that ``torch.ops.quantized.embedding_bag_*prepack``
    makes, where `wanted` tells their bits; else they are passed over.

    Raises
    ------
    ValueError
        If the file is damaged or of another kind; if it has no table; if a wanted table is of a kind that qembag cannot
        hold, or if `wanted` must say what the file does not.
    """
    entries = read_entries(memory)
    makers = makers_of(entries, wanted, memory)
    if not makers:
        raise ValueError(f"has no table: {_what_is_there(entries)}")
    names = names_of(makers)
    tables: dict[str, Foreign] = {}
    refused: dict[str, str] = {}
    unsaid: dict[str, torchrec_file.Unsaid] = {}
    for key, make in makers.items():
        name = names[key]
        try:
            table = make(name, wanted)
            # Rows of expanded tensors lie in the same bytes: repacking any number of them would not end.
            if not table.is_mapped and table.nbytes > most_copied(len(memory.bytes)):
                raise ValueError(
                    f"must have rows apart in the file, got {table.num_rows} rows in {len(memory.bytes)} bytes"
                )
            tables[name] = table
        except ValueError as error:
            if wanted.wants(name):
                # Not the error itself, which keeps a kilobyte of frames: there may be tens of thousands.
                refused[name] = str(error)
                if isinstance(error, torchrec_file.Unsaid) and len(refused) <= MAX_REASONS:
                    unsaid[name] = error
    if refused:
        raise Refused(tables, refused, _what_to_give(unsaid))
    return tables


def _what_to_give(unsaid: dict[str, torchrec_file.Unsaid]) -> str:
    """What the caller is to say of tables whose file does not say it; empty if it is nothing of that."""
    examples: dict[str, dict[str, int]] = {"dims": {}, "bits": {}}
    for name, error in unsaid.items():
        for argument, value in {"dims": error.dim, "bits": error.bits}.items():
            if value is not None:
                examples[argument][name.rpartition(".")[2]] = value
    give = ", ".join(f"{argument}={values}" for argument, values in examples.items() if values)
    return f"the file does not say which: give it, such as {give}" if give else ""


def makers_of(entries: Entries, wanted: Wanted, memory: Memory) -> dict[str, Maker]:
    """By key, what makes the table of each tensor that is one."""
    found: dict[str, Maker] = {}
    for key, entry in entries.tensors.items():
        make = _maker(key, entry, entries, wanted, memory)
        if make is not None:
            found[key] = make
    return found


def _maker(key: str, entry: object, entries: Entries, wanted: Wanted, memory: Memory) -> Maker | None:
    if torchrec_file.IGNORED.search(key) or _is_part(key, entries):
        return None
    if isinstance(entry, QTensor):
        if not torch_ao.is_table(key, entry):
            return None
        return lambda name, wanted: torch_ao.table(name, entry, wanted)
    of_torchrec = functools.partial(
        torchrec_file.table, key=key, tensors=entries.tensors, big_endian=entries.big_endian
    )
    if isinstance(entry, Wrapped):
        if entry.cls in torchao_file.CLASSES:
            return lambda name, wanted: torchao_file.table(name, entry, wanted, memory)
        return lambda name, wanted: of_torchrec(name, wanted=wanted)
    if not isinstance(entry, Tensor) or len(entry.shape) != 2 or entry.shape[1] == 0:
        return None
    if entry.dtype in FLOATS:
        return lambda name, wanted: _floats(name, entry, wanted)
    if entry.dtype != "uint8":
        return None
    if torchrec_file.KEY.search(key):
        return lambda name, wanted: of_torchrec(name, wanted=wanted)
    if wanted.bits_of(_short(key)) is None:
        return None
    return lambda name, wanted: _prepacked(name, entry, wanted, entries.big_endian)


def _is_part(key: str, entries: Entries) -> bool:
    """Whether a key is of the scales or biases of a table of TorchRec."""
    return any(
        key.endswith(part) and torchrec_file.KEY.search(whole := key.removesuffix(part)) and whole in entries.tensors
        for part in (torchrec_file.SCALE, torchrec_file.BIAS)
    )


def _floats(name: str, tensor: Tensor, wanted: Wanted) -> Foreign:
    rows = tensor.array()
    said(wanted.dims, wanted.dim_of(name), "dims", (tensor.shape[1],))
    said(wanted.bits, wanted.bits_of(name), "bits", (32 if tensor.dtype == "float32" else 16,))
    if tensor.shape[1] == 1 or tensor.stride[1] == 1:
        return Foreign.as_it_is(name, rows)
    # Such as a transposed tensor, whose rows are columns in the file.
    stored = rows.dtype.newbyteorder("=")
    layout = FloatLayout(tensor.dtype, tensor.shape[1], stored)
    return Foreign.packed(name, len(rows), layout, lambda start, stop: rows[start:stop].astype(stored, order="C"))


def _prepacked(name: str, tensor: Tensor, wanted: Wanted, big_endian: bool) -> Foreign:
    """Rows as torch's prepack operators make them, codes first; or of floats in bytes."""
    rows, bits, dim = torchrec_file.bytes_of(tensor), wanted.bits_of(name), wanted.dim_of(name)
    if big_endian:
        raise ValueError("must come from a little-endian machine: nothing swaps the floats within rows of bytes")
    if bits in torchrec_file.FLOATS:
        element = torchrec_file.FLOATS[bits]
        if dim is None and rows.shape[1] % element.itemsize != 0:
            raise ValueError(f"must have rows of whole floats of {bits} bits, got {rows.shape[1]} bytes")
        return torchrec_file.float_rows(name, rows, dim or rows.shape[1] // element.itemsize, element)
    try:
        layout = of_rows(rows.shape[1], bits or 8, "its tensor", dim=dim)
    except ValueError as error:
        raise ValueError(f"is of uint8, not rows of codes, scale and bias: {error}") from None
    if layout.used_bytes != rows.shape[1]:
        raise ValueError(
            f"must have rows that codes, scale and bias fill, as torch packs them, got {rows.shape[1]} bytes for a dim "
            f"of {dim} at {bits} bits"
        )
    return Foreign.as_it_is(name, rows, layout)


def _what_is_there(entries: Entries) -> str:
    """What the file has in the place of tables, for an error."""
    there = listed(f"{brief(key)} ({torchrec_file.kind_of(entry)})" for key, entry in entries.tensors.items())
    return (
        "no float tensor of 2 dimensions, no quantized one with a scale a row, no rows of TorchRec; "
        f"it has {there or 'no tensor at all'}" + _hint(entries)
    )


def _hint(entries: Entries) -> str:
    kinds = {entry.dtype for entry in entries.tensors.values() if isinstance(entry, Tensor) and len(entry.shape) == 2}
    if "uint8" in kinds:
        return "; rows of torch's prepack operators need bits="
    return "; save tensor.float() for float64" if "float64" in kinds else ""


# ---- Names -----------------------------------------------------------------------------------------------------------


def _short(key: str) -> str:
    for suffix in SUFFIXES:
        if key.endswith(suffix) and key != suffix:
            return key.removesuffix(suffix)
    return key


def names_of(keys: Iterable[str]) -> dict[str, str]:
    """The name of each key's table: less the suffix that names a parameter, where that tells tables apart."""
    names = {key: _short(key) for key in keys}
    while len(names) > len(set(names.values())):
        times = Counter(names.values())
        names = {key: name if times[name] == 1 else key for key, name in names.items()}
    return names
