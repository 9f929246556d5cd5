"""`qembag dequantize`: the values of tables as floats, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..formats.replace import replacing
from ..formats.safetensors_file import header_bytes
from .arguments import TABLES, refuse_existing
from .arrays import little_endian, npy_rows
from .contents import chosen, numbers_of, opened, tell_what_is_left_out
from .output import about, progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from .contents import AnyTable


EXAMPLE = """\
  qembag dequantize words.safetensors words.npy
  qembag dequantize tables.safetensors floats.safetensors --dtype float16
"""
TENSOR_DTYPES = {"float32": "F32", "float16": "F16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help=TABLES)
    add("target", metavar="TARGET", type=Path, help="a .npy file for one table, or a .safetensors file for all")
    add("--table", metavar="NAME", help="only this table")
    add("--dtype", choices=tuple(TENSOR_DTYPES), default="float32", help="type of the floats (default: %(default)s)")
    add("--force", action="store_true", help="replace TARGET if it exists")
    add("-q", "--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    if options.target.suffix not in (".npy", ".safetensors"):
        wrong(f"TARGET must be a .npy or a .safetensors file, got {options.target}")
    refuse_existing(options.target, options.force)
    with about(options.source):
        tables, is_foreign = opened(options.source, options.table)
        some: dict[str, AnyTable] = dict(tables)
        if options.table is not None or options.target.suffix == ".npy":
            name = chosen(tables, options.table)
            some = {name: tables[name]}
        elif not is_foreign:
            tell_what_is_left_out("qembag dequantize", options.source, options.target, tables)
    with (
        about(options.source, writes=options.target),
        replacing(options.target) as file,
        progress(quiet=options.quiet) as report,
    ):
        blocks = values(some, options.dtype, report)
        if options.target.suffix == ".npy":
            (table,) = some.values()
            with npy_rows(file, table.dim, options.dtype) as write:
                for rows in blocks:
                    write(rows)
        else:
            shapes = [(name, TENSOR_DTYPES[options.dtype], table.shape) for name, table in sorted(some.items())]
            file.write(header_bytes(shapes, tables.metadata))
            for rows in blocks:
                file.write(little_endian(rows))


def values(
    tables: Mapping[str, AnyTable], dtype: str, report: Callable[[int, int | None, int], None] | None
) -> Iterator[NDArray[Any]]:
    """The rows of all tables, sorted by name, some megabytes at a time; pruned rows are zeros."""
    total, done, nbytes = sum(table.num_embeddings for table in tables.values()), 0, 0
    for name, table in sorted(tables.items()):
        for numbers in numbers_of(table):
            exact = table.dequantize(numbers)
            with np.errstate(over="ignore"):
                rows = exact.astype(dtype, copy=False)
            lost = np.argwhere(np.isinf(rows) & np.isfinite(exact))
            if len(lost):
                row, column = lost[0]
                raise ValueError(
                    f"--dtype must be float32 for values beyond float16: row {numbers[row]} of table {name!r} has "
                    f"{exact[row, column]:g}"
                )
            yield rows
            done, nbytes = done + len(rows), nbytes + rows.nbytes
            if report is not None:
                report(done, total, nbytes)
