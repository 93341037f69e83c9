# SPDX-License-Identifier: MIT
"""Builds RoCEv2 frames: Ethernet, IPv4 or IPv6, UDP, BTH, RETH, immediate, AETH, payload, ICRC.

Header layouts: IBTA specification volume 1, chapter 9, and its annex A17 (RoCEv2). The ICRC is checked by every reader
of these frames that we know of, so it is computed here by zlib from the definition, not by the parser's code.
"""

from __future__ import annotations

import ipaddress
import struct
import zlib
from dataclasses import dataclass

__all__ = ["Path", "ack", "frame", "source_port"]

WRITE_FIRST, WRITE_MIDDLE, WRITE_LAST, WRITE_LAST_IMMEDIATE, WRITE_ONLY, WRITE_ONLY_IMMEDIATE = 6, 7, 8, 9, 10, 11
ACKNOWLEDGE = 17
_PORT = 4791
_TTL = 64


@dataclass(frozen=True)
class Path:
    """From where to where a frame goes: MAC addresses (6 bytes), IP addresses as text, VLAN number or None."""

    source_mac: bytes
    destination_mac: bytes
    source: str
    destination: str
    vlan: int | None = None


def source_port(one: int, other: int) -> int:
    """Return the UDP source port of both directions between two queue pairs, as the mlx5 driver picks it."""
    value = one * other
    value ^= value >> 20
    value ^= value >> 40
    label = value & 0xFFFFF
    return (label & 0x3FFF) ^ (label >> 14) | 0xC000


def frame(
    path: Path, opcode: int, queue_pair: int, peer: int, psn: int, extended: bytes = b"", payload: bytes = b""
) -> bytes:
    """Return a frame to a queue pair from its `peer`; `extended` are the transport headers that follow the BTH.

    `psn` counts modulo 2^24.
    """
    pad = -len(payload) % 4
    bth = struct.pack(">BBHII", opcode, pad << 4, 0xFFFF, queue_pair, psn & 0xFFFFFF)
    body = bth + extended + payload + bytes(pad)
    udp = struct.pack(">HHHH", source_port(queue_pair, peer), _PORT, 8 + len(body) + 4, 0)
    source, destination = ipaddress.ip_address(path.source), ipaddress.ip_address(path.destination)
    if source.version == 6:
        ip = struct.pack(">IHBB", 6 << 28, 8 + len(body) + 4, 17, _TTL) + source.packed + destination.packed
        masked = b"\x6f\xff\xff\xff" + ip[4:7] + b"\xff" + ip[8:]
    else:
        ip = (
            struct.pack(">BBHHHBBH", 0x45, 0, 20 + 8 + len(body) + 4, 0, 0x4000, _TTL, 17, 0)
            + source.packed
            + destination.packed
        )
        total = sum(struct.unpack(">10H", ip))
        total = (total & 0xFFFF) + (total >> 16)
        ip = ip[:10] + struct.pack(">H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + ip[12:]
        masked = ip[:1] + b"\xff" + ip[2:8] + b"\xff" + ip[9:10] + b"\xff\xff" + ip[12:]
    # Fields that a switch may change count as ones: type of service, hops, checksums, the BTH's congestion bits.
    covered = b"\xff" * 8 + masked + udp[:6] + b"\xff\xff" + body[:4] + b"\xff" + body[5:]
    tag = b"" if path.vlan is None else struct.pack(">HH", 0x8100, path.vlan)
    ethernet = path.destination_mac + path.source_mac + tag + (b"\x86\xdd" if source.version == 6 else b"\x08\x00")
    return ethernet + ip + udp + body + struct.pack("<I", zlib.crc32(covered))


def ack(path: Path, queue_pair: int, peer: int, psn: int, message_number: int) -> bytes:
    """Return a positive acknowledgement with unlimited credits."""
    return frame(path, ACKNOWLEDGE, queue_pair, peer, psn, struct.pack(">I", 0x1F << 24 | message_number & 0xFFFFFF))
