"""TorchRec's KeyedJaggedTensor as bags, in its own memory. torch and torchrec need not be imported for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._batches import Bags
from .tensors import array_of

if TYPE_CHECKING:
    from collections.abc import Container

METHODS = ("keys", "values", "offsets", "weights_or_none", "variable_stride_per_key")


def is_jagged(value: object) -> bool:
    """Whether it is a KeyedJaggedTensor: told by what it has."""
    return all(hasattr(value, name) for name in METHODS)


def columns_of(jagged: Any, name: str, wanted: Container[str] | None = None) -> dict[str, list[Bags]]:
    """The bags of each key, without a copy.

    Parameters
    ----------
    jagged : torchrec's KeyedJaggedTensor
        On the CPU, each key with one batch size.
    name : str
        Of the argument, for errors.
    wanted : container of str, optional
        Keys to take. By default all are taken.

    Returns
    -------
    dict of str to list of Bags
        One Bags a key. Weights of bfloat16, which NumPy does not have, are copied to float32.

    Raises
    ------
    TypeError, ValueError
        If its parts are not plain tensors on the CPU; if batch sizes differ, or a key is there twice.
    """
    keys = list(jagged.keys())
    if jagged.variable_stride_per_key():
        raise ValueError(f"{name} must have one batch size, got a {type(jagged).__name__} with one a key")
    if len(set(keys)) < len(keys):
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"{name} must have each key once, got {twice!r} twice")
    values = array_of(jagged.values(), f"{name}.values()")
    ends = array_of(jagged.offsets(), f"{name}.offsets()")
    weights = jagged.weights_or_none()
    if weights is not None:
        plain = weights.float() if str(weights.dtype) == "torch.bfloat16" else weights
        weights = array_of(plain, f"{name}.weights()")
    batch, rest = divmod(max(len(ends) - 1, 0), max(len(keys), 1))
    if ends.ndim != 1 or rest:
        raise ValueError(f"{name} must have as many offsets for each of {len(keys)} keys, got {len(ends)}")
    return {
        key: [Bags(values, ends[number * batch : (number + 1) * batch + 1], weights)]
        for number, key in enumerate(keys)
        if wanted is None or key in wanted
    }
