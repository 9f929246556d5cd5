"""The fuzzer's calls without the fuzzer: its corpus, and inputs of random bytes, the same on every run."""

from __future__ import annotations

import importlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import child_environment
from support import fenced

FUZZ = Path(__file__).parents[1] / "fuzz"
if not FUZZ.is_dir():
    pytest.skip("the fuzzer is not beside these tests", allow_module_level=True)


@pytest.fixture(scope="module")
def calls():
    sys.path.insert(0, str(FUZZ))
    try:
        yield importlib.import_module("calls")
    finally:
        sys.path.remove(str(FUZZ))


@pytest.fixture
def checks(calls):
    return sys.modules["checks"]


def test_the_corpus_finds_nothing(calls):
    inputs = sorted((FUZZ / "corpus").iterdir())
    assert len(inputs) > 100
    for path in inputs:
        calls.run(path.read_bytes())


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_find_nothing(calls, checks, seed):
    source = random.Random(seed)
    before = checks.calls
    for _ in range(300):
        data = source.randbytes(source.randrange(1, 150))
        try:
            calls.run(data)
        except Exception as error:
            raise AssertionError(f"found by bytes.fromhex('{data.hex()}')") from error
    assert checks.calls - before > 1000 * len(checks.LEVELS)


def test_an_oracle_that_is_wrong_in_one_bit_is_found(calls, checks, monkeypatch):
    monkeypatch.setattr(checks, "PLANTED", "answer")
    with pytest.raises(checks.Finding, match=r"not the oracle's"):
        test_the_corpus_finds_nothing(calls)


SHORT = """
import faulthandler, sys
sys.path[:0] = {folders!r}
import numpy as np
import calls, makers
from support import fenced

faulthandler.enable()
makers.exact_block = lambda num_bytes: fenced.empty(num_bytes, np.uint8)
for name in {inputs!r}:
    calls.run(open(name, "rb").read())
"""


@fenced.needs_fences
@pytest.mark.parametrize("plant", ["overread", "overwrite"])
def test_tables_and_outputs_that_end_a_byte_early_are_found(plant):
    """Without a sanitizer, before a page that may not be touched; and it is a call that touches it, not the oracle."""
    inputs = [str(path) for path in sorted((FUZZ / "corpus").iterdir())]
    code = SHORT.format(folders=[str(FUZZ)], inputs=inputs)
    environment = child_environment(QEMBAG_FUZZ_PLANT=plant)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert "support/lookups.py" in done.stderr
    assert "reference.py" not in done.stderr


def test_the_corpus_is_what_its_script_writes(calls):
    module = importlib.import_module("make_corpus")
    assert {path.name: path.read_bytes() for path in (FUZZ / "corpus").iterdir()} == module.inputs()
    assert len(calls.SCENES) == module.KINDS
