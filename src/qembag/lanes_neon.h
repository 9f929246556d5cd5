/* `lanes` in four NEON registers: 64-bit Arm. lanes.h says what each function does. */
#ifndef QEMBAG_LANES_NEON_H
#define QEMBAG_LANES_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bytes.h"
#include "half.h"

typedef struct {
    float32x4_t part[4];
} lanes;

#define LANES_LEVEL "neon"
/* 16 of the 32 registers. */
#define LANES_MAX_BLOCK 4
#define LANES_HAS_FMA 1

/* ---- Memory ---- */

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

static inline void lanes_store_half(void *p, lanes x)
{
    for (int i = 0; i < 4; i++)
        vst1_u8((uint8_t *)p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(x.part[i])));
}

/* ---- Arithmetic ---- */

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

static inline lanes lanes_div(lanes a, lanes b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = vdivq_f32(a.part[i], b.part[i]);
    return a;
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    for (int i = 0; i < 4; i++)
        c.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
    return c;
}

/* Not vmaxq and vminq: NaN and the sign of zero must come out as on x86. */
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

/* ---- Unpacking ---- */

static inline lanes lanes_from_bytes(uint8x16_t codes)
{
    const uint16x8_t low = vmovl_u8(vget_low_u8(codes));
    const uint16x8_t high = vmovl_u8(vget_high_u8(codes));
    const lanes result = {{
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high))),
    }};
    return result;
}

static inline lanes unpack_8bit(const uint8_t *p)
{
    return lanes_from_bytes(vld1q_u8(p));
}

static inline lanes unpack_4bit(const uint8_t *p)
{
    const uint8x8_t bytes = vld1_u8(p);
    const uint8x8x2_t codes = vzip_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
    return lanes_from_bytes(vcombine_u8(codes.val[0], codes.val[1]));
}

/* Repeats each byte for its four codes. */
static inline lanes unpack_2bit(const uint8_t *p)
{
    static const uint8_t repeat[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    static const int8_t shifts[16] = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
    const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(read_le32(p)));
    const uint8x16_t codes = vshlq_u8(vqtbl1q_u8(bytes, vld1q_u8(repeat)), vld1q_s8(shifts));
    return lanes_from_bytes(vandq_u8(codes, vdupq_n_u8(3)));
}

static inline lanes unpack_float16(const uint8_t *p)
{
    lanes result;
    for (int i = 0; i < 4; i++)
        result.part[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i)));
    return result;
}

/* ---- Packing ---- */

/* Rounded, a byte each. Conversion to unsigned gives 0 for negative values and NaN. */
static inline void lanes_store_bytes(uint8_t *p, lanes x)
{
    const uint16x8_t low = vcombine_u16(vmovn_u32(vcvtnq_u32_f32(x.part[0])), vmovn_u32(vcvtnq_u32_f32(x.part[1])));
    const uint16x8_t high = vcombine_u16(vmovn_u32(vcvtnq_u32_f32(x.part[2])), vmovn_u32(vcvtnq_u32_f32(x.part[3])));
    vst1q_u8(p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}

#include "lanes_generic.h"
#include "lanes_no_quads.h"

#endif
