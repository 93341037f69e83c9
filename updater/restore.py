# SPDX-License-Identifier: MIT
"""Restoring a training state from snapshot and log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowcheck.errors import RestoreError
from updater import arithmetic
from updater.directory import Directory
from updater.export import document
from updater.model_state import ModelState
from updater.shadow import load_snapshot, replay
from updater.snapshot import State

__all__ = ["restore", "restore_state", "states_after"]


def restore_state(path: str | Path, iteration: int | None = None, attempt: int | None = None) -> State:
    """Return the state after an iteration: the newest snapshot not after it, stepped on through the log.

    Args:
        path: the checkpoint directory.
        iteration: the latest that can be restored if None.
        attempt: the directory's own if None.

    Raises:
        RestoreError: there is no such state; the message names the nearest that there is.
        CheckpointError: a file that is needed is corrupt.
    """
    directory = Directory(path)
    manifest = directory.manifest
    if attempt is not None and attempt != manifest.attempt:
        raise RestoreError(f"{path}: attempt {attempt} is not there, only attempt {manifest.attempt}")
    possible = directory.restorable
    if not manifest.has_model:
        raise RestoreError(
            f"{path}: the plan has no model, so there is no state; 'flowcheck gradient' gives its gradients"
        )
    if not possible:
        raise RestoreError(f"{path}: no iteration can be restored: the initial state has not been seen")
    wanted = possible[-1] if iteration is None else iteration
    if wanted not in possible:
        best = min(possible, key=lambda i: (abs(i - wanted), i))
        found = directory.entries.get(wanted, (None, "not in the log"))[1]
        raise RestoreError(
            f"{path}: iteration {wanted} cannot be restored: it is {found}; the nearest that can is {best}"
        )
    state = load_snapshot(manifest, max(i for i in manifest.snapshots if i <= wanted))
    buckets = [
        [parameter.name for parameter in bucket.parameters] for bucket in directory.plan.revision(wanted + 1).buckets
    ]
    if state.iteration == wanted:
        # HDF5 lists keys by the alphabet; a restored state has the plan's order, which is the model's own.
        order = {entry.key: number for number, entry in enumerate(directory.plan.state)}
        ordered = dict(sorted(state.model.items(), key=lambda item: order.get(item[0], len(order))))
        return replace(state, model=ordered, buckets=buckets)
    model = ModelState(directory.plan)
    model.load_state(state, str(path))
    for reached in replay(directory.plan, model, directory.entries.values(), state.iteration):
        if reached == wanted:
            break
    return State(
        manifest.run_id,
        manifest.attempt,
        wanted,
        state.bit_exact and manifest.bit_exact and arithmetic.bit_exact(directory.plan),
        arithmetic.current().model_dump(),
        model.model,
        model.optimizer.state_dict(),
        model.extra,
        buckets,
    )


def states_after(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (iteration, {"model", "optimizer", "extra"}) for every committed iteration, stepped on from the first snapshot and each base.

    What is yielded is stepped on when the next is asked for. Errors are those of `restore_state`.
    """
    directory = Directory(path)
    snapshots = directory.manifest.snapshots
    while snapshots:
        reached = snapshots[0]
        first = load_snapshot(directory.manifest, reached)
        model = ModelState(directory.plan)
        model.load_state(first, str(path))
        for reached in replay(directory.plan, model, directory.entries.values(), snapshots[0]):
            yield reached, {"model": model.model, "optimizer": model.optimizer.state_dict(), "extra": model.extra}
        # What the log does not lead to is a base, from which it goes on.
        snapshots = [iteration for iteration in snapshots if iteration > reached]


def restore(path: str | Path, iteration: int | None = None, attempt: int | None = None) -> dict[str, Any]:
    """Return a restored state as a dictionary: model, optimizer, extra, iteration, run_id, attempt, bit_exact, buckets.

    `buckets` are the names of the parameters in each bucket of the next iteration. `model` and `optimizer` are what
    torch's `load_state_dict` takes. Arguments and errors are those of `restore_state`.
    """
    return document(restore_state(path, iteration, attempt))
