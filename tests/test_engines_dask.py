"""A Scorer in the workers of Dask: each row once with the vector of a plain loop, workers that die, threads, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("nanoarrow", "pyarrow", "dask.dataframe", "distributed"):
    pytest.importorskip(name)

import dask.dataframe
import distributed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qembag.engines import Scorer
from qembag.engines.granted import granted_threads
from support import engines

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def bags() -> engines.Bags:
    return engines.bags_in_files()


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of two workers, which are processes."""
    before = engines.processes()
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0)
    with cluster, distributed.Client(cluster) as client:
        started = engines.processes() - before
        yield client
        started |= engines.processes() - before
    engines.wait_for_the_end_of(started)


def read(folder: Path, **options: Any) -> Any:
    return dask.dataframe.read_parquet(folder, dtype_backend="pyarrow", **options)


def scored(frame: Any, scorer: Scorer) -> Any:
    return frame.map_partitions(scorer.map_pandas, meta=scorer.map_pandas(frame._meta))


def as_table(frame: Any) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


@pytest.mark.parametrize("by_row_groups", [False, True])
def test_each_row_has_the_vector_of_a_plain_loop(client: Any, bags: engines.Bags, by_row_groups: bool) -> None:
    frame = read(bags.folder, split_row_groups=by_row_groups)
    assert frame.npartitions == (12 if by_row_groups else 4)
    made = scored(frame, Scorer(bags.tables, weights={"songs": "weights"}))
    assert list(made.columns) == [*engines.COLUMNS, "vector"]
    found = made.compute()
    assert (made.dtypes == found.dtypes).all()
    engines.check(as_table(found), bags)


def test_columns_of_objects_are_scored_too(client: Any, bags: engines.Bags) -> None:
    """Without `dtype_backend`, lists are NumPy's arrays."""
    frame = dask.dataframe.read_parquet(bags.folder / "0.parquet")
    assert frame.dtypes["songs"] == object
    made = scored(frame, Scorer(bags.tables, weights={"songs": "weights"}))[["id", "vector"]].compute()
    vectors = np.array(made["vector"].tolist(), np.float32)
    assert np.array_equal(vectors.view(np.uint32), bags.expected[made["id"]].view(np.uint32))


def test_the_answer_goes_to_parquet_and_comes_back(client: Any, bags: engines.Bags, tmp_path: Path) -> None:
    scorer = Scorer(bags.tables, weights={"songs": "weights"})
    schema = scorer(bags.table.schema.empty_table()).schema
    scored(read(bags.folder), scorer).to_parquet(tmp_path / "scored", schema=schema, write_index=False)
    assert len(list((tmp_path / "scored").glob("*.parquet"))) == 4
    engines.check(pq.read_table(tmp_path / "scored"), bags)


def test_a_bad_row_is_an_error_or_null(client: Any, bags: engines.Bags, tmp_path: Path) -> None:
    frame = read(engines.write_bad(tmp_path, bags.table, {777: [1, 99_999], 31_000: [None], 99_999: [-1]}))
    with pytest.raises(
        IndexError, match=r"^row 777, id=777: songs\[1\] is 99999: out of range for a table of 500 rows"
    ):
        scored(frame, Scorer(bags.tables, row_id="id")).compute()
    found = scored(frame, Scorer(bags.tables, errors="null", reasons="why"))[["id", "vector", "why"]].compute()
    bad = found[found["why"].notna()]
    assert bad["id"].tolist() == [777, 31_000, 99_999]
    assert bad["vector"].isna().all()
    assert found["vector"].isna().sum() == 3
    assert bad["why"].tolist()[1] == "songs[0] is null: must be a number"


def test_a_task_has_one_thread(client: Any) -> None:
    assert client.gather([client.submit(granted_threads, pure=False) for _ in range(4)]) == [1] * 4
    assert granted_threads() is None


@engines.on_linux
def test_workers_open_the_tables_once_and_share_their_pages(client: Any, tmp_path: Path) -> None:
    path = engines.save_large(tmp_path / "tables.safetensors")
    every_row = pa.table({"songs": np.arange(100_000).reshape(-1, 100).tolist()})
    workers = list(client.scheduler_info()["workers"])
    assert len(workers) == 2

    def score(scorer: Scorer) -> Any:
        scorer(every_row)
        return os.getpid(), engines.opened_here(path)

    for _ in range(2):
        tasks = [client.submit(score, Scorer(path), workers=[worker], pure=False) for worker in workers * 3]
        seen = {(pid, *opened) for pid, opened in client.gather(tasks)}
        assert len(seen) == 2  # each process, and the one collection that it has
    seen = list(client.run(engines.mapped_bytes, path).values())
    assert engines.are_shared(seen, path.stat().st_size), seen


def test_a_worker_that_is_killed_leaves_each_row_once(client: Any, bags: engines.Bags, tmp_path: Path) -> None:
    scorer, marker = Scorer(bags.tables, weights={"songs": "weights"}), tmp_path / "killed"

    def score(frame: Any) -> Any:
        if 50_000 in frame["id"].values:
            engines.kill_once(marker)
        return scorer.map_pandas(frame)

    frame = read(bags.folder, split_row_groups=True)
    engines.check(as_table(frame.map_partitions(score, meta=scorer.map_pandas(frame._meta)).compute()), bags)
    assert marker.exists()
    client.wait_for_workers(2)


def test_the_page_shows_what_happens(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engines.run_the_page("Dask")
