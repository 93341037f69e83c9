# SPDX-License-Identifier: MIT
"""A job of two ranks as frames, and rings to put them in, without DPDK.

What the messages are was read off a real job's wire by hand (5,000 float32 parameters, LL, one channel): start-up of 16,
64 and 40,000 bytes from rank 0, 16 from rank 1; per iteration 15,424 and 24,576 bytes on edge 0, 24,576 and 15,424 on
edge 1; before iteration 2 two messages of 16 from rank 0. The first of each pair is a partial sum, the second final.
"""

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scapy.utils import RawPcapNgReader

from data_extractor.extractor import Extractor
from flowcheck import _atomics
from flowcheck import plan as plans
from flowcheck.formats import RECORD, RING_HEADER, SLOT
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from packet_parser.parser import Parser
from tests import builders

EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", (Path(__file__).parents[1] / "docs/plan.md").read_text(), re.S)[1])
SPLIT = 12288  # bytes of the first of the two chunks
TOTAL = 20000


class Piece(NamedTuple):
    """One frame: which edge and iteration it is of, what it is, and the bytes it brings ([begin, end), if final)."""

    frame: bytes
    edge: int
    iteration: int
    kind: str
    begin: int
    end: int


def settled(iteration, incomplete=False):
    """The record of a slot that is settled: whole, or incomplete because something of it is missing (docs/slot-format.md)."""
    record = np.zeros((), SLOT)
    record["iteration"], record["state"], record["reason"] = iteration, 3 if incomplete else 2, incomplete
    return record[()]


def plan(mtu=1024, slots=4):
    document = copy.deepcopy(EXAMPLE)
    document["shards"][0]["layout"]["mtu"] = mtu
    document["slots"] = slots
    return plans.parse(json.dumps(document))


class Job:
    """Frames of a whole job, in order: `pieces`; truth in `gradients` (bytes per iteration) and `initial`."""

    def __init__(self, iterations, *, mtu=1024, start_psn=0, seed=0):
        rng = np.random.default_rng(seed)
        self.mtu = mtu
        self.psn, self.step = [start_psn, start_psn], [0, 0]
        self.pieces = []
        self.initial = rng.bytes(TOTAL)
        self.gradients = {}
        self.message(0, 0, "other_collective", rng.bytes(8))
        self.message(1, 0, "other_collective", rng.bytes(8))
        self.message(0, 0, "other_collective", rng.bytes(32))
        self.message(0, 0, "initial_state", self.initial)
        for iteration in range(1, iterations + 1):
            gradient = self.gradients[iteration] = rng.bytes(TOTAL)
            if iteration == 2:
                self.message(0, 0, "other_collective", rng.bytes(8))
                self.message(0, 0, "other_collective", rng.bytes(4))
            self.message(0, iteration, "partial_sum", rng.bytes(TOTAL - SPLIT))
            self.message(1, iteration, "partial_sum", rng.bytes(SPLIT))
            self.message(0, iteration, "final", gradient[:SPLIT], 0)
            self.message(1, iteration, "final", gradient[SPLIT:], SPLIT)

    def message(self, edge, iteration, kind, data, begin=0):
        qp = EXAMPLE["shards"][0]["connections"][edge]["proof"]["data"][0]
        ends = builders.V6 if edge == 0 else builders.V6[::-1]
        va = 0x7F0000000000 + edge * 0x1000000 + self.step[edge] % 8 * 65536
        wire = builders.ll_lines(data, self.step[edge] + 1)
        frames = builders.message(qp, self.psn[edge], va, wire, self.mtu, ends=ends)
        for number, frame in enumerate(frames):
            low = begin + number * self.mtu // 2
            high = min(low + self.mtu // 2, begin + len(data))
            self.pieces.append(Piece(frame, edge, iteration, kind, low, high))
        self.psn[edge] += len(frames)
        self.step[edge] += 1


def ring_of(folder, plan, frames, stream="host0", records=None):
    """Return a ring that a dump of these frames would have left."""
    count = records or max(2, 1 << (len(frames) - 1).bit_length())
    room = plan.shard.layout.mtu + 192
    ring = PacketRing.create(
        folder / f"{stream}.ring", frame_bytes=room, records=count, identity=plan.identity(), stream=stream
    )
    header = np.frombuffer(ring.memory, RING_HEADER, 1)
    state = np.array([len(frames), 0, 0, 0, 0], "<u8").tobytes()
    at = int(header["dump_state_offset"][0])
    ring.memory[at : at + 8 + len(state)] = (1).to_bytes(8, "little") + state
    records = headers(ring)[: len(frames)]
    records["frame_length"] = [len(frame) for frame in frames]
    records["stored_length"] = np.minimum(records["frame_length"], room)
    records["sequence"] = np.arange(len(frames))
    records["timestamp_ns"] = 10**18 + np.arange(len(frames))
    for begin, frame in zip(range(ring.header_bytes + 64, len(ring.memory), ring.record_bytes), frames, strict=False):
        ring.memory[begin : begin + min(len(frame), room)] = frame[:room]
    publish(ring, "written", len(frames))
    publish(ring, "ended", 1)
    return ring


def headers(ring):
    """Return the headers of all records of a ring, as a view: records of dtype RECORD."""
    return np.ndarray(ring.records, RECORD, ring.memory, ring.header_bytes, ring.record_bytes)


def publish(ring, cursor, value):
    _atomics.store(ring.memory, RING_HEADER.fields[cursor][1], value)


def slots_of(folder, plan):
    return SlotFile.for_plan(folder / "slots", plan)


def drain(stages, slots, until=100_000, over=None):
    """Poll stages until the extractor is finished, or `over()`, taking iterations as the updater would; return what was decided.

    Each entry: iteration -> (state, reason, missing slot ranges, slot bytes).
    """
    decided = {}
    for _ in range(until):
        for stage in stages:
            stage.poll()
        while slots.consumed_next < slots.settled_next:
            number = slots.consumed_next
            first, end = slots.skipped
            if first <= number < end:  # nothing of them has come, and they have no slot
                slots.consumed_next = end
                continue
            slot = slots.slot(number)
            decided[number] = (
                int(slot["state"]),
                int(slot["reason"]),
                slots.missing(number),
                slots.gradient(number).tobytes(),
            )
            slots.consumed_next = number + 1
        if over() if over else stages[-1].finished:
            return decided
    raise AssertionError("the stages do not finish")


def decided(folder, scratch):
    """Take a recorded job's captures through parsers and an extractor; return its plan and what was decided, as `drain` does.

    Rings and slots are left in `scratch`, a folder that is there.
    """
    plan = plans.load(folder / "plan.json")
    rings, parsers = [], []
    for stream in plan.shard.streams:
        with contextlib.closing(RawPcapNgReader(str(folder / f"{stream.name}.pcapng"))) as reader:
            rings.append(ring_of(scratch, plan, [bytes(frame) for frame, _ in reader], stream.name))
        parsers.append(Parser(rings[-1], plan, stream.name))
    slots = slots_of(scratch, plan)
    extractor = Extractor(rings, plan, slots)
    out = drain([*parsers, extractor], slots)
    counters = extractor.counters()
    for name in ("foreign", "malformed", "bad_icrc", "unsynchronised", "conflict", "late"):
        assert counters[name] == 0, counters
    return plan, out
