"""Lookups of many parts at once: the features of a collection, the chunks of a column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arguments, _batches, _errors, _handle, _runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ._batches import Feature, Part


# ---- Collections -------------------------------------------------------------------------------------------------


def look_up_bags(
    features: Sequence[Feature],
    indices: object,
    offsets: object,
    lengths: object,
    per_sample_weights: object,
    out: object,
    dtype: object,
    num_threads: object,
) -> Any:
    """The bags of all features, side by side; or in the arrays of a dict, which is returned then."""
    threads = _runtime.resolve_threads(num_threads)
    batch = _batches.batch_of(features, indices, offsets, lengths, per_sample_weights)
    inputs = inputs_of(batch.parts, batch.lengths)
    dims = {_name(feature): feature.handle.layout.dim for feature in features}
    whole = None
    if isinstance(out, Mapping):
        shapes = {name: (batch.size, dim) for name, dim in dims.items()}
        targets, out_type = targets_of(shapes, out, dtype, inputs)
    else:
        target, dtype = _arguments.output_array(out, dtype)
        out_type = _arguments.out_type(dtype, target)
        shape = (batch.size, sum(dims.values()))
        whole = _arguments.output(target, shape, out_type.dtype, inputs)
        if whole is None:
            whole = np.empty(shape, out_type.dtype)
        starts = np.cumsum([0, *dims.values()]).tolist()
        targets = {name: whole[:, start:end] for name, start, end in zip(dims, starts[:-1], starts[1:], strict=True)}
    rows = [spread(targets[_name(part.feature)], part) for part in batch.parts]
    look_up(batch.parts, rows, out_type, threads, check_first=out is not None)
    return whole if out is None else out


def look_up_rows(
    features: Sequence[Feature],
    indices: object,
    offsets: object,
    lengths: object,
    out: object,
    dtype: object,
    num_threads: object,
) -> Any:
    """The rows of all features, one by one: a dict of arrays."""
    threads = _runtime.resolve_threads(num_threads)
    wanted = _batches.rows_of(features, indices, offsets, lengths)
    shapes = {
        name: (*shape, feature.handle.layout.dim)
        for feature, (name, shape) in zip(features, wanted.shapes.items(), strict=True)
    }
    if out is None:
        out_type = _arguments.out_type(dtype, None)
        targets = {name: np.empty(shape, out_type.dtype) for name, shape in shapes.items()}
    elif isinstance(out, Mapping):
        targets, out_type = targets_of(shapes, out, dtype, inputs_of(wanted.parts, wanted.lengths))
    else:
        raise TypeError(f"out must be a dict of an array for each feature, got {_errors.kind_of(out)}")
    flat = {name: target.reshape(-1, target.shape[-1]) for name, target in targets.items()}
    rows = [spread(flat[_name(part.feature)], part) for part in wanted.parts]
    look_up(wanted.parts, rows, out_type, threads, check_first=out is not None)
    for name, target in targets.items():
        if not np.may_share_memory(flat[name], target):  # `reshape` has copied
            np.copyto(out_type.written(target), out_type.written(flat[name]).reshape(target.shape))
    return targets if out is None else out


def _name(feature: Feature) -> str:
    assert feature.name is not None  # a collection's have names
    return feature.name


# ---- Outputs -----------------------------------------------------------------------------------------------------


def inputs_of(parts: Sequence[Part], lengths: NDArray[Any] | None = None) -> list[tuple[str, NDArray[Any]]]:
    """What an output must share no memory with. Parts have most of it in common."""
    found: dict[int, tuple[str, NDArray[Any]]] = {}
    for part in parts:
        of = "" if part.feature.name is None else f" of feature {part.feature.name!r}"
        for name, array in (
            (f"the table{of}", part.feature.handle.rows),
            (f"compressed_indices_mapping{of}", part.feature.handle.mapping),
            (part.name, part.bags.indices),
            (f"offsets{of}", part.bags.offsets),
            (f"per_sample_weights{of}", part.bags.weights),
        ):
            if array is not None:
                found.setdefault(id(array), (name, array))
    return [*found.values()] if lengths is None else [*found.values(), ("lengths", lengths)]


def spread(result: NDArray[Any], part: Part) -> NDArray[Any]:
    """The rows of an output that are a part's."""
    return result[part.first_bag : part.first_bag + part.num_bags]


def targets_of(
    shapes: Mapping[str, tuple[int, ...]], out: Mapping[Any, Any], dtype: object, inputs: list[tuple[str, NDArray[Any]]]
) -> tuple[dict[str, NDArray[Any]], _arguments.OutType]:
    """The caller's arrays, one a feature, as views of our own; all of one type."""
    given = dict(out)
    for name in shapes:
        if name not in given:
            raise ValueError(f"out must hold an array for each feature, got none for {_errors.shown(name)}")
        if given[name] is None:
            raise TypeError(f"out[{name!r}] must be an array, got None")
    for name in given:
        if name not in shapes:
            raise ValueError(f"out must hold features of the collection only, got {_errors.shown(name)}")
    arrays: dict[str, Any] = {}
    dtypes: dict[str, object] = {}
    for name in shapes:
        arrays[name], dtypes[name] = _batches.named(f"out[{name!r}]", _arguments.output_array, given[name], dtype)
    first = next(iter(shapes))  # whose type all others must have
    out_type = _arguments.out_type(dtypes[first], arrays[first])
    targets: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        targets[name] = _batches.named(f"out[{name!r}]", _arguments.output, arrays[name], shape, out_type.dtype, ())
    if not _handle.lie_apart_at_a_glance(list(targets.values()), [array for _, array in inputs]):
        earlier: list[tuple[str, NDArray[Any]]] = []
        for name, target in targets.items():
            _batches.named(f"out[{name!r}]", _arguments.check_apart, target, [*inputs, *earlier])
            earlier.append((f"out[{name!r}]", target))
    return targets, out_type


# ---- Lookups -----------------------------------------------------------------------------------------------------


def look_up(
    parts: Sequence[Part],
    targets: Sequence[NDArray[Any]],
    out_type: _arguments.OutType,
    num_threads: int,
    check_first: bool,
) -> None:
    """All parts in one call, each into its rows and columns of an output."""
    plain: dict[int, NDArray[Any]] = {}

    def once(convert: Callable[[NDArray[Any]], NDArray[Any]], array: NDArray[Any] | None) -> NDArray[Any] | None:
        # Parts may share an array, which is converted for all of them.
        if array is not None and id(array) not in plain:
            plain[id(array)] = convert(array)
        return None if array is None else plain[id(array)]

    answer = _handle.look_up_parts(
        [
            (
                part.feature.handle,
                part.feature.mode,
                part.feature.padding_idx,
                part.feature.skips_invalid,
                once(_arguments.plain_integers, part.bags.indices),
                once(_arguments.plain_integers, part.bags.offsets),
                once(_arguments.plain_weights, part.bags.weights),
                out_type.written(target),
            )
            for part, target in zip(parts, targets, strict=True)
        ],
        out_type.number,
        num_threads,
        check_first,
    )
    if answer is None:
        raise RuntimeError(_errors.UNKNOWN)
    if answer is not True:
        raise _errors.of_fault(answer, parts[answer[-1]].asked())
