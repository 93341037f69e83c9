# SPDX-License-Identifier: MIT
"""The shadow of the trainers' state: begun from the wire, a file or a snapshot, stepped, audited, rebased."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowcheck import audit
from flowcheck.errors import CheckpointError, ConfigError
from flowcheck.files import read_torch
from flowcheck.plan import Plan, Revision
from flowcheck.step_record import Step
from updater import arithmetic
from updater.directory import payload_views, record_of
from updater.log_reader import Entry, read_payload
from updater.manifest import Manifest
from updater.model_state import ModelState, bytes_of
from updater.snapshot import State, layout_of, read_state

if TYPE_CHECKING:
    from updater.base import Base

__all__ = ["Shadow", "load_snapshot"]

_log = logging.getLogger(__name__)


def load_snapshot(manifest: Manifest, attempt: int, iteration: int) -> State:
    """Return a published snapshot; CheckpointError if its checksum or its content is wrong."""
    path = manifest.check(manifest.snapshots[attempt, iteration])
    state = read_state(path)
    if (state.run_id, state.attempt, state.iteration) != (manifest.run_id, attempt, iteration):
        raise CheckpointError(
            f"{path}: is of run {state.run_id!r}, attempt {state.attempt}, iteration {state.iteration}; restore the file from a "
            "copy",
            str(path),
        )
    return state


class Shadow:
    """The state of one attempt; `reached` is the iteration that it is the state after, None before there is any.

    begin_from_snapshot, begin_from_broadcast or begin_from_file -> apply ... One thread at a time.

    Attributes:
        diverged: an audit found that it is no rank's: it is not stepped on until it is rebased.
    """

    def __init__(self, plan: Plan, *, bit_exact: bool) -> None:
        """Allocate the state; ConfigError if torch.optim refuses the plan's optimizer."""
        self.plan, self.bit_exact = plan, bit_exact
        self._model = ModelState(plan)
        self._slot: np.ndarray | None = None
        self.reached: int | None = None
        self.diverged = False

    def begin_from_snapshot(self, manifest: Manifest) -> bool:
        """Take the attempt's newest snapshot that is right; False if it has none.

        Raises:
            CheckpointError: it has some, and none of them is right.
        """
        attempt = self.plan.job.attempt
        problem: CheckpointError | None = None
        for iteration in reversed(manifest.snapshots_of(attempt)):
            name = manifest.snapshots[attempt, iteration]
            try:
                self._model.load_state(load_snapshot(manifest, attempt, iteration), name)
            except CheckpointError as error:
                problem = problem or error
                _log.warning("not begun from: %s", error)
                continue
            self.reached = iteration
            return True
        if problem is not None:
            raise problem
        return False

    def begin_from_broadcast(self, content: np.ndarray) -> None:
        """Take the initial state that the job broadcast."""
        self._model.load_broadcast(content)
        self.reached = 0

    def compare_broadcast(self, first: State, content: np.ndarray, path: Path) -> None:
        """Hold a broadcast against the snapshot that was made of it; CheckpointError if it has other bits."""
        for key, offset in self.plan.initial_offsets.items():
            known = bytes_of(first.model[key])
            if not np.array_equal(known, content[offset : offset + known.size]):
                raise CheckpointError(
                    f"{path}: the wire now gives {key!r} another first value; use another directory for another run",
                    str(path),
                )

    def begin_from_file(self, path: Path) -> None:
        """Take the state before the attempt's first step from a torch file; ConfigError if it holds none."""
        try:
            found = read_torch(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the initial state: {error.strerror or error}") from error
        if not isinstance(found, dict):
            raise ConfigError(
                f"{path}: the initial state is a {type(found).__name__}, expected a dictionary with 'model'"
            )
        before = self.plan.first_step - 1
        if found.get("iteration", 0) != before:
            raise ConfigError(
                f"{path}: is the state of iteration {found.get('iteration', 0)}; the job goes on from that of iteration {before}"
            )
        attempt = self.plan.job.attempt
        if found.get("latest_attempt", attempt) > attempt:
            raise ConfigError(
                f"{path}: attempt {found['latest_attempt']} of the job has begun with it, the plan is of attempt {attempt}"
            )
        try:
            self._model.load_model(found.get("model", found), str(path))
            if "optimizer" in found:
                self._model.load_optimizer(found["optimizer"], str(path))
            self._model.load_extra(found.get("extra", {}), str(path))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        self.reached = before

    def follows(self, iteration: int) -> bool:
        """Return whether an iteration is the next one to apply."""
        return not self.diverged and self.reached is not None and iteration == self.reached + 1

    def apply(self, iteration: int, slot: np.ndarray, revision: Revision, step: Step | None) -> None:
        """Step by the next iteration."""
        self._model.step(slot, revision, step)
        self.reached = iteration

    def read(self, entry: Entry, identities: Collection[bytes]) -> tuple[np.ndarray, np.ndarray | None, Step | None]:
        """Return what the log has of the next iteration: slot data, step record and what that says; valid until the next call."""
        if self._slot is None:
            self._slot = np.zeros(self.plan.slot_bytes, np.uint8)
        revision, form = self.plan.revision(entry.header.iteration), self.plan.record_form
        read_payload(entry, identities, payload_views(self._slot, self.plan, revision))
        record = record_of(self._slot, self.plan, revision)
        return self._slot, record, form and form.read(record, entry.header.iteration)

    def audit(self, record: np.ndarray) -> list[dict] | None:
        """Hold the state against the digests in the record of the next step; return the alarms, None if it cannot be held.

        After an alarm that no one rank explains the state is `diverged`.
        """
        if not self.bit_exact:
            return None
        found = audit.differing(self.plan, record, self._model.audited, self._model.optimizer)
        self.diverged = any(rank is None for _, rank in found)
        return [{"tensors": names, "rank": rank} for names, rank in found]

    def has_non_finite(self, slot: np.ndarray, revision: Revision) -> bool:
        """Whether a gradient that the optimizer would step by is not finite."""
        return self._model.has_non_finite(slot, revision)

    @property
    def parts(self) -> tuple[dict, dict]:
        """The state as `state_difference.differences` takes it: model and optimizer."""
        return self._model.model, self._model.optimizer.state_dict()

    @property
    def state_bytes(self) -> int:
        """Bytes of the model and of what the optimizer keeps, as far as it has begun to."""
        return self._model.bytes + sum(
            value.nbytes
            for values in self._model.optimizer.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        )

    def rebase(self, base: Base) -> tuple[ModelState, int] | None:
        """Go on from a base; return the state before and its iteration."""
        left = None if self.reached is None or self.diverged else (self._model, self.reached)
        self._model, self.reached, self.diverged = base.state, base.iteration, False
        return left

    def state(self) -> State:
        """Return the state as it is, for a snapshot; its tensors are stepped on with it."""
        job = self.plan.job
        return State(
            job.run_id,
            job.attempt,
            self.reached,
            self.bit_exact,
            arithmetic.current().model_dump(),
            self._model.model,
            self._model.optimizer.state_dict(),
            self._model.extra,
            identity=self.plan.identity(),
            layout=layout_of(self.plan.revision(self.reached + 1)),
        )
