# SPDX-License-Identifier: MIT
"""The shadow of the trainers' state: begun from the wire or a file, rebuilt from snapshot and log, stepped, snapshotted."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowcheck import audit
from flowcheck.errors import CheckpointError, ConfigError
from flowcheck.plan import Plan, Revision
from flowcheck.step_record import Step
from updater import arithmetic
from updater.directory import payload_views, record_of, states
from updater.log_reader import Entry, read_payload
from updater.manifest import Manifest
from updater.model_state import ModelState, bytes_of
from updater.snapshot import State, read_state, write_state

if TYPE_CHECKING:
    from flowcheck._copy import CopyEngine

    from updater.base import Base

__all__ = ["Shadow", "load_snapshot", "replay"]


def load_snapshot(manifest: Manifest, iteration: int) -> State:
    """Return a published snapshot; CheckpointError if its checksum or its content is wrong."""
    path = manifest.check(manifest.snapshot_name(iteration))
    state = read_state(path)
    if (state.run_id, state.attempt, state.iteration) != (manifest.run_id, manifest.attempt, iteration):
        raise CheckpointError(
            f"{path}: is of run {state.run_id!r}, iteration {state.iteration}; restore the file from a copy", str(path)
        )
    return state


def replay(plan: Plan, model: ModelState, entries: Iterable[tuple[Entry, str]], after: int) -> Iterator[int]:
    """Step a model that is the state of iteration `after` through the log's committed iterations; yields each when done."""
    identity = plan.identity()
    slot = np.zeros(plan.slot_bytes, np.uint8)
    for entry, state in entries:
        iteration = entry.header.iteration
        if state == "committed" and iteration == after + 1:
            revision = plan.revision(iteration)
            read_payload(entry, identity, payload_views(slot, plan, revision))
            record = record_of(slot, plan, revision)
            form = plan.record_form
            model.step(slot, revision, form and form.decode(form.current(record), iteration))
            after = iteration
            yield iteration


class Shadow:
    """The state of one run; `reached` is the iteration that it is the state after, None before there is any.

    begin_from_broadcast or begin_from_file -> apply ... -> snapshot; after a restart `reached` is there at once.
    """

    def __init__(self, plan: Plan, manifest: Manifest, index: Iterable[Entry], engine: CopyEngine) -> None:
        """Make the state; rebuilt if the directory has a snapshot. CheckpointError if what it needs is corrupt."""
        self.plan, self._manifest = plan, manifest
        self._model = ModelState(plan)
        self.reached: int | None = None
        self.diverged = False
        self._engine = engine
        self.engine_bytes = self.engine_failed = 0
        snapshots = manifest.snapshots
        if snapshots:
            origin = manifest.snapshot_name(snapshots[-1])
            state = load_snapshot(manifest, snapshots[-1])
            self._model.load_state(state, origin)
            self.reached = snapshots[-1]
            for _ in self.catch_up(index):
                pass

    def begin_from_broadcast(self, content: np.ndarray) -> None:
        """Take the initial state that the job broadcast; published as snapshot 0 when this returns.

        Raises:
            CheckpointError: there is one already, and it has other bits.
        """
        if self.reached is None:
            self._model.load_broadcast(content)
            self._begin()
            return
        if 0 not in self._manifest.snapshots:
            return  # the shadow has begun from a base
        first = load_snapshot(self._manifest, 0)
        for key, offset in self.plan.initial_offsets.items():
            known = bytes_of(first.model[key])
            if not np.array_equal(known, content[offset : offset + known.size]):
                path = self._manifest.folder / self._manifest.snapshot_name(0)
                raise CheckpointError(
                    f"{path}: the wire now gives {key!r} another first value; use another directory for another run",
                    str(path),
                )

    def begin_from_file(self, path: Path) -> None:
        """Take the initial state from a torch file; published as snapshot 0 when this returns."""
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path}: cannot read the initial state: {str(error).splitlines()[0]}") from error
        if not isinstance(found, dict):
            raise ConfigError(
                f"{path}: the initial state is a {type(found).__name__}, expected a dictionary with 'model'"
            )
        if found.get("iteration", 0) != 0:
            raise ConfigError(
                f"{path}: is the state of iteration {found['iteration']}; the initial state is that of iteration 0"
            )
        try:
            self._model.load_model(found.get("model", found), str(path))
            if "optimizer" in found:
                self._model.load_optimizer(found["optimizer"], str(path))
            self._model.load_extra(found.get("extra", {}), str(path))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        self._begin()

    def _begin(self) -> None:
        self.reached = 0
        self.snapshot()

    def follows(self, iteration: int) -> bool:
        """Return whether an iteration is the next one to apply."""
        return not self.diverged and self.reached is not None and iteration == self.reached + 1

    def apply(self, iteration: int, slot: np.ndarray, revision: Revision, step: Step | None) -> bool:
        """Step by an iteration that is committed; False, and nothing done, where it is not the next one."""
        if not self.follows(iteration):
            return False
        self._model.step(slot, revision, step)
        self.reached = iteration
        return True

    def audit(self, record: np.ndarray) -> list[dict] | None:
        """Hold the state against the digests in the record of the next step; return the alarms, None if it cannot be held.

        After an alarm that no one rank explains the state is `diverged`: it is not stepped on until it is rebased.
        """
        if not self._manifest.bit_exact:
            return None
        form, groups = self.plan.record_form, audit.group_names(self.plan)
        ours = audit.digests(groups, self._model.audited, self._model.optimizer).tolist()
        found = form.audit(record, [digest % 2**64 for digest in ours])
        self.diverged = any(rank is None for _, rank in found)
        return [{"tensors": groups[group], "rank": rank} for group, rank in found]

    def has_non_finite(self, slot: np.ndarray, revision: Revision) -> bool:
        """Whether a gradient that the optimizer would step by is not finite."""
        return self._model.has_non_finite(slot, revision)

    def catch_up(self, index: Iterable[Entry]) -> Iterator[int]:
        """Step through what the log holds of the iterations after the reached one; yields each when it is done."""
        listed = states(index, self._manifest.snapshots, has_model=True)
        for iteration in replay(self.plan, self._model, listed, self.reached):
            self.reached = iteration
            yield iteration

    @property
    def state(self) -> tuple[dict, dict]:
        """The state as `state_difference.differences` takes it: model and optimizer."""
        return self._model.model, self._model.optimizer.state_dict()

    def rebase(self, base: Base) -> tuple[ModelState, int] | None:
        """Go on from a base, published as a snapshot when this returns; return the state before and its iteration."""
        left = None if self.reached is None or self.diverged else (self._model, self.reached)
        self._model, self.reached, self.diverged = base.state, base.iteration, False
        self.snapshot()
        return left

    def snapshot(self) -> None:
        """Publish the state as it is, unless it is published already; a shadow without a state has nothing to publish."""
        if self.reached is None or self.diverged or self.reached in self._manifest.snapshots:
            return
        name = self._manifest.snapshot_name(self.reached)
        state = State(
            self._manifest.run_id,
            self._manifest.attempt,
            self.reached,
            self._manifest.bit_exact,
            arithmetic.current().model_dump(),
            self._model.model,
            self._model.optimizer.state_dict(),
            self._model.extra,
        )
        copied, failed = self._engine.engine_bytes, self._engine.engine_failed
        write_state(self._manifest.folder / name, state, self._engine)
        self.engine_bytes += self._engine.engine_bytes - copied
        self.engine_failed += self._engine.engine_failed - failed
        self._manifest.add(name)
        self._manifest.store()
