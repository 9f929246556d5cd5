"""The texts of errors: what an argument must be, and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .layout import RowLayout

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
# What is wrong: the argument, the position in it, the bag, the value, the position in the indices.
Fault: TypeAlias = tuple[str, int, int, int, int]

INT64_MAX = np.iinfo(np.int64).max
# Characters of a value that an error shows.
MAX_SHOWN = 100


def kind_of(value: object) -> str:
    """What came, for an error: an array's type and shape, or any other value's type."""
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
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


def of_fault(
    fault: Fault,
    *,
    indices: Array | None,
    offsets: Array | None,
    num_indices: int,
    num_rows: int,
    num_embeddings: int,
    bags: bool,
    name: str = "indices",
) -> Exception:
    """The error for what a lookup found. `indices` and `offsets` are the caller's, for values beyond int64; no
    `indices` are all rows."""
    where, position, bag, value, index_position = fault
    if where == "offsets":
        value = _as_it_came(offsets, (position,), value)
        if 0 <= value <= num_indices:
            return ValueError(f"offsets[{position}] is {value}: must not be below the offset before it")
        return ValueError(f"offsets[{position}] is {value}: must be from 0 to {num_indices}, the number of indices")
    place = (index_position,) if indices is None else _place(index_position, indices.shape)
    spot = f"{name}[{', '.join(map(str, place))}]" if place else name
    in_bag = f"bag {bag}" if bags else ""
    if where == "indices":
        value = _as_it_came(indices, place, value)
        holder = f"table of {num_rows} rows" if num_embeddings == num_rows else f"pruned table of {num_embeddings} rows"
        return IndexError(f"{spot} is {value}{f' ({in_bag})' if in_bag else ''}: out of range for a {holder}")
    if where == "compressed_indices_mapping":
        source = ", ".join(filter(None, [spot if place else "", in_bag]))
        return IndexError(bad_mapping(position, value, num_rows, f" ({source})" if source else ""))
    return RuntimeError(f"{name}, offsets or compressed_indices_mapping changed while they were being looked up")


def _place(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place: list[int] = []
    for length in reversed(shape):
        position, last = divmod(position, length)
        place.insert(0, last)
    return tuple(place)


def _as_it_came(array: Array | None, place: tuple[int, ...], value: int) -> int:
    return value if array is None or value != INT64_MAX else int(array[place])
