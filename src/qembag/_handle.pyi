from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from typing_extensions import disjoint_base

from ._errors import Fault
from .float_table import FloatTable
from .layout import RowLayout
from .table import QuantizedTable

NO_BOUNDS: NDArray[np.float32]

# ---- The level ----------------------------------------------------------------------------------------------------

def use_loops(capsule: object) -> None: ...
def max_threads() -> int: ...
def set_thread_limit(limit: int) -> None: ...
def get_thread_limit() -> int: ...

# ---- Tables -------------------------------------------------------------------------------------------------------

FLOAT_ELEMENTS: dict[str, int]

@disjoint_base
class LayoutFields:
    def __new__(
        cls,
        element: int,
        dim: int,
        row_bytes: int,
        codes_start: int = 0,
        pairs_start: int = 0,
        pair_size: int = 0,
        group_size: int = 0,
    ) -> Self: ...
    @property
    def bits(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def codes_start(self) -> int: ...
    @property
    def codes_bytes(self) -> int: ...
    @property
    def pairs_start(self) -> int: ...
    @property
    def pair_size(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...

@disjoint_base
class TableHandle:
    def __new__(cls, rows: NDArray[np.uint8], layout: LayoutFields, mapping: NDArray[np.int32] | None) -> Self: ...
    @property
    def rows(self) -> NDArray[np.uint8]: ...
    @property
    def mapping(self) -> NDArray[np.int32] | None: ...
    @property
    def layout(self) -> LayoutFields: ...
    @property
    def num_embeddings(self) -> int: ...

@disjoint_base
class HandleOwner:
    _handle: TableHandle

@disjoint_base
class CollectionHandle:
    def __new__(
        cls,
        names: tuple[str, ...],
        tables: tuple[TableHandle, ...],
        modes: tuple[int, ...],
        paddings: tuple[int, ...],
        skips_invalid: tuple[bool, ...],
    ) -> Self: ...
    @property
    def num_features(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def tables(self) -> tuple[TableHandle, ...]: ...

# What this module takes from modules that import it.
def register_arrays(function: object) -> None: ...
def register_slow_path(module: object) -> None: ...
def register_packed_layout(function: object) -> None: ...

# ---- For the slow path --------------------------------------------------------------------------------------------

def look_up_bags(
    handle: TableHandle,
    is_pruned: bool,
    indices: object,
    offsets: object,
    include_last_offset: bool,
    weights: object,
    padding_idx: int,
    skips_invalid: bool,
    mode: int,
    out: object,
    out_type: int,
    num_threads: int,
) -> NDArray[Any] | Fault | None: ...
def look_up_rows(
    handle: TableHandle,
    is_pruned: bool,
    indices: object,
    skips_invalid: bool,
    dequantize: bool,
    out: object,
    out_type: int,
    num_threads: int,
) -> NDArray[Any] | Fault | None: ...
def dequantize(handle: TableHandle, rows: object, out: object) -> NDArray[np.float32]: ...
def dequantized_row(handle: TableHandle, number: int) -> NDArray[np.float32] | Fault: ...
def quantize(
    weights: NDArray[np.float32],
    layout: RowLayout,
    out: NDArray[np.uint8],
    bounds: NDArray[np.float32] | None,
    method: int,
    importance: NDArray[np.float32] | None,
    num_bins: int,
    ratio: float,
    num_threads: int,
) -> tuple[str, int, int] | None: ...
def look_up_parts(
    parts: list[tuple[TableHandle, int, int, bool, object, object, object, object]],
    out_type: int,
    num_threads: int,
    check_first: bool,
) -> Literal[True] | Fault | None: ...
def look_up_collection_rows(
    handle: CollectionHandle,
    indices: object,
    offsets: object,
    lengths: object,
    out: object,
    dtype: object,
    num_threads: object,
) -> Any: ...
def lie_apart_at_a_glance(outputs: list[NDArray[Any]], inputs: list[NDArray[Any]]) -> bool: ...
def look_up_collection(
    handle: CollectionHandle,
    indices: object,
    offsets: object,
    lengths: object,
    weights: object,
    out: object,
    dtype: object,
    num_threads: object,
) -> Any: ...

# ---- The public functions -----------------------------------------------------------------------------------------

def embedding_bag(
    table: QuantizedTable | FloatTable | NDArray[Any],
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    mode: Literal["sum", "mean", "max", "average", "sqrtn"] = "sum",
    per_sample_weights: ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    invalid: Literal["raise", "skip"] = "raise",
    out: NDArray[Any] | None = None,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]: ...
def embedding(
    table: QuantizedTable | FloatTable | NDArray[Any],
    indices: ArrayLike,
    *,
    invalid: Literal["raise", "skip"] = "raise",
    out: NDArray[Any] | None = None,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]: ...

# ---- PyTorch's operators ------------------------------------------------------------------------------------------

def embedding_bag_byte_rowwise_offsets(
    weight: ArrayLike,
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    pruned_weights: bool = False,
    per_sample_weights: ArrayLike | None = None,
    compressed_indices_mapping: ArrayLike | None = None,
    include_last_offset: bool = False,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def embedding_bag_byte(
    weight: QuantizedTable,
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    pruned_weights: bool = False,
    per_sample_weights: ArrayLike | None = None,
    compressed_indices_mapping: ArrayLike | None = None,
    include_last_offset: bool = False,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def embedding_byte(weight: QuantizedTable, indices: ArrayLike, pruned_weights: bool = False) -> NDArray[np.float32]: ...
def embedding_bag_4bit_rowwise_offsets(
    weight: ArrayLike,
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    pruned_weights: bool = False,
    per_sample_weights: ArrayLike | None = None,
    compressed_indices_mapping: ArrayLike | None = None,
    include_last_offset: bool = False,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def embedding_bag_4bit(
    weight: QuantizedTable,
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    pruned_weights: bool = False,
    per_sample_weights: ArrayLike | None = None,
    compressed_indices_mapping: ArrayLike | None = None,
    include_last_offset: bool = False,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def embedding_4bit(weight: QuantizedTable, indices: ArrayLike, pruned_weights: bool = False) -> NDArray[np.float32]: ...
def embedding_bag_2bit_rowwise_offsets(
    weight: ArrayLike,
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    pruned_weights: bool = False,
    per_sample_weights: ArrayLike | None = None,
    compressed_indices_mapping: ArrayLike | None = None,
    include_last_offset: bool = False,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def embedding_bag_2bit(
    weight: QuantizedTable,
    indices: ArrayLike,
    offsets: ArrayLike | None = None,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    pruned_weights: bool = False,
    per_sample_weights: ArrayLike | None = None,
    compressed_indices_mapping: ArrayLike | None = None,
    include_last_offset: bool = False,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def embedding_2bit(weight: QuantizedTable, indices: ArrayLike, pruned_weights: bool = False) -> NDArray[np.float32]: ...
