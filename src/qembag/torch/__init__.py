"""qembag in PyTorch: modules over its tables, operators that torch's compilers know, and torch's own operators.

Needs PyTorch: ``pip install 'qembag[torch]'``. Importing this package registers its operators with torch
(``qembag::embedding_bag``, ``qembag::embedding`` and their like for collections): import it before you load a program
that was exported with them.
"""

try:
    import torch as _torch
except ImportError:
    raise ImportError("qembag.torch needs torch: pip install 'qembag[torch]'") from None

from .collections import EmbeddingBagCollection, EmbeddingCollection
from .modules import Embedding, EmbeddingBag
from .register import Registration, register_operators
from .replace import Replaced, Report, replace_embedding_bags

del _torch

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "EmbeddingCollection",
    "Registration",
    "Replaced",
    "Report",
    "register_operators",
    "replace_embedding_bags",
]
