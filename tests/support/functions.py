"""Every public function with all of its arguments, as it takes them."""

from __future__ import annotations

import atexit
import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import qembag
from qembag import ops
from support.layouts import NAMES, Layout, packed_rows, rows_of

DIM, NUM_ROWS = 8, 10
RNG = np.random.default_rng(20261122)
ROWS = {bits: packed_rows(RNG, NUM_ROWS, DIM, bits) for bits in (8, 4, 2)}
# Rows for all arguments of a table: pairs of the other type, before the codes, one for each 16 elements, some padding.
GROUPED = {bits: Layout(bits, "<f2" if bits == 8 else "<f4", True, 16, padding=3) for bits in ROWS}
GROUPED_DIM = 20
GROUPED_ROWS = {bits: rows_of(RNG, layout, NUM_ROWS, GROUPED_DIM) for bits, layout in GROUPED.items()}
INDICES = np.array([3, 1, 4, 1, 5, 9])
OFFSETS = np.array([0, 2, 2])
SAMPLE_WEIGHTS = np.linspace(-1, 2, 6).astype(np.float32)
MAPPING = np.array([5, 1, -1, 2, 3, 4, 0, 6, 9, 8], dtype=np.int32)
ROW_WEIGHTS = np.linspace(0, 3, NUM_ROWS).astype(np.float32)
FLOATS = RNG.normal(size=(3, DIM)).astype(np.float32)
FLOAT_ROWS = {"float32": RNG.normal(size=(NUM_ROWS, DIM)).astype(np.float32)}
FLOAT_ROWS["float16"] = FLOAT_ROWS["float32"].astype(np.float16)
FLOAT_ROWS["bfloat16"] = (FLOAT_ROWS["float32"].view(np.uint32) >> 16).astype(np.uint16)
BOUNDS = np.tile(np.float32([-1, 1]), (3, 1))
CODES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4

# Lives as long as this module.
FOLDER = tempfile.TemporaryDirectory(prefix="qembag-functions-")
atexit.register(FOLDER.cleanup)
OPENED, SAVED = Path(FOLDER.name, "opened.safetensors"), Path(FOLDER.name, "saved.safetensors")
COLLECTED = Path(FOLDER.name, "collected.safetensors")

Call = tuple[Any, dict[str, Any]]


def table(bits: int = 8) -> qembag.QuantizedTable:
    more = {"compressed_indices_mapping": MAPPING.copy(), "row_weights": ROW_WEIGHTS.copy()}
    return qembag.QuantizedTable(ROWS[bits].copy(), bits, **more)


def float_table(kind: str) -> qembag.FloatTable:
    more = {"compressed_indices_mapping": MAPPING.copy(), "row_weights": ROW_WEIGHTS.copy()}
    return qembag.FloatTable(FLOAT_ROWS[kind].copy(), dtype=kind, **more)


def of_bags(**more: Any) -> dict[str, Any]:
    return {"indices": INDICES.copy(), "offsets": OFFSETS.copy(), "per_sample_weights": SAMPLE_WEIGHTS.copy(), **more}


def of_public_bags(**more: Any) -> dict[str, Any]:
    """What only `embedding_bag` takes, too."""
    given = {"lengths": None, "mode": "sum", "padding_idx": -9, "include_last_offset": False, "invalid": "raise"}
    return of_bags(**given, out=out(3), dtype=np.float32, num_threads=1) | more


def out(num_rows: int) -> np.ndarray:
    return np.zeros((num_rows, DIM), np.float32)


def of_compare(bits: int) -> dict[str, Any]:
    ways = {"bits": bits, "methods": "lsq", "group_sizes": None, "bags": np.array([[0, 1], [2, 2]])}
    given = {"sample": 3, "tensor": None, "name": "rows", "num_threads": 1, "seed": 0, "progress": False}
    return {"weights": FLOATS.copy(), **ways, **given}


def of_choose_rows() -> dict[str, Any]:
    limits = {"min_norm": 0.5, "min_count": 1, "max_rows": 5, "max_bytes": 1000}
    return {**limits, "counts": np.arange(NUM_ROWS)}


def of_the_package(bits: int) -> dict[str, Call]:
    """The package's own functions, with a table of this width where one is taken."""
    kind, one = {"dtype": np.float32}, {"num_threads": 1}
    bags = of_public_bags()
    mapping = {"compressed_indices_mapping": MAPPING.copy(), "row_weights": ROW_WEIGHTS.copy()}
    to = {"scale_dtype": None, "scale_first": False, "group_size": None, "row_alignment": 1}
    method = {"method": "lsq", "importance": np.linspace(0, 1, DIM)}
    of_the_file = {"tensors": None, "name": "a", "metadata": {"b": "c"}, "progress": False, "resume": False}
    per_channel = {"codes": CODES, "scales": np.ones(3), "zero_points": np.zeros(3), "bits": bits}
    return {
        "embedding_bag": (qembag.embedding_bag, {"table": table(bits), **bags}),
        "embedding": (
            qembag.embedding,
            {"table": table(bits), "indices": INDICES.copy(), "invalid": "raise", "out": out(6), **kind, **one},
        ),
        "quantize": (qembag.quantize, {"weights": FLOATS.copy(), "bits": bits, **method, **to, **one}),
        # A file in the working folder: `test_hostile` has one for each test.
        "quantize_to_file": (
            qembag.quantize_to_file,
            {"source": FLOATS.copy(), "path": "made", "bits": bits, **method, **to, **one, **of_the_file},
        ),
        "compare": (qembag.compare, of_compare(bits)),
        "choose_rows": (qembag.choose_rows, {"table": table(bits), **of_choose_rows()}),
        "QuantizedTable": (
            qembag.QuantizedTable,
            {
                "data": GROUPED_ROWS[bits].copy(),
                "bits": bits,
                "dim": GROUPED_DIM,
                **GROUPED[bits].keywords(),
                **mapping,
            },
        ),
        "QuantizedTable.to_layout": (table(bits).to_layout, to),
        "QuantizedTable.update": (
            table(bits).update,
            {"rows": np.array([4, 0, 3]), "weights": FLOATS.copy(), **method, "num_threads": 1},
        ),
        "QuantizedTable.dequantize": (table(bits).dequantize, {"rows": INDICES.copy(), "out": out(6)}),
        "QuantizedTable.prune": (table(bits).prune, {"keep": np.array([0, 3, 4])}),
        "QuantizedTable.apply_row_weights": (table(bits).apply_row_weights, {}),
        "QuantizedTable.__getitem__": (table(bits).__getitem__, {"item": np.array([0, -3, 4])}),
        "QuantizedTable.__array__": (table(bits).__array__, {"dtype": np.float64, "copy": True}),
        "QuantizedTable.save": (table(bits).save, {"path": SAVED, "name": "a", "metadata": {"b": "c"}}),
        "QuantizedTable.prefault": (table(bits).prefault, {"progress": False}),
        "set_num_threads": (qembag.set_num_threads, {"n": 1}),
        "get_num_threads": (qembag.get_num_threads, {}),
        "show_config": (qembag.show_config, {}),
        "embedding_bag_prepack": (ops.embedding_bag_prepack, per_channel),
        "embedding_bag_unpack": (ops.embedding_bag_unpack, {"packed": ops.embedding_bag_prepack(**per_channel)}),
    }


def of_floats(kind: str) -> dict[str, Call]:
    """The package's own functions with a table of floats, or a plain array of them."""
    made = float_table(kind)
    single = {"indices": INDICES.copy(), "out": out(6), "dtype": np.float32, "num_threads": 1}
    lengths = {"offsets": None, "lengths": np.array([2, 0, 4]), "mode": "average", "invalid": "skip"}
    calls: dict[str, Call] = {
        "FloatTable": (
            qembag.FloatTable,
            {
                "data": FLOAT_ROWS[kind].copy(),
                "dtype": kind,
                "compressed_indices_mapping": MAPPING.copy(),
                "row_weights": ROW_WEIGHTS.copy(),
            },
        ),
        "embedding_bag": (qembag.embedding_bag, {"table": float_table(kind), **of_public_bags()}),
        "embedding_bag of lengths": (qembag.embedding_bag, {"table": float_table(kind), **of_public_bags(**lengths)}),
        "embedding": (qembag.embedding, {"table": float_table(kind), "invalid": "skip", **single}),
        "FloatTable.dequantize": (made.dequantize, {"rows": INDICES.copy(), "out": out(6)}),
        "FloatTable.prune": (made.prune, {"keep": np.array([0, 3, 4])}),
        "FloatTable.save": (made.save, {"path": SAVED, "name": "a", "metadata": None}),
        "FloatTable.prefault": (made.prefault, {"progress": False}),
        "FloatTable.apply_row_weights": (made.apply_row_weights, {}),
        "FloatTable.__getitem__": (made.__getitem__, {"item": np.array([0, -3, 4])}),
        "FloatTable.__array__": (made.__array__, {"dtype": np.float64, "copy": True}),
    }
    if kind != "bfloat16":  # of which a plain array is one of uint16, which is no table
        array = {"table": FLOAT_ROWS[kind].copy()}
        calls["embedding_bag of an array"] = qembag.embedding_bag, {**array, **of_public_bags()}
        calls["embedding of an array"] = qembag.embedding, {**array, "invalid": "raise", **single}
    return calls


def of_the_reference(bits: int) -> dict[str, Call]:
    """The reference's operators of this width."""
    stem, rows = f"embedding_bag_{NAMES[bits]}", ROWS[bits].copy()
    pruned = {"pruned_weights": True, "compressed_indices_mapping": MAPPING.copy()}
    bags = of_bags(scale_grad_by_freq=False, mode=0, include_last_offset=False, **pruned)
    given: dict[str, dict[str, Any]] = {
        stem: {"weight": table(bits), **bags, "out": out(3)},
        f"{stem}_rowwise_offsets": {"weight": rows, **bags, "out": out(3)},
        f"{stem}_rowwise_offsets_meta": {"weight": rows, **bags},
        f"embedding_{NAMES[bits]}": {"weight": table(bits), "indices": INDICES.copy(), "pruned_weights": True},
        f"{stem}_unpack": {"weight": rows},
        f"{stem}_unpack_meta": {"weight": rows},
    }
    options = {} if bits == 8 else {"optimized_qparams": False, "nbins": 200, "ratio": 0.16}
    bounds = {"rowwise_min_max": BOUNDS.copy()}
    for suffix, more in (("prepack", {}), ("prepack_meta", {}), ("prepack_with_rowwise_min_max", bounds)):
        given[f"{stem}_{suffix}"] = {"weight": FLOATS.copy(), **more, **options}
    return {name: (getattr(ops, name), arguments) for name, arguments in given.items()}


def collected() -> dict[str, Any]:
    """Tables of a collection: codes, floats, and a plain array."""
    return {"a": table(), "b": float_table("float16"), "c": FLOAT_ROWS["float32"].copy()}


def of_collections() -> dict[str, Call]:
    """Both kinds of collections: with the indices of one feature after the other, and by feature."""
    features = {"a": "a", "b": "b", "c": "c"}
    kind = {"tables": collected(), "features": features, "dtype": np.float32, "invalid": {"b": "skip"}}
    options = {"mode": {"a": "mean"}, "padding_idx": {"c": -9}}
    bags, rows = qembag.EmbeddingBagCollection(**kind, **options), qembag.EmbeddingCollection(**kind)
    bags.save(COLLECTED)
    from_file = {name: value for name, value in kind.items() if name != "tables"} | {"names": None, "mmap": False}
    flat = {"indices": INDICES.copy(), "offsets": np.array([0, 1, 2, 2, 4, 5, 6]), "lengths": None, "num_threads": 1}
    pairs = {"indices": dict.fromkeys(features, (INDICES.copy(), np.array([0, 2, 6]))), "offsets": None}
    weights = dict.fromkeys(features, SAMPLE_WEIGHTS.copy())
    outs = {feature: out(count) for feature, count in zip(features, (2, 2, 2), strict=True)}
    whole = {"per_sample_weights": SAMPLE_WEIGHTS.copy(), "out": np.zeros((2, 3 * DIM), np.float32), "as_dict": False}
    return {
        "EmbeddingBagCollection": (qembag.EmbeddingBagCollection, {**kind, **options}),
        "EmbeddingCollection": (qembag.EmbeddingCollection, kind),
        "EmbeddingBagCollection.__call__": (bags.__call__, {**flat, **whole}),
        "EmbeddingBagCollection.__call__ by lengths": (
            bags.__call__,
            {**flat, **whole, "offsets": None, "lengths": np.array([1, 1, 0, 2, 1, 1])},
        ),
        "EmbeddingBagCollection.__call__ by feature": (
            bags.__call__,
            {**flat, **whole, **pairs, "per_sample_weights": weights, "out": outs},
        ),
        "EmbeddingBagCollection.split": (bags.split, {"output": np.zeros((2, 3 * DIM), np.float32)}),
        "EmbeddingBagCollection.save": (bags.save, {"path": SAVED}),
        "EmbeddingBagCollection.from_file": (
            qembag.EmbeddingBagCollection.from_file,
            {"path": COLLECTED, **from_file, **options},
        ),
        "EmbeddingCollection.save": (rows.save, {"path": SAVED}),
        "EmbeddingCollection.from_file": (qembag.EmbeddingCollection.from_file, {"path": COLLECTED, **from_file}),
        "EmbeddingCollection.__call__": (rows.__call__, {**flat, "out": {name: out(2) for name in features}}),
    }


def of_files() -> dict[str, Call]:
    """The functions for files, with one that is there."""
    index = SAVED.with_suffix(".index.json")
    tables = {"tables": {"a": table(), "b": float_table("float16")}}
    qembag.save_tables(OPENED, **tables)
    return {
        "save_tables": (
            qembag.save_tables,
            {"path": index, **tables, "metadata": {"b": "c"}, "max_shard_bytes": 1000},
        ),
        "open_tables": (qembag.open_tables, {"path": OPENED, "mmap": True, "populate": False, "progress": False}),
        "load_tables": (
            qembag.load_tables,
            {"path": OPENED, "format": "qembag", "bits": {"a": 8}, "dims": {"a": DIM}, "names": ["a"], "mmap": True},
        ),
        "open_table": (qembag.open_table, {"path": OPENED, "name": "a", "mmap": False, "populate": True}),
    }


def of_engines() -> dict[str, Call]:
    """A scorer of the collection that is saved, where what it needs is installed. `test_engines.py` has data frames."""
    try:
        import pyarrow as pa

        from qembag.engines import Scorer
    except ImportError:
        return {}
    options = {"mode": {"a": "mean"}, "padding_idx": {"c": -9}, "invalid": {"b": "skip"}, "dtype": np.float32}
    columns = {"columns": {"c": "a"}, "weights": {"a": "w"}, "output": "v", "row_id": ("w", "a"), "reasons": "why"}
    of_a_batch = {"list_size": "fixed", "errors": "null", "num_threads": 1, "names": ["a", "b", "c"]}
    scorer = Scorer(COLLECTED, columns={"b": "a", "c": "a"})
    batch = pa.table({"a": [[1, 2], None]})

    def map_arrow(batches: Any) -> list[Any]:
        return list(scorer.map_arrow(batches))

    return {
        "Scorer": (
            Scorer,
            {"path": COLLECTED, "features": {"a": "a", "b": "b", "c": "c"}, **options, **columns, **of_a_batch},
        ),
        "Scorer.__call__": (scorer.__call__, {"batch": batch}),
        "Scorer.map_arrow": (map_arrow, {"batches": batch.to_batches()}),
    }


# The package's own functions at 8 bits by their names, and at the other widths by those with the width behind.
CALLS = of_the_package(8)
for width in NAMES:
    CALLS |= of_the_reference(width)
    if width != 8:
        CALLS |= {f"{name}, {width} bits": call for name, call in of_the_package(width).items() if call[1]}
CALLS |= {name: call for name, call in of_floats("float32").items() if name not in CALLS}
for float_kind in FLOAT_ROWS:
    CALLS |= {f"{name}, {float_kind}": call for name, call in of_floats(float_kind).items()}
CALLS |= of_collections()
CALLS |= of_files()
CALLS |= of_engines()
EVERY_ARGUMENT = [(function, argument) for function, (_, given) in CALLS.items() for argument in given]


def good_call(function: str) -> Call:
    """Of a function, with copies of its arguments."""
    call, given = CALLS[function]
    return call, copy.deepcopy(given)
