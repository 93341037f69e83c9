# SPDX-License-Identifier: MIT
"""Input: frames of a capture, as `_make_frame` reads them; `inspect` keeps account of their flows and messages."""

include "../../packet_parser/_inspect.pyx"
include "_frames.pxi"

cdef enum:
    MOST_FRAMES = 64

cdef Scan scan


cdef void _check(flow *entry) noexcept nogil:
    cdef uint64_t number, packets = 0, bytes = 0
    fuzz_claim(entry.reliable <= entry.requests <= entry.packets, "requests are packets", entry.requests)
    fuzz_claim(entry.unique <= entry.reliable, "repeats are not unique", entry.unique)
    if entry.reliable:
        fuzz_claim(entry.lowest <= entry.highest, "the lowest is not above the highest", entry.lowest)
        fuzz_claim(entry.unique <= entry.highest - entry.lowest + 1, "missing is no less than none", entry.unique)
    fuzz_claim(entry.listed == entry.messages, "every message is listed", entry.listed)
    for number in range(entry.listed):
        packets += entry.list[number].packets
        bytes += entry.list[number].bytes
        fuzz_claim(entry.lowest <= entry.list[number].psn <= entry.highest, "a message lies in its flow", entry.list[number].psn)
    fuzz_claim(packets == entry.unique and bytes == entry.payload, "messages are made of all packets", packets)


cdef void _run(Scan scan, const uint8_t *data, size_t size) noexcept nogil:
    cdef input_view view
    cdef fc_wire wire
    cdef flow *entry
    cdef flow *entries[MOST_FRAMES]
    cdef uint32_t count = 0, frames = 0, i, psn = 0
    cdef uint8_t *copy
    scan.frames = scan.roce = scan.malformed = scan.icrc_right = scan.icrc_wrong = scan.flow_count = 0
    scan.keep = True
    view.data, view.left = data, size
    while view.left and frames < MOST_FRAMES:
        _make_frame(&view, &psn)
        copy = fuzz_exactly(0, frame_bytes)  # so that a read behind it is seen
        memcpy(copy, frame, frame_bytes)
        fuzz_claim(scan._frame(copy, frame_bytes) == 0, "a frame can be taken", frames)
        frames += 1
        if fc_decode(copy, frame_bytes, &wire) == FC_WIRE_OK:
            entry = scan._find(&wire)
            for i in range(count):
                if entries[i] == entry:
                    break
            else:
                entries[count] = entry
                count += 1
    fuzz_claim(scan.frames == frames and scan.roce <= frames, "frames are counted", scan.roce)
    fuzz_claim(scan.icrc_right + scan.icrc_wrong + scan.malformed >= scan.roce, "each is judged", scan.malformed)
    fuzz_claim(scan.flow_count == count, "flows are counted", scan.flow_count)
    for i in range(count):
        if entries[i].is_open:
            scan._close(entries[i], False)
        _check(entries[i])
        free(entries[i].window)
        free(entries[i].list)
        memset(entries[i], 0, sizeof(flow))


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept:
    if size:
        _run(scan, data, size)
    return 0


scan = Scan.__new__(Scan)
