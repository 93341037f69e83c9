# SPDX-License-Identifier: MIT
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "flowcheck/_capture_file.h" nogil:
    enum:
        FC_FILE_END
        FC_FILE_FRAME
        FC_FILE_ODD
        FC_LONGEST_FRAME
    cdef struct fc_file:
        uint64_t at
    cdef struct fc_file_frame:
        const uint8_t *data
        uint32_t length
        uint32_t wire_length
        uint64_t ns
    bint fc_file_begin(fc_file *walk, const uint8_t *data, uint64_t size)
    int fc_file_next(fc_file *walk, fc_file_frame *frame)
