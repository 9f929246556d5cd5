"""The compiled levels of this machine. Only here do the tests and the fuzzer reach into the package to choose one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

try:
    from qembag import _runtime
except ImportError:  # before there was one
    from qembag import _dispatch

    MODULES: dict[str, str] = _dispatch.MODULES

    def serve(level: str) -> str:
        """Lets a level serve from now on. Returns the one that served before."""
        before = _dispatch.kernels.LEVEL
        _dispatch.kernels = _dispatch.load(level)
        return before

else:
    MODULES = _runtime.LEVELS
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
