"""The lookups that were asked of other libraries' modules; see make_torch_files.py."""

from __future__ import annotations

from typing import Any

import numpy as np

import qembag

NUM_ROWS = 11
INDICES = np.arange(40, dtype=np.int64) * 7 % NUM_ROWS
OFFSETS = np.array([0, 0, 3, 17], np.int64)
WEIGHTS = np.linspace(-1, 2, len(INDICES)).astype(np.float32)


def answer(table: Any, lookup: str) -> np.ndarray:
    """What qembag answers: the sums or means of bags, weighted sums, or all rows."""
    if lookup == "rows":
        return qembag.embedding(table, np.arange(NUM_ROWS))
    weights = WEIGHTS if lookup == "weighted" else None
    mode = "mean" if lookup == "mean" else "sum"
    return qembag.embedding_bag(table, INDICES, OFFSETS, mode=mode, per_sample_weights=weights)
