"""The fuzzer's calls without the fuzzer: its corpus, and inputs of random bytes, the same on every run."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
if not FUZZ.is_dir():
    pytest.skip("the fuzzer is not beside these tests", allow_module_level=True)


@pytest.fixture(scope="module")
def calls():
    spec = importlib.util.spec_from_file_location("fuzz_calls", FUZZ / "calls.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_calls"] = module  # where its data classes look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz_calls"]


def test_the_corpus_finds_nothing(calls):
    inputs = sorted((FUZZ / "corpus").iterdir())
    assert len(inputs) > 100
    for path in inputs:
        calls.run(path.read_bytes())


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_find_nothing(calls, seed):
    source = random.Random(seed)
    before = calls.calls
    for _ in range(300):
        data = source.randbytes(source.randrange(1, 150))
        try:
            calls.run(data)
        except Exception as error:
            raise AssertionError(f"found by bytes.fromhex('{data.hex()}')") from error
    assert calls.calls - before > 1000 * len(calls.LEVELS)


def test_an_oracle_that_is_wrong_in_one_bit_is_found(calls, monkeypatch):
    monkeypatch.setattr(calls, "PLANTED", "answer")
    with pytest.raises(calls.Finding, match=r"not the oracle's"):
        test_the_corpus_finds_nothing(calls)


def test_the_corpus_is_what_its_script_writes(calls):
    spec = importlib.util.spec_from_file_location("make_corpus", FUZZ / "make_corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {path.name: path.read_bytes() for path in (FUZZ / "corpus").iterdir()} == module.inputs()
    assert len(calls.SCENES) == module.KINDS
