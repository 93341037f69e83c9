# SPDX-License-Identifier: MIT
"""Acquire and release of 64-bit words in shared memory, for the Python side of rings and slots."""

from libc.stdint cimport uint64_t

from flowcheck._formats cimport FC_LOAD_ACQUIRE, FC_STORE_RELEASE


cdef uint64_t *_word(unsigned char[::1] memory, Py_ssize_t offset) except NULL:
    if offset < 0 or offset % 8 or offset + 8 > memory.shape[0]:
        raise IndexError(f"no aligned word at offset {offset} of {memory.shape[0]} bytes")
    return <uint64_t *> &memory[offset]


def load(unsigned char[::1] memory, Py_ssize_t offset) -> int:
    """load(memory, offset) -> the word there, read with acquire order; memory must be writable."""
    return FC_LOAD_ACQUIRE(_word(memory, offset))


def store(unsigned char[::1] memory, Py_ssize_t offset, uint64_t value) -> None:
    """store(memory, offset, value): write the word with release order."""
    FC_STORE_RELEASE(_word(memory, offset), value)
