# ---- Bags of rows ---------------------------------------------------------------------------------------------

cdef enum:
    # Rows that a bag of any kind gathers before it adds them.
    GATHERED = 32
    # Positions between two looks for signals: some milliseconds, whatever the dim.
    ROWS_A_LOOK = 1 << 16

cdef struct Gathered:
    Py_ssize_t num_rows
    Py_ssize_t num_absent               # padding
    const uint8_t *row[GATHERED + 1]    # one more: each is written before it is known to count
    float weight[GATHERED + 1]

# One pass over bags: its part, and copies of what the row loop reads. They stay in registers, where fields of `Lookup`
# would be read again after each store.
cdef struct Part:
    Py_ssize_t first_byte
    Py_ssize_t last_byte        # where the last group (or quad) starts
    Py_ssize_t num_bytes
    bint is_short               # the whole row is smaller than what a group loads
    bint is_whole               # the output is float32, and no group ends beyond it
    const uint8_t *rows
    uint64_t num_rows
    Py_ssize_t row_stride
    Py_ssize_t codes_bytes
    Py_ssize_t tail_byte        # the row's last
    Py_ssize_t prefetch_distance
    int64_t last_prefetched     # position, the end of those that have a row to prefetch ahead of them


cdef inline Py_ssize_t count_quads(const codes *unused, block *unused_too) noexcept nogil:
    """How many quads the block starts with. Of 8-bit codes, half of a block of more than one: else loads would be the
    bottleneck."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    if block in quads:
        if codes is codes_8bit:
            return max(num_groups // 8, 1)
        return num_groups // 4
    return 0


cdef inline Py_ssize_t bytes_of_group(const codes *unused) noexcept nogil:
    if codes is codes_8bit:
        return 16
    elif codes is codes_4bit:
        return 8
    else:
        return 4


cdef inline lanes unpack(const codes *unused, const uint8_t *p, bint is_short) noexcept nogil:
    """A group's codes as floats."""
    if codes is codes_8bit:
        return unpack_8bit_short(p) if is_short else unpack_8bit(p)
    elif codes is codes_4bit:
        return unpack_4bit_short(p) if is_short else unpack_4bit(p)
    else:
        return unpack_2bit(p)


cdef inline void unpack_quad(const codes *unused, const uint8_t *p, lanes *x, bint is_alone) noexcept nogil:
    if codes is codes_8bit:
        if is_alone:
            unpack_quad_8bit(p, x)
        else:
            unpack_quad_8bit_by_loads(p, x)
    else:
        unpack_quad_2bit(p, x)


cdef inline Py_ssize_t byte_of_group(const codes *unused, block *unused_too, const Part *part,
                                     Py_ssize_t k) noexcept nogil:
    """Where a group of the block, or the quad that it starts, is found in a row."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t last_start = num_groups - (4 if 4 * count_quads[codes, block](NULL, NULL) == num_groups else 1)
    return part.last_byte if k == last_start else part.first_byte + k * bytes_of_group[codes](NULL)


cdef inline void add_row(const codes *unused, block *acc, const uint8_t *row, const Part *part, lanes scale,
                         lanes bias) noexcept nogil:
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t num_quads = count_quads[codes, block](NULL, NULL)
    cdef lanes four[4]
    cdef lanes x
    cdef Py_ssize_t k, j
    for k in range(0, 4 * num_quads, 4):
        unpack_quad[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, part, k), four, num_groups == 4)
        for j in range(4):
            if codes is codes_8bit and j % 2 == 0:
                acc.group[k + j] = lanes_fma(scale, four[j], lanes_add_by_fma(acc.group[k + j], bias))
            else:
                lanes_accumulate(&acc.group[k + j], scale, four[j], bias)
    # One by one, so that no more registers are needed than there are at AVX2.
    for k in range(4 * num_quads, num_groups):
        x = unpack[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, part, k),
                          num_groups == 1 and part.is_short)
        if codes is codes_8bit and block in quads and k % 2 == 0:
            acc.group[k] = lanes_fma(scale, x, lanes_add_by_fma(acc.group[k], bias))
        else:
            lanes_accumulate(&acc.group[k], scale, x, bias)


cdef inline void max_row(const codes *unused, block *acc, const uint8_t *row, const Part *part, lanes scale,
                         lanes bias, bint is_first) noexcept nogil:
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t num_quads = count_quads[codes, block](NULL, NULL)
    cdef lanes four[4]
    cdef lanes x
    cdef Py_ssize_t k, j
    for k in range(0, 4 * num_quads, 4):
        unpack_quad[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, part, k), four, num_groups == 4)
        for j in range(4):
            x = lanes_fma(scale, four[j], bias)
            acc.group[k + j] = x if is_first else lanes_max(x, acc.group[k + j])
    for k in range(4 * num_quads, num_groups):
        x = unpack[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, part, k),
                          num_groups == 1 and part.is_short)
        x = lanes_fma(scale, x, bias)
        acc.group[k] = x if is_first else lanes_max(x, acc.group[k])


cdef inline void read_tail(const codes *unused, const uint8_t *p, lanes *scale, lanes *bias) noexcept nogil:
    if codes is codes_8bit:
        read_tail_float(p, scale, bias)
    else:
        read_tail_half(p, scale, bias)


cdef inline Py_ssize_t element_of_group(const codes *unused, block *unused_too, const Part *part,
                                        Py_ssize_t k) noexcept nogil:
    """The first element of a group in order."""
    cdef Py_ssize_t group_bytes = bytes_of_group[codes](NULL)
    if k < 4 * count_quads[codes, block](NULL, NULL):
        return byte_of_group[codes, block](NULL, NULL, part, k // 4 * 4) * (16 // group_bytes) + k % 4 * 16
    return byte_of_group[codes, block](NULL, NULL, part, k) * (16 // group_bytes)


cdef inline void store_block(const codes *unused, block *acc, const Lookup *job, uint8_t *out,
                             const Part *part) noexcept nogil:
    """A bag's output, in order."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef float whole[16 * 16]
    cdef Py_ssize_t k, element
    for k in range(0, 4 * count_quads[codes, block](NULL, NULL), 4):
        lanes_in_order_quad(&acc.group[k])
    if codes is codes_4bit:
        for k in range(num_groups):
            acc.group[k] = lanes_in_order_4bit(acc.group[k])
    if part.is_whole:
        for k in range(num_groups):
            lanes_store(<float *> out + element_of_group[codes, block](NULL, NULL, part, k), acc.group[k])
    else:
        # By way of memory: values that lived across a call would have no registers in the row loop either.
        for k in range(num_groups):
            lanes_store(whole + 16 * k, acc.group[k])
        for k in range(num_groups):
            element = element_of_group[codes, block](NULL, NULL, part, k)
            store_part(out + element * job.out_size, whole + 16 * k, job.dim - element, job.out_size)


cdef inline void prefetch_row(const uint8_t *row, Py_ssize_t first_byte, Py_ssize_t num_bytes, Py_ssize_t tail_byte,
                              bint is_near) noexcept nogil:
    """Each cache line of a block's codes, and the tail's. How many is fixed at compile time where `num_bytes` is: a
    count that depends on the row's address is mispredicted, and halves the speed in cache."""
    cdef Py_ssize_t byte
    for byte in range(0, num_bytes, 64):
        prefetch(row + first_byte + byte, is_near)
    prefetch(row + tail_byte, is_near)


cdef inline int64_t plain_index(const Lookup *job, kind *unused, Py_ssize_t position) noexcept nogil:
    if kind is plain_int32 or kind is weighted_int32:
        return (<const volatile int32_t *> job.indices)[position]
    elif kind is plain_int64 or kind is weighted_int64:
        return (<const volatile int64_t *> job.indices)[position]
    else:
        return read_index(job, position)


cdef inline void prefetch_position(const Lookup *job, Py_ssize_t position, int64_t end, Py_ssize_t first_byte,
                                   Py_ssize_t num_bytes) noexcept nogil:
    """What `gather` will need: the row's lines, and before them the entry of the mapping that leads there, since a
    large mapping is no more in cache than its table. A pruned row is prefetched as row 0: where rows are pruned at
    random, a branch is mispredicted as often as not, and costs as much as a row."""
    cdef int64_t index, row
    if job.mapping != NULL and position + job.prefetch_distance < end:
        index = read_index(job, position + job.prefetch_distance)
        if 0 <= index < job.num_embeddings:
            prefetch(<const uint8_t *> &job.mapping[index], False)
    row = index = read_index(job, position)
    if job.mapping != NULL:
        row = job.mapping[index] if 0 <= index < job.num_embeddings else 0
    row &= -<int64_t> (<uint64_t> row < <uint64_t> job.num_rows)
    prefetch_row(job.rows + row * job.row_stride, first_byte, num_bytes, job.row_bytes - 1, False)


cdef bint gather(const Lookup *job, Py_ssize_t start, Py_ssize_t stop, int64_t end, const Part *part,
                 Gathered *gathered) noexcept nogil:
    """The rows at positions `start` to `stop` that take part, with their weights: not those pruned, nor padding.
    Without a branch on either, so that none is mispredicted. False where an index or a mapped row is out of range, or
    where a signal ends the call."""
    cdef Py_ssize_t position, num_rows = 0
    cdef int64_t index, row
    cdef bint is_padding
    if rarely(start % ROWS_A_LOOK < GATHERED) and not may_go_on(job):
        return False
    gathered.num_absent = 0
    for position in range(start, stop):
        if position + job.prefetch_distance < end:
            prefetch_position(job, position + job.prefetch_distance, end, part.first_byte, part.num_bytes)
        index = row = read_index(job, position)
        is_padding = (index == job.padding_idx) & (index >= 0)
        if job.mapping != NULL:
            if rarely(not 0 <= index < job.num_embeddings):
                return False
            row = job.mapping[index]
        if rarely(not (-1 if job.mapping != NULL else 0) <= row < job.num_rows) and not is_padding:
            return False
        gathered.row[num_rows] = job.rows + row * job.row_stride
        gathered.weight[num_rows] = read_weight(job, position) if job.weight_size != 0 else 1
        gathered.num_absent += is_padding
        num_rows += (row >= 0) & (not is_padding)
    gathered.num_rows = num_rows
    return True


cdef inline bint take_row(const codes *unused, kind *unused_too, block *acc, const Lookup *job, const Part *part,
                          Py_ssize_t position) noexcept nogil:
    """Adds the row at a position, and prefetches one ahead. False where its index is out of range."""
    # Tables read so are near (choose_loops): into the first level of the cache. To ask that at each row cost a tenth.
    cdef bint is_near = codes is codes_8bit and block in quads
    cdef int64_t number
    cdef const uint8_t *row
    cdef lanes scale, bias, weight
    if not rarely(position >= part.last_prefetched):
        number = plain_index[kind](job, NULL, position + part.prefetch_distance)
        if not rarely(<uint64_t> number >= part.num_rows):
            prefetch_row(part.rows + number * part.row_stride, part.first_byte, part.num_bytes, part.tail_byte,
                         is_near)
    number = plain_index[kind](job, NULL, position)
    if rarely(<uint64_t> number >= part.num_rows):
        return False
    row = part.rows + number * part.row_stride
    read_tail[codes](NULL, row + part.codes_bytes, &scale, &bias)
    if kind is weighted_int32 or kind is weighted_int64:
        weight = lanes_broadcast(read_weight(job, position))
        scale = lanes_mul(scale, weight)
        bias = lanes_mul(bias, weight)
    add_row[codes, block](NULL, acc, row, part, scale, bias)
    return True


cdef inline void set_zero(block *acc) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(<Py_ssize_t> (sizeof(block) // sizeof(lanes))):
        acc.group[k] = lanes_zero()


cdef inline void finish_bag(const codes *unused, block *acc, const Lookup *job, const Part *part, uint8_t *out,
                            bint is_mean, Py_ssize_t count) noexcept nogil:
    cdef lanes share
    cdef Py_ssize_t k
    if rarely(is_mean) and count > 0:
        share = lanes_broadcast(<float> 1.0 / <float> count)
        for k in range(<Py_ssize_t> (sizeof(block) // sizeof(lanes))):
            acc.group[k] = lanes_mul(acc.group[k], share)
    store_block[codes, block](NULL, acc, job, out, part)


cdef bint look_up(const codes *unused, kind *unused_too, block *unused_as_well, const Lookup *job,
                  Py_ssize_t first_bag, Py_ssize_t end_bag, Py_ssize_t first_group, int64_t end,
                  bint warm_up) noexcept nogil:
    """Sums (or maxima) of whole bags, over the columns of one block of groups. False where an index, an
    offset or a mapped row is out of range. The pointers' types choose the loop; nothing is read through them.

    Rows are prefetched up to position `end`, beyond the last bag too where its neighbours come next; `warm_up`
    prefetches the first ones, which no earlier bag has."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t group_bytes = bytes_of_group[codes](NULL)
    # The row's last group (or quad) is moved back to end where the codes end, so that it needs no partial load; the
    # elements that it shares with the one before come out the same twice.
    cdef Py_ssize_t unit = 4 if 4 * count_quads[codes, block](NULL, NULL) == num_groups else 1
    cdef Part part
    part.first_byte = first_group * group_bytes
    part.last_byte = part.first_byte + (num_groups - unit) * group_bytes
    if part.last_byte > job.codes_bytes - unit * group_bytes:
        part.last_byte = max(job.codes_bytes - unit * group_bytes, 0)
    part.num_bytes = num_groups * group_bytes
    part.is_short = job.row_bytes < group_bytes    # only where there is one group
    part.is_whole = job.out_size == 4 and part.last_byte * (16 // group_bytes) + unit * 16 <= job.dim
    part.rows = job.rows
    part.num_rows = job.num_rows
    part.row_stride = job.row_stride
    part.codes_bytes = job.codes_bytes
    part.tail_byte = job.row_bytes - 1
    part.prefetch_distance = job.prefetch_distance
    part.last_prefetched = end - job.prefetch_distance

    cdef Py_ssize_t num_indices = job.num_indices
    cdef Py_ssize_t out_stride = job.out_stride
    cdef uint8_t *out = job.out + first_bag * out_stride
    cdef bint is_mean = job.mode == MEAN
    cdef Py_ssize_t bag = first_bag
    cdef Py_ssize_t position, count, k
    cdef int64_t start, middle, stop
    cdef const uint8_t *row
    cdef lanes scale, bias, weight
    cdef block acc, other
    cdef Gathered gathered
    cdef bint is_first

    start = read_offset(job, first_bag)
    if not 0 <= start <= num_indices:
        return False
    if warm_up:
        for position in range(start, min(end, start + job.prefetch_distance)):
            prefetch_position(job, position, end, part.first_byte, part.num_bytes)

    if kind is not any_kind and num_groups <= LANES_PAIRED:
        while job.pair_bags and bag + 2 <= end_bag:
            middle = read_offset(job, bag + 1)
            stop = read_offset(job, bag + 2)
            if rarely(not start <= middle <= stop <= num_indices):
                return False
            set_zero[block](&acc)
            set_zero[block](&other)
            count = min(middle - start, stop - middle)
            for k in range(count):
                if rarely(not take_row[codes, kind, block](NULL, NULL, &acc, job, &part, start + k)):
                    return False
                if rarely(not take_row[codes, kind, block](NULL, NULL, &other, job, &part, middle + k)):
                    return False
            for position in range(start + count, middle):
                if rarely(not take_row[codes, kind, block](NULL, NULL, &acc, job, &part, position)):
                    return False
            for position in range(middle + count, stop):
                if rarely(not take_row[codes, kind, block](NULL, NULL, &other, job, &part, position)):
                    return False
            finish_bag[codes, block](NULL, &acc, job, &part, out, is_mean, middle - start)
            finish_bag[codes, block](NULL, &other, job, &part, out + out_stride, is_mean, stop - middle)
            out += 2 * out_stride
            bag += 2
            start = stop

    position = start
    while bag < end_bag:
        stop = read_offset(job, bag + 1)
        if rarely(not start <= stop <= num_indices):
            return False
        set_zero[block](&acc)
        count = stop - start
        if kind is any_kind:
            is_first = True
            while start < stop:
                if not gather(job, start, min(start + GATHERED, stop), end, &part, &gathered):
                    return False
                count -= gathered.num_absent
                for k in range(gathered.num_rows):
                    row = gathered.row[k]
                    read_tail[codes](NULL, row + part.codes_bytes, &scale, &bias)
                    if job.mode == MAX:
                        max_row[codes, block](NULL, &acc, row, &part, scale, bias, is_first)
                        is_first = False
                    else:
                        weight = lanes_broadcast(gathered.weight[k])
                        add_row[codes, block](NULL, &acc, row, &part, lanes_mul(scale, weight),
                                              lanes_mul(bias, weight))
                start = min(start + GATHERED, stop)
        else:
            while position < stop:
                if rarely(not take_row[codes, kind, block](NULL, NULL, &acc, job, &part, position)):
                    return False
                position += 1
        finish_bag[codes, block](NULL, &acc, job, &part, out, is_mean, count)
        out += out_stride
        bag += 1
        start = stop
    return True


cdef bint look_up_block(const codes *rows, kind *unused, const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag,
                        Py_ssize_t first_group, Py_ssize_t num_groups, int64_t end, bint warm_up) noexcept nogil:
    if codes is not codes_4bit:
        if LANES_QUADS and job.use_quads:
            if num_groups == 4:
                return look_up[codes, kind, quads_4](
                    NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
            if num_groups == 5:
                return look_up[codes, kind, quads_5](
                    NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
            if num_groups == 6:
                return look_up[codes, kind, quads_6](
                    NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
            if num_groups == 7:
                return look_up[codes, kind, quads_7](
                    NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
            if num_groups == 12:
                return look_up[codes, kind, quads_12](
                    NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
            if num_groups == 16:
                return look_up[codes, kind, quads_16](
                    NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
            if num_groups == 8:
                return look_up[codes, kind, quads_8](
                    NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 1:
        return look_up[codes, kind, block_1](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 2:
        return look_up[codes, kind, block_2](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 3:
        return look_up[codes, kind, block_3](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 4:
        return look_up[codes, kind, block_4](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 5:
        return look_up[codes, kind, block_5](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 6:
        return look_up[codes, kind, block_6](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 7:
        return look_up[codes, kind, block_7](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 8:
        return look_up[codes, kind, block_8](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    if num_groups == 12:
        return look_up[codes, kind, block_12](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)
    return look_up[codes, kind, block_16](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end, warm_up)


cdef inline Py_ssize_t smallest_block(Py_ssize_t num_groups) noexcept nogil:
    """The least block that holds so many groups."""
    return num_groups if num_groups <= 8 else 12 if num_groups <= 12 else 16


cdef bint look_up_passes(const codes *unused, kind *unused_too, const Lookup *job, Py_ssize_t first_bag,
                         Py_ssize_t end_bag) noexcept nogil:
    """All columns: in one pass over the bags where the accumulators fit into registers, else bag by bag in
    passes of about equal width, so that a bag's rows are still in cache for its next pass."""
    cdef Py_ssize_t group_bytes = bytes_of_group[codes](NULL)
    cdef Py_ssize_t num_groups = (job.codes_bytes + group_bytes - 1) // group_bytes
    cdef Py_ssize_t end = read_offset(job, end_bag)
    cdef Py_ssize_t max_groups = LANES_MAX_BLOCK
    cdef Py_ssize_t num_passes, first_group, width, number, bag
    if codes is codes_2bit:
        if job.use_quads:
            # As quads, 5 to 10 % faster than 16 one by one; at AVX2, which has no quads, 8 to 10 % faster than 6.
            max_groups = 8
    # The end bounds what is prefetched, so it is checked before anything is: an offset near -2^63 less the distance of
    # prefetching comes out above all positions, and indices beyond the last would be read.
    if not 0 <= end <= job.num_indices:
        return False
    num_passes = (num_groups + max_groups - 1) // max_groups
    if num_passes == 1 and smallest_block(num_groups) > num_groups:
        num_passes = 2
    if num_passes == 1:
        return look_up_block[codes, kind](NULL, NULL, job, first_bag, end_bag, 0, num_groups, end, True)
    # An offset is wrong also where no bag starts at it: the end of no bags.
    if not 0 <= read_offset(job, first_bag) <= job.num_indices:
        return False
    for bag in range(first_bag, end_bag):
        first_group = 0
        for number in range(num_passes):
            # An equal share of what is left. Where no block is as wide, the next wider one starts further back.
            width = smallest_block((num_groups - first_group + num_passes - number - 1) // (num_passes - number))
            first_group = min(first_group, num_groups - width)
            if not look_up_block[codes, kind](NULL, NULL, job, bag, bag + 1, first_group, width, end, bag == first_bag):
                return False
            first_group += width
    return True


cdef bint look_up_kind(const codes *unused, const Lookup *job, Py_ssize_t first_bag,
                       Py_ssize_t end_bag) noexcept nogil:
    # One bag as long as a piece of a long call looks for signals on its way, which only the loop for anything does.
    cdef bint is_giant = job.signals != NULL and end_bag == first_bag + 1
    if job.mapping == NULL and job.padding_idx < 0 and job.mode != MAX and job.index_size != 0 and not is_giant:
        if job.weight_size != 0 and job.index_size == 4:
            return look_up_passes[codes, weighted_int32](NULL, NULL, job, first_bag, end_bag)
        if job.weight_size != 0:
            return look_up_passes[codes, weighted_int64](NULL, NULL, job, first_bag, end_bag)
        if job.index_size == 4:
            return look_up_passes[codes, plain_int32](NULL, NULL, job, first_bag, end_bag)
        return look_up_passes[codes, plain_int64](NULL, NULL, job, first_bag, end_bag)
    return look_up_passes[codes, any_kind](NULL, NULL, job, first_bag, end_bag)


cdef bint look_up_bags(const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag) noexcept nogil:
    if job.bits == 8:
        return look_up_kind[codes_8bit](NULL, job, first_bag, end_bag)
    if job.bits == 4:
        return look_up_kind[codes_4bit](NULL, job, first_bag, end_bag)
    return look_up_kind[codes_2bit](NULL, job, first_bag, end_bag)


# ---- Sharing out ------------------------------------------------------------------------------------------

# Several chunks a thread: whoever gets a long bag leaves the rest to the others.
cdef enum:
    CHUNKS_A_THREAD = 8
    MAX_CHUNKS = 2048

# Rows times (dim + 64), the 64 for what a row costs whatever its dim. At this much, 14 us on one thread, two are
# 1.15 to 1.4 times as fast, and 1.7 times at four times as much; at half of it they gain nothing. Opening a parallel
# region takes 1 to 3 us when its threads are awake.
cdef int64_t MIN_PARALLEL_WORK = 1 << 19
# In a forked child a sleeping thread is woken instead (see parallel.h).
cdef int64_t STALE_MIN_PARALLEL_WORK = 1 << 21


cdef inline double min_parallel_work() noexcept nogil:
    return STALE_MIN_PARALLEL_WORK if parallel_is_stale() else MIN_PARALLEL_WORK


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


cdef inline double rows_of(const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag) noexcept nogil:
    """Of bags, the output of each counted as one."""
    return <double> read_offset(job, end_bag) - read_offset(job, first_bag) + (end_bag - first_bag)


cdef inline double work_of(const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag) noexcept nogil:
    """What bags cost, by the measure of MIN_PARALLEL_WORK."""
    return rows_of(job, first_bag, end_bag) * (job.dim + 64)


cdef Py_ssize_t end_of_piece(const Lookup *job, Py_ssize_t first_bag, double work) noexcept nogil:
    """As many bags as cost no more; one at least."""
    cdef Py_ssize_t low = first_bag + 1, high = job.num_bags, middle
    while low < high:
        middle = low + (high - low + 1) // 2
        if work_of(job, first_bag, middle) <= work:
            low = middle
        else:
            high = middle - 1
    return low


# With fewer rows a bag, its output counted as one, putting a quad in order costs more than it saves.
cdef int QUADS_MIN_LENGTH = 8
# A table that the third-level cache may hold. What depends on it was measured on a Zen 5 at 0.1 to 40 MB: it pays up to
# about 10, and costs as much beyond 14.
cdef int64_t NEAR_BYTES = 8 << 20


cdef void choose_loops(Lookup *job) noexcept nogil:
    cdef double rows = rows_of(job, 0, job.num_bags)
    cdef bint is_near = <double> job.num_rows * job.row_bytes <= NEAR_BYTES
    # Narrow rows are added to two bags in turn: an addition and an fma of one bag wait for each other, 7 cycles a row
    # whatever its width, and those of two do not. In cache 1.1 to 1.4 times as fast; from memory, where rows are waited
    # for, 0.85.
    job.pair_bags = is_near
    # Quads of 8-bit codes are loads of 64 bytes, each across two cache lines: faster where prefetching brings the lines
    # into the first level in time, and slower where it does not.
    job.use_quads = (rows >= QUADS_MIN_LENGTH * <double> job.num_bags and job.codes_bytes >= 8 * job.bits
                     and (job.bits == 2 or is_near))


# One call's chunks, and the threads that take them (see parallel.h).
cdef struct Shared:
    const Lookup *job
    const Py_ssize_t *bounds
    int num_chunks
    int num_taken
    int failures


cdef int look_up_left(Shared *shared) noexcept nogil:
    """Chunk by chunk, what nobody has taken."""
    cdef int chunk, failures = 0
    while True:
        chunk = parallel_add(&shared.num_taken, 1)
        if chunk >= shared.num_chunks:
            return failures
        failures += not look_up_bags(shared.job, shared.bounds[chunk], shared.bounds[chunk + 1])


cdef void look_up_chunks(void *argument, int num_threads) noexcept nogil:
    cdef Shared *shared = <Shared *> argument
    cdef int worker, failures = 0
    if num_threads == 1:
        failures = look_up_left(shared)
    else:
        for worker in prange(num_threads, schedule="static", chunksize=1, num_threads=num_threads):
            failures += look_up_left(shared)
    parallel_add(&shared.failures, failures)


cdef bint look_up_shared(const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag, int num_threads) noexcept nogil:
    """Bags, shared out among threads where that pays."""
    cdef Py_ssize_t bounds[MAX_CHUNKS + 1]
    cdef Shared shared
    if end_bag - first_bag < 2 or work_of(job, first_bag, end_bag) < min_parallel_work():
        return look_up_bags(job, first_bag, end_bag)
    if num_threads == 0:
        num_threads = parallel_max_threads()
    num_threads = parallel_enter(min(num_threads, MAX_CHUNKS // CHUNKS_A_THREAD))
    if num_threads == 1:
        shared.failures = not look_up_bags(job, first_bag, end_bag)
    else:
        shared.job = job
        shared.bounds = bounds
        shared.num_chunks = min(<Py_ssize_t> (CHUNKS_A_THREAD * num_threads), end_bag - first_bag)
        shared.num_taken = shared.failures = 0
        share_out(job, first_bag, end_bag, bounds, shared.num_chunks)
        parallel_run(look_up_chunks, &shared, min(num_threads, shared.num_chunks))
    parallel_leave()
    return shared.failures == 0
