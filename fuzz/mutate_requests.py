"""Damages bodies of requests, in Arrow and JSON, and posts them to a replica in this process.

    python fuzz/mutate_requests.py COUNT [SEED [FIRST]]

Each must be answered with 200, 400 or 413, within seconds and with little memory; a crash ends this process after its
number was printed. SEED and FIRST, the number of a body, repeat one.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.serving import ARROW, JSON, Replica, arrow_body, bags_of, json_body, pa, saved

NUMBERS = [0, 1, 2, 7, 8, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
WORDS = [b"1e999", b"-1", b"true", b"null", b'"a"', b"[]", b"{}", b"[[1]]", b"NaN", b"99999999999999999999", b"\\ud800"]
MOST_SECONDS, MOST_MEGABYTES = 5.0, 500


def bases() -> list[tuple[str, bytes]]:
    bags = bags_of(5)
    table = pa.table({name: pa.array(own, pa.list_(pa.int64())) for name, own in bags.items()})
    made = [arrow_body(table), arrow_body(pa.concat_tables([table, table.slice(1, 3)]))]
    columns = [pa.array([[1, 2], None, [3]], kind) for kind in (pa.large_list(pa.int32()), pa.list_(pa.uint8()))]
    made += [arrow_body(pa.table(dict.fromkeys(bags, column))) for column in columns]
    pairs = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2))
    made += [arrow_body(pa.table(dict.fromkeys(bags, pairs))), arrow_body(pa.table({n: pa.nulls(3) for n in bags}))]
    coded = pa.array([1, 2, 2, 1]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 4], pa.int32()), coded)
    made += [arrow_body(table, compression="zstd"), arrow_body(pa.table(dict.fromkeys(bags, lists)))]
    weights = {"songs": [[0.5] * len(bag) for bag in bags["songs"]]}
    texts = [json_body(bags), json_body(bags, per_sample_weights=weights)]
    return [(ARROW, body) for body in made] + [(JSON, body) for body in texts]


def damaged(rng: random.Random, body: bytes, kind: str) -> bytes:
    whole = bytearray(body)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(whole)) if whole else 0
        way = rng.randrange(6)
        if way == 0 and whole:
            whole[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            size = rng.choice([1, 2, 4, 8])
            start = place // size * size  # where Arrow has its numbers
            whole[start : start + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
        elif way == 2:
            del whole[place : place + rng.choice([1, 8, 64, len(whole)])]
        elif way == 3:
            other = rng.randrange(len(whole)) if whole else 0
            whole[place:place] = whole[other : other + rng.choice([1, 8, 64, 4096])]
        elif kind == JSON:
            whole[place : place + rng.randrange(4)] = rng.choice(WORDS)
        else:
            whole[place : place + 4] = whole[place : place + 4][::-1]
    return bytes(whole)


def run(count: int, seed: int = 0, first: int = 0) -> Counter[str]:
    """How many bodies had each answer."""
    answers: Counter[str] = Counter()
    given = bases()
    with tempfile.TemporaryDirectory() as folder, Replica(saved(Path(folder))) as replica:
        for number in range(first, first + count):
            rng = random.Random(f"{seed} {number}")
            kind, body = rng.choice(given)
            body = damaged(rng, body, kind)
            start = time.monotonic()
            answer = replica.post(body, kind)
            took = time.monotonic() - start
            if answer.status not in (200, 400, 413) or took > MOST_SECONDS:
                raise AssertionError(
                    f"seed {seed}, body {number}: {answer.status} in {took:.1f} s, {answer.body[:300]!r}"
                )
            answers[f"{kind.rpartition('.')[2].rpartition('/')[2]} {answer.status}"] += 1
            if number % 5000 == 0:
                print(f"body {number}", flush=True)
    return answers


if __name__ == "__main__":
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(dict(run(*map(int, sys.argv[1:]))))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MOST_MEGABYTES, f"memory has grown by {grown:.0f} MB"
