"""Tensors of files of torch.save, read without torch: where they lie, what they are called, and what is refused."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qembag.formats.safetensors_file import brief
from qembag.interop.foreign import Memory
from qembag.interop.inert_pickle import Unread
from qembag.interop.torch_tensors import Entries, QTensor, Tensor, Wrapped, read_entries
from support.torch_files import (
    Call,
    Entry,
    File,
    Name,
    Persistent,
    archive_of,
    entries_of,
    files_of_every_kind,
    metadata,
    ordered,
    parameter,
    pickled,
    view,
)

Open = Callable[[bytes], Entries]
X = np.arange(24, dtype=np.float32).reshape(4, 6)

# As many as NumPy can count.
MANY = sys.maxsize >> 9


@pytest.fixture
def entries(tmp_path: Path) -> Open:
    def read(raw: bytes) -> Entries:
        path = tmp_path / "a.pt"
        path.write_bytes(raw)
        return read_entries(Memory(path))

    return read


def refused(entries: Open, raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        entries(raw)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 1000


# ---- Where they lie ----------------------------------------------------------------------------------------------------

TYPES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "DoubleStorage": "float64", "ByteStorage": "uint8",
    "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_read_in_the_files_byte_order(entries, kind, big_endian):
    file = File(big_endian=big_endian)
    values = (X % 2 if kind == "BoolStorage" else X).astype(TYPES[kind])
    found = entries(file.saved({"a": file.tensor(values, kind.removesuffix("Storage"))}))
    tensor = found.tensors["a"]
    assert (tensor.dtype, tensor.shape, tensor.stride) == (TYPES[kind], (4, 6), (6, 1))
    assert found.big_endian is big_endian
    array = tensor.array()
    assert np.array_equal(array, values)
    assert not array.flags.writeable
    assert array.dtype.itemsize == 1 or array.dtype.byteorder in ("<>"[big_endian], "=")
    assert array.dtype == values.dtype.newbyteorder("<>"[big_endian])


def test_types_that_numpy_lacks_are_their_bits(entries):
    file = File()
    bits = np.arange(6, dtype=np.uint16)
    untyped = file.storage(bits.astype("<u2").view(np.uint8))
    untyped = Persistent((untyped.id[0], Name("torch.storage", "UntypedStorage"), *untyped.id[2:]))

    def typed(name: str, shape: tuple[int, ...]) -> Call:
        rebuild = Name("torch._utils", "_rebuild_tensor_v3")
        return Call(rebuild, (untyped, 0, shape, (1,), False, ordered(), Name("torch", name)))

    value = {
        "a": file.tensor(bits, "BFloat16"),
        "b": typed("uint16", (6,)),
        "c": typed("float8_e4m3fn", (12,)),
        "d": typed("bfloat16", (6,)),
    }
    tensors = entries(file.saved(value)).tensors
    assert [tensor.dtype for tensor in tensors.values()] == ["bfloat16", "uint16", "float8_e4m3fn", "bfloat16"]
    for name in "abd":
        assert np.array_equal(tensors[name].array(), bits)
    assert tensors["c"].array().tobytes() == bits.astype("<u2").tobytes()
    refused(entries, file.saved(typed("quint8", (6,))), "gives a tensor the type 'quint8', which is not known")


def test_tensors_share_storages_at_any_offset_and_stride(entries):
    file = File()
    storage = file.storage(X)
    value = {
        "whole": view(storage, (4, 6)),
        "rows": view(storage, (2, 6), offset=6),
        "transposed": view(storage, (6, 4), (1, 6)),
        "column": view(storage, (4, 1), (6, 1), 2),
        "expanded": view(storage, (5, 6), (0, 1), 12),
        "one": view(storage, (), (), 23),
        "none": view(storage, (0, 3), (99999, 2**70), 24),
        "none beyond": view(storage, (MANY, 0), (1, 1), 2**70),
        "any stride of one": view(storage, (1, 6), (2**70, 1), 6),
    }
    tensors = entries(file.saved(value)).tensors
    assert np.array_equal(tensors["whole"].array(), X)
    assert np.array_equal(tensors["rows"].array(), X[1:3])
    assert np.array_equal(tensors["transposed"].array(), X.T)
    assert np.array_equal(tensors["column"].array(), X[:, 2:3])
    assert np.array_equal(tensors["expanded"].array(), np.broadcast_to(X[2], (5, 6)))
    assert tensors["one"].array() == 23
    assert tensors["none"].array().shape == (0, 3)
    assert tensors["none beyond"].array().shape == (MANY, 0)
    assert np.array_equal(tensors["any stride of one"].array(), X[1:2])
    assert np.shares_memory(tensors["rows"].array(), tensors["whole"].array())


OUTSIDE = {
    "one row too many": ((5, 6), (6, 1), 0),
    "one element too far": ((4, 6), (6, 1), 1),
    "an offset at the end": ((), (), 24),
    "an offset far beyond": ((1,), (1,), 2**63),
    "a stride that is too long": ((2, 2), (24, 1), 0),
    "a stride beyond all numbers": ((2,), (2**64,), 0),
    "a shape beyond all numbers": ((2**63,), (1,), 0),
    "an expanded shape that NumPy cannot have": ((2**62, 8), (0, 0), 0),
    "an empty shape that NumPy cannot have": ((2**62, 8, 0), (0, 0, 0), 0),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_tensor_outside_its_storage_is_refused(entries, kind):
    shape, strides, offset = OUTSIDE[kind]
    file = File()
    value = view(file.storage(X), shape, strides, offset)
    refused(entries, file.saved({"a": value}), r"data.pkl has a tensor outside its storage of 96 bytes")


@pytest.mark.parametrize(
    "place",
    [(-1, (4, 6), (6, 1)), (0, (-4, 6), (6, 1)), (0, (4, 6), (-6, 1)), (0, (4, 6), (6,)), (0, [4, 6], (6, 1)),
     (0, (4, 6), None), (0.0, (4, 6), (6, 1)), (True, (4, 6), (6, 1)), (0, (4.0, 6), (6, 1)), (0, (True, 6), (6, 1)),
     (0, (1,) * 33, (1,) * 33), (0, ("4", 6), (6, 1)), (None, (), ())],
)  # fmt: skip
def test_a_place_that_is_none_is_refused(entries, place):
    file = File()
    storage = file.storage(X)
    call = Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, *place, False, ordered()))
    refused(entries, file.saved({"a": call}), "must give a tensor")


FLOAT = Name("torch", "FloatStorage")
STORAGE_IDS = {
    "too few parts": (("storage", FLOAT, "0", "cpu"), "by a tuple of five"),
    "another word": (("module", FLOAT, "0", "cpu", 24), "beginning with 'storage'"),
    "a text": ("storage", "by a tuple of five"),
    "no class": (("storage", "FloatStorage", "0", "cpu", 24), "must give a storage a type"),
    "a type": (("storage", Name("torch", "float32"), "0", "cpu", 24), "must give a storage a type"),
    "a number as key": (("storage", FLOAT, 0, "cpu", 24), "must give a storage a type, a key and a length"),
    "a length of text": (("storage", FLOAT, "0", "cpu", "24"), "must give a storage a type"),
    "a length below 0": (("storage", FLOAT, "0", "cpu", -1), "must give a storage a type"),
    "another key": (("storage", FLOAT, "7", "cpu", 24), "names storage '7', which the file does not have"),
    "a way out of the folder": (("storage", FLOAT, "../data.pkl", "cpu", 24), "which the file does not have"),
    "a long key": (("storage", FLOAT, "0" * 100_000, "cpu", 24), "which the file does not have"),
    "too long": (("storage", FLOAT, "0", "cpu", 25), "25 elements of float32, got 96 bytes"),
    "too short": (("storage", FLOAT, "0", "cpu", 23), "23 elements of float32, got 96 bytes"),
    "of another type": (("storage", Name("torch", "HalfStorage"), "0", "cpu", 24), "24 elements of float16"),
    "beyond all numbers": (("storage", FLOAT, "0", "cpu", 2**100), "elements of float32, got 96 bytes"),
}


@pytest.mark.parametrize("kind", STORAGE_IDS)
def test_a_storage_that_is_not_as_it_says_is_refused(entries, kind):
    given, words = STORAGE_IDS[kind]
    file = File()
    file.storage(X)
    refused(entries, file.saved({"a": view(Persistent(given), (4, 6))}), words)


def test_a_storage_has_one_type(entries):
    file = File()
    first = file.storage(X)
    second = Persistent((*first.id[:1], Name("torch", "IntStorage"), *first.id[2:]))
    refused(entries, file.saved([view(first, (4, 6)), view(second, (4, 6))]), "two types: float32 and int32")


# ---- Quantized tensors and those of other libraries --------------------------------------------------------------------

SCALES, ZEROS = np.arange(4, dtype=np.float32) + 1, np.arange(4, dtype=np.float32)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(("kind", "per_byte"), [("QUInt8", 1), ("QInt8", 1), ("QUInt4x2", 2), ("QUInt2x4", 4)])
@pytest.mark.parametrize("dim", [8, 7, 5, 1])
def test_quantized_tensors_are_their_codes_as_stored(entries, kind, per_byte, dim, big_endian):
    file = File(big_endian=big_endian)
    width = -(-dim // per_byte)
    codes = np.arange(4 * width, dtype=np.uint8).reshape(4, width)
    found = entries(file.saved({"a": file.qtensor(codes, kind, SCALES, ZEROS, dim)})).tensors["a"]
    assert isinstance(found, QTensor)
    assert (found.kind, found.shape, found.axis) == (kind.lower(), (4, dim), 0)
    assert found.scheme == "per_channel_affine"
    assert np.array_equal(found.codes, codes)
    assert np.array_equal(found.scales.array(), SCALES)
    assert np.array_equal(found.zero_points.array(), ZEROS)


def qtensor(file: File, **changes: Any) -> Call:
    parts = {
        "storage": file.storage(np.arange(40, dtype=np.uint8), "QUInt4x2"),
        "offset": 0,
        "shape": (4, 6),
        "stride": (6, 1),
        "parameters": (Name("torch", "per_channel_affine"), file.tensor(SCALES), file.tensor(ZEROS), 0),
    } | changes
    return Call(Name("torch._utils", "_rebuild_qtensor"), (*parts.values(), False, ordered()))


def test_the_offset_of_codes_of_4_bits_counts_bytes(entries):
    """As torch's own lookup does: see tests/test_torch_saved.py."""
    file = File()
    found = entries(file.saved(qtensor(file, offset=5))).tensors["table"]
    assert np.array_equal(found.codes, np.arange(5, 17).reshape(4, 3))
    refused(entries, file.saved(qtensor(file, offset=29)), "outside its storage of 40 bytes")
    refused(entries, file.saved(qtensor(file, stride=(8, 1))), "must have tensors of quint4x2 contiguous")
    refused(entries, file.saved(qtensor(file, shape=(), stride=())), "an axis of 0|contiguous")


def test_one_scale_for_all_is_read(entries):
    """Packed parameters of a quantized linear layer: no table, and no reason to refuse the file."""
    file = File()
    weight = qtensor(
        file,
        storage=file.storage(np.arange(24, dtype=np.int8), "QInt8"),
        parameters=(Name("torch", "per_tensor_affine"), 0.5, 3),
    )
    value = {"fc.scale": file.tensor(np.float32(1)), "fc._packed_params": (weight, parameter(file.tensor(SCALES)))}
    found = entries(file.saved(value)).tensors
    assert list(found) == ["fc.scale", "fc._packed_params.0", "fc._packed_params.1"]
    assert found["fc._packed_params.0"][3:] == ("per_tensor_affine", 0.5, 3, 0)
    assert found["fc.scale"].shape == ()


def test_parameters_of_quantized_tensors_are_checked(entries):
    file = File()
    scales, zeros = file.tensor(SCALES), file.tensor(ZEROS)
    channel, tensor = Name("torch", "per_channel_affine"), Name("torch", "per_tensor_affine")
    for parameters, words in (
        (None, "no known scheme"),
        ((), "no known scheme"),
        (("per_row", scales, zeros, 0), "no known scheme"),
        (([], scales, zeros, 0), "no known scheme"),
        ((channel, scales, zeros), "must have an axis"),
        ((channel, scales, zeros, 2), "must have an axis"),
        ((channel, scales, zeros, -1), "must have an axis"),
        ((channel, scales, zeros, True), "must have an axis"),
        ((channel, scales, zeros, 1), "must have 6 scales and zero points"),
        ((channel, [1.0] * 4, zeros, 0), "must have 4 scales and zero points"),
        ((channel, scales, 0, 0), "must have 4 scales and zero points"),
        ((tensor, scales, 0), "must have one scale and zero point"),
        ((tensor, 1.0, 0.0), "must have one scale and zero point"),
        ((tensor, 1.0, 0, 0), "must have one scale and zero point"),
    ):
        refused(entries, file.saved(qtensor(file, parameters=parameters)), words)
    refused(entries, file.saved(qtensor(file, storage=file.storage(X))), "a storage of float32")


def test_tensors_of_other_libraries_are_their_attributes(entries):
    file = File()
    state = {"N": 2, "elem": file.tensor(np.zeros((3, 16), np.uint8)), "dtype": Name("torch", "int4")}
    found = entries(file.saved(file.wrapped("torchrec.tensor_types", "UInt4Tensor", (3, 32), state))).tensors["table"]
    assert isinstance(found, Wrapped)
    assert (found.cls, found.dtype, found.shape) == ("torchrec.tensor_types.UInt4Tensor", "float32", (3, 32))
    assert (found.state["N"], found.state["elem"].shape, found.state["dtype"]) == (2, (3, 16), "int4")


def test_what_is_shown_of_values_is_short(entries):
    """An error may show any value of a file."""
    file = File()
    inner: Any = ordered({"a": "x" * 9000})
    for _ in range(30):
        inner = file.wrapped("torchrec.tensor_types", "UInt4Tensor", (3, 32), {"elem": ordered({"b": inner})})
    value = {"w": inner, "q": qtensor(file), "t": file.tensor(X)}
    found = entries(file.saved(value)).tensors
    assert repr(found["w"]) == "Wrapped(torchrec.tensor_types.UInt4Tensor, (3, 32))"
    assert repr(found["q"]) == "QTensor(quint4x2, (4, 6))"
    assert repr(found["t"]) == "Tensor(float32, (4, 6))"
    assert len(brief(found["w"].state)) < 300


def test_only_listed_classes_are_made(entries):
    file = File()
    tensor = file.tensor(X)
    for module, name, words in (
        ("torchrec.tensor_types", "UInt8Tensor", "got 'torchrec.tensor_types.UInt8Tensor'"),
        ("os", "system", "got 'os.system'"),
        ("torch", "Tensor", "makes torch.Tensor by"),
        ("collections", "OrderedDict", "makes collections.OrderedDict by"),
    ):
        refused(entries, file.saved(file.wrapped(module, name, (4, 6), {"elem": tensor})), words)
    made = file.wrapped("torchrec.tensor_types", "UInt4Tensor", (4, 6), {"elem": tensor})
    rebuild, cls, arguments, state = made.arguments
    for wrong in (
        (rebuild, cls, arguments),
        (rebuild, cls, arguments[:7], state),
        (rebuild, cls, (Name("torch", "Tensor"), *arguments[1:]), state),
        (rebuild, cls, arguments, None),
        (rebuild, cls, arguments, []),
        (rebuild, cls, (cls, 1, *arguments[2:]), state),
        (rebuild, cls, (cls, arguments[1], [4, 6], *arguments[3:]), state),
        ("_rebuild_wrapper_subclass", cls, arguments, state),
        (Name("torch._tensor", "_rebuild_from_type_v2"), cls, arguments, state),
        (Name("torch._utils", "_rebuild_tensor_v2"), Name("torch", "Tensor"), None, state),
    ):
        refused(entries, file.saved(made._replace(arguments=wrong)), "data.pkl (calls|makes|gives|must)")


def test_a_tensor_with_attributes_is_the_tensor(entries):
    file = File()
    given = file.tensor(X)
    call = (given.function, Name("torch", "Tensor"), given.arguments, {"note": "x"})
    found = entries(file.saved([Call(Name("torch._tensor", "_rebuild_from_type_v2"), call)]))
    assert np.array_equal(found.tensors["0"].array(), X)


# ---- Names -------------------------------------------------------------------------------------------------------------


def test_names_are_the_keys_on_the_way(entries):
    file = File()
    one = file.tensor(X)
    value = ordered(
        {"a.weight": one, "b": {"c": [one, (one, 3)], 7: one}, "d": None, "e": "text", "f": {"g": 1}}, metadata("", "a")
    )
    found = entries(file.saved(value))
    assert list(found.tensors) == ["a.weight", "b.c.0", "b.c.1.0", "b.7"]
    assert found.others == {"b.c.1.1": 3, "d": None, "e": "text"}
    assert list(entries(file.saved(one)).tensors) == ["table"]
    assert list(entries(file.saved((one, one))).tensors) == ["0", "1"]
    for nothing in ({}, [], 3, "text", None, ordered()):
        assert entries(file.saved(nothing)).tensors == {}


def test_one_container_in_two_places_has_two_names(entries):
    file = File()
    inner = pickled({"w": file.tensor(X)})[2:-1]
    raw = b"\x80\2}" + b"X\1\0\0\0a" + inner + b"q\0s" + b"X\1\0\0\0bh\0s."
    assert list(entries(archive_of(entries_of(raw, file.storages))).tensors) == ["a.w", "b.w"]


def test_two_tensors_of_one_name_are_refused(entries):
    file = File()
    one = file.tensor(X)
    refused(entries, file.saved({"a.b": one, "a": {"b": one}}), "two tensors of the name 'a.b'")


def test_what_cannot_be_read_is_passed_over_by_name(entries):
    file = File()
    tensor = file.tensor(X.astype(np.complex64), "ComplexFloat")
    value = {
        "a": file.tensor(X),
        "sparse": Call(Name("torch._utils", "_rebuild_sparse_tensor"), ("torch.sparse_coo", (tensor, tensor))),
        "conjugated": tensor._replace(arguments=(*tensor.arguments, {"conj": True})),
        "int32": view(file.storage(X.astype(np.int32), "QInt32"), (4, 6)),
        "set": Call(Name("__builtin__", "set"), ([1, 2],)),
        "bytes": Call(Name("_codecs", "encode"), ("ab", "latin1")),
        "size": Call(Name("torch", "Size"), ((1, 2),)),
        "numpy": Call(Name("numpy._core.multiarray", "scalar"), (Call(Name("numpy", "dtype"), ("f8",), state=(3,)),)),
        "counts": Call(Name("collections", "Counter"), ({"a": 1},)),
        "default": Call(Name("collections", "defaultdict"), (Name("__builtin__", "dict"),), {"a": 1}),
    }
    found = entries(file.saved(value))
    assert list(found.tensors) == ["a"]
    passed = {name: value for name, value in found.others.items() if isinstance(value, Unread)}
    assert list(passed) == ["sparse", "conjugated", "int32", "set", "bytes", "numpy"]
    assert passed["sparse"].name == "torch._utils._rebuild_sparse_tensor"


def test_a_whole_model_is_refused_and_told_what_to_do(entries):
    file = File()
    value = Call(Name("torch.nn.modules.sparse", "EmbeddingBag"), (), state={"weight": file.tensor(X)})
    words = r"got 'torch.nn.modules.sparse.EmbeddingBag': if .* whole model, .*torch.save\(model.state_dict\(\), path\)"
    refused(entries, file.saved(value), words)


def test_files_of_every_kind_are_read(entries):
    for kind, raw in files_of_every_kind().items():
        found = entries(raw)
        assert found.tensors, kind
        for tensor in found.tensors.values():
            assert isinstance(tensor, (Tensor, QTensor, Wrapped))


# ---- Memory ------------------------------------------------------------------------------------------------------------


def test_deep_and_circular_containers_are_refused(entries):
    refused(entries, saved_raw(b"]q\0h\0a"), "nests .* or in itself")
    refused(entries, saved_raw(b"]q\0}X\1\0\0\0ah\0sa"), "or in itself, at '0.a'")
    refused(entries, saved_raw(b"](" * 5000 + b"e" * 5000), "nests more than 100 deep")
    refused(entries, saved_raw(b")" + b"\x85" * 50_000), "nests more than 100 deep")


def saved_raw(codes: bytes) -> bytes:
    return archive_of(entries_of(b"\x80\2" + codes + b".", {}))


def test_containers_that_alias_do_not_multiply(entries):
    """40 lists, each with the next one twice: a million million ways."""
    codes = b"(]q\0" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40)) + b"t"
    tracemalloc.start()
    try:
        refused(entries, saved_raw(codes), "what it builds must not need more than")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.skipif(sys.maxsize < 2**32, reason="needs an address space of 64 bits")
def test_values_are_not_read_with_the_names(tmp_path):
    """A file of 5 GB, most of it a hole, takes neither time nor memory."""
    size, end = 5 << 30, b"the end of the data"
    codes = pickled({"a": view(Persistent(("storage", Name("torch", "ByteStorage"), "0", "cpu", size)), (size,))})
    *others, _, _ = entries_of(codes, {})
    numbers = size.to_bytes(8, "little") * 2
    full = {"size": 2**32 - 1, "packed": 2**32 - 1}
    data = Entry(b"archive/data/0", end, full, {"size": 0, "packed": 0}, extra=b"\1\0\x10\0" + numbers)
    raw = archive_of([*others, data], descriptors=False)
    hole, begin = size - len(end), raw.index(end)
    shifted = {"start": raw.index(b"PK\1\2") + hole, "at": raw.index(b"PK\6\6") + hole}
    raw = archive_of([*others, data], descriptors=False, **shifted)
    path = tmp_path / "a.pt"
    with path.open("wb") as file:
        file.write(raw[:begin])
        file.seek(begin + hole)
        file.write(raw[begin:])
    tracemalloc.start()
    try:
        tensor = read_entries(Memory(path)).tensors["a"]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert tensor.shape == (size,)
    assert tensor.array()[-len(end) :].tobytes() == end
