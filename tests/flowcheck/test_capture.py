# SPDX-License-Identifier: MIT
"""Capture files are read to their end before anything is done with them, and both readers find the same in them."""

import os
import struct

import pytest
from flowcheck._capture import scan, scan_plain
from flowcheck._guarded_file import GuardedFile

from flowcheck.capture import plain, validate
from flowcheck.errors import CaptureError
from tests import builders
from tests.capture_files import block, pcap, pcapng

FRAMES = [builders.roce(7, 77, n, payload=bytes(64 * n)) for n in range(1, 20)]
ENDS = [bytes.fromhex("fe80" + "0" * 27 + n) for n in "12"]
#: One flow that is in FRAMES, either way round, and one that is not.
FLOWS = [(ENDS[0], ENDS[1], 77), (ENDS[1], ENDS[0], 77), (ENDS[0], ENDS[1], 78)]
STATISTICS = block(5, bytes(12)) + block(0x40000BAD, b"somebody's own")

PLAIN = {
    **{
        f"pcap {order} {unit}": pcap(FRAMES, order=order, nanoseconds=unit == "ns")
        for order in "<>"
        for unit in ("us", "ns")
    },
    "pcap snap": pcap(FRAMES, snap=500),
    "pcap zero": pcap([b"", FRAMES[0], b"", b""]),
    "pcap none": pcap([]),
    "pcapng us": pcapng(FRAMES),
    "pcapng ns": pcapng(FRAMES, power=9),
    "pcapng options": pcapng(FRAMES, power=9, options=[(2, b"mon0"), (12, b"an operating system")]),
    "pcapng snap": pcapng(FRAMES, snap=500),
    "pcapng zero": pcapng([b"", FRAMES[0], b""]),
    "pcapng between": pcapng(FRAMES, between=STATISTICS),
    "pcapng none": pcapng([]),
}
ODD = {
    "pcap 2.3": pcap(FRAMES, version=(2, 3)),
    "pcap longer than it says": pcap(FRAMES, snap=500)[:16] + struct.pack("<I", 400) + pcap(FRAMES, snap=500)[20:],
    "pcapng >": pcapng(FRAMES, order=">"),
    "pcapng two interfaces": pcapng(FRAMES, interfaces=2),
    "pcapng two sections": pcapng(FRAMES) + pcapng(FRAMES),
    "pcapng offset": pcapng(FRAMES, options=[(14, struct.pack("<q", 3600))]),
    "pcapng ms": pcapng(FRAMES, power=3),
    "pcapng simple": pcapng(FRAMES, simple=True),
}


def write(path, content):
    path.write_bytes(content)
    return path


def by_libpcap(path, flows=()):
    error, link, *counts = scan(os.fsencode(path), list(flows))
    return None if error or link else counts


def values(summary):
    return [summary.frames, summary.bytes, summary.cut, summary.longest, summary.matched]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_are_read_where_they_lie_and_hold_what_libpcap_finds(tmp_path, name):
    path = write(tmp_path / "a", PLAIN[name])
    file, summary = plain(path, FLOWS)
    file.close()
    assert values(summary) == by_libpcap(path, FLOWS) == values(validate(path, FLOWS))


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_to_libpcap(tmp_path, name):
    path = write(tmp_path / "a", ODD[name])
    assert plain(path) is None
    assert validate(path).frames == by_libpcap(path)[0] >= len(FRAMES)


def test_counts(tmp_path):
    path = write(tmp_path / "a.pcap", PLAIN["pcap snap"])
    found = validate(path, FLOWS)
    assert found.frames == len(FRAMES) and found.longest == 500
    assert found.cut == sum(len(f) > 500 for f in FRAMES)
    assert found.matched == sum(len(f) <= 500 for f in FRAMES)
    assert found.bytes == sum(min(500, len(f)) for f in FRAMES)
    assert validate(path, FLOWS[2:]).matched == 0


@pytest.mark.parametrize(("make", "begin", "around"), [(pcap, 24, 16), (pcapng, 48, 32)])
def test_cut_at_any_byte_it_is_refused_or_ends_with_a_whole_frame(tmp_path, make, begin, around):
    data = make(FRAMES[:3])
    whole = {begin}
    for frame in FRAMES[:3]:
        whole.add(max(whole) + around + len(frame) + (-len(frame) % 4 if make is pcapng else 0))
    assert max(whole) == len(data)
    path = tmp_path / "cut.pcap"
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        if length in whole:
            assert validate(path).frames == sorted(whole).index(length)
        else:
            assert plain(path) is None
            with pytest.raises(CaptureError, match=r"cut\.pcap"):
                validate(path)


def test_strangers_are_refused(tmp_path):
    path = tmp_path / "x.pcap"
    stranger = b"\x78\x56\x34\x12" + pcap(FRAMES)[4:]
    for content in (stranger, b"\0" * 100, pcap([], link=113), pcap([], link=147), pcapng(FRAMES, link=113)):
        path.write_bytes(content)
        with pytest.raises(CaptureError):
            validate(path)
    with pytest.raises(CaptureError, match="No such file"):
        validate(tmp_path / "none")
    with pytest.raises(CaptureError):
        validate(tmp_path)


@pytest.mark.parametrize(("make", "at"), [(pcap, 24 + 8), (pcapng, 48 + 4), (pcapng, 48 + 20)])
@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 2**32 - 4, 262145, 2**24 + 4])
def test_a_record_length_that_lies_is_refused(tmp_path, make, at, length):
    data = bytearray(make(FRAMES))
    data[at : at + 4] = struct.pack("<I", length)
    path = write(tmp_path / "lies.pcap", data)
    assert plain(path) is None
    with pytest.raises(CaptureError):
        validate(path)


def test_a_file_that_is_cut_while_it_is_mapped_is_noticed(tmp_path):
    path = write(tmp_path / "a.pcap", pcap([bytes(4000)] * 100))
    others = write(tmp_path / "b.pcap", pcap([bytes(4000)] * 100))
    file, other = GuardedFile(os.fsencode(path)), GuardedFile(os.fsencode(others))
    assert scan_plain(file, [])[0] == 100 and not file.cut
    os.truncate(path, 50_000)
    scan_plain(file, [])  # and does not end the process
    assert file.cut
    assert scan_plain(other, [])[0] == 100 and not other.cut
    file.close()
    other.close()
    assert plain(path) is None


def test_guards_are_given_back(tmp_path):
    path = write(tmp_path / "a.pcap", pcap(FRAMES))
    for _ in range(1000):
        file, _ = plain(path)
        file.close()
    held = [GuardedFile(os.fsencode(path)) for _ in range(100)]
    assert not any(file.cut for file in held)
