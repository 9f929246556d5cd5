/* What this processor and its operating system can run. Each level tests for the features of its compiler flags in
 * CMakeLists.txt. Keep the two lists equal: a feature that is compiled in but not tested for is an illegal instruction
 * on some machine. */
#ifndef QEMBAG_CPU_H
#define QEMBAG_CPU_H

#include <stdint.h>

/* QEMBAG_X86_LEVELS is how many levels were built beside the baseline: 0 on other processors. */
#if QEMBAG_X86_LEVELS > 0

#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>

static inline void cpuid(uint32_t leaf, uint32_t registers[4])
{
    int out[4];
    __cpuidex(out, (int)leaf, 0);
    for (int i = 0; i < 4; i++)
        registers[i] = (uint32_t)out[i];
}

static inline uint64_t enabled_states(void)
{
    return _xgetbv(0);
}
#else
#include <cpuid.h>

static inline void cpuid(uint32_t leaf, uint32_t registers[4])
{
    __cpuid_count(leaf, 0, registers[0], registers[1], registers[2], registers[3]);
}

static inline uint64_t enabled_states(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}
#endif

enum { EAX, EBX, ECX, EDX };

static inline int has_bits(uint64_t value, uint64_t bits)
{
    return (value & bits) == bits;
}

static inline int highest_level(void)
{
    const uint32_t osxsave = 1u << 27, avx = 1u << 28, fma = 1u << 12, f16c = 1u << 29;
    const uint32_t popcnt = 1u << 23; /* compilers turn it on with AVX */
    const uint32_t avx2 = 1u << 5, avx512f = 1u << 16, avx512dq = 1u << 17, avx512bw = 1u << 30, avx512vl = 1u << 31;
    /* Register state that the system saves: xmm and ymm; for AVX-512 also the mask registers and both parts of zmm. */
    const uint64_t ymm_state = 0x6, zmm_state = 0xe6;
    uint32_t first[4], extended[4];

    cpuid(0, first);
    if (first[EAX] < 7)
        return 0;
    cpuid(1, first);
    cpuid(7, extended);
    if (!has_bits(first[ECX], osxsave | avx | fma | f16c | popcnt) || !has_bits(extended[EBX], avx2)
        || !has_bits(enabled_states(), ymm_state))
        return 0;
    if (!has_bits(extended[EBX], avx512f | avx512dq | avx512bw | avx512vl) || !has_bits(enabled_states(), zmm_state))
        return 1;
    return 2;
}

#else

static inline int highest_level(void)
{
    return 0;
}

#endif

/* The highest level that was built and can run: 0 for the baseline, 1 for AVX2 with FMA and F16C, 2 for AVX-512 F, BW,
 * DQ and VL. */
static inline int cpu_level(void)
{
    int level = highest_level();
    return level < QEMBAG_X86_LEVELS ? level : QEMBAG_X86_LEVELS;
}

#endif
