"""A minute of load from 32 threads: no wrong bit, no error, no memory that grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import child_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def test_a_minute_of_load_from_32_threads():
    command = [sys.executable, Path(__file__).with_name("soak.py"), "60", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=child_environment())
    said = json.loads(done.stdout)
    assert (done.returncode, said["faults"]) == (0, []), done.stderr
    assert said["calls"] > 1000
    _, second, _, last = said["MB resident, by quarter"]
    assert last - second < 20, said
    # A leak of one small object in a hundred calls would be more.
    assert abs(said["allocated since"]["blocks"]) < 1000, said
    assert abs(said["allocated since"].get("bytes", 0)) < 64_000, said
