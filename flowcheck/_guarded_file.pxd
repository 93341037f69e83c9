# SPDX-License-Identifier: MIT
from libc.stdint cimport uint8_t, uint64_t

# What the header keeps belongs to this module: others call `is_cut`, none of its functions.
cdef extern from "flowcheck/_guarded_file.h" nogil:
    cdef struct fc_area:
        int cut

cdef enum:
    FC_FILE_KEPT = 1 << 30    # bytes of a file that stay mapped, once they are
    FC_FILE_WINDOW = 64 << 20 # what lies behind them is let go in pieces of it, once it was passed

cdef class GuardedFile:
    cdef const uint8_t *data
    cdef readonly uint64_t size
    cdef fc_area *area
    cdef int descriptor

    cdef bint is_cut(self) noexcept nogil
    cdef uint64_t let_go(self, uint64_t begin, uint64_t end) noexcept nogil
    cdef void _release(self) noexcept
