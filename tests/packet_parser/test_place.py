# SPDX-License-Identifier: MIT
"""Parser and extractor over a job's frames under loss, repeats, disorder and lies, against a plain count of bytes."""

import random
import struct

import numpy as np
import pytest

from data_extractor.extractor import Extractor
from packet_parser.parser import Parser
from tests import builders, jobs

WHOLE, INCOMPLETE = 2, 3


@pytest.fixture(scope="module")
def job():
    return jobs.Job(6)


def run(tmp_path, job, pieces, plan=None):
    plan = plan or jobs.plan(job.mtu)
    frames = [p if isinstance(p, bytes) else p.frame for p in pieces]
    ring = jobs.ring_of(tmp_path, plan, frames)
    slots = jobs.slots_of(tmp_path, plan)
    parser, extractor = Parser(ring, plan, "host0"), Extractor([ring], plan, slots)
    decided = jobs.drain([parser, extractor], slots)
    counts = extractor.counters()
    judged = sum(v for k, v in counts.items() if k not in ("received", "missed_by_port") and isinstance(v, int))
    assert counts["received"] == len(frames) == judged
    return decided, counts, parser.counters()


def holes(pieces, iteration, total=jobs.TOTAL):
    have = np.zeros(total, bool)
    for piece in pieces:
        if piece.kind == "final" and piece.iteration == iteration:
            have[piece.begin : piece.end] = True
    edges = np.flatnonzero(np.diff(np.concatenate(([1], have.astype(np.int8), [1]))))
    return [tuple(map(int, pair)) for pair in edges.reshape(-1, 2)], have


def test_mended_agrees_with_the_builder(job):
    assert all(builders.mended(piece.frame) == piece.frame for piece in job.pieces[:50])


def test_an_undisturbed_job_is_whole(job, tmp_path):
    decided, counts, _ = run(tmp_path, job, job.pieces)
    assert decided[0][0] == WHOLE and decided[0][3] == job.initial
    for iteration, gradient in job.gradients.items():
        assert decided[iteration][0] == WHOLE and decided[iteration][3] == gradient
    for kind, name in (("final", "placed"), ("partial_sum",) * 2, ("initial_state",) * 2, ("other_collective",) * 2):
        assert counts[name] == sum(p.kind == kind for p in job.pieces)


@pytest.mark.parametrize("mtu", [256, 512, 2048, 4096])
@pytest.mark.parametrize("start_psn", [0, 2**24 - 40])
def test_every_mtu_and_wrapping_sequence_numbers(tmp_path, mtu, start_psn):
    job = jobs.Job(3, mtu=mtu, start_psn=start_psn, seed=mtu)
    decided, _, _ = run(tmp_path, job, job.pieces)
    assert {i: d[3] for i, d in decided.items()} == {0: job.initial, **job.gradients}


@pytest.mark.parametrize("seed", range(12))
def test_loss_repeats_and_disorder_leave_exactly_the_holes_they_must(tmp_path, seed):
    rng = random.Random(seed)
    job = jobs.Job(6, start_psn=rng.choice([0, 2**24 - 300]), seed=seed)
    begin = next(i for i, p in enumerate(job.pieces) if p.iteration == 1) + 4
    kept = job.pieces[:begin] + [p for p in job.pieces[begin:] if rng.random() > 0.03]
    sent = []
    for number, piece in enumerate(kept):
        sent.append((number, piece))
        if number > begin and rng.random() < 0.05:
            sent.append((number + rng.randint(0, 15), piece))
    moved = sorted(sent, key=lambda entry: entry[0] + (rng.uniform(0, 10) if entry[0] > begin else 0))
    decided, counts, _ = run(tmp_path, job, [piece for _, piece in moved])
    for iteration, gradient in job.gradients.items():
        missing, have = holes(kept, iteration)
        state, _, found, data = decided[iteration]
        assert found == missing and state == (INCOMPLETE if missing else WHOLE)
        got, want = np.frombuffer(data, np.uint8)[have], np.frombuffer(gradient, np.uint8)[have]
        assert np.array_equal(got, want)
    finals = [p for p in kept if p.kind == "final"]
    assert counts["placed"] == len(finals)
    assert counts["duplicate"] == sum(p.kind == "final" for _, p in moved) - len(finals)
    assert counts["unsynchronised"] == counts["conflict"] == counts["late"] == 0


def test_a_retransmission_that_goes_back_is_a_duplicate(job, tmp_path):
    at = next(i for i, p in enumerate(job.pieces) if p.iteration == 4)
    again = job.pieces[: at + 30] + job.pieces[at : at + 30] + job.pieces[at + 30 :]
    decided, counts, _ = run(tmp_path, job, again)
    assert all(decided[i][0] == WHOLE for i in range(7))
    assert counts["duplicate"] == sum(p.kind == "final" for p in job.pieces[at : at + 30])


def final_of(job, iteration, edge):
    return next(i for i, p in enumerate(job.pieces) if (p.kind, p.iteration, p.edge) == ("final", iteration, edge))


@pytest.mark.parametrize("where", ["flag", "second flag", "last line's flag"])
def test_a_wrong_flag_is_never_placed_even_with_a_right_icrc(job, tmp_path, where):
    at = final_of(job, 3, 0) + 2
    frame = bytearray(job.pieces[at].frame)
    offset = {"flag": 4, "second flag": 12, "last line's flag": 1024 - 4}[where]
    frame[74 + offset] ^= 1
    pieces = [*job.pieces[:at], builders.mended(bytes(frame)), *job.pieces[at + 1 :]]
    decided, counts, _ = run(tmp_path, job, pieces)
    assert counts["unsynchronised"] >= 1 and decided[3][0] == INCOMPLETE
    assert (job.pieces[at].begin, job.pieces[at].end) in [tuple(r) for r in decided[3][2]] or decided[3][2]
    assert all(decided[i][0] == WHOLE and decided[i][3] == job.gradients[i] for i in (1, 2, 4, 5, 6))


def test_altered_data_is_a_conflict_with_the_copy_that_came_before(job, tmp_path):
    at = final_of(job, 3, 1) + 1
    frame = bytearray(job.pieces[at].frame)
    frame[74] ^= 0x80
    pieces = [*job.pieces[: at + 1], builders.mended(bytes(frame)), *job.pieces[at + 1 :]]
    decided, counts, _ = run(tmp_path, job, pieces)
    assert counts["conflict"] == 1
    assert decided[3][:2] == (INCOMPLETE, 2)  # reason: conflict
    assert all(decided[i][0] == WHOLE for i in (1, 2, 4, 5, 6))


def test_a_wrong_icrc_is_counted_and_leaves_a_hole(job, tmp_path):
    at = final_of(job, 2, 0) + 3
    frame = bytearray(job.pieces[at].frame)
    frame[100] ^= 1
    decided, counts, _ = run(tmp_path, job, [*job.pieces[:at], bytes(frame), *job.pieces[at + 1 :]])
    assert counts["bad_icrc"] == 1
    assert decided[2][2] == [(job.pieces[at].begin, job.pieces[at].end)]


@pytest.mark.parametrize("field", ["address", "length", "immediate", "opcode", "psn"])
def test_a_packet_that_contradicts_the_layout_is_never_written(job, tmp_path, field):
    at = final_of(job, 3, 0)
    if field == "immediate":
        at += 23  # the last packet of 24,576 bytes carries it
    frame = bytearray(job.pieces[at].frame)
    offset = {"address": 74 + 5, "length": 74 + 14, "immediate": 74, "opcode": 62, "psn": 62 + 10}[field]
    frame[offset] ^= 1 if field != "opcode" else 6 ^ 10
    pieces = [*job.pieces[:at], builders.mended(bytes(frame)), *job.pieces[at + 1 :]]
    decided, counts, _ = run(tmp_path, job, pieces)
    assert counts["placed"] < sum(p.kind == "final" for p in job.pieces)
    assert decided[3][0] == INCOMPLETE
    for i in (1, 2, 4, 5, 6):
        assert decided[i][0] == WHOLE and decided[i][3] == job.gradients[i]
    have = np.ones(jobs.TOTAL, bool)
    for low, high in decided[3][2]:
        have[low:high] = False
    assert np.array_equal(np.frombuffer(decided[3][3], np.uint8)[have], np.frombuffer(job.gradients[3], np.uint8)[have])


def test_a_stream_that_begins_in_the_middle_comes_in_by_proof(job, tmp_path):
    at = final_of(job, 3, 1) + 5
    decided, _, _ = run(tmp_path, job, job.pieces[at:])
    assert decided[0][0] == decided[1][0] == decided[2][0] == INCOMPLETE
    assert all(decided[i][0] == WHOLE and decided[i][3] == job.gradients[i] for i in (4, 5, 6))


def test_credits_of_another_rank_shut_the_connection_out(job, tmp_path):
    plan = jobs.plan()
    credit = plan.shard.connections[0].proof.credit[0]
    for rank, whole in ((0, True), (1, False)):
        element = struct.pack("<QIIIIQ", 0x7F0000000000, 65536, 1, 1, rank, 1)
        from tests import builders

        frame = builders.roce(10, credit, 0, ends=builders.V6[::-1], reth=(0x7000, 1, 32), payload=element)
        folder = tmp_path / str(rank)
        folder.mkdir()
        decided, counts, _ = run(folder, job, [frame, *job.pieces])
        assert counts["control"] == 1
        assert all((d[0] == WHOLE) == whole for d in decided.values())


def test_other_traffic_is_foreign_or_control(job, tmp_path):
    from tests import builders

    foreign = [
        builders.roce(7, 999, 1, payload=bytes(64)),
        builders.roce(6, 1107, 1, ends=("fe80::9", "fe80::2"), reth=(0, 0, 100), payload=bytes(64)),
        b"\x01" * 60,
        b"",
        job.pieces[0].frame[:12],
    ]
    control = [
        builders.roce(17, 1107, 1, extended=bytes(4)),
        builders.roce(17, 4834, 1, ends=builders.V6[::-1], extended=bytes(4)),
        builders.roce(100, 1, 0, extended=bytes(8), payload=bytes(64)),
    ]
    decided, counts, _ = run(tmp_path, job, [*foreign, *control, *job.pieces])
    assert counts["control"] == len(control)
    assert counts["foreign"] + counts["malformed"] == len(foreign) and counts["foreign"] >= 3
    assert all(d[0] == WHOLE for d in decided.values())
