# SPDX-License-Identifier: MIT
# distutils: libraries = pcap
"""Reads a capture file to its end before a frame of it goes anywhere: where it lies if it is a plain one, else with libpcap.

DPDK's `net_pcap` tells neither its end, nor damage, nor its link type.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from flowcheck._capture_file cimport (
    FC_FILE_END, FC_FILE_FRAME, FC_LONGEST_FRAME, fc_file, fc_file_begin, fc_file_frame, fc_file_next)
from flowcheck._guarded_file cimport FC_FILE_KEPT, GuardedFile
from flowcheck._wire cimport FC_WIRE_OK, fc_decode, fc_wire

cdef extern from "pcap/pcap.h" nogil:
    enum: PCAP_ERRBUF_SIZE
    enum: DLT_EN10MB
    enum: PCAP_TSTAMP_PRECISION_NANO
    ctypedef struct pcap_t
    cdef struct timeval:
        int64_t tv_sec
        int64_t tv_usec
    cdef struct pcap_pkthdr:
        timeval ts
        uint32_t caplen
        uint32_t len
    pcap_t *pcap_open_offline_with_tstamp_precision(const char *path, unsigned int precision, char *error)
    int pcap_next_ex(pcap_t *handle, pcap_pkthdr **header, const uint8_t **data)
    int pcap_datalink(pcap_t *handle)
    const char *pcap_datalink_val_to_name(int link)
    const char *pcap_geterr(pcap_t *handle)
    void pcap_close(pcap_t *handle)

cdef enum:
    MOST_KEYS = 4096
    MOST_HEADERS = 1024         # no header of a frame lies behind it

cdef struct key:
    uint8_t source[16]
    uint8_t destination[16]
    uint32_t queue_pair


cdef struct counts:
    uint64_t frames
    uint64_t bytes
    uint64_t cut
    uint64_t longest
    uint64_t matched


cdef class _Keys:
    """Flows whose frames are counted, and the counts."""

    cdef key wanted[MOST_KEYS]
    cdef uint32_t count
    cdef counts found
    cdef uint8_t copy[FC_LONGEST_FRAME]  # a mapped frame may change while it is decoded

    def __cinit__(self, keys):
        if len(keys) > MOST_KEYS:
            raise ValueError(f"{len(keys)} flows to look for: at most {MOST_KEYS}")
        for source, destination, queue_pair in keys:
            memcpy(self.wanted[self.count].source, <const uint8_t *> source, 16)
            memcpy(self.wanted[self.count].destination, <const uint8_t *> destination, 16)
            self.wanted[self.count].queue_pair = queue_pair
            self.count += 1

    cdef inline void note(self, const uint8_t *data, uint32_t length, uint32_t wire_length) noexcept nogil:
        cdef fc_wire wire
        cdef uint32_t i
        self.found.frames += 1
        self.found.bytes += length
        self.found.cut += length < wire_length
        if length > self.found.longest:
            self.found.longest = length
        if self.count == 0:
            return
        memcpy(self.copy, data, length if length < MOST_HEADERS else MOST_HEADERS)
        if fc_decode(self.copy, length, &wire) == FC_WIRE_OK:
            for i in range(self.count):
                if (wire.dest_qp == self.wanted[i].queue_pair and memcmp(wire.source, self.wanted[i].source, 16) == 0
                        and memcmp(wire.destination, self.wanted[i].destination, 16) == 0):
                    self.found.matched += 1
                    break

    cdef tuple values(self):
        return self.found.frames, self.found.bytes, self.found.cut, self.found.longest, self.found.matched


def scan_plain(GuardedFile file not None, keys):
    """scan_plain(file, keys) -> (frames, bytes, cut frames, longest frame, matched frames), or None if it is libpcap's.

    keys: as for `scan`. What it says holds only if `file` is not cut thereafter.
    """
    cdef _Keys notes = _Keys(keys)
    cdef fc_file walk
    cdef fc_file_frame frame
    cdef int status = -1
    cdef uint64_t gone = FC_FILE_KEPT
    with nogil:
        if fc_file_begin(&walk, file.data, file.size):
            status = fc_file_next(&walk, &frame)
            while status == FC_FILE_FRAME:
                notes.note(frame.data, frame.length, frame.wire_length)
                gone = file.let_go(gone, walk.at)
                status = fc_file_next(&walk, &frame)
    return notes.values() if status == FC_FILE_END else None


def scan(bytes path, keys):
    """scan(path, keys) -> (error or None, link name or None, frames, bytes, cut frames, longest frame, matched frames).

    With libpcap. keys: (source, destination, queue pair) triples; frames to one of them are counted as matched. `error` is
    libpcap's text if the file cannot be read to its end; `link` is the link type's name where it is not Ethernet.
    """
    cdef char error[PCAP_ERRBUF_SIZE]
    cdef const char *name = path
    cdef pcap_t *handle
    cdef pcap_pkthdr *header
    cdef const uint8_t *data
    cdef _Keys notes = _Keys(keys)
    cdef int status = 0
    error[0] = 0
    with nogil:
        handle = pcap_open_offline_with_tstamp_precision(name, PCAP_TSTAMP_PRECISION_NANO, error)
    if handle == NULL:
        return error.decode(errors="replace"), None, *notes.values()
    try:
        if pcap_datalink(handle) != DLT_EN10MB:
            link = pcap_datalink_val_to_name(pcap_datalink(handle))
            return None, (link.decode() if link != NULL else f"DLT {pcap_datalink(handle)}"), *notes.values()
        with nogil:
            while True:
                status = pcap_next_ex(handle, &header, &data)
                if status != 1:
                    break
                notes.note(data, header.caplen, header.len)
        return pcap_geterr(handle).decode(errors="replace") if status == -1 else None, None, *notes.values()
    finally:
        pcap_close(handle)


cdef class Frames:
    """Frames(path): iterates over the frames of a file that `scan` has found to be whole, as bytes; ValueError if it is not."""

    cdef pcap_t *handle

    def __cinit__(self, bytes path):
        cdef char error[PCAP_ERRBUF_SIZE]
        error[0] = 0
        self.handle = pcap_open_offline_with_tstamp_precision(path, PCAP_TSTAMP_PRECISION_NANO, error)
        if self.handle == NULL:
            raise ValueError(error.decode(errors="replace"))

    def __dealloc__(self):
        if self.handle != NULL:
            pcap_close(self.handle)

    def __iter__(self):
        return self

    def __next__(self):
        cdef pcap_pkthdr *header
        cdef const uint8_t *data
        cdef int status = pcap_next_ex(self.handle, &header, &data)
        if status == -2:
            raise StopIteration
        if status != 1:
            raise ValueError(pcap_geterr(self.handle).decode(errors="replace"))
        return data[:header.caplen]
