"""Calls for bags of one small table, what must come of them, and that the rules and the oracle say so too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from support import rules
from support.arrays import same_bits
from support.layouts import MODES
from support.lookups import Bags, Table

DIM = 12
NUM_ROWS = 10
INDICES = np.array([3, 1, 4, 1, 5, 9], dtype=np.int64)
SQUARE = INDICES.reshape(3, 2)
OFFSETS = np.array([0, 2, 2], dtype=np.int64)
ONES = np.ones(6, dtype=np.float32)
TABLE = "a table of 10 rows"
BAD_ROW = "must be -1 or the number of a row, in a table of 10 rows"


@dataclass
class Ask:
    """Makes calls for bags of `rows`, by the public function or one of the reference's two operators of this width."""

    family: str
    bits: int
    rows: np.ndarray

    def __call__(self, indices: Any = INDICES, offsets: Any = OFFSETS, *, rows: Any = None, **given: Any) -> Bags:
        rows, mapping = self.rows if rows is None else rows, given.pop("mapping", None)
        if self.family == "public":
            return Bags("public", Table(rows, self.bits, mapping=mapping), indices, offsets, **given)
        if "mode" in given:
            given["mode"] = MODES.index(given["mode"])
        pruned = {"pruned": mapping is not None, "mapping": mapping}
        return Bags(self.family, Table(rows, self.bits), indices, offsets, **pruned, **given)


def fresh_out(shape: tuple[int, ...] = (3, DIM)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint32).view(np.float32).reshape(shape)


def raises(error: type[Exception], message: str, call: Callable[..., Any], *out: Any, whole: bool = True) -> None:
    """Exactly this error, with this text or, if not the whole one, one that begins so."""
    before = [given.tobytes() for given in out]
    with pytest.raises(error) as caught:
        call(*out)
    assert type(caught.value) is error
    assert str(caught.value) == message if whole else str(caught.value).startswith(message), caught.value
    assert [given.tobytes() for given in out] == before


def refused(call: Any, error: type[Exception], message: str, whole: bool = True) -> None:
    """A call without an `out` and with one, which it leaves alone. The rules know of this error and no other."""
    verdict = call.judge()
    assert len(verdict.faults) == 1, message
    assert rules.allows(verdict.faults, error(message)), f"{message}, not {rules.refused(verdict.faults)}"
    raises(error, message, call, whole=whole)
    if getattr(call, "takes_out", True):
        raises(error, message, call, fresh_out(verdict.shape or (3, DIM)), whole=whole)


def answered(call: Any, expected: np.ndarray | None = None) -> None:
    """A call without an `out` and with one gives what is expected, which is what the oracle says."""
    verdict = call.judge()
    assert not verdict.faults
    if expected is None:
        expected = verdict.expected()
    same_bits(verdict.expected(), expected)
    same_bits(call(), expected)
    out = np.full(expected.shape, np.nan, dtype=expected.dtype)
    assert call(out) is out
    same_bits(out, expected)


def refuses_out(call: Any, out: np.ndarray, message: str, memory: np.ndarray | None = None, whole: bool = True) -> None:
    """The memory behind it, its own if no other is named, is left alone."""
    assert call.judge().with_out(out) == {(ValueError, "out")}
    memory = out if memory is None else memory
    before = memory.tobytes()
    raises(ValueError, message, lambda: call(out), whole=whole)
    assert memory.tobytes() == before
