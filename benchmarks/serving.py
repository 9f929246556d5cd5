"""`qembag serve` under load, beside the same command with replicas that answer an empty body.

    python -m benchmarks.serving FOLDER --write    # half an hour; writes docs/serving.md

Load is of wrk, in a process of its own: so many clients, each of which asks again when it has its answer. A round is a
fresh server of each kind; they take turns, and get the same requests: bags of 20 indices for each of four features of
64 elements, as JSON and as Arrow. An "empty" replica answers at once, a "reading" one when it has the request's body,
for which it calls Serve's proxy back; "no body" is an empty request. wrk corrects its percentiles for what a client
would have asked while it waited for a slow answer: they are above those of the requests alone. Answers are compared
with those of the collection before and after the load, and an error under load ends the benchmark. One replica, the
command's own options. Needs `qembag[serve]`, psutil, and wrk (a Debian package).
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

import qembag

from . import machine, processes, quality
from .collection import shown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"
BEGIN = "<!-- written by benchmarks.serving -->"
FEATURES, NUM_ROWS, DIM, BITS, LENGTH = ("users", "songs", "words", "places"), 100_000, 64, 8, 20
BODIES = 64  # different requests of a kind
CLIENTS = (1, 8, 64)
TYPES = {"JSON": "application/json", "Arrow": "application/vnd.apache.arrow.stream"}
EMPTY = "benchmarks.serving_empty"
SERVERS = {"qembag": ["qembag", "serve"], "reading": [EMPTY, "Reading"], "empty": [EMPTY, "Empty"]}
NO_BODY = "no body"
KINDS = {f"{form}, {bags} bag{'s' * (bags > 1)}": (form, bags) for form in TYPES for bags in (1, 32)}
# As Ray names the processes.
PROXY, REPLICA = "ProxyActor", "ServeReplica"

# By server, kind of request and number of clients: what was found in each round.
Found = dict[str, dict[str, dict[str, list[dict[str, float]]]]]


# ---- Requests --------------------------------------------------------------------------------------------------------


def make_tables(path: Path) -> None:
    if path.exists():
        return
    rng = np.random.default_rng(0)
    floats = {name: rng.normal(size=(NUM_ROWS, DIM)).astype(np.float32) for name in FEATURES}
    qembag.EmbeddingBagCollection({name: qembag.quantize(rows, BITS) for name, rows in floats.items()}).save(path)


def indices_of(bags: int, number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([bags, number])
    return {name: rng.integers(0, NUM_ROWS, (bags, LENGTH)) for name in FEATURES}


def body_of(form: str, bags: int, number: int) -> bytes:
    lists = {name: indices.tolist() for name, indices in indices_of(bags, number).items()}
    if form == "JSON":
        return json.dumps({"indices": lists}).encode()
    table, sink = pa.table(lists), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def save_bodies(folder: Path) -> None:
    for kind, given in KINDS.items():
        (folder / kind).mkdir()
        for number in range(1, BODIES + 1):
            (folder / kind / str(number)).write_bytes(body_of(*given, number))
    (folder / NO_BODY).mkdir()
    (folder / NO_BODY / "1").write_bytes(b"")


def vectors_in(answer: bytes, form: str) -> np.ndarray:
    if form == "JSON":
        return np.array(json.loads(answer)["vectors"], np.float32)
    column = pa.ipc.open_stream(answer).read_all()["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def check_answers(port: int, collection: qembag.EmbeddingBagCollection) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for kind, (form, bags) in KINDS.items():
        for number in range(1, 4):
            connection.request("POST", "/", body_of(form, bags, number), {"Content-Type": TYPES[form]})
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise AssertionError(f"{kind}: status {answer.status}, {body[:200]!r}")
            if vectors_in(body, form).tobytes() != collection(indices_of(bags, number)).tobytes():
                raise AssertionError(f"{kind}: an answer must have the bits of the collection")
    connection.close()


# ---- Servers and load ------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
        return port


@contextmanager
def serving(server: str, tables: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", *SERVERS[server], str(tables), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | settings)
    try:
        line = process.stdout.readline()
        if not line.startswith("Serving"):
            raise RuntimeError(f"the server of {server} did not start: {line!r}, {process.wait()}")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


def part(server: subprocess.Popen[str], name: str) -> psutil.Process:
    """The proxy, or the only replica."""
    (found,) = (process for process in processes.tree(server.pid) if name in " ".join(process.cmdline()))
    return found


def load(port: int, folder: Path, kind: str, clients: int, seconds: float) -> dict[str, float]:
    """Milliseconds and counts, of wrk."""
    content = TYPES[KINDS[kind][0]] if kind in KINDS else TYPES["JSON"]
    command = ["wrk", "--threads", "1", "--connections", str(clients), "--duration", f"{seconds:g}s"]
    command += ["--timeout", "30s", "--script", str(Path(__file__).with_suffix(".lua")), f"http://127.0.0.1:{port}/"]
    command += ["--", str(folder / kind), str(len(os.listdir(folder / kind))), content]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    if found["errors"]:
        raise AssertionError(f"{kind}, {clients} clients: {found}")
    return found


def loaded(
    server: subprocess.Popen[str], port: int, folder: Path, kind: str, clients: int, seconds: float
) -> dict[str, float]:
    """What wrk found; milliseconds of processors a request, in the replica and in all of Ray; the replica's memory."""
    load(port, folder, kind, clients, min(1, seconds))
    replica = part(server, REPLICA)
    before = processes.cpu_seconds(replica.pid), processes.cpu_seconds(server.pid)
    found = load(port, folder, kind, clients, seconds)
    if not found["requests"]:
        raise AssertionError(f"{kind}, {clients} clients: no answer within {seconds:g} s")
    after = processes.cpu_seconds(replica.pid), processes.cpu_seconds(server.pid)
    own, all_ = (1e3 * (end - start) / found["requests"] for start, end in zip(before, after, strict=True))
    per_second = found["requests"] / found["seconds"]
    memory = replica.memory_full_info().pss
    return {**found, "per_second": per_second, "replica_cpu": own, "all_cpu": all_, "memory": memory}


def measure(tables: Path, folder: Path, rounds: int, seconds: float) -> Found:
    collection = qembag.EmbeddingBagCollection.from_file(tables)
    found: Found = {}
    for number in range(rounds):
        for server in list(SERVERS)[:: 1 if number % 2 == 0 else -1]:
            kinds = [*KINDS, *([NO_BODY] if server == "empty" else [])]
            port = free_port()
            with serving(server, tables, port) as process:
                if server == "qembag":
                    check_answers(port, collection)
                for kind, clients in ((kind, clients) for kind in kinds for clients in CLIENTS):
                    some = loaded(process, port, folder, kind, clients, seconds)
                    found.setdefault(server, {}).setdefault(kind, {}).setdefault(str(clients), []).append(some)
                    print(f"round {number}, {server}, {kind}, {clients}: {some}", file=sys.stderr, flush=True)
                if server == "qembag":
                    check_answers(port, collection)
    return found


# ---- Telling ---------------------------------------------------------------------------------------------------------


def cells_of(found: Found, kind: str, clients: str) -> list[str]:
    runs = {server: found[server].get(kind, {}).get(clients, []) for server in SERVERS}
    cells = []
    for name, digits in (("per_second", 0), ("median", 1), ("p99", 1), ("replica_cpu", 2)):
        cells += [f"{median(run[name] for run in some):,.{digits}f}" if some else "" for some in runs.values()]
    ours, *others = ([run["per_second"] for run in some] for some in runs.values())
    ratios = [[one / own for one, own in zip(ours, other, strict=False)] for other in others]
    return [*cells[:3], *(shown(some) if some else "" for some in ratios), *cells[3:]]


def report(results: dict[str, Any]) -> list[str]:
    found: Found = results["found"]
    ours_and_others = list(SERVERS)
    columns = ["requests a second, qembag", *ours_and_others[1:], *(f"ratio to {name}" for name in ours_and_others[1:])]
    for name in ("median, ms", "99th percentile, ms", "replica's processor, ms a request"):
        columns += [f"{name}, qembag", *ours_and_others[1:]]
    lines = [f"| request | clients | {' | '.join(columns)} |", "| --- | --: |" + " --: |" * len(columns)]
    for kind, by_clients in found["empty"].items():
        lines += [f"| {kind} | {number} | {' | '.join(cells_of(found, kind, number))} |" for number in by_clients]
    ours = [run for by_clients in found["qembag"].values() for runs in by_clients.values() for run in runs]
    where, versions = results["machine"], results["versions"]
    memory = [[run["memory"] / 1e6 for run in runs] for runs in by_round(found["qembag"])]
    half, end = (median(some[place] for some in memory) for place in (len(memory[0]) // 2 - 1, -1))
    caption = (
        "*An empty replica answers nothing at once, a reading one when it has the request's body. "
        f"Bags of {LENGTH} indices for each of {len(FEATURES)} features of {NUM_ROWS:,} x {DIM}, {BITS} bits; one "
        f"replica; medians (rounds: {results['rounds']}) of fresh servers, {results['seconds']:g} s each; "
        f"{sum(run['requests'] for run in ours):,.0f} requests to qembag, errors: 0. Proportional set size of the "
        f"replica after half of the loads and after all: {half:,.0f} MB and "
        f"{end:,.0f} MB. {results['date']}; {where['processor']}, {where['level']}, "
        f"cores: {where['cores']}, which wrk shares; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.*"
    )
    return [*lines, "", caption]


def by_round(found: dict[str, dict[str, list[dict[str, float]]]]) -> list[list[dict[str, float]]]:
    """The loads of each round, in their order."""
    cells = [runs for by_clients in found.values() for runs in by_clients.values()]
    return [list(some) for some in zip(*cells, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the tables are made here once, and kept")
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write the results to this file")
    parser.add_argument("--write", action="store_true", help="put the table into docs/serving.md")
    options = parser.parse_args(arguments)
    if shutil.which("wrk") is None:
        raise SystemExit("needs wrk: apt-get install wrk")
    options.folder.mkdir(parents=True, exist_ok=True)
    tables = options.folder.absolute() / "serving.safetensors"
    make_tables(tables)
    with tempfile.TemporaryDirectory() as folder:
        save_bodies(Path(folder))
        found = measure(tables, Path(folder), options.rounds, options.seconds)
    results = {
        "found": found,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {package: machine.version(package) for package in ("ray", "pyarrow", "numpy")},
    }
    quality.tell(PAGE, BEGIN, report(results), write_page=options.write, results=results, save=options.save)


if __name__ == "__main__":
    main()
