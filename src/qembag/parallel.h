/* The only door to OpenMP, and what keeps it safe across forks. Without OpenMP the same names say "one thread".
 *
 * A call that wants threads does this, in the thread that called it:
 *
 *     num_threads = parallel_enter(num_threads);           its share of the processors
 *     parallel_run(function, argument, num_threads);
 *     parallel_leave();
 *
 * function(argument, num_threads) does what is left of the work with so many threads: for more than one it opens a
 * parallel region, for one it opens none. The work is cut into chunks, and each thread takes the next one by
 * parallel_add(&counter, 1) until there is none left. `function` may be run by two threads at once, one of which is not
 * the caller: all that it reads and writes stands in `argument`, and what it counts it adds by parallel_add. When
 * parallel_run returns, the work is done. `function` runs no Python code while parallel_is_inside(): a signal's handler
 * there may fork, and leave its child with chunks that threads have taken that it has not, or call parallel_run again.
 *
 * Forks. libgomp keeps a pool of waiting workers for each thread that has opened a region. A forked child has only the
 * thread that forked, and if that thread had a pool, its workers do not exist: its next region would wait for them for
 * ever. We cannot ask libgomp whether there is a pool, since another library that shares libgomp may have made it; and to
 * end the pool before the fork, as omp_pause_resource_all does, resets other libraries' threadprivate variables in the
 * parent. So nothing is done to the parent, and the thread that survives in the child is "stale": it never opens a region
 * of ours again. It works alone, and a helper thread that it makes at its first such call works beside it with the other
 * threads: a new thread has no pool, and libgomp makes one for it. Threads that the child makes itself are not stale.
 *
 * The helper waits for the next call, for a new thread with a new pool costs 100 to 180 us. parallel_is_stale() tells
 * callers to use threads only for work that is worth waking it. Where it does not start in time, or cannot be made, the
 * caller has done all the work. The helper blocks signals, so that Python's handlers run in the thread they ran in before.
 *
 * The handler is the C library's, so it also sees forks that Python does not know of. libomp, clang's, makes itself usable
 * in a forked child, and Windows has no fork: there parallel_run is a plain call. */
#ifndef QEMBAG_PARALLEL_H
#define QEMBAG_PARALLEL_H

#ifdef _OPENMP
#include <omp.h>
#if defined(_MSC_VER)
#include <intrin.h>
#endif
#define PARALLEL_OPENMP _OPENMP

static inline int parallel_max_threads(void)
{
    return omp_get_max_threads();
}

/* In seconds, from some start. */
static inline double parallel_clock(void)
{
    return omp_get_wtime();
}
#else
#include <time.h>
#define PARALLEL_OPENMP 0

static inline int parallel_max_threads(void)
{
    return 1;
}

static inline double parallel_clock(void)
{
    return (double)clock() / CLOCKS_PER_SEC;
}
#endif

/* What `number` was before, atomically. */
static inline int parallel_add(volatile int *number, int more)
{
#if !defined(_OPENMP)
    int before = *number;
    *number = before + more;
    return before;
#elif defined(_MSC_VER) && !defined(__clang__)
    return _InterlockedExchangeAdd((volatile long *)number, more);
#else
    return __atomic_fetch_add(number, more, __ATOMIC_RELAXED);
#endif
}

/* ---- How many threads a call gets ---- */

#if defined(_OPENMP) && defined(__GNUC__)
/* Calls that work in parallel at this moment, in all threads of Python, and those of them that are this thread's. Where
 * there are as many as processors, each does better alone: on 2 processors 32 threads' calls of two threads each came to
 * 0.8 of one thread's, alone to 1.0. */
static int parallel_calls;
static _Thread_local int parallel_own_calls;

/* Of `num_threads`, this call's share. */
static inline int parallel_enter(int num_threads)
{
    int calls = __atomic_add_fetch(&parallel_calls, 1, __ATOMIC_RELAXED);
    int share = calls > 1 && num_threads > 1 ? omp_get_num_procs() / calls : num_threads;
    parallel_own_calls++;
    return share < 1 ? 1 : share < num_threads ? share : num_threads;
}

static inline void parallel_leave(void)
{
    parallel_own_calls--;
    __atomic_sub_fetch(&parallel_calls, 1, __ATOMIC_RELAXED);
}
#else
static inline int parallel_enter(int num_threads)
{
    return PARALLEL_OPENMP ? num_threads : 1;
}

static inline void parallel_leave(void)
{
}
#endif

/* ---- Forks ---- */

#if defined(_OPENMP) && defined(__GNUC__) && !defined(_WIN32)
#include <pthread.h>

#if defined(__clang__)
static void parallel_begin_child(void)
{
    parallel_calls = parallel_own_calls;
}

static inline int parallel_is_stale(void)
{
    return 0;
}

static inline int parallel_is_inside(void)
{
    return omp_in_parallel();
}

static inline void parallel_run(void (*function)(void *, int), void *argument, int num_threads)
{
    function(argument, num_threads);
}
#else
#include <signal.h>

/* Only one thread is stale, so the helper has one caller. */
static struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    void (*function)(void *, int);      /* asked for, and not begun; or NULL */
    void *argument;
    int num_threads;
    int is_working;
    int exists;
} parallel_helper = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, NULL, 0, 0, 0};

static _Thread_local int parallel_stale;
static _Thread_local int parallel_inside;       /* the helper and its caller */

/* In the child, in its only thread. The helper of a parent that is a child itself is gone too, and may have held the
 * mutex. */
static void parallel_begin_child(void)
{
    parallel_calls = parallel_own_calls;
    parallel_stale = 1;
    pthread_mutex_init(&parallel_helper.mutex, NULL);
    pthread_cond_init(&parallel_helper.changed, NULL);
    parallel_helper.function = NULL;
    parallel_helper.is_working = 0;
    parallel_helper.exists = 0;
}

static inline int parallel_is_stale(void)
{
    return parallel_stale;
}

static inline int parallel_is_inside(void)
{
    return parallel_inside || omp_in_parallel();
}

static void *parallel_help(void *unused)
{
    void (*function)(void *, int);
    parallel_inside = 1;
    pthread_mutex_lock(&parallel_helper.mutex);
    for (;;) {
        while (parallel_helper.function == NULL)
            pthread_cond_wait(&parallel_helper.changed, &parallel_helper.mutex);
        function = parallel_helper.function;
        parallel_helper.function = NULL;
        parallel_helper.is_working = 1;
        pthread_mutex_unlock(&parallel_helper.mutex);
        function(parallel_helper.argument, parallel_helper.num_threads);
        pthread_mutex_lock(&parallel_helper.mutex);
        parallel_helper.is_working = 0;
        pthread_cond_signal(&parallel_helper.changed);
    }
    return unused;
}

/* Without signals, which its workers inherit, except those that a thread's own faults raise: a handler such as
 * faulthandler's is still to see them. */
static int parallel_make_helper(void)
{
    pthread_t thread;
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGILL);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGTRAP);
    if (pthread_sigmask(SIG_SETMASK, &blocked, &before) != 0)
        return 0;
    parallel_helper.exists = pthread_create(&thread, NULL, parallel_help, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (parallel_helper.exists)
        pthread_detach(thread);
    return parallel_helper.exists;
}

static void parallel_run_stale(void (*function)(void *, int), void *argument, int num_threads)
{
    int is_helped = num_threads > 1 && (parallel_helper.exists || parallel_make_helper());
    if (is_helped) {
        pthread_mutex_lock(&parallel_helper.mutex);
        parallel_helper.argument = argument;
        parallel_helper.num_threads = num_threads - 1;
        parallel_helper.function = function;
        pthread_cond_signal(&parallel_helper.changed);
        pthread_mutex_unlock(&parallel_helper.mutex);
    }
    parallel_inside = 1;
    function(argument, 1);
    parallel_inside = 0;
    if (is_helped) {
        pthread_mutex_lock(&parallel_helper.mutex);
        parallel_helper.function = NULL;    /* if it has not begun, it would find nothing left */
        while (parallel_helper.is_working)
            pthread_cond_wait(&parallel_helper.changed, &parallel_helper.mutex);
        pthread_mutex_unlock(&parallel_helper.mutex);
    }
}

static inline void parallel_run(void (*function)(void *, int), void *argument, int num_threads)
{
    if (parallel_stale)
        parallel_run_stale(function, argument, num_threads);
    else
        function(argument, num_threads);
}
#endif

/* 0, or why it cannot be done. Once, before the first region. */
static inline int parallel_watch_forks(void)
{
    return pthread_atfork(NULL, NULL, parallel_begin_child);
}
#else
static inline int parallel_watch_forks(void)
{
    return 0;
}

static inline int parallel_is_stale(void)
{
    return 0;
}

static inline int parallel_is_inside(void)
{
#ifdef _OPENMP
    return omp_in_parallel();
#else
    return 0;
#endif
}

static inline void parallel_run(void (*function)(void *, int), void *argument, int num_threads)
{
    function(argument, num_threads);
}
#endif

#endif
