/* What AVX-512, AVX2 and SSE2 share: steps on 128-bit registers. */
#ifndef QEMBAG_LANES_X86_H
#define QEMBAG_LANES_X86_H

#include <emmintrin.h>
#include <stdint.h>
#include <string.h>

/* Not _mm_loadu_si32: gcc got it late, and some versions of gcc got it wrong. */
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

/* Sixteen codes, a byte each, into the low 8 bytes. In each word of two codes, the high one moves beside the low. */
static inline __m128i pack_bytes_4bit(__m128i codes)
{
    const __m128i pairs = _mm_and_si128(_mm_or_si128(codes, _mm_srli_epi16(codes, 4)), _mm_set1_epi16(255));
    return _mm_packus_epi16(pairs, pairs);
}

/* Sixteen codes, a byte each, into the low 4 bytes: two codes at a time, then two such pairs. */
static inline __m128i pack_bytes_2bit(__m128i codes)
{
    const __m128i pairs = _mm_and_si128(_mm_or_si128(codes, _mm_srli_epi16(codes, 6)), _mm_set1_epi16(15));
    const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(1 | 16 << 16));
    const __m128i words = _mm_packs_epi32(fours, fours);
    return _mm_packus_epi16(words, words);
}

/* Of four times four floats, the min of each four: a quarter of `min_of_4`. */
static inline __m128 min_of_4_x4(const float *p)
{
    const __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + 4), c = _mm_loadu_ps(p + 8), d = _mm_loadu_ps(p + 12);
    const __m128 ab = _mm_min_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    const __m128 cd = _mm_min_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    return _mm_min_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd));
}

static inline __m128 max_of_4_x4(const float *p)
{
    const __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + 4), c = _mm_loadu_ps(p + 8), d = _mm_loadu_ps(p + 12);
    const __m128 ab = _mm_max_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    const __m128 cd = _mm_max_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    return _mm_max_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd));
}

#endif
