# Part of _kernels.pyx: a block of a row, up to sixteen vectors of sixteen elements, added to the accumulators of a bag.

cdef enum:
    # Of a `Form`: how an element is stored.
    ELEMENT = 63
    # Forms of the loops' own. Four vectors of codes are unpacked at a time:
    QUADS = 128
    # GROUPED rows with one pair, of float16, summed from plain bags. Torch's rows do not pay for pairs in front of the
    # codes.
    ONE_PAIR = 256
    # GROUPED rows, summed from plain bags, of which each two vectors from an even one on have the same pair.
    TWOS = 512

cdef float ONE = 1

# A pass over some bags.
cdef struct Pass:
    Py_ssize_t first_bag
    Py_ssize_t end_bag
    Py_ssize_t first_vector
    int width
    bint in_pairs
    bint is_first               # nothing has been prefetched for it
    int64_t limit               # where the bags that the caller goes on with end: rows are prefetched up to there
    Py_ssize_t distance         # rows that are prefetched ahead


# How a vector's codes are loaded where they are less than a vector's.
cdef enum Shortness:
    IS_WHOLE                    # as any others: what is loaded behind them is the row's, too
    IS_HALF                     # half as much is loaded
    IS_COPIED                   # no more than there is


# Which part of a row a pass adds. Copies of what the row loop reads, so that it stays in registers.
cdef struct Block:
    Py_ssize_t first_byte       # of the row
    Py_ssize_t last_byte        # where the last vector (or quad) starts
    Py_ssize_t pair_byte
    Py_ssize_t near_byte        # the first that is prefetched: `first_byte`, or the pair in front of it
    Py_ssize_t end_byte         # the block's last, or the row's: prefetched too, for rows are not aligned
    Py_ssize_t first_element    # of the output
    Py_ssize_t last_element
    Py_ssize_t codes_bytes      # of a row shorter than a vector
    Shortness shortness
    bint has_half_pairs
    bint pairs_are_apart        # not among the bytes from `near_byte` to `end_byte`, perhaps
    bint is_plainly_stored      # the output is float32, no vector ends beyond it, and nothing is left to do with it
    pair_places places          # of the pairs of groups
    const uint8_t *indices
    int index_size
    const uint8_t *weights      # of floats, or halves; without weights one float for all positions, by a step of 0
    int64_t weight_step
    int64_t padding_idx
    bint skips_invalid
    int64_t num_rows
    int64_t ahead               # rows that are prefetched ahead, of positions before `last`
    int64_t last


# ---- Forms --------------------------------------------------------------------------------------------------------

cdef inline bint is_float(const int form) noexcept nogil:
    return form & ELEMENT >= BFLOAT16_ROWS


cdef inline bint is_grouped(const int form) noexcept nogil:
    """Of any pairs, which are read for each vector, or for each two."""
    return form & (GROUPED | TWOS) != 0


cdef inline bint is_one_pair(const int form) noexcept nogil:
    return form & ONE_PAIR != 0


cdef inline bint is_torchs(const int form) noexcept nogil:
    return not is_grouped(form) and not is_float(form) and not is_one_pair(form)


cdef inline bint has_quads(const int form) noexcept nogil:
    return form & QUADS != 0


cdef inline int bits_of(const int form) noexcept nogil:
    """Of a code, or of a float."""
    return 32 if form == FLOAT32_ROWS else 16 if is_float(form) else form & ELEMENT


cdef inline Py_ssize_t vector_bytes(const int form) noexcept nogil:
    """Sixteen elements."""
    return 2 * bits_of(form)


cdef inline int count_quads(const int form, const int width) noexcept nogil:
    """How many quads a block starts with. Of 8-bit codes, half of a block of more than one: else loads would be the
    bottleneck."""
    if not has_quads(form):
        return 0
    return max(width // 8, 1) if bits_of(form) == 8 else width // 4


cdef inline int last_unit(const int form, const int width) noexcept nogil:
    """Vectors of a block's last unpacking."""
    return 4 if 4 * count_quads(form, width) == width else 1


# ---- A block of a row ---------------------------------------------------------------------------------------------

cdef void set_block(Block *block, const Lookup *job, const Pass *task, int form, int width) noexcept nogil:
    """The row's last vector (or quad) is moved back to end where the codes end, so that it needs no partial load. The
    elements that it shares with the one before come out twice: the same, or of the wrong group (see `store_block`).

    In place: a structure that is returned is copied in wide pieces, which wait for the narrow stores before them."""
    cdef const Layout *layout = &job.layout
    cdef Py_ssize_t unit = last_unit(form, width), one = vector_bytes(form)
    cdef Py_ssize_t codes_end = layout.codes_start + layout.codes_bytes
    block.first_byte = layout.codes_start + task.first_vector * one
    block.last_byte = min(block.first_byte + (width - unit) * one, codes_end - unit * one)
    block.last_byte = max(block.last_byte, layout.codes_start)
    block.first_element = 16 * task.first_vector
    block.last_element = max(
        min(block.first_element + 16 * (width - unit), layout.full_dim - 16 * unit), <Py_ssize_t> 0)
    block.pair_byte = layout.pairs_start
    block.has_half_pairs = layout.pair_size == 2
    block.indices = job.indices
    block.index_size = job.index_size
    block.weights = job.weights if job.weight_size != 0 else <const uint8_t *> &ONE
    block.weight_step = job.weight_size
    block.padding_idx = job.padding_idx
    block.skips_invalid = job.skips_invalid
    block.num_rows = job.num_rows
    block.ahead = task.distance
    block.last = task.limit - task.distance
    block.near_byte = block.first_byte
    block.end_byte = block.last_byte + unit * one - 1
    if block.end_byte >= codes_end - 1:
        block.end_byte = layout.used_bytes - 1
    if task.first_vector == 0:
        block.near_byte = min(block.first_byte, layout.pairs_start)
    block.codes_bytes = layout.codes_bytes
    block.shortness = shortness_of(layout, one) if width == 1 else IS_WHOLE
    block.is_plainly_stored = (job.out_type == FLOAT32_OUT and block.last_element + unit * 16 <= layout.dim
                               and job.mode != AVERAGE and job.mode != SQRTN)
    block.pairs_are_apart = is_grouped(form)
    if is_grouped(form):
        find_places(layout, task.first_vector, width, block)


cdef Shortness shortness_of(const Layout *layout, Py_ssize_t one) noexcept nogil:
    """Of rows shorter than a vector, to which no other has to do with it."""
    cdef Py_ssize_t there = layout.used_bytes - layout.codes_start
    if layout.codes_bytes >= one or there >= one:
        return IS_WHOLE
    if 4 <= layout.bits <= 8 and layout.codes_bytes <= one // 2 <= there:
        return IS_HALF
    return IS_COPIED


cdef void find_places(const Layout *layout, Py_ssize_t first_vector, int width, Block *block) noexcept nogil:
    """Which pair each vector of a block has: its last element's."""
    cdef Py_ssize_t first = 16 * first_vector // layout.group_size, group = 0, pair_bytes = 2 * layout.pair_size
    cdef Py_ssize_t pair_byte = layout.pairs_start + pair_bytes * first
    cdef Py_ssize_t byte = min(pair_byte, layout.used_bytes - 8 * pair_bytes), back = 0
    cdef int k
    # Eight pairs at once, if need be from further back: a masked load waits where its page is not in the first TLB.
    block.places.are_eight = byte >= 0 and (pair_byte - byte) % pair_bytes == 0
    if block.places.are_eight:
        back = (pair_byte - byte) // pair_bytes
    for k in range(8):
        if k < width:
            group = min(16 * (first_vector + k) + 15, layout.dim - 1) // layout.group_size - first
        block.places.of_vector[k] = <int32_t> (group + back)
    block.places.count = <int> group + 1
    block.places.are_halves = block.has_half_pairs
    block.pair_byte = pair_byte - back * pair_bytes


cdef inline const uint8_t *codes_of_vector(const uint8_t *row, const uint8_t *codes, const Block *block, int k,
                                           const int form, const int width) noexcept nogil:
    """Of a vector of the block, or of the quad that it starts; the block's codes begin at `codes`."""
    return row + block.last_byte if k == width - last_unit(form, width) else codes + k * vector_bytes(form)


cdef inline Py_ssize_t element_of_vector(const Block *block, int k, const int form, const int width) noexcept nogil:
    """The first element of a vector in order. But for the last ones, at a constant distance from that of the block."""
    cdef int last = width - last_unit(form, width)
    return block.last_element + 16 * (k - last) if k >= last else block.first_element + 16 * k


cdef inline lanes unpack_bytes(const uint8_t *p, const int form) noexcept nogil:
    if form == FLOAT32_ROWS:
        return unpack_float32(p)
    if form == FLOAT16_ROWS:
        return unpack_float16(p)
    if form == BFLOAT16_ROWS:
        return unpack_bfloat16(p)
    return unpack_8bit(p) if bits_of(form) == 8 else unpack_4bit(p) if bits_of(form) == 4 else unpack_2bit(p)


cdef inline lanes unpack(const uint8_t *p, const Block *block, const int form, const int width) noexcept nogil:
    """A vector's elements as floats, before scale and bias."""
    cdef uint8_t copy[64]
    if width == 1 and unlikely(block.shortness != IS_WHOLE):
        if form & ELEMENT == 8 and block.shortness == IS_HALF:
            return unpack_8bit_short(p)
        if form & ELEMENT == 4 and block.shortness == IS_HALF:
            return unpack_4bit_short(p)
        if is_torchs(form):
            return unpack_bytes(p, form)    # behind their codes there is a pair: they are never copied
        if form == FLOAT32_ROWS:
            return lanes_load_part(p, block.codes_bytes // 4, lanes_zero())
        memset(copy, 0, sizeof(copy))
        memcpy(copy, p, block.codes_bytes)
        return unpack_bytes(copy, form)
    return unpack_bytes(p, form)


cdef inline void unpack_quad(const uint8_t *p, lanes *x, const int form, const int width) noexcept nogil:
    if bits_of(form) == 8 and width == 4:
        unpack_quad_8bit(p, x)
    elif bits_of(form) == 8:
        unpack_quad_8bit_by_loads(p, x)
    else:
        unpack_quad_2bit(p, x)


cdef inline void read_pair(const uint8_t *row, const Block *block, lanes *scale, lanes *bias,
                           const int form) noexcept nogil:
    if bits_of(form) == 8 and not is_one_pair(form):
        read_pair_float(row + block.pair_byte, scale, bias)
    else:
        read_pair_half(row + block.pair_byte, scale, bias)


cdef inline void accumulate(lanes *acc, int k, lanes scale, lanes x, lanes bias, const int form) noexcept nogil:
    """acc[k] = fma(scale, x, acc[k] + bias)"""
    if bits_of(form) == 8 and has_quads(form) and k % 2 == 0:
        acc[k] = lanes_fma(scale, x, lanes_add_by_fma(acc[k], bias))
    else:
        lanes_accumulate(&acc[k], scale, x, bias)


cdef inline const uint8_t *first_codes(const uint8_t *row, const Block *block, const int form) noexcept nogil:
    # Measured on a Zen 4: of 4 bits 1.02 to 1.03 times as fast, of 8 bits 0.95 to 1.
    if bits_of(form) == 2 or has_quads(form):
        return row + block.first_byte
    return as_computed(row + block.first_byte)


cdef inline void add_codes(lanes *acc, const uint8_t *row, const Block *block, lanes scale, lanes bias, const int form,
                           const int width) noexcept nogil:
    cdef int num_quads = count_quads(form, width)
    cdef const uint8_t *codes = first_codes(row, block, form)
    cdef const uint8_t *vector
    cdef lanes four[4]
    cdef int k, j
    for k in range(0, 4 * num_quads, 4):
        unpack_quad(codes_of_vector(row, codes, block, k, form, width), four, form, width)
        for j in range(4):
            accumulate(acc, k + j, scale, four[j], bias, form)
    # One by one, so that no more registers are needed than there are at AVX2.
    for k in range(4 * num_quads, width):
        vector = codes_of_vector(row, codes, block, k, form, width)
        accumulate(acc, k, scale, unpack(vector, block, form, width), bias, form)


cdef inline void add_groups(lanes *acc, const uint8_t *row, const Block *block, float weight, const bint is_weighted,
                            const int form, const int width) noexcept nogil:
    """Each vector with its own pair. By way of memory: an addition and an fma can take a number for all lanes from
    there, and shuffles would be the bottleneck."""
    cdef const uint8_t *codes = first_codes(row, block, form)
    cdef const uint8_t *vector
    cdef float pairs[16]
    cdef lanes four[4]
    cdef lanes scale, bias
    cdef int num_quads = count_quads(form, width), k, j
    spread_pairs(row + block.pair_byte, &block.places, pairs, weight, is_weighted, width)
    for k in range(0, 4 * num_quads, 4):
        scale = pairs_of_quad(pairs, 2 * k)
        bias = pairs_of_quad(pairs, 2 * k + 1)
        unpack_quad(codes_of_vector(row, codes, block, k, form, width), four, form, width)
        for j in range(4):
            accumulate(acc, k + j, scale, four[j], bias, form)
    for k in range(4 * num_quads, min(width, 8)):       # no block of groups is wider
        if k % 2 == 0 or form & TWOS == 0:
            scale = lanes_broadcast(pairs[2 * k])
            bias = lanes_broadcast(pairs[2 * k + 1])
        vector = codes_of_vector(row, codes, block, k, form, width)
        accumulate(acc, k, scale, unpack(vector, block, form, width), bias, form)


cdef inline void add_floats(lanes *acc, const uint8_t *row, const Block *block, float weight, const bint is_weighted,
                            const int form, const int width) noexcept nogil:
    cdef const uint8_t *elements = first_codes(row, block, form)
    cdef lanes weights = lanes_broadcast(weight)
    cdef lanes x
    cdef int k
    for k in range(width):
        x = unpack(codes_of_vector(row, elements, block, k, form, width), block, form, width)
        acc[k] = lanes_fma(weights, x, acc[k]) if is_weighted else lanes_add(acc[k], x)


cdef inline void add_row(lanes *acc, const uint8_t *row, const Block *block, float weight, const bint is_weighted,
                         const int form, const int width) noexcept nogil:
    cdef lanes scale, bias, weights
    if is_float(form):
        add_floats(acc, row, block, weight, is_weighted, form, width)
        return
    if is_grouped(form):
        add_groups(acc, row, block, weight, is_weighted, form, width)
        return
    read_pair(row, block, &scale, &bias, form)
    if is_weighted:
        weights = lanes_broadcast(weight)
        scale = lanes_mul(scale, weights)
        bias = lanes_mul(bias, weights)
    add_codes(acc, row, block, scale, bias, form, width)


cdef inline void max_row(lanes *acc, const uint8_t *row, const Block *block, bint is_first, const int form,
                         const int width) noexcept nogil:
    """The first row's values are taken as they are: a NaN stays, and so does the sign of a zero."""
    cdef const uint8_t *codes = first_codes(row, block, form)
    cdef float pairs[16]
    cdef lanes x, scale, bias
    cdef int k
    if is_grouped(form):
        spread_pairs(row + block.pair_byte, &block.places, pairs, 1, False, width)
    elif not is_float(form):
        read_pair(row, block, &scale, &bias, form)
    for k in range(width):
        x = unpack(codes_of_vector(row, codes, block, k, form, width), block, form, width)
        if is_grouped(form) and k < 8:
            x = lanes_fma(lanes_broadcast(pairs[2 * k]), x, lanes_broadcast(pairs[2 * k + 1]))
        elif not is_float(form):
            x = lanes_fma(scale, x, bias)
        acc[k] = x if is_first else lanes_max(x, acc[k])


# ---- Prefetching ---------------------------------------------------------------------------------------------------

cdef inline void prefetch_row(const uint8_t *row, const Block *block, const int form, const int width) noexcept nogil:
    """Each cache line of a block's codes, and of the row's end. How many is fixed at compile time: a count that depends
    on the row's address is mispredicted, and halves the speed in cache."""
    # Tables read as quads of 8 bits are near (`pays_quads`): into the first level of the cache. To ask that at each
    # row costs a tenth.
    cdef bint is_near = bits_of(form) == 8 and has_quads(form)
    cdef Py_ssize_t byte, first = block.near_byte if is_grouped(form) or is_one_pair(form) else block.first_byte
    for byte in range(0, width * vector_bytes(form), 64):
        prefetch(row + first + byte, is_near)
    prefetch(row + block.end_byte, is_near)
    if is_grouped(form):
        prefetch(row + block.pair_byte, is_near)


cdef inline void prefetch_any_row(const uint8_t *row, const Block *block) noexcept nogil:
    """The same where the block is not known at compile time, and a misprediction does not matter."""
    cdef Py_ssize_t byte
    prefetch(row + block.near_byte, False)
    for byte in range(block.near_byte + 64, block.end_byte, 64):
        prefetch(row + byte, False)
    prefetch(row + block.end_byte, False)
    if block.pairs_are_apart:
        prefetch(row + block.pair_byte, False)


# ---- A bag's end -------------------------------------------------------------------------------------------------

cdef inline void set_zero(lanes *acc, const int width) noexcept nogil:
    cdef int k
    for k in range(width):
        acc[k] = lanes_zero()


cdef inline void copy_block(lanes *acc, const lanes *other, const int width) noexcept nogil:
    cdef int k
    for k in range(width):
        acc[k] = other[k]


cdef void store_parts(float *values, const Lookup *job, uint8_t *out, const Block *block, int form, int width,
                      float divisor) noexcept nogil:
    """Outputs that are not whole vectors of float32, or are still to be divided. Not inlined: in each loop it would
    take more room than the rows."""
    cdef Py_ssize_t element
    cdef int k
    for k in range(width - 1, -1, -1):
        if divisor != 1:
            lanes_store(values + 16 * k, lanes_zero() if divisor == 0 else
                        lanes_div(lanes_load(values + 16 * k), lanes_broadcast(divisor)))
        element = element_of_vector(block, k, form, width)
        store_part(out + element * job.out_size, values + 16 * k, job.layout.dim - element, job.out_type)


cdef inline void store_block(lanes *acc, const Lookup *job, uint8_t *out, const Block *block, const int form,
                             const int width, Py_ssize_t bag) noexcept nogil:
    """A bag's output, in order. Vectors from the last to the first: what the last one, moved back, has of the one
    before it may be of another group."""
    cdef float whole[16 * 16]
    cdef float divisor = 1
    cdef int k
    for k in range(0, 4 * count_quads(form, width), 4):
        lanes_in_order_quad(&acc[k])
    if bits_of(form) == 4:
        for k in range(width):
            acc[k] = lanes_in_order_4bit(acc[k])
    if not unlikely(not block.is_plainly_stored):
        for k in range(width - 1, -1, -1):
            lanes_store(<float *> out + element_of_vector(block, k, form, width), acc[k])
    else:
        # By way of memory: values that lived across a call would have no registers in the row loop either.
        for k in range(width):
            lanes_store(whole + 16 * k, acc[k])
        if job.mode == AVERAGE or job.mode == SQRTN:
            divisor = divisor_of(job, block, bag)
        store_parts(whole, job, out, block, form, width, divisor)


cdef inline void finish_bag(lanes *acc, const Lookup *job, uint8_t *out, const Block *block, Py_ssize_t bag,
                            Py_ssize_t count, const int form, const int width) noexcept nogil:
    """`count` of the bag's indices are counted by a mean."""
    cdef lanes share
    cdef int k
    if unlikely(job.mode == MEAN) and count > 0:
        share = lanes_broadcast(<float> count if is_float(form) else <float> 1.0 / <float> count)
        for k in range(width):
            acc[k] = lanes_div(acc[k], share) if is_float(form) else lanes_mul(acc[k], share)
    store_block(acc, job, out, block, form, width, bag)
