# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, autotestdict=False
"""The loops: bags of rows summed, rows quantized.

One source, compiled once per instruction-set level over the `lanes` of lanes.h. Nothing here knows Python's objects or
an error's text: `_handle` recognises arguments, calls these functions through the table `Loops`, and explains faults.

A lookup reads rows in the order of the indices, and accumulates them in registers, a block of up to sixteen vectors of
sixteen elements at a time. Where rows are left out (pruned tables), `gather` first turns a window of positions into the
numbers of the rows that take part. Each index and mapped row is read once, and what was read is checked.

Functions are inlined into the loops that use them, with `form` (what rows are made of), `width` (vectors of a block)
and `is_max` as constants: accumulators stay in registers only where their number is known at compile time.
"""

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange
from libc.math cimport INFINITY, isfinite, sqrtf
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from loops cimport (
    AVERAGE, BFLOAT16_ROWS, FINE, FLOAT16_ROWS, FLOAT32_OUT, FLOAT32_ROWS, GREEDY, GROUPED, LEAST_SQUARES, Layout,
    Lookup, Loops, MAX, MEAN, MINMAX, NOT_FINITE, NO_MEMORY, Place, Quantize, RowFault, SQRTN, TOO_WIDE, count_bags,
    end_bag_of, last_of, place_after, quantizing_work, read_index, read_offset, rows_of, work_between,
)

cdef extern from "parallel.h" nogil:
    int PARALLEL_OPENMP
    int parallel_max_threads()
    int parallel_enter(int)
    void parallel_leave()
    bint parallel_is_inside()
    bint parallel_is_forked()
    double parallel_clock()
    int parallel_processor()
    bint parallel_is_elsewhere(int)
    void parallel_judge(int, double)
    int parallel_team()
    int parallel_watch_forks()

cdef extern from "lanes.h" nogil:
    const char *LANES_LEVEL
    enum: LANES_MAX_BLOCK
    enum: LANES_QUADS
    enum: LANES_HAS_FMA
    enum: LANES_PAIRED
    ctypedef struct lanes:
        pass
    ctypedef struct pair_places:
        int32_t of_vector[8]
        int count
        bint are_halves
        bint are_eight

    lanes lanes_zero()
    lanes lanes_broadcast(float)
    lanes lanes_load(const float *)
    lanes lanes_load_part(const void *, Py_ssize_t, lanes)
    void lanes_store(float *, lanes)
    void store_part(uint8_t *, const float *, Py_ssize_t, int)
    lanes lanes_add(lanes, lanes)
    lanes lanes_add_by_fma(lanes, lanes)
    void lanes_accumulate(lanes *, lanes, lanes, lanes)
    lanes lanes_mul(lanes, lanes)
    lanes lanes_div(lanes, lanes)
    lanes lanes_fma(lanes, lanes, lanes)
    lanes lanes_max(lanes, lanes)
    lanes lanes_in_order_4bit(lanes)
    void lanes_in_order_quad(lanes *)
    lanes unpack_8bit(const uint8_t *)
    lanes unpack_4bit(const uint8_t *)
    lanes unpack_2bit(const uint8_t *)
    lanes unpack_8bit_short(const uint8_t *)
    lanes unpack_4bit_short(const uint8_t *)
    lanes unpack_float32(const uint8_t *)
    lanes unpack_float16(const uint8_t *)
    lanes unpack_bfloat16(const uint8_t *)
    void unpack_quad_8bit(const uint8_t *, lanes *)
    void unpack_quad_8bit_by_loads(const uint8_t *, lanes *)
    void unpack_quad_2bit(const uint8_t *, lanes *)
    void read_pair_float(const uint8_t *, lanes *, lanes *)
    void read_pair_half(const uint8_t *, lanes *, lanes *)
    void spread_pairs(const uint8_t *, const pair_places *, float *, float, bint, int)
    lanes pairs_of_quad(const float *, int)
    float float_of_half(uint16_t)
    void prefetch(const uint8_t *, bint)
    const uint8_t *as_computed(const uint8_t *)
    bint take_part(const int64_t *, int, int64_t, int64_t *, uint64_t *)
    int count_ones(uint64_t)
    int count_ones_below(uint64_t, int)
    bint unlikely "lanes_unlikely"(bint)


# ---- Signals ------------------------------------------------------------------------------------------------------

cdef enum:
    # Positions between two looks for signals: some milliseconds, whatever the dim.
    POSITIONS_A_LOOK = 1 << 16


cdef bint may_go_on(const Lookup *job) noexcept nogil:
    """Asked from time to time during a long bag of a long call, which one thread sums. Calls of many bags are done in
    pieces, with signals handled between them."""
    if job.signals == NULL:
        return True
    if not job.signals.has_raised and not parallel_is_inside():
        job.signals.look(job.signals)
    return not job.signals.has_raised


# ---- The caller's arrays ------------------------------------------------------------------------------------------

cdef enum:
    # Indices that are checked between two looks for signals: some 10 ms at most.
    CHECKED_AT_A_TIME = 1 << 22


cdef inline bint offsets_are_in_order(const Lookup *job, const int offset_size) noexcept nogil:
    """From 0 to the number of indices, none below the one before it."""
    cdef const int64_t *wide = <const int64_t *> job.offsets
    cdef const int32_t *narrow = <const int32_t *> job.offsets
    cdef Py_ssize_t bag, num_wrong = 0
    if job.num_offsets == 0:
        return True
    for bag in range(1, job.num_offsets):
        num_wrong += wide[bag] < wide[bag - 1] if offset_size == 8 else narrow[bag] < narrow[bag - 1]
    return num_wrong == 0 and 0 <= read_offset(job, 0) and read_offset(job, job.num_offsets - 1) <= job.num_indices


cdef inline bint indices_are_below(const Lookup *job, int64_t start, int64_t stop, const int index_size) noexcept nogil:
    cdef const uint64_t *wide = <const uint64_t *> job.indices
    cdef const uint32_t *narrow = <const uint32_t *> job.indices
    cdef uint64_t greatest = 0
    cdef uint32_t greatest_narrow = 0
    cdef int64_t position
    if index_size == 8:
        for position in range(start, stop):
            greatest = max(greatest, wide[position])
        return greatest < <uint64_t> job.num_embeddings
    for position in range(start, stop):
        greatest_narrow = max(greatest_narrow, narrow[position])
    # A negative number, as one without a sign, is beyond them all.
    return greatest_narrow < <uint64_t> min(<int64_t> job.num_embeddings, <int64_t> INT32_MAX + 1)


cdef bint is_in_range(const Lookup *job) noexcept nogil:
    """Loops that vectorize, over numbers that may change until a row is read: each is checked again there."""
    cdef int64_t start, middle, stop
    if job.mapping != NULL or job.index_size == 0:
        return False
    if not (offsets_are_in_order(job, 8) if job.offset_size == 8 else offsets_are_in_order(job, 4)):
        return False
    start = read_offset(job, 0)
    stop = read_offset(job, job.num_bags)
    if not 0 <= start <= stop <= job.num_indices:
        return False
    while start < stop and not job.skips_invalid and may_go_on(job):
        middle = min(start + <int64_t> CHECKED_AT_A_TIME, stop)
        if not (indices_are_below(job, start, middle, 8) if job.index_size == 8
                else indices_are_below(job, start, middle, 4)):
            return False
        start = middle
    return True


include "lookup_blocks.pxi"
include "lookup_bags.pxi"
include "lookup_gathered.pxi"
include "lookup_widths.pxi"
include "lookup_forms.pxi"
include "lookup_passes.pxi"
include "lookup_threads.pxi"
include "quantize_fit.pxi"
include "quantize_loops.pxi"


# ---- For `_handle` ------------------------------------------------------------------------------------------------

cdef int max_threads() noexcept nogil:
    return parallel_max_threads()


cdef double clock() noexcept nogil:
    return parallel_clock()


if parallel_watch_forks() != 0:
    raise MemoryError("qembag: no memory to watch for forks")

cdef Loops loops
loops.is_in_range = is_in_range
loops.look_up = look_up_shared
loops.quantize = quantize_shared
loops.max_threads = max_threads
loops.clock = clock

LEVEL = (<bytes> LANES_LEVEL).decode()
OPENMP = PARALLEL_OPENMP
LOOPS = PyCapsule_New(&loops, "qembag loops", NULL)
