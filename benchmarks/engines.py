"""Bags in Parquet scored on Ray, Spark, Dask, polars and pyarrow: the Scorer beside a function that returns zeros.

    python -m benchmarks.engines FOLDER --kill --write    # hours; 8 GB of disk and of memory; writes docs/engines.md

Each run is a fresh process, which starts the engine and then reads all bags, maps them and writes ids and vectors as
Parquet ("write"), or only takes the vectors out of the function ("count": the map is a larger share of that).
Scorer and zeros take turns. A ratio is of two runs of one round, and has an interval over rounds. Memory is the
proportional set size of all processes of the engine, so that a page of the table that several map counts once. What the
first round writes is compared with a plain loop over the rows. With `--kill` a worker is killed while it scores the
middle row, and what is written then is compared too. Needs the engines, psutil, and Java for Spark.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from . import engines_data, machine, processes, quality
from .collection import shown
from .engines_data import Data
from .engines_worker import CPUS, ENGINES, OF_PROCESSES, PACKAGES, Job

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "engines.md"
BEGIN = "<!-- written by benchmarks.engines -->"
CONTENDERS, SINKS = ("Scorer", "zeros"), ("count", "write")
TITLES = {
    "ray": "Ray Data, actors",
    "ray tasks": "Ray Data, tasks",
    "spark": "Spark",
    "dask": "Dask",
    "polars": "polars",
    "pyarrow": "pyarrow",
}

# Of each engine and sink, by contender: a run of each round.
Runs = dict[str, dict[str, dict[str, list[dict[str, float]]]]]


# ---- Measuring -------------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, float]:
    """Seconds of the pipeline, of processors too, and bytes at the peak."""
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONWARNINGS": "ignore",
        "PYSPARK_PYTHON": sys.executable,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engines_worker", json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | settings,
    )
    try:
        with processes.Watched(worker.pid) as watched:
            output, errors = worker.communicate()
    finally:
        worker.kill()
    if worker.returncode:
        raise RuntimeError(f"{job.engine}, {job.contender} ended with {worker.returncode}:\n{errors[-4000:]}")
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    os.sync()  # or else the next run would wait for what this one wrote
    return found | {"peak": watched.peak}


def job_of(data: Data, engine: str, contender: str, sink: str, temporary: str) -> Job:
    out = data.folder / "written"
    engines_data.remove(out)
    return Job(engine, contender, sink, str(data.bags), str(data.table), str(out), temporary, row=data.num_bags // 2)


def measure(data: Data, engines: list[str], sinks: list[str], rounds: int) -> tuple[Runs, dict[str, bool]]:
    """Runs; and for each engine that wrote, whether that was what the plain loop gives."""
    runs: Runs = {engine: {sink: {name: [] for name in CONTENDERS} for sink in sinks} for engine in engines}
    same: dict[str, bool] = {}
    for number in range(rounds):
        turns = CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]
        for engine, sink, name in ((e, s, n) for e in engines for s in sinks for n in turns):
            with tempfile.TemporaryDirectory(prefix="b") as temporary:
                job = job_of(data, engine, name, sink, temporary)
                found = run(job)
            if found["rows"] not in (None, data.num_bags):
                raise AssertionError(f"{engine} must count {data.num_bags} rows, got {found['rows']}")
            runs[engine][sink][name].append(found)
            print(f"round {number}, {engine}, {sink}, {name}: {found}", file=sys.stderr, flush=True)
            if (sink, name) == ("write", "Scorer") and engine not in same:
                same[engine] = engines_data.is_same(data, Path(job.out))
            engines_data.remove(Path(job.out))
    return runs, same


def killed(data: Data, engines: list[str]) -> dict[str, bool]:
    """Whether what is written is the same where a worker has been killed."""
    same: dict[str, bool] = {}
    for engine in engines:
        with tempfile.TemporaryDirectory(prefix="b") as temporary:
            job = job_of(data, engine, "dying", "write", temporary)
            run(job)
            if not (Path(temporary) / "killed").exists():
                raise AssertionError(f"{engine}: no worker was killed")
        same[engine] = engines_data.is_same(data, Path(job.out))
        print(f"{engine}, a worker killed: {'the same' if same[engine] else 'OTHER'} rows", file=sys.stderr, flush=True)
        engines_data.remove(Path(job.out))
    return same


# ---- Telling ---------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> list[str]:
    columns = ["rows a second", "of zeros", "times the time of zeros", "processor, s", "of zeros", "memory, MB"]
    columns += ["of zeros", "as a plain loop", "a worker killed"]
    lines = [f"| engine | sink | {' | '.join(columns)} |", "| --- | --- |" + " --: |" * 7 + " --- | --- |"]
    for engine, sinks in results["runs"].items():
        for sink, found in sinks.items():
            ours, zeros = (found[name] for name in CONTENDERS)
            ratios = [one["seconds"] / other["seconds"] for one, other in zip(ours, zeros, strict=True)]
            cells = [f"{results['bags'] / of(runs, 'seconds'):,.0f}" for runs in (ours, zeros)]
            cells += [shown(ratios), *(f"{of(runs, 'cpu'):,.1f}" for runs in (ours, zeros))]
            cells += [f"{max(run['peak'] for run in runs) / 1e6:,.0f}" for runs in (ours, zeros)]
            cells += [verdict(results[name].get(engine), sink) for name in ("same", "killed")]
            lines.append(f"| {TITLES[engine]} | {sink} | {' | '.join(cells)} |")
    where, versions = results["machine"], results["versions"]
    caption = (
        "*Read from Parquet, mapped, and written as Parquet, not compressed (write), or only taken out of the function "
        f"(count). {results['bags']:,} bags of {engines_data.MOST_INDICES // 2} indices on average, a table of "
        f"{results['rows']:,} x {engines_data.DIM}, {engines_data.BITS} bits, uniformly random rows; "
        f"medians (rounds: {results['rounds']}) of fresh processes, the most memory of any; {results['date']}; "
        f"{where['processor']}, {where['level']}, processors given to each engine: {CPUS}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.*"
    )
    return [*lines, "", caption]


def of(runs: list[dict[str, float]], what: str) -> float:
    return median(run[what] for run in runs)


def verdict(same: bool | None, sink: str) -> str:
    if same is None or sink != "write":
        return ""
    return "each row once, the same bits" if same else "OTHER ROWS"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="bags, table and vectors are made here once, and kept")
    add("--bags", type=int, default=10_000_000)
    add("--rows", type=int, default=1_000_000, help="of the table")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--sinks", nargs="+", choices=SINKS, default=list(SINKS))
    add("--rounds", type=int, default=3)
    add("--kill", action="store_true", help="one more run of each engine, in which a worker is killed")
    add("--save", type=Path, help="write the results to this file")
    add("--write", action="store_true", help="put the table into docs/engines.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    data = Data(options.folder.absolute(), options.bags, options.rows)
    engines_data.make(data)
    for path in data.files():
        path.read_bytes()  # so that no run reads the disk
    runs, same = measure(data, options.engines, options.sinks, options.rounds)
    packages = dict.fromkeys(PACKAGES.get(engine, engine) for engine in [*options.engines, "pyarrow", "numpy"])
    results = {
        "runs": runs,
        "same": same,
        "killed": killed(data, [name for name in options.engines if name in OF_PROCESSES]) if options.kill else {},
        "bags": options.bags,
        "rows": options.rows,
        "rounds": options.rounds,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {package: machine.version(package) for package in packages},
    }
    quality.tell(PAGE, BEGIN, report(results), write_page=options.write, results=results, save=options.save)


if __name__ == "__main__":
    main()
