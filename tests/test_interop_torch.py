"""Tables from torch's modules have the bits of the modules' own lookups; what goes back to torch has ours."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest

import qembag
from support.arrays import Sub, read_only, same_bits
from support.floats import full_range
from support.layouts import LAYOUTS, NAMES, bag_offsets, rows_of, spread

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from qembag.interop import torch as interop
from support.torch_modules import KINDS, module_of, quantized_weight, some_module

NUM_ROWS = 30
DIMS = [*range(1, 17), 64, 100, 101, 300]


@pytest.fixture(scope="module", autouse=True)
def _their_one_warning() -> None:
    """Torch says once in a process that quantized tensors are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized_weight(8, np.zeros((1, 1), np.uint8), np.ones(1), np.zeros(1), 1)


@pytest.fixture(params=[8, 4])
def width(request: pytest.FixtureRequest) -> int:
    """Those that torch's modules have."""
    return request.param


def bags_of(rng: np.random.Generator, num_rows: int = NUM_ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices, offsets with the last end, and weights."""
    ends = bag_offsets(rng, 8, 6)
    indices = rng.integers(0, num_rows, ends[-1])
    return indices, ends, rng.normal(size=len(indices)).astype(np.float32)


def answer(module: Any, *arrays: np.ndarray | None) -> np.ndarray:
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    with torch.no_grad():
        return module(*tensors).numpy()


# ---- Quantized modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMS)
def test_lookups_have_the_bits_of_quantized_modules(width, dim, rng):
    for is_weighted, with_last, extremes in itertools.product([False, True], repeat=3):
        module = some_module(rng, width, dim, NUM_ROWS, extremes=extremes, include_last_offset=with_last)
        table = interop.from_module(module)
        # torch rounds an odd dim up at 4 bits, and returns that many columns.
        assert (table.dim, table.bits, table.num_rows) == (dim + dim % 2 * (width == 4), width, NUM_ROWS)
        indices, ends, weights = bags_of(rng)
        offsets = ends if with_last else ends[:-1]
        given = weights if is_weighted else None
        ours = qembag.embedding_bag(table, indices, offsets, per_sample_weights=given, include_last_offset=with_last)
        same_bits(ours, answer(module, indices, offsets, given))
        cut = interop.from_module(module, dim=dim)
        assert cut.dim == dim
        same_bits(
            qembag.embedding_bag(cut, indices, offsets, per_sample_weights=given, include_last_offset=with_last),
            ours[:, :dim],
        )


@pytest.mark.parametrize("dim", DIMS)
def test_rows_have_the_bits_of_quantized_embeddings(width, dim, rng):
    module = some_module(rng, width, dim, NUM_ROWS, single=True)
    indices = rng.integers(0, NUM_ROWS, 12).astype(np.int32)
    same_bits(qembag.embedding(interop.from_module(module), indices), answer(module, indices))


def test_codes_of_the_full_range_arrive(width, rng):
    codes = np.arange(256, dtype=np.uint8).repeat(2).reshape(8, 64)
    weight = quantized_weight(width, codes, np.full(8, 0.5), np.full(8, 3), 64 * 8 // width)
    table = interop.from_module(module_of(weight))
    assert np.array_equal(LAYOUTS[width].pack(table.codes(), np.zeros((8, 2)))[:, :64], codes)


def test_a_quantized_table_lives_on_without_its_module(width, rng):
    """Torch's scales alias the module's memory, which others may get when it is gone."""
    module = some_module(rng, width, 16, NUM_ROWS)
    table = interop.from_module(module)
    before = table.data.copy()
    del module
    torch.full((1000,), 7.0)
    assert np.array_equal(table.data, before)
    assert table.data.base is None or not isinstance(table.data.base, torch.Tensor)


def test_the_type_that_from_float_writes_is_not_believed(rng):
    """Torch's Embedding.from_float says quint8 beside a weight of quint4x2."""
    weight = some_module(rng, 4, 16, NUM_ROWS).weight()
    module = module_of(weight, single=True)
    module.dtype = module._packed_params.dtype = torch.quint8
    assert interop.from_module(module).bits == 4


class Nested(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = torch.nn.EmbeddingBag(20, 8, mode="sum")
        self.inner = torch.nn.ModuleDict({"item": torch.nn.EmbeddingBag(30, 6, mode="sum")})
        self.linear = torch.nn.Linear(14, 3)


def quantized_dynamically(model: Any, kind: Any) -> Any:
    from torch.ao import quantization

    configs = {
        torch.quint8: quantization.float_qparams_weight_only_qconfig,
        torch.quint4x2: quantization.float_qparams_weight_only_qconfig_4bit,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(model, {torch.nn.EmbeddingBag: configs[kind]}, kind)


def test_dynamically_quantized_models_arrive_whole(width, rng):
    model = quantized_dynamically(Nested(), KINDS[width])
    tables = interop.from_model(model)
    assert {name: (table.bits, table.shape) for name, table in tables.items()} == {
        "user": (width, (20, 8)),
        "inner.item": (width, (30, 6)),
    }
    for name, table in tables.items():
        indices, ends, weights = bags_of(rng, 20)
        ours = qembag.embedding_bag(table, indices, ends[:-1], per_sample_weights=weights)
        same_bits(ours, answer(model.get_submodule(name), indices, ends[:-1], weights))


# ---- Float modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("single", [False, True])
def test_float_modules_share_their_memory(kind, single, rng):
    make = torch.nn.Embedding if single else torch.nn.EmbeddingBag
    module = make(NUM_ROWS, 12, dtype=getattr(torch, kind))
    table = interop.from_module(module)
    assert (table.dtype, table.shape, table.num_rows) == (kind, (NUM_ROWS, 12), NUM_ROWS)
    for _ in range(2):
        same_bits(table[:], module.weight.detach().float().numpy())
        with torch.no_grad():
            module.weight.normal_()
    assert module.weight.requires_grad


@pytest.mark.parametrize("dim", DIMS)
def test_sums_and_means_have_the_bits_of_float_modules(dim, rng):
    values = full_range(rng, "float32", NUM_ROWS, dim)
    for mode, is_weighted in [("sum", False), ("sum", True), ("mean", False), ("max", False)]:
        module = torch.nn.EmbeddingBag.from_pretrained(torch.from_numpy(values), mode=mode, include_last_offset=True)
        indices, ends, weights = bags_of(rng)
        given = weights if is_weighted else None
        ours = qembag.embedding_bag(
            interop.from_module(module), indices, ends, mode=mode, per_sample_weights=given, include_last_offset=True
        )
        same_bits(ours, answer(module, indices, ends, given))


def test_the_rows_of_a_larger_tensor_are_a_table(rng):
    whole = torch.randn(NUM_ROWS, 40)
    module = torch.nn.Embedding.from_pretrained(whole[3:, 5:17])
    table = interop.from_module(module)
    assert np.shares_memory(table.data, whole.numpy())
    same_bits(table[:], whole[3:, 5:17].numpy())


def test_an_empty_module_is_an_empty_table():
    assert interop.from_module(torch.nn.Embedding(0, 4)).shape == (0, 4)


def test_a_subclass_that_looks_up_as_torch_does_is_taken():
    module = Named(5, 4)
    same_bits(interop.from_module(module)[:], module.weight.detach().numpy())


@pytest.mark.parametrize("export", ["to_packed", "to_state_dict"])
def test_tables_without_rows_go_to_torch(width, export):
    table = qembag.quantize(np.zeros((0, 8), np.float32), width)
    made = getattr(interop, export)(table)
    assert len(made if export == "to_packed" else made["_packed_params._packed_weight"]) == 0


def test_a_module_with_a_computed_weight_gives_what_it_computes():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = torch.nn.Embedding(5, 4)
    before = module.weight.detach().clone()
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    same_bits(interop.from_module(module)[:], (2 * before).numpy())


def test_a_module_of_ours_gives_its_table(rng):
    ours = pytest.importorskip("qembag.torch")
    table = qembag.quantize(rng.normal(size=(4, 8)).astype(np.float32), bits=4)
    model = torch.nn.Sequential(ours.EmbeddingBag.from_table(table))
    for found in (interop.from_module(model[0]), interop.from_model(model)["0"]):
        assert np.array_equal(found.data, table.data)
        assert found.layout == table.layout


# ---- Models ------------------------------------------------------------------------------------------------------------


def test_a_model_s_tables_are_those_of_its_file(width, rng, tmp_path):
    """In order, and by name; a file does not tell an embedding's weight from a linear layer's."""
    bags = some_module(rng, width, 6, 7)
    alone = [some_module(rng, width, 6, 7), torch.nn.Embedding(3, 4)]
    for model in [Nested(), torch.nn.ModuleDict({"a": bags, "b": torch.nn.Sequential(Nested(), bags)}), *alone]:
        torch.save(model.state_dict(), tmp_path / "model.pt")
        loaded = qembag.load_tables(tmp_path / "model.pt")
        expected = {name: table for name, table in loaded.items() if not name.endswith("linear")}
        tables = interop.from_model(model)
        assert list(tables) == list(expected)
        for name, table in tables.items():
            assert type(table) is type(expected[name])
            assert np.array_equal(table.data, expected[name].data)
    assert interop.from_model(torch.nn.Linear(2, 2)) == {}


def test_a_module_that_is_there_twice_is_one_table():
    bags = torch.nn.EmbeddingBag(5, 4)
    tables = interop.from_model(torch.nn.ModuleDict({"a": bags, "b": torch.nn.Sequential(bags)}))
    assert list(tables) == ["a", "b.0"]
    assert tables["a"] is tables["b.0"]


def test_dims_of_a_model_go_by_name(rng):
    model = torch.nn.ModuleDict({"a": some_module(rng, 4, 5, 7), "b": torch.nn.Sequential(some_module(rng, 4, 6, 7))})
    assert [table.dim for table in interop.from_model(model).values()] == [6, 6]
    assert [table.dim for table in interop.from_model(model, dims={"a": 5, "b.0": 6}).values()] == [5, 6]
    with pytest.raises(ValueError, match=r"^a: dim must be the module's, 6, got 4$"):
        interop.from_model(model, dims={"a": 4})


# ---- What is refused ---------------------------------------------------------------------------------------------------


def embedding(weight: Any = None, **options: Any) -> Any:
    module = torch.nn.Embedding(6, 4, **options)
    if weight is not None:
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


class Strange(torch.Tensor):
    pass


def strange() -> Any:
    module = torch.nn.Embedding(6, 4)
    module.weight = torch.nn.Parameter(torch.randn(6, 4).as_subclass(Strange), requires_grad=False)
    return module


def trained_for_quantization() -> Any:
    from torch.ao import quantization
    from torch.ao.nn import qat

    return qat.Embedding(6, 4, qconfig=quantization.float_qparams_weight_only_qconfig)


class Scaled(torch.nn.Embedding):
    def forward(self, indices: Any) -> Any:
        return 2 * super().forward(indices)


class Named(torch.nn.EmbeddingBag):
    """Another name for the same."""


REFUSED = {
    "a forward of its own": (lambda: Scaled(3, 4), TypeError, "must not have a forward of its own, .* got .*Scaled"),
    "None": (lambda: None, TypeError, "module must be a torch.nn.Embedding .* got builtins.NoneType"),
    "a tensor": (lambda: torch.randn(3, 4), TypeError, "module must be .* got torch.Tensor"),
    "a class": (lambda: torch.nn.Embedding, TypeError, "module must be .* got builtins.type"),
    "a linear": (lambda: torch.nn.Linear(3, 4), TypeError, "got torch.nn.modules.linear.Linear"),
    "meta": (lambda: torch.nn.Embedding(6, 4, device="meta"), ValueError, "on the CPU, got device meta"),
    "float64": (lambda: embedding(torch.randn(6, 4).double()), TypeError, "float32, float16 or bfloat16, got torch.fl"),
    "float8": (
        lambda: embedding(torch.randn(6, 4).to(torch.float8_e4m3fn)), TypeError, r"module.weight must be .*float8_e4m3fn"
    ),
    "complex": (lambda: embedding(torch.zeros(6, 4, dtype=torch.complex64)), TypeError, "got torch.complex64"),
    "transposed": (lambda: embedding(torch.randn(4, 6).t()), ValueError, r"side by side, got strides \(1, 6\): call"),
    "1-D": (lambda: embedding(torch.randn(6)), ValueError, r"must have 2 dimensions, .* got shape \(6,\)"),
    "no columns": (lambda: embedding(torch.randn(6, 0)), ValueError, r"dim of 1 or more, got shape \(6, 0\)"),
    "sparse": (lambda: embedding(torch.eye(6).to_sparse()), TypeError, "must be a dense tensor"),
    "subclass": (strange, TypeError, "module.weight must be a plain tensor, got .*Strange"),
    "max_norm": (lambda: embedding(max_norm=1.0), ValueError, "must have no max_norm, .* got 1.0"),
    "qat": (trained_for_quantization, TypeError, "module must be .* got torch.ao.nn.qat.modules.embedding_ops.Embedd"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_table_is_refused(case):
    make, kind, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make()
    with pytest.raises(kind, match=message):
        interop.from_module(module)


@pytest.mark.parametrize("dim", [0, -1, 3, 8, 2**70])
def test_a_wrong_dim_is_refused(width, dim, rng):
    for module in (some_module(rng, width, 6, 5), torch.nn.Embedding(5, 6)):
        with pytest.raises(ValueError, match=r"^dim must be the module's, 6, got "):
            interop.from_module(module, dim=dim)
    with pytest.raises(TypeError, match="dim must be a whole number, got float 6"):
        interop.from_module(torch.nn.Embedding(5, 6), dim=6.0)


def test_only_the_column_that_rounds_an_odd_dim_up_is_left_out(rng):
    with pytest.raises(ValueError, match="dim must be the module's, 6, got 5"):
        interop.from_module(some_module(rng, 8, 6, 5), dim=5)


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got OrderedDict"):
        interop.from_model(Nested().state_dict())
    with pytest.raises(TypeError, match="dims must be a whole number or a dict of them, got str '5'"):
        interop.from_model(Nested(), dims="5")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Embedding(3, 4)))
    with pytest.raises(TypeError, match="model must not be a scripted one"):
        interop.from_model(scripted)
    model = Nested()
    model.inner.to("meta")
    with pytest.raises(ValueError, match=r"^inner.item: module.weight must be on the CPU"):
        interop.from_model(model)


# ---- Back: packed rows -------------------------------------------------------------------------------------------------


def by_torch(packed: Any, bits: int, mapping: np.ndarray | None, *bags: np.ndarray) -> np.ndarray:
    indices, ends, weights = map(torch.from_numpy, bags)
    operator = getattr(torch.ops.quantized, f"embedding_bag_{NAMES[bits]}_rowwise_offsets")
    pruned = None if mapping is None else torch.from_numpy(mapping)
    return operator(packed, indices, ends, False, 0, mapping is not None, weights, pruned, True).numpy()


def ours_of(table: Any, *bags: np.ndarray) -> np.ndarray:
    indices, ends, weights = bags
    return qembag.embedding_bag(table, indices, ends, per_sample_weights=weights, include_last_offset=True)


@pytest.mark.parametrize("dim", [4, 8, 64, 100, 300])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_packed_rows_give_our_bits_in_torch(bits, dim, is_pruned, rng):
    mapping = rng.integers(-1, NUM_ROWS, 50).astype(np.int32) if is_pruned else None
    rows = rows_of(rng, LAYOUTS[bits], NUM_ROWS, dim)
    table = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
    packed = interop.to_packed(table)
    assert np.shares_memory(packed.numpy(), rows)
    bags = bags_of(rng, table.num_embeddings)
    same_bits(by_torch(packed, bits, mapping, *bags), ours_of(table, *bags))


def of_layout(rng: np.random.Generator, layout: Any, dim: int) -> Any:
    """A table whose pairs all layouts hold, the same in each group of a row."""
    pairs = np.round(rng.normal(size=(NUM_ROWS, 1, 2)), 2).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 2**layout.bits, (NUM_ROWS, dim))
    groups = np.repeat(pairs, layout.num_groups(dim), axis=1)
    rows = layout.pack(codes, groups if layout.group_size else groups[:, 0], pad=255)
    return qembag.QuantizedTable(rows, layout.bits, dim=dim, **layout.keywords())


@pytest.mark.parametrize("layout", spread(24), ids=str)
def test_rows_in_any_layout_are_packed_without_loss(layout, rng):
    table = of_layout(rng, layout, 80)
    bags = bags_of(rng)
    same_bits(by_torch(interop.to_packed(table), layout.bits, None, *bags), ours_of(table, *bags))


def test_packed_rows_of_read_only_memory_are_a_copy(bits, rng):
    table = qembag.QuantizedTable(read_only(rows_of(rng, LAYOUTS[bits], 5, 8)), bits)
    packed = interop.to_packed(table)  # without torch's warning
    packed[:] = 0
    assert table.data.any()


def test_packed_rows_may_run_backwards(bits, rng):
    table = qembag.QuantizedTable(rows_of(rng, LAYOUTS[bits], 5, 8)[::-1], bits)
    assert np.array_equal(interop.to_packed(table).numpy(), table.data)


def test_scales_that_rows_cannot_hold_are_an_error_or_rounded(rng):
    table = qembag.quantize(rng.normal(size=(9, 8)).astype(np.float32), bits=4, scale_dtype="float32")
    with pytest.raises(ValueError, match=r"torch's 4-bit operator cannot hold this table exactly: .* got row 0 with a"):
        interop.to_packed(table)
    packed = interop.to_packed(table, exact=False)
    halves = qembag.QuantizedTable(packed.numpy(), 4)
    assert np.array_equal(halves.codes(), table.codes())
    assert np.array_equal(halves.scales, table.scales.astype(np.float16))
    assert np.array_equal(halves.biases, table.biases.astype(np.float16))


def test_groups_that_differ_are_an_error_or_quantized_anew(bits, rng):
    values = rng.normal(size=(9, 64)).astype(np.float32) * np.repeat([1, 2], 32)
    table = qembag.quantize(values, bits, group_size=32)
    with pytest.raises(ValueError, match="cannot hold this table exactly: group_size must not join groups"):
        interop.to_packed(table)
    rows = interop.to_packed(table, exact=False).numpy()
    assert np.array_equal(rows, qembag.quantize(table[:], bits).data)


@pytest.mark.parametrize(("bits_", "dim", "columns"), [(4, 5, 6), (2, 5, 8), (2, 7, 8)])
def test_a_dim_within_a_byte_is_an_error_or_has_more_columns(bits_, dim, columns, rng):
    table = qembag.quantize(rng.normal(size=(NUM_ROWS, dim)).astype(np.float32), bits_)
    with pytest.raises(ValueError, match=f"operator would return {columns} columns"):
        interop.to_packed(table)
    bags = bags_of(rng)
    theirs = by_torch(interop.to_packed(table, exact=False), bits_, None, *bags)
    assert theirs.shape[1] == columns
    same_bits(theirs[:, :dim], ours_of(table, *bags))


@pytest.mark.parametrize("export", ["to_packed", "to_state_dict"])
def test_row_weights_are_an_error_or_left_out(export, rng):
    plain = qembag.quantize(rng.normal(size=(4, 8)).astype(np.float32), bits=4)
    table = qembag.QuantizedTable(plain.data, 4, row_weights=np.ones(4, np.float32))
    call = getattr(interop, export)
    with pytest.raises(ValueError, match="table must have no row_weights, which would be lost"):
        call(table)
    call(table, exact=False)


@pytest.mark.parametrize("export", ["to_packed", "to_state_dict"])
def test_only_quantized_tables_are_packed(export):
    call = getattr(interop, export)
    with pytest.raises(TypeError, match=r"table must be a QuantizedTable, got FloatTable; qembag.quantize makes one"):
        call(qembag.FloatTable(np.eye(3, dtype=np.float32), row_weights=np.ones(3, np.float32)))
    for wrong in (None, np.eye(3, dtype=np.float32), np.zeros((3, 12), np.uint8).view(Sub)):
        with pytest.raises(TypeError, match="table must be a QuantizedTable or a FloatTable, got"):
            call(wrong)
    with pytest.raises(TypeError, match="exact must be True or False, got str 'no'"):
        call(qembag.quantize(np.eye(4, dtype=np.float32)), exact="no")


def test_a_scale_beyond_half_is_an_error_even_where_a_loss_is_allowed():
    rows = LAYOUTS[4].pack(np.zeros((2, 8), np.uint8), np.zeros((2, 2)))
    wide = qembag.QuantizedTable(rows, 4).to_layout(scale_dtype="float32").data.copy()
    wide[1, 4:8] = np.array([1e6], "<f4").view(np.uint8)
    table = qembag.QuantizedTable(wide, 4, scale_dtype="float32")
    with pytest.raises(ValueError, match="row 1 has a scale of 1000000, which is beyond float16"):
        interop.to_packed(table, exact=False)


# ---- Back: modules -----------------------------------------------------------------------------------------------------


def module_with(state: Any, num_rows: int, dim: int, bits: int) -> Any:
    zeros = quantized_weight(bits, np.zeros((num_rows, -(-dim * bits // 8)), np.uint8), *np.ones((2, num_rows)), dim)
    module = module_of(zeros, include_last_offset=True)
    result = module.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return module


@pytest.mark.parametrize("dim", [2, 4, 6, 16, 64, 100, 300])
@pytest.mark.parametrize("extremes", [False, True])
def test_a_table_of_torchs_goes_back_to_torch_exactly(width, dim, extremes, rng):
    module = some_module(rng, width, dim, NUM_ROWS, extremes=extremes, include_last_offset=True)
    table = interop.from_module(module)
    back = module_with(interop.to_state_dict(table), NUM_ROWS, dim, width)
    bags = bags_of(rng)
    same_bits(answer(back, *bags), answer(module, *bags))
    same_bits(answer(back, *bags), ours_of(table, *bags))


def test_all_4_bit_tables_go_to_torch_exactly(rng):
    rows = rows_of(rng, LAYOUTS[4], 2000, 8)
    LAYOUTS[4].set_pairs(rows, full_range(rng, "float16", 2000, 2).astype(np.float32))
    table = qembag.QuantizedTable(rows, 4)
    back = module_with(interop.to_state_dict(table), 2000, 8, 4)
    bags = bags_of(rng, 2000)
    same_bits(answer(back, *bags), ours_of(table, *bags))
    same_bits(answer(back, np.arange(2000), np.arange(2001)), table[:])


def test_constant_rows_go_to_torch_exactly(width):
    values = np.repeat(np.array([[0.1], [0.0], [-0.0], [-7.3]], np.float32), 8, axis=1)
    table = qembag.quantize(values, width)
    bags = np.array([0, 1, 2, 3, 3, 0]), np.array([0, 1, 2, 3, 6]), np.array([1, 2, -1, 0.3, 5, 1e-3], np.float32)
    same_bits(answer(module_with(interop.to_state_dict(table), 4, 8, width), *bags), ours_of(table, *bags))


def test_a_table_is_as_it_was_after_it_went_to_torch(width):
    rows = LAYOUTS[width].pack(np.full((2, 8), 3), np.array([[0, 1.5], [0.5, 1.5]]))
    table = qembag.QuantizedTable(rows.copy(), width)
    interop.to_state_dict(table)
    assert np.array_equal(table.data, rows)


def test_8_bit_rows_that_no_zero_point_gives_are_an_error_or_the_nearest(rng):
    table = qembag.quantize(rng.normal(size=(500, 8)).astype(np.float32))
    with pytest.raises(
        ValueError, match=r"cannot hold row \d+ exactly: no float32 zero point gives its bias of .* off"
    ):
        interop.to_state_dict(table)
    back = interop.from_module(module_with(interop.to_state_dict(table, exact=False), 500, 8, 8))
    assert np.array_equal(back.codes(), table.codes())
    assert np.array_equal(back.scales, table.scales)
    # Of zero points next to each other, the biases are at most two units in the last place apart.
    assert (np.abs(back.biases - table.biases) <= np.spacing(np.abs(table.biases))).all()
    exact = np.flatnonzero(back.biases == table.biases)
    assert len(exact) > 400
    interop.to_state_dict(qembag.QuantizedTable(table.data[exact], 8))


def test_no_zero_point_that_does_is_missed(rng):
    """Against a search through the neighbours on both sides."""
    scales = np.abs(rng.normal(size=3000)).astype(np.float32)
    biases = rng.normal(size=3000).astype(np.float32)
    # Below a power of two floats are closer together than above it: there a neighbour may do where the quotient does not.
    biases[::2] = np.exp2(rng.integers(-20, 20, 1500))
    rows = LAYOUTS[8].pack(np.zeros((3000, 4), np.uint8), np.stack([scales, biases], axis=1))
    theirs = interop.to_state_dict(qembag.QuantizedTable(rows, 8), exact=False)["_packed_params._packed_weight"]
    zero_points = theirs.q_per_channel_zero_points().numpy()
    found = -(zero_points * scales) == biases
    around = (-(biases / scales)).view(np.int32)[:, None] + np.arange(-20, 21, dtype=np.int32)
    possible = (-(around.view(np.float32) * scales[:, None]) == biases[:, None]).any(axis=1)
    assert np.array_equal(found, possible)
    assert 0 < (~possible).sum() < 3000


def test_pruned_rows_are_zeros_in_a_module(width, rng):
    whole = interop.from_module(some_module(rng, width, 8, NUM_ROWS))
    mapping = np.where(np.arange(NUM_ROWS) % 3, rng.permutation(NUM_ROWS), -1).astype(np.int32)
    table = qembag.QuantizedTable(whole.data, width, compressed_indices_mapping=mapping)
    back = module_with(interop.to_state_dict(table), NUM_ROWS, 8, width)
    bags = bags_of(rng)
    same_bits(answer(back, *bags), ours_of(table, *bags))
    assert not answer(back, np.array([0]), np.array([0, 1])).any()


def test_modules_have_no_2_bits_and_keys_have_a_prefix():
    with pytest.raises(ValueError, match=r"table must have 8 or 4 bits for torch.ao.nn.quantized, got 2"):
        interop.to_state_dict(qembag.quantize(np.eye(4, dtype=np.float32), bits=2))
    state = interop.to_state_dict(qembag.quantize(np.eye(4, dtype=np.float32), bits=4), prefix="a.b.")
    assert list(state) == ["a.b._packed_params.dtype", "a.b._packed_params._packed_weight"]


def test_a_module_s_odd_dim_is_an_error_or_one_more_column(rng):
    table = qembag.quantize(rng.normal(size=(NUM_ROWS, 5)).astype(np.float32), bits=4)
    with pytest.raises(ValueError, match="torch's 4-bit module would return 6 columns"):
        interop.to_state_dict(table)
    back = module_with(interop.to_state_dict(table, exact=False), NUM_ROWS, 6, 4)
    bags = bags_of(rng)
    same_bits(answer(back, *bags)[:, :5], ours_of(table, *bags))


# ---- torchao -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits_", range(2, 9))
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_torchao_s_embeddings_arrive_exactly(bits_, kind, group_size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (0.18.0)")
        from torchao.quantization.granularity import PerAxis, PerGroup

        model = torch.nn.Sequential(torch.nn.Embedding(NUM_ROWS, 96, dtype=getattr(torch, kind)))
        config = quantization.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits_}"),
            granularity=PerAxis(0) if group_size is None else PerGroup(group_size),
        )
        quantization.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, torch.nn.Embedding))
    (table,) = interop.from_model(model).values()
    assert table.bits == min(width for width in (2, 4, 8) if width >= bits_)
    theirs = model(torch.arange(NUM_ROWS)).detach()
    ours = qembag.embedding(table, np.arange(NUM_ROWS))
    same_bits(torch.from_numpy(ours).to(theirs.dtype).float().numpy(), theirs.float().numpy())
