"""Every way in which an array may come to a function, and how two arrays are compared."""

from __future__ import annotations

import array
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.layouts import LAYOUTS

# ---- Objects that stand for an array ---------------------------------------------------------------------------------


class Boom(Exception):
    """What a hostile object raises of its own."""


def boom(*_: Any, **__: Any) -> Any:
    raise Boom


def returning(name: str, answer: Any) -> Any:
    """An object with a method of this name, which answers so."""
    return type("Returning", (), {name: lambda self, *a, **k: answer})()


def with_attribute(name: str, answer: Any) -> Any:
    return type("WithAttribute", (), {name: property(answer if callable(answer) else lambda self: answer)})()


class Sub(np.ndarray):
    """A subclass, which the package must take for the array that it is."""


class Answers:
    """An object that becomes an array when it is asked to, or raises."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if dtype is None else self.answer.astype(dtype)


class Overridden(np.ndarray):
    """Each way that Python has into a subclass raises."""

    __array_priority__ = property(boom)
    __array_function__ = __array_ufunc__ = __array_wrap__ = __array_prepare__ = boom
    __getitem__ = __setitem__ = __len__ = __iter__ = __eq__ = __bool__ = __index__ = boom
    shape = strides = dtype = flags = size = ndim = itemsize = base = T = flat = property(boom)
    view = reshape = astype = copy = ravel = min = max = any = all = tobytes = __array__ = boom
    __hash__ = None  # type: ignore[assignment]


class Swallowing(np.ndarray):
    """Answers each of NumPy's functions with nothing, and says that it is of another shape."""

    def __array_function__(self, *_: Any) -> None: ...

    def reshape(self, *_: Any, **__: Any) -> np.ndarray:
        return np.zeros((6, 8), np.float32)

    shape = property(lambda self: (1,))  # type: ignore[assignment]


def read_only(plain: np.ndarray) -> np.ndarray:
    frozen = plain.view()
    frozen.flags.writeable = False
    return frozen


WRAPPERS = {
    "read-only": read_only,
    "subclass": lambda plain: plain.view(Sub),
    "method": Answers,
    "buffer": memoryview,
    "list": lambda plain: plain.tolist(),
}
# Not for a fuzzer: most of these copy.
MORE_WRAPPERS = {
    "tuple": lambda plain: tuple(plain.tolist()),
    "array.array": lambda plain: array.array(plain.dtype.char, plain) if plain.ndim == 1 else memoryview(plain),
    "matrix": lambda plain: plain.view(np.matrix) if plain.ndim == 2 else plain,
    "recarray": lambda plain: plain.view(np.recarray),
    "unmasked": np.ma.masked_array,
    "ctypes": np.ctypeslib.as_ctypes,
    "interface": lambda plain: with_attribute("__array_interface__", lambda self: plain.__array_interface__),
    "struct": lambda plain: with_attribute("__array_struct__", lambda self: plain.__array_struct__),
    "overridden": lambda plain: plain.view(Overridden),
    "swallowing": lambda plain: plain.view(Swallowing),
}

# ---- Where it lies ---------------------------------------------------------------------------------------------------

# The distance between elements and between rows, in bytes, for elements of so many.
STEPS = {"strided": lambda size: 2 * size, "apart": lambda size: 3 * size + 1}
GAPS = {"gaps": lambda size: size, "odd gaps": lambda size: size + 3, "far": lambda size: 40 * size}
PLACES = ("plain", "swapped", "misaligned", "reversed", "columns", "mapped", *STEPS, *GAPS)
# All ways that keep the values.
WAYS = (*PLACES, *WRAPPERS, *MORE_WRAPPERS)


@dataclass
class Placed:
    """What is given as an argument, the plain array behind it, and the memory of just that array."""

    value: Any
    array: np.ndarray
    block: np.ndarray


def exact_block(num_bytes: int) -> np.ndarray:
    """An allocation of exactly this size, of which AddressSanitizer sees the ends; NumPy may hand out a used one."""
    return np.frombuffer(array.array("B", [77]) * num_bytes, np.uint8) if num_bytes else np.empty(0, np.uint8)


def geometry(shape: tuple[int, ...], size: int, way: str) -> tuple[tuple[int, ...], int, int]:
    """Strides, bytes and the first element's offset. The last byte is one of the array's."""
    if way == "broadcast":
        return (0,) * len(shape), size, 0
    if not shape or 0 in shape:
        return tuple(size for _ in shape), size, 0
    strides = [0] * len(shape)
    reach = STEPS[way](size) if way in STEPS else size
    gap = GAPS[way](size) if way in GAPS else 0
    for axis in range(len(shape)) if way == "columns" else reversed(range(len(shape))):
        strides[axis] = reach
        reach = reach * shape[axis] + (gap if axis == len(shape) - 1 else 0)
    offset = 1 if way == "misaligned" else 0
    if way == "reversed":
        strides[0] = -strides[0]
        offset = -strides[0] * (shape[0] - 1)
    last = offset + sum(max(s, 0) * (n - 1) for s, n in zip(strides, shape, strict=True)) + size
    return tuple(strides), last, offset


def empty(shape: tuple[int, ...], dtype: Any, way: str, margin: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An array laid out in this way, and its memory, all bytes of which are 77: so many on either side, and between."""
    dtype = np.dtype(dtype)
    strides, num_bytes, offset = geometry(shape, dtype.itemsize, way)
    num_bytes += 2 * margin
    block = np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8) if way == "mapped" else exact_block(num_bytes)
    block[:] = 77
    kind = dtype.newbyteorder() if way == "swapped" else dtype
    return np.ndarray(shape, kind, block, margin + offset, strides), block


def place(values: np.ndarray, way: str) -> Placed:
    """An argument that holds these values and comes in this way."""
    if way == "broadcast" and values.size:
        values = np.full(values.shape, values.flat[0], values.dtype)
    laid, block = empty(values.shape, values.dtype, way if values.size or way != "broadcast" else "plain")
    laid[...] = values
    wrap = WRAPPERS.get(way) or MORE_WRAPPERS.get(way)
    return Placed(laid if wrap is None else wrap(laid), laid, block)


def addresses(array: np.ndarray) -> np.ndarray:
    """Where each of its bytes lies."""
    places = np.full((*array.shape, array.itemsize), array.__array_interface__["data"][0], np.int64)
    places += np.arange(array.itemsize)
    for axis, (length, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        places += (np.arange(length) * stride).reshape((-1,) + (1,) * (array.ndim - axis))
    return places.ravel()


# ---- How two are compared --------------------------------------------------------------------------------------------


def an_array(array: np.ndarray) -> str:
    """As an error begins to tell of it: "an int64 array"."""
    return f"{'an' if array.dtype.name[0] in 'io' else 'a'} {array.dtype} array"


def same_bits(ours: Any, theirs: Any) -> None:
    """Equal in every bit, but for the sign and payload of a NaN."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == theirs.dtype, f"{ours.dtype} is not {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    if ours.tobytes() == theirs.tobytes():
        return
    whole = np.dtype(f"u{ours.dtype.itemsize}")
    different = np.ascontiguousarray(ours).view(whole) != np.ascontiguousarray(theirs).view(whole)
    if ours.dtype.kind == "f":
        different &= ~(np.isnan(ours) & np.isnan(theirs))
    places = np.argwhere(different.reshape(ours.shape))
    assert not len(places), (
        f"{len(places)} of {ours.size} differ, first at {places[0]}: "
        f"{ours[tuple(places[0])]!r} is not {theirs[tuple(places[0])]!r}"
    )


def same_rows(ours: np.ndarray, theirs: np.ndarray, bits: int) -> None:
    """Equal packed rows, but that a scale or a bias of zero may carry either sign."""
    assert ours.dtype == theirs.dtype == np.uint8, f"{ours.dtype}, {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    alike = [LAYOUTS[bits].unsigned(rows) for rows in (ours, theirs)]
    wrong = np.argwhere((alike[0] != alike[1]).any(axis=-1))
    assert not len(wrong), f"row {wrong[0]} (of {len(wrong)}): {ours[tuple(wrong[0])]} is not {theirs[tuple(wrong[0])]}"
