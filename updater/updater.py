# SPDX-License-Identifier: MIT
"""The updater: takes decided iterations out of the slots, makes them durable, and steps the training state.

Order per iteration: into the log and synced (committed), applied, slot given back. So whatever instant it is killed at,
a slot is given back only when its iteration is in the log, and the state is rebuilt from snapshot and log.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from flowcheck._copy import CopyEngine

from flowcheck.errors import CheckpointError, ConfigError, FlowCheckError
from flowcheck.layout import mirrored_ranges
from flowcheck.plan import Plan, Revision
from flowcheck.step_record import RecordError, Step
from updater import durable, log_format
from updater.directory import payload_views
from updater.durable import io_errors, lock_directory, remove_temporaries, write_published
from updater.log import SEGMENT_BYTES, LogWriter
from updater.log_reader import Entry, read_index, segment_paths
from updater.manifest import LOG_FOLDER, MANIFEST_NAME, PLAN_NAME, SNAPSHOT_FOLDER, Manifest

if TYPE_CHECKING:
    from updater.model_state import ModelState
    from updater.shadow import Shadow

__all__ = ["Slots", "Updater"]

_log = logging.getLogger(__name__)
#: Name of a base in a folder that is watched, and seconds between two looks.
BASE_NAME = re.compile(r"state-(\d{6,12})\.pt")
_LOOK_S = 0.2
#: When nothing was decided for so long, a full state that is further than the shadow says that something was lost.
_IDLE_S = 2.0
#: fc_slot.state and fc_slot.reason (flowcheck/_formats.pxd).
_SLOT_WHOLE = 2
_REASONS = {1: "missing", 2: "conflict", 3: "end_of_stream"}


class Slots(Protocol):
    """What the updater needs of a slot file (`flowcheck.slots.SlotFile`)."""

    settled_next: int
    consumed_next: int
    ended: int

    def gradient(self, iteration: int) -> np.ndarray:
        """Return the slot data of an iteration, writable uint8."""

    def slot(self, iteration: int) -> np.void:
        """Return the record of its slot."""

    def missing(self, iteration: int) -> list[tuple[int, int]]:
        """Return the ranges of slot bytes that are missing."""


def _make_shadow(plan: Plan, manifest: Manifest, index: Iterator[Entry], engine: CopyEngine) -> Shadow:
    from updater.shadow import Shadow  # torch is loaded only for a plan with a model

    return Shadow(plan, manifest, index, engine)


class Updater:
    """One run's checkpoint directory, being written: make -> poll until finished -> close; one thread, one process.

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

        Raises:
            ConfigError: the directory is another run's, or another process has it, or the plan cannot be stepped.
            CheckpointError: the directory is corrupt.
        """
        self.plan, self.slots, self.folder = plan, slots, Path(out_dir)
        self._identity = plan.identity()
        self._log: LogWriter | None = None
        self._shadow: Shadow | None = None
        self._next: int | None = None
        self._counters = dict.fromkeys(("whole", "incomplete", "applied", "bases"), 0)
        self._bases, self._refused, self._looked = tuple(bases), set[Path](), 0.0
        self._catching_up: Iterator[int] | None = None
        self._moved, self._taken = False, time.monotonic()
        self._left: tuple[ModelState, int] | None = None  # the state before a base, and its iteration
        with io_errors("make", self.folder):
            for folder in (self.folder, self.folder / LOG_FOLDER, self.folder / SNAPSHOT_FOLDER):
                durable.disk.make_folder(folder)
            self._lock = lock_directory(self.folder)
        try:
            self._manifest = self._open_manifest()
            log_folder = self.folder / LOG_FOLDER
            with io_errors("clear", self.folder):
                for folder in (self.folder, log_folder, self.folder / SNAPSHOT_FOLDER):
                    remove_temporaries(folder)
            closed = self._manifest.closed_segments
            self._log = LogWriter(log_folder, self._identity, closed=closed, segment_bytes=segment_bytes)
            self._publish_segments()
            # What the slots can still bring again: everything if they are new, little if they go on.
            index = read_index(log_folder, self._identity)
            self._prior = {
                e.header.iteration: e
                for e in index
                if e.header.iteration >= slots.consumed_next and e.header.kind in log_format.DECIDED
            }
            if plan.has_model:
                self._shadow = _make_shadow(
                    plan, self._manifest, read_index(log_folder, self._identity), engine or CopyEngine()
                )
                if plan.initial_state.source == "file" and self._shadow.reached is None:
                    self._shadow.begin_from_file(Path(plan_folder) / plan.initial_state.path)
            self._next = max(slots.consumed_next, plan.first_iteration)
            self._check_gap()
        except BaseException:
            self.close()
            raise

    def _open_manifest(self) -> Manifest:
        """Return the directory's manifest, or begin one; ConfigError if the directory is another run's."""
        canonical = self.plan.canonical()
        if (self.folder / MANIFEST_NAME).exists():
            manifest = Manifest.load(self.folder)
            job = self.plan.job
            if (manifest.run_id, manifest.attempt) != (job.run_id, job.attempt):
                raise ConfigError(
                    f"{self.folder}: holds run {manifest.run_id!r} attempt {manifest.attempt}, the plan is of run {job.run_id!r} "
                    f"attempt {job.attempt}; choose another directory"
                )
            if manifest.identity != self._identity:
                raise ConfigError(
                    f"{self.folder}: was made from another plan of run {job.run_id!r}; choose another directory"
                )
            manifest.check(PLAN_NAME)
        else:
            stray = next(iter(sorted((self.folder / LOG_FOLDER).glob("*.fclog"))), None)
            if stray is not None:
                raise CheckpointError(
                    f"{self.folder}: no {MANIFEST_NAME}, but a log; restore the manifest from a copy", str(stray)
                )
            plan_path = self.folder / PLAN_NAME
            if plan_path.exists() and plan_path.read_bytes() != canonical:
                raise ConfigError(
                    f"{self.folder}: has a {PLAN_NAME} but no {MANIFEST_NAME}: not a checkpoint directory; choose another"
                )
            manifest = Manifest(
                self.folder, self.plan.job.run_id, self.plan.job.attempt, self._identity, self.plan.has_model, True
            )
            write_published(self.folder / PLAN_NAME, canonical)
            manifest.add(PLAN_NAME)
        exact = manifest.bit_exact and self._bit_exact_here()
        if exact != manifest.bit_exact or not (self.folder / MANIFEST_NAME).exists():
            manifest.bit_exact = exact
            manifest.store()
        return manifest

    def _bit_exact_here(self) -> bool:
        if not self.plan.has_model:
            return True
        from updater import arithmetic  # torch is loaded only for a plan with a model

        return arithmetic.bit_exact(self.plan)

    def _publish_segments(self) -> None:
        """Take the segments that will not change again into the manifest."""
        published = self._manifest.closed_segments | {self._log.open_segment}
        new = [path.name for path in segment_paths(self.folder / LOG_FOLDER) if path.name not in published]
        for name in new:
            self._manifest.add(f"{LOG_FOLDER}/{name}")
        if new:
            self._manifest.store()

    def _check_gap(self) -> None:
        """Refuse slots whose earlier iterations went elsewhere: they could not be told from lost ones."""
        logged = self._log.next_iteration
        known = logged if logged is not None else 1
        if self._next > known or (self._next > 0 and not self.plan.first_iteration and not self._has_initial()):
            raise ConfigError(
                f"{self.folder}: ends before iteration {known}, but the slot file has given back everything before {self._next}; "
                "use the directory that took those, or begin both anew"
            )

    def _has_initial(self) -> bool:
        return self._shadow is None or self._shadow.reached is not None or 0 in self._prior

    def poll(self) -> int:
        """Take one decided iteration, or step one that the log holds; returns 1, or 0 if there is nothing to do.

        Raises:
            CheckpointError: the slot contradicts what the log holds of the same iteration.
            FlowCheckError: the disk refused; what was committed stays.
        """
        if self._next >= self.slots.settled_next:
            return self._catch_up(waiting=time.monotonic() - self._taken > _IDLE_S)
        record = self.slots.slot(self._next)
        if int(record["iteration"]) != self._next:
            raise CheckpointError(
                f"the slot of iteration {self._next} holds {record['iteration']}; begin the slot file anew"
            )
        whole, segment = int(record["state"]) == _SLOT_WHOLE, self._log.open_segment
        if not whole and self._awaits_record():
            return self._catch_up(waiting=True)
        if self._next == 0:
            self._take_initial(whole, record)
        else:
            self._take(self._next, whole, record)
        self._next += 1
        self._taken = time.monotonic()
        self.slots.consumed_next = self._next
        if self._log.open_segment != segment:
            self._publish_segments()
        return 1

    def _behind(self) -> bool:
        """Whether the state is not that after the last iteration taken."""
        if self._shadow is None:
            return False
        if self._shadow.reached is None:
            return self._next > self.plan.first_iteration
        if self._shadow.diverged:
            return True
        return self._shadow.reached + 1 < self._next

    def _catch_up(self, *, waiting: bool = False) -> int:
        """Step one iteration of the log that follows the state; look for a base where one is of use.

        So it is where the next iteration is `waiting` for something that may never come.
        """
        if self._catching_up is not None:
            if next(self._catching_up, None) is not None:
                self._counters["applied"] += 1
                self._moved = True
                self._measure()
                return 1
            # What was logged meanwhile is there to step, too.
            self._catching_up, self._moved = self._follow_log() if self._moved and self._behind() else None, False
            return int(self._catching_up is not None)
        if self._shadow is None or (self._manifest.bit_exact and not waiting and not self._behind()):
            return 0
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return 0
        self._looked = now
        return self._rebase()

    def _follow_log(self) -> Iterator[int]:
        return self._shadow.catch_up(read_index(self.folder / LOG_FOLDER, self._identity))

    def _rebase(self) -> int:
        """Go on from the earliest base that is further than the state; 0 if there is none.

        A state that is not bit exact goes on from any base that is newer than the one it came from.
        """
        reached = -1 if self._shadow.reached is None else self._shadow.reached
        if not self._manifest.bit_exact:
            reached = min(reached, max(self._manifest.snapshots, default=-1))
        found = [
            (int(match[1]), path)
            for folder in self._bases
            for path in (folder.iterdir() if folder.is_dir() else ())
            if (match := BASE_NAME.fullmatch(path.name)) and int(match[1]) > reached and path not in self._refused
        ]
        if not found:
            return 0
        from updater.base import load_base  # torch is loaded only for a plan with a model

        iteration, path = min(found)
        try:
            base = load_base(path, self.plan)
            if base.iteration != iteration:
                raise ConfigError(f"{path}: holds the state of iteration {base.iteration}, its name says {iteration}")
        except FlowCheckError as error:
            self._refused.add(path)
            _log.warning("not taken as a base: %s", error)
            return 0
        self._left = self._shadow.rebase(base)
        self._counters["bases"] += 1
        self._measure()
        self._catching_up = self._follow_log()
        return 1

    def _measure(self) -> None:
        """Once the state has come from a base to where it was before, note how far apart the two are."""
        if self._left is None or self._shadow.reached < self._left[1]:
            return
        (left, iteration), self._left = self._left, None
        if self._shadow.reached != iteration or self._log.next_iteration is None:
            return
        from updater.state_difference import differences

        found = differences((left.model, left.optimizer.state_dict()), self._shadow.state)
        furthest = max(found, key=lambda row: row["max_ulp"], default={"name": None, "max_ulp": 0})
        record = self.plan.shard.step_record
        limit = record.audit.max_ulp if record else None
        over = limit is not None and furthest["max_ulp"] > limit
        if over:
            _log.warning("at iteration %d the state was %d ULPs from the trainer's", iteration, furthest["max_ulp"])
        facts = {"at": iteration, "max_ulp": furthest["max_ulp"], "tensor": furthest["name"], "over_limit": over}
        self._log.append_facts(log_format.MEASURED, self.plan.job.attempt, self._log.next_iteration, 0, facts)

    def _take_initial(self, whole: bool, record: np.void) -> None:
        if whole:
            self._shadow.begin_from_broadcast(self.slots.gradient(0))
        elif 0 not in self._prior and self._shadow.reached is None:
            self._append_incomplete(0, 0, self.plan.initial_bytes, record)

    def _take(self, iteration: int, whole: bool, record: np.void) -> None:
        revision = self.plan.revision(iteration)
        number = self.plan.shard.revisions.index(revision)
        data = self.slots.gradient(iteration)
        parts, problem = payload_views(data, self.plan, revision), None
        step = None
        if self.plan.record_form is not None and (whole or self._lacks_record_only(iteration)):
            parts[-1], step, problem = self._said(iteration, revision, whole)
            whole = problem is None
        prior = self._prior.pop(iteration, None)
        if prior is not None:
            self._compare(prior, whole, parts)
            whole = whole and prior.header.kind == log_format.GRADIENT
        elif whole:
            self._audit(iteration, number, parts[-1], step)
            self._log.append(log_format.GRADIENT, self.plan.job.attempt, iteration, number, parts)
        else:
            self._append_incomplete(iteration, number, revision.gradient_bytes, record, problem)
        self._counters["whole" if whole else "incomplete"] += 1
        if whole and self._shadow is not None:
            self._counters["applied"] += self._shadow.apply(iteration, data, revision, step)

    def _lacks_record_only(self, iteration: int) -> bool:
        """Whether every byte of an iteration's gradient is there, and only its step record is not whole."""
        if int(self.slots.slot(iteration)["conflicts"]):
            return False
        begin, _ = self.plan.record_range(self.plan.revision(iteration))
        return all(low >= begin for low, _ in self.slots.missing(iteration))

    def _awaits_record(self) -> bool:
        """Whether the next iteration, which repeats the record that this one lacks, is yet to be decided."""
        if self._next == 0 or self.plan.record_form is None or self.slots.ended:
            return False
        return self._next + 1 >= self.slots.settled_next and self._lacks_record_only(self._next)

    def _said(self, iteration: int, revision: Revision, whole: bool) -> tuple[np.ndarray, Step | None, str | None]:
        """Return the bytes of an iteration's step record, what it says, and why the iteration cannot be committed by it."""
        form = self.plan.record_form
        begin, end = self.plan.record_range(revision)
        record = self.slots.gradient(iteration)[begin:end].view("<f4")
        try:
            if not whole:
                record = self._repeated(iteration)
            step = form.decode(form.current(record), iteration)
            if not whole:
                step = replace(step, audited=False)  # the digests were not repeated
            if step.reductions != revision.reductions:
                raise RecordError(f"says {step.reductions} reductions, the plan {revision.reductions}")
        except RecordError as error:
            _log.warning("iteration %d: the step record %s", iteration, error)
            return record.view(np.uint8), None, "step_record"
        if self._shadow is not None and step.scale is not None:
            if self._shadow.has_non_finite(self.slots.gradient(iteration), revision) != step.skipped:
                _log.warning("iteration %d: its record says skipped %s, its gradient not", iteration, step.skipped)
                return record.view(np.uint8), None, "conflict"
        return record.view(np.uint8), step, None

    def _repeated(self, iteration: int) -> np.ndarray:
        """Return a record of what the next iteration's repeats of this one's; RecordError if that is not there either."""
        form, following = self.plan.record_form, iteration + 1
        if following >= self.slots.settled_next:
            raise RecordError("was lost, and no iteration follows")
        begin, _ = self.plan.record_range(self.plan.revision(following))
        low, high = begin + 4 * form.words, begin + 8 * form.words
        if any(first < high and last > low for first, last in self.slots.missing(following)):
            raise RecordError("was lost, and so was its repetition")
        record = np.zeros(form.elements, "<f4")
        record[: form.words] = self.slots.gradient(following)[low:high].view("<f4")
        return record

    def _audit(self, iteration: int, number: int, record: np.ndarray, step: Step | None) -> None:
        """Hold the state before a step against the digests in its record, and note what was found."""
        if step is None or not step.audited or self._shadow is None or not self._shadow.follows(iteration):
            return
        alarms = self._shadow.audit(record.view("<f4"))
        if alarms is None:
            return
        kind = log_format.DIVERGED if self._shadow.diverged else log_format.ALARM if alarms else log_format.AUDITED
        for alarm in alarms:
            rank = "every rank" if alarm["rank"] is None else f"rank {alarm['rank']}"
            names = f"{alarm['tensors'][0]} to {alarm['tensors'][-1]}"
            _log.warning("audit of iteration %d: %s has other bits than the shadow in %s", iteration, rank, names)
        self._log.append_facts(kind, self.plan.job.attempt, iteration, number, {"alarms": alarms})

    def _compare(self, prior: Entry, whole: bool, views: list[np.ndarray]) -> None:
        """Hold a slot against the record that an earlier start wrote; what was decided then stays decided."""
        if not whole or prior.header.kind != log_format.GRADIENT:
            return
        if log_format.block_checksums(views)[1] != prior.header.checksum:
            raise CheckpointError(
                f"{prior.segment}: iteration {prior.header.iteration} is in the log with another gradient than the wire now gives; "
                "use another directory for another run",
                str(prior.segment),
            )

    def _append_incomplete(
        self, iteration: int, revision: int, size: int, record: np.void, problem: str | None = None
    ) -> None:
        missing = self.plan.flat_ranges(iteration, self.slots.missing(iteration))
        facts = {
            "bytes": size,
            "placed_bytes": size - sum(end - begin for begin, end in missing),
            "missing": missing,
            "reason": problem or self._reason(iteration, missing, _REASONS.get(int(record["reason"]), "missing")),
        }
        self._log.append_facts(log_format.INCOMPLETE, self.plan.job.attempt, iteration, revision, facts)

    def _reason(self, iteration: int, missing: list[list[int]], reason: str) -> str:
        """Return why an iteration is incomplete; bytes that no mirrored connection carries could not come at all."""
        if iteration == 0 or not missing or reason == "conflict":
            return reason
        carried = mirrored_ranges(self.plan, iteration)
        could_come = any(begin < high and low < end for begin, end in missing for low, high in carried)
        return reason if could_come else "not_mirrored"

    @property
    def finished(self) -> bool:
        """Whether no iteration follows those that were taken."""
        return bool(self.slots.ended) and self._next >= self.slots.settled_next and self._catching_up is None

    def counters(self) -> dict[str, int]:
        """Return what this process did: iterations by outcome, bytes logged, bytes that a DMA engine copied."""
        copied = (self._shadow.engine_bytes, self._shadow.engine_failed) if self._shadow else (0, 0)
        engine = dict(zip(("engine_bytes", "engine_failed"), copied, strict=True))
        return {**self._counters, "logged_bytes": self._log.written_bytes, **engine}

    def close(self) -> None:
        """End: after the last iteration with a snapshot and a closed log, before it such that a new start goes on.

        Raises:
            FlowCheckError: the disk refused the snapshot; what was committed stays, and a new start tries again.
        """
        if self._lock < 0:
            return
        try:
            if self._log is not None:
                ended = self._next is not None and self.finished
                if ended and self._shadow is not None:
                    self._shadow.snapshot()
                self._log.close()
                if ended:
                    self._publish_segments()
        finally:
            os.close(self._lock)
            self._lock = -1
