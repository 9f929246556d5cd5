"""`qembag inspect`: what a file holds, and which of its rows look wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ..formats.collections import Saved, saved_in
from ..formats.sources import Source
from ..interop.load import wanted_of
from ..layout import RowLayout
from ..verdict.text import aligned, human_bytes
from .arguments import add_foreign, by_name
from .contents import blocks_of, contents_of, layout_of, num_stored, sample_of
from .output import about, plural, printable, progress, show

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from ..interop.foreign import Foreign
    from .contents import AnyTable, Contents

EXAMPLE = """\
  qembag inspect words.safetensors
  qembag inspect words.safetensors --json | python -m json.tool
"""
# A row is suspicious if its range is above this many times the median.
FAR_OUT = 100
# For each reason, this many suspicious rows are listed.
NAMED = 5
# Of a collection, this many features are listed; `--json` has all.
MOST_FEATURES = 20
# The median is of all scales up to about this many, and of evenly spaced ones beyond.
MOST_SCALES = 1 << 22
REASONS = {
    "not_finite": "with a NaN or an infinity",
    "scale_zero": "with a scale of 0",
    "zero": "of zeros",
    "constant": "of one value other than 0",
    "wide": f"with a range over {FAR_OUT} times the median",
}


class Found(NamedTuple):
    """Suspicious rows of one kind: how many, and the numbers of the first few."""

    rows: int
    first: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    files = "a .npy or .safetensors file, an index of several (*.index.json), or what `qembag convert` reads"
    add("file", metavar="FILE", type=Path, help=files)
    add_foreign(parser)
    add("--header", action="store_true", help="names, shapes, bytes and metadata only: read no rows")
    add("--json", action="store_true", help="print JSON")
    add("-q", "--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    bits, dims = (by_name(getattr(options, name), f"--{name}", wrong) for name in ("bits", "dims"))
    with about(options.file):
        contents = contents_of(options.file, options.format, wanted_of(bits, dims, None))
        collection = None if contents.collection is None else saved_in(contents.collection)
        entries = {name: described(table) for name, table in contents.tables.items()}
        if not options.header:
            total, rows, nbytes = sum(map(num_stored, contents.tables.values())), 0, 0
            with progress(quiet=options.quiet) as report:
                for name, table in contents.tables.items():
                    scan = Scan(table)
                    for count in scan.blocks():
                        contents.release()
                        rows, nbytes = rows + count, nbytes + count * entries[name]["row_bytes"]
                        if report is not None:
                            report(rows, total, nbytes)
                    entries[name] |= scan.result()
    if options.json:
        others = {
            tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.nbytes}
            for tensor in contents.tensors
        }
        whole = {"file": str(options.file), "tables": entries, "tensors": others, "metadata": contents.metadata}
        if collection is not None:
            of_features = {name: feature._asdict() for name, feature in collection.features.items()}
            whole["collection"] = {"dtype": collection.dtype, "features": of_features}
        if contents.format is not None:
            refused = {} if contents.refused is None else contents.refused.refused
            whole |= {"format": contents.format, "refused": refused}
        show(json.dumps(whole, indent=2, allow_nan=False))
    else:
        show("\n\n".join(filter(None, paragraphs(options.file, contents, collection, entries))))


def described(table: AnyTable | Source | Foreign) -> dict[str, Any]:
    """What is known about a table without reading its rows."""
    if isinstance(table, Source):
        rows = table.num_rows or 0
        entry = {"type": table.dtype, "num_embeddings": rows, "num_rows": rows, "dim": table.dim}
        return entry | {"row_bytes": table.row_nbytes, "bytes": rows * table.row_nbytes}
    layout = layout_of(table)
    entry = {
        "type": f"{layout.bits}-bit" if isinstance(layout, RowLayout) else layout.name,
        "num_embeddings": table.num_embeddings,
        "num_rows": table.num_rows,
        "dim": table.dim,
        "row_bytes": layout.row_bytes,
        "bytes": table.nbytes,
    }
    if isinstance(layout, RowLayout):
        entry["layout"] = {
            "bits": layout.bits,
            "scale_dtype": layout.scale_dtype.name,
            "scale_first": layout.scale_first,
            "group_size": layout.group_size if layout.num_groups > 1 else None,
        }
    return entry


class Scan:
    """One pass over a table's rows, block by block: the distribution of its scales, and suspicious rows."""

    def __init__(self, table: AnyTable | Source | Foreign) -> None:
        self._table, self._layout = table, None if isinstance(table, Source) else layout_of(table)
        finite, ranges = ranges_of(sample_of(table))
        self._median = float(np.median(ranges[finite])) if finite.any() else 0.0
        self._largest = 0.0
        self._found = {reason: Found(0, []) for reason in REASONS}
        self._scales: list[NDArray[np.float32]] = []
        # Counts of all, zero and negative scales; the least and the greatest finite scale.
        self._count = self._zero = self._negative = 0
        self._least, self._greatest = np.inf, -np.inf

    def blocks(self) -> Iterator[int]:
        """Scan block by block; yields the number of rows of each block after scanning it."""
        for numbers, values, pairs in blocks_of(self._table):
            self._add_values(numbers, values, pairs)
            if pairs is not None:
                self._add_scales(pairs[:, :, 0])
            yield len(numbers)

    def _add_values(self, numbers: NDArray[np.int64], values: NDArray[Any], pairs: NDArray[np.float32] | None) -> None:
        finite, ranges = ranges_of(values)
        self._largest = max(self._largest, float(ranges[finite].max(initial=0.0)))
        constant = ranges == 0
        is_zero = constant & (values[:, 0] == 0)
        if pairs is not None:
            finite &= np.isfinite(pairs).all(axis=(1, 2))
            self._add("scale_zero", numbers, (pairs[:, :, 0] == 0).any(axis=1))
        self._add("not_finite", numbers, ~finite)
        self._add("zero", numbers, is_zero)
        self._add("constant", numbers, constant & ~is_zero)
        self._add("wide", numbers, finite & (ranges > FAR_OUT * self._median) & (self._median > 0))

    def _add(self, reason: str, numbers: NDArray[np.int64], chosen: NDArray[np.bool_]) -> None:
        count, first = self._found[reason]
        more = numbers[chosen]
        self._found[reason] = Found(count + len(more), [*first, *more[: NAMED - len(first)].tolist()])

    def _add_scales(self, scales: NDArray[np.float32]) -> None:
        scales = scales.ravel()
        self._count += len(scales)
        self._zero += int(np.count_nonzero(scales == 0))
        self._negative += int(np.count_nonzero(scales < 0))
        finite = scales[np.isfinite(scales)]
        if len(finite):
            self._least = min(self._least, float(finite.min()))
            self._greatest = max(self._greatest, float(finite.max()))
        groups = self._layout.num_groups if isinstance(self._layout, RowLayout) else 1
        step = -(-num_stored(self._table) * groups // MOST_SCALES)
        self._scales.append(finite[::step].copy())

    def result(self) -> dict[str, Any]:
        """What the scan adds to the table's entry."""
        entry: dict[str, Any] = {"range": {"median": self._median, "max": self._largest}}
        if isinstance(self._layout, RowLayout):
            finite = np.concatenate([np.empty(0, np.float32), *self._scales])
            entry["scales"] = {
                "min": self._least if len(finite) else None,
                "median": float(np.median(finite)) if len(finite) else None,
                "max": self._greatest if len(finite) else None,
                "zero": self._zero / self._count if self._count else None,
                "negative": self._negative / self._count if self._count else None,
            }
        entry["suspicious"] = {reason: found._asdict() for reason, found in self._found.items() if found.rows}
        return entry


def ranges_of(values: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """For each row, whether it is finite, and its maximum minus its minimum, in float64 against overflow."""
    with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN, and float64
        high, low = (extreme(axis=1).astype(np.float64) for extreme in (values.max, values.min))
        ranges = high - low
    return np.isfinite(high) & np.isfinite(low) & np.isfinite(ranges), ranges


# ---- For people ------------------------------------------------------------------------------------------------------


def paragraphs(
    path: Path, contents: Contents, collection: Saved | None, entries: dict[str, dict[str, Any]]
) -> list[str]:
    nbytes = sum(entry["bytes"] for entry in entries.values()) + sum(tensor.nbytes for tensor in contents.tensors)
    held = [plural(len(entries), "table")]
    if contents.tensors:
        held.append(plural(len(contents.tensors), "other tensor"))
    kind = "" if contents.format is None else f" ({contents.format})"
    head = f"{printable(str(path))}{kind}: {', '.join(held)}, {human_bytes(nbytes)}"
    parts = [head, tables(entries), ranges(entries)]
    if collection is not None:
        parts.append(features(collection))
    suspicious = [
        f"  {printable(name)}: {plural(found['rows'], 'row')} {REASONS[reason]}: {listed(found)}"
        for name, entry in entries.items()
        for reason, found in entry.get("suspicious", {}).items()
    ]
    if suspicious:
        parts.append("\n".join(["suspicious rows", *suspicious]))
    elif any("suspicious" in entry for entry in entries.values()):
        parts.append("no suspicious rows")
    if contents.refused is not None:
        texts = [f"  {printable(name)} {printable(reason)}" for name, reason in contents.refused.refused.items()]
        hint = [f"  {contents.refused.hint} (here: --dims, --bits)"] if contents.refused.hint else []
        parts.append("\n".join(["tables that cannot be read", *texts, *hint]))
    if contents.tensors:
        lines = [["other tensor", "type", "shape", "bytes"]]
        for tensor in contents.tensors:
            shape = " x ".join(f"{length:,}" for length in tensor.shape)
            lines.append([printable(tensor.name), tensor.dtype, shape, human_bytes(tensor.nbytes)])
        parts.append(aligned(lines))
    if contents.metadata:
        texts = [f"  {printable(key)} = {printable(value)}" for key, value in contents.metadata.items()]
        parts.append("\n".join(["metadata", *texts]))
    return parts


def features(collection: Saved) -> str:
    """The features of a collection: the first few."""
    count = len(collection.features)
    some = itertools.islice(collection.features.items(), MOST_FEATURES)
    texts = [
        printable(f"{name} of {feature.table}{'' if feature.mode is None else f' ({feature.mode})'}")
        for name, feature in some
    ]
    if count > MOST_FEATURES:
        texts.append("...")
    output = "" if collection.dtype is None else f", {collection.dtype}"
    return f"collection of {plural(count, 'feature')}{output}: {', '.join(texts)}"


def tables(entries: dict[str, dict[str, Any]]) -> str:
    lines = [["table", "type", "rows", "stored", "dim", "group", "scale", "bytes a row", "bytes"]]
    for name, entry in entries.items():
        layout = entry.get("layout", {})
        lines.append(
            [
                printable(name),
                entry["type"],
                f"{entry['num_embeddings']:,}",
                f"{entry['num_rows']:,}",
                f"{entry['dim']:,}",
                f"{layout.get('group_size') or 'row'}" if layout else "-",
                f"{layout['scale_dtype']}{', first' if layout['scale_first'] else ''}" if layout else "-",
                f"{entry['row_bytes']:,}",
                human_bytes(entry["bytes"]),
            ]
        )
    return aligned(lines) if entries else ""


def ranges(entries: dict[str, dict[str, Any]]) -> str:
    scanned = {name: entry for name, entry in entries.items() if "range" in entry}
    has_scales = any("scales" in entry for entry in scanned.values())
    heads = ["least scale", "median scale", "greatest scale", "zero scales", "negative"] if has_scales else []
    lines = [["table", "median range", "largest range", *heads]]
    for name, entry in scanned.items():
        line = [printable(name), *(number(entry["range"][key]) for key in ("median", "max"))]
        if has_scales:
            scales = entry.get("scales", {})
            line += [number(scales.get(key)) for key in ("min", "median", "max")]
            line += [number(scales.get(key), ".2%") for key in ("zero", "negative")]
        lines.append(line)
    return aligned(lines) if scanned else ""


def number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def listed(found: dict[str, Any]) -> str:
    more = ", ..." if found["rows"] > len(found["first"]) else ""
    return ", ".join(map(str, found["first"])) + more
