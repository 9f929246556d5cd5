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


cdef Py_ssize_t share_out(const Lookup *lookups, Place first, Place end, double work, Place *bounds,
                          Py_ssize_t num_chunks) noexcept nogil:
    """Chunks of bags that cost about equally much, and which of them costs most: it may have a giant bag. The bounds
    are right even where another thread changes the offsets: they never decrease."""
    cdef Py_ssize_t chunk, heaviest = 0
    cdef double before = 0, most = 0, done
    bounds[0] = first
    for chunk in range(num_chunks):
        if chunk + 1 < num_chunks:
            bounds[chunk + 1] = place_after(lookups, bounds[chunk], end, work * (chunk + 1) / num_chunks - before,
                                            &done)
        else:
            bounds[num_chunks] = end
            done = work - before
        before += done
        if done > most:
            most = done
            heaviest = chunk
    return heaviest


# Rows that are read from a lookup while the one before it is summed: bytes of them, and how many at most.
cdef enum:
    AHEAD_BYTES = 1 << 13
    AHEAD_ROWS = 64


cdef void prefetch_lookup(const Lookup *job) noexcept nogil:
    """The first rows of a lookup that comes next. The bags of a small batch are of another table each, and no row
    before them in their own lookup can have brought their rows into the cache."""
    cdef int64_t position = read_offset(job, 0), number
    cdef Py_ssize_t byte, used = job.layout.used_bytes
    cdef int64_t stop = min(read_offset(job, job.num_bags), <int64_t> job.num_indices)
    if job.index_size == 0 or job.mapping != NULL or not 0 <= position < stop:
        return
    stop = min(stop, position + max(min(AHEAD_BYTES // used, <Py_ssize_t> AHEAD_ROWS), <Py_ssize_t> 1))
    while position < stop:
        number = read_index(job, position, job.index_size)
        if <uint64_t> number < <uint64_t> job.num_rows:
            byte = 0
            while byte < used:
                prefetch(&job.rows[0][number, byte], False)
                byte += 64
            prefetch(&job.rows[0][number, used - 1], False)
        position += 1


cdef bint look_up_between(const Lookup *lookups, Place first, Place end, bint is_one_bag) noexcept nogil:
    """On this thread, one lookup after the other."""
    cdef Py_ssize_t number, bag = first.bag, end_bag
    cdef Plan plan
    for number in range(first.lookup, last_of(end) + 1):
        end_bag = end_bag_of(lookups, number, end)
        set_plan(&plan, &lookups[number], is_one_bag)
        if number < last_of(end):
            prefetch_lookup(&lookups[number + 1])
        if not look_up_bags(&lookups[number], &plan, bag, end_bag, number == first.lookup):
            return False
        bag = 0
    return True


cdef void look_up_chunks(const Lookup *lookups, const Place *bounds, Py_ssize_t num_chunks, Py_ssize_t heaviest,
                         double work, int num_threads, int *num_failed) noexcept nogil:
    """The heaviest first: the others fill the time that it takes one thread."""
    cdef Py_ssize_t turn, chunk
    cdef int failures = 0, callers = parallel_processor(), team = 1
    cdef Py_ssize_t chunks_elsewhere = 0
    cdef double work_elsewhere = 0
    for turn in prange(num_chunks, schedule="dynamic", chunksize=1, num_threads=num_threads):
        chunk = heaviest if turn == 0 else turn - (turn <= heaviest)
        failures += not look_up_between(lookups, bounds[chunk], bounds[chunk + 1], False)
        team = parallel_team()
        if parallel_is_elsewhere(callers):
            chunks_elsewhere += 1
            work_elsewhere += work_between(lookups, bounds[chunk], bounds[chunk + 1])
    # Either will do: one chunk may be a giant bag.
    parallel_judge(team, max(<double> chunks_elsewhere / num_chunks, work_elsewhere / max(work, 1.0)))
    num_failed[0] = failures


cdef bint look_up_in_parallel(const Lookup *lookups, Place first, Place end, Py_ssize_t num_bags, double work,
                              int num_threads, bint is_forked) noexcept nogil:
    cdef Place bounds[MAX_CHUNKS + 1]
    cdef Py_ssize_t num_chunks, heaviest
    cdef int failures = 0
    if num_threads == 0:
        num_threads = parallel_max_threads()
    num_threads = parallel_enter(min(num_threads, MAX_CHUNKS // CHUNKS_A_THREAD))
    num_chunks = min(<Py_ssize_t> (CHUNKS_A_THREAD * num_threads), num_bags)
    num_threads = min(<Py_ssize_t> num_threads, num_chunks)
    if num_threads == 1:
        failures = not look_up_between(lookups, first, end, False)
    else:
        heaviest = share_out(lookups, first, end, work, bounds, num_chunks)
        if is_forked:
            # Of the pool that this thread had before the fork, no thread lives. A region within a region does not use
            # it.
            with parallel(num_threads=1):
                look_up_chunks(lookups, bounds, num_chunks, heaviest, work, num_threads, &failures)
        else:
            look_up_chunks(lookups, bounds, num_chunks, heaviest, work, num_threads, &failures)
    parallel_leave()
    return failures == 0


cdef bint look_up_shared(const Lookup *lookups, Place first, Place end, int num_threads) noexcept nogil:
    """Bags of one lookup or of several, shared out among threads where that pays."""
    cdef Py_ssize_t num_bags = count_bags(lookups, first, end)
    cdef double work = work_between(lookups, first, end)
    cdef bint is_forked = parallel_is_forked()
    if num_bags < 2 or work < (MIN_FORKED_WORK if is_forked else MIN_PARALLEL_WORK):
        return look_up_between(lookups, first, end, num_bags == 1)
    return look_up_in_parallel(lookups, first, end, num_bags, work, num_threads, is_forked)
