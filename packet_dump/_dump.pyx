# SPDX-License-Identifier: MIT
"""The dump's loops: bursts of frames from a DPDK port, or from a mapped capture file, into the packet ring."""

from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from flowcheck._capture_file cimport FC_FILE_FRAME, fc_file, fc_file_begin, fc_file_frame, fc_file_next
from flowcheck._copy cimport CopyEngine
from flowcheck._formats cimport (
    FC_LOAD_ACQUIRE, FC_STORE_RELEASE, fc_dump_state, fc_publish, fc_record, fc_recover, fc_ring_header,
)
from flowcheck._guarded_file cimport FC_FILE_KEPT, GuardedFile

from flowcheck import _eal
from flowcheck.errors import DeviceError

cdef extern from "rte_mbuf.h" nogil:
    cdef struct rte_mempool:
        pass
    cdef struct rte_mbuf:
        rte_mbuf *next
        uint64_t ol_flags
        uint32_t pkt_len
        uint16_t data_len
    void rte_pktmbuf_free_bulk(rte_mbuf **mbufs, unsigned int count)
    rte_mempool *rte_pktmbuf_pool_create(const char *name, unsigned int count, unsigned int cache, uint16_t private_bytes,
                                         uint16_t room, int socket)
    enum: RTE_PKTMBUF_HEADROOM

cdef extern from "rte_mempool.h" nogil:
    void rte_mempool_free(rte_mempool *pool)
    unsigned int rte_mempool_in_use_count(const rte_mempool *pool)

cdef extern from "rte_mbuf_dyn.h" nogil:
    int rte_mbuf_dynfield_lookup(const char *name, void *parameters)
    int rte_mbuf_dynflag_lookup(const char *name, void *parameters)

cdef extern from "rte_errno.h" nogil:
    int rte_errno

cdef extern from "rte_memory.h" nogil:
    enum: SOCKET_ID_ANY

cdef extern from "rte_ethdev.h" nogil:
    cdef struct rte_eth_conf:
        pass
    cdef struct rte_eth_stats:
        uint64_t imissed
        uint64_t rx_nombuf
    int rte_eth_dev_get_port_by_name(const char *name, uint16_t *port)
    int rte_eth_dev_configure(uint16_t port, uint16_t rx, uint16_t tx, const rte_eth_conf *conf)
    int rte_eth_rx_queue_setup(uint16_t port, uint16_t queue, uint16_t descriptors, int socket, const void *conf, rte_mempool *pool)
    int rte_eth_dev_start(uint16_t port)
    int rte_eth_dev_stop(uint16_t port)
    int rte_eth_dev_close(uint16_t port)
    int rte_eth_promiscuous_enable(uint16_t port)
    int rte_eth_stats_get(uint16_t port, rte_eth_stats *stats)
    uint16_t rte_eth_rx_burst(uint16_t port, uint16_t queue, rte_mbuf **mbufs, uint16_t count)

cdef extern from * nogil:
    """
    #define FC_MBUF_DATA(m) rte_pktmbuf_mtod((m), uint8_t *)
    #define FC_MBUF_TIME(m, o) (*RTE_MBUF_DYNFIELD((m), (o), uint64_t *))

    typedef uint64_t fc_words __attribute__((vector_size(16), aligned(1), may_alias));

    /* Where both ends lie outside the cache this is a third faster than the C library's memcpy, which takes longer frames by
     * instructions for whole strings. */
    static inline void fc_copy_frame(uint8_t *target, const uint8_t *source, uint32_t length) {
        for (; length >= 128; target += 128, source += 128, length -= 128) {
            const fc_words *from = (const fc_words *)source;
            fc_words *to = (fc_words *)target;
            fc_words a = from[0], b = from[1], c = from[2], d = from[3], e = from[4], f = from[5], g = from[6], h = from[7];
            to[0] = a, to[1] = b, to[2] = c, to[3] = d, to[4] = e, to[5] = f, to[6] = g, to[7] = h;
        }
        memcpy(target, source, length);
    }
    """
    void fc_copy_frame(uint8_t *target, const uint8_t *source, uint32_t length)
    uint8_t *FC_MBUF_DATA(rte_mbuf *mbuf)
    uint64_t FC_MBUF_TIME(rte_mbuf *mbuf, int offset)

cdef enum:
    BURST = 64
    # Of a file: so few bytes that they are in the second-level cache still when the next stage, on the same core, reads them.
    FILE_BURST = 256
    BURST_BYTES = 256 << 10
    MBUFS = 1024
    # Room of a buffer: jumbo frames in one piece; longer ones (segmentation offload, captured) come as chains.
    MBUF_ROOM = 9600
    RX_DESCRIPTORS = 512

_pools = 0


cdef class _Loop:
    """What both loops have: their end of a ring, and the state that is published in it."""

    cdef object _memory
    cdef fc_ring_header *header
    cdef uint8_t *records
    cdef uint8_t *block
    cdef uint64_t room
    cdef fc_dump_state state
    cdef bint live

    cdef void take(self, unsigned char[::1] memory, bint live):
        """Take the ring up where an earlier life left it."""
        self._memory = memory
        self.header = <fc_ring_header *> &memory[0]
        self.records = &memory[self.header.header_bytes]
        self.block = &memory[self.header.dump_state_offset]
        self.room = self.header.record_bytes - sizeof(fc_record)
        memset(&self.state, 0, sizeof(self.state))
        fc_recover(self.block, self.header.dump_state_bytes, &self.state, sizeof(self.state))
        FC_STORE_RELEASE(&self.header.written, self.state.written)
        self.header.live = self.live = live

    @property
    def finished(self) -> bool:
        """Whether the file has been read to its end; a port never is."""
        return bool(FC_LOAD_ACQUIRE(&self.header.ended))

    @property
    def state_values(self) -> dict:
        """The published state."""
        return dict(self.state)

    def poll(self) -> int:
        """poll() -> frames moved in one burst; 0 if there is nothing to do now."""
        cdef uint64_t moved
        with nogil:
            moved = self._burst()
        return moved

    cdef uint64_t _burst(self) noexcept nogil:
        return 0

    cdef inline uint64_t free_records(self) noexcept nogil:
        return self.header.records - (self.state.written - FC_LOAD_ACQUIRE(&self.header.extracted))

    cdef inline fc_record *begin(self, uint64_t sequence, uint32_t length, uint64_t ns) noexcept nogil:
        """Write a record's header."""
        cdef fc_record *record = <fc_record *> (self.records + (sequence & (self.header.records - 1)) * self.header.record_bytes)
        memset(record, 0, sizeof(fc_record))
        record.frame_length = length
        record.stored_length = length if length < self.room else <uint32_t> self.room
        record.sequence = sequence
        record.timestamp_ns = ns
        return record

    cdef inline void publish(self, uint64_t stored) noexcept nogil:
        self.state.written += stored
        fc_publish(self.block, self.header.dump_state_bytes, &self.state, sizeof(self.state))
        FC_STORE_RELEASE(&self.header.written, self.state.written)


cdef class FileLoop(_Loop):
    """FileLoop(memory, file, frames): `poll` until `finished`. One thread.

    memory: the mapped ring. file: a capture file that was found plain, and to hold so many frames. An earlier life's are passed over.
    """

    cdef GuardedFile file
    cdef fc_file walk
    cdef uint64_t frames
    cdef uint64_t gone          # of the file; behind FC_FILE_KEPT
    cdef readonly bint changed  # the file is not what it was when it was validated

    def __cinit__(self, unsigned char[::1] memory, GuardedFile file not None, uint64_t frames):
        cdef fc_file_frame frame
        cdef uint64_t i
        self.file, self.frames, self.gone = file, frames, FC_FILE_KEPT
        self.take(memory, False)
        with nogil:
            self.changed = not fc_file_begin(&self.walk, file.data, file.size)
            for i in range(self.state.written):
                if self.changed:
                    break
                self.changed = fc_file_next(&self.walk, &frame) != FC_FILE_FRAME
                self.gone = file.let_go(self.gone, self.walk.at)

    cdef uint64_t _burst(self) noexcept nogil:
        cdef uint64_t want = self.free_records(), stored = 0, bytes_left = BURST_BYTES
        cdef fc_file_frame frame
        cdef fc_record *record
        if self.header.ended or self.file.data == NULL:  # closed
            return 0
        if self.state.written == self.frames:
            FC_STORE_RELEASE(&self.header.ended, 1)
            return 1
        if want > self.frames - self.state.written:
            want = self.frames - self.state.written
        if want > FILE_BURST:
            want = FILE_BURST
        while stored < want and not self.changed:
            if fc_file_next(&self.walk, &frame) != FC_FILE_FRAME:
                self.changed = True
                break
            record = self.begin(self.state.written + stored, frame.length, frame.ns)
            fc_copy_frame(<uint8_t *> record + sizeof(fc_record), frame.data, record.stored_length)
            stored += 1
            if bytes_left < record.stored_length:
                break
            bytes_left -= record.stored_length
        if self.file.is_cut():
            self.changed = True  # of what was copied nothing can be believed
            return 0
        if stored:
            self.publish(stored)
            self.gone = self.file.let_go(self.gone, self.walk.at)
        return stored


cdef class DumpLoop(_Loop):
    """DumpLoop(memory, devargs, live, waits, frames, engine): `poll` until `finished`, then `close`. One thread.

    memory: the mapped ring. devargs: device arguments of the port, its name first. live: a port, or a file. waits: a full
    ring waits, as one for a file always does; else it drops and counts. frames: how many a file holds.
    """

    cdef CopyEngine engine
    cdef bint by_engine         # devices copy
    cdef rte_mempool *pool
    cdef uint16_t port
    cdef bint open_port
    cdef str name
    cdef bint waits
    cdef readonly bint held     # the last poll found the ring full, and did not look at the port
    cdef uint64_t frames
    cdef uint64_t taken         # frames received from the port in this life
    cdef uint64_t skip          # of them, those that an earlier life has in the ring
    cdef uint64_t missed_before
    cdef int time_offset
    cdef uint64_t time_flag
    cdef readonly uint64_t empty_polls

    def __cinit__(self, unsigned char[::1] memory, str devargs, bint live, bint waits, uint64_t frames,
                  CopyEngine engine not None):
        global _pools
        cdef rte_eth_conf conf
        cdef int status
        self.pool = NULL
        self.open_port = False
        self.engine, self.by_engine, self.waits, self.frames = engine, engine.device_count > 0, waits, frames
        self.taken = self.empty_polls = 0
        self.take(memory, live)
        if live:
            FC_STORE_RELEASE(&self.header.ended, 0)  # a port that is opened again goes on
        self.skip = 0 if live else self.state.written
        self.missed_before = self.state.missed_by_port
        self.name = devargs.split(",")[0]
        if not live and frames == 0:
            return  # nothing to open: net_pcap refuses a file without frames
        _pools += 1
        pool = f"flowcheck{_pools}".encode()
        self.pool = rte_pktmbuf_pool_create(pool, MBUFS, 0, 0, MBUF_ROOM + RTE_PKTMBUF_HEADROOM, SOCKET_ID_ANY)
        if self.pool == NULL:
            raise DeviceError(f"no memory for {MBUFS} packet buffers of {MBUF_ROOM} bytes: give DPDK more (-m)", rte_errno)
        _eal.probe(devargs)
        status = rte_eth_dev_get_port_by_name(self.name.encode(), &self.port)
        if status < 0:
            raise DeviceError(f"{devargs!r} is no DPDK port", -status)
        self.open_port = True
        memset(&conf, 0, sizeof(conf))
        for what, status in (
            ("configure", rte_eth_dev_configure(self.port, 1, 0, &conf)),
            ("set up its queue", rte_eth_rx_queue_setup(self.port, 0, RX_DESCRIPTORS, SOCKET_ID_ANY, NULL, self.pool)),
            ("start", rte_eth_dev_start(self.port)),
        ):
            if status < 0:
                raise DeviceError(f"port {self.name!r} does not {what}: error {-status}", -status)
        if live:
            rte_eth_promiscuous_enable(self.port)  # mirrored frames are addressed to others
        self.time_offset = rte_mbuf_dynfield_lookup(b"rte_dynfield_timestamp", NULL)
        status = rte_mbuf_dynflag_lookup(b"rte_dynflag_rx_timestamp", NULL)
        self.time_flag = <uint64_t> 1 << status if status >= 0 and self.time_offset >= 0 and not live else 0

    @property
    def frames_taken(self) -> int:
        """Frames received from the port since this loop began."""
        return self.taken

    def note_interface(self, uint64_t count) -> None:
        """note_interface(count): hold what came against the interface's own count, read before a poll that found nothing.

        What it counted and the port never gave was lost between the two.
        """
        cdef uint64_t came = self.state.written + self.state.dropped_ring_full
        if self.state.interface_base == 0 or count + 1 < self.state.interface_base:  # new, or made anew
            self.state.interface_base = count + 1 - came
        count = count + 1 - self.state.interface_base
        self.state.missed_by_port = count - came if <int64_t> (count - came) > 0 else 0
        fc_publish(self.block, self.header.dump_state_bytes, &self.state, sizeof(self.state))

    def stop(self) -> None:
        """stop(): say that no frame follows, and take none; for a port, whose end only its owner knows."""
        FC_STORE_RELEASE(&self.header.ended, 1)

    cdef uint64_t _burst(self) noexcept nogil:
        cdef rte_mbuf *mbufs[BURST]
        cdef uint64_t free_records = self.free_records()
        cdef uint64_t want = BURST, now, bytes_before, failed_before
        cdef uint16_t got, i
        cdef uint64_t stored = 0
        cdef rte_eth_stats stats
        cdef timespec clock
        if self.header.ended:
            return 0  # the stages behind may have gone home
        if not self.live:
            if self.taken == self.frames:
                FC_STORE_RELEASE(&self.header.ended, 1)
                return 1
            if self.skip == 0 and want > free_records:
                want = free_records
            elif self.skip and want > self.skip:
                want = self.skip
            if want > self.frames - self.taken:
                want = self.frames - self.taken
            if want == 0:
                return 0
        elif self.waits:
            want = want if want < free_records else free_records
            self.held = want == 0
            if self.held:
                return 0
        got = rte_eth_rx_burst(self.port, 0, mbufs, <uint16_t> want)
        if got == 0:
            self.empty_polls += 1
            return 0
        self.empty_polls = 0
        self.taken += got
        if self.skip:
            self.skip -= got
            rte_pktmbuf_free_bulk(mbufs, got)
            return got
        clock_gettime(CLOCK_REALTIME, &clock)
        now = <uint64_t> clock.tv_sec * 1000000000 + <uint64_t> clock.tv_nsec
        bytes_before, failed_before = self.engine.engine_bytes, self.engine.engine_failed
        for i in range(got):
            if stored == free_records:
                self.state.dropped_ring_full += 1
                continue
            self._store(mbufs[i], self.state.written + stored, now)
            stored += 1
        self.engine.drain()
        self.state.engine_bytes += self.engine.engine_bytes - bytes_before
        self.state.engine_failed += self.engine.engine_failed - failed_before
        rte_pktmbuf_free_bulk(mbufs, got)
        if self.live and self.state.interface_base == 0 and rte_eth_stats_get(self.port, &stats) == 0:
            self.state.missed_by_port = self.missed_before + stats.imissed + stats.rx_nombuf
        self.publish(stored)
        return got

    cdef void _store(self, rte_mbuf *mbuf, uint64_t sequence, uint64_t now) noexcept nogil:
        """Write a record's header and begin the copy of its frame."""
        # net_pcap gives microseconds (drivers/net/pcap/pcap_ethdev.c); other ports have clocks of their own.
        cdef uint64_t ns = FC_MBUF_TIME(mbuf, self.time_offset) * 1000 if mbuf.ol_flags & self.time_flag else now
        cdef fc_record *record = self.begin(sequence, mbuf.pkt_len, ns)
        cdef uint8_t *target = <uint8_t *> record + sizeof(fc_record)
        cdef uint64_t left
        cdef uint32_t length
        left = record.stored_length
        while mbuf != NULL and left:
            length = mbuf.data_len if mbuf.data_len < left else <uint32_t> left
            if self.by_engine:
                self.engine.submit(target, FC_MBUF_DATA(mbuf), length)
            else:
                fc_copy_frame(target, FC_MBUF_DATA(mbuf), length)
            target += length
            left -= length
            mbuf = mbuf.next

    def close(self) -> None:
        """close(): stop the port and give its buffers back."""
        if self.open_port:
            self.open_port = False
            rte_eth_dev_stop(self.port)
            rte_eth_dev_close(self.port)
            _eal.unplug(self.name)
        if self.pool != NULL:
            rte_mempool_free(self.pool)
            self.pool = NULL
