# SPDX-License-Identifier: MIT
"""The staging buffer of a snapshot: the whole state, copied together while nothing steps it, then written at leisure."""

from libc.stdint cimport uint64_t

from flowcheck._copy cimport CopyEngine

import mmap

__all__ = ["Staging"]

cdef enum:
    ALIGNMENT = 64


cdef class Staging:
    """Staging(capacity_bytes, engine): room for tensors, filled by `copy`, each begun on 64 bytes."""

    cdef object _memory
    cdef unsigned char[::1] _bytes
    cdef uint64_t _used
    cdef CopyEngine _engine

    def __init__(self, uint64_t capacity_bytes, CopyEngine engine not None):
        self._memory = mmap.mmap(-1, max(capacity_bytes, ALIGNMENT))
        self._bytes = self._memory
        self._engine = engine

    @staticmethod
    def room(uint64_t size):
        """room(size): bytes of the buffer that a piece of `size` bytes takes."""
        return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT

    def copy(self, const unsigned char[::1] source):
        """copy(source): copy a piece in; returns it, in the buffer. ValueError if there is no room left."""
        cdef uint64_t size = source.shape[0]
        cdef uint64_t at = self._used
        if at + size > <uint64_t> self._bytes.shape[0]:
            raise ValueError(f"no room for {size} bytes in a staging buffer of {self._bytes.shape[0]}")
        if size:
            with nogil:
                self._engine.copy(&self._bytes[at], &source[0], size)
        self._used = at + self.room(size)
        return memoryview(self._memory)[at:at + size]
