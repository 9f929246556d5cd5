"""A batch in, the batch with vectors out: what engines call in their workers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from .. import _arguments, _errors
from ..interop.tensors import imported
from .columns import Plan, score
from .granted import granted_threads
from .opened import opened_as, opening

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
        self._collection, self._check = opened_as(self._opening, None)
        if self._collection.dtype is not None and _arguments.out_type(self._collection.dtype, None).number == 2:
            raise TypeError("dtype must be float32 or float16, got bfloat16, which Arrow has no type for")
        known = self._collection.features
        self._plan = Plan(
            {feature: feature for feature in known} | _by_feature(columns, "columns", known),
            _by_feature(weights, "weights", known),
            _outputs(output, known),
            _one_of(list_size, "list_size", ("variable", "fixed")),
        )
        for feature in self._plan.weights:
            if self._collection.modes[feature] == "max":
                raise ValueError(f"weights must not have feature {feature!r}, whose mode is 'max': maxima take none")
        self._is_strict = _one_of(errors, "errors", ("raise", "null")) == "raise"
        self._reasons = None if reasons is None else _column(reasons, "reasons")
        if reasons is not None and self._is_strict:
            raise ValueError(f"reasons must be None with errors='raise', got {_errors.shown(reasons)}")
        self._row_id = _columns(row_id, "row_id")
        self._made_columns = self._plan.made(self._reasons)
        self._num_threads = None if num_threads is None else _arguments.num_threads(num_threads, "num_threads")
        self.null_rows = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_collection": None, "null_rows": 0}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.Lock()}

    def __repr__(self) -> str:
        return f"Scorer({self._opening.path!r}, {self._plan.columns!r}, output={self._plan.output!r})"

    @property
    def collection(self) -> EmbeddingBagCollection:
        if self._collection is None:
            self._collection, _ = opened_as(self._opening, self._check)
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
            for name, column in self._made(_of_arrow(batch, batch.column)).items():
                batch = batch.append_column(name, column)
            return batch
        if isinstance(batch, pa.RecordBatch):
            return self._of_record_batch(batch, 0)
        if _is_frame(batch, "polars"):
            series = sys.modules["polars"].Series
            source = _Source(
                batch.columns, lambda name: _chunked(batch[name], name), lambda name, row: batch[name][row]
            )
            return batch.with_columns([series(name, column) for name, column in self._made(source).items()])
        raise TypeError(
            "batch must be a pyarrow Table or RecordBatch (in Ray Data: batch_format='pyarrow'), or a polars "
            f"DataFrame, got {_errors.kind_of(batch)}"
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
        for batch in _iterated(batches):
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
        if not _is_frame(frame, "pandas"):
            raise TypeError(f"frame must be a pandas DataFrame, got {_errors.kind_of(frame)}")
        pandas = sys.modules["pandas"]
        source = _Source(
            list(frame.columns),
            lambda name: _chunked(frame[name], name),
            lambda name, row: frame[name].iloc[row],
        )
        made = self._made(source, otherwise=1)
        arrays = {name: pandas.arrays.ArrowExtensionArray(column) for name, column in made.items()}
        return frame.assign(**{name: pandas.Series(array, index=frame.index) for name, array in arrays.items()})

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
            If `schema` is no StructType; if `dtype` is float16, or `list_size` is "fixed": Spark has no such types.
        ImportError
            If pyspark is not installed.
        """
        types = imported("pyspark.sql.types", "'qembag[spark]'")
        if not isinstance(schema, types.StructType):
            raise TypeError(f"schema must be a StructType of pyspark's, got {_errors.kind_of(schema)}")
        if self._plan.list_size == "fixed" or _arguments.out_type(self.collection.dtype, None).number != 0:
            raise TypeError("Spark must be given lists of float32: list_size='variable', dtype='float32'")
        vectors = types.ArrayType(types.FloatType(), containsNull=True)
        made = [types.StructField(name, vectors) for name in self._plan.outputs]
        if self._reasons is not None:
            made.append(types.StructField(self._reasons, types.StringType()))
        return types.StructType([*schema.fields, *made])

    # ---- A batch -----------------------------------------------------------------------------------------------------

    def _of_record_batch(self, batch: Any, first: int) -> Any:
        made = self._made(_of_arrow(batch, lambda name: pa.chunked_array([batch.column(name)])), first)
        schema, arrays = batch.schema, batch.columns
        for name, column in made.items():
            schema = schema.append(pa.field(name, column.type))
            arrays.append(column.combine_chunks() if column.num_chunks != 1 else column.chunk(0))
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _made(self, source: _Source, first: int = 0, otherwise: int | None = None) -> dict[str, Any]:
        """The new columns. `first` is the number of the batch's first row, for errors; `otherwise` the number of
        threads where nobody has said one."""
        there = list(source.names)
        for name in [*self._plan.read, *self._row_id]:
            if there.count(name) != 1:
                raise ValueError(f"the batch must have one column {name!r}, got columns {_errors.shown(there)}")
        for name in self._made_columns:
            if name in there:
                raise ValueError(f"the batch must not have a column {name!r} yet, which is made here: see output=")
        batch = {name: source.column(name) for name in self._plan.read}
        scored = score(self.collection, self._plan, batch, self._num_threads or granted_threads() or otherwise)
        if self._is_strict:
            self._refuse(scored, source, first)
        with self._lock:
            self.null_rows += len({row for rows in scored.bad.values() for row in rows})
        made = scored.vectors
        if self._reasons is not None:
            made[self._reasons] = scored.reasons(len(next(iter(made.values()))))
        return made

    def _refuse(self, scored: Scored, source: _Source, first: int) -> None:
        """Raise for the first bad row."""
        found = scored.first_bad()
        if found is None:
            return
        row, bad = found
        ids = "".join(f", {name}={_plain(source.cell(name, row))!r}" for name in self._row_id)
        raise bad.kind(f"row {first + row}{ids}: {bad.reason} (tables: {self._opening.path})")


class _Source(NamedTuple):
    """A batch, whatever holds it."""

    names: Sequence[str]
    column: Callable[[str], Any]
    """A column as a chunked array of pyarrow's."""
    cell: Callable[[str, int], Any]


def _plain(cell: Any) -> Any:
    """What pandas gives of NumPy's as Python's, as other batches give it."""
    return cell.item() if isinstance(cell, np.generic) else cell


def _of_arrow(batch: Any, column: Callable[[str], Any]) -> _Source:
    return _Source(batch.schema.names, column, lambda name, row: column(name)[row].as_py())


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _by_feature(given: Mapping[str, str] | None, name: str, features: Mapping[str, str]) -> dict[str, str]:
    """An argument that gives features their columns."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of feature to column, got {_errors.kind_of(given)}")
    found = dict(given or {})
    for feature in found:
        if feature not in features:
            raise ValueError(f"{name} must have features of the collection only, got {_errors.shown(feature)}")
    return {feature: _column(column, f"{name}[{feature!r}]") for feature, column in found.items()}


def _outputs(given: str | Mapping[str, str], features: Mapping[str, str]) -> str | dict[str, str]:
    """The argument `output`."""
    if isinstance(given, str):
        return _column(given, "output")
    if not isinstance(given, Mapping):
        raise TypeError(f"output must be a column's name, or a dict of feature to column, got {_errors.kind_of(given)}")
    found = _by_feature(given, "output", features)
    for feature in features:
        if feature not in found:
            raise ValueError(f"output must name a column for each feature, got none for {_errors.shown(feature)}")
    return {feature: found[feature] for feature in features}


def _column(given: object, name: str) -> str:
    """The name of a column, which Arrow keeps as UTF-8."""
    if not isinstance(given, str):
        raise TypeError(f"{name} must be a column's name, got {_errors.kind_of(given)}")
    text = _arguments.exact_text(given)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a column's name, in characters of UTF-8, got {_errors.shown(text)}") from None
    return text


def _columns(given: str | Sequence[str], name: str) -> tuple[str, ...]:
    if isinstance(given, (list, tuple)):
        return tuple(_column(one, f"{name}[{number}]") for number, one in enumerate(given))
    return (_column(given, name),)


def _one_of(value: str, name: str, allowed: tuple[str, ...]) -> str:
    text = _arguments.exact_text(value)
    if text not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {_errors.shown(value)}")
    return text


def _iterated(batches: Any) -> Iterator[Any]:
    try:
        return iter(batches)
    except (TypeError, NotImplementedError):  # of arrays and memoryviews without a dimension, too
        kind = _errors.kind_of(batches)
        raise TypeError(f"batches must be an iterable of pyarrow.RecordBatch, got {kind}") from None


# ---- Data frames -----------------------------------------------------------------------------------------------------


def _is_frame(value: object, package: str) -> bool:
    """Whether it is a DataFrame of a package: one that is not imported has made none."""
    module = sys.modules.get(package)
    kind = getattr(module, "DataFrame", None)
    return kind is not None and isinstance(value, kind)


def _chunked(column: Any, name: str) -> Any:
    """A column of polars or pandas as pyarrow's."""
    try:
        has_stream = hasattr(column, "__arrow_c_stream__")
        found = pa.chunked_array(column) if has_stream else pa.array(column, from_pandas=True)
    except (TypeError, ValueError, OverflowError) as error:  # of a column of Python's objects
        raise TypeError(f"column {name!r} must have lists, got what pyarrow cannot convert: {error}") from error
    return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])
