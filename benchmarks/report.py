"""The Markdown of the results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .cases import BITS, CASES, TARGETS

# A ratio below this is named, whatever the reason.
SLOWER = 0.95
HOW = """\
Each contender works in a process of its own, and they take turns, round by round, in changing order; a turn is about
10 ms of calls after an idle pause and untimed calls that wake it up. The first rounds are thrown away. Indices are drawn
outside the timed part, the same for all contenders of a round. From tables that do not fit in a cache each call looks up
fresh ones. With those that do, the processes are started anew after each third of the rounds: where the system puts a
process's arrays makes some 10 % of difference, the same in all its rounds. With one thread, all contenders of a round run
on one core, and those of the next round on the next. A ratio is PyTorch's time over qembag's, above 1 where qembag is
faster: the median of the rounds' own ratios, in brackets their quartiles. Times are medians of nanoseconds a row. Answers
are compared bit for bit in the same turns. Both are called through their operators (`qembag.ops`, `torch.ops.quantized`)
on arguments made before the clock starts."""
FLOOR_NOTE = """\
NumPy: `np.add.reduceat(weights[indices], offsets)` on a float32 table. Floor: a C loop that prefetches the quantized
rows as qembag does, loads from each of their cache lines once, adds that up and does nothing else."""
AVX2_NOTE = """\
`level=avx2`: qembag's AVX2 kernels against PyTorch with `FBGEMM_ENABLE_INSTRUCTIONS=AVX2`; at 4 and 2 bits that variable
makes no measurable difference to PyTorch. `level=baseline`: kernels for any x86-64 against PyTorch unrestricted."""
GROWTH_NOTE = """\
Rows of 64, bags of 40, one thread, fresh uniform indices. The contenders take turns in one process on one table, of which
the smaller ones are the first rows: three of the largest would not fit. Why the curve bends: [speed.md](speed.md)."""
PAGES_NOTE = """\
One table of 2 GiB, 8 bits, rows of 64, one thread. `numpy`: what NumPy's allocator asks for (huge pages, with madvise).
`4k`: an anonymous mapping with huge pages refused. `file`: a memory-mapped file that is in the page cache."""


def table(titles: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(titles) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, rule, *lines])


def size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"


def span(values: Iterable[Any], between: str) -> str:
    """The one value, or the first and the last."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}{between}{found[-1]}"


def caption(results: dict[str, Any]) -> str:
    machine = results["machine"]
    measured = [*results["cases"].values(), *results.get("growth", {}).values()]
    caches = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in machine["caches"].items())
    return (
        f"*{machine['processor']}, {machine['cores']} cores, {caches}; {machine['numa_nodes']} NUMA node(s); "
        f"transparent huge pages: {machine['huge_pages']}; {machine['system']}. Level {machine['level']}. "
        f"Python {machine['python']}, NumPy {machine['numpy']}, torch {machine['torch']}, qembag {machine['qembag']}. "
        f"{span((result['rounds'] for result in measured), ' to ')} rounds; "
        f"{span((result['date'] for result in measured), ' to ')}.*"
    )


def ratio(result: dict[str, Any]) -> str:
    low, high = result["quartiles"]
    return f"{result['ratio']:.2f} ({low:.2f} to {high:.2f})"


def of_names(cases: dict[str, Any], names: Iterable[str], contenders: list[str]) -> str:
    """A line for each case that was measured: ns a row, then the ratio."""
    lines = []
    for name in names:
        if name in cases:
            times = cases[name]["ns"]
            cells = [f"{times[contender]:.2f}" if contender in times else "" for contender in contenders]
            lines.append([f"`{name}`", *cells, ratio(cases[name])])
    return table(["case, ns a row", *contenders, "ratio"], lines)


def targets(cases: dict[str, Any]) -> str:
    lines = []
    for title, names in TARGETS.items():
        found = [cases.get(name) for name in names]
        if not any(found):
            continue
        ratios = [f"{result['ratio']:.2f}" if result else "" for result in found]
        lines.append([title, *ratios, *(f"{result['ns']['qembag']:.2f}" if result else "" for result in found)])
    columns = [f"{bits}-bit" for bits in BITS]
    return table(["PyTorch's time over ours; then ns a row of ours", *columns, *(f"{c}, ns" for c in columns)], lines)


def slower(cases: dict[str, Any]) -> str:
    found = [f"`{name}` ({case['ratio']:.3f})" for name, case in cases.items() if case["ratio"] < SLOWER]
    return f"Below {SLOWER}: {', '.join(found) if found else 'none'}."


def unequal(cases: dict[str, Any]) -> str:
    found = [f"`{name}`" for name, case in cases.items() if not case["equal"]]
    return f"**Answers differ in: {', '.join(found)}.**" if found else f"All answers of {len(cases)} cases are equal."


def growth_tables(growth: dict[str, Any]) -> str:
    parts = []
    for width, result in growth.items():
        lines = [
            [size(num_bytes), f"{rows:,}", *(f"{times[place]:.2f}" for times in result["ns"].values())]
            for place, (num_bytes, rows) in enumerate(zip(result["bytes"], result["rows"], strict=True))
        ]
        parts.append(table([f"table, {width}; ns a row", "rows", *result["ns"]], lines))
    return "\n\n".join(parts)


def footprint(results: dict[str, Any]) -> list[str]:
    lines = []
    if times := results.get("import"):
        others = ", ".join(f"{name} {times[name]:.0f} ms" for name in times if name not in ("numpy", "qembag"))
        lines.append(
            f"`import qembag` takes {times['qembag']:.1f} ms beyond `import numpy` ({times['numpy']:.0f} ms; in its "
            f"place: {others}). Medians of fresh processes."
        )
    if peaks := results.get("allocation"):
        lines.append("Bytes that a call holds at its peak beyond its output, counted by tracemalloc:")
        lines.append(table(["call", "bytes"], [[name, f"{peak:,}"] for name, peak in peaks.items()]))
    return lines


def render(results: dict[str, Any], plots: bool = False) -> str:
    """The whole document, of whatever was measured."""
    cases = {name: results["cases"][name] for name in CASES if name in results["cases"]}
    plain = [name for name in cases if CASES[name].group in ("cached", "memory")]
    parts = ["# Benchmarks", "Made by `python -m benchmarks`; not edited by hand.", caption(results), HOW]
    parts += ["## In short", targets(cases), slower(cases), unequal(cases)]
    if plots:
        parts.append("![PyTorch's time over qembag's against the dim](dims.svg)")
    for group, title in {"cached": "Cached: 2,000 rows", "memory": "From memory"}.items():
        names = [name for name in plain if CASES[name].group == group and CASES[name].level is None]
        parts += [f"## {title}", of_names(cases, names, ["torch", "qembag"])] if names else []
    sections = {
        "NumPy and the floor": (
            FLOOR_NOTE,
            [n for n in plain if CASES[n].extras],
            ["numpy", "torch", "qembag", "floor"],
        ),
        "Other levels": (AVX2_NOTE, [n for n in plain if CASES[n].level], ["torch", "qembag"]),
        "Quantizing": ("", [n for n in cases if CASES[n].group == "quantize"], ["torch", "qembag"]),
    }
    for title, (note, names, contenders) in sections.items():
        if names:
            parts += [f"## {title}", *([note] if note else []), of_names(cases, names, contenders)]
    if growth := results.get("growth"):
        parts += ["## Growth", GROWTH_NOTE, *(["![ns a row against table size](growth.svg)"] if plots else [])]
        parts.append(growth_tables(growth))
    if pages := [name for name in cases if CASES[name].group == "pages"]:
        parts += ["## Pages", PAGES_NOTE, of_names(cases, pages, ["torch", "qembag", "floor"])]
    if lines := footprint(results):
        parts += ["## Beside lookups", *lines]
    return "\n\n".join(parts) + "\n"


def compare(cases: dict[str, Any]) -> str:
    """Two builds of qembag: "other" is the one that `--against` named."""
    return "\n\n".join([of_names(cases, cases, ["other", "qembag"]), slower(cases), unequal(cases)]) + "\n"
