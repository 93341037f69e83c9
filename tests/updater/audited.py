# SPDX-License-Identifier: MIT
"""A job with step records, without packets: ranks in plain torch that may lose a bit, and what a shadow meets of them.

Beside the ranks goes one trainer that nobody meddles with: the state that the shadow must have. Which tensors of a rank have
other bits than its is seen by comparing bytes, never by a digest.
"""

import copy
import json

import numpy as np
import torch

from flowcheck import audit, describe
from flowcheck import plan as plans
from flowcheck.step_record import checksum, split_digest
from tests.updater import job as jobs
from updater.directory import Directory, segments
from updater.listing import listing
from updater.log_reader import Segment, read_facts, segment_name
from updater.updater import Updater

SHAPES = {"a": (13, 7), "b": (5,), "c": (11, 6), "d": (3, 3)}
REDUCED = (("a",), ("d", "c"))
#: docs/step-record.md and docs/checkpoints.md: the flag of a record with digests; kinds of notes in the log.
HAS_DIGESTS = 32
NOTES = {3: "right", 4: "rank", 5: "diverged"}
_STEPPED = {"step", "mu_product"}
FORMS = {
    kind: ("default", "foreach") for kind in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam")
}
FORMS |= {kind: (*FORMS[kind], "fused") for kind in ("SGD", "Adam", "AdamW", "Adagrad")}
_EVERYTHING = {"lr": 0.01, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "maximize": True}
OPTIONS = {
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
            {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True}],
    "Adam": [{"lr": 0.001}, {**_EVERYTHING, "amsgrad": True},
             {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}],
    "AdamW": [{"lr": 0.001}, _EVERYTHING, {"lr": 0.01, "amsgrad": True}],
    "Adagrad": [{"lr": 0.01}, {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.1,
                               "eps": 1e-6, "maximize": True}],
    "RMSprop": [{"lr": 0.01}, {"lr": 0.01, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1, "momentum": 0.9,
                               "centered": True, "maximize": True}],
    "Adamax": [{"lr": 0.01}, _EVERYTHING],
    "NAdam": [{"lr": 0.01}, {**_EVERYTHING, "momentum_decay": 0.01, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.01}, {**_EVERYTHING, "decoupled_weight_decay": True}],
}  # fmt: skip


def make_plan(
    kind="AdamW", form="default", options=None, dtype="float32", ranks=3, every=4, groups=3, checkpoints=None
):
    """Two param groups whose lr varies, parameter b in no bucket, constant k."""
    document = copy.deepcopy(jobs.EXAMPLE)
    shard = document["shards"][0]
    document["job"]["world_size"], shard["layout"]["ring"] = ranks, list(range(ranks))
    shard["startup"] = shard["startup"][:2]
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    buckets = [
        {"dtype": dtype, "elements": sum(sizes[name] for name in names), "parameters": [
            {"name": name, "shape": SHAPES[name], "offset": sum(sizes[n] for n in names[:at])} for at, name in enumerate(names)
        ]} for names in REDUCED
    ]  # fmt: skip
    shard["revisions"] = [{"from_iteration": 1, "buckets": buckets}]
    shard["step_record"] = {"contributor": ranks - 1, "audit": {"every": every, "groups": groups}}
    document["state"] = [
        {"key": name, "kind": "parameter", "dtype": dtype, "shape": shape, "parameter": name}
        for name, shape in SHAPES.items()
    ]
    document["state"].append({"key": "k", "kind": "constant", "dtype": "float32", "shape": [4]})
    document["initial_state"] = {"source": "file", "path": "initial.pt"}
    options = options or {"lr": 0.01}
    document["optimizer"] = {"class": kind, "form": form, "groups": [
        {"parameters": ["a", "b"], "options": options, "varying": ["lr"]},
        {"parameters": ["d", "c"], "options": {**options, "lr": options["lr"] / 2}, "varying": ["lr"]},
    ]}  # fmt: skip
    document["arithmetic"] = describe.arithmetic("cpu")
    document["checkpoints"] = checkpoints or {}
    return plans.parse(json.dumps(document))


class Trainer:
    """One rank: `tensors` are the parameters and the constant, by name."""

    def __init__(self, plan, values):
        self.plan = plan
        self.tensors = {n: torch.nn.Parameter(v.clone()) if n in SHAPES else v.clone() for n, v in values.items()}
        groups = [
            {**group.options, "params": [self.tensors[name] for name in group.parameters]}
            for group in plan.optimizer.groups
        ]
        form = {} if plan.optimizer.form == "default" else {plan.optimizer.form: True}
        self.optimizer = getattr(torch.optim, plan.optimizer.class_name)(groups, **form)

    def step(self, iteration, gradients):
        for group, planned in zip(self.optimizer.param_groups, self.plan.optimizer.groups, strict=True):
            group["lr"] = planned.options["lr"] / (1 + iteration / 50)
        for name, gradient in gradients.items():
            self.tensors[name].grad = gradient.clone()
        self.optimizer.step()

    def parts(self):
        """Every tensor of the state, by (parameter or constant, what of it)."""
        found = {(name, "value"): tensor.detach() for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            state = self.optimizer.state.get(tensor, {})
            found |= {(name, key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
        return found

    def bits(self):
        return {place: raw(tensor).numpy().tobytes() for place, tensor in self.parts().items()}

    def state(self):
        return copy.deepcopy({"model": dict(self.tensors), "optimizer": self.optimizer.state_dict()})

    def flip(self, place, at, bit):
        raw(self.parts()[place])[at] ^= 1 << bit


def raw(tensor):
    """The bytes of a tensor, as a view."""
    return tensor.reshape(-1).view(torch.uint8)


def any_bit(trainer, rng):
    """Return (place, byte, bit) of a bit of a trainer's state, each tensor as likely as any other.

    Of what counts steps it is one of the mantissa: with a negative number of steps torch itself raises.
    """
    parts = {place: tensor for place, tensor in trainer.parts().items() if tensor.numel()}
    place = rng.choice(sorted(parts))
    at = rng.randrange(1, 3) if place[1] in _STEPPED else rng.randrange(parts[place].nbytes)
    return place, at, rng.randrange(7 if place[1] in _STEPPED else 8)


def record(form, iteration, trainer, digests, previous):
    """Return what the all-reduce gives that ends an iteration, and the words of its step, as the hook has them.

    Args:
        form: of the job's records.
        iteration: which.
        trainer: of the contributor.
        digests: of each rank, before the step; None where the iteration is not audited.
        previous: the words of the step before.
    """
    known = form.fixed(iteration, 1, HAS_DIGESTS if digests else 0) + form.varying(trainer.optimizer.param_groups)
    content = np.zeros(form.content, np.int64)
    content[: len(known)] = known
    sums = checksum(content, np.arange(1, form.content + 1))
    words = np.array([*content, *(int(total) >> shift & 0xFFFF for total in sums for shift in (0, 16))], np.float32)
    out = np.zeros(form.elements, np.float32)
    out[: form.words], out[form.words : 2 * form.words] = words, previous
    for rank, digest in enumerate(digests or ()):
        digits = torch.stack(split_digest(digest, form.bits), -1)
        out[2 * form.words :] += torch.stack([digits, digits * form.weight(rank)], 1).flatten().numpy().astype("f4")
    return out, words


def is_audited(plan, iteration):
    return iteration <= 3 or iteration % plan.shard.step_record.audit.every == 0


class Run(jobs.Job):
    """What a shadow meets of a job, what it must have of it, and what became of the ranks.

    Attributes:
        ranks: states of rank 0 by iteration; `truth` are those of the trainer that nobody meddles with.
        off: by audited iteration, the ranks that had other bits before it: names of their tensors that had.
    """

    def __init__(self, plan, iterations, meddle=lambda iteration, trainers: None, seed=1):
        """Train; `meddle` is called with the ranks' trainers after each iteration's step."""
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, plan.state[0].dtype)
        values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        values["k"] = torch.randn(4, generator=generator)
        trainers = [Trainer(plan, values) for _ in range(plan.job.world_size + 1)]
        sound = trainers.pop()
        form, groups = plan.record_form, audit.group_names(plan)
        slots, previous = [None], np.zeros(form.words, np.float32)
        self.initial, self.off, self.ranks, truth = values, {}, [trainers[0].state()], [sound.state()]
        for iteration in range(1, iterations + 1):
            digests = None
            if is_audited(plan, iteration):
                digests = [audit.digests(groups, t.tensors, t.optimizer) for t in trainers]
                self.off[iteration] = _differing(trainers, sound)
            gradients = {n: torch.randn(SHAPES[n], generator=generator).to(dtype) for names in REDUCED for n in names}
            for trainer in (*trainers, sound):
                trainer.step(iteration, gradients)
            revision, slot = plan.revision(iteration), np.zeros(plan.slot_bytes, np.uint8)
            for (begin, end), names in zip(revision.slot_ranges, REDUCED, strict=True):
                slot[begin:end] = torch.cat([raw(gradients[name]) for name in names]).numpy()
            content, previous = record(form, iteration, sound, digests, previous)
            slot[slice(*plan.record_range(revision))] = content.view(np.uint8)
            slots.append(slot)
            truth.append(sound.state())
            meddle(iteration, trainers)
            self.ranks.append(trainers[0].state())
        super().__init__(plan, slots, truth)

    def shadow(self, folder, first=1, settled=None, **options):
        """Return an updater of this run at work in a folder, its slots settled up to an iteration."""
        folder.mkdir(exist_ok=True)
        torch.save({"model": self.initial}, folder / "initial.pt")
        return Shadow(self, folder, first, settled, **options)


def _differing(trainers, sound):
    ours = sound.bits()
    found = {rank: {p for p, b in trainer.bits().items() if b != ours[p]} for rank, trainer in enumerate(trainers)}
    return {rank: {name for name, _ in places} for rank, places in found.items() if places}


class Shadow(jobs.Shadowing):
    """An updater of a run, not polled yet."""

    def __init__(self, run, folder, first, settled, **options):
        self.slots, self.out = jobs.Slots(run, first), folder / "out"
        self.slots.settled_next = (settled or first - 1) + 1
        self.updater = Updater(run.plan, self.slots, self.out, plan_folder=folder, **options)

    def bring(self, iteration):
        """As for any job; then until the state has caught up."""
        super().bring(iteration)
        self.until(lambda: self.slots.consumed_next > iteration and self.updater.reached is not None)
        self.settle()

    def settle(self):
        """Poll until there is nothing to do."""
        while self.updater.poll():
            pass


def notes(out):
    """Return what the log notes of audits, in order: iteration, outcome, the rank of each alarm."""
    directory = Directory(out)
    identities, found = directory.manifest.identities, []
    for number in segments(directory.manifest):
        with Segment(out / "log" / segment_name(number), identities) as segment:
            for entry in segment.entries():
                if entry.header.kind in NOTES:
                    alarms = read_facts(entry, identities)["alarms"]
                    found.append((entry.header.iteration, NOTES[entry.header.kind], [a["rank"] for a in alarms]))
    return found


def states(out):
    """Return the state of each iteration, as `list` has it."""
    return {row["iteration"]: row["state"] for row in listing(out)["iterations"]}


def give(state, iteration, bases):
    """Leave a full state of a trainer where the updater looks for bases."""
    bases.mkdir()
    torch.save(state | {"iteration": iteration}, bases.with_suffix(".pt"))
    bases.with_suffix(".pt").rename(bases / f"state-{iteration:06}.pt")
