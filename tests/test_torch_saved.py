"""What torch itself writes is read as torch reads it; and torch reads what these tests write by hand."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qembag.interop.foreign import Memory
from qembag.interop.inert_pickle import Unread
from qembag.interop.torch_tensors import Entries, QTensor, Tensor, Wrapped, read_entries
from support.torch_files import files_of_every_kind

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def read(path: Path, raw: bytes | None = None) -> Entries:
    if raw is not None:
        path.write_bytes(raw)
    return read_entries(Memory(path))


def bits(tensor: Any) -> bytes:
    """The elements of a tensor of torch's, in order."""
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(found: Any, expected: Any) -> None:
    assert isinstance(found, Tensor)
    assert (found.dtype, found.shape) == (str(expected.dtype).removeprefix("torch."), tuple(expected.shape))
    array = found.array()
    assert array.astype(array.dtype.newbyteorder("<")).tobytes() == bits(expected)


def state() -> dict[str, Any]:
    torch.manual_seed(3)
    whole = torch.randn(10, 8)
    return {
        "a.weight": torch.randn(5, 3),
        "b.weight": torch.nn.Parameter(torch.randn(4, 2).half()),
        "c": whole[3:7],
        "d": whole.T,
        "e": whole[:, 2:5],
        "f": torch.randn(1, 6).expand(9, 6),
        "g": torch.tensor(3.5),
        "h": torch.empty(0, 4),
        "i": torch.arange(5, dtype=torch.uint8),
        "j": torch.randn(3, 3).bfloat16(),
        "k": torch.tensor([True, False]),
        "l": torch.randn(4).to(torch.float8_e4m3fn),
        "m": torch.tensor([1, 2, 3], dtype=torch.uint16),
        "n": torch.randn(2, 3, 4, 5),
        "größe": torch.randn(2, dtype=torch.float64),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["a.pt", "my.model.v2.bin", "a", "größe.pth"])
def test_tensors_of_every_kind_are_the_same(tmp_path, protocol, name):
    saved = state()
    torch.save(saved, tmp_path / name, pickle_protocol=protocol)
    found = read(tmp_path / name).tensors
    assert list(found) == list(saved)
    for key, tensor in found.items():
        same(tensor, saved[key])


def test_a_file_written_to_a_buffer_is_the_same(tmp_path):
    file = io.BytesIO()
    torch.save(state(), file)
    for key, tensor in read(tmp_path / "a", file.getvalue()).tensors.items():
        same(tensor, state()[key])


def test_a_file_without_checksums_is_the_same(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(state(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    for key, tensor in read(tmp_path / "a.pt").tensors.items():
        same(tensor, state()[key])


def test_checkpoints_are_walked(tmp_path):
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(6, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    whole = {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save(whole, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    same(found.tensors["model.0.weight"], whole["model"]["0.weight"])
    same(found.tensors["optimizer.state.0.exp_avg"], whole["optimizer"]["state"][0]["exp_avg"])
    same(found.tensors["rng"], whole["rng"])
    assert found.others["epoch"] == 3


@pytest.mark.parametrize("value", ["one", "list", "tuple"])
def test_values_that_are_no_dict_have_names(tmp_path, value):
    one = torch.randn(3, 2)
    saved = {"one": one, "list": [one], "tuple": (one, 1)}[value]
    torch.save(saved, tmp_path / "a.pt")
    (found,) = read(tmp_path / "a.pt").tensors.items()
    assert found[0] == ("table" if value == "one" else "0")
    same(found[1], one)


def test_quantized_tensors_are_their_storage(tmp_path):
    weights = torch.randn(4, 6)
    scales, zeros = torch.rand(4) + 0.1, torch.rand(4)
    saved = {
        str(dtype): torch.quantize_per_channel(weights, scales, zeros, 0, dtype)
        for dtype in (torch.quint8, torch.quint4x2)
    }
    saved["linear"] = torch.quantize_per_tensor(weights, 0.5, 3, torch.qint8)
    saved["int32"] = torch.quantize_per_tensor(weights, 0.5, 3, torch.qint32)
    torch.save(saved, tmp_path / "a.pt")
    entries = read(tmp_path / "a.pt")
    found = entries.tensors
    assert np.array_equal(found["torch.quint8"].codes, saved["torch.quint8"].int_repr().numpy())
    assert found["torch.quint4x2"].codes.tobytes() == bytes(saved["torch.quint4x2"].untyped_storage())
    same(found["torch.quint8"].scales, saved["torch.quint8"].q_per_channel_scales())
    same(found["torch.quint8"].zero_points, saved["torch.quint8"].q_per_channel_zero_points())
    assert found["linear"][3:] == ("per_tensor_affine", 0.5, 3, 0)
    assert isinstance(entries.others["int32"], Unread)


def test_what_has_no_plain_values_is_passed_over(tmp_path):
    saved = {
        "a": torch.randn(2, 2),
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
        "set": {1, 2},
        "numpy": np.float64(3),
    }
    torch.save(saved, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert list(found.tensors) == ["a"]
    assert [key for key, value in found.others.items() if isinstance(value, Unread)] == list(saved)[1:]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_training_keeps_in_a_checkpoint_is_passed_over(tmp_path, protocol):
    saved = {
        "a": torch.randn(2, 2),
        "arguments": argparse.Namespace(lr=0.1, data=pathlib.Path("data"), ranks={1, 2}, hook=frozenset([3])),
        "array": np.arange(6.0).reshape(2, 3),
        "columns": np.arange(6).reshape(2, 3).T,
        "random": np.random.RandomState(0).get_state(),
        "when": [datetime.datetime.now(), datetime.timedelta(1), datetime.date(2026, 11, 27)],
        "path": pathlib.PureWindowsPath("a/b"),
        "raw": bytearray(b"abc"),
        "counts": collections.defaultdict(int, {"a": 1}),
        "none": set(),
    }
    torch.save(saved, tmp_path / "a.pt", pickle_protocol=protocol)
    found = read(tmp_path / "a.pt")
    assert list(found.tensors) == ["a"]
    passed = [key for key, value in found.others.items() if isinstance(value, Unread)]
    assert {"arguments", "array", "columns", "path", "none"} <= set(passed)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.nn.Embedding(3, 2), path)
    with pytest.raises(ValueError, match=r"got 'torch.nn.modules.sparse.Embedding': .*torch.save\(model.state_dict"):
        read(path)
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch's old format"):
        read(path)
    torch.jit.script(Model()).save(path)
    with pytest.raises(ValueError, match=r"TorchScript .*torch.jit.load"):
        read(path)


def test_an_exported_program_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.pt2"
    torch.export.save(torch.export.export(Model(), (torch.randn(2, 3),)), path)
    with pytest.raises(ValueError, match=r"torch.export.load"):
        read(path)


def test_torch_reads_what_is_written_by_hand(tmp_path):
    """So that the tests without torch test files as torch knows them."""
    compared = 0
    for kind, raw in files_of_every_kind().items():
        if kind in ("TorchRec, 4 bits", "torchao"):
            continue  # needs those packages
        found = read(tmp_path / "a.pt", raw).tensors
        loaded = torch.load(tmp_path / "a.pt", weights_only=False)
        for key, tensor in found.items():
            assert not isinstance(tensor, Wrapped)
            expected = loaded
            for part in (
                [] if key == "table" else [key] if key in loaded else key.split(".", 2 if "models" in key else 3)
            ):
                expected = expected[int(part) if part not in expected else part]
            if isinstance(tensor, QTensor):
                assert tensor.codes.tobytes() == bytes(expected.untyped_storage())
                same(tensor.scales, expected.q_per_channel_scales())
            elif kind.endswith("big-endian"):
                assert tensor.array().tolist() == expected.tolist()
            else:
                same(tensor, expected)
            compared += 1
    assert compared > 15


def test_the_offset_of_codes_of_4_bits_counts_bytes():
    """PyTorch's lookup counts bytes, although tensors say elements."""
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.UntypedStorage(list(range(40))), dtype=torch.quint4x2, _internal=True
    )
    parameters = (torch.per_channel_affine_float_qparams, torch.ones(4), torch.zeros(4), 0)
    tensor = torch._utils._rebuild_qtensor(storage, 5, (4, 6), (6, 1), parameters, False, {})
    packed = torch.ops.quantized.embedding_bag_prepack(tensor)
    rows = torch.ops.quantized.embedding_4bit(packed, torch.arange(4)).numpy().astype(np.uint8)
    assert np.array_equal(rows[:, ::2] | rows[:, 1::2] << 4, np.arange(5, 17).reshape(4, 3))
