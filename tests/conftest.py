"""Shared makers, and what every test of kernels runs over: each level of this machine, and 1, 2 and 3 threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import qembag
from qembag import _dispatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TAIL = {8: ("<f4", 8), 4: ("<f2", 4), 2: ("<f2", 4)}


def pytest_report_header() -> str:
    config = qembag.show_config()
    return f"qembag {config['version']} from {qembag.__path__[0]}: {config}, numpy {np.__version__}"


def child_environment(**variables: str) -> dict[str, str]:
    """For a Python that is to find the qembag that is tested here, wherever it was imported from."""
    paths = [str(Path(qembag.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables


@pytest.fixture(params=list(_dispatch.MODULES))
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each level that this machine can run serves in turn."""
    monkeypatch.setattr(_dispatch, "kernels", _dispatch.load(request.param))
    return request.param


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


def packed_rows(rng: np.random.Generator, num_rows: int, dim: int, bits: int, extremes: bool = False) -> np.ndarray:
    """Rows of full-range codes, scales and biases of either sign; with `extremes`, some of them denormal, huge, zero or
    infinite."""
    kind, tail_bytes = TAIL[bits]
    codes_bytes = -(-dim * bits // 8)
    rows = rng.integers(0, 256, (num_rows, codes_bytes + tail_bytes), dtype=np.uint8)
    tail = rng.normal(size=(num_rows, 2))
    if extremes:
        special = [0.0, -0.0, np.inf, -np.inf, 6e-8, 1e-40, -1e-44, 65504.0, 3e38, -3e38]
        picks = rng.integers(0, 4 * len(special), tail.shape)
        tail = np.where(picks < len(special), np.resize(special, 4 * len(special))[picks], tail)
    with np.errstate(all="ignore"):
        rows[:, codes_bytes:] = tail.astype(kind).view(np.uint8)
    return rows


@pytest.fixture(name="packed_rows")
def packed_rows_fixture() -> Callable[..., np.ndarray]:
    return packed_rows


def bag_offsets(rng: np.random.Generator, num_bags: int, longest: int) -> np.ndarray:
    """Starts and the last end of bags of mixed lengths: a third empty, one long."""
    lengths = rng.integers(0, longest + 1, num_bags)
    lengths[rng.random(num_bags) < 1 / 3] = 0
    if num_bags:
        lengths[rng.integers(num_bags)] = 5 * longest
    return np.concatenate([[0], np.cumsum(lengths)])


@pytest.fixture(name="bag_offsets")
def bag_offsets_fixture() -> Callable[..., np.ndarray]:
    return bag_offsets


def same_bits(ours: Any, theirs: Any) -> None:
    """Equal in every bit, but for the sign and payload of a NaN."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    whole = np.dtype(f"u{ours.dtype.itemsize}")
    different = ours.view(whole) != theirs.view(whole)
    if ours.dtype.kind == "f":
        different &= ~(np.isnan(ours) & np.isnan(theirs))
    places = np.argwhere(different)
    assert not len(places), (
        f"{len(places)} of {ours.size} differ, first at {places[0]}: "
        f"{ours[tuple(places[0])]!r} is not {theirs[tuple(places[0])]!r}"
    )


@pytest.fixture(name="same_bits")
def same_bits_fixture() -> Callable[[Any, Any], None]:
    return same_bits
