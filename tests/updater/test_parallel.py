# SPDX-License-Identifier: MIT
"""Stepped by several threads a state has the bits that one thread gives it."""

import numpy as np
import pytest
import torch

from flowcheck.step_record import Step
from tests.pipeline.recordings import tensors
from tests.updater.test_optimizer import OPTIONS, SHAPES, make_plan
from updater.model_state import ModelState
from updater.parallel import ParallelSteps, shares


def values(state):
    parts = {"model": state.model, "optimizer": state.optimizer.state_dict()}
    return {p: v.detach().numpy().tobytes() if isinstance(v, torch.Tensor) else v for p, v in tensors(parts)}


@pytest.mark.parametrize("form", ["default", "foreach", "fused"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad"])
def test_threads_change_no_bit(kind, form):
    plan = make_plan(kind, form, OPTIONS[kind][-1], "float32")
    revision, rng = plan.revision(1), np.random.default_rng(7)
    alone, together = ModelState(plan), ModelState(plan)
    start = {name: torch.from_numpy(rng.standard_normal(shape).astype("f4")) for name, shape in SHAPES.items()}
    for state in (alone, together):
        state.load_model({**start, "tied": start["a"]}, "the test")
    steps = [None, Step(2, clip_coefficient=0.5, hyperparameters={0: {"lr": 0.03}}), None]
    with ParallelSteps(together, threads=3) as parts:
        for said in steps:
            slot = rng.standard_normal(plan.slot_bytes // 4).astype("<f4").view(np.uint8)
            alone.step(slot, revision, said)
            parts.step(slot, revision, said)
            assert values(alone) == values(together)


def test_shares_are_of_about_equal_bytes_and_leave_nothing_out():
    plan = make_plan("SGD", "default", {"lr": 0.1}, "float32")
    for count in (1, 2, 3, 50):
        found = shares(plan, count)
        assert set.union(*found) == set(SHAPES) and sum(map(len, found)) == len(SHAPES) and all(found)
    two = [sum(int(np.prod(SHAPES[name])) for name in share) for share in shares(plan, 2)]
    assert min(two) * 12 > max(two)
