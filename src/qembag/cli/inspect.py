"""`qembag inspect`: what a file holds, and which of its rows look wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ..table import QuantizedTable
from .contents import Contents, TableBlocks, contents_of
from .output import about, aligned, human_bytes, printable, progress, show

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from numpy.typing import NDArray

EXAMPLE = """\
  qembag inspect words.safetensors
  qembag inspect words.safetensors --json | python -m json.tool
"""
# Rows whose range is above this many times the median are far out.
FAR_OUT = 100
# The median range is of at most so many rows, evenly spaced; a median of scales of about as many.
SAMPLE = 100_000
# Of suspicious rows, the first so many are named.
NAMED = 5
REASONS = {
    "not_finite": "not finite",
    "scale_zero": "a scale of 0",
    "zeros": "all zeros",
    "constant": "constant, not zeros",
    "wide": f"range over {FAR_OUT} times the median",
}


class Found(NamedTuple):
    """Rows of one kind: how many, and the first few by number."""

    count: int
    first: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="a .npy or .safetensors file, or an index of several (*.index.json)")
    add("--header", action="store_true", help="names, shapes, bytes and metadata only: read no rows")
    add("--json", action="store_true", help="print JSON")
    add("-q", "--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    with about(options.file):
        contents = contents_of(options.file)
        tables = [described(table) for table in contents.tables]
        if not options.header:
            with progress(quiet=options.quiet) as report:
                done = 0
                total = sum(table.num_rows for table in contents.tables)
                for table, entry in zip(contents.tables, tables, strict=True):
                    entry |= scanned(table, lambda rows, nbytes: report and report(rows, total, nbytes), done)
                    done += table.num_rows
    if options.json:
        show(json.dumps(as_json(contents, tables), indent=2, allow_nan=False))
    else:
        show("\n\n".join(filter(None, paragraphs(contents, tables))))
