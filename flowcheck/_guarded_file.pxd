# SPDX-License-Identifier: MIT
from libc.stdint cimport uint8_t, uint64_t

# What the header keeps belongs to this module: others call `is_cut`, none of its functions.
cdef extern from "flowcheck/_guarded_file.h" nogil:
    cdef struct fc_area:
        int cut

cdef class GuardedFile:
    cdef const uint8_t *data
    cdef readonly uint64_t size
    cdef fc_area *area
    cdef int descriptor

    cdef bint is_cut(self) noexcept nogil
    cdef void _release(self) noexcept
