"""A pickle read without running anything: its opcodes build plain values, and records in the place of objects.

Python's own `pickle` imports and calls what a file names. This machine does neither: a global is a row of the caller's
table, or an error that names it, and a call gives what the caller's function makes of its arguments. Dictionaries have
texts for keys. Nothing recurses, however deeply a pickle nests.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from ..formats.safetensors_file import brief
from .budget import ITEM, OBJECT, PLACE, WIDEST, Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROTOCOLS = range(2, 6)
# Globals are names in Python's source; anything longer is no name.
MAX_NAME = 256
# What the garbage collector and the allocator add to an object.
HEAD = 24
LONG = 1 << 16
# Of a number of LONG1, which has at most 255 bytes, with its sign.
MAX_DIGITS = 616
PLAIN = (str, int, float, bool)


class Global(NamedTuple):
    """A name that a pickle may use, as "module.name": what stands in its place, and what calling it gives."""

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None


class OrderedDict(dict[str, Any]):
    """In the place of collections.OrderedDict: pickles set attributes on it, such as the `_metadata` of modules."""

    __slots__ = ()

    def __repr__(self) -> str:
        # `reprlib` knows dict, and lets its subclasses recurse.
        return f"OrderedDict of {len(self)}"


class Unread(NamedTuple):
    """In the place of a value that is passed over."""

    name: str


class UnknownGlobal(ValueError):
    """A pickle names what is not in the table."""


def read_pickle(
    data: memoryview,
    table: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any],
    budget: Budget,
) -> Any:
    """The value of a pickle.

    Parameters
    ----------
    data : memoryview of uint8
        The pickle. What follows its end is an error.
    table : mapping
        What each allowed global is, by module and name: a `Global`, or an inert value.
    persistent : callable
        What a persistent id stands for.
    budget : Budget
        What building may take.

    Raises
    ------
    ValueError
        If it is no pickle, is damaged, names another global (`UnknownGlobal`), uses an opcode that state dicts do not
        need, or exceeds the budget.
    """
    machine = _Machine(data, table, persistent, budget)
    try:
        return machine.run()
    except _Underflow:
        raise ValueError(f"takes more values than there are, before byte {machine.at}") from None


class _Underflow(Exception):
    """A value was taken that is not there."""


def what(value: Any) -> str:
    """A value for an error message: never deep, never long."""
    if value is None or isinstance(value, (str, int, float)):
        return brief(value)
    if isinstance(value, Global):
        return value.name
    return "a dict" if isinstance(value, dict) else f"a {type(value).__name__}"


def key_text(key: Any, budget: Budget) -> str:
    """A dictionary's key as text. Only plain values and flat tuples of them are keys.

    As texts, keys that a file chose cannot be made to collide: their hashes are salted.
    """
    if type(key) is str:
        return key
    parts = key if type(key) is tuple else (key,)
    if all(part is None or type(part) in PLAIN for part in parts):
        # One text may be in a tuple many times.
        budget.spend(OBJECT + sum(WIDEST * len(part) if type(part) is str else MAX_DIGITS for part in parts))
        return ",".join(map(str, parts))
    raise ValueError(f"must have strings, numbers and flat tuples of them as keys, got {what(key)}")


class _Machine:
    """The state of reading: a stack of values and marks, and the values that were given numbers."""

    def __init__(
        self,
        data: memoryview,
        table: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any],
        budget: Budget,
    ) -> None:
        self.data, self.table, self.persistent, self.budget = data, table, persistent, budget
        self.at = 0
        self.stack: list[Any] = []
        self.highest = 0
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        if self.byte() != PROTO:
            raise ValueError("is no pickle of protocol 2 or later")
        self.proto()
        while (code := self.byte()) != STOP:
            step = STEPS.get(code)
            if step is None:
                raise ValueError(f"must not have opcode 0x{code:02x} (byte {self.at - 1}): state dicts do not need it")
            step(self)
        value = self.pop()
        if self.stack or self.marks:
            raise ValueError("is damaged: values are left over at its end")
        if self.at != len(self.data):
            raise ValueError(f"goes on after its end, at byte {self.at}")
        return value

    # ---- Bytes ----

    def take(self, nbytes: int) -> memoryview:
        begin, self.at = self.at, self.at + nbytes
        if self.at > len(self.data):
            raise ValueError(f"is cut short: it needs {nbytes} bytes at byte {begin}, and has {len(self.data)}")
        return self.data[begin : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def line(self) -> str:
        """A name, up to the end of its line."""
        begin = self.at
        name = bytes(self.data[begin : begin + MAX_NAME]).partition(b"\n")[0]
        self.take(len(name) + 1)
        if len(name) == MAX_NAME:
            raise ValueError(f"must have names of less than {MAX_NAME} characters, got one at byte {begin}")
        try:
            return name.decode("ascii")
        except UnicodeDecodeError:
            raise ValueError(f"must have names in ASCII, got {brief(name)}") from None

    # ---- The stack ----

    def push(self, value: Any) -> None:
        self.stack.append(value)
        if len(self.stack) > self.highest:
            self.budget.spend(PLACE)
            self.highest = len(self.stack)

    def make(self, value: Any) -> None:
        """Push a new value."""
        self.budget.spend(HEAD + sys.getsizeof(value))
        self.push(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Underflow
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def to_mark(self) -> list[Any]:
        if not self.marks:
            raise _Underflow
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    # ---- Opcodes ----

    def proto(self) -> None:
        if (protocol := self.byte()) not in PROTOCOLS:
            raise ValueError(f"must be of protocol {PROTOCOLS[0]} to {PROTOCOLS[-1]}, got {protocol}")

    def frame(self) -> None:
        # Its length helps whoever reads from a stream.
        self.take(8)

    def mark(self) -> None:
        self.budget.spend(OBJECT // 2)
        self.marks.append(len(self.stack))

    def whole(self, nbytes: int) -> None:
        self.make(int.from_bytes(self.take(nbytes), "little", signed=nbytes == 4))

    def long1(self) -> None:
        self.make(int.from_bytes(self.take(self.byte()), "little", signed=True))

    def real(self) -> None:
        self.make(struct.unpack(">d", self.take(8))[0])

    def text(self, length_bytes: int) -> None:
        nbytes = self.number(length_bytes)
        raw = self.take(nbytes)
        # Counted before it is made if it is long, and then as if it were of the widest characters.
        if nbytes > LONG:
            self.budget.spend(WIDEST * nbytes)
        try:
            self.make(str(raw, "utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"has a text that is not UTF-8 before byte {self.at}") from None

    def some_bytes(self, length_bytes: int) -> None:
        nbytes = self.number(length_bytes)
        raw = self.take(nbytes)
        self.budget.spend(nbytes)
        self.make(bytes(raw))

    def tuple_of(self, count: int) -> None:
        self.make(tuple(reversed([self.pop() for _ in range(count)])))

    def tuple_to_mark(self) -> None:
        self.make(tuple(self.to_mark()))

    def some_set(self) -> None:
        """In the place of a set: none is made, since values that a file chose may have the same hash."""
        self.make(Unread("set"))

    def set_to_mark(self) -> None:
        self.to_mark()
        self.some_set()

    def add_to_set(self) -> None:
        self.to_mark()
        if type(self.top()) is not Unread:
            raise ValueError(f"adds to {what(self.top())}, which is no set")

    def append(self) -> None:
        value = self.pop()
        self.extend([value])

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise ValueError(f"appends to {what(target)}, which is no list")
        self.budget.spend(PLACE * len(values))
        target += values

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict):
            raise ValueError(f"sets items of {what(target)}, which is no dict")
        if len(items) % 2:
            raise ValueError(f"is damaged: a key has no value, before byte {self.at}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.budget.spend(ITEM)
            text = key_text(key, self.budget)
            if text in target:
                raise ValueError(f"has the key {brief(text)} twice in one dict")
            target[text] = value

    def put(self, number: int) -> None:
        # Every pickler counts from 0.
        if number > len(self.memo):
            raise ValueError(f"is damaged: value {number} is kept after value {len(self.memo) - 1}")
        self.budget.spend(PLACE)
        self.memo[number : number + 1] = [self.top()]

    def memoize(self) -> None:
        self.put(len(self.memo))

    def get(self, length_bytes: int) -> None:
        number = self.number(length_bytes)
        if number >= len(self.memo):
            raise ValueError(f"is damaged: value {number} is used before it is there, before byte {self.at}")
        self.push(self.memo[number])

    def global_of(self, module: str, name: str) -> None:
        if max(len(module), len(name)) > MAX_NAME:
            raise ValueError(f"must have names of at most {MAX_NAME} characters, got {brief(module)}, {brief(name)}")
        if (module, name) not in self.table:
            raise UnknownGlobal(f"must hold tensors and plain values only, got {brief(f'{module}.{name}')}")
        self.push(self.table[module, name])

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError(f"names a global by {what(module)} and {what(name)}: must be strings")
        self.global_of(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or not isinstance(function, Global) or function.call is None:
            raise ValueError(f"calls {what(function)} with {what(arguments)}, which is not allowed")
        self.make(function.call(arguments))

    def new_object(self) -> None:
        """Only objects that are passed over are made so, such as the packed parameters of quantized LSTMs."""
        self.reduce()
        if type(self.top()) is not Unread:
            raise ValueError(f"makes {what(self.top())} as a new object, which is not allowed")

    def build(self) -> None:
        self.pop()  # such as the `_metadata` of modules
        value = self.top()
        if type(value) not in (OrderedDict, Unread):
            raise ValueError(f"sets the state of {what(value)}, which is not allowed")

    def persistent_id(self) -> None:
        self.make(self.persistent(self.pop()))


PROTO, STOP = 0x80, ord(".")
STEPS: dict[int, Callable[[_Machine], None]] = {
    PROTO: _Machine.proto,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("J"): lambda machine: machine.whole(4),
    ord("K"): lambda machine: machine.whole(1),
    ord("M"): lambda machine: machine.whole(2),
    0x8A: _Machine.long1,
    ord("G"): _Machine.real,
    ord("X"): lambda machine: machine.text(4),
    0x8C: lambda machine: machine.text(1),
    0x8D: lambda machine: machine.text(8),
    ord("B"): lambda machine: machine.some_bytes(4),
    ord("C"): lambda machine: machine.some_bytes(1),
    0x8E: lambda machine: machine.some_bytes(8),
    0x96: lambda machine: machine.some_bytes(8),  # a bytearray
    0x8F: _Machine.some_set,
    0x90: _Machine.add_to_set,
    0x91: _Machine.set_to_mark,
    ord("]"): lambda machine: machine.make([]),
    ord("a"): _Machine.append,
    ord("e"): lambda machine: machine.extend(machine.to_mark()),
    ord(")"): lambda machine: machine.push(()),
    0x85: lambda machine: machine.tuple_of(1),
    0x86: lambda machine: machine.tuple_of(2),
    0x87: lambda machine: machine.tuple_of(3),
    ord("t"): _Machine.tuple_to_mark,
    ord("}"): lambda machine: machine.make({}),
    ord("s"): _Machine.set_item,
    ord("u"): lambda machine: machine.set_items(machine.to_mark()),
    ord("q"): lambda machine: machine.put(machine.number(1)),
    ord("r"): lambda machine: machine.put(machine.number(4)),
    0x94: _Machine.memoize,
    ord("h"): lambda machine: machine.get(1),
    ord("j"): lambda machine: machine.get(4),
    ord("c"): lambda machine: machine.global_of(machine.line(), machine.line()),
    0x93: _Machine.stack_global,
    ord("R"): _Machine.reduce,
    0x81: _Machine.new_object,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}
