"""The process: instruction-set levels, threads, and what this installation is."""

from __future__ import annotations

import _imp
import importlib.machinery
import importlib.util
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, cast

from . import _arguments, _cpu, _handle
from ._version import __version__

if TYPE_CHECKING:

    class _Kernels(Protocol):
        """What each level's module holds."""

        LEVEL: str
        OPENMP: int
        LOOPS: object


# ---- Levels ----------------------------------------------------------------------------------------------------


def _load(module: str) -> _Kernels:
    return cast("_Kernels", importlib.import_module(f".{module}", __package__))


def _available() -> dict[str, str]:
    """The levels that this machine can run, best last, and the module of each."""
    x86_levels = [("avx2", "_kernels_avx2"), ("avx512", "_kernels_avx512")]
    return {_load("_kernels").LEVEL: "_kernels"} | dict(x86_levels[: _cpu.x86_level()])


def use_level(name: str) -> str:
    """Lookups and quantizing run at this level from here on; which one they ran at before.

    Raises
    ------
    ValueError
        If this machine cannot run it.
    """
    global _kernels
    if name not in LEVELS:
        raise ValueError(f"QEMBAG_KERNELS must be one of {', '.join(LEVELS)} on this machine, got {name!r}")
    before = _kernels.LEVEL
    _kernels = _load(LEVELS[name])
    _handle.use_loops(_kernels.LOOPS)
    return before


def level() -> str:
    """The level in use."""
    return _kernels.LEVEL


# How often a waiting thread of libgomp looks for work before it sleeps: about 10 us. Calls that follow each other at
# once still meet threads awake.
SPIN_COUNT = "1000"


def _load_openmp() -> None:
    """Load OpenMP's runtime so that the spin of its waiting threads is bounded.

    libgomp reads that once, when it is loaded. Its default is a few milliseconds, in which the threads of ours and
    those of NumPy's matrix product, or another runtime's, take the processors from each other at each change from one
    to the other. Where the modules are not plain files, the default stays: what an unusual loader does is not ours to
    guess.
    """
    spec = importlib.util.find_spec("._kernels", __package__)
    if spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
        # What a spec has, without its properties, which are Python code. The import that follows finds the library
        # loaded, and makes a module of its own.
        plain = SimpleNamespace(name=spec.name, origin=spec.origin, parent=__package__, loader=None)
        plain.submodule_search_locations = None
        _cpu.load_openmp(_imp.create_dynamic, plain, SPIN_COUNT.encode())


_load_openmp()
LEVELS = _available()
_kernels = _load("_kernels")
use_level(os.environ.get("QEMBAG_KERNELS") or list(LEVELS)[-1])


# ---- Threads ---------------------------------------------------------------------------------------------------


def set_num_threads(n: int | None) -> None:
    """Limit the threads of every later call in this process.

    Parameters
    ----------
    n : int or None
        At least 1; None takes the limit back, and OpenMP's own counts again (``OMP_NUM_THREADS``, affinity). Settings
        of OpenMP are never changed.

    Raises
    ------
    TypeError, ValueError
        If `n` is not a whole number, or below 1.

    Examples
    --------
    >>> import qembag
    >>> qembag.set_num_threads(2)
    >>> qembag.get_num_threads()
    2
    >>> qembag.set_num_threads(None)
    """
    _handle.set_thread_limit(0 if n is None else _arguments.num_threads(n, "n"))


def get_num_threads() -> int:
    """The number of threads that a call without `num_threads` may use, at this moment.

    Small calls stay on one thread whatever it is.

    Examples
    --------
    >>> import qembag
    >>> qembag.get_num_threads() >= 1
    True
    """
    return _handle.get_thread_limit() or _handle.max_threads()


def resolve_threads(num_threads: object) -> int:
    """What the loops are told: an argument, else the process's limit, else 0 for OpenMP's."""
    if num_threads is None:
        return _handle.get_thread_limit()
    return _arguments.num_threads(num_threads, "num_threads")


# ---- What this installation is ---------------------------------------------------------------------------------


def show_config() -> dict[str, Any]:
    """What this installation is and does.

    Returns
    -------
    dict
        ``version``; ``level``, the instruction-set level in use; ``levels``, those that this machine can run, best
        last; ``openmp``, whether calls can use several threads, and ``openmp_version`` (the date of the
        specification, 0 without); ``num_threads``, how many a call may use now.

    Examples
    --------
    >>> import qembag
    >>> sorted(qembag.show_config())
    ['level', 'levels', 'num_threads', 'openmp', 'openmp_version', 'version']
    """
    return {
        "version": __version__,
        "level": _kernels.LEVEL,
        "levels": list(LEVELS),
        "openmp": bool(_kernels.OPENMP),
        "openmp_version": _kernels.OPENMP,
        "num_threads": get_num_threads(),
    }
