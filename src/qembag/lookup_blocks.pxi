# Part of _kernels.pyx: a block of a row, up to sixteen groups of sixteen elements, added to the accumulators of a bag.

cdef float ONE = 1

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
    Py_ssize_t end_byte         # the block's last, or the row's: prefetched too, for rows are not aligned
    Py_ssize_t first_element    # of the output
    Py_ssize_t last_element
    bint is_short               # the whole row is smaller than what a group loads
    bint is_whole               # the output is float32, and no group ends beyond it
    const uint8_t *indices
    int index_size
    const uint8_t *weights      # of floats, or halves; without weights one float for all positions, by a step of 0
    int64_t weight_step
    int64_t padding_idx
    int64_t num_rows
    int64_t ahead               # rows that are prefetched ahead, of positions before `last`
    int64_t last


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
    block.first_byte = layout.codes_start + task.first_group * group_bytes(bits)
    block.last_byte = min(block.first_byte + (width - unit) * group_bytes(bits), codes_end - unit * group_bytes(bits))
    block.last_byte = max(block.last_byte, layout.codes_start)
    block.first_element = (block.first_byte - layout.codes_start) * (8 // bits)
    block.last_element = (block.last_byte - layout.codes_start) * (8 // bits)
    block.pair_byte = layout.pairs_start
    block.indices = job.indices
    block.index_size = job.index_size
    block.weights = job.weights if job.weight_size != 0 else <const uint8_t *> &ONE
    block.weight_step = job.weight_size
    block.padding_idx = job.padding_idx
    block.num_rows = job.num_rows
    block.ahead = task.distance
    block.last = task.limit - task.distance
    block.end_byte = block.last_byte + unit * group_bytes(bits) - 1
    if block.end_byte >= codes_end - 1:
        block.end_byte = layout.row_bytes - 1
    block.is_short = layout.row_bytes < group_bytes(bits)      # only where there is one group
    block.is_whole = job.out_size == 4 and block.last_element + unit * 16 <= layout.dim
    return block


cdef inline const uint8_t *codes_of_group(const uint8_t *row, const uint8_t *codes, const Block *block, int k,
                                          const int bits, const int width, const bint quads) noexcept nogil:
    """Of a group of the block, or of the quad that it starts; the block's codes begin at `codes`."""
    return row + block.last_byte if k == width - last_unit(bits, width, quads) else codes + k * group_bytes(bits)


cdef inline Py_ssize_t element_of_group(const Block *block, int k, const int bits, const int width,
                                        const bint quads) noexcept nogil:
    """The first element of a group in order. But for the last ones, at a constant distance from that of the block."""
    cdef int last = width - last_unit(bits, width, quads)
    return block.last_element + 16 * (k - last) if k >= last else block.first_element + 16 * k


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


cdef inline const uint8_t *first_codes(const uint8_t *row, const Block *block, const int bits,
                                       const bint quads) noexcept nogil:
    # Measured on a Zen 4: of 4 bits 1.02 to 1.03 times as fast, of 8 bits 0.95 to 1.
    return as_computed(row + block.first_byte) if bits != 2 and not quads else row + block.first_byte


cdef inline void add_row(lanes *acc, const uint8_t *row, const Block *block, lanes scale, lanes bias, const int bits,
                         const int width, const bint quads) noexcept nogil:
    cdef int num_quads = count_quads(bits, width, quads)
    cdef const uint8_t *codes = first_codes(row, block, bits, quads)
    cdef const uint8_t *group
    cdef lanes four[4]
    cdef int k, j
    for k in range(0, 4 * num_quads, 4):
        unpack_quad(codes_of_group(row, codes, block, k, bits, width, quads), four, bits, width)
        for j in range(4):
            accumulate(acc, k + j, scale, four[j], bias, bits, width, quads)
    # One by one, so that no more registers are needed than there are at AVX2.
    for k in range(4 * num_quads, width):
        group = codes_of_group(row, codes, block, k, bits, width, quads)
        accumulate(acc, k, scale, unpack(group, width == 1 and block.is_short, bits), bias, bits, width, quads)


cdef inline void max_row(lanes *acc, const uint8_t *row, const Block *block, lanes scale, lanes bias, bint is_first,
                         const int bits, const int width) noexcept nogil:
    """The first row's values are taken as they are: a NaN stays, and so does the sign of a zero."""
    cdef const uint8_t *codes = first_codes(row, block, bits, False)
    cdef lanes x
    cdef int k
    for k in range(width):
        x = unpack(codes_of_group(row, codes, block, k, bits, width, False), width == 1 and block.is_short, bits)
        x = lanes_fma(scale, x, bias)
        acc[k] = x if is_first else lanes_max(x, acc[k])


cdef inline void prefetch_row(const uint8_t *row, const Block *block, const int bits, const int width,
                              const bint quads) noexcept nogil:
    """Each cache line of a block's codes, and of the row's end. How many is fixed at compile time: a count that depends
    on the row's address is mispredicted, and halves the speed in cache."""
    # Tables read as quads of 8 bits are near (`plan_of`): into the first level of the cache. To ask that at each
    # row costs a tenth.
    cdef bint is_near = bits == 8 and quads
    cdef Py_ssize_t byte
    for byte in range(0, width * group_bytes(bits), 64):
        prefetch(row + block.first_byte + byte, is_near)
    prefetch(row + block.end_byte, is_near)


cdef inline void prefetch_any_row(const uint8_t *row, const Block *block) noexcept nogil:
    """The same where the block is not known at compile time, and a misprediction does not matter."""
    cdef Py_ssize_t byte
    prefetch(row + block.first_byte, False)
    for byte in range(block.first_byte + 64, block.end_byte, 64):
        prefetch(row + byte, False)
    prefetch(row + block.end_byte, False)


# ---- A bag's end -------------------------------------------------------------------------------------------------

cdef inline void set_zero(lanes *acc, const int width) noexcept nogil:
    cdef int k
    for k in range(width):
        acc[k] = lanes_zero()


cdef inline void copy_block(lanes *acc, const lanes *other, const int width) noexcept nogil:
    cdef int k
    for k in range(width):
        acc[k] = other[k]


cdef void store_parts(const float *values, const Lookup *job, uint8_t *out, const Block *block, int bits, int width,
                      bint quads) noexcept nogil:
    """Outputs that are not whole groups of float32. Not inlined: in each loop it would take more room than the rows."""
    cdef Py_ssize_t element
    cdef int k
    for k in range(width):
        element = element_of_group(block, k, bits, width, quads)
        store_part(out + element * job.out_size, values + 16 * k, job.layout.dim - element, job.out_size)


cdef inline void store_block(lanes *acc, const Lookup *job, uint8_t *out, const Block *block, const int bits,
                             const int width, const bint quads) noexcept nogil:
    """A bag's output, in order."""
    cdef float whole[16 * 16]
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
        store_parts(whole, job, out, block, bits, width, quads)


cdef inline void finish_bag(lanes *acc, const Lookup *job, uint8_t *out, const Block *block, Py_ssize_t count,
                            const int bits, const int width, const bint quads) noexcept nogil:
    cdef lanes share
    cdef int k
    if unlikely(job.mode == MEAN) and count > 0:
        share = lanes_broadcast(<float> 1.0 / <float> count)
        for k in range(width):
            acc[k] = lanes_mul(acc[k], share)
    store_block(acc, job, out, block, bits, width, quads)
