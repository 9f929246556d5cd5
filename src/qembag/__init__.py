"""Embedding lookups from 8-, 4- and 2-bit tables: sums of rows, bit for bit those of PyTorch's quantized operators."""

from . import _cython as _cython  # first: the other compiled modules look for it in sys.modules
from . import ops
from ._runtime import get_num_threads, set_num_threads, show_config
from ._version import __version__
from .float_table import FloatTable
from .formats.tables import open_table, open_tables, save_tables
from .formats.to_file import quantize_to_file
from .lookup import embedding, embedding_bag
from .quantize import quantize
from .table import QuantizedTable

__all__ = [
    "FloatTable",
    "QuantizedTable",
    "__version__",
    "embedding",
    "embedding_bag",
    "get_num_threads",
    "open_table",
    "open_tables",
    "ops",
    "quantize",
    "quantize_to_file",
    "save_tables",
    "set_num_threads",
    "show_config",
]
