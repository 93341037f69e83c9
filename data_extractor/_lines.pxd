# SPDX-License-Identifier: MIT
# Taking the data out of the lines of LL (_ll.h) and LL128 (_ll128.h).
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "_ll.h" nogil:
    ctypedef int (*fc_ll_strip)(uint8_t *dst, const uint8_t *src, size_t lines, uint32_t flag)
    fc_ll_strip fc_ll_kernel(const char *name)

cdef extern from "_ll128.h" nogil:
    ctypedef struct fc_ll128_run:
        uint32_t unit
        uint32_t units
    uint32_t fc_ll128_runs(uint32_t line, fc_ll128_run *runs)
    int fc_ll128_strip(uint8_t *data, const uint8_t *payload, uint32_t line, uint32_t lines, uint64_t flag,
                       uint64_t first, uint64_t bytes)
