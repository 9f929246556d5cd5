# Part of _kernels.pyx: bags shared out among threads.

# Several chunks a thread: the one that gets a long bag leaves the rest to the others.
cdef enum:
    CHUNKS_A_THREAD = 8
    MAX_CHUNKS = 2048

# By the measure of `work_of`. At this much, 14 us on one thread, two are
# 1.15 to 1.4 times as fast, and 1.7 times at four times as much; at half of it they gain nothing. Opening a parallel
# region takes 1 to 3 us when its threads are awake.
cdef int64_t MIN_PARALLEL_WORK = 1 << 19
# In a forked child a region makes its threads anew, which takes some 50 us.
cdef int64_t MIN_FORKED_WORK = 1 << 22


cdef void share_out(const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag, Py_ssize_t *bounds,
                    Py_ssize_t num_chunks) noexcept nogil:
    """Chunks of bags with about equally many rows each; an empty bag counts as one, for its output. The
    bounds are right even where another thread changes the offsets: they never decrease."""
    cdef Py_ssize_t chunk, low, high, middle
    # In double, where no difference of offsets overflows, whatever they hold.
    cdef double first = <double> read_offset(job, first_bag) + first_bag
    cdef double total = <double> read_offset(job, end_bag) + end_bag - first
    bounds[0] = first_bag
    for chunk in range(1, num_chunks):
        low = bounds[chunk - 1]
        high = end_bag
        while low < high:
            middle = low + (high - low) // 2
            if <double> read_offset(job, middle) + middle - first < total * chunk / num_chunks:
                low = middle + 1
            else:
                high = middle
        bounds[chunk] = low
    bounds[num_chunks] = end_bag


cdef void look_up_chunks(const Lookup *job, const uint8_t[:, :] rows, const Plan *plan, const Py_ssize_t *bounds,
                         Py_ssize_t num_chunks, int num_threads, int *num_failed) noexcept nogil:
    cdef Py_ssize_t chunk
    cdef int failures = 0, callers = parallel_processor(), team = 1
    cdef Py_ssize_t chunks_elsewhere = 0
    cdef double work_elsewhere = 0, work = work_of(job, bounds[0], bounds[num_chunks])
    for chunk in prange(num_chunks, schedule="dynamic", chunksize=1, num_threads=num_threads):
        failures += not look_up_bags(job, rows, plan, bounds[chunk], bounds[chunk + 1])
        team = parallel_team()
        if parallel_is_elsewhere(callers):
            chunks_elsewhere += 1
            work_elsewhere += work_of(job, bounds[chunk], bounds[chunk + 1])
    # Either will do: one chunk may be a giant bag.
    parallel_judge(team, max(<double> chunks_elsewhere / num_chunks, work_elsewhere / max(work, 1.0)))
    num_failed[0] = failures


cdef bint look_up_shared(const Lookup *job, const uint8_t[:, :] rows, Py_ssize_t first_bag, Py_ssize_t end_bag,
                         int num_threads) noexcept nogil:
    """Bags, shared out among threads where that pays."""
    cdef Py_ssize_t bounds[MAX_CHUNKS + 1]
    cdef Py_ssize_t num_chunks
    cdef Plan plan
    cdef int failures = 0
    cdef double work = work_of(job, first_bag, end_bag)
    cdef bint is_forked = parallel_is_forked()
    set_plan(&plan, job, end_bag - first_bag == 1)
    if end_bag - first_bag < 2 or work < (MIN_FORKED_WORK if is_forked else MIN_PARALLEL_WORK):
        return look_up_bags(job, rows, &plan, first_bag, end_bag)
    if num_threads == 0:
        num_threads = parallel_max_threads()
    num_threads = parallel_enter(min(num_threads, MAX_CHUNKS // CHUNKS_A_THREAD))
    num_chunks = min(<Py_ssize_t> (CHUNKS_A_THREAD * num_threads), end_bag - first_bag)
    num_threads = min(<Py_ssize_t> num_threads, num_chunks)
    if num_threads == 1:
        failures = not look_up_bags(job, rows, &plan, first_bag, end_bag)
    else:
        share_out(job, first_bag, end_bag, bounds, num_chunks)
        if is_forked:
            # Of the pool that this thread had before the fork, no thread lives. A region within a region does not use
            # it.
            with parallel(num_threads=1):
                look_up_chunks(job, rows, &plan, bounds, num_chunks, num_threads, &failures)
        else:
            look_up_chunks(job, rows, &plan, bounds, num_chunks, num_threads, &failures)
    parallel_leave()
    return failures == 0
