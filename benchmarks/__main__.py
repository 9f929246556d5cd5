"""qembag against PyTorch, NumPy and the machine's floor: `python -m benchmarks` (needs torch 2.13.0 and matplotlib).

Without options everything is measured (three hours, 16 GB of memory) and written to docs/benchmarks/, a set of files for
each processor. `--only cached/4bit/dim` measures what has these words in its name and prints it; `--list` shows the names.
To compare two builds of qembag, install the other one beside: `pip install --no-deps --target DIR .`, then
`python -m benchmarks --against DIR --only ...`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import CASES
from .counting import count, countable, counter, note
from .footprint import measure_allocation, measure_import
from .growth import measure_growth
from .machine import describe
from .measure import measure
from .packages import has_layouts
from .report import compare, line_of, of_counts, render
from .results import empty, put, stored, write, write_documents

# Many starts of few rounds: times differ more from start to start than from round to round. With nine starts the interval
# drops one outlier at each end.
STARTS = 9
ROUNDS = 7
GROWTH_ROUNDS = 25  # in one process: tables of 8 GiB are not made more than once
EXTRAS: dict[str, Callable[[], Any]] = {
    "growth/8bit": lambda: measure_growth(8, GROWTH_ROUNDS),
    "growth/4bit": lambda: measure_growth(4, GROWTH_ROUNDS),
    "import": measure_import,
    "allocation": measure_allocation,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="a name, or a part of names; printed, not written")
    parser.add_argument("--write", action="store_true", help="with --only: write to docs/benchmarks/ too")
    parser.add_argument("--starts", type=int, default=STARTS, help=f"fresh processes of each contender ({STARTS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"that count, of each start ({ROUNDS})")
    parser.add_argument("--list", action="store_true", help="the names, and nothing else")
    parser.add_argument("--render", action="store_true", help="reports and plots again, from what was measured before")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with the qembag in DIR instead of torch")
    parser.add_argument("--count", action="store_true", help="count instructions of cached cases instead of time")
    chosen = parser.parse_args()
    if min(chosen.starts, chosen.rounds) < 1:
        parser.error("--starts and --rounds must be at least 1")
    if chosen.against:
        chosen.against = chosen.against.resolve()  # workers start elsewhere
    if chosen.write and (chosen.against or chosen.count):
        parser.error("--against and --count are for a change under way: not written")
    if chosen.against and not (chosen.against / "qembag").is_dir():
        parser.error(f"there is no qembag in {chosen.against}")
    return chosen


def select(only: list[str] | None, against: bool) -> list[str]:
    """Names that contain a word; a word that is itself a name means that one alone."""
    names = [*CASES, *([] if against else EXTRAS)]
    if only is None:
        return names
    chosen = [name for name in names if any(name == word if word in names else word in name for word in only)]
    if not chosen:
        raise SystemExit(f"no case is named like {' or '.join(only)}; --list shows the names")
    return chosen


def without_layouts(names: list[str]) -> list[str]:
    """Those that an older build has too; says what is left out."""
    left = [name for name in names if not (name in CASES and CASES[name].needs_layouts)]
    if len(left) < len(names):
        note = f"{len(names) - len(left)} cases of other layouts and of rows of floats are left out: the other build has neither"
        print(note, file=sys.stderr, flush=True)
    if not left:
        raise SystemExit("no case is left")
    return left


def require(*packages: str) -> None:
    """Before the first case, not after the last."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"this needs {package}: pip install {package}")


def measure_all(names: list[str], chosen: argparse.Namespace, kept: dict[str, Any] | None) -> dict[str, Any]:
    """Results of this run; each goes into `kept`, if there is such a thing, and at once to its file, so that what is
    measured outlives an interruption."""
    machine = describe()
    fresh, began = empty(machine), time.monotonic()
    for place, name in enumerate(names, 1):
        if name not in CASES:
            result = EXTRAS[name]()
        elif CASES[name].level in (None, *machine["levels"]):
            result = measure(CASES[name], chosen.starts, chosen.rounds, chosen.against)
        else:
            continue
        put(fresh, name, result)
        note = f" {line_of(result)}" if name in CASES else ""
        print(f"[{place}/{len(names)}, {time.monotonic() - began:.0f} s] {name}{note}", file=sys.stderr, flush=True)
        if kept is not None:
            put(kept, name, result)
            write(kept)
    return fresh


def count_all(names: list[str], against: Path | None) -> None:
    levels = describe()["levels"]
    cases = countable(names, levels)
    print(note(counter().name, levels), end="\n\n", flush=True)
    counts = {}
    for place, case in enumerate(cases, 1):
        counts[case.name] = count(case, levels, against)
        print(f"[{place}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
    print(of_counts(counts), end="")


def main() -> int:
    chosen = parse()
    names = select(chosen.only, chosen.against is not None)
    if chosen.list:
        print("\n".join(names))
        return 0
    if chosen.against and not has_layouts(chosen.against):
        names = without_layouts(names)
    if chosen.count:
        count_all(names, chosen.against)
        return 0
    writes = chosen.write or (chosen.only is None and not chosen.against)
    require(*([] if chosen.against else ["torch"]), *(["matplotlib"] if writes or chosen.render else []))
    if chosen.render:
        write_documents()
        return 0

    kept = None
    if writes:
        kept = stored(describe()) if chosen.only else empty(describe())
    fresh = measure_all(names, chosen, kept)
    if writes:
        write_documents()
    if chosen.only or chosen.against:
        print(compare(fresh["cases"]) if chosen.against else render(fresh), end="")
    return 1 if any(result["equal"] is False for result in fresh["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
