"""The plots of a report: error against bytes, and histograms of cosines. Uses matplotlib, but none of its state."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.replace import replacing
from .measures import EDGES
from .text import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .measures import Cosines
    from .report import Report, Variant

DRAWING = threading.Lock()
FORMATS = (".svg", ".png", ".pdf")
# Each colour is legible on white and on black.
COLORS = ("#3b82c4", "#d9762b", "#2f9e6e")
MARKERS = ("o", "s", "D", "^", "v")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2, 2)))
FONT_SIZE, LABEL_SIZE = 10, 9
# Offsets of a label from its point, in points, and the label's alignment; earlier ones are better.
PLACES = [
    (x * far, y * far, side)
    for far in (1, 1.8, 2.6, 3.4)
    for x, y, side in [(9, 0, "left"), (-9, 0, "right"), (0, 11, "center"), (0, -11, "center"), (8, 9, "left")]
]


@contextlib.contextmanager
def our_style(color: str = "black") -> Iterator[None]:
    """Use matplotlib's defaults and our changes, whatever the caller has set; the caller's settings are restored."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        style = importlib.import_module("matplotlib.style")
    except ImportError:
        raise ImportError("a plot needs the matplotlib package: pip install 'qembag[plot]'") from None
    parts = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    ours = dict.fromkeys(parts, color) | {
        # Text stays text; with a fixed salt, the ids inside an SVG are not random.
        "svg.fonttype": "none",
        "svg.hashsalt": "qembag",
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": LABEL_SIZE,
    }
    # Matplotlib's settings are global: without the lock, a second thread could restore the first one's as the caller's.
    with DRAWING, matplotlib.rc_context(), style.context(["default", ours]):
        yield


def save(report: Report, path: str | os.PathLike[str]) -> None:
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in FORMATS:
        raise ValueError(f"path must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {os.fspath(path)!r}")
    with our_style():
        figure = new_figure(12, 5)
        errors, rows, bags = figure.subfigures(1, 3, width_ratios=[1.25, 1, 1])
        draw_errors(report, errors)
        draw_histograms(report, "rows", rows)
        draw_histograms(report, "bags", bags)
        errors.suptitle("error and bytes")
        rows.suptitle("cosines of rows")
        bags.suptitle("cosines of pooled bags")
        # Without dates, so that every call gives the same bytes.
        picture = io.BytesIO()
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(picture, format=kind[1:], dpi=150, metadata=undated)
    with replacing(target) as file:
        file.write(picture.getbuffer())


def svgs(report: Report, color: str) -> dict[str, str]:
    """Three SVG pictures as text, with lines and text in this colour, transparent, narrow enough for phones."""
    found = {}
    with our_style(color):
        for name, height in (("errors", 3.9), ("bags", 4.5), ("rows", 4.5)):
            figure = new_figure(4, height)
            if name == "errors":
                draw_errors(report, figure)
            else:
                draw_histograms(report, name, figure)
            picture = io.StringIO()
            figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
            found[name] = picture.getvalue()
    return found


def new_figure(width: float, height: float) -> Any:
    """A figure that pyplot does not know, so that the caller's code does not see it."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


class Looks:
    """A colour for each method; a marker and a dash for each group size."""

    def __init__(self, report: Report) -> None:
        methods = dict.fromkeys(variant.method for variant in report.variants)
        sizes = dict.fromkeys(variant.group_size for variant in report.variants)
        self.colors = {method: COLORS[number % len(COLORS)] for number, method in enumerate(methods)}
        self.markers = {size: MARKERS[number % len(MARKERS)] for number, size in enumerate(sizes)}
        self.dashes = {size: DASHES[number % len(DASHES)] for number, size in enumerate(sizes)}

    def legend(self, axes: Any, color: str, *, marks: bool) -> None:
        lines = importlib.import_module("matplotlib.lines")
        entries = [lines.Line2D([], [], color=one, label=method) for method, one in self.colors.items()]
        for size, dash in self.dashes.items():
            form = {"marker": self.markers[size], "linestyle": ""} if marks else {"linestyle": dash}
            label = "whole rows" if size is None else f"groups of {size}"
            entries.append(lines.Line2D([], [], color=color, label=label, markersize=5, fillstyle="none", **form))
        axes.legend(handles=entries, loc="outside lower center", ncols=2, handlelength=1.8)


# ---- Error against bytes ---------------------------------------------------------------------------------------------


def draw_errors(report: Report, figure: Any) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    looks, axes = Looks(report), figure.subplots()
    for variant in report.variants:
        place = ([variant.nbytes], [variant.relative_error])
        color = looks.colors[variant.method]
        form = {"marker": looks.markers[variant.group_size], "markersize": 6, "linestyle": ""}
        axes.plot(*place, color=color, markerfacecolor=color if variant.group_size is None else "none", **form)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(ticker.LogLocator(2, numticks=6))
    axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value).replace(".0 ", " "))
    if all(variant.relative_error > 0 for variant in report.variants):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.margins(0.25, 0.12)
    axes.set_xlabel("bytes of the table")
    axes.set_ylabel("relative error")
    axes.grid(alpha=0.2, linewidth=0.6)
    looks.legend(figure, axes.xaxis.label.get_color(), marks=True)
    figure.figure.draw_without_rendering()  # which lays out the figure
    label_points(axes, report.variants)


def label_points(axes: Any, variants: tuple[Variant, ...]) -> None:
    """One label per layout, beside the first method's point, where it hides no point and no other label."""
    scale = 72 / axes.figure.figure.dpi
    to_points = axes.transData.transform
    marks = [to_points((variant.nbytes, variant.relative_error)) * scale for variant in variants]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
    frame = axes.bbox.extents * scale
    labelled = set()
    for variant, (x, y) in zip(variants, marks, strict=True):
        text = variant.layout_label.replace(" in groups of ", "/")
        if text in labelled:
            continue
        labelled.add(text)
        width = 0.6 * LABEL_SIZE * len(text)
        for dx, dy, side in PLACES:
            left = x + dx - {"left": 0, "right": width, "center": width / 2}[side]
            box = (left, y + dy - 0.7 * LABEL_SIZE, left + width, y + dy + 0.7 * LABEL_SIZE)
            inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(overlap(box, other) for other in taken):
                break
        else:
            continue  # no room: better no label than one that hides another
        taken.append(box)
        at = (variant.nbytes, variant.relative_error)
        form = {"ha": side, "va": "center_baseline", "fontsize": LABEL_SIZE, "textcoords": "offset points"}
        if abs(dx) + abs(dy) > 17:  # another point may be as near
            form["arrowprops"] = {"arrowstyle": "-", "linewidth": 0.5, "color": axes.xaxis.label.get_color()}
        axes.annotate(text, at, (dx, dy), **form)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---- Histograms of cosines -------------------------------------------------------------------------------------------


def draw_histograms(report: Report, part: str, figure: Any) -> None:
    """One panel per bit width, over 1 - cosine on a log scale, since the ranges of two widths hardly overlap."""
    ticker = importlib.import_module("matplotlib.ticker")
    looks = Looks(report)
    widths = list(dict.fromkeys(variant.bits for variant in report.variants))
    panels = figure.subplots(len(widths), 1, squeeze=False)[:, 0]
    for bits, axes in zip(widths, panels, strict=True):
        there = [variant for variant in report.variants if variant.bits == bits]
        for variant in there:
            cosines: Cosines = getattr(variant, part)
            shares = [100 * number / max(cosines.num_vectors, 1) for number in cosines.histogram]
            color, dash = looks.colors[variant.method], looks.dashes[variant.group_size]
            axes.stairs(shares, EDGES, color=color, linestyle=dash, linewidth=1.3)
            axes.stairs(shares, EDGES, color=color, fill=True, alpha=0.08)
        axes.set_title(f"{bits} bits", loc="left")
        axes.set_ylim(bottom=0)
        axes.set_xscale("log")
        axes.set_xlim(*reversed(used_edges([getattr(variant, part) for variant in there])))  # better to the right
        axes.xaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter(lambda value, _: cosine_of(value))
        axes.minorticks_off()
        axes.grid(axis="x", alpha=0.2, linewidth=0.6)
    panels[len(panels) // 2].set_ylabel("% of rows" if part == "rows" else "% of bags")
    panels[-1].set_xlabel("cosine")
    looks.legend(figure, panels[0].xaxis.label.get_color(), marks=False)


def used_edges(found: list[Cosines]) -> tuple[float, float]:
    """The edges around all counts of the histograms, a factor of two apart at least."""
    used = [number for cosines in found for number, count in enumerate(cosines.histogram) if count]
    first, last = (min(used), max(used) + 1) if used else (0, len(EDGES) - 1)
    low, high = EDGES[max(first - 1, 0)], EDGES[min(last + 1, len(EDGES) - 1)]
    return float(min(low, high / 2)), float(high)


def cosine_of(distance: float) -> str:
    """The text of a cosine, from 1 - cosine: ".99" for 0.01."""
    return f"{1 - distance:.9f}".rstrip("0").rstrip(".").removeprefix("0") or "0"
