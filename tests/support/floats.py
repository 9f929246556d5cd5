"""Rows of floats, as tests make them. The oracle's storage: float32, float16, and the bits of bfloat16 as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np

import reference
from support.arrays import same_bits
from support.layouts import EXTREMES

KINDS = ("float32", "float16", "bfloat16")
STORED = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}


def stored_as(values: np.ndarray, kind: str) -> np.ndarray:
    """Rounded to a kind of float."""
    with np.errstate(all="ignore"):
        return reference.to_bfloat16(values) if kind == "bfloat16" else values.astype(kind)


def rows_of(rng: np.random.Generator, kind: str, num_rows: int, dim: int, extremes: bool = False) -> np.ndarray:
    """Values of either sign; with `extremes`, some are denormal, huge, zero, infinite or NaN."""
    values = rng.normal(size=(num_rows, dim))
    if extremes:
        odd = np.array([*EXTREMES, np.nan, 1e-45, -6e-8])
        values = np.where(rng.random(values.shape) < 0.2, rng.choice(odd, values.shape), values)
    with np.errstate(all="ignore"):
        return stored_as(values.astype(np.float32), kind)


def full_range(rng: np.random.Generator, kind: str, num_rows: int, dim: int) -> np.ndarray:
    """Any bits of finite numbers: all exponents and signs."""
    whole = np.dtype(f"u{STORED[kind].itemsize}")
    bits = rng.integers(0, np.iinfo(whole).max, (num_rows, dim), dtype=whole, endpoint=True)
    rows = bits.view(STORED[kind])
    is_finite = np.isfinite(reference.widen(rows))
    return np.where(is_finite, rows, np.zeros((), rows.dtype))


def same_floats(ours: Any, theirs: Any) -> None:
    """As `same_bits`, which does not know that uint16 may be bfloat16, with signs and payloads of NaN."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.dtype == theirs.dtype == np.uint16:
        ours, theirs = reference.widen(ours), reference.widen(theirs)
    same_bits(ours, theirs)
