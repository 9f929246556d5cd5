# Part of _handle.pyx: the public lookups.

# `qembag._slow`: what is done with arguments that are not recognized here.
cdef object slow = None


def register_slow_path(module):
    global slow
    slow = module


cdef object new_output(Lookup *job, object indices, bint half):
    """An array of (number of bags, dim), or for single rows of the indices' shape and the dim."""
    cdef cnp.npy_intp shape[32]
    cdef int type_number = cnp.NPY_FLOAT16 if half else cnp.NPY_FLOAT32
    cdef int ndim = 1, axis
    shape[0] = job.num_bags
    if indices is not None:
        ndim = cnp.PyArray_NDIM(<cnp.ndarray> indices)
        for axis in range(ndim):
            shape[axis] = cnp.PyArray_DIM(<cnp.ndarray> indices, axis)
    shape[ndim] = job.layout.dim
    result = cnp.PyArray_EMPTY(ndim + 1, shape, type_number, 0)
    job.out = <uint8_t *> cnp.PyArray_DATA(<cnp.ndarray> result)
    job.out_type = FLOAT16_OUT if half else FLOAT32_OUT
    job.out_size = cnp.PyArray_ITEMSIZE(<cnp.ndarray> result)
    job.out_stride = job.layout.dim * job.out_size
    return result


cdef object run_into(TableHandle handle, Lookup *job, bint is_pruned, object indices, object offsets, object weights,
                     object out, bint half, int num_threads, bint out_is_checked):
    """Into an output of the caller's; None where it is not recognized, or may share memory with an input."""
    if not out_is_checked and not cnp.PyArray_CheckExact(out):
        return None
    if not take_out(job, out, cnp.NPY_FLOAT16 if half else cnp.NPY_FLOAT32):
        return None
    if not out_is_checked and not is_apart(out, handle, is_pruned, indices, offsets, weights):
        return None
    return run(handle, job, True, num_threads, out)


cdef object bags(TableHandle handle, bint is_pruned, object indices, object offsets, bint include_last_offset,
                 object weights, int64_t padding_idx, int mode, object out, bint half, int num_threads,
                 bint out_is_checked):
    """The answer; or what is wrong, as `run` tells it; or None where an argument is not recognized."""
    cdef Lookup job = handle.job
    if not is_pruned:
        job.mapping = NULL
        job.num_embeddings = job.num_rows
    job.mode = <Mode> mode
    job.padding_idx = padding_idx
    if not (take_indices(&job, indices) and take_bags(&job, indices, offsets, include_last_offset)
            and take_weights(&job, weights, indices)):
        return None
    if out is None:
        return run(handle, &job, False, num_threads, new_output(&job, None, half))
    return run_into(handle, &job, is_pruned, indices, offsets, weights, out, half, num_threads, out_is_checked)


cdef object single_rows(TableHandle handle, bint is_pruned, object indices, bint dequantize, object out, bint half,
                        int num_threads, bint out_is_checked):
    """The same for single rows, each a bag of its own; all rows where `indices` is None."""
    cdef Lookup job = handle.job
    if not is_pruned:
        job.mapping = NULL
        job.num_embeddings = job.num_rows
    # One row's maximum is its value; its sum is that added to zero, which loses the sign of a negative zero.
    job.mode = MAX if dequantize else SUM
    job.padding_idx = -1
    job.weight_size = 0
    job.offset_size = 0
    job.num_offsets = 0
    job.bag_length = 1
    if indices is None:
        job.index_size = 0
        job.num_indices = job.num_embeddings
    elif not take_indices(&job, indices) or cnp.PyArray_NDIM(<cnp.ndarray> indices) > 31:
        return None
    job.num_bags = job.num_indices
    if out is None:
        return run(handle, &job, False, num_threads, new_output(&job, indices, half))
    if indices is not None and cnp.PyArray_NDIM(<cnp.ndarray> indices) != 1:
        return None
    return run_into(handle, &job, is_pruned, indices, None, None, out, half, num_threads, out_is_checked)


def look_up_bags(TableHandle handle not None, bint is_pruned, indices, offsets, bint include_last_offset, weights,
                 int64_t padding_idx, int mode, out, bint half, int num_threads):
    """`bags`, for the slow path, which has checked the output."""
    return bags(handle, is_pruned, indices, offsets, include_last_offset, weights, padding_idx, mode, out, half,
                num_threads, True)


def look_up_rows(TableHandle handle not None, bint is_pruned, indices, bint dequantize, out, bint half,
                 int num_threads):
    """`single_rows`, for the slow path, which has checked the output."""
    return single_rows(handle, is_pruned, indices, dequantize, out, half, num_threads, True)


def dequantized_row(TableHandle handle not None, Py_ssize_t number):
    """The values of one logical row, from 0; what is wrong, as `run` tells it."""
    cdef Lookup job = handle.job
    cdef int64_t index = number
    job.mode = MAX
    job.padding_idx = -1
    job.weight_size = 0
    job.offset_size = 0
    job.num_offsets = 0
    job.bag_length = 1
    job.indices = <const uint8_t *> &index
    job.index_size = 8
    job.num_indices = job.num_bags = 1
    cdef cnp.npy_intp shape[1]
    shape[0] = job.layout.dim
    result = cnp.PyArray_EMPTY(1, shape, cnp.NPY_FLOAT32, 0)
    job.out = <uint8_t *> cnp.PyArray_DATA(<cnp.ndarray> result)
    job.out_type = FLOAT32_OUT
    job.out_size = 4
    job.out_stride = 0
    return run(handle, &job, False, 1, result)


def dequantize(TableHandle handle not None, rows, out):
    """Values of logical rows, of all where `rows` is None: `QuantizedTable.dequantize`."""
    answer = single_rows(handle, True, rows, True, out, False, thread_limit, False)
    if cnp.PyArray_Check(answer):
        return answer
    return slow.look_up_rows(handle, True, rows, out=out, num_threads=thread_limit, dequantize=True, name="rows")


def embedding_bag(table, indices, offsets=None, *, mode="sum", per_sample_weights=None, include_last_offset=False,
                  padding_idx=None, out=None, dtype=None, num_threads=None):
    """Sums, means or maxima of bags of rows.

    Parameters
    ----------
    table : QuantizedTable
    indices : array_like of integers, 1-D or 2-D
        Logical row numbers, from 0 to ``table.num_embeddings - 1``. Each row of a 2-D array is a bag. int32 and int64
        arrays in one piece are used as they are.
    offsets : array_like of integers, 1-D, optional
        For 1-D indices: bag b is ``indices[offsets[b]:offsets[b + 1]]``. They must not decrease. Indices before the
        first offset, or after a last one that `include_last_offset` makes an end, belong to no bag.
    mode : {"sum", "mean", "max"}
        Means divide by the bag's number of indices, pruned ones counted, padding not. An empty bag is 0 in each mode.
    per_sample_weights : array_like of float32 or float16, optional
        One for each index, of the shape of `indices`. Not with ``mode="max"``.
    include_last_offset : bool
        The last offset is the end of the last bag, not the start of one more.
    padding_idx : int, optional
        Entries with this index count as absent. Negative numbers count from the table's end.
    out : ndarray of shape (num_bags, dim), optional
        Where to put the result: writeable, the elements of a row side by side, sharing no memory with another
        argument. After an error in the arguments it holds what it held before; after an exception from a signal's
        handler (KeyboardInterrupt) some of its rows are written. Long calls in the main thread handle signals about
        every 50 ms.
    dtype : {float32, float16}, optional
        The result's type, of `out` or float32 if not given. float16 is rounded once, from the float32 result.
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
        If an index is out of range.

    Notes
    -----
    For each row of a bag in turn, with weight w: ``acc = fma(w * scale, code, acc + w * bias)`` in float32, from 0.
    These are the bits of PyTorch's ``quantized::embedding_bag_*`` operators (FBGEMM's kernels), on every processor
    and at any number of threads. The mean is the sum times ``float32(1) / float32(count)``.

    Examples
    --------
    >>> import numpy as np, qembag
    >>> table = qembag.quantize(np.arange(12, dtype=np.float32).reshape(4, 3))
    >>> qembag.embedding_bag(table, [0, 3, 1], offsets=[0, 2]).round(1)
    array([[ 9., 11., 13.],
           [ 3.,  4.,  5.]], dtype=float32)
    """
    cdef TableHandle handle = handle_of(table)
    cdef int mode_number = mode_of(mode), half = half_of(dtype, out), threads = threads_of(num_threads)
    cdef int64_t padding
    if (handle is not None and mode_number >= 0 and half >= 0 and threads >= 0
            and (include_last_offset is False or include_last_offset is True)):
        padding = padding_of(padding_idx, handle.job.num_embeddings)
        if padding != NOT_RECOGNIZED:
            answer = bags(handle, True, indices, offsets, include_last_offset is True, per_sample_weights, padding,
                          mode_number, out, half, threads, False)
            if cnp.PyArray_Check(answer):
                return answer
    return slow.embedding_bag(table, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx, out,
                              dtype, num_threads)


def embedding(table, indices, *, out=None, dtype=None, num_threads=None):
    """Single rows, each a bag of its own.

    Parameters
    ----------
    table : QuantizedTable
    indices : array_like of integers, of any shape
        Row numbers, from 0 to ``table.num_embeddings - 1``. A pruned row is zeros.
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
    cdef TableHandle handle = handle_of(table)
    cdef int half = half_of(dtype, out), threads = threads_of(num_threads)
    if handle is not None and indices is not None and half >= 0 and threads >= 0:
        answer = single_rows(handle, True, indices, False, out, half, threads, False)
        if cnp.PyArray_Check(answer):
            return answer
    return slow.embedding(table, indices, out, dtype, num_threads)
