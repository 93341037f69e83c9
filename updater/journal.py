# SPDX-License-Identifier: MIT
"""The log of one attempt, and what belongs to it: mending what a crash left, packing payloads, publishing what is closed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flowcheck.errors import CheckpointError, DiskError
from flowcheck.plan import DTYPE_BYTES, Plan
from updater import log_format as form
from updater.compression import Judge, compress
from updater.decision import Decision
from updater.directory import segments
from updater.log import Closed, LogWriter, recover
from updater.log_reader import Entry, Segment, segment_name
from updater.manifest import LOG_FOLDER, Manifest

__all__ = ["Journal"]

_log = logging.getLogger(__name__)
#: Seconds until a manifest that could not be written is tried again.
_RETRY_S = 1.0


class Journal:
    """A log that is appended to: open -> append, note -> commit -> ... -> close. One thread.

    Attributes:
        next: the iteration after the last one that the log says anything of; None if it says nothing yet.
    """

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, plan: Plan, segment_bytes: int) -> tuple[Journal, list[Entry]]:
        """Mend the log and go on with it; return it, and what `entries` gives. CheckpointError if what was committed is corrupt."""
        journal = cls(folder, manifest, plan, segment_bytes)
        entries = journal.entries()
        for entry in entries:
            if entry.header.kind in form.DECIDED:
                journal.next = entry.header.iteration + 1
            elif entry.header.kind == form.VOLATILE:
                journal.next = max(journal.next or 0, entry.header.iteration)
        return journal, entries

    def __init__(self, folder: Path, manifest: Manifest, plan: Plan, segment_bytes: int) -> None:
        """Mend the log; `open` is the way to make one."""
        self._folder, self._manifest, self._plan = folder / LOG_FOLDER, manifest, plan
        recovered = recover(self._folder, manifest.identities, manifest.closed_to)
        last = max(segments(manifest), default=manifest.closed_to)
        self._log = LogWriter(self._folder, plan.identity(), max(last, manifest.closed_to), segment_bytes=segment_bytes)
        self._log.closed += [Closed(name, 0, 0, sound=True) for name in recovered]
        self._judge = Judge() if plan.checkpoints.compress else None
        self._raw = 0
        self._pack_s = self._write_s = 0.0
        self._unstored, self._publish_at = False, 0.0
        self.publish()
        self.next: int | None = None

    def entries(self) -> list[Entry]:
        """Return every record of the attempt, in order, by the headers alone."""
        found: list[Entry] = []
        for number in segments(self._manifest):
            with Segment(self._folder / segment_name(number), self._manifest.identities) as segment:
                if segment.identity == self._log.identity:
                    found += segment.entries()
        return found

    @property
    def written_bytes(self) -> int:
        """Bytes that were written to the log."""
        return self._log.written_bytes

    def append(self, decision: Decision) -> None:
        """Append an iteration; its arrays must not change before `commit`. DiskError as `LogWriter.append`."""
        if decision.sources and any(decision.sources):
            self.note(form.SOURCES, decision.iteration, decision.number, {"bytes": decision.sources})
        if not decision.whole:
            self.note(form.INCOMPLETE, decision.iteration, decision.number, decision.facts)
            return
        packed = None
        began = time.perf_counter()
        if self._judge is not None and self._judge.worth():
            width = DTYPE_BYTES[decision.revision.buckets[0].dtype]
            packed = [
                (form.checksum_of(block), compress(form.joined(block), width)) for block in form.blocks(decision.parts)
            ]
            self._pack_s += time.perf_counter() - began
            began = time.perf_counter()
        attempt = self._plan.job.attempt
        self._log.append(form.GRADIENT, attempt, decision.iteration, decision.number, decision.parts, packed=packed)
        self._write_s += time.perf_counter() - began
        self._raw += sum(part.size for part in decision.parts)

    def note(self, kind: int, iteration: int, revision: int, facts: dict) -> None:
        """Append a record that is no gradient; DiskError as `LogWriter.append`."""
        self._log.note(kind, self._plan.job.attempt, iteration, revision, facts)

    def note_unlogged(self, to: int, state: str, reason: str) -> None:
        """Note, durably, that the iterations up to `to` are not in the log, and as what they count; DiskError if it cannot be."""
        first = self._plan.first_step if self.next is None else self.next
        self._log.rotate()
        self.note(form.VOLATILE, to + 1, 0, {"from": first, "to": to, "state": state, "reason": reason})
        self.commit()
        self.next = to + 1

    def commit(self) -> dict[int, Entry]:
        """Make durable what was appended; return the iterations' records. DiskError: nothing of it stays."""
        began, before = time.perf_counter(), self._log.written_bytes
        try:
            entries = self._log.commit()
            self._write_s += time.perf_counter() - began
            stored = sum(entry.header.room for entry in entries)
            if self._judge is not None and self._raw and self._log.written_bytes == before:
                self._judge.note(self._raw, stored, self._pack_s, self._write_s)
        finally:
            self._raw, self._pack_s, self._write_s = 0, 0.0, 0.0
        decided = {entry.header.iteration: entry for entry in entries if entry.header.kind in form.DECIDED}
        if decided:
            self.next = max(decided) + 1
        return decided

    def compare(self, prior: Entry, decision: Decision) -> None:
        """Hold a slot against the record that an earlier start wrote; CheckpointError if it brings another gradient."""
        if not decision.whole or prior.header.kind != form.GRADIENT:
            return
        with Segment(prior.segment, self._manifest.identities) as segment:
            known = segment.checksums(prior)
        if [form.checksum_of(block) for block in form.blocks(decision.parts)] != known:
            raise CheckpointError(
                f"{prior.segment}: iteration {prior.header.iteration} is in the log with another gradient than the wire now gives; "
                "use another directory for another run",
                str(prior.segment),
            )

    def rotate(self) -> None:
        """Begin a new segment with the next record, so that the log can be removed up to here."""
        try:
            self._log.rotate()
        except DiskError as error:
            _log.warning("%s", error)
        self.publish()

    def publish(self) -> None:
        """Take the segments that will not change again into the manifest; what the disk refuses is tried again."""
        if time.monotonic() < self._publish_at:
            return
        try:
            while self._log.closed:
                closed = self._log.closed[0]
                if not closed.sound:
                    closed.mend(self._folder, self._manifest.identities)
                self._manifest.add(f"{LOG_FOLDER}/{closed.name}")
                del self._log.closed[0]
                self._unstored = True
            if self._unstored:
                self._manifest.store()
                self._unstored = False
        except DiskError as error:
            self._publish_at = time.monotonic() + _RETRY_S
            _log.info("not published yet: %s", error)

    def close(self) -> None:
        """End: what was not committed goes, what is closed is published if the disk takes it; may be called again."""
        self._log.close()
        self._publish_at = 0.0
        self.publish()
