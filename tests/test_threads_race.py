"""While another thread writes to a lookup's arrays, nothing outside them is read or written: no crash, and no answer
but a right one of some moment, or an error."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import child_environment
from qembag import _errors

RACE = """
import sys, threading, time
import numpy as np
import qembag
from qembag import ops
from support import fenced, levels
from support.floats import rows_of
from support.layouts import NAMES
from support.variants import table_of

bits, seconds = {bits}, {seconds}
name = NAMES[bits]
rng = np.random.default_rng(5)
num_rows, dim, size = 64, 40, 12_000
table = qembag.quantize(rng.normal(size=(num_rows, dim)).astype(np.float32), bits)
# The rows end where the memory does: a read beyond them is a fault. So do the arrays that change.
rows = fenced.copy(table.data)
kinds = {{"index": np.int64, "offset": np.int32}} if bits != 4 else {{"index": np.int32, "offset": np.int64}}
good = {{
    "indices": rng.integers(0, num_rows, size).astype(kinds["index"]),
    "offsets": np.arange(0, size + 1, 6).astype(kinds["offset"]),
    "mapping": rng.permutation(num_rows).astype(np.int32),
    "lengths": np.full(size // 6, 6, kinds["offset"]),
}}
live = {{key: fenced.copy(value) for key, value in good.items()}}
stop = threading.Event()
garbage = [-1, -2, num_rows, num_rows - 1, 2**31 - 1, -(2**31), 0, size, size + 1]

def spoil():
    own = np.random.default_rng(6)
    while not stop.is_set():
        for key, array in live.items():
            places = own.integers(0, len(array), 50)
            wide = array.dtype.itemsize == 8
            values = own.choice(garbage + ([2**63 - 1, -(2**63), 2**32 + 2] if wide else []), 50)
            array[places] = values.astype(array.dtype)
            time.sleep(0)
        # Whole again, all at once or in pieces: some lookups succeed.
        for key, array in live.items():
            array[:] = good[key]
        time.sleep(own.random() * 1e-3)

operator = getattr(ops, f"embedding_bag_{{name}}_rowwise_offsets")
out = np.empty((len(good["offsets"]) - 1, dim), dtype=np.float32)
pruned = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=live["mapping"])
plain = qembag.QuantizedTable(rows, bits)
floats = fenced.copy(rows_of(rng, {{8: "float32", 4: "float16", 2: "bfloat16"}}[bits], num_rows, dim))
pruned_floats, plain_floats = table_of(floats, live["mapping"]), table_of(floats)
bounded = {{"include_last_offset": True, "invalid": "skip"}}
# Four features of 500 bags each, or of all bags.
many = qembag.EmbeddingBagCollection(
    {{"a": plain, "b": pruned, "c": plain_floats, "d": pruned_floats}},
    mode={{"b": "mean", "c": "max", "d": "sqrtn"}}, padding_idx={{"b": 3}}, invalid={{"d": "skip"}},
)
wide, tall = np.empty((size // 24, many.dim), np.float32), np.empty((size // 6, many.dim), np.float32)
pairs = dict.fromkeys("abcd", (live["indices"], live["offsets"]))
squares = dict.fromkeys("abcd", live["indices"].reshape(-1, 6))
rows_of_many = qembag.EmbeddingCollection(many.tables)
calls = [
    lambda: operator(rows, live["indices"], live["offsets"], include_last_offset=True),
    lambda: operator(rows, live["indices"], live["offsets"], include_last_offset=True, out=out),
    lambda: operator(rows, live["indices"], live["offsets"], False, 0, True, None, live["mapping"], True),
    lambda: operator(rows, live["indices"], live["offsets"], False, 0, True, None, live["mapping"], True, out=out),
    lambda: qembag.embedding_bag(pruned, live["indices"], live["offsets"], include_last_offset=True, mode="max"),
    lambda: qembag.embedding_bag(plain, live["indices"], live["offsets"], mode="mean", padding_idx=3),
    lambda: qembag.embedding_bag(plain, live["indices"].reshape(-1, 6), out=out[: size // 6]),
    lambda: qembag.embedding(pruned, live["indices"]),
    lambda: qembag.embedding(plain, live["indices"]),
    lambda: pruned.dequantize(),
    lambda: qembag.embedding_bag(pruned_floats, live["indices"], live["offsets"], include_last_offset=True, out=out),
    lambda: qembag.embedding_bag(pruned_floats, live["indices"], live["offsets"], **bounded, mode="average"),
    lambda: qembag.embedding_bag(pruned, live["indices"], live["offsets"], **bounded, mode="sqrtn", padding_idx=3),
    lambda: qembag.embedding_bag(plain_floats, live["indices"].reshape(-1, 6), mode="max", invalid="skip"),
    lambda: qembag.embedding_bag(plain_floats, live["indices"], lengths=live["lengths"], mode="mean"),
    lambda: qembag.embedding(plain_floats, live["indices"], invalid="skip"),
    lambda: qembag.embedding(pruned_floats, live["indices"], invalid="skip"),
    lambda: pruned_floats.dequantize(),
    lambda: many(live["indices"], live["offsets"]),
    lambda: many(live["indices"], live["offsets"], out=wide),
    lambda: (many(live["indices"], live["offsets"], out=many.split(wide)), wide)[1],
    lambda: many(live["indices"], lengths=live["lengths"]),
    lambda: many(pairs, out=tall),
    lambda: many(squares),
    lambda: many(pairs | {{"b": squares["b"]}}),
    lambda: np.concatenate(list(rows_of_many(live["indices"], live["offsets"]).values())),
    lambda: np.concatenate(list(rows_of_many(pairs).values())),
]
expected = [call().copy() for call in calls]
before = rows.tobytes()
counts = {{"answers": 0, "right": 0, "errors": 0}}
kinds_of_error = set()
writer = threading.Thread(target=spoil)
sys.setswitchinterval(1e-4)
writer.start()
names = levels.levels()
end = time.monotonic() + seconds
turn = 0
try:
    while time.monotonic() < end:
        levels.serve(names[turn % len(names)])
        qembag.set_num_threads(1 + turn // len(names) % 3)
        number = turn % len(calls) if turn % 2 else (turn // 7) % len(calls)
        turn += 1
        try:
            result = calls[number]()
        except (IndexError, ValueError) as error:
            assert any(word in str(error) for word in ("indices", "offsets", "lengths", "rows")), error
            counts["errors"] += 1
            kinds_of_error.add(type(error).__name__)
        except RuntimeError as error:
            assert "changed while they were being looked up" in str(error), error
            counts["errors"] += 1
            kinds_of_error.add("RuntimeError")
        else:
            assert result.shape == expected[number].shape and result.dtype == np.float32
            # Each element is a sum of at most the rows there are: anything else came from outside.
            assert np.isfinite(result).all() and np.abs(result).max() < 1e6
            counts["answers"] += 1
            counts["right"] += np.array_equal(result, expected[number])
finally:
    stop.set()
    writer.join()
for key, array in live.items():
    array[:] = good[key]
assert rows.tobytes() == before
for number, call in enumerate(calls):
    assert np.array_equal(call(), expected[number]), number
print(counts, sorted(kinds_of_error))
assert counts["errors"] and counts["answers"], counts
"""


# Longer by hand: 200 of each width under tools/test_sanitized.
SECONDS = float(os.environ.get("QEMBAG_RACE_SECONDS", "3.5"))


@pytest.mark.parametrize("width", [8, 4, 2])
def test_a_thread_that_spoils_the_arrays_of_a_lookup_makes_errors_and_never_a_crash(width: int) -> None:
    if sys.platform == "win32":
        pytest.skip("guard pages are made with mprotect")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", RACE.format(bits=width, seconds=SECONDS)],
        capture_output=True,
        text=True,
        timeout=120 + SECONDS,
        env=child_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_a_fault_that_is_gone_again_is_told_where_there_are_no_indices(shape: tuple[int, ...]) -> None:
    indices = np.zeros(shape, np.int64)
    asked = _errors.Asked(10, 10, indices, None, num_indices=0, name="indices['a']", feature=None)
    error = _errors.of_fault(("changed", 0, 0, 0, 0, 0), asked)
    assert type(error) is RuntimeError
    assert str(error).startswith("indices['a'], offsets or compressed_indices_mapping changed while")
