# cython: language_level=3, freethreading_compatible=True, autotestdict=False
"""What this processor and its operating system can run, and how OpenMP's runtime is loaded. Compiled for the baseline
and without OpenMP: it is imported before the level is known."""

cdef extern from "cpu.h":
    int cpu_level()

cdef extern from "openmp_load.h":
    # With the GIL: see there.
    int load_with_variable(const char *path, const char *name, const char *value, const char *other)


def x86_level():
    """0 for the x86-64 baseline and any other processor, 1 for AVX2, 2 for AVX-512."""
    return cpu_level()


def load_openmp(bytes path not None, bytes spin_count not None):
    """Load the module at `path`, and libgomp with it, so that waiting threads spin no longer than `spin_count`. Whether
    that was done: not where the user has set how threads wait."""
    return bool(load_with_variable(path, b"GOMP_SPINCOUNT", spin_count, b"OMP_WAIT_POLICY"))
