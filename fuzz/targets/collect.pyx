# SPDX-License-Identifier: MIT
"""Input: frames seen while a layout is learned, as `_make_frame` reads them; the collector takes them apart."""

include "../../packet_parser/_collect.pyx"
include "_frames.pxi"

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory

cdef enum:
    MOST_FRAMES = 32


class _Spool(bytearray):
    """What of a file the collector uses."""

    def write(self, content):
        self.extend(content)

    def flush(self):
        pass


cdef Collector collector


cdef _reset():
    """Make the collector what it was when it was made, but for its room."""
    collector.count = collector.written = collector.frames = collector.bad_icrc = 0
    collector.flows.clear()
    collector.highest.clear()
    collector.buffer.clear()
    collector.spool.clear()


cdef _run(const uint8_t *data, size_t size):
    cdef input_view view
    cdef uint32_t frames = 0, psn = 0
    cdef uint64_t payload = 0, index
    cdef uint64_t flows
    cdef uint8_t *copy
    _reset()
    view.data, view.left = data, size
    while view.left and frames < MOST_FRAMES:
        _make_frame(&view, &psn)
        if frame_bytes == 0:
            continue
        copy = fuzz_exactly(0, frame_bytes)  # so that a read behind it is seen
        memcpy(copy, frame, frame_bytes)
        collector.add(PyMemoryView_FromMemory(<char *> copy, frame_bytes, PyBUF_READ), 1000 * frames)
        frames += 1
    flows = len(collector.flows)
    for index in range(collector.count):
        fuzz_claim(collector.rows[index].payload == payload, "payloads follow each other", index)
        fuzz_claim(collector.rows[index].flow < flows, "flows are numbered", collector.rows[index].flow)
        payload += collector.rows[index].length
    fuzz_claim(payload == collector.written, "payloads are counted", payload)
    fuzz_claim(collector.bad_icrc <= collector.frames == frames, "frames are counted", collector.bad_icrc)
    if size % 4 == 0:  # what goes through arrays takes as long as all else
        _gather(payload)


cdef _gather(uint64_t payload):
    packets = collector.packets()
    fuzz_claim(len(packets) == collector.count, "a row for each packet", len(packets))
    fuzz_claim(payload == len(collector.spool), "the spool holds all payloads", payload)
    taken = gather(collector.spool, packets["payload"].copy(), packets["length"].copy())
    fuzz_claim(taken.tobytes() == bytes(collector.spool), "pieces are gathered", payload)


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) except -1:
    if size:
        _run(data, size)
    return 0


collector = Collector(_Spool())
