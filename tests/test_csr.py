"""Sparse matrices in the place of indices: CSR by its attributes here, SciPy's own in `test_csr_scipy.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import qembag
import reference
from qembag.interop import csr
from support.layouts import packed_rows

ROWS, DIM = 20, 12


@dataclasses.dataclass
class Matrix:
    """What SciPy's `csr_array` is to qembag."""

    shape: Any
    indptr: Any
    indices: Any
    data: Any
    format: str = "csr"


ENDS = np.array([0, 3, 3, 5, 6], np.int32)
COLUMNS = np.array([7, 2, 7, 19, 0, 0], np.int32)  # neither sorted nor without duplicates
VALUES = np.array([0.5, -2, 3, 1e-3, 0, 7], np.float32)


def matrix(**parts: Any) -> Matrix:
    return dataclasses.replace(Matrix((4, ROWS), ENDS, COLUMNS, VALUES), **parts)


@pytest.fixture
def table(rng, bits):
    return qembag.QuantizedTable(packed_rows(rng, ROWS, DIM, bits), bits)


def expected(table, values=VALUES, mode="sum", **more):
    with np.errstate(over="ignore"):
        weights = np.asarray(values).astype(np.float32)
    return reference.embedding_bag(
        table.data, table.bits, DIM, COLUMNS, ENDS, include_last_offset=True, weights=weights, mode=mode, **more
    )


# ---- What is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["i4", "i8", ">i4", "u2"])
@pytest.mark.parametrize("columns", ["i4", "i8", ">i8", "u8"])
def test_a_lookup_is_of_each_row_as_a_bag_with_its_values_as_weights(level, threads, table, ends, columns, same_bits):
    given = matrix(indptr=ENDS.astype(ends), indices=COLUMNS.astype(columns))
    same_bits(qembag.embedding_bag(table, given), expected(table))


@pytest.mark.parametrize("mode", ["sum", "mean", "average", "sqrtn"])
def test_modes_are_those_of_weighted_bags(level, table, mode, same_bits):
    same_bits(qembag.embedding_bag(table, matrix(), mode=mode), expected(table, mode=mode))


VALUES_OF = {
    "float16": VALUES.astype(np.float16),
    "float32, swapped": VALUES.astype(">f4"),
    "float64": np.array([1e300, 0.1, 1 / 3, -1e-50, 0, 7]),
    "int64": np.array([2**53 + 1, -1, 3, 2**24 + 1, 0, 7]),
    "uint64": np.array([2**64 - 1, 1, 3, 1, 0, 7], np.uint64),
    "int8": np.array([-128, 127, 1, 1, 0, 7], np.int8),
    "bool": np.array([True, True, False, True, False, True]),
    "longdouble": VALUES.astype(np.longdouble),
    "list": [1, 2, 3, 4, 5, 6],
    "strided": np.repeat(VALUES, 2)[::2],
}


@pytest.mark.parametrize("kind", VALUES_OF)
def test_values_of_each_real_type_are_rounded_once_to_float32(table, kind, same_bits):
    same_bits(qembag.embedding_bag(table, matrix(data=VALUES_OF[kind])), expected(table, VALUES_OF[kind]))


@pytest.mark.parametrize("kind", ["f4", "f2"])
def test_arrays_of_a_matrix_are_used_where_they_are(kind):
    given = matrix(data=VALUES.astype(kind))
    (bags,) = csr.bags_of(given, "indices")
    for found, own in ((bags.indices, given.indices), (bags.offsets, given.indptr), (bags.weights, given.data)):
        assert found.__array_interface__["data"] == own.__array_interface__["data"]
        assert found.dtype == own.dtype


def test_options_of_a_lookup_hold_for_a_matrix(table, same_bits):
    out = np.empty((4, DIM), np.float16)
    assert qembag.embedding_bag(table, matrix(), padding_idx=7, out=out) is out
    same_bits(out, expected(table, padding_idx=7, half=True))
    wild = matrix(indices=np.where(COLUMNS == 7, 2**31 - 1, COLUMNS).astype(np.int32))
    same_bits(qembag.embedding_bag(table, wild, invalid="skip"), expected(table, padding_idx=7))


@pytest.mark.parametrize("columns", [0, 8, 10**12])
def test_the_number_of_columns_is_not_looked_at(table, columns, same_bits):
    same_bits(qembag.embedding_bag(table, matrix(shape=(4, columns))), expected(table))


def test_rows_that_begin_or_end_within_the_arrays_leave_the_rest_out(table, same_bits):
    """Such a matrix is not SciPy's, except one with room at the end; each row is still where `indptr` says."""
    inner = matrix(shape=(2, ROWS), indptr=ENDS[1:4])
    same_bits(qembag.embedding_bag(table, inner), expected(table)[1:3])


@pytest.mark.parametrize("rows", [0, 3])
def test_a_matrix_without_entries_is_empty_bags(table, rows, same_bits):
    empty = Matrix((rows, ROWS), np.zeros(rows + 1, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    same_bits(qembag.embedding_bag(table, empty), np.zeros((rows, DIM), np.float32))
    assert qembag.embedding_bag(table, dataclasses.replace(empty, indices=[], data=[])).shape == (rows, DIM)


# ---- What is refused -------------------------------------------------------------------------------------------------

WRONG = {
    "1-D": ({"shape": (ROWS,)}, ValueError, r"^indices must have 2 dimensions as a sparse matrix, got a Matrix of shape"),
    "3-D": ({"shape": (1, 4, ROWS)}, ValueError, r"^indices must have 2 dimensions as a sparse matrix"),
    "no shape": ({"shape": 4}, ValueError, r"^indices must have 2 dimensions as a sparse matrix"),
    "shape of text": ({"shape": ("4", 4)}, TypeError, r"^indices\.shape\[0\] must be a whole number, got str '4'$"),
    "negative shape": (
        {"shape": (-1, ROWS), "indptr": np.empty(0, np.int32)}, ValueError, r"^indices\.shape\[0\] must not be negative, got -1$"
    ),
    "huge shape": ({"shape": (2**70, 4)}, ValueError, r"^indices\.indptr must have one more entry than rows"),
    "short indptr": ({"indptr": ENDS[:-1]}, ValueError, r"^indices\.indptr must have one more entry than rows, 4 \+ 1, got 4$"),
    "long indptr": ({"indptr": np.append(ENDS, 6)}, ValueError, r"^indices\.indptr must have one more entry"),
    "no indptr": ({"indptr": ENDS[:0]}, ValueError, r"^indices\.indptr must have one more entry"),
    "2-D indptr": ({"indptr": ENDS[:, None]}, ValueError, r"^indices\.indptr must have 1 dimension, got an int32 array"),
    "short data": ({"data": VALUES[:5]}, ValueError, r"^indices\.data must have the length of indices\.indices, 6, got 5"),
    "long data": ({"data": np.ones(7)}, ValueError, r"^indices\.data must have the length of indices\.indices, 6, got 7"),
    "2-D data": ({"data": VALUES[:, None]}, ValueError, r"^indices\.data must have 1 dimension"),
    "2-D indices": ({"indices": COLUMNS[:, None]}, ValueError, r"^indices\.indices must have 1 dimension"),
    "complex": ({"data": VALUES.astype(complex)}, TypeError, r"^indices\.data must be an array of real numbers or of boole"),
    "text": ({"data": np.array(["1"] * 6)}, TypeError, r"^indices\.data must be an array of real numbers"),
    "objects": ({"data": np.array([1] * 6, object)}, TypeError, r"^indices\.data must be an array of real numbers"),
    "times": ({"data": np.zeros(6, "m8[s]")}, TypeError, r"^indices\.data must be an array of real numbers"),
    "float columns": ({"indices": COLUMNS.astype(float)}, TypeError, r"^indices\.indices must be an array of integers"),
    "float ends": ({"indptr": ENDS.astype(float)}, TypeError, r"^indices\.indptr must be an array of integers"),
    "no array": ({"data": None}, TypeError, r"^indices\.data must be an array, got None$"),
    "column": ({"indices": [7, 2, 7, 20, 0, 0]}, IndexError, r"^indices\[2\]\[0\] is 20: out of range"),
    "negative": ({"indices": [7, -1, 7, 20, 0, 0]}, IndexError, r"^indices\[0\]\[1\] is -1: out of range"),
    "falling ends": ({"indptr": [0, 3, 2, 5, 6]}, ValueError, r"^indices\.indptr\[2\] is 2: must not be below the offset before"),
    "ends beyond": ({"indptr": [0, 3, 3, 5, 7]}, ValueError, r"^indices\.indptr\[4\] is 7: must be from 0 to 6"),
    "negative ends": ({"indptr": [-1, 3, 3, 5, 6]}, ValueError, r"^indices\.indptr\[0\] is -1: must be from 0 to 6"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_matrix_that_does_not_fit_together_is_an_error_and_writes_nothing(table, name):
    parts, kind, message = WRONG[name]
    out = np.full((4, DIM), 7, np.float32)
    with pytest.raises(kind, match=message):
        qembag.embedding_bag(table, matrix(**parts), out=out)
    assert (out == 7).all()


def test_an_object_without_values_is_no_matrix(table):
    given = matrix()
    del given.data
    with pytest.raises(TypeError, match=r"^indices\.data must be an array, got None$"):
        qembag.embedding_bag(table, given)


def test_a_matrix_has_no_offsets_and_is_no_array(table):
    for more in ({"offsets": [0]}, {"lengths": [6]}):
        with pytest.raises(ValueError, match=r"^(offsets|lengths) must be None for a column or a matrix, got list$"):
            qembag.embedding_bag(table, matrix(), **more)
    with pytest.raises(TypeError, match=r"^indices must be an array of integers, got Matrix$"):
        qembag.embedding(table, matrix())


def test_a_matrix_has_weights_of_its_own_and_no_maxima(table):
    with pytest.raises(ValueError, match=r"^per_sample_weights must be None for a column or a matrix"):
        qembag.embedding_bag(table, matrix(), per_sample_weights=VALUES)
    with pytest.raises(ValueError, match=r"^mode must not be 'max' for a sparse matrix, whose data are weights"):
        qembag.embedding_bag(table, matrix(), mode="max")
    plain = qembag.embedding_bag(table, COLUMNS, ENDS, include_last_offset=True, mode="max")
    assert plain.shape == (4, DIM)  # what the error says to do


@pytest.mark.parametrize("part", ["indptr", "indices", "data"])
def test_an_output_in_the_memory_of_a_matrix_is_refused(table, part):
    memory = np.zeros((4, DIM), np.float32)
    memory.reshape(-1)[:6] = VALUES
    kind = np.float32 if part == "data" else np.int32
    own = memory.reshape(-1).view(kind)[: len(getattr(matrix(), part))]
    own[...] = getattr(matrix(), part)
    with pytest.raises(ValueError, match=r"^out must share no memory with"):
        qembag.embedding_bag(table, matrix(**{part: own}), out=memory)


@pytest.mark.parametrize("format", ["csc", "coo", "dia", "lil"])
def test_other_formats_are_to_be_converted(table, format):
    @dataclasses.dataclass
    class Sparse:
        format: str
        indptr: Any = None

        def tocsr(self) -> Matrix:
            return matrix()

    with pytest.raises(TypeError, match=r"^indices must be in CSR format as a sparse matrix, got Sparse: call \.tocsr"):
        qembag.embedding_bag(table, Sparse(format))
