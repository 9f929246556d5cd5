"""Load from many threads: compares every answer, watches memory, measures throughput.

    python tests/soak.py [SECONDS] [THREADS]

First it compares the calls per second of all threads with those of one thread; each call uses two OpenMP threads, and
answers are not compared. Then it makes random requests with known answers for SECONDS. Prints one JSON object. Exits
with status 1 after a wrong answer or an error. `test_soak.py` runs it for a minute.

Resident memory is what the operator of a server sees. It takes minutes to settle: malloc has an arena for every few
threads, and each arena grows to the most that was ever in use in it. Allocated memory after the threads have ended
shows any leak, however small.
"""

from __future__ import annotations

import array
import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import qembag

Request = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], np.ndarray]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def allocated() -> dict[str, int]:
    """Python's own blocks, and the bytes that malloc has handed out, if the C library reports them."""
    gc.collect()
    counts = {"blocks": sys.getallocatedblocks()}
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype = Mallinfo
        info = library.mallinfo2()
        counts["bytes"] = info.uordblks + info.hblkhd
    return counts


def requests(rng: np.random.Generator) -> list[Request]:
    """Requests of all sizes and kinds, each with its answer, computed by one thread."""
    made: list[Request] = []
    for bits, dim in ((8, 128), (4, 64), (2, 300), (8, 20)):
        table = qembag.quantize(rng.normal(size=(5000, dim)).astype(np.float32), bits)
        for num_bags, length in ((1, 10), (64, 20), (1000, 40)):
            indices = rng.integers(0, 5000, num_bags * length)
            offsets = np.sort(rng.integers(0, len(indices), num_bags))
            offsets[0] = 0
            weights = rng.normal(size=len(indices)).astype(np.float32)
            calls = [
                (qembag.embedding_bag, (table, indices.reshape(num_bags, length)), {}),
                (qembag.embedding_bag, (table, indices.astype(np.int32), offsets), {"mode": "max"}),
                (qembag.embedding_bag, (table, indices, offsets), {"per_sample_weights": weights}),
                (qembag.embedding_bag, (table, indices, offsets), {"mode": "mean", "padding_idx": 7}),
                (qembag.embedding, (table, indices[: 4 * num_bags]), {}),
            ]
            made += [(call, given, named, call(*given, num_threads=1, **named)) for call, given, named in calls]
    return made


class Crew:
    """Threads that repeat `work` until stopped. Counts the calls and keeps the errors."""

    def __init__(self, count: int, work: Callable[[np.random.Generator], None]) -> None:
        self.calls = [0] * count
        self.faults: list[str] = []
        self.start, self.stop = threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=self.repeat, args=(number, work)) for number in range(count)]

    def repeat(self, number: int, work: Callable[[np.random.Generator], None]) -> None:
        rng = np.random.default_rng(number)
        self.start.wait()
        while not self.stop.is_set():
            try:
                work(rng)
            except Exception as error:  # noqa: BLE001 - a soak looks for any error
                self.faults.append(repr(error))
                self.stop.set()
            self.calls[number] += 1

    def run(self, seconds: float, watch: Callable[[], None] = lambda: None) -> float:
        """Run for `seconds`, and return the calls per second."""
        for thread in self.threads:
            thread.start()
        start = time.perf_counter()
        self.start.set()
        while time.perf_counter() - start < seconds and not self.stop.is_set():
            self.stop.wait(min(1, seconds))
            watch()
        calls, took = sum(self.calls), time.perf_counter() - start
        self.stop.set()
        for thread in self.threads:
            thread.join()
        return calls / took


def throughput(num_threads: int, seconds: float) -> dict[str, float]:
    """Calls per second of many threads over those of one, for calls of about 100 us and 5 us: medians of 5 rounds."""
    rng = np.random.default_rng(1)
    table = qembag.quantize(rng.normal(size=(2000, 128)).astype(np.float32))
    ratios = {}
    for name, bags in (("two OpenMP threads a call", 1000), ("small calls", 10)):
        indices = rng.integers(0, 2000, (bags, 40))

        def work(_: np.random.Generator, indices: np.ndarray = indices) -> None:
            qembag.embedding_bag(table, indices, num_threads=2)

        rounds = [[Crew(count, work).run(seconds) for count in (1, num_threads)] for _ in range(5)]
        ratios[name] = float(np.median([many / one for one, many in rounds]))
    return ratios


def soak(num_threads: int, seconds: float) -> dict[str, Any]:
    known = requests(np.random.default_rng(0))

    def work(rng: np.random.Generator) -> None:
        call, given, named, expected = known[rng.integers(len(known))]
        out = np.empty_like(expected) if rng.integers(2) else None
        answer = call(*given, out=out, num_threads=int(rng.integers(1, 4)), **named)
        if not np.array_equal(answer, expected) or (out is not None and answer is not out):
            raise AssertionError(f"a wrong answer of {call.__name__}, {named}")

    Crew(num_threads, work).run(min(seconds / 10, 5))  # warm up: one-time allocations happen before the first count
    crew, resident = Crew(num_threads, work), array.array("q")
    before = allocated()
    rate = crew.run(seconds, lambda: resident.append(resident_bytes()))
    after = allocated()
    # Resident memory varies with the outputs in use, so compare medians.
    quarters = [round(float(np.median(part)) / 1e6, 1) for part in np.array_split(resident or [0], 4) if len(part)]
    return {
        "calls": sum(crew.calls),
        "calls a second": round(rate),
        "MB resident, by quarter": quarters,
        "allocated since": {name: after[name] - before[name] for name in before},
        "faults": crew.faults,
    }


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    num_threads = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    said: dict[str, Any] = {"threads": num_threads, "many to one": throughput(num_threads, max(seconds / 60, 0.5))}
    said |= soak(num_threads, seconds)
    print(json.dumps(said, indent=2))
    return bool(said["faults"])


if __name__ == "__main__":
    sys.exit(main())
