/* SPDX-License-Identifier: MIT */
/* How bytes of a payload come to their slot: kernels, one per encoding and instruction set, and what they share.
 *
 * A kernel takes `count` whole pieces of payload (plain: bytes; LL: lines; LL128: halves of a group) to `slot`, and does with them
 * `how` says: store them, store them past the caches, or only compare them with what is there. It returns which of
 * FC_OTHER_FLAG (a line's flag is not `flag`) and FC_OTHER_BYTES (compared bytes differ) are so, 0 if neither; what it stored is rubbish
 * if a flag is another one. Nothing outside the pieces is read or written, and no alignment is assumed.
 *
 * Bytes that were stored past the caches are ordered before what follows only by FC_STREAMED().
 */
#ifndef FLOWCHECK_KERNELS_H
#define FLOWCHECK_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FC_STORE, FC_STREAM, FC_COMPARE };
enum { FC_OTHER_FLAG = 1, FC_OTHER_BYTES = 2 };

typedef int (*fc_kernel)(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how);

/* The kernels of an instruction set. */
typedef struct {
    fc_kernel plain, ll, ll128;
} fc_kernels;

#if defined(__x86_64__)
#include <immintrin.h>

#include "flowcheck/_vectors.h"
#define FC_STREAMED() _mm_sfence()
#define FC_AVX2 FC_TARGET("avx2")
#else
#define FC_STREAMED() ((void)0)
#endif

/* Each kernel's body is compiled three times, with `how` a constant; streaming wants an aligned slot. */
#define FC_INLINE static inline __attribute__((always_inline))
#define FC_EACH_WAY(name, alignment, ...)                                                                         \
    __VA_ARGS__ static int name(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how) {    \
        if (how == FC_COMPARE) return name##_as(slot, payload, count, flag, FC_COMPARE);                          \
        if (how == FC_STREAM && (uintptr_t)slot % alignment == 0)                                                 \
            return name##_as(slot, payload, count, flag, FC_STREAM);                                              \
        return name##_as(slot, payload, count, flag, FC_STORE);                                                   \
    }

/* One word of data, which lies in `word`, to the slot; returns what differs. */
FC_INLINE uint64_t fc_put8(uint8_t *slot, uint64_t word, int how) {
    uint64_t there = word;
    if (how == FC_COMPARE) memcpy(&there, slot, 8);
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) /* which would not see it */
    else if (how == FC_STREAM) _mm_stream_si64((long long *)slot, (long long)word);
#endif
    else memcpy(slot, &word, 8);
    return there ^ word;
}

#if defined(__x86_64__)
FC_INLINE FC_AVX2 __m256i fc_put32(uint8_t *slot, __m256i data, int how) {
    if (how == FC_COMPARE) return _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i *)slot));
#if !defined(__SANITIZE_THREAD__)
    if (how == FC_STREAM) _mm256_stream_si256((__m256i *)slot, data);
    else
#endif
        _mm256_storeu_si256((__m256i *)slot, data);
    return _mm256_setzero_si256();
}
#endif

#endif
