/* For families without better instructions (SSE2, NEON, plain C): functions of lanes.h made from the others, mostly by
 * way of memory. A family file includes this at its end. */
#ifndef QEMBAG_LANES_GENERIC_H
#define QEMBAG_LANES_GENERIC_H

static inline void lanes_accumulate(lanes *acc, lanes scale, lanes x, lanes bias)
{
    *acc = lanes_fma(scale, x, lanes_add(*acc, bias));
}

static inline lanes lanes_load_part(const void *p, ptrdiff_t count, lanes fill)
{
    float values[16];
    lanes_store(values, fill);
    memcpy(values, p, (size_t)count * sizeof *values);
    return lanes_load(values);
}

static inline void lanes_store_bfloat16(void *p, lanes x)
{
    float values[16];
    uint16_t halves[16];
    lanes_store(values, x);
    for (int i = 0; i < 16; i++)
        halves[i] = bfloat16_of_float(values[i]);
    memcpy(p, halves, sizeof halves);
}

static inline lanes lanes_nonzero(lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 16; i++)
        values[i] = values[i] == 0 ? 1 : values[i];
    return lanes_load(values);
}

static inline lanes lanes_where_less(lanes a, lanes b, lanes x, lanes y)
{
    float left[16], right[16], values[16], others[16];
    lanes_store(left, a);
    lanes_store(right, b);
    lanes_store(values, x);
    lanes_store(others, y);
    for (int i = 0; i < 16; i++)
        values[i] = left[i] < right[i] ? values[i] : others[i];
    return lanes_load(values);
}

static inline lanes lanes_through_half(lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 16; i++)
        values[i] = float_of_half(half_of_float(values[i]));
    return lanes_load(values);
}

static inline int lanes_all_finite(lanes x)
{
    float values[16];
    int not_finite = 0;
    lanes_store(values, x);
    for (int i = 0; i < 16; i++)
        not_finite |= (bits_of_float(values[i]) & 0x7f800000u) == 0x7f800000u;
    return !not_finite;
}

static inline void read_pair_float(const uint8_t *p, lanes *scale, lanes *bias)
{
    *scale = lanes_broadcast(float_of_bits(read_le32(p)));
    *bias = lanes_broadcast(float_of_bits(read_le32(p + 4)));
}

static inline void read_pair_half(const uint8_t *p, lanes *scale, lanes *bias)
{
    *scale = lanes_broadcast(float_of_half(read_le16(p)));
    *bias = lanes_broadcast(float_of_half(read_le16(p + 2)));
}

static NOT_INLINE void spread_pairs(const uint8_t *p, const pair_places *places, float *pairs, float weight,
                                    int is_weighted, int width)
{
    for (int k = 0; k < width; k++) {
        const uint8_t *pair = p + (places->are_halves ? 4 : 8) * places->of_vector[k];
        const float scale = places->are_halves ? float_of_half(read_le16(pair)) : float_of_bits(read_le32(pair));
        const float bias = places->are_halves ? float_of_half(read_le16(pair + 2)) : float_of_bits(read_le32(pair + 4));
        pairs[2 * k] = is_weighted ? weight * scale : scale;
        pairs[2 * k + 1] = is_weighted ? weight * bias : bias;
    }
}

static inline lanes unpack_float32(const uint8_t *p)
{
    float values[16];
    memcpy(values, p, sizeof values);
    return lanes_load(values);
}

#if !defined(QEMBAG_LANES_NEON_H)
static NOT_INLINE lanes unpack_float16(const uint8_t *p)
{
    uint16_t halves[16];
    float values[16];
    memcpy(halves, p, sizeof halves);
    for (int i = 0; i < 16; i++)
        values[i] = float_of_half(halves[i]);
    return lanes_load(values);
}
#endif

static inline lanes unpack_bfloat16(const uint8_t *p)
{
    uint16_t halves[16];
    float values[16];
    memcpy(halves, p, sizeof halves);
    for (int i = 0; i < 16; i++)
        values[i] = float_of_bits((uint32_t)halves[i] << 16);
    return lanes_load(values);
}

/* Without a branch on which rows do. */
static inline int take_part(const int64_t *found, int count, int64_t num_rows, int64_t *numbers, uint64_t *taken)
{
    uint64_t bits = 0;
    int place = 0, wrong = 0;
    for (int k = 0; k < count; k++) {
        const int64_t number = found[k];
        const int takes_part = number >= 0;
        wrong |= (uint64_t)number + 1 > (uint64_t)num_rows;
        numbers[place] = number;
        place += takes_part;
        bits |= (uint64_t)takes_part << k;
    }
    *taken = bits;
    return !wrong;
}

/* ---- SSE2 has its own ---- */
#if !defined(QEMBAG_LANES_X86_H)

static inline lanes unpack_8bit_short(const uint8_t *p)
{
    uint8_t group[16] = {0};
    memcpy(group, p, 8);
    return unpack_8bit(group);
}

static inline lanes unpack_4bit_short(const uint8_t *p)
{
    uint8_t group[8] = {0};
    memcpy(group, p, 4);
    return unpack_4bit(group);
}

static inline float min_float(float a, float b)
{
    return a < b ? a : b;
}

static inline float max_float(float a, float b)
{
    return a > b ? a : b;
}

static inline void fold_min(float *p, lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 4; i++)
        p[i] = min_float(min_float(values[i], values[8 + i]), min_float(values[4 + i], values[12 + i]));
}

static inline void fold_max(float *p, lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 4; i++)
        p[i] = max_float(max_float(values[i], values[8 + i]), max_float(values[4 + i], values[12 + i]));
}

static inline lanes min_of_4(const float *p)
{
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = min_float(min_float(p[4 * i], p[4 * i + 2]), min_float(p[4 * i + 1], p[4 * i + 3]));
    return lanes_load(values);
}

static inline lanes max_of_4(const float *p)
{
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = max_float(max_float(p[4 * i], p[4 * i + 2]), max_float(p[4 * i + 1], p[4 * i + 3]));
    return lanes_load(values);
}

/* Eight codes, a byte each, into 4 bytes: joins neighbours, then pairs, then fours. */
static inline uint32_t pack_4bit_x8(uint64_t codes)
{
    codes = (codes | codes >> 4) & 0x00ff00ff00ff00ffu;
    codes = (codes | codes >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(codes | codes >> 16);
}

/* Eight codes, a byte each, into 2 bytes. */
static inline uint16_t pack_2bit_x8(uint64_t codes)
{
    codes = (codes | codes >> 6) & 0x000f000f000f000fu;
    codes = (codes | codes >> 12) & 0x000000ff000000ffu;
    return (uint16_t)(codes | codes >> 24);
}

/* `lanes_store_bytes` rounds, and stores 0 for negative values and NaN. */
static inline void pack_8bit(uint8_t *p, lanes x)
{
    lanes_store_bytes(p, x);
}

static inline void pack_4bit(uint8_t *p, lanes x)
{
    uint8_t codes[16];
    lanes_store_bytes(codes, x);
    write_le32(p, pack_4bit_x8(read_le64(codes)));
    write_le32(p + 4, pack_4bit_x8(read_le64(codes + 8)));
}

static inline void pack_2bit(uint8_t *p, lanes x)
{
    uint8_t codes[16];
    lanes_store_bytes(codes, x);
    write_le16(p, pack_2bit_x8(read_le64(codes)));
    write_le16(p + 2, pack_2bit_x8(read_le64(codes + 8)));
}

#endif

static inline void pack_four_8bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    pack_8bit(p, a);
    pack_8bit(p + 16, b);
    pack_8bit(p + 32, c);
    pack_8bit(p + 48, d);
}

static inline void pack_four_4bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    pack_4bit(p, a);
    pack_4bit(p + 8, b);
    pack_4bit(p + 16, c);
    pack_4bit(p + 24, d);
}

static inline void pack_four_2bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    pack_2bit(p, a);
    pack_2bit(p + 4, b);
    pack_2bit(p + 8, c);
    pack_2bit(p + 12, d);
}

#endif
