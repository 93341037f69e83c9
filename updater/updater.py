# SPDX-License-Identifier: MIT
"""The updater: takes decided iterations out of the slots, makes them durable, and steps the training state.

Order per iteration: into the log and synced (committed), applied, slot given back. So whatever instant it is killed at,
a slot is given back only when its iteration is in the log, and the state is rebuilt from snapshot and log; while that goes
on, slots are logged and given back. Only while the disk takes nothing is an iteration applied that is not in the log: it
is `volatile`, and the next thing that is written is a snapshot.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flowcheck._copy import CopyEngine

from flowcheck.errors import CheckpointError, ConfigError, DiskError, FlowCheckError
from flowcheck.plan import Plan
from flowcheck.step_record import Step
from updater import log_format, retention
from updater.attempt import make_folders, open_attempt
from updater.decision import Decision, Decisions, Slots
from updater.durable import lock_directory
from updater.inbox import Inbox
from updater.journal import Journal
from updater.log import SEGMENT_BYTES
from updater.log_reader import Entry
from updater.snapshot_schedule import SnapshotSchedule

if TYPE_CHECKING:
    from updater.base import Base
    from updater.model_state import ModelState
    from updater.shadow import Shadow

__all__ = ["Updater"]

_log = logging.getLogger(__name__)
#: When nothing was decided for so long, a full state that is further than the shadow says that something was lost.
_IDLE_S = 2.0
#: Iterations that are committed by one sync, at most.
_MOST_AT_ONCE = 16
#: Seconds between two tries of a disk that took nothing.
_RETRY_S = 1.0
#: A start waits so long for the state before it begins to empty slots without it.
_LOAD_PATIENCE_S = 2.0
#: An attempt's first start: its job waits for the shadow, and until there is a first snapshot nothing can be committed.
_FIRST_LOAD_PATIENCE_S = 30.0
#: At the end of a job, so long a disk that takes nothing is waited for.
_END_PATIENCE_S = 60.0
#: States up to this size are published at once; larger ones beside the running updater.
_SMALL_BYTES = 16 << 20


class Updater:
    """One attempt in a checkpoint directory, being written: make -> poll until finished -> close; one thread, one process.

    `close` may come at any time; the same call on the same directory goes on from there.
    """

    def __init__(
        self,
        plan: Plan,
        slots: Slots,
        out_dir: str | Path,
        *,
        plan_folder: str | Path = ".",
        engine: CopyEngine | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        bases: Sequence[Path] = (),
        live: bool = True,
    ) -> None:
        """Open or begin the directory, repair what a crash left, and rebuild the state.

        Args:
            plan: the job plan.
            slots: the slot file, open for reading and for `consumed_next`.
            out_dir: the checkpoint directory; made if it is not there.
            plan_folder: what a relative path of the initial state starts from.
            engine: copies the state into a snapshot's staging buffer; the CPU if none is given.
            segment_bytes: a segment of the log that has grown to this is closed.
            bases: folders in which full states of the trainer appear, `state-NNNNNN.pt`: the way on after a loss.
            live: a job does not wait: where the disk takes nothing, go on without it, and try again; else that is an error.

        Raises:
            ConfigError: the directory is another run's, or another process has it, or the plan cannot be stepped.
            CheckpointError: the directory is corrupt.
        """
        self.plan, self.slots, self.folder = plan, slots, Path(out_dir)
        self._attempt, self._live = plan.job.attempt, live
        self._journal: Journal | None = None
        self._snapshots: SnapshotSchedule | None = None
        self._shadow: Shadow | None = None
        self._loading: Future[Shadow] | None = None
        self._loader = ThreadPoolExecutor(1, "load")
        self._counters = dict.fromkeys(("whole", "incomplete", "applied", "volatile", "bases", "pruned_bytes"), 0)
        self._inbox, self._taken = Inbox(plan, bases), time.monotonic()
        self._left: tuple[ModelState, int] | None = None  # the state before a base, and its iteration
        self._volatile_from: int | None = None
        self._logging, self._retry_at, self._refused = True, 0.0, ""
        self._bridging = False
        self._next: int | None = None
        self._patience_ends: float | None = None
        make_folders(self.folder)
        self._lock = lock_directory(self.folder)
        try:
            exact = self._bit_exact_here()
            self._manifest = open_attempt(self.folder, plan, bit_exact=exact)
            self._journal = Journal(self.folder, self._manifest, plan, segment_bytes)
            self._snapshots = SnapshotSchedule(self._manifest, plan.checkpoints, engine or CopyEngine())
            self._decisions = Decisions(plan, slots, self._has_non_finite if plan.has_model else None)
            self._read_log()
            self._next = max(slots.consumed_next, plan.first_iteration)
            if plan.has_model:
                self._loading = self._loader.submit(self._load, Path(plan_folder))
                known = self._manifest.snapshots_of(self._attempt)
                self._load_finished(_LOAD_PATIENCE_S if known else _FIRST_LOAD_PATIENCE_S)
            self._check_gap()
        except BaseException:
            self.close()
            raise

    # -- beginning --------------------------------------------------------------------------------------------------

    def _bit_exact_here(self) -> bool:
        if not self.plan.has_model:
            return True
        from updater import arithmetic  # torch is loaded only for a plan with a model

        return arithmetic.bit_exact(self.plan)

    def _read_log(self) -> None:
        """Find what the log has of this attempt: what the slots may bring again, and what is to be stepped."""
        entries = self._journal.entries()
        decided = [entry for entry in entries if entry.header.kind in log_format.DECIDED]
        # What the slots can still bring again: everything if they are new, little if they go on.
        self._prior = {e.header.iteration: e for e in decided if e.header.iteration >= self.slots.consumed_next}
        #: What is in the log and not applied.
        self._unapplied = deque(entry for entry in decided if entry.header.iteration)
        audits = (log_format.AUDITED, log_format.ALARM, log_format.DIVERGED)
        self._audited = {entry.header.iteration for entry in entries if entry.header.kind in audits}
        self._diverged = {entry.header.iteration for entry in entries if entry.header.kind == log_format.DIVERGED}

    def _load(self, plan_folder: Path) -> Shadow:
        """Return the state as snapshots and plan give it; runs in a thread of its own."""
        from updater.shadow import Shadow

        shadow = Shadow(self.plan, bit_exact=self._manifest.latest.bit_exact)
        if not shadow.begin_from_snapshot(self._manifest) and self.plan.initial_state.source == "file":
            shadow.begin_from_file(plan_folder / self.plan.initial_state.path)
        return shadow

    def _load_finished(self, patience_s: float) -> bool:
        """Whether the state is there; takes it over once it is. Raises what loading has raised."""
        if self._loading is None:
            return True
        try:
            shadow = self._loading.result(patience_s)
        except FutureTimeout:
            return False
        self._loading, self._shadow = None, shadow
        if shadow.reached is not None:
            self._snapshots.begun(shadow.reached, self._journal.written_bytes)
            if (self._attempt, shadow.reached) not in self._manifest.snapshots:
                self._publish_state()
        return True

    def _is_settled(self) -> bool:
        """Whether a settled iteration waits in the slots."""
        return self._next < self.slots.settled_next

    def _check_gap(self) -> None:
        """Refuse slots whose earlier iterations went elsewhere: they could not be told from lost ones."""
        known = self.plan.first_step if self._journal.next is None else self._journal.next
        bridged = max(self._manifest.snapshots_of(self._attempt), default=0) + 1
        began = self._loading is not None or self._shadow is None or self._shadow.reached is not None
        if known < self._next <= bridged:
            # A snapshot stands for what the disk did not take; the note of it was lost.
            self._journal.note_unlogged(self._next - 1, "volatile", "disk")
        elif self._next > known and self.slots.volatile_from:
            # They were applied while the disk took nothing, and went with the process that had applied them.
            self._journal.note_unlogged(self._next - 1, "incomplete", "disk")
        elif self._next > known or (
            self._next > 0 and self.plan.first_iteration == 0 and not began and 0 not in self._prior
        ):
            raise ConfigError(
                f"{self.folder}: ends before iteration {known}, but the slot file has given back everything before {self._next}; "
                "use the directory that took those, or begin both anew"
            )
        self.slots.volatile_from = 0

    # -- polling ----------------------------------------------------------------------------------------------------

    def poll(self) -> int:
        """Take decided iterations, or step one that the log holds; returns how many, or 0 if there is nothing to do.

        Raises:
            CheckpointError: the slot contradicts what the log holds of the same iteration; or what the state is rebuilt from is
                corrupt.
            FlowCheckError: the disk refuses the very first snapshot.
        """
        self._load_finished(0.0)
        done = self._look_after_snapshots()
        if self._is_settled() and not self._is_held():
            if self._next == 0:
                done += self._take_initial()
            elif self._decisions.awaits_record(self._next):
                return done + self._catch_up(waiting=True)
            else:
                taken = self._take()
                # Where slots come without pause, a state that is behind catches up between them.
                done += taken + (self._step_from_log() if taken else self._catch_up(waiting=True))
            self._begin_snapshot()
            return done
        done += self._catch_up(waiting=time.monotonic() - self._taken > _IDLE_S)
        self._begin_snapshot()
        return done

    def _is_held(self) -> bool:
        """Whether slots must keep what they have until a snapshot is there: the first one, or one that bridges a gap in the log."""
        return self._snapshots.busy and (self._next == 0 or self._bridging)

    def _take_initial(self) -> int:
        if not self._load_finished(None):
            return 0
        path = self._manifest.folder / self._manifest.snapshot_name(self._attempt, 0)
        if not self._decisions.is_whole(0):
            if 0 not in self._prior and self._shadow.reached is None:
                facts = self._decisions.incomplete(0, self.plan.initial_bytes)
                self._journal.note(log_format.INCOMPLETE, 0, 0, facts)
                self._journal.commit()
        elif self._shadow.reached is None:
            self._shadow.begin_from_broadcast(self.slots.gradient(0))
            self._publish_state()
            if self._snapshots.busy:
                return 1
        elif (self._attempt, 0) in self._manifest.snapshots:  # else the shadow has begun from a base
            from updater.shadow import load_snapshot

            first = load_snapshot(self._manifest, self._attempt, 0)
            self._shadow.compare_broadcast(first, self.slots.gradient(0), path)
        self._given_back(0)
        return 1

    def _given_back(self, iteration: int) -> None:
        self._next = iteration + 1
        self._taken = time.monotonic()
        self.slots.consumed_next = self._next

    def _take(self) -> int:
        """Commit what is settled, as much as one sync may, then step it; returns how many iterations were taken."""
        if self._volatile_from == self._next and time.monotonic() < self._retry_at:
            return 0
        batch = self._batch()
        entries = self._commit(batch)
        taken = 0
        for decision in batch:
            entry = entries.get(decision.iteration)
            if entry is None and not self._apply_volatile(decision):
                break
            if entry is not None:
                self._apply(decision, entry)
            self._counters["whole" if decision.whole else "incomplete"] += 1
            self._given_back(decision.iteration)
            taken += 1
        self._journal.publish()
        return taken

    def _batch(self) -> list[Decision]:
        """Return settled iterations that may be committed by one sync.

        An audit is of the state before its iteration: it ends a batch where that state is not there yet.
        """
        batch: list[Decision] = []
        number = self._next
        following = self._shadow is not None and self._shadow.follows(number)
        while (
            number < self.slots.settled_next
            and len(batch) < _MOST_AT_ONCE
            and not self._decisions.awaits_record(number)
        ):
            decision = self._decisions.decide(number)
            if batch and following and decision.step is not None and decision.step.audited:
                break
            batch.append(decision)
            number += 1
        return batch

    def _commit(self, batch: list[Decision]) -> dict[int, Entry]:
        """Log iterations; return the record of each that is durable now. The disk may refuse some, or all."""
        if not self._logging:
            return {}
        entries: dict[int, Entry] = {}
        problem = None
        for decision in batch:
            iteration = decision.iteration
            try:
                if (prior := self._prior.get(iteration)) is not None:
                    self._journal.compare(prior, decision)
                    entries[iteration] = prior
                    continue
                if decision.whole and self._shadow is not None and self._shadow.follows(iteration):
                    self._audit(iteration, decision.number, decision.parts[-1], decision.step)
                self._journal.append(decision)
            except DiskError as error:
                problem = error
                break
        try:
            logged = self._journal.commit()
        except DiskError as error:
            logged, problem = {}, error
        for iteration in entries:
            del self._prior[iteration]
        entries |= logged
        if logged and self._volatile_from == self._next:
            self._log_again(self._next - 1)
        if problem is not None:
            self._refuse(problem, min(d.iteration for d in batch if d.iteration not in entries))
        return entries

    def _apply(self, decision: Decision, entry: Entry) -> None:
        """Step by an iteration that is committed, or keep in mind that it is to be stepped."""
        if not self.plan.has_model:
            return
        logged = entry.header.kind == log_format.GRADIENT
        if logged and decision.whole and self._shadow is not None and self._shadow.follows(decision.iteration):
            self._step(decision)
        elif self._shadow is None or self._shadow.reached is None or decision.iteration > self._shadow.reached:
            self._unapplied.append(entry)

    def _step(self, decision: Decision) -> None:
        self._shadow.apply(decision.iteration, decision.data, decision.revision, decision.step)
        self._counters["applied"] += 1

    def _audit(self, iteration: int, number: int, record: np.ndarray, step: Step | None) -> None:
        """Hold the state before a step against the digests in its record, and note what was found."""
        if step is None or not step.audited or iteration in self._audited:
            return
        alarms = self._shadow.audit(record.view("<f4"))
        if alarms is None:
            return
        kind = log_format.ALARM if alarms else log_format.AUDITED
        if self._shadow.diverged:
            kind = log_format.DIVERGED
            self._diverged.add(iteration)
        for alarm in alarms:
            rank = "every rank" if alarm["rank"] is None else f"rank {alarm['rank']}"
            names = f"{alarm['tensors'][0]} to {alarm['tensors'][-1]}"
            _log.warning("audit of iteration %d: %s has other bits than the shadow in %s", iteration, rank, names)
        self._journal.note(kind, iteration, number, {"alarms": alarms})

    # -- a state that is behind -------------------------------------------------------------------------------------

    def _behind(self) -> bool:
        """Whether the state is not that after the last iteration taken."""
        if self._shadow is None:
            return False
        if self._shadow.reached is None:
            return self._next > self.plan.first_iteration
        return self._shadow.diverged or self._shadow.reached + 1 < self._next

    def _catch_up(self, *, waiting: bool = False) -> int:
        """Step one iteration of the log that follows the state; look for a base where one is of use.

        So it is where the next iteration is `waiting` for something that may never come.
        """
        if self._step_from_log():
            return 1
        if self._shadow is None or (self._manifest.latest.bit_exact and not waiting and not self._behind()):
            return 0
        return self._rebase()

    def _step_from_log(self) -> int:
        """Step the next iteration if the log holds it; returns 1, or 0."""
        shadow = self._shadow
        if shadow is None or shadow.reached is None:
            return 0
        while self._unapplied and self._unapplied[0].header.iteration <= shadow.reached:
            self._unapplied.popleft()
        if not self._unapplied:
            return 0
        entry = self._unapplied[0]
        iteration = entry.header.iteration
        if entry.header.kind != log_format.GRADIENT or not shadow.follows(iteration) or iteration in self._diverged:
            shadow.diverged |= iteration in self._diverged and shadow.follows(iteration)
            return 0
        data, record, step = shadow.read(entry, self._manifest.identities)
        try:
            self._audit(iteration, entry.header.revision, record, step)
            self._journal.commit()
        except DiskError as error:
            _log.warning("an audit is not noted: %s", error)
        if not shadow.diverged:
            shadow.apply(iteration, data, self.plan.revision(iteration), step)
            self._unapplied.popleft()
            self._counters["applied"] += 1
            self._measure()
        return 1

    def _rebase(self) -> int:
        """Go on from the earliest base that is further than the state; 0 if there is none.

        A state that is not bit exact goes on from any base that is newer than the one it came from.
        """
        reached = -1 if self._shadow.reached is None else self._shadow.reached
        if not self._manifest.latest.bit_exact:
            reached = min(reached, max(self._manifest.snapshots_of(self._attempt), default=-1))
        base = self._inbox.base(reached)
        if base is None:
            return 0
        self.go_on_from(base)
        return 1

    @property
    def reached(self) -> int | None:
        """The iteration that the state is that after; None while there is none."""
        return None if self._shadow is None else self._shadow.reached

    def go_on_from(self, base: Base) -> None:
        """Take a full state of the trainer in place of the state; what the log has of later iterations is then stepped by `poll`."""
        self._load_finished(None)
        if self._snapshots.busy:
            self._look_after_snapshots(wait=True)
        self._left = self._shadow.rebase(base)
        self._counters["bases"] += 1
        # What was stepped before and is further than the base is stepped again, from the base's own bits.
        self._read_log()
        self._publish_state()
        self._measure()

    def _measure(self) -> None:
        """Once the state has come from a base to where it was before, note how far apart the two are."""
        if self._left is None or self._shadow.reached < self._left[1]:
            return
        (left, iteration), self._left = self._left, None
        if self._shadow.reached != iteration or self._journal.next is None:
            return
        from updater.state_difference import differences

        found = differences((left.model, left.optimizer.state_dict()), self._shadow.parts)
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

    def _has_non_finite(self, data: np.ndarray, revision: object) -> bool:
        self._load_finished(None)
        return self._shadow.has_non_finite(data, revision)

    # -- snapshots --------------------------------------------------------------------------------------------------

    def _publish_state(self) -> None:
        """Publish the state as it is: a small one before this returns, a large one beside what follows.

        Raises:
            DiskError: the disk refuses the attempt's very first one, without which nothing can be committed.
        """
        if self._shadow.state_bytes > _SMALL_BYTES:
            self._snapshots.begin(self._shadow.state(), self._journal.written_bytes)
            return
        try:
            self._snapshots.publish_now(self._shadow.state(), self._journal.written_bytes)
        except DiskError as error:
            if not self._manifest.snapshots_of(self._attempt):
                raise
            _log.warning("a snapshot is missing: %s", error)

    def _begin_snapshot(self) -> None:
        """Begin a snapshot if one is due, or if the disk may take one again after it took nothing."""
        shadow = self._shadow
        if shadow is None or shadow.reached is None or shadow.diverged or shadow.reached + 1 != self._next:
            return
        if self._volatile_from is not None:
            if self._volatile_from < self._next and time.monotonic() >= self._retry_at:
                self._try_again()
        elif self._snapshots.due(shadow.reached, self._journal.written_bytes, shadow.state_bytes):
            self._snapshots.begin(shadow.state(), self._journal.written_bytes)
            self._journal.rotate()

    def _look_after_snapshots(self, *, wait: bool = False) -> int:
        """Publish a snapshot that has been written, and remove what retention lets go; returns 1 if so, else 0."""
        try:
            iteration = self._snapshots.poll(wait=wait)
        except FlowCheckError as error:
            if not self._manifest.snapshots_of(self._attempt):
                raise  # without a first snapshot nothing can be committed
            _log.warning("a snapshot is missing: %s", error)
            self._bridging = False
            return 0
        if iteration is None:
            return 0
        if self._bridging:
            self._log_again(iteration)
        self._prune()
        return 1

    def _prune(self) -> None:
        try:
            removed = retention.prune(self.folder, self._manifest, self.plan.checkpoints.retention)
        except (DiskError, CheckpointError) as error:
            _log.warning("nothing is removed: %s", error)
            return
        self._counters["pruned_bytes"] += sum(row["bytes"] for row in removed)

    # -- a disk that takes nothing ----------------------------------------------------------------------------------

    def _refuse(self, error: DiskError, iteration: int) -> None:
        """Go on without the log from an iteration on."""
        if not self._live:
            raise error
        self._logging, self._retry_at = False, time.monotonic() + _RETRY_S
        if self._volatile_from is None:
            self._refused = str(error)
            self._volatile_from = self.slots.volatile_from = iteration
            _log.warning("VOLATILE from iteration %d on, nothing is committed: %s", iteration, error)

    def _apply_volatile(self, decision: Decision) -> bool:
        """Step by an iteration that is not in the log; False where that cannot be: then its slot keeps it."""
        possible = self._shadow is not None and decision.whole and self._shadow.follows(decision.iteration)
        if possible and decision.step is not None and decision.step.audited:
            self._shadow.audit(decision.parts[-1].view("<f4"))
            possible = not self._shadow.diverged
        if not possible:
            if self._volatile_from == decision.iteration and time.monotonic() >= self._retry_at:
                self._logging = True  # nothing is lost yet: try the log itself
            return False
        self._step(decision)
        self._counters["volatile"] += 1
        return True

    def _try_again(self) -> None:
        """Have a snapshot written, with which all is durable again; slots keep what follows it until it is there."""
        self._retry_at = time.monotonic() + _RETRY_S
        try:
            if self._shadow.state_bytes <= _SMALL_BYTES:
                # The slots do not have to keep anything meanwhile: a process of low priority may take longer than they can.
                self._snapshots.publish_now(self._shadow.state(), self._journal.written_bytes)
                self._log_again(self._shadow.reached)
            elif not self._snapshots.busy:
                self._snapshots.begin(self._shadow.state(), self._journal.written_bytes)
                self._bridging = True
        except FlowCheckError as error:
            _log.warning("still volatile: %s", error)

    def _log_again(self, reached: int) -> None:
        """Go on with the log behind a snapshot of the reached iteration, or where nothing was applied without it."""
        self._bridging = False
        if self._journal.next is None or reached >= self._journal.next:
            try:
                self._journal.note_unlogged(reached, "volatile", self._refused)
            except DiskError as error:
                _log.warning("still volatile: %s", error)
                return
        _log.warning("logging again; iterations from %d on were volatile", self._volatile_from)
        self._logging, self._volatile_from, self.slots.volatile_from = True, None, 0

    # -- ending -----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether no iteration follows those that were taken, and nothing that was taken is left to do."""
        if not self.slots.ended or self._next is None or self._is_settled():
            return False
        if self._loading is not None or self._snapshots.busy or self._can_step():
            return False
        if self._volatile_from is None:
            return True
        self._patience_ends = self._patience_ends or time.monotonic() + _END_PATIENCE_S
        return time.monotonic() > self._patience_ends

    def _can_step(self) -> bool:
        shadow = self._shadow
        if not self._unapplied or shadow is None or shadow.reached is None or shadow.diverged:
            return False
        entry = self._unapplied[0]
        number = entry.header.iteration
        return number <= shadow.reached or (
            entry.header.kind == log_format.GRADIENT and shadow.follows(number) and number not in self._diverged
        )

    def counters(self) -> dict[str, int]:
        """Return what this process did: iterations by outcome, bytes logged and removed, bytes that a DMA engine copied."""
        engine = {name: getattr(self._snapshots, name) for name in ("engine_bytes", "engine_failed")}
        return {
            **self._counters, "logged_bytes": self._journal.written_bytes, "snapshots_failed": self._snapshots.failed, **engine,
        }  # fmt: skip

    def close(self) -> None:
        """End: after the last iteration with a snapshot and a closed log, before it such that a new start goes on.

        Raises:
            FlowCheckError: the disk refused the snapshot; what was committed stays, and a new start tries again.
        """
        if self._lock < 0:
            return
        self._loader.shutdown(wait=True, cancel_futures=True)
        try:
            ended = self.finished
            if ended and self._shadow is not None:
                self._end()
            if self._journal is not None:
                self._journal.close()
        finally:
            with suppress(FlowCheckError):
                if self._snapshots is not None:
                    self._snapshots.close()
            os.close(self._lock)
            self._lock = -1

    def _end(self) -> None:
        shadow = self._shadow
        if shadow.reached is None or shadow.diverged:
            return
        if self._volatile_from is not None and shadow.reached >= (self._journal.next or 0):
            self._journal.note_unlogged(shadow.reached, "volatile", self._refused)
        self._snapshots.publish_now(shadow.state(), self._journal.written_bytes)
        self.slots.volatile_from = 0
        self._prune()
