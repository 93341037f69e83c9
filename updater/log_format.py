# SPDX-License-Identifier: MIT
"""The bytes of the gradient log; docs/checkpoints.md draws them and a test compares the two.

A segment is a header and records one after another, each begun on 64 bytes. A record is a header, a table with one row
per MiB of payload, and the payload, each block of it packed or as it is. All little-endian; what is reserved is zero, and
a reader insists on it, so that no bit of the file can change unseen. This module knows bytes, neither files nor plans.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
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
    "MARK_OFFSETS",
    "MEASURED",
    "PACKED",
    "PLAIN",
    "RECORD_HEADER_BYTES",
    "SEGMENT_HEADER_BYTES",
    "SEGMENT_VERSION",
    "SOURCES",
    "VOLATILE",
    "RecordHeader",
    "SegmentHeader",
    "aligned",
    "blocks",
    "checksum_of",
    "crc32c",
    "joined",
    "pack_mark",
    "pack_segment_header",
    "pack_table",
    "table_bytes",
    "unpack_marks",
    "unpack_segment_header",
    "unpack_table",
]

SEGMENT_MAGIC = b"\x89FCGLOG\n"
RECORD_MAGIC = b"\x89FCITER\n"
SEGMENT_VERSION = 2

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
#: Iterations that were stepped while the disk took nothing.
VOLATILE = 7
#: Over how many edges the bytes of an iteration came.
SOURCES = 8
_KINDS = (*DECIDED, AUDITED, ALARM, DIVERGED, MEASURED, VOLATILE, SOURCES)

#: How a payload is stored: as it is, or its blocks packed one by one (`updater.compression`).
PLAIN, PACKED = 0, 1

# magic, version, header bytes, segment number, creation time in ns since the epoch, block bytes, reserved
_SEGMENT = struct.Struct("<8sIIQQI24x")
_SEGMENT_CHECKSUM_OFFSET = _SEGMENT.size
_IDENTITY_OFFSET = _SEGMENT_CHECKSUM_OFFSET + 4
_IDENTITY_BYTES = 128
# end of the last committed record (offset in the segment), committed records in the segment
_MARK = struct.Struct("<QQ")
MARK_BYTES = _MARK.size + 4
#: Where the two marks lie: they are written in turn, so that a write that is torn leaves the other.
MARK_OFFSETS = (_IDENTITY_OFFSET + _IDENTITY_BYTES, _IDENTITY_OFFSET + _IDENTITY_BYTES + MARK_BYTES)
_MARKS_END = MARK_OFFSETS[-1] + MARK_BYTES
SEGMENT_HEADER_BYTES = 256

# magic, kind, encoding, reserved, attempt, iteration, revision, payload bytes, time in ns since the epoch, stored bytes, reserved
_RECORD = struct.Struct("<8sBB2xIQIQQQ4x")
# CRC32C of the table, CRC32C of the header before it
_RECORD_CHECKSUMS = struct.Struct("<II")
RECORD_HEADER_BYTES = _RECORD.size + _RECORD_CHECKSUMS.size
#: Columns of a table: CRC32C of each block; where blocks are packed also the bytes it takes in the file, and their CRC32C.
_COLUMNS = {PLAIN: 1, PACKED: 3}


def crc32c(content: bytes | np.ndarray, start: int = 0) -> int:
    """Return the CRC32C of bytes, or of a contiguous uint8 array, going on from an earlier one."""
    return google_crc32c.extend(start, content)


def pack_segment_header(number: int, identity: bytes, created_ns: int) -> bytes:
    """Return the header of a new segment, its mark on the first byte after it."""
    fixed = _SEGMENT.pack(SEGMENT_MAGIC, SEGMENT_VERSION, SEGMENT_HEADER_BYTES, number, created_ns, BLOCK_BYTES)
    header = fixed + struct.pack("<I", crc32c(fixed + identity)) + identity + 2 * pack_mark(SEGMENT_HEADER_BYTES, 0)
    return header.ljust(SEGMENT_HEADER_BYTES, b"\0")


@dataclass(frozen=True)
class SegmentHeader:
    """What the header of a segment says, its mark aside."""

    version: int
    number: int
    identity: bytes


def unpack_segment_header(header: bytes) -> SegmentHeader:
    """Return a segment's header; ValueError says what is wrong with it."""
    if len(header) < SEGMENT_HEADER_BYTES:
        raise ValueError(f"{len(header)} bytes long, a segment header has {SEGMENT_HEADER_BYTES}")
    magic, version, header_bytes, number, _, block_bytes = _SEGMENT.unpack_from(header)
    if magic != SEGMENT_MAGIC:
        raise ValueError("not a segment of a gradient log")
    if not 1 <= version <= SEGMENT_VERSION:
        raise ValueError(f"version {version} of the gradient log; this release reads 1 to {SEGMENT_VERSION}")
    identity = header[_IDENTITY_OFFSET : MARK_OFFSETS[0]]
    (checksum,) = struct.unpack_from("<I", header, _SEGMENT_CHECKSUM_OFFSET)
    if crc32c(header[:_SEGMENT_CHECKSUM_OFFSET] + identity) != checksum:
        raise ValueError("checksum of the segment header is wrong")
    if header_bytes != SEGMENT_HEADER_BYTES or block_bytes != BLOCK_BYTES:
        raise ValueError(f"header of {header_bytes} and blocks of {block_bytes} bytes are not known to this release")
    if any(header[_SEGMENT.size - 24 : _SEGMENT.size]) or any(
        header[_MARKS_END if version > 1 else MARK_OFFSETS[1] : SEGMENT_HEADER_BYTES]
    ):
        raise ValueError("reserved bytes of the segment header are not zero")
    return SegmentHeader(version, number, identity)


def pack_mark(committed_end: int, records: int) -> bytes:
    """Return the mark: up to where the segment is committed, and how many records that are."""
    mark = _MARK.pack(committed_end, records)
    return mark + struct.pack("<I", crc32c(mark))


def unpack_marks(header: bytes, version: int) -> tuple[int, int]:
    """Return the committed end and the number of committed records by the later of a segment's marks (version 1 has one).

    ValueError if the checksum of neither is right.
    """
    found = []
    for offset in MARK_OFFSETS if version > 1 else MARK_OFFSETS[:1]:
        mark = header[offset : offset + MARK_BYTES]
        if len(mark) == MARK_BYTES and crc32c(mark[: _MARK.size]) == struct.unpack_from("<I", mark, _MARK.size)[0]:
            found.append(_MARK.unpack_from(mark))
    if not found:
        raise ValueError("checksum of the segment's mark is wrong")
    return max(found)


@dataclass(frozen=True)
class RecordHeader:
    """One record's header: what the record is, and what its payload must be."""

    kind: int
    attempt: int
    iteration: int
    revision: int  # index into the plan's revisions
    payload_bytes: int
    time_ns: int
    checksum: int  # CRC32C of the table, so of the payload
    encoding: int = PLAIN
    stored_bytes: int | None = None  # that the payload takes in the file; as many as it has, unless it is packed

    @property
    def room(self) -> int:
        """Bytes of the payload in the file."""
        return self.payload_bytes if self.stored_bytes is None else self.stored_bytes

    @property
    def record_bytes(self) -> int:
        """Room of the whole record: header, table, payload, and zeros up to the alignment."""
        return RECORD_HEADER_BYTES + table_bytes(self.payload_bytes, self.encoding) + aligned(self.room)

    def pack(self) -> bytes:
        """Return the header's 64 bytes."""
        fixed = _RECORD.pack(
            RECORD_MAGIC, self.kind, self.encoding, self.attempt, self.iteration, self.revision, self.payload_bytes, self.time_ns,
            self.room,
        ) + struct.pack("<I", self.checksum)  # fmt: skip
        return fixed + struct.pack("<I", crc32c(fixed))

    @classmethod
    def unpack(cls, header: bytes, version: int = SEGMENT_VERSION) -> RecordHeader:
        """Return the header in 64 bytes of a segment of that version; ValueError says what is wrong with it."""
        checksum, own = _RECORD_CHECKSUMS.unpack_from(header, _RECORD.size)
        if crc32c(header[: RECORD_HEADER_BYTES - 4]) != own:
            raise ValueError("checksum of the record header is wrong")
        magic, kind, encoding, attempt, iteration, revision, payload_bytes, time_ns, stored = _RECORD.unpack_from(
            header
        )
        if magic != RECORD_MAGIC or kind not in _KINDS:
            raise ValueError(f"record of unknown kind {kind}")
        if version == 1:  # it had zeros there
            stored = stored or payload_bytes
        if encoding not in _COLUMNS or stored > payload_bytes or (encoding == PLAIN and stored != payload_bytes):
            raise ValueError(f"record of {payload_bytes} bytes in encoding {encoding} that takes {stored}")
        return cls(kind, attempt, iteration, revision, payload_bytes, time_ns, checksum, encoding, stored)


def aligned(size: int) -> int:
    """Return a size, filled up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def table_bytes(payload_bytes: int, encoding: int = PLAIN) -> int:
    """Return the room of a record's table, filled up with zeros to the alignment."""
    return aligned(-(-payload_bytes // BLOCK_BYTES) * 4 * _COLUMNS[encoding])


def blocks(parts: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
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


def joined(block: list[np.ndarray]) -> np.ndarray:
    """Return a block given by its pieces as one array; a copy if there are several."""
    return block[0] if len(block) == 1 else np.concatenate(block)


def checksum_of(block: Iterable[np.ndarray]) -> int:
    """Return the CRC32C of a block given by its pieces."""
    checksum = 0
    for piece in block:
        checksum = crc32c(piece, checksum)
    return checksum


def pack_table(rows: Sequence[int] | Sequence[tuple[int, int, int]], encoding: int = PLAIN) -> bytes:
    """Return a table: per block its CRC32C or, packed, (CRC32C, bytes in the file, their CRC32C)."""
    flat = rows if encoding == PLAIN else [value for row in rows for value in row]
    table = struct.pack(f"<{len(flat)}I", *flat)
    return table.ljust(aligned(len(table)), b"\0")


def unpack_table(table: bytes, payload_bytes: int, encoding: int) -> list[tuple[int, int, int]]:
    """Return (CRC32C, bytes in the file, their CRC32C) per block; ValueError if it cannot be this payload's.

    Of what is stored plain both checksums are the same.
    """
    count = -(-payload_bytes // BLOCK_BYTES)
    if len(table) != table_bytes(payload_bytes, encoding) or any(table[4 * count * _COLUMNS[encoding] :]):
        raise ValueError("the table of checksums is not this record's")
    sizes = [min(BLOCK_BYTES, payload_bytes - BLOCK_BYTES * i) for i in range(count)]
    if encoding == PLAIN:
        return [(crc, size, crc) for crc, size in zip(struct.unpack_from(f"<{count}I", table), sizes, strict=True)]
    rows = list(struct.iter_unpack("<III", table[: 12 * count]))
    if any(not 0 < row[1] <= size for row, size in zip(rows, sizes, strict=True)):
        raise ValueError("a block takes more bytes than it has")
    return rows
