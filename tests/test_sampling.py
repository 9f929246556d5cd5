"""`pytest --one-in N`, with which builds that take long run a sample of the suite."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from conftest import child_environment
from support.sampling import one_in


def cases(function, count):
    return [SimpleNamespace(nodeid=f"tests/test_a.py::{function}[{number % 3}-{number}]") for number in range(count)]


def test_each_function_keeps_its_share_and_its_order():
    tests = [SimpleNamespace(nodeid="tests/test_a.py::test_alone"), *cases("test_few", 3), *cases("test_many", 300)]
    chosen, left_out = one_in(4, tests)
    functions = Counter(test.nodeid.partition("[")[0].rpartition("::")[2] for test in chosen)
    assert functions == {"test_alone": 1, "test_few": 1, "test_many": 75}
    assert [test for test in tests if test in chosen] == chosen
    assert [test for test in tests if test not in chosen] == left_out
    assert one_in(4, tests) == (chosen, left_out)


def test_each_value_of_a_parameter_has_its_share():
    chosen, _ = one_in(3, cases("test_many", 300))
    values = Counter(test.nodeid.partition("[")[2][0] for test in chosen)
    assert set(values) == {"0", "1", "2"}
    assert min(values.values()) >= 20


def test_one_in_one_is_all():
    tests = cases("test_many", 10)
    assert one_in(1, tests) == (tests, [])


@pytest.mark.parametrize(
    ("options", "count"), [((), 4), (("--one-in", "2"), 2), (("--one-in", "2", "-k", "red or blue"), 1)]
)
def test_pytest_takes_the_option(tmp_path, options, count):
    test = tmp_path / "test_of_numbers.py"
    test.write_text(
        'import pytest\n\n\n@pytest.mark.parametrize("n", ["red", "blue", "green", "black"])\ndef test_it(n):\n    pass\n'
    )
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "conftest",
        f"--rootdir={tmp_path}",
        "-c",
        "/dev/null",
    ]
    run = subprocess.run(
        [sys.executable, *command, *options, test],
        env=child_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{count} passed" in run.stdout
