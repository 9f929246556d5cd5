"""Tokenizers of the package `tokenizers`: read, copied and set up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import kind_of

if TYPE_CHECKING:
    from pathlib import Path

# The largest tokenizer.json that is read. Those of half a million tokens have 40 MB.
MAX_BYTES = 1 << 28


def tokenizer_class() -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("qembag.text needs tokenizers: pip install 'qembag[text]'") from None
    return Tokenizer


def copied(tokenizer: Any) -> Any:
    """A tokenizer of our own, whose settings nobody else changes.

    Raises
    ------
    TypeError
        If it is no tokenizer.
    ValueError
        If it cannot be written as JSON, or has a setting that JSON does not keep.
    """
    kind = tokenizer_class()
    found = getattr(tokenizer, "backend_tokenizer", tokenizer)  # of transformers' fast tokenizers
    if not isinstance(found, kind):
        raise TypeError(f"tokenizer must be a tokenizers.Tokenizer, got {kind_of(tokenizer)}")
    if getattr(found, "encode_special_tokens", False):
        raise ValueError("tokenizer must not have encode_special_tokens set: its JSON does not keep that setting")
    try:
        text = found.to_str()
    except Exception as error:
        raise ValueError(f"tokenizer must be one that can be written as JSON: {error}") from error
    return kind.from_str(text)


def read(path: Path) -> Any:
    """The tokenizer in a file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        Without the path: if it is no tokenizer.
    """
    kind = tokenizer_class()
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path.name}: is longer than {MAX_BYTES} bytes")
    try:
        return kind.from_buffer(content)
    except BaseException as error:
        # Some damage makes tokenizers panic, which is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path.name}: is no tokenizer: {str(error)[:200]}") from error
        raise


def unknown_of(tokenizer: Any) -> int | None:
    """The number of the token that stands for unknown words."""
    model = tokenizer.model
    if hasattr(model, "unk_token"):
        found = None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)
    else:
        # Unigram has a number, which only its JSON tells.
        found = json.loads(tokenizer.to_str())["model"].get("unk_id")
    number: int | None = found
    return number


def median_length(tokenizer: Any) -> int:
    """The median length of a token in characters, rounded down, as model2vec counts it."""
    return int(np.median([len(token) for token in tokenizer.get_vocab()]))
