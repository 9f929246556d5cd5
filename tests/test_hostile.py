"""Arguments that lie, raise, or change the others while they are looked at; arrays of odd layouts.

Each call gives the answer that it gives for plain arguments, or raises; it leaves `out` alone if it raises, and keeps no
reference. `test_bad_input.py` has the messages.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import itertools
import os
import pickle
import signal
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER
from qembag import ops
from qembag.pruning import RowChoice
from qembag.verdict.report import Report
from support import rules
from support.arrays import WAYS, Boom, place, same_bits
from support.functions import (
    CALLS,
    DIM,
    EVERY_ARGUMENT,
    FLOATS,
    INDICES,
    MAPPING,
    NUM_ROWS,
    OFFSETS,
    ROWS,
    float_table,
    good_call,
    of_bags,
    out,
    table,
)  # fmt: skip
from support.layouts import packed_rows
from support.objects import HOSTILE, REFUSED, raising

strided = np.lib.stride_tricks.as_strided
# In-place changes of an array's shape and the like, which newer NumPys advise against, are what this is about.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FLOAT_TABLES = ("float32", "float16", "bfloat16")
# Of an OSError the system says the words: a path that is a text may name no file.
ERRORS = (TypeError, ValueError, IndexError, OverflowError, MemoryError, RecursionError, OSError, Boom)


def error_of(call: Any, *arguments: Any, **named: Any) -> Exception | None:
    try:
        call(*arguments, **named)
    except (SyntaxError, *ERRORS) as error:
        return error
    return None


# ---- Every argument of every public function ---------------------------------------------------------------------


# These have no effect: of the first the documentation says so; the others compute a shape alone.
WITHOUT_EFFECT = ("scale_grad_by_freq", "_meta")


def test_every_argument_of_every_public_function_is_attacked() -> None:
    public = {
        name for name in (*qembag.__all__, *ops.__all__) if callable(getattr(qembag, name, getattr(ops, name, None)))
    }
    assert public <= set(CALLS)
    for name, (function, given) in CALLS.items():
        assert set(given) == set(inspect.signature(function).parameters), name
    kinds = {
        qembag.QuantizedTable: {"codes"},
        qembag.FloatTable: set(),
        qembag.EmbeddingBagCollection: set(),
        qembag.EmbeddingCollection: set(),
    }
    for kind, more in kinds.items():
        methods = {
            name for part in kind.__mro__[:-1] for name, value in vars(part).items() if inspect.isfunction(value)
        }
        public_or_special = {name for name in methods if not name.startswith("_") or name.startswith("__")}
        without_arguments = {
            "__len__",
            "__iter__",
            "__repr__",
            "__reduce__",
            "__init__",
            "__copy__",
            "__deepcopy__",
        } | more
        attacked = {name.rpartition(".")[2] for name in CALLS if name.startswith(f"{kind.__name__}.")}
        assert public_or_special - attacked <= without_arguments


def parts(answer: Any) -> list[np.ndarray]:
    """What an answer consists of, as arrays of bytes that can be compared."""
    if isinstance(answer, qembag.QuantizedTable):
        return parts((answer.data, answer.compressed_indices_mapping, answer.row_weights, answer.shape, answer.bits))
    if isinstance(answer, qembag.FloatTable):
        return parts((answer.data, answer.compressed_indices_mapping, answer.row_weights, answer.shape, answer.dtype))
    if isinstance(answer, Report):  # but for its times
        return parts(tuple((one.label, one.nbytes, one.rows, one.bags, one.worst_rows) for one in answer.variants))
    if isinstance(answer, qembag.EmbeddingBagCollection | qembag.EmbeddingCollection):
        return parts((answer.tables, repr((answer.features, answer.invalid, answer.dims, answer.dtype))))
    if isinstance(answer, RowChoice):
        return parts(dataclasses.astuple(answer))
    if isinstance(answer, tuple):
        return [part for item in answer for part in parts(item)]
    if isinstance(answer, dict):
        return [part for name in answer for part in parts((name, answer[name]))]
    return [np.asarray(answer) if isinstance(answer, np.ndarray) else np.frombuffer(repr(answer).encode(), np.uint8)]


def outputs(given: Any) -> list[np.ndarray]:
    """The arrays of an `out`: none, one, or one a feature."""
    return [] if given is None else list(given.values()) if isinstance(given, dict) else [given]


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files go that are named by a text."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def threads_as_before() -> Any:
    yield
    qembag.set_num_threads(None)


def may_be_none(function: str, argument: str) -> bool:
    if argument in ("n", "item"):
        return True
    if argument in ("offsets", "lengths"):  # of which indices of one dimension, as here, need one
        return CALLS[function][1][argument] is None
    return inspect.signature(CALLS[function][0]).parameters[argument].default is None


# Of which a call that has one names either, where the other is given too, or where neither is.
EITHER = {
    "path": "(path|max_shard_bytes)",
    "offsets": "(offsets|lengths)",
    "lengths": "(offsets|lengths)",
    "dtype": "(dtype|data)",
    "names": "(names|features)",
}


# What progress may be.
CALLABLE = ("function", "class", "class of arrays", "array raises", "dtype raises")
# What a path may be, or a name in a file.
TEXTS = ("text", "text that lies", "text of many hashes", "dtype that is no Python")


# Numbers of any size; of huge groups a row is one.
WITHOUT_END = ("dims", "sample", "seed", "min_count", "max_rows", "max_bytes", "max_shard_bytes")
NO_LIMIT = ("2**100", "10**5000", "index 2**100")
TAKEN = {
    ("metadata", "empty dict"),
    ("dims", "dict"),
    ("dims", "empty dict"),
    ("names", "list of texts"),
    ("group_sizes", "None"),
    ("group_sizes", "list of nothing"),
    ("group_sizes", "list of huge numbers"),
    ("min_norm", "float"),
    ("min_norm", "2**100"),
    ("min_norm", "int that lies"),
    ("min_norm", "float that is another"),
    *(("name", text) for text in ("text", "text that lies", "text of many hashes")),
    ("name", "dtype that is no Python"),
    ("name", "dtype of surrogates"),
}


def takes_any_floats(function: str) -> bool:
    """As weights: others than the reference's operators."""
    return "table" in CALLS[function][1] or "Collection" in function


def of_many(function: str) -> bool:
    """Of several tables, with options by feature."""
    return "Collection" in function or function == "Scorer"


def is_taken(function: str, argument: str, name: str) -> bool:
    """What some arguments take: a default, a number for a flag, as many threads as there are, all rows."""
    return (
        (name == "None" and may_be_none(function, argument))
        or any(part in (argument, function[-5:]) for part in WITHOUT_EFFECT)
        or (argument in (*WITHOUT_END, "num_threads", "n", "group_size", "group_sizes") and name in NO_LIMIT)
        or (argument in (*WITHOUT_END, "num_threads", "n", "nbins", "row_alignment") and name == "int that lies")
        or (argument in ("path", "name") and "save" in function and name in TEXTS)
        or (argument == "progress" and name in CALLABLE)
        or (argument, name) in TAKEN
        or (function, argument, name) == ("load_tables", "bits", "empty dict")
        or (of_many(function) and argument in ("mode", "padding_idx", "invalid") and name == "empty dict")
        or (of_many(function) and (argument, name) == ("padding_idx", "dict"))
        or (function == "Scorer" and argument in ("columns", "weights") and name == "empty dict")
        or (function == "Scorer" and argument in ("output", "reasons", "row_id") and name in (*TEXTS, "list of texts"))
        or (function, argument, name) == ("Scorer.map_arrow", "batches", "empty dict")
        or ("by feature" in function and (argument, name) == ("per_sample_weights", "empty dict"))
        or (argument, name) == ("item", "ellipsis")
        or (name == "buffer of floats" and argument == "per_sample_weights" and takes_any_floats(function))
        or ".__array__" in function
        or (argument == "path" and "text" in name)
        or (argument in ("path", "name") and name in ("text", "dtype that is no Python"))
        or (argument, name) == ("metadata", "empty dict")
    )


@pytest.mark.parametrize(("function", "argument"), EVERY_ARGUMENT)
def test_a_wrong_argument_raises_and_leaves_everything_as_it_was(
    function: str, argument: str, threads_as_before: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where what is saved under any text goes
    for name, make in (*REFUSED.items(), *HOSTILE.items(), ("None", lambda: None)):
        call, given = good_call(function)
        out = given.get("out")
        given[argument] = value = make()
        others = {key: parts(item) for key, item in given.items() if key != argument}
        error = error_of(call, **given)
        if error is None:
            assert is_taken(function, argument, name), (name, value)
            continue
        if argument == "progress" and callable(value):
            continue  # the error is its own
        by_name = name in REFUSED or (name == "None" and not may_be_none(function, argument))
        # The words of these are NumPy's own, the system's, and the function's that is given.
        is_others = argument == "item" or ".__array__" in function or (argument == "progress" and callable(value))
        is_others |= argument == "path" and isinstance(error, OSError)
        if by_name and not is_others:
            assert rules.allows(rules.either(EITHER.get(argument, argument)), error), (name, error)
        assert not isinstance(error, SyntaxError) or ".__array__" in function
        assert argument == "out" or not any(part.any() for part in outputs(out)), name
        for key, before in others.items():
            assert all(map(np.array_equal, parts(given[key]), before)), (name, key)


# ---- The same argument in a disguise -------------------------------------------------------------------------------


@pytest.mark.parametrize("disguise", WAYS)
def test_an_array_in_a_disguise_counts_as_what_it_holds(disguise: str) -> None:
    taken = set()
    for function, argument in EVERY_ARGUMENT:
        call, given = good_call(function)
        if not isinstance(given[argument], np.ndarray) or argument == "output":  # of which the answer is a view
            continue
        if disguise == "ctypes" and given[argument].dtype == np.float16:
            continue  # which C has no name for
        expected = [part.copy() for part in parts(call(**given))]
        call, given = good_call(function)
        given[argument] = place(given[argument], disguise).value
        try:
            answer = call(**given)
        except ERRORS:
            continue
        taken.add(argument)
        if argument == "out":
            assert answer is given[argument]
            answer = np.ndarray.view(answer, np.ndarray).copy()
        for ours, theirs in zip(parts(answer), expected, strict=True):
            same_bits(ours, theirs)
    assert "indices" in taken or disguise == "unmasked"


# ---- Arguments that change each other -------------------------------------------------------------------------------


def bags() -> dict[str, Any]:
    return {"table": table(), **of_bags(out=out(3))}


def bags_of_floats() -> dict[str, Any]:
    given = {"table": float_table("float32"), **of_bags(out=out(3)), "lengths": np.array([2, 0, 4])}
    del given["offsets"]
    return given


def change(name: str, **attributes: Any) -> Any:
    """Sets attributes of an array among the arguments in place."""

    def mischief(given: dict[str, Any]) -> None:
        for attribute, value in attributes.items():
            if attribute == "shape" and given[name].size != np.prod(value):
                value = (1, -1, 1)
            with contextlib.suppress(AttributeError):  # of later NumPys
                setattr(given[name], attribute, value)

    return mischief


def refused(call: Any, *arguments: Any, **named: Any) -> None:
    assert isinstance(error_of(call, *arguments, **named), ValueError)


def other_rows(one: Any) -> tuple[Any, ...]:
    return (ROWS[2], 2) if isinstance(one, qembag.QuantizedTable) else (FLOATS[:2, :3].copy(),)


def refused_with(one: Any) -> dict[str, Any]:
    return {"bits": 4, "dim": 99} if isinstance(one, qembag.QuantizedTable) else {"dtype": np.float16}


MISCHIEF = {
    "indices.shape": change("indices", shape=(3, 2)),
    "indices.strides": change("indices", strides=(0,)),
    "indices.dtype": change("indices", dtype=np.float64),
    "indices.dtype, shorter": change("indices", dtype="V24"),
    "offsets.shape": change("offsets", shape=(1, 3)),
    "offsets.dtype": change("offsets", dtype=np.int32),
    "lengths.shape": change("lengths", shape=(1, 3)),
    "lengths.dtype": change("lengths", dtype=np.int32),
    "weights.shape": change("per_sample_weights", shape=(1, 6)),
    "weights.dtype": change("per_sample_weights", dtype=np.float16),
    "out.shape": change("out", shape=(3 * DIM,)),
    "out.dtype": change("out", dtype=np.float16),
    "out.strides": change("out", strides=(0, 4)),
    "out, read-only": lambda given: given["out"].setflags(write=False),
    "table.data.shape": lambda given: change("data", shape=(-1,))({"data": given["table"].data.base}),
    "table.mapping.shape": lambda given: change("data", shape=(1, NUM_ROWS))(
        {"data": given["table"].compressed_indices_mapping.base}
    ),
    "other rows": lambda given: given["table"].__init__(*other_rows(given["table"])),
    "refused rows": lambda given: refused(
        given["table"].__init__, other_rows(given["table"])[0], **refused_with(given["table"])
    ),
    "collection": lambda given: gc.collect(),
    "a call of its own": lambda given: qembag.embedding_bag(**bags()),
    "threads": lambda given: qembag.set_num_threads(2),
}  # fmt: skip


@pytest.mark.parametrize("mischief", MISCHIEF)
@pytest.mark.parametrize("first", [True, False], ids=["at once", "the second time"])
@pytest.mark.parametrize("bags", [bags, bags_of_floats])
def test_what_an_arguments_conversion_does_to_the_others_does_not_count(
    mischief: str, first: bool, bags: Any, threads_as_before: None
) -> None:
    """By the time that it can be done, each is as it will be used; or it is not used before."""
    if mischief.partition(".")[0] in {"offsets", "lengths"} - set(bags()):
        return
    expected = qembag.embedding_bag(**bags())

    def disguised(plain: np.ndarray) -> Any:
        asked = []

        def answer(self: Any, *_: Any, **__: Any) -> np.ndarray:
            asked.append(None)
            if first or len(asked) > 1:
                MISCHIEF[mischief](given)
            return plain

        return type("Mischievous", (), {"__array__": answer})()

    for argument in ("indices", "offsets", "lengths", "per_sample_weights"):
        given = bags()
        if argument not in given or mischief.startswith(argument.split("_")[-1]):
            continue
        memory = given["out"].view(np.uint8).reshape(-1)
        before = given["table"].data
        given[argument] = disguised(given[argument])
        # What was changed before it was looked at counts as what it is now; what has been looked at is not asked again.
        may_fail = first and mischief.startswith(("indices", "offsets", "lengths", "weights", "out"))
        with contextlib.suppress(TypeError, ValueError) if may_fail else contextlib.nullcontext():
            assert qembag.embedding_bag(**given) is given["out"]
        if memory.any():
            same_bits(memory.view(np.float32).reshape(3, DIM), expected)
        else:
            assert may_fail
        if mischief != "other rows":
            same_bits(given["table"].data, before)


@pytest.mark.parametrize("bags", [bags, bags_of_floats])
def test_an_output_is_compared_with_the_very_memory_that_is_read(bags: Any) -> None:
    """Not with what a second conversion gives."""
    for argument, plain in bags().items():
        if argument in ("table", "out"):
            continue
        memory = np.zeros(200, np.uint8)
        inside = memory[: plain.nbytes].view(plain.dtype)
        inside[:] = plain
        answers = iter([inside, plain, plain])
        given = bags() | {argument: type("Fickle", (), {"__array__": lambda self, *a, _=answers, **k: next(_)})()}
        before = memory.copy()
        given["out"] = memory[: 12 * DIM].view(np.float32).reshape(3, DIM)
        with pytest.raises(ValueError, match=f"^out must share no memory with {argument}"):
            qembag.embedding_bag(**given)
        assert np.array_equal(memory, before)


@pytest.mark.parametrize("argument", ["mode", "pruned_weights", "include_last_offset"])
def test_a_number_that_changes_the_rows_of_an_operator_is_answered_or_refused(argument: str) -> None:
    for shape in [(-1,), (NUM_ROWS * 2, -1), (NUM_ROWS // 2, -1)]:
        rows = ROWS[8].copy()
        base = np.int64 if argument != "mode" else object
        reshape = {"__index__": lambda self, rows=rows, shape=shape: setattr(rows, "shape", shape) or 1}
        given = {"weight": rows, "indices": INDICES, "offsets": OFFSETS, "compressed_indices_mapping": MAPPING}
        with contextlib.suppress(RuntimeError, *ERRORS):
            ops.embedding_bag_byte_rowwise_offsets(**given, **{argument: type("Reshaping", (base,), reshape)()})


@pytest.mark.parametrize("argument", ["num_threads", "padding_idx"])
def test_what_a_numbers_conversion_does_does_not_count(argument: str) -> None:
    for mischief in (MISCHIEF["collection"], MISCHIEF["a call of its own"], MISCHIEF["other rows"]):
        expected = qembag.embedding_bag(**bags(), **{argument: 1})
        given = bags()
        number = type("Number", (), {"__index__": lambda self, m=mischief, g=given: [m(g), 1][1]})()
        same_bits(qembag.embedding_bag(**given, **{argument: number}), expected)


# ---- Tables --------------------------------------------------------------------------------------------------------


def test_arguments_that_are_refused_leave_a_table_as_it_was(bits: int) -> None:
    one = table(bits)
    before = one.dequantize()
    for data, width, options in [
        (ROWS[2], 4, {"dim": 99}),
        (ROWS[2][:, :3], 2, {}),
        ("rows", 2, {}),
        (ROWS[2], 3, {}),
        (ROWS[2], 2, {"compressed_indices_mapping": [99]}),
    ]:
        with pytest.raises((TypeError, ValueError, IndexError)):
            one.__init__(data, width, **options)  # type: ignore[misc]
    assert one.bits == bits
    same_bits(one.dequantize(), before)


@pytest.mark.parametrize("way", ["data", "base", "reduce"])
def test_nobody_reshapes_a_table_by_what_it_gives_away(way: str, bits: int, tmp_path: Any) -> None:
    """Rows in a file or a buffer as well, which have the table's own array between them and what `data` returns."""
    np.save(tmp_path / "rows.npy", ROWS[bits])
    for rows in (
        ROWS[bits].copy(),
        np.load(tmp_path / "rows.npy", mmap_mode="r"),
        np.frombuffer(bytearray(ROWS[bits].tobytes()), np.uint8).reshape(ROWS[bits].shape),
    ):
        mapping = np.frombuffer(MAPPING.tobytes(), np.int32)
        one = qembag.QuantizedTable(rows, bits, compressed_indices_mapping=mapping)
        before = one.dequantize()
        for given_away in (one.data, one.compressed_indices_mapping):
            array = {
                "data": given_away,
                "base": given_away.base,
                "reduce": one.__reduce__()[1][1 if given_away.ndim == 2 else 3],
            }[way]
            array.shape = (1, -1, 1)
        same_bits(one.dequantize(), before)


def test_numpy_frees_no_memory_of_a_table(bits: int) -> None:
    """`resize` without its check of references does, as of any array that others have views of."""
    for again in (lambda one: one, copy.copy, lambda one: one.prune(range(NUM_ROWS))):
        one = again(table(bits))
        before = one.dequantize()
        for given_away in (one.data, one.compressed_indices_mapping):
            owner = given_away.base
            del given_away
            with pytest.raises(ValueError, match="cannot resize"):
                owner.resize(1)
            del owner
        for name in ("data", "compressed_indices_mapping"):
            with pytest.raises(ValueError, match="cannot resize"):
                getattr(one, name).base.resize(1)
        same_bits(one.dequantize(), before)


@pytest.mark.parametrize("kind", FLOAT_TABLES)
def test_nobody_reshapes_or_frees_a_table_of_floats_by_what_it_gives_away(kind: str, tmp_path: Any) -> None:
    for again in (lambda one: one, copy.copy, lambda one: one.prune(range(NUM_ROWS))):
        one = again(float_table(kind))
        before = one.dequantize()
        for given_away in (one.data, one.compressed_indices_mapping):
            for array in (
                given_away,
                given_away.base,
                *(part for part in one.__reduce__()[1] if isinstance(part, np.ndarray)),
            ):
                with pytest.raises(ValueError, match="resize"):
                    array.resize(1)
                with contextlib.suppress(AttributeError, TypeError, ValueError):
                    array.shape = (1, -1, 1)
                with contextlib.suppress(AttributeError, TypeError, ValueError):
                    array.dtype = np.uint8
        with pytest.raises(ValueError, match="cannot resize"):
            one.data.base.resize(1)
        same_bits(one.dequantize(), before)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("kind", FLOAT_TABLES)
def test_copies_of_tables_of_floats_are_tables_of_their_own(again: Any, kind: str) -> None:
    one = float_table(kind)
    before = one.dequantize()
    other = again(one)
    same_bits(other.dequantize(), before)
    other.__init__(FLOATS)
    same_bits(one.dequantize(), before)


@pytest.mark.parametrize("attribute", ["data", "dtype", "dim", "compressed_indices_mapping", "num_rows", "shape"])
def test_an_impostor_of_a_table_of_floats_crashes_nothing(level: str, attribute: str) -> None:
    values = [make() for make in (*REFUSED.values(), *HOSTILE.values())]
    values += [place(plain, way).value for way in WAYS for plain in (FLOATS, ROWS[2], MAPPING)]
    values += [0, 1, 2**63 - 1, -1, None, FLOATS[:0], FLOATS[:, :0], FLOATS[0], strided(FLOATS, (3, DIM), (4, 0))]
    expected = qembag.embedding_bag(float_table("float32"), INDICES, OFFSETS)
    for value in values:
        real = float_table("float32")
        members = {name: getattr(real, name) for name in ("data", "dtype", "dim", "compressed_indices_mapping")}
        for kind in (qembag.FloatTable, np.ndarray):
            impostor = type("Impostor", (), members | {"__class__": kind, attribute: value})()
            heir = type("Heir", (qembag.FloatTable,), {attribute: value})
            heirs = (heir.__new__(heir), heir(real.data, compressed_indices_mapping=MAPPING.copy()))
            for odd, given in itertools.product((impostor, *heirs), (None, out(3))):
                with contextlib.suppress(AttributeError, RuntimeError, *ERRORS):
                    same_bits(qembag.embedding_bag(odd, INDICES, OFFSETS, out=given), expected)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_are_tables_of_their_own(again: Any, bits: int) -> None:
    one = table(bits)
    before = one.dequantize()
    other = again(one)
    same_bits(other.dequantize(), before)
    other.__init__(ROWS[8], 8)
    same_bits(one.dequantize(), before)


@pytest.mark.parametrize("attribute", ["data", "bits", "dim", "compressed_indices_mapping", "num_rows", "shape"])
def test_an_impostor_of_a_table_crashes_nothing(level: str, attribute: str) -> None:
    """An object that says that it is a table; a table that says something else of itself; and one that was never made."""
    values = [make() for make in (*REFUSED.values(), *HOSTILE.values())]
    values += [place(plain, way).value for way in WAYS for plain in (ROWS[8][:2], ROWS[4], ROWS[2], MAPPING)]
    values += [0, 1, 3, 2**31 - 1, 2**63 - 1, -1, None, ROWS[8][:0], ROWS[8][:, :0], ROWS[8][0], MAPPING + 99]
    values += [strided(ROWS[8], (NUM_ROWS, DIM + 8), (DIM + 8, 0)), strided(ROWS[8], (0, sys.maxsize // 2), (1, 1))]
    expected = qembag.embedding_bag(table(), INDICES, OFFSETS)
    for value in values:
        real = table()
        members = {name: getattr(real, name) for name in ("data", "bits", "dim", "compressed_indices_mapping")}
        impostor = type("Impostor", (), members | {"__class__": qembag.QuantizedTable, attribute: value})()
        heir = type("Heir", (qembag.QuantizedTable,), {attribute: value})
        for odd in (impostor, heir.__new__(heir), heir(ROWS[8].copy(), 8, compressed_indices_mapping=MAPPING.copy())):
            for given in (None, out(3)):
                with contextlib.suppress(AttributeError, RuntimeError, *ERRORS):
                    answer = qembag.embedding_bag(odd, INDICES, OFFSETS, out=given)
                    same_bits(answer, expected)


# ---- Odd arrays ----------------------------------------------------------------------------------------------------

HUGE = [2**62, -(2**62), sys.maxsize, -sys.maxsize - 1, sys.maxsize // 2 + 1, 0, 1, -1]


@pytest.mark.parametrize("stride", [stride for stride in HUGE if abs(stride) <= sys.maxsize + 1])
def test_the_stride_of_a_single_row_or_of_none_says_nothing(level: str, bits: int, stride: int) -> None:
    """NumPy lets it be any number, as far as the other end of all addresses."""
    rows = ROWS[bits]
    expected = qembag.QuantizedTable(rows[:1].copy(), bits).dequantize()
    one = qembag.QuantizedTable(strided(rows, (1, rows.shape[1]), (stride, 1)), bits)
    none = qembag.QuantizedTable(strided(rows, (0, rows.shape[1]), (stride, stride)), bits)
    whole = qembag.QuantizedTable(rows[:1], bits, compressed_indices_mapping=[0, -1])
    index, end = strided(np.array([0]), (1,), (stride,)), strided(np.array([1]), (1,), (stride,))
    weight = strided(np.float32([1]), (1,), (stride,))
    for kind in (np.float32, np.float16):
        memory = np.zeros((3, DIM), kind)
        out = strided(memory[1:], (1, DIM), (stride, memory.itemsize))
        for looked_up in (
            lambda out=out: qembag.embedding_bag(one, index, [0], out=out),
            lambda out=out: qembag.embedding_bag(one, index, index, per_sample_weights=weight, out=out),
            lambda out=out: qembag.embedding_bag(one, index, np.array([0, 1]), include_last_offset=True, out=out),
            lambda out=out: qembag.embedding_bag(whole, index.reshape(1, 1), mode="max", out=out),
            lambda out=out: qembag.embedding(one, index, out=out),
            lambda out=out: qembag.embedding(one, index.reshape(1, 1), out=out.reshape(1, 1, DIM))[0],
        ):
            memory[:] = 0
            assert looked_up().shape == (1, DIM)
            same_bits(memory[1:2], expected.astype(kind))
            assert not memory[::2].any()
    for empty in (none.dequantize(), qembag.embedding_bag(one, index, end, include_last_offset=True)[:0]):
        assert empty.shape == (0, DIM)
    with pytest.raises(IndexError):
        qembag.embedding(none, index)
    same_bits(
        qembag.quantize(strided(FLOATS, (1, DIM), (stride, 4)), bits).data, qembag.quantize(FLOATS[:1], bits).data
    )


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5, 9])
@pytest.mark.parametrize(
    "stride", [2**62, -(2**62), sys.maxsize, -sys.maxsize - 1, sys.maxsize // 4, 2**31 - 1, -(2**31)]
)
def test_rows_so_far_apart_that_addresses_overflow_are_compared_with_an_output(
    level: str, bits: int, num_rows: int, stride: int
) -> None:
    """No such array is there but by `as_strided`. Its first row is, and the others are not looked up."""
    if abs(stride) > sys.maxsize + 1:
        return
    rows = ROWS[bits].copy()
    one = qembag.QuantizedTable(strided(rows, (num_rows, rows.shape[1]), (stride, 1)), bits)
    expected = qembag.embedding(qembag.QuantizedTable(rows, bits), [0])
    out = np.zeros((1, DIM), np.float32)
    for index in (np.array([0]), [0]):
        out[:] = 0
        error = error_of(qembag.embedding, one, index, out=out)
        if error is None:
            same_bits(out, expected)
        else:
            assert str(error).startswith("out must share no memory with the table")
            assert not out.any()


ZERO_SIZED = [(0,), (0, 0), (0, 3), (3, 0), (2**40, 0), (0, 2**40), (2, 0, 3), (2, 3, 0)]


@pytest.mark.parametrize("shape", ZERO_SIZED, ids=str)
@pytest.mark.skipif(sys.maxsize < 2**40, reason="for addresses of 64 bits")
def test_arrays_of_no_elements_have_defined_answers(level: str, bits: int, shape: tuple[int, ...]) -> None:
    for kind in (np.int32, np.int64, np.uint8):
        nothing = np.empty(shape, kind)
        if max(shape) < 100:
            assert qembag.embedding(table(bits), nothing).shape == (*shape, DIM)
            out = np.empty((*shape, DIM), np.float32)
            assert qembag.embedding(table(bits), nothing, out=out) is out
        else:
            with contextlib.suppress(MemoryError, ValueError):
                assert qembag.embedding(table(bits), nothing).shape == (*shape, DIM)
        if len(shape) == 2 and shape[0] < 100:
            same_bits(qembag.embedding_bag(table(bits), nothing), np.zeros((shape[0], DIM), np.float32))
        elif len(shape) != 1:
            with pytest.raises((MemoryError, ValueError)):
                qembag.embedding_bag(table(bits), nothing)
        if kind is np.uint8 and len(shape) == 2:
            with contextlib.suppress(MemoryError, OverflowError, ValueError):
                one = qembag.QuantizedTable(nothing, bits)
                assert one.dequantize().shape == one.shape
                assert one.codes().shape == one.shape
                assert qembag.embedding_bag(one, np.empty((2, 0), int)).shape == (2, one.dim)
        with contextlib.suppress(TypeError, MemoryError, ValueError):
            assert qembag.quantize(nothing.astype(np.float32), bits).shape == shape


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_outputs_of_either_type_lie_anywhere(level: str, bits: int, threads: int, kind: Any) -> None:
    one = table(bits)
    expected = qembag.embedding_bag(one, INDICES, OFFSETS, dtype=kind)
    size = expected.itemsize
    memory = np.zeros(40 * DIM * size + 1, np.uint8)
    for shift in (0, 1, 3):
        row = DIM * size
        for stride in (row, row + 1, row + size, 5 * row, -row, -row - 1, -3 * row):
            memory[:] = 0x55
            middle = np.frombuffer(memory, np.uint8)[20 * row + shift :]
            out = strided(middle[: middle.size // size * size].view(kind), (3, DIM), (stride, size))
            assert qembag.embedding_bag(one, INDICES, OFFSETS, out=out) is out
            same_bits(out.copy(), expected)
            out[...] = np.frombuffer(b"\x55" * size, kind)[0]
            assert (memory == 0x55).all()


# ---- Signals -------------------------------------------------------------------------------------------------------

LONG = {
    "nothing": lambda given: None,
    **{
        name: MISCHIEF[name] for name in ("indices.shape", "indices.dtype", "out.shape", "out, read-only", "other rows")
    },
    "a call of its own": lambda given: qembag.embedding_bag(table(), INDICES, OFFSETS, num_threads=2),
    "threads": lambda given: qembag.set_num_threads(3),
    "fork": lambda given: os.waitpid(given["children"].append(os.fork()) or given["children"][-1] or os._exit(0), 0),
    "no names": lambda given: given.clear(),
    # NumPy refuses where somebody else has a reference, as a call has to its arguments.
    "indices, resized": lambda given: refused(given["indices"].resize, 10),
    "out, resized": lambda given: refused(given["out"].resize, 10),
    "rows, resized": lambda given: refused(given["table"].data.base.resize, 10),
}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="for systems with timers")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
@pytest.mark.parametrize("mischief", LONG)
def test_what_a_signals_handler_does_to_the_arguments_does_not_count(mischief: str, threads_as_before: None) -> None:
    """A long call in the main thread, four times as long as until the signal on a fast machine, runs it between two
    pieces of its work."""
    handled = []
    rng = np.random.default_rng(0)
    rows = packed_rows(rng, 500, 1024, 8)
    given: dict[str, Any] = {"table": qembag.QuantizedTable(rows.copy(), 8), "children": []}
    count = 300_000 if UNDER_SANITIZER else 3_000_000
    given["indices"] = rng.integers(0, 500, count, dtype=np.int64)
    offsets = np.arange(0, count, 300)
    given["out"] = np.zeros((len(offsets), 1024), np.float32)
    expected = qembag.embedding_bag(qembag.QuantizedTable(rows, 8), given["indices"].copy(), offsets)
    memory = memoryview(given["out"])

    def handler(*_: Any) -> None:
        if not handled:
            handled.append(time.perf_counter())
            LONG[mischief](given)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        qembag.embedding_bag(given["table"], given["indices"], offsets, out=given["out"], num_threads=2)
        ended = time.perf_counter()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled
    assert handled[0] < ended
    same_bits(np.asarray(memory), expected)


# ---- Depth, references, memory ---------------------------------------------------------------------------------------


def test_a_call_without_stack_left_ends_in_recursion_error_alone() -> None:
    expected = qembag.embedding_bag(table(), INDICES.tolist(), OFFSETS.tolist())
    answers: list[Any] = []

    def deeper() -> None:
        with contextlib.suppress(RecursionError):
            deeper()
            return
        try:
            answers.append(qembag.embedding_bag(table(), INDICES.tolist(), OFFSETS.tolist()))
        except RecursionError:
            answers.append(None)

    with contextlib.suppress(RecursionError):
        deeper()
    for answer in filter(lambda answer: answer is not None, answers):
        same_bits(answer, expected)
    same_bits(qembag.embedding_bag(table(), INDICES.tolist(), OFFSETS.tolist()), expected)


@pytest.mark.parametrize("function", CALLS)
def test_no_call_keeps_a_reference(function: str, threads_as_before: None) -> None:
    """Neither one that answers nor one that fails, whichever argument it fails at."""
    call, given = good_call(function)
    call(**given)
    arrays = [name for name, value in given.items() if isinstance(value, np.ndarray)]
    before = [sys.getrefcount(given[name]) for name in arrays]
    for _ in range(10):
        call(**given)
        for argument in given:
            for wrong in (raising("__array__", "__index__"), np.full(7, -1), [2**62]):
                with contextlib.suppress(*ERRORS):
                    call(**{**given, argument: wrong})
    gc.collect()
    assert [sys.getrefcount(given[name]) for name in arrays] == before


def test_calls_that_fail_leave_no_memory_behind() -> None:
    calls = [
        (call, {**given, argument: wrong})
        for call, given in (
            good_call(name)
            for name in (
                "embedding_bag",
                "embedding",
                "quantize",
                "QuantizedTable",
                "FloatTable",
                "embedding_bag of lengths",
                "embedding_bag of an array",
            )
        )
        for argument in given
        for wrong in (raising("__array__", "__index__"), np.full(6, 99), [2**62], "text")
    ]

    def fail() -> None:
        for call, given in calls:
            with contextlib.suppress(*ERRORS):
                call(**given)

    for _ in range(5):
        fail()
    gc.collect()
    tracemalloc.start()
    try:
        fail()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            fail()
        gc.collect()
        # A forgotten object is 32 bytes or more a call. NumPy and Python keep some tens of kilobytes in all.
        assert tracemalloc.get_traced_memory()[0] - before < 10 * 200 * len(calls)
    finally:
        tracemalloc.stop()
