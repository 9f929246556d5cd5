"""The coverage-guided fuzzer of the calls in `calls.py`. Takes libFuzzer's arguments; `tools/fuzz` starts it."""

from __future__ import annotations

import os
import sys

import atheris

with atheris.instrument_imports(include=["qembag"]):
    import calls
    import checks

# libFuzzer ends the process without a word to Python: the number of calls so far stands in a file.
COUNT = os.open(os.environ["QEMBAG_FUZZ_COUNT"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)


def one_input(data: bytes) -> None:
    try:
        calls.run(data)
    finally:
        os.pwrite(COUNT, b"%d\n" % checks.calls, 0)


atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
