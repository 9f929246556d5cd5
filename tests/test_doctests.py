"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pickle
import pkgutil
import pydoc
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import qembag


def parameter(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.torch] if name.startswith("qembag.torch") else [])


MODULES = [
    parameter(module.name)
    for module in pkgutil.walk_packages(qembag.__path__, "qembag.")
    if not module.name.startswith(("qembag._kernels", "qembag.__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name: str) -> None:
    room = name.split(".")[1]
    for package in {"engines": ["nanoarrow", "pyarrow"], "sklearn": ["sklearn"], "torch": ["torch"]}.get(room, []):
        pytest.importorskip(package)
    if name.startswith("qembag.engines.serve"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's
            pytest.importorskip("ray.serve")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# Collected here, by their type: whether doctest's finder takes a compiled function for a module's own depends on Python.
COMPILED = {
    value.__name__: value
    for module in (qembag, qembag.ops)
    for value in vars(module).values()
    if type(value).__name__ == "cython_function_or_method"
}


def test_compiled_functions_are_collected() -> None:
    assert COMPILED.keys() == {
        "embedding",
        "embedding_bag",
        *(f"embedding_{bits}" for bits in ("byte", "4bit", "2bit")),
        *(f"embedding_bag_{bits}" for bits in ("byte", "4bit", "2bit")),
        *(f"embedding_bag_{bits}_rowwise_offsets" for bits in ("byte", "4bit", "2bit")),
    }


def failed_examples(function: Callable[..., Any]) -> int:
    test = doctest.DocTestParser().get_doctest(function.__doc__, {}, function.__name__, None, None)
    return doctest.DocTestRunner().run(test).failed


@pytest.mark.parametrize("name", COMPILED)
def test_examples_of_compiled_functions_run(name: str) -> None:
    assert failed_examples(COMPILED[name]) == 0


def test_a_failed_example_is_found() -> None:
    def wrong() -> None:
        """Adds.

        >>> 1 + 1
        3
        """

    assert failed_examples(wrong) == 1


@pytest.mark.parametrize("name", sorted(set(qembag.__all__) - {"__version__", "ops"}))
def test_every_public_name_has_an_example(name: str) -> None:
    assert doctest.DocTestParser().get_examples(getattr(qembag, name).__doc__), f"{name} has no example"


def test_every_operator_is_documented() -> None:
    for name in qembag.ops.__all__:
        operator = getattr(qembag.ops, name)
        assert operator.__name__ == name
        assert operator.__module__ == "qembag.ops"
        assert operator.__doc__, name


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_function_says_what_a_python_one_would(name: str) -> None:
    """Its signature, where it is imported from, and how it is pickled."""
    function = COMPILED[name]
    parameters = inspect.signature(function).parameters
    home = "qembag.lookup" if name in ("embedding", "embedding_bag") else "qembag.ops"
    assert function.__module__ == home
    assert getattr(importlib.import_module(home), name) is function
    assert pickle.loads(pickle.dumps(function)) is function
    # Newer Pythons break a long signature after its bracket.
    assert f"{name}({next(iter(parameters))}" in "".join(pydoc.plain(pydoc.render_doc(function)).split())
    assert [*parameters][:2] == ["table" if home == "qembag.lookup" else "weight", "indices"]
