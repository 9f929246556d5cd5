"""Which compiled kernels serve: the best level that this machine can run, or the one that QEMBAG_KERNELS names."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from typing import TYPE_CHECKING, cast

from . import _cpu

if TYPE_CHECKING:
    from typing import Any, Protocol

    from numpy.typing import NDArray

    from ._kernels import _Fault

    class _Kernels(Protocol):
        """What each level's module holds; `_kernels.pyi` says more."""

        LEVEL: str
        OPENMP: int

        def embedding_bag(self, *arguments: Any) -> NDArray[Any] | _Fault | None: ...
        def embedding(self, *arguments: Any) -> NDArray[Any] | _Fault | None: ...
        def quantize(self, *arguments: Any) -> tuple[str, int] | None: ...
        def max_threads(self) -> int: ...


def _load(module: str) -> _Kernels:
    return cast("_Kernels", importlib.import_module(f".{module}", __package__))


def _available() -> dict[str, str]:
    """The levels that this machine can run, best last, and the module of each."""
    x86_levels = [("avx2", "_kernels_avx2"), ("avx512", "_kernels_avx512")]
    return {_load("_kernels").LEVEL: "_kernels"} | dict(x86_levels[: _cpu.x86_level()])


def load(level: str) -> _Kernels:
    """The kernels of one level.

    Raises
    ------
    ValueError
        If this machine cannot run it.
    """
    if level not in MODULES:
        raise ValueError(f"QEMBAG_KERNELS must be one of {', '.join(MODULES)} on this machine, got {level!r}")
    return _load(MODULES[level])


# How often a waiting thread of libgomp looks for work before it sleeps: about 10 us. Calls that follow each other at once
# still meet threads awake.
SPIN_COUNT = "1000"


def _load_openmp() -> None:
    """Load OpenMP's runtime so that the spin of its waiting threads is bounded.

    libgomp reads that once, when it is loaded. Its default is a few milliseconds, in which the threads of ours and those of
    NumPy's matrix product, or another runtime's, take the processors from each other at each change from one to the other.
    Where the modules are not plain files, the default stays: what an unusual loader does is not ours to guess.
    """
    spec = importlib.util.find_spec("._kernels", __package__)
    if spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
        _cpu.load_openmp(os.fsencode(spec.loader.path), SPIN_COUNT.encode())


_load_openmp()
MODULES = _available()
kernels = load(os.environ.get("QEMBAG_KERNELS") or list(MODULES)[-1])
