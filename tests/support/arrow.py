"""Objects that speak Arrow's C interface wrongly: structs as a producer in C would fill them, and capsules of them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class Schema(ctypes.Structure):
    pass


class Array(ctypes.Structure):
    pass


RELEASE_SCHEMA = ctypes.CFUNCTYPE(None, ctypes.POINTER(Schema))
RELEASE_ARRAY = ctypes.CFUNCTYPE(None, ctypes.POINTER(Array))
Schema._fields_ = [
    ("format", ctypes.c_char_p),
    ("name", ctypes.c_char_p),
    ("metadata", ctypes.c_char_p),
    ("flags", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("children", ctypes.POINTER(ctypes.POINTER(Schema))),
    ("dictionary", ctypes.POINTER(Schema)),
    ("release", RELEASE_SCHEMA),
    ("private_data", ctypes.c_void_p),
]
Array._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(Array))),
    ("dictionary", ctypes.POINTER(Array)),
    ("release", RELEASE_ARRAY),
    ("private_data", ctypes.c_void_p),
]
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


@RELEASE_SCHEMA
def _release_schema(struct: Any) -> None:
    struct.contents.release = RELEASE_SCHEMA()


@RELEASE_ARRAY
def _release_array(struct: Any) -> None:
    struct.contents.release = RELEASE_ARRAY()


def _pointers(structs: Any, kind: Any) -> Any:
    return (ctypes.POINTER(kind) * max(len(structs), 1))(*map(ctypes.pointer, structs))


def schema(form: bytes | None, *children: Schema, dictionary: Schema | None = None, released: bool = False) -> Schema:
    return Schema(
        format=form,
        name=b"",
        flags=2,
        n_children=len(children),
        children=_pointers(children, Schema),
        dictionary=None if dictionary is None else ctypes.pointer(dictionary),
        release=RELEASE_SCHEMA() if released else _release_schema,
    )


def array(
    length: int,
    buffers: list[np.ndarray | None],
    *children: Array,
    offset: int = 0,
    null_count: int = 0,
    dictionary: Array | None = None,
    released: bool = False,
) -> Array:
    addresses = [None if buffer is None else buffer.ctypes.data for buffer in buffers]
    made = Array(
        length=length,
        null_count=null_count,
        offset=offset,
        n_buffers=len(buffers),
        n_children=len(children),
        buffers=(ctypes.c_void_p * max(len(buffers), 1))(*addresses),
        children=_pointers(children, Array),
        dictionary=None if dictionary is None else ctypes.pointer(dictionary),
        release=RELEASE_ARRAY() if released else _release_array,
    )
    made.kept = buffers, children, dictionary
    return made


class Producer:
    """Gives capsules of these structs, which it keeps. A capsule without a destructor may be made of them again."""

    def __init__(self, schema: Schema, array: Array) -> None:
        self.schema, self.array = schema, array

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return (
            _new_capsule(ctypes.addressof(self.schema), b"arrow_schema", None),
            _new_capsule(ctypes.addressof(self.array), b"arrow_array", None),
        )
