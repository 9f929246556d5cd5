"""Calls that alternate with another library's parallel work, as a model's layers do, against the two run apart.

    python -m benchmarks.alternating

Each library keeps threads of its own. Where they spin while they wait, each change from one to the other costs as long as
they spin. Every line is a fresh process; times are means, for stalls are what is looked for.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

ROUNDS = 3
PROGRAM = """
import json, sys, time
other, first, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
if first == "other" and other != "numpy":
    import torch
import numpy as np, qembag
rng = np.random.default_rng(0)
table = qembag.quantize(rng.normal(size=(2000, 128)).astype(np.float32))
indices = rng.integers(0, 2000, (2000, 20))
out = np.empty((2000, 128), np.float32)
left, right = rng.normal(size=(2, size, size)).astype(np.float32)
product = np.empty_like(left)
multiply = lambda: np.matmul(left, right, out=product)
if other == "torch":
    import torch
    torch.set_num_threads(2)
    a, b, c = map(torch.from_numpy, (left, right, product))
    multiply = lambda: torch.mm(a, b, out=c)
look_up = lambda: qembag.embedding_bag(table, indices, out=out, num_threads=2)

def microseconds(call, count=400):
    for _ in range(40):
        call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return 1e6 * (time.perf_counter() - start) / count

apart = microseconds(look_up), microseconds(multiply)
print(json.dumps([*apart, microseconds(lambda: (look_up(), multiply()))]))
"""


def main() -> None:
    print("| with | lookup, us | product, us | both in turn, us | ratio |\n| --- | --: | --: | --: | --: |")
    for other, first in (("numpy", "qembag"), ("torch", "qembag"), ("torch", "other")):
        for size in (128, 384, 1024):
            runs = []
            for _ in range(ROUNDS):
                command = [sys.executable, "-c", PROGRAM, other, first, str(size)]
                runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            ratios = [both / (ours + theirs) for ours, theirs, both in runs]
            middle = np.median(runs, axis=0)
            name = other if other == "numpy" else f"torch, {'imported first' if first == 'other' else 'imported later'}"
            cells = " | ".join(f"{value:.0f}" for value in middle)
            print(f"| {name}, {size} | {cells} | {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
