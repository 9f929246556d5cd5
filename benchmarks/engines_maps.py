"""What engines call for each batch: the Scorer, and the same doors with zeros behind them. Workers import this."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from .engines_data import DIM, ID, VECTOR


class Zeros:
    """A Scorer that looks nothing up: a column of the same type, of an array of zeros."""

    def __init__(self, path: str) -> None:
        pass

    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, (pa.Table, pa.RecordBatch)):
            return batch.append_column(VECTOR, zeros(batch.num_rows))
        import polars as pl

        return batch.with_columns(pl.Series(VECTOR, zeros(batch.height)))

    def map_arrow(self, batches: Iterable[Any]) -> Iterator[Any]:
        return map(self, batches)

    def map_pandas(self, frame: Any) -> Any:
        import pandas as pd

        column = pd.arrays.ArrowExtensionArray(pa.chunked_array([zeros(len(frame))]))
        return frame.assign(**{VECTOR: pd.Series(column, index=frame.index)})

    def spark_schema(self, schema: Any) -> Any:
        from pyspark.sql import types

        vectors = types.StructField(VECTOR, types.ArrayType(types.FloatType(), containsNull=True))
        return types.StructType([*schema.fields, vectors])


def zeros(num_rows: int) -> Any:
    offsets = np.arange(0, (num_rows + 1) * DIM, DIM, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(num_rows * DIM, np.float32)))


class Dying:
    """A Scorer whose process is killed by the batch that holds a row, but for the second time that it comes."""

    def __init__(self, path: str, row: int, marker: str) -> None:
        from qembag.engines import Scorer

        self._scorer, self._row, self._marker = Scorer(path), row, marker
        self.spark_schema = self._scorer.spark_schema

    def _meet(self, ids: Any) -> None:
        if not len(ids) or not (ids == self._row).any():
            return
        try:
            os.close(os.open(self._marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, batch: Any) -> Any:
        scored = self._scorer(batch)
        self._meet(batch[ID].to_numpy())
        return scored

    def map_arrow(self, batches: Iterable[Any]) -> Iterator[Any]:
        for scored in self._scorer.map_arrow(batches):
            self._meet(scored[ID].to_numpy())
            yield scored

    def map_pandas(self, frame: Any) -> Any:
        scored = self._scorer.map_pandas(frame)
        self._meet(frame[ID].to_numpy())
        return scored
