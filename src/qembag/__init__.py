"""Embedding lookups from 8-, 4- and 2-bit tables: sums of rows, bit for bit those of PyTorch's quantized operators."""

import importlib
from typing import TYPE_CHECKING, Any

from . import _cython as _cython  # first: the other compiled modules look for it in sys.modules
from . import ops
from ._runtime import get_num_threads, set_num_threads, show_config
from ._version import __version__
from .float_table import FloatTable
from .lookup import embedding, embedding_bag
from .quantize import quantize
from .table import QuantizedTable

if TYPE_CHECKING:
    from .collection import EmbeddingBagCollection, EmbeddingCollection
    from .formats.tables import open_table, open_tables, save_tables
    from .formats.to_file import quantize_to_file
    from .interop.load import load_tables
    from .pruning import choose_rows
    from .verdict.compare import compare

__all__ = [
    "EmbeddingBagCollection",
    "EmbeddingCollection",
    "FloatTable",
    "QuantizedTable",
    "__version__",
    "choose_rows",
    "compare",
    "embedding",
    "embedding_bag",
    "get_num_threads",
    "load_tables",
    "open_table",
    "open_tables",
    "ops",
    "quantize",
    "quantize_to_file",
    "save_tables",
    "set_num_threads",
    "show_config",
]

# Imported at first use: lookups do not need these modules, and they would triple the time of `import qembag`.
_AT_FIRST_USE = {
    "EmbeddingBagCollection": ".collection",
    "EmbeddingCollection": ".collection",
    "choose_rows": ".pruning",
    "compare": ".verdict.compare",
    "load_tables": ".interop.load",
    "open_table": ".formats.tables",
    "open_tables": ".formats.tables",
    "quantize_to_file": ".formats.to_file",
    "save_tables": ".formats.tables",
}

# Rooms that are imported at first use, too. `dir` leaves them out: what looks at every attribute must not import torch.
_ROOMS = ("engines", "interop", "sklearn", "text", "torch")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f".{name}", __name__)
        if name not in _AT_FIRST_USE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_AT_FIRST_USE[name], __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
