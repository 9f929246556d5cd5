"""Objects that speak Arrow's C interface wrongly are refused with the argument's name, and read no memory but theirs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import qembag
from conftest import child_environment
from qembag.interop import arrow
from support.arrays import Boom, boom, returning
from support.arrow import Producer, array, schema

TABLE = np.ones((10, 3), np.float32)
UNREADABLE = "^indices must be readable through Arrow's C interface, got "


@pytest.fixture
def nanoarrow():
    return pytest.importorskip("nanoarrow")


def numbers(*values, dtype=np.int64):
    return np.array(values, dtype)


def ends(*values):
    return np.array(values, np.int32)


def integers(length=3, **fields):
    return array(length, [None, numbers(1, 2, 3)], **fields)


def lists(length=2, offsets=(0, 2, 3), elements=None, **fields):
    return array(length, [None, ends(*offsets)], integers() if elements is None else elements, **fields)


def of_lists(form=b"+l", **fields):
    return schema(form, schema(b"l"), **fields)


def of_codes(dictionary=None):
    return schema(b"+l", schema(b"c", dictionary=dictionary or schema(b"l")))


def coded(*codes, **fields):
    return lists(elements=array(3, [None, numbers(*codes, dtype=np.int8)], **fields))


def test_structs_of_ours_are_read_where_they_are_right(nanoarrow):
    made = lists()
    (bags,) = arrow.bags_of(Producer(of_lists(), made), "indices")
    assert bags.offsets.ctypes.data == made.buffers[1]
    assert bags.indices.ctypes.data == made.children[0].contents.buffers[1]
    assert np.array_equal(qembag.embedding_bag(TABLE, Producer(of_lists(), lists())), [[2] * 3, [1] * 3])
    # The oldest way to count nulls, and lists that hide elements.
    nulls = array(3, [numbers(5, dtype=np.uint8), ends(0, 1, 2, 3)], integers(), null_count=-1)
    (bags,) = arrow.bags_of(Producer(of_lists(), nulls), "indices")
    assert (bags.indices.tolist(), bags.offsets.tolist()) == ([1, 3], [0, 1, 1, 2])


WRONG = {
    "a negative length": lambda: (of_lists(), lists(-2)),
    "a length of -1": lambda: (of_lists(), lists(-1)),
    "a negative offset": lambda: (of_lists(), lists(offset=-1)),
    "an offset beyond int64": lambda: (of_lists(), lists(offset=2**63 - 1)),
    "elements of negative length": lambda: (of_lists(), lists(elements=integers(-1))),
    "no offsets": lambda: (of_lists(), array(2, [None, None], integers())),
    "no elements": lambda: (of_lists(), lists(elements=array(3, [None, None]))),
    "one buffer": lambda: (of_lists(), array(2, [None], integers())),
    "three buffers": lambda: (of_lists(), array(2, [None, ends(0, 2, 3), None], integers())),
    "no child": lambda: (of_lists(), array(2, [None, ends(0, 2, 3)])),
    "no child's type": lambda: (schema(b"+l"), lists()),
    "nulls that no bitmap tells": lambda: (of_lists(), lists(null_count=1)),
    "a first offset below 0": lambda: (of_lists(), lists(offsets=(-1, 2, 3))),
    "a last offset beyond the elements": lambda: (of_lists(), lists(offsets=(0, 2, 4))),
    "a format that is no text": lambda: (of_lists(b"\xff\xfe"), lists()),
    "a size that is no number": lambda: (of_lists(b"+w:x"), array(2, [None], integers())),
    "a negative size": lambda: (of_lists(b"+w:-3"), array(2, [None], integers())),
    "a size beyond int64": lambda: (of_lists(b"+w:9223372036854775807"), array(2, [None], integers())),
    "a size beyond the elements": lambda: (of_lists(b"+w:2"), array(2, [None], integers())),
    "a released array": lambda: (of_lists(), lists(released=True)),
    "a released schema": lambda: (of_lists(released=True), lists()),
    "released elements": lambda: (of_lists(), lists(elements=integers(released=True))),
    "no dictionary": lambda: (of_codes(), coded(0, 1, 2)),
    "codes that are floats": lambda: (
        schema(b"g", dictionary=of_lists()),
        array(1, [None, np.zeros(1)], dictionary=lists()),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_structs_that_do_not_fit_are_refused(case, nanoarrow):
    with pytest.raises(ValueError, match=UNREADABLE):
        qembag.embedding_bag(TABLE, Producer(*WRONG[case]()))


def test_offsets_within_a_column_are_checked_as_they_are_read(nanoarrow):
    for offsets in ((0, 3, 1, 3), (0, 2_000_000, 3, 3), (0, -5, 3, 3)):
        with pytest.raises(ValueError, match="offset"):
            qembag.embedding_bag(TABLE, Producer(of_lists(), lists(3, offsets)))
        # Where lists are copied: the first is null.
        nulls = array(3, [numbers(6, dtype=np.uint8), ends(*offsets)], integers(), null_count=1)
        with pytest.raises(ValueError, match=r"^indices must have list offsets that go up, from 0 to 3"):
            qembag.embedding_bag(TABLE, Producer(of_lists(), nulls))
        column = Producer(
            schema(b"c", dictionary=of_lists()),
            array(1, [None, numbers(1, dtype=np.int8)], dictionary=lists(3, offsets)),
        )
        with pytest.raises(ValueError, match=r"^indices must have list offsets that go up"):
            qembag.embedding_bag(TABLE, column)


@pytest.mark.parametrize("code", [-1, 3, -128, 127])
def test_codes_beyond_their_dictionary_are_refused(code, nanoarrow):
    with pytest.raises(ValueError, match=rf"^indices must have codes from 0 to 2, .* got {code}$"):
        arrow.bags_of(Producer(of_codes(), coded(0, code, 2, dictionary=integers())), "indices")
    made = array(2, [None, numbers(0, code, dtype=np.int8)], dictionary=lists())
    with pytest.raises(ValueError, match=rf"^indices must have codes from 0 to 1, .* got {code}$"):
        arrow.bags_of(Producer(schema(b"c", dictionary=of_lists()), made), "indices")


def test_a_code_that_is_null_may_be_any_number(nanoarrow):
    made = array(2, [numbers(1, dtype=np.uint8), numbers(1, 99, dtype=np.int8)], dictionary=lists(), null_count=1)
    (bags,) = arrow.bags_of(Producer(schema(b"c", dictionary=of_lists()), made), "indices")
    assert (bags.indices.tolist(), bags.offsets.tolist()) == ([3], [0, 1, 1])


def test_codes_of_codes_are_refused(nanoarrow):
    nested = schema(b"c", dictionary=schema(b"l"))
    inner = array(3, [None, numbers(0, 1, 2, dtype=np.int8)], dictionary=integers())
    with pytest.raises(TypeError, match=r"^indices must be a column of lists of integers, got lists of dictionary$"):
        arrow.bags_of(Producer(of_codes(nested), coded(0, 1, 2, dictionary=inner)), "indices")


def test_elements_at_any_address_are_read(nanoarrow):
    raw = np.zeros(25, np.uint8)[1:]
    raw[:] = numbers(1, 2, 9).view(np.uint8)
    column = Producer(of_lists(), lists(elements=array(3, [None, raw])))
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    assert np.array_equal(qembag.embedding_bag(table, column), [table[1] + table[2], table[9]])


TABLES = {
    "longer than its column": lambda: array(5, [None], lists()),
    "without its column": lambda: array(2, [None]),
    "of a negative length": lambda: array(-1, [None], lists()),
    "that begins in its column's end": lambda: array(2, [None], lists(), offset=1),
    "with a wrong column": lambda: array(2, [None], lists(offsets=(0, 2, 4))),
    "with a released column": lambda: array(2, [None], lists(released=True)),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_do_not_fit_are_refused(case, nanoarrow):
    with pytest.raises(ValueError, match=r"^indices(\[''\])? must be readable through Arrow's C interface, got "):
        arrow.columns_of(Producer(schema(b"+s", of_lists()), TABLES[case]()), "indices")


def test_tables_longer_than_the_codes_of_a_column_are_refused(nanoarrow):
    codes = array(2, [None, numbers(0, 1, dtype=np.int8)], dictionary=lists())
    kind = schema(b"+s", schema(b"c", dictionary=of_lists()))
    (bags,) = arrow.columns_of(Producer(kind, array(2, [None], codes)), "indices")[""]
    assert (bags.indices.tolist(), bags.offsets.tolist()) == ([1, 2, 3], [0, 2, 3])
    codes = array(2, [None, numbers(0, 1, dtype=np.int8)], dictionary=lists())
    with pytest.raises(ValueError, match=r"^indices\[''\] must be readable through Arrow's C interface, got "):
        arrow.columns_of(Producer(kind, array(3, [None], codes)), "indices")


@pytest.mark.parametrize("name", ["__arrow_c_array__", "__arrow_c_stream__"])
@pytest.mark.parametrize("answer", [None, 1, (), (1, 2), (None, None, None), object()])
def test_answers_that_are_no_capsules_are_refused(name, answer, nanoarrow):
    for call in (lambda it: qembag.embedding_bag(TABLE, it), lambda it: arrow.columns_of(it, "indices")):
        with pytest.raises((TypeError, ValueError), match=UNREADABLE):
            call(returning(name, answer))


def test_what_a_producer_raises_is_told(nanoarrow):
    for name in ("__arrow_c_array__", "__arrow_c_stream__"):
        with pytest.raises(ValueError, match=f"{UNREADABLE}Raising: ") as caught:
            qembag.embedding_bag(TABLE, type("Raising", (), {name: boom})())
        assert isinstance(caught.value.__cause__, Boom)


def test_capsules_of_another_kind_are_refused(nanoarrow):
    one, other = Producer(of_lists(), lists()).__arrow_c_array__()
    for pair in ((other, one), (one, one), (other, other)):
        with pytest.raises((TypeError, ValueError), match=UNREADABLE):
            qembag.embedding_bag(TABLE, returning("__arrow_c_array__", pair))


WITHOUT = """
import sys
sys.modules["nanoarrow"] = None
import numpy as np, qembag
class Column:
    def __arrow_c_array__(self, requested_schema=None):
        raise AssertionError
class Frame(Column):
    shape = (2, 1)
    def __array__(self, dtype=None, copy=None):
        return np.array([[1], [0]])
class Numbers(Column):
    dtype = np.dtype(np.int64)
    def __array__(self, dtype=None, copy=None):
        return np.array([1, 0])
table = np.ones((2, 3), np.float32)
assert qembag.embedding_bag(table, Frame()).shape == (2, 3)
assert qembag.embedding_bag(table, Numbers(), [0]).shape == (1, 3)
class Integers(Column):  # of integers, as pyarrow's and polars' are: no type of NumPy's
    def __array__(self, dtype=None, copy=None):
        return np.array([1, 0])
assert qembag.embedding_bag(table, Integers(), [0]).shape == (1, 3)
assert qembag.embedding_bag(table, Integers(), lengths=[2]).shape == (1, 3)
try:
    qembag.embedding_bag(table, Numbers())
except ValueError as error:
    assert str(error).startswith("offsets or lengths must be given")
try:
    qembag.embedding_bag(table, Column())
except ImportError as error:
    print(error)
"""


def test_without_nanoarrow_the_error_says_what_to_install():
    command = [sys.executable, "-c", WITHOUT]
    run = subprocess.run(command, check=True, env=child_environment(), capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("this needs nanoarrow: pip install 'qembag[arrow]'\n", "")
