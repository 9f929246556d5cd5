"""Batches as callers hold them, made into bags: of one table or of many, in NumPy's arrays or in other libraries'.

As in `_slow`, an argument is converted once, and what is found in it is an array of ours from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arguments, _errors

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from numpy.typing import NDArray

    from . import _handle


class Bags(NamedTuple):
    """Some bags of a batch, one after the other. A column of several chunks has several of these."""

    indices: NDArray[Any]
    """Integers: 1-D; or 2-D, of which each row is a bag."""
    offsets: NDArray[Any] | None
    """int32 or int64, one more than bags: where each starts, and where the last ends. None for 2-D indices."""
    weights: NDArray[Any] | None = None
    """float32 or float16, of the shape of `indices`."""

    @property
    def num_bags(self) -> int:
        return len(self.indices) if self.offsets is None else len(self.offsets) - 1


def bags_of(value: object, name: str) -> list[Bags] | None:
    """The bags of a column or of a matrix; None for anything else, which NumPy may make an array of.

    Told apart by what objects have: no package is imported that is not there already, but the one that reads them.
    """
    if is_arrow(value):
        from .interop import arrow

        return arrow.bags_of(value, name)
    if hasattr(value, "indptr") and getattr(value, "format", None) == "csr":
        from .interop import csr

        return csr.bags_of(value, name)
    if hasattr(value, "tocsr"):
        raise TypeError(f"{name} must be in CSR format as a sparse matrix, got {type(value).__name__}: call .tocsr()")
    return None


def is_arrow(value: object) -> bool:
    """Whether it has Arrow's C interface; or is pandas', which before 3.0 a column of Arrow's memory does not have."""
    if hasattr(value, "__arrow_c_array__") or hasattr(value, "__arrow_c_stream__"):
        return True
    return str(type(value).__module__).startswith("pandas.") and hasattr(getattr(value, "dtype", None), "pyarrow_dtype")


# ---- Many features -----------------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """One feature of a collection: a table, and how its bags are looked up. Checked."""

    name: str | None
    """None for the only table of a lookup."""
    handle: _handle.TableHandle
    mode: int
    padding_idx: int
    skips_invalid: bool


class Part(NamedTuple):
    """Some bags of one feature, and how an error finds them in what the caller has."""

    feature: Feature
    bags: Bags
    name: str
    """Of the indices."""
    first_bag: int = 0
    first_offset: int = 0
    first_index: int = 0
    is_column: bool = False
    """Or a matrix: there a position is told by its bag."""

    @property
    def num_bags(self) -> int:
        """Or rows, where 1-D indices have no offsets."""
        return self.bags.num_bags

    def asked(self) -> _errors.Asked:
        handle, bags = self.feature.handle, self.bags
        return _errors.Asked(
            len(handle.rows),
            handle.num_embeddings,
            bags.indices,
            bags.offsets,
            num_indices=bags.indices.size,
            name=self.name,
            has_bags=bags.offsets is not None or bags.indices.ndim == 2,
            feature=self.feature.name if self.name == "indices" else None,
            offsets_name=self._offsets_name(),
            is_column=self.is_column,
            first_bag=self.first_bag,
            first_offset=self.first_offset,
            first_index=self.first_index,
        )

    def _offsets_name(self) -> str:
        if self.is_column:
            return f"{self.name}.{'offsets' if self.bags.weights is None else 'indptr'}"
        return "offsets" if self.name == "indices" else f"offsets[{self.feature.name!r}]"


class Batch(NamedTuple):
    """What a call looks up."""

    parts: list[Part]
    size: int
    """Bags of each feature."""
    lengths: NDArray[Any] | None = None
    """As the caller gave them, if so."""


def batch_of(features: Sequence[Feature], indices: object, offsets: object, lengths: object, weights: object) -> Batch:
    names = [feature.name for feature in features]
    given = _columns(names, indices, offsets is not None or lengths is not None)
    if given is None:
        return _of_arrays(features, indices, offsets, lengths, weights)
    refuse(offsets, "offsets", "where indices are given by feature")
    refuse(lengths, "lengths", "where indices are given by feature")
    if weights is None:
        own: dict[Any, Any] = {}
    elif isinstance(weights, Mapping):
        own = known(names, weights, "per_sample_weights")
    else:
        kind = _errors.kind_of(weights)
        raise TypeError(f"per_sample_weights must be a dict by feature where indices are, got {kind}")
    parts: list[Part] = []
    size = 0
    for number, feature in enumerate(features):
        some = _of_feature(feature, given[feature.name], own.get(feature.name))
        count = sum(part.bags.num_bags for part in some)
        if number > 0 and count != size:
            raise ValueError(f"{_of(feature)} must have as many bags as the features before it, {size}, got {count}")
        size = count
        parts += some
    return Batch(parts, size)


def refuse(value: object, name: str, where: str) -> None:
    if value is not None:
        raise ValueError(f"{name} must be None {where}, got {_errors.kind_of(value)}")


def _of(feature: Feature) -> str:
    return f"indices[{feature.name!r}]"


def _columns(names: Sequence[str | None], indices: object, has_ends: bool) -> Mapping[Any, Any] | None:
    """What is given by feature; None for an array of all features' indices."""
    if isinstance(indices, Mapping):
        given = known(names, indices, "indices")
    elif is_arrow(indices) and not has_ends:  # with them, a column of integers is an array like others
        from .interop import arrow

        found = arrow.columns_of(indices, "indices", [name for name in names if name is not None])
        given = {name: _Found(bags) for name, bags in found.items()}
    elif is_jagged(indices):
        given = _of_jagged(names, indices)
    else:
        return None
    for name in names:
        if name not in given:
            raise ValueError(f"indices must hold each feature, got none for {_errors.shown(name)}")
    return given


def known(names: Container[str | None], given: Mapping[Any, Any], name: str) -> dict[Any, Any]:
    """A caller's dict, which may hold features only. A data frame may have other columns."""
    values = dict(given)
    for key in values:
        if key not in names:
            raise ValueError(f"{name} must hold features of the collection only, got {_errors.shown(key)}")
    return values


def is_jagged(value: object) -> bool:
    """Whether it is TorchRec's KeyedJaggedTensor: told by what it has."""
    return not isinstance(value, (np.ndarray, Mapping)) and all(
        hasattr(value, name) for name in ("keys", "values", "offsets")
    )


def arrays_of_jagged(names: Iterable[str], jagged: Any, weights: object) -> tuple[dict[str, Any], Any]:
    """A KeyedJaggedTensor as a dict of indices and offsets by feature, and one of weights: what the loops know."""
    refuse(weights, "per_sample_weights", "with a KeyedJaggedTensor, which has its own")
    found = {name: bags for name, [bags] in _of_jagged(list(names), jagged).items()}
    own = {name: bags.weights for name, bags in found.items() if bags.weights is not None}
    return {name: (bags.indices, bags.offsets) for name, bags in found.items()}, own or None


def _of_jagged(names: Sequence[str | None], jagged: Any) -> dict[Any, list[Bags]]:
    """By feature, of TorchRec's KeyedJaggedTensor, which may have other keys."""
    keys = list(jagged.keys())
    if len(set(keys)) < len(keys):
        raise ValueError(f"indices must have each key once, got {_errors.shown(keys)}")
    if hasattr(jagged, "variable_stride_per_key") and jagged.variable_stride_per_key():
        raise ValueError("indices must have one batch size, got a KeyedJaggedTensor with one a key")
    values, ends = _arguments.bag_indices(jagged.values()), _arguments.integers(jagged.offsets(), "offsets")
    if len(keys) == 0 or ends.ndim != 1 or (len(ends) - 1) % len(keys):
        raise ValueError(f"indices must have offsets for each of {len(keys)} keys, got {_errors.kind_of(ends)}")
    weights = jagged.weights_or_none() if hasattr(jagged, "weights_or_none") else None
    if weights is not None:
        weights = _arguments.as_array(weights, "per_sample_weights")
    size = (len(ends) - 1) // len(keys)
    by_key = {
        key: [Bags(values, ends[number * size : (number + 1) * size + 1], weights)] for number, key in enumerate(keys)
    }
    used = {name: key_of(name, by_key) for name in names if name is not None}
    return {name: by_key[key] for name, key in used.items() if key in by_key}


def key_of(feature: str, keys: Container[str]) -> str:
    """The key that a feature has in a KeyedJaggedTensor.

    TorchRec's collections call those of a feature "f" that looks up in two tables "f@t1" and "f@t2".
    """
    return feature if feature in keys else feature.rpartition("@")[0]


def _of_arrays(
    features: Sequence[Feature], indices: object, offsets: object, lengths: object, weights: object
) -> Batch:
    """Of the indices of one feature after the other, in one array."""
    given = _arguments.bag_indices(indices)
    if given.ndim != 1:
        kind = _errors.kind_of(given)
        raise ValueError(f"indices must have 1 dimension, for all features, or be given by feature, got {kind}")
    counts, ends = _ends(given, offsets, lengths, len(features))
    size, rest = divmod(len(ends) - 1, len(features))
    if rest:
        what = "offsets" if counts is None else "lengths"
        least = "one and a multiple of" if counts is None else "a multiple of"
        number = len(ends) if counts is None else counts.size
        raise ValueError(f"{what} must be {least} {len(features)}, the number of features, got {number} of them")
    # A max takes no weights, whichever feature's it is.
    mode = max((feature.mode for feature in features), key=lambda mode: mode == _arguments.MODES["max"])
    own = _arguments.weights(weights, given, mode, allow_double=True)
    parts = [
        Part(feature, Bags(given, ends[start : start + size + 1], own), "indices", first_offset=start)
        for feature, start in ((feature, number * size) for number, feature in enumerate(features))
    ]
    return Batch(parts, size, counts)


def _ends(
    indices: NDArray[Any], offsets: object, lengths: object, num_features: int
) -> tuple[NDArray[Any] | None, NDArray[Any]]:
    """The lengths as they came, and the offsets of all bags and the last one's end."""
    if lengths is None:
        ends = _arguments.offsets(offsets, indices, True)
        assert ends is not None  # indices have one dimension
        return None, ends
    refuse(offsets, "offsets", "with lengths")
    counts = _arguments.integers(lengths, "lengths")
    if counts.ndim == 2 and len(counts) != num_features:
        kind = _errors.kind_of(counts)
        raise ValueError(f"lengths must have shape ({num_features}, batch), a row for each feature, got {kind}")
    flat = counts.reshape(-1) if counts.ndim == 2 else counts
    return counts, _arguments.ends_of_lengths(_arguments.lengths(flat, indices), indices)


def _of_feature(feature: Feature, value: object, weights: object) -> list[Part]:
    """The bags of one feature, whatever they come as."""
    spot = _of(feature)
    batch = _batch_in(value, spot)
    if batch is not None:
        refuse(weights, f"per_sample_weights[{feature.name!r}]", "for a column or a matrix")
        return parts_of_batch(feature, batch, spot)
    offsets = None
    if isinstance(value, tuple) and len(value) == 2:
        value, offsets = value
    given = named(spot, _arguments.bag_indices, value)
    if given.ndim == 1 and offsets is None:
        kind = _errors.kind_of(given)
        raise ValueError(f"{spot} must be a tuple (indices, offsets) or an array of 2 dimensions, got {kind}")
    ends = named(spot, _arguments.offsets, offsets, given, True)
    own = named(f"per_sample_weights[{feature.name!r}]", _weights, weights, given, feature.mode)
    return [Part(feature, Bags(given, ends, own), spot)]


def _batch_in(value: object, spot: str) -> list[Bags] | None:
    """Of a column or a matrix, or what has been found in one."""
    if isinstance(value, _Found) or (isinstance(value, list) and len(value) > 0 and isinstance(value[0], Bags)):
        return value
    return bags_of(value, spot)


class _Found(list[Bags]):
    """What a table's column holds, perhaps nothing: an empty list of a caller's is no column."""


def _weights(value: object, indices: NDArray[Any], mode: int) -> NDArray[Any] | None:
    return _arguments.weights(value, indices, mode, allow_double=True)


def check_mode(batch: Sequence[Bags], mode: int) -> None:
    """Maxima take no weights, and a matrix's values are weights."""
    if mode == _arguments.MODES["max"] and any(bags.weights is not None for bags in batch):
        raise ValueError(
            "mode must not be 'max' for a sparse matrix, whose data are weights: for maxima without them pass "
            "matrix.indices, offsets=matrix.indptr and include_last_offset=True"
        )


def parts_of_batch(feature: Feature, batch: Sequence[Bags], name: str) -> list[Part]:
    """Of a column or a matrix, piece by piece."""
    if feature.name is None:
        check_mode(batch, feature.mode)
    else:
        named(name, check_mode, batch, feature.mode)
    first, parts = 0, []
    for bags in batch:
        if bags.weights is not None:
            named(name, _weights, bags.weights, bags.indices, feature.mode)
        parts.append(Part(feature, bags, name, first_bag=first, is_column=True))
        first += bags.num_bags
    return parts


def named(spot: str, check: Callable[..., Any], *arguments: Any) -> Any:
    """What a check gives; its error says which feature it is about."""
    try:
        return check(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{spot}: {error}") from error


# ---- Rows without pooling ----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What a call looks up row by row: each part's indices have 1 dimension and no offsets."""

    parts: list[Part]
    shapes: dict[str, tuple[int, ...]]
    """Of each feature's indices, as the output has it."""
    lengths: NDArray[Any] | None = None


def rows_of(features: Sequence[Feature], indices: object, offsets: object, lengths: object) -> Rows:
    names = [feature.name for feature in features]
    given = _columns(names, indices, offsets is not None or lengths is not None)
    if given is None:
        batch = _of_arrays(features, indices, offsets, lengths, None)
        parts = [_unpooled(part, 0) for part in batch.parts]
        shapes: dict[Any, tuple[int, ...]] = {part.feature.name: (part.num_bags,) for part in parts}
        return Rows(parts, shapes, batch.lengths)
    refuse(offsets, "offsets", "where indices are given by feature")
    refuse(lengths, "lengths", "where indices are given by feature")
    parts, shapes = [], {}
    for feature in features:
        value, spot = given[feature.name], _of(feature)
        batch_of_one = _batch_in(value, spot)
        if batch_of_one is None and not isinstance(value, tuple):
            array = named(spot, _arguments.integers, value, "indices")
            parts.append(Part(feature, Bags(array.reshape(-1), None), spot))
            shapes[feature.name] = array.shape
            continue
        count = 0
        for part in _of_feature(feature, value if batch_of_one is None else batch_of_one, None):
            parts.append(_unpooled(part, count))
            count += parts[-1].num_bags
        shapes[feature.name] = (count,)
    return Rows(parts, shapes)


def _unpooled(part: Part, first: int) -> Part:
    """The indices of some bags, each for itself, of which `first` have come before."""
    indices, offsets, weights = part.bags
    if weights is not None:
        raise ValueError(f"{part.name} must have no weights where rows are not pooled, got a matrix")
    start = 0
    if offsets is not None:
        ends = _arguments.plain_integers(offsets).copy()  # which nobody else writes to
        wrong = np.flatnonzero((ends < np.append(0, ends[:-1])) | (ends > np.int64(indices.size)))
        if len(wrong):
            fault = ("offsets", int(wrong[0]), 0, int(ends[wrong[0]]), 0, 0)
            raise _errors.of_fault(fault, part.asked())
        start = int(ends[0]) if len(ends) else 0
        indices = indices[start : int(ends[-1]) if len(ends) else 0]
    return Part(part.feature, Bags(indices.reshape(-1), None), part.name, first_bag=first, first_index=start)
