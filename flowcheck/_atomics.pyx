# SPDX-License-Identifier: MIT
"""Acquire and release of words in shared memory, and published states, for the Python side of rings and slots."""

from libc.stdint cimport uint64_t

from flowcheck._formats cimport FC_FENCE, FC_LOAD_ACQUIRE, FC_STORE_RELEASE


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


def published(unsigned char[::1] memory, Py_ssize_t block, Py_ssize_t copy_bytes, Py_ssize_t state_bytes) -> bytes | None:
    """published(memory, block, copy_bytes, state_bytes) -> the newest state of a block, while its stage may publish more.

    None if both copies' numbers were found 0: nothing was ever published, or it was published twice between two looks.
    """
    cdef uint64_t *first = _word(memory, block)
    cdef uint64_t *second = _word(memory, block + copy_bytes)
    cdef uint64_t *newer
    cdef uint64_t number, other
    if state_bytes > copy_bytes - 8 or block + 2 * copy_bytes > memory.shape[0]:
        raise IndexError(f"no two copies of {copy_bytes} bytes with {state_bytes} of state at offset {block}")
    while True:
        number, other = FC_LOAD_ACQUIRE(first), FC_LOAD_ACQUIRE(second)
        newer = first if number > other else second
        number = number if number > other else other
        if number == 0:
            return None
        state = (<unsigned char *> newer)[8:8 + state_bytes]
        FC_FENCE()  # the bytes were read before the number is read again
        if FC_LOAD_ACQUIRE(newer) == number:
            return state
