"""`qembag compare` and `qembag bench`."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER
from qembag.cli import bench
from qembag.cli.output import Failure
from support.commands import float_rows


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "words.npy", float_rows())
    return tmp_path / "words.npy"


def as_json(command, *arguments):
    return json.loads(command("compare", *arguments, "--json"))


def without_times(report):
    """What is the same in each run."""
    variants = [{key: value for key, value in one.items() if key != "ns_per_row"} for one in report["variants"]]
    return {
        "variants": variants,
        **{key: report[key] for key in ("num_bags", "num_rows_quantized", "own_bags", "seed")},
    }


# ---- compare ---------------------------------------------------------------------------------------------------------


def test_it_prints_the_report(command, source):
    printed = command("compare", source, "--quiet")
    report = qembag.compare(str(source))
    assert {one.label for one in report.variants} <= {line.split("  ")[0] for line in printed.splitlines()}
    assert report.recommendation() in printed


def test_options_are_those_of_the_function(command, source):
    options = ["--bits", 4, 2, "--methods", "lsq", "--group-sizes", "row", 16, "--sample", 100, "--seed", 3]
    found = as_json(command, source, *options, "--threads", 1)
    given = {"bits": (4, 2), "methods": "lsq", "group_sizes": (None, 16), "sample": 100, "seed": 3}
    assert without_times(found) == without_times(qembag.compare(str(source), **given).to_dict())


def test_bags_of_ones_own(command, source, tmp_path, rng):
    indices, offsets = rng.integers(0, 300, 40), np.arange(0, 40, 4)
    weights = rng.random(40).astype(np.float32)
    np.savez(tmp_path / "bags.npz", indices=indices, offsets=offsets)
    np.savez(tmp_path / "weighted.npz", indices=indices, offsets=offsets, per_sample_weights=weights)
    np.save(tmp_path / "bags.npy", indices.reshape(10, 4))
    for name, bags in (
        ("bags.npz", (indices, offsets)),
        ("weighted.npz", (indices, offsets, weights)),
        ("bags.npy", indices.reshape(10, 4)),
    ):
        found = as_json(command, source, "--bags", tmp_path / name, "--bits", 4)
        assert without_times(found) == without_times(qembag.compare(str(source), bits=4, bags=bags).to_dict())
        assert found["own_bags"]


def test_one_tensor_of_several(command, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "a.safetensors"
    numpy.save_file({"a": float_rows(), "b": float_rows(9)}, path)
    assert as_json(command, path, "--tensor", "b", "--bits", 4)["num_embeddings"] == 9
    assert "'a', 'b'" in command.fails("compare", path)


def test_pictures_and_pages(command, source, tmp_path):
    pytest.importorskip("matplotlib")
    printed = command("compare", source, "--bits", 4, "--plot", tmp_path / "a.svg", "--html", tmp_path / "a.html")
    assert "4 bits" in printed
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert b"<html" in (tmp_path / "a.html").read_bytes()


def test_without_matplotlib_the_error_names_the_extra(capsys, source, tmp_path, monkeypatch):
    import sys

    from qembag import cli

    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends", "matplotlib.backends.backend_svg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["compare", str(source), "--bits", "8", "--html", str(tmp_path / "a.html")]) == 1
    printed = capsys.readouterr()
    assert "8 bits" in printed.out  # the numbers are not lost
    assert "pip install 'qembag[plot]'" in printed.err
    assert printed.err.count("\n") == 1


def test_what_cannot_be_compared(command, source, tmp_path):
    assert "must be a whole number" in command.refuses("compare", source, "--group-sizes", "column")
    assert "invalid choice" in command.refuses("compare", source, "--methods", "best")
    np.savez(tmp_path / "bags.npz", rows=np.arange(3))
    message = command.fails("compare", source, "--bags", tmp_path / "bags.npz")
    assert message == f"{tmp_path / 'bags.npz'}: must hold indices and offsets, and per_sample_weights if any, got rows"
    np.save(tmp_path / "bags.npy", [[300]])
    assert "300" in command.fails("compare", source, "--bags", tmp_path / "bags.npy")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    assert command.fails("compare", source, "--bags", tmp_path / "bad.npz").startswith(str(tmp_path / "bad.npz"))
    (tmp_path / "bad.npz").write_bytes((tmp_path / "bags.npy").read_bytes())
    assert command.fails("compare", source, "--bags", tmp_path / "bad.npz").startswith(str(tmp_path / "bad.npz"))
    assert "No such file" in command.fails("compare", tmp_path / "no.npy")


# ---- bench -----------------------------------------------------------------------------------------------------------

starts_processes = pytest.mark.skipif(UNDER_SANITIZER, reason="other processes are not under the sanitizer")
QUICK = ["--seconds", 0.01, "--bags", 20, "--length", 3]


@pytest.fixture
def without_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))


@starts_processes
def test_contenders_take_turns_and_agree(command, tmp_path, without_torch):
    path = tmp_path / "a.safetensors"
    qembag.save_tables(path, {"a": qembag.quantize(float_rows(), 4), "b": float_rows(9)})
    printed = command("bench", path, "--table", "a", *QUICK, "--quiet")
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["lookup", "qembag", "numpy"]
    assert float(lines[1].split()[-1]) == 1
    assert "bits=4" in printed
    found = json.loads(command("bench", path, "--table", "b", *QUICK, "--json", "--threads", 2, "--seed", 5))
    assert found["ns_a_row"].keys() == {"qembag", "numpy"}
    assert min(found["ns_a_row"].values()) > 0
    assert found["rounds"] >= 3
    assert (found["threads"], found["seed"], found["bags"], found["length"]) == (2, 5, 20, 3)


@starts_processes
@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8", "4", "2", "floats", "pruned", "converted"])
def test_torch_is_a_contender(command, tmp_path, kind):
    pytest.importorskip("torch")
    rows = float_rows()
    tables = {
        "floats": rows,
        "pruned": qembag.quantize(rows, 4).prune(np.arange(0, 300, 2)),
        "converted": qembag.quantize(rows, 8, scale_first=True, row_alignment=64),
    }
    table = tables[kind] if kind in tables else qembag.quantize(rows, int(kind))
    qembag.save_tables(tmp_path / "a.safetensors", table)
    found = json.loads(command("bench", tmp_path / "a.safetensors", *QUICK, "--json"))
    assert found["ns_a_row"].keys() == {"qembag", "numpy", "torch"}


def test_tables_that_torch_has_no_operator_for(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    options = type("Options", (), {"file": "x", "table": None, "threads": 1})
    rows = float_rows()
    for table in (
        qembag.quantize(rows, 4, group_size=16),
        qembag.FloatTable(rows.astype(np.float16)),
        qembag.FloatTable(rows).prune([1]),
    ):
        jobs, notes = bench.jobs_of(table, options, tmp_path)
        assert [job["contender"] for job in jobs] == ["qembag", "numpy"]
        assert notes[0].startswith("torch ")
    jobs, notes = bench.jobs_of(qembag.quantize(rows, 4), options, tmp_path)
    assert [job["contender"] for job in jobs] == ["qembag", "numpy", "torch"]
    assert notes == []


def test_answers_that_differ_are_found(tmp_path, rng):
    sums = rng.normal(size=(4, 3)).astype(np.float32)
    contenders = [bench.Contender(name, None, tmp_path / f"{name}.npy", []) for name in ("qembag", "numpy")]
    np.save(contenders[0].answer, sums)
    for other in (sums[:, :2], sums + 0.01, np.where(sums == sums.max(), np.nan, sums)):
        np.save(contenders[1].answer, other)
        with pytest.raises(Failure, match="numpy: its sums are not those of qembag"):
            bench.check_answers(contenders)
    np.save(contenders[1].answer, np.nextafter(sums, 9))
    bench.check_answers(contenders)


@starts_processes
def test_a_contender_that_fails(command, tmp_path, without_torch, monkeypatch):
    np.save(tmp_path / "a.npy", float_rows())
    monkeypatch.setattr(bench, "PACKAGE", "no_such_package")
    assert command.fails("bench", tmp_path / "a.npy", *QUICK).startswith("qembag: ModuleNotFoundError: ")
    monkeypatch.setattr(bench.sys, "executable", "/bin/false" if bench.sys.platform != "win32" else "where.exe")
    assert "its process ended with status" in command.fails("bench", tmp_path / "a.npy", *QUICK)


def test_what_cannot_be_measured(command, tmp_path):
    assert "must be a number above 0" in command.refuses("bench", "a.npy", "--seconds", "0")
    np.save(tmp_path / "a.npy", np.zeros((0, 4), np.float32))
    assert "the table must have rows" in command.fails("bench", tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((2, 4), np.int64))
    assert command.fails("bench", tmp_path / "a.npy").startswith(str(tmp_path / "a.npy"))
