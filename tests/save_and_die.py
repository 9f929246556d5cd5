"""Processes that save tables over and over until they are killed, and what they leave behind.

    python tests/save_and_die.py kill 200        kills so many at random moments, half of which save to an index
    python tests/save_and_die.py save PATH       saves until it is killed; says when the first save is done

Each save has tables of other values, all elements of one save the same.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import qembag

SEED = 20261127
ROWS, DIM = 20_000, 32
NAMES = ("one.safetensors", "several.index.json")


def save(path: str) -> None:
    limit = 1 if path.endswith(".json") else None
    for number in itertools.count(1):
        # 2.5 MB each.
        tables = {name: np.full((ROWS, DIM), number, np.float32) for name in ("a", "b")}
        qembag.save_tables(path, tables, max_shard_bytes=limit)
        if number == 1:
            print("saved", flush=True)


def number_of(path: Path) -> int:
    """Which save the file is of. Fails if it is not one of them, whole."""
    tables = qembag.open_tables(path)
    assert list(tables) == ["a", "b"]
    number = int(tables["a"].data[0, 0])
    for table in tables.values():
        assert table.shape == (ROWS, DIM)
        assert (table.data == number).all()
    return number


def kill(path: Path, count: int, seed: int = SEED) -> list[int]:
    """Kills so many at random moments of a save; which saves the files were of that they left."""
    rng = random.Random(seed)
    paths = [str(Path(qembag.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found = []
    for _ in range(count):
        command = [sys.executable, __file__, "save", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"saved\n"
            time.sleep(rng.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
            child.wait()
        found.append(number_of(path))
    return found


def main(arguments: list[str]) -> None:
    if arguments[0] == "save":
        save(arguments[1])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        count = int(arguments[1]) // len(NAMES)
        for name in NAMES:
            found = kill(Path(folder, name), count)
            print(f"{count} killed, {name}: each left one whole save, from the {min(found)}. to the {max(found)}.")
        left = [path for path in Path(folder).iterdir() if path.suffix == ".tmp"]
    print(f"{len(left)} killed within a save of a file, in {time.perf_counter() - started:.0f} s altogether")


if __name__ == "__main__":
    main(sys.argv[1:])
