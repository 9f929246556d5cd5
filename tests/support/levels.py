"""The compiled levels of this machine. Only here do the tests and the fuzzer reach into the package to choose one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qembag import _runtime

MODULES = _runtime.LEVELS
# Makes a level serve from now on, and returns the one that served before.
serve = _runtime.use_level


def levels() -> list[str]:
    """Best last."""
    return list(MODULES)


@contextlib.contextmanager
def use(level: str) -> Iterator[str]:
    before = serve(level)
    try:
        yield level
    finally:
        serve(before)
