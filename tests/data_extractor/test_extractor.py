# SPDX-License-Identifier: MIT
"""The extractor over annotated rings: coverage, bounds, settling, and restarts at every record."""

import copy
import json
import random
import time

import numpy as np
import pytest

from data_extractor.extractor import Extractor
from flowcheck import _atomics
from flowcheck import plan as plans
from flowcheck.errors import RingFormatError
from flowcheck.formats import EXTRACT_STATE, RING_HEADER
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from packet_parser.parser import Parser
from tests import jobs

PLACED, CONTROL, UNSYNCHRONISED = 1, 7, 11
PLAIN = 1


def parsed(folder, job, plan, pieces=None, stream="host0"):
    ring = jobs.ring_of(folder, plan, [p.frame for p in (pieces or job.pieces)], stream)
    parser = Parser(ring, plan, stream)
    while not parser.finished:
        parser.poll()
    return ring


@pytest.mark.parametrize("kernel", ["scalar", "auto"])
def test_kernels_fill_the_same_slots(tmp_path, kernel):
    job, plan = jobs.Job(3), jobs.plan()
    slots = jobs.slots_of(tmp_path, plan)
    decided = jobs.drain([Extractor([parsed(tmp_path, job, plan)], plan, slots, kernel=kernel)], slots)
    assert {i: d[3] for i, d in decided.items()} == {0: job.initial, **job.gradients}


def settled(counts):
    """Return the counters; whether a repeat comes before or after its iteration was decided is a matter of time."""
    counts = {k: v for k, v in counts.items() if k != "per_stream"}
    counts["repeats"] = counts.pop("duplicate") + counts.pop("late")
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_started_again_at_any_record_it_ends_with_the_same_slots_and_counters(tmp_path, seed):
    """A new extractor takes over after every poll; sometimes the published state falls back to its older copy."""
    rng = random.Random(seed)
    job, plan = jobs.Job(5, seed=seed), jobs.plan()
    pieces = [p for n, p in enumerate(job.pieces) if n < 130 or rng.random() > 0.02]
    pieces += [rng.choice(pieces[150:]) for _ in range(20)]
    whole = tmp_path / "whole"
    whole.mkdir()
    slots = jobs.slots_of(whole, plan)
    before = Extractor([parsed(whole, job, plan, pieces)], plan, slots)
    expected = jobs.drain([before], slots)

    ring = parsed(tmp_path, job, plan, pieces)
    slots = jobs.slots_of(tmp_path, plan)
    header = np.frombuffer(ring.memory, RING_HEADER, 1)[0]
    offset, copy = int(header["extract_state_offset"]), int(header["extract_state_bytes"])
    decided = {}
    for _ in range(10_000):
        extractor = Extractor([ring], plan, slots)
        extractor.poll()
        if extractor.finished:
            break
        if rng.random() < 0.5:
            numbers = [_atomics.load(ring.memory, offset + copy * i) for i in range(2)]
            if min(numbers) > 0:
                _atomics.store(ring.memory, offset + copy * int(np.argmax(numbers)), 0)
        if rng.random() < 0.5:
            while slots.consumed_next < slots.settled_next:
                n = slots.consumed_next
                slot = slots.slot(n)
                decided[n] = (int(slot["state"]), int(slot["reason"]), slots.missing(n), slots.gradient(n).tobytes())
                slots.consumed_next = n + 1
    else:
        raise AssertionError("the extractor does not finish")
    for n in range(slots.consumed_next, slots.settled_next):
        slot = slots.slot(n)
        decided[n] = (int(slot["state"]), int(slot["reason"]), slots.missing(n), slots.gradient(n).tobytes())
    assert decided == expected
    assert settled(extractor.counters()) == settled(before.counters())


def test_claims_without_bytes_fall_back(tmp_path):
    """What an extractor that was killed had claimed and not done is free again."""
    job, plan = jobs.Job(1), jobs.plan()
    slots = jobs.slots_of(tmp_path, plan)
    ring = parsed(tmp_path, job, plan)
    Extractor([ring], plan, slots)
    slot = slots.slot(1)
    slot["iteration"], slot["state"], slot["units"] = 1, 1, jobs.TOTAL // 8
    begin = slots.offset(1) + int(slot["claim_offset"])
    slots.memory[begin : begin + 64] = b"\xff" * 64
    decided = jobs.drain([Extractor([ring], plan, slots)], slots)
    assert decided[1][0] == 2 and decided[1][3] == job.gradients[1]


def test_units_behind_the_last_one_count_for_none_that_is_missing(tmp_path):
    """A slot file may hold anything: as many stray bits as there are missing units do not make a slot whole."""
    job, plan = jobs.Job(1), jobs.plan()
    slots = jobs.slots_of(tmp_path, plan)
    pieces = [piece for piece in job.pieces if not (piece.kind == "final" and piece.end == jobs.TOTAL)]
    lost = next(piece for piece in job.pieces if piece.kind == "final" and piece.end == jobs.TOTAL)
    ring = parsed(tmp_path, job, plan, pieces)
    Extractor([ring], plan, slots)
    slot, units = slots.slot(1), jobs.TOTAL // 8
    slot["iteration"], slot["state"], slot["units"] = 1, 1, units
    word, count = slots.offset(1) + int(slot["done_offset"]) + 8 * (units // 64), (lost.end - lost.begin) // 8
    assert 0 < count <= 64 - units % 64
    slots.memory[word : word + 8] = ((1 << count) - 1 << units % 64).to_bytes(8, "little")
    decided = jobs.drain([Extractor([ring], plan, slots)], slots)
    assert decided[1][0] == 3 and decided[1][2] == [(lost.begin, lost.end)]


def test_a_full_slot_file_holds_the_stream_until_iterations_are_taken(tmp_path):
    job, plan = jobs.Job(9), jobs.plan(slots=3)
    slots = jobs.slots_of(tmp_path, plan)
    extractor = Extractor([parsed(tmp_path, job, plan)], plan, slots)
    for _ in range(200):
        extractor.poll()
    assert slots.settled_next == 4 and not extractor.finished  # 0 and three more
    decided = jobs.drain([extractor], slots)
    assert [decided[i][0] for i in range(10)] == [2] * 10


@pytest.mark.parametrize("count", [3, 4, 5])
def test_who_takes_an_iteration_only_when_the_next_is_settled_is_not_waited_for(tmp_path, count):
    """So does an updater that lacks a step record; here beside a connection of which nothing comes any more."""
    job, plan = jobs.Job(12), jobs.plan(slots=count)
    slots = jobs.slots_of(tmp_path, plan)
    pieces = [piece for piece in job.pieces if piece.edge == 0 or piece.iteration < 3]
    extractor = Extractor([parsed(tmp_path, job, plan, pieces)], plan, slots)
    for _ in range(1000):
        extractor.poll()
        if slots.consumed_next + 1 < slots.settled_next:
            slots.consumed_next += 1
    assert extractor.finished and slots.settled_next == 13


def test_a_live_stream_that_proves_nothing_is_silent_whatever_it_brings(tmp_path):
    """One stream shows its link; on the other, which should show the second, something comes for ever that is not the job's."""
    document = copy.deepcopy(jobs.EXAMPLE)
    host = document["shards"][0]["streams"][0]["host"]
    document["shards"][0]["streams"] = [{"name": f"link-{n}", "links": [n], "host": host} for n in range(2)]
    document["silence_ms"], document["shards"][0]["layout"]["mtu"] = 1, 1024
    job, plan = jobs.Job(6), plans.parse(json.dumps(document))
    good = parsed(tmp_path, job, plan, [piece for piece in job.pieces if piece.edge == 0], "link-0")
    noisy = jobs.ring_of(tmp_path, plan, [bytes(100)] * 512, "link-1")
    np.frombuffer(noisy.memory, RING_HEADER, 1)["live"] = 1
    jobs.publish(noisy, "ended", 0)
    slots = jobs.slots_of(tmp_path, plan)
    extractor = Extractor([good, noisy], plan, slots)
    for number in range(512):
        noisy.record(number)["verdict"], noisy.record(number)["connection"] = UNSYNCHRONISED, 1
        jobs.publish(noisy, "parsed", number + 1)
        extractor.poll()
        slots.consumed_next = slots.settled_next
        time.sleep(0.002)
        if slots.settled_next == 6:
            break
    assert slots.settled_next == 6  # nothing shows yet that the job has gone past the last one
    assert noisy.extracted < 512


def synthetic(tmp_path, records, frame=bytes(2000)):
    """Return (ring, plan, slots) with hand-made annotations; each record is a dict of fields."""
    plan = jobs.plan()
    ring = jobs.ring_of(tmp_path, plan, [frame[:1000]] * len(records))
    for number, fields in enumerate(records):
        record = ring.record(number)
        record["verdict"], record["encoding"], record["connection"], record["settled_lag"] = PLACED, PLAIN, 0, 2
        record["payload_offset"], record["payload_length"] = 100, 512
        record["iteration"], record["message_bytes"], record["destination"] = 1, 20000, 0
        for name, value in fields.items():
            record[name] = value
    jobs.publish(ring, "parsed", len(records))
    return ring, plan, jobs.slots_of(tmp_path, plan)


@pytest.mark.parametrize(
    "fields",
    [
        {"destination": 20000},
        {"destination": 19992},
        {"destination": 2**64 - 8},
        {"destination": 2**63},
        {"destination": 4},
        {"payload_offset": 900},
        {"payload_length": 65535},
        {"stored_length": 2**32 - 1},
        {"wire_offset": 2**32 - 512, "message_bytes": 2**32 - 1},
        {"wire_offset": 20000},
        {"message_bytes": 0},
        {"encoding": 3},
        {"encoding": 200},
        {"encoding": 2, "wire_offset": 8},
        {"encoding": 2, "payload_length": 500},
    ],
    ids=str,
)
def test_a_record_that_leaves_its_slot_or_frame_is_never_written(tmp_path, fields):
    ring, plan, slots = synthetic(tmp_path, [fields], frame=b"\xff" * 2000)
    extractor = Extractor([ring], plan, slots)
    jobs.drain([extractor], slots)
    counts = extractor.counters()
    assert counts["unsynchronised"] == 1 and counts["placed"] == 0
    assert all(not slots.gradient(i).any() for i in range(5))


def test_an_unknown_verdict_number_counts_as_unsynchronised(tmp_path):
    ring, plan, slots = synthetic(tmp_path, [{"verdict": 99}])
    extractor = Extractor([ring], plan, slots)
    jobs.drain([extractor], slots)
    assert extractor.counters()["unsynchronised"] == 1


def test_plain_payloads_overlapping_in_part_bring_their_new_bytes(tmp_path):
    frame = bytes(range(256)) * 8
    ring, plan, slots = synthetic(tmp_path, [{}, {"destination": 0, "payload_length": 800}], frame)
    extractor = Extractor([ring], plan, slots)
    decided = jobs.drain([extractor], slots)
    assert extractor.counters()["placed"] == 2
    assert decided[1][3][:800] == frame[100:900] and decided[1][2] == [(800, 20000)]


def test_late_packets_are_counted_and_change_nothing(tmp_path):
    job, plan = jobs.Job(6), jobs.plan()
    old = [p for p in job.pieces if p.kind == "final" and p.iteration == 1]
    slots = jobs.slots_of(tmp_path, plan)
    extractor = Extractor([parsed(tmp_path, job, plan, [*job.pieces, *old])], plan, slots)
    decided = jobs.drain([extractor], slots)
    assert extractor.counters()["late"] == len(old)
    assert all(decided[i][3] == job.gradients[i] for i in range(1, 7))


def test_iterations_never_seen_are_incomplete_as_a_whole(tmp_path):
    job, plan = jobs.Job(8), jobs.plan()
    pieces = [p for p in job.pieces if p.iteration not in (3, 4, 5)]
    slots = jobs.slots_of(tmp_path, plan)
    decided = jobs.drain([Extractor([parsed(tmp_path, job, plan, pieces)], plan, slots)], slots)
    assert [decided[i][0] for i in range(9)] == [2, 2, 2, 3, 3, 3, 2, 2, 2]
    assert all(decided[i][2] == [(0, 20000)] for i in (3, 4, 5))


def test_files_of_another_kind_are_refused(tmp_path):
    from flowcheck.errors import ConfigError, RingFormatError, SlotFormatError

    plan = jobs.plan()
    ring = jobs.ring_of(tmp_path, plan, [bytes(100)] * 4)
    slots = jobs.slots_of(tmp_path, plan)
    other = jobs.plan(mtu=4096)
    with pytest.raises(ConfigError, match="another job"):
        PacketRing.open(ring.path, other.identity())
    with pytest.raises(ConfigError, match="another job"):
        SlotFile.open(slots.path, other.identity())
    with pytest.raises(RingFormatError):
        PacketRing.open(slots.path)
    with pytest.raises(SlotFormatError):
        SlotFile.open(ring.path)
    assert EXTRACT_STATE.itemsize % 8 == 0
    for path, kind, error in ((ring.path, PacketRing, RingFormatError), (slots.path, SlotFile, SlotFormatError)):
        data = path.read_bytes()
        cut = tmp_path / "cut"
        for length in (0, 8, 4095, 4096, len(data) - 1, len(data) // 2):
            cut.write_bytes(data[:length])
            with pytest.raises(error):
                kind.open(cut)
        for offset in (0, 8, 12, 16, 24, 32, 40):
            bad = bytearray(data)
            bad[offset] ^= 0x40
            cut.write_bytes(bad)
            if bytes(bad[20:24]) == data[20:24] and offset != (32 if kind is PacketRing else 99):
                with pytest.raises(error):
                    kind.open(cut)


def test_cursors_that_cannot_be_are_refused_before_a_record_is_read(tmp_path):
    """A ring whose extractor claims to be ahead of its parser: what lies there is of nobody, or of a lap before."""
    job, plan = jobs.Job(2), jobs.plan()
    ring, slots = parsed(tmp_path, job, plan), jobs.slots_of(tmp_path, plan)
    extractor = Extractor([ring], plan, slots)
    extractor.poll()
    jobs.publish(ring, "parsed", 0)
    with pytest.raises(RingFormatError, match="extracted of 0 parsed"):
        extractor.poll()
    with pytest.raises(RingFormatError, match="extracted of 0 parsed"):
        Extractor([ring], plan, slots)
