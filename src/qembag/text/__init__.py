"""Texts to vectors: a tokenizer and a table. ``docs/text.md`` says whose vectors these are.

Needs the package tokenizers: ``pip install 'qembag[text]'``.
"""

from .embedder import TextEmbedder

__all__ = ["TextEmbedder"]
