"""Progress of a long job: a tqdm bar, or the caller's function."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import _arguments, _errors

if TYPE_CHECKING:
    from collections.abc import Iterator

Progress: TypeAlias = bool | Callable[[int, int | None, int], object]
Report: TypeAlias = Callable[[int, int], None]


@contextlib.contextmanager
def reporting(
    progress: Progress, rows_total: int | None, bytes_total: int | None, *, rows_done: int = 0, bytes_done: int = 0
) -> Iterator[Report]:
    """A function to call with the rows and bytes done so far, including those of an earlier run.

    Parameters
    ----------
    progress : bool or callable
        True shows a bar on standard error (tqdm). A callable is called as
        ``progress(rows_done, rows_total, bytes_done)``, in this thread; its exceptions propagate.
    rows_total, bytes_total : int or None
        None if unknown.
    rows_done, bytes_done : int
        What an earlier run did; not counted in the speed.

    Raises
    ------
    TypeError
        If `progress` is neither a bool nor a callable.
    ImportError
        If tqdm is not installed.

    Examples
    --------
    >>> from qembag.formats.progress import reporting
    >>> with reporting(print, 200, 12800) as report:
    ...     report(100, 6400)
    ...     report(200, 12800)
    100 200 6400
    200 200 12800
    """
    if callable(progress):
        function = progress

        def call(rows: int, size: int) -> None:
            function(rows, rows_total, size)

        yield call
    elif not check(progress):
        yield lambda rows, size: None
    else:
        of_all = "" if rows_total is None else f" of {rows_total:,}"
        with _bar_class()(total=bytes_total, initial=bytes_done, unit="B", unit_scale=True) as bar:

            def show(rows: int, size: int) -> None:
                bar.set_postfix_str(f"{rows:,}{of_all} rows", refresh=False)
                bar.update(size - bar.n)

            show(rows_done, bytes_done)
            yield show


def check(progress: Any) -> bool:
    """Check `progress` before any work is done. Returns whether there is progress to report.

    Raises
    ------
    TypeError, ImportError
        As for `reporting`.
    """
    if callable(progress):
        return True
    try:
        is_shown = _arguments.flag(progress, "progress")
    except TypeError:
        raise TypeError(f"progress must be True, False or a function, got {_errors.kind_of(progress)}") from None
    if is_shown:
        _bar_class()
    return is_shown


def _bar_class() -> Any:
    try:
        # By name, so that type checkers do not need the extra.
        tqdm = importlib.import_module("tqdm")
    except ImportError:
        raise ImportError("progress=True needs the tqdm package: pip install 'qembag[progress]'") from None

    class _Bar(tqdm.tqdm):  # type: ignore[misc,name-defined]
        # Neither tqdm's monitor thread nor its multiprocessing lock, for which newer Pythons start a process: a library
        # must not start either in its caller's process.
        monitor_interval = 0
        _lock = threading.RLock()

    return _Bar
