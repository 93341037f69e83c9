# SPDX-License-Identifier: MIT
# Whether a packet of a data queue pair is where its PSN says (judge), and how a flow whose place is not known finds it
# again (prove).
#
# LL and LL128: the first line of every packet carries the step of its message, so every packet with payload is checked
# against absolute evidence, however long the flow was silent. Simple has no flags. There a packet's place is proved by
# the address and length in the RETH of its message, or by lying between two packets that are; a packet that is neither
# yet is held back (FC_HOLD). A PSN alone is trusted only from the start of the job, and while too little time has passed
# for the sequence to have come round; after that a fresh credit, which carries an absolute message number, must agree.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from flowcheck._formats cimport FC_ENCODING_LL, FC_ENCODING_LL128, FC_ENCODING_PLAIN, fc_row
from flowcheck._wire cimport (
    FC_HAS_IMMEDIATE, FC_HAS_RETH, FC_OP_WRITE_FIRST, FC_OP_WRITE_LAST, FC_OP_WRITE_LAST_IMM, FC_OP_WRITE_MIDDLE,
    FC_OP_WRITE_ONLY, FC_OP_WRITE_ONLY_IMM, fc_wire)
from packet_parser._program cimport fc_locate_count, fc_locate_position, fc_message, fc_place, fc_position, fc_table

cdef extern from *:
    uint32_t fc_swap32 "__builtin_bswap32" (uint32_t value) nogil

cdef enum:
    # Why a packet is unsynchronised; packet_parser/reasons.py names them.
    FC_HOLD = -2
    FC_PROVED = -1
    FC_UNPROVED = 0
    FC_CONTRADICTS_POSITION = 1
    FC_CONTRADICTS_OPCODE = 2
    FC_CONTRADICTS_LENGTH = 3
    FC_CONTRADICTS_IMMEDIATE = 4
    FC_CONTRADICTS_FLAG = 5
    FC_CONTRADICTS_ADDRESS = 6
    FC_CREDIT_TAG = 7
    FC_EARLIER_ATTEMPT = 8
    FC_REASONS = 9

    FC_LINE_BYTES = 16          # of LL: data, flag, data, flag; four bytes each
    FC_LINE128_BYTES = 128      # of LL128: 15 words of data, one of flag; eight bytes each
    FC_CLEAN_STEPS = 8          # LL: the last steps before every multiple of 2^31 fill their slot
    FC_WALK = 65536             # messages that are counted one by one at most
    FC_CREDIT_NEAR = 64         # messages that a flow may be away from the newest credit: eight are in flight at most
    FC_PSN_NEAR = 1 << 22
    FC_STEPS_NEAR = 1 << 30

# What is known of a data queue pair; part of the parser's published state.
cdef struct fc_sync:
    uint64_t position           # packet number, in the layout, of the first packet of the last accepted packet's message
    uint64_t step               # of that message
    uint64_t base               # address of the connection's slot 0
    uint64_t proved_from        # Simple: packets from here ..
    uint64_t proved_to          # .. to before here lie between proved ones
    uint64_t last_ns            # reception of the last accepted packet
    uint64_t message            # number of that message on its connection
    uint64_t credit_message     # number of the message that the newest credit allows
    uint64_t credit_ns          # its reception; 0: there was none
    uint64_t credit_far         # number in a credit that is far from the newest, and not confirmed by another yet
    uint32_t psn                # of the message's first packet
    uint32_t packets            # of the message
    uint32_t previous_psn       # of the last packet, accepted or not
    uint8_t synchronised
    uint8_t known               # it was synchronised once: `step` is near
    uint8_t based               # `base` is known
    uint8_t refused             # a credit contradicts the edge: nothing is accepted any more
    uint8_t boundary            # the last packet ended a message: the next PSN begins one
    uint8_t started             # a packet was seen
    uint8_t doubtful            # `credit_far` is set
    uint8_t reserved[5]

# How a message, or a queue pair's piece of one, lies in packets.
cdef struct fc_shape:
    uint32_t wire_bytes
    uint32_t message_wire_bytes
    uint32_t offset             # of the piece in its message
    uint32_t address            # of the piece in its slot
    uint32_t packets
    uint32_t bulk_split

# A data queue pair with its table.
cdef struct fc_data_flow:
    fc_table table
    fc_place place              # of the last located packet, a cache
    fc_shape clean              # LL: of a message that fills its slot
    uint64_t silence_ns         # in less time the sequence cannot have come round
    uint64_t enter_before       # packet number before which a new ring's flow must be found first; 0: anywhere
    uint32_t mtu
    uint32_t slot_stride
    uint32_t slots
    uint32_t start_psn
    uint16_t connection
    uint8_t queue_pair
    uint8_t encoding
    uint8_t big_endian_immediate
    uint8_t numbered_immediate  # it is the message's number on the connection, not its bytes

cdef inline uint32_t fc_word(const uint8_t *bytes) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, bytes, 4)
    return value

cdef inline uint64_t fc_double_word(const uint8_t *bytes) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, bytes, 8)
    return value

cdef inline int64_t fc_distance(uint32_t psn, uint32_t other) noexcept nogil:
    """Return psn - other as the nearest of the differences of two 24-bit numbers."""
    return <int64_t> (<int32_t> ((psn - other) << 8) >> 8)

cdef inline bint fc_is_clean(const fc_data_flow *flow, uint64_t step) noexcept nogil:
    return flow.encoding == FC_ENCODING_LL and (step + FC_CLEAN_STEPS & 0x7FFFFFFF) < FC_CLEAN_STEPS

cdef inline bint fc_clean_between(const fc_data_flow *flow, uint64_t first, uint64_t last) noexcept nogil:
    """Whether any of two messages and those between them fills its slot."""
    cdef uint64_t low = (first if first < last else last) + FC_CLEAN_STEPS
    cdef uint64_t high = (last if first < last else first) + FC_CLEAN_STEPS
    return flow.encoding == FC_ENCODING_LL and (low >> 31 != high >> 31 or (low & 0x7FFFFFFF) < FC_CLEAN_STEPS)

cdef inline uint32_t fc_packets(const fc_data_flow *flow, const fc_place *place) noexcept nogil:
    return flow.clean.packets if fc_is_clean(flow, place.step) else place.row.packets

cdef inline void fc_shape_of(const fc_data_flow *flow, const fc_place *place, fc_shape *shape) noexcept nogil:
    if fc_is_clean(flow, place.step):
        shape[0] = flow.clean
        return
    shape.wire_bytes = place.row.wire_bytes
    shape.message_wire_bytes = place.row.message_wire_bytes
    shape.offset = place.row.message_wire_offset
    shape.address = place.row.address_offset
    shape.packets = place.row.packets
    shape.bulk_split = place.row.bulk_split

cdef inline bint fc_walk(const fc_data_flow *flow, uint64_t position, int64_t behind, fc_place *place) noexcept nogil:
    """Find the packet `behind` packets after the first one of the message at `position`, message by message."""
    cdef uint32_t tried
    for tried in range(FC_WALK):
        if not fc_locate_position(&flow.table, position, place):
            return False
        position = fc_position(place) - place.packet  # of its first packet
        if behind < 0:
            if position == 0 or not fc_locate_position(&flow.table, position - 1, place):
                return False
            position = fc_position(place) - place.packet
            behind += fc_packets(flow, place)
            if behind < 0:
                continue
        if behind < fc_packets(flow, place):
            place.packet = <uint32_t> behind
            return True
        behind -= fc_packets(flow, place)
        position += place.row.packets
    return False

cdef inline bint fc_follow(fc_data_flow *flow, const fc_sync *sync, uint32_t psn) noexcept nogil:
    """Set flow.place to where a PSN is, counted from the last accepted packet; False outside of the layout."""
    cdef int64_t behind = fc_distance(psn, sync.psn)
    cdef int64_t position = <int64_t> (sync.position + <uint64_t> behind)  # of a ring's published state: any number
    # The layout counts clean messages by what they carry: far behind them it may seem that there was nothing.
    if fc_clean_between(flow, sync.step, sync.step) or (position < 0 and flow.encoding == FC_ENCODING_LL):
        return fc_walk(flow, sync.position, behind, &flow.place)
    if position < 0 or not fc_locate_position(&flow.table, position, &flow.place):
        return False
    if fc_clean_between(flow, sync.step, flow.place.step):
        return fc_walk(flow, sync.position, behind, &flow.place)
    return True

cdef inline void fc_accept(const fc_data_flow *flow, fc_sync *sync, const fc_wire *wire, uint64_t now) noexcept nogil:
    """Count on from the packet at flow.place."""
    cdef uint32_t index = flow.place.packet
    sync.packets = fc_packets(flow, &flow.place)
    sync.position = flow.place.psn + flow.place.row.psn
    sync.psn = (wire.psn - index) & 0xFFFFFF
    sync.step = flow.place.step
    sync.message = fc_message(&flow.place)
    sync.last_ns = now
    sync.synchronised = sync.known = True

cdef inline int fc_check(const fc_data_flow *flow, fc_sync *sync, const fc_place *place, const fc_wire *wire,
                         const uint8_t *payload) noexcept nogil:
    """Compare a packet with the layout at `place`; return FC_PROVED or what contradicts. Learns the base address."""
    cdef fc_shape shape
    cdef uint32_t data_packets, index = place.packet, expected
    cdef uint64_t offset
    fc_shape_of(flow, place, &shape)
    data_packets = shape.packets - shape.bulk_split
    if wire.has & FC_HAS_IMMEDIATE and (
            <uint32_t> fc_message(place) if flow.numbered_immediate else shape.message_wire_bytes) != (
            wire.immediate if flow.big_endian_immediate else fc_swap32(wire.immediate)):
        return FC_CONTRADICTS_IMMEDIATE
    if index == data_packets:  # the empty write that ends a message of the adaptive-routing form
        if wire.opcode != FC_OP_WRITE_ONLY_IMM:
            return FC_CONTRADICTS_OPCODE
        if wire.payload_length:
            return FC_CONTRADICTS_LENGTH
        return FC_CONTRADICTS_ADDRESS if wire.va or wire.rkey else FC_PROVED
    # A network adapter may send a write without immediate as one write per packet, each with its own address.
    if wire.opcode == FC_OP_WRITE_ONLY:
        if not shape.bulk_split:
            return FC_CONTRADICTS_OPCODE
    elif data_packets == 1:
        if shape.bulk_split or wire.opcode != FC_OP_WRITE_ONLY_IMM:
            return FC_CONTRADICTS_OPCODE
    elif index == 0:
        if wire.opcode != FC_OP_WRITE_FIRST:
            return FC_CONTRADICTS_OPCODE
        if wire.dma_length != shape.wire_bytes:
            return FC_CONTRADICTS_LENGTH
    elif index + 1 < data_packets:
        if wire.opcode != FC_OP_WRITE_MIDDLE:
            return FC_CONTRADICTS_OPCODE
    elif wire.opcode != (FC_OP_WRITE_LAST if shape.bulk_split else FC_OP_WRITE_LAST_IMM):
        return FC_CONTRADICTS_OPCODE
    expected = flow.mtu if index + 1 < data_packets else shape.wire_bytes - (data_packets - 1) * flow.mtu
    if wire.payload_length != expected:
        return FC_CONTRADICTS_LENGTH
    if expected and flow.encoding == FC_ENCODING_LL:
        if (fc_word(payload + 4) != <uint32_t> (place.step + 1) or fc_word(payload + 12) != <uint32_t> (place.step + 1)):
            return FC_CONTRADICTS_FLAG
    elif expected and flow.encoding == FC_ENCODING_LL128:
        if fc_double_word(payload + FC_LINE128_BYTES - 8) != place.step + 1:
            return FC_CONTRADICTS_FLAG
    if wire.has & FC_HAS_RETH:
        offset = (place.step % flow.slots) * flow.slot_stride + shape.address + index * flow.mtu
        if not sync.based:
            sync.base = wire.va - offset
            sync.based = True
        elif wire.va != sync.base + offset:
            return FC_CONTRADICTS_ADDRESS
    return FC_PROVED

cdef inline bint fc_prove_index(const fc_data_flow *flow, const fc_sync *sync, fc_place *place,
                                const fc_wire *wire) noexcept nogil:
    """Find which packet of the message at `place` this one must be, without trusting any count of packets."""
    cdef fc_shape shape
    cdef uint32_t data_packets
    cdef uint64_t offset
    fc_shape_of(flow, place, &shape)
    data_packets = shape.packets - shape.bulk_split
    if wire.opcode == FC_OP_WRITE_FIRST or wire.opcode == FC_OP_WRITE_ONLY_IMM:
        place.packet = 0
        return True
    if wire.opcode == FC_OP_WRITE_LAST or wire.opcode == FC_OP_WRITE_LAST_IMM:
        place.packet = data_packets - 1
        return True
    if wire.opcode != FC_OP_WRITE_ONLY:
        return False  # in the middle of a message
    if sync.based:
        offset = wire.va - sync.base - (place.step % flow.slots) * flow.slot_stride - shape.address
        place.packet = <uint32_t> (offset / flow.mtu)
        return offset % flow.mtu == 0 and offset / flow.mtu < data_packets
    if sync.boundary and wire.psn == (sync.previous_psn + 1 & 0xFFFFFF):
        place.packet = 0
        return True
    place.packet = data_packets - 1
    return data_packets == 1 or wire.payload_length < flow.mtu

cdef inline bint fc_nearest_step(const fc_data_flow *flow, const fc_sync *sync, uint64_t *near) noexcept nogil:
    """Set the step that 32 bits of a step are to be read next to; False if that is in doubt.

    It is the last one that was seen, unless a credit says that so many have passed since that the bits may have come round.
    """
    cdef fc_place place
    cdef int64_t away
    near[0] = sync.step
    if sync.credit_ns == 0 or not fc_locate_count(
            &flow.table, sync.credit_far if sync.doubtful else sync.credit_message, False, &place):
        return True
    away = <int64_t> (place.step - sync.step)
    if -FC_STEPS_NEAR < away < FC_STEPS_NEAR:
        return True
    near[0] = place.step
    return not sync.doubtful

cdef inline bint fc_prove_by_flag(fc_data_flow *flow, fc_sync *sync, const fc_wire *wire, const uint8_t *payload,
                                  uint64_t now) noexcept nogil:
    """Try to find a flow's place by this one packet: its flag names the message.

    True: flow.place is the packet's, and the flow is synchronised. The slot address of an earlier synchronisation
    places a write of its own address within its message, but never stands against a packet that begins a message.
    """
    cdef fc_place place
    cdef fc_sync found = sync[0]
    cdef uint32_t flag
    cdef uint64_t near
    if flow.encoding == FC_ENCODING_LL128:
        if wire.payload_length < FC_LINE128_BYTES:
            return False
        place.step = fc_double_word(payload + FC_LINE128_BYTES - 8) - 1
    else:
        if wire.payload_length < FC_LINE_BYTES:
            return False
        flag = fc_word(payload + 4)
        place.step = <uint32_t> (flag - 1)
        if sync.known:  # the flag is the low half of the step + 1
            if not fc_nearest_step(flow, sync, &near):
                return False
            place.step = near + <int64_t> <int32_t> (flag - 1 - <uint32_t> near)
    if <int64_t> place.step < 0:
        return False
    found.step = place.step
    if (not fc_locate_count(&flow.table, place.step, True, &place) or place.step != found.step
            or not fc_prove_index(flow, sync, &place, wire)):
        return False
    if wire.opcode == FC_OP_WRITE_FIRST or wire.opcode == FC_OP_WRITE_ONLY_IMM:
        found.based = False
    if fc_check(flow, &found, &place, wire, payload) != FC_PROVED:
        return False
    sync[0] = found
    flow.place = place
    fc_accept(flow, sync, wire, now)
    return True

cdef inline bint fc_within(uint64_t then, uint64_t now, uint64_t span_ns) noexcept nogil:
    """Whether two times are less than a span apart, whichever comes first: clocks go back."""
    return (now - then if now > then else then - now) < span_ns

cdef inline bint fc_fresh(const fc_data_flow *flow, uint64_t then, uint64_t now) noexcept nogil:
    """Whether too little time has passed since `then` for the sequence to have come round."""
    return fc_within(then, now, flow.silence_ns)

cdef inline bint fc_is_near(uint64_t message, uint64_t other) noexcept nogil:
    return -FC_CREDIT_NEAR <= <int64_t> (message - other) <= FC_CREDIT_NEAR

cdef inline bint fc_is_round_again(const fc_data_flow *flow, const fc_sync *sync, uint64_t message) noexcept nogil:
    """Whether a credit's message is so far away that a flow of LL may have its place by a flag that has come round."""
    cdef int64_t away = <int64_t> (message - sync.message)
    return flow.encoding == FC_ENCODING_LL and not -FC_STEPS_NEAR < away < FC_STEPS_NEAR

cdef inline void fc_note_credit(fc_data_flow *flow, fc_sync *sync, uint64_t message, uint64_t now) noexcept nogil:
    """Take the message number of a credit as where the connection is now.

    One that is far from the newest says that much was not seen, or that it comes late itself: which of them, the next
    credit tells. Until then nothing in Simple is where it was thought to be.
    """
    if sync.credit_ns:
        if not fc_is_near(message, sync.credit_message):
            if not sync.doubtful or not fc_is_near(message, sync.credit_far):
                sync.credit_far = message
                sync.doubtful = True
                if flow.encoding == FC_ENCODING_PLAIN or fc_is_round_again(flow, sync, message):
                    sync.synchronised = False
                return
        elif message <= sync.credit_message:
            return  # it repeats an earlier one, and says nothing of now
    sync.credit_message = message
    sync.credit_ns = now
    sync.doubtful = False
    if fc_is_round_again(flow, sync, message) or (
            flow.encoding == FC_ENCODING_PLAIN and not fc_is_near(message, sync.message)):
        sync.synchronised = False

cdef inline void fc_lose_time(fc_data_flow *flow, fc_sync *sync) noexcept nogil:
    """Forget what rests on how long ago something was: the clock has gone back."""
    sync.last_ns = sync.credit_ns = 0
    sync.doubtful = False
    if flow.encoding == FC_ENCODING_PLAIN:
        sync.synchronised = False

cdef inline bint fc_prove_by_count(fc_data_flow *flow, fc_sync *sync, const fc_wire *wire, const uint8_t *payload,
                                   uint64_t now) noexcept nogil:
    """Try to find a flow's place by a packet with a RETH, and by what says which round of the sequence it is in.

    That is the start of the job, the last accepted packet if it is not long ago, or a credit that is not.
    """
    cdef uint64_t near
    cdef int64_t position
    if not wire.has & FC_HAS_RETH or sync.doubtful:
        return False
    if flow.encoding == FC_ENCODING_PLAIN and sync.credit_ns and fc_fresh(flow, sync.credit_ns, now):
        if not fc_locate_count(&flow.table, sync.credit_message, False, &flow.place):
            return False
        near = fc_position(&flow.place)
        position = <int64_t> near + fc_distance(wire.psn, flow.start_psn + <uint32_t> near & 0xFFFFFF)
        flow.place.row = NULL
        if position < 0 or not fc_locate_position(&flow.table, position, &flow.place):
            return False
        if (not fc_is_near(fc_message(&flow.place), sync.credit_message)
                or not -FC_PSN_NEAR < position - <int64_t> near < FC_PSN_NEAR):
            return False
    elif sync.known:
        if not fc_fresh(flow, sync.last_ns, now) or not fc_follow(flow, sync, wire.psn):
            return False
    elif sync.started or wire.psn != flow.start_psn or not fc_locate_position(&flow.table, 0, &flow.place):
        return False
    if fc_check(flow, sync, &flow.place, wire, payload) != FC_PROVED:
        return False
    fc_accept(flow, sync, wire, now)
    sync.proved_from = sync.position
    sync.proved_to = sync.position + flow.place.row.packets
    return True

cdef inline bint fc_extend_proof(fc_data_flow *flow, fc_sync *sync, const fc_wire *wire) noexcept nogil:
    """Say whether the checked packet at flow.place is proved to be there; one with a RETH proves all before it."""
    cdef uint64_t begin = flow.place.psn + flow.place.row.psn
    if flow.encoding != FC_ENCODING_PLAIN or flow.place.packet >= flow.place.row.packets - flow.place.row.bulk_split:
        return True  # or it ends a message of the adaptive-routing form, and has neither bytes nor an address
    if wire.has & FC_HAS_RETH:
        if begin + flow.place.row.packets > sync.proved_to:
            sync.proved_to = begin + flow.place.row.packets
        return True
    return sync.proved_from <= fc_position(&flow.place) < sync.proved_to

cdef inline int fc_judge(fc_data_flow *flow, fc_sync *sync, const fc_wire *wire, const uint8_t *payload,
                         uint64_t now, bint begins) noexcept nogil:
    """Judge a request packet of a data queue pair: FC_PROVED, with its place in flow.place, or why it is not.

    `begins`: the ring is new, so that what is proved to lie behind the attempt's first message is an earlier attempt's,
    whose queue pair had the same number. A contradiction ends the flow's synchronisation; the packet that contradicts never counts. FC_HOLD: it is where it
    should be, but only a later packet can prove that; nothing has changed.
    """
    cdef int reason = FC_UNPROVED
    cdef bint found
    cdef fc_sync before
    if sync.refused:
        return FC_CREDIT_TAG
    if sync.synchronised and flow.encoding == FC_ENCODING_PLAIN and not fc_fresh(flow, sync.last_ns, now):
        sync.synchronised = False
        flow.place.row = NULL
    if sync.synchronised:
        if not fc_follow(flow, sync, wire.psn):
            reason = FC_CONTRADICTS_POSITION
        else:
            reason = fc_check(flow, sync, &flow.place, wire, payload)
        if reason == FC_PROVED and not fc_extend_proof(flow, sync, wire):
            if fc_position(&flow.place) >= sync.proved_to:
                return FC_HOLD
            return FC_UNPROVED  # repeats what came before the flow was synchronised
        if reason == FC_PROVED:
            fc_accept(flow, sync, wire, now)
        else:
            sync.synchronised = False
            flow.place.row = NULL
    else:
        before = sync[0]
        if flow.encoding == FC_ENCODING_PLAIN:
            found = fc_prove_by_count(flow, sync, wire, payload, now)
        else:
            found = fc_prove_by_flag(flow, sync, wire, payload, now)
            if not found and wire.payload_length == 0 and not sync.started:
                found = fc_prove_by_count(flow, sync, wire, payload, now)  # the job's first message is an empty one
        if found and begins and not before.known and flow.enter_before and fc_position(&flow.place) >= flow.enter_before:
            sync[0] = before
            found, reason = False, FC_EARLIER_ATTEMPT
        if found:
            reason = FC_PROVED
        else:
            flow.place.row = NULL
    sync.started = True
    sync.previous_psn = wire.psn
    sync.boundary = (wire.has & FC_HAS_IMMEDIATE) != 0
    return reason

cdef inline uint32_t fc_inner(const fc_data_flow *flow) noexcept nogil:
    """Return how many packets lie between the first and the last data packet of the message at flow.place.

    0 where they cannot be counted from the message's first PSN alone.
    """
    cdef uint32_t data_packets = flow.place.row.packets - flow.place.row.bulk_split
    if data_packets < 3 or fc_clean_between(flow, flow.place.step, flow.place.step):
        return 0
    return data_packets - 2

cdef inline bint fc_is_inner(const fc_data_flow *flow, const fc_sync *sync, uint32_t inner, uint32_t psn,
                             const uint8_t *payload, uint64_t now) noexcept nogil:
    """Whether fc_judge would prove a WRITE MIDDLE of `mtu` bytes to be inside of the message at flow.place.

    `inner`: the fc_inner of that message, of which the last accepted packet is; 0 never is one.
    """
    cdef uint32_t index = psn - sync.psn & 0xFFFFFF
    if index - 1 >= inner or not sync.synchronised or sync.refused:  # before the first wraps to a huge number
        return False
    if flow.encoding == FC_ENCODING_PLAIN:
        return fc_fresh(flow, sync.last_ns, now) and sync.proved_from <= sync.position + index < sync.proved_to
    if flow.encoding == FC_ENCODING_LL:
        return (fc_word(payload + 4) == <uint32_t> (flow.place.step + 1)
                and fc_word(payload + 12) == <uint32_t> (flow.place.step + 1))
    return fc_double_word(payload + FC_LINE128_BYTES - 8) == flow.place.step + 1

cdef inline void fc_accept_inner(fc_sync *sync, uint32_t psn, uint64_t now) noexcept nogil:
    """Count on from a packet inside of the message that the last accepted one is of."""
    sync.last_ns = now
    sync.previous_psn = psn
    sync.boundary = False
