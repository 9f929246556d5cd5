"""The benchmark of collections measures what it says: on tiny tables."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import qembag

ROOT = Path(__file__).parents[1]
# Of a collection, of our loop and of the others' calls: in three starts, on one thread and on two.
ONE = {"collection": [2.0, 4.0, 1.0], "our loop": [6.0, 6.0, 6.0], "FBGEMM, module": [8.0, 8.0, 8.0]}
ONE |= {"FBGEMM, scripted": [4.0, 9.0, 4.0], "torch's loop": [12.0, 12.0, 12.0]}
ONE |= {"collection, out=": [2.0, 2.0, 2.0], "collection, dict": [3.0, 3.0, 3.0], "collection, torch's rows": [2.0] * 3}
TWO = {way: [2 * time for time in times] for way, times in ONE.items()} | {"collection": [1.0, 2.0, 8.0]}


@pytest.fixture(autouse=True)
def _own_limit():
    yield
    qembag.set_num_threads(None)


@pytest.fixture
def tables(benchmarks):
    return benchmarks("collection_tables")


@pytest.fixture
def times():
    shapes = ("1", "100", "skewed", "even")
    return {str(threads): {shape: {"8": some} for shape in shapes} for threads, some in ((1, ONE), (2, TWO))}


def test_fewer_tables_are_the_first_of_more(tables):
    few, many = (tables.SHAPES[name]() for name in ("26", "100"))
    assert many.tables[:26] == few.tables
    assert {bits for bits, _, _ in few.tables} == {8, 4, 2, 32}
    assert {bits for bits, _, _ in few.tables[:4]} == {8, 4, 2, 32}
    dims = {dim for _, _, dim in many.tables}
    assert (min(dims), max(dims)) == (16, 256)
    assert all(10_000 <= rows <= 100_000 for _, rows, _ in many.tables)


def test_nine_of_ten_rows_are_looked_up_in_one_table_or_all_in_the_only_one(tables):
    skewed, even = (tables.SHAPES[name]() for name in ("skewed", "even"))
    assert skewed.lengths[0] / sum(skewed.lengths) == 0.9
    assert (sum(skewed.lengths), len(skewed.tables), len(even.tables)) == (sum(even.lengths), 100, 1)
    assert skewed.tables[0] == even.tables[0]


def test_rows_as_torch_packs_them_have_the_same_values(tables):
    shape = tables.SHAPES["tiny"]()
    ours, packed = tables.tables_of(shape, tables.blob_of(shape)), tables.as_torch_has(shape)
    for (bits, rows, dim), table, other in zip(shape.tables, ours.values(), packed, strict=True):
        assert table.shape == other.shape == (rows, dim)
        assert np.isfinite(table[:]).all()
        assert len(np.unique(table[:], axis=0)) == rows
        assert np.array_equal(table[:], other[:])
        assert bits == 32 or other.layout == qembag.quantize(np.zeros((1, dim), np.float32), bits).layout


def test_each_call_has_indices_of_its_own_and_all_libraries_the_same(tables):
    shape = tables.SHAPES["tiny"]()
    once, again = ([some for some, _ in tables.sets(shape, 4, 7, 5)] for _ in range(2))
    assert len(once) == 5
    assert all(np.array_equal(*pair) for pair in zip(once, again, strict=True))
    assert not np.array_equal(once[0], once[1])
    assert not np.array_equal(once[0], next(tables.sets(shape, 4, 8))[0])
    indices, ends = next(tables.sets(shape, 4, 7))
    assert len(ends) == 4 * len(shape.tables) + 1
    pieces = list(tables.parts(shape, indices, ends))
    assert np.array_equal(np.concatenate([some for some, _ in pieces]), indices)
    for (some, own), (_, rows, _) in zip(pieces, shape.tables, strict=True):
        assert own.tolist() == [0, 3, 6, 9, 12]
        assert 0 <= some.min() <= some.max() < rows


def test_every_way_to_call_qembag_gives_the_bits_of_a_call_for_each_table(benchmarks, tables):
    worker, shape = benchmarks("collection_worker"), tables.SHAPES["tiny"]()
    indices, ends = next(tables.sets(shape, 4, 7))
    found = zip(tables.as_torch_has(shape), tables.parts(shape, indices, ends), strict=True)
    bags = [qembag.embedding_bag(table, some, own, include_last_offset=True) for table, (some, own) in found]
    for call, arguments in worker.of_qembag(shape).values():
        assert np.array_equal(call(*arguments(indices, ends)), np.concatenate(bags, axis=1))


@pytest.mark.parametrize(
    "libraries",
    [
        ["qembag"],
        pytest.param(["qembag", "torch", "fbgemm"], marks=pytest.mark.torch),
    ],
    ids="-".join,
)
def test_libraries_take_turns_and_agree(benchmarks, tmp_path, capsys, libraries):
    for library, package in (("torch", "torch"), ("fbgemm", "fbgemm_gpu")):
        if library in libraries and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    saved = tmp_path / "results.json"
    options = ["--only", "tiny", "--starts", "1", "--seconds", "0.002", "--threads", "1"]
    benchmarks("collection").main([*options, "--libraries", *libraries, "--save", str(saved)])
    ways = json.loads(saved.read_text())["times"]["1"]["tiny"]["2"]
    assert sum(way.startswith(("collection", "our loop")) for way in ways) == 5
    assert ("torch's loop" in ways) == ("torch" in libraries)
    assert sum(way.startswith("FBGEMM") for way in ways) == 3 * ("fbgemm" in libraries)
    assert all(len(times) == 1 and min(times) > 0 for times in ways.values())
    assert "| tiny | 2 |" in capsys.readouterr().out


def test_answers_of_other_bits_are_refused(benchmarks, monkeypatch):
    collection = benchmarks("collection")

    class Other:
        def __init__(self, name):
            self.name = name

        def ask(self, *asked):
            return {self.name: (1.0, 1 if self.name == "collection" else 2)}

    assert collection.take_turns([Other("collection")], "1", 8, 0, 0.1) == {"collection": 1.0}
    with pytest.raises(AssertionError, match="answers of 1 tables, batch 8, must be the same bits"):
        collection.take_turns([Other("collection"), Other("FBGEMM, module")], "1", 8, 0, 0.1)


def test_others_are_taken_at_their_best(benchmarks, times):
    """Of their ways to call; of two threads and one."""
    collection = benchmarks("collection")
    assert collection.best(times, "1", "1", "8", "FBGEMM") == [4, 8, 4]
    assert collection.best(times, "2", "1", "8", "FBGEMM") == [4, 8, 4]
    assert collection.ratios(times, "1", "1", "8", "FBGEMM") == [2, 2, 4]
    assert collection.ratios(times, "2", "1", "8", "FBGEMM") == [4, 4, 0.5]
    assert collection.ratios(times, "1", "1", "8", "torch") == [6, 6, 6]


def test_the_report_says_where_a_collection_is_slower(benchmarks, times):
    collection = benchmarks("collection")
    assert collection.below_one(times) == []
    times["2"]["100"]["8"] = TWO | {"collection": [8.0, 9.0, 10.0]}
    assert collection.below_one(times) == ["100 tables, batch 8, threads: 2: 0.50 (0.40 to 0.89)"]
    grid = collection.lines_of_grid(times, "FBGEMM")
    assert grid[0] == "| tables | batch 8, threads: 1 | batch 8, threads: 2 |"
    assert grid[2:] == ["| 1 | 2.00 | 4.00 |", "| 100 | 2.00 | 0.50 |"]


def test_the_gain_of_a_second_thread_is_compared(benchmarks, times):
    collection = benchmarks("collection")
    times["2"]["skewed"]["8"] = TWO | {"collection": [2.0, 2.0, 1.0]}
    lines = collection.lines_of_gains(times)
    assert lines[2].startswith("| collection | 8 | 1.00 (1.00 to 2.00) | 2.00 (0.12 to 2.00) | 1.00 (0.50 to 8.00) |")
    assert collection.lines_of_gains({"1": times["1"]}) == []


def test_plots_of_the_same_times_are_the_same(benchmarks, times, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("once.svg", "again.svg"):
        benchmarks("collection").draw(times, tmp_path / name)
    assert (tmp_path / "once.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert b"<dc:date>" not in (tmp_path / "once.svg").read_bytes()
