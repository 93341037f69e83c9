/* SPDX-License-Identifier: MIT
 *
 * The invariant CRC of RoCEv2 (InfiniBand specification, volume 1, annex A17): CRC-32 with the Ethernet polynomial,
 * reflected, over eight bytes FF, then everything from the IP header to the ICRC, with the fields that a router may
 * change taken as ones. Ethernet and VLAN headers lie outside.
 *
 * Three kernels give equal results: carry-less multiplication that folds 128 bytes at a time, or 64, and slicing tables of
 * eight. The kernel is chosen once, when the module is loaded, by what the CPU has.
 */
#ifndef FLOWCHECK_ICRC_H
#define FLOWCHECK_ICRC_H

#include <stdint.h>
#include <string.h>

#define FC_CRC_POLYNOMIAL 0xEDB88320u /* reflected */
#define FC_CRC_BEST -1
#define FC_CRC_TABLES 0
#define FC_CRC_FOLDING 1
#define FC_CRC_WIDE 2

/* Bytes that the wide kernel fetches ahead: in about the time that memory takes. */
#define FC_CRC_AHEAD 1024

static uint32_t fc_crc_table[8][256];

static uint32_t fc_crc_tables(uint32_t state, const uint8_t *data, uint64_t length) {
    for (; length >= 8; length -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= state;
        state = fc_crc_table[7][word & 255] ^ fc_crc_table[6][word >> 8 & 255] ^ fc_crc_table[5][word >> 16 & 255] ^
                fc_crc_table[4][word >> 24 & 255] ^ fc_crc_table[3][word >> 32 & 255] ^
                fc_crc_table[2][word >> 40 & 255] ^ fc_crc_table[1][word >> 48 & 255] ^ fc_crc_table[0][word >> 56];
    }
    while (length--)
        state = state >> 8 ^ fc_crc_table[0][(state ^ *data++) & 255];
    return state;
}

#if defined(__x86_64__)
#include <immintrin.h>

#include "flowcheck/_vectors.h"

/* A 128-bit remainder moved over the next 16 * n bytes: its two halves, each multiplied by a power of x modulo the
 * polynomial, and added to what lies there. */
#define FC_FOLD(value, powers, next)                                                                                   \
    _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(value, powers, 0x00), _mm_clmulepi64_si128(value, powers, 0x11)), \
                  next)

/* x^(n+32) and x^(n-32) modulo the polynomial, bits reversed, shifted up by one, for n = 128, 256, 512, 1024. */
#define FC_BY_16 _mm_set_epi64x(0x0ccaa009e, 0x1751997d0)
#define FC_BY_32 _mm_set_epi64x(0x15a546366, 0x0f1da05aa)
#define FC_BY_64 _mm_set_epi64x(0x1c6e41596, 0x154442bd4)
#define FC_BY_128 _mm_set_epi64x(0x14a7fe880, 0x1e88ef372)

__attribute__((target("pclmul,sse4.1"))) static uint32_t fc_crc_folding(uint32_t state, const uint8_t *head,
                                                                        uint64_t head_bytes, const uint8_t *data,
                                                                        uint64_t length) {
    const __m128i by64 = FC_BY_64, by16 = FC_BY_16;
    const __m128i *in = (const __m128i *)data, *first = in;
    uint8_t rest[16];
    if (head_bytes) {
        first = (const __m128i *)head;
    } else {
        if (length < 64)
            return fc_crc_tables(state, data, length);
        in += 4;
        length -= 64;
    }
    __m128i a = _mm_xor_si128(_mm_loadu_si128(first), _mm_cvtsi32_si128((int)state));
    __m128i b = _mm_loadu_si128(first + 1), c = _mm_loadu_si128(first + 2), d = _mm_loadu_si128(first + 3);
#define FC_FOLD_64(from)                           \
    a = FC_FOLD(a, by64, _mm_loadu_si128(from));     \
    b = FC_FOLD(b, by64, _mm_loadu_si128(from + 1)); \
    c = FC_FOLD(c, by64, _mm_loadu_si128(from + 2)); \
    d = FC_FOLD(d, by64, _mm_loadu_si128(from + 3))
    for (; head_bytes > 64; head_bytes -= 64) {
        first += 4;
        FC_FOLD_64(first);
    }
    for (; length >= 64; in += 4, length -= 64) {
        FC_FOLD_64(in);
    }
    b = FC_FOLD(a, by16, b);
    c = FC_FOLD(b, by16, c);
    d = FC_FOLD(c, by16, d);
    for (; length >= 16; in += 1, length -= 16)
        d = FC_FOLD(d, by16, _mm_loadu_si128(in));
    _mm_storeu_si128((__m128i *)rest, d);
    return fc_crc_tables(fc_crc_tables(0, rest, 16), (const uint8_t *)in, length);
}

#define FC_FOLD_WIDE(value, powers, next)                                            \
    _mm256_xor_si256(_mm256_xor_si256(_mm256_clmulepi64_epi128(value, powers, 0x00), \
                                      _mm256_clmulepi64_epi128(value, powers, 0x11)), next)

FC_TARGET("avx2,pclmul,vpclmulqdq")
static uint32_t fc_crc_wide(uint32_t state, const uint8_t *head, uint64_t head_bytes, const uint8_t *data, uint64_t length) {
    if (head_bytes > 128 || head_bytes + length < 128)
        return fc_crc_folding(state, head, head_bytes, data, length);
    const __m256i by128 = _mm256_broadcastsi128_si256(FC_BY_128), by32 = _mm256_broadcastsi128_si256(FC_BY_32);
    const __m256i *in = (const __m256i *)data;
    const __m256i *first = head_bytes ? (const __m256i *)head : in;
    const __m256i *third = head_bytes == 64 ? in : first + 2;
    __m256i a = _mm256_xor_si256(_mm256_loadu_si256(first), _mm256_zextsi128_si256(_mm_cvtsi32_si128((int)state)));
    __m256i b = _mm256_loadu_si256(first + 1), c = _mm256_loadu_si256(third), d = _mm256_loadu_si256(third + 1);
    uint8_t rest[16];
    in += (128 - head_bytes) / 32;
    length -= 128 - head_bytes;
    for (; length >= 128; in += 4, length -= 128) {
        /* The hardware stops at the end of a page; the next frame lies right behind this one. */
        _mm_prefetch((const char *)(in + FC_CRC_AHEAD / 32), _MM_HINT_T0);
        _mm_prefetch((const char *)(in + FC_CRC_AHEAD / 32 + 2), _MM_HINT_T0);
        a = FC_FOLD_WIDE(a, by128, _mm256_loadu_si256(in));
        b = FC_FOLD_WIDE(b, by128, _mm256_loadu_si256(in + 1));
        c = FC_FOLD_WIDE(c, by128, _mm256_loadu_si256(in + 2));
        d = FC_FOLD_WIDE(d, by128, _mm256_loadu_si256(in + 3));
    }
    b = FC_FOLD_WIDE(a, by32, b);
    c = FC_FOLD_WIDE(b, by32, c);
    d = FC_FOLD_WIDE(c, by32, d);
    for (; length >= 32; in += 1, length -= 32)
        d = FC_FOLD_WIDE(d, by32, _mm256_loadu_si256(in));
    const __m128i by16 = FC_BY_16, *left = (const __m128i *)in;
    __m128i last = FC_FOLD(_mm256_castsi256_si128(d), by16, _mm256_extracti128_si256(d, 1));
    if (length >= 16) {
        last = FC_FOLD(last, by16, _mm_loadu_si128(left));
        left += 1;
        length -= 16;
    }
    _mm_storeu_si128((__m128i *)rest, last);
    return fc_crc_tables(fc_crc_tables(0, rest, 16), (const uint8_t *)left, length);
}
#endif

/* Moves the register over `head` and then over `data`. `head_bytes` is a multiple of 64, 0 if there is none. */
typedef uint32_t (*fc_crc_function)(uint32_t state, const uint8_t *head, uint64_t head_bytes, const uint8_t *data,
                                    uint64_t length);

static uint32_t fc_crc_plain(uint32_t state, const uint8_t *head, uint64_t head_bytes, const uint8_t *data,
                             uint64_t length) {
    return fc_crc_tables(fc_crc_tables(state, head, head_bytes), data, length);
}

static fc_crc_function fc_crc_kernel = fc_crc_plain;

/* Choose a kernel; 0 where this CPU lacks it. Not for use while another thread computes. */
static int fc_icrc_select(int kernel) {
    if (kernel == FC_CRC_BEST)
        return fc_icrc_select(FC_CRC_WIDE) || fc_icrc_select(FC_CRC_FOLDING) || fc_icrc_select(FC_CRC_TABLES);
    if (kernel == FC_CRC_TABLES) {
        fc_crc_kernel = fc_crc_plain;
        return 1;
    }
#if defined(__x86_64__)
    if (kernel == FC_CRC_FOLDING && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        fc_crc_kernel = fc_crc_folding;
        return 1;
    }
    if (kernel == FC_CRC_WIDE && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx2")) {
        fc_crc_kernel = fc_crc_wide;
        return 1;
    }
#endif
    return 0;
}

__attribute__((constructor)) static void fc_crc_prepare(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? FC_CRC_POLYNOMIAL : 0);
        fc_crc_table[0][byte] = value;
    }
    for (int table = 1; table < 8; table++)
        for (int byte = 0; byte < 256; byte++)
            fc_crc_table[table][byte] = fc_crc_table[table - 1][byte] >> 8 ^
                                        fc_crc_table[0][fc_crc_table[table - 1][byte] & 255];
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    fc_icrc_select(FC_CRC_BEST);
}

/* The plain CRC-32 register, moved over `length` bytes: start with ~0, complement at the end. */
static inline uint32_t fc_crc32(uint32_t state, const uint8_t *data, uint64_t length) {
    return fc_crc_kernel(state, data, 0, data, length);
}

#define FC_ICRC_HEADERS (8 + 40 + 256 + 8 + 12) /* the longest that fc_decode lets through */

/* The ICRC of the packet at `ip`, whose IP headers take `headers` bytes and which ends after `total` bytes, ICRC not
 * counted. The caller has checked that headers + UDP + BTH fit into both `total` and FC_ICRC_HEADERS. */
static inline uint32_t fc_icrc(const uint8_t *ip, uint32_t headers, uint32_t total) {
    uint8_t masked[FC_ICRC_HEADERS + 64];
    uint32_t length = headers + 8 + 12, whole = (8 + length + 63) / 64 * 64 - 8;
    uint32_t copied = whole < total ? whole : total;
    memset(masked, 0xFF, 8);
    memcpy(masked + 8, ip, copied);
    uint8_t *header = masked + 8, *udp = header + headers;
    if (ip[0] >> 4 == 4) {
        header[1] = 0xFF;             /* type of service */
        header[8] = 0xFF;             /* time to live */
        header[10] = header[11] = 0xFF; /* header checksum */
    } else {
        header[0] |= 0x0F; /* traffic class, flow label */
        header[1] = header[2] = header[3] = 0xFF;
        header[7] = 0xFF; /* hop limit */
    }
    udp[6] = udp[7] = 0xFF; /* checksum */
    udp[8 + 4] = 0xFF;      /* BTH: FECN, BECN, reserved */
    if (copied < whole)
        return ~fc_crc32(~0u, masked, 8 + copied);
    return ~fc_crc_kernel(~0u, masked, 8 + copied, ip + copied, total - copied);
}

#endif
