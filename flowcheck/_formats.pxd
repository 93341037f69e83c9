# SPDX-License-Identifier: MIT
# The C side of the packet ring and the slot file: docs/ring-format.md and docs/slot-format.md draw the same bytes,
# flowcheck/formats.py holds the numpy side, and tests/flowcheck/test_formats.py compares the three.
# Everything is little-endian (FlowCheck runs on x86-64 and little-endian Arm) and naturally aligned.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #define FC_LOAD_ACQUIRE(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define FC_STORE_RELEASE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define FC_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #define FC_FETCH_OR(p, v) __atomic_fetch_or((p), (v), __ATOMIC_ACQ_REL)
    #define FC_FETCH_ADD(p, v) __atomic_fetch_add((p), (v), __ATOMIC_ACQ_REL)
    """
    uint64_t FC_LOAD_ACQUIRE(uint64_t *p) nogil
    void FC_STORE_RELEASE(uint64_t *p, uint64_t value) nogil
    void FC_FENCE() nogil
    uint64_t FC_FETCH_OR(uint64_t *p, uint64_t value) nogil
    uint64_t FC_FETCH_ADD(uint64_t *p, uint64_t value) nogil

cdef enum:
    FC_VERDICT_NONE = 0
    FC_PLACED = 1
    FC_DUPLICATE = 2
    FC_PARTIAL_SUM = 3
    FC_STEP_RECORD = 4
    FC_INITIAL_STATE = 5
    FC_OTHER_COLLECTIVE = 6
    FC_CONTROL = 7
    FC_FOREIGN = 8
    FC_MALFORMED = 9
    FC_BAD_ICRC = 10
    FC_UNSYNCHRONISED = 11
    FC_CONFLICT = 12
    FC_LATE = 13
    FC_VERDICTS = 14

    # The parser cannot know whether a gradient byte is new: it leaves FC_PLACED, the extractor decides.
    FC_ENCODING_NONE = 0
    FC_ENCODING_PLAIN = 1
    FC_ENCODING_LL = 2
    FC_ENCODING_LL128 = 3

# One record of the ring: this header, one cache line, then the frame.
cdef struct fc_record:
    uint32_t frame_length       # bytes of the frame as received
    uint32_t stored_length      # bytes of it in this record (less if the frame is longer than the record)
    uint64_t timestamp_ns       # of reception, since the epoch
    uint64_t sequence           # number of the record in its stream, from 0
    # the parser's annotation
    uint8_t verdict             # FC_PLACED .. FC_LATE, the parser's
    uint8_t encoding            # FC_ENCODING_*, of the payload
    uint16_t connection         # index into the plan's connections; 0xffff if none
    uint16_t payload_offset     # of the payload, from the start of the frame
    uint16_t payload_length     # without pad and ICRC
    uint32_t iteration          # from 1; 0 is the initial state
    uint32_t message_bytes      # data bytes of the whole message that count (undefined tails left out)
    uint64_t destination        # byte offset in the slot of the message's first data byte
    uint64_t flag               # LL, LL128: what every line's flag must be; plain: 0
    uint32_t wire_offset        # of this payload in its message, in wire bytes
    uint8_t settled_lag         # this packet proves its connection past iteration - settled_lag; 0: proves nothing
    uint8_t decision            # the extractor's final verdict, written before the bytes count; FC_VERDICT_NONE until then
    uint8_t last_pieces         # the packet ends its connection's part of the iteration, with so many pieces of a message
    uint8_t queue_pair          # which of the connection's queue pairs carried it

# The job's identity, repeated in every file made from a plan.
cdef struct fc_identity:
    char run_id[64]             # UTF-8, zero padded
    uint8_t fingerprint[32]     # of the model (plan.job.model_fingerprint), zeros if the plan has no model
    uint8_t plan_digest[16]     # first half of the SHA-256 of the canonical plan
    uint32_t attempt
    uint32_t world_size
    uint64_t reserved

# First page of a packet ring. `version` is stored last, with release order.
cdef struct fc_ring_header:
    uint8_t magic[8]            # 89 'F' 'C' 'R' 'I' 'N' 'G' 0A
    uint32_t version
    uint32_t header_bytes       # offset of record 0
    uint32_t record_bytes       # header and frame room, a multiple of 64
    uint32_t live               # 1: a port, which may fall silent; 0: a file, which is waited for
    uint64_t records            # a power of two
    uint64_t created_ns
    uint32_t dump_state_offset
    uint32_t dump_state_bytes   # of one of the two copies, with its sequence number
    uint32_t parse_state_offset
    uint32_t parse_state_bytes
    uint32_t extract_state_offset
    uint32_t extract_state_bytes
    fc_identity identity        # at 64
    char stream[64]             # at 192: name of the stream, UTF-8, zero padded
    # cursors, each alone on its cache line, each written by one stage
    uint64_t written            # at 256: records below it are complete
    uint64_t pad_written[7]
    uint64_t parsed             # at 320: records below it are annotated
    uint64_t pad_parsed[7]
    uint64_t extracted          # at 384: records below it may be overwritten
    uint64_t pad_extracted[7]
    uint64_t ended              # at 448: 1 once the dump knows that no record follows
    uint64_t pad_ended[7]

# Stage state inside a ring header. A state is published as two copies, each a sequence number and the bytes; the copy
# with the higher sequence number is the state. A copy whose number is 0 is being written.
cdef struct fc_dump_state:
    uint64_t written
    uint64_t dropped_ring_full
    uint64_t missed_by_port
    uint64_t engine_bytes       # frame bytes that a DMA engine copied
    uint64_t engine_failed      # copies that failed there and were done again by the CPU
    uint64_t interface_base     # a kernel interface's own count when the ring began, plus 1; 0: not such a port

# What the parser's state begins with; what follows is its own.
cdef struct fc_parse_counts:
    uint64_t parsed
    uint64_t verdicts[16]       # per verdict (FC_VERDICTS used)
    uint64_t results[16]        # of the decoder
    uint64_t reasons[16]        # of unsynchronised packets

cdef struct fc_extract_state:
    uint64_t extracted
    uint64_t counters[16]       # per final verdict (FC_VERDICTS used)
    uint64_t engine_bytes
    uint64_t engine_failed
    uint64_t highest_iteration  # of any packet with a proved place
    uint32_t settled[64]        # per connection of the plan: it is past every iteration below this
    uint32_t reached[64]        # and it has sent, if nothing is repeated, all of every iteration below this
    uint32_t reaching[64]       # the iteration whose last message's pieces are being counted
    uint8_t reached_pieces[64]  # and which queue pairs brought theirs, a bit each

# First page of a slot file.
cdef struct fc_slots_header:
    uint8_t magic[8]            # 89 'F' 'C' 'S' 'L' 'O' 'T' 0A
    uint32_t version
    uint32_t header_bytes       # offset of the initial-state slot
    uint32_t slots              # gradient slots
    uint32_t edges              # that are mirrored, those of the connections that streams show
    uint64_t gradient_bytes     # room of a gradient slot: buckets, each begun on 64 bytes
    uint64_t initial_bytes      # room of the initial-state slot (0: the plan has none)
    uint64_t slot_bytes         # distance of two gradient slots
    uint64_t created_ns
    uint64_t reserved1
    fc_identity identity        # at 64
    uint64_t settled_next       # at 192, the extractor's: every iteration below it is decided
    uint64_t skipped_from       # the extractor's: of the iterations from here ..
    uint64_t skipped_to         # .. to before here, settled together, nothing has come; they have no slot
    uint64_t pad_settled[5]
    uint64_t consumed_next      # at 256, the updater's: every iteration below it may be overwritten
    uint64_t pad_consumed[7]
    uint64_t ended              # at 320, the extractor's: 1 once no iteration follows settled_next
    uint64_t pad_ended[7]
    uint64_t volatile_from      # at 384, the updater's: first iteration given back and not durable, 0 if all are
    uint64_t pad_volatile[7]

# States of a slot.
cdef enum:
    FC_SLOT_EMPTY = 0
    FC_SLOT_FILLING = 1
    FC_SLOT_WHOLE = 2
    FC_SLOT_INCOMPLETE = 3

# Why an iteration was declared incomplete.
cdef enum:
    FC_REASON_NONE = 0
    FC_REASON_MISSING = 1
    FC_REASON_CONFLICT = 2
    FC_REASON_END_OF_STREAM = 3

# Header of one slot; claim bitmap, done bitmap and data follow at the offsets below. A bit stands for one unit.
cdef struct fc_slot:
    uint64_t iteration          # that the slot holds; written last when it is opened
    uint64_t state              # FC_SLOT_*
    uint64_t reason             # FC_REASON_*
    uint64_t units              # of 8 bytes, that belong to the gradient of this iteration's revision
    uint64_t done_units
    uint64_t conflicts          # packets that contradicted bytes placed before
    uint64_t first_ns           # reception of the first and of the last packet placed here
    uint64_t last_ns
    uint64_t claim_offset       # from the start of this header
    uint64_t done_offset
    uint64_t data_offset
    uint64_t data_bytes
    uint64_t edges_offset       # of the bitmaps, one per edge: units that it brought; done_offset where there is one edge
    uint64_t source_bytes[4]    # of the gradient, when it is settled: how many came over no, one, two, more edges
    uint64_t reserved[7]

# The layout table of one queue pair, compiled by flowcheck/layout.py, read by the parser.
# A program is a list of segments; a segment is a list of rows that is passed `repeats` times (0: for ever).
# A row is what one message (or, where messages are split, one queue pair's piece of it) looks like.
cdef struct fc_segment:
    uint64_t first_psn          # packets of this queue pair before the segment
    uint64_t first_step         # NCCL step counter of the connection at its start
    uint64_t period_psn         # packets in one pass
    uint64_t period_steps
    uint32_t first_row
    uint32_t rows
    uint32_t first_iteration
    uint32_t period_iterations  # 0 for start-up operations
    uint64_t repeats
    uint64_t first_message      # messages of the connection before the segment, on all its queue pairs
    uint64_t period_messages

cdef struct fc_row:
    uint32_t psn                # packets before this row in the pass
    uint32_t packets            # at least 1; with the empty write of the adaptive-routing form
    uint32_t step               # steps before this row in the pass
    uint32_t wire_bytes         # payload bytes of the row
    uint32_t message_wire_offset  # of this row's first byte in its message (not 0 only where messages are split)
    uint32_t message_bytes      # data bytes of the message that count
    uint64_t destination        # byte offset in the slot of the message's first data byte
    uint32_t address_offset     # of the row's first byte, from the start of its slot
    uint32_t message_wire_bytes  # of the whole message: its immediate
    uint32_t message            # messages of the connection before this row in the pass
    uint16_t iteration          # from the segment's, within the pass
    uint8_t last_pieces         # not 0: the message ends the iteration on its connection, in so many pieces
    uint8_t verdict             # FC_PLACED, FC_PARTIAL_SUM, FC_STEP_RECORD, FC_INITIAL_STATE, FC_OTHER_COLLECTIVE
    uint8_t encoding
    uint8_t bulk_split          # 1: a write without immediate, then an empty write with immediate
    uint8_t settled_lag
    uint8_t reserved[5]

cdef inline void fc_publish(uint8_t *block, uint32_t copy_bytes, const void *state, uint32_t state_bytes) noexcept nogil:
    """Publish a stage's state into the older of its two copies; copy_bytes is the room of one copy."""
    cdef uint64_t first = FC_LOAD_ACQUIRE(<uint64_t *> block)
    cdef uint64_t second = FC_LOAD_ACQUIRE(<uint64_t *> (block + copy_bytes))
    cdef uint8_t *target = block + copy_bytes if first > second else block
    FC_STORE_RELEASE(<uint64_t *> target, 0)
    FC_FENCE()  # the mark must be seen before the first byte under it changes
    memcpy(target + 8, state, state_bytes)
    FC_STORE_RELEASE(<uint64_t *> target, (first if first > second else second) + 1)

cdef inline bint fc_recover(const uint8_t *block, uint32_t copy_bytes, void *state, uint32_t state_bytes) noexcept nogil:
    """Copy the newest published state out; False if none was ever published."""
    cdef uint64_t first = FC_LOAD_ACQUIRE(<uint64_t *> block)
    cdef uint64_t second = FC_LOAD_ACQUIRE(<uint64_t *> (block + copy_bytes))
    if first == 0 and second == 0:
        return False
    memcpy(state, (block if first > second else block + copy_bytes) + 8, state_bytes)
    return True
