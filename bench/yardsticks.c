/* SPDX-License-Identifier: MIT */
/* The yardsticks: loops that move or read the bytes of a stage, and do nothing of its work.
 *
 * All walk a list of pieces, a frame or a payload each: where it begins in `source`, where it goes in `target`, its bytes. Compiled by
 * bench/yardsticks.py for the machine that they run on.
 */
#include <stdint.h>
#include <string.h>

struct piece {
    uint64_t source;
    uint64_t target;
    uint64_t length;
};

/* Words that may begin anywhere, one and four of them. */
typedef uint64_t __attribute__((aligned(1), may_alias)) word;
typedef uint64_t __attribute__((vector_size(32), aligned(1), may_alias)) words;

enum { CACHE_LINE = 64, LL_LINE = 16, LL128_LINE = 128, LL128_DATA = 120 };

/* Copy frames, and write a record header of one cache line before each. */
uint64_t copy_frames(const struct piece *pieces, uint64_t count, const uint8_t *source, uint8_t *target) {
    for (uint64_t i = 0; i < count; i++) {
        uint64_t header[CACHE_LINE / 8] = {pieces[i].length, 0, i};
        uint8_t *frame = target + pieces[i].target;
        memcpy(frame - CACHE_LINE, header, CACHE_LINE);
        memcpy(frame, source + pieces[i].source, pieces[i].length);
    }
    return count;
}

/* Copy payloads. */
uint64_t copy(const struct piece *pieces, uint64_t count, const uint8_t *source, uint8_t *target) {
    for (uint64_t i = 0; i < count; i++)
        memcpy(target + pieces[i].target, source + pieces[i].source, pieces[i].length);
    return count;
}

/* Read 16 bytes, write the first 8 of them: what stripping LL lines moves. */
uint64_t copy_half(const struct piece *pieces, uint64_t count, const uint8_t *source, uint8_t *target) {
    for (uint64_t i = 0; i < count; i++) {
        const word *from = (const word *)(source + pieces[i].source);
        word *to = (word *)(target + pieces[i].target);
        uint64_t line = 0, lines = pieces[i].length / LL_LINE;
        for (; line + 4 <= lines; line += 4) {
            words one = *(const words *)(from + 2 * line), other = *(const words *)(from + 2 * line + 4);
            *(words *)(to + line) = __builtin_shufflevector(one, other, 0, 2, 4, 6);
        }
        for (; line < lines; line++)
            to[line] = from[2 * line];
    }
    return count;
}

/* Read 128 bytes, write the first 120 of them: what stripping LL128 lines moves. */
uint64_t copy_lines(const struct piece *pieces, uint64_t count, const uint8_t *source, uint8_t *target) {
    for (uint64_t i = 0; i < count; i++)
        for (uint64_t line = 0; line < pieces[i].length / LL128_LINE; line++)
            memcpy(target + pieces[i].target + LL128_DATA * line, source + pieces[i].source + LL128_LINE * line, LL128_DATA);
    return count;
}

/* Read the first word of each of a frame's first two cache lines. */
uint64_t touch(const struct piece *pieces, uint64_t count, const uint8_t *source, uint8_t *target) {
    uint64_t sum = 0;
    (void)target;
    for (uint64_t i = 0; i < count; i++) {
        const word *frame = (const word *)(source + pieces[i].source);
        sum += frame[0] + frame[CACHE_LINE / 8];
    }
    return sum;
}

/* Add all words up. */
uint64_t read_all(const struct piece *pieces, uint64_t count, const uint8_t *source, uint8_t *target) {
    uint64_t sum = 0;
    (void)target;
    for (uint64_t i = 0; i < count; i++) {
        const word *from = (const word *)(source + pieces[i].source);
        for (uint64_t at = 0; at < pieces[i].length / 8; at++)
            sum += from[at];
    }
    return sum;
}

/* Read both ends of every piece and compare them; returns how many differ. */
uint64_t compare(const struct piece *pieces, uint64_t count, const uint8_t *source, uint8_t *target) {
    uint64_t different = 0;
    for (uint64_t i = 0; i < count; i++)
        different += memcmp(target + pieces[i].target, source + pieces[i].source, pieces[i].length) != 0;
    return different;
}
