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
#else
#define PARALLEL_OPENMP 0

static inline int parallel_max_threads(void)
{
    return 1;
}
#endif

#endif
