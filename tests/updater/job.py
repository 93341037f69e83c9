# SPDX-License-Identifier: MIT
"""A job as an updater meets it, without packets: its plan, what the slots would bring of it, and the trainer's own states.

`made` draws gradients by lot and steps torch's own AdamW by them; `recorded` takes a job that ran on two ranks, its
gradients from its packets and its states from the trainer.
"""

import copy
import json
import time

import numpy as np
import torch

from flowcheck import describe
from flowcheck import plan as plans
from tests.jobs import EXAMPLE, settled
from tests.pipeline.recordings import recorded as record
from tests.pipeline.recordings import shadowed
from updater.gradient import read_gradient
from updater.restore import restore
from updater.updater import Updater

SHAPES = {"a": (23, 11), "b": (5,), "c": (16, 17), "d": (3, 3)}
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
PATIENCE_S = 20


class Job:
    """Plan, slot bytes per iteration (0: the initial state), and the state after each iteration; all of it in memory."""

    def __init__(self, plan, slots, truth):
        self.plan, self.slots, self.truth = plan, slots, truth

    @property
    def iterations(self):
        return len(self.truth) - 1

    def keeping(self, **checkpoints):
        """Return the same job under other rules for its directory (docs/plan.md)."""
        document = json.loads(self.plan.canonical()) | {"checkpoints": checkpoints}
        return Job(plans.parse(json.dumps(document)), self.slots, self.truth)

    def gradient(self, iteration):
        """The flat gradient, as the trainer's ranks reduced it."""
        ranges = self.plan.revision(iteration).slot_ranges
        return b"".join(self.slots[iteration][begin:end].tobytes() for begin, end in ranges)


class Slots:
    """Slots of a job: what lies below `settled_next` the network has brought, below `consumed_next` the updater given back.

    What was given back is written over at once, as the network may do.
    """

    def __init__(self, job, first):
        self._job, self._consumed_next, self._lent = job, first, {}
        self.settled_next, self.ended, self.volatile_from, self.skipped = first, 0, 0, (0, 0)
        self.given_back = lambda consumed_next: None  # called when the updater gives a slot back

    @property
    def consumed_next(self):
        return self._consumed_next

    @consumed_next.setter
    def consumed_next(self, value):
        self._consumed_next = value
        for iteration in [lent for lent in self._lent if lent < value]:
            self._lent.pop(iteration)[:] = 0xA5
        self.given_back(value)

    def gradient(self, iteration):
        assert self.consumed_next <= iteration < self.settled_next, "a slot that is not the updater's"
        if iteration not in self._lent:
            self._lent[iteration] = self._job.slots[iteration].copy()
        return self._lent[iteration]

    def slot(self, iteration):
        return settled(iteration)

    def missing(self, iteration):
        return []


class Shadowing:
    """An updater at work on a directory: make -> bring ... -> end, or `leave` it in the middle."""

    def __init__(self, job, out, first=0, given_back=lambda consumed_next: None, **options):
        self.slots = Slots(job, first)
        self.slots.given_back = given_back
        self.updater = Updater(job.plan, self.slots, out, **options)
        while self.updater.poll():
            pass

    def until(self, done):
        """Poll until something has come true; the updater must get there by itself."""
        end = time.monotonic() + PATIENCE_S
        while not done():
            if not self.updater.poll():
                time.sleep(0.001)
            assert time.monotonic() < end, "the updater does not get on"

    def bring(self, iteration):
        """Let the network bring everything up to an iteration, one at a time, each taken before the next comes."""
        for brought in range(self.slots.settled_next, iteration + 1):
            self.slots.settled_next = brought + 1
            self.until(lambda brought=brought: self.slots.consumed_next > brought)

    def end(self):
        self.slots.ended = 1
        self.until(lambda: self.updater.finished)
        self.updater.close()

    def leave(self):
        """Stop where it is, as on a signal."""
        self.updater.close()


def made(iterations, seed=1):
    """Return a job of about 500 parameters in two buckets, one of them in none, one tied."""
    plan = _plan()
    rng = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    initial = np.zeros(plan.initial_bytes, np.uint8)
    for key, offset in plan.initial_offsets.items():
        initial[offset : offset + values[key].nbytes] = values[key].reshape(-1).view(torch.uint8).numpy()
    parameters = {name: torch.nn.Parameter(value) for name, value in values.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [parameters["a"], parameters["b"]]}, {"params": [parameters["d"], parameters["c"]], "lr": 0.02}],
        **OPTIONS,
    )
    slots, truth = [initial], [_state(parameters, optimizer)]
    for iteration in range(1, iterations + 1):
        slot = np.zeros(plan.slot_bytes, np.uint8)
        for bucket, (begin, _) in zip(
            plan.revision(iteration).buckets, plan.revision(iteration).slot_ranges, strict=True
        ):
            for place in bucket.parameters:
                gradient = torch.randn(place.shape, generator=rng)
                parameters[place.name].grad = gradient
                low = begin + 4 * place.offset
                slot[low : low + gradient.nbytes] = gradient.reshape(-1).view(torch.uint8).numpy()
        optimizer.step()
        slots.append(slot)
        truth.append(_state(parameters, optimizer))
    return Job(plan, slots, truth)


def _state(parameters, optimizer):
    model = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {"model": {**model, "tied": model["a"]}, "optimizer": copy.deepcopy(optimizer.state_dict())}


def _plan():
    document = copy.deepcopy(EXAMPLE)
    shard = document["shards"][0]
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    shard["startup"] = [
        {"op": "broadcast", "dtype": "float32", "elements": sum(sizes.values()), "carries": "initial_state"}
    ]
    buckets = [
        {"dtype": "float32", "elements": sum(sizes[name] for name in names), "parameters": [
            {"name": name, "shape": SHAPES[name], "offset": sum(sizes[n] for n in names[:at])} for at, name in enumerate(names)
        ]} for names in (["a"], ["d", "c"])
    ]  # fmt: skip
    shard["revisions"] = [{"from_iteration": 1, "buckets": buckets}]
    entry = {"kind": "parameter", "dtype": "float32"}
    document["state"] = [{"key": name, "shape": shape, "parameter": name, **entry} for name, shape in SHAPES.items()]
    document["state"].append({"key": "tied", "shape": SHAPES["a"], "parameter": "a", **entry})
    document["initial_state"] = {"source": "broadcast", "tensors": list(SHAPES)}
    groups = [
        {"parameters": ["a", "b"], "options": OPTIONS},
        {"parameters": ["d", "c"], "options": {**OPTIONS, "lr": 0.02}},
    ]
    document["optimizer"] = {"class": "AdamW", "groups": groups}
    document["arithmetic"] = describe.arithmetic("cpu")
    return plans.parse(json.dumps(document))


def recorded(folder, iterations):
    """Return a job recorded into a folder, of about 2,000 parameters."""
    record(folder / "recording", iterations=iterations, optimizer="adamw", parameters=2000)
    out = folder / "whole"
    shadowed(folder / "recording", out)
    plan = plans.load(folder / "recording" / "plan.json")
    first = restore(out, 0)
    initial = np.zeros(plan.initial_bytes, np.uint8)
    for key, offset in plan.initial_offsets.items():
        initial[offset : offset + first["model"][key].nbytes] = (
            first["model"][key].reshape(-1).view(torch.uint8).numpy()
        )
    slots, truth = [initial], [first]
    for iteration in range(1, iterations + 1):
        flat, slot, at = read_gradient(out, iteration).view(np.uint8), np.zeros(plan.slot_bytes, np.uint8), 0
        for begin, end in plan.revision(iteration).slot_ranges:
            slot[begin:end], at = flat[at : at + end - begin], at + end - begin
        slots.append(slot)
        path = folder / "recording" / "truth" / f"iteration-{iteration:06}.pt"
        truth.append(torch.load(path, weights_only=True))
    return Job(plan, slots, truth)
