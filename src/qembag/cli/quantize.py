"""`qembag quantize`: quantize the tables of floats in a file to a file of codes, using little memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..formats.to_file import quantize_to_file
from ..interop.foreign import Wanted
from ..interop.load import open_others
from .arguments import count, key_and_value, refuse_existing
from .arrays import load_array
from .output import Failure, about, progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

EXAMPLE = """\
  qembag quantize words.npy words.safetensors --bits 4 --group-size 32 --name words
  qembag quantize model.safetensors.index.json tables.safetensors --tensor '*embed*'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="a .npy or .safetensors file, or an index of several")
    add("target", metavar="TARGET", type=Path, help="the .safetensors file to write")
    add("--bits", type=int, choices=(8, 4, 2), default=4, help="bits of a code (default: %(default)s)")
    add(
        "--method",
        choices=("lsq", "minmax", "greedy"),
        default="lsq",
        help="lsq has the smallest error; minmax and greedy give torch's bytes (default: %(default)s)",
    )
    add("--group-size", metavar="N", type=count, help="elements that share a scale (default: a whole row)")
    add("--scale-dtype", choices=("float32", "float16"), help="of scales (default: float32 at 8 bits, else float16)")
    add("--scale-first", action="store_true", help="put scales before codes, as FBGEMM and TorchRec do")
    add("--row-alignment", metavar="N", type=count, default=1, help="pad rows to a multiple of N bytes")
    which = parser.add_mutually_exclusive_group()
    pattern = "a tensor by name or pattern (*, ?), may be repeated; each becomes a table of its name"
    which.add_argument("--tensor", metavar="PATTERN", action="append", help=pattern)
    which.add_argument("--all", action="store_true", help="every 2-D tensor of floats")
    add("--name", help="name of the table, if there is only one (default: the tensor's, or 'table' from a .npy file)")
    add("--importance", metavar="FILE", type=Path, help="a .npy file with a weight for the error of each column")
    add("--metadata", metavar="KEY=VALUE", type=key_and_value, action="append", default=[], help="to keep in the file")
    add("--threads", metavar="N", type=count, help="threads of this job (default: all cores)")
    add("--resume", action="store_true", help="continue from TARGET.part, which an interrupted run left")
    add("--force", action="store_true", help="replace TARGET if it exists")
    add("-q", "--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    if options.target.suffix != ".safetensors":
        wrong(f"TARGET must be a .safetensors file, got {options.target}")
    refuse_existing(options.target, options.force)
    if options.importance is not None and options.method != "lsq":
        wrong("--importance must come with --method lsq")
    importance = None if options.importance is None else load_array(options.importance)
    with about(options.source, writes=options.target), progress(quiet=options.quiet) as report:
        refuse_to_lose(options.source)
        try:
            quantize_to_file(
                options.source,
                options.target,
                options.bits,
                method=options.method,
                importance=importance,
                scale_dtype=options.scale_dtype,
                scale_first=options.scale_first,
                group_size=options.group_size,
                row_alignment=options.row_alignment,
                tensors=["*"] if options.all else options.tensor,
                name=options.name,
                metadata=dict(options.metadata),
                num_threads=options.threads,
                progress=report or False,
                resume=options.resume,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("--resume goes on from here") from None


def refuse_to_lose(source: Path) -> None:
    """Raise if the rows of a model of static text have a mapping or weights, which only `qembag convert` knows."""
    found = open_others(source, None, Wanted()) if source.suffix == ".safetensors" else None
    if found is None:
        return
    for table in found.tables.values():
        if table.mapping is not None or table.row_weights is not None:
            raise Failure(
                f"{source}: is a {found.format} file, whose mapping or weights would be lost; first: "
                f"qembag convert {source} OTHER.safetensors"
            )
