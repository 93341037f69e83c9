# SPDX-License-Identifier: MIT
"""The updater's parts: the optimizer step, the log, the snapshot, each beside what torch or the disk does alone."""

from __future__ import annotations

import functools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from bench.measure import Clock, Results, Sizes
from flowcheck import plan as plans
from updater import arithmetic, durable
from updater.log import LogWriter
from updater.log_format import GRADIENT
from updater.model_state import ModelState
from updater.snapshot import State, write_state

__all__ = ["WAYS", "checkpoints", "filled", "model_plan", "torch_save", "updates", "write_raw"]

#: Torch's own ways to write a state, by the end of the row's name.
WAYS = {"torch_save": "torch.save", "dcp_save": "DCP save", "dcp_async_save": "DCP async_save"}
#: What a fused AdamW step reads and writes for a float32 parameter: it, its gradient, two moments; three of them written.
_STEP_BYTES = 7 * 4
#: What adding two float32 vectors into a third one does for an element.
_ADD_BYTES = 3 * 4


def model_plan(form: str, elements: int) -> plans.Plan:
    """Return a plan of so many parameters, a multiple of 8000, in a few tensors, stepped by AdamW."""
    shapes = {"wide": (elements // 4000, 2000), "deep": (elements // 8000, 2000), "rest": (elements // 4,)}
    parameters, offset = [], 0
    for name, shape in shapes.items():
        parameters.append({"name": name, "shape": shape, "offset": offset})
        offset += int(np.prod(shape))
    layout = {"source": "modelled", "library": "nccl", "version": "2.24", "protocol": "ll", "ring": [0, 1], "mtu": 4096}
    connection = {
        "edge": 0,
        "channel": 0,
        "source": "::1",
        "destination": "::2",
        "proof": {"kind": "queue_pair", "data": [9]},
    }
    return plans.parse(
        json.dumps(
            {
                "format": "flowcheck-plan",
                "version": 1,
                "job": {"run_id": "bench", "attempt": 1, "world_size": 2},
                "shards": [
                    {
                        "name": "model",
                        "revisions": [
                            {
                                "from_iteration": 1,
                                "buckets": [{"dtype": "float32", "elements": offset, "parameters": parameters}],
                            }
                        ],
                        "layout": layout,
                        "connections": [connection],
                        "streams": [{"name": "s", "links": [0]}],
                    }
                ],
                "state": [
                    {"key": n, "kind": "parameter", "dtype": "float32", "shape": s, "parameter": n}
                    for n, s in shapes.items()
                ],
                "initial_state": {"source": "file", "path": "initial.pt"},
                "optimizer": {
                    "class": "AdamW",
                    "form": form,
                    "groups": [{"parameters": list(shapes), "options": {"lr": 0.001}}],
                },
                "arithmetic": arithmetic.current().model_dump(),
            }
        )
    )


def filled(form: str, elements: int) -> tuple[plans.Plan, ModelState, np.ndarray]:
    """Return a plan, a state with values, and a slot with a gradient."""
    plan = model_plan(form, elements)
    state = ModelState(plan)
    state.load_model({key: torch.randn(value.shape) for key, value in state.model.items()}, "the benchmark")
    slot = torch.zeros(plan.slot_bytes, dtype=torch.uint8).numpy()  # on 64 bytes, as slots lie
    slot[: 4 * elements] = torch.randn(elements).numpy().view(np.uint8)
    return plan, state, slot


def _bare_step(clock: Clock, name: str, optimizer: torch.optim.Optimizer, slot: np.ndarray) -> None:
    """Time an optimizer's own step, by a slot's gradient.

    On the state's own memory: how fast memory is depends on where it lies, by more than is to be seen here.
    """
    parameters = optimizer.param_groups[0]["params"]
    sizes = [parameter.numel() for parameter in parameters]
    gradient = torch.from_numpy(slot[: 4 * sum(sizes)]).view(torch.float32)
    for parameter, part in zip(parameters, gradient.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    clock(name, optimizer.step)


def updates(results: Results, sizes: Sizes) -> None:
    """Measure the step in either form beside the bare fused one, the bare default one, and the fused one beside `torch.add`."""
    clock = Clock(sizes)
    work: dict[str, Callable[[], object]] = {}
    for form in ("fused", "default"):
        plan, state, slot = filled(form, sizes.parameters)
        work[f"bare {form}"] = functools.partial(_bare_step, clock, f"bare {form}", state.optimizer, slot)
        work[form] = functools.partial(clock, form, functools.partial(state.step, slot, plan.revision(1)))
    elements = sizes.data_bytes // 4
    one, other, total = torch.ones(elements), torch.ones(elements), torch.zeros(elements)
    work["add"] = lambda: clock("add", lambda: torch.add(one, other, out=total))
    for _ in clock.turns():
        for call in work.values():
            call()

    for name, timed in (("update_fused", "fused"), ("update_default", "default"), ("step_default", "bare default")):
        results.add(
            name, "parameters/s", sizes.parameters, clock.times[timed],
            "bare AdamW step, fused", sizes.parameters, clock.times["bare fused"],
        )  # fmt: skip
    results.add(
        "update_memory", "bytes/s", _STEP_BYTES * sizes.parameters, clock.times["fused"],
        "torch.add", _ADD_BYTES * elements, clock.times["add"],
    )  # fmt: skip


def write_raw(path: Path, contents: Iterable[np.ndarray]) -> None:
    """Write bytes one after another into a file so that they are on the disk."""
    with open(path, "wb", buffering=0) as file:
        for content in contents:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
        os.fdatasync(file.fileno())


class _SyncedAt(durable.Disk):
    """A disk that notes when a file was last synced to its end."""

    at = 0.0

    def sync(self, fd: int) -> None:
        """Make a file's content and size durable."""
        super().sync(fd)
        self.at = time.perf_counter()


def torch_save(path: Path, state: dict[str, Any]) -> None:
    """Save a state so that it is on the disk."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _quietly(call: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        call()


def checkpoints(results: Results, sizes: Sizes, folder: Path) -> None:
    """Measure log and snapshot beside raw synced writing, and the snapshot beside torch's own ways to write a state."""
    plan, model, slot = filled("fused", sizes.parameters)
    model.step(slot, plan.revision(1))
    gradient = slot[: 4 * sizes.parameters]
    state = State("bench", 1, 1, True, arithmetic.current().model_dump(), model.model, model.optimizer.state_dict())
    contents = [tensor.detach().numpy().reshape(-1).view(np.uint8) for _, tensor in state.tensors()]
    size = sum(content.nbytes for content in contents)
    document = {"model": model.model, "optimizer": model.optimizer.state_dict(), "iteration": 1}
    clock = Clock(sizes)
    log = folder / "log"
    log.mkdir()
    writer = LogWriter(log, plan.identity(), 0)
    disk = durable.disk = _SyncedAt()
    for turn in clock.turns():

        def append(iteration: int = turn + 1) -> None:
            writer.append(GRADIENT, 1, iteration, 0, [gradient])
            writer.commit()

        clock("raw log", lambda: write_raw(folder / "raw", [gradient]))
        clock("log", append)
        clock("raw snapshot", lambda: write_raw(folder / "raw", contents))
        begin = time.perf_counter()
        clock("snapshot", lambda: write_state(folder / "snapshot.h5", state))
        clock.times["snapshot written"].append(disk.at - begin)
        clock("torch.save", lambda: torch_save(folder / "state.pt", document))
        clock("DCP save", lambda: _quietly(lambda: dcp.save(document, checkpoint_id=folder / "dcp")))
        # To its end: then the state is as safe as after the others.
        clock(
            "DCP async_save",
            lambda: _quietly(lambda: dcp.async_save(document, checkpoint_id=folder / "async").result()),
        )
        for full in sorted(log.iterdir())[:-1]:
            full.unlink()  # as retention does
    writer.close()
    raw, times = "write and fdatasync", clock.times
    results.add("log", "bytes/s", gradient.nbytes, times["log"], raw, gradient.nbytes, times["raw log"])
    for name, timed in (("snapshot_written", "snapshot written"), ("snapshot", "snapshot")):
        results.add(name, "bytes/s", size, times[timed], raw, size, times["raw snapshot"])
    for name, theirs in WAYS.items():
        results.add(f"snapshot_{name}", "bytes/s", size, times["snapshot"], theirs, size, times[theirs])
