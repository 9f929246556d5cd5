"""qembag against PyTorch, NumPy and the machine's floor: `python -m benchmarks` (needs torch 2.13.0 and matplotlib).

Without options everything is measured (20 minutes, 16 GB of memory) and written to docs/. `--only cached/4bit/dim`
measures what has these words in its name and prints it; `--list` shows the names. To compare two builds of qembag,
install the other one beside: `pip install --no-deps --target DIR .`, then `python -m benchmarks --against DIR --only ...`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import CASES
from .footprint import measure_allocation, measure_import
from .growth import measure_growth
from .machine import describe
from .measure import ROOT, measure
from .report import compare, render

DOCS = ROOT / "docs"
EXTRAS: dict[str, Callable[[int], Any]] = {
    "growth/8bit": lambda rounds: measure_growth(8, rounds),
    "growth/4bit": lambda rounds: measure_growth(4, rounds),
    "import": lambda rounds: measure_import(),
    "allocation": lambda rounds: measure_allocation(),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="a name, or a part of names; printed, not written")
    parser.add_argument("--write", action="store_true", help="with --only: write to docs/ too")
    parser.add_argument("--rounds", type=int, default=25, help="that count, of each case (25)")
    parser.add_argument("--list", action="store_true", help="the names, and nothing else")
    parser.add_argument(
        "--render", action="store_true", help="docs/ again from docs/benchmarks.json; nothing is measured"
    )
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with the qembag in DIR instead of torch")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    if chosen.against:
        chosen.against = chosen.against.resolve()  # workers start elsewhere
    if chosen.against and chosen.write:
        parser.error("--against is for a change under way: it is not written")
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


def stored() -> dict[str, Any]:
    path = DOCS / "benchmarks.json"
    if not path.exists():
        raise SystemExit("there is no docs/benchmarks.json yet: measure everything first")
    return json.loads(path.read_text())


def write(results: dict[str, Any], plots: bool) -> None:
    DOCS.mkdir(exist_ok=True)
    (DOCS / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")
    if plots:
        from .plots import draw

        draw(results, DOCS)
        (DOCS / "benchmarks.md").write_text(render(results, plots=True))


def require(*packages: str) -> None:
    """Before the first case, not after the last."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"this needs {package}: pip install {package}")


def put(results: dict[str, Any], name: str, result: Any) -> None:
    group, _, part = name.partition("/")
    if name in CASES:
        results["cases"][name] = result
    elif part:
        results.setdefault(group, {})[part] = result
    else:
        results[group] = result


def main() -> int:
    chosen = parse()
    names = select(chosen.only, chosen.against is not None)
    if chosen.list:
        print("\n".join(names))
        return 0
    writes = chosen.write or (chosen.only is None and not chosen.against)
    require(*([] if chosen.against else ["torch"]), *(["matplotlib"] if writes or chosen.render else []))
    if chosen.render:
        write(stored(), plots=True)
        return 0

    machine = describe()
    results: dict[str, Any] = {"machine": machine, "cases": {}}
    if chosen.only and chosen.write:
        results = stored()
        # One caption speaks for all numbers.
        if results["machine"] != machine:
            raise SystemExit("docs/benchmarks.json is of another machine or of other versions: measure everything")
    fresh: dict[str, Any] = {"machine": machine, "cases": {}}
    began = time.monotonic()
    for place, name in enumerate(names, 1):
        if name in CASES and CASES[name].level not in (None, *machine["levels"]):
            continue
        result = measure(CASES[name], chosen.rounds, chosen.against) if name in CASES else EXTRAS[name](chosen.rounds)
        put(fresh, name, result)
        note = f" {result['ratio']:.3f}, equal: {result['equal']}" if name in CASES else ""
        print(f"[{place}/{len(names)}, {time.monotonic() - began:.0f} s] {name}{note}", file=sys.stderr, flush=True)
        if writes:
            put(results, name, result)
            write(results, plots=False)  # so that what is measured outlives an interruption
    if writes:
        write(results, plots=True)
    if chosen.only or chosen.against:
        print(compare(fresh["cases"]) if chosen.against else render(fresh), end="")
    return 0 if all(result["equal"] for result in fresh["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
