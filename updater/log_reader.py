# SPDX-License-Identifier: MIT
"""Reading the gradient log: what a segment holds up to its mark, and payloads whose checksums agreed.

Nothing here writes, so a log may be read while an updater appends to it: readers stop at the mark, below which nothing
changes any more. Whatever is not as it was written is a CheckpointError; nothing of such a record is returned.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowcheck.errors import CheckpointError
from updater import log_format as form
from updater.durable import io_errors

__all__ = ["Entry", "Segment", "read_facts", "read_payload", "segment_name", "segment_numbers"]

_NAME = re.compile(r"(\d{6})\.fclog")


def segment_name(number: int) -> str:
    """Return the file name of a segment."""
    return f"{number:06}.fclog"


def segment_numbers(folder: Path) -> list[int]:
    """Return the numbers of the segments that lie in a log folder, ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


@dataclass(frozen=True)
class Entry:
    """Where a record lies: its header, its segment, and the offset of its first byte there."""

    header: form.RecordHeader
    segment: Path
    offset: int

    @property
    def file(self) -> str:
        """Name of its segment in the directory, as the manifest has it."""
        return f"{self.segment.parent.name}/{self.segment.name}"

    @property
    def end(self) -> int:
        """Offset of the first byte after the record."""
        return self.offset + self.header.record_bytes


class Segment:
    """One segment, open for reading; `committed_end` and `records` are its mark. Use as a context manager."""

    def __init__(self, path: Path, identities: Collection[bytes]) -> None:
        """Open a segment; CheckpointError unless its header is whole and its identity one of those."""
        self.path = path
        with io_errors("read", path):
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = os.pread(self.fd, form.SEGMENT_HEADER_BYTES, 0)
            try:
                found = form.unpack_segment_header(header)
                self.committed_end, self.records = form.unpack_marks(header, found.version)
            except ValueError as error:
                raise self._error(str(error)) from error
            self.version, self.identity = found.version, found.identity
            if found.number != int(path.name.partition(".")[0]):
                raise self._error(f"says that it is segment {found.number}")
            if found.identity not in identities:
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

    def entry_at(self, offset: int) -> Entry:
        """Return the record whose header is at an offset; ValueError if none is there, or it ends after the file."""
        header = os.pread(self.fd, form.RECORD_HEADER_BYTES, offset)
        if len(header) < form.RECORD_HEADER_BYTES:
            raise ValueError(f"the file ends in the record header at byte {offset}")
        entry = Entry(form.RecordHeader.unpack(header, self.version), self.path, offset)
        if entry.end > self.file_bytes:
            raise ValueError(f"the file ends in the record at byte {offset}")
        return entry

    def entries(self) -> Iterator[Entry]:
        """Yield the committed records in order, by their headers; CheckpointError where they do not add up."""
        offset, records, due = form.SEGMENT_HEADER_BYTES, 0, None
        while offset < self.committed_end:
            try:
                entry = self.entry_at(offset)
            except ValueError as error:
                raise self._error(f"{error} (at byte {offset})") from error
            number = entry.header.iteration
            if entry.header.kind in form.DECIDED:
                if due is not None and number != due:
                    raise self._error(f"the record at byte {offset} is of iteration {number}, expected {due}")
                due = number + 1
            elif entry.header.kind == form.VOLATILE:
                due = None
            yield entry
            offset, records = entry.end, records + 1
        if (offset, records) != (self.committed_end, self.records):
            raise self._error(
                f"{records} records up to byte {offset}, the mark says {self.records} to {self.committed_end}"
            )

    def uncommitted(self) -> Iterator[Entry]:
        """Yield what lies behind the mark and is whole, up to the first record that is not."""
        offset = self.committed_end
        while offset < self.file_bytes:
            try:
                entry = self.entry_at(offset)
                self.payload(entry, [np.empty(entry.header.payload_bytes, np.uint8)])
            except (ValueError, CheckpointError):
                return
            yield entry
            offset = entry.end

    def _table(self, entry: Entry) -> list[tuple[int, int, int]]:
        size, encoding = entry.header.payload_bytes, entry.header.encoding
        table = os.pread(self.fd, form.table_bytes(size, encoding), entry.offset + form.RECORD_HEADER_BYTES)
        if form.crc32c(table) != entry.header.checksum:
            raise ValueError("its table of checksums is not as it was written")
        return form.unpack_table(table, size, encoding)

    def _read(self, entry: Entry, parts: Sequence[np.ndarray]) -> None:
        """Read a payload; ValueError, and what was read is not to be used, if any byte of it is not as it was written."""
        rows = self._table(entry)
        at = (
            entry.offset
            + form.RECORD_HEADER_BYTES
            + form.table_bytes(entry.header.payload_bytes, entry.header.encoding)
        )
        for block, (checksum, stored, stored_checksum) in zip(form.blocks(parts), rows, strict=True):
            if stored == sum(piece.size for piece in block):
                for piece in block:
                    at += self._fill(memoryview(piece), at)
            else:
                packed = np.empty(stored, np.uint8)
                at += self._fill(memoryview(packed), at)
                if form.crc32c(packed) != stored_checksum:
                    raise ValueError("a block is not as it was written")
                _unpack(packed, block)
            if form.checksum_of(block) != checksum:
                raise ValueError("a block is not as it was written")
        padding = os.pread(self.fd, entry.end - at, at)
        if any(padding) or at + len(padding) != entry.end:
            raise ValueError("what follows it is not zero")

    def _fill(self, view: memoryview, at: int) -> int:
        size = view.nbytes
        while view.nbytes and (count := os.preadv(self.fd, [view], at)):
            view, at = view[count:], at + count
        return size

    def payload(self, entry: Entry, parts: Sequence[np.ndarray]) -> None:
        """Read a record's payload into contiguous uint8 arrays, as many bytes as it has; CheckpointError if it is not right."""
        size = entry.header.payload_bytes
        if sum(part.size for part in parts) != size:
            raise self._error(
                f"iteration {entry.header.iteration} has {size} bytes, the plan expects {sum(p.size for p in parts)}"
            )
        with io_errors("read", self.path):
            try:
                self._read(entry, parts)
            except ValueError as error:
                raise self._error(
                    f"checksum of the record of iteration {entry.header.iteration} (byte {entry.offset}) is wrong: {error}"
                ) from error

    def facts(self, entry: Entry) -> dict:
        """Return what a record without a gradient says; CheckpointError if it is not right."""
        payload = np.empty(entry.header.payload_bytes, np.uint8)
        self.payload(entry, [payload])
        return json.loads(payload.tobytes())

    def checksums(self, entry: Entry) -> list[int]:
        """Return the CRC32C of each block of a record's payload; CheckpointError if the table of them is not right."""
        with io_errors("read", self.path):
            try:
                return [row[0] for row in self._table(entry)]
            except ValueError as error:
                raise self._error(f"checksum of the record at byte {entry.offset} is wrong: {error}") from error

    def close(self) -> None:
        """Close the file; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unpack(packed: np.ndarray, block: list[np.ndarray]) -> None:
    from updater import compression  # few logs have packed blocks

    whole = block[0] if len(block) == 1 else np.empty(sum(piece.size for piece in block), np.uint8)
    compression.decompress(packed, whole)
    at = 0
    for piece in block if whole is not block[0] else ():
        piece[:] = whole[at : at + piece.size]
        at += piece.size


def read_payload(entry: Entry, identities: Collection[bytes], parts: Sequence[np.ndarray]) -> None:
    """Read one record's payload into arrays, as `Segment.payload` does."""
    with Segment(entry.segment, identities) as segment:
        segment.payload(entry, parts)


def read_facts(entry: Entry, identities: Collection[bytes]) -> dict:
    """Return what a record without a gradient says: of an incomplete iteration, or of an audit."""
    with Segment(entry.segment, identities) as segment:
        return segment.facts(entry)
