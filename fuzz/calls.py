"""Bytes to calls of the package: every choice of a call is read from a fuzzer's input.

An input is a row of scenes. A scene makes arguments of all kinds, right and wrong, and with them some calls: the same
ones at each level, with an output and without. What must come of them is known here by two roads that share nothing
with the package: `tests/reference.py` says what a right call returns, and a plain model of the arguments says which
errors a wrong one may raise. A byte of zero, as which all bytes behind an input's end count, is the plainest choice.

Arrays lie in blocks of exactly their size, each an allocation of its own, so that AddressSanitizer sees the first byte
that is read or written beyond them. Nothing here needs a fuzzer: `tests/test_fuzzed.py` runs the same calls without.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from array import array as Buffer
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import qembag
from qembag import _dispatch, ops

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import reference

if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS = {level: _dispatch.load(level) for level in _dispatch.MODULES}
NAMES = {8: "byte", 4: "4bit", 2: "2bit"}
MODES = ("sum", "mean", "max")
TAIL_BYTES = {8: 8, 4: 4, 2: 4}
MOST_SCENES = 24
MOST_ROUNDS = 16
MOST_BYTES = 100
REFUSED = frozenset({TypeError, ValueError})
NOTHING: frozenset[type[Exception]] = frozenset()

# A fault on purpose, to see that the fuzzer finds it: "overread" and "overwrite" are tables and outputs that end a byte
# before they say, "answer" is an oracle that is wrong in one bit.
PLANTED = os.environ.get("QEMBAG_FUZZ_PLANT", "")

# Where the values of arrays come from: an input chooses a place in here.
_random = np.random.default_rng(20261125)
POOL = _random.integers(0, 256, 1 << 17, dtype=np.uint8)
ODD = np.array([0, -0.0, np.inf, -np.inf, np.nan, 6e-8, 1e-40, -1e-44, 65504, 3e38, -3e38, 1, -1, 0.5], np.float32)
FLOATS = _random.normal(size=1 << 14).astype(np.float32)
WILD = np.where(_random.random(FLOATS.shape) < 0.25, _random.choice(ODD, FLOATS.shape), FLOATS)
WIDE = (FLOATS * 10.0 ** _random.integers(-38, 38, FLOATS.shape)).clip(-3e38, 3e38).astype(np.float32)
INTEGERS = (-1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), -(2**63) + 7, 2**32 + 2, -(2**32), 2**64 - 1, 2**53 + 1)

# With which of their arguments' names the errors of lookups may begin.
OF_LOOKUPS = (
    *(
        "table",
        "indices",
        "rows",
        "offsets",
        "mode",
        "per_sample_weights",
        "include_last_offset",
        "padding_idx",
        "dtype",
    ),
    *("num_threads", "weight", "compressed_indices_mapping", "pruned_weights"),
)

calls = 0


class Finding(AssertionError):
    """The package did what it must not do."""


class Source:
    """The bytes of an input, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def below(self, end: int) -> int:
        return (self.byte() if end <= 256 else self.byte() | self.byte() << 8) % end

    def pick(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    @property
    def is_at_end(self) -> bool:
        return self.at >= len(self.data)

    def rarely(self, times: int = 16) -> bool:
        """Once in so many times; never behind the end."""
        return self.byte() % times == times - 1

    def whole(self) -> int:
        """Any whole number up to 64 bits and a sign."""
        return int.from_bytes(bytes(self.byte() for _ in range(8)), "little", signed=True)

    def values(self, pool: np.ndarray, count: int) -> np.ndarray:
        start = self.below(1 << 14) % max(len(pool) - count, 1)
        return pool[start : start + count].copy() if count <= len(pool) else np.resize(pool, count)


@dataclass
class Given:
    """An argument, the plain array that it stands for, and the errors that it must lead to."""

    value: Any
    holds: Any = None
    wrong: frozenset[type[Exception]] = NOTHING
    # Where its elements lie, for outputs that share memory with it.
    block: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0
    itemsize: int = 1

    @property
    def is_plain(self) -> bool:
        """A list or a number, whose type NumPy has chosen."""
        return self.block is None and self.holds is not None


NONE = Given(None)


class Sub(np.ndarray):
    """A subclass, which the package must take for the array that it is."""


class Answers:
    """An object that becomes an array when it is asked to."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype)


# What no argument of whole numbers may be, and no argument of floats either.
WRONG = (
    "text",
    object(),
    {},
    {1},
    b"bytes",
    2j,
    [None],
    [[1], [1, 2]],
    ["a"],
    [2**70],
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array(["a", "b"]),
    np.array([1, 2], dtype=object),
    np.array([1, 2], "M8[s]"),
    np.array([1, 2], "m8[s]"),
    np.zeros(2, [("a", "i4"), ("b", "f4")]),
    np.zeros(2, "V4"),
    np.zeros((2, 2), "S3"),
    np.ma.MaskedArray([1, 2], [False, True]),
    lambda: 1,
    np.ndarray,
    memoryview(b"abc").cast("c"),
)
NO_INTEGERS = (*WRONG, 1.5, [1.5], np.array([1.5, 2]), np.float64(3), np.zeros(2, np.float16))
NO_FLOATS = (*WRONG, np.arange(2), np.zeros((2, 2), np.uint8), np.longdouble([1, 2]))


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal in every bit, but for the sign and payload of a NaN."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.tobytes() == theirs.tobytes():
        return True
    if ours.dtype.kind != "f":
        return False
    whole = np.dtype(f"u{ours.dtype.itemsize}")
    ours, theirs = np.ascontiguousarray(ours), np.ascontiguousarray(theirs)
    return bool(((ours.view(whole) == theirs.view(whole)) | (np.isnan(ours) & np.isnan(theirs))).all())


@dataclass
class Table:
    """A table, and what the oracle needs of it."""

    table: Any
    bits: int
    dim: int
    rows: Given
    mapping: Given

    @property
    def map(self) -> np.ndarray | None:
        """As it is now: its owner may have written to it since the table was made."""
        return self.table.compressed_indices_mapping


@dataclass
class Scene:
    source: Source
    blocks: list[tuple[np.ndarray, bytes]] = field(default_factory=list)

    # ---- Memory -----------------------------------------------------------------------------------------------------

    def block(self, num_bytes: int) -> np.ndarray:
        """An allocation of exactly this size; `array.array` gives one where NumPy may hand out a used one."""
        return np.frombuffer(Buffer("B", [77]) * num_bytes, np.uint8) if num_bytes else np.empty(0, np.uint8)

    def keep(self, block: np.ndarray) -> None:
        self.blocks.append((block, block.tobytes()))

    def place(self, values: np.ndarray, layout: str) -> Given:
        """An array in memory of its own that holds these values, laid out so."""
        size, shape = values.itemsize, values.shape
        if layout == "swapped":
            values = values.astype(values.dtype.newbyteorder())
        if layout == "broadcast" and values.size:
            values = np.full(shape, values.flat[0], values.dtype)
            strides, num_bytes, offset = (0,) * len(shape), size, 0
        else:
            strides, num_bytes, offset = self.geometry(shape, size, layout)
        block = self.block(num_bytes)
        array = np.ndarray(shape, values.dtype, block, offset, strides)
        array[...] = values
        where = Given(array, values, NOTHING, block, shape, strides, offset, size)
        if layout == "read-only":
            array.flags.writeable = False
        elif layout == "subclass":
            where.value = array.view(Sub)
        elif layout == "method":
            where.value = Answers(array)
        elif layout == "buffer":
            where.value = memoryview(array)
        elif layout == "list":
            where = Given(array.tolist())
            where.holds = np.asarray(where.value)
        self.keep(block)
        return where

    @staticmethod
    def geometry(shape: tuple[int, ...], size: int, layout: str) -> tuple[tuple[int, ...], int, int]:
        """Strides, bytes and the first element's offset. The last byte is one of the array's."""
        if not shape or 0 in shape:
            return tuple(size for _ in shape), size, 0
        step = {"strided": 2 * size, "apart": 3 * size + 1}.get(layout, size)
        gap = {"gaps": size, "odd gaps": size + 3, "far": 40 * size}.get(layout, 0)
        strides = [0] * len(shape)
        reach = step
        axes = range(len(shape)) if layout == "columns" else range(len(shape) - 1, -1, -1)
        for axis in axes:
            strides[axis] = reach
            reach = reach * shape[axis] + (gap if axis == len(shape) - 1 else 0)
        offset = 1 if layout == "misaligned" else 0
        if layout == "reversed":
            strides[0] = -strides[0]
            offset = -strides[0] * (shape[0] - 1)
        last = offset + sum(max(s, 0) * (n - 1) for s, n in zip(strides, shape, strict=True)) + size
        return tuple(strides), last, offset

    # ---- Arguments --------------------------------------------------------------------------------------------------

    def integers(self, shape: tuple[int, ...], limit: int, *, ordered: bool = False) -> Given:
        """Whole numbers below a limit, some perhaps beyond; of any type and layout that a lookup takes, or none."""
        source = self.source
        if source.rarely(24):
            return Given(source.pick(NO_INTEGERS), None, REFUSED)
        dtype = np.dtype(source.pick(["i8", "i4", "i8", "i4", "u8", "i2", "u4", "u1"]))
        count = int(np.prod(shape))
        values = source.values(POOL, 2 * count).view("u2") % max(limit, 1)
        if ordered:
            values.sort()
        values = values.astype(dtype).reshape(shape)
        bounds = np.iinfo(dtype)
        for _ in range(source.below(4) if count and source.rarely(5) else 0):
            odd = source.pick([*INTEGERS, limit, limit - 1, -limit, source.whole()])
            values.flat[source.below(count)] = min(max(odd, int(bounds.min)), int(bounds.max))
        given = self.place(
            values,
            source.pick(
                ["plain"] * 8
                + ["strided", "reversed", "misaligned", "swapped", "read-only", "subclass", "method", "buffer", "list"]
                + ["broadcast", "columns", "apart"]
            ),
        )
        if given.is_plain and given.holds.size == 0:
            given.holds = given.holds.astype(np.int64)
        elif given.holds.dtype.kind == "f":  # NumPy's choice for [2**63, 1]
            given.wrong = frozenset({TypeError})
        return given

    def floats(self, shape: tuple[int, ...], dtypes: list[str], pools: list[np.ndarray]) -> Given:
        source = self.source
        if source.rarely(24):
            return Given(source.pick(NO_FLOATS), None, REFUSED)
        count = int(np.prod(shape))
        values = source.values(source.pick(pools), count)
        with np.errstate(all="ignore"):
            values = values.astype(source.pick(dtypes)).reshape(shape)
        given = self.place(
            values,
            source.pick(
                ["plain"] * 8
                + ["strided", "reversed", "misaligned", "swapped", "read-only", "subclass", "method", "buffer", "list"]
                + ["broadcast", "columns", "apart", "gaps"]
            ),
        )
        if given.is_plain:
            with np.errstate(all="ignore"):
                given.holds = given.holds.astype(np.float32)
        return given

    def small_shape(self) -> tuple[int, ...]:
        source = self.source
        return tuple(source.below(5) for _ in range(source.pick([1, 2, 0, 3, 1, 2, 4])))

    def dim(self) -> int:
        source = self.source
        kind = source.below(8)
        if kind < 5:
            return 1 + source.below(40)
        return 1 + source.below(300) if kind < 7 else 16 * (1 + source.below(20))

    def rows(self, bits: int, num_rows: int, row_bytes: int) -> Given:
        """Packed rows."""
        source = self.source
        values = source.values(POOL, num_rows * row_bytes).reshape(num_rows, row_bytes)
        tail = TAIL_BYTES[bits]
        if row_bytes > tail and num_rows and source.below(4) < 3:
            with np.errstate(all="ignore"):
                tails = source.values(WILD if source.rarely(2) else FLOATS, 2 * num_rows)
                tails = tails.astype("<f4" if tail == 8 else "<f2")
            values[:, row_bytes - tail :] = tails.view(np.uint8).reshape(num_rows, tail)
        if PLANTED == "overread" and values.size:
            block = self.block(values.size - 1)
            block[...] = values.reshape(-1)[:-1]
            lying = np.lib.stride_tricks.as_strided(block, values.shape, (row_bytes, 1))
            return Given(lying, values, NOTHING, block, values.shape, (row_bytes, 1))
        right = ["plain"] * 6 + ["gaps", "odd gaps", "far", "reversed", "read-only", "subclass", "method", "buffer"]
        given = self.place(values, source.pick([*right, "broadcast", "misaligned", "columns", "strided", "list"]))
        if given.is_plain:
            given.wrong = REFUSED
        elif given.strides[1] != 1 and values.shape[1] > 1 and values.size:
            given.wrong = frozenset({ValueError})
        return given

    def mapping(self, num_rows: int) -> Given:
        source = self.source
        if source.rarely(32):
            return Given(source.pick(NO_INTEGERS), None, REFUSED)
        count = source.below(20)
        values = (source.values(POOL, 2 * count).view("u2") % (num_rows + 1)).astype(np.int32) - 1
        if count and source.rarely(12):
            values[source.below(count)] = source.pick([-2, num_rows, 2**31 - 1, -(2**31), 2**30, num_rows - 1])
        wrong: set[type[Exception]] = set()
        if source.rarely(24):
            values = values.astype(source.pick(["i8", "u4", "i2"]))
            wrong.add(TypeError)
        if source.rarely(24):
            values = values.reshape(1, -1)
            wrong.add(ValueError)
        given = self.place(
            values,
            source.pick(
                ["plain"] * 6
                + ["strided", "reversed", "misaligned", "swapped", "read-only", "subclass", "method", "buffer", "list"]
                + ["broadcast"]
            ),
        )
        if given.is_plain:
            wrong.discard(TypeError)
            given.holds = given.holds.astype(np.int64)
        holds = given.holds
        no_rows = not wrong and holds.tolist() != [0] and ((holds < -1) | (holds >= num_rows)).any()
        if no_rows or self.is_too_wide(given):
            wrong.add(IndexError)
        given.wrong = frozenset(wrong)
        return given

    def flag(self) -> Given:
        source = self.source
        if source.rarely():
            return Given(source.pick(["no", 2, 1.0, None, -1, np.array([0, 1]), [True]]), False, frozenset({TypeError}))
        value = source.pick([False, True, False, True, 0, 1, np.False_, np.True_, np.int8(1)])
        return Given(value, bool(value))

    def threads(self) -> Given:
        source = self.source
        if source.rarely():
            return Given(source.pick([0, -1, "2", 2.0, True, -(2**70), [1], np.float32(1)]), None, REFUSED)
        return Given(source.pick([None, 1, 2, 3, 2**31, 2**70, np.int64(2), np.uint8(1)]))

    def dtype(self) -> Given:
        source = self.source
        if source.rarely():
            odd = [
                np.float64,
                "f8",
                "i4",
                "nonsense",
                5,
                object(),
                "",
                "f4,f4",
                "(2,)f4",
                ">f4" if sys.byteorder == "little" else "<f4",
            ]
            odd += [
                {},
                [],
                [("a", "f4")],
                {"names": ["a"], "formats": []},
                "f4,(",
                "(-1,)f4",
                ",",
                "O",
                "M8[parsec]",
                "\0",
                "é",
            ]
            odd += [np.ndarray, type, float, b"f8", "U99999999999", ("f4", -1), ("f4", (2**40, 2**40)), "f" * 5000]
            return Given(source.pick(odd), None, REFUSED)
        value = source.pick([None, np.float32, np.float16, None, "float32", "f2", np.dtype("f4"), "e"])
        return Given(value, None if value is None else np.dtype(value))

    def out(self, shape: tuple[int, ...], allowed: tuple[str, ...], inputs: list[Given]) -> Given:
        """An output of the caller's, of one of these types; `holds` is its dtype."""
        source = self.source
        dtype = np.dtype(source.pick(allowed))
        if source.rarely(32):
            value = source.pick([[], "out", 1.5, b"", object(), np.float32(1), memoryview(bytearray(64)), [[0.0]]])
            return Given(value, None, REFUSED)
        wrong: set[type[Exception]] = set()
        if source.rarely(24):
            other = source.pick(["f8", "i4", "u2", "f2", "f4", "?", "O", "c8"])
            if other not in allowed:
                wrong.add(ValueError)
            dtype = np.dtype(other)
        if source.rarely(24):
            other_shape = source.pick(
                [(*shape, 1), shape[1:], (1, *shape), tuple(reversed(shape)), (*shape[:-1], shape[-1] + 1)]
            )
            if other_shape != shape:
                wrong.add(ValueError)
            shape = other_shape
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        if source.rarely(20):
            inputs = [given for given in inputs if given.block is not None and len(given.block) >= max(num_bytes, 1)]
            if inputs and dtype.kind != "O":
                return self.shared_out(shape, dtype, source.pick(inputs), inputs, wrong)
        if PLANTED == "overwrite" and num_bytes and not wrong and dtype.kind == "f":
            block = self.block(num_bytes - 1)
            strides = np.ndarray(shape, dtype).strides
            lying = np.lib.stride_tricks.as_strided(block, (num_bytes,), (1,)).view(dtype).reshape(shape)
            return Given(lying, dtype, NOTHING, block, shape, strides, 0, dtype.itemsize)
        right = ["plain"] * 6 + ["gaps", "odd gaps", "far", "reversed", "misaligned", "subclass"]
        layout = source.pick([*right, "read-only", "strided", "swapped", "columns", "zero", "masked", "entangled"])
        strides, total, offset = self.geometry(shape, dtype.itemsize, layout)
        if num_bytes and layout in ("zero", "entangled") and len(shape) > 1:
            strides = (strides[0] - dtype.itemsize if layout == "entangled" else 0, *strides[1:])
        block = self.block(total)
        if dtype.kind == "O":
            return Given(np.full(shape, None), dtype, frozenset({ValueError}))
        array = np.ndarray(shape, dtype.newbyteorder() if layout == "swapped" else dtype, block, offset, strides)
        value: Any = array
        if layout == "subclass":
            value = array.view(Sub)
        elif layout == "masked":
            value = np.ma.MaskedArray(array)
            wrong.add(TypeError)
        elif layout == "read-only":
            array.flags.writeable = False
            wrong.add(ValueError)
        elif layout == "swapped" and dtype.itemsize > 1:
            wrong.add(ValueError)
        entangled = (
            layout in ("zero", "entangled") and np.bincount(self.bytes_of(array, block).ravel()).max(initial=0) > 1
        )
        if entangled or (array.size and shape and shape[-1] > 1 and strides[-1] != dtype.itemsize):
            wrong.add(ValueError)
        return Given(value, array.dtype, frozenset(wrong), block, shape, strides, offset, dtype.itemsize)

    @staticmethod
    def bytes_of(array: np.ndarray, block: np.ndarray) -> np.ndarray:
        """The places in its block that an array's bytes have."""
        start = array.__array_interface__["data"][0] - block.__array_interface__["data"][0]
        places = np.full((*array.shape, array.itemsize), start) + np.arange(array.itemsize)
        for axis, (length, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
            ramp = np.arange(length) * stride
            places += ramp.reshape((-1,) + (1,) * (array.ndim - axis))
        return places

    def shared_out(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], of: Given, inputs: list[Given], wrong: set[type[Exception]]
    ) -> Given:
        """An output in the memory of an input: refused, unless its elements lie between those of the input."""
        block = of.block
        assert block is not None
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        offset = len(block) - num_bytes if self.source.rarely(2) else 0
        array = np.ndarray(shape, dtype, block, offset)
        taken = np.zeros(len(block), np.bool_)
        view = np.ndarray(of.shape, f"V{of.itemsize}", block, of.offset, of.strides)
        if view.size:
            taken[self.bytes_of(view, block)] = True
        if array.size and taken[self.bytes_of(array, block)].any():
            wrong.add(ValueError)
        return Given(array, dtype, frozenset(wrong), block, shape, array.strides, offset, dtype.itemsize)

    def table(self) -> Table | None:
        """A table, where its arguments are right."""
        source = self.source
        bits = source.pick([8, 4, 2])
        dim = self.dim()
        num_rows = source.below(13)
        row_bytes = source.below(14) if source.rarely(24) else -(-dim * bits // 8) + TAIL_BYTES[bits]
        wrong: set[type[Exception]] = set()
        if source.rarely(40):
            rows = Given(source.pick((*NO_INTEGERS, np.zeros((2, 20), np.int8))), None, REFUSED)
        else:
            rows = self.rows(bits, num_rows, row_bytes)
        wrong |= rows.wrong
        most = (row_bytes - TAIL_BYTES[bits]) * (8 // bits)
        least = most - 8 // bits + 1
        given_dim: Any = dim
        if most < 1:
            wrong.add(ValueError)
        elif not least <= dim <= most:
            dim, given_dim = most, None
        if source.rarely(8):
            dim, given_dim = most, None
        elif source.rarely(24):
            given_dim = source.pick([0, -1, most + 1, least - 1, 2**70, True, 1.0, "4", source.whole()])
            if isinstance(given_dim, int) and not isinstance(given_dim, bool) and least <= given_dim <= most:
                dim = given_dim
            else:
                wrong |= REFUSED
        given_bits: Any = source.pick([bits, bits, bits, np.int8(bits), np.uint64(bits)])
        if source.rarely(40):
            given_bits = source.pick([0, 1, 3, -8, 16, 2**70, "8", True, 8.0, None, np.float32(4)])
            wrong |= REFUSED
        mapping = self.mapping(num_rows) if source.rarely(3) else NONE
        wrong |= mapping.wrong
        made, _ = self.attempt(
            lambda: qembag.QuantizedTable(
                rows.value, given_bits, dim=given_dim, compressed_indices_mapping=mapping.value
            ),
            frozenset(wrong),
            ("data", "bits", "dim", "compressed_indices_mapping"),
        )
        if made is None:
            return None
        table = Table(made, bits, dim, rows, mapping)
        self.require(made.bits == bits and made.dim == dim and made.num_rows == num_rows, "a table's attributes")
        # A planted overread is the kernels' to find.
        self.require(PLANTED == "overread" or same_bits(made.data, rows.holds), "a table's rows")
        # The owner of a mapping may write to it after the table was made.
        if table.map is not None and table.map.size and table.map.flags.writeable and source.rarely(12):
            # Not [0], which would unprune a copy of the table and not the table.
            table.map[source.below(table.map.size)] = source.pick([-2, num_rows, 2**31 - 1, -(2**31), -1])
            self.blocks = [(block, block.tobytes()) for block, _ in self.blocks]
        return table

    # ---- Calls ------------------------------------------------------------------------------------------------------

    def require(self, right: object, what: str) -> None:
        if not right:
            raise Finding(what)

    def attempt(
        self, call: Callable[[], Any], wrong: frozenset[type[Exception]], names: tuple[str, ...]
    ) -> tuple[Any, str | None]:
        """What a call gives, or its error, if it is one of those that it must lead to."""
        global calls
        calls += 1
        try:
            result = call()
        except Exception as error:
            if type(error) not in wrong:
                expected = " or ".join(sorted(kind.__name__ for kind in wrong)) or "an answer"
                raise Finding(f"{type(error).__name__} in place of {expected}: {error}") from error
            text = str(error)
            if not text.startswith(names):
                raise Finding(f"an error that names no argument: {type(error).__name__}: {text}") from error
            return None, f"{type(error).__name__}: {text}"
        if wrong:
            raise Finding(f"accepted what must be refused as {sorted(kind.__name__ for kind in wrong)}")
        return result, None

    def at_each_level(
        self,
        call: Callable[[Any], Any],
        wrong: frozenset[type[Exception]],
        names: tuple[str, ...],
        oracle: Callable[[], np.ndarray] | None,
        out: Given = NONE,
        dtype: Given = NONE,
    ) -> None:
        """The same answer, the oracle's, or the same error, at each level."""
        half = (dtype.holds if out is NONE else out.holds) == np.float16
        errors = set()
        first: np.ndarray | None = None
        before = None if out.block is None else out.block.tobytes()
        for kernels in LEVELS.values():
            _dispatch.kernels = kernels
            result, error = self.attempt(lambda: call(out.value), wrong | out.wrong, (*names, "out"))
            errors.add(error)
            if error is None:
                if out.value is not None:
                    self.require(result is out.value, "the answer is not `out`")
                result = np.array(result, copy=True, subok=False)
                if first is None:
                    first = result
                    if oracle is not None:
                        with np.errstate(all="ignore"):
                            self.compare(result, oracle().astype(np.float16) if half else oracle())
                elif not same_bits(result, first):
                    raise Finding(f"the answers of two levels differ: {first} and {result}")
                if out.block is not None and result.size:
                    self.restore(out, before)
            if out.block is not None and out.block.tobytes() != before:
                raise Finding("memory around an output was written" if error is None else "an error changed `out`")
        self.require(len(errors) == 1, f"the errors of two levels differ: {errors}")

    def compare(self, result: np.ndarray, expected: np.ndarray) -> None:
        if PLANTED == "answer" and expected.size:
            expected = expected.copy()
            expected.view(f"u{expected.itemsize}").flat[-1] ^= 1
        if not same_bits(result, expected):
            raise Finding(f"the answer is {result}, not the oracle's {expected}")

    @staticmethod
    def restore(out: Given, before: bytes) -> None:
        """The elements of an output as they were."""
        old = np.ndarray(out.shape, out.holds, np.frombuffer(before, np.uint8), out.offset, out.strides)
        np.ndarray(out.shape, out.holds, out.block, out.offset, out.strides)[...] = old

    def check_inputs(self) -> None:
        for block, before in self.blocks:
            if block.tobytes() != before:
                raise Finding("an input was changed")

    # ---- Lookups ----------------------------------------------------------------------------------------------------

    def padding(self, count: int) -> Given:
        source = self.source
        if not source.rarely(4):
            return NONE
        if source.rarely(12):
            return Given(source.pick(["1", 1.0, True, [0], np.array([1]), np.float32(0)]), None, REFUSED)
        number = source.pick([*INTEGERS, count, -count - 1, source.whole()]) if source.rarely(8) else 0
        if number == 0 and count:
            number = source.below(2 * count) - count
        given = Given(source.pick([int, int, np.int64])(number) if -(2**63) <= number < 2**63 else number, number)
        if not -count <= number < count:
            given.wrong = frozenset({ValueError})
        elif number < 0:
            given.holds = number + count
        return given

    def bags(self) -> None:
        """`embedding_bag`, by its own name and by those of the reference's operators."""
        table = self.table()
        if table is None:
            return
        source = self.source
        for _ in range(1 + source.below(4)):
            self.bags_of(table)

    def bags_of(self, table: Table) -> None:
        source = self.source
        family = source.pick(["public", "public", "rowwise", "packed"])
        num_rows, dim, bits = len(table.rows.holds), table.dim, table.bits
        given_mapping, pruned = NONE, Given(False, False)
        if family != "public":
            pruned = self.flag()
            if source.rarely(2):
                given_mapping = self.mapping(num_rows)
        if family == "rowwise":
            dim = (table.rows.holds.shape[1] - TAIL_BYTES[bits]) * (8 // bits)
        mapping, maps, count = self.pruning(set(), table, family, pruned, given_mapping)

        matrix = source.rarely(4)
        shape: tuple[int, ...] = (source.below(6), source.below(7)) if matrix else (source.below(24),)
        if source.rarely(32):
            shape = self.small_shape()
        indices = self.integers(shape, count)
        offsets = NONE
        if matrix == source.rarely(24):
            offsets_shape = self.small_shape() if source.rarely(32) else (source.below(7),)
            offsets = self.integers(offsets_shape, shape[0] + 1 if shape else 1, ordered=True)
        last = self.flag()
        mode = source.below(3)
        weights = NONE
        if source.rarely(3) and (mode != 2 or source.rarely(8)):
            weights_shape = self.small_shape() if source.rarely(24) else shape
            weights = self.floats(weights_shape, ["f4"] * 4 + ["f2"] * 4 + ["f8"], [FLOATS, WILD])
        padding = self.padding(count) if family == "public" else NONE
        given_mode = Given(MODES[mode] if family == "public" else source.pick([mode, mode, np.int64(mode)]))
        if source.rarely(32):
            odd = source.pick(["Sum", 3, -1, None, 1.0, b"sum", 2**70, ["sum"], np.str_("no"), True])
            given_mode = Given(odd, None, REFUSED)
        threads = self.threads() if family == "public" else NONE
        dtype = self.dtype() if family == "public" else Given(None, np.dtype("f4"))

        def call(out: Any) -> Any:
            if family == "public":
                return qembag.embedding_bag(
                    table.table, indices.value, offsets.value, mode=given_mode.value, per_sample_weights=weights.value,
                    include_last_offset=last.value, padding_idx=padding.value, out=out, dtype=dtype.value,
                    num_threads=threads.value,
                )  # fmt: skip
            suffix, weight = ("_rowwise_offsets", table.rows.value) if family == "rowwise" else ("", table.table)
            return getattr(ops, f"embedding_bag_{NAMES[bits]}{suffix}")(
                weight, indices.value, offsets.value, False, given_mode.value, pruned.value, weights.value,
                given_mapping.value, last.value, out=out,
            )  # fmt: skip

        def oracle() -> np.ndarray:
            return reference.embedding_bag(
                table.rows.holds, bits, dim, indices.holds, offsets.holds, mode=MODES[mode], mapping=mapping,
                weights=weights.holds, include_last_offset=last.holds, padding_idx=padding.holds,
            )  # fmt: skip

        arrays = [indices, offsets, weights, table.rows, given_mapping, table.mapping]
        for _ in range(MOST_ROUNDS):
            wrong = set().union(
                *(given.wrong for given in (indices, offsets, last, weights, padding, threads, dtype, given_mode))
            )
            mapping, maps, count = self.pruning(wrong, table, family, pruned, given_mapping)
            num_bags = self.model_bags(wrong, num_rows, count, mapping, indices, offsets, last, weights, mode, padding)
            out = NONE
            if source.rarely(2):
                out = self.out(
                    (num_bags, dim), self.kinds(dtype, family), [table.rows, indices, offsets, weights, *maps]
                )
            ask = not wrong and not out.wrong and source.rarely(3 if indices.holds.size * dim < 200 else 8)
            self.at_each_level(call, frozenset(wrong), OF_LOOKUPS, oracle if ask else None, out, dtype)
            if source.is_at_end:
                break
            self.flip(arrays)

    @staticmethod
    def kinds(dtype: Given, family: str) -> tuple[str, ...]:
        """The types that an output may have."""
        if dtype.value is None and family in ("public", "embedding"):
            return ("f4", "f2")
        return ("f2",) if dtype.holds == np.float16 else ("f4",)

    def pruning(
        self, wrong: set[type[Exception]], table: Table, family: str, pruned: Given, given: Given
    ) -> tuple[np.ndarray | None, list[Given], int]:
        """The mapping that a lookup goes by, its memory, and how many embeddings there are by it."""
        num_rows = len(table.rows.holds)
        mapping = table.map
        maps = [table.mapping] if mapping is not None and np.shares_memory(mapping, table.mapping.block) else []
        if family != "public":
            wrong |= pruned.wrong
            if not pruned.holds:
                return None, [], num_rows
            if given is not NONE:
                # What it names is checked where it is used.
                wrong |= given.wrong - (NOTHING if self.is_too_wide(given) else {IndexError})
                mapping, maps = given.holds, [given] if given.block is not None else []
            elif family == "rowwise" or mapping is None:
                wrong.add(ValueError)
            if mapping is not None and mapping.tolist() == [0]:
                mapping = None
        return mapping, maps, num_rows if mapping is None else len(mapping) if mapping.ndim else 0

    def flip(self, arrays: list[Given]) -> None:
        """Other bytes in the memory of some argument: no call remembers what stood there at another one's time."""
        source = self.source
        given = source.pick([given for given in arrays if given.block is not None and len(given.block)] or [NONE])
        if given.block is None:
            return
        for _ in range(1 + source.below(2)):
            given.block[source.below(len(given.block))] = source.byte()
        self.blocks = [(block, block.tobytes() if block is given.block else before) for block, before in self.blocks]
        given.holds = np.array(np.asarray(given.value))

    @staticmethod
    def is_too_wide(mapping: Given) -> bool:
        """Whether a list holds what int32 cannot: that is refused before it is used."""
        return mapping.is_plain and bool((mapping.holds != mapping.holds.astype(np.int32)).any())

    @staticmethod
    def model_rows(
        wrong: set[type[Exception]], num_rows: int, count: int, mapping: np.ndarray | None, used: list[int]
    ) -> None:
        """Adds the error that such indices lead to."""
        right = all(0 <= index < count for index in used)
        if right and mapping is not None and mapping.ndim == 1:
            right = all(-1 <= row < num_rows for row in mapping.astype(np.int64)[used].tolist())
        if not right:
            wrong.add(IndexError)

    @staticmethod
    def model_bags(
        wrong: set[type[Exception]], num_rows: int, count: int, mapping: np.ndarray | None, indices: Given,
        offsets: Given, last: Given, weights: Given, mode: int, padding: Given,
    ) -> int:  # fmt: skip
        """Adds the errors that such bags lead to; returns their number, as far as there is one."""
        if weights.value is not None and mode == 2:
            wrong.add(ValueError)
        if weights.holds is not None and weights.holds.dtype.newbyteorder("=") == np.float64:
            wrong.add(TypeError)
        if indices.holds is None:
            return 1
        size = indices.holds.size
        if weights.holds is not None and weights.holds.shape != indices.holds.shape:
            wrong.add(ValueError)
        if indices.holds.ndim == 2:
            num_bags, used = len(indices.holds), indices.holds.ravel().tolist()
            if offsets.value is not None:
                wrong.add(ValueError)
        elif indices.holds.ndim != 1 or offsets.value is None or offsets.holds is None or offsets.holds.ndim != 1:
            wrong.add(ValueError)
            return 1
        else:
            ends = offsets.holds.tolist()
            num_bags = len(ends) - bool(last.holds)
            if num_bags < 0 or not all(a <= b for a, b in zip([0, *ends], [*ends, size], strict=True)):
                wrong.add(ValueError)
                return max(num_bags, 0)
            end = ends[-1] if last.holds else size
            used = indices.holds.tolist()[ends[0] : end] if ends else []
        if padding.holds is not None:
            used = [index for index in used if index != padding.holds]
        Scene.model_rows(wrong, num_rows, count, mapping, used)
        return num_bags

    def single_rows(self) -> None:
        """`embedding`, `dequantize` and the reference's operators for single rows."""
        table = self.table()
        if table is None:
            return
        source = self.source
        for _ in range(1 + source.below(4)):
            self.single_rows_of(table)

    def single_rows_of(self, table: Table) -> None:
        source = self.source
        family = source.pick(["embedding", "dequantize", "packed", "all"])
        num_rows = len(table.rows.holds)
        pruned = self.flag() if family == "packed" else Given(False, False)
        by = "packed" if family == "packed" else "public"
        mapping, maps, count = self.pruning(set(), table, by, pruned, NONE)
        shape = self.small_shape() if source.rarely(2) else (source.below(24),)
        indices = Given(None, np.arange(count)) if family == "all" else self.integers(shape, count)
        threads = self.threads() if family == "embedding" else NONE
        dtype = self.dtype() if family == "embedding" else Given(None, np.dtype("f4"))

        def call(out: Any) -> Any:
            if family == "embedding":
                return qembag.embedding(
                    table.table, indices.value, out=out, dtype=dtype.value, num_threads=threads.value
                )
            if family == "packed":
                return getattr(ops, f"embedding_{NAMES[table.bits]}")(table.table, indices.value, pruned.value)
            return table.table.dequantize(indices.value, out=out)

        def oracle() -> np.ndarray:
            chosen = indices.holds.ravel().astype(np.int64)
            stored = chosen if mapping is None else mapping[chosen].astype(np.int64)
            values = reference.dequantize(table.rows.holds, table.bits, table.dim)
            result = np.zeros((len(chosen), table.dim), np.float32)
            result[stored >= 0] = values[stored[stored >= 0]]
            if family in ("embedding", "packed"):
                result = result + np.float32(0)  # a sum starts from zero, so that none of its zeros is negative
            return result.reshape(*indices.holds.shape, table.dim)

        for _ in range(MOST_ROUNDS):
            wrong = set().union(*(given.wrong for given in (indices, threads, dtype)))
            mapping, maps, count = self.pruning(wrong, table, by, pruned, NONE)
            if family == "all":
                indices.holds = np.arange(count)
            if indices.holds is not None:
                self.model_rows(wrong, num_rows, count, mapping, indices.holds.ravel().tolist())
            out = NONE
            if family != "packed" and source.rarely(2):
                shape = () if indices.holds is None else indices.holds.shape
                out = self.out((*shape, table.dim), self.kinds(dtype, family), [table.rows, indices, *maps])
            ask = not wrong and not out.wrong and source.rarely(2 if table.dim < 40 else 8)
            self.at_each_level(call, frozenset(wrong), OF_LOOKUPS, oracle if ask else None, out, dtype)
            if source.is_at_end:
                break
            self.flip([indices, table.rows, table.mapping])

    def many_rows(self) -> None:
        """Enough work to be shared out among threads. The oracle is too slow: one thread's answer is compared."""
        source = self.source
        bits, dim = source.pick([8, 4, 2]), 250 + source.below(60)
        rows = self.rows(bits, 1 + source.below(12), -(-dim * bits // 8) + TAIL_BYTES[bits])
        if rows.wrong:
            return
        count = 1700 + source.below(700)
        numbers = (source.values(POOL, count) % len(rows.holds)).astype(np.int64)
        bad_place = source.below(count) if source.rarely(3) else -1
        if bad_place >= 0:
            numbers[bad_place] = source.pick(INTEGERS[:8])
        indices = self.place(numbers, "plain").value
        ends = np.sort(source.values(POOL, 2 * (1 + source.below(90))).view("u2") % (count + 1)).astype(np.int64)
        ends[0], ends[-1] = 0, count
        if source.rarely(4):
            ends[source.below(len(ends))] = source.pick([*INTEGERS[:8], source.whole()])
        wrong = NOTHING
        if not all(a <= b for a, b in zip([0, *ends.tolist()], [*ends.tolist(), count], strict=True)):
            wrong = frozenset({ValueError})
        elif ends[0] <= bad_place < ends[-1]:
            wrong = frozenset({IndexError})
        weights = source.pick([None, self.place(source.values(FLOATS, count), "plain").value])
        options: dict[str, Any] = {"mode": source.pick(MODES), "padding_idx": source.pick([None, 0])}
        if options["mode"] != "max":
            options["per_sample_weights"] = weights
        offsets = self.place(ends, "plain").value
        table = qembag.QuantizedTable(rows.value, bits, dim=dim)
        _dispatch.kernels = source.pick(list(LEVELS.values()))
        results, errors = [], set()
        for threads in (1, source.pick([2, 3, 2])):
            result, error = self.attempt(
                lambda n=threads: qembag.embedding_bag(
                    table, indices, offsets, include_last_offset=True, num_threads=n, **options
                ),
                wrong,
                ("indices", "offsets"),
            )
            if error is None:
                results.append(result)
            else:
                errors.add(error)
        self.require(not (results and errors), f"an error at some numbers of threads only: {errors}")
        self.require(len(errors) < 2, f"errors differ by the number of threads: {errors}")
        self.require(
            all(same_bits(result, results[0]) for result in results), "answers differ by the number of threads"
        )

    def storm(self) -> None:
        """Byte after byte of the arguments' memory, and after each the kernels of all levels, called as the package
        calls them, and one public function. They must agree, in answers and in faults. No oracle, and so little else
        than calls."""
        table = self.table()
        if table is None:
            return
        source = self.source
        count, dim, bits = table.table.num_embeddings, table.dim, table.bits
        size = source.below(40)
        dtype = source.pick(["i8", "i4"])
        numbers = source.values(POOL, size) % max(count, 1)
        ends = np.sort(source.values(POOL, 1 + source.below(8)) % (size + 1))
        indices, offsets = self.place(numbers.astype(dtype), "plain"), self.place(ends.astype(dtype), "plain")
        weights = self.place(source.values(source.pick([FLOATS, WILD]), size), "plain")
        last = source.pick([False, True])
        given = None if source.rarely(2) else weights.value
        padding = source.below(count) if count and source.rarely(3) else None
        out = self.place(np.zeros((len(ends) - last, dim), source.pick(["f4", "f2"])), "plain").value
        memory = [
            given.block for given in (indices, offsets, weights, table.rows, table.mapping) if given.block is not None
        ]
        memory = [block for block in memory if len(block)]
        modes = source.pick([(0, 1), (2,)])
        cases = [(mode, None if mode == 2 else given, into) for mode in modes for into in (None, out)]
        rows, mapping = table.table.data, table.map

        def kernel_call(kernels: Any, mode: int, given: Any, into: Any) -> Any:
            half = into is not None and into.dtype == np.float16
            return kernels.embedding_bag(
                rows, bits, dim, mapping, indices.value, offsets.value, last, given,
                -1 if padding is None else padding, mode, into, half, 1,
            )  # fmt: skip

        for number in range(MOST_BYTES):
            block = source.pick(memory)
            block[source.below(len(block))] = source.byte()
            for mode, weighted, into in cases:
                self.agree(lambda kernels, m=mode, w=weighted, o=into: kernel_call(kernels, m, w, o), out)
            fault = self.agree(
                lambda kernels: kernels.embedding(rows, bits, dim, mapping, indices.value, False, None, False, 1), out
            )
            _dispatch.kernels = list(LEVELS.values())[number % len(LEVELS)]
            mode, weighted, into = cases[number % len(cases)]
            expected = kernel_call(_dispatch.kernels, mode, weighted, None if into is None else out.copy())
            faulty = frozenset({IndexError, ValueError}) if isinstance(expected, tuple) else NOTHING
            answer, _ = self.attempt(
                lambda m=mode, w=weighted, o=into: qembag.embedding_bag(
                    table.table, indices.value, offsets.value, mode=MODES[m], per_sample_weights=w, padding_idx=padding,
                    include_last_offset=last, out=o,
                ),
                faulty,
                ("indices", "offsets", "compressed_indices_mapping"),
            )  # fmt: skip
            self.require(answer is None or same_bits(answer, expected), "a function and its kernel differ")
            faulty = frozenset({IndexError}) if isinstance(fault, tuple) else NOTHING
            names = ("indices", "compressed_indices_mapping")
            self.attempt(lambda: qembag.embedding(table.table, indices.value), faulty, names)
            if source.is_at_end:
                break
        self.blocks = []

    def agree(self, call: Callable[[Any], Any], out: np.ndarray) -> Any:
        """What the kernels of all levels answer, a fault or an array."""
        global calls
        before = out.tobytes()
        first: Any = None
        for kernels in LEVELS.values():
            calls += 1
            answer = call(kernels)
            if isinstance(answer, tuple):
                self.require(out.tobytes() == before, "a fault changed `out`")
            elif answer is out:
                answer = answer.copy()
            if first is None:
                first = answer
            elif type(answer) is not type(first) or (
                answer != first if isinstance(answer, tuple) else not same_bits(answer, first)
            ):
                raise Finding(f"two levels differ: {first} and {answer}")
        self.require(first is not None, "a kernel that does not know its arguments")
        return first

    # ---- Tables -----------------------------------------------------------------------------------------------------

    def tables(self) -> None:
        """What a table can do besides."""
        table = self.table()
        if table is None:
            return
        source = self.source
        mapping, num_rows = table.map, len(table.rows.holds)
        bad_map = mapping is not None and bool(((mapping < -1) | (mapping >= num_rows)).any())
        made = table.table
        codes, scales, biases = reference.unpack(table.rows.holds, table.bits, table.dim)
        values = reference.fma(scales[:, None], codes, biases[:, None])
        got, _ = self.attempt(lambda: (made.codes(), made.scales, made.biases, repr(made), made.nbytes), NOTHING, ())
        self.require(same_bits(got[0].astype(np.float32), codes), "codes")
        self.require(same_bits(got[1], scales) and same_bits(got[2], biases), "scales or biases")
        count = num_rows if mapping is None else len(mapping)
        self.require(len(made) == count and made.shape == (count, table.dim), "a table's shape")
        wrong = frozenset({IndexError}) if bad_map else NOTHING
        names = ("compressed_indices_mapping", "keep", "index", "rows", "a QuantizedTable is indexed")
        copy, _ = self.attempt(lambda: pickle.loads(pickle.dumps(made)), wrong, names)
        if copy is not None:
            self.require(same_bits(copy.data, table.rows.holds) and copy.dim == table.dim, "a pickled table")
            logical = (
                values
                if mapping is None
                else np.where(
                    mapping[:, None] < 0,
                    np.float32(0),
                    values.take(mapping, 0, mode="clip") if num_rows else np.zeros((count, table.dim), np.float32),
                )
            )
            whole, _ = self.attempt(lambda: np.asarray(copy), NOTHING, ())
            self.require(same_bits(whole, logical), "a table as an array")
            for _ in range(1 + source.below(3)):
                self.item(made, logical, names)
        for _ in range(1 + source.below(2)):
            self.prune(made, count, wrong, names, None if copy is None else logical)

    def item(self, table: Any, logical: np.ndarray, names: tuple[str, ...]) -> None:
        """As NumPy chooses along a first axis."""
        source = self.source
        count = len(logical)
        kind = source.below(6)
        item: Any
        if kind == 0:
            item = source.pick([0, -1, count, -count, source.whole(), 2**70, np.int64(0), np.uint64(2**64 - 1)])
        elif kind == 1:
            ends = [None, 0, 1, -1, count, -count, 2**70, -(2**70), source.below(20)]
            item = slice(source.pick(ends), source.pick(ends), source.pick([None, 1, -1, 2, 2**70, -(2**70), 0]))
        elif kind == 2:
            given = self.integers(self.small_shape(), count)
            if given.holds is None or isinstance(given.value, (memoryview, Answers)):
                return
            item = given.value
        elif kind == 3:
            item = source.values(POOL, source.pick([count, count, count + 1])) > 127
        else:
            item = source.pick([None, ..., (), (0,), "0", 1.5, True, [0, -1], [], [[0]], object(), slice("a", None)])
        try:
            expected = logical[item] if not isinstance(item, tuple) else None
            wrong = NOTHING if expected is not None else frozenset({IndexError})
            if expected is not None and item is ...:
                wrong, expected = NOTHING, logical
        except (IndexError, OverflowError, TypeError, ValueError):
            expected, wrong = None, frozenset({IndexError, TypeError, ValueError})
        # NumPy has said what is wrong with an item; its words are not looked at.
        result, _ = self.attempt(lambda: table[item], wrong, ("",))
        if expected is not None:
            self.compare(result, np.asarray(expected))

    def prune(
        self, table: Any, count: int, wrong: frozenset[type[Exception]], names: tuple[str, ...], logical: Any
    ) -> None:
        source = self.source
        if source.rarely(2):
            size = count + 1 if source.rarely(8) else count
            keep = self.place(
                source.values(POOL, size) > 127, source.pick(["plain", "strided", "reversed", "list", "subclass"])
            )
            if keep.holds.dtype != np.bool_:
                keep.holds = np.zeros(0, np.int64)  # an empty list
            elif size != count:
                keep.wrong = frozenset({ValueError})
        else:
            keep = self.integers((source.below(12),) if not source.rarely() else self.small_shape(), count)
            if isinstance(keep.value, np.ndarray) and keep.value.dtype == np.bool_:
                return
            if keep.holds is not None:
                if keep.holds.ndim != 1:
                    keep.wrong = frozenset({ValueError})
                elif not all(0 <= number < count for number in keep.holds.tolist()):
                    keep.wrong = frozenset({IndexError})
        pruned, _ = self.attempt(lambda: table.prune(keep.value), wrong | keep.wrong, names)
        if pruned is not None and logical is not None:
            expected = np.zeros_like(logical)
            kept = np.zeros(count, np.bool_)
            kept[keep.holds if keep.holds.dtype == np.bool_ else keep.holds.astype(np.int64)] = True
            expected[kept] = logical[kept]
            # One row, kept, has a mapping of [0], which means that nothing is pruned: the same values.
            result, _ = self.attempt(pruned.dequantize, NOTHING, ())
            self.compare(result, expected)

    # ---- Quantizing -------------------------------------------------------------------------------------------------

    def quantizing(self) -> None:
        """`quantize`, and the reference's operators that pack and unpack."""
        source = self.source
        family = source.pick(["public", "prepack", "bounds", "unpack", "per channel"])
        bits = source.pick([8, 4, 2])
        if family == "unpack":
            self.unpack(bits)
        elif family == "per channel":
            self.per_channel(bits)
        else:
            self.pack(family, bits)

    def pack(self, family: str, bits: int) -> None:
        source = self.source
        dim = self.dim()
        if family != "public" and not source.rarely():
            dim = -(-dim * bits // 8) * (8 // bits)
        shape: tuple[int, ...] = (source.below(7), dim)
        if source.rarely():
            shape = self.small_shape()
        pools = [FLOATS, FLOATS, FLOATS, WIDE] + ([WILD] if source.rarely(4) else [])
        weights = self.floats(shape, ["f4", "f4", "f2", "f8" if source.rarely(3) else "f4"], pools)
        wrong = set(weights.wrong)
        names = (
            "weights",
            "weight",
            "bits",
            "method",
            "num_threads",
            "nbins",
            "ratio",
            "optimized_qparams",
            "rowwise_min_max",
        )
        greedy, bins, ratio = False, 200, 0.16
        if weights.holds is not None:
            shape = weights.holds.shape
            if weights.holds.dtype.newbyteorder("=") == np.float64 and family != "public":
                wrong.add(TypeError)
            whole = family == "public" or not shape or shape[-1] % (8 // bits) == 0
            two = len(shape) == 2 or (bits == 8 and family != "public" and len(shape) > 0)
            if not two or shape[-1] == 0 or not whole:
                wrong.add(ValueError)
        num_rows = int(np.prod(shape[:-1]))
        bounds = NONE
        if family == "public":
            method = "minmax"
            greedy = dim <= 24 and source.rarely(24)
            if greedy:
                method = "greedy"
                if bits == 8:
                    wrong.add(ValueError)
            elif source.rarely(32):
                method = source.pick(["Greedy", "", None, 1, b"minmax", ["minmax"]])
                wrong |= REFUSED
            threads = self.threads()
            wrong |= threads.wrong

            def call(_: Any) -> Any:
                return qembag.quantize(weights.value, bits, method=method, num_threads=threads.value).data
        else:
            rest: list[Any] = []
            if bits != 8:
                optimized = Given(False, False) if source.below(4) else self.flag()
                wrong |= optimized.wrong
                greedy = bool(optimized.holds)
                bins = 1 + source.below(12)
                given_bins, given_ratio = bins, source.pick([0.16, 0, 1, 0.5, np.float32(0.25), np.float64(0.75)])
                ratio = float(given_ratio)
                if source.rarely(24):
                    given_bins = source.pick([0, -1, 2**31, 2**70, 1.5, True, "2", None, 1_000_001])
                    wrong |= REFUSED
                if source.rarely(24):
                    given_ratio = source.pick([-0.1, 1.5, np.nan, np.inf, "0.5", None, True, 1j, np.array([0.5])])
                    wrong |= REFUSED
                rest = [optimized.value, given_bins, given_ratio]
            if family == "bounds":
                bounds_shape = (num_rows, 2) if not source.rarely() else self.small_shape()
                bounds = self.floats(bounds_shape, ["f4", "f4", "f2", "f4"], [FLOATS, WIDE])
                wrong |= bounds.wrong
                if bounds.holds is not None and bounds.holds.shape != (num_rows, 2):
                    wrong.add(ValueError)
            name = f"embedding_bag_{NAMES[bits]}_prepack" + ("_with_rowwise_min_max" if family == "bounds" else "")

            def call(_: Any) -> Any:
                given = [weights.value, bounds.value] if family == "bounds" else [weights.value]
                return getattr(ops, name)(*given, *rest)

        oracle = None
        if not wrong:
            with np.errstate(all="ignore"):
                plain = weights.holds.astype(np.float32).reshape(num_rows, shape[-1])
                limits = None if bounds.holds is None else bounds.holds.astype(np.float32)
                expected = reference.quantize(plain, bits, bounds=None if greedy else limits)
                _, scales, biases = reference.unpack(expected, bits, shape[-1])
                if greedy and num_rows:
                    found = reference.quantize(plain, bits, greedy=True, nbins=bins, ratio=ratio)
                    _, found_scales, found_biases = reference.unpack(found, bits, shape[-1])
            finite = np.isfinite(plain).all() and np.isfinite(scales).all() and np.isfinite(biases).all()
            if greedy and num_rows:
                expected = found
                finite = finite and np.isfinite(found_scales).all() and np.isfinite(found_biases).all()
            if limits is not None and not greedy:
                finite = finite and np.isfinite(limits).all()
            if not finite:
                wrong.add(ValueError)
            else:
                packed = (*shape[:-1], expected.shape[1]) if num_rows else None

                def oracle() -> np.ndarray:
                    return self.unsigned(expected, bits).reshape(packed)

                inner = call

                def call(_: Any) -> Any:
                    result = inner(None)
                    return result if packed is None else self.unsigned(result, bits)

                if packed is None:
                    oracle = None
        self.at_each_level(call, frozenset(wrong), names, oracle)

    @staticmethod
    def unsigned(packed: np.ndarray, bits: int) -> np.ndarray:
        """Packed rows whose zeros of scale and bias are positive: they may carry either sign."""
        tail = TAIL_BYTES[bits]
        kind = "<f4" if bits == 8 else "<f2"
        copy = packed.copy()
        ends = np.ascontiguousarray(copy[..., -tail:])
        copy[..., -tail:] = (ends.view(kind) + np.zeros((), kind)).view(np.uint8)
        return copy

    def unpack(self, bits: int) -> None:
        source = self.source
        row_bytes = source.below(40)
        if source.rarely(4):
            shape = (*self.small_shape(), row_bytes)
            given = self.place(
                source.values(POOL, int(np.prod(shape))).reshape(shape),
                source.pick(["plain", "strided", "reversed", "columns", "subclass", "method", "buffer", "broadcast"]),
            )
        else:
            given = self.rows(bits, source.below(9), row_bytes)
            given.wrong = frozenset({TypeError}) if given.is_plain else NOTHING
            shape = given.holds.shape
        wrong = set(given.wrong)
        tail = TAIL_BYTES[bits]
        if shape[-1] < tail or (bits != 8 and len(shape) != 2):
            wrong.add(ValueError)
        dim = (shape[-1] - tail) * (8 // bits)

        def oracle() -> np.ndarray:
            rows = given.holds.reshape(-1, shape[-1]) if given.holds.size else np.zeros((0, shape[-1]), np.uint8)
            return reference.dequantize(rows, bits, dim).reshape(*shape[:-1], dim)

        name = f"embedding_bag_{NAMES[bits]}_unpack"
        self.at_each_level(lambda _: getattr(ops, name)(given.value), frozenset(wrong), ("weight",), oracle)
        meta, _ = self.attempt(lambda: getattr(ops, f"{name}_meta")(given.value), frozenset(wrong), ("weight",))
        if meta is not None:
            self.require(meta == ((*shape[:-1], dim), np.float32), f"the shape of unpack is told as {meta}")

    def per_channel(self, bits: int) -> None:
        source = self.source
        num_rows, dim = source.below(6), self.dim()
        top = 256 if source.rarely() else 2**bits
        values = source.values(POOL, num_rows * dim) % top if top < 256 else source.values(POOL, num_rows * dim)
        codes = self.place(
            values.reshape(num_rows, dim),
            source.pick(["plain", "plain", "strided", "reversed", "columns", "list", "subclass"]),
        )
        wrong: set[type[Exception]] = set()
        holds = codes.holds
        if holds.ndim != 2 or holds.shape[1] == 0:
            return
        if (holds >= 2**bits).any():
            wrong.add(ValueError)
        scales = self.floats((num_rows,), ["f4", "f8", "f2"], [FLOATS, FLOATS, WILD])
        zeros = self.floats((num_rows,) if not source.rarely() else self.small_shape(), ["f4", "f8", "f2"], [FLOATS])
        wrong |= scales.wrong | zeros.wrong
        for part in (scales, zeros):
            if part.holds is not None and part.holds.shape != (num_rows,):
                wrong.add(ValueError)
        if not wrong:
            kind = "<f4" if bits == 8 else "<f2"
            with np.errstate(all="ignore"):
                first, second = scales.holds.astype("f4"), zeros.holds.astype("f4")
                tails = np.stack([first, -(second * first)], axis=1).astype(kind)
            if not np.isfinite(tails).all():
                wrong.add(ValueError)
        names = ("codes", "scales", "zero_points", "bits")
        packed, _ = self.attempt(
            lambda: ops.embedding_bag_prepack(codes.value, scales.value, zeros.value, bits), frozenset(wrong), names
        )
        if packed is None:
            return
        back, _ = self.attempt(lambda: ops.embedding_bag_unpack(packed), NOTHING, ())
        self.require(same_bits(back[0], holds.astype(np.uint8)), "the codes that come back")
        self.require(same_bits(back[1], first) and same_bits(back[2], second), "the scales that come back")
        self.require(same_bits(packed.codes(), holds.astype(np.uint8)), "the packed codes")
        self.require(packed.data[:, packed.row_bytes - TAIL_BYTES[bits] :].tobytes() == tails.tobytes(), "the tails")

    # ---- Shapes, and objects that are no tables ---------------------------------------------------------------------

    def shapes(self) -> None:
        """The operators that tell the shape of an answer."""
        source = self.source
        bits = source.pick([8, 4, 2])
        operator = f"embedding_bag_{NAMES[bits]}"
        per_byte, tail = 8 // bits, TAIL_BYTES[bits]
        wrong: set[type[Exception]] = set()
        if source.rarely(3):
            weights = self.floats(self.small_shape(), ["f4", "f2", "f4", "f8"], [FLOATS])
            wrong |= weights.wrong
            if weights.holds is not None:
                shape = weights.holds.shape
                if weights.holds.dtype.newbyteorder("=") == np.float64:
                    wrong.add(TypeError)
                if not shape or shape[-1] == 0 or shape[-1] % per_byte or (bits != 8 and len(shape) != 2):
                    wrong.add(ValueError)
            told, _ = self.attempt(
                lambda: getattr(ops, f"{operator}_prepack_meta")(weights.value), frozenset(wrong), ("weight",)
            )
            if told is not None:
                packed = (*weights.holds.shape[:-1], weights.holds.shape[-1] // per_byte + tail)
                self.require(told == (packed, np.uint8), f"the shape of prepack is told as {told}")
            return
        row_bytes = source.below(14)
        rows = self.rows(bits, source.below(5), row_bytes)
        indices = self.integers(self.small_shape(), 9)
        offsets = self.integers(self.small_shape(), 9) if source.below(3) else NONE
        last = self.flag()
        for given in (rows, indices, offsets, last):
            wrong |= given.wrong
        if row_bytes <= tail:
            wrong.add(ValueError)
        num_bags = 0
        if indices.holds is not None:
            ndim = indices.holds.ndim
            if ndim == 1 and offsets.holds is not None and offsets.holds.ndim == 1:
                num_bags = len(offsets.holds) - bool(last.holds)
            elif ndim == 2 and offsets.value is None:
                num_bags = len(indices.holds)
            else:
                num_bags = -1
            if num_bags < 0:
                wrong.add(ValueError)
        told, _ = self.attempt(
            lambda: getattr(ops, f"{operator}_rowwise_offsets_meta")(
                rows.value, indices.value, offsets.value, include_last_offset=last.value
            ),
            frozenset(wrong),
            ("weight", "indices", "offsets", "include_last_offset"),
        )
        if told is not None:
            expected = ((num_bags, (row_bytes - tail) * per_byte), np.float32)
            self.require(told == expected, f"the shape of bags is told as {told}")

    def no_tables(self) -> None:
        """Anything in the place of a table, of its rows or of its parts."""
        source = self.source
        bits = source.pick([8, 4, 2])
        odd = source.pick([None, *NO_INTEGERS, np.zeros((2, 2)), np.zeros(3, np.int8), np.zeros((0, 0, 0), np.uint8)])
        operator = f"embedding_bag_{NAMES[bits]}"
        codes, ones = np.ones((2, 4), np.uint8), np.ones(2, np.float32)
        other = qembag.QuantizedTable(
            np.zeros((2, 12), np.uint8), source.pick([width for width in NAMES if width != bits])
        )
        for name, call in (
            ("table", lambda: qembag.embedding_bag(odd, [0], [0])),
            ("table", lambda: qembag.embedding(odd, [0])),
            ("data", lambda: qembag.QuantizedTable(odd, bits)),
            ("weights", lambda: qembag.quantize(odd, bits, method=source.pick(["minmax", "greedy"]))),
            ("weight", lambda: getattr(ops, operator)(source.pick([odd, other]), [0], [0])),
            ("weight", lambda: getattr(ops, f"embedding_{NAMES[bits]}")(source.pick([odd, other]), [0])),
            ("weight", lambda: getattr(ops, f"{operator}_rowwise_offsets")(odd, [0], [0])),
            ("weight", lambda: getattr(ops, f"{operator}_unpack")(odd)),
            ("packed", lambda: ops.embedding_bag_unpack(source.pick([odd, other]))),
            ("codes", lambda: ops.embedding_bag_prepack(odd, ones, ones, bits)),
            ("scales", lambda: ops.embedding_bag_prepack(codes, odd, ones, bits)),
            ("zero_points", lambda: ops.embedding_bag_prepack(codes, ones, odd, bits)),
        ):
            if isinstance(odd, np.ndarray) and odd.dtype.kind == "f" and name != "table":
                continue  # of which floats may be made, or scales
            self.attempt(call, REFUSED, (name, "method"))
        limit = self.threads()
        self.attempt(lambda: qembag.set_num_threads(limit.value), limit.wrong, ("n ",))
        self.attempt(qembag.get_num_threads, NOTHING, ())
        qembag.set_num_threads(None)

    # ---- Kernels ----------------------------------------------------------------------------------------------------

    def kernels(self) -> None:
        """A kernel with anything: None, what is wrong, or an array, and nothing is read or written elsewhere."""
        source = self.source
        anything: list[Any] = [
            None,
            5,
            "text",
            np.zeros((2, 2)),
            np.zeros(3, "i8"),
            np.zeros((2, 12), "u1"),
            Answers(POOL[:4]),
        ]
        bits, dim = source.pick([8, 4, 2]), self.dim()
        num_rows = source.below(6)

        def some(right: Any) -> Any:
            return source.pick(anything) if source.rarely(8) else right

        rows = some(self.rows(bits, num_rows, -(-dim * bits // 8) + TAIL_BYTES[bits]).value)
        mapping = some(self.mapping(num_rows).value) if source.rarely(3) else None
        shape = (source.below(20),) if source.below(4) else (3, 4)
        indices = self.integers(shape, num_rows).value
        offsets = self.integers((source.below(6),), 21, ordered=True).value if source.below(4) else None
        weights = some(self.floats(shape, ["f4", "f2"], [WILD]).value if source.rarely(3) else None)
        if source.rarely(8):
            bits = source.pick([0, 1, 3, 16, -8, 2**31 - 1])
        if source.rarely(8):
            dim = source.pick([0, -1, dim + 1, dim - 1, sys.maxsize, -sys.maxsize - 1, source.whole() % sys.maxsize])
        offsets, indices = some(offsets), some(indices)
        out = self.out((source.below(6), max(min(dim, 400), 1)), ("f4", "f2"), []).value if source.rarely(2) else None
        half, threads, last = bool(source.byte() & 1), source.below(4), bool(source.byte() & 1)
        mode, padding = source.below(3), source.pick([-1, 0, 1, -2, 2**63 - 1, -(2**63)])
        dequantize = bool(source.byte() & 1)
        for kernels in LEVELS.values():
            for call in (
                lambda k=kernels: k.embedding_bag(
                    rows, bits, dim, mapping, indices, offsets, last, weights, padding, mode, out, half, threads
                ),
                lambda k=kernels: k.embedding(rows, bits, dim, mapping, indices, dequantize, out, half, threads),
            ):
                result, _ = self.attempt(call, NOTHING, ())
                self.require(result is None or isinstance(result, (tuple, np.ndarray)), "a kernel's answer")


SCENES = (
    *[Scene.bags] * 8,
    *[Scene.single_rows] * 4,
    *[Scene.tables] * 2,
    *[Scene.quantizing] * 4,
    *[Scene.kernels] * 2,
    *[Scene.storm] * 4,
    Scene.shapes,
    Scene.no_tables,
)


def run(data: bytes) -> None:
    """All the calls of an input."""
    source = Source(data)
    before = _dispatch.kernels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Work for threads takes a hundred times as long as another scene: one at most, where it comes first.
            scene = Scene(source)
            if source.byte() == 255:
                scene.many_rows()
                scene.check_inputs()
            for _ in range(MOST_SCENES):
                if source.is_at_end:
                    break
                scene = Scene(source)
                source.pick(SCENES)(scene)
                scene.check_inputs()
    finally:
        _dispatch.kernels = before
