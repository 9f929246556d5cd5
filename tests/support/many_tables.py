"""Collections of tables, batches for them, and what each feature's bags must be: by one call a table, by the oracle."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import qembag
from support import floats
from support.arrays import same_bits
from support.layouts import ALL_MODES, LAYOUTS, PAIRS_FIRST, Layout, bag_offsets, rows_of
from support.lookups import Floats, Table

KINDS: tuple[Layout | str, ...] = (
    *LAYOUTS.values(),
    *PAIRS_FIRST.values(),
    Layout(8, "<f2"),
    Layout(4, "<f4", padding=7),
    Layout(4, "<f2", group_size=32),
    Layout(2, "<f4", True, 16, padding=1),
    Layout(8, "<f4", True, 64),
    *floats.KINDS,
)
PLACES = ("plain", "strided", "backwards")
# What each feature may do: mode, padding, what is done about an index out of range. Told by its number.
OPTIONS = [
    *((mode, None, "raise") for mode in ALL_MODES),
    *((mode, padding, "raise") for mode, padding in zip(ALL_MODES, (0, -1, 3, 2, -2), strict=True)),
    *((mode, None, "skip") for mode in ALL_MODES),
    ("sum", 1, "skip"),
    ("mean", -3, "skip"),
    ("max", 0, "skip"),
]


def table_of(
    rng: np.random.Generator, kind: Layout | str, num_rows: int, dim: int, is_pruned: bool = False, place: str = "plain"
) -> Table | Floats:
    """A table with rows of a layout or of a kind of float. Rows that are not `plain` lie apart."""
    is_float = isinstance(kind, str)
    rows = floats.rows_of(rng, kind, num_rows, dim) if isinstance(kind, str) else rows_of(rng, kind, num_rows, dim)
    if place != "plain":
        apart = np.zeros((2 * num_rows, rows.shape[1] + 3), rows.dtype)
        within = apart[::2, : rows.shape[1]] if place == "strided" else apart[::-2, : rows.shape[1]]
        within[...] = rows
        rows = within
    mapping = (
        np.where(rng.random(num_rows) < 0.2, -1, rng.permutation(num_rows)).astype(np.int32) if is_pruned else None
    )
    if is_float:
        table: Table | Floats = Floats(rows, "bfloat16" if kind == "bfloat16" else None, mapping)
    else:
        table = Table(rows, kind.bits, dim, mapping, layout=kind.keywords())
    table.made = table.make()
    return table


@dataclass
class Many:
    """Tables, and features with options of their own: the arguments of an `EmbeddingBagCollection`."""

    tables: dict[str, Table | Floats]
    features: dict[str, str]
    options: dict[str, tuple[str, int | None, str]] = field(default_factory=dict)
    dtype: Any = None

    def make(self) -> qembag.EmbeddingBagCollection:
        modes, paddings, invalids = (
            {feature: options[number] for feature, options in self.options.items()} for number in range(3)
        )
        return qembag.EmbeddingBagCollection(
            {name: table.made for name, table in self.tables.items()}, self.features,
            mode=modes, padding_idx=paddings, invalid=invalids, dtype=self.dtype,
        )  # fmt: skip

    def make_of_rows(self) -> qembag.EmbeddingCollection:
        return qembag.EmbeddingCollection(
            {name: table.made for name, table in self.tables.items()}, self.features, dtype=self.dtype,
            invalid={feature: invalid for feature, (_, _, invalid) in self.options.items()},
        )  # fmt: skip

    def option(self, feature: str) -> tuple[str, int | None, str]:
        return self.options.get(feature, ("sum", None, "raise"))

    def table(self, feature: str) -> Table | Floats:
        return self.tables[self.features[feature]]

    def num_embeddings(self, feature: str) -> int:
        return int(self.table(feature).made.num_embeddings)

    @property
    def dims(self) -> dict[str, int]:
        return {feature: self.table(feature).made.dim for feature in self.features}


@dataclass
class Batch:
    """Bags of each feature: its own indices and ends, and weights or none."""

    indices: dict[str, np.ndarray]
    ends: dict[str, np.ndarray]
    weights: dict[str, np.ndarray | None]

    @property
    def size(self) -> int:
        return len(next(iter(self.ends.values()))) - 1

    # ---- What is given -----------------------------------------------------------------------------------------------

    def flat(self, index_type: Any = np.int64, offset_type: Any = np.int64) -> tuple[np.ndarray, np.ndarray]:
        """Indices and offsets of all features, one after the other."""
        indices = np.concatenate(list(self.indices.values())).astype(index_type)
        return indices, np.concatenate([[0], np.cumsum(self.lengths().ravel())]).astype(offset_type)

    def lengths(self) -> np.ndarray:
        """A row a feature."""
        return np.array([np.diff(ends) for ends in self.ends.values()])

    def flat_weights(self, kind: Any = np.float32) -> np.ndarray:
        return np.concatenate([given for given in self.weights.values() if given is not None]).astype(kind)

    def pairs(self, index_type: Any = np.int64, offset_type: Any = np.int64) -> dict[str, Any]:
        """Indices and offsets by feature."""
        return {
            feature: (indices.astype(index_type), self.ends[feature].astype(offset_type))
            for feature, indices in self.indices.items()
        }

    def weights_by_feature(self, kind: Any = np.float32) -> dict[str, np.ndarray]:
        return {feature: given.astype(kind) for feature, given in self.weights.items() if given is not None}

    # ---- What must come of it ----------------------------------------------------------------------------------------

    def one_by_one(self, many: Many, weighted: bool = True, **how: Any) -> dict[str, np.ndarray]:
        """By one call a table, on one thread."""
        return {
            feature: qembag.embedding_bag(
                many.table(feature).made, self.indices[feature], self.ends[feature], include_last_offset=True,
                per_sample_weights=self.weights[feature] if weighted else None, mode=many.option(feature)[0],
                padding_idx=many.option(feature)[1], invalid=many.option(feature)[2], dtype=many.dtype, num_threads=1,
                **how,
            )
            for feature in many.features
        }  # fmt: skip

    def by_oracle(self, many: Many, weighted: bool = True) -> dict[str, np.ndarray]:
        found = {}
        for feature in many.features:
            mode, padding, invalid = many.option(feature)
            found[feature] = many.table(feature).bags(
                self.indices[feature], self.ends[feature], include_last_offset=True, mode=mode, padding_idx=padding,
                invalid=invalid, mapping=many.table(feature).map, weights=self.weights[feature] if weighted else None,
                half=many.dtype == np.float16, bfloat16=many.dtype == "bfloat16",
            )  # fmt: skip
        return found


def batch_of(rng: np.random.Generator, many: Many, num_bags: int, longest: int = 6, width: int | None = None) -> Batch:
    """Bags of mixed lengths, or each of so many. Where a feature skips indices out of range, there are some. Weights are
    for all features that take any."""
    indices, ends, weights = {}, {}, {}
    for feature in many.features:
        mode, _, invalid = many.option(feature)
        own = bag_offsets(rng, num_bags, longest) if width is None else np.arange(num_bags + 1) * width
        count, num_rows = int(own[-1]), many.num_embeddings(feature)
        given = rng.integers(0, max(num_rows, 1), count)
        if invalid == "skip":
            given = np.where(rng.random(count) < 0.3, rng.choice([-1, num_rows, 2**31 - 1, -(2**31)], count), given)
        indices[feature], ends[feature] = given, own
        weights[feature] = None if mode == "max" else rng.normal(size=count).astype(np.float32)
    return Batch(indices, ends, weights)


def side_by_side(outputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(outputs.values()), axis=1)


def check(ours: np.ndarray, outputs: dict[str, np.ndarray], collection: qembag.EmbeddingBagCollection) -> None:
    """An output of all features, compared feature by feature for the sake of the message."""
    assert isinstance(ours, np.ndarray)
    assert ours.shape == (len(next(iter(outputs.values()))), collection.dim)
    for feature, expected in outputs.items():
        try:
            same_bits(ours[:, collection.columns[feature]], expected)
        except AssertionError as error:
            raise AssertionError(f"feature {feature!r}: {error}") from error


def check_dict(ours: Any, outputs: dict[str, np.ndarray]) -> None:
    assert list(ours) == list(outputs)
    for feature, expected in outputs.items():
        try:
            same_bits(ours[feature], expected)
        except AssertionError as error:
            raise AssertionError(f"feature {feature!r}: {error}") from error


def of_every_kind(rng: np.random.Generator, dtype: Any = None) -> Many:
    """A table of each kind, whole and pruned, rows side by side and apart, dims from 1 to 300; some of the features share
    a table."""
    dims = itertools.cycle([1, 300, 16, 7, 64, 33, 128, 2, 17, 48, 256, 65])
    tables = {
        f"t{number}": table_of(rng, kind, 20 + number, next(dims), is_pruned, PLACES[number % 3])
        for number, (kind, is_pruned) in enumerate(itertools.product(KINDS, (False, True)))
    }
    features = {f"f{number}": name for number, name in enumerate(tables)}
    features |= {"again": "t3", "and again": "t3", "other": "t0", "float": list(tables)[-1]}
    options = {feature: OPTIONS[number * 5 % len(OPTIONS)] for number, feature in enumerate(features)}
    return Many(tables, features, options, dtype)


def plain(count: int, num_rows: int = 10, dim: int = 8) -> Many:
    """So many small tables, 'f0', 'f1', ..., of whole bytes, summed, for what is about other things."""
    rng = np.random.default_rng(7)
    return Many(
        {f"f{number}": table_of(rng, LAYOUTS[8], num_rows, dim) for number in range(count)},
        {f"f{number}": f"f{number}" for number in range(count)},
    )
