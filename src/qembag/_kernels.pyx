# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, autotestdict=False
"""The loops: bags of rows summed, rows quantized.

One source, compiled once per instruction-set level over the `lanes` of lanes.h. Nothing here knows an
error's text or converts an argument: a function takes arrays of exactly the type and layout that its
loops need, and answers None where one is not (`lookup` then goes the slow road through `_arguments`).

A lookup reads each index, offset and mapped row once where it uses it and checks what it read, so nothing
outside the arrays is touched even while another thread writes to them. Such reads are volatile: a compiler may
otherwise read again after the check.
"""

import threading

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t, SIZE_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.math cimport isfinite, sqrtf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cnp.import_array()

cdef extern from "Python.h":
    # That of cpython.exc raises at once.
    int check_signals "PyErr_CheckSignals"() noexcept

cdef extern from "parallel.h" nogil:
    int PARALLEL_OPENMP
    int parallel_max_threads()
    int parallel_enter(int)
    void parallel_leave()
    bint parallel_is_inside()
    double parallel_clock()
    int parallel_watch_forks()
    bint parallel_is_stale()
    int parallel_add(volatile int *, int)
    void parallel_run(void (*function)(void *, int) noexcept nogil, void *argument, int num_threads)

cdef extern from "lanes.h" nogil:
    const char *LANES_LEVEL
    enum: LANES_MAX_BLOCK
    enum: LANES_QUADS
    enum: LANES_PAIRED
    ctypedef struct lanes:
        pass

    lanes lanes_zero()
    lanes lanes_broadcast(float)
    lanes lanes_load(const float *)
    void lanes_store(float *, lanes)
    void store_part(uint8_t *, const float *, Py_ssize_t, int)
    lanes lanes_add(lanes, lanes)
    lanes lanes_add_by_fma(lanes, lanes)
    void lanes_accumulate(lanes *, lanes, lanes, lanes)
    lanes lanes_mul(lanes, lanes)
    lanes lanes_fma(lanes, lanes, lanes)
    lanes lanes_max(lanes, lanes)
    lanes lanes_in_order_4bit(lanes)
    void lanes_in_order_quad(lanes *)
    lanes unpack_8bit(const uint8_t *)
    lanes unpack_4bit(const uint8_t *)
    lanes unpack_2bit(const uint8_t *)
    lanes unpack_8bit_short(const uint8_t *)
    lanes unpack_4bit_short(const uint8_t *)
    void unpack_quad_8bit(const uint8_t *, lanes *)
    void unpack_quad_8bit_by_loads(const uint8_t *, lanes *)
    void unpack_quad_2bit(const uint8_t *, lanes *)
    void read_tail_float(const uint8_t *, lanes *, lanes *)
    void read_tail_half(const uint8_t *, lanes *, lanes *)
    lanes lanes_min(lanes, lanes)
    lanes lanes_sub(lanes, lanes)
    lanes lanes_div(lanes, lanes)
    lanes lanes_round(lanes)
    lanes lanes_nonzero(lanes)
    lanes lanes_through_half(lanes)
    void lanes_store_half(uint16_t *, lanes)
    bint lanes_all_finite(lanes)
    void four_leasts(float *, lanes)
    void four_greatests(float *, lanes)
    lanes leasts_of_fours(const float *)
    lanes greatests_of_fours(const float *)
    lanes lanes_load_part(const float *, Py_ssize_t, lanes)
    void pack_8bit(uint8_t *, lanes)
    void pack_4bit(uint8_t *, lanes)
    void pack_2bit(uint8_t *, lanes)
    void pack_four_8bit(uint8_t *, lanes, lanes, lanes, lanes)
    void pack_four_4bit(uint8_t *, lanes, lanes, lanes, lanes)
    void pack_four_2bit(uint8_t *, lanes, lanes, lanes, lanes)
    float float_of_half(uint16_t)
    uint16_t half_of_float(float)
    uint32_t bits_of_float(float)
    void write_le16(uint8_t *, uint16_t)
    void write_le32(uint8_t *, uint32_t)
    void prefetch(const uint8_t *, bint)
    bint rarely(bint)

    ctypedef struct codes_8bit:
        pass
    ctypedef struct codes_4bit:
        pass
    ctypedef struct codes_2bit:
        pass
    ctypedef struct plain_int32:
        pass
    ctypedef struct plain_int64:
        pass
    ctypedef struct weighted_int32:
        pass
    ctypedef struct weighted_int64:
        pass
    ctypedef struct any_kind:
        pass
    ctypedef struct block_1:
        lanes *group
    ctypedef struct block_2:
        lanes *group
    ctypedef struct block_3:
        lanes *group
    ctypedef struct block_4:
        lanes *group
    ctypedef struct block_5:
        lanes *group
    ctypedef struct block_6:
        lanes *group
    ctypedef struct block_7:
        lanes *group
    ctypedef struct block_8:
        lanes *group
    ctypedef struct block_12:
        lanes *group
    ctypedef struct block_16:
        lanes *group
    ctypedef struct quads_4:
        lanes *group
    ctypedef struct quads_5:
        lanes *group
    ctypedef struct quads_6:
        lanes *group
    ctypedef struct quads_7:
        lanes *group
    ctypedef struct quads_8:
        lanes *group
    ctypedef struct quads_12:
        lanes *group
    ctypedef struct quads_16:
        lanes *group

ctypedef fused codes:
    codes_8bit
    codes_4bit
    codes_2bit

# What a lookup may hold: nothing but rows to add, or those with weights, by one type of index; or anything at all.
ctypedef fused kind:
    plain_int32
    plain_int64
    weighted_int32
    weighted_int64
    any_kind

ctypedef fused block:
    block_1
    block_2
    block_3
    block_4
    block_5
    block_6
    block_7
    block_8
    block_12
    block_16
    quads_4
    quads_5
    quads_6
    quads_7
    quads_8
    quads_12
    quads_16

# Blocks that start with groups unpacked four at a time.
ctypedef fused quads:
    quads_4
    quads_5
    quads_6
    quads_7
    quads_8
    quads_12
    quads_16

cdef enum Mode:
    SUM = 0
    MEAN = 1
    MAX = 2

LEVEL = (<bytes> LANES_LEVEL).decode()
OPENMP = PARALLEL_OPENMP


# What a long call in the main thread shares with its workers.
cdef struct Signals:
    bint has_raised         # a handler: all stop at the next look
    double next_look        # in seconds of parallel_clock


cdef struct Lookup:
    volatile Signals *signals           # NULL: nobody looks for them, and the call is done in one piece
    # The table. `codes_bytes` of a row are codes, its tail follows.
    const uint8_t *rows
    Py_ssize_t num_rows
    Py_ssize_t row_stride
    Py_ssize_t codes_bytes
    Py_ssize_t row_bytes
    Py_ssize_t dim
    int bits
    const volatile int32_t *mapping     # NULL: not pruned
    Py_ssize_t num_embeddings
    # The bags. An item size of 0 means that there is no such array: each bag then has bag_length indices
    # (no offsets), index i is row i (no indices).
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
    Mode mode
    # The output
    uint8_t *out
    Py_ssize_t out_stride
    int out_size
    Py_ssize_t prefetch_distance
    bint use_quads
    bint pair_bags


cdef inline int64_t read_index(const Lookup *job, Py_ssize_t position) noexcept nogil:
    if job.index_size == 8:
        return (<const volatile int64_t *> job.indices)[position]
    if job.index_size == 4:
        return (<const volatile int32_t *> job.indices)[position]
    return position


cdef inline int64_t read_offset(const Lookup *job, Py_ssize_t bag) noexcept nogil:
    """Where a bag starts; the one after the last starts at the end."""
    if job.offset_size == 0:
        return bag * job.bag_length
    if bag >= job.num_offsets:
        return job.num_indices
    if job.offset_size == 8:
        return (<const volatile int64_t *> job.offsets)[bag]
    return (<const volatile int32_t *> job.offsets)[bag]


cdef inline float read_weight(const Lookup *job, Py_ssize_t position) noexcept nogil:
    if job.weight_size == 4:
        return (<const float *> job.weights)[position]
    return float_of_half((<const uint16_t *> job.weights)[position])


# A long call in the main thread sees to signals so often: Ctrl-C is answered within a fraction of a second.
cdef double PIECE_SECONDS = 0.05


cdef bint handle_signals() noexcept with gil:
    """False where a handler has raised."""
    return check_signals() == 0


cdef bint may_go_on(const Lookup *job) noexcept nogil:
    """Asked by each thread of a long call from time to time. The main thread sees to signals, except while it works with
    others: a handler may fork, and a child inside a region would wait for threads that it does not have. What is shared
    out is one piece at most, so signals wait for PIECE_SECONDS or so."""
    cdef double now
    if job.signals == NULL:
        return True
    if not job.signals.has_raised and not parallel_is_inside():
        now = parallel_clock()
        # Not at each look: another thread may keep the GIL for milliseconds.
        if now >= job.signals.next_look:
            job.signals.next_look = now + PIECE_SECONDS
            job.signals.has_raised = not handle_signals()
    return not job.signals.has_raised


include "_bags.pxi"


# ---- What is wrong ----------------------------------------------------------------------------------------

cdef enum Where:
    NOWHERE
    IN_INDICES
    IN_OFFSETS
    IN_MAPPING

cdef struct Fault:
    Where where
    Py_ssize_t position         # in that array
    Py_ssize_t bag
    int64_t value
    Py_ssize_t index_position   # IN_MAPPING: the index that led there


cdef enum:
    # Offsets or indices that are checked before the next look for signals: some 10 ms at most.
    CHECKED_AT_A_TIME = 1 << 22


cdef Fault find_fault(const Lookup *job) noexcept nogil:
    """The first bad offset; where all are right, the first bad index or mapped row of the bags, in order. Nothing where
    a signal's handler has raised."""
    cdef Fault fault
    cdef Py_ssize_t bag, position, num_checked = 0
    cdef int64_t start, stop, index, row
    fault.where = NOWHERE
    fault.position = fault.bag = fault.index_position = 0
    fault.value = 0
    start = 0
    for bag in range(job.num_offsets if job.offset_size != 0 else 0):
        stop = read_offset(job, bag)
        if not start <= stop <= job.num_indices:
            fault.where = IN_OFFSETS
            fault.position = bag
            fault.value = stop
            return fault
        if bag % CHECKED_AT_A_TIME == CHECKED_AT_A_TIME - 1 and not may_go_on(job):
            return fault
        start = stop
    start = read_offset(job, 0)
    for bag in range(job.num_bags):
        stop = min(read_offset(job, bag + 1), job.num_indices)
        for position in range(max(start, 0), stop):
            num_checked += 1
            if num_checked % CHECKED_AT_A_TIME == 0 and not may_go_on(job):
                return fault
            index = read_index(job, position)
            if index == job.padding_idx and index >= 0:
                continue
            fault.bag = bag
            fault.value = index
            fault.position = fault.index_position = position
            if not 0 <= index < job.num_embeddings:
                fault.where = IN_INDICES
                return fault
            if job.mapping != NULL:
                row = job.mapping[index]
                if not -1 <= row < job.num_rows:
                    fault.where = IN_MAPPING
                    fault.position = index
                    fault.value = row
                    return fault
        start = stop
    return fault


cdef bint is_in_range(const Lookup *job) noexcept nogil:
    """Whether all is right, at a glance, so that the usual call with an output need not search for a fault: offsets one
    by one, indices in a loop that vectorises (0.1 ns an index). False where it takes a closer look."""
    cdef Py_ssize_t bag, position, middle
    cdef int64_t start = 0, stop
    cdef uint64_t end = job.num_embeddings
    cdef bint wrong = False
    if job.mapping != NULL or job.index_size == 0:
        return False
    for bag in range(job.num_offsets if job.offset_size != 0 else 0):
        stop = read_offset(job, bag)
        wrong |= stop < start
        start = stop
    if wrong or start > job.num_indices:
        return False
    start = read_offset(job, 0)
    stop = read_offset(job, job.num_bags)
    if not 0 <= start <= stop <= job.num_indices:
        return False
    while start < stop and may_go_on(job):
        middle = min(start + CHECKED_AT_A_TIME, stop)
        if job.index_size == 4:
            for position in range(start, middle):
                wrong |= <uint64_t> (<const int32_t *> job.indices)[position] >= end
        else:
            for position in range(start, middle):
                wrong |= <uint64_t> (<const int64_t *> job.indices)[position] >= end
        start = middle
    return not wrong


# ---- From Python --------------------------------------------------------------------------------------------

cdef struct Span:
    size_t low
    size_t high


cdef bint is_plain(object array) noexcept:
    """C-contiguous, aligned, of the host's byte order: memory that a loop may run over. Subclasses have ways of their
    own (a mask, a fixed number of dimensions) and take the slow road."""
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> array)


cdef int integer_size(object array) noexcept:
    """4 or 8 for a plain array of int32 or int64, else 0."""
    cdef int size
    if is_plain(array) and cnp.PyArray_ISSIGNED(<cnp.ndarray> array):
        size = cnp.PyArray_ITEMSIZE(<cnp.ndarray> array)
        if size == 4 or size == 8:
            return size
    return 0


cdef const uint8_t *data_of(object array) noexcept:
    return <const uint8_t *> cnp.PyArray_DATA(<cnp.ndarray> array)


cdef Py_ssize_t stride_between(cnp.ndarray rows) noexcept:
    """From one row to the next. Of fewer than two it can be any number, up to where addresses wrap around."""
    return cnp.PyArray_STRIDE(rows, 0) if cnp.PyArray_DIM(rows, 0) > 1 else 0


cdef bint take_table(Lookup *job, object rows, int bits, Py_ssize_t dim, object mapping) noexcept:
    cdef cnp.ndarray array
    if not cnp.PyArray_Check(rows):
        return False
    array = <cnp.ndarray> rows
    if cnp.PyArray_TYPE(array) != cnp.NPY_UINT8 or cnp.PyArray_NDIM(array) != 2 or dim < 1:
        return False
    if bits != 8 and bits != 4 and bits != 2:
        return False
    job.bits = bits
    job.dim = dim
    job.codes_bytes = (dim - 1) // (8 // bits) + 1
    job.row_bytes = cnp.PyArray_DIM(array, 1)
    # The strides of an array without elements say nothing: NumPy may make them 0.
    if (job.row_bytes - job.codes_bytes != (8 if bits == 8 else 4)
            or (cnp.PyArray_STRIDE(array, 1) != 1 and cnp.PyArray_DIM(array, 0) > 0)):
        return False
    job.rows = data_of(array)
    job.num_rows = cnp.PyArray_DIM(array, 0)
    job.row_stride = stride_between(array)
    job.mapping = NULL
    job.num_embeddings = job.num_rows
    if mapping is not None:
        if integer_size(mapping) != 4 or cnp.PyArray_NDIM(<cnp.ndarray> mapping) != 1:
            return False
        job.num_embeddings = cnp.PyArray_DIM(<cnp.ndarray> mapping, 0)
        job.mapping = <const volatile int32_t *> data_of(mapping)
    # How far ahead to prefetch, in rows: about 8 KiB of what one pass reads of each, its codes and the tail's line.
    job.prefetch_distance = max(min(8192 // min(job.row_bytes, LANES_MAX_BLOCK * 2 * job.bits + 64), 64), 8)
    return True


cdef bint take_indices(Lookup *job, object indices) noexcept:
    job.index_size = integer_size(indices)
    if job.index_size == 0:
        return False
    job.indices = data_of(indices)
    job.num_indices = cnp.PyArray_SIZE(<cnp.ndarray> indices)
    return True


cdef bint take_bags(Lookup *job, object indices, object offsets, bint include_last_offset) noexcept:
    cdef int ndim = cnp.PyArray_NDIM(<cnp.ndarray> indices)
    if offsets is None:
        if ndim != 2:
            return False
        job.offset_size = 0
        job.num_bags = cnp.PyArray_DIM(<cnp.ndarray> indices, 0)
        job.bag_length = cnp.PyArray_DIM(<cnp.ndarray> indices, 1)
        return True
    job.offset_size = integer_size(offsets)
    if ndim != 1 or job.offset_size == 0 or cnp.PyArray_NDIM(<cnp.ndarray> offsets) != 1:
        return False
    job.offsets = data_of(offsets)
    job.num_offsets = cnp.PyArray_DIM(<cnp.ndarray> offsets, 0)
    job.num_bags = job.num_offsets - include_last_offset
    return job.num_bags >= 0


cdef bint take_weights(Lookup *job, object weights, object indices) noexcept:
    cdef int axis
    job.weight_size = 0
    if weights is None:
        return True
    if not is_plain(weights) or job.mode == MAX:
        return False
    if cnp.PyArray_TYPE(<cnp.ndarray> weights) == cnp.NPY_FLOAT32:
        job.weight_size = 4
    elif cnp.PyArray_TYPE(<cnp.ndarray> weights) == cnp.NPY_FLOAT16:
        job.weight_size = 2
    else:
        return False
    job.weights = data_of(weights)
    if cnp.PyArray_NDIM(<cnp.ndarray> weights) != cnp.PyArray_NDIM(<cnp.ndarray> indices):
        return False
    for axis in range(cnp.PyArray_NDIM(<cnp.ndarray> weights)):
        if cnp.PyArray_DIM(<cnp.ndarray> weights, axis) != cnp.PyArray_DIM(<cnp.ndarray> indices, axis):
            return False
    return True


cdef Span span_of(object array) noexcept:
    """The addresses from an array's first byte to its last; all that there are where shape and strides reach beyond
    them, as those of `as_strided` may."""
    cdef Span span
    cdef int axis
    cdef Py_ssize_t steps, stride
    cdef size_t reach
    span.low = span.high = <size_t> data_of(array)
    if cnp.PyArray_SIZE(<cnp.ndarray> array) > 0:
        span.high += cnp.PyArray_ITEMSIZE(<cnp.ndarray> array)
        for axis in range(cnp.PyArray_NDIM(<cnp.ndarray> array)):
            steps = cnp.PyArray_DIM(<cnp.ndarray> array, axis) - 1
            stride = cnp.PyArray_STRIDE(<cnp.ndarray> array, axis)
            # In double first: less than this is exact as an integer, too.
            if abs(<double> steps * <double> stride) >= <double> (SIZE_MAX // 4):
                span.low, span.high = 0, SIZE_MAX
                break
            if stride < 0:
                reach = <size_t> -(stride * steps)
                span.low -= min(reach, span.low)
            else:
                reach = <size_t> (stride * steps)
                span.high += min(reach, SIZE_MAX - span.high)
    return span


cdef bint may_overlap(object out, object other) noexcept:
    cdef Span a, b
    if other is None:
        return False
    a = span_of(out)
    b = span_of(other)
    return a.low < b.high and b.low < a.high


cdef bint take_out(Lookup *job, object out, int type_number) noexcept:
    """An output of the caller's: rows of `dim` floats, at any distance from each other but not overlapping."""
    cdef cnp.ndarray array
    if not cnp.PyArray_Check(out):
        return False
    array = <cnp.ndarray> out
    if (cnp.PyArray_TYPE(array) != type_number or cnp.PyArray_NDIM(array) != 2
            or not cnp.PyArray_ISWRITEABLE(array) or not cnp.PyArray_ISNOTSWAPPED(array)):
        return False
    if cnp.PyArray_DIM(array, 0) != job.num_bags or cnp.PyArray_DIM(array, 1) != job.dim:
        return False
    job.out_size = cnp.PyArray_ITEMSIZE(array)
    job.out_stride = stride_between(array)
    if job.dim > 1 and job.num_bags > 0 and cnp.PyArray_STRIDE(array, 1) != job.out_size:
        return False
    if job.num_bags > 1 and abs(<double> job.out_stride) < <double> job.dim * job.out_size:
        return False
    job.out = <uint8_t *> cnp.PyArray_DATA(array)
    return True


# A long call in the main thread is done in pieces, and between two of them Python sees to its signals. The first piece
# is of this much work (see MIN_PARALLEL_WORK), 1 to 50 ms; the next are of as much as takes PIECE_SECONDS.
cdef double FIRST_PIECE = 1 << 25


cdef bint is_main_thread():
    return threading.get_ident() == threading.main_thread().ident


cdef int end_piece(double *work, double *started) except -1:
    """Raises what a signal's handler raises; sets the work of the next piece by the time that this one took."""
    PyErr_CheckSignals()
    cdef double now = parallel_clock()
    work[0] *= min(max(PIECE_SECONDS / max(now - started[0], 1e-9), 0.125), 8.0)
    started[0] = now
    return 0


cdef int raise_as_set() except -1:
    """A signal's handler has raised where nothing could be raised further."""
    return -1


# Work (see MIN_PARALLEL_WORK) up to which a call keeps the GIL: some 4 us. With 32 threads that give it back and wait
# for it again, all calls a second are 0.2 to 0.4 of one thread's; with it kept, 1.0.
cdef double MAX_WORK_WITH_GIL = 1 << 17


cdef int look_up_all(Lookup *job, bint check_first, int num_threads, Fault *fault) except -1 nogil:
    """1 if all went well, 0 with a fault, which is NOWHERE where all is right again."""
    cdef Py_ssize_t first = 0, end = job.num_bags
    cdef double work = FIRST_PIECE, started = 0
    cdef bint in_pieces = job.signals != NULL
    fault.where = NOWHERE
    if check_first and not is_in_range(job):
        fault[0] = find_fault(job)
        if fault.where != NOWHERE:
            return 0
    if in_pieces and job.signals.has_raised:
        return 0
    choose_loops(job)
    if in_pieces:
        started = parallel_clock()
    while True:
        if in_pieces:
            end = end_of_piece(job, first, work)
        if not look_up_shared(job, first, end, num_threads):
            break
        if end == job.num_bags:
            return 1
        first = end
        with gil:
            end_piece(&work, &started)
    fault[0] = find_fault(job)
    return 0


cdef object run(Lookup *job, bint check_first, int num_threads, object result):
    """The lookup; `result`, or what is wrong as (argument, position, bag, value, position in indices)."""
    cdef Fault fault
    cdef Signals signals
    cdef int succeeded
    cdef double work = work_of(job, 0, job.num_bags)
    signals.has_raised = False
    signals.next_look = 0
    job.signals = &signals if work > FIRST_PIECE and is_main_thread() else NULL
    if work <= MAX_WORK_WITH_GIL:
        succeeded = look_up_all(job, check_first, num_threads, &fault)
    else:
        with nogil:
            succeeded = look_up_all(job, check_first, num_threads, &fault)
    if signals.has_raised:
        raise_as_set()
    if succeeded:
        return result
    name = ("changed", "indices", "offsets", "compressed_indices_mapping")[<int> fault.where]
    return (name, fault.position, fault.bag, fault.value, fault.index_position)


cdef object finish(Lookup *job, object out, bint half, int num_threads, bint out_checked, object inputs):
    """Into `out`, or into an array made here. None where `out` is not for the loops to take, or may share memory with
    an input; `out_checked` says that somebody has made sure of that."""
    cdef cnp.npy_intp shape[2]
    cdef int type_number = cnp.NPY_FLOAT16 if half else cnp.NPY_FLOAT32
    if out is not None:
        if not (out_checked or cnp.PyArray_CheckExact(out)) or not take_out(job, out, type_number):
            return None
        if not out_checked:
            for other in inputs:
                if may_overlap(out, other):
                    return None
        return run(job, True, num_threads, out)
    shape[0] = job.num_bags
    shape[1] = job.dim
    result = cnp.PyArray_EMPTY(2, shape, type_number, 0)
    if not take_out(job, result, type_number):
        raise SystemError("an array just made is not as it was made")
    return run(job, False, num_threads, result)


def embedding_bag(object rows, int bits, Py_ssize_t dim, object mapping, object indices, object offsets,
                  bint include_last_offset, object per_sample_weights, int64_t padding_idx, int mode, object out,
                  bint half, int num_threads, bint out_checked=False):
    cdef Lookup job
    job.mode = <Mode> mode
    job.padding_idx = padding_idx
    if not (take_table(&job, rows, bits, dim, mapping) and take_indices(&job, indices)
            and take_bags(&job, indices, offsets, include_last_offset)
            and take_weights(&job, per_sample_weights, indices)):
        return None
    inputs = None if out is None else (rows, indices, offsets, per_sample_weights, mapping)
    return finish(&job, out, half, num_threads, out_checked, inputs)


def embedding(object rows, int bits, Py_ssize_t dim, object mapping, object indices, bint dequantize, object out,
              bint half, int num_threads, bint out_checked=False):
    cdef Lookup job
    # One row's maximum is its value; its sum is that added to zero, which loses the sign of a negative zero.
    job.mode = MAX if dequantize else SUM
    job.padding_idx = -1
    job.weight_size = 0
    if not take_table(&job, rows, bits, dim, mapping):
        return None
    if indices is None:
        job.index_size = 0
        job.num_indices = job.num_embeddings
    elif not take_indices(&job, indices) or cnp.PyArray_NDIM(<cnp.ndarray> indices) != 1:
        return None
    job.offset_size = 0
    job.bag_length = 1
    job.num_bags = job.num_indices
    inputs = None if out is None else (rows, indices, mapping)
    return finish(&job, out, half, num_threads, out_checked, inputs)


def max_threads():
    """OpenMP's limit at this moment; 1 without OpenMP."""
    return parallel_max_threads()


if parallel_watch_forks() != 0:
    raise MemoryError("qembag: no memory to watch for forks")


include "_quantize.pxi"
