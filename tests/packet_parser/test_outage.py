# SPDX-License-Identifier: MIT
"""Outages of any length, also such that sequence numbers come round: what is found again is where it was sent."""

import contextlib
import json
import random

import pytest

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from packet_parser.parser import Parser
from tests import jobs
from tests.packet_parser.later import Job
from tests.witness import schedule
from updater.directory import Directory
from updater.updater import Updater

WHOLE, UNSYNCHRONISED = 2, 11
#: Verdicts that say where a packet belongs.
PLACED = {1, 3, 4, 5, 6}
SAME = ("verdict", "destination", "wire_offset", "message_bytes", "settled_lag", "encoding")
STEP_NS, SECOND_NS = 1000, 10**9
FORMS = {
    "ll": schedule.Job("2.19", "ll", 2, mtu=512),
    "simple": schedule.Job("2.19", "simple", 2, mtu=512),
    "ll128": schedule.Job("2.19", "ll128", 3, mtu=512),
    "ll-2-qps": schedule.Job("2.18", "ll", 3, queue_pairs=2, split=True, mtu=512),
    "ll-4-qps-in-turn": schedule.Job("2.18", "ll", 2, queue_pairs=4, split=False, mtu=512),
    "ll128-4-qps": schedule.Job("2.19", "ll128", 2, queue_pairs=4, split=True, mtu=512),
    "ll128-2-qps-in-turn": schedule.Job("2.19", "ll128", 3, queue_pairs=2, split=False, mtu=512),
    "simple-2-qps": schedule.Job("2.19", "simple", 3, queue_pairs=2, split=True, mtu=512),
    "simple-4-qps-in-turn": schedule.Job("2.19", "simple", 3, queue_pairs=4, split=False, mtu=512),
}
BY_DEFAULT = {"ll", "simple-4-qps-in-turn"}


class Outages:
    """A job whose frames are shown with an outage in between, by one stream or by each."""

    def __init__(self, folder, form):
        self.folder, self.count, self.simple = folder, 0, form.protocol == "simple"
        self.job = Job(folder / "job", form, start_psn=2**24 - 100)
        self.plan = plans.parse(json.dumps(self.job.document()))
        self.links = sorted(self.job.capture.files)
        self.frames = {link: [f for f in self.job.frames if self.job.edge(f) == link] for link in self.links}
        self.clean = {link: self.parse(link, frames, range(len(frames)))[0] for link, frames in self.frames.items()}
        for link, rows in self.clean.items():
            for frame, row in zip(self.frames[link], rows, strict=True):
                assert int(row["verdict"]) in PLACED | {7}
                assert int(row["verdict"]) == 7 or int(row["iteration"]) == frame.iteration

    def ring(self, folder, link, frames, times):
        ring = jobs.ring_of(folder, self.plan, [frame.data for frame in frames], f"link-{link}")
        for index, time in enumerate(times):
            ring.record(index)["timestamp_ns"] = 10**18 + STEP_NS * time
        return ring

    def scratch(self):
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        return folder

    def parse(self, link, frames, times):
        """Return the annotations of frames received at those times, and why some were unsynchronised."""
        with self.ring(self.scratch(), link, frames, times) as ring:
            with contextlib.closing(Parser(ring, self.plan, f"link-{link}")) as parser:
                while not parser.finished:
                    parser.poll()
                rows = [ring.record(index)[0].copy() for index in range(len(frames))]
                return rows, parser.counters()["unsynchronised"]

    def check(self, link, cut, resumed, turns, jump_ns, between=()):
        """Show frames up to `cut`, then those from `resumed` on, `turns` later; return which of those were found again.

        `between` comes first after the outage. What is found must be where it was sent.
        """
        frames = self.frames[link]
        after = [self.job.later(frame, turns) for frame in frames[resumed:]]
        shown = [*frames[:cut], *between, *after]
        times = [index + (jump_ns // STEP_NS if index >= cut else 0) for index in range(len(shown))]
        rows, _ = self.parse(link, shown, times)
        for row, clean in zip(rows[:cut], self.clean[link][:cut], strict=True):
            assert int(row["verdict"]) == int(clean["verdict"])
        found = []
        for frame, row, clean in zip(after, rows[cut + len(between) :], self.clean[link][resumed:], strict=True):
            found.append(int(row["verdict"]) != UNSYNCHRONISED)
            if found[-1]:
                assert [int(row[name]) for name in SAME] == [int(clean[name]) for name in SAME]
                # An empty message of LL or LL128 has no flag; nor has it a byte that could go astray.
                told = int(row["verdict"]) != 7 and (self.simple or int(row["payload_length"]))
                assert not told or int(row["iteration"]) == frame.iteration
        return found

    def must_be_found(self, link, resumed):
        """Return for each frame from `resumed` on whether there is evidence for it: of its own, or what came before.

        LL and LL128: a packet of its queue pair that begins a message and has a flag, or a later one; the first packet of all may
        only show that the flow is somewhere else. Simple: one that begins a message, behind two credits.
        """
        known, seen, credits, out = set(), set(), {}, []
        for frame in self.frames[link][resumed:]:
            if frame.credit:
                credits[frame.connection] = credits.get(frame.connection, 0) + 1
                out.append(True)
                continue
            place = frame.connection, frame.queue_pair
            carries = len(frame.data) - 4 > frame.payload_at
            if frame.has_reth and (credits.get(frame.connection, 0) > 1 if self.simple else carries and place in seen):
                known.add(place)
            seen.add(place)
            out.append(place in known)
        return out

    def exactly(self, distance, chance):
        """Return (link, cut, resumed, turns) such that the next number of a queue pair is larger by `distance`."""
        link = chance.choice(self.links)
        frames = self.frames[link]
        begin = next(index for index, frame in enumerate(frames) if frame.iteration > self.job.before)
        connection, number = chance.choice(
            [key for key in self.job.packets if self.job.capture.connections[key[0]].edge == link]
        )
        places = [
            i for i, f in enumerate(frames) if not f.credit and (f.connection, f.queue_pair) == (connection, number)
        ]
        packets = self.job.packets[connection, number]
        where = chance.randrange(2, len([i for i in places if i < begin]))
        turns, more = divmod(distance, packets)
        following = where + more
        while places[following] < begin:
            following, turns = following + packets, turns - 1
        # The number of the packet at `following`, moved on by the turns, is larger by the distance.
        return link, places[where] + 1, places[following], turns


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in FORMS]
)
def outages(request, tmp_path_factory):
    return Outages(tmp_path_factory.mktemp("outage"), FORMS[request.param])


DISTANCES = [
    2**22,
    2**23 - 1,
    2**23,
    2**23 + 1,
    2**24 - 1,
    2**24,
    2**24 + 1,
    2**24 + 2,
    2**25 + 1,
    7 * 2**24 + 1,
    2**33 + 1,
]


@pytest.mark.parametrize("jump_s", [10, 400 * 24 * 3600, -3600], ids=["pause", "far", "back"])
def test_numbers_that_come_round_are_found_again_where_they_were_sent(outages, jump_s):
    chance = random.Random(jump_s)
    for distance in DISTANCES:
        for _ in range(2):
            link, cut, resumed, turns = outages.exactly(distance, chance)
            found = outages.check(link, cut, resumed, turns, jump_s * SECOND_NS)
            assert all(f or not must for f, must in zip(found, outages.must_be_found(link, resumed), strict=True)), (
                distance
            )


def test_credits_of_before_that_are_read_after_place_nothing_wrong(outages):
    chance = random.Random(3)
    for distance in DISTANCES:
        for _ in range(2):
            link, cut, resumed, turns = outages.exactly(distance, chance)
            late = [frame for frame in outages.frames[link][:cut] if frame.credit][-3:]
            outages.check(link, cut, resumed, turns, 10 * SECOND_NS, late[: chance.randrange(1, 4)])


def test_outages_drawn_by_lot(outages):
    chance = random.Random(4)
    for _ in range(40):
        link = chance.choice(outages.links)
        frames = outages.frames[link]
        cut = chance.randrange(10, len(frames) - 10)
        begin = next(index for index, frame in enumerate(frames) if frame.iteration > outages.job.before)
        resumed = chance.randrange(max(cut, begin), len(frames))
        turns = chance.choice((0, 1, chance.randrange(2**8), chance.randrange(2**24), chance.randrange(2**28)))
        jump_s = 10 if outages.simple else chance.choice((0, 10, -3600))  # Simple: a clock that stood still is none
        outages.check(link, cut, resumed, turns, jump_s * SECOND_NS)


class Taken:
    """What rings of all streams bring, through parsers and an extractor: decided iterations, and those that were skipped."""

    def __init__(self, outages, shown):
        folder, plan = outages.scratch(), outages.plan
        rings = [outages.ring(folder, link, *frames_and_times) for link, frames_and_times in shown.items()]
        self.slots = jobs.slots_of(folder, plan)
        parsers = [Parser(ring, plan, ring.stream) for ring in rings]
        self.stages = [*parsers, Extractor(rings, plan, self.slots)]

    def decided(self):
        return jobs.drain(self.stages, self.slots)


def gradient(outages, iteration):
    """Return the slot data of an iteration: those of later ones are those of the job's own, again."""
    job = outages.job
    if iteration > job.before:
        iteration = (iteration - job.before - 1) % job.own + job.before + 1
    flat, slot = job.gradients[iteration], bytearray(outages.plan.slot_bytes)
    for begin, end in outages.plan.slot_ranges(1):
        slot[begin:end], flat = flat[: end - begin], flat[end - begin :]
    return bytes(slot)


def outage(outages, link, turns):
    """Return a stream's frames up to some packet of the last iteration before, then the later ones; and when they came."""
    frames = outages.frames[link]
    begin = next(index for index, frame in enumerate(frames) if frame.iteration > outages.job.before)
    shown = frames[: begin - 3] + [outages.job.later(frame, turns) for frame in frames[begin:]]
    return shown, [index + (10 * SECOND_NS // STEP_NS if index >= begin - 3 else 0) for index in range(len(shown))]


def check_after(outages, decided, turns):
    """Nothing that is whole is wrong, and from the second iteration after the outage on all is whole."""
    job = outages.job
    for iteration, (state, *_, data) in decided.items():
        assert state != WHOLE or data == gradient(outages, iteration), iteration
    whole = {iteration for iteration, row in decided.items() if row[0] == WHOLE}
    after = range(job.before + turns * job.own + 3, job.before + turns * job.own + job.own + 1)
    assert set(range(1, job.before)) | set(after) <= whole
    assert not whole & set(range(job.before, job.before + turns * job.own + 1)) - {job.before}


@pytest.mark.parametrize("turns", [1, 30, 150_000])
def test_both_streams_are_out_and_come_back(outages, turns):
    decided = Taken(outages, {link: outage(outages, link, turns) for link in outages.links}).decided()
    check_after(outages, decided, turns)


def test_a_jump_over_a_hundred_thousand_iterations_is_one_note_in_the_log(outages, tmp_path):
    turns, job = 25_000, outages.job
    taken = Taken(outages, {link: outage(outages, link, turns) for link in outages.links})
    with contextlib.closing(Updater(outages.plan, taken.slots, tmp_path / "out")) as updater:
        for _ in range(20_000):
            done = sum(stage.poll() for stage in taken.stages) + updater.poll()
            if not done and updater.finished:
                break
        assert updater.finished
    assert sum(path.stat().st_size for path in (tmp_path / "out" / "log").iterdir()) < 500_000
    directory = Directory(tmp_path / "out")
    rows = {row.number: row for row in directory.iterations}
    assert sorted(rows) == list(range(1, job.before + (turns + 1) * job.own + 1))
    lost = rows[job.before + turns * job.own // 2]
    size = len(job.gradients[1])
    assert lost.state == "incomplete"
    assert directory.facts(lost) == {"bytes": size, "placed_bytes": 0, "missing": [[0, size]], "reason": "missing"}
    whole = [number for number, row in rows.items() if row.state == "whole"]
    assert len(whole) >= job.before - 1 + job.own - 2
    for number in whole:
        assert directory.slot(number)[0].tobytes() == gradient(outages, number)
