"""Arrays in .npy files: reading those that arguments name, and writing block by block."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .output import about

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

Write: TypeAlias = Callable[[np.ndarray[Any, np.dtype[Any]]], object]
# As long as NumPy's own header of a 2-D array.
HEADER_BYTES = 128


def load_array(path: Path) -> NDArray[Any]:
    """Map the array in a .npy file; never read a pickle. Errors name the file."""
    with about(path):
        try:
            # The product of a false shape may overflow; NumPy reports that shape one step later.
            with np.errstate(over="ignore"):
                return np.lib.format.open_memmap(path, mode="r")
        except (MemoryError, OSError, ValueError):
            raise
        except Exception as error:  # noqa: BLE001 (for example from Python's parser, which reads the header)
            raise ValueError(f"not a readable .npy file: {type(error).__name__}: {error}") from None


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays in a .npz file by name; the array of a .npy file under the name ""."""
    if path.suffix == ".npy":
        return {"": load_array(path)}
    with about(path):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (MemoryError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 (of zipfile, zlib, NumPy, or of an array that is no archive)
            raise ValueError(f"not a readable .npz file: {type(error).__name__}: {error}") from None


def npy_header(num_rows: int, dim: int, dtype: np.dtype[Any]) -> bytes:
    """A header whose length does not depend on the number of rows."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({num_rows}, {dim}), }}"
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def little_endian(rows: NDArray[Any]) -> memoryview:
    """The bytes of an array, little-endian as in files."""
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def npy_rows(file: BinaryIO, dim: int, dtype: str) -> Iterator[Write]:
    """A function that appends rows to an array in a file that can seek; the header with their number comes last."""
    stored = np.dtype(dtype).newbyteorder("<")
    num_rows = 0

    def write(rows: NDArray[Any]) -> None:
        nonlocal num_rows
        file.write(little_endian(rows.astype(stored, copy=False)))
        num_rows += len(rows)

    file.write(npy_header(0, dim, stored))
    yield write
    file.seek(0)
    file.write(npy_header(num_rows, dim, stored))


@contextlib.contextmanager
def npy_to_stdout(dim: int, dtype: str) -> Iterator[Write]:
    """As `npy_rows`, for a pipe, which cannot seek: everything is sent at the end."""
    with tempfile.TemporaryFile() as file:
        with npy_rows(file, dim, dtype) as write:
            yield write
        file.seek(0)
        shutil.copyfileobj(file, sys.stdout.buffer)
