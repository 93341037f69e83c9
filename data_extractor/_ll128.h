/* SPDX-License-Identifier: MIT */
/* LL128 lines: 128 bytes each, fifteen 8-byte words of data and one of flag. Sixteen lines, a warp's, hold 240 units of
 * 8 data bytes, but not in order: each half of them (120 units, lines 0-7 and 8-15) is stored by the first four lines'
 * threads and then the others', and the word beside a flag word moves over (prims_ll128.h, the shuffle of the flag
 * threads). Of a half, line l < 4 holds units 16l .. 16l+14; line 4+l holds 64+14l .. 64+14l+13, and then 16l+15.
 */
#ifndef FLOWCHECK_LL128_H
#define FLOWCHECK_LL128_H

#include "_kernels.h"

enum { FC_LL128_LINE = 128, FC_LL128_HALF_LINES = 8, FC_LL128_HALF = 1024, FC_LL128_HALF_UNITS = 120 };

/* Units, counted in the message, that follow each other in a line. */
typedef struct {
    uint32_t unit;
    uint32_t units;
} fc_ll128_run;

/* The one or two runs of line `line` of a message, in the order of its words; returns how many. */
static inline uint32_t fc_ll128_runs(uint32_t line, fc_ll128_run *runs) {
    uint32_t in_half = line % FC_LL128_HALF_LINES, half = line / FC_LL128_HALF_LINES;
    uint32_t base = half * FC_LL128_HALF_UNITS;
    if (in_half < 4) {
        runs[0].unit = base + 16 * in_half;
        runs[0].units = 15;
        return 1;
    }
    runs[0].unit = base + 64 + 14 * (in_half - 4);
    runs[0].units = 14;
    runs[1].unit = base + 16 * (in_half - 4) + 15;
    runs[1].units = 1;
    return 2;
}

/* Take `lines` lines, the first of them line `line` of its message, to `slot`, where unit `first` of the message begins; nothing
 * from byte `bytes` on is stored or compared. */
static inline int fc_ll128_lines(uint8_t *slot, const uint8_t *payload, uint32_t line, uint32_t lines, uint64_t flag,
                                 uint64_t first, uint64_t bytes, int how) {
    uint64_t wrong = 0;
    int differs = 0;
    for (uint32_t i = 0; i < lines; i++) {
        const uint8_t *source = payload + (uint64_t)FC_LL128_LINE * i;
        fc_ll128_run runs[2];
        uint64_t found;
        memcpy(&found, source + FC_LL128_LINE - 8, 8);
        wrong |= found ^ flag;
        uint32_t count = fc_ll128_runs(line + i, runs);
        for (uint32_t r = 0; r < count; r++) {
            uint64_t begin = 8 * ((uint64_t)runs[r].unit - first), length = 8 * (uint64_t)runs[r].units;
            uint64_t some = begin >= bytes ? 0 : length < bytes - begin ? length : bytes - begin;
            if (how != FC_COMPARE)
                memcpy(slot + begin, source, some);
            else
                differs |= some && memcmp(slot + begin, source, some);
            source += length;
        }
    }
    return (wrong ? FC_OTHER_FLAG : 0) | (differs ? FC_OTHER_BYTES : 0);
}

static int fc_ll128_scalar(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how) {
    return fc_ll128_lines(slot, payload, 0, (uint32_t)(FC_LL128_HALF_LINES * count), flag, 0, 8 * FC_LL128_HALF_UNITS * count, how);
}

#if defined(__x86_64__)
FC_INLINE FC_AVX2 int fc_ll128_avx2_as(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how) {
    const __m256i expected = _mm256_set1_epi64x((long long)flag);
    __m256i wrong = _mm256_setzero_si256(), differs = _mm256_setzero_si256();
#define WORDS(line, word) _mm256_loadu_si256((const __m256i *)(payload + FC_LL128_LINE * (line) + 8 * (word)))
#define PUT(unit, data) differs = _mm256_or_si256(differs, fc_put32(slot + 8 * (unit), data, how))
    for (; count; count--) {
        for (int line = 0; line < 4; line++) {
            PUT(16 * line, WORDS(line, 0));
            PUT(16 * line + 4, WORDS(line, 4));
            PUT(16 * line + 8, WORDS(line, 8));
            /* Words 12, 13, 14, and in the flag's place the word beside the other line's flag. */
            __m256i last = WORDS(line, 12), other = WORDS(4 + line, 12);
            PUT(16 * line + 12, _mm256_blend_epi32(last, _mm256_permute4x64_epi64(other, 0x80), 0xc0));
            wrong = _mm256_or_si256(wrong, _mm256_xor_si256(_mm256_unpackhi_epi64(last, other), expected));
        }
        /* Fourteen words of each of these: two lines are seven vectors, of which the fourth has words of both. */
        for (int line = 4; line < 8; line += 2) {
            const int unit = 64 + 14 * (line - 4);
            PUT(unit, WORDS(line, 0));
            PUT(unit + 4, WORDS(line, 4));
            PUT(unit + 8, WORDS(line, 8));
            PUT(unit + 12, _mm256_permute2x128_si256(WORDS(line, 12), WORDS(line + 1, 0), 0x20));
            PUT(unit + 16, WORDS(line + 1, 2));
            PUT(unit + 20, WORDS(line + 1, 6));
            PUT(unit + 24, WORDS(line + 1, 10));
        }
        slot += 8 * FC_LL128_HALF_UNITS, payload += FC_LL128_HALF;
    }
#undef WORDS
#undef PUT
    return (_mm256_testz_si256(wrong, _mm256_set_epi64x(-1, -1, 0, 0)) ? 0 : FC_OTHER_FLAG) |
           (_mm256_testz_si256(differs, differs) ? 0 : FC_OTHER_BYTES);
}
FC_EACH_WAY(fc_ll128_avx2, 32, FC_AVX2)
#endif

/* As fc_ll128_lines, but halves of which everything counts are the kernel's. */
static inline int fc_ll128_take(fc_kernel kernel, uint8_t *slot, const uint8_t *payload, uint32_t line, uint32_t lines, uint64_t flag,
                                uint64_t first, uint64_t bytes, int how) {
    uint32_t before = (FC_LL128_HALF_LINES - line % FC_LL128_HALF_LINES) % FC_LL128_HALF_LINES, halves = 0;
    uint64_t begin;
    before = before < lines ? before : lines;
    begin = 8 * (15 * (uint64_t)(line + before) - first);
    if (begin < bytes) {
        uint64_t most = (bytes - begin) / (8 * FC_LL128_HALF_UNITS);
        halves = (lines - before) / FC_LL128_HALF_LINES;
        halves = most < halves ? (uint32_t)most : halves;
    }
    int other = fc_ll128_lines(slot, payload, line, before, flag, first, bytes, how);
    if (halves) other |= kernel(slot + begin, payload + FC_LL128_LINE * before, halves, flag, how);
    before += FC_LL128_HALF_LINES * halves;
    return other | fc_ll128_lines(slot, payload + FC_LL128_LINE * before, line + before, lines - before, flag, first, bytes, how);
}

#endif
