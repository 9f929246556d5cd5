"""Tables and Parquet files of bags for the tests of `qembag.engines`, and what must come of scoring them: a plain loop."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import qembag
from support.documents import blocks, is_as_shown

NUM_ROWS = {"songs": 500, "words": 80}
DIM = 24  # of the output
COLUMNS = ["id", "user", "songs", "words", "weights"]

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class Bags(NamedTuple):
    """Of Parquet files."""

    tables: Path
    folder: Path
    expected: np.ndarray
    """Vectors by id."""
    table: pa.Table
    """All rows by id."""


def save_tables(path: Path) -> Path:
    """Two features: sums with weights of 4 bits, means of 8 bits."""
    rng = np.random.default_rng(17)
    tables = {
        "songs": qembag.quantize(rng.normal(size=(NUM_ROWS["songs"], 16)).astype(np.float32), bits=4),
        "words": qembag.quantize(rng.normal(size=(NUM_ROWS["words"], 8)).astype(np.float32), bits=8),
    }
    qembag.EmbeddingBagCollection(tables, mode={"words": "mean"}).save(path)
    return path


def lists_of(values: Any, lengths: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths)).astype(np.int32), values)


def rows_of(first: int, count: int) -> pa.Table:
    """Rows `first` on. Some lists are null, and some empty."""
    rng = np.random.default_rng(first)
    lengths = rng.integers(0, 6, count)
    songs = lists_of(pa.array(rng.integers(0, NUM_ROWS["songs"], lengths.sum())), lengths)
    weights = lists_of(pa.array(rng.normal(size=lengths.sum()).astype(np.float32)), lengths)
    own = rng.integers(0, 4, count)
    words = lists_of(pa.array(rng.integers(0, NUM_ROWS["words"], own.sum()).astype(np.int32)), own)
    words = pa.ListArray.from_arrays(words.offsets, words.values, mask=pa.array(own == 0))
    ids = np.arange(first, first + count)
    return pa.table(
        [ids, [f"u{number % 97}" for number in ids], songs, words, weights], names=COLUMNS
    ).replace_schema_metadata({"made by": "a test"})


def loop(tables: Path, rows: pa.Table) -> np.ndarray:
    """Each row's vector by a call of its own."""
    collection = qembag.EmbeddingBagCollection.from_file(tables)
    made = np.empty((rows.num_rows, collection.dim), np.float32)
    columns = [rows[name].to_pylist() for name in ("songs", "weights", "words")]
    for number, (songs, weights, words) in enumerate(zip(*columns, strict=True)):
        asked = {
            "songs": (np.array(songs or [], np.int64), np.array([0, len(songs or [])])),
            "words": (np.array(words or [], np.int64), np.array([0, len(words or [])])),
        }
        own = {"songs": np.array(weights or [], np.float32)}
        made[number] = collection(asked, per_sample_weights=own, num_threads=1)[0]
    return made


@functools.cache
@functools.cache
def bags_in_files() -> Bags:
    """100,000 rows in four files of several row groups, which live as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="qembag-engines-")
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    tables = save_tables(root / "tables.safetensors")
    (root / "bags").mkdir()
    parts = [rows_of(first, 25_000) for first in range(0, 100_000, 25_000)]
    for number, part in enumerate(parts):
        pq.write_table(part, root / "bags" / f"{number}.parquet", row_group_size=10_000)
    rows = pa.concat_tables(parts)
    return Bags(tables, root / "bags", loop(tables, rows), rows)


def write_bad(folder: Path, rows: pa.Table, bad: dict[int, list[Any]]) -> Path:
    """A file of rows of which some have other songs, without weights."""
    (folder / "bad").mkdir()
    songs = [bad.get(number, bag) for number, bag in enumerate(rows["songs"].to_pylist())]
    place = rows.schema.get_field_index("songs")
    pq.write_table(rows.set_column(place, "songs", pa.array(songs)), folder / "bad" / "part.parquet")
    return folder / "bad"


def check(made: pa.Table, bags: Bags, vector: str = "vector") -> None:
    """Each row once, with its vector, bit for bit, and its other columns as they were."""
    made = made.sort_by("id")
    assert made["id"].to_pylist() == bags.table["id"].to_pylist()
    lists = made[vector].combine_chunks()
    assert lists.null_count == 0
    found = lists.flatten().to_numpy().reshape(len(lists), DIM)
    assert np.array_equal(found.view(np.uint32), bags.expected.view(np.uint32))
    for name in ("user", "songs", "words", "weights"):
        assert made[name].cast(bags.table[name].type).equals(bags.table[name]), name


# ---- Seen from inside workers ----------------------------------------------------------------------------------------


def opened_here(path: Path) -> list[int]:
    """Which collections of a file this process has opened. A collection that was opened again is another one."""
    from qembag.engines import opened

    return [id(collection) for key, (collection, _) in opened._opened.items() if key[0] == str(path)]


def mapped_bytes(path: Path) -> tuple[int, int]:
    """Bytes of a file that this process has mapped and read, and its share of them where others read them too."""
    text = Path("/proc/self/smaps").read_text()
    maps = re.findall(rf"(?m)^[0-9a-f]+-.* {re.escape(str(path))}\n((?:\w+: .*\n)+)", text)
    read, share = (
        sum(int(re.search(rf"(?m)^{key}: +(\d+) kB", one)[1]) * 1024 for one in maps) for key in ("Rss", "Pss")
    )
    return read, share


def save_large(path: Path) -> Path:
    """A table of 7 MB: of pages that can be counted."""
    rows = np.random.default_rng(1).normal(size=(100_000, 64)).astype(np.float32)
    qembag.save_tables(path, {"songs": qembag.quantize(rows, bits=8)})
    return path


def are_shared(seen: list[tuple[int, int]], nbytes: int) -> bool:
    """Whether workers that have each read all of a mapped file have done so in the same pages."""
    return len(seen) == 2 and all(read >= 0.95 * nbytes and share <= 0.55 * nbytes for read, share in seen)


def kill_once(marker: Path) -> None:
    """End this process by SIGKILL, unless one has been ended before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def processes() -> set[int]:
    """Those that this one has started, and those that these have. Linux."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                words = (folder / "stat").read_text().rpartition(")")[2].split()
                if words[0] != "Z" and b"resource_tracker" not in (folder / "cmdline").read_bytes():
                    parents[int(folder.name)] = int(words[1])
    found, waiting = set(), {os.getpid()}
    while waiting:
        waiting = {pid for pid, parent in parents.items() if parent in waiting}
        found |= waiting
    return found


def wait_for_the_end_of(pids: set[int], seconds: float = 30) -> None:
    """Of processes that have been told to end."""
    end = time.monotonic() + seconds
    while left := {pid for pid in pids if is_alive(pid)}:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- The page ----------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"


def run_the_page(title: str) -> None:
    """A section's blocks, after those that make its files, in the working folder. They print what the page shows.

    Blocks that start an engine are of the language "py", and not of "python", which `test_docs.py` runs.
    """
    if not PAGE.exists():
        pytest.skip("the documents are not beside the tests")
    text = PAGE.read_text()
    names: dict[str, Any] = {"__name__": "__docs__"}
    first, _, _ = text.partition("\n## ")[2].partition("\n## ")
    own = blocks(section(text, title), "py")
    assert own, title
    for code, shown in [*blocks(first, "python"), *own]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102 (our own documents)
        assert is_as_shown(output.getvalue(), shown), f"{code}\nprinted\n{output.getvalue()}"


def section(text: str, title: str) -> str:
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text)
    assert found is not None, title
    return found[1]
