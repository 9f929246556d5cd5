"""What is measured: each contender is a function to time, and what makes its arguments outside the timed part."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cases import LAYOUTS, Case, plain
from .tables import padding_idx, placed, reserve, sets

WIDTHS = {8: "byte", 4: "4bit", 2: "2bit"}
OPERATORS = {
    "lookup": "embedding_bag_{}_rowwise_offsets",
    "prepack": "embedding_bag_{}_prepack",
    "greedy": "embedding_bag_{}_prepack",
    "lsq": "embedding_bag_{}_prepack",
    "unpack": "embedding_bag_{}_unpack",
}
# Rows ahead that the floor tries on a table; it keeps the best.
FLOOR_AHEAD = (16, 32, 64)
MODES = {"sum": 0, "mean": 1, "max": 2}
# Calls of fewer bags are about what a call costs, and the output that it makes is part of that.
OWN_OUTPUT_BAGS = 16


class Contender(NamedTuple):
    call: Callable[..., Any]
    arguments: Callable[..., tuple[Any, ...]]
    all_count: bool = False  # of a case with options, every row that is looked up, for there are none
    array: Callable[[Any], np.ndarray] = np.asarray  # what a call returns, as an array to compare


def build(name: str, case: Case, table: np.ndarray, mapping: np.ndarray | None, own_output: bool = False) -> Contender:
    """`call` and `arguments`: ``call(*arguments(indices, offsets))`` looks up, ``call(*arguments())`` quantizes.

    With `own_output` each call of qembag writes to the same array. torch's operators cannot, so beside them none does.
    """
    if name == "numpy":
        # What one writes without a package. Not equal in bits: its table is not quantized.
        return Contender(lambda indices, offsets: np.add.reduceat(table[indices], offsets), lambda *traffic: traffic)
    if name == "floor":
        return floor(case, table)
    if name == "copy":
        return plain_copy(case, table)
    if name == "plain":
        call, arguments, *_ = build("qembag", plain(case), table, None, own_output)
        if not case.pruned:
            return Contender(call, arguments, True)
        # Half of the logical rows are stored, each as the row of half its number.
        return Contender(call, lambda indices, *others: arguments(placed(indices // 2), *others), True)
    if name == "torch" and case.of_floats:
        return torch_floats(case, table)
    options = {}
    if own_output and case.work == "lookup" and case.bags >= OWN_OUTPUT_BAGS:
        options["out"] = output(case)
    if case.call == "public" and name != "torch":
        return public(case, table, mapping, options)
    if name == "torch":
        import torch

        torch.set_num_threads(case.threads)
        operators, convert = torch.ops.quantized, torch.from_numpy
    else:
        import qembag

        qembag.set_num_threads(case.threads)
        if case.work == "lsq":
            return Contender(lambda: qembag.quantize(table, case.bits, method="lsq").data, lambda: ())
        operators, convert = qembag.ops, lambda array: array
    call = getattr(operators, OPERATORS[case.work].format(WIDTHS[case.bits]))
    call = functools.partial(call, **options) if options else call
    first = convert(table)
    of_mapping = None if mapping is None else convert(mapping)

    def arguments(*traffic: np.ndarray) -> tuple[Any, ...]:
        given = [convert(array) for array in traffic]
        if case.work in ("greedy", "lsq"):
            return first, True
        if not (case.weighted or case.pruned or case.mode != "sum"):
            return first, *given
        indices, offsets, weights = given if case.weighted else (*given, None)
        return first, indices, offsets, False, MODES[case.mode], case.pruned, weights, of_mapping

    return Contender(call, arguments)


def output(case: Case) -> np.ndarray:
    if case.element == "bfloat16":
        dtype = np.dtype(np.uint16)
    else:
        dtype = np.dtype(np.float16 if case.half or case.element == "float16" else np.float32)
    rows = case.rows if case.work == "dequantize" else case.bags
    return reserve(rows * case.dim * dtype.itemsize).view(dtype).reshape(rows, case.dim)


def table_of(case: Case, rows: np.ndarray, mapping: np.ndarray | None) -> Any:
    """A table of qembag's, with no argument that the case does not need: older builds know fewer."""
    import qembag

    if case.element == "bfloat16":
        return qembag.FloatTable(rows, dtype="bfloat16")
    if case.of_floats:
        return qembag.FloatTable(rows)
    options: dict[str, Any] = {}
    if case.other_layout:
        layout = LAYOUTS[case.layout]
        options = {
            "dim": case.dim,
            "scale_dtype": layout.scale_dtype,
            "scale_first": layout.scale_first,
            "group_size": layout.group_size,
        }
    return qembag.QuantizedTable(rows, case.bits, compressed_indices_mapping=mapping, **options)


def public(case: Case, table: np.ndarray, mapping: np.ndarray | None, options: dict[str, Any]) -> Contender:
    """`qembag.embedding_bag`, with no argument that the case does not need; or a table's `dequantize`."""
    import qembag

    if case.weighted:
        raise ValueError(f"{case.name}: weights are measured through ops")
    qembag.set_num_threads(case.threads)
    weights = table_of(case, table, mapping)
    if case.work == "dequantize":
        return Contender(functools.partial(weights.dequantize, out=output(case)), lambda: ())
    if case.mode != "sum":
        options["mode"] = case.mode
    if case.padding != "none":
        options["padding_idx"] = padding_idx(case, len(table))
    if case.element == "bfloat16":
        options["dtype"] = "bfloat16"  # with an output too: its uint16 are bits only when this says so
    elif (case.half or case.element == "float16") and "out" not in options:
        options["dtype"] = np.float16
    call = functools.partial(qembag.embedding_bag, **options) if options else qembag.embedding_bag
    return Contender(call, lambda indices, offsets: (weights, indices, offsets))


def torch_floats(case: Case, table: np.ndarray) -> Contender:
    """torch.nn.functional.embedding_bag, whose answers are of its table's type."""
    import torch

    torch.set_num_threads(case.threads)
    is_bfloat16 = case.element == "bfloat16"
    # Of bfloat16 NumPy has only the bits; torch converts no uint16 to it.
    weights = torch.from_numpy(table.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(table)

    def array(answer: Any) -> np.ndarray:
        return answer.view(torch.int16).numpy().view(np.uint16) if is_bfloat16 else answer.numpy()

    def arguments(indices: np.ndarray, offsets: np.ndarray) -> tuple[Any, ...]:
        return torch.from_numpy(indices), weights, torch.from_numpy(offsets)

    return Contender(functools.partial(torch.nn.functional.embedding_bag, mode=case.mode), arguments, False, array)


def plain_copy(case: Case, floats: np.ndarray) -> Contender:
    """As many float32 as a table has, copied: what memory lets `dequantize` write, and more than it reads."""
    out = output(case)

    def copy() -> np.ndarray:
        np.copyto(out, floats)
        return out

    return Contender(copy, lambda: ())


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
    return Contender(function, arguments)
