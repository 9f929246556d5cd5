"""Replaces PyTorch's quantized embedding operators with `qembag.ops`, to run PyTorch's own tests on them.

`apply` replaces attributes of ``torch.ops.quantized``. Tensors are passed without a copy, and results are new,
writeable tensors. A packed object is a `QuantizedTable`. As a program, it runs the class TestQuantizedEmbeddingOps of a
file. Its last line of output says which tests ran and which operators were called:

    python torch_shim.py .../test_quantized_op.py
"""

from __future__ import annotations

import importlib.util
import json
import sys
import unittest
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qembag import QuantizedTable, ops

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

TEST_CLASS = "TestQuantizedEmbeddingOps"
WIDTHS = ("byte", "4bit", "2bit")
# These take tensors, numbers and packed objects, and return one tensor; their arguments are PyTorch's own.
PLAIN_OPERATORS = [
    *(f"embedding_bag_{width}_rowwise_offsets" for width in WIDTHS),
    *(f"embedding_bag_{width}_prepack" for width in WIDTHS),
    *(f"embedding_bag_{width}_prepack_with_rowwise_min_max" for width in WIDTHS),
    *(f"embedding_bag_{width}_unpack" for width in WIDTHS),
    "embedding_bag_byte",
    "embedding_bag_4bit",
    "embedding_byte",
    "embedding_4bit",
]


def array_of(value: Any) -> Any:
    """An array over a tensor's memory; any other value unchanged."""
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def plain_operator(name: str) -> Callable[..., torch.Tensor]:
    ours = getattr(ops, name)

    def operator(*arguments: Any, **named: Any) -> torch.Tensor:
        result = ours(*map(array_of, arguments), **{key: array_of(value) for key, value in named.items()})
        return torch.from_numpy(result)

    return operator


def prepack(weight: torch.Tensor) -> QuantizedTable:
    """Pack a tensor that is quantized per channel."""
    codes = weight.int_repr().numpy()
    bits = {torch.quint8: 8, torch.quint4x2: 4}[weight.dtype]
    if bits == 4:
        # `int_repr` holds two codes per byte, the low half first, and only as many bytes as they take.
        packed = codes.reshape(-1)[: weight.numel() // 2]
        codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(tuple(weight.shape))
    scales, zero_points = weight.q_per_channel_scales().numpy(), weight.q_per_channel_zero_points().numpy()
    return ops.embedding_bag_prepack(codes, scales, zero_points, bits)


def unpack(packed: QuantizedTable) -> torch.Tensor:
    """The quantized tensor that a packed table was made from."""
    codes, scales, zero_points = (torch.from_numpy(part) for part in ops.embedding_bag_unpack(packed))
    values = (codes - zero_points[:, None]) * scales[:, None]
    kind = {8: torch.quint8, 4: torch.quint4x2}[packed.bits]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        return torch.quantize_per_channel(values, scales, zero_points, axis=0, dtype=kind)


def apply() -> Counter[str]:
    """Replace the operators. The returned counter counts the calls of each."""
    calls: Counter[str] = Counter()

    def counted(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return operator(*arguments, **named)

        return call

    operators = {name: plain_operator(name) for name in PLAIN_OPERATORS}
    operators |= {"embedding_bag_prepack": prepack, "embedding_bag_unpack": unpack}
    for name, operator in operators.items():
        setattr(torch.ops.quantized, name, counted(name, operator))
    return calls


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_quantized_op", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(path: str) -> int:
    calls = apply()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(getattr(load(path), TEST_CLASS))
    names = sorted(test.id().rpartition(".")[2] for test in suite)
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    bad = [test.id() for test, _ in result.failures + result.errors]
    report = {"names": names, "run": result.testsRun, "skipped": len(result.skipped), "bad": bad, "calls": calls}
    print(json.dumps(report))
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
