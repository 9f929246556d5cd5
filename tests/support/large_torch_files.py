"""Files of torch of any size, sparse: their storages are zeros that take no room on disk."""

from __future__ import annotations

import struct
from pathlib import Path

from .torch_files import (
    ALIGNMENT,
    CENTRAL,
    LOCAL,
    Call,
    File,
    Name,
    Persistent,
    ordered,
    packed,
    pickled,
    strides_of,
    view,
)


class Sparse(File):
    """Storages by their number of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def zeros(self, kind: str, itemsize: int, shape: tuple[int, ...]) -> Call:
        """A tensor of zeros."""
        return view(self._storage(kind, itemsize, shape), shape)

    def quantized(self, kind: str, shape: tuple[int, int]) -> Call:
        """A tensor of torch.ao with a byte an element, scales and zero points of 0."""
        scales = self.zeros("Float", 4, shape[:1])
        parameters = (Name("torch", "per_channel_affine"), scales, self.zeros("Float", 4, shape[:1]), 0)
        place = (self._storage(kind, 1, shape), 0, shape, strides_of(shape))
        return Call(Name("torch._utils", "_rebuild_qtensor"), (*place, parameters, False, ordered()))

    def _storage(self, kind: str, itemsize: int, shape: tuple[int, ...]) -> Persistent:
        key, count = str(len(self.sizes)), 1
        for length in shape:
            count *= length
        self.sizes[key] = count * itemsize
        return Persistent(("storage", Name("torch", f"{kind}Storage"), key, "cpu", count))

    def write(self, path: Path, value: object) -> None:
        pickle = pickled(value)
        records: dict[bytes, bytes | int] = {b"data.pkl": pickle, b"byteorder": b"little", b"version": b"3\n"}
        records |= {f"data/{key}".encode(): size for key, size in self.sizes.items()}
        directory = b""
        with open(path, "wb") as file:
            for short, data in records.items():
                name, header, size = b"big/" + short, file.tell(), data if isinstance(data, int) else len(data)
                padding = -(header + 30 + len(name) + 4) % ALIGNMENT
                own = {"flags": 0x808, "name": len(name), "extra": padding + 4}
                file.write(b"PK\3\4" + packed("5H3L2H", LOCAL, own) + name + b"FB" + struct.pack("<H", padding))
                file.seek(padding, 1)
                file.seek(data, 1) if isinstance(data, int) else file.write(data)
                large = struct.pack("<2H3Q", 1, 24, size, size, header)
                known = own | {"size": 2**32 - 1, "packed": 2**32 - 1, "header": 2**32 - 1, "extra": len(large)}
                directory += b"PK\1\2" + packed("6H3L5H2L", CENTRAL, known) + name + large
            start = file.tell()
            ends = {"size": 44, "here": len(records), "count": len(records), "bytes": len(directory), "start": start}
            names = "size made needed disk first here count bytes start"
            file.write(directory + b"PK\6\6" + packed("Q2H2L4Q", names, ends))
            file.write(b"PK\6\7" + packed("LQL", "disk at disks", {"at": start + len(directory), "disks": 1}))
            full = {"here": 0xFFFF, "count": 0xFFFF, "bytes": 2**32 - 1, "start": 2**32 - 1}
            file.write(b"PK\5\6" + packed("4H2LH", "disk first here count bytes start comment", full))
