# SPDX-License-Identifier: MIT
"""Writing the gradient log: append, commit, mark; and cutting off what a crash left half written.

Records are committed together: `append` writes, `commit` syncs what was appended and then moves the segment's mark behind
it. The mark needs no sync of its own: on disk it may lag, or be torn, where the one before stays; and a whole record behind
it counts as committed when the log is opened next. A record below the mark that is not whole is no torn tail but a corrupt
file, and is refused.

A segment whose sync failed is never written again: its pages may be gone from memory, and a later sync would not say so.
What it was to hold goes once more, from memory, into a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from updater import durable
from updater import log_format as form
from updater.durable import TEMPORARY_SUFFIX, io_errors, publish, write_all
from updater.log_reader import Entry, Segment, read_facts, segment_name, segment_numbers

__all__ = ["SEGMENT_BYTES", "Closed", "LogWriter", "recover"]

#: A segment that has grown to this is closed at the next record.
SEGMENT_BYTES = 64 << 20
_COPIED_BYTES = 4 << 20


def recover(folder: Path, identities: Collection[bytes], closed_to: int) -> list[str]:
    """Make the segments behind the closed ones what they count as from now on; return their names, oldest first.

    Whole records behind a mark stay and are synced, what else lies there is cut off. Where a sync had failed, the same
    records lie behind one segment's mark and at the start of the next: the later ones count, and so does a note that says that
    they were not logged.

    Raises:
        CheckpointError: a segment is corrupt below its mark.
    """
    numbers = [number for number in segment_numbers(folder) if number > closed_to]
    following: dict[int, int | None] = {}
    known: int | None = None
    for number in reversed(numbers):
        following[number] = known
        with Segment(folder / segment_name(number), identities) as segment:
            for entry in (*segment.entries(), *segment.uncommitted()):
                if entry.header.kind == form.VOLATILE:
                    known = read_facts(entry, identities)["from"]
                elif entry.header.kind in form.DECIDED:
                    known = entry.header.iteration
                else:
                    continue
                break
    for number in numbers:
        _recover(folder / segment_name(number), identities, following[number])
    return [segment_name(number) for number in numbers]


def _recover(path: Path, identities: Collection[bytes], limit: int | None) -> None:
    with Segment(path, identities) as segment:
        end, records, version = segment.committed_end, segment.records, segment.version
        for entry in segment.uncommitted():
            if limit is not None and entry.header.iteration >= limit:
                break
            end, records = entry.end, records + 1
    with io_errors("repair", path):
        fd = durable.disk.open(path)
        try:
            durable.disk.truncate(fd, end)
            mark = form.pack_mark(end, records)
            write_all(fd, [mark, mark if version > 1 else b""], form.MARK_OFFSETS[0])
            durable.disk.sync(fd)
        finally:
            durable.disk.close(fd)


@dataclass(frozen=True)
class Closed:
    """A segment that is not written any more; unless it is `sound`, a sync of it failed."""

    name: str
    end: int  # of its committed records, in bytes
    records: int
    sound: bool

    def mend(self, folder: Path, identities: Collection[bytes]) -> None:
        """Put a file of fresh pages in its place, with what is committed; FlowCheckError if the disk refuses that, too."""
        path = folder / self.name
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        with Segment(path, identities) as segment, io_errors("mend", path):
            fd = durable.disk.create(temporary)
            try:
                header = bytearray(os.pread(segment.fd, form.SEGMENT_HEADER_BYTES, 0))
                marks = 2 * form.pack_mark(self.end, self.records)
                header[form.MARK_OFFSETS[0] : form.MARK_OFFSETS[0] + len(marks)] = marks
                write_all(fd, [header], 0)
                for at in range(len(header), self.end, _COPIED_BYTES):
                    write_all(fd, [os.pread(segment.fd, min(_COPIED_BYTES, self.end - at), at)], at)
                durable.disk.sync(fd)
                with Segment(temporary, identities) as copy:
                    for entry in copy.entries():
                        copy.payload(entry, [np.empty(entry.header.payload_bytes, np.uint8)])
                publish(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    durable.disk.unlink(temporary)
                raise
            finally:
                durable.disk.close(fd)


@dataclass(frozen=True)
class _Pending:
    """A record that is written but not synced: enough to write it once more elsewhere."""

    header: form.RecordHeader
    pieces: list[memoryview | bytes]


class LogWriter:
    """The log of one attempt, open for appending: open -> append ... commit ... -> close; one thread, one process.

    The caller holds the directory's lock. `closed` lists the segments that were closed and that the manifest does not
    have yet: the caller takes them out, mended unless they are sound.
    """

    def __init__(self, folder: Path, identity: bytes, last: int, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Go on after segment number `last`, in a new one."""
        self.folder, self.identity, self.segment_bytes = folder, identity, segment_bytes
        self.written_bytes = 0
        self.closed: list[Closed] = []
        self._fd = -1
        self._number, self._end, self._records = last, 0, 0
        self._turn = 0
        self._pending: list[_Pending] = []
        self._entries: list[Entry] = []

    def _path(self) -> Path:
        return self.folder / segment_name(self._number)

    def _mark(self) -> None:
        self._turn = 1 - self._turn
        write_all(self._fd, [form.pack_mark(self._end, self._records)], form.MARK_OFFSETS[self._turn])

    def _begin_segment(self) -> None:
        number = self._number + 1
        path = self.folder / segment_name(number)
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        header = form.pack_segment_header(number, self.identity, time.time_ns())
        fd = durable.disk.create(temporary)
        try:
            write_all(fd, [header], 0)
            durable.disk.sync(fd)
            publish(temporary, path)
        except OSError:
            durable.disk.close(fd)
            for name in (temporary, path):
                with contextlib.suppress(OSError):
                    durable.disk.unlink(name)
            raise
        self._fd, self._number, self._end, self._records = fd, number, len(header), 0

    def append(
        self, kind: int, attempt: int, iteration: int, revision: int, parts: Sequence[np.ndarray], *,
        packed: Sequence[tuple[int, bytes | None]] | None = None,
    ) -> None:  # fmt: skip
        """Append one record, its payload given as contiguous uint8 arrays; it counts once `commit` has returned.

        The arrays must not change before that. `packed`, one per block: its CRC32C, and the block packed, None where it is better stored
        as it is.

        Raises:
            FlowCheckError: the disk refused; nothing of the record stays, what was appended before does.
        """
        size = sum(part.size for part in parts)
        if packed is None:
            encoding, rows = form.PLAIN, [form.checksum_of(block) for block in form.blocks(parts)]
            stored, pieces = size, [memoryview(part) for part in parts]
        else:
            encoding, rows, stored, pieces = form.PACKED, [], 0, []
            for block, (checksum, content) in zip(form.blocks(parts), packed, strict=True):
                views = [memoryview(piece) for piece in block] if content is None else [content]
                room = sum(len(view) for view in views)
                rows.append((checksum, room, checksum if content is None else form.crc32c(content)))
                pieces, stored = pieces + views, stored + room
        table = form.pack_table(rows, encoding)
        header = form.RecordHeader(
            kind, attempt, iteration, revision, size, time.time_ns(), form.crc32c(table), encoding, stored
        )
        record = _Pending(header, [header.pack(), table, *pieces, bytes(-stored % form.ALIGNMENT)])
        with io_errors(f"append iteration {iteration}", self._path()):
            if self._fd >= 0 and self._end >= self.segment_bytes and self._records and not self._pending:
                self._close()
            if self._fd < 0:
                self._begin_segment()
            self._write(record)

    def _write(self, record: _Pending) -> None:
        try:
            written = write_all(self._fd, record.pieces, self._end)
        except OSError:
            with contextlib.suppress(OSError):
                durable.disk.truncate(self._fd, self._end)
            raise
        self._pending.append(record)
        self._entries.append(Entry(record.header, self._path(), self._end))
        self._end, self._records = self._end + written, self._records + 1
        self.written_bytes += written

    def note(self, kind: int, attempt: int, iteration: int, revision: int, facts: dict) -> None:
        """Append a record without a gradient: of an iteration that was declared incomplete, or of an audit."""
        payload = np.frombuffer(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode(), np.uint8)
        self.append(kind, attempt, iteration, revision, [payload])

    def commit(self) -> list[Entry]:
        """Make what was appended durable, and return it; committed when this returns.

        Raises:
            FlowCheckError: the disk refused, in a second segment too; nothing of what was appended since the last commit stays.
        """
        pending = self._pending
        if not pending:
            return []
        with io_errors("sync", self._path()):
            try:
                self._sync()
            except OSError:
                self._abandon()
                try:
                    self._begin_segment()
                    for record in pending:
                        self._write(record)
                    self._sync()
                except OSError:
                    self._abandon()
                    raise
        entries, self._entries = self._entries, []
        return entries

    def _sync(self) -> None:
        durable.disk.datasync(self._fd)
        self._mark()
        self._pending = []

    def _take_back(self) -> None:
        """Cut off what was appended and is not committed."""
        pending, self._pending, self._entries = self._pending, [], []
        self._records -= len(pending)
        self._end -= sum(len(piece) for record in pending for piece in record.pieces)
        with contextlib.suppress(OSError):
            durable.disk.truncate(self._fd, self._end)

    def _abandon(self) -> None:
        """Leave a segment whose sync failed, without what is not committed: it is not written again."""
        if self._fd < 0:
            return
        self._take_back()
        durable.disk.close(self._fd)
        self._fd = -1
        self.closed.append(Closed(segment_name(self._number), self._end, self._records, sound=False))

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        sound = False
        try:
            write_all(fd, [2 * form.pack_mark(self._end, self._records)], form.MARK_OFFSETS[0])
            durable.disk.sync(fd)
            sound = True
        finally:
            durable.disk.close(fd)
            self.closed.append(Closed(segment_name(self._number), self._end, self._records, sound))

    def rotate(self) -> None:
        """Sync and close the open segment, if one is: it will not change again. Nothing may be uncommitted."""
        if self._fd < 0:
            return
        with io_errors("sync", self._path()):
            self._close()

    def close(self) -> None:
        """End: what was not committed goes; may be called again."""
        if self._pending:
            self._take_back()
        self.rotate()
