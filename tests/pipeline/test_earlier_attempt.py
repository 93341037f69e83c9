# SPDX-License-Identifier: MIT
"""Frames of an earlier attempt, same queue pairs and same numbers, that arrive when the new attempt's are captured already."""

import contextlib
import random
from dataclasses import replace

import pytest
from scapy.utils import RawPcapNgReader

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from packet_parser.parser import Parser
from tests import jobs
from workload_gen.record import Recording, record

WHOLE, AT, LAST = 2, 5, 9
JOB = {"iterations": LAST, "bucket_mb": 0.01, "parameters": 3000, "optimizer": "sgd"}


def frames_of(folder, stream):
    with contextlib.closing(RawPcapNgReader(str(folder / f"{stream}.pcapng"))) as reader:
        return [bytes(frame) for frame, _ in reader]


def followed(folder, plan, streams, pause_ns=0):
    """Take frames of each stream through parsers and an extractor; return what was decided, and why packets were unsynchronised.

    All frames but a stream's first come `pause_ns` later than it.
    """
    folder.mkdir()
    rings = [jobs.ring_of(folder, plan, frames, name) for name, frames in streams.items()]
    for ring in rings:
        jobs.headers(ring)["timestamp_ns"][1:] += pause_ns
    parsers = [Parser(ring, plan, ring.stream) for ring in rings]
    slots = jobs.slots_of(folder, plan)
    with contextlib.closing(Extractor(rings, plan, slots)) as extractor:
        decided = jobs.drain([*parsers, extractor], slots)
    reasons = [parser.counters()["unsynchronised"] for parser in parsers]
    return decided, {name: sum(row[name] for row in reasons) for name in reasons[0]}


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"protocol": "ll"}),
        (3, {"protocol": "simple", "queue_pairs": 2, "start_psn": 2**24 - 200}),
        pytest.param(3, {"protocol": "ll128", "queue_pairs": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"protocol": "ll", "channels": 2, "pin_channels": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_end_of_the_attempt_before_is_never_taken_for_the_new_one(tmp_path, ranks, options):
    first = Recording(out=tmp_path / "first", ranks=ranks, **JOB, **options)
    record(first)
    state = first.out / "truth" / f"iteration-{AT:06}.pt"
    second = replace(first, out=tmp_path / "second", resume=state)
    record(second)
    plan = plans.load(second.out / "plan.json")
    names = [stream.name for stream in plan.shard.streams]
    old, new = ({name: frames_of(folder.out, name) for name in names} for folder in (first, second))
    truth, _ = followed(tmp_path / "clean", plan, new)
    assert {i: row[0] for i, row in truth.items()} == dict.fromkeys(range(AT + 1, LAST + 1), WHOLE)
    chance, earlier = random.Random(1), 0
    for case in range(8):
        # How much of it is late: most of the attempt, but not how it began, or its last packets; a stream need not show any.
        late = {
            name: frames[-chance.choice((1, 5, 40, len(frames) // 3, len(frames) * 2 // 3)) :]
            for name, frames in old.items()
        }
        if case % 3 == 2:
            late[chance.choice(names)] = []
        pause_ns = 8 * 10**9 * (case % 2)
        found, reasons = followed(
            tmp_path / str(case), plan, {name: late[name] + new[name] for name in names}, pause_ns
        )
        for iteration, (state, *_, data) in found.items():
            assert state != WHOLE or data == truth[iteration][-1], (case, iteration)
        assert {i for i, row in found.items() if row[0] == WHOLE} == set(truth), (case, found.keys(), reasons)
        earlier += reasons["earlier_attempt"]
    assert earlier > 50
