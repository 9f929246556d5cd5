"""PyTorch's quantized embedding operators under their own names, on NumPy arrays.

Signatures, defaults and results are those of ``torch.ops.quantized``, bit for bit, with these differences, each where
the reference crashes or answers wrongly in silence: every input is checked; `mode` is obeyed (0 sum, 1 mean, 2 max;
the reference always sums); a row that is not finite, or that its tail cannot hold, is not quantized but refused; codes
never wrap around. The bag operators also take ``out=``. ``embedding_bag_2bit`` and ``embedding_2bit`` are ours.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import _arguments
from ._calls import look_up_bags, look_up_rows
from .quantize import GREEDY_BINS, GREEDY_RATIO, pack_rows
from .table import QuantizedTable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from numpy.typing import ArrayLike, NDArray

    _Meta: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]

# The search takes time in proportion: more is a mistake, or an attack.
MAX_BINS = 1_000_000
NAMES = {8: "byte", 4: "4bit", 2: "2bit"}

Operator = TypeVar("Operator", bound="Callable[..., Any]")


def _named(operator: Operator, name: str, doc: str) -> Operator:
    """One function serves each width; under its own name a user finds it in tracebacks and in `help`."""
    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = cleandoc(doc)
    return operator


# ---- Bags ------------------------------------------------------------------------------------------------------


def _mode(mode: object) -> int:
    number = mode if type(mode) is int else _arguments.whole_number(mode, "mode")
    if number not in _arguments.MODES.values():
        raise ValueError(f"mode must be 0 (sum), 1 (mean) or 2 (max), got {_arguments.shown(number)}")
    return number


def _pruning_map(pruned_weights: object, mapping: object, out: object = None) -> NDArray[np.int32] | None:
    if pruned_weights is False or not _arguments.flag(pruned_weights, "pruned_weights"):
        return None
    if mapping is None:
        raise ValueError("compressed_indices_mapping must be given with pruned_weights=True, got None")
    return _arguments.mapping(mapping, out=out)


def _checked_rows(weight: object) -> NDArray[np.uint8]:
    return _arguments.rows(weight, "weight")


def _checked_table(weight: object, bits: int) -> QuantizedTable:
    if not isinstance(weight, QuantizedTable):
        raise TypeError(f"weight must be a QuantizedTable, got {_arguments.kind_of(weight)}")
    if weight._bits != bits:
        raise ValueError(f"weight must be a table of {bits} bits, got one of {weight._bits}")
    return weight


def _rowwise_offsets(bits: int) -> Callable[..., NDArray[np.float32]]:
    def operator(
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
    ) -> NDArray[np.float32]:
        rows = _checked_rows(weight)
        return look_up_bags(
            rows,
            bits,
            _arguments.full_dim(rows.shape[1], bits, "weight"),
            _pruning_map(pruned_weights, compressed_indices_mapping, out),
            indices,
            offsets,
            mode=_mode(mode),
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            out=out,
        )

    return _named(
        operator,
        f"embedding_bag_{NAMES[bits]}_rowwise_offsets",
        f"""Sums of bags of rows of a packed {bits}-bit array of uint8, shape (num_rows, row_bytes).

        ``quantized::embedding_bag_{NAMES[bits]}_rowwise_offsets``; arguments as for `qembag.embedding_bag`, with the
        reference's own: `mode` 0 sum, 1 mean, 2 max; `scale_grad_by_freq` has no effect; `compressed_indices_mapping`
        counts only with `pruned_weights`.

        Returns
        -------
        ndarray of float32, shape (num_bags, dim)
            `out`, where it is given.

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `qembag.embedding_bag`.
        """,
    )


def _packed_bags(bits: int) -> Callable[..., NDArray[np.float32]]:
    def operator(
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
    ) -> NDArray[np.float32]:
        table = _checked_table(weight, bits)
        if compressed_indices_mapping is None:
            compressed_indices_mapping = table._mapping
        return look_up_bags(
            table._data,
            bits,
            table._dim,
            _pruning_map(pruned_weights, compressed_indices_mapping, out),
            indices,
            offsets,
            mode=_mode(mode),
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            out=out,
        )

    return _named(
        operator,
        f"embedding_bag_{NAMES[bits]}",
        f"""Sums of bags of rows of a {bits}-bit `QuantizedTable`.

        ``quantized::embedding_bag_{NAMES[bits]}``; arguments as for `embedding_bag_{NAMES[bits]}_rowwise_offsets`. With
        `pruned_weights`, a `compressed_indices_mapping` that is given counts, else the table's own; without, the
        indices are numbers of stored rows.

        Returns
        -------
        ndarray of float32, shape (num_bags, dim)

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `qembag.embedding_bag`; ValueError for a table of another width.
        """,
    )


def _packed_rows(bits: int) -> Callable[..., NDArray[np.float32]]:
    def operator(weight: QuantizedTable, indices: ArrayLike, pruned_weights: bool = False) -> NDArray[np.float32]:
        table = _checked_table(weight, bits)
        mapping = _pruning_map(pruned_weights, table._mapping)
        return look_up_rows(table._data, bits, table._dim, mapping, indices)

    return _named(
        operator,
        f"embedding_{NAMES[bits]}",
        f"""Single rows of a {bits}-bit `QuantizedTable`: ``quantized::embedding_{NAMES[bits]}``.

        Returns
        -------
        ndarray of float32, shape indices.shape + (dim,)

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `qembag.embedding`; ValueError for a table of another width, or for `pruned_weights` where the table
            carries no mapping.
        """,
    )


# ---- Prepack and unpack --------------------------------------------------------------------------------------------


def _floats_to_pack(weight: object, bits: int) -> NDArray[Any]:
    array = _arguments.floats(weight, "weight", allow_double=False)
    if bits == 8:
        if array.ndim == 0 or array.shape[-1] == 0:
            raise ValueError(f"weight must have rows of one element or more, got {_arguments.kind_of(array)}")
    elif array.ndim != 2 or array.shape[1] == 0 or array.shape[1] % (8 // bits):
        raise ValueError(
            f"weight must have 2 dimensions and rows of a multiple of {8 // bits} elements, got {_arguments.kind_of(array)}"
        )
    return array


def _pack(
    weight: object,
    bits: int,
    rowwise_min_max: object = None,
    has_bounds: bool = False,
    optimized_qparams: object = False,
    nbins: object = GREEDY_BINS,
    ratio: float = GREEDY_RATIO,
) -> NDArray[np.uint8]:
    array = _floats_to_pack(weight, bits)
    rows = array.reshape(-1, array.shape[-1])
    num_bins = _arguments.whole_number(nbins, "nbins")
    if not 1 <= num_bins <= MAX_BINS:
        raise ValueError(f"nbins must be from 1 to {MAX_BINS}, got {_arguments.shown(num_bins)}")
    bounds = None
    if has_bounds:
        bounds = _arguments.floats(rowwise_min_max, "rowwise_min_max", allow_double=False)
        if bounds.shape != (len(rows), 2):
            raise ValueError(f"rowwise_min_max must have shape ({len(rows)}, 2), got {_arguments.kind_of(bounds)}")
    packed = pack_rows(
        rows,
        bits,
        "weight",
        bounds=bounds,
        greedy=_arguments.flag(optimized_qparams, "optimized_qparams"),
        num_bins=num_bins,
        ratio=_arguments.share(ratio, "ratio"),
    )
    return packed.reshape(*array.shape[:-1], packed.shape[1])


_PACK_DOC = """Quantize rows of floats: ``quantized::{name}``.

Parameters
----------
weight : array_like of float32 or float16, {shape}
{parameters}
Returns
-------
ndarray of uint8, {result}

Raises
------
TypeError
    If an array has another type; float64 too.
ValueError
    If a shape is wrong, or a row holds a NaN, an infinity, or values that its scale and bias cannot hold. There the
    reference returns rows of NaN.
"""
_BOUNDS_DOC = """rowwise_min_max : array_like of float32 or float16, shape (num_rows, 2)
    The minimum and maximum to use for each row; ignored with `optimized_qparams`.
"""
_GREEDY_DOC = """optimized_qparams : bool
    Search for a narrower range with less error (``method="greedy"`` of `qembag.quantize`).
nbins : int
    Steps that the search divides the range into, from 1 to 1,000,000.
ratio : float
    Share of the range that the search may give up, from 0 to 1.
"""


def _prepack_doc(name: str, bits: int, bounds: bool) -> str:
    shape = "of any shape" if bits == 8 else f"shape (num_rows, dim), dim a multiple of {8 // bits}"
    result = "the last axis 8 longer" if bits == 8 else f"shape (num_rows, dim / {8 // bits} + 4)"
    parameters = (_BOUNDS_DOC if bounds else "") + ("" if bits == 8 else _GREEDY_DOC) + "\n"
    return _PACK_DOC.format(name=name, shape=shape, parameters=parameters.lstrip("\n"), result=result)


def _prepack(bits: int) -> Callable[..., NDArray[np.uint8]]:
    def operator(
        weight: ArrayLike, optimized_qparams: bool = False, nbins: int = GREEDY_BINS, ratio: float = GREEDY_RATIO
    ) -> NDArray[np.uint8]:
        return _pack(weight, bits, None, False, optimized_qparams, nbins, ratio)

    name = f"embedding_bag_{NAMES[bits]}_prepack"
    return _named(operator, name, _prepack_doc(name, bits, False))


def _prepack_with_bounds(bits: int) -> Callable[..., NDArray[np.uint8]]:
    def operator(
        weight: ArrayLike,
        rowwise_min_max: ArrayLike,
        optimized_qparams: bool = False,
        nbins: int = GREEDY_BINS,
        ratio: float = GREEDY_RATIO,
    ) -> NDArray[np.uint8]:
        return _pack(weight, bits, rowwise_min_max, True, optimized_qparams, nbins, ratio)

    name = f"embedding_bag_{NAMES[bits]}_prepack_with_rowwise_min_max"
    return _named(operator, name, _prepack_doc(name, bits, True))


def embedding_bag_byte_prepack(weight: ArrayLike) -> NDArray[np.uint8]:
    return _pack(weight, 8)


def embedding_bag_byte_prepack_with_rowwise_min_max(weight: ArrayLike, rowwise_min_max: ArrayLike) -> NDArray[np.uint8]:
    return _pack(weight, 8, rowwise_min_max, True)


def _packed_to_unpack(weight: object, bits: int) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Packed rows in one piece, and the shape of their values."""
    array = _arguments.as_array(weight, "weight")
    if array.dtype != np.uint8:
        raise TypeError(f"weight must be an array of uint8, got {_arguments.kind_of(array)}")
    tail = _arguments.TAIL_BYTES[bits]
    right_ndim = array.ndim >= 1 if bits == 8 else array.ndim == 2
    if not right_ndim or array.shape[-1] < tail:
        dimensions = "1 dimension or more" if bits == 8 else "2 dimensions"
        raise ValueError(
            f"weight must have {dimensions} and rows of {tail} bytes or more, got {_arguments.kind_of(array)}"
        )
    return array, (*array.shape[:-1], (array.shape[-1] - tail) * (8 // bits))


def _unpack(bits: int) -> Callable[[ArrayLike], NDArray[np.float32]]:
    def operator(weight: ArrayLike) -> NDArray[np.float32]:
        array, shape = _packed_to_unpack(weight, bits)
        if shape[-1] == 0:
            return np.empty(shape, dtype=np.float32)
        rows = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
        return look_up_rows(rows, bits, shape[-1], None, None, dequantize=True).reshape(shape)

    return _named(
        operator,
        f"embedding_bag_{NAMES[bits]}_unpack",
        f"""The values of packed {bits}-bit rows: ``quantized::embedding_bag_{NAMES[bits]}_unpack``.

        ``fma(code, scale, bias)`` in float32.

        Returns
        -------
        ndarray of float32, the last axis as long as a row has elements

        Raises
        ------
        TypeError, ValueError
            If `weight` is not uint8 or has a wrong shape.
        """,
    )


def _write_tail(tail: NDArray[Any], scales: NDArray[np.float32], zero_points: NDArray[np.float32]) -> None:
    tail[:, 0] = scales
    tail[:, 1] = -(zero_points * scales)


def embedding_bag_prepack(codes: ArrayLike, scales: ArrayLike, zero_points: ArrayLike, bits: int) -> QuantizedTable:
    """Pack a per-channel quantized tensor, given by its parts: ``quantized::embedding_bag_prepack``.

    Parameters
    ----------
    codes : array_like of uint8, shape (num_rows, dim)
        One code an element (``int_repr()`` of the tensor), below ``2 ** bits``.
    scales, zero_points : array_like of floats, shape (num_rows,)
        Of each row; used as float32.
    bits : {8, 4, 2}

    Returns
    -------
    QuantizedTable
        With ``bias = -zero_point * scale``; scale and bias are rounded to float16 at 4 and 2 bits.

    Raises
    ------
    TypeError, ValueError
        If an array has a wrong type or shape; if a code is too large; if a scale or a bias is not finite, or beyond what
        its row can hold.
    """
    bits = _arguments.bits(bits)
    array = _arguments.as_array(codes, "codes")
    if array.dtype != np.uint8 and not (_arguments.is_plain_python(codes) and array.dtype.kind == "i"):
        raise TypeError(f"codes must be an array of uint8, got {_arguments.kind_of(array)}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"codes must have 2 dimensions and a dim of 1 or more, got {_arguments.kind_of(array)}")
    too_large = np.argwhere((array < 0) | (array >= 2**bits))
    if too_large.size:
        row, place = too_large[0]
        raise ValueError(
            f"codes[{row}, {place}] is {array[row, place]}: must be from 0 to {2**bits - 1} at {bits} bits"
        )
    num_rows, dim = array.shape
    parts = []
    for name, value in (("scales", scales), ("zero_points", zero_points)):
        part = _arguments.floats(value, name, allow_double=True)
        if part.shape != (num_rows,):
            raise ValueError(f"{name} must have shape ({num_rows},), got {_arguments.kind_of(part)}")
        parts.append(_arguments.as_float32(part).copy())
    tail_type = np.dtype("<f4") if bits == 8 else np.dtype("<f2")
    tail = np.empty((num_rows, 2), dtype=tail_type)
    _arguments.quietly(_write_tail, tail, *parts)
    wrong = np.flatnonzero(~np.isfinite(tail).all(axis=1))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"scales[{row}] and zero_points[{row}] must give a scale and a bias that are finite as {tail_type.name}, "
            f"got {parts[0][row]} and {parts[1][row]}"
        )
    codes_bytes = -(-dim * bits // 8)
    packed = np.zeros((num_rows, codes_bytes + 2 * tail_type.itemsize), dtype=np.uint8)
    for place in range(8 // bits):
        some = array[:, place :: 8 // bits].astype(np.uint8)
        packed[:, : some.shape[1]] |= some << np.uint8(place * bits)
    packed[:, codes_bytes:] = tail.view(np.uint8)
    table = QuantizedTable(packed, bits, dim=dim)
    table._per_channel = (parts[0], parts[1])
    return table


def embedding_bag_unpack(packed: QuantizedTable) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """The parts that `embedding_bag_prepack` was given: ``quantized::embedding_bag_unpack``.

    Returns
    -------
    codes : ndarray of uint8, shape (num_rows, dim)
    scales, zero_points : ndarray of float32, shape (num_rows,)
        As they came, not as the rows' tails round them.

    Raises
    ------
    TypeError, ValueError
        If `packed` is not a table that `embedding_bag_prepack` made.
    """
    if not isinstance(packed, QuantizedTable):
        raise TypeError(f"packed must be a QuantizedTable, got {_arguments.kind_of(packed)}")
    if packed._per_channel is None:
        raise ValueError("packed must come from embedding_bag_prepack, got a table without zero points")
    scales, zero_points = packed._per_channel
    return packed.codes(), scales.copy(), zero_points.copy()


# ---- Shapes without the work ---------------------------------------------------------------------------------------


def _rowwise_offsets_meta(bits: int) -> Callable[..., _Meta]:
    def operator(
        weight: ArrayLike,
        indices: ArrayLike,
        offsets: ArrayLike | None = None,
        scale_grad_by_freq: bool = False,
        mode: int = 0,
        pruned_weights: bool = False,
        per_sample_weights: ArrayLike | None = None,
        compressed_indices_mapping: ArrayLike | None = None,
        include_last_offset: bool = False,
    ) -> _Meta:
        rows = _checked_rows(weight)
        plain = _arguments.bag_indices(indices)
        last = _arguments.flag(include_last_offset, "include_last_offset")
        plain_offsets = _arguments.offsets(offsets, plain, last)
        num_bags = len(plain) if plain_offsets is None else len(plain_offsets) - int(last)
        return (num_bags, _arguments.full_dim(rows.shape[1], bits, "weight")), np.dtype(np.float32)

    of = f"embedding_bag_{NAMES[bits]}_rowwise_offsets"
    return _named(operator, f"{of}_meta", f"Shape and dtype of what `{of}` would return; nothing is looked up.")


def _prepack_meta(bits: int) -> Callable[..., _Meta]:
    def operator(
        weight: ArrayLike, optimized_qparams: bool = False, nbins: int = GREEDY_BINS, ratio: float = GREEDY_RATIO
    ) -> _Meta:
        shape = _floats_to_pack(weight, bits).shape
        return (*shape[:-1], shape[-1] * bits // 8 + _arguments.TAIL_BYTES[bits]), np.dtype(np.uint8)

    of = f"embedding_bag_{NAMES[bits]}_prepack"
    return _named(operator, f"{of}_meta", f"Shape and dtype of what `{of}` would return; nothing is quantized.")


def embedding_bag_byte_prepack_meta(weight: ArrayLike) -> _Meta:
    """Shape and dtype of what `embedding_bag_byte_prepack` would return: uint8, where the reference's says `weight`'s."""
    return _byte_prepack_meta(weight)


def _unpack_meta(bits: int) -> Callable[[ArrayLike], _Meta]:
    def operator(weight: ArrayLike) -> _Meta:
        return _packed_to_unpack(weight, bits)[1], np.dtype(np.float32)

    of = f"embedding_bag_{NAMES[bits]}_unpack"
    return _named(operator, f"{of}_meta", f"Shape and dtype of what `{of}` would return; nothing is unpacked.")


# ---- The names ------------------------------------------------------------------------------------------------------


embedding_bag_byte_rowwise_offsets = _rowwise_offsets(8)
embedding_bag_4bit_rowwise_offsets = _rowwise_offsets(4)
embedding_bag_2bit_rowwise_offsets = _rowwise_offsets(2)
embedding_bag_byte = _packed_bags(8)
embedding_bag_4bit = _packed_bags(4)
embedding_bag_2bit = _packed_bags(2)
embedding_byte = _packed_rows(8)
embedding_4bit = _packed_rows(4)
embedding_2bit = _packed_rows(2)
embedding_bag_byte_prepack.__doc__ = cleandoc(_prepack_doc("embedding_bag_byte_prepack", 8, False))
embedding_bag_4bit_prepack = _prepack(4)
embedding_bag_2bit_prepack = _prepack(2)
embedding_bag_byte_prepack_with_rowwise_min_max.__doc__ = cleandoc(
    _prepack_doc("embedding_bag_byte_prepack_with_rowwise_min_max", 8, True)
)
embedding_bag_4bit_prepack_with_rowwise_min_max = _prepack_with_bounds(4)
embedding_bag_2bit_prepack_with_rowwise_min_max = _prepack_with_bounds(2)
embedding_bag_byte_unpack = _unpack(8)
embedding_bag_4bit_unpack = _unpack(4)
embedding_bag_2bit_unpack = _unpack(2)
embedding_bag_byte_rowwise_offsets_meta = _rowwise_offsets_meta(8)
embedding_bag_4bit_rowwise_offsets_meta = _rowwise_offsets_meta(4)
embedding_bag_2bit_rowwise_offsets_meta = _rowwise_offsets_meta(2)
_byte_prepack_meta = _prepack_meta(8)
embedding_bag_4bit_prepack_meta = _prepack_meta(4)
embedding_bag_2bit_prepack_meta = _prepack_meta(2)
embedding_bag_byte_unpack_meta = _unpack_meta(8)
embedding_bag_4bit_unpack_meta = _unpack_meta(4)
embedding_bag_2bit_unpack_meta = _unpack_meta(2)

__all__ = [
    "embedding_2bit",
    "embedding_4bit",
    "embedding_bag_2bit",
    "embedding_bag_2bit_prepack",
    "embedding_bag_2bit_prepack_meta",
    "embedding_bag_2bit_prepack_with_rowwise_min_max",
    "embedding_bag_2bit_rowwise_offsets",
    "embedding_bag_2bit_rowwise_offsets_meta",
    "embedding_bag_2bit_unpack",
    "embedding_bag_2bit_unpack_meta",
    "embedding_bag_4bit",
    "embedding_bag_4bit_prepack",
    "embedding_bag_4bit_prepack_meta",
    "embedding_bag_4bit_prepack_with_rowwise_min_max",
    "embedding_bag_4bit_rowwise_offsets",
    "embedding_bag_4bit_rowwise_offsets_meta",
    "embedding_bag_4bit_unpack",
    "embedding_bag_4bit_unpack_meta",
    "embedding_bag_byte",
    "embedding_bag_byte_prepack",
    "embedding_bag_byte_prepack_meta",
    "embedding_bag_byte_prepack_with_rowwise_min_max",
    "embedding_bag_byte_rowwise_offsets",
    "embedding_bag_byte_rowwise_offsets_meta",
    "embedding_bag_byte_unpack",
    "embedding_bag_byte_unpack_meta",
    "embedding_bag_prepack",
    "embedding_bag_unpack",
    "embedding_byte",
]
