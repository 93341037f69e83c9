# SPDX-License-Identifier: MIT
"""Stepping a training state by several threads, each with its share of the parameters.

An optimizer's step computes each parameter's values from that parameter's alone, so the bits are those of one thread
(tests/updater/test_parallel.py). torch itself spreads only large tensors over threads; `updater.blocks` spreads all of them, and
is left to do so.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from flowcheck.plan import Plan, Revision
from flowcheck.step_record import Step
from updater.model_state import ModelState

__all__ = ["ParallelSteps", "shares"]

#: More threads than this wait for memory, not for each other.
_MOST_THREADS = 8
#: Smaller models are stepped in less time than handing them to threads takes.
_LEAST_BYTES = 4 << 20


def shares(plan: Plan, count: int) -> list[set[str]]:
    """Return the names of the parameters in so many shares of about equal bytes, none of them empty."""
    sizes = {entry.parameter: entry.bytes for entry in plan.state if entry.kind == "parameter"}
    out: list[set[str]] = [set() for _ in range(max(1, min(count, len(sizes))))]
    room = [0] * len(out)
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        least = room.index(min(room))
        out[least].add(name)
        room[least] += size
    return out


class ParallelSteps:
    """Steps a state that is not loaded anew meanwhile: step ... -> close (or use it in a `with`)."""

    def __init__(self, model: ModelState, threads: int | None = None) -> None:
        """Share the parameters out: over as many threads as cores, but of a small model all to one, if not told otherwise."""
        if threads is None:
            threads = min(_MOST_THREADS, len(os.sched_getaffinity(0))) if model.bytes >= _LEAST_BYTES else 1
        names = shares(model.plan, threads)
        self._model, self._pool, self._threads = model, None, torch.get_num_threads()
        if model.spreads:
            torch.set_num_threads(threads)
            return
        if len(names) == 1:
            return
        self._parts = [model.part(share, first=not number) for number, share in enumerate(names)]
        each = max(1, self._threads // len(names))
        self._pool = ThreadPoolExecutor(len(names), "step", initializer=torch.set_num_threads, initargs=(each,))

    def step(self, slot: np.ndarray, revision: Revision, step: Step | None = None) -> None:
        """Apply one iteration's gradient, as `ModelState.step` does."""
        if self._pool is None:
            self._model.step(slot, revision, step)
            return
        for done in [self._pool.submit(part.step, slot, revision, step) for part in self._parts]:
            done.result()
        for whole, part in zip(self._model.optimizer.param_groups, self._parts[0].optimizer.param_groups, strict=True):
            whole.update({name: value for name, value in part.items() if name != "params"})

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
        torch.set_num_threads(self._threads)

    def __enter__(self) -> ParallelSteps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
