"""FBGEMM's table-batched operator for quantized rows on the CPU, of one table. Imports torch and fbgemm_gpu."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fbgemm_gpu  # noqa: F401  # registers its operators
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from support.layouts import PAIRS_FIRST, Layout, rows_of

TYPES = {8: SparseType.INT8, 4: SparseType.INT4, 2: SparseType.INT2}
OUTPUTS = {np.float32: SparseType.FP32, np.float16: SparseType.FP16}
MODES = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN}


def operator_of(
    kind: SparseType,
    dim: int,
    num_rows: int,
    alignment: int,
    mode: str = "sum",
    dtype: Any = np.float32,
    index_type: Any = np.int64,
    mapping: np.ndarray | None = None,
) -> tuple[Any, Any]:
    """The operator of a table of this kind of rows, and the type of its indices."""
    operator = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", num_rows, dim, kind, EmbeddingLocation.HOST)],
        pooling_mode=MODES[mode],
        device="cpu",
        bounds_check_mode=BoundsCheckMode.FATAL,
        output_dtype=OUTPUTS[dtype],
        row_alignment=alignment,
        indices_dtype=torch.int64 if index_type == np.int64 else torch.int32,
        index_remapping=None if mapping is None else [torch.from_numpy(mapping.astype(np.int32))],
    )
    operator.initialize_weights()
    return operator, index_type


def rows_of_operator(operator: Any) -> np.ndarray:
    ((whole, _, _),) = operator.split_embedding_weights_with_scale_bias(0)
    return whole.numpy()


def answer_of(
    operator: Any, index_type: Any, indices: np.ndarray, ends: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """The operator may write to a tensor of indices."""
    return operator(
        torch.from_numpy(indices.astype(index_type)),
        torch.from_numpy(ends.astype(index_type)),
        None if weights is None else torch.from_numpy(weights.copy()),
    ).numpy()


class FbgemmTable:
    """A table of FBGEMM's in memory of its own; `rows` is a view of it. Arguments that make an operator come first."""

    def __init__(self, bits: int, dim: int, num_rows: int, *, alignment: int = 1, **options: Any) -> None:
        self.layout: Layout = replace(PAIRS_FIRST[bits], alignment=alignment)
        self.bits, self.dim = bits, dim
        self.operator, self.index_type = operator_of(TYPES[bits], dim, num_rows, alignment, **options)
        self.rows = rows_of_operator(self.operator)
        assert self.rows.shape == (num_rows, self.layout.row_bytes(dim))

    def fill(self, rng: np.random.Generator, extremes: bool = False) -> np.ndarray:
        """Rows of any codes, with the padding of zeros that FBGEMM writes."""
        self.rows[...] = rows_of(rng, self.layout, *self.rows.shape[:1], self.dim, extremes)
        self.rows[:, self.layout.used_bytes(self.dim) :] = 0
        return self.rows

    def __call__(self, indices: np.ndarray, ends: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """`ends` has the last end too."""
        return answer_of(self.operator, self.index_type, indices, ends, weights)


class FbgemmFloats:
    """The same of rows of floats. `bytes` is FBGEMM's memory, `rows` the floats in it."""

    def __init__(self, kind: Any, dim: int, num_rows: int, *, alignment: int = 1, **options: Any) -> None:
        self.operator, self.index_type = operator_of(OUTPUTS[kind], dim, num_rows, alignment, **options)
        self.bytes = rows_of_operator(self.operator)
        size = np.dtype(kind).itemsize
        assert self.bytes.shape == (num_rows, -(-dim * size // alignment) * alignment)
        self.rows: np.ndarray = self.bytes[:, : dim * size].view(kind)

    def __call__(self, indices: np.ndarray, ends: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return answer_of(self.operator, self.index_type, indices, ends, weights)
