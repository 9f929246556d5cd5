/* The only door to OpenMP. Without it the same names say "one thread". */
#ifndef QEMBAG_PARALLEL_H
#define QEMBAG_PARALLEL_H

#ifdef _OPENMP
#include <errno.h>
#include <omp.h>
#define PARALLEL_OPENMP _OPENMP

static inline int parallel_max_threads(void)
{
    return omp_get_max_threads();
}

/* Whether this is the thread that has opened the region, or outside of one. */
static inline int parallel_is_caller(void)
{
    return omp_get_thread_num() == 0;
}

/* In seconds, from some start. */
static inline double parallel_clock(void)
{
    return omp_get_wtime();
}

/* Calls that work in parallel at this moment, in all threads of Python. Where there are as many as processors, each does
 * better alone: on 2 processors 32 threads' calls of two threads each came to 0.8 of one thread's, alone to 1.0. */
#if defined(__GNUC__)
static int parallel_calls;

/* Of `num_threads`, this call's share. */
static inline int parallel_enter(int num_threads)
{
    int calls = __atomic_add_fetch(&parallel_calls, 1, __ATOMIC_RELAXED);
    int share = calls > 1 && num_threads > 1 ? omp_get_num_procs() / calls : num_threads;
    return share < 1 ? 1 : share < num_threads ? share : num_threads;
}

static inline void parallel_leave(void)
{
    __atomic_sub_fetch(&parallel_calls, 1, __ATOMIC_RELAXED);
}
#else
static inline int parallel_enter(int num_threads)
{
    return num_threads;
}

static inline void parallel_leave(void)
{
}
#endif

/* A forked child has none of the threads that its parent's pool counts on, and its next parallel region would wait for
 * them for ever. Without a pool at the fork it makes one of its own. A handler of the C library's, so that forks that
 * Python does not know of are seen to as well. That is libgomp's way; libomp, clang's, sees to forks itself, and MSVC has
 * none. Nor has the child the calls of its parent's other threads. */
#if defined(__GNUC__) && !defined(_WIN32)
#include <pthread.h>

static void parallel_pause(void)
{
#if !defined(__clang__) && __GNUC__ >= 9
    omp_pause_resource_all(omp_pause_hard);
#endif
}

static void parallel_begin_child(void)
{
    parallel_calls = 0;
}

/* 0, or why it cannot be done. */
static inline int parallel_watch_forks(void)
{
    return pthread_atfork(parallel_pause, NULL, parallel_begin_child);
}
#else
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

static inline int parallel_max_threads(void)
{
    return 1;
}

static inline int parallel_is_caller(void)
{
    return 1;
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
#endif

/* The threads of one parallel region, and what keeps them apart.
 *
 * A thread that has slept may be woken on the processor of the thread that wakes it. Linux looks for an idle one first,
 * but only among those that share a cache, and in a virtual machine an idle processor may count as taken by its host. The
 * two then take turns on one processor, a time slice of some milliseconds each, call after call until the system spreads
 * them. So a worker that finds itself on its caller's processor moves to another one that it may use, and then may use
 * what it could before; and a caller that has done a share before any worker came lets others run for once, for it would
 * have to wait for them at the end anyway. */
typedef struct {
    int processor;      /* where the caller was when it last took a share; -1 where no worker may move */
    int moves_left;
    int callers_shares;
    int workers_shares;
} parallel_crew;

#if defined(_OPENMP) && defined(__linux__)
#include <sched.h> /* sched_getcpu and the like: Python.h, which comes before all, has defined _GNU_SOURCE */
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int parallel_may_move;

/* A service may be forbidden to change affinities on pain of death: systemd's SystemCallFilter=~@resources is a common
 * way. No call says what a filter does, so where there is one, a child tries: not the C library's fork, whose handlers
 * are for children that live on, and without a signal that this process would have to expect. */
static inline void parallel_learn_to_move(void)
{
    char line[128];
    cpu_set_t own;
    int status, is_filtered = 1;
    long child, waited;
    FILE *file = fopen("/proc/self/status", "re");
    if (file != NULL) {
        while (fgets(line, sizeof(line), file) != NULL)
            if (strncmp(line, "Seccomp:\t0", 10) == 0)
                is_filtered = 0;
        fclose(file);
    }
    parallel_may_move = !is_filtered;
    if (parallel_may_move || sched_getaffinity(0, sizeof(own), &own) != 0)
        return;
    child = syscall(SYS_clone, 0L, 0L, 0L, 0L, 0L);
    if (child == 0) {
        prctl(PR_SET_DUMPABLE, 0L, 0L, 0L, 0L);
        _exit(syscall(SYS_sched_setaffinity, 0L, sizeof(own), &own) != 0);
    }
    if (child > 0) {
        do
            waited = waitpid((pid_t)child, &status, __WALL);
        while (waited < 0 && errno == EINTR);
        parallel_may_move = waited == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
}

static inline void parallel_prepare(parallel_crew *crew, int num_threads)
{
    crew->processor = parallel_may_move ? sched_getcpu() : -1;
    crew->moves_left = 2 * num_threads;     /* a thread of another program's may chase us */
    crew->callers_shares = 0;
    crew->workers_shares = 0;
}

/* Off this processor. What a thread may use is then set to everything, of which the system leaves what its control group
 * has: with just those set it would not follow when the group is given more. Unless it was set to less before. */
static inline void parallel_move(int processor)
{
    cpu_set_t allowed, others, all;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0)
        return;
    others = allowed;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0)
        return;
    memset(&all, 0xff, sizeof(all));
    if (sched_setaffinity(0, sizeof(all), &all) != 0 || sched_getaffinity(0, sizeof(all), &all) != 0
        || !CPU_EQUAL(&all, &allowed))
        sched_setaffinity(0, sizeof(allowed), &allowed);
}

/* By each thread before each share of the work that it does. */
static inline void parallel_spread(parallel_crew *crew)
{
    int processor = sched_getcpu();
    if (omp_get_thread_num() == 0) {
        if (parallel_may_move)
            __atomic_store_n(&crew->processor, processor, __ATOMIC_RELAXED);
        if (++crew->callers_shares == 2 && omp_get_num_threads() > 1
            && __atomic_load_n(&crew->workers_shares, __ATOMIC_RELAXED) == 0)
            sched_yield();
        return;
    }
    __atomic_fetch_add(&crew->workers_shares, 1, __ATOMIC_RELAXED);
    if (processor >= 0 && processor == __atomic_load_n(&crew->processor, __ATOMIC_RELAXED)
        && __atomic_fetch_sub(&crew->moves_left, 1, __ATOMIC_RELAXED) > 0)
        parallel_move(processor);
}
#else
static inline void parallel_learn_to_move(void)
{
}

static inline void parallel_prepare(parallel_crew *crew, int num_threads)
{
    (void)crew;
    (void)num_threads;
}

static inline void parallel_spread(parallel_crew *crew)
{
    (void)crew;
}
#endif

#endif
