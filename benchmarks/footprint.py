"""What the package costs beside its lookups: time to import, memory of a call."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np

IMPORT_RUNS = 15
IMPORTS = """
import json, time
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import {module}
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""
# NumPy reports its arrays to tracemalloc. The first call is not counted: it makes what is made once.
ALLOCATION = """
import json, tracemalloc
import numpy as np, qembag
peaks = {}
for bits in (8, 4, 2):
    table = qembag.quantize(np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32), bits=bits)
    look_up = getattr(qembag.ops, "embedding_bag_%s_rowwise_offsets" % {8: "byte", 4: "4bit", 2: "2bit"}[bits])
    for count in (10_000, 1_000_000):
        indices, offsets = np.arange(count) % 2000, np.arange(0, count, 40)
        look_up(table.data, indices, offsets)
        tracemalloc.start()
        answer = look_up(table.data, indices, offsets)
        peaks["%d bits, %d indices" % (bits, count)] = tracemalloc.get_traced_memory()[1] - answer.nbytes
        tracemalloc.stop()
print(json.dumps(peaks))
"""


def run(program: str) -> Any:
    return json.loads(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE).stdout)


def measure_import() -> dict[str, float]:
    """Median milliseconds in fresh processes, each package's beyond NumPy's."""
    medians = {}
    for module, runs in (("qembag", IMPORT_RUNS), ("torch", 5)):
        times = [run(IMPORTS.format(module=module)) for _ in range(runs + 1)][1:]
        of_numpy, beyond = 1000 * np.median(times, axis=0)
        medians.setdefault("numpy", float(of_numpy))
        medians[module] = float(beyond)
    return medians


def measure_allocation() -> dict[str, int]:
    """Bytes at the peak of a call, beyond its output."""
    return run(ALLOCATION)
