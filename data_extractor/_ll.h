/* SPDX-License-Identifier: MIT */
/* LL lines: 16 bytes each, data word, flag, data word, flag, words of 4 bytes. Stripping leaves 8 bytes a line. */
#ifndef FLOWCHECK_LL_H
#define FLOWCHECK_LL_H

#include "_kernels.h"

enum { FC_LL_LINE = 16 };

FC_INLINE int fc_ll_scalar_as(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how) {
    uint32_t wrong = 0;
    uint64_t differs = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t line[4];
        uint64_t word;
        memcpy(line, payload + FC_LL_LINE * i, sizeof(line));
        wrong |= (line[1] ^ (uint32_t)flag) | (line[3] ^ (uint32_t)flag);
        line[1] = line[2];
        memcpy(&word, line, 8);
        differs |= fc_put8(slot + 8 * i, word, how);
    }
    return (wrong ? FC_OTHER_FLAG : 0) | (differs ? FC_OTHER_BYTES : 0);
}
FC_EACH_WAY(fc_ll_scalar, 8)

#if defined(__x86_64__)
FC_INLINE FC_AVX2 int fc_ll_avx2_as(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how) {
    const __m256i expected = _mm256_set1_epi32((int)flag);
    __m256i wrong = _mm256_setzero_si256(), differs = _mm256_setzero_si256();
    size_t i = how == FC_STREAM ? (32 - (uintptr_t)slot % 32) % 32 / 8 : 0; /* lines before an aligned address */
    if (i > count) i = count;
    int other = fc_ll_scalar_as(slot, payload, i, flag, how);
    for (; i + 4 <= count; i += 4) {
        __m256 a = _mm256_loadu_ps((const float *)(payload + FC_LL_LINE * i));
        __m256 b = _mm256_loadu_ps((const float *)(payload + FC_LL_LINE * i + 32));
        __m256i data = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
        __m256i flags = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
        wrong = _mm256_or_si256(wrong, _mm256_xor_si256(flags, expected));
        /* The shuffle works within 128-bit halves: put lines 0 1 2 3 back in order. */
        differs = _mm256_or_si256(differs, fc_put32(slot + 8 * i, _mm256_permute4x64_epi64(data, 0xd8), how));
    }
    if (!_mm256_testz_si256(wrong, wrong)) other |= FC_OTHER_FLAG;
    if (!_mm256_testz_si256(differs, differs)) other |= FC_OTHER_BYTES;
    return other | fc_ll_scalar_as(slot + 8 * i, payload + FC_LL_LINE * i, count - i, flag, how);
}
FC_EACH_WAY(fc_ll_avx2, 8, FC_AVX2)
#endif

/* Take `lines` lines to `slot`, of which nothing from byte `bytes` on counts, nor is stored; all flags must be right. */
static inline int fc_ll_take(fc_kernel kernel, uint8_t *slot, const uint8_t *payload, size_t lines, uint64_t flag, uint64_t bytes,
                             int how) {
    size_t whole = bytes / 8;
    int other = kernel(slot, payload, whole, flag, how);
    for (size_t i = whole; i < lines; i++) {
        uint8_t word[8];
        size_t count = i == whole ? bytes % 8 : 0;
        other |= fc_ll_scalar(word, payload + FC_LL_LINE * i, 1, flag, FC_STORE);
        if (how != FC_COMPARE)
            memcpy(slot + 8 * i, word, count);
        else if (memcmp(slot + 8 * i, word, count))
            other |= FC_OTHER_BYTES;
    }
    return other;
}

#endif
