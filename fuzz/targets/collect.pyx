# SPDX-License-Identifier: MIT
"""Input: frames seen while a layout is learned, as `_make_frame` reads them; the collector takes them apart."""

include "../../packet_parser/_collect.pyx"
include "_frames.pxi"

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdlib cimport malloc

cdef enum:
    MOST_FRAMES = 32


class _Spool(bytearray):
    """What of a file the collector uses."""

    def write(self, content):
        self.extend(content)

    def flush(self):
        pass


cdef _run(const uint8_t *data, size_t size):
    cdef input_view view
    cdef uint32_t frames = 0, psn = 0
    cdef uint64_t payload = 0
    cdef uint8_t *copy
    spool = _Spool()
    collector = Collector(spool)
    view.data, view.left = data, size
    while view.left and frames < MOST_FRAMES:
        _make_frame(&view, &psn)
        if frame_bytes == 0:
            continue
        copy = <uint8_t *> malloc(frame_bytes)  # so that a read behind it is seen
        memcpy(copy, frame, frame_bytes)
        try:
            collector.add(PyMemoryView_FromMemory(<char *> copy, frame_bytes, PyBUF_READ), 1000 * frames)
        finally:
            free(copy)
        frames += 1
    if not collector.count:
        return
    packets = collector.packets()
    lengths = packets["length"]
    offsets = packets["payload"]
    for index in range(len(packets)):
        fuzz_claim(offsets[index] == payload, "payloads follow each other", index)
        payload += lengths[index]
    fuzz_claim(payload == len(spool), "the spool holds all payloads", payload)
    fuzz_claim(int(packets["flow"].max()) < len(collector.flows), "flows are numbered", 0)
    taken = gather(spool, offsets.copy(), lengths.copy())
    fuzz_claim(taken.tobytes() == bytes(spool), "pieces are gathered", payload)
    fuzz_claim(collector.bad_icrc <= collector.frames, "frames are counted", collector.bad_icrc)


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) except -1:
    if size:
        _run(data, size)
    return 0
