/* Sixteen floats at a time: the only file that names an instruction set.
 *
 * Each branch below defines the type `lanes` and the same few functions over it. The loops in
 * _kernels.pyx are written once over these and compiled once per level; a new processor is one more
 * branch here and one line in CMakeLists.txt.
 *
 * Three rules hold for every branch, because results must be the same bits everywhere:
 *   - lanes_fma rounds once. Where there is no such instruction it is worked out in double, exactly.
 *   - Everything in memory is little-endian and may lie at any address: loads never assume alignment,
 *     and scales and biases are put together byte by byte where the host's order differs.
 *   - No load reaches outside the bytes that its comment names. Rows may end where the mapping ends.
 *
 * A group is the codes of sixteen elements: 16, 8 or 4 bytes of a row at 8, 4 or 2 bits.
 */
#ifndef QEMBAG_LANES_H
#define QEMBAG_LANES_H

#if defined(_MSC_VER) && !defined(__clang__)
#pragma fp_contract(off)
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LANES_AVX512 1
#define LANES_LEVEL "avx512"
#include <immintrin.h>
#elif defined(__AVX2__)
#define LANES_AVX2 1
#define LANES_LEVEL "avx2"
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#define LANES_NEON 1
#define LANES_LEVEL "neon"
#include <arm_neon.h>
#elif (defined(__SSE2__) || defined(_M_X64)) && !defined(QEMBAG_PLAIN_C)
#define LANES_SSE2 1
#define LANES_LEVEL "baseline"
#include <emmintrin.h>
#else
#define LANES_LEVEL "baseline"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define NOT_INLINE __attribute__((noinline))
#define rarely(condition) __builtin_expect(!!(condition), 0)
#else
#define NOT_INLINE __declspec(noinline)
#define rarely(condition) (condition)
#endif

/* ---- Little-endian numbers at any address ------------------------------------------------------
 * Named so because read_u16 and its like are CPython's: outside the limited API, Cython includes its internal headers. */

static inline uint16_t read_le16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint32_t read_le32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Of single bytes gcc makes no whole store where it has vectorized them: an eighth of the time of quantizing rows of
 * 64, a third of that of rows of 16. */
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

/* ---- Half floats by their bits: several compilers have no type for them ------------------------ */

/* Every half is a float. Shifted into a float's place the exponent is 112 too small; multiplying by
 * 2^112 mends that and normalises half denormals, exactly. Infinity and NaN need the rest of their
 * exponent set. */
static inline float float_of_half(uint16_t half)
{
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t scaled = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    return float_of_bits(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
}

/* Round to nearest, ties to even; overflow is infinity; a NaN stays one. Half denormals are rounded by
 * the addition of 0.5: its last bit is worth 2^-24, a half's smallest step. */
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

/* ---- A fused multiply-add without the instruction ---------------------------------------------- */

#if defined(FP_FAST_FMAF) || defined(__FP_FAST_FMAF)
static inline float exact_fma(float a, float b, float c)
{
    return fmaf(a, b, c);
}
#else
/* The C library's fmaf is 90 times slower than the instruction. Here: the product of two floats is
 * exact in double. Their sum with c is not, so it is rounded to odd (the neighbour with an odd last bit,
 * whenever it is inexact): a double has more than two bits to spare over a float, and then the second
 * rounding, to float, gives the bits of one rounding (Boldo and Melquiond, 2008). `error` is the
 * sum's exact rounding error (Knuth's two-sum); it is a NaN, and nothing is done, where the sum is not
 * finite. */
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
    /* An even last bit becomes odd by a step towards the error: up in magnitude where the signs agree. */
    const int64_t step = (error > 0) == (sum > 0) ? 1 : -1;
    const int64_t inexact = (error > 0) | (error < 0);
    bits += step * (inexact & ~bits & 1);
    memcpy(&odd, &bits, sizeof odd);
    return (float)odd;
}
#endif

/* ---- Prefetch: a hint, allowed at any address ---------------------------------------------------- */

/* Into the second-level cache, not the first: measured on a Zen 4, 4,000,000 rows of 72 bytes, 22 ns a row
 * with the first-level hint and 8 with this one. The first level has few places for lines under way, and a
 * prefetch that finds none waits. Into the first what is near, and so soon there. `is_near` is to be a constant. */
static inline void prefetch(const uint8_t *p, int is_near)
{
#if defined(__GNUC__) || defined(__clang__)
    if (is_near)
        __builtin_prefetch(p, 0, 3);
    else
        __builtin_prefetch(p, 0, 2);
    /* gcc takes a function that only prefetches for one without effect and deletes the calls to it. */
    __asm__ volatile("");
#elif defined(_M_X64)
    if (is_near)
        _mm_prefetch((const char *)p, _MM_HINT_T0);
    else
        _mm_prefetch((const char *)p, _MM_HINT_T1);
#else
    (void)p;
    (void)is_near;
#endif
}

#if LANES_AVX512 || LANES_AVX2 || LANES_SSE2
/* _mm_loadu_si32 came late to gcc, and wrong to some versions of it. */
static inline __m128i load_4_bytes(const uint8_t *p)
{
    int32_t word;
    memcpy(&word, p, sizeof word);
    return _mm_cvtsi32_si128(word);
}

static inline void store_4_bytes(uint8_t *p, __m128i bytes)
{
    const int32_t word = _mm_cvtsi128_si32(bytes);
    memcpy(p, &word, sizeof word);
}

/* Sixteen codes, a byte each, into the 8 low bytes: a pair of codes is a word, whose high code is shifted to
 * stand beside the low one. */
static inline __m128i packed_4bit(__m128i codes)
{
    const __m128i pairs = _mm_and_si128(_mm_or_si128(codes, _mm_srli_epi16(codes, 4)), _mm_set1_epi16(255));
    return _mm_packus_epi16(pairs, pairs);
}

/* Into the 4 low bytes: pairs of codes, then pairs of pairs. */
static inline __m128i packed_2bit(__m128i codes)
{
    const __m128i pairs = _mm_and_si128(_mm_or_si128(codes, _mm_srli_epi16(codes, 6)), _mm_set1_epi16(15));
    const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(1 | 16 << 16));
    const __m128i words = _mm_packs_epi32(fours, fours);
    return _mm_packus_epi16(words, words);
}

/* The least of each four: see `leasts_of_fours`. */
static inline __m128 leasts_of_4(const float *p)
{
    const __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + 4), c = _mm_loadu_ps(p + 8), d = _mm_loadu_ps(p + 12);
    const __m128 ab = _mm_min_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    const __m128 cd = _mm_min_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    return _mm_min_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd));
}

static inline __m128 greatests_of_4(const float *p)
{
    const __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + 4), c = _mm_loadu_ps(p + 8), d = _mm_loadu_ps(p + 12);
    const __m128 ab = _mm_max_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    const __m128 cd = _mm_max_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    return _mm_max_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd));
}
#endif

/* ================================================================================================ */
#if LANES_AVX512

typedef __m512 lanes;

/* Accumulators that one pass over a bag keeps in registers: 16 of the 32. With 8, rows of 256 and more were 5 to 10 %
 * slower in cache, and rows of 512 from memory took 1.5 times as long. */
#define LANES_MAX_BLOCK 16
/* Groups of rows that are added to two bags in turn: their accumulators take half of the registers. */
#define LANES_PAIRED 4
#define LANES_QUADS 1

static inline lanes lanes_broadcast(float x)
{
    return _mm512_set1_ps(x);
}

static inline lanes lanes_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline void lanes_store(float *p, lanes x)
{
    _mm512_storeu_ps(p, x);
}

static inline void lanes_store_half(uint16_t *p, lanes x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline lanes lanes_add(lanes a, lanes b)
{
    return _mm512_add_ps(a, b);
}

/* The same sum from the units that multiply: 1 * b + a, rounded once. A Zen 4 adds and converts on two of its four
 * pipes and multiplies on the others; half of the sums moved over make 8-bit rows in cache 2 to 4 % faster. The asm
 * hides the 1, or the compiler would make an addition of it again. */
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

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/* a > b ? a : b, which settles NaN and signed zero: the instruction returns b where it is not greater. */
static inline lanes lanes_max(lanes a, lanes b)
{
    return _mm512_max_ps(a, b);
}

/* a < b ? a : b */
static inline lanes lanes_min(lanes a, lanes b)
{
    return _mm512_min_ps(a, b);
}

/* To the nearest whole number, ties to even; for values from 0 to 255. */
static inline lanes lanes_round(lanes x)
{
    return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(x));
}

static inline lanes lanes_div(lanes a, lanes b)
{
    return _mm512_div_ps(a, b);
}

/* x, but 1 where it is zero */
static inline lanes lanes_nonzero(lanes x)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ), x, _mm512_set1_ps(1));
}

static inline lanes lanes_through_half(lanes x)
{
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline int lanes_all_finite(lanes x)
{
    return _mm512_fpclass_ps_mask(x, 0x99) == 0; /* NaN of either kind, infinity of either sign */
}

static inline void four_leasts(float *p, lanes x)
{
    const __m256 eight = _mm256_min_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(p, _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline void four_greatests(float *p, lanes x)
{
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(p, _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline lanes lanes_of_fours(__m128 a, __m128 b, __m128 c, __m128 d)
{
    const __m512 ab = _mm512_insertf32x4(_mm512_castps128_ps512(a), b, 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(ab, c, 2), d, 3);
}

static inline lanes lanes_load_part(const float *p, ptrdiff_t count, lanes fill)
{
    return _mm512_mask_loadu_ps(fill, (__mmask16)((1u << count) - 1), p);
}

static inline __m128i sixteen_codes(lanes x)
{
    return _mm512_cvtepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512()));
}

/* A byte each, in order: packing works within a quarter of the register, where it leaves four of a's codes, then
 * four of b's, c's and d's. */
static inline __m512i sixty_four_codes(lanes a, lanes b, lanes c, lanes d)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
}

static inline void pack_four_8bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    _mm512_storeu_si512(p, sixty_four_codes(a, b, c, d));
}

static inline void pack_four_4bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m512i pairs = _mm512_maddubs_epi16(sixty_four_codes(a, b, c, d), _mm512_set1_epi16(1 | 16 << 8));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(pairs));
}

static inline void pack_four_2bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m512i pairs = _mm512_maddubs_epi16(sixty_four_codes(a, b, c, d), _mm512_set1_epi16(1 | 4 << 8));
    const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 16 << 16));
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(fours));
}

/* 16 bytes */
static inline lanes unpack_8bit(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* 8 bytes, for rows of fewer codes than a group whose tail does not fill it up; the other lanes do not matter. */
static inline lanes unpack_8bit_short(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

/* 8 bytes. A permute reads the low four bits of each lane's number only, so it masks and converts in
 * one. Lane 2i is given element i and lane 2i + 1 element 8 + i: `lanes_in_order_4bit` puts that right,
 * once a bag. */
static inline lanes sixteen_of_4bit(__m128i bytes)
{
    const __m512i shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_broadcastq_epi64(bytes), shifts), values);
}

static inline lanes unpack_4bit(const uint8_t *p)
{
    return sixteen_of_4bit(_mm_loadl_epi64((const __m128i *)p));
}

static inline lanes unpack_4bit_short(const uint8_t *p) /* 4 bytes */
{
    return sixteen_of_4bit(load_4_bytes(p));
}

static inline lanes lanes_in_order_4bit(lanes x)
{
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm512_permutexvar_ps(order, x);
}

/* 4 bytes. As above; a lane's low four bits are two codes, of which the table keeps the lower. */
static inline lanes unpack_2bit(const uint8_t *p)
{
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    const __m512i codes = _mm512_broadcastd_epi32(load_4_bytes(p));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts), values);
}

/* A quad is four groups unpacked at once: lane i of x[k] is given element 4i + k. That takes fewer instructions a row,
 * and 16 shuffles to put in order, once a bag. */

/* 64 bytes */
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

/* 66 bytes: codes and at least two bytes more. Loads that begin a byte further on take the place of shuffles, of which
 * the groups after this quad have enough: 7 % faster than the above where 64 elements follow, slower where none do. */
static inline void unpack_quad_8bit_by_loads(const uint8_t *p, lanes x[4])
{
    const __m512i mask = _mm512_set1_epi32(255);
    const __m512i codes = _mm512_loadu_si512(p);
    x[0] = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask));
    x[1] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_loadu_si512(p + 1), mask));
    x[2] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_loadu_si512(p + 2), mask));
    x[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 24));
}

/* 16 bytes. A lane's low four bits are two codes: one table keeps the lower, one the upper. */
static inline void unpack_quad_2bit(const uint8_t *p, lanes x[4])
{
    const __m512 lower = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    const __m512 upper = _mm512_setr_ps(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    const __m512i shifted = _mm512_srli_epi32(codes, 4);
    x[0] = _mm512_permutexvar_ps(codes, lower);
    x[1] = _mm512_permutexvar_ps(codes, upper);
    x[2] = _mm512_permutexvar_ps(shifted, lower);
    x[3] = _mm512_permutexvar_ps(shifted, upper);
}

/* Sixteen 4 x 4 transpositions: x[k] is given elements 16k to 16k + 15. */
static inline void lanes_in_order_quad(lanes x[4])
{
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
    /* Part i, of four elements, of these is part 4i, 4i + 1, 4i + 2, 4i + 3 of the result. */
    const __m512 p = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), q = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    const __m512 r = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)), s = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    const __m512 pq_low = _mm512_shuffle_f32x4(p, q, 0x44), pq_high = _mm512_shuffle_f32x4(p, q, 0xee);
    const __m512 rs_low = _mm512_shuffle_f32x4(r, s, 0x44), rs_high = _mm512_shuffle_f32x4(r, s, 0xee);
    x[0] = _mm512_shuffle_f32x4(pq_low, rs_low, 0x88);
    x[1] = _mm512_shuffle_f32x4(pq_low, rs_low, 0xdd);
    x[2] = _mm512_shuffle_f32x4(pq_high, rs_high, 0x88);
    x[3] = _mm512_shuffle_f32x4(pq_high, rs_high, 0xdd);
}

/* float32 scale and bias: 8 bytes */
static inline void read_tail_float(const uint8_t *p, lanes *scale, lanes *bias)
{
    float tail[2];
    memcpy(tail, p, sizeof tail);
    *scale = _mm512_set1_ps(tail[0]);
    *bias = _mm512_set1_ps(tail[1]);
}

/* float16 scale and bias: 4 bytes */
static inline void read_tail_half(const uint8_t *p, lanes *scale, lanes *bias)
{
    const __m128 tail = _mm_cvtph_ps(load_4_bytes(p));
    *scale = _mm512_broadcastss_ps(tail);
    *bias = _mm512_broadcastss_ps(_mm_movehdup_ps(tail));
}

/* ================================================================================================ */
#elif LANES_AVX2

typedef struct {
    __m256 low, high;
} lanes;

/* 12 of the 16 registers: a few land on the stack, and 2 to 5 % are gained over 8 all the same. */
#define LANES_MAX_BLOCK 6

static inline lanes lanes_of(__m256 low, __m256 high)
{
    const lanes x = {low, high};
    return x;
}

static inline lanes lanes_broadcast(float x)
{
    return lanes_of(_mm256_set1_ps(x), _mm256_set1_ps(x));
}

static inline lanes lanes_load(const float *p)
{
    return lanes_of(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}

static inline void lanes_store(float *p, lanes x)
{
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}

static inline void lanes_store_half(uint16_t *p, lanes x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}

static inline lanes lanes_add(lanes a, lanes b)
{
    return lanes_of(_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high));
}

static inline lanes lanes_sub(lanes a, lanes b)
{
    return lanes_of(_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high));
}

static inline lanes lanes_mul(lanes a, lanes b)
{
    return lanes_of(_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high));
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return lanes_of(_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high));
}

/* *acc = scale * x + (*acc + bias), half by half: gcc 12 keeps halves in registers that it would not find as wholes. */
static inline void lanes_accumulate(lanes *acc, lanes scale, lanes x, lanes bias)
{
    acc->low = _mm256_fmadd_ps(scale.low, x.low, _mm256_add_ps(acc->low, bias.low));
    acc->high = _mm256_fmadd_ps(scale.high, x.high, _mm256_add_ps(acc->high, bias.high));
}

static inline lanes lanes_max(lanes a, lanes b)
{
    return lanes_of(_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high));
}

static inline lanes lanes_min(lanes a, lanes b)
{
    return lanes_of(_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high));
}

static inline lanes lanes_round(lanes x)
{
    return lanes_of(_mm256_cvtepi32_ps(_mm256_cvtps_epi32(x.low)), _mm256_cvtepi32_ps(_mm256_cvtps_epi32(x.high)));
}

static inline lanes lanes_div(lanes a, lanes b)
{
    return lanes_of(_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high));
}

static inline __m256 eight_nonzero(__m256 x)
{
    return _mm256_blendv_ps(x, _mm256_set1_ps(1), _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ));
}

/* x, but 1 where it is zero */
static inline lanes lanes_nonzero(lanes x)
{
    return lanes_of(eight_nonzero(x.low), eight_nonzero(x.high));
}

static inline lanes lanes_through_half(lanes x)
{
    return lanes_of(_mm256_cvtph_ps(_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT)),
                    _mm256_cvtph_ps(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT)));
}

/* Infinity less itself is a NaN, as a NaN is. */
static inline int lanes_all_finite(lanes x)
{
    const __m256 low = _mm256_sub_ps(x.low, x.low);
    const __m256 high = _mm256_sub_ps(x.high, x.high);
    return _mm256_movemask_ps(_mm256_cmp_ps(low, high, _CMP_UNORD_Q)) == 0;
}

static inline void four_leasts(float *p, lanes x)
{
    const __m256 eight = _mm256_min_ps(x.low, x.high);
    _mm_storeu_ps(p, _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline void four_greatests(float *p, lanes x)
{
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    _mm_storeu_ps(p, _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

static inline lanes lanes_of_fours(__m128 a, __m128 b, __m128 c, __m128 d)
{
    return lanes_of(_mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1),
                    _mm256_insertf128_ps(_mm256_castps128_ps256(c), d, 1));
}

static inline lanes lanes_load_part(const float *p, ptrdiff_t count, lanes fill)
{
    static const int32_t there[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const __m256i low = _mm256_loadu_si256((const __m256i *)(there + 16 - count));
    const __m256i high = _mm256_loadu_si256((const __m256i *)(there + 24 - count));
    return lanes_of(_mm256_blendv_ps(fill.low, _mm256_maskload_ps(p, low), _mm256_castsi256_ps(low)),
                    _mm256_blendv_ps(fill.high, _mm256_maskload_ps(p + 8, high), _mm256_castsi256_ps(high)));
}

static inline __m128i sixteen_codes(lanes x)
{
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
}

/* A byte each, in order: packing works within half a register, where it leaves four codes of each eight. */
static inline __m256i thirty_two_codes(lanes a, lanes b)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i words_a = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
    const __m256i words_b = _mm256_packs_epi32(_mm256_cvtps_epi32(b.low), _mm256_cvtps_epi32(b.high));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words_a, words_b), order);
}

static inline void pack_four_8bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    _mm256_storeu_si256((__m256i *)p, thirty_two_codes(a, b));
    _mm256_storeu_si256((__m256i *)(p + 32), thirty_two_codes(c, d));
}

static inline void pack_four_4bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m256i weights = _mm256_set1_epi16(1 | 16 << 8);
    const __m256i ab = _mm256_maddubs_epi16(thirty_two_codes(a, b), weights);
    const __m256i cd = _mm256_maddubs_epi16(thirty_two_codes(c, d), weights);
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packus_epi16(ab, cd), 0xd8));
}

static inline void pack_four_2bit(uint8_t *p, lanes a, lanes b, lanes c, lanes d)
{
    const __m256i weights = _mm256_set1_epi16(1 | 4 << 8);
    const __m256i pair_weights = _mm256_set1_epi32(1 | 16 << 16);
    const __m256i ab = _mm256_madd_epi16(_mm256_maddubs_epi16(thirty_two_codes(a, b), weights), pair_weights);
    const __m256i cd = _mm256_madd_epi16(_mm256_maddubs_epi16(thirty_two_codes(c, d), weights), pair_weights);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(ab, cd), 0xd8);
    _mm_storeu_si128((__m128i *)p,
                     _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

/* 16 bytes */
static inline lanes unpack_8bit(const uint8_t *p)
{
    return lanes_of(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))));
}

static inline lanes unpack_8bit_short(const uint8_t *p) /* 8 bytes */
{
    return lanes_of(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                    _mm256_setzero_ps());
}

static inline __m256 eight_of_4bit(const uint8_t *p)
{
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i codes = _mm256_broadcastd_epi32(load_4_bytes(p));
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(codes, shifts), _mm256_set1_epi32(15)));
}

/* 8 bytes */
static inline lanes unpack_4bit(const uint8_t *p)
{
    return lanes_of(eight_of_4bit(p), eight_of_4bit(p + 4));
}

static inline lanes unpack_4bit_short(const uint8_t *p) /* 4 bytes */
{
    return lanes_of(eight_of_4bit(p), _mm256_setzero_ps());
}

/* 4 bytes. A permute within four lanes reads the low two bits of each lane's number only, so it masks
 * and converts in one. */
static inline lanes unpack_2bit(const uint8_t *p)
{
    const __m256i low_shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i high_shifts = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
    const __m256 values = _mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3);
    const __m256i codes = _mm256_broadcastd_epi32(load_4_bytes(p));
    return lanes_of(_mm256_permutevar_ps(values, _mm256_srlv_epi32(codes, low_shifts)),
                    _mm256_permutevar_ps(values, _mm256_srlv_epi32(codes, high_shifts)));
}

/* float32 scale and bias: 8 bytes */
static inline void read_tail_float(const uint8_t *p, lanes *scale, lanes *bias)
{
    float tail[2];
    memcpy(tail, p, sizeof tail);
    *scale = lanes_broadcast(tail[0]);
    *bias = lanes_broadcast(tail[1]);
}

/* float16 scale and bias: 4 bytes */
static inline void read_tail_half(const uint8_t *p, lanes *scale, lanes *bias)
{
    const __m128 tail = _mm_cvtph_ps(load_4_bytes(p));
    const __m256 s = _mm256_broadcastss_ps(tail);
    const __m256 b = _mm256_broadcastss_ps(_mm_movehdup_ps(tail));
    *scale = lanes_of(s, s);
    *bias = lanes_of(b, b);
}

/* ================================================================================================ */
#elif LANES_NEON

typedef struct {
    float32x4_t part[4];
} lanes;

/* 16 of the 32 registers. */
#define LANES_MAX_BLOCK 4

static inline lanes lanes_broadcast(float x)
{
    const float32x4_t part = vdupq_n_f32(x);
    const lanes result = {{part, part, part, part}};
    return result;
}

static inline lanes lanes_load(const float *p)
{
    const lanes result = {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
    return result;
}

static inline void lanes_store(float *p, lanes x)
{
    for (int i = 0; i < 4; i++)
        vst1q_f32(p + 4 * i, x.part[i]);
}

static inline void lanes_store_half(uint16_t *p, lanes x)
{
    for (int i = 0; i < 4; i++)
        vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.part[i])));
}

static inline lanes lanes_add(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = vaddq_f32(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_sub(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = vsubq_f32(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_mul(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = vmulq_f32(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    for (int i = 0; i < 4; i++)
        c.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
    return c;
}

/* Not vmaxq: a NaN and the sign of zero must come out as on x86. */
static inline lanes lanes_max(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        b.part[i] = vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]);
    return b;
}

static inline lanes lanes_min(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        b.part[i] = vbslq_f32(vcltq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]);
    return b;
}

static inline lanes lanes_round(lanes x)
{
    for (int i = 0; i < 4; i++)
        x.part[i] = vrndnq_f32(x.part[i]);
    return x;
}

static inline lanes lanes_div(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = vdivq_f32(a.part[i], b.part[i]);
    return a;
}

/* Conversions to unsigned numbers make zero of what is below it. */
static inline void lanes_round_to_bytes(uint8_t *p, lanes x)
{
    const uint16x8_t low = vcombine_u16(vmovn_u32(vcvtnq_u32_f32(x.part[0])), vmovn_u32(vcvtnq_u32_f32(x.part[1])));
    const uint16x8_t high = vcombine_u16(vmovn_u32(vcvtnq_u32_f32(x.part[2])), vmovn_u32(vcvtnq_u32_f32(x.part[3])));
    vst1q_u8(p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}

static inline lanes lanes_of_bytes(uint8x16_t codes)
{
    const uint16x8_t low = vmovl_u8(vget_low_u8(codes));
    const uint16x8_t high = vmovl_u8(vget_high_u8(codes));
    const lanes result = {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
                           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
    return result;
}

/* 16 bytes */
static inline lanes unpack_8bit(const uint8_t *p)
{
    return lanes_of_bytes(vld1q_u8(p));
}

/* 8 bytes */
static inline lanes unpack_4bit(const uint8_t *p)
{
    const uint8x8_t bytes = vld1_u8(p);
    const uint8x8x2_t codes = vzip_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
    return lanes_of_bytes(vcombine_u8(codes.val[0], codes.val[1]));
}

/* 4 bytes, each repeated for its four codes */
static inline lanes unpack_2bit(const uint8_t *p)
{
    static const uint8_t repeat[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    static const int8_t shifts[16] = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
    const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(read_le32(p)));
    const uint8x16_t codes = vshlq_u8(vqtbl1q_u8(bytes, vld1q_u8(repeat)), vld1q_s8(shifts));
    return lanes_of_bytes(vandq_u8(codes, vdupq_n_u8(3)));
}

/* ================================================================================================ */
#elif LANES_SSE2

typedef struct {
    __m128 part[4];
} lanes;

#define LANES_MAX_BLOCK 4

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

static inline void lanes_store_half(uint16_t *p, lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 16; i++) {
        const uint16_t half = half_of_float(values[i]);
        memcpy(p + i, &half, sizeof half);
    }
}

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

/* `exact_fma`, two at a time: the argument for it stands there. */
static inline __m128 two_exact_fma(__m128 a, __m128 b, __m128 c)
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
        c.part[i] = _mm_movelh_ps(two_exact_fma(a.part[i], b.part[i], c.part[i]),
                                  two_exact_fma(_mm_movehl_ps(a.part[i], a.part[i]), _mm_movehl_ps(b.part[i], b.part[i]),
                                                _mm_movehl_ps(c.part[i], c.part[i])));
    return c;
}

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

static inline lanes lanes_div(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_div_ps(a.part[i], b.part[i]);
    return a;
}

static inline void four_leasts(float *p, lanes x)
{
    _mm_storeu_ps(p, _mm_min_ps(_mm_min_ps(x.part[0], x.part[2]), _mm_min_ps(x.part[1], x.part[3])));
}

static inline void four_greatests(float *p, lanes x)
{
    _mm_storeu_ps(p, _mm_max_ps(_mm_max_ps(x.part[0], x.part[2]), _mm_max_ps(x.part[1], x.part[3])));
}

static inline lanes lanes_of_fours(__m128 a, __m128 b, __m128 c, __m128 d)
{
    const lanes result = {{a, b, c, d}};
    return result;
}

static inline __m128i sixteen_codes(lanes x)
{
    const __m128i low = _mm_packs_epi32(_mm_cvtps_epi32(x.part[0]), _mm_cvtps_epi32(x.part[1]));
    const __m128i high = _mm_packs_epi32(_mm_cvtps_epi32(x.part[2]), _mm_cvtps_epi32(x.part[3]));
    return _mm_packus_epi16(low, high);
}

static inline lanes lanes_of_bytes(__m128i codes)
{
    const __m128i zero = _mm_setzero_si128();
    const __m128i low = _mm_unpacklo_epi8(codes, zero);
    const __m128i high = _mm_unpackhi_epi8(codes, zero);
    const lanes result = {{_mm_cvtepi32_ps(_mm_unpacklo_epi16(low, zero)), _mm_cvtepi32_ps(_mm_unpackhi_epi16(low, zero)),
                           _mm_cvtepi32_ps(_mm_unpacklo_epi16(high, zero)), _mm_cvtepi32_ps(_mm_unpackhi_epi16(high, zero))}};
    return result;
}

/* 16 bytes */
static inline lanes unpack_8bit(const uint8_t *p)
{
    return lanes_of_bytes(_mm_loadu_si128((const __m128i *)p));
}

static inline lanes unpack_8bit_short(const uint8_t *p) /* 8 bytes */
{
    return lanes_of_bytes(_mm_loadl_epi64((const __m128i *)p));
}

static inline lanes sixteen_of_4bit(__m128i bytes)
{
    const __m128i mask = _mm_set1_epi8(15);
    return lanes_of_bytes(_mm_unpacklo_epi8(_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16(bytes, 4), mask)));
}

/* 8 bytes */
static inline lanes unpack_4bit(const uint8_t *p)
{
    return sixteen_of_4bit(_mm_loadl_epi64((const __m128i *)p));
}

static inline lanes unpack_4bit_short(const uint8_t *p) /* 4 bytes */
{
    return sixteen_of_4bit(load_4_bytes(p));
}

/* 4 bytes: first the two halves of each byte, then the two codes of each half. */
static inline lanes unpack_2bit(const uint8_t *p)
{
    const __m128i bytes = load_4_bytes(p);
    const __m128i halves = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
    const __m128i codes = _mm_unpacklo_epi8(halves, _mm_srli_epi16(halves, 2));
    return lanes_of_bytes(_mm_and_si128(codes, _mm_set1_epi8(3)));
}

/* ================================================================================================ */
#else /* plain C: any processor of any byte order */

typedef struct {
    float value[16];
} lanes;

#define LANES_MAX_BLOCK 4

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

static inline void lanes_store_half(uint16_t *p, lanes x)
{
    for (int i = 0; i < 16; i++) {
        const uint16_t half = half_of_float(x.value[i]);
        memcpy(p + i, &half, sizeof half);
    }
}

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

static inline lanes lanes_div(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.value[i] /= b.value[i];
    return a;
}

static inline void lanes_round_to_bytes(uint8_t *p, lanes x)
{
    for (int i = 0; i < 16; i++)
        p[i] = (uint8_t)rintf(x.value[i] > 0 ? x.value[i] : 0);
}

/* 16 bytes */
static inline lanes unpack_8bit(const uint8_t *p)
{
    lanes result;
    for (int i = 0; i < 16; i++)
        result.value[i] = p[i];
    return result;
}

/* 8 bytes */
static inline lanes unpack_4bit(const uint8_t *p)
{
    lanes result;
    for (int i = 0; i < 8; i++) {
        result.value[2 * i] = (float)(p[i] & 15);
        result.value[2 * i + 1] = (float)(p[i] >> 4);
    }
    return result;
}

/* 4 bytes */
static inline lanes unpack_2bit(const uint8_t *p)
{
    lanes result;
    for (int i = 0; i < 16; i++)
        result.value[i] = (float)(p[i / 4] >> 2 * (i % 4) & 3);
    return result;
}

#endif

/* ---- The same for every level -------------------------------------------------------------------- */

#if !LANES_AVX2
/* *acc = scale * x + (*acc + bias): the sum rounded, then the fma. */
static inline void lanes_accumulate(lanes *acc, lanes scale, lanes x, lanes bias)
{
    *acc = lanes_fma(scale, x, lanes_add(*acc, bias));
}
#endif

#if !LANES_AVX512
static inline lanes lanes_in_order_4bit(lanes x)
{
    return x;
}

/* No quads: nothing calls these, but the loops name them. */
#define LANES_QUADS 0
#define LANES_PAIRED 2

static inline lanes lanes_add_by_fma(lanes a, lanes b)
{
    return lanes_add(a, b);
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

static inline void lanes_in_order_quad(lanes x[4])
{
    (void)x;
}
#endif

#if !LANES_AVX512 && !LANES_AVX2
/* float32 scale and bias: 8 bytes */
static inline void read_tail_float(const uint8_t *p, lanes *scale, lanes *bias)
{
    *scale = lanes_broadcast(float_of_bits(read_le32(p)));
    *bias = lanes_broadcast(float_of_bits(read_le32(p + 4)));
}

/* float16 scale and bias: 4 bytes */
static inline void read_tail_half(const uint8_t *p, lanes *scale, lanes *bias)
{
    *scale = lanes_broadcast(float_of_half(read_le16(p)));
    *bias = lanes_broadcast(float_of_half(read_le16(p + 2)));
}
#endif

#if !LANES_AVX512 && !LANES_AVX2 && !LANES_SSE2
/* By way of a whole group. */
static inline lanes unpack_8bit_short(const uint8_t *p) /* 8 bytes */
{
    uint8_t group[16] = {0};
    memcpy(group, p, 8);
    return unpack_8bit(group);
}

static inline lanes unpack_4bit_short(const uint8_t *p) /* 4 bytes */
{
    uint8_t group[8] = {0};
    memcpy(group, p, 4);
    return unpack_4bit(group);
}
#endif

static inline lanes lanes_zero(void)
{
    return lanes_broadcast(0.0f);
}

/* Sixteen floats, or as many as `count` says if that is fewer, as floats or, where `size` is 2, halves; nothing after
 * them. Out of the way of the loops: it is called only where an output is not whole groups of float32. */
static NOT_INLINE void store_part(uint8_t *p, const float *values, ptrdiff_t count, int size)
{
    uint16_t halves[16];
    const void *source = values;
    if (size != 4) {
        lanes_store_half(halves, lanes_load(values));
        source = halves;
    }
    memcpy(p, source, (size_t)((count < 16 ? count : 16) * size));
}

/* ---- Quantizing ------------------------------------------------------------------------------------ */

#if !LANES_AVX512 && !LANES_AVX2
/* x, but 1 where it is zero */
static inline lanes lanes_nonzero(lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 16; i++)
        values[i] = values[i] == 0 ? 1 : values[i];
    return lanes_load(values);
}

/* Rounded to the nearest half */
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

/* The first `count` lanes from memory, where nothing else is read, and the others from `fill`. */
static inline lanes lanes_load_part(const float *p, ptrdiff_t count, lanes fill)
{
    float values[16];
    lanes_store(values, fill);
    memcpy(values, p, (size_t)count * sizeof *p);
    return lanes_load(values);
}
#endif

#if LANES_AVX512 || LANES_AVX2 || LANES_SSE2
/* A group's codes, rounded and not below zero, into the bytes of a group */
static inline void pack_8bit(uint8_t *p, lanes x)
{
    _mm_storeu_si128((__m128i *)p, sixteen_codes(x));
}

static inline void pack_4bit(uint8_t *p, lanes x)
{
    _mm_storel_epi64((__m128i *)p, packed_4bit(sixteen_codes(x)));
}

static inline void pack_2bit(uint8_t *p, lanes x)
{
    store_4_bytes(p, packed_2bit(sixteen_codes(x)));
}
#endif

/* The least of a row, in two steps, so that the second can be done for sixteen rows at once. Which of two zeros of
 * unlike sign is the least depends on the order in which they meet, so that is the same at every level: the lanes'
 * halves first, then their quarters, and so on; of equals the second is kept. */
#if LANES_AVX512 || LANES_AVX2 || LANES_SSE2
static inline lanes leasts_of_fours(const float *p)
{
    return lanes_of_fours(leasts_of_4(p), leasts_of_4(p + 16), leasts_of_4(p + 32), leasts_of_4(p + 48));
}

static inline lanes greatests_of_fours(const float *p)
{
    return lanes_of_fours(greatests_of_4(p), greatests_of_4(p + 16), greatests_of_4(p + 32), greatests_of_4(p + 48));
}
#else
static inline float lesser(float a, float b)
{
    return a < b ? a : b;
}

static inline float greater(float a, float b)
{
    return a > b ? a : b;
}

/* Four floats, the least of which is the least of the lanes. */
static inline void four_leasts(float *p, lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 4; i++)
        p[i] = lesser(lesser(values[i], values[8 + i]), lesser(values[4 + i], values[12 + i]));
}

static inline void four_greatests(float *p, lanes x)
{
    float values[16];
    lanes_store(values, x);
    for (int i = 0; i < 4; i++)
        p[i] = greater(greater(values[i], values[8 + i]), greater(values[4 + i], values[12 + i]));
}

/* Of sixteen times four floats, the least of each four. */
static inline lanes leasts_of_fours(const float *p)
{
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = lesser(lesser(p[4 * i], p[4 * i + 2]), lesser(p[4 * i + 1], p[4 * i + 3]));
    return lanes_load(values);
}

static inline lanes greatests_of_fours(const float *p)
{
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = greater(greater(p[4 * i], p[4 * i + 2]), greater(p[4 * i + 1], p[4 * i + 3]));
    return lanes_load(values);
}
#endif

#if !LANES_AVX512 && !LANES_AVX2 && !LANES_SSE2
static inline uint64_t read_le64(const uint8_t *p)
{
    return read_le32(p) | (uint64_t)read_le32(p + 4) << 32;
}

/* Eight codes of 4 bits in 4 bytes: neighbours are drawn together, then pairs, then fours. */
static inline uint32_t eight_packed_4bit(uint64_t codes)
{
    codes = (codes | codes >> 4) & 0x00ff00ff00ff00ffu;
    codes = (codes | codes >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(codes | codes >> 16);
}

/* Eight codes of 2 bits in 2 bytes. */
static inline uint16_t eight_packed_2bit(uint64_t codes)
{
    codes = (codes | codes >> 6) & 0x000f000f000f000fu;
    codes = (codes | codes >> 12) & 0x000000ff000000ffu;
    return (uint16_t)(codes | codes >> 24);
}

/* To the nearest codes, ties to even, of values up to the largest code: what is below zero, or a NaN, is zero.
 * 16, 8 and 4 bytes. */
static inline void pack_8bit(uint8_t *p, lanes x)
{
    lanes_round_to_bytes(p, x);
}

static inline void pack_4bit(uint8_t *p, lanes x)
{
    uint8_t codes[16];
    lanes_round_to_bytes(codes, x);
    write_le32(p, eight_packed_4bit(read_le64(codes)));
    write_le32(p + 4, eight_packed_4bit(read_le64(codes + 8)));
}

static inline void pack_2bit(uint8_t *p, lanes x)
{
    uint8_t codes[16];
    lanes_round_to_bytes(codes, x);
    write_le16(p, eight_packed_2bit(read_le64(codes)));
    write_le16(p + 2, eight_packed_2bit(read_le64(codes + 8)));
}
#endif

#if !LANES_AVX512 && !LANES_AVX2
/* Four groups: 64, 32 and 16 bytes. */
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

/* ---- What fused types of the loops choose from ---------------------------------------------------- */

/* A pointer's type says how the codes that it points at are packed. */
typedef struct { uint8_t byte; } codes_8bit;
typedef struct { uint8_t byte; } codes_4bit;
typedef struct { uint8_t byte; } codes_2bit;

/* What the loop of a call must be ready for. */
typedef struct { uint8_t byte; } plain_int32;
typedef struct { uint8_t byte; } plain_int64;
typedef struct { uint8_t byte; } weighted_int32;
typedef struct { uint8_t byte; } weighted_int64;
typedef struct { uint8_t byte; } any_kind;

/* The accumulators of one pass. Its type fixes their number at compile time, so they stay in registers. */
typedef struct { lanes group[1]; } block_1;
typedef struct { lanes group[2]; } block_2;
typedef struct { lanes group[3]; } block_3;
typedef struct { lanes group[4]; } block_4;
typedef struct { lanes group[5]; } block_5;
typedef struct { lanes group[6]; } block_6;
typedef struct { lanes group[7]; } block_7;
typedef struct { lanes group[8]; } block_8;
typedef struct { lanes group[12]; } block_12;
typedef struct { lanes group[16]; } block_16;

/* The same, of which quads are unpacked as such. */
typedef struct { lanes group[4]; } quads_4;
typedef struct { lanes group[5]; } quads_5;
typedef struct { lanes group[6]; } quads_6;
typedef struct { lanes group[7]; } quads_7;
typedef struct { lanes group[8]; } quads_8;
typedef struct { lanes group[12]; } quads_12;
typedef struct { lanes group[16]; } quads_16;

#endif
