/* The only file that calls OpenMP. Without it the same names say "one thread".
 *
 * Forks. A forked child has one thread, the one that forked. libgomp keeps a pool of threads for each thread that has
 * opened a parallel region, and of the pool that this thread may have had before the fork no thread lives: a region
 * that used it would wait for them for ever, and so does libgomp where such a thread ends, other than the main one.
 * Nothing can be done about that in the parent without destroying its pool, which belongs to other libraries too where
 * they share libgomp (a build from source; a wheel where torch was imported first). So a handler in the child notes
 * that its first thread came through a fork, and there a region is opened within a region of one thread. A nested
 * region's threads are no pool's: they are made for it, and end with it. That takes some 50 us. libomp, clang's,
 * handles forks itself, and MSVC has none. */
#ifndef QEMBAG_PARALLEL_H
#define QEMBAG_PARALLEL_H

#ifdef _OPENMP
#include <omp.h>
#include <stdint.h>
#if defined(__linux__)
#include <sched.h>
#endif
#define PARALLEL_OPENMP _OPENMP

static inline int parallel_max_threads(void)
{
    return omp_get_max_threads();
}

/* Within a region of several threads. No signal's handler may run there: it may fork, and the child has no other
 * threads that would do their share. */
static inline int parallel_is_inside(void)
{
    return omp_in_parallel();
}

/* In seconds, from some start. */
static inline double parallel_clock(void)
{
    return omp_get_wtime();
}

/* The processor that runs this thread, or -1. */
static inline int parallel_processor(void)
{
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

/* Threads of the region that this is asked in. */
static inline int parallel_team(void)
{
    return omp_get_num_threads();
}

/* In a region: whether this is a thread that adds to what its caller can do alone, on `callers` processor. */
static inline int parallel_is_elsewhere(int callers)
{
    const int processor = parallel_processor();
    return omp_get_thread_num() != 0 && (processor < 0 || processor != callers);
}

/* A worker that has slept may be woken on the processor of the thread that wakes it, also where another one is idle: an
 * idle processor of a virtual machine counts as taken by its host. There it stays until Linux balances its queues, for
 * some 10 ms of calls that take 2.6 times as long as on one thread (a Zen 4 under KVM). So after two regions in a row
 * whose workers came to nothing, calls are done alone for a while, and then two try again. Two: a worker that comes
 * late finds the next region awake. */
#if defined(__GNUC__)
#ifndef PARALLEL_PAUSE
#define PARALLEL_PAUSE 2 /* ms, the first of them begun; 0 for tests that need each region */
#endif
static uint32_t parallel_resumes; /* in ms of some clock; 0: no pause so far */
static int parallel_failures;     /* regions in a row */

static inline uint32_t parallel_milliseconds(void)
{
    return (uint32_t)(uint64_t)(omp_get_wtime() * 1000);
}

static inline int parallel_pays(void)
{
    const uint32_t resumes = __atomic_load_n(&parallel_resumes, __ATOMIC_RELAXED);
    /* Not `now < resumes`: the clock wraps. */
    return resumes == 0 || resumes - parallel_milliseconds() - 1u >= PARALLEL_PAUSE + 0u;
}

/* After a region of so many threads: the share of its work that was done elsewhere, 1 for all. */
static inline void parallel_judge(int team, double elsewhere)
{
    if (team == 1)
        return;
    if (elsewhere >= 0.25) {
        __atomic_store_n(&parallel_failures, 0, __ATOMIC_RELAXED);
    } else if (__atomic_add_fetch(&parallel_failures, 1, __ATOMIC_RELAXED) >= 2) {
        __atomic_store_n(&parallel_failures, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&parallel_resumes, parallel_milliseconds() + PARALLEL_PAUSE, __ATOMIC_RELAXED);
    }
}

/* Calls that work in parallel at this moment, in all threads of Python. Where there are as many as processors, each
 * does better alone: on 2 processors 32 threads' calls of two threads each came to 0.8 of one thread's, alone to 1. */
static int parallel_calls;

/* Of `num_threads`, this call's share; 1 in a pause. */
static inline int parallel_enter(int num_threads)
{
    const int calls = __atomic_add_fetch(&parallel_calls, 1, __ATOMIC_RELAXED);
    if (!parallel_pays())
        return 1;
    const int share = calls > 1 && num_threads > 1 ? omp_get_num_procs() / calls : num_threads;
    return share < 1 ? 1 : share < num_threads ? share : num_threads;
}

static inline void parallel_leave(void)
{
    __atomic_sub_fetch(&parallel_calls, 1, __ATOMIC_RELAXED);
}
#else
static inline void parallel_judge(int team, double elsewhere)
{
    (void)team;
    (void)elsewhere;
}

static inline int parallel_enter(int num_threads)
{
    return num_threads;
}

static inline void parallel_leave(void)
{
}
#endif

#if defined(__GNUC__) && !defined(_WIN32)
#include <pthread.h>

/* Of the thread that came through the last fork. Threads that start later have none of its pools. */
static __thread int parallel_came_through_fork;

static inline int parallel_is_forked(void)
{
    return parallel_came_through_fork;
}

/* The child has no calls of its parent's other threads either, nor their workers. */
static void parallel_begin_child(void)
{
    parallel_calls = 0;
    parallel_failures = 0;
    parallel_resumes = 0;
#if !defined(__clang__)
    parallel_came_through_fork = 1;
#endif
}

/* 0, or why it cannot be done. A handler of the C library's, so that forks that Python does not know of count too. */
static inline int parallel_watch_forks(void)
{
    return pthread_atfork(NULL, NULL, parallel_begin_child);
}
#else
static inline int parallel_is_forked(void)
{
    return 0;
}

static inline int parallel_watch_forks(void)
{
    return 0;
}
#endif
#else
#include <time.h>
#define PARALLEL_OPENMP 0

static inline int parallel_watch_forks(void)
{
    return 0;
}

static inline int parallel_is_forked(void)
{
    return 0;
}

static inline int parallel_max_threads(void)
{
    return 1;
}

static inline int parallel_is_inside(void)
{
    return 0;
}

static inline int parallel_enter(int num_threads)
{
    (void)num_threads;
    return 1;
}

static inline void parallel_leave(void)
{
}

static inline double parallel_clock(void)
{
    return (double)clock() / CLOCKS_PER_SEC;
}

static inline int parallel_processor(void)
{
    return -1;
}

static inline int parallel_team(void)
{
    return 1;
}

static inline int parallel_is_elsewhere(int callers)
{
    (void)callers;
    return 0;
}

static inline void parallel_judge(int team, double elsewhere)
{
    (void)team;
    (void)elsewhere;
}
#endif

#endif
