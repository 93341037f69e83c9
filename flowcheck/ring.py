# SPDX-License-Identifier: MIT
"""The packet ring: the file that joins dump, parser and extractor of one stream.

This is the Python side: creating, opening and reading cursors. Each stage's loop works on the same bytes through
`flowcheck/_formats.pxd`. docs/ring-format.md draws the file.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import numpy as np

from flowcheck import _atomics, mapped
from flowcheck.errors import ConfigError, RingFormatError
from flowcheck.formats import DUMP_STATE, EXTRACT_STATE, RECORD, RING_HEADER, RING_MAGIC, VERSION
from flowcheck.layout import frames_per_iteration
from flowcheck.mapped import PAGE
from flowcheck.plan import Plan

__all__ = ["PacketRing"]

#: Bytes of headers around an MTU of payload: Ethernet with four tags, IPv6 with some extension headers, UDP, BTH,
#: RETH, immediate, pad and ICRC.
FRAME_HEADROOM = 192
#: A mirror cannot be told to wait: what the extractor has not taken yet must have room for so many iterations.
ITERATIONS_HELD = 2
PARSE_STATE_BYTES = 65536


def _state_blocks() -> tuple[dict[str, tuple[int, int]], int]:
    """Return per stage (offset, bytes of one copy) of its state block, and where record 0 begins."""
    blocks, offset = {}, PAGE
    for stage, state in (
        ("dump", DUMP_STATE.itemsize),
        ("parse", PARSE_STATE_BYTES),
        ("extract", EXTRACT_STATE.itemsize),
    ):
        copy = -(-(8 + state) // 64) * 64
        blocks[stage] = (offset, copy)
        offset += 2 * copy
    return blocks, -(-offset // PAGE) * PAGE


def _record_bytes(frame_bytes: int) -> int:
    return -(-(RECORD.itemsize + frame_bytes) // 64) * 64


def _records(plan: Plan, stream: str) -> int:
    """Return how many records a stream's ring has: as many as the plan's `ring_bytes` hold, enough for two iterations."""
    held = plan.ring_bytes // (plan.shard.layout.mtu + FRAME_HEADROOM)
    least = ITERATIONS_HELD * frames_per_iteration(plan, stream)
    return max(256, 1 << (held.bit_length() - 1), 1 << (least - 1).bit_length())


class PacketRing:
    """A mapped packet ring; `create` or `open`, then `close` (or use it in a `with`).

    Attributes:
        path: the file.
        memory: the whole file, mapped for reading and writing.
        record_bytes: bytes of a record, header and room for the frame.
        records: how many there are, a power of two.
        header_bytes: offset of record 0.
        stream: name of the stream.
        identity: the job's identity, 128 bytes.
    """

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        header = np.frombuffer(memory, RING_HEADER, 1)[0]
        self.path, self.memory = path, memory
        self.record_bytes, self.records = int(header["record_bytes"]), int(header["records"])
        self.header_bytes, self.stream = int(header["header_bytes"]), header["stream"].decode()
        self.identity = header["identity"].tobytes()

    @classmethod
    def create(cls, path: str | Path, *, frame_bytes: int, records: int, identity: bytes, stream: str) -> PacketRing:
        """Make a ring whose records hold frames of up to `frame_bytes`; `path` must not exist.

        The file appears under its name only when it is whole. Mode 0600. ConfigError on sizes that cannot be.
        """
        path = Path(path)
        if records < 2 or records & (records - 1):
            raise ConfigError(f"{path}: a ring of {records} records: expected a power of two, at least 2")
        if len(identity) != RING_HEADER["identity"].itemsize:
            raise ConfigError(f"{path}: identity of {len(identity)} bytes, expected {RING_HEADER['identity'].itemsize}")
        blocks, header_bytes = _state_blocks()
        header = np.zeros((), RING_HEADER)
        header["magic"], header["version"] = np.void(RING_MAGIC), VERSION
        header["header_bytes"], header["records"] = header_bytes, records
        header["record_bytes"] = _record_bytes(frame_bytes)
        header["created_ns"] = time.time_ns()
        header["identity"] = np.frombuffer(identity, RING_HEADER["identity"])[0]
        header["stream"] = stream.encode()
        for stage, (offset, copy) in blocks.items():
            header[f"{stage}_state_offset"], header[f"{stage}_state_bytes"] = offset, copy
        mapped.create(path, header_bytes + records * int(header["record_bytes"]), {0: header.tobytes()})
        return cls.open(path, identity)

    @classmethod
    def open(cls, path: str | Path, identity: bytes | None = None) -> PacketRing:
        """Map an existing ring; RingFormatError if it is none, ConfigError if it is another job's."""
        path = Path(path)
        memory = mapped.map_file(path, "packet ring", RingFormatError)
        size = len(memory)
        header = np.frombuffer(memory, RING_HEADER, 1)[0].copy()
        blocks, header_bytes = _state_blocks()
        expected = {"version": VERSION, "header_bytes": header_bytes}
        for stage, (offset, copy) in blocks.items():
            expected[f"{stage}_state_offset"], expected[f"{stage}_state_bytes"] = offset, copy
        problem = None
        if header["magic"].tobytes() != RING_MAGIC:
            problem = "no packet ring (its magic is missing)"
        else:
            for name, value in expected.items():
                if header[name] != value:
                    problem = f"{name} is {int(header[name])}, expected {value}"
                    break
        records, record_bytes = int(header["records"]), int(header["record_bytes"])
        if problem is None and (
            records < 2 or records & (records - 1) or record_bytes % 64 or record_bytes <= RECORD.itemsize
        ):
            problem = f"{records} records of {record_bytes} bytes cannot be"
        if problem is None and header_bytes + records * record_bytes != size:
            problem = f"its size is {size}, its header promises {header_bytes + records * record_bytes}"
        try:
            header["stream"].decode()
        except UnicodeDecodeError:
            problem = problem or f"the name of its stream is {header['stream']!r}, expected UTF-8"
        if problem is not None:
            raise RingFormatError(f"{path}: {problem}; remove the file and start the dump again", str(path))
        if identity is not None and header["identity"].tobytes() != identity:
            found = header["identity"]["run_id"].decode(errors="replace")
            raise ConfigError(
                f"{path}: the ring of another job or plan (run {found!r}); remove it or name another file"
            )
        return cls(path, memory)

    @classmethod
    def for_stream(cls, path: str | Path, plan: Plan, stream: str, records: int | None = None) -> PacketRing:
        """Open the ring of a plan's stream, or make it: with records for the plan's MTU, as many as its `ring_bytes` hold, enough for two iterations.

        RingFormatError or ConfigError if the file is something else, or the ring of another job or stream.
        """
        path, identity = Path(path), plan.identity()
        if not path.exists():
            rooms = {
                "frame_bytes": plan.shard.layout.mtu + FRAME_HEADROOM,
                "records": records or _records(plan, stream),
            }
            return cls.create(path, **rooms, identity=identity, stream=stream)
        ring = cls.open(path, identity)
        if ring.stream != stream:
            raise ConfigError(f"{path}: the ring of stream {ring.stream!r}, expected that of {stream!r}")
        return ring

    @staticmethod
    def bytes_for(plan: Plan, stream: str) -> int:
        """Return the bytes of the ring that `for_stream` makes."""
        return _state_blocks()[1] + _records(plan, stream) * _record_bytes(plan.shard.layout.mtu + FRAME_HEADROOM)

    def adopt(self, identity: bytes) -> None:
        """Make the ring one of another plan: of the same job, whose plan was completed while the ring was filled."""
        at, size = RING_HEADER.fields["identity"][1], len(self.identity)
        self.memory[at : at + size] = self.identity = identity

    def _cursor(self, name: str) -> int:
        return _atomics.load(self.memory, RING_HEADER.fields[name][1])

    @property
    def written(self) -> int:
        """Records that the dump has completed."""
        return self._cursor("written")

    @property
    def parsed(self) -> int:
        """Records that the parser has annotated."""
        return self._cursor("parsed")

    @property
    def extracted(self) -> int:
        """Records that the extractor is done with."""
        return self._cursor("extracted")

    @property
    def ended(self) -> bool:
        """Whether no record follows `written`."""
        return bool(self._cursor("ended"))

    def record(self, index: int) -> np.ndarray:
        """Return the header of record `index` (of the stream) as a writable view."""
        offset = self.header_bytes + (index & (self.records - 1)) * self.record_bytes
        return np.frombuffer(self.memory, RECORD, 1, offset)[0:1]

    def frame(self, index: int) -> bytes:
        """Return the stored bytes of a record's frame."""
        offset = self.header_bytes + (index & (self.records - 1)) * self.record_bytes + RECORD.itemsize
        length = int(self.record(index)["stored_length"][0])
        return bytes(self.memory[offset : offset + min(length, self.record_bytes - RECORD.itemsize)])

    def close(self) -> None:
        """Give the mapping up; views handed out keep it until they go."""
        mapped.unmap(self.memory)

    def __enter__(self) -> PacketRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
