"""JSON bodies as the bags of each feature, and vectors as JSON."""

from __future__ import annotations

import contextlib
import gc
import json
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import _batches, _errors
from .serve_limits import check_bags, check_indices

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from numpy.typing import NDArray

    from .serve_limits import Limits

KEYS = {"indices", "per_sample_weights"}
MINUS_ZERO = np.uint32(0x8000_0000)


class Given(NamedTuple):
    """What a collection is called with."""

    indices: dict[str, Any]
    """Tuples of indices and offsets: arrays, or as they came, for the library to refuse."""
    weights: dict[str, Any] | None


# ---- Requests --------------------------------------------------------------------------------------------------------


def bags_in(body: bytes, features: Container[str], limits: Limits) -> Given:
    """What a body holds for these features.

    Raises
    ------
    ValueError, TypeError
        If it is no such body.
    Refused
        If it has more than the limits allow.
    """
    try:
        with _no_collections():
            found = json.loads(body, object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # of UTF-8 and of integers of thousands of digits too
        raise ValueError(f"a body must be JSON: {error}") from None
    if type(found) is not dict or "indices" not in found or not found.keys() <= KEYS:
        kind = f"keys {_errors.shown(sorted(found))}" if type(found) is dict else _kind(found)
        raise ValueError(f"a body must be an object of indices and, if need be, per_sample_weights, got {kind}")
    indices, ends, count = {}, {}, 0
    for name, bags in _by_feature(found["indices"], "indices", features).items():
        spot = f"indices[{name!r}]"
        ends[name] = _ends(bags, spot, limits)
        count += ends[name][-1]
        check_indices(count, limits)
        indices[name] = _integers(bags, spot), np.array(ends[name], np.int64)
    given = found.get("per_sample_weights")
    if given is None:
        return Given(indices, None)
    weights = {}
    for name, bags in _by_feature(given, "per_sample_weights", features).items():
        spot = f"per_sample_weights[{name!r}]"
        if name in ends and _ends(bags, spot, limits) != ends[name]:
            raise ValueError(f"{spot} must have as many weights a bag as indices[{name!r}] has indices")
        weights[name] = _numbers(bags, spot) if name in ends else bags
    return Given(indices, weights)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without garbage collections. A million lists make many, which find nothing and take three times the reading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _by_feature(value: Any, name: str, features: Container[str]) -> dict[str, Any]:
    if type(value) is not dict:
        raise TypeError(f"{name} must be an object by feature, got {_kind(value)}")
    # Before any is read: a body has room for a hundred thousand others.
    return _batches.known(features, value, name)


def _ends(bags: Any, spot: str, limits: Limits) -> list[int]:
    """Where the first bag begins, and where each ends."""
    if type(bags) is not list:
        raise TypeError(f"{spot} must be a list of bags, got {_kind(bags)}")
    check_bags(len(bags), limits)
    if not set(map(type, bags)) <= {list}:
        place = next(place for place, bag in enumerate(bags) if type(bag) is not list)
        raise TypeError(f"{spot}[{place}] must be a list, got {_kind(bags[place])}")
    return list(accumulate(map(len, bags), initial=0))


def _integers(bags: Sequence[list[Any]], spot: str) -> Any:
    flat = list(chain.from_iterable(bags))
    if set(map(type, flat)) <= {int}:
        try:
            return np.array(flat, np.int64)
        except OverflowError:
            return flat  # the library refuses it
    place, value = _first_other(bags, (int,))
    raise TypeError(f"{spot}{place} must be an integer, got {_kind(value)}")


def _numbers(bags: Sequence[list[Any]], spot: str) -> Any:
    flat = list(chain.from_iterable(bags))
    if not set(map(type, flat)) <= {int, float}:
        place, value = _first_other(bags, (int, float))
        raise TypeError(f"{spot}{place} must be a number, got {_kind(value)}")
    try:
        return np.array(flat, np.float64)
    except OverflowError:
        raise ValueError(f"{spot} must be numbers of float32, got a greater integer") from None


def _first_other(bags: Sequence[list[Any]], kinds: tuple[type, ...]) -> tuple[str, Any]:
    """Where the first value is that is of none of these types."""
    return next(
        (f"[{number}][{place}]", value)
        for number, bag in enumerate(bags)
        for place, value in enumerate(bag)
        if type(value) not in kinds
    )


def _kind(value: Any) -> str:
    """What a value is to who wrote the JSON."""
    if value is None or type(value) is bool:
        return json.dumps(value)
    if type(value) in (int, float, str):
        return _errors.shown(value)
    return "an object" if type(value) is dict else "a list"


# ---- Answers ---------------------------------------------------------------------------------------------------------


def text_of(vectors: NDArray[Any]) -> bytes:
    """Vectors as JSON: each number has the digits that float32 needs; null stands for NaN and infinities."""
    flat = vectors.astype(np.float32, copy=False).reshape(-1)
    texts = pa.array(flat).cast(pa.string())
    wrong = ~np.isfinite(flat)
    if wrong.any():
        texts = pc.if_else(pa.array(wrong), "null", texts)
    minus = flat.view(np.uint32) == MINUS_ZERO
    if minus.any():  # readers take -0 for the integer 0
        texts = pc.if_else(pa.array(minus), "-0.0", texts)
    offsets = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * np.int32(vectors.shape[1]))
    rows = pc.binary_join(pa.ListArray.from_arrays(offsets, texts), ",").to_pylist()
    return f'{{"vectors":[{",".join(f"[{row}]" for row in rows)}]}}'.encode()
