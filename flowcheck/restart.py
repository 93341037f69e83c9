# SPDX-License-Identifier: MIT
"""Going on from a checkpoint, in the training script: `flowcheck.load` and `flowcheck.resume`."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowcheck import attempts, describe
from flowcheck.errors import ConfigError, FlowCheckError
from flowcheck.files import read_torch
from flowcheck.optimizer_state import load_optimizer

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

__all__ = ["load", "resume"]

_IN_DIRECTORY = re.compile(r"(.+)@(\d+)")


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, url: str | Path) -> int:
    """Load a checkpoint into a model and its optimizer; return the iteration that it is the state after.

    `flowcheck.attach` then goes on in the checkpoint's run, as a new attempt whose iterations count on from that one.

    Args:
        model: plain or wrapped in DistributedDataParallel.
        optimizer: of the same class and param groups as the trainer's.
        url: a checkpoint directory (`DIR`, its latest state, or `DIR@N`), or a torch file that `flowcheck restore` wrote.

    Raises:
        ConfigError: there is no such file, or it does not fit the model or the optimizer.
        CheckpointError: it is corrupt.
    """
    state = _read(Path(url))
    _fill(model, optimizer, state, url)
    attempts.remember(optimizer, state, [])
    return int(state["iteration"])


def resume(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, url: str | Path, backward: Callable[[], object]
) -> int:
    """Load a checkpoint so that training goes on with the bits of a run that was never stopped; return its iteration.

    DistributedDataParallel starts with one bucket of all parameters and rebuilds its buckets after the first backward
    pass. With three ranks or more other buckets are other sums. So this runs one step that is thrown away, has DDP
    rebuild its buckets, and compares them with the ones that the checkpoint's run had. Every rank must call it.

    Args:
        model: the model, wrapped, fresh: no step was done with it.
        optimizer: as for `load`.
        url: as for `load`.
        backward: does one forward and one backward pass through `model`, on any batch. Its gradients are dropped;
            buffers and the states of Python's, numpy's and torch's random generators are put back.

    Raises:
        ConfigError, CheckpointError: as for `load`.
        FlowCheckError: DDP's rebuilt buckets are not those of the checkpoint's run: sums would have other bits.
    """
    import numpy as np
    import torch

    state = _read(Path(url))
    _fill(model, optimizer, state, url)
    iteration = int(state["iteration"])
    if iteration == 0:
        attempts.remember(optimizer, state, [])
        return 0  # the first step of a job has the first buckets
    first = describe.first_buckets(model)
    buffers = [buffer.clone() for buffer in model.module.buffers()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        backward()
    random.setstate(python)
    np.random.set_state(numpy)
    model.reducer._rebuild_buckets()
    for buffer, before in zip(model.module.buffers(), buffers, strict=True):
        buffer.data.copy_(before)
    for parameter in model.parameters():
        parameter.grad = None
    _check_buckets(model, state.get("buckets"), url)
    attempts.remember(optimizer, state, first)
    return iteration


def _read(path: Path) -> dict[str, Any]:
    """Return a checkpoint as a dictionary with "model", "optimizer", "iteration" and, where known, "buckets"."""
    in_directory = _IN_DIRECTORY.fullmatch(str(path))
    if path.is_dir() or (in_directory and Path(in_directory[1]).is_dir()):
        from updater.restore import restore

        return restore(path) if path.is_dir() else restore(in_directory[1], int(in_directory[2]))
    try:
        state = read_torch(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the checkpoint: {error.strerror or error}") from error
    if not isinstance(state, dict) or not {"model", "optimizer", "iteration"} <= set(state):
        raise ConfigError(f"{path}: expected a dictionary with 'model', 'optimizer' and 'iteration'")
    _check_origin(path, state)
    return state


def _check_origin(path: Path, state: dict[str, Any]) -> None:
    """ConfigError if the run and the attempts that a checkpoint names, where it does, cannot be."""
    for name in ("attempt", "latest_attempt"):
        if name in state and (type(state[name]) is not int or state[name] < 1):
            raise ConfigError(f"{path}: {name!r} is {state[name]!r}, expected the number of an attempt, from 1")
    if "run_id" in state and not isinstance(state["run_id"], str):
        raise ConfigError(f"{path}: 'run_id' is {state['run_id']!r}, expected the name of a run")


def _fill(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], url: str | Path) -> None:
    try:
        getattr(model, "module", model).load_state_dict(state["model"])
        load_optimizer(optimizer, state["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ConfigError(f"{url}: does not fit this model and optimizer: {' '.join(str(error).split())}") from error


def _check_buckets(model: DistributedDataParallel, expected: list[list[str]] | None, url: str | Path) -> None:
    """Compare DDP's buckets with those of the checkpoint's run, where it names them."""
    found = describe.rebuilt_buckets(model)
    if expected is None or found is None:
        return
    if found != expected:
        wrong = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
        )
        raise FlowCheckError(
            f"{url}: bucket {wrong} of {len(found)} has other parameters than in the checkpoint's run, which had "
            f"{len(expected)} buckets: sums would have other bits; use that run's bucket_cap_mb, or flowcheck.load"
        )
