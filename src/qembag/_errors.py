"""The texts of errors: what an argument must be, and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .layout import RowLayout

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
# What is wrong: the argument, the position in it, the bag, the value, the position in the indices, and which of the
# lookups of the call.
Fault: TypeAlias = tuple[str, int, int, int, int, int]

INT64_MAX = np.iinfo(np.int64).max
# Characters of a value that an error shows.
MAX_SHOWN = 100
UNKNOWN = "an argument that was checked is not recognized by the compiled code; please report this"


def kind_of(value: object) -> str:
    """What came, for an error: an array's type and shape, or any other value's type."""
    if isinstance(value, np.ndarray):
        article = "an" if value.dtype.name[0] in "io" else "a"
        return f"{article} {value.dtype} array of shape {value.shape}"
    return f"{type(value).__name__} {shown(value)}" if isinstance(value, (int, float, str)) else type(value).__name__


def shown(value: object) -> str:
    """A value as an error shows it, cut short; Python refuses to write a number of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 3 * MAX_SHOWN:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# ---- Rows that are not quantized, or not converted -----------------------------------------------------------------


def of_row(
    what: str, row: int, group: int, layout: RowLayout, bounds: tuple[float, float], name: str = "weights"
) -> ValueError:
    low, high = bounds
    spot = f"{name}[{row}]{_in_group(group, layout)}"
    if what == "not finite":
        return ValueError(f"{spot} must be finite to be quantized, got a NaN or an infinity")
    return ValueError(
        f"{spot} must have a minimum and a scale that its row can hold as {layout.scale_dtype.name} at {layout.bits} "
        f"bits, got values from {low:g} to {high:g}"
    )


def _in_group(group: int, layout: RowLayout) -> str:
    if layout.num_groups == 1:
        return ""
    elements = layout.elements(group)
    return f" (group {group}, elements {elements.start} to {elements.stop - 1})"


def not_exact(row: int, group: int, part: int, value: float, layout: RowLayout) -> ValueError:
    return ValueError(
        f"scale_dtype must be float32 where float16 does not hold each scale and bias exactly, got row {row}"
        f"{_in_group(group, layout)} with a {('scale', 'bias')[part]} of {value:.9g}"
    )


def not_joined(row: int, groups: list[tuple[slice, Array]]) -> ValueError:
    (first, pair), (second, other) = groups
    return ValueError(
        f"group_size must not join groups whose scales or biases differ, got row {row} with scale {pair[0]:.9g} and "
        f"bias {pair[1]:.9g} for elements {first.start} to {first.stop - 1}, and scale {other[0]:.9g} and bias "
        f"{other[1]:.9g} for elements {second.start} to {second.stop - 1}"
    )


# ---- Faults that the loops find -------------------------------------------------------------------------------------


def bad_mapping(position: int, row: int, num_rows: int, source: str = "") -> str:
    return (
        f"compressed_indices_mapping[{position}] is {row}{source}: "
        f"must be -1 or the number of a row, in a table of {num_rows} rows"
    )


class Asked(NamedTuple):
    """A lookup, as far as an error tells of it."""

    num_rows: int
    num_embeddings: int
    indices: Array | None
    """The caller's, for values beyond int64. None: all rows."""
    offsets: Array | None
    num_indices: int
    name: str = "indices"
    offsets_name: str = "offsets"
    has_bags: bool = True
    feature: str | None = None
    """Of a collection."""
    is_column: bool = False
    """A column of lists, or a matrix: an index has a place in its list there."""
    first_bag: int = 0
    """Where these bags, offsets and indices begin in what the caller gave, if that holds more."""
    first_offset: int = 0
    first_index: int = 0


def of_fault(fault: Fault, asked: Asked) -> Exception:
    """The error for what a lookup found."""
    where, position, bag, value, index_position, _ = fault
    feature = "" if asked.feature is None else f"feature {asked.feature!r}"
    if where == "offsets":
        return _of_offset(position, value, asked, feature)
    if where == "changed":
        # The fault is gone again: no position is known, and there may be no index at all.
        changed = f"{asked.name}, offsets or compressed_indices_mapping changed"
        return RuntimeError(f"{changed} while they were being looked up")
    spot = _spot(index_position, bag, asked)
    in_bag = f"bag {asked.first_bag + bag}" if asked.has_bags and not asked.is_column else ""
    if where == "indices":
        if asked.indices is not None:
            value = _as_it_came(asked.indices, _place(index_position, asked.indices.shape), value)
        pruned = asked.num_embeddings != asked.num_rows
        holder = f"pruned table of {asked.num_embeddings} rows" if pruned else f"table of {asked.num_rows} rows"
        return IndexError(f"{spot} is {value}{_in_brackets(feature, in_bag)}: out of range for a {holder}")
    source = _in_brackets("" if spot == asked.name else spot, feature, in_bag)
    return IndexError(bad_mapping(position, value, asked.num_rows, source))


def _of_offset(position: int, value: int, asked: Asked, feature: str) -> ValueError:
    value = _as_it_came(asked.offsets, (position,), value)
    spot = f"{asked.offsets_name}[{asked.first_offset + position}] is {value}{_in_brackets(feature)}"
    if 0 <= value <= asked.num_indices:
        return ValueError(f"{spot}: must not be below the offset before it")
    return ValueError(f"{spot}: must be from 0 to {asked.num_indices}, the number of indices")


def _spot(index_position: int, bag: int, asked: Asked) -> str:
    """Where an index stands, as one writes it in Python."""
    if asked.is_column:
        if asked.offsets is not None:
            start = int(asked.offsets[bag])
        else:
            start = 0 if asked.indices is None else bag * asked.indices.shape[-1]
        return f"{asked.name}[{asked.first_bag + bag}][{index_position - start}]"
    place = (index_position,) if asked.indices is None else _place(index_position, asked.indices.shape)
    if len(place) == 1:
        place = (asked.first_index + place[0],)
    return f"{asked.name}[{', '.join(map(str, place))}]" if place else asked.name


def _in_brackets(*facts: str) -> str:
    told = ", ".join(filter(None, facts))
    return f" ({told})" if told else ""


def _place(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place: list[int] = []
    for length in reversed(shape):
        position, last = divmod(position, length)
        place.insert(0, last)
    return tuple(place)


def _as_it_came(array: Array | None, place: tuple[int, ...], value: int) -> int:
    return value if array is None or value != INT64_MAX else int(array[place])
