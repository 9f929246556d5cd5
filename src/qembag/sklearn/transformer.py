"""Bags of rows as a transformer: a matrix of features, or rows of indices, to vectors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import validate_data

from .. import _batches, _errors
from ..lookup import embedding_bag

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from ..float_table import FloatTable
    from ..table import QuantizedTable


class EmbeddingBagTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Sums of a table's rows, weighted by features: a projection whose matrix is the table.

    With ``input="features"`` it is ``X @ table``: a drop-in for a dense projection after any vectorizer. There is
    nothing to learn: `transform` works without `fit`.

    Parameters
    ----------
    table : QuantizedTable, FloatTable, or ndarray of floats, 2-D
        `sklearn.base.clone` shares a table's rows, and copies an array: wrap that in a `FloatTable`. A pickle holds the
        rows, or for a mapped table the file's path.
    input : {"features", "indices"}
        What `transform` is given. "features": a matrix, sparse or dense, whose columns are the table's first rows and
        whose values are weights; zeros add nothing, and are not counted by ``mode="mean"``. "indices": the numbers of
        rows, a bag a sample.
    mode, padding_idx, invalid, dtype, num_threads
        As for `embedding_bag`. A matrix has no ``mode="max"``. With ``invalid="skip"`` it may have more columns than
        the table has rows; those beyond add nothing.

    Attributes
    ----------
    n_features_in_ : int
        Columns of the matrix that `fit` saw.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Their names, where it had some.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> from qembag.sklearn import EmbeddingBagTransformer
    >>> table = qembag.FloatTable(np.array([[1, 0], [0, 1], [5, 5]], np.float32))
    >>> EmbeddingBagTransformer(table).fit_transform([[2, 0, 0], [0, 1, 0.5]])
    array([[2. , 0. ],
           [2.5, 3.5]], dtype=float32)
    >>> EmbeddingBagTransformer(table, input="indices", mode="mean").transform([[2, 2], [], [0, 1]])
    array([[5. , 5. ],
           [0. , 0. ],
           [0.5, 0.5]], dtype=float32)
    """

    def __init__(
        self,
        table: QuantizedTable | FloatTable | NDArray[Any],
        *,
        input: Literal["features", "indices"] = "features",
        mode: Literal["sum", "mean", "max", "average", "sqrtn"] = "sum",
        padding_idx: int | None = None,
        invalid: Literal["raise", "skip"] = "raise",
        dtype: DTypeLike | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.table = table
        self.input = input
        self.mode = mode
        self.padding_idx = padding_idx
        self.invalid = invalid
        self.dtype = dtype
        self.num_threads = num_threads

    def fit(self, X: Any, y: object = None) -> Self:
        """Check the parameters, and of a matrix its shape, values and names of columns.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n_samples, n_features); with ``input="indices"`` anything
        y : ignored

        Returns
        -------
        EmbeddingBagTransformer
            Itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter is wrong; if `X` has more columns than the table has rows, or is no finite matrix.
        """
        if self._takes_features():
            self._look_up(self._matrix(X, reset=True)[:0])
        else:
            self._look_up(np.empty((0, 0), np.int64))
        return self

    def transform(self, X: Any) -> NDArray[Any]:
        """The bags of rows.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n_samples, n_features)
            CSR of float32 is used as it is. With ``input="indices"``: a 2-D array or data frame of integers, of which
            each row is a bag; a column of lists (Arrow, polars, pandas); or a sequence of sequences of integers.

        Returns
        -------
        ndarray of shape (n_samples, dim)
            float32, or `dtype`.

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `embedding_bag` and `fit`.
        """
        if self._takes_features():
            return self._look_up(self._matrix(X, reset=False))
        try:
            return self._look_up_rows(X)
        except (TypeError, ValueError, IndexError) as error:
            if not str(error).startswith(("indices", "lengths")):
                raise  # of a parameter
            # A lookup names its own argument, and counts the indices of all samples.
            raise type(error)(f"X: {error}") from error

    def _look_up_rows(self, X: Any) -> NDArray[Any]:
        """The bags of indices, in whatever they come."""
        if scipy.sparse.issparse(X):
            raise TypeError("X must be indices with input='indices', got a sparse matrix: use input='features'")
        shape = getattr(X, "shape", ())
        if isinstance(shape, tuple) and len(shape) == 2:
            X = np.asarray(X)
            if X.dtype != object:
                return self._look_up(X)
            if X.shape[1] == 1 and _is_bag(X[0, 0] if len(X) else None):
                X = X[:, 0]  # a data frame of one column of lists
        elif _batches.is_arrow(X) and getattr(X, "dtype", None) != np.dtype(object):
            return self._look_up(X)
        elif isinstance(X, (str, bytes, Mapping)) or not hasattr(X, "__iter__"):
            raise TypeError(f"X must be an array, a column or a sequence of bags of indices, got {_errors.kind_of(X)}")
        rows = [_row(row, number) for number, row in enumerate(X)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        indices = list(itertools.chain.from_iterable(rows))
        if np.ndim(indices[0] if indices else 0):
            raise ValueError("X must have a sequence of indices for each sample, got sequences of sequences")
        return self._look_up(indices, lengths=lengths)

    def _takes_features(self) -> bool:
        if self.input not in ("features", "indices"):
            raise ValueError(f"input must be 'features' or 'indices', got {_errors.shown(self.input)}")
        return self.input == "features"

    def _matrix(self, X: Any, *, reset: bool) -> Any:
        """A matrix in CSR format."""
        found = validate_data(self, X, reset=reset, accept_sparse="csr", dtype=[np.float32, np.float64])
        rows = self._shape()[0]
        if found.shape[1] > rows and self.invalid != "skip":
            raise ValueError(
                f"X must have at most {rows} features, one for each row of the table, got {found.shape[1]}"
            )
        if not scipy.sparse.issparse(found):
            return scipy.sparse.csr_array(found)
        if self.mode == "mean" and not found.data.all():
            found = found.copy()
            found.eliminate_zeros()
        return found

    def _shape(self) -> tuple[int, int]:
        shape: tuple[int, ...] = getattr(self.table, "shape", ())
        if len(shape) != 2:
            raise TypeError(
                f"table must be a QuantizedTable, a FloatTable or an array of floats, got {_errors.kind_of(self.table)}"
            )
        return int(shape[0]), int(shape[1])

    def _look_up(self, bags: Any, **more: Any) -> NDArray[Any]:
        return embedding_bag(
            self.table,
            bags,
            mode=self.mode,
            padding_idx=self.padding_idx,
            invalid=self.invalid,
            dtype=self.dtype,
            num_threads=self.num_threads,
            **more,
        )

    @property
    def _n_features_out(self) -> int:
        """For the mixin that names them."""
        return self._shape()[1]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        takes_features = self.input == "features"
        tags.input_tags.sparse = tags.input_tags.two_d_array = takes_features
        tags.no_validation = not takes_features
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        return tags


def _row(row: Any, number: int) -> Any:
    """A sample's indices. Raises TypeError if it is no sequence."""
    if not _is_bag(row):
        raise TypeError(f"X must have a sequence of indices for each sample, got {_errors.kind_of(row)} at {number}")
    return row


def _is_bag(row: Any) -> bool:
    return hasattr(row, "__len__") and hasattr(row, "__iter__") and not isinstance(row, (str, bytes, Mapping))
