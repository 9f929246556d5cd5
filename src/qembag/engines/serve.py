"""Collections served over HTTP by Ray Serve: an application for `serve.run`, and a builder for Serve's config files."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arguments, _errors
from ..formats.saving import as_path
from ..interop.tensors import imported
from .serve_limits import Limits
from .serve_replica import EmbeddingBags

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

# Vectors of so many bytes are two gigabytes of JSON, which is what Arrow's columns of strings hold.
MOST_ANSWER_BYTES = 1 << 29

# Serve's own defaults are 5 requests at once in a replica, and a queue without an end.
SERVE_OPTIONS = {"name": "EmbeddingBags", "max_ongoing_requests": 64, "max_queued_requests": 512}


def deployment(
    path: str | os.PathLike[str],
    *,
    features: Mapping[str, str] | None = None,
    mode: str | Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
    padding_idx: int | Mapping[str, int | None] | None = None,
    invalid: str | Mapping[str, str] | None = None,
    names: str | list[str] | tuple[str, ...] | None = None,
    num_threads: int | None = None,
    max_body_bytes: int = 1 << 22,
    max_bags: int = 1 << 16,
    max_indices: int = 1_000_000,
    max_answer_bytes: int = 1 << 24,
    body_timeout_s: float = 30.0,
    max_batch_size: int = 32,
    batch_wait_timeout_s: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A Ray Serve application that answers bags with vectors, in JSON or Arrow; see ``docs/serving.md``.

    Parameters
    ----------
    path : str or path
        The file of tables, as for `EmbeddingBagCollection.from_file`. Each replica maps it, and rolls in a new version
        when the file is replaced.
    features, mode, dtype, padding_idx, invalid, names
        As for `EmbeddingBagCollection.from_file`; of dtypes, float32 or float16.
    num_threads : int, optional
        Of each lookup. If not given, as many as Ray grants the replica: its ``num_cpus``.
    max_body_bytes, max_bags, max_indices, max_answer_bytes : int
        Of one request: bytes of its body, bags of a feature, indices of all features, bytes of its vectors. What has
        more is refused with status 413.
    body_timeout_s : float
        How long a body may take to arrive; then the status is 408.
    max_batch_size : int
        How many small requests that wait together are looked up in one call, by ``serve.batch``; 1 for each by itself.
    batch_wait_timeout_s : float
        How long the first of them waits for others.
    options : dict, optional
        Of Serve's deployment: ``num_replicas``, ``ray_actor_options``, ``autoscaling_config``,
        ``max_ongoing_requests`` (64 if not given), ``max_queued_requests`` (512), ``health_check_period_s`` and so on.

    Returns
    -------
    ray.serve.Application
        For ``serve.run``.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong. The file is opened by the replicas.
    ImportError
        If Ray Serve is not installed: ``pip install 'qembag[serve]'``.

    Examples
    --------
    >>> from qembag.engines.serve import deployment
    >>> application = deployment("tables.safetensors", mode="mean", options={"num_replicas": 2})
    >>> from ray import serve  # doctest: +SKIP
    >>> serve.run(application)  # doctest: +SKIP
    """
    serve = imported("ray.serve", "'qembag[serve]'")
    limits = Limits(
        _count(max_body_bytes, "max_body_bytes"),
        _count(max_bags, "max_bags"),
        _count(max_indices, "max_indices"),
        _count(max_answer_bytes, "max_answer_bytes", MOST_ANSWER_BYTES),
        _seconds(body_timeout_s, "body_timeout_s"),
    )
    opening: dict[str, Any] = {
        "path": os.path.abspath(as_path(path)),
        "features": features,
        "mode": mode,
        "dtype": _dtype_name(dtype),
        "padding_idx": padding_idx,
        "invalid": invalid,
        "names": names,
    }
    config = {name: _plain(value) for name, value in opening.items() if value is not None}
    given = dict(options or {})
    if "user_config" in given:
        raise ValueError("options must have no user_config, which holds the path and what is opened of it")
    threads = None if num_threads is None else _count(num_threads, "num_threads")
    kind = serve.deployment(EmbeddingBags, **{**SERVE_OPTIONS, "user_config": config, **given})
    size, wait = _count(max_batch_size, "max_batch_size"), _seconds(batch_wait_timeout_s, "batch_wait_timeout_s", 0.0)
    return kind.bind(limits, size, wait, threads)


def application(args: Mapping[str, Any]) -> Any:
    """The application of a config file of Serve's: ``import_path: qembag.engines.serve:application``.

    Parameters
    ----------
    args : dict
        The arguments of `deployment`; ``path`` is absolute, for it is read on the machines of the cluster. Options of
        Serve's stand in the file's ``deployments``, under the name ``EmbeddingBags``.

    Returns
    -------
    ray.serve.Application

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `deployment`.

    Examples
    --------
    >>> from qembag.engines.serve import application
    >>> made = application({"path": "/models/tables.safetensors", "mode": "mean"})
    """
    given = dict(args)
    known = list(inspect.signature(deployment).parameters)
    for name in given:
        if name not in known:
            raise TypeError(f"args must be of {', '.join(known)}, got {_errors.shown(name)}")
    if "path" not in given:
        raise TypeError("args must have a path, got none")
    if not os.path.isabs(as_path(given["path"])):
        raise ValueError(f"args must have an absolute path, got {_errors.shown(given['path'])}")
    return deployment(**given)


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _count(value: Any, name: str, most: int | None = None) -> int:
    number = _arguments.whole_number(value, name)
    if number < 1 or (most is not None and number > most):
        limits = "at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name} must be {limits}, got {_errors.shown(value)}")
    return number


def _seconds(value: Any, name: str, least: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number of seconds, got {_errors.kind_of(value)}")
    if not math.isfinite(value) or value < 0 or (least is None and value == 0):
        raise ValueError(f"{name} must be a number of seconds{'' if least == 0 else ' above 0'}, got {value}")
    return float(value)


def _dtype_name(dtype: DTypeLike | None) -> str | None:
    """As config files have it."""
    if dtype is None:
        return None
    number, kind = _arguments.out_type(dtype, None)
    if number == 2:
        raise ValueError("dtype must be float32 or float16, got bfloat16, which Arrow has no type for")
    return kind.name


def _plain(value: Any) -> Any:
    """As config files have it."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
