"""The benchmarks of engines and of serving measure what they say: on a few rows, in one process where it can be."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import qembag

pa = pytest.importorskip("pyarrow")
pytest.importorskip("nanoarrow")
pytest.importorskip("psutil")
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
NUM_BAGS, NUM_ROWS = 1000, 500


@pytest.fixture
def data(benchmarks, tmp_path):
    made = benchmarks("engines_data").Data(tmp_path, NUM_BAGS, NUM_ROWS)
    benchmarks("engines_data").make(made)
    return made


@pytest.fixture
def bags(data):
    return pa.concat_tables(map(pq.read_table, data.files()))


@pytest.fixture
def scored(benchmarks, data, bags):
    from qembag.engines import Scorer

    return Scorer(data.table)(bags).select(["id", "vector"])


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_bags_are_in_several_files_and_row_groups(data, bags):
    files = [pq.ParquetFile(path) for path in data.files()]
    assert [file.num_row_groups for file in files] == [10] * 10
    assert bags["id"].to_pylist() == list(range(NUM_BAGS))
    lengths = [len(some) for some in bags["songs"].to_pylist()]
    assert (min(lengths), max(lengths)) == (0, 40)
    assert 18 < np.mean(lengths) < 22
    assert all(0 <= index < NUM_ROWS for some in bags["songs"].to_pylist() for index in some)


def test_a_plain_loop_is_what_is_expected(data, bags):
    rows = qembag.open_table(data.table, "songs")
    expected = np.load(data.expected)
    for number, bag in enumerate(bags["songs"].to_pylist()):
        assert np.array_equal(expected[number : number + 1], qembag.embedding_bag(rows, np.array(bag, np.int64), [0]))


def test_what_is_there_is_not_made_again(benchmarks, data):
    lost, *kept = data.files()
    before = [path.stat().st_mtime_ns for path in kept]
    content = lost.read_bytes()
    lost.unlink()
    benchmarks("engines_data").make(data)
    assert lost.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert not list(data.folder.rglob("*.unfinished"))


def damaged(scored, damage: str):
    if damage == "lost":
        return scored.slice(1)
    if damage == "twice":
        return pa.concat_tables([scored, scored.slice(7, 1)])
    if damage == "other id":
        return scored.set_column(0, "id", pa.array(np.arange(1, NUM_BAGS + 1)))
    if damage == "swapped":
        return scored.set_column(0, "id", pa.array([1, 0, *range(2, NUM_BAGS)]))
    values = scored["vector"].combine_chunks().flatten().to_numpy().copy()
    values.view(np.uint32)[12345] ^= 1
    offsets = np.arange(NUM_BAGS + 1, dtype=np.int32) * 64
    return scored.set_column(1, "vector", pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))


@pytest.mark.parametrize("damage", [None, "lost", "twice", "other id", "swapped", "a bit"])
def test_written_rows_are_compared(benchmarks, data, scored, tmp_path, damage):
    written = tmp_path / "written"
    written.mkdir()
    some = scored if damage is None else damaged(scored, damage)
    for number, first in enumerate(range(0, some.num_rows, 400)):
        pq.write_table(some.slice(first, 400), written / f"{number}.parquet")
    assert benchmarks("engines_data").is_same(data, written) == (damage is None)


@pytest.mark.parametrize("wrong", [None, [1.0] * 63, [1.0] * 63 + [None]], ids=["null", "short", "with a null"])
def test_vectors_of_other_lengths_are_refused(benchmarks, data, tmp_path, wrong):
    kind = pa.list_(pa.float32())
    vectors = pa.array([[1.0] * 64, wrong], kind)
    pq.write_table(pa.table({"id": [0, 1], "vector": vectors}), tmp_path / "written.parquet")
    with pytest.raises(ValueError, match="vectors must be 64 floats each"):
        benchmarks("engines_data").is_same(data, tmp_path / "written.parquet")


# ---- Contenders ------------------------------------------------------------------------------------------------------


def test_zeros_have_the_types_of_vectors_at_each_door(benchmarks, data, bags):
    from qembag.engines import Scorer

    scorer, zeros = Scorer(data.table), benchmarks("engines_maps").Zeros(str(data.table))
    table, other = scorer(bags), zeros(bags)
    assert other.schema == table.schema
    assert other.drop_columns("vector").equals(table.drop_columns("vector"))
    flat = other["vector"].combine_chunks()
    assert flat.flatten().to_numpy().tobytes() == bytes(4 * 64 * NUM_BAGS)
    assert set(np.diff(flat.offsets.to_numpy()).tolist()) == {64}
    batches = bags.to_batches(max_chunksize=70)
    for ours, theirs in zip(scorer.map_arrow(batches), zeros.map_arrow(batches), strict=True):
        assert (ours.schema, ours.num_rows) == (theirs.schema, theirs.num_rows)
    polars = pytest.importorskip("polars")
    assert zeros(polars.DataFrame(bags)).schema == scorer(polars.DataFrame(bags)).schema
    pandas = pytest.importorskip("pandas")
    frame = bags.to_pandas(types_mapper=pandas.ArrowDtype).iloc[5:]
    ours, theirs = scorer.map_pandas(frame), zeros.map_pandas(frame)
    assert ours.dtypes.to_dict() == theirs.dtypes.to_dict()
    assert ours.index.equals(theirs.index)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal")
@pytest.mark.parametrize("door", ["call", "map_arrow", "map_pandas"])
def test_a_worker_is_killed_by_one_row_once(data, bags, tmp_path, door):
    if door == "map_pandas":
        pytest.importorskip("pandas")
    program = f"""
import sys, pyarrow.parquet as pq
from benchmarks.engines_maps import Dying
dying = Dying({str(data.table)!r}, {NUM_BAGS // 2}, {str(tmp_path / "killed")!r})
table = pq.read_table({str(data.bags)!r})
other = table.slice(0, {NUM_BAGS // 2})
calls = {{"call": dying, "map_arrow": lambda t: list(dying.map_arrow(t.to_batches())),
         "map_pandas": lambda t: dying.map_pandas(t.to_pandas())}}
calls[{door!r}](other)
print("met", flush=True)
calls[{door!r}](table)
print("ended")
"""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for code, printed in ((-signal.SIGKILL, ["met"]), (0, ["met", "ended"])):
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert (done.returncode, done.stdout.split()) == (code, printed)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_rows_are_compared(benchmarks, tmp_path, capsys):
    saved = tmp_path / "results.json"
    options = ["--bags", str(NUM_BAGS), "--rows", str(NUM_ROWS), "--rounds", "1", "--engines", "pyarrow"]
    benchmarks("engines").main([str(tmp_path), *options, "--save", str(saved)])
    results = json.loads(saved.read_text())
    assert results["same"] == {"pyarrow": True}
    for sink in ("count", "write"):
        for runs in results["runs"]["pyarrow"][sink].values():
            assert len(runs) == 1
            assert runs[0]["seconds"] > 0
            assert runs[0]["rows"] == (NUM_BAGS if sink == "count" else None)
    assert not (tmp_path / "written").exists()
    assert "| pyarrow | write |" in capsys.readouterr().out


def runs_of(*seconds: float):
    return [{"seconds": each, "cpu": 2 * each, "rows": None, "peak": 1e6 * each} for each in seconds]


def test_a_report_of_engines_says_what_is_slower_and_what_is_wrong(benchmarks):
    both = {"Scorer": runs_of(12, 11, 30), "zeros": runs_of(10, 10, 20)}
    results = {
        "runs": {"spark": {"count": both, "write": both}, "dask": {"write": both}},
        "same": {"spark": True, "dask": False},
        "killed": {"spark": True},
        "bags": 1200,
        "rows": 5,
        "rounds": 3,
        "date": "today",
        "machine": {"processor": "one", "level": "avx2"},
        "versions": {"pyspark": "4"},
    }
    lines = benchmarks("engines").report(results)
    numbers = "100 | 120 | 1.20 (1.10 to 1.50) | 24.0 | 20.0 | 30 | 20"
    same = "each row once, the same bits"
    assert lines[2:5] == [
        f"| Spark | count | {numbers} |  |  |",
        f"| Spark | write | {numbers} | {same} | {same} |",
        f"| Dask | write | {numbers} | OTHER ROWS |  |",
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="proportional set sizes are Linux's")
def test_a_page_that_two_processes_map_is_counted_once(benchmarks):
    program = """
import mmap, os, sys
shared = mmap.mmap(-1, 100 << 20)
shared.write(bytes(100 << 20))
child = os.fork()
seen = sum(shared[::4096])
print(child, flush=True) if child else None
sys.stdin.read(1) if child else os.read(0, 1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        child = int(process.stdout.readline())
        found = benchmarks("processes").memory(process.pid)
        assert child in [one.pid for one in benchmarks("processes").tree(process.pid)]
        assert 100 << 20 < found < 150 << 20
        assert benchmarks("processes").cpu_seconds(process.pid) > 0
    finally:
        process.communicate("12")
    assert benchmarks("processes").memory(process.pid) == 0


# ---- Serving ---------------------------------------------------------------------------------------------------------


def test_requests_hold_the_bags_and_answers_are_read(benchmarks, tmp_path):
    serving = benchmarks("serving")
    serving.save_bodies(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*serving.KINDS, "no body"}
    for kind, (form, bags) in serving.KINDS.items():
        bodies = {path.read_bytes() for path in (tmp_path / kind).iterdir()}
        assert len(bodies) == serving.BODIES
        body = (tmp_path / kind / "7").read_bytes()
        read = json.loads(body)["indices"] if form == "JSON" else pa.ipc.open_stream(body).read_all().to_pydict()
        expected = serving.indices_of(bags, 7)
        assert {name: np.array(some).tolist() for name, some in read.items()} == {
            name: some.tolist() for name, some in expected.items()
        }
    vectors = np.float32([[0.1, 2], [3, -4]])
    assert serving.vectors_in(b'{"vectors": [[0.1, 2], [3, -4]]}', "JSON").tobytes() == vectors.tobytes()
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2)
    table, sink = pa.table({"vector": column}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert serving.vectors_in(sink.getvalue().to_pybytes(), "Arrow").tobytes() == vectors.tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status, got = 200, []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((self.headers["Content-Type"], body))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """At its end wrk closes connections on which it has asked."""


@pytest.fixture
def server():
    found = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_load_sends_each_body_in_turn_and_counts_errors(benchmarks, tmp_path, server, monkeypatch):
    serving = benchmarks("serving")
    serving.save_bodies(tmp_path)
    monkeypatch.setattr(Handler, "got", [])
    found = serving.load(server.server_port, tmp_path, "Arrow, 1 bag", 1, 1)
    assert 0 < found["requests"] <= len(Handler.got)
    assert found["median"] > 0
    bodies = [(tmp_path / "Arrow, 1 bag" / str(1 + number % 64)).read_bytes() for number in range(len(Handler.got) + 1)]
    # wrk may ask the script for a request before it sends some, to see what they look like.
    assert [body for _, body in Handler.got] in (bodies[:-1], bodies[1:])
    assert {kind for kind, _ in Handler.got} == {serving.TYPES["Arrow"]}
    monkeypatch.setattr(Handler, "status", 503)
    with pytest.raises(AssertionError, match="JSON, 1 bag, 8 clients"):
        serving.load(server.server_port, tmp_path, "JSON, 1 bag", 8, 1)


def test_a_report_of_serving_says_what_the_empty_one_takes(benchmarks):
    run = {"median": 2.0, "p99": 9.0, "replica_cpu": 0.5, "all_cpu": 1.5, "requests": 10, "memory": 5e6}
    ours = [{**run, "per_second": number} for number in (90, 100, 120)]
    empty = [{**run, "per_second": 200, "median": 1.0} for _ in range(3)]
    results = {
        "found": {
            "qembag": {"JSON, 1 bag": {"1": ours}},
            "reading": {"JSON, 1 bag": {"1": [{**one, "per_second": 150} for one in empty]}},
            "empty": {"JSON, 1 bag": {"1": empty}, "no body": {"8": empty}},
        },
        "rounds": 3,
        "seconds": 1,
        "date": "today",
        "machine": {"processor": "one", "level": "avx2", "cores": 2},
        "versions": {"ray": "2"},
    }
    lines = benchmarks("serving").report(results)
    assert lines[2] == (
        "| JSON, 1 bag | 1 | 100 | 150 | 200 | 0.67 (0.60 to 0.80) | 0.50 (0.45 to 0.60) "
        "| 2.0 | 1.0 | 1.0 | 9.0 | 9.0 | 9.0 | 0.50 | 0.50 | 0.50 |"
    )
    assert lines[3] == "| no body | 8 |  |  | 200 |  |  |  |  | 1.0 |  |  | 9.0 |  |  | 0.50 |"
    assert "30 requests to qembag" in lines[-1]
