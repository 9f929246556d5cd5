"""What other libraries' rows can hold of a table: exactly, or with a loss that the caller allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments, _errors
from ..float_table import FloatTable
from ..layout import RowLayout
from ..quantize import quantize
from ..table import QuantizedTable, table_of

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

# Rows are requantized about this many elements at a time.
ELEMENTS_AT_ONCE = 1 << 20


def table_to_export(table: object, exact: object) -> tuple[QuantizedTable | FloatTable, bool]:
    """The arguments that exporters share, checked. Raises ValueError for row weights, which no target has."""
    if not isinstance(table, (QuantizedTable, FloatTable)):
        raise TypeError(f"table must be a QuantizedTable or a FloatTable, got {_errors.kind_of(table)}")
    is_exact = _arguments.flag(exact, "exact")
    if is_exact and table.row_weights is not None:
        raise ValueError(
            "table must have no row_weights, which would be lost; table.apply_row_weights() gives a table of the "
            "products, exact=False leaves them out"
        )
    return table, is_exact


def codes_to_export(table: object, exact: object) -> tuple[QuantizedTable, bool]:
    """The same for a target that has rows of codes only."""
    # First, since exact=False would not help.
    if isinstance(table, FloatTable):
        raise TypeError(f"table must be a QuantizedTable, got {type(table).__name__}; qembag.quantize makes one")
    checked, is_exact = table_to_export(table, exact)
    assert isinstance(checked, QuantizedTable)
    return checked, is_exact


def rows_of_one_group(
    table: QuantizedTable, scale_dtype: DTypeLike, *, scale_first: bool, exact: bool, target: str
) -> tuple[NDArray[np.uint8], RowLayout]:
    """The stored rows with one scale and one bias each, and no padding: the table's own memory where they are so.

    Raises
    ------
    ValueError
        If `exact`, and that would change a value or the number of columns: what would be lost. If not `exact`, and
        `scale_dtype` cannot hold a row at all.
    """
    bits, dim = table.bits, table.dim
    layout = RowLayout(bits, dim, scale_dtype=scale_dtype, scale_first=scale_first)
    surplus = -dim % layout.codes_per_byte
    if exact and surplus:
        raise ValueError(
            f"table must have a dim that is a multiple of {layout.codes_per_byte} at {bits} bits, got {dim}: {target} "
            f"would return {dim + surplus} columns; exact=False makes such rows, whose last columns have a code of 0"
        )
    if layout == table.layout:
        return table.data, layout
    try:
        options: dict[str, Any] = {"scale_dtype": scale_dtype, "scale_first": scale_first}
        return table.to_layout(**options).data, layout
    except ValueError as error:
        if exact:
            raise ValueError(
                f"{target} cannot hold this table exactly: {error}; exact=False takes the nearest that it can"
            ) from None
    return _nearest(table, layout), layout


def _nearest(table: QuantizedTable, layout: RowLayout) -> NDArray[np.uint8]:
    """The stored rows, with rounded scales and biases; quantized anew if they had several groups."""
    rows, given = table.data, table.layout
    made = np.empty((len(rows), layout.row_bytes), dtype=np.uint8)
    at_once = max(ELEMENTS_AT_ONCE // table.dim, 1)
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        if given.num_groups > 1:
            values = table_of(QuantizedTable, rows[part], given, None).dequantize()
            first = layout.scale_first
            made[part] = quantize(values, layout.bits, scale_dtype=layout.scale_dtype, scale_first=first).data
        else:
            made[part] = layout.pack(given.codes(rows[part]), _rounded(given.pairs(rows[part]), layout, start))
    return made


def _rounded(pairs: NDArray[np.float32], layout: RowLayout, first_row: int) -> NDArray[Any]:
    rounded: NDArray[Any] = _arguments.quietly(pairs.astype, layout.scale_dtype)
    wrong = np.argwhere(np.isfinite(pairs) & ~np.isfinite(rounded))
    if len(wrong):
        row, group, part = wrong[0]
        raise ValueError(
            f"row {first_row + row} has a {('scale', 'bias')[part]} of {pairs[row, group, part]:.9g}, which is beyond "
            f"{layout.scale_dtype.name}"
        )
    return rounded


def logical_rows(table: QuantizedTable | FloatTable, rows: NDArray[Any]) -> NDArray[Any]:
    """Rows for each logical index, of zeros where it is pruned, for a target that has no mapping.

    A row of zeros adds nothing, and a mean counts it, as it counts a pruned row.
    """
    mapping = table.compressed_indices_mapping
    if mapping is None:
        return rows
    kept = mapping >= 0
    whole = np.zeros((len(mapping), rows.shape[1]), rows.dtype)
    whole[kept] = rows[mapping[kept]]
    return whole
