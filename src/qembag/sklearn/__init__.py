"""Lookups in scikit-learn's pipelines: ``pip install 'qembag[sklearn]'``. Nothing else in qembag imports this."""

from .transformer import EmbeddingBagTransformer

__all__ = ["EmbeddingBagTransformer"]
