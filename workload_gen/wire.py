# SPDX-License-Identifier: MIT
"""The recorded network: collectives of all ranks, done in one process, and what they put on the mirrored links.

A ring all-reduce adds in exactly the order of the library's: chunk c begins at ring position c+1, every hop adds its
own value and rounds to the dtype. So the sums, and the frames, have the bits that ranks of their own would produce.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path as FilePath

import numpy as np

from flowcheck.layout import BULK_SPLIT_BYTES, LL_SLOT_BYTES, SLOTS, Message, all_gather, all_reduce, broadcast
from flowcheck.plan import Layout
from workload_gen import frames
from workload_gen.pcapng import PcapngWriter

__all__ = ["Fabric", "Sender", "make_senders"]

#: Between two frames; what the clock of a recording shows means nothing else.
FRAME_NS = 700
#: Credits (CTS) of 2.12 to 2.19: 32 bytes, written into a ring of 64 entries up to 2.18, of 256 from 2.19, eight apart.
CREDIT_BYTES, CREDIT_STRIDE = 32, 256


@dataclass
class Sender:
    """One mirrored connection: its addresses and queue pairs, and its counters as both ends keep them."""

    edge: int
    channel: int
    rank: int
    forward: frames.Path
    backward: frames.Path
    data_queue_pair: int
    credit_queue_pair: int
    start_psn: int
    base_address: int
    file: PcapngWriter
    psn: int = 0
    step: int = 0
    messages: int = 0
    completed: int = 0
    stale: bytes = field(default=b"\xa5\x5a\xa5\x5a\xa5\x5a\xa5\x5a")


class Fabric:
    """All connections of a job; collectives go through it, the mirrored ones into capture files."""

    def __init__(self, layout: Layout, senders: list[Sender]) -> None:
        self._layout, self._senders = layout, senders
        self._clock_ns = 1_700_000_000 * 10**9

    def all_reduce(self, vectors: list[np.ndarray]) -> np.ndarray:
        """Return the sum of one vector per ring position, added in ring order, and record it on the way."""
        ranks, count = len(vectors), len(vectors[0])
        width = vectors[0].itemsize
        result = np.empty_like(vectors[0])
        done = 0
        for channel in range(self._layout.channels):
            edges = [all_reduce(self._layout, edge, channel, count, width) for edge in range(ranks)]
            sums = self._sums(edges, vectors)
            for (number, chunk), partial in sums.items():
                final = edges[chunk % ranks][number * 2 * (ranks - 1) + ranks - 1]
                result[final.first : final.first + final.elements] = partial[-1]
                done += final.elements
            for sender in self._senders:
                if sender.channel == channel:
                    for index, message in enumerate(edges[sender.edge]):
                        loop, send = divmod(index, 2 * (ranks - 1))
                        held = min(send, ranks - 1)
                        self._send(sender, message, sums[loop, (sender.edge - 1 - send) % ranks][held].tobytes())
        if done != count:
            raise AssertionError(f"{done} of {count} elements were reduced")
        return result

    @staticmethod
    def _sums(edges: list[list[Message]], vectors: list[np.ndarray]) -> dict[tuple[int, int], list[np.ndarray]]:
        """Return per (loop, chunk) the sums after 1, 2, .. all contributions, in ring order from position chunk+1."""
        ranks = len(vectors)
        sums = {}
        for loop in range(len(edges[0]) // (2 * (ranks - 1))):
            for chunk in range(ranks):
                # The first message of edge chunk+1 in a loop is that position's own part of the chunk.
                first = edges[(chunk + 1) % ranks][loop * 2 * (ranks - 1)]
                piece = slice(first.first, first.first + first.elements)
                running = [vectors[(chunk + 1) % ranks][piece]]
                for hop in range(2, ranks + 1):
                    running.append(vectors[(chunk + hop) % ranks][piece] + running[-1])
                sums[loop, chunk] = running
        return sums

    def broadcast(self, data: bytes, root: int = 0) -> None:
        """Record a broadcast of bytes."""
        for sender in self._senders:
            for message in broadcast(self._layout, sender.edge, sender.channel, len(data), root):
                self._send(sender, message, data[message.first : message.first + message.elements])

    def all_gather(self, parts: list[bytes]) -> None:
        """Record an all-gather of one part per rank."""
        data = b"".join(parts)
        for sender in self._senders:
            for message in all_gather(self._layout, sender.edge, sender.channel, len(parts[0])):
                self._send(sender, message, data[message.first : message.first + message.elements])

    def _send(self, sender: Sender, message: Message, data: bytes) -> None:
        """Record a credit, the message as LL lines, and its acknowledgements."""
        self._credit(sender)
        words = np.frombuffer(data + sender.stale[: -len(data) % 8], "<u4").reshape(-1, 2)
        lines = np.empty((len(words), 4), "<u4")
        lines[:, 0::2] = words
        lines[:, 1::2] = (sender.step + 1) & 0xFFFFFFFF
        wire = lines.tobytes()
        if data:
            sender.stale = data[-8:].rjust(8, b"\x3c")
        address = sender.base_address + sender.step % SLOTS * LL_SLOT_BYTES
        immediate = struct.pack("<I", len(wire))
        split = self._layout.adaptive_routing and len(wire) > BULK_SPLIT_BYTES
        mtu = self._layout.mtu
        pieces = [wire[i : i + mtu] for i in range(0, len(wire), mtu)] or [b""]
        reth = struct.pack(">QII", address, 0x1000 + sender.data_queue_pair, len(wire))
        for index, piece in enumerate(pieces):
            first, last = index == 0, index == len(pieces) - 1
            if last and not split:
                opcode = frames.WRITE_ONLY_IMMEDIATE if first else frames.WRITE_LAST_IMMEDIATE
            elif last:
                opcode = frames.WRITE_ONLY if first else frames.WRITE_LAST
            else:
                opcode = frames.WRITE_FIRST if first else frames.WRITE_MIDDLE
            extended = (reth if first else b"") + (immediate if last and not split else b"")
            self._data(sender, opcode, extended, piece)
        sender.completed += 1
        if split:
            self._data(sender, frames.WRITE_ONLY_IMMEDIATE, bytes(16) + immediate, b"")
            sender.completed += 1
        last_psn = sender.start_psn + sender.psn - 1
        self._write(sender, frames.ack(sender.backward, sender.credit_queue_pair, last_psn, sender.completed))
        sender.step += 1
        sender.messages += 1

    def _data(self, sender: Sender, opcode: int, extended: bytes, payload: bytes) -> None:
        psn = sender.start_psn + sender.psn
        self._write(sender, frames.frame(sender.forward, opcode, sender.data_queue_pair, psn, extended, payload))
        sender.psn += 1

    def _credit(self, sender: Sender) -> None:
        entries = 256 if self._layout.minor >= 19 else 64
        slot = sender.base_address + sender.step % SLOTS * LL_SLOT_BYTES
        element = struct.pack(
            "<QIIIIQ", slot, LL_SLOT_BYTES, 0x1000 + sender.data_queue_pair, 1, sender.rank, sender.messages + 1
        )
        where = 0x7F00_0000_0820 + sender.messages % entries * CREDIT_STRIDE
        extended = struct.pack(">QII", where, 0x2000 + sender.credit_queue_pair, CREDIT_BYTES)
        psn = sender.start_psn + sender.messages
        self._write(
            sender, frames.frame(sender.backward, frames.WRITE_ONLY, sender.credit_queue_pair, psn, extended, element)
        )
        self._write(sender, frames.ack(sender.forward, sender.data_queue_pair, psn, sender.messages + 1))

    def _write(self, sender: Sender, frame: bytes) -> None:
        self._clock_ns += FRAME_NS
        sender.file.write(frame, self._clock_ns)

    def close(self) -> None:
        """Close the capture files."""
        for file in {id(sender.file): sender.file for sender in self._senders}.values():
            file.close()


def make_senders(layout: Layout, links: list[int], folder: FilePath, ip_version: int, start_psn: int) -> list[Sender]:
    """Return the connections of the mirrored links, each link with its capture file in `folder`."""
    senders = []
    ranks = len(layout.ring)

    def address(rank: int) -> str:
        return f"fe80::f10c:{rank + 1:x}" if ip_version == 6 else f"10.0.{(rank + 1) >> 8}.{(rank + 1) & 255}"

    def mac(rank: int) -> bytes:
        return b"\x02\xfc" + struct.pack(">I", rank + 1)

    for link in links:
        file = PcapngWriter(folder / f"link-{link}.pcapng")
        sending, receiving = layout.ring[link], layout.ring[(link + 1) % ranks]
        for channel in range(layout.channels):
            data = 0x1000 + 2 * (link * layout.channels + channel)
            port = frames.source_port(data, data + 1)
            there = frames.Path(mac(sending), mac(receiving), address(sending), address(receiving), port)
            back = frames.Path(mac(receiving), mac(sending), address(receiving), address(sending), port)
            base = 0x6_0000_0000 + data * (1 << 24)
            senders.append(Sender(link, channel, sending, there, back, data, data + 1, start_psn, base, file))
    return senders
