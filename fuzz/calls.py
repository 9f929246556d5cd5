"""Bytes to calls of the package: every choice of a call is read from a fuzzer's input.

An input is a row of scenes. A scene makes arguments of all kinds, right and wrong, and with them some calls: the same
ones at each level, with an output and without. What must come of them is known by two roads that share nothing with the
package, both of `tests/support`: the oracle says what a right call returns, and the rules of the arguments say which
errors a wrong one may raise. A byte of zero, as which all bytes behind an input's end count, is the plainest choice.

Arrays lie in blocks of exactly their size, each an allocation of its own, so that AddressSanitizer sees the first byte
that is read or written beyond them. Nothing here needs a fuzzer: `tests/test_fuzzed.py` runs the same calls without.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import scenes_of_collections
import scenes_of_lookups
import scenes_of_packing
import scenes_of_tables
from makers import Maker
from scenes_of_anything import anything
from source import Source
from support import levels

MOST_SCENES = 24
SCENES = (
    *[scenes_of_lookups.bags] * 8,
    *[scenes_of_lookups.single_rows] * 4,
    *[scenes_of_tables.tables] * 2,
    *[scenes_of_packing.quantizing] * 4,
    *[anything] * 2,
    *[scenes_of_lookups.storm] * 4,
    scenes_of_packing.shapes,
    scenes_of_tables.no_tables,
    *[scenes_of_tables.layouts] * 2,
    *[scenes_of_collections.collections] * 2,
)


def run(data: bytes) -> None:
    """All the calls of an input."""
    source = Source(data)
    with levels.use(levels.levels()[-1]), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Work for threads takes a hundred times as long as another scene: one at most, where it comes first.
        if source.byte() == 255:
            play(scenes_of_lookups.many_rows, source)
        for _ in range(MOST_SCENES):
            if source.is_at_end:
                break
            play(source.pick(SCENES), source)


def play(scene: Callable[[Maker], None], source: Source) -> None:
    make = Maker(source)
    scene(make)
    make.check_inputs()
