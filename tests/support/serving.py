"""Bodies for a served collection, a replica in this process, and clients that keep asking."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pytest

import qembag

pa = pytest.importorskip("pyarrow")
pytest.importorskip("nanoarrow")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    pytest.importorskip("ray.serve")
    from starlette.requests import Request

    from qembag.engines.serve_limits import Limits
    from qembag.engines.serve_replica import EmbeddingBags

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
LIMITS = Limits(1 << 20, 1000, 10_000, 1 << 22, 5.0)


def collection_of(seed: int = 0) -> qembag.EmbeddingBagCollection:
    """Of two features."""
    rng = np.random.default_rng(seed)
    songs = qembag.quantize(rng.normal(size=(1000, 24)).astype(np.float32), bits=4)
    words = qembag.quantize(rng.normal(size=(50, 8)).astype(np.float32), bits=8)
    return qembag.EmbeddingBagCollection({"songs": songs, "words": words}, mode={"words": "mean"})


def saved(folder: Path, seed: int = 0) -> Path:
    path = folder / "tables.safetensors"
    collection_of(seed).save(path)
    return path


# ---- Bodies ----------------------------------------------------------------------------------------------------------

Bags = dict[str, list[list[int]]]


def bags_of(count: int, seed: int = 0, mean: int = 5) -> Bags:
    rng = np.random.default_rng(seed)
    rows = {"songs": 1000, "words": 50}
    return {
        feature: [rng.integers(0, size, rng.integers(0, 2 * mean)).tolist() for _ in range(count)]
        for feature, size in rows.items()
    }


def answer_of(collection: qembag.EmbeddingBagCollection, bags: Bags, weights: Any = None) -> np.ndarray:
    """What the collection itself gives."""
    flat = {name: ([i for bag in some for i in bag], np.cumsum([0, *map(len, some)])) for name, some in bags.items()}
    own = None if weights is None else {name: [w for bag in some for w in bag] for name, some in weights.items()}
    return collection(flat, per_sample_weights=own)


def json_body(bags: Any, **more: Any) -> bytes:
    return json.dumps({"indices": bags, **more}).encode()


def arrow_body(table: Any, **options: Any) -> bytes:
    """A stream of a table, a record batch, or of a dict of columns."""
    if isinstance(table, dict):
        lists = pa.list_(pa.int64())
        table = pa.table({name: pa.array(own, lists) if isinstance(own, list) else own for name, own in table.items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(table)
    return sink.getvalue().to_pybytes()


def vectors_in(body: bytes, kind: str) -> np.ndarray:
    if kind == JSON:
        return np.array(json.loads(body)["vectors"], np.float64).astype(np.float32)
    column = pa.ipc.open_stream(body).read_all()["vector"].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), column.type.list_size)


# ---- A replica in this process ---------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]

    @property
    def vectors(self) -> np.ndarray:
        assert self.status == 200, self.body
        return vectors_in(self.body, self.headers["content-type"])


class Replica:
    """What Serve calls, called as Serve does; without Serve, so that each request is looked up by itself."""

    def __init__(self, path: Path, limits: Limits = LIMITS, **config: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.actor = EmbeddingBags(limits, 1, 0.0, None)
        self.loop.run_until_complete(self.actor.reconfigure({"path": str(path), **config}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def post(self, body: bytes | Iterable[bytes], kind: str = JSON, **headers: str) -> Answer:
        return self.ask("POST", "/", body, {"content-type": kind, **headers})

    def ask(
        self, method: str, path: str, body: bytes | Iterable[bytes] = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "query_string": b"", "headers": given}
        chunks = iter([body] if isinstance(body, bytes) else body)

        async def receive() -> dict[str, Any]:
            chunk = next(chunks, None)
            if isinstance(chunk, float):
                await asyncio.sleep(chunk)
                chunk = b""
            return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def run() -> None:
            response = await self.actor(Request(scope, receive, send))
            await response(scope, receive, send)

        self.loop.run_until_complete(run())
        start, *rest = sent
        found = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], found, b"".join(part.get("body", b"") for part in rest))

    def check_health(self) -> None:
        """And what it starts, to its end."""

        async def run() -> None:
            await self.actor.check_health()
            if self.actor._background is not None:
                await self.actor._background

        self.loop.run_until_complete(run())


# ---- Clients ---------------------------------------------------------------------------------------------------------


def asked(port: int, body: bytes, kind: str = JSON, **headers: str) -> Answer:
    """One request over HTTP, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        return on(connection, body, kind, **headers)
    finally:
        connection.close()


def on(connection: http.client.HTTPConnection, body: bytes, kind: str = JSON, **headers: str) -> Answer:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/", body, {"content-type": kind, **given})
    response = connection.getresponse()
    found = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, found, response.read())


class Load:
    """Clients that ask one after the other, on connections that stay open, until the block ends.

    Each answer must be that of a version that it names: `expected` has the vectors of each.
    """

    def __init__(self, port: int, bags: Bags, expected: dict[str, np.ndarray], clients: int = 4) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._port, self._expected = port, expected
        self._bodies = [(json_body(bags), JSON), (arrow_body(bags), ARROW)]
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        body, kind = self._bodies[number % 2]
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self._ended.is_set():
            try:
                answer = on(connection, body, kind)
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {answer.body[:200]!r}")
                    continue
                version = answer.headers["qembag-version"]
                if not np.array_equal(answer.vectors, self._expected[version]):
                    self.failures.append(f"wrong vectors of version {version}")
                self.answers[version] += 1
            except Exception as error:  # noqa: BLE001 (any is a failure)
                self.failures.append(repr(error))
                connection.close()
        connection.close()


def raw(port: int, *parts: bytes, pause: float = 0.001, timeout: float = 60.0) -> bytes:
    """What comes back for bytes that need not be HTTP. No more are sent once something has come."""
    received = b""
    with (
        socket.create_connection(("127.0.0.1", port)) as connection,
        contextlib.suppress(ConnectionError, TimeoutError),
    ):
        for part in parts:
            connection.settimeout(timeout)
            connection.sendall(part)
            connection.settimeout(pause)
            with contextlib.suppress(TimeoutError):
                received += connection.recv(1 << 16)
                break
        connection.settimeout(timeout)
        while chunk := connection.recv(1 << 16):
            received += chunk
    return received
