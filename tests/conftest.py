"""Shared makers, and what every test of kernels runs over: each level of this machine, and 1, 2 and 3 threads."""

from __future__ import annotations

import gc
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.register_assert_rewrite("support")

import qembag
from support import levels
from support.arrays import same_bits
from support.asking import DIM, NUM_ROWS, Ask
from support.commands import Command
from support.layouts import bag_offsets, packed_rows
from support.lookups import Table
from support.sampling import one_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# What `tools/test_sanitized` loads has an allocator of its own, which other tests cannot replace, and which forks break.
UNDER_SANITIZER = "san" in os.environ.get("LD_PRELOAD", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="one in N cases of each test, and at least one")


# After the other hooks: of what -m and -k left.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:], left_out = one_in(config.getoption("--one-in"), items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Twenty thousand tests are a million objects, which each full collection of garbage would look through again."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    config = qembag.show_config()
    return f"qembag {config['version']} from {qembag.__path__[0]}: {config}, numpy {np.__version__}"


def child_environment(**variables: str) -> dict[str, str]:
    """For a Python that is to find the qembag that is tested here, wherever it was imported from, and what tests share."""
    paths = [str(Path(qembag.__path__[0]).parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables


@pytest.fixture(params=levels.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level that this machine can run serves in turn."""
    with levels.use(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads for each call that does not say otherwise."""
    qembag.set_num_threads(request.param)
    yield request.param
    qembag.set_num_threads(None)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261122)


@pytest.fixture(params=[8, 4, 2])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(name="packed_rows")
def packed_rows_fixture() -> Callable[..., np.ndarray]:
    return packed_rows


@pytest.fixture(name="bag_offsets")
def bag_offsets_fixture() -> Callable[..., np.ndarray]:
    return bag_offsets


@pytest.fixture(name="same_bits")
def same_bits_fixture() -> Callable[[Any, Any], None]:
    return same_bits


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of the package by its name; the root is not on the path of every way to run pytest."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The `qembag` command, in this process."""
    return Command(capsys)


# ---- One small table, and calls for bags of it -----------------------------------------------------------------------


@pytest.fixture
def rows(bits: int, rng: np.random.Generator) -> np.ndarray:
    return packed_rows(rng, NUM_ROWS, DIM, bits)


@pytest.fixture
def table(bits: int, rows: np.ndarray) -> Table:
    return Table(rows, bits)


@pytest.fixture(params=["public", "rowwise", "packed"])
def ask(request: pytest.FixtureRequest, level: str, bits: int, rows: np.ndarray) -> Ask:
    """Each way to have bags looked up, at each level and width."""
    return Ask(request.param, bits, rows)


@pytest.fixture
def public(level: str, bits: int, rows: np.ndarray) -> Ask:
    return Ask("public", bits, rows)
