"""`qembag lookup`."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest

import qembag
from conftest import child_environment
from qembag.cli import contents, lookup
from support.commands import float_rows, python_m_qembag


@pytest.fixture
def path(tmp_path):
    """A file of two tables."""
    rows = float_rows()
    tables = {"codes": qembag.quantize(rows, 4), "floats": rows}
    qembag.save_tables(tmp_path / "a.safetensors", tables)
    return tmp_path / "a.safetensors"


@pytest.fixture
def table(path):
    return qembag.open_table(path, "codes")


@pytest.fixture
def given(monkeypatch):
    """Sets standard input."""

    def give(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    return give


def vectors(text: str, separator: str | None = None) -> np.ndarray:
    return np.array([line.split(separator) for line in text.splitlines()]).astype(np.float32)


@pytest.fixture(params=[1, 8 << 20])
def at_once(request, monkeypatch):
    monkeypatch.setattr(contents, "AT_ONCE", request.param)


def test_text_has_a_bag_a_line(command, path, table, given, at_once):
    given(b"3 4,5\n\n  7\r\n1,  2\t9")
    found = vectors(command("lookup", path, "--table", "codes"))
    expected = qembag.embedding_bag(table, [3, 4, 5, 7, 1, 2, 9], lengths=[3, 0, 1, 3])
    # The text has each number's own bits.
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "sqrtn"])
def test_modes(command, path, table, given, tmp_path, mode):
    given(b"3 4 5\n9 8 8\n")
    bags = np.array([[3, 4, 5], [9, 8, 8]])
    expected = qembag.embedding_bag(table, bags, mode=mode)
    assert np.array_equal(vectors(command("lookup", path, "--table", "codes", "--mode", mode)), expected)
    np.save(tmp_path / "bags.npy", bags)
    array = command("lookup", path, "--table", "codes", "--mode", mode, "--indices", tmp_path / "bags.npy")
    assert np.array_equal(vectors(array), expected)


def test_arrays_are_looked_up_in_parts(command, path, table, tmp_path, rng, at_once):
    bags, weights = rng.integers(0, 300, (7, 4)), rng.normal(size=(7, 4)).astype(np.float32)
    np.save(tmp_path / "bags.npy", bags)
    np.save(tmp_path / "rows.npy", bags[0].astype(np.int32))
    np.save(tmp_path / "weights.npy", weights)
    base = ["lookup", path, "--table", "codes", "--indices"]
    found = command(*base, tmp_path / "bags.npy", "--weights", tmp_path / "weights.npy")
    assert np.array_equal(vectors(found), qembag.embedding_bag(table, bags, per_sample_weights=weights))
    assert np.array_equal(vectors(command(*base, tmp_path / "rows.npy")), qembag.embedding(table, bags[0]))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_arrays_without_elements(command, path, tmp_path, shape):
    np.save(tmp_path / "bags.npy", np.empty(shape, np.int64))
    out = tmp_path / "out.npy"
    assert command("lookup", path, "--table", "codes", "--indices", tmp_path / "bags.npy", "--out", out) == ""
    assert np.array_equal(np.load(out), np.zeros((shape[0], 32), np.float32))


def test_formats_go_to_files_and_pipes(command, path, table, tmp_path, given, at_once):
    bags = np.array([[3, 4, 5], [9, 8, 8]])
    np.save(tmp_path / "bags.npy", bags)
    expected = qembag.embedding_bag(table, bags)
    base = ["lookup", path, "--table", "codes", "--indices", tmp_path / "bags.npy"]
    for name in ("out.npy", "out.csv", "out.txt"):
        assert command(*base, "--out", tmp_path / name) == ""
    np.save(tmp_path / "expected.npy", expected.astype("<f4"))
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert np.array_equal(vectors((tmp_path / "out.csv").read_text(), ","), expected)
    assert np.array_equal(vectors((tmp_path / "out.txt").read_text()), expected)
    assert np.array_equal(vectors(command(*base, "--format", "csv"), ","), expected)
    # Text of unknown length to an array.
    given(b"3 4 5\n9 8 8\n")
    assert command(*base[:4], "--out", tmp_path / "text.npy") == ""
    assert (tmp_path / "text.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    # The suffix gives way to what is asked for.
    assert command(*base, "--out", tmp_path / "odd.csv", "--format", "text") == ""
    assert (tmp_path / "odd.csv").read_bytes() == (tmp_path / "out.txt").read_bytes()


def test_an_array_through_a_pipe(path, table):
    done = python_m_qembag("lookup", path, "--table", "codes", "--format", "npy", text=False, input=b"1 2\n3\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert np.array_equal(np.load(io.BytesIO(done.stdout)), qembag.embedding_bag(table, [1, 2, 3], [0, 2]))


def test_progress_counts_vectors(command, path, tmp_path, monkeypatch):
    reports = []

    @contextlib.contextmanager
    def watching(quiet):
        yield None if quiet else lambda *done: reports.append(done)

    monkeypatch.setattr(lookup, "progress", watching)
    monkeypatch.setattr(contents, "AT_ONCE", 2 * 32 * 4)
    np.save(tmp_path / "bags.npy", [[1], [2], [3]])
    base = ["lookup", path, "--table", "codes", "--indices", tmp_path / "bags.npy"]
    command(*base, "--out", tmp_path / "out.npy")
    assert reports == [(2, None, 256), (3, None, 384)]
    command(*base, "--out", tmp_path / "out.npy", "--quiet")
    assert len(reports) == 2


def test_an_array_is_not_for_terminals(command, path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "not to a terminal" in command.refuses("lookup", path, "--table", "codes", "--format", "npy")


def test_answers_come_before_the_next_question(path, table):
    command = [sys.executable, "-m", "qembag", "lookup", str(path), "--table", "codes"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child_environment()) as process:
        for bag in ([1, 2], [3], [], [4, 4]):
            process.stdin.write(" ".join(map(str, bag)) + "\n")
            process.stdin.flush()
            expected = qembag.embedding_bag(table, np.array(bag, np.int64), lengths=[len(bag)])
            assert np.array_equal(vectors(process.stdout.readline()), expected)
        process.stdin.close()
        assert process.stdout.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("x", "'x' is not a whole number"),
        ("1.0", "'1.0' is not a whole number"),
        ("1_0", "'1_0' is not a whole number"),
        ("+-1", "'+-1' is not a whole number"),
        ("\N{ARABIC-INDIC DIGIT ONE}", "'\\u0661' is not a whole number"),
        ("\x1b[2J", "'\\x1b[2J' is not a whole number"),
        ("300", "index 300 is out of range for a table of 300 rows"),
        ("-1", "index -1 is out of range for a table of 300 rows"),
        (str(2**70), f"index {2**70} is out of range for a table of 300 rows"),
        ("9" * 5000, f"index {'9' * 39}... is out of range for a table of 300 rows"),
    ],
)
def test_faults_name_the_line(command, path, table, given, tmp_path, at_once, line, fault):
    # What comes before is answered, however the text was cut.
    given(f"5 6\n7\n1 {line} y\n8\n".encode())
    before = qembag.embedding_bag(table, [5, 6, 7], [0, 2])
    prints = "".join(" ".join(map(str, row)) + "\n" for row in before.astype("S32").astype(str).tolist())
    assert command.fails("lookup", path, "--table", "codes", prints=prints) == f"standard input: line 3: {fault}"
    text = tmp_path / "bags.txt"
    text.write_text(f"5 6\n7\n1 {line} y\n8\n", encoding="utf-8")
    out = tmp_path / "out.txt"
    message = command.fails("lookup", path, "--table", "codes", "--indices", text, "--out", out)
    assert message == f"{text}: line 3: {fault}"
    assert not out.exists()


def test_a_long_line_in_many_pieces(command, path, table, given, monkeypatch):
    monkeypatch.setattr(lookup, "CHUNK", 3)
    given(b" 12" * 1000 + b"\n1\n2 3")
    expected = qembag.embedding_bag(table, [12] * 1000 + [1, 2, 3], lengths=[1000, 1, 2])
    assert np.array_equal(vectors(command("lookup", path, "--table", "codes")), expected)


@pytest.mark.parametrize(
    ("array", "fault"),
    [
        (np.zeros((2, 2)), "must hold integers"),
        (np.zeros((2, 2, 2), int), "indices must have 1 or 2 dimensions, got shape (2, 2, 2)"),
        (np.array([[1, 2], [3, 300]]), "indices[1, 1] is 300: out of range for a table of 300 rows"),
        (np.array([1, 2, -1]), "indices[2] is -1: out of range for a table of 300 rows"),
        (np.array([[1], [2**64 - 1]], np.uint64), f"indices[1, 0] is {2**64 - 1}: out of range"),
    ],
)
def test_arrays_that_are_no_indices(command, path, tmp_path, at_once, array, fault):
    np.save(tmp_path / "bags.npy", array)
    message = command.fails("lookup", path, "--table", "floats", "--indices", tmp_path / "bags.npy")
    assert message.startswith(f"{tmp_path / 'bags.npy'}: ")
    assert fault in message or fault == "must hold integers"


def test_options_that_do_not_go_together(command, path, tmp_path):
    np.save(tmp_path / "rows.npy", [1, 2])
    np.save(tmp_path / "bags.npy", [[1, 2]])
    base = ["lookup", path, "--table", "codes"]
    assert "must come with --indices of a .npy file" in command.refuses(*base, "--weights", "w.npy")
    assert "are for bags" in command.fails(*base, "--indices", tmp_path / "rows.npy", "--mode", "mean")
    shapes = ["--indices", tmp_path / "bags.npy", "--weights", tmp_path / "rows.npy"]
    assert "must have the shape of the indices, (1, 2), got (2,)" in command.fails(*base, *shapes)
    assert command.fails("lookup", path).endswith("--table must be one of 'codes', 'floats'")
    assert command.fails("lookup", path, "--table", "x").endswith("got 'x'")


def test_floats_in_npy_are_a_table(command, tmp_path, given):
    for dtype, order in (("<f4", "C"), (">f4", "F"), ("<f8", "C"), (">f8", "F")):
        np.save(tmp_path / "rows.npy", np.asarray(float_rows(), dtype, order=order))
        given(b"1\n")
        assert np.array_equal(vectors(command("lookup", tmp_path / "rows.npy"))[0], float_rows()[1])
    assert "--table is for files" in command.fails("lookup", tmp_path / "rows.npy", "--table", "x")


def test_files_that_are_not_there(command, path, tmp_path):
    no = tmp_path / "no"
    assert command.fails("lookup", f"{no}.safetensors") == f"{no}.safetensors: No such file or directory"
    base = ["lookup", path, "--table", "codes"]
    assert command.fails(*base, "--indices", no) == f"{no}: No such file or directory"
    assert command.fails(*base, "--indices", f"{no}.npy") == f"{no}.npy: No such file or directory"
    np.save(tmp_path / "bags.npy", [[1, 2]])
    message = command.fails(*base, "--indices", tmp_path / "bags.npy", "--out", no / "out.npy")
    assert message == f"{no / 'out.npy'}: No such file or directory"


def test_an_input_that_is_closed(command, path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert command.fails("lookup", path, "--table", "codes") == "standard input: it is closed"
