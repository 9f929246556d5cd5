"""The lookups of collections as operators of torch's dispatcher; see `operators`."""

from __future__ import annotations

import functools
import json
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import collection as ours
from .operators import out_dtype, registered, result, threads, weights_of
from .tensors import dim_of, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray


# Of each table `rows`, a mapping and a layout, as the operators for one table take them: no mapping at all if no
# table is pruned, and layouts one a line. `plan` is the module's.
# Indices, offsets and weights are one tensor each, of all features, or one a feature. Or one each of `num_keys` keys,
# of which `places` has each feature's. There may be no weights at all.
TABLES = "Tensor[] rows, Tensor?[] mappings"
OPTIONS = "str layouts, str plan, ScalarType? dtype=None, int? num_threads=None"
BAGS = (
    f"embedding_bag_collection({TABLES}, Tensor[] indices, Tensor?[] offsets, Tensor?[] per_sample_weights, {OPTIONS}, "
    "int[]? places=None, int num_keys=0) -> Tensor"
)
ROWS = f"embedding_collection({TABLES}, Tensor[] indices, {OPTIONS}) -> Tensor[]"


class Feature(NamedTuple):
    """As a plan has it."""

    name: str
    table: int
    mode: str | None
    padding_idx: int | None
    invalid: str


def _read_plan(text: str) -> tuple[Feature, ...]:
    try:
        plan = tuple(Feature(*entry) for entry in json.loads(text))
        is_plan = all(type(feature.name) is str and type(feature.table) is int for feature in plan)
    except (ValueError, TypeError, RecursionError):
        is_plan = False
    if (
        not is_plan
        or len({feature.name for feature in plan}) < max(len(plan), 1)
        or min(feature.table for feature in plan) < 0
    ):
        raise ValueError(f"plan must be one that qembag.torch wrote, got {text[:80]!r}")
    return plan


_plan_of = functools.lru_cache(maxsize=256)(_read_plan)


def bags_collection(tables: Mapping[str, Any], plan: str, dtype: torch.dtype | None) -> ours.EmbeddingBagCollection:
    """The collection of these tables that a plan describes."""
    features, names = _plan_of(plan), list(tables)
    return ours.EmbeddingBagCollection(
        tables,
        {feature.name: names[feature.table] for feature in features},
        mode={feature.name: feature.mode or "" for feature in features},
        dtype=out_dtype(dtype),
        padding_idx={feature.name: feature.padding_idx for feature in features},
        invalid={feature.name: feature.invalid for feature in features},
    )


def rows_collection(tables: Mapping[str, Any], plan: str, dtype: torch.dtype | None) -> ours.EmbeddingCollection:
    """As `bags_collection`, without pooling."""
    features, names = _plan_of(plan), list(tables)
    return ours.EmbeddingCollection(
        tables,
        {feature.name: names[feature.table] for feature in features},
        dtype=out_dtype(dtype),
        invalid={feature.name: feature.invalid for feature in features},
    )


# ---- Collections of tensors ------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    collection: Any
    source: weakref.ref[Tensor]
    key: tuple[Any, ...]


# Collections by the id of their first tensor of rows. An entry goes when that tensor does, and counts only while the
# tensors of a call are in the memory that it was made of: see `tensors.table_of`.
_made: dict[tuple[int, str, torch.dtype | None], _Made] = {}


def _collection_of(
    make: Callable[[Mapping[str, Any], str, torch.dtype | None], Any],
    rows: Sequence[Tensor],
    mappings: Sequence[Tensor | None],
    layouts: str,
    plan: str,
    dtype: torch.dtype | None,
) -> Any:
    """The collection in these tensors' memory."""
    mapped = [mapping for mapping in mappings if mapping is not None]
    tensors = [*rows, *mapped]
    # By maps: 26 tables take 8 us, and 20 us one by one.
    key = (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.size, tensors)),
        list(map(Tensor.stride, tensors)),
        [tensor.dtype for tensor in tensors],
        layouts,
        [mapping is None for mapping in mappings] if mapped else None,
    )
    place = (id(rows[0]), plan, dtype)
    made = _made.get(place)
    if made is not None and made.key == key and made.source() is rows[0]:
        return made.collection
    lines, everywhere = layouts.split("\n"), mappings or [None] * len(rows)
    if not len(rows) == len(everywhere) == len(lines):
        raise ValueError(
            f"rows, mappings and layouts must be as many, got {len(rows)}, {len(everywhere)} and {len(lines)}"
        )
    parts = enumerate(zip(rows, everywhere, lines, strict=True))
    collection = make({str(number): table_of(*part) for number, part in parts}, plan, dtype)
    # What a mapping of one entry says depends on what it holds.
    if all(len(mapping) != 1 for mapping in mapped):
        _made[place] = _Made(collection, weakref.ref(rows[0], lambda source: _forget(place, source)), key)
    return collection


def _forget(place: tuple[int, str, torch.dtype | None], source: weakref.ref[Tensor]) -> None:
    made = _made.get(place)
    if made is not None and made.source is source:
        del _made[place]


# ---- The operators ---------------------------------------------------------------------------------------------------


def _bags(
    rows: list[Tensor],
    mappings: list[Tensor | None],
    indices: list[Tensor],
    offsets: list[Tensor | None],
    per_sample_weights: list[Tensor | None],
    layouts: str,
    plan: str,
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
    places: list[int] | None = None,
    num_keys: int = 0,
) -> Tensor:
    collection = _collection_of(bags_collection, rows, mappings, layouts, plan, dtype)
    asked = threads(num_threads)
    names = [feature.name for feature in _plan_of(plan)]
    given: Any
    weights: Any = None
    if len(indices) == len(offsets) == 1 < max(len(names), num_keys):
        given, ends = indices[0].numpy(), None if offsets[0] is None else offsets[0].numpy()
        weights = weights_of(per_sample_weights[0]) if per_sample_weights else None
        if places is not None:
            windows = _windows(ends, places, num_keys)
            given, ends = {name: (given, window) for name, window in zip(names, windows, strict=True)}, None
            weights = None if weights is None else dict.fromkeys(names, weights)
        return result(collection(given, ends, per_sample_weights=weights, num_threads=asked))
    if not len(names) == len(indices) == len(offsets) or len(per_sample_weights) not in (0, len(names)):
        raise ValueError(f"indices must be one tensor, or one for each of {len(names)} features, got {len(indices)}")
    given = {
        name: some.numpy() if own is None else (some.numpy(), own.numpy())
        for name, some, own in zip(names, indices, offsets, strict=True)
    }
    if per_sample_weights:
        of_features = zip(names, per_sample_weights, strict=True)
        weights = {name: weights_of(own) for name, own in of_features if own is not None}
    return result(collection(given, per_sample_weights=weights, num_threads=asked))


def _windows(ends: NDArray[Any] | None, places: list[int], num_keys: int) -> list[NDArray[Any]]:
    """The offsets of each feature, of those of all keys; with the last bag's end."""
    batch, rest = (0, 1) if ends is None or len(ends) == 0 or num_keys < 1 else divmod(len(ends) - 1, num_keys)
    if ends is None or rest or not all(0 <= place < num_keys for place in places):
        count = "none" if ends is None else len(ends)
        raise ValueError(f"offsets must be one and as many for each of {num_keys} keys, got {count}")
    return [ends[place * batch : (place + 1) * batch + 1] for place in places]


def _rows(
    rows: list[Tensor],
    mappings: list[Tensor | None],
    indices: list[Tensor],
    layouts: str,
    plan: str,
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> list[Tensor]:
    collection = _collection_of(rows_collection, rows, mappings, layouts, plan, dtype)
    features = _plan_of(plan)
    if len(features) != len(indices):
        raise ValueError(f"indices must be one tensor for each of {len(features)} features, got {len(indices)}")
    given = {feature.name: some.numpy() for feature, some in zip(features, indices, strict=True)}
    return [result(found) for found in collection(given, num_threads=threads(num_threads)).values()]


def _fake_bags(
    rows: list[Tensor],
    mappings: list[Tensor | None],
    indices: list[Tensor],
    offsets: list[Tensor | None],
    per_sample_weights: list[Tensor | None],
    layouts: str,
    plan: str,
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
    places: list[int] | None = None,
    num_keys: int = 0,
) -> Tensor:
    features, each = _plan_of(plan), layouts.split("\n")
    width = sum(dim_of(rows[feature.table], each[feature.table]) for feature in features)
    ends = offsets[0]
    if ends is None:
        batch = indices[0].shape[0]
    else:
        count = len(features) if len(indices) == 1 else 1
        batch = (ends.shape[0] - 1) // (count if places is None else num_keys)
    return rows[0].new_empty((batch, width), dtype=dtype or torch.float32)


def _fake_rows(
    rows: list[Tensor],
    mappings: list[Tensor | None],
    indices: list[Tensor],
    layouts: str,
    plan: str,
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> list[Tensor]:
    found, each = [], layouts.split("\n")
    for feature, some in zip(_plan_of(plan), indices, strict=True):
        dim = dim_of(rows[feature.table], each[feature.table])
        found.append(rows[0].new_empty((*some.shape, dim), dtype=dtype or torch.float32))
    return found


def _elsewhere(rows: list[Tensor], mappings: Any, indices: list[Tensor], *_: Any, **__: Any) -> Tensor:
    places = ", ".join(sorted({str(tensor.device) for tensor in (*rows, *indices)}))
    raise RuntimeError(f"qembag looks rows up on CPUs only: rows and indices must be there, got {places}")


def _register() -> torch.library.Library | None:
    if hasattr(torch.ops.qembag, "embedding_bag_collection"):
        return None  # by another copy of this package: see `operators`
    library = torch.library.Library("qembag", "FRAGMENT")
    return registered(library, ((BAGS, _bags, _fake_bags), (ROWS, _rows, _fake_rows)), _elsewhere)


_LIBRARY = _register()
