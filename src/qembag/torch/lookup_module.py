"""What the modules have in common: a table's parts as buffers."""

# No `from __future__ import annotations`: torch.jit.script reads those of modules.
from typing import Any, Callable, ClassVar, Self  # noqa: UP035 (as torch.jit.script knows them)

import torch
from torch import Tensor

from .. import _arguments
from ..float_table import FloatTable
from ..interop.tensors import array_of
from ..table import QuantizedTable
from .tensors import layout_text, new_table, rows_of, table_of, tensor_over

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PARTS = ("rows", "compressed_indices_mapping", "row_weights")


class LookupModule(torch.nn.Module):
    """A table's parts as buffers: the base of both modules."""

    # For torch.jit.script.
    __constants__: ClassVar[list[str]] = ["num_embeddings", "embedding_dim", "num_threads", "dtype"]
    __jit_unused_properties__: ClassVar[list[str]] = ["table"]

    rows: Tensor
    compressed_indices_mapping: Tensor | None
    row_weights: Tensor | None

    def __init__(self, table: QuantizedTable | FloatTable, dtype: Any, num_threads: int | None) -> None:
        super().__init__()
        if not isinstance(table, (QuantizedTable, FloatTable)):
            raise TypeError(f"table must be a QuantizedTable or a FloatTable, got {type(table).__name__}")
        self.dtype = torch.float32 if dtype is None else dtype
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype must be torch.float32, float64, float16 or bfloat16, got {dtype!r}")
        self.num_threads = None if num_threads is None else _arguments.num_threads(num_threads, "num_threads")
        self.num_embeddings, self.embedding_dim = table.shape
        self.layout = layout_text(table)
        self.register_buffer("rows", rows_of(table))
        self._is_read_only = not table.data.flags.writeable
        for name in PARTS[1:]:
            part = getattr(table, name)
            self.register_buffer(name, None if part is None else tensor_over(part))

    @property
    def table(self) -> QuantizedTable | FloatTable:
        """The table in the buffers' memory, for all that qembag does with tables.

        To send a module to another process, torch moves its tensors to shared memory and frees the memory that they
        had: do not use a table from before. `share_memory` keeps that memory while a table is in it; call it first.
        """
        if self.rows.device.type != "cpu":
            raise RuntimeError(f"the table must be on the CPU, got {self.rows.device}")
        if self.row_weights is None:
            return table_of(self.rows, self.compressed_indices_mapping, self.layout)
        return _table_of_parts({name: getattr(self, name) for name in PARTS}, self.layout)

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
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.layout = text_of(state)

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
        parts = {name: state_dict.get(f"{prefix}{name}") for name in PARTS}
        state = f"{prefix}_extra_state"
        layout = text_of(state_dict[state]) if state in state_dict else self.layout
        # Each is checked. All but the rows may be absent.
        here = [_is_here(part) for name, part in parts.items() if part is not None or name == "rows"]
        if all(here):
            shape = _table_of_parts(parts, layout).shape
            if shape != (self.num_embeddings, self.embedding_dim):
                raise ValueError(
                    f"size mismatch: copying a table of shape {shape} from the checkpoint, the module's is "
                    f"{(self.num_embeddings, self.embedding_dim)}"
                )
        device = self.rows.device
        for name, part in parts.items():
            own = getattr(self, name)
            if part is None or own is None or own.shape != part.shape or own.dtype != part.dtype or self._is_read_only:
                setattr(self, name, None if part is None else torch.empty(part.shape, dtype=part.dtype, device=device))
        self._is_read_only = False


def _is_here(part: Any) -> bool:
    if not isinstance(part, Tensor):
        raise TypeError(f"the parts of a table must be tensors, got {type(part).__name__}")
    return bool(part.device.type == "cpu")


def _table_of_parts(parts: dict[str, Any], layout: str) -> QuantizedTable | FloatTable:
    rows, mapping, weights = (None if part is None else array_of(part, name) for name, part in parts.items())
    assert rows is not None
    return new_table(rows, mapping, layout, weights)


def text_of(state: Any) -> str:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError("_extra_state must be a uint8 tensor of 1 dimension, as qembag.torch writes it")
    return bytes(state.tolist()).decode(errors="replace")


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn`'s tensor, but for its type."""
    if type(tensor) is Tensor and tensor.device.type == "cpu":
        # A storage of its own: `share_memory_` moves a storage and frees its memory, which tables may still be in.
        stored = torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype
        tensor = torch.from_numpy(tensor.view(stored).numpy()).view(tensor.dtype)
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
