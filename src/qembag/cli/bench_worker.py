"""The process of one contender of `qembag bench`. It is a script, so that torch runs without this package.

The argument is a job as JSON. Each input line names a .npz file with batches of bags. The answer is a line of JSON:
the seconds that the lookups took, without the first batch, which warms up; or an error. The vectors of the first batch
go to the job's answer file.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import numpy as np

WIDTHS = {8: "byte", 4: "4bit", 2: "2bit"}


def of_package(job: dict[str, Any]) -> Any:
    sys.path.insert(0, job["root"])
    package = importlib.import_module(job["package"])
    stored_table = importlib.import_module(f"{job['package']}.cli.contents").stored_table
    table = stored_table(importlib.import_module("pathlib").Path(job["file"]), job["table"])
    if job["contender"] == "qembag":
        table.prefault()
        threads = job["threads"]
        return lambda indices, offsets: package.embedding_bag(table, indices, offsets, num_threads=threads)
    rows = table.dequantize()

    def bag_by_bag(indices: Any, offsets: Any) -> Any:
        sums = np.empty((len(offsets), rows.shape[1]), np.float32)
        ends = [*offsets[1:].tolist(), len(indices)]
        for bag, (start, end) in enumerate(zip(offsets.tolist(), ends, strict=True)):
            np.add.reduce(rows.take(indices[start:end], axis=0), axis=0, out=sums[bag])
        return sums

    return bag_by_bag


def of_torch(job: dict[str, Any]) -> Any:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(job["threads"])
    rows = torch.from_numpy(np.load(job["rows"]))
    convert = torch.from_numpy
    if job["bits"] is None:
        bag = torch.nn.functional.embedding_bag
        return lambda indices, offsets: bag(convert(indices), rows, convert(offsets), mode="sum").numpy()
    operator = getattr(torch.ops.quantized, f"embedding_bag_{WIDTHS[job['bits']]}_rowwise_offsets")
    mapping = None if job["mapping"] is None else convert(np.load(job["mapping"]))
    more = () if mapping is None else (False, 0, True, None, mapping)
    return lambda indices, offsets: operator(rows, convert(indices), convert(offsets), *more).numpy()


def seconds_of(look_up: Any, path: str, answer: str) -> float:
    with np.load(path) as archive:
        batches = [(archive[f"indices{number}"], archive[f"offsets{number}"]) for number in range(len(archive) // 2)]
    np.save(answer, look_up(*batches[0]))
    start = time.perf_counter()
    for batch in batches[1:]:
        look_up(*batch)
    return time.perf_counter() - start


def main() -> None:
    job = json.loads(sys.argv[1])
    try:
        look_up = of_torch(job) if job["contender"] == "torch" else of_package(job)
        print(json.dumps({"ready": np.__version__ if job["contender"] == "numpy" else ""}), flush=True)
        for line in sys.stdin:
            print(json.dumps({"seconds": seconds_of(look_up, json.loads(line), job["answer"])}), flush=True)
    except Exception as error:  # noqa: BLE001 (the process that asked reports it)
        print(json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())}), flush=True)


if __name__ == "__main__":
    main()
