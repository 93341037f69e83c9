# SPDX-License-Identifier: MIT
"""A checkpoint directory as readers see it: manifest, plans, log index and the state of every iteration.

Opening it imports neither torch nor h5py, and changes nothing. What is corrupt is left out and listed under `problems`:
so that everything else can be restored, and whoever must have it all can refuse.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from flowcheck import plan as plans
from flowcheck.errors import CheckpointError, RestoreError
from flowcheck.plan import Plan, Revision
from updater import log_format as form
from updater.log_reader import Entry, Segment, read_facts, read_payload, segment_name, segment_numbers
from updater.manifest import LOG_FOLDER, Manifest

__all__ = ["Directory", "Iteration", "bucket_views", "nearest", "payload_views", "record_of", "segments"]


def bucket_views(slot: np.ndarray, revision: Revision) -> list[np.ndarray]:
    """Return each bucket's bytes in an iteration's slot data: the flat gradient in order, without the padding."""
    return [slot[begin:end] for begin, end in revision.slot_ranges]


def payload_views(slot: np.ndarray, plan: Plan, revision: Revision) -> list[np.ndarray]:
    """Return what the log keeps of an iteration, as views of its slot data: the buckets, then the step record if there is one."""
    return [slot[begin:end] for begin, end in plan.slot_pieces(revision)]


def record_of(slot: np.ndarray, plan: Plan, revision: Revision) -> np.ndarray | None:
    """Return the step record in an iteration's slot data, float32, as a view; None if the job has none."""
    place = plan.record_range(revision)
    return None if place is None else slot[slice(*place)].view("<f4")


@dataclass(frozen=True)
class Iteration:
    """One iteration of one attempt.

    Attributes:
        attempt: which.
        number: of the iteration.
        state: as `list` names it.
        own: its state in its own attempt, whether or not a later attempt supersedes it.
        entry: its record in the log; None where it never came into one.
        facts: what is known of one without a gradient in the log, None if its record has to be read for that.
    """

    attempt: int
    number: int
    state: str
    own: str
    entry: Entry | None = None
    facts: dict | None = None


def segments(manifest: Manifest) -> list[int]:
    """Return the numbers of a log's segments, ascending: the published ones, and those behind all that were ever closed.

    A file of another number was removed by retention, and a crash left it.
    """
    found = [n for n in segment_numbers(manifest.folder / LOG_FOLDER) if n > manifest.closed_to]
    return [*manifest.segments, *found]


@functools.lru_cache(maxsize=65536)
def _published_entries(path: Path, identities: tuple[bytes, ...], _version: tuple[int, ...]) -> tuple[Entry, ...]:
    """Return the records of a segment that does not change any more, unless what `_version` tells apart does."""
    with Segment(path, identities) as segment:
        return tuple(segment.entries())


def _version(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; restore the file from a copy", str(path)
        ) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


class Directory:
    """A checkpoint directory, open for reading; nothing of it is loaded before its checksum agreed.

    Attributes:
        problems: name of a segment that cannot be read, and why; filled when the log is first looked at.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the manifest; CheckpointError if the directory is none, or is corrupt."""
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self.problems: dict[str, CheckpointError] = {}
        self._plans: dict[int, Plan] = {}
        self._lineages: dict[int, dict[int, Iteration]] = {}

    @property
    def plan(self) -> Plan:
        """The plan of the latest attempt; CheckpointError if its file is not as it was written."""
        return self.plan_of(self.manifest.latest.number)

    def plan_of(self, number: int) -> Plan:
        """Return the plan of an attempt; CheckpointError if its file is not as it was written."""
        if number not in self._plans:
            attempt = self.manifest.attempt(number)
            path = self.manifest.check(attempt.plan)
            plan = plans.load(path)
            if plan.identity() != attempt.identity:
                raise CheckpointError(
                    f"{path}: is not the plan that the manifest was made from; restore both from one copy", str(path)
                )
            self._plans[number] = plan
        return self._plans[number]

    @cached_property
    def _index(self) -> dict[int, list[Entry]]:
        """Every record of the log by attempt, in order; a duplicate of what a segment before has is left out."""
        manifest, identities = self.manifest, tuple(self.manifest.identities)
        index: dict[int, list[Entry]] = {attempt.number: [] for attempt in manifest.attempts}
        due = manifest.closed_to + 1
        for number in segments(manifest):
            name = f"{LOG_FOLDER}/{segment_name(number)}"
            path = manifest.folder / name
            try:
                if number > due:
                    raise CheckpointError(
                        f"{path.parent}: segment {segment_name(due)} is missing; restore it from a copy",
                        str(path.parent),
                    )
                if name in manifest.files:
                    entries = _published_entries(path, identities, _version(path))
                else:
                    due = number + 1
                    with Segment(path, identities) as segment:
                        entries = tuple(segment.entries())
                for entry in entries:
                    index[entry.header.attempt].append(entry)
            except KeyError as error:
                self.problems[name] = CheckpointError(
                    f"{path}: has records of attempt {error}, which is not known", str(path)
                )
            except CheckpointError as error:
                self.problems[name] = error
        return index

    @cached_property
    def iterations(self) -> list[Iteration]:
        """Every iteration that the directory knows of, by attempt and number; see docs/checkpoints.md for the states."""
        limits = self.manifest.lineage(self.manifest.latest.number)
        out = []
        for number, entries in self._index.items():
            for row in self._own(number, entries):
                current = row.number <= limits.get(number, -1)
                out.append(row if current else replace(row, state="superseded"))
        return out

    def _own(self, attempt: int, entries: list[Entry]) -> Iterator[Iteration]:
        """Yield an attempt's iterations with the state that each has in it.

        A snapshot that the log does not lead to is a base: what was whole before it and never committed is superseded, what
        follows it is committed. Where an audit found that the state is no rank's, nothing is committed from there to a base. What
        the wire brings as iteration 0 is the initial state, and no iteration of its own: it is left out.
        """
        bases = iter(self.manifest.snapshots_of(attempt))
        reached, base = None, next(bases, None)
        diverged = {entry.header.iteration for entry in entries if entry.header.kind == form.DIVERGED}
        for entry in entries:
            number, kind = entry.header.iteration, entry.header.kind
            if kind == form.VOLATILE:
                yield from self._unlogged(attempt, entry)
                continue
            if number == 0 or kind not in form.DECIDED:
                continue
            while base is not None and base < number:
                reached, base = base if reached is None else max(reached, base), next(bases, None)
            if number in diverged:
                reached = None
            if kind != form.GRADIENT:
                state = "incomplete"
            elif not self.manifest.has_model:
                state = "whole"
            elif reached is not None and number == reached + 1:
                reached, state = number, "committed"
            else:
                state = "waiting" if base is None else "superseded"
            yield Iteration(attempt, number, state, state, entry)

    def _unlogged(self, attempt: int, note: Entry) -> Iterator[Iteration]:
        """Yield the iterations of which a note says that they are not in the log."""
        said = read_facts(note, self.manifest.identities)
        plan = self.plan_of(attempt)
        begins = {revision.from_iteration for revision in plan.shard.revisions}
        facts: dict = {}
        for number in range(said["from"], said["to"] + 1):
            if not facts or number in begins:
                size = plan.revision(number).gradient_bytes
                placed, missing = (size, []) if said["state"] == "volatile" else (0, [[0, size]])
                facts = {"bytes": size, "placed_bytes": placed, "missing": missing, "reason": said["reason"]}
            yield Iteration(attempt, number, said["state"], said["state"], None, facts)

    def require_whole(self) -> None:
        """Raise the first CheckpointError that reading the log has met."""
        _ = self._index
        for problem in self.problems.values():
            raise problem

    def facts(self, row: Iteration) -> dict:
        """Return `bytes`, `placed_bytes`, `missing` and `reason` of an iteration, as `list --json` has them."""
        if row.facts is not None:
            return row.facts
        if row.own == "incomplete":
            return read_facts(row.entry, self.manifest.identities)
        size = self.plan_of(row.attempt).revision(row.number).gradient_bytes
        return {"bytes": size, "placed_bytes": size, "missing": [], "reason": None}

    def sources(self, row: Iteration) -> list[int] | None:
        """Return how many bytes of an iteration came over no, one, two, three or more edges; None where that is not known.

        An earlier release did not log it, nor is it logged where the plan mirrors one edge: then each byte has one source or none.
        """
        if row.entry is None:
            return None
        noted = self._sources.get((row.attempt, row.number))
        if noted is None and len(self.plan_of(row.attempt).shard.mirrored_edges) == 1:
            said = self.facts(row)
            return [said["bytes"] - said["placed_bytes"], said["placed_bytes"], 0, 0]
        return noted

    @cached_property
    def _sources(self) -> dict[tuple[int, int], list[int]]:
        notes: dict[Path, list[Entry]] = {}
        for entries in self._index.values():
            for entry in entries:
                if entry.header.kind == form.SOURCES:
                    notes.setdefault(entry.segment, []).append(entry)
        out = {}
        for path, entries in notes.items():
            with Segment(path, self.manifest.identities) as segment:
                for entry in entries:
                    out[entry.header.attempt, entry.header.iteration] = segment.facts(entry)["bytes"]
        return out

    def _notes(self, kinds: Iterable[int]) -> Iterator[Entry]:
        """Yield notes of the latest attempt and of those that it goes on from, as far as it does, oldest first."""
        for attempt, limit in reversed(self.manifest.lineage(self.manifest.latest.number).items()):
            for entry in self._index[attempt]:
                if entry.header.kind in kinds and entry.header.iteration <= limit + 1:
                    yield entry

    @cached_property
    def audits(self) -> tuple[int | None, list[dict]]:
        """Up to which iteration the states were audited and found right, None if none was; and every alarm.

        An alarm: `iteration` whose record showed it, `audited_to` before, `tensors` of the group, `rank` (None: all, or
        several), and whether the `shadow` has another state than the trainers.
        """
        audited_to, alarms = self.manifest.audited_to, list(self.manifest.alarms)
        told = {(alarm["iteration"], alarm["shadow"]) for alarm in alarms}
        for entry in self._notes((form.AUDITED, form.ALARM, form.DIVERGED)):
            shadow = entry.header.kind == form.DIVERGED
            if entry.header.kind in (form.ALARM, form.DIVERGED) and (entry.header.iteration, shadow) not in told:
                rows = read_facts(entry, self.manifest.identities)["alarms"]
                known = {"iteration": entry.header.iteration, "audited_to": audited_to}
                alarms += [{**known, **row, "shadow": shadow} for row in rows]
            if entry.header.kind in (form.AUDITED, form.ALARM):
                audited_to = entry.header.iteration - 1
        return audited_to, alarms

    @cached_property
    def distances(self) -> list[dict]:
        """How far a state that is not bit exact was from the trainer's at each base: `at`, `max_ulp`, `tensor`, `over_limit`."""
        return [read_facts(entry, self.manifest.identities) for entry in self._notes((form.MEASURED,))]

    @cached_property
    def _committed(self) -> dict[int, dict[int, Entry]]:
        found: dict[int, dict[int, Entry]] = {attempt.number: {} for attempt in self.manifest.attempts}
        for row in self.iterations:
            if row.own == "committed":
                found[row.attempt][row.number] = row.entry
        return found

    def committed(self, attempt: int) -> dict[int, Entry]:
        """Return the records of the iterations that are committed in an attempt, superseded or not, by number."""
        return self._committed[attempt]

    def restorable(self, attempt: int | None = None) -> dict[int, int]:
        """Return the iterations that a state can be restored of, and each one's attempt.

        Those of an attempt, the latest if None, and of the attempts that it goes on from, as far as it does.
        """
        out: dict[int, int] = {}
        for number, limit in self.manifest.lineage(attempt or self.manifest.latest.number).items():
            for iteration in (*self.committed(number), *self.manifest.snapshots_of(number)):
                if iteration <= limit:
                    out.setdefault(iteration, number)
        return dict(sorted(out.items()))

    def ways(self, attempt: int, iteration: int) -> tuple[list[int], dict[int, Entry]]:
        """Return the snapshots of an attempt from which the log leads to an iteration, nearest first; and its records."""
        entries, first = self.committed(attempt), iteration
        while first in entries:
            first -= 1
        ways = [s for s in self.manifest.snapshots_of(attempt) if first <= s <= iteration]
        return ways[::-1], {n: entries[n] for n in range(first + 1, iteration + 1)}

    def _lineage(self, attempt: int) -> dict[int, Iteration]:
        """Return the iterations of an attempt, and of those that it goes on from as far as it does, by number."""
        if attempt not in self._lineages:
            limits = self.manifest.lineage(attempt)
            rows = (row for row in self.iterations if row.number <= limits.get(row.attempt, -1))
            self._lineages[attempt] = {row.number: row for row in rows}
        return self._lineages[attempt]

    def slot(self, iteration: int, attempt: int | None = None) -> tuple[np.ndarray, Plan, Revision]:
        """Return a logged iteration's gradient as slot data (buckets on their boundaries), its plan and its revision.

        Raises:
            RestoreError: the iteration is not in the log, or incomplete there.
            CheckpointError: a checksum of its record is wrong.
        """
        rows = self._lineage(attempt or self.manifest.latest.number)
        row = rows.get(iteration)
        if row is None or row.entry is None or row.own == "incomplete":
            self.require_whole()
            whole = [i for i, r in rows.items() if r.entry is not None and r.own != "incomplete"]
            what = "not in the log" if row is None else row.own
            raise RestoreError(
                f"{self.path}: the gradient of iteration {iteration} is {what}; {nearest(whole, iteration)}"
            )
        plan = self.plan_of(row.attempt)
        revision = plan.revision(iteration)
        slot = np.zeros(plan.slot_bytes, np.uint8)
        read_payload(row.entry, self.manifest.identities, payload_views(slot, plan, revision))
        return slot, plan, revision


def nearest(iterations: Iterable[int], wanted: int) -> str:
    """Return the words that name the iteration nearest to the wanted one."""
    found = list(iterations)
    if not found:
        return "no iteration has one"
    return f"the nearest that has one is {min(found, key=lambda i: (abs(i - wanted), i))}"
