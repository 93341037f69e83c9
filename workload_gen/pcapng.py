# SPDX-License-Identifier: MIT
"""Writes pcapng files of Ethernet frames (draft-ietf-opsawg-pcapng), a whole block at a time.

Each block leaves in one unbuffered write: a writer that is killed leaves a file that ends with a whole block, but for
the one block that the kernel may have been in the middle of; `trim` takes that away.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

__all__ = ["PcapngWriter", "trim"]

_ETHERNET = 1
_NANOSECONDS = struct.pack("<HHB3x", 9, 1, 9) + struct.pack("<HH", 0, 0)  # if_tsresol = 10^-9, end of options


def _block(kind: int, body: bytes) -> bytes:
    length = 12 + len(body)
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


class PcapngWriter:
    """One file of one interface; `write` frames, then `close`. Mode 0600; replaces a file of that name."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        section = _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
        os.write(self._fd, section + _block(1, struct.pack("<HHI", _ETHERNET, 0, 0) + _NANOSECONDS))

    def write(self, frame: bytes, timestamp_ns: int) -> None:
        """Append a frame."""
        head = struct.pack("<IIIII", 0, timestamp_ns >> 32, timestamp_ns & 0xFFFFFFFF, len(frame), len(frame))
        os.write(self._fd, _block(6, head + frame + bytes(-len(frame) % 4)))

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def trim(path: Path) -> None:
    """Cut what follows the last whole block of a little-endian pcapng file."""
    with open(path, "r+b") as file:
        end, size = 0, file.seek(0, os.SEEK_END)
        while end + 12 <= size:
            file.seek(end)
            length = struct.unpack("<4xI", file.read(8))[0]
            if length < 12 or end + length > size:
                break
            end += length
        file.truncate(end)
