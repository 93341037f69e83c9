# SPDX-License-Identifier: MIT
# Taking the data out of payloads: _kernels.h, and a header for each encoding.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "_kernels.h" nogil:
    enum:
        FC_STORE
        FC_STREAM
        FC_COMPARE
        FC_OTHER_FLAG
        FC_OTHER_BYTES
    ctypedef int (*fc_kernel)(uint8_t *slot, const uint8_t *payload, size_t count, uint64_t flag, int how)
    ctypedef struct fc_kernels:
        fc_kernel plain
        fc_kernel ll
        fc_kernel ll128
    void FC_STREAMED()

cdef extern from "_ll.h" nogil:
    int fc_ll_take(fc_kernel kernel, uint8_t *slot, const uint8_t *payload, size_t lines, uint64_t flag, uint64_t bytes, int how)

cdef extern from "_ll128.h" nogil:
    ctypedef struct fc_ll128_run:
        uint32_t unit
        uint32_t units
    uint32_t fc_ll128_runs(uint32_t line, fc_ll128_run *runs)
    int fc_ll128_take(fc_kernel kernel, uint8_t *slot, const uint8_t *payload, uint32_t line, uint32_t lines, uint64_t flag,
                      uint64_t first, uint64_t bytes, int how)

cdef extern from "_dispatch.h" nogil:
    const fc_kernels *fc_kernels_of(const char *name)
