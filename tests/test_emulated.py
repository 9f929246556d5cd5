"""What an x86-64 processor without AVX2 or AVX-512 is given, on one that has both: by qemu's user emulation.

A wrong choice dies of an illegal instruction. The emulator has no AVX-512; that level is tested where the machine has it.
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest

import qembag

EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
# The processor, and the levels that it must be found to have.
PROCESSORS = {
    "Nehalem": ["baseline"],
    "SandyBridge": ["baseline"],  # AVX, and nothing of AVX2
    "IvyBridge": ["baseline"],  # and F16C
    "Haswell": ["baseline", "avx2"],
    "max,-avx2": ["baseline"],
    "max,-fma": ["baseline"],
    "max,-f16c": ["baseline"],
    "max,-avx": ["baseline"],
    "max,-xsave": ["baseline"],
}

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64-static is not installed"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32, reason="for x86-64 Linux"
    ),
]


def run_on(processor: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python on an emulated processor, with the qembag that is tested here."""
    # OPENBLAS_CORETYPE, where it is set, names this machine's processor to NumPy's library, not the emulated one.
    ours = ("QEMBAG_KERNELS", "OPENBLAS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = [str(pathlib.Path(qembag.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [str(EMULATOR), "-cpu", processor, sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
    )


@pytest.mark.parametrize(("processor", "levels"), PROCESSORS.items())
def test_a_processor_is_given_the_levels_that_it_has(processor: str, levels: list[str]) -> None:
    code = """
import numpy as np, qembag
config = qembag.show_config()
table = qembag.quantize(np.arange(300, dtype=np.float32).reshape(3, 100))
assert qembag.embedding_bag(table, [[0, 2]]).shape == (1, 100)
print(config["level"], *config["levels"])
"""
    done = run_on(processor, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [levels[-1], *levels]


@pytest.mark.parametrize("processor", ["SandyBridge", "Haswell"])
def test_a_level_that_a_processor_lacks_cannot_be_forced(processor: str) -> None:
    done = run_on(processor, "-c", "import qembag", QEMBAG_KERNELS="avx512")
    assert done.returncode == 1
    known = ", ".join(PROCESSORS[processor])
    assert f"QEMBAG_KERNELS must be one of {known} on this machine, got 'avx512'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["SandyBridge", "Haswell"])
def test_an_emulated_processor_gives_the_golden_bits(processor: str) -> None:
    done = run_on(processor, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_golden.py")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    for level in PROCESSORS[processor]:
        assert re.search(rf"test_sums_are_those_that_torch_gave\[[^]]*{level}[^]]*\] PASSED", done.stdout)
    assert "SKIPPED" not in done.stdout
