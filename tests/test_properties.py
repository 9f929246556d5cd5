"""What must hold of any table and any bags: Hypothesis looks for the ones that nobody thought of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import qembag
import reference
from qembag import QuantizedTable
from support import levels
from support.arrays import same_bits, same_rows
from support.layouts import LAYOUTS

if TYPE_CHECKING:
    pass

# The same examples on every run: a failure is never a matter of luck.
modestly = settings(
    max_examples=400,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

WIDTHS = st.sampled_from([8, 4, 2])
DIMS = st.one_of(st.integers(1, 40), st.integers(41, 300))
# Every pattern of 32 bits, the odd ones more often than chance would have them.
ODD = [0.0, -0.0, 1e-45, 1e-40, 6e-8, 65504.0, 3.4e38, np.inf, -np.inf, np.nan]
FLOATS = st.one_of(st.floats(width=32), st.sampled_from([float(np.float32(number)) for number in ODD]))


@st.composite
def tables(draw: Any) -> tuple[np.ndarray, int, int, np.ndarray | None]:
    """Packed rows, bits, dim and perhaps a pruning map."""
    bits, dim, num_rows = draw(WIDTHS), draw(DIMS), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.integers(0, 256, (num_rows, LAYOUTS[bits].row_bytes(dim)), dtype=np.uint8)
    if draw(st.booleans()):
        tails = draw(arrays.arrays(np.float32, (num_rows, 2), elements=FLOATS))
    else:
        tails = rng.normal(size=(num_rows, 2)).astype(np.float32)
    LAYOUTS[bits].set_pairs(rows, tails)
    mapping = None
    if draw(st.booleans()):
        mapping = draw(arrays.arrays(np.int32, st.integers(1, 20), elements=st.integers(-1, num_rows - 1)))
    return rows, bits, dim, mapping


@st.composite
def lookups(draw: Any) -> tuple[tuple[np.ndarray, int, int, np.ndarray | None], dict[str, Any]]:
    """A table, and the arguments of a lookup in it."""
    table = draw(tables())
    rows, _, _, mapping = table
    count = len(rows) if mapping is None or mapping.tolist() == [0] else len(mapping)
    integers = st.sampled_from([np.int32, np.int64])
    numbers = st.integers(0, count - 1)
    arguments: dict[str, Any] = {"include_last_offset": draw(st.booleans())}
    if draw(st.booleans()):
        shape = draw(st.tuples(st.integers(1, 6), st.integers(0, 6)))
        arguments["indices"] = draw(arrays.arrays(draw(integers), shape, elements=numbers))
    else:
        size = draw(st.integers(0, 30))
        arguments["indices"] = draw(arrays.arrays(draw(integers), size, elements=numbers))
        offsets = draw(st.lists(st.integers(0, size), min_size=2, max_size=8))
        arguments["offsets"] = np.array(sorted(offsets), dtype=draw(integers))
    arguments["mode"] = draw(st.sampled_from(["sum", "mean", "max"]))
    if arguments["mode"] != "max" and draw(st.booleans()):
        kind = draw(st.sampled_from([np.float32, np.float16]))
        elements = FLOATS if kind == np.float32 else st.floats(width=16)
        arguments["weights"] = draw(arrays.arrays(kind, arguments["indices"].shape, elements=elements))
    if draw(st.booleans()):
        arguments["padding_idx"] = draw(st.integers(-count, count - 1))
    arguments["half"] = draw(st.booleans())
    return table, arguments


@given(lookups())
@modestly
def test_every_lookup_gives_the_oracles_bits(lookup):
    (rows, bits, dim, mapping), arguments = lookup
    expected = reference.embedding_bag(rows, bits, dim, mapping=mapping, **arguments)
    table = QuantizedTable(rows, bits, dim=dim, compressed_indices_mapping=mapping)
    ours = {name: value for name, value in arguments.items() if name not in ("half", "weights")}
    ours["per_sample_weights"] = arguments.get("weights")
    dtype = np.float16 if arguments["half"] else np.float32
    for level in levels.levels():
        with levels.use(level):
            same_bits(qembag.embedding_bag(table, dtype=dtype, **ours), expected)
            out = np.full(expected.shape, 77, dtype)
            assert qembag.embedding_bag(table, out=out, **ours) is out
            same_bits(out, expected)


@given(tables())
@modestly
def test_every_table_dequantizes_to_the_oracles_values(case):
    rows, bits, dim, mapping = case
    table = QuantizedTable(rows, bits, dim=dim, compressed_indices_mapping=mapping)
    values = reference.dequantize(rows, bits, dim)
    if table.compressed_indices_mapping is not None:
        values = np.where(mapping[:, None] < 0, np.float32(0), values[mapping])
    for level in levels.levels():
        with levels.use(level):
            same_bits(table.dequantize(), values)


@given(tables(), st.data())
@modestly
def test_pruning_changes_no_row_that_is_kept(case, data):
    rows, bits, dim, mapping = case
    table = QuantizedTable(rows, bits, dim=dim, compressed_indices_mapping=mapping)
    keep = data.draw(arrays.arrays(bool, len(table)))
    values = table.dequantize()
    values[~keep] = 0
    same_bits(table.prune(keep).dequantize(), values)


@given(lookups(), st.data())
@modestly
def test_a_bag_is_the_same_among_any_others(lookup, data):
    """Bags share nothing: each alone gives its row of them all."""
    (rows, bits, dim, mapping), arguments = lookup
    if "offsets" not in arguments:
        return
    table = QuantizedTable(rows, bits, dim=dim, compressed_indices_mapping=mapping)
    indices, offsets = arguments["indices"], arguments["offsets"]
    together = qembag.embedding_bag(table, indices, offsets, mode=arguments["mode"], include_last_offset=True)
    bag = data.draw(st.integers(0, len(offsets) - 2))
    alone = indices[offsets[bag] : offsets[bag + 1]][None]
    same_bits(together[bag : bag + 1], qembag.embedding_bag(table, alone, mode=arguments["mode"]))


@st.composite
def float_rows(draw: Any, largest: float) -> np.ndarray:
    """Rows of any floats up to `largest` in size, or of normal numbers of any size."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 70)))
    if draw(st.booleans()):
        bound = float(np.float32(largest))
        return draw(arrays.arrays(np.float32, shape, elements=st.floats(-bound, bound, width=32)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (rng.normal(size=shape) * 10.0 ** draw(st.integers(-30, 3))).astype(np.float32)


@given(st.data(), WIDTHS)
@modestly
def test_every_row_is_quantized_to_the_oracles_bytes(data, bits):
    weights = data.draw(float_rows(1e38 if bits == 8 else 2e4))
    expected = reference.quantize(weights, bits)
    for level in levels.levels():
        with levels.use(level):
            same_rows(qembag.quantize(weights, bits).data, expected, bits)


@given(st.data(), st.sampled_from([4, 2]))
@settings(modestly, max_examples=150)
def test_every_greedy_search_gives_the_oracles_bytes(data, bits):
    weights = data.draw(float_rows(2e4))
    expected = reference.quantize(weights, bits, method="greedy")
    for level in levels.levels():
        with levels.use(level):
            same_rows(qembag.quantize(weights, bits, method="greedy").data, expected, bits)


@given(float_rows(1e38))
@modestly
def test_eight_bits_are_wrong_by_half_a_step_at_most(weights):
    """Plus what float32 rounds away, in the range, the step, the code and the value; plus what 1e-8 in the formula takes
    from a narrow range, all of it below about that."""
    back = qembag.quantize(weights, 8).dequantize().astype(np.float64)
    exact = weights.astype(np.float64)
    low, high = exact.min(axis=1, keepdims=True), exact.max(axis=1, keepdims=True)
    step = (high - low) / 255
    rounding = 2.0**-22 * np.maximum(np.abs(low), np.abs(high)) + 2.0**-22 * (high - low) + 255 * 2.0**-149
    assert (np.abs(back - exact) <= 0.5 * step + rounding + 1e-8).all()
