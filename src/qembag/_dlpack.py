"""Arrays of other libraries in the CPU's memory: what NumPy's own protocols leave open.

NumPy's protocols come first, since they refuse what DLPack cannot say: torch exports a tensor whose negative bit is set
as if it were not.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

NUMPY_PROTOCOLS = ("__array__", "__array_interface__", "__array_struct__")
# Memory that the CPU reads, as dlpack.h numbers devices: the host's, also pinned for CUDA or ROCm, and CUDA's managed.
HOST_DEVICES = (1, 3, 11, 13)


def is_needed_for(value: object) -> bool:
    """Whether DLPack is the only way to the memory of an array."""
    if not hasattr(value, "__dlpack__"):
        return False
    # No closure over an argument: CPython 3.11 forgets one where there is no memory for its cell.
    for name in NUMPY_PROTOCOLS:  # noqa: SIM110
        if hasattr(value, name):
            return False
    return True


def array_of(value: Any) -> Array:
    """The array that NumPy makes of it, of the same memory where the value allows it."""
    if not is_needed_for(value):
        return np.asarray(value)
    if device_of(value):
        raise TypeError("NumPy reads the CPU's memory only")
    return np.from_dlpack(value)


def bits_of_bfloat16(value: Any) -> Array | None:
    """The bits of a torch tensor of bfloat16, which NumPy has no type for, in the same memory.

    None for anything else, and for a tensor that NumPy refuses: its error says why.
    """
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)  # None too while another thread imports torch
    if torch is None or tensor is None or not issubclass(type(value), tensor):
        return None
    if value.dtype is not torch.bfloat16 or value.requires_grad:
        return None
    try:
        return np.asarray(value.view(torch.int16)).view(np.uint16)
    except (RuntimeError, TypeError):  # not plain memory of the CPU
        return None


def array_to_write(value: Any) -> Array:
    """The array of the same memory, or a read-only one.

    Raises
    ------
    ValueError
        If NumPy makes a copy: what is written to that is lost.
    """
    array = array_of(value)
    if array.flags.writeable and array.size:
        exported = np.from_dlpack(value)
        if array.__array_interface__["data"][0] != exported.__array_interface__["data"][0]:
            raise ValueError("NumPy makes a copy of it")
    return array


def device_of(value: Any) -> str:
    """The device that holds a value, if that is not the CPU; else empty."""
    if not hasattr(value, "__dlpack_device__"):
        return ""
    try:
        kind, number = value.__dlpack_device__()
    except Exception:  # noqa: BLE001 (of torch's meta device, for example)
        kind, number = None, None
    if kind in HOST_DEVICES:
        return ""
    return str(getattr(value, "device", f"{kind}:{number}, as DLPack numbers them"))
