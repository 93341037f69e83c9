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


cdef bint _walk_agrees(const uint8_t *data, size_t size):
    """Walk the file where it lies; return whether it is plain. If so, libpcap must give the very same frames."""
    cdef char error[PCAP_ERRBUF_SIZE]
    cdef fc_file walk
    cdef fc_file_frame frame
    cdef pcap_pkthdr *header
    cdef const uint8_t *content
    cdef long long count = 0
    cdef int status = -1
    cdef bint equal = True
    cdef pcap_t *handle = pcap_open_offline_with_tstamp_precision(path, PCAP_TSTAMP_PRECISION_NANO, error)
    if fc_file_begin(&walk, data, size):
        status = fc_file_next(&walk, &frame)
        while status == FC_FILE_FRAME:
            count += 1
            equal &= (handle != NULL and pcap_next_ex(handle, &header, &content) == 1 and header.caplen == frame.length
                      and header.len == frame.wire_length
                      and <uint64_t> header.ts.tv_sec * 1000000000 + <uint64_t> header.ts.tv_usec == frame.ns
                      and memcmp(content, frame.data, frame.length) == 0)
            status = fc_file_next(&walk, &frame)
    if status == FC_FILE_END:
        fuzz_claim(handle != NULL and pcap_datalink(handle) == DLT_EN10MB and pcap_next_ex(handle, &header, &content) == -2,
                   "a plain file ends where libpcap ends", count)
        fuzz_claim(equal, "a plain file's frames are those that libpcap gives", count)
    if handle != NULL:
        pcap_close(handle)
    return status == FC_FILE_END


cdef _run(const uint8_t *data, size_t size):
    ftruncate(file, size)
    pwrite(file, data, size, 0)
    error, link, count, total, cut, longest, matched = scan(path, wanted)
    if _walk_agrees(data, size):
        file_again = GuardedFile(path)
        fuzz_claim(scan_plain(file_again, wanted) == (count, total, cut, longest, matched), "both readers count alike", count)
        file_again.close()
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
