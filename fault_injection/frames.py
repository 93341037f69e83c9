# SPDX-License-Identifier: MIT
"""Frames as bytes: reading and writing capture files, finding header fields, changing them, mending the ICRC.

Written from the header layouts (IBTA specification volume 1, chapter 9, annex A17), without the parser that is under test.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Header", "changed", "icrc", "mended", "read_capture", "write_capture"]

WRITE_FIRST, WRITE_MIDDLE, WRITE_LAST, WRITE_LAST_IMMEDIATE, WRITE_ONLY, WRITE_ONLY_IMMEDIATE = 6, 7, 8, 9, 10, 11
_RETH = {WRITE_FIRST, WRITE_ONLY, WRITE_ONLY_IMMEDIATE}
_IMMEDIATE = {WRITE_LAST_IMMEDIATE, WRITE_ONLY_IMMEDIATE}
_PCAP_NANOSECONDS = 0xA1B23C4D


@dataclass(frozen=True)
class Header:
    """Where the parts of a RoCEv2 frame begin, and what the BTH says; offsets in bytes from the frame's begin."""

    ip: int
    version: int
    bth: int
    opcode: int
    queue_pair: int
    psn: int
    payload: int
    end: int

    @classmethod
    def of(cls, frame: bytes) -> Header:
        """Decode a frame that the recorder wrote."""
        ip = 18 if frame[12:14] == b"\x81\x00" else 14
        version = frame[ip] >> 4
        bth = ip + (40 if version == 6 else 20) + 8
        opcode = frame[bth]
        payload = bth + 12
        if opcode in _RETH:
            payload += 16
        if opcode in _IMMEDIATE:
            payload += 4
        if opcode == 17:
            payload += 4
        queue_pair, psn = struct.unpack_from(">I", frame, bth + 4)[0], struct.unpack_from(">I", frame, bth + 8)[0]
        return cls(ip, version, bth, opcode, queue_pair & 0xFFFFFF, psn & 0xFFFFFF, payload, len(frame) - 4)

    @property
    def reth(self) -> int | None:
        """Where address, key and length begin."""
        return self.bth + 12 if self.opcode in _RETH else None

    @property
    def immediate(self) -> int | None:
        """Where the immediate is."""
        return self.payload - 4 if self.opcode in _IMMEDIATE else None

    @property
    def payload_bytes(self) -> int:
        """Bytes of payload; the recorder's need no padding."""
        return self.end - self.payload


def icrc(frame: bytes | bytearray, header: Header) -> bytes:
    """Return the invariant CRC of a frame that ends with one: what a switch may change counts as ones."""
    ip, bth = header.ip, header.bth
    head = bytearray(frame[ip : bth + 12])
    at = bth - ip
    if header.version == 6:
        head[0], head[1:4], head[7] = head[0] | 0x0F, b"\xff\xff\xff", 0xFF
    else:
        head[1], head[8], head[10:12] = 0xFF, 0xFF, b"\xff\xff"
    head[at - 2 : at] = b"\xff\xff"
    head[at + 4] = 0xFF
    return struct.pack("<I", zlib.crc32(frame[bth + 12 : -4], zlib.crc32(head, zlib.crc32(b"\xff" * 8))))


def mended(frame: bytes | bytearray, header: Header) -> bytes:
    """Return a frame with the ICRC that fits."""
    return bytes(frame[:-4]) + icrc(frame, header)


def changed(frame: bytes, header: Header, at: int, field: bytes) -> bytes:
    """Return a frame with bytes put in place at an offset, and its ICRC mended."""
    return mended(frame[:at] + field + frame[at + len(field) :], header)


def read_capture(path: Path) -> tuple[list[bytes], list[int]]:
    """Return the frames and time stamps of a pcapng file that the recorder wrote (one interface, nanoseconds)."""
    data, at = path.read_bytes(), 0
    frames, ns = [], []
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        if kind == 6:
            high, low, size = struct.unpack_from("<III", data, at + 12)
            frames.append(data[at + 28 : at + 28 + size])
            ns.append(high << 32 | low)
        at += length
    return frames, ns


def write_capture(path: Path, frames: Iterable[tuple[bytes, int, int]]) -> None:
    """Write a pcap file of (frame, its length on the wire, time stamp in ns)."""
    parts = [struct.pack("<IHHiIII", _PCAP_NANOSECONDS, 2, 4, 0, 0, 65535, 1)]
    for frame, length, ns in frames:
        parts.append(struct.pack("<IIII", ns // 10**9, ns % 10**9, len(frame), length))
        parts.append(frame)
    path.write_bytes(b"".join(parts))
