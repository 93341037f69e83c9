# SPDX-License-Identifier: MIT
"""When snapshots are taken, and how each comes into the directory: written beside the updater, then published."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flowcheck.errors import FlowCheckError
from flowcheck.plan import Checkpoints
from updater import durable
from updater.durable import io_errors, publish
from updater.manifest import Manifest
from updater.snapshot_file import Written
from updater.snapshot_writer import SnapshotWriter

if TYPE_CHECKING:
    from flowcheck._copy import CopyEngine

    from updater.snapshot import State

__all__ = ["SnapshotSchedule"]

#: Seconds until a snapshot that could not be written is tried again.
_RETRY_S = 10.0


class SnapshotSchedule:
    """The snapshots of one attempt; used by one thread.

    Attributes:
        failed: snapshots that could not be written.
    """

    def __init__(self, manifest: Manifest, rules: Checkpoints, engine: CopyEngine) -> None:
        self._manifest, self._rules, self._engine = manifest, rules, engine
        self._writer = SnapshotWriter()
        self._writing: tuple[int, int] | None = None
        self._since = (0, time.monotonic(), 0)  # iteration, time and logged bytes at the last one
        self._retry_at: float | None = None  # when one is owed, because the last could not be written
        self.failed = 0
        self.engine_bytes = self.engine_failed = 0

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._writing is not None

    def begun(self, iteration: int, logged_bytes: int) -> None:
        """Count from here: there is, or is to be, a snapshot of this iteration."""
        self._since = iteration, time.monotonic(), logged_bytes

    def due(self, iteration: int, logged_bytes: int, state_bytes: int) -> bool:
        """Return whether a snapshot of the state after an iteration is to be begun now."""
        before, at, logged = self._since
        now, rules = time.monotonic(), self._rules
        if self.busy or (self._retry_at is not None and now < self._retry_at):
            return False
        if self._retry_at is not None:
            return True
        if iteration <= before:
            return False
        return (
            (rules.snapshot_iterations is not None and iteration - before >= rules.snapshot_iterations)
            or (rules.snapshot_seconds is not None and now - at >= rules.snapshot_seconds)
            or logged_bytes - logged >= rules.log_between_snapshots(state_bytes)
        )

    def _path(self, state: State) -> Path:
        return self._manifest.folder / self._manifest.snapshot_name(state.attempt, state.iteration)

    def begin(self, state: State, logged_bytes: int) -> None:
        """Have a snapshot written of a state, which may be stepped on as soon as this returns."""
        self.begun(state.iteration, logged_bytes)
        copied, failed = self._engine.engine_bytes, self._engine.engine_failed
        self._writer.start(self._path(state), state, self._engine)
        self.engine_bytes += self._engine.engine_bytes - copied
        self.engine_failed += self._engine.engine_failed - failed
        self._writing = state.attempt, state.iteration

    def poll(self, *, wait: bool = False) -> int | None:
        """Return the iteration of a snapshot that has just been published, None if none has.

        Raises:
            FlowCheckError: the one that was being written could not be; nothing of it stays.
        """
        if self._writing is None:
            return None
        try:
            written = self._writer.wait() if wait else self._writer.poll()
            if written is None:
                return None
            (attempt, iteration), self._writing = self._writing, None
            self._publish(written, self._manifest.snapshot_name(attempt, iteration))
            return iteration
        except FlowCheckError:
            self._writing = None
            self._missed()
            raise

    def _missed(self) -> None:
        self._retry_at = time.monotonic() + _RETRY_S
        self.failed += 1

    def publish_now(self, state: State, logged_bytes: int) -> None:
        """Publish a state before this returns, unless there is a snapshot of it; FlowCheckError if the disk refuses."""
        self.begun(state.iteration, logged_bytes)
        from updater.snapshot import write_now  # torch is loaded only for a plan with a model

        if (state.attempt, state.iteration) not in self._manifest.snapshots:
            path = self._path(state)
            try:
                self._publish(write_now(path, state), self._manifest.snapshot_name(state.attempt, state.iteration))
            except FlowCheckError:
                self._missed()
                raise

    def _publish(self, written: Written, name: str) -> None:
        final = self._manifest.folder / name
        with io_errors("publish", final):
            publish(written.path, final)
        self._manifest.add(name, (written.bytes, written.sha256))
        try:
            self._manifest.store()
        except FlowCheckError:
            self._manifest.remove(name)
            with contextlib.suppress(OSError):
                durable.disk.unlink(final)
            raise
        self._retry_at = None

    def close(self) -> None:
        """End; what is being written is left unfinished. May be called again."""
        self._writing = None
        self._writer.close()
