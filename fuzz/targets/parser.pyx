# SPDX-License-Identifier: MIT
"""Input: what a few records of a ring hold, as commands; the parser annotates them, in bursts.

A command begins with a byte of flags:

    bits 0-1  0 the next packet of a queue pair's layout   1 bytes as they come   2 a credit   3 the packet before, again
    bit 2     its checksum is not mended
    bit 3     a byte of it is changed: offset (1), exclusive-or (1)
    bit 4     time goes on by 2 to the power of (1)
    bit 5     the record holds (1) bytes less
    bit 6     the parser is polled before it
    bit 7     opcode (1)

Packets follow their queue pair's table, so most inputs get as far as a place; what they change decides what is found there.
The first byte of all says which parser: of both directions or one, and whether its published state is what comes next
in the input, as it may lie in a file. The frame behind its stored length may not be touched.
"""

include "../../packet_parser/_parser.pyx"
include "_frames.pxi"

from posix.stdlib cimport posix_memalign

from flowcheck._formats cimport FC_ENCODING_PLAIN, FC_PARTIAL_SUM
from flowcheck._wire cimport FC_OP_WRITE_FIRST, FC_OP_WRITE_LAST, FC_OP_WRITE_LAST_IMM, FC_OP_WRITE_MIDDLE, FC_OP_WRITE_ONLY_IMM
from packet_parser._program cimport fc_locate_position, fc_message, fc_place
from packet_parser._sync cimport fc_shape, fc_shape_of, fc_swap32

from fuzz import fixture

cdef enum:
    FLOWS = 32
    RECORDS = 16

# Of the connection of a data queue pair, or of its credits.
cdef struct end_points:
    const flow_entry *entry
    uint64_t position           # of the next packet

cdef end_points flows[FLOWS]
cdef end_points credits[FLOWS]
cdef uint32_t flow_count = 0, credit_count = 0
cdef uint8_t *memory = NULL
cdef void *parsers[3]  # borrowed from _kept


cdef void _lay_packet(const fc_data_flow *flow, end_points *end) noexcept nogil:
    """Make the packet that the layout has at the flow's position, and go on to the next."""
    global frame_bytes
    cdef fc_place place
    cdef fc_shape shape
    cdef uint32_t data_packets, length, line, flag32, immediate
    cdef uint64_t flag, address
    cdef uint8_t opcode
    place.row = NULL
    if not fc_locate_position(&flow.table, end.position, &place):
        end.position = 0
        if not fc_locate_position(&flow.table, 0, &place):
            return
    fc_shape_of(flow, &place, &shape)
    if place.packet >= shape.packets:
        place.packet = shape.packets - 1
    data_packets = shape.packets - shape.bulk_split
    address = ((<uint64_t> 0x7F00 + flow.connection) << 24) + (place.step % flow.slots) * flow.slot_stride + shape.address
    length = flow.mtu if place.packet + 1 < data_packets else shape.wire_bytes - (data_packets - 1) * flow.mtu
    if place.packet == data_packets:
        opcode, length, address = FC_OP_WRITE_ONLY_IMM, 0, 0
    elif data_packets == 1:
        opcode = FC_OP_WRITE_ONLY if shape.bulk_split else FC_OP_WRITE_ONLY_IMM
    elif place.packet == 0:
        opcode = FC_OP_WRITE_FIRST
    elif place.packet + 1 < data_packets:
        opcode = FC_OP_WRITE_MIDDLE
    else:
        opcode = FC_OP_WRITE_LAST if shape.bulk_split else FC_OP_WRITE_LAST_IMM
    _begin(end.entry.source, end.entry.destination, end.entry.queue_pair, opcode, flow.start_psn + <uint32_t> end.position)
    if opcode == FC_OP_WRITE_FIRST or opcode == FC_OP_WRITE_ONLY or opcode == FC_OP_WRITE_ONLY_IMM:
        _put(frame + 74, address, 8)
        _put(frame + 82, 0 if place.packet == data_packets else 0x1234, 4)
        _put(frame + 86, shape.wire_bytes if opcode == FC_OP_WRITE_FIRST else length, 4)
        frame_bytes += 16
    if opcode == FC_OP_WRITE_ONLY_IMM or opcode == FC_OP_WRITE_LAST_IMM:
        immediate = <uint32_t> fc_message(&place) if flow.numbered_immediate else shape.message_wire_bytes
        if not flow.big_endian_immediate:
            immediate = fc_swap32(immediate)
        _put(frame + frame_bytes, immediate, 4)
        frame_bytes += 4
    memset(frame + frame_bytes, 0x5A, length)
    flag = place.step + 1
    flag32 = <uint32_t> flag
    if flow.encoding == FC_ENCODING_LL:
        for line in range(0, length, 16):
            memcpy(frame + frame_bytes + line + 4, &flag32, 4)
            memcpy(frame + frame_bytes + line + 12, &flag32, 4)
    elif flow.encoding == FC_ENCODING_LL128:
        for line in range(0, length, 128):
            memcpy(frame + frame_bytes + line + 120, &flag, 8)
    frame_bytes += length
    _end()
    end.position += 1


cdef void _lay_credit(const end_points *end, input_view *view) noexcept nogil:
    """Make a credit of a connection: its tag right or not, its message number from the input."""
    global frame_bytes
    cdef uint32_t tag = end.entry.sender
    cdef uint64_t number = _take(view, 1)
    if number & 0x80:
        tag += 1
    if number & 0x40:
        number = _take(view, 4)
    number &= ~(<uint64_t> 0xC0)
    _begin(end.entry.source, end.entry.destination, end.entry.queue_pair, FC_OP_WRITE_ONLY, <uint32_t> number)
    memset(frame + 74, 0, 16 + 64)
    _put(frame + 86, end.entry.credit_bytes, 4)
    memcpy(frame + 90 + end.entry.credit_tag, &tag, 4)
    memcpy(frame + 90 + end.entry.credit_index, &number, 8)
    frame_bytes += 16 + end.entry.credit_bytes
    _end()


cdef void _command(RingParser parser, input_view *view, uint64_t *written, uint64_t *now) noexcept nogil:
    global frame_bytes
    cdef uint32_t flags = _take(view, 1), kind = flags & 3, choice, at, stored
    cdef int8_t step
    cdef fc_record *record
    cdef uint8_t *kept
    if flags & 64:
        _poll(parser, written[0])
    if written[0] - parser.state.counts.parsed >= RECORDS:
        return
    if kind == 1:
        _take_frame(view)
    elif kind == 0:
        choice = _take(view, 1)
        step = <int8_t> _take(view, 1)
        if step == -128:  # anywhere: in another pass, behind silence, among the messages that fill their slot
            flows[choice % flow_count].position = <uint64_t> _take(view, 4) << (_take(view, 1) & 15)
        elif step < 0 and flows[choice % flow_count].position < <uint64_t> -step:
            flows[choice % flow_count].position = 0
        else:
            flows[choice % flow_count].position += step
        _lay_packet(parser.flows + choice % flow_count, &flows[choice % flow_count])
    elif kind == 2:
        _lay_credit(&credits[_take(view, 1) % credit_count], view)
    if flags & 128 and frame_bytes > 62:
        frame[62] = <uint8_t> _take(view, 1)
    if flags & 8:
        _change(view)
    if not flags & 4:
        _mend()
    if flags & 16:
        now[0] += <uint64_t> 1 << (_take(view, 1) & 63)
    stored = frame_bytes
    if flags & 32:
        at = _take(view, 1)
        stored = stored - at if at < stored else 0
    record = parser._record(written[0])
    kept = <uint8_t *> record + sizeof(fc_record)
    fuzz_allow(kept, parser.record_bytes - sizeof(fc_record))
    if stored > parser.record_bytes - sizeof(fc_record):
        stored = parser.record_bytes - sizeof(fc_record)
    memcpy(kept, frame, stored)
    fuzz_forbid(kept + stored, parser.record_bytes - sizeof(fc_record) - stored)
    # A length that lies is cut to the record by the parser.
    record.stored_length = stored if stored < parser.record_bytes - sizeof(fc_record) else stored + frame[0]
    record.frame_length = frame_bytes
    record.timestamp_ns = now[0]
    record.sequence = written[0]
    now[0] += 1000
    written[0] += 1


cdef void _poll(RingParser parser, uint64_t written) noexcept nogil:
    """Let the parser do what it can, and hold what it says against what it was given."""
    cdef uint64_t index, begin = parser.state.counts.parsed, verdicts = 0, results = 0, reasons = 0
    cdef fc_record *record
    cdef fc_wire wire
    cdef const uint8_t *data
    FC_STORE_RELEASE(&parser.header.written, written)
    parser.ended = parser.header.ended != 0
    while parser.state.counts.parsed != written and parser._burst(written):
        pass
    fuzz_claim(parser.header.parsed == parser.state.counts.parsed <= written, "cursors", parser.header.parsed)
    for index in range(16):
        verdicts += parser.state.counts.verdicts[index]
        results += parser.state.counts.results[index]
        reasons += parser.state.counts.reasons[index]
    fuzz_claim(verdicts == parser.state.counts.parsed, "a verdict for each packet", verdicts)
    fuzz_claim(results == parser.state.counts.parsed, "a result for each packet", results)
    fuzz_claim(reasons == parser.state.counts.verdicts[FC_UNSYNCHRONISED], "a reason for each that is unsynchronised", reasons)
    for index in range(begin, parser.state.counts.parsed):
        record = parser._record(index)
        data = <const uint8_t *> record + sizeof(fc_record)
        fuzz_claim(0 < record.verdict < FC_VERDICTS, "a verdict", record.verdict)
        fuzz_claim(record.decision == 0, "the decision is the extractor's", record.decision)
        if FC_PLACED <= record.verdict <= FC_INITIAL_STATE and (record.verdict != FC_PARTIAL_SUM or record.payload_length):
            fuzz_claim(record.payload_length > 0, "bytes that were placed", record.payload_length)
            fuzz_claim(fc_decode(data, parser._stored(record), &wire) == FC_WIRE_OK and fc_icrc_right(data, &wire),
                       "only what is whole is placed", record.verdict)
            fuzz_claim(wire.payload_offset == record.payload_offset and wire.payload_length == record.payload_length,
                       "the payload is the packet's", record.payload_offset)
            fuzz_claim(record.encoding == parser.flows[_flow_of(&wire)].encoding, "its encoding", record.encoding)
            if record.encoding != FC_ENCODING_PLAIN:
                fuzz_claim(record.flag != 0 or parser.flows[_flow_of(&wire)].encoding == FC_ENCODING_LL, "its flag", 0)


cdef uint32_t _flow_of(const fc_wire *wire) noexcept nogil:
    cdef uint32_t index
    for index in range(flow_count):
        if flows[index].entry.queue_pair == wire.dest_qp and memcmp(flows[index].entry.source, wire.source, 16) == 0:
            return index
    fuzz_claim(False, "what is placed is of a queue pair of the plan", wire.dest_qp)
    return 0


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept:
    if size:
        _run(<RingParser> parsers[data[0] % 3], data, size)
    return 0


cdef void _run(RingParser parser, const uint8_t *data, size_t size) noexcept nogil:
    global frame_bytes
    cdef input_view view
    cdef uint64_t written = 0, now = <uint64_t> 1 << 60
    cdef uint32_t index, first
    cdef uint8_t *state
    view.data, view.left = data, size
    first = _take(&view, 1)
    # As a ring just made: nothing of the input before stays.
    memset(parser.state, 0, parser.state_bytes)
    parser.state.queue_pairs = flow_count
    memset(parser.block, 0, 8)
    memset(parser.block + parser.header.parse_state_bytes, 0, 8)
    parser.header.parsed = parser.header.ended = 0
    for index in range(flow_count):
        parser.flows[index].place.row = NULL
        parser.runs[index].inner = 0
        flows[index].position = 0
    frame_bytes = 0
    if first & 16:
        state = <uint8_t *> &parser.state.sync[_take(&view, 1) % flow_count]
        index = sizeof(fc_sync) if view.left > sizeof(fc_sync) else <uint32_t> view.left
        memcpy(state, view.data, index)
        view.data += index
        view.left -= index
    for index in range(RECORDS):
        fuzz_forbid(<uint8_t *> parser._record(index) + sizeof(fc_record), parser.record_bytes - sizeof(fc_record))
    while view.left and written < 2 * RECORDS:
        _command(parser, &view, &written, &now)
    _poll(parser, written)
    parser.header.ended = first & 32
    _poll(parser, written)
    if parser.header.ended:
        fuzz_claim(parser.state.counts.parsed == written, "at the end nothing is held", written)


cdef RingParser _parser(image, list tables, str direction):
    cdef uint8_t *copy = NULL
    cdef RingParser parser
    cdef uint64_t bytes = len(image.memory)
    if posix_memalign(<void **> &copy, 64, bytes):
        raise MemoryError
    memcpy(copy, <const uint8_t *> (<object> image.memory), bytes)
    ring = type(image)(**{**vars(image), "memory": <unsigned char[:bytes]> copy})
    host = tables[0].source
    parser = RingParser(ring, tables, sorted({table.source for table in tables} | {host}), fixture.MTU, 1 << 30, direction, [host])
    fuzz_forbid(copy + sizeof(fc_ring_header), parser.header.dump_state_offset - sizeof(fc_ring_header))
    return parser


cdef _make():
    """Make the parsers and find their flows; return what must stay alive."""
    global flow_count, credit_count
    cdef uint32_t place
    cdef RingParser parser
    tables = fixture.programs()
    image = fixture.image_of_ring(RECORDS)
    kept = []
    for number, direction in enumerate(("both", "inbound", "outbound")):
        parser = _parser(image, tables, direction)
        parsers[number] = <void *> parser
        kept.append(parser)
    if parser.state.queue_pairs > FLOWS or len(tables) > FLOWS:
        raise ValueError(f"{parser.state.queue_pairs} data queue pairs of {len(tables)} connections: more than {FLOWS}")
    for place in range(BUCKETS):
        if parser.entries[place].kind == KIND_DATA:
            flows[parser.entries[place].index].entry = parser.entries + place
            flow_count += 1
        elif parser.entries[place].kind == KIND_CREDIT:
            credits[credit_count].entry = parser.entries + place
            credit_count += 1
    return kept


_kept = _make()
