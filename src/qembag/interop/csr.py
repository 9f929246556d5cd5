"""Bags of a sparse matrix in CSR format: SciPy's `csr_matrix` and `csr_array`, and what has their attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments, _errors
from .._batches import Bags

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def bags_of(matrix: Any, name: str) -> list[Bags]:
    """Each row of a matrix as a bag: its columns are the indices, its values the weights.

    With ``mode="sum"`` a lookup is the product of the matrix and the table. The columns of a row need not be sorted,
    and may be there twice. A matrix may have fewer columns than the table has rows, or more: only those with entries
    are looked up.

    Parameters
    ----------
    matrix : csr_matrix or csr_array, shape (num_bags, number of columns)
        Its `indices` and `indptr`, and a `data` of float32 or float16, are used where they are. Other real numbers and
        booleans are rounded once to float32.
    name : str
        The argument that it is, for errors.

    Returns
    -------
    list of Bags
        One.

    Raises
    ------
    TypeError
        If `indices` or `indptr` are not integers, or `data` is complex or no number.
    ValueError
        If it has not 2 dimensions, or the lengths of its arrays do not fit together.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> matrix = SimpleNamespace(shape=(2, 4), indptr=[0, 2, 3], indices=[3, 0, 1], data=[0.5, 2, 1])
    >>> bags_of(matrix, "indices")[0].weights
    array([0.5, 2. , 1. ], dtype=float32)
    """
    shape = getattr(matrix, "shape", None)
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(
            f"{name} must have 2 dimensions as a sparse matrix, got a {type(matrix).__name__} of shape {shape}: "
            f"reshape(1, -1).tocsr() makes it one bag"
        )
    rows = _arguments.whole_number(shape[0], f"{name}.shape[0]")
    if rows < 0:
        raise ValueError(f"{name}.shape[0] must not be negative, got {rows}")
    columns = _flat(matrix, "indices", name, _arguments.integers)
    ends = _flat(matrix, "indptr", name, _arguments.integers)
    values = _real(_flat(matrix, "data", name, _arguments.as_array), f"{name}.data")
    if len(ends) != rows + 1:
        raise ValueError(f"{name}.indptr must have one more entry than rows, {rows} + 1, got {len(ends)}")
    if len(values) != len(columns):
        raise ValueError(f"{name}.data must have the length of {name}.indices, {len(columns)}, got {len(values)}")
    return [Bags(columns, ends, values)]


def _flat(matrix: Any, part: str, name: str, read: Callable[[object, str], NDArray[Any]]) -> NDArray[Any]:
    array = read(getattr(matrix, part, None), f"{name}.{part}")
    if array.ndim != 1:
        raise ValueError(f"{name}.{part} must have 1 dimension, got {_errors.kind_of(array)}")
    return array


def _real(values: NDArray[Any], name: str) -> NDArray[Any]:
    """float32 and float16 as they are, other numbers as float32."""
    kind = values.dtype.newbyteorder("=")
    if kind in (np.float32, np.float16):
        return values
    if kind.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers or of booleans, got {_errors.kind_of(values)}")
    return _arguments.as_float32(values)
