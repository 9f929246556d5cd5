"""qembag within PyTorch, beside PyTorch: `python -m benchmarks.torch_front` (some minutes; torch, and 4 GB of memory).

Prints the tables of docs/torch.md: what a call of one operator costs, by the number of indices; and what a model of 26
tables costs, in time and memory. Every contender is a fresh process in each round, and they take turns; numbers are
medians of rounds, a round's the median of its calls.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TABLES, DIM, PER_BAG = 26, 64, 20
BATCHES = [1, 16, 128, 1024]
CALLS = [(1, 1), (1, 10), (10, 10), (50, 10), (50, 20), (200, 20), (1000, 20), (5000, 20)]
OPERATORS = ["torch", "override"]
MODELS = [
    "float modules",
    "torch's 4-bit operators",
    "those, override=True",
    "replace_embedding_bags",
    "compiled",
    "EmbeddingBagCollection",
]


def microseconds(call: Callable[[], Any], seconds: float = 0.3) -> float:
    """The median of a call's times."""
    times = []
    end = time.perf_counter() + seconds
    for _ in range(5):
        call()
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times))


def resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # the floats that tables were made of are freed, but kept for later
    with open("/proc/self/status") as file:
        return 1024 * int(dict(line.split(":", 1) for line in file)["VmRSS"].split()[0])


def operator_times(contender: str, num_rows: int) -> list[float]:
    """Of one 4-bit lookup, for each of CALLS."""
    import torch

    import qembag
    import qembag.torch

    rng = np.random.default_rng(0)
    rows = torch.from_numpy(qembag.quantize(rng.normal(size=(num_rows, DIM)).astype(np.float32), 4).data)
    if contender == "override":
        qembag.torch.register_operators(override=True)
    operator = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    times = []
    for bags, per_bag in CALLS:
        offsets = torch.arange(0, bags * per_bag, per_bag)
        # Other indices at each call, as in life.
        some = [torch.from_numpy(rng.integers(0, num_rows, bags * per_bag)) for _ in range(50)]
        turn = iter(some * 10**5)
        times.append(microseconds(lambda: operator(rows, next(turn), offsets)))  # noqa: B023
    return times


def model_of(contender: str, num_rows: int) -> Any:
    import torch

    import qembag
    import qembag.torch

    class Bags(torch.nn.Module):
        """Modules, or packed rows for torch's operator."""

        def __init__(self) -> None:
            super().__init__()
            self.bags = torch.nn.ModuleList()
            self.rows: list[torch.Tensor] = []
            generator = torch.Generator().manual_seed(0)
            for _ in range(TABLES):
                floats = torch.randn(num_rows, DIM, generator=generator)
                if "operators" in contender or "override" in contender:
                    self.rows.append(torch.from_numpy(qembag.quantize(floats.numpy(), 4).data))
                else:
                    bag = torch.nn.EmbeddingBag(num_rows, DIM, mode="sum", _weight=floats)
                    self.bags.append(bag)
                    if contender != MODELS[0]:
                        qembag.torch.replace_embedding_bags(self, 4, "minmax")
            self.collection: Any = None
            if contender == MODELS[-1]:
                collection = qembag.EmbeddingBagCollection([bag.table for bag in self.bags])
                self.collection, self.bags = qembag.torch.EmbeddingBagCollection(collection), None
            self.top = torch.nn.Sequential(torch.nn.Linear(TABLES * DIM, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

        def forward(self, indices: Any, offsets: torch.Tensor) -> torch.Tensor:
            if self.collection is not None:
                return self.top(self.collection(indices, offsets))
            operator = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
            if self.rows:
                found = [operator(rows, some, offsets) for rows, some in zip(self.rows, indices, strict=True)]
            else:
                found = [bag(some, offsets) for bag, some in zip(self.bags, indices, strict=True)]
            return self.top(torch.cat(found, 1))

    model = Bags().eval()
    if "override" in contender:
        qembag.torch.register_operators(override=True)
    return torch.compile(model, fullgraph=True) if contender == "compiled" else model


def model_times(contender: str, num_rows: int) -> list[float]:
    """Of a model, for each of BATCHES; before them its resident megabytes."""
    import torch

    import qembag.torch  # noqa: F401 (so that all have imported the same)

    def batch_of(indices: list[torch.Tensor], batch: int) -> tuple[Any, torch.Tensor]:
        """As the model takes it: by table, or of one table after the other with the end of the last bag."""
        if contender == MODELS[-1]:
            return torch.cat(indices), torch.arange(TABLES * batch + 1) * PER_BAG
        return indices, torch.arange(0, batch * PER_BAG, PER_BAG)

    used = [torch.zeros(2 * PER_BAG, dtype=torch.int64)] * TABLES
    with torch.inference_mode():
        model_of(contender, 10)(*batch_of(used, 2))  # code that is loaded at its first use
    before = resident()
    model = model_of(contender, num_rows)
    found = [(resident() - before) / 1e6]
    rng = np.random.default_rng(1)
    with torch.inference_mode():
        for batch in BATCHES:
            some = [
                batch_of([torch.from_numpy(rng.integers(0, num_rows, batch * PER_BAG)) for _ in range(TABLES)], batch)
                for _ in range(5)
            ]
            turn = iter(some * 10**5)
            found.append(microseconds(lambda: model(*next(turn)), 1))  # noqa: B023
    return found


def measured(kind: str, contenders: list[str], num_rows: int, threads: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in each of which every contender is a process of its own."""
    runs: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders if number % 2 else reversed(contenders):
            command = [sys.executable, "-m", "benchmarks.torch_front", "--worker", kind, name]
            command += ["--rows", str(num_rows), "--threads", str(threads)]
            runs[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    return {name: np.median(some, axis=0) for name, some in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="of each table")
    parser.add_argument("--threads", type=int, help="1 and 2 if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        import torch

        torch.set_num_threads(chosen.threads)
        kind, name = chosen.worker
        print(json.dumps((operator_times if kind == "operator" else model_times)(name, chosen.rows)))
        return
    for threads in [chosen.threads] if chosen.threads else [1, 2]:
        print(f"\nOne 4-bit table of {chosen.rows} x {DIM}, threads: {threads}; microseconds a call\n")
        print("| bags x indices | torch | override=True | ratio |\n| --- | --: | --: | --: |")
        found = measured("operator", OPERATORS, chosen.rows, threads, chosen.rounds)
        for (bags, per_bag), theirs, ours in zip(CALLS, found["torch"], found["override"], strict=True):
            print(f"| {bags} x {per_bag} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} |")
        print(
            f"\n{TABLES} tables of {chosen.rows} x {DIM}, bags of {PER_BAG}, threads: {threads}; microseconds a batch\n"
        )
        print("| | memory, MB | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |")
        print("| --- |" + " --: |" * (len(BATCHES) + 1))
        for name, numbers in measured("model", MODELS, chosen.rows, threads, chosen.rounds).items():
            print(f"| {name} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
