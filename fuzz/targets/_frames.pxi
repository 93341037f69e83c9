# SPDX-License-Identifier: MIT
# Frames made from a fuzz input, for targets that take several: most of them right as a whole, so that what keeps account
# of packets is reached; one byte, the checksum or everything may be wrong. Included, so that each target has its own.
from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from flowcheck._wire cimport (
    FC_HAS_AETH, FC_HAS_ATOMIC, FC_HAS_ATOMIC_ACK, FC_HAS_DETH, FC_HAS_IMMEDIATE, FC_HAS_INVALIDATE, FC_HAS_PAYLOAD,
    FC_HAS_RETH, FC_IS_LAST, FC_WIRE_OK, fc_decode, fc_icrc, fc_opcode_has, fc_wire)

cdef extern from "_target.h" nogil:
    void fuzz_claim(bint holds, const char *what, long long number)
    void fuzz_forbid(const void *begin, size_t bytes)
    void fuzz_allow(const void *begin, size_t bytes)
    uint8_t *fuzz_exactly(uint32_t room, size_t bytes)

cdef struct input_view:
    const uint8_t *data
    size_t left

cdef uint8_t frame[2048]
cdef uint32_t frame_bytes = 0


cdef inline uint32_t _take(input_view *view, uint32_t bytes) noexcept nogil:
    """Return the next bytes as a number; zeros where the input has ended."""
    cdef uint32_t value = 0
    while bytes:
        bytes -= 1
        value <<= 8
        if view.left:
            value |= view.data[0]
            view.data += 1
            view.left -= 1
    return value


cdef void _take_frame(input_view *view) noexcept nogil:
    """Take a frame as it comes, of twice (1) bytes."""
    global frame_bytes
    frame_bytes = _take(view, 1) * 2
    if frame_bytes > view.left:
        frame_bytes = <uint32_t> view.left
    memcpy(frame, view.data, frame_bytes)
    view.data += frame_bytes
    view.left -= frame_bytes


cdef void _put(uint8_t *at, uint64_t value, int bytes) noexcept nogil:
    """Store a number in network order."""
    while bytes:
        bytes -= 1
        at[bytes] = <uint8_t> value
        value >>= 8


cdef void _begin(const uint8_t *source, const uint8_t *destination, uint32_t queue_pair, uint8_t opcode,
                 uint32_t psn) noexcept nogil:
    """Begin a frame: everything up to and with its BTH, lengths aside."""
    global frame_bytes
    memset(frame, 0, 74)
    _put(frame + 12, 0x86DD, 2)
    frame[14] = 0x60
    frame[20] = 17
    frame[21] = 64
    memcpy(frame + 22, source, 16)
    memcpy(frame + 38, destination, 16)
    _put(frame + 54, 50000, 2)
    _put(frame + 56, 4791, 2)
    frame[62] = opcode
    _put(frame + 64, 0xFFFF, 2)
    _put(frame + 66, queue_pair, 4)
    _put(frame + 70, psn & 0xFFFFFF, 4)
    frame_bytes = 74


cdef void _end() noexcept nogil:
    """Fill up to whole words, leave room for the checksum, set the lengths."""
    global frame_bytes
    cdef uint32_t pad = (74 - frame_bytes) & 3
    memset(frame + frame_bytes, 0, pad + 4)
    frame[63] |= pad << 4
    frame_bytes += pad + 4
    _put(frame + 18, frame_bytes - 54, 2)
    _put(frame + 58, frame_bytes - 54, 2)


cdef void _mend() noexcept nogil:
    """Make the checksum right, whatever else the frame is."""
    cdef fc_wire wire
    cdef uint32_t icrc
    if fc_decode(frame, frame_bytes, &wire) == FC_WIRE_OK:
        icrc = fc_icrc(frame + wire.ip_offset, wire.ip_headers, wire.length - 4 - wire.ip_offset)
        memcpy(frame + wire.length - 4, &icrc, 4)


cdef void _change(input_view *view) noexcept nogil:
    """Change one byte of the frame: offset (1), exclusive-or (1)."""
    cdef uint32_t at = _take(view, 1) * (1 + frame_bytes // 256)
    if frame_bytes:
        frame[at % frame_bytes] ^= <uint8_t> _take(view, 1)


cdef void _make_frame(input_view *view, uint32_t *psn) noexcept nogil:
    """Make a frame of any opcode: flags (1), and what they ask for.

    bit 0 a frame as it comes   bit 1 the checksum is wrong   bit 2 a byte is changed   bits 3-4 payload: zeros, LL, LL128, bytes
    bit 5 the PSN is as given, else it goes on by (1)   bits 6-7 of the queue pair
    """
    global frame_bytes
    cdef uint32_t flags = _take(view, 1), length, at, small
    cdef uint64_t flag = 7
    cdef uint8_t opcode
    cdef uint16_t has
    cdef uint8_t ends[32]
    if flags & 1:
        _take_frame(view)
    else:
        opcode = <uint8_t> _take(view, 1)
        psn[0] = _take(view, 3) if flags & 32 else psn[0] + <int8_t> _take(view, 1)
        memset(ends, 0, 32)
        ends[15], ends[31] = flags >> 6 & 1, 2
        _begin(ends, ends + 16, 0x100 + (flags >> 7), opcode, psn[0])
        has = fc_opcode_has(opcode)
        if has & FC_HAS_DETH:
            memset(frame + frame_bytes, 0, 8)
            frame_bytes += 8
        length = _take(view, 1) * 4
        if not has & FC_HAS_PAYLOAD:
            length = 0
        if has & FC_HAS_RETH:
            _put(frame + frame_bytes, <uint64_t> 0x7F0000000000 + _take(view, 1) * 256, 8)
            _put(frame + frame_bytes + 8, 0x1234, 4)
            _put(frame + frame_bytes + 12, length if has & FC_IS_LAST else 4 * length, 4)
            frame_bytes += 16
        for at in range((28 if has & FC_HAS_ATOMIC else 0) + (4 if has & FC_HAS_AETH else 0) + (8 if has & FC_HAS_ATOMIC_ACK else 0)
                        + (4 if has & FC_HAS_IMMEDIATE else 0) + (4 if has & FC_HAS_INVALIDATE else 0)):
            frame[frame_bytes] = <uint8_t> at
            frame_bytes += 1
        memset(frame + frame_bytes, 0, length)
        if flags >> 3 & 3 == 1:
            small = _take(view, 1)
            for at in range(0, length // 16 * 16, 16):
                memcpy(frame + frame_bytes + at + 4, &small, 4)
                memcpy(frame + frame_bytes + at + 12, &small, 4)
        elif flags >> 3 & 3 == 2:
            flag = _take(view, 1)
            for at in range(0, length // 128 * 128, 128):
                memcpy(frame + frame_bytes + at + 120, &flag, 8)
        elif flags >> 3 & 3 == 3:
            memset(frame + frame_bytes, _take(view, 1), length)
        frame_bytes += length
        _end()
    if flags & 4:
        _change(view)
    if not flags & 2:
        _mend()
