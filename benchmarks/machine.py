"""What was measured on, for the captions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys/devices/system")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


# By vendor, family and model: a virtual machine's model name may be just "AMD EPYC". None stands for any model.
ARCHITECTURES = {
    ("AuthenticAMD", 25, 17): "Zen 4",
    ("AuthenticAMD", 26, None): "Zen 5",
    ("GenuineIntel", 6, 207): "Emerald Rapids",
}
VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


def cpu_fields() -> dict[str, str]:
    """What the system says of the first processor."""
    lines = read(Path("/proc/cpuinfo")).partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def slug_of(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def identify(fields: dict[str, str]) -> tuple[str, str]:
    """The processor's name, and what its files are called."""
    name = fields.get("model name") or platform.processor() or platform.machine()
    vendor, family, model = (fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    if not (family.isdigit() and model.isdigit()):
        return name, slug_of(name)
    short = VENDORS.get(vendor, vendor)
    for known in (int(model), None):
        if architecture := ARCHITECTURES.get((vendor, int(family), known)):
            return f"{name} ({architecture})", slug_of(f"{short} {architecture}")
    return name, slug_of(f"{short} {family} {model}")


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
    processor, slug = identify(cpu_fields())
    return {
        "processor": processor,
        "slug": slug,
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
