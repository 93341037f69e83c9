/* SPDX-License-Identifier: MIT */
/* Payloads that are nothing but data. */
#ifndef FLOWCHECK_PLAIN_H
#define FLOWCHECK_PLAIN_H

#include "_kernels.h"

static int fc_plain_scalar(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how) {
    (void)flag;
    if (how == FC_COMPARE) return memcmp(slot, payload, count) ? FC_OTHER_BYTES : 0;
    memcpy(slot, payload, count);
    return 0;
}

#if defined(__x86_64__)
FC_INLINE FC_AVX2 int fc_plain_avx2_as(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how) {
    __m256i differs = _mm256_setzero_si256();
    uint64_t differs8 = 0, word;
    size_t i = 0;
    (void)flag;
    for (; how == FC_STREAM && (uintptr_t)(slot + i) % 32 && i + 8 <= count; i += 8) {
        memcpy(&word, payload + i, 8);
        fc_put8(slot + i, word, how);
    }
    for (; i + 64 <= count; i += 64) {
        differs = _mm256_or_si256(differs, fc_put32(slot + i, _mm256_loadu_si256((const __m256i *)(payload + i)), how));
        differs = _mm256_or_si256(differs, fc_put32(slot + i + 32, _mm256_loadu_si256((const __m256i *)(payload + i + 32)), how));
    }
    for (; i + 8 <= count; i += 8) {
        memcpy(&word, payload + i, 8);
        differs8 |= fc_put8(slot + i, word, how);
    }
    int other = !_mm256_testz_si256(differs, differs) || differs8;
    if (how == FC_COMPARE)
        other |= memcmp(slot + i, payload + i, count - i) != 0;
    else
        memcpy(slot + i, payload + i, count - i);
    return other ? FC_OTHER_BYTES : 0;
}
FC_EACH_WAY(fc_plain_avx2, 8, FC_AVX2)
#endif

#endif
