# SPDX-License-Identifier: MIT
"""The state beside the log: begun in the background, stepped from slots or from the log, audited, rebased.

It follows the log, whether or not slots bring what it needs: what is logged and not applied is kept in mind (by its place
in the log alone) and stepped when its turn comes.
"""

from __future__ import annotations

import logging
import time
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
#: Seconds until a note that the disk did not take is tried again.
_RETRY_S = 1.0
_AUDITS = (log_format.AUDITED, log_format.ALARM, log_format.DIVERGED)


class Stepping:
    """The state of an attempt with a model; `shadow` is None until it is loaded. One thread.

    Attributes:
        applied: iterations that were stepped.
        logged_bytes: what the log has of them.
        bases: full states that were taken.
    """

    def __init__(
        self, plan: Plan, manifest: Manifest, journal: Journal, entries: list[Entry], plan_folder: Path, *, live: bool
    ) -> None:
        """Begin to load the state: its newest snapshot that is right, or the file that the plan names.

        `entries` is what the journal has.
        """
        self.plan, self._manifest, self._journal, self._live = plan, manifest, journal, live
        self.shadow: Shadow | None = None
        self.applied = self.bases = self.logged_bytes = 0
        self._left: tuple[ModelState, int] | None = None  # the state before a base, and its iteration
        self._held_before: int | None = None  # the iteration before whose step the state was last audited
        self._unnoted: int | None = (
            None  # the one at which an audit found that the state is no rank's, until the log says so
        )
        self._retry_at = 0.0
        self._follow(entries)
        self._loader = ThreadPoolExecutor(1, "load")
        self._loading: Future[Shadow] | None = self._loader.submit(self._load, plan_folder)

    def _follow(self, entries: list[Entry]) -> None:
        """Find what is to be stepped, and what audits have found."""
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
        """Whether an iteration is the next one to step; what an earlier start found out about the state counts."""
        if self.shadow is None or not self.shadow.follows(iteration):
            return False
        self.shadow.diverged = iteration in self._diverged
        return not self.shadow.diverged

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
        logged = entry.header.kind == log_format.GRADIENT
        if logged and decision.whole and self.follows(decision.iteration) and not self._is_audit_due(decision):
            self.step(decision)
            self.logged_bytes += entry.header.record_bytes
        elif self.reached is None or decision.iteration > self.reached:
            self._unapplied.append(entry)

    def _is_audit_due(self, decision: Decision) -> bool:
        """Whether the state was not held against an iteration's digests yet: then it is stepped from the log, after that."""
        said, iteration = decision.step, decision.iteration
        return said is not None and said.audited and iteration not in self._audited and iteration != self._held_before

    def step(self, decision: Decision) -> None:
        """Step by the next iteration, as its slot has it."""
        self.shadow.apply(decision.iteration, decision.data, decision.revision, decision.step)
        self.applied += 1

    def hold(self, iteration: int, record: np.ndarray) -> list[dict] | None:
        """Hold the state before a step against the digests in its record; return the alarms, None if it cannot be held."""
        alarms = self.shadow.audit(record.view("<f4"))
        for alarm in alarms or ():
            rank = "every rank" if alarm["rank"] is None else f"rank {alarm['rank']}"
            names = f"{alarm['tensors'][0]} to {alarm['tensors'][-1]}"
            _log.warning("audit of iteration %d: %s has other bits than the shadow in %s", iteration, rank, names)
        return alarms

    def audit(self, iteration: int, number: int, record: np.ndarray, step: Step | None) -> None:
        """Hold the state before a step against the digests in its record, and append a note of what was found, once.

        `noted` says that it is durable.
        """
        if step is None or not step.audited or iteration in self._audited:
            return
        alarms = self.hold(iteration, record)
        self._held_before = iteration
        if alarms is None:
            return
        kind = log_format.ALARM if alarms else log_format.AUDITED
        if self.shadow.diverged:
            kind = log_format.DIVERGED
            self._unnoted = iteration
        self._journal.note(kind, iteration, number, {"alarms": alarms})

    def noted(self) -> None:
        """Take it that what an audit found is durable."""
        if self._unnoted is not None:
            self._diverged.add(self._unnoted)
            self._unnoted = None

    @property
    def is_noted(self) -> bool:
        """Whether the log says all that audits have found: a state that has diverged may go on from a base only then."""
        return self._unnoted is None

    @property
    def is_right(self) -> bool:
        """Whether the state is there, and no audit has found that it is no rank's."""
        return self._unnoted is None and self.reached is not None and self.follows(self.reached + 1)

    # -- from the log -----------------------------------------------------------------------------------------------

    def _next(self) -> Entry | None:
        """Return the next iteration to step if the log has it; None if it has not, or it may not be stepped."""
        shadow = self.shadow
        if shadow is None or shadow.reached is None:
            return None
        while self._unapplied and self._unapplied[0].header.iteration <= shadow.reached:
            self._unapplied.popleft()
        entry = self._unapplied[0] if self._unapplied else None
        if entry is None or entry.header.kind != log_format.GRADIENT or not self.follows(entry.header.iteration):
            return None
        return entry

    @property
    def can_step(self) -> bool:
        """Whether the log has the next iteration."""
        return self._next() is not None

    def step_from_log(self) -> int:
        """Step the next iteration if the log has it; returns 1, or 0."""
        entry = self._next()
        if entry is None or (self._unnoted is not None and time.monotonic() < self._retry_at):
            return 0
        iteration = entry.header.iteration
        data, record, step = self.shadow.read(entry, self._manifest.identities)
        try:
            self.audit(iteration, entry.header.revision, record, step)
            self._journal.commit()
            self.noted()
        except DiskError as error:
            if not self._live:
                raise
            _log.warning("an audit is not noted: %s", error)
            if self.shadow.diverged:
                # Until the log says so, readers take what follows for committed: audit it again, and note that.
                self.shadow.diverged, self._retry_at = False, time.monotonic() + _RETRY_S
                return 0
        if not self.shadow.diverged:
            self.shadow.apply(iteration, data, self.plan.revision(iteration), step)
            self._unapplied.popleft()
            self.applied += 1
            self.logged_bytes += entry.header.record_bytes
            self.measure()
        return 1

    # -- from a base ------------------------------------------------------------------------------------------------

    def go_on_from(self, base: Base) -> None:
        """Take a full state of the trainer in place of the state."""
        self.load(None)
        self._left, self._held_before = self.shadow.rebase(base), None
        self.bases += 1
        # What was stepped before and is further than the base is stepped again, from the base's own bits.
        self._follow(self._journal.entries())

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
