"""Bags as other libraries hold them: columns of lists (Arrow), sparse matrices (SciPy). `interop` reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container

    from numpy.typing import NDArray


class Bags(NamedTuple):
    """Some bags of a batch, one after the other. A column of several chunks has several of these."""

    indices: NDArray[Any]
    """Integers: 1-D; or 2-D, of which each row is a bag."""
    offsets: NDArray[Any] | None
    """int32 or int64, one more than bags: where each starts, and where the last ends. None for 2-D indices."""
    weights: NDArray[Any] | None = None
    """float32 or float16, of the shape of `indices`."""

    @property
    def num_bags(self) -> int:
        return len(self.indices) if self.offsets is None else len(self.offsets) - 1


def bags_of(value: object, name: str) -> list[Bags] | None:
    """The bags of a column or of a matrix; None for anything else, which NumPy may make an array of.

    Told apart by what objects have: no package is imported that is not there already, but the one that reads them.
    """
    if is_arrow(value):
        from .interop import arrow

        return arrow.bags_of(value, name)
    if hasattr(value, "indptr") and getattr(value, "format", None) == "csr":
        from .interop import csr

        return csr.bags_of(value, name)
    return None


def is_arrow(value: object) -> bool:
    """Whether it has Arrow's C interface, or is a Series of pandas before 3.0 that holds Arrow's memory."""
    return (
        hasattr(value, "__arrow_c_array__")
        or hasattr(value, "__arrow_c_stream__")
        or hasattr(getattr(value, "dtype", None), "pyarrow_dtype")
    )


def key_of(feature: str, table: str, given: Container[str]) -> str:
    """What the input of a feature is called in a call's input by key.

    TorchRec calls features that look up in several tables "f@t1", "f@t2", and has one "f" in its input for them.
    """
    return feature if feature in given else feature.removesuffix(f"@{table}")
