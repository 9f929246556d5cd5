"""What an installation says of itself, how threads and kernels are chosen, and what importing it does to a process.

Most of this is decided once a process, so most tests start one of their own.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import qembag
from support import levels

PACKAGE = pathlib.Path(qembag.__file__).parent
LEVELS = levels.levels()
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def run(code: str, *, path: pathlib.Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the same qembag, or whatever lies in another folder."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "QEMBAG_"))}
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    )


def said(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- show_config ---------------------------------------------------------------------------------------------------


def test_show_config_describes_the_installation():
    config = qembag.show_config()
    assert set(config) == {"version", "level", "levels", "openmp", "openmp_version", "num_threads"}
    assert config["version"] == qembag.__version__
    assert config["levels"] == LEVELS
    assert config["level"] in LEVELS
    assert type(config["openmp"]) is bool
    assert config["openmp"] == (config["openmp_version"] > 0)
    assert config["num_threads"] == qembag.get_num_threads()


def test_show_config_tells_the_level_in_use(level):
    assert qembag.show_config()["level"] == level


def test_every_call_gives_a_configuration_of_its_own():
    qembag.show_config()["levels"].clear()
    qembag.show_config().clear()
    assert qembag.show_config()["levels"] == LEVELS


def test_every_public_name_is_there():
    assert set(qembag.__all__) <= set(dir(qembag))
    assert len(set(qembag.__all__)) == len(qembag.__all__)
    for name in qembag.__all__:
        assert name.startswith("__") or getattr(qembag, name).__doc__


# ---- Threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _own_limit():
    yield
    qembag.set_num_threads(None)


@pytest.mark.usefixtures("_own_limit")
def test_a_limit_holds_until_it_is_taken_back():
    before = qembag.get_num_threads()
    for n in (1, 7, np.int64(3), 2**40):
        assert qembag.set_num_threads(n) is None
        assert qembag.get_num_threads() == min(n, 2**31 - 1)
        assert qembag.show_config()["num_threads"] == qembag.get_num_threads()
    qembag.set_num_threads(None)
    assert qembag.get_num_threads() == before
    assert type(qembag.get_num_threads()) is int


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, r"^n must be at least 1, got 0$"),
        (-3, ValueError, r"^n must be at least 1, got -3$"),
        (2.0, TypeError, r"^n must be a whole number, got float 2.0$"),
        ("2", TypeError, r"^n must be a whole number, got str '2'$"),
        (True, TypeError, r"^n must be a whole number, got bool True$"),
        ([1], TypeError, r"^n must be a whole number, got list$"),
    ],
)
@pytest.mark.usefixtures("_own_limit")
def test_a_bad_limit_is_an_error_and_the_old_one_stays(n, error, message):
    qembag.set_num_threads(5)
    with pytest.raises(error, match=message):
        qembag.set_num_threads(n)
    assert qembag.get_num_threads() == 5


@pytest.mark.usefixtures("_own_limit")
def test_the_limit_is_the_whole_processs():
    seen = []
    qembag.set_num_threads(4)
    thread = threading.Thread(target=lambda: (seen.append(qembag.get_num_threads()), qembag.set_num_threads(6)))
    thread.start()
    thread.join()
    assert seen == [4]
    assert qembag.get_num_threads() == 6


@pytest.mark.parametrize("num_threads", [0, -1, 1.5, "1", True])
def test_a_bad_num_threads_of_one_call_is_an_error(num_threads):
    table = qembag.quantize(np.eye(3, dtype=np.float32))
    for call in (qembag.embedding_bag, qembag.embedding):
        with pytest.raises((TypeError, ValueError), match=r"^num_threads must be (at least 1|a whole number), got "):
            call(table, [[0]], num_threads=num_threads)


needs_openmp = pytest.mark.skipif(not qembag.show_config()["openmp"], reason="built without OpenMP")


@needs_openmp
def test_openmps_own_limit_is_respected():
    code = "import qembag; print(qembag.get_num_threads(), qembag.show_config()['num_threads'])"
    assert said(code, OMP_NUM_THREADS="1") == "1 1"
    assert said(code, OMP_NUM_THREADS="5") == "5 5"
    code = "import qembag; qembag.set_num_threads(2); print(qembag.get_num_threads())"
    assert said(code, OMP_NUM_THREADS="5") == "2"


# How many threads a call starts. Those that NumPy keeps for itself are there before.
COUNT = """
import os, sys
import numpy as np, qembag
table = qembag.quantize(np.ones((1000, 64), dtype=np.float32), num_threads=1)
def started(num_indices, **options):
    indices = np.zeros((num_indices // 10, 10), dtype=np.int64)
    before = len(os.listdir("/proc/self/task"))
    qembag.embedding_bag(table, indices, **options)
    return len(os.listdir("/proc/self/task")) - before
"""


@needs_openmp
@linux_only
def test_a_large_call_uses_the_threads_it_may():
    assert said(COUNT + "print(started(100_000))", OMP_NUM_THREADS="3") == "2"
    assert said(COUNT + "print(started(100_000, num_threads=4))", OMP_NUM_THREADS="3") == "3"
    assert said(COUNT + "qembag.set_num_threads(2); print(started(100_000))", OMP_NUM_THREADS="3") == "1"
    assert said(COUNT + "qembag.set_num_threads(2); print(started(100_000, num_threads=3))") == "2"


@needs_openmp
@linux_only
def test_one_thread_and_small_calls_start_none():
    assert said(COUNT + "print(started(100_000))", OMP_NUM_THREADS="1") == "0"
    assert said(COUNT + "print(started(100_000, num_threads=1))", OMP_NUM_THREADS="3") == "0"
    assert said(COUNT + "print(started(100))", OMP_NUM_THREADS="3") == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_looks_up_after_its_parent_has_used_threads():
    code = """
    import os, warnings
    import numpy as np, qembag
    warnings.simplefilter("ignore")
    table = qembag.quantize(np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32))
    indices = np.random.default_rng(1).integers(0, 1000, (10_000, 10))
    expected = qembag.embedding_bag(table, indices, num_threads=3)
    child = os.fork()
    again = qembag.embedding_bag(table, indices, num_threads=3)
    assert np.array_equal(again, expected)
    if child == 0:
        os._exit(42)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert said(code) == "42"


# ---- Which kernels serve -----------------------------------------------------------------------------------------------


def test_the_best_level_serves_unless_one_is_named():
    assert said("import qembag; print(qembag.show_config()['level'])") == LEVELS[-1]
    assert said("import qembag; print(qembag.show_config()['level'])", QEMBAG_KERNELS="") == LEVELS[-1]


@pytest.mark.parametrize("forced", LEVELS)
def test_each_level_can_be_forced(forced):
    code = """
    import numpy as np, qembag
    table = qembag.quantize(np.arange(12, dtype=np.float32).reshape(4, 3))
    print(qembag.show_config()["level"], qembag.embedding_bag(table, [[0, 3]]).round(1).tolist())
    """
    assert said(code, QEMBAG_KERNELS=forced) == f"{forced} [[9.0, 11.0, 13.0]]"


@pytest.mark.parametrize("forced", LEVELS[:-1])
def test_a_forced_level_imports_no_better_one(forced):
    """A processor without its instructions could not even import it."""
    code = "import sys, qembag; print(*sorted(m for m in sys.modules if m.startswith('qembag._kernels')))"
    expected = {"qembag._kernels", f"qembag.{levels.MODULES[forced]}"}
    assert said(code, QEMBAG_KERNELS=forced).split() == sorted(expected)


@pytest.mark.parametrize("name", ["nonsense", "AVX2", "avx1024", " baseline", "_kernels"])
def test_an_unknown_level_is_an_error_that_lists_the_known(name):
    done = run("import qembag", QEMBAG_KERNELS=name)
    assert done.returncode != 0
    expected = f"ValueError: QEMBAG_KERNELS must be one of {', '.join(LEVELS)} on this machine, got {name!r}"
    assert expected in done.stderr


def test_a_level_that_this_machine_lacks_is_an_error_that_lists_the_others(monkeypatch):
    from qembag import _runtime

    monkeypatch.setattr(_runtime._cpu, "x86_level", lambda: 0)
    monkeypatch.setattr(_runtime, "LEVELS", _runtime._available())
    assert list(_runtime.LEVELS) == LEVELS[:1]
    with pytest.raises(ValueError, match=rf"^QEMBAG_KERNELS must be one of {LEVELS[0]} on this machine, got 'avx512'$"):
        _runtime.use_level("avx512")
    assert qembag.show_config()["level"] in LEVELS


def test_levels_go_from_the_baseline_up():
    assert LEVELS[1:] == [level for level in ("avx2", "avx512") if level in LEVELS]
    assert [module.rpartition("_")[2] for module in levels.MODULES.values()] == ["kernels", *LEVELS[1:]]


# ---- What an import does ----------------------------------------------------------------------------------------------


def test_importing_flushes_no_denormals():
    """As code built with -ffast-math does, to every program that loads it and to each of its threads."""
    code = """
    import threading
    import numpy as np
    def kept():
        small = np.full(100, 1e-40, np.float32)
        return bool((small * np.float32(1) != 0).all() and np.float32(1e-30) * np.float32(1e-10) != 0
                    and 5e-324 * np.float64(1) != 0 and (small + np.float32(0) != 0).all())
    def kept_in_a_thread():
        seen = []
        thread = threading.Thread(target=lambda: seen.append(kept()))
        thread.start()
        thread.join()
        return seen[0]
    print(kept(), kept_in_a_thread())
    import qembag
    print(kept(), kept_in_a_thread())
    table = qembag.quantize(np.ones((1000, 64), np.float32))
    qembag.embedding_bag(table, np.zeros((10_000, 10), np.int64), num_threads=3)
    print(kept(), kept_in_a_thread())
    """
    assert said(code).split() == ["True"] * 6


def test_importing_brings_numpy_alone():
    code = """
    import sys
    import numpy
    before = set(sys.modules)
    import qembag
    roots = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(*sorted(roots - {"qembag"} - set(sys.stdlib_module_names) - set(sys.builtin_module_names)))
    """
    brought = set(said(code).split())
    assert not brought & {"torch", "scipy", "pandas", "hypothesis", "pytest", "safetensors", "tokenizers"}


@pytest.mark.parametrize("first", ["qembag", "theirs"])
def test_a_programs_own_modules_keep_their_names(tmp_path, first):
    """Cython enters a module in sys.modules under the name that it was compiled with: _kernels, with no package."""
    names = ["_cpu", "_cython", "_handle", *levels.MODULES.values()]
    for name in names:
        (tmp_path / f"{name}.py").write_text("WHOSE = 'the program'")
    imports = ["import qembag", "import " + ", ".join(names)]
    code = "\n".join(
        [
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})",
            *(imports if first == "qembag" else imports[::-1]),
            f"print({{getattr(sys.modules[name], 'WHOSE', 'qembag') for name in {names}}})",
            "table = qembag.quantize([[1.0, 2.0]])",
            "assert table.dequantize().shape == (1, 2)",
        ]
    )
    assert said(code) == "{'the program'}"


def test_importing_changes_no_state_of_numpy_or_python():
    code = """
    import os, signal, sys, warnings
    import numpy as np
    def state():
        return np.geterr(), np.get_printoptions(), list(warnings.filters), dict(os.environ), sys.path[:], \\
            signal.getsignal(signal.SIGINT), sys.getswitchinterval(), np.random.get_state()[1].tolist()
    before = state()
    import qembag
    print(before == state())
    """
    assert said(code) == "True"


def test_importing_twice_and_reloading_is_harmless():
    code = """
    import importlib, sys
    import numpy as np, qembag
    table = qembag.quantize(np.eye(4, dtype=np.float32))
    before = table.dequantize()
    importlib.reload(qembag)
    assert np.array_equal(qembag.QuantizedTable(table.data, 8).dequantize(), before)
    print(qembag.show_config()["version"])
    """
    assert said(code) == qembag.__version__


# ---- Inside another package ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vendoring(tmp_path_factory):
    """A folder with a package x that has a copy of qembag inside."""
    folder = tmp_path_factory.mktemp("vendoring")
    copied = folder / "x" / "_vendor" / "qembag"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for package in (folder / "x", folder / "x" / "_vendor"):
        (package / "__init__.py").touch()
    return folder


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qembag":
            raise ImportError(f"{name} is not to be imported here")
sys.meta_path.insert(0, Block())
"""

USE_ALL = """
import copy, pickle
import numpy as np
from x._vendor import qembag
table = qembag.quantize(np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32), bits=4)
indices = np.random.default_rng(1).integers(0, 1000, (10_000, 10))
bags = qembag.embedding_bag(table, indices, num_threads=2)
assert np.array_equal(bags, qembag.embedding_bag(table, indices, num_threads=1))
qembag.embedding(table, [1]), table[2], table.prune([0, 1]).dequantize(), qembag.show_config()
qembag.ops.embedding_bag_4bit_rowwise_offsets(table.data, np.array([0]), np.array([0]))
again = pickle.loads(pickle.dumps(table))
assert type(again).__module__ == "x._vendor.qembag.table"
assert np.array_equal(copy.deepcopy(again)[3], table[3])
"""


@pytest.mark.parametrize("forced", LEVELS)
def test_a_vendored_copy_works_where_there_is_no_qembag(vendoring, forced):
    code = (
        BLOCK
        + USE_ALL
        + """
strangers = [name for name in sys.modules if name.partition(".")[0] == "qembag"]
assert not strangers, strangers
best = [name for name in sys.modules if name.startswith(qembag.__name__ + "._kernels")][-1]
print(qembag.__name__, best, qembag.show_config()["level"])
"""
    )
    expected = f"x._vendor.qembag x._vendor.qembag.{levels.MODULES[forced]} {forced}"
    done = run(code, path=vendoring, QEMBAG_KERNELS=forced)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("first", ["x._vendor.qembag", "qembag"])
def test_a_vendored_copy_and_the_real_one_are_two(vendoring, first):
    code = f"""
import importlib, sys
sys.path.insert(0, {str(vendoring)!r})
importlib.import_module({first!r})
import qembag as real
from x._vendor import qembag as copied
import numpy as np
assert real.__file__ != copied.__file__
assert real is not copied
for part in ("table", "lookup", "quantize", "ops", "_cpu", "_cython", "_handle", "_runtime", {levels.MODULES[LEVELS[-1]]!r}):
    assert sys.modules["qembag." + part] is not sys.modules["x._vendor.qembag." + part], part
    assert sys.modules["qembag." + part].__name__ == "qembag." + part
    assert sys.modules["qembag." + part].__file__ != sys.modules["x._vendor.qembag." + part].__file__, part
assert real.QuantizedTable is not copied.QuantizedTable
real.set_num_threads(1)
copied.set_num_threads(2)
assert (real.get_num_threads(), copied.get_num_threads()) == (1, 2)
tables = [package.quantize(np.eye(9, dtype=np.float32)) for package in (real, copied)]
results = [package.embedding_bag(table, [[0, 1]]) for package, table in zip((real, copied), tables)]
assert np.array_equal(*results)
try:
    real.embedding_bag(tables[1], [[0]])
except TypeError as error:
    print(error)
"""
    assert said(code) == "table must be a QuantizedTable, a FloatTable or an array of floats, got QuantizedTable"


# ---- Rooms that are imported at first use --------------------------------------------------------------------------------


def test_other_libraries_rooms_are_there_when_they_are_asked_for():
    code = """
    import sys
    import qembag
    assert not {"qembag.interop", "torch"} & set(sys.modules)
    assert "torch" not in dir(qembag)
    names = [qembag.interop.__name__, qembag.interop.fbgemm.__name__, qembag.interop.torch.__name__]
    assert "torch" not in sys.modules
    for room in (qembag, qembag.interop):
        try:
            room.nothing
        except AttributeError as error:
            names.append(str(error))
    print(names)
    """
    assert said(code) == str(
        [
            "qembag.interop",
            "qembag.interop.fbgemm",
            "qembag.interop.torch",
            "module 'qembag' has no attribute 'nothing'",
            "module 'qembag.interop' has no attribute 'nothing'",
        ]
    )


def test_without_torch_its_room_says_how_to_get_it():
    code = """
    import sys
    sys.modules["torch"] = None
    import qembag
    try:
        qembag.torch
    except ImportError as error:
        print(error)
    """
    assert said(code) == "qembag.torch needs torch: pip install 'qembag[torch]'"
