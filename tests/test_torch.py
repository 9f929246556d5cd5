"""Live differential tests: what PyTorch 2.13.0 answers right, qembag answers with the same bits."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import qembag
from qembag import ops
from support import levels
from support.arrays import same_rows
from support.layouts import LAYOUTS, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

CODES_PER_BYTE = {8: 1, 4: 2, 2: 4}
INTEGERS = [np.int32, np.int64]
# Enough elements in a call for the kernels to take a second thread.
PARALLEL_WORK = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _the_reference() -> None:
    if not torch.__version__.startswith("2.13.0"):
        pytest.skip(f"the reference is torch 2.13.0, got {torch.__version__}")


def tensor(array: np.ndarray | None) -> Any:
    return None if array is None else torch.from_numpy(array)


def torch_operator(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.quantized, name)


def torch_bags(
    bits: int,
    rows: Any,
    indices: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    weights: np.ndarray | None = None,
    mapping: np.ndarray | None = None,
    include_last_offset: bool = False,
    name: str = "embedding_bag_{}_rowwise_offsets",
) -> np.ndarray:
    result = torch_operator(name.format(NAMES[bits]))(
        tensor(rows) if isinstance(rows, np.ndarray) else rows,
        tensor(indices),
        tensor(offsets),
        False,
        0,
        mapping is not None,
        tensor(weights),
        tensor(mapping),
        include_last_offset,
    )
    return result.numpy()


def our_bags(
    bits: int,
    rows: Any,
    indices: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    weights: np.ndarray | None = None,
    mapping: np.ndarray | None = None,
    include_last_offset: bool = False,
    name: str = "embedding_bag_{}_rowwise_offsets",
    out: np.ndarray | None = None,
) -> np.ndarray:
    return getattr(ops, name.format(NAMES[bits]))(
        rows, indices, offsets, False, 0, mapping is not None, weights, mapping, include_last_offset, out=out
    )


@pytest.fixture
def check_bags(same_bits: Callable[[Any, Any], None]) -> Callable[..., int]:
    """Our operator, with and without `out`, and our public function, against torch's; how many elements there were."""

    def check(
        bits: int, rows: np.ndarray, indices: np.ndarray, offsets: np.ndarray | None = None, **options: Any
    ) -> int:
        theirs = torch_bags(bits, rows, indices, offsets, **options)
        same_bits(our_bags(bits, rows, indices, offsets, **options), theirs)
        out = np.full(theirs.shape, np.float32(np.nan))
        assert our_bags(bits, rows, indices, offsets, **options, out=out) is out
        same_bits(out, theirs)
        table = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=options.get("mapping"))
        public = qembag.embedding_bag(
            table,
            indices,
            offsets,
            per_sample_weights=options.get("weights"),
            include_last_offset=options.get("include_last_offset", False),
        )
        same_bits(public, theirs)
        return theirs.size

    return check


def pruning_map(rng: np.random.Generator, num_embeddings: int, num_rows: int) -> np.ndarray:
    """About half of the logical rows are pruned, the others lie anywhere in the table."""
    mapping = rng.integers(0, num_rows, num_embeddings).astype(np.int32)
    mapping[rng.random(num_embeddings) < 0.5] = -1
    return mapping


def weight_types(bits: int) -> list[type]:
    return [np.float32] if bits == 8 else [np.float32, np.float16]


def variants(
    rng: np.random.Generator, bits: int, rows: np.ndarray, ends: np.ndarray, index_type: type, offset_type: type
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The same bags plain, weighted, pruned, both, with the last offset given, and two-dimensional."""
    num_rows = len(rows)
    num_embeddings = 2 * num_rows
    indices = rng.integers(0, num_rows, ends[-1]).astype(index_type)
    logical = rng.integers(0, num_embeddings, ends[-1]).astype(index_type)
    starts = ends[:-1].astype(offset_type)
    ends = ends.astype(offset_type)
    mapping = pruning_map(rng, num_embeddings, num_rows)
    yield (indices, starts), {}
    yield (indices, ends), {"include_last_offset": True}
    for kind in weight_types(bits):
        weights = rng.normal(size=len(indices)).astype(kind)
        yield (indices, starts), {"weights": weights}
        yield (logical, ends), {"weights": weights, "mapping": mapping, "include_last_offset": True}
    yield (logical, starts), {"mapping": mapping}
    yield (indices, starts), {"mapping": np.zeros(1, dtype=np.int32)}
    square = rng.integers(0, num_rows, (7, 5)).astype(index_type)
    yield (square,), {}
    for kind in weight_types(bits):
        yield (square,), {"weights": rng.normal(size=square.shape).astype(kind)}
    yield (rng.integers(0, num_embeddings, (5, 9)).astype(index_type),), {"mapping": mapping}


# ---- Bags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extremes", [False, True], ids=["usual", "extreme"])
def test_sums_at_every_level_and_small_dim_are_torchs(
    level: str,
    bits: int,
    extremes: bool,
    rng: np.random.Generator,
    packed_rows: Callable[..., np.ndarray],
    bag_offsets: Callable[..., np.ndarray],
    check_bags: Callable[..., int],
) -> None:
    per_byte = CODES_PER_BYTE[bits]
    for dim in range(per_byte, max(41, 12 * per_byte + 1), per_byte):
        rows = packed_rows(rng, 23, dim, bits, extremes)
        pair = dim // per_byte % 4
        for arguments, options in variants(
            rng, bits, rows, bag_offsets(rng, 9, 6), INTEGERS[pair & 1], INTEGERS[pair >> 1]
        ):
            check_bags(bits, rows, *arguments, **options)


@pytest.mark.parametrize("dim", [44, 48, 52, 64, 68, 96, 100, 128, 132, 200, 252, 256, 300, 384, 508, 512, 1000, 3000])
def test_sums_at_every_level_and_large_dim_are_torchs(
    level: str,
    bits: int,
    dim: int,
    rng: np.random.Generator,
    packed_rows: Callable[..., np.ndarray],
    bag_offsets: Callable[..., np.ndarray],
    check_bags: Callable[..., int],
) -> None:
    rows = packed_rows(rng, 40, dim, bits, extremes=dim % 3 == 0)
    for arguments, options in variants(rng, bits, rows, bag_offsets(rng, 8, 20), np.int64, np.int64):
        check_bags(bits, rows, *arguments, **options)


@pytest.mark.parametrize("index_type", INTEGERS)
@pytest.mark.parametrize("offset_type", INTEGERS)
def test_every_pair_of_index_and_offset_types_gives_torchs_sums(
    level: str,
    bits: int,
    index_type: type,
    offset_type: type,
    rng: np.random.Generator,
    packed_rows: Callable[..., np.ndarray],
    bag_offsets: Callable[..., np.ndarray],
    check_bags: Callable[..., int],
) -> None:
    for dim in (4, 36, 128):
        rows = packed_rows(rng, 31, dim, bits)
        for arguments, options in variants(rng, bits, rows, bag_offsets(rng, 12, 8), index_type, offset_type):
            check_bags(bits, rows, *arguments, **options)


@pytest.mark.parametrize("dim", [4, 36, 64, 300])
def test_sums_at_every_thread_count_are_torchs(
    level: str,
    threads: int,
    bits: int,
    dim: int,
    rng: np.random.Generator,
    packed_rows: Callable[..., np.ndarray],
    bag_offsets: Callable[..., np.ndarray],
    check_bags: Callable[..., int],
) -> None:
    rows = packed_rows(rng, 500, dim, bits, extremes=True)
    ends = bag_offsets(rng, PARALLEL_WORK // (dim + 64) // 6, 18)
    assert ends[-1] * (dim + 64) > PARALLEL_WORK / 2
    for arguments, options in variants(rng, bits, rows, ends, np.int32, np.int64):
        check_bags(bits, rows, *arguments, **options)


def test_no_bags_empty_bags_and_tables_without_rows_give_torchs_answer(
    level: str,
    bits: int,
    rng: np.random.Generator,
    packed_rows: Callable[..., np.ndarray],
    check_bags: Callable[..., int],
) -> None:
    rows = packed_rows(rng, 5, 16, bits)
    nothing = np.empty(0, dtype=np.int64)
    check_bags(bits, rows, nothing, np.zeros(3, dtype=np.int64))
    check_bags(bits, rows, nothing, np.zeros(3, dtype=np.int32), include_last_offset=True)
    check_bags(bits, rows, np.arange(5), np.array([0, 5, 5, 5]))
    check_bags(bits, packed_rows(rng, 0, 16, bits), nothing, np.zeros(2, dtype=np.int64))


def test_half_weights_at_8_bits_give_torchs_sums_of_the_same_weights_in_float32(
    level: str, rng: np.random.Generator, packed_rows: Callable[..., np.ndarray], same_bits: Callable[..., None]
) -> None:
    rows = packed_rows(rng, 30, 20, 8)
    indices = rng.integers(0, 30, 64)
    offsets = np.array([0, 10, 10, 40])
    weights = rng.normal(size=64).astype(np.float16)
    with pytest.raises(RuntimeError):
        torch_bags(8, rows, indices, offsets, weights=weights)
    theirs = torch_bags(8, rows, indices, offsets, weights=weights.astype(np.float32))
    same_bits(our_bags(8, rows, indices, offsets, weights=weights), theirs)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_pytorchs_own_grid_of_cases_gives_torchs_sums(
    level: str, bits: int, sparsity: float, rng: np.random.Generator, check_bags: Callable[..., int]
) -> None:
    multiple = 8 if bits == 2 else 4
    for case in range(48):
        num_embeddings = int(rng.integers(10, 101))
        dim = multiple * int(rng.integers(-(-5 // multiple), 50 // multiple + 1))
        include_last_offset, weighted, fallback = case & 1, case & 2, case & 4
        index_type, offset_type = INTEGERS[case >> 3 & 1], INTEGERS[case >> 4 & 1]
        values = (rng.random((num_embeddings, dim)) + 1).astype(np.float32)
        rows = torch_operator(f"embedding_bag_{NAMES[bits]}_prepack")(tensor(values)).numpy()
        lengths = rng.integers(0, 21, int(rng.integers(1, 6)))
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(offset_type)
        indices = rng.integers(0, num_embeddings, ends[-1]).astype(index_type)
        options: dict[str, Any] = {"include_last_offset": bool(include_last_offset)}
        if weighted and len(indices):
            options["weights"] = rng.uniform(0.01, 0.5, len(indices)).astype(np.float32)
        if sparsity and fallback:
            options["mapping"] = np.zeros(1, dtype=np.int32)
        elif sparsity:
            kept = rng.random(num_embeddings) >= sparsity
            kept[0] = True
            mapping = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
            rows, options["mapping"] = rows[kept], mapping
        check_bags(bits, rows, indices, ends if include_last_offset else ends[:-1].copy(), **options)


# ---- Packed objects ---------------------------------------------------------------------------------------------


def quantized_tensor(
    rng: np.random.Generator, bits: int, num_rows: int, dim: int
) -> tuple[Any, tuple[np.ndarray, ...]]:
    """A per-channel tensor of torch's, and its codes, scales and zero points."""
    values = rng.normal(size=(num_rows, dim)).astype(np.float32)
    low, high = values.min(axis=1), values.max(axis=1)
    scales = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(1e-3)).astype(np.float32)
    zero_points = (-low / scales).astype(np.float32)
    kind = torch.quint8 if bits == 8 else torch.quint4x2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        quantized = torch.quantize_per_channel(tensor(values), tensor(scales), tensor(zero_points), axis=0, dtype=kind)
    codes = quantized.int_repr().numpy()
    if bits == 4:
        pairs = codes.reshape(num_rows, -1)[:, : dim // 2]
        codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(num_rows, dim)
    return quantized, (codes, scales, zero_points)


def packed_pair(rng: np.random.Generator, bits: int, num_rows: int, dim: int) -> tuple[Any, qembag.QuantizedTable]:
    quantized, parts = quantized_tensor(rng, bits, num_rows, dim)
    return torch.ops.quantized.embedding_bag_prepack(quantized), ops.embedding_bag_prepack(*parts, bits)


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("dim", [4, 12, 20, 36, 64, 130, 300])
def test_bags_of_packed_tables_are_torchs(
    level: str,
    width: int,
    dim: int,
    rng: np.random.Generator,
    bag_offsets: Callable[..., np.ndarray],
    same_bits: Callable[..., None],
) -> None:
    theirs, ours = packed_pair(rng, width, 33, dim)
    name = "embedding_bag_{}"
    for arguments, options in variants(rng, width, ours.data, bag_offsets(rng, 9, 7), np.int64, np.int64):
        expected = torch_bags(width, theirs, *arguments, **options, name=name)
        same_bits(our_bags(width, ours, *arguments, **options, name=name), expected)
        out = np.full(expected.shape, np.float32(7))
        assert our_bags(width, ours, *arguments, **options, name=name, out=out) is out
        same_bits(out, expected)


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("index_type", INTEGERS)
def test_single_rows_of_packed_tables_are_torchs(
    level: str, width: int, index_type: type, rng: np.random.Generator, same_bits: Callable[..., None]
) -> None:
    name = f"embedding_{NAMES[width]}"
    for dim in (2, 8, 12, 20, 50, 64, 256):
        theirs, ours = packed_pair(rng, width, 21, dim)
        for shape in [(17,), (3, 4)]:
            indices = rng.integers(0, 21, shape).astype(index_type)
            expected = torch_operator(name)(theirs, tensor(indices)).numpy()
            same_bits(getattr(ops, name)(ours, indices), expected.reshape(*shape, dim))
            same_bits(getattr(ops, name)(ours, indices, pruned_weights=False), expected.reshape(*shape, dim))


@pytest.mark.parametrize("width", [8, 4])
def test_pruned_single_rows_which_torch_always_refuses_need_a_mapping_in_ours(
    width: int, rng: np.random.Generator
) -> None:
    theirs, ours = packed_pair(rng, width, 6, 8)
    name = f"embedding_{NAMES[width]}"
    with pytest.raises(RuntimeError):
        torch_operator(name)(theirs, tensor(np.arange(3)), pruned_weights=True)
    with pytest.raises(ValueError, match="compressed_indices_mapping must be given with pruned_weights=True, got None"):
        getattr(ops, name)(ours, np.arange(3), pruned_weights=True)


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("dim", [2, 8, 30, 64])
def test_unpacking_a_packed_table_returns_the_parts_that_torch_returns(
    width: int, dim: int, rng: np.random.Generator, same_bits: Callable[..., None]
) -> None:
    quantized, parts = quantized_tensor(rng, width, 13, dim)
    # The unpacked tensor's scales lie in the packed object, which has to outlive it.
    packed = torch.ops.quantized.embedding_bag_prepack(quantized)
    theirs = torch.ops.quantized.embedding_bag_unpack(packed)
    codes, scales, zero_points = ops.embedding_bag_unpack(ops.embedding_bag_prepack(*parts, width))
    same_bits(codes, parts[0])
    same_bits(scales, theirs.q_per_channel_scales().numpy().astype(np.float32))
    same_bits(zero_points, theirs.q_per_channel_zero_points().numpy().astype(np.float32))
    assert torch.equal(theirs.int_repr(), quantized.int_repr())


# ---- Prepack and unpack --------------------------------------------------------------------------------------------


def same_bytes(ours: np.ndarray, theirs: np.ndarray, bits: int) -> None:
    """Equal packed rows; a bias of zero may carry either sign, but no scale."""
    same_rows(ours, theirs, bits)
    scales = [LAYOUTS[bits].pairs(rows)[..., 0].view(f"u{4 if bits == 8 else 2}") for rows in (ours, theirs)]
    np.testing.assert_array_equal(*scales)


def float_rows(rng: np.random.Generator, num_rows: int, dim: int) -> np.ndarray:
    """Rows of every magnitude that a float16 tail can hold; some constant, some zero, some with few distinct values."""
    values = rng.normal(size=(num_rows, dim)) * 10.0 ** rng.integers(-6, 4, (num_rows, 1))
    values += rng.choice([0, 0, 1, -3, 100], (num_rows, 1))
    values[0] = 0
    values[1 % num_rows] = 0.1
    values[2 % num_rows] = -0.3
    values[3 % num_rows] = rng.choice([-1.0, 0.5, 2.0], dim)
    values[4 % num_rows] = rng.random(dim) * 1e-9
    return values.astype(np.float32)


def searchable(weights: np.ndarray) -> np.ndarray:
    """Which rows are constant, or so wide that a hundredth of a step shows in every value of theirs."""
    wide = weights.astype(np.float64)
    width = np.ptp(wide, axis=1)
    return (width == 0) | (width > 0.02 * np.abs(wide).max(axis=1))


DIMS = [4, 8, 12, 16, 20, 28, 32, 36, 60, 64, 68, 100, 128, 132, 256, 300]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_prepacked_bytes_are_torchs(level: str, bits: int, kind: type, rng: np.random.Generator) -> None:
    name = f"embedding_bag_{NAMES[bits]}_prepack"
    for dim in DIMS + list(range(CODES_PER_BYTE[bits], 41, CODES_PER_BYTE[bits])):
        weights = float_rows(rng, 40, dim).astype(kind)
        same_bytes(getattr(ops, name)(weights), torch_operator(name)(tensor(weights)).numpy(), bits)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize(
    "options", [(), (37, 0.33), (10, 0.5), (200, 0.5), (45, 0.1), (3, 0.9), (1, 0.16), (100, 0.0), (64, 1.0)]
)
@pytest.mark.parametrize("width", [4, 2])
def test_greedily_prepacked_bytes_are_torchs(
    level: str, width: int, kind: type, options: tuple[Any, ...], rng: np.random.Generator
) -> None:
    name = f"embedding_bag_{NAMES[width]}_prepack"
    for dim in (4, 8, 20, 32, 52, 100):
        weights = float_rows(rng, 40, dim).astype(kind)
        # The reference never returns from a row whose step is lost in rounding.
        weights = weights[searchable(weights)][:12]
        theirs = torch_operator(name)(tensor(weights), True, *options).numpy()
        same_bytes(getattr(ops, name)(weights, True, *options), theirs, width)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("spread", ["wider", "narrower"])
def test_bytes_prepacked_with_given_bounds_are_torchs(
    level: str, bits: int, kind: type, spread: str, rng: np.random.Generator
) -> None:
    if bits == 8 and spread == "narrower":
        pytest.skip("torch's 8-bit codes wrap around beyond the bounds; ours clamp")
    name = f"embedding_bag_{NAMES[bits]}_prepack_with_rowwise_min_max"
    for dim in (4, 12, 32, 100):
        weights = rng.normal(size=(30, dim)).astype(kind)
        low, high = weights.min(axis=1), weights.max(axis=1)
        margin = np.where(spread == "wider", 1, -0.2) * (high - low) * rng.random(30)
        bounds = np.stack([low - margin, high + margin], axis=1).astype(kind)
        theirs = torch_operator(name)(tensor(weights), tensor(bounds)).numpy()
        same_bytes(getattr(ops, name)(weights, bounds), theirs, bits)


@pytest.mark.parametrize("width", [4, 2])
def test_the_greedy_search_ignores_given_bounds_as_torchs_does(
    level: str, width: int, rng: np.random.Generator
) -> None:
    name = f"embedding_bag_{NAMES[width]}_prepack_with_rowwise_min_max"
    weights = rng.normal(size=(10, 24)).astype(np.float32)
    bounds = np.tile(np.float32([-9, 9]), (10, 1))
    theirs = torch_operator(name)(tensor(weights), tensor(bounds), True).numpy()
    same_bytes(getattr(ops, name)(weights, bounds, True), theirs, width)
    same_bytes(getattr(ops, name)(weights, bounds, optimized_qparams=True, nbins=37, ratio=0.33),
               torch_operator(name)(tensor(weights), tensor(bounds), True, 37, 0.33).numpy(), width)  # fmt: skip


def test_codes_beyond_given_bounds_clamp_where_torchs_wrap(level: str, rng: np.random.Generator) -> None:
    name = "embedding_bag_byte_prepack_with_rowwise_min_max"
    weights = rng.normal(size=(20, 16)).astype(np.float32)
    bounds = np.tile(np.float32([-0.5, 0.5]), (20, 1))
    theirs = torch_operator(name)(tensor(weights), tensor(bounds)).numpy()
    ours = getattr(ops, name)(weights, bounds)
    inside = np.abs(weights) <= 0.5
    np.testing.assert_array_equal(ours[:, :16][inside], theirs[:, :16][inside])
    assert (ours[:, :16][weights < -0.5] == 0).all()
    assert (ours[:, :16][weights > 0.5] == 255).all()
    np.testing.assert_array_equal(ours[:, 16:], theirs[:, 16:])


@pytest.mark.parametrize("shape", [(1,), (5,), (64,), (3, 5), (3, 5, 8), (2, 3, 4, 7), (0, 6), (3, 0, 6)])
def test_byte_prepack_and_unpack_of_any_shape_are_torchs(
    level: str, shape: tuple[int, ...], rng: np.random.Generator, same_bits: Callable[..., None]
) -> None:
    weights = rng.normal(size=shape).astype(np.float32)
    theirs = torch.ops.quantized.embedding_bag_byte_prepack(tensor(weights)).numpy()
    ours = ops.embedding_bag_byte_prepack(weights)
    same_bytes(ours, theirs, 8)
    same_bits(ops.embedding_bag_byte_unpack(ours), torch.ops.quantized.embedding_bag_byte_unpack(tensor(ours)).numpy())


@pytest.mark.parametrize("extremes", [False, True], ids=["usual", "extreme"])
def test_unpacked_values_are_torchs(
    level: str,
    bits: int,
    extremes: bool,
    rng: np.random.Generator,
    packed_rows: Callable[..., np.ndarray],
    same_bits: Callable[..., None],
) -> None:
    name = f"embedding_bag_{NAMES[bits]}_unpack"
    per_byte = CODES_PER_BYTE[bits]
    for dim in [*range(per_byte, 41, per_byte), 64, 100, 128, 300, 512, 1000]:
        rows = packed_rows(rng, 50, dim, bits, extremes)
        same_bits(getattr(ops, name)(rows), torch_operator(name)(tensor(rows)).numpy())


def test_strided_weights_prepack_to_torchs_bytes(level: str, bits: int, rng: np.random.Generator) -> None:
    name = f"embedding_bag_{NAMES[bits]}_prepack"
    whole = rng.normal(size=(24, 48)).astype(np.float32)
    for weights in (whole[::3], whole[:, 4:36], whole.T[:16, :16], whole[:, ::2][:, :20]):
        same_bytes(getattr(ops, name)(weights), torch_operator(name)(tensor(weights)).numpy(), bits)


# ---- Meta kernels -----------------------------------------------------------------------------------------------------


def on_meta(array: np.ndarray | None) -> Any:
    return None if array is None else tensor(array).to("meta")


def has_meta_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"quantized::{name}", "Meta")


def test_meta_shapes_are_those_of_torchs_meta_kernels(
    bits: int, rng: np.random.Generator, packed_rows: Callable[..., np.ndarray]
) -> None:
    """PyTorch 2.13.0 has Meta kernels at 8 bits only; at the others the operators themselves say what shape they return."""
    device = on_meta if bits == 8 else tensor
    rows = packed_rows(rng, 11, 24, bits)
    indices, offsets = np.arange(9), np.array([0, 3, 9])
    stem = f"embedding_bag_{NAMES[bits]}"
    name = f"{stem}_rowwise_offsets"
    assert has_meta_kernel(name) == (bits == 8)
    for include_last_offset in (False, True):
        theirs = torch_operator(name)(
            device(rows), device(indices), device(offsets), include_last_offset=include_last_offset
        )
        ours = getattr(ops, f"{name}_meta")(rows, indices, offsets, include_last_offset=include_last_offset)
        assert ours == (tuple(theirs.shape), np.dtype(np.float32))
        assert theirs.dtype == torch.float32
    values = rng.normal(size=(7, 16)).astype(np.float32)
    theirs = torch_operator(f"{stem}_prepack")(device(values))
    # The Meta kernel of byte_prepack says float32; the operator returns uint8, and ours says so.
    assert getattr(ops, f"{stem}_prepack_meta")(values) == (tuple(theirs.shape), np.dtype(np.uint8))
    theirs = torch_operator(f"{stem}_unpack")(device(rows))
    assert getattr(ops, f"{stem}_unpack_meta")(rows) == (tuple(theirs.shape), np.dtype(np.float32))
    assert theirs.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 8)])
def test_meta_shapes_of_byte_prepack_and_unpack_are_torchs_at_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    theirs = torch.ops.quantized.embedding_bag_byte_prepack(on_meta(np.zeros(shape, np.float32)))
    assert ops.embedding_bag_byte_prepack_meta(np.zeros(shape, np.float32))[0] == tuple(theirs.shape)
    packed = np.zeros((*shape[:-1], shape[-1] + 8), dtype=np.uint8)
    theirs = torch.ops.quantized.embedding_bag_byte_unpack(on_meta(packed))
    assert ops.embedding_bag_byte_unpack_meta(packed) == (tuple(theirs.shape), np.dtype(np.float32))


# ---- Many ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["plain", "weighted", "pruned"])
def test_a_hundred_million_sums_are_torchs_in_every_bit(
    bits: int,
    mix: str,
    rng: np.random.Generator,
    packed_rows: Callable[..., np.ndarray],
    same_bits: Callable[..., None],
) -> None:
    """Levels, thread counts, dims, types and extremes rotate; every element is compared."""
    names, before = levels.levels(), levels.serve(levels.levels()[0])
    compared = rounds = 0
    dims = [64, 128, 32, 100, 256, 20, 512, 300, 48, 1000]
    try:
        while compared < 100_000_000:
            dim = dims[rounds % len(dims)]
            rows = packed_rows(rng, 2000, dim, bits, extremes=rounds % 3 == 2)
            num_bags = 4_000_000 // dim
            ends = np.concatenate([[0], np.cumsum(rng.integers(0, 7, num_bags))])
            options: dict[str, Any] = {"include_last_offset": True}
            num_embeddings = len(rows)
            if mix == "pruned":
                num_embeddings = 3000
                options["mapping"] = pruning_map(rng, num_embeddings, len(rows))
            if mix != "plain" and (mix == "weighted" or rounds % 2):
                kind = weight_types(bits)[rounds % len(weight_types(bits))]
                options["weights"] = rng.normal(size=ends[-1]).astype(kind)
            indices = rng.integers(0, num_embeddings, ends[-1]).astype(INTEGERS[rounds & 1])
            ends = ends.astype(INTEGERS[rounds >> 1 & 1])
            levels.serve(names[rounds % len(names)])
            qembag.set_num_threads(1 + rounds // len(names) % 3)
            theirs = torch_bags(bits, rows, indices, ends, **options)
            ours = our_bags(bits, rows, indices, ends, **options)
            if not np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):
                same_bits(ours, theirs)  # NaN may differ
            compared += theirs.size
            rounds += 1
    finally:
        levels.serve(before)
        qembag.set_num_threads(None)
    assert compared >= 100_000_000
    assert rounds >= 3 * len(names)
