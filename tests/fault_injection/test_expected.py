# SPDX-License-Identifier: MIT
"""What the campaign knows without the stages: the kinds, the truth of frames, the interval; and that chance is the seed's alone."""

import random
import re
import struct
import zlib
from pathlib import Path

import pytest

from fault_injection.case import Case, Shown
from fault_injection.expected import expect, must_be_whole
from fault_injection.frames import Header, mended, read_capture, write_capture
from fault_injection.jobs import Iteration, Job, record_job
from fault_injection.kinds import load
from fault_injection.loss import interval, loss_at, row
from fault_injection.moved import Shift

ACKNOWLEDGEMENT = 17
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_the_page_lists_the_kinds_there_are():
    kinds = PAGE.read_text().partition("## Faults")[2]
    listed = [name for row in re.findall(r"^\| (`.*?) \|", kinds, re.M) for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(listed) == sorted(load())
    assert len(listed) >= 25


def test_an_unspoilt_case_must_be_whole(job):
    case = Case.of(job, random.Random(1))
    expected = expect(case)
    assert expected.highest == job.iterations and not expected.hit and not expected.lied
    assert all(must_be_whole(case, expected, number) for number in range(1, job.iterations + 1))


def test_a_unit_that_no_stream_shows_is_missing(job):
    case = Case.of(job, random.Random(1))
    link = job.links[0]
    victim = next(
        i for i, units in enumerate(link.units) if units is not None and link.iteration[i] == 3 and not link.record[i]
    )
    lost = set(link.units[victim].tolist())
    for name, shown in case.streams.items():
        case.streams[name] = [
            one
            for one in shown
            if job.links[one.link].iteration[one.index] != 3
            or job.links[one.link].units[one.index] is None
            or lost.isdisjoint(job.links[one.link].units[one.index].tolist())
        ]
    expected = expect(case)
    assert not must_be_whole(case, expected, 3) and must_be_whole(case, expected, 4)
    assert lost <= {unit for unit, shown in enumerate(expected.delivered[3]) if not shown}


@pytest.mark.slow
def test_behind_a_pause_of_many_messages_nothing_follows_from_the_first_credit(tmp_path):
    job = Job(record_job("simple-4-hook", tmp_path, 12, 1))
    case = Case.of(job, random.Random(1))
    name, (number,) = next(iter(job.streams.items()))
    shown, link = case.streams[name], job.links[number]
    cut, reduced = case.begin(name, 4), [i for i, one in enumerate(shown) if link.units[one.index] is not None]
    begin = next(i for i in reduced if i >= case.begin(name, 9)) - 2  # that message's credit, and its acknowledgement
    case.streams = {name: shown[:cut] + shown[begin:]}
    messages = {}
    for one in shown[begin:]:
        if link.iteration[one.index] == 9 and link.units[one.index] is not None:
            messages.setdefault(link.message[one.index], []).append(link.units[one.index])
    first, second = list(messages.values())[:2]
    usable = expect(case).usable[9]
    assert not any(usable[units].any() for units in first)
    assert all(usable[units].all() for units in second)


def test_ranges_are_flat_bytes_of_buckets_that_end_within_a_unit():
    import numpy as np

    shape = Iteration([(0, 20), (3, 16)], None, (0, 0), 5)
    assert shape.flat_ranges(np.array([0, 0, 1, 1, 0], bool)) == [(16, 28)]
    assert shape.flat_ranges(np.array([1, 0, 1, 0, 1], bool)) == [(0, 8), (16, 20), (28, 36)]
    assert shape.flat_ranges(np.zeros(5, bool)) == []


@pytest.mark.parametrize("name", ["drop", "reorder", "payload-mended", "foreign-job"])
def test_a_case_is_its_seed_kind_and_number(job, name):
    def frames(number):
        case = Case.of(job, random.Random(f"5/{name}/{number}"))
        load()[name].spoil(case)
        return [one.frame for shown in case.streams.values() for one in shown]

    assert frames(3) == frames(3)
    assert frames(3) != frames(4)


def test_a_mended_frame_is_what_the_recorder_would_have_sent(job):
    link = job.links[0]
    for frame, header in zip(link.frames[:50], link.headers, strict=False):
        assert mended(frame[:-4] + b"\0\0\0\0", header) == frame
        assert Header.of(frame) == header
    # The same by the definition, byte by byte: ones where a switch may write.
    frame = link.frames[2]
    assert frame[12:14] == b"\x86\xdd"
    masked = bytearray(frame[14:-4])
    masked[0] |= 0x0F
    masked[1:4], masked[7], masked[46:48], masked[52] = b"\xff" * 3, 0xFF, b"\xff\xff", 0xFF
    assert struct.pack("<I", zlib.crc32(b"\xff" * 8 + masked)) == frame[-4:]


def test_frames_moved_on_by_an_iteration_are_numbered_as_the_next_ones(job):
    for number, link in job.links.items():
        own = {i: [at for at, n in enumerate(link.iteration) if n == i] for i in (4, 5)}
        shift = Shift(job, number, *link.carried(own[4]))
        begin, following = (own[i][0] - 1 for i in (4, 5))  # the first message's credit is right before it
        for at in range(begin, own[4][-1] + 1):
            header, other = link.headers[at], link.headers[following + at - begin]
            if header.opcode == ACKNOWLEDGEMENT:
                continue
            moved = shift.of(Shown(link.frames[at], 0, number, at))
            expected = link.frames[following + at - begin]
            assert Header.of(moved) == other and mended(moved, header) == moved
            if link.flow[at] is None:
                assert moved[header.payload : -4] == expected[header.payload : -4]
                continue
            assert moved[header.bth : header.payload] == expected[header.bth : header.payload]
            flags = [frame[header.payload + 120 : -4] for frame in (moved, expected)]
            assert [flags[0][i : i + 8] for i in range(0, len(flags[0]), 128)] == [
                flags[1][i : i + 8] for i in range(0, len(flags[1]), 128)
            ]


def test_captures_are_written_as_they_are_read(job, tmp_path):
    from scapy.utils import RawPcapReader

    link = job.links[0]
    write_capture(tmp_path / "a.pcap", ((f, len(f), t) for f, t in zip(link.frames, link.ns, strict=True)))
    with RawPcapReader(str(tmp_path / "a.pcap")) as reader:
        assert [frame for frame, _ in reader] == link.frames
    assert read_capture(job.folder / "link-0.pcapng")[0] == link.frames


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (50, 1000, 0.0373, 0.0654)],
)
def test_the_interval_is_that_of_the_tables(successes, trials, low, high):
    # Clopper and Pearson (1934); values as in common tables of exact binomial limits.
    assert interval(successes, trials) == pytest.approx((low, high), abs=5e-4)


def test_the_loss_of_a_point_is_where_the_formula_has_its_share():
    def formula(plan, loss):
        return 1 - (1 - loss) ** plan

    assert formula(40, loss_at(40, 0.15, formula)) == pytest.approx(0.15, rel=0.01)
    assert row(2, 0.004, 1000, 148, 0.15)["inside"] and not row(2, 0.004, 1000, 100, 0.15)["inside"]
