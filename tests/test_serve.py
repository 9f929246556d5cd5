"""What a replica answers: in JSON and Arrow, to what is right and to what is wrong. Without Ray's processes."""

from __future__ import annotations

import asyncio
import json
import os

import numpy as np
import pytest

import qembag
from support.serving import (
    ARROW,
    JSON,
    LIMITS,
    EmbeddingBags,
    Replica,
    answer_of,
    arrow_body,
    bags_of,
    collection_of,
    json_body,
    pa,
    saved,
    vectors_in,
)

from qembag.engines import serve_replica  # isort: skip (after what it needs is known to be there)
from qembag.engines.serve import application, deployment  # isort: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def collection():
    return collection_of()


@pytest.fixture(scope="module")
def replica(path):
    with Replica(path) as made:
        yield made


# ---- Right answers ---------------------------------------------------------------------------------------------------


def test_streams_of_an_earlier_version_of_arrows_format_are_read(replica, collection):
    bags = bags_of(3)
    body = arrow_body(bags, metadata_version=pa.ipc.MetadataVersion.V4)
    assert np.array_equal(replica.post(body, ARROW).vectors, answer_of(collection, bags))


@pytest.mark.parametrize("count", [0, 1, 3, 500])  # the last in another thread
@pytest.mark.parametrize("kind", [JSON, ARROW])
@pytest.mark.parametrize("accept", [None, JSON, ARROW, "*/*", f"text/html, {ARROW};q=0.5, {JSON};q=0.1"])
def test_answers_have_the_collections_bits_in_each_form(replica, collection, count, kind, accept):
    bags = bags_of(count, seed=count)
    body = json_body(bags) if kind == JSON else arrow_body(bags)
    answer = replica.post(body, kind, **({} if accept is None else {"accept": accept}))
    wanted = kind if accept in (None, "*/*") else accept if accept in (JSON, ARROW) else ARROW
    assert (answer.status, answer.headers["content-type"]) == (200, wanted)
    expected = answer_of(collection, bags)
    found = answer.vectors.reshape(expected.shape)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_columns_of_each_kind_of_lists_are_read(replica, collection):
    bags = {"songs": [[1, 2], [999, 3]], "words": [[5, 6], [7, 8]]}
    expected = answer_of(collection, bags)
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 2)):
        table = pa.table({name: pa.array(some, kind) for name, some in bags.items()})
        assert np.array_equal(replica.post(arrow_body(table), ARROW).vectors, expected)
        chunks = pa.concat_tables([table.slice(1, 1), table.slice(0, 1)])
        assert np.array_equal(replica.post(arrow_body(chunks), ARROW).vectors, expected[::-1])
    more = table.append_column("other", [["a", "b"]])
    assert np.array_equal(replica.post(arrow_body(more), ARROW).vectors, expected)


def test_weights_are_taken_from_json(replica, collection):
    bags = {"songs": [[1, 2], [3], []], "words": [[4], [5, 6], [7]]}
    weights = {"songs": [[0.1, -2], [1e-3], []]}
    answer = replica.post(json_body(bags, per_sample_weights=weights))
    assert np.array_equal(answer.vectors, answer_of(collection, bags, weights))


def test_json_says_null_for_what_it_has_no_number_for(tmp_path):
    rows = np.array([[np.nan, 1], [np.inf, -np.inf], [-0.0, 1e-45], [3.4e38, 0.1]], np.float32)
    path = tmp_path / "t.safetensors"
    qembag.EmbeddingBagCollection({"t": rows}, mode="max").save(path)
    body = json_body({"t": [[0], [1], [2], [3]]})
    with Replica(path) as replica:
        text = replica.post(body).body
        assert json.loads(text)["vectors"][:2] == [[None, 1], [None, None]]
        found = vectors_in(text, JSON)[2:]
        assert np.array_equal(found.view(np.uint32), rows[2:].view(np.uint32))  # also the sign of zero
        exact = replica.post(body, accept=ARROW).vectors
        assert np.array_equal(exact[1:].view(np.uint32), rows[1:].view(np.uint32))


def test_vectors_of_float16_are_served_as_such(path):
    bags = bags_of(4)
    expected = qembag.EmbeddingBagCollection.from_file(path, dtype="float16")(
        {name: ([i for bag in some for i in bag], np.cumsum([0, *map(len, some)])) for name, some in bags.items()}
    )
    with Replica(path, dtype="float16") as replica:
        assert np.array_equal(replica.post(arrow_body(bags), ARROW).vectors, expected)
        assert replica.post(arrow_body(bags), ARROW).vectors.dtype == np.float16
        assert np.array_equal(replica.post(json_body(bags)).vectors.astype(np.float16), expected)


def test_get_tells_what_is_served(replica, collection):
    answer = replica.ask("GET", "/")
    found = json.loads(answer.body)
    assert answer.status == 200
    assert (found["dim"], found["dtype"], list(found["features"])) == (32, "float32", ["songs", "words"])
    assert found["features"]["words"] == {
        "table": "words",
        "num_embeddings": 50,
        "mode": "mean",
        "dim": 8,
        "columns": [24, 32],
    }
    assert found["limits"] == LIMITS._asdict()
    assert found["version"] == answer.headers["qembag-version"]


# ---- Requests together -----------------------------------------------------------------------------------------------


def asked_of(replica: Replica, body: bytes, kind: str = JSON) -> serve_replica.Asked:
    return serve_replica._asked(body, kind, replica.actor._served, LIMITS)


def test_requests_together_get_their_own_rows_in_one_call(replica, collection, monkeypatch):
    calls = []
    monkeypatch.setattr(
        qembag.EmbeddingBagCollection,
        "__call__",
        lambda self, *a, _whole=qembag.EmbeddingBagCollection.__call__, **k: calls.append(1) or _whole(self, *a, **k),
    )
    many = [bags_of(count, seed=count) for count in (3, 0, 1, 7)]
    weights = {"songs": [[0.5] * len(bag) for bag in many[3]["songs"]]}
    requests = [asked_of(replica, json_body(many[0])), asked_of(replica, arrow_body(many[1]), ARROW)]
    requests += [asked_of(replica, arrow_body(many[2]), ARROW)]
    requests += [asked_of(replica, json_body(many[3], per_sample_weights=weights))]
    found = asyncio.run(replica.actor._look_up_together(requests))
    assert len(calls) == 1
    for own, bags, given in zip(found, many, [None, None, None, weights], strict=True):
        assert np.array_equal(own, answer_of(collection, bags, given))


def test_an_error_of_one_request_is_its_own(replica, collection):
    good = bags_of(3)
    bad = {"songs": [[1], [2, 5000]], "words": [[], []]}
    requests = [asked_of(replica, body) for body in map(json_body, (good, bad, good))]
    first, error, last = asyncio.run(replica.actor._look_up_together(requests))
    assert np.array_equal(first, answer_of(collection, good))
    assert np.array_equal(last, first)
    assert str(error) == "indices['songs'][2] is 5000 (bag 1): out of range for a table of 1000 rows"
    assert type(error) is IndexError


def test_bags_of_different_numbers_do_not_make_up_for_each_other(replica):
    # Together they would have as many bags of each feature.
    for bags in ({"songs": [[1], [2]], "words": [[1]]}, {"songs": [[1]], "words": [[1], [2]]}):
        assert asked_of(replica, json_body(bags)).bags is None
        assert asked_of(replica, arrow_body({"songs": bags["songs"]}), ARROW).bags is None
        assert replica.post(json_body(bags)).status == 400


def test_a_request_keeps_the_version_that_it_began_with(tmp_path, collection):
    bags = bags_of(3)
    with Replica(saved(tmp_path)) as replica:
        old = asked_of(replica, json_body(bags))
        saved(tmp_path, seed=1)
        replica.check_health()
        new = asked_of(replica, json_body(bags))
        found = asyncio.run(replica.actor._look_up_together([new, old, new]))
    assert np.array_equal(found[1], answer_of(collection, bags))
    assert np.array_equal(found[0], answer_of(collection_of(1), bags))
    assert np.array_equal(found[2], found[0])


# ---- Versions --------------------------------------------------------------------------------------------------------


def test_a_replaced_file_is_rolled_in_and_a_broken_one_is_not(tmp_path, caplog):
    path, body = saved(tmp_path), json_body(bags_of(3))
    with Replica(path) as replica:
        first = replica.post(body)
        replica.check_health()
        assert replica.post(body).headers["qembag-version"] == first.headers["qembag-version"]
        (tmp_path / "broken").write_bytes(b"{}" * 50)
        (tmp_path / "broken").replace(path)  # written in place, the mapped rows would change or be gone
        for _ in range(3):
            replica.check_health()
        assert replica.post(body).body == first.body
        assert caplog.text.count("cannot be opened") == 1  # not again each time
        path.unlink()
        replica.check_health()
        assert replica.post(body).body == first.body
        saved(tmp_path, seed=1)
        replica.check_health()
        second = replica.post(body)
    assert second.headers["qembag-version"] != first.headers["qembag-version"]
    assert np.array_equal(second.vectors, answer_of(collection_of(1), bags_of(3)))


def test_a_file_of_the_same_size_and_time_is_rolled_in(tmp_path):
    path, body = saved(tmp_path), json_body(bags_of(3))
    found = path.stat()
    with Replica(path) as replica:
        replica.post(body)
        assert saved(tmp_path, seed=1).stat().st_size == found.st_size
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        replica.check_health()
        assert np.array_equal(replica.post(body).vectors, answer_of(collection_of(1), bags_of(3)))


def test_another_path_is_rolled_in_by_reconfigure(tmp_path, caplog):
    body = json_body(bags_of(3))
    with Replica(saved(tmp_path)) as replica:
        first = replica.post(body)
        other = tmp_path / "other.safetensors"
        replica.loop.run_until_complete(replica.actor.reconfigure({"path": str(other), "mode": "sum"}))
        assert replica.post(body).body == first.body
        assert "cannot be opened" in caplog.text
        collection_of(1).save(other)  # it is tried again
        replica.check_health()
        assert json.loads(replica.ask("GET", "/").body)["features"]["words"]["mode"] == "sum"
        assert replica.post(body).headers["qembag-version"] != first.headers["qembag-version"]


def test_the_first_file_must_open(tmp_path):
    actor = EmbeddingBags(LIMITS, 1, 0.0, None)
    with pytest.raises(FileNotFoundError):
        asyncio.run(actor.reconfigure({"path": str(tmp_path / "none.safetensors")}))
    with pytest.raises(ValueError, match="user_config must have path"):
        asyncio.run(actor.reconfigure({"path": "a", "mod": "sum"}))
    path = saved(tmp_path)
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float16' to be served, got bfloat16"):
        asyncio.run(actor.reconfigure({"path": str(path), "dtype": "bfloat16"}))


# ---- The application -------------------------------------------------------------------------------------------------


def test_an_application_has_serves_options():
    made = deployment("t.safetensors", features={"a": "b"}, dtype=np.float16, options={"num_replicas": 3})
    found = made._bound_deployment
    assert (found.name, found.num_replicas, found.max_ongoing_requests) == ("EmbeddingBags", 3, 64)
    assert found.user_config["features"] == {"a": "b"}
    assert found.user_config["dtype"] == "float16"
    assert found.user_config["path"].endswith("/t.safetensors")
    same = application({"path": "/t.safetensors", "max_bags": 7, "options": {"max_queued_requests": 5}})
    assert same._bound_deployment._deployment_config.max_queued_requests == 5


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({}, TypeError, "args must have a path, got none"),
        ({"path": "t"}, ValueError, "args must have an absolute path, got 't'"),
        ({"path": "/t", "bits": 4}, TypeError, "args must be of path, features, .* got 'bits'"),
        ({"path": "/t", "max_bags": 0}, ValueError, "max_bags must be at least 1, got 0"),
        ({"path": "/t", "max_bags": True}, TypeError, "max_bags must be a whole number, got"),
        ({"path": "/t", "max_answer_bytes": 1 << 40}, ValueError, "max_answer_bytes must be from 1 to 536870912"),
        ({"path": "/t", "body_timeout_s": 0}, ValueError, "body_timeout_s must be a number of seconds above 0, got 0"),
        ({"path": "/t", "batch_wait_timeout_s": "a"}, TypeError, "batch_wait_timeout_s must be a number of seconds"),
        ({"path": "/t", "dtype": "bfloat16"}, ValueError, "dtype must be float32 or float16, got bfloat16"),
        ({"path": "/t", "options": {"user_config": {}}}, ValueError, "options must have no user_config"),
    ],
)
def test_wrong_arguments_are_named(given, kind, text):
    with pytest.raises(kind, match=text):
        application(given)
