"""Lookups: bags and single rows by all their names, large calls in threads, and many small ones in a storm."""

from __future__ import annotations

from typing import Any

import numpy as np

import checks
from checks import LEVELS, NO_OUT, Finding, at_each_level, attempt, is_same, require
from makers import Maker
from source import FLOATS, INTEGERS, POOL, WILD
from support import levels, rules
from support.floats import KINDS
from support.layouts import ALL_MODES, MODES
from support.lookups import Bags, Floats, SingleRows, Table, pruning

FLOAT_FAMILIES = ["embedding", "dequantize", "embedding", "all"]
MOST_ROUNDS = 16
MOST_BYTES = 100
MOST_STORMED = MOST_BYTES * 40 * 320  # elements


def bags(make: Maker) -> None:
    """`embedding_bag`, by its own name and by those of the reference's operators."""
    table = make.any_table()
    for _ in range(1 + make.source.below(4) if table is not None else 0):
        in_rounds(make, bags_of(make, table), 200, 3)


def single_rows(make: Maker) -> None:
    """`embedding`, `dequantize` and the reference's operators for single rows."""
    table = make.any_table()
    for _ in range(1 + make.source.below(4) if table is not None else 0):
        in_rounds(make, single_rows_of(make, table), 1000, 2)


def in_rounds(make: Maker, call: Bags | SingleRows, small: int, often: int) -> None:
    """The same call again and again, with other bytes in its arguments. The oracle, which is slow, is asked now and then."""
    for _ in range(MOST_ROUNDS):
        verdict = call.judge()
        out = make.out(verdict) if call.takes_out else NO_OUT
        work = int(np.prod(verdict.shape)) if verdict.shape else 0
        ask = make.source.rarely(often if work < small else 8)
        at_each_level(call, verdict, out, ask)
        if make.source.is_at_end:
            break
        make.flip()


def bags_of(make: Maker, table: Table | Floats) -> Bags:
    source = make.source
    family = source.pick(["public", "public", "rowwise", "packed"]) if isinstance(table, Table) else "public"
    is_public, (rows, dim, _) = family == "public", table.judge()[0]
    num_rows = len(rows)
    pruned = False if is_public else make.flag()
    mapping = make.mapping(num_rows) if not is_public and source.rarely(2) else None
    by, _, _ = pruning(table, family, pruned, mapping, rows)
    count = num_rows if by is None else by.size
    is_matrix = source.rarely(4)
    shape: tuple[int, ...] = (source.below(6), source.below(7)) if is_matrix else (source.below(24),)
    if source.rarely(32):
        shape = source.shape()
    shape = source.within(shape, dim)
    indices, offsets = make.integers(shape, count), None
    if is_matrix == source.rarely(24):
        offsets_shape = source.shape() if source.rarely(32) else (source.below(7),)
        offsets = make.integers(offsets_shape, shape[0] + 1 if shape else 1, ordered=True)
    mode, weights = source.below(len(ALL_MODES) if is_public else len(MODES)), None
    if source.rarely(3) and (mode != 2 or source.rarely(8)):
        weights_shape = source.shape() if source.rarely(24) else shape
        weights = make.floats(weights_shape, ["f4"] * 4 + ["f2"] * 4 + ["f8"], [FLOATS, WILD])
    call = Bags(family, table, indices, offsets, make.mode(mode, ALL_MODES[mode] if is_public else None), weights,
                make.flag(), pruned=pruned, mapping=mapping)  # fmt: skip
    if is_public:
        call.padding_idx, call.num_threads, call.dtype = make.padding(count), make.threads(), make.dtype()
        call.invalid = make.invalid()
        if source.rarely(4):
            call.lengths = make.lengths(source.pick([1, 2, 3, 5, 0]) if shape != (0,) else 2, int(np.prod(shape)))
            if not source.rarely(8):
                call.offsets, call.include_last_offset = None, False
    return call


def single_rows_of(make: Maker, table: Table | Floats) -> SingleRows:
    source = make.source
    family = source.pick(["embedding", "dequantize", "packed", "all"] if isinstance(table, Table) else FLOAT_FAMILIES)
    if isinstance(table, Floats) and table.is_plain:
        family = "embedding"
    rows, dim, _ = table.judge()[0]
    shape = source.within(source.shape() if source.rarely(2) else (source.below(24),), dim)
    if family == "all":
        return SingleRows("dequantize", table, None)
    count = len(rows) if table.map is None else table.map.size
    call = SingleRows(family, table, make.integers(shape, count))
    if family == "packed":
        call.pruned = make.flag()
    if family == "embedding":
        call.num_threads, call.dtype, call.invalid = make.threads(), make.dtype(), make.invalid()
    return call


def many_rows(make: Maker) -> None:
    """Enough work to be shared out among threads. The oracle is too slow: one thread's answer is compared."""
    source = make.source
    bits, dim = source.pick([8, 4, 2]), 250 + source.below(60)
    num_rows, layout = 1 + source.below(12), make.layout(bits)
    table: Table | Floats
    if source.rarely(3):
        kind = source.pick(KINDS)
        table = Floats(make.float_rows(kind, num_rows, dim), kind)
    else:
        table = Table(make.rows(layout, num_rows, layout.row_bytes(dim), dim), bits, dim, layout=layout.keywords())
    if table.judge()[1]:
        return
    table.made = table.make()
    count = 1700 + source.below(700)
    numbers = (source.values(POOL, count) % num_rows).astype(np.int64)
    if source.rarely(3):
        numbers[source.below(count)] = source.pick(INTEGERS[:8])
    ends = np.sort(source.values(POOL, 2 * (1 + source.below(90))).view("u2") % (count + 1)).astype(np.int64)
    ends[0], ends[-1] = 0, count
    if source.rarely(4):
        ends[source.below(len(ends))] = source.pick([*INTEGERS[:8], source.whole()])
    weights = source.pick([None, make.place(source.values(FLOATS, count), ["plain"])])
    call = Bags("public", table, make.place(numbers, ["plain"]), make.place(ends, ["plain"]), source.pick(ALL_MODES))
    call.invalid = source.pick(["raise", "skip"])
    call.padding_idx, call.include_last_offset = source.pick([None, 0]), True
    call.weights = None if call.mode == "max" else weights
    faults, came = call.judge().faults, []
    with levels.use(source.pick(LEVELS)):
        for call.num_threads in (1, source.pick([2, 3, 2])):
            came.append(attempt(call, faults))
    (first, error), (second, other) = came
    require(error == other, f"errors differ by the number of threads: {error} and {other}")
    require(error or is_same(first, second), "answers differ by the number of threads")


# ---- A storm ---------------------------------------------------------------------------------------------------------


def storm(make: Maker) -> None:
    """Byte after byte of the arguments' memory, and after each the same calls at all levels. They must agree, in answers
    and in errors, by either of their names. No oracle and no rules, and so little else than calls."""
    table = make.any_table()
    if table is None:
        return
    source = make.source
    rows, dim, _ = table.judge()[0]
    count = len(rows) if table.map is None else table.map.size
    (size,) = source.within((source.below(40),), dim)
    dtype = source.pick(["i8", "i4"])
    numbers = (source.values(POOL, size) % max(count, 1)).astype(dtype)
    ends = np.sort(source.values(POOL, 1 + source.below(8)) % (size + 1)).astype(dtype)
    public = Bags("public", table, make.place(numbers, ["plain"]), make.place(ends, ["plain"]))
    sample_weights = make.place(source.values(source.pick([FLOATS, WILD]), size), ["plain"])
    public.include_last_offset = source.pick([False, True])
    sample_weights = None if source.rarely(2) else sample_weights
    padding = source.below(count) if count and source.rarely(3) else None
    kind = source.pick(["f4", "f2"])
    out = make.place(np.zeros((len(ends) - public.include_last_offset, dim), kind), ["plain"])
    modes = source.pick([("sum", "mean"), ("max",), ("average", "sqrtn")])
    is_quantized = isinstance(table, Table)
    memory = [block for block, _ in make.blocks[:-1] if len(block)]
    packed = Bags("packed", table, public.indices, public.offsets, pruned=table.map is not None)
    packed.include_last_offset = public.include_last_offset
    singles = SingleRows("embedding", table, public.indices)
    for _ in range(max(min(MOST_BYTES, MOST_STORMED // max(size * dim, 1)), 1)):
        block = source.pick(memory)
        block[source.below(len(block))] = source.byte()
        for public.mode in modes:
            public.weights = packed.weights = None if public.mode == "max" else sample_weights
            public.padding_idx, public.invalid = padding, source.pick(["raise", "skip"])
            agree([public], out)
            public.padding_idx, public.invalid = None, "raise"
            packed.mode = ALL_MODES.index(public.mode)
            agree([public, packed] if is_quantized and public.mode in MODES else [public], None)
        agree([singles], None)
        if source.is_at_end:
            break
    make.blocks = []


FAULTS: rules.Faults = {(IndexError, "indices"), (IndexError, rules.MAPPING), (ValueError, "offsets")}


def agree(calls: list[Any], out: np.ndarray | None) -> None:
    """All calls at all levels give the same, and an error leaves the output alone."""
    came = []
    for level in LEVELS:
        with levels.use(level):
            for call in calls:
                before = None if out is None else out.tobytes()
                result, error = either_way(call, out)
                require(error is None or out is None or out.tobytes() == before, "an error changed `out`")
                came.append((error, None if result is None else result.copy()))
    for error, result in came[1:]:
        if error != came[0][0] or (error is None and not is_same(result, came[0][1])):
            raise Finding(f"two levels or names differ: {came[0]} and {(error, result)}")


def either_way(call: Any, out: np.ndarray | None) -> tuple[Any, str | None]:
    """An answer, or an error of what storms change."""
    checks.calls += 1
    try:
        return call(out), None
    except (IndexError, ValueError) as error:
        if not rules.allows(FAULTS, error):
            raise Finding(f"{type(error).__name__}: {error}") from error
        return None, f"{type(error).__name__}: {error}"
