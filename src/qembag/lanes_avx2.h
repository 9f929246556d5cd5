/* `lanes` in two AVX registers (AVX2, FMA, F16C). lanes.h says what each function does. */
#ifndef QEMBAG_LANES_AVX2_H
#define QEMBAG_LANES_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes.h"
#include "lanes_x86.h"

typedef struct {
    __m256 low, high;
} lanes;

#define LANES_LEVEL "avx2"
/* 12 of the 16 registers. A few are spilled to the stack; it is still 2 to 5 % faster than 8. */
#define LANES_MAX_BLOCK 6
#define LANES_HAS_FMA 1

static inline lanes lanes_join(__m256 low, __m256 high)
{
    const lanes x = {low, high};
    return x;
}

/* ---- Memory ---- */

static inline lanes lanes_broadcast(float x)
{
    return lanes_join(_mm256_set1_ps(x), _mm256_set1_ps(x));
}

static inline lanes lanes_load(const float *p)
{
    return lanes_join(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}

static inline lanes lanes_load_part(const void *p, ptrdiff_t count, lanes fill)
{
    static const int32_t there[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const __m256i low = _mm256_loadu_si256((const __m256i *)(there + 16 - count));
    const __m256i high = _mm256_loadu_si256((const __m256i *)(there + 24 - count));
    const __m256 first = _mm256_maskload_ps((const float *)p, low);
    const __m256 rest = _mm256_maskload_ps((const float *)p + 8, high);
    return lanes_join(_mm256_blendv_ps(fill.low, first, _mm256_castsi256_ps(low)),
                      _mm256_blendv_ps(fill.high, rest, _mm256_castsi256_ps(high)));
}

static inline void lanes_store(float *p, lanes x)
{
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}

static inline void lanes_store_half(void *p, lanes x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}

/* As `bfloat16_of_float`, in the lower halves. */
static inline __m256i bfloat16_x8(__m256 x)
{
    const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    const __m256i rest = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(upper, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, rest), 16);
    const __m256i nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

static inline void lanes_store_bfloat16(void *p, lanes x)
{
    const __m256i both = _mm256_packus_epi32(bfloat16_x8(x.low), bfloat16_x8(x.high));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, _MM_SHUFFLE(3, 1, 2, 0)));
}

/* ---- Arithmetic ---- */

static inline lanes lanes_add(lanes a, lanes b)
{
    return lanes_join(_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high));
}

static inline lanes lanes_sub(lanes a, lanes b)
{
    return lanes_join(_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high));
}

static inline lanes lanes_mul(lanes a, lanes b)
{
    return lanes_join(_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high));
}

static inline lanes lanes_div(lanes a, lanes b)
{
    return lanes_join(_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high));
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return lanes_join(_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high));
}

/* One half at a time: gcc 12 keeps the halves in registers, but not whole `lanes`. */
static inline void lanes_accumulate(lanes *acc, lanes scale, lanes x, lanes bias)
{
    acc->low = _mm256_fmadd_ps(scale.low, x.low, _mm256_add_ps(acc->low, bias.low));
    acc->high = _mm256_fmadd_ps(scale.high, x.high, _mm256_add_ps(acc->high, bias.high));
}

/* The instructions return b unless the comparison holds: also for NaN and zeros of either sign. */
static inline lanes lanes_max(lanes a, lanes b)
{
    return lanes_join(_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high));
}

static inline lanes lanes_min(lanes a, lanes b)
{
    return lanes_join(_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high));
}

static inline lanes lanes_round(lanes x)
{
    return lanes_join(_mm256_cvtepi32_ps(_mm256_cvtps_epi32(x.low)), _mm256_cvtepi32_ps(_mm256_cvtps_epi32(x.high)));
}

static inline __m256 nonzero_x8(__m256 x)
{
    return _mm256_blendv_ps(x, _mm256_set1_ps(1), _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ));
}

static inline lanes lanes_nonzero(lanes x)
{
    return lanes_join(nonzero_x8(x.low), nonzero_x8(x.high));
}

static inline lanes lanes_where_less(lanes a, lanes b, lanes x, lanes y)
{
    return lanes_join(_mm256_blendv_ps(y.low, x.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
                    _mm256_blendv_ps(y.high, x.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)));
}

static inline lanes lanes_through_half(lanes x)
{
    return lanes_join(_mm256_cvtph_ps(_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT)),
                    _mm256_cvtph_ps(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT)));
}

/* x - x is a NaN for infinity and NaN, 0 for all others. */
static inline int lanes_all_finite(lanes x)
{
    const __m256 low = _mm256_sub_ps(x.low, x.low);
    const __m256 high = _mm256_sub_ps(x.high, x.high);
    return _mm256_movemask_ps(_mm256_cmp_ps(low, high, _CMP_UNORD_Q)) == 0;
}

/* ---- Unpacking ---- */

static inline lanes unpack_8bit(const uint8_t *p)
{
    return lanes_join(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))));
}

static inline lanes unpack_8bit_short(const uint8_t *p)
{
    return lanes_join(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                    _mm256_setzero_ps());
}

static inline __m256 unpack_4bit_x8(const uint8_t *p)
{
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i codes = _mm256_broadcastd_epi32(load_4_bytes(p));
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(codes, shifts), _mm256_set1_epi32(15)));
}

static inline lanes unpack_4bit(const uint8_t *p)
{
    return lanes_join(unpack_4bit_x8(p), unpack_4bit_x8(p + 4));
}

static inline lanes unpack_4bit_short(const uint8_t *p)
{
    return lanes_join(unpack_4bit_x8(p), _mm256_setzero_ps());
}

/* A permute within four lanes reads the low two bits of each index only, so it masks and converts at once. */
static inline lanes unpack_2bit(const uint8_t *p)
{
    const __m256i low_shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i high_shifts = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
    const __m256 values = _mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3);
    const __m256i codes = _mm256_broadcastd_epi32(load_4_bytes(p));
    return lanes_join(_mm256_permutevar_ps(values, _mm256_srlv_epi32(codes, low_shifts)),
                    _mm256_permutevar_ps(values, _mm256_srlv_epi32(codes, high_shifts)));
}

static inline void read_pair_float(const uint8_t *p, lanes *scale, lanes *bias)
{
    float pair[2];
    memcpy(pair, p, sizeof pair);
    *scale = lanes_broadcast(pair[0]);
    *bias = lanes_broadcast(pair[1]);
}

static inline void read_pair_half(const uint8_t *p, lanes *scale, lanes *bias)
{
    const __m128 pair = _mm_cvtph_ps(load_4_bytes(p));
    const __m256 s = _mm256_broadcastss_ps(pair);
    const __m256 b = _mm256_broadcastss_ps(_mm_movehdup_ps(pair));
    *scale = lanes_join(s, s);
    *bias = lanes_join(b, b);
}

static inline void spread_pairs(const uint8_t *p, const pair_places *places, float *pairs, float weight,
                                int is_weighted, int width)
{
    if (places->are_halves) {
        const __m256i order = _mm256_loadu_si256((const __m256i *)places->of_vector);
        const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        /* A masked load reads no pair that is not there. */
        const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(places->count), numbers);
        const __m256i pairs_there = places->are_eight ? _mm256_loadu_si256((const __m256i *)p)
                                                      : _mm256_maskload_epi32((const int *)p, there);
        const __m256i halves = _mm256_permutevar8x32_epi32(pairs_there, order);
        const __m256 factor = _mm256_set1_ps(weight);
        const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
        _mm256_storeu_ps(pairs, is_weighted ? _mm256_mul_ps(low, factor) : low);
        _mm256_storeu_ps(pairs + 8, is_weighted ? _mm256_mul_ps(high, factor) : high);
        return;
    }
    /* Gathers read the pairs that they are told of, all of which are there. */
    for (int k = 0; k < 8; k += 4) {
        const __m128i four = _mm_loadu_si128((const __m128i *)(places->of_vector + k));
        const __m256 both = _mm256_castpd_ps(_mm256_i32gather_pd((const double *)p, four, 8));
        _mm256_storeu_ps(pairs + 2 * k, is_weighted ? _mm256_mul_ps(both, _mm256_set1_ps(weight)) : both);
        if (width <= 4)
            return;
    }
}

/* ---- Floats ---- */

static inline lanes unpack_float32(const uint8_t *p)
{
    return lanes_join(_mm256_loadu_ps((const float *)p), _mm256_loadu_ps((const float *)(p + 32)));
}

static inline lanes unpack_float16(const uint8_t *p)
{
    return lanes_join(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                      _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16))));
}

static inline __m256 unpack_bfloat16_x8(__m128i halves)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

static inline lanes unpack_bfloat16(const uint8_t *p)
{
    return lanes_join(unpack_bfloat16_x8(_mm_loadu_si128((const __m128i *)p)),
                      unpack_bfloat16_x8(_mm_loadu_si128((const __m128i *)(p + 16))));
}

/* ---- Packing ---- */

/* A byte each; negative values and NaN give 0. */
static inline __m128i lanes_to_bytes(lanes x)
{
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
}

/* A byte each, in order. Packing works within half a register and leaves four codes of each eight there. */
static inline __m256i lanes_to_bytes_x2(lanes a, lanes b)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i words_a = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
    const __m256i words_b = _mm256_packs_epi32(_mm256_cvtps_epi32(b.low), _mm256_cvtps_epi32(b.high));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words_a, words_b), order);
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
    _mm256_storeu_si256((__m256i *)p, lanes_to_bytes_x2(a, b));
    _mm256_storeu_si256((__m256i *)(p + 32), lanes_to_bytes_x2(c, d));
}

static inline void pack_four_4bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m256i weights = _mm256_set1_epi16(1 | 16 << 8);
    const __m256i ab = _mm256_maddubs_epi16(lanes_to_bytes_x2(a, b), weights);
    const __m256i cd = _mm256_maddubs_epi16(lanes_to_bytes_x2(c, d), weights);
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packus_epi16(ab, cd), 0xd8));
}

static inline void pack_four_2bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m256i weights = _mm256_set1_epi16(1 | 4 << 8);
    const __m256i pair_weights = _mm256_set1_epi32(1 | 16 << 16);
    const __m256i ab = _mm256_madd_epi16(_mm256_maddubs_epi16(lanes_to_bytes_x2(a, b), weights), pair_weights);
    const __m256i cd = _mm256_madd_epi16(_mm256_maddubs_epi16(lanes_to_bytes_x2(c, d), weights), pair_weights);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(ab, cd), 0xd8);
    _mm_storeu_si128((__m128i *)p,
                     _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

/* ---- Rows that take part ---- */

/* For each set of the four, as bits: a permutation that moves them to the front. */
static const uint8_t FRONT[16][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}, {2, 3, 0, 1, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7},
    {4, 5, 0, 1, 2, 3, 6, 7}, {0, 1, 4, 5, 2, 3, 6, 7}, {2, 3, 4, 5, 0, 1, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7},
    {6, 7, 0, 1, 2, 3, 4, 5}, {0, 1, 6, 7, 2, 3, 4, 5}, {2, 3, 6, 7, 0, 1, 4, 5}, {0, 1, 2, 3, 6, 7, 4, 5},
    {4, 5, 6, 7, 0, 1, 2, 3}, {0, 1, 4, 5, 6, 7, 2, 3}, {2, 3, 4, 5, 6, 7, 0, 1}, {0, 1, 2, 3, 4, 5, 6, 7},
};

static inline int take_part(const int64_t *found, int count, int64_t num_rows, int64_t *numbers, uint64_t *taken)
{
    const __m256i least = _mm256_set1_epi64x(-1), limit = _mm256_set1_epi64x(num_rows - 1);
    __m256i wrong = _mm256_setzero_si256();
    uint64_t bits = 0;
    int place = 0;
    for (int k = 0; k < count; k += 4) {
        const __m256i four = _mm256_loadu_si256((const __m256i *)(found + k));
        const int takes_part = ~_mm256_movemask_pd(_mm256_castsi256_pd(four)) & 15;
        const __m256i front = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)FRONT[takes_part]));
        const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi64(least, four), _mm256_cmpgt_epi64(four, limit));
        wrong = _mm256_or_si256(wrong, outside);
        _mm256_storeu_si256((__m256i *)(numbers + place), _mm256_permutevar8x32_epi32(four, front));
        bits |= (uint64_t)takes_part << k;
        place += count_ones((uint64_t)takes_part);
    }
    *taken = bits;
    return _mm256_testz_si256(wrong, wrong);
}

/* ---- Min and max of rows ---- */

static inline void fold_min(float *p, lanes x)
{
    const __m256 eight = _mm256_min_ps(x.low, x.high);
    _mm_storeu_ps(p, _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline void fold_max(float *p, lanes x)
{
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    _mm_storeu_ps(p, _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline lanes lanes_from_quarters(__m128 a, __m128 b, __m128 c, __m128 d)
{
    return lanes_join(_mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1),
                    _mm256_insertf128_ps(_mm256_castps128_ps256(c), d, 1));
}

static inline lanes min_of_4(const float *p)
{
    return lanes_from_quarters(min_of_4_x4(p), min_of_4_x4(p + 16), min_of_4_x4(p + 32), min_of_4_x4(p + 48));
}

static inline lanes max_of_4(const float *p)
{
    return lanes_from_quarters(max_of_4_x4(p), max_of_4_x4(p + 16), max_of_4_x4(p + 32), max_of_4_x4(p + 48));
}

#include "lanes_no_quads.h"

#endif
