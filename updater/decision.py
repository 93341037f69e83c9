# SPDX-License-Identifier: MIT
"""What the slots say of an iteration that is settled: whole, and how it was stepped; or incomplete, and why.

Reads slots and step records, changes nothing, knows neither log nor state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flowcheck.errors import CheckpointError
from flowcheck.layout import mirrored_ranges
from flowcheck.plan import Plan, Revision
from flowcheck.step_record import RecordError, Step
from updater.directory import payload_views

__all__ = ["Decision", "Decisions", "Slots"]

_log = logging.getLogger(__name__)
#: fc_slot.state and fc_slot.reason (flowcheck/_formats.pxd).
_SLOT_WHOLE = 2
_REASONS = {1: "missing", 2: "conflict", 3: "end_of_stream"}


class Slots(Protocol):
    """What the updater needs of a slot file (`flowcheck.slots.SlotFile`)."""

    settled_next: int
    consumed_next: int
    ended: int
    volatile_from: int
    skipped: tuple[int, int]

    def gradient(self, iteration: int) -> np.ndarray:
        """Return the slot data of an iteration, writable uint8."""

    def slot(self, iteration: int) -> np.void:
        """Return the record of its slot."""

    def missing(self, iteration: int) -> list[tuple[int, int]]:
        """Return the ranges of slot bytes that are missing."""


@dataclass(frozen=True)
class Decision:
    """One iteration: its slot data and what is to be logged of it.

    Attributes:
        iteration: which.
        revision: its buckets; `number` is their index in the plan.
        data: the slot data.
        parts: what the log keeps of a whole iteration: views of the slot data, and the step record.
        step: what the record says of the step; None without one.
        facts: why it is incomplete; None if it is whole.
        sources: how many bytes came over no, one, two, three or more edges; None where the plan mirrors only one.
    """

    iteration: int
    number: int
    revision: Revision
    data: np.ndarray
    parts: list[np.ndarray]
    step: Step | None
    facts: dict | None
    sources: list[int] | None = None

    @property
    def whole(self) -> bool:
        """Whether it can be stepped."""
        return self.facts is None


class Decisions:
    """Reads settled iterations out of slots; one thread.

    Args:
        plan: the job plan.
        slots: the slots.
        non_finite: whether a gradient (slot data, revision) has what makes a GradScaler skip a step; None without a model.
    """

    def __init__(
        self, plan: Plan, slots: Slots, non_finite: Callable[[np.ndarray, Revision], bool] | None = None
    ) -> None:
        self.plan, self.slots, self._non_finite = plan, slots, non_finite
        self._several_edges = len(plan.shard.mirrored_edges) > 1

    def record(self, iteration: int) -> np.void:
        """Return the record of a settled iteration's slot; CheckpointError if it is another's."""
        record = self.slots.slot(iteration)
        if int(record["iteration"]) != iteration:
            raise CheckpointError(
                f"the slot of iteration {iteration} holds {record['iteration']}; begin the slot file anew"
            )
        return record

    def skipped_to(self, iteration: int) -> int:
        """Return the first iteration after those that were settled together with this one, since nothing of them came; 0: it was not."""
        first, end = self.slots.skipped
        return end if first <= iteration < end else 0

    def is_whole(self, iteration: int) -> bool:
        """Return whether every byte of a settled iteration is there."""
        return int(self.record(iteration)["state"]) == _SLOT_WHOLE

    def awaits_record(self, iteration: int) -> bool:
        """Whether the iteration after it, which repeats the record that this one lacks, is yet to be settled."""
        if iteration == 0 or self.plan.record_form is None or self.slots.ended or self.is_whole(iteration):
            return False
        return iteration + 1 >= self.slots.settled_next and self._lacks_record_only(iteration)

    def decide(self, iteration: int) -> Decision:
        """Return what is to be logged of a settled iteration (from 1)."""
        whole = self.is_whole(iteration)
        revision = self.plan.revision(iteration)
        number = self.plan.shard.revisions.index(revision)
        data = self.slots.gradient(iteration)
        parts, step, problem = payload_views(data, self.plan, revision), None, None
        if self.plan.record_form is not None and (whole or self._lacks_record_only(iteration)):
            parts[-1], step, problem = self._said(iteration, revision, whole)
            whole = problem is None
        facts = None if whole else self.incomplete(iteration, revision.gradient_bytes, problem)
        sources = self.slots.slot(iteration)["source_bytes"].tolist() if self._several_edges else None
        return Decision(iteration, number, revision, data, parts, step, facts, sources)

    def _lacks_record_only(self, iteration: int) -> bool:
        """Whether every byte of an iteration's gradient is there, and only its step record is not whole."""
        if int(self.slots.slot(iteration)["conflicts"]):
            return False
        begin, _ = self.plan.record_range(self.plan.revision(iteration))
        return all(low >= begin for low, _ in self.slots.missing(iteration))

    def _said(self, iteration: int, revision: Revision, whole: bool) -> tuple[np.ndarray, Step | None, str | None]:
        """Return the bytes of an iteration's step record, what it says, and why the iteration cannot be committed by it."""
        form = self.plan.record_form
        begin, end = self.plan.record_range(revision)
        record = self.slots.gradient(iteration)[begin:end].view("<f4")
        try:
            if not whole:
                record = self._repeated(iteration)
            step = form.read(record, iteration)
            if step.reductions != revision.reductions:
                raise RecordError(f"says {step.reductions} reductions, the plan {revision.reductions}")
        except RecordError as error:
            _log.warning("iteration %d: the step record %s", iteration, error)
            return record.view(np.uint8), None, "step_record"
        if self._non_finite is not None and step.scale is not None:
            if self._non_finite(self.slots.gradient(iteration), revision) != step.skipped:
                _log.warning("iteration %d: its record says skipped %s, its gradient not", iteration, step.skipped)
                return record.view(np.uint8), None, "conflict"
        return record.view(np.uint8), step, None

    def _repeated(self, iteration: int) -> np.ndarray:
        """Return a record of what the next iteration's repeats of this one's; RecordError if that is not there either."""
        form, following = self.plan.record_form, iteration + 1
        if following >= self.slots.settled_next:
            raise RecordError("was lost, and no iteration follows")
        if self.skipped_to(following):
            raise RecordError("was lost, and so was its repetition")
        begin, _ = self.plan.record_range(self.plan.revision(following))
        low, high = begin + 4 * form.words, begin + 8 * form.words
        if any(first < high and last > low for first, last in self.slots.missing(following)):
            raise RecordError("was lost, and so was its repetition")
        record = np.zeros(form.elements, "<f4")
        record[: form.words] = self.slots.gradient(following)[low:high].view("<f4")
        return record

    def incomplete(self, iteration: int, size: int, problem: str | None = None) -> dict:
        """Return what is logged of an iteration of `size` bytes that cannot be committed."""
        missing = self.plan.flat_ranges(iteration, self.slots.missing(iteration))
        reason = _REASONS.get(int(self.slots.slot(iteration)["reason"]), "missing")
        return {
            "bytes": size,
            "placed_bytes": size - sum(end - begin for begin, end in missing),
            "missing": missing,
            "reason": problem or self._reason(iteration, missing, reason),
        }

    def _reason(self, iteration: int, missing: list[list[int]], reason: str) -> str:
        """Return why an iteration is incomplete; bytes that no mirrored connection carries could not come at all."""
        if iteration == 0 or not missing or reason == "conflict":
            return reason
        carried = mirrored_ranges(self.plan, iteration)
        could_come = any(begin < high and low < end for begin, end in missing for low, high in carried)
        return reason if could_come else "not_mirrored"
