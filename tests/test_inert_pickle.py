"""Pickles are read without running anything: each opcode that state dicts need, and a refusal of everything else."""

from __future__ import annotations

import os
import pickle
import pickletools
import sys
import tracemalloc
from collections import OrderedDict
from typing import Any

import pytest

from qembag.interop.budget import Budget
from qembag.interop.inert_pickle import STEPS, Global, UnknownGlobal, Unread, read_pickle
from support.torch_files import Call, Name, Persistent, coded, pickled

PAIR = Name("a", "pair")
TABLE: dict[tuple[str, str], Any] = {
    ("a", "pair"): Global("a.pair", lambda arguments: ["pair", *arguments]),
    ("a", "skip"): Global("a.skip", lambda arguments: Unread("a.skip")),
    ("a", "thing"): Global("a.thing"),
    ("a", "number"): 3,
}


def read(raw: bytes, budget: int = 10**7) -> Any:
    return read_pickle(memoryview(raw), TABLE, lambda given: ("kept", given), Budget("what it builds", budget))


def refused(raw: bytes, words: str, budget: int = 10**7) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(raw, budget)
    assert len(str(caught.value)) < 700


LATE = ["late"]
VALUES = [
    None, True, False, 0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, -(2**63), 2**100, 0.5, float("inf"),
    "", "a", "größe 😀", "x" * 300, "x" * 70_000, b"", b"ab", b"x" * 300, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [],
    [1], [1, [2, [3, ()]]], {}, {"a": 1}, {"a": {"b": [None]}}, list(range(3000)), {str(n): n for n in range(3000)},
    [["shared"] * 2] * 3, [*([n] for n in range(300)), LATE, LATE],
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dump", [pickle.dumps, pickle._dumps], ids=["C", "Python"])
def test_plain_values_are_read_as_pickle_reads_them(dump, protocol):
    for value in VALUES:
        raw = dump(value, protocol)
        if protocol == 2 and isinstance(value, bytes):
            refused(raw, "_codecs.encode|bytes")  # a call of a global, which is not in this table
        else:
            found = read(raw)
            assert type(found) is type(value)
            assert found == value


def test_every_opcode_is_tried():
    """The values above, a text and bytes of 8-byte length, and what the next tests write."""
    seen = {ord(code) for code in "cRbQa"} | {0x81, 0x93, 0x8D, 0x8E, ord("s"), 0x8F, 0x90, 0x91, 0x96}
    for protocol in (2, 3, 4, 5):
        for dump in (pickle.dumps, pickle._dumps):
            for value in VALUES:
                seen |= {ord(opcode.code) for opcode, _, _ in pickletools.genops(dump(value, protocol))}
    assert set(STEPS) - seen == set()


def test_sets_are_passed_over():
    for value in (set(), {1, "a"}, frozenset(), frozenset([(1, "a")]), {frozenset([1])}):
        for protocol in (4, 5):
            assert read(pickle.dumps([value, 1, value], protocol)) == [Unread("set"), 1, Unread("set")]
    refused(b"\x80\4](K\1\x90.", "adds to a list, which is no set")
    refused(b"\x80\4(K\1\x90.", "more values than there are")
    refused(b"\x80\4K\1\x91.", "more values than there are")


def test_long_texts_and_bytes_are_read():
    assert read(pickle.dumps(bytearray(b"abc"), 5)) == b"abc"
    assert read(b"\x80\4\x8d" + (3).to_bytes(8, "little") + b"abc.") == "abc"
    assert read(b"\x80\4\x8e" + (3).to_bytes(8, "little") + b"abc.") == b"abc"


def test_keys_become_texts():
    assert read(pickled({1: "a", 2.5: "b", None: "c", False: "d", ("e", 1): "f", "g": "h"})) == {
        "1": "a", "2.5": "b", "None": "c", "False": "d", "e,1": "f", "g": "h"
    }  # fmt: skip
    for key in ([], {}, ((1,),), Name("a", "thing"), (Name("a", "number"), []), Call(PAIR, ())):
        refused(pickled({"a": 1})[:-1] + coded(key) + b"Ns.", "flat tuples of them as keys")
    refused(b"\x80\2}(X\1\0\0\0aNX\1\0\0\0aNu.", "has the key 'a' twice")


def test_globals_are_rows_of_the_table():
    for protocol in (2, 4):
        assert read(pickled(Call(PAIR, (1, "b")), protocol)) == ["pair", 1, "b"]
        assert read(pickled(Name("a", "number"), protocol)) == 3
        assert read(pickled(Persistent((1, 2)), protocol)) == ("kept", (1, 2))


def test_a_state_is_only_set_where_it_is_dropped():
    assert read(pickled(Call(Name("a", "skip"), (), state={"b": 1}))) == Unread("a.skip")
    for value in ({}, [], None, "a", 1, Name("a", "thing"), Call(PAIR, ())):
        refused(pickled(value)[:-1] + b"}b.", "sets the state of")


def test_a_new_object_is_only_made_where_it_is_dropped():
    skipped = coded(Name("a", "skip")) + b")\x81"
    assert read(b"\x80\2" + skipped + b"}b.") == Unread("a.skip")
    refused(b"\x80\2" + coded(PAIR) + b")\x81.", "makes a list as a new object, which is not allowed")
    for value in (Name("a", "thing"), Name("a", "number"), "a"):
        refused(b"\x80\2" + coded(value) + b")\x81.", "which is not allowed")


# ---- What is refused ---------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of it runs a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.system, ("touch /tmp/owned",)), (eval, ("1",)), (exec, ("1",)), (__import__, ("os",)), (getattr, ("a", "b")),
     (open, ("/tmp/owned", "w")), (OrderedDict, ()), (bytearray, (10**9,))],
)  # fmt: skip
def test_what_is_not_in_the_table_is_refused_by_name(protocol, function, arguments):
    raw = pickle.dumps([Runs(function, *arguments)], protocol)
    with pytest.raises(UnknownGlobal, match=rf"got '\w+\.{function.__name__}'"):
        read(raw)


def test_names_with_dots_are_not_walked():
    for module, name in (("a", "pair.call"), ("a.pair", "__class__"), ("", ""), ("os", "system"), ("A", "pair")):
        for protocol in (2, 4):
            refused(pickled(Name(module, name), protocol), "must hold tensors and plain values only")


def test_a_module_is_not_imported():
    before = set(sys.modules)
    refused(pickled(Name("this", "s")), "got 'this.s'")
    refused(pickled(Name("this", "s"), 4), "got 'this.s'")
    assert set(sys.modules) == before


def test_only_what_may_be_called_is_called():
    for value in (Name("a", "thing"), Name("a", "number"), "a", 1, None, [], (), {}):
        refused(pickled(Call(value, (1,))), "which is not allowed")
    for arguments in (None, [], {}, "a", Name("a", "pair")):
        refused(b"\x80\2" + coded(PAIR) + coded(arguments) + b"R.", "which is not allowed")
    for module, name in ((1, "a"), ("a", None), ([], "a"), (b"a"[0], "b")):
        refused(b"\x80\4" + coded(module) + coded(name) + b"\x93.", "must be strings")


OTHER_OPCODES = sorted({ord(opcode.code) for opcode in pickletools.opcodes} - set(STEPS) - {ord(".")})


@pytest.mark.parametrize("code", OTHER_OPCODES)
def test_other_opcodes_are_refused(code):
    refused(b"\x80\2)" + bytes([code]) + bytes(20) + b".", f"must not have opcode 0x{code:02x}")


def test_every_other_byte_is_refused():
    known = {ord(opcode.code) for opcode in pickletools.opcodes}
    for code in set(range(256)) - known:
        refused(b"\x80\2" + bytes([code]) + b".", "must not have opcode")


BROKEN = {
    "nothing": (b"", "cut short"),
    "another protocol": (b"\x80\1.", "protocol 2 to 5"),
    "a later protocol": (b"\x80\6N.", "protocol 2 to 5"),
    "no protocol": (b"N.", "is no pickle"),
    "no end": (b"\x80\2N", "cut short"),
    "more after its end": (b"\x80\2N.N", "goes on after its end"),
    "no value": (b"\x80\2.", "more values than there are"),
    "two values": (b"\x80\2NN.", "left over"),
    "a mark left": (b"\x80\2N(.", "more values than there are"),
    "a value below a mark": (b"\x80\2](Na.", "more values than there are|no list"),
    "no mark": (b"\x80\2Nt.", "more values than there are"),
    "an item of no list": (b"\x80\2}Na.", "no list"),
    "an item of a tuple": (b"\x80\2)Na.", "no list"),
    "an item of no dict": (b"\x80\2]NNs.", "no dict"),
    "a key without a value": (b"\x80\2}(Nu.", "a key has no value"),
    "a value that is not there": (b"\x80\2h\0.", "before it is there"),
    "a value kept out of turn": (b"\x80\2Nq\1.", "is kept after"),
    "a value kept far out of turn": (b"\x80\2Nr\xff\xff\xff\xff.", "is kept after"),
    "nothing kept": (b"\x80\2q\0.", "more values than there are"),
    "half a number": (b"\x80\2J\1\2", "cut short"),
    "half a text": (b"\x80\2X\xff\xff\xff\xff.", "cut short"),
    "half a text of 64 bits": (b"\x80\4\x8d" + b"\xff" * 8 + b".", "cut short"),
    "half of some bytes": (b"\x80\4\x8e" + b"\xff" * 8 + b".", "cut short"),
    "half a name": (b"\x80\2ca\npai", "cut short"),
    "a long name": (b"\x80\2c" + b"a" * 5000 + b"\nb\n.", "less than 256 characters"),
    "a name of bytes": (b"\x80\2c\xff\nb\n.", "ASCII"),
    "a text of other bytes": (b"\x80\2X\1\0\0\0\xff.", "not UTF-8"),
    "a lone surrogate": (b"\x80\2X\3\0\0\0\xed\xa0\x80.", "not UTF-8"),
    "half a frame": (b"\x80\4\x95\0", "cut short"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pickle_is_refused(kind):
    refused(*BROKEN[kind])


# ---- Memory and depth --------------------------------------------------------------------------------------------------

N = 1_000_000
BOMBS = {
    "lists": b"]" * N,
    "dicts": b"}" * N,
    "marks": b"(" * N,
    "nothings": b"N" * (2 * N),
    "tuples of one value many times": b"(K\1q\0" + b"h\0" * N + b"tq\1" + b"(" + b"h\1" * N + b"t",
    "values kept": b"N" + b"\x94" * (2 * N),
    "one list in itself, doubled": b"]q\0" + b"(h\0h\0eh\0" * (N // 4),
    "tuples of tuples": b")" + b"\x85" * N,
    "dicts of dicts": b"}" + b"X\0\0\0\0}" * (N // 4),
    "calls": b"ca\npair\nq\0)q\1" + b"h\0h\1R" * (N // 4),
    "calls with many values": b"ca\npair\nq\0(" + b"N" * 100_000 + b"tq\1" + b"h\0h\1R" * 1000,
    "things kept outside": b")q\0" + b"h\0Q" * (N // 4),
    "one long key in many tuples": b"X\xa0\x86\1\0" + b"x" * 100_000 + b"q\0}(" + b"h\0" * 10_000 + b"tNs",
    "long keys of numbers": b"\x8a\xff" + b"\x7f" * 255 + b"q\0}(" + b"h\0" * 100_000 + b"tNs",
    "a text of wide characters": b"X\x05\0\x10\0\xf0\x9f\x98\x80" + b"a" * 0x100001,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_that_builds_too_much_is_refused_in_time(kind):
    """A budget of 4 MB bounds what is there at any moment, whatever the pickle says."""
    raw = b"\x80\2" + BOMBS[kind] + b"."
    budget = 4_000_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"must not need more than 4000000 bytes"):
            read(raw, budget)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < budget + 500_000


def test_a_pickle_may_nest_as_deeply_as_its_budget_allows():
    depth = 50_000
    found = read(b"\x80\2" + b")" + b"\x85" * depth + b".")
    for _ in range(depth):
        (found,) = found
    assert found == ()
    deep = read(b"\x80\2" + b"](" * depth + b"e" * depth + b".")
    assert len(deep) == 1
    del found, deep
    # Nothing looks into a deep value: not a refusal, not a hash.
    refused(b"\x80\2}" + b")" + b"\x85" * depth + b"Ns.", "flat tuples of them as keys, got a tuple")
    refused(b"\x80\2" + b")" + b"\x85" * depth + b")R.", "calls a tuple with a tuple")


def test_a_list_may_hold_itself():
    found = read(b"\x80\2]q\0h\0a.")
    assert found[0] is found
    found.clear()


def test_a_number_has_at_most_255_bytes():
    assert read(b"\x80\2\x8a\xff" + b"\x7f" * 255 + b".").bit_length() == 255 * 8 - 1
    refused(b"\x80\2\x8b" + (10**6).to_bytes(4, "little") + bytes(10**6) + b".", "opcode 0x8b")
