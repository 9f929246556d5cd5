/* Sixteen floats at a time. The loops in _kernels.pyx are written once over the type `lanes` and the functions below,
 * and compiled once per instruction-set level. Each family of processors has a file that defines them. A new family is
 * one more file, one more branch here and one line in CMakeLists.txt.
 *
 * Three rules hold for every family, because results are the same bits everywhere:
 *   - lanes_fma rounds once. A processor without that instruction computes it in double, exactly.
 *   - Numbers in memory are little-endian and may stand at any address. Loads never assume alignment. On a host of the
 *     other byte order, scales and biases are read byte by byte.
 *   - A function reads only the bytes that are named here. A row may end where the mapping ends.
 *
 * A vector is sixteen elements of a row: 16, 8 or 4 bytes at 8, 4 or 2 bits.
 * A pair is the scale and bias of a row, or of a group of its elements.
 * A quad is four vectors unpacked together: lane i of x[k] is element 4i + k. That takes fewer instructions a row, and
 * 16 shuffles a bag to put the elements in order.
 *
 * What a family defines:
 *
 *   LANES_LEVEL                  its name
 *   LANES_MAX_BLOCK              how many accumulators one pass over a bag keeps in registers
 *   LANES_HAS_FMA                whether lanes_fma is an instruction; where not, nothing else shows in a row's time
 *   LANES_PAIRED                 rows of up to this many vectors are added to two bags in turn
 *   LANES_QUADS                  whether quads are unpacked; if not, their functions exist but nothing calls them
 *
 *   lanes_broadcast(float)
 *   lanes_load(p), lanes_store(p, x)
 *   lanes_load_part(p, count, fill)      the first `count` lanes from memory, the others from `fill`
 *   lanes_store_half, lanes_store_bfloat16(p, x)    as 16 numbers of two bytes, at any address
 *   lanes_add, lanes_sub, lanes_mul, lanes_div(a, b)
 *   lanes_add_by_fma(a, b)               lanes_add, where possible by other units of the processor
 *   lanes_fma(a, b, c)                   a * b + c
 *   lanes_accumulate(&acc, scale, x, bias)   acc = scale * x + (acc + bias): the sum is rounded, then the fma
 *   lanes_max(a, b), lanes_min(a, b)     a > b ? a : b and a < b ? a : b, also for NaN and zeros of either sign
 *   lanes_round(x)                       to integers, ties to even; for values from 0 to 255
 *   lanes_nonzero(x)                     x, but 1 where x is zero
 *   lanes_where_less(a, b, x, y)         a < b ? x : y; y where a or b is a NaN
 *   lanes_through_half(x)                rounded to half floats and back
 *   lanes_all_finite(x)
 *
 *   unpack_8bit, unpack_4bit, unpack_2bit(p)         a vector: reads 16, 8, 4 bytes
 *   unpack_8bit_short, unpack_4bit_short(p)          for rows shorter than a vector: reads 8, 4 bytes; the other
 *                                                    lanes are unspecified
 *   lanes_in_order_4bit(x)                           unpack_4bit may leave the lanes in another order: undoes it
 *   unpack_quad_8bit, unpack_quad_2bit(p, x)         a quad: reads 64, 16 bytes
 *   unpack_quad_8bit_by_loads(p, x)                  the same, but reads 66 bytes
 *   lanes_in_order_quad(x)                           x[k] becomes elements 16k to 16k + 15
 *   unpack_float32, unpack_float16, unpack_bfloat16(p)   a vector of floats in the host's byte order: reads 64, 32,
 *                                                    32 bytes
 *   read_pair_float, read_pair_half(p, &scale, &bias)    reads 8, 4 bytes
 *   spread_pairs(p, &places, pairs, weight, is_weighted, width)  scale and bias of each vector k < width, times the
 *                                                    weight, as pairs[2k], pairs[2k + 1]; `pairs` has room for 16
 *                                                    floats. Reads `places.count` pairs at p, or eight
 *   pairs_of_quad(pairs, i)                          pairs[i] for the elements of two vectors, pairs[i + 4] for those
 *                                                    of the next two, in the order of a quad's x[k]
 *
 *   pack_8bit, pack_4bit, pack_2bit(p, x)    a vector, of values up to the largest code: rounds to nearest, ties to
 *                                            even; negative values and NaN give 0
 *   pack_four_8bit, pack_four_4bit, pack_four_2bit(p, a, b, c, d)    four vectors
 *   fold_min, fold_max(p, x)             four floats, whose min or max is that of the lanes
 *   min_of_4, max_of_4(p)                of sixteen times four floats, the min or max of each four
 *
 *   take_part(found, count, num_rows, numbers, &taken)   the numbers of rows (up to 64) without the -1 among them, in
 *                                        order, and the bits of those taken; false if one is neither -1 nor a row.
 *                                        `found` holds a multiple of 8, -1 behind `count`, and `numbers` has room for
 *                                        as many
 *
 * The min of a row takes two steps, fold_min and min_of_4, so that the second serves sixteen rows at once. Where zeros
 * of both signs are the min, which one is returned depends on the order of comparison. So that order is the same in
 * every family: the halves of the lanes, then their quarters, and so on. Of two equals, the second is kept.
 */
#ifndef QEMBAG_LANES_H
#define QEMBAG_LANES_H

#if defined(_MSC_VER) && !defined(__clang__)
#pragma fp_contract(off)
#endif

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes.h"
#include "half.h"

/* lanes_unlikely: C from Cython has its own macro `unlikely`. */
#if defined(__GNUC__) || defined(__clang__)
#define NOT_INLINE __attribute__((noinline, unused))
#define lanes_unlikely(condition) __builtin_expect(!!(condition), 0)
#else
#define NOT_INLINE __declspec(noinline)
#define lanes_unlikely(condition) (condition)
#endif

/* Which pair of scale and bias each vector of a block has, counted from the first of them. */
typedef struct {
    int32_t of_vector[8];
    int count; /* of pairs, up to 8 */
    int are_halves;
    int are_eight; /* that many may be read */
} pair_places;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#elif defined(__aarch64__) || defined(_M_ARM64)
#include "lanes_neon.h"
#elif (defined(__SSE2__) || defined(_M_X64)) && !defined(QEMBAG_PLAIN_C)
#include "lanes_sse2.h"
#else
#include "lanes_plain.h"
#endif

static inline lanes lanes_zero(void)
{
    return lanes_broadcast(0.0f);
}

/* 16 numbers as floats, half floats or bfloat16 (`type` 0, 1, 2), at any address. */
static inline void store_vector(uint8_t *p, const float *values, int type)
{
    if (type == 0)
        memcpy(p, values, 16 * sizeof *values);
    else if (type == 1)
        lanes_store_half(p, lanes_load(values));
    else
        lanes_store_bfloat16(p, lanes_load(values));
}

/* The first `count` of them, all where it is more, and nothing behind them. Not inlined: only outputs that are not
 * whole vectors of floats need it, and in each loop it would be a tenth of the wheel. */
static NOT_INLINE void store_part(uint8_t *p, const float *values, ptrdiff_t count, int type)
{
    uint8_t whole[16 * sizeof(float)];
    if (count >= 16) {
        store_vector(p, values, type);
        return;
    }
    store_vector(whole, values, type);
    memcpy(p, whole, (size_t)count * (type == 0 ? sizeof(float) : sizeof(uint16_t)));
}

/* Constants that are added to such a pointer go into the addresses of instructions. Left to itself, gcc 12 may add them
 * to what does not change from row to row, and fetch as many offsets as there are groups at each row. */
static inline const uint8_t *as_computed(const uint8_t *p)
{
#if defined(__GNUC__) || defined(__clang__)
    __asm__("" : "+r"(p));
#endif
    return p;
}

/* A hint, allowed at any address. `is_near` must be a constant: near data goes to L1, because it arrives soon.
 * Everything else goes to L2: L1 has few slots for lines on their way, and a prefetch that finds none waits. On a Zen 4
 * with 4,000,000 rows of 72 bytes, a row took 22 ns with the hint for L1 and 8 with that for L2. */
static inline void prefetch(const uint8_t *p, int is_near)
{
#if defined(__GNUC__) || defined(__clang__)
    if (is_near)
        __builtin_prefetch(p, 0, 3);
    else
        __builtin_prefetch(p, 0, 2);
    /* Without this, gcc takes a function that only prefetches as one without effect, and deletes the calls. */
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

#endif
