"""`qembag compare`: bytes, error and speed of each way to quantize a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..verdict.compare import compare
from .arguments import count, from_zero
from .arrays import load_arrays
from .output import about, progress, show

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

EXAMPLE = """\
  qembag compare words.npy
  qembag compare model.safetensors --tensor embed.weight --bits 4 2 --html verdict.html
"""
# The argument for a group size of None.
WHOLE_ROW = "row"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="floats: a .npy or .safetensors file, or an index of several")
    add("--tensor", metavar="NAME", help="which tensor, if the file has several")
    add("--bits", type=int, choices=(8, 4, 2), nargs="+", default=(8, 4, 2), help="bits of a code (default: 8 4 2)")
    methods = ("minmax", "greedy", "lsq")
    add("--methods", choices=methods, nargs="+", default=("minmax", "lsq"), help="(default: minmax lsq)")
    add(
        "--group-sizes",
        metavar="N",
        type=group_size,
        nargs="+",
        default=(None, 32),
        help=f"elements that share a scale, or '{WHOLE_ROW}' for the whole row (default: {WHOLE_ROW} 32)",
    )
    bags = "a .npz file with your bags: indices, offsets and optionally per_sample_weights; or a .npy file"
    add("--bags", metavar="FILE", type=Path, help=f"{bags} in which each row is a bag (default: random, Zipf-like)")
    add("--sample", metavar="N", type=count, help="quantize this many rows (default: at most 200,000 and 256 MiB)")
    add("--threads", metavar="N", type=count, help="threads for quantizing (default: all cores)")
    add("--seed", metavar="N", type=from_zero, default=0, help="seed of the sample and the bags (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("--plot", metavar="FILE", type=Path, help="draw errors and cosines: .svg, .png or .pdf (needs matplotlib)")
    add("--html", metavar="FILE", type=Path, help="write the report as one page (needs matplotlib)")
    add("-q", "--quiet", action="store_true", help="show no progress")


def group_size(text: str) -> int | None:
    return None if text == WHOLE_ROW else count(text)


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    bags = None if options.bags is None else bags_of(options.bags)
    with about(options.file), progress(quiet=options.quiet) as report_rows:
        report = compare(
            options.file,
            bits=options.bits,
            methods=options.methods,
            group_sizes=options.group_sizes,
            bags=bags,
            sample=options.sample,
            tensor=options.tensor,
            num_threads=options.threads,
            seed=options.seed,
            progress=report_rows or False,
        )
    # Printed before plotting, which fails without matplotlib.
    show(json.dumps(report.to_dict(), indent=2, allow_nan=False) if options.json else str(report))
    if options.plot is not None:
        with about(options.plot):
            report.plot(options.plot)
    if options.html is not None:
        with about(options.html):
            report.to_html(options.html)


def bags_of(path: Path) -> Any:
    """The bags in a file, as `compare` takes them."""
    arrays = load_arrays(path)
    if path.suffix == ".npy":
        return arrays[""]
    with about(path):
        names = {"indices", "offsets"}
        if not names <= arrays.keys() <= names | {"per_sample_weights"}:
            found = ", ".join(sorted(arrays)) or "none"
            raise ValueError(f"must hold indices and offsets, and per_sample_weights if any, got {found}")
    bags = arrays["indices"], arrays["offsets"]
    return (*bags, arrays["per_sample_weights"]) if "per_sample_weights" in arrays else bags
