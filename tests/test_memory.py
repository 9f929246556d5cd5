"""Where memory runs out: a call raises MemoryError or gives the right bits, loses nothing, and the next one works.

An allocator put before the C library's fails what Python, NumPy and the kernels ask for, one request after the other.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from conftest import UNDER_SANITIZER, child_environment

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="replaces an allocator, or limits memory, as Linux has it"),
    pytest.mark.skipif(np.__version__ < "2", reason="what NumPy 1 does without memory is not known"),
    pytest.mark.skipif(UNDER_SANITIZER, reason="a sanitizer has an allocator of its own"),
]

# Requests are counted from `fail_from` on, those of all threads. Other libraries' are let through: libgomp, for one, ends
# the process where it is given nothing.
ALLOCATOR = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void __libc_free(void *);

static int armed, seen, first, last, blocks;
static size_t least;

static int is_ours(void *caller)
{
    Dl_info info;
    const char *name;
    if (!dladdr(caller, &info) || !info.dli_fname)
        return 0;
    name = strrchr(info.dli_fname, '/');
    name = name ? name + 1 : info.dli_fname;
    return !strncmp(name, "python", 6) || !strncmp(name, "libpython", 9) || !strncmp(name, "_multiarray_umath", 17)
        || !strncmp(name, "_kernels", 8) || !strncmp(name, "_handle", 7);
}

static int fails(void *caller, size_t size)
{
    int number;
    if (!__atomic_load_n(&armed, __ATOMIC_SEQ_CST) || size < least || !is_ours(caller))
        return 0;
    number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (number < first || number > last)
        return 0;
    errno = ENOMEM;
    return 1;
}

static void *counted(void *block)
{
    if (block)
        __atomic_add_fetch(&blocks, 1, __ATOMIC_SEQ_CST);
    return block;
}

void *malloc(size_t size)
{
    return fails(__builtin_return_address(0), size) ? NULL : counted(__libc_malloc(size));
}

void *calloc(size_t count, size_t size)
{
    return fails(__builtin_return_address(0), count * size) ? NULL : counted(__libc_calloc(count, size));
}

void *realloc(void *block, size_t size)
{
    if (fails(__builtin_return_address(0), size))
        return NULL;
    return block ? __libc_realloc(block, size) : counted(__libc_realloc(block, size));
}

void free(void *block)
{
    if (block)
        __atomic_sub_fetch(&blocks, 1, __ATOMIC_SEQ_CST);
    __libc_free(block);
}

/* Of the requests for so many bytes or more, those numbered from `from` to `to` fail. */
void fail_from(int from, int to, int bytes)
{
    first = from;
    last = to;
    least = bytes;
    seen = 0;
    __atomic_store_n(&armed, 1, __ATOMIC_SEQ_CST);
}

/* How many requests there were. */
int fail_no_more(void)
{
    __atomic_store_n(&armed, 0, __ATOMIC_SEQ_CST);
    return seen;
}

int blocks_in_use(void)
{
    return blocks;
}
"""

SWEEP = """
import ctypes, gc, itertools, sys, time
import numpy as np, qembag
from qembag import ops

allocator = ctypes.CDLL({allocator!r})
fail_from, fail_no_more, blocks_in_use = allocator.fail_from, allocator.fail_no_more, allocator.blocks_in_use
in_a_row, least = {in_a_row}, {least}
gc.disable()
system_errors = []

def bytes_of(result):
    if isinstance(result, qembag.QuantizedTable):
        return bytes_of((result.data, result.compressed_indices_mapping))
    if isinstance(result, tuple):
        return tuple(map(bytes_of, result))
    return None if result is None else (result.dtype.str, result.shape, result.tobytes())

def failing(call, first, least):
    "What the call gives, None where it raises MemoryError, and whether so many requests were made at all."
    result = None
    try:
        fail_from(first, min(first + in_a_row - 1, 2**31 - 1), least)
        result = call()
    except MemoryError:
        pass
    except SystemError as error:
        system_errors.append(error)
    while True:
        try:
            seen = fail_no_more()
            break
        except MemoryError:
            pass
    # NumPy 2.4.6 makes this of a MemoryError in array[mask] and in min().
    while system_errors:
        assert str(system_errors.pop()).endswith(("without exception set", "without setting an exception"))
    return result, seen >= first

def loses(call, first, least):
    "Whether the process grows with each failure. Caches of Python's do so too, but not 2000 times."
    for _ in range(200):
        before = blocks_in_use()
        for _ in range(10):
            failing(call, first, least)
        if blocks_in_use() - before < 10:
            return False
    return True

def is_partly(out, whole):
    return all((row == -77).all() or row.tobytes() == right.tobytes() for row, right in zip(out, whole))

def sweep(name, call, arguments=(), out=None):
    "Fails each request in turn. In `out`, a row is what it was or what it ought to be."
    expected = call()
    if out is not None:
        assert expected is out
        expected = out.copy()
    expected = bytes_of(expected)
    whole = None if out is None else out.copy()
    references = [sys.getrefcount(argument) for argument in arguments]
    raised = 0
    for first in itertools.count(1):
        if out is not None:
            out.fill(-77)
        result, reached = failing(call, first, least)
        raised += result is None
        assert result is None or bytes_of(result) == expected, (name, first)
        assert result is not None or out is None or is_partly(out, whole), (name, first)
        del result
        # NumPy 1 keeps it where what errstate could not put back is lost.
        assert np.geterr() == errors or np.__version__ < "2", (name, first)
        assert bytes_of(call()) == expected, (name, first)
        now = [sys.getrefcount(argument) for argument in arguments]
        assert all(count <= before for count, before in zip(now, references)), (name, first)
        if not reached:
            break
        if {look_for_leaks}:
            assert not loses(call, first, least), (name, first)
    print(name, first - 1, "requests,", raised, "times MemoryError")
    return raised

def mistake(call, *kinds):
    "An error, or None for MemoryError: those that say what is wrong are made of memory too."
    try:
        call()
    except kinds as error:
        return np.array(str(error))
    raise AssertionError("no error")

errors = np.geterr()
rng = np.random.default_rng(0)
weights = rng.normal(size=(300, 40)).astype(np.float32)
weights.setflags(write=False)
"""

CALLS = """
indices, offsets = rng.integers(0, 300, 60), np.arange(0, 60, 6)
samples = rng.random(60).astype(np.float32)
bag, row, packed, unpacked = qembag.embedding_bag, qembag.embedding, {}, {}
narrow, strided, listed, few = indices.astype(np.int16), np.repeat(indices, 2)[::2], indices.tolist(), samples.tolist()
ends = offsets.tolist()
out, single, half = np.empty((10, 40), np.float32), np.empty((60, 40), np.float32), np.empty((10, 40), np.float16)
cube = np.empty((6, 10, 40), np.float32)
for bits, name in ((8, "byte"), (4, "4bit"), (2, "2bit")):
    data = qembag.quantize(weights, bits).data
    mapping = rng.permutation(300).astype(np.int32)
    both = data, mapping
    plain = qembag.QuantizedTable(data, bits)
    pruned = qembag.QuantizedTable(data, bits, compressed_indices_mapping=mapping)
    if bits == 8:
        sweep("bags", lambda: bag(plain, indices, offsets), (indices, offsets, plain))
        sweep("bags of 2-D", lambda: bag(plain, indices.reshape(6, 10), mode="max"), (indices, plain))
        sweep("weighted bags", lambda: bag(plain, indices, offsets, per_sample_weights=samples), (samples,))
        sweep("pruned bags", lambda: bag(pruned, narrow, ends, mode="mean", padding_idx=-3), (narrow, pruned))
        sweep("bags of lists", lambda: bag(plain, listed, offsets, per_sample_weights=few), (listed, few))
        sweep("bags out", lambda: bag(pruned, narrow, offsets, out=out), (narrow, out), out)
        sweep("bags out at once", lambda: bag(plain, indices, offsets, out=out), (indices, out), out)
        sweep("half bags", lambda: bag(plain, indices, offsets, dtype="float16"), (indices,))
        sweep("half bags out", lambda: bag(plain, listed, offsets, out=half), (listed, half), half)
        sweep("rows", lambda: row(plain, indices), (indices, plain))
        sweep("rows of 2-D", lambda: row(pruned, strided.reshape(6, 10)), (strided, pruned))
        sweep("rows out", lambda: row(plain, indices, out=single), (indices, single), single)
        sweep("rows of lists out", lambda: row(plain, [listed[:10]] * 6, out=cube), (listed, cube), cube)
        sweep("values out", lambda: pruned.dequantize(indices, out=single), (indices, single), single)
        sweep("a table", lambda: qembag.QuantizedTable(data, 8, compressed_indices_mapping=mapping), both)
        sweep("a table of a list", lambda: qembag.QuantizedTable(data, 8, compressed_indices_mapping=[1, -1, 0]), both)
        sweep("pruning", lambda: pruned.prune(indices), (indices, pruned))
        sweep("pruning by mask", lambda: pruned.prune(mapping > 7), (mapping, pruned))
        sweep("codes", plain.codes, (plain,))
        sweep("parts", lambda: (plain.scales, plain.biases, pruned[3], pruned[3:9], pruned[[1, 2]]), (plain, pruned))
    sweep(f"values {bits}", pruned.dequantize, (pruned,))
    rows = weights[:20]
    for how in ({}, {"method": "greedy"})[: 1 if bits == 8 else 2]:
        sweep(f"quantize {bits} {how}", lambda: qembag.quantize(rows, bits, num_threads=1, **how), (rows,))
        sweep(f"quantize doubles {bits} {how}", lambda: qembag.quantize(rows.astype("f8"), bits, num_threads=1, **how), (rows,))
    operator = getattr(ops, f"embedding_bag_{name}_rowwise_offsets")
    sweep(operator.__name__, lambda: operator(data, indices, offsets, False, 0, True, samples, mapping), (indices, *both))
    sweep(operator.__name__, lambda: operator(data, narrow, offsets, out=out), (narrow, data, out), out)
    sweep(f"packed bags {bits}", lambda: getattr(ops, f"embedding_bag_{name}")(plain, indices, offsets), (indices, plain))
    sweep(f"packed rows {bits}", lambda: getattr(ops, f"embedding_{name}")(plain, indices), (indices, plain))
    pack, unpack = getattr(ops, f"embedding_bag_{name}_prepack"), getattr(ops, f"embedding_bag_{name}_unpack")
    sweep(pack.__name__, lambda: pack(rows), (rows,))
    sweep(unpack.__name__, lambda: unpack(data), (data,))
    bounds = np.stack([rows.min(1), rows.max(1)], 1)
    bounded = getattr(ops, f"{pack.__name__}_with_rowwise_min_max")
    sweep(bounded.__name__, lambda: bounded(rows, bounds), (rows, bounds))
    # Not `codes` of less than 8 bits, nor what puts them together (`ops.embedding_bag_prepack`): these are NumPy's alone,
    # and NumPy 2.4.6 ends the process where a ufunc has no memory for its buffers.

far, falling, broken = indices + 270, offsets[::-1].copy(), weights[:20].copy()
broken[7, 7] = np.nan
sweep("a far index", lambda: mistake(lambda: bag(plain, far, offsets), IndexError), (far,))
sweep("a far index out", lambda: mistake(lambda: bag(plain, far, offsets, out=out), IndexError), (far, out))
sweep("falling offsets", lambda: mistake(lambda: bag(plain, indices, falling), ValueError), (falling,))
sweep("a wrong type", lambda: mistake(lambda: bag(plain, samples, offsets), TypeError), (samples,))
sweep("a NaN", lambda: mistake(lambda: qembag.quantize(broken), ValueError), (broken,))
"""

# Many tables in one call.
COLLECTIONS = """
tables = [qembag.quantize(weights, bits) for bits in (8, 4, 2)] + [weights.astype(np.float16)]
collection = qembag.EmbeddingBagCollection(tables, {"a": "0", "b": "1", "c": "2", "d": "3", "e": "0"}, mode={"c": "mean"})
indices, offsets = rng.integers(0, 300, 60), np.arange(0, 61, 6)
samples = rng.random(60).astype(np.float32)
pairs = dict.fromkeys("abcde", (indices, offsets))
squares = dict.fromkeys("abcde", indices.reshape(10, 6))
own = {"b": samples}
few, ends = indices[:20], np.arange(0, 21, 2)
out, small = np.empty((10, 200), np.float32), np.empty((2, 200), np.float32)
outs = collection.split(out)
sweep("collected", lambda: collection(few, ends), (few, ends))
sweep("collected out", lambda: collection(few, ends, out=small), (few, small), small)
sweep("collected by lengths", lambda: collection(few, lengths=np.diff(ends)), (few,))
sweep("collected weighted", lambda: collection(few, ends, per_sample_weights=samples[:20]), (few, samples))
sweep("collected pairs", lambda: collection(pairs, per_sample_weights=own), (indices, offsets, samples))
sweep("collected pairs out", lambda: collection(pairs, out=out), (indices, out), out)
sweep("collected pairs outs", lambda: tuple(collection(pairs, out=outs).values()), (indices, out))
sweep("collected squares", lambda: collection(squares, out=out), (indices, out), out)
"""

# Here CPython 3.11 itself forgets a key and a value, where an empty dict has no memory for its first.
DICTS = """
kinds = [qembag.quantize(weights), weights] * 3
collection, rows = qembag.EmbeddingBagCollection(kinds), qembag.EmbeddingCollection(kinds)
squares = {str(n): rng.integers(0, 300, (10, 6)) for n in range(6)}
mixed = squares | {"3": [1, 2], "4": rng.integers(0, 300, 9, np.int32)}
sweep("a collection", lambda: qembag.EmbeddingBagCollection(kinds, mode="max").dim * np.ones(1))
sweep("collected as a dict", lambda: tuple(collection(squares, as_dict=True).values()))
sweep("rows", lambda: tuple(rows(mixed).values()))
narrow = {name: (given.astype(np.int16).ravel(), list(range(0, 61, 6))) for name, given in squares.items()}
apart = {name: np.empty((10, 40), np.float32) for name in squares}
out = np.empty((10, 240), np.float32)
sweep("collected, converted", lambda: collection(narrow, out=out), (), out)
sweep("collected, converted, apart", lambda: tuple(collection(narrow, out=apart).values()))
far = squares | {"4": squares["4"] + 270}
sweep("a far index collected", lambda: mistake(lambda: collection(far, out=out), IndexError))
"""

# Enough to be shared out among threads: each chunk asks for memory of its own.
GREEDY = """
rows = np.tile(weights[:200], 2)
for bits, num_threads in ((4, 2), (2, 3)):
    call = lambda: qembag.quantize(rows, bits, method="greedy", num_threads=num_threads)
    sweep(f"greedy {bits}", call, (rows,))
"""

# Enough for the main thread to work in pieces, and to see to signals in between.
LONG = """
table = qembag.quantize(weights, 4)
indices = rng.integers(0, 300, (2000, 500), dtype=np.int32)
out = np.empty((2000, 40), np.float32)
for num_threads in (1, 2):
    sweep("long", lambda: qembag.embedding_bag(table, indices, num_threads=num_threads), (indices, table))
    sweep("long out", lambda: qembag.embedding_bag(table, indices, out=out, num_threads=num_threads), (indices, out), out)
rows = weights[:200]
call = lambda: ops.embedding_bag_2bit_prepack(rows, True, 2000)
sweep("long greedy", call, (rows,))
"""


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    folder = tmp_path_factory.mktemp("allocator")
    (folder / "allocator.c").write_text(ALLOCATOR)
    library = folder / "allocator.so"
    # The C library's own names for its allocator are glibc's.
    command = [
        compiler,
        "-O1",
        "-shared",
        "-fPIC",
        "-Wl,-z,defs",
        "-o",
        str(library),
        str(folder / "allocator.c"),
        "-ldl",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no allocator for this C library: {made.stderr[-300:]}")
    return str(library)


def run(script: str, **variables: str) -> str:
    environment = child_environment(**variables)
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        environment["PYTHONMALLOC"] = "malloc"  # all objects by the C library's; free-threaded Pythons have no choice
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr  # such as exceptions that were ignored
    return done.stdout


@pytest.mark.parametrize(
    ("calls", "look_for_leaks"), [(CALLS, True), (COLLECTIONS, True), (DICTS, False), (GREEDY, True), (LONG, False)]
)
@pytest.mark.parametrize(
    ("in_a_row", "least"),
    # Any one; and from one on all that an array's elements need. NumPy itself does not live through any and all.
    [(1, 0), (2**31, 512)],
    ids=["one", "large"],
)
def test_each_request_for_memory_that_fails_is_an_error_and_no_more(allocator, calls, look_for_leaks, in_a_row, least):
    setup = SWEEP.format(allocator=allocator, in_a_row=in_a_row, least=least, look_for_leaks=look_for_leaks)
    print(run(setup + calls, LD_PRELOAD=allocator))


# Requests of each size or more, in a call for few bags and in one for many.
GROWTH = """
tables = [weights] * 50
collection = qembag.EmbeddingBagCollection(tables)

def requests(call, bytes):
    call()
    fail_from(2**31 - 1, 2**31 - 1, bytes)
    call()
    return fail_no_more()

def counts(num_bags, num_threads):
    indices, offsets = rng.integers(0, 300, 50 * num_bags * 5), np.arange(0, 50 * num_bags * 5 + 1, 5)
    samples = rng.random(len(indices)).astype(np.float32)
    squares = {str(n): part.reshape(num_bags, 5) for n, part in enumerate(np.split(indices, 50))}
    pairs = {str(n): (part, np.arange(0, num_bags * 5 + 1, 5)) for n, part in enumerate(np.split(indices, 50))}
    out = np.empty((num_bags, collection.dim), np.float32)
    outs = collection.split(out)
    calls = [
        lambda: collection(indices, offsets, out=out, num_threads=num_threads),
        lambda: collection(indices, offsets, per_sample_weights=samples, out=outs, num_threads=num_threads),
        lambda: collection(squares, out=out, num_threads=num_threads),
        lambda: collection(pairs, out=outs, num_threads=num_threads),
        lambda: collection(indices, offsets, num_threads=num_threads),
        lambda: collection(pairs, num_threads=num_threads, as_dict=True),
    ]
    return [[requests(call, least) for least in (256, 4096, 65536)] for call in calls]

for num_threads in (1, 2):
    few, many = counts(60, num_threads), counts(600, num_threads)
    print(few, many)
    assert few == many
    # With outputs, nothing of any size but a record a feature; without, the output alone is large.
    assert all(call[1] <= 1 and call[2] == 0 for call in many[:4])
    assert all(call[2] == 1 for call in many[4:])
"""


def test_a_collection_asks_for_no_memory_but_the_output(allocator: str) -> None:
    setup = SWEEP.format(allocator=allocator, in_a_row=1, least=0, look_for_leaks=False)
    print(run(setup + GROWTH, LD_PRELOAD=allocator))
