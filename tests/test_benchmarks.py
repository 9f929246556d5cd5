"""The benchmarks measure what they say: on tiny cases, and without PyTorch but for one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import shutil
import subprocess
import sys
import zlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest

import qembag
from support.layouts import NAMES

ROOT = Path(__file__).parents[1]
# A shared library is what `cc` makes of these options only where it is a Unix one.
ONCE = ("--starts", "1", "--rounds", "1")
NO_FLOOR = sys.platform == "win32" or shutil.which("cc") is None


@pytest.fixture(autouse=True)
def _own_limit():
    """Contenders set a limit of threads for their process."""
    yield
    qembag.set_num_threads(None)


@pytest.fixture
def tiny(benchmarks, bits):
    return benchmarks("cases").Case("tiny", 50, 16, bits, bags=3, length=5)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=False)


def test_cases_are_of_each_their_own_kind(benchmarks):
    cases = benchmarks("cases").CASES
    lookups = [case for case in cases.values() if case.work == "lookup"]
    assert 150 <= len([case for case in lookups if not case.needs_layouts]) <= 180
    assert len([case for case in lookups if case.of_floats]) == 24
    assert all(name == case.name for name, case in cases.items())
    factors = [repr(case).replace(repr(case.name), "") for case in cases.values()]
    assert len(set(factors)) == len(factors)


def test_what_the_first_table_promises_is_measured(benchmarks):
    cases = benchmarks("cases")
    assert len(cases.TARGETS) == 8
    for title, names in cases.TARGETS.items():
        assert [cases.CASES[name].bits for name in names] == [8, 4, 2]
        assert all((cases.CASES[name].threads == 2) == title.startswith("two") for name in names)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim", ["", "dim=64,"])
def test_each_option_has_a_case(benchmarks, bits, dim):
    cases = benchmarks("cases").CASES
    for option in ("padding=unused", "padding=30%", "pruned", "max", "mean", "float16"):
        case = cases[f"cached/{bits}bit/{dim}{option}"]
        assert (case.bits, case.dim) == (bits, 64 if dim else 128)
        assert case.optional
        assert not benchmarks("cases").plain(case).optional
    for small in ("one-bag=10", "two-bags=2"):
        calls = [cases[f"cached/{bits}bit/{small}{suffix}"].call for suffix in ("", ",public")]
        assert calls == ["ops", "public"]


@pytest.mark.parametrize("where", ["cached", "memory"])
@pytest.mark.parametrize(
    ("bits", "layouts"),
    [
        (8, {"half-first", "float-first", "half-behind", "fbgemm", "groups=32", "groups=64"}),
        (4, {"half-first", "float-behind", "fbgemm", "groups=32", "groups=64"}),
        (2, {"half-first", "float-behind", "fbgemm", "groups=32", "groups=64"}),
    ],
)
def test_each_layout_has_a_case_as_large_as_torchs(benchmarks, where, bits, layouts):
    cases = benchmarks("cases")
    for dim, prefix, expected in ((128, "", layouts), (64, "dim=64,", layouts - {"groups=64"})):
        start = f"{where}/{bits}bit/{prefix}layout="
        found = {name.removeprefix(start): case for name, case in cases.CASES.items() if name.startswith(start)}
        assert set(found) == expected
        base = cases.CASES[f"{where}/{bits}bit{'/dim=64' if prefix else ''}"]
        for layout, case in found.items():
            assert (case.layout, case.dim, case.rows, case.bags) == (layout, dim, base.rows, base.bags)
            assert (case.optional, case.beyond_torch) == (True, True)
            assert cases.plain(case).layout == "torch"


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_cases_count_bytes_as_the_package_does(benchmarks, bits):
    cases = benchmarks("cases")
    for name, layout in cases.LAYOUTS.items():
        case = cases.Case("tiny", 9, 48, bits, layout=name)
        floats = np.ones((1, 48), np.float32)
        assert case.row_bytes == qembag.quantize(floats, bits, **dataclasses.asdict(layout)).row_bytes
    assert cases.CASES["cached/8bit/layout=fbgemm"].row_bytes == 144
    assert cases.CASES["cached/element=bfloat16"].row_bytes == 256


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


@pytest.mark.parametrize(("length", "padded"), [(10, 3), (40, 12), ("mixed", None)])
def test_padding_ends_bags_and_is_nowhere_else(benchmarks, length, padded):
    tables = benchmarks("tables")
    case = benchmarks("cases").Case("tiny", 50, 16, 4, bags=30, length=length, padding="30%")
    ((indices, offsets),) = tables.sets(case, 50, (1, 0), 1)
    assert tables.padding_idx(case, 50) == 49
    for bag in np.split(indices, offsets[1:]):
        rest = len(bag) - (round(0.3 * len(bag)) if padded is None else padded)
        assert (bag[rest:] == 49).all()
        assert (bag[:rest] < 49).all()
    assert tables.counted(case, 50, indices) == np.count_nonzero(indices < 49)


def test_unused_padding_never_occurs(benchmarks):
    tables = benchmarks("tables")
    case = benchmarks("cases").Case("tiny", 5, 16, 4, bags=3, length=400, padding="unused")
    ((indices, _),) = tables.sets(case, 5, (1, 0), 1)
    assert set(indices.tolist()) == {0, 1, 2, 3}
    assert tables.padding_idx(case, 5) == 4


def test_arrays_begin_at_random_cache_lines_the_same_in_each_start_of_a_number(benchmarks):
    tables = benchmarks("tables")
    drawn = []
    for start in (3, 4, 3):
        tables.PLACES.seed(start)
        drawn.append([tables.random_place() for _ in range(50)])
    assert drawn[0] == drawn[2] != drawn[1]
    assert len(set(drawn[0])) > 20
    assert {place % 64 for place in drawn[0]} == {0}
    assert max(drawn[0]) < 4096
    copy = tables.placed(np.arange(10))
    assert np.array_equal(copy, np.arange(10))
    assert copy.ctypes.data % 64 == 0


def test_an_array_begins_at_the_place_that_is_drawn(benchmarks, monkeypatch):
    tables = benchmarks("tables")
    room = np.zeros(8192, dtype=np.uint8)
    first_line = room.ctypes.data + -room.ctypes.data % 64
    monkeypatch.setattr(tables.np, "empty", lambda num_bytes, dtype: room[:num_bytes])
    for place in (0, 64, 4032):
        monkeypatch.setattr(tables, "random_place", lambda place=place: place)
        array = tables.reserve(100)
        assert (array.ctypes.data - first_line, array.nbytes) == (place, 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": "unused"},
        {"padding": "30%"},
        {"mode": "mean"},
        {"mode": "max"},
        {"half": True},
        {"padding": "30%", "mode": "mean", "half": True},
        {"pruned": True},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("own_output", [False, True])
def test_the_public_contender_and_the_plain_one_do_what_the_case_says(benchmarks, changes, own_output):
    contenders, tables = benchmarks("contenders"), benchmarks("tables")
    case = benchmarks("cases").Case("tiny", 50, 16, 8, bags=20, length=10, call="public", **changes)
    packed, mapping = tables.packed_table(case), tables.mapping_of(case)
    ((indices, offsets),) = tables.sets(case, 50, (1, 0), 1)
    values = qembag.QuantizedTable(packed, 8).dequantize().astype(np.float64)
    bags = indices.reshape(20, 10)
    counts = (bags % 2 == 0) if case.pruned else (bags != 49) if case.padding != "none" else np.ones(bags.shape, bool)
    stored = bags // 2 if case.pruned else bags
    assert tables.counted(case, 50, indices) == np.count_nonzero(counts)
    per_row = np.where(counts[..., None], values[stored], -np.inf if case.mode == "max" else 0)
    expected = per_row.max(axis=1) if case.mode == "max" else per_row.sum(axis=1)
    if case.mode == "mean":
        expected /= counts.sum(axis=1, keepdims=True)
    ours, plain = (contenders.build(name, case, packed, mapping, own_output) for name in ("qembag", "plain"))
    answer = ours.call(*ours.arguments(indices, offsets))
    assert answer.dtype == (np.float16 if case.half else np.float32)
    np.testing.assert_allclose(answer, expected, rtol=2e-3 if case.half else 1e-4, atol=1e-3)
    answer = plain.call(*plain.arguments(indices, offsets))
    np.testing.assert_allclose(answer, values[stored].sum(axis=1), rtol=1e-4, atol=1e-3)
    assert (ours.all_count, plain.all_count) == (False, True)


@pytest.mark.parametrize("layout", ["half-first", "float-first", "half-behind", "float-behind", "fbgemm", "groups=32"])
def test_rows_of_each_layout_hold_the_same_values_as_torchs(benchmarks, monkeypatch, bits, layout):
    contenders, tables, cases = benchmarks("contenders"), benchmarks("tables"), benchmarks("cases")
    case = cases.Case("tiny", 50, 80, bits, bags=20, length=10, call="public", layout=layout)
    monkeypatch.setattr(tables, "PIECE_BYTES", 20 * case.codes_bytes)
    packed = {"qembag": tables.packed_table(case), "plain": tables.packed_table(case, None, cases.plain(case))}
    assert [rows.shape for rows in packed.values()] == [(50, case.row_bytes), (50, cases.plain(case).row_bytes)]
    assert len(np.unique(packed["qembag"], axis=0)) == 50
    ((indices, offsets),) = tables.sets(case, 50, (1, 0), 1)
    expected = qembag.QuantizedTable(packed["plain"], bits).dequantize()[indices.reshape(20, 10)].sum(axis=1)
    answers = []
    for name, rows in packed.items():
        contender = contenders.build(name, case, rows, None, own_output=name == "plain")
        answers.append(contender.call(*contender.arguments(indices, offsets)))
    assert np.array_equal(*answers)
    np.testing.assert_allclose(answers[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", ["torch", "fbgemm", "float-first", "groups=32"])
def test_dequantizing_and_a_copy_write_as_many_floats(benchmarks, bits, layout):
    contenders, tables = benchmarks("contenders"), benchmarks("tables")
    case = benchmarks("cases").Case("tiny", 50, 80, bits, call="public", work="dequantize", layout=layout)
    ours = contenders.build("qembag", case, tables.packed_table(case), None, own_output=True)
    answer = ours.call(*ours.arguments())
    assert np.array_equal(answer, contenders.table_of(case, tables.packed_table(case), None).dequantize())
    floats = tables.float_table(case)
    copy = contenders.build("copy", case, floats, None)
    copied = copy.call(*copy.arguments())
    assert (copied.shape, copied.dtype) == (answer.shape, answer.dtype)
    assert np.array_equal(copied, floats)
    assert not np.shares_memory(copied, floats)


@pytest.mark.parametrize("element", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("own_output", [False, True])
def test_rows_of_floats_are_summed_to_their_own_type(benchmarks, element, own_output):
    contenders, tables, cases = benchmarks("contenders"), benchmarks("tables"), benchmarks("cases")
    bits = cases.ELEMENT_BITS[element]
    case = cases.Case("tiny", 50, 16, bits, bags=20, length=10, call="public", element=element)
    rows = tables.float_table(case)
    assert (rows.dtype.itemsize, rows.nbytes) == (bits // 8, 50 * case.row_bytes)
    ((indices, offsets),) = tables.sets(case, 50, (1, 0), 1)
    ours = contenders.build("qembag", case, rows, None, own_output)
    answer = ours.array(ours.call(*ours.arguments(indices, offsets)))
    assert answer.dtype == (np.uint16 if element == "bfloat16" else element)
    values, sums = ((a.astype(np.uint32) << 16).view("f4") if a.dtype == np.uint16 else a for a in (rows, answer))
    expected = values[indices.reshape(20, 10)].astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(sums, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("element", "mode"), [("float32", "sum"), ("float32", "mean"), ("float16", "sum"), ("bfloat16", "sum")]
)
def test_torch_sums_the_same_floats(benchmarks, element, mode):
    pytest.importorskip("torch")
    measure, worker, cases = benchmarks("measure"), benchmarks("worker"), benchmarks("cases")
    bits = cases.ELEMENT_BITS[element]
    case = cases.Case("tiny", 50, 16, bits, bags=20, call="public", threads=2, element=element, mode=mode)
    table, answers = benchmarks("tables").float_table(case), {}
    for name in ("qembag", "torch"):
        contender = benchmarks("contenders").build(name, case, table, None)
        answers[name] = worker.turn(case, case.rows, contender, 3, 4, checked=True)[2]
    assert measure.agree(case, "torch", answers["qembag"], answers["torch"])
    assert len(answers["torch"]) == 2 + (20 * 16 if element == "bfloat16" else 0)


def test_answers_agree_in_all_bits_but_torchs_bfloat16_in_the_last(benchmarks):
    agree, case = benchmarks("measure").agree, benchmarks("cases").Case
    of_bfloat16 = case("some", 9, 16, 16, element="bfloat16")
    ours = [7, 8, 100, 33000]
    assert agree(of_bfloat16, "torch", ours, [1, 2, 101, 32999])
    assert not agree(of_bfloat16, "torch", ours, [1, 2, 102, 33000])
    assert not agree(of_bfloat16, "torch", ours, [7, 8, 100])
    assert not agree(of_bfloat16, "other", ours, [1, 8, 100, 33000])
    assert not agree(case("some", 9, 16, 16, element="float16"), "torch", [7, 8], [7, 9])
    assert agree(case("some", 9, 16, 8, layout="fbgemm"), "plain", [7, 8], [7, 8])


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
    look_up = getattr(qembag.ops, f"embedding_bag_{NAMES[tiny.bits]}_rowwise_offsets")
    answers = [look_up(table, *arrays) for arrays in tables.sets(tiny, tiny.rows, (3, 0), 2)]
    of_all = zlib.crc32(answers[1], zlib.crc32(answers[0]))
    with measure.working(["qembag", "numpy", *([] if NO_FLOOR else ["floor"])], tiny) as workers:
        turns = {name: measure.turn(worker, 3, 2, checked=True) for name, worker in workers.items()}
        assert measure.turn(workers["qembag"], 3, 2)[2] is None
    assert all(seconds > 0 and indices == 30 for seconds, indices, _ in turns.values())
    assert turns.pop("qembag")[2] == [zlib.crc32(answers[1]), of_all]
    assert all(checksums is None for _, _, checksums in turns.values())


class Fake:
    """Workers that take the time that the test gives them, and what they were told."""

    def __init__(self, monkeypatch, measure, seconds):
        self.starts: list[int] = []
        self.turns: list[tuple[str, int, int, bool]] = []
        self.seconds = seconds
        monkeypatch.setattr(measure, "working", self.working)
        monkeypatch.setattr(measure, "turn", self.turn)

    @contextlib.contextmanager
    def working(self, names, case, against, number):
        self.starts.append(number)
        yield {name: name for name in names}

    def turn(self, worker, seed, calls, checked):
        self.turns.append((worker, seed, calls, checked))
        return [self.seconds(worker, self.starts[-1]), 40, [7] if checked else None]


def test_contenders_are_started_anew_and_take_turns_in_random_order(benchmarks, monkeypatch):
    """Each start with fresh indices, the same for all contenders; the first rounds of each are thrown away."""
    measure = benchmarks("measure")
    fake = Fake(monkeypatch, measure, lambda worker, start: 0.01 * (1 if worker == "qembag" else 2 + start))
    case = benchmarks("cases").Case("some", 9, 100, 8, pruned=True)
    result = measure.measure(case, 5, 10)
    assert fake.starts == [0, 1, 2, 3, 4]
    rounds = [fake.turns[at : at + 3] for at in range(0, len(fake.turns), 3)]
    assert len(rounds) == 5 * (10 + measure.WARM_UPS)
    assert all(sorted(name for name, *_ in some) == ["plain", "qembag", "torch"] for some in rounds)
    assert [{turn[1] for turn in some} for some in rounds] == [{seed} for seed in range(len(rounds))]
    assert len({tuple(name for name, *_ in some) for some in rounds}) == 6
    assert sum(checked for *_, checked in fake.turns) == 5 * 3
    assert (result["ratio"]["starts"], result["ratio"]["median"]) == ([2, 3, 4, 5, 6], 4)
    assert (result["ratio"]["interval"], result["cost"]["median"]) == ([2, 6], 1 / 4)
    assert (result["rounds"], result["equal"]) == (10, True)
    assert set(result["ns"]) == {"qembag", "torch", "plain"}


def test_a_case_that_torch_has_not_is_compared_with_the_plain_loop_and_the_other_build(
    benchmarks, monkeypatch, tmp_path
):
    measure = benchmarks("measure")
    Fake(monkeypatch, measure, lambda worker, start: {"qembag": 0.03, "plain": 0.02, "other": 0.06}[worker])
    case = benchmarks("cases").Case("some", 9, 100, 8, mode="max", call="public")
    alone, both = measure.measure(case, 2, 1), measure.measure(case, 2, 1, tmp_path)
    assert alone["cost"]["median"] == 1.5
    assert "ratio" not in alone
    assert alone["equal"] is None
    assert both["ratio"]["median"] == 2
    assert "cost" not in both
    assert both["equal"] is True


def test_of_another_layout_the_answers_are_compared_with_those_of_torchs(benchmarks, monkeypatch):
    measure, cases = benchmarks("measure"), benchmarks("cases")
    fake = Fake(monkeypatch, measure, lambda worker, start: {"qembag": 0.03, "plain": 0.02, "copy": 0.01}[worker])
    case = cases.Case("some", 9, 64, 8, call="public", work="dequantize", layout="fbgemm", extras=("copy",))
    result = measure.measure(case, 2, 1)
    assert (result["cost"]["median"], result["copies"]["median"], result["equal"]) == (1.5, 3, True)
    assert "ratio" not in result
    monkeypatch.setattr(
        measure, "turn", lambda worker, *others: [0.01, 40, [worker == "plain" and fake.starts[-1] == 3]]
    )
    assert measure.measure(cases.Case("some", 9, 64, 8, call="public", layout="fbgemm"), 4, 1)["equal"] is False


def test_an_answer_that_differs_in_one_start_is_noticed(benchmarks, monkeypatch):
    measure = benchmarks("measure")
    fake = Fake(monkeypatch, measure, lambda worker, start: 0.01)
    monkeypatch.setattr(
        measure, "turn", lambda worker, *others: [0.01, 40, [worker == "torch" and fake.starts[-1] == 1]]
    )
    assert measure.measure(benchmarks("cases").Case("some", 9, 100, 8), 3, 1)["equal"] is False
    assert measure.measure(benchmarks("cases").Case("some", 9, 100, 8), 1, 1)["equal"] is True


@pytest.mark.skipif(NO_FLOOR, reason="needs cc")
def test_the_floor_reads_the_first_and_last_bytes_of_rows_and_one_of_each_line_between(benchmarks):
    case = benchmarks("cases").Case("tiny", 9, 100, 8, bags=2, length=3)
    table = benchmarks("tables").packed_table(case)
    call, arguments, *_ = benchmarks("contenders").build("floor", case, table, None)
    indices = np.array([8, 0, 3, 3, 5, 1])
    assert call(*arguments(indices)) == table[indices][:, [0, 64, 107]].sum(dtype=np.int64)


def test_against_another_build(tmp_path):
    """The one in the directory is the other, and both answer alike."""
    package = Path(qembag.__file__).parent
    kernels = importlib.util.find_spec("qembag._kernels")
    if Path(kernels.origin).parent != package:
        pytest.skip("an editable install has no directory of its own")
    shutil.copytree(package, tmp_path / "qembag")
    done = command("--against", str(tmp_path), "--only", "cached/4bit/dim=8", *ONCE)
    assert done.returncode == 0, done.stderr
    assert "equal: True" in done.stderr
    assert "| case, ns a row | other | qembag | ratio |" in done.stdout
    assert "1 cases; median of the ratios" in done.stdout
    assert command("--against", str(tmp_path / "qembag"), "--only", "cached").returncode == 2


def installed(folder: Path) -> Path:
    """Something that looks like an installed qembag."""
    package = folder / "qembag"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / f"_kernels{EXTENSION_SUFFIXES[-1]}").touch()
    return package


def test_each_contender_imports_the_package_that_it_stands_for(benchmarks, monkeypatch, tmp_path):
    packages = benchmarks("packages")
    ours, other = installed(tmp_path / "ours"), installed(tmp_path / "other")
    spec = importlib.util.spec_from_file_location("qembag", ours / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    found = {name: packages.package_of(name, tmp_path / "other") for name in ("qembag", "plain", "other", "torch")}
    assert found == {"qembag": ours, "plain": ours, "other": other, "torch": None}
    with pytest.raises(SystemExit, match="compared with itself"):
        packages.package_of("other", tmp_path / "ours")
    for path in ours.glob("_kernels*"):  # as in an editable install
        path.unlink()
    assert packages.package_of("qembag", tmp_path / "other") is None


def test_a_copied_package_has_its_libraries_and_no_bytecode(benchmarks, tmp_path):
    packages = benchmarks("packages")
    package = installed(tmp_path / "ours")
    (tmp_path / "ours" / "qembag.libs").mkdir()
    (tmp_path / "copy").mkdir()
    packages.copy(package, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"qembag", "qembag.libs"}
    assert not (tmp_path / "copy" / "qembag" / "__pycache__").exists()
    packages.check_origin({"qembag": str(tmp_path / "copy" / "qembag" / "__init__.py")}, tmp_path / "copy")
    with pytest.raises(SystemExit, match="in place of the one in"):
        packages.check_origin({"qembag": str(package / "__init__.py")}, tmp_path / "copy")


def test_a_build_without_layouts_is_known_and_its_cases_are_left_out(benchmarks, tmp_path, capsys):
    main = benchmarks("__main__")
    (tmp_path / "qembag").mkdir()
    package = tmp_path / "qembag" / "__init__.py"
    package.write_text("")
    assert not main.has_layouts(tmp_path)
    package.write_text("class FloatTable: ...")
    assert main.has_layouts(tmp_path)
    names = ["cached/8bit", "cached/8bit/layout=fbgemm", "cached/element=bfloat16", "dequantize/8bit"]
    assert main.without_layouts(names) == ["cached/8bit", "dequantize/8bit"]
    assert capsys.readouterr().err.startswith("2 cases of other layouts and of rows of floats are left out")
    with pytest.raises(SystemExit, match="no case is left"):
        main.without_layouts(["memory/element=float16"])


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


@pytest.mark.torch
def test_one_case_against_torch():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    done = command("--only", "cached/4bit/dim=8", *ONCE)
    assert done.returncode == 0, done.stderr
    assert "equal: True" in done.stderr
    assert "All answers of 1 cases are equal." in done.stdout
