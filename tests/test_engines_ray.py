"""A Scorer in the workers of Ray Data: each row once with the vector of a plain loop, workers that die, threads, memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("nanoarrow", "pyarrow"):
    pytest.importorskip(name)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    pytest.importorskip("ray.data")
    import ray.data

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conftest import child_environment
from qembag.engines import Scorer
from support import engines

# Ray's own: files that its processes log to, functions of pandas that are to go.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::UserWarning:ray"),
]


@pytest.fixture(scope="module")
def bags() -> engines.Bags:
    return engines.bags_in_files()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Of two CPUs. Its folder has a short name, for sockets are in it."""
    folder = tempfile.mkdtemp(prefix="qr")
    before = engines.processes()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        started = engines.processes() - before
        yield
        started |= engines.processes() - before
        ray.shutdown()
    engines.wait_for_the_end_of(started)
    shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path) -> Any:
    return ray.data.read_parquet(str(folder), include_paths=True)


def mapped(dataset: Any, work: Any, **options: Any) -> Any:
    return dataset.map_batches(work, batch_format="pyarrow", batch_size=5000, **options)


def as_table(dataset: Any) -> pa.Table:
    return pa.concat_tables(ray.get(dataset.to_arrow_refs()))


def one_actor(**options: Any) -> dict[str, Any]:
    return {"compute": ray.data.ActorPoolStrategy(size=1), **options}


def test_each_row_has_the_vector_of_a_plain_loop(bags: engines.Bags, tmp_path: Path) -> None:
    options = one_actor(
        fn_constructor_args=(str(bags.tables),), fn_constructor_kwargs={"weights": {"songs": "weights"}}
    )
    made = mapped(read(bags.folder), Scorer, **options)
    made.write_parquet(str(tmp_path / "scored"))
    found = pq.read_table(tmp_path / "scored")
    assert found.column_names == [*engines.COLUMNS, "path", "vector"]
    assert pa.types.is_list(found.schema.field("vector").type)
    engines.check(found, bags)
    for number, path in zip(found["id"].to_pylist()[::1000], found["path"].to_pylist()[::1000], strict=True):
        assert path.endswith(f"{number // 25_000}.parquet")
    assert ray.data.read_parquet(str(tmp_path / "scored")).count() == len(bags.expected)


@pytest.mark.parametrize("list_size", ["variable", "fixed"])
def test_tasks_score_with_an_object_too(bags: engines.Bags, list_size: str) -> None:
    scorer = Scorer(bags.tables, weights={"songs": "weights"}, list_size=list_size)
    found = as_table(mapped(read(bags.folder), scorer))
    engines.check(found, bags)
    assert found.schema.field("vector").type == scorer(bags.table.schema.empty_table()).schema.field("vector").type


def test_a_bad_row_is_an_error_or_null(bags: engines.Bags, tmp_path: Path) -> None:
    bad = read(engines.write_bad(tmp_path, bags.table, {777: [1, 99_999], 31_000: [None], 99_999: [-1]}))
    words = r"row \d+, path='.*part.parquet', id=777: songs\[1\] is 99999: out of range for a table of 500 rows"
    with pytest.raises(ray.exceptions.RayTaskError, match=words):
        mapped(bad.limit(5000), Scorer(bags.tables, row_id=["path", "id"])).materialize()
    found = as_table(mapped(bad, Scorer(bags.tables, errors="null", reasons="why"))).sort_by("id")
    assert found["vector"].null_count == 3
    wrong = found.filter(found["why"].is_valid())
    assert wrong["id"].to_pylist() == [777, 31_000, 99_999]
    assert wrong["vector"].null_count == 3
    assert wrong["why"].to_pylist()[1] == "songs[0] is null: must be a number"


def test_a_worker_has_the_threads_of_its_cpus() -> None:
    def work(batch: pa.Table) -> pa.Table:
        from qembag.engines.granted import granted_threads

        return pa.table({"granted": [granted_threads()]})

    class Work:
        def __call__(self, batch: pa.Table) -> pa.Table:
            return work(batch)

    rows = ray.data.range(1)
    for cpus, threads in ((0.5, 1), (1, 1), (2, 2)):
        assert as_table(mapped(rows, work, num_cpus=cpus))["granted"].to_pylist() == [threads]
    for cpus, threads in ((0.5, 1), (1, 1)):
        assert as_table(mapped(rows, Work, **one_actor(num_cpus=cpus)))["granted"].to_pylist() == [threads]


class Seen(Scorer):
    """Says what its process has opened and mapped."""

    def __call__(self, batch: Any) -> Any:
        super().__call__(pa.table({"songs": np.arange(100_000).reshape(-1, 100).tolist()}))
        path = Path(self._opening.path)
        [collection] = engines.opened_here(path)
        read, share = engines.mapped_bytes(path)
        return pa.table({"pid": [os.getpid()], "collection": [collection], "read": [read], "share": [share]})


@engines.on_linux
def test_workers_open_the_tables_once_and_share_their_pages(tmp_path: Path) -> None:
    path = engines.save_large(tmp_path / "tables.safetensors")
    actors = [ray.remote(num_cpus=0.5)(Seen).remote(str(path)) for _ in range(2)]
    try:
        first, again = (
            pa.concat_tables(ray.get([actor.__call__.remote(None) for actor in actors])).to_pylist() for _ in range(2)
        )
    finally:
        for actor in actors:
            ray.kill(actor)
    assert [row["collection"] for row in first] == [row["collection"] for row in again]
    assert len({row["pid"] for row in again}) == 2
    assert engines.are_shared([(row["read"], row["share"]) for row in again], path.stat().st_size), again


class Mortal(Scorer):
    def __init__(self, *arguments: Any, marker: Path, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.marker = marker

    def __call__(self, batch: Any) -> Any:
        if 50_000 in batch["id"].to_numpy():
            engines.kill_once(self.marker)
        return super().__call__(batch)


@pytest.mark.parametrize("by", ["actors", "tasks"])
def test_a_worker_that_is_killed_leaves_each_row_once(bags: engines.Bags, by: str, tmp_path: Path) -> None:
    marker, weights = tmp_path / "killed", {"songs": "weights"}
    if by == "actors":
        kwargs = {"weights": weights, "marker": marker}
        made = mapped(
            read(bags.folder), Mortal, **one_actor(fn_constructor_args=(bags.tables,), fn_constructor_kwargs=kwargs)
        )
    else:
        made = mapped(read(bags.folder), Mortal(bags.tables, weights=weights, marker=marker))
    engines.check(as_table(made), bags)
    assert marker.exists()


def test_the_page_shows_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engines.run_the_page("Ray Data")
