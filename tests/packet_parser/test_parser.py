# SPDX-License-Identifier: MIT
"""The parser over rings filled by hand, against what was really sent."""

import random
import struct
import threading
import time

import numpy as np
import pytest
from packet_parser._parser import RingParser

from flowcheck.errors import RingFormatError
from flowcheck.formats import RING_HEADER
from flowcheck.verdicts import VERDICTS
from tests.packet_parser import streams
from tests.packet_parser.frames import DETH, RETH, bth, ethernet, fast_frame, frame, ip_layers, with_icrc
from tests.packet_parser.rings import FilledRing, run
from tests.packet_parser.streams import (
    DATA_QP,
    ITERATION,
    MTU,
    SPLIT_ITERATION,
    START,
    acknowledgement,
    credit,
    program,
    send,
)

HOSTS = (streams.SOURCE, streams.DESTINATION)
UNSYNCHRONISED, FOREIGN, BAD_ICRC, MALFORMED, CONTROL = 11, 8, 10, 9, 7
PLACE = ("verdict", "iteration", "destination", "flag", "wire_offset", "message_bytes", "settled_lag", "payload_length")


def parser_of(ring, tables, **options):
    return RingParser(ring, [tables], HOSTS, MTU, 10**9, **options)


@pytest.fixture
def parse(tmp_path):
    def parse(frames, tables=None, **options):
        filled = FilledRing(tmp_path / f"ring{len(list(tmp_path.iterdir()))}", frame_bytes=512, records=16384)
        filled.add(frames)
        parser = parser_of(filled.ring, tables or program(), **options)
        run(parser)
        counters = parser.counters()
        parser.close()
        assert sum(counters["verdicts"].values()) == counters["parsed"] == len(frames)
        return filled.annotations(), counters

    return parse


def verdicts(annotations):
    return [int(v) for v in annotations["verdict"]]


def place_of(record):
    return tuple(int(record[name]) for name in PLACE)


def truth_of(sent):
    return (
        sent.verdict,
        sent.iteration,
        sent.destination,
        sent.flag,
        sent.wire_offset,
        sent.message_bytes,
        sent.lag,
        sent.payload,
    )


def slow_model(arrived):
    """Yield for each packet whether its place is proved: from the first that proves it by itself on, all are.

    A write per packet proves its place by following, as the very next packet, one that ended a message.
    """
    synchronised, before = False, None
    for sent in arrived:
        follows = (
            before is not None and before.ends and before.number + 1 == sent.number and sent.begins and sent.payload
        )
        synchronised = synchronised or sent.proof or bool(follows)
        yield synchronised
        before = sent


def compare(annotations, arrived):
    for record, sent, proved in zip(annotations, arrived, slow_model(arrived), strict=True):
        if proved:
            assert place_of(record) == truth_of(sent), sent.number
            assert (int(record["connection"]), int(record["encoding"])) == (3, 2 if sent.payload else 0)
            at = int(record["payload_offset"])
            assert len(sent.frame) - 4 == at + int(record["payload_length"])
        else:
            assert int(record["verdict"]) == UNSYNCHRONISED, sent.number
            assert int(record["settled_lag"]) == 0


@pytest.mark.parametrize("first_psn", [0, 1, 0xFFFFFF, 0xFFFFF0, 0x800000])
def test_every_packet_gets_its_place(parse, first_psn):
    sent = send(iterations=5, first_psn=first_psn)
    annotations, counters = parse([s.frame for s in sent])
    compare(annotations, sent)
    assert sum(counters["unsynchronised"].values()) == 0


def disturbed(sent, rng):
    """Return the packets after loss, duplication, reordering and go-back-N, in an order that a mirror could show."""
    loss, repeat, swap = (rng.choice([0, 0.02, 0.3]) for _ in range(3))
    out, at = [], 0
    while at < len(sent):
        if rng.random() >= loss:
            out.append(sent[at])
            if rng.random() < repeat:
                out.append(sent[rng.randrange(max(0, at - 40), at + 1)])
        if rng.random() < repeat / 10:
            at = max(0, at - rng.randrange(12))  # go back N
        at += 1
    for at in range(len(out) - 1):
        if rng.random() < swap:
            other = min(len(out) - 1, at + rng.randrange(1, 6))
            out[at], out[other] = out[other], out[at]
    return out


@pytest.mark.parametrize("seed", range(12))
def test_loss_duplicates_reorder_and_wrap_agree_with_the_slow_model(parse, seed):
    rng = random.Random(seed)
    form = rng.choice([{}, {"iteration": SPLIT_ITERATION}, {"iteration": SPLIT_ITERATION, "each_reth": True}])
    start = rng.choice([START, []])
    sent = send(start=start, iterations=20, first_psn=(1 << 24) - rng.randrange(400), **form)
    arrived = disturbed(sent, rng)
    annotations, _ = parse([s.frame for s in arrived], program(start, form.get("iteration", ITERATION)))
    compare(annotations, arrived)


def test_writes_of_their_own_address_are_placed_by_it_after_a_contradiction(parse):
    sent = send(iteration=SPLIT_ITERATION, iterations=4, each_reth=True)
    lost = next(i for i, s in enumerate(sent) if s.iteration == 3)
    frames = [s.frame for s in sent]
    frames[lost] = with_flag(sent[lost + 1], 12345, sent[lost].number)
    annotations, counters = parse(frames, program(iteration=SPLIT_ITERATION))
    assert counters["unsynchronised"]["flag"] == 1 or counters["unsynchronised"]["opcode"] == 1
    for record, packet in list(zip(annotations, sent, strict=True))[lost + 1 :]:
        assert place_of(record) == truth_of(packet)


def test_a_flow_joined_late_counts_its_iterations_by_the_flag(parse):
    sent = send(iterations=3, skip=1000, first_psn=77)
    annotations, _ = parse([s.frame for s in sent])
    compare(annotations, sent)
    assert annotations["iteration"].max() == 1003


def test_silence_of_more_than_a_whole_wrap_is_noticed_and_healed(parse):
    period = sum(m.packets for m in ITERATION)
    early = send(iterations=2, first_psn=5)
    for skipped in (10**6, (1 << 24) // period + 1, 5 * (1 << 24)):
        late = send(iterations=2, first_psn=5, skip=skipped)
        annotations, counters = parse([s.frame for s in early + late])
        compare(annotations[: len(early)], early)
        proved = 0
        for record, sent in zip(annotations[len(early) :], late, strict=True):
            if record["verdict"] != UNSYNCHRONISED:
                assert place_of(record) == truth_of(sent)
                proved += 1
        assert proved > len(late) // 2
        assert counters["verdicts"]["unsynchronised"] > 0


def with_flag(sent, flag, number=None):
    """Return a MIDDLE packet in place of another, with another flag."""
    number = sent.number if number is None else number
    return fast_frame(7, DATA_QP, number, b"", streams.lines(flag, MTU, 1))


def rebuilt(sent, **changes):
    """Return a FIRST packet of the same place with something else in it."""
    values = {"opcode": 6, "va": streams.BASE, "length": 3008, "flag": sent.flag, "size": MTU} | changes
    headers = bytes(RETH(va=values["va"], rkey=7, dma_length=values["length"]))
    return fast_frame(values["opcode"], DATA_QP, sent.number, headers, streams.lines(values["flag"], values["size"], 1))


def test_every_contradiction_is_named_and_nothing_is_placed_until_proof_returns(parse):
    sent = send(iterations=9)
    target = next(
        i for i, s in enumerate(sent) if s.iteration == 4 and s.begins and s.payload == MTU
    )  # 1,500 bytes: FIRST
    first = sent[target]
    address = streams.BASE + (first.flag - 1) % 8 * 65536
    right = {"va": address, "length": 3008}
    last = next(s for s in sent[target:] if s.ends)
    wrong_imm = fast_frame(9, DATA_QP, last.number, b"\0\0\0\1", streams.lines(last.flag, last.payload, 1))
    cases = {
        "address": (target, rebuilt(first, **right | {"va": address + 65536})),
        "length": (target, rebuilt(first, **right | {"length": 3024})),
        "flag": (target, rebuilt(first, **right | {"flag": first.flag + 1})),
        "opcode": (target, fast_frame(7, DATA_QP, first.number, b"", streams.lines(first.flag, MTU, 1))),
        "immediate": (sent.index(last), wrong_imm),
        "position": (
            target,
            fast_frame(7, DATA_QP, (first.number - (1 << 20)) & 0xFFFFFF, b"", streams.lines(1, MTU, 1)),
        ),
    }
    for reason, (at, changed) in cases.items():
        frames = [s.frame for s in sent]
        frames[at] = changed
        annotations, counters = parse(frames)
        named = {k: v for k, v in counters["unsynchronised"].items() if v}
        assert named.pop(reason) == 1, reason
        assert set(named) <= {"unproved"}, reason
        assert int(annotations[at]["verdict"]) == UNSYNCHRONISED
        compare(annotations[:at], sent[:at])
        back = next(i for i in range(at + 1, len(sent)) if sent[i].proof)
        assert all(v == UNSYNCHRONISED for v in verdicts(annotations)[at:back]), reason
        for record, packet in zip(annotations[back:], sent[back:], strict=True):
            assert place_of(record) == truth_of(packet), reason


def test_right_copies_of_those_packets_are_accepted(parse):
    sent = send(iterations=9)
    at = next(i for i, s in enumerate(sent) if s.iteration == 4 and s.begins and s.payload == MTU)
    frames = [s.frame for s in sent]
    frames[at] = rebuilt(sent[at], va=streams.BASE + (sent[at].flag - 1) % 8 * 65536)
    annotations, _ = parse(frames)
    compare(annotations, sent)


def test_middle_packets_and_empty_messages_prove_nothing(parse):
    sent = send(iterations=2)
    silent = [s for s in sent if not s.proof]
    annotations, counters = parse([s.frame for s in silent])
    assert set(verdicts(annotations)) == {UNSYNCHRONISED}
    assert counters["unsynchronised"]["unproved"] == len(silent)


def test_a_flag_of_no_message_proves_nothing(parse):
    """Of another length than the layout's, or in one flag word only."""
    sent = send(iterations=1)
    first = next(s for s in sent if s.iteration == 1)
    lines = bytearray(streams.lines(first.flag, MTU, 1))
    lines[12] ^= 1
    headers = bytes(RETH(va=streams.BASE, rkey=7, dma_length=3008))
    annotations, _ = parse(
        [
            rebuilt(first, length=3024),
            fast_frame(6, DATA_QP, first.number, headers, bytes(lines)),
            rebuilt(first, flag=2**31),
        ]
    )
    assert verdicts(annotations) == [UNSYNCHRONISED] * 3


def test_a_credit_of_another_rank_refuses_the_connection(parse):
    sent = send(iterations=2)
    frames = [s.frame for s in sent]
    half = len(frames) // 2
    annotations, counters = parse([credit(1), *frames[:half], credit(0, 2), *frames[half:], credit(1, 3)])
    assert verdicts(annotations)[0] == verdicts(annotations)[half + 1] == verdicts(annotations)[-1] == CONTROL
    compare(annotations[1 : half + 1], sent[:half])
    assert set(verdicts(annotations)[half + 2 : -1]) == {UNSYNCHRONISED}
    assert counters["refused"] == [3]
    assert counters["unsynchronised"]["credit_tag"] == len(frames) - half


def test_traffic_that_is_not_data_is_told_apart(parse):
    send_only = frame(4, 0x999, 1, payload=b"abcd")
    icrc_less = bytearray(frame(170, 0xBBBBBB, 1, payload=bytes(98)))
    icrc_less[-1] ^= 1
    others = [
        (acknowledgement(DATA_QP, 5, reverse=False), CONTROL),
        (acknowledgement(streams.CREDIT_QP, 5, reverse=True), CONTROL),
        (credit(1), CONTROL),
        (fast_frame(129, DATA_QP, 0, bytes(16)), CONTROL),
        (fast_frame(129, 0x777, 0, bytes(16)), CONTROL),
        (frame(100, 1, 0, bytes(DETH(source_qp=1)), b"probe!!!"), CONTROL),
        (bytes(icrc_less), CONTROL),
        (fast_frame(10, 0x777, 1, bytes(RETH(dma_length=8)), bytes(8)), FOREIGN),
        (fast_frame(10, DATA_QP, 1, bytes(RETH(dma_length=8)), bytes(8), reverse=True), FOREIGN),
        (send_only, FOREIGN),
        (frame(100, 1, 0, bytes(DETH(source_qp=1)), b"probe!!!", version=4), FOREIGN),
        (ethernet(6, bytes(ip_layers(6)).replace(b"\x12\xb7", b"\0\x35")), FOREIGN),
        (bytes(60), FOREIGN),
        (send_only[:-1], MALFORMED),
        (b"\0", MALFORMED),
        (ethernet(6, with_icrc(ip_layers(6), bth(8, DATA_QP, 6))), MALFORMED),
    ]
    annotations, counters = parse([data for data, _ in others])
    assert [VERDICTS[v] for v in verdicts(annotations)] == [VERDICTS[v] for _, v in others]
    assert {k: v for k, v in counters["malformed"].items() if v} == {"cut": 2, "payload": 1}
    assert all(int(r["payload_length"]) == 0 or int(r["connection"]) == 3 for r in annotations)


def test_a_wrong_icrc_changes_nothing(parse):
    sent = send(iterations=3)
    rng = random.Random(3)
    frames, truth = [], []
    for packet in sent:
        broken = bytearray(packet.frame)
        broken[rng.randrange(62 + 5, len(broken))] ^= 1 << rng.randrange(8)
        frames += [bytes(broken), packet.frame]
        truth.append(packet)
    annotations, counters = parse(frames)
    compare(annotations[1::2], truth)
    wrong = counters["verdicts"]["bad_icrc"]
    # A flip in a queue pair number, a length or an opcode may make another kind of packet of it; none is placed.
    assert wrong + counters["verdicts"]["malformed"] + counters["verdicts"]["foreign"] == len(sent)
    assert wrong > 0.9 * len(sent)


@pytest.mark.parametrize(
    "direction, host, kept",
    [("inbound", 1, True), ("inbound", 0, False), ("outbound", 0, True), ("outbound", 1, False)],
)
def test_the_other_direction_is_foreign(parse, direction, host, kept):
    sent = send(iterations=1)
    annotations, _ = parse([*(s.frame for s in sent), credit(1)], direction=direction, host=[HOSTS[host]])
    if kept:
        compare(annotations[:-1], sent)
    else:
        assert set(verdicts(annotations)[:-1]) == {FOREIGN}
    assert verdicts(annotations)[-1] == (FOREIGN if kept else CONTROL)


@pytest.mark.parametrize("seed", range(4))
def test_killed_and_started_again_gives_the_same(tmp_path, parse, seed):
    """A small ring that goes round many times; the parser dies now and then, sometimes between state and cursor."""
    rng = random.Random(seed)
    arrived = disturbed(send(iterations=60, first_psn=(1 << 24) - 100, iteration=SPLIT_ITERATION, each_reth=True), rng)
    frames = [s.frame for s in arrived]
    frames[200:200] = [credit(1), b"\0" * 3, acknowledgement(DATA_QP, 1, False)]
    tables = program(iteration=SPLIT_ITERATION)
    expected, expected_counters = parse(frames, tables)
    filled = FilledRing(tmp_path / "small", frame_bytes=512, records=64)
    header = np.frombuffer(filled.ring.memory, RING_HEADER, 1)
    parser, found, at = parser_of(filled.ring, tables), [], 0
    while at < len(frames):
        count = rng.randrange(1, 65)
        begin = filled.ring.parsed
        filled.add(frames[at : at + count], end=False)
        at = min(len(frames), at + count)
        while filled.ring.parsed < filled.ring.written:
            assert parser.poll() > 0
            if rng.random() < 0.5:
                if rng.random() < 0.5:
                    header["parsed"] = begin  # it died after publishing its state, before the cursor
                parser = parser_of(filled.ring, tables)
        found += [filled.ring.record(i)[0].copy() for i in range(begin, filled.ring.written)]
        filled.release()
    header["ended"] = 1
    assert parser.finished and parser.poll() == 0
    assert parser.counters() == expected_counters
    names = [n for n in expected.dtype.names if n not in ("timestamp_ns", "sequence")]
    assert all((np.array(found)[n] == expected[n]).all() for n in names)
    assert expected_counters["verdicts"]["placed"] > 500


def test_a_proof_that_comes_with_the_end_of_the_dump_is_found(tmp_path):
    """The dump brings it, and ends, while the parser looks for it in what was there before."""
    tables = program()
    tables.encoding = 1
    for rows in tables.rows:
        rows["encoding"] = 1
    sent = send(iterations=1)
    lost = next(i for i, s in enumerate(sent) if s.begins and not s.ends and not sent[i + 1].ends and i > 0)
    proof = next(i for i in range(lost + 1, len(sent)) if sent[i].begins)
    filled = FilledRing(tmp_path / "ring", frame_bytes=512, records=1 << 15)
    filled.add([s.frame for s in (*sent[:lost], *sent[lost + 1 : proof])] + [bytes(60)] * 15_000, end=False)
    parser = parser_of(filled.ring, tables)
    while parser.poll():
        pass
    assert filled.ring.parsed == lost  # what follows the lost packet is held

    polling = threading.Thread(target=lambda: [parser.poll() for _ in iter(lambda: parser.finished, True)])
    polling.start()
    time.sleep(0.05)  # it looks through those records again and again
    filled.add([sent[proof].frame])
    polling.join()
    assert UNSYNCHRONISED not in verdicts(filled.annotations())


def test_a_record_that_lies_about_its_length_stays_inside(tmp_path):
    filled = FilledRing(tmp_path / "ring", frame_bytes=512, records=2)
    filled.add([send(iterations=1)[0].frame] * 2)
    for index in range(2):
        filled.ring.record(index)["stored_length"] = 0xFFFFFFFF
    parser = parser_of(filled.ring, program())
    run(parser)
    assert parser.counters()["parsed"] == 2


def test_a_ring_that_cannot_be_is_refused(tmp_path):
    filled = FilledRing(tmp_path / "ring", frame_bytes=512, records=8)
    header = np.frombuffer(filled.ring.memory, RING_HEADER, 1)
    parser = parser_of(filled.ring, program())
    header["written"] = 9
    with pytest.raises(RingFormatError, match="written cursor is 9"):
        parser.poll()
    with pytest.raises(RingFormatError, match="0 records parsed of 9 written"):
        parser_of(filled.ring, program())


def test_a_closed_parser_keeps_its_counters(tmp_path):
    filled = FilledRing(tmp_path / "ring", frame_bytes=512, records=8)
    filled.add([struct.pack("B", 1)])
    parser = parser_of(filled.ring, program())
    run(parser)
    parser.close()
    assert parser.finished and parser.poll() == 0 and parser.counters()["parsed"] == 1
