"""Tables and Parquet files of bags for the tests of `qembag.engines`, and what must come of scoring them: a plain loop."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import qembag

NUM_ROWS = {"songs": 500, "words": 80}
DIM = 24  # of the output
COLUMNS = ["id", "user", "songs", "words", "weights"]


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


def write(folder: Path, num_files: int, rows_a_file: int, row_group: int) -> Bags:
    """Files of several row groups each."""
    tables = save_tables(folder / "tables.safetensors")
    (folder / "bags").mkdir()
    parts = [rows_of(number * rows_a_file, rows_a_file) for number in range(num_files)]
    for number, part in enumerate(parts):
        pq.write_table(part, folder / "bags" / f"{number}.parquet", row_group_size=row_group)
    rows = pa.concat_tables(parts)
    return Bags(tables, folder / "bags", loop(tables, rows), rows)


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
        assert made[name].to_pylist() == bags.table[name].to_pylist(), name


# ---- Seen from inside workers ----------------------------------------------------------------------------------------


def opened_here() -> int:
    """How many collections this process has opened."""
    from qembag.engines import opened

    return len(opened._opened)


def mapped_pages(path: str) -> tuple[int, int]:
    """Bytes of a file that this process has mapped and read, and its proportional share of them. Linux."""
    text = Path(f"/proc/{os.getpid()}/smaps").read_text()
    of_file = re.findall(rf"(?m)^\S+ .*{re.escape(path)}\n((?:\w+:.*\n)+)", text)
    sums = [sum(int(re.search(rf"(?m)^{key}: +(\d+)", part)[1]) for part in of_file) for key in ("Rss", "Pss")]
    return sums[0] * 1024, sums[1] * 1024


def kill_once(marker: Path) -> None:
    """End this process by SIGKILL, unless one has been ended before."""
    import signal

    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """Processes that it has started, and theirs. Linux."""
    found: list[int] = []
    for name in Path("/proc").iterdir():
        if name.name.isdigit():
            try:
                parent = int((name / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found += [int(name.name), *children_of(int(name.name))]
    return found


# ---- The documents -----------------------------------------------------------------------------------------------------


def section(text: str, title: str) -> str:
    """A page's section of that title."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text)
    assert found is not None, title
    return textwrap.dedent(found[1])
