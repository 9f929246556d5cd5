"""qembag's operators in torch's dispatcher, and torch's own computed by qembag."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

import qembag

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import qembag.torch as front
from qembag.torch import operators, register, tensors

OFFSETS = torch.tensor([0, 3, 3, 20])
WIDTHS = {"byte": 8, "4bit": 4, "2bit": 2}
BAGS = torch.ops.qembag.embedding_bag.default
ROWS = torch.ops.qembag.embedding.default
SCRIPTING = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def bags(rng):
    table = qembag.quantize(rng.normal(size=(100, 36)).astype(np.float32), 4)
    return front.EmbeddingBag.from_table(table, mode="sum"), (torch.from_numpy(rng.integers(0, 100, 40)), OFFSETS)


@pytest.fixture
def fresh():
    """Compilers of torch keep what they compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- Our own -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2, 32])
@pytest.mark.parametrize("pruned", [False, True])
def test_torchs_own_checks_of_operators_pass(rng, bits, pruned):
    floats = rng.normal(size=(50, 20)).astype(np.float32)
    table = qembag.FloatTable(floats) if bits == 32 else qembag.quantize(floats, bits)
    if pruned:
        table = table.prune(rng.random(50) < 0.5)
    rows, layout = tensors.rows_of(table), tensors.layout_text(table)
    mapping = None if not pruned else torch.from_numpy(table.compressed_indices_mapping)
    indices, weights = torch.from_numpy(rng.integers(0, 50, 40)), torch.rand(40)
    for dtype in (None, torch.float16, torch.bfloat16):
        torch.library.opcheck(BAGS, (rows, indices, OFFSETS, weights, mapping, layout, "sum", False, 3, dtype))
        torch.library.opcheck(BAGS, (rows, indices.view(4, 10), None, None, mapping, layout, "max", True, None, dtype))
        torch.library.opcheck(ROWS, (rows, indices.view(4, 2, 5), mapping, layout, dtype))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@SCRIPTING  # inductor scripts something of its own
@pytest.mark.usefixtures("fresh")
def test_compiled_modules_have_no_break_and_the_same_bits_for_any_batch(bags, backend):
    module, (indices, offsets) = bags
    model = torch.nn.Sequential(Both(module), torch.nn.Linear(72, 3))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for count in (2, 3, 4):
            given = (indices[: 10 * count], offsets[:count])
            assert torch.allclose(compiled(given), model(given), atol=1e-5)
    looked_up = torch.compile(module, backend=backend, fullgraph=True)
    assert torch.equal(looked_up(indices, offsets), module(indices, offsets))


class Both(torch.nn.Module):
    """Bags twice over, and between them what torch computes."""

    def __init__(self, bags):
        super().__init__()
        self.bags = bags

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        indices, offsets = given
        found = self.bags(indices, offsets)
        weights = found.sum() * torch.ones_like(indices, dtype=torch.float32)
        return torch.cat([found, self.bags(indices, offsets, weights.detach())], 1)


@pytest.mark.usefixtures("fresh")
def test_a_compiled_module_gives_the_error_of_a_bad_index(bags):
    compiled = torch.compile(bags[0], backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"indices\[0\] is 100"):
        compiled(torch.tensor([100]), torch.tensor([0]))


LOADS_AND_RUNS = """
    import sys
    import torch
    import qembag.torch
    kind, path, given, expected = sys.argv[1:]
    program = torch.export.load(path).module() if kind == "exported" else torch.jit.load(path)
    assert torch.equal(program(*torch.load(given)), torch.load(expected))
"""


def check_in_another_process(kind, path, given, expected, tmp_path):
    torch.save(given, tmp_path / "given")
    torch.save(expected, tmp_path / "expected")
    command = [sys.executable, "-c", textwrap.dedent(LOADS_AND_RUNS), kind]
    subprocess.run([*command, path, tmp_path / "given", tmp_path / "expected"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("fresh")
def test_an_exported_program_runs_in_another_process_at_another_batch(bags, tmp_path, strict):
    module, (indices, offsets) = bags
    shapes = ({0: torch.export.Dim("n")}, {0: torch.export.Dim("bags")})
    program = torch.export.export(module, (indices, offsets), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    given = (indices[:7], offsets[:2])
    check_in_another_process("exported", tmp_path / "program.pt2", given, module(*given), tmp_path)


@pytest.mark.slow
@SCRIPTING
def test_a_scripted_module_runs_in_another_process(bags, tmp_path):
    module, given = bags
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(*given), module(*given))
    torch.jit.save(scripted, tmp_path / "script.pt")
    check_in_another_process("scripted", tmp_path / "script.pt", given, module(*given), tmp_path)


@SCRIPTING
def test_embeddings_and_other_types_of_output_can_be_scripted(bags, rng):
    rows = front.Embedding.from_table(bags[0].table)
    given = torch.from_numpy(rng.integers(0, 100, (2, 3)))
    assert torch.equal(torch.jit.script(rows)(given), rows(given))
    for dtype in (torch.float16, torch.float64):
        module = bags[0].to(dtype)
        assert torch.equal(torch.jit.script(module)(*bags[1]), module(*bags[1]))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("[" * 900, "layout must be"),
        ("{" + " " * 2000 + '"bits": 4}', "layout must be"),
        ('{"dim": 4}', "layout must be"),
        ('{"bits": 4, "row_bytes": 4}', "layout must be"),
        ('{"bits": 7}', "bits must be 8, 4 or 2, got 7"),
        ('{"bits": 4, "dim": 1000}', "dim must be from 1 to 64"),
        ('{"bits": 4, "group_size": 3}', "group_size"),
    ],
)
def test_layouts_that_nobody_wrote_are_refused(layout, words):
    rows, indices = torch.zeros(3, 36, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        torch.ops.qembag.embedding_bag(rows, indices, layout=layout)


def test_a_mapping_of_one_entry_is_read_at_each_call():
    rows = tensors.rows_of(qembag.FloatTable(np.ones((3, 2), np.float32)))
    mapping, indices = torch.tensor([-1], dtype=torch.int32), torch.tensor([[0]])
    assert not torch.ops.qembag.embedding_bag(rows, indices, compressed_indices_mapping=mapping).any()
    mapping.zero_()  # which says that nothing is pruned
    assert torch.ops.qembag.embedding_bag(rows, indices + 2, compressed_indices_mapping=mapping).all()


def test_a_second_copy_of_the_package_uses_the_operators_of_the_first():
    assert operators._LIBRARY is not None
    assert operators._register() is None


# ---- torch's -----------------------------------------------------------------------------------------------------------


def operator(width, namespace="quantized", end=""):
    return getattr(getattr(torch.ops, namespace), f"embedding_bag_{width}_rowwise_offsets{end}")


@pytest.fixture
def registered():
    """Registers, and takes all of it back at the end."""
    done = []

    def call(*arguments, **named):
        done.append(front.register_operators(*arguments, **named))
        return done[-1]

    yield call
    for registration in reversed(done):
        registration.undo()


counter = itertools.count()


@pytest.fixture
def namespace(registered):
    """Where torch has no such operators."""
    name = f"qembag_test_{next(counter)}"
    registered(namespace=name)
    return name


def cases(rng, bits, num_rows=60):
    """Arguments after `weight` for torch's operators, that they answer right."""
    offsets = torch.tensor([0, 5, 5, 17])
    indices = torch.from_numpy(rng.integers(0, num_rows, 30))
    weights = torch.from_numpy(rng.normal(size=30).astype(np.float32))
    mapping = torch.full((2 * num_rows,), -1, dtype=torch.int32)
    mapping[rng.permutation(2 * num_rows)[:num_rows]] = torch.arange(num_rows, dtype=torch.int32)
    for given, starts in itertools.product((indices, indices.int()), (offsets, offsets.int())):
        yield (given, starts), {}
        yield (given, starts, True, 1), {"per_sample_weights": weights}
        yield (given * 2, starts), {"pruned_weights": True, "compressed_indices_mapping": mapping}
        yield (given, starts), {"compressed_indices_mapping": mapping}  # which is ignored
        last = torch.cat([starts, torch.tensor([30], dtype=starts.dtype)])
        yield (given, last), {"include_last_offset": True, "per_sample_weights": weights}
    yield (indices.view(5, 6),), {"mode": 2}
    unpruned = torch.zeros(1, dtype=torch.int32)
    yield (indices, offsets), {"pruned_weights": True, "compressed_indices_mapping": unpruned}


def packed(rng, width, num_rows=60, dim=32):
    return getattr(torch.ops.quantized, f"embedding_bag_{width}_prepack")(
        torch.from_numpy(rng.normal(size=(num_rows, dim)).astype(np.float32))
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_operators_that_a_torch_lacks_have_its_schema_and_bits(rng, width, namespace):
    rows = packed(rng, width)
    theirs, ours = operator(width), operator(width, namespace)
    assert str(ours.default._schema) == str(theirs.default._schema).replace("quantized::", f"{namespace}::")
    for arguments, named in cases(rng, WIDTHS[width]):
        expected = theirs(rows, *arguments, **named)
        assert torch.equal(ours(rows, *arguments, **named), expected)
        output = torch.full((1,), torch.nan)
        assert operator(width, namespace, "_out")(output, rows, *arguments, **named) is output
        assert torch.equal(output, expected)
        shape = ours(rows.to("meta"), *[part.to("meta") if isinstance(part, torch.Tensor) else part
                                        for part in arguments], **on_meta(named)).shape  # fmt: skip
        assert shape == expected.shape


def on_meta(named):
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in named.items()}


@pytest.mark.parametrize("width", WIDTHS)
def test_operators_that_take_the_place_of_torchs_have_its_bits_and_go_again(rng, width, registered):
    rows = packed(rng, width)
    everything = list(cases(rng, WIDTHS[width]))
    expected = [operator(width)(rows, *arguments, **named) for arguments, named in everything]
    bad = (rows, torch.tensor([60]), torch.tensor([0]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        done = registered(override=True)
    assert seen == []
    assert f"quantized::embedding_bag_{width}_rowwise_offsets" in done.overridden
    for guard in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with guard():
            for (arguments, named), answer in zip(everything, expected, strict=True):
                assert torch.equal(operator(width)(rows, *arguments, **named), answer)
            with pytest.raises(IndexError, match=r"indices\[0\] is 60 .bag 0.: out of range for a table of 60 rows"):
                operator(width)(*bad)
    assert registered(override=True)[:3] == ((), (), ())
    done.undo()
    with pytest.raises(RuntimeError):
        operator(width)(*bad)
    assert front.register_operators.__module__ == "qembag.torch.register"


@pytest.mark.parametrize("width", WIDTHS)
def test_on_other_devices_torchs_operators_stay(rng, width, registered):
    rows, given = packed(rng, width), (torch.tensor([1, 2]), torch.tensor([0]))
    expected = operator(width)(rows, *given)
    name = f"embedding_bag_{width}_rowwise_offsets"
    registered(override=True)
    chosen = register._on_cpus(None, None, "quantized", name)
    assert torch.equal(chosen(rows.as_subclass(Elsewhere), *given).as_subclass(torch.Tensor), expected)


class Elsewhere(torch.Tensor):
    """On the CPU, but does not say so: there is no other device here."""

    is_cpu = False


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.zeros(3, 36)}, TypeError, "weight must be an array of uint8"),
        ({"weight": torch.zeros(3, 3, dtype=torch.uint8)}, ValueError, "weight must have rows of at least"),
        ({"offsets": None}, ValueError, "offsets"),
        ({"offsets": torch.tensor([2, 0])}, ValueError, "offsets"),
        ({"pruned_weights": True}, ValueError, "compressed_indices_mapping must be given"),
        ({"per_sample_weights": torch.zeros(0)}, ValueError, "per_sample_weights"),
        ({"indices": torch.tensor([-1])}, IndexError, "is -1"),
    ],
)
def test_what_torch_answers_with_undefined_results_is_an_error(namespace, change, error, words):
    given = {"weight": torch.zeros(3, 36, dtype=torch.uint8), "indices": torch.tensor([0, 1]), "offsets": OFFSETS[:1]}
    for width in ("4bit", "byte"):
        with pytest.raises(error, match=words):
            operator(width, namespace)(**{**given, **change})


def test_only_entries_of_a_mapping_that_are_used_must_be_right(rng, namespace):
    rows = packed(rng, "4bit")
    mapping = torch.tensor([5, 1000], dtype=torch.int32)
    given = {"pruned_weights": True, "compressed_indices_mapping": mapping}
    found = operator("4bit", namespace)(rows, torch.tensor([[0]]), **given)
    assert torch.equal(found, operator("4bit")(rows, torch.tensor([[5]])))
    with pytest.raises(IndexError, match="1000"):
        operator("4bit", namespace)(rows, torch.tensor([[1]]), **given)


# ---- Models --------------------------------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """A model of many tables as exported ones have them: torch's operators on packed rows."""

    def __init__(self, tables: list[torch.Tensor]) -> None:
        super().__init__()
        self.tables = torch.nn.ParameterList([torch.nn.Parameter(rows, requires_grad=False) for rows in tables])
        self.top = torch.nn.Linear(16 * len(tables), 1)

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        found = [
            torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(rows, indices[number], offsets[number])
            for number, rows in enumerate(self.tables)
        ]
        return self.top(torch.cat(found, 1))


@SCRIPTING
@pytest.mark.usefixtures("fresh")
def test_a_model_exported_traced_and_compiled_gives_the_same_when_operators_are_replaced(rng, registered):
    model = Scripted([packed(rng, "4bit", 100, 16) for _ in range(26)]).eval()
    given = (torch.from_numpy(rng.integers(0, 100, (26, 40))), torch.arange(0, 40, 4).repeat(26, 1))
    registered()  # torch's 4- and 2-bit operators do not tell their shapes
    program = torch.export.export(model, given)
    file = io.BytesIO()
    torch.export.save(program, file)
    traced = torch.jit.trace(model, given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(*given)
        compiled(*given)
        registered(override=True)
        file.seek(0)
        for again in (model, program.module(), torch.export.load(file).module(), traced, compiled):
            assert torch.equal(again(*given), expected)
        with pytest.raises(RuntimeError, match="IndexError: indices"):
            traced(given[0] + 100, given[1])
        with pytest.raises(IndexError):
            compiled(given[0] + 100, given[1])
        torch.compiler.reset()
        assert torch.equal(compiled(*given), expected)


class OneTable(torch.nn.Module):
    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.embedding_bag_2bit_rowwise_offsets(self.rows, indices, offsets)


@SCRIPTING
def test_a_script_gives_the_same_when_operators_are_replaced(rng, registered):
    scripted = torch.jit.script(OneTable(packed(rng, "2bit")))
    given = (torch.tensor([1, 2, 3]), torch.tensor([0, 1]))
    expected = scripted(*given)
    registered(override=True)
    for _ in range(3):  # the first calls profile, later ones are optimized
        assert torch.equal(scripted(*given), expected)
    with pytest.raises(Exception, match="out of range for a table of 60 rows"):
        scripted(given[0] + 100, given[1])


def test_nothing_is_kept_of_what_is_undone():
    kept = [*front.register._kept]
    front.register_operators(namespace=f"qembag_test_{next(counter)}").undo()
    assert front.register._kept == kept
