# SPDX-License-Identifier: MIT
"""Capture files are read to their end before anything is done with them."""

import struct

import pytest

from flowcheck.capture import validate
from flowcheck.errors import CaptureError
from tests import builders


def pcap(frames, *, snap=65535, link=1, magic=0xA1B2C3D4):
    out = [struct.pack("<IHHiIII", magic, 2, 4, 0, 0, snap, link)]
    for number, frame in enumerate(frames):
        out.append(struct.pack("<IIII", 1000 + number, number, min(snap, len(frame)), len(frame)) + frame[:snap])
    return b"".join(out)


FRAMES = [builders.roce(7, 77, n, payload=bytes(64 * n)) for n in range(1, 20)]


def test_counts(tmp_path):
    path = tmp_path / "a.pcap"
    path.write_bytes(pcap(FRAMES, snap=500))
    ends = [bytes.fromhex("fe80" + "0" * 27 + n) for n in "12"]
    found = validate(path, [(ends[0], ends[1], 77), (ends[1], ends[0], 77)])
    assert found.frames == len(FRAMES) and found.longest == 500
    assert found.cut == sum(len(f) > 500 for f in FRAMES)
    assert found.matched == sum(len(f) <= 500 for f in FRAMES)
    assert found.bytes == sum(min(500, len(f)) for f in FRAMES)
    assert validate(path, [(ends[0], ends[1], 78)]).matched == 0


def test_cut_at_any_byte_it_is_refused_or_ends_with_a_whole_frame(tmp_path):
    data = pcap(FRAMES[:3])
    whole = {24}
    for frame in FRAMES[:3]:
        whole.add(max(whole) + 16 + len(frame))
    path = tmp_path / "cut.pcap"
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        if length in whole:
            assert validate(path).frames == sorted(whole).index(length)
        else:
            with pytest.raises(CaptureError, match=r"cut\.pcap"):
                validate(path)


def test_strangers_are_refused(tmp_path):
    path = tmp_path / "x.pcap"
    for content in (pcap(FRAMES, magic=0x12345678), b"\0" * 100, pcap([], link=113), pcap([], link=147)):
        path.write_bytes(content)
        with pytest.raises(CaptureError):
            validate(path)
    with pytest.raises(CaptureError, match="No such file"):
        validate(tmp_path / "none")
    with pytest.raises(CaptureError):
        validate(tmp_path)


def test_a_record_length_that_lies_is_refused(tmp_path):
    data = bytearray(pcap(FRAMES))
    data[24 + 8 : 24 + 12] = struct.pack("<I", 2**31)
    path = tmp_path / "lies.pcap"
    path.write_bytes(data)
    with pytest.raises(CaptureError):
        validate(path)
