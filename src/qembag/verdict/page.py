"""A report as one page for a browser: no script, no network, no other file."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..formats.replace import replacing
from . import plots
from .report import cosine_text
from .text import human_bytes

if TYPE_CHECKING:
    import os

    from .report import Report, Variant

# A placeholder in the pictures for the page's text colour, which a dark scheme changes.
INK = "#010203"
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #59636e; --line: #d5dae0; --panel: #f4f6f8;
  --good: #e3f4ea; --mark: #1f7a4d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --quiet: #9da7b1; --line: #343b42;
  --panel: #1d2125; --good: #173426; --mark: #6fd3a0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .75rem; }
p { margin: .35rem 0; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.verdict { margin-top: 1.25rem; padding: 1rem; background: var(--panel); border-left: .3rem solid var(--quiet);
  border-radius: .25rem; }
.verdict.good { background: var(--good); border-color: var(--mark); }
.verdict h2 { margin: 0; font-size: .85rem; color: var(--quiet); }
.words { max-width: none; font-size: 1.2rem; font-weight: 600; line-height: 1.35; }
code { font: .85rem/1.4 ui-monospace, monospace; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .25rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; }
th, td { padding: .4rem .55rem; text-align: right; white-space: nowrap; font-weight: 400; }
thead th { color: var(--quiet); vertical-align: bottom; }
thead [scope=colgroup] { text-align: center; border-bottom: 1px solid var(--line); }
tbody tr { border-top: 1px solid var(--line); }
.scroll tbody th, thead [rowspan] { position: sticky; left: 0; text-align: left; background: var(--paper);
  border-right: 1px solid var(--line); }
.scroll .chosen td, .scroll .chosen th { background: var(--good); font-weight: 600; }
.chosen small { display: block; color: var(--mark); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figcaption { margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; max-width: 30rem; stroke-linejoin: round; }
svg text { font-family: inherit !important; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; }
dd, .verdict p, main > p { max-width: 46rem; }
@media (max-width: 40rem) { tbody th { white-space: normal; min-width: 6.5rem; } th, td { padding: .4rem; } }
"""
FIGURES = {
    "errors": (
        "Error against bytes",
        "Left is smaller, down is closer to the float32 rows. “4 bits/32” is 4 bits in groups of 32.",
    ),
    "bags": ("Cosines of pooled bags", "How the sums of rows keep their direction. Right is better."),
    "rows": ("Cosines of rows", "How single rows keep their direction. Right is better."),
}
MEANINGS = {
    "Times smaller": "Bytes of the table as it was given, over the bytes of the quantized one.",
    "Cosine of pooled bags": "Between the sum of the rows of a bag in float32, and the sum that a lookup in the "
    "quantized table gives. 1 is the same direction. This is what a model sees that sums or averages rows.",
    "Cosine of rows": "The same for single rows: what a nearest-row search sees.",
    "Worst, 1st percentile": "The lowest cosine, and the one that 1% of the cosines lie below.",
    "Relative error": "Square root of: sum of squared errors / sum of squares, over all elements of the rows.",
    "Time": "Nanoseconds per looked-up row on the machine that made this page, with one thread.",
}


def save(report: Report, path: str | os.PathLike[str], min_cosine: float) -> None:
    # A file's name may have lone surrogates, which UTF-8 cannot encode.
    text = page(report, min_cosine).encode("utf-8", "replace")
    with replacing(Path(path)) as file:
        file.write(text)


def page(report: Report, min_cosine: float) -> str:
    pictures = plots.svgs(report, INK)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{shown(report.name)}: which way to quantize it</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1><bdi>{shown(report.name)}</bdi></h1>
<p class="quiet">{report.num_embeddings:,} rows of {report.dim}, {shown(report.dtype)}, {human_bytes(report.nbytes)}</p>
</header>
{verdict(report, min_cosine)}
{table(report, min_cosine)}
<h2>Plots</h2>
<div class="grid">
{"".join(figure(name, picture) for name, picture in pictures.items())}</div>
{worst_rows(report, min_cosine)}
<h2>What the numbers mean</h2>
<dl>
{"".join(f"<dt>{term}</dt><dd>{meaning}</dd>{chr(10)}" for term, meaning in MEANINGS.items())}</dl>
<h2>How they were measured</h2>
{"".join(f"<p>{shown(line)}</p>{chr(10)}" for line in report.caption().splitlines())}</main>
</body>
</html>
"""


def shown(text: str) -> str:
    """The text escaped for HTML, with a replacement character for each control character."""
    return html.escape(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text))


def verdict(report: Report, min_cosine: float) -> str:
    chosen = report.smallest(min_cosine)
    details = ""
    if chosen is not None:
        groups = "" if chosen.group_size is None else f", group_size={chosen.group_size}"
        call = f'qembag.quantize(weights, {chosen.bits}, method="{chosen.method}"{groups})'
        details = (
            f"<p>The smallest whose worst pooled cosine is {min_cosine:.9g} or more: "
            f"{human_bytes(report.nbytes)} become {human_bytes(chosen.nbytes)}. A row of a lookup takes "
            f"{chosen.ns_per_row:.1f} ns here, one of float32 {report.ns_per_row_float32:.1f} ns.</p>\n"
            f"<p><code>{shown(call)}</code></p>\n"
        )
    return (
        f'<section class="verdict{"" if chosen is None else " good"}" aria-labelledby="recommendation">\n'
        f'<h2 id="recommendation">Recommendation</h2>\n'
        f'<p class="words">{shown(report.recommendation(min_cosine))}</p>\n{details}</section>'
    )


def table(report: Report, min_cosine: float) -> str:
    """The table of variants, in a box that scrolls sideways under a fixed first column."""
    chosen = report.smallest(min_cosine)
    cosines = ("worst", "1st<br>percentile", "mean")
    names = ["bytes", "times<br>smaller", *cosines, "relative<br>error", *cosines, "ns<br>a row"]
    rows = []
    for variant in report.variants:
        is_chosen = variant is chosen
        note = "<small>recommended</small>" if is_chosen else ""
        cells = "".join(f"<td>{shown(cell)}</td>" for cell in variant.cells())
        start = '<tr class="chosen">' if is_chosen else "<tr>"
        rows.append(f'{start}<th scope="row">{shown(variant.label)}{note}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = "\n".join(rows)
    return f"""<h2 id="variants">All variants</h2>
<div class="scroll" role="region" aria-labelledby="variants" tabindex="0">
<table>
<colgroup span="1"></colgroup><colgroup span="2"></colgroup><colgroup span="3"></colgroup><colgroup span="1"></colgroup>
<colgroup span="3"></colgroup><colgroup span="1"></colgroup>
<thead>
<tr><th rowspan="2" scope="col">variant</th><td colspan="2"></td><th colspan="3" scope="colgroup">cosine of bags</th>
<td></td><th colspan="3" scope="colgroup">cosine of rows</th><td></td></tr>
<tr>{heads}</tr>
</thead>
<tbody>
{lines}
</tbody>
</table>
</div>"""


def figure(name: str, picture: str) -> str:
    title, meaning = FIGURES[name]
    label = html.escape(f"{title}. {meaning} The numbers are in the table.")
    return (
        f"<figure>\n<figcaption><b>{title}</b><br>{meaning}</figcaption>\n{inline(picture, name, label)}\n</figure>\n"
    )


def inline(picture: str, name: str, label: str) -> str:
    """An SVG by matplotlib for use inside the page: without external links, and with ids that no other picture has."""
    svg = picture[picture.index("<svg") :].strip()
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub("<svg[^>]*>", f'<svg {box[0] if box else ""} role="img" aria-label="{label}">', svg, count=1)
    return re.sub(r"\n\s*", "\n", svg.replace(INK, "currentColor"))


def worst_rows(report: Report, min_cosine: float) -> str:
    variant: Variant = report.smallest(min_cosine) or report.closest()
    lines = "".join(
        f'<tr><th scope="row">{number:,}</th><td>{cosine_text(cosine)}</td></tr>\n'
        for number, cosine in variant.worst_rows
    )
    return f"""<h2>Worst rows</h2>
<details>
<summary>The rows whose cosine is lowest with {shown(variant.label)}</summary>
<table style="width: auto">
<thead><tr><th scope="col">row</th><th scope="col">cosine</th></tr></thead>
<tbody>
{lines}</tbody>
</table>
</details>"""
