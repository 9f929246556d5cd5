"""What must come of a call: the oracle's answer, or an error that the rules allow, the same at each level."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from support import levels, rules
from support.arrays import addresses
from support.floats import same_floats
from support.lookups import Verdict

LEVELS = levels.levels()
# A fault on purpose, to see that the fuzzer finds it: "overread" and "overwrite" are tables and outputs that end a byte
# before they say, "answer" is an oracle that is wrong in one bit.
PLANTED = os.environ.get("QEMBAG_FUZZ_PLANT", "")

calls = 0


class Finding(AssertionError):
    """The package did what it must not do."""


def require(right: object, what: str) -> None:
    if not right:
        raise Finding(what)


def is_same(ours: Any, theirs: Any) -> bool:
    try:
        same_floats(ours, theirs)
    except AssertionError:
        return False
    return True


def compare(result: np.ndarray, expected: np.ndarray) -> None:
    if PLANTED == "answer" and expected.size:
        expected = expected.copy()
        expected.view(f"u{expected.itemsize}").flat[-1] ^= 1
    if not is_same(result, expected):
        raise Finding(f"the answer is {result}, not the oracle's {expected}")


def attempt(call: Callable[[], Any], faults: rules.Faults) -> tuple[Any, str | None]:
    """What a call gives, or its error, if it is one of those that it must lead to."""
    global calls
    calls += 1
    try:
        result = call()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if not rules.allows(faults, error):
            raise Finding(f"{text}\nin place of {rules.refused(faults)}") from error
        return None, text
    if faults:
        raise Finding(f"accepted what must be refused as {rules.refused(faults)}")
    return result, None


@dataclass
class Out:
    """An output of the caller's, and the memory that it lies in."""

    value: Any
    array: np.ndarray | None = None
    block: np.ndarray | None = None

    def rest(self) -> bytes:
        """All of its memory but its own elements."""
        rest = self.block.copy()
        if self.array.size:
            rest[addresses(self.array) - self.block.__array_interface__["data"][0]] = 0
        return rest.tobytes()


NO_OUT = Out(None)


def at_each_level(call: Callable[[Any], Any], verdict: Verdict, out: Out = NO_OUT, ask: bool = True) -> None:
    """The same answer, the oracle's where it is asked, or the same error, at each level."""
    faults = verdict.with_out(out.value)
    errors, first = set(), None
    before = None if out.block is None else out.block.copy()
    rest = None if before is None or faults else out.rest()
    for level in LEVELS:
        with levels.use(level):
            result, error = attempt(lambda: call(out.value), faults)
        errors.add(error)
        if error is None:
            require(out.value is None or result is out.value, "the answer is not `out`")
            result = np.array(result, copy=True, subok=False)
            if first is None:
                first = result
                # A planted overread is the kernels' to find: the oracle reads whole tables.
                if ask and verdict.answer is not None and PLANTED != "overread":
                    compare(result, verdict.expected(None if out.value is None else result))
            elif not is_same(result, first):
                raise Finding(f"the answers of two levels differ: {first} and {result}")
            if rest is not None:
                require(out.rest() == rest, "memory around an output was written")
                out.block[:] = before
        elif before is not None:
            require(np.array_equal(out.block, before), "an error changed `out`")
    require(len(errors) == 1, f"the errors of two levels differ: {errors}")
