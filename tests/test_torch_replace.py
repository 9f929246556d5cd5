"""`replace_embedding_bags`: what of a model it swaps, what it keeps, and what it reports."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import qembag

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import qembag.torch as front

INDICES, OFFSETS = torch.arange(20) % 10, torch.tensor([0, 3, 3, 12])


class Model(torch.nn.Module):
    """A recommender in small: many tables, dense layers, and each way to hold a module."""

    def __init__(self, count: int = 26, dim: int = 16) -> None:
        super().__init__()
        self.bags = torch.nn.ModuleList(
            torch.nn.EmbeddingBag(10 + number, dim, mode="sum" if number % 2 else "mean") for number in range(count)
        )
        self.by_name = torch.nn.ModuleDict({"shop": torch.nn.EmbeddingBag(30, dim, mode="max")})
        self.same = self.bags[0]
        self.words = torch.nn.Embedding(12, dim)
        self.top = torch.nn.Linear(dim * (count + 2), 1)

    def forward(self, indices, offsets):
        modules = [*self.bags, self.by_name["shop"], self.same]
        return self.top(torch.cat([module(indices, offsets) for module in modules], 1))


def test_every_bag_is_replaced_once_wherever_it_is():
    model = Model()
    floats = {name: module.weight.detach().numpy() for name, module in model.named_modules() if is_bag(module)}
    report = front.replace_embedding_bags(model, 2, "greedy")
    assert [*report.replaced] == [*floats]
    assert report.kept == {}
    assert model.same is model.bags[0]
    assert isinstance(model.words, torch.nn.Embedding)
    for name, weights in floats.items():
        module = model.get_submodule(name)
        assert type(module) is front.EmbeddingBag
        assert np.array_equal(module.table.data, qembag.quantize(weights, 2, method="greedy").data)
    assert [module.mode for module in model.bags[:2]] == ["mean", "sum"]
    assert model.by_name["shop"].mode == "max"


def is_bag(module):
    return isinstance(module, torch.nn.EmbeddingBag)


def test_a_replaced_model_gives_nearly_the_same_and_compiles_to_the_bit():
    model = Model()
    expected = model(INDICES, OFFSETS)
    front.replace_embedding_bags(model, 8)
    with torch.no_grad():
        found = model(INDICES, OFFSETS)
        assert torch.allclose(found, expected, atol=0.05)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(INDICES, OFFSETS), found)
        torch.compiler.reset()
        assert torch.equal(torch.export.export(model, (INDICES, OFFSETS)).module()(INDICES, OFFSETS), found)


def test_the_report_counts_the_bytes_of_tables():
    model = Model(2)
    report = front.replace_embedding_bags(model, 4)
    assert report.replaced["bags.1"] == (11 * 16 * 4, 11 * (8 + 4))
    assert (report.bytes_before, report.bytes_after) == ((10 + 11 + 30) * 64, (10 + 11 + 30) * 12)
    assert str(report).splitlines()[0] == "3 tables: 0.00 MB to 0.00 MB"
    assert front.replace_embedding_bags(model).replaced == {}


def test_names_or_a_function_choose():
    model = Model(3)
    report = front.replace_embedding_bags(model, names=["bags.1", "same"])
    assert [*report.replaced] == ["bags.0", "bags.1"]
    assert type(model.same) is type(model.bags[0]) is front.EmbeddingBag
    report = front.replace_embedding_bags(model, names=lambda name, module: module.num_embeddings > 12)
    assert [*report.replaced] == ["by_name.shop"]
    with pytest.raises(ValueError, match=r"names must be of modules that can be replaced \(bags.2\), got 'top'"):
        front.replace_embedding_bags(model, names="top")


def test_embeddings_are_replaced_where_asked():
    model = Model(1)
    expected = model.words(INDICES)
    assert "words" in front.replace_embedding_bags(model, 8, embeddings=True).replaced
    assert type(model.words) is front.Embedding
    assert torch.allclose(model.words(INDICES), expected, atol=0.05)


class Own(torch.nn.EmbeddingBag):
    pass


def hooked():
    module = torch.nn.EmbeddingBag(3, 4)
    module.register_forward_hook(lambda *_: None)
    return module


def state_hooked():
    module = torch.nn.EmbeddingBag(3, 4)
    module.register_state_dict_post_hook(lambda *_: None)
    return module


def with_a_forward_of_its_own():
    module = torch.nn.EmbeddingBag(3, 4)
    module.forward = lambda *_: None
    return module


def with_nan():
    module = torch.nn.EmbeddingBag(3, 4)
    module.weight.data[1, 1] = torch.nan
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: torch.nn.EmbeddingBag(3, 4, max_norm=2.0), "max_norm"),
        (lambda: torch.nn.EmbeddingBag(3, 4, device="meta"), "CPU"),
        (lambda: Own(3, 4), "subclass may look up in another way, got Own"),
        (hooked, "hooks"),
        (state_hooked, "hooks"),
        (with_a_forward_of_its_own, "its forward"),
        (with_nan, "1"),
    ],
)
def test_what_cannot_be_replaced_is_kept_with_the_reason(module, reason):
    model = torch.nn.Sequential(module(), torch.nn.EmbeddingBag(3, 4))
    kept = model[0]
    report = front.replace_embedding_bags(model)
    assert reason in report.kept["0"]
    assert model[0] is kept
    assert [*report.replaced] == ["1"]
    assert f"0: kept, {report.kept['0']}" in str(report)


def test_tied_weights_share_a_table_and_those_of_other_layers_are_kept():
    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.EmbeddingBag(10, 4, mode="sum"),
            "b": torch.nn.EmbeddingBag(10, 4, mode="mean"),
            "out": torch.nn.Linear(4, 10),
            "c": torch.nn.EmbeddingBag(10, 4),
        }
    )
    model.b.weight = model.a.weight
    model.c.weight = model.out.weight
    report = front.replace_embedding_bags(model)
    assert model.a.rows.data_ptr() == model.b.rows.data_ptr()
    assert (model.a.mode, model.b.mode) == ("sum", "mean")
    assert report.bytes_before == 160
    assert report.kept == {"c": "its weight is also that of out"}


@pytest.mark.parametrize("kept", [hooked, lambda: torch.nn.EmbeddingBag(3, 4, max_norm=2.0)])
@pytest.mark.parametrize("first", [0, 1])
def test_a_weight_that_stays_in_one_module_stays_in_all(kept, first):
    modules = [kept(), torch.nn.EmbeddingBag(3, 4)]
    modules[1].weight = modules[0].weight
    model = torch.nn.Sequential(*(modules if first == 0 else modules[::-1]))
    report = front.replace_embedding_bags(model)
    assert report.kept[str(1 - first)] == f"its weight is also that of {first}"
    assert report.replaced == {}
    assert all(is_bag(module) for module in model)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        front.replace_embedding_bags({})
    with pytest.raises(TypeError, match=r"names must be .*, got int"):
        front.replace_embedding_bags(Model(1), names=3)


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"method": "best"}, {"group_size": 5}, {"scale_dtype": "int8"}], ids=str
)
def test_a_wrong_option_is_an_error_before_anything_is_replaced(options):
    model = Model(1)
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        front.replace_embedding_bags(model, **options)
    assert is_bag(model.bags[0])


def test_a_model_that_is_a_bag_itself_is_refused():
    with pytest.raises(ValueError, match=r"use EmbeddingBag\.from_float"):
        front.replace_embedding_bags(torch.nn.EmbeddingBag(3, 4))


def test_old_modules_are_freed():
    model = Model(2)
    old = [weakref.ref(module.weight) for module in model.modules() if is_bag(module)]
    front.replace_embedding_bags(model)
    gc.collect()
    assert [weight() for weight in old] == [None] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_quantized_modules_of_torchs_keep_their_codes_and_bits():
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(10, 16, mode="sum"))
    model[0].qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    model[0] = torch.ao.nn.quantized.EmbeddingBag.from_float(model[0])
    expected = model[0](INDICES, OFFSETS)
    report = front.replace_embedding_bags(model, 2)
    assert type(model[0]) is front.EmbeddingBag
    assert report.replaced["0"].after == 10 * (16 + 8)
    assert report.replaced["0"].before >= 10 * (16 + 8)
    assert torch.equal(model[0](INDICES, OFFSETS), expected)
