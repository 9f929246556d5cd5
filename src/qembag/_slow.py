"""The slow path of lookups: arguments that `_handle` does not recognize are converted here, or refused.

Each function starts from the arguments as they came. What is found in them is an array of ours from then on, whatever
else the caller's objects do; an argument is converted once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arguments, _errors, _handle, _runtime, layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .table import QuantizedTable

_UNKNOWN = "an argument that was checked is not recognized by the compiled code; please report this"


# ---- The public functions ----------------------------------------------------------------------------------------


def embedding_bag(
    table: object,
    indices: object,
    offsets: object,
    mode: object,
    per_sample_weights: object,
    include_last_offset: object,
    padding_idx: object,
    out: object,
    dtype: object,
    num_threads: object,
) -> NDArray[Any]:
    handle = _table(table, "table")._handle
    mode_number = _arguments.mode(mode)
    half = _arguments.is_half(dtype, out)
    threads = _runtime.resolve_threads(num_threads)
    padding = _arguments.padding_number(padding_idx, handle.num_embeddings)
    last = _arguments.flag(include_last_offset, "include_last_offset")
    return _look_up_bags(
        handle, True, indices, offsets, last, per_sample_weights, padding, mode_number, out, half, threads
    )


def embedding(table: object, indices: object, out: object, dtype: object, num_threads: object) -> NDArray[Any]:
    handle = _table(table, "table")._handle
    half = _arguments.is_half(dtype, out)
    if indices is None:
        raise TypeError("indices must be an array of integers, got None")
    return look_up_rows(handle, True, indices, out=out, half=half, num_threads=_runtime.resolve_threads(num_threads))


# ---- PyTorch's operators -----------------------------------------------------------------------------------------


def rowwise_offsets(
    bits: int,
    weight: object,
    indices: object,
    offsets: object,
    mode: object,
    pruned_weights: object,
    per_sample_weights: object,
    mapping: object,
    include_last_offset: object,
    out: object,
) -> NDArray[Any]:
    rows = _arguments.rows(weight, "weight").view()
    row_layout = layout.of_rows(rows.shape[1], bits, "weight")
    pruning_map = _pruning_map(pruned_weights, mapping, out)
    handle = _handle.TableHandle(rows, row_layout, pruning_map)
    return _operator_bags(handle, indices, offsets, mode, per_sample_weights, include_last_offset, out)


def packed_bags(
    bits: int,
    weight: object,
    indices: object,
    offsets: object,
    mode: object,
    pruned_weights: object,
    per_sample_weights: object,
    mapping: object,
    include_last_offset: object,
    out: object,
) -> NDArray[Any]:
    handle = _checked_table(weight, bits)._handle
    pruning_map = _pruning_map(pruned_weights, handle.mapping if mapping is None else mapping, out)
    if pruning_map is not handle.mapping:
        handle = _handle.TableHandle(handle.rows, handle.layout, pruning_map)
    return _operator_bags(handle, indices, offsets, mode, per_sample_weights, include_last_offset, out)


def packed_rows(bits: int, weight: object, indices: object, pruned_weights: object) -> NDArray[Any]:
    handle = _checked_table(weight, bits)._handle
    is_pruned = _pruning_map(pruned_weights, handle.mapping) is not None
    if indices is None:
        raise TypeError("indices must be an array of integers, got None")
    return look_up_rows(handle, is_pruned, indices, num_threads=_runtime.resolve_threads(None))


def _operator_bags(
    handle: _handle.TableHandle,
    indices: object,
    offsets: object,
    mode: object,
    per_sample_weights: object,
    include_last_offset: object,
    out: object,
) -> NDArray[Any]:
    mode_number = _arguments.operator_mode(mode)
    last = _arguments.flag(include_last_offset, "include_last_offset")
    threads = _runtime.resolve_threads(None)
    return _look_up_bags(handle, True, indices, offsets, last, per_sample_weights, -1, mode_number, out, False, threads)


def _pruning_map(pruned_weights: object, mapping: object, out: object = None) -> NDArray[np.int32] | None:
    if not _arguments.flag(pruned_weights, "pruned_weights"):
        return None
    if mapping is None:
        raise ValueError("compressed_indices_mapping must be given with pruned_weights=True, got None")
    return _arguments.mapping(mapping, out=out)


def _table(table: object, name: str) -> QuantizedTable:
    from .table import QuantizedTable  # here only: nothing inside needs to know tables at import

    if not isinstance(table, QuantizedTable):
        raise TypeError(f"{name} must be a QuantizedTable, got {_errors.kind_of(table)}")
    return table


def _checked_table(weight: object, bits: int) -> QuantizedTable:
    table = _table(weight, "weight")
    if table.bits != bits:
        raise ValueError(f"weight must be a table of {bits} bits, got one of {table.bits}")
    return table


# ---- Lookups -----------------------------------------------------------------------------------------------------


def _look_up_bags(
    handle: _handle.TableHandle,
    is_pruned: bool,
    indices: object,
    offsets: object,
    include_last_offset: bool,
    per_sample_weights: object,
    padding_idx: int,
    mode: int,
    out: object,
    half: bool,
    num_threads: int,
) -> NDArray[Any]:
    given = _arguments.bag_indices(indices)
    given_offsets = _arguments.offsets(offsets, given, include_last_offset)
    given_weights = _arguments.weights(per_sample_weights, given, mode)
    num_bags = len(given) if given_offsets is None else len(given_offsets) - include_last_offset
    inputs = {
        "the table": handle.rows,
        "indices": given,
        "offsets": given_offsets,
        "per_sample_weights": given_weights,
        "compressed_indices_mapping": handle.mapping if is_pruned else None,
    }
    target = _arguments.output(out, (num_bags, handle.layout.dim), half, inputs)
    answer = _handle.look_up_bags(
        handle,
        is_pruned,
        _arguments.plain_integers(given),
        None if given_offsets is None else _arguments.plain_integers(given_offsets),
        include_last_offset,
        None if given_weights is None else _arguments.plain_weights(given_weights),
        padding_idx,
        mode,
        target,
        half,
        num_threads,
    )
    if isinstance(answer, np.ndarray):
        return out if isinstance(out, np.ndarray) else answer
    if answer is None:
        raise RuntimeError(_UNKNOWN)
    raise _errors.of_fault(
        answer,
        num_rows=len(handle.rows),
        num_embeddings=_num_embeddings(handle, is_pruned),
        indices=given,
        offsets=given_offsets,
        num_indices=given.size,
        bags=True,
    )


def _num_embeddings(handle: _handle.TableHandle, is_pruned: bool) -> int:
    return handle.num_embeddings if is_pruned else len(handle.rows)


def look_up_rows(
    handle: _handle.TableHandle,
    is_pruned: bool,
    indices: object,
    *,
    out: object = None,
    half: bool = False,
    num_threads: int = 0,
    dequantize: bool = False,
    name: str = "indices",
) -> NDArray[Any]:
    """Single rows; all rows where `indices` is None.

    A row is a bag of its own, or with `dequantize` its plain value, which keeps the sign of a zero.
    """
    given = None if indices is None else _arguments.integers(indices, name)
    shape = (_num_embeddings(handle, is_pruned),) if given is None else given.shape
    inputs = {
        "the table": handle.rows,
        name: given,
        "compressed_indices_mapping": handle.mapping if is_pruned else None,
    }
    dim = handle.layout.dim
    target = _arguments.output(out, (*shape, dim), half, inputs)
    flat = None if given is None else _arguments.plain_integers(given).reshape(-1)
    flat_target = None if target is None else target.reshape(-1, dim)
    answer = _handle.look_up_rows(handle, is_pruned, flat, dequantize, flat_target, half, num_threads)
    if isinstance(answer, np.ndarray):
        if target is None or not isinstance(out, np.ndarray):
            return answer.reshape(*shape, dim)
        if not np.may_share_memory(target, answer):  # `reshape` has copied
            np.copyto(target, answer.reshape(target.shape))
        return out
    if answer is None:
        raise RuntimeError(_UNKNOWN)
    raise _errors.of_fault(
        answer,
        num_rows=len(handle.rows),
        num_embeddings=_num_embeddings(handle, is_pruned),
        indices=given,
        offsets=None,
        num_indices=math.prod(shape),
        bags=False,
        name=name,
    )
