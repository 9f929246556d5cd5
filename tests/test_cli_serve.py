"""`qembag serve`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import UNDER_SANITIZER, child_environment
from support.commands import free_port
from support.serving import answer_of, asked, bags_of, collection_of, json_body, saved

psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(UNDER_SANITIZER, reason="Ray's processes do not start there")
BAGS = bags_of(3)


@contextlib.contextmanager
def started(path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "qembag", "serve", str(path), "--port", str(port), "--replicas", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for tries_left in (2, 1, 0):
        with subprocess.Popen(command, env=child_environment(), **pipes, start_new_session=True) as process:
            line = process.stdout.readline()
            if line == f"Serving {path} on http://127.0.0.1:{port}/ until Ctrl-C.\n":
                yield process
                return
            printed, complaints = process.communicate(timeout=60)
            # Ray waits 30 s for itself, which a busy machine may exceed.
            assert tries_left, complaints
            assert "timed out during startup" in complaints, line + printed + complaints
            assert complaints.startswith("qembag serve: error: Ray Serve: ")
            assert complaints.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_starts_answers_and_ends(tmp_path, number):
    path, port = saved(tmp_path), free_port()
    with started(path, port) as process:
        assert np.array_equal(asked(port, json_body(BAGS)).vectors, answer_of(collection_of(), BAGS))
        children = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        printed, complaints = process.communicate(timeout=60)
        assert (process.returncode, printed, complaints) == (0, "", "")
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []


def test_wrong_files_and_ports_are_told_at_once(command, tmp_path):
    assert command.fails("serve", tmp_path / "none.safetensors").endswith("none.safetensors: No such file or directory")
    (tmp_path / "a.safetensors").write_bytes(b"{}")
    assert "a.safetensors: " in command.fails("serve", tmp_path / "a.safetensors")
    path = saved(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = f"http://127.0.0.1:{port}/: Address already in use"
        assert command.fails("serve", path, "--port", port) == text
    assert command.fails("serve", path, "--host", "192.0.2.1").startswith("http://192.0.2.1:8000/: ")
    assert "--port: must be a port from 1 to 65535" in command.refuses("serve", path, "--port", 70000)
    assert "--replicas: must be a whole number of at least 1" in command.refuses("serve", path, "--replicas", 0)
