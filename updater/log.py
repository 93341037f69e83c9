# SPDX-License-Identifier: MIT
"""Writing the gradient log: append, sync, mark; and cutting off what a crash left half written.

A record is committed once `append` has returned: its bytes are synced, then the segment's mark moves behind them. The
mark itself needs no sync of its own: on disk it may only lag, and a whole record behind it counts as committed when the
log is opened next. A record below the mark that is not whole is no torn tail but a corrupt file, and is refused.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowcheck.errors import CheckpointError
from updater import durable
from updater import log_format as form
from updater.durable import TEMPORARY_SUFFIX, io_errors, publish, write_all
from updater.log_reader import Segment, read_index, segment_paths

__all__ = ["SEGMENT_BYTES", "LogWriter"]

#: A segment that has grown to this is closed at the next record.
SEGMENT_BYTES = 64 << 20


class LogWriter:
    """The log of one directory, open for appending: open -> append ... -> close; one thread, one process.

    The caller holds the directory's lock. `next_iteration` is the iteration after the last one in the log, None if there is
    none.
    """

    def __init__(self, folder: Path, identity: bytes, *, closed: set[str], segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the log in `folder`, cutting a torn tail; `closed` names the segments that must not change."""
        self.folder, self.identity, self.segment_bytes = folder, identity, segment_bytes
        self.written_bytes = 0
        self._fd = -1
        self._end = self._records = self._number = 0
        paths = segment_paths(folder)
        if paths:
            self._number = int(paths[-1].stem)
            if paths[-1].name not in closed:
                self._recover(paths[-1])
        self.next_iteration: int | None = None
        for entry in read_index(folder, identity):
            if entry.header.kind in form.DECIDED:
                self.next_iteration = entry.header.iteration + 1

    @property
    def open_segment(self) -> str | None:
        """Name of the segment that is being written; None if a record would begin a new one."""
        return f"{self._number:06}.fclog" if self._fd >= 0 else None

    def _recover(self, path: Path) -> None:
        """Take over an open segment: whole records behind the mark stay and are synced, the rest is cut off."""
        with Segment(path, self.identity) as segment:
            end, records = segment.committed_end, segment.records
            while end < segment.file_bytes:
                try:
                    entry = segment.entry_at(end)
                    segment.payload(entry, [np.empty(entry.header.payload_bytes, np.uint8)])
                except (ValueError, CheckpointError):
                    break
                end, records = entry.end, records + 1
        with io_errors("repair", path):
            self._fd = durable.disk.open(path)
            durable.disk.truncate(self._fd, end)
            durable.disk.sync(self._fd)
            self._mark(end, records)

    def _mark(self, end: int, records: int) -> None:
        write_all(self._fd, [form.pack_mark(end, records)], form.MARK_OFFSET)
        self._end, self._records = end, records

    def _begin_segment(self) -> None:
        number = self._number + 1
        path = self.folder / f"{number:06}.fclog"
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        header = form.pack_segment_header(number, self.identity, time.time_ns())
        with io_errors("begin a segment", path):
            fd = durable.disk.create(temporary)
            try:
                write_all(fd, [header], 0)
                durable.disk.sync(fd)
                publish(temporary, path)
            except OSError:
                durable.disk.close(fd)
                with contextlib.suppress(OSError):
                    durable.disk.unlink(temporary)
                raise
        self._fd, self._number, self._end, self._records = fd, number, len(header), 0

    def append(self, kind: int, attempt: int, iteration: int, revision: int, parts: Sequence[np.ndarray]) -> int:
        """Append one record, its payload given as contiguous uint8 arrays; committed when this returns.

        Returns:
            The checksum of the payload.

        Raises:
            FlowCheckError: the disk refused; nothing of the record stays, what was committed before does.
        """
        if self._fd >= 0 and self._end >= self.segment_bytes and self._records:
            self.close()
        if self._fd < 0:
            self._begin_segment()
        size = sum(part.size for part in parts)
        table, checksum = form.block_checksums(parts)
        header = form.RecordHeader(kind, attempt, iteration, revision, size, time.time_ns(), checksum).pack()
        padding = bytes(-size % form.ALIGNMENT)
        path = self.folder / f"{self._number:06}.fclog"
        with io_errors(f"append iteration {iteration}", path):
            try:
                written = write_all(self._fd, [header, table, *map(memoryview, parts), padding], self._end)
                durable.disk.datasync(self._fd)
            except OSError:
                # A failed sync is not retried on the same pages: they go, and with them what may look whole later.
                with contextlib.suppress(OSError):
                    durable.disk.truncate(self._fd, self._end)
                raise
            self._mark(self._end + written, self._records + 1)
        if kind in form.DECIDED:
            self.next_iteration = iteration + 1
        self.written_bytes += written
        return checksum

    def append_facts(self, kind: int, attempt: int, iteration: int, revision: int, facts: dict) -> None:
        """Append a record without a gradient: of an iteration that was declared incomplete, or of an audit."""
        payload = np.frombuffer(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode(), np.uint8)
        self.append(kind, attempt, iteration, revision, [payload])

    def close(self) -> str | None:
        """Sync and close the open segment, which will not change again; returns its name, None if none is open."""
        name = self.open_segment
        if self._fd >= 0:
            with io_errors("sync", self.folder / str(name)):
                durable.disk.sync(self._fd)
            durable.disk.close(self._fd)
            self._fd = -1
        return name
