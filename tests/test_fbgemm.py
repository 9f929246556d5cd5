"""Live differential tests: the rows of FBGEMM's table-batched operator and of TorchRec, where they lie, give their bits.

Needs `pip install fbgemm-gpu-cpu==1.8.0` beside torch 2.13.0; the last tests also torchrec 1.9.2, installed without its
dependency on fbgemm-gpu.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import qembag
import reference
from qembag import QuantizedTable
from support.floats import full_range, rows_of
from support.layouts import bag_offsets

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fbgemm_gpu", reason="fbgemm_gpu is not installed (pip install fbgemm-gpu-cpu==1.8.0)")
    from support.fbgemm import FbgemmFloats, FbgemmTable

DIMS = [*range(2, 42), 48, 52, 60, 63, 64, 65, 68, 72, 96, 100, 127, 128, 132, 160, 200, 250, 252, 255, 256, 260, 300]
NUM_ROWS = 40
# A mode, whether there are weights, the output's type, and how rows are pruned: by a map, or by an index of -1.
VARIANTS = list(itertools.product(["sum", "mean"], [False, True], [np.float32, np.float16], [None, "map", "-1"]))
# As many tables that FBGEMM makes as a test can wait for; over all dims each variant comes often.
VARIANTS_OF_A_DIM = 6


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def our_table(theirs: FbgemmTable, mapping: np.ndarray | None = None) -> QuantizedTable:
    return QuantizedTable(
        theirs.rows,
        theirs.bits,
        dim=theirs.dim,
        scale_dtype=np.float16,
        scale_first=True,
        compressed_indices_mapping=mapping,
    )


def cases(bits: int, alignment: int) -> Iterator[tuple[FbgemmTable, np.ndarray, dict[str, Any]]]:
    """Tables of FBGEMM's, the bags that they gave, and the arguments that must give the same."""
    for dim in DIMS:
        if dim % (8 // bits):
            continue
        for number in range(VARIANTS_OF_A_DIM):
            rng = np.random.default_rng([bits, alignment, dim, number])
            mode, is_weighted, dtype, pruned = VARIANTS[(dim * 5 + number * 7) % len(VARIANTS)]
            mapping = rng.integers(-1, NUM_ROWS, 70).astype(np.int32) if pruned == "map" else None
            index_type = (np.int32, np.int64)[rng.integers(2)]
            table = FbgemmTable(
                bits, dim, NUM_ROWS, alignment=alignment, mode=mode, dtype=dtype, index_type=index_type, mapping=mapping
            )
            rows = table.fill(rng, extremes=number == 0)
            if number == 0:
                table.layout.set_pairs(rows[:2], np.array([[np.nan, 1], [1, np.nan]]), dim)
            ends = bag_offsets(rng, 8, 7)
            indices = rng.integers(0, NUM_ROWS if mapping is None else len(mapping), ends[-1])
            given = {"mode": mode, "mapping": mapping, "indices": indices.astype(index_type), "dtype": dtype}
            if pruned == "-1":
                # What FBGEMM counts and does not add is a pruned row.
                is_pruned = rng.random(len(indices)) < 0.3
                indices[is_pruned] = -1
                given["mapping"] = np.append(np.arange(NUM_ROWS), -1).astype(np.int32)
                given["indices"] = np.where(is_pruned, NUM_ROWS, indices).astype(index_type)
            weights = rng.normal(size=len(indices)).astype(np.float32) if is_weighted else None
            yield table, table(indices, ends, weights), {**given, "ends": ends.astype(index_type), "weights": weights}


@pytest.mark.parametrize("alignment", [1, 16])
def test_bags_are_fbgemms_in_every_bit(level, bits, alignment, same_bits):
    for theirs, expected, given in cases(bits, alignment):
        table = our_table(theirs, given["mapping"])
        assert np.shares_memory(table.data, theirs.rows)
        ours = qembag.embedding_bag(
            table,
            given["indices"],
            given["ends"],
            mode=given["mode"],
            per_sample_weights=given["weights"],
            include_last_offset=True,
            dtype=given["dtype"],
        )
        same_bits(ours, expected)


@pytest.mark.parametrize("alignment", [1, 16])
def test_the_oracle_says_what_fbgemm_says(bits, alignment, same_bits):
    for theirs, expected, given in cases(bits, alignment):
        says = reference.embedding_bag(
            theirs.rows, bits, theirs.dim, given["indices"], given["ends"], mode=given["mode"],
            weights=given["weights"], mapping=given["mapping"], include_last_offset=True,
            half=given["dtype"] == np.float16, **theirs.layout.reading(),
        )  # fmt: skip
        same_bits(says, expected)


def test_large_lookups_are_fbgemms_at_every_thread_count(level, threads, bits, rng, same_bits):
    theirs = FbgemmTable(bits, 96, 1000, alignment=16)
    theirs.fill(rng)
    ends = bag_offsets(rng, 3000, 9)
    indices = rng.integers(0, 1000, ends[-1])
    ours = qembag.embedding_bag(our_table(theirs), indices, ends, include_last_offset=True)
    same_bits(ours, theirs(indices, ends))


def test_a_table_reads_fbgemms_memory_as_it_is_now(bits, rng, same_bits):
    theirs = FbgemmTable(bits, 32, NUM_ROWS, alignment=16)
    table = our_table(theirs)
    bags = np.arange(NUM_ROWS), np.arange(NUM_ROWS + 1)
    for _ in range(2):
        theirs.fill(rng)
        same_bits(qembag.embedding(table, bags[0]), theirs(*bags))


# ---- Rows of floats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("alignment", [1, 16])
def test_sums_of_floats_are_fbgemms_in_every_bit(level, kind, alignment, same_bits):
    """Weighted and not, of either output and type of index; the rows are FBGEMM's own memory."""
    variants = list(itertools.product([False, True], [np.float32, np.float16], [np.int32, np.int64]))
    for number, dim in enumerate(DIMS):
        rng = np.random.default_rng([alignment, dim])
        for is_weighted, dtype, index_type in variants[number % 3 :: 3]:
            theirs = FbgemmFloats(kind, dim, NUM_ROWS, alignment=alignment, dtype=dtype, index_type=index_type)
            make = full_range if number // 3 % 2 else rows_of
            theirs.rows[...] = make(rng, np.dtype(kind).name, NUM_ROWS, dim)
            ends = bag_offsets(rng, 8, 7)
            indices = rng.integers(0, NUM_ROWS, ends[-1])
            weights = rng.normal(size=len(indices)).astype(np.float32) if is_weighted else None
            expected = theirs(indices, ends, weights)
            table = qembag.FloatTable(theirs.rows)
            assert np.shares_memory(table.data, theirs.bytes)
            for rows in (table, theirs.rows):
                ours = qembag.embedding_bag(
                    rows, indices.astype(index_type), ends.astype(index_type), include_last_offset=True,
                    per_sample_weights=weights, dtype=dtype,
                )  # fmt: skip
                same_bits(ours, expected)
            says = reference.float_embedding_bag(
                theirs.rows, indices, ends, include_last_offset=True, weights=weights, half=dtype == np.float16
            )
            same_bits(says, expected)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_large_sums_of_floats_are_fbgemms_at_every_thread_count(level, threads, kind, rng, same_bits):
    theirs = FbgemmFloats(kind, 96, 1000)
    theirs.rows[...] = full_range(rng, np.dtype(kind).name, 1000, 96)
    ends = bag_offsets(rng, 3000, 9)
    indices = rng.integers(0, 1000, ends[-1])
    ours = qembag.embedding_bag(theirs.rows, indices, ends, include_last_offset=True)
    same_bits(ours, theirs(indices, ends))


# ---- TorchRec ----------------------------------------------------------------------------------------------------------


def torchrec_bags(bits: int, dim: int, mean: bool, is_weighted: bool, weights: np.ndarray) -> Any:
    """A quantized EmbeddingBagCollection of one table of these weights."""
    pytest.importorskip("torchrec", reason="no torchrec 1.9.2, which pip gets only with --no-deps")
    from torchrec.inference.modules import quantize_embeddings
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    pooling = PoolingType.MEAN if mean else PoolingType.SUM
    config = EmbeddingBagConfig(
        name="t", embedding_dim=dim, num_embeddings=len(weights), feature_names=["f"], pooling=pooling
    )
    bags = EmbeddingBagCollection(tables=[config], is_weighted=is_weighted)
    bags.load_state_dict({"embedding_bags.t.weight": torch.from_numpy(weights)})
    kind = {8: torch.qint8, 4: torch.quint4x2}[bits]
    module = torch.nn.Sequential(bags)
    return quantize_embeddings(module, dtype=kind, inplace=True, output_dtype=torch.float32)[0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [4, 20, 64, 100])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_bags_of_torchrecs_saved_rows_are_its_own(bits, dim, mean, is_weighted, rng, same_bits):
    module = torchrec_bags(bits, dim, mean, is_weighted, rng.normal(size=(NUM_ROWS, dim)).astype(np.float32))
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    ends = bag_offsets(rng, 9, 7)
    indices, weights = rng.integers(0, NUM_ROWS, ends[-1]), None
    if is_weighted:
        weights = rng.normal(size=ends[-1]).astype(np.float32)
    given = KeyedJaggedTensor(
        keys=["f"],
        values=torch.from_numpy(indices),
        lengths=torch.from_numpy(np.diff(ends)),
        weights=None if weights is None else torch.from_numpy(weights),
    )
    theirs = module(given).values().numpy()
    (saved,) = module.state_dict().values()
    rows = (saved if type(saved) is torch.Tensor else saved.elem).numpy()
    assert rows.shape[1] % 16 == 0
    table = QuantizedTable(rows, bits, dim=dim, scale_dtype=np.float16, scale_first=True)
    ours = qembag.embedding_bag(
        table,
        indices,
        ends,
        mode="mean" if mean else "sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )
    same_bits(ours, theirs)
