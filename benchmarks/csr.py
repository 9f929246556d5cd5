"""A sparse matrix times a table, beside SciPy: `python -m benchmarks.csr`, or with `--rows`, `--entries`, `--table`, `--dim`.

A matrix in CSR format, with about `--entries` float32 entries a row in columns drawn evenly or by Zipf's law, times a table
of float32 (SciPy's `matrix @ table`) or of 8, 4 and 2 bits (`qembag.embedding_bag(table, matrix)`). They take turns in one
process, on one thread: SciPy's product has no more. Each ratio is the median of those of the turns.

Writes a table to standard output. Its last two columns are the largest difference from SciPy's product with the
dequantized table, and with the float32 one as a share of what quantizing allows: the largest error of each row, times
its entry. The first is rounding: the sums are in another order, without fused multiply-adds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import qembag

from . import machine

# Rows whose products are compared.
COMPARED = 10_000


def matrix_of(rng: np.random.Generator, rows: int, entries: int, columns: int, skew: str) -> Any:
    """Rows of 0 to twice as many entries, in columns in no order and some twice."""
    import scipy.sparse

    lengths = rng.integers(0, 2 * entries + 1, rows)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if skew == "zipf":
        drawn = rng.permutation(columns)[(rng.zipf(1.05, ends[-1]) - 1) % columns]
    else:
        drawn = rng.integers(0, columns, ends[-1])
    values = rng.normal(size=ends[-1]).astype(np.float32)
    return scipy.sparse.csr_array((values, drawn.astype(np.int32), ends.astype(np.int32)), shape=(rows, columns))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(options.table, options.dim)).astype(np.float32)
    tables = {bits: qembag.quantize(weights, bits) for bits in (8, 4, 2)}
    out = np.empty((options.rows, options.dim), np.float32)
    about = machine.describe()
    print(
        f"{about['processor']}; {', '.join(f'{name} {machine.version(name)}' for name in ('numpy', 'scipy', 'qembag'))}"
    )
    print(
        f"{options.rows:,} rows of {options.entries} entries on average; a table of {options.table:,} x {options.dim}\n"
    )
    print("| columns | table | bytes | seconds | times as fast | with out= | difference | of what is allowed |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for skew in ("even", "zipf"):
        matrix = matrix_of(rng, options.rows, options.entries, options.table, skew)
        calls: dict[Any, Callable[[], object]] = {"scipy": lambda matrix=matrix: matrix @ weights}
        for bits, table in tables.items():
            calls[bits] = lambda table=table, matrix=matrix: qembag.embedding_bag(table, matrix)
            calls[bits, "out"] = lambda table=table, matrix=matrix: qembag.embedding_bag(table, matrix, out=out)
        times: dict[Any, list[float]] = {name: [] for name in calls}
        for _ in range(options.turns):
            for name, call in calls.items():
                times[name].append(seconds(call))
        typical = {name: statistics.median(found) for name, found in times.items()}
        print(f"| {skew} | float32, SciPy | {weights.nbytes:,} | {typical['scipy']:.3f} | 1 | | | |")
        for bits, table in tables.items():
            ratios = " | ".join(f"{ratio_of(times, key):.2f}" for key in (bits, (bits, "out")))
            found = differences(table, weights, matrix[:COMPARED])
            print(f"| {skew} | {bits} bits | {table.nbytes:,} | {typical[bits]:.3f} | {ratios} | {found} |")


def ratio_of(times: dict[Any, list[float]], name: Any) -> float:
    return statistics.median(a / b for a, b in zip(times["scipy"], times[name], strict=True))


def differences(table: qembag.QuantizedTable, weights: np.ndarray, matrix: Any) -> str:
    found = qembag.embedding_bag(table, matrix)
    rounding = np.abs(found - matrix @ table.dequantize()).max()
    errors = np.abs(weights - table.dequantize()).max(axis=1)
    allowed = (abs(matrix) @ errors)[:, None] + rounding
    return f"{rounding:.1e} | {(np.abs(found - matrix @ weights) / np.maximum(allowed, 1e-30)).max():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--entries", type=int, default=30)
    parser.add_argument("--table", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    qembag.set_num_threads(1)
    measure(options)


if __name__ == "__main__":
    main()
