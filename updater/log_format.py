# SPDX-License-Identifier: MIT
"""The bytes of the gradient log; docs/checkpoints.md draws them and a test compares the two.

A segment is a header and records one after another, each begun on 64 bytes. A record is a header, a table with one
CRC32C per MiB of payload, and the payload. All little-endian; what is reserved is zero, and a reader insists on it, so
that no bit of the file can change unseen. This module knows bytes, neither files nor plans.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np

__all__ = [
    "ALARM",
    "ALIGNMENT",
    "AUDITED",
    "BLOCK_BYTES",
    "DECIDED",
    "DIVERGED",
    "GRADIENT",
    "INCOMPLETE",
    "MARK_OFFSET",
    "MEASURED",
    "RECORD_HEADER_BYTES",
    "SEGMENT_HEADER_BYTES",
    "SEGMENT_VERSION",
    "RecordHeader",
    "block_checksums",
    "pack_mark",
    "pack_segment_header",
    "record_bytes",
    "table_bytes",
    "unpack_mark",
    "unpack_segment_header",
]

SEGMENT_MAGIC = b"\x89FCGLOG\n"
RECORD_MAGIC = b"\x89FCITER\n"
SEGMENT_VERSION = 1

#: Records, and the payload in a record, begin on such a boundary.
ALIGNMENT = 64
#: Payload bytes under one checksum: few enough for CRC32C to be strong, many enough for the table to be small.
BLOCK_BYTES = 1 << 20

GRADIENT = 1
INCOMPLETE = 2
#: The iterations' own records; the others are notes before the one of the same iteration.
DECIDED = (GRADIENT, INCOMPLETE)
#: What the audit of an iteration's record found of the state before it: that of every rank; of all but some; of none.
AUDITED, ALARM, DIVERGED = 3, 4, 5
#: How far a state that is not called bit exact had moved away from the trainer's, found at a new base.
MEASURED = 6

# magic, version, header bytes, segment number, creation time in ns since the epoch, block bytes, reserved
_SEGMENT = struct.Struct("<8sIIQQI24x")
_SEGMENT_CHECKSUM_OFFSET = _SEGMENT.size
_IDENTITY_OFFSET = _SEGMENT_CHECKSUM_OFFSET + 4
_IDENTITY_BYTES = 128
MARK_OFFSET = _IDENTITY_OFFSET + _IDENTITY_BYTES
# end of the last committed record (offset in the segment), committed records in the segment
_MARK = struct.Struct("<QQ")
MARK_BYTES = _MARK.size + 4
SEGMENT_HEADER_BYTES = 256

# magic, kind, reserved, attempt, iteration, revision, payload bytes, time in ns since the epoch, reserved
_RECORD = struct.Struct("<8sB3xIQIQQ12x")
# CRC32C of the table, CRC32C of the header before it
_RECORD_CHECKSUMS = struct.Struct("<II")
RECORD_HEADER_BYTES = _RECORD.size + _RECORD_CHECKSUMS.size


def crc32c(content: bytes | np.ndarray, start: int = 0) -> int:
    """Return the CRC32C of bytes, or of a contiguous uint8 array, going on from an earlier one."""
    return google_crc32c.extend(start, content)


def pack_segment_header(number: int, identity: bytes, created_ns: int) -> bytes:
    """Return the header of a new segment, its mark on the first byte after it."""
    fixed = _SEGMENT.pack(SEGMENT_MAGIC, SEGMENT_VERSION, SEGMENT_HEADER_BYTES, number, created_ns, BLOCK_BYTES)
    header = fixed + struct.pack("<I", crc32c(fixed + identity)) + identity + pack_mark(SEGMENT_HEADER_BYTES, 0)
    return header.ljust(SEGMENT_HEADER_BYTES, b"\0")


def unpack_segment_header(header: bytes) -> tuple[int, bytes]:
    """Return a segment's number and identity; ValueError says what is wrong with the header (its mark aside)."""
    if len(header) < SEGMENT_HEADER_BYTES:
        raise ValueError(f"{len(header)} bytes long, a segment header has {SEGMENT_HEADER_BYTES}")
    magic, version, header_bytes, number, _, block_bytes = _SEGMENT.unpack_from(header)
    if magic != SEGMENT_MAGIC:
        raise ValueError("not a segment of a gradient log")
    if version != SEGMENT_VERSION:
        raise ValueError(f"version {version} of the gradient log; this release reads {SEGMENT_VERSION}")
    identity = header[_IDENTITY_OFFSET:MARK_OFFSET]
    (checksum,) = struct.unpack_from("<I", header, _SEGMENT_CHECKSUM_OFFSET)
    if crc32c(header[:_SEGMENT_CHECKSUM_OFFSET] + identity) != checksum:
        raise ValueError("checksum of the segment header is wrong")
    if header_bytes != SEGMENT_HEADER_BYTES or block_bytes != BLOCK_BYTES:
        raise ValueError(f"header of {header_bytes} and blocks of {block_bytes} bytes are not known to this release")
    if any(header[_SEGMENT.size - 24 : _SEGMENT.size]) or any(header[MARK_OFFSET + MARK_BYTES : SEGMENT_HEADER_BYTES]):
        raise ValueError("reserved bytes of the segment header are not zero")
    return number, identity


def pack_mark(committed_end: int, records: int) -> bytes:
    """Return the mark: up to where the segment is committed, and how many records that are."""
    mark = _MARK.pack(committed_end, records)
    return mark + struct.pack("<I", crc32c(mark))


def unpack_mark(mark: bytes) -> tuple[int, int]:
    """Return the committed end and the number of committed records; ValueError if the checksum is wrong."""
    if len(mark) != MARK_BYTES or crc32c(mark[: _MARK.size]) != struct.unpack_from("<I", mark, _MARK.size)[0]:
        raise ValueError("checksum of the segment's mark is wrong")
    return _MARK.unpack_from(mark)


@dataclass(frozen=True)
class RecordHeader:
    """One record's header: what the record is, and what its payload must be."""

    kind: int
    attempt: int
    iteration: int
    revision: int  # index into the plan's revisions
    payload_bytes: int
    time_ns: int
    checksum: int  # CRC32C of the table of block checksums, so of the payload

    def pack(self) -> bytes:
        """Return the header's 64 bytes."""
        fixed = _RECORD.pack(
            RECORD_MAGIC, self.kind, self.attempt, self.iteration, self.revision, self.payload_bytes, self.time_ns
        ) + struct.pack("<I", self.checksum)
        return fixed + struct.pack("<I", crc32c(fixed))

    @classmethod
    def unpack(cls, header: bytes) -> RecordHeader:
        """Return the header in 64 bytes; ValueError says what is wrong with it."""
        checksum, own = _RECORD_CHECKSUMS.unpack_from(header, _RECORD.size)
        if crc32c(header[: RECORD_HEADER_BYTES - 4]) != own:
            raise ValueError("checksum of the record header is wrong")
        magic, kind, attempt, iteration, revision, payload_bytes, time_ns = _RECORD.unpack_from(header)
        if magic != RECORD_MAGIC or kind not in (*DECIDED, AUDITED, ALARM, DIVERGED, MEASURED):
            raise ValueError(f"record of unknown kind {kind}")
        return cls(kind, attempt, iteration, revision, payload_bytes, time_ns, checksum)


def table_bytes(payload_bytes: int) -> int:
    """Return the room of a record's table of checksums, filled up with zeros to the alignment."""
    blocks = -(-payload_bytes // BLOCK_BYTES)
    return -(-blocks * 4 // ALIGNMENT) * ALIGNMENT


def record_bytes(payload_bytes: int) -> int:
    """Return the room of a whole record: header, table, payload, and zeros up to the alignment."""
    return RECORD_HEADER_BYTES + table_bytes(payload_bytes) + -(-payload_bytes // ALIGNMENT) * ALIGNMENT


def _blocks(parts: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Cut parts, taken as one run of bytes, into blocks; a block is the pieces that make it up."""
    block: list[np.ndarray] = []
    room = BLOCK_BYTES
    for part in parts:
        while part.size:
            piece, part = part[:room], part[room:]
            block.append(piece)
            room -= piece.size
            if not room:
                yield block
                block, room = [], BLOCK_BYTES
    if block:
        yield block


def block_checksums(parts: Iterable[np.ndarray]) -> tuple[bytes, int]:
    """Return the table of a payload given as contiguous uint8 arrays, and the checksum of the table."""
    checksums = []
    for block in _blocks(parts):
        checksum = 0
        for piece in block:
            checksum = crc32c(piece, checksum)
        checksums.append(checksum)
    table = struct.pack(f"<{len(checksums)}I", *checksums)
    table = table.ljust(-(-len(table) // ALIGNMENT) * ALIGNMENT, b"\0")
    return table, crc32c(table)
