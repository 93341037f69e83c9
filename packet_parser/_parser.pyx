# SPDX-License-Identifier: MIT
"""The parser's loop: judges the records of one packet ring and annotates them in place.

Works on a mapped ring, tables and 16-byte addresses; what a plan is, `packet_parser.parser` knows. One thread per
object. Nothing in the loop allocates or touches Python.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from flowcheck._formats cimport (
    FC_BAD_ICRC, FC_CONTROL, FC_ENCODING_LL, FC_ENCODING_LL128, FC_ENCODING_NONE, FC_FOREIGN, FC_INITIAL_STATE, FC_LOAD_ACQUIRE,
    FC_MALFORMED, FC_PLACED, FC_STEP_RECORD, FC_STORE_RELEASE, FC_UNSYNCHRONISED, FC_VERDICTS, fc_parse_counts, fc_publish, fc_record, fc_recover,
    fc_ring_header, fc_row, fc_segment)
from flowcheck._wire cimport (
    FC_HAS_RETH, FC_IS_RC, FC_IS_REQUEST, FC_OP_CNP, FC_OP_WRITE_MIDDLE, FC_OP_WRITE_ONLY, FC_WIRE_NOT_ROCE, FC_WIRE_OK,
    FC_WIRE_RESULTS, fc_be32, fc_decode, fc_icrc_right, fc_wire)
from packet_parser._seen cimport FC_SEEN_BYTES, FC_SEEN_HEADERS, fc_see, fc_seen, fc_seen_again, fc_seen_place
from packet_parser._sync cimport (
    FC_HOLD, FC_PROVED, FC_REASONS, FC_UNPROVED, fc_accept_inner, fc_check, fc_data_flow, fc_extend_proof, fc_follow, fc_inner,
    fc_is_clean, fc_is_inner, fc_judge, fc_lose_time, fc_note_credit, fc_sync, fc_within)

from flowcheck.errors import ConfigError, RingFormatError
from flowcheck.verdicts import VERDICTS
from packet_parser.reasons import REASONS, RESULTS

__all__ = ["RingParser"]

cdef enum:
    BURST = 1024
    NEW_SECONDS = 10            # a ring is new for so long: what an earlier attempt has sent has come by then
    AHEAD = 8                   # records whose headers are fetched before their turn
    MOST_QUEUE_PAIRS = 1024     # of one stream, data ones
    BUCKETS = 4096              # of the flow table, at most half full
    NO_CONNECTION = 0xFFFF
    HOST = 0x1000000            # in place of a queue pair number: the key is a host of the plan
    HELD = 255                  # not a verdict: the record must wait for a packet that proves its place

    KIND_NONE = 0
    KIND_DATA = 1
    KIND_CREDIT = 2
    KIND_HOST = 3

cdef extern from *:
    """
    #define FC_FETCH(p) __builtin_prefetch((p))
    #define FC_FETCH_TO_WRITE(p) __builtin_prefetch((p), 1)
    """
    void FC_FETCH(const void *address) nogil
    void FC_FETCH_TO_WRITE(const void *address) nogil

# Published before the ring's `parsed` cursor; only the queue pairs in use are.
cdef struct parse_state:
    fc_parse_counts counts
    uint64_t began_ns           # reception of the ring's first record
    uint64_t last_ns            # and of the last one that was judged
    uint32_t queue_pairs
    uint32_t reserved
    fc_sync sync[MOST_QUEUE_PAIRS]

cdef struct flow_entry:
    uint8_t source[16]
    uint8_t destination[16]
    uint32_t queue_pair
    uint16_t kind
    uint16_t connection
    uint32_t index              # KIND_DATA: of the data flow; KIND_CREDIT: of its connection's first one
    uint32_t count              # KIND_CREDIT: data flows of the connection
    uint32_t sender             # KIND_CREDIT: rank that the tag must name
    uint32_t credit_bytes       # KIND_CREDIT: of a credit write, and where in it tag and message number lie
    uint32_t credit_tag
    uint32_t credit_index

# What the packets inside of the message at a flow's place have in common.
cdef struct flow_run:
    fc_record like              # one's annotation: payload and place in the message are still the message's
    uint32_t inner              # packets between the first one and the last of the message; 0: all are judged one by one

cdef inline uint32_t hash_key(const uint8_t *source, const uint8_t *destination, uint32_t queue_pair) noexcept nogil:
    cdef uint64_t words[4]
    cdef uint64_t mixed
    memcpy(words, source, 16)
    memcpy(words + 2, destination, 16)
    mixed = words[0] ^ words[1] * 0x9E3779B97F4A7C15U ^ words[2] * 0xC2B2AE3D27D4EB4FU ^ words[3] * 0x165667B19E3779F9U
    mixed = (mixed ^ queue_pair) * 0xFF51AFD7ED558CCDU
    return <uint32_t> (mixed >> 40) & (BUCKETS - 1)


cdef class RingParser:
    """RingParser(ring, programs, hosts, mtu, silence_ns, direction, host, check_icrc): `poll()` until `finished`, then `close()`.

    Args:
        ring: a `flowcheck.ring.PacketRing`; its `parsed` cursor is moved by this object alone.
        programs: `flowcheck.layout.Program`s of the connections that the stream can show.
        hosts: addresses (16 bytes) between which management traffic is `control`.
        mtu: payload bytes of a full packet.
        silence_ns: time in which no flow's sequence numbers can come round.
        direction: `inbound` takes every packet that is not for `host` as foreign, `outbound` every one that is.
        host: addresses (16 bytes) of the mirrored host.
        check_icrc: False only to measure what the check costs.

    Raises:
        ConfigError: programs that this parser cannot follow.
        RingFormatError: cursors or a published state that cannot be.
    """

    cdef unsigned char[::1] memory
    cdef object ring
    cdef fc_ring_header *header
    cdef uint8_t *records
    cdef uint8_t *block
    cdef uint64_t mask
    cdef uint32_t record_bytes
    cdef uint32_t state_bytes
    cdef parse_state *state
    cdef fc_data_flow *flows
    cdef flow_run *runs
    cdef fc_seen *seen
    cdef uint32_t bth_at        # where the last header that was kept has its BTH: one stream's all have it there
    cdef uint32_t flag_at       # of a record, the line in which a payload's first flag lies; 0: it has none
    cdef flow_entry *entries
    cdef int direction          # 0: both, 1: to the host, 2: to any other
    cdef uint8_t *host
    cdef uint32_t host_count
    cdef list tables
    cdef uint64_t silence_ns
    cdef bint check_icrc
    cdef bint ended             # no record follows those of this poll

    def __cinit__(self):
        self.state = NULL
        self.flows = NULL
        self.runs = NULL
        self.seen = NULL
        self.entries = NULL
        self.host = NULL

    def __init__(self, ring, programs, hosts, mtu, silence_ns, direction="both", host=(), check_icrc=True):
        cdef uint32_t room, index
        self.ring = ring
        self.memory = ring.memory
        self.header = <fc_ring_header *> &self.memory[0]
        self.records = &self.memory[0] + <uint64_t> ring.header_bytes
        self.record_bytes = ring.record_bytes
        self.mask = ring.records - 1
        self.block = &self.memory[0] + self.header.parse_state_offset
        self.direction = ("both", "inbound", "outbound").index(direction)
        self.state = <parse_state *> calloc(1, sizeof(parse_state))
        self.entries = <flow_entry *> calloc(BUCKETS, sizeof(flow_entry))
        self.flows = <fc_data_flow *> calloc(MOST_QUEUE_PAIRS, sizeof(fc_data_flow))
        self.runs = <flow_run *> calloc(MOST_QUEUE_PAIRS, sizeof(flow_run))
        self.seen = <fc_seen *> calloc(FC_SEEN_HEADERS, sizeof(fc_seen))
        self.host = <uint8_t *> calloc(max(1, len(host)), 16)
        if (self.state == NULL or self.entries == NULL or self.flows == NULL or self.runs == NULL or self.seen == NULL
                or self.host == NULL):
            raise MemoryError
        for address in host:
            memcpy(self.host + 16 * self.host_count, <const uint8_t *> (<bytes> address), 16)
            self.host_count += 1
        self.tables = []
        self.silence_ns = silence_ns
        self.check_icrc = check_icrc
        for program in programs:
            self._add_program(program, mtu)
        for address in hosts:
            self._add_entry(address, bytes(16), HOST, KIND_HOST, NO_CONNECTION)
        room = self.header.parse_state_bytes - 8
        self.state_bytes = sizeof(parse_state) - (MOST_QUEUE_PAIRS - self.state.queue_pairs) * sizeof(fc_sync)
        if self.state_bytes > room:
            raise ConfigError(f"{ring.path}: the state of {self.state.queue_pairs} queue pairs takes {self.state_bytes} "
                              f"bytes, the ring has room for {room}: show fewer links in one stream")
        self._recover()

    def __dealloc__(self):
        free(self.state)
        free(self.entries)
        free(self.flows)
        free(self.runs)
        free(self.seen)
        free(self.host)

    cdef _recover(self):
        cdef uint32_t queue_pairs = self.state.queue_pairs
        cdef uint64_t written = FC_LOAD_ACQUIRE(&self.header.written)
        if fc_recover(self.block, self.header.parse_state_bytes, self.state, self.state_bytes):
            if self.state.queue_pairs != queue_pairs:
                raise RingFormatError(f"{self.ring.path}: was parsed with {self.state.queue_pairs} queue pairs, the "
                                      f"plan has {queue_pairs}: remove the ring and start again", str(self.ring.path))
        if self.state.counts.parsed > written or written - self.state.counts.parsed > self.mask + 1:
            raise RingFormatError(f"{self.ring.path}: {self.state.counts.parsed} records parsed of {written} written cannot be "
                                  "in this ring: remove it and start again", str(self.ring.path))
        FC_STORE_RELEASE(&self.header.parsed, self.state.counts.parsed)

    cdef _add_program(self, program, mtu):
        cdef uint32_t first = self.state.queue_pairs
        cdef const unsigned char[::1] rows, segments
        cdef fc_data_flow *flow
        cdef flow_entry *entry
        if first + len(program.data_queue_pairs) > MOST_QUEUE_PAIRS:
            raise ConfigError(f"more than {MOST_QUEUE_PAIRS} data queue pairs in one stream: show fewer links in it")
        for index, queue_pair in enumerate(program.data_queue_pairs):
            packed_segments, packed_rows = program.segments[index].tobytes(), program.rows[index].tobytes()
            self.tables.append((packed_segments, packed_rows))  # the flow points into them
            entry = self._add_entry(program.source, program.destination, queue_pair, KIND_DATA, program.connection)
            entry.index = self.state.queue_pairs
            flow = self.flows + self.state.queue_pairs
            self.state.queue_pairs += 1
            flow.connection, flow.queue_pair = program.connection, index
            flow.mtu = mtu
            flow.slot_stride = program.slot_stride
            flow.slots = program.slots
            flow.silence_ns = self.silence_ns
            flow.start_psn = program.start_psn[index]
            flow.enter_before = program.enter_before[index] if program.enter_before else 0
            flow.encoding = program.encoding
            if flow.encoding == FC_ENCODING_LL:
                self.flag_at = 2 * sizeof(fc_record)
            elif flow.encoding == FC_ENCODING_LL128:
                self.flag_at = 3 * sizeof(fc_record)
            flow.big_endian_immediate = program.big_endian_immediate
            flow.numbered_immediate = program.numbered_immediate
            if program.clean:
                (flow.clean.offset, flow.clean.wire_bytes, flow.clean.address, flow.clean.packets,
                 flow.clean.bulk_split) = program.clean[index]
                flow.clean.message_wire_bytes = program.slot_stride
            if not packed_rows:
                continue  # a connection that the job never uses: nothing on it can be proved
            segments, rows = packed_segments, packed_rows
            flow.table.segments = <const fc_segment *> &segments[0]
            flow.table.segment_count = segments.shape[0] // sizeof(fc_segment)
            flow.table.rows = <const fc_row *> &rows[0]
        for queue_pair in program.credit_queue_pairs:
            entry = self._add_entry(program.destination, program.source, queue_pair, KIND_CREDIT, program.connection)
            entry.index, entry.count, entry.sender = first, len(program.data_queue_pairs), program.sender_rank
            entry.credit_bytes, entry.credit_tag = program.credit.bytes, program.credit.tag
            entry.credit_index = program.credit.index

    cdef flow_entry *_add_entry(self, bytes source, bytes destination, uint32_t queue_pair, uint16_t kind,
                                uint16_t connection) except NULL:
        cdef uint32_t place = hash_key(source, destination, queue_pair)
        cdef uint32_t tried = 0
        cdef flow_entry *entry
        if len(source) != 16 or len(destination) != 16:
            raise ConfigError("an address is not 16 bytes long")
        while self.entries[place].kind != KIND_NONE:
            place = (place + 1) & (BUCKETS - 1)
            tried += 1
            if tried == BUCKETS // 2:
                raise ConfigError(f"more than {BUCKETS // 2} flows in one stream: show fewer links in it")
        entry = self.entries + place
        memcpy(entry.source, <const uint8_t *> source, 16)
        memcpy(entry.destination, <const uint8_t *> destination, 16)
        entry.queue_pair, entry.kind, entry.connection = queue_pair, kind, connection
        return entry

    cdef inline flow_entry *_find(self, const uint8_t *source, const uint8_t *destination,
                                  uint32_t queue_pair) noexcept nogil:
        cdef uint32_t place = hash_key(source, destination, queue_pair)
        cdef flow_entry *entry = self.entries + place
        while entry.kind != KIND_NONE:
            if (entry.queue_pair == queue_pair and memcmp(entry.source, source, 16) == 0
                    and memcmp(entry.destination, destination, 16) == 0):
                return entry
            place = (place + 1) & (BUCKETS - 1)
            entry = self.entries + place
        return NULL

    cdef inline bint _wrong_direction(self, const fc_wire *wire) noexcept nogil:
        cdef uint32_t index
        if self.direction == 0:
            return False
        for index in range(self.host_count):
            if memcmp(wire.destination, self.host + 16 * index, 16) == 0:
                return self.direction == 2
        return self.direction == 1

    cdef inline bint _between_hosts(self, const fc_wire *wire) noexcept nogil:
        cdef uint8_t none[16]
        memset(none, 0, 16)
        return self._find(wire.source, none, HOST) != NULL and self._find(wire.destination, none, HOST) != NULL

    cdef int _take_credit(self, const flow_entry *entry, const fc_wire *wire, const uint8_t *payload,
                          uint64_t now) noexcept nogil:
        """Hold a credit's tag against the edge, and keep its message number; a wrong tag ends the connection's trust."""
        cdef uint32_t tag, index
        cdef uint64_t number
        if wire.opcode == FC_OP_WRITE_ONLY and wire.payload_length == entry.credit_bytes:
            memcpy(&tag, payload + entry.credit_tag, 4)
            memcpy(&number, payload + entry.credit_index, 8)
            for index in range(entry.index, entry.index + entry.count):
                if tag != entry.sender:
                    self.state.sync[index].refused = True
                if number:
                    fc_note_credit(self.flows + index, self.state.sync + index, number - 1, now)
        return FC_CONTROL

    cdef int _find_proof(self, const flow_entry *entry, uint64_t index, uint64_t written) noexcept nogil:
        """Look behind record `index` for the packet that proves what is held: 1 found, 0 there is none, -1 not yet.

        `self.ended` was read before `written`: a dump that ended since may have brought the proof behind `written`.
        """
        cdef fc_data_flow flow = self.flows[entry.index]
        cdef fc_sync *sync = self.state.sync + entry.index
        cdef uint64_t ahead
        cdef fc_record *record
        cdef const uint8_t *frame
        cdef fc_wire wire
        for ahead in range(index + 1, written):
            record = self._record(ahead)
            frame = <const uint8_t *> record + sizeof(fc_record)
            if (fc_decode(frame, self._stored(record), &wire) != FC_WIRE_OK or not wire.has & FC_HAS_RETH
                    or not wire.has & FC_IS_REQUEST or self._wrong_direction(&wire)
                    or self._find(wire.source, wire.destination, wire.dest_qp) != entry or not fc_icrc_right(frame, &wire)):
                continue
            if not fc_follow(&flow, sync, wire.psn) or fc_check(&flow, sync, &flow.place, &wire,
                                                                frame + wire.payload_offset) != FC_PROVED:
                return 0
            if flow.place.packet >= flow.place.row.packets - flow.place.row.bulk_split:
                continue  # the end of a message, which has no address
            fc_extend_proof(&flow, sync, &wire)
            return 1
        if self.ended or written - index > self.mask / 2:
            return 0
        return -1

    cdef int _place(self, const flow_entry *entry, const fc_wire *wire, const uint8_t *payload, fc_record *record,
                    uint64_t index, uint64_t written) noexcept nogil:
        """Judge a request packet of a data queue pair and annotate its place."""
        cdef fc_data_flow *flow = self.flows + entry.index
        cdef fc_sync *sync = self.state.sync + entry.index
        cdef flow_run *run = self.runs + entry.index
        cdef uint64_t now = record.timestamp_ns
        cdef bint begins = fc_within(self.state.began_ns, now, NEW_SECONDS * <uint64_t> 1000000000)
        cdef int reason = fc_judge(flow, sync, wire, payload, now, begins)
        cdef int proof
        cdef const fc_row *row
        run.inner = 0
        if reason == FC_HOLD:
            proof = self._find_proof(entry, index, written)
            if proof < 0:
                return HELD
            reason = fc_judge(flow, sync, wire, payload, now, begins) if proof else FC_UNPROVED
            if reason == FC_HOLD:
                reason = FC_UNPROVED
        if reason != FC_PROVED:
            self.state.counts.reasons[reason] += 1
            return FC_UNSYNCHRONISED
        row = flow.place.row
        record.encoding = row.encoding if wire.payload_length else FC_ENCODING_NONE
        record.iteration = <uint32_t> (flow.place.segment.first_iteration
                                       + flow.place.passes * flow.place.segment.period_iterations + row.iteration)
        record.message_bytes = row.message_bytes
        record.destination = row.destination
        record.flag = 0
        if flow.encoding == FC_ENCODING_LL128:
            record.flag = flow.place.step + 1
        elif flow.encoding == FC_ENCODING_LL:
            record.flag = <uint32_t> (flow.place.step + 1)
        record.wire_offset = flow.clean.offset if fc_is_clean(flow, flow.place.step) else row.message_wire_offset
        if wire.payload_length:
            record.wire_offset += flow.place.packet * flow.mtu
        record.settled_lag = row.settled_lag
        record.queue_pair = flow.queue_pair
        run.inner = fc_inner(flow)
        if run.inner:
            run.like = record[0]
            run.like.encoding, run.like.verdict = row.encoding, row.verdict
            run.like.payload_length = flow.mtu
            run.like.wire_offset = row.message_wire_offset
            if wire.opcode == FC_OP_WRITE_MIDDLE:
                self._see(<const uint8_t *> record + sizeof(fc_record), wire, entry.index)
        if flow.place.packet + 1 == sync.packets:
            record.last_pieces = row.last_pieces
        if wire.payload_length == 0 and row.verdict in (FC_PLACED, FC_INITIAL_STATE, FC_STEP_RECORD):
            return FC_CONTROL  # a message, or the end of one, without a byte of its own
        return row.verdict

    cdef void _see(self, const uint8_t *frame, const fc_wire *wire, uint32_t flow) noexcept nogil:
        """Keep the header of a packet inside of a message."""
        if fc_see(self.seen + fc_seen_place(frame + wire.bth_offset), frame, wire, flow):
            self.bth_at = wire.bth_offset

    cdef inline int _judge_inner(self, fc_record *record, const uint8_t *frame, uint32_t stored) noexcept nogil:
        """Judge and annotate a packet inside of the message at its flow's place; -1, with nothing done, if it is not that.

        It is what `_judge` would come to: the header decodes to what it decoded to before, and of what `fc_judge` looks at the
        rest is the same for all packets between a message's first and last.
        """
        cdef const fc_seen *seen
        cdef const flow_run *run
        cdef fc_data_flow *flow
        cdef fc_sync *sync
        cdef uint32_t psn
        if stored < FC_SEEN_BYTES:
            return -1
        seen = self.seen + fc_seen_place(frame + self.bth_at)
        if not fc_seen_again(seen, frame, stored):
            return -1
        flow, sync, run = self.flows + seen.flow, self.state.sync + seen.flow, self.runs + seen.flow
        psn = fc_be32(frame + seen.wire.bth_offset + 8) & 0xFFFFFF
        if not fc_is_inner(flow, sync, run.inner, psn, frame + seen.wire.payload_offset, record.timestamp_ns):
            return -1
        if self.check_icrc and not fc_icrc_right(frame, &seen.wire):
            return -1
        memcpy(&record.verdict, &run.like.verdict, sizeof(fc_record) - 24)
        record.payload_offset = seen.wire.payload_offset
        record.wire_offset += (psn - sync.psn & 0xFFFFFF) * flow.mtu
        fc_accept_inner(sync, psn, record.timestamp_ns)
        self.state.counts.results[FC_WIRE_OK] += 1
        return run.like.verdict

    cdef inline fc_record *_record(self, uint64_t index) noexcept nogil:
        return <fc_record *> (self.records + (index & self.mask) * self.record_bytes)

    cdef inline uint32_t _stored(self, const fc_record *record) noexcept nogil:
        cdef uint32_t room = self.record_bytes - sizeof(fc_record)
        return record.stored_length if record.stored_length < room else room

    cdef int _judge(self, fc_record *record, uint64_t index, uint64_t written) noexcept nogil:
        """Return the verdict on the frame of a record, or HELD, and annotate all else."""
        cdef const uint8_t *frame = <const uint8_t *> record + sizeof(fc_record)
        cdef fc_wire wire
        cdef flow_entry *entry
        cdef int result = fc_decode(frame, self._stored(record), &wire), verdict
        self.state.counts.results[result] += 1
        if result == FC_WIRE_NOT_ROCE:
            return FC_FOREIGN
        if result != FC_WIRE_OK:
            return FC_MALFORMED
        if self._wrong_direction(&wire):
            return FC_FOREIGN
        entry = self._find(wire.source, wire.destination, wire.dest_qp)
        if wire.has == 0 and wire.opcode != FC_OP_CNP and entry == NULL:
            # A vendor's own opcode, which need not end in an ICRC, and nobody's queue pair.
            return FC_CONTROL if self._between_hosts(&wire) else FC_FOREIGN
        if self.check_icrc and not fc_icrc_right(frame, &wire):
            return FC_BAD_ICRC
        if entry == NULL:
            return FC_CONTROL if not wire.has & FC_IS_RC and self._between_hosts(&wire) else FC_FOREIGN
        record.connection = entry.connection
        record.payload_offset = wire.payload_offset
        record.payload_length = wire.payload_length
        if entry.kind == KIND_CREDIT:
            return self._take_credit(entry, &wire, frame + wire.payload_offset, record.timestamp_ns)
        if wire.has & FC_IS_RC and wire.has & FC_IS_REQUEST:
            verdict = self._place(entry, &wire, frame + wire.payload_offset, record, index, written)
            self.state.counts.results[result] -= verdict == HELD
            return verdict
        return FC_CONTROL

    cdef uint32_t _burst(self, uint64_t written) noexcept nogil:
        cdef uint64_t begin = self.state.counts.parsed
        cdef uint64_t end = written if written - begin < BURST else begin + BURST
        cdef uint64_t index
        cdef uint32_t flow
        cdef uint8_t *ahead
        cdef fc_record *record
        cdef int verdict
        for index in range(begin, end):
            ahead = self.records + ((index + AHEAD) & self.mask) * self.record_bytes
            FC_FETCH_TO_WRITE(ahead)
            FC_FETCH(ahead + sizeof(fc_record))
            if self.flag_at:
                FC_FETCH(ahead + self.flag_at)
            record = self._record(index)
            if index == 0:
                self.state.began_ns = self.state.last_ns = record.timestamp_ns
            # With what a clock may go back unnoticed, a pause is still shorter than half of the sequence.
            if record.timestamp_ns + self.silence_ns / 2 < self.state.last_ns:
                for flow in range(self.state.queue_pairs):
                    fc_lose_time(self.flows + flow, self.state.sync + flow)
            self.state.last_ns = record.timestamp_ns
            verdict = self._judge_inner(record, <const uint8_t *> record + sizeof(fc_record), self._stored(record))
            if verdict >= 0:
                self.state.counts.verdicts[verdict] += 1
                continue
            record.encoding = FC_ENCODING_NONE
            record.connection = NO_CONNECTION
            record.payload_offset = 0
            record.payload_length = 0
            record.iteration = 0
            record.message_bytes = 0
            record.destination = 0
            record.flag = 0
            record.wire_offset = 0
            record.settled_lag = 0
            record.decision = 0
            record.last_pieces = 0
            record.queue_pair = 0
            verdict = self._judge(record, index, written)
            if verdict == HELD:
                end = index
                break
            record.verdict = verdict
            self.state.counts.verdicts[verdict] += 1
        self.state.counts.parsed = end
        fc_publish(self.block, self.header.parse_state_bytes, self.state, self.state_bytes)
        FC_STORE_RELEASE(&self.header.parsed, end)
        return <uint32_t> (end - begin)

    def poll(self):
        """poll() -> int: annotate a burst of records; 0 when there is nothing to do now."""
        cdef uint64_t written
        cdef uint32_t done
        if self.header == NULL:
            return 0
        self.ended = FC_LOAD_ACQUIRE(&self.header.ended) != 0
        written = FC_LOAD_ACQUIRE(&self.header.written)
        if written == self.state.counts.parsed:
            return 0
        if written < self.state.counts.parsed or written - self.state.counts.parsed > self.mask + 1:
            raise RingFormatError(f"{self.ring.path}: its written cursor is {written} after {self.state.counts.parsed} parsed: "
                                  "another process writes the ring", str(self.ring.path))
        with nogil:
            done = self._burst(written)
        return done

    @property
    def finished(self):
        """Whether the dump has ended and every record is annotated."""
        if self.header == NULL:
            return True
        return bool(FC_LOAD_ACQUIRE(&self.header.ended)) and FC_LOAD_ACQUIRE(&self.header.written) == self.state.counts.parsed

    def counters(self):
        """counters() -> dict: what was parsed since the ring was made, restarts included.

        `verdicts` are the parser's (the extractor may turn `placed` into `duplicate`, `conflict` or `late`), `malformed` and
        `unsynchronised` count by the names of `packet_parser.reasons`, `refused` lists connections that a credit contradicted.
        """
        refused = {self.flows[i].connection for i in range(self.state.queue_pairs) if self.state.sync[i].refused}
        return {
            "parsed": self.state.counts.parsed,
            "verdicts": {VERDICTS[i]: self.state.counts.verdicts[i] for i in range(1, FC_VERDICTS)},
            "malformed": {RESULTS[i]: self.state.counts.results[i] for i in range(FC_WIRE_NOT_ROCE + 1, FC_WIRE_RESULTS)},
            "unsynchronised": {REASONS[i]: self.state.counts.reasons[i] for i in range(FC_REASONS)},
            "refused": sorted(refused),
        }

    def close(self):
        """close(): give the mapping up; the counters stay readable."""
        self.header = NULL
        self.memory = None
