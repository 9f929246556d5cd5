"""`qembag lookup`: rows, and sums of bags of rows, from a file's table."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..formats.replace import replacing
from ..lookup import embedding, embedding_bag
from .arguments import TABLES
from .arrays import load_array, npy_rows, npy_to_stdout
from .contents import rows_at_once, stored_table
from .output import about, progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from numpy.typing import NDArray

    from .arrays import Write
    from .contents import AnyTable

EXAMPLE = """\
  qembag lookup words.safetensors --indices bags.npy --mode mean --out vectors.npy
  echo 3 17 17 4 | qembag lookup words.safetensors
"""
# Text is read in pieces of at most this many bytes.
CHUNK = 1 << 18
SEPARATORS = {"text": b" ", "csv": b","}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help=f"{TABLES}; or floats in a .npy file")
    add("--table", metavar="NAME", help="which table, if the file has several")
    add(
        "--indices",
        metavar="FILE",
        type=Path,
        default=Path("-"),
        help="a .npy file (2-D: each row is a bag; 1-D: rows to look up), or text: each line is a bag, row numbers "
        "from 0 separated by spaces or commas; - is standard input (the default), answered line by line",
    )
    modes = ("sum", "mean", "max", "sqrtn")
    add("--mode", choices=modes, help="how the rows of a bag become one vector (default: sum)")
    add("--weights", metavar="FILE", type=Path, help="a .npy file with a weight for each of the --indices, for sums")
    add("--out", metavar="FILE", type=Path, default=Path("-"), help="where to write (default: -, standard output)")
    add(
        "--format",
        choices=("npy", "text", "csv"),
        help="format of the vectors; text and csv have one per line (default: by the name of --out, else text)",
    )
    add("-q", "--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    is_array = options.indices.suffix == ".npy"
    if options.weights is not None and not is_array:
        wrong("--weights must come with --indices of a .npy file")
    to_stdout = options.out == Path("-")
    by_name = {".npy": "npy", ".csv": "csv"}.get(options.out.suffix, "text")
    form = options.format or by_name
    if to_stdout and form == "npy" and sys.stdout.isatty():
        wrong("--format npy must go to a file or a pipe, not to a terminal")
    with about(options.file):
        table = stored_table(options.file, options.table)
    vectors = of_array(table, options) if is_array else of_text(table, options)
    with contextlib.ExitStack() as stack:
        if not to_stdout:
            stack.enter_context(about(options.out))
            file = stack.enter_context(replacing(options.out))
            write = stack.enter_context(npy_rows(file, table.dim, "f4")) if form == "npy" else text_to(file, form)
        elif form == "npy":
            write = stack.enter_context(npy_to_stdout(table.dim, "f4"))
        else:
            write = text_to(sys.stdout.buffer, form)
        # No progress line between answers on the terminal.
        quiet = options.quiet or (to_stdout and sys.stdout.isatty())
        report = stack.enter_context(progress(quiet=quiet))
        done = nbytes = 0
        for some in vectors:
            write(some)
            done, nbytes = done + len(some), nbytes + some.nbytes
            if report is not None:
                report(done, None, nbytes)


def text_to(file: BinaryIO, form: str) -> Write:
    """A function that writes one vector per line, each number with as many digits as float32 needs."""
    separator = SEPARATORS[form]

    def write(vectors: NDArray[np.float32]) -> None:
        lines = vectors.astype("S32").tolist()
        file.write(b"".join(separator.join(line) + b"\n" for line in lines))
        # The program that wrote these lines may wait for their answers before it writes more.
        file.flush()

    return write


# ---- Indices in an array ---------------------------------------------------------------------------------------------


def of_array(table: AnyTable, options: argparse.Namespace) -> Iterator[NDArray[np.float32]]:
    indices = load_array(options.indices)
    weights = None if options.weights is None else load_array(options.weights)
    with about(options.indices):
        if indices.ndim not in (1, 2):
            raise ValueError(f"indices must have 1 or 2 dimensions, got shape {indices.shape}")
        if indices.ndim == 1 and (options.mode or weights is not None):
            raise ValueError("--mode and --weights are for bags: indices must have 2 dimensions, got 1")
        if weights is not None and weights.shape != indices.shape:
            raise ValueError(f"--weights must have the shape of the indices, {indices.shape}, got {weights.shape}")
        step = rows_at_once(table)
        for start in range(0, len(indices), step):
            refuse_wrong(indices[start : start + step], table.num_embeddings, start)
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            some = indices[part]
            if indices.ndim == 1:
                yield embedding(table, some)
            else:
                given = None if weights is None else weights[part]
                yield embedding_bag(table, some, mode=options.mode or "sum", per_sample_weights=given)


def refuse_wrong(some: NDArray[Any], num_embeddings: int, start: int) -> None:
    """Raise ValueError for an index out of range, with its place in the whole array."""
    if some.dtype.kind not in "iu":
        return  # the lookup raises for it
    wrong = np.argwhere((some < 0) | (some >= np.array(num_embeddings, np.int64)))
    if len(wrong):
        first, *rest = wrong[0].tolist()
        place = ", ".join(map(str, [start + first, *rest]))
        value = some[tuple(wrong[0])]
        raise ValueError(f"indices[{place}] is {value}: out of range for a table of {num_embeddings} rows")


# ---- Indices in text -------------------------------------------------------------------------------------------------


def of_text(table: AnyTable, options: argparse.Namespace) -> Iterator[NDArray[np.float32]]:
    """The vectors of each line. Lines that have arrived are answered before waiting for more."""
    mode: Any = options.mode or "sum"
    is_stdin = options.indices == Path("-")
    with about("standard input" if is_stdin else options.indices), contextlib.ExitStack() as stack:
        if is_stdin and sys.stdin is None:
            raise OSError("it is closed")
        file = sys.stdin.buffer if is_stdin else stack.enter_context(options.indices.open("rb"))
        number, step = 1, rows_at_once(table)
        for lines in lines_of(file):
            for start in range(0, len(lines), step):
                bags = [line.replace(b",", b" ").split() for line in lines[start : start + step]]
                numbers, fault = parsed(bags, table.num_embeddings)
                lengths = [len(bag) for bag in bags[: len(bags) if fault is None else fault[0]]]
                if lengths:
                    yield embedding_bag(table, numbers, lengths=lengths, mode=mode)
                if fault is not None:
                    raise ValueError(f"line {number + start + fault[0]}: {fault[1]}")
            number += len(lines)


def lines_of(file: Any) -> Iterator[list[bytes]]:
    """Lines as they arrive, as many at once as are available."""
    pieces: list[bytes] = []
    while chunk := file.read1(CHUNK):
        pieces.append(chunk)
        if b"\n" in chunk:
            *lines, rest = b"".join(pieces).split(b"\n")
            pieces = [rest] if rest else []
            yield lines
    if pieces:
        yield [b"".join(pieces)]


def parsed(bags: list[list[bytes]], num_embeddings: int) -> tuple[NDArray[np.int64], tuple[int, str] | None]:
    """The numbers of the bags before the first wrong one; and its place and the reason, or None."""
    try:
        numbers = np.array([int(word) for bag in bags for word in bag], dtype=np.int64)
        wrong = (numbers < 0) | (numbers >= num_embeddings)
        if not wrong.any() and not any(b"_" in word for bag in bags for word in bag):
            return numbers, None
    except (OverflowError, ValueError):
        pass
    good: list[int] = []
    for place, bag in enumerate(bags):
        for word in bag:
            if fault := fault_of(word, num_embeddings):
                return np.array(good, np.int64), (place, fault)
        good += map(int, bag)
    raise AssertionError("internal error: no bag is wrong")


def fault_of(word: bytes, num_embeddings: int) -> str | None:
    text = ascii(word.decode("utf-8", "replace"))
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    if not re.fullmatch(rb"[+-]?[0-9]+", word):
        return f"{shown} is not a whole number"
    # Python refuses to read thousands of digits.
    if len(word) > 100 or not 0 <= int(word) < num_embeddings:
        return f"index {shown.strip(chr(39))} is out of range for a table of {num_embeddings} rows"
    return None
