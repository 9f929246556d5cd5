"""Quantizing, packing, unpacking and changing layouts as a caller writes them: the call, the errors by the rules, the
oracle's answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import qembag
import reference
from qembag import ops
from support import rules
from support.layouts import LAYOUTS, NAMES, Layout
from support.lookups import Verdict

UINT8 = np.dtype(np.uint8)
MOST_BINS = 1_000_000


@dataclass
class Packing:
    """Floats to packed rows: by `quantize` ("public"), or the reference's operators, with `bounds` or without."""

    family: str
    weights: Any
    bits: Any
    method: Any = "minmax"
    importance: Any = None
    num_threads: Any = None
    bounds: Any = None
    optimized: Any = False
    nbins: Any = 200
    ratio: Any = 0.16
    layout: dict[str, Any] = field(default_factory=dict)  # scale_dtype and others of `quantize`, if given

    def __call__(self, _: Any = None) -> np.ndarray:
        """The rows, with +0 for each scale or bias of -0."""
        if self.family == "public":
            given = {} if self.importance is None else {"importance": self.importance}
            table = qembag.quantize(
                self.weights, self.bits, method=self.method, num_threads=self.num_threads, **given, **self.layout
            )
            layout, faults = rules.layout(self.bits, **self.layout)
            if faults:
                return table.data  # which is more than should have come
            assert layout.is_of(table, table.dim), f"asked for {layout}, got {table.layout}"
            return layout.unsigned(table.data, table.dim)
        passed = [self.weights, *([self.bounds] if self.family == "bounds" else [])]
        if self.bits != 8:
            passed += [self.optimized, self.nbins, self.ratio]
        suffix = "_with_rowwise_min_max" if self.family == "bounds" else ""
        rows = getattr(ops, f"embedding_bag_{NAMES[self.bits]}_prepack{suffix}")(*passed)
        return LAYOUTS[self.bits].unsigned(rows)

    @property
    def name(self) -> str:
        return "weights" if self.family == "public" else "weight"

    def judge(self) -> Verdict:
        bits, faults = rules.bits(self.bits)
        if faults:
            return Verdict(faults)
        weights, faults = self.judge_weights(bits)
        method, more = self.judge_search(bits)
        faults |= more | self.judge_importance(weights, method) | rules.num_threads(self.num_threads)[1]
        layout, more = rules.layout(bits, **self.layout)
        faults |= more
        bounds = None
        if self.family == "bounds":
            bounds, more = rules.floats("rowwise_min_max", self.bounds)
            faults |= more
            if weights is not None and bounds is not None:
                num_rows = int(np.prod(weights.shape[:-1]))
                faults |= set() if bounds.shape == (num_rows, 2) else {(ValueError, "rowwise_min_max")}
        return Verdict(faults) if faults else self.packed(weights, layout, bounds, method)

    def judge_weights(self, bits: int) -> rules.Judged:
        is_public = self.family == "public"
        weights, faults = rules.floats(self.name, self.weights, doubles=is_public)
        if weights is not None:
            shape = weights.shape
            is_whole = is_public or not shape or shape[-1] % LAYOUTS[bits].per_byte == 0
            is_matrix = len(shape) == 2 or (bits == 8 and not is_public and len(shape) > 0)
            if not is_matrix or shape[-1] == 0 or not is_whole:
                faults = faults | {(ValueError, self.name)}
        return weights, faults

    def judge_search(self, bits: int) -> tuple[str, rules.Faults]:
        """The method that is asked for."""
        if self.family == "public":
            if not isinstance(self.method, str) or self.method not in ("minmax", "greedy", "lsq"):
                return "minmax", rules.either("method")
            return self.method, {(ValueError, "method")} if self.method == "greedy" and bits == 8 else set()
        if bits == 8:
            return "minmax", set()
        is_greedy, faults = rules.flag("optimized_qparams", self.optimized)
        faults |= rules.whole_number("nbins", self.nbins, 1, MOST_BINS)[1] | rules.share("ratio", self.ratio)[1]
        return "greedy" if is_greedy else "minmax", faults

    def judge_importance(self, weights: np.ndarray | None, method: str) -> rules.Faults:
        if self.importance is None:
            return set()
        counts, faults = rules.floats("importance", self.importance, doubles=True)
        if counts is None or weights is None or method != "lsq":
            return faults | rules.either("importance")
        is_good = counts.shape == weights.shape[1:] and (np.isfinite(counts) & (counts >= 0)).all() and counts.any()
        return faults if is_good else faults | {(ValueError, "importance")}

    def packed(self, weights: np.ndarray, layout: Layout, bounds: np.ndarray | None, method: str) -> Verdict:
        """The oracle's rows, if all that goes into them is finite."""
        shape, dim = weights.shape, weights.shape[-1]
        laid_out = {**layout.reading(), "row_alignment": layout.alignment}
        with np.errstate(all="ignore"):
            plain = weights.astype(np.float32).reshape(int(np.prod(shape[:-1])), dim)
            limits = None if bounds is None or method == "greedy" else bounds.astype(np.float32)
            by_range = reference.quantize(plain, layout.bits, bounds=limits, **laid_out)
            expected = by_range
            if method == "greedy":
                search = {"nbins": int(self.nbins), "ratio": float(self.ratio)}
                expected = reference.quantize(plain, layout.bits, method="greedy", **search, **laid_out)
            elif method == "lsq":
                counts = (
                    None if self.importance is None else rules.floats("importance", self.importance, doubles=True)[0]
                )
                expected = reference.quantize(plain, layout.bits, method="lsq", importance=counts, **laid_out)
        faults = self.not_packed(plain, layout, [by_range, expected])
        if limits is not None and (faults or not np.isfinite(limits).all()):
            faults = {(ValueError, self.name), (ValueError, "rowwise_min_max")}
        packed = layout.unsigned(expected, dim).reshape(*shape[:-1], layout.row_bytes(dim))
        return Verdict(faults, lambda: packed, kinds=(UINT8,))

    def not_packed(self, plain: np.ndarray, layout: Layout, packed: list[np.ndarray]) -> rules.Faults:
        """The first group of a row, row by row, whose elements are not finite, or whose scale or bias is not."""
        (num_rows, dim), size, num_groups = plain.shape, layout.group_size, layout.num_groups(plain.shape[1])
        stored = [layout.pairs(rows, dim).reshape(num_rows, num_groups, 2) for rows in packed]
        for row, group in np.ndindex(num_rows, num_groups):
            start = group * (size or dim)
            values = plain[row, start : start + (size or dim)]
            is_finite = bool(np.isfinite(values).all())
            if is_finite and all(np.isfinite(pairs[row, group]).all() for pairs in stored):
                continue
            spot = rf"{self.name}\[{row}\]"
            if num_groups > 1:
                spot += rf" \(group {group}, elements {start} to {start + len(values) - 1}\)"
            return {(ValueError, f"{spot} must {'have a minimum and a scale' if is_finite else 'be finite'}")}
        return set()


@dataclass
class Unpacking:
    """Packed rows to floats, by the reference's operators."""

    weight: Any
    bits: int

    def __call__(self, _: Any = None) -> np.ndarray:
        return getattr(ops, f"embedding_bag_{NAMES[self.bits]}_unpack")(self.weight)

    def judge(self) -> Verdict:
        packed, faults = rules.as_array("weight", self.weight)
        if packed is None or packed.dtype != np.uint8:
            return Verdict(faults or {(TypeError, "weight")})
        shape = packed.shape
        if not shape or LAYOUTS[self.bits].dim(shape[-1]) < 0 or (self.bits != 8 and len(shape) != 2):
            return Verdict({(ValueError, "weight")})
        dim = LAYOUTS[self.bits].dim(shape[-1])

        def answer() -> np.ndarray:
            rows = packed.reshape(int(np.prod(shape[:-1])), shape[-1])
            return reference.dequantize(rows, self.bits, dim).reshape(*shape[:-1], dim)

        return Verdict(set(), answer, (*shape[:-1], dim))


@dataclass
class PerChannel:
    """Codes with scales and zero points of their own, by `embedding_bag_prepack`."""

    codes: Any
    scales: Any
    zero_points: Any
    bits: int

    def __call__(self, _: Any = None) -> Any:
        return ops.embedding_bag_prepack(self.codes, self.scales, self.zero_points, self.bits)

    def judge(self) -> Verdict:
        codes, faults = rules.whole_numbers("codes", self.codes)
        if rules.is_plain(self.codes) and codes is not None and codes.size == 0:
            faults |= {(TypeError, "codes")}  # a list of nothing is one of floats
        if codes is not None and (codes.ndim != 2 or codes.shape[1] == 0 or (codes >= 2**self.bits).any()):
            faults |= {(ValueError, "codes")}
        pair = []
        for name, value in (("scales", self.scales), ("zero_points", self.zero_points)):
            part, more = rules.floats(name, value, doubles=True)
            faults |= more
            if part is not None and codes is not None and part.shape != codes.shape[:1]:
                faults |= {(ValueError, name)}
            pair.append(part)
        if faults:
            return Verdict(faults)
        with np.errstate(all="ignore"):
            scales, zero_points = (part.astype(np.float32) for part in pair)
            pairs = np.stack([scales, -(zero_points * scales)], axis=1).astype(LAYOUTS[self.bits].pair)
        if not np.isfinite(pairs).all():
            faults = {(ValueError, "scales"), (ValueError, "zero_points")}
        return Verdict(faults, lambda: pairs, kinds=(np.dtype(LAYOUTS[self.bits].pair),))


@dataclass
class Converting:
    """A `QuantizedTable`, whose rows are laid out as `layout` says, to another layout, by `to_layout`."""

    table: Any
    layout: Layout
    to: dict[str, Any]

    def __call__(self, _: Any = None) -> np.ndarray:
        return self.rows_of(self.convert())

    def convert(self) -> Any:
        return self.table.to_layout(**self.to)

    def rows_of(self, table: Any) -> np.ndarray:
        """Those of a table that came, which must be laid out as was asked for, with one NaN for all."""
        target, faults = self.target()
        if faults:
            return table.data  # which is more than should have come
        assert target.is_of(table, self.table.dim), f"asked for {target}, got {table.layout}"
        return target.with_one_nan(table.data, table.dim)

    def target(self) -> rules.Judged:
        return rules.layout(self.table.bits, **self.to)

    def judge(self) -> Verdict:
        target, faults = self.target()
        if faults:
            return Verdict(faults)
        rows, bits, dim = self.table.data, self.table.bits, self.table.dim
        codes, _, _ = reference.unpack(rows, bits, dim, **self.layout.reading())
        pairs = self.layout.pairs(rows, dim).reshape(len(rows), self.layout.num_groups(dim), 2)
        kept, are_joined = self.joined(pairs, target, dim)
        with np.errstate(all="ignore"):
            stored = kept.astype(target.pair)
            are_lost = (raw(stored.astype(kept.dtype)) != raw(kept)) & ~np.isnan(kept)
        wrong = {"group_size": ~are_joined, "scale_dtype": are_lost.any(axis=(1, 2))}
        first = min((int(np.argmax(rows)) for rows in wrong.values() if rows.any()), default=None)
        if first is not None:
            return Verdict({rules.of_row(what, first) for what, rows in wrong.items() if rows[first]})
        expected = target.with_one_nan(target.pack(codes, stored), dim)
        return Verdict(set(), lambda: expected, kinds=(UINT8,))

    def joined(self, pairs: np.ndarray, target: Layout, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """The pair of each group of `target`, and which rows have one for all elements of each, the same in every bit."""
        size, old = min(target.group_size or dim, dim), min(self.layout.group_size or dim, dim)
        kept, are_joined = [], np.full(len(pairs), True)
        for start in range(0, dim, size):
            end = min(start + size, dim)
            olds = raw(pairs[:, start // old : (end - 1) // old + 1])
            are_joined &= (olds == olds[:, :1]).all(axis=(1, 2))
            kept.append(pairs[:, start // old])
        return np.stack(kept, axis=1), are_joined


def raw(values: np.ndarray) -> np.ndarray:
    """The bits of floats."""
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")
