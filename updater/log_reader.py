# SPDX-License-Identifier: MIT
"""Reading the gradient log: what a segment holds up to its mark, and payloads whose checksums agreed.

Nothing here writes, so a log may be read while an updater appends to it: readers stop at the mark, below which nothing
changes any more. Whatever is not as it was written is a CheckpointError; nothing of such a record is returned.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowcheck.errors import CheckpointError
from updater import log_format as form
from updater.durable import io_errors

__all__ = ["Entry", "Segment", "read_facts", "read_index", "read_payload", "segment_paths"]

_NAME = re.compile(r"(\d{6})\.fclog")
#: A mark may be read while it is being written; a second look then finds it whole.
_MARK_READS = 100


def segment_paths(folder: Path) -> list[Path]:
    """Return the segments in a log folder, in order; CheckpointError if one is missing between two others."""
    found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []
    for number, path in enumerate(found, 1):
        if int(path.stem) != number:
            raise CheckpointError(
                f"{folder}: segment {number:06}.fclog is missing; restore it from a copy", str(folder)
            )
    return found


@dataclass(frozen=True)
class Entry:
    """Where a record lies: its header, its segment, and the offset of its first byte there."""

    header: form.RecordHeader
    segment: Path
    offset: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the record."""
        return self.offset + form.record_bytes(self.header.payload_bytes)


class Segment:
    """One segment, open for reading; `committed_end` and `records` are its mark. Use as a context manager."""

    def __init__(self, path: Path, identity: bytes) -> None:
        self.path = path
        with io_errors("read", path):
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = os.pread(self.fd, form.SEGMENT_HEADER_BYTES, 0)
            try:
                number, found = form.unpack_segment_header(header)
                self.committed_end, self.records = self._read_mark()
            except ValueError as error:
                raise self._error(str(error)) from error
            if number != int(path.stem):
                raise self._error(f"says that it is segment {number}")
            if found != identity:
                raise self._error("belongs to another run, or was made from another plan")
            self.file_bytes = os.fstat(self.fd).st_size
            if not form.SEGMENT_HEADER_BYTES <= self.committed_end <= self.file_bytes:
                raise self._error(f"{self.file_bytes} bytes long, but committed up to {self.committed_end}: it was cut")
        except BaseException:
            os.close(self.fd)
            raise

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {what}; run 'flowcheck verify', restore the file from a copy", str(self.path)
        )

    def _read_mark(self) -> tuple[int, int]:
        for _ in range(_MARK_READS - 1):
            try:
                return form.unpack_mark(os.pread(self.fd, form.MARK_BYTES, form.MARK_OFFSET))
            except ValueError:
                continue
        return form.unpack_mark(os.pread(self.fd, form.MARK_BYTES, form.MARK_OFFSET))

    def entry_at(self, offset: int) -> Entry:
        """Return the record whose header is at an offset; ValueError if none is there, or it ends after the file."""
        header = os.pread(self.fd, form.RECORD_HEADER_BYTES, offset)
        if len(header) < form.RECORD_HEADER_BYTES:
            raise ValueError(f"the file ends in the record header at byte {offset}")
        entry = Entry(form.RecordHeader.unpack(header), self.path, offset)
        if entry.end > self.file_bytes:
            raise ValueError(f"the file ends in the record at byte {offset}")
        return entry

    def entries(self) -> Iterator[Entry]:
        """Yield the committed records in order, by their headers; CheckpointError where they do not add up."""
        offset, records = form.SEGMENT_HEADER_BYTES, 0
        while offset < self.committed_end:
            try:
                entry = self.entry_at(offset)
            except ValueError as error:
                raise self._error(f"{error} (at byte {offset})") from error
            yield entry
            offset, records = entry.end, records + 1
        if (offset, records) != (self.committed_end, self.records):
            raise self._error(
                f"{records} records up to byte {offset}, the mark says {self.records} to {self.committed_end}"
            )

    def payload(self, entry: Entry, parts: Sequence[np.ndarray]) -> None:
        """Read a record's payload into contiguous uint8 arrays, as many bytes as it has; CheckpointError if it is not right."""
        size = entry.header.payload_bytes
        if sum(part.size for part in parts) != size:
            raise self._error(
                f"iteration {entry.header.iteration} has {size} bytes, the plan expects {sum(p.size for p in parts)}"
            )
        at = entry.offset + form.RECORD_HEADER_BYTES
        table = os.pread(self.fd, form.table_bytes(size), at)
        at += len(table)
        for part in parts:
            view = memoryview(part)
            while view.nbytes and (count := os.preadv(self.fd, [view], at)):
                view, at = view[count:], at + count
        padding = os.pread(self.fd, entry.end - at, at)
        if (
            form.block_checksums(parts) != (table, entry.header.checksum)
            or any(padding)
            or at + len(padding) != entry.end
        ):
            raise self._error(
                f"checksum of the record of iteration {entry.header.iteration} (byte {entry.offset}) is wrong"
            )

    def close(self) -> None:
        """Close the file; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_index(folder: Path, identity: bytes) -> Iterator[Entry]:
    """Yield every committed record of a log, in order, by the headers alone.

    Raises:
        CheckpointError: a segment cannot be understood, or the iterations do not follow each other.
    """
    expected = None
    for path in segment_paths(folder):
        with Segment(path, identity) as segment:
            for entry in segment.entries():
                iteration = entry.header.iteration
                if iteration != (min(iteration, 1) if expected is None else expected):
                    what = f"the record at byte {entry.offset} is of iteration {iteration}, expected {expected or 1}"
                    raise CheckpointError(f"{path}: {what}; restore the file from a copy", str(path))
                yield entry
                expected = iteration + 1 if entry.header.kind in form.DECIDED else iteration


def read_payload(entry: Entry, identity: bytes, parts: Sequence[np.ndarray]) -> None:
    """Read one record's payload into arrays, as `Segment.payload` does."""
    with Segment(entry.segment, identity) as segment:
        segment.payload(entry, parts)


def read_facts(entry: Entry, identity: bytes) -> dict:
    """Return what a record without a gradient says: of an incomplete iteration, or of an audit."""
    payload = np.empty(entry.header.payload_bytes, np.uint8)
    read_payload(entry, identity, [payload])
    return json.loads(payload.tobytes())
