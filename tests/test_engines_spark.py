"""A Scorer in the workers of Spark: each row once with the vector of a plain loop, workers that die, threads, memory."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("nanoarrow", "pyarrow", "pandas", "pyspark"):
    pytest.importorskip(name)
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("no Java, which Spark runs on", allow_module_level=True)

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import SparkContext
from pyspark.sql import SparkSession

from conftest import child_environment
from qembag.engines import Scorer
from support import engines

pytestmark = [
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def bags() -> engines.Bags:
    return engines.bags_in_files()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a session with such options, in the one Java process of this module."""
    folder = tmp_path_factory.mktemp("spark-home")
    options = {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "1g",
        "spark.local.dir": str(folder),
        "spark.sql.files.maxPartitionBytes": "1m",
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    before = engines.processes()

    def started(**more: str) -> Any:
        # Each task may fail four times, as on a cluster; by default, one failure ends a local job.
        builder = SparkSession.builder.master("local[2, 4]")
        for name, value in (options | {name.replace("_", "."): value for name, value in more.items()}).items():
            builder = builder.config(name, value)
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        return session

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in (child_environment() | {"PYSPARK_PYTHON": sys.executable}).items():
            patch.setenv(name, value)
        yield started
        pids = engines.processes() - before
        end_java()
    engines.wait_for_the_end_of(pids)


def end_java() -> None:
    """Which else lives as long as this process."""
    session = SparkSession.getActiveSession()
    if session is not None:
        session.stop()
    gateway = SparkContext._gateway
    if gateway is not None:
        gateway.shutdown()
        gateway.proc.stdin.close()
        gateway.proc.wait(30)
        SparkContext._gateway = SparkContext._jvm = None


@pytest.fixture(scope="module")
def spark(start: Start) -> Any:
    return start()


def scored(frame: Any, scorer: Scorer) -> Any:
    return frame.mapInArrow(scorer.map_arrow, scorer.spark_schema(frame.schema))


def test_each_row_has_the_vector_of_a_plain_loop(spark: Any, bags: engines.Bags, tmp_path: Path) -> None:
    frame = spark.read.parquet(str(bags.folder))
    assert frame.rdd.getNumPartitions() >= 4
    made = scored(frame, Scorer(bags.tables, weights={"songs": "weights"}))
    assert made.schema[:-1] == frame.schema
    assert made.schema["vector"].dataType.simpleString() == "array<float>"
    made.write.parquet(str(tmp_path / "scored"))
    found = pq.read_table(tmp_path / "scored")
    engines.check(found, bags)
    back = spark.read.parquet(str(tmp_path / "scored"))
    assert back.schema == made.schema
    assert back.count() == len(bags.expected)


def test_a_bad_row_is_an_error_or_null(spark: Any, bags: engines.Bags, tmp_path: Path) -> None:
    folder = engines.write_bad(tmp_path, bags.table, {777: [1, 99_999], 31_000: [None], 99_999: [-1]})
    frame = spark.read.parquet(str(folder)).select("*", "_metadata.file_path", "_metadata.row_index")
    with pytest.raises(Exception, match=r"row_index=777: songs\[1\] is 99999: out of range for a table of 5") as caught:
        scored(frame, Scorer(bags.tables, row_id=["file_path", "row_index"])).count()
    assert "part.parquet" in str(caught.value)
    made = scored(frame, Scorer(bags.tables, errors="null", reasons="why"))
    counted = (
        made.selectExpr("why", "id", "vector is null as bad").groupBy("why", "bad").agg({"id": "min", "*": "count"})
    )
    found = {(row["why"], row["bad"], row["count(1)"], row["min(id)"]) for row in counted.collect()}
    assert found == {
        (None, False, 99_997, 0),
        ("songs[1] is 99999: out of range for a table of 500 rows", True, 1, 777),
        ("songs[0] is null: must be a number", True, 1, 31_000),
        ("songs[0] is -1: out of range for a table of 500 rows", True, 1, 99_999),
    }


def test_types_that_spark_lacks_are_refused(spark: Any, bags: engines.Bags) -> None:
    schema = spark.read.parquet(str(bags.folder)).schema
    for options in ({"dtype": "float16"}, {"list_size": "fixed"}):
        with pytest.raises(TypeError, match="Spark must be given lists of float32"):
            Scorer(bags.tables, **options).spark_schema(schema)
    with pytest.raises(TypeError, match="schema must be a StructType of pyspark's, got"):
        Scorer(bags.tables).spark_schema(bags.table.schema)


def on_two_workers(spark: Any, work: Callable[[], dict[str, Any]], schema: str) -> list[Any]:
    """What some work gives in two tasks at a time."""

    def of_task(batches: Any) -> Any:
        for _ in batches:
            pass
        time.sleep(1)  # until the other one has begun
        yield pa.RecordBatch.from_pylist([work()])

    return spark.range(2, numPartitions=2).mapInArrow(of_task, schema).collect()


@engines.on_linux
def test_workers_open_the_tables_once_and_share_their_pages(spark: Any, tmp_path: Path) -> None:
    path = engines.save_large(tmp_path / "tables.safetensors")
    scorer = Scorer(path)

    def work() -> dict[str, Any]:
        scorer(pa.table({"songs": np.arange(100_000).reshape(-1, 100).tolist()}))
        [collection] = engines.opened_here(path)
        read, share = engines.mapped_bytes(path)
        return {"pid": os.getpid(), "collection": collection, "read": read, "share": share}

    schema = "pid long, collection long, read long, share long"
    first, again = (on_two_workers(spark, work, schema) for _ in range(2))
    assert {(row.pid, row.collection) for row in first} == {(row.pid, row.collection) for row in again}
    assert engines.are_shared([(row.read, row.share) for row in again], path.stat().st_size), again


def test_a_worker_that_is_killed_leaves_each_row_once(spark: Any, bags: engines.Bags, tmp_path: Path) -> None:
    scorer, marker = Scorer(bags.tables, weights={"songs": "weights"}), tmp_path / "killed"

    def score(batches: Any) -> Any:
        for batch in scorer.map_arrow(batches):
            if 50_000 in batch.column("id").to_numpy():
                engines.kill_once(marker)
            yield batch

    frame = spark.read.parquet(str(bags.folder))
    frame.mapInArrow(score, scorer.spark_schema(frame.schema)).write.parquet(str(tmp_path / "scored"))
    assert marker.exists()
    engines.check(pq.read_table(tmp_path / "scored"), bags)


def test_the_page_shows_what_happens(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engines.run_the_page("Spark")


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_task_has_the_threads_of_its_cpus(start: Start, cpus: int) -> None:
    """The last tests: a session's number is for its life."""
    SparkSession.getActiveSession().stop()
    session = start(spark_task_cpus=str(cpus))

    def work(batches: Any) -> Any:
        from qembag.engines.granted import granted_threads

        for _ in batches:
            yield pa.RecordBatch.from_pydict({"granted": [granted_threads()]})

    assert [row.granted for row in session.range(1, numPartitions=1).mapInArrow(work, "granted long").collect()] == [
        cpus
    ]
