"""The slow path of lookups: arguments that `_handle` does not recognize are converted here, or refused.

Each function starts from the arguments as they came. What is found in them is an array of ours from then on, whatever
else the caller's objects do; an argument is converted once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from . import _arguments, _batches, _errors, _handle, _runtime, _slow_collection, layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .table import QuantizedTable

_FLOAT32 = _arguments.OutType(0, np.dtype(np.float32))


# ---- The public functions ----------------------------------------------------------------------------------------


def embedding_bag(
    table: object,
    indices: object,
    offsets: object,
    lengths: object,
    mode: object,
    per_sample_weights: object,
    include_last_offset: object,
    padding_idx: object,
    invalid: object,
    out: object,
    dtype: object,
    num_threads: object,
) -> NDArray[Any]:
    handle = _handle_of(table)
    mode_number = _arguments.mode(mode)
    target, dtype = _arguments.output_array(out, dtype)
    out_type = _arguments.out_type(dtype, target)
    threads = _runtime.resolve_threads(num_threads)
    padding = _arguments.padding_number(padding_idx, handle.num_embeddings)
    last = _arguments.flag(include_last_offset, "include_last_offset")
    options = _Options(True, padding, _arguments.skips_invalid(invalid), mode_number, out_type, threads, True)
    if lengths is not None and (offsets is not None or last):
        other = "include_last_offset=True" if offsets is None else "offsets"
        raise ValueError(f"lengths must be None with {other}, got lengths")
    try:
        batch = _batches.bags_of(indices, "indices")
    except ImportError:
        if offsets is None and lengths is None:
            raise
        batch = None  # a column of numbers, which NumPy reads by itself
    if batch is not None:
        _batches.refuse(offsets, "offsets", "for a column or a matrix")
        _batches.refuse(lengths, "lengths", "for a column or a matrix")
        return _given(out, _look_up_batch(handle, batch, per_sample_weights, target, options))
    return _given(out, _look_up_bags(handle, indices, offsets, lengths, last, per_sample_weights, target, options))


def embedding(
    table: object, indices: object, invalid: object, out: object, dtype: object, num_threads: object
) -> NDArray[Any]:
    handle = _handle_of(table)
    target, dtype = _arguments.output_array(out, dtype)
    out_type = _arguments.out_type(dtype, target)
    if indices is None:
        raise TypeError("indices must be an array of integers, got None")
    result = look_up_rows(
        handle,
        True,
        indices,
        skips_invalid=_arguments.skips_invalid(invalid),
        out=target,
        out_type=out_type,
        num_threads=_runtime.resolve_threads(num_threads),
    )
    return _given(out, result)


def _given(out: object, result: NDArray[Any]) -> NDArray[Any]:
    """What a call returns: the very `out` that came, also where it is a tensor."""
    return result if out is None else cast("NDArray[Any]", out)


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
    options = _Options(True, -1, False, mode_number, _FLOAT32, threads, False)
    return _look_up_bags(handle, indices, offsets, None, last, per_sample_weights, out, options)


def _pruning_map(pruned_weights: object, mapping: object, out: object = None) -> NDArray[np.int32] | None:
    if not _arguments.flag(pruned_weights, "pruned_weights"):
        return None
    if mapping is None:
        raise ValueError("compressed_indices_mapping must be given with pruned_weights=True, got None")
    return _arguments.mapping(mapping, out=out)


def _handle_of(table: object) -> _handle.TableHandle:
    from .base import Table  # here only: nothing inside needs to know tables at import
    from .float_table import handle_of_array

    if isinstance(table, Table):
        return table._handle
    if isinstance(table, np.ndarray) or hasattr(table, "__dlpack__"):
        return handle_of_array(table)
    raise TypeError(f"table must be a QuantizedTable, a FloatTable or an array of floats, got {_errors.kind_of(table)}")


def _checked_table(weight: object, bits: int) -> QuantizedTable:
    from .table import QuantizedTable

    if not isinstance(weight, QuantizedTable):
        raise TypeError(f"weight must be a QuantizedTable, got {_errors.kind_of(weight)}")
    if weight.bits != bits:
        raise ValueError(f"weight must be a table of {bits} bits, got one of {weight.bits}")
    return weight


# ---- Lookups -----------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """Of a lookup of bags; checked."""

    is_pruned: bool
    padding_idx: int
    skips_invalid: bool
    mode: int
    out_type: _arguments.OutType
    num_threads: int
    allow_double: bool


def _look_up_bags(
    handle: _handle.TableHandle,
    indices: object,
    offsets: object,
    lengths: object,
    include_last_offset: bool,
    per_sample_weights: object,
    out: object,
    options: _Options,
) -> NDArray[Any]:
    given = _arguments.bag_indices(indices)
    given_lengths = None if lengths is None else _arguments.lengths(lengths, given)
    if given_lengths is None:
        given_offsets = _arguments.offsets(offsets, given, include_last_offset)
    else:
        given_offsets, include_last_offset = _arguments.ends_of_lengths(given_lengths, given), True
    given_weights = _arguments.weights(per_sample_weights, given, options.mode, allow_double=options.allow_double)
    num_bags = len(given) if given_offsets is None else len(given_offsets) - include_last_offset
    inputs = {
        "the table": handle.rows,
        "indices": given,
        "offsets": given_offsets,
        "lengths": given_lengths,
        "per_sample_weights": given_weights,
        "compressed_indices_mapping": handle.mapping if options.is_pruned else None,
    }
    target = _target(out, (num_bags, handle.layout.dim), options.out_type, inputs.items())
    answer = _handle.look_up_bags(
        handle,
        options.is_pruned,
        _arguments.plain_integers(given),
        None if given_offsets is None else _arguments.plain_integers(given_offsets),
        include_last_offset,
        None if given_weights is None else _arguments.plain_weights(given_weights),
        options.padding_idx,
        options.skips_invalid,
        options.mode,
        None if target is None else options.out_type.written(target),
        options.out_type.number,
        options.num_threads,
    )
    if isinstance(answer, np.ndarray):
        return out if isinstance(out, np.ndarray) else answer if target is None else target
    if answer is None:
        raise RuntimeError(_errors.UNKNOWN)
    asked = _errors.Asked(
        len(handle.rows), _num_embeddings(handle, options.is_pruned), given, given_offsets, num_indices=given.size
    )
    raise _errors.of_fault(answer, asked)


def _look_up_batch(
    handle: _handle.TableHandle,
    batch: list[_batches.Bags],
    per_sample_weights: object,
    out: object,
    options: _Options,
) -> NDArray[Any]:
    """Bags that another library holds, perhaps in several pieces."""
    _batches.refuse(per_sample_weights, "per_sample_weights", "for a column or a matrix")
    feature = _batches.Feature(None, handle, options.mode, options.padding_idx, options.skips_invalid)
    parts = _batches.parts_of_batch(feature, batch, "indices")
    shape = (sum(part.bags.num_bags for part in parts), handle.layout.dim)
    target = _target(out, shape, options.out_type, _slow_collection.inputs_of(parts))
    result = np.empty(shape, options.out_type.dtype) if target is None else target
    rows = [_slow_collection.spread(result, part) for part in parts]
    _slow_collection.look_up(parts, rows, options.out_type, options.num_threads, check_first=out is not None)
    return out if isinstance(out, np.ndarray) else result


def _target(
    out: object, shape: tuple[int, ...], out_type: _arguments.OutType, inputs: _arguments.Inputs
) -> NDArray[Any] | None:
    """The caller's output; a new one for bfloat16, whose type may be another package's. Else None."""
    target = _arguments.output(out, shape, out_type.dtype, inputs)
    return np.empty(shape, out_type.dtype) if target is None and out_type.number == 2 else target


def _num_embeddings(handle: _handle.TableHandle, is_pruned: bool) -> int:
    return handle.num_embeddings if is_pruned else len(handle.rows)


def look_up_rows(
    handle: _handle.TableHandle,
    is_pruned: bool,
    indices: object,
    *,
    skips_invalid: bool = False,
    out: object = None,
    out_type: _arguments.OutType = _FLOAT32,
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
    target = _target(out, (*shape, dim), out_type, inputs.items())
    flat = None if given is None else _arguments.plain_integers(given).reshape(-1)
    flat_target = None if target is None else out_type.written(target).reshape(-1, dim)
    answer = _handle.look_up_rows(
        handle, is_pruned, flat, skips_invalid, dequantize, flat_target, out_type.number, num_threads
    )
    if isinstance(answer, np.ndarray):
        if target is None:
            return answer.reshape(*shape, dim)
        if not isinstance(out, np.ndarray):
            return target
        if not np.may_share_memory(target, answer):  # `reshape` has copied
            np.copyto(out_type.written(target), answer.reshape(target.shape))
        return out
    if answer is None:
        raise RuntimeError(_errors.UNKNOWN)
    asked = _errors.Asked(
        len(handle.rows),
        _num_embeddings(handle, is_pruned),
        given,
        offsets=None,
        num_indices=math.prod(shape),
        name=name,
        has_bags=False,
    )
    raise _errors.of_fault(answer, asked)
