"""Looking rows up in a table.

Both functions are compiled, in `_handle`; what they do not recognize is done by `_slow`.
"""

from . import _handle, _slow
from ._handle import embedding, embedding_bag

_handle.register_slow_path(_slow)
# Under the name that users import them by, so that they are pickled and documented as such.
embedding.__module__ = embedding_bag.__module__ = __name__

__all__ = ["embedding", "embedding_bag"]
