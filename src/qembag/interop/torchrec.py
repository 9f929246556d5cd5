"""Tables from TorchRec's collections, and back.

``docs/from-torchrec.md`` says what is exact.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..collection import EmbeddingBagCollection, EmbeddingCollection
from ..float_table import FloatTable
from ..layout import aligned
from . import exporting, fbgemm
from .tensors import full_name, has_class, imported, tensor_of
from .torch import from_module as from_embedding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..table import QuantizedTable

# Collections of bags, and of single rows; where each has its tables.
COLLECTIONS = {"EmbeddingBagCollection": "embedding_bags", "EmbeddingCollection": "embeddings"}
QUANTIZED = "torchrec.quant.embedding_modules"
TARGET = "TorchRec"
OUTPUTS = ("float32", "float16", "bfloat16")
# What row bytes are rounded up to, by default.
ROW_ALIGNMENT = 16


def is_quantized(module: Any) -> bool:
    """Whether it is one of TorchRec's quantized collections, whose rows an operator of FBGEMM's has."""
    return has_class(module, QUANTIZED, *COLLECTIONS)


def from_module(module: Any) -> dict[str, QuantizedTable | FloatTable]:
    """The tables of a TorchRec collection.

    Parameters
    ----------
    module : torchrec's EmbeddingBagCollection or EmbeddingCollection
        As it trains, in floats, or as ``quantize_embeddings`` makes it; in either form of its state dict, at any row
        alignment. On the CPU, not sharded.

    Returns
    -------
    dict of QuantizedTable or FloatTable
        By the names that `load_tables` gives for its state dict, in its order: ``embedding_bags.t1``, or
        ``embeddings.t1``. Rows are the collection's own memory.

    Raises
    ------
    TypeError
        If it is another module.
    ValueError
        If it is not on the CPU.

    Notes
    -----
    Lookups have the bits of the collection's; see `qembag.interop.fbgemm.from_module` for means of float rows.
    Features, pooling and, for a collection that remaps identifiers, what they are remapped to are not part of a table.
    """
    if is_quantized(module):
        (folder,) = (COLLECTIONS[name] for name in COLLECTIONS if has_class(module, QUANTIZED, name))
        found: dict[str, QuantizedTable | FloatTable] = {}
        for operator in module._emb_modules:
            found |= {f"{folder}.{name}": table for name, table in fbgemm.from_module(operator).items()}
        return found
    for name, folder in COLLECTIONS.items():
        if has_class(module, "torchrec.modules", name):
            return {f"{folder}.{name}": from_embedding(inner) for name, inner in getattr(module, folder).items()}
    raise TypeError(f"module must be torchrec's {' or '.join(COLLECTIONS)}, got {full_name(module)}")


def collection_from_module(module: Any) -> EmbeddingBagCollection | EmbeddingCollection:
    """The collection of ours that a TorchRec collection is: features, pooling, and their order in the output.

    Parameters
    ----------
    module : torchrec's EmbeddingBagCollection or EmbeddingCollection
        As for `from_module`; not a subclass, which may change what it looks up.

    Returns
    -------
    EmbeddingBagCollection or EmbeddingCollection
        Tables have TorchRec's names, ``t1``, and features those of its output, in its order: ``f``, or ``f@t1`` and
        ``f@t2`` for one that looks up in two tables. Called with a KeyedJaggedTensor, whose ``f`` serves both. Rows are
        the module's own memory.

    Raises
    ------
    TypeError, ValueError
        As `from_module`; TypeError also for a subclass; ValueError also if a table has a feature twice, or if outputs
        are of another type than float32, float16 and bfloat16.

    Notes
    -----
    Outputs have the bits of the module's, with the exceptions that `from_module` names; a module of floats rounds
    those of float16 rows to float16 first. Weights that the input has are used, also where the module ignores them.
    TorchRec's EmbeddingCollection loses an output if a feature's two tables are of different types; ours has both.

    Examples
    --------
    >>> from qembag.interop.torchrec import collection_from_module
    >>> collection = collection_from_module(model.ebc)  # doctest: +SKIP
    >>> collection.split(collection(features))["user"]  # doctest: +SKIP
    """
    tables = from_module(module)
    if type(module).__name__ not in COLLECTIONS:
        raise TypeError(f"module must not be of a subclass, which may look up in another way, got {full_name(module)}")
    folder = COLLECTIONS[type(module).__name__]
    is_pooled = folder == "embedding_bags"
    if is_quantized(module):
        configs = [config for some in module._key_to_tables.values() for config in some]
        output = str(module.output_dtype()).removeprefix("torch.")
    else:
        configs = module.embedding_bag_configs() if is_pooled else module.embedding_configs()
        output = "float32"
    if output not in OUTPUTS:
        raise ValueError(f"module must have outputs of {', '.join(OUTPUTS)}, got {output}")
    uses = Counter(feature for config in configs for feature in config.feature_names)
    features, modes = {}, {}
    for config in configs:
        for feature in config.feature_names:
            name = feature if uses[feature] == 1 else f"{feature}@{config.name}"
            if name in features:
                raise ValueError(f"module must have each feature of a table once, got {name!r} twice")
            features[name] = config.name
            if is_pooled:
                modes[name] = config.pooling.value.lower()
    named = {config.name: tables[f"{folder}.{config.name}"] for config in configs}
    dtype = None if output == "float32" else output
    if is_pooled:
        return EmbeddingBagCollection(named, features, mode=modes, dtype=dtype)
    return EmbeddingCollection(named, features, dtype=dtype)


def to_split_tensors(table: QuantizedTable | FloatTable, *, exact: bool = True) -> dict[str, Any]:
    """What a quantized collection's state dict has for one table in split form.

    That is the form of a collection made with ``quant_state_dict_split_scale_bias=True``.

    Parameters
    ----------
    table : QuantizedTable or FloatTable
        Quantized, or float32 or float16.
    exact : bool
        False allows a loss, as for `qembag.interop.torch.to_packed`: TorchRec has scales and biases of float16 only.

    Returns
    -------
    dict
        ``weight``: bytes, uint8 of shape (num_embeddings, bytes), in torchrec's UInt4Tensor or UInt2Tensor at 4 and 2
        bits. ``weight_qscale`` and ``weight_qbias``: float16 of shape (num_embeddings, 1); not for a FloatTable.
        Pruned rows are rows of zeros.

    Raises
    ------
    TypeError
        If `table` is not a table.
    ValueError
        If `exact`, and something would be lost: says what. If the table is of bfloat16.
    ImportError
        If torch or, at 4 and 2 bits, torchrec is not installed.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> from qembag.interop.torchrec import to_split_tensors
    >>> table = qembag.quantize(np.eye(4, dtype=np.float32), bits=8, scale_dtype="float16")
    >>> {name: tuple(tensor.shape) for name, tensor in to_split_tensors(table).items()}  # doctest: +SKIP
    {'weight': (4, 4), 'weight_qscale': (4, 1), 'weight_qbias': (4, 1)}
    """
    checked, is_exact = exporting.table_to_export(table, exact)
    if isinstance(checked, FloatTable):
        return {"weight": tensor_of(exporting.logical_rows(checked, fbgemm.float_bytes(checked)))}
    packed, layout = exporting.rows_of_one_group(checked, np.float16, scale_first=True, exact=is_exact, target=TARGET)
    rows = exporting.logical_rows(checked, packed)
    pairs = layout.pairs(rows)[:, 0].astype(np.float16)
    return {
        "weight": _wrapped(layout.packed_codes(rows), checked.bits),
        "weight_qscale": tensor_of(pairs[:, :1].copy()),
        "weight_qbias": tensor_of(pairs[:, 1:].copy()),
    }


def to_weight(table: QuantizedTable | FloatTable, *, row_alignment: int = ROW_ALIGNMENT, exact: bool = True) -> Any:
    """What a quantized collection's state dict has for one table in its default form: whole rows.

    Parameters
    ----------
    table, exact
        As for `to_split_tensors`.
    row_alignment : int
        The collection's: row bytes are rounded up to a multiple of it.

    Returns
    -------
    torch.Tensor of uint8, shape (num_embeddings, row_bytes)
        In torchrec's UInt4Tensor or UInt2Tensor at 4 and 2 bits.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `to_split_tensors`.
    """
    checked, is_exact = exporting.table_to_export(table, exact)
    rows: NDArray[np.uint8]
    if isinstance(checked, FloatTable):
        rows = exporting.logical_rows(checked, fbgemm.float_bytes(checked))
        length, bits = fbgemm.rounded_up(rows.shape[1], row_alignment), 8
    else:
        packed, layout = exporting.rows_of_one_group(
            checked, np.float16, scale_first=True, exact=is_exact, target=TARGET
        )
        rows, bits = exporting.logical_rows(checked, packed), checked.bits
        length = aligned(bits, layout.dim, np.float16, True, None, row_alignment).row_bytes
    padded = np.zeros((len(rows), length), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return _wrapped(padded, bits)


def _wrapped(rows: NDArray[np.uint8], bits: int) -> Any:
    """A tensor as a state dict has it."""
    tensor = tensor_of(rows)
    if bits == 8:
        return tensor
    types = imported("torchrec.tensor_types", "torchrec")
    return types.UInt4Tensor(tensor) if bits == 4 else types.UInt2Tensor(tensor)
