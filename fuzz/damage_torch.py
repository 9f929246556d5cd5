"""Damage to files of torch.save: bytes, the archive's numbers, the pickle's opcodes, and what a pickle says."""

from __future__ import annotations

import contextlib
import itertools
import pickletools
import random
import struct
from typing import Any

import file_damage
from support.torch_files import Entry, Name, archive_of, coded

# ---- Archives --------------------------------------------------------------------------------------------------------


def records_of(raw: bytes) -> list[Entry]:
    """The records of an undamaged file that `support.torch_files` wrote."""
    count, _, at = struct.unpack("<H2L", raw[-12:-2])
    if at == 0xFFFFFFFF:
        count, _, at = struct.unpack("<3Q", raw[-66:-42])
    found = []
    for _ in range(count):
        size, name, extra = struct.unpack("<L2H", raw[at + 24 : at + 32])
        header = int.from_bytes(raw[at + 42 : at + 46], "little")
        begin = header + 30 + name + int.from_bytes(raw[header + 28 : header + 30], "little")
        found.append(Entry(raw[at + 46 : at + 46 + name], raw[begin : begin + size]))
        at += 46 + name + extra
    return found


def odd_number(rng: random.Random, bits: int) -> int:
    some = [0, 1, 2, 3, 30, 46, 63, 64, 65, 100, 1000, 4096, 2**15, 2**16 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**63]
    return rng.choice([*some, 2**64 - 1, rng.randrange(6000), rng.getrandbits(bits)]) % 2**bits


def lie(entries: list[Entry], rng: random.Random) -> bytes:
    """An archive with a field of a header or of the end changed, or with other records."""
    kind, place = rng.randrange(8), rng.randrange(len(entries))
    entry, end = entries[place], {}
    if kind < 3:
        name = rng.choice(["flags", "method", "packed", "size", "name", "extra", "comment", "disk", "header", "crc"])
        wide = {name: odd_number(rng, 32 if name in ("packed", "size", "header", "crc") else 16)}
        if kind == 0 and name in ("flags", "method", "packed", "size", "name", "extra", "crc"):
            entry = entry._replace(local=wide)
        elif name in ("packed", "size") and rng.random() < 0.5:
            entry = entry._replace(central={"packed": wide[name], "size": wide[name]})
        else:
            entry = entry._replace(central=wide)
    elif kind == 3:
        name = rng.choice(["disk", "first", "here", "count", "bytes", "start", "comment", "at", "disks"])
        end = {name: odd_number(rng, 32 if name in ("bytes", "start", "at", "disks") else 16)}
    elif kind == 4:
        fields = b"".join(odd_number(rng, 64).to_bytes(8, "little") for _ in range(rng.randrange(4)))
        extra = rng.choice([b"", b"\1\0", b"FB\1\0Z"]) + b"\1\0" + bytes([rng.choice([len(fields), 8, 24, 255]), 0])
        full = {name: 2**32 - 1 for name in ("size", "packed", "header") if rng.random() < 0.6}
        entry = entry._replace(extra=extra + fields, central=full)
    elif kind == 5:
        names = [other.name for other in entries] + [
            b"",
            b"/",
            b"archive/code/a.py",
            b"\xff",
            b"a/../data.pkl",
            b"x" * 70_000,
        ]
        entry = entry._replace(name=rng.choice(names)[: 2**16 - 1])
    elif kind == 6:
        others = [b"", b"big", b"little", b"2", entry.data[:-1], entry.data + b"\0", rng.choice(entries).data]
        entry = entry._replace(data=rng.choice(others))
    else:
        entries = entries.copy()
        rng.choice([lambda: entries.pop(place), lambda: entries.insert(place, rng.choice(entries))])()
        rng.shuffle(entries)
        return archive_of(entries, zip64=rng.random() < 0.5)
    try:
        return archive_of([*entries[:place], entry, *entries[place + 1 :]], zip64=rng.random() < 0.5, **end)
    except struct.error:
        return archive_of(entries)


# ---- Pickles ---------------------------------------------------------------------------------------------------------

GLOBALS = [
    ("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("__builtin__", "dict"),
    ("subprocess", "Popen"), ("torch", "load"), ("torch.hub", "load"), ("torch", "FloatStorage"), ("torch", "Size"),
    ("torch", "HalfStorage"), ("torch", "ByteStorage"), ("torch", "QUInt4x2Storage"), ("torch", "QUInt8Storage"),
    ("torch.storage", "UntypedStorage"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch._utils", "_rebuild_wrapper_subclass"), ("torch", "float32"),
    ("torchrec.tensor_types", "UInt2Tensor"), ("torchao.quantization", "IntxUnpackedToInt8Tensor"), ("torch", "int4"),
    ("torch", "per_tensor_affine"), ("torch", "per_channel_affine"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("collections", "defaultdict"), ("collections", "Counter"), ("numpy", "dtype"), ("torch", "Tensor"), ("this", "s"),
]  # fmt: skip
NUMBERS = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 100, 255, 256, 1000, 65535, 65536, 2**31 - 1, 2**31, 2**32,
    2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**100, 2**2000, -1, -6, -(2**31), -(2**63),
]  # fmt: skip


def odd_value(rng: random.Random) -> bytes:
    """The opcodes of a value."""
    number = rng.choice(NUMBERS)
    values: list[Any] = [
        number,
        number,
        number,
        None,
        True,
        False,
        0.5,
        float("nan"),
        "",
        "0",
        "1",
        "storage",
        "x" * 3000,
    ]
    values += [(), [], {}, (number,), (number, 1), (6, number), (number, number), ("a", (1,)), [[]], {"a": number}]
    return coded(rng.choice([*values, *(Name(*rng.choice(GLOBALS)) for _ in range(8))]), rng.choice([2, 4]))


def doubled(rng: random.Random) -> bytes:
    """One value: deep, and perhaps of twice as many each time."""
    times = rng.choice([10, 40, 90, 1000])
    return rng.choice([b")q\0" + b"h\0\x86q\0" * times, b"](" + b"](" * times + b"e" * times + b"e"])


def bomb(rng: random.Random) -> bytes:
    """Opcodes that build much of little."""
    if rng.random() < 0.3:
        return doubled(rng)
    times = rng.choice([3, 100, 10_000])
    pieces = [
        b"]",
        b"}",
        b"(",
        b"N",
        b"\x85",
        b"h\0",
        b"h\1",
        b"\x94",
        b")",
        b"h\0h\0\x86q\0",
        b"](h\0h\0eq\0",
        b"h\0a",
    ]
    pieces += [b"0", b"2", b"1", b"h\3h\4R", b"}q\1h\1s", b")R", b"}b", b"Q", b"\x8a\xff" + b"\x7f" * 255]
    return rng.choice(pieces) * times


def spoil_codes(codes: bytes, rng: random.Random) -> bytes:
    """Opcodes dropped, doubled, exchanged, or with another argument or another opcode in their place."""
    if rng.random() < 0.03:
        # The whole value, and another beside it.
        return codes[:-1] + doubled(rng) + b"\x86."
    try:
        places = [at for _, _, at in pickletools.genops(codes)] + [len(codes)]
    except ValueError:
        return file_damage.flip(codes or b"N", rng)
    ops = [codes[begin:end] for begin, end in itertools.pairwise(places)]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if len(ops) < 2:
            break
        place, kind = rng.randrange(1, len(ops)), rng.randrange(8)
        if kind == 0:
            ops.pop(place)
        elif kind == 1:
            ops.insert(place, ops[rng.randrange(len(ops))])
        elif kind == 2:
            other = rng.randrange(1, len(ops))
            ops[place], ops[other] = ops[other], ops[place]
        elif kind in (3, 4):
            # A value in the place of a value.
            plain = [at for at, op in enumerate(ops) if op[:1] in b"JKM\x8aX\x8cNGc\x88\x89)"]
            ops[rng.choice(plain or [place])] = odd_value(rng)
        elif kind == 5:
            ops[place] = bytes([rng.randrange(256)]) + ops[place][1:]
        elif kind == 6:
            ops.insert(place, bomb(rng) if rng.random() < 0.5 else odd_value(rng))
        else:
            ops[place] = file_damage.flip(ops[place] or b"N", rng)
    return b"".join(ops)


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """The file with one or several damages."""
    for _ in range(rng.choice([1, 1, 1, 2])):
        kind = rng.random()
        entries = []
        with contextlib.suppress(struct.error, IndexError):
            entries = records_of(raw)  # unless there is damage already
        if kind < 0.55 and entries:
            pickles = [place for place, entry in enumerate(entries) if entry.name.endswith(b"data.pkl")] or [0]
            entry = entries[pickles[0]]
            entries[pickles[0]] = entry._replace(data=spoil_codes(entry.data, rng))
            raw = archive_of(entries, checksums=rng.random() < 0.5, zip64=rng.random() < 0.7)
        elif kind < 0.8 and entries:
            raw = lie(entries, rng)
        elif raw:
            change = rng.choice([file_damage.flip, file_damage.cut, file_damage.extend, file_damage.move])
            raw = change(raw, rng)
    return raw
