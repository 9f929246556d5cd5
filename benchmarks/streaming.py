"""A table larger than memory to a file: `python -m benchmarks.streaming FOLDER` (20 GB of free disk and a few minutes).

Makes a .npy file of float32 rows in FOLDER, quantizes it to a file in a process of its own, and compares its time with
that of reading the file and that of making the codes from memory; then kills such processes at random moments, has the
next one go on, and compares the bytes. All files are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qembag
from qembag.formats import sources

DIM = 256
ROWS_OF_A_BLOCK = 1 << 16
COMPARED_AT_ONCE = 1 << 24
QUANTIZES = """
import json, sys, time
import qembag
source, path, options, resume = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4] == "resume"
start = time.perf_counter()
qembag.quantize_to_file(source, path, resume=resume, **options)
seconds = time.perf_counter() - start
with open("/proc/self/status") as file:
    status = dict(line.split(":", 1) for line in file)
print(json.dumps([seconds, int(status["VmHWM"].split()[0]) * 1024]))
"""


def make(path: Path, num_rows: int) -> None:
    """Random rows; each block is the one before with its columns turned and a little more of everything."""
    block = np.random.default_rng(0).normal(size=(ROWS_OF_A_BLOCK, DIM)).astype(np.float32)
    with open(path, "wb") as file:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, DIM)}
        np.lib.format.write_array_header_1_0(file, shape)
        for start in range(0, num_rows, ROWS_OF_A_BLOCK):
            file.write(block[: num_rows - start].data)
            block = np.roll(block, 1, axis=1) * np.float32(1.0001)
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """So that the next reader reads the disk, not the system's cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read(path: Path) -> None:
    buffer = bytearray(sources.BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def codes_speed(options: dict[str, Any]) -> float:
    """Bytes of floats a second that are quantized from memory, with the threads that a call takes."""
    rows = np.random.default_rng(0).normal(size=(sources.BLOCK_BYTES // (4 * DIM), DIM)).astype(np.float32)
    return rows.nbytes / statistics.median(seconds_of(lambda: qembag.quantize(rows, **options)) for _ in range(15))


def quantizing(source: Path, target: Path, options: dict[str, Any], *, resume: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", QUANTIZES, str(source), str(target), json.dumps(options)]
    return subprocess.Popen([*command, "resume" if resume else "begin"], stdout=subprocess.PIPE, text=True)


def finished(child: subprocess.Popen[str]) -> tuple[float, int]:
    """Its seconds, and the most memory that was resident."""
    output, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"a child ended with {child.returncode}")
    seconds, resident = json.loads(output)
    return seconds, resident


def killed_and_resumed(source: Path, target: Path, options: dict[str, Any], seconds: float, kills: int) -> int:
    """Kills that met a process at work, of as many as were tried."""
    rng = random.Random(0)
    met = 0
    for _ in range(kills):
        child = quantizing(source, target, options, resume=True)
        try:
            # All kills together come about half way, so that each of them meets work.
            child.wait(rng.uniform(0, seconds / kills))
        except subprocess.TimeoutExpired:
            child.kill()
            met += 1
        child.communicate()
        if target.exists():
            return met
    finished(quantizing(source, target, options, resume=True))
    return met


def same(first: Path, second: Path) -> bool:
    with open(first, "rb") as one, open(second, "rb") as other:
        while True:
            some = one.read(COMPARED_AT_ONCE)
            if some != other.read(COMPARED_AT_ONCE):
                return False
            if not some:
                return True


def measure(folder: Path, size: int, options: dict[str, Any], rounds: int, kills: int) -> None:
    source, target, resumed = folder / "floats.npy", folder / "table", folder / "resumed"
    make(source, size // (4 * DIM))
    size = source.stat().st_size
    reads, runs, peaks = [], [], []
    for number in range(rounds):
        # A disk that others share may serve every second reader slowly: both get both places.
        for is_reader in (True, False) if number % 2 else (False, True):
            forget(source)
            if is_reader:
                reads.append(size / seconds_of(lambda: read(source)))
            else:
                seconds, peak = finished(quantizing(source, target, options, resume=False))
                runs.append(size / seconds)
                peaks.append(peak)
    codes = codes_speed(options)
    slower = min(statistics.median(reads), codes)
    print(f"{size / 1e9:.1f} GB of float32, dim {DIM}, {options}; medians of {rounds} rounds, from the disk:")
    print(f"  reading alone    {listed(reads)} GB/s")
    print(f"  codes alone      {codes / 1e9:.2f} GB/s")
    print(f"  quantize_to_file {listed(runs)} GB/s: {statistics.median(runs) / slower:.2f} of the slower of the two")
    print(f"  resident at most {max(peaks) / 1e6:.0f} MB")
    met = killed_and_resumed(source, resumed, options, size / statistics.median(runs), kills)
    print(f"  killed {met} times and resumed: {'the same bytes' if same(target, resumed) else 'OTHER BYTES'}")


def listed(speeds: list[float]) -> str:
    return f"{statistics.median(speeds) / 1e9:.2f} ({', '.join(f'{speed / 1e9:.2f}' for speed in speeds)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where there is room for the file and three tables made of it")
    parser.add_argument("--gb", type=float, default=20, help="size of the floats (20)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--method", default="minmax")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    chosen = parser.parse_args()
    options = {"bits": chosen.bits, "method": chosen.method}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        measure(Path(folder), int(chosen.gb * 1e9), options, chosen.rounds, chosen.kills)


if __name__ == "__main__":
    main()
