"""Damage to files of tables: bytes, lengths, texts of JSON, what they say, and what an index names."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

INDEX = "model.safetensors.index.json"
# The files of a model by name; the first is the one to open.
Files = dict[str, bytes]


def split(raw: bytes) -> tuple[bytes, bytes]:
    """The text of the header, and the data."""
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def with_text(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def with_header(header: Any, data: bytes) -> bytes:
    return with_text(json.dumps(header, separators=(",", ":")).encode(), data)


# ---- Of any file ------------------------------------------------------------------------------------------------------


def flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    # The header more often than the data.
    end = min(rng.choice([8, 600, len(raw)]), len(raw))
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.choice([rng.randrange(len(raw)), rng.randrange(20), len(raw) - 1])]


def extend(raw: bytes, rng: random.Random) -> bytes:
    return raw + rng.choice([b"\0", b" ", rng.randbytes(rng.randrange(1, 100)), raw])


def move(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes doubled, left out, or set elsewhere."""
    begin, other = sorted((rng.randrange(len(raw)), rng.randrange(len(raw))))
    end = min(begin + rng.choice([1, 8, 64, 500]), len(raw))
    piece = rng.choice(
        [b"", raw[begin:end] * 2, rng.randbytes(end - begin), bytes(end - begin), b"\xff" * (end - begin)]
    )
    raw = raw[:begin] + piece + raw[end:]
    return raw[:other] + raw[begin:end] + raw[other:] if rng.random() < 0.2 else raw


def lie_about_length(raw: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    others = [0, 1, 2, length - 1, length + 1, length + 8, len(raw), len(raw) - 8, len(raw) - 7, 10**8, 10**8 + 1]
    others += [2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 8, rng.randrange(2**64), rng.randrange(len(raw))]
    return max(rng.choice(others), 0).to_bytes(8, "little") + raw[8:]


def digits(rng: random.Random) -> bytes:
    return rng.choice(
        [b"1" * rng.randrange(1, 6000), b"9" * 20, b"1e9", b"0.5", b"-1", b"-0", b"1E400", b"NaN", b"01", b"true"]
    )


def spoil_text(raw: bytes, rng: random.Random) -> bytes:
    """What a text of JSON can be spoilt with."""
    text, data = split(raw)
    place = rng.randrange(len(text) + 1)
    kind = rng.randrange(9)
    if kind == 0:
        depth = rng.choice([3, 100, 1000, 100_000])
        text = text[:place] + rng.choice([b"[", b'{"a":', b"[[],"]) * depth + text[place:]
    elif kind == 1:
        text = (
            text[:place]
            + rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"\n"])
            + text[place:]
        )
    elif kind == 2:
        text = (
            text[:place]
            + rng.choice([b"\\ud800", b"\\u0000", b"\\", b'"', b",", b"}", b"{", b":", b"/*"])
            + text[place:]
        )
    elif kind == 3:
        places = [number for number, byte in enumerate(text) if chr(byte).isdigit()]
        place = rng.choice(places or [0])
        text = text[:place] + digits(rng) + text[place + 1 :]
    elif kind == 4:
        text += rng.choice([b" ", b"\n\t\r", b"\0", b"x", b"{}", b" " * 70])
    elif kind == 5:
        text = rng.choice([b" ", b"\n", b"[", b"\xef\xbb\xbf"]) + text
    elif kind == 6:
        # A name twice, once more with an escape.
        name = rng.choice(
            [b'"__metadata__":{}', b'"table.rows":{}', b'"\\u005f_metadata__":{"a":"b"}', text[1:-1].strip()]
        )
        text = b"{" + name + b"," + text[1:]
    elif kind == 7:
        text = text.replace(
            b'"qembag.tables":"{', b'"qembag.tables":"{' + rng.choice([b"[" * 9000, b'\\"table\\":1,', b" "])
        )
    else:
        text = text.replace(
            rng.choice([b"U8", b"F32", b"I32", b"F16", b"BF16"]),
            rng.choice([b"U8", b"F4", b"I64", b"X", b"BOOL", b"F32"]),
            1,
        )
    return with_text(text, data)


def odd_value(rng: random.Random, old: Any) -> Any:
    """In the place of a value of JSON."""
    number = old if type(old) is int else 1
    return rng.choice(
        [
            0, 1, -1, number + 1, number - 1, number * 2, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30,
            0.0, 1.5, True, False, None, "", "1", "U8", "F32", "BF16", "I32", "F4", "float64", "2", "x" * 5000, [], {},
            [old], {"a": old}, [0, 0], [2**32, 2**32], [1] * 70, "é", "table", "float32", 8, 4, 2, 16, 32, 17,
        ]
    )  # fmt: skip


def edit(value: Any, rng: random.Random) -> None:
    """One place of a tree of JSON is changed."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and rng.random() < 0.85:
            value = value[key]
            continue
        kind = rng.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.3:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
        elif kind < 0.4 and isinstance(value, dict):
            value[rng.choice(["", "new", "table", "table.rows", "__metadata__", "qembag.version", f"{key}.rows"])] = (
                value[key]
            )
        else:
            value[key] = odd_value(rng, value[key])
        return


def edit_header(raw: bytes, rng: random.Random) -> bytes:
    text, data = split(raw)
    header = json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
        edit(header, rng)
    return with_header(header, data)


def edit_tables(raw: bytes, rng: random.Random) -> bytes:
    """The description of tables, or the rest of the metadata."""
    text, data = split(raw)
    header = json.loads(text)
    metadata = header.get("__metadata__", {})
    if "qembag.tables" not in metadata or rng.random() < 0.15:
        version = rng.choice(["0", "2", "1.0", "", "10" * 3000, "²", "one"])
        header["__metadata__"] = metadata | rng.choice(
            [{"qembag.version": version}, {"qembag.tables": "{}"}, {"qembag.x": ""}]
        )
        return with_header(header, data)
    tables = json.loads(metadata["qembag.tables"])
    edit(tables, rng)
    metadata["qembag.tables"] = json.dumps(tables)
    return with_header(header, data)


def edit_mapping(raw: bytes, rng: random.Random) -> bytes:
    """Numbers of rows that are not there."""
    text, data = split(raw)
    changed = bytearray(data)
    for entry in json.loads(text).values():
        if entry.get("dtype") == "I32" and entry["data_offsets"][1]:
            place = rng.randrange(*entry["data_offsets"])
            value = rng.choice([-2, -1, 0, 4, 5, 100, 2**31 - 1, -(2**31)])
            changed[place : place + 4] = value.to_bytes(4, "little", signed=True)
    return with_text(text, bytes(changed[: len(data)]))


def move_tensors(raw: bytes, rng: random.Random) -> bytes:
    """Tensors overlap, leave gaps, or change places."""
    text, data = split(raw)
    header = json.loads(text)
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    one, other = rng.choice(entries), rng.choice(entries)
    shift = rng.choice([-8, -1, 1, 8, len(data)])
    kind = rng.randrange(4)
    if kind == 0:
        one["data_offsets"] = [max(place + shift, 0) for place in one["data_offsets"]]
    elif kind == 1:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif kind == 2:
        one["shape"] = [*one["shape"], rng.choice([0, 1, 2])]
    else:
        one["shape"] = rng.choice([one["shape"][::-1], [2**61, 8], [*one["shape"], 2**63 - 1, 0], []])
    return with_header(header, data)


FILE_DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    flip, cut, extend, move, lie_about_length, spoil_text, edit_header, edit_tables, edit_mapping, move_tensors,
]  # fmt: skip


def spoil_json(raw: bytes, rng: random.Random, kind: int) -> bytes:
    """In one of three ways."""
    if kind == 0:
        return rng.choice([flip, cut, move])(raw, rng)
    if kind == 1:
        return split(spoil_text(with_text(raw, b""), rng))[0]
    value = json.loads(raw)
    edit(value, rng)
    return json.dumps(value).encode()


def spoil_index(raw: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    if kind < 3:
        return spoil_json(raw, rng, kind)
    index = json.loads(raw)
    files = index["weight_map"]
    name = rng.choice(list(files))
    others = [
        "../x",
        "/etc/passwd",
        "..",
        "",
        "0.safetensors",
        "1.safetensors",
        "missing",
        INDEX,
        "a\0",
        "C:x",
        "x" * 300,
    ]
    files[name] = rng.choice([*files.values(), *others])
    files |= rng.choice([{}, {"more": files[name]}, {"table.rows": "1.safetensors"}])
    return json.dumps(index).encode()


def damaged(files: Files, rng: random.Random) -> Files:
    """A copy of which one file is damaged, in one way or several."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(list(files))
        raw = files[name]
        try:
            damage = spoil_index if name == INDEX else rng.choice(FILE_DAMAGES)
            files[name] = damage(raw, rng)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
            files[name] = flip(raw, rng) if raw else raw  # too far gone to be edited
    if len(files) > 1 and rng.random() < 0.05:
        del files[list(files)[-1]]
    return files
