"""Reads tables once, so that a mapped file is in memory before lookups need it."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from .progress import reporting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ..base import Table
    from .progress import Progress

# About this many bytes are read between two progress reports, and between two chances for Python to handle Ctrl-C.
TOUCHED_AT_ONCE = 1 << 23


def prefault(tables: Iterable[Table], progress: Progress) -> None:
    """Read a byte of each page of the tables' rows and mappings."""
    handles = [table._handle for table in tables]
    num_rows = sum(len(handle.rows) for handle in handles)
    rows_done = bytes_done = 0
    with reporting(progress, num_rows, sum(handle.rows.nbytes for handle in handles)) as report:
        for handle in handles:
            if handle.mapping is not None:
                _touch(handle.mapping.view(np.uint8)[None])
            rows = handle.rows
            at_once = max(TOUCHED_AT_ONCE // max(rows.shape[1], 1), 1)
            for start in range(0, len(rows), at_once):
                part = rows[start : start + at_once]
                _touch(part)
                rows_done, bytes_done = rows_done + len(part), bytes_done + part.nbytes
                report(rows_done, bytes_done)


def _touch(rows: NDArray[np.uint8]) -> None:
    if rows.size == 0:
        return
    whole: NDArray[Any] = rows.reshape(1, -1) if rows.flags.c_contiguous else rows
    whole[:, :: mmap.PAGESIZE].max()
    # Also the last page of each row, which the steps may miss.
    whole[:, -1].max()
