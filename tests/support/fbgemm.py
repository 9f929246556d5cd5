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


class FbgemmTable:
    """A table of FBGEMM's in memory of its own; `rows` is a view of it. Arguments that make an operator come first."""

    def __init__(
        self,
        bits: int,
        dim: int,
        num_rows: int,
        *,
        alignment: int = 1,
        mode: str = "sum",
        dtype: Any = np.float32,
        index_type: Any = np.int64,
        mapping: np.ndarray | None = None,
    ) -> None:
        self.layout: Layout = replace(PAIRS_FIRST[bits], alignment=alignment)
        self.bits, self.dim, self.index_type = bits, dim, index_type
        integers = torch.int64 if index_type == np.int64 else torch.int32
        self.operator = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("table", num_rows, dim, TYPES[bits], EmbeddingLocation.HOST)],
            pooling_mode=MODES[mode],
            device="cpu",
            bounds_check_mode=BoundsCheckMode.FATAL,
            output_dtype=OUTPUTS[dtype],
            row_alignment=alignment,
            indices_dtype=integers,
            index_remapping=None if mapping is None else [torch.from_numpy(mapping.astype(np.int32))],
        )
        self.operator.initialize_weights()
        ((whole, _, _),) = self.operator.split_embedding_weights_with_scale_bias(0)
        self.rows: np.ndarray = whole.numpy()
        assert self.rows.shape == (num_rows, self.layout.row_bytes(dim))

    def fill(self, rng: np.random.Generator, extremes: bool = False) -> np.ndarray:
        """Rows of any codes, with the padding of zeros that FBGEMM writes."""
        self.rows[...] = rows_of(rng, self.layout, *self.rows.shape[:1], self.dim, extremes)
        self.rows[:, self.layout.used_bytes(self.dim) :] = 0
        return self.rows

    def __call__(self, indices: np.ndarray, ends: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """`ends` has the last end too. The operator may write to a tensor of indices."""
        return self.operator(
            torch.from_numpy(indices.astype(self.index_type)),
            torch.from_numpy(ends.astype(self.index_type)),
            None if weights is None else torch.from_numpy(weights.copy()),
        ).numpy()
