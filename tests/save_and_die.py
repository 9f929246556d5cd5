"""Saves tables over and over, to one file or to an index of several, until it is killed.

    python tests/save_and_die.py PATH

Each save has tables of other values, all rows of one save the same. Says on standard output when the first is done.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

import qembag

ROWS, DIM = 20_000, 32


def tables_of(number: int) -> dict[str, np.ndarray]:
    """Those of a save: 2.5 MB each."""
    return {name: np.full((ROWS, DIM), number, np.float32) for name in ("a", "b")}


def number_of(path: Path) -> int:
    """Which save the file is of. Fails if it is not one of them, whole."""
    tables = qembag.open_tables(path)
    assert list(tables) == ["a", "b"]
    number = int(tables["a"].data[0, 0])
    for table in tables.values():
        assert table.shape == (ROWS, DIM)
        assert (table.data == number).all()
    return number


if __name__ == "__main__":
    for save in itertools.count(1):
        qembag.save_tables(sys.argv[1], tables_of(save), max_shard_bytes=1 if sys.argv[1].endswith(".json") else None)
        if save == 1:
            print("saved", flush=True)
