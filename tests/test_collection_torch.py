"""qembag.torch's modules of collections: the bits of qembag's lookups, and what torch's users do with modules."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
import warnings
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import qembag

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import qembag.torch as front
from qembag.torch import collection_operators

FEATURES = {"x": "dotted.name", "y": "pruned", "z": "dotted.name", "w": "floats"}
BATCH = 3
DIMS = {"x": 24, "y": 16, "z": 24, "w": 8}


def tables_of(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "dotted.name": qembag.quantize(rng.normal(size=(50, 24)).astype(np.float32), bits=4),
        "pruned": qembag.quantize(rng.normal(size=(40, 16)).astype(np.float32), bits=2).prune(np.arange(40) % 3 > 0),
        "floats": qembag.FloatTable(rng.normal(size=(30, 8)).astype(np.float16)),
        "unused": qembag.FloatTable(rng.normal(size=(5, 8)).astype(np.float32)),
    }


def collection_of(rng: np.random.Generator, **options: Any) -> qembag.EmbeddingBagCollection:
    options = {"mode": {"y": "mean"}, "padding_idx": {"x": -1}} | options
    return qembag.EmbeddingBagCollection(tables_of(rng), FEATURES, **options)


def batch_of(rng: np.random.Generator, count: int = 4, batch: int = BATCH) -> tuple[Any, Any]:
    """Indices that each table has, and offsets."""
    lengths = rng.integers(0, 6, count * batch)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(rng.integers(0, 30, ends[-1])), torch.from_numpy(ends)


def by_feature(indices: Any, offsets: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (indices, offsets[k * BATCH : (k + 1) * BATCH + 1]) for k, name in enumerate(FEATURES)}


def bits_of(tensor: Any) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy()


@pytest.fixture
def collection(rng: np.random.Generator) -> qembag.EmbeddingBagCollection:
    return collection_of(rng)


@pytest.fixture
def bags(collection: qembag.EmbeddingBagCollection, rng: np.random.Generator) -> tuple[Any, tuple[Any, Any]]:
    """A module, and arguments for it."""
    return front.EmbeddingBagCollection(collection), batch_of(rng)


@pytest.fixture
def rows(rng: np.random.Generator) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """A module, arguments for it, and what it is to give."""
    collection = qembag.EmbeddingCollection(tables_of(rng), FEATURES)
    given = {name: torch.from_numpy(rng.integers(0, 30, shape)) for name, shape in zip(
        FEATURES, [(4,), (2, 3), (), (0, 5)], strict=True
    )}  # fmt: skip
    expected = collection({name: some.numpy() for name, some in given.items()})
    return front.EmbeddingCollection(collection), given, expected


def same(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, vectors in expected.items():
        assert np.array_equal(found[name].numpy(), vectors)


# ---- The bits --------------------------------------------------------------------------------------------------------


def test_bags_have_the_bits_of_the_collection_however_they_come(collection, bags, rng):
    module, (indices, offsets) = bags
    for kind in (torch.int64, torch.int32):
        given, ends = indices.to(kind), offsets.to(kind)
        expected = collection(indices.numpy(), offsets.numpy())
        assert np.array_equal(module(given, ends).numpy(), expected)
        assert np.array_equal(module(by_feature(given, ends)).numpy(), expected)
        weights = torch.from_numpy(rng.normal(size=len(indices)).astype(np.float32))
        weighted = collection(indices.numpy(), offsets.numpy(), per_sample_weights=weights.numpy())
        assert np.array_equal(module(given, ends, weights).numpy(), weighted)
        own = dict.fromkeys(FEATURES, weights)
        assert np.array_equal(module(by_feature(given, ends), None, own).numpy(), weighted)
        del own["w"], own["x"]
        assert np.array_equal(
            module(by_feature(given, ends), None, own).numpy()[:, 24:64], weighted[:, 24:64]
        )  # fmt: skip
    square = {name: torch.from_numpy(rng.integers(0, 30, (2, number))) for number, name in enumerate(FEATURES)}
    expected = collection({name: some.numpy() for name, some in square.items()})
    assert np.array_equal(module(square).numpy(), expected)


def test_a_result_is_taken_apart(bags, collection):
    module, arguments = bags
    parts = module.split(module(*arguments))
    assert list(parts) == list(FEATURES)
    for name, expected in collection.split(module(*arguments).numpy()).items():
        assert np.array_equal(parts[name].numpy(), expected)
        assert parts[name].shape == (BATCH, DIMS[name])


def test_a_module_is_a_collection_in_its_buffers_memory(bags, collection, rows):
    module, (indices, offsets) = bags
    own = module.collection
    assert (own.features, own.modes, own.invalid) == (collection.features, collection.modes, collection.invalid)
    for name, table in collection.tables.items():
        assert np.shares_memory(own.tables[name].data, table.data)
    assert np.array_equal(own(indices.numpy(), offsets.numpy()), module(indices, offsets).numpy())
    assert isinstance(rows[0].collection, qembag.EmbeddingCollection)
    assert rows[0].collection.features == FEATURES


def test_options_by_feature_are_kept(rng):
    collection = collection_of(
        rng, mode={"x": "max", "y": "sqrtn"}, invalid={"w": "skip"}, padding_idx={"z": np.int64(3)}
    )
    module = front.EmbeddingBagCollection(collection)
    indices, offsets = batch_of(rng)
    indices[offsets[3 * BATCH] :] += 29
    assert np.array_equal(module(indices, offsets).numpy(), collection(indices.numpy(), offsets.numpy()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_collection_s_type_is_the_module_s(rng, dtype):
    collection = collection_of(rng, dtype=dtype)
    module = front.EmbeddingBagCollection(collection)
    indices, offsets = batch_of(rng)
    found = module(indices, offsets)
    assert found.dtype == module.dtype == getattr(torch, dtype)
    expected = collection(indices.numpy(), offsets.numpy())
    assert np.array_equal(bits_of(found), expected.view(np.uint8))


def test_rows_have_the_bits_of_the_collection(rows, rng):
    module, given, expected = rows
    same(module(given), expected)
    indices, offsets = batch_of(rng)
    found = module(indices, offsets)
    for number, name in enumerate(FEATURES):
        own = indices[offsets[number * BATCH] : offsets[(number + 1) * BATCH]]
        table = module.collection.tables[FEATURES[name]]
        assert np.array_equal(found[name].numpy(), table[own.numpy()])
    empty = torch.empty(0, dtype=torch.int64)
    assert [tuple(some.shape) for some in module(empty, torch.zeros(1, dtype=torch.int64)).values()] == [
        (0, dim) for dim in DIMS.values()
    ]


# ---- Arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "offsets", "error", "words"),
    [
        ([0, 1, 50, 3], [0, 1, 2, 3, 4], IndexError, r"indices\[2\] is 50 .*'z'"),
        ([0, 1, 2, 30], [0, 1, 2, 3, 4], IndexError, r"'w'"),
        ([0, -1, 2, 3], [0, 1, 2, 3, 4], IndexError, r"'y'"),
        ([0.0, 1.0], [0, 1, 2, 3, 4], TypeError, "indices must be an array of integers"),
        ([0, 1], [0, 1], ValueError, "offsets must be one and a multiple of 4"),
        ([0, 1], [0, 1, 2, 3, 4], ValueError, "offsets"),
        ([0, 1], None, ValueError, "offsets"),
        ([[0, 1]], [0, 1, 2, 3, 4], ValueError, "indices must have 1 dimension"),
    ],
)
def test_bad_input_is_refused(bags, indices, offsets, error, words):
    with pytest.raises(error, match=words):
        bags[0](torch.tensor(indices), None if offsets is None else torch.tensor(offsets))


def test_features_that_are_missing_or_others_are_refused(bags, rows):
    module, arguments = bags
    given = by_feature(*arguments)
    weights = torch.zeros(len(arguments[0]))
    with pytest.raises(ValueError, match="offsets must be given with the indices of each feature"):
        module(given, arguments[1])
    with pytest.raises(ValueError, match="per_sample_weights must hold the collection's features, got 'v'"):
        module(given, None, {"v": weights})
    for some, refused in ((module, given), (rows[0], rows[1])):
        with pytest.raises(ValueError, match="indices must hold the collection's features, got 'v'"):
            some(refused | {"v": refused["w"]})
        with pytest.raises(ValueError, match="indices must hold the collection's features, got none for 'y'"):
            some({name: value for name, value in refused.items() if name != "y"})


@pytest.mark.parametrize(
    ("indices", "offsets", "error", "words"),
    [
        (torch.arange(3), None, TypeError, "indices must be a dict of tensors, a tensor with offsets"),
        ([1, 2], torch.arange(3), TypeError, "indices must be a dict of tensors"),
        (torch.arange(3), torch.arange(4), ValueError, "offsets must have 1 dimension, a bag of each of 4 features"),
        (torch.arange(3), torch.empty(0, dtype=torch.int64), ValueError, "offsets must have 1 dimension"),
        (torch.zeros(3, 4).long(), torch.arange(5), ValueError, "beside 1-D indices"),
        (torch.arange(3), torch.tensor([0, 1, 2, 3, 4]), ValueError, "lie in 0 to 3"),
        (torch.arange(3), torch.tensor([0, 2, 1, 3, 3]), ValueError, "must not decrease"),
        (torch.arange(3), torch.tensor([-1, 2, 2, 3, 3]), ValueError, "lie in 0 to 3"),
    ],
)
def test_bad_input_for_rows_is_refused(rows, indices, offsets, error, words):
    with pytest.raises(error, match=words):
        rows[0](indices, offsets)


def test_other_objects_are_refused(collection, rows):
    for wrong in (None, rows[0].collection, front.EmbeddingBagCollection(collection)):
        with pytest.raises(TypeError, match=r"collection must be a qembag\.EmbeddingBagCollection, got"):
            front.EmbeddingBagCollection(wrong)
    with pytest.raises(TypeError, match=r"collection must be a qembag\.EmbeddingCollection, got"):
        front.EmbeddingCollection(collection)
    with pytest.raises(ValueError, match="num_threads must be"):
        front.EmbeddingBagCollection(collection, num_threads=0)
    assert np.array_equal(
        front.EmbeddingBagCollection(collection, num_threads=2)(torch.zeros(4).long(), torch.arange(5)).numpy(),
        collection([0] * 4, range(5)),
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda given, weights: given | {"y": (*given["y"], weights)}, ValueError, r"^indices\['y'\] .* a tuple of 3$"),
        (lambda given, weights: given | {"y": given["y"][:1]}, ValueError, r"^indices\['y'\] .* got a tuple of 1$"),
        (lambda given, weights: given | {"y": list(given["y"])}, TypeError, r"^indices\['y'\] must be .*, got list$"),
        (lambda given, weights: given | {"y": None}, TypeError, r"^indices\['y'\] must be .*, got NoneType$"),
        (lambda given, weights: given | {"y": (given["y"][0], None)}, TypeError, r"^indices\['y'\] .*, got NoneType$"),
        (lambda given, weights: given["y"][0].numpy(), TypeError, r"^indices must be a tensor, .*, got an int64 array"),
        (lambda given, weights: None, TypeError, r"^indices must be a tensor, .*, got NoneType$"),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(bags, change, error, words):
    """A tuple of three: weights that would be left out."""
    module, (indices, offsets) = bags
    given = by_feature(indices, offsets)
    with pytest.raises(error, match=words):
        module(change(given, torch.ones(len(indices))))
    with pytest.raises(
        TypeError, match=r"^per_sample_weights must be a dict by feature where indices are, got Tensor$"
    ):
        module(given, per_sample_weights=torch.ones(len(indices)))


@pytest.mark.parametrize(
    ("offsets", "error", "words"),
    [
        (torch.tensor([0.0, 1.0]), TypeError, r"^offsets must be a tensor of integers, got one of torch.float32$"),
        (torch.empty(0, dtype=torch.int64), ValueError, r"^offsets must have 1 dimension, a bag of each of 1 features"),
    ],
)
def test_offsets_of_rows_that_are_none_are_refused(rng, offsets, error, words):
    table = qembag.FloatTable(np.eye(4, dtype=np.float32))
    module = front.EmbeddingCollection(qembag.EmbeddingCollection({"a": table}))
    with pytest.raises(error, match=words):
        module(torch.tensor([1, 2]), offsets)


def test_gradients_of_weights_are_refused_and_not_lost(bags):
    module, arguments = bags
    weights = torch.rand(len(arguments[0]), requires_grad=True)
    with pytest.raises(RuntimeError, match="must not require gradients"):
        module(*arguments, weights)
    with torch.no_grad():
        found = module(*arguments, weights)
    assert torch.equal(found, module(*arguments, weights.detach()))
    assert list(module.parameters()) == []


@pytest.mark.parametrize(
    "plan",
    ["", "[]", "{}", "[1]", "[" * 3000, '[["a", "b", "sum", null, "raise"]]', '[["a", -1, "sum", null, "raise"]]'],
)
def test_a_plan_that_is_none_of_ours_is_refused(bags, plan):
    module, (indices, offsets) = bags
    rows, mappings, layouts = module._parts()
    with pytest.raises(ValueError, match="plan must be one that"):
        torch.ops.qembag.embedding_bag_collection(rows, mappings, [indices], [offsets], [None], layouts, plan)


def test_parts_that_do_not_fit_are_refused(bags):
    module, (indices, offsets) = bags
    rows, mappings, layouts = module._parts()
    call = torch.ops.qembag.embedding_bag_collection
    for some in ((rows[1:], mappings, layouts), (rows, mappings[1:], layouts), (rows, mappings, layouts + "\n")):
        with pytest.raises(ValueError, match="must be as many, got"):
            call(*some[:2], [indices], [offsets], [None], some[2], module.plan)
    for keys in (0, -3, 3):
        with pytest.raises(ValueError, match=f"offsets must be one and as many for each of {keys} keys, got 13"):
            call(rows, mappings, [indices], [offsets], [], layouts, module.plan, places=[0, 1, 2, 3], num_keys=keys)
    with pytest.raises(ValueError, match="zip"):
        call(rows, mappings, [indices], [offsets], [], layouts, module.plan, places=[0, 1], num_keys=4)
    with pytest.raises(ValueError, match="for each of 4 keys, got none"):
        call(rows, mappings, [indices], [None], [], layouts, module.plan, places=[0, 1, 2, 3], num_keys=4)
    with pytest.raises(ValueError, match="indices must be one tensor, or one for each of 4 features, got 2"):
        call(rows, mappings, [indices] * 2, [offsets] * 2, [None] * 2, layouts, module.plan)
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"for each of 4 features, got {count}"):
            torch.ops.qembag.embedding_collection(rows, mappings, [indices] * count, layouts, module.plan)


# ---- torch's compilers -----------------------------------------------------------------------------------------------


def test_modules_are_scripted(bags, rows):
    module, arguments = bags
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of itself
        for dtype in (torch.float32, torch.float64, torch.float16):
            some = copy.deepcopy(module).to(dtype)
            scripted = torch.jit.script(some)
            assert torch.equal(scripted(*arguments), some(*arguments))
        weights = torch.rand(len(arguments[0]))
        assert torch.equal(scripted(*arguments, weights), some(*arguments, weights))
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(*arguments), some(*arguments))
        same(torch.jit.script(rows[0])(rows[1]), rows[2])


def test_modules_are_compiled_whole(bags, rows, rng):
    module, arguments = bags
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (BATCH, 7):
        given = batch_of(rng, batch=batch)
        assert torch.equal(compiled(*given), module(*given))
    given = by_feature(*arguments)
    assert torch.equal(compiled(given), module(given))
    split = torch.compile(lambda *given: module.split(module(*given))["z"] * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(split(*arguments), module.split(module(*arguments))["z"] * 2)
    same(torch.compile(rows[0], backend="aot_eager", fullgraph=True)(rows[1]), rows[2])


@pytest.mark.parametrize("strict", [False, True])
def test_modules_are_exported_for_batches_of_any_size(bags, rows, rng, strict):
    module, arguments = bags
    any_size = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, arguments, dynamic_shapes=(any_size, any_size), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (2, 9):  # torch's own modules too take no batch of 1 then
        given = batch_of(rng, batch=batch)
        assert torch.equal(loaded(*given), module(*given))
    program = torch.export.export(rows[0], (rows[1],), strict=strict)
    same(program.module()(rows[1]), rows[2])


def test_modules_are_traced(bags):
    module, arguments = bags

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bags = module

        def forward(self, indices, offsets):
            return self.bags(indices, offsets) * 2

    traced = torch.fx.symbolic_trace(Model())
    assert torch.equal(traced(*arguments), module(*arguments) * 2)


def test_operators_pass_torch_s_own_checks(bags, rows):
    tables = bags[0]._parts()
    indices, offsets = bags[1]
    torch.library.opcheck(
        torch.ops.qembag.embedding_bag_collection.default,
        (*tables[:2], [indices], [offsets], [None], tables[2], bags[0].plan),
    )
    tables = rows[0]._parts()
    torch.library.opcheck(
        torch.ops.qembag.embedding_collection.default,
        (*tables[:2], list(rows[1].values()), tables[2], rows[0].plan),
    )


# ---- Moved, converted and saved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_converted_module_keeps_its_rows_and_gives_the_type(bags, rows, dtype):
    module, arguments = bags
    expected, state = module(*arguments), copy.deepcopy(module.state_dict())
    converted = torch.nn.Sequential(module).to(dtype)[0]
    assert converted(*arguments).dtype == dtype
    assert torch.equal(converted(*arguments), expected.to(dtype))
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(converted.float()(*arguments), expected)
    found = rows[0].to(dtype)(rows[1])
    assert all(torch.equal(found[name], torch.from_numpy(vectors).to(dtype)) for name, vectors in rows[2].items())


def test_on_another_device_shapes_are_known_and_the_error_says_where(bags, rows):
    module, arguments = bags
    meta = copy.deepcopy(module).to("meta")
    assert meta(*(tensor.to("meta") for tensor in arguments)).shape == (BATCH, sum(DIMS.values()))
    assert meta({name: tuple(part.to("meta") for part in parts) for name, parts in by_feature(*arguments).items()}
                ).shape == (BATCH, 72)  # fmt: skip
    found = copy.deepcopy(rows[0]).to("meta")({name: some.to("meta") for name, some in rows[1].items()})
    assert {name: some.shape for name, some in found.items()} == {name: some.shape for name, some in rows[2].items()}
    with pytest.raises(RuntimeError, match=r"on CPUs only: .* got cpu, meta"):
        collection_operators._elsewhere(meta._parts()[0], [], [arguments[0]])


def test_a_state_has_tensors_only_and_loads_into_tables_of_other_layouts(rng, bags):
    module, arguments = bags
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(module).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert "0.tables.1.compressed_indices_mapping" in state
    empty = {name: np.zeros(table.shape, np.float32) for name, table in module.collection.tables.items()}
    other = front.EmbeddingBagCollection(
        qembag.EmbeddingBagCollection(empty, FEATURES, mode={"y": "mean"}, padding_idx={"x": -1})
    )
    assert not other(*arguments).any()
    torch.nn.Sequential(other).load_state_dict(state)
    assert torch.equal(other(*arguments), module(*arguments))
    assert other.collection.tables["dotted.name"].bits == 4
    torch.nn.Sequential(other).load_state_dict(state, assign=True)
    assert torch.equal(other(*arguments), module(*arguments))


def test_a_state_of_other_tables_is_refused(bags):
    module, _ = bags
    state = module.state_dict()
    tables = list(module.collection.tables.items())
    other = front.EmbeddingBagCollection(qembag.EmbeddingBagCollection(dict([tables[1], tables[0], *tables[2:]])))
    with pytest.raises(RuntimeError, match=r"_extra_state: the tables must be \['pruned', 'dotted.name'"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="_extra_state must be a uint8 tensor"):
        module.load_state_dict(state | {"_extra_state": None})
    with pytest.raises(RuntimeError, match=r"Missing key.*tables\.0\.rows"):
        module.load_state_dict({name: tensor for name, tensor in state.items() if name != "tables.0.rows"})


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_are_the_same_module(bags, copied):
    module, arguments = bags
    module(*arguments)
    twin = copied(module)
    assert repr(twin) == repr(module)
    assert torch.equal(twin(*arguments), module(*arguments))


def test_a_module_says_what_it_is(bags):
    lines = repr(bags[0]).splitlines()
    assert lines[:2] == ["EmbeddingBagCollection(", "  4 features of 4 tables"]
    assert "(0): LookupModule(50, 24, bits=4, dim=24)" in lines[3]


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_a_mapped_collection_stays_mapped(collection, bags, tmp_path):
    _, arguments = bags
    expected = front.EmbeddingBagCollection(collection)(*arguments)
    collection.save(tmp_path / "model.safetensors")
    opened = qembag.EmbeddingBagCollection.from_file(tmp_path / "model.safetensors")
    module = front.EmbeddingBagCollection(opened)
    assert np.shares_memory(module.collection.tables["dotted.name"].data, opened.tables["dotted.name"].data)
    del opened
    assert torch.equal(module(*arguments), expected)
    module.load_state_dict(module.state_dict())  # in place, this would end the process
    assert torch.equal(module(*arguments), expected)


def test_rows_that_are_replaced_in_any_way_are_what_is_looked_up(bags, rng):
    module, arguments = bags
    other = front.EmbeddingBagCollection(collection_of(rng))
    for number in range(3):
        for replace in (
            lambda fresh, own: setattr(fresh, "rows", own.rows),
            lambda fresh, own: setattr(fresh.rows, "data", own.rows.clone()),
            lambda fresh, own: fresh.rows.copy_(own.rows),
            lambda fresh, own: fresh.rows.set_(own.rows.clone()),
            lambda fresh, own: (fresh.rows.share_memory_(), fresh.rows.copy_(own.rows)),
        ):
            fresh, expected = copy.deepcopy(module), copy.deepcopy(module)
            before = fresh(*arguments)
            expected.tables[number].rows = other.tables[number].rows.clone()
            replace(fresh.tables[number], other.tables[number])
            assert torch.equal(fresh(*arguments), expected(*arguments))
            assert not torch.equal(fresh(*arguments), before)


def test_a_mapping_that_moves_to_another_table_moves_its_rows(rng):
    values = rng.normal(size=(4, 8)).astype(np.float32)
    pruned = qembag.QuantizedTable(
        qembag.quantize(values).data, 8, compressed_indices_mapping=np.array([3, 2, 1, 0], np.int32)
    )
    module = front.EmbeddingBagCollection(qembag.EmbeddingBagCollection([pruned, qembag.quantize(values)]))
    arguments = torch.tensor([0, 0]), torch.tensor([0, 1, 2])
    first = module.split(module(*arguments))
    assert torch.equal(first["0"], torch.from_numpy(pruned[[0]]))
    one, two = module.tables
    one.compressed_indices_mapping, two.compressed_indices_mapping = None, one.compressed_indices_mapping
    moved = module.split(module(*arguments))
    assert torch.equal(moved["0"], first["1"])
    assert torch.equal(moved["1"], first["0"])


def test_a_collection_is_made_once_and_freed_with_its_module(bags):
    module, arguments = bags
    module(*arguments)
    made = dict(collection_operators._made)
    module(*arguments)
    assert {place: entry.collection for place, entry in collection_operators._made.items()} == {
        place: entry.collection for place, entry in made.items()
    }
    found = [weakref.ref(entry.collection) for entry in made.values() if entry.source() is module.tables[0].rows]
    assert len(found) == 1
    first = weakref.ref(module.tables[0].rows)
    del module, made
    bags = None
    assert first() is not None  # the fixture's
    count = len(collection_operators._made)
    other = front.EmbeddingBagCollection(qembag.EmbeddingBagCollection([np.ones((3, 4), np.float32)]))
    other(torch.tensor([1]), torch.tensor([0, 1]))
    assert len(collection_operators._made) == count + 1
    del other
    assert len(collection_operators._made) == count


def test_modules_of_shared_tables_do_not_take_each_other_s_collection(rng):
    shared, one, two = (np.full((3, 4), value, np.float32) for value in (1, 2, 3))
    modules = []
    first = front.EmbeddingBagCollection(qembag.EmbeddingBagCollection([shared, one]))
    second = front.EmbeddingBagCollection(qembag.EmbeddingBagCollection([shared, two]))
    second.tables[0].rows = first.tables[0].rows
    modules = [first, second]
    arguments = torch.tensor([0, 0]), torch.tensor([0, 1, 2])
    for _ in range(3):
        assert [module(*arguments)[0, 4].item() for module in modules] == [2, 3]


def test_threads_look_up_at_once(bags):
    module, arguments = bags
    expected, wrong = module(*arguments), []

    def look_up():
        for _ in range(100):
            own = copy.deepcopy(module)  # collections are made and freed at once too
            if not torch.equal(own(*arguments), expected) or not torch.equal(module(*arguments), expected):
                wrong.append(1)

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_module_is_in_shared_memory(bags):
    module, arguments = bags
    expected = module(*arguments)
    module.share_memory()
    assert all(table.rows.is_shared() for table in module.tables)
    assert torch.equal(module(*arguments), expected)


# ---- TorchRec --------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchrec() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fbgemm_gpu", reason="no fbgemm_gpu 1.8.0")
        return pytest.importorskip("torchrec", reason="no torchrec 1.9.2, which pip gets only with --no-deps")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keys", [list(FEATURES), ["w", "v", "z", "y", "x"]])
def test_a_keyed_jagged_tensor_gives_a_keyed_tensor(bags, torchrec, rng, keys, weighted):
    module, _ = bags
    indices, offsets = batch_of(rng, len(keys))
    weights = torch.rand(len(indices)) if weighted else None
    given = torchrec.KeyedJaggedTensor(keys, indices, weights=weights, offsets=offsets)
    found = module(given)
    assert isinstance(found, torchrec.KeyedTensor)
    assert found.keys() == list(FEATURES)
    assert found.length_per_key() == list(DIMS.values())
    assert np.array_equal(found.values().numpy(), module.collection(given))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(given).values(), found.values())
    empty = torchrec.KeyedJaggedTensor(keys, indices[:0], lengths=torch.zeros(0).long(), stride=0)
    assert module(empty).values().shape == (0, 72)
    with pytest.raises(ValueError, match="per_sample_weights must be those of the KeyedJaggedTensor"):
        module(given, None, torch.rand(3))
    with pytest.raises(ValueError, match="offsets must be given with the indices"):
        module(given, offsets)


@pytest.mark.filterwarnings("ignore")
def test_a_keyed_jagged_tensor_gives_jagged_rows(rows, torchrec, rng):
    module, _, _ = rows
    indices, offsets = batch_of(rng, 5)
    given = torchrec.KeyedJaggedTensor(["w", "v", "z", "y", "x"], indices, offsets=offsets)
    found, expected = module(given), module.collection(given)
    assert list(found) == list(FEATURES)
    for name, jagged in found.items():
        assert np.array_equal(jagged.values().numpy(), expected[name])
        assert torch.equal(jagged.lengths(), given[name].lengths())
    with pytest.raises(ValueError, match="offsets must be those of the KeyedJaggedTensor"):
        module(given, offsets)


@pytest.mark.filterwarnings("ignore")
def test_keys_that_are_missing_or_uneven_are_refused(bags, rows, torchrec):
    lengths = torch.tensor([1, 1])
    given = torchrec.KeyedJaggedTensor(["x", "y"], torch.arange(2), lengths=lengths)
    uneven = torchrec.KeyedJaggedTensor(
        ["x", "y"], torch.arange(4), lengths=torch.tensor([1, 1, 2]), stride_per_key_per_rank=[[2], [1]]
    )
    for module in (bags[0], rows[0]):
        with pytest.raises(ValueError, match="indices must have a key for each feature, got none for 'z'"):
            module(given)
    with pytest.raises(ValueError, match="one batch size"):
        bags[0](uneven)
    twice = torchrec.KeyedJaggedTensor(["x", "x"], torch.arange(2), lengths=lengths)
    with pytest.raises(ValueError, match="each key once"):
        bags[0](twice)


@pytest.mark.filterwarnings("ignore")
def test_a_module_takes_the_place_of_torchrec_s(torchrec, rng):
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.quant.embedding_modules import EmbeddingBagCollection as Quantized

    from qembag.interop.torchrec import collection_from_module

    configs = [
        EmbeddingBagConfig(name="t0", embedding_dim=8, num_embeddings=30, feature_names=["a", "b"]),
        EmbeddingBagConfig(name="t1", embedding_dim=16, num_embeddings=30, feature_names=["b"]),
    ]
    for module in (torchrec.EmbeddingBagCollection(tables=configs), Quantized(configs, False, torch.device("cpu"))):
        ours = front.EmbeddingBagCollection(collection_from_module(module))
        indices, offsets = batch_of(rng, 2)
        given = torchrec.KeyedJaggedTensor(["b", "a"], indices, offsets=offsets)
        theirs, found = module(given), ours(given)
        assert found.keys() == theirs.keys() == ["a", "b@t0", "b@t1"]
        assert torch.equal(found.values(), theirs.values())


def test_torchrec_is_not_imported_for_tensors(bags):
    if "torchrec" not in sys.modules:
        bags[0](*bags[1])
        bags[0](by_feature(*bags[1]))
        assert "torchrec" not in sys.modules
