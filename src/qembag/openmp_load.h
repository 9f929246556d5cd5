/* Loading a compiled module, and OpenMP's runtime with it, with one more variable in the environment.
 *
 * libgomp reads its settings once, from the environment, while it is loaded. The caller holds the GIL, and nothing here
 * gives it back: with a GIL, no Python code of another thread runs while the variable is there, and no process is started by Python.
 * os.environ, a copy of Python's own, does not change. */
#ifndef QEMBAG_OPENMP_LOAD_H
#define QEMBAG_OPENMP_LOAD_H

#if defined(__linux__)
#include <dlfcn.h>
#include <stdlib.h>

/* 1 where the module is loaded now, to stay: Python's import finds it so. 0 where it could not be, or where the variable
 * or `other`, which says the same in another way, is set already. */
static inline int load_with_variable(const char *path, const char *name, const char *value, const char *other)
{
    void *module;
    if (getenv(name) != NULL || getenv(other) != NULL || setenv(name, value, 1) != 0)
        return 0;
    module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    unsetenv(name);
    return module != NULL;
}
#else
static inline int load_with_variable(const char *path, const char *name, const char *value, const char *other)
{
    (void)path;
    (void)name;
    (void)value;
    (void)other;
    return 0;
}
#endif

#endif
