/* The only door to OpenMP. Without it the same names say "one thread". */
#ifndef QEMBAG_PARALLEL_H
#define QEMBAG_PARALLEL_H

#ifdef _OPENMP
#include <omp.h>
#define PARALLEL_OPENMP _OPENMP

static inline int parallel_max_threads(void)
{
    return omp_get_max_threads();
}

/* A forked child has none of the threads that its parent's pool counts on, and its next parallel region would wait for
 * them for ever. Without a pool at the fork it makes one of its own. A handler of the C library's, so that forks that
 * Python does not know of are seen to as well. That is libgomp's way; libomp, clang's, sees to forks itself, and MSVC has
 * none. */
#if defined(__GNUC__) && __GNUC__ >= 9 && !defined(__clang__) && !defined(_WIN32)
#include <pthread.h>

static void parallel_pause(void)
{
    omp_pause_resource_all(omp_pause_hard);
}

/* 0, or why it cannot be done. */
static inline int parallel_watch_forks(void)
{
    return pthread_atfork(parallel_pause, NULL, NULL);
}
#else
static inline int parallel_watch_forks(void)
{
    return 0;
}
#endif
#else
#define PARALLEL_OPENMP 0

static inline int parallel_watch_forks(void)
{
    return 0;
}

static inline int parallel_max_threads(void)
{
    return 1;
}
#endif

#endif
