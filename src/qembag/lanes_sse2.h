/* `lanes` in four SSE2 registers: the baseline of x86. lanes.h says what each function does. */
#ifndef QEMBAG_LANES_SSE2_H
#define QEMBAG_LANES_SSE2_H

#include <emmintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes.h"
#include "half.h"
#include "lanes_x86.h"

typedef struct {
    __m128 part[4];
} lanes;

#define LANES_LEVEL "baseline"
#define LANES_MAX_BLOCK 4
#define LANES_HAS_FMA 0

/* ---- Memory ---- */

static inline lanes lanes_broadcast(float x)
{
    const __m128 part = _mm_set1_ps(x);
    const lanes result = {{part, part, part, part}};
    return result;
}

static inline lanes lanes_load(const float *p)
{
    const lanes result = {{_mm_loadu_ps(p), _mm_loadu_ps(p + 4), _mm_loadu_ps(p + 8), _mm_loadu_ps(p + 12)}};
    return result;
}

static inline void lanes_store(float *p, lanes x)
{
    for (int i = 0; i < 4; i++)
        _mm_storeu_ps(p + 4 * i, x.part[i]);
}

static inline void lanes_store_half(void *p, lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 16; i++) {
        const uint16_t half = half_of_float(values[i]);
        memcpy((uint8_t *)p + 2 * i, &half, sizeof half);
    }
}

/* ---- Arithmetic ---- */

static inline lanes lanes_add(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_add_ps(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_sub(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_sub_ps(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_mul(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_mul_ps(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_div(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_div_ps(a.part[i], b.part[i]);
    return a;
}

/* Of the low two lanes. `exact_fma` in lanes_plain.h says why this rounds once. */
static inline __m128 exact_fma_x2(__m128 a, __m128 b, __m128 c)
{
    const __m128d product = _mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b));
    const __m128d addend = _mm_cvtps_pd(c);
    const __m128d sum = _mm_add_pd(product, addend);
    const __m128d shifted = _mm_sub_pd(sum, product);
    const __m128d error =
        _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, shifted)), _mm_sub_pd(addend, shifted));
    const __m128d inexact = _mm_and_pd(_mm_cmpneq_pd(error, _mm_setzero_pd()), _mm_cmpord_pd(error, error));
    const __m128i bits = _mm_castpd_si128(sum);
    const __m128i even = _mm_and_si128(_mm_andnot_si128(bits, _mm_castpd_si128(inexact)), _mm_set1_epi64x(1));
    const __m128i opposed = _mm_and_si128(_mm_srli_epi64(_mm_castpd_si128(_mm_xor_pd(error, sum)), 63), even);
    const __m128i odd = _mm_sub_epi64(_mm_add_epi64(bits, even), _mm_add_epi64(opposed, opposed));
    return _mm_cvtpd_ps(_mm_castsi128_pd(odd));
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    for (int i = 0; i < 4; i++)
        c.part[i] = _mm_movelh_ps(exact_fma_x2(a.part[i], b.part[i], c.part[i]),
                                  exact_fma_x2(_mm_movehl_ps(a.part[i], a.part[i]), _mm_movehl_ps(b.part[i], b.part[i]),
                                                _mm_movehl_ps(c.part[i], c.part[i])));
    return c;
}

/* The instructions return b unless the comparison holds: also for NaN and zeros of either sign. */
static inline lanes lanes_max(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_max_ps(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_min(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_min_ps(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_round(lanes x)
{
    for (int i = 0; i < 4; i++)
        x.part[i] = _mm_cvtepi32_ps(_mm_cvtps_epi32(x.part[i]));
    return x;
}

/* ---- Unpacking ---- */

static inline lanes lanes_from_bytes(__m128i codes)
{
    const __m128i zero = _mm_setzero_si128();
    const __m128i low = _mm_unpacklo_epi8(codes, zero);
    const __m128i high = _mm_unpackhi_epi8(codes, zero);
    const lanes result = {{
        _mm_cvtepi32_ps(_mm_unpacklo_epi16(low, zero)), _mm_cvtepi32_ps(_mm_unpackhi_epi16(low, zero)),
        _mm_cvtepi32_ps(_mm_unpacklo_epi16(high, zero)), _mm_cvtepi32_ps(_mm_unpackhi_epi16(high, zero)),
    }};
    return result;
}

static inline lanes unpack_8bit(const uint8_t *p)
{
    return lanes_from_bytes(_mm_loadu_si128((const __m128i *)p));
}

static inline lanes unpack_8bit_short(const uint8_t *p)
{
    return lanes_from_bytes(_mm_loadl_epi64((const __m128i *)p));
}

static inline lanes unpack_4bit_x16(__m128i bytes)
{
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return lanes_from_bytes(_mm_unpacklo_epi8(_mm_and_si128(bytes, mask), high));
}

static inline lanes unpack_4bit(const uint8_t *p)
{
    return unpack_4bit_x16(_mm_loadl_epi64((const __m128i *)p));
}

static inline lanes unpack_4bit_short(const uint8_t *p)
{
    return unpack_4bit_x16(load_4_bytes(p));
}

/* Splits each byte into halves, then each half into two codes. */
static inline lanes unpack_2bit(const uint8_t *p)
{
    const __m128i bytes = load_4_bytes(p);
    const __m128i halves = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
    const __m128i codes = _mm_unpacklo_epi8(halves, _mm_srli_epi16(halves, 2));
    return lanes_from_bytes(_mm_and_si128(codes, _mm_set1_epi8(3)));
}

/* ---- Packing ---- */

/* A byte each; negative values and NaN give 0. */
static inline __m128i lanes_to_bytes(lanes x)
{
    const __m128i low = _mm_packs_epi32(_mm_cvtps_epi32(x.part[0]), _mm_cvtps_epi32(x.part[1]));
    const __m128i high = _mm_packs_epi32(_mm_cvtps_epi32(x.part[2]), _mm_cvtps_epi32(x.part[3]));
    return _mm_packus_epi16(low, high);
}

static inline void pack_8bit(uint8_t *p, lanes x)
{
    _mm_storeu_si128((__m128i *)p, lanes_to_bytes(x));
}

static inline void pack_4bit(uint8_t *p, lanes x)
{
    _mm_storel_epi64((__m128i *)p, pack_bytes_4bit(lanes_to_bytes(x)));
}

static inline void pack_2bit(uint8_t *p, lanes x)
{
    store_4_bytes(p, pack_bytes_2bit(lanes_to_bytes(x)));
}

/* ---- Min and max of rows ---- */

static inline void fold_min(float *p, lanes x)
{
    _mm_storeu_ps(p, _mm_min_ps(_mm_min_ps(x.part[0], x.part[2]), _mm_min_ps(x.part[1], x.part[3])));
}

static inline void fold_max(float *p, lanes x)
{
    _mm_storeu_ps(p, _mm_max_ps(_mm_max_ps(x.part[0], x.part[2]), _mm_max_ps(x.part[1], x.part[3])));
}

static inline lanes lanes_from_quarters(__m128 a, __m128 b, __m128 c, __m128 d)
{
    const lanes result = {{a, b, c, d}};
    return result;
}

static inline lanes min_of_4(const float *p)
{
    return lanes_from_quarters(min_of_4_x4(p), min_of_4_x4(p + 16), min_of_4_x4(p + 32), min_of_4_x4(p + 48));
}

static inline lanes max_of_4(const float *p)
{
    return lanes_from_quarters(max_of_4_x4(p), max_of_4_x4(p + 16), max_of_4_x4(p + 32), max_of_4_x4(p + 48));
}

#include "lanes_generic.h"
#include "lanes_no_quads.h"

#endif
