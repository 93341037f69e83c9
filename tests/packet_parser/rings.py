# SPDX-License-Identifier: MIT
"""Packet rings filled and read by hand, for tests of the parser."""

import numpy as np
from scapy.utils import RawPcapNgReader

from flowcheck.formats import RECORD, RING_HEADER
from flowcheck.ring import PacketRing

IDENTITY = bytes(128)


def read_frames(path):
    with RawPcapNgReader(str(path)) as reader:
        return [bytes(data) for data, _ in reader]


class FilledRing:
    """A ring that holds frames given by hand; `add`, then parse, then `annotations`."""

    def __init__(self, path, stream="s", records=4096, frame_bytes=4352, identity=IDENTITY):
        self.ring = PacketRing.create(path, frame_bytes=frame_bytes, records=records, identity=identity, stream=stream)
        self._header = np.frombuffer(self.ring.memory, RING_HEADER, 1)

    def add(self, frames, end=True):
        ring = self.ring
        for index, frame in enumerate(frames, ring.written):
            record = np.zeros(1, RECORD)
            record["frame_length"] = record["stored_length"] = len(frame)
            record["timestamp_ns"], record["sequence"] = 1000 * index, index
            at = ring.header_bytes + (index & (ring.records - 1)) * ring.record_bytes
            ring.memory[at : at + 64 + len(frame)] = record.tobytes() + frame
        self._header["written"] = ring.written + len(frames)
        self._header["ended"] = end

    def release(self):
        """Let the dump write again over everything that is parsed."""
        self._header["extracted"] = self.ring.parsed

    def annotations(self):
        return np.concatenate([self.ring.record(index) for index in range(self.ring.parsed)])


def run(parser):
    while not parser.finished:
        assert parser.poll() > 0
