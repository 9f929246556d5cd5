"""Tables on engines that exist: scoring on Ray, Spark, Dask and in one process; serving on Ray Serve.

``pip install 'qembag[engines]'``, or ``qembag[ray]``, ``[spark]``, ``[dask]``, ``[serve]``, which bring the engine too.
Nothing else in qembag imports this.
"""

try:
    import nanoarrow as _nanoarrow
    import pyarrow as _pyarrow
except ImportError:
    raise ImportError("qembag.engines needs pyarrow and nanoarrow: pip install 'qembag[engines]'") from None

from .scorer import Scorer

del _nanoarrow, _pyarrow

__all__ = ["Scorer"]
