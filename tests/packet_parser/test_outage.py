# SPDX-License-Identifier: MIT
"""Outages of any length, also such that sequence numbers come round: what is found again is where it was sent."""

import contextlib
import json
import random

import numpy as np
import pytest

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from flowcheck.formats import RING_HEADER
from packet_parser.parser import Parser
from tests import jobs
from tests.packet_parser.later import Job
from tests.witness import schedule
from updater.directory import Directory
from updater.updater import Updater

WHOLE, UNSYNCHRONISED = 2, 11
#: Why an iteration is incomplete.
MISSING = 1
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
        self.plan = plans.parse(json.dumps(self.job.document() | {"silence_ms": 200}))
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
        found, credited = [], set()
        for frame, row, clean in zip(after, rows[cut + len(between) :], self.clean[link][resumed:], strict=True):
            found.append(int(row["verdict"]) != UNSYNCHRONISED)
            if frame.credit:
                credited.add(frame.connection)
            if found[-1]:
                assert [int(row[name]) for name in SAME] == [int(clean[name]) for name in SAME]
                # Before a credit comes, flags of LL that have come round are those of before (decision 0015).
                read = frame.connection in credited or not self.round_again(frame.connection, turns, 2**31)
                assert not read or not self.told(row) or int(row["iteration"]) == frame.iteration
        return found

    def told(self, row):
        """Whether anything but the count tells a frame's iteration.

        An empty message of LL or LL128 has no flag; nor has it a byte that could go astray.
        """
        return int(row["verdict"]) != 7 and (self.simple or int(row["payload_length"]))

    def round_again(self, connection, turns, steps):
        """Whether in an outage a connection may have sent so many messages of LL, whose flags have 32 bits."""
        return self.job.job.protocol == "ll" and (turns + 2) * self.job.steps[connection] >= steps

    def must_be_found(self, link, resumed, turns):
        """Return for each frame from `resumed` on whether there is evidence for it: of its own, or what came before.

        LL and LL128: a packet of its queue pair that begins a message and has a flag, or a later one; the first packet of all that has
        one may only show that the flow is somewhere else. Behind two credits: Simple, and LL where its flags may have come round.
        """
        known, seen, credits, out = set(), set(), {}, []
        for frame in self.frames[link][resumed:]:
            if frame.credit:
                credits[frame.connection] = credits.get(frame.connection, 0) + 1
                out.append(True)
                continue
            place = frame.connection, frame.queue_pair
            carries = len(frame.data) - 4 > frame.payload_at
            credited = credits.get(frame.connection, 0) > 1
            flagged = carries and (credited or not self.round_again(frame.connection, turns, 2**30))
            if frame.has_reth and (credited if self.simple else flagged and place in seen):
                known.add(place)
            if flagged:
                seen.add(place)
            out.append(place in known)
        return out

    def comes_back(self, link, cut, resumed, turns, jump_ns):
        """Show frames as `check` does; return whether all that must be found is."""
        found = self.check(link, cut, resumed, turns, jump_ns)
        must = self.must_be_found(link, resumed, turns)
        return all(here or not wanted for here, wanted in zip(found, must, strict=True))

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
            assert outages.comes_back(link, cut, resumed, turns, jump_s * SECOND_NS), distance


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


def test_flags_that_have_come_round_are_read_anew_behind_a_credit(outages):
    """The first frame after the outage begins a message, or another queue pair's piece of one, and its credit was not seen."""
    chance = random.Random(5)
    for link in outages.links:
        frames = outages.frames[link]
        begin = next(index for index, frame in enumerate(frames) if frame.iteration > outages.job.before)
        begins = [i for i in range(begin, len(frames)) if frames[i].has_reth and not frames[i].credit]
        for resumed in chance.sample(begins, 5):
            turns = 2**32 // outages.job.steps[frames[resumed].connection] + chance.randrange(3)
            assert outages.comes_back(link, begin, resumed, turns, 10 * SECOND_NS), (resumed, turns)


class Taken:
    """What rings of all streams bring, through parsers and an extractor: decided iterations, and those that were skipped."""

    def __init__(self, outages, shown):
        folder, plan = outages.scratch(), outages.plan
        self.rings = [outages.ring(folder, link, *frames_and_times) for link, frames_and_times in shown.items()]
        self.slots = jobs.slots_of(folder, plan)
        parsers = [Parser(ring, plan, ring.stream) for ring in self.rings]
        self.stages = [*parsers, Extractor(self.rings, plan, self.slots)]

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


class OneOut:
    """Of two streams one is out for more packets than a sequence has numbers, the other goes on.

    Of the other's frames every so many are shown: it proves its place time and again, and some iterations are between. Time
    goes on as frames do, fast.
    """

    def __init__(self, outages, distance, chance):
        job = self.job = outages.job
        self.out, cut, resumed, self.turns = outages.exactly(distance, chance)
        (self.other,) = set(outages.links) - {self.out}
        begin = next(index for index, frame in enumerate(job.frames) if frame.iteration > job.before)
        self.whole_turn = len(job.frames) - begin
        at = {link: [i for i, f in enumerate(job.frames) if job.edge(f) == link] for link in outages.links}
        own = {link: [i for i in places if i >= begin] for link, places in at.items()}
        every = 2**19 // len(own[self.other])
        between = range(2 + every, self.turns - 1, every)
        seen = [0, 1, 2, *between, *range(self.turns - 1, self.turns + 3)]
        #: Iterations that the other shows, and of those the ones with another turn right before them.
        self.seen = self._iterations(seen)
        self.firm = self._iterations(turn for turn in seen if turn <= 2 or turn - 1 in seen)
        self.last = max(self.seen)
        out = at[self.out]
        places = [(i, 0) for i in out[:cut]], [(i, self.turns) for i in out[resumed:]]
        places = [*places[0], *places[1], *((i, turn) for turn in seen[-2:] for i in own[self.out])]
        others = [(i, 0) for i in at[self.other] if i < begin] + [(i, t) for t in seen for i in own[self.other]]
        self.shown = {self.out: self._frames(places), self.other: self._frames(others)}
        #: How many frames of each stream come before the one that was out is back.
        self.before = {self.out: cut, self.other: len(others) - 3 * len(own[self.other])}
        self.last_before = job.before + self.turns * job.own
        self.cut, self.back = job.frames[out[cut]].iteration, job.frames[out[resumed]].iteration + self.turns * job.own

    def _frames(self, places):
        frames = [self.job.later(self.job.frames[i], turn) if turn else self.job.frames[i] for i, turn in places]
        return frames, [(i + turn * self.whole_turn) // 16 for i, turn in places]

    def _iterations(self, turns):
        """Return the iterations of turns, and those before all."""
        job = self.job
        own = {job.before + turn * job.own + number for turn in turns for number in range(1, job.own + 1)}
        return own | set(range(1, job.before + 1))


def carried(outages, link):
    """Return which bytes of a slot an edge carries fully reduced, by the witness."""
    form, mask = outages.job.job, np.zeros(outages.plan.slot_bytes, bool)
    for count, (begin, _) in zip(outages.job.counts, outages.plan.slot_ranges(1), strict=True):
        for channel in range(form.channels):
            for send in schedule.all_reduce(form, link, channel, count, 4):
                if send.final:
                    mask[begin + 4 * send.first :][: 4 * send.elements] = True
    return mask


def published(taken, shown, more, live):
    """Let the rings, of ports or files, have only so many frames yet; or all, and be over."""
    for ring, link in zip(taken.rings, shown, strict=True):
        np.frombuffer(ring.memory, RING_HEADER, 1)["live"] = live
        jobs.publish(ring, "written", len(shown[link][0]) if more is None else more[link])
        jobs.publish(ring, "ended", more is None)


@pytest.mark.parametrize(
    "distance",
    [pytest.param(2**24 + 1, id="once"), pytest.param(5 * 2**24 + 1, id="five times", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("live", [False, True], ids=["files", "ports"])
def test_one_stream_is_out_and_the_other_goes_on(outages, distance, live):
    """Files are waited for, of ports the iterations are decided while one is silent: the outcome is the same."""
    case = OneOut(outages, distance, random.Random(distance))
    taken, decided = Taken(outages, case.shown), {}
    if live:
        published(taken, case.shown, case.before, live)
        decided = jobs.drain(taken.stages, taken.slots, 10**7, lambda: taken.slots.settled_next >= case.last_before)
    published(taken, case.shown, None, live)
    decided |= taken.decided()
    for ring, (frames, _) in zip(taken.rings, case.shown.values(), strict=True):
        rows = [ring.record(index)[0] for index in range(len(frames))]
        placed = [pair for pair in zip(rows, frames, strict=True) if int(pair[0]["verdict"]) in PLACED]
        assert all(int(row["iteration"]) == frame.iteration for row, frame in placed if outages.told(row))
    both, other = carried(outages, case.out) | carried(outages, case.other), carried(outages, case.other)
    for iteration, (state, reason, missing, data) in decided.items():
        if iteration == 0:
            continue
        there = both.copy()
        for begin, end in missing:
            there[begin:end] = False
        right = np.frombuffer(gradient(outages, iteration), np.uint8)
        assert (np.frombuffer(data, np.uint8)[there] == right[there]).all(), iteration
        if state == WHOLE:
            assert iteration <= case.cut or iteration >= case.back
        elif case.cut < iteration < case.back:
            assert reason == MISSING and not (there & ~other).any()
            assert iteration not in case.firm or (there == other).all(), iteration
    whole = {iteration for iteration, row in decided.items() if row[0] == WHOLE}
    assert set(range(1, case.cut)) | set(range(case.back + 2, case.last + 1)) <= whole
    # With LL128 and so few elements an edge may carry nothing of the sum.
    assert case.firm <= set(decided) or not other.any()


@pytest.mark.slow
@pytest.mark.parametrize("outages", ["ll", "simple"], indirect=True)
def test_what_is_said_of_iterations_that_one_stream_missed(outages, tmp_path):
    case = OneOut(outages, 2**24 + 1, random.Random(7))
    taken = Taken(outages, case.shown)
    with contextlib.closing(Updater(outages.plan, taken.slots, tmp_path / "out")) as updater:
        while sum(stage.poll() for stage in taken.stages) + updater.poll() or not updater.finished:
            pass
    directory = Directory(tmp_path / "out")
    rows = {row.number: row for row in directory.iterations}
    assert sorted(rows) == list(range(1, case.last + 1))
    # The buckets one behind the other, as ranges are told.
    flat = np.concatenate([carried(outages, case.other)[begin:end] for begin, end in outages.plan.slot_ranges(1)])
    edges = np.flatnonzero(np.diff(np.concatenate(([0], 1 - flat.view(np.int8), [0])))).reshape(-1, 2).tolist()
    size, placed = len(flat), int(flat.sum())
    nothing = {"bytes": size, "placed_bytes": 0, "missing": [[0, size]], "reason": "missing"}
    for number in range(case.cut + 1, case.back):
        row = rows[number]
        assert row.state == "incomplete"
        if number in case.firm:
            assert directory.facts(row) == nothing | {"placed_bytes": placed, "missing": edges}
            assert directory.sources(row) == [size - placed, placed, 0, 0]
        elif number not in case.seen:
            assert directory.facts(row) == nothing
    for number in (*range(1, case.cut), *range(case.back + 2, case.last + 1)):
        assert rows[number].state == "whole" and directory.slot(number)[0].tobytes() == gradient(outages, number)
