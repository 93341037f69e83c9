# SPDX-License-Identifier: MIT
# distutils: libraries = pcap
"""Walks a capture file and keeps account of every flow in it; nothing per packet leaves C."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

from flowcheck._wire cimport (
    FC_HAS_IMMEDIATE, FC_HAS_RETH, FC_IS_FIRST, FC_IS_LAST, FC_IS_RC, FC_IS_REQUEST, FC_OP_WRITE_FIRST,
    FC_OP_WRITE_MIDDLE, FC_OP_WRITE_ONLY, FC_WIRE_NOT_ROCE, FC_WIRE_OK, fc_decode, fc_icrc_right, fc_wire,
)

from flowcheck.errors import CaptureError

cdef extern from "pcap/pcap.h" nogil:
    enum: PCAP_ERRBUF_SIZE
    enum: DLT_EN10MB
    ctypedef struct pcap_t
    cdef struct pcap_pkthdr:
        uint32_t caplen
        uint32_t len
    pcap_t *pcap_open_offline(const char *path, char *error)
    int pcap_next_ex(pcap_t *handle, pcap_pkthdr **header, const uint8_t **data)
    int pcap_datalink(pcap_t *handle)
    const char *pcap_geterr(pcap_t *handle)
    void pcap_close(pcap_t *handle)

cdef enum:
    MOST_FLOWS = 8192           # more are an error, so that memory is bounded
    BUCKETS = 32768
    WINDOW = 65536              # packets behind the newest in which a repeat is told from a latecomer

    # what a message's payload can still be
    MAY_LL = 1
    MAY_LL128 = 2

    SAW_LL = 1
    SAW_LL128 = 2
    SAW_PLAIN = 4

cdef struct message:
    uint64_t psn
    uint64_t packets
    uint64_t bytes
    uint64_t address
    uint32_t immediate
    uint8_t has_immediate
    uint8_t complete

cdef struct flow:
    uint8_t source[16]
    uint8_t destination[16]
    uint32_t queue_pair
    uint8_t ip_version
    uint8_t used
    uint8_t encodings           # SAW_*, of its messages
    uint64_t packets
    uint64_t requests
    uint64_t reliable           # requests of the reliable connection service: they have sequence numbers
    uint64_t credits            # plain writes of one packet of 32 or 64 bytes
    uint64_t unique
    uint64_t lowest
    uint64_t highest
    uint64_t payload
    uint64_t messages
    uint32_t mtu
    uint32_t largest
    uint8_t *window             # bit per sequence number, of the last WINDOW
    message open_message
    uint8_t is_open
    uint8_t may
    uint64_t expected
    uint64_t flag
    uint64_t flag128
    message *list
    uint64_t listed
    uint64_t room


cdef class Scan:
    """Scan(path, messages): walk a capture once; then read the attributes and `flows()`."""

    cdef flow *table
    cdef bint keep
    cdef readonly uint64_t frames
    cdef readonly uint64_t roce
    cdef readonly uint64_t malformed
    cdef readonly uint64_t icrc_right
    cdef readonly uint64_t icrc_wrong
    cdef uint64_t flow_count

    def __cinit__(self):
        self.table = <flow *> calloc(BUCKETS, sizeof(flow))
        if self.table == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef uint32_t i
        if self.table != NULL:
            for i in range(BUCKETS):
                free(self.table[i].window)
                free(self.table[i].list)
            free(self.table)

    def __init__(self, bytes path, bint messages):
        cdef char error[PCAP_ERRBUF_SIZE]
        cdef const char *name = path
        cdef pcap_t *handle
        cdef pcap_pkthdr *header
        cdef const uint8_t *data
        cdef int status = 1, taken = 0
        self.keep = messages
        error[0] = 0
        handle = pcap_open_offline(name, error)
        if handle == NULL:
            raise CaptureError(f"{path.decode()}: {error.decode(errors='replace')}", path.decode())
        try:
            if pcap_datalink(handle) != DLT_EN10MB:
                raise CaptureError(f"{path.decode()}: link type {pcap_datalink(handle)}; expected 1 (Ethernet)", path.decode())
            with nogil:
                while True:
                    status = pcap_next_ex(handle, &header, &data)
                    if status != 1:
                        break
                    taken = self._frame(data, header.caplen)
                    if taken < 0:
                        break
            if status == -1:
                text = pcap_geterr(handle).decode(errors="replace")
                raise CaptureError(f"{path.decode()}: cannot be read past frame {self.frames}: {text}", path.decode())
            if taken == -1:
                raise CaptureError(f"{path.decode()}: more than {MOST_FLOWS} flows", path.decode())
            if taken < 0:
                raise MemoryError
        finally:
            pcap_close(handle)
        for i in range(BUCKETS):
            if self.table[i].used and self.table[i].is_open and self._close(&self.table[i], False) < 0:
                raise MemoryError

    cdef int _frame(self, const uint8_t *data, uint32_t length) noexcept nogil:
        cdef fc_wire wire
        cdef int result
        cdef flow *entry
        self.frames += 1
        memset(&wire, 0, sizeof(wire))
        result = fc_decode(data, length, &wire)
        if result == FC_WIRE_NOT_ROCE:
            return 0
        if result != FC_WIRE_OK:
            # One whose BTH is there is a RoCE frame all the same; its flow is not trusted to be what it says.
            self.malformed += 1
            self.roce += wire.bth_offset != 0
            return 0
        self.roce += 1
        if fc_icrc_right(data, &wire):
            self.icrc_right += 1
        else:
            self.icrc_wrong += 1
        entry = self._find(&wire)
        if entry == NULL:
            return -1
        entry.packets += 1
        if wire.has & FC_IS_RC and not wire.has & FC_IS_REQUEST:
            return 0  # an acknowledgement or a response
        entry.requests += 1
        if not wire.has & FC_IS_RC:
            return 0
        entry.reliable += 1
        return self._request(entry, &wire, data)

    cdef flow *_find(self, const fc_wire *wire) noexcept nogil:
        cdef uint32_t hashed = wire.dest_qp * <uint32_t> 2654435761
        cdef uint32_t i
        cdef flow *entry
        for i in range(16):
            hashed = (hashed ^ wire.source[i]) * <uint32_t> 16777619
            hashed = (hashed ^ wire.destination[i]) * <uint32_t> 16777619
        for i in range(BUCKETS):
            entry = &self.table[(hashed + i) % BUCKETS]
            if not entry.used:
                if self.flow_count == MOST_FLOWS:
                    return NULL
                self.flow_count += 1
                entry.used = 1
                memcpy(entry.source, wire.source, 16)
                memcpy(entry.destination, wire.destination, 16)
                entry.queue_pair, entry.ip_version = wire.dest_qp, wire.ip_version
                return entry
            if (entry.queue_pair == wire.dest_qp and memcmp(entry.source, wire.source, 16) == 0
                    and memcmp(entry.destination, wire.destination, 16) == 0):
                return entry
        return NULL

    cdef int _request(self, flow *entry, const fc_wire *wire, const uint8_t *data) noexcept nogil:
        cdef uint64_t psn
        cdef int64_t ahead
        if entry.window == NULL:
            entry.window = <uint8_t *> calloc(WINDOW // 8, 1)
            if entry.window == NULL:
                return -2
            # 2^24 below the first is room for packets that were sent before it and come after.
            psn = wire.psn + (<uint64_t> 1 << 24)
            entry.lowest = entry.highest = psn
        else:
            ahead = <int64_t> ((wire.psn - entry.highest) & 0xffffff)
            if ahead >= 1 << 23:
                ahead -= 1 << 24
            psn = entry.highest + ahead
            if ahead > 0:
                self._advance(entry, psn)
            elif -ahead >= WINDOW:
                return 0  # too far back to tell: a repeat
            elif entry.window[psn % WINDOW // 8] >> (psn % 8) & 1:
                return 0
            elif psn < entry.lowest:
                entry.lowest = psn
        entry.window[psn % WINDOW // 8] |= 1 << (psn % 8)
        entry.unique += 1
        entry.payload += wire.payload_length
        if wire.payload_length > entry.largest:
            entry.largest = wire.payload_length
        if (wire.opcode == FC_OP_WRITE_FIRST or wire.opcode == FC_OP_WRITE_MIDDLE) and wire.payload_length > entry.mtu:
            entry.mtu = wire.payload_length
        if wire.opcode == FC_OP_WRITE_ONLY and (wire.payload_length == 32 or wire.payload_length == 64):
            entry.credits += 1
        return self._message(entry, wire, data + wire.payload_offset, psn)

    cdef void _advance(self, flow *entry, uint64_t psn) noexcept nogil:
        cdef uint64_t at
        if psn - entry.highest >= WINDOW:
            memset(entry.window, 0, WINDOW // 8)
        else:
            for at in range(entry.highest + 1, psn + 1):
                entry.window[at % WINDOW // 8] &= ~(<uint8_t> 1 << (at % 8))
        entry.highest = psn

    cdef int _message(self, flow *entry, const fc_wire *wire, const uint8_t *payload, uint64_t psn) noexcept nogil:
        cdef bint first = (wire.has & FC_IS_FIRST) != 0  # the bit does not fit into a byte
        cdef bint last = (wire.has & FC_IS_LAST) != 0
        cdef bint whole
        if entry.is_open and (first or psn != entry.expected):
            if self._close(entry, False) < 0:
                return -2
        if not entry.is_open:
            memset(&entry.open_message, 0, sizeof(message))
            entry.open_message.psn = psn
            entry.open_message.complete = first
            entry.open_message.address = wire.va if wire.has & FC_HAS_RETH else 0
            entry.is_open, entry.may, entry.flag, entry.flag128 = 1, MAY_LL | MAY_LL128, 0, 0
            entry.messages += 1
        entry.may &= self._shape(entry, payload, wire.payload_length)
        entry.open_message.packets += 1
        entry.open_message.bytes += wire.payload_length
        if wire.has & FC_HAS_IMMEDIATE:
            entry.open_message.has_immediate, entry.open_message.immediate = 1, wire.immediate
        entry.expected = psn + 1
        if last:
            whole = entry.open_message.complete
            return self._close(entry, whole)
        return 0

    cdef uint8_t _shape(self, flow *entry, const uint8_t *payload, uint32_t length) noexcept nogil:
        """Return which encodings a packet allows its message: all flags of a message are the same, and not 0."""
        cdef uint8_t may = MAY_LL | MAY_LL128
        cdef uint32_t at, low, high
        cdef uint64_t flag
        if length == 0:
            return may
        if length % 16:
            may &= ~MAY_LL
        if length % 128 or entry.open_message.bytes % 128:
            may &= ~MAY_LL128
        if may & MAY_LL and entry.may & MAY_LL:
            for at in range(0, length, 16):
                memcpy(&low, payload + at + 4, 4)
                memcpy(&high, payload + at + 12, 4)
                if entry.flag == 0:
                    entry.flag = low
                if low == 0 or low != high or low != entry.flag:
                    may &= ~MAY_LL
                    break
        if may & MAY_LL128 and entry.may & MAY_LL128:
            for at in range(0, length, 128):
                memcpy(&flag, payload + at + 120, 8)
                if entry.flag128 == 0:
                    entry.flag128 = flag
                if flag == 0 or flag != entry.flag128:
                    may &= ~MAY_LL128
                    break
        return may

    cdef int _close(self, flow *entry, bint whole) noexcept nogil:
        cdef message *grown
        entry.is_open = 0
        entry.open_message.complete = whole
        if entry.open_message.bytes:
            if entry.may & MAY_LL:
                entry.encodings |= SAW_LL
            elif entry.may & MAY_LL128 and entry.open_message.bytes % 2048 == 0:
                entry.encodings |= SAW_LL128
            else:
                entry.encodings |= SAW_PLAIN
        if not self.keep:
            return 0
        if entry.listed == entry.room:
            entry.room = entry.room * 2 + 16
            grown = <message *> realloc(entry.list, entry.room * sizeof(message))
            if grown == NULL:
                return -2
            entry.list = grown
        entry.list[entry.listed] = entry.open_message
        entry.listed += 1
        return 0

    def flows(self):
        """flows() -> a dict per flow; sequence numbers counted on from the first one's 24 bits."""
        cdef uint32_t i
        cdef uint64_t number, base
        cdef flow *entry
        out = []
        for i in range(BUCKETS):
            entry = &self.table[i]
            if not entry.used:
                continue
            base = (entry.lowest >> 24) << 24
            row = {
                "source": bytes(entry.source[:16]), "destination": bytes(entry.destination[:16]), "queue_pair": entry.queue_pair,
                "ip_version": entry.ip_version, "packets": entry.packets, "requests": entry.requests,
                "reliable": entry.reliable, "credits": entry.credits, "encodings": entry.encodings,
                "first": entry.lowest - base, "last": entry.highest - base,
                "missing": entry.highest - entry.lowest + 1 - entry.unique if entry.reliable else 0,
                "duplicates": entry.reliable - entry.unique, "payload": entry.payload, "messages": entry.messages,
                "mtu": entry.mtu, "largest": entry.largest,
            }
            if self.keep:
                row["list"] = [
                    (entry.list[number].psn - base, entry.list[number].packets, entry.list[number].bytes,
                     entry.list[number].address, entry.list[number].immediate if entry.list[number].has_immediate else None,
                     bool(entry.list[number].complete))
                    for number in range(entry.listed)
                ]
            out.append(row)
        return out
