"""Tables of FBGEMM's table-batched operator have its bits where they lie, and its operator ours.

Needs `pip install fbgemm-gpu-cpu==1.8.0` beside torch 2.13.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import qembag
from support.arrays import same_bits
from support.layouts import PAIRS_FIRST, bag_offsets, rows_of, spread

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fbgemm_gpu", reason="fbgemm_gpu is not installed (pip install fbgemm-gpu-cpu==1.8.0)")
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from qembag.interop import fbgemm
from qembag.interop import torch as interop

BITS_OF = {SparseType.INT8: 8, SparseType.INT4: 4, SparseType.INT2: 2}
FLOATS = {SparseType.FP32: "float32", SparseType.FP16: "float16"}
KINDS = [*BITS_OF, *FLOATS, SparseType.FP8]
NUM_ROWS = 25


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def operator_of(specs: list[tuple[Any, ...]], **options: Any) -> Any:
    """An operator of tables (name, rows, dim, type)."""
    options = {"bounds_check_mode": BoundsCheckMode.NONE, "output_dtype": SparseType.FP32} | options
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(*spec, EmbeddingLocation.HOST) for spec in specs], device="cpu", indices_dtype=torch.int64, **options
    )
    made.initialize_weights()
    return made


def fill(operator: Any, rng: np.random.Generator) -> None:
    """Any codes, scales, biases and floats; any bytes of padding and of FP8."""
    for (whole, _, _), (_, num_rows, dim, kind, _) in zip(
        operator.split_embedding_weights_with_scale_bias(0), operator.embedding_specs, strict=True
    ):
        rows = whole.numpy()
        rows[...] = rng.integers(0, 256, rows.shape, dtype=np.uint8)
        if kind in BITS_OF:
            filled = rows_of(rng, PAIRS_FIRST[BITS_OF[kind]], num_rows, dim)
        elif kind in FLOATS:
            filled = rng.normal(size=(num_rows, dim)).astype(FLOATS[kind]).view(np.uint8)
        else:
            filled = rows[:, :dim].copy()
        rows[:, : filled.shape[1]] = filled


def bags_of(rng: np.random.Generator, counts: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each feature, indices below its count, and offsets of four bags with the last end."""
    found = []
    for count in counts:
        ends = bag_offsets(rng, 4, 5)
        found.append((rng.integers(0, count, ends[-1]), ends))
    return found


def answers(operator: Any, bags: list[tuple[np.ndarray, np.ndarray]], weights: np.ndarray | None = None) -> np.ndarray:
    starts = np.cumsum([0] + [len(indices) for indices, _ in bags])
    ends = np.concatenate([start + own[:-1] for start, (_, own) in zip(starts, bags, strict=False)] + [starts[-1:]])
    return operator(
        torch.from_numpy(np.concatenate([indices for indices, _ in bags])),
        torch.from_numpy(ends),
        None if weights is None else torch.from_numpy(weights),
    ).numpy()


def ours(
    tables: list[Any], bags: list[tuple[np.ndarray, np.ndarray]], weights: np.ndarray | None = None, mode: str = "sum"
) -> np.ndarray:
    starts = np.cumsum([0] + [len(indices) for indices, _ in bags])
    parts = []
    for table, (indices, ends), start in zip(tables, bags, starts, strict=False):
        given = None if weights is None else weights[start : start + len(indices)]
        parts.append(
            qembag.embedding_bag(table, indices, ends, mode=mode, per_sample_weights=given, include_last_offset=True)
        )
    return np.concatenate(parts, axis=1)


def weights_of(rng: np.random.Generator, bags: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return rng.normal(size=sum(len(indices) for indices, _ in bags)).astype(np.float32)


SPECS = [(f"t{number}", NUM_ROWS + number, dim, kind) for number, (kind, dim) in enumerate(
    [(kind, dim) for dim in (4, 20, 64, 100) for kind in KINDS]
)]  # fmt: skip


@pytest.mark.parametrize("alignment", [1, 4, 16])
def test_sums_of_all_types_are_the_operator_s(alignment, rng):
    operator = operator_of(SPECS, row_alignment=alignment)
    fill(operator, rng)
    tables = fbgemm.from_module(operator)
    assert list(tables) == [spec[0] for spec in SPECS]
    for name, num_rows, dim, kind in SPECS:
        table = tables[name]
        assert table.shape == (num_rows, dim)
        if kind == SparseType.FP8:
            assert table.dtype == "float16"
        else:
            assert np.shares_memory(table.data, operator.weights_host.numpy())
    bags = bags_of(rng, [spec[1] for spec in SPECS])
    for weights in (None, weights_of(rng, bags)):
        same_bits(ours(list(tables.values()), bags, weights), answers(operator, bags, weights))


def test_means_of_codes_are_the_operator_s_and_of_floats_sums_times_the_reciprocal(rng):
    operator = operator_of(SPECS, pooling_mode=PoolingMode.MEAN)
    fill(operator, rng)
    tables = fbgemm.from_module(operator)
    bags = bags_of(rng, [spec[1] for spec in SPECS])
    weights = weights_of(rng, bags)
    theirs = answers(operator, bags, weights)
    columns = np.cumsum([0] + [spec[2] for spec in SPECS])
    means = ours(list(tables.values()), bags, weights, "mean")
    sums = ours(list(tables.values()), bags, weights)
    for (_, _, _, kind), (_, ends), start, stop in zip(SPECS, bags, columns[:-1], columns[1:], strict=True):
        counts = np.diff(ends).astype(np.float32)[:, None]
        reciprocals = np.divide(np.float32(1), counts, out=np.zeros_like(counts), where=counts > 0)
        expected = means[:, start:stop] if kind in BITS_OF else sums[:, start:stop] * reciprocals
        same_bits(expected, theirs[:, start:stop])


def test_single_rows_are_the_operator_s(rng):
    for kind in KINDS:
        operator = operator_of([("a", 9, 8, kind), ("b", 5, 8, kind)], pooling_mode=PoolingMode.NONE)
        fill(operator, rng)
        tables = fbgemm.from_module(operator)
        bags = bags_of(rng, [9, 5])
        rows = [qembag.embedding(table, indices) for table, (indices, _) in zip(tables.values(), bags, strict=True)]
        same_bits(np.concatenate(rows), answers(operator, bags))


@pytest.mark.parametrize(("exponent_bits", "bias", "dtype"), [(4, 7, "float16"), (3, 4, "float16"), (5, 15, "float32")])
def test_fp8_of_any_form_is_exact(exponent_bits, bias, dtype, rng):
    operator = operator_of([("t", 32, 8, SparseType.FP8)], fp8_exponent_bits=exponent_bits, fp8_exponent_bias=bias)
    operator.split_embedding_weights()[0][0].numpy().ravel()[:] = np.arange(256)
    table = fbgemm.from_module(operator)["t"]
    assert table.dtype == dtype
    bags = [(np.arange(32), np.arange(33))]
    same_bits(ours([table], bags), answers(operator, bags))


def test_what_the_operator_is_assigned_later_shows(rng):
    operator = operator_of([("t", 6, 8, SparseType.INT4)])
    table = fbgemm.from_module(operator)["t"]
    assert not table[:].any()
    source = qembag.quantize(rng.normal(size=(6, 8)).astype(np.float32), bits=4)
    operator.assign_embedding_weights([fbgemm.to_weights(source)])
    same_bits(table[:], source[:])
    del operator
    same_bits(table[:], source[:])


# ---- Features, names, pruning ------------------------------------------------------------------------------------------


def test_tables_that_features_share_come_once(rng):
    specs = [("a", 9, 8, SparseType.INT8), ("b", 7, 12, SparseType.INT4), ("c", 5, 4, SparseType.FP16)]
    features = [2, 0, 1, 0]
    operator = operator_of(specs, feature_table_map=features)
    fill(operator, rng)
    tables = fbgemm.from_module(operator)
    assert list(tables) == ["a", "b", "c"]
    bags = bags_of(rng, [specs[table][1] for table in features])
    same_bits(ours([tables["abc"[table]] for table in features], bags), answers(operator, bags))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["", ""], ["table.0", "table.1"]),
        (["a", "a"], ["a.0", "a.1"]),
        (["a", ""], ["a.0", "table.1"]),
        (["a.1", "a"], ["a.1", "a"]),
    ],
)
def test_names_that_do_not_tell_get_a_number(given, names):
    operator = operator_of([(name, 3, 4, SparseType.INT8) for name in given])
    assert list(fbgemm.from_module(operator)) == names


MAPPINGS = [[2, -1, 0, 1, -1, 8], None, [0, 1, -1], [-1, -1]]


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_pruned_tables_have_their_mapping(as_array, mean, rng):
    kinds = [SparseType.INT8, SparseType.INT4, SparseType.FP16, SparseType.INT2]
    specs = [(f"t{number}", 9, 8, kind) for number, kind in enumerate(kinds)]
    operator = operator_of(
        specs,
        index_remapping=[None if mapping is None else torch.tensor(mapping) for mapping in MAPPINGS],
        use_array_for_index_remapping=as_array,
        pooling_mode=PoolingMode.MEAN if mean else PoolingMode.SUM,
    )
    fill(operator, rng)
    tables = fbgemm.from_module(operator)
    assert (operator.index_remapping_hash_table_cpu is None) == as_array
    for table, mapping in zip(tables.values(), MAPPINGS, strict=True):
        found = table.compressed_indices_mapping
        assert (None if found is None else found.tolist()) == mapping
    bags = bags_of(rng, [len(mapping or range(9)) for mapping in MAPPINGS])
    weights = weights_of(rng, bags)
    theirs = answers(operator, bags, weights)
    expected = ours(list(tables.values()), bags, weights, "mean" if mean else "sum")
    is_float = np.repeat([kind in FLOATS for kind in kinds], 8) & mean
    same_bits(expected[:, ~is_float], theirs[:, ~is_float])


@pytest.mark.parametrize("as_array", [False, True])
def test_a_pruned_table_that_features_share_has_its_own_mapping(as_array):
    """FBGEMM's own lookups are wrong for all but the first feature of it."""
    mapping = torch.tensor([1, -1, 0], dtype=torch.int64)
    operator = operator_of(
        [("a", 2, 4, SparseType.INT8), ("b", 4, 4, SparseType.INT8)],
        feature_table_map=[1, 0, 1, 0],
        index_remapping=[mapping, torch.tensor([0, 3])],
        use_array_for_index_remapping=as_array,
    )
    found = [table.compressed_indices_mapping.tolist() for table in fbgemm.from_module(operator).values()]
    assert found == [[1, -1, 0], [0, 3]]


def test_a_mapping_without_its_row_is_refused():
    mapping = [torch.tensor([0, 5], dtype=torch.int64)]
    operator = operator_of([("a", 2, 4, SparseType.INT8)], index_remapping=mapping)
    with pytest.raises(IndexError, match=r"^table 'a': compressed_indices_mapping\[1\] is 5"):
        fbgemm.from_module(operator)
    operator.index_remappings_array = torch.tensor([0, 2**32])
    with pytest.raises(ValueError, match="must have an index_remapping of -1 and numbers of rows"):
        fbgemm.from_module(operator)


# ---- What is refused ---------------------------------------------------------------------------------------------------


def changed(**attributes: Any) -> Any:
    operator = operator_of([("a", 2, 4, SparseType.INT8)])
    for name, value in attributes.items():
        setattr(operator, name, value)
    return operator


REFUSED = {
    "another module": (lambda: torch.nn.EmbeddingBag(3, 4), TypeError, "must be fbgemm_gpu's IntNBit.* got torch.nn"),
    "nothing": (lambda: None, TypeError, "got builtins.NoneType"),
    "reversed": (lambda: changed(reverse_qparam=True), ValueError, "got reverse_qparam=True and 4 bytes"),
    "wide pairs": (lambda: changed(scale_bias_size_in_bytes=8), ValueError, "got reverse_qparam=False and 8 bytes"),
    "no weights": (lambda: changed(weight_initialized=False), ValueError, "module must have weights: assign them"),
    "a short blob": (
        lambda: changed(weights_host=torch.zeros(15, dtype=torch.uint8)), ValueError, "must lie within weights of 15"
    ),
    "a blob of floats": (lambda: changed(weights_host=torch.zeros(99)), TypeError, "must be a 1-D array of uint8"),
    "a GPU's": (lambda: changed(current_device=torch.device("cuda")), ValueError, "must be on the CPU, got one on dev"),
    "a GPU's pruning": (
        lambda: changed(index_remapping_hash_table=torch.zeros((32, 2), dtype=torch.int32)),
        ValueError,
        "must have its index_remapping as an array or on the CPU",
    ),
    "another type": (
        lambda: changed(embedding_specs=[("a", 2, 4, SparseType.BF16, None)]), ValueError, "bits must be .* got 'bf16'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_operator_on_the_cpu_is_refused(case):
    make, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        fbgemm.from_module(make())


def test_the_operator_of_virtual_tables_is_refused():
    """Its rows are in a store of its own."""
    from fbgemm_gpu.tbe.cache.kv_embedding_ops_inference import KVEmbeddingInference

    with pytest.raises(TypeError, match=r"got fbgemm_gpu.tbe.cache.kv_embedding_ops_inference.KVEmbeddingInference"):
        fbgemm.from_module(KVEmbeddingInference.__new__(KVEmbeddingInference))


def test_an_operator_in_a_model_is_found(rng):
    model = torch.nn.ModuleDict({"bags": operator_of([("a", 2, 4, SparseType.INT8), ("b", 3, 8, SparseType.INT4)])})
    assert list(interop.from_model(model)) == ["bags.a", "bags.b"]


# ---- Back --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 16])
def test_all_of_an_operator_s_tables_go_to_another(alignment, rng):
    specs = [spec for spec in SPECS if spec[3] != SparseType.FP8]
    operator = operator_of(specs, row_alignment=16)
    fill(operator, rng)
    tables = fbgemm.from_module(operator)
    other = operator_of(specs, row_alignment=alignment)
    other.assign_embedding_weights([fbgemm.to_weights(table) for table in tables.values()])
    bags = bags_of(rng, [spec[1] for spec in specs])
    weights = weights_of(rng, bags)
    same_bits(answers(other, bags, weights), answers(operator, bags, weights))


@pytest.mark.parametrize("layout", spread(24), ids=str)
def test_rows_in_any_layout_go_without_loss(layout, rng):
    pairs = np.round(rng.normal(size=(NUM_ROWS, 1, 2)), 2).astype(np.float16).astype(np.float32)
    groups = np.repeat(pairs, layout.num_groups(80), axis=1)
    codes = rng.integers(0, 2**layout.bits, (NUM_ROWS, 80))
    rows = layout.pack(codes, groups if layout.group_size else groups[:, 0], pad=255)
    table = qembag.QuantizedTable(rows, layout.bits, dim=80, **layout.keywords())
    kind = next(kind for kind, bits in BITS_OF.items() if bits == layout.bits)
    operator = operator_of([("t", NUM_ROWS, 80, kind)], weight_lists=[fbgemm.to_weights(table)])
    bags = bags_of(rng, [NUM_ROWS])
    weights = weights_of(rng, bags)
    same_bits(answers(operator, bags, weights), ours([table], bags, weights))


def test_a_pruned_table_goes_with_its_mapping(rng):
    table = qembag.quantize(rng.normal(size=(20, 8)).astype(np.float32), bits=4).prune(np.arange(20) % 3 > 0)
    operator = operator_of(
        [("t", table.num_rows, 8, SparseType.INT4)],
        weight_lists=[fbgemm.to_weights(table)],
        index_remapping=[torch.from_numpy(table.compressed_indices_mapping)],
    )
    bags = bags_of(rng, [20])
    same_bits(answers(operator, bags), ours([table], bags))


def test_what_would_be_lost_is_an_error_or_rounded(rng):
    values = rng.normal(size=(9, 8)).astype(np.float32)
    table = qembag.quantize(values)
    with pytest.raises(ValueError, match="FBGEMM's table-batched operator cannot hold this table exactly: scale_dtype"):
        fbgemm.to_weights(table)
    operator = operator_of([("t", 9, 8, SparseType.INT8)], weight_lists=[fbgemm.to_weights(table, exact=False)])
    back = fbgemm.from_module(operator)["t"]
    assert np.array_equal(back.codes(), table.codes())
    assert np.array_equal(back.scales, table.scales.astype(np.float16).astype(np.float32))
    odd = qembag.quantize(rng.normal(size=(9, 5)).astype(np.float32), bits=4)
    with pytest.raises(ValueError, match="operator would return 6 columns"):
        fbgemm.to_weights(odd)
    assert fbgemm.to_weights(odd, exact=False)[0].shape == (9, 3)


def test_floats_go_as_bytes_and_bfloat16_not_at_all(rng):
    for kind, sparse in (("float32", SparseType.FP32), ("float16", SparseType.FP16)):
        table = qembag.FloatTable(rng.normal(size=(9, 7)).astype(kind))
        operator = operator_of([("t", 9, 7, sparse)], weight_lists=[fbgemm.to_weights(table)])
        bags = bags_of(rng, [9])
        same_bits(answers(operator, bags), ours([table], bags))
    with pytest.raises(ValueError, match="table must be of codes, float32 or float16, got bfloat16"):
        fbgemm.to_weights(qembag.FloatTable(np.zeros((2, 3), np.uint16), dtype="bfloat16"))
    with pytest.raises(TypeError, match=r"table must be a QuantizedTable or a FloatTable, got a float64 array"):
        fbgemm.to_weights(np.eye(3))
