"""Prints the numbers of docs/from-torchao.md: bytes, time and error of embeddings that torchao quantized.

    python benchmarks/from_torchao.py

needs torch and torchao, and takes half a minute. Both libraries look up the same rows in one thread, in turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

import qembag

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ROWS, DIM, LOOKED_UP, ROUNDS = 100_000, 128, 1000, 15
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "int8, a scale a row": (torch.int8, PerAxis(0), None),
    "int4, groups of 32": (torch.int4, PerGroup(32), torch.float16),
    "int2, groups of 32": (torch.int2, PerGroup(32), torch.float16),
}


def median_of(calls: list[Callable[[], object]]) -> list[float]:
    """The median time of each call, in seconds."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 2):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def error_of(rows: np.ndarray, weights: np.ndarray) -> float:
    """Relative to the weights, root mean square."""
    return float(np.sqrt(np.mean((rows - weights) ** 2) / np.mean(weights**2)))


def measure(dtype: Any, granularity: Any, scale_dtype: Any) -> str:
    module = torch.nn.Embedding(NUM_ROWS, DIM)
    weights = module.weight.detach().numpy().copy()
    config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, scale_dtype=scale_dtype)
    quantize_(module, config, lambda *_: True)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(module.state_dict(), f"{folder}/model.pt")
        table = qembag.load_tables(f"{folder}/model.pt", mmap=False)["weight"]
    rows = np.random.default_rng(0).integers(0, NUM_ROWS, LOOKED_UP)
    indices = torch.from_numpy(rows)
    assert np.array_equal(qembag.embedding(table, rows), module(indices).numpy())
    theirs, ours = median_of([lambda: module(indices), lambda: qembag.embedding(table, rows)])
    weight = module.weight
    nbytes = sum(getattr(weight, part).nbytes for part in ("qdata", "scale", "zero_point"))
    again = qembag.quantize(
        weights,
        bits=table.bits,
        method="lsq",
        scale_dtype=table.layout.scale_dtype,
        group_size=table.layout.group_size if table.layout.num_groups > 1 else None,
    )
    errors = error_of(table.dequantize(), weights), error_of(again.dequantize(), weights)
    return (
        f"{nbytes / 1e6:.1f} MB | {table.nbytes / 1e6:.1f} MB | {theirs * 1e3:.1f} ms | {ours * 1e3:.3f} ms | "
        f"{errors[0]:.4f} | {errors[1]:.4f}"
    )


def main() -> None:
    torch.set_num_threads(1)
    qembag.set_num_threads(1)
    for name, options in KINDS.items():
        print(f"| {name} | {measure(*options)} |")


if __name__ == "__main__":
    main()
