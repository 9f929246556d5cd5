# Part of _kernels.pyx: rows of floats to codes, byte for byte as the reference's prepack operators make them.
#
# All arithmetic is in float32 and each operation rounds once: the formulas are those of
# FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf and FloatOrHalfToFused8BitRowwiseQuantizedSBFloat (FBGEMM) and, for
# the greedy search, of choose_qparams_optimized (PyTorch). A product is never fused with a sum here.

cdef enum RowFault:
    FINE
    NOT_FINITE      # a NaN or an infinity in the row
    TOO_WIDE        # scale or bias overflow the row's tail
    NO_MEMORY

cdef struct Quantize:
    const float *weights
    Py_ssize_t num_rows
    Py_ssize_t dim
    int bits
    uint8_t *out
    Py_ssize_t out_stride
    const float *bounds         # NULL, or the minimum and maximum to use for each row
    bint greedy
    float num_bins
    float kept_bins             # the search stops at this many of the bins

# Rows are quantized in blocks: first the bounds of each, then scales and biases of all at once, a lane each, then the
# codes of each, while its elements are still in the first-level cache.
cdef enum:
    BLOCK_ROWS = 16             # the lanes
    # Of these and twice and four times as many, rows of 1024 are 1.0, 1.2 and 1.3 times as slow. The processor finds
    # the next rows by itself: to prefetch them made it slower by up to a third.
    BLOCK_ELEMENTS = 2048


cdef inline lanes load_part(const float *p, Py_ssize_t count, lanes fill) noexcept nogil:
    """Sixteen floats of which `count` are there."""
    return lanes_load(p) if count >= 16 else lanes_load_part(p, count, fill)


cdef bint is_finite(const float *row, Py_ssize_t dim) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(dim):
        if not isfinite(row[i]):
            return False
    return True


cdef inline void pack(codes *p, lanes x) noexcept nogil:
    if codes is codes_8bit:
        pack_8bit(<uint8_t *> p, x)
    elif codes is codes_4bit:
        pack_4bit(<uint8_t *> p, x)
    else:
        pack_2bit(<uint8_t *> p, x)


cdef inline void pack_four(codes *p, lanes a, lanes b, lanes c, lanes d) noexcept nogil:
    if codes is codes_8bit:
        pack_four_8bit(<uint8_t *> p, a, b, c, d)
    elif codes is codes_4bit:
        pack_four_4bit(<uint8_t *> p, a, b, c, d)
    else:
        pack_four_2bit(<uint8_t *> p, a, b, c, d)


cdef void squared_errors(const float *row, Py_ssize_t dim, float low, float high, float max_code,
                         float *squares) noexcept nogil:
    cdef float bias = float_of_half(half_of_float(low))
    cdef float width = high - bias
    cdef float scale = 1 if width == 0 else float_of_half(half_of_float(width / max_code))
    cdef lanes biases = lanes_broadcast(bias)
    cdef lanes scales = lanes_broadcast(scale)
    cdef lanes inverses = lanes_broadcast(1 if scale == 0 else 1 / scale)
    cdef lanes top = lanes_broadcast(max_code)
    cdef lanes x, code, error
    cdef Py_ssize_t i
    for i in range(0, dim, 16):
        x = load_part(row + i, dim - i, lanes_zero())
        code = lanes_mul(lanes_sub(x, biases), inverses)
        code = lanes_round(lanes_max(lanes_min(top, code), lanes_zero()))
        error = lanes_sub(x, lanes_add(lanes_mul(code, scales), biases))
        lanes_store(squares + i, lanes_mul(error, error))


cdef void search(const Quantize *job, const float *row, float *scratch, float *low, float *high) noexcept nogil:
    """Narrows the bounds step by step from whichever end loses less, and keeps the pair that the search first saw as
    best. The losses' sums run strictly from left to right, as the reference's do: another order, other bytes."""
    cdef float max_code = <float> ((1 << job.bits) - 1)
    cdef Py_ssize_t room = (job.dim + 15) // 16 * 16
    cdef float step = (high[0] - low[0]) / job.num_bins
    cdef float threshold = job.kept_bins * step
    cdef float current_low = low[0], current_high = high[0]
    cdef float loss = 0, best, raised, lowered
    cdef float next_low, next_high
    cdef Py_ssize_t i
    squared_errors(row, job.dim, current_low, current_high, max_code, scratch)
    for i in range(job.dim):
        loss = loss + scratch[i]
    loss = best = sqrtf(loss)
    while current_low + threshold < current_high:
        next_low = current_low + step
        next_high = current_high - step
        squared_errors(row, job.dim, next_low, current_high, max_code, scratch)
        squared_errors(row, job.dim, current_low, next_high, max_code, scratch + room)
        raised = lowered = 0
        for i in range(job.dim):
            raised = raised + scratch[i]
            lowered = lowered + scratch[room + i]
        raised = sqrtf(raised)
        lowered = sqrtf(lowered)
        if loss < raised and loss < lowered and loss < best:
            best = loss
            low[0] = current_low
            high[0] = current_high
        if raised < lowered:
            if next_low == current_low:
                return      # the step is lost in rounding: the reference never comes back from here
            current_low = next_low
            loss = raised
        else:
            if next_high == current_high:
                return
            current_high = next_high
            loss = lowered


cdef Py_ssize_t quantize_block(codes *unused, const Quantize *job, Py_ssize_t first, Py_ssize_t count, float *scratch,
                               RowFault *fault) noexcept nogil:
    """The first row that could not be quantized, with its fault; -1 where all were. At most BLOCK_ROWS rows."""
    cdef int codes_per_byte = 1 if codes is codes_8bit else 2 if codes is codes_4bit else 4
    cdef Py_ssize_t group_bytes = 16 // codes_per_byte
    cdef Py_ssize_t tail_bytes = 8 if codes is codes_8bit else 4
    cdef float max_code = 255 if codes is codes_8bit else 15 if codes is codes_4bit else 3
    cdef Py_ssize_t dim = job.dim
    cdef Py_ssize_t codes_bytes = (dim - 1) // codes_per_byte + 1
    cdef Py_ssize_t bad = -1
    # Of each row four floats with the least among them, and four with the greatest.
    cdef float lows[4 * BLOCK_ROWS]
    cdef float highs[4 * BLOCK_ROWS]
    cdef float scales[BLOCK_ROWS]
    cdef float biases[BLOCK_ROWS]
    cdef float inverses[BLOCK_ROWS]
    cdef uint16_t half_scales[BLOCK_ROWS]
    cdef uint16_t half_biases[BLOCK_ROWS]
    cdef uint8_t short_codes[16]
    cdef lanes sums = lanes_zero()
    cdef lanes top = lanes_broadcast(max_code)
    cdef lanes x, y, z, w, minima, maxima, low, high, width, scale, bias, inverse
    cdef const float *row
    cdef uint8_t *out
    cdef Py_ssize_t number, i

    for number in range(count):
        row = job.weights + (first + number) * dim
        if dim < 16:
            minima = maxima = lanes_load_part(row, dim, lanes_broadcast(row[0]))
            sums = lanes_add(sums, minima)
        else:
            minima = maxima = lanes_load(row)
            sums = lanes_add(sums, minima)
            for i in range(16, dim - 15, 16):
                x = lanes_load(row + i)
                minima = lanes_min(minima, x)
                maxima = lanes_max(maxima, x)
                sums = lanes_add(sums, x)
            if dim % 16 != 0:
                # The last group ends where the row does; what it shares with the one before it counts twice.
                x = lanes_load(row + dim - 16)
                minima = lanes_min(minima, x)
                maxima = lanes_max(maxima, x)
                sums = lanes_add(sums, x)
        four_leasts(lows + 4 * number, minima)
        four_greatests(highs + 4 * number, maxima)
    for i in range(4 * count, 4 * BLOCK_ROWS):
        lows[i] = highs[i] = 0
    low = leasts_of_fours(lows)
    high = greatests_of_fours(highs)
    # No sum with an infinity or a NaN in it is finite. One of large numbers may not be either.
    if not lanes_all_finite(sums):
        for number in range(count):
            if not is_finite(job.weights + (first + number) * dim, dim):
                bad = first + number
                fault[0] = NOT_FINITE
                count = number      # what is wrong with a row before this one comes first
                break
    if job.greedy or job.bounds != NULL:
        lanes_store(lows, low)
        lanes_store(highs, high)
        for number in range(count):
            if job.greedy:
                search(job, job.weights + (first + number) * dim, scratch, &lows[number], &highs[number])
            else:
                lows[number] = job.bounds[2 * (first + number)]
                highs[number] = job.bounds[2 * (first + number) + 1]
        low = lanes_load(lows)
        high = lanes_load(highs)

    # code = clamp(rint((x - bias) * inverse)), x ~ code * scale + bias
    if codes is codes_8bit:
        bias = low
        width = lanes_sub(high, bias)
        scale = lanes_div(width, top)
        inverse = lanes_div(top, lanes_add(width, lanes_broadcast(<float> 1e-8)))
    else:
        bias = lanes_through_half(low)
        width = lanes_sub(high, bias)
        # 1 where the width is zero or too small for a half; so no inverse is infinite.
        scale = lanes_nonzero(lanes_through_half(lanes_div(width, top)))
        inverse = lanes_div(lanes_broadcast(1), scale)
        lanes_store_half(half_scales, scale)
        lanes_store_half(half_biases, bias)
    lanes_store(scales, scale)
    lanes_store(biases, bias)
    lanes_store(inverses, inverse)
    if not (lanes_all_finite(scale) and lanes_all_finite(bias)):
        for number in range(count):
            if not (isfinite(scales[number]) and isfinite(biases[number])):
                fault[0] = TOO_WIDE
                return first + number
    if bad >= 0:
        return bad

    for number in range(count):
        row = job.weights + (first + number) * dim
        out = job.out + (first + number) * job.out_stride
        bias = lanes_broadcast(biases[number])
        inverse = lanes_broadcast(inverses[number])
        if dim < 16:
            x = lanes_min(top, lanes_mul(lanes_sub(lanes_load_part(row, dim, bias), bias), inverse))
            if codes_bytes + tail_bytes >= group_bytes:
                pack(<codes *> out, x)      # the tail will cover what lies behind the codes
            else:
                pack(<codes *> short_codes, x)
                memcpy(out, short_codes, codes_bytes)
        else:
            for i in range(0, dim - 63, 64):
                x = lanes_min(top, lanes_mul(lanes_sub(lanes_load(row + i), bias), inverse))
                y = lanes_min(top, lanes_mul(lanes_sub(lanes_load(row + i + 16), bias), inverse))
                z = lanes_min(top, lanes_mul(lanes_sub(lanes_load(row + i + 32), bias), inverse))
                w = lanes_min(top, lanes_mul(lanes_sub(lanes_load(row + i + 48), bias), inverse))
                pack_four(<codes *> (out + i // codes_per_byte), x, y, z, w)
            for i in range(dim // 64 * 64, dim - 15, 16):
                x = lanes_min(top, lanes_mul(lanes_sub(lanes_load(row + i), bias), inverse))
                pack(<codes *> (out + i // codes_per_byte), x)
            if dim % 16 != 0:
                # The last group ends where the codes do. Elements that are not there have the bias: code zero.
                i = codes_bytes * codes_per_byte - 16
                x = lanes_min(top, lanes_mul(lanes_sub(load_part(row + i, dim - i, bias), bias), inverse))
                pack(<codes *> (out + codes_bytes - group_bytes), x)
        out += codes_bytes
        if codes is codes_8bit:
            write_le32(out, bits_of_float(scales[number]))
            write_le32(out + 4, bits_of_float(biases[number]))
        else:
            write_le16(out, half_scales[number])
            write_le16(out + 2, half_biases[number])
    return -1


cdef Py_ssize_t quantize_rows(codes *unused, const Quantize *job, Py_ssize_t first, Py_ssize_t end, float *scratch,
                              RowFault *fault) noexcept nogil:
    cdef Py_ssize_t at_once = max(min(BLOCK_ELEMENTS // job.dim, <Py_ssize_t> BLOCK_ROWS), 1)
    cdef Py_ssize_t bad = -1
    while first < end and bad < 0:
        bad = quantize_block[codes](NULL, job, first, min(at_once, end - first), scratch, fault)
        first += at_once
    return bad


cdef Py_ssize_t quantize_chunk(const Quantize *job, Py_ssize_t first, Py_ssize_t end, RowFault *fault) noexcept nogil:
    """The first row that could not be quantized, with its fault; -1 where all were."""
    cdef Py_ssize_t bad
    cdef float *scratch = NULL
    fault[0] = FINE
    if job.greedy:
        # calloc sees to it that the product fits an address of 32 bits.
        scratch = <float *> calloc(2 * ((job.dim + 15) // 16), 16 * sizeof(float))
        if scratch == NULL:
            fault[0] = NO_MEMORY
            return first
    if job.bits == 8:
        bad = quantize_rows[codes_8bit](NULL, job, first, end, scratch, fault)
    elif job.bits == 4:
        bad = quantize_rows[codes_4bit](NULL, job, first, end, scratch, fault)
    else:
        bad = quantize_rows[codes_2bit](NULL, job, first, end, scratch, fault)
    free(scratch)
    return bad


cdef inline Py_ssize_t chunk_start(Py_ssize_t first, Py_ssize_t end, Py_ssize_t chunk,
                                   Py_ssize_t num_chunks) noexcept nogil:
    return first + <Py_ssize_t> (<int64_t> chunk * (end - first) // num_chunks)


# One call's chunks, and the threads that take them (see parallel.h).
cdef struct QuantizeShared:
    const Quantize *job
    Py_ssize_t first
    Py_ssize_t end
    int num_chunks
    int num_taken
    RowFault *faults
    Py_ssize_t *rows_at_fault


cdef void quantize_left(QuantizeShared *shared) noexcept nogil:
    """Chunk by chunk, what nobody has taken."""
    cdef int chunk
    while True:
        chunk = parallel_add(&shared.num_taken, 1)
        if chunk >= shared.num_chunks:
            return
        shared.rows_at_fault[chunk] = quantize_chunk(
            shared.job, chunk_start(shared.first, shared.end, chunk, shared.num_chunks),
            chunk_start(shared.first, shared.end, chunk + 1, shared.num_chunks), &shared.faults[chunk])


cdef void quantize_chunks(void *argument, int num_threads) noexcept nogil:
    cdef QuantizeShared *shared = <QuantizeShared *> argument
    cdef int worker
    if num_threads == 1:
        quantize_left(shared)
    else:
        for worker in prange(num_threads, schedule="static", chunksize=1, num_threads=num_threads):
            quantize_left(shared)


def quantize(object weights, int bits, object out, object bounds, bint greedy, int64_t num_bins, double ratio,
             int num_threads):
    """Rows of float32 into `out`: None, or (what is wrong, row)."""
    cdef Quantize job
    cdef RowFault faults[MAX_CHUNKS]
    cdef Py_ssize_t rows_at_fault[MAX_CHUNKS]
    cdef Py_ssize_t chunk, num_chunks, first = 0, end
    cdef double work = FIRST_PIECE, started = 0, row_work
    cdef bint in_pieces
    cdef int chunk_threads
    cdef QuantizeShared shared
    if not (is_plain(weights) and cnp.PyArray_TYPE(<cnp.ndarray> weights) == cnp.NPY_FLOAT32
            and cnp.PyArray_NDIM(<cnp.ndarray> weights) == 2 and cnp.PyArray_DIM(<cnp.ndarray> weights, 1) > 0):
        raise TypeError("weights must be float32 rows in one piece")
    if not (is_plain(out) and cnp.PyArray_TYPE(<cnp.ndarray> out) == cnp.NPY_UINT8
            and cnp.PyArray_NDIM(<cnp.ndarray> out) == 2
            and cnp.PyArray_DIM(<cnp.ndarray> out, 0) == cnp.PyArray_DIM(<cnp.ndarray> weights, 0)
            and cnp.PyArray_DIM(<cnp.ndarray> out, 1)
            == (cnp.PyArray_DIM(<cnp.ndarray> weights, 1) - 1) // (8 // bits) + 1 + (8 if bits == 8 else 4)):
        raise TypeError("out must be uint8 rows as long as the packed ones")
    if bounds is not None and not (
            is_plain(bounds) and cnp.PyArray_TYPE(<cnp.ndarray> bounds) == cnp.NPY_FLOAT32
            and cnp.PyArray_SIZE(<cnp.ndarray> bounds) == 2 * cnp.PyArray_DIM(<cnp.ndarray> weights, 0)):
        raise TypeError("bounds must be a float32 minimum and maximum for each row")
    job.weights = <const float *> data_of(weights)
    job.num_rows = cnp.PyArray_DIM(<cnp.ndarray> weights, 0)
    job.dim = cnp.PyArray_DIM(<cnp.ndarray> weights, 1)
    job.bits = bits
    job.out = <uint8_t *> data_of(out)
    job.out_stride = cnp.PyArray_STRIDE(<cnp.ndarray> out, 0)
    job.bounds = NULL
    if bounds is not None:
        job.bounds = <const float *> data_of(bounds)
    job.greedy = greedy
    job.num_bins = <float> num_bins
    # Not cut to a whole number, and with the ratio in double: so torch 2.13.0 has it.
    job.kept_bins = <float> (<double> job.num_bins * (1 - ratio))
    if num_threads == 0:
        num_threads = parallel_max_threads()
    num_threads = min(num_threads, MAX_CHUNKS // CHUNKS_A_THREAD)
    # By the measure of lookups: the greedy search goes over a row twice for each bin; min-max takes less than a
    # lookup's row from memory.
    row_work = (job.dim + 64) * (2.0 * num_bins if greedy else 0.25)
    in_pieces = job.num_rows * row_work > FIRST_PIECE and is_main_thread()
    if in_pieces:
        started = parallel_clock()
    while first < job.num_rows:
        end = job.num_rows
        if in_pieces:
            end = first + <Py_ssize_t> min(max(work / row_work, 1.0), <double> (job.num_rows - first))
        with nogil:
            num_chunks = 1
            if (end - first) * row_work < min_parallel_work() * (1 if greedy else 0.25):
                rows_at_fault[0] = quantize_chunk(&job, first, end, &faults[0])
            else:
                chunk_threads = parallel_enter(num_threads)
                if chunk_threads > 1:
                    num_chunks = min(<Py_ssize_t> (CHUNKS_A_THREAD * chunk_threads), end - first)
                    chunk_threads = min(<Py_ssize_t> chunk_threads, num_chunks)
                shared.job = &job
                shared.first = first
                shared.end = end
                shared.num_chunks = num_chunks
                shared.num_taken = 0
                shared.faults = faults
                shared.rows_at_fault = rows_at_fault
                parallel_run(quantize_chunks, &shared, chunk_threads)
                parallel_leave()
        for chunk in range(num_chunks):
            if faults[chunk] == NO_MEMORY:
                raise MemoryError
            if faults[chunk] != FINE:
                return ("not finite" if faults[chunk] == NOT_FINITE else "too wide", rows_at_fault[chunk])
        first = end
        if first < job.num_rows:
            end_piece(&work, &started)
    return None
