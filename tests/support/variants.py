"""Lookups with every option of `embedding_bag`: the call, and the same asked of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import qembag


def table_of(rows: np.ndarray, mapping: np.ndarray | None = None) -> Any:
    """A `FloatTable` over rows in the oracle's storage."""
    return qembag.FloatTable(
        rows, dtype="bfloat16" if rows.dtype == np.uint16 else None, compressed_indices_mapping=mapping
    )


@dataclass(frozen=True)
class Parts:
    """What is looked up: bags of indices, some of them out of range in `wild`, weights, and a mapping that prunes."""

    indices: np.ndarray
    wild: np.ndarray
    ends: np.ndarray
    weights: np.ndarray  # of float64
    mapping: np.ndarray


ODD_WEIGHTS = (0, -0.0, 1, -1, 1e-30, 1e-40, 3e38, 1e300, 5e-324, np.inf, np.nan)


def parts_of(rng: np.random.Generator, num_rows: int, ends: np.ndarray, extremes: bool = False) -> Parts:
    num_embeddings = num_rows + 2  # two are pruned
    mapping = np.maximum(rng.permutation(num_embeddings).astype(np.int32) - 2, -1)
    count = int(ends[-1])
    indices = rng.integers(0, num_rows, count)
    beyond = rng.choice([-1, -num_rows, num_embeddings, num_embeddings + 5, 2**31 - 1, -(2**31)], count)
    wild = np.where(rng.random(count) < 0.3, beyond, indices)
    weights = rng.choice(ODD_WEIGHTS, count) if extremes else rng.normal(size=count)
    return Parts(indices, wild, ends, weights, mapping)


@dataclass(frozen=True)
class Variant:
    mode: str = "sum"
    weights: str | None = None
    index_type: str = "i8"
    offset_type: str = "i8"
    is_pruned: bool = False
    padding_idx: int | None = None
    invalid: str = "raise"
    by_lengths: bool = False
    output: str | None = None

    def indices(self, parts: Parts) -> np.ndarray:
        return (parts.wild if self.invalid == "skip" else parts.indices).astype(self.index_type)

    def sample_weights(self, parts: Parts) -> np.ndarray | None:
        with np.errstate(all="ignore"):
            return None if self.weights is None else parts.weights.astype(self.weights)

    def mapping(self, parts: Parts) -> np.ndarray | None:
        return parts.mapping if self.is_pruned else None

    def ours(self, table: Any, parts: Parts, **more: Any) -> np.ndarray:
        """Of a table that is pruned by the mapping, or not, as this variant is."""
        if self.by_lengths:
            bags = {"lengths": np.diff(parts.ends).astype(self.offset_type)}
        else:
            bags = {"offsets": parts.ends.astype(self.offset_type), "include_last_offset": True}
        return qembag.embedding_bag(
            table, self.indices(parts), **bags, mode=self.mode, per_sample_weights=self.sample_weights(parts),
            padding_idx=self.padding_idx, invalid=self.invalid, dtype=self.output, **more,
        )  # fmt: skip

    def expected(self, oracle: Callable[..., np.ndarray], parts: Parts) -> np.ndarray:
        """Of an oracle that knows the rows."""
        return oracle(
            self.indices(parts), parts.ends, include_last_offset=True, mode=self.mode,
            weights=self.sample_weights(parts), mapping=self.mapping(parts), padding_idx=self.padding_idx,
            invalid=self.invalid, half=self.output == "float16", bfloat16=self.output == "bfloat16",
        )  # fmt: skip


VARIANTS = {
    "sum": Variant(),
    "sum, int32": Variant(index_type="i4", offset_type="i4"),
    "weighted, int32": Variant(weights="f4", index_type="i4"),
    "weighted by halves": Variant(weights="f2", offset_type="i4"),
    "weighted by doubles": Variant(weights="f8"),
    "mean": Variant("mean", offset_type="i4"),
    "weighted mean, float16": Variant("mean", weights="f4", output="float16"),
    "max": Variant("max"),
    "max, bfloat16, padded, skipped": Variant("max", padding_idx=-3, invalid="skip", output="bfloat16"),
    "max, pruned": Variant("max", is_pruned=True, output="float16"),
    "float16": Variant(output="float16", index_type="i4"),
    "bfloat16": Variant(output="bfloat16", weights="f4"),
    "pruned": Variant(is_pruned=True),
    "pruned, padded and weighted mean": Variant("mean", is_pruned=True, padding_idx=3, weights="f2"),
    "padded": Variant(padding_idx=2),
    "skipped": Variant(invalid="skip"),
    "skipped, int32, weighted": Variant(invalid="skip", index_type="i4", weights="f4"),
    "skipped mean": Variant("mean", invalid="skip"),
    "skipped, pruned, padded and weighted": Variant(invalid="skip", is_pruned=True, padding_idx=0, weights="f8"),
    "by lengths": Variant(by_lengths=True),
    "by lengths, int32, weighted mean": Variant("mean", by_lengths=True, offset_type="i4", weights="f4"),
    "average": Variant("average"),
    "weighted average": Variant("average", weights="f4"),
    "weighted average, all at once": Variant(
        "average", weights="f8", is_pruned=True, padding_idx=1, invalid="skip", by_lengths=True, output="bfloat16"
    ),
    "square root of n": Variant("sqrtn", output="float16"),
    "weighted square root": Variant("sqrtn", weights="f4", index_type="i4"),
    "weighted square root, all at once": Variant(
        "sqrtn", weights="f2", is_pruned=True, padding_idx=1, invalid="skip", by_lengths=True
    ),
}
