# SPDX-License-Identifier: MIT
"""A file mapped for reading, as long as it was when it was opened. That somebody cuts it is noticed, and ends no process."""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open
from posix.mman cimport MADV_DONTNEED, MADV_SEQUENTIAL, MAP_FAILED, MAP_SHARED, PROT_READ, madvise, mmap, munmap
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.unistd cimport close

cdef extern from "flowcheck/_guarded_file.h" nogil:
    fc_area *fc_area_guard(uint8_t *begin, uint64_t size)
    void fc_area_leave(fc_area *area)


cdef class GuardedFile:
    """GuardedFile(path): map a regular file that is not empty; read `data`, then ask `is_cut`; `close` it.

    What is read behind the end of a file that was cut is zeros: whoever has read asks `is_cut` before it believes anything. One
    thread. OSError if it cannot be mapped.
    """

    def __cinit__(self, bytes path):
        cdef struct_stat status
        cdef void *memory = MAP_FAILED
        self.data = NULL
        self.area = NULL
        self.descriptor = open(path, O_RDONLY | O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(errno, "cannot open", path)
        if fstat(self.descriptor, &status) == 0 and S_ISREG(status.st_mode) and status.st_size > 0:
            self.size = status.st_size
            memory = mmap(NULL, self.size, PROT_READ, MAP_SHARED, self.descriptor, 0)
        if memory == MAP_FAILED:
            raise OSError(errno, "cannot map", path)
        self.data = <const uint8_t *> memory
        madvise(memory, self.size, MADV_SEQUENTIAL)
        self.area = fc_area_guard(<uint8_t *> memory, self.size)
        if self.area == NULL:
            raise OSError(errno, "cannot guard", path)

    def __dealloc__(self):
        self._release()

    cdef bint is_cut(self) noexcept nogil:
        """Whether what was read may not be the file's: to its last page's end, a cut file is read without a fault."""
        cdef struct_stat status
        return self.area == NULL or self.area.cut or fstat(self.descriptor, &status) < 0 or <uint64_t> status.st_size < self.size

    cdef void _unmap(self, uint64_t begin, uint64_t end) noexcept nogil:
        """Have the memory of this process hold pages of the file no longer: they are read again if they are asked for."""
        madvise(<void *> (self.data + begin), end - begin, MADV_DONTNEED)

    @property
    def cut(self) -> bool:
        """Whether the file is shorter than it was."""
        return self.is_cut()

    def close(self) -> None:
        """close(): give the mapping up."""
        self._release()

    cdef void _release(self) noexcept:
        if self.area != NULL:
            fc_area_leave(self.area)
            self.area = NULL
        if self.data != NULL:
            munmap(<void *> self.data, self.size)
            self.data = NULL
            self.size = 0
        if self.descriptor >= 0:
            close(self.descriptor)
            self.descriptor = -1
