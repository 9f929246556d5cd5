"""PyTorch's quantized embedding operators under their own names, on NumPy arrays.

Signatures, defaults and results are those of ``torch.ops.quantized``, bit for bit, with these differences, most of them
where the reference crashes or answers wrongly in silence:

- every input is checked before anything is read or written;
- `mode` counts: 0 sum, 1 mean, 2 max; the reference always sums;
- rows that are not finite, or whose scale or bias overflows, are refused, not quantized to NaN; codes never wrap;
- `per_sample_weights` may be float16 at 8 bits too, as at 4 and 2 in the reference;
- 1-D offsets mean the same at each width: ``offsets[0]`` may be above 0, and with `include_last_offset` the last one
  below ``len(indices)``;
- 2-D indices take no offsets, and `include_last_offset` is ignored with them; the reference's 8-bit operator drops the
  last bag there;
- `embedding_byte` and `embedding_4bit` with ``pruned_weights=True`` need a table that carries a mapping;
- a table may have a dim that does not fill its last byte (4 and 2 bits); its lookups return `dim` elements, not those
  of the padding. Prepack, as in the reference, takes whole bytes only;
- a table of another width is refused; the reference's 8-bit operator reads its bytes as 8-bit codes;
- the bag operators also take ``out=`` (in the reference, their ``_out`` forms);
- `embedding_bag_byte_prepack_meta` says uint8; the reference's says `weight`'s type;
- a packed table may have any layout of rows (`QuantizedTable`), not only PyTorch's;
- ``embedding_bag_2bit`` and ``embedding_2bit`` are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arguments, _errors, _handle
from ._handle import (
    embedding_2bit,
    embedding_4bit,
    embedding_bag_2bit,
    embedding_bag_2bit_rowwise_offsets,
    embedding_bag_4bit,
    embedding_bag_4bit_rowwise_offsets,
    embedding_bag_byte,
    embedding_bag_byte_rowwise_offsets,
    embedding_byte,
)
from .layout import RowLayout, of_rows, packed_layout, smallest
from .quantize import GREEDY_BINS, GREEDY_RATIO, pack_rows
from .table import QuantizedTable

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import ArrayLike, NDArray

    _Meta: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]

# The search takes time in proportion: more is a mistake, or an attack.
MAX_BINS = 1_000_000

for _operator in (
    embedding_2bit,
    embedding_4bit,
    embedding_bag_2bit,
    embedding_bag_2bit_rowwise_offsets,
    embedding_bag_4bit,
    embedding_bag_4bit_rowwise_offsets,
    embedding_bag_byte,
    embedding_bag_byte_rowwise_offsets,
    embedding_byte,
):
    _operator.__module__ = __name__  # where users import them from
del _operator


# ---- Prepack -------------------------------------------------------------------------------------------------------


def _floats_to_pack(weight: object, bits: int) -> NDArray[Any]:
    array = _arguments.floats(weight, "weight", allow_double=False)
    if bits == 8:
        if array.ndim == 0 or array.shape[-1] == 0:
            raise ValueError(f"weight must have rows of one element or more, got {_errors.kind_of(array)}")
        return array
    multiple = smallest(bits).codes_per_byte
    if array.ndim != 2 or array.shape[1] == 0 or array.shape[1] % multiple:
        raise ValueError(
            f"weight must have 2 dimensions and rows of a multiple of {multiple} elements, got {_errors.kind_of(array)}"
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
        raise ValueError(f"nbins must be from 1 to {MAX_BINS}, got {_errors.shown(num_bins)}")
    bounds = None
    if has_bounds:
        bounds = _arguments.floats(rowwise_min_max, "rowwise_min_max", allow_double=False)
        if bounds.shape != (len(rows), 2):
            raise ValueError(f"rowwise_min_max must have shape ({len(rows)}, 2), got {_errors.kind_of(bounds)}")
    packed = pack_rows(
        rows,
        RowLayout(bits, rows.shape[1]),
        "weight",
        bounds=bounds,
        method="greedy" if _arguments.flag(optimized_qparams, "optimized_qparams") else "minmax",
        num_bins=num_bins,
        ratio=_arguments.share(ratio, "ratio"),
    )
    return packed.reshape(*array.shape[:-1], packed.shape[1])


def embedding_bag_byte_prepack(weight: ArrayLike) -> NDArray[np.uint8]:
    """Quantize rows of floats to 8 bits: ``quantized::embedding_bag_byte_prepack``.

    Parameters
    ----------
    weight : array_like of float32 or float16, shape (..., dim)

    Returns
    -------
    ndarray of uint8, shape (..., dim + 8)

    Raises
    ------
    TypeError
        If `weight` has another type; float64 too.
    ValueError
        If rows are empty, or one holds a NaN, an infinity, or values whose scale and bias are not finite. There the
        reference returns rows of NaN.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> qembag.ops.embedding_bag_byte_prepack(np.eye(2, dtype=np.float32))[0, :2]
    array([255,   0], dtype=uint8)
    """
    return _pack(weight, 8)


def embedding_bag_byte_prepack_with_rowwise_min_max(weight: ArrayLike, rowwise_min_max: ArrayLike) -> NDArray[np.uint8]:
    """The same with bounds that are given: ``quantized::embedding_bag_byte_prepack_with_rowwise_min_max``.

    Parameters
    ----------
    weight : array_like of float32 or float16, shape (..., dim)
    rowwise_min_max : array_like of float32 or float16, shape (num_rows, 2)
        The minimum and maximum to use for each row.

    Returns
    -------
    ndarray of uint8, shape (..., dim + 8)
        Values beyond the bounds get the nearest code; the reference lets some wrap around.

    Raises
    ------
    TypeError, ValueError
        As for `embedding_bag_byte_prepack`, and if `rowwise_min_max` has a wrong type or shape.
    """
    return _pack(weight, 8, rowwise_min_max, True)


def embedding_bag_4bit_prepack(
    weight: ArrayLike, optimized_qparams: bool = False, nbins: int = GREEDY_BINS, ratio: float = GREEDY_RATIO
) -> NDArray[np.uint8]:
    """Quantize rows of floats to 4 bits: ``quantized::embedding_bag_4bit_prepack``.

    Parameters
    ----------
    weight : array_like of float32 or float16, shape (num_rows, dim), dim a multiple of 2
    optimized_qparams : bool
        Search for a narrower range with less error (``method="greedy"`` of `qembag.quantize`).
    nbins : int
        Steps that the search divides the range into, from 1 to 1,000,000.
    ratio : float
        Share of the range that the search may give up, from 0 to 1.

    Returns
    -------
    ndarray of uint8, shape (num_rows, dim / 2 + 4)

    Raises
    ------
    TypeError
        If `weight` has another type; float64 too.
    ValueError
        If a shape or an option is wrong, or a row holds a NaN, an infinity, or values whose scale and bias are not
        finite as float16. There the reference returns rows of NaN.
    """
    return _pack(weight, 4, None, False, optimized_qparams, nbins, ratio)


def embedding_bag_4bit_prepack_with_rowwise_min_max(
    weight: ArrayLike,
    rowwise_min_max: ArrayLike,
    optimized_qparams: bool = False,
    nbins: int = GREEDY_BINS,
    ratio: float = GREEDY_RATIO,
) -> NDArray[np.uint8]:
    """The same with bounds that are given: ``quantized::embedding_bag_4bit_prepack_with_rowwise_min_max``.

    Parameters
    ----------
    rowwise_min_max : array_like of float32 or float16, shape (num_rows, 2)
        The minimum and maximum to use for each row; ignored with `optimized_qparams`.
    weight, optimized_qparams, nbins, ratio
        As for `embedding_bag_4bit_prepack`.

    Returns
    -------
    ndarray of uint8, shape (num_rows, dim / 2 + 4)

    Raises
    ------
    TypeError, ValueError
        As for `embedding_bag_4bit_prepack`, and if `rowwise_min_max` has a wrong type or shape.
    """
    return _pack(weight, 4, rowwise_min_max, True, optimized_qparams, nbins, ratio)


def embedding_bag_2bit_prepack(
    weight: ArrayLike, optimized_qparams: bool = False, nbins: int = GREEDY_BINS, ratio: float = GREEDY_RATIO
) -> NDArray[np.uint8]:
    """Quantize rows of floats to 2 bits: ``quantized::embedding_bag_2bit_prepack``.

    Parameters
    ----------
    weight : array_like of float32 or float16, shape (num_rows, dim), dim a multiple of 4
    optimized_qparams : bool
        Search for a narrower range with less error (``method="greedy"`` of `qembag.quantize`).
    nbins : int
        Steps that the search divides the range into, from 1 to 1,000,000.
    ratio : float
        Share of the range that the search may give up, from 0 to 1.

    Returns
    -------
    ndarray of uint8, shape (num_rows, dim / 4 + 4)

    Raises
    ------
    TypeError
        If `weight` has another type; float64 too.
    ValueError
        If a shape or an option is wrong, or a row holds a NaN, an infinity, or values whose scale and bias are not
        finite as float16. There the reference returns rows of NaN.
    """
    return _pack(weight, 2, None, False, optimized_qparams, nbins, ratio)


def embedding_bag_2bit_prepack_with_rowwise_min_max(
    weight: ArrayLike,
    rowwise_min_max: ArrayLike,
    optimized_qparams: bool = False,
    nbins: int = GREEDY_BINS,
    ratio: float = GREEDY_RATIO,
) -> NDArray[np.uint8]:
    """The same with bounds that are given: ``quantized::embedding_bag_2bit_prepack_with_rowwise_min_max``.

    Parameters
    ----------
    rowwise_min_max : array_like of float32 or float16, shape (num_rows, 2)
        The minimum and maximum to use for each row; ignored with `optimized_qparams`.
    weight, optimized_qparams, nbins, ratio
        As for `embedding_bag_2bit_prepack`.

    Returns
    -------
    ndarray of uint8, shape (num_rows, dim / 4 + 4)

    Raises
    ------
    TypeError, ValueError
        As for `embedding_bag_2bit_prepack`, and if `rowwise_min_max` has a wrong type or shape.
    """
    return _pack(weight, 2, rowwise_min_max, True, optimized_qparams, nbins, ratio)


# ---- Unpack --------------------------------------------------------------------------------------------------------


def _packed_to_unpack(weight: object, bits: int) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Packed rows, and the shape of their values."""
    array = _arguments.as_array(weight, "weight")
    if array.dtype != np.uint8:
        raise TypeError(f"weight must be an array of uint8, got {_errors.kind_of(array)}")
    pairs_bytes = smallest(bits).pairs_bytes
    right_ndim = array.ndim >= 1 if bits == 8 else array.ndim == 2
    if not right_ndim or array.shape[-1] < pairs_bytes:
        dimensions = "1 dimension or more" if bits == 8 else "2 dimensions"
        raise ValueError(
            f"weight must have {dimensions} and rows of {pairs_bytes} bytes or more, got {_errors.kind_of(array)}"
        )
    layout = packed_layout(bits, array.shape[-1])
    # Not (*shape, dim), of which CPython 3.11 loses a list where no memory is left for the tuple.
    return array, array.shape[:-1] + (0 if layout is None else layout.dim,)  # noqa: RUF005


def _unpack(weight: object, bits: int) -> NDArray[np.float32]:
    array, shape = _packed_to_unpack(weight, bits)
    if shape[-1] == 0:
        return np.empty(shape, dtype=np.float32)
    rows = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
    handle = _handle.TableHandle(rows, RowLayout(bits, shape[-1]), None)
    return _handle.dequantize(handle, None, None).reshape(shape)


def embedding_bag_byte_unpack(weight: ArrayLike) -> NDArray[np.float32]:
    """The values of packed 8-bit rows, ``fma(code, scale, bias)``: ``quantized::embedding_bag_byte_unpack``.

    Parameters
    ----------
    weight : array_like of uint8, shape (..., row_bytes)

    Returns
    -------
    ndarray of float32, shape (..., row_bytes - 8)

    Raises
    ------
    TypeError, ValueError
        If `weight` is not uint8 or has a wrong shape.
    """
    return _unpack(weight, 8)


def embedding_bag_4bit_unpack(weight: ArrayLike) -> NDArray[np.float32]:
    """The values of packed 4-bit rows, ``fma(code, scale, bias)``: ``quantized::embedding_bag_4bit_unpack``.

    Parameters
    ----------
    weight : array_like of uint8, shape (num_rows, row_bytes)

    Returns
    -------
    ndarray of float32, shape (num_rows, 2 * (row_bytes - 4))

    Raises
    ------
    TypeError, ValueError
        If `weight` is not uint8 or has a wrong shape.
    """
    return _unpack(weight, 4)


def embedding_bag_2bit_unpack(weight: ArrayLike) -> NDArray[np.float32]:
    """The values of packed 2-bit rows, ``fma(code, scale, bias)``: ``quantized::embedding_bag_2bit_unpack``.

    Parameters
    ----------
    weight : array_like of uint8, shape (num_rows, row_bytes)

    Returns
    -------
    ndarray of float32, shape (num_rows, 4 * (row_bytes - 4))

    Raises
    ------
    TypeError, ValueError
        If `weight` is not uint8 or has a wrong shape.
    """
    return _unpack(weight, 2)


# ---- Per-channel quantized tensors ---------------------------------------------------------------------------------


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
        If an array has a wrong type or shape; if a code is too large; if a scale or a bias is not finite, or beyond
        what its row can hold.
    """
    bits = _arguments.bits(bits)
    array = _arguments.as_array(codes, "codes")
    if array.dtype != np.uint8 and not (_arguments.is_plain_python(codes) and array.dtype.kind == "i"):
        raise TypeError(f"codes must be an array of uint8, got {_errors.kind_of(array)}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"codes must have 2 dimensions and a dim of 1 or more, got {_errors.kind_of(array)}")
    # Not with 256: NumPy 2.0 frees what it never set where it compares an array with a number beyond its type.
    too_large = np.argwhere((array < 0) | (array > 2**bits - 1))
    if too_large.size:
        row, place = too_large[0]
        raise ValueError(
            f"codes[{row}, {place}] is {array[row, place]}: must be from 0 to {2**bits - 1} at {bits} bits"
        )
    num_rows, dim = array.shape
    layout = RowLayout(bits, dim)
    parts = []
    for name, value in (("scales", scales), ("zero_points", zero_points)):
        part = _arguments.floats(value, name, allow_double=True)
        if part.shape != (num_rows,):
            raise ValueError(f"{name} must have shape ({num_rows},), got {_errors.kind_of(part)}")
        parts.append(_arguments.as_float32(part).copy())
    pairs = _arguments.quietly(_pairs, *parts, layout.pair_dtype)
    wrong = np.flatnonzero(~np.isfinite(pairs).all(axis=1))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"scales[{row}] and zero_points[{row}] must give a scale and a bias that are finite as "
            f"{layout.scale_dtype.name}, got {parts[0][row]} and {parts[1][row]}"
        )
    table = QuantizedTable(layout.pack(array, pairs[:, None]), bits, dim=dim)
    table._per_channel = (parts[0], parts[1])
    return table


def _pairs(
    scales: NDArray[np.float32], zero_points: NDArray[np.float32], dtype: np.dtype[Any]
) -> NDArray[np.floating[Any]]:
    """Scale and bias of each row, as they are stored."""
    return np.stack([scales, -(zero_points * scales)], axis=1).astype(dtype)


def embedding_bag_unpack(packed: QuantizedTable) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """The parts that `embedding_bag_prepack` was given: ``quantized::embedding_bag_unpack``.

    Returns
    -------
    codes : ndarray of uint8, shape (num_rows, dim)
    scales, zero_points : ndarray of float32, shape (num_rows,)
        As they came, not as rounded in the rows.

    Raises
    ------
    TypeError, ValueError
        If `packed` is not a table that `embedding_bag_prepack` made, or if its rows have since got several groups.
    """
    if not isinstance(packed, QuantizedTable):
        raise TypeError(f"packed must be a QuantizedTable, got {_errors.kind_of(packed)}")
    if packed._per_channel is None:
        raise ValueError("packed must come from embedding_bag_prepack, got a table without zero points")
    if packed.layout.num_groups > 1:
        raise ValueError(f"packed must have one scale a row, got rows of {packed.layout.num_groups} groups")
    scales, zero_points = packed._per_channel
    return packed.codes(), scales.copy(), zero_points.copy()


# ---- Shapes without the work ---------------------------------------------------------------------------------------


def _bags_meta(weight: object, bits: int, indices: object, offsets: object, include_last_offset: object) -> _Meta:
    rows = _arguments.rows(weight, "weight")
    plain = _arguments.bag_indices(indices)
    last = _arguments.flag(include_last_offset, "include_last_offset")
    plain_offsets = _arguments.offsets(offsets, plain, last)
    num_bags = len(plain) if plain_offsets is None else len(plain_offsets) - int(last)
    return (num_bags, of_rows(rows.shape[1], bits, "weight").dim), np.dtype(np.float32)


def _prepack_meta(weight: object, bits: int) -> _Meta:
    shape = _floats_to_pack(weight, bits).shape
    return (*shape[:-1], RowLayout(bits, shape[-1]).row_bytes), np.dtype(np.uint8)


def embedding_bag_byte_rowwise_offsets_meta(
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
    """Shape and dtype of what `embedding_bag_byte_rowwise_offsets` would return; nothing is looked up."""
    return _bags_meta(weight, 8, indices, offsets, include_last_offset)


def embedding_bag_4bit_rowwise_offsets_meta(
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
    """Shape and dtype of what `embedding_bag_4bit_rowwise_offsets` would return; nothing is looked up."""
    return _bags_meta(weight, 4, indices, offsets, include_last_offset)


def embedding_bag_2bit_rowwise_offsets_meta(
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
    """Shape and dtype of what `embedding_bag_2bit_rowwise_offsets` would return; nothing is looked up."""
    return _bags_meta(weight, 2, indices, offsets, include_last_offset)


def embedding_bag_byte_prepack_meta(weight: ArrayLike) -> _Meta:
    """Shape and dtype of what `embedding_bag_byte_prepack` would return: uint8; the reference's says `weight`'s."""
    return _prepack_meta(weight, 8)


def embedding_bag_4bit_prepack_meta(
    weight: ArrayLike, optimized_qparams: bool = False, nbins: int = GREEDY_BINS, ratio: float = GREEDY_RATIO
) -> _Meta:
    """Shape and dtype of what `embedding_bag_4bit_prepack` would return; nothing is quantized."""
    return _prepack_meta(weight, 4)


def embedding_bag_2bit_prepack_meta(
    weight: ArrayLike, optimized_qparams: bool = False, nbins: int = GREEDY_BINS, ratio: float = GREEDY_RATIO
) -> _Meta:
    """Shape and dtype of what `embedding_bag_2bit_prepack` would return; nothing is quantized."""
    return _prepack_meta(weight, 2)


def embedding_bag_byte_unpack_meta(weight: ArrayLike) -> _Meta:
    """Shape and dtype of what `embedding_bag_byte_unpack` would return; nothing is unpacked."""
    return _packed_to_unpack(weight, 8)[1], np.dtype(np.float32)


def embedding_bag_4bit_unpack_meta(weight: ArrayLike) -> _Meta:
    """Shape and dtype of what `embedding_bag_4bit_unpack` would return; nothing is unpacked."""
    return _packed_to_unpack(weight, 4)[1], np.dtype(np.float32)


def embedding_bag_2bit_unpack_meta(weight: ArrayLike) -> _Meta:
    """Shape and dtype of what `embedding_bag_2bit_unpack` would return; nothing is unpacked."""
    return _packed_to_unpack(weight, 2)[1], np.dtype(np.float32)


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
