"""Streams the tables of another library's file to a file of ours."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .. import _arguments
from ..formats.collections import kept
from ..formats.safetensors_file import brief
from ..formats.saving import Content, checked_name, save_contents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from .foreign import Foreign
    from .load import Found


def save_found(found: Found, target: Path, written: Callable[[int, int], object]) -> int:
    """Save the tables of a file to a file of ours, or to an index and its files; returns the bytes of the tables.

    Rows go from file to file in blocks. Neither the source nor the target counts as this process's memory.

    Parameters
    ----------
    found : Found
        The tables, as `open_foreign` finds them.
    target : Path
        As for `save_tables`: replaced when everything is written.
    written : callable
        Called with the rows and the bytes of each block once they are written.

    Raises
    ------
    ValueError
        If a name, a mapping or a weight is not as a file of ours may have it, or rows overlap.
    OSError
        If the source cannot be read, or the target cannot be written.
    """
    contents = {checked_name(name): _content_of(found, table, written) for name, table in found.tables.items()}
    save_contents(target, contents, dict(found.metadata) | kept(found.collection, contents))
    return sum(content.nbytes for content in contents.values())


def _content_of(found: Found, table: Foreign, written: Callable[[int, int], object]) -> Content:
    try:
        mapping = _arguments.mapping(table.mapping, check_rows=table.num_rows)
        weights = _arguments.row_weights(table.row_weights, table.num_embeddings)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"table {brief(table.name)}: {error}") from None
    return Content(table.layout, table.num_rows, functools.partial(_blocks, found, table, written), mapping, weights)


def _blocks(found: Found, table: Foreign, written: Callable[[int, int], object]) -> Iterator[NDArray[Any]]:
    for block in table.blocks():
        yield block
        found.release()
        written(len(block), block.nbytes)
