"""Files of torch, TorchRec and torchao, read without them: lookups have the bits of the modules that were saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qembag
from support.foreign_lookups import INDICES, OFFSETS, answer

GOLDEN = Path(__file__).parent / "golden" / "torch"
EXPECTED = dict(np.load(GOLDEN / "expected.npz"))
DIMS = {"int8": 10, "int4": 12, "int2": 8, "fp16": 5, "fp32": 3}
# What the files do not say.
WANTED = {
    "torchrec": {"dims": DIMS, "bits": {"int8": 8, "fp16": 16, "fp32": 32}},
    "tensors": {"bits": {"packed": 4}},
}


def tables(case: str, **more: object) -> dict:
    kind = case.removesuffix("-big")
    return qembag.load_tables(GOLDEN / f"{case}.pt", **(WANTED.get(kind, {}) | more))


@pytest.mark.parametrize("key", EXPECTED)
@pytest.mark.parametrize("mmap", [True, False])
def test_lookups_have_the_bits_of_the_module_that_was_saved(key, mmap):
    case, name, lookup = key.split("|")
    table, want = tables(case, mmap=mmap)[name], EXPECTED[key].astype(np.float32)  # from little-endian
    got = answer(table, lookup)
    if name == "brain":
        # torchao's bfloat16 module rounds what it looks up to even.
        bits = got.view(np.uint32)
        got = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    if lookup == "mean" and name.endswith(("fp16", "fp32")):
        # TorchRec multiplies sums by 1 / n, of floats too; torch and qembag divide those.
        counts = np.diff(OFFSETS, append=len(INDICES))
        got = answer(table, "sum") * (np.float32(1) / np.maximum(counts, 1).astype(np.float32))[:, None]
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("case", ["ao-8bit", "torchrec-split", "alone"])
def test_files_of_big_endian_machines_hold_the_same_tables(case):
    ours, theirs = tables(case), tables(f"{case}-big")
    assert list(ours) == list(theirs)
    for name in ours:
        assert type(ours[name]) is type(theirs[name])
        np.testing.assert_array_equal(ours[name].data, theirs[name].data)
