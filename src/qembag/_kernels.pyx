# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, autotestdict=False
"""The loops: bags of rows summed, rows quantized.

One source, compiled once per instruction-set level over the `lanes` of lanes.h. Nothing here knows an
error's text or converts an argument: a function takes arrays of exactly the type and layout that its
loops need, and answers None where one is not (`lookup` then goes the slow road through `_arguments`).

A lookup reads each index, offset and mapped row once where it uses it and checks what it read, so nothing
outside the arrays is touched even while another thread writes to them. Such reads are volatile: a compiler may
otherwise read again after the check.
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.math cimport isfinite, sqrtf
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cnp.import_array()

cdef extern from "parallel.h" nogil:
    int PARALLEL_OPENMP
    int parallel_max_threads()
    void parallel_pause()

cdef extern from "lanes.h" nogil:
    const char *LANES_LEVEL
    enum: LANES_MAX_BLOCK
    enum: LANES_QUADS
    ctypedef struct lanes:
        pass

    lanes lanes_zero()
    lanes lanes_broadcast(float)
    lanes lanes_load(const float *)
    void lanes_store(float *, lanes)
    void store_part(uint8_t *, const float *, Py_ssize_t, int)
    lanes lanes_add(lanes, lanes)
    lanes lanes_add_by_fma(lanes, lanes)
    void lanes_accumulate(lanes *, lanes, lanes, lanes)
    lanes lanes_mul(lanes, lanes)
    lanes lanes_fma(lanes, lanes, lanes)
    lanes lanes_max(lanes, lanes)
    lanes lanes_in_order_4bit(lanes)
    void lanes_in_order_quad(lanes *)
    lanes unpack_8bit(const uint8_t *)
    lanes unpack_4bit(const uint8_t *)
    lanes unpack_2bit(const uint8_t *)
    lanes unpack_8bit_short(const uint8_t *)
    lanes unpack_4bit_short(const uint8_t *)
    void unpack_quad_8bit(const uint8_t *, lanes *)
    void unpack_quad_8bit_by_loads(const uint8_t *, lanes *)
    void unpack_quad_2bit(const uint8_t *, lanes *)
    void read_tail_float(const uint8_t *, lanes *, lanes *)
    void read_tail_half(const uint8_t *, lanes *, lanes *)
    lanes lanes_min(lanes, lanes)
    lanes lanes_sub(lanes, lanes)
    lanes lanes_div(lanes, lanes)
    lanes lanes_round(lanes)
    lanes lanes_nonzero(lanes)
    lanes lanes_through_half(lanes)
    void lanes_store_half(uint16_t *, lanes)
    bint lanes_all_finite(lanes)
    void four_leasts(float *, lanes)
    void four_greatests(float *, lanes)
    lanes leasts_of_fours(const float *)
    lanes greatests_of_fours(const float *)
    lanes lanes_load_part(const float *, Py_ssize_t, lanes)
    void pack_8bit(uint8_t *, lanes)
    void pack_4bit(uint8_t *, lanes)
    void pack_2bit(uint8_t *, lanes)
    void pack_four_8bit(uint8_t *, lanes, lanes, lanes, lanes)
    void pack_four_4bit(uint8_t *, lanes, lanes, lanes, lanes)
    void pack_four_2bit(uint8_t *, lanes, lanes, lanes, lanes)
    float float_of_half(uint16_t)
    uint16_t half_of_float(float)
    uint32_t bits_of_float(float)
    void write_u16(uint8_t *, uint16_t)
    void write_u32(uint8_t *, uint32_t)
    void prefetch(const uint8_t *)
    bint unlikely(bint)

    ctypedef struct codes_8bit:
        pass
    ctypedef struct codes_4bit:
        pass
    ctypedef struct codes_2bit:
        pass
    ctypedef struct plain_int32:
        pass
    ctypedef struct plain_int64:
        pass
    ctypedef struct weighted:
        pass
    ctypedef struct any_kind:
        pass
    ctypedef struct block_1:
        lanes *group
    ctypedef struct block_2:
        lanes *group
    ctypedef struct block_3:
        lanes *group
    ctypedef struct block_4:
        lanes *group
    ctypedef struct block_5:
        lanes *group
    ctypedef struct block_6:
        lanes *group
    ctypedef struct block_7:
        lanes *group
    ctypedef struct block_8:
        lanes *group
    ctypedef struct block_12:
        lanes *group
    ctypedef struct block_16:
        lanes *group
    ctypedef struct quads_4:
        lanes *group
    ctypedef struct quads_5:
        lanes *group
    ctypedef struct quads_6:
        lanes *group
    ctypedef struct quads_7:
        lanes *group
    ctypedef struct quads_8:
        lanes *group

ctypedef fused codes:
    codes_8bit
    codes_4bit
    codes_2bit

# What a lookup may hold: nothing but rows to add, by one type of index; weights, by either; or anything at all.
ctypedef fused kind:
    plain_int32
    plain_int64
    weighted
    any_kind

ctypedef fused block:
    block_1
    block_2
    block_3
    block_4
    block_5
    block_6
    block_7
    block_8
    block_12
    block_16
    quads_4
    quads_5
    quads_6
    quads_7
    quads_8

# Blocks that start with groups unpacked four at a time.
ctypedef fused quads:
    quads_4
    quads_5
    quads_6
    quads_7
    quads_8

cdef enum Mode:
    SUM = 0
    MEAN = 1
    MAX = 2

LEVEL = (<bytes> LANES_LEVEL).decode()
OPENMP = PARALLEL_OPENMP


cdef struct Lookup:
    # The table. `codes_bytes` of a row are codes, its tail follows.
    const uint8_t *rows
    Py_ssize_t num_rows
    Py_ssize_t row_stride
    Py_ssize_t codes_bytes
    Py_ssize_t row_bytes
    Py_ssize_t dim
    int bits
    const volatile int32_t *mapping     # NULL: not pruned
    Py_ssize_t num_embeddings
    # The bags. An item size of 0 means that there is no such array: each bag then has bag_length indices
    # (no offsets), index i is row i (no indices).
    const uint8_t *indices
    int index_size
    Py_ssize_t num_indices
    const uint8_t *offsets
    int offset_size
    Py_ssize_t num_offsets
    Py_ssize_t bag_length
    Py_ssize_t num_bags
    const uint8_t *weights
    int weight_size
    int64_t padding_idx         # -1: none
    Mode mode
    # The output
    uint8_t *out
    Py_ssize_t out_stride
    int out_size
    Py_ssize_t prefetch_distance
    bint use_quads


cdef inline int64_t read_index(const Lookup *job, Py_ssize_t position) noexcept nogil:
    if job.index_size == 8:
        return (<const volatile int64_t *> job.indices)[position]
    if job.index_size == 4:
        return (<const volatile int32_t *> job.indices)[position]
    return position


cdef inline int64_t read_offset(const Lookup *job, Py_ssize_t bag) noexcept nogil:
    """Where a bag starts; the one after the last starts at the end."""
    if job.offset_size == 0:
        return bag * job.bag_length
    if bag >= job.num_offsets:
        return job.num_indices
    if job.offset_size == 8:
        return (<const volatile int64_t *> job.offsets)[bag]
    return (<const volatile int32_t *> job.offsets)[bag]


cdef inline float read_weight(const Lookup *job, Py_ssize_t position) noexcept nogil:
    if job.weight_size == 4:
        return (<const float *> job.weights)[position]
    return float_of_half((<const uint16_t *> job.weights)[position])


# ---- Bags of rows ---------------------------------------------------------------------------------------------

# Rows that a bag of any kind gathers before it adds them.
cdef enum:
    GATHERED = 32

cdef struct Gathered:
    Py_ssize_t num_rows
    Py_ssize_t num_absent               # padding
    const uint8_t *row[GATHERED + 1]    # one more: each is written before it is known to count
    float weight[GATHERED + 1]

# The columns of one pass over a bag.
cdef struct Columns:
    Py_ssize_t first_byte
    Py_ssize_t last_byte        # where the last group (or quad) starts
    bint is_short               # the whole row is smaller than what a group loads


cdef inline Py_ssize_t count_quads(const codes *unused, block *unused_too) noexcept nogil:
    """How many quads the block starts with. One of 8-bit codes: with two, loads would be the bottleneck."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    if block in quads:
        if codes is codes_8bit:
            return 1
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


cdef inline Py_ssize_t byte_of_group(const codes *unused, block *unused_too, const Columns *columns,
                                     Py_ssize_t k) noexcept nogil:
    """Where a group of the block, or the quad that it starts, is found in a row."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t last_start = num_groups - (4 if 4 * count_quads[codes, block](NULL, NULL) == num_groups else 1)
    return columns.last_byte if k == last_start else columns.first_byte + k * bytes_of_group[codes](NULL)


cdef inline void add_row(const codes *unused, block *acc, const uint8_t *row, const Columns *columns, lanes scale,
                         lanes bias) noexcept nogil:
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t num_quads = count_quads[codes, block](NULL, NULL)
    cdef lanes four[4]
    cdef lanes x
    cdef Py_ssize_t k, j
    for k in range(0, 4 * num_quads, 4):
        unpack_quad[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, columns, k), four, num_groups == 4)
        for j in range(4):
            if codes is codes_8bit and j % 2 == 0:
                acc.group[k + j] = lanes_fma(scale, four[j], lanes_add_by_fma(acc.group[k + j], bias))
            else:
                lanes_accumulate(&acc.group[k + j], scale, four[j], bias)
    # One by one, so that no more registers are needed than there are at AVX2.
    for k in range(4 * num_quads, num_groups):
        x = unpack[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, columns, k),
                          num_groups == 1 and columns.is_short)
        if codes is codes_8bit and block in quads and k % 2 == 0:
            acc.group[k] = lanes_fma(scale, x, lanes_add_by_fma(acc.group[k], bias))
        else:
            lanes_accumulate(&acc.group[k], scale, x, bias)


cdef inline void max_row(const codes *unused, block *acc, const uint8_t *row, const Columns *columns, lanes scale,
                         lanes bias, bint is_first) noexcept nogil:
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t num_quads = count_quads[codes, block](NULL, NULL)
    cdef lanes four[4]
    cdef lanes x
    cdef Py_ssize_t k, j
    for k in range(0, 4 * num_quads, 4):
        unpack_quad[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, columns, k), four, num_groups == 4)
        for j in range(4):
            x = lanes_fma(scale, four[j], bias)
            acc.group[k + j] = x if is_first else lanes_max(x, acc.group[k + j])
    for k in range(4 * num_quads, num_groups):
        x = unpack[codes](NULL, row + byte_of_group[codes, block](NULL, NULL, columns, k),
                          num_groups == 1 and columns.is_short)
        x = lanes_fma(scale, x, bias)
        acc.group[k] = x if is_first else lanes_max(x, acc.group[k])


cdef inline void read_tail(const codes *unused, const uint8_t *p, lanes *scale, lanes *bias) noexcept nogil:
    if codes is codes_8bit:
        read_tail_float(p, scale, bias)
    else:
        read_tail_half(p, scale, bias)


cdef inline Py_ssize_t element_of_group(const codes *unused, block *unused_too, const Columns *columns,
                                        Py_ssize_t k) noexcept nogil:
    """The first element of a group in order."""
    cdef Py_ssize_t group_bytes = bytes_of_group[codes](NULL)
    if k < 4 * count_quads[codes, block](NULL, NULL):
        return byte_of_group[codes, block](NULL, NULL, columns, k // 4 * 4) * (16 // group_bytes) + k % 4 * 16
    return byte_of_group[codes, block](NULL, NULL, columns, k) * (16 // group_bytes)


cdef inline void store_block(const codes *unused, block *acc, const Lookup *job, uint8_t *out, const Columns *columns,
                             bint is_whole) noexcept nogil:
    """A bag's output, in order; `is_whole` where it is float32 and no group ends beyond it."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef float whole[16 * 16]
    cdef Py_ssize_t k, element
    for k in range(0, 4 * count_quads[codes, block](NULL, NULL), 4):
        lanes_in_order_quad(&acc.group[k])
    if codes is codes_4bit:
        for k in range(num_groups):
            acc.group[k] = lanes_in_order_4bit(acc.group[k])
    if is_whole:
        for k in range(num_groups):
            lanes_store(<float *> out + element_of_group[codes, block](NULL, NULL, columns, k), acc.group[k])
    else:
        # By way of memory: values that lived across a call would have no registers in the row loop either.
        for k in range(num_groups):
            lanes_store(whole + 16 * k, acc.group[k])
        for k in range(num_groups):
            element = element_of_group[codes, block](NULL, NULL, columns, k)
            store_part(out + element * job.out_size, whole + 16 * k, job.dim - element, job.out_size)


cdef inline void prefetch_row(const uint8_t *row, Py_ssize_t first_byte, Py_ssize_t num_bytes,
                              Py_ssize_t tail_byte) noexcept nogil:
    """Each cache line of a block's codes, and the tail's. How many is fixed at compile time where `num_bytes` is: a
    count that depends on the row's address is mispredicted, and halves the speed in cache."""
    cdef Py_ssize_t byte
    for byte in range(0, num_bytes, 64):
        prefetch(row + first_byte + byte)
    prefetch(row + tail_byte)


cdef inline int64_t plain_index(const Lookup *job, kind *unused, Py_ssize_t position) noexcept nogil:
    if kind is plain_int32:
        return (<const volatile int32_t *> job.indices)[position]
    elif kind is plain_int64:
        return (<const volatile int64_t *> job.indices)[position]
    else:
        return read_index(job, position)


cdef inline void prefetch_position(const Lookup *job, Py_ssize_t position, int64_t end, Py_ssize_t first_byte,
                                   Py_ssize_t num_bytes) noexcept nogil:
    """What `gather` will need: the row's lines, and before them the entry of the mapping that leads there, since a large
    mapping is no more in cache than its table. A pruned row is prefetched as row 0: where rows are pruned at random, a
    branch is mispredicted as often as not, and costs as much as a row."""
    cdef int64_t index, row
    if job.mapping != NULL and position + job.prefetch_distance < end:
        index = read_index(job, position + job.prefetch_distance)
        if 0 <= index < job.num_embeddings:
            prefetch(<const uint8_t *> &job.mapping[index])
    row = index = read_index(job, position)
    if job.mapping != NULL:
        row = job.mapping[index] if 0 <= index < job.num_embeddings else 0
    row &= -<int64_t> (<uint64_t> row < <uint64_t> job.num_rows)
    prefetch_row(job.rows + row * job.row_stride, first_byte, num_bytes, job.row_bytes - 1)


cdef bint gather(const Lookup *job, Py_ssize_t start, Py_ssize_t stop, int64_t end, const Columns *columns,
                 Py_ssize_t num_bytes, Gathered *gathered) noexcept nogil:
    """The rows at positions `start` to `stop` that take part, with their weights: not those pruned, nor padding. Without
    a branch on either, so that none is mispredicted. False where an index or a mapped row is out of range."""
    cdef Py_ssize_t position, num_rows = 0
    cdef int64_t index, row
    cdef bint is_padding
    gathered.num_absent = 0
    for position in range(start, stop):
        if position + job.prefetch_distance < end:
            prefetch_position(job, position + job.prefetch_distance, end, columns.first_byte, num_bytes)
        index = row = read_index(job, position)
        is_padding = (index == job.padding_idx) & (index >= 0)
        if job.mapping != NULL:
            if unlikely(not 0 <= index < job.num_embeddings):
                return False
            row = job.mapping[index]
        if unlikely(not (-1 if job.mapping != NULL else 0) <= row < job.num_rows) and not is_padding:
            return False
        gathered.row[num_rows] = job.rows + row * job.row_stride
        gathered.weight[num_rows] = read_weight(job, position) if job.weight_size != 0 else 1
        gathered.num_absent += is_padding
        num_rows += (row >= 0) & (not is_padding)
    gathered.num_rows = num_rows
    return True


cdef bint look_up(const codes *unused, kind *unused_too, block *unused_as_well, const Lookup *job,
                  Py_ssize_t first_bag, Py_ssize_t end_bag, Py_ssize_t first_group, int64_t end,
                  bint warm_up) noexcept nogil:
    """Sums (or maxima) of whole bags, over the columns of one block of groups. False where an index, an
    offset or a mapped row is out of range. The pointers' types choose the loop; nothing is read through them.

    Rows are prefetched up to position `end`, beyond the last bag too where its neighbours come next; `warm_up`
    prefetches the first ones, which no earlier bag has."""
    cdef Py_ssize_t num_groups = sizeof(block) // sizeof(lanes)
    cdef Py_ssize_t group_bytes = bytes_of_group[codes](NULL)
    cdef Py_ssize_t num_bytes = num_groups * group_bytes

    # The row's last group (or quad) is moved back to end where the codes end, so that it needs no partial load; the
    # elements that it shares with the one before come out the same twice.
    cdef Py_ssize_t unit = 4 if 4 * count_quads[codes, block](NULL, NULL) == num_groups else 1
    cdef Columns columns
    columns.first_byte = first_group * group_bytes
    columns.last_byte = columns.first_byte + (num_groups - unit) * group_bytes
    if columns.last_byte > job.codes_bytes - unit * group_bytes:
        columns.last_byte = max(job.codes_bytes - unit * group_bytes, 0)
    columns.is_short = job.row_bytes < group_bytes    # only where there is one group
    cdef bint is_whole = job.out_size == 4 and columns.last_byte * (16 // group_bytes) + unit * 16 <= job.dim

    # Copies, which stay in registers: a compiler must take it that stores change what `job` points at.
    cdef const uint8_t *rows = job.rows
    cdef uint64_t num_rows = job.num_rows
    cdef Py_ssize_t row_stride = job.row_stride
    cdef Py_ssize_t codes_bytes = job.codes_bytes
    cdef Py_ssize_t tail_byte = job.row_bytes - 1
    cdef Py_ssize_t distance = job.prefetch_distance
    cdef Py_ssize_t bag, position, count, k
    cdef int64_t start, stop, row_number
    cdef const uint8_t *row
    cdef lanes scale, bias, weight
    cdef block acc
    cdef Gathered gathered
    cdef bint is_first
    cdef bint is_mean = job.mode == MEAN
    cdef Py_ssize_t num_indices = job.num_indices
    cdef Py_ssize_t last_prefetched = end - distance
    cdef Py_ssize_t out_stride = job.out_stride
    cdef uint8_t *out = job.out + first_bag * out_stride

    start = read_offset(job, first_bag)
    if not (0 <= start <= job.num_indices and end <= job.num_indices):
        return False
    if warm_up:
        for position in range(start, min(end, start + distance)):
            prefetch_position(job, position, end, columns.first_byte, num_bytes)

    position = start
    for bag in range(first_bag, end_bag):
        stop = read_offset(job, bag + 1)
        if unlikely(not start <= stop <= num_indices):
            return False
        for k in range(num_groups):
            acc.group[k] = lanes_zero()
        count = stop - start
        if kind is any_kind:
            is_first = True
            while start < stop:
                if not gather(job, start, min(start + GATHERED, stop), end, &columns, num_bytes, &gathered):
                    return False
                count -= gathered.num_absent
                for k in range(gathered.num_rows):
                    row = gathered.row[k]
                    read_tail[codes](NULL, row + codes_bytes, &scale, &bias)
                    if job.mode == MAX:
                        max_row[codes, block](NULL, &acc, row, &columns, scale, bias, is_first)
                        is_first = False
                    else:
                        weight = lanes_broadcast(gathered.weight[k])
                        add_row[codes, block](NULL, &acc, row, &columns, lanes_mul(scale, weight),
                                              lanes_mul(bias, weight))
                start = min(start + GATHERED, stop)
        else:
            while position < stop:
                if not unlikely(position >= last_prefetched):
                    row_number = plain_index[kind](job, NULL, position + distance)
                    if not unlikely(<uint64_t> row_number >= num_rows):
                        prefetch_row(rows + row_number * row_stride, columns.first_byte, num_bytes, tail_byte)
                row_number = plain_index[kind](job, NULL, position)
                if unlikely(<uint64_t> row_number >= num_rows):
                    return False
                row = rows + row_number * row_stride
                read_tail[codes](NULL, row + codes_bytes, &scale, &bias)
                if kind is weighted:
                    weight = lanes_broadcast(read_weight(job, position))
                    scale = lanes_mul(scale, weight)
                    bias = lanes_mul(bias, weight)
                add_row[codes, block](NULL, &acc, row, &columns, scale, bias)
                position += 1
        if unlikely(is_mean) and count > 0:
            weight = lanes_broadcast(<float> 1.0 / <float> count)
            for k in range(num_groups):
                acc.group[k] = lanes_mul(acc.group[k], weight)
        store_block[codes, block](NULL, &acc, job, out, &columns, is_whole)
        out += out_stride
        start = stop
    return True


cdef bint look_up_block(const codes *rows, kind *unused, const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag,
                        Py_ssize_t first_group, Py_ssize_t num_groups, int64_t end, bint warm_up) noexcept nogil:
    if codes is not codes_4bit:
        if LANES_QUADS and job.use_quads:
            if num_groups == 4:
                return look_up[codes, kind, quads_4](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end,
                                                       warm_up)
            if num_groups == 5:
                return look_up[codes, kind, quads_5](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end,
                                                       warm_up)
            if num_groups == 6:
                return look_up[codes, kind, quads_6](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end,
                                                       warm_up)
            if num_groups == 7:
                return look_up[codes, kind, quads_7](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end,
                                                       warm_up)
            if num_groups == 8:
                return look_up[codes, kind, quads_8](NULL, NULL, NULL, job, first_bag, end_bag, first_group, end,
                                                       warm_up)
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
    cdef Py_ssize_t group_bytes = 16 if codes is codes_8bit else 8 if codes is codes_4bit else 4
    cdef Py_ssize_t num_groups = (job.codes_bytes + group_bytes - 1) // group_bytes
    cdef Py_ssize_t end = read_offset(job, end_bag)
    cdef Py_ssize_t max_groups = LANES_MAX_BLOCK
    cdef Py_ssize_t num_passes, first_group, width, number, bag
    if codes is codes_2bit:
        if job.use_quads:
            max_groups = 8      # as quads: 5 to 10 % faster than 16 one by one
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
    if job.mapping == NULL and job.padding_idx < 0 and job.mode != MAX and job.index_size != 0:
        if job.weight_size != 0:
            return look_up_passes[codes, weighted](NULL, NULL, job, first_bag, end_bag)
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


cdef void share_out(const Lookup *job, Py_ssize_t *bounds, Py_ssize_t num_chunks) noexcept nogil:
    """Chunks of bags with about equally many rows each; an empty bag counts as one, for its output. The
    bounds are right even where another thread changes the offsets: they never decrease."""
    cdef Py_ssize_t chunk, low, high, middle
    # In double, where no difference of offsets overflows, whatever they hold.
    cdef double first = read_offset(job, 0)
    cdef double total = <double> read_offset(job, job.num_bags) - first + job.num_bags
    bounds[0] = 0
    for chunk in range(1, num_chunks):
        low = bounds[chunk - 1]
        high = job.num_bags
        while low < high:
            middle = low + (high - low) // 2
            if <double> read_offset(job, middle) - first + middle < total * chunk / num_chunks:
                low = middle + 1
            else:
                high = middle
        bounds[chunk] = low
    bounds[num_chunks] = job.num_bags


# Fewer rows a bag, and putting a quad in order costs more than it saves.
cdef int QUADS_MIN_LENGTH = 8
# Quads of 8-bit codes are loads of 64 bytes, each across two cache lines: 7 to 10 % faster where lines are near, and
# slower where they are not.
cdef int64_t QUADS_8BIT_MAX_TABLE = 1 << 20


cdef bint look_up_all(Lookup *job, int num_threads) noexcept nogil:
    cdef Py_ssize_t bounds[MAX_CHUNKS + 1]
    cdef Py_ssize_t chunk, num_chunks
    cdef int failures = 0
    cdef double rows = <double> read_offset(job, job.num_bags) - read_offset(job, 0) + job.num_bags
    job.use_quads = (rows >= QUADS_MIN_LENGTH * <double> job.num_bags and job.codes_bytes * 8 >= 64 * job.bits
                     and (job.bits == 2 or job.num_rows * job.row_stride <= QUADS_8BIT_MAX_TABLE))
    if num_threads == 0:
        num_threads = parallel_max_threads()
    num_threads = min(num_threads, MAX_CHUNKS // CHUNKS_A_THREAD)
    if num_threads == 1 or job.num_bags < 2 or rows * (job.dim + 64) < MIN_PARALLEL_WORK:
        return look_up_bags(job, 0, job.num_bags)
    num_chunks = min(<Py_ssize_t> (CHUNKS_A_THREAD * num_threads), job.num_bags)
    num_threads = min(<Py_ssize_t> num_threads, num_chunks)
    share_out(job, bounds, num_chunks)
    for chunk in prange(num_chunks, schedule="dynamic", chunksize=1, num_threads=num_threads):
        failures += not look_up_bags(job, bounds[chunk], bounds[chunk + 1])
    return failures == 0


# ---- What is wrong ----------------------------------------------------------------------------------------

cdef enum Where:
    NOWHERE
    IN_INDICES
    IN_OFFSETS
    IN_MAPPING

cdef struct Fault:
    Where where
    Py_ssize_t position         # in that array
    Py_ssize_t bag
    int64_t value
    Py_ssize_t index_position   # IN_MAPPING: the index that led there


cdef Fault find_fault(const Lookup *job) noexcept nogil:
    """The first bad offset; where all are right, the first bad index or mapped row of the bags, in order."""
    cdef Fault fault
    cdef Py_ssize_t bag, position
    cdef int64_t start, stop, index, row
    fault.where = NOWHERE
    fault.position = fault.bag = fault.index_position = 0
    fault.value = 0
    start = 0
    for bag in range(job.num_offsets if job.offset_size != 0 else 0):
        stop = read_offset(job, bag)
        if not start <= stop <= job.num_indices:
            fault.where = IN_OFFSETS
            fault.position = bag
            fault.value = stop
            return fault
        start = stop
    start = read_offset(job, 0)
    for bag in range(job.num_bags):
        stop = min(read_offset(job, bag + 1), job.num_indices)
        for position in range(max(start, 0), stop):
            index = read_index(job, position)
            if index == job.padding_idx and index >= 0:
                continue
            fault.bag = bag
            fault.value = index
            fault.position = fault.index_position = position
            if not 0 <= index < job.num_embeddings:
                fault.where = IN_INDICES
                return fault
            if job.mapping != NULL:
                row = job.mapping[index]
                if not -1 <= row < job.num_rows:
                    fault.where = IN_MAPPING
                    fault.position = index
                    fault.value = row
                    return fault
        start = stop
    return fault


cdef bint is_in_range(const Lookup *job) noexcept nogil:
    """Whether all is right, at a glance, so that the usual call with an output need not search for a fault: offsets one
    by one, indices in a loop that vectorises (0.1 ns an index). False where it takes a closer look."""
    cdef Py_ssize_t bag, position
    cdef int64_t start = 0, stop
    cdef uint64_t end = job.num_embeddings
    cdef bint wrong = False
    if job.mapping != NULL or job.index_size == 0:
        return False
    for bag in range(job.num_offsets if job.offset_size != 0 else 0):
        stop = read_offset(job, bag)
        wrong |= stop < start
        start = stop
    if wrong or start > job.num_indices:
        return False
    start = read_offset(job, 0)
    stop = read_offset(job, job.num_bags)
    if not 0 <= start <= stop <= job.num_indices:
        return False
    if job.index_size == 4:
        for position in range(start, stop):
            wrong |= <uint64_t> (<const int32_t *> job.indices)[position] >= end
    else:
        for position in range(start, stop):
            wrong |= <uint64_t> (<const int64_t *> job.indices)[position] >= end
    return not wrong


# ---- From Python --------------------------------------------------------------------------------------------

cdef struct Span:
    size_t low
    size_t high


cdef bint is_plain(object array) noexcept:
    """C-contiguous, aligned, of the host's byte order: memory that a loop may run over. Subclasses have ways of their
    own (a mask, a fixed number of dimensions) and take the slow road."""
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> array)


cdef int integer_size(object array) noexcept:
    """4 or 8 for a plain array of int32 or int64, else 0."""
    cdef int size
    if is_plain(array) and cnp.PyArray_ISSIGNED(<cnp.ndarray> array):
        size = cnp.PyArray_ITEMSIZE(<cnp.ndarray> array)
        if size == 4 or size == 8:
            return size
    return 0


cdef const uint8_t *data_of(object array) noexcept:
    return <const uint8_t *> cnp.PyArray_DATA(<cnp.ndarray> array)


cdef bint take_table(Lookup *job, object rows, int bits, Py_ssize_t dim, object mapping) noexcept:
    cdef cnp.ndarray array
    if not cnp.PyArray_Check(rows):
        return False
    array = <cnp.ndarray> rows
    if cnp.PyArray_TYPE(array) != cnp.NPY_UINT8 or cnp.PyArray_NDIM(array) != 2 or dim < 1:
        return False
    if bits != 8 and bits != 4 and bits != 2:
        return False
    job.bits = bits
    job.dim = dim
    job.codes_bytes = (dim - 1) // (8 // bits) + 1
    job.row_bytes = cnp.PyArray_DIM(array, 1)
    # The strides of an array without elements say nothing: NumPy may make them 0.
    if (job.row_bytes - job.codes_bytes != (8 if bits == 8 else 4)
            or (cnp.PyArray_STRIDE(array, 1) != 1 and cnp.PyArray_DIM(array, 0) > 0)):
        return False
    job.rows = data_of(array)
    job.num_rows = cnp.PyArray_DIM(array, 0)
    job.row_stride = cnp.PyArray_STRIDE(array, 0)
    job.mapping = NULL
    job.num_embeddings = job.num_rows
    if mapping is not None:
        if integer_size(mapping) != 4 or cnp.PyArray_NDIM(<cnp.ndarray> mapping) != 1:
            return False
        job.num_embeddings = cnp.PyArray_DIM(<cnp.ndarray> mapping, 0)
        job.mapping = <const volatile int32_t *> data_of(mapping)
    # How far ahead to prefetch, in rows.
    job.prefetch_distance = max(min(8192 // job.row_bytes, 64), 8)
    return True


cdef bint take_indices(Lookup *job, object indices) noexcept:
    job.index_size = integer_size(indices)
    if job.index_size == 0:
        return False
    job.indices = data_of(indices)
    job.num_indices = cnp.PyArray_SIZE(<cnp.ndarray> indices)
    return True


cdef bint take_bags(Lookup *job, object indices, object offsets, bint include_last_offset) noexcept:
    cdef int ndim = cnp.PyArray_NDIM(<cnp.ndarray> indices)
    if offsets is None:
        if ndim != 2:
            return False
        job.offset_size = 0
        job.num_bags = cnp.PyArray_DIM(<cnp.ndarray> indices, 0)
        job.bag_length = cnp.PyArray_DIM(<cnp.ndarray> indices, 1)
        return True
    job.offset_size = integer_size(offsets)
    if ndim != 1 or job.offset_size == 0 or cnp.PyArray_NDIM(<cnp.ndarray> offsets) != 1:
        return False
    job.offsets = data_of(offsets)
    job.num_offsets = cnp.PyArray_DIM(<cnp.ndarray> offsets, 0)
    job.num_bags = job.num_offsets - include_last_offset
    return job.num_bags >= 0


cdef bint take_weights(Lookup *job, object weights, object indices) noexcept:
    cdef int axis
    job.weight_size = 0
    if weights is None:
        return True
    if not is_plain(weights) or job.mode == MAX:
        return False
    if cnp.PyArray_TYPE(<cnp.ndarray> weights) == cnp.NPY_FLOAT32:
        job.weight_size = 4
    elif cnp.PyArray_TYPE(<cnp.ndarray> weights) == cnp.NPY_FLOAT16:
        job.weight_size = 2
    else:
        return False
    job.weights = data_of(weights)
    if cnp.PyArray_NDIM(<cnp.ndarray> weights) != cnp.PyArray_NDIM(<cnp.ndarray> indices):
        return False
    for axis in range(cnp.PyArray_NDIM(<cnp.ndarray> weights)):
        if cnp.PyArray_DIM(<cnp.ndarray> weights, axis) != cnp.PyArray_DIM(<cnp.ndarray> indices, axis):
            return False
    return True


cdef Span span_of(object array) noexcept:
    """The addresses from an array's first byte to its last."""
    cdef Span span
    cdef int axis
    cdef Py_ssize_t reach
    span.low = span.high = <size_t> data_of(array)
    if array is not None and cnp.PyArray_SIZE(<cnp.ndarray> array) > 0:
        span.high += cnp.PyArray_ITEMSIZE(<cnp.ndarray> array)
        for axis in range(cnp.PyArray_NDIM(<cnp.ndarray> array)):
            reach = (cnp.PyArray_DIM(<cnp.ndarray> array, axis) - 1) * cnp.PyArray_STRIDE(<cnp.ndarray> array, axis)
            if reach < 0:
                span.low += reach
            else:
                span.high += reach
    return span


cdef bint may_overlap(object out, object other) noexcept:
    cdef Span a, b
    if other is None:
        return False
    a = span_of(out)
    b = span_of(other)
    return a.low < b.high and b.low < a.high


cdef bint take_out(Lookup *job, object out, int type_number) noexcept:
    """An output of the caller's: rows of `dim` floats, at any distance from each other but not overlapping."""
    cdef cnp.ndarray array
    if not cnp.PyArray_Check(out):
        return False
    array = <cnp.ndarray> out
    if (cnp.PyArray_TYPE(array) != type_number or cnp.PyArray_NDIM(array) != 2
            or not cnp.PyArray_ISWRITEABLE(array) or not cnp.PyArray_ISNOTSWAPPED(array)):
        return False
    if cnp.PyArray_DIM(array, 0) != job.num_bags or cnp.PyArray_DIM(array, 1) != job.dim:
        return False
    job.out_size = cnp.PyArray_ITEMSIZE(array)
    job.out_stride = cnp.PyArray_STRIDE(array, 0)
    if job.dim > 1 and job.num_bags > 0 and cnp.PyArray_STRIDE(array, 1) != job.out_size:
        return False
    if job.num_bags > 1 and abs(job.out_stride) < job.dim * job.out_size:
        return False
    job.out = <uint8_t *> cnp.PyArray_DATA(array)
    return True


cdef object run(Lookup *job, bint check_first, int num_threads, object result):
    """The lookup; `result`, or what is wrong as (argument, position, bag, value, position in indices)."""
    cdef Fault fault
    cdef bint succeeded
    with nogil:
        fault.where = NOWHERE
        if check_first and not is_in_range(job):
            fault = find_fault(job)
        succeeded = fault.where == NOWHERE and look_up_all(job, num_threads)
        if not succeeded and fault.where == NOWHERE:
            fault = find_fault(job)
    if succeeded:
        return result
    name = ("changed", "indices", "offsets", "compressed_indices_mapping")[<int> fault.where]
    return (name, fault.position, fault.bag, fault.value, fault.index_position)


cdef object finish(Lookup *job, object out, bint half, int num_threads, bint out_checked, object inputs):
    """Into `out`, or into an array made here. None where `out` is not for the loops to take, or may share memory with an
    input; `out_checked` says that somebody has made sure of that."""
    cdef cnp.npy_intp shape[2]
    cdef int type_number = cnp.NPY_FLOAT16 if half else cnp.NPY_FLOAT32
    if out is not None:
        if not (out_checked or cnp.PyArray_CheckExact(out)) or not take_out(job, out, type_number):
            return None
        if not out_checked:
            for other in inputs:
                if may_overlap(out, other):
                    return None
        return run(job, True, num_threads, out)
    shape[0] = job.num_bags
    shape[1] = job.dim
    result = cnp.PyArray_EMPTY(2, shape, type_number, 0)
    if not take_out(job, result, type_number):
        raise SystemError("an array just made is not as it was made")
    return run(job, False, num_threads, result)


def embedding_bag(object rows, int bits, Py_ssize_t dim, object mapping, object indices, object offsets,
                  bint include_last_offset, object per_sample_weights, int64_t padding_idx, int mode, object out,
                  bint half, int num_threads, bint out_checked=False):
    cdef Lookup job
    job.mode = <Mode> mode
    job.padding_idx = padding_idx
    if not (take_table(&job, rows, bits, dim, mapping) and take_indices(&job, indices)
            and take_bags(&job, indices, offsets, include_last_offset)
            and take_weights(&job, per_sample_weights, indices)):
        return None
    inputs = None if out is None else (rows, indices, offsets, per_sample_weights, mapping)
    return finish(&job, out, half, num_threads, out_checked, inputs)


def embedding(object rows, int bits, Py_ssize_t dim, object mapping, object indices, bint dequantize, object out,
              bint half, int num_threads, bint out_checked=False):
    cdef Lookup job
    # One row's maximum is its value; its sum is that added to zero, which loses the sign of a negative zero.
    job.mode = MAX if dequantize else SUM
    job.padding_idx = -1
    job.weight_size = 0
    if not take_table(&job, rows, bits, dim, mapping):
        return None
    if indices is None:
        job.index_size = 0
        job.num_indices = job.num_embeddings
    elif not take_indices(&job, indices) or cnp.PyArray_NDIM(<cnp.ndarray> indices) != 1:
        return None
    job.offset_size = 0
    job.bag_length = 1
    job.num_bags = job.num_indices
    inputs = None if out is None else (rows, indices, mapping)
    return finish(&job, out, half, num_threads, out_checked, inputs)


def max_threads():
    """OpenMP's limit at this moment; 1 without OpenMP."""
    return parallel_max_threads()


def pause_threads():
    """Ends the threads that wait for this one's next parallel region; they are started anew when needed."""
    with nogil:
        parallel_pause()


include "_quantize.pxi"
