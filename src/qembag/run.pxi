# Part of _handle.pyx: lookups are run, with signals handled on its way, and faults found.

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
    Py_ssize_t lookup           # of those of the call

cdef enum:
    # Offsets or indices that are checked before the next look for signals: some 10 ms at most.
    CHECKED_AT_A_TIME = 1 << 22

# The main thread handles signals so often during a long call: Ctrl-C is answered within a fraction of a second.
cdef double SECONDS_A_LOOK = 0.05
# A long call in the main thread is done in pieces, with signals handled between them. The first piece is of this much
# work (see `work_of`), 1 to 50 ms; the next are of as much as takes SECONDS_A_LOOK.
cdef double FIRST_PIECE = 1 << 25
# Work up to which a call keeps the GIL: some 4 us. With 32 threads that give it back and wait for it again, all calls a
# second are 0.2 to 0.4 of one thread's; with it kept, 1.0.
cdef double MAX_WORK_WITH_GIL = 1 << 17


# ---- Signals ------------------------------------------------------------------------------------------------------

cdef bint is_main_thread():
    return threading.get_ident() == threading.main_thread().ident


cdef bint handle_signals() noexcept with gil:
    """False where a handler has raised."""
    return check_signals() == 0


cdef void look_for_signals(volatile Signals *signals) noexcept nogil:
    cdef double now = loops.clock()
    # Not at each look: another thread may keep the GIL for milliseconds.
    if not signals.has_raised and now >= signals.next_look:
        signals.next_look = now + SECONDS_A_LOOK
        signals.has_raised = not handle_signals()


cdef bint may_go_on(const Lookup *job) noexcept nogil:
    if job.signals == NULL:
        return True
    look_for_signals(job.signals)
    return not job.signals.has_raised


cdef int raise_as_set() except -1:
    """A signal's handler has raised where nothing could be raised further."""
    return -1


# ---- Faults -------------------------------------------------------------------------------------------------------

cdef Fault find_bad_offset(const Lookup *job) noexcept nogil:
    cdef Fault fault
    cdef Py_ssize_t bag
    cdef int64_t start = 0, stop
    fault.where = NOWHERE
    fault.position = fault.bag = fault.index_position = fault.lookup = 0
    fault.value = 0
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
    return fault


cdef Fault find_fault(const Lookup *job) noexcept nogil:
    """The first bad offset; where all are right, the first bad index or mapped row of the bags, in order. Nothing where
    a signal's handler has raised."""
    cdef Fault fault = find_bad_offset(job)
    cdef Py_ssize_t bag, num_checked = 0
    cdef int64_t start, stop, position, index, row
    if fault.where != NOWHERE or (job.signals != NULL and job.signals.has_raised):
        return fault
    start = read_offset(job, 0)
    for bag in range(job.num_bags):
        stop = min(read_offset(job, bag + 1), <int64_t> job.num_indices)
        for position in range(max(start, <int64_t> 0), stop):
            num_checked += 1
            if num_checked % CHECKED_AT_A_TIME == 0 and not may_go_on(job):
                return fault
            index = read_index(job, position, job.index_size)
            if index == job.padding_idx and index >= 0:
                continue
            fault.bag = bag
            fault.value = index
            fault.position = fault.index_position = position
            if not 0 <= index < job.num_embeddings:
                if job.skips_invalid:
                    continue
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


# ---- Running ------------------------------------------------------------------------------------------------------

cdef int end_piece(double *work, double *started) except -1:
    """Raises what a signal's handler raises; sets the work of the next piece by the time that this one took."""
    PyErr_CheckSignals()
    cdef double now = loops.clock()
    work[0] *= min(max(SECONDS_A_LOOK / max(now - started[0], 1e-9), 0.125), 8.0)
    started[0] = now
    return 0


cdef Place end_of_piece(const Lookup *lookups, Place first, Place end, double work) noexcept nogil:
    """As many bags as cost no more; one at least."""
    cdef double done
    cdef Place place = place_after(lookups, first, end, work, &done)
    if count_bags(lookups, first, place) == 0:
        while place.lookup < end.lookup and place.bag == lookups[place.lookup].num_bags:
            place.lookup += 1
            place.bag = 0
        if place.lookup < end.lookup or place.bag < end.bag:
            place.bag += 1
            if place.lookup < end.lookup and place.bag == lookups[place.lookup].num_bags:
                place.lookup += 1
                place.bag = 0
    return place


cdef Fault find_any_fault(const Lookup *lookups, Py_ssize_t num_lookups) noexcept nogil:
    """The fault of the first lookup that has one."""
    cdef Fault fault
    cdef Py_ssize_t number
    fault.where = NOWHERE
    for number in range(num_lookups):
        fault = find_fault(&lookups[number])
        fault.lookup = number
        if fault.where != NOWHERE or not may_go_on(&lookups[number]):
            break
    return fault


cdef bint are_in_range(const Lookup *lookups, Py_ssize_t num_lookups) noexcept nogil:
    cdef Py_ssize_t number
    for number in range(num_lookups):
        if not loops.is_in_range(&lookups[number]):
            return False
    return True


cdef int run_pieces(const Lookup *lookups, Py_ssize_t num_lookups, bint check_first, int num_threads,
                    Fault *fault) except -1 nogil:
    """1 if all went well, 0 with a fault, which is NOWHERE where all is right again."""
    cdef Place first, end, last
    cdef volatile Signals *signals = lookups[0].signals
    cdef double work = FIRST_PIECE, started = 0
    first.lookup = first.bag = 0
    last.lookup, last.bag = num_lookups, 0
    fault.where = NOWHERE
    if check_first and not are_in_range(lookups, num_lookups):
        fault[0] = find_any_fault(lookups, num_lookups)
        if fault.where != NOWHERE:
            return 0
    if signals != NULL and signals.has_raised:
        return 0
    if signals != NULL:
        started = loops.clock()
    while True:
        end = last if signals == NULL else end_of_piece(lookups, first, last, work)
        # A handler may have raised where the loops do not stop for it.
        if not loops.look_up(lookups, first, end, num_threads) or (signals != NULL and signals.has_raised):
            break
        if count_bags(lookups, end, last) == 0:
            return 1
        first = end
        with gil:
            end_piece(&work, &started)
    if signals != NULL and signals.has_raised:
        return 0
    fault[0] = find_any_fault(lookups, num_lookups)
    return 0


cdef object run(Lookup *lookups, Py_ssize_t num_lookups, bint check_first, int num_threads, object result):
    """The lookups, which are those of one call; `result`, or what is wrong as (argument, position, bag, value, position
    in indices, number of the lookup)."""
    cdef Fault fault
    cdef Signals signals
    cdef int succeeded
    cdef Place first, last
    cdef Py_ssize_t number
    cdef volatile Signals *looked_for
    first.lookup = first.bag = 0
    last.lookup, last.bag = num_lookups, 0
    cdef double work = work_between(lookups, first, last)
    signals.has_raised = False
    signals.next_look = 0
    signals.look = look_for_signals
    looked_for = &signals if work > FIRST_PIECE and is_main_thread() else NULL
    for number in range(num_lookups):
        lookups[number].signals = looked_for
    if work <= MAX_WORK_WITH_GIL:
        succeeded = run_pieces(lookups, num_lookups, check_first, num_threads, &fault)
    else:
        with nogil:
            succeeded = run_pieces(lookups, num_lookups, check_first, num_threads, &fault)
    if signals.has_raised:
        raise_as_set()
    if succeeded:
        return result
    name = ("changed", "indices", "offsets", "compressed_indices_mapping")[<int> fault.where]
    return (name, fault.position, fault.bag, fault.value, fault.index_position, fault.lookup)
