"""Quantized modules of torch with any codes, scales and zero points. Imports torch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch.ao.nn import quantized

KINDS = {8: torch.quint8, 4: torch.quint4x2}


def quantized_weight(bits: int, codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, dim: int) -> Any:
    """A quantized tensor, one scale and one zero point a row; `codes` are bytes as they are stored."""
    weight = torch._empty_per_channel_affine_quantized(
        [len(codes), dim],
        scales=torch.from_numpy(scales.astype(np.float32)),
        zero_points=torch.from_numpy(zero_points.astype(np.float32)),
        axis=0,
        dtype=KINDS[bits],
    )
    torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage()).copy_(torch.from_numpy(codes.reshape(-1)))
    return weight


def module_of(weight: Any, *, single: bool = False, **options: Any) -> Any:
    """A torch.ao.nn.quantized.EmbeddingBag, or an Embedding, of that weight."""
    kind = quantized.Embedding if single else quantized.EmbeddingBag
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(*weight.shape, _weight=weight, dtype=weight.dtype, **options)


def some_module(
    rng: np.random.Generator, bits: int, dim: int, num_rows: int, *, extremes: bool = False, **options: Any
):
    """One with codes of the full range, and scales and zero points of either sign."""
    codes = rng.integers(0, 256, (num_rows, -(-dim * bits // 8)), dtype=np.uint8)
    scales, zero_points = rng.normal(size=(2, num_rows)) * [[0.1], [100]]
    if extremes:
        odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-39, 6e-8, 3e38, -3e38, 65504.0])
        for values in (scales, zero_points):
            np.copyto(values, rng.choice(odd, num_rows), where=rng.random(num_rows) < 0.3)
    return module_of(quantized_weight(bits, codes, scales, zero_points, dim), **options)
