"""Arrays between two guard pages: a read or a write on a guard page kills the process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import pytest

PAGE = mmap.PAGESIZE
PROT_NONE = 0

needs_fences = pytest.mark.skipif(sys.platform != "linux", reason="fences are made with Linux's mprotect")


def empty(shape: int | tuple[int, ...], dtype: Any, *, at: str = "end") -> np.ndarray:
    """A new array that ends where a guard page starts or, with ``at="start"``, starts where one ends."""
    dtype = np.dtype(dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    inner = max(-(-num_bytes // PAGE), 1) * PAGE
    region = np.frombuffer(mmap.mmap(-1, inner + 2 * PAGE), dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (0, PAGE + inner):
        address = ctypes.c_void_p(region.ctypes.data + fence)
        if libc.mprotect(address, ctypes.c_size_t(PAGE), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    first = PAGE if at == "start" else PAGE + inner - num_bytes
    return region[first : first + num_bytes].view(dtype).reshape(shape)


def copy(array: np.ndarray, *, at: str = "end") -> np.ndarray:
    fenced = empty(array.shape, array.dtype, at=at)
    fenced[...] = array
    return fenced


class PartlyFenced(np.ndarray):
    """An array of which not all may be read. So it must not be shown where a test fails."""

    def __repr__(self) -> str:
        return f"<rows of shape {self.shape} that end behind a fence>"

    __str__ = __repr__


def rows_over_the_fence(rows: np.ndarray, padding: int) -> np.ndarray:
    """A read-only copy of rows, of which the last so many bytes, padding of the last row, lie on the guard page."""
    memory = empty(rows.size - padding, np.uint8)
    memory[...] = rows.ravel()[: memory.size]
    lying = np.lib.stride_tricks.as_strided(memory, rows.shape, (rows.shape[1], 1), writeable=False)
    return lying.view(PartlyFenced)
