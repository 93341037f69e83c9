# SPDX-License-Identifier: MIT
"""The extractor's loop: annotated ring records into gradient slots.

The order in which a packet's effects become visible is what makes a kill at any instruction harmless: units are
claimed, bytes are placed, the record's `decision` is written, the units are marked done. A slot's bytes count only
where they are done; at start, claims fall back to done, and a record that has a decision keeps it.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from data_extractor._lines cimport fc_ll128_run, fc_ll128_runs, fc_ll128_strip, fc_ll_kernel, fc_ll_strip
from flowcheck._copy cimport CopyEngine
from flowcheck._formats cimport (
    FC_CONFLICT, FC_CONTROL, FC_DUPLICATE, FC_ENCODING_LL, FC_ENCODING_LL128, FC_ENCODING_PLAIN, FC_FETCH_ADD, FC_FETCH_OR,
    FC_INITIAL_STATE, FC_LATE, FC_LOAD_ACQUIRE, FC_PARTIAL_SUM, FC_PLACED, FC_REASON_CONFLICT, FC_REASON_END_OF_STREAM,
    FC_REASON_MISSING, FC_REASON_NONE, FC_SLOT_FILLING, FC_SLOT_INCOMPLETE, FC_SLOT_WHOLE, FC_STEP_RECORD, FC_STORE_RELEASE,
    FC_UNSYNCHRONISED, FC_VERDICT_NONE, FC_VERDICTS, fc_extract_state, fc_publish, fc_record, fc_recover,
    fc_ring_header, fc_slot, fc_slots_header,
)

from flowcheck.errors import FlowCheckError, RingFormatError

cdef extern from "rte_prefetch.h" nogil:
    void rte_prefetch0(const void *address)

cdef extern from * nogil:
    """
    #define FC_POPCOUNT(x) ((uint64_t)__builtin_popcountll(x))
    #define FC_FETCH_AND(p, v) __atomic_fetch_and((p), (v), __ATOMIC_ACQ_REL)
    """
    uint64_t FC_POPCOUNT(uint64_t value)
    uint64_t FC_FETCH_AND(uint64_t *p, uint64_t value)

cdef enum:
    BURST = 256
    LEAST_SKIPPED = 256         # iterations of which nothing has come are settled together from so many on
    MOST_SKIPPED = 65536        # and up to so many at once: each is looked at
    MOST_RINGS = 32
    MOST_CONNECTIONS = 64
    MOST_PIECES = 4096          # ranges of all revisions together
    MOST_REVISIONS = 64
    # A payload is below 64 KiB: 8192 units, in so many words of a bitmap (one more where it begins inside a word).
    MOST_WORDS = 129
    STALLED = 255               # not a verdict: the record must wait for a slot

cdef struct ring_view:
    fc_ring_header *header
    uint8_t *records
    uint32_t record_bytes
    uint64_t mask
    uint8_t *block
    uint32_t block_bytes
    uint64_t connections        # bit per connection of the plan that this stream shows
    uint64_t last_proof_ns      # monotonic; when there was last a record with a proved place
    uint64_t stalled_at         # iteration of the record that waits for a slot; 0: none does
    fc_extract_state state

cdef struct revision_view:
    uint64_t first_iteration
    uint32_t first_piece
    uint32_t pieces
    uint32_t buckets            # the first of the pieces; a step record may follow
    uint64_t connections        # bit per connection that sends anything of these iterations


# Which units (of 8 slot bytes) a payload brings: a range of them, or for LL128 some of a range.
cdef struct window:
    uint64_t first              # of the range, from the start of the slot's data
    uint64_t bytes              # from the first unit's begin to the last byte that counts
    uint32_t words              # of the bitmap, 0: the payload brings none
    bint whole                  # all units of the range are brought
    uint64_t bits[MOST_WORDS]   # bit (first % 64 + i) stands for unit first + i


cdef inline uint64_t _bits_between(uint64_t word, uint64_t low, uint64_t high) noexcept nogil:
    """Return the bits of a bitmap's word that stand for [low, high); the word holds some of them."""
    cdef uint64_t bits = ~(<uint64_t> 0)
    if word == low // 64:
        bits <<= low % 64
    if word == high // 64:
        bits &= (<uint64_t> 1 << (high % 64)) - 1
    return bits


cdef void _mark(window *where, uint64_t begin, uint64_t count) noexcept nogil:
    """Set the bits of `count` units, from the begin-th of the range on."""
    cdef uint64_t low = where.first % 64 + begin, high = low + count, word
    for word in range(low // 64, (high + 63) // 64):
        where.bits[word] |= _bits_between(word, low, high)


cdef bint _cover(const fc_record *record, window *where) noexcept nogil:
    """Find the units that a record's payload brings; False if its annotation cannot be."""
    cdef uint64_t begin, end, line, last, low, high, units
    cdef fc_ll128_run runs[2]
    cdef uint32_t count, i
    if record.destination % 8:
        return False
    if record.encoding == FC_ENCODING_LL128:
        if record.payload_length % 128 or record.wire_offset % 128:
            return False
        line, last = record.wire_offset // 128, (<uint64_t> record.wire_offset + record.payload_length) // 128
        units = (<uint64_t> record.message_bytes + 7) // 8
        low, high = ~(<uint64_t> 0), 0
        for i in range(<uint32_t> line, <uint32_t> last):
            for count in range(fc_ll128_runs(i, runs)):
                begin, end = runs[count].unit, runs[count].unit + runs[count].units
                end = end if end < units else units
                if begin < end:
                    low = begin if begin < low else low
                    high = end if end > high else high
        where.words = 0
        if low >= high:
            return True
        where.first = record.destination // 8 + low
        where.words = <uint32_t> ((where.first % 64 + high - low + 63) // 64)
        where.bytes = (8 * high if 8 * high < record.message_bytes else record.message_bytes) - 8 * low
        memset(where.bits, 0, 8 * where.words)
        for i in range(<uint32_t> line, <uint32_t> last):
            for count in range(fc_ll128_runs(i, runs)):
                begin, end = runs[count].unit, runs[count].unit + runs[count].units
                end = end if end < units else units
                if begin < end:
                    _mark(where, begin - low, end - begin)
        units = 0
        for i in range(where.words):
            units += FC_POPCOUNT(where.bits[i])
        where.whole = units == high - low
        return True
    if record.encoding == FC_ENCODING_LL:
        if record.payload_length % 16 or record.wire_offset % 16:
            return False
        begin, end = record.wire_offset // 2, (<uint64_t> record.wire_offset + record.payload_length) // 2
    elif record.encoding == FC_ENCODING_PLAIN and (
            record.wire_offset < record.message_bytes or record.verdict == FC_STEP_RECORD):
        begin, end = record.wire_offset, <uint64_t> record.wire_offset + record.payload_length
    else:
        return False
    end = end if end < record.message_bytes else record.message_bytes
    if begin % 8:
        return False
    where.words = 0
    if begin >= end:
        return True
    where.first = (record.destination + begin) // 8
    where.bytes = end - begin
    where.words = <uint32_t> ((where.first % 64 + (where.bytes + 7) // 8 + 63) // 64)
    memset(where.bits, 0, 8 * where.words)
    _mark(where, 0, (where.bytes + 7) // 8)
    where.whole = True
    return True


def strip(bytes source, uint32_t flag, str kernel="auto"):
    """strip(source, flag, kernel="auto") -> the data bytes of LL lines, or None if a flag is wrong.

    kernel: "auto", "scalar", "avx2" or "avx512"; ValueError if this processor has not got it.
    """
    cdef fc_ll_strip function = fc_ll_kernel(kernel.encode())
    if function == NULL:
        raise ValueError(f"this processor has no {kernel} kernel")
    if len(source) % 16:
        raise ValueError(f"{len(source)} bytes are not whole lines of 16")
    target = bytearray(len(source) // 2)
    cdef uint8_t *out = target
    cdef const uint8_t *into = source
    cdef size_t lines = len(source) // 16
    cdef int right
    with nogil:
        right = function(out, into, lines, flag)
    return bytes(target) if right else None


cdef class ExtractLoop:
    """One extractor over K rings and a slot file. `poll` until `finished`, then drop it; one thread."""

    cdef object _keep           # the buffers that the pointers below lead into
    cdef list _paths            # of the rings
    cdef ring_view rings[MOST_RINGS]
    cdef uint32_t ring_count
    cdef fc_slots_header *header
    cdef uint8_t *slot_base     # of the gradient slots
    cdef uint8_t *initial       # the initial-state slot, NULL if none
    cdef revision_view revisions[MOST_REVISIONS]
    cdef uint32_t revision_count
    cdef uint64_t pieces[MOST_PIECES][3]  # unit ranges [first, last) that hold data; bytes that the last unit lacks
    cdef uint64_t edge_of[MOST_CONNECTIONS]  # its number among those that are mirrored
    cdef revision_view initial_view
    cdef uint64_t silence_ns
    cdef fc_ll_strip strip
    cdef CopyEngine engine
    cdef uint8_t *scratch
    cdef bytearray _scratch

    def __cinit__(self, rings, memories, connections, slots_memory, uint64_t first_offset, uint64_t gradients_offset,
                  revisions, initial, uint64_t initial_connections, edges, uint64_t silence_ns, CopyEngine engine not None, str kernel="auto"):
        """Wire the loop up; `extractor.Extractor` is the way to make one."""
        cdef unsigned char[::1] view
        cdef uint32_t i, at
        if len(memories) > MOST_RINGS:
            raise FlowCheckError(f"{len(memories)} streams: the extractor takes {MOST_RINGS}")
        self.strip = fc_ll_kernel(kernel.encode())
        if self.strip == NULL:
            raise ValueError(f"this processor has no {kernel} kernel")
        self.engine = engine
        self.silence_ns = silence_ns
        self._scratch = bytearray(65536 + 64)
        self.scratch = self._scratch
        self._keep = []
        self._paths = [str(ring.path) for ring in rings]
        self.ring_count = len(memories)
        for i in range(self.ring_count):
            view = memories[i]
            self._keep.append(view)
            self.rings[i].header = <fc_ring_header *> &view[0]
            self.rings[i].records = &view[0] + self.rings[i].header.header_bytes
            self.rings[i].record_bytes = self.rings[i].header.record_bytes
            self.rings[i].mask = self.rings[i].header.records - 1
            self.rings[i].block = &view[0] + self.rings[i].header.extract_state_offset
            self.rings[i].block_bytes = self.rings[i].header.extract_state_bytes
            self.rings[i].connections = connections[i]
            self.rings[i].stalled_at = 0
            memset(&self.rings[i].state, 0, sizeof(fc_extract_state))
        view = slots_memory
        self._keep.append(view)
        self.header = <fc_slots_header *> &view[0]
        self.initial = &view[first_offset] if initial else NULL
        self.slot_base = &view[gradients_offset]
        if len(revisions) > MOST_REVISIONS or sum(len(r[1]) for r in revisions) + len(initial) > MOST_PIECES:
            raise FlowCheckError("the plan has more revisions or buckets than the extractor takes")
        at = 0
        self.revision_count = len(revisions)
        for i, (first, ranges, buckets, carried) in enumerate(revisions):
            self.revisions[i].first_iteration, self.revisions[i].connections = first, carried
            self.revisions[i].buckets = buckets
            at = self._add_pieces(&self.revisions[i], ranges, at)
        for i, place in enumerate(edges):
            if place >= self.header.edges:
                raise FlowCheckError(f"the slots have room for {self.header.edges} edges, the plan mirrors more")
            self.edge_of[i] = place
        self.initial_view.connections = initial_connections
        if initial:
            self._add_pieces(&self.initial_view, initial, at)
        self._recover()

    cdef uint32_t _add_pieces(self, revision_view *view, ranges, uint32_t at):
        view.first_piece = at
        view.pieces = len(ranges)
        for begin, end in ranges:
            self.pieces[at][0] = begin // 8
            self.pieces[at][1] = (end + 7) // 8
            self.pieces[at][2] = -end % 8
            at += 1
        return at

    cdef int _recover(self) except -1:
        """Take up where a killed extractor left off."""
        cdef uint32_t i
        cdef uint64_t now = _now_ns()
        cdef uint64_t number
        for i in range(self.ring_count):
            fc_recover(self.rings[i].block, self.rings[i].block_bytes, &self.rings[i].state, sizeof(fc_extract_state))
            self._check_cursors(i)
            FC_STORE_RELEASE(&self.rings[i].header.extracted, self.rings[i].state.extracted)
            self.rings[i].last_proof_ns = now
        if self.initial != NULL:
            self._recover_slot(<fc_slot *> self.initial)
        for number in range(self.header.slots):
            self._recover_slot(<fc_slot *> (self.slot_base + number * self.header.slot_bytes))
        return 0

    cdef int _check_cursors(self, uint32_t i) except -1:
        """Refuse a ring whose cursors cannot be: records that nobody has annotated would be taken for annotated ones."""
        cdef uint64_t parsed = FC_LOAD_ACQUIRE(&self.rings[i].header.parsed), extracted = self.rings[i].state.extracted
        if parsed - extracted > self.rings[i].mask + 1:  # wraps to a huge number where it is behind
            raise RingFormatError(f"{self._paths[i]}: {extracted} records extracted of {parsed} parsed cannot be in this ring: "
                                  "remove it and start again", self._paths[i])
        return 0

    cdef void _recover_slot(self, fc_slot *slot) noexcept nogil:
        cdef uint64_t *claim = <uint64_t *> (<uint8_t *> slot + slot.claim_offset)
        cdef uint64_t *done = <uint64_t *> (<uint8_t *> slot + slot.done_offset)
        cdef uint64_t word, total = 0
        for word in range((slot.units + 63) // 64):
            done[word] &= _bits_between(word, 0, slot.units)  # what lies behind the last unit counts as none
            claim[word] = done[word]
            total += FC_POPCOUNT(done[word])
        slot.done_units = total

    # -- slots ------------------------------------------------------------------------------------------------------

    cdef fc_slot *_slot(self, uint64_t iteration) noexcept nogil:
        """Return the open slot of an iteration that is not settled, opening it if it may be; NULL if it may not."""
        cdef fc_slot *slot
        cdef uint64_t consumed
        if iteration == 0:
            slot = <fc_slot *> self.initial
        else:
            slot = <fc_slot *> (self.slot_base + ((iteration - 1) % self.header.slots) * self.header.slot_bytes)
        if slot == NULL or slot.iteration == iteration:
            return slot
        consumed = FC_LOAD_ACQUIRE(&self.header.consumed_next)
        if consumed == 0:
            consumed = 1  # the initial state has a slot of its own
        if iteration != 0 and iteration >= consumed + self.header.slots:
            return NULL
        self._open(slot, iteration)
        return slot

    cdef revision_view *_view(self, uint64_t iteration) noexcept nogil:
        cdef revision_view *view = &self.initial_view
        cdef uint32_t i
        if iteration:
            view = &self.revisions[0]
            for i in range(self.revision_count):
                if self.revisions[i].first_iteration <= iteration:
                    view = &self.revisions[i]
        return view

    cdef void _open(self, fc_slot *slot, uint64_t iteration) noexcept nogil:
        cdef revision_view *view = self._view(iteration)
        cdef uint64_t *claim = <uint64_t *> (<uint8_t *> slot + slot.claim_offset)
        cdef uint64_t *done = <uint64_t *> (<uint8_t *> slot + slot.done_offset)
        cdef uint64_t unit, end = 0
        cdef uint64_t bitmap = slot.done_offset - slot.claim_offset
        cdef uint32_t i
        memset(claim, 0, bitmap)
        memset(done, 0, bitmap)
        if slot.edges_offset != slot.done_offset:
            memset(<uint8_t *> slot + slot.edges_offset, 0, self.header.edges * bitmap)
        memset(slot.source_bytes, 0, sizeof(slot.source_bytes))
        slot.done_units = 0
        # Padding between buckets is done from the start: nobody brings it.
        for i in range(view.first_piece, view.first_piece + view.pieces):
            for unit in range(end, self.pieces[i][0]):
                claim[unit // 64] |= <uint64_t> 1 << (unit % 64)
                done[unit // 64] |= <uint64_t> 1 << (unit % 64)
                slot.done_units += 1
            end = self.pieces[i][1]
        slot.units = end
        slot.state = FC_SLOT_FILLING
        slot.reason = FC_REASON_NONE
        slot.conflicts = slot.first_ns = slot.last_ns = 0
        FC_STORE_RELEASE(&slot.iteration, iteration)

    # -- one packet -------------------------------------------------------------------------------------------------

    cdef uint8_t _place(self, ring_view *ring, fc_record *record) noexcept nogil:
        """Place a record's payload; return its final verdict, or STALLED if its slot is not free yet."""
        cdef uint8_t *payload = <uint8_t *> record + sizeof(fc_record) + record.payload_offset
        cdef uint8_t *data
        cdef fc_slot *slot
        cdef uint64_t *claim
        cdef uint64_t *done
        cdef uint64_t *seen
        cdef window where
        cdef uint64_t fresh[MOST_WORDS]
        cdef uint64_t have, bits, unit
        cdef uint32_t i
        cdef bint all_new = True, any_new = False, equal = True
        cdef uint8_t verdict = record.verdict

        if record.payload_length == 0:
            return FC_CONTROL
        if (<uint64_t> record.payload_offset + record.payload_length > record.stored_length
                or record.stored_length > ring.record_bytes - sizeof(fc_record)):
            return FC_UNSYNCHRONISED
        if not _cover(record, &where):
            return FC_UNSYNCHRONISED
        if where.words == 0:
            if verdict == FC_STEP_RECORD:
                return FC_PARTIAL_SUM  # of the digests behind a record
            return FC_CONTROL  # what lies behind the message's data is whatever the sender's register held
        if record.iteration < self.header.settled_next:
            return record.decision if record.decision else (verdict if verdict == FC_INITIAL_STATE else FC_LATE)
        slot = self._slot(record.iteration)
        if slot == NULL:
            return STALLED
        if record.destination > slot.data_bytes or 8 * where.first + where.bytes > slot.data_bytes:
            return FC_UNSYNCHRONISED
        if where.first + (where.bytes + 7) // 8 > slot.units:
            return FC_UNSYNCHRONISED

        claim = <uint64_t *> (<uint8_t *> slot + slot.claim_offset) + where.first // 64
        done = <uint64_t *> (<uint8_t *> slot + slot.done_offset) + where.first // 64
        data = <uint8_t *> slot + slot.data_offset + 8 * where.first
        for i in range(where.words):
            have = FC_FETCH_OR(&claim[i], where.bits[i])
            fresh[i] = where.bits[i] & ~have
            all_new &= fresh[i] == where.bits[i]
            any_new |= fresh[i] != 0

        if all_new and where.whole:
            equal = self._take(record, payload, data, &where)
            if not equal:
                verdict = FC_UNSYNCHRONISED
        elif not self._take(record, payload, self.scratch, &where):
            equal = False
            verdict = FC_UNSYNCHRONISED
        else:
            for unit in range((where.bytes + 7) // 8):
                i = <uint32_t> ((where.first % 64 + unit) // 64)
                bits = <uint64_t> 1 << ((where.first + unit) % 64)
                have = 8 if 8 * unit + 8 <= where.bytes else where.bytes - 8 * unit
                if where.bits[i] & ~fresh[i] & bits and memcmp(data + 8 * unit, self.scratch + 8 * unit, have):
                    equal = False
            if not equal:
                slot.conflicts += 1
                verdict = FC_CONFLICT
            elif any_new:
                for unit in range((where.bytes + 7) // 8):
                    i = <uint32_t> ((where.first % 64 + unit) // 64)
                    have = 8 if 8 * unit + 8 <= where.bytes else where.bytes - 8 * unit
                    if fresh[i] >> ((where.first + unit) % 64) & 1:
                        memcpy(data + 8 * unit, self.scratch + 8 * unit, have)
            elif verdict == FC_PLACED and record.decision == FC_VERDICT_NONE:
                verdict = FC_DUPLICATE
        if not equal:
            for i in range(where.words):
                FC_FETCH_AND(&claim[i], ~fresh[i])
            return verdict
        if record.decision == FC_VERDICT_NONE:
            record.decision = verdict
        bits = 0
        for i in range(where.words):
            if fresh[i]:
                FC_FETCH_OR(&done[i], fresh[i])
                bits += FC_POPCOUNT(fresh[i])
        if slot.edges_offset != slot.done_offset and record.connection < MOST_CONNECTIONS:
            # Who takes over between this and the line above finds all of it claimed, and comes here again.
            seen = <uint64_t *> (<uint8_t *> slot + slot.edges_offset + self.edge_of[record.connection]
                                 * (slot.done_offset - slot.claim_offset)) + where.first // 64
            for i in range(where.words):
                if where.bits[i] & ~seen[i]:
                    FC_FETCH_OR(&seen[i], where.bits[i])
        if bits:
            FC_FETCH_ADD(&slot.done_units, bits)
            if slot.first_ns == 0:
                slot.first_ns = record.timestamp_ns
            slot.last_ns = record.timestamp_ns
        return record.decision

    cdef bint _take(self, fc_record *record, uint8_t *payload, uint8_t *data, window *where) noexcept nogil:
        """Bring a payload's data bytes to `data`, the first of its units; False if a line's flag is not the message's."""
        cdef uint64_t lines, first
        cdef uint8_t tail[8]
        if record.encoding == FC_ENCODING_PLAIN:
            self.engine.copy(data, payload, where.bytes)
            return True
        if record.encoding == FC_ENCODING_LL128:
            first = where.first - record.destination // 8
            return fc_ll128_strip(data, payload, record.wire_offset // 128, record.payload_length // 128, record.flag,
                                  first, where.bytes)
        lines = where.bytes // 8
        if not self.strip(data, payload, lines, <uint32_t> record.flag):
            return False
        # Lines from there on carry nothing, but their flags must be right like all others.
        while lines < record.payload_length // 16:
            if not self.strip(tail, payload + 16 * lines, 1, <uint32_t> record.flag):
                return False
            if 8 * lines < where.bytes:
                memcpy(data + 8 * lines, tail, where.bytes - 8 * lines)
            lines += 1
        return True

    # -- settling ---------------------------------------------------------------------------------------------------

    cdef bint _drained(self, ring_view *ring) noexcept nogil:
        if not FC_LOAD_ACQUIRE(&ring.header.ended):
            return False
        return ring.state.extracted == FC_LOAD_ACQUIRE(&ring.header.written)

    cdef uint64_t _expected(self, uint64_t iteration) noexcept nogil:
        """Return the connections, a bit each, that send anything of an iteration."""
        return self._view(iteration).connections

    cdef bint _is_past(self, uint64_t iteration, uint64_t now, bint whole, bint overtaken, bint *ended) noexcept nogil:
        """Whether no stream can still bring a byte of an iteration; `ended`: some only because they are over.

        Silence, in which a stream proves no place whatever it brings, tells only of an iteration that is `overtaken`, which
        some stream has gone past: a job may pause.

        Of an iteration that is `whole` only second copies can come; those have come when each connection has sent all its
        messages once. A live stream is not waited for where another one has no room to go on.
        """
        cdef uint32_t i, connection
        cdef uint64_t expected = self._expected(iteration)
        cdef ring_view *ring
        cdef bint out, crowded = False
        ended[0] = False
        for i in range(self.ring_count):
            crowded |= self.rings[i].stalled_at != 0
        for i in range(self.ring_count):
            ring = &self.rings[i]
            out = self._drained(ring)
            for connection in range(MOST_CONNECTIONS):
                if not (ring.connections & expected) >> connection & 1 or ring.state.settled[connection] > iteration:
                    continue
                if whole and (ring.state.reached[connection] > iteration or (ring.header.live and crowded)):
                    continue
                # A stream that waits so far ahead has shown all it will of this one: the ring's edges depend on each other, none
                # begins an iteration before all have ended the last but one. Without this, a connection of which nothing comes
                # would block it; and one that is counted by slots would block an updater that awaits the next iteration.
                if ring.stalled_at >= iteration + 2:
                    continue
                if out:
                    ended[0] = True
                elif not (ring.header.live and overtaken) or now - ring.last_proof_ns < self.silence_ns:
                    return False
        return True

    cdef uint64_t _skip(self, uint64_t iteration, uint64_t highest, uint64_t now) noexcept nogil:
        """Settle an iteration and those after it of which nothing has come and nothing can, all at once; return how many.

        0 if they are few, or if the ones that were skipped last are not taken yet.
        """
        cdef uint64_t number = iteration, end = highest if highest - iteration < MOST_SKIPPED else iteration + MOST_SKIPPED
        cdef bint ended
        if iteration == 0 or highest - iteration < LEAST_SKIPPED or (
                FC_LOAD_ACQUIRE(&self.header.consumed_next) < self.header.skipped_to):
            return 0
        while number < end:
            # Beyond the slots' number none can be open.
            if number - iteration <= self.header.slots and (
                    <fc_slot *> (self.slot_base + ((number - 1) % self.header.slots) * self.header.slot_bytes)).iteration == number:
                break
            if not self._is_past(number, now, False, True, &ended):
                break
            number += 1
        if number - iteration < LEAST_SKIPPED:
            return 0
        self.header.skipped_from, self.header.skipped_to = iteration, number
        FC_STORE_RELEASE(&self.header.settled_next, number)
        return number - iteration

    cdef uint64_t _settle(self, uint64_t now) noexcept nogil:
        """Decide iterations in order as far as possible; return how many."""
        cdef uint64_t iteration, highest = 0, settled = 0, skipped
        cdef uint32_t i
        cdef fc_slot *slot
        cdef bint ended, past
        for i in range(self.ring_count):
            if self.rings[i].state.highest_iteration > highest:
                highest = self.rings[i].state.highest_iteration
        while True:
            iteration = self.header.settled_next
            if iteration > highest:
                break
            skipped = self._skip(iteration, highest, now)
            if skipped:
                settled += skipped
                continue
            slot = self._slot(iteration)
            if slot == NULL:
                break
            past = self._is_past(iteration, now, slot.done_units == slot.units, highest > iteration, &ended)
            if past and slot.done_units == slot.units and slot.conflicts == 0:
                slot.state = FC_SLOT_WHOLE
            elif past:
                slot.state = FC_SLOT_INCOMPLETE
                slot.reason = FC_REASON_CONFLICT if slot.conflicts else FC_REASON_END_OF_STREAM if ended else FC_REASON_MISSING
            else:
                break
            if iteration:
                self._count_sources(slot, self._view(iteration))
            FC_STORE_RELEASE(&self.header.settled_next, iteration + 1)
            settled += 1
        return settled

    cdef void _count_sources(self, fc_slot *slot, revision_view *view) noexcept nogil:
        """Count the bytes of a slot's gradient by how many edges brought them: 64 units at once, by carrying."""
        cdef uint64_t words = (slot.done_offset - slot.claim_offset) // 8
        cdef uint64_t *edges = <uint64_t *> (<uint8_t *> slot + slot.edges_offset)
        cdef uint64_t several = self.header.edges if slot.edges_offset != slot.done_offset else 1
        cdef uint64_t least[3]      # units that one edge brought at least, two, three
        cdef uint64_t counts[4]
        cdef uint64_t word, mask, first, last, edge, bits, sources
        cdef uint32_t i
        memset(counts, 0, sizeof(counts))
        for i in range(view.first_piece, view.first_piece + view.buckets):
            first, last = self.pieces[i][0], self.pieces[i][1]
            sources = 0
            for word in range(first // 64, (last + 63) // 64):
                mask = _bits_between(word, first, last)
                memset(least, 0, sizeof(least))
                for edge in range(several):
                    bits = edges[edge * words + word] & mask
                    least[2] |= least[1] & bits
                    least[1] |= least[0] & bits
                    least[0] |= bits
                counts[0] += 8 * (FC_POPCOUNT(mask) - FC_POPCOUNT(least[0]))
                counts[1] += 8 * (FC_POPCOUNT(least[0]) - FC_POPCOUNT(least[1]))
                counts[2] += 8 * (FC_POPCOUNT(least[1]) - FC_POPCOUNT(least[2]))
                counts[3] += 8 * FC_POPCOUNT(least[2])
                bits = <uint64_t> 1 << ((last - 1) % 64)
                sources = ((least[0] & bits) != 0) + ((least[1] & bits) != 0) + ((least[2] & bits) != 0)
            counts[sources] -= self.pieces[i][2]
        memcpy(slot.source_bytes, counts, sizeof(counts))

    cdef void _reach(self, ring_view *ring, fc_record *record) noexcept nogil:
        """Note how far a record shows its connection to be."""
        cdef uint32_t connection = record.connection
        cdef fc_extract_state *state = &ring.state
        if record.iteration > state.reached[connection]:
            state.reached[connection] = record.iteration
        if record.last_pieces:
            if state.reaching[connection] != record.iteration:
                state.reaching[connection] = record.iteration
                state.reached_pieces[connection] = 0
            state.reached_pieces[connection] |= 1 << (record.queue_pair & 7)
            if FC_POPCOUNT(state.reached_pieces[connection]) >= record.last_pieces:
                if record.iteration + 1 > state.reached[connection]:
                    state.reached[connection] = record.iteration + 1

    # -- the loop ---------------------------------------------------------------------------------------------------

    cdef uint64_t _burst(self, ring_view *ring, uint64_t now) noexcept nogil:
        cdef uint64_t at = ring.state.extracted
        cdef uint64_t parsed = FC_LOAD_ACQUIRE(&ring.header.parsed)
        cdef uint64_t end = parsed if parsed - at < BURST else at + BURST
        cdef fc_record *record
        cdef uint8_t verdict
        cdef uint64_t past
        cdef uint64_t bytes_before = self.engine.engine_bytes, failed_before = self.engine.engine_failed
        ring.stalled_at = 0
        while at < end:
            record = <fc_record *> (ring.records + (at & ring.mask) * ring.record_bytes)
            rte_prefetch0(ring.records + ((at + 2) & ring.mask) * ring.record_bytes)
            verdict = record.verdict if record.verdict < FC_VERDICTS else FC_UNSYNCHRONISED
            if record.settled_lag and record.connection < MOST_CONNECTIONS:
                past = record.iteration + 1
                past = past - record.settled_lag if past > record.settled_lag else 0
                if past > ring.state.settled[record.connection]:
                    ring.state.settled[record.connection] = <uint32_t> past
                if record.iteration > ring.state.highest_iteration:
                    ring.state.highest_iteration = record.iteration
                self._reach(ring, record)
                ring.last_proof_ns = now
            if verdict == FC_PLACED or verdict == FC_INITIAL_STATE or verdict == FC_STEP_RECORD:
                verdict = self._place(ring, record)
                if verdict == STALLED:
                    ring.stalled_at = record.iteration
                    break
                record.decision = verdict
            ring.state.counters[verdict] += 1
            at += 1
        if at != ring.state.extracted:
            past = at - ring.state.extracted
            ring.state.extracted = at
            ring.state.engine_bytes += self.engine.engine_bytes - bytes_before
            ring.state.engine_failed += self.engine.engine_failed - failed_before
            fc_publish(ring.block, ring.block_bytes, &ring.state, sizeof(fc_extract_state))
            FC_STORE_RELEASE(&ring.header.extracted, at)
            return past
        return 0

    def poll(self) -> int:
        """poll() -> records done and iterations settled in one burst of each ring; 0 if there is nothing to do now."""
        cdef uint64_t work = 0, now
        cdef uint32_t i
        cdef bint all_drained = True
        for i in range(self.ring_count):
            self._check_cursors(i)
        with nogil:
            now = _now_ns()
            for i in range(self.ring_count):
                work += self._burst(&self.rings[i], now)
            work += self._settle(now)
            for i in range(self.ring_count):
                all_drained &= self._drained(&self.rings[i])
            if all_drained and work == 0 and not FC_LOAD_ACQUIRE(&self.header.ended) and self._all_settled():
                FC_STORE_RELEASE(&self.header.ended, 1)
                work = 1
        return work

    cdef bint _all_settled(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self.ring_count):
            if self.rings[i].state.highest_iteration >= self.header.settled_next:
                return False
        return True


cdef uint64_t _now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec
