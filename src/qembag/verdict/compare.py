"""`compare`: what each way to quantize a table costs, on its own rows and bags."""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _arguments, _errors
from .._runtime import show_config
from ..base import Table
from ..float_table import FloatTable
from ..formats.progress import reporting
from ..layout import FloatLayout, RowLayout, table_bytes
from ..lookup import embedding_bag
from ..quantize import quantize
from .measures import Distance, distance, lowest, summary
from .report import Report, Variant
from .traffic import time_rounds, traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    from ..formats.progress import Progress
    from ..table import QuantizedTable

# Without `sample`, at most this many rows and elements (256 MiB of float32) are quantized.
MAX_ROWS, MAX_ELEMENTS = 200_000, 1 << 26
# Without `bags`: how many are made, and their mean length.
NUM_BAGS, BAG_LENGTH = 2000, 50
# Rows and bags are judged about this many elements at a time, which fit in the cache as float64.
ELEMENTS_AT_ONCE = 1 << 17
NUM_WORST = 10


class Source(NamedTuple):
    """A table of floats, and a function that reads rows by their sorted numbers."""

    name: str
    num_rows: int
    dim: int
    dtype: str
    nbytes: int
    mapping: NDArray[np.int32] | None
    read: Callable[[NDArray[np.int64]], NDArray[np.float32]]


class Judged(NamedTuple):
    """A variant, and the distance of its rows and bags from float32."""

    method: str
    layout: RowLayout
    rows: Distance
    bags: Distance


class Bags(NamedTuple):
    """As `embedding_bag` takes them."""

    indices: NDArray[Any]
    offsets: NDArray[Any]
    per_sample_weights: NDArray[Any] | None = None


def compare(
    weights: ArrayLike | Table | str | os.PathLike[str],
    *,
    bits: int | Sequence[int] = (8, 4, 2),
    methods: str | Sequence[str] = ("minmax", "lsq"),
    group_sizes: int | Sequence[int | None] | None = (None, 32),
    bags: Any = None,
    sample: int | None = None,
    tensor: str | None = None,
    name: str | None = None,
    num_threads: int | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> Report:
    """Quantize a table in several ways, and measure bytes, errors, cosines and speed of each.

    Parameters
    ----------
    weights : array_like of floats, shape (num_rows, dim); FloatTable or QuantizedTable; or path of a file
        As for `quantize`; or the path of a file as for `quantize_to_file`, from which only the sample is read. For a
        pruned table, only stored rows are judged. A quantized table is quantized again, and compared with the values
        that it has.
    bits, methods, group_sizes : sequence, or one of its items
        Each combination is a variant. Equal ones (groups as long as rows) count once; "greedy" is left out at 8 bits,
        where it is not defined.
    bags : tuple of (indices, offsets) or (indices, offsets, per_sample_weights), or 2-D array of indices, optional
        Rows that are looked up together in practice, as for `embedding_bag`. If not given, 2,000 random bags of 1 to 99
        rows, 50 on average, as skewed as words and clicks: the row of popularity rank r has a probability of
        ``log(1 + 1 / r) / log(num_rows + 1)`` (Zipf's law); which rows are popular is random.
    sample : int, optional
        How many random rows to quantize. If not given, all, up to 200,000 rows and 256 MiB of float32. Rows that the
        given `bags` use are always added.
    tensor : str, optional
        The name of a tensor, if the file has several.
    name : str, optional
        The table's name in the report.
    num_threads : int, optional
        Threads for quantizing, and for lookups that are not timed; see `set_num_threads`.
    seed : int
        Seed of the sample, the bags and the order of timed lookups.
    progress : bool or callable
        True shows a bar (tqdm); a callable is called as ``progress(rows_done, rows_total, bytes_done)``, counting the
        rows of each variant.

    Returns
    -------
    Report
        ``print(report)`` shows it; it has ``variants``, ``recommendation()``, ``to_dict()``, ``plot(path)`` and
        ``to_html(path)``. Numbers of rows are those of `weights`.

    Raises
    ------
    TypeError, ValueError, IndexError
        If an argument is wrong; as for `quantize` for `weights`, and as for `embedding_bag` for `bags`.
    OSError
        If a file cannot be read.
    ImportError
        If ``progress=True`` and tqdm is not installed.

    Notes
    -----
    With x a float32 vector and y what the quantized table gives for it, the relative squared error is
    ``sum((y - x)**2) / sum(x**2)`` over all elements of all rows, and a cosine ``x @ y / (norm(x) * norm(y))``; sums
    are in float64. If x is zero, as for empty bags, there is no direction and no cosine; if only y is zero, the cosine
    is 0. Pooled vectors are sums by `embedding_bag`, where x is the sum of the float32 rows; means have the same
    cosines.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> rows = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)
    >>> report = qembag.compare(rows, bits=(8, 4), methods="lsq")
    >>> [variant.label for variant in report.variants][1:]
    ['8 bits in groups of 32, lsq', '4 bits, lsq', '4 bits in groups of 32, lsq']
    >>> report.recommendation(min_cosine=0.99)
    '4 bits (lsq): 7.1 times smaller, worst cosine .993'
    """
    threads = None if num_threads is None else _arguments.num_threads(num_threads, "num_threads")
    number_of_seed = _at_least(seed, 0, "seed")
    rng = np.random.default_rng(number_of_seed)
    source = source_of(weights, tensor, name)
    wanted = variants_of(source.dim, bits, methods, group_sizes)
    given = None if bags is None else own_bags(bags, source.num_rows)
    numbers = sampled(source, sample, given, rng)
    rows = source.read(numbers)
    check_finite(rows, numbers)
    draw = drawing(given, numbers, rng)
    batch = draw()
    judged: list[Judged] = []
    # One table per layout is timed: other methods change its values, not its speed.
    tables: dict[RowLayout, QuantizedTable] = {}
    with reporting(progress, len(rows) * len(wanted), rows.nbytes * len(wanted)) as report:
        for number, (method, layout) in enumerate(wanted, 1):
            table = quantized(rows, numbers, method, layout, threads)
            by_rows, by_bags = rows_in_blocks(rows, table), bags_in_blocks(rows, table, batch, threads)
            judged.append(Judged(method, layout, distance(by_rows), distance(by_bags)))
            tables.setdefault(layout, table)
            report(len(rows) * number, rows.nbytes * number)
    timed_tables: list[NDArray[np.float32] | QuantizedTable] = [rows, *tables.values()]
    jobs = [functools.partial(_summed, table, threads=1) for table in timed_tables]
    rounds = [np.divide(times, len(timed.indices)) for timed, times in time_rounds(jobs, draw, rng)]
    floats_ns, *medians = np.median(rounds, axis=0).tolist()
    times = dict(zip(tables, medians, strict=True))
    return Report(
        name=source.name,
        num_embeddings=source.num_rows,
        dim=source.dim,
        dtype=source.dtype,
        nbytes=source.nbytes,
        nbytes_float32=_bytes_as_float32(source),
        num_rows_quantized=len(numbers),
        num_bags=len(batch.offsets),
        num_indices=len(batch.indices),
        own_bags=given is not None,
        seed=number_of_seed,
        ns_per_row_float32=floats_ns,
        num_rounds=len(rounds),
        machine="qembag {version}, {level}".format(**show_config()),
        variants=tuple(_variant(source, numbers, variant, times[variant.layout]) for variant in judged),
    )


def _variant(source: Source, numbers: NDArray[np.int64], judged: Judged, ns_per_row: float) -> Variant:
    layout, rows, bags = judged.layout, judged.rows, judged.bags
    nbytes = _bytes_of(layout, source)
    return Variant(
        bits=layout.bits,
        method=judged.method,
        group_size=_group_size_of(layout),
        row_bytes=layout.row_bytes,
        nbytes=nbytes,
        times_smaller=source.nbytes / nbytes,
        times_smaller_than_float32=_bytes_as_float32(source) / nbytes,
        relative_squared_error=rows.relative_squared_error,
        relative_error=float(np.sqrt(rows.relative_squared_error)),
        rows=summary(rows.cosines),
        bags=summary(bags.cosines),
        worst_rows=lowest(rows.cosines, numbers, NUM_WORST),
        ns_per_row=ns_per_row,
    )


def _bytes_as_float32(source: Source) -> int:
    return _bytes_of(FloatLayout("float32", source.dim, np.dtype(np.float32)), source)


def _bytes_of(layout: RowLayout | FloatLayout, source: Source) -> int:
    """Bytes of the whole table in this layout, pruned like the source."""
    if source.mapping is None:
        return table_bytes(layout, source.num_rows)
    return table_bytes(layout, int((source.mapping >= 0).sum()), source.num_rows)


def _group_size_of(layout: RowLayout) -> int | None:
    return layout.group_size if layout.num_groups > 1 else None


# ---- Arguments -------------------------------------------------------------------------------------------------------


def source_of(weights: Any, tensor: object, name: object) -> Source:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string, got {_errors.kind_of(name)}")
    if tensor is not None and not isinstance(tensor, str):
        raise TypeError(f"tensor must be a string, got {_errors.kind_of(tensor)}")
    is_file = isinstance(weights, (str, os.PathLike))
    if tensor is not None and not is_file:
        raise ValueError(f"tensor must be None for what is no file, got {_errors.shown(tensor)}")
    if is_file:
        source = _of_file(weights, tensor)
    elif isinstance(weights, Table):
        source = _of_table(weights)
    else:
        source = _of_array(_arguments.floats(weights, "weights", allow_double=True, allow_bfloat16=True))
    if not source.num_rows:
        raise ValueError("weights must have a row at least, got none")
    return source if name is None else source._replace(name=str.__str__(name))


def _of_file(path: str | os.PathLike[str], tensor: str | None) -> Source:
    from ..formats.sources import open_source, read_rows  # not for each `import qembag`

    try:
        source = open_source(path, tensor)
    except ValueError as error:
        raise ValueError(re.sub("^source must", "weights must", str(error))) from None
    num_rows = source.num_rows or 0
    name = os.path.basename(os.fsdecode(path)) + ("" if source.name == "table" else f", {source.name}")
    nbytes = source.row_nbytes * num_rows
    return Source(name, num_rows, source.dim, source.dtype, nbytes, None, lambda numbers: read_rows(source, numbers))


def _of_table(table: Table) -> Source:
    mapping = table.compressed_indices_mapping
    if isinstance(table, FloatTable) and mapping is None and table.dtype == "float32":
        return _of_array(table.data)  # taking all rows needs no copy
    stored = table.dtype if isinstance(table, FloatTable) else f"{table._handle.layout.bits}-bit codes"
    num_rows, dim = table.shape
    return Source("table", num_rows, dim, stored, table.nbytes, mapping, table.dequantize)


def _of_array(array: NDArray[Any]) -> Source:
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(
            f"weights must have 2 dimensions (rows, dim) and a dim of 1 or more, got {_errors.kind_of(array)}"
        )

    def read(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        # If all rows are wanted and are contiguous float32, no copy is made.
        return _arguments.as_float32(array if len(numbers) == len(array) else array[numbers])

    num_rows, dim = array.shape
    return Source("table", num_rows, dim, array.dtype.name, array.nbytes, None, read)


def variants_of(dim: int, bits: object, methods: object, group_sizes: object) -> list[tuple[str, RowLayout]]:
    """Each combination once."""
    widths = [_arguments.bits(width) for width in _several(bits, "bits")]
    names = [_known(method) for method in _several(methods, "methods")]
    sizes = [_group_size(size) for size in _several(group_sizes, "group_sizes")]
    found = {
        (method, RowLayout(width, dim, group_size=size)): None
        for width in widths
        for size in sizes
        for method in names
        if method != "greedy" or width != 8
    }
    if not found:
        raise ValueError("methods must hold another one than 'greedy', which is for 4 and 2 bits, got bits of 8 alone")
    return list(found)


def _several(value: object, name: str) -> list[object]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise ValueError(f"{name} must hold one at least, got none")
    return items


def _known(method: Any) -> str:
    """The method, if `quantize` takes it; 4 bits allow every method."""
    try:
        quantize(np.zeros((1, 1), np.float32), 4, method=method)
    except (TypeError, ValueError) as error:
        raise type(error)(f"methods: {error}") from None
    return _arguments.exact_text(method)


def _group_size(value: object) -> int | None:
    try:
        return _arguments.group_size(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"group_sizes: {error}") from None


def _at_least(value: object, least: int, name: str) -> int:
    number = _arguments.whole_number(value, name)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {_errors.shown(number)}")
    return number


def own_bags(bags: Any, num_rows: int) -> Bags:
    """The caller's bags, checked; indices are rows of the source, and offsets start at 0."""
    if isinstance(bags, tuple) and len(bags) not in (2, 3):
        raise ValueError(
            f"bags must be (indices, offsets), (indices, offsets, per_sample_weights) or a 2-D array of indices, got a "
            f"tuple of {len(bags)}"
        )
    given, starts, *more = bags if isinstance(bags, tuple) else (bags, None)
    try:
        indices = _arguments.bag_indices(given)
        offsets = _arguments.offsets(starts, indices, False)
        weights = _arguments.weights(more[0] if more else None, indices, 0, allow_double=True)
        # A lookup in a table of the same number of rows, which takes no memory, makes all checks and their errors.
        anything = FloatTable(np.broadcast_to(np.float32(0), (num_rows, 1)))
        embedding_bag(anything, indices, offsets, per_sample_weights=weights)
    except (TypeError, ValueError, IndexError) as error:
        raise type(error)(f"bags: {error}") from None
    if offsets is None:
        offsets = np.arange(len(indices), dtype=np.int64) * indices.shape[1]
        indices, weights = indices.ravel(), None if weights is None else weights.ravel()
    start = int(offsets[0]) if len(offsets) else len(indices)  # indices before it are in no bag
    if start == len(indices):
        raise ValueError("bags must hold an index at least, got none")
    used = None if weights is None else _arguments.plain_weights(weights[start:])
    return Bags(_arguments.plain_integers(indices[start:]), _arguments.plain_integers(offsets) - start, used)


# ---- Rows ------------------------------------------------------------------------------------------------------------


def sampled(source: Source, sample: object, bags: Bags | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """The sorted numbers of the rows to quantize, including those of `bags`."""
    there = None if source.mapping is None else np.flatnonzero(source.mapping >= 0)
    count = source.num_rows if there is None else len(there)
    if not count:
        raise ValueError("weights must have a row at least, got none that is not pruned")
    most = min(MAX_ROWS, max(MAX_ELEMENTS // source.dim, 1))
    few = min(count, most if sample is None else _at_least(sample, 1, "sample"))
    chosen = np.arange(count) if few == count else np.sort(rng.choice(count, few, replace=False, shuffle=False))
    numbers = chosen if there is None else there[chosen]
    if bags is not None and len(numbers) < source.num_rows:
        numbers = np.union1d(numbers, bags.indices)
    return numbers.astype(np.int64, copy=False)


def check_finite(rows: NDArray[np.float32], numbers: NDArray[np.int64]) -> None:
    for part in _parts(len(rows), rows.shape[1]):
        wrong = np.flatnonzero(~np.isfinite(rows[part]).all(axis=1))
        if len(wrong):
            row = numbers[part.start + wrong[0]]
            raise ValueError(f"weights[{row}] must be finite to be quantized, got a NaN or an infinity")


def quantized(
    rows: NDArray[np.float32], numbers: NDArray[np.int64], method: Any, layout: RowLayout, threads: int | None
) -> QuantizedTable:
    """The quantized table of the sample. An error names the row by its number in the source."""
    try:
        return quantize(rows, layout.bits, method=method, group_size=_group_size_of(layout), num_threads=threads)
    except ValueError as error:
        row = re.match(r"weights\[(\d+)\]", str(error))
        if row is None:
            raise
        raise ValueError(f"weights[{numbers[int(row[1])]}]{str(error)[row.end() :]}") from None


def drawing(given: Bags | None, numbers: NDArray[np.int64], rng: np.random.Generator) -> Callable[[], Bags]:
    """A function that returns a batch of bags, with indices into the sample: the given bags, or new ones each time."""
    if given is not None:
        placed = given._replace(indices=np.searchsorted(numbers, given.indices))
        return lambda: placed
    draw = traffic(rng, len(numbers), NUM_BAGS, BAG_LENGTH)
    return lambda: Bags(*draw())


def _parts(count: int, dim: int) -> Iterator[slice]:
    step = max(ELEMENTS_AT_ONCE // dim, 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rows_in_blocks(
    rows: NDArray[np.float32], table: QuantizedTable
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    for part in _parts(len(rows), rows.shape[1]):
        yield rows[part], table[part]


def bags_in_blocks(
    rows: NDArray[np.float32], table: QuantizedTable, bags: Bags, threads: int | None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    ends = np.append(bags.offsets[1:], len(bags.indices))
    for part in _parts(len(bags.offsets), rows.shape[1]):
        start, end = bags.offsets[part.start], ends[part.stop - 1]
        weights = None if bags.per_sample_weights is None else bags.per_sample_weights[start:end]
        some = Bags(bags.indices[start:end], bags.offsets[part] - start, weights)
        yield _summed(rows, some, threads), _summed(table, some, threads)


def _summed(table: NDArray[np.float32] | QuantizedTable, bags: Bags, threads: int | None) -> NDArray[np.float32]:
    return embedding_bag(
        table, bags.indices, bags.offsets, per_sample_weights=bags.per_sample_weights, num_threads=threads
    )
