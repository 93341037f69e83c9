# SPDX-License-Identifier: MIT
"""A plain reader of the real captures, for tests: IPv6, UDP 4791, no options; shares nothing with FlowCheck."""

import struct
from pathlib import Path
from typing import NamedTuple


class Packet(NamedTuple):
    src: str
    dst: str
    opcode: int
    qp: int
    psn: int
    reth: tuple[int, int, int] | None
    payload: bytes


def frames(path: Path) -> list[bytes]:
    """Return the frames of a little-endian pcapng file."""
    data, offset, out = Path(path).read_bytes(), 0, []
    while offset < len(data):
        kind, length = struct.unpack_from("<II", data, offset)
        if kind == 6:
            captured = struct.unpack_from("<I", data, offset + 20)[0]
            out.append(data[offset + 28 : offset + 28 + captured])
        offset += length
    return out


def packets(path: Path) -> list[Packet]:
    """Return the reliable-connection packets of a capture, in order."""
    out = []
    for frame in frames(path):
        if frame[12:14] != b"\x86\xdd" or frame[20] != 17 or frame[56:58] != struct.pack(">H", 4791):
            continue
        end = 54 + struct.unpack(">H", frame[18:20])[0]
        bth = frame[62:74]
        opcode, pad, at = bth[0], bth[1] >> 4 & 3, 74
        reth = None
        if opcode in (6, 10, 11):
            reth, at = struct.unpack(">QII", frame[at : at + 16]), at + 16
        if opcode in (9, 11):
            at += 4
        if opcode not in (6, 7, 8, 9, 10, 11):
            continue
        src, dst = frame[22:38].hex()[-4:], frame[38:54].hex()[-4:]
        out.append(
            Packet(
                src,
                dst,
                opcode,
                int.from_bytes(bth[5:8], "big"),
                int.from_bytes(bth[9:12], "big"),
                reth,
                frame[at : end - 4 - pad],
            )
        )
    return out


def messages(path: Path, src: str, dst: str, qp: int) -> list[bytes]:
    """Return the whole messages of one flow, in order; the captures have no retransmissions."""
    out, parts = [], []
    for packet in packets(path):
        if (packet.src, packet.dst, packet.qp) != (src, dst, qp):
            continue
        parts.append(packet.payload)
        if packet.opcode in (8, 9, 10, 11):
            out.append(b"".join(parts))
            parts = []
    return out


def ll_data(message: bytes) -> bytes:
    """Return the data words of an LL message."""
    return b"".join(message[i : i + 4] + message[i + 8 : i + 12] for i in range(0, len(message), 16))
