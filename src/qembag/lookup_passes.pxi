# Part of _kernels.pyx: which loop runs, and whole rows in one pass or several.

# ---- Blocks of every width ----------------------------------------------------------------------------------------

# What a loop is compiled for beside bits, quads and maximum or sum: where its rows come from. Not each combination is
# worth its code: maxima have one loop for all, and rows are also gathered where all are wanted, and without an fma
# instruction.
cdef enum Kind:
    GATHERED = 0            # by way of windows
    INT32 = 1               # read in the loop, with nothing else to look for
    INT64 = 2
    INT32_WITH = 3          # with weights or padding or both
    INT64_WITH = 4
    NUM_KINDS = 5


cdef inline int max_width(const int bits, const bint quads, const bint is_max, const Kind kind) noexcept nogil:
    """Groups of the widest block. Of 2-bit codes eight: as quads 5 to 10 % faster than 16 one by one; at AVX2, which
    has no quads, 8 to 10 % faster than 6. Else more only for sums of plain bags: wider blocks are most of a wheel's
    bytes, and a second pass costs 5 to 8 % (weights, 256 elements, Zen 4)."""
    if bits == 2:
        return 8
    return LANES_MAX_BLOCK if not is_max and (kind == INT32 or kind == INT64) else min(LANES_MAX_BLOCK, 8)


cdef inline bint look_up_kind(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int bits,
                              const int width, const bint quads, const bint is_max, const Kind kind) noexcept nogil:
    if kind == GATHERED:
        return look_up_gathered(job, rows, task, bits, width, quads, is_max)
    if not LANES_HAS_FMA:
        return False            # `plan_of` gathers
    if is_max:
        return look_up(job, rows, task, bits, width, quads, True, EITHER, False)
    return look_up(job, rows, task, bits, width, quads, False, 4 if kind == INT32 or kind == INT32_WITH else 8,
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


cdef bint max_8bit(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 8, False, True, INT64_WITH)


cdef bint max_4bit(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
    return look_up_width(job, rows, task, 4, False, True, INT64_WITH)


cdef bint max_2bit(const Lookup *job, const uint8_t[:, :] rows, const Pass *task) noexcept nogil:
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
    [max_2bit, max_4bit, max_8bit],
    [max_2bit, max_4bit, max_8bit],
    [max_2bit, max_4bit, max_8bit],
    [max_2bit, max_4bit, max_8bit],
]


# ---- Whole rows ---------------------------------------------------------------------------------------------------

cdef enum:
    PLANNED_PASSES = 16
    # Rows of several passes: bags of so many bytes go through each pass before the next, so that their rows are still
    # in the second-level cache. To begin a pass takes some 50 cycles: bag by bag, rows of 300 to 1024 are 5 % slower.
    BYTES_A_PASS = 1 << 17

# How a call is carried out, the same for all its bags.
cdef struct Plan:
    BlockLoop sum
    BlockLoop sum_of_quads
    bint use_quads              # for blocks of four groups and more
    bint in_pairs
    bint gathers                # by way of windows
    int max_width
    Py_ssize_t distance         # rows that are prefetched ahead
    # The passes that a row takes: worked out once for all bags, which saves 1 to 2 % of rows of 300. More passes than
    # these are all of the greatest width.
    Py_ssize_t num_groups
    Py_ssize_t num_passes
    Py_ssize_t bags_a_pass
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
    if job.mapping != NULL or job.index_size == 0 or not LANES_HAS_FMA:
        kind = GATHERED
    # Quads of 8-bit codes are loads of 64 bytes, each across two cache lines: faster where prefetching brings the lines
    # into the first level in time, and slower where it does not.
    plan.use_quads = (LANES_QUADS and job.mode != MAX and rows >= QUADS_MIN_LENGTH * <double> job.num_bags
                      and job.layout.codes_bytes >= 8 * bits and (bits == 2 or (bits == 8 and is_near)))
    # Narrow rows are added to two bags in turn. In cache 1.1 to 1.4 times as fast; from memory, where rows are waited
    # for, 0.85; of one row each 0.93.
    plan.in_pairs = is_near and rows >= 3 * <double> job.num_bags
    plan.gathers = kind == GATHERED
    plan.sum = MAXIMA[kind][bits // 4] if job.mode == MAX else SUMS[kind][bits // 4]
    plan.sum_of_quads = SUMS_OF_QUADS[kind][bits // 4]
    plan.max_width = max_width(bits, plan.use_quads, job.mode == MAX, <Kind> kind)
    # About 8 KiB of what one pass reads of each row, its codes and the line of its pair.
    plan.distance = max(min(8192 // min(job.layout.row_bytes, LANES_MAX_BLOCK * 2 * bits + 64), 64), 8)
    plan_passes(job, &plan, rows)
    return plan


cdef inline int block_width(Py_ssize_t num_groups) noexcept nogil:
    """The narrowest block that holds so many groups."""
    return num_groups if num_groups <= 8 else 12 if num_groups <= 12 else 16


cdef void plan_passes(const Lookup *job, Plan *plan, double rows) noexcept nogil:
    cdef Py_ssize_t bytes_of_group = group_bytes(job.layout.bits), number, first = 0, left
    plan.num_groups = (job.layout.codes_bytes + bytes_of_group - 1) // bytes_of_group
    plan.num_passes = (plan.num_groups + plan.max_width - 1) // plan.max_width
    if plan.num_passes == 1 and block_width(plan.num_groups) > plan.num_groups:
        plan.num_passes = 2
    plan.bags_a_pass = <Py_ssize_t> min(max(
        BYTES_A_PASS * <double> job.num_bags / max(rows * job.layout.row_bytes, 1.0), 1.0), 64.0)
    if plan.num_passes > PLANNED_PASSES:
        return
    for number in range(plan.num_passes):
        # An equal share of the groups that are left. Where no block is as wide, the next wider one starts further back.
        left = plan.num_passes - number
        plan.width[number] = block_width((plan.num_groups - first + left - 1) // left)
        plan.first_group[number] = min(first, plan.num_groups - plan.width[number])
        first = plan.first_group[number] + plan.width[number]


cdef bint look_up_in_passes(const Lookup *job, const uint8_t[:, :] rows, const Plan *plan, Pass *task) noexcept nogil:
    """The end of the rows first: its pass also brings their pairs, which stand there, into the cache."""
    cdef Py_ssize_t number
    for number in range(plan.num_passes - 1, -1, -1):
        if plan.num_passes <= PLANNED_PASSES:
            task.first_group = plan.first_group[number]
            task.width = plan.width[number]
        else:
            task.first_group = min(number * plan.max_width, plan.num_groups - plan.max_width)
            task.width = plan.max_width
        if not (plan.sum_of_quads if plan.use_quads and task.width >= 4 else plan.sum)(job, rows, task):
            return False
    return True


cdef bint look_up_bags(const Lookup *job, const uint8_t[:, :] rows, const Plan *plan, Py_ssize_t first_bag,
                       Py_ssize_t end_bag) noexcept nogil:
    """All columns: in one pass over the bags where the accumulators fit into registers, else some bags at a time in
    several."""
    cdef Pass task
    task.limit = read_offset(job, end_bag)
    # The end bounds what is prefetched, so it is checked before anything is. An offset is wrong also where no bag
    # starts at it: the end of no bags.
    if not 0 <= task.limit <= job.num_indices or not 0 <= read_offset(job, first_bag) <= job.num_indices:
        return False
    task.in_pairs = plan.in_pairs
    task.distance = plan.distance
    task.is_first = True
    task.first_bag = first_bag
    task.end_bag = end_bag
    if plan.num_passes == 1:
        return look_up_in_passes(job, rows, plan, &task)
    while task.first_bag < end_bag:
        task.end_bag = min(task.first_bag + plan.bags_a_pass, end_bag)
        if plan.gathers:
            # Each pass gathers anew: no further than it sums.
            task.limit = read_offset(job, task.end_bag)
            if not 0 <= task.limit <= job.num_indices:
                return False
        if not look_up_in_passes(job, rows, plan, &task):
            return False
        task.first_bag = task.end_bag
        task.is_first = False
    return True
