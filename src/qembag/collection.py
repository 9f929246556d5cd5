"""Many tables looked up in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import _arguments, _batches, _errors, _handle, _slow_collection
from ._batches import Feature
from ._features import ByFeature, by_feature, checked, features_of, tables_of

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from .float_table import FloatTable
    from .table import QuantizedTable


class _Collection:
    """Tables and the features that look rows up in them."""

    def __init__(
        self,
        tables: Mapping[str, QuantizedTable | FloatTable | NDArray[Any]] | Sequence[Any],
        features: Mapping[str, str] | None,
        dtype: DTypeLike | None,
        invalid: str | Mapping[str, str],
    ) -> None:
        self._tables = tables_of(tables)
        self._features = features_of(features, self._tables)
        number, kind = _arguments.out_type(dtype, None)
        self._dtype = dtype
        # As the compiled code knows it: bfloat16, which may be another package's type, as its bits.
        self._out_dtype = None if dtype is None else "bfloat16" if number == 2 else kind.type
        self._bits_of = kind if number == 2 and kind != np.uint16 else None
        self._invalid = by_feature(invalid, "invalid", self._features, "raise")

    def _compile(self, modes: ByFeature, paddings: ByFeature) -> None:
        """What the loops take of it all, worked out once."""
        self._described = [
            Feature(
                feature,
                self._tables[name]._handle,
                checked(_arguments.mode, "mode", modes, feature),
                checked(_arguments.padding_number, "padding_idx", paddings, feature, self._tables[name].num_embeddings),
                checked(_arguments.skips_invalid, "invalid", self._invalid, feature),
            )
            for feature, name in self._features.items()
        ]
        _, handles, numbers, padding_idx, skips_invalid = zip(*self._described, strict=True)
        self._handle = _handle.CollectionHandle(tuple(self._features), handles, numbers, padding_idx, skips_invalid)
        ends = np.cumsum([0, *self.dims.values()]).tolist()
        self._columns = dict(zip(self._features, map(slice, ends[:-1], ends[1:]), strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_of_parts, (type(self), self._tables, self._features, self._options()))

    def _options(self) -> dict[str, Any]:
        """What the constructor takes beside tables and features."""
        return {"dtype": self._dtype, "invalid": self._invalid}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self._tables)} tables, {len(self._features)} features, nbytes={self.nbytes})"
        )

    @property
    def tables(self) -> dict[str, QuantizedTable | FloatTable]:
        return dict(self._tables)

    @property
    def features(self) -> dict[str, str]:
        return dict(self._features)

    @property
    def invalid(self) -> dict[str, str]:
        return dict(self._invalid)

    @property
    def dims(self) -> dict[str, int]:
        return {feature: self._tables[name].dim for feature, name in self._features.items()}

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def nbytes(self) -> int:
        return sum({id(table): table.nbytes for table in self._tables.values()}.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the tables, features and options to a file, which `from_file` and `open_tables` open; see `save_tables`.

        Parameters
        ----------
        path : str or path
            The file to write; see `save_tables`.

        Raises
        ------
        TypeError, ValueError, IndexError, OSError
            As for `save_tables`.
        """
        from .formats.collections import save

        save(self, path)  # type: ignore[arg-type]


def _of_parts(kind: type[_Collection], tables: Any, features: Any, options: dict[str, Any]) -> _Collection:
    return kind(tables, features, **options)


class EmbeddingBagCollection(_Collection):
    """Tables looked up together: one call gives the bags of all features.

    Parameters
    ----------
    tables : dict of str to QuantizedTable, FloatTable or ndarray of floats; or a list of them
        Of any layout, width and dim. A list's tables are named "0", "1" and so on.
    features : dict of str to str, optional
        The table of each feature; features may share one. Its order is that of the output. Without it each table has a
        feature of its name.
    mode : str, or dict of feature to str
        As for `embedding_bag`. A feature that a dict does not name has "sum".
    dtype : {float32, float16, bfloat16}, optional
        Of the output; as for `embedding_bag`.
    padding_idx : int, or dict of feature to int, optional
        As for `embedding_bag`. A feature that a dict does not name has none.
    invalid : {"raise", "skip"}, or dict of feature to them
        As for `embedding_bag`. A feature that a dict does not name has "raise".

    Attributes
    ----------
    tables : dict of str to QuantizedTable or FloatTable
    features : dict of str to str
    modes, padding_idx, invalid : dict by feature
    dims : dict of feature to int
    dim : int
        Their sum: columns of the output.
    columns : dict of feature to slice
        Of the output.
    dtype
        As given.
    nbytes : int
        Of all tables; shared ones count once.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    A call gives the bits of one `embedding_bag` a feature, at any number of threads. Threads share the bags of all
    features by work; small calls stay on one.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> users = qembag.quantize(np.eye(4, 3, dtype=np.float32), bits=4)
    >>> collection = qembag.EmbeddingBagCollection(
    ...     {"users": users, "items": np.eye(2, dtype=np.float32)},
    ...     {"viewer": "users", "seller": "users", "item": "items"},
    ... )
    >>> collection([0, 1, 1, 2, 0, 1], lengths=[2, 0, 1, 1, 1, 1]).round(1)
    array([[1., 1., 0., 0., 1., 0., 1., 0.],
           [0., 0., 0., 0., 0., 1., 0., 1.]], dtype=float32)
    >>> bags = {"viewer": [[0, 1], [2, 3]], "seller": [[1], [1]], "item": ([0, 1, 1], [0, 1, 3])}
    >>> collection(bags, as_dict=True)["item"]
    array([[1., 0.],
           [0., 2.]], dtype=float32)
    """

    def __init__(
        self,
        tables: Mapping[str, QuantizedTable | FloatTable | NDArray[Any]] | Sequence[Any],
        features: Mapping[str, str] | None = None,
        *,
        mode: str | Mapping[str, str] = "sum",
        dtype: DTypeLike | None = None,
        padding_idx: int | Mapping[str, int | None] | None = None,
        invalid: str | Mapping[str, str] = "raise",
    ) -> None:
        super().__init__(tables, features, dtype, invalid)
        self._modes = by_feature(mode, "mode", self._features, "sum")
        self._padding_idx = by_feature(padding_idx, "padding_idx", self._features, None)
        self._compile(self._modes, self._padding_idx)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "mode": self._modes, "padding_idx": self._padding_idx}

    @property
    def modes(self) -> dict[str, str]:
        return dict(self._modes)

    @property
    def padding_idx(self) -> dict[str, int | None]:
        return dict(self._padding_idx)

    @property
    def dim(self) -> int:
        return self._handle.dim

    @property
    def columns(self) -> dict[str, slice]:
        return dict(self._columns)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        features: Mapping[str, str] | None = None,
        *,
        mode: str | Mapping[str, str] | None = None,
        dtype: DTypeLike | None = None,
        padding_idx: int | Mapping[str, int | None] | None = None,
        invalid: str | Mapping[str, str] | None = None,
        names: str | list[str] | tuple[str, ...] | None = None,
        mmap: bool = True,
    ) -> Self:
        """A collection of the tables of a file: one that `save` wrote, or any that `load_tables` reads.

        Parameters
        ----------
        path : str or path
            The file; see `load_tables`. If its tables need `bits` or `dims`, load them with that, and give them to the
            class.
        features : dict of str to str, optional
            The table of each feature. If not given, the file's; one a table where it has none.
        mode, dtype, padding_idx, invalid
            As for the class. What is not given is the file's: for features that it has, of the same table. In a dict,
            features that are not given keep the file's.
        names, mmap
            As for `load_tables`; with `names`, the file's features of these tables.

        Raises
        ------
        TypeError, ValueError, OSError, ImportError
            As for the class, and for `load_tables`; ValueError also if the file's features are not as
            ``docs/format.md`` says.

        Examples
        --------
        >>> import numpy as np, qembag, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/model.safetensors"
        >>> words = qembag.quantize(np.eye(4, dtype=np.float32), bits=4)
        >>> qembag.EmbeddingBagCollection({"words": words}, {"title": "words", "text": "words"}, mode="mean").save(path)
        >>> collection = qembag.EmbeddingBagCollection.from_file(path, mode={"title": "sum"})
        >>> collection.features, collection.modes
        ({'title': 'words', 'text': 'words'}, {'title': 'sum', 'text': 'mean'})
        >>> del collection; folder.cleanup()
        """
        from .interop.collection_file import open_collection

        options = {"mode": mode, "dtype": dtype, "padding_idx": padding_idx, "invalid": invalid}
        return open_collection(cls, path, features, options, names, mmap)

    def split(self, output: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The columns of each feature: views of an output.

        Parameters
        ----------
        output : ndarray of shape (batch, dim)
            What a call has returned.

        Returns
        -------
        dict of feature to ndarray of shape (batch, dims[feature])

        Raises
        ------
        TypeError, ValueError
            If it is no such array.

        Examples
        --------
        >>> import numpy as np, qembag
        >>> collection = qembag.EmbeddingBagCollection({"a": np.eye(2, dtype=np.float32), "b": np.ones((2, 1), "f4")})
        >>> {name: part.shape for name, part in collection.split(collection([0, 1], [0, 1, 2])).items()}
        {'a': (1, 2), 'b': (1, 1)}
        """
        if not isinstance(output, np.ndarray):
            raise TypeError(f"output must be an array, got {_errors.kind_of(output)}")
        if output.ndim != 2 or output.shape[1] != self.dim:
            raise ValueError(f"output must have shape (batch, {self.dim}), got {_errors.kind_of(output)}")
        return self._columns_of(output)

    def _columns_of(self, output: Any) -> dict[str, Any]:
        return {feature: output[:, columns] for feature, columns in self._columns.items()}

    def __call__(
        self,
        indices: Any,
        offsets: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        per_sample_weights: Any = None,
        out: Any = None,
        as_dict: bool = False,
        num_threads: int | None = None,
    ) -> Any:
        """The bags of all features.

        Parameters
        ----------
        indices : array_like of integers, 1-D; or dict by feature; or a table of columns
            Either the indices of one feature after the other, with `offsets` or `lengths`. Or for each feature a tuple
            ``(indices, offsets)``, with the last bag's end; an array whose rows are bags; a column of lists (Arrow); or
            a sparse matrix (SciPy's CSR, whose values are weights). A table of Arrow's or a data frame has such
            columns, and may have others. TorchRec's KeyedJaggedTensor is taken by its keys.
        offsets : array_like of integers, 1-D, optional
            ``num_features * batch + 1`` of them: bag b of feature f is
            ``indices[offsets[f * batch + b]:offsets[f * batch + b + 1]]``.
        lengths : array_like of integers, 1-D or (num_features, batch), optional
            In place of `offsets`.
        per_sample_weights : array_like of floats, or dict of feature to them, optional
            As `indices` are given.
        out : ndarray of shape (batch, dim), or dict of feature to ndarray of shape (batch, dims[feature]), optional
            Where to put the result, as for `embedding_bag`. The arrays of a dict share no memory.
        as_dict : bool
            Whether to return a dict of the features' columns, as `split` makes it.
        num_threads : int, optional
            For this call; see `set_num_threads`.

        Returns
        -------
        ndarray of shape (batch, dim), or dict of feature to ndarray of shape (batch, dims[feature])
            `out`, where it is given.

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `embedding_bag`. The error names the feature.
        """
        as_dict = as_dict is not False and _arguments.flag(as_dict, "as_dict")
        result = _handle.look_up_collection(
            self._handle, indices, offsets, lengths, per_sample_weights, out, self._out_dtype, num_threads
        )
        if result is None and _batches.is_jagged(indices):
            indices, per_sample_weights = _batches.arrays_of_jagged(self._features, indices, per_sample_weights)
            result = _handle.look_up_collection(
                self._handle, indices, offsets, lengths, per_sample_weights, out, self._out_dtype, num_threads
            )
        if result is None or type(result) is tuple:
            result = _slow_collection.look_up_bags(
                self._described, indices, offsets, lengths, per_sample_weights, out, self._out_dtype, num_threads
            )
        if self._bits_of is not None and out is None:
            result = result.view(self._bits_of)
        if as_dict and not isinstance(out, Mapping):
            return self._columns_of(result)
        return result


class EmbeddingCollection(_Collection):
    """Tables looked up together, without pooling: the rows of all features.

    Parameters
    ----------
    tables, features, dtype, invalid
        As for `EmbeddingBagCollection`.

    Attributes
    ----------
    tables, features, invalid, dims, dtype, nbytes
        As of `EmbeddingBagCollection`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> collection = qembag.EmbeddingCollection({"words": np.eye(3, dtype=np.float32), "tags": np.ones((2, 1), "f4")})
    >>> rows = collection({"words": [[0, 2], [1, 1]], "tags": [1]})
    >>> rows["words"].shape, rows["tags"]
    ((2, 2, 3), array([[1.]], dtype=float32))
    """

    def __init__(
        self,
        tables: Mapping[str, QuantizedTable | FloatTable | NDArray[Any]] | Sequence[Any],
        features: Mapping[str, str] | None = None,
        *,
        dtype: DTypeLike | None = None,
        invalid: str | Mapping[str, str] = "raise",
    ) -> None:
        super().__init__(tables, features, dtype, invalid)
        self._compile(
            by_feature("sum", "mode", self._features, None), by_feature(None, "padding_idx", self._features, None)
        )

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        features: Mapping[str, str] | None = None,
        *,
        dtype: DTypeLike | None = None,
        invalid: str | Mapping[str, str] | None = None,
        names: str | list[str] | tuple[str, ...] | None = None,
        mmap: bool = True,
    ) -> Self:
        """A collection of the tables of a file: see `EmbeddingBagCollection.from_file`. Modes in it are ignored."""
        from .interop.collection_file import open_collection

        return open_collection(cls, path, features, {"dtype": dtype, "invalid": invalid}, names, mmap)

    def __call__(
        self,
        indices: Any,
        offsets: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        out: Any = None,
        num_threads: int | None = None,
    ) -> Any:
        """The rows of all features.

        Parameters
        ----------
        indices, offsets, lengths
            As for `EmbeddingBagCollection`; an array in a dict may have any shape.
        out : dict of feature to ndarray, optional
            Where to put the result; the arrays share no memory.
        num_threads : int, optional
            For this call; see `set_num_threads`.

        Returns
        -------
        dict of feature to ndarray
            Of shape ``(number of the feature's indices, dim)``, and ``indices.shape + (dim,)`` for an array in a dict.
            `out`, where it is given.

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `embedding`. The error names the feature.
        """
        result = _handle.look_up_collection_rows(
            self._handle, indices, offsets, lengths, out, self._out_dtype, num_threads
        )
        if result is None or type(result) is tuple:
            result = _slow_collection.look_up_rows(
                self._described, indices, offsets, lengths, out, self._out_dtype, num_threads
            )
        if self._bits_of is not None and out is None:
            result = {feature: rows.view(self._bits_of) for feature, rows in result.items()}
        return result
