"""Reads a table of floats from a .npy or .safetensors file, for the command."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FLOAT_TENSORS = {"F16", "F32", "F64"}


def load_table(path: Path, tensor: str | None) -> NDArray[np.float32]:
    """The table in a .npy or .safetensors file, as float32.

    Raises
    ------
    ImportError, OSError, ValueError
        If safetensors is not installed, the file cannot be read, or it holds no table of floats.
    """
    if path.suffix == ".safetensors":
        array = load_safetensors(path, tensor)
    elif path.suffix != ".npy":
        raise ValueError("the table must be a .npy or a .safetensors file")
    elif tensor is not None:
        raise ValueError("--tensor must come with a .safetensors file")
    else:
        array = map_npy(path)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"the table must hold float16, float32 or float64, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"the table must have 2 dimensions (rows, dim) and be not empty, got shape {array.shape}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which `quantize` reports
        return np.ascontiguousarray(array, dtype=np.float32)


def map_npy(path: Path) -> NDArray[Any]:
    """Map the file, so that a float32 table may be larger than memory. Never reads a pickle."""
    try:
        # The product of a false shape may overflow; NumPy reports that shape one step later.
        with np.errstate(over="ignore"):
            return np.lib.format.open_memmap(path, mode="r")
    except (MemoryError, OSError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001 (for example from Python's parser, which reads the header)
        raise ValueError(f"not a readable .npy file: {type(error).__name__}: {error}") from None


def load_safetensors(path: Path, name: str | None) -> NDArray[Any]:
    try:
        # By name, so that type checkers do not need the extra either.
        safetensors = importlib.import_module("safetensors")
    except ImportError:
        raise ImportError("reading it needs the safetensors package: pip install 'qembag[safetensors]'") from None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {key: file.get_slice(key).get_shape() for key in kinds}
            if name is None:
                name = only_table([key for key in kinds if len(shapes[key]) == 2 and "F" in kinds[key]])
            elif name not in kinds:
                raise ValueError(f"there is no tensor {name!r}; there are: {', '.join(sorted(kinds))}")
            if kinds[name] not in FLOAT_TENSORS:
                raise ValueError(
                    f"tensor {name!r} is {kinds[name]}: must be F16, F32 or F64 (BF16 and F8 are not types of NumPy's)"
                )
            array: NDArray[Any] = file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a readable .safetensors file: {error}") from None
    return array


def only_table(names: list[str]) -> str:
    if len(names) != 1:
        found = f"choose one with --tensor: {', '.join(sorted(names))}" if names else "there is none"
        raise ValueError(f"the file must hold one 2-D float tensor; {found}")
    return names[0]
