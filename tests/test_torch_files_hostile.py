"""Damaged files of torch.save: a sample of what fuzz/mutate_torch_files.py tries, and defects that it must find."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qembag.interop import budget, inert_pickle, torch_tensors, torch_zip

FUZZ = Path(__file__).resolve().parent.parent / "fuzz"


@pytest.fixture
def mutate_torch_files() -> Iterator[Any]:
    if not FUZZ.is_dir():
        pytest.skip("the fuzzer is not beside these tests")
    sys.path.insert(0, str(FUZZ))
    try:
        yield importlib.import_module("mutate_torch_files")
    finally:
        sys.path.remove(str(FUZZ))


def test_damaged_files_are_read_right_or_refused(mutate_torch_files):
    outcomes = mutate_torch_files.run(2000)
    assert outcomes["opened"] > 150
    assert len(outcomes) > 300


def test_undamaged_files_are_read(mutate_torch_files, monkeypatch):
    monkeypatch.setattr(mutate_torch_files, "damaged", lambda raw, rng: raw)
    monkeypatch.setattr(mutate_torch_files, "WANTED", mutate_torch_files.WANTED[:1])
    outcomes = mutate_torch_files.run(100)
    # TorchRec's files do not say all, and the tensors of one checkpoint are big-endian.
    assert outcomes.pop("opened") > 70
    assert all("give it, such as" in refusal for refusal in outcomes)


def imported(machine: Any, module: str, name: str) -> None:
    """As pickle does it."""
    machine.push(machine.table.get((module, name)) or getattr(importlib.import_module(module), name))


def without_bounds(storage: Any, offset: int, shape: Any, stride: Any, itemsize: int) -> int:
    return storage.record.start + offset * itemsize


def wherever_the_end_is(raw: memoryview) -> tuple[int, int, int]:
    """The zip64 end record may stand anywhere, as for torch."""
    end = int.from_bytes(raw[-34:-26], "little") if raw[-42:-38] == b"PK\6\7" else len(raw)
    *_, count, nbytes, start = torch_zip._unpack(torch_zip._END_64, torch_zip.END_64, raw, end, "end")
    return start, start + nbytes, count


DEFECTS = {
    "imports": (inert_pickle._Machine, "global_of", imported),
    "bounds of storages": (torch_tensors, "_start_of", without_bounds),
    "numbers": (torch_tensors, "_are_counts", lambda values: True),
    "memory and time": (budget.Budget, "spend", lambda self, nbytes: None),
    "underflow": (inert_pickle._Machine, "pop", lambda machine: machine.stack.pop()),
    "two archives in one": (torch_zip, "_directory", wherever_the_end_is),
    "byte order": (torch_zip.Archive, "_is_big_endian", lambda archive: False),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_check_that_is_left_out_is_found(mutate_torch_files, monkeypatch, defect):
    if defect == "byte order":
        pytest.importorskip("torch")  # which tells the right values
    monkeypatch.setattr(*DEFECTS[defect])
    with pytest.raises(mutate_torch_files.Finding, match=rf"^case \d+ of seed {mutate_torch_files.SEED}: "):
        mutate_torch_files.run(5000)
