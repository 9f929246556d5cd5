"""How many threads the engine around this call has granted it.

An engine is asked only where this process is a worker of it, which has imported it: nothing is imported here.
"""

from __future__ import annotations

import sys
from typing import Any


def granted_threads() -> int | None:
    """Threads for the task or actor that runs here; None outside of engines, where the process's own limit counts."""
    for package, ask in (("pyspark", _by_spark), ("ray", _by_ray), ("distributed", _by_dask)):
        module = sys.modules.get(package)
        granted = None if module is None else ask(module)
        if granted is not None:
            return max(1, int(granted))
    return None


def _by_spark(pyspark: Any) -> int | None:
    """``spark.task.cpus``, in a task."""
    context = getattr(pyspark, "TaskContext", None)
    task = None if context is None else context.get()
    granted: int | None = None if task is None else task.cpus()
    return granted


def _by_ray(ray: Any) -> float | None:
    """``num_cpus`` of the task or actor; 1 where it has none. None on the driver, which has no grant."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    granted: float = context.get_assigned_resources().get("CPU", 1)
    return granted


def _by_dask(distributed: Any) -> int | None:
    """One: a worker runs as many tasks at a time as it has threads."""
    try:
        distributed.get_worker()
    except ValueError:  # no task of a worker's
        return None
    return 1
