# SPDX-License-Identifier: MIT
"""Inputs to begin from, made by our own builders each time; of real captures only where FLOWCHECK_CAPTURES names some.

Nothing of a capture is kept: what grows out of one stays in build/.
"""

from __future__ import annotations

import importlib
import itertools
import os
import struct
from pathlib import Path

from fuzz.compiled import COMPILED

__all__ = ["of"]


def of(name: str) -> list[bytes]:
    """Return the seeds of a target."""
    if name not in COMPILED:
        return importlib.import_module(f"fuzz.targets.{name}").seeds()
    return {
        "decode": _frames,
        "capture": _captures,
        "kernels": _lines,
        "parser": _packets,
        "extractor": _records,
        "inspect": _flows,
        "collect": _flows,
    }[name]()


def _frames() -> list[bytes]:
    from tests.packet_parser.frames import OPCODES, frame

    out = []
    for opcode, (_, headers, payload) in OPCODES.items():
        for version, vlans in ((4, ()), (6, ()), (6, (5,)), (4, (7, 8))):
            middle = b"".join(bytes(header()) for header in headers)
            out.append(frame(opcode, 0x453, 7, middle, bytes(64) if payload else b"", version=version, vlans=vlans))
    return out + _from_captures()


def _pcap(frames: list[bytes], order: str = "<", magic: int = 0xA1B2C3D4) -> bytes:
    """Return a pcap file: magic, 2.4, no zone, longest frame, Ethernet; then time, length and length of each."""
    head = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, 1)
    return head + b"".join(struct.pack(f"{order}IIII", 1, 2, len(frame), len(frame)) + frame for frame in frames)


def _pcapng(frames: list[bytes]) -> bytes:
    """Return a pcapng file: section header, one Ethernet interface, a block per frame."""

    def block(kind: int, body: bytes) -> bytes:
        body += bytes(-len(body) % 4)
        length = struct.pack("<I", len(body) + 12)
        return struct.pack("<I", kind) + length + body + length

    out = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)) + block(1, struct.pack("<HHI", 1, 0, 65535))
    return out + b"".join(block(6, struct.pack("<IIIII", 0, 0, 5, len(f), len(f)) + f) for f in frames)


def _captures() -> list[bytes]:
    some = _frames()[:8]
    others = [_pcap(some[:2], ">"), _pcap(some[:2], magic=0xA1B23C4D)]
    return [_pcap([]), _pcap(some[:2]), *others, _pcapng([]), _pcapng(some[2:4]), _pcapng(some)[:700]]


def _from_captures(most: int = 200) -> list[bytes]:
    folder = os.environ.get("FLOWCHECK_CAPTURES")
    if not folder:
        return []
    from flowcheck.capture import frames

    out: list[bytes] = []
    for path in sorted(Path(folder).glob("*.pcap*")):
        out += [frame for frame in itertools.islice(frames(path), most) if len(frame) <= COMPILED["decode"].longest]
    return out


def _lines() -> list[bytes]:
    line = struct.pack("<IIII", 1, 7, 2, 7)
    line128 = bytes(range(120)) + struct.pack("<Q", 7)
    flag = struct.pack("<Q", 7)
    return [
        flag + b"\1" + bytes(7) + 9 * line,
        flag + b"\3" + bytes(7) + 33 * line,
        flag + b"\7\5\1\1" + bytes(4) + 17 * line,
        flag + bytes(8) + 3 * line128,
        flag + b"\2" + bytes(3) + struct.pack("<I", 5 << 8) + 9 * line128,
        flag + b"\x0a" + bytes(3) + struct.pack("<I", 40 << 8 | 20) + 16 * line128,
        flag + b"\6\2\1\4" + bytes(4) + 4 * line128,
        flag + b"\x2a\2\x0d\4" + bytes(4) + 17 * line128,
        flag + b"\x38" + bytes(3) + struct.pack("<I", 3) + bytes(range(200)),
    ]


def _packets() -> list[bytes]:
    """Return commands of the parser's target: packets of each flow in order, with credits, losses and repeats."""
    out = []
    for flow in range(14):
        out.append(b"\0" + bytes([0, flow, 0]) * 12)
        out.append(b"\x20" + bytes([0, flow, 3]) * 8)
        out.append(b"\2" + bytes([2, flow, 5]) + bytes([0, flow, 0]) * 6 + b"\3")
        out.append(b"\1" + bytes([64, flow, 0x80, 0x0F, 0xFF, 0xFF, 0xF8, 3]) + bytes([0, flow, 0]) * 6)
    return out


def _records() -> list[bytes]:
    """Return commands of the extractor's target: whole payloads of each encoding, repeats, and settled iterations."""

    def record(flags: int, encoding: int, iteration: int, destination: int, length: int, lag: int = 0) -> bytes:
        return bytes([flags, 0, encoding, 0, iteration, lag, 1, 0]) + struct.pack(
            "<HHHIIH", 74, length, 0xFFF, destination, 0, 512
        )

    out = [b"\0" + record(3, encoding, 1, 64, 256) * 2 for encoding in range(3)]
    out += [b"\0" + b"".join(record(3, encoding, i, 128 * i, 384, 1) for i in range(8)) for encoding in range(3)]
    out += [b"\1" + record(3, 0, 1, 0, 256) + record(35 | 4, 0, 1, 128, 256) + record(67, 0, 4, 0, 64, 1)]
    return [*out, bytes([64, 1, 1, 1, 200, 0, 1]) + bytes(8) + b"\1" + record(3, 0, 1, 0, 256)]


def _flows() -> list[bytes]:
    """Return frames as `_make_frame` reads them: messages of each encoding, holes, repeats, other opcodes."""
    first, middle, last, only = 6, 7, 9, 11
    out = []
    for kind in range(4):
        flags = kind << 3
        out.append(
            bytes([flags, first, 1, 64, 5, 7]) + bytes([flags, middle, 1, 64, 7]) * 3 + bytes([flags, last, 1, 32, 7])
        )
        out.append(bytes([flags, only, 1, 64, 5, 7, flags, only, 5, 64, 5, 7, flags, only, 0xFC, 64, 5, 7]))
    out += [bytes([0, opcode, 1, 16, 1]) * 3 for opcode in range(24)]
    return [*out, bytes([32, 10, 255, 255, 254, 8, 1]) + bytes([0, 10, 1, 8, 1]) * 4]
