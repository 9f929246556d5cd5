"""Columns of lists in Arrow's memory, against the same lists as NumPy arrays: the same bits, where the memory is, and time.

    python -m benchmarks.arrow [number of lists]

Needs nanoarrow, pyarrow and polars. Each line is a fresh process, in which the two take turns. The default, 10,000,000
lists of about 20 int64, takes 8 GB of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

STARTS = 3
PROGRAM = """
import json, sys, time
import numpy as np, pyarrow as pa, qembag
from qembag.interop import arrow
form, count, rounds, threads = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)
table = qembag.quantize(rng.normal(size=(100_000, 16)).astype(np.float32), 4)
qembag.set_num_threads(threads)
lengths = np.full(count, 20) if form == "FixedSizeList" else rng.integers(10, 31, count)
offsets = np.zeros(count + 1, np.int64 if form in ("LargeList", "polars") else np.int32)
np.cumsum(lengths, out=offsets[1:])
indices = rng.integers(0, len(table), offsets[-1])
memory = indices, offsets
if form == "FixedSizeList":
    column = pa.FixedSizeListArray.from_arrays(pa.array(indices), 20)
    given = dict(indices=indices.reshape(-1, 20))
else:
    kind = pa.LargeListArray if offsets.itemsize == 8 else pa.ListArray
    column = kind.from_arrays(pa.array(offsets), pa.array(indices))
    given = dict(indices=indices, offsets=offsets, include_last_offset=True)
if form == "100 chunks":
    step = -(-count // 100)
    column = pa.chunked_array([column[start : start + step] for start in range(0, count, step)])
if form == "polars":
    import polars as pl
    column = pl.Series(column)
    whole = column.to_arrow()
    memory = [np.frombuffer(buffer, np.int64) for buffer in (whole.values.buffers()[1], whole.buffers()[1])]
found = arrow.bags_of(column, "indices")
in_place = all(
    np.may_share_memory(view, owner)  # whether the addresses of one are among those of the other
    for bags in found
    for view, owner in zip(bags[:2], memory)
    if view is not None
)
out = np.empty((count, 16), np.float32)
other = np.empty_like(out)
theirs = lambda: qembag.embedding_bag(table, **given, out=out)
ours = lambda: qembag.embedding_bag(table, column, out=other)
theirs(), ours()
same = bool((out.view(np.uint32) == other.view(np.uint32)).all())
times = []
for number in range(rounds):
    took = {}
    for call in (theirs, ours) if number % 2 else (ours, theirs):
        start = time.perf_counter()
        call()
        took[call] = time.perf_counter() - start
    times.append((took[theirs], took[ours]))
start = time.perf_counter()
arrow.bags_of(column, "indices")
print(json.dumps([same, in_place, *np.median(times, axis=0), time.perf_counter() - start]))
"""


def main(count: int = 10_000_000) -> None:
    rounds = 7 if count >= 1_000_000 else 21
    print(f"{count:,} lists of about 20 int64, 4 bits x 16\n")
    print("| column | threads | same bits | no copy | NumPy, ms | Arrow, ms | speed | reading it, us |")
    print("| --- | --: | --- | --- | --: | --: | --- | --: |")
    for form in ("List", "LargeList", "FixedSizeList", "100 chunks", "polars"):
        for threads in (1, 2):
            runs = []
            for _ in range(STARTS):
                command = [sys.executable, "-c", PROGRAM, form, *map(str, (count, rounds, threads))]
                runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            same, in_place = (all(run[number] for run in runs) for number in (0, 1))
            theirs, ours, reading = np.median([run[2:] for run in runs], axis=0)
            ratios = [run[2] / run[3] for run in runs]
            print(
                f"| {form} | {threads} | {same} | {in_place} | {1e3 * theirs:,.1f} | {1e3 * ours:,.1f} | "
                f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {1e6 * reading:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
