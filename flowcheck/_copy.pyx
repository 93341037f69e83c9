# SPDX-License-Identifier: MIT
# distutils: define_macros = ALLOW_EXPERIMENTAL_API=1
# (dmadev is marked experimental in DPDK 22.11; the calls used here are the same in 23.11 and 24.11.)
"""The copy engine: copies by the CPU, or by one or several DMA devices that take turns.

Two steps, as hardware has them: submit, then reap with status. A copy that a device fails, or has no room for, is done
by the CPU; failures are counted. Without a device everything is done at once, and `drain` finds nothing to wait for.
"""

from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from flowcheck import _eal
from flowcheck.errors import DeviceError
from flowcheck.eal import Eal

cdef extern from "rte_dmadev.h" nogil:
    enum: RTE_DMA_DIR_MEM_TO_MEM
    enum: RTE_DMA_OP_FLAG_SUBMIT
    cdef enum rte_dma_status_code:
        RTE_DMA_STATUS_SUCCESSFUL
    cdef struct rte_dma_info:
        uint16_t max_desc
        uint16_t min_desc
    cdef struct rte_dma_conf:
        uint16_t nb_vchans
    cdef struct rte_dma_vchan_conf:
        int direction
        uint16_t nb_desc
    int rte_dma_get_dev_id_by_name(const char *name)
    int rte_dma_info_get(int16_t device, rte_dma_info *info)
    int rte_dma_configure(int16_t device, const rte_dma_conf *conf)
    int rte_dma_vchan_setup(int16_t device, uint16_t vchan, const rte_dma_vchan_conf *conf)
    int rte_dma_start(int16_t device)
    int rte_dma_stop(int16_t device)
    int rte_dma_copy(int16_t device, uint16_t vchan, uint64_t source, uint64_t target, uint32_t length, uint64_t flags)
    uint16_t rte_dma_completed_status(int16_t device, uint16_t vchan, uint16_t most, uint16_t *last,
                                      rte_dma_status_code *status)

cdef extern from "rte_pause.h" nogil:
    void rte_pause()

cdef enum:
    REAP = 64


cdef memory_address(unsigned char[::1] memory):
    return <uint64_t> &memory[0]


cdef class CopyEngine:
    """CopyEngine(devices=()): make it, `register` the memory it copies between, copy, `close` it. One thread.

    devices: DPDK device arguments of DMA engines, e.g. "dma_skeleton0" or "0000:00:01.0"; none: the CPU copies.
    Attributes: engine_bytes (bytes that devices copied), engine_failed (copies they failed), names.
    DeviceError if a device cannot be had.
    """

    def __cinit__(self, devices=()):
        self.names = []
        self._registered = []
        self.engine_bytes = self.engine_failed = 0
        self.device_count = self.turn = 0
        self.submitted = self.finished = 0
        memset(self.device_submitted, 0, sizeof(self.device_submitted))
        memset(self.device_finished, 0, sizeof(self.device_finished))
        devices = list(devices)
        if len(devices) > FC_COPY_DEVICES:
            raise DeviceError(f"{len(devices)} DMA devices: at most {FC_COPY_DEVICES} take turns")
        if devices:
            Eal.start()
        for devargs in devices:
            self._open(devargs)

    def _open(self, str devargs):
        cdef rte_dma_info info
        cdef rte_dma_conf conf
        cdef rte_dma_vchan_conf channel
        name = devargs.split(",")[0]
        cdef int device = rte_dma_get_dev_id_by_name(name.encode())
        if device < 0:
            _eal.probe(devargs)
            device = rte_dma_get_dev_id_by_name(name.encode())
        if device < 0:
            raise DeviceError(f"{devargs!r} is no DMA device", -device)
        if name in _open_devices:
            # Two channels of one engine in one process would reap each other's copies.
            raise DeviceError(f"DMA device {name!r} is in use by another stage of this process")
        memset(&info, 0, sizeof(info))
        memset(&conf, 0, sizeof(conf))
        memset(&channel, 0, sizeof(channel))
        conf.nb_vchans = 1
        channel.direction = RTE_DMA_DIR_MEM_TO_MEM
        cdef int status = rte_dma_info_get(<int16_t> device, &info)
        if status == 0:
            channel.nb_desc = min(max(FC_COPY_DEPTH, info.min_desc), info.max_desc)
            status = rte_dma_configure(<int16_t> device, &conf)
        if status == 0:
            status = rte_dma_vchan_setup(<int16_t> device, 0, &channel)
        if status == 0:
            status = rte_dma_start(<int16_t> device)
        if status < 0:
            raise DeviceError(f"DMA device {name!r} does not start: error {-status}", -status)
        _open_devices.add(name)
        self.devices[self.device_count] = <int16_t> device
        self.device_count += 1
        self.names.append(name)

    def register(self, unsigned char[::1] memory) -> None:
        """register(memory): let the devices reach mapped memory until `close`; nothing to do for the CPU, or twice."""
        if self.device_count and not any(known == memory_address(memory) for known, _ in self._registered):
            _eal.register(memory)
            self._registered.append((memory_address(memory), memory))

    def close(self) -> None:
        """close(): wait for what is in flight, stop the devices, give the memory back."""
        cdef uint32_t i
        self.drain()
        for i in range(self.device_count):
            rte_dma_stop(self.devices[i])
        self.device_count = 0
        for _, memory in self._registered:
            _eal.unregister(memory)
        self._registered = []
        _open_devices.difference_update(self.names)
        self.names = []

    def copy_bytes(self, unsigned char[::1] target, const unsigned char[::1] source) -> None:
        """copy_bytes(target, source): copy all of source to the start of target, and wait for it."""
        if source.shape[0] > target.shape[0]:
            raise ValueError(f"{source.shape[0]} bytes do not fit {target.shape[0]}")
        if source.shape[0]:
            self.copy(&target[0], &source[0], source.shape[0])

    cdef void submit(self, uint8_t *target, const uint8_t *source, uint32_t length) noexcept nogil:
        """Begin one copy; both ends must stay as they are until `drain`."""
        cdef uint32_t which
        cdef uint64_t at
        cdef fc_copy *entry
        if self.device_count == 0:
            memcpy(target, source, length)
            return
        while self.submitted - self.finished >= FC_COPY_DEPTH:
            self._reap()
        which = self.turn
        self.turn = (self.turn + 1) % self.device_count
        if rte_dma_copy(self.devices[which], 0, <uint64_t> source, <uint64_t> target, length, RTE_DMA_OP_FLAG_SUBMIT) < 0:
            memcpy(target, source, length)  # no room in its queue
            return
        entry = &self.flight[self.submitted & (FC_COPY_DEPTH - 1)]
        entry.target, entry.source, entry.length = target, source, length
        entry.device, entry.state = <uint16_t> which, 0
        at = self.device_submitted[which] & (FC_COPY_DEPTH - 1)
        self.order[which][at] = <uint32_t> (self.submitted & (FC_COPY_DEPTH - 1))
        self.device_submitted[which] += 1
        self.submitted += 1

    cdef void _reap(self) noexcept nogil:
        """Take what the devices report done; move `finished` over the copies that are, in order."""
        cdef rte_dma_status_code status[REAP]
        cdef uint16_t last, count
        cdef uint32_t which, i
        cdef uint64_t left
        cdef fc_copy *entry
        for which in range(self.device_count):
            left = self.device_submitted[which] - self.device_finished[which]
            if left == 0:
                continue
            count = rte_dma_completed_status(self.devices[which], 0, REAP if left > REAP else <uint16_t> left, &last, status)
            for i in range(count):
                entry = &self.flight[self.order[which][self.device_finished[which] & (FC_COPY_DEPTH - 1)]]
                self.device_finished[which] += 1
                if status[i] == RTE_DMA_STATUS_SUCCESSFUL:
                    self.engine_bytes += entry.length
                else:
                    self.engine_failed += 1
                    memcpy(entry.target, entry.source, entry.length)
                entry.state = 1
        while self.finished < self.submitted and self.flight[self.finished & (FC_COPY_DEPTH - 1)].state:
            self.finished += 1

    cdef void drain(self) noexcept nogil:
        """Wait until every submitted copy is done."""
        while self.finished < self.submitted:
            self._reap()
            if self.finished < self.submitted:
                rte_pause()

    cdef void copy(self, uint8_t *target, const uint8_t *source, uint64_t length) noexcept nogil:
        """Copy and wait."""
        cdef uint64_t at = 0
        cdef uint32_t piece
        while at < length:
            piece = <uint32_t> (length - at if length - at < 1 << 20 else 1 << 20)
            self.submit(target + at, source + at, piece)
            at += piece
        self.drain()


_open_devices = set()
