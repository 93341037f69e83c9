# SPDX-License-Identifier: MIT
"""Takes RoCEv2 write requests apart for the learner: a row per packet, payloads one after another in a file."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from flowcheck._wire cimport (
    FC_HAS_IMMEDIATE, FC_HAS_RETH, FC_IS_FIRST, FC_IS_RC, FC_IS_REQUEST, FC_OP_WRITE_FIRST, FC_OP_WRITE_ONLY_IMM,
    FC_WIRE_OK, fc_decode, fc_icrc_right, fc_wire)

import numpy as np

__all__ = ["PACKET", "Collector", "gather"]

cdef enum:
    BUFFER = 1 << 20

# Same bytes as PACKET.
cdef struct packet:
    uint64_t psn                # unwrapped; the flow's first is 2^24 + its 24 bits
    uint64_t address
    uint64_t payload            # where it begins in the file
    uint64_t time_ns
    uint32_t flow
    uint32_t rkey
    uint32_t length             # of the payload
    uint32_t immediate
    uint8_t opcode
    uint8_t has_immediate
    uint8_t has_address
    uint8_t reserved[5]

PACKET = np.dtype([
    ("psn", "<u8"), ("address", "<u8"), ("payload", "<u8"), ("time_ns", "<u8"), ("flow", "<u4"), ("rkey", "<u4"),
    ("length", "<u4"), ("immediate", "<u4"), ("opcode", "u1"), ("has_immediate", "?"), ("has_address", "?"),
    ("reserved", "u1", 5),
])


cdef class Collector:
    """Collector(spool): `add` each frame; payloads of writes go to the binary file `spool`.

    `flows` maps (source, destination, queue pair) to [number, UDP source port]; those that only acknowledge are in it.
    """

    cdef packet *rows
    cdef uint64_t count
    cdef uint64_t room
    cdef uint64_t written
    cdef object spool
    cdef bytearray buffer
    cdef list highest
    cdef readonly dict flows
    cdef readonly uint64_t frames
    cdef readonly uint64_t bad_icrc

    def __cinit__(self):
        self.rows = NULL

    def __init__(self, spool):
        self.spool = spool
        self.buffer = bytearray()
        self.flows = {}
        self.highest = []

    def __dealloc__(self):
        free(self.rows)

    def add(self, const unsigned char[::1] frame not None, uint64_t time_ns):
        """add(frame, time_ns): take a frame; what is no whole RoCEv2 frame of a reliable connection is passed over."""
        cdef fc_wire wire
        cdef packet *row
        cdef int64_t ahead
        cdef uint64_t psn
        cdef void *grown
        self.frames += 1
        if frame.shape[0] == 0 or fc_decode(&frame[0], <uint32_t> frame.shape[0], &wire) != FC_WIRE_OK or not wire.has & FC_IS_RC:
            return
        if not fc_icrc_right(&frame[0], &wire):
            self.bad_icrc += 1
            return
        key = (<bytes> wire.source[:16], <bytes> wire.destination[:16], wire.dest_qp)
        entry = self.flows.get(key)
        if entry is None:
            entry = self.flows[key] = [len(self.flows), wire.source_port]
            self.highest.append(None)
        if not wire.has & FC_IS_REQUEST or wire.opcode < FC_OP_WRITE_FIRST or wire.opcode > FC_OP_WRITE_ONLY_IMM:
            return
        flow = entry[0]
        psn = wire.psn + (<uint64_t> 1 << 24)
        if self.highest[flow] is not None:
            ahead = <int64_t> ((wire.psn - <uint64_t> self.highest[flow]) & 0xFFFFFF)
            if ahead >= 1 << 23:
                ahead -= 1 << 24
            psn = <uint64_t> self.highest[flow] + ahead
        if self.highest[flow] is None or psn > <uint64_t> self.highest[flow]:
            self.highest[flow] = psn
        if self.count == self.room:
            grown = realloc(self.rows, (2 * self.room + 1024) * sizeof(packet))
            if grown == NULL:
                raise MemoryError
            self.rows, self.room = <packet *> grown, 2 * self.room + 1024
        row = self.rows + self.count
        self.count += 1
        row.psn, row.flow, row.time_ns = psn, flow, time_ns
        row.address, row.rkey = wire.va, wire.rkey
        row.length, row.payload = wire.payload_length, self.written
        row.immediate, row.opcode = wire.immediate, wire.opcode
        row.has_immediate, row.has_address = (wire.has & FC_HAS_IMMEDIATE) != 0, (wire.has & FC_HAS_RETH) != 0
        self.buffer += (<const uint8_t *> &frame[wire.payload_offset])[:wire.payload_length]
        self.written += wire.payload_length
        if len(self.buffer) >= BUFFER:
            self._flush()

    def _flush(self):
        self.spool.write(self.buffer)
        self.spool.flush()
        self.buffer.clear()

    def packets(self):
        """packets() -> array of PACKET, in the order taken; their payloads are in the file."""
        self._flush()
        if self.count == 0:
            return np.empty(0, PACKET)
        return np.frombuffer((<const uint8_t *> self.rows)[:self.count * sizeof(packet)], PACKET)


def gather(const unsigned char[::1] spool not None, const uint64_t[::1] offsets not None, const uint32_t[::1] lengths not None):
    """gather(spool, offsets, lengths) -> array of uint8: pieces of the spool, one after another."""
    cdef uint64_t total = 0, at = 0, end = spool.shape[0]
    cdef Py_ssize_t index
    cdef unsigned char[::1] out
    for index in range(offsets.shape[0]):
        if offsets[index] > end or lengths[index] > end - offsets[index]:
            raise IndexError("a piece lies outside of the spool")
        total += lengths[index]
    array = np.empty(total, np.uint8)
    if total == 0:
        return array
    out = array
    for index in range(offsets.shape[0]):
        if lengths[index]:
            memcpy(&out[at], &spool[offsets[index]], lengths[index])
            at += lengths[index]
    return array
