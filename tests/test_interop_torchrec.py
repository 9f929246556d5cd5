"""Tables of TorchRec's collections have their bits where they lie, and collections ours.

Needs fbgemm-gpu-cpu 1.8.0 and torchrec 1.9.2, which pip gets only with --no-deps, beside torch 2.13.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import qembag
from support.arrays import same_bits
from support.layouts import PAIRS_FIRST, bag_offsets, rows_of

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fbgemm_gpu", reason="fbgemm_gpu is not installed (pip install fbgemm-gpu-cpu==1.8.0)")
    pytest.importorskip("torchrec", reason="no torchrec 1.9.2, which pip gets only with --no-deps")
    import torchrec.quant.embedding_modules as quantized
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from qembag.interop import torch as interop
    from qembag.interop import torchrec

TYPES = {8: DataType.INT8, 4: DataType.INT4, 2: DataType.INT2, 16: DataType.FP16, 32: DataType.FP32}
CPU = torch.device("cpu")
BITS = [*TYPES, "mixed"]
# Each of its own dim; in the order of TorchRec, which puts those of one pooling side by side.
DIMS = (8, 20, 64, 100)


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bits_of(bits: Any, number: int) -> int:
    return [*TYPES][number] if bits == "mixed" else bits


def bags(bits: Any, split: bool = False, *, weighted: bool = False, alignment: int = 16, **options: Any) -> Any:
    """A quantized collection of bags: its tables sum and average in turn."""
    tables = [
        EmbeddingBagConfig(
            name=f"t{number}",
            embedding_dim=dim,
            num_embeddings=20 + number,
            feature_names=[f"f{number}"],
            pooling=PoolingType.MEAN if number % 2 else PoolingType.SUM,
            data_type=TYPES[bits_of(bits, number)],
        )
        for number, dim in enumerate(DIMS)
    ]
    return quantized.EmbeddingBagCollection(
        tables, weighted, CPU, quant_state_dict_split_scale_bias=split, row_alignment=alignment, **options
    )


def rows(bits: Any, split: bool = False, *, alignment: int = 16) -> Any:
    """A quantized collection of single rows, which has one dim."""
    tables = [
        EmbeddingConfig(
            name=f"t{number}", embedding_dim=20, num_embeddings=20 + number, feature_names=[f"f{number}"],
            data_type=TYPES[bits_of(bits, number)],
        )
        for number in range(4)
    ]  # fmt: skip
    return quantized.EmbeddingCollection(tables, CPU, quant_state_dict_split_scale_bias=split, row_alignment=alignment)


def fill(collection: Any, rng: np.random.Generator) -> None:
    for operator in collection._emb_modules:
        whole = operator.split_embedding_weights_with_scale_bias(0)
        for (tensor, _, _), (_, num_rows, dim, kind, _) in zip(whole, operator.embedding_specs, strict=True):
            bits = {"int8": 8, "int4": 4, "int2": 2}.get(kind.value)
            filled = (
                rng.normal(size=(num_rows, dim)).astype(f"f{int(kind.value[2:]) // 8}").view(np.uint8)
                if bits is None
                else rows_of(rng, PAIRS_FIRST[bits], num_rows, dim)
            )
            tensor.numpy()[:, : filled.shape[1]] = filled


def features(rng: np.random.Generator, weighted: bool = False) -> tuple[Any, list[tuple[np.ndarray, ...]]]:
    given = []
    for number in range(4):
        ends = bag_offsets(rng, 5, 6)
        indices = rng.integers(0, 20 + number, ends[-1])
        given.append((indices, ends, rng.normal(size=len(indices)).astype(np.float32)))
    values, weights = (np.concatenate([parts[place] for parts in given]) for place in (0, 2))
    jagged = KeyedJaggedTensor(
        keys=[f"f{number}" for number in range(4)],
        values=torch.from_numpy(values),
        lengths=torch.from_numpy(np.concatenate([np.diff(ends) for _, ends, _ in given])),
        weights=torch.from_numpy(weights) if weighted else None,
    )
    return jagged, given


def ours(table: Any, given: tuple[np.ndarray, ...], mean: bool, weighted: bool) -> np.ndarray:
    indices, ends, weights = given
    options = {"per_sample_weights": weights if weighted else None, "include_last_offset": True}
    if not mean or isinstance(table, qembag.QuantizedTable):
        return qembag.embedding_bag(table, indices, ends, mode="mean" if mean else "sum", **options)
    # The mean of float rows, as FBGEMM computes it.
    counts = np.diff(ends).astype(np.float32)[:, None]
    reciprocals = np.divide(np.float32(1), counts, out=np.zeros_like(counts), where=counts > 0)
    return qembag.embedding_bag(table, indices, ends, **options) * reciprocals


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_the_collection_s(bits, split, weighted, rng):
    # TorchRec's split form does not take an odd number of bytes a row.
    for alignment in (2, 4, 16) if split else (1, 4, 16):
        collection = bags(bits, split, weighted=weighted, alignment=alignment)
        fill(collection, rng)
        tables = torchrec.from_module(collection)
        assert [name for name in collection.state_dict() if name.endswith(".weight")] == [f"{t}.weight" for t in tables]
        jagged, given = features(rng, weighted)
        theirs = collection(jagged).to_dict()
        for number, dim in enumerate(DIMS):
            table = tables[f"embedding_bags.t{number}"]
            assert table.shape == (20 + number, dim)
            assert getattr(table, "bits", None) == (bits_of(bits, number) if bits_of(bits, number) <= 8 else None)
            same_bits(ours(table, given[number], number % 2 == 1, weighted), theirs[f"f{number}"].detach().numpy())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("split", [False, True])
def test_rows_are_the_collection_s(bits, split, rng):
    collection = rows(bits, split)
    fill(collection, rng)
    tables = torchrec.from_module(collection)
    weights = [name for name in collection.state_dict() if name.endswith(".weight")]
    assert [f"{name}.weight" for name in tables] == weights
    jagged, given = features(rng)
    theirs = collection(jagged)
    for number in range(4):
        same_bits(
            qembag.embedding(tables[f"embeddings.t{number}"], given[number][0]), theirs[f"f{number}"].values().numpy()
        )


@pytest.mark.parametrize("split", [False, True])
def test_tables_share_the_collection_s_memory(split, rng):
    collection, filled = bags(4, split), bags(4, split)
    tables = torchrec.from_module(collection)
    assert not tables["embedding_bags.t0"][:].any()
    fill(filled, rng)
    collection.load_state_dict(filled.state_dict())
    same_bits(tables["embedding_bags.t0"][:], torchrec.from_module(filled)["embedding_bags.t0"][:])
    assert tables["embedding_bags.t0"][:].any()


def test_a_collection_in_floats_shares_its_parameters(rng):
    configs = [
        EmbeddingBagConfig(name=f"t{number}", embedding_dim=dim, num_embeddings=9, feature_names=[f"f{number}"])
        for number, dim in enumerate(DIMS)
    ]
    collection = EmbeddingBagCollection(tables=configs)
    tables = torchrec.from_module(collection)
    assert list(tables) == [f"embedding_bags.t{number}" for number in range(4)]
    for name, parameter in collection.named_parameters():
        assert np.shares_memory(tables[name.removesuffix(".weight")].data, parameter.detach().numpy())
    single = EmbeddingCollection(
        tables=[EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["f"])]
    )
    assert list(torchrec.from_module(single)) == ["embeddings.t"]


def test_quantized_models_arrive_whole(rng):
    from torchrec.inference.modules import quantize_embeddings

    configs = [
        EmbeddingBagConfig(name=f"t{number}", embedding_dim=dim, num_embeddings=9, feature_names=[f"f{number}"])
        for number, dim in enumerate(DIMS)
    ]
    model = torch.nn.ModuleDict({"sparse": EmbeddingBagCollection(tables=configs), "dense": torch.nn.Linear(2, 2)})
    names = [f"sparse.embedding_bags.t{number}" for number in range(4)]
    assert list(interop.from_model(model)) == names
    small = quantize_embeddings(model, dtype=torch.quint4x2, inplace=False)
    tables = interop.from_model(small)
    assert list(tables) == names
    for name, table in tables.items():
        assert table.bits == 4
        values = model.get_parameter(f"{name}.weight").detach().numpy()
        scales = np.ptp(values, axis=1, keepdims=True) / 15
        assert (np.abs(table[:] - values) <= 0.6 * scales).all()


def test_rows_that_pruning_kept_are_the_table(rng):
    config = EmbeddingBagConfig(
        name="t", embedding_dim=8, num_embeddings=9, feature_names=["f"], data_type=DataType.INT8
    )
    config.num_embeddings_post_pruning = 5
    assert torchrec.from_module(quantized.EmbeddingBagCollection([config], False, CPU))["embedding_bags.t"].shape == (
        5,
        8,
    )


def test_registered_operators_do_not_come_twice(rng):
    model = torch.nn.Sequential(bags(8, register_tbes=True))
    assert list(interop.from_model(model)) == [f"0.embedding_bags.t{number}" for number in (0, 2, 1, 3)]


@pytest.mark.parametrize("wrong", [None, torch.nn.Embedding(3, 4), {"embedding_bags.t.weight": torch.zeros(3, 4)}])
def test_what_is_no_collection_is_refused(wrong):
    with pytest.raises(TypeError, match="module must be torchrec's EmbeddingBagCollection or EmbeddingCollection, got"):
        torchrec.from_module(wrong)


def test_a_collection_without_memory_is_refused():
    config = EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=9, feature_names=["f"])
    with pytest.raises(ValueError, match="must be on the CPU, got device meta"):
        torchrec.from_module(EmbeddingBagCollection(tables=[config], device=torch.device("meta")))


# ---- Back --------------------------------------------------------------------------------------------------------------


def state_of(tables: dict[str, Any], split: bool, alignment: int) -> dict[str, Any]:
    found = {}
    for name, table in tables.items():
        if split:
            found |= {f"{name}.{part}": tensor for part, tensor in torchrec.to_split_tensors(table).items()}
        else:
            found[f"{name}.weight"] = torchrec.to_weight(table, row_alignment=alignment)
    return found


@pytest.mark.parametrize("bits", [8, 4, 2, 16, 32])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("make", [bags, rows])
def test_all_tables_go_back_into_a_collection(bits, split, make, rng):
    collection = make(bits)
    fill(collection, rng)
    tables = torchrec.from_module(collection)
    for alignment in (4, 16):
        other = make(bits, split, alignment=alignment)
        state = state_of(tables, split, alignment)
        if split and bits > 8:  # what it has for tables of floats there is None
            state |= dict.fromkeys(set(other.state_dict()) - set(state))
        other.load_state_dict(state)
        jagged, _ = features(rng)
        theirs, back = collection(jagged), other(jagged)
        for number in range(4):
            one, two = theirs[f"f{number}"], back[f"f{number}"]
            if make is rows:
                one, two = one.values(), two.values()
            same_bits(one.numpy(), two.numpy())


def test_a_table_of_ours_goes_without_loss(rng):
    for bits in (8, 4, 2):
        config = EmbeddingBagConfig(
            name="t", embedding_dim=64, num_embeddings=30, feature_names=["f"], data_type=TYPES[bits]
        )
        collection = quantized.EmbeddingBagCollection([config], False, CPU, quant_state_dict_split_scale_bias=True)
        table = qembag.quantize(rng.normal(size=(30, 64)).astype(np.float32), bits, scale_dtype="float16")
        table = table.prune(np.arange(30) % 4 > 0)
        collection.load_state_dict(
            {f"embedding_bags.t.{part}": tensor for part, tensor in torchrec.to_split_tensors(table).items()}
        )
        ends = bag_offsets(rng, 6, 5)
        indices = rng.integers(0, 30, ends[-1])
        jagged = KeyedJaggedTensor(["f"], torch.from_numpy(indices), lengths=torch.from_numpy(np.diff(ends)))
        same_bits(qembag.embedding_bag(table, indices, ends, include_last_offset=True), collection(jagged)["f"].numpy())


def test_what_would_be_lost_is_an_error_or_rounded(rng):
    table = qembag.quantize(rng.normal(size=(9, 8)).astype(np.float32))
    for export in (torchrec.to_split_tensors, torchrec.to_weight):
        with pytest.raises(ValueError, match="TorchRec cannot hold this table exactly: scale_dtype must be float32"):
            export(table)
        export(table, exact=False)
        with pytest.raises(ValueError, match="table must be of codes, float32 or float16, got bfloat16"):
            export(qembag.FloatTable(np.zeros((2, 3), np.uint16), dtype="bfloat16"))
        with pytest.raises(TypeError, match="table must be a QuantizedTable or a FloatTable, got NoneType"):
            export(None)
    with pytest.raises(ValueError, match="row_alignment must be from 1"):
        torchrec.to_weight(table, row_alignment=0, exact=False)
