# cython: language_level=3, freethreading_compatible=True, autotestdict=False
"""What this processor and its operating system can run, and how OpenMP's runtime is loaded. Compiled for the baseline
and without OpenMP: it is imported before anyone knows more."""

cdef extern from "cpu.h":
    int cpu_level()

cdef extern from "openmp_load.h":
    # With the GIL: see there.
    int openmp_set(const char *name, const char *value, const char *other)
    void openmp_unset(const char *name)


def x86_level():
    """0 for the x86-64 baseline and any other processor, 1 for AVX2, 2 for AVX-512: the highest that was built."""
    return cpu_level()


def load_openmp(create, spec, bytes spin_count not None):
    """Call `create(spec)`, which loads a compiled module and libgomp with it, so that waiting threads spin no longer
    than `spin_count`. Whether that was done: not where the user has set how threads wait. `create` is a function in C:
    Python code could be interrupted by another thread."""
    if not openmp_set(b"GOMP_SPINCOUNT", spin_count, b"OMP_WAIT_POLICY"):
        return False
    try:
        create(spec)
    finally:
        openmp_unset(b"GOMP_SPINCOUNT")
    return True
