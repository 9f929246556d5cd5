"""`compare`: each number against a slow computation, whatever the rows, the bags and the sample."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

import qembag
from qembag.verdict import compare as compare_module
from qembag.verdict.measures import EDGES
from support.floats import stored_as

NUM_ROWS, DIM = 60, 40
WAYS = {"bits": (8, 4, 2), "methods": ("minmax", "greedy", "lsq"), "group_sizes": (None, 16)}
ONE = {"bits": 4, "methods": "minmax", "group_sizes": None}


@pytest.fixture
def rows(rng):
    return rng.standard_normal((NUM_ROWS, DIM), dtype=np.float32)


@pytest.fixture
def bags(rng):
    """Some of them empty."""
    offsets = np.array([0, 3, 3, 10, 24, 24])
    return rng.integers(0, NUM_ROWS, 40), offsets, rng.standard_normal(40).astype(np.float32)


def cosine(a, b):
    a, b = [float(x) for x in a], [float(x) for x in b]
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        math.fsum(x * x for x in a) * math.fsum(y * y for y in b)
    )


def sums(values, indices, offsets, weights):
    ends = [*offsets[1:], len(indices)]
    return [
        sum((values[i].astype(np.float64) * w for i, w in zip(indices[a:b], weights[a:b], strict=True)), np.zeros(DIM))
        for a, b in zip(offsets, ends, strict=True)
    ]


def same(found, expected, tolerance):
    """Cosines as they are summed up, of a list."""
    assert found.num_vectors == len(expected) == sum(found.histogram)
    assert found.worst == pytest.approx(min(expected), abs=tolerance)
    assert found.mean == pytest.approx(math.fsum(expected) / len(expected), abs=tolerance)
    # A percentile by its definition: linear between the two nearest of the sorted ones.
    place = (len(expected) - 1) / 100
    low, high = sorted(expected)[int(place)], sorted(expected)[min(int(place) + 1, len(expected) - 1)]
    assert found.first_percentile == pytest.approx(low + (high - low) * (place - int(place)), abs=tolerance)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_each_variant_is_what_a_slow_computation_gives(rows, bags):
    report = qembag.compare(rows, **WAYS, bags=bags)
    expected = [
        (bits, group, method)
        for bits in WAYS["bits"]
        for group in WAYS["group_sizes"]
        for method in WAYS["methods"]
        if (bits, method) != (8, "greedy")
    ]
    assert [(one.bits, one.group_size, one.method) for one in report.variants] == expected
    for variant in report.variants:
        table = qembag.quantize(rows, variant.bits, method=variant.method, group_size=variant.group_size)
        values = table.dequantize()
        errors = math.fsum(((values.astype(np.float64) - rows) ** 2).ravel().tolist())
        squares = math.fsum((rows.astype(np.float64) ** 2).ravel().tolist())
        assert variant.relative_squared_error == pytest.approx(errors / squares, rel=1e-12)
        assert variant.relative_error == pytest.approx(math.sqrt(errors / squares), rel=1e-12)
        cosines = [cosine(a, b) for a, b in zip(rows, values, strict=True)]
        same(variant.rows, cosines, 1e-13)
        pairs = zip(sums(rows, *bags), sums(values, *bags), strict=True)
        same(variant.bags, [cosine(a, b) for a, b in pairs if a.any()], 1e-6)
        worst = sorted(range(NUM_ROWS), key=lambda row: cosines[row])[:10]
        assert [row for row, _ in variant.worst_rows] == worst
        assert [found for _, found in variant.worst_rows] == pytest.approx([cosines[row] for row in worst], abs=1e-13)
        assert (variant.row_bytes, variant.nbytes) == (table.row_bytes, table.nbytes)
        assert variant.times_smaller == variant.times_smaller_than_float32 == rows.nbytes / table.nbytes
        assert variant.ns_per_row > 0
    assert (report.num_bags, report.num_indices, report.own_bags) == (6, 40, True)


def test_a_histogram_counts_each_cosine_once(rows):
    for variant in qembag.compare(rows, **WAYS).variants:
        assert sum(variant.rows.histogram) == NUM_ROWS
        used = np.flatnonzero(variant.rows.histogram)
        assert EDGES[used[-1]] <= 1 - variant.rows.worst <= EDGES[used[-1] + 1]


def test_made_bags_are_repeated_by_their_seed_alone(rows):
    def judged(seed):
        report = qembag.compare(rows, **ONE, seed=seed)
        assert (report.num_bags, report.own_bags, report.seed) == (2000, False, seed)
        assert report.num_indices / report.num_bags == pytest.approx(50, abs=3)
        return report.variants[0].bags

    assert judged(1) == judged(1) != judged(2)


@pytest.mark.parametrize("elements", [1, 7 * DIM, 1 << 30])
def test_the_size_of_blocks_changes_nothing(rows, bags, elements, monkeypatch):
    def judged():
        return [(one.relative_error, one.rows, one.bags) for one in qembag.compare(rows, **WAYS, bags=bags).variants]

    before = judged()
    monkeypatch.setattr(compare_module, "ELEMENTS_AT_ONCE", elements)
    assert judged() == before


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(rows, bags, threads):
    one, many = (qembag.compare(rows, **WAYS, bags=bags, num_threads=number) for number in (1, threads))
    assert [part.bags for part in one.variants] == [part.bags for part in many.variants]


def test_zeros_have_no_direction():
    """Their cosine is left out; where only the quantized vector is zero, it is 0."""
    rows = np.zeros((3, 16), np.float32)
    rows[1] = 1e-30  # which float16 scales and biases hold as 0
    rows[2] = np.arange(16)
    bags = (np.array([0, 0, 1, 2]), np.array([0, 2, 3, 4, 4]))
    (variant,) = qembag.compare(rows, **ONE, bags=bags).variants
    for found in (variant.rows, variant.bags):
        assert (found.num_vectors, found.worst) == (2, 0)
    assert variant.worst_rows[0] == (1, 0)
    assert [row for row, _ in variant.worst_rows] == [1, 2]


def test_a_table_of_zeros_is_exact():
    (variant,) = qembag.compare(np.zeros((4, 16), np.float32), **ONE).variants
    assert (variant.relative_error, variant.rows.num_vectors, variant.worst_rows) == (0, 0, ())
    assert math.isnan(variant.bags.worst)


@pytest.mark.filterwarnings("error")
def test_sums_that_overflow_are_left_out_without_a_warning():
    rows = np.full((2, 16), 3e38, np.float32)
    rows[1] = np.arange(16)
    bags = (np.array([0, 0, 1]), np.array([0, 2]))
    (variant,) = qembag.compare(rows, bits=8, methods="minmax", group_sizes=None, bags=bags).variants
    assert variant.bags.num_vectors == 1
    assert variant.bags.worst > 0.999


# ---- Which variants --------------------------------------------------------------------------------------------------


def labels(report):
    return [variant.label for variant in report.variants]


def test_what_is_the_same_is_there_once(rows):
    report = qembag.compare(rows, bits=(4, 4), methods=("lsq", "lsq"), group_sizes=(None, 16, 48, 64, 16))
    assert labels(report) == ["4 bits, lsq", "4 bits in groups of 16, lsq"]


def test_one_of_a_kind_needs_no_sequence(rows):
    assert labels(qembag.compare(rows, bits=2, methods="lsq", group_sizes=16)) == ["2 bits in groups of 16, lsq"]


def test_greedy_is_left_out_at_8_bits(rows):
    assert labels(qembag.compare(rows, bits=(8, 4), methods="greedy", group_sizes=None)) == ["4 bits, greedy"]
    with pytest.raises(ValueError, match=r"^methods must hold another one than 'greedy'"):
        qembag.compare(rows, bits=8, methods="greedy")


def test_variants_of_a_layout_share_their_time(rows):
    times = {(one.bits, one.group_size): set() for one in qembag.compare(rows, **WAYS).variants}
    for one in qembag.compare(rows, **WAYS).variants:
        times[one.bits, one.group_size].add(one.ns_per_row)
    assert {len(found) for found in times.values()} == {1}


# ---- Samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_of_so_many_rows_and_named_by_their_numbers(rows):
    report = qembag.compare(rows, **ONE, sample=12)
    assert (report.num_rows_quantized, report.num_embeddings) == (12, NUM_ROWS)
    values = qembag.quantize(rows, 4).dequantize()
    for row, found in report.variants[0].worst_rows:
        assert found == pytest.approx(cosine(rows[row], values[row]), abs=1e-13)
    assert "12 of them, a random sample" in str(report)
    assert qembag.compare(rows, **ONE, sample=10**30).num_rows_quantized == NUM_ROWS
    chosen = {
        tuple(row for row, _ in qembag.compare(rows, **ONE, sample=3, seed=s).variants[0].worst_rows) for s in range(9)
    }
    assert len(chosen) > 5


def test_a_sample_has_no_row_twice_and_is_sorted(rows, rng):
    source = compare_module.source_of(rows, None, None)
    for sample in (1, 30, NUM_ROWS - 1):
        numbers = compare_module.sampled(source, sample, None, rng)
        assert len(numbers) == sample
        assert (np.diff(numbers) > 0).all()


def test_bytes_are_those_of_the_whole_table(rows):
    assert qembag.compare(rows, **ONE, sample=3).variants[0].nbytes == qembag.quantize(rows, 4).nbytes


def test_rows_of_given_bags_are_in_the_sample(rows, bags):
    """So that their sums are those without a sample."""
    whole, some = (qembag.compare(rows, **WAYS, bags=bags, sample=sample) for sample in (None, 1))
    assert len(np.unique(bags[0])) <= some.num_rows_quantized <= len(np.unique(bags[0])) + 1
    assert [one.bags for one in whole.variants] == [one.bags for one in some.variants]


def test_without_a_sample_rows_and_elements_are_limited(rows, monkeypatch):
    monkeypatch.setattr(compare_module, "MAX_ROWS", 50)
    assert qembag.compare(rows, **ONE).num_rows_quantized == 50
    monkeypatch.setattr(compare_module, "MAX_ELEMENTS", 10 * DIM + 1)
    assert qembag.compare(rows, **ONE).num_rows_quantized == 10
    assert qembag.compare(rows, **ONE, sample=NUM_ROWS).num_rows_quantized == NUM_ROWS


def test_memory_is_bounded():
    rows = np.random.default_rng(0).standard_normal((100_000, 64), dtype=np.float32)
    qembag.compare(rows[:10])
    tracemalloc.start()
    try:
        qembag.compare(rows, bits=(4, 2), methods=("minmax", "lsq"), group_sizes=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    tables = 100_000 * (36 + 36 + 20)  # one of each layout, and the one that is judged
    a_row = 100_000 * 8 * 15  # its number, and its cosines of each variant
    assert peak < tables + a_row + 20e6


# ---- Bags ------------------------------------------------------------------------------------------------------------


def test_bags_are_taken_in_each_form(rows, rng):
    indices = rng.integers(0, NUM_ROWS, (5, 4))
    flat = (indices.ravel(), np.arange(0, 20, 4))
    given = [
        indices,
        indices.tolist(),
        flat,
        (flat[0].tolist(), flat[1].tolist(), None),
        (indices, None, np.ones((5, 4), np.float32)),
        # Indices before the first bag are no bag's.
        (np.append(np.full(3, -7), flat[0]), flat[1] + 3),
        (np.append(np.full(3, 10**9), flat[0]), flat[1] + 3, np.ones(23)),
    ]
    found = [qembag.compare(rows, **WAYS, bags=bags) for bags in given]
    assert len({tuple(one.bags for one in report.variants) for report in found}) == 1
    assert {(report.num_bags, report.num_indices) for report in found} == {(5, 20)}


@pytest.mark.parametrize(
    ("bags", "error", "message"),
    [
        ((np.array([1, 60]), np.array([0])), IndexError, r"bags: indices\[1\] is 60 .*table of 60 rows"),
        ((np.array([1, 2]), np.array([0, 3])), ValueError, r"bags: offsets\[1\] is 3"),
        ((np.array([1, 2]),), ValueError, r"bags must be .* got a tuple of 1"),
        ((np.array([1, 2]), np.array([0]), np.ones(3)), ValueError, "bags: per_sample_weights must have the shape"),
        (np.array([1, 2]), ValueError, "bags: offsets or lengths must be given"),
        (np.array([[1.5]]), TypeError, "bags: indices must be an array of integers"),
        (np.zeros((3, 0), int), ValueError, "bags must hold an index at least, got none"),
        ((np.array([1, 2]), np.array([], int)), ValueError, "bags must hold an index at least, got none"),
    ],
)
def test_wrong_bags_are_refused(rows, bags, error, message):
    with pytest.raises(error, match=f"^{message}"):
        qembag.compare(rows, **ONE, bags=bags)


# ---- Sources ---------------------------------------------------------------------------------------------------------


def judged(report):
    return [(one.relative_error, one.rows, one.bags, one.worst_rows) for one in report.variants]


def test_each_kind_of_floats_is_judged_as_its_float32_values(rows):
    halves = rows.astype(np.float16)
    values = halves.astype(np.float32)
    sources = {
        "float16": (halves, 2),
        "float64": (values.astype(np.float64), 8),
        "a list": (values.tolist(), 4),
        "by columns": (np.asfortranarray(values), 4),
        "a table": (qembag.FloatTable(halves), 2),
        "a table of float32": (qembag.FloatTable(values), 4),
    }
    expected = qembag.compare(values, **WAYS)
    for name, (source, itemsize) in sources.items():
        report = qembag.compare(source, **WAYS)
        assert judged(report) == judged(expected), name
        assert report.nbytes == NUM_ROWS * DIM * itemsize, name
        assert report.nbytes_float32 == values.nbytes, name
        for one in report.variants:
            assert one.times_smaller == report.nbytes / one.nbytes
            assert one.times_smaller_than_float32 == report.nbytes_float32 / one.nbytes


def test_bfloat16_is_judged_too(rows):
    table = qembag.FloatTable(stored_as(rows, "bfloat16"), dtype="bfloat16")
    report = qembag.compare(table, **WAYS)
    assert judged(report) == judged(qembag.compare(table.dequantize(), **WAYS))
    assert (report.dtype, report.nbytes) == ("bfloat16", NUM_ROWS * DIM * 2)


def test_a_quantized_table_is_quantized_again(rows):
    table = qembag.quantize(rows)
    report = qembag.compare(table, **ONE)
    assert judged(report) == judged(qembag.compare(table.dequantize(), **ONE))
    assert (report.dtype, report.nbytes, report.nbytes_float32) == ("8-bit codes", table.nbytes, rows.nbytes)
    assert report.variants[0].times_smaller == table.nbytes / qembag.quantize(rows, 4).nbytes


def test_of_a_pruned_table_the_rows_that_are_there_are_judged(rows):
    keep = np.arange(NUM_ROWS) % 3 > 0
    pruned = qembag.FloatTable(rows).prune(keep)
    report = qembag.compare(pruned, **WAYS)
    assert (report.num_rows_quantized, report.num_embeddings) == (keep.sum(), NUM_ROWS)
    plain = qembag.compare(rows[keep], **WAYS)
    assert [one.rows for one in report.variants] == [one.rows for one in plain.variants]
    for one in report.variants:
        table = qembag.quantize(rows, one.bits, method=one.method, group_size=one.group_size)
        assert one.nbytes == table.prune(keep).nbytes
        assert all(keep[row] for row, _ in one.worst_rows)
    # A pruned row adds nothing to a bag.
    bags = np.arange(NUM_ROWS).reshape(-1, 3)
    with_zeros = qembag.compare(np.where(keep[:, None], rows, 0), **WAYS, bags=bags)
    found = qembag.compare(pruned, **WAYS, bags=bags)
    assert [one.bags for one in found.variants] == [one.bags for one in with_zeros.variants]


def test_files_are_judged_as_what_they_hold(rows, tmp_path, bags):
    np.save(tmp_path / "a table.npy", rows.astype(np.float16))
    expected = qembag.compare(rows.astype(np.float16), **WAYS, bags=bags, sample=9)
    report = qembag.compare(tmp_path / "a table.npy", **WAYS, bags=bags, sample=9)
    assert judged(report) == judged(expected)
    assert (report.name, report.nbytes, report.dtype) == ("a table.npy", expected.nbytes, "float16")
    qembag.save_tables(tmp_path / "model.safetensors", {"items": qembag.FloatTable(rows), "users": rows[:7]})
    report = qembag.compare(str(tmp_path / "model.safetensors"), **WAYS, tensor="items", bags=bags)
    assert judged(report) == judged(qembag.compare(rows, **WAYS, bags=bags))
    assert report.name == "model.safetensors, items"
    with pytest.raises(ValueError, match="users"):
        qembag.compare(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        qembag.compare(tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"^weights must be a .npy"):
        qembag.compare(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros((0, 4), np.float32)}, "weights must have a row at least, got none"),
        ({"weights": np.zeros((4, 0), np.float32)}, "weights must have 2 dimensions"),
        ({"weights": np.zeros(4, np.float32)}, "weights must have 2 dimensions"),
        ({"weights": np.zeros((4, 4), np.int32)}, "weights must be an array of float32"),
        ({"bits": (8, 3)}, "bits must be 8, 4 or 2, got 3"),
        ({"bits": ()}, "bits must hold one at least"),
        ({"methods": ("minmax", "best")}, "methods: method must be .*, got 'best'"),
        ({"group_sizes": (None, 17)}, "group_sizes: group_size must be"),
        ({"sample": 0}, "sample must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"tensor": "items"}, "tensor must be None for what is no file"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"name": 7}, "name must be a string, got int 7"),
    ],
)
def test_wrong_arguments_are_refused(rows, change, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        qembag.compare(**{"weights": rows, **ONE, **change})


def test_a_table_without_a_row_left_is_refused(rows):
    with pytest.raises(ValueError, match=r"^weights must have a row at least, got none that is not pruned"):
        qembag.compare(qembag.FloatTable(rows).prune([]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -7e4])
@pytest.mark.parametrize("elements", [1 << 17, 2 * DIM])
def test_a_row_that_cannot_be_quantized_is_named_by_its_number(rows, value, elements, monkeypatch):
    """Also in a sample. At 4 bits -70,000 is beyond the float16 of a bias."""
    monkeypatch.setattr(compare_module, "ELEMENTS_AT_ONCE", elements)
    rows[41, 5] = value
    for more in ({}, {"sample": 5, "bags": np.array([[41, 50]])}):
        with pytest.raises(ValueError, match=r"^weights\[41\] must "):
            qembag.compare(rows, **ONE, **more)
    pruned = qembag.FloatTable(rows).prune(np.arange(30, NUM_ROWS))
    with pytest.raises(ValueError, match=r"^weights\[41\] must "):
        qembag.compare(pruned, **ONE)


# ---- Progress --------------------------------------------------------------------------------------------------------


def test_progress_counts_the_rows_of_each_variant(rows):
    calls = []
    qembag.compare(rows, bits=(8, 4), methods="lsq", group_sizes=None, progress=lambda *done: calls.append(done))
    assert calls == [(NUM_ROWS, 2 * NUM_ROWS, rows.nbytes), (2 * NUM_ROWS, 2 * NUM_ROWS, 2 * rows.nbytes)]


def test_what_progress_raises_passes_through(rows):
    def stop(*done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qembag.compare(rows, **ONE, progress=stop)
