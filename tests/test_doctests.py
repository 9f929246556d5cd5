"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import qembag

MODULES = [
    importlib.import_module(f"qembag.{module.name}")
    for module in pkgutil.iter_modules(qembag.__path__)
    if not module.name.startswith(("_kernels", "__main__"))
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_of_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", sorted(set(qembag.__all__) - {"__version__", "ops"}))
def test_every_public_name_has_an_example(name: str) -> None:
    found = doctest.DocTestFinder().find(getattr(qembag, name), name)
    assert any(example.examples for example in found), f"{name} has no example"


def test_every_operator_is_documented() -> None:
    for name in qembag.ops.__all__:
        operator = getattr(qembag.ops, name)
        assert operator.__name__ == name
        assert operator.__doc__, name
