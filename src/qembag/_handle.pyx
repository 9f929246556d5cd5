# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, autotestdict=False
"""The entrance, compiled once for all levels: a table's handle, and the fast path of every lookup.

A lookup whose arguments are already what the loops take goes from the public function to the loops and back in compiled
code. Anything else goes to `_slow`, in Python, which converts it or explains what is wrong, and calls `look_up_bags` or
`look_up_rows` below with what it made of it. Both ways end in `run`.
"""

import threading

import numpy

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, SIZE_MAX, uint8_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memset

from loops cimport (
    AVERAGE, BFLOAT16_OUT, BFLOAT16_ROWS, FINE, FLOAT16_OUT, FLOAT16_ROWS, FLOAT32_OUT, FLOAT32_ROWS, GROUPED, Layout,
    Lookup, Loops, MAX, MEAN, Method, MINMAX, Mode, NO_MEMORY, NOT_FINITE, OutType, Place, Quantize, RowFault, Signals,
    SQRTN, SUM, count_bags, place_after, quantizing_work, read_index, read_offset, work_between,
)

cnp.import_array()

cdef extern from *:
    """
    #define ADDRESS_OF_VIEW(view) (&(view))
    """
    # Cython has no operator for it. The view's owner must be held for as long as the address.
    const uint8_t[:, :] *address_of_view "ADDRESS_OF_VIEW"(const uint8_t[:, :]) nogil

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX
    # That of cpython.exc raises at once.
    int check_signals "PyErr_CheckSignals"() noexcept


# ---- The level ----------------------------------------------------------------------------------------------------

cdef object loops_owner = None
cdef const Loops *loops = NULL
# The limit that `set_num_threads` has set; 0 is OpenMP's.
cdef int thread_limit = 0


def use_loops(capsule):
    """From here on lookups run in these loops, the `LOOPS` of a level's module."""
    global loops_owner, loops
    loops = <const Loops *> PyCapsule_GetPointer(capsule, "qembag loops")
    loops_owner = capsule


def max_threads():
    """OpenMP's limit at this moment; 1 without OpenMP."""
    return loops.max_threads()


def set_thread_limit(int limit):
    """For calls that do not name a number of threads; 0 for OpenMP's limit."""
    global thread_limit
    thread_limit = limit


def get_thread_limit():
    return thread_limit


# ---- Tables -------------------------------------------------------------------------------------------------------

# The elements of rows of floats, by name.
FLOAT_ELEMENTS = {"float32": <int> FLOAT32_ROWS, "float16": <int> FLOAT16_ROWS, "bfloat16": <int> BFLOAT16_ROWS}


cdef class LayoutFields:
    """How a row is laid out, for the loops. `layout` works it out; nothing else makes one."""

    cdef Layout fields

    def __cinit__(self, int element, Py_ssize_t dim, Py_ssize_t row_bytes, Py_ssize_t codes_start=0,
                  Py_ssize_t pairs_start=0, int pair_size=0, Py_ssize_t group_size=0):
        """Of codes of so many bits; or of floats, by their number in `Form`, which have no pairs."""
        cdef Layout *fields = &self.fields
        fields.form = element
        fields.bits = 16 if element == FLOAT16_ROWS else element
        fields.dim = dim
        fields.row_bytes = row_bytes
        fields.codes_start = codes_start
        fields.pairs_start = pairs_start
        fields.pair_size = pair_size
        fields.group_size = group_size
        # What the loops rely on to stay inside a row. In an order in which nothing overflows.
        if dim < 1 or not 0 <= codes_start <= row_bytes or not 0 <= pairs_start <= row_bytes:
            raise ValueError("internal error: a layout that the loops do not know")
        if element in (FLOAT32_ROWS, FLOAT16_ROWS, BFLOAT16_ROWS):
            self.set_floats()
        elif element in (8, 4, 2):
            self.set_codes()
        else:
            raise ValueError("internal error: a layout that the loops do not know")

    cdef int set_floats(self) except -1:
        cdef Layout *fields = &self.fields
        if fields.codes_start != 0 or fields.pair_size != 0 or fields.dim > fields.row_bytes // (fields.bits // 8):
            raise ValueError("internal error: a layout that the loops do not know")
        fields.group_size = fields.full_dim = fields.dim
        fields.num_groups = 1
        fields.used_bytes = fields.codes_bytes = fields.dim * (fields.bits // 8)
        return 0

    cdef int set_codes(self) except -1:
        cdef Layout *fields = &self.fields
        cdef Py_ssize_t codes_end, pairs_end
        if (fields.pair_size not in (4, 2) or not 1 <= fields.group_size <= fields.dim
                or (fields.group_size != fields.dim and fields.group_size % 16 != 0)):
            raise ValueError("internal error: a layout that the loops do not know")
        fields.codes_bytes = (fields.dim - 1) // (8 // fields.bits) + 1
        fields.full_dim = fields.codes_bytes * (8 // fields.bits)
        fields.num_groups = (fields.dim - 1) // fields.group_size + 1
        if (fields.codes_bytes > fields.row_bytes - fields.codes_start
                or fields.num_groups > (fields.row_bytes - fields.pairs_start) // (2 * fields.pair_size)):
            raise ValueError("internal error: a layout of another row length")
        codes_end = fields.codes_start + fields.codes_bytes
        pairs_end = fields.pairs_start + 2 * fields.pair_size * fields.num_groups
        if codes_end > fields.pairs_start and pairs_end > fields.codes_start:
            raise ValueError("internal error: a layout whose parts overlap")
        fields.used_bytes = max(codes_end, pairs_end)
        if (fields.num_groups > 1 or fields.pair_size != (4 if fields.bits == 8 else 2)
                or fields.pairs_start < fields.codes_start):
            fields.form |= GROUPED
        return 0

    @property
    def bits(self):
        return self.fields.bits

    @property
    def dim(self):
        return self.fields.dim

    @property
    def row_bytes(self):
        return self.fields.row_bytes

    @property
    def codes_start(self):
        return self.fields.codes_start

    @property
    def codes_bytes(self):
        return self.fields.codes_bytes

    @property
    def pairs_start(self):
        return self.fields.pairs_start

    @property
    def pair_size(self):
        return self.fields.pair_size

    @property
    def group_size(self):
        return self.fields.group_size

    @property
    def num_groups(self):
        return self.fields.num_groups

    @property
    def used_bytes(self):
        return self.fields.used_bytes


cdef class TableHandle:
    """A table as the loops take it: rows and mapping as memoryviews, held for the table's life, and the row layout.

    What the loops read has the shape, strides and address of when the handle was made, whatever becomes of the arrays.
    """

    cdef const uint8_t[:, :] row_view
    cdef const int32_t[::1] mapping_view
    cdef Lookup job             # the fields that are the table's
    cdef readonly object rows
    cdef readonly object mapping
    cdef readonly object layout

    def __cinit__(self, cnp.ndarray rows not None, LayoutFields layout not None, cnp.ndarray mapping):
        self.row_view = rows
        self.rows = rows
        self.mapping = mapping
        self.layout = layout
        self.job.rows = address_of_view(self.row_view)
        self.job.layout = layout.fields
        self.job.num_rows = self.row_view.shape[0]
        if self.row_view.shape[1] != layout.fields.row_bytes:
            raise ValueError("internal error: a layout of another row length")
        # The strides of an array without elements say nothing: NumPy may make them 0.
        if self.row_view.strides[1] != 1 and self.row_view.shape[0] > 0 and self.row_view.shape[1] > 1:
            raise ValueError("internal error: rows whose bytes lie apart")
        self.job.mapping = NULL
        self.job.num_embeddings = self.job.num_rows
        if mapping is not None:
            self.mapping_view = mapping
            self.job.num_embeddings = self.mapping_view.shape[0]
            # An empty mapping is a mapping too: no index is in its range.
            self.job.mapping = <const volatile int32_t *> data_of(mapping)

    @property
    def num_embeddings(self):
        return self.job.num_embeddings


@cython.auto_pickle(False)
cdef class HandleOwner:
    """What every table is. Compiled, so that a call finds the handle in 2 ns: as an attribute of a class of Python's it
    takes 20."""

    cdef TableHandle handle
    cdef object __weakref__

    @property
    def _handle(self):
        cdef TableHandle handle = handle_of(self)
        if handle is None:
            raise AttributeError(f"{type(self).__name__} was not initialized")
        return handle

    @_handle.setter
    def _handle(self, TableHandle handle not None):
        with cython.critical_section(self):
            self.handle = handle


cdef TableHandle handle_of(object table):
    """A table's handle; None for what is no table. Without a GIL another thread may initialize the table again."""
    cdef TableHandle handle
    if not isinstance(table, HandleOwner):
        return None
    with cython.critical_section(table):
        handle = (<HandleOwner> table).handle
    return handle


# `qembag.float_table`, which is made after this module, makes the handle of an array.
cdef object handle_of_array = None


def register_arrays(function):
    global handle_of_array
    handle_of_array = function


include "recognize.pxi"
include "run.pxi"
include "lookups.pxi"
include "operators.pxi"
include "collection.pxi"


# ---- Quantizing ---------------------------------------------------------------------------------------------------

NO_BOUNDS = numpy.empty((0, 2), numpy.float32)


def quantize(const float[:, ::1] weights not None, LayoutFields layout not None, uint8_t[:, ::1] out not None,
             const float[:, ::1] bounds, int method, const float[::1] importance, int64_t num_bins, double ratio,
             int num_threads):
    """Quantize rows of floats into `out`. `bounds` has each row's minimum and maximum, if a row is one group;
    `importance` has a weight for each element of a row. Returns None, or (what is wrong, row, group)."""
    cdef const float[:, ::1] own_bounds = NO_BOUNDS if bounds is None else bounds
    cdef Quantize job
    cdef Py_ssize_t unit = 0, first = 0, end, num_rows = weights.shape[0], num_groups = layout.fields.num_groups
    cdef double work = FIRST_PIECE, started = 0, row_work
    cdef RowFault fault = FINE
    cdef bint in_pieces
    if (weights.shape[1] != layout.fields.dim or out.shape[1] != layout.fields.row_bytes or out.shape[0] != num_rows
            or own_bounds.shape[1] != 2
            or (bounds is not None and (own_bounds.shape[0] != num_rows or num_groups != 1))
            or (importance is not None and importance.shape[0] != layout.fields.dim)):
        raise ValueError("internal error: rows of another shape than the layout's")
    job.layout = layout.fields
    job.method = <Method> method
    job.importance = NULL
    if importance is not None:
        job.importance = &importance[0]
    job.num_bins = <float> num_bins
    # Not cut to a whole number, and with the ratio in double: so torch 2.13.0 has it.
    job.kept_bins = <float> (<double> job.num_bins * (1 - ratio))
    row_work = quantizing_work(&job, 1) * (0.25 if method == MINMAX else 1)
    in_pieces = num_rows * row_work > FIRST_PIECE and is_main_thread()
    if in_pieces:
        started = loops.clock()
    while first < num_rows and fault == FINE:
        end = num_rows
        if in_pieces:
            end = first + <Py_ssize_t> min(max(work / row_work, 1.0), <double> (num_rows - first))
        with nogil:
            fault = loops.quantize(&job, weights, own_bounds, out, first, end, num_threads, &unit)
        first = end
        if first < num_rows and fault == FINE:
            end_piece(&work, &started)
    if fault == NO_MEMORY:
        raise MemoryError
    if fault != FINE:
        return ("not finite" if fault == NOT_FINITE else "too wide", unit // num_groups, unit % num_groups)
    return None
