"""The benchmarks measure what they say: on tiny cases, and without PyTorch but for one."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import qembag

ROOT = Path(__file__).parents[1]
# A shared library is what `cc` makes of these options only where it is a Unix one.
NO_FLOOR = sys.platform == "win32" or shutil.which("cc") is None


@pytest.fixture
def benchmarks(monkeypatch):
    """A module of the package by its name; the root is not on the path of every way to run pytest."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def tiny(benchmarks, bits):
    return benchmarks("cases").Case("tiny", 50, 16, bits, bags=3, length=5)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=False)


def result(ratio: float = 1.5, **changes):
    ns = {"qembag": 4.321, "torch": 6.543, "numpy": 98.76, "floor": 1.234, "other": 5.678}
    some = {"ns": ns, "ratio": ratio, "quartiles": [1.25, 1.75], "equal": True, "rounds": 7, "date": "2026-01-02"}
    return some | changes


def test_cases_are_about_a_hundred_of_each_their_own_kind(benchmarks):
    cases = benchmarks("cases").CASES
    assert 100 <= len([case for case in cases.values() if case.work == "lookup"]) <= 140
    assert all(name == case.name for name, case in cases.items())
    factors = [repr(case).replace(repr(case.name), "") for case in cases.values()]
    assert len(set(factors)) == len(factors)


def test_what_the_first_table_promises_is_measured(benchmarks):
    cases = benchmarks("cases")
    assert len(cases.TARGETS) == 8
    for title, names in cases.TARGETS.items():
        assert [cases.CASES[name].bits for name in names] == [8, 4, 2]
        assert all((cases.CASES[name].threads == 2) == title.startswith("two") for name in names)


def test_tables_fit_and_torch_takes_them(benchmarks):
    for case in benchmarks("cases").CASES.values():
        assert case.dim * case.bits % 8 == 0
        assert case.rows * case.row_bytes <= 2 << 30


@pytest.mark.parametrize(
    "changes",
    [{}, {"weighted": True}, {"pruned": True}, {"length": "mixed"}, {"traffic": "zipf"}, {"index_dtype": "int32"}],
    ids=str,
)
def test_the_traffic_of_a_seed_is_valid_and_always_the_same(benchmarks, changes):
    tables = benchmarks("tables")
    case = benchmarks("cases").Case("tiny", 50, 16, 4, bags=3, **{"length": 5, **changes})
    once, again = (list(tables.sets(case, 50, (1, 0), 4)) for _ in range(2))
    for arrays, same in zip(once, again, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(arrays, same, strict=True))
        assert arrays[0].dtype == case.index_dtype
        assert 0 <= arrays[0].min() <= arrays[0].max() < (100 if case.pruned else 50)
        assert len(arrays) == 2 + case.weighted


def test_each_piece_of_a_table_has_other_codes(benchmarks, monkeypatch, tiny):
    tables = benchmarks("tables")
    monkeypatch.setattr(tables, "PIECE_BYTES", 20 * tiny.row_bytes)
    table = tables.packed_table(tiny)
    assert table.shape == (tiny.rows, tiny.row_bytes)
    assert table.ctypes.data % 64 == 0
    assert len(np.unique(table, axis=0)) == tiny.rows
    assert np.isfinite(qembag.QuantizedTable(table, bits=tiny.bits).dequantize()).all()


def test_workers_take_turns(benchmarks, tiny):
    """Our checksums are those of the answers; NumPy and the floor have none, but times."""
    measure, tables = benchmarks("measure"), benchmarks("tables")
    table = tables.packed_table(tiny)
    look_up = getattr(qembag.ops, f"embedding_bag_{qembag.ops.NAMES[tiny.bits]}_rowwise_offsets")
    answers = [look_up(table, *arrays) for arrays in tables.sets(tiny, tiny.rows, (3, 0), 2)]
    of_all = zlib.crc32(answers[1], zlib.crc32(answers[0]))
    with measure.working(["qembag", "numpy", *([] if NO_FLOOR else ["floor"])], tiny) as workers:
        turns = {name: measure.turn(worker, 3, 2, tiny.rows) for name, worker in workers.items()}
    assert all(seconds > 0 and indices == 30 for seconds, indices, _ in turns.values())
    assert turns.pop("qembag")[2] == [zlib.crc32(answers[1]), of_all]
    assert all(checksums is None for _, _, checksums in turns.values())


@pytest.mark.parametrize(("rows", "rounds", "starts"), [(9, 7, 3), (9, 2, 2), (1 << 20, 7, 1)])
def test_contenders_with_small_tables_are_started_anew(benchmarks, monkeypatch, rows, rounds, starts):
    """All the rounds asked for, each with fresh indices, and the first of each start thrown away."""
    measure, turns = benchmarks("measure"), []

    @contextlib.contextmanager
    def working(names, case, against):
        turns.append([])
        yield {name: name for name in names}

    def turn(worker, seed, calls, rows):
        if worker == "qembag":
            turns[-1].append(seed)
        return [0.01 * (1 if worker == "qembag" else 2), 40, [len(turns)]]

    monkeypatch.setattr(measure, "working", working)
    monkeypatch.setattr(measure, "turn", turn)
    case = benchmarks("cases").Case("some", rows, 100, 8)
    result = measure.measure(case, rounds)
    seeds = [seed for start in turns for seed in start]
    assert len(turns) == starts
    assert seeds == list(range(rounds + starts * measure.WARM_UPS))
    assert max(map(len, turns)) - min(map(len, turns)) <= 1
    assert (result["ratio"], result["quartiles"], result["rounds"], result["equal"]) == (2, [2, 2], rounds, True)


@pytest.mark.skipif(NO_FLOOR, reason="needs cc")
def test_the_floor_reads_the_first_and_last_bytes_of_rows_and_one_of_each_line_between(benchmarks):
    case = benchmarks("cases").Case("tiny", 9, 100, 8, bags=2, length=3)
    table = benchmarks("tables").packed_table(case)
    call, arguments = benchmarks("contenders").build("floor", case, table, None)
    indices = np.array([8, 0, 3, 3, 5, 1])
    assert call(*arguments(indices)) == table[indices][:, [0, 64, 107]].sum(dtype=np.int64)


def test_against_another_build(tmp_path):
    """The one in the directory is the other, and both answer alike."""
    package = Path(qembag.__file__).parent
    kernels = importlib.util.find_spec("qembag._kernels")
    if Path(kernels.origin).parent != package:
        pytest.skip("an editable install has no directory of its own")
    shutil.copytree(package, tmp_path / "qembag")
    done = command("--against", str(tmp_path), "--only", "cached/4bit/dim=8", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "equal: True" in done.stderr
    assert "| case, ns a row | other | qembag | ratio |" in done.stdout
    assert command("--against", str(tmp_path / "qembag"), "--only", "cached").returncode == 2


def test_a_build_is_not_compared_with_itself(benchmarks, tmp_path):
    measure = benchmarks("measure")
    inside, outside = str(tmp_path / "qembag" / "__init__.py"), str(ROOT / "elsewhere.py")
    measure.check_origin("other", {"qembag": inside}, tmp_path)
    measure.check_origin("qembag", {"qembag": outside}, tmp_path)
    for name, path in (("other", outside), ("qembag", inside)):
        with pytest.raises(SystemExit, match=f"{name} imported"):
            measure.check_origin(name, {"qembag": path}, tmp_path)


def test_names_can_be_chosen(benchmarks):
    main = benchmarks("__main__")
    assert main.select(["cached/4bit"], against=False) == ["cached/4bit"]
    assert main.select(["4bit/dim=30", "growth"], against=False) == [
        "cached/4bit/dim=300",
        "growth/8bit",
        "growth/4bit",
    ]
    assert "import" not in main.select(None, against=True)
    with pytest.raises(SystemExit, match="no case is named like nothing"):
        main.select(["nothing"], against=False)


MACHINE = {
    "processor": "A Processor",
    "caches": {"L1d": 32768, "L2": 1 << 20, "L3": 32 << 20},
    "cores": 2,
    "numa_nodes": 1,
    "huge_pages": "madvise",
    "system": "Linux 6",
    "level": "avx512",
    "levels": ["baseline", "avx2", "avx512"],
    "python": "3.11.0",
    "numpy": "2.0.0",
    "torch": "2.13.0",
    "qembag": "0.1.0",
}
GROWTH = {
    "rows": [1000, 4000],
    "bytes": [72000, 288000],
    "ns": {"qembag": [4.04, 5.05], "torch": [6.06, 7.07], "floor": [1.01, 2.02]},
    "rounds": 3,
    "date": "2026-01-03",
}


@pytest.fixture
def results(benchmarks):
    everything = {name: result() for name in benchmarks("cases").CASES}
    return {"machine": MACHINE, "cases": everything, "growth": {"8bit": GROWTH, "4bit": GROWTH}}


def test_the_report_has_the_numbers(benchmarks, results):
    results["cases"]["cached/8bit/zipf"] = result(ratio=0.91)
    results["cases"]["cached/2bit/zipf"] = result(equal=False)
    results["import"] = {"numpy": 80.0, "qembag": 4.04, "torch": 900.0}
    results["allocation"] = {"8 bits, 10000 indices": 321}
    text = benchmarks("report").render(results)
    assert "| one thread, cached, dim 128 | 1.50 | 1.50 | 1.50 | 4.32 | 4.32 | 4.32 |" in text
    assert "| `cached/8bit/dim=100` | 6.54 | 4.32 | 1.50 (1.25 to 1.75) |" in text
    assert "| `memory/4bit` | 98.76 | 6.54 | 4.32 | 1.23 | 1.50 (1.25 to 1.75) |" in text
    assert "Below 0.95: `cached/8bit/zipf` (0.910)." in text
    assert "**Answers differ in: `cached/2bit/zipf`.**" in text
    assert "| 70.3 KiB | 1,000 | 4.04 | 6.06 | 1.01 |" in text
    assert "L1d 32 KiB, L2 1 MiB, L3 32 MiB" in text
    assert "3 to 7 rounds; 2026-01-02 to 2026-01-03" in text
    assert "4.0 ms beyond" in text
    assert "| 8 bits, 10000 indices | 321 |" in text
    for name in results["cases"]:
        assert f"| `{name}` |" in text


def test_part_of_the_results_is_reported_too(benchmarks):
    text = benchmarks("report").render({"machine": MACHINE, "cases": {"cached/2bit/zipf": result()}})
    assert "`cached/2bit/zipf`" in text
    assert "Growth" not in text
    assert "Below 0.95: none." in text


def test_plots_of_the_same_results_are_the_same(benchmarks, results, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    for attempt in ("once", "again"):
        folder = tmp_path / attempt
        folder.mkdir()
        benchmarks("plots").draw(results, folder)
        drawn.append([(folder / name).read_bytes() for name in ("dims.svg", "growth.svg")])
    assert drawn[0] == drawn[1]
    assert all(b"<dc:date>" not in plot for plot in drawn[0])


@pytest.mark.torch
def test_one_case_against_torch():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    done = command("--only", "cached/4bit/dim=8", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "equal: True" in done.stderr
    assert "All answers of 1 cases are equal." in done.stdout
