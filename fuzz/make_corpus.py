"""Writes the corpus that the fuzzer starts from: inputs of random bytes, of each kind of scene, the same on every run.

    python fuzz/make_corpus.py

A fuzzer that starts from nothing spends its first minutes on inputs that are too short for a whole call.
"""

from __future__ import annotations

import random
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"
KINDS = 30  # as many as `calls.SCENES` has
EACH = 6
LONGEST = 400


def inputs() -> dict[str, bytes]:
    source = random.Random(20261125)
    made = {"many_rows": b"\xff" + source.randbytes(100)}
    for kind in range(KINDS):
        for number in range(EACH):
            # The first byte is not 255, the second chooses the scene.
            made[f"{kind:02}-{number}"] = bytes([0, kind]) + source.randbytes(source.randrange(LONGEST))
    return made


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, data in inputs().items():
        (CORPUS / name).write_bytes(data)
