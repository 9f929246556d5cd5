"""Collections of tables as modules: one call for all of their features."""

# No `from __future__ import annotations`: torch.jit.script reads those of methods.
import itertools
import json
from collections.abc import Mapping
from typing import Any, Callable, ClassVar, Self  # noqa: UP035 (torch.jit.script knows them)

import torch
from torch import Tensor

from .. import _arguments
from .. import collection as ours
from .._batches import key_of
from .._errors import kind_of, shown
from ..interop.tensors import has_class
from .collection_operators import bags_collection, rows_collection
from .lookup_module import LookupModule, text_of

DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}


class CollectionModule(torch.nn.Module):
    """The tables of a collection as modules that hold their parts as buffers: the base of both modules."""

    # For torch.jit.script.
    __constants__: ClassVar[list[str]] = ["num_threads", "dtype", "plan"]
    __jit_unused_properties__: ClassVar[list[str]] = ["collection"]

    def __init__(self, given: Any, kind: Any, num_threads: int | None) -> None:
        super().__init__()
        if not isinstance(given, kind):
            raise TypeError(f"collection must be a qembag.{kind.__name__}, got {kind_of(given)}")
        self.dtype = DTYPES[_arguments.out_type(given.dtype, None).number]
        self.num_threads = None if num_threads is None else _arguments.num_threads(num_threads, "num_threads")
        self.features, self.dims = given.features, given.dims
        self.names = list(given.tables)
        self.tables = torch.nn.ModuleList(LookupModule(table, None, None) for table in given.tables.values())
        modes: dict[str, str] = getattr(given, "modes", {})
        # Integers of NumPy's are none for JSON.
        padding = {name: int(row) for name, row in getattr(given, "padding_idx", {}).items() if row is not None}
        # What the operators take of each feature: its name, table, mode, padding index, and what it does with bad ones.
        self.plan = json.dumps(
            [
                [name, self.names.index(table), modes.get(name), padding.get(name), given.invalid[name]]
                for name, table in given.features.items()
            ]
        )

    def _tables_by_name(self) -> dict[str, Any]:
        return {name: module.table for name, module in zip(self.names, self.tables, strict=True)}

    def _parts(self) -> tuple[list[Tensor], list[Tensor | None], str]:
        """Each table's rows, its mapping (none at all if no table is pruned), and the layouts, one a line."""
        rows: list[Tensor] = []
        mappings: list[Tensor | None] = []
        layouts: list[str] = []
        if torch.jit.is_scripting():
            for table in self.tables:
                rows.append(table.rows)
                mappings.append(table.compressed_indices_mapping)
                layouts.append(table.layout)
        else:
            # A buffer takes 0.1 us here, and 0.6 us as a module's attribute.
            for module in self.tables._modules.values():
                buffers: Any = module._buffers
                rows.append(buffers["rows"])
                mappings.append(buffers["compressed_indices_mapping"])
                layouts.append(module.layout)
        is_pruned = False
        for mapping in mappings:
            is_pruned = is_pruned or mapping is not None
        # Each item of a list takes 0.2 us on its way through torch's dispatcher.
        return rows, mappings if is_pruned else mappings[:0], "\n".join(layouts)

    def _asked(self) -> torch.dtype | None:
        # None, at the end of an operator's arguments, costs nothing.
        asked: torch.dtype | None = None
        if self.dtype != torch.float32 and self.dtype != torch.float64:
            asked = self.dtype
        return asked

    def _by_feature(self, given: Mapping[str, Any], name: str) -> list[Any]:
        """What a dict has for each feature, in their order."""
        missing = [feature for feature in self.features if feature not in given]
        beyond = sorted(given.keys() - self.features.keys(), key=str)
        if missing or beyond:
            what = f"none for {shown(missing[0])}" if missing else shown(beyond[0])
            raise ValueError(f"{name} must hold the collection's features, got {what}")
        return [given[feature] for feature in self.features]

    def _by_key(self, given: Mapping[str, Any]) -> list[Any]:
        """What a KeyedJaggedTensor has for each feature, in their order."""
        keys = [key_of(feature, given) for feature in self.features]
        for feature, key in zip(self.features, keys, strict=True):
            if key not in given:
                raise ValueError(f"indices must have a key for each feature, got none for {shown(feature)}")
        return [given[key] for key in keys]

    # ---- Moved, converted and saved ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Rows are moved, never converted: `half` and the like change the type of the output."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        # Tables are numbers in a state dict, where names must have no dots.
        return torch.tensor(list(json.dumps(self.names).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        pass  # it was checked before

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        key, errors = f"{prefix}_extra_state", others[-1]
        try:
            if key in state_dict and text_of(state_dict[key]) != json.dumps(self.names):
                errors.append(f"{key}: the tables must be {shown(self.names)}, in this order, got others")
        except ValueError as error:
            errors.append(f"{prefix}{error}")
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"{len(self.features)} features of {len(self.names)} tables"


def _listed(weights: Tensor | None) -> list[Tensor | None]:
    """None is no list of them: an item takes 0.2 us on its way through torch's dispatcher."""
    listed: list[Tensor | None] = []
    if weights is not None:
        listed.append(weights)
    return listed


def _check_tensor(value: Any, name: str, what: str = "a tensor") -> None:
    """Also what torch's tracers have in the place of a tensor. The dispatcher's own error does not say which it is."""
    if not hasattr(value, "__torch_function__"):
        raise TypeError(f"{name} must be {what}, got {kind_of(value)}")


def _bags_in(value: Any, feature: str) -> tuple[Any, Any]:
    """The indices and the offsets, if any, that a dict has for a feature."""
    name = f"indices[{feature!r}]"
    if not isinstance(value, tuple):
        _check_tensor(value, name, "a tensor, or a tuple (indices, offsets)")
        return value, None
    if len(value) != 2:
        raise ValueError(f"{name} must be a tensor, or a tuple (indices, offsets), got a tuple of {len(value)}")
    for part in value:
        _check_tensor(part, name, "a tensor, or a tuple (indices, offsets) of tensors")
    return value


class EmbeddingBagCollection(CollectionModule):
    """A `qembag.EmbeddingBagCollection` as a module: bags of many tables, in one call. For inference.

    In the place of `torch.nn.EmbeddingBag` modules and their concatenation, or of TorchRec's EmbeddingBagCollection.

    Parameters
    ----------
    collection : qembag.EmbeddingBagCollection
        Its tables stay where they are: mapped ones stay mapped, those of other modules are theirs.
        `qembag.interop.torchrec.collection_from_module` makes one of TorchRec's. Its `dtype` is the output's.
    num_threads : int, optional
        Threads of a call; at most `torch.get_num_threads` and `qembag.get_num_threads` if not given.

    Attributes
    ----------
    features : dict of str to str
        The table of each feature, in the order of the output.
    dims : dict of str to int
        The columns of each feature.
    tables : torch.nn.ModuleList
        The tables, with the buffers of `EmbeddingBag`.
    collection : qembag.EmbeddingBagCollection
        The collection in the buffers' memory.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.

    Notes
    -----
    ``load_state_dict`` takes tables of the same names and shapes in any layout; features and options are not part of
    a state.

    Examples
    --------
    >>> import numpy as np, torch, qembag, qembag.torch
    >>> tables = {"users": np.eye(4, dtype=np.float32), "items": np.eye(3, dtype=np.float32)}
    >>> bags = qembag.torch.EmbeddingBagCollection(qembag.EmbeddingBagCollection(tables))
    >>> bags(torch.tensor([0, 1, 3, 2, 2]), torch.tensor([0, 2, 3, 4, 5]))
    tensor([[1., 1., 0., 0., 0., 0., 1.],
            [0., 0., 0., 1., 0., 0., 1.]])
    """

    def __init__(self, collection: ours.EmbeddingBagCollection, *, num_threads: int | None = None) -> None:
        super().__init__(collection, ours.EmbeddingBagCollection, num_threads)

    @property
    def collection(self) -> ours.EmbeddingBagCollection:
        """The collection in the buffers' memory; see `EmbeddingBag.table`."""
        return bags_collection(self._tables_by_name(), self.plan, self._asked())

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Sums, means or maxima of bags of all features.

        Parameters
        ----------
        indices : Tensor of int32 or int64, 1-D
            Those of the first feature's bags, then of the second's, and so on. Or a dict of feature to a tuple of
            indices and offsets, the last of which is an end, or to a 2-D tensor, a bag a row; or a KeyedJaggedTensor
            of TorchRec's, which may have other keys, in any order. None of these is copied.
        offsets : Tensor of int32 or int64, shape (number of features * batch + 1,)
            Where each bag begins, and where the last ends. Only with a tensor of indices.
        per_sample_weights : Tensor of floats, optional
            Shaped as `indices`; by feature where these are.

        Returns
        -------
        Tensor of `dtype`, shape (batch, sum of dims)
            The features side by side: `split` takes them apart. For a KeyedJaggedTensor a KeyedTensor of it.

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `qembag.EmbeddingBagCollection`.
        RuntimeError
            If gradients are to reach `per_sample_weights`, or a tensor is not on the CPU.
        """
        # torch.jit.script has no types for others, and takes tensors alone.
        if isinstance(indices, Tensor):
            return self._called([indices], [offsets], _listed(per_sample_weights), None, 0)
        else:
            return self._of_others(indices, offsets, per_sample_weights)

    def _called(
        self,
        indices: list[Tensor],
        offsets: list[Tensor | None],
        per_sample_weights: list[Tensor | None],
        places: list[int] | None,
        num_keys: int,
    ) -> Tensor:
        for weights in per_sample_weights:
            if weights is not None and weights.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "per_sample_weights must not require gradients: a quantized table's lookup has none. Look up under "
                    "torch.no_grad(), or pass per_sample_weights.detach()"
                )
        rows, mappings, layouts = self._parts()
        found = torch.ops.qembag.embedding_bag_collection(
            rows,
            mappings,
            indices,
            offsets,
            per_sample_weights,
            layouts,
            self.plan,
            self._asked(),
            self.num_threads,
            places,
            num_keys,
        )
        return found.double() if self.dtype == torch.float64 else found

    def _of_others(self, indices: Any, offsets: Any, per_sample_weights: Any) -> Any:
        """Of indices by feature; of what torch's tracers have for tensors."""
        is_jagged = not isinstance(indices, Mapping) and has_class(indices, "torchrec", "KeyedJaggedTensor")
        if not is_jagged and not isinstance(indices, Mapping):
            _check_tensor(indices, "indices", "a tensor, a dict by feature or a KeyedJaggedTensor")
            return self._called([indices], [offsets], _listed(per_sample_weights), None, 0)
        if offsets is not None:
            raise ValueError("offsets must be given with the indices of each feature, got them apart")
        if is_jagged:
            if per_sample_weights is not None:
                raise ValueError("per_sample_weights must be those of the KeyedJaggedTensor, got others")
            return self._of_jagged(indices)
        given = self._by_feature(indices, "indices")
        parts = [_bags_in(value, feature) for feature, value in zip(self.features, given, strict=True)]
        weights: list[Tensor | None] = []
        if per_sample_weights is not None:
            if not isinstance(per_sample_weights, Mapping):
                raise TypeError(
                    f"per_sample_weights must be a dict by feature where indices are, got {kind_of(per_sample_weights)}"
                )
            by_feature = dict.fromkeys(indices) | dict(per_sample_weights)
            weights = self._by_feature(by_feature, "per_sample_weights")
        return self._called([part[0] for part in parts], [part[1] for part in parts], weights, None, 0)

    def _of_jagged(self, jagged: Any) -> Any:
        from torchrec.sparse.jagged_tensor import KeyedTensor

        keys, places = jagged.keys(), None
        if jagged.variable_stride_per_key():
            raise ValueError("indices must have one batch size, got a KeyedJaggedTensor with one a key")
        if keys != list(self.features):
            number_of = {key: number for number, key in enumerate(keys)}
            if len(number_of) < len(keys):
                raise ValueError(f"indices must have each key once, got {shown(keys)}")
            places = self._by_key(number_of)
        weights = _listed(jagged.weights_or_none())
        found = self._called([jagged.values()], [jagged.offsets()], weights, places, 0 if places is None else len(keys))
        return KeyedTensor(list(self.features), list(self.dims.values()), found)

    def split(self, output: Tensor) -> dict[str, Tensor]:
        """The columns of each feature in the result of a call: views of it.

        Parameters
        ----------
        output : Tensor, shape (batch, sum of dims)

        Returns
        -------
        dict of str to Tensor, shape (batch, dim of the feature)
        """
        return dict(zip(self.features, output.split(list(self.dims.values()), dim=1), strict=True))


class EmbeddingCollection(CollectionModule):
    """A `qembag.EmbeddingCollection` as a module: rows of many tables, in one call. For inference.

    Parameters
    ----------
    collection : qembag.EmbeddingCollection
        As for `EmbeddingBagCollection`.
    num_threads : int, optional
        As for `EmbeddingBagCollection`.

    Attributes
    ----------
    features, dims, tables, collection
        As for `EmbeddingBagCollection`.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.

    Examples
    --------
    >>> import numpy as np, torch, qembag, qembag.torch
    >>> tables = {"users": np.eye(4, dtype=np.float32), "items": np.eye(3, dtype=np.float32)}
    >>> rows = qembag.torch.EmbeddingCollection(qembag.EmbeddingCollection(tables))
    >>> rows({"users": torch.tensor([3]), "items": torch.tensor([[0, 1]])})["items"].shape
    torch.Size([1, 2, 3])
    """

    def __init__(self, collection: ours.EmbeddingCollection, *, num_threads: int | None = None) -> None:
        super().__init__(collection, ours.EmbeddingCollection, num_threads)

    @property
    def collection(self) -> ours.EmbeddingCollection:
        """The collection in the buffers' memory; see `EmbeddingBag.table`."""
        return rows_collection(self._tables_by_name(), self.plan, self._asked())

    def forward(self, indices: dict[str, Tensor], offsets: Tensor | None = None) -> dict[str, Tensor]:
        """Rows of all features.

        Parameters
        ----------
        indices : dict of str to Tensor of int32 or int64, of any shape
            By feature. Or a tensor of those of the first feature, then of the second, and so on, with `offsets`; or a
            KeyedJaggedTensor of TorchRec's, which may have other keys, in any order.
        offsets : Tensor of int32 or int64, shape (number of features * batch + 1,)
            As for `EmbeddingBagCollection`. Only with a tensor of indices.

        Returns
        -------
        dict of str to Tensor of `dtype`, shape indices.shape + (dim,)
            By feature. For a KeyedJaggedTensor JaggedTensors.

        Raises
        ------
        TypeError, ValueError, IndexError
            As for `qembag.EmbeddingCollection`.
        RuntimeError
            If a tensor is not on the CPU.
        """
        # torch.jit.script has no types for others, and takes a dict alone.
        if torch.jit.is_scripting():
            return self._called([indices[feature] for feature in self.features])
        else:
            if isinstance(indices, Mapping) and offsets is None:
                return self._called(self._tensors_in(indices))
            return self._of_others(indices, offsets)

    def _called(self, indices: list[Tensor]) -> dict[str, Tensor]:
        rows, mappings, layouts = self._parts()
        found = torch.ops.qembag.embedding_collection(
            rows, mappings, indices, layouts, self.plan, self._asked(), self.num_threads
        )
        by_feature: dict[str, Tensor] = {}
        for number, feature in enumerate(self.features):
            vectors: Tensor = found[number]
            by_feature[feature] = vectors.double() if self.dtype == torch.float64 else vectors
        return by_feature

    def _of_others(self, indices: Any, offsets: Any) -> dict[str, Any]:
        """Of a tensor with offsets, and of a KeyedJaggedTensor."""
        if has_class(indices, "torchrec", "KeyedJaggedTensor"):
            if offsets is not None:
                raise ValueError("offsets must be those of the KeyedJaggedTensor, got others")
            return self._of_jagged(indices)
        if not isinstance(indices, Tensor) or not isinstance(offsets, Tensor):
            raise TypeError(
                "indices must be a dict of tensors, a tensor with offsets, or a KeyedJaggedTensor, got "
                f"{kind_of(indices)} and offsets of {kind_of(offsets)}"
            )
        return self._called(self._taken_apart(indices, offsets))

    def _tensors_in(self, given: Any) -> list[Tensor]:
        """What a dict has for each feature. Not a part of `forward`, since scripts know no such texts."""
        tensors = self._by_feature(given, "indices")
        for feature, value in zip(self.features, tensors, strict=True):
            _check_tensor(value, f"indices[{feature!r}]")
        return tensors

    def _taken_apart(self, indices: Tensor, offsets: Tensor) -> list[Tensor]:
        """The indices of each feature: views."""
        if offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
            raise TypeError(f"offsets must be a tensor of integers, got one of {offsets.dtype}")
        count = len(self.features)
        batch, rest = divmod(len(offsets) - 1, count) if offsets.dim() == 1 else (0, 1)
        if rest or batch < 0 or indices.dim() != 1:
            raise ValueError(
                f"offsets must have 1 dimension, a bag of each of {count} features and an end, beside 1-D indices, got "
                f"shapes {tuple(offsets.shape)} and {tuple(indices.shape)}"
            )
        ends = offsets[::batch].tolist() if batch else offsets.tolist() * (count + 1)
        if any(not 0 <= start <= stop <= len(indices) for start, stop in itertools.pairwise(ends)):
            raise ValueError(f"offsets must not decrease, and lie in 0 to {len(indices)}, got {shown(ends)} by feature")
        return [indices[start:stop] for start, stop in itertools.pairwise(ends)]

    def _of_jagged(self, jagged: Any) -> dict[str, Any]:
        from torchrec.sparse.jagged_tensor import JaggedTensor

        parts = self._by_key(jagged.to_dict())
        found = self._called([part.values() for part in parts])
        return {
            feature: JaggedTensor(values=vectors, lengths=part.lengths())
            for (feature, vectors), part in zip(found.items(), parts, strict=True)
        }
