# cython: language_level=3, freethreading_compatible=True, autotestdict=False
"""What this processor and its operating system can run. Compiled for the baseline: it is imported before anyone
knows more."""

cdef extern from "cpu.h":
    int cpu_level()


def x86_level():
    """0 for the x86-64 baseline and any other processor, 1 for AVX2, 2 for AVX-512."""
    return cpu_level()
