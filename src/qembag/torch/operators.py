"""The lookups as operators of torch's dispatcher, so that its compilers and `torch.export` take them as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._runtime import get_num_threads
from ..lookup import embedding, embedding_bag
from .tensors import dim_of, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

# `rows` and `layout` are those of `tensors.rows_of` and `tensors.layout_text`.
BAGS = (
    "embedding_bag(Tensor rows, Tensor indices, Tensor? offsets=None, Tensor? per_sample_weights=None, "
    'Tensor? compressed_indices_mapping=None, str layout="", str mode="sum", bool include_last_offset=False, '
    "int? padding_idx=None, ScalarType? dtype=None, int? num_threads=None) -> Tensor"
)
ROWS = (
    'embedding(Tensor rows, Tensor indices, Tensor? compressed_indices_mapping=None, str layout="", '
    "ScalarType? dtype=None, int? num_threads=None) -> Tensor"
)
# Devices that torch may have, and whose tensors get an error that says more than torch's.
OTHER_DEVICES = ["CUDA", "MPS", "XPU", "HPU", "PrivateUse1"]
_DTYPES: dict[torch.dtype | None, Any] = {
    None: None,
    torch.float32: None,
    torch.float16: np.float16,
    torch.bfloat16: "bfloat16",
}


def threads(asked: int | None = None) -> int:
    """As many as are asked for, else as both torch and qembag allow."""
    return min(torch.get_num_threads(), get_num_threads()) if asked is None else asked


def weights_of(per_sample_weights: torch.Tensor | None) -> NDArray[Any] | None:
    """Weights as an array, in the same memory; bfloat16, which NumPy does not have, as float32."""
    if per_sample_weights is None:
        return None
    plain = per_sample_weights.detach()
    array: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return array


def out_dtype(dtype: torch.dtype | None) -> Any:
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise TypeError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}") from None


def result(array: NDArray[Any]) -> torch.Tensor:
    if array.dtype != np.uint16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _bags(
    rows: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    per_sample_weights: torch.Tensor | None = None,
    compressed_indices_mapping: torch.Tensor | None = None,
    layout: str = "",
    mode: Any = "sum",
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    found = embedding_bag(
        table_of(rows, compressed_indices_mapping, layout),
        indices.numpy(),
        None if offsets is None else offsets.numpy(),
        mode=mode,
        per_sample_weights=weights_of(per_sample_weights),
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
        dtype=out_dtype(dtype),
        num_threads=threads(num_threads),
    )
    return result(found)


def _rows(
    rows: torch.Tensor,
    indices: torch.Tensor,
    compressed_indices_mapping: torch.Tensor | None = None,
    layout: str = "",
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    table = table_of(rows, compressed_indices_mapping, layout)
    return result(embedding(table, indices.numpy(), dtype=out_dtype(dtype), num_threads=threads(num_threads)))


def bag_count(indices: torch.Tensor, offsets: torch.Tensor | None, include_last_offset: bool) -> Any:
    """As many bags as the result has: from shapes alone, which may be symbols."""
    if indices.dim() == 2:
        return indices.shape[0]
    if indices.dim() != 1 or offsets is None or offsets.dim() != 1:
        raise ValueError(
            "indices must have 2 dimensions, or 1 beside offsets of 1, got "
            f"{indices.dim()} and {'no offsets' if offsets is None else f'offsets of {offsets.dim()}'}"
        )
    return offsets.shape[0] - 1 if include_last_offset else offsets.shape[0]


def _fake_bags(
    rows: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    per_sample_weights: torch.Tensor | None = None,
    compressed_indices_mapping: torch.Tensor | None = None,
    layout: str = "",
    mode: str = "sum",
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    count = bag_count(indices, offsets, include_last_offset)
    return rows.new_empty((count, dim_of(rows, layout)), dtype=dtype or torch.float32)


def _fake_rows(
    rows: torch.Tensor,
    indices: torch.Tensor,
    compressed_indices_mapping: torch.Tensor | None = None,
    layout: str = "",
    dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    return rows.new_empty((*indices.shape, dim_of(rows, layout)), dtype=dtype or torch.float32)


def _elsewhere(rows: torch.Tensor, indices: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError(
        f"qembag looks rows up on CPUs only: rows and indices must be there, got {rows.device} and {indices.device}"
    )


def registered(
    library: torch.library.Library,
    operators: Iterable[tuple[str, Callable[..., Any], Callable[..., Any]]],
    elsewhere: Any,
) -> torch.library.Library:
    """The library with these operators: each a schema, what computes it on the CPU, and its shapes for compilers.

    On other devices `elsewhere` is called.
    """
    for schema, kernel, fake in operators:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        library.impl(name, kernel, "CPU")
        for device in OTHER_DEVICES:
            library.impl(name, elsewhere, device)
        torch.library.register_fake(f"qembag::{name}", fake, lib=library)
    return library


def _register() -> torch.library.Library | None:
    if hasattr(torch.ops.qembag, "embedding_bag"):
        return None  # by another copy of this package, vendored: operators take tensors, and so serve both
    # Not `torch.library.custom_op`: a call of that takes 9 us more.
    library = torch.library.Library("qembag", "DEF")
    return registered(library, ((BAGS, _bags, _fake_bags), (ROWS, _rows, _fake_rows)), _elsewhere)


_LIBRARY = _register()
