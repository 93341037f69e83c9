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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flowcheck._copy import CopyEngine

from flowcheck.errors import CheckpointError, ConfigError, DiskError, FlowCheckError
from flowcheck.plan import Plan
from updater import log_format, retention
from updater.attempt import make_folders, open_attempt
from updater.decision import Decision, Decisions, Slots
from updater.durable import lock_directory
from updater.inbox import Inbox
from updater.journal import Journal
from updater.log import SEGMENT_BYTES
from updater.log_reader import Entry
from updater.snapshot_schedule import SnapshotSchedule
from updater.stepping import Stepping

if TYPE_CHECKING:
    from updater.base import Base

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
        self._stepping: Stepping | None = None  # of a plan with a model
        self._counters = dict.fromkeys(("whole", "incomplete", "volatile", "pruned_bytes"), 0)
        self._inbox, self._taken = Inbox(plan, bases), time.monotonic()
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
            self._journal, entries = Journal.open(self.folder, self._manifest, plan, segment_bytes)
            self._snapshots = SnapshotSchedule(self._manifest, plan.checkpoints, engine or CopyEngine())
            # What the slots can still bring again: everything if they are new, little if they go on.
            self._prior = {
                entry.header.iteration: entry
                for entry in entries
                if entry.header.kind in log_format.DECIDED and entry.header.iteration >= slots.consumed_next
            }
            self._next = max(slots.consumed_next, plan.first_iteration)
            if plan.has_model:
                self._stepping = Stepping(plan, self._manifest, self._journal, entries, Path(plan_folder), live=live)
                known = self._manifest.snapshots_of(self._attempt)
                self._load(_LOAD_PATIENCE_S if known else _FIRST_LOAD_PATIENCE_S)
            self._decisions = Decisions(plan, slots, self._stepping and self._stepping.has_non_finite)
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

    def _load(self, patience_s: float | None) -> None:
        """Wait so long for the state; once it is there, snapshots go on from it."""
        if self._stepping is not None and self._stepping.load(patience_s) and self._stepping.reached is not None:
            self._snapshots.begun(self._stepping.reached, self._stepping.logged_bytes)
            if (self._attempt, self._stepping.reached) not in self._manifest.snapshots:
                self._publish_state()

    def _is_settled(self) -> bool:
        """Whether a settled iteration waits in the slots."""
        return self._next < self.slots.settled_next

    def _check_gap(self) -> None:
        """Refuse slots whose earlier iterations went elsewhere: they could not be told from lost ones."""
        known = self.plan.first_step if self._journal.next is None else self._journal.next
        bridged = max(self._manifest.snapshots_of(self._attempt), default=0) + 1
        began = self._stepping is None or self._stepping.loading or self._stepping.reached is not None
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
        self._load(0.0)
        done = self._look_after_snapshots()
        if self._is_settled() and not self._is_held():
            if self._next == 0:
                done += self._take_initial()
            elif end := self._decisions.skipped_to(self._next):
                done += self._take_skipped(end)
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
        self._load(None)
        shadow = self._stepping.shadow
        if not self._decisions.is_whole(0):
            if 0 not in self._prior and shadow.reached is None:
                facts = self._decisions.incomplete(0, self.plan.initial_bytes)
                self._journal.note(log_format.INCOMPLETE, 0, 0, facts)
                self._journal.commit()
        elif shadow.reached is None:
            shadow.begin_from_broadcast(self.slots.gradient(0))
            self._publish_state()
            if self._snapshots.busy:
                return 1
        elif (
            name := self._manifest.snapshots.get((self._attempt, 0))
        ) is not None:  # else the shadow has begun from a base
            from updater.shadow import load_snapshot

            first = load_snapshot(self._manifest, self._attempt, 0)
            shadow.compare_broadcast(first, self.slots.gradient(0), self.folder / name)
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
            if entry is not None and self._stepping is not None:
                self._stepping.apply(decision, entry)
            self._counters["whole" if decision.whole else "incomplete"] += 1
            self._given_back(decision.iteration)
            taken += 1
        self._journal.publish()
        return taken

    def _take_skipped(self, end: int) -> int:
        """Note the iterations from the next to before `end`, of which nothing has come, together; 1 if it is done, else 0."""
        if not self._logging:
            self._try_log(self._next)
            return 0
        try:
            if (self._journal.next or self.plan.first_step) < end:
                self._journal.note_unlogged(end - 1, "incomplete", "missing")
        except DiskError as error:
            self._refuse(error, self._next)
            return 0
        if self._volatile_from == self._next:
            self._log_again(self._next - 1)
        self._counters["incomplete"] += end - self._next
        self._given_back(end - 1)
        self._journal.publish()
        return 1

    def _batch(self) -> list[Decision]:
        """Return settled iterations that may be committed by one sync.

        An audit is of the state before its iteration: it ends a batch where that state is not there yet.
        """
        batch: list[Decision] = []
        number = self._next
        following = self._follows(number)
        while (
            number < self.slots.settled_next
            and len(batch) < _MOST_AT_ONCE
            and not self._decisions.skipped_to(number)
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
        problem, audited = None, False
        for decision in batch:
            iteration = decision.iteration
            try:
                if (prior := self._prior.get(iteration)) is not None:
                    self._journal.compare(prior, decision)
                    entries[iteration] = prior
                    continue
                # Also of a state that has diverged: the disk may have refused to note that.
                if decision.whole and self.reached == iteration - 1:
                    self._stepping.audit(iteration, decision.number, decision.parts[-1], decision.step)
                    audited = True
                self._journal.append(decision)
            except DiskError as error:
                problem = error
                break
        try:
            logged = self._journal.commit()
            if audited:
                self._stepping.noted()
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

    # -- a state that is behind -------------------------------------------------------------------------------------

    def _follows(self, iteration: int) -> bool:
        return self._stepping is not None and self._stepping.follows(iteration)

    def _step_from_log(self) -> int:
        return 0 if self._stepping is None else self._stepping.step_from_log()

    def _catch_up(self, *, waiting: bool = False) -> int:
        """Step one iteration of the log that follows the state; look for a base where one is of use.

        So it is where the next iteration is `waiting` for something that may never come. A state that is not bit exact goes on from
        any base that is newer than the one it came from.
        """
        if self._step_from_log():
            return 1
        if self._stepping is None or self._stepping.loading:
            return 0
        reached, exact = self._stepping.reached, self._manifest.latest.bit_exact
        if (exact and not waiting and not self._stepping.behind(self._next)) or not self._stepping.is_noted:
            return 0
        reached = -1 if reached is None else reached
        if not exact:
            reached = min(reached, max(self._manifest.snapshots_of(self._attempt), default=-1))
        base = self._inbox.base(reached)
        if base is None:
            return 0
        self.go_on_from(base)
        return 1

    @property
    def reached(self) -> int | None:
        """The iteration that the state is that after; None while there is none."""
        return self._stepping and self._stepping.reached

    def go_on_from(self, base: Base) -> None:
        """Take a full state of the trainer in place of the state; what the log has of later iterations is then stepped by `poll`."""
        self._load(None)
        if self._snapshots.busy:
            self._look_after_snapshots(wait=True)
        self._stepping.go_on_from(base)
        self._publish_state()
        self._stepping.measure()

    # -- snapshots --------------------------------------------------------------------------------------------------

    def _publish_state(self) -> None:
        """Publish the state as it is: a small one before this returns, a large one beside what follows.

        Raises:
            DiskError: the disk refuses the attempt's very first one, without which nothing can be committed.
        """
        shadow = self._stepping.shadow
        if shadow.state_bytes > _SMALL_BYTES:
            self._snapshots.begin(shadow.state(), self._stepping.logged_bytes)
            return
        try:
            self._snapshots.publish_now(shadow.state(), self._stepping.logged_bytes)
        except DiskError as error:
            if not self._manifest.snapshots_of(self._attempt):
                raise
            _log.warning("a snapshot is missing: %s", error)

    def _begin_snapshot(self) -> None:
        """Begin a snapshot if one is due, or if the disk may take one again after it took nothing."""
        shadow = self._stepping and self._stepping.shadow
        follows = shadow is not None and shadow.follows(self._next)
        if self._volatile_from is not None:
            if self._volatile_from < self._next and time.monotonic() >= self._retry_at:
                self._try_again(bridge=follows)
        elif shadow is None or not self._stepping.is_right:
            return
        elif self._snapshots.due(shadow.reached, self._stepping.logged_bytes, shadow.state_bytes):
            # Also of a state that is behind: who is killed before it has caught up then goes on from there.
            self._snapshots.begin(shadow.state(), self._stepping.logged_bytes)
            if follows:
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
        self._prune(iteration)
        return 1

    def _prune(self, verified: int) -> None:
        """Remove what retention lets go, now that a snapshot was read back and found right."""
        rules = self.plan.checkpoints.retention
        try:
            removed = retention.prune(self._manifest, rules, verified=(self._attempt, verified))
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
        possible = decision.whole and self._follows(decision.iteration)
        if possible and decision.step is not None and decision.step.audited:
            self._stepping.hold(decision.iteration, decision.parts[-1])
            possible = not self._stepping.shadow.diverged
        if not possible:
            self._try_log(decision.iteration)
            return False
        self._stepping.step(decision)
        self._counters["volatile"] += 1
        return True

    def _try_log(self, iteration: int) -> None:
        """Have the log itself tried again if the iteration is the first that the disk refused: nothing is lost yet."""
        if self._volatile_from == iteration and time.monotonic() >= self._retry_at:
            self._logging = True

    def _try_again(self, *, bridge: bool) -> None:
        """Have a snapshot written, with which all is durable again; slots keep what follows it until it is there.

        Where the state can be no `bridge` to the next iteration (an audit found that it is no rank's, or a base is further), log
        what follows all the same: it waits for a base.
        """
        self._retry_at = time.monotonic() + _RETRY_S
        if not bridge:
            self._log_again(self._next - 1)
            return
        shadow = self._stepping.shadow
        try:
            if shadow.state_bytes <= _SMALL_BYTES:
                # At once: a process of low priority may take longer than the slots can wait.
                self._snapshots.publish_now(shadow.state(), self._stepping.logged_bytes)
                self._log_again(shadow.reached)
            elif not self._snapshots.busy:
                self._snapshots.begin(shadow.state(), self._stepping.logged_bytes)
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
        if self._snapshots.busy or (self._stepping is not None and (self._stepping.loading or self._stepping.can_step)):
            return False
        if self._volatile_from is None:
            return True
        self._patience_ends = self._patience_ends or time.monotonic() + _END_PATIENCE_S
        return time.monotonic() > self._patience_ends

    def counters(self) -> dict[str, int]:
        """Return what this process did: iterations by outcome, bytes logged and removed, bytes that a DMA engine copied."""
        engine = {name: getattr(self._snapshots, name) for name in ("engine_bytes", "engine_failed")}
        stepped = {name: getattr(self._stepping, name, 0) for name in ("applied", "bases")}
        return {
            **self._counters, **stepped, "logged_bytes": self._journal.written_bytes, "snapshots_failed": self._snapshots.failed, **engine,
        }  # fmt: skip

    def close(self) -> None:
        """End: after the last iteration with a snapshot and a closed log, before it such that a new start goes on.

        Raises:
            FlowCheckError: the disk refused the snapshot; what was committed stays, and a new start tries again.
        """
        if self._lock < 0:
            return
        if self._stepping is not None:
            self._stepping.close()
        try:
            if self.finished and self._stepping is not None:
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
        shadow = self._stepping.shadow
        if shadow.reached is None or shadow.diverged:
            return
        if self._volatile_from is not None and shadow.reached >= (self._journal.next or 0):
            self._journal.note_unlogged(shadow.reached, "volatile", self._refused)
        self._snapshots.publish_now(shadow.state(), self._stepping.logged_bytes)
        self.slots.volatile_from = 0
        self._prune(shadow.reached)
