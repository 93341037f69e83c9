# SPDX-License-Identifier: MIT
"""The state beside the log: begun in the background, stepped from slots or from the log, audited, rebased.

It follows the log, whether or not slots bring what it needs: what is logged and not applied is kept in mind (by its place
in the log alone) and stepped when its turn comes.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowcheck.errors import DiskError
from flowcheck.plan import Plan, Revision
from flowcheck.step_record import Step
from updater import log_format
from updater.decision import Decision
from updater.journal import Journal
from updater.log_reader import Entry
from updater.manifest import Manifest

if TYPE_CHECKING:
    from updater.base import Base
    from updater.model_state import ModelState
    from updater.shadow import Shadow

__all__ = ["Stepping"]

_log = logging.getLogger(__name__)
_AUDITS = (log_format.AUDITED, log_format.ALARM, log_format.DIVERGED)


class Stepping:
    """The state of an attempt with a model; `shadow` is None until it is loaded. One thread.

    Attributes:
        applied: iterations that were stepped.
        bases: full states that were taken.
    """

    def __init__(self, plan: Plan, manifest: Manifest, journal: Journal, plan_folder: Path) -> None:
        """Begin to load the state: its newest snapshot that is right, or the file that the plan names."""
        self.plan, self._manifest, self._journal = plan, manifest, journal
        self.shadow: Shadow | None = None
        self.applied = self.bases = 0
        self._left: tuple[ModelState, int] | None = None  # the state before a base, and its iteration
        self.read_log()
        self._loader = ThreadPoolExecutor(1, "load")
        self._loading: Future[Shadow] | None = self._loader.submit(self._load, plan_folder)

    def read_log(self) -> None:
        """Find what the log has of this attempt."""
        entries = self._journal.entries()
        kinds = log_format.DECIDED
        #: What is in the log and not applied.
        self._unapplied = deque(e for e in entries if e.header.kind in kinds and e.header.iteration)
        self._audited = {entry.header.iteration for entry in entries if entry.header.kind in _AUDITS}
        self._diverged = {entry.header.iteration for entry in entries if entry.header.kind == log_format.DIVERGED}

    def _load(self, plan_folder: Path) -> Shadow:
        from updater.shadow import Shadow

        shadow = Shadow(self.plan, bit_exact=self._manifest.latest.bit_exact)
        if not shadow.begin_from_snapshot(self._manifest) and self.plan.initial_state.source == "file":
            shadow.begin_from_file(plan_folder / self.plan.initial_state.path)
        return shadow

    @property
    def loading(self) -> bool:
        """Whether the state is not there yet."""
        return self._loading is not None

    def load(self, patience_s: float | None) -> bool:
        """Wait so long for the state, None: until it is there; True if this call has brought it. Raises what loading has raised."""
        if self._loading is None:
            return False
        try:
            self.shadow = self._loading.result(patience_s)
        except FutureTimeout:
            return False
        self._loading = None
        return True

    @property
    def reached(self) -> int | None:
        """The iteration that the state is that after; None while there is none."""
        return None if self.shadow is None else self.shadow.reached

    def follows(self, iteration: int) -> bool:
        """Whether an iteration is the next one to step."""
        return self.shadow is not None and self.shadow.follows(iteration)

    def behind(self, following: int) -> bool:
        """Whether the state is there, and not that before an iteration."""
        if self.shadow is None:
            return False
        if self.shadow.reached is None:
            return following > self.plan.first_iteration
        return self.shadow.diverged or self.shadow.reached + 1 < following

    def has_non_finite(self, data: np.ndarray, revision: Revision) -> bool:
        """Whether a gradient is not finite; waits for the state, which knows the parameters."""
        self.load(None)
        return self.shadow.has_non_finite(data, revision)

    # -- from slots -------------------------------------------------------------------------------------------------

    def apply(self, decision: Decision, entry: Entry) -> None:
        """Step by an iteration that is committed, or keep in mind that it is to be stepped."""
        if entry.header.kind == log_format.GRADIENT and decision.whole and self.follows(decision.iteration):
            self.step(decision)
        elif self.reached is None or decision.iteration > self.reached:
            self._unapplied.append(entry)

    def step(self, decision: Decision) -> None:
        """Step by the next iteration, as its slot has it."""
        self.shadow.apply(decision.iteration, decision.data, decision.revision, decision.step)
        self.applied += 1

    def audit(self, iteration: int, number: int, record: np.ndarray, step: Step | None) -> None:
        """Hold the state before a step against the digests in its record, and append a note of what was found, once."""
        if step is None or not step.audited or iteration in self._audited:
            return
        alarms = self.shadow.audit(record.view("<f4"))
        if alarms is None:
            return
        kind = log_format.ALARM if alarms else log_format.AUDITED
        if self.shadow.diverged:
            kind = log_format.DIVERGED
            self._diverged.add(iteration)
        for alarm in alarms:
            rank = "every rank" if alarm["rank"] is None else f"rank {alarm['rank']}"
            names = f"{alarm['tensors'][0]} to {alarm['tensors'][-1]}"
            _log.warning("audit of iteration %d: %s has other bits than the shadow in %s", iteration, rank, names)
        self._journal.note(kind, iteration, number, {"alarms": alarms})

    # -- from the log -----------------------------------------------------------------------------------------------

    def _next(self) -> Entry | None:
        """Return the next iteration to step if the log has it; None if it has not, or it may not be stepped."""
        shadow = self.shadow
        if shadow is None or shadow.reached is None:
            return None
        while self._unapplied and self._unapplied[0].header.iteration <= shadow.reached:
            self._unapplied.popleft()
        entry = self._unapplied[0] if self._unapplied else None
        if entry is None or entry.header.kind != log_format.GRADIENT or not shadow.follows(entry.header.iteration):
            return None
        if entry.header.iteration in self._diverged:
            shadow.diverged = True
            return None
        return entry

    @property
    def can_step(self) -> bool:
        """Whether the log has the next iteration."""
        return self._next() is not None

    def step_from_log(self) -> int:
        """Step the next iteration if the log has it; returns 1, or 0."""
        entry = self._next()
        if entry is None:
            return 0
        iteration = entry.header.iteration
        data, record, step = self.shadow.read(entry, self._manifest.identities)
        try:
            self.audit(iteration, entry.header.revision, record, step)
            self._journal.commit()
        except DiskError as error:
            _log.warning("an audit is not noted: %s", error)
        if not self.shadow.diverged:
            self.shadow.apply(iteration, data, self.plan.revision(iteration), step)
            self._unapplied.popleft()
            self.applied += 1
            self.measure()
        return 1

    # -- from a base ------------------------------------------------------------------------------------------------

    def go_on_from(self, base: Base) -> None:
        """Take a full state of the trainer in place of the state."""
        self.load(None)
        self._left = self.shadow.rebase(base)
        self.bases += 1
        # What was stepped before and is further than the base is stepped again, from the base's own bits.
        self.read_log()

    def measure(self) -> None:
        """Once the state has come from a base to where it was before, note how far apart the two are."""
        if self._left is None or self.shadow.reached < self._left[1]:
            return
        (left, iteration), self._left = self._left, None
        if self.shadow.reached != iteration or self._journal.next is None:
            return
        from updater.state_difference import differences

        found = differences((left.model, left.optimizer.state_dict()), self.shadow.parts)
        furthest = max(found, key=lambda row: row["max_ulp"], default={"name": None, "max_ulp": 0})
        record = self.plan.shard.step_record
        limit = record.audit.max_ulp if record else None
        over = limit is not None and furthest["max_ulp"] > limit
        if over:
            _log.warning("at iteration %d the state was %d ULPs from the trainer's", iteration, furthest["max_ulp"])
        facts = {"at": iteration, "max_ulp": furthest["max_ulp"], "tensor": furthest["name"], "over_limit": over}
        try:
            self._journal.note(log_format.MEASURED, self._journal.next, 0, facts)
            self._journal.commit()
        except DiskError as error:
            _log.warning("a distance is not noted: %s", error)

    def close(self) -> None:
        """End the thread that loads."""
        self._loader.shutdown(wait=True, cancel_futures=True)
