"""`qembag convert`: the tables of another library's file, in a file of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..interop.load import open_foreign, wanted_of
from ..interop.to_file import save_found
from ..verdict.text import human_bytes
from .arguments import add_foreign, by_name, refuse_existing
from .output import Failure, about, plural, progress, show

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

EXAMPLE = """\
  qembag convert model.pt tables.safetensors
  qembag convert torchrec.pt tables.safetensors --dims t1=64,t2=32 --bits 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = "what qembag.load_tables reads: a .pt file (torch, TorchRec, torchao), a model of model2vec, WordLlama or "
    add("source", metavar="SOURCE", type=Path, help=f"{source}sentence-transformers, GGUF, safetensors, .npy")
    add("target", metavar="TARGET", type=Path, help="the .safetensors file or .index.json to write")
    add(
        "--table",
        metavar="NAME",
        action="append",
        help="only this table, by its name or the last part; may be repeated",
    )
    add_foreign(parser)
    add("--force", action="store_true", help="replace TARGET if it exists")
    add("-q", "--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    if not options.target.name.endswith((".safetensors", ".index.json")):
        wrong(f"TARGET must be a .safetensors file or an .index.json, got {options.target}")
    bits, dims = (by_name(getattr(options, name), f"--{name}", wrong) for name in ("bits", "dims"))
    refuse_existing(options.target, options.force)
    done = nbytes = 0
    with about(options.source):
        found = open_foreign(
            Path(os.path.abspath(options.source)), options.format, wanted_of(bits, dims, options.table)
        )
        if options.target.exists() and options.target.samefile(options.source):
            raise Failure(f"{options.target}: is SOURCE itself: convert to another file")
    total = sum(table.num_rows for table in found.tables.values())
    with about(options.source, writes=options.target), progress(quiet=options.quiet) as report:

        def written(rows: int, size: int) -> None:
            nonlocal done, nbytes
            done, nbytes = done + rows, nbytes + size
            if report is not None:
                report(done, total, nbytes)

        size = save_found(found, options.target, written)
    show(f"Converted {plural(len(found.tables), 'table')} from {found.format}: {human_bytes(size)}.")
