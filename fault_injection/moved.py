# SPDX-License-Identifier: MIT
"""A connection's frames as they would be had any number of messages gone before them.

What a sender counts is moved on: packet sequence numbers, the flags that carry steps, slots, message numbers in credits; so
is the ICRC. As `workload_gen` writes them (`wire`, `schedule`), without the parser that is under test.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fault_injection.case import Shown
from fault_injection.frames import WRITE_ONLY, Header, mended
from fault_injection.jobs import Job
from flowcheck.layout import SLOTS
from flowcheck.schedule import PROTOCOLS
from workload_gen.wire import credit_form

__all__ = ["Mover", "Shift"]


@dataclass(frozen=True)
class Mover:
    """Moves frames of one connection; `base` is the address of its first slot, `credit` its credits' struct format."""

    protocol: str
    base: int
    credit: str

    def data(self, frame: bytes, header: Header, packets: int, messages: int) -> bytes:
        """Return a data packet behind so many more packets of its queue pair, and messages of the connection."""
        out, steps = bytearray(frame), messages * PROTOCOLS[self.protocol].slice_steps
        _put_psn(out, header, packets)
        if header.reth is not None and (address := struct.unpack_from(">Q", out, header.reth)[0]):
            struct.pack_into(">Q", out, header.reth, self._slot_later(address, steps))
        payload = memoryview(out)[header.payload : header.end]
        if self.protocol == "ll":
            np.frombuffer(payload, "<u4")[1::2] += np.uint32(steps % 2**32)
        elif self.protocol == "ll128":
            np.frombuffer(payload, "<u8")[15::16] += np.uint64(steps)
        return mended(out, header)

    def credits(self, frame: bytes, header: Header, messages: int) -> bytes:
        """Return a credit behind so many more messages."""
        out = bytearray(frame)
        _put_psn(out, header, messages)
        address, *fields, index = struct.unpack_from(self.credit, out, header.payload)
        address = self._slot_later(address, messages * PROTOCOLS[self.protocol].slice_steps)
        struct.pack_into(self.credit, out, header.payload, address, *fields, index + messages)
        return mended(out, header)

    def _slot_later(self, address: int, steps: int) -> int:
        stride = PROTOCOLS[self.protocol].slot_bytes
        slot, within = divmod(address - self.base, stride)
        return self.base + (slot + steps) % SLOTS * stride + within


def _put_psn(frame: bytearray, header: Header, count: int) -> None:
    frame[header.bth + 9 : header.bth + 12] = struct.pack(">I", (header.psn + count) % 2**24)[1:]


class Shift:
    """Moves the frames of a link on: those of a flow by so many `packets`, those of a channel by so many `messages`."""

    def __init__(
        self, job: Job, number: int, packets: Mapping[tuple[int, int], int], messages: Mapping[int, int]
    ) -> None:
        self._link, self._packets, self._messages = job.links[number], packets, messages
        connections = [c for c in job.shard["connections"] if c["edge"] == number]
        self._channels = {pair: c["channel"] for c in connections for pair in c["proof"]["credit"]}
        self._movers: dict[int, Mover] = {}
        for frame, header in zip(self._link.frames, self._link.headers, strict=True):
            channel = self._credited(header)
            if channel is not None and channel not in self._movers:
                # The first credit of a connection names its first slot.
                base = struct.unpack_from("<Q", frame, header.payload)[0]
                self._movers[channel] = Mover(job.protocol, base, credit_form(job.plan.shard.layout))
            if len(self._movers) == len(connections):
                break

    def _credited(self, header: Header) -> int | None:
        """Return whose credit a frame is."""
        return self._channels.get(header.queue_pair) if header.opcode == WRITE_ONLY else None

    def of(self, one: Shown) -> bytes:
        """Return a frame of the job, moved on; what is neither data nor credit stays as it is."""
        header, flow = self._link.headers[one.index], self._link.flow[one.index]
        if flow is not None:
            return self._movers[flow[0]].data(
                one.frame, header, self._packets.get(flow, 0), self._messages.get(flow[0], 0)
            )
        channel = self._credited(header)
        if channel is None:
            return one.frame
        return self._movers[channel].credits(one.frame, header, self._messages.get(channel, 0))
