"""What the commands print: results on stdout; errors, one line each, and progress on stderr."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

from ..verdict.text import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Errors that a file or a value can cause. Other exceptions are bugs, and keep their traceback.
FAULTS = (ImportError, MemoryError, OSError, ValueError, TypeError, LookupError)


class Failure(Exception):
    """The job cannot be done; the text says why, in one line."""


@contextlib.contextmanager
def about(path: Path | str, *, writes: Path | None = None) -> Iterator[None]:
    """Turn errors into a Failure that names `path`; an OSError without a file name gets `writes`, if given."""
    try:
        yield
    except BrokenPipeError:
        raise
    except FAULTS as error:
        named = writes if writes is not None and isinstance(error, OSError) else path
        reason = reason_of(error)
        if getattr(error, "filename", None) is None and not reason.startswith(tuple(names_of(path, writes))):
            reason = f"{named}: {reason}"
        raise Failure(as_given(reason, path, writes)) from None


def names_of(*paths: Path | str | None) -> list[str]:
    """What an error's text begins with that names a path; a short relative path may begin other words."""
    return [name for path in paths if path is not None for name in (os.path.abspath(path), f"{path}: ")]


def as_given(reason: str, *paths: Path | str | None) -> str:
    """The reason, with the path as the user gave it instead of the absolute one."""
    for path in paths:
        if path is not None and reason.startswith(f"{os.path.abspath(path)}: "):
            return f"{path}{reason[len(os.path.abspath(path)) :]}"
    return reason


def reason_of(error: BaseException) -> str:
    if isinstance(error, MemoryError) and not str(error):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        named = isinstance(error.filename, (str, bytes, os.PathLike))
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if named else error.strerror
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() would add quotes
    return str(error) or type(error).__name__


def complain(prog: str, message: str) -> None:
    """Write one line to stderr, if there is a stderr."""
    with contextlib.suppress(AttributeError, OSError):
        sys.stderr.write(f"{prog}: {printable(' '.join(message.split()))}\n")


def let_go_of_output() -> None:
    """Flush stdout, or drop it: Python flushes it at exit, and would report an error a second time."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError):
        with contextlib.suppress(AttributeError, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """The text with escapes for control characters: names from a file must not control the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(text: str) -> None:
    """Print, with escapes for the characters that the output's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# ---- Progress --------------------------------------------------------------------------------------------------------

# Seconds before the first line of progress, and between updates.
PATIENCE, PAUSE = 1.0, 0.2


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[int, int | None, int], None] | None]:
    """A function to call with the rows done, the total if known, and the bytes done; None if stderr is no terminal.

    It shows one line, needs no tqdm, and erases the line at the end.
    """
    stream = sys.stderr
    if quiet or stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    start = shown = time.monotonic()
    width = 0

    def report(rows: int, total: int | None, nbytes: int) -> None:
        nonlocal shown, width
        now = time.monotonic()
        if now - start < PATIENCE or (width and now - shown < PAUSE):
            return
        # A longer line would wrap, and each report would scroll.
        line = progress_line(rows, total, nbytes, now - start)[: shutil.get_terminal_size().columns - 1]
        write(stream, f"\r{line.ljust(width)}")
        shown, width = now, len(line)

    try:
        yield report
    finally:
        if width:
            write(stream, f"\r{' ' * width}\r")


def write(stream: TextIO, text: str) -> None:
    # The job goes on if the terminal is gone.
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


def progress_line(rows: int, total: int | None, nbytes: int, seconds: float) -> str:
    parts = [f"{rows:,} rows" if total is None else f"{rows:,} of {total:,} rows"]
    if total:
        parts[0] += f" ({rows / total:.0%})"
    if nbytes:
        parts.append(f"{human_bytes(nbytes / seconds)}/s")
    if total and 0 < rows <= total:
        left = round(seconds * (total - rows) / rows)
        parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    return ", ".join(parts)
