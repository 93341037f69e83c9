# SPDX-License-Identifier: MIT
from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    FC_COPY_DEVICES = 16
    FC_COPY_DEPTH = 1024        # copies in flight on all devices together; a power of two

cdef struct fc_copy:
    uint8_t *target
    const uint8_t *source
    uint32_t length
    uint16_t device
    uint16_t state              # 0 in flight, 1 done

cdef class CopyEngine:
    cdef readonly uint64_t engine_bytes
    cdef readonly uint64_t engine_failed
    cdef int16_t devices[FC_COPY_DEVICES]
    cdef uint32_t device_count
    cdef uint32_t turn
    cdef fc_copy flight[FC_COPY_DEPTH]
    cdef uint64_t submitted
    cdef uint64_t finished
    cdef uint32_t order[FC_COPY_DEVICES][FC_COPY_DEPTH]  # per device: which copies are in flight, in order
    cdef uint64_t device_submitted[FC_COPY_DEVICES]
    cdef uint64_t device_finished[FC_COPY_DEVICES]
    cdef readonly list names
    cdef list _registered

    cdef void submit(self, uint8_t *target, const uint8_t *source, uint32_t length) noexcept nogil
    cdef void drain(self) noexcept nogil
    cdef void copy(self, uint8_t *target, const uint8_t *source, uint64_t length) noexcept nogil
    cdef void _reap(self) noexcept nogil
