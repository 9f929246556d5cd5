"""The Markdown of the results."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from .cases import BITS, CASES, TARGETS, plain
from .intervals import by_chance, is_faster, is_slower

# Cases whose whole interval is below this are named first.
MUCH_SLOWER = 0.97
# What a case may say: the rival's time over ours, ours over that of the plain loop, and over a copy's.
SUMMARIES = ("ratio", "cost", "copies")
HOW = """\
Each contender runs in its own process. They take turns, round by round, in random order; a turn is about 10 ms of calls
after an untimed warm-up. With one thread, all contenders of a round run on one core, and those of the next round on the next.
Indices are drawn outside the timed part and are the same for all contenders of a round; a table that does not fit in a cache
sees fresh ones in each call.

Where arrays and code lie in memory changes times by some 10 %, the same in all rounds of a process. So a case is measured
in several starts of a few rounds: each starts all processes anew, imports a fresh copy of the package, and puts tables,
indices and offsets at other random cache lines, the same for all contenders. Each call makes its own output; in cases without
PyTorch, whose operators cannot do it, calls of many bags write to one array (`out=`), also at a random cache line.

A ratio is PyTorch's time over qembag's: above 1, qembag is faster. Each start gives the median of its rounds; the ratio is the
median of the starts, and the interval is in brackets. With five to eight starts it runs from the lowest to the highest, which
covers the true median with a probability of 94 to 99 %, whatever the noise is like; with nine or more, the most extreme ones
at both ends are dropped as long as 95 % remain. A case is called slower or faster only if its whole interval is, with at
least five starts.

Times are median nanoseconds a row; pruned rows and padding are not counted. Answers are compared bit for bit. Both are called
through their operators (`qembag.ops`, `torch.ops.quantized`), or `qembag.embedding_bag` if the name says `public`, with
arguments made before the clock starts."""
OPTIONS_NOTE = """\
The cost of an option: qembag's time with it over the time of a plain sum of the same indices by the same function, both per
row that counts. `padding=unused`: a `padding_idx` that never occurs. `padding=30%`: at the end of each bag. `pruned`: half of
the rows, through `qembag.ops`; the others, which PyTorch's operators do not have, through `qembag.embedding_bag`."""
FLOOR_NOTE = """\
NumPy: `np.add.reduceat(weights[indices], offsets)` on a float32 table. Floor: a C loop that prefetches the quantized
rows as qembag does, loads from each of their cache lines once, adds that up and does nothing else."""
AVX2_NOTE = """\
`level=avx2`: qembag's AVX2 kernels against PyTorch with `FBGEMM_ENABLE_INSTRUCTIONS=AVX2`; at 4 and 2 bits that variable
makes no measurable difference to PyTorch. `level=baseline`: kernels for any x86-64 against PyTorch unrestricted."""
GROWTH_NOTE = """\
Rows of 64, bags of 40, one thread, fresh uniform indices. The contenders take turns in one process on one table, of which
the smaller ones are the first rows: three of the largest would not fit. Why the curve bends: [speed.md](../speed.md)."""
INDEX = """\
# Benchmarks, by processor

Made by `python -m benchmarks`; not edited by hand. Each processor has a report, its numbers (`.json`) and plots. What stands
behind them: [speed.md](../speed.md)."""
LAYOUTS_NOTE = """\
Rows of other layouts than PyTorch's, by qembag alone: its time over its own time with PyTorch's layout, with the same values,
bags and indices, through `qembag.embedding_bag`. `half` and `float`: the type of scales and biases; `first` and `behind`:
where they stand; `fbgemm`: `half-first` with rows padded to multiples of 16 bytes; `groups`: elements that share a scale and
a bias, float16 and behind. Rows differ in length, and from memory the length counts: `cost a byte` is the cost over the ratio
of the lengths. Answers of both layouts are compared bit for bit."""
FLOATS_NOTE = """\
Tables of float32, float16 or bfloat16, summed in float32 to an output of the table's type: `torch.nn.functional.embedding_bag`
against `qembag.embedding_bag`. Answers are compared bit for bit; those of bfloat16 may differ in the last bit, since PyTorch
rounds ties away from zero and qembag to even."""
DEQUANTIZING_NOTE = """\
`table.dequantize(out=)` of 500,000 rows of 64 beside `numpy.copyto` of as many float32, one thread; `plain`: of PyTorch's
layout; `copies`: qembag's time over the copy's. A copy reads four bytes an element too."""
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
    if not found:
        return "none"
    return str(found[0]) if len(found) == 1 else f"{found[0]}{between}{found[-1]}"


def caption(results: dict[str, Any]) -> str:
    machine = results["machine"]
    measured = [*results["cases"].values(), *results.get("growth", {}).values()]
    caches = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in machine["caches"].items())
    return (
        f"*{machine['processor']}, {machine['cores']} cores, {caches}; {machine['numa_nodes']} NUMA node(s); "
        f"transparent huge pages: {machine['huge_pages']}; {machine['system']}. Level {machine['level']}. "
        f"Python {machine['python']}, NumPy {machine['numpy']}, torch {machine['torch']}, qembag {machine['qembag']}. "
        f"{starts_and_rounds(results)}; "
        f"{span((result['date'] for result in measured), ' to ')}.*"
    )


def starts_and_rounds(results: dict[str, Any]) -> str:
    cases = results["cases"].values()
    summaries = (next(case[key] for key in SUMMARIES if key in case) for case in cases)
    starts = span((len(some["starts"]) for some in summaries), " to ")
    return f"{starts} starts of {span((case['rounds'] for case in cases), ' to ')} rounds"


def ratio(result: dict[str, Any] | None, digits: int = 2) -> str:
    if result is None:
        return ""
    low, high = result["interval"]
    return f"{result['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def line_of(result: dict[str, Any]) -> str:
    """Of one case, while it is being measured."""
    parts = [f"{key} {ratio(result[key], 3)}" for key in SUMMARIES if key in result]
    return ", ".join([*parts, *([] if result["equal"] is None else [f"equal: {result['equal']}"])])


def of_names(cases: dict[str, Any], names: Iterable[str], contenders: list[str], key: str = "ratio") -> str:
    """A line for each case that was measured: ns a row, then the ratio or the cost."""
    lines = []
    for name in names:
        if name in cases:
            times = cases[name]["ns"]
            cells = [f"{times[contender]:.2f}" if contender in times else "" for contender in contenders]
            lines.append([f"`{name}`", *cells, ratio(cases[name].get(key))])
    return table(["case, ns a row", *contenders, key], lines)


def scaled(some: dict[str, Any], factor: float) -> dict[str, Any]:
    return {"median": factor * some["median"], "interval": [factor * end for end in some["interval"]]}


def of_layouts(cases: dict[str, Any], names: Iterable[str]) -> str:
    """A line for each case: bytes and ns a row, the cost of the layout, and from memory what it is beside the bytes."""
    lines = []
    for name in names:
        result, case = cases[name], CASES[name]
        bytes_of_torch, times, cost = plain(case).row_bytes, result["ns"], result["cost"]
        a_byte = ratio(scaled(cost, bytes_of_torch / case.row_bytes)) if case.group == "memory" else ""
        lengths = [str(bytes_of_torch), str(case.row_bytes)]
        lines.append([f"`{name}`", *lengths, f"{times['plain']:.2f}", f"{times['qembag']:.2f}", ratio(cost), a_byte])
    titles = ["case", "bytes, PyTorch's layout", "bytes, this one", "ns, PyTorch's layout", "ns, this one", "cost"]
    return table([*titles, "cost a byte"], lines)


def of_rows(cases: dict[str, Any]) -> list[str]:
    """Sections on rows of other layouts and of floats."""
    layouts = [name for name in cases if CASES[name].other_layout and CASES[name].work == "lookup"]
    floats = [name for name in cases if CASES[name].of_floats]
    whole = [name for name in cases if CASES[name].work == "dequantize"]
    parts = []
    if layouts:
        parts += ["## Layouts of rows", LAYOUTS_NOTE, of_layouts(cases, layouts)]
    if floats:
        parts += ["## Rows of floats", FLOATS_NOTE, of_names(cases, floats, ["torch", "qembag"])]
    if whole:
        parts += ["## Dequantizing", DEQUANTIZING_NOTE, of_names(cases, whole, ["copy", "plain", "qembag"], "copies")]
    return parts


def targets(cases: dict[str, Any]) -> str:
    lines = []
    for title, names in TARGETS.items():
        found = [cases.get(name) for name in names]
        if not any(found):
            continue
        ratios = [ratio(result["ratio"] if result else None) for result in found]
        lines.append([title, *ratios, *(f"{result['ns']['qembag']:.2f}" if result else "" for result in found)])
    columns = [f"{bits}-bit" for bits in BITS]
    return table(["PyTorch's time over ours; then ns a row of ours", *columns, *(f"{c}, ns" for c in columns)], lines)


def verdict(cases: dict[str, Any]) -> str:
    """How many cases there are and how they came out; which ones are slower, and how many are by chance."""
    ratios = {name: case["ratio"] for name, case in cases.items() if "ratio" in case}
    if not ratios:
        return "No case has a rival."
    much = {name for name, some in ratios.items() if is_slower(some, MUCH_SLOWER)}
    groups = {
        f"whole interval below {MUCH_SLOWER}": much,
        f"below 1, not below {MUCH_SLOWER}": {name for name, some in ratios.items() if is_slower(some)} - much,
        "above 1": {name for name, some in ratios.items() if is_faster(some)},
    }
    chance = f"Noise alone would call {by_chance(ratios.values()):.1f} slower than 1, and as many faster."
    middle = median(some["median"] for some in ratios.values())
    lines = [f"{len(ratios)} cases; median of the ratios {middle:.3f}. {chance}\n"]
    for title, found in groups.items():
        named = ", ".join(f"`{name}` {ratio(ratios[name], 3)}" for name in ratios if name in found)
        lines.append(f"- {title}: {len(found)}{': ' if found else ''}{named}")
    return "\n".join(lines)


def unequal(cases: dict[str, Any]) -> str:
    found = [f"`{name}`" for name, case in cases.items() if case["equal"] is False]
    compared = sum(case["equal"] is not None for case in cases.values())
    return f"**Answers differ in: {', '.join(found)}.**" if found else f"All answers of {compared} cases are equal."


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


def of_counts(counts: dict[str, dict[str, float]]) -> str:
    """Instructions a row: those of the other build and their ratio to ours, or of the plain loop and what ours cost of it."""
    present = {contender for per_row in counts.values() for contender in per_row}
    contenders = [name for name in ("other", "plain", "qembag") if name in present]
    lines = []
    for name, per_row in counts.items():
        cells = [f"{per_row[contender]:.2f}" if contender in per_row else "" for contender in contenders]
        compared = ""
        if "other" in per_row:
            compared = f"{per_row['other'] / per_row['qembag']:.3f}"
        elif "plain" in per_row:
            compared = f"{per_row['qembag'] / per_row['plain']:.3f}"
        lines.append([f"`{name}`", *cells, compared])
    return table(["case, instructions a row", *contenders, "ratio" if "other" in present else "cost"], lines) + "\n"


def sections(cases: dict[str, Any]) -> dict[str, tuple[str, list[str], list[str], str]]:
    """By title: a note, names of cases, the contenders to show, and what they are compared by."""
    lookups = [name for name in cases if CASES[name].group in ("cached", "memory") and not CASES[name].needs_layouts]
    with_torch = [name for name in lookups if not CASES[name].beyond_torch and CASES[name].level is None]
    both = ["torch", "qembag"]
    return {
        "Cached: 2,000 rows": ("", [n for n in with_torch if CASES[n].group == "cached"], both, "ratio"),
        "From memory": ("", [n for n in with_torch if CASES[n].group == "memory"], both, "ratio"),
        "Options": (OPTIONS_NOTE, [n for n in lookups if "cost" in cases[n]], ["plain", "qembag"], "cost"),
        "NumPy and the floor": (
            FLOOR_NOTE,
            [n for n in lookups if CASES[n].extras],
            ["numpy", *both, "floor"],
            "ratio",
        ),
        "Other levels": (AVX2_NOTE, [n for n in lookups if CASES[n].level], both, "ratio"),
        "Quantizing": ("", [n for n in cases if CASES[n].group == "quantize"], both, "ratio"),
    }


def render(results: dict[str, Any], plots: str = "") -> str:
    """The whole document, of whatever was measured; with the plots whose names begin so."""
    cases = {name: results["cases"][name] for name in CASES if name in results["cases"]}
    title = f"# Benchmarks: {results['machine']['processor']}"
    parts = [title, "Made by `python -m benchmarks`; not edited by hand.", caption(results), HOW]
    parts += ["## In short", targets(cases), verdict(cases), unequal(cases)]
    if plots:
        parts.append(f"![PyTorch's time over qembag's against the dim]({plots}-dims.svg)")
    for title, (note, names, contenders, key) in sections(cases).items():
        if names:
            parts += [f"## {title}", *([note] if note else []), of_names(cases, names, contenders, key)]
    parts += of_rows(cases)
    if growth := results.get("growth"):
        parts += ["## Growth", GROWTH_NOTE]
        parts += [f"![ns a row against table size]({plots}-growth.svg)"] if plots else []
        parts.append(growth_tables(growth))
    if pages := [name for name in cases if CASES[name].group == "pages"]:
        parts += ["## Pages", PAGES_NOTE, of_names(cases, pages, ["torch", "qembag", "floor"])]
    if lines := footprint(results):
        parts += ["## Beside lookups", *lines]
    return "\n\n".join(parts) + "\n"


def compare(cases: dict[str, Any]) -> str:
    """Two builds of qembag: "other" is the one that `--against` named."""
    return "\n\n".join([of_names(cases, cases, ["other", "qembag"]), verdict(cases), unequal(cases)]) + "\n"


def index(everything: dict[str, dict[str, Any]]) -> str:
    """A line for each processor, by the names of the files."""
    lines = []
    for slug, results in everything.items():
        machine = results["machine"]
        dates = span((result["date"] for result in results["cases"].values()), " to ")
        lines.append(
            [f"[{machine['processor']}]({slug}.md)", machine["level"], machine["torch"], dates, results["method"]]
        )
    titles = ["processor", "level", "torch", "measured", "method"]
    return "\n\n".join([INDEX, table(titles, lines).replace("--:", "---")]) + "\n"
