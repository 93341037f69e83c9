# SPDX-License-Identifier: MIT
"""A script that loads a checkpoint and attaches goes on in the checkpoint's run; what cannot be that is refused."""

import json

import numpy as np
import pytest
import torch

import flowcheck
from data_extractor.extractor import Extractor
from flowcheck import attempts
from flowcheck import plan as plans
from flowcheck.errors import FlowCheckError
from flowcheck.run_folder import RunFolder
from flowcheck.supervisor import Supervisor, read_status
from packet_parser.parser import Parser
from tests import jobs
from tests.flowcheck.test_training import loss_of, net
from tests.workload_gen import hooked

AT, LAST = 5, 10


def state(ddp, optimizer, **more):
    return {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "iteration": AT, **more}


class Script:
    """One job of a rank: model, optimizer, and a checkpoint that it can be loaded with."""

    def __init__(self, here, name, **whose):
        self.here, self.path = here, here.folder / f"{name}-{here.rank}.pt"
        self.ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
        self.optimizer = torch.optim.AdamW(self.ddp.parameters(), lr=0.01)
        torch.save(state(self.ddp, self.optimizer, **whose), self.path)

    def backward(self, iteration=1):
        loss_of(self.ddp, self.here.rank, iteration).backward()

    def load(self):
        return flowcheck.load(self.ddp, self.optimizer, self.path)

    def resume(self):
        return flowcheck.resume(self.ddp, self.optimizer, self.path, self.backward)

    def step(self, iteration):
        self.optimizer.zero_grad()
        self.backward(iteration)
        self.optimizer.step()

    def attach(self, **options):
        return self.here.attach(self.ddp, self.optimizer, **options)


def going_on(how):
    """Return a script that goes on to iteration LAST from a state of attempt 2 of a run whose newest is attempt 3."""

    def script(here):
        states = here.folder / "states"
        if here.rank == 0:
            states.mkdir()
            for name in ("state-000005.pt", "state-000006.pt", "mine.pt"):
                (states / name).touch()
            for name in ("passes.json", "learned.json"):
                (here.folder / name).write_text("{}")
        job = Script(here, "state", run_id="the-run", attempt=2, latest_attempt=3)
        assert getattr(job, how)() == AT
        rules = {"snapshot_iterations": 7, "retention": {"last_iterations": 20}}
        with job.attach(checkpoints=rules, full_state_every=LAST, audit_every=10) as hook:
            assert hook.iteration == AT and attempts.loaded(job.optimizer) is None
            for iteration in range(AT + 1, LAST + 1):
                job.step(iteration)
                here.note(job.ddp, job.optimizer)
            assert hook.iteration == LAST

    return script


def records(plan, decided):
    """Return what the step record of each iteration says."""
    form, out = plan.record_form, {}
    for iteration, (*_, slot) in decided.items():
        begin, end = plan.record_range(plan.revision(iteration))
        out[iteration] = form.decode(form.current(np.frombuffer(slot[begin:end], "<f4")), iteration)
    return out


@pytest.mark.parametrize(("how", "revisions"), [("resume", [6]), ("load", [6, 7])])
def test_a_loaded_job_goes_on_in_its_run(tmp_path, how, revisions):
    hooked.run(going_on(how), tmp_path, protocol="simple")
    plan, decided = jobs.decided(tmp_path, tmp_path)
    assert (plan.job.run_id, plan.job.attempt) == ("the-run", 4)
    assert (plan.job.resumed.attempt, plan.job.resumed.iteration) == (2, AT)
    assert [revision.from_iteration for revision in plan.shard.revisions] == revisions
    # Ring and slots say how far the attempt is, whatever a directory has of the iterations before it.
    assert read_status(tmp_path, plan, tmp_path / "none")["lag"] == LAST - AT
    assert plan.checkpoints.snapshot_iterations == 7 and plan.checkpoints.retention.last_iterations == 20
    assert {i: outcome for i, (outcome, *_) in decided.items()} == dict.fromkeys(range(AT + 1, LAST + 1), 2)
    said = records(plan, decided)
    assert {i for i, step in said.items() if step.audited} == {6, 7, 8, 10}

    begun = torch.load(tmp_path / "initial.pt", weights_only=True)
    loaded = torch.load(tmp_path / "state-0.pt", weights_only=True)
    assert (begun["iteration"], begun["run_id"], begun["attempt"]) == (AT, "the-run", 2)
    assert all(torch.equal(begun["model"][key], value) for key, value in loaded["model"].items())
    # Full states of iterations that this attempt does anew are none of its own.
    names = {path.name for path in (tmp_path / "states").iterdir()}
    assert names == {"state-000005.pt", "superseded-000006.pt", "mine.pt", "state-000010.pt"}
    full = torch.load(tmp_path / "states" / "state-000010.pt", weights_only=True)
    assert (full["run_id"], full["attempt"], full["iteration"]) == ("the-run", 4, LAST)
    assert not (tmp_path / "passes.json").exists() and not (tmp_path / "learned.json").exists()


def choosing(here):
    """Return the job of each plan that attach makes, or what it says."""
    out = {}

    def tried(name, job, before=lambda job: job.load(), **options):
        before(job)
        try:
            with job.attach(**options) as hook:
                out[name] = (hook.plan.job, hook.plan.first_step, len(hook.plan.shard.startup))
        except FlowCheckError as error:
            out[name] = str(error)

    def stepped(job):
        job.load()
        job.step(1)

    named = {"run_id": "the-run", "attempt": 1}
    tried("loaded", Script(here, "a", **named))
    tried("same name", Script(here, "b", **named), run_id="the-run")
    tried("other name", Script(here, "c", **named), run_id="another")
    tried("resumed, other name", Script(here, "d", **named), lambda job: job.resume(), run_id="another")
    tried("no name", Script(here, "e"), run_id="mine")
    tried("stepped", Script(here, "f", **named), stepped)
    tried("stepped, other name", Script(here, "g", **named), stepped, run_id="another")
    tried("ranks differ", Script(here, "h", **named, latest_attempt=here.rank + 1))
    tried("no shadow", Script(here, "k"), required=True, wait_s=0.1)
    tried("rules", Script(here, "i", **named), checkpoints={"snapshots": 7})
    twice = Script(here, "j", **named)
    tried("attached", twice)
    tried("attached anew", twice, lambda job: None, run_id="the-run")
    return out


def test_the_run_that_a_script_goes_on_in_is_the_one_it_loaded(tmp_path):
    mine, other = (noted[1] for noted in hooked.run(choosing, tmp_path, ranks=2, links=(0, 1)))
    for name in ("loaded", "same name", "attached"):
        job, first, _ = mine[name]
        assert (job.run_id, job.attempt, job.resumed.iteration, first) == ("the-run", 2, AT, AT + 1), name
    for name, run_id in (
        ("other name", "another"), ("resumed, other name", "another"), ("no name", "mine"),
        ("stepped, other name", "another"), ("attached anew", "the-run"),
    ):  # fmt: skip
        job, first, _ = mine[name]
        assert (job.run_id, job.attempt, job.resumed, first) == (run_id, 1, None, 1), name
    # What resume has thrown away was on the wire all the same: a reduction, and two broadcasts of rebuilt buckets.
    assert mine["resumed, other name"][2] == mine["other name"][2] + 3
    assert "has stepped since it was loaded with iteration 5 of run 'the-run'" in mine["stepped"]
    assert "rank 1 goes on from iteration 5 of attempt 1 of run 'the-run' as attempt 3, rank 0" in mine["ranks differ"]
    assert "no shadow follows this job after 0.1 seconds" in mine["no shadow"]
    assert "checkpoints.snapshots" in mine["rules"]
    assert {name: said for name, said in other.items() if isinstance(said, str)} == {
        name: said for name, said in mine.items() if isinstance(said, str)
    }


def test_a_later_load_replaces_what_was_noted():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    attempts.remember(optimizer, {"iteration": 3, "run_id": "r", "attempt": 2}, [])
    optimizer.step()
    assert attempts.loaded(optimizer).stepped
    attempts.remember(optimizer, {"iteration": 4, "run_id": "r", "attempt": 2}, [])
    assert attempts.job_entry(optimizer, None) == {
        "run_id": "r", "attempt": 3, "resumed": {"attempt": 2, "iteration": 4},
    }  # fmt: skip
    attempts.forget(optimizer)
    assert attempts.job_entry(optimizer, None) is None


def test_an_answer_to_an_earlier_attempts_passes_is_not_this_ones(tmp_path):
    folder = RunFolder(tmp_path)
    plan = jobs.plan()
    answer = {"run_id": plan.job.run_id, "attempt": 1, "passes": 1, "learned": {}}
    later = plan.job.model_copy(update={"attempt": 2})
    (tmp_path / "learned.json").write_text(json.dumps(answer))
    assert folder.learned(plan.job, [{}], 0.2) == answer
    assert folder.learned(later, [{}], 0.2) is None


def left_by_the_first(scratch, job, extracted):
    """Leave ring and slots of attempt 1 in a folder, its frames extracted or not, nothing taken by the updater."""
    plan = jobs.plan()
    ring = jobs.ring_of(scratch, plan, [piece.frame for piece in job.pieces])
    slots = jobs.slots_of(scratch, plan)
    if extracted:
        parser, extractor = Parser(ring, plan, "host0"), Extractor([ring], plan, slots)
        while not parser.finished:
            parser.poll()
        while extractor.poll():
            pass
    ring.close()
    slots.close()


@pytest.mark.parametrize("extracted", [False, True])
def test_what_an_earlier_attempt_has_not_drained_is_named_when_it_goes(tmp_path, extracted):
    job, said = jobs.Job(3), []
    left_by_the_first(tmp_path, job, extracted)
    document = json.loads(jobs.plan().canonical())
    document["job"]["attempt"] = 2
    later = plans.parse(json.dumps(document))
    supervisor = Supervisor(tmp_path / "plan.json", tmp_path / "out", say=said.append)
    supervisor._discard_others(tmp_path, later)
    assert list(tmp_path.iterdir()) == []
    frames, iterations = (0, 4) if extracted else (len(job.pieces), 0)  # the initial state is decided like an iteration
    words = f"attempt 1 of run {later.job.run_id!r}, {frames} frames and {iterations} decided iterations: no checkpoint has it"
    assert words in said[-1] and "another job or plan" in said[0]
    said.clear()
    supervisor._discard_others(tmp_path, later)
    assert said == []
