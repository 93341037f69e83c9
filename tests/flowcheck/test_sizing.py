# SPDX-License-Identifier: MIT
"""The probability of an unrepairable iteration: against approximations, against enumeration, and against lossy replays.

A replay takes the frames of a recorded job, leaves each out with the given probability, and has the real parser, extractor
and decisions say which iterations could not be committed.
"""

import contextlib
import itertools
import json
import math
import random
from collections import Counter

import pytest
from scapy.utils import RawPcapNgReader

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from flowcheck.ring import PacketRing
from flowcheck.sizing import Cluster, _uncovered, describe, unrepairable
from flowcheck.slots import SlotFile
from packet_parser.parser import Parser
from tests import jobs
from tests.commands import flowcheck
from tests.pipeline.recordings import recorded
from updater.decision import Decisions

RANKS, ITERATIONS, PARAMETERS = 4, 42, 1200
#: Which links are mirrored where two or three are, and the rates of loss then.
LINKS = {2: (0, 3), 3: (0, 1, 3)}
RATES = {2: (0.01, 0.04), 3: (0.06, 0.12)}
#: With these, all of 24 rates (six jobs, two numbers of links, two rates) lie in their intervals with 95 %.
DEVIATIONS = 3.07
#: Of the frames before, nothing is lost: the flows are synchronised, as they are in the middle of a job.
FIRST_LOSSY = 3


def frames_of(folder):
    """Return the frames of each stream of a recorded job, by its name."""
    out = {}
    for stream in plans.load(folder / "plan.json").shard.streams:
        with contextlib.closing(RawPcapNgReader(str(folder / f"{stream.name}.pcapng"))) as reader:
            out[stream.name] = [bytes(frame) for frame, _ in reader]
    return out


def begin_of_iteration(folder, plan, frames, iteration):
    """Return per stream the number of the first frame that the parser says is of this iteration or a later one."""
    out = {}
    for name, every in frames.items():
        ring = jobs.ring_of(folder, plan, every, name)
        parser = Parser(ring, plan, name)
        while not parser.finished:
            parser.poll()
        out[name] = next(n for n in range(len(every)) if ring.record(n)["iteration"][0] >= iteration)
        parser.close()
        ring.close()
        ring.path.unlink()
    return out


class Lossy:
    """A recorded job, to be replayed with frames left out."""

    def __init__(self, folder, scratch):
        self.plan, self.scratch = plans.load(folder / "plan.json"), scratch
        self.frames = frames_of(folder)
        self.begin = begin_of_iteration(scratch, self.plan, self.frames, FIRST_LOSSY)
        self.runs = 0

    def replay(self, loss, rng):
        """Leave frames out; return for each iteration from FIRST_LOSSY to the last but one whether it can be committed."""
        scratch = self.scratch / str(self.runs)
        scratch.mkdir()
        self.runs += 1
        rings, stages = [], []
        for name, frames in self.frames.items():
            begin = self.begin[name]
            kept = frames[:begin] + [frame for frame in frames[begin:] if rng.random() >= loss]
            rings.append(jobs.ring_of(scratch, self.plan, kept, name))
            stages.append(Parser(rings[-1], self.plan, name))
        slots = jobs.slots_of(scratch, self.plan)
        stages.append(Extractor(rings, self.plan, slots))
        decisions, whole = Decisions(self.plan, slots), {}
        while not stages[-1].finished or slots.consumed_next < slots.settled_next:
            for stage in stages:
                stage.poll()
            while (number := slots.consumed_next) < slots.settled_next and not decisions.awaits_record(number):
                if number:
                    whole[number] = decisions.decide(number).whole
                slots.consumed_next = number + 1
        self.counters = stages[-1].counters()
        for ring in rings:
            ring.path.unlink()
        slots.path.unlink()
        return [whole[number] for number in range(FIRST_LOSSY, ITERATIONS)]

    def lost(self, loss, trials, seed):
        """Return how many of at least `trials` iterations could not be committed, and of how many."""
        rng, seen = random.Random(seed), []
        while len(seen) < trials:
            seen += self.replay(loss, rng)
        return seen.count(False), len(seen)


def restricted(folder, links, into):
    """Return a folder in `into` with the same job of which only some links are mirrored."""
    plan = json.loads((folder / "plan.json").read_text())
    streams = plan["shards"][0]["streams"]
    plan["shards"][0]["streams"] = [stream for stream in streams if stream["links"][0] in links]
    out = into / "-".join(map(str, ["links", *links]))
    out.mkdir()
    (out / "plan.json").write_text(json.dumps(plan))
    for link in links:
        (out / f"link-{link}.pcapng").hardlink_to(folder / f"link-{link}.pcapng")
    return out


def check_rate(lossy, loss, trials, seed):
    """The exact probability lies in the interval of the measured rate (normal; both counts are tens at least)."""
    exact = unrepairable(lossy.plan, loss)
    lost, of = lossy.lost(loss, trials, seed)
    assert abs(lost / of - exact) <= DEVIATIONS * math.sqrt(exact * (1 - exact) / of), (lost, of, exact)


def check_rates(tmp_path, trials, **options):
    """Check a job of four ranks over two and three mirrored edges, at two rates each."""
    folder = tmp_path / "job"
    options |= {"ranks": RANKS, "iterations": ITERATIONS, "parameters": PARAMETERS, "mtu": 512, "links": LINKS[3]}
    recorded(folder, truth="none", **options)
    for edges, rates in RATES.items():
        scratch = tmp_path / f"scratch-{edges}"
        scratch.mkdir()
        lossy = Lossy(restricted(folder, LINKS[edges], tmp_path), scratch)
        for seed, loss in enumerate(rates):
            check_rate(lossy, loss, trials, seed)


def test_measured_rates_of_a_small_job_agree(tmp_path):
    check_rates(tmp_path, 200, protocol="simple", hook=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hook"])
@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
def test_measured_rates_agree(tmp_path, protocol, hook):
    check_rates(tmp_path, 2000, protocol=protocol, hook=hook)


def test_the_exact_sweep_equals_an_enumeration_of_what_is_lost():
    rng = random.Random(1)
    for _ in range(60):
        frames = Counter()
        for _ in range(rng.randint(1, 7)):
            cuts = sorted(rng.sample(range(13), rng.choice([2, 4])))
            frames[tuple(itertools.pairwise(cuts))[::2]] += 1
        needed = tuple(sorted(rng.sample(range(13), 2)))
        loss, total = rng.random(), 0.0
        every = list(frames.elements())
        for arrives in itertools.product((False, True), repeat=len(every)):
            units = {
                u for frame, there in zip(every, arrives, strict=True) if there for a, b in frame for u in range(a, b)
            }
            if not set(range(*needed)) <= units:
                total += math.prod(1 - loss if there else loss for there in arrives)
        assert _uncovered(frames, needed, loss) == pytest.approx(total, abs=1e-12)


def planned(streams, **options):
    options = {"ranks": 8, "parameters": 4_000_000, "protocol": "simple", "mtu": 1024, "record": False} | options
    return describe(Cluster(streams=streams, **options))


@pytest.mark.parametrize("protocol, payload", [("simple", 1024), ("ll", 512), ("ll128", 960)])
def test_it_is_about_what_a_count_of_frames_says(protocol, payload):
    """Of n chunks two edges show two once, three edges three twice; the rest comes more often."""
    frames = 16_000_000 / payload
    for streams, power in ((2, 1), (3, 2)):
        loss = 1e-9 if power == 1 else 1e-5
        expected = frames * streams / 8 * loss**power
        # Chunks do not fill their last packet.
        assert unrepairable(planned(streams, protocol=protocol), loss) == pytest.approx(expected, rel=0.1)


def test_one_edge_never_has_every_byte():
    assert unrepairable(planned(1), 0) == 1


def test_nothing_lost_is_nothing_unrepairable():
    assert unrepairable(planned(2), 0) == 0
    assert unrepairable(planned(2), 1) == 1


def test_a_step_record_costs_little_where_it_is_repeated():
    without, with_record = (unrepairable(planned(2, record=record), 1e-6) for record in (False, True))
    assert without < with_record < without * 1.001


def test_a_second_port_of_an_edge_is_a_second_chance():
    plan = planned(2)
    document = json.loads(plan.canonical())
    document["shards"][0]["streams"] += [
        {"name": f"again-{n}", "links": stream["links"]} for n, stream in enumerate(document["shards"][0]["streams"])
    ]
    twice = plans.parse(json.dumps(document))
    assert unrepairable(twice, 1e-4) == pytest.approx(unrepairable(plan, 1e-8), rel=1e-3)


def test_what_is_no_probability_is_refused():
    with pytest.raises(ConfigError, match="expected a probability"):
        unrepairable(planned(2), 1.5)


def test_the_command_prints_what_the_functions_say():
    words = ("size", "--params", 1_000_000, "--ranks", 4, "--loss", 1e-4, "--step-seconds", 0.5, "--optimizer", "Adam")
    report = json.loads(flowcheck(*words, "--json"))
    plan = describe(Cluster(parameters=1_000_000, ranks=4))
    assert report["unrepairable"] == unrepairable(plan, 1e-4)
    assert report["iterations_between_losses"] == 1 / report["unrepairable"]
    assert [stream["edges"] for stream in report["streams"]] == [[1], [3]] and report["ports"] == 2
    assert report["memory"]["state"] == 12_000_000  # parameters and Adam's two moments, four bytes each
    assert report["disk"]["log_per_iteration"] >= report["gradient_bytes"] == 4_000_000
    assert report["disk"]["per_hour"] >= 7200 * 4_000_000
    # A ring's edge carries 2 (n - 1) / n of the gradient, in packets of at most 4096 bytes.
    assert all(
        stream["data_frames"] >= 6_000_000 / 4096 and stream["bytes"] > 6_000_000 for stream in report["streams"]
    )
    assert f"{report['unrepairable']:.3g}" in flowcheck(*words)


def test_what_size_says_of_files_is_what_is_made(tmp_path):
    plan = describe(Cluster(parameters=1_000_000, ranks=4))
    with PacketRing.for_stream(tmp_path / "ring", plan, "link-3") as ring:
        assert PacketRing.bytes_for(plan, "link-3") == ring.path.stat().st_size
    with SlotFile.for_plan(tmp_path / "slots", plan) as slots:
        assert SlotFile.bytes_for(plan) == slots.path.stat().st_size


@pytest.mark.parametrize(
    "words, problem",
    [
        (("--optimizer", "LBFGS"), "expected one of"),
        (("--nccl", "2.99"), "2.12 to 2.30"),
        (("--streams", "5"), "expected 1 to 4 edges"),
    ],
)
def test_a_job_that_cannot_be_is_refused(words, problem):
    assert problem in flowcheck("size", "--params", 1000, "--ranks", 4, *words, status=3)
