"""Which qembag a contender imports: a copy of its own in each start.

The system caches a file's pages, so without a copy a build's code would lie at the same physical addresses in all starts.
Bytecode is not copied: one build's may be stale, and code that Python compiled in the same process made calls of 10 rows
1.3 % faster than code read from .pyc files, in all starts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def ours() -> Path | None:
    """The package that this process would import; None where it is not one directory, as in an editable install."""
    spec = importlib.util.find_spec("qembag")
    if spec is None or spec.origin is None:
        raise SystemExit("there is no qembag to measure: pip install .")
    package = Path(spec.origin).parent
    compiled = any(path.name.endswith(tuple(EXTENSION_SUFFIXES)) for path in package.iterdir())
    return package.resolve() if compiled else None


def package_of(name: str, against: Path | None) -> Path | None:
    """What a contender is to import; None for what is on the path anyway, and for contenders without a qembag.

    A comparison of one build with itself says nothing, and looks as if it did.
    """
    if name not in ("qembag", "plain", "other"):
        return None
    found = ours()
    if against is None or found is None:
        return found
    other = (against / "qembag").resolve()
    if found == other:
        raise SystemExit(f"{found} would be compared with itself")
    return other if name == "other" else found


def copy(package: Path, folder: Path) -> None:
    """With the libraries that a repaired wheel has beside it."""
    shutil.copytree(package, folder / "qembag", ignore=shutil.ignore_patterns("__pycache__"))
    libraries = package.with_name("qembag.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)


def check_origin(modules: dict[str, str], folder: Path) -> None:
    if not Path(modules["qembag"]).resolve().is_relative_to(folder.resolve()):
        raise SystemExit(f"a contender imported {modules['qembag']} in place of the one in {folder}")


def has_layouts(folder: Path) -> bool:
    """Whether the qembag in a directory knows rows of other layouts and of floats; asked in a process of its own."""
    settings = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", "from qembag import FloatTable"]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, check=False).returncode == 0
