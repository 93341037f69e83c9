# SPDX-License-Identifier: MIT
"""A job of a few hundred parameters whose slots come from a list: a checkpoint directory in milliseconds, no packets.

Truth is plain torch: AdamW (or what `optimizer` says) stepped by the same gradients.
"""

import contextlib
import copy
import json
import time

import numpy as np
import torch

from flowcheck import describe
from flowcheck import plan as plans
from tests.jobs import EXAMPLE, settled
from updater.updater import Updater

ELEMENTS = 300


def gradient(iteration, attempt=1, elements=ELEMENTS):
    return np.random.default_rng([iteration, attempt]).standard_normal(elements).astype("<f4")


def make_plan(attempt=1, resumed=None, elements=ELEMENTS, checkpoints=None, kind="AdamW", form="fused", **options):
    """Return a plan whose initial state is `initial.pt`."""
    document = copy.deepcopy(EXAMPLE)
    shard = document["shards"][0]
    shard["startup"] = shard["startup"][:2]
    first = resumed[1] + 1 if resumed else 1
    shard["revisions"] = shard["revisions"][:1]
    bucket = shard["revisions"][0]["buckets"][0]
    shard["revisions"][0]["from_iteration"] = first
    bucket["elements"], bucket["parameters"][0]["shape"] = elements, [1, elements]
    document["state"][0]["shape"] = [1, elements]
    document["job"]["attempt"] = attempt
    if resumed:
        document["job"]["resumed"] = {"attempt": resumed[0], "iteration": resumed[1]}
    document["initial_state"] = {"source": "file", "path": "initial.pt"}
    document["optimizer"] = {
        "class": kind, "form": form, "groups": [{"parameters": ["weight"], "options": {"lr": 0.01, **options}}],
    }  # fmt: skip
    document["arithmetic"] = describe.arithmetic("cpu")
    document["checkpoints"] = checkpoints or {}
    return plans.parse(json.dumps(document))


class Slots:
    """Slots that bring iterations up to `last`, `ahead` at once; those in `lost` are incomplete."""

    def __init__(self, plan, last, lost=(), consumed=None, ended=1, ahead=1):
        self.plan, self.last, self.lost, self.ahead = plan, last, set(lost), ahead
        self.ended, self.volatile_from, self.skipped = ended, 0, (0, 0)
        self.consumed_next = plan.first_step if consumed is None else consumed

    @property
    def settled_next(self):
        return min(self.last + 1, self.consumed_next + self.ahead)

    def gradient(self, iteration):
        elements = self.plan.revision(iteration).buckets[0].elements
        return gradient(iteration, self.plan.job.attempt, elements).view(np.uint8).copy()

    def slot(self, iteration):
        return settled(iteration, incomplete=iteration in self.lost)

    def missing(self, _iteration):
        return [(8, 24)]


class Truth:
    """The trainer: states after each iteration, by plain torch."""

    def __init__(self, plan, start=None):
        options = dict(plan.optimizer.groups[0].options)
        form = {} if plan.optimizer.form == "default" else {plan.optimizer.form: True}
        elements = plan.revision(plan.first_step).buckets[0].elements
        self.plan = plan
        self.weight = torch.nn.Parameter(torch.arange(elements, dtype=torch.float32).reshape(1, -1) / 64)
        self.optimizer = getattr(torch.optim, plan.optimizer.class_name)([self.weight], **options, **form)
        self.iteration = plan.first_step - 1
        if start is not None:
            self.weight.data.copy_(start["model"]["weight"])
            self.optimizer.load_state_dict(copy.deepcopy(start["optimizer"]))
        self.states = {self.iteration: self.state()}

    def state(self):
        state = {
            "model": {"weight": self.weight},
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
        }
        return copy.deepcopy(state)

    def run(self, last):
        while self.iteration < last:
            self.iteration += 1
            content = gradient(self.iteration, self.plan.job.attempt, self.weight.numel())
            self.weight.grad = torch.from_numpy(content.copy()).reshape(1, -1)
            self.optimizer.step()
            self.states[self.iteration] = self.state()
        return self

    def save(self, folder, iteration=None):
        """Write a state as the trainer does: the initial one, or one that a shadow may take as a base."""
        folder.mkdir(exist_ok=True)
        name = "initial.pt" if iteration is None else f"state-{iteration:06}.pt"
        torch.save(self.states[min(self.states) if iteration is None else iteration], folder / name)


def open_updater(plan, slots, out, folder, **options):
    return contextlib.closing(Updater(plan, slots, out, plan_folder=folder, **options))


def run(updater, until=None, seconds=20):
    """Poll an updater until it is finished, or a condition holds."""
    end = time.monotonic() + seconds
    while not (until() if until else updater.finished):
        if not updater.poll():
            time.sleep(0.001)
        while updater._snapshots.busy:  # the job is slow enough for each snapshot that is due
            updater._look_after_snapshots(wait=True)
        assert time.monotonic() < end, updater.counters()


def make(tmp_path, last=20, lost=(), **options):
    """Write a directory; return it and the truth."""
    plan = make_plan(**options)
    truth = Truth(plan).run(last)
    truth.save(tmp_path)
    with open_updater(plan, Slots(plan, last, lost), tmp_path / "out", tmp_path) as updater:
        run(updater)
    return tmp_path / "out", truth
