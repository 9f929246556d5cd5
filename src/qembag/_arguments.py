"""Every conversion and every check of an argument, on the slow path.

`_handle` recognizes arguments that the loops can take as they are. All others come here, and are converted, or refused
with the argument's name, what it must be, and what came.
"""

from __future__ import annotations

import contextvars
import math
import operator
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from . import _dlpack
from ._errors import INT64_MAX, bad_mapping, kind_of, shown

try:
    from numpy.exceptions import TooHardError
except ImportError:  # NumPy 1.24
    from numpy import TooHardError  # type: ignore[attr-defined,no-redef]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

Result = TypeVar("Result")
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Arrays that an output must share no memory with, as errors name them.
Inputs: TypeAlias = Iterable[tuple[str, Array | None]]

BITS = (8, 4, 2)
MODES = {"sum": 0, "mean": 1, "max": 2, "average": 3, "sqrtn": 4}
# As loops.pxd numbers them.
METHODS = {"minmax": 0, "greedy": 1, "lsq": 2}
# As PyTorch's operators number them.
OPERATOR_MODES = (0, 1, 2)
UINT8 = np.dtype(np.uint8)
UINT16 = np.dtype(np.uint16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
# Telling whether two strided arrays share memory can take exponential time; past this effort they count as sharing.
MAX_OVERLAP_WORK = 100_000
# Entries of a mapping that are checked at a time.
ENTRIES_AT_ONCE = 1 << 20


def as_array(value: object, name: str) -> Array:
    """What NumPy makes of it, without a subclass's ways; an error names the argument.

    It is a view of our own. Who else has the array may give it another shape or type in place, in another thread or in
    a method that the next argument's conversion calls; what was checked stays as it was. For the same reason an
    argument is converted once: its `__array__` may answer differently the next time.
    """
    if type(value) is np.ndarray:
        return value.view()
    if value is None:
        raise TypeError(f"{name} must be an array, got None")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got {type(value).__name__}")
    try:
        return _dlpack.array_of(value).view()
    except (MemoryError, RecursionError):
        raise  # of the process, not of this value
    except Exception as error:
        raise _no_array(value, name, error) from error


def _no_array(value: object, name: str, error: Exception) -> Exception:
    # Not of the error's own type, which may be made of other arguments, as UnicodeDecodeError is.
    kind = ValueError if isinstance(error, ValueError) else TypeError
    return kind(f"{name} must be an array, got {_why_not(value, name, error)}")


def _why_not(value: object, name: str, error: Exception) -> str:
    """What came that NumPy makes no array of, and what to do about it."""
    if isinstance(value, (list, tuple)) and _is_ragged(value):
        hint = "; bags of different lengths are one flat list and offsets: indices=[1, 2, 3], offsets=[0, 2]"
        return f"a {type(value).__name__} of rows of different lengths{hint if name == 'indices' else ''}"
    if "requires grad" in str(error):
        return f"a {type(value).__name__} that requires grad: pass {name}.detach()"
    device = _dlpack.device_of(value)
    if device:
        return f"a {type(value).__name__} on device {device}: copy it to the CPU first"
    return f"{type(value).__name__}: {error}"


def _is_ragged(value: Sequence[object]) -> bool:
    """Whether it holds lists of different lengths, or lists beside numbers."""
    return len({len(item) if isinstance(item, (list, tuple, np.ndarray)) else -1 for item in value}) > 1


def _ignoring(call: Callable[..., Result], *arguments: Any) -> Result:
    with np.errstate(over="ignore", invalid="ignore"):
        return call(*arguments)


def quietly(call: Callable[..., Result], *arguments: Any) -> Result:
    """What a call gives, with no warnings of floats that overflow or are invalid. Callers that care check for those.

    In a context of its own, which is where NumPy from 2.0 on keeps that setting: where memory runs out,
    `numpy.errstate` does not put it back.
    """
    return contextvars.copy_context().run(_ignoring, call, *arguments)


def as_float32(array: Array) -> NDArray[np.float32]:
    """In one piece; what is beyond float32 becomes an infinity."""
    if is_bfloat16(array.dtype):
        # Exact: a bfloat16 is the upper half of a float32. No package that knows the type is needed.
        return (array.view(np.uint16).astype(np.uint32, order="C") << np.uint32(16)).view(np.float32)
    return quietly(np.require, array, np.float32, ["C", "A"])


def is_plain_python(value: object) -> bool:
    """A list, a tuple or a number, whose type of element NumPy has chosen, not the caller."""
    for name in ("dtype", "__dlpack__", *_dlpack.NUMPY_PROTOCOLS):
        if hasattr(value, name):
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
        raise ValueError(f"{name} must be at least 1, got {shown(number)}")
    return min(number, 2**31 - 1)


def bits(value: object) -> int:
    number = whole_number(value, "bits")
    if number not in BITS:
        raise ValueError(f"bits must be 8, 4 or 2, got {shown(number)}")
    return number


def flag(value: object, name: str) -> bool:
    """True or False, also as NumPy's and as 1 or 0."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        number = operator.index(value)  # a subclass may compare as it likes
        if number in (0, 1):
            return number == 1
    raise TypeError(f"{name} must be True or False, got {kind_of(value)}")


def share(value: object, name: str) -> float:
    """A number from 0 to 1."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {kind_of(value)}")
    try:
        number = float(value)  # a subclass may compare as it likes
    except OverflowError:
        number = math.inf
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {number}")
    return number


def exact_text(value: object) -> str:
    """A string without a subclass's ways, of comparing above all; the empty one for anything else."""
    return str.__str__(value) if isinstance(value, str) else ""


def mode(value: object) -> int:
    """The number of a mode's name."""
    number = MODES.get(value if type(value) is str else exact_text(value))
    if number is None:
        raise ValueError(f"mode must be 'sum', 'mean', 'max', 'average' or 'sqrtn', got {shown(value)}")
    return number


def operator_mode(value: object) -> int:
    """A mode's number, as PyTorch's operators take it."""
    number = value if type(value) is int else whole_number(value, "mode")
    if number not in OPERATOR_MODES:
        raise ValueError(f"mode must be 0 (sum), 1 (mean) or 2 (max), got {shown(number)}")
    return number


def method(value: object, bits: int) -> str:
    text = exact_text(value)
    if text not in METHODS:
        raise ValueError(f"method must be 'minmax', 'greedy' or 'lsq', got {shown(value)}")
    if text == "greedy" and bits == 8:
        raise ValueError("method must be 'minmax' or 'lsq' at 8 bits, got 'greedy', which is for 4 and 2 bits")
    return text


def importance(value: object, dim: int, group_size: int, chosen: str) -> NDArray[np.float32] | None:
    """The weight of each column's error, scaled so that the largest in each group is 1; None if not given."""
    if value is None:
        return None
    if chosen != "lsq":
        raise ValueError(f"importance must come with method='lsq', got method={chosen!r}")
    array = floats(value, "importance", allow_double=True, allow_bfloat16=True)
    if array.shape != (dim,):
        raise ValueError(f"importance must have shape ({dim},), a number for each column, got {kind_of(array)}")
    numbers = as_float32(array) if is_bfloat16(array.dtype) else np.ascontiguousarray(array, dtype=np.float64)
    wrong = np.flatnonzero(~(numbers >= 0) | (numbers == np.inf))
    if len(wrong):
        raise ValueError(f"importance[{wrong[0]}] must be finite and not negative, got {numbers[wrong[0]]:g}")
    if not numbers.any():
        raise ValueError("importance must have a number above 0, got zeros only")
    # A group is fitted by itself, and sums of its squares must not underflow because another group has larger weights.
    starts = np.arange(0, dim, group_size)
    largest = np.repeat(np.maximum.reduceat(numbers, starts), np.diff(starts, append=dim))
    shares: NDArray[np.float32] = np.divide(numbers, largest, out=np.zeros(dim), where=largest > 0).astype(np.float32)
    return shares


def skips_invalid(value: object) -> bool:
    text = exact_text(value)
    if text not in ("raise", "skip"):
        raise ValueError(f"invalid must be 'raise' or 'skip', got {shown(value)}")
    return text == "skip"


def as_dtype(value: object, message: str) -> np.dtype[Any]:
    try:
        return np.dtype(value)  # type: ignore[call-overload,no-any-return]
    except (TypeError, ValueError, SyntaxError, OverflowError, DeprecationWarning):  # NumPy reads "f4,(" as Python
        raise TypeError(message + shown(value)) from None


def float_type(value: object, name: str) -> np.dtype[Any]:
    """float32 or float16."""
    message = f"{name} must be float32 or float16, got "
    kind = as_dtype(value, message)
    if kind not in (np.float32, np.float16):
        raise ValueError(message + str(kind))
    return FLOAT16 if kind == FLOAT16 else FLOAT32


class OutType(NamedTuple):
    """A type of output: as the loops number it, and as the caller's array has it."""

    number: int
    dtype: np.dtype[Any]

    def written(self, target: Array) -> Array:
        """An output as the loops take it: bfloat16 as its bits."""
        return target.view(np.uint16) if self.number == 2 else target


def out_type(dtype: object, out: object) -> OutType:
    """As asked for, else as `out` is, else float32. The bits of bfloat16 may be uint16."""
    if dtype is None:
        kind = np.asarray(out).dtype if isinstance(out, np.ndarray) else FLOAT32
        # Anything else in `out` is refused where it is checked.
        return (
            OutType(1, FLOAT16) if kind == FLOAT16 else OutType(2, kind) if is_bfloat16(kind) else OutType(0, FLOAT32)
        )
    if exact_text(dtype) == "bfloat16":
        return OutType(2, out.dtype if isinstance(out, np.ndarray) and is_bfloat16(out.dtype) else UINT16)
    message = "dtype must be float32, float16 or bfloat16, got "
    kind = as_dtype(dtype, message)
    if is_bfloat16(kind):
        return OutType(2, kind)
    if kind not in (np.float32, np.float16):
        raise ValueError(message + str(kind))
    return OutType(1, FLOAT16) if kind == FLOAT16 else OutType(0, FLOAT32)


def padding_number(value: object, num_embeddings: int) -> int:
    """`padding_idx` counted from the start; -1 for none."""
    if value is None:
        return -1
    number = whole_number(value, "padding_idx")
    if not -num_embeddings <= number < num_embeddings:
        raise ValueError(
            f"padding_idx must be from {-num_embeddings} to {num_embeddings - 1} "
            f"for a table of {num_embeddings} embeddings, got {shown(number)}"
        )
    return number + num_embeddings if number < 0 else number


# ---- Layouts of rows -------------------------------------------------------------------------------------------


def scale_dtype(value: object, bits: int) -> np.dtype[Any]:
    """Of scales and biases: as asked for, else as PyTorch has it."""
    if value is None:
        return np.dtype(np.float32 if bits == 8 else np.float16)
    return float_type(value, "scale_dtype")


def group_size(value: object) -> int | None:
    """None for rows of one group."""
    if value is None:
        return None
    number = whole_number(value, "group_size")
    if number < 16 or number % 16 != 0:
        raise ValueError(f"group_size must be a multiple of 16, at least 16, got {shown(number)}")
    return number


def row_alignment(value: object) -> int:
    number = whole_number(value, "row_alignment")
    if not 1 <= number <= sys.maxsize:
        raise ValueError(f"row_alignment must be from 1 to {sys.maxsize}, got {shown(number)}")
    return number


# ---- Tables ----------------------------------------------------------------------------------------------------


def rows(data: object, name: str) -> NDArray[np.uint8]:
    """Packed rows: a 2-D array of uint8 whose rows are contiguous, as it is; nothing is copied.

    An array is not made a view of our own here, which would cost `ops` a tenth of a small call: whoever gives it
    another shape meanwhile gets an error for it.
    """
    array = data if type(data) is np.ndarray else as_array(data, name)
    if array.dtype is not UINT8 and array.dtype != UINT8:  # comparing takes ten times as long as recognising
        raise TypeError(f"{name} must be an array of uint8, got {kind_of(array)}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, bytes of a row), got {kind_of(array)}")
    if array.shape[1] > 1 and array.strides[1] != 1 and array.size:
        raise ValueError(f"{name} must have the bytes of a row side by side, got strides {array.strides}")
    return array


def float_name(dtype: np.dtype[Any]) -> str:
    """The type of a float table's elements. uint16 holds the bits of bfloat16."""
    return "float32" if dtype == FLOAT32 else "float16" if dtype == FLOAT16 else "bfloat16"


def float_rows(data: object, name: str, dtype: object) -> Array:
    """Rows of floats: a 2-D array whose rows are contiguous, a view; nothing is copied."""
    bits = _dlpack.bits_of_bfloat16(data)
    if bits is not None and (dtype is None or exact_text(dtype) == "bfloat16"):
        data, dtype = bits, "bfloat16"
    array = as_array(data, name)
    if is_plain_python(data) and array.dtype.kind in "fiu":
        array = as_float32(array)
    kind = array.dtype
    holds_bits = kind == UINT16 and exact_text(dtype) == "bfloat16"
    if kind.newbyteorder("=") not in (np.float32, np.float16) and not is_bfloat16(kind) and not holds_bits:
        raise TypeError(f"{name} must be {_what_holds_floats(name)}, got {kind_of(array)}{_hint_for(kind, name)}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, elements of a row), got {kind_of(array)}")
    if not kind.isnative:
        raise ValueError(f"{name} must have the host's byte order, got {kind.str}")
    if array.shape[1] > 1 and array.strides[1] != kind.itemsize and array.size:
        raise ValueError(f"{name} must have the elements of a row side by side, got strides {array.strides}")
    if dtype is not None and exact_text(dtype) != float_name(kind):
        is_named = exact_text(dtype) == "bfloat16"  # which not each NumPy knows
        asked = "bfloat16" if is_named else as_dtype(dtype, "dtype must be float32, float16 or bfloat16, got ")
        if asked != kind or holds_bits:
            raise ValueError(f"dtype must be what data holds, {float_name(kind)}, got {asked}")
    return array


def _what_holds_floats(name: str) -> str:
    array = "an array of float32, float16 or bfloat16"
    return array if name == "data" else f"a QuantizedTable, a FloatTable or {array}"


def _hint_for(kind: np.dtype[Any], name: str) -> str:
    if kind == UINT8 and name == "table":
        return "; packed rows are QuantizedTable(table, bits)"
    if kind == UINT16:
        return "; bits of bfloat16 are FloatTable(data, dtype='bfloat16')"
    return "; use astype(numpy.float32)" if kind.kind == "f" else ""


def mapping(value: object, *, check_rows: int | None = None, out: object = None) -> NDArray[np.int32] | None:
    """A pruning map in one piece; None for one of exactly [0], which means that nothing is pruned.

    A map that is copied on its way lies apart from any output, which the caller's own need not: it must from `out`.
    """
    if value is None:
        return None
    name = "compressed_indices_mapping"
    given = array = as_array(value, name)
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
    # A view of our own, as of the rows: nobody else can reshape it.
    array = np.require(array, np.int32, ["C", "A"]).view()
    if isinstance(out, np.ndarray):
        check_apart(np.ndarray.view(out, np.ndarray), [(name, given)])
    if array.size == 1 and array[0] == 0:
        return None
    return array if check_rows is None else checked_mapping(array, check_rows)


def row_weights(value: object, num_embeddings: int) -> NDArray[np.float32] | None:
    """A weight for each logical row, in one piece."""
    if value is None:
        return None
    array = floats(value, "row_weights", allow_double=True, allow_bfloat16=True)
    if array.shape != (num_embeddings,):
        raise ValueError(f"row_weights must have shape ({num_embeddings},), one for each row, got {kind_of(array)}")
    return np.require(as_float32(array), np.float32, ["C", "A"]).view()


def checked_mapping(mapping: NDArray[np.int32], num_rows: int) -> NDArray[np.int32]:
    """The mapping, if each entry is -1 or the number of a row."""
    wrong = first_beyond(mapping, -1, num_rows)
    if wrong is not None:
        raise IndexError(bad_mapping(wrong, int(mapping[wrong]), num_rows))
    return mapping


def first_beyond(mapping: NDArray[Any], least: int, num_rows: int) -> int | None:
    """Where the first entry of a mapping is that is less than `least` or no row's number; None if there is none."""
    # In blocks: a mapping that a file chose may be most of its bytes, and all of it wrong.
    for start in range(0, len(mapping), ENTRIES_AT_ONCE):
        some = mapping[start : start + ENTRIES_AT_ONCE]
        # See `ops.embedding_bag_prepack` for why not with a plain number.
        wrong = (some < least) | (some >= np.int64(num_rows))
        if wrong.any():
            return start + int(wrong.argmax())
    return None


# ---- Bags ------------------------------------------------------------------------------------------------------


def integers(value: object, name: str, *, or_mask: bool = False) -> Array:
    """An array of any integer type, or of booleans."""
    array = as_array(value, name)
    if array.size == 0 and is_plain_python(value):
        array = array.astype(np.int64)
    if array.dtype.kind not in ("biu" if or_mask else "iu"):
        # What NumPy knows nothing of is an array of one object.
        came = value if array.ndim == 0 and array.dtype == object else array
        raise TypeError(f"{name} must be an array of integers, got {kind_of(came)}")
    return array


def plain_integers(array: Array) -> Array:
    """Of int32 or int64, in one piece and in the host's byte order."""
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
        raise ValueError("offsets or lengths must be given for indices of 1 dimension, got None")
    array = integers(value, "offsets")
    if array.ndim != 1:
        raise ValueError(f"offsets must have 1 dimension, got {kind_of(array)}")
    if include_last_offset and array.size == 0:
        raise ValueError("offsets must hold at least the end of the last bag with include_last_offset, got none")
    return array


def lengths(value: object, indices: Array) -> Array:
    if indices.ndim == 2:
        raise ValueError("lengths must be None for indices of 2 dimensions, whose rows are the bags, got lengths")
    array = integers(value, "lengths")
    if array.ndim != 1:
        raise ValueError(f"lengths must have 1 dimension, got {kind_of(array)}")
    return array


def ends_of_lengths(lengths: Array, indices: Array) -> NDArray[np.int64]:
    """Offsets from 0 to the number of indices."""
    given = plain_integers(lengths).copy()  # which nobody else writes to
    wrong = np.flatnonzero(given < 0)
    if wrong.size:
        raise ValueError(f"lengths[{wrong[0]}] is {given[wrong[0]]}: must not be below 0")
    # In Python's integers, as they came: NumPy's sum may wrap.
    longest = int(given.max(initial=0))
    total = sum(lengths.tolist()) if longest > INT64_MAX // max(len(given), 1) else int(given.sum(dtype=np.int64))
    if total != len(indices):
        raise ValueError(f"lengths must sum to {len(indices)}, the number of indices, got {shown(total)}")
    ends = np.zeros(len(given) + 1, dtype=np.int64)
    np.cumsum(given, out=ends[1:])
    return ends


def weights(value: object, indices: Array, mode: int, *, allow_double: bool) -> Array | None:
    if value is None:
        return None
    name = "per_sample_weights"
    if mode == MODES["max"]:
        raise ValueError(f"{name} must be None in mode 'max', got {kind_of(value)}")
    array = as_array(value, name)
    if is_plain_python(value) and array.dtype.kind in "fiu":
        array = as_float32(array)
    allowed = (np.float32, np.float16, np.float64) if allow_double else (np.float32, np.float16)
    if array.dtype.newbyteorder("=") not in allowed:
        kinds = "float32, float16 or float64" if allow_double else "float32 or float16"
        raise TypeError(f"{name} must be an array of {kinds}, got {kind_of(array)}")
    if array.shape != indices.shape:
        raise ValueError(f"{name} must have the shape of indices, {indices.shape}, got {array.shape}")
    return array


def plain_weights(array: Array) -> Array:
    """In one piece and in the host's byte order; float64 rounded."""
    if array.dtype.itemsize == 8:
        return as_float32(array)
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A"])


def output_array(out: object, dtype: object) -> tuple[object, object]:
    """What the loops write to in place of `out`, an array of a tensor's memory or `out` itself; and the dtype."""
    if isinstance(out, np.ndarray) or not hasattr(out, "__dlpack__"):
        return out, dtype
    bits = _dlpack.bits_of_bfloat16(out)
    if bits is not None:
        return bits, "bfloat16" if dtype is None else dtype
    try:
        return _dlpack.array_to_write(out), dtype
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        raise _no_array(out, "out", error) from error


def output(out: object, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: Inputs) -> Array | None:
    """An array to write to: a view of our own, without a subclass's ways."""
    if out is None:
        return None
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array of {dtype}, got {kind_of(out)}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be an array without a mask, got {type(out).__name__}")
    out = np.ndarray.view(out, np.ndarray)
    if out.dtype != dtype or out.shape != shape:
        raise ValueError(f"out must be a {dtype} array of shape {shape}, got {kind_of(out)}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if out.size == 0:
        return out
    if out.shape[-1] > 1 and out.strides[-1] != dtype.itemsize:
        raise ValueError(f"out must have the elements of a row side by side, got strides {out.strides}")
    if _overlaps_itself(out):
        raise ValueError(f"out must have rows that lie apart, one after the other, got strides {out.strides}")
    check_apart(out, inputs)
    return out


def check_apart(out: Array, inputs: Inputs) -> None:
    for name, value in inputs:
        if value is not None and _share_memory(out, value):
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
    except (TooHardError, OverflowError):  # strides that reach beyond all addresses
        return True


# ---- Floats to quantize ------------------------------------------------------------------------------------------


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether it is the type that other packages add to NumPy's under this name (ml_dtypes, for JAX and TensorFlow)."""
    return dtype.name == "bfloat16" and dtype.itemsize == 2 and dtype.isnative


def floats(value: object, name: str, *, allow_double: bool, allow_bfloat16: bool = False) -> Array:
    """An array of floats, at any stride; lists become float32."""
    array = as_array(value, name)
    if is_plain_python(value) and array.dtype.kind in "fiu":
        array = as_float32(array)
    if allow_bfloat16 and is_bfloat16(array.dtype):
        return array
    allowed = (np.float32, np.float16, np.float64) if allow_double else (np.float32, np.float16)
    if array.dtype.newbyteorder("=") not in allowed:
        names = [np.dtype(kind).name for kind in allowed] + ["bfloat16"] * allow_bfloat16
        raise TypeError(f"{name} must be an array of {', '.join(names[:-1])} or {names[-1]}, got {kind_of(array)}")
    return array
