"""What torch, TorchRec and torchao save, and what their modules answer: the same bits after loading the file."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.torch,
    # torch says that it will remove what is tested here.
    pytest.mark.filterwarnings("ignore"),
]

NUM_ROWS = 50
DIMS = [*range(1, 17), 64, 100, 300]
BITS = [8, 4]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(15)


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def quantized(cls: Any, dim: int, bits: int) -> Any:
    return quantized_module(
        cls(NUM_ROWS, dim, **({"mode": "sum", "include_last_offset": True} if cls is torch.nn.EmbeddingBag else {})),
        bits,
    )


def quantized_module(module: Any, bits: int) -> Any:
    from torch.ao.nn import quantized as nnq
    from torch.ao.quantization import float_qparams_weight_only_qconfig, float_qparams_weight_only_qconfig_4bit

    module.qconfig = float_qparams_weight_only_qconfig if bits == 8 else float_qparams_weight_only_qconfig_4bit
    return getattr(nnq, type(module).__name__).from_float(module)


def bags() -> tuple[Any, Any, Any]:
    indices = torch.randint(0, NUM_ROWS, (120,))
    return indices, torch.tensor([0, 0, 1, 17, 64, 120]), torch.randn(120)


def same_bits(got: np.ndarray, want: Any) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), want.detach().float().numpy().view(np.uint32))


def compare_bags(table: Any, module: Any, columns: int | None = None) -> None:
    indices, offsets, weights = bags()
    for given in (None, weights):
        got = qembag.embedding_bag(
            table,
            indices.numpy(),
            offsets.numpy(),
            per_sample_weights=None if given is None else given.numpy(),
            include_last_offset=True,
        )
        same_bits(got, module(indices, offsets, per_sample_weights=given)[:, :columns])


# ---- torch.ao --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_quantized_bags_give_their_own_bits(tmp_path, bits, dim, protocol):
    model = torch.nn.ModuleDict({"emb": quantized(torch.nn.EmbeddingBag, dim, bits)})
    path = saved(tmp_path / "my.model.v2.pt", {"state": [model.state_dict()]}, pickle_protocol=protocol)
    ((name, table),) = qembag.load_tables(path).items()
    assert (name, table.bits) == ("state.0.emb", bits)
    compare_bags(table, model["emb"])
    cut = qembag.load_tables(path, dims={"emb": dim})[name]
    assert cut.dim == dim
    compare_bags(cut, model["emb"], dim)


@pytest.mark.parametrize("dim", DIMS)
def test_quantized_embeddings_give_their_own_bits(tmp_path, dim):
    model = torch.nn.ModuleDict({"emb": quantized(torch.nn.Embedding, dim, 8)})
    table = qembag.load_tables(saved(tmp_path / "a.pt", model.state_dict()))["emb"]
    indices = torch.randint(0, NUM_ROWS, (3, 7))
    same_bits(qembag.embedding(table, indices.numpy()), model["emb"](indices))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0.0, 1.5, 1e-35, 1e-37, 1e-40])
def test_rows_that_decayed_are_read(tmp_path, bits, size):
    floats = torch.nn.EmbeddingBag(NUM_ROWS, 8, mode="sum")
    with torch.no_grad():
        floats.weight[2] = size
        floats.weight[3] *= size
    model = torch.nn.ModuleDict({"emb": quantized_module(floats, bits)})
    table = qembag.load_tables(saved(tmp_path / "a.pt", model.state_dict()))["emb"]
    indices = torch.arange(NUM_ROWS)
    same_bits(table[:], model["emb"](indices, indices))


def test_a_4_bit_embedding_with_a_wrong_dtype_beside_it_is_read_by_its_storage(tmp_path):
    module = quantized(torch.nn.Embedding, 8, 4)
    state = torch.nn.ModuleDict({"emb": module}).state_dict()
    assert state["emb._packed_params.dtype"] == torch.quint8
    table = qembag.load_tables(saved(tmp_path / "a.pt", state))["emb"]
    assert table.bits == 4
    weight = module.weight()
    packed = torch.ops.quantized.embedding_bag_prepack(weight)
    indices = torch.arange(NUM_ROWS)
    want = torch.ops.quantized.embedding_bag_4bit(packed, indices, indices)
    same_bits(table[:], want)


def test_dynamically_quantized_models_give_their_own_bits(tmp_path):
    from torch.ao.quantization import default_dynamic_qconfig, float_qparams_weight_only_qconfig, quantize_dynamic

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleDict(
                {
                    "bag": torch.nn.EmbeddingBag(NUM_ROWS, 13, mode="sum", include_last_offset=True),
                    "words": torch.nn.Embedding(NUM_ROWS, 7),
                    "plain": torch.nn.EmbeddingBag(NUM_ROWS, 5, mode="sum", include_last_offset=True),
                }
            )
            # Their packed parameters are objects of C++, which are passed over.
            self.lstm, self.gru, self.cell = torch.nn.LSTM(7, 3), torch.nn.GRU(7, 3), torch.nn.LSTMCell(7, 3)
            self.top = torch.nn.Linear(13, 2)

    spec = {
        "inner.bag": float_qparams_weight_only_qconfig,
        "inner.words": float_qparams_weight_only_qconfig,
        **dict.fromkeys((torch.nn.Linear, torch.nn.LSTM, torch.nn.GRU, torch.nn.LSTMCell), default_dynamic_qconfig),
    }
    model = quantize_dynamic(Model(), spec)
    tables = qembag.load_tables(saved(tmp_path / "a.pt", {"model": model.state_dict(), "epoch": 3}))
    assert list(tables) == [
        "model.inner.bag",
        "model.inner.words",
        "model.inner.plain",
    ]
    compare_bags(tables["model.inner.bag"], model.inner["bag"])
    compare_bags(tables["model.inner.plain"], model.inner["plain"])
    same_bits(tables["model.inner.words"][:], model.inner["words"](torch.arange(NUM_ROWS)))


@pytest.mark.parametrize("bits", BITS)
def test_quantized_tensors_may_share_a_storage_or_be_parameters(tmp_path, bits):
    module = quantized(torch.nn.EmbeddingBag, 16, bits)
    weight = module.weight()
    tied = {"a": weight, "b": weight, "c": [weight]}
    tables = qembag.load_tables(saved(tmp_path / "a.pt", tied))
    assert list(tables) == ["a", "b", "c.0"]
    for table in tables.values():
        compare_bags(table, module)
    alone = qembag.load_tables(saved(tmp_path / "b.pt", weight))
    compare_bags(alone["table"], module)


@pytest.mark.parametrize("num_rows", [10, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_scales_of_a_module_that_is_gone_are_detected(tmp_path, num_rows, bits, monkeypatch):
    monkeypatch.setitem(globals(), "NUM_ROWS", num_rows)
    module = quantized(torch.nn.EmbeddingBag, 16, bits)
    state = module.state_dict()
    del module
    gc.collect()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    weight = torch.load(io.BytesIO(buffer.getvalue()))["_packed_params._packed_weight"]
    there = torch.cat([weight.q_per_channel_scales(), weight.q_per_channel_zero_points()]).abs()
    tiny = torch.finfo(torch.float32).tiny
    if not ((there > 0) & (there < tiny)).any() and there.isfinite().all():
        pytest.skip("this time nothing else, or only plausible floats, took the memory")
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="while the module is still there"):
        qembag.load_tables(tmp_path / "a.pt")


def test_integer_zero_points_are_refused_as_torch_does(tmp_path):
    scales, zero_points = torch.rand(4, dtype=torch.float64) + 0.1, torch.zeros(4, dtype=torch.int64)
    tensor = torch.quantize_per_channel(torch.randn(4, 8), scales, zero_points, 0, torch.quint8)
    with pytest.raises(ValueError, match="per_channel_affine_float_qparams"):
        qembag.load_tables(saved(tmp_path / "a.pt", {"emb": tensor}))


@pytest.mark.parametrize(("bits", "name"), [(8, "byte"), (4, "4bit"), (2, "2bit")])
def test_rows_that_torch_packed_give_its_operators_bits(tmp_path, bits, name):
    rows = getattr(torch.ops.quantized, f"embedding_bag_{name}_prepack")(torch.randn(NUM_ROWS, 12))
    table = qembag.load_tables(saved(tmp_path / "a.pt", rows), bits=bits)["table"]
    indices, offsets, weights = bags()
    operator = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")
    want = operator(rows, indices, offsets, per_sample_weights=weights, include_last_offset=True)
    options = {"per_sample_weights": weights.numpy(), "include_last_offset": True}
    same_bits(qembag.embedding_bag(table, indices.numpy(), offsets.numpy(), **options), want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_modules_are_mapped(tmp_path, dtype):
    module = torch.nn.EmbeddingBag(NUM_ROWS, 9, mode="mean", include_last_offset=True).to(getattr(torch, dtype))
    table = qembag.load_tables(saved(tmp_path / "a.pt", module.state_dict()))["weight"]
    assert (table.dtype, table.shape) == (dtype, (NUM_ROWS, 9))
    assert not table.data.flags.writeable
    same_bits(table[:], module.weight)


# ---- torchao ---------------------------------------------------------------------------------------------------------


def of_torchao(path: Path, dtype: Any, dim: int, **options: Any) -> tuple[Any, Any]:
    """The table of an embedding that torchao quantized, and what its module answers, in float32."""
    torchao = pytest.importorskip("torchao.quantization")
    module = torch.nn.Embedding(NUM_ROWS, dim).to(dtype)
    torchao.quantize_(module, torchao.IntxWeightOnlyConfig(**options), lambda *_: True)
    table = qembag.load_tables(saved(path / "a.pt", {"emb.weight": module.weight}))["emb"]
    return table, module(torch.arange(NUM_ROWS)).float()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [0, 16, 48])
@pytest.mark.parametrize("scale", ["float32", "float16", "bfloat16"])
def test_symmetric_weights_of_torchao_are_exact(tmp_path, bits, group, scale):
    torchao = pytest.importorskip("torchao.quantization")
    options = {"granularity": torchao.PerGroup(group) if group else torchao.PerAxis(0)}
    options |= {"weight_dtype": getattr(torch, f"int{bits}"), "scale_dtype": getattr(torch, scale)}
    table, want = of_torchao(tmp_path, torch.float32, 96, **options)
    assert table.bits == min(width for width in (2, 4, 8) if width >= bits)
    same_bits(table[:], want)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_asymmetric_weights_of_torchao_are_exact_with_half_scales(tmp_path, bits):
    torchao = pytest.importorskip("torchao.quantization")
    options = {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": torchao.PerGroup(32)}
    mapping = pytest.importorskip("torchao.quantization.quant_primitives").MappingType.ASYMMETRIC
    table, want = of_torchao(tmp_path, torch.float32, 96, mapping_type=mapping, scale_dtype=torch.float16, **options)
    same_bits(table[:], want)
    table, want = of_torchao(tmp_path, torch.float32, 96, mapping_type=mapping, **options)
    np.testing.assert_allclose(table[:], want.numpy(), atol=float(want.abs().max()) * 3e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_models_of_torchao_are_exact_before_they_round(tmp_path, dtype):
    kind = getattr(torch, dtype)
    for dim in (5, 64):
        table, want = of_torchao(tmp_path, kind, dim, weight_dtype=torch.int4)
        same_bits(torch.from_numpy(table[:].copy()).to(kind).float().numpy(), want)


# ---- TorchRec --------------------------------------------------------------------------------------------------------

TYPES = {8: "qint8", 4: "quint4x2", 2: "quint2x4", 16: "float16", 32: "float32"}


def collection(configs: list[Any], bits: dict[str, int], prepare: Any = None) -> Any:
    torchrec = pytest.importorskip("torchrec")
    from torchrec.inference.modules import quantize_embeddings

    model = torch.nn.Sequential()
    model.ebc = torchrec.EmbeddingBagCollection(tables=configs)
    if prepare is not None:
        prepare(model.ebc)
    types = {name: getattr(torch, TYPES[number]) for name, number in bits.items()}
    return quantize_embeddings(model, torch.qint8, inplace=True, per_table_weight_dtype=types)


def config(name: str, dim: int, pooling: str) -> Any:
    torchrec = pytest.importorskip("torchrec")
    return torchrec.EmbeddingBagConfig(
        name=name,
        embedding_dim=dim,
        num_embeddings=NUM_ROWS,
        feature_names=[name],
        pooling=getattr(torchrec.PoolingType, pooling),
    )


def compare_collection(model: Any, tables: dict[str, Any], pooling: str) -> None:
    torchrec = pytest.importorskip("torchrec")
    names = [name.rpartition(".")[2] for name in tables]
    lengths = [0, 3, 40, 1, 7]
    indices = torch.randint(0, NUM_ROWS, (len(names), sum(lengths)))
    features = torchrec.KeyedJaggedTensor(names, indices.flatten(), lengths=torch.tensor(lengths * len(names)))
    pooled = model.ebc(features).to_dict()
    offsets = np.cumsum([0, *lengths])
    for (name, table), rows in zip(tables.items(), indices.numpy(), strict=True):
        got = qembag.embedding_bag(table, rows, offsets, mode=pooling.lower(), include_last_offset=True)
        same_bits(got, pooled[name.rpartition(".")[2]])


@pytest.mark.parametrize("pooling", ["SUM", "MEAN"])
@pytest.mark.parametrize("alignment", [None, 1, 64])
@pytest.mark.parametrize("split", [False, True])
def test_collections_of_torchrec_give_their_own_bits(tmp_path, pooling, alignment, split):
    modules = pytest.importorskip("torchrec.quant.embedding_modules")

    def prepare(ebc: Any) -> None:
        if alignment is not None:
            setattr(ebc, modules.MODULE_ATTR_ROW_ALIGNMENT_INT, alignment)
        if split:
            modules.quant_prep_enable_quant_state_dict_split_scale_bias(ebc)

    # TorchRec quantizes rows of an even number of bytes only.
    dims = {f"t{bits}_{dim}": dim for bits in (8, 4, 2) for dim in (8, 16, 64, 104, 300) if dim * bits % 16 == 0}
    dims |= {"t8_2": 2, "t8_6": 6, "t4_4": 4, "t4_12": 12}
    if pooling == "SUM" and not split:
        # Means of floats are sums times 1 / n in TorchRec, and sums divided by n here.
        dims |= {f"t{bits}_{dim}": dim for bits in (16, 32) for dim in (1, 3, 64)}
    bits = {name: int(name[1:].partition("_")[0]) for name in dims}
    configs = [config(name, dim, pooling) for name, dim in dims.items()]
    model = collection(configs, {name: bits[name] for name in dims}, prepare)
    state = {key: value.clone() if split else value for key, value in model.state_dict().items()}
    path = saved(tmp_path / "a.pt", state)
    options = {} if split else {"dims": dims, "bits": {name: bits[name] for name in dims}}
    tables = qembag.load_tables(path, **options)
    assert {name.rpartition(".")[2]: table.dim for name, table in tables.items()} == dims
    compare_collection(model, tables, pooling)


def test_a_collection_with_two_poolings_and_a_pruned_table(tmp_path):
    configs = [config("a", 8, "SUM"), config("b", 8, "MEAN"), config("c", 8, "SUM")]
    modules = pytest.importorskip("torchrec.quant.embedding_modules")
    attribute = modules.MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT
    model = collection(configs, {"a": 8, "b": 4, "c": 8}, lambda ebc: setattr(ebc, attribute, {"c": 20}))
    tables = qembag.load_tables(saved(tmp_path / "a.pt", model.state_dict()), dims=8, bits=8)
    assert {name: (table.num_rows, table.bits) for name, table in tables.items()} == {
        "ebc.embedding_bags.a": (50, 8),
        "ebc.embedding_bags.b": (50, 4),
        "ebc.embedding_bags.c": (20, 8),
    }


def test_embedding_collections_give_their_own_bits(tmp_path):
    torchrec = pytest.importorskip("torchrec")
    modules = pytest.importorskip("torchrec.quant.embedding_modules")
    from torchrec.inference.modules import quantize_embeddings

    model = torch.nn.Sequential()
    configs = [
        torchrec.EmbeddingConfig(name=name, embedding_dim=12, num_embeddings=NUM_ROWS, feature_names=[name])
        for name in ("a", "b")
    ]
    model.ec = torchrec.EmbeddingCollection(tables=configs)
    quantize_embeddings(
        model,
        torch.qint8,
        inplace=True,
        additional_qconfig_spec_keys=[torchrec.EmbeddingCollection],
        additional_mapping={torchrec.EmbeddingCollection: modules.EmbeddingCollection},
    )
    tables = qembag.load_tables(saved(tmp_path / "a.pt", model.state_dict()), dims=12)
    assert list(tables) == ["ec.embeddings.a", "ec.embeddings.b"]
    indices = torch.randint(0, NUM_ROWS, (14,))
    features = torchrec.KeyedJaggedTensor(["a", "b"], indices, lengths=torch.tensor([3, 4, 7, 0]))
    found = model.ec(features)
    same_bits(tables["ec.embeddings.a"][indices[:7].numpy()], found["a"].values())
    same_bits(tables["ec.embeddings.b"][indices[7:].numpy()], found["b"].values())
