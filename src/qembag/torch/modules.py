"""torch.nn's embedding modules over tables of qembag."""

# No `from __future__ import annotations`: torch.jit.script reads those of `forward`.
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor

from .. import _arguments
from ..float_table import FloatTable
from ..interop.tensors import array_of
from ..quantize import quantize
from ..table import QuantizedTable
from .lookup_module import LookupModule

MODES = ("sum", "mean", "max")


def _empty_table(num_embeddings: int, embedding_dim: int, bits: int, device: Any) -> QuantizedTable:
    """Of zeros; on the device "meta", of one row that is there for all."""
    num_rows = _arguments.whole_number(num_embeddings, "num_embeddings")
    dim = _arguments.whole_number(embedding_dim, "embedding_dim")
    for name, number, least in (("num_embeddings", num_rows, 0), ("embedding_dim", dim, 1)):
        if number < least:
            raise ValueError(f"{name} must be {least} or more, got {number}")
    row = np.zeros(quantize(np.zeros((1, dim), np.float32), bits).row_bytes, np.uint8)
    shape = (num_rows, len(row))
    on_meta = device is not None and torch.device(device).type == "meta"
    rows = np.broadcast_to(row, shape) if on_meta else np.zeros(shape, np.uint8)
    return QuantizedTable(rows, bits, dim=dim)


def refuse_max_norm(module: Any) -> None:
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"max_norm must be None: lookups do not change rows, got {module.max_norm}")


def _weights_of(module: Any) -> NDArray[Any]:
    """A float module's rows for `quantize`."""
    refuse_max_norm(module)
    weight = module.weight
    return array_of(weight.float() if weight.dtype == torch.bfloat16 else weight, "weight")


def _refuse_training(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    for name, value, inert in (
        ("max_norm", max_norm, None),
        ("scale_grad_by_freq", scale_grad_by_freq, False),
        ("sparse", sparse, False),
    ):
        if value != inert:
            raise ValueError(f"{name} must be {inert}: these tables are not trained, got {value}")


def _row_number(padding_idx: int | None, num_embeddings: int) -> int | None:
    """From 0, as torch's modules keep it."""
    return None if padding_idx is None else _arguments.padding_number(padding_idx, num_embeddings)


def _quantized_floats(kind: type, module: Any, bits: int, **options: Any) -> QuantizedTable:
    """Of a float module of this class; options as for `quantize`."""
    if not isinstance(module, kind):
        raise TypeError(f"module must be a torch.nn.{kind.__name__}, got {type(module).__name__}")
    return quantize(_weights_of(module), bits, **options)


def _quantized_table(module: torch.nn.Module) -> QuantizedTable | FloatTable:
    """Of another library's module."""
    from ..interop.torch import from_module

    if isinstance(module, LookupModule):
        # Its mode and type would be lost.
        raise TypeError("module must be one of torch's or torchao's, got one of qembag's: copy.deepcopy copies it")
    return from_module(module)


class EmbeddingBag(LookupModule):
    """`torch.nn.EmbeddingBag` over a table of codes, or of floats. For inference: nothing in it is trained.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        The table's shape. Its values are zeros: `from_float`, `from_quantized`, `from_table` and ``load_state_dict``
        give it others.
    max_norm, scale_grad_by_freq, sparse
        As in torch; accepted at torch's defaults only.
    norm_type : float
        Ignored, as in torch where `max_norm` is None.
    mode : {"mean", "sum", "max"}
        As in torch, "mean" by default. A mean of codes is the sum times ``1 / n``.
    include_last_offset : bool
        As in torch.
    padding_idx : int, optional
        As in torch.
    device : torch.device, optional
        The CPU, or "meta" for a module without memory.
    dtype : torch.dtype, optional
        Of the output; float32 if not given. ``module.half()`` and the like change it; rows keep their type.
    bits : {8, 4, 2}
        Bits of a code, until another layout is loaded.
    num_threads : int, optional
        Threads of a call; at most `torch.get_num_threads` and `qembag.get_num_threads` if not given.

    Attributes
    ----------
    rows : Tensor
        The table's rows: a buffer of uint8, or of floats.
    compressed_indices_mapping : Tensor or None
        A buffer of int32: see `qembag.QuantizedTable`.
    row_weights : Tensor or None
        A buffer of float32: those of the table. Lookups do not apply them.
    table : QuantizedTable or FloatTable
        The table in the buffers' memory.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.

    Notes
    -----
    ``load_state_dict`` takes a table of the same shape in any layout, and takes over its layout. State dicts hold
    tensors only, and load with ``weights_only=True``. A call raises what `qembag.embedding_bag` raises.

    Examples
    --------
    >>> import torch, qembag.torch
    >>> bags = qembag.torch.EmbeddingBag.from_float(torch.nn.EmbeddingBag(1000, 64, mode="sum"))
    >>> bags
    EmbeddingBag(1000, 64, bits=4, dim=64, mode='sum')
    >>> bags(torch.tensor([1, 2, 4, 5]), torch.tensor([0, 3])).shape
    torch.Size([2, 64])
    """

    __constants__: ClassVar[list[str]] = [
        *LookupModule.__constants__,
        "padding_idx",
        "mode",
        "include_last_offset",
        "layout",
    ]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 8,
        num_threads: int | None = None,
    ) -> None:
        _refuse_training(max_norm, scale_grad_by_freq, sparse)
        table = _empty_table(num_embeddings, embedding_dim, bits, device)
        self._set(table, mode, include_last_offset, padding_idx, dtype, num_threads)
        if device is not None:
            self.to(device)

    def _set(
        self,
        table: QuantizedTable | FloatTable,
        mode: str,
        include_last_offset: bool,
        padding_idx: int | None,
        dtype: torch.dtype | None,
        num_threads: int | None,
    ) -> None:
        super().__init__(table, dtype, num_threads)
        if mode not in MODES:
            raise ValueError(f"mode must be 'sum', 'mean' or 'max', got {mode!r}")
        self.mode = mode
        self.include_last_offset = _arguments.flag(include_last_offset, "include_last_offset")
        self.padding_idx = _row_number(padding_idx, self.num_embeddings)

    @classmethod
    def from_table(
        cls,
        table: QuantizedTable | FloatTable,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        num_threads: int | None = None,
    ) -> Self:
        """A module over a table, in its memory.

        Parameters
        ----------
        table : QuantizedTable or FloatTable
            Of any layout, pruned or not. Rows of a mapped file stay mapped; writing to the buffer `rows` then ends the
            process, and ``load_state_dict`` gives the module memory of its own instead.
        mode, include_last_offset, padding_idx, dtype, num_threads
            As for the class.

        Returns
        -------
        EmbeddingBag

        Raises
        ------
        TypeError, ValueError
            If an argument is none of these.
        """
        module = cls.__new__(cls)
        module._set(table, mode, include_last_offset, padding_idx, dtype, num_threads)
        return module

    @classmethod
    def from_float(
        cls,
        module: torch.nn.EmbeddingBag,
        bits: int = 4,
        *,
        method: Literal["minmax", "greedy", "lsq"] = "lsq",
        importance: ArrayLike | None = None,
        scale_dtype: DTypeLike | None = None,
        group_size: int | None = None,
        num_threads: int | None = None,
    ) -> Self:
        """Quantize a `torch.nn.EmbeddingBag`.

        Parameters
        ----------
        module : torch.nn.EmbeddingBag
            On the CPU, without `max_norm`. Its mode, `include_last_offset` and `padding_idx` are kept, and its weight's
            type is the output's.
        bits, method, importance, scale_dtype, group_size
            As for `qembag.quantize`.
        num_threads : int, optional
            As for the class, and for the quantizing.

        Returns
        -------
        EmbeddingBag

        Raises
        ------
        TypeError
            If `module` is another one, or its weight is quantized already.
        ValueError
            If it has a `max_norm` or is not on the CPU; as `qembag.quantize` raises it.
        """
        table = _quantized_floats(
            torch.nn.EmbeddingBag,
            module,
            bits,
            method=method,
            importance=importance,
            scale_dtype=scale_dtype,
            group_size=group_size,
            num_threads=num_threads,
        )
        return cls._like(module, table, num_threads)

    @classmethod
    def _like(cls, module: torch.nn.EmbeddingBag, table: QuantizedTable | FloatTable, num_threads: int | None) -> Self:
        """A module over this table that does what a float one does."""
        made = cls.from_table(
            table,
            mode=module.mode,
            include_last_offset=module.include_last_offset,
            padding_idx=module.padding_idx,
            dtype=module.weight.dtype,
            num_threads=num_threads,
        )
        made.train(module.training)
        return made

    @classmethod
    def from_quantized(cls, module: torch.nn.Module, *, num_threads: int | None = None) -> Self:
        """A quantized embedding bag of torch's or torchao's, with the bits of its lookups.

        Parameters
        ----------
        module : torch.ao.nn.quantized.EmbeddingBag, or torch.nn.EmbeddingBag with a weight of torchao's
            Its codes, scales and biases are taken as they are: see `qembag.interop.torch.from_module`.
        num_threads : int, optional
            As for the class.

        Returns
        -------
        EmbeddingBag
            In place of a module of ``torch.ao`` its mode is "sum": that one always sums, whatever the mode of the
            module that it was made of.

        Raises
        ------
        TypeError, ValueError
            As for `qembag.interop.torch.from_module`.
        """
        table = _quantized_table(module)
        if isinstance(module, torch.nn.EmbeddingBag):
            return cls._like(module, table, num_threads)
        made = cls.from_table(
            table,
            mode="sum",
            include_last_offset=getattr(module, "include_last_offset", False),
            num_threads=num_threads,
        )
        made.train(module.training)
        return made

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Sums, means or maxima of bags.

        Parameters
        ----------
        input : Tensor of int32 or int64
            Indices: 2-D, a bag a row; or 1-D, with `offsets`.
        offsets : Tensor of int32 or int64, optional
            Where each bag begins; with `include_last_offset` the last one ends.
        per_sample_weights : Tensor of floats, optional
            Shaped as `input`. Also with mode "mean".

        Returns
        -------
        Tensor of `dtype`, shape (num_bags, embedding_dim)

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `qembag.embedding_bag`.
        RuntimeError
            If gradients are to reach `per_sample_weights`, or a tensor is not on the CPU.
        """
        if per_sample_weights is not None and per_sample_weights.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "per_sample_weights must not require gradients: a quantized table's lookup has none. Look up under "
                "torch.no_grad(), or pass per_sample_weights.detach()"
            )
        # Defaults at the end of the arguments cost nothing: 1.3 us of 9.
        asked: torch.dtype | None = None
        if self.dtype != torch.float32 and self.dtype != torch.float64:
            asked = self.dtype
        found = torch.ops.qembag.embedding_bag(
            self.rows,
            input,
            offsets,
            per_sample_weights,
            self.compressed_indices_mapping,
            self.layout,
            self.mode,
            self.include_last_offset,
            self.padding_idx,
            asked,
            self.num_threads,
        )
        return found.double() if self.dtype == torch.float64 else found

    def extra_repr(self) -> str:
        more = ", include_last_offset=True" if self.include_last_offset else ""
        if self.padding_idx is not None:
            more += f", padding_idx={self.padding_idx}"
        return f"{super().extra_repr()}, mode={self.mode!r}{more}"


class Embedding(LookupModule):
    """`torch.nn.Embedding` over a table of codes, or of floats. For inference: nothing in it is trained.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        The table's shape; its values are zeros, as for `EmbeddingBag`.
    padding_idx : int, optional
        As in torch, where it matters to training alone.
    max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype, bits, num_threads
        As for `EmbeddingBag`.

    Attributes
    ----------
    rows, compressed_indices_mapping, row_weights, table
        As for `EmbeddingBag`.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.

    Examples
    --------
    >>> import torch, qembag.torch
    >>> rows = qembag.torch.Embedding.from_float(torch.nn.Embedding(1000, 64), bits=8)
    >>> rows(torch.tensor([[1, 2], [4, 5]])).shape
    torch.Size([2, 2, 64])
    """

    __constants__: ClassVar[list[str]] = [*LookupModule.__constants__, "padding_idx", "layout"]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 8,
        num_threads: int | None = None,
    ) -> None:
        _refuse_training(max_norm, scale_grad_by_freq, sparse)
        self._set(_empty_table(num_embeddings, embedding_dim, bits, device), padding_idx, dtype, num_threads)
        if device is not None:
            self.to(device)

    def _set(
        self,
        table: QuantizedTable | FloatTable,
        padding_idx: int | None,
        dtype: torch.dtype | None,
        num_threads: int | None,
    ) -> None:
        super().__init__(table, dtype, num_threads)
        self.padding_idx = _row_number(padding_idx, self.num_embeddings)

    @classmethod
    def from_table(
        cls,
        table: QuantizedTable | FloatTable,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        num_threads: int | None = None,
    ) -> Self:
        """A module over a table, in its memory: see `EmbeddingBag.from_table`."""
        module = cls.__new__(cls)
        module._set(table, padding_idx, dtype, num_threads)
        return module

    @classmethod
    def from_float(
        cls,
        module: torch.nn.Embedding,
        bits: int = 4,
        *,
        method: Literal["minmax", "greedy", "lsq"] = "lsq",
        importance: ArrayLike | None = None,
        scale_dtype: DTypeLike | None = None,
        group_size: int | None = None,
        num_threads: int | None = None,
    ) -> Self:
        """Quantize a `torch.nn.Embedding`: see `EmbeddingBag.from_float`."""
        table = _quantized_floats(
            torch.nn.Embedding,
            module,
            bits,
            method=method,
            importance=importance,
            scale_dtype=scale_dtype,
            group_size=group_size,
            num_threads=num_threads,
        )
        return cls._like(module, table, num_threads)

    @classmethod
    def _like(cls, module: torch.nn.Embedding, table: QuantizedTable | FloatTable, num_threads: int | None) -> Self:
        """As that of `EmbeddingBag`."""
        padding_idx, dtype = module.padding_idx, module.weight.dtype
        made = cls.from_table(table, padding_idx=padding_idx, dtype=dtype, num_threads=num_threads)
        made.train(module.training)
        return made

    @classmethod
    def from_quantized(cls, module: torch.nn.Module, *, num_threads: int | None = None) -> Self:
        """A quantized embedding of torch's or torchao's: see `EmbeddingBag.from_quantized`."""
        table = _quantized_table(module)
        if isinstance(module, torch.nn.Embedding):
            return cls._like(module, table, num_threads)
        made = cls.from_table(table, num_threads=num_threads)
        made.train(module.training)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Rows.

        Parameters
        ----------
        input : Tensor of int32 or int64, of any shape

        Returns
        -------
        Tensor of `dtype`, shape input.shape + (embedding_dim,)

        Raises
        ------
        TypeError, IndexError
            As for `qembag.embedding`.
        RuntimeError
            If a tensor is not on the CPU.
        """
        # Defaults at the end of the arguments cost nothing: 1.3 us of 9.
        asked: torch.dtype | None = None
        if self.dtype != torch.float32 and self.dtype != torch.float64:
            asked = self.dtype
        found = torch.ops.qembag.embedding(
            self.rows,
            input,
            self.compressed_indices_mapping,
            self.layout,
            asked,
            self.num_threads,
        )
        return found.double() if self.dtype == torch.float64 else found

    def extra_repr(self) -> str:
        more = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return super().extra_repr() + more
