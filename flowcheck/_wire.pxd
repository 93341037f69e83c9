# SPDX-License-Identifier: MIT
# Decodes one RoCEv2 frame into one fc_wire. No allocation, no Python, and no read outside the frame. The stages that
# cimport it get their own inlined copy; the constants are those of RFC 791, RFC 8200, RFC 768 and of the InfiniBand
# specification, volume 1, chapter 9 (transport) and annex A17 (RoCEv2).
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

# DPDK's header structs are shared where 22.11 to 24.11 agree on them; an IPv6 address is an array in some and a struct
# in others, so only its place is taken.
cdef extern from "<rte_ether.h>" nogil:
    cdef struct rte_ether_hdr:
        uint16_t ether_type
    cdef struct rte_vlan_hdr:
        uint16_t eth_proto

cdef extern from "<rte_ip.h>" nogil:
    cdef struct rte_ipv4_hdr:
        uint8_t version_ihl
        uint16_t total_length
        uint16_t fragment_offset
        uint8_t next_proto_id
        uint32_t src_addr
        uint32_t dst_addr
    cdef struct rte_ipv6_hdr:
        uint16_t payload_len
        uint8_t proto
        uint8_t src_addr
        uint8_t dst_addr

cdef extern from "<rte_udp.h>" nogil:
    cdef struct rte_udp_hdr:
        uint16_t src_port
        uint16_t dst_port
        uint16_t dgram_len

cdef extern from "<rte_byteorder.h>" nogil:
    uint16_t rte_be_to_cpu_16(uint16_t value)

cdef extern from "flowcheck/_icrc.h" nogil:
    uint32_t fc_icrc(const uint8_t *ip, uint32_t headers, uint32_t total)
    bint fc_icrc_select(int kernel)
    uint32_t fc_crc32(uint32_t state, const uint8_t *data, uint64_t length)

cdef enum:
    FC_ROCE_PORT = 4791

    # What fc_decode found. Every value from FC_WIRE_CUT on is a frame that claims to be RoCEv2 and cannot be, or
    # that was cut before that could be told; packet_parser/reasons.py names them.
    FC_WIRE_OK = 0
    FC_WIRE_NOT_ROCE = 1
    FC_WIRE_CUT = 2             # the frame ends before a header, or before the length that its IP header gives
    FC_WIRE_IP_VERSION = 3      # the IP version contradicts the Ethernet type
    FC_WIRE_IP_LENGTH = 4       # the IP header or its lengths cannot hold what they announce
    FC_WIRE_EXTENSIONS = 5      # more IPv6 extension headers than FC_EXTENSION_BYTES
    FC_WIRE_FRAGMENT = 6        # RoCEv2 forbids fragments
    FC_WIRE_UDP_LENGTH = 7      # the UDP length contradicts the IP length
    FC_WIRE_BTH = 8             # no whole BTH, or of another transport version
    FC_WIRE_HEADERS = 9         # the headers of the opcode do not fit
    FC_WIRE_PAD = 10            # the pad count contradicts the length or the opcode
    FC_WIRE_PAYLOAD = 11        # a payload that the opcode cannot have, or none where it must have one
    FC_WIRE_DMA_LENGTH = 12     # the RETH length contradicts the payload
    FC_WIRE_RESULTS = 13

    FC_VLAN_TAGS = 8            # more stacked tags than this are no RoCE frame of ours
    FC_EXTENSION_BYTES = 256

    # Opcodes of the reliable connection (BTH opcode, upper three bits 000), and the two others that are told apart.
    FC_OP_SEND_FIRST = 0
    FC_OP_WRITE_FIRST = 6
    FC_OP_WRITE_MIDDLE = 7
    FC_OP_WRITE_LAST = 8
    FC_OP_WRITE_LAST_IMM = 9
    FC_OP_WRITE_ONLY = 10
    FC_OP_WRITE_ONLY_IMM = 11
    FC_OP_READ_REQUEST = 12
    FC_OP_READ_RESPONSE_FIRST = 13
    FC_OP_ACK = 17
    FC_OP_ATOMIC_ACK = 18
    FC_OP_COMPARE_SWAP = 19
    FC_OP_FETCH_ADD = 20
    FC_OP_SEND_ONLY_INVALIDATE = 23
    FC_OP_UD_SEND = 100
    FC_OP_UD_SEND_IMM = 101
    FC_OP_CNP = 129

    # What an opcode carries: bits of fc_wire.has.
    FC_HAS_RETH = 1
    FC_HAS_IMMEDIATE = 2
    FC_HAS_AETH = 4
    FC_HAS_ATOMIC = 8
    FC_HAS_ATOMIC_ACK = 16
    FC_HAS_INVALIDATE = 32
    FC_HAS_DETH = 64
    FC_HAS_PAYLOAD = 128        # may have payload
    FC_IS_FIRST = 256           # begins a message
    FC_IS_LAST = 512            # ends one; an ONLY packet does both
    FC_IS_REQUEST = 1024        # takes a PSN of the requester's sequence
    FC_IS_RC = 2048             # an opcode of the reliable connection

cdef struct fc_wire:
    uint8_t source[16]          # IPv4 as ::ffff:a.b.c.d
    uint8_t destination[16]
    uint64_t va                 # RETH, AtomicETH
    uint64_t atomic_data        # AtomicETH: swap or add; AtomicAckETH: the original value
    uint64_t atomic_compare
    uint32_t rkey               # RETH, AtomicETH; IETH
    uint32_t dma_length         # RETH
    uint32_t immediate          # as the wire's four bytes in network order
    uint32_t aeth               # syndrome in the upper byte, MSN in the lower three
    uint32_t dest_qp
    uint32_t psn
    uint32_t length             # of the frame up to and with the ICRC; what follows is Ethernet padding
    uint16_t source_port        # host order, as every number here
    uint16_t ip_offset
    uint16_t ip_headers         # bytes of the IP header with its options or extension headers
    uint16_t bth_offset
    uint16_t payload_offset
    uint16_t payload_length     # without pad and ICRC
    uint16_t has                # FC_HAS_*, FC_IS_*
    uint8_t ip_version
    uint8_t opcode
    uint8_t pad
    uint8_t ack_request

cdef inline uint32_t fc_be32(const uint8_t *p) noexcept nogil:
    return (<uint32_t> p[0] << 24) | (<uint32_t> p[1] << 16) | (<uint32_t> p[2] << 8) | p[3]

cdef inline uint32_t fc_be24(const uint8_t *p) noexcept nogil:
    return (<uint32_t> p[0] << 16) | (<uint32_t> p[1] << 8) | p[2]

cdef inline uint64_t fc_be64(const uint8_t *p) noexcept nogil:
    return (<uint64_t> fc_be32(p) << 32) | fc_be32(p + 4)

cdef inline uint16_t fc_opcode_has(uint8_t opcode) noexcept nogil:
    """Return what packets of this opcode carry (FC_HAS_*, FC_IS_*); 0 for an opcode that is not decoded further."""
    if opcode == 7 or opcode == 1:  # WRITE and SEND MIDDLE, the most frequent
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD
    if opcode == 0:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST
    if opcode == 2 or opcode == 8:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_LAST
    if opcode == 3 or opcode == 9:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_LAST | FC_HAS_IMMEDIATE
    if opcode == 4:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST
    if opcode == 5:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST | FC_HAS_IMMEDIATE
    if opcode == 6:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_HAS_RETH
    if opcode == 10:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST | FC_HAS_RETH
    if opcode == 11:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST | FC_HAS_RETH | FC_HAS_IMMEDIATE
    if opcode == 12:
        return FC_IS_RC | FC_IS_REQUEST | FC_IS_FIRST | FC_IS_LAST | FC_HAS_RETH
    if opcode == 13:
        return FC_IS_RC | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_HAS_AETH
    if opcode == 14:
        return FC_IS_RC | FC_HAS_PAYLOAD
    if opcode == 15:
        return FC_IS_RC | FC_HAS_PAYLOAD | FC_IS_LAST | FC_HAS_AETH
    if opcode == 16:
        return FC_IS_RC | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST | FC_HAS_AETH
    if opcode == 17:
        return FC_IS_RC | FC_IS_FIRST | FC_IS_LAST | FC_HAS_AETH
    if opcode == 18:
        return FC_IS_RC | FC_IS_FIRST | FC_IS_LAST | FC_HAS_AETH | FC_HAS_ATOMIC_ACK
    if opcode == 19 or opcode == 20:
        return FC_IS_RC | FC_IS_REQUEST | FC_IS_FIRST | FC_IS_LAST | FC_HAS_ATOMIC
    if opcode == 22:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_LAST | FC_HAS_INVALIDATE
    if opcode == 23:
        return FC_IS_RC | FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST | FC_HAS_INVALIDATE
    if opcode == 100:
        return FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST | FC_HAS_DETH
    if opcode == 101:
        return FC_IS_REQUEST | FC_HAS_PAYLOAD | FC_IS_FIRST | FC_IS_LAST | FC_HAS_DETH | FC_HAS_IMMEDIATE
    return 0

cdef inline int fc_decode_ipv4(const uint8_t *frame, uint32_t length, uint32_t at, fc_wire *out,
                               uint32_t *transport, uint32_t *end, bint *fragment) noexcept nogil:
    """Read the IPv4 header at `at`; give the offsets of the transport header and of the packet's end."""
    cdef const rte_ipv4_hdr *ip = <const rte_ipv4_hdr *> (frame + at)
    cdef uint32_t header, total, offset
    if length - at < 20:
        return FC_WIRE_CUT
    if ip.version_ihl >> 4 != 4:
        return FC_WIRE_IP_VERSION
    if ip.next_proto_id != 17:
        return FC_WIRE_NOT_ROCE
    offset = rte_be_to_cpu_16(ip.fragment_offset)
    if offset & 0x1FFF:
        return FC_WIRE_NOT_ROCE  # a later fragment has no UDP header to tell what it is
    fragment[0] = offset & 0x2000
    header = (ip.version_ihl & 15) * 4
    total = rte_be_to_cpu_16(ip.total_length)
    if header < 20:
        return FC_WIRE_IP_LENGTH
    transport[0] = at + header
    end[0] = at + total
    memset(out.source, 0, 10)
    memset(out.source + 10, 0xFF, 2)
    memcpy(out.source + 12, &ip.src_addr, 4)
    memset(out.destination, 0, 10)
    memset(out.destination + 10, 0xFF, 2)
    memcpy(out.destination + 12, &ip.dst_addr, 4)
    out.ip_version = 4
    return FC_WIRE_OK

cdef inline int fc_decode_ipv6(const uint8_t *frame, uint32_t length, uint32_t at, fc_wire *out,
                               uint32_t *transport, uint32_t *end, bint *fragment) noexcept nogil:
    """Read the IPv6 header and its extension headers at `at`, as fc_decode_ipv4 does."""
    cdef const rte_ipv6_hdr *ip = <const rte_ipv6_hdr *> (frame + at)
    cdef uint32_t place = at + 40
    cdef uint8_t protocol
    if length - at < 40:
        return FC_WIRE_CUT
    if frame[at] >> 4 != 6:
        return FC_WIRE_IP_VERSION
    protocol = ip.proto
    while protocol != 17:
        if protocol == 0 or protocol == 43 or protocol == 60 or protocol == 135 or protocol == 139 or protocol == 140:
            if length - place < 8:
                return FC_WIRE_CUT
            protocol = frame[place]
            place += 8 + frame[place + 1] * 8
        elif protocol == 51:  # authentication header, counted in words of four bytes
            if length - place < 8:
                return FC_WIRE_CUT
            protocol = frame[place]
            place += 8 + frame[place + 1] * 4
        elif protocol == 44:
            if length - place < 8:
                return FC_WIRE_CUT
            if ((<uint32_t> frame[place + 2] << 8) | frame[place + 3]) & 0xFFF8:
                return FC_WIRE_NOT_ROCE  # a later fragment, as in IPv4
            protocol = frame[place]
            place += 8
            fragment[0] = True
        else:
            return FC_WIRE_NOT_ROCE
        if place > length:
            return FC_WIRE_CUT
        if place - at - 40 > FC_EXTENSION_BYTES:
            return FC_WIRE_EXTENSIONS
    transport[0] = place
    end[0] = at + 40 + rte_be_to_cpu_16(ip.payload_len)
    memcpy(out.source, &ip.src_addr, 16)
    memcpy(out.destination, &ip.dst_addr, 16)
    out.ip_version = 6
    return FC_WIRE_OK

cdef inline int fc_decode_transport(const uint8_t *frame, uint32_t place, uint32_t end, fc_wire *out) noexcept nogil:
    """Read BTH and what follows it, from `place` up to `end`, which is where the ICRC begins."""
    cdef uint32_t carried
    cdef uint16_t has
    out.bth_offset = place
    out.opcode = frame[place]
    out.pad = (frame[place + 1] >> 4) & 3
    out.dest_qp = fc_be24(frame + place + 5)
    out.ack_request = frame[place + 8] >> 7
    out.psn = fc_be24(frame + place + 9)
    has = fc_opcode_has(out.opcode)
    out.has = has
    if has and frame[place + 1] & 15:
        return FC_WIRE_BTH
    place += 12
    carried = ((16 if has & FC_HAS_RETH else 0) + (4 if has & FC_HAS_IMMEDIATE else 0) + (4 if has & FC_HAS_AETH else 0)
               + (28 if has & FC_HAS_ATOMIC else 0) + (8 if has & FC_HAS_ATOMIC_ACK else 0)
               + (4 if has & FC_HAS_INVALIDATE else 0) + (8 if has & FC_HAS_DETH else 0))
    if end - place < carried:
        return FC_WIRE_HEADERS
    out.va = 0
    out.rkey = 0
    out.dma_length = 0
    out.immediate = 0
    out.aeth = 0
    out.atomic_data = 0
    out.atomic_compare = 0
    if has & FC_HAS_DETH:
        place += 8
    if has & FC_HAS_RETH:
        out.va = fc_be64(frame + place)
        out.rkey = fc_be32(frame + place + 8)
        out.dma_length = fc_be32(frame + place + 12)
        place += 16
    if has & FC_HAS_ATOMIC:
        out.va = fc_be64(frame + place)
        out.rkey = fc_be32(frame + place + 8)
        out.atomic_data = fc_be64(frame + place + 12)
        out.atomic_compare = fc_be64(frame + place + 20)
        place += 28
    if has & FC_HAS_AETH:
        out.aeth = fc_be32(frame + place)
        place += 4
    if has & FC_HAS_ATOMIC_ACK:
        out.atomic_data = fc_be64(frame + place)
        place += 8
    if has & FC_HAS_IMMEDIATE:
        out.immediate = fc_be32(frame + place)
        place += 4
    if has & FC_HAS_INVALIDATE:
        out.rkey = fc_be32(frame + place)
        place += 4
    out.payload_offset = place
    if end - place < out.pad:
        return FC_WIRE_PAD
    out.payload_length = end - place - out.pad
    if not has & FC_IS_RC:
        return FC_WIRE_OK  # nothing more is known of vendors' opcodes, and nothing needed of the others
    if (end - place) & 3 or (out.pad and not has & FC_IS_LAST):
        return FC_WIRE_PAD
    if out.payload_length == 0:
        # only a message of no bytes at all has an empty packet
        if has & FC_HAS_PAYLOAD and not (has & FC_IS_FIRST and has & FC_IS_LAST):
            return FC_WIRE_PAYLOAD
    elif not has & FC_HAS_PAYLOAD:
        return FC_WIRE_PAYLOAD
    if has & FC_HAS_RETH and out.opcode != FC_OP_READ_REQUEST:
        if has & FC_IS_LAST:
            if out.dma_length != out.payload_length:
                return FC_WIRE_DMA_LENGTH
        elif out.dma_length <= out.payload_length:
            return FC_WIRE_DMA_LENGTH
    return FC_WIRE_OK

cdef inline int fc_decode(const uint8_t *frame, uint32_t length, fc_wire *out) noexcept nogil:
    """Decode an Ethernet frame of `length` bytes; return FC_WIRE_OK, FC_WIRE_NOT_ROCE or why it is malformed.

    `out` is whole only after FC_WIRE_OK. Addresses are valid as soon as the IP header was. The ICRC is not looked at.
    """
    cdef uint32_t place = 14, end = 0, transport = 0
    cdef int tags = 0, result
    cdef uint16_t ether_type
    cdef bint fragment = False
    cdef const rte_udp_hdr *udp
    if length < 14:
        return FC_WIRE_CUT
    ether_type = rte_be_to_cpu_16((<const rte_ether_hdr *> frame).ether_type)
    while ether_type == 0x8100 or ether_type == 0x88A8 or ether_type == 0x9100:
        if tags == FC_VLAN_TAGS:
            return FC_WIRE_NOT_ROCE
        if length - place < 4:
            return FC_WIRE_CUT
        ether_type = rte_be_to_cpu_16((<const rte_vlan_hdr *> (frame + place)).eth_proto)
        place += 4
        tags += 1
    out.ip_offset = place
    if ether_type == 0x0800:
        result = fc_decode_ipv4(frame, length, place, out, &transport, &end, &fragment)
    elif ether_type == 0x86DD:
        result = fc_decode_ipv6(frame, length, place, out, &transport, &end, &fragment)
    else:
        return FC_WIRE_NOT_ROCE
    if result != FC_WIRE_OK:
        return result
    if transport + 8 > length:
        return FC_WIRE_CUT
    udp = <const rte_udp_hdr *> (frame + transport)
    if rte_be_to_cpu_16(udp.dst_port) != FC_ROCE_PORT:
        return FC_WIRE_NOT_ROCE
    if transport + 8 + 12 <= length:
        out.bth_offset = <uint16_t> (transport + 8)  # set whatever comes: a whole BTH is what makes a RoCE frame
    if fragment:
        return FC_WIRE_FRAGMENT
    if end < transport + 8:
        return FC_WIRE_IP_LENGTH
    if end > length:
        return FC_WIRE_CUT
    if rte_be_to_cpu_16(udp.dgram_len) != end - transport:
        return FC_WIRE_UDP_LENGTH
    if end - transport < 8 + 12 + 4:
        return FC_WIRE_BTH
    out.ip_headers = transport - out.ip_offset
    out.source_port = rte_be_to_cpu_16(udp.src_port)
    out.length = end
    return fc_decode_transport(frame, transport + 8, end - 4, out)

cdef inline bint fc_icrc_right(const uint8_t *frame, const fc_wire *wire) noexcept nogil:
    """Whether the invariant checksum of a frame that fc_decode found right is the one at its end (little-endian)."""
    cdef const uint8_t *stored = frame + wire.length - 4
    return fc_icrc(frame + wire.ip_offset, wire.ip_headers, wire.length - 4 - wire.ip_offset) == (
        stored[0] | (<uint32_t> stored[1] << 8) | (<uint32_t> stored[2] << 16) | (<uint32_t> stored[3] << 24))
