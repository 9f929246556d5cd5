/* One more variable in the C library's environment, while OpenMP's runtime is loaded.
 *
 * libgomp reads its settings once, from the environment, while it is loaded. The caller holds the GIL, and calls
 * nothing between the two functions that gives it back: with a GIL, no Python code of another thread runs while the
 * variable is there, and no process is started by Python. os.environ, a copy of Python's own, does not change. */
#ifndef QEMBAG_OPENMP_LOAD_H
#define QEMBAG_OPENMP_LOAD_H

#if defined(__linux__)
#include <stdlib.h>

/* 1 where it is set now. 0 where it, or `other`, which says the same in another way, was set already. */
static inline int openmp_set(const char *name, const char *value, const char *other)
{
    return getenv(name) == NULL && getenv(other) == NULL && setenv(name, value, 1) == 0;
}

static inline void openmp_unset(const char *name)
{
    unsetenv(name);
}
#else
static inline int openmp_set(const char *name, const char *value, const char *other)
{
    (void)name;
    (void)value;
    (void)other;
    return 0;
}

static inline void openmp_unset(const char *name)
{
    (void)name;
}
#endif

#endif
