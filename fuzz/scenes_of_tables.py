"""What a table can do besides lookups, and what is no table."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

import checks
import qembag
import reference
from checks import at_each_level, attempt, compare, is_same, require
from makers import Maker
from qembag import ops
from source import POOL
from support import rules
from support.layouts import NAMES
from support.objects import NO_INTEGERS
from support.packing import Converting


def tables(make: Maker) -> None:
    if make.source.rarely(3):
        tables_of_floats(make)
        return
    table = make.table()
    if table is None or checks.PLANTED == "overread":  # which is the kernels' to find, not the oracle's
        return
    made, mapping = table.made, table.map
    rows = np.array(np.asarray(table.rows))
    num_rows = len(rows)
    is_bad = mapping is not None and bool(((mapping < -1) | (mapping >= num_rows)).any())
    (_, _, layout), _ = table.judge()
    codes, scales, biases = reference.unpack(rows, table.bits, table.dim, **layout.reading())
    values = reference.dequantize(rows, table.bits, table.dim, **layout.reading())
    got, _ = attempt(lambda: (made.codes(), made.scales, made.biases, repr(made), made.nbytes), set())
    require(is_same(got[0].astype(np.float32), codes), "codes")
    if layout.num_groups(table.dim) == 1:
        scales, biases = scales.reshape(num_rows), biases.reshape(num_rows)
    require(is_same(got[1], scales) and is_same(got[2], biases), "scales or biases")
    logical_rows(make, made, rows, values, is_bad)


def layouts(make: Maker) -> None:
    """A table to other layouts, each made of the one before: a narrow one can only hold what came from such a one."""
    table = make.table()
    if table is None or checks.PLANTED == "overread":  # which is the kernels' to find, not the oracle's
        return
    source, made, mapping = make.source, table.made, table.map
    (_, _, layout), _ = table.judge()
    is_bad = mapping is not None and bool(((mapping < -1) | (mapping >= made.num_rows)).any())
    for _ in range(1 + source.below(4)):
        call = Converting(made, layout, make.row_arguments(made.bits))
        verdict = call.judge()
        if is_bad:
            attempt(call, verdict.faults | {(IndexError, rules.MAPPING)})
            return
        at_each_level(call, verdict)
        other, _ = attempt(call.convert, verdict.faults)
        if other is None:
            continue
        same_table(other, made)
        made, (layout, _) = other, call.target()
        if made.num_rows and source.rarely(4):
            made.data[source.below(made.num_rows), source.below(made.row_bytes)] = source.byte()


def same_table(table: Any, other: Any) -> None:
    """The same values and mapping, in memory of their own."""
    for one, two in ((table.codes(), other.codes()), (table.dequantize(), other.dequantize())):
        require(is_same(one, two), "a converted table's values")
    mapping, given = table.compressed_indices_mapping, other.compressed_indices_mapping
    require((mapping is None) == (given is None), "whether a converted table is pruned")
    if mapping is not None:
        require(is_same(mapping, given) and not np.may_share_memory(mapping, given), "a converted table's mapping")
    require(not np.may_share_memory(table.data, other.data), "a converted table's memory")


def tables_of_floats(make: Maker) -> None:
    table = make.float_table()
    if table is None or checks.PLANTED == "overread" or table.is_plain:
        return
    made, mapping = table.made, table.map
    rows = np.array(table.judge()[0][0])
    is_bad = mapping is not None and bool(((mapping < -1) | (mapping >= len(rows))).any())
    got, _ = attempt(lambda: (np.array(made.data), made.dtype, repr(made), made.nbytes, made.row_bytes), set())
    require(is_same(got[0], rows), "the rows of a table of floats")
    require(got[3] == rows.nbytes + (0 if mapping is None else mapping.nbytes), "the bytes of a table of floats")
    require(got[4] == rows.shape[1] * rows.itemsize, "the bytes of a row of floats")
    logical_rows(make, made, rows, table.values(), is_bad)


def logical_rows(make: Maker, made: Any, rows: np.ndarray, values: np.ndarray, is_bad: bool) -> None:
    """Of a table of stored rows and their values: as pickled, as an array, pruned."""
    source, mapping = make.source, made.compressed_indices_mapping
    count = len(rows) if mapping is None else len(mapping)
    require(len(made) == count and made.shape == (count, made.dim), "a table's shape")
    faults: rules.Faults = {(IndexError, rules.MAPPING)} if is_bad else set()
    copy, _ = attempt(lambda: pickle.loads(pickle.dumps(made)), faults)
    logical = None
    if copy is not None:
        expected = rows.copy()
        if isinstance(made, qembag.QuantizedTable):
            expected[:, made.layout.used_bytes :] = 0
        require(is_same(np.array(copy.data), expected) and repr(copy) == repr(made), "a pickled table")
        logical = values
        if mapping is not None:
            values = np.concatenate([values, np.zeros((1, made.dim), np.float32)])
            logical = values[mapping]  # of which -1 is the last
        whole, _ = attempt(lambda: np.asarray(copy), set())
        require(is_same(whole, logical), "a table as an array")
        for _ in range(1 + source.below(3)):
            item(make, made, logical)
    for _ in range(1 + source.below(2)):
        prune(make, made, count, faults, logical)


def item(make: Maker, table: Any, logical: np.ndarray) -> None:
    """As NumPy chooses along a first axis."""
    source = make.source
    count = len(logical)
    kind = source.below(6)
    chosen: Any
    if kind == 0:
        chosen = source.pick([0, -1, count, -count, source.whole(), 2**70, np.int64(0), np.uint64(2**64 - 1)])
    elif kind == 1:
        ends = [None, 0, 1, -1, count, -count, 2**70, -(2**70), source.below(20)]
        chosen = slice(source.pick(ends), source.pick(ends), source.pick([None, 1, -1, 2, 2**70, -(2**70), 0]))
    elif kind == 2:
        chosen = make.integers(source.within(source.shape(), table.dim), count)
        if not isinstance(chosen, (np.ndarray, list, int)):
            return
        if isinstance(chosen, np.ndarray) and chosen.dtype.kind not in "iu":
            return
        if isinstance(chosen, np.ma.MaskedArray):  # whose mask NumPy would pass over
            attempt(lambda: table[chosen], {(TypeError, "index")})
            return
    elif kind == 3:
        chosen = source.values(POOL, source.pick([count, count, count + 1])) > 127
    else:
        chosen = source.pick([None, ..., (), (0,), "0", 1.5, True, [0, -1], [], [[0]], object(), slice("a", None)])
    faults: rules.Faults = set()
    expected = None
    try:
        # NumPy of 32 bits would take the low half of a number of 64, which may be that of a row.
        numbers = np.asarray(chosen).ravel().tolist() if isinstance(chosen, np.ndarray) else []
        if any(number not in range(-count, count) for number in numbers if not isinstance(number, bool)):
            raise IndexError
        expected = logical[chosen] if not isinstance(chosen, tuple) else None
        if expected is None:
            faults = {(IndexError, ".*")}
    except (IndexError, OverflowError, TypeError, ValueError) as error:
        # NumPy has said what is wrong with an item; its words are not looked at.
        faults = {(kind, ".*") for kind in (type(error), IndexError, TypeError, ValueError)}
    result, _ = attempt(lambda: table[chosen], faults)
    if expected is not None:
        compare(result, np.asarray(expected))


def prune(make: Maker, table: Any, count: int, faults: rules.Faults, logical: np.ndarray | None) -> None:
    source = make.source
    if source.rarely(2):
        size = count + 1 if source.rarely(8) else count
        keep = make.place(source.values(POOL, size) > 127, ["plain", "strided", "reversed", "list", "subclass"])
    else:
        keep = make.integers((source.below(12),) if not source.rarely() else source.shape(), count)
    numbers, more = rules.keep(keep, count)
    pruned, _ = attempt(lambda: table.prune(keep), faults | more)
    if pruned is not None and logical is not None:
        expected = np.zeros_like(logical)
        expected[numbers] = logical[numbers]
        # One row, kept, has a mapping of [0], which means that nothing is pruned: the same values.
        result, _ = attempt(pruned.dequantize, set())
        compare(result, expected)


def no_tables(make: Maker) -> None:
    """Anything in the place of a table, of its rows or of its parts."""
    source = make.source
    bits = source.pick([8, 4, 2])
    others = [
        lambda: None,
        lambda: np.zeros((2, 2)),
        lambda: np.zeros(3, np.int8),
        lambda: np.zeros((0, 0, 0), np.uint8),
    ]
    odd = source.pick([*NO_INTEGERS.values(), *others])()
    stem = f"embedding_bag_{NAMES[bits]}"
    codes, ones = np.ones((2, 4), np.uint8), np.ones(2, np.float32)
    other = qembag.QuantizedTable(np.zeros((2, 12), np.uint8), source.pick([width for width in NAMES if width != bits]))
    for name, call in (
        ("table", lambda: qembag.embedding_bag(odd, [0], [0])),
        ("table", lambda: qembag.embedding(odd, [0])),
        ("data", lambda: qembag.QuantizedTable(odd, bits)),
        ("data", lambda: qembag.FloatTable(odd, dtype=source.pick([None, "float32", "bfloat16"]))),
        ("weights", lambda: qembag.quantize(odd, bits, method=source.pick(["minmax", "greedy"]))),
        ("weight", lambda: getattr(ops, stem)(source.pick([odd, other]), [0], [0])),
        ("weight", lambda: getattr(ops, f"embedding_{NAMES[bits]}")(source.pick([odd, other]), [0])),
        ("weight", lambda: getattr(ops, f"{stem}_rowwise_offsets")(odd, [0], [0])),
        ("weight", lambda: getattr(ops, f"{stem}_unpack")(odd)),
        ("packed", lambda: ops.embedding_bag_unpack(source.pick([odd, other]))),
        ("codes", lambda: ops.embedding_bag_prepack(odd, ones, ones, bits)),
        ("scales", lambda: ops.embedding_bag_prepack(codes, odd, ones, bits)),
        ("zero_points", lambda: ops.embedding_bag_prepack(codes, ones, odd, bits)),
    ):
        if name != "table" and rules.floats(name, odd, doubles=True)[0] is not None:
            continue  # of which floats may be made, or scales
        attempt(call, rules.either(name) | rules.either("method"))
    limit = make.threads()
    attempt(lambda: qembag.set_num_threads(limit), rules.num_threads(limit, "n")[1])
    attempt(qembag.get_num_threads, set())
    qembag.set_num_threads(None)
