"""The `qembag` command: describes this installation, and measures lookups from end to end."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from ._runtime import show_config
from ._table_file import load_table
from .lookup import embedding_bag
from .quantize import quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

DEFAULT_SHAPE = (200_000, 64)
# The median is stable within 30 rounds. Large tables and batches get fewer, so that the demo takes about 3 seconds.
MAX_ROUNDS, MIN_ROUNDS, MAX_SECONDS = 30, 3, 3.0


class Batch(NamedTuple):
    """Bags as `embedding_bag` takes them; the offsets do not include the end of the last bag."""

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]


class Contender(NamedTuple):
    """One line of the demo: a table, and how to look up a batch in it."""

    name: str
    nbytes: int
    look_up: Callable[[Batch], NDArray[np.float32]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process if not given.

    Returns
    -------
    int
        Exit status: 0, or 1 if the reader closes the output early.

    Raises
    ------
    SystemExit
        With status 2 and one line on stderr, if the arguments are wrong or the demo cannot run.

    Examples
    --------
    >>> from qembag.cli import main
    >>> main([])  # doctest: +ELLIPSIS
    qembag   ...
    level    ...
    0
    """
    try:
        try:
            parser = command_line()
            options = parser.parse_args(argv)
            if options.command is None:
                print(describe_installation())
            else:
                print(demo(options, parser.error))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `qembag demo | head -1`
        # Python flushes again at exit, and would report the error there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def command_line() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="qembag",
        description="Embedding lookups from 8-, 4- and 2-bit tables. Without a command: what this installation is.",
    )
    commands = parser.add_subparsers(dest="command", metavar="{demo}")
    about_demo = "quantize a table, look up bags of rows, and print bytes, error and speed"
    demo = commands.add_parser("demo", help=about_demo, description=f"{about_demo[0].upper()}{about_demo[1:]}.")
    made = f"made here, {DEFAULT_SHAPE[0]:,} x {DEFAULT_SHAPE[1]}"
    demo.add_argument(
        "--table",
        metavar="FILE",
        type=Path,
        help=f"a .npy file, which must not change meanwhile, or a .safetensors file (default: {made})",
    )
    demo.add_argument("--tensor", metavar="NAME", help="which tensor of a .safetensors file")
    demo.add_argument("--bags", metavar="N", type=count, default=1000, help="bags in a batch (default: %(default)s)")
    demo.add_argument("--length", metavar="N", type=count, default=50, help="mean rows of a bag (default: %(default)s)")
    # One thread, like NumPy: a fair comparison, and stable when other processes use the cores.
    demo.add_argument("--threads", metavar="N", type=count, default=1, help="of a lookup (default: %(default)s)")
    demo.add_argument("--seed", metavar="N", type=seed, default=0, help="of the traffic (default: %(default)s)")
    return parser


def count(text: str) -> int:
    return whole_number(text, 1)


def seed(text: str) -> int:
    return whole_number(text, 0)


def whole_number(text: str, minimum: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
    return number


def describe_installation() -> str:
    config = show_config()
    openmp = f"yes (specification {config['openmp_version']})" if config["openmp"] else "no"
    return "\n".join(
        [
            f"qembag   {config['version']}",
            f"level    {config['level']}",
            f"levels   {', '.join(config['levels'])}",
            f"OpenMP   {openmp}",
            f"threads  {config['num_threads']}",
        ]
    )


# ---- The demo ----------------------------------------------------------------------------------------------------


def demo(options: argparse.Namespace, fail: Callable[[str], NoReturn]) -> str:
    """Compare float32 and quantized tables on the same bags: returns a plain-text table and its caption."""
    rng = np.random.default_rng(options.seed)
    try:
        if options.table is not None:
            weights = load_table(options.table, options.tensor)
        elif options.tensor is not None:
            raise ValueError("--tensor must come with --table FILE")
        else:
            weights = make_table(rng)
        contenders = [Contender("float32", weights.nbytes, lambda batch: look_up_floats(weights, batch))]
        contenders += [quantized(weights, bits, options.threads) for bits in (8, 4, 2)]
    except (ImportError, MemoryError, OSError, ValueError) as error:
        place = "" if options.table is None else f"{options.table}: "
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fail(f"{place}{reason}")

    draw = traffic(rng, len(weights), options.bags, options.length)
    try:
        batch = draw()
        exact, *pooled = (contender.look_up(batch) for contender in contenders)
        rounds = time_rounds(contenders, draw, rng)
    except (MemoryError, ValueError) as error:
        fail(f"--bags {options.bags} of --length {options.length} are too many: {error}")

    medians = np.median(rounds, axis=0)
    lines = [["table", "bytes", "share", "relative error", "worst cosine", "us a batch"]]
    for contender, vectors, seconds in zip(contenders, [exact, *pooled], medians, strict=True):
        lines.append(
            [
                contender.name,
                human_bytes(contender.nbytes),
                f"{contender.nbytes / weights.nbytes:.1%}",
                f"{relative_error(vectors, exact):.5f}",
                f"{worst_cosine(vectors, exact):.6f}",
                f"{seconds * 1e6:,.1f}",
            ]
        )
    return "\n\n".join([aligned(lines), caption(options, weights, len(rounds))])


def make_table(rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows from a normal distribution; most of their scales are within a factor of three of each other."""
    scales = np.exp(rng.normal(scale=0.5, size=(DEFAULT_SHAPE[0], 1))).astype(np.float32)
    return rng.standard_normal(DEFAULT_SHAPE, dtype=np.float32) * scales


def traffic(rng: np.random.Generator, num_rows: int, num_bags: int, mean_length: int) -> Callable[[], Batch]:
    """Return a function that draws batches. Rows are skewed like words and clicks; popular ones are scattered.

    The row of popularity rank r has a probability of ``log(1 + 1 / r) / log(num_rows + 1)``: Zipf's law.
    """
    row_of_rank = rng.permutation(num_rows)

    def draw() -> Batch:
        lengths = rng.integers(1, 2 * mean_length, num_bags)
        ranks = (num_rows + 1) ** rng.random(lengths.sum())
        # Rounding can make a power equal its limit, num_rows + 1.
        indices = row_of_rank[np.minimum(ranks.astype(np.int64), num_rows) - 1]
        return Batch(indices, np.cumsum(lengths) - lengths)

    return draw


def look_up_floats(weights: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
    """Sums by plain NumPy, bag by bag: with 50 rows a bag 2 to 3 times as fast as one `np.add.reduceat`."""
    sums = np.empty((len(batch.offsets), weights.shape[1]), dtype=np.float32)
    ends = [*batch.offsets[1:].tolist(), len(batch.indices)]
    for bag, (start, end) in enumerate(zip(batch.offsets.tolist(), ends, strict=True)):
        np.add.reduce(weights.take(batch.indices[start:end], axis=0), axis=0, out=sums[bag])
    return sums


def quantized(weights: NDArray[np.float32], bits: int, num_threads: int) -> Contender:
    table = quantize(weights, bits, num_threads=num_threads)

    def look_up(batch: Batch) -> NDArray[np.float32]:
        return embedding_bag(table, batch.indices, batch.offsets, num_threads=num_threads)

    return Contender(f"{bits}-bit", table.nbytes, look_up)


def time_rounds(contenders: list[Contender], draw: Callable[[], Batch], rng: np.random.Generator) -> list[list[float]]:
    """For each round, the seconds of each contender on a fresh batch."""
    rounds: list[list[float]] = []
    end = time.perf_counter() + MAX_SECONDS
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and time.perf_counter() < end):
        batch = draw()
        seconds = [0.0] * len(contenders)
        # In random order: otherwise each contender would always run with the caches that the same other one left.
        for number in rng.permutation(len(contenders)):
            start = time.perf_counter()
            contenders[number].look_up(batch)
            seconds[number] = time.perf_counter() - start
        rounds.append(seconds)
    return rounds


def relative_error(vectors: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Root of the sum of squared errors over the sum of squares; nan if all sums are zero."""
    size = np.linalg.norm(exact.astype(np.float64))
    return float(np.linalg.norm(vectors.astype(np.float64) - exact) / size) if size else np.nan


def worst_cosine(vectors: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """The min over bags of the cosine with the exact sum. Zero sums have no direction; nan if all are zero."""
    kept = exact.any(axis=1)
    a, b = vectors[kept].astype(np.float64), exact[kept].astype(np.float64)
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.divide((a * b).sum(axis=1), sizes, out=np.zeros(len(a)), where=sizes > 0)
    return float(cosines.min()) if len(cosines) else np.nan


def human_bytes(number: float) -> str:
    if number < 1024:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:,.1f} TiB"


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def caption(options: argparse.Namespace, weights: NDArray[np.float32], num_rounds: int) -> str:
    config = show_config()
    source = "made here" if options.table is None else options.table.name
    return (
        f"{weights.shape[0]:,} x {weights.shape[1]} ({source}); {options.bags:,} bags a batch, "
        f"{options.length:,} rows a bag on average (1 to {2 * options.length - 1:,}), Zipf-like traffic.\n"
        f"Error and cosine: sums of one batch, against float32's. "
        f"Time: median of {num_rounds} rounds, each a fresh batch.\n"
        f"Quantized: qembag {config['version']}, {config['level']}, threads: {options.threads}. "
        f"float32: NumPy {np.__version__}, bag by bag, threads: 1. Python {platform.python_version()}."
    )
