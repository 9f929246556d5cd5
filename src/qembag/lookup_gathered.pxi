# Part of _kernels.pyx: bags whose rows are gathered first: those that are pruned, above all.

# ---- Gathering ----------------------------------------------------------------------------------------------------

cdef enum:
    # Positions gathered at a time: a bit each.
    WINDOW = 64
    # How far ahead of gathering entries of the mapping are prefetched, where it has more than so many.
    MAPPING_AHEAD = 64
    NEAR_MAPPING = 1 << 16
    # Rows of a smaller table are in the second-level cache, where prefetching them takes a sixth of the time and gains
    # nothing (Zen 4: up to 1 MB).
    CACHED_BYTES = 1 << 19

# The rows of some positions of the indices.
cdef struct Window:
    int64_t start
    int64_t stop
    uint64_t takes_part         # bit k: whether the kth position has a row that counts, neither pruned nor padding
    uint64_t is_absent          # padding, and invalid indices that are skipped: no mean counts them
    int64_t number[WINDOW]      # of the rows that take part
    float weight[WINDOW]        # theirs

# One is summed while the rows of the next are on their way to the cache.
cdef struct Windows:
    Window window[2]
    int current
    int64_t limit               # no position behind it is gathered


cdef inline void prefetch_mapping(const Lookup *job, const Block *block, int64_t start, int64_t stop) noexcept nogil:
    """A small mapping is in cache."""
    cdef int64_t position, index
    if job.num_embeddings <= NEAR_MAPPING:
        return
    for position in range(start, stop):
        index = index_at(block, position, job.index_size)
        if not unlikely(<uint64_t> index >= <uint64_t> job.num_embeddings):
            prefetch(<const uint8_t *> &(<const int32_t *> job.mapping)[index], False)


cdef inline bint find_rows(const Lookup *job, const Block *block, Window *window, int64_t *found,
                           const int index_size, const bint is_pruned, const bint may_be_absent) noexcept nogil:
    """The row of each position, or -1. Each index, and what it is mapped to, is read here once for all that follows:
    another thread may write to them."""
    cdef const volatile int32_t *mapping = job.mapping
    cdef uint64_t num_embeddings = job.num_embeddings
    cdef int64_t padding_idx = job.padding_idx, start = window.start, stop = window.stop, position, index, row
    cdef uint64_t is_absent = 0
    cdef bint skips_invalid = job.skips_invalid
    for position in range(start, stop):
        row = index = index_at(block, position, index_size)
        if unlikely(<uint64_t> index >= num_embeddings):
            if not (may_be_absent and skips_invalid):
                return False
            row = index = padding_idx
            is_absent |= <uint64_t> 1 << (position - start)
        elif is_pruned:
            row = mapping[index]
        if may_be_absent:
            # Whatever it is mapped to.
            row = -1 if index == padding_idx else row
            is_absent |= <uint64_t> (index == padding_idx) << (position - start)
        found[position - start] = row
    window.is_absent = is_absent
    return True


cdef inline bint find_rows_of_size(const Lookup *job, const Block *block, Window *window, int64_t *found,
                                   const int index_size) noexcept nogil:
    if job.padding_idx >= 0 or job.skips_invalid:
        return find_rows(job, block, window, found, index_size, job.mapping != NULL, True)
    if job.mapping != NULL:
        return find_rows(job, block, window, found, index_size, True, False)
    return find_rows(job, block, window, found, index_size, False, False)


cdef bint gather(const Lookup *job, Window *window, const uint8_t[:, :] rows, const Block *block,
                 int64_t limit) noexcept nogil:
    """The rows from `window.start` to `window.stop`, prefetched, without a branch on which take part: where rows are
    pruned at random, a branch is mispredicted as often as not, and that costs as much as a row. False where an index or
    a mapped row is out of range."""
    cdef int64_t found[WINDOW]
    cdef int count = <int> (window.stop - window.start), place = 0, k
    if job.mapping != NULL:
        prefetch_mapping(job, block, window.stop, min(window.stop + MAPPING_AHEAD, limit))
    if not (find_rows_of_size(job, block, window, found, 8) if job.index_size == 8
            else find_rows_of_size(job, block, window, found, job.index_size)):
        return False
    for k in range(count, (count + 7) // 8 * 8):
        found[k] = -1
    if not take_part(found, count, job.num_rows, window.number, &window.takes_part):
        return False
    if job.weight_size != 0:
        for k in range(count):
            window.weight[place] = read_weight(block, window.start + k)
            place += (window.takes_part >> k) & 1
    if job.num_rows * job.layout.row_bytes > CACHED_BYTES:
        for k in range(count_ones(window.takes_part)):
            prefetch_any_row(&rows[window.number[k], 0], block)
    return True


cdef Window *next_window(const Lookup *job, Windows *windows, const uint8_t[:, :] rows,
                         const Block *block) noexcept nogil:
    """Gathers one more window and gives the one gathered before; NULL for a fault, or where a signal ends the call."""
    cdef Window *ready = &windows.window[1 - windows.current]
    cdef Window *following = &windows.window[windows.current]
    windows.current = 1 - windows.current
    following.start = ready.stop
    following.stop = min(ready.stop + WINDOW, windows.limit)
    if unlikely(ready.start // POSITIONS_A_LOOK != ready.stop // POSITIONS_A_LOOK) and not may_go_on(job):
        return NULL
    if not gather(job, following, rows, block, windows.limit):
        return NULL
    return ready


# ---- Bags by way of windows ---------------------------------------------------------------------------------------

cdef inline void add_gathered(lanes *acc, const Window *window, int first, int end, const uint8_t[:, :] rows,
                              const Block *block, const bint is_weighted, const int form,
                              const int width) noexcept nogil:
    cdef int place
    for place in range(first, end):
        add_row(acc, &rows[window.number[place], 0], block, window.weight[place] if is_weighted else 1, is_weighted,
                form, width)


cdef inline void max_gathered(lanes *acc, const Window *window, int first, int end, const uint8_t[:, :] rows,
                              const Block *block, bint is_first, const int form, const int width) noexcept nogil:
    cdef int place
    for place in range(first, end):
        max_row(acc, &rows[window.number[place], 0], block, is_first, form, width)
        is_first = False


cdef inline bint look_up_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int form,
                                  const int width, const bint is_max) noexcept nogil:
    """What `look_up` does, for rows that `gather` has found."""
    cdef Block block
    cdef uint8_t *out = job.out + task.first_bag * job.out_stride
    cdef bint is_first
    cdef int64_t position = read_offset(job, task.first_bag), stop, upto
    cdef Py_ssize_t bag, count
    cdef int first, end
    cdef Windows windows
    cdef Window *window = &windows.window[0]
    cdef lanes acc[16]
    if unlikely(not 0 <= position <= task.limit):
        return False
    set_block(&block, job, task, form, width)
    windows.limit = task.limit
    windows.current = 1
    window.start = window.stop = windows.window[1].start = windows.window[1].stop = position
    if next_window(job, &windows, rows, &block) == NULL:
        return False
    for bag in range(task.first_bag, task.end_bag):
        stop = read_offset(job, bag + 1)
        if unlikely(not position <= stop <= task.limit):
            return False
        set_zero(acc, width)
        count = 0
        is_first = True
        while position < stop:
            if unlikely(position == window.stop):
                window = next_window(job, &windows, rows, &block)
                if window == NULL:
                    return False
            upto = min(stop, window.stop)
            first = count_ones_below(window.takes_part, <int> (position - window.start))
            end = count_ones_below(window.takes_part, <int> (upto - window.start))
            if is_max:
                max_gathered(acc, window, first, end, rows, &block, is_first, form, width)
            elif job.weight_size != 0:
                add_gathered(acc, window, first, end, rows, &block, True, form, width)
            else:
                add_gathered(acc, window, first, end, rows, &block, False, form, width)
            is_first = is_first and first == end
            count += upto - position
            if job.padding_idx >= 0 or job.skips_invalid:
                count -= (count_ones_below(window.is_absent, <int> (upto - window.start))
                          - count_ones_below(window.is_absent, <int> (position - window.start)))
            position = upto
        finish_bag(acc, job, out, &block, bag, count, form, width)
        out += job.out_stride
    return True
