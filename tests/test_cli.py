"""The `qembag` command: what all its commands have in common. In this process, except what only another one can show."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER, child_environment
from qembag import cli
from qembag.cli import output
from support.commands import float_rows, python_m_qembag

COMMANDS = ("quantize", "convert", "dequantize", "inspect", "compare", "lookup", "prune", "demo", "serve", "bench")
SMALL = ["--bags", "20", "--length", "3"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX's")


# ---- Without a command ---------------------------------------------------------------------------------------------


def test_without_arguments_it_says_what_is_installed(capsys):
    assert cli.main([]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    config = qembag.show_config()
    assert lines["qembag"] == qembag.__version__
    assert lines["level"] == config["level"]
    assert lines["levels"] == ", ".join(config["levels"])
    assert lines["OpenMP"].startswith("yes" if config["openmp"] else "no")
    assert lines["threads"] == str(config["num_threads"])


def test_python_m_qembag_is_the_command():
    done = python_m_qembag()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"qembag   {qembag.__version__}\n")
    wrong = python_m_qembag("demo", "--bags", "none")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "qembag demo: error: argument --bags: must be a whole number of at least 1, got 'none'\n"


def test_importing_qembag_imports_no_command_line():
    code = "import sys, qembag; sys.exit(any(name in sys.modules for name in ('argparse', 'qembag.cli', 'tqdm')))"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, env=child_environment())
    assert done.returncode == 0


def test_a_command_imports_no_other_command():
    code = "import sys; from qembag.cli import main; main(['inspect', '--help'])"
    code = f"try:\n {code}\nexcept SystemExit:\n print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, timeout=60, check=True, capture_output=True, text=True, env=child_environment())
    modules = done.stdout.split()
    assert {name for name in COMMANDS if f"qembag.cli.{name}" in modules} == {"inspect"}
    assert not {"matplotlib", "torch", "tqdm"} & set(modules)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo", *SMALL]])
@posix
def test_a_reader_that_has_gone_is_no_traceback(arguments, unbuffered):
    environment = child_environment(PYTHONUNBUFFERED=unbuffered)
    read, write = os.pipe()
    os.close(read)
    try:
        done = python_m_qembag(*arguments, capture_output=False, stdout=write, stderr=subprocess.PIPE, env=environment)
    finally:
        os.close(write)
    assert done.stderr == ""
    # Where nothing buffers it, argparse takes no notice that its help has no reader, or does: Pythons differ.
    assert done.returncode in ([0, 1] if arguments == ["--help"] and unbuffered else [1])


# ---- What each command says of itself ------------------------------------------------------------------------------


def test_the_help_names_each_command(command):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert tuple(cli.COMMANDS) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    example = printed[printed.index("\nExample:\n") :]
    assert f"\n  qembag {name} " in f"{example} "
    assert "\x1b" not in printed


def test_a_command_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["dance"])
    printed = capsys.readouterr().err
    assert "invalid choice: 'dance'" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_is_not_there(command, name):
    required = {"quantize": 2, "convert": 2, "dequantize": 2, "prune": 2, "demo": 0}.get(name, 1)
    assert command.refuses(name, *["x"] * required, "--colour") == "unrecognized arguments: --colour"


# ---- Faults ----------------------------------------------------------------------------------------------------------


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "describe_installation", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "qembag: interrupted\n"),
        (MemoryError(), "qembag: error: not enough memory\n"),
        (OSError(28, "No space left on device"), "qembag: error: No space left on device\n"),
        (output.Failure("two\nlines\x1b[31m"), "qembag: error: two lines\\x1b[31m\n"),
    ],
)
def test_faults_are_one_line(monkeypatch, capsys, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "describe_installation", fail)
    assert cli.main([]) == 1
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("must be 2, got 3"), "a.npy: must be 2, got 3"),
        (ValueError(f"{os.path.abspath('a.npy')}: is cut short"), "a.npy: is cut short"),
        (ValueError(f"{os.path.abspath('b.npy')}.part was begun"), f"{os.path.abspath('b.npy')}.part was begun"),
        (FileNotFoundError(2, "No such file", "c.npy"), "c.npy: No such file"),
        (OSError(28, "No space left on device"), "b.npy: No space left on device"),
        (KeyError("no table"), "a.npy: no table"),
        (IndexError(), "a.npy: IndexError"),
        (MemoryError(), "a.npy: not enough memory"),
    ],
)
def test_a_fault_names_its_file(error, message):
    with pytest.raises(output.Failure) as failed, output.about("a.npy", writes="b.npy"):
        raise error
    assert str(failed.value) == message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["inspect", "lookup"])
def test_a_full_disk_behind_the_output(tmp_path, name):
    np.save(tmp_path / "a.npy", float_rows())
    with open("/dev/full", "wb") as full:
        done = python_m_qembag(
            name, tmp_path / "a.npy", stdout=full, stderr=subprocess.PIPE, capture_output=False, input="1 2\n"
        )
    assert (done.returncode, done.stderr) == (1, f"qembag {name}: error: No space left on device\n")


@posix
def test_an_output_that_is_closed():
    script = f'"{sys.executable}" -m qembag >&-'
    done = subprocess.run(script, shell=True, capture_output=True, text=True, check=False, env=child_environment())
    assert (done.returncode, done.stderr) == (1, "qembag: error: the output is closed\n")


# ---- Terminals -------------------------------------------------------------------------------------------------------


def test_names_beyond_the_output_are_escaped(tmp_path):
    qembag.save_tables(tmp_path / "a.safetensors", {"größe": float_rows()}, metadata={"\x1b[2J": "red\n"})
    done = python_m_qembag("inspect", tmp_path / "a.safetensors", env=child_environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout
    assert "\\x1b[2J = red\\n" in done.stdout


def test_progress_is_for_terminals_and_takes_a_second(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = iter([0.0, 0.5, 2.0, 2.1, 4.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock, 9.0))
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with output.progress() as report:
        for rows in (100, 200, 300, 400):
            report(rows, 1000, rows << 20)
    *_, first, second, blank, end = sys.stderr.getvalue().split("\r")
    assert first == "200 of 1,000 rows (20%), 100.0 MiB/s, 0:00:08 left"
    assert second.rstrip() == "400 of 1,000 rows (40%), 100.0 MiB/s, 0:00:06 left"
    assert (blank.strip(), end) == ("", "")
    assert len(blank) >= len(first)
    assert "\x1b" not in sys.stderr.getvalue()
    with output.progress(quiet=True) as report:
        assert report is None
    monkeypatch.setenv("TERM", "dumb")
    with output.progress() as report:
        assert report is None
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with output.progress() as report:
        assert report is None


def test_a_short_job_shows_no_progress(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output.time, "monotonic", lambda: 7.0)
    with output.progress() as report:
        report(1, None, 1)
    assert sys.stderr.getvalue() == ""


def test_progress_without_an_end():
    assert output.progress_line(1500, None, 3 << 20, 2.0) == "1,500 rows, 1.5 MiB/s"


@posix
@pytest.mark.slow
@pytest.mark.skipif(UNDER_SANITIZER, reason="slow there")
@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_progress_on_a_real_terminal(tmp_path, quiet):
    """The command waits for a terminal's size, colours or keys in no case: all it writes is its own line."""
    pty = pytest.importorskip("pty")
    np.save(tmp_path / "a.npy", float_rows(200_000, 64))
    # 0 seconds in place of one: the job need not be long.
    code = "import sys; from qembag.cli import main, output; output.PATIENCE = 0; sys.exit(main())"
    master, slave = pty.openpty()
    command = [sys.executable, "-c", code, "quantize", tmp_path / "a.npy", tmp_path / "a.safetensors", *quiet]
    environment = child_environment(TERM="xterm", NO_COLOR="1")
    with subprocess.Popen([*map(str, command)], stderr=slave, stdout=subprocess.PIPE, env=environment) as process:
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 4096):
                shown += piece
        except OSError:  # how Linux says that the other end is closed
            pass
        assert process.stdout.read() == b""
    os.close(master)
    assert process.returncode == 0
    assert (b"of 200,000 rows (" in shown) == (not quiet)
    assert b"\x1b" not in shown


@posix
@pytest.mark.slow
@pytest.mark.skipif(UNDER_SANITIZER, reason="slow there")
def test_ctrl_c_is_one_line_and_resume_goes_on(tmp_path):
    source, target = tmp_path / "a.npy", tmp_path / "a.safetensors"
    np.save(source, float_rows(400_000, 64))
    # Each block waits, so that the signal comes in the midst.
    code = (
        "import contextlib, signal, sys, time; from qembag.cli import main, quantize\n"
        # Python has no handler of its own where the signal was ignored at its start, as in a shell's background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "@contextlib.contextmanager\n"
        "def slowly(quiet):\n"
        "    yield lambda *_: (print('block', flush=True), time.sleep(2))\n"
        "quantize.progress = slowly\nsys.exit(main())"
    )
    command = [sys.executable, "-c", code, "quantize", str(source), str(target)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=child_environment()) as process:
        assert process.stdout.readline() == "block\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "qembag quantize: interrupted: --resume goes on from here\n")
    assert not target.exists()
    assert (tmp_path / "a.safetensors.part").exists()
    assert cli.main(["quantize", str(source), str(target), "--resume"]) == 0
    assert not (tmp_path / "a.safetensors.part").exists()
    assert np.array_equal(qembag.open_table(target).data, qembag.quantize(np.load(source), 4, method="lsq").data)
