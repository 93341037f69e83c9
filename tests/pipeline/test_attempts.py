# SPDX-License-Identifier: MIT
"""Recorded jobs that go on from a state: the new attempt's gradients come out of its captures, under its own numbers."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from scapy.utils import RawPcapNgReader

import flowcheck
from flowcheck import learning
from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from flowcheck.learning import Pass
from packet_parser.learn import Learner
from tests import jobs
from tests.flowcheck.test_training import loss_of, net
from tests.pipeline.recordings import same
from tests.workload_gen import hooked
from workload_gen import gpt
from workload_gen.job import Job
from workload_gen.record import Recording, record

WHOLE = 2
LAST, AT = 8, 5
SETTINGS = {"iterations": LAST, "bucket_mb": 0.02, "parameters": 8000}
#: The optimizer of a recording, by hand.
ADAMW = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def truth(folder, iteration):
    return torch.load(folder / "truth" / f"iteration-{iteration:06}.pt", weights_only=True)


def stepped(plan, before, slot, iteration):
    """Return the state that plain torch makes of a state and an iteration's slot."""
    model = gpt.build(SETTINGS["parameters"], 1)
    model.load_state_dict(before["model"])
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    optimizer.load_state_dict(before["optimizer"])
    parameters = dict(model.named_parameters())
    for bucket, (begin, _) in zip(plan.revision(iteration).buckets, plan.slot_ranges(iteration), strict=True):
        for entry in bucket.parameters:
            parameter = parameters[entry.name]
            data = bytearray(slot[begin + 4 * entry.offset :][: parameter.nbytes])
            parameter.grad = torch.frombuffer(data, dtype=torch.float32).view_as(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def check(first, second, scratch):
    """The second attempt's slots lead from the state resumed to each of its trainer's states, which are the first's."""
    plan, decided = jobs.decided(second, scratch)
    assert {i: state for i, (state, *_) in decided.items()} == dict.fromkeys(range(AT + 1, LAST + 1), WHOLE)
    before = torch.load(second / "initial.pt", weights_only=True)
    assert before["iteration"] == AT and same(before, truth(first, AT)) == []
    for iteration, (*_, slot) in decided.items():
        after = truth(second, iteration)
        assert same(stepped(plan, before, slot, iteration), after) == [], iteration
        assert after["iteration"] == iteration and same(after, truth(first, iteration)) == []
        before = after
    return plan, decided


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"protocol": "ll", "queue_pairs": 2, "split_queue_pairs": False, "nccl": "2.24"}),
        (3, {"protocol": "ll128", "channels": 2, "pin_channels": True, "start_psn": 2**24 - 40}),
        pytest.param(3, {"protocol": "ll"}, marks=pytest.mark.slow),
        pytest.param(2, {"protocol": "simple", "startup": False}, marks=pytest.mark.slow),
        pytest.param(3, {"protocol": "simple", "mtu": 4096}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_recording_shows_the_iterations_that_follow(tmp_path, ranks, options):
    recording = Recording(out=tmp_path / "first", ranks=ranks, optimizer="adamw", **SETTINGS, **options)
    record(recording)
    # The trainer's own file names neither run nor attempt.
    state = recording.out / "truth" / f"iteration-{AT:06}.pt"
    record(replace(recording, out=tmp_path / "second", resume=state, snapshot_iterations=3))
    plan, _ = check(recording.out, tmp_path / "second", tmp_path)
    job = json.loads((tmp_path / "second" / "plan.json").read_text())["job"]
    assert job == {
        "run_id": "recorded-gpt-seed1", "attempt": 2, "resumed": {"attempt": 1, "iteration": AT}, "world_size": ranks,
    }  # fmt: skip
    assert plan.checkpoints.snapshot_iterations == 3
    assert plan.shard.revisions[0].buckets == plan_of(recording.out).shard.revisions[-1].buckets


def plan_of(folder):
    return plans.load(folder / "plan.json")


def test_a_resumed_recording_with_the_hook_has_records_of_the_new_attempt(tmp_path):
    recording = Recording(
        out=tmp_path / "first",
        ranks=3,
        optimizer="adamw",
        hook=True,
        full_state_every=AT,
        protocol="simple",
        **SETTINGS,
    )
    record(recording)
    state = recording.out / "states" / f"state-{AT:06}.pt"
    record(replace(recording, out=tmp_path / "second", resume=state, attempt=4, full_state_every=0))
    plan, decided = check(recording.out, tmp_path / "second", tmp_path)
    assert (plan.job.run_id, plan.job.attempt) == (plan_of(recording.out).job.run_id, 4)
    assert (plan.job.resumed.attempt, plan.job.resumed.iteration) == (1, AT)
    for iteration, (*_, slot) in decided.items():
        begin, end = plan.record_range(plan.revision(iteration))
        said = plan.record_form.decode(
            plan.record_form.current(torch.frombuffer(bytearray(slot[begin:end]), dtype=torch.float32).numpy()),
            iteration,
        )
        assert said.iteration == iteration and said.audited


def refused(here):
    """Return what a job says of each state and number that it cannot go on with."""
    said = []
    for number, (options, more) in enumerate(
        [
            ({"iterations": 2}, {"attempt": 3}),
            ({"attempt": 3}, {"attempt": 3}),
            ({}, {"attempt": "3"}),
            ({}, {"run_id": 3}),
        ]
    ):
        path = here.folder / f"{here.rank}-{number}.pt"
        job = Job(Recording(**{"out": here.folder, "iterations": 3, "resume": path, **options}), here.rank, here.group)
        torch.save({**job.state(2), "run_id": "r", **more}, path)
        try:
            job.resume()
            said.append("nothing")
        except ConfigError as error:
            said.append(str(error))
    return said


def test_what_an_attempt_cannot_be_is_refused(tmp_path):
    said = hooked.run(refused, tmp_path, ranks=2, links=(0, 1))[0][1]
    words = [
        "the state after iteration 2 of 2: nothing is left",
        "attempt 3 cannot go on from attempt 3",
        "'attempt' is '3', expected the number of an attempt",
        "'run_id' is 3, expected the name of a run",
    ]
    assert all(expected in found for expected, found in zip(words, said, strict=True)), said


def script(here):
    """Resume, attach, reduce two rounds of passes, train on."""
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    state = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "iteration": AT, "run_id": "r"}
    torch.save(state, here.folder / f"state-{here.rank}.pt")
    flowcheck.resume(
        ddp, optimizer, here.folder / f"state-{here.rank}.pt", lambda: loss_of(ddp, here.rank, 1).backward()
    )
    done, gradients = [], []
    with here.attach(ddp, optimizer) as hook:
        kinds = [(b.dtype, b.elements) for b in hook.plan.shard.revisions[0].buckets]
        for number in range(2):
            done += learning.round_of([*kinds, ("float32", hook.plan.record_form.elements)], here.ranks, number)
        for step in done:
            own = torch.from_numpy(learning.contribution(step, here.rank, here.ranks))
            torch.distributed.all_reduce(own, group=here.group)
        for iteration in range(AT + 1, LAST + 1):
            optimizer.zero_grad()
            loss_of(ddp, here.rank, iteration).backward()
            gradients.append(
                {name: p.grad.flatten().tolist() for name, p in ddp.module.named_parameters() if p.requires_grad}
            )
            optimizer.step()
    return [step.document() for step in done], gradients


@pytest.mark.parametrize("protocol", ["ll", "simple"])
def test_a_resumed_job_by_a_learned_layout(tmp_path, protocol):
    noted = hooked.run(script, tmp_path, protocol=protocol, version="2.24", channels=2)
    passes, gradients = noted[0][1]
    document = hooked.plan_of(tmp_path)
    with contextlib.closing(Learner((0, 1, 2), 1024, (0, 2))) as learner:
        for link in (0, 2):
            with contextlib.closing(RawPcapNgReader(str(tmp_path / f"link-{link}.pcapng"))) as reader:
                for time_ns, (frame, _) in enumerate(reader):
                    learner.add(bytes(frame), time_ns)
        learned = learner.learn([Pass.of(step) for step in passes])
    shard = document["shards"][0]
    shard["layout"], shard["connections"], shard["startup"] = learned.layout, learned.connections, learned.startup
    (tmp_path / "plan.json").write_text(json.dumps(document))
    plan, decided = jobs.decided(tmp_path, tmp_path)
    assert {i: state for i, (state, *_) in decided.items()} == dict.fromkeys(range(AT + 1, LAST + 1), WHOLE)
    for iteration, expected in zip(range(AT + 1, LAST + 1), gradients, strict=True):
        slot = decided[iteration][3]
        for bucket, (begin, _) in zip(plan.revision(iteration).buckets, plan.slot_ranges(iteration), strict=True):
            for entry in bucket.parameters:
                wanted = torch.tensor(expected[entry.name]).numpy().tobytes()
                assert slot[begin + 4 * entry.offset :][: len(wanted)] == wanted, (iteration, entry.name)
