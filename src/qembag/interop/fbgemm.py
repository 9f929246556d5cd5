"""Tables from FBGEMM's table-batched operator for inference on the CPU, and back.

``docs/from-torchrec.md`` says what is exact.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _arguments, _errors
from ..collection import EmbeddingBagCollection, EmbeddingCollection
from ..float_table import FloatTable
from ..layout import FloatLayout, aligned
from ..table import QuantizedTable, table_of
from . import exporting
from .tensors import array_of, full_name, has_class, imported_torch, tensor_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

OPERATOR = "IntNBitTableBatchedEmbeddingBagsCodegen"
# Each table begins at a multiple of this many bytes.
TABLE_ALIGNMENT = 128
# Bytes of a scale and a bias, both of half, before the codes of a row.
PAIR_BYTES = 4
# What FBGEMM's SparseType calls them.
KINDS: dict[object, int] = {"int8": 8, "int4": 4, "int2": 2, "fp16": 16, "fp32": 32}
FLOATS: dict[object, np.dtype[Any]] = {16: np.dtype(np.float16), 32: np.dtype(np.float32)}
FP8 = "fp8"
# By FBGEMM's numbers of SparseType and PoolingMode; None: of float32, and no pooling.
OUTPUTS = {0: None, 1: "float16", 5: "bfloat16"}
MODES = {0: "sum", 1: "mean", 2: None}
# FBGEMM counts elements in int32, and the bytes of a row must have a number on hosts of 32 bits too.
MAX_DIM = 2**28 - 1


class Float8(NamedTuple):
    """FBGEMM's FP8: a sign, so many bits of exponent, the rest of mantissa; no infinities and no NaN."""

    exponent_bits: int
    exponent_bias: int

    def values(self) -> NDArray[np.float32]:
        """Of all 256 bytes."""
        codes = np.arange(256)
        mantissa_bits = 7 - self.exponent_bits
        exponents = (codes >> mantissa_bits) & (2**self.exponent_bits - 1)
        fractions = (codes & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
        sizes = np.where(exponents == 0, fractions * 2, 1 + fractions) * 2.0 ** (exponents - self.exponent_bias)
        values: NDArray[np.float32] = np.where(codes < 128, sizes, -sizes).astype(np.float32)
        return values


def is_operator(module: Any) -> bool:
    """Whether it is FBGEMM's table-batched operator for inference."""
    return has_class(module, "fbgemm_gpu", OPERATOR)


def from_module(module: Any) -> dict[str, QuantizedTable | FloatTable]:
    """The tables of FBGEMM's table-batched operator for inference.

    Parameters
    ----------
    module : fbgemm_gpu's IntNBitTableBatchedEmbeddingBagsCodegen
        On the CPU, with its weights assigned or initialized.

    Returns
    -------
    dict of QuantizedTable or FloatTable
        By the names in its `embedding_specs`, in their order: one for each table, however many features share it. If
        names are empty or repeated, each gets its number: ``table.0``. Rows are the operator's own memory, so that
        what it is assigned later shows; FP8 is copied to float16, exactly. Pruned tables have its `index_remapping`
        as `compressed_indices_mapping`. ``share_memory()`` on it would free the memory: see
        `qembag.interop.torch.from_module`.

    Raises
    ------
    TypeError
        If it is another module; FBGEMM's for virtual tables among them.
    ValueError
        If it is not on the CPU, has no weights yet, or rows that its own lookups on the CPU do not read.

    Notes
    -----
    Lookups have the bits of the operator's: sums, and of quantized tables means too. The operator multiplies the sum of
    float rows by 1/n for a mean, and a FloatTable divides it by n: the last bit can differ.
    """
    if not is_operator(module) or has_class(module, "fbgemm_gpu", "KVEmbeddingInference"):
        raise TypeError(f"module must be fbgemm_gpu's {OPERATOR}, got {full_name(module)}")
    if module.current_device.type != "cpu":
        raise ValueError(f"module must be on the CPU, got one on device {module.current_device}")
    if not module.weight_initialized:
        raise ValueError("module must have weights: assign them, or call initialize_weights() first")
    if module.reverse_qparam or module.scale_bias_size_in_bytes != PAIR_BYTES:
        raise ValueError(
            "module must have half scales and biases before the codes of a row, as its lookups on the CPU read them, "
            f"got reverse_qparam={module.reverse_qparam} and {module.scale_bias_size_in_bytes} bytes of them"
        )
    specs = [tuple(spec[:4]) for spec in module.embedding_specs]
    given = [str(spec[0]) for spec in specs]
    names = given if len({*given, ""}) > len(given) else [f"{name or 'table'}.{t}" for t, name in enumerate(given)]
    weights = module.weights_host if module.host_size > 0 else module.weights_dev
    return _tables(
        array_of(weights, "module.weights_host"),
        [(name, *spec[1:]) for name, spec in zip(names, specs, strict=True)],
        module.weights_physical_offsets,
        module.row_alignment,
        _mappings(module),
        Float8(module.fp8_exponent_bits, module.fp8_exponent_bias),
    )


def collection_from_module(
    module: Any, features: Sequence[str] | None = None
) -> EmbeddingBagCollection | EmbeddingCollection:
    """The collection that FBGEMM's table-batched operator for inference is: its features in their order, its pooling.

    Parameters
    ----------
    module : fbgemm_gpu's IntNBitTableBatchedEmbeddingBagsCodegen
        As for `from_module`.
    features : sequence of str, optional
        Names for its features, which have none in FBGEMM, in the order of its `feature_table_map`. If not given: the
        tables' names, or ``"0"``, ``"1"``, ... where features share a table.

    Returns
    -------
    EmbeddingBagCollection or EmbeddingCollection
        The latter for an operator of ``PoolingMode.NONE``. Called with the operator's own arguments, indices and
        offsets. Rows are the operator's own memory.

    Raises
    ------
    TypeError, ValueError
        As `from_module`; ValueError also if its output is of codes, or `features` are not as many as it has.

    Notes
    -----
    Outputs have the bits of the operator's, with the exceptions that `from_module` names; bfloat16 output rounds to
    even, and FBGEMM's half up.
    """
    tables = from_module(module)
    names, places = list(tables), list(module.feature_table_map)
    if features is None:
        is_shared = len(set(places)) < len(places)
        features = [str(number) if is_shared else names[place] for number, place in enumerate(places)]
    if len(features) != len(places) or len(set(features)) != len(places):
        raise ValueError(f"features must be {len(places)} different names, got {_errors.shown(features)}")
    by_feature = {name: names[place] for name, place in zip(features, places, strict=True)}
    output = int(module.output_dtype)
    if output not in OUTPUTS:
        raise ValueError(
            "module must have an output_dtype of SparseType.FP32, FP16 or BF16, got FBGEMM's number "
            f"{_errors.shown(output)}"
        )
    mode = MODES[int(module.pooling_mode)]
    if mode is None:
        return EmbeddingCollection(tables, by_feature, dtype=OUTPUTS[output])
    return EmbeddingBagCollection(tables, by_feature, mode=mode, dtype=OUTPUTS[output])


def _mappings(module: Any) -> list[NDArray[np.int32] | None]:
    """The remapping of each table; None where it is not pruned. The operator has them in one of three forms."""
    rows = [int(spec[1]) for spec in module.embedding_specs]
    features = list(module.feature_table_map)
    if module.index_remapping_hash_table_cpu is not None:
        torch = imported_torch()
        # A hash map can only be asked: for each logical row of each table, as one bag a table.
        before = module.original_rows_per_table.tolist()
        counts = [before[features.index(table)] for table in range(len(rows))]
        indices = torch.cat([torch.arange(count) for count in counts])
        ends = torch.tensor([sum(counts[:table]) for table in range(len(counts) + 1)])
        flat = module.index_remapping_hash_table_cpu.lookup(indices, ends).numpy()
    elif module.index_remapping_hash_table.numel():
        raise ValueError("module must have its index_remapping as an array or on the CPU, got the hash table of a GPU")
    elif module.index_remappings_array.numel():
        flat = array_of(module.index_remappings_array, "module.index_remappings_array")
        ends = module.index_remappings_array_offsets
    else:
        return [None] * len(rows)
    places = ends.tolist()
    if flat.size and not -1 <= flat.min() <= flat.max() <= np.iinfo(np.int32).max:
        raise ValueError("module must have an index_remapping of -1 and numbers of rows, got others")
    parts = [flat[start:stop].astype(np.int32) for start, stop in itertools.pairwise(places)]
    # The hash form has an identity for a table that is not pruned, the array form nothing.
    return [
        None if not len(part) or np.array_equal(part, np.arange(count)) else part
        for part, count in zip(parts, rows, strict=True)
    ]


def from_blob(
    weights: Any,
    specs: Sequence[tuple[Any, ...]],
    *,
    weights_offsets: Sequence[int] | None = None,
    row_alignment: int = 1,
    mappings: Sequence[Any] | None = None,
) -> dict[str, QuantizedTable | FloatTable]:
    """The tables in a blob of bytes as FBGEMM's table-batched operators lay them out, without a copy.

    Parameters
    ----------
    weights : ndarray or torch.Tensor of uint8, 1-D
        The blob: an operator's ``weights_host``.
    specs : list of tuple (name, num_rows, dim, bits)
        The tables in it, in order. `bits` is 8, 4 or 2, or 16 or 32 for rows of floats; FBGEMM's own `embedding_specs`,
        with a `SparseType` there, are taken too.
    weights_offsets : list of int, optional
        Where each table begins. If not given, at the first multiple of 128 bytes after the table before it.
    row_alignment : int
        Row bytes are rounded up to a multiple of this: 1 by FBGEMM on the CPU, 16 by TorchRec.
    mappings : list of (ndarray of int32, or None), optional
        The `index_remapping` of each table.

    Returns
    -------
    dict of QuantizedTable or FloatTable
        By name, in the order of `specs`: views of the blob.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If a table does not lie within the blob, a name is there twice, or a dim does not fill its last byte.
    IndexError
        If a mapping names a row that is not there.

    Examples
    --------
    >>> import numpy as np
    >>> from qembag.interop.fbgemm import from_blob
    >>> from_blob(np.zeros(256, np.uint8), [("a", 10, 8, 8), ("b", 3, 16, 4)])  # doctest: +NORMALIZE_WHITESPACE
    {'a': QuantizedTable(num_embeddings=10, dim=8, bits=8, scale_dtype=float16, scale_first=True, nbytes=120),
     'b': QuantizedTable(num_embeddings=3, dim=16, bits=4, scale_first=True, nbytes=36)}
    """
    blob = array_of(weights, "weights") if has_class(weights, "torch", "Tensor") else weights
    return _tables(blob, specs, weights_offsets, row_alignment, mappings, None)


def _tables(
    blob: Any,
    specs: Sequence[tuple[Any, ...]],
    offsets: Sequence[int] | None,
    row_alignment: int,
    mappings: Sequence[Any] | None,
    float8: Float8 | None,
) -> dict[str, QuantizedTable | FloatTable]:
    array = _arguments.as_array(blob, "weights")
    if array.dtype != np.uint8 or array.ndim != 1:
        raise TypeError(f"weights must be a 1-D array of uint8, got {_errors.kind_of(array)}")
    if array.size > 1 and array.strides[0] != 1:
        raise ValueError(f"weights must have its bytes side by side, got strides {array.strides}")
    specs = _listed(specs, "specs")
    starts = None if offsets is None else _listed(offsets, "weights_offsets", len(specs))
    remapped = [None] * len(specs) if mappings is None else _listed(mappings, "mappings", len(specs))
    found: dict[str, QuantizedTable | FloatTable] = {}
    end = 0
    for number, spec in enumerate(specs):
        if not isinstance(spec, (tuple, list)) or len(spec) < 4 or not isinstance(spec[0], str) or spec[0] in found:
            raise ValueError(
                f"specs[{number}] must be a name of its own, rows, dim and bits, got {_errors.shown(spec)}"
            )
        start = -(-end // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
        if starts is not None:
            start = _arguments.whole_number(starts[number], f"weights_offsets[{number}]")
        try:
            table, end = _table(array, start, tuple(spec), row_alignment, remapped[number], float8)
        except (TypeError, ValueError, IndexError) as error:
            raise type(error)(f"table {_errors.shown(spec[0])}: {error}") from None
        found[spec[0]] = table
    return found


def _listed(values: Any, name: str, count: int | None = None) -> list[Any]:
    """An argument that has an item for each table."""
    try:
        found = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a list with an item for each table, got {_errors.kind_of(values)}") from None
    if count is not None and len(found) != count:
        raise ValueError(f"{name} must have an item for each of {count} tables, got {len(found)}")
    return found


def _table(
    blob: NDArray[np.uint8], start: int, spec: tuple[Any, ...], row_alignment: int, mapping: Any, float8: Float8 | None
) -> tuple[QuantizedTable | FloatTable, int]:
    """A table that begins at a byte of the blob, and where it ends."""
    num_rows, dim = _arguments.whole_number(spec[1], "rows"), _arguments.whole_number(spec[2], "dim")
    if num_rows < 0 or not 1 <= dim <= MAX_DIM:
        raise ValueError(
            f"must have 0 rows or more, and a dim from 1 to {MAX_DIM}, got {_errors.shown(num_rows)} rows of "
            f"{_errors.shown(dim)}"
        )
    kind = getattr(spec[3], "value", spec[3])
    bits = KINDS.get(kind, kind) if isinstance(kind, (int, str, np.integer)) else None
    if bits in FLOATS:
        layout = FloatLayout(FLOATS[bits].name, dim, FLOATS[bits])
        length = rounded_up(layout.row_bytes, row_alignment)
    elif bits in _arguments.BITS:
        packed = aligned(int(bits), dim, np.float16, True, None, row_alignment)
        length = packed.row_bytes
        if dim % packed.codes_per_byte:
            raise ValueError(f"dim must be a multiple of {packed.codes_per_byte} at {bits} bits, got {dim}")
    elif float8 is not None and kind == FP8:
        length = rounded_up(dim, row_alignment)
    else:
        raise ValueError(f"bits must be 8, 4, 2, 16 or 32, got {_errors.shown(kind)}")
    end = start + num_rows * length
    if not 0 <= start <= end <= len(blob):
        raise ValueError(
            f"must lie within weights of {len(blob)} bytes, got {_errors.shown(num_rows)} rows of {length} "
            f"bytes from byte {_errors.shown(start)}"
        )
    rows = blob[start:end].reshape(num_rows, length)
    if bits in _arguments.BITS:
        return table_of(QuantizedTable, rows, packed, mapping), end
    if bits in FLOATS:
        floats = rows[:, : layout.row_bytes].view(FLOATS[bits])
    else:
        floats = _widened(rows[:, :dim], float8)
    return FloatTable(floats, compressed_indices_mapping=mapping), end


def rounded_up(size: int, row_alignment: int) -> int:
    """Row bytes in a target that aligns its rows."""
    multiple = _arguments.row_alignment(row_alignment)
    return -(-size // multiple) * multiple


def _widened(codes: NDArray[np.uint8], float8: Any) -> NDArray[Any]:
    """FP8 as float16, or as float32 where float16 does not hold each value."""
    values = float8.values()
    halves = _arguments.quietly(values.astype, np.float16)
    exact: NDArray[Any] = halves if np.array_equal(halves.astype(np.float32), values) else values
    return exact[codes]


# ---- Back ------------------------------------------------------------------------------------------------------------


def to_weights(table: QuantizedTable | FloatTable, *, exact: bool = True) -> tuple[Any, Any]:
    """The rows of a table as FBGEMM's ``assign_embedding_weights`` takes them, in a list of one such pair a table.

    Parameters
    ----------
    table : QuantizedTable or FloatTable
        Quantized, or float32 or float16.
    exact : bool
        False allows a loss, as for `qembag.interop.torch.to_packed`: FBGEMM has scales and biases of float16 only.

    Returns
    -------
    codes : torch.Tensor of uint8, shape (num_rows, bytes)
        For a FloatTable, the bytes of its rows. For a pruned table, the stored rows: its `compressed_indices_mapping`
        is what the operator is given as `index_remapping` when it is made.
    scale_bias : torch.Tensor of uint8, shape (num_rows, 4), or None
        Half scale and half bias; None for floats.

    Raises
    ------
    TypeError
        If `table` is not a table.
    ValueError
        If `exact`, and something would be lost: says what. If the table is of bfloat16.
    ImportError
        If torch is not installed.

    Notes
    -----
    The operator gives the bits of ours for sums, and for means of quantized tables.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> from qembag.interop.fbgemm import to_weights
    >>> table = qembag.quantize(np.eye(4, dtype=np.float32), bits=4)
    >>> [part.shape for part in to_weights(table)]  # doctest: +SKIP
    [torch.Size([4, 2]), torch.Size([4, 4])]
    """
    checked, is_exact = exporting.table_to_export(table, exact)
    if isinstance(checked, FloatTable):
        return tensor_of(float_bytes(checked)), None
    target = "FBGEMM's table-batched operator"
    rows, layout = exporting.rows_of_one_group(checked, np.float16, scale_first=True, exact=is_exact, target=target)
    pairs = layout.stored_pairs(rows).view(np.uint8).reshape(len(rows), layout.pairs_bytes)
    return tensor_of(layout.packed_codes(rows)), tensor_of(pairs)


def float_bytes(table: FloatTable) -> NDArray[np.uint8]:
    """The bytes of float rows, for a library that has float32 and float16 only."""
    if table.dtype not in ("float32", "float16"):
        raise ValueError(
            f"table must be of codes, float32 or float16, got {table.dtype}; qembag.FloatTable(table[:]) is float32"
        )
    return table.data.view(np.uint8)
