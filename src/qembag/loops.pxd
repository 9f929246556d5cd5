"""What `_handle` and the loops (`_kernels`, once a level) share: jobs, and a level's functions."""

from libc.stdint cimport int32_t, int64_t, uint8_t


cdef enum Form:
    # What the rows of a loop are made of: the bits of their codes, with GROUPED unless one pair follows them as in
    # torch's rows. Or floats.
    BFLOAT16_ROWS = 16
    FLOAT16_ROWS = 17
    FLOAT32_ROWS = 32
    GROUPED = 64


cdef struct Layout:
    # How a row is laid out. `layout.RowLayout` works it out; these are its fields.
    int bits                    # of an element
    int form                    # see `Form`
    int pair_size               # bytes of a scale, and of a bias: 4 (float32) or 2 (float16)
    Py_ssize_t dim
    Py_ssize_t row_bytes        # padding included
    Py_ssize_t used_bytes       # from here on padding, which is never read
    Py_ssize_t codes_start
    Py_ssize_t codes_bytes
    Py_ssize_t full_dim         # elements for which there is room in those bytes
    Py_ssize_t pairs_start
    Py_ssize_t group_size       # elements that share a scale and a bias
    Py_ssize_t num_groups       # of a row: its pairs


cdef enum Mode:
    SUM = 0
    MEAN = 1
    MAX = 2
    AVERAGE = 3                 # by the sum of weights
    SQRTN = 4                   # by the root of the sum of their squares


# Of an output.
cdef enum OutType:
    FLOAT32_OUT = 0
    FLOAT16_OUT = 1
    BFLOAT16_OUT = 2


# What a long call in the main thread shares with its workers.
cdef struct Signals:
    bint has_raised             # a signal's handler has: all threads stop at their next look
    double next_look            # in seconds of `clock`
    void (*look)(volatile Signals *) noexcept nogil     # the loops know no Python


cdef struct Lookup:
    volatile Signals *signals   # NULL: a short call, or not in the main thread
    const uint8_t[:, :] *rows   # of a `TableHandle`, which the caller holds
    Layout layout
    Py_ssize_t num_rows
    # Indices, offsets and mapping are the caller's, and another thread may write to them during the call. Each is read
    # once where it is used, through a volatile pointer, and the value that was read is checked: without volatile the
    # compiler may read again after the check.
    const volatile int32_t *mapping     # NULL: not pruned
    Py_ssize_t num_embeddings
    # A size of 0 means that there is no such array: index i is row i; each bag has `bag_length` indices, and
    # `num_offsets` is 0; no weights.
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
    bint skips_invalid          # indices out of range are absent, as padding is
    Mode mode
    uint8_t *out
    Py_ssize_t out_stride
    OutType out_type
    int out_size                # of an element


# A bag among those of several lookups, which make up a call. An end is the place after the last bag.
cdef struct Place:
    Py_ssize_t lookup
    Py_ssize_t bag


# What could not be quantized. A unit is what has a scale and a bias: a group of a row. Units are numbered row by row.
cdef enum RowFault:
    FINE
    NOT_FINITE      # a NaN or an infinity in the unit
    TOO_WIDE        # scale or bias overflow their type
    NO_MEMORY


cdef enum Method:
    MINMAX = 0
    GREEDY = 1
    LEAST_SQUARES = 2


cdef struct Quantize:
    Layout layout
    Method method
    float num_bins              # of the greedy search
    float kept_bins             # it stops at this many of the bins
    const float *importance     # weights of a row's elements, for least squares; NULL: equal


cdef inline double quantizing_work(const Quantize *job, double num_rows) noexcept nogil:
    """What rows cost, in the units of `work_of`. The greedy search goes over a row twice for each bin, least squares
    about forty times, sixteen rows at once; min-max costs less than looking up a row from memory."""
    cdef double work = num_rows * (job.layout.dim + 64.0 * job.layout.num_groups)
    if job.method == GREEDY:
        return work * 2 * job.num_bins
    return work * 16 if job.method == LEAST_SQUARES else work


cdef struct Loops:
    # Whether offsets and indices are all in range, at a glance (0.1 ns an index). False where it takes a closer look.
    bint (*is_in_range)(const Lookup *job) noexcept nogil
    # The bags of some lookups from `first` to `end`, on up to so many threads. False where an index, an offset or a
    # mapped row is out of range, or where a signal's handler has raised.
    bint (*look_up)(const Lookup *lookups, Place first, Place end, int num_threads) noexcept nogil
    # Rows `first` to `end`. The fault of the lowest unit that has one, and which unit.
    RowFault (*quantize)(const Quantize *job, const float[:, ::1] weights, const float[:, ::1] bounds,
                         uint8_t[:, ::1] out, Py_ssize_t first, Py_ssize_t end, int num_threads,
                         Py_ssize_t *unit) noexcept nogil
    int (*max_threads)() noexcept nogil
    double (*clock)() noexcept nogil


cdef inline int64_t read_index(const Lookup *job, Py_ssize_t position, int index_size) noexcept nogil:
    if index_size == 8:
        return (<const volatile int64_t *> job.indices)[position]
    if index_size == 4:
        return (<const volatile int32_t *> job.indices)[position]
    return position


cdef inline int64_t read_offset(const Lookup *job, Py_ssize_t bag) noexcept nogil:
    """Where a bag starts; the one after the last starts at the end."""
    if bag < job.num_offsets:
        if job.offset_size == 8:
            return (<const volatile int64_t *> job.offsets)[bag]
        return (<const volatile int32_t *> job.offsets)[bag]
    if job.offset_size == 0:
        return bag * job.bag_length
    return job.num_indices


cdef inline double rows_of(const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag) noexcept nogil:
    """Rows of some bags; a bag's output counts as one. In double, where no difference of offsets overflows, whatever
    they hold."""
    if first_bag == end_bag:
        return 0                # an offset that is read twice may differ
    return <double> read_offset(job, end_bag) - <double> read_offset(job, first_bag) + (end_bag - first_bag)


cdef inline double work_of(const Lookup *job, Py_ssize_t first_bag, Py_ssize_t end_bag) noexcept nogil:
    """What bags cost: rows times (dim + 64), the 64 for what a row costs whatever its dim."""
    return rows_of(job, first_bag, end_bag) * (job.layout.dim + 64)


# ---- Several lookups ------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t end_bag_of(const Lookup *lookups, Py_ssize_t number, Place end) noexcept nogil:
    """Where the bags before `end` of one of the lookups end."""
    return end.bag if number == end.lookup else lookups[number].num_bags


cdef inline Py_ssize_t last_of(Place end) noexcept nogil:
    """The last lookup that has bags before `end`."""
    return end.lookup if end.bag > 0 else end.lookup - 1


cdef inline Py_ssize_t count_bags(const Lookup *lookups, Place first, Place end) noexcept nogil:
    cdef Py_ssize_t number, count = -first.bag
    for number in range(first.lookup, last_of(end) + 1):
        count += end_bag_of(lookups, number, end)
    return count


cdef enum:
    # What a lookup costs whatever it looks up, by the measure of `work_of`: some 30 ns.
    LOOKUP_WORK = 1 << 10


cdef inline double work_between(const Lookup *lookups, Place first, Place end) noexcept nogil:
    """By the measure of `work_of`, with what each lookup costs."""
    cdef Py_ssize_t number, bag = first.bag
    cdef double work = 0
    for number in range(first.lookup, last_of(end) + 1):
        work += LOOKUP_WORK + work_of(&lookups[number], bag, end_bag_of(lookups, number, end))
        bag = 0
    return work


cdef inline Place place_after(const Lookup *lookups, Place first, Place end, double work, double *done) noexcept nogil:
    """The last place up to which bags from `first` on cost no more than `work`; `done` is what they cost. Whatever
    another thread makes of the offsets meanwhile, it lies between `first` and `end`."""
    cdef Place place = first
    cdef Py_ssize_t low, high, middle
    cdef double left
    done[0] = 0
    while place.lookup < end.lookup:
        left = LOOKUP_WORK + work_of(&lookups[place.lookup], place.bag, lookups[place.lookup].num_bags)
        if done[0] + left > work:
            break
        done[0] += left
        place.lookup += 1
        place.bag = 0
    if place.lookup == end.lookup and end.bag == 0:
        return place
    low, high = place.bag, end_bag_of(lookups, place.lookup, end)
    while low < high:
        middle = low + (high - low + 1) // 2
        if done[0] + work_of(&lookups[place.lookup], place.bag, middle) <= work:
            low = middle
        else:
            high = middle - 1
    done[0] += work_of(&lookups[place.lookup], place.bag, low)
    place.bag = low
    if place.lookup < end.lookup and low == lookups[place.lookup].num_bags:
        place.lookup += 1
        place.bag = 0
    return place
