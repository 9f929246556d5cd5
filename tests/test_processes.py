"""Forks, signals and the threads of others: what a server does to a library while it works."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER, child_environment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork and timers")
needs_openmp = pytest.mark.skipif(not qembag.show_config()["openmp"], reason="built without OpenMP")

# Each child works in several threads, where its parent's pool has none left; one that waits for them hangs.
SETUP = """
import ctypes, os, signal, sys, threading, time, warnings
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


# In a child, threads made for a region end while it forks: in the allocator of a sanitizer, whose lock then stays locked in
# the child. A C program of thirty lines whose threads end while it forks shows it: under gcc 12's AddressSanitizer, which
# registers no handler of forks, 6 of 1,000 children hang; without it, and under clang 19's, none.
not_under_sanitizer = pytest.mark.skipif(UNDER_SANITIZER, reason="a sanitizer's allocator does not know of forks")


@not_under_sanitizer
def test_children_and_theirs_call_many_times():
    code = """
    def generations(left):
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            for number in range(25):
                look_up(2 + number % 2)
                table_again = qembag.quantize(table.dequantize(), num_threads=3)
                assert np.array_equal(table_again.data, quantized)
            os._exit(42 if left == 0 or generations(left - 1) else 1)
        return ended_well(child)
    quantized = qembag.quantize(table.dequantize(), num_threads=1).data
    results = []
    def work():
        look_up()
        results.append(generations(2))
        look_up()
    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    print(results)
    """
    assert said(code) == "[True, True]"


def test_threads_of_a_child_call_beside_each_other():
    """The one that forked and new ones; the first of them forks again meanwhile."""
    code = """
    look_up()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        good = []
        def work():
            for _ in range(30):
                look_up()
            good.append(True)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            look_up()
            good.append(ended_well(in_child()))
        threads.append(threading.Thread(target=lambda: good.append(ended_well(in_child()))))
        threads[-1].start()
        for thread in threads:
            thread.join()
        os._exit(42 if good == 14 * [True] else 1)
    print(ended_well(child))
    """
    assert said(code) == "True"


def test_a_child_that_is_forked_while_another_thread_works_in_parallel():
    code = """
    many = rng.integers(0, 1000, (10_000, 2000), dtype=np.int32)
    started = threading.Event()
    def work():
        started.set()
        qembag.embedding_bag(table, many, num_threads=2)
    good = []
    for _ in range(10):
        started.clear()
        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        good.append(ended_well(in_child()) and thread.is_alive())
        thread.join()
    print(sum(good) > 5)
    """
    assert said(code) == "True"


@needs_openmp
@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="for systems that tell the time of a thread")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_child_works_in_threads(num_threads):
    """By the processors' time that it takes beside its first thread's, in calls so long that other programs let all of
    its threads run."""
    code = f"""
    look_up()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        many = np.tile(indices, (20, 1))
        own, all_threads = time.thread_time(), time.process_time()
        for _ in range(20):
            qembag.embedding_bag(table, many, num_threads={num_threads})
        own, all_threads = time.thread_time() - own, time.process_time() - all_threads
        print(all_threads - own > 0.1 * own, flush=True)
        os._exit(42)
    print(ended_well(child))
    """
    answer = run(SETUP + textwrap.dedent(code)).stdout.split()
    assert answer == [str(num_threads > 1), "True"]


@pytest.mark.parametrize(
    "forks_first", [False, pytest.param(True, marks=not_under_sanitizer)], ids=["in the parent", "in a child"]
)
def test_a_handler_may_fork_in_a_long_call(forks_first):
    """Both go on with the call. The handler runs in the main thread, which works with others."""
    code = f"""
    many = rng.integers(0, 1000, (4000, 4000), dtype=np.int32)
    expected_of_many = qembag.embedding_bag(table, many, padding_idx=3, num_threads=1)
    children, is_child, handled = [], False, []
    def handle(*_):
        global is_child
        # A handler may be interrupted by the next: without this, a child would take itself for the parent.
        signal.signal(signal.SIGUSR1, lambda *_: None)
        handled.append(threading.current_thread() is threading.main_thread())
        child = os.fork()
        if child == 0:
            is_child = True
            signal.alarm(60)
            return
        children.append(child)
        if len(children) < 4:
            signal.signal(signal.SIGUSR1, handle)
    if {forks_first}:
        look_up()
        child = os.fork()
        if child != 0:
            print(ended_well(child))
            raise SystemExit
    signal.signal(signal.SIGUSR1, handle)
    over = threading.Event()
    def send():
        while not over.wait(0.005):
            os.kill(os.getpid(), signal.SIGUSR1)
    thread = threading.Thread(target=send)
    thread.start()
    are_right = []
    while not is_child and len(children) < 4:
        bags = qembag.embedding_bag(table, many, padding_idx=3, num_threads=2)
        are_right.append(np.array_equal(bags, expected_of_many))
    if is_child:
        os._exit(42 if all(are_right) and all(handled) else 1)
    over.set()
    thread.join()
    good = all([*are_right, *handled, *map(ended_well, children)])
    if {forks_first}:
        os._exit(42 if good else 1)
    print(good)
    """
    assert said(code) == "True"


@pytest.fixture(scope="module")
def other_library(tmp_path_factory):
    """A library of another's with OpenMP, and state in each of its threads."""
    source = tmp_path_factory.mktemp("other") / "other.c"
    source.write_text("""
        #include <omp.h>
        static int counter;
        #pragma omp threadprivate(counter)
        void count(int num_threads)
        {
            #pragma omp parallel num_threads(num_threads)
            counter++;
        }
        int sum(int num_threads)
        {
            int result = 0;
            #pragma omp parallel num_threads(num_threads) reduction(+ : result)
            result += counter;
            return result;
        }
    """)
    library = source.with_suffix(".so")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    command = [compiler, "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs a C compiler with OpenMP")
    if sys.platform == "linux" and library.read_bytes()[4] != (2 if sys.maxsize > 2**32 else 1):
        pytest.skip("this Python cannot load what the machine's C compiler makes")
    return library


@needs_openmp
@pytest.mark.parametrize("first", [True, False], ids=["before qembag", "after qembag"])
def test_a_fork_leaves_another_librarys_threads_alone(other_library, first):
    """Also where it shares libgomp with qembag: with a build from source always."""
    load = f"import ctypes\nother = ctypes.CDLL({str(other_library)!r})\n"
    code = """
    for _ in range(5):
        other.count(3)
        look_up(3)
    before = other.sum(3)
    good = [ended_well(in_child()) for _ in range(3)]
    after = other.sum(3)
    look_up(3)
    other.count(3)
    print(before, good, after, other.sum(3))
    """
    script = (load if first else "") + SETUP + ("" if first else load) + textwrap.dedent(code)
    assert run(script).stdout.strip() == "15 [True, True, True] 15 18"


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


@needs_openmp
def test_no_python_code_runs_while_the_spin_is_in_the_environment(no_policy):
    """So no other thread sees it, nor does a process that one starts: a thread could run wherever Python code does."""
    code = """
    import ctypes, os, sys
    import numpy
    getenv = ctypes.PyDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    seen = []
    def look(*_):
        seen.append(getenv(b"GOMP_SPINCOUNT") or os.environ.get("GOMP_SPINCOUNT"))
    sys.setprofile(look)
    import qembag
    sys.setprofile(None)
    print(len(seen) > 1000, set(seen))
    """
    assert run(textwrap.dedent(code)).stdout.strip() == "True {None}"


QUIET_WORK = """
import sys, numpy as np, qembag
rng = np.random.default_rng(0)
weights = rng.normal(size=(5000, 64)).astype(np.float32)
for num_threads in (2, 3):
    table = qembag.quantize(weights, num_threads=num_threads)
    for _ in range(20):
        qembag.embedding_bag(table, rng.integers(0, 5000, (10_000, 10)), num_threads=num_threads)
"""


def loud_calls(script: str, log: pathlib.Path) -> list[str]:
    """The system calls of a script that start a process or set an affinity; those that start a thread are left out."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    traced = "trace=?clone,?clone3,?fork,?vfork,sched_setaffinity"
    command = [strace, "-f", "-qq", "-o", str(log), "-e", traced, sys.executable, "-c"]
    if subprocess.run([*command, ""], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace does not work here")
    subprocess.run([*command, script], check=True, timeout=120, env=child_environment())
    calls = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    calls = [call for call in calls if not call.startswith(("<...", "+++", "---"))]
    assert not qembag.show_config()["openmp"] or any("CLONE_THREAD" in call for call in calls), (
        "nothing worked in threads"
    )
    return [call for call in calls if "CLONE_THREAD" not in call]


def test_import_and_calls_start_no_process_and_set_no_affinity(tmp_path):
    assert loud_calls(QUIET_WORK, tmp_path / "log") == []


@pytest.mark.parametrize("planted", ["os.waitpid(os.fork() or os._exit(0), 0)", "os.sched_setaffinity(0, {0})"])
def test_a_process_or_an_affinity_would_be_seen(planted, tmp_path):
    assert len(loud_calls(QUIET_WORK + "import os\n" + planted, tmp_path / "log")) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for systems with affinities")
@pytest.mark.parametrize("cores", [1, 2])
def test_the_affinity_of_threads_is_what_it_was(cores):
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


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for systems with affinities")
def test_workers_that_come_to_nothing_are_left_asleep():
    """On one processor: two calls try, those of the next 1 to 2 ms are done alone, and so on. A worker that is woken
    sleeps again, and the system counts that."""
    code = """
    import re
    others = set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    look_up(2)
    [worker] = set(os.listdir("/proc/self/task")) - others
    def sleeps():
        status = open(f"/proc/self/task/{worker}/status").read()
        return int(re.search(r"^voluntary_ctxt_switches:\\s*([0-9]+)", status, re.M)[1])
    some = indices[:1000]
    before = sleeps()
    started = time.perf_counter()
    for _ in range(300):
        qembag.embedding_bag(table, some, num_threads=2)
    print(sleeps() - before, time.perf_counter() - started)
    """
    times, seconds = said(code).split()
    if float(seconds) > 0.06:
        pytest.skip("calls take so long that more of them try")
    assert int(times) < 150


# Numbers of system calls on x86-64, and instructions of a filter: code, operand, how many to skip if true and if false.
# A filter cannot see the flags of clone3, so there is none, and the C library takes clone.
SECCOMP = """
import ctypes, struct, numpy
CLONE, FORK, VFORK, SCHED_SETAFFINITY, CLONE3 = 56, 57, 58, 203, 435
LOAD, IS, HAS, END = 0x20, 0x15, 0x45, 0x06
KILL, NO_SUCH_CALL, ALLOW = 0x80000000, 0x00050000 | 38, 0x7FFF0000
NUMBER, FLAGS, CLONE_THREAD = 0, 16, 0x10000
filters = {
    "processes": [
        (LOAD, NUMBER, 0, 0),
        (IS, CLONE3, 0, 1), (END, NO_SUCH_CALL, 0, 0),
        (IS, FORK, 1, 0), (IS, VFORK, 0, 1), (END, KILL, 0, 0),
        (IS, CLONE, 0, 3), (LOAD, FLAGS, 0, 0), (HAS, CLONE_THREAD, 1, 0), (END, KILL, 0, 0),
        (END, ALLOW, 0, 0),
    ],
    "affinities": [
        (LOAD, NUMBER, 0, 0),
        (IS, SCHED_SETAFFINITY, 0, 1), (END, KILL, 0, 0),
        (END, ALLOW, 0, 0),
    ],
}
def forbid(name):
    program = b"".join(struct.pack("HBBI", code, yes, no, operand) for code, operand, yes, no in filters[name])
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(filters[name]), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, header, 0, 0) != 0:
        print("no filter")
        raise SystemExit
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32,
    reason="for the system calls whose numbers it knows",
)
@pytest.mark.parametrize(
    ("forbidden", "proof"), [("processes", "os.fork()"), ("affinities", "os.sched_setaffinity(0, {0})")]
)
def test_a_sandbox_that_kills_lets_it_live(forbidden, proof):
    """A service with systemd's SystemCallFilter=~@resources, for one, is killed if it sets an affinity."""
    proof = f"print('alive', flush=True)\nimport os\n{proof}\nprint('not forbidden')"
    script = f"{SECCOMP}\nforbid({forbidden!r})\n{QUIET_WORK}\n{proof}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=child_environment(),
    )
    if done.stdout.strip() == "no filter":
        pytest.skip("the system takes no filter")
    assert (done.stdout, done.returncode) == ("alive\n", -signal.SIGSYS), done.stderr


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


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="for systems with timers")
def test_a_slow_handlers_error_ends_the_check_of_arguments():
    """It takes longer than the time between two looks for signals: the next look must not run with its error set."""
    code = """
    small = qembag.quantize(np.zeros((10, 4), np.float32)).prune([0, 2])
    offsets = np.arange(1 << 24, dtype=np.int32)
    out = np.empty((1 << 24, 4), np.float32)
    def handler(*_):
        time.sleep(0.06)
        raise KeyError("of the handler")
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        qembag.embedding_bag(small, np.zeros(1 << 24, np.int32), offsets, out=out, num_threads=1)
    except KeyError as error:
        print(error.args == ("of the handler",))
    """
    assert said(code) == "True"
