"""Files as `torch.save` writes them, made without torch: archives, pickles, and one of each kind of tables.

A pickle is written from values, and from `Name`, `Call` and `Persistent` for what it names, calls and keeps outside.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

ALIGNMENT = 64


# ---- Archives --------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A record, with what its two headers say, for tests that let them lie."""

    name: bytes
    data: bytes
    central: dict[str, int] = {}  # noqa: RUF012
    local: dict[str, int] = {}  # noqa: RUF012
    extra: bytes = b""


CENTRAL = "version needed flags method time date crc packed size name extra comment disk internal external header"
LOCAL = "needed flags method time date crc packed size name extra"


def packed(layout: str, names: str, values: dict[str, int]) -> bytes:
    return struct.pack("<" + layout, *(values.get(name, 0) for name in names.split()))


def archive_of(
    entries: list[Entry], *, checksums: bool = True, descriptors: bool = True, zip64: bool = True, **end: int
) -> bytes:
    """An archive as torch's, with data at multiples of 64; `end` changes fields of the end records."""
    raw, directory = b"", b""
    for entry in entries:
        header, size = len(raw), len(entry.data)
        crc = zlib.crc32(entry.data) if checksums else 0
        known = {"flags": 0x808, "name": len(entry.name)}
        sizes = {"packed": size, "size": size, "crc": crc}
        padding = -(header + 30 + len(entry.name) + 4) % ALIGNMENT
        own = known | ({} if descriptors else sizes) | {"extra": padding + 4} | entry.local
        raw += b"PK\3\4" + packed("5H3L2H", LOCAL, own) + entry.name
        raw += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding + entry.data
        if descriptors:
            raw += b"PK\7\x08" + struct.pack("<3L", crc, size, size)
        central = known | sizes | {"header": header, "extra": len(entry.extra)} | entry.central
        directory += b"PK\1\2" + packed("6H3L5H2L", CENTRAL, central) + entry.name + entry.extra
    begin, count = len(raw), len(entries)
    names = "disk first here count bytes start comment"
    values = {"here": count, "count": count, "bytes": len(directory), "start": begin} | end
    raw += directory
    if zip64:
        names_64 = "size made needed disk first here count bytes start"
        at = len(raw)
        raw += b"PK\6\6" + packed("Q2H2L4Q", names_64, {"size": 44} | values)
        raw += b"PK\6\7" + packed("LQL", "disk at disks", {"at": at, "disks": 1} | end)
        values = {"here": 0xFFFF, "count": 0xFFFF, "bytes": 0xFFFFFFFF, "start": 0xFFFFFFFF}
    return raw + b"PK\5\6" + packed("4H2LH", names, values)


def entries_of(
    pickle: bytes, storages: dict[str, bytes], *, stem: str = "archive", byteorder: bytes | None = b"little"
) -> list[Entry]:
    """The records of a file, in torch's order."""
    records = {"data.pkl": pickle, ".format_version": b"1", ".storage_alignment": b"64"}
    if byteorder is not None:
        records["byteorder"] = byteorder
    records |= {f"data/{key}": data for key, data in storages.items()}
    records |= {"version": b"3\n", ".data/serialization_id": b"0" * 40}
    return [Entry(f"{stem}/{name}".encode(), data) for name, data in records.items()]


# ---- Pickles ---------------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """A global."""

    module: str
    name: str


class Call(NamedTuple):
    """What a global gives when it is called; the items that are set on it, and its state."""

    function: Any
    arguments: tuple[Any, ...]
    items: dict[Any, Any] | None = None
    state: Any = None


class Persistent(NamedTuple):
    """What a pickle keeps outside."""

    id: Any


def pickled(value: Any, protocol: int = 2) -> bytes:
    """A pickle of those opcodes that torch writes, without the numbers that picklers give to values."""
    return b"\x80" + bytes([protocol]) + coded(value, protocol) + b"."


def coded(value: Any, protocol: int = 2) -> bytes:
    """The opcodes that leave a value on the stack."""
    if type(value) in (dict, list, tuple):
        return coded_container(value, protocol)
    if isinstance(value, Name):
        if protocol < 4:
            return b"c%s\n%s\n" % (value.module.encode(), value.name.encode())
        return coded(value.module, protocol) + coded(value.name, protocol) + b"\x93"
    if isinstance(value, Call):
        made = coded(value.function, protocol) + coded(value.arguments, protocol) + b"R"
        items = coded_container(value.items, protocol)[1:] if value.items else b""
        return made + items + (b"" if value.state is None else coded(value.state, protocol) + b"b")
    if isinstance(value, Persistent):
        return coded(value.id, protocol) + b"Q"
    return coded_plain(value, protocol)


def coded_container(value: Any, protocol: int) -> bytes:
    if isinstance(value, dict):
        pairs = b"".join(coded(key, protocol) + coded(each, protocol) for key, each in value.items())
        return b"}(" + pairs + b"u"
    inside = b"".join(coded(each, protocol) for each in value)
    if isinstance(value, list):
        return b"](" + inside + b"e"
    return inside + b")\x85\x86\x87"[len(value) :][:1] if len(value) < 4 else b"(" + inside + b"t"


def coded_plain(value: Any, protocol: int) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        if -(2**31) <= value < 2**31:
            return b"J" + value.to_bytes(4, "little", signed=True)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    text = value.encode()
    if protocol >= 4 and len(text) < 256:
        return b"\x8c" + bytes([len(text)]) + text
    return b"X" + len(text).to_bytes(4, "little") + text


# ---- What torch's pickles say ----------------------------------------------------------------------------------------

ORDERED = Name("collections", "OrderedDict")
STORAGES = {
    "float32": "Float",
    "float16": "Half",
    "uint8": "Byte",
    "int8": "Char",
    "int64": "Long",
    "float64": "Double",
}


def ordered(items: dict[Any, Any] | None = None, state: Any = None) -> Call:
    return Call(ORDERED, (), items, state)


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


class File:
    """Storages, as tensors of them are named in a pickle."""

    def __init__(self, *, big_endian: bool = False) -> None:
        self.storages: dict[str, bytes] = {}
        self.big_endian = big_endian

    def storage(self, array: np.ndarray, kind: str | None = None) -> Persistent:
        key = str(len(self.storages))
        self.storages[key] = array.astype(array.dtype.newbyteorder(">" if self.big_endian else "<")).tobytes()
        name = f"{kind or STORAGES[array.dtype.name]}Storage"
        return Persistent(("storage", Name("torch", name), key, "cpu", array.size))

    def tensor(self, array: np.ndarray, kind: str | None = None) -> Call:
        return view(self.storage(array, kind), array.shape)

    def qtensor(self, codes: np.ndarray, kind: str, scales: np.ndarray, zeros: np.ndarray, dim: int) -> Call:
        """Quantized per row: codes as they are stored, and the dim in elements."""
        shape = (len(codes), dim)
        parameters = (Name("torch", "per_channel_affine"), self.tensor(scales), self.tensor(zeros), 0)
        place = (self.storage(codes, kind), 0, shape, strides_of(shape))
        return Call(Name("torch._utils", "_rebuild_qtensor"), (*place, parameters, False, ordered()))

    def wrapped(self, module: str, name: str, shape: tuple[int, ...], state: dict[str, Any]) -> Call:
        """A tensor of a class of another library."""
        cls = Name(module, name)
        layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
        device = Call(Name("torch", "device"), ("cpu",))
        arguments = (cls, Name("torch", "float32"), shape, strides_of(shape), 0, layout, device, False)
        rebuild = Name("torch._utils", "_rebuild_wrapper_subclass")
        return Call(Name("torch._tensor", "_rebuild_from_type_v2"), (rebuild, cls, arguments, state))

    def saved(self, value: Any, *, protocol: int = 2, **options: Any) -> bytes:
        """The file."""
        order = b"big" if self.big_endian else b"little"
        return archive_of(entries_of(pickled(value, protocol), self.storages, byteorder=order), **options)


def view(storage: Persistent, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0) -> Call:
    """A tensor within a storage."""
    place = (storage, offset, shape, strides_of(shape) if strides is None else strides)
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (*place, False, ordered()))


def parameter(tensor: Call) -> Call:
    return Call(Name("torch._utils", "_rebuild_parameter"), (tensor, True, ordered()))


def metadata(*names: str) -> dict[str, Any]:
    """The state of a state dict."""
    return {"_metadata": ordered({name: {"version": 1} for name in names})}


def values_of_every_kind(file: File) -> dict[str, Any]:
    """What a file of each kind holds; all use the file's storages."""
    rng = np.random.default_rng(20261127)
    weights = rng.normal(size=(6, 8)).astype(np.float32)
    codes = rng.integers(0, 256, (6, 8), np.uint8)
    scales, zeros = rng.random(6).astype(np.float32), rng.random(6).astype(np.float32)
    halves = np.concatenate([rng.random((6, 2)).astype("<f2").view(np.uint8), codes, np.zeros((6, 4), np.uint8)], 1)
    packed_params = "emb._packed_params."
    shared = file.storage(np.concatenate([halves, halves[::-1]]))
    return {
        "floats": ordered({"emb.weight": file.tensor(weights), "lin.bias": file.tensor(scales)}, metadata("", "emb")),
        "halves": {"emb.weight": parameter(file.tensor(weights.astype(np.float16)))},
        "bfloat16": {"emb.weight": file.tensor((weights.view(np.uint32) >> 16).astype(np.uint16), "BFloat16")},
        "torch.ao, 8 bits": ordered(
            {
                packed_params + "dtype": Name("torch", "quint8"),
                packed_params + "_packed_weight": file.qtensor(codes, "QUInt8", scales, zeros, 8),
            },
            metadata("", "emb", "emb._packed_params"),
        ),
        "torch.ao, 4 bits": ordered(
            {
                packed_params + "dtype": Name("torch", "quint4x2"),
                packed_params + "_packed_weight": file.qtensor(codes[:, :4], "QUInt4x2", scales, zeros, 7),
            }
        ),
        "TorchRec": ordered(
            {
                "embedding_bags.t1.weight": view(shared, (6, 16)),
                "embedding_bags.t2.weight": view(shared, (6, 16), offset=96),
            }
        ),
        "TorchRec, 4 bits": ordered(
            {
                "embedding_bags.t1.weight": file.wrapped(
                    "torchrec.tensor_types", "UInt4Tensor", (6, 32), {"N": 2, "elem": file.tensor(halves)}
                )
            }
        ),
        "TorchRec, split": ordered(
            {
                "embedding_bags.t1.weight": view(file.storage(halves), (6, 8), (16, 1), 4),
                "embedding_bags.t1.weight_qscale": file.tensor(scales[:, None].astype(np.float16)),
                "embedding_bags.t1.weight_qbias": file.tensor(zeros[:, None].astype(np.float16)),
            }
        ),
        "torchao": ordered(
            {
                "emb.weight": file.wrapped(
                    "torchao.quantization",
                    "IntxUnpackedToInt8Tensor",
                    (6, 8),
                    {
                        "qdata": file.tensor((codes % 16).view(np.int8) - np.int8(8)),
                        "scale": file.tensor(scales[:, None]),
                        "zero_point": file.tensor(np.zeros((6, 1), np.int8)),
                        "target_dtype": Name("torch", "int4"),
                        "block_size": (1, 8),
                        "activation_quantization": None,
                    },
                )
            }
        ),
    }


def files_of_every_kind() -> dict[str, bytes]:
    """A file of each kind, and one with all of them in a checkpoint."""
    kinds = list(values_of_every_kind(File()))
    files = {}
    for number, kind in enumerate(kinds):
        file = File()
        value = values_of_every_kind(file)[kind]
        # Storages of other kinds stay in the file, unused, as after a partial edit.
        files[kind] = file.saved(value, protocol=4 if number % 3 == 2 else 2, checksums=number % 4 != 3)
    for big_endian in (False, True):
        file = File(big_endian=big_endian)
        values = values_of_every_kind(file)
        optimizer = {"state": {0: {"step": file.tensor(np.float32([3])), "exp_avg": [None, 1.5]}}, "param_groups": []}
        whole = {"epoch": 3, "models": [values["floats"], values["torch.ao, 4 bits"]], "optimizer": optimizer}
        files[f"a checkpoint, {'big' if big_endian else 'little'}-endian"] = file.saved(whole)
    file = File()
    files["one tensor"] = file.saved(file.tensor(np.arange(12, dtype=np.float32).reshape(3, 4)), descriptors=False)
    return files
