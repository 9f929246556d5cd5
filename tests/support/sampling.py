"""A sample of the suite, for builds on which all of it takes too long: `pytest --one-in N`."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest


def one_in(count: int, tests: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Those that run and those that do not: one in `count` of each function's cases, and at least one of each function.

    Chosen by a hash of their names: the same in each run, and without a period, which might meet that of a parameter.
    """
    of_function: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for test in tests:
        of_function[test.nodeid.partition("[")[0]].append(test)
    chosen: set[str] = set()
    for cases in of_function.values():
        names = sorted((case.nodeid for case in cases), key=lambda name: crc32(name.encode()))
        chosen.update(names[: math.ceil(len(names) / count)])
    return [test for test in tests if test.nodeid in chosen], [test for test in tests if test.nodeid not in chosen]
