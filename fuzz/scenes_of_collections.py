"""Collections: many tables in one call, beside one call a table."""

from __future__ import annotations

from typing import Any

import numpy as np

import qembag
from checks import LEVELS, attempt, is_same, require
from makers import Maker
from source import FLOATS, WILD
from support import levels, rules
from support.arrays import empty
from support.floats import STORED
from support.layouts import ALL_MODES
from support.lookups import Bags, Floats, Table

NAMES = ("indices", "offsets", "per_sample_weights", rules.MAPPING)


def collections(make: Maker) -> None:
    source = make.source
    tables = [table for table in (make.any_table() for _ in range(1 + source.below(4))) if table is not None]
    if not tables:
        return
    calls = {f"f{number}": call_of(make, source.pick(tables)) for number in range(1 + source.below(5))}
    kind = source.pick([None, np.float16, "bfloat16"])
    of_all = {f"t{number}": table.make() for number, table in enumerate(tables)}
    numbers = {id(table): f"t{number}" for number, table in enumerate(tables)}
    collection = qembag.EmbeddingBagCollection(
        of_all,
        {feature: numbers[id(call.table)] for feature, call in calls.items()},
        mode={feature: call.mode for feature, call in calls.items()},
        padding_idx={feature: call.padding_idx for feature, call in calls.items()},
        invalid={feature: call.invalid for feature, call in calls.items()},
        dtype=kind,
    )
    for _ in range(1 + source.below(4)):
        size = source.below(7)
        for call in calls.values():
            batch_of(make, call, size)
        ask(make, collection, calls, STORED["bfloat16"] if kind == "bfloat16" else np.dtype(kind or np.float32))


def call_of(make: Maker, table: Table | Floats) -> Bags:
    """A feature's table and options, all of them right."""
    source = make.source
    call = Bags("public", table, None, None, source.pick(ALL_MODES), include_last_offset=True, num_threads=1)
    count = len(table.judge()[0][0]) if table.map is None else table.map.size
    call.padding_idx = source.below(2 * count) - count if count and source.rarely(3) else None
    call.invalid = source.pick(["raise", "skip"])
    return call


def batch_of(make: Maker, call: Bags, size: int) -> None:
    """Bags of one feature, of which something may be wrong."""
    source = make.source
    rows, dim, _ = call.table.judge()[0]
    count = len(rows) if call.table.map is None else call.table.map.size
    size = source.below(7) if source.rarely(24) else size
    shape: tuple[int, ...] = (size, source.below(6)) if source.rarely(3) else (source.below(24),)
    shape = source.within(shape, dim)
    call.indices, call.offsets, call.weights = make.integers(shape, count), None, None
    if len(shape) == 1:
        call.offsets = make.integers((size + 1,), shape[0] + 1, ordered=True)
    if source.rarely(3) and (call.mode != "max" or source.rarely(8)):
        call.weights = make.floats(shape, ["f4", "f4", "f2", "f8"], [FLOATS, WILD])


def ask(make: Maker, collection: Any, calls: dict[str, Bags], stored: np.dtype[Any]) -> None:
    """All bags at once, at every level, on one thread and on two: the answers of one call a table, or an error of one."""
    verdicts = {feature: call.judge() for feature, call in calls.items()}
    faults = set().union(*(verdict.faults for verdict in verdicts.values()))
    sizes = {verdict.shape[0] for verdict in verdicts.values() if verdict.shape}
    allowed = faults | {(kind, name) for kind, _ in faults for name in NAMES}
    if len(sizes) > 1:
        allowed |= {(ValueError, "indices")}
    values = {
        feature: call.indices if call.offsets is None else (call.indices, call.offsets)
        for feature, call in calls.items()
    }
    weights = {feature: call.weights for feature, call in calls.items() if call.weights is not None} or None
    size = next(iter(sizes), 1)
    target, block = empty((size, collection.dim), stored, make.source.pick(["plain", "odd gaps", "reversed"]))
    out: Any = make.source.pick([target, collection.split(target), None])
    before, came = block.copy(), []
    for level in LEVELS:
        with levels.use(level):
            for num_threads in (1, 2):
                answer, error = attempt(
                    lambda n=num_threads: collection(values, per_sample_weights=weights, out=out, num_threads=n),
                    allowed,
                )
                if error is not None:
                    require(np.array_equal(block, before), "an error changed an output")
                came.append((error, None if error is not None else np.array(answer if out is None else target)))
                block[:] = before
    require(len({error for error, _ in came}) == 1, f"the errors of two levels differ: {came}")
    if came[0][0] is None:
        for call in calls.values():
            call.dtype = collection.dtype
        expected = np.concatenate([call() for call in calls.values()], axis=1)
        require(all(is_same(answer, expected) for _, answer in came), "a collection differs from one call a table")
