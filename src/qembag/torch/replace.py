"""A model's embedding bags, replaced by quantized ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from ..interop.tensors import has_class
from ..quantize import quantize
from .modules import Embedding, EmbeddingBag, refuse_max_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import DTypeLike

    from ..float_table import FloatTable
    from ..table import QuantizedTable

# What is replaced, and by what. torch.ao's are told by their names: to import them is slow.
FLOATS: dict[type[torch.nn.Module], type[EmbeddingBag | Embedding]] = {
    torch.nn.EmbeddingBag: EmbeddingBag,
    torch.nn.Embedding: Embedding,
}
QUANTIZED: dict[str, type[EmbeddingBag | Embedding]] = {"EmbeddingBag": EmbeddingBag, "Embedding": Embedding}
TORCH_AO = "torch.ao.nn.quantized.modules.embedding_ops"
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Replaced(NamedTuple):
    """Bytes of a module's table before and after; 0 where it is that of a module before it."""

    before: int
    after: int


class Report(NamedTuple):
    """What `replace_embedding_bags` did; as text, for people."""

    replaced: dict[str, Replaced]
    kept: dict[str, str]
    """Modules that it did not replace, and why."""

    @property
    def bytes_before(self) -> int:
        return sum(sizes.before for sizes in self.replaced.values())

    @property
    def bytes_after(self) -> int:
        return sum(sizes.after for sizes in self.replaced.values())

    def __str__(self) -> str:
        count = len(self.replaced)
        lines = [f"{count} table{'' if count == 1 else 's'}: {_sizes(self.bytes_before, self.bytes_after)}"]
        lines += [f"  {name}: {_sizes(*sizes)}" for name, sizes in self.replaced.items()]
        lines += [f"  {name}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def _sizes(before: int, after: int) -> str:
    return f"{before / 1e6:.2f} MB to {after / 1e6:.2f} MB"


def replace_embedding_bags(
    model: torch.nn.Module,
    bits: int = 4,
    method: Literal["minmax", "greedy", "lsq"] = "lsq",
    *,
    names: Iterable[str] | Callable[[str, torch.nn.Module], bool] | None = None,
    embeddings: bool = False,
    scale_dtype: DTypeLike | None = None,
    group_size: int | None = None,
    num_threads: int | None = None,
) -> Report:
    """Replace a model's embedding bags by quantized ones, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Its `torch.nn.EmbeddingBag` and `torch.ao.nn.quantized.EmbeddingBag` modules are replaced, at any depth, those
        with a weight of torchao's too; a module that is there several times, once. Modules with one weight share one
        table. Each old module is freed before the next is quantized, if nothing else refers to it.
    bits, method, scale_dtype, group_size
        As for `qembag.quantize`; modules that are quantized already keep their codes.
    names : iterable of str, or callable, optional
        Which ones: names as `Module.named_modules` gives them, or a function of name and module that says whether.
    embeddings : bool
        Replace `torch.nn.Embedding` and `torch.ao.nn.quantized.Embedding` modules too.
    num_threads : int, optional
        As for `EmbeddingBag`.

    Returns
    -------
    Report
        Bytes of each table before and after, and the modules that are kept, with the reason: a `max_norm`, which
        changes rows as they are looked up; hooks; a subclass, or a `forward` of its own; a weight that other modules
        use; rows that cannot be quantized, such as those that hold a NaN; another device.

    Raises
    ------
    TypeError, ValueError
        If an option is wrong; if a name is not of such a module; if `model` itself is an embedding bag, which has no
        place to put another one: use `EmbeddingBag.from_float`.

    Examples
    --------
    >>> import torch, qembag.torch
    >>> model = torch.nn.Sequential(torch.nn.EmbeddingBag(100_000, 64, mode="sum"), torch.nn.Linear(64, 1))
    >>> print(qembag.torch.replace_embedding_bags(model, 4, "minmax"))
    1 table: 25.60 MB to 3.60 MB
      0: 25.60 MB to 3.60 MB
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options: dict[str, Any] = {"method": method, "scale_dtype": scale_dtype, "group_size": group_size}
    quantize(np.zeros((1, 1), np.float32), bits, **options)  # raises if an option is wrong
    groups = _chosen(model, _places(model, embeddings), names)
    report = Report({}, _kept(model, groups))
    tables: dict[int, QuantizedTable | FloatTable] = {}
    for places in groups:
        if places[0] in report.kept:
            continue
        module: Any = model.get_submodule(places[0])
        try:
            is_first = id(module._parameters.get("weight")) not in tables
            new = _replacement(module, bits, num_threads, options, tables)
        except (TypeError, ValueError) as error:
            report.kept[places[0]] = str(error)
            continue
        sizes = (_bytes_of(module), new.table.nbytes) if is_first else (0, 0)
        report.replaced[places[0]] = Replaced(*sizes)
        for name in places:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return report


def _kind_of(module: torch.nn.Module) -> type[EmbeddingBag | Embedding] | None:
    """The class of the module that replaces this one."""
    for kind in type(module).__mro__:
        if kind in FLOATS:
            return FLOATS[kind]
        if kind.__module__.startswith(TORCH_AO):
            return QUANTIZED.get(kind.__name__)
    return None


def _places(model: torch.nn.Module, embeddings: bool) -> list[list[str]]:
    """The names of each module that could be replaced: several where it is shared."""
    kinds = (EmbeddingBag, Embedding) if embeddings else (EmbeddingBag,)
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _kind_of(module) in kinds:
            found.setdefault(id(module), []).append(name)
    if found.get(id(model)):
        raise ValueError("model must hold embedding bags, not be one: use EmbeddingBag.from_float for that")
    return list(found.values())


def _chosen(
    model: torch.nn.Module,
    places: list[list[str]],
    names: Iterable[str] | Callable[[str, torch.nn.Module], bool] | None,
) -> list[list[str]]:
    if names is None:
        return places
    if callable(names):
        return [some for some in places if any(names(name, model.get_submodule(name)) for name in some)]
    try:
        asked = {names} if isinstance(names, str) else set(names)
    except TypeError:
        raise TypeError(f"names must be names of modules, or a function, got {type(names).__name__}") from None
    unknown = sorted(asked - {name for some in places for name in some})
    if unknown:
        known = ", ".join(some[0] for some in places) or "none"
        raise ValueError(f"names must be of modules that can be replaced ({known}), got {unknown[0]!r}")
    return [some for some in places if asked & set(some)]


def _kept(model: torch.nn.Module, groups: list[list[str]]) -> dict[str, str]:
    """Modules that cannot be replaced, and why, as far as that shows before anything is quantized."""
    kept = {}
    for places in groups:
        try:
            _check(model.get_submodule(places[0]))
        except ValueError as error:
            kept[places[0]] = str(error)
    replaced = {name for places in groups if places[0] not in kept for name in places}
    users = _users(model)
    for places in groups:
        weight = model.get_submodule(places[0])._parameters.get("weight")
        others = [name for name in users.get(id(weight), []) if name not in replaced]
        # A copy in codes, beside floats that stay, would take more memory and not less.
        if others and places[0] not in kept:
            kept[places[0]] = f"its weight is also that of {others[0] or 'the model itself'}"
    return kept


def _users(model: torch.nn.Module) -> dict[int, list[str]]:
    """The modules that have each parameter, by its id."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def _check(module: torch.nn.Module) -> None:
    """Raises ValueError if another module would not do the same."""
    kind = type(module)
    if kind not in FLOATS and not kind.__module__.startswith(TORCH_AO):
        raise ValueError(f"a subclass may look up in another way, got {kind.__name__}")
    if "forward" in vars(module):
        raise ValueError("its forward is one of its own")
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        raise ValueError("its hooks would be lost")
    refuse_max_norm(module)


def _replacement(
    module: Any,
    bits: int,
    num_threads: int | None,
    options: dict[str, Any],
    tables: dict[int, QuantizedTable | FloatTable],
) -> EmbeddingBag | Embedding:
    kind = _kind_of(module)
    assert kind is not None
    if type(module) not in FLOATS or _is_torchao(module.weight):
        return kind.from_quantized(module, num_threads=num_threads)
    # Modules that share a weight share a table.
    number = id(module.weight)
    if number in tables:
        return kind._like(module, tables[number], num_threads)
    new = kind.from_float(module, bits, num_threads=num_threads, **options)
    tables[number] = new.table
    return new


def _is_torchao(weight: object) -> bool:
    return has_class(weight, "torchao", "IntxUnpackedToInt8Tensor")


def _bytes_of(module: Any) -> int:
    """Of a module's table: floats, or codes with scales and zero points."""
    if type(module) in FLOATS:
        weight = module.weight
        parts = [weight.qdata, weight.scale, weight.zero_point] if _is_torchao(weight) else [weight]
        return sum(int(part.nbytes) for part in parts)
    weight = module.weight()
    pairs = [weight.q_per_channel_scales(), weight.q_per_channel_zero_points()]
    return int(weight.untyped_storage().nbytes() + sum(part.nbytes for part in pairs))
