/* `lanes` in plain C, for processors of any kind and byte order. lanes.h says what each function does. */
#ifndef QEMBAG_LANES_PLAIN_H
#define QEMBAG_LANES_PLAIN_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes.h"
#include "half.h"

typedef struct {
    float value[16];
} lanes;

#define LANES_LEVEL "baseline"
#define LANES_MAX_BLOCK 4
#if defined(FP_FAST_FMAF) || defined(__FP_FAST_FMAF)
#define LANES_HAS_FMA 1
#else
#define LANES_HAS_FMA 0
#endif

/* ---- A fused multiply-add without the instruction ---- */

#if LANES_HAS_FMA
static inline float exact_fma(float a, float b, float c)
{
    return fmaf(a, b, c);
}
#else
/* Not the C library's fmaf, which is 90 times slower than the instruction. In double, the product of two floats is
 * exact; its sum with c is not. So the sum is rounded to odd: where it is inexact, to the neighbour whose last bit is
 * odd. A double has more than two bits to spare over a float, so the second rounding, to float, then gives the bits of
 * one rounding (Boldo and Melquiond, 2008). `error` is the exact rounding error of the sum (Knuth's two-sum). Where the
 * sum is not finite, `error` is a NaN and the sum stays as it is. */
static inline float exact_fma(float a, float b, float c)
{
    const double product = (double)a * b;
    const double addend = c;
    const double sum = product + addend;
    const double shifted = sum - product;
    const double error = (product - (sum - shifted)) + (addend - shifted);
    int64_t bits;
    double odd;
    memcpy(&bits, &sum, sizeof bits);
    /* An even last bit becomes odd by one step towards the error: away from zero where the signs agree. */
    const int64_t step = (error > 0) == (sum > 0) ? 1 : -1;
    const int64_t inexact = (error > 0) | (error < 0);
    bits += step * (inexact & ~bits & 1);
    memcpy(&odd, &bits, sizeof odd);
    return (float)odd;
}
#endif

/* ---- Memory ---- */

static inline lanes lanes_broadcast(float x)
{
    lanes result;
    for (int i = 0; i < 16; i++)
        result.value[i] = x;
    return result;
}

static inline lanes lanes_load(const float *p)
{
    lanes result;
    memcpy(&result, p, sizeof result);
    return result;
}

static inline void lanes_store(float *p, lanes x)
{
    memcpy(p, &x, sizeof x);
}

static inline void lanes_store_half(void *p, lanes x)
{
    for (int i = 0; i < 16; i++) {
        const uint16_t half = half_of_float(x.value[i]);
        memcpy((uint8_t *)p + 2 * i, &half, sizeof half);
    }
}

/* ---- Arithmetic ---- */

static inline lanes lanes_add(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.value[i] += b.value[i];
    return a;
}

static inline lanes lanes_sub(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.value[i] -= b.value[i];
    return a;
}

static inline lanes lanes_mul(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.value[i] *= b.value[i];
    return a;
}

static inline lanes lanes_div(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.value[i] /= b.value[i];
    return a;
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    for (int i = 0; i < 16; i++)
        c.value[i] = exact_fma(a.value[i], b.value[i], c.value[i]);
    return c;
}

static inline lanes lanes_max(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        b.value[i] = a.value[i] > b.value[i] ? a.value[i] : b.value[i];
    return b;
}

static inline lanes lanes_min(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        b.value[i] = a.value[i] < b.value[i] ? a.value[i] : b.value[i];
    return b;
}

static inline lanes lanes_round(lanes x)
{
    for (int i = 0; i < 16; i++)
        x.value[i] = rintf(x.value[i]);
    return x;
}

/* ---- Unpacking ---- */

static inline lanes unpack_8bit(const uint8_t *p)
{
    lanes result;
    for (int i = 0; i < 16; i++)
        result.value[i] = p[i];
    return result;
}

static inline lanes unpack_4bit(const uint8_t *p)
{
    lanes result;
    for (int i = 0; i < 8; i++) {
        result.value[2 * i] = (float)(p[i] & 15);
        result.value[2 * i + 1] = (float)(p[i] >> 4);
    }
    return result;
}

static inline lanes unpack_2bit(const uint8_t *p)
{
    lanes result;
    for (int i = 0; i < 16; i++)
        result.value[i] = (float)(p[i / 4] >> 2 * (i % 4) & 3);
    return result;
}

/* ---- Packing ---- */

/* Rounded, a byte each; negative values and NaN give 0. */
static inline void lanes_store_bytes(uint8_t *p, lanes x)
{
    for (int i = 0; i < 16; i++)
        p[i] = (uint8_t)rintf(x.value[i] > 0 ? x.value[i] : 0);
}

#include "lanes_generic.h"
#include "lanes_no_quads.h"

#endif
