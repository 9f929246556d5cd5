"""A lookup as a caller writes it: the call by each of its names, the errors by the rules, the answer by the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import qembag
import reference
from qembag import ops
from support import rules
from support.layouts import LAYOUTS, NAMES, Layout

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16 = np.dtype(np.uint16)  # its bits


@dataclass
class Verdict:
    """The errors that a call may raise, or what it answers."""

    faults: rules.Faults = field(default_factory=set)
    answer: Callable[[], np.ndarray] | None = None
    shape: tuple[int, ...] = ()
    kinds: tuple[np.dtype[Any], ...] = (FLOAT32,)
    inputs: list[Any] = field(default_factory=list)

    def with_out(self, out: Any) -> rules.Faults:
        """Its faults and those of an output."""
        return self.faults | rules.output(out, self.shape, self.kinds, self.inputs)

    def expected(self, out: Any = None) -> np.ndarray:
        assert self.answer is not None
        kind = self.kinds[0] if out is None else out.dtype
        with np.errstate(all="ignore"):
            answer = self.answer()
            return reference.to_bfloat16(answer) if kind == BFLOAT16 else answer.astype(kind)


@dataclass
class Table:
    """The arguments of a `QuantizedTable`, and it itself where it has been made."""

    rows: Any
    bits: Any
    dim: Any = None
    mapping: Any = None
    made: Any = None
    layout: dict[str, Any] = field(default_factory=dict)  # scale_dtype, scale_first, group_size, if given

    def make(self) -> Any:
        if self.made is not None:
            return self.made
        return qembag.QuantizedTable(
            self.rows, self.bits, dim=self.dim, compressed_indices_mapping=self.mapping, **self.layout
        )

    @property
    def map(self) -> np.ndarray | None:
        """As it is now: its owner may have written to it since the table was made."""
        if self.made is not None:
            return self.made.compressed_indices_mapping
        plain = None if self.mapping is None else np.asarray(self.mapping)
        return None if plain is not None and plain.tolist() == [0] else plain

    def judge(self) -> tuple[tuple[Any, int, Layout], rules.Faults]:
        given = self.layout
        found, faults = rules.table(
            self.rows, self.bits, self.dim, None if self.made else self.mapping, given.get("scale_dtype"),
            given.get("scale_first", False), given.get("group_size"),
        )  # fmt: skip
        return found, set() if self.made is not None else faults

    def bags(self, *given: Any, **options: Any) -> np.ndarray:
        """By the oracle."""
        (rows, dim, layout), _ = self.judge()
        return reference.embedding_bag(rows, self.bits, dim, *given, **layout.reading(), **options)

    def values(self) -> np.ndarray:
        (rows, dim, layout), _ = self.judge()
        return reference.dequantize(rows, self.bits, dim, **layout.reading())


@dataclass
class Floats:
    """The arguments of a `FloatTable`, and it itself where it has been made; or an array in its place, if `is_plain`."""

    rows: Any
    dtype: Any = None
    mapping: Any = None
    made: Any = None
    is_plain: bool = False

    def make(self) -> Any:
        if self.is_plain:
            return self.rows
        if self.made is not None:
            return self.made
        return qembag.FloatTable(self.rows, dtype=self.dtype, compressed_indices_mapping=self.mapping)

    @property
    def map(self) -> np.ndarray | None:
        return None if self.is_plain else Table.map.fget(self)  # type: ignore[attr-defined]

    def judge(self) -> tuple[tuple[Any, int, None], rules.Faults]:
        if self.is_plain:
            rows, faults = rules.float_rows("table", self.rows)
            if not isinstance(self.rows, np.ndarray):
                faults = {(TypeError, "table")}
            return (rows, 0 if rows is None else rows.shape[1], None), faults
        found, faults = rules.float_table(self.rows, self.dtype, None if self.made else self.mapping)
        return found, set() if self.made is not None else faults

    def bags(self, *given: Any, **options: Any) -> np.ndarray:
        (rows, _, _), _ = self.judge()
        return reference.float_embedding_bag(rows, *given, **options)

    def values(self) -> np.ndarray:
        (rows, _, _), _ = self.judge()
        return reference.widen(rows)


@dataclass
class Bags:
    """Bags of a table by `embedding_bag` ("public"), or by the reference's operators of its packed table or its rows."""

    family: str
    table: Table | Floats
    indices: Any
    offsets: Any = None
    mode: Any = None
    weights: Any = None
    include_last_offset: Any = False
    padding_idx: Any = None
    num_threads: Any = None
    dtype: Any = None
    pruned: Any = False
    mapping: Any = None
    lengths: Any = None
    invalid: Any = "raise"
    takes_out = True

    def __post_init__(self) -> None:
        if self.mode is None:
            self.mode = "sum" if self.is_public else 0

    @property
    def is_public(self) -> bool:
        return self.family == "public"

    def __call__(self, out: Any = None) -> Any:
        if self.is_public:
            return qembag.embedding_bag(
                self.table.make(), self.indices, self.offsets, lengths=self.lengths, mode=self.mode,
                per_sample_weights=self.weights, include_last_offset=self.include_last_offset,
                padding_idx=self.padding_idx, invalid=self.invalid, out=out, dtype=self.dtype,
                num_threads=self.num_threads,
            )  # fmt: skip
        by_rows = self.family == "rowwise"
        name = f"embedding_bag_{NAMES[self.table.bits]}{'_rowwise_offsets' if by_rows else ''}"
        return getattr(ops, name)(
            self.table.rows if by_rows else self.table.make(), self.indices, self.offsets, False, self.mode,
            self.pruned, self.weights, self.mapping, self.include_last_offset, out=out,
        )  # fmt: skip

    def judge(self) -> Verdict:
        (rows, dim, _), faults = self.table.judge()
        table = self.table
        if self.family == "rowwise":  # which knows no other layout
            layout = LAYOUTS[self.table.bits]
            rows, faults = rules.rows("weight", self.table.rows, layout)
            dim = 0 if faults else layout.dim(rows.shape[1])
            table = Table(self.table.rows, self.table.bits)
        elif faults:  # before there is anything to look up in
            return Verdict(faults)
        mode, more = rules.mode(self.mode, not self.is_public)
        faults |= more
        kind, more = rules.output_dtype(self.dtype)
        faults |= more | rules.num_threads(self.num_threads)[1]
        last, more = rules.flag("include_last_offset", self.include_last_offset)
        faults |= more
        invalid, more = rules.invalid(self.invalid)
        faults |= more
        by, maps, more = pruning(self.table, self.family, self.pruned, self.mapping, rows)
        faults |= more
        num_rows = 0 if rows is None else len(rows)
        count = num_rows if by is None else by.size
        padding, more = rules.padding_idx(self.padding_idx, count)
        faults |= more
        if self.lengths is None:
            indices, offsets, num_bags, used, more = rules.bags(self.indices, self.offsets, last)
        else:
            indices, offsets, num_bags, used, more = rules.bags_of_lengths(
                self.indices, self.offsets, last, self.lengths
            )
        faults |= more
        weights, more = self.judge_weights(mode, indices)
        faults |= more
        if not faults:  # only then is anything looked up
            used = [index for index in used if index != padding and (invalid == "raise" or 0 <= index < count)]
            faults = rules.used_rows("indices", used, count, num_rows, by)

        def answer() -> np.ndarray:
            return table.bags(
                indices, offsets, mode=mode, mapping=by, weights=weights, include_last_offset=last,
                padding_idx=padding, invalid=invalid,
            )  # fmt: skip

        inputs = [self.table.rows, self.indices, self.offsets, self.lengths, self.weights, *maps]
        return Verdict(faults, answer, (num_bags, dim), kinds_of(kind, self.is_public), inputs)

    def judge_weights(self, mode: Any, indices: np.ndarray | None) -> rules.Judged:
        if self.weights is None:
            return None, set()
        name = "per_sample_weights"
        weights, faults = rules.floats(name, self.weights, doubles=self.is_public)
        shapes_differ = weights is not None and indices is not None and weights.shape != indices.shape
        if mode == "max" or shapes_differ:
            faults = faults | {(ValueError, name)}
        return weights, faults


def kinds_of(kind: Any, may_be_half: bool) -> tuple[np.dtype[Any], ...]:
    """The types that an output may have."""
    if kind is None:
        return (FLOAT32, FLOAT16) if may_be_half else (FLOAT32,)
    return (kind,)


def pruning(
    table: Table | Floats, family: str, pruned: Any, given: Any, rows: np.ndarray | None
) -> tuple[np.ndarray | None, list[Any], rules.Faults]:
    """The mapping that a lookup goes by, and what is given for it."""
    if family == "public":
        return table.map, [table.map], set()
    is_pruned, faults = rules.flag("pruned_weights", pruned)
    if not is_pruned:
        return None, [], faults
    if given is None:
        if family == "rowwise" or table.map is None:
            return None, [], faults | {(ValueError, rules.MAPPING)}
        return table.map, [table.map], faults
    by, more, _ = rules.mapping(given, 0 if rows is None else len(rows))
    if by is not None and by.tolist() == [0]:
        by = None
    return by, [given], faults | more


@dataclass
class SingleRows:
    """Rows of a table, each by itself: by `embedding`, `dequantize` or the reference's operator ("packed")."""

    family: str
    table: Table | Floats
    indices: Any
    num_threads: Any = None
    dtype: Any = None
    pruned: Any = False
    invalid: Any = "raise"

    @property
    def takes_out(self) -> bool:
        return self.family != "packed"

    def __call__(self, out: Any = None) -> Any:
        table = self.table.make()
        if self.family == "embedding":
            return qembag.embedding(
                table, self.indices, invalid=self.invalid, out=out, dtype=self.dtype, num_threads=self.num_threads
            )
        if self.family == "packed":
            assert out is None
            return getattr(ops, f"embedding_{NAMES[self.table.bits]}")(table, self.indices, self.pruned)
        return table.dequantize(self.indices, out=out)

    def judge(self) -> Verdict:
        (rows, dim, _), faults = self.table.judge()
        if faults:
            return Verdict(faults)
        by_flag = "packed" if self.family == "packed" else "public"
        by, maps, faults = pruning(self.table, by_flag, self.pruned, None, rows)
        count = len(rows) if by is None else by.size
        kind, more = rules.output_dtype(self.dtype)
        faults |= more | rules.num_threads(self.num_threads)[1]
        invalid, more = rules.invalid(self.invalid)
        faults |= more
        name = "rows" if self.family == "dequantize" else "indices"
        if self.indices is None and self.family == "dequantize":
            indices, more = np.arange(count), set()
        else:
            indices, more = rules.whole_numbers(name, self.indices)
        faults |= more
        if not faults:
            used = [index for index in indices.ravel().tolist() if invalid == "raise" or 0 <= index < count]
            faults = rules.used_rows(name, used, count, len(rows), by)
        shape = (dim,) if indices is None else (*indices.shape, dim)

        def answer() -> np.ndarray:
            chosen = [index if 0 <= index < count else -1 for index in indices.ravel().tolist()]
            stored = np.array([-1 if index == -1 else index if by is None else by[index] for index in chosen], np.int64)
            result = np.zeros((len(chosen), dim), np.float32)
            result[stored >= 0] = self.table.values()[stored[stored >= 0]]
            if self.family != "dequantize":
                result = result + np.float32(0)  # a sum starts from zero, so that none of its zeros is negative
            return result.reshape(shape)

        kinds = kinds_of(kind, self.family == "embedding")
        return Verdict(faults, answer, shape, kinds, [self.table.rows, self.indices, *maps])
