"""qembag against PyTorch, side by side: `python -m benchmarks` (needs torch 2.13.0 beside qembag).

Each contender works in a process of its own, so that no pool of threads disturbs another's. Rounds alternate between
them; each round looks up fresh indices, because a repeated set would sit in the cache and measure nothing of memory.
What is printed is the median of the rounds' ratios, torch's time over ours. Answers must agree bit for bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

# name: rows, bags a call. Bags of 40 rows; calls of a few hundred microseconds or more.
CASES = {"cached": (2_000, 256), "cache edge": (100_000, 512), "memory": (4_000_000, 1024)}
NAMES = {8: "byte", 4: "4bit", 2: "2bit"}
CALLS_A_ROUND = 10
# Threads of a pool spin for a while after their work, and would take the next contender's core.
IDLE = 0.05


def make_table(num_rows: int, dim: int, bits: int) -> np.ndarray:
    """Packed rows of full-range codes, made in pieces: the large ones would not fit twice."""
    rng = np.random.default_rng(0)
    codes_bytes, tail = dim * bits // 8, "<f4" if bits == 8 else "<f2"
    rows = np.empty((num_rows, codes_bytes + 2 * np.dtype(tail).itemsize), dtype=np.uint8)
    for start in range(0, num_rows, 1 << 18):
        part = rows[start : start + (1 << 18)]
        part[:, :codes_bytes] = rng.integers(0, 256, (len(part), codes_bytes), dtype=np.uint8)
        part[:, codes_bytes:] = rng.normal(size=(len(part), 2)).astype(tail).view(np.uint8)
    return rows


def contender(name: str, rows: np.ndarray, bits: int, threads: int) -> Callable[[np.ndarray, np.ndarray], Any]:
    operator = f"embedding_bag_{NAMES[bits]}_rowwise_offsets"
    if name == "torch":
        import torch

        torch.set_num_threads(threads)
        weight, look_up = torch.from_numpy(rows), getattr(torch.ops.quantized, operator)
        return lambda indices, offsets: look_up(weight, torch.from_numpy(indices), torch.from_numpy(offsets))
    import qembag

    qembag.set_num_threads(threads)
    look_up = getattr(qembag.ops, operator)
    return lambda indices, offsets: look_up(rows, indices, offsets)


def work(name: str, num_rows: int, dim: int, bits: int, bags: int, length: int, threads: int) -> None:
    """One contender: for each seed that comes in, a line with its ns a row and a checksum of its last answer."""
    look_up = contender(name, make_table(num_rows, dim, bits), bits, threads)
    print("ready", flush=True)
    offsets = np.arange(0, bags * length, length)
    for line in sys.stdin:
        rng = np.random.default_rng(int(line))
        first, *calls = (rng.integers(0, num_rows, bags * length) for _ in range(CALLS_A_ROUND + 1))
        look_up(first, offsets)  # wakes the threads
        start = time.perf_counter()
        for indices in calls:
            answer = look_up(indices, offsets)
        nanoseconds = (time.perf_counter() - start) / CALLS_A_ROUND / bags / length * 1e9
        print(json.dumps([nanoseconds, zlib.crc32(np.ascontiguousarray(answer))]), flush=True)


def measure(case: list[int], rounds: int) -> tuple[float, float, float]:
    """Median ns a row of torch and of qembag, and the median ratio."""
    command = [sys.executable, "-m", "benchmarks", "--work"]
    workers = [
        subprocess.Popen([*command, name, *map(str, case)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("torch", "qembag")
    ]
    try:
        for worker in workers:
            worker.stdout.readline()
        times = []
        for number in range(rounds + 1):
            answers = []
            for worker in workers:
                time.sleep(IDLE)
                worker.stdin.write(f"{number}\n")
                worker.stdin.flush()
                answers.append(json.loads(worker.stdout.readline()))
            if answers[0][1] != answers[1][1]:
                raise SystemExit(f"the answers differ: {case}, round {number}")
            times.append([nanoseconds for nanoseconds, _ in answers])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    counted = np.array(times[1:])  # the first round warms up
    return (*np.median(counted, axis=0), float(np.median(counted[:, 0] / counted[:, 1])))


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], *map(int, sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--length", type=int, default=40, help="rows a bag")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    chosen = parser.parse_args()

    import torch

    import qembag

    config = qembag.show_config()
    print(
        f"{processor()}, {config['level']}, {chosen.threads} thread(s) each, bags of {chosen.length}, fresh uniform "
        f"indices; qembag {config['version']}, torch {torch.__version__}, numpy {np.__version__}; "
        f"medians of {chosen.rounds} alternated rounds\n"
    )
    print("| case | dim | bits | torch, ns a row | qembag, ns a row | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for name in chosen.cases:
        num_rows, bags = CASES[name]
        for dim in chosen.dims:
            for bits in (8, 4, 2):
                case = [num_rows, dim, bits, bags, chosen.length, chosen.threads]
                theirs, ours, ratio = measure(case, chosen.rounds)
                print(f"| {name} | {dim} | {bits} | {theirs:.2f} | {ours:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
