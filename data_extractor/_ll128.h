/* SPDX-License-Identifier: MIT */
/* LL128 lines: 128 bytes each, fifteen 8-byte words of data and one of flag. Sixteen lines, a warp's, hold 240 units of
 * 8 data bytes, but not in order: each half of them (120 units, lines 0-7 and 8-15) is stored by the first four lines'
 * threads and then the others', and the word beside a flag word moves over (prims_ll128.h, the shuffle of the flag
 * threads). Of a half, line l < 4 holds units 16l .. 16l+14; line 4+l holds 64+14l .. 64+14l+13, and then 16l+15.
 */
#ifndef FLOWCHECK_LL128_H
#define FLOWCHECK_LL128_H

#include <stdint.h>
#include <string.h>

enum { FC_LL128_LINE = 128, FC_LL128_GROUP_LINES = 16, FC_LL128_GROUP_UNITS = 240 };

/* Units, counted in the message, that follow each other in a line. */
typedef struct {
    uint32_t unit;
    uint32_t units;
} fc_ll128_run;

/* The one or two runs of line `line` of a message, in the order of its words; returns how many. */
static inline uint32_t fc_ll128_runs(uint32_t line, fc_ll128_run *runs) {
    uint32_t in_half = line % 8, half = line / 8;
    uint32_t base = half * (FC_LL128_GROUP_UNITS / 2);
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

/* Strip `lines` lines, the first of them line `line` of its message, to `data`, where unit `first` of the message
 * begins; nothing from byte `bytes` on is written. Returns 0, and leaves rubbish, if a flag is another one. */
static inline int fc_ll128_strip(uint8_t *data, const uint8_t *payload, uint32_t line, uint32_t lines, uint64_t flag,
                                 uint64_t first, uint64_t bytes) {
    uint64_t wrong = 0;
    for (uint32_t i = 0; i < lines; i++) {
        const uint8_t *source = payload + (uint64_t)FC_LL128_LINE * i;
        fc_ll128_run runs[2];
        uint64_t found;
        memcpy(&found, source + FC_LL128_LINE - 8, 8);
        wrong |= found ^ flag;
        uint32_t count = fc_ll128_runs(line + i, runs);
        for (uint32_t r = 0; r < count; r++) {
            uint64_t begin = 8 * ((uint64_t)runs[r].unit - first), length = 8 * (uint64_t)runs[r].units;
            if (begin < bytes) memcpy(data + begin, source, length < bytes - begin ? length : bytes - begin);
            source += length;
        }
    }
    return wrong == 0;
}

#endif
