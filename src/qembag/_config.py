"""What this installation is and does."""

from __future__ import annotations

from typing import Any

from . import _dispatch, _threads
from ._version import __version__


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
    kernels = _dispatch.kernels
    return {
        "version": __version__,
        "level": kernels.LEVEL,
        "levels": list(_dispatch.MODULES),
        "openmp": bool(kernels.OPENMP),
        "openmp_version": kernels.OPENMP,
        "num_threads": _threads.get_num_threads(),
    }
