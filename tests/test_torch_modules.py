"""qembag.torch's modules: the bits of qembag's lookups, and what torch's users do with modules."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest

import qembag

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import qembag.torch as front
from qembag.interop.torch import from_module
from qembag.torch import tensors

OFFSETS = torch.tensor([0, 3, 3, 20])
LAYOUTS = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 2},
    {"bits": 4, "scale_first": True, "row_alignment": 16},
    {"bits": 8, "scale_dtype": "float16"},
    {"bits": 4, "scale_dtype": "float32", "group_size": 16},
]


def a_table(rng: np.random.Generator, num_rows: int = 100, dim: int = 37, **options):
    return qembag.quantize(rng.normal(size=(num_rows, dim)).astype(np.float32), **options)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def indices_of(rng: np.random.Generator, count: int = 40, below: int = 100) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, below, count))


@pytest.fixture
def bags(rng):
    """A module, and arguments for it."""
    return front.EmbeddingBag.from_table(a_table(rng, bits=4), mode="sum"), (indices_of(rng), OFFSETS)


# ---- The bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("pruned", [False, True])
def test_bags_have_the_bits_of_qembag(rng, options, mode, pruned):
    table = a_table(rng, **options)
    if pruned:
        table = table.prune(rng.random(100) < 0.7)
    module = front.EmbeddingBag.from_table(table, mode=mode, padding_idx=-1)
    indices = indices_of(rng)
    weights = None if mode == "max" else torch.from_numpy(rng.normal(size=40).astype(np.float32))
    for given, starts in ((indices, OFFSETS), (indices.int(), OFFSETS.int()), (indices.view(4, 10), None)):
        shaped = None if weights is None else weights.view(given.shape)
        expected = qembag.embedding_bag(
            table,
            given.numpy(),
            None if starts is None else starts.numpy(),
            mode=mode,
            padding_idx=99,
            per_sample_weights=None if shaped is None else shaped.numpy(),
        )
        assert np.array_equal(module(given, starts, shaped).numpy(), expected)
    assert module.table.layout == table.layout
    assert np.shares_memory(module.table.data, table.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_floats_keep_their_type_and_have_the_bits_of_torch(rng, dtype):
    source = torch.nn.EmbeddingBag(100, 24, mode="sum", dtype=dtype)
    module = front.EmbeddingBag.from_table(from_module(source), mode="sum", dtype=dtype)
    assert module.rows.dtype == dtype
    assert module.rows.data_ptr() == source.weight.data_ptr()
    arguments = (indices_of(rng), OFFSETS)
    expected = source(*arguments).detach()
    found = module(*arguments)
    assert found.dtype == dtype
    if dtype == torch.bfloat16:  # torch rounds half up on its fast path
        assert torch.allclose(found.float(), expected.float(), rtol=2**-7)
    else:
        assert np.array_equal(bits_of(found), bits_of(expected))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0,)])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_embeddings_have_the_bits_of_qembag_in_any_shape(rng, shape, bits):
    table = a_table(rng, bits=bits)
    indices = torch.from_numpy(np.asarray(rng.integers(0, 100, shape)))
    found = front.Embedding.from_table(table)(indices)
    assert found.shape == (*shape, 37)
    assert np.array_equal(found.numpy(), qembag.embedding(table, indices.numpy()))


def test_a_float_module_is_quantized_as_qembag_does(rng):
    source = torch.nn.EmbeddingBag(50, 20, mode="max", include_last_offset=True, padding_idx=-2).eval()
    module = front.EmbeddingBag.from_float(source, 2, method="greedy")
    expected = qembag.quantize(source.weight.detach().numpy(), 2, method="greedy")
    assert np.array_equal(module.table.data, expected.data)
    assert (module.mode, module.include_last_offset, module.padding_idx, module.training) == ("max", True, 48, False)
    assert len(module(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))) == 2
    rows = torch.nn.Embedding(50, 20)
    assert np.array_equal(
        front.Embedding.from_float(rows).table.data,
        qembag.quantize(rows.weight.detach().numpy(), 4, method="lsq").data,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
@pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2])
def test_a_quantized_module_of_torchs_gives_its_own_bits(rng, dtype):
    qparams = torch.ao.quantization.float_qparams_weight_only_qconfig
    if dtype == torch.quint4x2:
        qparams = torch.ao.quantization.float_qparams_weight_only_qconfig_4bit
    source = torch.nn.EmbeddingBag(100, 36, mode="mean")
    source.qconfig = qparams
    quantized = torch.ao.nn.quantized.EmbeddingBag.from_float(source)
    module = front.EmbeddingBag.from_quantized(quantized)
    indices = indices_of(rng)
    assert module.mode == "sum"
    assert torch.equal(module(indices, OFFSETS), quantized(indices, OFFSETS))


# ---- Arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "offsets", "error", "words"),
    [
        ([100], [0], IndexError, "indices\\[0\\] is 100 .bag 0.: out of range for a table of 100 rows"),
        ([-1], [0], IndexError, "is -1"),
        ([1.0], [0], TypeError, "indices must be an array of integers, got a float32"),
        ([1], None, ValueError, "offsets"),
        ([1, 2], [0, 3], ValueError, "offsets"),
        ([[1, 2]], [0], ValueError, "offsets"),
        ([True], [0], TypeError, "indices"),
    ],
)
def test_bad_input_is_refused(bags, indices, offsets, error, words):
    with pytest.raises(error, match=words):
        bags[0](torch.tensor(indices), None if offsets is None else torch.tensor(offsets))


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 1.0},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"mode": "median"},
        {"padding_idx": 10},
        {"bits": 3},
        {"num_threads": 0},
    ],
    ids=str,
)
def test_options_that_are_not_inert_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        front.EmbeddingBag(10, 4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_embeddings": 2.5},
        {"num_embeddings": -1},
        {"embedding_dim": "4"},
        {"embedding_dim": 0},
        {"padding_idx": 1.5},
        {"num_threads": "2"},
        {"num_threads": True},
        {"include_last_offset": "no"},
    ],
    ids=str,
)
def test_arguments_of_the_wrong_type_are_named(options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        front.EmbeddingBag(**{"num_embeddings": 10, "embedding_dim": 4, **options})


def test_dtypes_and_other_objects_are_refused():
    for dtype in (torch.int8, torch.float8_e4m3fn, "float32"):
        with pytest.raises(TypeError, match=r"dtype must be torch\.float32, .*, got"):
            front.Embedding(10, 4, dtype=dtype)
    with pytest.raises(TypeError, match="table must be a QuantizedTable"):
        front.Embedding.from_table(np.zeros((3, 4), np.float32))
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.EmbeddingBag, got Embedding"):
        front.EmbeddingBag.from_float(torch.nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="max_norm must be None"):
        front.Embedding.from_float(torch.nn.Embedding(3, 4, max_norm=1))
    with pytest.raises(ValueError, match="on the CPU"):
        front.Embedding.from_float(torch.nn.Embedding(3, 4, device="meta"))


def test_a_module_of_ours_is_not_another_librarys(bags):
    # It would lose its mode.
    with pytest.raises(TypeError, match="got one of qembag's"):
        front.EmbeddingBag.from_quantized(bags[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_module_with_a_weight_of_torchaos_keeps_its_options_and_type(dtype):
    torchao = pytest.importorskip("torchao.quantization")
    model = torch.nn.ModuleDict(
        {
            "bag": torch.nn.EmbeddingBag(10, 16, mode="mean", padding_idx=3, include_last_offset=True),
            "one": torch.nn.Embedding(10, 16, padding_idx=2),
        }
    ).to(dtype)
    torchao.quantize_(
        model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4), lambda module, _: hasattr(module, "weight")
    )
    bag = front.EmbeddingBag.from_quantized(model.bag)
    assert (bag.mode, bag.padding_idx, bag.include_last_offset, bag.dtype) == ("mean", 3, True, dtype)
    expected = model.one(torch.arange(10)).detach()
    front.replace_embedding_bags(model, embeddings=True)
    assert model.one.padding_idx == 2
    assert model.one(torch.arange(10)).dtype == dtype
    assert torch.equal(model.one(torch.arange(10)), expected)
    found = model.bag(torch.tensor([3, 1, 3]), torch.tensor([0, 2, 3]))
    assert torch.equal(found, model.bag(torch.tensor([1]), torch.tensor([0, 1, 1])))


def test_gradients_of_weights_are_refused_and_not_lost(bags):
    module, (indices, offsets) = bags
    weights = torch.rand(40, requires_grad=True)
    with pytest.raises(RuntimeError, match="must not require gradients"):
        module(indices, offsets, weights)
    with torch.no_grad():
        found = module(indices, offsets, weights)
    assert torch.equal(found, module(indices, offsets, weights.detach()))
    assert not found.requires_grad
    assert list(module.parameters()) == []


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_guards_of_torch_change_nothing(bags, guard):
    module, arguments = bags
    expected = module(*arguments)
    with guard():
        assert torch.equal(module(*arguments), expected)
        assert torch.equal(copy.deepcopy(module)(*arguments), expected)


def test_half_weights_are_taken_as_they_are(bags):
    module, (indices, offsets) = bags
    weights = torch.rand(40)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        same = weights.to(dtype).float()
        assert torch.equal(module(indices, offsets, weights.to(dtype)), module(indices, offsets, same))


def test_inputs_with_strides_and_without_elements_are_looked_up(bags):
    module, (indices, offsets) = bags
    assert torch.equal(module(indices.repeat_interleave(2)[::2], offsets), module(indices, offsets))
    assert torch.equal(module(indices.view(10, 4).T), module(indices.view(10, 4).T.contiguous()))
    assert module(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).shape == (0, 37)


def test_the_number_of_threads_is_torchs_and_changes_no_bit(rng):
    module = front.EmbeddingBag.from_table(a_table(rng, 1000, 64, bits=4), mode="sum")
    indices = torch.from_numpy(rng.integers(0, 1000, (2000, 20)))
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert front.operators.threads() <= count
            found.append(module(indices))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ---- Moved and converted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_converted_module_keeps_its_rows_and_gives_the_type(bags, dtype):
    module, arguments = bags
    rows, expected = module.rows.clone(), module(*arguments)
    converted = torch.nn.Sequential(copy.deepcopy(module)).to(dtype)[0]
    assert torch.equal(converted.rows, rows)
    assert converted(*arguments).dtype == dtype
    assert torch.equal(converted(*arguments), expected.to(dtype))
    assert torch.equal(converted.float()(*arguments), expected)


def test_rows_of_floats_are_not_converted(rng):
    floats = rng.normal(size=(10, 4)).astype(np.float16)
    module = front.Embedding.from_table(qembag.FloatTable(floats)).double()
    assert module.rows.dtype == torch.float16
    assert np.array_equal(module(torch.arange(10)).numpy(), floats.astype(np.float64))


def test_on_another_device_the_error_says_where(bags):
    module = bags[0].to("meta")
    assert module(torch.empty(40, dtype=torch.int64, device="meta"), OFFSETS.to("meta")).shape == (4, 37)
    with pytest.raises(RuntimeError, match="on the CPU, got meta"):
        _ = module.table
    with pytest.raises(RuntimeError, match=r"qembag looks rows up on CPUs only.*meta and cpu"):
        front.operators._elsewhere(module.rows, bags[1][0])
    back = module.to_empty(device="cpu")
    assert back.rows.shape == (100, 23)


def test_a_module_without_memory_takes_a_checkpoint(bags):
    module, arguments = bags
    empty = front.EmbeddingBag(100, 37, mode="sum", device="meta", bits=4)
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(*arguments), module(*arguments))


def test_a_module_without_memory_takes_none():
    # 90 TB. Its rows on the CPU would be zeros that nobody reads, but that not every system grants.
    module = front.EmbeddingBag(10**12, 64, bits=8, device="meta")
    assert module.rows.shape == (10**12, 72)
    assert module(torch.zeros(3, 2, dtype=torch.int64, device="meta")).shape == (3, 64)


def test_a_state_is_on_the_cpu_whatever_the_default_device(bags):
    with torch.device("meta"):
        state = bags[0].state_dict()
    front.EmbeddingBag(100, 37).load_state_dict(state)


# ---- State ---------------------------------------------------------------------------------------------------------


def saved(value) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_a_fresh_module_takes_over_a_state_in_any_layout(rng, options, assign):
    table = a_table(rng, **options).prune(rng.random(100) < 0.7)
    model = torch.nn.Sequential(front.EmbeddingBag.from_table(table, mode="sum"))
    state = torch.load(saved(model.state_dict()), weights_only=True)
    fresh = torch.nn.Sequential(front.EmbeddingBag(100, 37, mode="sum"))
    fresh.load_state_dict(state, assign=assign)
    indices = indices_of(rng)
    assert torch.equal(fresh[0](indices, OFFSETS), model[0](indices, OFFSETS))
    assert fresh[0].table.layout == table.layout
    assert (fresh[0].rows.data_ptr() == state["0.rows"].data_ptr()) == assign
    # And back to rows that are not pruned.
    fresh.load_state_dict(torch.nn.Sequential(front.EmbeddingBag(100, 37)).state_dict())
    assert fresh[0].compressed_indices_mapping is None
    assert not fresh[0](indices, OFFSETS).any()


def test_a_state_of_the_same_layout_is_copied_in_place(bags):
    module, arguments = bags
    fresh = front.EmbeddingBag(100, 37, mode="sum", bits=4)
    pointer = fresh.rows.data_ptr()
    fresh.load_state_dict(module.state_dict())
    assert fresh.rows.data_ptr() == pointer
    assert torch.equal(fresh(*arguments), module(*arguments))


def test_floats_and_weights_of_rows_are_part_of_the_state(rng):
    weights = rng.random(100).astype(np.float32)
    table = qembag.FloatTable(rng.normal(size=(100, 8)).astype(np.float16), row_weights=weights)
    module = front.Embedding.from_table(table)
    fresh = front.Embedding(100, 8)
    fresh.load_state_dict(torch.load(saved(module.state_dict()), weights_only=True))
    assert fresh.table.dtype == "float16"
    assert np.array_equal(fresh.table.row_weights, weights)
    assert np.array_equal(fresh.table.data, table.data)


def broken(state, **parts):
    return {**state, **parts}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {"rows": state["rows"]}, "_extra_state"),
        (lambda state: {"_extra_state": state["_extra_state"]}, "Missing key.*rows"),
        (lambda state: broken(state, rows=state["rows"][:50]), "size mismatch"),
        (lambda state: broken(state, rows=state["rows"].float()), "uint8"),
        (lambda state: broken(state, _extra_state=torch.tensor([91] * 10**5, dtype=torch.uint8)), "layout must be"),
        (lambda state: broken(state, _extra_state=torch.tensor(list(b'{"bits": 4}'), dtype=torch.uint8)), "mismatch"),
        (lambda state: broken(state, _extra_state=torch.tensor(list(b'{"bits":[]}'), dtype=torch.uint8)), "bits"),
        (lambda state: broken(state, _extra_state={"bits": 4}), "_extra_state must be"),
        (lambda state: broken(state, compressed_indices_mapping=torch.full((100,), 7777, dtype=torch.int32)), "7777"),
        (lambda state: broken(state, row_weights=torch.zeros(7)), "row_weights must have shape"),
        (lambda state: broken(state, rows="rows"), "must be tensors, got str"),
        (lambda state: broken(state, rows=None), "must be tensors, got NoneType"),
        (lambda state: broken(state, _extra_state=None), "_extra_state must be"),
        (lambda state: broken(state, other=torch.zeros(1)), "Unexpected key.*other"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(bags, change, words):
    module, arguments = bags
    expected = module(*arguments)
    with pytest.raises(RuntimeError, match=words):
        module.load_state_dict(change(module.state_dict()))
    assert torch.equal(module(*arguments), expected)


def test_a_state_dict_has_tensors_only_and_goes_into_safetensors(bags, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    module, arguments = bags
    safetensors.save_file(module.state_dict(), tmp_path / "state")
    fresh = front.EmbeddingBag(100, 37, mode="sum")
    fresh.load_state_dict(safetensors.load_file(tmp_path / "state"))
    assert torch.equal(fresh(*arguments), module(*arguments))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.load(saved(module), weights_only=False),
    ],
)
def test_copies_and_pickles_are_the_same_module(bags, copied):
    module, arguments = bags
    twin = copied(module)
    assert repr(twin) == repr(module)
    assert torch.equal(twin(*arguments), module(*arguments))


def test_a_module_says_what_it_is(rng):
    module = front.EmbeddingBag.from_table(a_table(rng, bits=2), include_last_offset=True, padding_idx=3)
    assert repr(module) == (
        "EmbeddingBag(100, 37, bits=2, dim=37, mode='mean', include_last_offset=True, padding_idx=3)"
    )
    floats = front.Embedding.from_table(qembag.FloatTable(np.zeros((3, 2), np.float16)))
    assert repr(floats) == "Embedding(3, 2, rows=float16)"


# ---- Memory --------------------------------------------------------------------------------------------------------


def test_a_mapped_table_stays_mapped_and_loads_into_memory_of_its_own(rng, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "table.safetensors"
    a_table(rng, bits=4).save(path)
    table = qembag.open_table(path)
    assert not table.data.flags.writeable
    module = front.EmbeddingBag.from_table(table, mode="sum")
    assert np.shares_memory(module.table.data, table.data)
    arguments = (indices_of(rng), OFFSETS)
    expected = module(*arguments)
    del table
    gc.collect()
    assert torch.equal(module(*arguments), expected)
    module.load_state_dict(front.EmbeddingBag(100, 37, bits=4).state_dict())  # in place, this would end the process
    assert not module(*arguments).any()


def test_rows_at_any_stride_and_address_are_looked_up(rng):
    table = a_table(rng, dim=16, bits=8)
    wide = np.zeros((200, table.row_bytes + 3), np.uint8)
    wide[::2, 1:-2] = table.data
    for rows in (wide[::2, 1:-2], table.data[::-1].copy()[::-1]):
        module = front.Embedding.from_table(qembag.QuantizedTable(rows, 8))
        assert np.array_equal(module(torch.arange(100)).numpy(), table[:])


def test_a_table_is_made_once_and_freed_with_its_rows(bags):
    module, arguments = bags
    module(*arguments)
    number = id(module.rows)
    table = module.table
    assert module.table is table
    assert tensors._made[number].table is table
    rows = weakref.ref(module.rows)
    del module.rows, table
    gc.collect()
    assert rows() is None
    assert number not in tensors._made


def test_rows_that_are_replaced_in_any_way_are_what_is_looked_up(bags, rng):
    module, arguments = bags
    other = front.EmbeddingBag.from_table(a_table(rng, bits=4), mode="sum")
    expected = other(*arguments)
    for replace in (
        lambda fresh: setattr(fresh, "rows", other.rows),
        lambda fresh: setattr(fresh.rows, "data", other.rows.clone()),
        lambda fresh: fresh.rows.copy_(other.rows),
        lambda fresh: fresh.rows.set_(other.rows.clone()),
        lambda fresh: (fresh.rows.share_memory_(), fresh.rows.copy_(other.rows)),
    ):
        fresh = copy.deepcopy(module)
        assert not torch.equal(fresh(*arguments), expected)
        replace(fresh)
        assert torch.equal(fresh(*arguments), expected)


def test_rows_that_are_read_in_another_way_in_place_are_looked_up_so(rng):
    for change in (
        lambda rows: setattr(rows, "data", rows.data.view(torch.bfloat16)),
        lambda rows: rows.as_strided_((8, 8), (0, 1)),
    ):
        module = front.Embedding.from_table(qembag.FloatTable(rng.normal(size=(8, 8)).astype(np.float16)))
        module(torch.arange(8))
        change(module.rows)
        assert torch.equal(module(torch.arange(8)), module.rows.float())


def test_a_table_outlives_its_modules_move_to_shared_memory(bags):
    module, arguments = bags
    table, expected = module.table, module(*arguments)
    values = table[:].copy()
    module.share_memory()
    assert module.rows.is_shared()
    junk = [np.full(2300, 255, np.uint8) for _ in range(100)]  # where the freed rows would have been
    assert np.array_equal(table[:], values)
    assert torch.equal(module(*arguments), expected)
    assert len(junk) == 100


def test_bits_of_bfloat16_can_be_shared():
    source = torch.nn.EmbeddingBag(100, 64, mode="sum", dtype=torch.bfloat16)
    module = front.EmbeddingBag.from_table(from_module(source), mode="sum")
    table = module.table
    values = table[:].copy()
    assert torch.nn.Sequential(module).share_memory()[0].rows.is_shared()
    assert module.rows.dtype == torch.bfloat16
    del source
    assert np.array_equal(module.table[:], values)
    assert np.array_equal(table[:], values)


def look_up_and_write(module, indices, offsets, queue):
    queue.put(module(indices, offsets).tolist())  # a tensor would go with its process
    module.rows.zero_()
    queue.put(None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_share_the_rows(bags, method):
    module, arguments = bags
    expected = module(*arguments)
    module.share_memory()
    context = torch.multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=look_up_and_write, args=(module, *arguments, queue))
    child.start()
    assert queue.get() == expected.tolist()
    assert queue.get() is None
    child.join()
    assert child.exitcode == 0
    assert not module(*arguments).any()


class Bags(torch.utils.data.Dataset):
    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return self.module(torch.tensor([[number, number + 1]]))[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_loader_look_up(bags):
    module = bags[0]
    module(torch.arange(100).repeat(200, 20))  # threads before the fork
    loaded = list(torch.utils.data.DataLoader(Bags(module), batch_size=4, num_workers=2))
    assert torch.equal(torch.cat(loaded), module(torch.tensor([[n, n + 1] for n in range(8)])))


def test_threads_look_up_at_once(bags):
    module, arguments = bags
    expected = module(*arguments)
    wrong = []

    def look_up():
        for _ in range(200):
            own = copy.deepcopy(module)  # tables are made and freed at once too
            if not torch.equal(own(*arguments), expected) or not torch.equal(module(*arguments), expected):
                wrong.append(1)

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- The package -----------------------------------------------------------------------------------------------------


def test_importing_qembag_does_not_import_torch():
    code = "import sys, qembag; assert not {'torch', 'qembag.torch', 'qembag.interop'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_error_says_what_to_install():
    code = """
        import sys
        sys.modules["torch"] = None
        try:
            import qembag.torch
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "qembag.torch needs torch: pip install 'qembag[torch]'\n"
