# SPDX-License-Identifier: MIT
"""Jobs whose layout is learned from their own frames: the plan says nothing of a version, and every state comes out right."""

import contextlib
import json

import pytest
import torch
import torch.distributed as dist
from scapy.utils import RawPcapNgReader

from flowcheck import learning, schedule
from flowcheck import plan as plans
from flowcheck.learning import Pass
from flowcheck.replay import replay
from packet_parser.learn import Learner
from tests.flowcheck.test_training import batch, net
from tests.packet_parser.passes import Job, layout, plan_document
from tests.workload_gen import hooked
from updater.gradient import read_gradient
from workload_gen.permuted_schedule import PermutedSchedule

pytestmark = pytest.mark.dpdk

STEPS = 5


def passes(here, kinds, rounds):
    """Reduce rounds of passes on the job's own group; return them."""
    done = [step for number in rounds for step in learning.round_of(kinds, here.ranks, number)]
    for step in done:
        own = torch.from_numpy(learning.contribution(step, here.rank, here.ranks))
        dist.all_reduce(own.view(torch.bfloat16) if step.dtype == "bfloat16" else own, group=here.group)
    return done


def script(here):
    """Train with passes before the first iteration, and again in the second forward, before its backward."""
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    done = []
    with here.attach(ddp, optimizer) as hook:
        form = hook.plan.record_form
        record = ("float32", form.elements)

        def kinds(revision):
            return [(b["dtype"], b["elements"]) for b in revision["buckets"]]

        plan = json.loads((here.folder / "plan.json").read_text())
        done += passes(here, [*kinds(plan["shards"][0]["revisions"][0]), record], (0, 1))
        for iteration in range(1, STEPS + 1):
            optimizer.zero_grad()
            inputs, wanted = batch(here.rank, iteration)
            loss = (ddp(inputs) - wanted).square().mean()
            if iteration == 2:
                plan = json.loads((here.folder / "plan.json").read_text())
                first, second = plan["shards"][0]["revisions"]
                done += [Pass(*kind, "iteration") for kind in [*kinds(first), record]]
                done += passes(here, kinds(second), (2, 3))
            loss.backward()
            optimizer.step()
            here.note(ddp, optimizer, ())
    return [step.document() for step in done]


def frames(path):
    with contextlib.closing(RawPcapNgReader(str(path))) as reader:
        return [bytes(frame) for frame, _ in reader]


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
@pytest.mark.parametrize(("channels", "queue_pairs"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_a_hooked_job_by_a_learned_layout(tmp_path, protocol, channels, queue_pairs):
    links = (0, 2)
    noted = hooked.run(
        script, tmp_path, protocol=protocol, version="2.24", channels=channels, queue_pairs=queue_pairs, links=links
    )
    truth = [digest for digest, _ in noted[0][0]]
    captures = {f"link-{link}": tmp_path / f"link-{link}.pcapng" for link in links}
    with contextlib.closing(Learner((0, 1, 2), 1024, links)) as learner:
        for path in captures.values():
            for time_ns, frame in enumerate(frames(path)):
                learner.add(frame, time_ns)
        learned = learner.learn([Pass.of(document) for document in noted[0][1]])
    plan = json.loads((tmp_path / "plan.json").read_text())
    shard = plan["shards"][0]
    assert shard["layout"]["source"] == "modelled"
    shard["layout"], shard["connections"], shard["startup"] = learned.layout, learned.connections, learned.startup
    shard["revisions"][1]["before"] = learned.before
    path = tmp_path / "learned.json"
    path.write_text(json.dumps(plan))
    plans.load(path)
    report = replay(path, captures, tmp_path / "out")
    assert [row["state"] for row in report["iterations"]] == ["committed"] * STEPS
    shadow = hooked.shadowed(tmp_path)
    assert [shadow[iteration][0] for iteration in range(1, STEPS + 1)] == truth
    for name in ("foreign", "malformed", "bad_icrc", "unsynchronised", "conflict", "late"):
        assert report["packets"][name] == 0, report["packets"]


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
def test_a_schedule_that_no_library_has(tmp_path, monkeypatch, protocol):
    """Cuts, channels and orders drawn by lot: learned, followed, and bit for bit the job's; the model is never asked."""
    job = Job(layout(protocol, 3, channels=2, queue_pairs=2, version="2.24"), (0, 1), messages=PermutedSchedule(3))
    job.broadcast(3000)
    buckets, record = [("float32", 20_011), ("bfloat16", 9001), ("float32", 20_011)], ("float32", 120)
    for number in range(2):
        job.round([*buckets, record], number)
    learned = job.learned()
    gradients = [job.iteration(buckets, seed) for seed in range(4)]
    captures = job.capture(tmp_path)
    for name in ("all_reduce", "broadcast", "all_gather", "last_partial_sums"):
        monkeypatch.setattr(schedule, name, lambda *_: pytest.fail("the modelled layout was asked"))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_document(job, learned, buckets)))
    report = replay(path, captures, tmp_path / "out")
    assert [row["state"] for row in report["iterations"]] == ["whole"] * len(gradients)
    for number, parts in enumerate(gradients, 1):
        for bucket, part in enumerate(parts):
            found = read_gradient(tmp_path / "out", number, bucket)
            assert found.tobytes() == part.view(torch.uint8).numpy().tobytes(), (number, bucket)
    assert all(report["packets"][name] == 0 for name in ("unsynchronised", "conflict", "malformed", "bad_icrc"))
