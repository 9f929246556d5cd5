"""The model of the arguments: what each value that is given counts as, and which errors it may lead to.

It shares nothing with the package. A fault is an error's type and the argument that its text must begin with. Where
several arguments are wrong, any one of them may be reported; but an index is only looked up where all else is right.
"""

from __future__ import annotations

import operator
import re
import sys
from typing import Any, TypeAlias

import numpy as np

from support.arrays import Boom, addresses
from support.floats import STORED
from support.layouts import ALL_MODES, LAYOUTS, MODES, Layout

Fault: TypeAlias = tuple[type[Exception], str]
Faults: TypeAlias = set[Fault]
Judged: TypeAlias = tuple[Any, Faults]  # what it counts as, None where nothing

MAPPING = "compressed_indices_mapping"


def either(name: str) -> Faults:
    return {(TypeError, name), (ValueError, name)}


def allows(faults: Faults, error: Exception) -> bool:
    """Whether an error is one of these, exactly of its type, and begins with the argument's whole name."""
    text = str(error)
    return any(type(error) is kind and re.match(rf"{name}(?!\w)", text) is not None for kind, name in faults)


def refused(faults: Faults) -> str:
    """The faults in words."""
    return " or ".join(sorted(f"{kind.__name__} of {name}" for kind, name in faults)) or "an answer"


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> Judged:
    if isinstance(value, (bool, np.bool_)) or not hasattr(type(value), "__index__"):
        return None, {(TypeError, name)}
    try:
        number = operator.index(value)
    except TypeError:
        return None, {(TypeError, name)}
    if (least is not None and number < least) or (most is not None and number > most):
        return None, {(ValueError, name)}
    return number, set()


def flag(name: str, value: Any) -> Judged:
    if isinstance(value, (bool, np.bool_, int, np.integer)) and int(value) in (0, 1):
        return bool(value), set()
    return False, {(TypeError, name)}


def share(name: str, value: Any) -> Judged:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None, {(TypeError, name)}
    return (float(value), set()) if 0 <= value <= 1 else (None, {(ValueError, name)})


def bits(value: Any) -> Judged:
    number, faults = whole_number("bits", value)
    return (number, faults) if faults or number in LAYOUTS else (None, {(ValueError, "bits")})


def num_threads(value: Any, name: str = "num_threads") -> Judged:
    return (None, set()) if value is None else whole_number(name, value, 1)


def padding_idx(value: Any, count: int) -> Judged:
    """The index that is left out, counted from the front."""
    if value is None:
        return None, set()
    number, faults = whole_number("padding_idx", value, -count, count - 1)
    return (number if faults or number >= 0 else number + count), faults


def mode(value: Any, by_number: bool) -> Judged:
    """Its name. The reference's operators number the modes."""
    if by_number:
        number, faults = whole_number("mode", value, 0, len(MODES) - 1)
        return (None if faults else MODES[number]), faults
    return (value, set()) if isinstance(value, str) and value in ALL_MODES else (None, {(ValueError, "mode")})


def invalid(value: Any) -> Judged:
    """What is done about an index out of range."""
    is_known = isinstance(value, str) and value in ("raise", "skip")
    return (value, set()) if is_known else ("raise", {(ValueError, "invalid")})


def output_dtype(value: Any) -> Judged:
    """None where it is left to `out`. The text "bfloat16" is of bits, as uint16."""
    return (STORED["bfloat16"], set()) if isinstance(value, str) and value == "bfloat16" else dtype(value)


def dtype(value: Any, name: str = "dtype") -> Judged:
    """Of scales, too: None where it is left to the bits."""
    if value is None:
        return None, set()
    try:
        kind = np.dtype(value)
    except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError, Warning):  # of NumPy, for some texts
        return None, either(name)
    return (kind, set()) if kind in (np.float32, np.float16) and kind.isnative else (None, either(name))


# ---- Arrays ----------------------------------------------------------------------------------------------------------


def is_plain(value: Any) -> bool:
    """A list, a tuple or a number, whose type NumPy has chosen and not the caller."""
    return isinstance(value, (list, tuple, int, float)) and not isinstance(value, np.generic)


def as_array(name: str, value: Any) -> Judged:
    if value is None or isinstance(value, np.ma.MaskedArray):
        return None, {(TypeError, name)}
    try:
        return np.asarray(value), set()
    except (TypeError, ValueError):
        return None, either(name)
    except (AttributeError, LookupError, OSError, MemoryError, RuntimeError, Boom) as error:  # the object's own
        return None, either(name) | {(type(error), "")}


def whole_numbers(name: str, value: Any) -> Judged:
    array, faults = as_array(name, value)
    if array is not None and is_plain(value) and array.size == 0:
        array = array.astype(np.int64)
    if array is not None and array.dtype.kind not in "iu":
        return None, {(TypeError, name)}
    return array, faults


def floats(name: str, value: Any, doubles: bool = False) -> Judged:
    """What Python holds counts as float32; of float64 arrays only some functions make what they need."""
    array, faults = as_array(name, value)
    if array is None:
        return array, faults
    with np.errstate(all="ignore"):
        if is_plain(value):
            return (array.astype(np.float32), set()) if array.dtype.kind in "fiu" else (None, either(name))
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        return None, {(TypeError, name)}
    return array, set() if doubles or array.dtype.itemsize != 8 else {(TypeError, name)}


def size_of_groups(value: Any) -> Judged:
    if value is None:
        return None, set()
    number, faults = whole_number("group_size", value, 1)
    return (number, faults) if faults or number % 16 == 0 else (None, {(ValueError, "group_size")})


def layout(
    width: int | None, scale_dtype: Any = None, scale_first: Any = False, group_size: Any = None, row_alignment: Any = 1
) -> Judged:
    """The layout of rows of such codes, None where it is not known."""
    kind, faults = dtype(scale_dtype, "scale_dtype")
    is_first, more = flag("scale_first", scale_first)
    faults = faults | more
    size, more = size_of_groups(group_size)
    faults |= more
    multiple, more = whole_number("row_alignment", row_alignment, 1, sys.maxsize)
    faults |= more
    if width is None or faults:
        return None, faults
    pair = LAYOUTS[width].pair if kind is None else f"<f{kind.itemsize}"
    return Layout(width, pair, is_first, size, alignment=multiple), faults


def of_row(what: str, row: int) -> Fault:
    """Of a row that cannot be converted to another layout, named by its number, for what an argument asks."""
    return (ValueError, rf"{what} must .* got row {row}")


def rows(name: str, value: Any, kind: Layout | None) -> Judged:
    """Packed rows of a layout, or of an unknown one."""
    array, faults = as_array(name, value)
    if array is None:
        return None, faults
    if array.dtype != np.uint8:
        return None, {(TypeError, name)}
    if array.ndim != 2:
        return None, {(ValueError, name)}
    apart = array.strides[1] != 1 and array.shape[1] > 1 and array.size > 0
    if apart or (kind is not None and kind.dim(array.shape[1]) < 1):
        faults = {(ValueError, name)}
    return array, faults


def mapping(value: Any, num_rows: int) -> tuple[np.ndarray | None, Faults, bool]:
    """Also whether it holds what it must not, which matters where it is used; what int32 cannot hold matters at once."""
    array, faults = whole_numbers(MAPPING, value)
    if array is None:
        return None, faults, False
    if not is_plain(value) and array.dtype.newbyteorder("=") != np.int32:
        faults = faults | {(TypeError, MAPPING)}
    if array.ndim != 1:
        faults = faults | {(ValueError, MAPPING)}
    if is_plain(value) and array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        faults = faults | {(IndexError, MAPPING)}
    is_bad = array.tolist() != [0] and bool(((array < -1) | (array >= num_rows)).any())
    return array, faults, is_bad


def table(
    data: Any, width: Any, dim: Any, given: Any, scale_dtype: Any = None, scale_first: Any = False, groups: Any = None
) -> tuple[tuple[Any, int, Layout], Faults]:
    """The rows, the dim and the layout of a `QuantizedTable` of these arguments."""
    number, faults = bits(width)
    kind, more = layout(number, scale_dtype, scale_first, groups)
    faults |= more
    stored, more = rows("data", data, kind)
    faults |= more
    most = 0 if kind is None or stored is None else kind.dim(stored.shape[1])
    if dim is not None:
        chosen, more = whole_number("dim", dim, 1, most)
        faults |= more
        most = most if more else chosen
    elif most > 0 and kind.group_size and kind.used_bytes(most) != stored.shape[1]:
        faults |= {(ValueError, "data")}  # some bytes are padding, but which dim there is they do not say
    if given is not None:
        _, more, is_bad = mapping(given, 0 if stored is None else len(stored))
        faults |= more | ({(IndexError, MAPPING)} if is_bad else set())
    return (stored, most, kind), faults


def float_rows(name: str, value: Any, kind: Any = None) -> Judged:
    """Rows of floats, in the oracle's storage; `kind` is the dtype that was said."""
    array, faults = as_array(name, value)
    is_bits = isinstance(kind, str) and kind == "bfloat16"
    told, more = (None, set()) if is_bits else dtype(kind)
    faults = faults | more
    if array is None:
        return None, faults
    if is_plain(value) and array.dtype.kind in "fiu":
        with np.errstate(all="ignore"):
            array = array.astype(np.float32)
    host = array.dtype.newbyteorder("=")
    if host not in ((np.uint16,) if is_bits else (np.float32, np.float16)):
        faults |= either(name) | (either("dtype") if is_bits else set())
    elif told is not None and told != host:
        faults |= either("dtype")
    apart = array.ndim == 2 and array.strides[1] != array.itemsize and array.shape[1] > 1 and array.size > 0
    if array.ndim != 2 or array.shape[1] == 0 or apart:
        faults |= {(ValueError, name)}
    if not array.dtype.isnative:
        faults |= either(name) if is_bits else {(ValueError, name)}
    return (array if array.ndim == 2 else None), faults


def float_table(data: Any, kind: Any, given: Any) -> tuple[tuple[Any, int, None], Faults]:
    """The rows and the dim of a `FloatTable` of these arguments."""
    stored, faults = float_rows("data", data, kind)
    if given is not None:
        _, more, is_bad = mapping(given, 0 if stored is None else len(stored))
        faults |= more | ({(IndexError, MAPPING)} if is_bad else set())
    return (stored, 0 if stored is None else stored.shape[1], None), faults


def output(value: Any, shape: tuple[int, ...], kinds: tuple[Any, ...], inputs: list[Any]) -> Faults:
    """Of an `out` that must be of this shape and one of these types, beside arrays that are read."""
    if value is None:
        return set()
    if not isinstance(value, np.ndarray):
        return either("out")
    if isinstance(value, np.ma.MaskedArray):
        return {(TypeError, "out")}
    out = np.asarray(value)
    is_right = out.shape == shape and any(out.dtype == kind for kind in kinds) and out.flags.writeable
    if is_right and out.size and shape:
        is_right = out.strides[-1] == out.itemsize or shape[-1] == 1
        if not out.flags.c_contiguous:
            places = addresses(out)
            is_right = is_right and bool(np.diff(np.sort(places)).all())  # `unique` is ten times as slow
        is_right = is_right and not any(shares_memory(out, given) for given in inputs)
    return set() if is_right else {(ValueError, "out")}


def shares_memory(out: np.ndarray, given: Any) -> bool:
    array = None if is_plain(given) else as_array("an input", given)[0]
    return (
        array is not None and np.may_share_memory(out, array) and bool(np.isin(addresses(out), addresses(array)).any())
    )


# ---- Bags ------------------------------------------------------------------------------------------------------------


def bags_of_lengths(indices: Any, offsets: Any, last: bool, lengths: Any) -> tuple[Any, Any, int, list[int], Faults]:
    """As `bags` without lengths. The offsets that come back are those of all bags but the end."""
    numbers, faults = whole_numbers("indices", indices)
    counts, more = whole_numbers("lengths", lengths)
    faults |= more
    if offsets is not None:
        faults |= {(ValueError, name) for name in ("lengths", "offsets")} | whole_numbers("offsets", offsets)[1]
    if last:
        faults |= {(ValueError, name) for name in ("lengths", "include_last_offset")}
    if numbers is not None and numbers.ndim != 1:
        faults |= {(ValueError, name) for name in (("lengths", "indices") if numbers.ndim == 2 else ("indices",))}
    if counts is not None and counts.ndim != 1:
        faults |= {(ValueError, "lengths")}
    if faults or numbers is None or counts is None:
        return numbers, None, 0 if counts is None else counts.size, [], faults
    whole = counts.tolist()
    if any(length < 0 for length in whole) or sum(whole) != numbers.size:
        return numbers, None, len(whole), [], {(ValueError, "lengths")}
    starts = np.array([sum(whole[:bag]) for bag in range(len(whole))], np.int64)
    return numbers, starts, len(whole), numbers.tolist(), faults


def bags(indices: Any, offsets: Any, last: bool, alone: bool = False) -> tuple[Any, Any, int, list[int], Faults]:
    """Indices and offsets as arrays, how many bags they make, and the indices that are in any of them. What offsets are
    is checked before indices are looked up. `alone` where the types and shapes are all that counts."""
    numbers, faults = whole_numbers("indices", indices)
    ends, more = (None, set()) if offsets is None else whole_numbers("offsets", offsets)
    faults |= more
    if numbers is not None and numbers.ndim not in (1, 2):
        faults |= {(ValueError, "indices")}
    elif numbers is not None and (numbers.ndim == 2) == (offsets is not None):
        faults |= {(ValueError, "offsets")}
    if ends is not None and ends.ndim != 1:
        faults |= {(ValueError, "offsets")}
    if faults or numbers is None:
        return numbers, ends, 1, [], faults
    if ends is None:
        return numbers, ends, len(numbers), numbers.ravel().tolist(), faults
    places = [0] * len(ends) if alone else ends.tolist()
    num_bags = len(places) - last
    if num_bags < 0 or not all(a <= b for a, b in zip([0, *places], [*places, numbers.size], strict=True)):
        return numbers, ends, max(num_bags, 0), [], {(ValueError, "offsets")}
    end = places[-1] if last else numbers.size
    return numbers, ends, num_bags, numbers.tolist()[places[0] : end] if places else [], faults


def used_rows(name: str, used: list[int], count: int, num_rows: int, by: np.ndarray | None) -> Faults:
    """Of indices into so many embeddings, and through a mapping into so many rows. The first that is wrong is named."""
    for index in used:
        if not 0 <= index < count:
            return {(IndexError, name)}
        if by is not None and by.ndim == 1 and not -1 <= int(by[index]) < num_rows:
            return {(IndexError, MAPPING)}
    return set()


def shape_of_bags(given: Any, width: int, indices: Any, offsets: Any, last: Any) -> Judged:
    """The shape of the bags, by shapes alone."""
    stored, faults = rows("weight", given, LAYOUTS[width])
    is_last, more = flag("include_last_offset", last)
    faults = faults | more
    _, _, num_bags, _, more = bags(indices, offsets, is_last, alone=True)
    return (num_bags, 0 if stored is None else LAYOUTS[width].dim(stored.shape[1])), faults | more


def keep(value: Any, count: int) -> Judged:
    """Which of so many embeddings pruning keeps: a mask, or their numbers."""
    array, faults = as_array("keep", value)
    if array is not None and array.dtype == np.bool_:
        return array, set() if array.shape == (count,) else {(ValueError, "keep")}
    array, faults = whole_numbers("keep", value)
    if array is None:
        return None, faults
    if array.ndim != 1:
        return None, {(ValueError, "keep")}
    if not all(0 <= number < count for number in array.tolist()):
        return None, {(IndexError, "keep")}
    return array.astype(np.int64), set()
