# SPDX-License-Identifier: MIT
"""Input: annotated records of two rings, as commands, whatever their annotation says; the extractor fills slots by them.

The first bytes: which kernel, whether the rings are live ones, and whether a slot's header and bitmaps begin as something
else than an empty slot. Then per record, 24 bytes:

    0      flags: 1 numbers are made small, so that they fit together more often   2 flags of lines are right
                  4 into the second ring   8 the updater takes what is settled   16 the extractor is polled before it
                  32 the payload is another one   64 its stream has ended   128 all as the bytes say, sizes too
    1      verdict      2 encoding      3 connection      4 iteration      5 settled lag      6 last pieces      7 decision
    8-9    payload offset  10-11 payload length  12-13 message bytes  14-17 destination  18-21 wire offset  22-23 stored length

What belongs to nobody in a slot file, and what lies behind a stored frame, may not be touched. Bytes that are done keep
their value until the slot is opened anew.
"""

include "../../data_extractor/_extractor.pyx"

from posix.stdlib cimport posix_memalign

from flowcheck._copy import CopyEngine
from fuzz import fixture

cdef extern from "_target.h" nogil:
    void fuzz_claim(bint holds, const char *what, long long number)
    void fuzz_forbid(const void *begin, size_t bytes)
    void fuzz_allow(const void *begin, size_t bytes)

cdef enum:
    RECORDS = 16
    COMMAND_BYTES = 24
    SLOTS = 3
    GRADIENT_BYTES = 2056       # no multiple of 64: the last word of a bitmap is not full
    INITIAL_BYTES = 520
    WORDS = 8                   # of a bitmap
    EDGES = 2
    SILENCE_NS = 1000

cdef void *loops[2]             # borrowed from _kept
cdef uint32_t loop_count = 0
cdef uint8_t kept_data[512 * WORDS * (SLOTS + 1)]
cdef uint64_t kept_done[(SLOTS + 1) * WORDS]
cdef uint64_t kept_iteration[SLOTS + 1]
cdef uint32_t kept_words[SLOTS + 1]
cdef uint64_t now               # of a clock


cdef inline uint64_t _number(const uint8_t *at, int bytes) noexcept nogil:
    cdef uint64_t value = 0
    memcpy(&value, at, bytes)
    return value


cdef inline fc_slot *_slot_at(ExtractLoop loop, uint32_t number) noexcept nogil:
    """Return a slot, the initial state's last."""
    if number == SLOTS:
        return <fc_slot *> loop.initial
    return <fc_slot *> (loop.slot_base + number * loop.header.slot_bytes)


cdef inline uint64_t _bitmaps_bytes(const fc_slot *slot) noexcept nogil:
    """Return how long the bitmaps of a slot are together: claimed, done, and one per edge where there are several."""
    return (slot.done_offset - slot.claim_offset) * (2 + (EDGES if slot.edges_offset != slot.done_offset else 0))


cdef void _reset(ExtractLoop loop) noexcept nogil:
    """Make rings and slots what they were when they were made."""
    cdef uint32_t i
    cdef fc_slot *slot
    for i in range(2):
        loop.rings[i].header.written = loop.rings[i].header.parsed = loop.rings[i].header.extracted = 0
        loop.rings[i].header.ended = 0
        memset(&loop.rings[i].state, 0, sizeof(fc_extract_state))
        memset(loop.rings[i].block, 0, 8)
        memset(loop.rings[i].block + loop.rings[i].block_bytes, 0, 8)
        loop.rings[i].stalled_at = loop.rings[i].last_proof_ns = 0
    loop.header.settled_next = loop.header.consumed_next = loop.header.ended = 0
    loop.last_slot = NULL
    loop.header.skipped_from = loop.header.skipped_to = 0
    for i in range(SLOTS + 1):
        slot = _slot_at(loop, i)
        slot.iteration = ~(<uint64_t> 0)
        slot.state = slot.reason = slot.units = slot.done_units = slot.conflicts = slot.first_ns = slot.last_ns = 0
        memset(slot.source_bytes, 0, sizeof(slot.source_bytes))
        memset(<uint8_t *> slot + slot.claim_offset, 0, _bitmaps_bytes(slot))


cdef void _fence(ExtractLoop loop) noexcept nogil:
    """Forbid what belongs to nobody: between the parts of a slot, and behind its data."""
    cdef uint32_t i
    cdef fc_slot *slot
    cdef uint8_t *begin
    cdef uint64_t bitmaps, room
    for i in range(SLOTS + 1):
        slot = _slot_at(loop, i)
        begin = <uint8_t *> slot
        bitmaps = slot.claim_offset + _bitmaps_bytes(slot)
        fuzz_forbid(begin + sizeof(fc_slot), slot.claim_offset - sizeof(fc_slot))
        fuzz_forbid(begin + bitmaps, slot.data_offset - bitmaps)
        room = loop.header.slot_bytes if i < SLOTS else <uint64_t> (loop.slot_base - loop.initial)
        fuzz_forbid(begin + slot.data_offset + slot.data_bytes, room - slot.data_offset - slot.data_bytes)


cdef void _keep(ExtractLoop loop) noexcept nogil:
    """Keep what is claimed and done of the slots, in pieces that stand for a word of the bitmap."""
    cdef uint32_t i, word
    cdef fc_slot *slot
    cdef uint64_t *claim
    cdef uint64_t *done
    cdef uint8_t *data
    for i in range(SLOTS + 1):
        slot = _slot_at(loop, i)
        kept_iteration[i] = slot.iteration
        kept_words[i] = <uint32_t> ((slot.units + 63) // 64)
        claim, done = <uint64_t *> (<uint8_t *> slot + slot.claim_offset), <uint64_t *> (<uint8_t *> slot + slot.done_offset)
        for word in range(kept_words[i]):
            # What another process calls done is not claimed: its bytes were never there.
            kept_done[WORDS * i + word] = done[word] & claim[word]
            if kept_done[WORDS * i + word]:
                data = <uint8_t *> slot + slot.data_offset + 512 * word
                memcpy(kept_data + 512 * (WORDS * i + word), data, _piece(slot, word))


cdef inline uint32_t _piece(const fc_slot *slot, uint32_t word) noexcept nogil:
    """Return how many bytes of a slot's data a word of its bitmaps stands for."""
    return 512 if 512 * (word + 1) <= slot.data_bytes else <uint32_t> (slot.data_bytes - 512 * word)


cdef bint _unchanged(const uint8_t *data, const uint8_t *kept, uint64_t done, uint32_t bytes) noexcept nogil:
    """Whether the units of a piece that were done are what they were."""
    cdef uint32_t at
    if memcmp(data, kept, bytes) == 0:
        return True
    for at in range(0, bytes, 8):
        if done >> (at // 8) & 1 and memcmp(data + at, kept + at, 8 if at + 8 <= bytes else bytes - at):
            return False
    return True


cdef void _compare(ExtractLoop loop, bint consistent) noexcept nogil:
    """Hold the slots against what they were before a poll."""
    cdef uint32_t i, edge, word, words
    cdef uint64_t counted
    cdef fc_slot *slot
    cdef uint64_t *claim
    cdef uint64_t *done
    cdef uint64_t *edges
    for i in range(SLOTS + 1):
        slot = _slot_at(loop, i)
        claim, done = <uint64_t *> (<uint8_t *> slot + slot.claim_offset), <uint64_t *> (<uint8_t *> slot + slot.done_offset)
        edges = <uint64_t *> (<uint8_t *> slot + slot.edges_offset)
        words = <uint32_t> ((slot.units + 63) // 64)
        fuzz_claim(8 * slot.units <= slot.data_bytes + 7, "units lie in their slot", slot.units)
        if consistent:
            counted = 0
            for word in range(words):
                counted += FC_POPCOUNT(done[word])
                fuzz_claim(claim[word] == done[word], "after a poll nothing is only claimed", word)
                for edge in range(EDGES if edges != done else 0):
                    fuzz_claim(edges[edge * WORDS + word] & ~done[word] == 0, "what an edge brought is done", word)
            fuzz_claim(counted == slot.done_units, "done units are counted", counted)
        if slot.iteration != kept_iteration[i]:
            continue
        for word in range(kept_words[i]):
            counted = kept_done[WORDS * i + word]
            fuzz_claim(counted & ~done[word] == 0, "done stays done", word)
            if counted:
                fuzz_claim(_unchanged(<uint8_t *> slot + slot.data_offset + 512 * word, kept_data + 512 * (WORDS * i + word),
                                      counted, _piece(slot, word)), "bytes that are done stay as they are", word)


cdef void _check_settled(ExtractLoop loop, uint64_t first, uint64_t last) noexcept nogil:
    """Hold what the slots of just settled iterations, from the first to before the last, say against what they have."""
    cdef uint64_t counted, bytes
    cdef uint32_t i, piece
    cdef fc_slot *slot
    cdef revision_view *view
    for i in range(SLOTS + 1):
        slot = _slot_at(loop, i)
        if not first <= slot.iteration < last or i != ((slot.iteration - 1) % SLOTS if slot.iteration else SLOTS):
            continue
        fuzz_claim((slot.state == FC_SLOT_WHOLE) == (slot.done_units == slot.units and slot.conflicts == 0),
                   "whole is whole", slot.done_units)
        fuzz_claim((slot.state == FC_SLOT_INCOMPLETE) == (slot.reason != FC_REASON_NONE), "what is not has a reason", slot.reason)
        if slot.iteration == 0:
            continue
        view = loop._view(slot.iteration)
        counted, bytes = slot.source_bytes[0] + slot.source_bytes[1] + slot.source_bytes[2] + slot.source_bytes[3], 0
        for piece in range(view.first_piece, view.first_piece + view.buckets):
            bytes += 8 * (loop.pieces[piece][1] - loop.pieces[piece][0]) - loop.pieces[piece][2]
        fuzz_claim(counted == bytes and slot.source_bytes[3] == 0, "every byte came over so many of two edges", counted)


cdef void _poll(ExtractLoop loop, bint consistent) noexcept nogil:
    global now
    cdef uint32_t i, verdict
    cdef uint64_t counted, settled = loop.header.settled_next
    _keep(loop)
    now += SILENCE_NS // 2
    for i in range(2):
        loop._burst(&loop.rings[i], now)
        counted = 0
        for verdict in range(16):
            counted += loop.rings[i].state.counters[verdict]
        fuzz_claim(counted == loop.rings[i].state.extracted, "a verdict for each record", counted)
        fuzz_claim(loop.rings[i].header.extracted == loop.rings[i].state.extracted <= loop.rings[i].header.parsed,
                   "cursors", loop.rings[i].state.extracted)
    _compare(loop, consistent)
    loop._settle(now)
    fuzz_claim(loop.header.settled_next >= settled, "settled stays settled", loop.header.settled_next)
    fuzz_claim(loop.header.settled_next <= settled + SLOTS + 1 + loop.header.skipped_to - loop.header.skipped_from,
               "no more is settled than there are slots, and skipped", loop.header.settled_next)
    # Those that were skipped have no slot.
    _check_settled(loop, loop.header.skipped_to if settled < loop.header.skipped_to else settled, loop.header.settled_next)


cdef void _command(ExtractLoop loop, const uint8_t *command) noexcept nogil:
    cdef uint8_t flags = command[0]
    cdef ring_view *ring = &loop.rings[flags >> 2 & 1]
    cdef uint32_t room = ring.record_bytes - sizeof(fc_record), stored, at, line
    cdef fc_record *record
    cdef uint8_t *frame
    cdef uint64_t flag
    if ring.header.parsed - ring.state.extracted >= RECORDS:
        return
    record = <fc_record *> (ring.records + (ring.header.parsed & ring.mask) * ring.record_bytes)
    frame = <uint8_t *> record + sizeof(fc_record)
    fuzz_allow(frame, room)
    memset(record, 0, sizeof(fc_record))
    record.verdict, record.encoding, record.connection = command[1], command[2], command[3]
    record.iteration, record.settled_lag, record.last_pieces = command[4], command[5], command[6]
    record.decision, record.queue_pair = command[7] & 15, command[7] >> 4
    record.payload_offset, record.payload_length = <uint16_t> _number(command + 8, 2), <uint16_t> _number(command + 10, 2)
    record.message_bytes, record.destination = <uint32_t> _number(command + 12, 2), _number(command + 14, 4)
    record.wire_offset, record.stored_length = <uint32_t> _number(command + 18, 4), <uint32_t> _number(command + 22, 2)
    record.sequence, record.timestamp_ns = ring.header.parsed, ring.header.parsed
    if flags & 128:
        record.message_bytes |= record.wire_offset << 16
        record.destination |= record.destination << 32
        # Just so far that many are skipped at once, which takes long; or as far as can be, which no packet shows to be begun.
        record.iteration |= (<uint32_t> command[23] & 1) << 8
        if command[23] == 255:
            record.iteration, record.settled_lag = ~record.iteration, 0
    if flags & 1:
        record.verdict &= 3
        record.verdict = FC_STEP_RECORD if record.verdict == 1 else FC_INITIAL_STATE if record.verdict == 2 else FC_PLACED
        record.encoding = 1 + record.encoding % 3
        record.connection &= 7
        record.iteration &= 7
        record.decision = 0
        record.settled_lag &= 3
        record.last_pieces &= 3
        record.payload_offset &= 127
        record.payload_length = (record.payload_length & 0x1FF) & ~(<uint16_t> (127 if record.encoding == FC_ENCODING_LL128 else 7))
        record.message_bytes &= 0xFFF
        record.destination &= 0x7F8
        record.wire_offset &= 0x7FF & ~(<uint32_t> (127 if record.encoding == FC_ENCODING_LL128 else 15))
        record.stored_length = record.payload_offset + record.payload_length
    record.frame_length = record.stored_length
    stored = record.stored_length if record.stored_length < room else room
    memset(frame, 0x11 + (flags >> 5 & 1), stored)
    memset(&flag, command[1], 8)
    record.flag = flag if record.encoding == FC_ENCODING_LL128 else <uint32_t> flag
    if flags & 2 and <uint32_t> record.payload_offset + record.payload_length <= stored:
        if record.encoding == FC_ENCODING_LL128:
            for line in range(record.payload_length // 128):
                memcpy(frame + record.payload_offset + 128 * line + 120, &flag, 8)
        else:
            for line in range(record.payload_length // 16):
                memcpy(frame + record.payload_offset + 16 * line + 4, &flag, 4)
                memcpy(frame + record.payload_offset + 16 * line + 12, &flag, 4)
    fuzz_forbid(frame + stored, room - stored)
    ring.header.written += 1
    ring.header.parsed += 1
    if flags & 64:
        ring.header.ended = 1


cdef void _run(ExtractLoop loop, const uint8_t *data, size_t size) noexcept nogil:
    global now
    cdef uint32_t i, at
    cdef bint consistent = True
    cdef fc_slot *slot
    cdef uint64_t *claim
    cdef uint64_t *done
    _reset(loop)
    now = 1
    for i in range(2):
        loop.rings[i].header.live = data[0] & 192 == 128
    if data[0] & 64 and size > 16:  # a slot as it may lie in a file; where its parts are was checked when it was opened
        slot = _slot_at(loop, data[1] & 3)
        slot.iteration, slot.state, slot.units = data[2], data[3], data[4] % ((slot.data_bytes + 15) // 8)
        claim, done = <uint64_t *> (<uint8_t *> slot + slot.claim_offset), <uint64_t *> (<uint8_t *> slot + slot.done_offset)
        claim[data[5] & 3], done[data[6] & 3] = _number(data + 7, 8), _number(data + 8, 8)
        loop.header.settled_next = data[14]
        loop.header.consumed_next = data[15] if data[15] < data[14] else data[14]
        loop._recover_slot(slot)
        if data[0] & 128:
            done[3] = slot.units + 1  # as another process would
            consistent = False
        data += 16
        size -= 16
    else:
        data += 1
        size -= 1
    for i in range(2):
        for at in range(RECORDS):
            fuzz_forbid(loop.rings[i].records + at * loop.rings[i].record_bytes + sizeof(fc_record),
                        loop.rings[i].record_bytes - sizeof(fc_record))
    while size >= COMMAND_BYTES:
        if data[0] & 16:
            _poll(loop, consistent)
        if data[0] & 8 and loop.header.settled_next > loop.header.consumed_next:
            loop.header.consumed_next = loop.header.settled_next
        _command(loop, data)
        data += COMMAND_BYTES
        size -= COMMAND_BYTES
    for i in range(2):
        _poll(loop, consistent)
        loop.header.consumed_next = loop.header.settled_next


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept:
    if size:
        _run(<ExtractLoop> loops[(data[0] & 63) % loop_count], data, size)
    return 0


cdef unsigned char[::1] _copied(bytes image):
    cdef uint8_t *copy = NULL
    if posix_memalign(<void **> &copy, 64, len(image)):
        raise MemoryError
    memcpy(copy, <const uint8_t *> image, len(image))
    return <unsigned char[:len(image)]> copy


cdef _make():
    """Make a loop per kernel, each with rings and slots of its own; return what must stay alive."""
    global loop_count
    cdef ExtractLoop loop
    kept = []
    revisions = [(1, [(0, 1000), (1024, GRADIENT_BYTES)], 1, 0b1111), (5, [(0, GRADIENT_BYTES)], 1, 0b0111)]
    edges = [connection % EDGES for connection in range(4)]
    slots = fixture.image_of_slots(SLOTS, GRADIENT_BYTES, INITIAL_BYTES, EDGES)
    ring = fixture.image_of_ring(RECORDS)
    for kernel in ("scalar", "avx2"):
        try:
            loop = ExtractLoop(
                [ring, ring], [_copied(ring.memory), _copied(ring.memory)], [0b1111, 0b0110], _copied(slots.memory), slots.initial,
                slots.gradients, revisions, [(0, INITIAL_BYTES)], 0b0001, edges, SILENCE_NS, CopyEngine(), kernel)
        except ValueError:
            continue  # not on this processor
        _fence(loop)
        loops[loop_count] = <void *> loop
        loop_count += 1
        kept.append(loop)
    return kept


_kept = _make()
