"""What the modules have in common: a table's parts as buffers."""

# No `from __future__ import annotations`: torch.jit.script reads those of modules.
from typing import Any, Callable, ClassVar, Self  # noqa: UP035 (as torch.jit.script knows them)

import torch
from torch import Tensor

from ..float_table import FloatTable
from ..interop.tensors import array_of
from ..table import QuantizedTable
from .tensors import layout_text, new_table, rows_of, table_of, tensor_over


class LookupModule(torch.nn.Module):
    """A table's parts as buffers: the base of both modules."""

    # For torch.jit.script.
    __constants__: ClassVar[list[str]] = ["num_embeddings", "embedding_dim", "padding_idx", "num_threads", "dtype"]
    __jit_unused_properties__: ClassVar[list[str]] = ["table"]

    rows: Tensor
    compressed_indices_mapping: Tensor | None
    row_weights: Tensor | None

    def __init__(self, table: QuantizedTable | FloatTable, dtype: Any, num_threads: int | None) -> None:
        super().__init__()
        if not isinstance(table, (QuantizedTable, FloatTable)):
            raise TypeError(f"table must be a QuantizedTable or a FloatTable, got {type(table).__name__}")
        self.dtype = torch.float32 if dtype is None else dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype of torch, got {dtype!r}")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be 1 or more, got {num_threads}")
        self.num_threads = num_threads
        self.num_embeddings, self.embedding_dim = table.shape
        self.layout = layout_text(table)
        self.register_buffer("rows", rows_of(table))
        self._is_read_only = not table.data.flags.writeable
        for name in ("compressed_indices_mapping", "row_weights"):
            part = getattr(table, name, None)
            self.register_buffer(name, None if part is None else tensor_over(part))

    @property
    def table(self) -> QuantizedTable | FloatTable:
        """The table in the buffers' memory, for all that qembag does with tables.

        If the buffers are not tensors that qembag made, such as those of a loaded model, and are moved to shared memory
        by sending them to another process, torch frees that memory: do not use a table from before.
        """
        if self.rows.device.type != "cpu":
            raise RuntimeError(f"the table must be on the CPU, got {self.rows.device}")
        if self.row_weights is None:
            return table_of(self.rows, self.compressed_indices_mapping, self.layout)
        mapping = self.compressed_indices_mapping
        return new_table(
            array_of(self.rows, "rows"),
            None if mapping is None else array_of(mapping, "compressed_indices_mapping"),
            self.layout,
            array_of(self.row_weights, "row_weights"),
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._described_rows()}"

    def _described_rows(self) -> str:
        if self.layout:
            return self.layout.strip("{}").replace('"', "").replace(": ", "=")
        return f"rows={str(self.rows.dtype).removeprefix('torch.')}"

    # ---- Moved and converted -----------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Rows are moved, never converted: `half` and the like change the type of the output."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(lambda tensor: _moved(tensor, fn), recurse)
        return self

    # ---- State -------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        # A tensor, for formats of files that hold nothing else.
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.layout = _text_of(state)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """A table of the same shape is taken over whatever its layout; torch then copies it, as any other."""
        if f"{prefix}rows" in state_dict:
            try:
                self._prepare_for(state_dict, prefix)
            except (TypeError, ValueError, IndexError) as error:
                errors.append(f"{prefix}rows: {error}")
                return
        elif strict and f"{prefix}_extra_state" in state_dict:
            missing.append(f"{prefix}rows")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _prepare_for(self, state_dict: Any, prefix: str) -> None:
        """Give the buffers the shapes and types of those in `state_dict`, which are checked first."""
        rows = state_dict[f"{prefix}rows"]
        parts = {name: state_dict.get(f"{prefix}{name}") for name in ("compressed_indices_mapping", "row_weights")}
        state = state_dict.get(f"{prefix}_extra_state")
        layout = self.layout if state is None else _text_of(state)
        if rows.device.type == "cpu":
            shape = table_of(rows, parts["compressed_indices_mapping"], layout).shape
            if shape != (self.num_embeddings, self.embedding_dim):
                raise ValueError(
                    f"size mismatch: copying a table of shape {shape} from the checkpoint, the module's is "
                    f"{(self.num_embeddings, self.embedding_dim)}"
                )
        for name, part in {"rows": rows, **parts}.items():
            own = getattr(self, name)
            if part is None or own is None or own.shape != part.shape or own.dtype != part.dtype or self._is_read_only:
                device = self.rows.device
                setattr(self, name, None if part is None else torch.empty(part.shape, dtype=part.dtype, device=device))
        self._is_read_only = False


def _text_of(state: Any) -> str:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError("_extra_state must be a uint8 tensor of 1 dimension, as qembag.torch writes it")
    return bytes(state.tolist()).decode(errors="replace")


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn`'s tensor, but for its type."""
    if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
        # A storage of its own: `share_memory_` moves a storage and frees its memory, which tables may still be in.
        tensor = torch.from_numpy(tensor.numpy())
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
