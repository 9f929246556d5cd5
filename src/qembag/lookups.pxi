# Part of _handle.pyx: the public lookups.

# `qembag._slow`: what is done with arguments that are not recognized here.
cdef object slow = None


def register_slow_path(module):
    global slow
    slow = module


cdef object new_output(Lookup *job, object indices, OutType out_type):
    """An array of (number of bags, dim), or for single rows of the indices' shape and the dim."""
    cdef cnp.npy_intp shape[32]
    cdef int ndim = 1, axis
    shape[0] = job.num_bags
    if indices is not None:
        ndim = cnp.PyArray_NDIM(<cnp.ndarray> indices)
        for axis in range(ndim):
            shape[axis] = cnp.PyArray_DIM(<cnp.ndarray> indices, axis)
    shape[ndim] = job.layout.dim
    result = cnp.PyArray_EMPTY(ndim + 1, shape, type_number_of(out_type), 0)
    job.out = <uint8_t *> cnp.PyArray_DATA(<cnp.ndarray> result)
    job.out_type = out_type
    job.out_size = cnp.PyArray_ITEMSIZE(<cnp.ndarray> result)
    job.out_stride = job.layout.dim * job.out_size
    return result


cdef object run_into(TableHandle handle, Lookup *job, bint is_pruned, object indices, object offsets, object weights,
                     object out, OutType out_type, int num_threads, bint out_is_checked):
    """Into an output of the caller's; None where it is not recognized, or may share memory with an input."""
    if not out_is_checked and not cnp.PyArray_CheckExact(out):
        return None
    if not take_out(job, out, out_type):
        return None
    if not out_is_checked and not is_apart(out, handle, is_pruned, indices, offsets, weights):
        return None
    return run(job, 1, True, num_threads, out)


cdef object bags(TableHandle handle, bint is_pruned, object indices, object offsets, bint include_last_offset,
                 object weights, int64_t padding_idx, bint skips_invalid, int mode, object out, OutType out_type,
                 int num_threads, bint out_is_checked):
    """The answer; or what is wrong, as `run` tells it; or None where an argument is not recognized."""
    cdef Lookup job = handle.job
    if not is_pruned:
        job.mapping = NULL
        job.num_embeddings = job.num_rows
    job.mode = <Mode> mode
    job.padding_idx = padding_idx
    job.skips_invalid = skips_invalid
    if not (take_indices(&job, indices) and take_bags(&job, indices, offsets, include_last_offset)
            and take_weights(&job, weights, indices)):
        return None
    if out is None:
        return run(&job, 1, False, num_threads, new_output(&job, None, out_type))
    return run_into(handle, &job, is_pruned, indices, offsets, weights, out, out_type, num_threads, out_is_checked)


cdef object single_rows(TableHandle handle, bint is_pruned, object indices, bint skips_invalid, bint dequantize,
                        object out, OutType out_type, int num_threads, bint out_is_checked):
    """The same for single rows, each a bag of its own; all rows where `indices` is None."""
    cdef Lookup job = handle.job
    if not is_pruned:
        job.mapping = NULL
        job.num_embeddings = job.num_rows
    # One row's maximum is its value; its sum is that added to zero, which loses the sign of a negative zero.
    job.mode = MAX if dequantize else SUM
    job.padding_idx = -1
    job.skips_invalid = skips_invalid
    if indices is None:
        job.index_size = 0
        job.num_indices = job.num_embeddings
    elif not take_indices(&job, indices) or cnp.PyArray_NDIM(<cnp.ndarray> indices) > 31:
        return None
    take_single_rows(&job)
    if out is None:
        return run(&job, 1, False, num_threads, new_output(&job, indices, out_type))
    if indices is not None and cnp.PyArray_NDIM(<cnp.ndarray> indices) != 1:
        return None
    return run_into(handle, &job, is_pruned, indices, None, None, out, out_type, num_threads, out_is_checked)


def look_up_bags(TableHandle handle not None, bint is_pruned, indices, offsets, bint include_last_offset, weights,
                 int64_t padding_idx, bint skips_invalid, int mode, out, int out_type, int num_threads):
    """`bags`, for the slow path, which has checked the output."""
    return bags(handle, is_pruned, indices, offsets, include_last_offset, weights, padding_idx, skips_invalid, mode,
                out, <OutType> out_type, num_threads, True)


def look_up_rows(TableHandle handle not None, bint is_pruned, indices, bint skips_invalid, bint dequantize, out,
                 int out_type, int num_threads):
    """`single_rows`, for the slow path, which has checked the output."""
    return single_rows(handle, is_pruned, indices, skips_invalid, dequantize, out, <OutType> out_type, num_threads,
                       True)


def dequantized_row(TableHandle handle not None, Py_ssize_t number):
    """The values of one logical row, from 0; what is wrong, as `run` tells it."""
    cdef Lookup job = handle.job
    cdef int64_t index = number
    job.mode = MAX
    job.padding_idx = -1
    job.indices = <const uint8_t *> &index
    job.index_size = 8
    job.num_indices = 1
    take_single_rows(&job)
    cdef cnp.npy_intp shape[1]
    shape[0] = job.layout.dim
    result = cnp.PyArray_EMPTY(1, shape, cnp.NPY_FLOAT32, 0)
    job.out = <uint8_t *> cnp.PyArray_DATA(<cnp.ndarray> result)
    job.out_type = FLOAT32_OUT
    job.out_size = 4
    job.out_stride = 0
    return run(&job, 1, False, 1, result)


def dequantize(TableHandle handle not None, rows, out):
    """Values of logical rows, of all where `rows` is None: `QuantizedTable.dequantize`."""
    answer = single_rows(handle, True, rows, False, True, out, FLOAT32_OUT, thread_limit, False)
    if cnp.PyArray_Check(answer):
        return answer
    return slow.look_up_rows(handle, True, rows, out=out, num_threads=thread_limit, dequantize=True, name="rows")


cdef TableHandle handle_of_any(object table):
    """A table's handle, or that of a plain array of floats; None for anything else."""
    if cnp.PyArray_CheckExact(table):
        return handle_of_array(table)
    return handle_of(table)


def embedding_bag(table, indices, offsets=None, *, lengths=None, mode="sum", per_sample_weights=None,
                  include_last_offset=False, padding_idx=None, invalid="raise", out=None, dtype=None, num_threads=None):
    """Sums, means or maxima of bags of rows.

    Parameters
    ----------
    table : QuantizedTable, FloatTable, or ndarray of floats, 2-D
        An array is short for a `FloatTable` of it.
    indices : array_like of integers, 1-D or 2-D
        Logical row numbers, from 0 to ``table.num_embeddings - 1``. Each row of a 2-D array is a bag. int32 and int64
        arrays in one piece are used as they are.
    offsets : array_like of integers, 1-D, optional
        For 1-D indices: bag b is ``indices[offsets[b]:offsets[b + 1]]``. They must not decrease. Indices before the
        first offset, or after a last one that `include_last_offset` makes an end, belong to no bag.
    lengths : array_like of integers, 1-D, optional
        For 1-D indices, in place of `offsets`: how many of them each bag has, one bag after the other. They sum to
        ``len(indices)``.
    mode : {"sum", "mean", "max", "average", "sqrtn"}
        "mean" divides by the bag's number of indices, pruned ones counted, padding and skipped ones not; "average" by
        the sum of their weights (as `numpy.average`), "sqrtn" by the square root of the sum of their squares; without
        weights each is 1. An empty bag is 0 in each mode, and so is one whose divisor is 0.
    per_sample_weights : array_like of float32, float16 or float64, optional
        One for each index, of the shape of `indices`. float64 is rounded to float32 first. Not with ``mode="max"``.
    include_last_offset : bool
        The last offset is the end of the last bag, not the start of one more.
    padding_idx : int, optional
        Entries with this index count as absent. Negative numbers count from the table's end.
    invalid : {"raise", "skip"}
        Whether an index out of range is an error, or counts as absent.
    out : ndarray of shape (num_bags, dim), optional
        Where to put the result: writeable, the elements of a row side by side, sharing no memory with another
        argument. After an error in the arguments it holds what it held before; after an exception from a signal's
        handler (KeyboardInterrupt) some of its rows are written. Long calls in the main thread handle signals about
        every 50 ms.
    dtype : {float32, float16, bfloat16}, optional
        The result's type, of `out` or float32 if not given. float16 and bfloat16 are rounded once, from the float32
        result. bfloat16 is the type that other packages add to NumPy's, such as ml_dtypes; with the string
        ``"bfloat16"`` the result holds its bits, as uint16, and so may `out`.
    num_threads : int, optional
        For this call; see `set_num_threads`.

    Returns
    -------
    ndarray of shape (num_bags, dim)
        `out`, where it is given.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If a shape, a length, an offset or an option is wrong.
    IndexError
        If an index is out of range, or the row that the table's mapping has for one.

    Notes
    -----
    For each row of a bag in turn, with weight w: ``acc = fma(w * scale, code, acc + w * bias)`` in float32, from 0,
    with the scale and bias of the element's group. These are the bits of PyTorch's ``quantized::embedding_bag_*``
    operators (FBGEMM's kernels), on every processor and at any number of threads. The mean is the sum times
    ``float32(1) / float32(count)``.

    Of a float table: ``acc = acc + x``, with weights ``acc = fma(w, x, acc)``, and the mean is the sum divided by the
    count. These are the bits of ``torch.nn.functional.embedding_bag`` for float32, but for weights together with
    `padding_idx`, and for sums of float16 to float16.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.arange(12, dtype=np.float32).reshape(4, 3))
    >>> qembag.embedding_bag(table, [0, 3, 1], offsets=[0, 2]).round(1)
    array([[ 9., 11., 13.],
           [ 3.,  4.,  5.]], dtype=float32)
    >>> qembag.embedding_bag(np.eye(3, dtype=np.float32), [0, 0, 2, 7], lengths=[3, 1], invalid="skip")
    array([[2., 0., 1.],
           [0., 0., 0.]], dtype=float32)
    """
    cdef TableHandle handle = handle_of_any(table)
    cdef int mode_number = mode_of(mode), out_type = out_type_of(dtype, out), threads = threads_of(num_threads)
    cdef int skips = skips_of(invalid)
    cdef bint last = include_last_offset is True
    cdef int64_t padding
    cdef object ends = offsets
    if (handle is not None and mode_number >= 0 and out_type >= 0 and threads >= 0 and skips >= 0
            and (last or include_last_offset is False)):
        padding = padding_of(padding_idx, handle.job.num_embeddings)
        if lengths is not None:
            ends = None
            if offsets is None and not last and lie_apart(out, lengths):
                ends, last = offsets_of_lengths(lengths, indices, 0), True
        if padding != NOT_RECOGNIZED and (lengths is None or ends is not None):
            answer = bags(handle, True, indices, ends, last, per_sample_weights, padding, skips, mode_number, out,
                          <OutType> out_type, threads, False)
            if cnp.PyArray_Check(answer):
                return answer
    return slow.embedding_bag(table, indices, offsets, lengths, mode, per_sample_weights, include_last_offset,
                              padding_idx, invalid, out, dtype, num_threads)


def embedding(table, indices, *, invalid="raise", out=None, dtype=None, num_threads=None):
    """Single rows, each a bag of its own: the sum of one row, in which a zero has no sign. `table.dequantize` keeps it.

    Parameters
    ----------
    table : QuantizedTable, FloatTable, or ndarray of floats, 2-D
    indices : array_like of integers, of any shape
        Row numbers, from 0 to ``table.num_embeddings - 1``. A pruned row is zeros.
    invalid : {"raise", "skip"}
        Whether an index out of range is an error, or gives zeros.
    out, dtype, num_threads
        As for `embedding_bag`; `out` has shape ``indices.shape + (dim,)``.

    Returns
    -------
    ndarray of shape indices.shape + (dim,)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `embedding_bag`.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.arange(12, dtype=np.float32).reshape(4, 3))
    >>> qembag.embedding(table, [[0, 3], [1, 1]]).shape
    (2, 2, 3)
    """
    cdef TableHandle handle = handle_of_any(table)
    cdef int out_type = out_type_of(dtype, out), threads = threads_of(num_threads), skips = skips_of(invalid)
    if handle is not None and indices is not None and out_type >= 0 and threads >= 0 and skips >= 0:
        answer = single_rows(handle, True, indices, skips, False, out, <OutType> out_type, threads, False)
        if cnp.PyArray_Check(answer):
            return answer
    return slow.embedding(table, indices, invalid, out, dtype, num_threads)
