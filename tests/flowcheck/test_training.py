# SPDX-License-Identifier: MIT
"""The hook in real DDP scripts: what it writes and sends is enough to rebuild every state, bit for bit."""

import contextlib
import struct
import time
import warnings

import numpy as np
import pytest
import torch
from scapy.utils import RawPcapNgReader
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook

from flowcheck import plan as plans
from flowcheck.errors import FlowCheckError
from flowcheck.formats import SLOT
from flowcheck.verdicts import VERDICTS
from packet_parser.parser import Parser
from tests import builders
from tests.jobs import ring_of
from tests.workload_gen import hooked
from updater.directory import Directory
from updater.restore import restore
from updater.updater import Updater
from workload_gen.pcapng import PcapngWriter
from workload_gen.truth import digest

STEPS = 12


class Net(torch.nn.Module):
    """Tied, frozen and constant parts, as models have them."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = torch.nn.Linear(8, 33), torch.nn.Linear(33, 33), torch.nn.Linear(33, 1)
        self.tied = torch.nn.Linear(33, 33)
        self.tied.weight = self.middle.weight
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x):
        x = torch.nn.functional.gelu(self.first(x))
        return self.last(self.tied(self.middle(x)) * self.scale) + self.frozen.sum()


def net():
    torch.manual_seed(0)
    return Net()


def batch(rank, iteration, part=0):
    generator = torch.Generator().manual_seed(1000 * iteration + 10 * part + rank)
    inputs = torch.randn(16, 8, generator=generator)
    return inputs, inputs.sum(1, keepdim=True)


def loss_of(ddp, rank, iteration, part=0):
    inputs, wanted = batch(rank, iteration, part)
    return (ddp(inputs) - wanted).square().mean()


def loop(here, ddp, optimizer, step, iterations=STEPS, extra=None, **options):
    """Attach, do `step(hook, iteration)` for every iteration, and note each state."""
    with here.attach(ddp, optimizer, **options) as hook:
        for iteration in range(1, iterations + 1):
            optimizer.zero_grad()
            step(hook, iteration)
            here.note(ddp, optimizer, extra() if extra else ())
    return hook.iteration


def plain(here):
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)

    def step(_, iteration):
        loss_of(ddp, here.rank, iteration).backward()
        optimizer.step()

    assert loop(here, ddp, optimizer, step) == STEPS


def groups_and_schedules(here):
    """Param groups, one of them frozen; lr, betas, weight decay move from step to step."""
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    module = ddp.module
    optimizer = torch.optim.Adam(
        [
            {"params": list(module.first.parameters()), "lr": 0.02, "mine": "left alone"},
            {"params": [*module.middle.parameters(), module.tied.bias], "weight_decay": 0.1},
            {"params": [module.frozen]},
        ],
        lr=0.01,
        amsgrad=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.05, 0.01], total_steps=STEPS)

    def step(_, iteration):
        loss_of(ddp, here.rank, iteration).backward()
        optimizer.param_groups[1]["weight_decay"] = 0.1 / iteration
        optimizer.step()
        schedule.step()

    loop(here, ddp, optimizer, step)


def clipped(here):
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def step(hook, iteration):
        loss = loss_of(ddp, here.rank, iteration)
        loss.backward()
        hook.note_loss(loss)
        if iteration % 3:
            reference = [p.grad.clone() for p in ddp.parameters() if p.requires_grad]
            norm = hook.clip_grad_norm_(0.5)
            for gradient, parameter in zip(reference, (p for p in ddp.parameters() if p.requires_grad), strict=True):
                parameter_like = torch.nn.Parameter(torch.zeros_like(gradient))
                parameter_like.grad = gradient
                torch.nn.utils.clip_grads_with_norm_([parameter_like], 0.5, norm)
                assert torch.equal(parameter_like.grad, parameter.grad)
        elif iteration % 2:
            hook.clip_grad_value_(0.01)
        optimizer.step()

    loop(here, ddp, optimizer, step)


def scaled(here, fused=False, clip=False):
    """A GradScaler whose scale is so high that steps are skipped, and grows back."""
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
    skipped = []

    def step(hook, iteration):
        loss = loss_of(ddp, here.rank, iteration)
        scaler.scale(loss).backward()
        if clip and iteration % 2:
            scaler.unscale_(optimizer)
            hook.clip_grad_norm_(0.5)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if iteration == 7:
            scaler.update(2.0**127)
        skipped.append(scaler.get_scale() < before)

    loop(here, ddp, optimizer, step, scaler=scaler)
    assert 2 < sum(skipped) < STEPS, skipped


def scaled_fused(here):
    scaled(here, fused=True)


def scaled_fused_clipped(here):
    scaled(here, fused=True, clip=True)


def scaled_clipped(here):
    scaled(here, clip=True)


def accumulated(here):
    """Two batches a step, reduced once."""
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)

    def step(_, iteration):
        for part in range(2):
            with ddp.no_sync() if part == 0 else contextlib.nullcontext():
                loss_of(ddp, here.rank, iteration, part).backward()
        optimizer.step()

    loop(here, ddp, optimizer, step)


def reduced_thrice(here):
    """Three batches a step, each reduced: the last reduction is the one that counts."""
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)

    def step(_, iteration):
        for part in range(3):
            loss_of(ddp, here.rank, iteration, part).backward()
        optimizer.step()

    loop(here, ddp, optimizer, step, reductions=3)


def reduced_twice(here):
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)

    def step(_, iteration):
        for part in range(2):
            loss_of(ddp, here.rank, iteration, part).backward()
        optimizer.step()

    loop(here, ddp, optimizer, step, reductions=2)


def compressed(here, hook=bf16_compress_hook):
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    if hook is bf16_compress_hook:  # DDP lets it on accelerators only; what it does is the same everywhere
        ddp._comm_hooks.append((hook, here.group))
        torch.distributed._register_comm_hook(ddp.reducer, here.group, hook)
    else:
        ddp.register_comm_hook(here.group, hook)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)

    def step(_, iteration):
        loss_of(ddp, here.rank, iteration).backward()
        optimizer.step()

    loop(here, ddp, optimizer, step)


def compressed_fp16(here):
    compressed(here, fp16_compress_hook)


def never_finite(here):
    """A gradient that is not finite is a gradient like any other where nobody skips for it."""
    ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)

    def step(_, iteration):
        loss = loss_of(ddp, here.rank, iteration)
        (loss * (float("inf") if iteration == 9 else 1.0)).backward()
        optimizer.step()

    loop(here, ddp, optimizer, step)


def with_extra_state(here):
    """BatchNorm's statistics, a generator's state and a position, as the contributor has them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1))
    ddp = here.ddp(model, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    generator, position = torch.Generator().manual_seed(here.rank), torch.zeros((), dtype=torch.int64)

    def step(_, iteration):
        inputs = torch.randn(16, 8, generator=generator)
        position.fill_(iteration * 16)
        (ddp(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()

    statistics = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    loop(
        here, ddp, optimizer, step, buffers=statistics, extra=lambda: (generator.get_state(), position.clone()),
        extra_state={"generator": generator.get_state, "position": lambda: position},
    )  # fmt: skip


def check(folder, truth):
    report = hooked.replayed(folder)
    listed = [(row["iteration"], row["state"], row["reason"]) for row in report["iterations"]]
    assert listed == [(i, "committed", None) for i in range(1, len(truth) + 1)], report
    found = hooked.shadowed(folder)
    assert {i: d for i, (d, _) in found.items()} == {i: d for i, (d, _) in enumerate(truth, 1)}
    assert report["audited_to"] == 2 and report["alarms"] == [] and report["bit_exact"]
    assert report["packets"]["step_record"] >= len(truth)
    assert report["packets"]["unsynchronised"] == report["packets"]["conflict"] == 0


@pytest.mark.parametrize(
    ("script", "layout"),
    [
        (plain, {}),
        (groups_and_schedules, {"protocol": "simple", "version": "2.24", "mtu": 4096}),
        (clipped, {"protocol": "ll128", "version": "2.27"}),
        (scaled, {}),
        (scaled_clipped, {}),
        (scaled_fused, {}),
        (scaled_fused_clipped, {}),
        (accumulated, {"protocol": "simple"}),
        (reduced_thrice, {"channels": 2, "pin_channels": True}),
        (reduced_twice, {}),
        (compressed, {"queue_pairs": 2}),
        (compressed_fp16, {"protocol": "simple"}),
        (never_finite, {"protocol": "ll128"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_state_of_a_script_is_rebuilt(tmp_path, script, layout):
    results = hooked.run(script, tmp_path, **layout)
    check(tmp_path, results[0][0])
    revisions = hooked.plan_of(tmp_path)["shards"][0]["revisions"]
    assert (len(revisions) == 2 and revisions[0]["buckets"] != revisions[1]["buckets"]) or script in (
        reduced_thrice,
        reduced_twice,
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_extra_state_is_the_contributors(tmp_path, ranks):
    links = (0, ranks - 1)
    results = hooked.run(with_extra_state, tmp_path, ranks=ranks, links=links)
    plan = hooked.plan_of(tmp_path)
    contributor = plan["shards"][0]["step_record"]["contributor"]
    hooked.replayed(tmp_path, links)
    found, truth = hooked.shadowed(tmp_path), results[contributor][0]
    assert {i: digest for i, (digest, _) in found.items()} == {i: d for i, (d, _) in enumerate(truth, 1)}
    for iteration, (_, (generator, position)) in enumerate(truth, 1):
        extra = found[iteration][1]
        assert extra["generator"].tolist() == generator and extra["position"].tolist() == position
    assert len({row[0][0][0] for row in results}) == ranks  # every rank has statistics of its own


def flipped_on(ranks):
    """Return a script in which these ranks change one bit of one parameter behind everybody's back, after iteration 6."""

    def script(here):
        ddp = here.ddp(net(), bucket_cap_mb=0.0005, forward_sync_buffers=False)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)

        def step(_, iteration):
            loss_of(ddp, here.rank, iteration).backward()
            optimizer.step()
            if iteration == 6 and here.rank in ranks:
                ddp.module.middle.bias.data.view(torch.int32)[7] ^= 1

        loop(here, ddp, optimizer, step, audit_every=4)

    return script


def test_a_bit_that_flips_on_one_rank_is_named(tmp_path):
    results = hooked.run(flipped_on({1}), tmp_path)
    report = hooked.replayed(tmp_path)
    first = report["alarms"][0]
    assert (first["iteration"], first["audited_to"], first["rank"], first["shadow"]) == (8, 3, 1, False)
    assert "middle.bias" in first["tensors"]
    assert all("middle.bias" in alarm["tensors"] for alarm in report["alarms"] if alarm["iteration"] == 8)
    # The shadow goes on, and is what the other ranks would be if gradients of the odd one had not spread.
    assert [row["state"] for row in report["iterations"]] == ["committed"] * STEPS
    assert len(results) == 3


def test_a_state_that_no_rank_has_is_committed_no_further(tmp_path):
    """Code between reduction and step, which the wire does not show."""
    hooked.run(flipped_on({0, 1, 2}), tmp_path)
    report = hooked.replayed(tmp_path)
    assert report["audited_to"] == 3
    assert {(alarm["iteration"], alarm["rank"], alarm["shadow"]) for alarm in report["alarms"]} == {(8, None, True)}
    states = {row["iteration"]: row["state"] for row in report["iterations"]}
    assert states == {i: "committed" if i < 8 else "waiting" for i in range(1, STEPS + 1)}
    with pytest.raises(FlowCheckError, match="waiting"):
        restore(tmp_path / "out", 9)


def refusing(here):
    """Return what attach says of each thing that it must refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what it imports here
        from torch.distributed.optim import ZeroRedundancyOptimizer
    said = {}

    def tried(name, make, optimizer=None, **options):
        ddp = make()
        optimizer = optimizer(ddp) if optimizer else torch.optim.SGD(ddp.parameters(), lr=0.1)
        try:
            here.attach(ddp, optimizer, **options).detach()
            said[name] = "nothing"
        except FlowCheckError as error:
            said[name] = str(error)

    def ddp(model=None, **options):
        return here.ddp(model or net(), **{"forward_sync_buffers": False, **options})

    def hooked_by(hook, state):
        made = ddp()
        made.register_comm_hook(state, hook)
        return made

    def in_backward():
        made = ddp()
        made.module.first.weight._in_backward_optimizers = [object()]
        return made

    normed = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6))
    tried("plain module", net)
    tried("world", lambda: torch.nn.parallel.DistributedDataParallel(net(), forward_sync_buffers=False))
    tried("buffers", lambda: here.ddp(net()))
    tried("unused", lambda: ddp(find_unused_parameters=True))
    tried("sparse", lambda: ddp(torch.nn.Embedding(4, 4, sparse=True)))
    tried("statistics", lambda: ddp(normed))
    tried("unknown buffer", ddp, buffers=["nobody"])
    tried("comm hook", lambda: hooked_by(lambda state, bucket: None, None))
    tried("hook's group", lambda: hooked_by(fp16_compress_hook, None))
    tried("in backward", in_backward)
    tried("sharded optimizer", ddp, lambda made: ZeroRedundancyOptimizer(made.parameters(), torch.optim.SGD, lr=0.1))
    tried("closure class", ddp, lambda made: torch.optim.LBFGS(made.parameters()))
    tried("foreign parameter", ddp, lambda made: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    tried("tensor lr", ddp, lambda made: torch.optim.Adam(made.parameters(), lr=torch.tensor(0.1)))
    tried("large extra", ddp, extra_state={"big": lambda: torch.zeros(1 << 20)})
    tried("taken name", ddp, extra_state={"scale": lambda: torch.zeros(1)})
    return said


WORDS = {
    "plain module": "expected DistributedDataParallel",
    "world": "process_group=flowcheck.group()",
    "buffers": "forward_sync_buffers=False",
    "unused": "find_unused_parameters",
    "sparse": "sparse gradients",
    "statistics": "declare it, buffers=['1.",
    "unknown buffer": "'nobody' is no key",
    "comm hook": "communication hook",
    "hook's group": "another group than DDP's",
    "in backward": "'first.weight' is stepped in the backward pass",
    "sharded optimizer": "ZeroRedundancyOptimizer",
    "closure class": "LBFGS",
    "foreign parameter": "not the model's",
    "tensor lr": "lr of param group 0 is a tensor",
    "large extra": "4194304 bytes",
    "taken name": "name it in buffers",
}


def test_what_cannot_be_followed_is_refused_by_name(tmp_path):
    said = hooked.run(refusing, tmp_path, ranks=2, links=(0, 1))[1][1]
    for name, words in WORDS.items():
        assert words in said[name] and "\n" not in said[name], (name, said[name])


def raising(here):
    """Return what is said of each thing that a trainer does wrong after it has attached."""
    said = {}

    def tried(name, wrong, **options):
        ddp = here.ddp(net(), forward_sync_buffers=False)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        with here.attach(ddp, optimizer, **options) as hook:
            try:
                wrong(ddp, optimizer, hook)
                said[name] = "nothing"
            except FlowCheckError as error:
                said[name] = str(error)

    def backward(ddp, iteration=1):
        loss_of(ddp, here.rank, iteration).backward()

    def undeclared(ddp, optimizer, _):
        backward(ddp)
        optimizer.param_groups[0]["momentum"] = 0.8
        optimizer.step()

    def flag(ddp, optimizer, _):
        backward(ddp)
        optimizer.param_groups[0]["nesterov"] = True
        optimizer.step()

    def another(ddp, optimizer, _):
        backward(ddp)
        torch.optim.SGD(ddp.module.last.parameters(), lr=0.1).step()

    def closure(ddp, optimizer, _):
        optimizer.step(lambda: backward(ddp))

    def twice(ddp, optimizer, _):
        backward(ddp)
        optimizer.step()
        optimizer.step()

    def two_reductions(ddp, optimizer, _):
        backward(ddp)
        backward(ddp)

    def grown(ddp, optimizer, _):
        backward(ddp)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        optimizer.step()

    def clipped_twice(ddp, optimizer, hook):
        backward(ddp)
        hook.clip_grad_norm_(1.0)
        hook.clip_grad_norm_(1.0)

    tried("undeclared", undeclared, varying=["lr"])
    tried("flag", flag)
    tried("another", another)
    tried("closure", closure)
    tried("twice", twice)
    tried("two reductions", two_reductions)
    tried("grown", grown)
    tried("clipped twice", clipped_twice)
    return said


def test_what_was_not_declared_raises_on_the_trainer(tmp_path):
    said = hooked.run(raising, tmp_path, ranks=2, links=(0, 1))[0][1]
    words = {
        "undeclared": "momentum of param group 0 (0.9, now 0.8)",
        "flag": "nesterov",
        "another": "another optimizer",
        "closure": "closure",
        "twice": "reduced 0 times",
        "two reductions": "reduced 2 times",
        "grown": "number of param groups",
        "clipped twice": "clipped already",
    }
    assert all(words[name] in said[name] for name in words), said


def spoil(folder, link, iteration, change):
    """Put `change(frame)` in place of each frame of a link that brings a byte of an iteration's step record."""
    plan = plans.load(folder / "plan.json")
    path = folder / f"link-{link}.pcapng"
    with RawPcapNgReader(str(path)) as reader:
        frames = [bytes(packet) for packet, _ in reader]
    ring = ring_of(folder, plan, frames, stream=f"link-{link}")
    parser = Parser(ring, plan, f"link-{link}")
    while not parser.finished:
        parser.poll()
    parser.close()
    chosen = {
        i for i in range(len(frames))
        if ring.record(i)["iteration"][0] == iteration and ring.record(i)["verdict"][0] == VERDICTS.index("step_record")
    }  # fmt: skip
    assert chosen
    ring.close()
    ring.path.unlink()
    kept = [change(frame) if i in chosen else frame for i, frame in enumerate(frames)]
    path.unlink()
    writer = PcapngWriter(path)
    for number, frame in enumerate(filter(None, kept)):
        writer.write(frame, 10**18 + 700 * number)
    writer.close()


def outcome(folder):
    return [(row["iteration"], row["state"], row["reason"]) for row in hooked.replayed(folder)["iterations"]]


def test_a_lost_record_is_taken_from_the_next_one(tmp_path):
    truth = hooked.run(plain, tmp_path)[0][0]
    for link in (0, 2):
        spoil(tmp_path, link, 5, lambda frame: None)
    assert outcome(tmp_path) == [(i, "committed", None) for i in range(1, STEPS + 1)]
    assert {i: d for i, (d, _) in hooked.shadowed(tmp_path).items()} == {i: d for i, (d, _) in enumerate(truth, 1)}


def test_a_record_that_is_lost_with_its_repetition_leaves_its_iteration_incomplete(tmp_path):
    hooked.run(plain, tmp_path)
    for link in (0, 2):
        spoil(tmp_path, link, 5, lambda frame: None)
        spoil(tmp_path, link, 6, lambda frame: None)
    assert outcome(tmp_path) == [
        *((i, "committed", None) for i in range(1, 5)),
        (5, "incomplete", "step_record"),
        *((i, "waiting", None) for i in range(6, STEPS + 1)),
    ]


def test_any_edge_that_the_contributor_does_not_receive_on_shows_the_whole_record(tmp_path):
    hooked.run(plain, tmp_path)
    spoil(tmp_path, 0, 5, lambda frame: None)
    spoil(tmp_path, 0, 6, lambda frame: None)
    report = hooked.replayed(tmp_path)
    assert [row["state"] for row in report["iterations"]][:6] == ["committed"] * 6


def with_a_wrong_word(frame):
    """Return a frame whose payload is off by one, its ICRC mended: as if the sum itself had been wrong."""
    spoilt = bytearray(frame)
    # The first word of the record, be it behind a RETH and an immediate or not.
    for at in range(14 + 40 + 8 + 12, len(spoilt) - 4, 4):
        if spoilt[at : at + 4] == struct.pack("<f", 0x4346):
            spoilt[at : at + 4] = struct.pack("<f", 0x4347)
            return builders.mended(spoilt)
    return frame


def test_a_record_with_a_wrong_checksum_commits_nothing(tmp_path):
    hooked.run(plain, tmp_path)
    for link in (0, 2):
        spoil(tmp_path, link, 5, with_a_wrong_word)
    assert outcome(tmp_path)[3:6] == [(4, "committed", None), (5, "incomplete", "step_record"), (6, "waiting", None)]


def saving(here):
    """Train, and leave full states; the last is that of the last step."""
    ddp = here.ddp(net(), forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)

    def step(_, iteration):
        loss_of(ddp, here.rank, iteration).backward()
        optimizer.step()

    loop(here, ddp, optimizer, step, full_state_every=STEPS)


class LastLacksItsRecord:
    """Slots of a live job whose last iteration lost only its record, and after which nothing comes."""

    consumed_next, ended, skipped = 1, 0, (0, 0)

    def __init__(self, directory, settled_next):
        self.directory, self.settled_next = directory, settled_next

    def gradient(self, iteration):
        return self.directory.slot(iteration)[0]

    def slot(self, iteration):
        record = np.zeros((), SLOT)
        record["iteration"], record["state"] = iteration, 3 if iteration == STEPS else 2
        return record[()]

    def missing(self, iteration):
        plan = self.directory.plan
        return [plan.record_range(plan.revision(iteration))] if iteration == STEPS else []


@pytest.mark.parametrize("settled", [STEPS, STEPS - 3])
def test_who_waits_for_what_never_comes_takes_a_base_all_the_same(tmp_path, settled):
    """The last record's repetition, or the last iterations as a whole: nobody goes past them, so they are never decided."""
    truth = hooked.run(saving, tmp_path)[0][0]
    hooked.replayed(tmp_path)
    source, out = Directory(tmp_path / "out"), tmp_path / "other"
    slots = LastLacksItsRecord(source, settled + 1)
    with contextlib.closing(
        Updater(source.plan, slots, out, plan_folder=tmp_path, bases=[tmp_path / "states"])
    ) as updater:
        end = time.monotonic() + 20
        while not updater.counters()["bases"]:
            updater.poll()
            assert time.monotonic() < end
    assert list(Directory(out).restorable()) == [*range(min(settled, STEPS - 1) + 1), STEPS]
    assert digest(restore(out)) == truth[-1][0]
