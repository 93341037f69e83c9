/* SPDX-License-Identifier: MIT */
/* LL lines: 16 bytes each, data word, flag, data word, flag. Stripping leaves 8 bytes a line.
 *
 * Every function strips `lines` lines from src to dst and returns 1 if both flag words of every line equal `flag`;
 * else 0, and dst holds rubbish that the caller must not count. None reads past 16 * lines or writes past 8 * lines
 * bytes; no alignment is assumed. All give the same bytes and the same answer.
 */
#ifndef FLOWCHECK_LL_H
#define FLOWCHECK_LL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*fc_ll_strip)(uint8_t *dst, const uint8_t *src, size_t lines, uint32_t flag);

static int fc_ll_scalar(uint8_t *dst, const uint8_t *src, size_t lines, uint32_t flag) {
    uint32_t wrong = 0;
    for (size_t i = 0; i < lines; i++) {
        uint32_t line[4];
        memcpy(line, src + 16 * i, 16);
        wrong |= (line[1] ^ flag) | (line[3] ^ flag);
        uint32_t data[2] = {line[0], line[2]};
        memcpy(dst + 8 * i, data, 8);
    }
    return wrong == 0;
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static int fc_ll_avx2(uint8_t *dst, const uint8_t *src, size_t lines, uint32_t flag) {
    const __m256i expected = _mm256_set1_epi32((int)flag);
    __m256i wrong = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 4 <= lines; i += 4) {
        __m256 a = _mm256_loadu_ps((const float *)(src + 16 * i));
        __m256 b = _mm256_loadu_ps((const float *)(src + 16 * i + 32));
        __m256i data = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
        __m256i flags = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
        wrong = _mm256_or_si256(wrong, _mm256_xor_si256(flags, expected));
        /* The shuffle works within 128-bit halves: put lines 0 1 2 3 back in order. */
        _mm256_storeu_si256((__m256i *)(dst + 8 * i), _mm256_permute4x64_epi64(data, 0xd8));
    }
    return _mm256_testz_si256(wrong, wrong) & fc_ll_scalar(dst + 8 * i, src + 16 * i, lines - i, flag);
}

__attribute__((target("avx512f"))) static int fc_ll_avx512(uint8_t *dst, const uint8_t *src, size_t lines,
                                                           uint32_t flag) {
    const __m512i expected = _mm512_set1_epi32((int)flag);
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __mmask16 wrong = 0;
    size_t i = 0;
    for (; i + 8 <= lines; i += 8) {
        __m512i a = _mm512_loadu_si512(src + 16 * i);
        __m512i b = _mm512_loadu_si512(src + 16 * i + 64);
        wrong |= _mm512_mask_cmpneq_epi32_mask(0xaaaa, a, expected) | _mm512_mask_cmpneq_epi32_mask(0xaaaa, b, expected);
        _mm512_storeu_si512(dst + 8 * i, _mm512_permutex2var_epi32(a, even, b));
    }
    return (wrong == 0) & fc_ll_scalar(dst + 8 * i, src + 16 * i, lines - i, flag);
}
#endif

/* The kernel of a name, NULL if this processor has not got it; "auto" is the fastest that it has. */
static fc_ll_strip fc_ll_kernel(const char *name) {
#if defined(__x86_64__)
    int best = strcmp(name, "auto") == 0;
    if ((best || strcmp(name, "avx512") == 0) && __builtin_cpu_supports("avx512f")) return fc_ll_avx512;
    if ((best || strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2")) return fc_ll_avx2;
    if (best) return fc_ll_scalar;
#else
    if (strcmp(name, "auto") == 0) return fc_ll_scalar;
#endif
    return strcmp(name, "scalar") == 0 ? fc_ll_scalar : NULL;
}

#endif
