# SPDX-License-Identifier: MIT
"""Restoring a training state: the nearest snapshot, stepped on through the log. `updater.export` writes it for the user's stack."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flowcheck import audit
from flowcheck.errors import CheckpointError, RestoreError
from flowcheck.plan import Plan
from updater import arithmetic
from updater.directory import Directory, nearest, payload_views, record_of
from updater.export import document
from updater.log_reader import Entry, read_payload
from updater.model_state import ModelState
from updater.parallel import ParallelSteps
from updater.shadow import load_snapshot
from updater.snapshot import State

__all__ = ["replay", "restore", "restore_state", "states_after"]

_log = logging.getLogger(__name__)
#: Called with the iterations stepped so far and in all.
Progress = Callable[[int, int], None]


def replay(
    plan: Plan, model: ModelState, entries: dict[int, Entry], identities: list[bytes], *, exact: bool
) -> Iterator[int]:
    """Step a model through consecutive iterations of the log, by a thread per core; yields each when it is done.

    Where the state is `exact`, it is held against the trainers' digests on the way, wherever a record has them.

    Raises:
        CheckpointError: a checksum is wrong; or the state is none that a rank had.
    """
    slot, form = np.zeros(plan.slot_bytes, np.uint8), plan.record_form
    with ParallelSteps(model) as steps:
        for number, entry in entries.items():
            revision = plan.revision(number)
            read_payload(entry, identities, payload_views(slot, plan, revision))
            record = record_of(slot, plan, revision)
            said = form and form.read(record, number)
            if exact and said is not None and said.audited:
                _hold(plan, model, record, entry)
            steps.step(slot, revision, said)
            yield number


def _hold(plan: Plan, model: ModelState, record: np.ndarray, entry: Entry) -> None:
    """Raise unless some rank had a state before the step that a record is of, by the digests in it."""
    if any(rank is None for _, rank in audit.differing(plan, record, model.audited, model.optimizer)):
        raise CheckpointError(
            f"{entry.segment}: stepped to iteration {entry.header.iteration - 1}, the state has not the digests that the trainers gave "
            "of theirs; run 'flowcheck verify', and restore an earlier iteration, or try another machine",
            str(entry.segment),
        )


def restore_state(
    path: str | Path, iteration: int | None = None, attempt: int | None = None, progress: Progress | None = None
) -> State:
    """Return the state after an iteration.

    Args:
        path: the checkpoint directory.
        iteration: the latest that can be restored if None.
        attempt: also what a later attempt has superseded can be restored, by naming its attempt; the latest if None.
        progress: told how many iterations of the log were stepped.

    Raises:
        RestoreError: there is no such state; the message names the nearest that there is.
        CheckpointError: a file that is needed is corrupt.
    """
    directory = Directory(path)
    manifest = directory.manifest
    if attempt is not None and manifest.attempt(attempt) is None:
        there = ", ".join(str(known.number) for known in manifest.attempts)
        raise RestoreError(f"{path}: attempt {attempt} is not there, only {there}")
    if not manifest.has_model:
        raise RestoreError(
            f"{path}: the plan has no model, so there is no state; 'flowcheck gradient' gives its gradients"
        )
    possible = directory.restorable(attempt)
    if iteration not in possible and directory.problems:
        problem = next(iter(directory.problems.values()))
        last = f"the newest iteration that can still be restored is {max(possible)}" if possible else "nothing is left"
        raise CheckpointError(f"{problem}; {last}", problem.path)
    if not possible:
        raise RestoreError(f"{path}: no iteration can be restored: the initial state has not been seen")
    wanted = max(possible) if iteration is None else iteration
    if wanted not in possible:
        rows = [row for row in directory.iterations if row.number == wanted and (attempt or row.attempt) == row.attempt]
        found = rows[-1].state if rows else "not in the log"
        raise RestoreError(f"{path}: iteration {wanted} cannot be restored: it is {found}; {nearest(possible, wanted)}")
    return _restore(directory, possible[wanted], wanted, progress)


def _restore(directory: Directory, attempt: int, wanted: int, progress: Progress | None) -> State:
    """Return a state by the nearest snapshot that is right; CheckpointError if none is."""
    ways, entries = directory.ways(attempt, wanted)
    problem: CheckpointError | None = None
    for snapshot in ways:
        try:
            state = load_snapshot(directory.manifest, attempt, snapshot)
            plan = directory.plan_of(attempt)
            model = None
            if snapshot != wanted:
                model = ModelState(plan)
                model.load_state(state, str(directory.path))
        except CheckpointError as error:
            problem = problem or error
            continue
        if problem is not None:
            _log.warning("restoring from an older snapshot, of iteration %d: %s", snapshot, problem)
        steps = {number: entry for number, entry in entries.items() if number > snapshot}
        exact = _exact_here(directory, attempt)
        replayed = replay(plan, model, steps, directory.manifest.identities, exact=exact) if steps else ()
        for done, _ in enumerate(replayed, 1):
            if progress is not None:
                progress(done, len(steps))
        return _state(directory, plan, state, model, wanted)
    raise problem


def _exact_here(directory: Directory, attempt: int) -> bool:
    """Whether an attempt's states are called bit exact, and stepping its log here gives the same bits."""
    return directory.manifest.attempt(attempt).bit_exact and arithmetic.bit_exact(directory.plan_of(attempt))


def _state(directory: Directory, plan: Plan, state: State, model: ModelState | None, wanted: int) -> State:
    buckets = [[parameter.name for parameter in bucket.parameters] for bucket in plan.revision(wanted + 1).buckets]
    latest = directory.manifest.latest.number
    if model is None:
        # HDF5 lists keys by the alphabet; a restored state has the plan's order, which is the model's own.
        order = {entry.key: number for number, entry in enumerate(plan.state)}
        ordered = dict(sorted(state.model.items(), key=lambda item: order.get(item[0], len(order))))
        return replace(state, model=ordered, buckets=buckets, latest_attempt=latest)
    return State(
        directory.manifest.run_id,
        state.attempt,
        wanted,
        state.bit_exact and _exact_here(directory, state.attempt),
        arithmetic.current().model_dump(),
        model.model,
        model.optimizer.state_dict(),
        model.extra,
        buckets,
        latest_attempt=latest,
    )


def states_after(path: str | Path, attempt: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (iteration, {"model", "optimizer", "extra"}) for every committed iteration of an attempt, the latest if None.

    Stepped on from the first snapshot and from each base; what is yielded is stepped on when the next is asked for. Errors
    are those of `restore_state`.
    """
    directory = Directory(path)
    directory.require_whole()
    manifest = directory.manifest
    attempt = attempt or manifest.latest.number
    plan = directory.plan_of(attempt)
    rows, reached = directory.committed(attempt), -1
    for snapshot in manifest.snapshots_of(attempt):
        if snapshot <= reached:
            continue
        model = ModelState(plan)
        model.load_state(load_snapshot(manifest, attempt, snapshot), str(path))
        reached, entries = snapshot, {}
        while reached + 1 in rows:
            reached += 1
            entries[reached] = rows[reached]
        for number in replay(plan, model, entries, manifest.identities, exact=_exact_here(directory, attempt)):
            yield number, {"model": model.model, "optimizer": model.optimizer.state_dict(), "extra": model.extra}


def restore(path: str | Path, iteration: int | None = None, attempt: int | None = None) -> dict[str, Any]:
    """Return a restored state as a dictionary: model, optimizer, extra, iteration, run_id, attempt, bit_exact, buckets.

    `buckets` are the names of the parameters in each bucket of the next iteration, `latest_attempt` is the newest attempt of
    the directory. `model` and `optimizer` are what torch's `load_state_dict` takes. Arguments and errors are those of
    `restore_state`.
    """
    return document(restore_state(path, iteration, attempt))
