# SPDX-License-Identifier: MIT
"""Packets inside of a message are judged by what the header before them meant: as if each had been decoded.

Frames with an extension header behind their IP header are always decoded, so the same stream with one in every frame says
what the annotations must be, and the published state.
"""

import random
import struct
import zlib

import numpy as np
import pytest

from flowcheck.formats import RECORD
from packet_parser.parser import Parser
from tests.packet_parser.rings import FilledRing, run
from tests.rings import MTU, RingJob

HEADERS = slice(14, 54)  # IPv6, behind Ethernet
PADDING = bytes([17, 0, 1, 4, 0, 0, 0, 0])  # destination options that say nothing, UDP next (RFC 8200, 4.6)
WRITE_MIDDLE = 7


def icrc(frame, bth):
    """Return what a frame's invariant checksum must be; its BTH begins at `bth`."""
    masked = bytearray(b"\xff" * 8 + frame[14:-4])
    masked[8] |= 0x0F
    masked[9:12], masked[15] = b"\xff" * 3, 0xFF
    at = bth - 14 + 8
    masked[at - 2 : at] = b"\xff\xff"
    masked[at + 4] = 0xFF
    return struct.pack("<I", zlib.crc32(masked))


def lengthened(frame):
    """Return a frame with an extension header; its checksum is as right or wrong as it was."""
    ip = bytearray(frame[HEADERS])
    ip[4:6] = struct.pack(">H", struct.unpack(">H", ip[4:6])[0] + len(PADDING))
    ip[6] = 60
    longer = frame[:14] + bytes(ip) + PADDING + frame[54:]
    right, was = icrc(longer, 14 + 40 + 16), icrc(frame, 14 + 40 + 8)
    return longer[:-4] + bytes(a ^ b ^ c for a, b, c in zip(right, was, frame[-4:], strict=True))


def changed(frame, rng):
    """Return a frame with a byte changed behind its IP header, its checksum mended or not."""
    at = rng.choice([rng.randrange(62, 74), rng.randrange(74, 90), rng.randrange(62, len(frame) - 4)])
    frame = bytearray(frame)
    frame[min(at, len(frame) - 5)] ^= 1 << rng.randrange(8)
    if rng.random() < 0.7:
        frame[-4:] = icrc(bytes(frame), 62)
    return bytes(frame)


def disturbed(frames, rng):
    out = []
    for frame in frames:
        kind = rng.random()
        if kind < 0.02:
            continue
        out.append(changed(frame, rng) if kind < 0.06 else frame)
        if kind > 0.97 and len(out) > 20:
            out.append(out[-rng.randrange(1, 20)])
    for at in range(len(out) - 1):
        if rng.random() < 0.02:
            out[at], out[at + 1] = out[at + 1], out[at]
    return out


def parsed(path, plan, frames, times):
    filled = FilledRing(
        path, "s", records=1 << (len(frames) - 1).bit_length(), frame_bytes=MTU + 256, identity=plan.identity()
    )
    filled.add(frames)
    ring = filled.ring
    records = np.ndarray((len(frames),), RECORD, ring.memory, ring.header_bytes, (ring.record_bytes,))
    records["timestamp_ns"] = times
    parser = Parser(ring, plan, "s")
    run(parser)
    header = np.frombuffer(ring.memory, np.uint8, ring.header_bytes)
    return filled.annotations(), parser.counters(), header.copy()


@pytest.mark.parametrize("protocol", ["simple", "ll", "ll128"])
@pytest.mark.parametrize("seed", range(3))
def test_packets_inside_of_a_message_are_judged_as_all_others(tmp_path, protocol, seed):
    rng = random.Random(f"{protocol} {seed}")
    job = RingJob(
        tmp_path, (0, 1), ranks=2, iterations=4, elements=rng.choice([9001, 30000]), protocol=protocol, seed=seed
    )
    plan = job.plan({"s": (0, 1)})
    some = [iter(job.frames[link]) for link in (0, 1)]
    frames = [frame for pair in zip(*some, strict=True) for frame in pair]
    frames = disturbed(frames, rng) if seed else frames
    steps = np.array([10**10 if rng.random() < 0.002 else rng.randrange(1, 10**4) for _ in frames], np.int64)
    times = 10**18 + np.cumsum(steps)
    short, counters, header = parsed(tmp_path / "short", plan, frames, times)
    long, expected, longer_header = parsed(tmp_path / "long", plan, [lengthened(frame) for frame in frames], times)

    assert counters == expected
    decided = {"verdict", "payload_offset"}
    for name in set(RECORD.names) - decided - {"frame_length", "stored_length"}:
        assert (short[name] == long[name]).all(), name
    assert (short["verdict"] == long["verdict"]).all()
    shift = np.where(long["payload_offset"] > 0, len(PADDING), 0)
    assert (short["payload_offset"] + shift == long["payload_offset"]).all()
    state = slice(512, None)  # behind identity and cursors: the stages' states
    assert (header[state] == longer_header[state]).all()

    inside = np.array([frame[62] == WRITE_MIDDLE for frame in frames])
    placed = (short["verdict"] == 1) | (short["verdict"] == 3)
    assert (inside & placed).sum() > len(frames) / 5
    if seed:
        assert (inside & ~placed).any() and (short["verdict"] == 10).any()
