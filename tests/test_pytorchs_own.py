"""PyTorch's own test class, from its own file, run over qembag's operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import child_environment

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SHIM = Path(__file__).with_name("torch_shim.py")
VARIABLE = "QEMBAG_PYTORCH_TESTS"
# What the class of PyTorch 2.13.0 calls.
MUST_BE_CALLED = {
    *(f"embedding_bag_{width}_{what}" for width in ("byte", "4bit", "2bit") for what in ("rowwise_offsets", "prepack")),
    "embedding_bag_prepack",
    "embedding_bag_byte",
    "embedding_bag_4bit",
    "embedding_byte",
    "embedding_4bit",
}
UNPACK_CHECK = """
import sys; sys.path.insert(0, {folder!r})
import torch, torch_shim, warnings
warnings.simplefilter("ignore")
quantized = torch.ops.quantized
torch.manual_seed(1)
weights = torch.randn(9, 24)
bounds = torch.tensor([[-5.0, 5.0]]).repeat(9, 1)
kinds = dict(byte=(torch.quint8, 255), **{{"4bit": (torch.quint4x2, 15)}})

def answers():
    for width in ("byte", "4bit", "2bit"):
        packed = getattr(quantized, f"embedding_bag_{{width}}_prepack")(weights)
        yield packed
        yield getattr(quantized, f"embedding_bag_{{width}}_prepack_with_rowwise_min_max")(weights, bounds)
        yield getattr(quantized, f"embedding_bag_{{width}}_unpack")(packed)
        if width in kinds:
            kind, top = kinds[width]
            low = weights.min(dim=1).values
            scales = (weights.max(dim=1).values - low) / top
            tensor = torch.quantize_per_channel(weights, scales, -low / scales, axis=0, dtype=kind)
            packed = quantized.embedding_bag_prepack(tensor)
            back = quantized.embedding_bag_unpack(packed)
            assert torch.equal(back.int_repr().flatten()[: back.numel() // 2], tensor.int_repr().flatten()[: back.numel() // 2])
            yield back.dequantize().clone()
            yield back.q_per_channel_scales().clone()
            yield back.q_per_channel_zero_points().clone()

theirs = list(answers())
calls = torch_shim.apply()
ours = list(answers())
assert len(ours) == len(theirs) == 15
for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype and torch.equal(a, b), (a, b)
    a.add_(1)  # new and writeable
assert sum(calls.values()) == 13, calls
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env=child_environment(),
        check=False,
    )


def test_pytorchs_own_tests_of_these_operators_pass_over_ours(tmp_path: Path) -> None:
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"{VARIABLE} must name PyTorch's test/quantization/core/test_quantized_op.py, and is not set")
    done = run(tmp_path, str(SHIM), os.path.abspath(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["run"] == len(report["names"]) >= 6, report
    assert report["bad"] == []
    assert report["skipped"] == 0, done.stderr
    assert set(report["calls"]) >= MUST_BE_CALLED
    # Hypothesis runs each of the bag tests with several examples.
    assert min(report["calls"][name] for name in MUST_BE_CALLED) >= 1
    assert report["calls"]["embedding_bag_2bit_rowwise_offsets"] >= 5


def test_the_shims_prepack_and_unpack_operators_answer_as_torchs_do(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", UNPACK_CHECK.format(folder=str(SHIM.parent)))
    assert done.returncode == 0, done.stderr
