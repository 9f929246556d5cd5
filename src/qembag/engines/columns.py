"""Columns of lists to columns of vectors: one batch of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from .._arguments import as_float32
from .._batches import Bags
from .._errors import shown
from ..interop.arrow import INT32_MAX, to_arrow
from .bad_rows import Lists, bad_rows, element_type, lists_of, of_other_lengths

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from ..collection import EmbeddingBagCollection
    from .bad_rows import Bad

BadRows = dict[int, "Bad"]


class Plan(NamedTuple):
    """Which columns are read, and which are made."""

    columns: Mapping[str, str]
    """Of indices, by feature."""
    weights: Mapping[str, str]
    """Of weights, by feature."""
    output: str | Mapping[str, str]
    """The column of all features, or one by feature."""
    list_size: str
    """As `to_arrow` takes it."""

    @property
    def read(self) -> list[str]:
        return list(dict.fromkeys([*self.columns.values(), *self.weights.values()]))

    @property
    def outputs(self) -> dict[str, list[str]]:
        """The features of each column that is made."""
        if isinstance(self.output, str):
            return {self.output: list(self.columns)}
        return {self.output[feature]: [feature] for feature in self.columns}

    def made(self, reasons: str | None) -> list[str]:
        """All columns that are made."""
        outputs = [self.output] if isinstance(self.output, str) else list(self.output.values())
        names = [*outputs, *([] if reasons is None else [reasons])]
        if len(set(names)) < len(names):
            raise ValueError(f"output and reasons must be columns of different names, got {shown(names)}")
        return names


class Scored(NamedTuple):
    """Columns that were made, and rows of each feature that could not be looked up."""

    vectors: dict[str, Any]
    bad: dict[str, BadRows]

    def first_bad(self) -> tuple[int, Bad] | None:
        firsts = [min(rows.items(), key=lambda item: item[0]) for rows in self.bad.values() if rows]
        return min(firsts, key=lambda item: item[0], default=None)

    def reasons(self, num_rows: int) -> Any:
        """What is wrong with each row, as a column; null for good ones."""
        texts: dict[int, dict[str, None]] = {}  # features that share a column may tell of the same fault
        for rows in self.bad.values():
            for row, bad in rows.items():
                texts.setdefault(row, {})[bad.reason] = None
        joined = ["; ".join(texts[row]) if row in texts else None for row in range(num_rows)]
        return pa.chunked_array([pa.array(joined, pa.string())])


def score(collection: EmbeddingBagCollection, plan: Plan, batch: Mapping[str, Any], num_threads: int | None) -> Scored:
    """The vectors of a batch, given as pyarrow's chunked arrays by name. Vectors of bad rows are null.

    Raises what is no row's fault: a column of another type, an argument that is wrong.
    """
    _check_types(plan, batch)
    try:
        asked = {feature: _asked(feature, plan, batch) for feature in plan.columns}
        return Scored(_columns(collection, plan, asked, num_threads), {})
    except (IndexError, ValueError):
        lists = {name: lists_of(batch[name]) for name in plan.read}
        bad = _bad_rows(collection, plan, lists)
        if not any(bad.values()):
            raise
    clean = {feature: _without(bad[feature], feature, plan, lists) for feature in plan.columns}
    vectors = _columns(collection, plan, clean, num_threads)
    for name, features in plan.outputs.items():
        rows = {row for feature in features for row in bad[feature]}
        vectors[name] = _with_nulls(vectors[name], rows)
    return Scored(vectors, bad)


def _asked(feature: str, plan: Plan, batch: Mapping[str, Any]) -> Any:
    """What the collection is given for a feature: its column, or the bags that it makes with its weights."""
    column = batch[plan.columns[feature]]
    if feature not in plan.weights:
        return column
    lists, weights = lists_of(column), lists_of(batch[plan.weights[feature]])
    if lists.values.null_count or weights.values.null_count or (lists.lengths != weights.lengths).any():
        raise ValueError("bad rows")  # which ones, and why, is looked for next
    return [Bags(_indices(lists), lists.offsets, _weights(weights))]


def _check_types(plan: Plan, batch: Mapping[str, Any]) -> None:
    """The collection would name the feature, and not the column."""
    for name in plan.columns.values():
        kind = element_type(batch[name].type, name)
        if not pa.types.is_integer(kind) and not pa.types.is_null(kind):
            raise TypeError(f"column {name!r} must have lists of integers, got lists of {kind}")
    for name in plan.weights.values():
        kind = element_type(batch[name].type, name)
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise TypeError(f"column {name!r} must have lists of numbers, for weights, got lists of {kind}")


def _indices(lists: Lists) -> NDArray[Any]:
    if pa.types.is_null(lists.values.type):
        return np.empty(0, np.int64)
    indices: NDArray[Any] = lists.values.to_numpy(zero_copy_only=False)
    return indices


def _weights(lists: Lists) -> NDArray[np.float32]:
    return as_float32(lists.values.to_numpy(zero_copy_only=False))


def _columns(
    collection: EmbeddingBagCollection, plan: Plan, asked: Mapping[str, Any], num_threads: int | None
) -> dict[str, Any]:
    if isinstance(plan.output, str):
        return {plan.output: _column(collection(asked, num_threads=num_threads), plan.list_size)}
    num_rows = _num_rows(next(iter(asked.values())))
    kind = np.dtype(collection.dtype or np.float32)
    # An array for each feature, for a column's vectors lie one after the other.
    found = {feature: np.empty((num_rows, dim), kind) for feature, dim in collection.dims.items()}
    collection(asked, out=found, num_threads=num_threads)
    return {plan.output[feature]: _column(vectors, plan.list_size) for feature, vectors in found.items()}


def _num_rows(asked: Any) -> int:
    return sum(bags.num_bags for bags in asked) if isinstance(asked, list) else len(asked)


def _column(vectors: NDArray[Any], list_size: str) -> Any:
    """As one type whatever the number of rows: lists with offsets of 32 bits, in several chunks if need be."""
    step = max(1, INT32_MAX // max(1, vectors.shape[1]))
    chunks = [
        pa.array(to_arrow(vectors[start : start + step], list_size=list_size))
        for start in range(0, max(1, len(vectors)), step)
    ]
    return pa.chunked_array(chunks)


# ---- Bad rows --------------------------------------------------------------------------------------------------------


def _bad_rows(collection: EmbeddingBagCollection, plan: Plan, lists: Mapping[str, Lists]) -> dict[str, BadRows]:
    tables, invalid = collection.tables, collection.invalid
    found: dict[str, BadRows] = {}
    for feature, table in collection.features.items():
        column = plan.columns[feature]
        rows = None if invalid[feature] == "skip" else tables[table].num_embeddings
        bad = bad_rows(column, lists[column], rows)
        if feature in plan.weights:
            name = plan.weights[feature]
            other = of_other_lengths(name, lists[name], column, lists[column])
            bad = {**other, **bad_rows(name, lists[name], None), **bad}
        found[feature] = bad
    return found


def _without(bad: Iterable[int], feature: str, plan: Plan, lists: Mapping[str, Lists]) -> list[Bags]:
    """A feature's bags, with empty ones in the place of bad rows."""
    kept, own = _emptied(lists[plan.columns[feature]], bad), None
    if feature in plan.weights:
        own = _weights(_emptied(lists[plan.weights[feature]], bad))
    return [Bags(_indices(kept), kept.offsets, own)]


def _emptied(lists: Lists, bad: Iterable[int]) -> Lists:
    good = np.ones(len(lists.lengths), np.bool_)
    good[list(bad)] = False
    kept = pa.array(np.repeat(good, lists.lengths))
    return Lists(lists.values.filter(kept), np.where(good, lists.lengths, 0))


def _with_nulls(column: Any, rows: Iterable[int]) -> Any:
    """A column of lists, of which these rows are null."""
    good = np.ones(len(column), np.bool_)
    good[list(rows)] = False
    chunks, first = [], 0
    for chunk in column.chunks:
        mask = pa.array(~good[first : first + len(chunk)])
        first += len(chunk)
        if pa.types.is_fixed_size_list(chunk.type):
            chunks.append(pa.FixedSizeListArray.from_arrays(chunk.values, type=chunk.type, mask=mask))
        else:
            chunks.append(pa.ListArray.from_arrays(chunk.offsets, chunk.values, type=chunk.type, mask=mask))
    return pa.chunked_array(chunks)
