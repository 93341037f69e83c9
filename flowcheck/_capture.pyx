# SPDX-License-Identifier: MIT
# distutils: libraries = pcap
"""Reads a capture file to its end with libpcap before DPDK gets it: `net_pcap` tells neither its end, nor damage, nor
its link type."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

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

cdef struct key:
    uint8_t source[16]
    uint8_t destination[16]
    uint32_t queue_pair


def scan(bytes path, keys):
    """scan(path, keys) -> (error or None, link name or None, frames, bytes, cut frames, longest frame, matched frames).

    keys: (source, destination, queue pair) triples; frames to one of them are counted as matched. `error` is
    libpcap's text if the file cannot be read to its end; `link` is the link type's name where it is not Ethernet.
    """
    cdef char error[PCAP_ERRBUF_SIZE]
    cdef const char *name = path
    cdef pcap_t *handle
    cdef pcap_pkthdr *header
    cdef const uint8_t *data
    cdef key wanted[MOST_KEYS]
    cdef fc_wire wire
    cdef uint32_t count = 0, i
    cdef uint64_t frames = 0, total = 0, cut = 0, longest = 0, matched = 0
    cdef int status = 0
    if len(keys) > MOST_KEYS:
        raise ValueError(f"{len(keys)} flows to look for: at most {MOST_KEYS}")
    for source, destination, queue_pair in keys:
        memcpy(wanted[count].source, <const uint8_t *> source, 16)
        memcpy(wanted[count].destination, <const uint8_t *> destination, 16)
        wanted[count].queue_pair = queue_pair
        count += 1
    error[0] = 0
    with nogil:
        handle = pcap_open_offline_with_tstamp_precision(name, PCAP_TSTAMP_PRECISION_NANO, error)
    if handle == NULL:
        return error.decode(errors="replace"), None, 0, 0, 0, 0, 0
    try:
        if pcap_datalink(handle) != DLT_EN10MB:
            link = pcap_datalink_val_to_name(pcap_datalink(handle))
            return None, (link.decode() if link != NULL else f"DLT {pcap_datalink(handle)}"), 0, 0, 0, 0, 0
        with nogil:
            while True:
                status = pcap_next_ex(handle, &header, &data)
                if status != 1:
                    break
                frames += 1
                total += header.caplen
                cut += header.caplen < header.len
                if header.caplen > longest:
                    longest = header.caplen
                if count and fc_decode(data, header.caplen, &wire) == FC_WIRE_OK:
                    for i in range(count):
                        if (wire.dest_qp == wanted[i].queue_pair and memcmp(wire.source, wanted[i].source, 16) == 0
                                and memcmp(wire.destination, wanted[i].destination, 16) == 0):
                            matched += 1
                            break
        if status == -1:
            return pcap_geterr(handle).decode(errors="replace"), None, frames, total, cut, longest, matched
        return None, None, frames, total, cut, longest, matched
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
