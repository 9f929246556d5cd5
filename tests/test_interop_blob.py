"""Tables in FBGEMM's blobs of bytes: views within its bounds, or one clear error. Needs neither torch nor FBGEMM."""

from __future__ import annotations

import numpy as np
import pytest

import qembag
from qembag.interop.fbgemm import from_blob
from support.arrays import read_only, same_bits
from support.layouts import PAIRS_FIRST, rows_of

SPECS = [("a", 10, 8, 8), ("b", 7, 12, 4), ("c", 5, 8, 2), ("d", 4, 6, 16), ("e", 3, 5, 32), ("none", 0, 4, 8)]


def row_bytes(dim: int, bits: int) -> int:
    return dim * bits // 8 + (4 if bits <= 8 else 0)


def places_of(alignment: int) -> dict[str, tuple[int, int]]:
    """Where each table begins, and its row bytes."""
    found, start = {}, 0
    for name, num_rows, dim, bits in SPECS:
        length = -(-row_bytes(dim, bits) // alignment) * alignment
        found[name] = (start, length)
        start = -(-(start + num_rows * length) // 128) * 128
    return found


@pytest.mark.parametrize("alignment", [1, 4, 16])
def test_tables_are_views_of_the_blob(alignment, rng):
    blob = rng.integers(0, 256, 1100, dtype=np.uint8)
    for name, (start, length) in places_of(alignment).items():
        num_rows, dim, bits = next(spec[1:] for spec in SPECS if spec[0] == name)
        rows = blob[start : start + num_rows * length].reshape(num_rows, length)
        if bits <= 8:
            rows[:, : row_bytes(dim, bits)] = rows_of(rng, PAIRS_FIRST[bits], num_rows, dim)
        else:
            values = rng.normal(size=(num_rows, dim)).astype(f"f{bits // 8}")
            rows[:, : row_bytes(dim, bits)] = values.view(np.uint8)
    tables = from_blob(blob, SPECS, row_alignment=alignment)
    assert list(tables) == [spec[0] for spec in SPECS]
    for name, num_rows, dim, bits in SPECS:
        table, (start, length) = tables[name], places_of(alignment)[name]
        assert table.shape == (num_rows, dim)
        if num_rows:
            assert np.shares_memory(table.data, blob)
            rows = blob[start : start + num_rows * length].reshape(num_rows, length)
            if bits <= 8:
                whole = qembag.QuantizedTable(rows, bits, dim=dim, scale_dtype="float16", scale_first=True)
                same_bits(table[:], whole[:])
            else:
                same_bits(table[:], rows[:, : row_bytes(dim, bits)].copy().view(f"f{bits // 8}").astype(np.float32))


def test_offsets_may_be_given_in_any_order_and_overlap(rng):
    blob = rng.integers(0, 100, 300, dtype=np.uint8)
    tables = from_blob(blob, [("x", 2, 8, 8), ("y", 3, 8, 8)], weights_offsets=[100, 3])
    assert np.array_equal(tables["x"].data.ravel(), blob[100:124])
    assert np.array_equal(tables["y"].data.ravel(), blob[3:39])
    both = from_blob(blob, [("x", 2, 8, 8), ("y", 2, 8, 8)], weights_offsets=np.array([7, 7]))
    assert np.shares_memory(both["x"].data, both["y"].data)


def test_mappings_prune_tables():
    blob = np.zeros(300, np.uint8)
    mapping = np.array([1, -1, 0, -1], np.int32)
    tables = from_blob(blob, [("x", 2, 8, 8), ("y", 2, 8, 32)], mappings=[mapping, mapping])
    assert [table.num_embeddings for table in tables.values()] == [4, 4]
    plain = from_blob(blob, [("x", 2, 8, 8)], mappings=[None])
    assert plain["x"].compressed_indices_mapping is None
    with pytest.raises(IndexError, match=r"^table 'y': compressed_indices_mapping\[0\] is 2"):
        from_blob(blob, [("x", 2, 8, 8), ("y", 2, 8, 8)], mappings=[None, np.array([2], np.int32)])


def test_a_read_only_blob_and_the_last_byte_serve():
    blob = read_only(np.zeros(36, np.uint8))
    assert from_blob(blob, [("x", 3, 8, 8)])["x"].num_rows == 3
    with pytest.raises(ValueError, match=r"must lie within weights of 36 bytes, got 3 rows of 12 bytes from byte 1$"):
        from_blob(blob, [("x", 3, 8, 8)], weights_offsets=[1])


class Kind:
    """As FBGEMM's SparseType."""

    def __init__(self, value: str) -> None:
        self.value = value


def test_fbgemm_s_own_specs_are_taken():
    tables = from_blob(np.zeros(999, np.uint8), [(f"{k}", 2, 8, Kind(k), "HOST") for k in ("int8", "int4", "fp16")])
    assert [getattr(table, "bits", table.dim) for table in tables.values()] == [8, 4, 8]


GOOD = ("x", 3, 8, 8)
WRONG = {
    "weights of floats": ({"weights": np.zeros(99, np.float32)}, TypeError, "weights must be a 1-D array of uint8"),
    "weights of two dimensions": ({"weights": np.zeros((9, 9), np.uint8)}, TypeError, r"got a uint8 array of shape"),
    "no weights": ({"weights": None}, TypeError, "weights must be an array, got None"),
    "weights apart": ({"weights": np.zeros(200, np.uint8)[::2]}, ValueError, r"side by side, got strides \(2,\)"),
    "weights backwards": ({"weights": np.zeros(200, np.uint8)[::-1]}, ValueError, r"side by side, got strides \(-1,\)"),
    "no specs": ({"specs": None}, TypeError, "specs must be a list .*, got None"),
    "an offset for all": ({"weights_offsets": 3}, TypeError, "weights_offsets must be a list .*, got int 3"),
    "mappings by name": ({"mappings": {"x": None}}, TypeError, "table 'x': compressed_indices_mapping must be"),
    "an array of bits": (
        {"specs": [("x", 1, 8, np.array([8, 4]))]},
        ValueError,
        "^table 'x': bits must be 8, 4, 2, 16 or 32, got",
    ),
    "too many rows": (
        {"specs": [("x", 9, 8, 8)]},
        ValueError,
        "^table 'x': must lie within weights of 99 bytes, got 9",
    ),
    "far too many rows": ({"specs": [("x", 2**70, 8, 8)]}, ValueError, "must lie within weights"),
    "beyond all memory": ({"specs": [("x", 2**1000, 8, 8)]}, ValueError, "got a number of 1001 bits rows"),
    "no rows": ({"specs": [("x", -1, 8, 8)]}, ValueError, "must have 0 rows or more"),
    "half a row": ({"specs": [("x", 1.5, 8, 8)]}, TypeError, "^table 'x': rows must be a whole number, got float 1.5"),
    "dim 0": ({"specs": [("x", 1, 0, 8)]}, ValueError, "a dim from 1 to 268435455"),
    "a huge dim": ({"specs": [("x", 0, 2**70, 32)]}, ValueError, "a dim from 1 to 268435455"),
    "the largest dim": ({"specs": [("x", 1, 2**28 - 4, 2)]}, ValueError, "must lie within"),
    "the largest float dim": ({"specs": [("x", 1, 2**28 - 1, 32)]}, ValueError, "must lie within"),
    "an odd dim": ({"specs": [("x", 1, 5, 4)]}, ValueError, "dim must be a multiple of 2 at 4 bits, got 5"),
    "bits 3": ({"specs": [("x", 1, 8, 3)]}, ValueError, "bits must be 8, 4, 2, 16 or 32, got 3"),
    "fp8": ({"specs": [("x", 1, 8, "fp8")]}, ValueError, "bits must be 8, 4, 2, 16 or 32, got 'fp8'"),
    "bits of a list": ({"specs": [("x", 1, 8, [8])]}, ValueError, r"bits must be 8, 4, 2, 16 or 32, got \[8\]"),
    "a name twice": ({"specs": [GOOD, GOOD]}, ValueError, r"^specs\[1\] must be a name of its own, rows, dim and bits"),
    "a short spec": ({"specs": [("x", 1, 8)]}, ValueError, r"^specs\[0\] must be a name"),
    "no spec": ({"specs": [5]}, ValueError, r"^specs\[0\] must be a name of its own, rows, dim and bits, got 5"),
    "a number as name": ({"specs": [(1, 1, 8, 8)]}, ValueError, r"^specs\[0\] must be a name of its own"),
    "a negative offset": ({"weights_offsets": [-1]}, ValueError, "must lie within weights of 99 bytes"),
    "an offset far away": ({"weights_offsets": [2**80]}, ValueError, "must lie within weights of 99 bytes"),
    "an offset of a half": ({"weights_offsets": [0.5]}, TypeError, r"weights_offsets\[0\] must be a whole number"),
    "too few offsets": ({"weights_offsets": []}, ValueError, "weights_offsets must have an item for each of 1 tables"),
    "too many mappings": ({"mappings": [None, None]}, ValueError, "mappings must have an item for each of 1 tables"),
    "a mapping of int64": ({"mappings": [np.zeros(2, np.int64)]}, TypeError, "must be an array of int32"),
    "alignment 0": ({"row_alignment": 0}, ValueError, "row_alignment must be from 1 to"),
    "a huge alignment": ({"row_alignment": 2**62}, ValueError, "must lie within weights|row_alignment"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(case):
    given, kind, message = WRONG[case]
    arguments = {"weights": np.zeros(99, np.uint8), "specs": [GOOD]} | given
    with pytest.raises(kind, match=message):
        from_blob(arguments.pop("weights"), arguments.pop("specs"), **arguments)
