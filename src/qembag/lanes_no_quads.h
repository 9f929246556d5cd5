/* For families where quads do not pay: LANES_QUADS is 0, and nothing calls these, but the loops name them. */
#ifndef QEMBAG_LANES_NO_QUADS_H
#define QEMBAG_LANES_NO_QUADS_H

#define LANES_QUADS 0
#define LANES_PAIRED 2

static inline lanes lanes_add_by_fma(lanes a, lanes b)
{
    return lanes_add(a, b);
}

static inline lanes lanes_in_order_4bit(lanes x)
{
    return x;
}

static inline void unpack_quad_8bit(const uint8_t *p, lanes x[4])
{
    for (int i = 0; i < 4; i++)
        x[i] = unpack_8bit(p + 16 * i);
}

static inline void unpack_quad_8bit_by_loads(const uint8_t *p, lanes x[4])
{
    unpack_quad_8bit(p, x);
}

static inline void unpack_quad_2bit(const uint8_t *p, lanes x[4])
{
    for (int i = 0; i < 4; i++)
        x[i] = unpack_2bit(p + 4 * i);
}

static inline lanes pairs_of_quad(const float *pairs, int first)
{
    return lanes_broadcast(pairs[first]);
}

static inline void lanes_in_order_quad(lanes x[4])
{
    (void)x;
}

#endif
