"""`qembag prune`: drop the rows of a table that are small, rarely used, or too many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..formats.collections import kept
from ..formats.saving import contents_of, save_contents
from ..pruning import choose_rows
from .arguments import TABLES, count, positive, refuse_existing
from .arrays import load_array
from .contents import chosen, opened, tell_what_is_left_out
from .output import about, plural, show

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

EXAMPLE = """\
  qembag prune words.safetensors small.safetensors --max-rows 10000 --counts counts.npy
  qembag prune words.safetensors small.safetensors --min-norm 0.5
"""
CONDITIONS = ("min_norm", "min_count", "max_rows", "max_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help=TABLES)
    add(
        "target",
        metavar="TARGET",
        type=Path,
        help="the .safetensors file or index to write, with SOURCE's other tables as well",
    )
    add("--table", metavar="NAME", help="the table to prune, if there are several")
    add("--min-norm", metavar="X", type=positive, help="keep rows of at least this norm")
    add("--min-count", metavar="N", type=count, help="keep rows that were looked up at least N times, by --counts")
    add("--max-rows", metavar="N", type=count, help="keep at most N rows, the most used or else the largest")
    add("--max-bytes", metavar="N", type=count, help="keep as many rows as fit in N bytes, including the mapping")
    add("--counts", metavar="FILE", type=Path, help="a .npy file: how often each row was looked up")
    add("--keep", metavar="FILE", type=Path, help="a .npy file: a mask of the rows to keep, or their numbers")
    add("--force", action="store_true", help="replace TARGET if it exists")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    conditions = {name: getattr(options, name) for name in CONDITIONS if getattr(options, name) is not None}
    if bool(conditions) == (options.keep is not None):
        wrong("give either --keep, or one or more of --min-norm, --min-count, --max-rows and --max-bytes")
    if (options.min_count is not None and options.counts is None) or (options.keep and options.counts):
        wrong("--counts must come with --min-count, and may with --max-rows and --max-bytes; not with --keep")
    if not options.target.name.endswith((".safetensors", ".index.json")):
        wrong(f"TARGET must be a .safetensors file or an .index.json, got {options.target}")
    refuse_existing(options.target, options.force)
    arrays = {
        name: np.asarray(load_array(path))
        for name, path in (("counts", options.counts), ("keep", options.keep))
        if path is not None
    }
    with about(options.source):
        tables, is_foreign = opened(options.source)
        tell_what_is_left_out("qembag prune", options.source, options.target, tables, is_foreign=is_foreign)
        name = chosen(tables, options.table)
        table = tables[name]
        if options.keep is None:
            choice = choose_rows(table, counts=arrays.get("counts"), **conditions)
            pruned, summary = table.prune(choice.keep), str(choice)
    if options.keep is not None:
        with about(options.keep):
            pruned = table.prune(arrays["keep"])
            summary = f"Keeps {plural(pruned.num_rows, 'row')} of {table.num_rows:,}."
    with about(options.target):
        contents = contents_of({**tables, name: pruned})
        save_contents(options.target, contents, tables.metadata | kept(tables._collection, contents))
    show(summary)
