/* Little-endian numbers at any address, the bits of floats, and bits counted. */
#ifndef QEMBAG_BYTES_H
#define QEMBAG_BYTES_H

#include <stdint.h>
#include <string.h>

/* Not read_u16 etc.: CPython's internal headers, which Cython includes outside the limited API, have those names. */

static inline uint16_t read_le16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint32_t read_le32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t read_le64(const uint8_t *p)
{
    return read_le32(p) | (uint64_t)read_le32(p + 4) << 32;
}

/* gcc does not merge vectorized byte stores into one store, so little-endian hosts copy the whole number. Byte stores
 * took an eighth of the time of quantizing rows of 64, a third of that of rows of 16. */
#if defined(_MSC_VER) || (defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
static inline void write_le16(uint8_t *p, uint16_t value)
{
    memcpy(p, &value, sizeof value);
}

static inline void write_le32(uint8_t *p, uint32_t value)
{
    memcpy(p, &value, sizeof value);
}
#else
static inline void write_le16(uint8_t *p, uint16_t value)
{
    p[0] = (uint8_t)value;
    p[1] = (uint8_t)(value >> 8);
}

static inline void write_le32(uint8_t *p, uint32_t value)
{
    write_le16(p, (uint16_t)value);
    write_le16(p + 2, (uint16_t)(value >> 16));
}
#endif

static inline float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline int count_ones(uint64_t bits)
{
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_popcountll(bits);
#else
    bits -= bits >> 1 & 0x5555555555555555u;
    bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
    return (int)(((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
#endif
}

/* Of the lowest `end` bits, 0 to 64. */
static inline int count_ones_below(uint64_t bits, int end)
{
    return end == 0 ? 0 : count_ones(bits << (64 - end));
}

#endif
