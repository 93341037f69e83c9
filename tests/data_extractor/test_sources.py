# SPDX-License-Identifier: MIT
"""Over how many edges each byte came, and streams of one ring at any edges, cut anywhere.

What an edge brings is known from a run with its stream alone, from the bytes that are missing then; the counts of a run with
several must be the sums of those.
"""

import random

import numpy as np
import pytest

from data_extractor.extractor import Extractor
from flowcheck import _atomics
from flowcheck.formats import RING_HEADER
from flowcheck.layout import single_sources
from flowcheck.ring import PacketRing
from tests.rings import RingJob, settled, stages, what

WHOLE = 2
RANKS = 8


def links_of(streams):
    return {name: (int(name.split("-")[1]),) for name in streams}


def alone(folder, job, frames):
    """Return, per stream, what a run with it alone covers of each iteration."""
    out = {}
    for name, some in frames.items():
        found = settled(folder / f"alone-{name}", job.plan(links_of([name])), {name: some})
        out[name] = {number: covered for number, (_, _, covered, _) in found.items()}
    return out


def check(job, found, coverage):
    """Every iteration has the sources, and the missing bytes, that the streams alone say; and the bytes of the job."""
    size, numbers = 4 * job.elements, {number for each in coverage.values() for number in each}
    assert set(found) >= numbers
    for number, (state, data, covered, sources) in found.items():
        counts = sum(each.get(number, np.zeros(size, bool)).astype(int) for each in coverage.values())
        assert sources == np.bincount(np.minimum(counts, 3), minlength=4).tolist()
        assert (covered == (counts > 0)).all() and (state == WHOLE) == covered.all()
        truth = np.frombuffer(job.gradients[number], np.uint8)
        assert (np.frombuffer(data, np.uint8) == truth)[covered].all()


@pytest.fixture(scope="module", params=["ll", "simple", "ll128"])
def job(request, tmp_path_factory):
    return RingJob(tmp_path_factory.mktemp("job"), range(RANKS), ranks=RANKS, protocol=request.param, channels=2)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_streams_cut_anywhere_bring_what_they_cover(tmp_path, job, count):
    rng = random.Random(count)
    frames = {}
    for link in rng.sample(range(RANKS), count):
        every = job.frames[link]
        cuts = sorted(rng.sample(range(len(every)), 2)) if rng.random() < 0.5 else (0, len(every))
        frames[f"link-{link}"] = every[slice(*cuts)]
    found = settled(tmp_path / "all", job.plan(links_of(frames)), frames)
    check(job, found, alone(tmp_path, job, frames))


def test_losses_and_repeats_count_by_edge(tmp_path, job):
    """What is lost on an edge is not its source; a frame that comes again is no second one."""
    rng = random.Random(1)
    frames = {}
    for link in (0, 3, 4):
        kept = [frame for frame in job.frames[link] if rng.random() > 0.1]
        frames[f"link-{link}"] = [frame for frame in kept for _ in range(1 + (rng.random() < 0.2))]
    found = settled(tmp_path / "all", job.plan(links_of(frames)), frames)
    check(job, found, alone(tmp_path, job, frames))


def test_an_edge_at_two_ports_is_one_source(tmp_path, job):
    names = {"link-1": (1,), "link-5": (5,)}
    frames = {name: job.frames[link] for name, (link,) in names.items()}
    once = settled(tmp_path / "once", job.plan(names), frames)
    twice = settled(tmp_path / "twice", job.plan({**names, "again": (1,)}), {**frames, "again": frames["link-1"]})
    assert [row[3] for row in twice.values()] == [row[3] for row in once.values()]
    # Where one port loses a frame that the other has, the edge has brought it all the same.
    holes = {"link-1": frames["link-1"][::2], "link-5": frames["link-5"], "again": frames["link-1"]}
    assert [row[3] for row in settled(tmp_path / "holes", job.plan({**names, "again": (1,)}), holes).values()] == [
        row[3] for row in once.values()
    ]


def test_what_one_edge_alone_carries_is_listed(tmp_path, job):
    """The ranges are those that are missing without that edge."""
    names = ["link-7", "link-0", "link-2"]
    frames = {name: job.frames[int(name[5:])] for name in names}
    for shown in (names, names[:2]):
        plan = job.plan(links_of(shown))
        without = {}
        for name in shown:
            rest = {other: frames[other] for other in shown if other != name}
            found = settled(tmp_path / f"{len(shown)}-{name}", job.plan(links_of(rest)), rest)
            without[int(name[5:])] = ~found[3][2]
        listed = {edge: np.zeros(4 * job.elements, bool) for edge in without}
        for begin, end, edge in single_sources(plan, plan.shard.revisions[0]):
            listed[edge][begin:end] = True
        assert all((listed[edge] == missing).all() for edge, missing in without.items())
        assert any(missing.any() for missing in without.values()) == (len(shown) == 2)


@pytest.mark.parametrize("seed", range(3))
def test_started_again_at_any_record_it_counts_the_same(tmp_path, job, seed):
    rng = random.Random(seed)
    names = links_of(["link-0", "link-3", "link-7"])
    plan, size = job.plan(names), 4 * job.elements
    frames = {name: [f for f in job.frames[link] if rng.random() > 0.05] for name, (link,) in names.items()}
    expected = settled(tmp_path / "whole", plan, frames)
    loops, slots = stages(tmp_path / "again", plan, frames)
    for parser in loops[:-1]:
        while not parser.finished:
            parser.poll()
    rings = [PacketRing.open(tmp_path / "again" / f"{name}.ring") for name in names]
    found = {}
    for _ in range(10_000):
        extractor = Extractor(rings, plan, slots)
        extractor.poll()
        if extractor.finished:
            break
        for ring in rings:
            header = np.frombuffer(ring.memory, RING_HEADER, 1)[0]
            offset, copy = int(header["extract_state_offset"]), int(header["extract_state_bytes"])
            numbers = [_atomics.load(ring.memory, offset + copy * i) for i in range(2)]
            if min(numbers) > 0 and rng.random() < 0.5:
                _atomics.store(ring.memory, offset + copy * int(np.argmax(numbers)), 0)
        while rng.random() < 0.5 and slots.consumed_next < slots.settled_next:
            found[slots.consumed_next] = what(slots, slots.consumed_next, size)
            slots.consumed_next += 1
    for number in range(slots.consumed_next, slots.settled_next):
        found[number] = what(slots, number, size)
    assert {n: row[3] for n, row in found.items()} == {n: row[3] for n, row in expected.items()}


def test_one_mirrored_edge_needs_no_bitmap(tmp_path, job):
    frames = {"link-4": job.frames[4]}
    found = settled(tmp_path / "one", job.plan(links_of(frames)), frames)
    for _, _, covered, sources in found.values():
        assert sources == [int((~covered).sum()), int(covered.sum()), 0, 0] and covered.any()
