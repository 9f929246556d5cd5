"""torch's own operators on packed rows, computed by qembag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import ops
from ..lookup import embedding_bag
from .operators import bag_count, threads, weights_of
from .tensors import dim_of, packed_text, table_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

# As torch registers them; and as its C++ functions of the `_out` names have them.
ARGUMENTS = (
    "Tensor weight, Tensor indices, Tensor? offsets=None, bool scale_grad_by_freq=False, int mode=0, "
    "bool pruned_weights=False, Tensor? per_sample_weights=None, Tensor? compressed_indices_mapping=None, "
    "bool include_last_offset=False"
)
WIDTHS = {"byte": 8, "4bit": 4, "2bit": 2}


class Registration(NamedTuple):
    """What `register_operators` did: names of operators, with their namespace."""

    defined: tuple[str, ...]
    """Those that torch did not have."""
    overridden: tuple[str, ...]
    """Those of torch whose place qembag's took."""
    completed: tuple[str, ...]
    """Those of torch that now tell their shapes to its compilers."""
    libraries: tuple[torch.library.Library, ...]

    def undo(self) -> None:
        """Take all of them back: torch's own operators are as they were."""
        for library in self.libraries:
            library._destroy()
        _registered.difference_update((*self.defined, *self.overridden, *self.completed))
        _kept[:] = [registration for registration in _kept if registration is not self]


# By name; the libraries live as long as the process, or until they are undone.
_registered: set[str] = set()
_kept: list[Registration] = []


def register_operators(override: bool = False, *, namespace: str = "quantized") -> Registration:
    """Give torch the operators that read packed rows, where it no longer has them.

    They are ``quantized::embedding_bag_byte_rowwise_offsets``, ``embedding_bag_4bit_rowwise_offsets`` and
    ``embedding_bag_2bit_rowwise_offsets``, with torch's signatures, and each with ``_out`` at its name's end, which
    takes the output first and resizes it, as the C++ functions of these names do. Programs that call them, exported,
    scripted or compiled, load and run then. (torch's compilers and `torch.export` take no operators that return an
    argument, as those of the `_out` names do.) Operators that torch has, and that do not tell their shapes, learn to:
    `torch.compile` and `torch.export` need that.

    Operators on packed parameters, such as ``quantized::embedding_bag_byte`` and the modules of
    ``torch.ao.nn.quantized``, take an object of a C++ class of torch's, and cannot be had from Python where a torch has
    lost it. Take the tables out of such models: `EmbeddingBag.from_quantized`, `qembag.load_tables`.

    Parameters
    ----------
    override : bool
        Also take the place of the operators that torch has, on CPUs. The bits of results are torch's; bad input gets
        the errors of `qembag.ops` in place of undefined results.
    namespace : str
        Where to register; another one than "quantized" is for tests.

    Returns
    -------
    Registration
        What was done; `Registration.undo` takes it back. Operators that an earlier call registered are left as they
        are.

    Notes
    -----
    As torch's operators do, these always sum: `mode` is accepted and ignored. They take as many threads as both
    `torch.get_num_threads` and `qembag.get_num_threads` allow.

    Examples
    --------
    >>> import qembag.torch
    >>> done = qembag.torch.register_operators(override=True)
    >>> done.overridden[0]
    'quantized::embedding_bag_byte_rowwise_offsets'
    >>> done.undo()
    """
    defines = torch.library.Library(namespace, "FRAGMENT")
    defined, overridden, completed = [], [], []
    for width, bits in WIDTHS.items():
        name = f"embedding_bag_{width}_rowwise_offsets"
        kernel, into, shapes = _functions_of(width, bits)
        if not _is_there(namespace, name):
            defines.define(f"{name}({ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
            defines.impl(name, kernel, "CPU")
            defines.impl(name, shapes, "Meta")
            defined.append(f"{namespace}::{name}")
        elif f"{namespace}::{name}" in _registered:
            pass
        elif override:
            # Before the choice of a backend. To replace torch's kernel for CPUs would make it warn, and could not be
            # undone while others have replaced it too.
            defines.impl(name, _on_cpus(kernel, shapes, namespace, name), "BackendSelect")
            overridden.append(f"{namespace}::{name}")
        elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "Meta"):
            defines.impl(name, shapes, "Meta")
            completed.append(f"{namespace}::{name}")
        if not _is_there(namespace, f"{name}_out"):
            defines.define(f"{name}_out(Tensor(a!) output, {ARGUMENTS}) -> Tensor(a!)")
            defines.impl(f"{name}_out", into, "CPU")
            defined.append(f"{namespace}::{name}_out")
    done = Registration(tuple(defined), tuple(overridden), tuple(completed), (defines,))
    _registered.update((*defined, *overridden))
    _kept.append(done)
    return done


def _is_there(namespace: str, name: str) -> bool:
    return hasattr(getattr(torch.ops, namespace), name)


def _functions_of(width: str, bits: int) -> tuple[Callable[..., torch.Tensor], ...]:
    """The operator, the one of the `_out` name, and the one that only says what shape the result has."""
    layout = packed_text(bits)
    bad = getattr(ops, f"embedding_bag_{width}_rowwise_offsets")

    def kernel(
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        scale_grad_by_freq: bool = False,
        mode: int = 0,
        pruned_weights: bool = False,
        per_sample_weights: torch.Tensor | None = None,
        compressed_indices_mapping: torch.Tensor | None = None,
        include_last_offset: bool = False,
        out: NDArray[np.float32] | None = None,
    ) -> torch.Tensor:
        numbers = indices.numpy()
        starts = None if offsets is None else offsets.numpy()
        weights = weights_of(per_sample_weights)
        try:
            table = table_of(weight, mapping_of(pruned_weights, compressed_indices_mapping), layout)
        except (TypeError, ValueError, IndexError):
            # Bad arguments, which get an error by their own names here; or a mapping of which only entries that are
            # not used are bad.
            mapping = None if compressed_indices_mapping is None else compressed_indices_mapping.numpy()
            options = (False, 0, pruned_weights, weights, mapping, include_last_offset)
            return torch.from_numpy(bad(weight.numpy(), numbers, starts, *options, out=out))
        found = embedding_bag(
            table,
            numbers,
            starts,
            per_sample_weights=weights,
            include_last_offset=include_last_offset,
            out=out,
            num_threads=threads(),
        )
        return torch.from_numpy(found)

    def shapes(
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        scale_grad_by_freq: bool = False,
        mode: int = 0,
        pruned_weights: bool = False,
        per_sample_weights: torch.Tensor | None = None,
        compressed_indices_mapping: torch.Tensor | None = None,
        include_last_offset: bool = False,
    ) -> torch.Tensor:
        count = bag_count(indices, offsets, include_last_offset)
        return weight.new_empty((count, dim_of(weight, layout)), dtype=torch.float32)

    def into(
        output: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, *rest: Any, **named: Any
    ) -> torch.Tensor:
        shape = shapes(weight.to("meta"), indices, *rest, **named).shape
        if output.shape != shape:
            output.resize_(shape)
        kernel(weight, indices, *rest, **{**named, "out": output.detach().numpy()})
        return output

    return kernel, into, shapes


def mapping_of(pruned_weights: bool, mapping: torch.Tensor | None) -> torch.Tensor | None:
    """As torch's operators take it: ignored unless rows are pruned."""
    if pruned_weights and mapping is None:
        raise ValueError  # `qembag.ops` says it better
    return mapping if pruned_weights else None


def _on_cpus(
    kernel: Callable[..., torch.Tensor], shapes: Callable[..., torch.Tensor], namespace: str, name: str
) -> Callable[..., torch.Tensor]:
    operator = getattr(getattr(torch.ops, namespace), name).default
    before_backends = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)

    def chosen(weight: torch.Tensor, indices: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if weight.is_cpu and indices.is_cpu:
            return kernel(weight, indices, *rest, **named)
        if weight.is_meta:
            return shapes(weight, indices, *rest, **named)
        with torch._C._ExcludeDispatchKeyGuard(before_backends):
            found: torch.Tensor = operator(weight, indices, *rest, **named)
        return found

    return chosen
