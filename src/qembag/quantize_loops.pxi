# Part of _kernels.pyx: rows of floats to codes, in PyTorch's layouts byte for byte as its prepack operators make them.
#
# All arithmetic is in float32 and each operation rounds once: the formulas are those of
# FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf and FloatOrHalfToFused8BitRowwiseQuantizedSBFloat (FBGEMM) and, for
# the greedy search, of choose_qparams_optimized (PyTorch). A product is never fused with a sum here.
#
# The first of these is for float16 pairs at any width (256 codes at 8 bits, as in TorchRec) and, without its roundings
# to float16, for float32 pairs at 4 and 2 bits. The second is for float32 pairs at 8 bits.

cdef extern from "lanes.h" nogil:
    lanes lanes_min(lanes, lanes)
    lanes lanes_sub(lanes, lanes)
    lanes lanes_round(lanes)
    lanes lanes_nonzero(lanes)
    lanes lanes_through_half(lanes)
    void lanes_store_half(void *, lanes)
    bint lanes_all_finite(lanes)
    void fold_min(float *, lanes)
    void fold_max(float *, lanes)
    lanes min_of_4(const float *)
    lanes max_of_4(const float *)
    void pack_8bit(uint8_t *, lanes)
    void pack_4bit(uint8_t *, lanes)
    void pack_2bit(uint8_t *, lanes)
    void pack_four_8bit(uint8_t *, lanes, lanes, lanes, lanes)
    void pack_four_4bit(uint8_t *, lanes, lanes, lanes, lanes)
    void pack_four_2bit(uint8_t *, lanes, lanes, lanes, lanes)
    uint16_t half_of_float(float)
    uint32_t bits_of_float(float)
    void write_le16(uint8_t *, uint16_t)
    void write_le32(uint8_t *, uint32_t)

# A unit is what has a scale and a bias: a group of a row, mostly the whole row. Units are quantized in tiles: first
# the bounds of each, then scales and biases of all at once, a lane each, then the codes of each, while its elements
# are still in the first-level cache.
cdef enum:
    TILE_UNITS = 16             # the lanes
    # Of these and twice and four times as many, rows of 1024 are 1.0, 1.2 and 1.3 times as slow. The processor finds
    # the next rows by itself: to prefetch them made it slower by up to a third.
    TILE_ELEMENTS = 2048

cdef struct Unit:
    const float *values
    Py_ssize_t dim
    uint8_t *codes              # to be written
    uint8_t *pair


cdef struct Tile:
    Py_ssize_t first            # unit
    Py_ssize_t num_units
    const Unit *units           # not in PyTorch's layouts, where a unit is a row
    # Of each unit four floats with its minimum among them, and four with its maximum.
    float mins[4 * TILE_UNITS]
    float maxs[4 * TILE_UNITS]
    lanes low                   # bounds of each unit
    lanes high
    float scales[TILE_UNITS]
    float biases[TILE_UNITS]
    float inverses[TILE_UNITS]
    uint16_t half_scales[TILE_UNITS]
    uint16_t half_biases[TILE_UNITS]


cdef inline lanes load_part(const float *p, Py_ssize_t count, lanes fill) noexcept nogil:
    """Sixteen floats of which `count` are there."""
    return lanes_load(p) if count >= 16 else lanes_load_part(p, count, fill)


cdef bint is_finite(const float *values, Py_ssize_t dim) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(dim):
        if not isfinite(values[i]):
            return False
    return True


cdef inline void pack(uint8_t *p, lanes x, const int bits) noexcept nogil:
    if bits == 8:
        pack_8bit(p, x)
    elif bits == 4:
        pack_4bit(p, x)
    else:
        pack_2bit(p, x)


cdef inline void pack_four(uint8_t *p, lanes a, lanes b, lanes c, lanes d, const int bits) noexcept nogil:
    if bits == 8:
        pack_four_8bit(p, a, b, c, d)
    elif bits == 4:
        pack_four_4bit(p, a, b, c, d)
    else:
        pack_four_2bit(p, a, b, c, d)


# ---- The greedy search --------------------------------------------------------------------------------------------

cdef inline float as_stored(float value, bint is_half) noexcept nogil:
    return float_of_half(half_of_float(value)) if is_half else value


cdef void squared_errors(const float *values, Py_ssize_t dim, float low, float high, float max_code, bint is_half,
                         float *squares) noexcept nogil:
    cdef float bias = as_stored(low, is_half)
    cdef float width = high - bias
    cdef float scale = 1 if width == 0 else as_stored(width / max_code, is_half)
    cdef lanes biases = lanes_broadcast(bias)
    cdef lanes scales = lanes_broadcast(scale)
    cdef lanes inverses = lanes_broadcast(1 if scale == 0 else 1 / scale)
    cdef lanes top = lanes_broadcast(max_code)
    cdef lanes x, code, error
    cdef Py_ssize_t i
    for i in range(0, dim, 16):
        x = load_part(values + i, dim - i, lanes_zero())
        code = lanes_mul(lanes_sub(x, biases), inverses)
        code = lanes_round(lanes_max(lanes_min(top, code), lanes_zero()))
        error = lanes_sub(x, lanes_add(lanes_mul(code, scales), biases))
        lanes_store(squares + i, lanes_mul(error, error))


cdef void search(const Quantize *job, const float *values, Py_ssize_t dim, float *scratch, float *low,
                 float *high) noexcept nogil:
    """Narrows the bounds step by step from whichever end loses less, and keeps the pair that the search first saw as
    best. The losses' sums run strictly from left to right, as the reference's do: another order, other bytes."""
    cdef bint is_half = job.layout.pair_size == 2
    cdef float max_code = <float> ((1 << job.layout.bits) - 1)
    cdef Py_ssize_t room = (dim + 15) // 16 * 16
    cdef float step = (high[0] - low[0]) / job.num_bins
    cdef float threshold = job.kept_bins * step
    cdef float current_low = low[0], current_high = high[0]
    cdef float loss = 0, best, raised, lowered
    cdef float next_low, next_high
    cdef Py_ssize_t i
    squared_errors(values, dim, current_low, current_high, max_code, is_half, scratch)
    for i in range(dim):
        loss = loss + scratch[i]
    loss = best = sqrtf(loss)
    while current_low + threshold < current_high:
        next_low = current_low + step
        next_high = current_high - step
        squared_errors(values, dim, next_low, current_high, max_code, is_half, scratch)
        squared_errors(values, dim, current_low, next_high, max_code, is_half, scratch + room)
        raised = lowered = 0
        for i in range(dim):
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


# ---- A tile -------------------------------------------------------------------------------------------------------

cdef inline Unit unit_of_row(const Layout *layout, const float[:, ::1] weights, uint8_t[:, ::1] out, Py_ssize_t row,
                             Py_ssize_t group, const int bits) noexcept nogil:
    cdef Unit unit
    cdef Py_ssize_t start = group * layout.group_size
    unit.values = &weights[row, start]
    unit.dim = min(weights.shape[1] - start, layout.group_size)
    unit.codes = &out[row, 0] + layout.codes_start + start // (8 // bits)
    unit.pair = &out[row, 0] + layout.pairs_start + group * 2 * layout.pair_size
    return unit


cdef inline Unit unit_of(const Layout *layout, const Tile *tile, const float[:, ::1] weights, uint8_t[:, ::1] out,
                         Py_ssize_t number, const bint is_plain) noexcept nogil:
    """A unit of the tile. In PyTorch's layouts it is worked out each time: to look it up took rows of 64 a quarter
    longer."""
    cdef Unit unit
    if not is_plain:
        return tile.units[number]
    unit.values = &weights[tile.first + number, 0]
    unit.dim = weights.shape[1]
    unit.codes = &out[tile.first + number, 0] + layout.codes_start
    unit.pair = &out[tile.first + number, 0] + layout.pairs_start
    return unit


cdef inline void find_bounds(const Layout *layout, Tile *tile, const float[:, ::1] weights, uint8_t[:, ::1] out,
                             lanes *sums, const bint is_plain) noexcept nogil:
    """Minima and maxima. No sum with an infinity or a NaN in it is finite; one of large numbers may not be either."""
    cdef Py_ssize_t dim, number, i
    cdef lanes x, low, high
    cdef const float *values
    cdef Unit unit
    sums[0] = lanes_zero()
    for number in range(tile.num_units):
        unit = unit_of(layout, tile, weights, out, number, is_plain)
        values = unit.values
        dim = unit.dim
        if dim < 16:
            low = high = lanes_load_part(values, dim, lanes_broadcast(values[0]))
            sums[0] = lanes_add(sums[0], low)
        else:
            low = high = lanes_load(values)
            sums[0] = lanes_add(sums[0], low)
            for i in range(16, dim - 15, 16):
                x = lanes_load(values + i)
                low = lanes_min(low, x)
                high = lanes_max(high, x)
                sums[0] = lanes_add(sums[0], x)
            if dim % 16 != 0:
                # The last sixteen end where the unit does; what they share with those before them counts twice.
                x = lanes_load(values + dim - 16)
                low = lanes_min(low, x)
                high = lanes_max(high, x)
                sums[0] = lanes_add(sums[0], x)
        fold_min(tile.mins + 4 * number, low)
        fold_max(tile.maxs + 4 * number, high)
    for i in range(4 * tile.num_units, 4 * TILE_UNITS):
        tile.mins[i] = tile.maxs[i] = 0
    tile.low = min_of_4(tile.mins)
    tile.high = max_of_4(tile.maxs)


cdef void choose_bounds(const Quantize *job, Tile *tile, const float[:, ::1] weights, const float[:, ::1] bounds,
                        uint8_t[:, ::1] out, float *scratch, bint is_plain) noexcept nogil:
    """Those that are given, or that the greedy search finds."""
    cdef float lows[TILE_UNITS]
    cdef float highs[TILE_UNITS]
    cdef Py_ssize_t number
    cdef Unit unit
    lanes_store(lows, tile.low)
    lanes_store(highs, tile.high)
    for number in range(tile.num_units):
        if job.method == GREEDY:
            unit = unit_of(&job.layout, tile, weights, out, number, is_plain)
            search(job, unit.values, unit.dim, scratch, &lows[number], &highs[number])
        else:
            lows[number] = bounds[tile.first + number, 0]
            highs[number] = bounds[tile.first + number, 1]
    tile.low = lanes_load(lows)
    tile.high = lanes_load(highs)


cdef inline bint has_half_pairs(const Layout *layout, const bint is_plain, const int bits) noexcept nogil:
    return bits != 8 if is_plain else layout.pair_size == 2


cdef inline bint find_pairs(Tile *tile, bint is_half, const int bits) noexcept nogil:
    """Scale, bias and 1 / scale of each unit. False where one of them is not finite."""
    cdef lanes top = lanes_broadcast(<float> ((1 << bits) - 1))
    cdef lanes bias = lanes_through_half(tile.low) if is_half else tile.low
    cdef lanes width = lanes_sub(tile.high, bias)
    cdef lanes scale = lanes_div(width, top)
    cdef lanes inverse
    cdef int number
    if is_half:
        # 1 where the width is zero or too small for a half; so no inverse is infinite.
        scale = lanes_nonzero(lanes_through_half(scale))
        inverse = lanes_div(lanes_broadcast(1), scale)
        lanes_store_half(tile.half_scales, scale)
        lanes_store_half(tile.half_biases, bias)
    elif bits == 8:
        inverse = lanes_div(top, lanes_add(width, lanes_broadcast(<float> 1e-8)))
    else:
        scale = lanes_nonzero(scale)
        inverse = lanes_div(lanes_broadcast(1), scale)
    lanes_store(tile.scales, scale)
    lanes_store(tile.biases, bias)
    lanes_store(tile.inverses, inverse)
    if bits != 8 and not is_half and not lanes_all_finite(inverse):
        # The scale is a denormal whose inverse overflows.
        for number in range(TILE_UNITS):
            if not isfinite(tile.inverses[number]):
                tile.scales[number] = tile.inverses[number] = 1
    return lanes_all_finite(scale) and lanes_all_finite(bias)


cdef void gather_units(const Quantize *job, const Tile *tile, const float[:, ::1] weights, uint8_t[:, ::1] out,
                       float *scratch, Fit *fit, bint is_plain) noexcept nogil:
    """Interleave the units for a fit. The missing elements of shorter units get weight 0."""
    cdef Py_ssize_t dim = job.layout.group_size, group, number, i
    cdef const float *values[TILE_UNITS]
    cdef const float *importance[TILE_UNITS]
    cdef Py_ssize_t dims[TILE_UNITS]
    cdef float *side_by_side = scratch
    cdef float *counted = scratch + TILE_UNITS * dim
    cdef bint is_uneven = weights.shape[1] % dim != 0
    cdef Unit unit
    for number in range(TILE_UNITS):
        # Lanes without a unit repeat the last unit; their results are not used.
        unit = unit_of(&job.layout, tile, weights, out, min(number, tile.num_units - 1), is_plain)
        values[number], dims[number] = unit.values, unit.dim
        group = (tile.first + min(number, tile.num_units - 1)) % job.layout.num_groups
        importance[number] = NULL
        if job.importance != NULL:
            importance[number] = job.importance + group * dim
    for i in range(dim):
        for number in range(TILE_UNITS):
            side_by_side[TILE_UNITS * i + number] = values[number][i] if i < dims[number] else 0
    if is_uneven or job.importance != NULL:
        for i in range(dim):
            for number in range(TILE_UNITS):
                counted[TILE_UNITS * i + number] = 0
                if i < dims[number]:
                    counted[TILE_UNITS * i + number] = 1 if importance[number] == NULL else importance[number][i]
    fit.values = side_by_side
    fit.weights = counted if is_uneven or job.importance != NULL else NULL
    fit.dim = dim
    fit.is_half = job.layout.pair_size == 2
    fit.top = lanes_broadcast(<float> ((1 << job.layout.bits) - 1))


cdef void improve_pairs(const Quantize *job, Tile *tile, const float[:, ::1] weights, uint8_t[:, ::1] out,
                        float *scratch, bint is_plain, int bits) noexcept nogil:
    """Replace the min-max pair by the least-squares pair, in the units where that lowers the squared error."""
    cdef lanes scale = lanes_load(tile.scales), bias = lanes_load(tile.biases), inverse = lanes_load(tile.inverses)
    cdef double losses[TILE_UNITS]
    cdef double fitted_losses[TILE_UNITS]
    cdef float scales[TILE_UNITS]
    cdef float biases[TILE_UNITS]
    cdef float inverses[TILE_UNITS]
    cdef int number
    cdef Fit fit
    gather_units(job, tile, weights, out, scratch, &fit, is_plain)
    fit.scale, fit.bias, fit.loss = scale, bias, lanes_broadcast(INFINITY)
    fit_pairs(&fit, &tile.low, &tile.high)
    find_losses(&fit, &scale, &bias, &inverse, losses)
    inverse = lanes_div(lanes_broadcast(1), fit.scale)
    find_losses(&fit, &fit.scale, &fit.bias, &inverse, fitted_losses)
    lanes_store(scales, fit.scale)
    lanes_store(biases, fit.bias)
    lanes_store(inverses, inverse)
    for number in range(TILE_UNITS):
        # By more than rounding: a sum of the errors in another order must be smaller too.
        if fitted_losses[number] < losses[number] * (1 - 1e-9):
            tile.scales[number] = scales[number]
            tile.biases[number] = biases[number]
            tile.inverses[number] = inverses[number]
    if fit.is_half:
        lanes_store_half(tile.half_scales, lanes_load(tile.scales))
        lanes_store_half(tile.half_biases, lanes_load(tile.biases))


cdef inline lanes code_of(lanes x, lanes bias, lanes inverse, lanes top) noexcept nogil:
    """Still to be rounded, and zero where it is below: packing does both."""
    return lanes_min(top, lanes_mul(lanes_sub(x, bias), inverse))


cdef inline void write_codes(const float *values, Py_ssize_t dim, uint8_t *out, lanes bias, lanes inverse,
                             const int bits) noexcept nogil:
    """code = clamp(rint((x - bias) * inverse)), where x ~ code * scale + bias"""
    cdef int codes_per_byte = 8 // bits
    cdef Py_ssize_t one = vector_bytes(bits), codes_bytes, i
    cdef uint8_t short_codes[16]
    cdef lanes top = lanes_broadcast(<float> ((1 << bits) - 1))
    if dim < 16:
        pack(short_codes, code_of(lanes_load_part(values, dim, bias), bias, inverse, top), bits)
        memcpy(out, short_codes, (dim + codes_per_byte - 1) // codes_per_byte)
        return
    for i in range(0, dim - 63, 64):
        pack_four(out + i // codes_per_byte,
                  code_of(lanes_load(values + i), bias, inverse, top),
                  code_of(lanes_load(values + i + 16), bias, inverse, top),
                  code_of(lanes_load(values + i + 32), bias, inverse, top),
                  code_of(lanes_load(values + i + 48), bias, inverse, top), bits)
    for i in range(dim // 64 * 64, dim - 15, 16):
        pack(out + i // codes_per_byte, code_of(lanes_load(values + i), bias, inverse, top), bits)
    if dim % 16 != 0:
        # The last sixteen end where the codes do. Elements that are not there have the bias: code zero.
        codes_bytes = (dim + codes_per_byte - 1) // codes_per_byte
        i = codes_bytes * codes_per_byte - 16
        pack(out + codes_bytes - one, code_of(load_part(values + i, dim - i, bias), bias, inverse, top), bits)


cdef inline void write_units(const Layout *layout, const Tile *tile, const float[:, ::1] weights, uint8_t[:, ::1] out,
                             const bint is_plain, const int bits) noexcept nogil:
    cdef bint is_half = has_half_pairs(layout, is_plain, bits)
    cdef Py_ssize_t number
    cdef Unit unit
    for number in range(tile.num_units):
        unit = unit_of(layout, tile, weights, out, number, is_plain)
        write_codes(unit.values, unit.dim, unit.codes, lanes_broadcast(tile.biases[number]),
                    lanes_broadcast(tile.inverses[number]), bits)
        if is_half:
            write_le16(unit.pair, tile.half_scales[number])
            write_le16(unit.pair + 2, tile.half_biases[number])
        else:
            write_le32(unit.pair, bits_of_float(tile.scales[number]))
            write_le32(unit.pair + 4, bits_of_float(tile.biases[number]))


cdef inline RowFault quantize_tile(const Quantize *job, Tile *tile, const float[:, ::1] weights,
                                   const float[:, ::1] bounds, uint8_t[:, ::1] out, float *scratch,
                                   Py_ssize_t *bad_unit, const bint is_plain, const int bits) noexcept nogil:
    """The fault of the tile's first unit that has one."""
    cdef RowFault fault = FINE
    cdef Py_ssize_t number
    cdef Unit unit
    cdef lanes sums
    find_bounds(&job.layout, tile, weights, out, &sums, is_plain)
    if not lanes_all_finite(sums):
        for number in range(tile.num_units):
            unit = unit_of(&job.layout, tile, weights, out, number, is_plain)
            if not is_finite(unit.values, unit.dim):
                fault = NOT_FINITE
                bad_unit[0] = tile.first + number
                tile.num_units = number     # what is wrong with a unit before this one comes first
                break
    if job.method == GREEDY or bounds.shape[0] > 0:
        choose_bounds(job, tile, weights, bounds, out, scratch, is_plain)
    if not find_pairs(tile, has_half_pairs(&job.layout, is_plain, bits), bits):
        for number in range(tile.num_units):
            if not (isfinite(tile.scales[number]) and isfinite(tile.biases[number])):
                bad_unit[0] = tile.first + number
                return TOO_WIDE
    if fault == FINE:
        if job.method == LEAST_SQUARES:
            improve_pairs(job, tile, weights, out, scratch, is_plain, bits)
        write_units(&job.layout, tile, weights, out, is_plain, bits)
    return fault


cdef void write_padding(const Layout *layout, uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t row, size = layout.row_bytes - layout.used_bytes
    if size > 0:
        for row in range(first, end):
            memset(&out[row, 0] + layout.used_bytes, 0, size)


cdef inline Py_ssize_t tile_units(const Quantize *job) noexcept nogil:
    if job.method == LEAST_SQUARES:
        return TILE_UNITS       # fitted side by side, one per lane
    return max(min(TILE_ELEMENTS // job.layout.group_size, <Py_ssize_t> TILE_UNITS), 1)


cdef inline RowFault quantize_plain(const Quantize *job, const float[:, ::1] weights, const float[:, ::1] bounds,
                                    uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end, float *scratch,
                                    Py_ssize_t *bad_unit, const int bits) noexcept nogil:
    """Rows of one group, with pairs of the width that PyTorch has."""
    cdef Py_ssize_t at_once = tile_units(job)
    cdef RowFault fault = FINE
    cdef Tile tile
    while first < end and fault == FINE:
        tile.first = first
        tile.num_units = min(at_once, end - first)
        fault = quantize_tile(job, &tile, weights, bounds, out, scratch, bad_unit, True, bits)
        write_padding(&job.layout, out, first, first + tile.num_units)
        first += at_once
    return fault


cdef inline RowFault quantize_groups(const Quantize *job, const float[:, ::1] weights, const float[:, ::1] bounds,
                                     uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end, float *scratch,
                                     Py_ssize_t *bad_unit, const int bits) noexcept nogil:
    cdef Py_ssize_t at_once = tile_units(job)
    cdef Py_ssize_t row = first, group = 0
    cdef RowFault fault = FINE
    cdef Unit units[TILE_UNITS]
    cdef Tile tile
    tile.units = units
    tile.first = first * job.layout.num_groups
    while row < end and fault == FINE:
        tile.num_units = 0
        while tile.num_units < at_once and row < end:
            units[tile.num_units] = unit_of_row(&job.layout, weights, out, row, group, bits)
            tile.num_units += 1
            group += 1
            if group == job.layout.num_groups:
                write_padding(&job.layout, out, row, row + 1)
                group = 0
                row += 1
        fault = quantize_tile(job, &tile, weights, bounds, out, scratch, bad_unit, False, bits)
        tile.first += tile.num_units
    return fault


cdef inline RowFault quantize_units(const Quantize *job, const float[:, ::1] weights, const float[:, ::1] bounds,
                                    uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end, float *scratch,
                                    Py_ssize_t *bad_unit, const int bits) noexcept nogil:
    if job.layout.num_groups == 1 and job.layout.pair_size == (4 if bits == 8 else 2):
        return quantize_plain(job, weights, bounds, out, first, end, scratch, bad_unit, bits)
    return quantize_groups(job, weights, bounds, out, first, end, scratch, bad_unit, bits)


# ---- Sharing out --------------------------------------------------------------------------------------------------

cdef RowFault quantize_chunk(const Quantize *job, const float[:, ::1] weights, const float[:, ::1] bounds,
                             uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end,
                             Py_ssize_t *bad_unit) noexcept nogil:
    cdef RowFault fault
    cdef uint8_t *room = NULL
    cdef float *scratch = NULL
    bad_unit[0] = first * job.layout.num_groups
    if job.method != MINMAX:
        # calloc sees to it that the product fits an address of 32 bits.
        if job.method == GREEDY:
            room = <uint8_t *> calloc(2 * ((job.layout.group_size + 15) // 16) + 1, 16 * sizeof(float))
        else:
            room = <uint8_t *> calloc(job.layout.group_size + 1, 2 * TILE_UNITS * sizeof(float))
        if room == NULL:
            return NO_MEMORY
        # Aligned to a cache line: a load that spans two lines takes twice as long.
        scratch = <float *> (room + (64 - <size_t> room % 64) % 64)
    if job.layout.bits == 8:
        fault = quantize_units(job, weights, bounds, out, first, end, scratch, bad_unit, 8)
    elif job.layout.bits == 4:
        fault = quantize_units(job, weights, bounds, out, first, end, scratch, bad_unit, 4)
    else:
        fault = quantize_units(job, weights, bounds, out, first, end, scratch, bad_unit, 2)
    free(room)
    return fault


cdef inline Py_ssize_t chunk_start(Py_ssize_t first, Py_ssize_t end, Py_ssize_t chunk,
                                   Py_ssize_t num_chunks) noexcept nogil:
    return first + <Py_ssize_t> (<int64_t> chunk * (end - first) // num_chunks)


cdef void quantize_chunks(const Quantize *job, const float[:, ::1] weights, const float[:, ::1] bounds,
                          uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end, Py_ssize_t num_chunks,
                          int num_threads, RowFault *faults, Py_ssize_t *bad_units) noexcept nogil:
    cdef Py_ssize_t chunk, done_elsewhere = 0
    cdef int callers = parallel_processor(), team = 1
    for chunk in prange(num_chunks, schedule="dynamic", chunksize=1, num_threads=num_threads):
        team = parallel_team()
        done_elsewhere += parallel_is_elsewhere(callers)
        faults[chunk] = quantize_chunk(job, weights, bounds, out, chunk_start(first, end, chunk, num_chunks),
                                       chunk_start(first, end, chunk + 1, num_chunks), &bad_units[chunk])
    parallel_judge(team, <double> done_elsewhere / num_chunks)


cdef RowFault quantize_shared(const Quantize *job, const float[:, ::1] weights, const float[:, ::1] bounds,
                              uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end, int num_threads,
                              Py_ssize_t *unit) noexcept nogil:
    """Rows, shared out among threads where that pays."""
    cdef RowFault faults[MAX_CHUNKS]
    cdef Py_ssize_t bad_units[MAX_CHUNKS]
    cdef Py_ssize_t chunk, num_chunks
    cdef bint is_forked = parallel_is_forked()
    # Min-max pays for a parallel region earlier than its work suggests.
    cdef double work = quantizing_work(job, <double> (end - first))
    if work < (MIN_FORKED_WORK if is_forked else MIN_PARALLEL_WORK):
        return quantize_chunk(job, weights, bounds, out, first, end, unit)
    if num_threads == 0:
        num_threads = parallel_max_threads()
    num_threads = parallel_enter(min(num_threads, MAX_CHUNKS // CHUNKS_A_THREAD))
    num_chunks = 1
    if num_threads > 1:
        num_chunks = min(<Py_ssize_t> (CHUNKS_A_THREAD * num_threads), end - first)
        num_threads = min(<Py_ssize_t> num_threads, num_chunks)
    if is_forked:
        with parallel(num_threads=1):       # see `look_up_shared`
            quantize_chunks(job, weights, bounds, out, first, end, num_chunks, num_threads, faults, bad_units)
    else:
        quantize_chunks(job, weights, bounds, out, first, end, num_chunks, num_threads, faults, bad_units)
    parallel_leave()
    for chunk in range(num_chunks):
        if faults[chunk] != FINE:
            unit[0] = bad_units[chunk]
            return faults[chunk]
    return FINE
