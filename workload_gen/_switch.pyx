# SPDX-License-Identifier: MIT
"""What a switch does with frames: to the port that has their address, and what a mirrored port sees into shared memory.

The memory is a memif ring, the form in which DPDK's memif driver (drivers/net/memif/memif.h, protocol 2.0) takes frames
from another process: a header with head and tail, descriptors, buffers. Making and announcing it is the caller's.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from workload_gen._sockets cimport (
    MSG_DONTWAIT, MSG_NOSIGNAL, POLLIN, POLLOUT, iovec, mmsghdr, poll, pollfd, recvmmsg, send)

__all__ = ["Forwarder", "RING_BYTES", "FRAMES", "FRAMES_LOG2"]

cdef extern from * nogil:
    """
    #define FC_LOAD16(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define FC_STORE16(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    uint16_t FC_LOAD16(uint16_t *at)
    void FC_STORE16(uint16_t *at, uint16_t value)

cdef enum:
    BURST = 64
    PORTS = 64
    FRAME_BYTES = 9216
    SLOTS_LOG2 = 11
    SLOTS = 1 << SLOTS_LOG2
    COOKIE = 0x3E31F20
    HEAD = 6                    # offsets in the ring's header
    TAIL = 64
    DESCRIPTORS = 128
    DESCRIPTOR_BYTES = 16
    BUFFERS = DESCRIPTORS + SLOTS * DESCRIPTOR_BYTES
    PATIENCE_MS = 1000          # for a port that takes nothing
    DUMP_PATIENCE_MS = 10000    # for a dump: the stages behind it may be busy with a snapshot

FRAMES_LOG2 = SLOTS_LOG2
FRAMES = SLOTS
RING_BYTES = BUFFERS + SLOTS * FRAME_BYTES


cdef class Forwarder:
    """Forwarder(addresses): a port for each MAC address, none connected. One thread.

    `dropped` frames had no port to go to, or one that took nothing for a second. `unmirrored` frames of a mirrored port
    found no dump, or one that took nothing for ten. `mirrored` counts those that did, `mirrored_bytes` their bytes; both by port.
    """

    cdef uint8_t addresses[PORTS][6]
    cdef int sockets[PORTS]
    cdef uint8_t *rings[PORTS]
    cdef int dumps[PORTS]       # sockets that say whether there is one still
    cdef bint wanted[PORTS]
    cdef uint64_t frames[PORTS]
    cdef uint64_t bytes[PORTS]
    cdef list _keep
    cdef uint32_t ports
    cdef uint8_t *into
    cdef mmsghdr receiving[BURST]
    cdef iovec vectors[BURST]
    cdef readonly uint64_t dropped, unmirrored

    def __cinit__(self, addresses):
        cdef uint32_t i
        if len(addresses) > PORTS:
            raise ValueError(f"{len(addresses)} ports, {PORTS} at most")
        self.ports = len(addresses)
        self._keep = [None] * self.ports
        self.into = <uint8_t *> calloc(BURST, FRAME_BYTES)
        if self.into == NULL:
            raise MemoryError
        memset(self.receiving, 0, sizeof(self.receiving))
        for i in range(BURST):
            self.vectors[i].iov_base = self.into + i * FRAME_BYTES
            self.vectors[i].iov_len = FRAME_BYTES
            self.receiving[i].msg_hdr.msg_iov = &self.vectors[i]
            self.receiving[i].msg_hdr.msg_iovlen = 1
        for i in range(self.ports):
            memcpy(self.addresses[i], <const uint8_t *> (<bytes> addresses[i]), 6)
            self.sockets[i] = -1

    def __dealloc__(self):
        free(self.into)

    def connect(self, uint32_t port, int socket):
        """connect(port, socket): what has the port's address is at the other end of a socket; -1: nothing is."""
        self.sockets[port] = socket

    def mirror(self, uint32_t port, bint wanted):
        """mirror(port, wanted): begin, or end, to hand what a port sees to a dump."""
        self.wanted[port] = wanted

    def dump(self, uint32_t port, unsigned char[::1] memory, int socket):
        """dump(port, memory, socket): a dump takes a port's frames from `memory`, of RING_BYTES; None: there is none.

        What an earlier one has not taken is unmirrored.
        """
        self.unmirrored += self.waiting(port)
        self._keep[port] = memory
        self.rings[port] = NULL if memory is None else &memory[0]
        self.dumps[port] = socket

    @staticmethod
    def prepare(unsigned char[::1] memory):
        """prepare(memory): make an empty ring of fresh memory."""
        cdef uint32_t i
        (<uint32_t *> &memory[0])[0] = COOKIE
        for i in range(SLOTS):
            (<uint32_t *> &memory[DESCRIPTORS + i * DESCRIPTOR_BYTES + 8])[0] = BUFFERS + i * FRAME_BYTES

    def mirrored(self, uint32_t port):
        """mirrored(port) -> (frames, bytes) handed to dumps."""
        return self.frames[port], self.bytes[port]

    def waiting(self, uint32_t port):
        """waiting(port) -> frames that the port's dump has not taken yet."""
        return 0 if self.rings[port] == NULL else self._waiting(self.rings[port])

    def forward(self, uint32_t port, int socket):
        """forward(port, socket) -> whether the other end is there still; moves what has come to a port from a socket."""
        cdef int got, i
        with nogil:
            got = recvmmsg(socket, self.receiving, BURST, MSG_DONTWAIT, NULL)
            for i in range(got):
                if self.receiving[i].msg_len == 0:
                    got = 0
                    break
                self._move(port, self.into + i * FRAME_BYTES, self.receiving[i].msg_len)
        return got > 0 or (got < 0 and errno in (EAGAIN, EINTR))

    cdef void _move(self, uint32_t source, const uint8_t *frame, uint32_t length) noexcept nogil:
        cdef uint32_t port
        cdef pollfd one
        if self.wanted[source]:
            self._mirror(source, frame, length)
        for port in range(self.ports):
            if memcmp(self.addresses[port], frame, 6) == 0:
                break
        else:
            self.dropped += 1
            return
        if self.wanted[port]:
            self._mirror(port, frame, length)
        while send(self.sockets[port], frame, length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0:
            one.fd, one.events, one.revents = self.sockets[port], POLLOUT, 0
            if errno != EINTR and (errno != EAGAIN or poll(&one, 1, PATIENCE_MS) <= 0):
                self.dropped += 1
                return

    cdef uint32_t _waiting(self, uint8_t *ring) noexcept nogil:
        return <uint16_t> (FC_LOAD16(<uint16_t *> (ring + HEAD)) - FC_LOAD16(<uint16_t *> (ring + TAIL)))

    cdef void _mirror(self, uint32_t port, const uint8_t *frame, uint32_t length) noexcept nogil:
        """Put a frame into a port's ring; a full one is waited for, so that as long as a dump lives nothing is lost."""
        cdef uint8_t *ring = self.rings[port]
        cdef uint16_t head
        cdef uint32_t slot, waited = 0
        cdef pollfd one
        while ring != NULL and self._waiting(ring) == SLOTS:
            one.fd, one.events, one.revents = self.dumps[port], POLLIN, 0
            if poll(&one, 1, 1) != 0 or waited == DUMP_PATIENCE_MS:  # it goes, or stands still
                ring = NULL
            waited += 1
        if ring == NULL:
            self.unmirrored += 1
            return
        head = FC_LOAD16(<uint16_t *> (ring + HEAD))
        slot = head & (SLOTS - 1)
        memcpy(ring + BUFFERS + slot * FRAME_BYTES, frame, length)
        (<uint32_t *> (ring + DESCRIPTORS + slot * DESCRIPTOR_BYTES + 4))[0] = length
        FC_STORE16(<uint16_t *> (ring + HEAD), <uint16_t> (head + 1))
        self.frames[port] += 1
        self.bytes[port] += length
