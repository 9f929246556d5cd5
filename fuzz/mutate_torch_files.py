"""Damages files of torch.save in every way that it knows, and reads them.

    python fuzz/mutate_torch_files.py COUNT [SEED [FIRST]]

Each file must be read right or be refused by a ValueError. Reading one may run nothing (an audit hook watches for
imports, code, processes and files that are opened), take no longer than `SECONDS`, and no more memory than the file's
size and `MEMORY` bytes. Tables that were read can be made and looked up; their tensors lie within the file, and are
those that torch reads, where it is installed and reads the file too.

Case N of a seed is always the same: `python fuzz/mutate_torch_files.py 1 SEED N` repeats it.
"""

from __future__ import annotations

import functools
import gc
import io
import random
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np

import mutate_files
from damage_torch import damaged
from mutate_files import MEMORY, Finding, alarm, look_up
from qembag.interop import torch_file
from qembag.interop.foreign import Memory, Refused, Wanted, check_copies
from qembag.interop.torch_tensors import QTensor, Tensor, read_entries
from support.torch_files import files_of_every_kind

try:
    import torch
except ImportError:
    torch = None

SEED = mutate_files.SEED
# What TorchRec's files do not say.
WANTED = [Wanted(), Wanted(8, 12), Wanted(4, 8), Wanted({"t1": 8, "t2": 4}, {"t1": 8, "t2": 16})]
# A file that takes more than this when torch reads it is not compared.
MAX_COMPARED = 1 << 20


# ---- What runs -------------------------------------------------------------------------------------------------------

FORBIDDEN = ("import", "exec", "compile", "code.", "subprocess.", "os.", "shutil.", "socket.", "ctypes.", "pickle.")
_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and (
        event.startswith(FORBIDDEN) or (event == "open" and arguments[1] not in ("r", "rb", None))
    ):
        _watched.append(f"{event} {arguments!r:.200}")


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Raises `Finding` if what is done within imports, runs or opens something."""
    global _watched
    if not getattr(sys, "_qembag_hook", False):
        sys.addaudithook(_hook)  # for good: there is no way to take one away
        sys._qembag_hook = True
    # What others have left, such as a folder of a test, may be finalized by whoever allocates next: not by the reader.
    collects = gc.isenabled()
    gc.disable()
    _watched = seen = []
    try:
        yield
    finally:
        _watched = None
        if collects:
            gc.enable()
    if seen:
        raise Finding(f"ran {seen[:3]}")


# ---- Verdicts --------------------------------------------------------------------------------------------------------


def verdict(path: Path, raw: bytes, wanted: Wanted) -> str:
    """What comes of reading the file: "opened", or the refusal. Raises `Finding`."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        memory = Memory(path)
        with nothing_runs():
            tables = torch_file.read(memory, wanted)
            check_copies(tables.values(), len(raw), mapped=True)
            made = {name: foreign.table(mapped=True) for name, foreign in tables.items() if wanted.wants(name)}
    except ValueError as error:
        if type(error) not in (ValueError, Refused) or not str(error):
            raise Finding(f"refused by {error!r}") from error
        if len(str(error)) > 3000:
            raise Finding(f"refused by {len(str(error))} characters") from error
        return str(error)
    finally:
        used = tracemalloc.get_traced_memory()[1] - before
        if used > len(raw) + MEMORY:
            raise Finding(f"took {used} bytes of memory for a file of {len(raw)}")
    for name, table in made.items():
        look_up(name, table)
    judge(path, raw)
    return "opened"


def judge(path: Path, raw: bytes) -> None:
    """Tensors lie within the file, and are torch's."""
    memory = Memory(path)
    tensors = read_entries(memory).tensors
    arrays = {name: tensor.array() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        if isinstance(tensor, QTensor):
            arrays[name] = tensor.codes
    within(memory, raw, arrays)
    if torch is None or sum(array.nbytes for array in arrays.values()) > MAX_COMPARED:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = flattened(torch.load(io.BytesIO(raw), weights_only=True))
    except Exception:  # noqa: BLE001  torch refuses it, in whatever way
        return
    for name, array in arrays.items():
        theirs = loaded.get(name)
        if theirs is None:
            continue  # a key that is no text, such as a type of torch's
        if isinstance(tensors[name], QTensor):
            same = theirs.dtype == torch.quint4x2 or array.tobytes() == theirs.int_repr().numpy().tobytes()
        elif tensors[name].dtype == "bfloat16":
            same = array.tobytes() == theirs.detach().view(torch.uint16).numpy().astype(array.dtype).tobytes()
        else:
            same = array.tobytes() == theirs.detach().numpy().astype(array.dtype).tobytes()
        if not same:
            raise Finding(f"tensor {name!r} has other bytes than torch reads")


def within(memory: Memory, raw: bytes, arrays: dict[str, np.ndarray]) -> None:
    """Raises `Finding` unless each array lies within the data of a record, by another reader of archives."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError):
        return  # it looks at fields that nothing here needs
    ranges = []
    for record in records:
        at = record.header_offset
        names = int.from_bytes(raw[at + 26 : at + 28], "little") + int.from_bytes(raw[at + 28 : at + 30], "little")
        ranges.append((at + 30 + names, at + 30 + names + record.file_size))
    first = memory.bytes.__array_interface__["data"][0]
    for name, array in arrays.items():
        if array.size == 0:
            continue
        start = array.__array_interface__["data"][0] - first
        extent = sum((count - 1) * step for count, step in zip(array.shape, array.strides, strict=True))
        stop = start + extent + array.itemsize
        if not any(begin <= start and stop <= end for begin, end in ranges):
            raise Finding(f"tensor {name!r} lies at bytes {start} to {stop}: in no record")


def flattened(value: Any, name: str = "") -> dict[str, Any]:
    """The tensors of what torch loaded, by dotted name."""
    if isinstance(value, torch.Tensor):
        return {name or "table": value}
    if isinstance(value, dict):
        items = [(",".join(map(str, key)) if type(key) is tuple else str(key), each) for key, each in value.items()]
    elif type(value) in (list, tuple, torch.Size):
        items = [(str(number), each) for number, each in enumerate(value)]
    else:
        return {}
    found: dict[str, Any] = {}
    for key, each in items:
        found |= flattened(each, f"{name}.{key}" if name else key)
    return found


def reads(folder: Path) -> Callable[[random.Random], str]:
    """Plays a case."""
    kinds = list(files_of_every_kind().values())
    path = folder / "a.pt"

    def play(rng: random.Random) -> str:
        raw = damaged(rng.choice(kinds), rng)
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        with alarm(), np.errstate(all="ignore"):
            return verdict(path, raw, rng.choice(WANTED))

    return play


run = functools.partial(mutate_files.run, player=reads)

if __name__ == "__main__":
    sys.exit(mutate_files.main(sys.argv[1:], __file__, run))
