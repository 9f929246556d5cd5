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

# How a row is mapped to codes: code = clamp(rint((x - bias) * inverse)), x ~ code * scale + bias.
cdef struct Mapping:
    float scale
    float bias
    float inverse


cdef inline lanes load_part(const float *p, Py_ssize_t count, float fill) noexcept nogil:
    """Sixteen floats of which `count` are there."""
    cdef float values[16]
    cdef int i
    if count >= 16:
        return lanes_load(p)
    for i in range(16):
        values[i] = p[i] if i < count else fill
    return lanes_load(values)


cdef RowFault find_bounds(const float *row, Py_ssize_t dim, float *low, float *high) noexcept nogil:
    cdef lanes minima = lanes_broadcast(row[0])
    cdef lanes maxima = minima
    cdef lanes zeros = lanes_zero()
    cdef lanes nothing = lanes_zero()
    cdef lanes x
    cdef float values[16]
    cdef Py_ssize_t i
    for i in range(0, dim, 16):
        x = load_part(row + i, dim - i, row[0])
        minima = lanes_min(minima, x)
        maxima = lanes_max(maxima, x)
        # Stays zero while all is finite; infinity and NaN times zero are NaN.
        zeros = lanes_add(zeros, lanes_mul(x, nothing))
    lanes_store(values, zeros)
    for i in range(16):
        if values[i] != 0:
            return NOT_FINITE
    lanes_store(values, minima)
    low[0] = values[0]
    for i in range(1, 16):
        low[0] = min(low[0], values[i])
    lanes_store(values, maxima)
    high[0] = values[0]
    for i in range(1, 16):
        high[0] = max(high[0], values[i])
    return FINE


cdef Mapping map_8bit(float low, float high) noexcept nogil:
    cdef Mapping m
    cdef float width = high - low
    m.scale = width / <float> 255
    m.bias = low
    m.inverse = <float> 255 / (width + <float> 1e-8)
    return m


cdef Mapping map_few_bits(float low, float high, float max_code) noexcept nogil:
    cdef Mapping m
    cdef float width
    m.bias = float_of_half(half_of_float(low))
    width = high - m.bias
    m.scale = float_of_half(half_of_float(1 if width == 0 else width / max_code))
    if m.scale == 0:
        m.scale = 1
    m.inverse = 1 / m.scale
    if m.inverse == INFINITY or m.inverse == -INFINITY:
        m.scale = m.inverse = 1
    return m


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
        x = load_part(row + i, dim - i, 0)
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


cdef RowFault quantize_row(const Quantize *job, Py_ssize_t number, float *scratch) noexcept nogil:
    cdef const float *row = job.weights + number * job.dim
    cdef uint8_t *out = job.out + number * job.out_stride
    cdef uint8_t codes[16]
    cdef uint8_t packed[16]
    cdef int codes_per_byte = 8 // job.bits
    cdef Py_ssize_t codes_bytes = (job.dim - 1) // codes_per_byte + 1
    cdef float max_code = <float> ((1 << job.bits) - 1)
    cdef float low = 0, high = 0
    cdef Mapping m
    cdef lanes biases, inverses, top, x
    cdef Py_ssize_t i, count, byte, bytes_here
    cdef RowFault fault = find_bounds(row, job.dim, &low, &high)
    if fault != FINE:
        return fault
    if job.greedy:
        search(job, row, scratch, &low, &high)
    elif job.bounds != NULL:
        low = job.bounds[2 * number]
        high = job.bounds[2 * number + 1]
    m = map_8bit(low, high) if job.bits == 8 else map_few_bits(low, high, max_code)
    if not (isfinite(m.scale) and isfinite(m.bias)):
        return TOO_WIDE
    biases = lanes_broadcast(m.bias)
    inverses = lanes_broadcast(m.inverse)
    top = lanes_broadcast(max_code)
    for i in range(0, job.dim, 16):
        count = min(job.dim - i, 16)
        x = load_part(row + i, count, 0)
        x = lanes_mul(lanes_sub(x, biases), inverses)
        lanes_round_to_bytes(codes, lanes_max(lanes_min(top, x), lanes_zero()))
        if count < 16:
            memset(codes + count, 0, 16 - count)
        byte = i // codes_per_byte
        bytes_here = min(codes_bytes - byte, 16 // codes_per_byte)
        if job.bits == 8:
            memcpy(out + byte, codes, bytes_here)
        else:
            if job.bits == 4:
                pack_4bit(packed, codes)
            else:
                pack_2bit(packed, codes)
            memcpy(out + byte, packed, bytes_here)
    out += codes_bytes
    if job.bits == 8:
        write_u32(out, bits_of_float(m.scale))
        write_u32(out + 4, bits_of_float(m.bias))
    else:
        write_u16(out, half_of_float(m.scale))
        write_u16(out + 2, half_of_float(m.bias))
    return FINE


cdef Py_ssize_t quantize_chunk(const Quantize *job, Py_ssize_t first, Py_ssize_t end, RowFault *fault) noexcept nogil:
    """The first row that could not be quantized, with its fault; -1 where all were."""
    cdef Py_ssize_t number
    cdef float *scratch = NULL
    fault[0] = FINE
    if job.greedy:
        scratch = <float *> malloc(2 * ((job.dim + 15) // 16 * 16) * sizeof(float))
        if scratch == NULL:
            fault[0] = NO_MEMORY
            return first
    for number in range(first, end):
        fault[0] = quantize_row(job, number, scratch)
        if fault[0] != FINE:
            break
    else:
        number = -1
    free(scratch)
    return number


def quantize(object weights, int bits, object out, object bounds, bint greedy, int64_t num_bins, double ratio,
             int num_threads):
    """Rows of float32 into `out`: None, or (what is wrong, row)."""
    cdef Quantize job
    cdef RowFault faults[MAX_CHUNKS]
    cdef Py_ssize_t rows_at_fault[MAX_CHUNKS]
    cdef Py_ssize_t chunk, num_chunks
    if not (is_plain(weights) and cnp.PyArray_TYPE(<cnp.ndarray> weights) == cnp.NPY_FLOAT32
            and cnp.PyArray_NDIM(<cnp.ndarray> weights) == 2 and cnp.PyArray_DIM(<cnp.ndarray> weights, 1) > 0):
        raise TypeError("weights must be float32 rows in one piece")
    if not (is_plain(out) and cnp.PyArray_TYPE(<cnp.ndarray> out) == cnp.NPY_UINT8
            and cnp.PyArray_NDIM(<cnp.ndarray> out) == 2
            and cnp.PyArray_DIM(<cnp.ndarray> out, 0) == cnp.PyArray_DIM(<cnp.ndarray> weights, 0)
            and cnp.PyArray_DIM(<cnp.ndarray> out, 1)
            == (cnp.PyArray_DIM(<cnp.ndarray> weights, 1) * bits + 7) // 8 + (8 if bits == 8 else 4)):
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
    with nogil:
        if num_threads == 1 or <double> job.num_rows * job.dim < MIN_PARALLEL_WORK:
            num_chunks = 1
            rows_at_fault[0] = quantize_chunk(&job, 0, job.num_rows, &faults[0])
        else:
            num_chunks = min(<Py_ssize_t> (CHUNKS_A_THREAD * num_threads), job.num_rows)
            num_threads = min(<Py_ssize_t> num_threads, num_chunks)
            for chunk in prange(num_chunks, schedule="dynamic", chunksize=1, num_threads=num_threads):
                rows_at_fault[chunk] = quantize_chunk(&job, chunk * job.num_rows // num_chunks,
                                                      (chunk + 1) * job.num_rows // num_chunks, &faults[chunk])
    for chunk in range(num_chunks):
        if faults[chunk] == NO_MEMORY:
            raise MemoryError
        if faults[chunk] != FINE:
            return ("not finite" if faults[chunk] == NOT_FINITE else "too wide", rows_at_fault[chunk])
    return None
