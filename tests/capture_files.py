# SPDX-License-Identifier: MIT
"""Capture files as their specifications draw them, in every byte order and time unit. Shares nothing with the readers."""

import struct

__all__ = ["SECONDS", "block", "pcap", "pcapng"]

#: Of the first frame's time stamp; each frame is received a second, and a unit, after the one before.
SECONDS = 1_700_000_000


def pcap(frames, *, order="<", nanoseconds=False, snap=262144, link=1, version=(2, 4)):
    """Return a classic pcap file; `frames` are bytes, of which each record holds the first `snap`."""
    magic = 0xA1B23C4D if nanoseconds else 0xA1B2C3D4
    out = [struct.pack(f"{order}IHHiIII", magic, *version, 0, 0, snap, link)]
    for number, frame in enumerate(frames):
        stored = frame[:snap]
        out.append(struct.pack(f"{order}IIII", SECONDS + number, number, len(stored), len(frame)) + stored)
    return b"".join(out)


def block(kind, body, order="<"):
    """Return a pcapng block."""
    body += bytes(-len(body) % 4)
    length = struct.pack(f"{order}I", 12 + len(body))
    return struct.pack(f"{order}I", kind) + length + body + length


def _option(order, code, value):
    return struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)


def pcapng(frames, *, order="<", power=6, snap=0, link=1, options=(), between=b"", interfaces=1, simple=False, minor=0):
    """Return a pcapng file of one section; time stamps count units of 10^-power seconds."""
    resolution = [] if power == 6 else [(9, bytes([power]))]
    described = b"".join(_option(order, code, value) for code, value in [*resolution, *options])
    if described:
        described += _option(order, 0, b"")
    out = [block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, minor, -1), order)]
    out += [block(1, struct.pack(f"{order}HHI", link, 0, snap) + described, order)] * interfaces
    for number, frame in enumerate(frames):
        time = (SECONDS + number) * 10**power + number
        stored = frame[: snap or len(frame)]
        if simple:
            out.append(block(3, struct.pack(f"{order}I", len(frame)) + stored, order))
        else:
            head = struct.pack(f"{order}IIIII", 0, time >> 32, time & 0xFFFFFFFF, len(stored), len(frame))
            out.append(block(6, head + stored, order))
        out.append(between)
    return b"".join(out)
