# Part of _handle.pyx: arguments that the loops can take as they are.
#
# NumPy's C API recognizes arrays that come with a call: two of them in 41 ns, where acquiring a memoryview takes 235 ns
# for each (CPython 3.11, limited API), more than all the rest of a small call.

cdef bint is_plain(object array) noexcept:
    """C-contiguous, aligned, of the host's byte order: memory that a loop may run over. Subclasses have ways of their
    own (a mask, a fixed number of dimensions) and take the slow path."""
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
        job.num_offsets = 0
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


cdef void take_single_rows(Lookup *job) noexcept:
    """Each index is a bag of its own."""
    job.weight_size = 0
    job.offset_size = 0
    job.num_offsets = 0
    job.bag_length = 1
    job.num_bags = job.num_indices


cdef object offsets_of_lengths(object lengths, object indices, Py_ssize_t num_features):
    """From 0 to the number of indices; None where they are not recognized, or are no lengths of its bags. Those of a
    collection's features may be rows of an array; `num_features` is 0 for one table."""
    cdef int size = integer_size(lengths), ndim
    cdef Py_ssize_t bag, num_bags
    cdef cnp.npy_intp shape[1]
    cdef int64_t length, end = 0, num_indices
    cdef int64_t *ends
    if size == 0 or integer_size(indices) == 0:
        return None
    ndim = cnp.PyArray_NDIM(<cnp.ndarray> lengths)
    if ndim != 1 and (ndim != 2 or cnp.PyArray_DIM(<cnp.ndarray> lengths, 0) != num_features):
        return None
    if cnp.PyArray_NDIM(<cnp.ndarray> indices) != 1:
        return None
    num_indices = cnp.PyArray_SIZE(<cnp.ndarray> indices)
    num_bags = cnp.PyArray_SIZE(<cnp.ndarray> lengths)
    shape[0] = num_bags + 1
    offsets = cnp.PyArray_EMPTY(1, shape, cnp.NPY_INT64, 0)
    ends = <int64_t *> cnp.PyArray_DATA(<cnp.ndarray> offsets)
    ends[0] = 0
    for bag in range(num_bags):
        if size == 8:
            length = (<const volatile int64_t *> data_of(lengths))[bag]
        else:
            length = (<const volatile int32_t *> data_of(lengths))[bag]
        if not 0 <= length <= num_indices - end:
            return None
        end += length
        ends[bag + 1] = end
    return offsets if end == num_indices else None


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


# ---- Outputs ------------------------------------------------------------------------------------------------------

cdef struct Span:
    size_t low
    size_t high


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


cdef bint may_overlap(Span a, Span b) noexcept nogil:
    return a.low < b.high and b.low < a.high


cdef bint lie_apart(object out, object array) noexcept:
    """Whether an output, if there is one, shares no memory with an array, at a glance."""
    if out is None:
        return True
    return (cnp.PyArray_CheckExact(out) and cnp.PyArray_CheckExact(array)
            and not may_overlap(span_of(out), span_of(array)))


cdef bint is_apart(object out, TableHandle handle, bint is_pruned, object indices, object offsets,
                   object weights) noexcept:
    """Whether an output shares no memory with an input, at a glance."""
    cdef Span span = span_of(out)
    if may_overlap(span, span_of(handle.rows)) or (
            is_pruned and handle.mapping is not None and may_overlap(span, span_of(handle.mapping))):
        return False
    if indices is not None and may_overlap(span, span_of(indices)):
        return False
    if offsets is not None and may_overlap(span, span_of(offsets)):
        return False
    return weights is None or not may_overlap(span, span_of(weights))


cdef int type_number_of(OutType out_type) noexcept:
    """Of NumPy's types. bfloat16, which is none of them, is written as its bits."""
    if out_type == FLOAT32_OUT:
        return cnp.NPY_FLOAT32
    return cnp.NPY_FLOAT16 if out_type == FLOAT16_OUT else cnp.NPY_UINT16


cdef bint take_out(Lookup *job, object out, OutType out_type) noexcept:
    """An output of the caller's: rows of `dim` floats, at any distance from each other but not overlapping."""
    cdef cnp.ndarray array
    cdef Py_ssize_t dim = job.layout.dim
    if not cnp.PyArray_Check(out):
        return False
    array = <cnp.ndarray> out
    if (cnp.PyArray_TYPE(array) != type_number_of(out_type) or cnp.PyArray_NDIM(array) != 2
            or not cnp.PyArray_ISWRITEABLE(array) or not cnp.PyArray_ISNOTSWAPPED(array)):
        return False
    if cnp.PyArray_DIM(array, 0) != job.num_bags or cnp.PyArray_DIM(array, 1) != dim:
        return False
    job.out_type = out_type
    job.out_size = cnp.PyArray_ITEMSIZE(array)
    # The stride of fewer than two rows can be any number, up to where addresses wrap around.
    job.out_stride = cnp.PyArray_STRIDE(array, 0) if job.num_bags > 1 else 0
    if dim > 1 and job.num_bags > 0 and cnp.PyArray_STRIDE(array, 1) != job.out_size:
        return False
    if job.num_bags > 1 and abs(<double> job.out_stride) < <double> dim * job.out_size:
        return False
    job.out = <uint8_t *> cnp.PyArray_DATA(array)
    return True


# ---- Options ------------------------------------------------------------------------------------------------------

cdef enum:
    NOT_RECOGNIZED = -2

cdef object FLOAT32 = numpy.float32
cdef object FLOAT16 = numpy.float16


cdef int mode_of(object mode) noexcept:
    """The number of a mode's name."""
    if type(mode) is str:
        if mode == "sum":
            return SUM
        if mode == "mean":
            return MEAN
        if mode == "max":
            return MAX
        if mode == "average":
            return AVERAGE
        if mode == "sqrtn":
            return SQRTN
    return NOT_RECOGNIZED


cdef int skips_of(object invalid) noexcept:
    """Whether invalid indices are skipped."""
    if type(invalid) is str:
        if invalid == "raise":
            return False
        if invalid == "skip":
            return True
    return NOT_RECOGNIZED


cdef int out_type_of(object dtype, object out) noexcept:
    """The types that NumPy has, and the bits of bfloat16. What has the type of another package takes the slow path."""
    cdef int type_number
    if dtype is FLOAT32:
        return FLOAT32_OUT
    if dtype is FLOAT16:
        return FLOAT16_OUT
    if dtype is not None:
        return BFLOAT16_OUT if type(dtype) is str and dtype == "bfloat16" else NOT_RECOGNIZED
    if out is None:
        return FLOAT32_OUT
    if cnp.PyArray_CheckExact(out):
        type_number = cnp.PyArray_TYPE(<cnp.ndarray> out)
        if type_number == cnp.NPY_FLOAT32:
            return FLOAT32_OUT
        if type_number == cnp.NPY_FLOAT16:
            return FLOAT16_OUT
    return NOT_RECOGNIZED


cdef int threads_of(object num_threads) except? -1:
    """0 for OpenMP's limit."""
    cdef int overflow
    cdef long long number
    if num_threads is None:
        return thread_limit
    if type(num_threads) is int:
        number = PyLong_AsLongLongAndOverflow(num_threads, &overflow)
        if overflow == 0 and 1 <= number < 1 << 31:
            return <int> number
    return NOT_RECOGNIZED


cdef int64_t padding_of(object padding_idx, int64_t num_embeddings) except? -1:
    """From the start; -1 for none."""
    cdef int overflow
    cdef long long number
    if padding_idx is None:
        return -1
    if type(padding_idx) is int:
        number = PyLong_AsLongLongAndOverflow(padding_idx, &overflow)
        if overflow == 0 and -num_embeddings <= number < num_embeddings:
            return number + num_embeddings if number < 0 else number
    return NOT_RECOGNIZED
