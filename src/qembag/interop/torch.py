"""Tables from torch's modules, and back.

``docs/from-torch.md`` says what is exact.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments, _errors
from ..float_table import FloatTable
from ..layout import RowLayout
from ..table import QuantizedTable, table_of
from . import exporting, torchao_file
from .foreign import Memory, Wanted
from .tensors import array_of, full_name, has_class, imported_torch, tensor_of
from .torch_ao import BITS, rows_of_per_channel
from .torch_tensors import Tensor, Wrapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Types of parameters that can be tables.
FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")
OURS = __name__.removesuffix(".interop.torch") + ".torch"
QUANTIZED = "torch.ao.nn.quantized.modules"
KNOWN = (
    "torch.nn.Embedding or EmbeddingBag, torch.ao.nn.quantized.Embedding or EmbeddingBag, or qembag.torch.Embedding "
    "or EmbeddingBag"
)


def from_module(module: Any, *, dim: int | None = None) -> QuantizedTable | FloatTable:
    """The table of an embedding module.

    Parameters
    ----------
    module : torch.nn.Embedding or torch.nn.EmbeddingBag
        Of float32, float16 or bfloat16, or quantized by torchao's ``quantize_`` with `IntxWeightOnlyConfig`; or
        `torch.ao.nn.quantized.Embedding` or `EmbeddingBag`, also as ``quantize_dynamic`` makes them; or one of
        `qembag.torch`. On the CPU.
    dim : int, optional
        Elements of a row. At 4 bits, torch's quantized modules round an odd dim up: their last column holds a code that
        was never written. This dim leaves that column out; without it the table has as many as the module returns.

    Returns
    -------
    QuantizedTable or FloatTable
        Float rows and those of `qembag.torch` are the module's own memory: what trains the module changes the table.
        torch's ``share_memory()``, which also sends a module to another process, frees that memory: make tables after
        it, not before. Others are copied. `mode`, `padding_idx` and `include_last_offset` are a lookup's arguments, and
        not part of a table.

    Raises
    ------
    TypeError
        If the module is another one, or has a `forward` of its own, or its weight is of another type.
    ValueError
        If the weight is not on the CPU, or its rows are not contiguous; if the module has a `max_norm`; if `dim` is not
        the module's.
    ImportError
        If torch is not installed.

    Notes
    -----
    Lookups have the bits of the module's own. Quantized modules always sum, whatever their mode; ours also have means.

    Examples
    --------
    >>> import qembag
    >>> from qembag.interop.torch import from_module
    >>> bags = torch.nn.EmbeddingBag(100, 16)  # doctest: +SKIP
    >>> from_module(bags)  # doctest: +SKIP
    FloatTable(num_embeddings=100, dim=16, dtype=float32, nbytes=6400)
    """
    wanted = None if dim is None else _arguments.whole_number(dim, "dim")
    table = _made(module, wanted)
    if wanted is not None and table.dim != wanted:
        raise ValueError(f"dim must be the module's, {table.dim}, got {_errors.shown(wanted)}")
    return table


def _made(module: Any, dim: int | None) -> QuantizedTable | FloatTable:
    if has_class(module, OURS, "Embedding", "EmbeddingBag"):
        table: QuantizedTable | FloatTable = module.table
        return table
    if has_class(module, QUANTIZED, "Embedding", "EmbeddingBag"):
        return _of_quantized(module.weight(), dim)
    # Others of torch.ao compute their weight at each call.
    if not has_class(module, "torch.nn", "Embedding", "EmbeddingBag") or full_name(module).startswith("torch.ao."):
        raise TypeError(f"module must be a {KNOWN}, got {full_name(module)}")
    if not type(module).forward.__module__.startswith("torch.nn."):
        raise TypeError(
            "module must not have a forward of its own, whose answers a table would not give, got "
            f"{full_name(module)}; torch.nn.Embedding.from_pretrained(module.weight) has its rows only"
        )
    if module.max_norm is not None:
        raise ValueError(
            f"module must have no max_norm, which changes rows when they are looked up, got {module.max_norm}; "
            "torch.renorm the whole weight, then set module.max_norm to None"
        )
    weight = module.weight
    if has_class(weight, "torchao", "IntxUnpackedToInt8Tensor"):
        return _of_torchao(weight)
    return float_table(weight, "module.weight")


def float_table(tensor: Any, name: str) -> FloatTable:
    """A table over a tensor's memory."""
    array = array_of(tensor, name)
    if str(tensor.dtype) not in FLOATS:
        raise TypeError(f"{name} must be of float32, float16 or bfloat16, got {tensor.dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have 2 dimensions, and a dim of 1 or more, got shape {tuple(array.shape)}")
    if array.shape[1] > 1 and array.size and array.strides[1] != array.itemsize:
        raise ValueError(f"{name} must have the elements of a row side by side, got strides {tensor.stride()}: "
                         "call .contiguous() first")  # fmt: skip
    return FloatTable(array, dtype="bfloat16" if array.dtype == np.uint16 else None)


def _of_quantized(weight: Any, dim: int | None) -> QuantizedTable:
    """Of the quantized tensor that such a module has; its codes and pairs are copied."""
    torch = imported_torch()
    bits = BITS[str(weight.dtype).removeprefix("torch.")]
    num_rows, columns = weight.shape
    # What `dim` may leave out is the column that rounds an odd one up. Another dim is refused by the caller.
    width = columns - 1 if dim == columns - 1 and bits == 4 and columns % 2 == 0 else columns
    layout = RowLayout(bits, columns)
    stored = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage()).numpy()
    codes = stored.reshape(num_rows, layout.codes_bytes)
    scales = weight.q_per_channel_scales().numpy()
    rows = rows_of_per_channel(codes, scales, weight.q_per_channel_zero_points().numpy(), bits, width)
    return table_of(QuantizedTable, rows, RowLayout(bits, width), None)


def _of_torchao(weight: Any) -> QuantizedTable | FloatTable:
    """Of torchao's tensor, by the reader of its files; the codes are packed."""
    parts = {part: _as_in_a_file(getattr(weight, part), part) for part in ("qdata", "scale", "zero_point")}
    state = {**parts, "target_dtype": str(weight.target_dtype), "block_size": tuple(weight.block_size)}
    kind = str(weight.dtype).removeprefix("torch.")
    wrapped = Wrapped("torchao.quantization.IntxUnpackedToInt8Tensor", state, kind, tuple(weight.shape))
    return torchao_file.table("module.weight", wrapped, Wanted(), parts["qdata"].memory).table(mapped=False)


def _as_in_a_file(tensor: Any, part: str) -> Tensor:
    """A tensor in memory, as the reader of torch's files gives one."""
    array = array_of(tensor.detach().contiguous(), f"module.weight.{part}")
    memory = Lent(array.reshape(-1).view(np.uint8))
    strides = tuple(step // array.itemsize for step in array.strides)
    kind = str(tensor.dtype).removeprefix("torch.")
    return Tensor(kind, array.shape, strides, 0, memory, sys.byteorder == "big")


class Lent(Memory):
    """A tensor's memory in the place of a mapped file."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.bytes, self._map = array, None


def from_model(model: Any, *, dims: int | Mapping[str, int] | None = None) -> dict[str, QuantizedTable | FloatTable]:
    """The tables of all embedding modules of a model, TorchRec's collections and FBGEMM's operators among them.

    Parameters
    ----------
    model : torch.nn.Module
    dims : int, or dict of ints by name, optional
        As `dim` of `from_module`. Names are those of tables, or their last part.

    Returns
    -------
    dict of QuantizedTable or FloatTable
        By the names of the modules, as `load_tables` gives them for the model's state dict: a model that is itself an
        embedding has one named ``weight`` or ``_packed_params._packed_weight``. A module that the model has twice is
        the same table under both names.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `from_module`, naming the module.
    """
    from . import fbgemm, torchrec

    if not has_class(model, "torch.nn.modules.module", "Module"):
        raise TypeError(f"model must be a torch.nn.Module, got {_errors.kind_of(model)}")
    if has_class(model, "torch.jit", "ScriptModule"):
        raise TypeError("model must not be a scripted one: give the model that it was made from")
    if not (dims is None or isinstance(dims, (int, Mapping))):
        raise TypeError(f"dims must be a whole number or a dict of them, got {_errors.kind_of(dims)}")
    wanted = Wanted(dims=dims)
    found: dict[str, QuantizedTable | FloatTable] = {}
    done: dict[int, dict[str, QuantizedTable | FloatTable]] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if inside and path.startswith(inside):
            continue
        try:
            if id(module) not in done:
                if torchrec.is_quantized(module):
                    done[id(module)] = torchrec.from_module(module)
                elif fbgemm.is_operator(module):
                    done[id(module)] = fbgemm.from_module(module)
                elif is_embedding(module):
                    done[id(module)] = {"": from_module(module, dim=wanted.dim_of(path))}
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}" if path else str(error)) from error
        tables = done.get(id(module), {})
        found |= {".".join(filter(None, [path, own])) or _alone(module): table for own, table in tables.items()}
        if tables:
            inside += (f"{path}." if path else "",)
    return found


def is_embedding(module: Any) -> bool:
    """Whether it is a module that `from_module` takes, or says why not."""
    return any(has_class(module, package, "Embedding", "EmbeddingBag") for package in (OURS, QUANTIZED, "torch.nn"))


def _alone(module: Any) -> str:
    """The name of a module that is the whole model: its parameter's, which has no module's name to go by."""
    return "_packed_params._packed_weight" if has_class(module, QUANTIZED, "Embedding", "EmbeddingBag") else "weight"


# ---- Back ------------------------------------------------------------------------------------------------------------


def to_packed(table: QuantizedTable, *, exact: bool = True) -> Any:
    """Packed rows, as ``torch.ops.quantized.embedding_bag_{byte,4bit,2bit}_rowwise_offsets`` take them.

    Parameters
    ----------
    table : QuantizedTable
    exact : bool
        False allows a loss: scales and biases are rounded to what the rows hold, rows of several groups are quantized
        anew, and a dim that does not fill its last byte gets more columns.

    Returns
    -------
    torch.Tensor of uint8, shape (num_rows, row_bytes)
        The table's own memory where it is in that layout and writeable, else a copy. For a pruned table, the stored
        rows: give its `compressed_indices_mapping` to the operator too, with ``pruned_weights=True``.

    Raises
    ------
    TypeError
        If `table` is not a QuantizedTable.
    ValueError
        If `exact`, and something would be lost: says what. If not, and float16 cannot hold a scale or a bias at all.
    ImportError
        If torch is not installed.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> from qembag.interop.torch import to_packed
    >>> table = qembag.quantize(np.eye(4, dtype=np.float32), bits=4)
    >>> to_packed(table).shape  # doctest: +SKIP
    torch.Size([4, 6])
    """
    checked, is_exact = exporting.codes_to_export(table, exact)
    target = f"torch's {checked.bits}-bit operator"
    native = RowLayout(checked.bits, checked.dim).scale_dtype
    rows, _ = exporting.rows_of_one_group(checked, native, scale_first=False, exact=is_exact, target=target)
    return tensor_of(rows)


def to_state_dict(table: QuantizedTable, *, exact: bool = True, prefix: str = "") -> OrderedDict[str, Any]:
    """A state dict for `torch.ao.nn.quantized.Embedding` and `EmbeddingBag`, of 8 and 4 bits.

    Parameters
    ----------
    table : QuantizedTable
    exact : bool
        False allows a loss, as for `to_packed`; and biases that no zero point gives become the nearest.
    prefix : str
        Of the keys.

    Returns
    -------
    OrderedDict
        ``{prefix}_packed_params.dtype`` and ``{prefix}_packed_params._packed_weight``, for ``load_state_dict``.
        Pruned rows are rows of zeros.

    Raises
    ------
    TypeError
        If `table` is not a QuantizedTable.
    ValueError
        If the table has 2 bits. If `exact`, and something would be lost: says what.
    ImportError
        If torch is not installed.

    Notes
    -----
    torch keeps a zero point in place of a bias, and computes the bias as ``-(zero_point * scale)`` in float32. At 4
    bits, where the result is rounded to float16, there is a zero point for each bias. At 8 bits there is one for each
    table that came from torch, but for other tables only for about nine of ten rows; `to_packed` holds all of them.
    A row with a scale of 0, whose codes do not count, gets codes of 0, a scale of 1 and its bias as zero point.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> from qembag.interop.torch import to_state_dict
    >>> table = qembag.quantize(np.eye(4, dtype=np.float32), bits=4)
    >>> module = torch.ao.nn.quantized.EmbeddingBag(4, 4, dtype=torch.quint4x2)  # doctest: +SKIP
    >>> module.load_state_dict(to_state_dict(table))  # doctest: +SKIP
    <All keys matched successfully>
    """
    torch = imported_torch()
    checked, is_exact = exporting.codes_to_export(table, exact)
    bits, native = checked.bits, RowLayout(checked.bits, checked.dim).scale_dtype
    if bits == 2:
        raise ValueError("table must have 8 or 4 bits for torch.ao.nn.quantized, got 2; to_packed takes 2 bits too")
    target = f"torch's {bits}-bit module"
    packed, layout = exporting.rows_of_one_group(checked, native, scale_first=False, exact=is_exact, target=target)
    rows = exporting.logical_rows(checked, packed)
    codes = layout.packed_codes(rows).copy()
    pairs = layout.pairs(rows)[:, 0]
    scales, zero_points = _zero_points(pairs[:, 0], pairs[:, 1], codes, native, is_exact)
    kind = torch.quint8 if bits == 8 else torch.quint4x2
    weight = torch._empty_per_channel_affine_quantized(
        [len(rows), codes.shape[1] * layout.codes_per_byte],
        scales=torch.from_numpy(scales), zero_points=torch.from_numpy(zero_points), axis=0, dtype=kind,
    )  # fmt: skip
    torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage()).copy_(torch.from_numpy(codes.reshape(-1)))
    params = f"{prefix}_packed_params."
    return OrderedDict([(f"{params}dtype", kind), (f"{params}_packed_weight", weight)])


def _zero_points(
    scales: NDArray[np.float32],
    biases: NDArray[np.float32],
    codes: NDArray[np.uint8],
    native: np.dtype[Any],
    exact: bool,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and zero points that give these biases; clears the codes of rows whose scale is 0."""
    scales = scales.copy()
    flat = scales == 0
    scales[flat] = 1
    codes[flat] = 0
    if native == np.float16:
        # Rounds to an infinity too, and has products that do not.
        scales = np.where(np.isinf(scales), np.copysign(np.float32(2**17), scales), scales)
    best, best_error = _arguments.quietly(_nearest_zero_points, scales, biases, native)
    lost = np.flatnonzero(best_error >= 0)
    if exact and len(lost):
        row = int(lost[0])
        raise ValueError(
            f"torch's quantized modules cannot hold row {row} exactly: no float32 zero point gives its bias of "
            f"{biases[row]:.9g} as -(zero_point * scale), with its scale of {scales[row]:.9g}; exact=False takes the "
            f"nearest bias, which is off by {best_error[row]:.3g} here ({len(lost)} of {len(scales)} rows are off); "
            "to_packed holds them exactly"
        )
    return scales, best


def _nearest_zero_points(
    scales: NDArray[np.float32], biases: NDArray[np.float32], native: np.dtype[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Zero points, and how far the biases that they give are off; -1 where those are the same."""
    first = -np.divide(biases, scales)
    first = np.where(np.isinf(scales) & np.isinf(biases), -np.sign(biases) * np.sign(scales), first)
    best, best_error = first, np.full(len(scales), np.inf, np.float32)
    for side in (np.float32(np.inf), np.float32(-np.inf)):
        tried = first
        # The product's rounding leaves at most two neighbours to try.
        for _ in range(3):
            made = (-(tried * scales)).astype(native)
            error = np.abs(made.astype(np.float32) - biases)
            error[np.isnan(error)] = np.inf
            error[_is_same(made, biases.astype(native)) | np.isnan(scales)] = -1
            best = np.where(error < best_error, tried, best)
            best_error = np.minimum(error, best_error)
            tried = np.nextafter(tried, side)
    return best.astype(np.float32), best_error


def _is_same(made: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.bool_]:
    """Equal in every bit, or both NaN."""
    bits = f"u{made.itemsize}"
    same: NDArray[np.bool_] = (made.view(bits) == wanted.view(bits)) | (np.isnan(made) & np.isnan(wanted))
    return same
