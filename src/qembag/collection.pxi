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


cdef bint take_each_feature(Lookups lookups, CollectionHandle handle, dict given, object weights,
                            Py_ssize_t *batch) except -1:
    """From a dict by feature."""
    cdef Py_ssize_t number
    cdef object value, offsets, own = None
    cdef dict all_weights = None
    if weights is not None:
        if type(weights) is not dict:
            return False
        all_weights = <dict> weights
    if len(given) != handle.num_features:
        return False
    for number in range(handle.num_features):
        name = handle.names[number]
        value = given.get(name)
        offsets = None
        if type(value) is tuple and len(<tuple> value) == 2:
            value, offsets = (<tuple> value)[0], (<tuple> value)[1]
            if offsets is None:
                return False
        if all_weights is not None:
            own = all_weights.get(name)
        lookups.each[number] = handle.features[number]
        if not take_bags_of_one(&lookups.each[number], value, offsets, own, lookups.held):
            return False
        if number > 0 and lookups.each[number].num_bags != batch[0]:
            return False
        batch[0] = lookups.each[number].num_bags
    if all_weights is not None:
        for name in all_weights:
            if name not in given:
                return False
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


cdef bint lie_apart_from_each_other(OutputSpan *outputs, Py_ssize_t count, Py_ssize_t stride) noexcept nogil:
    """Outputs that follow each other in memory; or columns of one array, whose rows are `stride` apart, if it is above
    0."""
    cdef Py_ssize_t number
    cdef bint are_apart = True, are_columns = stride > 0
    qsort(outputs, count, sizeof(OutputSpan), compare_outputs)
    for number in range(count):
        if number > 0:
            are_apart = are_apart and outputs[number].span.low >= outputs[number - 1].span.high
            are_columns = are_columns and outputs[number].span.low >= (outputs[number - 1].span.low
                                                                       + outputs[number - 1].width)
        are_columns = are_columns and (outputs[number].span.low - outputs[0].span.low + outputs[number].width
                                       <= <size_t> stride)
    return are_apart or are_columns


cdef bint take_output_of_each(Lookups lookups, CollectionHandle handle, dict out, OutType out_type) except -1:
    """An array for each feature, sharing no memory with each other or with an input, at a glance."""
    cdef Py_ssize_t number, stride = 0
    cdef Lookup *lookup
    cdef OutputSpan *spans = lookups.spans
    cdef Span hull
    cdef list outputs = []
    if len(out) != handle.num_features:
        return False
    hull.low, hull.high = SIZE_MAX, 0
    for number in range(handle.num_features):
        array = out.get(handle.names[number])
        lookup = &lookups.each[number]
        if not cnp.PyArray_CheckExact(array) or not take_out(lookup, array, out_type):
            return False
        outputs.append(array)
        spans[number].span = span_of(array)
        spans[number].width = <size_t> (lookup.layout.dim * lookup.out_size)
        stride = lookup.out_stride if number == 0 or lookup.out_stride == stride else 0
        hull.low = min(hull.low, spans[number].span.low)
        hull.high = max(hull.high, spans[number].span.high)
    if not (lie_apart_from_each_other(spans, handle.num_features, stride)
            and is_apart_from_all(hull, lookups, handle)):
        return False
    lookups.held += outputs
    return True


# ---- Calls --------------------------------------------------------------------------------------------------------

def look_up_collection(CollectionHandle handle not None, indices, offsets, lengths, weights, out, dtype, num_threads):
    """The bags of all features. The output; or what is wrong, as `run` tells it; or None where an argument is not
    recognized."""
    cdef Py_ssize_t batch = 0
    cdef int threads = threads_of(num_threads), out_type
    cdef Lookups lookups
    cdef bint is_taken
    cdef object ends = offsets
    cdef bint is_each = type(out) is dict
    out_type = out_type_of(dtype, (<dict> out).get(handle.names[0]) if is_each else out)
    if threads < 0 or out_type < 0:
        return None
    lookups = Lookups.__new__(Lookups, handle.num_features)
    if type(indices) is dict:
        is_taken = (offsets is None and lengths is None
                    and take_each_feature(lookups, handle, <dict> indices, weights, &batch))
    else:
        if lengths is not None:
            ends = None if offsets is not None else offsets_of_lengths(lengths, indices, handle.num_features)
            lookups.held.append(lengths)
        is_taken = take_all_features(lookups, handle, indices, ends, weights, &batch)
    if not is_taken:
        return None
    if is_each:
        is_taken = take_output_of_each(lookups, handle, <dict> out, <OutType> out_type)
        result = out
    else:
        result = take_whole_output(lookups, handle, batch, out, <OutType> out_type)
        is_taken = result is not None
    return run(lookups.each, lookups.count, out is not None, threads, result) if is_taken else None


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
