"""SciPy's sparse matrices and arrays as batches."""

from __future__ import annotations

import numpy as np
import pytest

import qembag

sparse = pytest.importorskip("scipy.sparse")

ROWS, DIM = 200, 24
KINDS = [sparse.csr_matrix, sparse.csr_array]


def entries(rng, shape, count):
    """Some twice, in no order."""
    places = [rng.integers(0, length, count) for length in shape]
    return rng.normal(size=count), places


@pytest.fixture
def table(rng, bits):
    return qembag.quantize(rng.normal(size=(ROWS, DIM)).astype(np.float32), bits)


@pytest.mark.parametrize("columns", [ROWS, 50])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i1", "i8", "u2", "?"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lookup_is_the_product_with_the_table(rng, table, kind, dtype, columns):
    values, places = entries(rng, (40, columns), 300)
    matrix = kind((np.rint(abs(values) * 3).astype(dtype), places), shape=(40, columns))
    found = qembag.embedding_bag(table, matrix)
    np.testing.assert_allclose(found, matrix.astype("f4") @ table.dequantize()[:columns], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("index_type", ["i4", "i8"])
@pytest.mark.parametrize("kind", KINDS)
def test_unsorted_and_duplicate_entries_add_up(rng, table, kind, index_type, same_bits):
    lengths = rng.integers(0, 9, 40)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(index_type)
    columns = rng.integers(0, ROWS, ends[-1]).astype(index_type)
    values = rng.normal(size=ends[-1]).astype(np.float32)
    matrix = kind((values, columns, ends), shape=(40, ROWS))
    assert not matrix.has_canonical_format
    bags = (columns, ends)
    expected = qembag.embedding_bag(table, *bags, include_last_offset=True, per_sample_weights=values)
    same_bits(qembag.embedding_bag(table, matrix), expected)
    assert matrix.nnz == ends[-1]  # nothing was summed up in place


def test_room_at_the_end_of_the_arrays_is_not_looked_up(table, same_bits):
    matrix = sparse.csr_array((np.ones(3, np.float32), [0, 1, 2], [0, 1, 3]), shape=(2, ROWS))
    small = qembag.embedding_bag(table, matrix)
    matrix.indices, matrix.data = (np.concatenate([part, part]) for part in (matrix.indices, matrix.data))
    matrix.check_format(full_check=True)
    same_bits(qembag.embedding_bag(table, matrix), small)


@pytest.mark.parametrize("sliced", [slice(3, 9), slice(None, None, 2), [5, 1, 1]])
def test_rows_of_a_matrix_are_rows_of_the_product(rng, table, sliced, same_bits):
    values, places = entries(rng, (12, ROWS), 100)
    matrix = sparse.csr_array((values, places), shape=(12, ROWS))
    same_bits(qembag.embedding_bag(table, matrix[sliced]), qembag.embedding_bag(table, matrix)[sliced])


@pytest.mark.parametrize("format", ["csc", "coo", "dok", "lil", "bsr", "dia"])
def test_other_formats_are_to_be_converted(table, format):
    matrix = sparse.coo_array(np.eye(4, dtype=np.float32)).asformat(format)
    with pytest.raises(
        TypeError, match=r"^indices must be in CSR format as a sparse matrix, got .*: call \.tocsr\(\)$"
    ):
        qembag.embedding_bag(table, matrix)
    assert np.array_equal(qembag.embedding_bag(table, matrix.tocsr()), table[:4])


def test_one_row_is_to_be_made_a_matrix(table):
    row = sparse.csr_array(np.ones(5, np.float32))
    if len(row.shape) == 2:
        pytest.skip("this SciPy has no 1-D arrays")
    with pytest.raises(
        ValueError, match=r"must have 2 dimensions .* of shape \(5,\): reshape\(1, -1\)\.tocsr\(\) makes it one bag$"
    ):
        qembag.embedding_bag(table, row)
    assert qembag.embedding_bag(table, row.reshape(1, -1).tocsr()).shape == (1, DIM)
