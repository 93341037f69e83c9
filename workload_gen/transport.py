# SPDX-License-Identifier: MIT
"""The ring over real frames: every collective goes message by message through queue pairs, credits and slots.

`workload_gen.ring` has the same sums without a network; here each message of the library's schedule is a write into one
of the eight slots of its connection, sent when the receiver's credit has come (nccl src/transport/net_ib.cc), so what a
switch mirrors is what carries the training.
"""

from __future__ import annotations

import functools
import ipaddress
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from flowcheck import layout as layouts
from flowcheck import schedule
from flowcheck.plan import Layout
from workload_gen import frames, wire
from workload_gen._nic import Nic

__all__ = ["Adapter", "FabricRing", "Messages"]

#: Of credits that a receiver has posted and nobody read yet.
_CREDITS_HELD = 64
_FIFO_ADDRESS = 0x7F00_0000_0820
#: So long a wait for a frame, then a look whether the job is stuck.
_WAIT_US = 20_000
_CLOSE_S = 3.0


def _header(path: frames.Path, queue_pair: int, peer: int) -> tuple[bytes, int]:
    """Return Ethernet, IP and UDP headers of a path's frames, lengths and checksums zero, and where IP begins."""
    whole = frames.frame(path, frames.ACKNOWLEDGE, queue_pair, peer, 0, bytes(4))
    ip = 14 + (0 if path.vlan is None else 4)
    return whole[: ip + (40 if ipaddress.ip_address(path.source).version == 6 else 20) + 8], ip


#: Adds received bytes to the vector's elements between two byte offsets.
_Add = Callable[[int, int, np.ndarray], None]


def _never(begin: int, end: int, received: np.ndarray) -> None:
    raise AssertionError(f"a partial sum of bytes {begin} to {end} in a collective that adds nothing")


class Adapter:
    """An adapter and the queue pairs of connections on it."""

    def __init__(self, nic: Nic) -> None:
        self.nic = nic

    def queue_pairs(self, there: frames.Path, own: list[int], peers: list[int], send: int, receive: int) -> list[int]:
        """Make queue pairs `own` that talk to `peers`; return their indices."""
        return [
            self.nic.add_queue_pair(number, peer, *_header(there, peer, number), send, receive)
            for number, peer in zip(own, peers, strict=True)
        ]


class _Sender:
    """The sending end of a connection: the credits that came, and a staging buffer as large as the slots."""

    def __init__(self, adapter: Adapter, layout: Layout, connection: wire.Connection) -> None:
        self.layout, self.connection, self.nic = layout, connection, adapter.nic
        self.form = struct.Struct(wire.credit_form(layout))
        self.entries = 256 if layout.minor >= 19 else 64
        self.fifo = np.zeros(self.entries * wire.CREDIT_ELEMENTS * self.form.size, np.uint8)
        self.nic.add_region(0x2000 + connection.credit_queue_pairs[0], _FIFO_ADDRESS, self.fifo)
        self.pairs = adapter.queue_pairs(
            connection.forward, connection.credit_queue_pairs, connection.data_queue_pairs, connection.psn[0], 0
        )
        self.stride = schedule.PROTOCOLS[layout.protocol].slot_bytes
        self.staging = np.zeros(layouts.SLOTS * self.stride, np.uint8)
        #: Of each message in the staging buffer, by number: (index of queue pair, number of its write) each.
        self.posted: dict[int, list[tuple[int, int]]] = {}
        self.message = self.step = 0
        self.stale = b"\xa5\x5a" * 4
        self._pieces = functools.lru_cache(maxsize=1024)(self._pieces_of)

    def ready(self) -> tuple[int, int] | None:
        """Return (address, key) of the slot for the next message; None as long as there is no credit, or no room."""
        at = self.message % self.entries * wire.CREDIT_ELEMENTS * self.form.size
        address, _, key, _, _, index = self.form.unpack_from(self.fifo, at)
        if index != self.message + 1:
            return None
        oldest = self.message - layouts.SLOTS
        if oldest in self.posted:
            if any(self.nic.completed(pair) <= number for pair, number in self.posted[oldest]):
                return None
            del self.posted[oldest]
        return address, key

    def _pieces_of(self, turn: int, length: int) -> list[tuple[int, int, int, int, bool]]:
        """Return (queue pair, begin, end, offset of the address, split) of each piece of a message."""
        out = []
        for number, pair in enumerate(self.pairs):
            pieces = layouts.queue_pair_pieces(self.layout, number, turn, np.array([length]))
            if len(pieces.index):
                begin, end = int(pieces.offset[0]), int(pieces.offset[0] + pieces.length[0])
                out.append((pair, begin, end, int(pieces.address[0]), bool(pieces.bulk_split[0])))
        return out

    def send(self, data: np.ndarray, address: int, key: int, steps: int) -> None:
        """Post one message."""
        layout = self.layout
        room = self.staging[self.step % layouts.SLOTS * self.stride :]
        length = wire.encode_into(layout.protocol, data, self.step, self.stale, room)
        if len(data):
            self.stale = data[-8:].tobytes().rjust(8, b"\x3c")
        immediate = length if layout.big_endian_immediate else int.from_bytes(length.to_bytes(4, "little"), "big")
        writes = []
        for pair, begin, end, offset, split in self._pieces(self.message % len(self.pairs), length):
            if split:
                self.nic.post(pair, address + offset, key, room[begin:end])
                writes.append((pair, self.nic.post(pair, 0, 0, room[:0], immediate)))
            else:
                writes.append((pair, self.nic.post(pair, address + offset, key, room[begin:end], immediate)))
        self.posted[self.message] = writes
        self.message += 1
        self.step += steps


class _Receiver:
    """The receiving end of a connection: its slots, and the credits that it gives."""

    def __init__(self, adapter: Adapter, layout: Layout, connection: wire.Connection) -> None:
        self.layout, self.connection, self.nic = layout, connection, adapter.nic
        self.form = struct.Struct(wire.credit_form(layout))
        self.stride = schedule.PROTOCOLS[layout.protocol].slot_bytes
        self.slots = np.zeros(layouts.SLOTS * self.stride, np.uint8)
        self.key = 0x1000 + connection.data_queue_pairs[0]
        self.nic.add_region(self.key, connection.base_address, self.slots)
        self.pairs = adapter.queue_pairs(
            connection.backward, connection.data_queue_pairs, connection.credit_queue_pairs, 0, connection.psn[0]
        )
        self.elements = np.zeros((_CREDITS_HELD, self.form.size), np.uint8)
        self.credits = self.message = self.step = self.credit_step = 0

    def give_credit(self, steps: int) -> None:
        """Tell the sender where the next message without a credit goes."""
        protocol = schedule.PROTOCOLS[self.layout.protocol]
        element = self.elements[self.credits % _CREDITS_HELD]
        slot = self.connection.base_address + self.credit_step % layouts.SLOTS * self.stride
        room = protocol.slot_bytes * protocol.slice_steps
        self.form.pack_into(element, 0, slot, room, self.key, 1, self.connection.rank, self.credits + 1)
        entries = 256 if self.layout.minor >= 19 else 64
        where = _FIFO_ADDRESS + self.credits % entries * wire.CREDIT_ELEMENTS * element.size
        self.nic.post(self.pairs[0], where, 0x2000 + self.connection.credit_queue_pairs[0], element)
        self.credits += 1
        self.credit_step += steps

    def take(self, size: int, steps: int) -> np.ndarray | None:
        """Return the data of the next message, `size` bytes, valid until the next credit; None as long as it is not there."""
        layout = self.layout
        if layout.splits:
            if any(self.nic.arrived(pair) <= self.message for pair in self.pairs):
                return None
        elif self.nic.arrived(self.pairs[self.message % len(self.pairs)]) <= self.message // len(self.pairs):
            return None
        data = wire.decode(layout.protocol, self.slots[self.step % layouts.SLOTS * self.stride :], size, self.step)
        self.message += 1
        self.step += steps
        return data


@dataclass(frozen=True)
class _Program:
    """One channel's part of a collective on one rank.

    `going` and `coming`: begin and end of each message's bytes in the vector. `needs`: per message that goes, how many
    must have come before. `adds`: per message that comes, whether it is a partial sum: the rank's own values are added.
    """

    going: list[tuple[int, int]]
    coming: list[tuple[int, int]]
    needs: list[int]
    adds: list[bool]

    @classmethod
    def of(cls, going: np.ndarray, coming: np.ndarray, count: int, width: int) -> _Program:
        """Return the program of messages (`schedule.MESSAGE`) over a vector of `count` elements of `width` bytes.

        A message passes on what has come of its elements: partial sums if it is one itself, else final ones, else the
        partial sums that the rank has just completed. What has not come at all is the rank's own.
        """
        came = {final: np.zeros(count, np.int64) for final in (False, True)}
        for number, (first, elements, final) in enumerate(coming.tolist(), 1):
            came[final][first : first + elements] = number
        came[True] = np.where(came[True], came[True], came[False])
        needs = [int(came[final][first : first + elements].max(initial=0)) for first, elements, final in going.tolist()]
        ranges = [
            [(first * width, (first + elements) * width) for first, elements, _ in messages.tolist()]
            for messages in (going, coming)
        ]
        return cls(*ranges, needs, (~coming["final"]).tolist())


class Messages(Protocol):
    """Which messages (`schedule.MESSAGE`) a connection carries of each collective, in the order sent."""

    def all_reduce(self, layout: Layout, edge: int, channel: int, count: int, width: int) -> np.ndarray:
        """Return those of `count` elements of `width` bytes."""

    def broadcast(self, layout: Layout, edge: int, channel: int, data_bytes: int, root: int) -> np.ndarray:
        """Return those of `data_bytes` bytes from a rank."""

    def all_gather(self, layout: Layout, edge: int, channel: int, data_bytes: int) -> np.ndarray:
        """Return those of `data_bytes` bytes of each rank."""


class _Channel:
    """One channel's part of an operation, in progress."""

    def __init__(
        self, sender: _Sender, receiver: _Receiver, program: _Program, steps: int, data: np.ndarray, add: _Add
    ) -> None:
        self.sender, self.receiver, self.program, self.steps = sender, receiver, program, steps
        self.data, self.add = data, add
        self.sent = self.taken = self.credited = 0
        self.ahead = layouts.SLOTS // steps

    @property
    def done(self) -> bool:
        return self.sent == len(self.program.going) and self.taken == len(self.program.coming)

    def advance(self) -> bool:
        """Do what can be done now; return whether that was anything."""
        before = self.sent + self.taken + self.credited
        going, coming, needs = self.program.going, self.program.coming, self.program.needs
        while self.credited < len(coming) and self.credited < self.taken + self.ahead:
            self.receiver.give_credit(self.steps)
            self.credited += 1
        while self.taken < len(coming):
            begin, end = coming[self.taken]
            received = self.receiver.take(end - begin, self.steps)
            if received is None:
                break
            if self.program.adds[self.taken]:
                self.add(begin, end, received)
            else:
                self.data[begin:end] = received
            self.taken += 1
        while self.sent < len(going) and needs[self.sent] <= self.taken:
            slot = self.sender.ready()
            if slot is None:
                break
            begin, end = going[self.sent]
            self.sender.send(self.data[begin:end], *slot, self.steps)
            self.sent += 1
        return self.sent + self.taken + self.credited != before


class FabricRing:
    """One rank's place on the ring, as `workload_gen.ring.Ring`, over an adapter.

    Args:
        layout: of the library, its ring in the order of ranks.
        rank: of this process.
        nic: the adapter.
        connections: of an edge, a channel each, as both ends know them (`workload_gen.wire.connections`).
        timeout_s: a collective in which nothing has moved for so long has failed.
        messages: which elements each message carries; `flowcheck.schedule`, or what has its three functions.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        nic: Nic,
        connections: Callable[[int], Iterable[wire.Connection]],
        timeout_s: float = 60.0,
        messages: Messages = schedule,
    ) -> None:
        self.layout, self.rank, self.size, self.timeout_s = layout, rank, len(layout.ring), timeout_s
        self._nic, self._messages = nic, messages
        # A job does the same few collectives all the time.
        self._programs = functools.lru_cache(maxsize=128)(self._programs_of)
        # An adapter answers whether or not its host is in a collective.
        self._using, self._closed = threading.Lock(), False
        self._service = threading.Thread(target=self._serve, name="adapter", daemon=True)
        adapter = Adapter(nic)
        self._senders = [_Sender(adapter, layout, c) for c in connections(rank)]
        self._receivers = [_Receiver(adapter, layout, c) for c in connections((rank - 1) % self.size)]
        self._service.start()

    def _serve(self) -> None:
        """Be the adapter while no collective runs: acknowledge, and repeat what got lost."""
        while not self._closed:
            self._nic.wait(_WAIT_US)
            with self._using:
                self._nic.progress()

    def _programs_of(self, op: str, count: int, argument: int) -> list[_Program]:
        """Return the program of each channel; `argument` is an all-reduce's width or a broadcast's root."""
        messages, previous = self._messages, (self.rank - 1) % self.size
        out = []
        for channel in (sender.connection.channel for sender in self._senders):
            if op == "all_gather":
                ends = [messages.all_gather(self.layout, edge, channel, count) for edge in (self.rank, previous)]
                out.append(_Program.of(*ends, self.size * count, 1))
            else:
                schedule_of = getattr(messages, op)
                ends = [schedule_of(self.layout, edge, channel, count, argument) for edge in (self.rank, previous)]
                out.append(_Program.of(*ends, count, argument if op == "all_reduce" else 1))
        return out

    def _run(self, op: str, programs: list[_Program], data: np.ndarray, add: _Add = _never) -> None:
        """Move an operation's channels until each has sent and got everything."""
        _, steps = layouts.first_step(self.layout, op, 0)
        left = []
        for sender, receiver, program in zip(self._senders, self._receivers, programs, strict=True):
            for end, messages in ((sender, program.going), (receiver, program.coming)):
                if messages:
                    end.step, _ = layouts.first_step(self.layout, op, end.step)
            receiver.credit_step = receiver.step
            left.append(_Channel(sender, receiver, program, steps, data, add))
        heard = time.monotonic()
        with self._using:
            while left:
                moved = False
                for channel in left:
                    moved |= channel.advance()
                left = [channel for channel in left if not channel.done]
                self._nic.progress(0 if moved else _WAIT_US)
                if moved:
                    heard = time.monotonic()
                elif time.monotonic() - heard > self.timeout_s:
                    raise ConnectionError(
                        f"rank {self.rank}: nothing has moved in a {op} for {self.timeout_s:g} seconds"
                    )

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""
        flat = tensor.view(-1)
        width = flat.element_size()

        def add(begin: int, end: int, received: np.ndarray) -> None:
            own = flat[begin // width : end // width]
            torch.add(own, torch.from_numpy(received).view(flat.dtype), out=own)

        self._run("all_reduce", self._programs("all_reduce", flat.numel(), width), _bytes(flat), add)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Give every rank the contiguous tensor of rank `root`."""
        data = _bytes(tensor.view(-1))
        self._run("broadcast", self._programs("broadcast", data.size, root), data)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the contiguous tensor of every rank, in the order of ranks."""
        size = tensor.nbytes
        data = np.zeros(self.size * size, np.uint8)
        data[self.rank * size : (self.rank + 1) * size] = _bytes(tensor.view(-1))
        self._run("all_gather", self._programs("all_gather", size, 0), data)
        whole = torch.from_numpy(data).view(tensor.dtype)
        return [part.view_as(tensor).clone() for part in whole.chunk(self.size)]

    def close(self, linger_s: float = 0.5) -> None:
        """Leave the ring, when all is acknowledged and nobody has asked anything for a while; the others may be gone already."""
        received, quiet = -1, time.monotonic()
        begin = quiet
        while time.monotonic() - quiet < linger_s and time.monotonic() - begin < _CLOSE_S:
            if not self._nic.idle() or self._nic.received != received:
                received, quiet = self._nic.received, time.monotonic()
            time.sleep(0.01)
        self._closed = True
        self._service.join()


def _bytes(flat: torch.Tensor) -> np.ndarray:
    """Return a flat tensor's memory as bytes."""
    return flat.detach().view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
