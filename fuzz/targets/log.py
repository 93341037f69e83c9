# SPDX-License-Identifier: MIT
"""Input: edits on a segment of the gradient log. It is read, and recovered, or a CheckpointError says what is wrong.

An edit is 4 bytes: where (2), how and whether the checksums over it are mended (1), with what (1). With checksums mended the
fields themselves are what is wrong; without, every change is found.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from functools import cache
from pathlib import Path

import google_crc32c
import numpy as np

from flowcheck.errors import CheckpointError
from updater.log import LogWriter, recover
from updater.log_reader import Segment, read_facts

__all__ = ["one", "seeds"]

_IDENTITY = bytes(range(128))
_GRADIENT_BYTES = 3000
#: What docs/checkpoints.md draws: lengths, and where checksums lie. Segment header: of what is before byte 64, at 64.
_HEADER, _RECORD, _MARKS = 256, 64, (196, 216)


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-log-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def _gradient(iteration: int) -> np.ndarray:
    return np.resize(np.arange(iteration, iteration + 13, dtype=np.uint8), _GRADIENT_BYTES)


@cache
def _segment() -> bytes:
    """Return a segment of four records: two gradients, one packed, an incomplete iteration, and a note."""
    from updater import compression

    with tempfile.TemporaryDirectory() as name:
        writer = LogWriter(Path(name), _IDENTITY, 0)
        writer.append(1, 1, 1, 0, [_gradient(1)])
        block = _gradient(2)
        packed = compression.compress(block, 4)
        writer.append(1, 1, 2, 0, [block], packed=[(google_crc32c.value(block.tobytes()), packed)])
        writer.note(2, 1, 3, 0, {"reason": "missing", "missing": [[0, 8]]})
        writer.commit()
        writer.note(7, 1, 4, 0, {"from": 4, "to": 6})
        writer.commit()
        writer.close()
        return (Path(name) / "000001.fclog").read_bytes()


def _records(content: bytes) -> list[int]:
    """Return where records begin, as far as their magic says."""
    return [at for at in range(_HEADER, len(content) - _RECORD, 64) if content[at : at + 7] == b"\x89FCITER"]


def _mend(content: bytearray) -> None:
    """Make right what checksums there are over headers, marks, tables and plain blocks."""

    def seal(at: int, *pieces: bytes) -> None:
        struct.pack_into("<I", content, at, google_crc32c.value(b"".join(map(bytes, pieces))))

    if len(content) < _HEADER:
        return
    seal(64, content[:64], content[68:196])
    for at in _MARKS:
        seal(at + 16, content[at : at + 16])
    for at in _records(bytes(content)):
        size, encoding = struct.unpack_from("<Q", content, at + 28)[0], content[at + 9]
        stored = struct.unpack_from("<Q", content, at + 44)[0]
        room = -(-(-(-size >> 20) * (-4 if encoding == 0 else -12)) // 64) * 64
        room = abs(room)
        if room > len(content) or stored > len(content):
            seal(at + 60, content[at : at + 60])
            continue
        begin = at + _RECORD + room
        if encoding == 0 and size <= 1 << 20:
            seal(at + _RECORD, content[begin : begin + size])
        seal(at + 56, content[at + _RECORD : begin])
        seal(at + 60, content[at : at + 60])


def one(data: bytes) -> None:
    """Read, and then recover, the segment that an input makes."""
    content = bytearray(_segment())
    changed = False
    for at in range(0, len(data) - 3, 4):
        high, low, how, value = data[at : at + 4]
        place = (high << 8 | low) % len(content)
        if how & 7 < 4:
            changed |= value != 0
            content[place] ^= value
        elif how & 7 == 4:
            del content[max(place, 1) :]
            changed = True
        elif how & 7 == 5:  # a whole field
            content[place : place + 8] = struct.pack("<Q", (1 << (value & 63)) - (value >> 7))[: len(content) - place]
        else:
            content += bytes([value]) * 64
        if how & 8:
            _mend(content)
        if len(content) > 1 << 16:
            return
    path = _folder() / "000001.fclog"
    path.write_bytes(content)
    try:
        _read(path, bytes(content))
        if data[-1:] > b"\x7f":
            recover(_folder(), [_IDENTITY], 0)
            _read(path, path.read_bytes())
    except CheckpointError as error:
        if "\n" in str(error):
            raise AssertionError("an error is one line") from error


def _read(path: Path, content: bytes) -> None:
    with Segment(path, [_IDENTITY]) as segment:
        for entry in (*segment.entries(), *segment.uncommitted()):
            if entry.end > len(content):
                raise AssertionError("a record ends behind its file")
            if entry.header.payload_bytes > 1 << 22:
                continue  # a plan says how much is expected: what is another size is refused before it is read
            payload = np.empty(entry.header.payload_bytes, np.uint8)
            segment.payload(entry, [payload])
            if entry.header.kind != 1:
                facts = read_facts(entry, [_IDENTITY])
                json.dumps(facts)


def seeds() -> list[bytes]:
    """Return inputs to begin from."""
    return [
        b"",
        b"\0\0\0\0\xff",
        b"\1\0\x0c\0",
        b"\1\x1c\x0d\x41",
        b"\1\x08\x08\1",
        b"\5\0\x04\0\xff",
        b"\0\0\x06\0\x80",
    ]
