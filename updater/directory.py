# SPDX-License-Identifier: MIT
"""A checkpoint directory as readers see it: manifest, plan, log index and the state of every iteration.

Opening it imports neither torch nor h5py, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from flowcheck import plan as plans
from flowcheck.errors import CheckpointError, RestoreError
from flowcheck.plan import Plan, Revision
from updater.log_format import ALARM, AUDITED, DECIDED, DIVERGED, GRADIENT, MEASURED
from updater.log_reader import Entry, read_facts, read_index, read_payload
from updater.manifest import LOG_FOLDER, PLAN_NAME, Manifest

__all__ = ["Directory", "bucket_views", "payload_views", "record_of", "states"]


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


def states(index: Iterable[Entry], snapshots: list[int], *, has_model: bool) -> Iterator[tuple[Entry, str]]:
    """Yield each logged iteration with its state, given the iterations of which there are snapshots, ascending.

    A snapshot that the log does not lead to is a base: what was whole before it and never committed is superseded, what
    follows it is committed. Where an audit found that the state is no rank's, the same holds from there on. What the wire
    brings as iteration 0 is the initial state, and no iteration of its own: it is left out.
    """
    bases = iter(snapshots)
    reached, base = None, next(bases, None)
    for entry in index:
        iteration = entry.header.iteration
        if iteration == 0:
            continue
        while base is not None and base < iteration:
            reached, base = base if reached is None else max(reached, base), next(bases, None)
        if entry.header.kind == DIVERGED:
            reached = None
        if entry.header.kind not in DECIDED:
            continue
        if entry.header.kind != GRADIENT:
            yield entry, "incomplete"
        elif not has_model:
            yield entry, "whole"
        elif reached is not None and iteration == reached + 1:
            reached = iteration
            yield entry, "committed"
        else:
            yield entry, "waiting" if base is None else "superseded"


class Directory:
    """A checkpoint directory, open for reading; nothing of it is loaded before its checksum agreed."""

    def __init__(self, path: str | Path) -> None:
        """Read the manifest; CheckpointError if the directory is none, or is corrupt."""
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)

    @cached_property
    def plan(self) -> Plan:
        """The job plan; CheckpointError if its file is not as it was written."""
        path = self.manifest.check(PLAN_NAME)
        plan = plans.load(path)
        if plan.identity() != self.manifest.identity:
            raise CheckpointError(
                f"{path}: is not the plan that the manifest was made from; restore both from one copy", str(path)
            )
        return plan

    @cached_property
    def _index(self) -> list[Entry]:
        """Every record of the log, in order."""
        return list(read_index(self.path / LOG_FOLDER, self.manifest.identity))

    @cached_property
    def entries(self) -> dict[int, tuple[Entry, str]]:
        """Each logged iteration from 1 on: its record and its state."""
        listed = states(self._index, self.manifest.snapshots, has_model=self.manifest.has_model)
        return {entry.header.iteration: (entry, state) for entry, state in listed}

    @cached_property
    def audits(self) -> tuple[int | None, list[dict]]:
        """Up to which iteration the states were audited and found right, None if none was; and every alarm.

        An alarm: `iteration` whose record showed it, `audited_to` before, `tensors` of the group, `rank` (None: all, or
        several), and whether the `shadow` has another state than the trainers.
        """
        audited_to, alarms = None, []
        for entry in self._index:
            if entry.header.kind in (ALARM, DIVERGED):
                rows = read_facts(entry, self.manifest.identity)["alarms"]
                known = {"iteration": entry.header.iteration, "audited_to": audited_to}
                alarms += [{**known, **row, "shadow": entry.header.kind == DIVERGED} for row in rows]
            if entry.header.kind in (AUDITED, ALARM):
                audited_to = entry.header.iteration - 1
        return audited_to, alarms

    @cached_property
    def distances(self) -> list[dict]:
        """How far a state that is not bit exact was from the trainer's at each base: `at`, `max_ulp`, `tensor`, `over_limit`."""
        return [read_facts(entry, self.manifest.identity) for entry in self._index if entry.header.kind == MEASURED]

    @property
    def restorable(self) -> list[int]:
        """Iterations that a state can be restored of, ascending."""
        return sorted(
            {i for i, (_, state) in self.entries.items() if state == "committed"} | set(self.manifest.snapshots)
        )

    def slot(self, iteration: int) -> tuple[np.ndarray, Revision]:
        """Return a logged iteration's gradient as slot data (buckets on their boundaries), and its revision.

        Raises:
            RestoreError: the iteration is not in the log, or incomplete there.
            CheckpointError: a checksum of its record is wrong.
        """
        entry, state = self.entries.get(iteration, (None, "not in the log"))
        if entry is None or state == "incomplete":
            whole = [i for i, (_, s) in self.entries.items() if s != "incomplete"]
            raise RestoreError(
                f"{self.path}: the gradient of iteration {iteration} is {state}; {nearest(whole, iteration)}"
            )
        revision = self.plan.revision(iteration)
        slot = np.zeros(self.plan.slot_bytes, np.uint8)
        read_payload(entry, self.manifest.identity, payload_views(slot, self.plan, revision))
        return slot, revision


def nearest(iterations: list[int], wanted: int) -> str:
    """Return the words that name the iteration nearest to the wanted one."""
    if not iterations:
        return "no iteration has one"
    return f"the nearest that has one is {min(iterations, key=lambda i: (abs(i - wanted), i))}"
