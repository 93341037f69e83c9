# SPDX-License-Identifier: MIT
cimport cython
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
    cdef void _unmap(self, uint64_t begin, uint64_t end) noexcept nogil
    cdef void _release(self) noexcept

    @cython.final
    cdef inline uint64_t let_go(self, uint64_t gone, uint64_t at) noexcept nogil:
        """Let go of what was passed since `gone`, at first FC_FILE_KEPT, once it is a window; returns the new `gone`."""
        if at < gone + FC_FILE_WINDOW:
            return gone
        at -= at % 4096
        self._unmap(gone, at)
        return at
