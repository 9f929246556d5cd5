"""Forks, signals and the threads of others: what a server does to a library while it works."""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import qembag
from conftest import child_environment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork and timers")
needs_openmp = pytest.mark.skipif(not qembag.show_config()["openmp"], reason="built without OpenMP")

# Each child works in several threads, where its parent's pool has none left; one that waits for them hangs.
SETUP = """
import ctypes, os, signal, sys, threading, warnings
import numpy as np, qembag
warnings.simplefilter("ignore")  # of forks in a process with threads
rng = np.random.default_rng(0)
table = qembag.quantize(rng.normal(size=(1000, 64)).astype(np.float32))
indices = rng.integers(0, 1000, (10_000, 10))
expected = qembag.embedding_bag(table, indices, num_threads=1)

def look_up(num_threads=3):
    assert np.array_equal(qembag.embedding_bag(table, indices, num_threads=num_threads), expected)

def ended_well(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42

def in_child(fork=os.fork):
    child = fork()
    if child == 0:
        signal.alarm(30)
        look_up()
        os._exit(42)
    return child
"""


def run(script: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=child_environment(**variables),
    )
    assert done.returncode == 0, done.stderr
    return done


def said(code: str, timeout: float = 300) -> str:
    return run(SETUP + textwrap.dedent(code), timeout).stdout.strip()


FORKS_UNDER_LOAD = """
stop = threading.Event()
def load():
    while not stop.is_set():
        look_up(2)
threads = [threading.Thread(target=load) for _ in range(3)]
for thread in threads:
    thread.start()
good = 0
for number in range({count}):
    look_up()
    good += ended_well(in_child())
stop.set()
for thread in threads:
    thread.join()
print(good)
"""


def test_children_and_parent_work_on_after_forks_under_load():
    assert said(FORKS_UNDER_LOAD.format(count=30)) == "30"


@pytest.mark.slow
def test_a_thousand_forks_under_load():
    assert said(FORKS_UNDER_LOAD.format(count=1000), timeout=900) == "1000"


def test_a_fork_that_python_does_not_know_of_is_seen_to():
    """A server written in C forks with Python inside it."""
    code = """
    look_up()
    print(ended_well(in_child(ctypes.PyDLL(None).fork)))
    look_up()
    """
    assert said(code) == "True"


def test_workers_of_a_preforking_server_answer():
    """The table and a first call in the parent, before the forks; each worker takes requests by a pipe."""
    code = """
    look_up()
    workers = []
    for _ in range(3):
        requests, answers = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            while True:
                first = int.from_bytes(os.read(requests[0], 4), "little")
                if first == 10_000:
                    os._exit(42)
                bags = qembag.embedding_bag(table, indices[first:], num_threads=2)
                os.write(answers[1], bytes([np.array_equal(bags, expected[first:])]))
        workers.append((child, requests[1], answers[0]))
    good = 0
    for number in range(20):
        for child, request, answer in workers:
            os.write(request, (number * 100).to_bytes(4, "little"))
        look_up()
        good += sum(os.read(answer, 1)[0] for child, request, answer in workers)
    for child, request, answer in workers:
        os.write(request, (10_000).to_bytes(4, "little"))
    print(good, all(ended_well(child) for child, request, answer in workers))
    """
    assert said(code) == "60 True"


def test_a_fork_pool_of_multiprocessing_works_after_a_parallel_call():
    code = """
    import multiprocessing
    look_up()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.starmap(qembag.embedding_bag, [(table, indices)] * 4)
        look_up()
    print(all(np.array_equal(bags, expected) for bags in results))
    """
    assert said(code) == "True"


# Others that have threads of OpenMP's: torch shares qembag's libgomp where either finds the other's loaded, scikit-learn
# brings its own.
OTHERS = {
    "torch": ("import torch", "x = torch.ones(1000, 1000); (x + x).sum(); (x @ x).sum()"),
    "sklearn": ("import sklearn.cluster", "sklearn.cluster.KMeans(3, n_init=1, max_iter=2).fit(rng.random((3000, 8)))"),
}


@pytest.mark.parametrize("first", [True, False], ids=["before qembag", "after qembag"])
@pytest.mark.parametrize("other", [pytest.param("torch", marks=pytest.mark.torch), "sklearn"])
def test_children_work_where_another_library_has_worked_in_parallel(other, first):
    """Only qembag is called in them: the others may or may not survive a fork."""
    if importlib.util.find_spec(other) is None:
        pytest.skip(f"needs {other}")
    load, work = OTHERS[other]
    code = f"""
    import multiprocessing
    {load}
    def use():
        {work}
    good = []
    for number in range(4):
        use()
        look_up()
        if number % 2:
            use()
        good.append(ended_well(in_child(ctypes.PyDLL(None).fork if number > 1 else os.fork)))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.starmap(qembag.embedding_bag, [(table, indices)] * 4)
        look_up()
        use()
    print(good, all(np.array_equal(bags, expected) for bags in results))
    """
    script = (load if first else "") + SETUP + textwrap.dedent(code)
    assert run(script).stdout.strip() == "[True, True, True, True] True"


def spin_of_libgomp(**variables: str) -> str | None:
    """What libgomp itself says about its spin when qembag loads it."""
    script = "import os, qembag; assert 'GOMP_SPINCOUNT' not in os.environ or os.environ['GOMP_SPINCOUNT'] == '77'"
    for line in run(script, OMP_DISPLAY_ENV="VERBOSE", **variables).stderr.splitlines():
        if "GOMP_SPINCOUNT" in line:
            return line.split("'")[1]
    pytest.skip("another OpenMP runtime")


@pytest.fixture
def no_policy(monkeypatch):
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(variable, raising=False)


@needs_openmp
def test_waiting_threads_spin_no_longer_than_microseconds(no_policy):
    assert spin_of_libgomp() == "1000"  # about 10 us


@needs_openmp
def test_a_waiting_policy_of_the_users_is_left_alone(no_policy):
    assert spin_of_libgomp(GOMP_SPINCOUNT="77") == "77"
    assert int(spin_of_libgomp(OMP_WAIT_POLICY="active") or 0) > 10**9


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for systems with affinities")
@pytest.mark.parametrize("cores", [1, 2])
def test_the_affinity_of_threads_is_what_it_was(cores):
    """Workers that are woken on their caller's processor move away, and then may use what they could before."""
    code = f"""
    others = set(os.listdir("/proc/self/task"))  # the main thread and NumPy's
    allowed = set(sorted(os.sched_getaffinity(0))[:{cores}])
    os.sched_setaffinity(0, allowed)
    import time
    for _ in range(300):
        look_up()
        time.sleep(0.001)
    threads = set(os.listdir("/proc/self/task")) - others
    print(len(threads), all(os.sched_getaffinity(int(thread)) == allowed for thread in threads))
    """
    assert said(code) == f"{2 if qembag.show_config()['openmp'] else 0} True"


# Of struct sock_filter: code, jt, jf, k. The number of the call at offset 0; kill the process, or allow.
SECCOMP = """
import ctypes, platform, struct
number = {{"x86_64": 203, "aarch64": 122}}[platform.machine()]
forbidden = number if {forbidden} else 1 << 30
program = b"".join(struct.pack("HBBI", *line) for line in
                   [(0x20, 0, 0, 0), (0x15, 0, 1, forbidden), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)])
buffer = ctypes.create_string_buffer(program)
header = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, header, 0, 0) != 0:
    print("no filter")
    raise SystemExit
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or sys.maxsize < 2**32,
    reason="for the numbers of system calls that it knows",
)
@pytest.mark.parametrize("forbidden", [True, False])
def test_a_service_that_may_not_change_affinities_lives(forbidden):
    """A service of systemd's with SystemCallFilter=~@resources is killed if it does."""
    code = """
    import time
    for _ in range(500):
        look_up(2)
        time.sleep(0.0005)
    print("alive")
    """
    answer = run(SECCOMP.format(forbidden=forbidden) + SETUP + textwrap.dedent(code)).stdout.strip()
    if answer == "no filter":
        pytest.skip("the system takes no filter")
    assert answer == "alive"


@needs_openmp
def test_threadpoolctl_sees_the_pool_and_limits_it():
    pytest.importorskip("threadpoolctl")
    code = """
    import threadpoolctl
    look_up()
    before = qembag.get_num_threads()
    with threadpoolctl.threadpool_limits(3, user_api="openmp"):
        limited = qembag.get_num_threads()
        look_up(None)
    print(any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info()), limited)
    print(qembag.get_num_threads() == before)
    """
    assert said(code) == "True 3\nTrue"


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt():
    """A signal after so many seconds, whose handler raises, as Ctrl-C's does."""

    def raise_it(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, raise_it)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_long_lookup_answers_a_signal(level, interrupt, num_threads, rng):
    """What is left of `out` says that the call ended early: seconds of work, and its last rows untouched."""
    table = qembag.quantize(rng.normal(size=(2000, 1024)).astype(np.float32), 4)
    indices = np.broadcast_to(rng.integers(0, 2000, 40_000, dtype=np.int32), (2000, 40_000)).reshape(40_000, 2000)
    out = np.full((len(indices), table.dim), np.float32(np.nan))
    started = time.perf_counter()
    interrupt(0.1)
    with pytest.raises(Interrupted):
        qembag.embedding_bag(table, indices, out=out, num_threads=num_threads)
    took = time.perf_counter() - started
    assert not np.isnan(out[0]).any()
    assert np.isnan(out[-1]).all(), f"the call had ended after {took} s"
    again = qembag.embedding_bag(table, indices[:10], num_threads=num_threads)
    np.testing.assert_array_equal(again, qembag.embedding_bag(table, indices[:10], num_threads=1))


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_long_quantization_answers_a_signal(interrupt, num_threads, rng):
    weights = rng.normal(size=(50_000, 64)).astype(np.float32)
    whole = time.perf_counter()
    expected = qembag.quantize(weights, 4, method="greedy", num_threads=num_threads)
    whole = time.perf_counter() - whole
    many = np.concatenate([weights] * (int(3 / whole) + 1))
    interrupt(0.2)
    started = time.perf_counter()
    with pytest.raises(Interrupted):
        qembag.quantize(many, 4, method="greedy", num_threads=num_threads)
    assert time.perf_counter() - started < 2
    np.testing.assert_array_equal(qembag.quantize(weights, 4, method="greedy").data, expected.data)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"mode": "mean"}, {"mode": "max"}, {"padding_idx": 3}], ids=str)
def test_one_giant_bag_answers_a_signal(level, interrupt, arguments, rng):
    table = qembag.quantize(rng.normal(size=(2000, 1024)).astype(np.float32), 4)
    indices = np.resize(rng.integers(0, 2000, 40_000, dtype=np.int32), 100_000_000)
    out = np.full((1, table.dim), np.float32(np.nan))
    interrupt(0.3)
    with pytest.raises(Interrupted):
        qembag.embedding_bag(table, indices, [0], out=out, **arguments)
    assert np.isnan(out).all(), "the call had ended"


@pytest.mark.parametrize("arguments", [{}, {"mode": "mean"}, {"mode": "max"}, {"padding_idx": 3}], ids=str)
@pytest.mark.parametrize("lengths", ["short", "one of them long"])
def test_a_long_call_in_pieces_gives_the_same_bits(level, bits, lengths, arguments, rng, same_bits):
    """In another thread it is done in one piece, whatever its length."""
    table = qembag.quantize(rng.normal(size=(500, 64)).astype(np.float32), bits)
    indices = rng.integers(0, 500, 1_500_000, dtype=np.int32)
    offsets = np.sort(rng.integers(0, len(indices), 20_000)) if lengths == "short" else np.array([0, 9, 1_490_000])
    whole = []
    thread = threading.Thread(target=lambda: whole.append(qembag.embedding_bag(table, indices, offsets, **arguments)))
    thread.start()
    thread.join()
    for num_threads in (1, 2, 3):
        same_bits(qembag.embedding_bag(table, indices, offsets, num_threads=num_threads, **arguments), whole[0])
