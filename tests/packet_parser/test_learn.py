# SPDX-License-Identifier: MIT
"""Layouts learned from the frames of passes alone, held against the schedules that made the frames."""

import contextlib
import itertools
import json
import random

import numpy as np
import pytest

from flowcheck import plan as plans
from flowcheck import schedule
from flowcheck.errors import ConfigError, LearningError
from flowcheck.layout import compile_programs
from tests.packet_parser.passes import Job, layout, plan_document
from workload_gen.permuted_schedule import PermutedSchedule

WIDTH = {"float64": 8, "float32": 4, "int32": 4, "int64": 8, "bfloat16": 2, "float16": 2}
KINDS = [("float32", 9003), ("bfloat16", 7777), ("float32", 71)]


def agrees(job, learned, kinds, exact=True, ended=True):
    """Hold every table against the schedule: which messages are final, what they and the partial sums carry.

    Not `exact`: a second copy may be shorter than it was. Not `ended`: the frames that end the passes may be lost, and with
    them how many of the empty messages between all-reduces are whose.
    """
    ranks = len(job.layout.ring)
    for kind, operation in zip(kinds, learned.layout["operations"], strict=True):
        dtype, elements = kind
        brought = np.zeros(elements, bool)
        for connection, rows in zip(learned.connections, operation["messages"], strict=True):
            got = np.array(rows, np.int64).reshape(-1, 3)
            where = (job.layout, connection["edge"], connection["channel"])
            want = job.messages.all_reduce(*where, elements, WIDTH[dtype])
            assert len(got) == len(want), (kind, connection)
            if not ended:
                got, want = got[got[:, 1] > 0], want[want["elements"] > 0]
            data = want["elements"] > 0
            final = want["final"] & data
            assert ((got[:, 2] == ranks) == final).all()
            assert (got[final, 0] == want["first"][final]).all()
            assert (got[final, 1] <= want["elements"][final]).all()
            if exact:
                assert (got[final, 1] == want["elements"][final]).all()
            placed = data & (got[:, 0] >= 0)
            assert (got[placed, 0] == want["first"][placed]).all()
            for first, count, _ in got[final].tolist():
                brought[first : first + count] = True
        assert brought.all()


def same_programs(job, learned, buckets):
    """The parser's tables are those of the plan that computes its layout, but for what has no place in a gradient."""
    document = plan_document(job, learned, buckets)
    ours = compile_programs(plans.parse(json.dumps(document)))
    shard = document["shards"][0]
    shard["layout"] = job.layout.model_dump(mode="json", exclude_none=True)
    shard["startup"] = [operation for operation in shard["startup"] if operation["op"] != "raw"]
    for connection in shard["connections"]:
        connection["proof"]["kind"] = "queue_pair"
        connection["start_psn"] = job.start_psn
    theirs = compile_programs(plans.parse(json.dumps(document)))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("data_queue_pairs", "credit_queue_pairs", "sender_rank", "credit", "start_psn", "slot_stride",
                     "encoding", "big_endian_immediate", "clean", "slots"):  # fmt: skip
            assert getattr(one, name) == getattr(other, name), name
        for a, b in zip(one.segments, other.segments, strict=True):
            assert (a == b).all()
        for a, b in zip(one.rows, other.rows, strict=True):
            assert len(a) == len(b)
            for name in a.dtype.names:
                # Of empty messages it does not show, nor does it matter, whether they stand for whole sums.
                data = a["message_wire_bytes"] > 0
                rows = {
                    "verdict": data,
                    "destination": data & (a["verdict"] == 1),
                    "message_bytes": data & (a["verdict"] == 1),
                }
                rows = rows.get(name, slice(None))
                assert (a[name][rows] == b[name][rows]).all(), name


CASES = list(
    itertools.product(
        ("ll", "ll128", "simple"), (2, 3, 5), (1, 2), (1, 2), ("2.17", "2.19", "2.21", "2.24", "2.30"),
        ("last", "next", "once"),
    )
)  # fmt: skip


@pytest.mark.parametrize("case", random.Random(5).sample(CASES, 60), ids=lambda case: "-".join(map(str, case)))
def test_learned_and_modelled_layouts_agree(case):
    protocol, ranks, channels, queue_pairs, version, tails = case
    links = {2: (0, 1), 3: (0, 2), 5: (1, 2)}[ranks]
    job = Job(layout(protocol, ranks, channels, queue_pairs, version), links, tails=tails)
    for number in range(2):
        job.round(KINDS, number)
    learned = job.learned()
    agrees(job, learned, KINDS)
    same_programs(job, learned, KINDS)


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_learned_and_modelled_layouts_agree_widely(case):
    test_learned_and_modelled_layouts_agree(case)


@pytest.mark.parametrize(
    "more",
    [
        {"queue_pairs": 8, "version": "2.30", "protocol": "simple"},
        {"queue_pairs": 8, "version": "2.24", "split_queue_pairs": True},
        {"queue_pairs": 4, "version": "2.29.3", "split_queue_pairs": True, "protocol": "ll128"},
        {"queue_pairs": 4, "version": "2.20", "protocol": "ll128"},
        {"version": "2.13", "adaptive_routing": True},
        {"queue_pairs": 2, "version": "2.18", "adaptive_routing": True, "protocol": "simple", "mtu": 256},
        {"ring": (2, 0, 3, 1), "ranks": 4, "mtu": 4096, "version": "2.23", "protocol": "simple"},
    ],
    ids=str,
)  # fmt: skip
def test_framing_is_found(more):
    shape = layout(**more)
    kinds = [("float32", 70_001), ("float32", 9001)]
    job = Job(shape, tuple(range(len(shape.ring)))[:2], ip=4, start_psn=2**24 - 5)
    for number in range(2):
        job.round(kinds, number)
    learned = job.learned()
    agrees(job, learned, kinds)
    same_programs(job, learned, kinds)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int64"])
def test_every_dtype(dtype):
    kinds = [(dtype, 4099)]
    job = Job(layout("ll128", 3), (0, 1))
    job.round(kinds, 0)
    agrees(job, job.learned(), kinds)


def test_more_ranks_than_the_dtype_counts():
    kinds = [("bfloat16", 3000)]
    job = Job(layout("ll", 130, version="2.24"), (0, 64))
    job.round(kinds, 0)
    assert sum(step.sort == "who" for step in job.passes) == 2
    agrees(job, job.learned(), kinds)


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_schedule_that_no_library_has(monkeypatch, protocol, ranks):
    job = Job(layout(protocol, ranks, channels=2, version="2.24"), (0, 1), messages=PermutedSchedule(7))
    kinds = [("float32", 20_011), ("bfloat16", 9001)]
    for number in range(2):
        job.round(kinds, number)
    for name in ("all_reduce", "broadcast", "all_gather", "last_partial_sums", "_loops"):
        monkeypatch.setattr(schedule, name, lambda *_: pytest.fail("the modelled layout was asked"))
    learned = job.learned()
    monkeypatch.undo()
    agrees(job, learned, kinds, exact=False)


def test_the_modelled_schedule_is_never_asked(monkeypatch):
    job = Job(layout("simple", 3, 2), (0, 1))
    for number in range(2):
        job.round(KINDS, number)
    for name in (
        "all_reduce",
        "broadcast",
        "all_gather",
        "last_partial_sums",
        "threads_and_channels",
        "_loops",
        "_slices",
    ):
        monkeypatch.setattr(schedule, name, lambda *_: pytest.fail("the modelled layout was asked"))
    learned = job.learned()
    monkeypatch.undo()
    agrees(job, learned, KINDS)


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
def test_other_traffic_before_the_passes_is_listed(protocol):
    job = Job(layout(protocol, 3, 2, 2, "2.24"), (0, 1))
    job.broadcast(20_000)
    job.broadcast(33, seed=1)
    for number in range(2):
        job.round(KINDS, number)
    learned = job.learned()
    assert [operation["op"] for operation in learned.startup][:2] == ["raw", "all_reduce"]
    agrees(job, learned, KINDS)
    # What was sent before the passes is counted in, whatever it was.
    modelled = [
        {"op": "broadcast", "dtype": "float32", "elements": 20_000},
        {"op": "broadcast", "dtype": "float32", "elements": 33},
    ]
    document = plan_document(job, learned, KINDS)
    ours = compile_programs(plans.parse(json.dumps(document)))
    shard = document["shards"][0]
    shard["layout"] = job.layout.model_dump(mode="json", exclude_none=True)
    shard["startup"] = modelled + shard["startup"][1:]
    for connection in shard["connections"]:
        connection["proof"]["kind"] = "queue_pair"
    theirs = compile_programs(plans.parse(json.dumps(document)))
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.segments, other.segments, strict=True):
            for name in ("first_psn", "first_message", "period_psn", "period_messages"):
                assert (a[name] == b[name]).all(), name
            assert (a["first_step"] % 8 == b["first_step"] % 8).all()


@pytest.mark.parametrize("protocol", ["ll", "simple"])
def test_the_job_can_be_followed_from_where_the_passes_ended(protocol):
    job = Job(layout(protocol, 3, 2, 2, "2.24"), (0, 1), start_psn=2**24 - 3)
    job.broadcast(2000)
    for number in range(2):
        job.round(KINDS, number)
    learned = job.learned()
    for connection, end in zip(learned.connections, learned.ends, strict=True):
        sent = job.taps[connection["edge"]]._links[connection["channel"]]
        assert end["psn"] == [psn % 2**24 for psn in sent.psn]
        assert (end["message"], end["step"] % 8) == (sent.messages, sent.step % 8)
    learned.startup.clear()
    learned.layout["anchors"] = learned.ends
    compile_programs(plans.parse(json.dumps(plan_document(job, learned, KINDS))))


def test_passes_after_an_iteration_are_listed_for_the_next_revision():
    job = Job(layout("simple", 2, 2, 2, "2.24"))
    job.broadcast(2000)
    first, second = KINDS[:2], [("float32", 4000), ("bfloat16", 12_780)]
    for number in range(2):
        job.round(first, number)
    job.iteration(first, 3)
    job.broadcast(7)
    for number in range(2, 4):
        job.round(second, number)
    learned = job.learned()
    agrees(job, learned, first + second)
    assert [operation["op"] for operation in learned.before][:2] == ["raw", "all_reduce"]
    document = plan_document(job, learned, first)
    document["shards"][0]["revisions"].append({
        "from_iteration": 2,
        "before": learned.before,
        "buckets": [{"dtype": dtype, "elements": elements} for dtype, elements in second],
    })  # fmt: skip
    ours = compile_programs(plans.parse(json.dumps(document)))
    for program in ours:
        messages = {int(s["first_message"][-1]) for s in program.segments}
        sent = job.taps[program.edge]._links[program.channel].messages
        assert messages == {sent}  # the second revision begins where the last pass ended


def spoiled(frames, seed, lost=()):
    """Return frames with repeats, displaced ones, and without those at `lost`."""
    chance = random.Random(seed)
    out = []
    for index, (frame, time_ns) in enumerate(frames):
        if index in lost:
            continue
        out.append((time_ns + chance.choice([0, 0, 0, 2500]), index, frame))
        if chance.random() < 0.05:
            out.append((time_ns + 90_000, index, frame))
    return [(frame, time_ns) for time_ns, _, frame in sorted(out)]


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
@pytest.mark.parametrize("queue_pairs", [1, 2])
def test_repeated_and_displaced_frames(protocol, queue_pairs):
    job = Job(layout(protocol, 3, 1, queue_pairs, "2.24"), (0, 1))
    for number in range(2):
        job.round(KINDS, number)
    learned = job.learned(spoiled(job.frames, 4))
    agrees(job, learned, KINDS)
    same_programs(job, learned, KINDS)


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
@pytest.mark.parametrize("queue_pairs", [1, 2])
def test_a_round_with_holes_is_made_good_by_another(protocol, queue_pairs):
    job = Job(layout(protocol, 3, 1, queue_pairs, "2.24"), (0, 1))
    ends = []
    for number in range(3):
        job.round(KINDS, number)
        ends.append(len(job.frames))
    chance = random.Random(9)
    for holes in (3, 40):
        lost = {chance.randrange(ends[0]) for _ in range(holes)}
        learned = job.learned(spoiled(job.frames, 5, lost))
        agrees(job, learned, KINDS)
        # Where the job goes on does not depend on what was lost.
        both = [plans.parse(json.dumps(plan_document(job, found, KINDS))) for found in (learned, job.learned())]
        for ours, theirs in zip(*map(compile_programs, both), strict=True):
            for a, b, start, other in zip(
                ours.segments, theirs.segments, ours.start_psn, theirs.start_psn, strict=True
            ):
                assert (a["first_message"][-1], a["first_step"][-1] % 8) == (
                    b["first_message"][-1],
                    b["first_step"][-1] % 8,
                )
                assert (start + a["first_psn"][-1]) % 2**24 == (other + b["first_psn"][-1]) % 2**24


def lossy(seed):
    """Return a drawn job of two rounds, and its frames as a bad mirror would show them."""
    chance = random.Random(seed)
    shape = layout(
        chance.choice(["ll", "ll128", "simple"]), chance.choice([2, 3]), chance.choice([1, 2]), chance.choice([1, 2, 4]),
        chance.choice(["2.17", "2.24", "2.30"]),
    )  # fmt: skip
    job = Job(shape, (0, 1), tails=chance.choice(["last", "next"]))
    if chance.random() < 0.5:
        job.broadcast(chance.randrange(1, 5000))
    for number in range(2):
        job.round(KINDS, number)
    part = chance.choice([0.001, 0.003, 0.01, 0.1, 0.5])
    frames = spoiled(job.frames, seed + 1, {index for index in range(len(job.frames)) if chance.random() < part})
    return job, frames[chance.choice([0, 0, len(job.frames) // 3]) :]


@pytest.mark.parametrize(
    "first",
    [60, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 20)), pytest.param(1000, marks=pytest.mark.nightly)],
)
def test_of_a_bad_mirror_nothing_wrong_is_learned(first):
    """Loss is refused by name, or made good; what is learned is right."""
    learned = 0
    for seed in range(first, first + (20 if first < 1000 else 600)):
        job, frames = lossy(seed)
        with contextlib.suppress(LearningError):
            found = job.learned(frames)
            agrees(job, found, KINDS, ended=False)
            learned += 1
    assert learned


def data_frames(job, edge):
    """Return the indices of a link's frames that carry data, in `job.frames`."""
    of_link = {id(frame) for frame, _ in job.taps[edge].frames if len(frame) > 300}
    return [index for index, (frame, _) in enumerate(job.frames) if id(frame) in of_link]


def test_a_hole_in_every_repetition_is_named():
    job = Job(layout("ll", 3), (0, 1))
    lost, begin = set(), 0
    for number in range(2):
        job.round(KINDS, number)
        lost.add(next(index for index in data_frames(job, 1) if index >= begin + 20))
        begin = len(job.frames)
    with pytest.raises(LearningError, match=r"edge 1\).*the all-reduce of 9003 float32 is not shown"):
        job.learned(spoiled(job.frames, 1, lost))


def test_one_link_is_not_enough():
    job = Job(layout("ll", 3), (1,))
    for number in range(2):
        job.round(KINDS, number)
    with pytest.raises(
        LearningError, match="elements of the all-reduce of 9003 float32 are seen fully reduced on no mirrored"
    ):
        job.learned()


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
def test_a_check_pass_that_fails_is_named(protocol):
    job = Job(layout(protocol, 2))
    for number in range(2):
        job.round(KINDS, number)
    passes = [
        step if step.sort != "check" or step.dtype != "bfloat16" else type(step)(step.dtype, step.elements, "check", 50)
        for step in job.passes
    ]
    with pytest.raises(LearningError, match=r"7777 bfloat16 is not shown: .* right in every pass"):
        job.learned(passes=passes)


class Twice:
    """A schedule in which an edge carries an element twice: the second final message begins too early."""

    def all_reduce(self, shape, edge, channel, count, width):
        messages = schedule.all_reduce(shape, edge, channel, count, width).copy()
        final = np.flatnonzero(messages["final"] & (messages["elements"] > 0))
        messages["first"][final[-1]] -= 64
        messages["elements"][final[-1]] += 64
        return messages


def test_an_element_that_an_edge_carries_twice_is_named():
    job = Job(layout("simple", 3, version="2.24"), (2,), messages=Twice())
    for number in range(2):
        job.round([("float32", 30_000)], number)
    with pytest.raises(LearningError, match="edge 2: two messages of the all-reduce of 30000 float32 carry element"):
        job.learned()


def test_nothing_is_learned_without_credits_or_passes():
    job = Job(layout("ll", 2))
    job.round(KINDS, 0)
    data_only = [(frame, time_ns) for frame, time_ns in job.frames if len(frame) > 170 or len(frame) < 90]
    with pytest.raises(LearningError, match="no connection was seen"):
        job.learned(data_only)
    with pytest.raises(LearningError, match="no passes"):
        job.learned(passes=[])


def test_of_other_links_nothing_is_taken():
    from packet_parser.learn import Learner

    job = Job(layout("ll", 3), (0, 1, 2))
    for number in range(2):
        job.round(KINDS, number)
    learner = Learner(job.layout.ring, 1024, links=(0, 1))
    for frame, time_ns in job.frames:
        learner.add(frame, time_ns)
    assert {connection["edge"] for connection in learner.learn(job.passes).connections} == {0, 1}
    learner.close()


WRONG = {
    "layout.operations": (lambda s: s["layout"]["operations"].pop(0), "an all-reduce of 9003 float32 was not learned"),
    "anchors": (lambda s: s["layout"]["anchors"].pop(), "operations.*connections, anchors"),
    "psn": (lambda s: s["layout"]["anchors"][0]["psn"].append(3), r"anchors\[0\].psn has 2 numbers"),
    "message": (lambda s: s["layout"]["operations"][0]["messages"][0][0].__setitem__(1, 99_999), "ends at element"),
    "broadcast": (lambda s: s["startup"].insert(0, {"op": "broadcast", "dtype": "int8", "elements": 4}), "shows no broadcast"),
    "raw": (lambda s: s["startup"].insert(0, {"op": "raw", "messages": [[[8, 1]]]}), "raw operation of 1 connections"),
    "start": (lambda s: s["connections"][0].__setitem__("start_psn", 4), "start_psn"),
    "immediate": (lambda s: s["layout"].__setitem__("immediate", "odd"), "layout.immediate: found 'odd'"),
    "ranks": (lambda s: s["layout"]["operations"][0]["messages"][0][0].__setitem__(2, 3), "the sum of 3 ranks"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_learned_layout_is_refused(wrong):
    job = Job(layout("ll", 2))
    for number in range(2):
        job.round(KINDS, number)
    document = plan_document(job, job.learned(), KINDS)
    plans.parse(json.dumps(document))
    spoil, message = WRONG[wrong]
    spoil(document["shards"][0])
    with pytest.raises(ConfigError, match=message):
        plans.parse(json.dumps(document))
