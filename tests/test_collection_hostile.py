"""Arguments of a collection that change the others while they are looked at, and names that lie.

Each call gives the answer of plain arguments or raises; it writes to nothing but its output. `test_hostile.py` attacks
each argument by itself.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qembag
from support.arrays import same_bits
from support.many_tables import Batch, Many, batch_of, plain, side_by_side
from support.objects import FICKLE_TEXT, LYING_TEXT

# In-place changes of an array's shape and the like, which newer NumPys advise against, are what this is about.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAMES = ("f0", "f1", "f2", "f3")


class Call:
    """A call by feature, with weights and an output for each. It is made anew for each mischief."""

    def __init__(self) -> None:
        self.many: Many = plain(4)
        self.batch: Batch = batch_of(np.random.default_rng(6), self.many, 3, width=4)
        self.collection = self.many.make()
        self.indices: dict[str, Any] = self.batch.pairs()
        self.weights: dict[str, Any] = self.batch.weights_by_feature()
        self.memory = np.zeros((3, 40), np.float32)
        self.out = {name: self.memory[:, 10 * number : 10 * number + 8] for number, name in enumerate(NAMES)}

    def __call__(self) -> None:
        self.collection(self.indices, per_sample_weights=self.weights, out=self.out)

    def attributes(self, feature: str, **given: Any) -> None:
        arrays = [*self.batch.indices.values(), self.weights.get(feature), self.out.get(feature)]
        if isinstance(self.indices.get(feature), tuple):
            arrays += self.indices[feature]
        for array in arrays:
            for name, value in given.items():
                with contextlib.suppress(AttributeError, ValueError, TypeError):
                    setattr(array, name, value)


MISCHIEF: dict[str, Callable[[Call], Any]] = {
    "indices, cleared": lambda call: call.indices.clear(),
    "weights, cleared": lambda call: call.weights.clear(),
    "out, cleared": lambda call: call.out.clear(),
    "all, cleared": lambda call: (call.indices.clear(), call.weights.clear(), call.out.clear(), gc.collect()),
    "another feature": lambda call: call.indices.update(f9=call.indices.get("f0")),
    "shapes": lambda call: [call.attributes(name, shape=(2, 2, 3)) for name in NAMES],
    "strides": lambda call: [call.attributes(name, strides=(0,)) for name in NAMES],
    "strides of rows": lambda call: [call.attributes(name, strides=(0, 4)) for name in NAMES],
    "types": lambda call: [call.attributes(name, dtype=np.int8) for name in NAMES],
    "outputs, read-only": lambda call: [out.setflags(write=False) for out in call.out.values()],
    "outputs, all one": lambda call: call.out.update(dict.fromkeys(call.out, call.out.get("f0"))),
    "outputs, the inputs": lambda call: call.out.update({name: np.zeros((3, 8), np.float32) for name in NAMES}),
    "tables": lambda call: [table.made.__init__(np.zeros((1, 9), np.uint8), 8) for table in call.many.tables.values()],
    "the collection": lambda call: call.collection.__init__([np.ones((1, 2), np.float32)]),
    "a call of its own": lambda call: Call()(),
    "an error": lambda call: 1 / 0,
}


# Of what has not been looked at yet: it counts as what it is then.
CHANGES = ("outputs, all one", "weights, cleared", "strides")


@pytest.mark.parametrize("place", ["f0", "f1", "f3"])
@pytest.mark.parametrize("what", ["indices", "offsets", "weights"])
@pytest.mark.parametrize("mischief", MISCHIEF)
def test_what_one_arguments_conversion_does_to_the_others_is_an_error_or_does_not_count(
    mischief: str, what: str, place: str
) -> None:
    call = Call()
    expected = call.batch.one_by_one(call.many)

    def disguised(plain: np.ndarray) -> Any:
        def answer(self: Any, *_: Any, **__: Any) -> np.ndarray:
            MISCHIEF[mischief](call)
            return plain

        return type("Mischievous", (), {"__array__": answer})()

    indices, offsets = call.indices[place]
    if what == "weights":
        call.weights[place] = disguised(call.weights[place])
    else:
        call.indices[place] = (disguised(indices), offsets) if what == "indices" else (indices, disguised(offsets))
    with contextlib.suppress(TypeError, ValueError, IndexError, RuntimeError, KeyError, ZeroDivisionError):
        call()
    # Each feature's columns are as they were or right, whatever their arrays say of themselves by now.
    for number, feature in enumerate(NAMES):
        columns = call.memory[:, 10 * number : 10 * number + 8]
        if columns.any() and mischief not in CHANGES:
            same_bits(columns, expected[feature])
        assert not call.memory[:, 10 * number + 8 : 10 * number + 10].any()


@pytest.mark.parametrize("kind", [LYING_TEXT, FICKLE_TEXT])
def test_names_that_lie_are_looked_up_or_refused(kind: Any) -> None:
    many = plain(3)
    tables = [table.made for table in many.tables.values()]
    square = np.arange(6).reshape(2, 3)
    names = [kind(f"f{number}") for number in range(3)]
    with contextlib.suppress(TypeError, ValueError, KeyError):
        collection = qembag.EmbeddingBagCollection(dict(zip(names, tables, strict=True)))
        out = np.zeros((2, collection.dim), np.float32)
        for given in (dict.fromkeys(names, square), dict.fromkeys(collection.features, square)):
            with contextlib.suppress(TypeError, ValueError, KeyError):
                assert collection(given, out=out) is out
                assert out.any()


def test_a_name_whose_hash_changes_the_call_touches_nothing_else() -> None:
    """Looking a feature up in a caller's dict may run Python."""
    many = plain(3)
    square = np.arange(6).reshape(2, 3)
    live: dict[str, Any] = {}

    def mischief(self: Any) -> int:
        if live.get("armed"):
            for array in (*live["outs"].values(), live["square"]):
                with contextlib.suppress(AttributeError, ValueError):
                    array.shape = (-1,)
            live["given"].clear()
            live["outs"].clear()
        return str.__hash__(self)

    kind = type("Mischievous", (str,), {"__hash__": mischief, "__eq__": str.__eq__})
    tables = {kind(f"f{n}"): table.made for n, table in enumerate(many.tables.values())}
    collection = qembag.EmbeddingBagCollection(tables)
    memory = np.zeros((2, 40), np.float32)
    live["square"] = square
    live["outs"] = {f"f{n}": memory[:, 10 * n : 10 * n + 8] for n in range(3)}
    live["given"] = dict.fromkeys(("f0", "f1", "f2"), square)
    live["armed"] = True
    with contextlib.suppress(TypeError, ValueError, KeyError, RuntimeError):
        collection(live["given"], out=live["outs"])
    live["armed"] = False
    assert not memory[:, [8, 9, 18, 19, *range(28, 40)]].any()


def test_a_mapping_of_the_callers_own_kind_is_a_dict(rng: np.random.Generator) -> None:
    """One that says that it holds more, less or other things than it has."""

    class Odd(dict):  # type: ignore[type-arg]
        def __getitem__(self, key: Any) -> Any:
            return np.full((3, 1), 99)

        def get(self, key: Any, default: Any = None) -> Any:
            return np.full((3, 1), 99)

        def __len__(self) -> int:
            return 3

    many = plain(3)
    batch = batch_of(rng, many, 3)
    expected = side_by_side(batch.one_by_one(many, weighted=False))
    collection = many.make()
    with contextlib.suppress(IndexError):
        same_bits(collection(Odd(batch.pairs())), expected)
    out = {feature: np.zeros((3, 8), np.float32) for feature in many.features}
    odd = type("Out", (dict,), {"get": lambda *_: None, "__iter__": lambda self: iter(())})(out)
    with contextlib.suppress(ValueError, TypeError):
        collection(batch.pairs(), out=odd)
        same_bits(side_by_side(out), expected)
