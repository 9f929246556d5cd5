"""Strings, in whatever holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._errors import kind_of


def as_texts(value: Any) -> list[str]:
    """The strings of a list, an array, a column or any other iterable, as a list of our own.

    Raises
    ------
    TypeError
        If it is no such thing, or holds something else than strings: names the position.
    ValueError
        If it is an array or a data frame of more than one dimension.
    """
    if isinstance(value, (bytes, bytearray, memoryview, Mapping)):
        raise TypeError(f"texts must be a string or strings, got {kind_of(value)}")
    if getattr(value, "ndim", 1) != 1:
        raise ValueError(f"texts must have 1 dimension, got {kind_of(value)}")
    if isinstance(value, np.ndarray):
        texts = value.tolist()
    elif hasattr(value, "to_pylist"):  # Arrow's columns: iterated, they give scalars of Arrow
        texts = value.to_pylist()
    else:
        try:
            iterator = iter(value)
        except TypeError:
            raise TypeError(f"texts must be a string or strings, got {kind_of(value)}") from None
        texts = list(iterator)
    if set(map(type, texts)) <= {str}:
        return texts  # type: ignore[no-any-return]
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{position}] must be a string, got {kind_of(text)}")
    return [str.__str__(text) for text in texts]


def check_unicode(texts: list[str], start: int) -> None:
    """Raise ValueError for the first text that is not valid Unicode; tokenizers does not say which one it is."""
    for position, text in enumerate(texts, start):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts[{position}] must be valid Unicode, got a lone surrogate at character {error.start}"
            ) from None
