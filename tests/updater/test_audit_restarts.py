# SPDX-License-Identifier: MIT
"""Audits and restarts, and audits and a full disk: each is made, and noted once, and nothing steps past an alarm."""

import errno
import random
import tempfile
import time
from pathlib import Path

import pytest

from flowcheck.errors import RestoreError
from tests.jobs import settled
from tests.pipeline.recordings import same
from tests.updater import power
from tests.updater.audited import Run, give, make_plan, notes, states
from updater.directory import Directory
from updater.durable import Disk
from updater.listing import listing
from updater.restore import restore
from updater.verify import verify

LAST, FLIPPED_AFTER = 26, 9


@pytest.fixture
def shm():
    """A folder in memory: many directories are laid there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def meddled(ranks, **rules):
    """Return a run in which a bit of these ranks flips after an iteration: audits show it from iteration 12 on."""

    def meddle(iteration, trainers):
        if iteration == FLIPPED_AFTER:
            for rank in ranks:
                trainers[rank].flip(("c", "value"), 201, 4)

    run = Run(make_plan(options={"lr": 0.01, "betas": [0.8, 0.95]}, every=4, checkpoints=rules), LAST, meddle)
    shown = {iteration for iteration, off in run.off.items() if off}
    assert shown == {12, 16, 20, 24} and set(run.off) == {1, 2, 3, 4, 8} | shown
    return run


RIGHT = [(iteration, "right", []) for iteration in (1, 2, 3, 4, 8)]
ONE_RANK = RIGHT + [(iteration, "rank", [1]) for iteration in (12, 16, 20, 24)]
EVERY_RANK = [*RIGHT, (12, "diverged", [None])]
CASES = pytest.mark.parametrize(
    ("ranks", "expected", "committed"), [({1}, ONE_RANK, LAST), ({0, 1, 2}, EVERY_RANK, 11)], ids=["one", "every"]
)


def logged_while_behind(run, folder, **options):
    """Leave a directory whose log has all, audits up to iteration 8, and return its updater before it has stepped any more."""
    first = run.shadow(folder)
    first.bring(10)
    first.leave()
    later = run.shadow(folder, 11, LAST, **options)
    while later.slots.consumed_next <= LAST:
        assert later.updater.poll()
        assert later.updater.reached < 11
    return later


@CASES
def test_an_audit_of_a_state_that_is_behind_is_made_up_for_once(shm, ranks, expected, committed):
    run = meddled(ranks)
    shadow = logged_while_behind(run, shm)
    assert notes(shadow.out) == RIGHT and listing(shadow.out)["audited_to"] == 7
    shadow.settle()
    assert notes(shadow.out) == expected
    alarms = listing(shadow.out)["alarms"]
    assert (alarms[0]["iteration"], alarms[0]["audited_to"]) == (12, 7)
    shadow.leave()
    for _ in range(2):
        again = run.shadow(shm, LAST + 1)
        again.settle()
        assert notes(again.out) == expected and listing(again.out)["alarms"] == alarms
        again.leave()
    assert [i for i, state in states(shadow.out).items() if state == "committed"] == list(range(1, committed + 1))
    assert same(restore(shadow.out), run.truth[committed]) == []


def test_a_state_that_is_behind_leaves_snapshots_on_its_way(shm):
    """Else an updater that is killed before it has caught up begins where it began before, each time."""
    last = 300
    run = Run(make_plan(checkpoints={"snapshot_iterations": 5}), last)
    shadow = run.shadow(shm)
    shadow.bring(10)
    shadow.leave()
    known = max(listing(shadow.out)["snapshots"])
    later = run.shadow(shm, 11, last)
    later.until(lambda: later.slots.consumed_next > last)
    assert later.updater.reached < 30
    while max(found := listing(later.out)["snapshots"]) == known:
        time.sleep(0.02)  # the process that writes it needs time to begin
        assert later.updater.poll()
    assert later.updater.reached < last
    later.leave()
    again = run.shadow(shm, last + 1)
    again.settle()
    again.slots.ended = 1
    again.end()
    for iteration in (*found, last):
        assert same(restore(again.out, iteration), run.truth[iteration]) == []
    assert verify(again.out)["problems"] == []


def lacking_record(slots, plan, iteration):
    """Have slots lack the step record of an iteration, whose words the next one's repeats, but not its digests."""
    content, low_high = slots.gradient, slice(*plan.record_range(plan.revision(iteration)))

    def gradient(number):
        found = content(number)
        if number == iteration:
            found[low_high] = 0
        return found

    slots.gradient = gradient
    slots.slot = lambda number: settled(number, incomplete=number == iteration)
    slots.missing = lambda number: [(low_high.start, low_high.stop)] if number == iteration else []


def test_a_record_that_was_repeated_without_its_digests_is_no_alarm_at_the_next_start(shm):
    run = Run(make_plan(every=4), LAST)
    shadow = run.shadow(shm)
    lacking_record(shadow.slots, run.plan, 12)
    shadow.bring(11)
    shadow.slots.settled_next = 14
    shadow.until(lambda: shadow.slots.consumed_next > 13)
    shadow.bring(LAST)
    shadow.leave()
    audited = [(iteration, "right", []) for iteration in (1, 2, 3, 4, 8, 16, 20, 24)]
    assert notes(shadow.out) == audited
    again = run.shadow(shm, LAST + 1)
    again.settle()
    again.leave()
    assert notes(again.out) == audited and listing(again.out)["alarms"] == []
    assert [i for i, state in states(again.out).items() if state == "committed"] == list(range(1, LAST + 1))
    for iteration in (11, 12, LAST):
        assert same(restore(again.out, iteration), run.truth[iteration]) == []


def test_a_shadow_left_while_it_is_behind_makes_up_for_the_rest_at_the_next_start(shm):
    run = meddled({1})
    shadow = logged_while_behind(run, shm)
    while shadow.updater.reached < 14:
        assert shadow.updater.poll()
    assert notes(shadow.out) == ONE_RANK[:6]
    shadow.leave()
    again = run.shadow(shm, LAST + 1)
    again.settle()
    assert notes(again.out) == ONE_RANK
    again.leave()


@CASES
@pytest.mark.parametrize("kept", [10, 100])
def test_what_is_brought_again_is_not_audited_again_nor_stepped_past_an_alarm(shm, ranks, expected, committed, kept):
    """A replay begins with empty slots each time: over a directory that has all of it already, or the first half."""
    run = meddled(ranks, snapshot_iterations=7)
    for last in (kept, LAST, LAST):
        shadow = run.shadow(shm, settled=min(last, LAST))
        shadow.bring(min(last, LAST))
        shadow.end() if last >= LAST else shadow.leave()
    assert notes(shadow.out) == expected
    assert [i for i, state in states(shadow.out).items() if state == "committed"] == list(range(1, committed + 1))
    assert same(restore(shadow.out), run.truth[committed]) == []


class Full(Disk):
    """A disk that is full, until it is not."""

    full = False

    def write(self, fd, pieces, offset):
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        return super().write(fd, pieces, offset)


@pytest.fixture
def full():
    with power.in_place(Full()) as disk:
        yield disk


def polled(shadow, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not shadow.updater.poll():
            time.sleep(0.001)


def test_no_base_is_taken_before_the_log_says_that_the_state_is_no_ranks(shm, full):
    """Else what the diverged state was stepped by would count as committed."""
    run, bases = meddled({0, 1, 2}), shm / "states"
    shadow = run.shadow(shm, bases=[bases])
    shadow.bring(11)
    full.full = True
    shadow.slots.settled_next = 14
    shadow.until(lambda: shadow.slots.volatile_from == 12)
    give(run.ranks[13], 13, bases)
    polled(shadow, 0.5)
    assert notes(shadow.out) == RIGHT and not shadow.updater.counters()["bases"] and shadow.updater.reached == 11
    full.full = False
    shadow.bring(13)
    shadow.until(lambda: shadow.updater.counters()["bases"])
    shadow.bring(LAST)
    shadow.end()
    assert notes(shadow.out) == [*EVERY_RANK, *((i, "right", []) for i in (16, 20, 24))]
    expected = {i: "superseded" if i in (12, 13) else "committed" for i in range(1, LAST + 1)}
    assert states(shadow.out) == expected
    assert same(restore(shadow.out, 11), run.truth[11]) == [] and same(restore(shadow.out), run.ranks[LAST]) == []
    with pytest.raises(RestoreError, match="12"):
        restore(shadow.out, 12)


@pytest.mark.parametrize("base", [None, 12, 13])
def test_a_state_that_diverges_while_the_disk_takes_nothing_does_not_stop_the_log(shm, full, base):
    run, bases = meddled({0, 1, 2}), shm / "states"
    shadow = run.shadow(shm, bases=[bases])
    shadow.bring(8)
    full.full = True
    shadow.slots.settled_next = 15
    shadow.until(lambda: shadow.updater.reached == 11)
    if base:
        give(run.ranks[base], base, bases)
        shadow.until(lambda: shadow.updater.counters()["bases"])
    full.full = False
    shadow.bring(19)
    expected = {i: "committed" if i < 9 else "volatile" if i < 12 else "waiting" for i in range(1, 20)}
    if base is None:
        assert states(shadow.out) == expected and notes(shadow.out) == EVERY_RANK
        base = 18
        give(run.ranks[base], base, bases)
        shadow.until(lambda: shadow.updater.counters()["bases"])
    shadow.bring(LAST)
    shadow.end()
    found = states(shadow.out)
    assert {i for i in found if found[i] == "committed"} <= {*range(1, 9), *range(base + 1, LAST + 1)}
    for iteration in Directory(shadow.out).restorable():
        truth = run.truth if iteration < 12 else run.ranks
        assert same(restore(shadow.out, iteration), truth[iteration]) == [], iteration
    assert restore(shadow.out)["iteration"] == LAST


def test_an_alarm_that_cannot_be_noted_while_behind_is_noted_when_the_disk_takes_it(shm, full):
    run, bases = meddled({0, 1, 2}), shm / "states"
    shadow = logged_while_behind(run, shm, bases=[bases])
    full.full = True
    give(run.ranks[20], 20, bases)
    polled(shadow, 0.5)
    assert notes(shadow.out) == RIGHT and not shadow.updater.counters()["bases"] and shadow.updater.reached == 11
    full.full = False
    shadow.until(lambda: shadow.updater.counters()["bases"])
    shadow.settle()
    shadow.end()
    assert notes(shadow.out) == [*EVERY_RANK, (24, "right", [])]
    expected = {i: "superseded" if 12 <= i <= 20 else "committed" for i in range(1, LAST + 1)}
    assert states(shadow.out) == expected and same(restore(shadow.out), run.ranks[LAST]) == []


def killed_everywhere(run, expected, committed, root, one_in=1):
    """Cut a run short after every operation on the disk, go on with what is left, and hold the end against what it must be.

    With `one_in`, only at one place in so many, and wherever the note of an alarm is there and what follows it is not.
    """
    with power.in_place(power.RecordingDisk(root)) as disk:
        for first, last in ((1, 14), (15, 18)):
            shadow = run.shadow(root, first)
            shadow.slots.given_back = lambda consumed_next: disk.trace.mark("given back", {consumed_next - 1})
            shadow.bring(last)
            shadow.leave()
    seen = set()
    for number, cut in enumerate(power.cuts(disk.trace, random.Random(1))):
        place, operation, what, image, marks = cut
        noted = what == "nothing lost" and isinstance(operation, power.Write) and b'"rank"' in operation.content
        if number % one_in and not noted:
            continue
        # Slots go on where they were, or begin anew, as after a power cut or in a replay.
        firsts = {1, max(marks.get("given back", {0})) + 1} if what == "nothing lost" else {1}
        for first in {(power.digest(image), first) for first in firsts} - seen:
            seen.add(first)
            about = f"after operation {place}, {operation}; {what}; slots from {first[1]}"
            with tempfile.TemporaryDirectory(dir="/dev/shm") as name, power.in_place(Disk()):
                power.lay(image, Path(name))
                shadow = run.shadow(Path(name), first[1])
                shadow.settle()
                shadow.bring(LAST)
                shadow.end()
                assert notes(shadow.out) == expected, about
                found = [i for i, state in states(shadow.out).items() if state == "committed"]
                assert found == list(range(1, committed + 1)), about
                assert same(restore(shadow.out), run.truth[committed]) == [], about
    return len(seen)


@CASES
def test_some_kills_lose_no_audit_and_repeat_none(shm, ranks, expected, committed):
    assert killed_everywhere(meddled(ranks, snapshot_iterations=5), expected, committed, shm, one_in=200) > 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
@CASES
def test_no_kill_loses_an_audit_or_repeats_one(shm, ranks, expected, committed):
    assert killed_everywhere(meddled(ranks, snapshot_iterations=5), expected, committed, shm) > 200
