# Part of _kernels.pyx: bags of rows.

# A pass over some bags.
cdef struct Pass:
    Py_ssize_t first_bag
    Py_ssize_t end_bag
    Py_ssize_t first_group
    int width
    bint in_pairs
    bint is_first               # nothing has been prefetched for it
    int64_t limit               # where the bags that the caller goes on with end: rows are prefetched up to there
    Py_ssize_t distance         # rows that are prefetched ahead


# Which part of a row a pass adds. Copies of what the row loop reads, so that it stays in registers.
cdef struct Block:
    Py_ssize_t first_byte       # of the row
    Py_ssize_t last_byte        # where the last group (or quad) starts
    Py_ssize_t pair_byte
    Py_ssize_t end_byte         # the row's last: prefetched too, for rows are not aligned
    Py_ssize_t codes_start
    bint is_short               # the whole row is smaller than what a group loads
    bint is_whole               # the output is float32, and no group ends beyond it
    const uint8_t *indices
    int64_t padding_idx
    int64_t num_rows
    int64_t ahead               # rows that are prefetched ahead, of positions before `last`
    int64_t last


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


cdef inline int64_t index_at(const Block *block, int64_t position, int index_size) noexcept nogil:
    """`read_index` from a copy of the address."""
    if index_size == 8:
        return (<const volatile int64_t *> block.indices)[position]
    if index_size == 4:
        return (<const volatile int32_t *> block.indices)[position]
    return position


cdef inline float read_weight(const Lookup *job, Py_ssize_t position) noexcept nogil:
    if job.weight_size == 4:
        return (<const float *> job.weights)[position]
    return float_of_half((<const uint16_t *> job.weights)[position])


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
            window.weight[place] = read_weight(job, position)
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


# ---- A block of a row ---------------------------------------------------------------------------------------------

cdef inline Py_ssize_t group_bytes(const int bits) noexcept nogil:
    """The codes of sixteen elements."""
    return 2 * bits


cdef inline int count_quads(const int bits, const int width, const bint quads) noexcept nogil:
    """How many quads a block starts with. Of 8-bit codes, half of a block of more than one: else loads would be the
    bottleneck."""
    if not quads:
        return 0
    return max(width // 8, 1) if bits == 8 else width // 4


cdef inline int last_unit(const int bits, const int width, const bint quads) noexcept nogil:
    """Groups of a block's last unpacking."""
    return 4 if 4 * count_quads(bits, width, quads) == width else 1


cdef Block block_of(const Lookup *job, const Pass *task, int bits, int width, bint quads) noexcept nogil:
    """The row's last group (or quad) is moved back to end where the codes end, so that it needs no partial load; the
    elements that it shares with the one before come out the same twice."""
    cdef const Layout *layout = &job.layout
    cdef Py_ssize_t unit = last_unit(bits, width, quads)
    cdef Py_ssize_t codes_end = layout.codes_start + layout.codes_bytes
    cdef Block block
    block.codes_start = layout.codes_start
    block.first_byte = layout.codes_start + task.first_group * group_bytes(bits)
    block.last_byte = min(block.first_byte + (width - unit) * group_bytes(bits), codes_end - unit * group_bytes(bits))
    block.last_byte = max(block.last_byte, layout.codes_start)
    block.pair_byte = layout.pairs_start
    block.indices = job.indices
    block.padding_idx = job.padding_idx
    block.num_rows = job.num_rows
    block.ahead = task.distance
    block.last = task.limit - task.distance
    block.end_byte = layout.row_bytes - 1
    block.is_short = layout.row_bytes < group_bytes(bits)      # only where there is one group
    block.is_whole = (job.out_size == 4
                      and (block.last_byte - layout.codes_start) * (8 // bits) + unit * 16 <= layout.dim)
    return block


cdef inline Py_ssize_t byte_of_group(const Block *block, int k, const int bits, const int width,
                                     const bint quads) noexcept nogil:
    """Where a group of the block, or the quad that it starts, is found in a row."""
    if k == width - last_unit(bits, width, quads):
        return block.last_byte
    return block.first_byte + k * group_bytes(bits)


cdef inline Py_ssize_t element_of_group(const Block *block, int k, const int bits, const int width,
                                        const bint quads) noexcept nogil:
    """The first element of a group in order."""
    cdef int in_quad = k % 4 if k < 4 * count_quads(bits, width, quads) else 0
    cdef Py_ssize_t byte = byte_of_group(block, k - in_quad, bits, width, quads)
    return (byte - block.codes_start) * (8 // bits) + 16 * in_quad


cdef inline lanes unpack(const uint8_t *p, bint is_short, const int bits) noexcept nogil:
    """A group's codes as floats."""
    if bits == 8:
        return unpack_8bit_short(p) if is_short else unpack_8bit(p)
    if bits == 4:
        return unpack_4bit_short(p) if is_short else unpack_4bit(p)
    return unpack_2bit(p)


cdef inline void unpack_quad(const uint8_t *p, lanes *x, const int bits, const int width) noexcept nogil:
    if bits == 8 and width == 4:
        unpack_quad_8bit(p, x)
    elif bits == 8:
        unpack_quad_8bit_by_loads(p, x)
    else:
        unpack_quad_2bit(p, x)


cdef inline void read_pair(const uint8_t *row, const Block *block, lanes *scale, lanes *bias,
                           const int bits) noexcept nogil:
    if bits == 8:
        read_pair_float(row + block.pair_byte, scale, bias)
    else:
        read_pair_half(row + block.pair_byte, scale, bias)


cdef inline void accumulate(lanes *acc, int k, lanes scale, lanes x, lanes bias, const int bits, const int width,
                            const bint quads) noexcept nogil:
    """acc[k] = fma(scale, x, acc[k] + bias)"""
    if bits == 8 and quads and k % 2 == 0:
        acc[k] = lanes_fma(scale, x, lanes_add_by_fma(acc[k], bias))
    else:
        lanes_accumulate(&acc[k], scale, x, bias)


cdef inline void add_row(lanes *acc, const uint8_t *row, const Block *block, lanes scale, lanes bias, const int bits,
                         const int width, const bint quads) noexcept nogil:
    cdef int num_quads = count_quads(bits, width, quads)
    cdef lanes four[4]
    cdef int k, j
    for k in range(0, 4 * num_quads, 4):
        unpack_quad(row + byte_of_group(block, k, bits, width, quads), four, bits, width)
        for j in range(4):
            accumulate(acc, k + j, scale, four[j], bias, bits, width, quads)
    # One by one, so that no more registers are needed than there are at AVX2.
    for k in range(4 * num_quads, width):
        accumulate(acc, k, scale,
                   unpack(row + byte_of_group(block, k, bits, width, quads), width == 1 and block.is_short, bits),
                   bias, bits, width, quads)


cdef inline void max_row(lanes *acc, const uint8_t *row, const Block *block, lanes scale, lanes bias, bint is_first,
                         const int bits, const int width) noexcept nogil:
    """The first row's values are taken as they are: a NaN stays, and so does the sign of a zero."""
    cdef lanes x
    cdef int k
    for k in range(width):
        x = unpack(row + byte_of_group(block, k, bits, width, False), width == 1 and block.is_short, bits)
        x = lanes_fma(scale, x, bias)
        acc[k] = x if is_first else lanes_max(x, acc[k])


cdef inline void prefetch_row(const uint8_t *row, const Block *block, const int bits, const int width,
                              const bint quads) noexcept nogil:
    """Each cache line of a block's codes, and of the row's end. How many is fixed at compile time: a count that depends
    on the row's address is mispredicted, and halves the speed in cache."""
    # Tables read as quads of 8 bits are near (`choose_loops`): into the first level of the cache. To ask that at each
    # row costs a tenth.
    cdef bint is_near = bits == 8 and quads
    cdef Py_ssize_t byte
    for byte in range(0, width * group_bytes(bits), 64):
        prefetch(row + block.first_byte + byte, is_near)
    prefetch(row + block.end_byte, is_near)


# ---- A bag's end -------------------------------------------------------------------------------------------------

cdef inline void set_zero(lanes *acc, const int width) noexcept nogil:
    cdef int k
    for k in range(width):
        acc[k] = lanes_zero()


cdef inline void store_block(lanes *acc, const Lookup *job, uint8_t *out, const Block *block, const int bits,
                             const int width, const bint quads) noexcept nogil:
    """A bag's output, in order."""
    cdef float whole[16 * 16]
    cdef Py_ssize_t element
    cdef int k
    for k in range(0, 4 * count_quads(bits, width, quads), 4):
        lanes_in_order_quad(&acc[k])
    if bits == 4:
        for k in range(width):
            acc[k] = lanes_in_order_4bit(acc[k])
    if not unlikely(not block.is_whole):
        for k in range(width):
            lanes_store(<float *> out + element_of_group(block, k, bits, width, quads), acc[k])
    else:
        # By way of memory: values that lived across a call would have no registers in the row loop either.
        for k in range(width):
            lanes_store(whole + 16 * k, acc[k])
        for k in range(width):
            element = element_of_group(block, k, bits, width, quads)
            store_part(out + element * job.out_size, whole + 16 * k, job.layout.dim - element, job.out_size)


cdef inline void finish_bag(lanes *acc, const Lookup *job, uint8_t *out, const Block *block, Py_ssize_t count,
                            const int bits, const int width, const bint quads) noexcept nogil:
    cdef lanes share
    cdef int k
    if unlikely(job.mode == MEAN) and count > 0:
        share = lanes_broadcast(<float> 1.0 / <float> count)
        for k in range(width):
            acc[k] = lanes_mul(acc[k], share)
    store_block(acc, job, out, block, bits, width, quads)


# ---- Bags, row by row ---------------------------------------------------------------------------------------------
#
# Where no row is pruned, indices are read in the loop that sums: 1.2 to 1.4 times as fast as by way of a window.

cdef inline void prefetch_ahead(const uint8_t[:, :] rows, const Block *block, int64_t position, const int bits,
                                const int width, const bint quads, const int index_size) noexcept nogil:
    """The row so far ahead of a position."""
    cdef int64_t number = index_at(block, position + block.ahead, index_size)
    if not unlikely(<uint64_t> number >= <uint64_t> block.num_rows):
        prefetch_row(&rows[number, 0], block, bits, width, quads)


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
                           const int bits, const int width, const bint quads, const int index_size,
                           const bint is_plain) noexcept nogil:
    if not unlikely(position >= block.last):
        prefetch_ahead(rows, block, position, bits, width, quads, index_size)
    return find_row(rows, block, position, row, index_size, is_plain)


cdef inline bint fetch_two_rows(const uint8_t[:, :] rows, const Block *block, int64_t first, int64_t second,
                                const uint8_t **row, const uint8_t **another, const int bits, const int width,
                                const bint quads, const int index_size, const bint is_plain) noexcept nogil:
    """The same for two bags, of which the second follows the first."""
    if not unlikely(second >= block.last):
        prefetch_ahead(rows, block, first, bits, width, quads, index_size)
        prefetch_ahead(rows, block, second, bits, width, quads, index_size)
    return (find_row(rows, block, first, row, index_size, is_plain)
            and find_row(rows, block, second, another, index_size, is_plain))


cdef inline void take_row(lanes *acc, const Lookup *job, const uint8_t *row, const Block *block, int64_t position,
                          bint is_first, const int bits, const int width, const bint quads, const bint is_max,
                          const bint is_plain) noexcept nogil:
    cdef lanes scale, bias, weight
    read_pair(row, block, &scale, &bias, bits)
    if is_max:
        max_row(acc, row, block, scale, bias, is_first, bits, width)
        return
    if not is_plain and job.weight_size != 0:
        weight = lanes_broadcast(read_weight(job, position))
        scale = lanes_mul(scale, weight)
        bias = lanes_mul(bias, weight)
    add_row(acc, row, block, scale, bias, bits, width, quads)


cdef inline void warm_up(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const Block *block,
                         int64_t start, const int bits, const int width, const bint quads,
                         const int index_size) noexcept nogil:
    """Prefetches the first rows, which no earlier bag has."""
    cdef int64_t position, number
    for position in range(start, min(task.limit, start + task.distance)):
        number = read_index(job, position, index_size)
        if <uint64_t> number < <uint64_t> block.num_rows:
            prefetch_row(&rows[number, 0], block, bits, width, quads)


cdef inline int64_t skip_padding(const Lookup *job, int64_t position, int64_t stop,
                                 const int index_size) noexcept nogil:
    """The first position from here on that is no padding."""
    while job.padding_idx >= 0 and position < stop and read_index(job, position, index_size) == job.padding_idx:
        position += 1
    return position


cdef inline bint add_rows(lanes *acc, const Lookup *job, const uint8_t[:, :] rows, const Block *block, int64_t start,
                          int64_t stop, int64_t *count, bint *is_first, const int bits, const int width,
                          const bint quads, const bint is_max, const int index_size,
                          const bint is_plain) noexcept nogil:
    """Rows of one bag; padding is taken off its count. False where an index is out of range."""
    cdef int64_t position = start, after
    cdef const uint8_t *row = NULL
    cdef bint is_there
    while True:
        # Nothing leaves the loop between its start and the sum: accumulators that an iteration may leave alone would
        # live in memory.
        is_there = position < stop and fetch_row(rows, block, position, &row, bits, width, quads, index_size, is_plain)
        while is_there:
            take_row(acc, job, row, block, position, is_first[0], bits, width, quads, is_max, is_plain)
            is_first[0] = False
            position += 1
            is_there = position < stop and fetch_row(rows, block, position, &row, bits, width, quads, index_size, is_plain)
        if not unlikely(position < stop):
            return True
        after = stop if is_plain else skip_padding(job, position, stop, index_size)
        if is_plain or after == position:
            return False
        count[0] -= after - position
        position = after


cdef inline int64_t add_in_turn(lanes *acc, lanes *other, const Lookup *job, const uint8_t[:, :] rows,
                                const Block *block, int64_t start, int64_t middle, int64_t both, const int bits,
                                const int width, const bint quads, const int index_size,
                                const bint is_plain) noexcept nogil:
    """Rows of two bags in turn: an addition and an fma of one bag wait for each other, and those of two do not. How many
    of `both` were added to each, up to padding or an index out of range in one of them."""
    cdef const uint8_t *row = NULL
    cdef const uint8_t *another = NULL
    cdef int64_t k = 0
    cdef bint are_there = both > 0 and fetch_two_rows(rows, block, start, middle, &row, &another, bits, width, quads,
                                                      index_size, is_plain)
    while are_there:
        take_row(acc, job, row, block, start + k, False, bits, width, quads, False, is_plain)
        take_row(other, job, another, block, middle + k, False, bits, width, quads, False, is_plain)
        k += 1
        are_there = k < both and fetch_two_rows(rows, block, start + k, middle + k, &row, &another, bits, width, quads,
                                                index_size, is_plain)
    return k


cdef inline bint look_up_pairs(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const Block *block,
                               int64_t *position, const int bits, const int width, const bint quads,
                               const int index_size, const bint is_plain) noexcept nogil:
    """Two bags at a time. Where the last of them ends is left in `position`."""
    cdef uint8_t *out = job.out + task.first_bag * job.out_stride
    cdef int64_t start = position[0], middle, stop, count, other_count, added
    cdef Py_ssize_t bag
    cdef lanes acc[4]
    cdef lanes other[4]
    cdef bint is_first = False
    for bag in range(task.first_bag, task.end_bag - 1, 2):
        middle = read_offset(job, bag + 1)
        stop = read_offset(job, bag + 2)
        if unlikely(not start <= middle <= stop <= job.num_indices):
            return False
        set_zero(acc, width)
        set_zero(other, width)
        count = middle - start
        other_count = stop - middle
        added = add_in_turn(acc, other, job, rows, block, start, middle, min(count, other_count), bits, width, quads,
                            index_size, is_plain)
        if not add_rows(acc, job, rows, block, start + added, middle, &count, &is_first, bits, width, quads, False,
                        index_size, is_plain):
            return False
        if not add_rows(other, job, rows, block, middle + added, stop, &other_count, &is_first, bits, width, quads, False,
                        index_size, is_plain):
            return False
        finish_bag(acc, job, out, block, count, bits, width, quads)
        finish_bag(other, job, out + job.out_stride, block, other_count, bits, width, quads)
        start = stop
        out += 2 * job.out_stride
    position[0] = start
    return True


cdef inline bint look_up(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int bits, const int width,
                         const bint quads, const bint is_max, const int index_size,
                         const bint is_plain) noexcept nogil:
    """Sums (or maxima) of whole bags, over the columns of one block. False where an index or an offset is out of range."""
    cdef Block block = block_of(job, task, bits, width, quads)
    cdef uint8_t *out = job.out + task.first_bag * job.out_stride
    cdef Py_ssize_t bag = task.first_bag
    cdef int64_t start = read_offset(job, bag), middle, stop, count
    cdef lanes acc[16]
    cdef bint is_first
    if unlikely(not 0 <= start <= job.num_indices):
        return False
    if task.is_first:
        warm_up(job, rows, task, &block, start, bits, width, quads, index_size)
    if width <= LANES_PAIRED and not is_max and task.in_pairs:
        if not look_up_pairs(job, rows, task, &block, &start, bits, width, quads, index_size, is_plain):
            return False
        bag += (task.end_bag - bag) // 2 * 2
        out = job.out + bag * job.out_stride
    while bag < task.end_bag:
        stop = read_offset(job, bag + 1)
        if unlikely(not start <= stop <= job.num_indices):
            return False
        set_zero(acc, width)
        count = stop - start
        is_first = True
        if is_plain:
            if not add_rows(acc, job, rows, &block, start, stop, &count, &is_first, bits, width, quads, False, index_size,
                            True):
                return False
            start = stop
        while start < stop:
            # A giant bag is interrupted for signals.
            middle = min(stop, start + POSITIONS_A_LOOK)
            if not add_rows(acc, job, rows, &block, start, middle, &count, &is_first, bits, width, quads, is_max, index_size,
                            False):
                return False
            start = middle
            if unlikely(start < stop) and not may_go_on(job):
                return False
        finish_bag(acc, job, out, &block, count, bits, width, quads)
        out += job.out_stride
        bag += 1
    return True


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
    """The same where rows are left out."""
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


# ---- Blocks of every width ----------------------------------------------------------------------------------------

# What a loop is compiled for beside bits, quads and maximum or sum: where its rows come from. Not each combination is
# worth its code: rows are also gathered for maxima by int32, and wherever there is no fma instruction.
cdef enum Kind:
    GATHERED = 0            # by way of windows
    INT32 = 1               # read in the loop, with nothing else to look for
    INT64 = 2
    INT32_WITH = 3          # with weights or padding or both
    INT64_WITH = 4
    NUM_KINDS = 5


cdef inline int max_width(const int bits, const bint quads, const bint is_max, const Kind kind) noexcept nogil:
    """Groups of the widest block. Of 2-bit codes eight: as quads 5 to 10 % faster than 16 one by one; at AVX2, which has
    no quads, 8 to 10 % faster than 6. For maxima and gathered rows eight at most: wider blocks take the longest to
    compile."""
    if bits == 2 and (quads or LANES_MAX_BLOCK < 8):
        return 8
    return min(LANES_MAX_BLOCK, 8) if is_max or kind == GATHERED else LANES_MAX_BLOCK


cdef inline bint look_up_kind(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int bits,
                              const int width, const bint quads, const bint is_max, const Kind kind) noexcept nogil:
    if kind == GATHERED:
        return look_up_gathered(job, rows, task, bits, width, quads, is_max)
    if not LANES_HAS_FMA:
        return False            # `plan_of` gathers
    return look_up(job, rows, task, bits, width, quads, is_max, 4 if kind == INT32 or kind == INT32_WITH else 8,
                   kind <= INT64)


cdef inline bint look_up_width(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int bits,
                               const bint quads, const bint is_max, const Kind kind) noexcept nogil:
    """One loop for each width, which must be a constant there; a switch in C. Those that this level never uses are not
    compiled."""
    cdef int most = max_width(bits, quads, is_max, kind), least = 4 if quads else 1
    if task.width == 1 and least <= 1:
        return look_up_kind(job, rows, task, bits, 1, quads, is_max, kind)
    if task.width == 2 and least <= 2:
        return look_up_kind(job, rows, task, bits, 2, quads, is_max, kind)
    if task.width == 3 and least <= 3:
        return look_up_kind(job, rows, task, bits, 3, quads, is_max, kind)
    if task.width == 4:
        return look_up_kind(job, rows, task, bits, 4, quads, is_max, kind)
    if task.width == 5 and most >= 5:
        return look_up_kind(job, rows, task, bits, 5, quads, is_max, kind)
    if task.width == 6 and most >= 6:
        return look_up_kind(job, rows, task, bits, 6, quads, is_max, kind)
    if task.width == 7 and most >= 7:
        return look_up_kind(job, rows, task, bits, 7, quads, is_max, kind)
    if task.width == 8 and most >= 8:
        return look_up_kind(job, rows, task, bits, 8, quads, is_max, kind)
    if task.width == 12 and most >= 12:
        return look_up_kind(job, rows, task, bits, 12, quads, is_max, kind)
    if task.width == 16 and most >= 16:
        return look_up_kind(job, rows, task, bits, 16, quads, is_max, kind)
    return False


ctypedef bint (*BlockLoop)(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil


cdef bint sum_8bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, False, GATHERED)


cdef bint sum_4bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, False, GATHERED)


cdef bint sum_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 2, False, False, GATHERED)


cdef bint sum_quads_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 2, True, False, GATHERED)


cdef bint sum_8bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, False, INT32)


cdef bint sum_4bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, False, INT32)


cdef bint sum_2bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 2, False, False, INT32)


cdef bint sum_quads_8bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 8, True, False, INT32)


cdef bint sum_quads_2bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 2, True, False, INT32)


cdef bint sum_8bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, False, INT64)


cdef bint sum_4bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, False, INT64)


cdef bint sum_2bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 2, False, False, INT64)


cdef bint sum_quads_8bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 8, True, False, INT64)


cdef bint sum_quads_2bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 2, True, False, INT64)


cdef bint sum_8bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, False, INT32_WITH)


cdef bint sum_4bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, False, INT32_WITH)


cdef bint sum_2bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 2, False, False, INT32_WITH)


cdef bint sum_quads_8bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 8, True, False, INT32_WITH)


cdef bint sum_quads_2bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 2, True, False, INT32_WITH)


cdef bint sum_8bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, False, INT64_WITH)


cdef bint sum_4bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, False, INT64_WITH)


cdef bint sum_2bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 2, False, False, INT64_WITH)


cdef bint sum_quads_8bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 8, True, False, INT64_WITH)


cdef bint sum_quads_2bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, 2, True, False, INT64_WITH)


cdef bint max_8bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, True, GATHERED)


cdef bint max_4bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, True, GATHERED)


cdef bint max_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 2, False, True, GATHERED)


cdef bint max_8bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, True, INT64_WITH)


cdef bint max_4bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, True, INT64_WITH)


cdef bint max_2bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 2, False, True, INT64_WITH)


# By kind, and by the bits of a code over 4: 2, 4, 8 are 0, 1, 2. There are no quads of 4 bits, and no weighted maxima.
cdef BlockLoop[NUM_KINDS][3] SUMS = [
    [sum_2bit_gathered, sum_4bit_gathered, sum_8bit_gathered],
    [sum_2bit_int32, sum_4bit_int32, sum_8bit_int32],
    [sum_2bit_int64, sum_4bit_int64, sum_8bit_int64],
    [sum_2bit_int32_with, sum_4bit_int32_with, sum_8bit_int32_with],
    [sum_2bit_int64_with, sum_4bit_int64_with, sum_8bit_int64_with],
]
cdef BlockLoop[NUM_KINDS][3] SUMS_OF_QUADS = [
    [sum_quads_2bit_gathered, sum_4bit_gathered, sum_8bit_gathered],
    [sum_quads_2bit_int32, sum_4bit_int32, sum_quads_8bit_int32],
    [sum_quads_2bit_int64, sum_4bit_int64, sum_quads_8bit_int64],
    [sum_quads_2bit_int32_with, sum_4bit_int32_with, sum_quads_8bit_int32_with],
    [sum_quads_2bit_int64_with, sum_4bit_int64_with, sum_quads_8bit_int64_with],
]
cdef BlockLoop[NUM_KINDS][3] MAXIMA = [
    [max_2bit_gathered, max_4bit_gathered, max_8bit_gathered],
    [max_2bit_gathered, max_4bit_gathered, max_8bit_gathered],
    [max_2bit_int64_with, max_4bit_int64_with, max_8bit_int64_with],
    [max_2bit_gathered, max_4bit_gathered, max_8bit_gathered],
    [max_2bit_int64_with, max_4bit_int64_with, max_8bit_int64_with],
]


# ---- Whole rows ---------------------------------------------------------------------------------------------------

cdef enum:
    PLANNED_PASSES = 16

# How a call is carried out, the same for all its bags.
cdef struct Plan:
    BlockLoop sum
    BlockLoop sum_of_quads
    bint use_quads              # for blocks of four groups and more
    bint in_pairs
    bint gathers                # by way of windows
    int max_width
    Py_ssize_t distance         # rows that are prefetched ahead
    # The passes that a row takes: worked out once for all bags, which saves 1 to 2 % of rows of 300.
    Py_ssize_t num_groups
    Py_ssize_t num_passes
    Py_ssize_t first_group[PLANNED_PASSES]
    int width[PLANNED_PASSES]

# With fewer rows a bag, its output counted as one, putting a quad in order costs more than it saves.
cdef int QUADS_MIN_LENGTH = 8
# A table that the third-level cache may hold. What depends on it was measured on a Zen 5 at 0.1 to 40 MB: it pays up to
# about 10, and costs as much beyond 14.
cdef int64_t NEAR_BYTES = 8 << 20


cdef Plan plan_of(const Lookup *job, bint is_one_bag) noexcept nogil:
    cdef double rows = work_of(job, 0, job.num_bags) / (job.layout.dim + 64)
    cdef bint is_near = <double> job.num_rows * job.layout.row_bytes <= NEAR_BYTES
    cdef int bits = job.layout.bits
    # One bag of a call that looks for signals may be a giant one: the loops for plain bags do not look.
    cdef bint is_plain = job.weight_size == 0 and job.padding_idx < 0 and not (job.signals != NULL and is_one_bag)
    cdef int kind = job.index_size // 4 + (0 if is_plain else 2)
    cdef Plan plan
    if job.mapping != NULL or not LANES_HAS_FMA or (job.mode == MAX and job.index_size == 4):
        kind = GATHERED
    # Quads of 8-bit codes are loads of 64 bytes, each across two cache lines: faster where prefetching brings the lines
    # into the first level in time, and slower where it does not.
    plan.use_quads = (LANES_QUADS and job.mode != MAX and rows >= QUADS_MIN_LENGTH * <double> job.num_bags
                      and job.layout.codes_bytes >= 8 * bits and (bits == 2 or (bits == 8 and is_near)))
    # Narrow rows are added to two bags in turn. In cache 1.1 to 1.4 times as fast; from memory, where rows are waited
    # for, 0.85.
    plan.in_pairs = is_near
    plan.gathers = kind == GATHERED
    plan.sum = MAXIMA[kind][bits // 4] if job.mode == MAX else SUMS[kind][bits // 4]
    plan.sum_of_quads = SUMS_OF_QUADS[kind][bits // 4]
    plan.max_width = max_width(bits, plan.use_quads, job.mode == MAX, <Kind> kind)
    # About 8 KiB of what one pass reads of each row, its codes and the line of its pair.
    plan.distance = max(min(8192 // min(job.layout.row_bytes, LANES_MAX_BLOCK * 2 * bits + 64), 64), 8)
    plan_passes(job, &plan)
    return plan


cdef inline int block_width(Py_ssize_t num_groups) noexcept nogil:
    """The narrowest block that holds so many groups."""
    return num_groups if num_groups <= 8 else 12 if num_groups <= 12 else 16


cdef void set_pass(const Plan *plan, Pass *task, Py_ssize_t number) noexcept nogil:
    """An equal share of the groups that are left. Where no block is as wide, the next wider one starts further back."""
    cdef Py_ssize_t first = 0 if number == 0 else task.first_group + task.width
    cdef Py_ssize_t left = plan.num_passes - number
    task.width = block_width((plan.num_groups - first + left - 1) // left)
    task.first_group = min(first, plan.num_groups - task.width)


cdef void plan_passes(const Lookup *job, Plan *plan) noexcept nogil:
    cdef Py_ssize_t bytes_of_group = group_bytes(job.layout.bits), number
    cdef Pass task
    plan.num_groups = (job.layout.codes_bytes + bytes_of_group - 1) // bytes_of_group
    plan.num_passes = (plan.num_groups + plan.max_width - 1) // plan.max_width
    if plan.num_passes == 1 and block_width(plan.num_groups) > plan.num_groups:
        plan.num_passes = 2
    for number in range(min(plan.num_passes, <Py_ssize_t> PLANNED_PASSES)):
        set_pass(plan, &task, number)
        plan.first_group[number] = task.first_group
        plan.width[number] = task.width


cdef bint look_up_wide_bag(const Lookup *job, const uint8_t[:, :] rows, const Plan *plan, Pass *task) noexcept nogil:
    cdef Py_ssize_t number
    for number in range(plan.num_passes):
        if number < PLANNED_PASSES:
            task.first_group = plan.first_group[number]
            task.width = plan.width[number]
        else:
            set_pass(plan, task, number)
        if not (plan.sum_of_quads if plan.use_quads and task.width >= 4 else plan.sum)(job, rows, task):
            return False
    return True


cdef bint look_up_bags(const Lookup *job, const uint8_t[:, :] rows, const Plan *plan, Py_ssize_t first_bag,
                       Py_ssize_t end_bag) noexcept nogil:
    """All columns: in one pass over the bags where the accumulators fit into registers, else bag by bag in several, so
    that a bag's rows are still in cache for its next pass."""
    cdef Py_ssize_t bag
    cdef Pass task
    task.limit = read_offset(job, end_bag)
    # The end bounds what is prefetched, so it is checked before anything is. An offset is wrong also where no bag starts
    # at it: the end of no bags.
    if not 0 <= task.limit <= job.num_indices or not 0 <= read_offset(job, first_bag) <= job.num_indices:
        return False
    task.in_pairs = plan.in_pairs
    task.distance = plan.distance
    task.is_first = True
    task.first_bag = first_bag
    task.end_bag = end_bag
    if plan.num_passes == 1:
        return look_up_wide_bag(job, rows, plan, &task)
    for bag in range(first_bag, end_bag):
        task.first_bag = bag
        task.end_bag = bag + 1
        if plan.gathers:
            # Each pass gathers anew: no further than it sums.
            task.limit = read_offset(job, bag + 1)
            if not 0 <= task.limit <= job.num_indices:
                return False
        if not look_up_wide_bag(job, rows, plan, &task):
            return False
        task.is_first = False
    return True


# ---- Sharing out --------------------------------------------------------------------------------------------------

# Several chunks a thread: whoever gets a long bag leaves the rest to the others.
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
    cdef int failures = 0
    for chunk in prange(num_chunks, schedule="dynamic", chunksize=1, num_threads=num_threads):
        failures += not look_up_bags(job, rows, plan, bounds[chunk], bounds[chunk + 1])
    num_failed[0] = failures


cdef bint look_up_shared(const Lookup *job, const uint8_t[:, :] rows, Py_ssize_t first_bag, Py_ssize_t end_bag,
                         int num_threads) noexcept nogil:
    """Bags, shared out among threads where that pays."""
    cdef Py_ssize_t bounds[MAX_CHUNKS + 1]
    cdef Py_ssize_t num_chunks
    cdef Plan plan = plan_of(job, end_bag - first_bag == 1)
    cdef int failures = 0
    cdef double work = work_of(job, first_bag, end_bag)
    cdef bint is_forked = parallel_is_forked()
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
            # Of the pool that this thread had before the fork, no thread lives. A region within a region does not use it.
            with parallel(num_threads=1):
                look_up_chunks(job, rows, &plan, bounds, num_chunks, num_threads, &failures)
        else:
            look_up_chunks(job, rows, &plan, bounds, num_chunks, num_threads, &failures)
    parallel_leave()
    return failures == 0
