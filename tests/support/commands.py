"""The `qembag` command, in this process or in one of its own, and files for it."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from qembag import cli


class Command:
    """Runs the command in this process, and says what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> str:
        """What a job prints that succeeds."""
        status = cli.main([*map(str, arguments)])
        printed = self._capsys.readouterr()
        assert (status, printed.err) == (0, "")
        return printed.out

    def fails(self, *arguments: object, prints: str = "") -> str:
        """The one line of a job that fails, without the command's name."""
        assert cli.main([*map(str, arguments)]) == 1
        printed = self._capsys.readouterr()
        assert printed.out == prints
        return self._line(printed.err, arguments[0])

    def refuses(self, *arguments: object) -> str:
        """The one line for wrong arguments."""
        with pytest.raises(SystemExit) as stopped:
            cli.main([*map(str, arguments)])
        assert stopped.value.code == 2
        printed = self._capsys.readouterr()
        assert printed.out == ""
        return self._line(printed.err, arguments[0])

    @staticmethod
    def _line(text: str, command: object) -> str:
        beginning = f"qembag {command}: error: "
        assert text.startswith(beginning)
        assert text.count("\n") == 1
        assert text.endswith("\n")
        return text[len(beginning) : -1]


def python_m_qembag(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    from conftest import child_environment

    command = [sys.executable, "-W", "error", "-m", "qembag", *map(str, arguments)]
    given = {"capture_output": True, "text": True, "env": child_environment()} | options
    return subprocess.run(command, timeout=120, check=False, **given)


def float_rows(num_rows: int = 300, dim: int = 32) -> np.ndarray:
    return np.random.default_rng(20261127).normal(size=(num_rows, dim)).astype(np.float32)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
        return number
