# SPDX-License-Identifier: MIT
"""The extractor's loop: annotated ring records into gradient slots.

The order in which a packet's effects become visible is what makes a kill at any instruction harmless: units are
claimed, bytes are placed, the record's `decision` is written, the units are marked done. A slot's bytes count only
where they are done; at start, claims fall back to done, and a record that has a decision keeps it.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from data_extractor._lines cimport (
    FC_COMPARE, FC_OTHER_BYTES, FC_OTHER_FLAG, FC_STORE, FC_STREAM, FC_STREAMED, fc_kernels, fc_kernels_of, fc_ll128_run,
    fc_ll128_runs, fc_ll128_take, fc_ll_take,
)
from flowcheck._copy cimport CopyEngine
from flowcheck._formats cimport (
    FC_CONFLICT, FC_CONTROL, FC_DUPLICATE, FC_ENCODING_LL, FC_ENCODING_LL128, FC_ENCODING_PLAIN,
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
    #define FC_LOWEST(x) ((uint32_t)__builtin_ctzll(x))
    """
    uint64_t FC_POPCOUNT(uint64_t value)
    uint32_t FC_LOWEST(uint64_t value)  # set bit of a value that is not 0

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
    AHEAD = 48                  # records between the one that is placed and the one whose header is fetched
    FIRST_LINES = 8             # of the following payload, fetched while one is placed
    MOST_WAITING = 32           # ranges that are placed before they are made done
    HAS_NONE = 0                # of a range of units
    HAS_SOME = 1
    HAS_ALL = 2

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
    uint64_t units              # of the range, 0: the payload brings none
    bint whole                  # all units of the range are brought
    uint32_t words              # of the bitmap
    uint64_t bits[MOST_WORDS]   # bit (first % 64 + i) stands for unit first + i; not there yet if all units are brought


# A range of units whose bytes are placed and which are not done yet, or that came again.
cdef struct placed_range:
    fc_slot *slot
    uint64_t first
    uint64_t units
    uint64_t first_ns           # reception of its first packet, and of its last
    uint64_t last_ns
    uint16_t connection
    bint fresh                  # they came first


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


cdef void _mark_none(window *where) noexcept nogil:
    """Make room for the bits of a range."""
    where.words = <uint32_t> ((where.first % 64 + where.units + 63) // 64)
    memset(where.bits, 0, 8 * where.words)


cdef int _held(const uint64_t *bitmap, uint64_t first, uint64_t units) noexcept nogil:
    """Return how many of a range's units a bitmap has: HAS_NONE, HAS_SOME or HAS_ALL."""
    cdef uint64_t end = first + units, word, bits, have, found = 0, lacking = 0
    for word in range(first // 64, (end + 63) // 64):
        bits = _bits_between(word, first, end)
        have = bitmap[word] & bits
        found |= have
        lacking |= have ^ bits
    return HAS_NONE if found == 0 else HAS_SOME if lacking else HAS_ALL


cdef void _add(uint64_t *bitmap, uint64_t first, uint64_t units) noexcept nogil:
    """Set the bits of a range, after all that was written before."""
    cdef uint64_t end = first + units, word
    for word in range(first // 64, (end + 63) // 64):
        FC_STORE_RELEASE(&bitmap[word], bitmap[word] | _bits_between(word, first, end))


cdef void _remove(uint64_t *bitmap, uint64_t first, uint64_t units) noexcept nogil:
    """Clear the bits of a range."""
    cdef uint64_t end = first + units, word
    for word in range(first // 64, (end + 63) // 64):
        bitmap[word] &= ~_bits_between(word, first, end)


cdef bint _cover(const fc_record *record, window *where) noexcept nogil:
    """Find the units that a record's payload brings; False if its annotation cannot be."""
    cdef uint64_t begin, end
    if record.destination % 8:
        return False
    if record.encoding == FC_ENCODING_LL128:
        return _cover_ll128(record, where)
    if record.encoding == FC_ENCODING_LL:
        if record.payload_length % 16 or record.wire_offset % 16:
            return False
        begin, end = record.wire_offset // 2, (<uint64_t> record.wire_offset + record.payload_length) // 2
    elif record.encoding == FC_ENCODING_PLAIN and (
            record.wire_offset < record.message_bytes or record.verdict == FC_STEP_RECORD):
        begin, end = record.wire_offset, <uint64_t> record.wire_offset + record.payload_length
    else:
        return False
    if begin % 8:
        return False
    _cover_all(record, where, begin, end)
    return True


cdef void _cover_all(const fc_record *record, window *where, uint64_t begin, uint64_t end) noexcept nogil:
    """Say that a payload brings all of a message's bytes [begin, end) that count."""
    end = end if end < record.message_bytes else record.message_bytes
    where.first = (record.destination + begin) // 8
    where.bytes = end - begin if begin < end else 0
    where.units = (where.bytes + 7) // 8
    where.whole = True


cdef bint _cover_ll128(const fc_record *record, window *where) noexcept nogil:
    cdef uint64_t begin, end, line, last, low, high, units
    cdef fc_ll128_run runs[2]
    cdef uint32_t count, i
    if record.payload_length % 128 or record.wire_offset % 128:
        return False
    line, last = record.wire_offset // 128, (<uint64_t> record.wire_offset + record.payload_length) // 128
    if line % 8 == 0 and last % 8 == 0:  # halves of groups, which have no gaps
        _cover_all(record, where, 120 * line, 120 * last)
        return True
    units = (<uint64_t> record.message_bytes + 7) // 8
    low, high = ~(<uint64_t> 0), 0
    for i in range(<uint32_t> line, <uint32_t> last):
        for count in range(fc_ll128_runs(i, runs)):
            begin, end = runs[count].unit, runs[count].unit + runs[count].units
            end = end if end < units else units
            if begin < end:
                low = begin if begin < low else low
                high = end if end > high else high
    where.units = high - low if low < high else 0
    if where.units == 0:
        return True
    where.first = record.destination // 8 + low
    where.bytes = (8 * high if 8 * high < record.message_bytes else record.message_bytes) - 8 * low
    _mark_none(where)
    for i in range(<uint32_t> line, <uint32_t> last):
        for count in range(fc_ll128_runs(i, runs)):
            begin, end = runs[count].unit, runs[count].unit + runs[count].units
            end = end if end < units else units
            if begin < end:
                _mark(where, begin - low, end - begin)
    units = 0
    for i in range(where.words):
        units += FC_POPCOUNT(where.bits[i])
    where.whole = units == where.units
    return True


def strip(bytes source, uint32_t flag, str kernel="auto"):
    """strip(source, flag, kernel="auto") -> the data bytes of LL lines, or None if a flag is wrong.

    kernel: "auto", "scalar" or "avx2"; ValueError if this processor has not got it.
    """
    cdef const fc_kernels *kernels = fc_kernels_of(kernel.encode())
    if kernels == NULL:
        raise ValueError(f"this processor has no {kernel} kernel")
    if len(source) % 16:
        raise ValueError(f"{len(source)} bytes are not whole lines of 16")
    target = bytearray(len(source) // 2)
    cdef uint8_t *out = target
    cdef const uint8_t *into = source
    cdef size_t lines = len(source) // 16
    cdef int other
    with nogil:
        other = kernels.ll(out, into, lines, flag, FC_STORE)
    return None if other else bytes(target)


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
    cdef const fc_kernels *kernels
    cdef CopyEngine engine
    cdef uint8_t *scratch
    cdef bytearray _scratch
    cdef placed_range waiting[MOST_WAITING]
    cdef uint32_t waiting_count
    cdef fc_slot *last_slot     # that was placed into, NULL at first

    def __cinit__(self, rings, memories, connections, slots_memory, uint64_t first_offset, uint64_t gradients_offset,
                  revisions, initial, uint64_t initial_connections, edges, uint64_t silence_ns, CopyEngine engine not None, str kernel="auto"):
        """Wire the loop up; `extractor.Extractor` is the way to make one."""
        cdef unsigned char[::1] view
        cdef uint32_t i, at
        if len(memories) > MOST_RINGS:
            raise FlowCheckError(f"{len(memories)} streams: the extractor takes {MOST_RINGS}")
        self.kernels = fc_kernels_of(kernel.encode())
        if self.kernels == NULL:
            raise ValueError(f"this processor has no {kernel} kernel")
        self.engine = engine
        self.waiting_count, self.last_slot = 0, NULL
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
        cdef window where
        cdef int held, other
        cdef uint8_t verdict = record.verdict

        if record.payload_length == 0:
            return FC_CONTROL
        if (<uint64_t> record.payload_offset + record.payload_length > record.stored_length
                or record.stored_length > ring.record_bytes - sizeof(fc_record)):
            return FC_UNSYNCHRONISED
        if not _cover(record, &where):
            return FC_UNSYNCHRONISED
        if where.units == 0:
            if verdict == FC_STEP_RECORD:
                return FC_PARTIAL_SUM  # of the digests behind a record
            return FC_CONTROL  # what lies behind the message's data is whatever the sender's register held
        if record.iteration < self.header.settled_next:
            return record.decision if record.decision else (verdict if verdict == FC_INITIAL_STATE else FC_LATE)
        slot = self.last_slot
        if slot == NULL or slot.iteration != record.iteration:
            slot = self.last_slot = self._slot(record.iteration)
            if slot == NULL:
                return STALLED
        if record.destination > slot.data_bytes or 8 * where.first + where.bytes > slot.data_bytes:
            return FC_UNSYNCHRONISED
        if where.first + where.units > slot.units:
            return FC_UNSYNCHRONISED

        claim = <uint64_t *> (<uint8_t *> slot + slot.claim_offset)
        held = _held(claim, where.first, where.units) if where.whole else HAS_SOME
        if held == HAS_SOME:
            return self._place_in_part(record, payload, slot, &where)
        data = <uint8_t *> slot + slot.data_offset + 8 * where.first
        if held == HAS_NONE:
            _add(claim, where.first, where.units)
        other = self._take(record, payload, data, &where, FC_STREAM if held == HAS_NONE else FC_COMPARE)
        if other:
            if held == HAS_NONE:
                _remove(claim, where.first, where.units)
            if other & FC_OTHER_FLAG:
                return FC_UNSYNCHRONISED
            slot.conflicts += 1
            return FC_CONFLICT
        if held == HAS_ALL and verdict == FC_PLACED:
            verdict = FC_DUPLICATE
        if record.decision == FC_VERDICT_NONE:
            record.decision = verdict
        self._wait(slot, record, where.first, where.units, held == HAS_NONE)
        return record.decision

    cdef void _wait(self, fc_slot *slot, const fc_record *record, uint64_t first, uint64_t units, bint fresh) noexcept nogil:
        """Have `_make_done` do a range of units later; what continues the range before is one with it."""
        cdef placed_range *entry
        if self.waiting_count:
            entry = &self.waiting[self.waiting_count - 1]
            if (entry.first + entry.units == first and entry.slot == slot and entry.fresh == fresh
                    and entry.connection == record.connection):
                entry.units += units
                entry.last_ns = record.timestamp_ns
                return
        if self.waiting_count == MOST_WAITING:
            self._make_done()
        entry = &self.waiting[self.waiting_count]
        entry.slot, entry.first, entry.units, entry.fresh = slot, first, units, fresh
        entry.first_ns, entry.last_ns, entry.connection = record.timestamp_ns, record.timestamp_ns, record.connection
        self.waiting_count += 1

    cdef void _make_done(self) noexcept nogil:
        """Make done what was placed and decided.

        For many records at once, since their bytes may have gone past the caches: to wait until those have arrived costs as
        much as a small payload.
        """
        cdef placed_range *entry
        cdef uint32_t i
        if self.waiting_count == 0:
            return
        FC_STREAMED()
        for i in range(self.waiting_count):
            entry = &self.waiting[i]
            if entry.fresh:
                _add(<uint64_t *> (<uint8_t *> entry.slot + entry.slot.done_offset), entry.first, entry.units)
                self._count(entry.slot, entry.units, entry.first_ns, entry.last_ns)
            if entry.slot.edges_offset != entry.slot.done_offset and entry.connection < MOST_CONNECTIONS:
                # Who takes over between this and the lines above finds all of it claimed, and comes here again.
                _add(self._seen(entry.slot, entry.connection), entry.first, entry.units)
        self.waiting_count = 0

    cdef inline uint64_t *_seen(self, fc_slot *slot, uint16_t connection) noexcept nogil:
        """Return the bitmap of what a connection's edge brought."""
        return <uint64_t *> (<uint8_t *> slot + slot.edges_offset
                             + self.edge_of[connection] * (slot.done_offset - slot.claim_offset))

    cdef inline void _count(self, fc_slot *slot, uint64_t units, uint64_t first_ns, uint64_t last_ns) noexcept nogil:
        slot.done_units += units
        if slot.first_ns == 0:
            slot.first_ns = first_ns
        slot.last_ns = last_ns

    cdef uint8_t _place_in_part(self, fc_record *record, uint8_t *payload, fc_slot *slot, window *where) noexcept nogil:
        """Place what of a payload is new and compare the rest; return its verdict."""
        cdef uint64_t *claim = <uint64_t *> (<uint8_t *> slot + slot.claim_offset) + where.first // 64
        cdef uint64_t *done = <uint64_t *> (<uint8_t *> slot + slot.done_offset) + where.first // 64
        cdef uint8_t *data = <uint8_t *> slot + slot.data_offset + 8 * where.first
        cdef uint64_t *seen
        cdef uint64_t fresh[MOST_WORDS]
        cdef uint64_t have, bits, unit
        cdef uint32_t i
        cdef bint any_new = False, equal = True
        cdef uint8_t verdict = record.verdict
        self._make_done()
        if where.whole:
            _mark_none(where)
            _mark(where, 0, where.units)
        if self._take(record, payload, self.scratch, where, FC_STORE):
            return FC_UNSYNCHRONISED
        for i in range(where.words):
            fresh[i] = where.bits[i] & ~claim[i]
            any_new |= fresh[i] != 0
        for unit in range(where.units):
            i = <uint32_t> ((where.first % 64 + unit) // 64)
            bits = <uint64_t> 1 << ((where.first + unit) % 64)
            have = 8 if 8 * unit + 8 <= where.bytes else where.bytes - 8 * unit
            if where.bits[i] & ~fresh[i] & bits and memcmp(data + 8 * unit, self.scratch + 8 * unit, have):
                equal = False
        if not equal:
            slot.conflicts += 1
            return FC_CONFLICT
        for i in range(where.words):
            claim[i] |= fresh[i]
        if not any_new and verdict == FC_PLACED:
            verdict = FC_DUPLICATE
        for unit in range(where.units if any_new else 0):
            i = <uint32_t> ((where.first % 64 + unit) // 64)
            have = 8 if 8 * unit + 8 <= where.bytes else where.bytes - 8 * unit
            if fresh[i] >> ((where.first + unit) % 64) & 1:
                memcpy(data + 8 * unit, self.scratch + 8 * unit, have)
        if record.decision == FC_VERDICT_NONE:
            record.decision = verdict
        bits = 0
        for i in range(where.words):
            FC_STORE_RELEASE(&done[i], done[i] | fresh[i])
            bits += FC_POPCOUNT(fresh[i])
        if bits:
            self._count(slot, bits, record.timestamp_ns, record.timestamp_ns)
        if slot.edges_offset != slot.done_offset and record.connection < MOST_CONNECTIONS:
            seen = self._seen(slot, record.connection) + where.first // 64
            for i in range(where.words):
                seen[i] |= where.bits[i]
        return record.decision

    cdef int _take(self, fc_record *record, uint8_t *payload, uint8_t *data, window *where, int how) noexcept nogil:
        """Bring a payload's data bytes to `data`, the first of its units, or compare them; return what was other than it should be."""
        if record.encoding == FC_ENCODING_LL:
            return fc_ll_take(self.kernels.ll, data, payload, record.payload_length // 16, record.flag, where.bytes, how)
        if record.encoding == FC_ENCODING_LL128:
            return fc_ll128_take(self.kernels.ll128, data, payload, record.wire_offset // 128, record.payload_length // 128,
                                 record.flag, where.first - record.destination // 8, where.bytes, how)
        if how == FC_STREAM and self.engine.device_count:
            self.engine.copy(data, payload, where.bytes)
            return 0
        return self.kernels.plain(data, payload, where.bytes, 0, how)

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
        cdef uint64_t expected = self._expected(iteration), awaited
        cdef ring_view *ring
        cdef bint out, crowded = False
        ended[0] = False
        for i in range(self.ring_count):
            crowded |= self.rings[i].stalled_at != 0
        for i in range(self.ring_count):
            ring = &self.rings[i]
            out = self._drained(ring)
            awaited = ring.connections & expected
            while awaited:
                connection = FC_LOWEST(awaited)
                awaited &= awaited - 1
                if ring.state.settled[connection] > iteration:
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
        cdef uint64_t bytes[4]      # brought by no edge at least, and so on
        cdef uint64_t word, mask, first, last, edge, bits, sources
        cdef uint32_t i
        memset(bytes, 0, sizeof(bytes))
        for i in range(view.first_piece, view.first_piece + view.buckets):
            first, last = self.pieces[i][0], self.pieces[i][1]
            memset(least, 0, sizeof(least))
            for word in range(first // 64, (last + 63) // 64):
                mask = _bits_between(word, first, last)
                least[0], least[1], least[2] = edges[word] & mask, 0, 0
                for edge in range(1, several):
                    bits = edges[edge * words + word] & mask
                    least[2] |= least[1] & bits
                    least[1] |= least[0] & bits
                    least[0] |= bits
                bytes[1] += 8 * FC_POPCOUNT(least[0])
                bytes[2] += 8 * FC_POPCOUNT(least[1])
                bytes[3] += 8 * FC_POPCOUNT(least[2])
            bits = <uint64_t> 1 << ((last - 1) % 64)
            sources = ((least[0] & bits) != 0) + ((least[1] & bits) != 0) + ((least[2] & bits) != 0)
            bytes[0] += 8 * (last - first)
            # What the last unit lacks counts for nothing.
            for edge in range(sources + 1):
                bytes[edge] -= self.pieces[i][2]
        for edge in range(3):
            slot.source_bytes[edge] = bytes[edge] - bytes[edge + 1]
        slot.source_bytes[3] = bytes[3]

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
        cdef const fc_record *following
        cdef uint8_t verdict
        cdef uint32_t line
        cdef uint64_t past
        cdef uint64_t bytes_before = self.engine.engine_bytes, failed_before = self.engine.engine_failed
        ring.stalled_at = 0
        while at < end:
            record = <fc_record *> (ring.records + (at & ring.mask) * ring.record_bytes)
            rte_prefetch0(ring.records + ((at + AHEAD) & ring.mask) * ring.record_bytes)
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
                following = <const fc_record *> (ring.records + ((at + 1) & ring.mask) * ring.record_bytes)
                if at + 1 < end and following.verdict == verdict:
                    # The processor goes on by itself where it sees reads in order, but not from one payload to the next.
                    for line in range(<uint32_t> FIRST_LINES):
                        rte_prefetch0(<const uint8_t *> following + sizeof(fc_record) + following.payload_offset + 64 * line)
                verdict = self._place(ring, record)
                if verdict == STALLED:
                    ring.stalled_at = record.iteration
                    break
                record.decision = verdict
            ring.state.counters[verdict] += 1
            at += 1
        self._make_done()
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
