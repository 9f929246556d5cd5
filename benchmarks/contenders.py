"""Those who are measured: each is a function to time, and what makes its arguments outside the timed part."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Case
from .tables import sets

WIDTHS = {8: "byte", 4: "4bit", 2: "2bit"}
OPERATORS = {
    "lookup": "embedding_bag_{}_rowwise_offsets",
    "prepack": "embedding_bag_{}_prepack",
    "greedy": "embedding_bag_{}_prepack",
    "unpack": "embedding_bag_{}_unpack",
}
# Rows ahead that the floor tries on a table; it keeps the best.
FLOOR_AHEAD = (16, 32, 64)

Contender = tuple[Callable[..., Any], Callable[..., tuple[Any, ...]]]


def build(name: str, case: Case, table: np.ndarray, mapping: np.ndarray | None) -> Contender:
    """`call` and `arguments`: ``call(*arguments(indices, offsets))`` looks up, ``call(*arguments())`` quantizes."""
    if name == "numpy":
        # What one writes without a package. Not equal in bits: its table is not quantized.
        return (lambda indices, offsets: np.add.reduceat(table[indices], offsets)), (lambda *traffic: traffic)
    if name == "floor":
        return floor(case, table)
    if name == "torch":
        import torch

        torch.set_num_threads(case.threads)
        operators, convert = torch.ops.quantized, torch.from_numpy
    else:
        import qembag

        qembag.set_num_threads(case.threads)
        operators, convert = qembag.ops, lambda array: array
    call = getattr(operators, OPERATORS[case.work].format(WIDTHS[case.bits]))
    first = convert(table)
    of_mapping = None if mapping is None else convert(mapping)

    def arguments(*traffic: np.ndarray) -> tuple[Any, ...]:
        given = [convert(array) for array in traffic]
        if case.work == "greedy":
            return first, True
        if not (case.weighted or case.pruned):
            return first, *given
        indices, offsets, weights = given if case.weighted else (*given, None)
        return first, indices, offsets, False, 0, case.pruned, weights, of_mapping

    return call, arguments


@functools.lru_cache
def compiled_floor(row_bytes: int) -> Any:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder) / "floor.so"
        source = Path(__file__).with_name("floor.c")
        options = ["-O2", "-shared", "-fPIC", f"-DROW_BYTES={row_bytes}"]
        subprocess.run(["cc", *options, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_rows  # stays mapped when the file is gone
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_uint64
    return function


def floor(case: Case, table: np.ndarray) -> Contender:
    function = compiled_floor(case.row_bytes)

    def arguments(indices: np.ndarray, *unused: np.ndarray) -> tuple[int, ...]:
        # Addresses only: the caller holds the arrays while it calls.
        return table.ctypes.data, indices.ctypes.data, len(indices), ahead

    times = dict.fromkeys(FLOOR_AHEAD, float("inf"))
    for attempt in range(5):
        for ahead in FLOOR_AHEAD:
            traffic = list(sets(case, len(table), (1, attempt, ahead), 2))
            prepared = [arguments(*arrays) for arrays in traffic]
            start = time.perf_counter()
            for some in prepared:
                function(*some)
            times[ahead] = min(times[ahead], time.perf_counter() - start)
    ahead = min(times, key=times.__getitem__)
    return function, arguments
