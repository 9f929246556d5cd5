"""Lookups in scikit-learn's pipelines: ``pip install 'qembag[sklearn]'``. Nothing else in qembag imports this."""

try:
    import sklearn as _sklearn
except ImportError:
    raise ImportError("qembag.sklearn needs scikit-learn: pip install 'qembag[sklearn]'") from None

from .transformer import EmbeddingBagTransformer

del _sklearn

__all__ = ["EmbeddingBagTransformer"]
