"""The plots of the report. The same results give the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .cases import BITS, CASES

# Times hide behind each other less when colours and marks differ.
STYLES = {
    "qembag": {"color": "tab:blue", "marker": "o"},
    "torch": {"color": "tab:orange", "marker": "s"},
    "floor": {"color": "0.5", "marker": "."},
}


def draw(results: dict[str, Any], folder: Path, slug: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    # Ids inside an SVG are random, and a date is written, unless told otherwise.
    matplotlib.rcParams.update({"svg.hashsalt": "qembag", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figures = {"dims": draw_dims(pyplot, results["cases"])}
    if results.get("growth"):
        figures["growth"] = draw_growth(pyplot, results)
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(folder / f"{slug}-{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def draw_dims(pyplot: Any, cases: dict[str, Any]) -> Any:
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for panel, group in zip(panels, ("cached", "memory"), strict=True):
        for bits in BITS:
            base = f"{group}/{bits}bit"
            of_dims = [name for name in cases if re.fullmatch(rf"{base}(/dim=\d+)?", name) and name in CASES]
            points = [(CASES[name].dim, cases[name]) for name in sorted(of_dims, key=lambda name: CASES[name].dim)]
            dims = [dim for dim, _ in points]
            ratios = [case["ratio"]["median"] for _, case in points]
            low, high = ([case["ratio"]["interval"][end] for _, case in points] for end in (0, 1))
            panel.plot(dims, ratios, marker="o", markersize=3, label=f"{bits}-bit")
            panel.fill_between(dims, low, high, alpha=0.2, linewidth=0)
        panel.axhline(1, color="0.5", linewidth=0.8)
        panel.set(title=group, xscale="log", xlabel="dim")
        panel.set_xticks([8, 32, 64, 128, 256, 512, 1024], labels=["8", "32", "64", "128", "256", "512", "1024"])
        panel.minorticks_off()
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("PyTorch's time over qembag's")
    panels[0].legend()
    return figure


def draw_growth(pyplot: Any, results: dict[str, Any]) -> Any:
    growth = results["growth"]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for panel, width in zip(panels, ("8bit", "4bit"), strict=True):
        panel.set(title=f"{width}, rows of 64", xscale="log", xlabel="bytes of the table")
        if width not in growth:
            continue
        for name, times in growth[width]["ns"].items():
            panel.plot(growth[width]["bytes"], times, label=name, markersize=4, **STYLES[name])
        for name, num_bytes in results["machine"]["caches"].items():
            panel.axvline(num_bytes, color="0.7", linestyle="--", linewidth=0.8)
            panel.annotate(
                name, (num_bytes, 1), xycoords=("data", "axes fraction"), fontsize=7, va="bottom", ha="center"
            )
        panel.set_title(f"{width}, rows of 64", pad=14)
        panel.legend()
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("ns a row")
    return figure
