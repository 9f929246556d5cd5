/* `lanes` in one AVX-512 register (F, BW, DQ, VL, with FMA and F16C). lanes.h says what each function does. */
#ifndef QEMBAG_LANES_AVX512_H
#define QEMBAG_LANES_AVX512_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes.h"
#include "lanes_x86.h"

typedef __m512 lanes;

#define LANES_LEVEL "avx512"
/* 16 of the 32 registers. With 8, rows of 256 elements and more were 5 to 10 % slower in cache, and rows of 512 from
 * memory took 1.5 times as long. */
#define LANES_MAX_BLOCK 16
#define LANES_HAS_FMA 1
/* The accumulators of two bags take half of the registers. */
#define LANES_PAIRED 4
#define LANES_QUADS 1

/* ---- Memory ---- */

static inline lanes lanes_broadcast(float x)
{
    return _mm512_set1_ps(x);
}

static inline lanes lanes_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline lanes lanes_load_part(const void *p, ptrdiff_t count, lanes fill)
{
    return _mm512_mask_loadu_ps(fill, (__mmask16)((1u << count) - 1), p);
}

static inline void lanes_store(float *p, lanes x)
{
    _mm512_storeu_ps(p, x);
}

static inline void lanes_store_half(void *p, lanes x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* As `bfloat16_of_float`. */
static inline void lanes_store_bfloat16(void *p, lanes x)
{
    const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
    const __m512i rest = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(upper, _mm512_set1_epi32(1)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, rest), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i halves = _mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(halves));
}

/* ---- Arithmetic ---- */

static inline lanes lanes_add(lanes a, lanes b)
{
    return _mm512_add_ps(a, b);
}

/* 1 * b + a, rounded once, is the same sum. A Zen 4 adds and converts on two of its four pipes and multiplies on the
 * other two; with half of the sums moved there, 8-bit rows in cache are 2 to 4 % faster. The asm hides the 1: otherwise
 * the compiler turns this back into an addition. */
static inline lanes lanes_add_by_fma(lanes a, lanes b)
{
    __m512 one = _mm512_set1_ps(1.0f);
#if defined(__GNUC__) || defined(__clang__)
    __asm__("" : "+v"(one));
#endif
    return _mm512_fmadd_ps(one, b, a);
}

static inline lanes lanes_sub(lanes a, lanes b)
{
    return _mm512_sub_ps(a, b);
}

static inline lanes lanes_mul(lanes a, lanes b)
{
    return _mm512_mul_ps(a, b);
}

static inline lanes lanes_div(lanes a, lanes b)
{
    return _mm512_div_ps(a, b);
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline void lanes_accumulate(lanes *acc, lanes scale, lanes x, lanes bias)
{
    *acc = lanes_fma(scale, x, lanes_add(*acc, bias));
}

/* The instructions return b unless the comparison holds: also for NaN and zeros of either sign. */
static inline lanes lanes_max(lanes a, lanes b)
{
    return _mm512_max_ps(a, b);
}

static inline lanes lanes_min(lanes a, lanes b)
{
    return _mm512_min_ps(a, b);
}

static inline lanes lanes_round(lanes x)
{
    return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(x));
}

static inline lanes lanes_nonzero(lanes x)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ), x, _mm512_set1_ps(1));
}

static inline lanes lanes_where_less(lanes a, lanes b, lanes x, lanes y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}

static inline lanes lanes_through_half(lanes x)
{
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline int lanes_all_finite(lanes x)
{
    return _mm512_fpclass_ps_mask(x, 0x99) == 0; /* NaN of either kind, infinity of either sign */
}

/* ---- Unpacking ---- */

/* A table of permutes or shifts, as a number that the compiler does not know: it stays in a register. Left to itself,
 * gcc 12 reads a constant from memory at each vector where a loop has one more variable, and rows of 128 elements of 4
 * bits in cache take 1.15 times as long. */
#if defined(__GNUC__) || defined(__clang__)
#define LANES_KEEP(table) __asm__("" : "+v"(table))
#else
#define LANES_KEEP(table) ((void)0)
#endif

static inline lanes unpack_8bit(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

static inline lanes unpack_8bit_short(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

/* A permute reads the low four bits of each index only, so it masks and converts in one instruction. Lane 2i becomes
 * element i, lane 2i + 1 element 8 + i: `lanes_in_order_4bit` undoes that once a bag. */
static inline lanes unpack_4bit_x16(__m128i bytes)
{
    __m512i shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    LANES_KEEP(shifts);
    LANES_KEEP(values);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_broadcastq_epi64(bytes), shifts), values);
}

static inline lanes unpack_4bit(const uint8_t *p)
{
    return unpack_4bit_x16(_mm_loadl_epi64((const __m128i *)p));
}

static inline lanes unpack_4bit_short(const uint8_t *p)
{
    return unpack_4bit_x16(load_4_bytes(p));
}

static inline lanes lanes_in_order_4bit(lanes x)
{
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm512_permutexvar_ps(order, x);
}

/* Also by a permute. The low four bits of an index are two codes here: the table gives the value of the lower. */
static inline lanes unpack_2bit(const uint8_t *p)
{
    __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512 values = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    LANES_KEEP(shifts);
    LANES_KEEP(values);
    const __m512i codes = _mm512_broadcastd_epi32(load_4_bytes(p));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts), values);
}

static inline void unpack_quad_8bit(const uint8_t *p, lanes x[4])
{
    const __m512i second = _mm512_set4_epi32((int)0x8080800d, (int)0x80808009, (int)0x80808005, (int)0x80808001);
    const __m512i third = _mm512_set4_epi32((int)0x8080800e, (int)0x8080800a, (int)0x80808006, (int)0x80808002);
    const __m512i codes = _mm512_loadu_si512(p);
    x[0] = _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255)));
    x[1] = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(codes, second));
    x[2] = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(codes, third));
    x[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 24));
}

/* Loads that begin one and two bytes further on replace two shuffles. The groups after this quad need the shuffle unit:
 * 7 % faster than `unpack_quad_8bit` where 64 elements follow, slower where none do. */
static inline void unpack_quad_8bit_by_loads(const uint8_t *p, lanes x[4])
{
    const __m512i mask = _mm512_set1_epi32(255);
    const __m512i codes = _mm512_loadu_si512(p);
    x[0] = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask));
    x[1] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_loadu_si512(p + 1), mask));
    x[2] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_loadu_si512(p + 2), mask));
    x[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 24));
}

/* The low four bits of an index are two codes: one table gives the value of the lower, one that of the upper. */
static inline void unpack_quad_2bit(const uint8_t *p, lanes x[4])
{
    __m512 lower = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    __m512 upper = _mm512_setr_ps(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    LANES_KEEP(lower);
    LANES_KEEP(upper);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    const __m512i shifted = _mm512_srli_epi32(codes, 4);
    x[0] = _mm512_permutexvar_ps(codes, lower);
    x[1] = _mm512_permutexvar_ps(codes, upper);
    x[2] = _mm512_permutexvar_ps(shifted, lower);
    x[3] = _mm512_permutexvar_ps(shifted, upper);
}

/* Sixteen 4 x 4 transpositions. */
static inline void lanes_in_order_quad(lanes x[4])
{
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
    /* In parts of four elements: part i of p, q, r and s is part 4i, 4i + 1, 4i + 2 and 4i + 3 of the result. */
    const __m512 p = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), q = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    const __m512 r = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)), s = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    const __m512 pq_low = _mm512_shuffle_f32x4(p, q, 0x44), pq_high = _mm512_shuffle_f32x4(p, q, 0xee);
    const __m512 rs_low = _mm512_shuffle_f32x4(r, s, 0x44), rs_high = _mm512_shuffle_f32x4(r, s, 0xee);
    x[0] = _mm512_shuffle_f32x4(pq_low, rs_low, 0x88);
    x[1] = _mm512_shuffle_f32x4(pq_low, rs_low, 0xdd);
    x[2] = _mm512_shuffle_f32x4(pq_high, rs_high, 0x88);
    x[3] = _mm512_shuffle_f32x4(pq_high, rs_high, 0xdd);
}

static inline void read_pair_float(const uint8_t *p, lanes *scale, lanes *bias)
{
    float pair[2];
    memcpy(pair, p, sizeof pair);
    *scale = _mm512_set1_ps(pair[0]);
    *bias = _mm512_set1_ps(pair[1]);
}

static inline void read_pair_half(const uint8_t *p, lanes *scale, lanes *bias)
{
    const __m128 pair = _mm_cvtph_ps(load_4_bytes(p));
    *scale = _mm512_broadcastss_ps(pair);
    *bias = _mm512_broadcastss_ps(_mm_movehdup_ps(pair));
}

/* Masked loads read no pair that is not there. */
static inline void spread_pairs(const uint8_t *p, const pair_places *places, float *pairs, float weight,
                                int is_weighted, int width)
{
    const __m256i order = _mm256_loadu_si256((const __m256i *)places->of_vector);
    const __mmask8 there = (__mmask8)((1u << places->count) - 1);
    __m512 values;
    (void)width;
    if (places->are_halves) {
        const __m256i halves =
            places->are_eight ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi32(there, p);
        values = _mm512_cvtph_ps(_mm256_permutevar8x32_epi32(halves, order));
    } else {
        const __m512i floats = places->are_eight ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi64(there, p);
        values = _mm512_castsi512_ps(_mm512_permutexvar_epi64(_mm512_cvtepi32_epi64(order), floats));
    }
    if (is_weighted)
        values = _mm512_mul_ps(values, _mm512_set1_ps(weight));
    _mm512_storeu_ps(pairs, values);
}

/* Lane i of each x[k] is of the elements 4i to 4i + 3. */
static inline lanes pairs_of_quad(const float *pairs, int first)
{
    const int second = first + 4;
    const __m512i places = _mm512_setr_epi32(first, first, first, first, first, first, first, first,
                                             second, second, second, second, second, second, second, second);
    return _mm512_permutexvar_ps(places, _mm512_loadu_ps(pairs));
}

/* ---- Floats ---- */

static inline lanes unpack_float32(const uint8_t *p)
{
    return _mm512_loadu_ps(p);
}

static inline lanes unpack_float16(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline lanes unpack_bfloat16(const uint8_t *p)
{
    const __m256i halves = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* ---- Packing ---- */

/* A byte each; negative values and NaN give 0. */
static inline __m128i lanes_to_bytes(lanes x)
{
    return _mm512_cvtepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512()));
}

/* A byte each, in order. Packing works within a quarter of the register and leaves four codes of a there, then four of
 * b, c and d. */
static inline __m512i lanes_to_bytes_x4(lanes a, lanes b, lanes c, lanes d)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
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

static inline void pack_four_8bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    _mm512_storeu_si512(p, lanes_to_bytes_x4(a, b, c, d));
}

static inline void pack_four_4bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m512i pairs = _mm512_maddubs_epi16(lanes_to_bytes_x4(a, b, c, d), _mm512_set1_epi16(1 | 16 << 8));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(pairs));
}

static inline void pack_four_2bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m512i pairs = _mm512_maddubs_epi16(lanes_to_bytes_x4(a, b, c, d), _mm512_set1_epi16(1 | 4 << 8));
    const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 16 << 16));
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(fours));
}

/* ---- Rows that take part ---- */

static inline int take_part(const int64_t *found, int count, int64_t num_rows, int64_t *numbers, uint64_t *taken)
{
    const __m512i limit = _mm512_set1_epi64(num_rows), one = _mm512_set1_epi64(1);
    uint64_t bits = 0;
    int place = 0, wrong = 0;
    for (int k = 0; k < count; k += 8) {
        const __m512i eight = _mm512_loadu_si512(found + k);
        const __mmask8 takes_part = _mm512_cmpge_epi64_mask(eight, _mm512_setzero_si512());
        wrong |= _mm512_cmpgt_epu64_mask(_mm512_add_epi64(eight, one), limit);
        _mm512_storeu_si512(numbers + place, _mm512_maskz_compress_epi64(takes_part, eight));
        bits |= (uint64_t)takes_part << k;
        place += count_ones(takes_part);
    }
    *taken = bits;
    return !wrong;
}

/* ---- Min and max of rows ---- */

static inline void fold_min(float *p, lanes x)
{
    const __m256 eight = _mm256_min_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(p, _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline void fold_max(float *p, lanes x)
{
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(p, _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline lanes lanes_from_quarters(__m128 a, __m128 b, __m128 c, __m128 d)
{
    const __m512 ab = _mm512_insertf32x4(_mm512_castps128_ps512(a), b, 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(ab, c, 2), d, 3);
}

static inline lanes min_of_4(const float *p)
{
    return lanes_from_quarters(min_of_4_x4(p), min_of_4_x4(p + 16), min_of_4_x4(p + 32), min_of_4_x4(p + 48));
}

static inline lanes max_of_4(const float *p)
{
    return lanes_from_quarters(max_of_4_x4(p), max_of_4_x4(p + 16), max_of_4_x4(p + 32), max_of_4_x4(p + 48));
}

#endif
