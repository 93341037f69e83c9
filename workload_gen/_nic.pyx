# SPDX-License-Identifier: MIT
"""A network adapter's reliable connections in software: RDMA WRITEs as RoCEv2 frames through a socket.

What an adapter does is done here, and nothing of what a library does above it: queue pairs with packet sequence numbers,
writes into registered memory, acknowledgements, go-back-N, invariant CRC. IBTA specification volume 1, chapter 9.7
(reliable service), 9.4.4 (RDMA WRITE), 9.7.5 (acknowledgements), annex A17 (RoCEv2).
"""

from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from flowcheck._wire cimport (
    FC_HAS_IMMEDIATE, FC_HAS_RETH, FC_IS_FIRST, FC_IS_LAST, FC_IS_RC, FC_IS_REQUEST, FC_OP_ACK, FC_OP_WRITE_FIRST,
    FC_OP_WRITE_ONLY_IMM, FC_WIRE_OK, fc_decode, fc_icrc, fc_icrc_right, fc_wire)

from workload_gen._sockets cimport (
    MSG_DONTWAIT, MSG_NOSIGNAL, POLLHUP, POLLIN, POLLOUT, iovec, mmsghdr, pollfd, ppoll, recvmmsg, sendmmsg)

__all__ = ["Nic"]

cdef enum:
    BURST = 64
    FRAME_BYTES = 9216
    WORKS = 64                  # writes that a queue pair may have posted and not completed
    WINDOW = 128                # packets that it may have sent and not been told of
    QUEUE_PAIRS = 1024
    REGIONS = 1024
    HEADER_BYTES = 64           # Ethernet with a VLAN tag, IPv6, UDP: 66 at most, IPv6 untagged 62
    NUMBERS = 1 << 16           # queue pair numbers are looked up by their low bits
    SYNDROME_ACK = 0x1F         # with unlimited credits
    SYNDROME_NAK = 0x60         # PSN sequence error

cdef uint64_t RETRY_NS = 100_000_000
cdef uint64_t RETRY_MOST_NS = 1_000_000_000

cdef struct memory_region:
    uint8_t *bytes
    uint64_t address
    uint64_t length
    uint32_t key

cdef struct work:
    const uint8_t *bytes
    uint64_t address
    uint64_t first              # number of its first packet
    uint32_t packets
    uint32_t length
    uint32_t key
    uint32_t immediate
    bint with_immediate

cdef struct queue_pair:
    uint32_t number
    uint32_t peer
    uint8_t header[72]
    uint32_t header_bytes       # up to the BTH
    uint32_t ip_offset
    # requester; packets are numbered from 0, their PSN is first_psn more
    work works[WORKS]
    uint64_t posted
    uint64_t completed
    uint64_t unacknowledged
    uint64_t next
    uint64_t end
    uint64_t heard_ns           # of the last acknowledgement that moved anything on
    uint64_t retry_ns
    uint32_t first_psn
    # responder
    uint64_t expected
    uint64_t arrived            # messages with immediate
    uint32_t immediates[WORKS]
    uint32_t messages
    uint32_t expected_psn
    uint8_t *write_to
    uint64_t write_left
    bint refused                # a NAK is out
    bint owes                   # an acknowledgement


cdef uint64_t _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef inline void _put16(uint8_t *at, uint32_t value) noexcept nogil:
    at[0], at[1] = <uint8_t> (value >> 8), <uint8_t> value


cdef inline void _put32(uint8_t *at, uint32_t value) noexcept nogil:
    _put16(at, value >> 16)
    _put16(at + 2, value)


cdef inline int64_t _distance(uint32_t psn, uint32_t other) noexcept nogil:
    return <int64_t> (<int32_t> ((psn - other) << 8) >> 8)


cdef class Nic:
    """Nic(socket, mtu): an adapter on a socket that takes and gives whole frames; `progress` moves everything. One thread.

    socket: a raw one, bound to an interface, or one connected to a switch; kept. mtu: payload bytes of a full packet.

    `sent`, `received`, `repeated`, `duplicates`, `out_of_order`, `bad_icrc` and `refused` count frames.
    """

    cdef object _socket
    cdef int fd
    cdef uint32_t mtu
    cdef queue_pair *pairs
    cdef uint32_t pair_count
    cdef int32_t *numbers       # queue pair number modulo NUMBERS to index, -1: none
    cdef memory_region regions[REGIONS]
    cdef uint32_t region_count
    cdef list _keep
    cdef uint8_t *out
    cdef uint8_t *into
    cdef mmsghdr sending[BURST]
    cdef mmsghdr receiving[BURST]
    cdef iovec out_vectors[BURST]
    cdef iovec in_vectors[BURST]
    cdef queue_pair *owners[BURST]  # of the data frames about to leave
    cdef bint full              # the socket takes nothing more for now
    cdef readonly uint64_t sent, received, repeated, duplicates, out_of_order, bad_icrc, refused

    def __cinit__(self, socket, uint32_t mtu):
        cdef uint32_t i
        self._socket, self.fd, self.mtu = socket, socket.fileno(), mtu
        self._keep = []
        self.pairs = <queue_pair *> calloc(QUEUE_PAIRS, sizeof(queue_pair))
        self.numbers = <int32_t *> calloc(NUMBERS, sizeof(int32_t))
        self.out = <uint8_t *> calloc(BURST, FRAME_BYTES)
        self.into = <uint8_t *> calloc(BURST, FRAME_BYTES)
        if self.pairs == NULL or self.numbers == NULL or self.out == NULL or self.into == NULL:
            raise MemoryError
        for i in range(NUMBERS):
            self.numbers[i] = -1
        memset(self.sending, 0, sizeof(self.sending))
        memset(self.receiving, 0, sizeof(self.receiving))
        for i in range(BURST):
            self.out_vectors[i].iov_base = self.out + i * FRAME_BYTES
            self.in_vectors[i].iov_base = self.into + i * FRAME_BYTES
            self.in_vectors[i].iov_len = FRAME_BYTES
            self.sending[i].msg_hdr.msg_iov = &self.out_vectors[i]
            self.receiving[i].msg_hdr.msg_iov = &self.in_vectors[i]
            self.sending[i].msg_hdr.msg_iovlen = self.receiving[i].msg_hdr.msg_iovlen = 1

    def __dealloc__(self):
        free(self.pairs)
        free(self.numbers)
        free(self.out)
        free(self.into)

    def add_region(self, uint32_t key, uint64_t address, unsigned char[::1] memory):
        """add_region(key, address, memory): let the other side write `memory`, which it knows as `address` under `key`."""
        if self.region_count == REGIONS:
            raise ValueError(f"more than {REGIONS} regions")
        self._keep.append(memory)
        cdef memory_region *region = &self.regions[self.region_count]
        region.bytes, region.address, region.length, region.key = &memory[0], address, memory.shape[0], key
        self.region_count += 1

    def add_queue_pair(self, uint32_t number, uint32_t peer, bytes header, uint32_t ip_offset, uint32_t send_psn,
                       uint32_t receive_psn):
        """add_queue_pair(number, peer, header, ip_offset, send_psn, receive_psn) -> its index.

        header: Ethernet, IP and UDP headers of its frames; lengths and checksums are filled in. ip_offset: where in it
        the IP header begins. The PSNs are those of the first packet each way.
        """
        cdef uint32_t index = self.pair_count
        cdef queue_pair *pair = self.pairs + index
        if index == QUEUE_PAIRS or self.numbers[number % NUMBERS] >= 0:
            raise ValueError(f"no room for queue pair {number}")
        if len(header) > sizeof(pair.header):
            raise ValueError(f"a header of {len(header)} bytes")
        self.numbers[number % NUMBERS] = index
        pair.number, pair.peer = number, peer
        memcpy(pair.header, <const uint8_t *> header, len(header))
        pair.header_bytes, pair.ip_offset = len(header), ip_offset
        pair.first_psn, pair.expected_psn = send_psn, receive_psn
        pair.retry_ns = RETRY_NS
        self.pair_count += 1
        return index

    def post(self, uint32_t index, uint64_t address, uint32_t key, const unsigned char[::1] memory, immediate=None):
        """post(index, address, key, memory, immediate=None) -> number of the write on its queue pair, from 0.

        `memory` must keep its bytes until the write is completed. immediate: 32 bits as a big-endian number.
        """
        cdef queue_pair *pair = self.pairs + index
        cdef work *item = &pair.works[pair.posted % WORKS]
        if pair.posted - pair.completed == WORKS:
            raise ValueError(f"queue pair {pair.number} has {WORKS} writes posted")
        item.length = memory.shape[0]
        item.bytes = &memory[0] if item.length else NULL
        item.address, item.key = address, key
        item.with_immediate = immediate is not None
        item.immediate = immediate or 0
        item.first = pair.end
        item.packets = (item.length + self.mtu - 1) // self.mtu if item.length else 1
        if pair.unacknowledged == pair.end:
            pair.heard_ns = _now()
        pair.end += item.packets
        pair.posted += 1
        return pair.posted - 1

    def completed(self, uint32_t index):
        """completed(index) -> how many writes of a queue pair the other side has acknowledged."""
        return self.pairs[index].completed

    def arrived(self, uint32_t index):
        """arrived(index) -> how many writes with immediate have come to a queue pair, all before them included."""
        return self.pairs[index].arrived

    def immediate(self, uint32_t index, uint64_t message):
        """immediate(index, message) -> the immediate of one of the last 64 such writes."""
        return self.pairs[index].immediates[message % WORKS]

    def idle(self):
        """idle() -> whether every write is acknowledged."""
        cdef uint32_t i
        for i in range(self.pair_count):
            if self.pairs[i].unacknowledged != self.pairs[i].end:
                return False
        return True

    def progress(self, uint64_t wait_us=0):
        """progress(wait_us=0) -> frames that came or went; waits up to `wait_us` for one if there is nothing to do."""
        cdef uint64_t done
        with nogil:
            done = self._receive()
            done += self._send()
            if done == 0 and wait_us:
                self._wait(wait_us)
                done = self._receive()
                done += self._send()
        return done

    def wait(self, uint64_t wait_us):
        """wait(wait_us): wait for a frame, for a while; touches nothing, so that another thread may be in `progress`."""
        with nogil:
            self._wait(wait_us)

    cdef void _wait(self, uint64_t wait_us) noexcept nogil:
        cdef pollfd one
        cdef timespec most
        one.fd, one.events, one.revents = self.fd, POLLIN | POLLOUT if self.full else POLLIN, 0
        most.tv_sec, most.tv_nsec = wait_us // 1000000, wait_us % 1000000 * 1000
        ppoll(&one, 1, &most, NULL)
        if one.revents & POLLHUP:  # the cable is cut: nothing comes, and no poll waits any more
            ppoll(NULL, 0, &most, NULL)

    # -- responder --------------------------------------------------------------------------------------------------

    cdef uint64_t _receive(self) noexcept nogil:
        cdef int got, i
        cdef uint64_t total = 0
        while True:
            got = recvmmsg(self.fd, self.receiving, BURST, MSG_DONTWAIT, NULL)
            if got <= 0 or self.receiving[0].msg_len == 0:
                break
            for i in range(got):
                self._take(self.into + i * FRAME_BYTES, self.receiving[i].msg_len)
            total += got
            if got < BURST:
                break
        return total

    cdef void _take(self, const uint8_t *frame, uint32_t length) noexcept nogil:
        cdef fc_wire wire
        cdef int32_t index
        cdef queue_pair *pair
        if fc_decode(frame, length, &wire) != FC_WIRE_OK or not wire.has & FC_IS_RC:
            return
        index = self.numbers[wire.dest_qp % NUMBERS]
        if index < 0 or self.pairs[index].number != wire.dest_qp:
            return
        if not fc_icrc_right(frame, &wire):
            self.bad_icrc += 1
            return
        self.received += 1
        pair = self.pairs + index
        if wire.opcode == FC_OP_ACK:
            self._acknowledged(pair, &wire)
        elif FC_OP_WRITE_FIRST <= wire.opcode <= FC_OP_WRITE_ONLY_IMM:
            self._write(pair, &wire, frame + wire.payload_offset)

    cdef void _write(self, queue_pair *pair, const fc_wire *wire, const uint8_t *payload) noexcept nogil:
        cdef int64_t ahead = _distance(wire.psn, pair.expected_psn)
        cdef memory_region *region
        cdef uint32_t i
        if ahead < 0:
            self.duplicates += 1
            pair.owes = True
            return
        if ahead > 0:
            self.out_of_order += 1
            if not pair.refused:
                pair.refused = self._reply(pair, SYNDROME_NAK, pair.expected_psn)
            return
        if wire.has & FC_HAS_RETH:
            pair.write_to, pair.write_left = NULL, 0
            if wire.dma_length:
                for i in range(self.region_count):
                    region = &self.regions[i]
                    if (region.key == wire.rkey and wire.va >= region.address
                            and wire.va - region.address <= region.length
                            and wire.dma_length <= region.length - (wire.va - region.address)):
                        pair.write_to = region.bytes + (wire.va - region.address)
                        pair.write_left = wire.dma_length
                        break
                else:
                    self.refused += 1  # a remote access error: the connection is dead, as it would be
                    return
        if wire.payload_length > pair.write_left:
            self.refused += 1
            return
        memcpy(pair.write_to, payload, wire.payload_length)
        pair.write_to += wire.payload_length
        pair.write_left -= wire.payload_length
        pair.expected += 1
        pair.expected_psn = (pair.expected_psn + 1) & 0xFFFFFF
        pair.refused = False
        pair.owes = True
        if wire.has & FC_IS_LAST:
            pair.messages += 1
            if wire.has & FC_HAS_IMMEDIATE:
                pair.immediates[pair.arrived % WORKS] = wire.immediate
                pair.arrived += 1

    cdef bint _reply(self, queue_pair *pair, uint32_t syndrome, uint32_t psn) noexcept nogil:
        """Send an acknowledgement; return whether it has left."""
        cdef uint8_t *frame = self.out
        cdef uint32_t at = pair.header_bytes
        memcpy(frame, pair.header, at)
        self._bth(pair, frame + at, FC_OP_ACK, 0, psn, False)
        _put32(frame + at + 12, syndrome << 24 | pair.messages & 0xFFFFFF)
        self._finish(pair, 0, at + 16)
        return self._flush(1) == 1

    # -- requester --------------------------------------------------------------------------------------------------

    cdef void _acknowledged(self, queue_pair *pair, const fc_wire *wire) noexcept nogil:
        cdef int64_t moved = _distance(wire.psn, <uint32_t> (pair.first_psn + pair.unacknowledged) & 0xFFFFFF)
        cdef bint negative = wire.aeth >> 29 == 3
        cdef uint64_t upto
        if not negative:
            moved += 1  # the packet itself is acknowledged too
        if moved < 0 or pair.unacknowledged + moved > pair.end:
            return
        upto = pair.unacknowledged + moved
        if moved or negative:
            pair.heard_ns = _now()
            pair.retry_ns = RETRY_NS
        pair.unacknowledged = upto
        if negative or pair.next < upto:
            if negative and pair.next > upto:
                self.repeated += pair.next - upto
            pair.next = upto
        while pair.completed < pair.posted and (
                pair.works[pair.completed % WORKS].first + pair.works[pair.completed % WORKS].packets <= upto):
            pair.completed += 1

    cdef uint64_t _send(self) noexcept nogil:
        cdef uint32_t i, filled = 0
        cdef uint64_t total = 0, now = 0
        cdef queue_pair *pair
        self.full = False
        for i in range(self.pair_count):
            pair = self.pairs + i
            if pair.owes:
                pair.owes = not self._reply(pair, SYNDROME_ACK, (pair.expected_psn - 1) & 0xFFFFFF)
                total += not pair.owes
        for i in range(self.pair_count):
            pair = self.pairs + i
            if pair.unacknowledged == pair.end:
                continue
            if pair.next == pair.end or pair.next >= pair.unacknowledged + WINDOW:
                now = now if now else _now()
                if now - pair.heard_ns > pair.retry_ns:  # go back to what was not acknowledged
                    self.repeated += pair.next - pair.unacknowledged
                    pair.next = pair.unacknowledged
                    pair.heard_ns = now
                    pair.retry_ns = pair.retry_ns * 2 if pair.retry_ns < RETRY_MOST_NS else RETRY_MOST_NS
            while not self.full and pair.next < pair.end and pair.next < pair.unacknowledged + WINDOW:
                self._data(pair, filled)
                self.owners[filled] = pair
                pair.next += 1
                filled += 1
                if filled == BURST:
                    total += self._flush_data(filled)
                    filled = 0
        return total + self._flush_data(filled)

    cdef uint32_t _flush_data(self, uint32_t count) noexcept nogil:
        """Send frames of writes; return how many have left. The others are built again later."""
        cdef uint32_t left = self._flush(count), i
        for i in range(left, count):
            self.owners[i].next -= 1
        return left

    cdef void _data(self, queue_pair *pair, uint32_t slot) noexcept nogil:
        """Build the frame of packet `pair.next`."""
        cdef uint8_t *frame = self.out + slot * FRAME_BYTES
        cdef uint64_t number = pair.completed
        cdef work *item
        cdef uint32_t packet, offset, length, pad, at = pair.header_bytes, opcode
        cdef bint first, last
        while pair.works[number % WORKS].first + pair.works[number % WORKS].packets <= pair.next:
            number += 1
        item = &pair.works[number % WORKS]
        packet = <uint32_t> (pair.next - item.first)
        offset = packet * self.mtu
        length = item.length - offset if item.length - offset < self.mtu else self.mtu
        first, last = packet == 0, packet + 1 == item.packets
        if last:
            opcode = (FC_OP_WRITE_FIRST + 4 if first else FC_OP_WRITE_FIRST + 2) + item.with_immediate
        else:
            opcode = FC_OP_WRITE_FIRST if first else FC_OP_WRITE_FIRST + 1
        pad = (4 - length % 4) % 4
        memcpy(frame, pair.header, at)
        self._bth(pair, frame + at, opcode, pad, <uint32_t> (pair.first_psn + pair.next) & 0xFFFFFF, last)
        at += 12
        if first:
            _put32(frame + at, <uint32_t> (item.address >> 32))
            _put32(frame + at + 4, <uint32_t> item.address)
            _put32(frame + at + 8, item.key)
            _put32(frame + at + 12, item.length)
            at += 16
        if last and item.with_immediate:
            _put32(frame + at, item.immediate)
            at += 4
        memcpy(frame + at, item.bytes + offset, length)
        memset(frame + at + length, 0, pad)
        self._finish(pair, slot, at + length + pad)

    cdef void _bth(self, queue_pair *pair, uint8_t *at, uint32_t opcode, uint32_t pad, uint32_t psn, bint ask) noexcept nogil:
        at[0] = <uint8_t> opcode
        at[1] = <uint8_t> (pad << 4)
        _put16(at + 2, 0xFFFF)
        _put32(at + 4, pair.peer)
        _put32(at + 8, psn | <uint32_t> ask << 31)

    cdef void _finish(self, queue_pair *pair, uint32_t slot, uint32_t length) noexcept nogil:
        """Fill in lengths, checksum and ICRC of a frame that has `length` bytes without the last."""
        cdef uint8_t *frame = self.out + slot * FRAME_BYTES
        cdef uint8_t *ip = frame + pair.ip_offset
        cdef uint32_t headers = pair.header_bytes - 8 - pair.ip_offset
        cdef uint32_t total = length + 4 - pair.ip_offset, sums = 0, i, crc
        _put16(ip + headers + 4, total - headers)
        if ip[0] >> 4 == 4:
            _put16(ip + 2, total)
            _put16(ip + 10, 0)
            for i in range(0, headers, 2):
                sums += <uint32_t> ip[i] << 8 | ip[i + 1]
            sums = (sums & 0xFFFF) + (sums >> 16)
            _put16(ip + 10, ~((sums & 0xFFFF) + (sums >> 16)))
        else:
            _put16(ip + 4, total - 40)
        crc = fc_icrc(ip, headers, total - 4)
        memcpy(frame + length, &crc, 4)
        self.out_vectors[slot].iov_len = length + 4

    cdef uint32_t _flush(self, uint32_t count) noexcept nogil:
        """Send the first frames of `out`; return how many have left, less than `count` if the socket is full.

        Never waits: who is to make room may be waiting for this side to take what it has sent.
        """
        cdef uint32_t done = 0
        cdef int status
        while done < count:
            status = sendmmsg(self.fd, self.sending + done, count - done, MSG_DONTWAIT | MSG_NOSIGNAL)
            if status > 0:
                done += status
                self.sent += status
            elif errno == EAGAIN or errno == ENOBUFS:
                self.full = True
                break
            elif errno != EINTR:
                return count  # the cable is cut: frames are lost, and repeated later
        return done
