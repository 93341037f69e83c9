# SPDX-License-Identifier: MIT
"""Input: a pcap or pcapng file. What validates it, walks it and inspects it agree on what is in it, or all refuse it."""

include "../../flowcheck/_capture.pyx"

from posix.fcntl cimport O_CREAT, O_RDWR, open
from posix.unistd cimport ftruncate, getpid, pwrite

from flowcheck.capture import frames, validate
from flowcheck.errors import CaptureError
from packet_parser.inspect import inspect as report_of

cdef extern from "_target.h" nogil:
    void fuzz_claim(bint holds, const char *what, long long number)

cdef bytes path = b"/dev/shm/flowcheck-fuzz-capture.%d" % getpid()
cdef int file = open(path, O_CREAT | O_RDWR, 0o600)
cdef list wanted = [(bytes(16), bytes(16), number) for number in range(2)]


cdef _run(const uint8_t *data, size_t size):
    ftruncate(file, size)
    pwrite(file, data, size, 0)
    error, link, count, total, cut, longest, matched = scan(path, wanted)
    fuzz_claim(cut <= count and matched <= count and longest <= total, "counts are of frames", count)
    if size % 64 == 0:  # it makes room for thousands of flows each time, which takes longer than all else
        try:
            report = report_of(path.decode(), messages=True)
        except CaptureError:
            fuzz_claim(error is not None or link is not None, "what is whole can be inspected", count)
        else:
            fuzz_claim(error is None and link is None, "what is not whole is refused by all", count)
            fuzz_claim(report["frames"] == count, "frames are counted alike", count)
    if error is not None or link is not None:
        return
    seen = [len(content) for content in Frames(path)]
    fuzz_claim(len(seen) == count and sum(seen) == total and max(seen, default=0) == longest, "frames are the same", total)


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) except -1:
    _run(data, size)
    return 0
