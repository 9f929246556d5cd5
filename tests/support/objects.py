"""Objects that are wrong as arguments. Each is made anew, so that none that has been used is used again; but see `nested`."""

from __future__ import annotations

import array
import ctypes
import datetime
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import qembag
from support.arrays import Answers, boom, returning, with_attribute


def raising(*names: str) -> Any:
    """An object whose methods of these names raise."""
    return type("Raising", (), dict.fromkeys(names, boom))()


def answers_with(method: Any) -> Any:
    return type("AnswersWith", (), {"__array__": method})()


def contains_itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


@functools.cache  # making a deep one, and taking it apart, takes longer than the calls that refuse it
def nested(depth: int) -> list[Any]:
    deep: list[Any] = [1]
    for _ in range(depth):
        deep = [deep]
    return deep


def interface(shape: Any, kind: str) -> Any:
    return with_attribute("__array_interface__", {"shape": shape, "typestr": kind, "version": 3})


# Every argument refuses these, as a TypeError or a ValueError that names it.
REFUSED: dict[str, Callable[[], Any]] = {
    "text": lambda: "text",
    "bytes": lambda: b"bytes",
    "object": object,
    "float": lambda: 3.5,
    "nan": lambda: float("nan"),
    "complex": lambda: 2j,
    "dict": lambda: {"a": 1},
    "empty dict": dict,
    "set": lambda: {1, 2},
    "function": lambda: len,
    "class": lambda: int,
    "class of arrays": lambda: np.ndarray,
    "module": lambda: np,
    "ellipsis": lambda: ...,
    "generator": lambda: (number for number in range(6)),
    "slice of text": lambda: slice("a", "b"),
    "ragged": lambda: [[1], [1, 2]],
    "list of objects": lambda: [object()],
    "list of nothing": lambda: [None],
    "list of texts": lambda: ["a"],
    "list of huge numbers": lambda: [2**70],
    "truths": lambda: np.array([True, False]),
    "complex numbers": lambda: np.array([1 + 2j]),
    "texts": lambda: np.array(["a", "b"]),
    "objects": lambda: np.array([1, 2], object),
    "dates": lambda: np.array([1, 2], "M8[s]"),
    "times": lambda: np.array([1, 2], "m8[s]"),
    "structured": lambda: np.zeros(2, [("a", "i4"), ("b", "f4")]),
    "record": lambda: np.zeros(6, [("a", "i8")]).view(np.recarray),
    "void": lambda: np.zeros(2, "V4"),
    "bytes of strings": lambda: np.zeros((2, 2), "S3"),
    "masked": lambda: np.ma.MaskedArray([1, 2], [False, True]),
    "0-d of float": lambda: np.array(1.5),
    "0-d of objects": lambda: np.array(object()),
    "view of no numbers": lambda: memoryview(b"abc").cast("c"),
    "array of text": lambda: Answers("text"),
    "array of none": lambda: Answers(None),
    "array of a list": lambda: Answers([1, 2]),
    "array of texts": lambda: Answers(np.array(["a"])),
    "array of 5 dimensions": lambda: Answers(np.zeros((2, 1, 1, 1, 2), "M8[D]")),
    "array raises ValueError": lambda: Answers(ValueError("boom")),
    "array raises TypeError": lambda: Answers(TypeError("boom")),
    "interface is a number": lambda: with_attribute("__array_interface__", 5),
    "interface is empty": lambda: with_attribute("__array_interface__", {}),
    "interface of a bad shape": lambda: interface("x", "<i8"),
    "interface of a negative shape": lambda: interface((-3,), "<i8"),
    "interface of a bad type": lambda: interface((3,), "garbage"),
}
# What is refused besides as whole numbers, and as floats.
NO_INTEGERS: dict[str, Callable[[], Any]] = {
    **REFUSED,
    "list of floats": lambda: [1.5],
    "floats": lambda: np.array([1.5, 2]),
    "NumPy's float": lambda: np.float64(3),
    "halves": lambda: np.zeros(2, np.float16),
}
NO_FLOATS: dict[str, Callable[[], Any]] = {
    **{name: make for name, make in REFUSED.items() if name not in ("float", "nan", "0-d of float")},
    "whole numbers": lambda: np.arange(2),
    "bytes of rows": lambda: np.zeros((2, 2), np.uint8),
    "long doubles": lambda: np.longdouble([1, 2]),
}

COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
CONVERSIONS = (
    "__index__",
    "__int__",
    "__float__",
    "__bool__",
    "__len__",
    "__iter__",
    "__getitem__",
    "__hash__",
    "__repr__",
)
ALWAYS = dict.fromkeys(COMPARISONS, lambda self, other: True)
LYING_TEXT = type("LyingText", (str,), {**ALWAYS, "__hash__": lambda self: hash("sum")})
FICKLE_TEXT = type("FickleText", (str,), {**ALWAYS, "__hash__": lambda self: time.perf_counter_ns()})


def long_sequence(length: int) -> Any:
    return type("Long", (), {"__len__": lambda self: length, "__getitem__": lambda self, i: 0})()


def a_call_of_its_own(self: Any, *_: Any, **__: Any) -> Any:
    return qembag.embedding(qembag.quantize(np.ones((2, 8), np.float32)), self)


# These raise errors of their own, have no end, or are what some argument takes.
HOSTILE: dict[str, Callable[[], Any]] = {
    "2**100": lambda: 2**100,
    "-2**100": lambda: -(2**100),
    "10**5000": lambda: 10**5000,
    "nested 100 deep": lambda: nested(100),
    "nested 100,000 deep": lambda: nested(100_000),
    "contains itself": contains_itself,
    "buffer of floats": lambda: array.array("d", [1.5] * 6),
    "released view": lambda: (view := memoryview(b"abc"), view.release())[0],
    "view of pointers": lambda: memoryview((ctypes.c_char_p * 6)()),
    "array raises": lambda: raising("__array__"),
    "array of itself": lambda: answers_with(lambda self, *a, **k: self),
    "array without end": lambda: answers_with(lambda self, *a, **k: np.asarray(self)),
    "array raises UnicodeDecodeError": lambda: answers_with(lambda self, *a, **k: b"\xff".decode()),
    "array calls qembag": lambda: answers_with(a_call_of_its_own),
    "interface raises": lambda: with_attribute("__array_interface__", boom),
    "struct raises": lambda: with_attribute("__array_struct__", boom),
    "struct is a number": lambda: with_attribute("__array_struct__", 7),
    "struct is another capsule": lambda: with_attribute("__array_struct__", datetime.datetime_CAPI),
    "dtype raises": lambda: with_attribute("dtype", boom),
    "dtype of itself": lambda: with_attribute("dtype", lambda self: self),
    "attributes raise": lambda: raising("__getattr__"),
    "all attributes raise": lambda: raising("__getattribute__"),
    "dlpack raises": lambda: raising("__dlpack__", "__dlpack_device__"),
    "buffer raises": lambda: raising("__buffer__"),
    "class raises": lambda: with_attribute("__class__", boom),
    "says it is an array": lambda: with_attribute("__class__", np.ndarray),
    "says it is a number": lambda: with_attribute("__class__", int),
    "says it is a text": lambda: with_attribute("__class__", str),
    "conversions raise": lambda: raising(*CONVERSIONS),
    "comparisons raise": lambda: raising(*COMPARISONS),
    "index of text": lambda: returning("__index__", "text"),
    "index 2**100": lambda: returning("__index__", 2**100),
    "length without items": lambda: type("Empty", (), {"__len__": lambda self: 6, "__getitem__": boom})(),
    "length too large": lambda: long_sequence(2**62),
    "length negative": lambda: long_sequence(-1),
    "int that lies": lambda: type("LyingInt", (int,), ALWAYS)(77),
    "float that lies": lambda: type("LyingFloat", (float,), ALWAYS)(-1e30),
    "float that is another": lambda: type("OtherFloat", (float,), {"__float__": lambda self: -1e30})(0.5),
    "text that lies": lambda: LYING_TEXT("text"),
    "text of many hashes": lambda: FICKLE_TEXT("text"),
    "dtype that is no Python": lambda: "f4,(",
    "dtype of surrogates": lambda: "\ud800",
    "dtype too large": lambda: (np.float32, (2**40, 2**40)),
}
# What NumPy cannot read as a type of elements, or what is none of an output's.
NO_DTYPES = (
    np.float64, "f8", "i4", "nonsense", 5, "", "f4,f4", "(2,)f4", np.dtype("f4").newbyteorder(), {}, [], [("a", "f4")],
    {"names": ["a"], "formats": []}, "f4,(", "(-1,)f4", ",", "O", "M8[parsec]", "\0", "é", np.ndarray, type, float, b"f8",
    "U99999999999", ("f4", -1), ("f4", (2**40, 2**40)), "f" * 5000,
)  # fmt: skip
