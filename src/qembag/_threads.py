"""How many threads a call may use."""

from __future__ import annotations

from . import _arguments, _dispatch

_limit: int | None = None


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
    global _limit
    _limit = None if n is None else _arguments.num_threads(n, "n")


def get_num_threads() -> int:
    """The number of threads that a call without `num_threads` may use, at this moment.

    Small calls stay on one thread whatever it is.

    Examples
    --------
    >>> import qembag
    >>> qembag.get_num_threads() >= 1
    True
    """
    return _dispatch.kernels.max_threads() if _limit is None else _limit


def resolve(num_threads: int | None) -> int:
    """What a kernel is told: an argument, else the process's limit, else 0 for OpenMP's."""
    if num_threads is None:
        return _limit or 0
    return _arguments.num_threads(num_threads, "num_threads")
