"""Many tables in one call: EmbeddingBagCollection beside FBGEMM's table-batched call and a loop over torch's operators.

    python -m benchmarks.collection --write    # an hour, 12 GB of memory; writes docs/

Each library works in a process of its own; they take turns, on the same indices, and each call has other rows than the one
before it. A start is fresh processes; a ratio has an interval over starts. All tables have the same values, and all answers
must have the same bits. FBGEMM's and torch's times are their best: the fastest way to make the call, and of two threads or
one, where two are allowed. FBGEMM's rows are compared with a collection of those very rows in that very memory, torch's with
a collection of rows as torch packs them. Needs torch and fbgemm_gpu; `--libraries` leaves one out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from . import machine, quality
from .intervals import interval

ROOT = Path(__file__).parents[1]
PAGE, RESULTS, PLOT = (ROOT / "docs" / name for name in ("collections.md", "collection.json", "collection.svg"))
BEGIN = "<!-- written by benchmarks.collection -->"
LIBRARIES = ("qembag", "torch", "fbgemm")
COUNTS, BATCHES = (1, 4, 16, 26, 64, 100, 256), (1, 8, 64, 512)
CELLS = {
    **{str(count): BATCHES for count in COUNTS},
    "100, bags of 20": BATCHES,
    "26 alike": (1,),
    "skewed": (8, 64),
    "even": (8, 64),
}
TITLES = {
    "26 alike": "26 of 10,000 x 64, 8 bits, bags of 20",
    "skewed": "one of 90 % of the rows beside 99 small ones",
    "even": "one, of as many rows",
}
COLLECTION, PACKED = "collection", "collection, torch's rows"
OTHERS = {"FBGEMM": COLLECTION, "torch": PACKED}

Cells = dict[str, tuple[int, ...]]
# By threads, shape, batch and way to call: a time of each start, in microseconds.
Times = dict[str, dict[str, dict[str, dict[str, list[float]]]]]


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Worker:
    """A library in a process of its own."""

    def __init__(self, library: str, threads: int) -> None:
        # Newer FBGEMMs share tables out among so many threads; 1.8.0 has one thread for all.
        number = str(threads)
        settings = {"OMP_NUM_THREADS": number, "TBE_TABLE_THREADS": number, "PYTHONWARNINGS": "ignore"}
        self.library, self.threads = library, threads
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.collection_worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | settings,
        )

    def ask(self, shape: str, batch: int, seed: int, seconds: float) -> dict[str, tuple[float, int]]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([shape, batch, self.threads, seed, seconds]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.library} ended with {self.process.wait()}")
        answer: dict[str, tuple[float, int]] = json.loads(line)
        return answer

    def stop(self) -> None:
        self.process.communicate()


def take_turns(workers: list[Worker], shape: str, batch: int, start: int, seconds: float) -> dict[str, float]:
    """Microseconds by the way to call; one library after the other, each start in another order."""
    answers: dict[str, tuple[float, int]] = {}
    for worker in random.Random(start).sample(workers, len(workers)):
        answers |= worker.ask(shape, batch, start, seconds)
    if len({checksum for _, checksum in answers.values()}) > 1:
        raise AssertionError(f"answers of {shape} tables, batch {batch}, must be the same bits: {answers}")
    return {way: microseconds for way, (microseconds, _) in answers.items()}


def measure(cells: Cells, libraries: list[str], threads: list[int], starts: int, seconds: float) -> Times:
    times: Times = {}
    for start in range(starts):
        for number in threads:
            workers = [Worker(library, number) for library in libraries]
            try:
                for shape, batch in ((shape, batch) for shape, batches in cells.items() for batch in batches):
                    found = times.setdefault(str(number), {}).setdefault(shape, {}).setdefault(str(batch), {})
                    for way, microseconds in take_turns(workers, shape, batch, start, seconds).items():
                        found.setdefault(way, []).append(microseconds)
                    print(f"start {start}, threads: {number}, {shape}, batch {batch}", file=sys.stderr, flush=True)
            finally:
                for worker in workers:
                    worker.stop()
    return times


# ---- Reading the times -----------------------------------------------------------------------------------------------


def best(times: Times, threads: str, shape: str, batch: str, library: str) -> list[float]:
    """Of each start, the time of the library's fastest way, with as many threads or fewer."""
    ways = [
        some
        for number, shapes in times.items()
        if int(number) <= int(threads)
        for way, some in shapes[shape][batch].items()
        if way.startswith(library)
    ]
    return [min(together) for together in zip(*ways, strict=True)]


def ratios(times: Times, threads: str, shape: str, batch: str, library: str) -> list[float]:
    """How many times as fast as the library a collection of its rows is: of each start."""
    ours = times[threads][shape][batch][OTHERS[library]]
    theirs = best(times, threads, shape, batch, library)
    return [other / own for other, own in zip(theirs, ours, strict=False)]


def shown(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = interval(values)
    return f"{median(values):.2f} ({low:.2f} to {high:.2f})"


def lines_of_times(times: Times, threads: str) -> list[str]:
    """A line for each case: microseconds, and ratios with their intervals."""
    columns = [f"{name}, us" for name in ("collection", "with out=", "a dict", "our loop", "torch's loop", "FBGEMM")]
    lines = [
        f"| tables, threads: {threads} | batch | {' | '.join(columns)} | times torch | times FBGEMM |",
        "| --- |" + " --: |" * 9,
    ]
    for shape, batches in times[threads].items():
        if shape.isdecimal() and shape != "100":
            continue
        for batch, ways in batches.items():
            found = [ways.get(way, []) for way in (COLLECTION, "collection, out=", "collection, dict", "our loop")]
            found += [best(times, threads, shape, batch, library) for library in ("torch", "FBGEMM")]
            cells = [f"{median(some):,.1f}" if some else "-" for some in found]
            cells += [shown(ratios(times, threads, shape, batch, library)) for library in ("torch", "FBGEMM")]
            lines.append(f"| {TITLES.get(shape, shape)} | {batch} | {' | '.join(cells)} |")
    return lines


def lines_of_grid(times: Times, library: str) -> list[str]:
    """How many times as fast, by tables, batch and threads."""
    some = next(iter(times.values()))
    shapes = [shape for shape in some if shape.isdecimal()]
    batches = list(dict.fromkeys(batch for shape in shapes for batch in some[shape]))
    columns = [(threads, batch) for threads in times for batch in batches]
    heads = [f"batch {batch}, threads: {threads}" for threads, batch in columns]
    lines = [f"| tables | {' | '.join(heads)} |", "| --: |" + " --: |" * len(columns)]
    for shape in shapes:
        found = [ratios(times, threads, shape, batch, library) for threads, batch in columns]
        lines.append(f"| {shape} | {' | '.join(f'{median(some):.2f}' if some else '-' for some in found)} |")
    return lines


def lines_of_gains(times: Times) -> list[str]:
    """What the second thread gains, where the rows are in one of a hundred tables, and where there is one table."""
    if not {"1", "2"} <= times.keys() or not {"skewed", "even"} <= times["1"].keys():
        return []
    lines = ["| two threads over one | batch | one of 90 % | one alone | ratio |", "| --- | --: | --: | --: | --: |"]
    for name, way in (("collection", COLLECTION), ("FBGEMM", "FBGEMM, scripted"), ("torch's loop", "torch's loop")):
        for batch in times["1"]["skewed"]:
            one, two = (
                [times[threads][shape][batch].get(way, []) for shape in ("skewed", "even")] for threads in ("1", "2")
            )
            gains = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(one, two, strict=True)]
            if gains[0]:
                cells = [shown(some) for some in (*gains, [a / b for a, b in zip(*gains, strict=True)])]
                lines.append(f"| {name} | {batch} | {' | '.join(cells)} |")
    return lines


def below_one(times: Times) -> list[str]:
    """The cells where a collection is slower than FBGEMM."""
    found = []
    for threads, shapes in times.items():
        for shape, batches in shapes.items():
            for batch in batches:
                some = ratios(times, threads, shape, batch, "FBGEMM")
                if some and median(some) < 1:
                    found.append(f"{shape} tables, batch {batch}, threads: {threads}: {shown(some)}")
    return found


def report(results: dict[str, Any]) -> list[str]:
    times, where = results["times"], results["machine"]
    lines = []
    for threads in times:
        lines += [*lines_of_times(times, threads), ""]
    if gains := lines_of_gains(times):
        lines += [*gains, ""]
    for library in OTHERS:
        if any(ratios(times, *cell, library) for cell in cells_of(times) if cell[1].isdecimal()):
            lines += [f"Times as fast as {library}:", "", *lines_of_grid(times, library), ""]
    lines.append(
        f"*Medians of {results['starts']} starts of fresh processes, {results['date']}; {where['processor']}, "
        f"{where['level']}, cores: {where['cores']}; torch {where['torch']}, FBGEMM {where['fbgemm']}, NumPy {where['numpy']}.*"
    )
    return lines


def cells_of(times: Times) -> list[tuple[str, str, str]]:
    return [
        (threads, shape, batch)
        for threads, shapes in times.items()
        for shape, batches in shapes.items()
        for batch in batches
    ]


def draw(times: Times, path: Path) -> None:
    """Ratios against the number of tables: a row for each library, a column for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    # Ids inside an SVG are random, and a date is written, unless told otherwise.
    matplotlib.rcParams.update({"svg.hashsalt": "qembag", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, len(times), figsize=(5 * len(times), 6.4), sharex=True, sharey="row", squeeze=False
    )
    for row, library in zip(panels, OTHERS, strict=True):
        for panel, (threads, shapes) in zip(row, times.items(), strict=True):
            counts = [shape for shape in shapes if shape.isdecimal()]
            for batch in dict.fromkeys(batch for shape in counts for batch in shapes[shape]):
                some = [ratios(times, threads, shape, batch, library) for shape in counts]
                known = [(int(shape), median(values)) for shape, values in zip(counts, some, strict=True) if values]
                panel.plot(*zip(*known, strict=True), marker="o", markersize=3, label=f"batch {batch}")
            panel.axhline(1, color="0.5", linewidth=0.8)
            panel.set(title=f"times as fast as {library}, threads: {threads}", xscale="log", xlabel="tables")
            panel.set_xticks([int(shape) for shape in counts], labels=counts)
            panel.minorticks_off()
        row[0].set_ylim(bottom=0)
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CELLS, "tiny"], default=list(CELLS), help="these tables")
    parser.add_argument("--batches", nargs="+", type=int, help="these batches")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each way to call a library, in a start")
    parser.add_argument("--save", type=Path, help="write the results to this file")
    parser.add_argument("--write", action="store_true", help="write the results, the plot and the tables into docs/")
    options = parser.parse_args(arguments)
    cells = {shape: tuple(options.batches or CELLS.get(shape, (2,))) for shape in options.only}
    results = {
        "times": measure(cells, options.libraries, options.threads, options.starts, options.seconds),
        "starts": options.starts,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe() | {"fbgemm": machine.version("fbgemm-gpu-cpu")},
    }
    lines = report(results)
    print("\n".join(lines))
    print("\nSlower than FBGEMM:", *(below_one(results["times"]) or ["nowhere"]), sep="\n")
    if options.save or options.write:
        (options.save or RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    if options.write:
        draw(results["times"], PLOT)
        heading = ["## What a call costs", "", f"![times as fast, by the number of tables]({PLOT.name})", ""]
        quality.write(PAGE, BEGIN, heading + lines)


if __name__ == "__main__":
    main()
