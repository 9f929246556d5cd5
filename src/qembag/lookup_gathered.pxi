# Part of _kernels.pyx: bags whose rows are gathered first: those that are pruned, above all.

# ---- Gathering ----------------------------------------------------------------------------------------------------

cdef enum:
    # Positions gathered at a time.
    WINDOW = 64
    # How far ahead of gathering entries of the mapping are prefetched, where it has more than so many.
    MAPPING_AHEAD = 64
    NEAR_MAPPING = 1 << 16

# The rows of some positions of the indices that take part: neither pruned nor padding.
cdef struct Window:
    int64_t start
    int64_t stop
    const uint8_t *row[WINDOW + 1]      # one more: each is written before it is known to count
    float weight[WINDOW + 1]
    # Of each position: how many rows come before it, and how many positions that are no padding.
    int32_t row_of[WINDOW + 1]
    int32_t count_of[WINDOW + 1]

# One is summed while the rows of the next are on their way to the cache.
cdef struct Windows:
    Window window[2]
    int current
    int64_t limit               # no position behind it is gathered


cdef inline bint gather(const Lookup *job, Window *window, const uint8_t[:, :] rows, const Block *block,
                        int64_t mapping_limit, const int index_size, const bint is_pruned, const bint is_padded,
                        const bint is_weighted) noexcept nogil:
    """The rows from `window.start` to `window.stop`, prefetched, without a branch on which take part: where rows are
    pruned at random, a branch is mispredicted as often as not, and that costs as much as a row. False where an index or
    a mapped row is out of range."""
    cdef uint64_t num_rows = job.num_rows, num_embeddings = job.num_embeddings
    cdef const volatile int32_t *mapping = job.mapping
    cdef int64_t padding_idx = job.padding_idx, start = window.start, position, index, row
    cdef Py_ssize_t place = 0, byte
    cdef int32_t count = 0
    cdef const uint8_t *address
    cdef bint is_padding = False
    window.row_of[0] = window.count_of[0] = 0
    for position in range(start, window.stop):
        if is_pruned and unlikely(position < mapping_limit):
            index = index_at(block, position + MAPPING_AHEAD, index_size)
            if not unlikely(<uint64_t> index >= num_embeddings):
                prefetch(<const uint8_t *> &mapping[index], False)
        index = row = index_at(block, position, index_size)
        if unlikely(<uint64_t> index >= num_embeddings):
            return False
        if is_padded:
            is_padding = index == padding_idx
        if is_pruned:
            row = mapping[index]
            # -1 is the only number beyond the rows that is right, and padding's row is never looked at.
            if unlikely(<uint64_t> (row + 1) > num_rows) and not is_padding:
                return False
        # A hint is allowed at any address, also at that of row -1: a branch would cost more.
        address = &rows[row, 0]
        prefetch(address + block.first_byte, False)
        for byte in range(block.first_byte + 64, block.last_byte + 1, 64):
            prefetch(address + byte, False)
        prefetch(address + block.end_byte, False)
        window.row[place] = address
        if is_weighted:
            window.weight[place] = read_weight(block, position)
        place += (row >= 0) & (not is_padding)
        window.row_of[position - start + 1] = place
        if is_padded:
            count += not is_padding
            window.count_of[position - start + 1] = count
    return True


cdef bint gather_window(const Lookup *job, Window *window, const uint8_t[:, :] rows, const Block *block,
                        int64_t limit) noexcept nogil:
    cdef bint is_weighted = job.weight_size != 0, is_padded = job.padding_idx >= 0
    # A small mapping is in cache.
    cdef int64_t mapping_limit = limit - MAPPING_AHEAD if job.num_embeddings > NEAR_MAPPING else 0
    if job.mapping != NULL and not is_weighted and not is_padded:
        if job.index_size == 8:
            return gather(job, window, rows, block, mapping_limit, 8, True, False, False)
        if job.index_size == 4:
            return gather(job, window, rows, block, mapping_limit, 4, True, False, False)
    return gather(job, window, rows, block, mapping_limit, job.index_size, job.mapping != NULL, is_padded, is_weighted)


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
    if not gather_window(job, following, rows, block, windows.limit):
        return NULL
    return ready


# ---- Bags by way of windows ---------------------------------------------------------------------------------------

cdef inline void add_gathered(lanes *acc, const Window *window, int32_t first, int32_t end, const Block *block,
                              const bint is_weighted, const int bits, const int width,
                              const bint quads) noexcept nogil:
    cdef lanes scale, bias, weight
    cdef int32_t place
    for place in range(first, end):
        read_pair(window.row[place], block, &scale, &bias, bits)
        if is_weighted:
            weight = lanes_broadcast(window.weight[place])
            scale = lanes_mul(scale, weight)
            bias = lanes_mul(bias, weight)
        add_row(acc, window.row[place], block, scale, bias, bits, width, quads)


cdef inline void max_gathered(lanes *acc, const Window *window, int32_t first, int32_t end, const Block *block,
                              bint is_first, const int bits, const int width) noexcept nogil:
    cdef lanes scale, bias
    cdef int32_t place
    for place in range(first, end):
        read_pair(window.row[place], block, &scale, &bias, bits)
        max_row(acc, window.row[place], block, scale, bias, is_first, bits, width)
        is_first = False


cdef inline bint look_up_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int bits,
                                  const int width, const bint quads, const bint is_max) noexcept nogil:
    """What `look_up` does, for rows that `gather` has found."""
    cdef Block block = block_of(job, task, bits, width, quads)
    cdef uint8_t *out = job.out + task.first_bag * job.out_stride
    cdef bint is_first
    cdef int64_t position = read_offset(job, task.first_bag), stop, upto
    cdef Py_ssize_t bag, count
    cdef int32_t first, end
    cdef Windows windows
    cdef Window *window = &windows.window[0]
    cdef lanes acc[16]
    if unlikely(not 0 <= position <= task.limit):
        return False
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
            first = window.row_of[position - window.start]
            end = window.row_of[upto - window.start]
            if is_max:
                max_gathered(acc, window, first, end, &block, is_first, bits, width)
            elif job.weight_size != 0:
                add_gathered(acc, window, first, end, &block, True, bits, width, quads)
            else:
                add_gathered(acc, window, first, end, &block, False, bits, width, quads)
            is_first = is_first and first == end
            if job.padding_idx >= 0:
                count += window.count_of[upto - window.start] - window.count_of[position - window.start]
            else:
                count += upto - position
            position = upto
        finish_bag(acc, job, out, &block, count, bits, width, quads)
        out += job.out_stride
    return True
