"""Many tables looked up in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import _arguments, _errors
from .base import Table
from .float_table import FloatTable
from .lookup import embedding, embedding_bag

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike, DTypeLike, NDArray

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
        self._tables = _tables(tables)
        self._features = _features(features, self._tables)
        _arguments.out_type(dtype, None)
        self._dtype = dtype
        self._invalid = by_feature(invalid, "invalid", self._features, "raise")
        for value in self._invalid.values():
            _arguments.skips_invalid(value)

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


def _tables(value: Any) -> dict[str, QuantizedTable | FloatTable]:
    if isinstance(value, Mapping):
        named = dict(value)
    elif isinstance(value, (list, tuple)):
        named = {str(number): table for number, table in enumerate(value)}
    else:
        raise TypeError(f"tables must be a dict or a list of tables, got {_errors.kind_of(value)}")
    tables: dict[str, Any] = {}
    for name, table in named.items():
        if not isinstance(name, str):
            raise TypeError(f"tables must have strings as names, got {_errors.kind_of(name)}")
        if isinstance(table, Table):
            tables[name] = table
        elif isinstance(table, np.ndarray):
            tables[name] = FloatTable(table)
        else:
            raise TypeError(f"tables[{name!r}] must be a table or an array of floats, got {_errors.kind_of(table)}")
    if not tables:
        raise ValueError("tables must hold a table, got none")
    return tables


def _features(value: Any, tables: Mapping[str, Any]) -> dict[str, str]:
    if value is None:
        return {name: name for name in tables}
    if not isinstance(value, Mapping):
        raise TypeError(f"features must be a dict of feature to table, got {_errors.kind_of(value)}")
    features: dict[str, str] = {}
    for feature, name in dict(value).items():
        if not isinstance(feature, str):
            raise TypeError(f"features must have strings as names, got {_errors.kind_of(feature)}")
        if not isinstance(name, str) or name not in tables:
            raise ValueError(f"features[{feature!r}] must be the name of a table, got {_errors.shown(name)}")
        features[feature] = name
    if not features:
        raise ValueError("features must hold a feature, got none")
    return features


def by_feature(value: Any, name: str, features: Mapping[str, str], default: Any) -> dict[str, Any]:
    """An option for each feature: one value for all, or a dict; where it has none, the default."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(features, value)
    given = dict(value)
    for feature in given:
        if feature not in features:
            raise ValueError(f"{name} must name features of the collection, got {_errors.shown(feature)}")
    return {feature: given.get(feature, default) for feature in features}


class EmbeddingBagCollection(_Collection):
    """Tables looked up together: one call gives the bags of all features."""

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
        for feature, name in self._features.items():
            _arguments.mode(self._modes[feature])
            _arguments.padding_number(self._padding_idx[feature], self._tables[name].num_embeddings)

    @property
    def modes(self) -> dict[str, str]:
        return dict(self._modes)

    @property
    def padding_idx(self) -> dict[str, int | None]:
        return dict(self._padding_idx)

    @property
    def dim(self) -> int:
        return sum(self.dims.values())

    @property
    def columns(self) -> dict[str, slice]:
        columns, start = {}, 0
        for feature, dim in self.dims.items():
            columns[feature] = slice(start, start + dim)
            start += dim
        return columns

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
            The file; see `load_tables`.
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
        return {feature: output[:, columns] for feature, columns in self.columns.items()}

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
        results = {}
        number = len(self._features)
        if not isinstance(indices, Mapping):
            indices = np.asarray(indices)
            ends = (
                np.asarray(offsets)
                if lengths is None
                else np.concatenate([[0], np.cumsum(np.asarray(lengths).reshape(-1))])
            )
            batch = (len(ends) - 1) // number
            values = {
                feature: (indices, ends[k * batch : (k + 1) * batch + 1]) for k, feature in enumerate(self._features)
            }
            weights = dict.fromkeys(self._features, per_sample_weights)
        else:
            values, weights = dict(indices), dict(per_sample_weights or {})
        for feature, name in self._features.items():
            value = values[feature]
            ends = None
            if isinstance(value, tuple):
                value, ends = value
            results[feature] = embedding_bag(
                self._tables[name],
                value,
                ends,
                include_last_offset=ends is not None,
                mode=self._modes[feature],
                per_sample_weights=weights.get(feature),
                padding_idx=self._padding_idx[feature],
                invalid=self._invalid[feature],
                dtype=self._dtype,
                num_threads=num_threads,
            )
        if isinstance(out, Mapping):
            for feature, result in results.items():
                out[feature][...] = result
            return out
        output = np.concatenate(list(results.values()), axis=1, out=out)
        return self.split(output) if as_dict else output


class EmbeddingCollection(_Collection):
    """Tables looked up together, without pooling: the rows of all features."""

    def __init__(
        self,
        tables: Mapping[str, QuantizedTable | FloatTable | NDArray[Any]] | Sequence[Any],
        features: Mapping[str, str] | None = None,
        *,
        dtype: DTypeLike | None = None,
        invalid: str | Mapping[str, str] = "raise",
    ) -> None:
        super().__init__(tables, features, dtype, invalid)

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
        number = len(self._features)
        if not isinstance(indices, Mapping):
            indices = np.asarray(indices)
            ends = (
                np.asarray(offsets)
                if lengths is None
                else np.concatenate([[0], np.cumsum(np.asarray(lengths).reshape(-1))])
            )
            batch = (len(ends) - 1) // number
            indices = {
                feature: indices[ends[k * batch] : ends[(k + 1) * batch]] for k, feature in enumerate(self._features)
            }
        return {
            feature: embedding(
                self._tables[name],
                indices[feature][0] if isinstance(indices[feature], tuple) else indices[feature],
                invalid=self._invalid[feature],
                dtype=self._dtype,
                num_threads=num_threads,
                out=None if out is None else out[feature],
            )
            for feature, name in self._features.items()
        }
