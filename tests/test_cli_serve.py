"""`qembag serve`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import psutil
import pytest

from conftest import UNDER_SANITIZER, child_environment
from support.commands import free_port
from support.serving import answer_of, asked, bags_of, collection_of, json_body, saved

pytestmark = pytest.mark.skipif(UNDER_SANITIZER, reason="Ray's processes do not start there")
BAGS = bags_of(3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_starts_answers_and_ends(tmp_path, number):
    path, port = saved(tmp_path), free_port()
    environment = child_environment(RAY_raylet_start_wait_time_s="120")
    command = [sys.executable, "-m", "qembag", "serve", str(path), "--port", str(port), "--replicas", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes, start_new_session=True) as process:
        line = process.stdout.readline()
        assert line == f"Serving {path} on http://127.0.0.1:{port}/ until Ctrl-C.\n", process.stderr.read()
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
