"""Collections of TorchRec's and FBGEMM's modules give their bits and order, and take a KeyedJaggedTensor as it is.

Needs fbgemm-gpu-cpu 1.8.0 and torchrec 1.9.2, which pip gets only with --no-deps, beside torch 2.13.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import qembag
from qembag import _batches
from support.arrays import same_bits
from support.layouts import PAIRS_FIRST, bag_offsets, rows_of

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fbgemm_gpu", reason="fbgemm_gpu is not installed (pip install fbgemm-gpu-cpu==1.8.0)")
    pytest.importorskip("torchrec", reason="no torchrec 1.9.2, which pip gets only with --no-deps")
    import torchrec.quant.embedding_modules as quantized
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from qembag.interop import fbgemm, torchrec

CPU = torch.device("cpu")
BITS_OF = {"int8": 8, "int4": 4, "int2": 2}
NUM_ROWS = 30
# Tables: features, pooling, type. Of two poolings in turns, which TorchRec's output has side by side; "f1" is looked up
# in two tables, and "t3" has three features.
TABLES = {
    "t0": (["f0"], "SUM", "INT8"),
    "t1": (["f1", "f2"], "MEAN", "INT4"),
    "t2": (["f1"], "SUM", "INT2"),
    "t3": (["f3", "f5", "f4"], "MEAN", "INT8"),
    "t4": (["f6"], "SUM", "FP16"),
}
KEYS = ["unused", "f4", "f6", "f1", "f0", "f3", "also unused", "f2", "f5"]


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def configs_of(kind: type, dims: int | None = None) -> list[Any]:
    made = []
    for number, (name, (features, pooling, data_type)) in enumerate(TABLES.items()):
        options = {"pooling": PoolingType[pooling]} if kind is EmbeddingBagConfig else {}
        made.append(
            kind(
                name=name,
                embedding_dim=dims or 16 * (number + 1),
                num_embeddings=NUM_ROWS,
                feature_names=features,
                data_type=DataType[data_type],
                **options,
            )
        )
    return made


def fill(operator: Any, rng: np.random.Generator) -> None:
    for (whole, _, _), (_, num_rows, dim, kind, _) in zip(
        operator.split_embedding_weights_with_scale_bias(0), operator.embedding_specs, strict=True
    ):
        bits = BITS_OF.get(kind.value)
        filled = (
            rng.normal(size=(num_rows, dim)).astype(f"f{int(kind.value[2:]) // 8}").view(np.uint8)
            if bits is None
            else rows_of(rng, PAIRS_FIRST[bits], num_rows, dim)
        )
        whole.numpy()[:, : filled.shape[1]] = filled


def jagged_of(rng: np.random.Generator, weighted: bool = False, batch: int = 5, index_type: Any = np.int64) -> Any:
    """Of more keys than features, in another order."""
    lengths = rng.integers(0, 5, len(KEYS) * batch)
    return KeyedJaggedTensor(
        keys=KEYS,
        values=torch.from_numpy(rng.integers(0, NUM_ROWS, lengths.sum()).astype(index_type)),
        lengths=torch.from_numpy(lengths.astype(index_type)),
        weights=torch.from_numpy(rng.normal(size=lengths.sum()).astype(np.float32)) if weighted else None,
    )


def is_float_mean(collection: Any, feature: str) -> bool:
    table = collection.tables[collection.features[feature]]
    return isinstance(table, qembag.FloatTable) and collection.modes[feature] == "mean"


# ---- TorchRec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("output", [torch.float32, torch.float16])
def test_bags_of_a_quantized_collection_are_its_own(rng, weighted, output):
    module = quantized.EmbeddingBagCollection(configs_of(EmbeddingBagConfig), weighted, CPU, output_dtype=output)
    for operator in module._emb_modules:
        fill(operator, rng)
    collection = torchrec.collection_from_module(module)
    assert isinstance(collection, qembag.EmbeddingBagCollection)
    assert list(collection.tables) == ["t0", "t2", "t4", "t1", "t3"]
    for index_type in (np.int64, np.int32):
        given = jagged_of(rng, weighted, index_type=index_type)
        theirs = module(given)
        assert list(collection.features) == theirs.keys()
        assert list(collection.features) == ["f0", "f1@t2", "f6", "f1@t1", "f2", "f3", "f5", "f4"]
        assert [collection.dims[name] for name in collection.features] == theirs.length_per_key()
        same_bits(collection(given), theirs.values().numpy())


def test_bags_of_a_collection_of_floats_are_its_own(rng):
    configs = configs_of(EmbeddingBagConfig)
    for config in configs:
        config.data_type = DataType.FP32
    for weighted in (False, True):
        module = EmbeddingBagCollection(
            tables=[config for config in configs if not weighted or config.pooling == PoolingType.SUM],
            is_weighted=weighted,
        )
        collection = torchrec.collection_from_module(module)
        given = jagged_of(rng, weighted)
        theirs = module(given)
        assert list(collection.features) == theirs.keys()
        same_bits(collection(given), theirs.values().detach().numpy())
        assert np.shares_memory(collection.tables["t0"].data, module.embedding_bags.t0.weight.detach().numpy())


@pytest.mark.parametrize("is_float", [False, True])
def test_rows_of_a_collection_are_its_own(rng, is_float):
    configs = configs_of(EmbeddingConfig, 20)
    if is_float:
        for config in configs:
            config.data_type = DataType.FP32
        module = EmbeddingCollection(tables=configs)
    else:
        module = quantized.EmbeddingCollection(configs, CPU)
        for operator in module._emb_modules:
            fill(operator, rng)
    collection = torchrec.collection_from_module(module)
    assert isinstance(collection, qembag.EmbeddingCollection)
    given = jagged_of(rng)
    theirs, found = module(given), collection(given)
    if is_float:
        assert list(found) == list(theirs)
    for name, vectors in found.items():
        # TorchRec has "f1" once, where its tables are of different types: of the table that comes last.
        if name in theirs or name == "f1@t2":
            same_bits(vectors, theirs[name if name in theirs else "f1"].values().detach().numpy())
    assert {"f1@t1", "f1@t2"} <= found.keys()


def test_outputs_of_half_floats_are_those_of_the_module_before_it_rounds_them(rng):
    config = EmbeddingBagConfig(
        name="t", embedding_dim=8, num_embeddings=NUM_ROWS, feature_names=["f0"], data_type=DataType.FP16
    )
    module = EmbeddingBagCollection(tables=[config])
    given = jagged_of(rng)
    found = torchrec.collection_from_module(module)(given)
    same_bits(found.astype(np.float16).astype(np.float32), module(given).values().detach().numpy())


def test_a_table_with_a_feature_twice_and_subclasses_are_refused():
    config = EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=9, feature_names=["f", "f"])
    with pytest.raises(ValueError, match="each feature of a table once, got 'f@t' twice"):
        torchrec.collection_from_module(EmbeddingBagCollection(tables=[config]))

    class Other(EmbeddingBagCollection):
        pass

    config.feature_names = ["f"]
    with pytest.raises(TypeError, match=r"must not be of a subclass, .* got .*Other"):
        torchrec.collection_from_module(Other(tables=[config]))
    module = quantized.EmbeddingBagCollection([config], False, CPU)
    module._output_dtype = torch.quint8
    with pytest.raises(ValueError, match="must have outputs of float32, float16, bfloat16, got quint8"):
        torchrec.collection_from_module(module)
    with pytest.raises(TypeError, match="module must be torchrec's"):
        torchrec.collection_from_module(torch.nn.EmbeddingBag(3, 4))


def test_a_collection_of_torchrec_s_goes_into_a_file(rng, tmp_path):
    module = quantized.EmbeddingBagCollection(configs_of(EmbeddingBagConfig), False, CPU)
    for operator in module._emb_modules:
        fill(operator, rng)
    torchrec.collection_from_module(module).save(tmp_path / "ebc.safetensors")
    given = jagged_of(rng)
    opened = qembag.EmbeddingBagCollection.from_file(tmp_path / "ebc.safetensors")
    same_bits(opened(given), module(given).values().numpy())


# ---- A KeyedJaggedTensor ---------------------------------------------------------------------------------------------


def test_bags_are_the_tensors_own_memory(rng):
    for weighted in (False, True):
        given = jagged_of(rng, weighted)
        found = _batches._of_jagged(["f1@t1", "f0", "f1@t2", "f8"], given)
        assert list(found) == ["f1@t1", "f0", "f1@t2"]
        for feature, [some] in found.items():
            assert some.indices.ctypes.data == given.values().data_ptr()
            assert np.shares_memory(some.offsets, given.offsets().numpy())
            assert (some.weights is not None) == weighted
            if weighted:
                assert some.weights.ctypes.data == given.weights().data_ptr()
            same_bits(some.indices[some.offsets[0] : some.offsets[-1]], given[feature[:2]].values().numpy())
            assert some.num_bags == 5


def test_a_batch_takes_no_arguments_beside_it_but_out(rng):
    collection = qembag.EmbeddingBagCollection({name: np.ones((NUM_ROWS, 4), np.float32) for name in ("f1", "f3")})
    given = jagged_of(rng, weighted=True)
    out = {name: np.empty((5, 4), np.float32) for name in ("f1", "f3")}
    assert collection(given, out=out) is out
    same_bits(np.concatenate(list(out.values()), axis=1), collection(given))
    for options in ({"per_sample_weights": np.ones(3)}, {"offsets": [0, 1]}, {"lengths": [1]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be None"):
            collection(given, **options)
    bad = KeyedJaggedTensor(["f3", "f1"], torch.tensor([1, 2, NUM_ROWS]), lengths=torch.tensor([1, 2]))
    with pytest.raises(IndexError, match=rf"indices\['f1'\]\[2\] is {NUM_ROWS} "):
        collection(bad)


@pytest.mark.parametrize("kind", [qembag.EmbeddingBagCollection, qembag.EmbeddingCollection])
def test_an_empty_batch_has_no_bags(kind):
    given = KeyedJaggedTensor(
        ["a", "b"], torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64), stride=0
    )
    found = kind({"b": np.ones((3, 4), np.float32)})(given)
    assert np.shape(found["b"] if kind is qembag.EmbeddingCollection else found) == (0, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: KeyedJaggedTensor(
                ["a", "b"], torch.arange(4), lengths=torch.tensor([1, 1, 2]), stride_per_key_per_rank=[[2], [1]]
            ),
            "indices must have one batch size, got a KeyedJaggedTensor with one a key",
        ),
        (
            lambda: KeyedJaggedTensor(["a", "a"], torch.arange(4), lengths=torch.tensor([1, 3])),
            "indices must have each key once",
        ),
        (
            lambda: KeyedJaggedTensor(["b"], torch.arange(2), lengths=torch.tensor([2])),
            "indices must hold each feature, got none for 'a'",
        ),
    ],
)
@pytest.mark.parametrize("kind", [qembag.EmbeddingBagCollection, qembag.EmbeddingCollection])
def test_batches_that_cannot_be_taken_are_refused(make, words, kind):
    collection = kind({"a": np.ones((9, 4), np.float32)})
    with pytest.raises(ValueError, match=words):
        collection(make())


# ---- FBGEMM ----------------------------------------------------------------------------------------------------------

SPECS = [("a", 20, 16, "int8"), ("b", 30, 64, "int4"), ("c", 25, 128, "int2"), ("d", 10, 24, "fp16")]


def operator_of(specs: list[tuple[Any, ...]], rng: np.random.Generator, **options: Any) -> Any:
    options = {"bounds_check_mode": BoundsCheckMode.NONE, "output_dtype": SparseType.FP32} | options
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(name, count, dim, SparseType(kind), EmbeddingLocation.HOST) for name, count, dim, kind in specs],
        device="cpu",
        indices_dtype=torch.int64,
        **options,
    )
    made.initialize_weights()
    fill(made, rng)
    return made


def batch_of(rng: np.random.Generator, counts: list[int], batch: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Indices of each feature, one after the other, and offsets."""
    ends = bag_offsets(rng, batch * len(counts), 5)
    indices = np.concatenate(
        [rng.integers(0, count, ends[(k + 1) * batch] - ends[k * batch]) for k, count in enumerate(counts)]
    )
    return indices, ends


@pytest.mark.parametrize("pooling", ["SUM", "MEAN"])
@pytest.mark.parametrize("output", ["fp32", "fp16"])
@pytest.mark.parametrize("places", [None, [0, 0, 1, 2, 2, 2, 3], [3, 1, 0, 2]])
def test_an_operator_s_arguments_and_bits_are_the_collection_s(rng, pooling, output, places):
    operator = operator_of(
        SPECS, rng, pooling_mode=PoolingMode[pooling], output_dtype=SparseType(output), feature_table_map=places
    )
    collection = fbgemm.collection_from_module(operator)
    assert list(collection.tables) == list("abcd")
    tables = places or [0, 1, 2, 3]
    named = ["abcd"[table] for table in tables]
    assert list(collection.features) == (named if len(tables) == 4 else [str(number) for number in range(len(tables))])
    assert list(collection.features.values()) == named
    indices, ends = batch_of(rng, [SPECS[table][1] for table in tables])
    for weights in (None, rng.normal(size=len(indices)).astype(np.float32)):
        theirs = operator(
            torch.from_numpy(indices),
            torch.from_numpy(ends),
            None if weights is None else torch.from_numpy(weights),
        ).numpy()
        ours = collection(indices, ends, per_sample_weights=weights)
        assert ours.dtype == theirs.dtype
        for feature, columns in collection.columns.items():
            if is_float_mean(collection, feature):
                np.testing.assert_allclose(
                    ours[:, columns], theirs[:, columns], rtol=2e-3 if output == "fp16" else 1e-6
                )
            else:
                same_bits(ours[:, columns], theirs[:, columns])


def test_an_operator_without_pooling_is_a_collection_of_rows(rng):
    operator = operator_of(
        [("a", 20, 32, "int8"), ("b", 30, 32, "int4")], rng, pooling_mode=PoolingMode.NONE, feature_table_map=[1, 0, 1]
    )
    collection = fbgemm.collection_from_module(operator, ["x", "y", "z"])
    assert isinstance(collection, qembag.EmbeddingCollection)
    assert collection.features == {"x": "b", "y": "a", "z": "b"}
    indices, ends = batch_of(rng, [30, 20, 30])
    theirs = operator(torch.from_numpy(indices), torch.from_numpy(ends)).numpy()
    same_bits(np.concatenate(list(collection(indices, ends).values())), theirs)


def test_pruned_operators_are_pruned_collections(rng):
    remapped = np.full(50, -1, np.int32)
    remapped[rng.permutation(50)[:20]] = np.arange(20)
    for use_array in (True, False):
        operator = operator_of(
            SPECS[:2],
            rng,
            pooling_mode=PoolingMode.MEAN,
            index_remapping=[torch.from_numpy(remapped), None],
            use_array_for_index_remapping=use_array,
        )
        collection = fbgemm.collection_from_module(operator)
        assert collection.tables["a"].num_embeddings == 50
        indices, ends = batch_of(rng, [50, 30])
        same_bits(collection(indices, ends), operator(torch.from_numpy(indices), torch.from_numpy(ends)).numpy())


def test_operators_with_outputs_of_codes_and_wrong_names_are_refused(rng):
    operator = operator_of(SPECS[:1], rng, output_dtype=SparseType.INT8)
    with pytest.raises(ValueError, match=r"output_dtype of SparseType\.FP32, FP16 or BF16, got FBGEMM's number 2"):
        fbgemm.collection_from_module(operator)
    operator = operator_of(SPECS[:2], rng, feature_table_map=[0, 0, 1])
    for names in (["x"], ["x", "y", "x"]):
        with pytest.raises(ValueError, match="features must be 3 different names"):
            fbgemm.collection_from_module(operator, names)
    with pytest.raises(TypeError, match="module must be fbgemm_gpu's"):
        fbgemm.collection_from_module(torch.nn.EmbeddingBag(3, 4))
