# SPDX-License-Identifier: MIT
# Whether a packet of a data queue pair is where its PSN says (judge), and how a flow whose place is not known finds it
# again (prove). LL: every packet's first line carries the step of its message, so every packet with payload is checked
# against absolute evidence, however long the flow was silent.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from flowcheck._wire cimport (
    FC_HAS_IMMEDIATE, FC_HAS_RETH, FC_OP_WRITE_FIRST, FC_OP_WRITE_LAST, FC_OP_WRITE_LAST_IMM, FC_OP_WRITE_MIDDLE,
    FC_OP_WRITE_ONLY, FC_OP_WRITE_ONLY_IMM, fc_wire)
from packet_parser._program cimport fc_locate_position, fc_locate_step, fc_place, fc_position, fc_table

cdef extern from *:
    uint32_t fc_swap32 "__builtin_bswap32" (uint32_t value) nogil

cdef enum:
    # Why a packet is unsynchronised; packet_parser/reasons.py names them.
    FC_PROVED = -1
    FC_UNPROVED = 0
    FC_CONTRADICTS_POSITION = 1
    FC_CONTRADICTS_OPCODE = 2
    FC_CONTRADICTS_LENGTH = 3
    FC_CONTRADICTS_IMMEDIATE = 4
    FC_CONTRADICTS_FLAG = 5
    FC_CONTRADICTS_ADDRESS = 6
    FC_CREDIT_TAG = 7
    FC_REASONS = 8

    FC_LINE_BYTES = 16          # of LL: data, flag, data, flag; four bytes each

# What is known of a data queue pair; part of the parser's published state.
cdef struct fc_sync:
    uint64_t position           # packet number of the last accepted packet
    uint64_t step               # of its message
    uint64_t base               # address of the connection's slot 0
    uint32_t psn                # of the last accepted packet
    uint32_t previous_psn       # of the last packet, accepted or not
    uint8_t synchronised
    uint8_t known               # it was synchronised once: `step` is near
    uint8_t based               # `base` is known
    uint8_t refused             # a credit contradicts the edge: nothing is accepted any more
    uint8_t boundary            # the last packet ended a message: the next PSN begins one
    uint8_t reserved[3]

# A data queue pair with its table.
cdef struct fc_data_flow:
    fc_table table
    fc_place place              # of the last located packet, a cache
    uint32_t mtu
    uint32_t slot_stride
    uint32_t slots
    uint16_t connection

cdef inline uint32_t fc_flag_at(const uint8_t *word) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, word, 4)
    return value

cdef inline int fc_check(const fc_data_flow *flow, fc_sync *sync, const fc_place *place, const fc_wire *wire,
                         const uint8_t *payload) noexcept nogil:
    """Compare a packet with the layout at `place`; return FC_PROVED or what contradicts. Learns the base address."""
    cdef uint32_t data_packets = place.row.packets - place.row.bulk_split
    cdef uint32_t wire_bytes = place.row.wire_bytes, index = place.packet, expected
    cdef uint64_t offset
    if wire.has & FC_HAS_IMMEDIATE and fc_swap32(wire.immediate) != wire_bytes:
        return FC_CONTRADICTS_IMMEDIATE
    if index == data_packets:  # the empty write that ends a message of the adaptive-routing form
        if wire.opcode != FC_OP_WRITE_ONLY_IMM:
            return FC_CONTRADICTS_OPCODE
        if wire.payload_length:
            return FC_CONTRADICTS_LENGTH
        return FC_CONTRADICTS_ADDRESS if wire.va or wire.rkey else FC_PROVED
    # A network adapter may send a write without immediate as one write per packet, each with its own address.
    if wire.opcode == FC_OP_WRITE_ONLY:
        if not place.row.bulk_split:
            return FC_CONTRADICTS_OPCODE
    elif data_packets == 1:
        if place.row.bulk_split or wire.opcode != FC_OP_WRITE_ONLY_IMM:
            return FC_CONTRADICTS_OPCODE
    elif index == 0:
        if wire.opcode != FC_OP_WRITE_FIRST:
            return FC_CONTRADICTS_OPCODE
        if wire.dma_length != wire_bytes:
            return FC_CONTRADICTS_LENGTH
    elif index + 1 < data_packets:
        if wire.opcode != FC_OP_WRITE_MIDDLE:
            return FC_CONTRADICTS_OPCODE
    elif wire.opcode != (FC_OP_WRITE_LAST if place.row.bulk_split else FC_OP_WRITE_LAST_IMM):
        return FC_CONTRADICTS_OPCODE
    expected = flow.mtu if index + 1 < data_packets else wire_bytes - (data_packets - 1) * flow.mtu
    if wire.payload_length != expected:
        return FC_CONTRADICTS_LENGTH
    if expected and (fc_flag_at(payload + 4) != <uint32_t> (place.step + 1)
                     or fc_flag_at(payload + 12) != <uint32_t> (place.step + 1)):
        return FC_CONTRADICTS_FLAG
    if wire.has & FC_HAS_RETH:
        offset = (place.step % flow.slots) * flow.slot_stride + place.row.message_wire_offset + index * flow.mtu
        if not sync.based:
            sync.base = wire.va - offset
            sync.based = True
        elif wire.va != sync.base + offset:
            return FC_CONTRADICTS_ADDRESS
    return FC_PROVED

cdef inline bint fc_prove_index(const fc_data_flow *flow, const fc_sync *sync, fc_place *place,
                                const fc_wire *wire) noexcept nogil:
    """Find which packet of the message at `place` this one must be, without trusting any count of packets."""
    cdef uint32_t data_packets = place.row.packets - place.row.bulk_split
    cdef uint64_t offset
    if wire.opcode == FC_OP_WRITE_FIRST or wire.opcode == FC_OP_WRITE_ONLY_IMM:
        place.packet = 0
        return True
    if wire.opcode == FC_OP_WRITE_LAST or wire.opcode == FC_OP_WRITE_LAST_IMM:
        place.packet = data_packets - 1
        return True
    if wire.opcode != FC_OP_WRITE_ONLY:
        return False  # in the middle of a message
    if sync.based:
        offset = (wire.va - sync.base - (place.step % flow.slots) * flow.slot_stride
                  - place.row.message_wire_offset)
        place.packet = <uint32_t> (offset / flow.mtu)
        return offset % flow.mtu == 0 and offset / flow.mtu < data_packets
    if sync.boundary and wire.psn == (sync.previous_psn + 1 & 0xFFFFFF):
        place.packet = 0
        return True
    place.packet = data_packets - 1
    return data_packets == 1 or wire.payload_length < flow.mtu

cdef inline bint fc_prove(fc_data_flow *flow, fc_sync *sync, const fc_wire *wire, const uint8_t *payload) noexcept nogil:
    """Try to find a flow's place by absolute evidence in this one packet: its flag names the message.

    True: flow.place is the packet's, and the flow is synchronised. The slot address of an earlier synchronisation
    places a write of its own address within its message, but never stands against a packet that begins a message.
    """
    cdef fc_place place
    cdef fc_sync found = sync[0]
    cdef uint32_t flag
    if wire.payload_length < FC_LINE_BYTES:
        return False
    flag = fc_flag_at(payload + 4)
    if sync.known:  # the flag is the low half of the step + 1
        place.step = sync.step + <int64_t> <int32_t> (flag - 1 - <uint32_t> sync.step)
        if <int64_t> place.step < 0:
            return False
    else:
        place.step = <uint32_t> (flag - 1)
    if not fc_locate_step(&flow.table, place.step, &place) or not fc_prove_index(flow, sync, &place, wire):
        return False
    if wire.opcode == FC_OP_WRITE_FIRST or wire.opcode == FC_OP_WRITE_ONLY_IMM:
        found.based = False
    if fc_check(flow, &found, &place, wire, payload) != FC_PROVED:
        return False
    found.synchronised = True
    found.known = True
    found.position = fc_position(&place)
    found.psn = wire.psn
    found.step = place.step
    sync[0] = found
    flow.place = place
    return True

cdef inline int fc_judge(fc_data_flow *flow, fc_sync *sync, const fc_wire *wire, const uint8_t *payload) noexcept nogil:
    """Judge a request packet of a data queue pair: FC_PROVED, with its place in flow.place, or why it is not.

    A contradiction ends the flow's synchronisation; the packet that contradicts never counts.
    """
    cdef int reason = FC_UNPROVED
    cdef int64_t position
    if sync.refused:
        return FC_CREDIT_TAG
    if sync.synchronised:
        # the difference of two 24-bit numbers, with its sign
        position = <int64_t> sync.position + (<int32_t> ((wire.psn - sync.psn) << 8) >> 8)
        if position < 0 or not fc_locate_position(&flow.table, position, &flow.place):
            reason = FC_CONTRADICTS_POSITION
        else:
            reason = fc_check(flow, sync, &flow.place, wire, payload)
        if reason == FC_PROVED:
            sync.position = position
            sync.psn = wire.psn
            sync.step = flow.place.step
        else:
            sync.synchronised = False
            flow.place.row = NULL
    elif fc_prove(flow, sync, wire, payload):
        reason = FC_PROVED
    sync.previous_psn = wire.psn
    sync.boundary = (wire.has & FC_HAS_IMMEDIATE) != 0
    return reason
