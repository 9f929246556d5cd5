"""The commands in docs/cli.md run in order, as they are written, and print what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import UNDER_SANITIZER, child_environment
from support.documents import blocks, is_as_shown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="the documents are not beside the tests"),
    pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="no bash"),
]


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.skipif(UNDER_SANITIZER, reason="slow there")
def test_each_command_runs_and_prints_what_is_shown(tmp_path):
    programs, folder = tmp_path / "bin", tmp_path / "empty"
    programs.mkdir()
    folder.mkdir()
    executable(programs / "qembag", f'#!/bin/sh\nexec "{sys.executable}" -m qembag "$@"\n')
    executable(programs / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    environment = child_environment(PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    for script, shown in blocks(PAGE.read_text(), "sh"):
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), script
        # Where nothing is shown, most print nothing.
        assert is_as_shown(done.stdout, shown), f"{script}\nprinted\n{done.stdout}"


def test_each_command_is_there():
    text = "".join(script for script, _ in blocks(PAGE.read_text(), "sh"))
    named = {"quantize", "convert", "dequantize", "inspect", "compare", "lookup", "prune", "demo", "bench"}
    assert {name for name in named if f"qembag {name} " in text} == named


def test_blocks_and_what_they_print_are_found():
    text = "a\n\n```sh\necho 1\necho 2\n```\n\n    1\n    2\n\nb\n\n```sh\ntrue\n```\n"
    assert blocks(text, "sh") == [("echo 1\necho 2\n", "1\n2"), ("true\n", "")]
    assert is_as_shown("1.25 s\nok\n", "... s\nok")
    assert not is_as_shown("1.25 s\nbad\n", "... s\nok")
