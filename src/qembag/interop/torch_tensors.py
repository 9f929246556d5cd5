"""The tensors of a file of `torch.save`, where they lie in the mapped file; torch is not needed.

Types, schemes, devices and layouts are texts here: "float32", "per_channel_affine". The name of a tensor is the keys on
the way to it, of dictionaries, lists and tuples, joined with dots. A tensor saved by itself is "table".
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ..formats.safetensors_file import brief
from .budget import ITEM, OBJECT, PLACE, Budget, characters
from .inert_pickle import MAX_NAME, PLAIN, Global, OrderedDict, UnknownGlobal, Unread, read_pickle, what
from .torch_zip import SAVE, Archive, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from .foreign import Memory

# What the directory and the pickle may make in memory, beside a quarter and a half of the file's size: together less
# than the file and 50 MB.
FREE_DIRECTORY, FREE_PICKLE = 12 << 20, 28 << 20
# The bound on work for a small pickle in a large file: objects take at most so many times its bytes.
TIMES_PICKLE = 40
# Headers of records stand beside their data: reading them maps pages of the file, which are given back this often.
HEADERS_AT_ONCE = 256
# NumPy 1 has no arrays of more dimensions.
MAX_RANK = 32
MAX_DEPTH = 100
# What a table of a tensor takes beside its rows: a pickle may name one tensor tens of thousands of times.
TABLE, TABLE_RANK = 16 * OBJECT, 2
ALONE = "table"

# NumPy's types of torch's, less the byte order. Those that NumPy lacks are their bits.
NUMPY_TYPES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "u2",
    "float8_e4m3fn": "u1",
    "float8_e4m3fnuz": "u1",
    "float8_e5m2": "u1",
    "float8_e5m2fnuz": "u1",
    "float8_e8m0fnu": "u1",
    "float4_e2m1fn_x2": "u1",
    "complex32": "u4",
    "complex64": "c8",
    "complex128": "c16",
    "bool": "?",
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "int64": "i8",
}
# Quantized types, and how many elements a byte of each holds.
PER_BYTE = {"quint8": 1, "qint8": 1, "quint4x2": 2, "quint2x4": 4}
STORAGES = {
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QUInt8Storage": "quint8",
    "QInt8Storage": "qint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "QInt32Storage": "qint32",
}
# Types that are only named: of codes of few bits, one to a byte, and of quantized tensors.
NAMED_TYPES = [*(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)), *PER_BYTE, "qint32"]
SCHEMES = ["per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams"]
SETS = ("set", "frozenset")
PATHS = ("pathlib", "pathlib._local")
WRAPPERS = [
    ("torchrec.tensor_types", "UInt4Tensor"),
    ("torchrec.tensor_types", "UInt2Tensor"),
    ("torchao.quantization", "IntxUnpackedToInt8Tensor"),
]
# Values without tables of ours: they are passed over. Checkpoints of training hold those of Python and NumPy.
UNREAD = [
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_nested_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch", "ScriptObject"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *((module, name) for module in ("builtins", "__builtin__") for name in (*SETS, "bytearray", "complex")),
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *((module, f"{pure}{kind}Path") for module in PATHS for pure in ("", "Pure") for kind in ("Posix", "Windows")),
    ("argparse", "Namespace"),
]
FACTORIES = ["dict", "list", "int", "long", "float", "str", "bool"]


class Storage(NamedTuple):
    """Bytes of the file, and the type that the file gives them."""

    dtype: str
    record: Record


class Tensor(NamedTuple):
    """A tensor in the mapped file: within its storage, and its storage within the file."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    start: int  # in bytes, from the beginning of the file
    memory: Memory
    big_endian: bool

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape})"

    def array(self) -> NDArray[Any]:
        """A view of the file, in its byte order, with the tensor's strides; types that NumPy lacks are their bits."""
        kind = np.dtype(NUMPY_TYPES[self.dtype]).newbyteorder(">" if self.big_endian else "<")
        return _view(self.memory, kind, self.shape, self.stride, self.start)


class QTensor(NamedTuple):
    """A quantized tensor: codes in the mapped file, as stored.

    Attributes
    ----------
    kind : str
        "quint8", "qint8", "quint4x2" or "quint2x4", by the class of the storage.
    shape : tuple of int
        In elements.
    codes : ndarray of uint8
        Of `shape`, a view with the tensor's strides. With several codes in a byte, whole bytes: the last dimension is
        rounded up, the lowest bits are the first code, and rows lie one after another.
    scheme : str
        "per_tensor_affine", "per_channel_affine" or "per_channel_affine_float_qparams".
    scales, zero_points : Tensor, or float and int
        Tensors of as many elements as the dimension `axis` has; numbers with a scheme per tensor.
    axis : int
        0 with a scheme per tensor.
    """

    kind: str
    shape: tuple[int, ...]
    codes: NDArray[np.uint8]
    scheme: str
    scales: Tensor | float
    zero_points: Tensor | int
    axis: int

    def __repr__(self) -> str:
        return f"QTensor({self.kind}, {self.shape})"


class Wrapped(NamedTuple):
    """A tensor of a class of another library: its attributes, as the file has them."""

    cls: str
    state: dict[str, Any]
    dtype: str
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        # The state may be of any size and depth.
        return f"Wrapped({self.cls}, {self.shape})"


AnyTensor: TypeAlias = Tensor | QTensor | Wrapped
TENSORS = (Tensor, QTensor, Wrapped)


class Entries(NamedTuple):
    """What a file holds, by dotted names, in the order of the file.

    Attributes
    ----------
    tensors : dict
    others : dict
        Plain values and names of types that stand in one dictionary, list or tuple with a tensor; an `Unread` for what
        is passed over, such as a sparse tensor.
    big_endian : bool
        Whether the writer's numbers are big-endian.
    """

    tensors: dict[str, AnyTensor]
    others: dict[str, Any]
    big_endian: bool


def read_entries(memory: Memory) -> Entries:
    """The tensors of a file of `torch.save`. Their bytes are not read.

    Raises
    ------
    ValueError
        If the file is of another kind, or damaged, or has more in its pickle than tensors and plain values.
    """
    size = len(memory.bytes)
    archive = Archive(memory, Budget("its directory", FREE_DIRECTORY + size // 4))
    data = archive.pickle()
    budget = Budget("what it builds", FREE_PICKLE + min(size // 2, TIMES_PICKLE * len(data)))
    builder = _Builder(memory, archive, budget)
    try:
        whole = read_pickle(data, builder.table(), builder.persistent, budget)
        tensors, others = _flattened(whole, budget)
    except UnknownGlobal as error:
        raise ValueError(
            f"data.pkl {error}: if the file is a whole model, load it where it is trusted, and {SAVE}"
        ) from None
    except ValueError as error:
        raise ValueError(f"data.pkl {error}") from None
    memory.release()
    return Entries(tensors, others, archive.big_endian)


# ---- What stands in the place of torch's functions -------------------------------------------------------------------


class _Builder:
    """Makes tensors of a file from what its pickle calls."""

    def __init__(self, memory: Memory, archive: Archive, budget: Budget) -> None:
        self.memory, self.archive, self.budget = memory, archive, budget
        self.storages: dict[str, Storage] = {}

    def table(self) -> dict[tuple[str, str], Any]:
        """Everything that a pickle may name."""
        calls = {
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self.tensor_of_type,
            ("torch._utils", "_rebuild_qtensor"): self.qtensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
            ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
            ("torch._utils", "_rebuild_wrapper_subclass"): None,
            ("torch.serialization", "_get_layout"): _first,
            ("torch", "device"): _first,
            ("torch", "Size"): _first,
            ("torch", "Tensor"): None,
            ("numpy", "ndarray"): None,
            ("torch.nn.parameter", "Parameter"): None,
            ("torch.nn.parameter", "Buffer"): None,
            ("collections", "OrderedDict"): _empty,
            ("collections", "defaultdict"): _empty,
            ("collections", "Counter"): _counter,
            ("_codecs", "encode"): _encoded,
            **dict.fromkeys(WRAPPERS),
            **{(module, name): None for module in ("builtins", "__builtin__") for name in FACTORIES},
        }
        table: dict[tuple[str, str], Any] = {key: Global(".".join(key), call) for key, call in calls.items()}
        table |= {key: Global(".".join(key), _passing(".".join(key))) for key in UNREAD}
        table |= {("torch", name): name for name in [*NUMPY_TYPES, *NAMED_TYPES, *SCHEMES]}
        storages = {("torch", name): dtype for name, dtype in STORAGES.items()}
        storages["torch.storage", "UntypedStorage"] = "uint8"
        return table | {key: StorageType(dtype) for key, dtype in storages.items()}

    def persistent(self, given: Any) -> Storage:
        """The storage that a persistent id names."""
        if type(given) is not tuple or len(given) != 5 or given[0] != "storage":
            raise ValueError(f"must name storages by a tuple of five, beginning with 'storage', got {what(given)}")
        _, kind, key, _, numel = given
        if not isinstance(kind, StorageType) or type(key) is not str or not _are_counts([numel]):
            raise ValueError(f"must give a storage a type, a key and a length, got {', '.join(map(what, given[1:]))}")
        storage = self.storages.get(key)
        if storage is None:
            record = self.archive.record(f"data/{key}") if len(key) < MAX_NAME else None
            if record is None:
                raise ValueError(f"names storage {brief(key)}, which the file does not have")
            storage = self.storages[key] = Storage(kind.dtype, record)
            if len(self.storages) % HEADERS_AT_ONCE == 0:
                self.memory.release()
        if storage.dtype != kind.dtype:
            raise ValueError(f"gives storage {brief(key)} two types: {storage.dtype} and {kind.dtype}")
        if numel * _itemsize(kind.dtype) != storage.record.nbytes:
            raise ValueError(
                f"gives storage {brief(key)} {brief(numel)} elements of {kind.dtype}, "
                f"got {storage.record.nbytes} bytes of it"
            )
        return storage

    def tensor(self, arguments: tuple[Any, ...]) -> Tensor | Unread:
        """Of _rebuild_tensor_v2: storage, offset, shape, stride, requires_grad, hooks, and perhaps metadata."""
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
            raise ValueError("calls _rebuild_tensor_v2 with wrong arguments")
        return self._tensor(arguments[0], arguments[1:4], arguments[0].dtype, arguments[6:])

    def tensor_of_type(self, arguments: tuple[Any, ...]) -> Tensor | Unread:
        """Of _rebuild_tensor_v3: as v2, with a type before the metadata."""
        if len(arguments) not in (7, 8) or not isinstance(arguments[0], Storage):
            raise ValueError("calls _rebuild_tensor_v3 with wrong arguments")
        if type(arguments[6]) is not str or arguments[6] not in NUMPY_TYPES:
            raise ValueError(f"gives a tensor the type {what(arguments[6])}, which is not known")
        return self._tensor(arguments[0], arguments[1:4], arguments[6], arguments[7:])

    def _tensor(
        self, storage: Storage, place: tuple[Any, ...], dtype: str, metadata: tuple[Any, ...]
    ) -> Tensor | Unread:
        if dtype not in NUMPY_TYPES or metadata not in ((), (None,), ({},)):
            # Metadata says that values are conjugated or negated.
            return Unread(f"a tensor of {dtype}")
        offset, shape, stride = _checked_place(place)
        start = _start_of(storage, offset, shape, stride, _itemsize(dtype))
        return Tensor(dtype, shape, stride, start, self.memory, self.archive.big_endian)

    def qtensor(self, arguments: tuple[Any, ...]) -> QTensor | Unread:
        """Of _rebuild_qtensor: storage, offset, shape, stride, parameters, requires_grad, hooks."""
        if len(arguments) != 7 or not isinstance(arguments[0], Storage):
            raise ValueError("calls _rebuild_qtensor with wrong arguments")
        storage = arguments[0]
        offset, shape, stride = _checked_place(arguments[1:4])
        scheme, scales, zero_points, axis = _checked_parameters(arguments[4], shape)
        if storage.dtype == "qint32":
            return Unread("a tensor of qint32")
        if storage.dtype not in PER_BYTE:
            raise ValueError(f"gives a quantized tensor a storage of {storage.dtype}")
        stored = shape
        if (per_byte := PER_BYTE[storage.dtype]) > 1:
            if not shape or not _is_contiguous(shape, stride):
                raise ValueError(f"must have tensors of {storage.dtype} contiguous, got strides {brief(stride)}")
            stored = (*shape[:-1], -(-shape[-1] // per_byte))
            stride = tuple(math.prod(stored[axis + 1 :]) for axis in range(len(stored)))
        # torch counts the offset in bytes, with several codes in a byte too.
        start = _start_of(storage, offset, stored, stride, 1)
        self.budget.spend(4 * OBJECT)
        codes = _view(self.memory, np.dtype(np.uint8), stored, stride, start)
        return QTensor(storage.dtype, shape, codes, scheme, scales, zero_points, axis)


class StorageType(NamedTuple):
    """In the place of a class of storages."""

    dtype: str


def _first(arguments: tuple[Any, ...]) -> Any:
    """Of torch.Size, torch.device and the like: a plain value."""
    if not arguments:
        raise ValueError("calls a function of torch with no arguments")
    return arguments[0]


def _empty(arguments: tuple[Any, ...]) -> OrderedDict:
    """Of OrderedDict, and of defaultdict, whose argument makes values that no reader asks for."""
    if any(not isinstance(argument, Global) for argument in arguments):
        raise ValueError("gives a new dictionary items otherwise than one by one")
    return OrderedDict()


def _counter(arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 1 or not isinstance(arguments[0], dict):
        raise ValueError("calls collections.Counter with wrong arguments")
    return arguments[0]


def _encoded(arguments: tuple[Any, ...]) -> Unread:
    """Of _codecs.encode: bytes, as protocol 2 has them."""
    return Unread("bytes")


def _passing(name: str) -> Any:
    return lambda arguments: Unread(name)


def _parameter(arguments: tuple[Any, ...]) -> Any:
    if len(arguments) not in (3, 4) or not isinstance(arguments[0], (*TENSORS, Unread)):
        raise ValueError("calls _rebuild_parameter with wrong arguments")
    return arguments[0]


def _of_type(arguments: tuple[Any, ...]) -> Any:
    """Of _rebuild_from_type_v2: a function, the type of what it makes, its arguments, and the state of that."""
    if len(arguments) != 4 or not all(isinstance(each, Global) for each in arguments[:2]):
        raise ValueError("calls _rebuild_from_type_v2 with wrong arguments")
    function, cls, given, state = arguments
    if function.name != "torch._utils._rebuild_wrapper_subclass":
        if not function.name.startswith("torch._utils._rebuild_") or not cls.name.startswith("torch."):
            raise ValueError(f"makes {cls.name} by {function.name}, which is not allowed")
        if type(given) is not tuple or function.call is None:
            raise ValueError(f"calls {function.name} with {what(given)}, which is not allowed")
        return function.call(given)
    if cls.name not in {".".join(wrapper) for wrapper in WRAPPERS}:
        raise ValueError(f"makes {cls.name} by {function.name}, which is not allowed")
    if type(given) is not tuple or len(given) != 8 or given[0] is not cls or not isinstance(state, dict):
        raise ValueError("calls _rebuild_wrapper_subclass with wrong arguments")
    _, dtype, shape, stride, offset, *_ = given
    _checked_place((offset, shape, stride))
    if type(dtype) is not str:
        raise ValueError(f"gives a tensor the type {what(dtype)}")
    return Wrapped(cls.name, state, dtype, shape)


# ---- Places ----------------------------------------------------------------------------------------------------------


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _itemsize(dtype: str) -> int:
    return np.dtype(NUMPY_TYPES.get(dtype, "i4" if dtype == "qint32" else "u1")).itemsize


def _checked_place(place: tuple[Any, ...]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Offset, shape and stride, if they are counts."""
    offset, shape, stride = place
    if type(shape) is not tuple or type(stride) is not tuple or not _are_counts([offset]):
        raise ValueError(f"must give a tensor an offset, a shape and strides, got {', '.join(map(what, place))}")
    if len(shape) != len(stride) or len(shape) > MAX_RANK or not _are_counts(shape) or not _are_counts(stride):
        raise ValueError(
            f"must give a tensor a shape and strides of at most {MAX_RANK} whole numbers, "
            f"got {len(shape)} and {len(stride)}, or other values"
        )
    return offset, shape, stride


def _start_of(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> int:
    """Where the first element lies in the file. Raises ValueError if an element is outside the storage."""
    used = 0
    if 0 not in shape:
        used = offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True)) + 1
    # A shape may be of any size where strides are 0, or with a 0 in it. NumPy has a limit.
    if used * itemsize > storage.record.nbytes or math.prod(filter(None, shape)) * itemsize > sys.maxsize:
        raise ValueError(
            f"has a tensor outside its storage of {storage.record.nbytes} bytes: shape {brief(shape)}, "
            f"strides {brief(stride)}, offset {brief(offset)}"
        )
    return storage.record.start + (offset * itemsize if used else 0)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for count, step in zip(reversed(shape), reversed(stride), strict=True):
        if count > 1 and step != expected:
            return 0 in shape
        expected *= count
    return True


def _view(
    memory: Memory, kind: np.dtype[Any], shape: tuple[int, ...], stride: tuple[int, ...], start: int
) -> NDArray[Any]:
    # The stride of a dimension without a second element may be anything.
    used = 0 not in shape
    steps = [step * kind.itemsize if used and count > 1 else 0 for count, step in zip(shape, stride, strict=True)]
    return np.ndarray(shape, kind, memory.bytes, start, steps)


def _checked_parameters(given: Any, shape: tuple[int, ...]) -> tuple[str, Any, Any, int]:
    """The scheme of a quantized tensor, its scales, zero points and axis."""
    if type(given) is not tuple or len(given) not in (3, 4) or given[0] not in SCHEMES:
        raise ValueError(f"gives a quantized tensor the parameters {what(given)}, which is no known scheme")
    scheme, scales, zero_points, *rest = given
    if scheme == SCHEMES[0]:
        if rest or type(scales) is not float or type(zero_points) is not int:
            raise ValueError(
                f"must have one scale and zero point for {scheme}, got {what(scales)}, {what(zero_points)}"
            )
        return scheme, scales, zero_points, 0
    if not rest or not _are_counts(rest) or rest[0] >= len(shape):
        raise ValueError(f"must have an axis of {len(shape)} for {scheme}, got {', '.join(map(what, rest))}")
    for values in (scales, zero_points):
        if not isinstance(values, Tensor) or values.shape != (shape[rest[0]],):
            raise ValueError(f"must have {brief(shape[rest[0]])} scales and zero points for {scheme}")
    return scheme, scales, zero_points, rest[0]


# ---- Names -----------------------------------------------------------------------------------------------------------


def _items(container: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(container, dict):
        return iter(container.items())
    return ((str(number), value) for number, value in enumerate(container))


def _is_container(value: Any) -> bool:
    return isinstance(value, dict) or type(value) in (list, tuple)


def _flattened(whole: Any, budget: Budget) -> tuple[dict[str, AnyTensor], dict[str, Any]]:
    """Tensors and plain values by dotted name. A container that stands in several places is walked in each."""
    if not _is_container(whole):
        whole = {ALONE: whole}
    tensors: dict[str, AnyTensor] = {}
    others: dict[str, Any] = {}
    above = {id(whole)}
    waiting = [("", whole, _items(whole), _has_tensors(whole))]
    while waiting:
        prefix, container, items, has_tensors = waiting[-1]
        key, value = next(items, (None, None))
        if key is None:
            waiting.pop()
            above.discard(id(container))
            continue
        budget.spend(PLACE)
        is_container = _is_container(value)
        if not is_container and not isinstance(value, (*TENSORS, Unread)) and not has_tensors:
            continue
        budget.spend(ITEM + 2 * OBJECT + characters(prefix, key))
        name = prefix + key
        if is_container:
            if id(value) in above or len(above) == MAX_DEPTH:
                raise ValueError(f"nests more than {MAX_DEPTH} deep, or in itself, at {brief(name)}")
            above.add(id(value))
            waiting.append((name + ".", value, _items(value), _has_tensors(value)))
        elif isinstance(value, TENSORS):
            if name in tensors:
                raise ValueError(f"has two tensors of the name {brief(name)}")
            if len(value.shape) == TABLE_RANK:
                budget.spend(TABLE)
            tensors[name] = value
        elif value is None or isinstance(value, (Unread, *PLAIN)):
            others[name] = value
    return tensors, others


def _has_tensors(container: Any) -> bool:
    values = container.values() if isinstance(container, dict) else container
    return any(isinstance(value, TENSORS) for value in values)
