"""Arrays of JAX. test_dlpack.py runs this in a process of its own: after an import of JAX, each fork of the process warns,
also in the tests of others."""

from __future__ import annotations

import pytest

import qembag
import test_dlpack

# The tests of any library's arrays, and the fixtures that they ask for.
table, expected = test_dlpack.table, test_dlpack.expected
test_arguments = test_dlpack.test_arguments_may_be_arrays_of_another_library
test_a_table_of_floats = test_dlpack.test_a_table_of_floats_may_be_an_array_of_another_library
test_no_copy = test_dlpack.test_a_table_in_the_memory_of_another_library_is_no_copy


@pytest.fixture(name="other")
def jax_numpy():
    return test_dlpack.imported("jax.numpy")


def test_an_array_cannot_be_written_to(table, other):
    for dtype in (other.float32, other.bfloat16):
        with pytest.raises(ValueError, match=r"^out must be writeable, got a read-only array$"):
            qembag.embedding_bag(table, test_dlpack.INDICES, test_dlpack.OFFSETS, out=other.zeros((2, 4), dtype))


def test_a_table_may_be_of_bfloat16(other, same_bits):
    table = qembag.FloatTable(other.asarray(test_dlpack.ROWS, other.bfloat16))
    assert table.dtype == "bfloat16"
    same_bits(table[:], test_dlpack.ROWS)
