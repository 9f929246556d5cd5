"""Tables of GGUF files, against the package `gguf`."""

from __future__ import annotations

import importlib
import os
import re
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER, child_environment
from support import gguf_files as files

gguf = pytest.importorskip("gguf")

QUANTIZED = ["Q8_0", "Q4_0", "Q4_1"]
ALL = [*QUANTIZED, "F16", "F32", "BF16"]
HALF = np.finfo(np.float16)


def written(path, tensors, alignment=None):
    """With the package's own writer: types and rows by name."""
    writer = gguf.GGUFWriter(str(path), "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, (kind, raw) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(kind, rows):
    return kind, gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])


def theirs(path):
    """Each tensor's values by the package, as rows."""
    with np.errstate(all="ignore"):
        return {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(str(path)).tensors
        }


def same_values(ours, expected):
    """In every bit, except that a zero of ours has no sign, and for the payload of a NaN."""
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(np.isnan(ours), np.isnan(expected))
    numbers = ~np.isnan(ours)
    assert ((ours + np.float32(0)).view("u4") == (expected + np.float32(0)).view("u4"))[numbers].all()


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("mmap", [True, False])
def test_rows_have_the_packages_values(tmp_path, rng, kind, mmap):
    rows = rng.normal(size=(50, 96)).astype(np.float32)
    path = written(tmp_path / "a.gguf", {"token_embd.weight": quantized(kind, rows)})
    tables = qembag.load_tables(path, format="gguf", mmap=mmap)
    assert list(tables) == ["token_embd"]
    same_values(tables["token_embd"][:], theirs(path)["token_embd.weight"])
    if kind in QUANTIZED:
        layout = tables["token_embd"].layout
        assert (layout.bits, layout.group_size, layout.scale_dtype) == (8 if kind == "Q8_0" else 4, 32, np.float16)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize(
    "scales",
    [
        [1e-7, 6e-8, 0.0, -0.0, -1e-5],
        [511.75, -511.75, 1.0],
        [8188.0, -8188.0],
        [512.0, 1.0],
        [8192.0, 1.0],
        [65504.0, -65504.0, np.nan, 1e-3],
    ],
)
def test_scales_of_every_size_are_exact(tmp_path, rng, kind, scales):
    path = tmp_path / "a.gguf"
    path.write_bytes(files.of_blocks({"t.weight": (kind, files.blocks_of(kind, 40, 3, rng, scales))}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = qembag.load_tables(path)["t"]
    same_values(table[:], theirs(path)["t.weight"])
    # A half holds the bias, which is the scale times a power of 2, unless it overflows.
    largest = np.nanmax(np.abs(scales)) * {"Q8_0": 128, "Q4_0": 8, "Q4_1": 1}[kind]
    assert table.layout.scale_dtype == (np.float16 if largest <= HALF.max else np.float32)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", QUANTIZED)
def test_random_bytes_are_exact_or_an_infinite_scale_is_refused(tmp_path, kind, seed):
    path = tmp_path / "a.gguf"
    raw = files.blocks_of(kind, 60, 5, np.random.default_rng(seed))
    path.write_bytes(files.of_blocks({"t.weight": (kind, raw)}))
    scales = raw.reshape(60, 5, -1)[:, :, :2].copy().view("<f2")
    if kind != "Q4_1" and np.isinf(scales).any():
        with pytest.raises(ValueError, match="table 't' has a block with an infinite scale"):
            qembag.load_tables(path)
    else:
        same_values(qembag.load_tables(path)["t"][:], theirs(path)["t.weight"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_an_infinite_scale_is_refused(tmp_path, rng, kind):
    path = tmp_path / "a.gguf"
    path.write_bytes(files.of_blocks({"t.weight": (kind, files.blocks_of(kind, 4, 3, rng, [np.inf, -np.inf, 1]))}))
    with pytest.raises(ValueError, match=r"a\.gguf: table 't' has a block with an infinite scale"):
        qembag.load_tables(path)


def test_bags_are_those_of_a_table_of_these_codes(tmp_path, rng):
    rows = rng.normal(size=(50, 64)).astype(np.float32)
    path = written(tmp_path / "a.gguf", {"token_embd.weight": quantized("Q4_1", rows)})
    table = qembag.load_tables(path)["token_embd"]
    indices = rng.integers(0, 50, (30, 7))
    expected = theirs(path)["token_embd.weight"][indices].sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(qembag.embedding_bag(table, indices), expected, rtol=1e-5, atol=1e-5)


# ---- Which tensors ---------------------------------------------------------------------------------------------------


def test_all_tensors_of_two_dimensions_and_a_type_that_fits_are_tables(tmp_path, rng):
    rows = rng.normal(size=(6, 256)).astype(np.float32)
    tensors = {f"{kind}.weight": quantized(kind, rows) for kind in [*ALL, "Q5_0"]}
    tensors |= {"one.weight": ("F32", rows[0]), "three.weight": ("F32", rows.reshape(6, 16, 16))}
    path = written(tmp_path / "a.gguf", tensors)
    assert list(qembag.load_tables(path)) == ALL
    assert list(qembag.load_tables(path, names=["Q4_0", "F16"])) == ["Q4_0", "F16"]


def test_names_stay_apart(tmp_path, rng):
    rows = rng.normal(size=(6, 32)).astype(np.float32)
    tensors = dict.fromkeys(("a.weight", "a", "a.weight.weight", "weight", ".weight", "b.bias"), ("F32", rows))
    assert list(qembag.load_tables(written(tmp_path / "a.gguf", tensors))) == list(tensors)


def test_a_type_that_does_not_fit_is_refused_by_name_where_it_is_asked_for(tmp_path, rng):
    rows = rng.normal(size=(6, 256)).astype(np.float32)
    path = tmp_path / "a.gguf"
    written(path, {"token_embd.weight": quantized("Q5_0", rows), "output.weight": quantized("Q8_0", rows)})
    with pytest.raises(ValueError, match=r"a\.gguf: tensor 'token_embd\.weight' must be Q8_0, .*, got Q5_0"):
        qembag.load_tables(path)
    assert list(qembag.load_tables(path, names="output")) == ["output"]
    with pytest.raises(ValueError, match="got Q5_0"):
        qembag.load_tables(path, names=["output", "token_embd"])
    written(path, {"other.weight": quantized("Q5_0", rows)})
    with pytest.raises(ValueError, match=r"must have 2-D tensors of Q8_0, .*, got \{'other\.weight': 'Q5_0'\}"):
        qembag.load_tables(path)


def test_k_quants_are_refused_by_name(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(files.whole([], [files.tensor("token_embd.weight", [256, 2], 12, 0)], bytes(288)))
    with pytest.raises(ValueError, match="got Q4_K"):
        qembag.load_tables(path)


def test_rows_of_floats_are_mapped(tmp_path, rng):
    path = written(tmp_path / "a.gguf", {"a.weight": ("F32", rng.normal(size=(6, 32)).astype(np.float32))})
    table = qembag.load_tables(path)["a"]
    if sys.byteorder == "little":
        assert not table.data.flags.writeable


def test_alignment_and_version_2(tmp_path, rng):
    rows = rng.normal(size=(3, 32)).astype(np.float32)
    tensors = {"a.weight": ("F16", rows.astype(np.float16)), "b.weight": ("F32", rows)}
    path = written(tmp_path / "a.gguf", tensors, alignment=128)
    assert np.array_equal(qembag.load_tables(path)["b"][:], rows)
    info = [files.tensor("b.weight", [32, 3], 0, 0)]
    path.write_bytes(files.whole([], info, rows.astype("<f4").tobytes(), version=2))
    assert np.array_equal(qembag.load_tables(path)["b"][:], rows)


def test_a_table_of_no_rows(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(files.whole([], [files.tensor("t.weight", [64, 0], 8, 0)], bytes(64)))
    assert qembag.load_tables(path)["t"].shape == (0, 64)


# ---- Damage ----------------------------------------------------------------------------------------------------------

F32_INFO = files.tensor("t.weight", [32, 3], 0, 0)
DATA = bytes(384)
MANY = 1 << 60
DAMAGED = {
    "version": files.whole([], [F32_INFO], DATA, version=9),
    "no version": b"GGUF",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "short": files.whole([], [F32_INFO], DATA[:-1]),
    "keys without end": files.whole([], [F32_INFO], DATA, (1, MANY)),
    "tensors without end": files.whole([], [F32_INFO], DATA, (MANY, 0)),
    "a list without end": files.whole([files.key("a", files.LIST, files.a_list(0, MANY, b""))], [F32_INFO], DATA),
    "texts without end": files.whole([files.key("a", files.LIST, files.a_list(8, MANY, b""))], [F32_INFO], DATA),
    "a text without end": files.whole([files.key("a", files.TEXT, struct.pack("<Q", MANY))], [F32_INFO], DATA),
    "lists in lists": files.whole([files.key("a", 9, files.a_list(9, 1, b"") * 5000)], [F32_INFO], DATA),
    "a key of any length": files.whole([files.key("a" * 70000, 0, b"0")], [F32_INFO], DATA),
    "a name of any length": files.whole([], [files.tensor("a" * 70000, [32, 3], 0, 0)], DATA),
    "a name that is no text": files.whole([], [files.tensor(b"\xff", [32, 3], 0, 0)], DATA),
    "a type that is not there": files.whole([], [files.tensor("t", [32, 3], 4, 0)], DATA),
    "a value's type": files.whole([files.key("a", 77, b"0000")], [F32_INFO], DATA),
    "a list's type": files.whole([files.key("a", 9, files.a_list(77, 1, b"0"))], [F32_INFO], DATA),
    "a name twice": files.whole([], [F32_INFO, F32_INFO], DATA),
    "an overlap": files.whole([], [F32_INFO, files.tensor("u", [32, 3], 0, 128)], DATA + DATA),
    "the same bytes": files.whole([], [F32_INFO, files.tensor("u", [32, 3], 0, 0)], DATA),
    "a place before the data": files.whole([], [files.tensor("t", [32, 3], 0, 2**64 - 32)], DATA),
    "a place behind it": files.whole([], [files.tensor("t", [32, 3], 0, 2**63)], DATA),
    "a product that wraps": files.whole([], [files.tensor("t", [2**32, 2**32], 0, 0)], DATA),
    "another": files.whole([], [files.tensor("t", [32, 2**59], 8, 0)], DATA),
    "part of a block": files.whole([], [files.tensor("t", [33, 3], 8, 0)], DATA),
    "an odd dim": files.whole([], [files.tensor("t", [16, 2], 8, 0)], DATA),
    "many dimensions": files.whole([], [files.tensor("t", [1] * 70, 0, 0)], DATA),
    "no dimension": files.whole([], [files.tensor("t", [], 0, 0)], DATA),
    "an alignment of 0": files.whole([files.key("general.alignment", 4, bytes(4))], [F32_INFO], DATA),
    "an alignment of 2**31": files.whole(
        [files.key("general.alignment", 4, struct.pack("<I", 2**31))], [F32_INFO], DATA
    ),
    "an alignment of another type": files.whole([files.key("general.alignment", 8, files.text("x"))], [F32_INFO], DATA),
    "an alignment that is a list": files.whole(
        [files.key("general.alignment", 9, files.a_list(4, 1, b"@@@@"))], [files.tensor("t", [32, 3], 8, 0)], b""
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused_at_once(tmp_path, damage):
    path = tmp_path / "a.gguf"
    path.write_bytes(DAMAGED[damage])
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ") as raised:
            qembag.load_tables(path)
    # A minute, where each of them might take for ever.
    assert time.monotonic() - started < 60
    assert len(str(raised.value)) < 600


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        qembag.load_tables(tmp_path / "a.gguf")


@pytest.mark.skipif(os.name != "posix" or UNDER_SANITIZER, reason="needs the system's count of this process alone")
def test_a_vocabulary_takes_no_memory(tmp_path, rng):
    """The package makes three objects for each element of a list: 600 MB for a vocabulary of 150,000."""
    path = tmp_path / "a.gguf"
    rows = rng.normal(size=(4, 32)).astype("<f4")
    words = files.vocabulary([f"w{number}" for number in range(100_000)])
    others = files.key("scores", files.LIST, files.a_list(6, 100_000, bytes(400_000)))
    path.write_bytes(files.of_blocks({"t.weight": ("F32", rows.view(np.uint8))}, [words, others]))
    code = (
        "import resource, sys, qembag, gguf\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = most(); tables = qembag.load_tables(sys.argv[1])\n"
        "print(tables['t'].shape, most() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env=child_environment()
    )
    shape, _, kilobytes = done.stdout.rpartition(" ")
    assert shape == "(4, 32)"
    assert int(kilobytes) * (1 if sys.platform == "linux" else 1 / 1024) < 50_000


def test_the_package_missing_is_said(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    path.write_bytes(files.whole([], [F32_INFO], DATA))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'qembag\[gguf\]'"):
        qembag.load_tables(path)


@pytest.mark.parametrize("error", [TypeError, KeyError, RecursionError, MemoryError, AttributeError])
def test_whatever_the_package_raises_becomes_one_error(tmp_path, monkeypatch, error):
    path = tmp_path / "a.gguf"
    path.write_bytes(files.whole([], [F32_INFO], DATA))

    def fails(*arguments):
        raise error("of the package")

    monkeypatch.setattr(importlib.import_module("gguf").GGUFReader, "_build_tensors", fails)
    with pytest.raises(ValueError, match=rf"not a readable GGUF file: {error.__name__}: .*of the package"):
        qembag.load_tables(path)
