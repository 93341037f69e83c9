# SPDX-License-Identifier: MIT
"""Bases: full states of the trainer from which a shadow goes on that has lost an iteration.

A base is a torch file with "model", "optimizer" and "iteration", the state after that iteration; a trainer's own
occasional save is one. What the log holds of later iterations is then stepped from it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowcheck.errors import CheckpointError, ConfigError, DifferenceError
from flowcheck.files import read_torch
from flowcheck.plan import Plan
from flowcheck.run_folder import state_name
from updater.model_state import ModelState

__all__ = ["Base", "load_base", "offer", "rebase"]


@dataclass
class Base:
    """A full state that fits the plan, and the iteration that it is the state after."""

    iteration: int
    state: ModelState


def load_base(path: Path, plan: Plan) -> Base:
    """Return the base in a torch file; nothing is unpickled.

    Raises:
        ConfigError: it is no full state, or not one of this plan.
        CheckpointError: it cannot be read as a torch file.
    """
    try:
        found = read_torch(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the state: {error.strerror or error}") from error
    _check(path, found)
    _check_attempt(path, found, plan)
    state = ModelState(plan)
    try:
        state.load_model(found["model"], str(path))
        state.load_optimizer(found["optimizer"], str(path))
        state.load_extra(found.get("extra", {}), str(path))
    except CheckpointError as error:
        raise ConfigError(f"{error}; expected a state of this job") from error
    return Base(found["iteration"], state)


def _check(path: Path, found: Any) -> None:
    if not isinstance(found, dict) or not {"model", "optimizer", "iteration"} <= set(found):
        raise ConfigError(f"{path}: expected a dictionary with 'model', 'optimizer' and 'iteration'")
    if type(found["iteration"]) is not int or not 0 <= found["iteration"] < 2**32:
        raise ConfigError(f"{path}: 'iteration' is {found['iteration']!r}, expected the number of an iteration")
    if not isinstance(found["model"], dict) or not isinstance(found["optimizer"], dict):
        raise ConfigError(f"{path}: 'model' and 'optimizer' are not what state_dict() gives")


def _check_attempt(path: Path, found: dict[str, Any], plan: Plan) -> None:
    """ConfigError if a state says that it is of another run, or of another attempt that has gone another way."""
    job, iteration = plan.job, found["iteration"]
    run_id, attempt = found.get("run_id", job.run_id), found.get("attempt", job.attempt)
    before = job.resumed is not None and iteration <= job.resumed.iteration
    if run_id != job.run_id or (attempt != job.attempt and not before):
        raise ConfigError(
            f"{path}: is of attempt {attempt} of run {run_id!r}, expected a state of attempt {job.attempt} of run {job.run_id!r}"
        )


class _NoSlots:
    """Slots of a job that is over: they bring nothing."""

    settled_next = consumed_next = volatile_from = 0
    ended, skipped = 1, (0, 0)


def rebase(folder: Path, path: Path) -> tuple[int, int]:
    """Take a full state as the new base of a checkpoint directory that nobody writes; return (base, committed up to).

    Raises:
        ConfigError: another process writes to the directory, or the state does not fit its plan.
        CheckpointError: directory or state are corrupt.
        DifferenceError: that iteration is committed already, and with other bits.
    """
    from updater.directory import Directory
    from updater.restore import restore_state
    from updater.state_difference import differences
    from updater.updater import Updater

    directory = Directory(folder)
    directory.require_whole()
    if not directory.manifest.has_model:
        raise ConfigError(f"{folder}: its plan has no model, so there is no state to go on from")
    base = load_base(path, directory.plan)
    if base.iteration in directory.restorable():
        ours = restore_state(folder, base.iteration)
        found = differences((ours.model, ours.optimizer), (base.state.model, base.state.optimizer.state_dict()))
        if found:
            raise DifferenceError(
                f"{folder}: iteration {base.iteration} is committed with other bits than {path} has, first in "
                f"{found[0]['name']!r}; verify both"
            )
    with contextlib.closing(Updater(directory.plan, _NoSlots(), folder)) as updater:
        updater.go_on_from(base)
        while updater.poll():
            pass
        return base.iteration, updater.reached


def offer(folder: Path, inbox: Path, path: Path, patience_s: float = 60.0) -> bool:
    """Put a full state where a live updater of a directory looks for bases; True once it has been taken or passed.

    Raises:
        ConfigError, CheckpointError: the state is none of this job's.
    """
    from updater.directory import Directory

    directory = Directory(folder)
    iteration = load_base(path, directory.plan).iteration
    inbox.mkdir(mode=0o700, exist_ok=True)
    temporary = inbox / f".{state_name(iteration)}"
    shutil.copyfile(path, temporary)
    temporary.chmod(0o600)
    temporary.rename(inbox / state_name(iteration))
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        directory = Directory(folder)
        current = directory.restorable()
        if iteration in current or max(current, default=-1) >= iteration:
            return True
        time.sleep(0.2)
    return False
