# SPDX-License-Identifier: MIT
"""Input: one Ethernet frame. What fc_decode says lies inside of it, and a cut frame is never whole."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from flowcheck._wire cimport (
    FC_HAS_PAYLOAD, FC_IS_RC, FC_WIRE_NOT_ROCE, FC_WIRE_OK, FC_WIRE_RESULTS, fc_crc32, fc_decode, fc_icrc, fc_icrc_right,
    fc_icrc_select, fc_wire)

cdef extern from "_target.h" nogil:
    void fuzz_claim(bint holds, const char *what, long long number)
    uint8_t *fuzz_exactly(uint32_t room, size_t bytes)

cdef enum:
    BEST = -1
    KERNELS = 3


cdef void _check(const uint8_t *frame, uint32_t size) noexcept nogil:
    cdef fc_wire wire, other
    cdef int result, cut, kernel
    cdef uint32_t best, plain, byte, length
    cdef uint8_t *shorter
    memset(&wire, 0xA5, sizeof(wire))
    result = fc_decode(frame, size, &wire)
    fuzz_claim(0 <= result < FC_WIRE_RESULTS, "a known result", result)
    if result != FC_WIRE_OK:
        return
    fuzz_claim(wire.length <= size, "the packet ends in its frame", wire.length)
    fuzz_claim(wire.ip_offset + wire.ip_headers + 8 == wire.bth_offset, "headers follow each other", wire.bth_offset)
    fuzz_claim(wire.bth_offset + 12 <= wire.payload_offset, "payload behind the headers", wire.payload_offset)
    fuzz_claim(<uint32_t> wire.payload_offset + wire.payload_length + wire.pad + 4 == wire.length, "lengths add up", wire.length)
    fuzz_claim(wire.pad < 4 and wire.dest_qp < 1 << 24 and wire.psn < 1 << 24, "field widths", wire.psn)
    if wire.has & FC_IS_RC:
        fuzz_claim((wire.payload_length + wire.pad) % 4 == 0, "whole words", wire.payload_length)
        fuzz_claim(wire.payload_length == 0 or wire.has & FC_HAS_PAYLOAD != 0, "payload where the opcode has it", wire.opcode)
    # All kernels give one checksum, of the packet and of any bytes.
    length = wire.length - 4 - wire.ip_offset
    best = fc_icrc(frame + wire.ip_offset, wire.ip_headers, length)
    plain = fc_crc32(0xFFFFFFFF, frame, wire.length)
    for kernel in range(KERNELS):
        if fc_icrc_select(kernel):
            fuzz_claim(fc_icrc(frame + wire.ip_offset, wire.ip_headers, length) == best, "kernels agree", kernel)
            fuzz_claim(fc_crc32(0xFFFFFFFF, frame, wire.length) == plain, "kernels agree on any bytes", kernel)
    fc_icrc_select(BEST)
    fc_icrc_right(frame, &wire)
    # Of the same packet, cut: never taken for whole. In memory of its own, so that a read behind the cut is seen.
    length = wire.length - 1
    byte = frame[wire.length - 4]
    if byte % 4 == 0:
        length = wire.payload_offset
    elif byte % 4 == 1:
        length = wire.bth_offset + 11
    shorter = fuzz_exactly(0, length)
    memcpy(shorter, frame, length)
    cut = fc_decode(shorter, length, &other)
    fuzz_claim(cut != FC_WIRE_OK and cut != FC_WIRE_NOT_ROCE, "a cut frame is malformed", cut)


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept nogil:
    if size:
        _check(data, <uint32_t> size)
    return 0
