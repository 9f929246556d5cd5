"""What a replica answers to what nobody should send. Without Ray's processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import child_environment
from support.serving import ARROW, JSON, LIMITS, Replica, arrow_body, bags_of, json_body, pa, saved

GOOD = {"songs": [[1, 2], [3]], "words": [[5], []]}


@pytest.fixture(scope="module")
def replica(tmp_path_factory):
    with Replica(saved(tmp_path_factory.mktemp("serve"))) as made:
        yield made


@pytest.fixture(autouse=True)
def still_serves(replica):
    yield
    assert replica.post(json_body(GOOD)).status == 200


# ---- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "text"),
    [
        ("POST", "/other", {}, 404, "there is nothing here: POST bags to /, or GET / for what is served"),
        ("GET", "/..", {}, 404, "there is nothing here"),
        ("PUT", "/", {}, 405, "method must be GET or POST, got PUT"),
        ("POST", "/", {}, 415, f"Content-Type must be {JSON} or {ARROW}, got ''"),
        ("POST", "/", {"content-type": "text/" + "a" * 999}, 415, "Content-Type must be"),
        ("POST", "/", {"content-type": JSON, "content-encoding": "gzip"}, 415, "Content-Encoding must be identity"),
        ("POST", "/", {"content-type": JSON, "accept": "text/html"}, 406, "Accept must allow application/json"),
        ("POST", "/", {"content-type": JSON, "accept": f"{JSON};q=0"}, 406, "Accept must allow application/json"),
        ("POST", "/", {"content-type": JSON, "content-length": "9" * 5000}, 413, "a body must have at most 1048576"),
    ],
)
def test_other_requests_are_refused(replica, method, path, headers, status, text):
    answer = replica.ask(method, path, json_body(GOOD), headers)
    assert answer.status == status
    assert answer.error.startswith(text)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_body_is_counted_while_it_arrives(replica):
    sent = []

    def chunks():
        while True:  # without an end
            sent.append(1)
            yield b" " * 1000

    answer = replica.post(chunks())
    assert (answer.status, answer.error) == (413, "a body must have at most 1048576 bytes, got more")
    assert len(sent) == 1049
    assert answer.headers["connection"] == "close"


def test_a_slow_body_is_given_up(tmp_path):
    with Replica(saved(tmp_path), LIMITS._replace(body_timeout_s=0.2)) as replica:
        answer = replica.post(iter([b"{", 60.0, b"}"]))
    assert (answer.status, answer.error) == (408, "a body must arrive within 0.2 s")


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "a body must be JSON: "),
        (b"\xff", "a body must be JSON: "),
        (b"[" * 100_000, "a body must be JSON: maximum recursion depth exceeded"),
        (b'{"indices":' * 50_000, "a body must be JSON: maximum recursion depth exceeded"),
        (b'{"indices": {"songs": [[%s]]}}' % (b"9" * 5000), "a body must be JSON: Exceeds the limit"),
        (b'{"indices": {}, "indices": {}}', "a body must be JSON: an object has a key twice"),
        (b'{"indices": NaN}', "a body must be JSON: NaN is no number of JSON"),
        (b"[]", "a body must be an object of indices and, if need be, per_sample_weights, got a list"),
        (b'{"indices": {}, "a": 1}', "a body must be an object of indices and, if need be, per_sample_weights, got"),
        (json_body([]), "indices must be an object by feature, got a list"),
        (json_body({"songs": 1}), "indices['songs'] must be a list of bags, got 1"),
        (json_body({"songs": [[1], 2]}), "indices['songs'][1] must be a list, got 2"),
        (json_body({"songs": ["ab"]}), "indices['songs'][0] must be a list, got 'ab'"),
        (json_body({"songs": [[], [1, True]]}), "indices['songs'][1][1] must be an integer, got true"),
        (json_body({"songs": [[1.0]]}), "indices['songs'][0][0] must be an integer, got 1.0"),
        (json_body({"songs": [[None]]}), "indices['songs'][0][0] must be an integer, got null"),
        (json_body({"songs": [[[1]]]}), "indices['songs'][0][0] must be an integer, got a list"),
        (json_body({"songs": [[2**70]], "words": [[]]}), "indices['songs']: indices must be an array of integers, got"),
        (json_body({"songs": [[1]]}), "indices must hold each feature, got none for 'words'"),
        (json_body({}), "indices must hold each feature, got none for 'songs'"),
        (json_body({"x" * 9999: 1}), "indices must hold features of the collection only, got 'xxx"),  # not read
        (json_body({**GOOD, "x": []}), "indices must hold features of the collection only, got 'x'"),
        (json_body({"songs": [[1], []], "words": [[]]}), "indices['words'] must have as many bags as the features"),
        (json_body({"songs": [[-1]], "words": [[]]}), "indices['songs'][0] is -1 (bag 0): out of range"),
        (json_body(GOOD, per_sample_weights=[]), "per_sample_weights must be an object by feature, got a list"),
        (json_body(GOOD, per_sample_weights={"x": [[]]}), "per_sample_weights must hold features of the collection"),
        (json_body(GOOD, per_sample_weights={"songs": [[1], [2, 3]]}), "per_sample_weights['songs'] must have as many"),
        (json_body(GOOD, per_sample_weights={"words": [["a"], []]}), "per_sample_weights['words'][0][0] must be a num"),
        (json_body(GOOD, per_sample_weights={"words": [[10**400], []]}), "per_sample_weights['words'] must be numbers"),
    ],
)
def test_wrong_json_is_told_what_it_must_be(replica, body, text):
    answer = replica.post(body)
    assert (answer.status, answer.error[: len(text)]) == (400, text)


def test_a_name_that_is_no_features_is_not_repeated_at_length(replica):
    for name in ("indices", "per_sample_weights"):
        answer = replica.post(json.dumps({"indices": GOOD, name: {"\x7f" * 100_000: 1}}).encode())
        assert (answer.status, len(answer.body) < 1000) == (400, True)


def test_weights_of_maxima_get_the_librarys_text(tmp_path):
    with Replica(saved(tmp_path), mode="max") as replica:
        answer = replica.post(json_body(GOOD, per_sample_weights={"songs": GOOD["songs"]}))
    assert answer.status == 400
    assert "per_sample_weights must be None in mode 'max'" in answer.error


# ---- Arrow -----------------------------------------------------------------------------------------------------------


def of_nulls(count: int) -> bytes:
    """Columns with rows and no bytes."""
    column = pa.Array.from_buffers(pa.null(), count, [None])
    return arrow_body(pa.record_batch(dict.fromkeys(GOOD, column)), allow_64bit=True)


def of_a_dictionary() -> bytes:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 900, pa.int8()), pa.array([[1] * 900]))
    return arrow_body(pa.table({"songs": column, "words": column}))


def of_batches(count: int) -> bytes:
    table = pa.table(GOOD)
    return arrow_body(pa.concat_tables([table.slice(0, 1)] * count))


def compressed_as_before() -> bytes:
    """As pyarrow 0.17 marked it, which later ones still expand."""
    sink, batch = pa.BufferOutputStream(), pa.record_batch(GOOD)
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    return sink.getvalue().to_pybytes()


def without_a_schema() -> bytes:
    whole = arrow_body(GOOD)
    return whole[8 + int.from_bytes(whole[4:8], "little") :]


def of_two_schemas() -> bytes:
    whole = arrow_body(GOOD)
    return whole[: 8 + int.from_bytes(whole[4:8], "little")] * 2


def of_two_columns() -> bytes:
    column = pa.array(GOOD["songs"])
    return arrow_body(pa.Table.from_arrays([column, column], ["songs", "songs"]))


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "a body must begin with a schema, got nothing"),
        (without_a_schema(), 400, "a body must begin with a schema, got a record batch"),
        (of_two_schemas(), 400, "a body must have one schema and record batches, got a schema"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f", 400, "a body must be an Arrow IPC stream"),
        (b"ARROW1\0\0" * 100, 400, "a body must be an Arrow IPC stream"),
        (arrow_body(GOOD)[:-100], 400, "a body must be an Arrow IPC stream"),
        (arrow_body(pa.table(GOOD), compression="zstd"), 400, "a body must not be compressed"),
        (arrow_body(pa.table(GOOD), compression="lz4"), 400, "a body must not be compressed"),
        (compressed_as_before(), 400, "a body must not be compressed"),
        (of_a_dictionary(), 400, "a body must have no dictionary-encoded columns"),
        (of_batches(257), 400, "a body must have at most 256 record batches, got more"),
        (of_nulls(10**12), 413, "a request must have at most 1000 bags, got 1000000000000"),
        (of_two_columns(), 400, "indices must have one column 'songs', got two"),
        (arrow_body({"songs": [[1]]}), 400, "indices must hold each feature, got none for 'words'"),
        (arrow_body({"other": [[1]]}), 400, "indices must hold each feature, got none for 'songs'"),
        (arrow_body({"songs": pa.array(["a"]), "words": [[1]]}), 400, "indices['songs'] must be a column of lists"),
        (
            arrow_body({"songs": pa.array([["a"]]), "words": [[1]]}),
            400,
            "indices['songs'] must be a column of lists of",
        ),
        (arrow_body({"songs": [[1, None]], "words": [[1]]}), 400, "indices['songs'][0][1] is null: must be an integer"),
        (arrow_body({"songs": [[1], [1000]], "words": [[], []]}), 400, "indices['songs'][1][0] is 1000: out of range"),
    ],
)
def test_wrong_arrow_is_told_what_it_must_be(replica, body, status, text):
    answer = replica.post(body, ARROW)
    assert (answer.status, answer.error[: len(text)]) == (status, text)


def test_offsets_and_lengths_that_lie_are_refused(replica):
    body = arrow_body({"songs": [[1, 2], [3]], "words": [[5], []]})
    offsets = np.array([0, 2, 3], "<i4").tobytes()
    place = body.index(offsets)
    for wrong in ([0, 2**30, 3], [0, 2, 2**30], [-5, 2, 3], [3, 2, 0]):
        answer = replica.post(body[:place] + np.array(wrong, "<i4").tobytes() + body[place + 12 :], ARROW)
        assert (answer.status, answer.error[:10]) == (400, "a body mus")


# ---- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JSON, ARROW])
def test_each_limit_holds_to_the_last_one(tmp_path, kind):
    bags = bags_of(10, seed=3)
    count = sum(len(bag) for some in bags.values() for bag in some)
    body = json_body(bags) if kind == JSON else arrow_body(bags)
    exact = LIMITS._replace(
        max_body_bytes=len(body), max_bags=10, max_indices=count, max_answer_bytes=10 * 32 * np.dtype("f4").itemsize
    )
    path = saved(tmp_path)
    with Replica(path, exact) as replica:
        assert replica.post(body, kind).status == 200
    texts = {
        "max_body_bytes": f"a body must have at most {len(body) - 1} bytes, got more",
        "max_bags": "a request must have at most 9 bags, got 10",
        "max_indices": f"a request must have at most {count - 1} indices, got {count}",
        "max_answer_bytes": "vectors must take at most 1279 bytes, got 1280: send fewer bags",
    }
    for name, text in texts.items():
        with Replica(path, exact._replace(**{name: getattr(exact, name) - 1})) as replica:
            answer = replica.post(body, kind)
            assert (answer.status, answer.error) == (413, text)


def test_what_fails_in_the_library_is_no_stack_trace(replica, monkeypatch):
    def broken(*_, **__):
        raise KeyError("secret")

    monkeypatch.setattr(replica.actor, "_alone", broken)
    answer = replica.post(json_body(GOOD))
    monkeypatch.undo()
    assert (answer.status, json.loads(answer.body)) == (500, {"error": "internal error"})


def test_damaged_bodies_are_answered():
    fuzz = Path(__file__).resolve().parent.parent / "fuzz" / "mutate_requests.py"
    if not fuzz.exists():
        pytest.skip("the fuzzer is not beside the tests")
    done = subprocess.run(
        [sys.executable, fuzz, "1000", "7"], env=child_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"'{kind} {status}'" in done.stdout for kind in ("stream", "json") for status in (200, 400))
