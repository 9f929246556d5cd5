"""`qembag demo`: quantized tables against float32, on the same bags."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from .._runtime import show_config
from ..lookup import embedding_bag
from ..quantize import quantize
from ..verdict.text import aligned, human_bytes
from ..verdict.traffic import Batch, time_rounds, traffic
from .arguments import count, from_zero
from .contents import float_rows
from .output import about, show

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from numpy.typing import NDArray

EXAMPLE = """\
  qembag demo
  qembag demo --table embeddings.npy --bags 500
"""
DEFAULT_SHAPE = (200_000, 64)


class Contender(NamedTuple):
    """One line of the demo: a table, and how to look up a batch in it."""

    name: str
    nbytes: int
    look_up: Callable[[Batch], NDArray[np.float32]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    made = f"made here, {DEFAULT_SHAPE[0]:,} x {DEFAULT_SHAPE[1]}"
    add = parser.add_argument
    add("--table", metavar="FILE", type=Path, help=f"a .npy or .safetensors file, or an index (default: {made})")
    add("--tensor", metavar="NAME", help="which tensor, if the file has several tables of floats")
    add("--bags", metavar="N", type=count, default=1000, help="bags in a batch (default: %(default)s)")
    add("--length", metavar="N", type=count, default=50, help="mean rows per bag (default: %(default)s)")
    # One thread, like NumPy: a fair comparison, and stable when other processes use the cores.
    add("--threads", metavar="N", type=count, default=1, help="threads of a lookup (default: %(default)s)")
    add("--seed", metavar="N", type=from_zero, default=0, help="seed of the table and the bags (default: %(default)s)")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    """Print a plain-text table of float32 and quantized tables on the same bags, and its caption."""
    rng = np.random.default_rng(options.seed)
    if options.tensor is not None and options.table is None:
        wrong("--tensor must come with --table FILE")
    with about(options.table or "the table made here"):
        weights = make_table(rng) if options.table is None else float_rows(options.table, options.tensor)
        contenders = [Contender("float32", weights.nbytes, lambda batch: look_up_floats(weights, batch))]
        contenders += [quantized(weights, bits, options.threads) for bits in (8, 4, 2)]

    draw = traffic(rng, len(weights), options.bags, options.length)
    try:
        batch = draw()
        exact, *pooled = (contender.look_up(batch) for contender in contenders)
        rounds = [times for _, times in time_rounds([contender.look_up for contender in contenders], draw, rng)]
    except (MemoryError, ValueError) as error:
        wrong(f"--bags {options.bags} of --length {options.length} are too many: {error}")

    medians = np.median(rounds, axis=0)
    lines = [["table", "bytes", "share", "relative error", "worst cosine", "us a batch"]]
    for contender, vectors, nanoseconds in zip(contenders, [exact, *pooled], medians, strict=True):
        lines.append(
            [
                contender.name,
                human_bytes(contender.nbytes),
                f"{contender.nbytes / weights.nbytes:.1%}",
                f"{relative_error(vectors, exact):.5f}",
                f"{worst_cosine(vectors, exact):.6f}",
                f"{nanoseconds / 1e3:,.1f}",
            ]
        )
    show(f"{aligned(lines)}\n\n{caption(options, weights, len(rounds))}")


def make_table(rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows from a normal distribution; most of their scales are within a factor of three of each other."""
    scales = np.exp(rng.normal(scale=0.5, size=(DEFAULT_SHAPE[0], 1))).astype(np.float32)
    return rng.standard_normal(DEFAULT_SHAPE, dtype=np.float32) * scales


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
