"""A collection on Ray Serve, over HTTP: under load, while versions, replicas and applications change, and under abuse."""

from __future__ import annotations

import gc
import json
import os
import time
import urllib.request
import warnings
from typing import Any

import numpy as np
import pytest

from conftest import UNDER_SANITIZER
from support.commands import free_port
from support.serving import (
    ARROW,
    JSON,
    Load,
    answer_of,
    arrow_body,
    asked,
    bags_of,
    collection_of,
    json_body,
    raw,
    saved,
)

from qembag.engines.serve import deployment  # isort: skip (after what it needs is known to be there)

psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray's
    pytest.mark.slow,
    pytest.mark.skipif(UNDER_SANITIZER, reason="Ray's processes do not start there"),
]

BAGS = bags_of(3)
EXPECTED = [answer_of(collection_of(seed), BAGS) for seed in range(3)]
LIMITS = {"max_body_bytes": 1 << 20, "max_bags": 1000, "body_timeout_s": 2.0}
OPTIONS = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}, "health_check_period_s": 0.5}
TIMEOUT = 4.0


def start_ray(ray: Any) -> None:
    for tries_left in (2, 1, 0):
        try:
            ray.init("local", include_dashboard=False, num_cpus=8, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            ray.shutdown()
            if not tries_left or "timed out during startup" not in str(error):
                raise
        else:
            return


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Where Serve listens, in a Ray of this module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray import serve

        start_ray(ray)
        number = free_port()
        logs = {"log_level": "ERROR", "enable_access_log": False}
        serve.start(http_options={"port": number, "request_timeout_s": TIMEOUT}, logging_config=logs)
        yield number
        serve.shutdown()
        ray.shutdown()
        gc.collect()  # Ray's processes of which it has not heard that they ended
    patch.undo()


@pytest.fixture(scope="module")
def served(port, tmp_path_factory):
    """A file, and the application that serves it, until the last tests deploy others."""
    from ray import serve

    path = saved(tmp_path_factory.mktemp("serve"))
    serve.run(deployment(path, **LIMITS, options=OPTIONS), logging_config={"enable_access_log": False})
    return path


def version_of(port: int) -> str:
    return asked(port, json_body(BAGS)).headers["qembag-version"]


def wait_until(holds, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not come to be"
        time.sleep(0.1)


class Versions(dict):
    """The vectors of each version, of which those of files to come are not known yet."""

    def __missing__(self, version: str) -> np.ndarray:
        return EXPECTED[self.number_of_new]

    number_of_new = 1


def replicas() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "ServeReplica" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# ---- Answers ---------------------------------------------------------------------------------------------------------


def test_answers_and_refusals_over_http(served, port):
    for body, kind in ((json_body(BAGS), JSON), (arrow_body(BAGS), ARROW)):
        answer = asked(port, body, kind)
        assert np.array_equal(answer.vectors, EXPECTED[0])
        assert answer.headers["content-type"] == kind
    wrong = asked(port, json_body({"songs": [[5000]], "words": [[]]}))
    assert (wrong.status, wrong.error) == (
        400,
        "indices['songs'][0] is 5000 (bag 0): out of range for a table of 1000 rows",
    )
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as found:
        assert json.load(found)["version"] == answer.headers["qembag-version"]
    assert asked(port, json_body({"songs": [[]] * 1001, "words": [[]] * 1001})).status == 413


def test_requests_at_once_get_their_own_answers(served, port):
    versions = {version_of(port): EXPECTED[0]}
    with Load(port, BAGS, versions, clients=16) as load:
        bad = [asked(port, json_body({"songs": [[1000 + n]], "words": [[]]})) for n in range(20)]
    assert load.failures == []
    assert load.answers.total() > 16
    assert [f"is {1000 + n} (" in answer.error for n, answer in enumerate(bad)] == [True] * 20


# ---- Without a failed request ----------------------------------------------------------------------------------------


def test_a_replaced_file_is_rolled_in_under_load(served, port, tmp_path):
    first = version_of(port)
    with Load(port, BAGS, Versions({first: EXPECTED[0]})) as load:
        wait_until(lambda: load.answers[first] > 20)
        (tmp_path / "broken").write_bytes(b"{}")
        (tmp_path / "broken").replace(served)
        time.sleep(1.5)
        assert set(load.answers) == {first}
        saved(served.parent, seed=1)
        # Each replica looks for itself.
        wait_until(lambda: len(load.answers) == 2 and first not in {version_of(port) for _ in range(20)})
    assert load.failures == []
    second = version_of(port)
    saved(served.parent)
    wait_until(lambda: second not in {version_of(port) for _ in range(20)})


def test_a_killed_replica_is_replaced(served, port):
    from ray import serve

    victim, *_ = replicas()
    versions = {version_of(port): EXPECTED[0]}
    with Load(port, BAGS, versions) as load:
        victim.kill()
        wait_until(lambda: len(replicas()) == 2 and victim.pid not in {process.pid for process in replicas()})
        wait_until(lambda: serve.status().applications["default"].deployments["EmbeddingBags"].status == "HEALTHY")
        answered = load.answers.total()
        wait_until(lambda: load.answers.total() > answered + 100)
    # What it was answering when it died cannot be answered: a request each client.
    assert len(load.failures) <= 4, load.failures
    assert np.array_equal(asked(port, json_body(BAGS)).vectors, EXPECTED[0])


# ---- Abuse -----------------------------------------------------------------------------------------------------------


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def test_slow_huge_and_malformed_requests(served, port):
    assert b" 400 " in raw(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 400)  # TLS
    assert b" 400 " in raw(port, b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n")
    assert b" 413 " in raw(port, HEAD + b"Content-Length: 99999999999\r\n\r\n")
    chunk = b"%x\r\n" % (1 << 16) + b" " * (1 << 16) + b"\r\n"
    assert b" 413 " in raw(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40)
    start = time.monotonic()
    slow = raw(port, HEAD + b"Content-Length: 100\r\n\r\n", *[b" "] * 10, pause=0.5)
    assert b" 408 " in slow
    assert time.monotonic() - start < 10
    body = json_body(BAGS)
    many = (HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 5
    close = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    assert raw(port, many + close).count(b"HTTP/1.1 200 OK") == 6  # one after the other, in order


def test_memory_stays_flat_under_abuse(served, port):
    body = b'{"indices": {"songs": [' + b"[]," * 300_000 + b"[]]}}"
    vast = b" " * (2 << 20)

    def abuse(times: int) -> None:
        for _ in range(times):
            assert asked(port, body).status == 413
            assert asked(port, vast[: 1 << 20]).status == 400
            assert b" 413 " in raw(port, HEAD + b"Content-Length: %d\r\n\r\n" % len(vast) + vast)
            assert asked(port, arrow_body(BAGS)[:-50], ARROW).status == 400

    abuse(15)
    before = {process.pid: process.memory_info().rss for process in replicas()}
    abuse(30)
    after = {process.pid: process.memory_info().rss for process in replicas()}
    assert before.keys() == after.keys()
    assert all(after[pid] - before[pid] < 40 << 20 for pid in before), (before, after)


def test_nothing_is_left_of_a_request_whose_client_goes(served, port):
    for _ in range(20):
        raw(port, HEAD + b"Content-Length: 1000\r\n\r\n{", timeout=0.05)
    assert np.array_equal(asked(port, json_body(BAGS)).vectors, EXPECTED[0])
    assert os.environ.get("RAY_USAGE_STATS_ENABLED") == "0"


# ---- Other applications, without a failed request -----------------------------------------------------------------------


def test_a_new_application_takes_the_place_of_the_old_one(served, port, tmp_path):
    from ray import serve

    first = version_of(port)
    before = {process.pid for process in replicas()}
    other = tmp_path / "other.safetensors"
    collection_of(1).save(other)
    with Load(port, BAGS, Versions({first: EXPECTED[0]})) as load:
        wait_until(lambda: load.answers[first] > 20)
        serve.run(deployment(other, **LIMITS, options=OPTIONS), logging_config={"enable_access_log": False})
        wait_until(lambda: not before & {process.pid for process in replicas()})
        wait_until(lambda: load.answers[max(load.answers)] > 20)
    assert load.failures == []
    assert len(load.answers) == 2


def test_another_path_is_rolled_in_by_a_config_without_a_restart(port, tmp_path):
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        collection_of(seed).save(path)

    def deploy(path: object) -> None:
        """What `serve deploy` does with a config file."""
        application = {
            "name": "default",
            "import_path": "qembag.engines.serve:application",
            "args": {"path": str(paths[0])},
            "deployments": [{"name": "EmbeddingBags", "user_config": {"path": str(path), "mode": {"words": "mean"}}}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]), _blocking=True)

    serve.delete("default")
    deploy(paths[0])
    first = version_of(port)
    processes = {process.pid for process in replicas()}
    with Load(port, BAGS, Versions({first: EXPECTED[0]})) as load:
        wait_until(lambda: load.answers[first] > 20)
        deploy(paths[1])
        wait_until(lambda: len(load.answers) == 2)
    assert load.failures == []
    assert {process.pid for process in replicas()} == processes
