"""What `benchmarks.engines` scores: bags in Parquet, a table, and the vectors of a plain loop over the rows.

All is made once in a folder; what is there is taken as it is. A file gets its name when it is whole.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import qembag

DIM, BITS = 64, 8
MOST_INDICES = 40  # of a bag; none at least, 20 on average
FILES, GROUPS = 10, 10  # row groups of a file
FEATURE, ID, VECTOR = "songs", "id", "vector"
ROWS_AT_ONCE = 100_000


class Data(NamedTuple):
    """Where it is."""

    folder: Path
    num_bags: int
    num_rows: int

    @property
    def bags(self) -> Path:
        return self.folder / f"bags-{self.num_bags}-{self.num_rows}"

    @property
    def table(self) -> Path:
        return self.folder / f"table-{self.num_rows}.safetensors"

    @property
    def expected(self) -> Path:
        return self.folder / f"expected-{self.num_bags}-{self.num_rows}.npy"

    def files(self) -> list[Path]:
        return sorted(self.bags.glob("*.parquet"))


def make(data: Data) -> None:
    data.bags.mkdir(parents=True, exist_ok=True)
    if not data.table.exists():
        floats = np.random.default_rng(0).normal(size=(data.num_rows, DIM)).astype(np.float32)
        qembag.save_tables(data.table, {FEATURE: qembag.quantize(floats, BITS)})
    bounds = np.linspace(0, data.num_bags, FILES + 1).astype(int).tolist()
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        path = data.bags / f"{number:02}.parquet"
        if not path.exists():
            table = bags_of(data, number, first, last)
            unfinished = path.with_suffix(".unfinished")
            pq.write_table(table, unfinished, row_group_size=max(1, -(-table.num_rows // GROUPS)))
            unfinished.rename(path)
    if not data.expected.exists():
        look_up_each(data)


def bags_of(data: Data, number: int, first: int, last: int) -> pa.Table:
    rng = np.random.default_rng([1, number])
    offsets = np.zeros(last - first + 1, np.int32)
    np.cumsum(rng.integers(0, MOST_INDICES + 1, last - first), out=offsets[1:])
    indices = rng.integers(0, data.num_rows, offsets[-1])
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(indices))
    return pa.table({ID: np.arange(first, last), FEATURE: lists})


def look_up_each(data: Data) -> None:
    """A call for each row, in one thread."""
    table = qembag.open_table(data.table, FEATURE)
    unfinished = data.expected.with_suffix(".unfinished")
    memory = np.lib.format.open_memmap(unfinished, "w+", np.float32, (data.num_bags, DIM))
    expected = memory.view(np.ndarray)  # whose slices take less time
    start = np.zeros(1, np.int64)
    for path in data.files():
        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            lists = batch[FEATURE]
            ends, indices = lists.offsets.to_numpy().tolist(), lists.values.to_numpy()
            for row, first, last in zip(batch[ID].to_pylist(), ends, ends[1:], strict=False):
                qembag.embedding_bag(table, indices[first:last], start, out=expected[row : row + 1], num_threads=1)
    memory.flush()
    unfinished.rename(data.expected)


# ---- What engines wrote ----------------------------------------------------------------------------------------------


def is_same(data: Data, written: Path) -> bool:
    """Whether each row is there once, with the bits of the plain loop."""
    expected = np.load(data.expected, mmap_mode="r")
    seen = np.zeros(data.num_bags, np.int64)
    for ids, vectors in vectors_in(written):
        if not ((ids >= 0) & (ids < data.num_bags)).all():
            return False
        np.add.at(seen, ids, 1)
        if not np.array_equal(vectors, expected[ids].view(np.uint32)):
            return False
    return bool((seen == 1).all())


def vectors_in(written: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids, and the bits of their vectors. Raises ValueError for a list of another length or a null."""
    for path in sorted(written.rglob("*.parquet")) if written.is_dir() else [written]:
        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE, columns=[ID, VECTOR]):
            vectors = batch[VECTOR]
            values = vectors.flatten()
            if vectors.null_count or values.null_count or (np.diff(vectors.offsets.to_numpy()) != DIM).any():
                raise ValueError(f"{path}: vectors must be {DIM} floats each")
            yield batch[ID].to_numpy(), values.to_numpy().reshape(-1, DIM).view(np.uint32)


def remove(path: Path) -> None:
    """A file, or a folder and all in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
