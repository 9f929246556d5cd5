"""A batch in, the batch with vectors out: what engines call in their workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .. import _arguments, _errors
from .columns import Plan, score
from .granted import granted_threads
from .opened import check_of, opened, opening

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import DTypeLike

    from ..collection import EmbeddingBagCollection
    from .columns import Scored
    from .opened import Opening


class Scorer:
    """Vectors for the rows of tables of columns, batch by batch, in any process.

    It pickles as the path and the options, and opens the file once a process, mapped: workers of one host share its
    pages. There are three doors. Called with a table it returns that table with vectors (Ray Data, polars, pyarrow);
    `map_arrow` takes an iterator of record batches (Spark, pyarrow); `map_pandas` takes a data frame (Dask, pandas).

    Parameters
    ----------
    path : str or path
        A file of tables: one that `EmbeddingBagCollection.save` or `save_tables` wrote, or any that `load_tables`
        reads. It must not change while scorers use it: give each version a name of its own.
    features : dict of str to str, optional
        The table of each feature. If not given, the file's; one a table where it has none.
    columns : dict of feature to str, optional
        The column of each feature, of lists of integers. A feature that is not named has the column of its name.
    weights : dict of feature to str, optional
        The column of a feature's weights, if it has some: lists of numbers, of the lengths of its indices' lists.
    output : str, or dict of feature to str
        The column that is made: of the features' vectors, one after the other; or one for each feature.
    mode, dtype, padding_idx, invalid, names
        As for `EmbeddingBagCollection.from_file`. A `dtype` of bfloat16 is refused: Arrow has none.
    list_size : {"variable", "fixed"}
        The type of the column: List, which all engines know; or FixedSizeList, which takes 4 bytes a row less.
    errors : {"raise", "null"}
        What becomes of a row with an index out of range, with a null in a list, or with another number of weights than
        of indices: an error with the row and the reason, or a null vector. What is wrong with a whole column is an
        error always.
    reasons : str, optional
        With ``errors="null"``, another column: why a row's vector is null. Null for the others.
    row_id : str or sequence of str
        Columns whose values tell in an error which row it is: its key, the file that it is from.
    num_threads : int, optional
        For a batch. If not given: what the engine has granted (Ray's ``num_cpus``, ``spark.task.cpus``, 1 on Dask); in
        `map_pandas` 1; elsewhere the process's own limit, see `set_num_threads`.

    Attributes
    ----------
    collection : EmbeddingBagCollection
    null_rows : int
        Rows with a null vector, counted over the calls of this object in this process.

    Raises
    ------
    TypeError, ValueError, OSError, ImportError
        If an argument is wrong; as for `EmbeddingBagCollection.from_file`.

    Examples
    --------
    >>> import numpy as np, pyarrow as pa, qembag, tempfile
    >>> from qembag.engines import Scorer
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = f"{folder.name}/songs.safetensors"
    >>> qembag.save_tables(path, {"songs": qembag.quantize(np.eye(4, 2, dtype=np.float32), bits=8)})
    >>> scorer = Scorer(path, errors="null", reasons="error")
    >>> scored = scorer(pa.table({"user": ["a", "b", "c"], "songs": [[0, 1], [], [9]]}))
    >>> scored["vector"].to_pylist()
    [[1.0, 1.0], [0.0, 0.0], None]
    >>> scored["error"].to_pylist()
    [None, None, 'songs[0] is 9: out of range for a table of 4 rows']
    >>> del scorer; folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        features: Mapping[str, str] | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        weights: Mapping[str, str] | None = None,
        output: str | Mapping[str, str] = "vector",
        mode: str | Mapping[str, str] | None = None,
        dtype: DTypeLike | None = None,
        padding_idx: int | Mapping[str, int | None] | None = None,
        invalid: str | Mapping[str, str] | None = None,
        names: str | list[str] | tuple[str, ...] | None = None,
        list_size: str = "variable",
        errors: str = "raise",
        reasons: str | None = None,
        row_id: str | Sequence[str] = (),
        num_threads: int | None = None,
    ) -> None:
        options = {"mode": mode, "dtype": dtype, "padding_idx": padding_idx, "invalid": invalid, "names": names}
        self._opening: Opening = opening(path, features, options)
        self._collection: EmbeddingBagCollection | None
        self._collection, _ = opened(self._opening)
        self._check = check_of(self._opening.path)
        if self._collection.dtype is not None and _arguments.out_type(self._collection.dtype, None).number == 2:
            raise TypeError("dtype must be float32 or float16, got bfloat16, which Arrow has no type for")
        known = self._collection.features
        self._plan = Plan(
            {feature: feature for feature in known} | _by_feature(columns, "columns", known),
            _by_feature(weights, "weights", known),
            output if isinstance(output, str) else _by_feature(output, "output", known, whole=True),
            _one_of(list_size, "list_size", ("variable", "fixed")),
        )
        self._is_strict = _one_of(errors, "errors", ("raise", "null")) == "raise"
        if reasons is not None and (self._is_strict or not isinstance(reasons, str)):
            raise ValueError(f"reasons must be a column's name with errors='null', got {_errors.shown(reasons)}")
        self._reasons = reasons
        self._row_id = (row_id,) if isinstance(row_id, str) else tuple(row_id)
        made = [*self._plan.outputs, *([] if reasons is None else [reasons])]
        if len(set(made)) < (len(known) if isinstance(output, Mapping) else 1) + (reasons is not None):
            raise ValueError(f"output and reasons must be columns of different names, got {_errors.shown(made)}")
        self._num_threads = None if num_threads is None else _arguments.num_threads(num_threads, "num_threads")
        self.null_rows = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_collection": None, "null_rows": 0}

    def __repr__(self) -> str:
        return f"Scorer({self._opening.path!r}, {self._plan.columns!r}, output={self._plan.output!r})"

    @property
    def collection(self) -> EmbeddingBagCollection:
        if self._collection is None:
            if check_of(self._opening.path) != self._check:
                raise ValueError(
                    f"{self._opening.path} must be the file that this Scorer was made with, got another: give each "
                    "version of the tables a name of its own"
                )
            self._collection, _ = opened(self._opening)
        return self._collection

    # ---- Doors -------------------------------------------------------------------------------------------------------

    def __call__(self, batch: Any) -> Any:
        """The batch with vectors: for Ray Data's `map_batches` with ``batch_format="pyarrow"``, and polars'.

        Parameters
        ----------
        batch : pyarrow.Table, pyarrow.RecordBatch or polars.DataFrame

        Returns
        -------
        pyarrow.Table, pyarrow.RecordBatch or polars.DataFrame
            As given: with all of its columns, and those that are made.

        Raises
        ------
        IndexError, ValueError
            For a bad row, with ``errors="raise"``; for a column that is missing, or there already.
        TypeError
            If the batch, or a column, is of another type.
        """
        if isinstance(batch, pa.Table):
            made = self._made(batch.column_names, batch.column, batch.num_rows, self._threads(None))
            for name, column in made.items():
                batch = batch.append_column(name, column)
            return batch
        if isinstance(batch, pa.RecordBatch):
            return self._of_record_batch(batch, 0)
        if type(batch).__module__.partition(".")[0] == "polars" and hasattr(batch, "get_column"):
            made = self._made(batch.columns, lambda name: _chunked(batch.get_column(name)), batch.height)
            series = type(batch.to_series(0)) if batch.width else None
            assert series is not None  # it has the columns that were read
            return batch.with_columns([series(name, column) for name, column in made.items()])
        raise TypeError(
            f"batch must be a pyarrow Table or RecordBatch, or a polars DataFrame, got {_errors.kind_of(batch)}"
        )

    def map_arrow(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Record batches with vectors: for Spark's `mapInArrow`, and for what reads with pyarrow.

        Parameters
        ----------
        batches : iterable of pyarrow.RecordBatch

        Yields
        ------
        pyarrow.RecordBatch
            One for each, with all of its columns, and those that are made.

        Raises
        ------
        IndexError, ValueError, TypeError
            As for a call. Rows are counted over all batches.
        """
        first = 0
        for batch in batches:
            if not isinstance(batch, pa.RecordBatch):
                raise TypeError(f"batches must be of pyarrow.RecordBatch, got {_errors.kind_of(batch)}")
            yield self._of_record_batch(batch, first)
            first += batch.num_rows

    def map_pandas(self, frame: Any) -> Any:
        """The data frame with vectors: for Dask's `map_partitions`, and pandas.

        Parameters
        ----------
        frame : pandas.DataFrame
            Its columns of lists may be Arrow's (``dtype_backend="pyarrow"``, the fast way), or of Python's objects.

        Returns
        -------
        pandas.DataFrame
            With the same index, all columns, and those that are made, as Arrow's. Of a frame without rows it is what
            Dask calls `meta`.

        Raises
        ------
        IndexError, ValueError, TypeError
            As for a call.
        """
        if type(frame).__module__.partition(".")[0] != "pandas" or not hasattr(frame, "assign"):
            raise TypeError(f"frame must be a pandas DataFrame, got {_errors.kind_of(frame)}")
        import pandas as pd

        made = self._made(list(frame.columns), lambda name: _chunked(frame[name]), len(frame), self._threads(1))
        series = {
            name: pd.Series(pd.arrays.ArrowExtensionArray(column), index=frame.index) for name, column in made.items()
        }
        return frame.assign(**series)

    def spark_schema(self, schema: Any) -> Any:
        """The schema of what `map_arrow` yields, for Spark's `mapInArrow`.

        Parameters
        ----------
        schema : pyspark.sql.types.StructType
            Of the data frame that is mapped.

        Returns
        -------
        pyspark.sql.types.StructType

        Raises
        ------
        TypeError
            If `dtype` is float16, or `list_size` is "fixed": Spark has no such types.
        """
        from pyspark.sql import types

        if self._plan.list_size == "fixed" or _arguments.out_type(self.collection.dtype, None).number != 0:
            raise TypeError("Spark must be given lists of float32: list_size='variable', dtype='float32'")
        vectors = types.ArrayType(types.FloatType(), containsNull=True)
        made = [types.StructField(name, vectors) for name in self._plan.outputs]
        if self._reasons is not None:
            made.append(types.StructField(self._reasons, types.StringType()))
        return types.StructType([*schema.fields, *made])

    # ---- A batch -----------------------------------------------------------------------------------------------------

    def _threads(self, otherwise: int | None) -> int | None:
        return self._num_threads or granted_threads() or otherwise

    def _of_record_batch(self, batch: Any, first: int) -> Any:
        made = self._made(
            batch.schema.names, lambda name: pa.chunked_array([batch.column(name)]), batch.num_rows, first=first
        )
        for name, column in made.items():
            batch = batch.append_column(name, column.combine_chunks() if column.num_chunks != 1 else column.chunk(0))
        return batch

    def _made(
        self,
        there: Sequence[str],
        column_of: Callable[[str], Any],
        num_rows: int,
        num_threads: int | None = None,
        first: int = 0,
    ) -> dict[str, Any]:
        """The new columns. `first` is the number of the batch's first row, for errors."""
        plan = self._plan
        for name in [*plan.read, *self._row_id]:
            if there.count(name) != 1:
                raise ValueError(f"the batch must have one column {name!r}, got columns {_errors.shown(list(there))}")
        for name in [*plan.outputs, *([] if self._reasons is None else [self._reasons])]:
            if name in there:
                raise ValueError(f"the batch must not have a column {name!r} yet, which is made here: see output=")
        batch = {name: column_of(name) for name in plan.read}
        scored = score(self.collection, plan, batch, num_threads or self._threads(None))
        if self._is_strict:
            self._refuse(scored, column_of, first)
        self.null_rows += len({row for rows in scored.bad.values() for row in rows})
        made = scored.vectors
        if self._reasons is not None:
            made[self._reasons] = scored.reasons(num_rows)
        return made

    def _refuse(self, scored: Scored, column_of: Callable[[str], Any], first: int) -> None:
        """Raise for the first bad row."""
        found = scored.first_bad()
        if found is None:
            return
        row, bad = found
        ids = "".join(f", {name}={column_of(name)[row].as_py()!r}" for name in self._row_id)
        raise bad.kind(f"row {first + row}{ids}: {bad.reason} ({self._opening.path})")


def _by_feature(
    given: Mapping[str, str] | None, name: str, features: Mapping[str, str], *, whole: bool = False
) -> dict[str, str]:
    """An argument that gives features their columns."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of feature to column, got {_errors.kind_of(given)}")
    found = dict(given or {})
    for feature, column in found.items():
        if feature not in features:
            raise ValueError(f"{name} must have features of the collection only, got {_errors.shown(feature)}")
        if not isinstance(column, str):
            raise TypeError(f"{name}[{feature!r}] must be a column's name, got {_errors.kind_of(column)}")
    missing = [feature for feature in features if feature not in found]
    if whole and missing:
        raise ValueError(f"{name} must name a column for each feature, got none for {_errors.shown(missing[0])}")
    return found


def _one_of(value: str, name: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {_errors.shown(value)}")
    return value


def _chunked(column: Any) -> Any:
    """A column of polars or pandas as pyarrow's."""
    found = pa.chunked_array(column) if hasattr(column, "__arrow_c_stream__") else pa.array(column, from_pandas=True)
    return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])
