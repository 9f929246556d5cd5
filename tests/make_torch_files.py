"""Makes tests/golden/torch/: files of torch.save, and in expected.npz what the modules that were saved answer.

Run it with torch 2.13.0, torchrec 1.9.2 and torchao 0.18.0; `test_torch_files_golden.py` reads without. A key of
expected.npz is CASE|TABLE|LOOKUP, where a lookup is one of `support.foreign_lookups`.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.nn.quantized as nnq
import torchrec
from torch import nn
from torch.ao.quantization import (
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    quantize_dynamic,
)
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType
from torchrec.inference.modules import quantize_embeddings
from torchrec.quant import embedding_modules

from support.foreign_lookups import INDICES, NUM_ROWS, OFFSETS, WEIGHTS

GOLDEN = Path(__file__).parent / "golden" / "torch"
QCONFIGS = {8: float_qparams_weight_only_qconfig, 4: float_qparams_weight_only_qconfig_4bit}
EXPECTED: dict[str, np.ndarray] = {}


def expect(case: str, table: str, **lookups: torch.Tensor) -> None:
    for lookup, values in lookups.items():
        EXPECTED[f"{case}|{table}|{lookup}"] = values.detach().float().numpy()


def save(case: str, value: Any, **options: Any) -> None:
    # To a buffer: the stem in the file is then the same everywhere.
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    (GOLDEN / f"{case}.pt").write_bytes(buffer.getvalue())


def sums(module: Any) -> dict[str, torch.Tensor]:
    indices, offsets, weights = map(torch.from_numpy, (INDICES, OFFSETS, WEIGHTS))
    return {"sum": module(indices, offsets), "weighted": module(indices, offsets, per_sample_weights=weights)}


# ---- torch -----------------------------------------------------------------------------------------------------------


def quantized_bag(dim: int, bits: int) -> Any:
    module = nn.EmbeddingBag(NUM_ROWS, dim, mode="sum")
    module.qconfig = QCONFIGS[bits]
    return nnq.EmbeddingBag.from_float(module)


def torch_ao() -> None:
    for bits, dims in ((8, (1, 5, 16)), (4, (1, 7, 16))):
        case = f"ao-{bits}bit"
        modules = nn.ModuleDict({f"of_{dim}": quantized_bag(dim, bits) for dim in dims})
        save(case, modules.state_dict())
        for name, module in modules.items():
            expect(case, name, **sums(module))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_ROWS, 6)
        self.users = nn.EmbeddingBag(NUM_ROWS, 4, mode="sum")
        self.plain = nn.EmbeddingBag(NUM_ROWS, 3, mode="sum")
        self.halves = nn.Embedding(NUM_ROWS, 3).half()
        self.brains = nn.Embedding(NUM_ROWS, 3).bfloat16()
        self.top = nn.Linear(4, 2)


def dynamic() -> None:
    """Quantized parts beside float ones in a nested checkpoint."""
    model = Model()
    for name, bits in (("words", 8), ("users", 4)):
        model.get_submodule(name).qconfig = QCONFIGS[bits]
    spec = {"words": QCONFIGS[8], "users": QCONFIGS[4], nn.Linear: torch.ao.quantization.default_dynamic_qconfig}
    quantized = quantize_dynamic(model, spec)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    save("dynamic", {"epoch": 3, "model": quantized.state_dict(), "optimizer": optimizer})
    rows = torch.arange(NUM_ROWS)
    expect("dynamic", "model.words", rows=quantized.words(rows))
    expect("dynamic", "model.users", **sums(quantized.users))
    expect("dynamic", "model.plain", **sums(quantized.plain))
    expect("dynamic", "model.halves", rows=quantized.halves(rows))
    expect("dynamic", "model.brains", rows=quantized.brains(rows))


def tensors() -> None:
    """Tensors saved as such: quantized ones with an odd dim, views, a transposed one."""
    weights = torch.randn(NUM_ROWS, 5)
    scales, zero_points = torch.rand(NUM_ROWS) + 0.1, 15 * torch.rand(NUM_ROWS)
    odd = torch.quantize_per_channel(weights, scales, zero_points, 0, torch.quint4x2)
    packed = torch.ops.quantized.embedding_bag_4bit_prepack(torch.randn(NUM_ROWS, 6))
    bag = nnq.EmbeddingBag(NUM_ROWS, 5, dtype=torch.quint4x2)
    bag.set_weight(odd)
    # torch's lookup has one column more. It takes each row to begin with a byte, which is not how torch itself packs
    # odd dims when it quantizes.
    expect("tensors", "odd", sum=sums(bag)["sum"][:, :5])
    base = torch.randn(2 * NUM_ROWS, 8)
    view, turned = base[::2, 1:6], torch.randn(4, NUM_ROWS).t()
    save("tensors", {"odd": odd, "packed": packed, "view": view, "turned": turned, "flat": base[0]})
    indices, offsets = torch.from_numpy(INDICES), torch.from_numpy(OFFSETS)
    expect("tensors", "view", rows=view)
    expect("tensors", "turned", rows=turned)
    operator = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    expect("tensors", "packed", sum=operator(packed, indices, offsets, include_last_offset=False))
    save("alone", torch.randn(3, 4))


# ---- TorchRec --------------------------------------------------------------------------------------------------------

TYPES = {
    "int8": torch.qint8,
    "int4": torch.quint4x2,
    "int2": torch.quint2x4,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
# Elements of a table of each type.
DIMS = {"int8": 10, "int4": 12, "int2": 8, "fp16": 5, "fp32": 3}


def collection(pooling: Any, kinds: Any, split: bool) -> Any:
    configs = [
        torchrec.EmbeddingBagConfig(
            name=kind, embedding_dim=DIMS[kind], num_embeddings=NUM_ROWS, feature_names=[kind], pooling=pooling
        )
        for kind in kinds
    ]
    model = nn.Sequential()
    model.ebc = torchrec.EmbeddingBagCollection(tables=configs)
    if split:
        embedding_modules.quant_prep_enable_quant_state_dict_split_scale_bias(model.ebc)
    types = {kind: TYPES[kind] for kind in kinds}
    return quantize_embeddings(model, torch.qint8, inplace=True, per_table_weight_dtype=types)


def pooled(model: Any, kinds: Any) -> dict[str, torch.Tensor]:
    lengths = np.diff(OFFSETS, append=len(INDICES)).astype(np.int32)
    features = torchrec.KeyedJaggedTensor(
        keys=list(kinds),
        values=torch.from_numpy(np.tile(INDICES, len(kinds))),
        lengths=torch.from_numpy(np.tile(lengths, len(kinds))),
    )
    return model.ebc(features).to_dict()


def torch_rec() -> None:
    for case, split in (("torchrec", False), ("torchrec-split", True)):
        kinds = [kind for kind in TYPES if kind.startswith("int") or not split]
        for pooling in (torchrec.PoolingType.SUM, torchrec.PoolingType.MEAN):
            torch.manual_seed(7)
            model = collection(pooling, kinds, split)
            for kind, values in pooled(model, kinds).items():
                expect(case, f"ebc.embedding_bags.{kind}", **{pooling.value.lower(): values})
        state = model.state_dict()
        save(case, {key: value.clone() for key, value in state.items()} if split else state)


# ---- torchao ---------------------------------------------------------------------------------------------------------


def torch_ao_intx() -> None:
    asymmetric = {"mapping_type": MappingType.ASYMMETRIC}
    half = {"scale_dtype": torch.float16}
    model = nn.ModuleDict()
    for bits in range(1, 9):
        for name, options in (
            ("rows", {"granularity": PerAxis(0)}),
            ("groups", {"granularity": PerGroup(16)} | half),
            ("asymmetric", {"granularity": PerGroup(32)} | half | asymmetric),
        ):
            if bits in (4, 8) or name == "rows":
                one = nn.Embedding(NUM_ROWS, 32)
                quantize_(
                    one, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), **options), lambda *_: True
                )
                model[f"{name}_{bits}"] = one
    brain = nn.Embedding(NUM_ROWS, 32).bfloat16()
    quantize_(brain, IntxWeightOnlyConfig(weight_dtype=torch.int4), lambda *_: True)
    model["brain"] = brain
    save("torchao", model.state_dict())
    for name, one in model.items():
        expect("torchao", name, rows=one(torch.arange(NUM_ROWS)))


def swapped(case: str) -> None:
    """The file of a big-endian machine: all numbers but bytes are swapped."""
    with zipfile.ZipFile(GOLDEN / f"{case}.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    storages = {str(number): kind for number, kind in enumerate(SWAPPED[case])}
    with zipfile.ZipFile(GOLDEN / f"{case}-big.pt", "w") as archive:
        for name, data in records.items():
            folder, _, key = name.rpartition("/")
            if folder.endswith("/data"):
                data = np.frombuffer(data, storages[key]).byteswap().tobytes()
            archive.writestr(zipfile.ZipInfo(name), b"big" if key == "byteorder" else data)


# The types of the storages of a file, in order.
SWAPPED = {"ao-8bit": ["u1", "f4", "f4"] * 3, "torchrec-split": ["u1", "f2", "f2"] * 3, "alone": ["f4"]}


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(15)
    torch_ao()
    dynamic()
    tensors()
    torch_rec()
    torch_ao_intx()
    for case in SWAPPED:
        swapped(case)
    np.savez_compressed(GOLDEN / "expected.npz", **EXPECTED)


if __name__ == "__main__":
    main()
