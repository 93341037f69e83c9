# SPDX-License-Identifier: MIT
"""What a link would have shown: the frames of one rank's collectives, from it to the next one and back, into a file."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import ModuleType

import numpy as np
import torch

from flowcheck import layout as layouts
from flowcheck import schedule
from flowcheck.plan import Layout
from workload_gen import frames
from workload_gen.pcapng import PcapngWriter

__all__ = ["Connection", "LinkTap", "connections", "credit_form", "decode", "encode", "encode_into", "mac"]

#: Between two frames; what the clock of a recording shows means nothing else.
FRAME_NS = 700
#: Credits (CTS) are written into a ring of 64 entries up to 2.18, of 256 from 2.19; entries are eight elements apart.
CREDIT_ELEMENTS = 8
#: Where each version's credit has size, rkey and nreqs: struct formats with addr, size, rkey, nreqs, tag, idx in order.
_CREDIT_FORMS = ((19, "<QIIIIQ"), (23, "<QII4xIIxxxxQ24x"), (29, "<QQI12xIIQ16x"), (30, "<QQI28xIIQ"))


def _units128() -> np.ndarray:
    """Return where in a warp's 256 words of LL128 each of its 240 data words lies (prims_ll128.h, its shuffle)."""
    words = []
    for word in range(240):
        half, item, odd = word // 120, word % 120 // 2, word % 2
        line, place = divmod(item, 8) if item < 32 else divmod(item - 32, 7)
        if item >= 32:
            line += 4
        elif place == 7 and odd:
            line, odd = line + 4, 0
        words.append((8 * half + line) * 16 + 2 * place + odd)
    return np.array(words)


_UNITS128 = _units128()


def encode(protocol: str, data: bytes, step: int, stale: bytes) -> bytes:
    """Return a message's payload; `stale` (8 bytes) is repeated where the library sends what its registers held."""
    if protocol == "simple":
        return data
    unit = 8 if protocol == "ll" else 1920
    filled = data + (stale * (unit // 8))[: -len(data) % unit]
    if protocol == "ll":
        words = np.frombuffer(filled, "<u4").reshape(-1, 2)
        lines = np.empty((len(words), 4), "<u4")
        lines[:, 0::2] = words
        lines[:, 1::2] = (step + 1) & 0xFFFFFFFF
        if step & 0x7FFFFFF8 == 0x7FFFFFF8:
            rest = np.zeros((schedule.PROTOCOLS["ll"].slot_bytes // 16 - len(lines), 4), "<u4")
            rest[:, 1::2] = (step + 1) & 0xFFFFFFFF
            lines = np.concatenate([lines, rest])
        return lines.tobytes()
    groups = np.full((len(filled) // 1920, 256), step + 1, "<u8")
    groups[:, _UNITS128] = np.frombuffer(filled, "<u8").reshape(-1, 240)
    return groups.tobytes()


def encode_into(protocol: str, data: np.ndarray, step: int, stale: bytes, room: np.ndarray) -> int:
    """Write a message's payload (as `encode`) into `room`, uint8; return its length."""
    if protocol == "simple":
        room[: len(data)] = data
        return len(data)
    payload = np.frombuffer(encode(protocol, data.tobytes(), step, stale), np.uint8)
    room[: len(payload)] = payload
    return len(payload)


def decode(protocol: str, payload: np.ndarray, size: int, step: int) -> np.ndarray:
    """Return the `size` data bytes of a message's payload, uint8; a view for Simple. ValueError if a flag is wrong."""
    if protocol == "simple":
        return payload[:size]
    if protocol == "ll":
        lines = payload[: 16 * -(-size // 8)].view("<u4").reshape(-1, 4)
        right = (lines[:, 1::2] == (step + 1) & 0xFFFFFFFF).all()
        data = np.ascontiguousarray(lines[:, 0::2])
    else:
        groups = payload[: 2048 * -(-size // 1920)].view("<u8").reshape(-1, 256)
        right = (groups.reshape(-1, 16)[:, 15] == step + 1).all()
        data = np.ascontiguousarray(groups[:, _UNITS128])
    if not right:
        raise ValueError(f"a message of step {step} has the flag of another")
    return data.view(np.uint8).reshape(-1)[:size]


def credit_form(layout: Layout) -> str:
    """Return the struct format of a version's credit: addr, size, rkey, nreqs, tag, idx."""
    return next(form for last, form in _CREDIT_FORMS if layout.minor <= last)


@dataclass
class Connection:
    """One mirrored connection: its addresses and queue pairs, and its counters as both ends keep them."""

    edge: int
    channel: int
    rank: int
    forward: frames.Path
    backward: frames.Path
    data_queue_pairs: list[int]
    credit_queue_pairs: list[int]
    base_address: int
    psn: list[int]
    step: int = 0
    messages: int = 0
    completed: list[int] = field(default_factory=list)
    stale: bytes = b"\xa5\x5a\xa5\x5a\xa5\x5a\xa5\x5a"

    def __post_init__(self) -> None:
        self.completed = [0] * len(self.psn)


def mac(rank: int) -> bytes:
    """Return the MAC address of a rank's adapter: locally administered."""
    return b"\x02\xfc" + struct.pack(">I", rank + 1)


def connections(layout: Layout, edge: int, ip_version: int, vlan: int | None, start_psn: int) -> list[Connection]:
    """Return the connections of a link, a channel each; every process that asks gets the same numbers."""
    ranks = len(layout.ring)
    sending, receiving = layout.ring[edge], layout.ring[(edge + 1) % ranks]

    def address(rank: int) -> str:
        return f"fe80::f10c:{rank + 1:x}" if ip_version == 6 else f"10.0.{(rank + 1) >> 8}.{(rank + 1) & 255}"

    out = []
    for channel in range(layout.channels):
        first = 0x1000 + 2 * layout.queue_pairs * (edge * layout.channels + channel)
        data = [first + 2 * number for number in range(layout.queue_pairs)]
        credit = [number + 1 for number in data]
        there = frames.Path(mac(sending), mac(receiving), address(sending), address(receiving), vlan)
        back = frames.Path(mac(receiving), mac(sending), address(receiving), address(sending), vlan)
        base = 0x6_0000_0000 + first * (1 << 24)
        out.append(Connection(edge, channel, sending, there, back, data, credit, base, [start_psn] * len(data)))
    return out


class LinkTap:
    """Writes one link, both directions, into a capture file; a `workload_gen.ring.Tap`.

    Credits and acknowledgements are as the receiver would have sent them, each at its message's side. `messages` says
    which elements each message carries: a module like `flowcheck.schedule`.
    """

    def __init__(
        self, layout: Layout, links: list[Connection], path: FilePath, messages: ModuleType = schedule
    ) -> None:
        self._layout, self._links, self._messages = layout, links, messages
        self._file = PcapngWriter(path)
        self._clock_ns = 1_700_000_000 * 10**9
        self.recording = True

    def all_reduce(self, partial: torch.Tensor, result: torch.Tensor) -> None:
        """Record an all-reduce: messages carry `result` where they are final, `partial` where they are not."""
        width = result.element_size()
        bodies = [vector.view(torch.uint8).numpy() for vector in (partial, result)]
        per_link = [
            self._messages.all_reduce(self._layout, c.edge, c.channel, result.numel(), width) for c in self._links
        ]

        def data(message: np.void) -> bytes:
            begin = int(message["first"]) * width
            return bodies[int(message["final"])][begin : begin + int(message["elements"]) * width].tobytes()

        self._record("all_reduce", [[data(message) for message in messages] for messages in per_link])

    def broadcast(self, data: bytes, root: int) -> None:
        """Record a broadcast."""
        self._bytes(
            "broadcast",
            data,
            [self._messages.broadcast(self._layout, c.edge, c.channel, len(data), root) for c in self._links],
        )

    def all_gather(self, data: bytes, part_bytes: int) -> None:
        """Record an all-gather."""
        self._bytes(
            "all_gather",
            data,
            [self._messages.all_gather(self._layout, c.edge, c.channel, part_bytes) for c in self._links],
        )

    def _bytes(self, op: str, data: bytes, per_link: list[np.ndarray]) -> None:
        self._record(
            op, [[data[first : first + count] for first, count, _ in messages.tolist()] for messages in per_link]
        )

    def _record(self, op: str, per_link: list[list[bytes]]) -> None:
        """Write the messages of one operation, the channels in turn."""
        if not self.recording:
            return
        for link, messages in zip(self._links, per_link, strict=True):
            if messages:
                link.step, _ = layouts.first_step(self._layout, op, link.step)
        stride = layouts.first_step(self._layout, op, 0)[1]
        for index in range(max(map(len, per_link))):
            for link, messages in zip(self._links, per_link, strict=True):
                if index < len(messages):
                    self._send(link, messages[index])
                    link.step += stride

    def _send(self, link: Connection, data: bytes) -> None:
        """Write a credit, the message, and its acknowledgements."""
        layout = self._layout
        wire = encode(layout.protocol, data, link.step, link.stale)
        if data:
            link.stale = data[-8:].rjust(8, b"\x3c")
        slot = link.base_address + link.step % layouts.SLOTS * schedule.PROTOCOLS[layout.protocol].slot_bytes
        self._credit(link, slot)
        immediate = struct.pack(">I" if layout.big_endian_immediate else "<I", len(wire))
        for number in range(layout.queue_pairs):
            pieces = layouts.queue_pair_pieces(layout, number, link.messages, np.array([len(wire)]))
            if len(pieces.index):
                offset, length = int(pieces.offset[0]), int(pieces.length[0])
                piece = wire[offset : offset + length]
                self._piece(link, number, slot + int(pieces.address[0]), piece, immediate, bool(pieces.bulk_split[0]))
        link.messages += 1

    def _piece(self, link: Connection, number: int, address: int, wire: bytes, immediate: bytes, split: bool) -> None:
        """Write one queue pair's part of a message, and the acknowledgement."""
        mtu = self._layout.mtu
        pieces = [wire[i : i + mtu] for i in range(0, len(wire), mtu)] or [b""]
        reth = struct.pack(">QII", address, 0x1000 + link.data_queue_pairs[0], len(wire))
        for index, piece in enumerate(pieces):
            first, last = index == 0, index == len(pieces) - 1
            if last and not split:
                opcode = frames.WRITE_ONLY_IMMEDIATE if first else frames.WRITE_LAST_IMMEDIATE
            elif last:
                opcode = frames.WRITE_ONLY if first else frames.WRITE_LAST
            else:
                opcode = frames.WRITE_FIRST if first else frames.WRITE_MIDDLE
            extended = (reth if first else b"") + (immediate if last and not split else b"")
            self._data(link, number, opcode, extended, piece)
        link.completed[number] += 1
        if split:
            self._data(link, number, frames.WRITE_ONLY_IMMEDIATE, bytes(16) + immediate, b"")
            link.completed[number] += 1
        back = (link.backward, link.credit_queue_pairs[number], link.data_queue_pairs[number])
        self._write([frames.ack(*back, link.psn[number] - 1, link.completed[number])])

    def _data(self, link: Connection, number: int, opcode: int, extended: bytes, payload: bytes) -> None:
        pair = (link.data_queue_pairs[number], link.credit_queue_pairs[number])
        self._write([frames.frame(link.forward, opcode, *pair, link.psn[number], extended, payload)])
        link.psn[number] += 1

    def _credit(self, link: Connection, slot: int) -> None:
        layout = self._layout
        form = credit_form(layout)
        # The room that the receiver gives: two steps for Simple, one slot else.
        room = schedule.PROTOCOLS[layout.protocol].slot_bytes * schedule.PROTOCOLS[layout.protocol].slice_steps
        key = 0x1000 + link.data_queue_pairs[0]
        element = struct.pack(form, slot, room, key, 1, link.rank, link.messages + 1)
        entries = 256 if layout.minor >= 19 else 64
        where = 0x7F00_0000_0820 + link.messages % entries * CREDIT_ELEMENTS * len(element)
        extended = struct.pack(">QII", where, 0x2000 + link.credit_queue_pairs[0], len(element))
        psn = link.messages
        there, back = link.data_queue_pairs[0], link.credit_queue_pairs[0]
        self._write([
            frames.frame(link.backward, frames.WRITE_ONLY, back, there, psn, extended, element),
            frames.ack(link.forward, there, back, psn, link.messages + 1),
        ])  # fmt: skip

    def _write(self, written: Iterable[bytes]) -> None:
        for frame in written:
            self._clock_ns += FRAME_NS
            self._file.write(frame, self._clock_ns)

    def close(self) -> None:
        """Close the capture file."""
        self._file.close()
