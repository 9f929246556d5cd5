# Part of _handle.pyx: lookups of many tables in one call.

cdef struct TableSpans:
    Span rows
    Span mapping


cdef class CollectionHandle:
    """Features of a collection as the loops take them: a lookup for each, complete but for what comes with a call."""

    cdef Lookup *features
    cdef TableSpans *spans
    cdef Py_ssize_t *columns            # of the output, where a feature's begin
    cdef readonly Py_ssize_t num_features
    cdef readonly Py_ssize_t dim        # of all features
    cdef readonly tuple names
    cdef readonly tuple tables          # the handles

    def __cinit__(self, tuple names not None, tuple tables not None, tuple modes not None, tuple paddings not None,
                  tuple skips_invalid not None):
        cdef Py_ssize_t number, count = len(names)
        cdef TableHandle handle
        cdef Lookup *lookup
        if not 0 < count == len(tables) == len(modes) == len(paddings) == len(skips_invalid):
            raise ValueError("internal error: a collection of features that are not all described")
        self.names = names
        self.tables = tables
        self.num_features = count
        self.features = <Lookup *> calloc(count, sizeof(Lookup))
        self.spans = <TableSpans *> calloc(count, sizeof(TableSpans))
        self.columns = <Py_ssize_t *> calloc(count + 1, sizeof(Py_ssize_t))
        if self.features == NULL or self.spans == NULL or self.columns == NULL:
            raise MemoryError
        for number in range(count):
            handle = tables[number]
            if handle is None:
                raise ValueError("internal error: a feature without a table")
            lookup = &self.features[number]
            lookup[0] = handle.job
            lookup.mode = <Mode> <int> modes[number]
            lookup.padding_idx = paddings[number]
            lookup.skips_invalid = skips_invalid[number]
            self.spans[number].rows = span_of(handle.rows)
            if handle.mapping is not None:
                self.spans[number].mapping = span_of(handle.mapping)
            if lookup.layout.dim > PY_SSIZE_T_MAX - self.columns[number]:
                raise ValueError("internal error: more columns than can be counted")
            self.columns[number + 1] = self.columns[number] + lookup.layout.dim
        self.dim = self.columns[count]

    def __dealloc__(self):
        free(self.features)
        free(self.spans)
        free(self.columns)


cdef struct OutputSpan:
    Span span
    size_t width        # bytes of a row


# Arrays to write to.
cdef struct Outputs:
    OutputSpan *each
    Py_ssize_t count
    Py_ssize_t stride   # from row to row, if all have the same and more than one row; else 0
    bint are_apart      # each behind the one before it, in the order of their addresses
    Span hull


cdef class Lookups:
    """The lookups of one call, and what they read and write, which is held until it ends: a caller's dict may lose an
    array meanwhile."""

    cdef Lookup *each
    cdef OutputSpan *spans              # for the outputs of a dict
    cdef Py_ssize_t count
    cdef list held

    def __cinit__(self, Py_ssize_t count):
        self.each = <Lookup *> malloc(max(count, 1) * (sizeof(Lookup) + sizeof(OutputSpan)))
        if self.each == NULL:
            raise MemoryError
        self.spans = <OutputSpan *> &self.each[count]
        self.count = count
        self.held = []

    def __dealloc__(self):
        free(self.each)


# ---- Inputs -------------------------------------------------------------------------------------------------------

cdef bint take_all_features(Lookups lookups, CollectionHandle handle, object indices, object offsets, object weights,
                            Py_ssize_t *batch) except -1:
    """From arrays that hold the indices and bags of one feature after the other."""
    cdef Lookup whole
    cdef Lookup *lookup
    cdef Py_ssize_t number
    memset(&whole, 0, sizeof(whole))
    if not take_indices(&whole, indices) or cnp.PyArray_NDIM(<cnp.ndarray> indices) != 1 or offsets is None:
        return False
    if not take_bags(&whole, indices, offsets, True) or whole.num_bags % handle.num_features != 0:
        return False
    if not take_weights(&whole, weights, indices):
        return False
    batch[0] = whole.num_bags // handle.num_features
    for number in range(handle.num_features):
        lookup = &lookups.each[number]
        lookup[0] = handle.features[number]
        if weights is not None and lookup.mode == MAX:
            return False
        lookup.indices = whole.indices
        lookup.index_size = whole.index_size
        lookup.num_indices = whole.num_indices
        lookup.offsets = whole.offsets + number * batch[0] * whole.offset_size
        lookup.offset_size = whole.offset_size
        lookup.num_offsets = batch[0] + 1
        lookup.num_bags = batch[0]
        lookup.weights = whole.weights
        lookup.weight_size = whole.weight_size
    lookups.held.append(indices)
    lookups.held.append(offsets)
    lookups.held.append(weights)
    return True


cdef bint take_bags_of_one(Lookup *lookup, object indices, object offsets, object weights, list held) except -1:
    """Of one feature: from indices and offsets with the last bag's end, or from an array whose rows are bags."""
    if not take_indices(lookup, indices) or not take_bags(lookup, indices, offsets, True):
        return False
    if not take_weights(lookup, weights, indices):
        return False
    held.append(indices)
    held.append(offsets)
    held.append(weights)
    return True


cdef list values_of(CollectionHandle handle, dict given, bint is_whole):
    """What a caller's dict has for each feature, None where it has nothing; None where it has other keys, or `is_whole`
    and a feature is missing. Another thread may change the dict meanwhile, and a key's `__eq__` may do anything: all is
    taken before an address is."""
    cdef dict own = given.copy()
    cdef list values = []
    cdef Py_ssize_t found = 0
    for name in handle.names:
        if name in own:
            found += 1
            values.append(own[name])
        else:
            values.append(None)
    return values if found == len(own) and (not is_whole or found == handle.num_features) else None


cdef bint take_each_feature(Lookups lookups, CollectionHandle handle, list values, list weights,
                            Py_ssize_t *batch) except -1:
    """From a dict by feature."""
    cdef Py_ssize_t number
    cdef object value, offsets
    for number in range(handle.num_features):
        value, offsets = values[number], None
        if type(value) is tuple and len(<tuple> value) == 2:
            value, offsets = (<tuple> value)[0], (<tuple> value)[1]
            if offsets is None:
                return False
        lookups.each[number] = handle.features[number]
        if not take_bags_of_one(&lookups.each[number], value, offsets, None if weights is None else weights[number],
                                lookups.held):
            return False
        if number > 0 and lookups.each[number].num_bags != batch[0]:
            return False
        batch[0] = lookups.each[number].num_bags
    return True


# ---- Outputs ------------------------------------------------------------------------------------------------------

cdef bint is_apart_from_all(Span span, Lookups lookups, CollectionHandle handle) except -1:
    """Whether an output shares no memory with an input, at a glance."""
    cdef Py_ssize_t number
    for number in range(handle.num_features):
        if may_overlap(span, handle.spans[number].rows) or may_overlap(span, handle.spans[number].mapping):
            return False
    for array in lookups.held:
        if array is not None and may_overlap(span, span_of(array)):
            return False
    return True


cdef object take_whole_output(Lookups lookups, CollectionHandle handle, Py_ssize_t batch, object out,
                              OutType out_type):
    """One array with the features' columns side by side, made if there is none; None where it is not recognized."""
    cdef Lookup whole
    cdef Py_ssize_t number
    memset(&whole, 0, sizeof(whole))
    whole.num_bags = batch
    whole.layout.dim = handle.dim
    if out is None:
        out = new_output(&whole, None, out_type)
    elif not cnp.PyArray_CheckExact(out) or not take_out(&whole, out, out_type):
        return None
    elif not is_apart_from_all(span_of(out), lookups, handle):
        return None
    for number in range(handle.num_features):
        lookups.each[number].out = whole.out + handle.columns[number] * whole.out_size
        lookups.each[number].out_stride = whole.out_stride
        lookups.each[number].out_type = out_type
        lookups.each[number].out_size = whole.out_size
    return out


cdef int compare_outputs(const void *a, const void *b) noexcept nogil:
    cdef size_t low = (<const OutputSpan *> a).span.low, other = (<const OutputSpan *> b).span.low
    return (low > other) - (low < other)


cdef void take_span(Outputs *outputs, Py_ssize_t number, object array, size_t width, Py_ssize_t stride) noexcept:
    cdef OutputSpan *output = &outputs.each[number]
    output.span = span_of(array)
    output.width = width
    if number == 0:
        outputs.hull = output.span
        outputs.stride = stride
    outputs.hull.low = min(outputs.hull.low, output.span.low)
    outputs.hull.high = max(outputs.hull.high, output.span.high)
    if stride != outputs.stride:
        outputs.stride = 0


cdef bint lie_apart_from_each_other(Outputs *outputs) noexcept nogil:
    """At a glance: one behind the other in memory, or columns of one array."""
    cdef Py_ssize_t number
    cdef bint are_columns = outputs.stride > 0
    cdef OutputSpan *output
    qsort(outputs.each, outputs.count, sizeof(OutputSpan), compare_outputs)
    outputs.are_apart = True
    for number in range(outputs.count):
        output = &outputs.each[number]
        if number > 0:
            outputs.are_apart = outputs.are_apart and output.span.low >= (output - 1).span.high
            are_columns = are_columns and output.span.low >= (output - 1).span.low + (output - 1).width
        are_columns = are_columns and output.span.low - outputs.hull.low + output.width <= <size_t> outputs.stride
    return outputs.are_apart or are_columns


cdef bint meets_an_output(const Outputs *outputs, Span input) noexcept nogil:
    """Whether an input may share memory with one of them, at a glance."""
    cdef Py_ssize_t low = 0, high = outputs.count, middle
    if not outputs.are_apart:
        return may_overlap(outputs.hull, input)
    # The last that begins before the input ends. All before that one end before it begins.
    while low < high:
        middle = low + (high - low) // 2
        if outputs.each[middle].span.low < input.high:
            low = middle + 1
        else:
            high = middle
    return low > 0 and outputs.each[low - 1].span.high > input.low


cdef bint take_output_of_each(Lookups lookups, CollectionHandle handle, list arrays, OutType out_type) except -1:
    """An array for each feature, sharing no memory with each other or with an input, at a glance."""
    cdef Py_ssize_t number
    cdef Lookup *lookup
    cdef Outputs outputs
    outputs.each, outputs.count = lookups.spans, handle.num_features
    for number in range(handle.num_features):
        array = arrays[number]
        lookup = &lookups.each[number]
        if not cnp.PyArray_CheckExact(array) or not take_out(lookup, array, out_type):
            return False
        take_span(&outputs, number, array, <size_t> (lookup.layout.dim * lookup.out_size), lookup.out_stride)
    if not lie_apart_from_each_other(&outputs):
        return False
    for number in range(handle.num_features):
        if (meets_an_output(&outputs, handle.spans[number].rows)
                or meets_an_output(&outputs, handle.spans[number].mapping)):
            return False
    for array in lookups.held:
        if array is not None and meets_an_output(&outputs, span_of(array)):
            return False
    lookups.held += arrays
    return True


def lie_apart_at_a_glance(list outputs not None, list inputs not None):
    """Whether arrays to write to share no memory with each other or with others; False where that takes a closer
    look."""
    cdef Lookups lookups = Lookups.__new__(Lookups, len(outputs))
    cdef Outputs spans
    cdef Py_ssize_t number
    cdef cnp.ndarray array
    cdef int ndim
    spans.each, spans.count = lookups.spans, len(outputs)
    spans.stride = 0
    for number in range(spans.count):
        array = outputs[number]
        ndim = cnp.PyArray_NDIM(array)
        take_span(&spans, number, array,
                  <size_t> (cnp.PyArray_ITEMSIZE(array) * (cnp.PyArray_DIM(array, ndim - 1) if ndim > 0 else 1)),
                  cnp.PyArray_STRIDE(array, 0) if ndim == 2 and cnp.PyArray_DIM(array, 0) > 1 else 0)
    if not lie_apart_from_each_other(&spans):
        return False
    for array in inputs:
        if meets_an_output(&spans, span_of(array)):
            return False
    return True


# ---- Calls --------------------------------------------------------------------------------------------------------

def look_up_collection(CollectionHandle handle not None, indices, offsets, lengths, weights, out, dtype, num_threads):
    """The bags of all features. The output; or what is wrong, as `run` tells it; or None where an argument is not
    recognized."""
    cdef Py_ssize_t batch = 0
    cdef int threads = threads_of(num_threads), out_type
    cdef Lookups lookups
    cdef bint is_taken
    cdef list values = None, own_weights = None, arrays = None
    cdef object ends = offsets
    if type(indices) is dict:
        values = values_of(handle, <dict> indices, True)
        if type(weights) is dict:
            own_weights = values_of(handle, <dict> weights, False)
        if (values is None or (own_weights is None and weights is not None) or offsets is not None
                or lengths is not None):
            return None
    if type(out) is dict:
        arrays = values_of(handle, <dict> out, True)
        if arrays is None:
            return None
    out_type = out_type_of(dtype, out if arrays is None else arrays[0])
    if threads < 0 or out_type < 0:
        return None
    lookups = Lookups.__new__(Lookups, handle.num_features)
    if values is not None:
        is_taken = take_each_feature(lookups, handle, values, own_weights, &batch)
    else:
        if lengths is not None:
            ends = None if offsets is not None else offsets_of_lengths(lengths, indices, handle.num_features)
            lookups.held.append(lengths)
        is_taken = take_all_features(lookups, handle, indices, ends, weights, &batch)
    if not is_taken:
        return None
    if arrays is not None:
        is_taken = take_output_of_each(lookups, handle, arrays, <OutType> out_type)
        result = out
    else:
        result = take_whole_output(lookups, handle, batch, out, <OutType> out_type)
        is_taken = result is not None
    return run(lookups.each, lookups.count, out is not None, threads, result) if is_taken else None


cdef bint take_rows_of_each(Lookups lookups, CollectionHandle handle, list values) except -1:
    """Each index a row of its own, from an array for each feature."""
    cdef Py_ssize_t number
    cdef Lookup *lookup
    for number in range(handle.num_features):
        lookup = &lookups.each[number]
        lookup[0] = handle.features[number]
        if not take_indices(lookup, values[number]) or cnp.PyArray_NDIM(<cnp.ndarray> values[number]) > 31:
            return False
        take_single_rows(lookup)
        lookups.held.append(values[number])
    return True


cdef bint take_all_rows(Lookups lookups, CollectionHandle handle, object indices, object offsets) except -1:
    """The same from arrays of all features. All offsets are checked here: rows need those of features alone."""
    cdef Lookup whole
    cdef Lookup *lookup
    cdef Py_ssize_t number, bag, batch
    cdef int64_t start, stop
    memset(&whole, 0, sizeof(whole))
    if not take_indices(&whole, indices) or cnp.PyArray_NDIM(<cnp.ndarray> indices) != 1 or offsets is None:
        return False
    if not take_bags(&whole, indices, offsets, True) or whole.num_bags % handle.num_features != 0:
        return False
    batch = whole.num_bags // handle.num_features
    stop = read_offset(&whole, 0)
    if not 0 <= stop <= whole.num_indices:
        return False
    for number in range(handle.num_features):
        lookup = &lookups.each[number]
        lookup[0] = handle.features[number]
        start = stop
        lookup.indices = whole.indices + start * whole.index_size
        lookup.index_size = whole.index_size
        for bag in range(number * batch + 1, (number + 1) * batch + 1):
            lookup.num_indices = <Py_ssize_t> stop
            stop = read_offset(&whole, bag)
            if not lookup.num_indices <= stop <= whole.num_indices:
                return False
        lookup.num_indices = <Py_ssize_t> (stop - start)
        take_single_rows(lookup)
    lookups.held += (indices, offsets)
    return True


def look_up_collection_rows(CollectionHandle handle not None, indices, offsets, lengths, out, dtype, num_threads):
    """Single rows of all features: a dict of arrays; or what is wrong, as `run` tells it; or None where an argument is
    not recognized."""
    cdef int threads = threads_of(num_threads), out_type
    cdef Lookups lookups
    cdef Py_ssize_t number
    cdef list values = None, arrays = None
    cdef dict result = {}
    if type(indices) is dict:
        values = values_of(handle, <dict> indices, True)
        if values is None or offsets is not None or lengths is not None:
            return None
    if out is not None:
        arrays = values_of(handle, <dict> out, True) if type(out) is dict else None
        if arrays is None:
            return None
    out_type = out_type_of(dtype, None if arrays is None else arrays[0])
    if threads < 0 or out_type < 0:
        return None
    lookups = Lookups.__new__(Lookups, handle.num_features)
    if lengths is not None:
        ends = None if offsets is not None else offsets_of_lengths(lengths, indices, handle.num_features)
        lookups.held.append(lengths)
    else:
        ends = offsets
    if not (take_all_rows(lookups, handle, indices, ends) if values is None
            else take_rows_of_each(lookups, handle, values)):
        return None
    if arrays is not None:
        if values is not None:
            for value in values:
                if cnp.PyArray_NDIM(<cnp.ndarray> value) != 1:
                    return None
        if not take_output_of_each(lookups, handle, arrays, <OutType> out_type):
            return None
        return run(lookups.each, lookups.count, True, threads, out)
    for number in range(handle.num_features):
        result[handle.names[number]] = new_output(
            &lookups.each[number], None if values is None else values[number], <OutType> out_type)
    return run(lookups.each, lookups.count, False, threads, result)


def look_up_parts(list parts not None, int out_type, int num_threads, bint check_first):
    """Bags, or single rows where 1-D indices have no offsets, of any tables, in one call. Each part is (handle, mode,
    padding_idx, skips_invalid, indices, offsets with the last bag's end, weights, output); `_slow_collection` has
    checked the outputs. True; or what is wrong, as `run` tells it; or None where a part is not recognized."""
    cdef Lookups lookups = Lookups.__new__(Lookups, len(parts))
    cdef Lookup *lookup
    cdef TableHandle handle
    cdef Py_ssize_t number
    for number in range(lookups.count):
        handle, mode, padding_idx, skips_invalid, indices, offsets, weights, out = parts[number]
        if handle is None:
            return None
        lookup = &lookups.each[number]
        lookup[0] = handle.job
        lookup.mode = <Mode> <int> mode
        lookup.padding_idx = padding_idx
        lookup.skips_invalid = skips_invalid
        if offsets is None and cnp.PyArray_Check(indices) and cnp.PyArray_NDIM(<cnp.ndarray> indices) == 1:
            if not take_indices(lookup, indices):
                return None
            take_single_rows(lookup)
            lookups.held.append(indices)
        elif not take_bags_of_one(lookup, indices, offsets, weights, lookups.held):
            return None
        if not take_out(lookup, out, <OutType> out_type):
            return None
        lookups.held += (handle, out)
    return run(lookups.each, lookups.count, check_first, num_threads, True) if lookups.count > 0 else True
