# Part of _kernels.pyx: bags of rows, in order.

cdef enum:
    EITHER = -1         # an index size that the loop asks for


cdef inline int64_t index_at(const Block *block, int64_t position, int index_size) noexcept nogil:
    """`read_index` from a copy of the address."""
    if index_size == 8 or (index_size == EITHER and block.index_size == 8):
        return (<const volatile int64_t *> block.indices)[position]
    if index_size == 4 or index_size == EITHER:
        return (<const volatile int32_t *> block.indices)[position]
    return position


cdef inline float read_weight(const Block *block, int64_t position) noexcept nogil:
    if unlikely(block.weight_step == 2):
        return float_of_half((<const uint16_t *> block.weights)[position])
    return (<const float *> (block.weights + block.weight_step * position))[0]


# ---- Bags, row by row ---------------------------------------------------------------------------------------------
#
# Where no row is pruned, indices are read in the loop that sums: 1.2 to 1.4 times as fast as by way of a window.

cdef inline void prefetch_ahead(const uint8_t[:, :] rows, const Block *block, int64_t position, const int form,
                                const int width, const int index_size) noexcept nogil:
    """The row so far ahead of a position."""
    cdef int64_t number = index_at(block, position + block.ahead, index_size)
    if not unlikely(<uint64_t> number >= <uint64_t> block.num_rows):
        prefetch_row(&rows[number, 0], block, form, width)


cdef inline bint find_row(const uint8_t[:, :] rows, const Block *block, int64_t position, const uint8_t **row,
                          const int index_size, const bint is_plain) noexcept nogil:
    """The row at a position. False where there is none: for padding, and where the index is out of range."""
    cdef int64_t number = index_at(block, position, index_size)
    if unlikely(<uint64_t> number >= <uint64_t> block.num_rows):
        return False
    if not is_plain and unlikely(number == block.padding_idx):
        return False
    row[0] = &rows[number, 0]
    return True


cdef inline bint fetch_row(const uint8_t[:, :] rows, const Block *block, int64_t position, const uint8_t **row,
                           const int form, const int width, const int index_size,
                           const bint is_plain) noexcept nogil:
    if not unlikely(position >= block.last):
        prefetch_ahead(rows, block, position, form, width, index_size)
    return find_row(rows, block, position, row, index_size, is_plain)


cdef inline bint fetch_two_rows(const uint8_t[:, :] rows, const Block *block, int64_t first, int64_t second,
                                const uint8_t **row, const uint8_t **another, const int form, const int width,
                                const int index_size, const bint is_plain) noexcept nogil:
    """The same for two bags, of which the second follows the first."""
    if not unlikely(second >= block.last):
        prefetch_ahead(rows, block, first, form, width, index_size)
        prefetch_ahead(rows, block, second, form, width, index_size)
    return (find_row(rows, block, first, row, index_size, is_plain)
            and find_row(rows, block, second, another, index_size, is_plain))


cdef inline void take_row(lanes *acc, const uint8_t *row, const Block *block, int64_t position, bint is_first,
                          const int form, const int width, const bint is_max, const bint is_plain) noexcept nogil:
    if is_max:
        max_row(acc, row, block, is_first, form, width)
    elif is_plain:
        add_row(acc, row, block, 1, False, form, width)
    else:
        # A weight of 1 changes no bit. With a branch around the products, gcc 12 stores scale and bias and loads them
        # again.
        add_row(acc, row, block, read_weight(block, position), True, form, width)


cdef void warm_up(const uint8_t[:, :] rows, const Pass *task, const Block *block, int64_t start) noexcept nogil:
    """Prefetches the first rows, which no earlier bag has."""
    cdef int64_t position, number
    for position in range(start, min(task.limit, start + task.distance)):
        number = index_at(block, position, EITHER)
        if <uint64_t> number < <uint64_t> block.num_rows:
            prefetch_any_row(&rows[number, 0], block)


cdef inline int64_t skip_absent(const Block *block, int64_t position, int64_t stop,
                                const int index_size) noexcept nogil:
    """The first position from here on that is neither padding nor an invalid index to be skipped."""
    cdef int64_t index
    while position < stop:
        index = index_at(block, position, index_size)
        if <uint64_t> index >= <uint64_t> block.num_rows:
            if not block.skips_invalid:
                break
        elif index != block.padding_idx:
            break
        position += 1
    return position


cdef float divisor_of(const Lookup *job, const Block *block, Py_ssize_t bag) noexcept nogil:
    """The sum of a bag's weights, or the root of that of their squares; of what a mean counts. The offsets are read
    once more: kept for this, they would take registers from the rows."""
    cdef int64_t start = max(read_offset(job, bag), <int64_t> 0)
    cdef int64_t stop = min(read_offset(job, bag + 1), <int64_t> job.num_indices), position, index
    cdef float total = 0, weight
    for position in range(start, stop):
        if unlikely(position % CHECKED_AT_A_TIME == CHECKED_AT_A_TIME - 1) and not may_go_on(job):
            break
        index = index_at(block, position, EITHER)
        if index == job.padding_idx or (job.skips_invalid and <uint64_t> index >= <uint64_t> job.num_embeddings):
            continue
        weight = read_weight(block, position)
        total += weight if job.mode == AVERAGE else weight * weight
    return total if job.mode == AVERAGE else sqrtf(total)


cdef inline bint add_rows(lanes *acc, const Lookup *job, const uint8_t[:, :] rows, const Block *block, int64_t start,
                          int64_t stop, int64_t *count, bint *is_first, const int form, const int width,
                          const bint is_max, const int index_size, const bint is_plain) noexcept nogil:
    """Rows of one bag; what is absent is taken off its count. False where an index is out of range."""
    cdef int64_t position = start, after
    cdef const uint8_t *row = NULL
    cdef bint is_there
    while True:
        # Nothing leaves the loop between its start and the sum: accumulators that an iteration may leave alone would
        # live in memory.
        is_there = position < stop and fetch_row(rows, block, position, &row, form, width, index_size, is_plain)
        while is_there:
            take_row(acc, row, block, position, is_first[0], form, width, is_max, is_plain)
            is_first[0] = False
            position += 1
            is_there = position < stop and fetch_row(rows, block, position, &row, form, width, index_size, is_plain)
        if not unlikely(position < stop):
            return True
        after = stop if is_plain else skip_absent(block, position, stop, index_size)
        if is_plain or after == position:
            return False
        count[0] -= after - position
        position = after


cdef inline int64_t add_in_turn(lanes *acc, lanes *other, const uint8_t[:, :] rows, const Block *block,
                                int64_t start, int64_t middle, int64_t both, const int form, const int width,
                                const int index_size, const bint is_plain) noexcept nogil:
    """Rows of two bags in turn: an addition and an fma of one bag wait for each other, and those of two do not. How
    many of `both` were added to each, up to padding or an index out of range in one of them."""
    cdef const uint8_t *row = NULL
    cdef const uint8_t *another = NULL
    cdef int64_t k = 0
    cdef bint are_there = both > 0 and fetch_two_rows(rows, block, start, middle, &row, &another, form, width,
                                                      index_size, is_plain)
    while are_there:
        take_row(acc, row, block, start + k, False, form, width, False, is_plain)
        take_row(other, another, block, middle + k, False, form, width, False, is_plain)
        k += 1
        are_there = k < both and fetch_two_rows(rows, block, start + k, middle + k, &row, &another, form, width,
                                                index_size, is_plain)
    return k


cdef inline bint add_bag(lanes *acc, const Lookup *job, const uint8_t[:, :] rows, const Block *block, int64_t start,
                         int64_t stop, int64_t *count, const int form, const int width, const bint is_max,
                         const int index_size, const bint is_plain) noexcept nogil:
    """The rows of one bag that have not been added yet. A giant bag is interrupted for signals."""
    cdef bint is_first = True
    cdef int64_t middle
    if is_plain:
        return add_rows(acc, job, rows, block, start, stop, count, &is_first, form, width, False, index_size, True)
    while start < stop:
        middle = min(stop, start + POSITIONS_A_LOOK)
        if not add_rows(acc, job, rows, block, start, middle, count, &is_first, form, width, is_max, index_size,
                        False):
            return False
        start = middle
        if unlikely(start < stop) and not may_go_on(job):
            return False
    return True


cdef inline bint look_up(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int form,
                         const int width, const bint is_max, const int index_size,
                         const bint is_plain) noexcept nogil:
    """Sums (or maxima) of whole bags, over the columns of one block. False where an index or an offset is out of
    range, or where a signal ends the call."""
    cdef Block block
    cdef uint8_t *out = job.out + task.first_bag * job.out_stride
    cdef Py_ssize_t bag = task.first_bag
    cdef int64_t start = read_offset(job, bag), stop, end = 0, added, count
    cdef lanes acc[16]
    cdef lanes other[4]
    cdef bint may_pair = width <= LANES_PAIRED and not is_max and not is_grouped(form), is_pair
    if unlikely(not 0 <= start <= job.num_indices):
        return False
    set_block(&block, job, task, form, width)
    if task.is_first:
        warm_up(rows, task, &block, start)
    if may_pair:
        set_zero(other, width)      # also where there is one bag: gcc does not see that nothing reads it then
    while bag < task.end_bag:
        stop = read_offset(job, bag + 1)
        added = 0
        is_pair = may_pair and task.in_pairs and bag + 1 < task.end_bag
        set_zero(acc, width)
        if may_pair and is_pair:
            end = read_offset(job, bag + 2)
            if unlikely(not start <= stop <= end <= job.num_indices):
                return False
            set_zero(other, width)
            added = add_in_turn(acc, other, rows, &block, start, stop, min(stop - start, end - stop), form, width,
                                index_size, is_plain)
        while True:
            if unlikely(not start <= stop <= job.num_indices):
                return False
            count = stop - start
            if not add_bag(acc, job, rows, &block, start + added, stop, &count, form, width, is_max, index_size,
                           is_plain):
                return False
            finish_bag(acc, job, out, &block, bag, count, form, width)
            start = stop
            out += job.out_stride
            bag += 1
            if not (may_pair and is_pair):
                break
            is_pair = False
            stop = end
            copy_block(acc, other, width)
    return True
