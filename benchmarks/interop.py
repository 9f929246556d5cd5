"""Lookups of other libraries' modules, and of the same tables through qembag: the tables of docs/from-torch.md and
docs/from-torchrec.md.

    python -m benchmarks.interop

Needs torch, and fbgemm_gpu for its half. Contenders take turns in one process; times are medians over rounds. Answers are
compared first: they must be the same bits.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import qembag
from qembag.interop import fbgemm
from qembag.interop import torch as interop

NUM_ROWS, DIM, BAG, ROUNDS = 400_000, 64, 20, 48
# Each call has another batch than the one before it, so that no contender finds its rows in the cache.
BATCHES = 8


def microseconds(calls: list[Callable[[int], Any]]) -> list[float]:
    """The median time of each call; they take turns, each on a batch that the other has not just had."""
    found = []
    for number in range(ROUNDS):
        times = []
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call((number + place * BATCHES // 2) % BATCHES)
            times.append(1e6 * (time.perf_counter() - start))
        found.append(times)
    return [float(median) for median in np.median(found[BATCHES:], axis=0)]


def row(name: str, theirs: Callable[[int], Any], ours: Callable[[int], np.ndarray]) -> str:
    assert np.array_equal(theirs(0).detach().numpy(), ours(0))
    cells = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        qembag.set_num_threads(threads)
        one, two = microseconds([theirs, ours])
        cells += [f"{one:,.0f}", f"{two:,.0f}", f"{one / two:.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


def header(library: str) -> None:
    print(f"\n| | {library}, us | qembag, us | ratio | {library}, 2 threads, us | qembag, us | ratio |")
    print("| --- |" + " --: |" * 6)


def compared(
    name: str, tables: list[Any], call: Callable[[Any, Any], Any], batch: int, rng: np.random.Generator
) -> str:
    """`call` takes indices and the ends of the bags of all tables, one table after the other."""
    ends = BAG * np.arange(len(tables) * batch + 1)
    batches = [rng.integers(0, tables[0].num_rows, ends[-1]) for _ in range(BATCHES)]
    given = [(torch.from_numpy(indices), torch.from_numpy(ends)) for indices in batches]
    parts = [indices.reshape(len(tables), -1) for indices in batches]
    out = np.empty((batch, len(tables) * DIM), np.float32)
    columns = [out[:, number * DIM : (number + 1) * DIM] for number in range(len(tables))]

    def ours(number: int) -> np.ndarray:
        for table, indices, place in zip(tables, parts[number], columns, strict=True):
            qembag.embedding_bag(table, indices, ends[: batch + 1], include_last_offset=True, out=place)
        return out

    return row(f"{name}, {batch} bags", lambda number: call(*given[number]), ours)


def quantized_module(bits: int, rng: np.random.Generator) -> Any:
    kind = torch.quint8 if bits == 8 else torch.quint4x2
    module = torch.ao.nn.quantized.EmbeddingBag(NUM_ROWS, DIM, include_last_offset=True, dtype=kind)
    table = qembag.quantize(rng.normal(size=(NUM_ROWS, DIM)).astype(np.float32), bits)
    module.load_state_dict(interop.to_state_dict(table, exact=False))
    return module


def of_torch(rng: np.random.Generator) -> None:
    header("torch")
    for bits in (8, 4, 32):
        if bits == 32:
            module = torch.nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", include_last_offset=True).requires_grad_(False)
        else:
            module = quantized_module(bits, rng)
        for batch in (8, 512):
            print(compared(f"{bits} bits", [interop.from_module(module)], module, batch, rng))


def of_fbgemm(rng: np.random.Generator) -> None:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    header("FBGEMM")
    for bits, kind in ((8, SparseType.INT8), (4, SparseType.INT4), (2, SparseType.INT2)):
        for count in (1, 26):
            rows = NUM_ROWS // count
            source = qembag.quantize(rng.normal(size=(rows, DIM)).astype(np.float32), bits, scale_dtype="float16")
            operator = IntNBitTableBatchedEmbeddingBagsCodegen(
                [(f"t{number}", rows, DIM, kind, EmbeddingLocation.HOST) for number in range(count)],
                device="cpu",
                bounds_check_mode=BoundsCheckMode.FATAL,
                output_dtype=SparseType.FP32,
                weight_lists=[fbgemm.to_weights(source)] * count,
            )
            tables = list(fbgemm.from_module(operator).values())
            for batch in (8, 512):
                print(compared(f"{bits} bits, {count} tables", tables, operator, batch, rng))


def main() -> None:
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    of_torch(rng)
    of_fbgemm(rng)


if __name__ == "__main__":
    main()
