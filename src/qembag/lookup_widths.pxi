# Part of _kernels.pyx: a block of each width.

# What a loop is compiled for beside form and maximum or sum: where its rows come from.
cdef enum Kind:
    GATHERED = 0            # by way of windows
    INT32 = 1               # read in the loop, with nothing else to look for
    INT64 = 2
    INT32_WITH = 3          # with weights, padding or invalid indices to skip
    INT64_WITH = 4


cdef inline bint is_plain(const int kind) noexcept nogil:
    return kind == INT32 or kind == INT64


cdef inline bint has_few_widths(const int form, const bint is_max, const int kind) noexcept nogil:
    """Each width is code, and this is where it matters least."""
    return is_max and kind == GATHERED if is_torchs(form) else is_max or not is_plain(kind)


cdef inline int max_width(const int form, const bint is_max, const int kind) noexcept nogil:
    """Vectors of the widest block. Of 2-bit codes eight: as quads 5 to 10 % faster than 16 one by one; at AVX2, which
    has no quads, 8 to 10 % faster than 6. Else more only for sums of plain bags: wider blocks are most of a wheel's
    bytes, and a second pass costs 5 to 8 % (weights, 256 elements, Zen 4)."""
    if has_few_widths(form, is_max, kind):
        return 4 if LANES_MAX_BLOCK < 8 else 8
    if form & ELEMENT == 2 and is_torchs(form):
        return 8
    if is_max or is_grouped(form) or is_one_pair(form) or not is_plain(kind):
        return min(LANES_MAX_BLOCK, 8)
    return LANES_MAX_BLOCK


cdef inline bint is_width(int width, const int form, const bint is_max, const int kind) noexcept nogil:
    """Whether there is a block so wide."""
    if has_few_widths(form, is_max, kind):
        return width == 1 or width == 2 or width == 4 or width == 8
    if is_torchs(form):
        return width <= 8 or width == 12 or width == 16
    if (width == 3 or width == 5) and (form == FLOAT32_ROWS or form & ~QUADS == ONE_PAIR | 8):
        # FBGEMM's rows, and floats: of 48 and 80 elements in two passes, its operator took 0.8 times our time.
        return True
    return width == 1 or width == 2 or width == 4 or width == 6 or width == 8 or width == 12 or width == 16


cdef inline bint look_up_width(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int form,
                               const bint is_max, const int index_size, const bint plain) noexcept nogil:
    """One loop for each width, which must be a constant there; a switch in C. Those that this level never uses are not
    compiled."""
    cdef int kind = INT64 if plain else INT64_WITH
    cdef int most = max_width(form, is_max, kind), least = 4 if has_quads(form) else 1
    if task.width == 1 and least <= 1:
        return look_up(job, rows, task, form, 1, is_max, index_size, plain)
    if task.width == 2 and least <= 2:
        return look_up(job, rows, task, form, 2, is_max, index_size, plain)
    if task.width == 3 and least <= 3 and is_width(3, form, is_max, kind):
        return look_up(job, rows, task, form, 3, is_max, index_size, plain)
    if task.width == 4:
        return look_up(job, rows, task, form, 4, is_max, index_size, plain)
    if task.width == 5 and most >= 5 and is_width(5, form, is_max, kind):
        return look_up(job, rows, task, form, 5, is_max, index_size, plain)
    if task.width == 6 and most >= 6 and is_width(6, form, is_max, kind):
        return look_up(job, rows, task, form, 6, is_max, index_size, plain)
    if task.width == 7 and most >= 7 and is_width(7, form, is_max, kind):
        return look_up(job, rows, task, form, 7, is_max, index_size, plain)
    if task.width == 8 and most >= 8:
        return look_up(job, rows, task, form, 8, is_max, index_size, plain)
    if task.width == 12 and most >= 12:
        return look_up(job, rows, task, form, 12, is_max, index_size, plain)
    if task.width == 16 and most >= 16:
        return look_up(job, rows, task, form, 16, is_max, index_size, plain)
    return False


cdef inline bint look_up_width_gathered(const Lookup *job, const uint8_t[:, :] rows, const Pass *task, const int form,
                                        const bint is_max) noexcept nogil:
    cdef int most = max_width(form, is_max, GATHERED), least = 4 if has_quads(form) else 1
    if task.width == 1 and least <= 1:
        return look_up_gathered(job, rows, task, form, 1, is_max)
    if task.width == 2 and least <= 2:
        return look_up_gathered(job, rows, task, form, 2, is_max)
    if task.width == 3 and least <= 3 and is_width(3, form, is_max, GATHERED):
        return look_up_gathered(job, rows, task, form, 3, is_max)
    if task.width == 4:
        return look_up_gathered(job, rows, task, form, 4, is_max)
    if task.width == 5 and most >= 5 and is_width(5, form, is_max, GATHERED):
        return look_up_gathered(job, rows, task, form, 5, is_max)
    if task.width == 6 and most >= 6 and is_width(6, form, is_max, GATHERED):
        return look_up_gathered(job, rows, task, form, 6, is_max)
    if task.width == 7 and most >= 7 and is_width(7, form, is_max, GATHERED):
        return look_up_gathered(job, rows, task, form, 7, is_max)
    if task.width == 8 and most >= 8:
        return look_up_gathered(job, rows, task, form, 8, is_max)
    if task.width == 12 and most >= 12:
        return look_up_gathered(job, rows, task, form, 12, is_max)
    if task.width == 16 and most >= 16:
        return look_up_gathered(job, rows, task, form, 16, is_max)
    return False
