# SPDX-License-Identifier: MIT
"""Input: which kernel, how many lines, a flag, and lines of LL or LL128. Every kernel strips them like a loop over words.

Source and target lie in memory that ends, and begins, where nobody may read or write on.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from data_extractor._lines cimport fc_ll128_run, fc_ll128_runs, fc_ll128_strip, fc_ll_kernel, fc_ll_strip

cdef extern from "_target.h" nogil:
    void fuzz_claim(bint holds, const char *what, long long number)
    uint8_t *fuzz_exactly(uint32_t room, size_t bytes)

cdef enum:
    SOURCE = 0                  # rooms: of the lines
    STRIPPED = 1                # of what a kernel makes of them

cdef uint8_t expected[1 << 16]
cdef fc_ll_strip kernels[3]
kernels[0], kernels[1], kernels[2] = fc_ll_kernel(b"scalar"), fc_ll_kernel(b"avx2"), fc_ll_kernel(b"avx512")


cdef void _ll(const uint8_t *data, uint32_t lines, uint32_t flag) noexcept nogil:
    cdef uint32_t i, number
    cdef bint right = True
    cdef uint8_t *out = fuzz_exactly(STRIPPED, 8 * lines)
    for i in range(lines):
        memcpy(expected + 8 * i, data + 16 * i, 4)
        memcpy(expected + 8 * i + 4, data + 16 * i + 8, 4)
        right = right and memcmp(data + 16 * i + 4, &flag, 4) == 0 and memcmp(data + 16 * i + 12, &flag, 4) == 0
    for number in range(3):
        if kernels[number] == NULL:
            continue
        memset(out, 0xA5, 8 * lines)
        fuzz_claim((kernels[number](out, data, lines, flag) != 0) == right, "flags are judged alike by kernel", number)
        if lines:
            fuzz_claim(memcmp(out, expected, 8 * lines) == 0, "data is stripped alike by kernel", number)


cdef void _ll128(const uint8_t *data, uint32_t lines, uint32_t line, uint64_t flag, uint32_t cut) noexcept nogil:
    """Strip lines from `line` of a message on, of which `cut` bytes at the end do not count."""
    cdef fc_ll128_run runs[2]
    cdef uint64_t low = ~(<uint64_t> 0), high = 0, bytes, unit, at = 0
    cdef uint32_t i, run, count, brought = 0
    cdef bint right = True
    cdef uint8_t *out
    for i in range(lines):
        count = fc_ll128_runs(line + i, runs)
        fuzz_claim(1 <= count <= 2, "one or two runs", count)
        for run in range(count):
            brought += runs[run].units
            low = runs[run].unit if runs[run].unit < low else low
            high = runs[run].unit + runs[run].units if runs[run].unit + runs[run].units > high else high
        right = right and memcmp(data + 128 * i + 120, &flag, 8) == 0
    if lines == 0:
        return
    fuzz_claim(brought == 15 * lines, "fifteen words of a line", brought)
    fuzz_claim(high - low <= 240 * ((lines + 14) // 16 + 1), "close together", high - low)
    bytes = 8 * (high - low)
    bytes = bytes - cut % bytes
    out = fuzz_exactly(STRIPPED, bytes)
    memset(out, 0xA5, bytes)
    memset(expected, 0xA5, 8 * (high - low))
    # Word by word, as the header of the kernel says where they belong.
    for i in range(lines):
        count = fc_ll128_runs(line + i, runs)
        at = 128 * i
        for run in range(count):
            for unit in range(runs[run].unit - low, runs[run].unit - low + runs[run].units):
                memcpy(expected + 8 * unit, data + at, 8)
                at += 8
    fuzz_claim((fc_ll128_strip(out, data, line, lines, flag, low, bytes) != 0) == right, "flags are judged alike", lines)
    fuzz_claim(memcmp(out, expected, bytes) == 0, "words are put where they belong", lines)


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept nogil:
    cdef uint32_t lines, flag, line
    cdef uint64_t flag128
    cdef uint8_t *source
    if size < 16:
        return 0
    memcpy(&flag128, data, 8)
    flag = <uint32_t> flag128
    if data[8] & 1:
        lines = <uint32_t> ((size - 16) // 16)
        source = fuzz_exactly(SOURCE, 16 * lines)
        memcpy(source, data + 16, 16 * lines)
        if data[8] & 2:  # right flags, and one that is not
            for line in range(lines):
                memcpy(source + 16 * line + 4, &flag, 4)
                memcpy(source + 16 * line + 12, &flag, 4)
            if data[8] & 4 and lines:
                source[16 * (data[9] % lines) + (12 if data[9] & 128 else 4) + data[10] % 4] ^= data[11]
        _ll(source, lines, flag)
    else:
        lines = <uint32_t> ((size - 16) // 128)
        memcpy(&line, data + 12, 4)
        source = fuzz_exactly(SOURCE, 128 * lines)
        memcpy(source, data + 16, 128 * lines)
        if data[8] & 2:
            for line in range(lines):
                memcpy(source + 128 * line + 120, &flag128, 8)
            if data[8] & 4 and lines:
                source[128 * (data[9] % lines) + 120 + data[10] % 8] ^= data[11]
            memcpy(&line, data + 12, 4)
        _ll128(source, lines, line >> 8, flag128, (line & 0xFF) * 9 if data[8] & 8 else 0)
    return 0
