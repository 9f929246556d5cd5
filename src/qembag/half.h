/* Half floats, and bfloat16, as their bits: several compilers have no type for them. */
#ifndef QEMBAG_HALF_H
#define QEMBAG_HALF_H

#include <stdint.h>

#include "bytes.h"

/* Exact: every half is a float. Shifted into a float's place, the exponent is 112 too small. Multiplying by 2^112 fixes
 * that and normalises half denormals. Infinity and NaN get the rest of their exponent bits by hand. */
static inline float float_of_half(uint16_t half)
{
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t scaled = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    return float_of_bits(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
}

/* Rounds to nearest, ties to even. Overflow gives infinity; NaN gives NaN. For half denormals, adding 0.5 does the
 * rounding: the last bit of 0.5 is worth 2^-24, the smallest step of a half. */
static inline uint16_t half_of_float(float value)
{
    const uint32_t bits = bits_of_float(value);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000u) /* 65520 and more */
        return sign | 0x7c00;
    if (magnitude < 0x38800000u) /* below 2^-14 */
        return sign | (uint16_t)(bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u);
    return sign | (uint16_t)((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

/* A bfloat16 is the upper half of a float. Rounds to nearest, ties to even; NaN gives NaN. Without a branch, so that
 * loops over this are vectorized. */
static inline uint16_t bfloat16_of_float(float value)
{
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint32_t nan = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

#endif
