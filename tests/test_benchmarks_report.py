"""What is made of the benchmarks' numbers: intervals, verdicts, reports and where they are kept. All numbers are made up."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def of_starts(median: float, low: float, high: float):
    return {"median": median, "interval": [low, high], "starts": [low, low, median, high, high]}


def result(**changes):
    ns = {
        "qembag": 4.321,
        "torch": 6.543,
        "numpy": 98.76,
        "floor": 1.234,
        "other": 5.678,
        "plain": 3.456,
        "copy": 2.345,
    }
    some = {"ns": ns, "ratio": of_starts(1.5, 1.25, 1.75), "equal": True, "rounds": 7, "date": "2026-01-02"}
    return some | changes


def result_of(case):
    """Of a case with options there is a cost, beside a copy how many copies, and of one that torch has not, no ratio."""
    some = result(cost=of_starts(1.2, 1.1, 1.3)) if case.optional else result()
    if "copy" in case.extras:
        some["copies"] = of_starts(2.2, 2.1, 2.3)
    if case.beyond_torch:
        del some["ratio"]
        some["equal"] = True if case.other_layout else None
    return some


# ---- Intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "left_out", "percent"),
    [(1, 0, 0), (5, 0, 93.75), (7, 0, 98.4), (8, 0, 99.2), (9, 1, 96.1), (12, 2, 96.1)],
)
def test_an_interval_leaves_out_what_95_percent_allow(benchmarks, count, left_out, percent):
    intervals = benchmarks("intervals")
    values = [float(number) for number in range(count)]
    random.Random(1).shuffle(values)
    assert intervals.interval(values) == (left_out, count - 1 - left_out)
    assert 100 * intervals.coverage(count, left_out) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize("count", [5, 7, 9, 15])
@pytest.mark.parametrize(
    "draw", [lambda rng: rng.gauss(1, 0.1), lambda rng: rng.expovariate(1)], ids=["normal", "skew"]
)
def test_intervals_hold_the_median_as_often_as_they_say(benchmarks, count, draw):
    intervals, rng = benchmarks("intervals"), random.Random(2)
    median = sorted(draw(rng) for _ in range(100_001))[50_000]
    held = 0
    for _ in range(2000):
        low, high = intervals.interval([draw(rng) for _ in range(count)])
        held += low <= median <= high
    assert held / 2000 == pytest.approx(intervals.coverage(count, intervals.left_out(count)), abs=0.015)


def test_a_case_is_slower_or_faster_only_where_its_whole_interval_is(benchmarks):
    intervals = benchmarks("intervals")

    def calls(*ratios):
        some = intervals.summary(ratios)
        return intervals.is_slower(some), intervals.is_faster(some)

    assert calls(0.9, 0.91, 0.92, 0.93, 0.99) == (True, False)
    assert calls(0.9, 0.91, 0.92, 0.93, 1.01) == (False, False)
    assert calls(1.01, 1.1, 1.2, 1.3, 1.4) == (False, True)
    assert calls(0.99, 1.1, 1.2, 1.3, 1.4) == (False, False)
    assert calls(0.5, 0.5, 0.5, 0.5) == (False, False), "four starts are not enough"
    # Of nine, one at each end is left out.
    assert calls(*[0.9] * 8, 1.5) == (True, False)
    assert calls(*[0.9] * 7, 1.5, 1.5) == (False, False)
    slow = intervals.summary([0.95, 0.96, 0.96, 0.96, 0.98])
    assert (intervals.is_slower(slow), intervals.is_slower(slow, 0.97)) == (True, False)


@pytest.mark.parametrize("count", [5, 7, 9])
def test_noise_alone_is_rarely_called_slower_and_never_much_slower(benchmarks, count):
    """Starts that differ by 5 % call no more slower than `by_chance` says; what is 5 % slower in truth is found."""
    intervals, rng = benchmarks("intervals"), random.Random(3)
    noise = [intervals.summary([rng.gauss(1, 0.05) for _ in range(count)]) for _ in range(4000)]
    expected = intervals.by_chance(noise)
    assert expected == pytest.approx(4000 * {5: 1 / 32, 7: 1 / 128, 9: 10 / 512}[count])
    for is_called in (intervals.is_slower, intervals.is_faster):
        assert 0.6 * expected < sum(map(is_called, noise)) < 1.4 * expected
    quiet = [intervals.summary([rng.gauss(1, 0.02) for _ in range(count)]) for _ in range(4000)]
    assert sum(intervals.is_slower(some, 0.97) for some in quiet) <= 4
    truly = [intervals.summary([rng.gauss(0.95, 0.01) for _ in range(count)]) for _ in range(100)]
    assert all(map(intervals.is_slower, truly))


# ---- Counting ------------------------------------------------------------------------------------------------------


def test_counts_are_read_from_what_the_tools_write(benchmarks):
    counting = benchmarks("counting")
    assert counting.perf_count("12345,,instructions:u,1000,100.00,,\n") == 12345
    assert counting.perf_count("<not supported>,,instructions:u,0,100.00,,\n") is None
    assert counting.callgrind_count("==7== Events    : Ir\n==7== Collected : 395963662\n==7==\n") == 395963662
    assert counting.callgrind_count("valgrind: failed to start\n") is None


@pytest.mark.parametrize(
    ("level", "counter", "levels", "expected"),
    [
        (None, "callgrind", ["baseline", "avx2", "avx512"], "avx2"),
        (None, "perf", ["baseline", "avx2", "avx512"], None),
        (None, "callgrind", ["baseline", "avx2"], None),
        ("baseline", "callgrind", ["baseline", "avx2", "avx512"], "baseline"),
    ],
)
def test_callgrind_counts_a_level_that_it_knows(benchmarks, level, counter, levels, expected):
    counting = benchmarks("counting")
    case = benchmarks("cases").Case("cached/some", 9, 16, 8, level=level)
    assert counting.level_of(case, counter, levels) == expected
    assert ("no AVX-512" in counting.note(counter, levels)) == (counter == "callgrind" and "avx512" in levels)


def test_twice_the_calls_less_the_calls_is_what_a_row_takes(benchmarks, monkeypatch):
    counting = benchmarks("counting")
    ran = []

    def run(counter, name, case, against, calls):
        ran.append((name, calls))
        return 1_000_000 + calls * 10 * {"qembag": 50, "plain": 40}[name], calls * 10

    monkeypatch.setattr(counting, "run", run)
    monkeypatch.setattr(counting, "counter", lambda: counting.CALLGRIND)
    case = benchmarks("cases").Case("cached/some", 9, 16, 8, bags=1, length=10, mode="max", call="public")
    assert counting.count(case, ["baseline"]) == {"plain": 40, "qembag": 50}
    calls = counting.calls_of(case)
    assert sorted(ran) == [("plain", calls), ("plain", 2 * calls), ("qembag", calls), ("qembag", 2 * calls)]
    assert calls % counting.SETS == 0


def test_only_cached_cases_of_one_thread_are_counted(benchmarks):
    countable, cases = benchmarks("counting").countable, benchmarks("cases").CASES
    chosen = [case.name for case in countable(list(cases), ["baseline"])]
    assert "cached/8bit" in chosen
    assert "cached/8bit/level=baseline,torch=unrestricted" in chosen
    assert not {"cached/8bit/threads=2", "cached/8bit/level=avx2", "memory/8bit"} & set(chosen)
    with pytest.raises(SystemExit, match="none of those was chosen"):
        countable(["memory/8bit", "import"], ["baseline"])


# ---- Results of each processor -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (("AuthenticAMD", "25", "17", "AMD EPYC"), ("AMD EPYC (Zen 4)", "amd-zen-4")),
        (("AuthenticAMD", "26", "2", "AMD EPYC"), ("AMD EPYC (Zen 5)", "amd-zen-5")),
        (("AuthenticAMD", "25", "1", "AMD EPYC 7763"), ("AMD EPYC 7763", "amd-25-1")),
        (
            ("GenuineIntel", "6", "207", "Intel(R) Xeon(R)"),
            ("Intel(R) Xeon(R) (Emerald Rapids)", "intel-emerald-rapids"),
        ),
        (("GenuineIntel", "6", "143", "Intel(R) Xeon(R)"), ("Intel(R) Xeon(R)", "intel-6-143")),
        (("CentaurHauls", "7", "59", "C"), ("C", "centaurhauls-7-59")),
    ],
)
def test_files_are_named_for_the_processor(benchmarks, fields, expected):
    keys = ("vendor_id", "cpu family", "model", "model name")
    assert benchmarks("machine").identify(dict(zip(keys, fields, strict=True))) == expected


def test_a_processor_without_a_family_is_named_by_its_name(benchmarks):
    machine = benchmarks("machine")
    assert machine.identify({"model name": "Neoverse-N1 r3p1"}) == ("Neoverse-N1 r3p1", "neoverse-n1-r3p1")
    assert all(machine.identify({}))


def test_results_are_kept_and_added_to_only_on_the_same_machine(benchmarks, monkeypatch, tmp_path):
    kept = benchmarks("results")
    monkeypatch.setattr(kept, "DOCS", tmp_path)
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"no a-processor\.json yet"):
        kept.stored(MACHINE)
    results = kept.empty(MACHINE)
    for name, some in {"cached/8bit": result(), "growth/8bit": GROWTH, "import": {"qembag": 4.0}}.items():
        kept.put(results, name, some)
    kept.write(results)
    assert kept.stored(MACHINE) == results
    assert results["growth"] == {"8bit": GROWTH}
    assert (set(results["cases"]), results["import"]) == ({"cached/8bit"}, {"qembag": 4.0})
    with pytest.raises(SystemExit, match="another machine, method or versions"):
        kept.stored(MACHINE | {"torch": "2.14.0"})
    kept.write(results | {"method": "another"})
    with pytest.raises(SystemExit, match="another machine, method or versions"):
        kept.stored(MACHINE)


def test_documents_are_written_for_each_processor_but_not_over_those_of_another_method(benchmarks, results, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "new.json").write_text(json.dumps(results))
    (tmp_path / "old.json").write_text(json.dumps(results | {"method": "an older one"}))
    (tmp_path / "old.md").write_text("as it was")
    benchmarks("results").write_documents(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "old.json", "old.md", "new.json", "new.md", "new-dims.svg", "new-growth.svg"}
    assert (tmp_path / "old.md").read_text() == "as it was"
    assert "](new-growth.svg)" in (tmp_path / "new.md").read_text()
    index = (tmp_path / "README.md").read_text()
    assert "| [A Processor](new.md) | avx512 | 2.13.0 | 2026-01-02 | intervals over starts |" in index
    assert "| [A Processor](old.md) | avx512 | 2.13.0 | 2026-01-02 | an older one |" in index


def test_the_index_is_that_of_the_files(benchmarks):
    """Of what is in docs/benchmarks, and each processor's files are there."""
    folder = ROOT / "docs" / "benchmarks"
    everything = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    assert everything
    assert (folder / "README.md").read_text() == benchmarks("report").index(everything)
    for slug, some in everything.items():
        assert some["machine"]["slug"] == slug
        plots = ["-dims.svg", *(["-growth.svg"] if some.get("growth") else [])]
        assert all((folder / f"{slug}{end}").is_file() for end in (".md", *plots))


# ---- Reports -------------------------------------------------------------------------------------------------------


MACHINE = {
    "processor": "A Processor",
    "slug": "a-processor",
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
    everything = {name: result_of(case) for name, case in benchmarks("cases").CASES.items()}
    return {
        "method": benchmarks("results").METHOD,
        "machine": MACHINE,
        "cases": everything,
        "growth": {"8bit": GROWTH, "4bit": GROWTH},
    }


def test_the_report_has_the_numbers(benchmarks, results):
    results["cases"]["cached/8bit/zipf"] = result(ratio=of_starts(0.91, 0.9, 0.92))
    results["cases"]["cached/2bit/zipf"] = result(equal=False)
    results["import"] = {"numpy": 80.0, "qembag": 4.04, "torch": 900.0}
    results["allocation"] = {"8 bits, 10000 indices": 321}
    text = benchmarks("report").render(results)
    assert f"| one thread, cached, dim 128 |{3 * ' 1.50 (1.25 to 1.75) |'} 4.32 | 4.32 | 4.32 |" in text
    assert "| `cached/8bit/dim=100` | 6.54 | 4.32 | 1.50 (1.25 to 1.75) |" in text
    assert "| `memory/4bit` | 98.76 | 6.54 | 4.32 | 1.23 | 1.50 (1.25 to 1.75) |" in text
    assert "| `cached/8bit/max` | 3.46 | 4.32 | 1.20 (1.10 to 1.30) |" in text
    assert "- whole interval below 0.97: 1: `cached/8bit/zipf` 0.910 (0.900 to 0.920)" in text
    assert "5 starts of 7 rounds" in text
    assert "**Answers differ in: `cached/2bit/zipf`.**" in text
    assert "| 70.3 KiB | 1,000 | 4.04 | 6.06 | 1.01 |" in text
    assert "L1d 32 KiB, L2 1 MiB, L3 32 MiB" in text
    assert "2026-01-02 to 2026-01-03" in text
    assert "4.0 ms beyond" in text
    assert "| 8 bits, 10000 indices | 321 |" in text
    for name in results["cases"]:
        assert f"| `{name}` |" in text


def test_layouts_floats_and_dequantizing_have_sections_of_their_own(benchmarks, results):
    text = benchmarks("report").render(results)
    parts = {part.partition("\n")[0]: part for part in text.split("\n## ")}
    layouts = parts["Layouts of rows"]
    # 136 of 144 bytes: from memory the cost a byte is so much less.
    assert "| `cached/8bit/layout=fbgemm` | 136 | 144 | 3.46 | 4.32 | 1.20 (1.10 to 1.30) |  |" in layouts
    line = "| `memory/8bit/layout=fbgemm` | 136 | 144 | 3.46 | 4.32 | 1.20 (1.10 to 1.30) | 1.13 (1.04 to 1.23) |"
    assert line in layouts
    assert "| `memory/element=bfloat16/threads=2` | 6.54 | 4.32 | 1.50 (1.25 to 1.75) |" in parts["Rows of floats"]
    assert "| `dequantize/4bit/layout=fbgemm` | 2.35 | 3.46 | 4.32 | 2.20 (2.10 to 2.30) |" in parts["Dequantizing"]
    for title, part in parts.items():
        assert ("| `cached/8bit/layout=" in part) == (title == "Layouts of rows")
        assert ("| `cached/element=float32" in part) == (title == "Rows of floats")
        assert ("| `dequantize/" in part) == (title == "Dequantizing")


def test_results_without_them_have_no_such_sections(benchmarks, results):
    cases = benchmarks("cases").CASES
    old = {
        n: some for n, some in results["cases"].items() if not cases[n].needs_layouts and cases[n].work != "dequantize"
    }
    text = benchmarks("report").render(results | {"cases": old})
    assert not any(word in text for word in ("Layouts of rows", "Rows of floats", "Dequantizing", "layout="))


def test_part_of_the_results_is_reported_too(benchmarks):
    text = benchmarks("report").render({"machine": MACHINE, "cases": {"cached/2bit/zipf": result()}})
    assert "`cached/2bit/zipf`" in text
    assert "Growth" not in text
    assert "- whole interval below 0.97: 0\n" in text
    assert "No case has a rival." in benchmarks("report").render({"machine": MACHINE, "cases": {}})


def test_plots_of_the_same_results_are_the_same(benchmarks, results, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    for attempt in ("once", "again"):
        folder = tmp_path / attempt
        folder.mkdir()
        benchmarks("plots").draw(results, folder, "some")
        drawn.append([(folder / name).read_bytes() for name in ("some-dims.svg", "some-growth.svg")])
    assert drawn[0] == drawn[1]
    assert all(b"<dc:date>" not in plot for plot in drawn[0])


def test_two_builds_are_compared_by_their_intervals(benchmarks):
    cases = {
        "cached/8bit": result(ratio=of_starts(1.1, 1.05, 1.2)),
        "cached/4bit": result(ratio=of_starts(0.98, 0.9, 1.01)),
        "cached/2bit": result(ratio=of_starts(0.98, 0.975, 0.985)),
        "memory/8bit": result(ratio=of_starts(0.95, 0.94, 0.96)),
    }
    text = benchmarks("report").compare(cases)
    assert "4 cases; median of the ratios 0.980. Noise alone would call 0.1 slower than 1, and as many faster." in text
    assert "- whole interval below 0.97: 1: `memory/8bit` 0.950 (0.940 to 0.960)\n" in text
    assert "- below 1, not below 0.97: 1: `cached/2bit` 0.980 (0.975 to 0.985)\n" in text
    assert "- above 1: 1: `cached/8bit` 1.100 (1.050 to 1.200)\n" in text
    assert "| `cached/4bit` | 5.68 | 4.32 | 0.98 (0.90 to 1.01) |" in text


def test_counts_are_shown_with_what_they_are_compared_with(benchmarks):
    of_counts = benchmarks("report").of_counts
    text = of_counts({"a": {"other": 3.0, "qembag": 2.0}})
    assert text.splitlines()[0] == "| case, instructions a row | other | qembag | ratio |"
    assert "| `a` | 3.00 | 2.00 | 1.500 |" in text
    text = of_counts({"a": {"plain": 2.0, "qembag": 3.0}, "b": {"qembag": 5.0}})
    assert text.splitlines()[0] == "| case, instructions a row | plain | qembag | cost |"
    assert "| `a` | 2.00 | 3.00 | 1.500 |" in text
    assert "| `b` |  | 5.00 |  |" in text


def test_options_that_exclude_each_other_are_refused():
    for options in (["--count", "--write"], ["--starts", "0"], ["--rounds", "0"]):
        line = [sys.executable, "-m", "benchmarks", "--only", "cached/8bit", *options]
        assert subprocess.run(line, cwd=ROOT, capture_output=True, check=False).returncode == 2
