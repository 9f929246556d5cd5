"""Every argument check and every error text.

The kernels recognise arguments that are already what their loops take. Whatever they do not recognise comes
here, and is converted or refused with the argument's name, what it must be, and what came.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

try:
    from numpy.exceptions import TooHardError
except ImportError:  # NumPy 1.24
    from numpy import TooHardError  # type: ignore[attr-defined,no-redef]

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._kernels import _Fault

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BITS = (8, 4, 2)
TAIL_BYTES = {8: 8, 4: 4, 2: 4}
MODES = {"sum": 0, "mean": 1, "max": 2}
UINT8 = np.dtype(np.uint8)
INT64_MAX = np.iinfo(np.int64).max
# Telling whether two strided arrays share memory can take exponential time; past this effort they count as sharing.
MAX_OVERLAP_WORK = 100_000


def kind_of(value: object) -> str:
    """What came, for an error: an array's type and shape, or any other value's type."""
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str, bool)) else type(value).__name__


def as_array(value: object, name: str) -> Array:
    """What NumPy makes of it, without a subclass's ways; an error names the argument."""
    if type(value) is np.ndarray:
        return value
    if value is None:
        raise TypeError(f"{name} must be an array, got None")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got {type(value).__name__}")
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be an array, got {type(value).__name__}: {error}") from error


def as_float32(array: Array) -> Array:
    """In one piece; what is beyond float32 becomes an infinity, quietly: whoever minds looks for those."""
    with np.errstate(over="ignore"):
        return np.require(array, np.float32, ["C", "A"])


def is_plain_python(value: object) -> bool:
    """A list, a tuple or a number, whose type of element NumPy has chosen, not the caller."""
    if any(hasattr(value, name) for name in ("dtype", "__array__", "__array_interface__", "__array_struct__")):
        return False
    try:
        memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        return True
    return False


def whole_number(value: object, name: str) -> int:
    """Any object that is a whole number, as an int; booleans are not."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name} must be a whole number, got {kind_of(value)}")


def num_threads(value: object, name: str) -> int:
    number = whole_number(value, name)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return min(number, 2**31 - 1)


def bits(value: object) -> int:
    number = whole_number(value, "bits")
    if number not in BITS:
        raise ValueError(f"bits must be 8, 4 or 2, got {number}")
    return number


def flag(value: object, name: str) -> bool:
    """True or False, also as NumPy's and as 1 or 0."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, (int, np.integer)) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {kind_of(value)}")


def share(value: object, name: str) -> float:
    """A number from 0 to 1."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        if 0 <= value <= 1:
            return float(value)
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
    raise TypeError(f"{name} must be a number, got {kind_of(value)}")


def mode(value: object) -> int:
    """The number of a mode's name."""
    if not isinstance(value, str) or value not in MODES:
        raise ValueError(f"mode must be 'sum', 'mean' or 'max', got {value!r}")
    return MODES[value]


def is_half(dtype: object, out: object) -> bool:
    """Whether the output is float16: as asked for, else as `out` is, else float32."""
    if dtype is None:
        return out is not None and isinstance(out, np.ndarray) and out.dtype == np.float16
    try:
        kind = np.dtype(dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError, SyntaxError):  # NumPy reads "f4,(" as Python
        raise TypeError(f"dtype must be float32 or float16, got {dtype!r}") from None
    if kind not in (np.float32, np.float16):
        raise ValueError(f"dtype must be float32 or float16, got {kind}")
    return bool(kind == np.float16)


def padding_number(value: object, num_embeddings: int) -> int:
    """`padding_idx` counted from the start; -1 for none."""
    if value is None:
        return -1
    number = whole_number(value, "padding_idx")
    if not -num_embeddings <= number < num_embeddings:
        raise ValueError(
            f"padding_idx must be from {-num_embeddings} to {num_embeddings - 1} "
            f"for a table of {num_embeddings} embeddings, got {number}"
        )
    return number + num_embeddings if number < 0 else number


# ---- Tables ----------------------------------------------------------------------------------------------------


def rows(data: object, name: str) -> NDArray[np.uint8]:
    """Packed rows: a 2-D array of uint8 whose rows are contiguous, as it is; nothing is copied."""
    array = as_array(data, name)
    if array.dtype is not UINT8 and array.dtype != UINT8:  # comparing takes ten times as long as recognising
        raise TypeError(f"{name} must be an array of uint8, got {kind_of(array)}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, bytes of a row), got {kind_of(array)}")
    if array.shape[1] > 1 and array.strides[1] != 1 and array.size:
        raise ValueError(f"{name} must have the bytes of a row side by side, got strides {array.strides}")
    return array


def full_dim(row_bytes: int, bits: int, name: str) -> int:
    """As many elements as fit into a row."""
    codes_bytes = row_bytes - TAIL_BYTES[bits]
    if codes_bytes < 1:
        raise ValueError(
            f"{name} must have rows of at least {TAIL_BYTES[bits] + 1} bytes at {bits} bits "
            f"(codes, then {TAIL_BYTES[bits]} bytes of scale and bias), got rows of {row_bytes}"
        )
    return codes_bytes * (8 // bits)


def dim(value: object, row_bytes: int, bits: int) -> int:
    most = full_dim(row_bytes, bits, "data")
    if value is None:
        return most
    number = whole_number(value, "dim")
    least = most - 8 // bits + 1
    if not least <= number <= most:
        allowed = f"{most}" if least == most else f"from {least} to {most}"
        raise ValueError(f"dim must be {allowed} for rows of {row_bytes} bytes at {bits} bits, got {number}")
    return number


def mapping(value: object, *, check_rows: int | None = None) -> NDArray[np.int32] | None:
    """A pruning map in one piece; None for one of exactly [0], which means that nothing is pruned."""
    if value is None:
        return None
    name = "compressed_indices_mapping"
    array = as_array(value, name)
    if is_plain_python(value) and (array.dtype.kind == "i" or array.size == 0):
        narrow = array.astype(np.int32)
        wrong = np.flatnonzero(narrow != array)
        if wrong.size:
            raise IndexError(f"{name}[{wrong[0]}] is {array.flat[wrong[0]]}: must be -1 or the number of a row")
        array = narrow
    if array.dtype.newbyteorder("=") != np.int32:
        raise TypeError(f"{name} must be an array of int32, got {kind_of(array)}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got {kind_of(array)}")
    # A view of our own, as of the rows: nobody can reshape it under the table's feet.
    array = np.require(array, np.int32, ["C", "A"]).view()
    if array.size == 1 and array[0] == 0:
        return None
    return array if check_rows is None else checked_mapping(array, check_rows)


def checked_mapping(mapping: NDArray[np.int32], num_rows: int) -> NDArray[np.int32]:
    """The mapping, if each entry is -1 or the number of a row."""
    wrong = np.flatnonzero((mapping < -1) | (mapping >= num_rows))
    if wrong.size:
        raise IndexError(_bad_mapping(int(wrong[0]), int(mapping[wrong[0]]), num_rows))
    return mapping


# ---- Bags ------------------------------------------------------------------------------------------------------


def integers(value: object, name: str) -> Array:
    """An array of any integer type, of int32 or int64 in one piece and in the host's byte order."""
    array = as_array(value, name)
    if array.size == 0 and is_plain_python(value):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array of integers, got {kind_of(array)}")
    if array.dtype == np.uint64:
        # No row has a number beyond int64, and a fault's text takes the value from the caller's array.
        array = np.minimum(array, np.uint64(INT64_MAX))
    size = array.dtype.itemsize
    kind = np.int32 if array.dtype.kind == "i" and size == 4 else np.int64
    return np.require(array, kind, ["C", "A"])


def bag_indices(value: object) -> Array:
    array = integers(value, "indices")
    if array.ndim not in (1, 2):
        raise ValueError(f"indices must have 1 dimension (with offsets) or 2 (a row a bag), got {kind_of(array)}")
    return array


def offsets(value: object, indices: Array, include_last_offset: bool) -> Array | None:
    if indices.ndim == 2:
        if value is not None:
            raise ValueError("offsets must be None for indices of 2 dimensions, whose rows are the bags, got offsets")
        return None
    if value is None:
        raise ValueError("offsets must be given for indices of 1 dimension, got None")
    array = integers(value, "offsets")
    if array.ndim != 1:
        raise ValueError(f"offsets must have 1 dimension, got {kind_of(array)}")
    if include_last_offset and array.size == 0:
        raise ValueError("offsets must hold at least the end of the last bag with include_last_offset, got none")
    return array


def weights(value: object, indices: Array, mode: int) -> Array | None:
    if value is None:
        return None
    name = "per_sample_weights"
    if mode == MODES["max"]:
        raise ValueError(f"{name} must be None in mode 'max', got {kind_of(value)}")
    array = as_array(value, name)
    if is_plain_python(value) and array.dtype.kind in "fiu":
        array = as_float32(array)
    if array.dtype.newbyteorder("=") not in (np.float32, np.float16):
        raise TypeError(f"{name} must be an array of float32 or float16, got {kind_of(array)}")
    if array.shape != indices.shape:
        raise ValueError(f"{name} must have the shape of indices, {indices.shape}, got {array.shape}")
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A"])


def check_out(out: object, shape: tuple[int, ...], half: bool, inputs: dict[str, object]) -> None:
    if out is None:
        return
    dtype = np.dtype(np.float16 if half else np.float32)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array of {dtype}, got {kind_of(out)}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError("out must be an array without a mask, got MaskedArray")
    if out.dtype != dtype or out.shape != shape:
        raise ValueError(f"out must be a {dtype} array of shape {shape}, got {kind_of(out)}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if out.size == 0:
        return
    if out.shape[-1] > 1 and out.strides[-1] != dtype.itemsize:
        raise ValueError(f"out must have the elements of a row side by side, got strides {out.strides}")
    if _overlaps_itself(out):
        raise ValueError(f"out must have rows that lie apart, one after the other, got strides {out.strides}")
    check_apart(out, inputs)


def check_apart(out: Array, inputs: dict[str, object]) -> None:
    for name, value in inputs.items():
        if value is not None and _share_memory(out, np.asarray(value)):
            raise ValueError(f"out must share no memory with {name}, got an array that does")


def _overlaps_itself(array: Array) -> bool:
    """Whether two rows of an output lie on the same memory, or are too entangled to tell."""
    reach = array.shape[-1] * array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides[:-1], array.shape[:-1], strict=True)):
        if length > 1:
            if stride < reach:
                return True
            reach += stride * (length - 1)
    return False


def _share_memory(a: Array, b: Array) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=MAX_OVERLAP_WORK))  # type: ignore[arg-type]
    except TooHardError:
        return True


# ---- Floats to quantize ------------------------------------------------------------------------------------------


def floats(value: object, name: str, *, allow_double: bool) -> Array:
    """An array of floats, at any stride; lists become float32."""
    array = as_array(value, name)
    if is_plain_python(value) and array.dtype.kind in "fiu":
        array = as_float32(array)
    allowed = (np.float32, np.float16, np.float64) if allow_double else (np.float32, np.float16)
    if array.dtype.newbyteorder("=") not in allowed:
        names = ", ".join(np.dtype(kind).name for kind in allowed[:-1]) + f" or {np.dtype(allowed[-1]).name}"
        raise TypeError(f"{name} must be an array of {names}, got {kind_of(array)}")
    return array


def row_fault_error(what: str, row: int, bits: int, bounds: tuple[float, float], name: str = "weights") -> ValueError:
    low, high = bounds
    if what == "not finite":
        return ValueError(f"{name}[{row}] must be finite to be quantized, got a NaN or an infinity")
    tail = "float32" if bits == 8 else "float16"
    return ValueError(
        f"{name}[{row}] must have a minimum and a scale that its tail can hold as {tail} at {bits} bits, "
        f"got values from {low:g} to {high:g}"
    )


# ---- Faults that a kernel finds -------------------------------------------------------------------------------------


def _bad_mapping(position: int, row: int, num_rows: int, source: str = "") -> str:
    return (
        f"compressed_indices_mapping[{position}] is {row}{source}: "
        f"must be -1 or the number of a row, in a table of {num_rows} rows"
    )


def fault_error(
    fault: _Fault,
    *,
    indices: object,
    shape: tuple[int, ...],
    offsets: object,
    num_indices: int,
    num_rows: int,
    num_embeddings: int,
    bags: bool,
    name: str = "indices",
) -> Exception:
    """The error for what a kernel found. `indices` and `offsets` are the caller's, for values beyond int64."""
    where, position, bag, value, index_position = fault
    if where == "offsets":
        value = _as_it_came(offsets, (position,), value)
        if 0 <= value <= num_indices:
            return ValueError(f"offsets[{position}] is {value}: must not be below the offset before it")
        return ValueError(f"offsets[{position}] is {value}: must be from 0 to {num_indices}, the number of indices")
    place = tuple(int(i) for i in np.unravel_index(index_position, shape)) if shape else ()
    spot = f"{name}[{', '.join(map(str, place))}]" if place else name
    in_bag = f"bag {bag}" if bags else ""
    if where == "indices":
        value = _as_it_came(indices, place, value)
        holder = f"table of {num_rows} rows" if num_embeddings == num_rows else f"pruned table of {num_embeddings} rows"
        return IndexError(f"{spot} is {value}{f' ({in_bag})' if in_bag else ''}: out of range for a {holder}")
    if where == "compressed_indices_mapping":
        source = ", ".join(filter(None, [spot if place else "", in_bag]))
        return IndexError(_bad_mapping(position, value, num_rows, f" ({source})" if source else ""))
    return RuntimeError(f"{name}, offsets or compressed_indices_mapping changed while they were being looked up")


def _as_it_came(array: object, place: tuple[int, ...], value: int) -> int:
    return int(np.asarray(array)[place]) if value == INT64_MAX else value
