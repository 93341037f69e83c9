# SPDX-License-Identifier: MIT
# A header that is like one seen before means the same: most packets differ from an earlier one of their queue pair in
# nothing but the PSN and what no decision rests on. They are recognised by comparing, not decoded again.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from flowcheck._wire cimport fc_wire

cdef extern from *:
    """
    typedef uint64_t fc_two_words __attribute__((vector_size(16), aligned(1), may_alias));

    /* Whether any of the bits of `mask` differs; an even number of words. */
    static inline int fc_differ(const uint8_t *bytes, const uint64_t *bits, const uint64_t *mask, uint32_t words) {
        fc_two_words differ = {0, 0};
        for (uint32_t i = 0; i < words; i += 2)
            differ |= (*(const fc_two_words *)(bytes + 8 * i) & *(const fc_two_words *)(mask + i)) ^
                      *(const fc_two_words *)(bits + i);
        return (differ[0] | differ[1]) != 0;
    }
    """
    bint fc_differ(const uint8_t *bytes, const uint64_t *bits, const uint64_t *mask, uint32_t words) nogil

cdef enum:
    FC_SEEN_BYTES = 96          # of a frame that are compared at most: Ethernet to BTH, with IPv6 and five VLAN tags
    FC_SEEN_WORDS = 12          # so many words
    FC_SEEN_LINE = 64           # bytes, and
    FC_SEEN_LINE_WORDS = 8      # words that are compared at least: one cache line
    FC_SEEN_HEADERS = 256       # that are kept, one per place; a power of two

# One header, as of a packet without any behind its BTH.
cdef struct fc_seen:
    uint64_t bits[FC_SEEN_WORDS] # those that decide, the others as zeros
    uint64_t mask[FC_SEEN_WORDS] # which do
    uint32_t stored             # bytes that a frame must have to be compared; 0: nothing is kept here
    uint32_t flow               # index of the data flow
    fc_wire wire                # what fc_decode says, but for `psn` and `ack_request`

cdef inline uint32_t fc_seen_place(const uint8_t *bth) noexcept nogil:
    """Return where a header is kept: by the opcode and the queue pair of its BTH."""
    cdef uint64_t first
    memcpy(&first, bth, 8)
    return (first & 0xFFFFFF00000000FFU) * 0x9E3779B97F4A7C15U >> 56 & (FC_SEEN_HEADERS - 1)

cdef inline bint fc_seen_again(const fc_seen *seen, const uint8_t *frame, uint32_t stored) noexcept nogil:
    """Whether a frame's header is the one that is kept, so that all but the PSN is known."""
    if seen.stored == 0 or stored < seen.stored or fc_differ(frame, seen.bits, seen.mask, FC_SEEN_LINE_WORDS):
        return False
    return seen.wire.bth_offset + 12 <= FC_SEEN_LINE or not fc_differ(
        frame + FC_SEEN_LINE, seen.bits + FC_SEEN_LINE_WORDS, seen.mask + FC_SEEN_LINE_WORDS, FC_SEEN_WORDS - FC_SEEN_LINE_WORDS)

cdef inline bint fc_see(fc_seen *seen, const uint8_t *frame, const fc_wire *wire, uint32_t flow) noexcept nogil:
    """Keep the header of a packet that fc_decode found right; False, with nothing kept, if it is longer than what is compared."""
    cdef uint8_t mask[FC_SEEN_BYTES]
    cdef uint8_t *ip = mask + wire.ip_offset
    cdef uint8_t *bth = mask + wire.bth_offset
    cdef uint32_t word, bytes = FC_SEEN_LINE if wire.bth_offset + 12 <= FC_SEEN_LINE else FC_SEEN_BYTES
    seen.stored = 0
    if wire.bth_offset + 12 > FC_SEEN_BYTES or wire.payload_offset != wire.bth_offset + 12 or (
            wire.ip_headers != (20 if wire.ip_version == 4 else 40)):
        return False
    memset(mask, 0, FC_SEEN_BYTES)
    memset(mask + 12, 0xFF, wire.bth_offset)    # from the Ethernet type to the BTH's end
    if wire.ip_version == 4:
        ip[1] = 0                               # type of service
        ip[4] = ip[5] = 0                       # identification
        ip[8] = 0                               # time to live
        ip[10] = ip[11] = 0                     # checksum
    else:
        ip[0] = 0xF0                            # traffic class and flow label, behind the version
        ip[1] = ip[2] = ip[3] = 0
        ip[7] = 0                               # hop limit
    (bth - 2)[0] = (bth - 1)[0] = 0             # UDP checksum
    bth[2] = bth[3] = 0                         # partition key
    bth[4] = 0                                  # FECN, BECN
    memset(bth + 8, 0, 4)                       # acknowledge request, PSN
    memcpy(seen.mask, mask, FC_SEEN_BYTES)
    memset(seen.bits, 0, FC_SEEN_BYTES)
    memcpy(seen.bits, frame, wire.bth_offset + 12)
    for word in range(FC_SEEN_WORDS):
        seen.bits[word] &= seen.mask[word]
    seen.stored = wire.length if wire.length > bytes else bytes
    seen.flow = flow
    seen.wire = wire[0]
    return True
