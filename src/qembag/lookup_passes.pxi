# Part of _kernels.pyx: which loop runs, and whole rows in one pass or several.

cdef enum:
    PLANNED_PASSES = 16
    # Rows of several passes: bags of so many bytes go through each pass before the next, so that their rows are still
    # in the second-level cache. To begin a pass takes some 50 cycles: bag by bag, rows of 300 to 1024 are 5 % slower.
    BYTES_A_PASS = 1 << 17

# How a call is carried out, the same for all its bags.
cdef struct Plan:
    BlockLoop loop
    BlockLoop loop_of_quads     # for blocks of four vectors and more; NULL for none
    Kind kind
    int form
    bint is_max
    bint in_pairs
    int max_width
    Py_ssize_t distance         # rows that are prefetched ahead
    # The passes that a row takes: worked out once for all bags, which saves 1 to 2 % of rows of 300. `set_pass` says
    # what more passes than these are, and those of TWOS.
    Py_ssize_t num_vectors
    Py_ssize_t num_passes
    Py_ssize_t bags_a_pass
    Py_ssize_t first_vector[PLANNED_PASSES]
    int width[PLANNED_PASSES]

# With fewer rows a bag, its output counted as one, putting a quad in order costs more than it saves.
cdef int QUADS_MIN_LENGTH = 8
# A table that the third-level cache may hold. What depends on it was measured on a Zen 5 at 0.1 to 40 MB: it pays up to
# about 10, and costs as much beyond 14.
cdef int64_t NEAR_BYTES = 8 << 20


cdef inline bint max_is_fused(const int form) noexcept nogil:
    return LANES_HAS_FMA and is_torchs(form)


cdef inline bint is_one_pair_layout(const Layout *layout) noexcept nogil:
    return layout.num_groups == 1 and layout.pair_size == 2


cdef inline bint has_twos(const Layout *layout) noexcept nogil:
    return layout.num_groups == 1 or layout.group_size % 32 == 0


cdef Kind kind_of(const Lookup *job, bint is_one_bag) noexcept nogil:
    # One bag of a call that looks for signals may be a giant one: the loops for plain bags do not look.
    cdef bint plain = (job.weight_size == 0 and job.padding_idx < 0 and not job.skips_invalid
                       and not (job.signals != NULL and is_one_bag))
    cdef bint needs_fma = not is_float(job.layout.form) or not plain
    if job.mapping != NULL or job.index_size == 0 or (needs_fma and not LANES_HAS_FMA):
        return GATHERED
    if job.mode == MAX and not max_is_fused(job.layout.form):
        return GATHERED
    if is_grouped(job.layout.form) and not (plain and (is_one_pair_layout(&job.layout) or has_twos(&job.layout))):
        return GATHERED
    return <Kind> (job.index_size // 4 + (0 if plain else 2))


cdef inline bint pays_quads(const Lookup *job, int form, Kind kind, bint is_near, double rows) noexcept nogil:
    """Quads of 8-bit codes are loads of 64 bytes, each across two cache lines: faster where prefetching brings the
    lines into the first level in time, and slower where it does not."""
    cdef const Layout *layout = &job.layout
    if (not LANES_QUADS or job.mode == MAX or rows < QUADS_MIN_LENGTH * <double> job.num_bags
            or layout.codes_bytes < 8 * layout.bits):
        return False
    if form & TWOS != 0:
        # Elements of a quad that is moved back would be of other groups.
        return layout.full_dim % 16 == 0 and (layout.bits == 2 or (layout.bits == 8 and is_near))
    if form == 2 or form == ONE_PAIR | 2:
        return True
    if (form != 8 and form != ONE_PAIR | 8) or kind == GATHERED or not is_near:
        return False
    # `unpack_quad_8bit_by_loads` reads two bytes behind a quad.
    return layout.codes_bytes % 16 != 1 or layout.used_bytes >= layout.codes_start + layout.codes_bytes + 2


cdef int form_of(const Lookup *job, Kind kind) noexcept nogil:
    if not is_grouped(job.layout.form) or not is_plain(kind) or job.mode == MAX:
        return job.layout.form
    return (ONE_PAIR if is_one_pair_layout(&job.layout) else TWOS) | job.layout.bits


cdef void set_plan(Plan *plan, const Lookup *job, bint is_one_bag) noexcept nogil:
    cdef double rows = rows_of(job, 0, job.num_bags)
    cdef bint is_near = <double> job.num_rows * job.layout.row_bytes <= NEAR_BYTES
    plan.kind = kind_of(job, is_one_bag)
    plan.form = form_of(job, plan.kind)
    plan.is_max = job.mode == MAX
    plan.loop = loop_of(plan.form, plan.kind, plan.is_max)
    if pays_quads(job, plan.form, plan.kind, is_near, rows):
        plan.form |= QUADS
    plan.loop_of_quads = loop_of(plan.form, plan.kind, False) if has_quads(plan.form) else NULL
    # Narrow rows are added to two bags in turn. In cache 1.1 to 1.4 times as fast; from memory, where rows are waited
    # for, 0.85; of one row each 0.93.
    plan.in_pairs = is_near and rows >= 3 * <double> job.num_bags
    plan.max_width = max_width(plan.form, plan.is_max, plan.kind)
    # About 8 KiB of what one pass reads of each row, its codes and the line of its pair.
    plan.distance = max(min(
        8192 // <uint32_t> min(job.layout.used_bytes, LANES_MAX_BLOCK * vector_bytes(plan.form) + 64), 64), 8)
    plan_passes(job, plan, rows)


cdef inline int block_width(const Plan *plan, Py_ssize_t num_vectors) noexcept nogil:
    """The narrowest block that holds so many vectors."""
    cdef int width = <int> num_vectors
    while not is_width(width, plan.form, plan.is_max, plan.kind):
        width += 1
    return width


cdef void plan_passes(const Lookup *job, Plan *plan, double rows) noexcept nogil:
    plan.num_vectors = (job.layout.full_dim + 15) // 16
    if plan.num_vectors <= plan.max_width and block_width(plan, plan.num_vectors) == plan.num_vectors:
        # Most calls: no division is waited for.
        plan.num_passes = 1
        plan.width[0] = <int> plan.num_vectors
        plan.first_vector[0] = 0
        return
    plan.num_passes = max((plan.num_vectors + plan.max_width - 1) // plan.max_width, <Py_ssize_t> 2)
    plan.bags_a_pass = <Py_ssize_t> min(max(
        BYTES_A_PASS * <double> job.num_bags / max(rows * job.layout.used_bytes, 1.0), 1.0), 64.0)
    if plan.form & TWOS != 0:
        plan.num_passes = count_twos(plan)
    elif plan.num_passes <= PLANNED_PASSES:
        share_vectors(plan)


cdef void share_vectors(Plan *plan) noexcept nogil:
    """An equal share for each pass of the vectors that are left. Where no block is as wide, the next wider one starts
    further back."""
    cdef Py_ssize_t number, first = 0, left
    for number in range(plan.num_passes):
        left = plan.num_passes - number
        plan.width[number] = block_width(plan, (plan.num_vectors - first + left - 1) // left)
        plan.first_vector[number] = min(first, plan.num_vectors - plan.width[number])
        first = plan.first_vector[number] + plan.width[number]


cdef void set_pass(Pass *task, const Plan *plan, Py_ssize_t number) noexcept nogil:
    cdef Py_ssize_t first, left
    if plan.num_passes <= PLANNED_PASSES and plan.form & TWOS == 0:
        task.first_vector = plan.first_vector[number]
        task.width = plan.width[number]
        return
    first = number * plan.max_width
    left = plan.num_vectors - first
    if left >= plan.max_width or plan.form & TWOS == 0:
        # The last one starts further back.
        task.first_vector = min(first, plan.num_vectors - plan.max_width)
        task.width = plan.max_width
    elif left > 1:
        task.first_vector = first
        task.width = <int> (left - left % 2)
    else:
        task.first_vector = plan.num_vectors - 1
        task.width = 1


cdef Py_ssize_t count_twos(const Plan *plan) noexcept nogil:
    """Each pass starts at an even vector: the widest blocks, then what is left of even vectors, then perhaps the odd
    one (see `set_pass`)."""
    cdef Py_ssize_t left = plan.num_vectors % plan.max_width
    return plan.num_vectors // plan.max_width + (left > 1) + left % 2


cdef inline Py_ssize_t turn_of_pass(const Lookup *job, const Plan *plan, Py_ssize_t turn) noexcept nogil:
    """The pass that also brings a row's pair into the cache comes first. Else from the row's end, also because of the
    groups of vectors that are moved back (see `store_block`)."""
    if job.layout.pairs_start < job.layout.codes_start and not is_grouped(plan.form):
        return 0 if turn == 0 else plan.num_passes - turn
    return plan.num_passes - 1 - turn


cdef bint look_up_in_passes(const Lookup *job, const Plan *plan, Pass *task) noexcept nogil:
    cdef Py_ssize_t turn, number
    cdef BlockLoop loop
    for turn in range(plan.num_passes):
        number = turn_of_pass(job, plan, turn)
        set_pass(task, plan, number)
        loop = plan.loop_of_quads if plan.loop_of_quads != NULL and task.width >= 4 else plan.loop
        # The memoryview is copied with each call: 200 bytes, so only here.
        if not loop(job, job.rows[0], task):
            return False
    return True


cdef bint look_up_bags(const Lookup *job, const Plan *plan, Py_ssize_t first_bag, Py_ssize_t end_bag,
                       bint is_first) noexcept nogil:
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
    task.is_first = is_first
    task.first_bag = first_bag
    task.end_bag = end_bag
    if plan.num_passes == 1:
        return look_up_in_passes(job, plan, &task)
    while task.first_bag < end_bag:
        task.end_bag = min(task.first_bag + plan.bags_a_pass, end_bag)
        if plan.kind == GATHERED:
            # Each pass gathers anew: no further than it sums.
            task.limit = read_offset(job, task.end_bag)
            if not 0 <= task.limit <= job.num_indices:
                return False
        if not look_up_in_passes(job, plan, &task):
            return False
        task.first_bag = task.end_bag
        task.is_first = False
    return True
