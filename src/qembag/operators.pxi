# Part of _handle.pyx: PyTorch's lookup operators. `qembag.ops` has the others, and says how they differ.
#
# Each has its signature in full, for readers and editors; the work is done by three functions.

# `layout.packed_layout`: the layout of packed rows of some bits and bytes, or None.
cdef object packed_layout = None


def register_packed_layout(function):
    global packed_layout
    packed_layout = function


cdef extern from *:
    """
    #if defined(Py_GIL_DISABLED)
    #define KEEPS_LAYOUTS 0
    #else
    #define KEEPS_LAYOUTS 1
    #endif
    """
    enum: KEEPS_LAYOUTS

# The last layout of each width: a call of many has the one of the call before it. Not where two threads may replace one
# at once.
cdef LayoutFields last_8bit = None
cdef LayoutFields last_4bit = None
cdef LayoutFields last_2bit = None


cdef LayoutFields layout_of(int bits, Py_ssize_t row_bytes):
    global last_8bit, last_4bit, last_2bit
    if not KEEPS_LAYOUTS:
        return packed_layout(bits, row_bytes)
    cdef LayoutFields layout = last_8bit if bits == 8 else last_4bit if bits == 4 else last_2bit
    if layout is None or layout.fields.row_bytes != row_bytes:
        layout = packed_layout(bits, row_bytes)
        if bits == 8:
            last_8bit = layout
        elif bits == 4:
            last_4bit = layout
        else:
            last_2bit = layout
    return layout


cdef TableHandle handle_of_rows(object rows, int bits, object mapping):
    """A handle for packed rows that come with a call; None where they are not recognized."""
    cdef cnp.ndarray array
    cdef LayoutFields layout
    if not cnp.PyArray_CheckExact(rows):
        return None
    array = <cnp.ndarray> rows
    if cnp.PyArray_TYPE(array) != cnp.NPY_UINT8 or cnp.PyArray_NDIM(array) != 2:
        return None
    if cnp.PyArray_STRIDE(array, 1) != 1 and cnp.PyArray_DIM(array, 0) > 0 and cnp.PyArray_DIM(array, 1) > 1:
        return None
    layout = layout_of(bits, cnp.PyArray_DIM(array, 1))
    return None if layout is None else TableHandle.__new__(TableHandle, rows, layout, mapping)


cdef bint is_pruning_map(object mapping) noexcept:
    """Whether it is one as the loops take it. A mapping of exactly [0] means that nothing is pruned."""
    if integer_size(mapping) != 4 or cnp.PyArray_NDIM(<cnp.ndarray> mapping) != 1:
        return False
    return cnp.PyArray_DIM(<cnp.ndarray> mapping, 0) != 1 or (<const volatile int32_t *> data_of(mapping))[0] != 0


cdef int operator_mode(object mode) except? -1:
    cdef int overflow
    cdef long long number
    if type(mode) is int:
        number = PyLong_AsLongLongAndOverflow(mode, &overflow)
        if overflow == 0 and 0 <= number <= <int> MAX:
            return <int> number
    return NOT_RECOGNIZED


cdef object rowwise_offsets(int bits, object weight, object indices, object offsets, object mode, object pruned_weights,
                            object weights, object mapping, object include_last_offset, object out):
    cdef TableHandle handle = None
    cdef int mode_number = operator_mode(mode)
    if mode_number >= 0 and (include_last_offset is False or include_last_offset is True):
        if pruned_weights is False:
            handle = handle_of_rows(weight, bits, None)
        elif pruned_weights is True and is_pruning_map(mapping):
            handle = handle_of_rows(weight, bits, mapping)
    if handle is not None:
        answer = bags(handle, pruned_weights, indices, offsets, include_last_offset, weights, -1, False, mode_number,
                      out, FLOAT32_OUT, thread_limit, False)
        if cnp.PyArray_Check(answer):
            return answer
    return slow.rowwise_offsets(bits, weight, indices, offsets, mode, pruned_weights, weights, mapping,
                                include_last_offset, out)


cdef object packed_bags(int bits, object weight, object indices, object offsets, object mode, object pruned_weights,
                        object weights, object mapping, object include_last_offset, object out):
    cdef TableHandle handle = handle_of(weight)
    cdef int mode_number = operator_mode(mode)
    if (handle is not None and handle.job.layout.bits == bits and mode_number >= 0
            and (include_last_offset is False or include_last_offset is True)
            and (pruned_weights is False
                 or (pruned_weights is True and mapping is None and handle.job.mapping != NULL))):
        answer = bags(handle, pruned_weights, indices, offsets, include_last_offset, weights, -1, False, mode_number,
                      out, FLOAT32_OUT, thread_limit, False)
        if cnp.PyArray_Check(answer):
            return answer
    return slow.packed_bags(bits, weight, indices, offsets, mode, pruned_weights, weights, mapping, include_last_offset,
                            out)


cdef object packed_rows(int bits, object weight, object indices, object pruned_weights):
    cdef TableHandle handle = handle_of(weight)
    if (handle is not None and indices is not None and handle.job.layout.bits == bits
            and (pruned_weights is False or (pruned_weights is True and handle.job.mapping != NULL))):
        answer = single_rows(handle, pruned_weights, indices, False, False, None, FLOAT32_OUT, thread_limit, False)
        if cnp.PyArray_Check(answer):
            return answer
    return slow.packed_rows(bits, weight, indices, pruned_weights)


# ---- 8 bits -------------------------------------------------------------------------------------------------------

def embedding_bag_byte_rowwise_offsets(weight, indices, offsets=None, scale_grad_by_freq=False, mode=0,
                                       pruned_weights=False, per_sample_weights=None, compressed_indices_mapping=None,
                                       include_last_offset=False, *, out=None):
    """Bags of rows of a packed 8-bit array: ``quantized::embedding_bag_byte_rowwise_offsets``.

    Parameters
    ----------
    weight : ndarray of uint8, shape (num_rows, row_bytes)
        As `embedding_bag_byte_prepack` returns it.
    indices, offsets, per_sample_weights, include_last_offset, out
        As for `qembag.embedding_bag`; `out` is float32.
    scale_grad_by_freq : bool
        Without effect: there is no gradient.
    mode : {0, 1, 2}
        Sum, mean, max.
    pruned_weights : bool
        Whether `compressed_indices_mapping` counts.
    compressed_indices_mapping : array_like of int32, shape (num_embeddings,), optional
        The row of each logical index, -1 for a pruned one. Exactly ``[0]`` means that nothing is pruned.

    Returns
    -------
    ndarray of float32, shape (num_bags, dim)
        `out`, where it is given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding_bag`.
    """
    return rowwise_offsets(8, weight, indices, offsets, mode, pruned_weights, per_sample_weights,
                           compressed_indices_mapping, include_last_offset, out)


def embedding_bag_byte(weight, indices, offsets=None, scale_grad_by_freq=False, mode=0, pruned_weights=False,
                       per_sample_weights=None, compressed_indices_mapping=None, include_last_offset=False, *,
                       out=None):
    """Bags of rows of an 8-bit `QuantizedTable`. ``quantized::embedding_bag_byte``.

    Parameters
    ----------
    weight : QuantizedTable
        Of 8 bits.
    pruned_weights : bool
        Whether rows are pruned: by `compressed_indices_mapping` or, where that is None, by the table's own. If not,
        indices are numbers of stored rows.
    indices, offsets, scale_grad_by_freq, mode, per_sample_weights, compressed_indices_mapping, include_last_offset, out
        As for `embedding_bag_byte_rowwise_offsets`.

    Returns
    -------
    ndarray of float32, shape (num_bags, dim)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding_bag`; ValueError for a table of another width.
    """
    return packed_bags(8, weight, indices, offsets, mode, pruned_weights, per_sample_weights,
                       compressed_indices_mapping, include_last_offset, out)


def embedding_byte(weight, indices, pruned_weights=False):
    """Single rows of an 8-bit `QuantizedTable`. ``quantized::embedding_byte``.

    Parameters
    ----------
    weight : QuantizedTable
        Of 8 bits.
    indices : array_like of integers, of any shape
    pruned_weights : bool
        Whether the table's mapping counts. If not, indices are numbers of stored rows.

    Returns
    -------
    ndarray of float32, shape indices.shape + (dim,)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding`; ValueError for a table of another width, or for `pruned_weights` where the table
        carries no mapping.
    """
    return packed_rows(8, weight, indices, pruned_weights)


# ---- 4 bits -------------------------------------------------------------------------------------------------------

def embedding_bag_4bit_rowwise_offsets(weight, indices, offsets=None, scale_grad_by_freq=False, mode=0,
                                       pruned_weights=False, per_sample_weights=None, compressed_indices_mapping=None,
                                       include_last_offset=False, *, out=None):
    """Bags of rows of a packed 4-bit array: ``quantized::embedding_bag_4bit_rowwise_offsets``.

    Parameters
    ----------
    weight : ndarray of uint8, shape (num_rows, row_bytes)
        As `embedding_bag_4bit_prepack` returns it.
    indices, offsets, per_sample_weights, include_last_offset, out
        As for `qembag.embedding_bag`; `out` is float32.
    scale_grad_by_freq : bool
        Without effect: there is no gradient.
    mode : {0, 1, 2}
        Sum, mean, max.
    pruned_weights : bool
        Whether `compressed_indices_mapping` counts.
    compressed_indices_mapping : array_like of int32, shape (num_embeddings,), optional
        The row of each logical index, -1 for a pruned one. Exactly ``[0]`` means that nothing is pruned.

    Returns
    -------
    ndarray of float32, shape (num_bags, dim)
        `out`, where it is given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding_bag`.
    """
    return rowwise_offsets(4, weight, indices, offsets, mode, pruned_weights, per_sample_weights,
                           compressed_indices_mapping, include_last_offset, out)


def embedding_bag_4bit(weight, indices, offsets=None, scale_grad_by_freq=False, mode=0, pruned_weights=False,
                       per_sample_weights=None, compressed_indices_mapping=None, include_last_offset=False, *,
                       out=None):
    """Bags of rows of a 4-bit `QuantizedTable`. ``quantized::embedding_bag_4bit``.

    Parameters
    ----------
    weight : QuantizedTable
        Of 4 bits.
    pruned_weights : bool
        Whether rows are pruned: by `compressed_indices_mapping` or, where that is None, by the table's own. If not,
        indices are numbers of stored rows.
    indices, offsets, scale_grad_by_freq, mode, per_sample_weights, compressed_indices_mapping, include_last_offset, out
        As for `embedding_bag_4bit_rowwise_offsets`.

    Returns
    -------
    ndarray of float32, shape (num_bags, dim)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding_bag`; ValueError for a table of another width.
    """
    return packed_bags(4, weight, indices, offsets, mode, pruned_weights, per_sample_weights,
                       compressed_indices_mapping, include_last_offset, out)


def embedding_4bit(weight, indices, pruned_weights=False):
    """Single rows of a 4-bit `QuantizedTable`. ``quantized::embedding_4bit``.

    Parameters
    ----------
    weight : QuantizedTable
        Of 4 bits.
    indices : array_like of integers, of any shape
    pruned_weights : bool
        Whether the table's mapping counts. If not, indices are numbers of stored rows.

    Returns
    -------
    ndarray of float32, shape indices.shape + (dim,)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding`; ValueError for a table of another width, or for `pruned_weights` where the table
        carries no mapping.
    """
    return packed_rows(4, weight, indices, pruned_weights)


# ---- 2 bits -------------------------------------------------------------------------------------------------------

def embedding_bag_2bit_rowwise_offsets(weight, indices, offsets=None, scale_grad_by_freq=False, mode=0,
                                       pruned_weights=False, per_sample_weights=None, compressed_indices_mapping=None,
                                       include_last_offset=False, *, out=None):
    """Bags of rows of a packed 2-bit array: ``quantized::embedding_bag_2bit_rowwise_offsets``.

    Parameters
    ----------
    weight : ndarray of uint8, shape (num_rows, row_bytes)
        As `embedding_bag_2bit_prepack` returns it.
    indices, offsets, per_sample_weights, include_last_offset, out
        As for `qembag.embedding_bag`; `out` is float32.
    scale_grad_by_freq : bool
        Without effect: there is no gradient.
    mode : {0, 1, 2}
        Sum, mean, max.
    pruned_weights : bool
        Whether `compressed_indices_mapping` counts.
    compressed_indices_mapping : array_like of int32, shape (num_embeddings,), optional
        The row of each logical index, -1 for a pruned one. Exactly ``[0]`` means that nothing is pruned.

    Returns
    -------
    ndarray of float32, shape (num_bags, dim)
        `out`, where it is given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding_bag`.
    """
    return rowwise_offsets(2, weight, indices, offsets, mode, pruned_weights, per_sample_weights,
                           compressed_indices_mapping, include_last_offset, out)


def embedding_bag_2bit(weight, indices, offsets=None, scale_grad_by_freq=False, mode=0, pruned_weights=False,
                       per_sample_weights=None, compressed_indices_mapping=None, include_last_offset=False, *,
                       out=None):
    """Bags of rows of a 2-bit `QuantizedTable`. Ours: PyTorch has no such operator.

    Parameters
    ----------
    weight : QuantizedTable
        Of 2 bits.
    pruned_weights : bool
        Whether rows are pruned: by `compressed_indices_mapping` or, where that is None, by the table's own. If not,
        indices are numbers of stored rows.
    indices, offsets, scale_grad_by_freq, mode, per_sample_weights, compressed_indices_mapping, include_last_offset, out
        As for `embedding_bag_2bit_rowwise_offsets`.

    Returns
    -------
    ndarray of float32, shape (num_bags, dim)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding_bag`; ValueError for a table of another width.
    """
    return packed_bags(2, weight, indices, offsets, mode, pruned_weights, per_sample_weights,
                       compressed_indices_mapping, include_last_offset, out)


def embedding_2bit(weight, indices, pruned_weights=False):
    """Single rows of a 2-bit `QuantizedTable`. Ours: PyTorch has no such operator.

    Parameters
    ----------
    weight : QuantizedTable
        Of 2 bits.
    indices : array_like of integers, of any shape
    pruned_weights : bool
        Whether the table's mapping counts. If not, indices are numbers of stored rows.

    Returns
    -------
    ndarray of float32, shape indices.shape + (dim,)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `qembag.embedding`; ValueError for a table of another width, or for `pruned_weights` where the table
        carries no mapping.
    """
    return packed_rows(2, weight, indices, pruned_weights)
