# SPDX-License-Identifier: MIT
"""Input: an encoding, how many bytes count, where the slot begins, a flag, and a payload. Every kernel takes it to the slot like a
loop over words, whether it stores, streams or compares.

Payload and slot lie in memory that ends, and begins, where nobody may read or write on.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from data_extractor._lines cimport (
    FC_COMPARE, FC_OTHER_BYTES, FC_OTHER_FLAG, FC_STORE, FC_STREAM, FC_STREAMED, fc_kernels, fc_kernels_of, fc_ll128_run,
    fc_ll128_runs, fc_ll128_take, fc_ll_take,
)

cdef extern from "_target.h" nogil:
    void fuzz_claim(bint holds, const char *what, long long number)
    uint8_t *fuzz_exactly(uint32_t room, size_t bytes)

cdef enum:
    SOURCE = 0                  # rooms: of the payload
    SLOT = 1                    # of what a kernel makes of it
    PLAIN = 0
    LL = 1
    LL128 = 2

# What a payload is, and what must become of it; a byte of the slot that it does not bring stays BEFORE.
cdef struct task:
    int encoding
    const uint8_t *payload
    uint32_t length
    uint32_t line               # LL128: of the message
    uint64_t first              # LL128: unit of the message with which the slot begins
    uint64_t flag
    uint64_t bytes              # of the slot
    bint right                  # all flags are

cdef enum:
    BEFORE = 0xA5

cdef uint8_t expected[1 << 16]
cdef const fc_kernels *kernels[2]
kernels[0], kernels[1] = fc_kernels_of(b"scalar"), fc_kernels_of(b"avx2")


cdef int _take(const fc_kernels *some, const task *job, uint8_t *slot, int how) noexcept nogil:
    cdef int other
    if job.encoding == PLAIN:
        other = some.plain(slot, job.payload, job.bytes, 0, how)
    elif job.encoding == LL:
        other = fc_ll_take(some.ll, slot, job.payload, job.length // 16, job.flag, job.bytes, how)
    else:
        other = fc_ll128_take(some.ll128, slot, job.payload, job.line, job.length // 128, job.flag, job.first, job.bytes, how)
    FC_STREAMED()
    return other


cdef void _every_kernel(const task *job, uint32_t shift, uint32_t changed) noexcept nogil:
    """Try every kernel in every way; the slot begins `shift` bytes behind an aligned address, `changed` is a byte that differs."""
    cdef uint32_t number, other
    cdef uint8_t *begin = fuzz_exactly(SLOT, shift + job.bytes)
    cdef uint8_t *slot = begin + shift
    cdef int how, flag = 0 if job.right else FC_OTHER_FLAG
    for number in range(2):
        if kernels[number] == NULL:
            continue
        for how in range(2):
            memset(begin, BEFORE, shift + job.bytes)
            other = _take(kernels[number], job, slot, FC_STREAM if how else FC_STORE)
            fuzz_claim(other == flag, "flags are judged alike by kernel", number)
            fuzz_claim(memcmp(slot, expected, job.bytes) == 0, "data is put where it belongs by kernel", number)
            for other in range(shift):
                fuzz_claim(begin[other] == BEFORE, "nothing is written before the slot by kernel", number)
        # What it leaves out may be anything: one byte is.
        fuzz_claim(_take(kernels[number], job, slot, FC_COMPARE) == flag, "equal bytes are equal by kernel", number)
        if job.bytes:
            other = changed % <uint32_t> job.bytes
            slot[other] ^= 1 + changed % 255
            fuzz_claim(_take(kernels[number], job, slot, FC_COMPARE) == flag | (FC_OTHER_BYTES if _brings(job, other) else 0),
                       "a byte that differs is seen by kernel", number)
            slot[other] ^= 1 + changed % 255
            fuzz_claim(memcmp(slot, expected, job.bytes) == 0, "comparing changes nothing by kernel", number)


cdef bint _brings(const task *job, uint32_t byte) noexcept nogil:
    """Whether a byte of the slot is of the payload: only lines of LL128 have gaps."""
    cdef fc_ll128_run runs[2]
    cdef uint64_t unit = job.first + byte // 8
    cdef uint32_t i, run
    if job.encoding != LL128:
        return True
    for i in range(job.length // 128):
        for run in range(fc_ll128_runs(job.line + i, runs)):
            if runs[run].unit <= unit < <uint64_t> runs[run].unit + runs[run].units:
                return True
    return False


cdef bint _expect_lines(task *job) noexcept nogil:
    """Say, word by word, what lines bring, all of it; return whether all flags are right."""
    cdef fc_ll128_run runs[2]
    cdef uint64_t low = ~(<uint64_t> 0), high = 0, unit
    cdef uint32_t i, run, count, at, brought = 0
    cdef bint right = True
    if job.encoding == LL:
        for i in range(job.length // 16):
            memcpy(expected + 8 * i, job.payload + 16 * i, 4)
            memcpy(expected + 8 * i + 4, job.payload + 16 * i + 8, 4)
            right = right and memcmp(job.payload + 16 * i + 4, &job.flag, 4) == 0
            right = right and memcmp(job.payload + 16 * i + 12, &job.flag, 4) == 0
        job.bytes = job.length // 2
        return right
    for i in range(job.length // 128):
        count = fc_ll128_runs(job.line + i, runs)
        fuzz_claim(1 <= count <= 2, "one or two runs", count)
        for run in range(count):
            brought += runs[run].units
            low = runs[run].unit if runs[run].unit < low else low
            high = runs[run].unit + runs[run].units if runs[run].unit + runs[run].units > high else high
        right = right and memcmp(job.payload + 128 * i + 120, &job.flag, 8) == 0
    if brought == 0:
        job.bytes = 0
        return right
    fuzz_claim(brought == 15 * (job.length // 128), "fifteen words of a line", brought)
    fuzz_claim(high - low <= 240 * ((job.length // 128 + 14) // 16 + 1), "close together", high - low)
    job.first, job.bytes = low, 8 * (high - low)
    memset(expected, BEFORE, job.bytes)
    for i in range(job.length // 128):  # as the header of the kernel says where they belong
        at = 128 * i
        for run in range(fc_ll128_runs(job.line + i, runs)):
            for unit in range(runs[run].unit - low, runs[run].unit - low + runs[run].units):
                memcpy(expected + 8 * unit, job.payload + at, 8)
                at += 8
    return right


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept nogil:
    cdef uint32_t line_bytes, lines, line, cut
    cdef uint8_t *payload
    cdef task job
    if size < 16:
        return 0
    memset(&job, 0, sizeof(job))
    memcpy(&job.flag, data, 8)
    memcpy(&job.line, data + 12, 4)
    cut, job.line = (job.line & 0xFF) * 9, job.line >> 8
    job.encoding = LL if data[8] & 1 else PLAIN if data[8] & 16 else LL128
    line_bytes = 1 if job.encoding == PLAIN else 16 if job.encoding == LL else 128
    job.flag = <uint32_t> job.flag if job.encoding == LL else job.flag
    lines = <uint32_t> ((size - 16) // line_bytes)
    job.length = lines * line_bytes
    payload = fuzz_exactly(SOURCE, job.length)
    memcpy(payload, data + 16, job.length)
    job.payload, job.right = payload, True
    if job.encoding == PLAIN:
        job.bytes = job.length
        memcpy(expected, payload, job.length)
    else:
        if data[8] & 2:  # right flags, and one that is not
            for line in range(lines):
                if job.encoding == LL128:
                    memcpy(payload + 128 * line + 120, &job.flag, 8)
                else:
                    memcpy(payload + 16 * line + 4, &job.flag, 4)
                    memcpy(payload + 16 * line + 12, &job.flag, 4)
            if data[8] & 4 and lines:
                line = data[9] % lines
                if job.encoding == LL128:
                    payload[128 * line + 120 + data[10] % 8] ^= data[11]
                else:
                    payload[16 * line + (12 if data[9] & 128 else 4) + data[10] % 4] ^= data[11]
        job.right = _expect_lines(&job)
    if data[8] & 8 and job.bytes:
        job.bytes -= cut % job.bytes
    _every_kernel(&job, data[10] >> 3 if data[8] & 32 else (data[10] >> 6) * 8, cut * 251 + data[9])
    return 0
