"""torch tensors as NumPy arrays of the same memory, and back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Classes of tensors that are plain memory. Others compute what they hold, or say only what they would.
PLAIN = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


def full_name(value: object) -> str:
    """The name of a value's class, with its module's."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def has_class(value: object, package: str, *names: str) -> bool:
    """Whether a value is of a class of that package with one of these names, or of a subclass of one.

    Told by name: the package need not be imported for values that come from elsewhere.
    """
    return any(
        kind.__name__ in names and (kind.__module__ == package or kind.__module__.startswith(f"{package}."))
        for kind in type(value).__mro__
    )


def imported(package: str, install: str) -> Any:
    """A package that the caller's work needs. Raises ImportError with what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this needs {package}: pip install {install}") from error


def imported_torch() -> Any:
    return imported("torch", "'qembag[torch]'")


def array_of(tensor: Any, name: str) -> NDArray[Any]:
    """The array of a plain tensor's memory, without a copy; bfloat16 as its bits.

    Raises
    ------
    TypeError
        If it is no plain tensor, or NumPy has no such type.
    ValueError
        If it is not in the memory of the CPU.
    """
    if not has_class(tensor, "torch", "Tensor"):
        raise TypeError(f"{name} must be a torch.Tensor, got {_errors.kind_of(tensor)}")
    if full_name(tensor) not in PLAIN:
        raise TypeError(f"{name} must be a plain tensor, got {full_name(tensor)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got device {tensor.device}: call .cpu() first")
    kind = str(tensor.dtype)
    try:
        plain = tensor.detach()
        if kind == "torch.bfloat16":
            # Of the same size, and known to NumPy in each version of torch.
            bits: NDArray[Any] = plain.view(tensor.new_empty(0).short().dtype).numpy()
            return bits.view(np.uint16)
        array: NDArray[Any] = plain.numpy()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a dense tensor of a type that NumPy has, got {kind}: {error}") from error
    return array


def tensor_of(array: NDArray[Any]) -> Any:
    """The tensor of an array's memory; of a copy where torch could write to memory that is read-only."""
    torch = imported_torch()
    # torch has no read-only tensors, and warns; it has no negative strides either.
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array)
