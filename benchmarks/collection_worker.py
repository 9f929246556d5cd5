"""A process of one library for `benchmarks.collection`: makes the tables of a shape, then takes a turn for each line.

A line is ``[shape, batch, threads, seed, seconds]``. The answer has, for each way to call the library, the median of its
microseconds a call and a checksum of one answer.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .collection_tables import SHAPES, Shape, as_torch_has, blob_of, parts, sets, tables_of

# Threads of a pool spin for a while after their work, and would take the next library's core.
IDLE = 0.05


# ---- Contenders: what is called, and what it is given of a set of indices --------------------------------------------

Call = tuple[Callable[..., Any], Callable[[np.ndarray, np.ndarray], tuple[Any, ...]]]


def of_qembag(shape: Shape) -> dict[str, Call]:
    import qembag

    tables = tables_of(shape, blob_of(shape))
    collection = qembag.EmbeddingBagCollection(tables)
    packed = qembag.EmbeddingBagCollection(as_torch_has(shape))
    names, looked_up = list(tables), list(tables.values())
    outputs: dict[int, np.ndarray] = {}

    def loop(*given: Any) -> np.ndarray:
        some = zip(looked_up, *given, strict=True)
        look_up = qembag.embedding_bag
        return np.concatenate([look_up(t, some, ends, include_last_offset=True) for t, some, ends in some], axis=1)

    def into(indices: np.ndarray, ends: np.ndarray) -> np.ndarray:
        batch = (len(ends) - 1) // len(names)
        if batch not in outputs:
            outputs.clear()
            outputs[batch] = np.empty((batch, shape.dim), np.float32)
        return collection(indices, ends, out=outputs[batch])

    def by_feature(indices: np.ndarray, ends: np.ndarray) -> tuple[Any, ...]:
        return (dict(zip(names, parts(shape, indices, ends), strict=True)),)

    def as_lists(indices: np.ndarray, ends: np.ndarray) -> tuple[Any, ...]:
        return tuple(zip(*parts(shape, indices, ends), strict=True))

    def as_they_are(*given: np.ndarray) -> tuple[Any, ...]:
        return given

    return {
        "collection": (collection, as_they_are),
        "collection, out=": (into, as_they_are),
        "collection, dict": (collection, by_feature),
        "collection, torch's rows": (packed, as_they_are),
        "our loop": (loop, as_lists),
    }


def of_torch(shape: Shape) -> dict[str, Call]:
    """A loop over its operators, and what joins their outputs."""
    import torch

    quantized = torch.ops.quantized
    operators = {
        8: quantized.embedding_bag_byte_rowwise_offsets.default,
        4: quantized.embedding_bag_4bit_rowwise_offsets.default,
        2: quantized.embedding_bag_2bit_rowwise_offsets.default,
    }
    weights = [torch.from_numpy(table.data) for table in as_torch_has(shape)]
    kinds = [operators.get(bits) for bits, _, _ in shape.tables]

    def loop(*given: Any) -> Any:
        found = []
        for rows, operator, indices, ends in zip(weights, kinds, *given, strict=True):
            if operator is None:
                bags = torch.nn.functional.embedding_bag(indices, rows, ends, mode="sum", include_last_offset=True)
            else:
                bags = operator(rows, indices, ends, False, 0, False, None, None, True)
            found.append(bags)
        return torch.cat(found, dim=1)

    def tensors(indices: np.ndarray, ends: np.ndarray) -> tuple[Any, ...]:
        pairs = [tuple(map(torch.from_numpy, pair)) for pair in parts(shape, indices, ends)]
        return tuple(zip(*pairs, strict=True))

    return {"torch's loop": (loop, tensors)}


def of_fbgemm(shape: Shape) -> dict[str, Call]:
    """One call, without its checks of bounds (its loops refuse such indices all the same): as a module, scripted, and
    as the operator alone with all of its arguments at hand."""
    import torch
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    kinds = {8: SparseType.INT8, 4: SparseType.INT4, 2: SparseType.INT2, 32: SparseType.FP32}
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{n}", rows, dim, kinds[bits], EmbeddingLocation.HOST) for n, (bits, rows, dim) in enumerate(shape.tables)],
        device="cpu",
        bounds_check_mode=BoundsCheckMode.NONE,
        output_dtype=SparseType.FP32,
    )
    module.initialize_weights()
    blob = blob_of(shape)
    assert blob.shape == tuple(module.weights_host.shape)
    # An array of NumPy's: it asks the system for huge pages.
    module.weights_host = torch.from_numpy(blob)
    function = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default
    m = module
    first = (m.weights_host, m.weights_uvm, m.weights_placements, m.weights_offsets, m.weights_tys, m.D_offsets)
    first += (m.total_D, m.max_int2_D, m.max_int4_D, m.max_int8_D, m.max_float16_D, m.max_float32_D)
    last = (0, None, m.output_dtype, m.lxu_cache_weights, torch.empty((0, 0), dtype=torch.int32), m.row_alignment)
    last += (m.max_float8_D, m.fp8_exponent_bits, m.fp8_exponent_bias)

    def operator(indices: Any, ends: Any) -> Any:
        return function(*first, indices, ends, *last)

    def tensors(*given: np.ndarray) -> tuple[Any, ...]:
        return tuple(map(torch.from_numpy, given))

    calls = {"module": module, "scripted": torch.jit.script(module), "operator": operator}
    return {f"FBGEMM, {name}": (call, tensors) for name, call in calls.items()}


LIBRARIES = {"qembag": of_qembag, "torch": of_torch, "fbgemm": of_fbgemm}


# ---- Turns -----------------------------------------------------------------------------------------------------------


def microseconds(call: Callable[..., Any], given: list[tuple[Any, ...]], seconds: float) -> float:
    """The median time of a call; each has other indices than the one before."""
    turns = itertools.cycle(given)
    clock = time.perf_counter
    times: list[float] = []
    start = clock()
    while clock() < start + seconds / 8 or not times:  # wakes threads
        call(*next(turns))
        times.append(0)
    times.clear()
    end = clock() + seconds
    while len(times) < 5 or clock() < end:
        arguments = next(turns)
        before = clock()
        call(*arguments)
        times.append(clock() - before)
    return 1e6 * float(np.median(times))


def turn(calls: dict[str, Call], shape: Shape, batch: int, seed: int, seconds: float) -> dict[str, tuple[float, int]]:
    found = {}
    order = list(calls)
    for name in order if seed % 2 else reversed(order):
        call, arguments = calls[name]
        given = [arguments(*some) for some in sets(shape, batch, seed)]
        checksum = zlib.crc32(np.ascontiguousarray(call(*given[0])))
        found[name] = microseconds(call, given, seconds), checksum
    return found


def set_threads(library: str, threads: int) -> None:
    if library == "qembag":
        import qembag

        qembag.set_num_threads(threads)
    else:
        import torch

        torch.set_num_threads(threads)


def inference_mode(library: str) -> None:
    if library != "qembag":
        import torch

        torch.inference_mode().__enter__()


def main() -> None:
    library, only = sys.argv[1], sys.argv[2:]
    inference_mode(library)
    made: str | None = None
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        name, batch, threads, seed, seconds = json.loads(line)
        shape = SHAPES[name]()
        if name != made:
            calls.clear()
            gc.collect()
            made = name
            calls = {way: call for way, call in LIBRARIES[library](shape).items() if not only or way in only}
        gc.disable()
        set_threads(library, threads)
        answer = turn(calls, shape, batch, seed, seconds)
        gc.enable()
        time.sleep(IDLE)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
