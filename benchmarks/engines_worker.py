"""A process of one engine for `benchmarks.engines`: scores all bags once, and tells how long that took.

The engine is started before and stopped after. Of what is written, nothing is compressed and nothing has a dictionary:
otherwise zeros would be written faster than vectors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from . import processes
from .engines_data import ID, VECTOR

# Ray needs a processor for the tasks that read: as many actors as processors wait for them for ever.
CPUS = max(2, os.cpu_count() or 2)
WRITTEN = [ID, VECTOR]
ROWS_OF_A_BATCH = {"ray": 50_000, "ray tasks": 50_000, "spark": 10_000, "pyarrow": 50_000}


class Job(NamedTuple):
    engine: str
    contender: str  # "Scorer", "zeros", or "dying"
    sink: str  # "count" or "write"
    bags: str  # a folder of Parquet
    table: str
    out: str  # a folder, or a file of engines in one process
    temporary: str  # a folder; a short name, for sockets are in it
    row: int = -1  # with which a dying one is killed

    @property
    def mapper(self) -> tuple[type, tuple[Any, ...]]:
        """A class, and what it is called with."""
        from qembag.engines import Scorer

        from .engines_maps import Dying, Zeros

        if self.contender == "dying":
            return Dying, (self.table, self.row, f"{self.temporary}/killed")
        return (Scorer if self.contender == "Scorer" else Zeros), (self.table,)

    def mapped(self) -> Any:
        kind, arguments = self.mapper
        return kind(*arguments)


# ---- Engines: each starts, and gives what is to be timed, which returns the number of rows, or None ------------------

Call = Callable[[], int | None]


@contextmanager
def with_ray(job: Job, *, actors: bool = True) -> Iterator[Call]:
    import ray

    folder = str(Path(job.temporary) / "ray")
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

    def call() -> int | None:
        rows: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": ROWS_OF_A_BATCH["ray"]}
        bags = ray.data.read_parquet(job.bags)
        if actors:
            kind, arguments = job.mapper
            pool = ray.data.ActorPoolStrategy(size=CPUS - 1)
            scored = bags.map_batches(kind, fn_constructor_args=arguments, compute=pool, num_cpus=1, **rows)
        else:
            scored = bags.map_batches(job.mapped(), **rows)
        if job.sink == "count":
            found: int = scored.count()
            return found
        scored.select_columns(WRITTEN).write_parquet(job.out, compression="none", use_dictionary=False)
        return None

    try:
        yield call
    finally:
        ray.shutdown()


@contextmanager
def with_ray_tasks(job: Job) -> Iterator[Call]:
    """A function in the tasks that read, in place of actors."""
    with with_ray(job, actors=False) as call:
        yield call


@contextmanager
def with_spark(job: Job) -> Iterator[Call]:
    from pyspark.sql import SparkSession

    settings = {
        "spark.driver.memory": "3g",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.local.dir": job.temporary,
        "spark.sql.warehouse.dir": f"{job.temporary}/warehouse",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_OF_A_BATCH["spark"]),
    }
    builder = SparkSession.builder.master(f"local[{CPUS},4]")  # a task may fail three times
    session = builder.config(map=settings).getOrCreate()
    session.sparkContext.setLogLevel("OFF")

    def call() -> int | None:
        bags, mapped = session.read.parquet(job.bags), job.mapped()
        scored = bags.mapInArrow(mapped.map_arrow, mapped.spark_schema(bags.schema)).select(*WRITTEN)
        if job.sink == "count":  # without a sink that takes all columns, Spark would not make them
            scored.write.format("noop").mode("overwrite").save()
            return None
        options = {"compression": "uncompressed", "parquet.enable.dictionary": "false"}
        scored.write.options(**options).parquet(job.out)
        return None

    try:
        yield call
    finally:
        session.stop()


@contextmanager
def with_dask(job: Job) -> Iterator[Call]:
    import dask.dataframe as dd
    from distributed import Client, LocalCluster

    options: dict[str, Any] = {"dashboard_address": None, "local_directory": job.temporary, "silence_logs": "ERROR"}

    def call() -> int | None:
        bags = dd.read_parquet(job.bags, dtype_backend="pyarrow", split_row_groups=True)
        mapped = job.mapped()
        scored = bags.map_partitions(mapped.map_pandas, meta=mapped.map_pandas(bags._meta))
        if job.sink == "count":
            return int(scored.map_partitions(len, meta=(None, "int64")).compute().sum())
        kept = scored[WRITTEN]
        kept.to_parquet(job.out, compression=None, use_dictionary=False, write_index=False)
        return None

    with LocalCluster(n_workers=CPUS, threads_per_worker=1, **options) as cluster, Client(cluster):
        yield call


@contextmanager
def with_polars(job: Job) -> Iterator[Call]:
    import polars as pl

    def call() -> int | None:
        mapped = job.mapped()
        bags = pl.scan_parquet(f"{job.bags}/*.parquet")
        schema = bags.collect_schema() | {VECTOR: pl.List(pl.Float32)}
        scored = bags.map_batches(mapped, schema=schema, streamable=True).select(WRITTEN)
        if job.sink == "count":
            return sum(batch.height for batch in scored.collect_batches(engine="streaming"))
        scored.sink_parquet(job.out, compression="uncompressed", engine="streaming")
        return None

    yield call


@contextmanager
def with_pyarrow(job: Job) -> Iterator[Call]:
    def call() -> int | None:
        batches = pa.dataset.dataset(job.bags).to_batches(batch_size=ROWS_OF_A_BATCH["pyarrow"])
        scored = (batch.select(WRITTEN) for batch in job.mapped().map_arrow(batches))
        if job.sink == "count":
            return sum(batch.num_rows for batch in scored)
        first = next(scored)
        with pq.ParquetWriter(job.out, first.schema, compression="none", use_dictionary=False) as writer:
            writer.write_batch(first)
            for batch in scored:
                writer.write_batch(batch)
        return None

    yield call


ENGINES = {
    "ray": with_ray,
    "ray tasks": with_ray_tasks,
    "spark": with_spark,
    "dask": with_dask,
    "polars": with_polars,
    "pyarrow": with_pyarrow,
}
# One process has nothing that could be killed and go on.
OF_PROCESSES = ("ray", "ray tasks", "spark", "dask")
PACKAGES = {"ray tasks": "ray", "spark": "pyspark"}


def main() -> None:
    job = Job(*json.loads(sys.argv[1]))
    with ENGINES[job.engine](job) as call:
        busy, start = processes.cpu_seconds(os.getpid()), time.perf_counter()
        rows = call()
        seconds = time.perf_counter() - start
        busy = processes.cpu_seconds(os.getpid()) - busy
    print(json.dumps({"seconds": seconds, "cpu": busy, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
