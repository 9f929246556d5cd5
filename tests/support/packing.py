"""Quantizing, packing and unpacking as a caller writes them: the call, the errors by the rules, the oracle's answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import qembag
import reference
from qembag import ops
from support import rules
from support.layouts import LAYOUTS, NAMES
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
    num_threads: Any = None
    bounds: Any = None
    optimized: Any = False
    nbins: Any = 200
    ratio: Any = 0.16

    def __call__(self, _: Any = None) -> np.ndarray:
        """The rows, with +0 for each scale or bias of -0."""
        if self.family == "public":
            rows = qembag.quantize(self.weights, self.bits, method=self.method, num_threads=self.num_threads).data
        else:
            given = [self.weights, *([self.bounds] if self.family == "bounds" else [])]
            if self.bits != 8:
                given += [self.optimized, self.nbins, self.ratio]
            suffix = "_with_rowwise_min_max" if self.family == "bounds" else ""
            rows = getattr(ops, f"embedding_bag_{NAMES[self.bits]}_prepack{suffix}")(*given)
        return LAYOUTS[self.bits].unsigned(rows)

    @property
    def name(self) -> str:
        return "weights" if self.family == "public" else "weight"

    def judge(self) -> Verdict:
        bits, faults = rules.bits(self.bits)
        if faults:
            return Verdict(faults)
        weights, faults = self.judge_weights(bits)
        greedy, more = self.judge_search(bits)
        faults |= more | rules.num_threads(self.num_threads)[1]
        bounds = None
        if self.family == "bounds":
            bounds, more = rules.floats("rowwise_min_max", self.bounds)
            faults |= more
            if weights is not None and bounds is not None:
                num_rows = int(np.prod(weights.shape[:-1]))
                faults |= set() if bounds.shape == (num_rows, 2) else {(ValueError, "rowwise_min_max")}
        return Verdict(faults) if faults else self.packed(weights, bits, bounds, greedy)

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

    def judge_search(self, bits: int) -> tuple[bool, rules.Faults]:
        """Whether a greedy search is asked for."""
        if self.family == "public":
            if not isinstance(self.method, str) or self.method not in ("minmax", "greedy"):
                return False, rules.either("method")
            is_greedy = self.method == "greedy"
            return is_greedy, {(ValueError, "method")} if is_greedy and bits == 8 else set()
        if bits == 8:
            return False, set()
        is_greedy, faults = rules.flag("optimized_qparams", self.optimized)
        faults |= rules.whole_number("nbins", self.nbins, 1, MOST_BINS)[1] | rules.share("ratio", self.ratio)[1]
        return is_greedy, faults

    def packed(self, weights: np.ndarray, bits: int, bounds: np.ndarray | None, greedy: bool) -> Verdict:
        """The oracle's rows, if all that goes into them is finite."""
        shape = weights.shape
        with np.errstate(all="ignore"):
            plain = weights.astype(np.float32).reshape(int(np.prod(shape[:-1])), shape[-1])
            limits = None if bounds is None or greedy else bounds.astype(np.float32)
            by_range = reference.quantize(plain, bits, bounds=limits)
            expected = by_range
            if greedy:
                expected = reference.quantize(plain, bits, greedy=True, nbins=int(self.nbins), ratio=float(self.ratio))
        parts = [plain, LAYOUTS[bits].pairs(by_range), LAYOUTS[bits].pairs(expected)]
        faults = set() if all(np.isfinite(part).all() for part in parts) else {(ValueError, self.name)}
        if limits is not None and (faults or not np.isfinite(limits).all()):
            faults |= {(ValueError, self.name), (ValueError, "rowwise_min_max")}
        packed = LAYOUTS[bits].unsigned(expected).reshape(*shape[:-1], LAYOUTS[bits].row_bytes(shape[-1]))
        return Verdict(faults, lambda: packed, kinds=(UINT8,))


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
