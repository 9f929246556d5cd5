"""Where results are kept: in docs/benchmarks, a set of files for each processor, and an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cases import CASES
from .measure import ROOT
from .report import index, render

DOCS = ROOT / "docs" / "benchmarks"
# Results of another method are kept as they are, and not added to.
METHOD = "intervals over starts"


def empty(machine: dict[str, Any]) -> dict[str, Any]:
    return {"method": METHOD, "machine": machine, "cases": {}}


def path_of(machine: dict[str, Any]) -> Path:
    return DOCS / f"{machine['slug']}.json"


def stored(machine: dict[str, Any]) -> dict[str, Any]:
    """What was measured before on the same machine with the same versions, in the same way: one caption speaks for all
    numbers."""
    path = path_of(machine)
    if not path.exists():
        raise SystemExit(f"there is no {path.relative_to(ROOT)} yet: measure everything first")
    results = json.loads(path.read_text())
    if results["method"] != METHOD or results["machine"] != machine:
        raise SystemExit(f"{path.relative_to(ROOT)} is of another machine, method or versions: measure everything")
    return results


def put(results: dict[str, Any], name: str, result: Any) -> None:
    group, _, part = name.partition("/")
    if name in CASES:
        results["cases"][name] = result
    elif part:
        results.setdefault(group, {})[part] = result
    else:
        results[group] = result


def write(results: dict[str, Any]) -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    path_of(results["machine"]).write_text(json.dumps(results, indent=1) + "\n")


def write_documents(folder: Path | None = None) -> None:
    """Report and plots of each processor from its numbers, and the index."""
    from .plots import draw

    folder = folder or DOCS
    everything = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for slug, results in everything.items():
        if results["method"] == METHOD:
            draw(results, folder, slug)
            (folder / f"{slug}.md").write_text(render(results, plots=slug))
    (folder / "README.md").write_text(index(everything))
