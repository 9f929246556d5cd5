# Part of _kernels.pyx: the scale and bias that minimize the squared error of the values of a unit.
#
# For given codes c the best pair is the linear regression of the values x on them:
#     scale = (n sum(c x) - sum(c) sum(x)) / (n sum(c c) - sum(c) sum(c)),  bias = (sum(x) - scale sum(c)) / n
# with a weight in each sum if elements have weights. For a given pair the best code of a value is the nearest one.
# Alternating between the two lowers the error to a local minimum (Lloyd's method). At 4 bits there are many, so the
# search starts from several widths, and again from pairs close to the best one.
#
# Sixteen units are fitted at once, one per lane. A unit's result depends neither on the others nor on the width of the
# processor's vectors. There is no fma, since some processors lack it. All sums run over the elements in order.

cdef extern from "lanes.h" nogil:
    lanes lanes_where_less(lanes, lanes, lanes, lanes)

cdef enum:
    # Six starts of 1 step, then 4 steps, then 8 nudges of 4 steps come within 1.5 % of the squared error that twenty
    # times as many steps reach (normal rows of 64 and 256, and word pieces; 2 and 4 bits). Seven starts of 8 steps,
    # without nudges, end 1 to 3 % higher.
    NUM_STARTS = 6
    FIRST_STEPS = 4
    NUM_NUDGES = 8
    NUDGE_STEPS = 4

cdef float[NUM_STARTS] START_WIDTHS    # shares of the unit's range, around its middle
START_WIDTHS[:] = [1, 0.85, 0.7, 0.55, 0.4, 0.25]
cdef float[NUM_NUDGES] NUDGE_SCALES    # times the scale, around the middle of the codes' range
NUDGE_SCALES[:] = [0.96, 0.96, 0.96, 0.96, 1.04, 1.04, 1.04, 1.04]
cdef float[NUM_NUDGES] NUDGE_SHIFTS    # in steps between codes
NUDGE_SHIFTS[:] = [-0.4, -0.2, 0.2, 0.4, -0.4, -0.2, 0.2, 0.4]


cdef struct Fit:
    # Element i of unit k is values[16 * i + k].
    const float *values
    const float *weights        # of the elements, in the same order; NULL: 1 each
    Py_ssize_t dim
    bint is_half
    lanes top                   # the largest code
    lanes total                 # of the weights of each unit
    lanes scale                 # the best pair so far, as it would be stored
    lanes bias
    lanes loss


cdef struct Sums:
    lanes codes                 # of the weighted codes
    lanes squares               # of their squares
    lanes values                # of the values less the bias
    lanes products              # of the weighted codes and the values less the bias
    lanes loss                  # of the squared errors


cdef inline lanes nearest_code(lanes x, lanes inverse, lanes top) noexcept nogil:
    return lanes_round(lanes_max(lanes_min(top, lanes_mul(x, inverse)), lanes_zero()))


cdef inline void sum_up(const Fit *fit, lanes scale, lanes bias, Sums *sums, const bint is_weighted) noexcept nogil:
    cdef lanes inverse = lanes_div(lanes_broadcast(1), scale)
    cdef lanes codes = lanes_zero(), squares = lanes_zero(), values = lanes_zero(), products = lanes_zero()
    cdef lanes loss = lanes_zero()
    cdef lanes x, code, error, weight, weighted_code, weighted_x, weighted_error
    cdef Py_ssize_t i
    for i in range(fit.dim):
        x = lanes_sub(lanes_load(fit.values + 16 * i), bias)
        code = nearest_code(x, inverse, fit.top)
        error = lanes_sub(x, lanes_mul(scale, code))
        weighted_code, weighted_x, weighted_error = code, x, error
        if is_weighted:
            weight = lanes_load(fit.weights + 16 * i)
            weighted_code = lanes_mul(weight, code)
            weighted_x = lanes_mul(weight, x)
            weighted_error = lanes_mul(weight, error)
        codes = lanes_add(codes, weighted_code)
        squares = lanes_add(squares, lanes_mul(weighted_code, code))
        values = lanes_add(values, weighted_x)
        products = lanes_add(products, lanes_mul(weighted_x, code))
        loss = lanes_add(loss, lanes_mul(weighted_error, error))
    sums.codes, sums.squares, sums.values, sums.products, sums.loss = codes, squares, values, products, loss


cdef void descend(Fit *fit, const lanes *first_scale, const lanes *first_bias, int num_steps) noexcept nogil:
    """`num_steps` steps from a pair; the fit keeps the best pair seen. A step may give numbers that are not finite;
    their loss compares below no other, so they are not kept."""
    cdef lanes scale = first_scale[0], bias = first_bias[0], kept
    cdef Sums sums
    cdef int step
    for step in range(num_steps):
        if fit.is_half:
            scale = lanes_through_half(scale)
            bias = lanes_through_half(bias)
        scale = lanes_nonzero(scale)
        if fit.weights != NULL:
            sum_up(fit, scale, bias, &sums, True)
        else:
            sum_up(fit, scale, bias, &sums, False)
        kept = fit.loss
        fit.scale = lanes_where_less(sums.loss, kept, scale, fit.scale)
        fit.bias = lanes_where_less(sums.loss, kept, bias, fit.bias)
        fit.loss = lanes_where_less(sums.loss, kept, sums.loss, kept)
        # If all codes are equal, this is 0 / 1; `lanes_nonzero` then makes the scale 1.
        scale = lanes_div(
            lanes_sub(lanes_mul(fit.total, sums.products), lanes_mul(sums.codes, sums.values)),
            lanes_nonzero(lanes_sub(lanes_mul(fit.total, sums.squares), lanes_mul(sums.codes, sums.codes))))
        bias = lanes_add(bias, lanes_div(lanes_sub(sums.values, lanes_mul(scale, sums.codes)), fit.total))


cdef void fit_pairs(Fit *fit, const lanes *low, const lanes *high) noexcept nogil:
    """Set the best scale and bias of each unit; `low` and `high` are the units' bounds."""
    cdef lanes half = lanes_broadcast(0.5)
    cdef lanes half_top = lanes_mul(half, fit.top)
    cdef lanes middle = lanes_add(lanes_mul(half, low[0]), lanes_mul(half, high[0]))
    cdef lanes whole_width = lanes_sub(high[0], low[0]), width, scale, bias
    cdef int i
    fit.total = lanes_broadcast(<float> fit.dim)
    if fit.weights != NULL:
        fit.total = lanes_zero()
        for i in range(fit.dim):
            fit.total = lanes_add(fit.total, lanes_load(fit.weights + 16 * i))
        fit.total = lanes_nonzero(fit.total)
    for i in range(NUM_STARTS):
        width = lanes_mul(whole_width, lanes_broadcast(START_WIDTHS[i]))
        scale = lanes_div(width, fit.top)
        bias = lanes_sub(middle, lanes_mul(half, width))
        descend(fit, &scale, &bias, 1)
    scale, bias = fit.scale, fit.bias
    descend(fit, &scale, &bias, FIRST_STEPS)
    for i in range(NUM_NUDGES):
        scale = lanes_mul(fit.scale, lanes_broadcast(NUDGE_SCALES[i]))
        bias = lanes_add(fit.bias, lanes_mul(lanes_sub(fit.scale, scale), half_top))
        bias = lanes_add(bias, lanes_mul(lanes_broadcast(NUDGE_SHIFTS[i]), fit.scale))
        descend(fit, &scale, &bias, NUDGE_STEPS)


cdef void find_losses(const Fit *fit, const lanes *scale, const lanes *bias, const lanes *inverse,
                      double *losses) noexcept nogil:
    """The squared errors of the values as lookups will read them, in double."""
    cdef float scales[16]
    cdef float biases[16]
    cdef float codes[16]
    cdef float value
    cdef double error, weight
    cdef Py_ssize_t i
    cdef int k
    lanes_store(scales, scale[0])
    lanes_store(biases, bias[0])
    for k in range(16):
        losses[k] = 0
    for i in range(fit.dim):
        lanes_store(codes, nearest_code(lanes_sub(lanes_load(fit.values + 16 * i), bias[0]), inverse[0], fit.top))
        for k in range(16):
            # The product of a code and a scale is exact in double, so this is fma(code, scale, bias), except that it
            # may round twice, which is too small to change a loss.
            value = <float> (<double> codes[k] * <double> scales[k] + <double> biases[k])
            error = <double> fit.values[16 * i + k] - <double> value
            weight = 1 if fit.weights == NULL else fit.weights[16 * i + k]
            losses[k] += weight * (error * error)
