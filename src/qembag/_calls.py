"""The way from a caller's arrays to a kernel and back: check, allocate, call.

What comes in is the parts of a table, already known to be right, and arguments of which nothing is known.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arguments, _dispatch, _threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

_UNKNOWN = "the table's rows changed their shape or type while they were being looked up; if not, please report this"


def look_up_bags(
    rows: NDArray[np.uint8],
    bits: int,
    dim: int,
    mapping: NDArray[np.int32] | None,
    indices: object,
    offsets: object,
    *,
    mode: int,
    per_sample_weights: object,
    include_last_offset: bool,
    padding_idx: int | None = None,
    out: NDArray[Any] | None,
    half: bool = False,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Bags of rows; `mode` is a number of `_arguments.MODES`."""
    kernel = _dispatch.kernels.embedding_bag
    threads = _threads.resolve(num_threads)
    num_embeddings = len(rows) if mapping is None else len(mapping)
    padding = -1 if padding_idx is None else _arguments.padding_number(padding_idx, num_embeddings)
    is_flag = isinstance(include_last_offset, bool)
    last = include_last_offset if is_flag else _arguments.flag(include_last_offset, "include_last_offset")

    # The fast road: a kernel that knows all its arguments answers at once.
    result = kernel(
        rows,
        bits,
        dim,
        mapping,
        indices,
        offsets,
        last,
        per_sample_weights,
        padding,
        mode,
        out,
        half,
        threads,
    )
    if isinstance(result, np.ndarray):
        return result

    # The slow one: convert, or say what is wrong. What was found there is an array of ours from here on, whatever else
    # the caller's objects do.
    given = _arguments.bag_indices(indices)
    given_offsets = _arguments.offsets(offsets, given, last)
    given_weights = _arguments.weights(per_sample_weights, given, mode)
    num_bags = len(given) if given_offsets is None else len(given_offsets) - last
    inputs = {
        "the table": rows,
        "indices": given,
        "offsets": given_offsets,
        "per_sample_weights": given_weights,
        "compressed_indices_mapping": mapping,
    }
    target = _arguments.output(out, (num_bags, dim), half, inputs)
    if result is None:
        plain = _arguments.plain_integers(given)
        plain_offsets = None if given_offsets is None else _arguments.plain_integers(given_offsets)
        plain_weights = None if given_weights is None else _arguments.plain_weights(given_weights)
        result = kernel(
            rows, bits, dim, mapping, plain, plain_offsets, last, plain_weights, padding, mode, target, half,
            threads, True,
        )  # fmt: skip
    if isinstance(result, np.ndarray):
        return result if out is None else out
    if result is None:
        raise RuntimeError(_UNKNOWN)
    raise _arguments.fault_error(
        result,
        indices=given,
        offsets=given_offsets,
        num_indices=given.size,
        num_rows=len(rows),
        num_embeddings=num_embeddings,
        bags=True,
    )


def look_up_rows(
    rows: NDArray[np.uint8],
    bits: int,
    dim: int,
    mapping: NDArray[np.int32] | None,
    indices: object,
    *,
    out: NDArray[Any] | None = None,
    half: bool = False,
    num_threads: int | None = None,
    dequantize: bool = False,
    name: str = "indices",
) -> NDArray[Any]:
    """Single rows of the parts of a table, already known to be right; all rows where `indices` is None.

    A row is a bag of its own, or with `dequantize` its plain value, which keeps the sign of a zero.
    """
    if indices is None and not dequantize:
        raise TypeError(f"{name} must be an array of integers, got None")
    kernel = _dispatch.kernels.embedding
    threads = _threads.resolve(num_threads)

    result = kernel(rows, bits, dim, mapping, indices, dequantize, out, half, threads)
    if isinstance(result, np.ndarray):
        return result

    given = None if indices is None else _arguments.integers(indices, name)
    num_embeddings = len(rows) if mapping is None else len(mapping)
    shape = (num_embeddings,) if given is None else given.shape
    inputs = {"the table": rows, name: given, "compressed_indices_mapping": mapping}
    target = _arguments.output(out, (*shape, dim), half, inputs)
    if result is None:
        flat = None if given is None else _arguments.plain_integers(given).reshape(-1)
        flat_target = None if target is None else target.reshape(-1, dim)
        result = kernel(rows, bits, dim, mapping, flat, dequantize, flat_target, half, threads, True)
        if isinstance(result, np.ndarray):
            if target is None:
                return result.reshape(*shape, dim)
            if not np.may_share_memory(target, result):  # `reshape` has copied
                np.copyto(target, result.reshape(target.shape))
            assert out is not None
            return out
    if result is None:
        raise RuntimeError(_UNKNOWN)
    raise _arguments.fault_error(
        result,
        indices=given,
        offsets=None,
        num_indices=math.prod(shape),
        num_rows=len(rows),
        num_embeddings=num_embeddings,
        bags=False,
        name=name,
    )
