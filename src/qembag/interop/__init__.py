"""Tables of other libraries: from their files and their live objects, and back."""

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = ("fbgemm", "torch", "torchrec")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # At first use: `import qembag.interop` imports none of them.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f".{name}", __name__)
