"""What was measured on, for the captions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys/devices/system")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


def processor() -> str:
    for line in read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of each cache that holds data: L1d, L2, L3."""
    sizes = {}
    for folder in sorted((SYSTEM / "cpu" / "cpu0" / "cache").glob("index*")):
        kind, size = read(folder / "type"), read(folder / "size")
        if kind != "Instruction" and size[:-1].isdigit():
            sizes[f"L{read(folder / 'level')}{'d' if kind == 'Data' else ''}"] = int(size[:-1]) * UNITS[size[-1]]
    return sizes


def huge_pages() -> str:
    """The mode in force is the one in brackets."""
    modes = read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return modes.partition("[")[2].partition("]")[0] or modes


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe() -> dict[str, Any]:
    import qembag

    config = qembag.show_config()
    nodes = len(list((SYSTEM / "node").glob("node[0-9]*")))
    return {
        "processor": processor(),
        "caches": caches(),
        "cores": os.cpu_count(),
        "numa_nodes": nodes or 1,
        "huge_pages": huge_pages(),
        "system": f"{platform.system()} {platform.release()}",
        "level": config["levels"][-1],
        "levels": config["levels"],
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "torch", "qembag")},
    }
