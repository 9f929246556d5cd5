"""`qembag demo`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qembag
from qembag.cli import demo
from qembag.verdict.text import human_bytes
from qembag.verdict.traffic import traffic
from support.commands import Command

SMALL = ["--bags", "20", "--length", "3"]


def run_demo(command: Command, *arguments: object) -> tuple[dict[str, list[str]], str]:
    """The demo's lines by table, each as its cells, and the caption."""
    table, caption = command("demo", *arguments).split("\n\n")
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are not aligned"
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines]
    assert cells[0] == ["table", "bytes", "share", "relative error", "worst cosine", "us a batch"]
    return {line[0]: line[1:] for line in cells[1:]}, caption


@pytest.fixture
def save(tmp_path: Path):
    """Saves an array as a .npy file."""

    def save(array: np.ndarray, name: str = "table.npy") -> Path:
        np.save(tmp_path / name, array)
        return tmp_path / name

    return save


@pytest.fixture
def save_tensors(tmp_path: Path):
    """Saves arrays as one .safetensors file."""
    numpy = pytest.importorskip("safetensors.numpy")

    def save(**tensors: np.ndarray) -> Path:
        numpy.save_file(tensors, tmp_path / "table.safetensors")
        return tmp_path / "table.safetensors"

    return save


# ---- What the demo prints ------------------------------------------------------------------------------------------


def test_the_demo_makes_a_table_of_its_own(command):
    lines, caption = run_demo(command, *SMALL)
    assert list(lines) == ["float32", "8-bit", "4-bit", "2-bit"]
    assert [line[:2] for line in lines.values()] == [
        ["48.8 MiB", "100.0%"],
        ["13.7 MiB", "28.1%"],
        ["6.9 MiB", "14.1%"],
        ["3.8 MiB", "7.8%"],
    ]
    assert lines["float32"][2:4] == ["0.00000", "1.000000"]
    errors = [float(line[2]) for line in lines.values()]
    assert errors == sorted(errors)
    assert all(float(line[4].replace(",", "")) > 0 for line in lines.values())
    for part in ("200,000 x 64", "20 bags", qembag.__version__, qembag.show_config()["level"], np.__version__):
        assert part in caption


def test_error_and_cosine_are_those_of_the_batch(command, save, rng):
    weights = rng.normal(size=(40, 10)).astype(np.float32)
    lines, _ = run_demo(command, "--table", save(weights), *SMALL, "--seed", 7)
    indices, offsets = traffic(np.random.default_rng(7), 40, 20, 3)()
    bags = np.split(indices, offsets[1:])

    def pooled(rows):
        return np.array([rows[bag].astype(np.float64).sum(axis=0) for bag in bags])

    exact = pooled(weights)
    for bits in (8, 4, 2):
        table = qembag.quantize(weights, bits)
        ours = pooled(table.codes() * table.scales[:, None].astype(np.float64) + table.biases[:, None])
        error = np.sqrt(((ours - exact) ** 2).sum() / (exact**2).sum())
        cosine = min(a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(ours, exact, strict=True))
        _, _, printed_error, printed_cosine, _ = lines[f"{bits}-bit"]
        assert float(printed_error) == pytest.approx(error, abs=6e-6)
        assert float(printed_cosine) == pytest.approx(cosine, abs=6e-7)


def test_traffic_is_skewed_and_in_range():
    for num_rows in (1, 2, 1000):
        indices, offsets = traffic(np.random.default_rng(0), num_rows, 5000, 4)()
        lengths = np.diff([*offsets, len(indices)])
        assert lengths.min() == 1
        assert lengths.max() == 7
        shares = np.sort(np.bincount(indices, minlength=num_rows) / len(indices))[::-1]
        assert len(shares) == num_rows
        # log(1 + 1 / r) / log(n + 1) for the most popular row, and for the first ten.
        assert shares[0] == pytest.approx(np.log(2) / np.log(num_rows + 1), abs=0.02)
        assert shares[:10].sum() == pytest.approx(np.log(min(10, num_rows) + 1) / np.log(num_rows + 1), abs=0.02)


def test_plain_numpy_sums_the_same_bags(rng):
    weights = rng.normal(size=(30, 5)).astype(np.float32)
    batch = traffic(rng, 30, 12, 6)()
    sums = demo.look_up_floats(weights, batch)
    expected = np.add.reduceat(weights[batch.indices].astype(np.float64), batch.offsets.astype(np.intp))
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_bytes_are_readable(number, text):
    assert human_bytes(number) == text


# ---- Tables from files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (6, 5)])
def test_npy_tables_of_every_float(command, save, rng, dtype, shape):
    lines, caption = run_demo(command, "--table", save(rng.normal(size=shape).astype(dtype)), *SMALL)
    assert lines["float32"][:4] == [f"{4 * shape[0] * shape[1]} B", "100.0%", "0.00000", "1.000000"]
    assert f"{shape[0]} x {shape[1]} (table.npy)" in caption


def test_a_table_in_column_order(command, save, rng):
    weights = rng.normal(size=(9, 4)).astype(np.float32)
    rowwise, _ = run_demo(command, "--table", save(weights), *SMALL)
    columnwise, _ = run_demo(command, "--table", save(np.asfortranarray(weights)), *SMALL)
    assert [line[:4] for line in rowwise.values()] == [line[:4] for line in columnwise.values()]


def test_rows_of_zeros_have_no_direction(command, save, rng):
    lines, _ = run_demo(command, "--table", save(np.zeros((4, 3))), *SMALL)
    assert {tuple(line[2:4]) for line in lines.values()} == {("nan", "nan")}
    lines, _ = run_demo(command, "--table", save(np.vstack([np.zeros((9, 3)), rng.normal(size=(1, 3))])), *SMALL)
    assert float(lines["8-bit"][3]) > 0.99


def test_safetensors_tables(command, save_tensors, rng):
    small, wide = rng.normal(size=(4, 3)).astype(np.float16), rng.normal(size=(5, 8)).astype(np.float32)
    path = save_tensors(small=small, ids=np.zeros((2, 2), np.int64), bias=wide[0])
    _, caption = run_demo(command, "--table", path, *SMALL)
    assert "4 x 3 (table.safetensors)" in caption
    path = save_tensors(small=small, wide=wide)
    assert command.fails("demo", "--table", path).endswith("there are: 'small', 'wide'")
    _, caption = run_demo(command, "--table", path, "--tensor", "wide", *SMALL)
    assert "5 x 8" in caption


def test_a_table_of_bfloat16(command, tmp_path):
    path = tmp_path / "half.safetensors"
    header = b'{"t":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x00\x40")
    lines, caption = run_demo(command, "--table", path, *SMALL)
    assert "1 x 2" in caption
    assert lines["8-bit"][3] == "1.000000"


def test_tensors_that_are_no_tables(command, save_tensors):
    path = save_tensors(ids=np.zeros((2, 2), np.int64), line=np.zeros(3, np.float32))
    assert command.fails("demo", "--table", path).endswith("there is none")
    for name in ("x", "ids", "line"):
        assert f"there is no 2-D tensor of floats '{name}'" in command.fails("demo", "--table", path, "--tensor", name)
    path.write_bytes(b"no")
    assert "is too short for a safetensors file" in command.fails("demo", "--table", path)
    path.unlink()
    assert command.fails("demo", "--table", path) == f"{path}: No such file or directory"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2), np.int32), "must hold float16, float32 or float64, got int32"),
        (np.zeros((3, 2), complex), "must hold float16, float32 or float64, got complex128"),
        (np.zeros(3), "must have 2 dimensions (rows, dim) and a dim of 1 or more, got shape (3,)"),
        (np.zeros((3, 2, 2)), "must have 2 dimensions (rows, dim) and a dim of 1 or more, got shape (3, 2, 2)"),
        (np.zeros((0, 4)), "the table must have rows, got none"),
        (np.zeros((4, 0)), "must have 2 dimensions (rows, dim) and a dim of 1 or more, got shape (4, 0)"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), "weights[1] must be finite"),
        (np.array([[0.0, 1.0], [0.0, 1e300]]), "weights[1] must be finite"),
        (np.array([[0.0, 1e30]]), "weights[0] must have a minimum and a scale that its row can hold as float16"),
        (np.array([[None]]), "must hold float16, float32 or float64, got object"),
    ],
)
def test_arrays_that_are_no_tables(command, save, array, message):
    path = save(array)
    error = command.fails("demo", "--table", path)
    assert error.startswith(f"{path}: ")
    assert message in error


@pytest.mark.parametrize("content", [b"", b"PK", b"0.5 0.25\n1.0 2.0\n", b"\x93NUMPY\x01\x00\x08\x00oh no"])
def test_files_that_are_no_arrays(command, tmp_path, content):
    path = tmp_path / "table.npy"
    path.write_bytes(content)
    assert command.fails("demo", "--table", path).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 5)}",  # more than the file holds
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**33}, {2**29})}}",  # 2^64 bytes: 0, if that overflows
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**70}, 1)}}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4)}",
        "{'descr': 'f4,(', 'fortran_order': False, 'shape': (4, 4)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}",  # a pickle: never read
        "{[]: 1}",
        "{",
        "'''",
        "  a\n b\nc",
        "1+" * 3000 + "1",
    ],
    ids=lambda header: header[:70],
)
def test_headers_that_lie_or_are_none(command, tmp_path, header):
    path = tmp_path / "table.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64))
    assert command.fails("demo", "--table", path).startswith(f"{path}: ")


def test_a_file_cut_short(command, save):
    path = save(np.zeros((100, 100)))
    path.write_bytes(path.read_bytes()[:-1])
    assert command.fails("demo", "--table", path).startswith(f"{path}: ")


def test_paths_that_are_no_files(command, tmp_path):
    assert command.fails("demo", "--table", tmp_path / "no.npy").endswith("no.npy: No such file or directory")
    assert command.fails("demo", "--table", tmp_path / "no.txt").endswith(
        f"must be a .npy, a .safetensors or an .index.json file, got {tmp_path / 'no.txt'} (see `qembag convert`)"
    )
    (tmp_path / "folder.npy").mkdir()
    assert command.fails("demo", "--table", tmp_path / "folder.npy").startswith(str(tmp_path))


# ---- Options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bags", "0"], "argument --bags: must be a whole number of at least 1, got '0'"),
        (["--length", "2.5"], "argument --length: must be a whole number of at least 1, got '2.5'"),
        (["--threads", "-1"], "argument --threads: must be a whole number of at least 1, got '-1'"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, got '-1'"),
        (["--tensor", "x"], "--tensor must come with --table FILE"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--bags", "9" * 30], "are too many"),
        (["--length", "9" * 30], "are too many"),
        (["--bags", str(2**50)], "are too many"),
    ],
)
def test_options_that_cannot_be(command, arguments, message):
    assert message in command.refuses("demo", *arguments)


def test_seeds_and_threads_choose_what_they_say(command, save, rng):
    path = save(rng.normal(size=(50, 6)))
    first, caption = run_demo(command, "--table", path, *SMALL, "--seed", 1, "--threads", 2)
    again, _ = run_demo(command, "--table", path, *SMALL, "--seed", 1)
    other, _ = run_demo(command, "--table", path, *SMALL, "--seed", 2)
    assert "threads: 2" in caption
    assert [line[:4] for line in first.values()] == [line[:4] for line in again.values()]
    assert [line[2:4] for line in first.values()] != [line[2:4] for line in other.values()]
