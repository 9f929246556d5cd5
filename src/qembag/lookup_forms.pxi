# Part of _kernels.pyx: a loop for each form and kind.
#
# A function for each: in one for several, gcc 12 keeps accumulators in memory (4 bits, 64 elements: 2.2 times as slow),
# or takes 4 to 7 % longer for a row.
#
# Not each combination is worth its code. To ask for the type of the indices at each one takes up to a third longer in
# cache: only forms that are rarely there share a loop between both types. Rows of codes that are not torch's are
# gathered where there is anything but plain bags to sum, and maxima of all but torch's are, too.

ctypedef bint (*BlockLoop)(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil


cdef bint sum_8bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, 8, False)


cdef bint sum_8bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 8, False, 4, True)


cdef bint sum_8bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 8, False, 8, True)


cdef bint sum_8bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 8, False, 4, False)


cdef bint sum_8bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 8, False, 8, False)


cdef bint sum_4bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, 4, False)


cdef bint sum_4bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 4, False, 4, True)


cdef bint sum_4bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 4, False, 8, True)


cdef bint sum_4bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 4, False, 4, False)


cdef bint sum_4bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 4, False, 8, False)


cdef bint sum_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, 2, False)


cdef bint sum_2bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 2, False, 4, True)


cdef bint sum_2bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 2, False, 8, True)


cdef bint sum_2bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 2, False, 4, False)


cdef bint sum_2bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 2, False, 8, False)


cdef bint sum_quads_8bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 8, False, 4, True)


cdef bint sum_quads_8bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 8, False, 8, True)


cdef bint sum_quads_8bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 8, False, 4, False)


cdef bint sum_quads_8bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 8, False, 8, False)


cdef bint sum_quads_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width_gathered(job, rows, task, QUADS | 2, False)


cdef bint sum_quads_2bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 2, False, 4, True)


cdef bint sum_quads_2bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 2, False, 8, True)


cdef bint sum_quads_2bit_int32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 2, False, 4, False)


cdef bint sum_quads_2bit_int64_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | 2, False, 8, False)


cdef bint sum_grouped_8bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, GROUPED | 8, False)


cdef bint sum_grouped_4bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, GROUPED | 4, False)


cdef bint sum_grouped_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, GROUPED | 2, False)


cdef bint sum_one_pair_8bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, ONE_PAIR | 8, False, 4, True)


cdef bint sum_one_pair_8bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, ONE_PAIR | 8, False, 8, True)


cdef bint sum_quads_one_pair_8bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | ONE_PAIR | 8, False, 4, True)


cdef bint sum_quads_one_pair_8bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | ONE_PAIR | 8, False, 8, True)


cdef bint sum_one_pair_4bit_plain(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, ONE_PAIR | 4, False, EITHER, True)


cdef bint sum_one_pair_2bit_plain(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, ONE_PAIR | 2, False, EITHER, True)


cdef bint sum_twos_8bit_plain(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, TWOS | 8, False, EITHER, True)


cdef bint sum_twos_4bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, TWOS | 4, False, 4, True)


cdef bint sum_twos_4bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, TWOS | 4, False, 8, True)


cdef bint sum_twos_2bit_plain(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, TWOS | 2, False, EITHER, True)


cdef bint sum_quads_twos_8bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | TWOS | 8, False, 4, True)


cdef bint sum_quads_twos_8bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | TWOS | 8, False, 8, True)


cdef bint sum_quads_twos_2bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | TWOS | 2, False, 4, True)


cdef bint sum_quads_twos_2bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | TWOS | 2, False, 8, True)


cdef bint sum_quads_one_pair_2bit_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | ONE_PAIR | 2, False, 8, True)


cdef bint sum_quads_one_pair_2bit_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_QUADS and look_up_width(job, rows, task, QUADS | ONE_PAIR | 2, False, 4, True)


cdef bint sum_float32_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, FLOAT32_ROWS, False)


cdef bint sum_float32_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, FLOAT32_ROWS, False, 4, True)


cdef bint sum_float32_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, FLOAT32_ROWS, False, 8, True)


cdef bint sum_float32_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, FLOAT32_ROWS, False, EITHER, False)


cdef bint sum_float16_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, FLOAT16_ROWS, False)


cdef bint sum_float16_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, FLOAT16_ROWS, False, 4, True)


cdef bint sum_float16_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, FLOAT16_ROWS, False, 8, True)


cdef bint sum_float16_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, FLOAT16_ROWS, False, EITHER, False)


cdef bint sum_bfloat16_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, BFLOAT16_ROWS, False)


cdef bint sum_bfloat16_int32(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, BFLOAT16_ROWS, False, 4, True)


cdef bint sum_bfloat16_int64(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, BFLOAT16_ROWS, False, 8, True)


cdef bint sum_bfloat16_with(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, BFLOAT16_ROWS, False, EITHER, False)


cdef bint max_8bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, 8, True)


cdef bint max_8bit(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 8, True, EITHER, False)


cdef bint max_4bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, 4, True)


cdef bint max_4bit(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 4, True, EITHER, False)


cdef bint max_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, 2, True)


cdef bint max_2bit(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return LANES_HAS_FMA and look_up_width(job, rows, task, 2, True, EITHER, False)


cdef bint max_grouped_8bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, GROUPED | 8, True)


cdef bint max_grouped_4bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, GROUPED | 4, True)


cdef bint max_grouped_2bit_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, GROUPED | 2, True)


cdef bint max_float32_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, FLOAT32_ROWS, True)


cdef bint max_float16_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, FLOAT16_ROWS, True)


cdef bint max_bfloat16_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width_gathered(job, rows, task, BFLOAT16_ROWS, True)


# A row of each table below is for one form.
cdef enum:
    NUM_FORMS = 21

cdef int[NUM_FORMS] FORMS = [
    8, 4, 2, QUADS | 8, QUADS | 2,
    GROUPED | 8, GROUPED | 4, GROUPED | 2,
    ONE_PAIR | 8, ONE_PAIR | 4, ONE_PAIR | 2, QUADS | ONE_PAIR | 8, QUADS | ONE_PAIR | 2,
    TWOS | 8, TWOS | 4, TWOS | 2, QUADS | TWOS | 8, QUADS | TWOS | 2,
    FLOAT32_ROWS, FLOAT16_ROWS, BFLOAT16_ROWS,
]

# By form and kind.
cdef BlockLoop[NUM_FORMS][5] SUMS = [
    [sum_8bit_gathered, sum_8bit_int32, sum_8bit_int64, sum_8bit_int32_with, sum_8bit_int64_with],
    [sum_4bit_gathered, sum_4bit_int32, sum_4bit_int64, sum_4bit_int32_with, sum_4bit_int64_with],
    [sum_2bit_gathered, sum_2bit_int32, sum_2bit_int64, sum_2bit_int32_with, sum_2bit_int64_with],
    [sum_8bit_gathered, sum_quads_8bit_int32, sum_quads_8bit_int64,
     sum_quads_8bit_int32_with, sum_quads_8bit_int64_with],
    [sum_quads_2bit_gathered, sum_quads_2bit_int32, sum_quads_2bit_int64,
     sum_quads_2bit_int32_with, sum_quads_2bit_int64_with],
    [sum_grouped_8bit_gathered, NULL, NULL, NULL, NULL],
    [sum_grouped_4bit_gathered, NULL, NULL, NULL, NULL],
    [sum_grouped_2bit_gathered, NULL, NULL, NULL, NULL],
    [NULL, sum_one_pair_8bit_int32, sum_one_pair_8bit_int64, NULL, NULL],
    [NULL, sum_one_pair_4bit_plain, sum_one_pair_4bit_plain, NULL, NULL],
    [NULL, sum_one_pair_2bit_plain, sum_one_pair_2bit_plain, NULL, NULL],
    [NULL, sum_quads_one_pair_8bit_int32, sum_quads_one_pair_8bit_int64, NULL, NULL],
    [NULL, sum_quads_one_pair_2bit_int32, sum_quads_one_pair_2bit_int64, NULL, NULL],
    [NULL, sum_twos_8bit_plain, sum_twos_8bit_plain, NULL, NULL],
    [NULL, sum_twos_4bit_int32, sum_twos_4bit_int64, NULL, NULL],
    [NULL, sum_twos_2bit_plain, sum_twos_2bit_plain, NULL, NULL],
    [NULL, sum_quads_twos_8bit_int32, sum_quads_twos_8bit_int64, NULL, NULL],
    [NULL, sum_quads_twos_2bit_int32, sum_quads_twos_2bit_int64, NULL, NULL],
    [sum_float32_gathered, sum_float32_int32, sum_float32_int64, sum_float32_with, sum_float32_with],
    [sum_float16_gathered, sum_float16_int32, sum_float16_int64, sum_float16_with, sum_float16_with],
    [sum_bfloat16_gathered, sum_bfloat16_int32, sum_bfloat16_int64, sum_bfloat16_with, sum_bfloat16_with],
]

# Those that are gathered, and torch's fused with reading them.
cdef BlockLoop[NUM_FORMS][2] MAXIMA = [
    [max_8bit_gathered, max_8bit],
    [max_4bit_gathered, max_4bit],
    [max_2bit_gathered, max_2bit],
    [NULL, NULL],
    [NULL, NULL],
    [max_grouped_8bit_gathered, NULL],
    [max_grouped_4bit_gathered, NULL],
    [max_grouped_2bit_gathered, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [NULL, NULL],
    [max_float32_gathered, NULL],
    [max_float16_gathered, NULL],
    [max_bfloat16_gathered, NULL],
]

# Where a form's row is.
cdef uint8_t[2 * TWOS] ROW_OF

cdef int row_number
for row_number in range(NUM_FORMS):
    ROW_OF[FORMS[row_number]] = <uint8_t> row_number


cdef BlockLoop loop_of(int form, Kind kind, bint is_max) noexcept nogil:
    return MAXIMA[ROW_OF[form]][kind != GATHERED] if is_max else SUMS[ROW_OF[form]][<int> kind]
