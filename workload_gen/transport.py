# SPDX-License-Identifier: MIT
"""The ring over real frames: every collective goes message by message through queue pairs, credits and slots.

`workload_gen.ring` has the same sums without a network; here each message of the library's schedule is a write into one
of the eight slots of its connection, sent when the receiver's credit has come (nccl src/transport/net_ib.cc), so what a
switch mirrors is what carries the training.
"""

from __future__ import annotations

import ipaddress
import struct
import threading
import time
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np
import torch

from flowcheck import layout as layouts
from flowcheck import schedule
from flowcheck.plan import Layout
from workload_gen import frames, wire
from workload_gen._nic import Nic

__all__ = ["Adapter", "FabricRing"]

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
        self.form = wire.credit_form(layout)
        self.entries = 256 if layout.minor >= 19 else 64
        self.fifo = np.zeros(self.entries * wire.CREDIT_ELEMENTS * struct.calcsize(self.form), np.uint8)
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

    def ready(self) -> tuple[int, int] | None:
        """Return (address, key) of the slot for the next message; None as long as there is no credit, or no room."""
        at = self.message % self.entries * wire.CREDIT_ELEMENTS * struct.calcsize(self.form)
        address, _, key, _, _, index = struct.unpack_from(self.form, self.fifo, at)
        if index != self.message + 1:
            return None
        oldest = self.message - layouts.SLOTS
        if oldest in self.posted:
            if any(self.nic.completed(pair) <= number for pair, number in self.posted[oldest]):
                return None
            del self.posted[oldest]
        return address, key

    def send(self, data: np.ndarray, address: int, key: int, steps: int) -> None:
        """Post one message."""
        layout = self.layout
        room = self.staging[self.step % layouts.SLOTS * self.stride :]
        length = wire.encode_into(layout.protocol, data, self.step, self.stale, room)
        if len(data):
            self.stale = data[-8:].tobytes().rjust(8, b"\x3c")
        immediate = length if layout.big_endian_immediate else int.from_bytes(length.to_bytes(4, "little"), "big")
        writes = []
        for number, pair in enumerate(self.pairs):
            pieces = layouts.queue_pair_pieces(layout, number, self.message, np.array([length]))
            if not len(pieces.index):
                continue
            offset, count = int(pieces.offset[0]), int(pieces.length[0])
            piece, target = room[offset : offset + count], address + int(pieces.address[0])
            if pieces.bulk_split[0]:
                self.nic.post(pair, target, key, piece)
                writes.append((pair, self.nic.post(pair, 0, 0, room[:0], immediate)))
            else:
                writes.append((pair, self.nic.post(pair, target, key, piece, immediate)))
        self.posted[self.message] = writes
        self.message += 1
        self.step += steps


class _Receiver:
    """The receiving end of a connection: its slots, and the credits that it gives."""

    def __init__(self, adapter: Adapter, layout: Layout, connection: wire.Connection) -> None:
        self.layout, self.connection, self.nic = layout, connection, adapter.nic
        self.form = wire.credit_form(layout)
        self.stride = schedule.PROTOCOLS[layout.protocol].slot_bytes
        self.slots = np.zeros(layouts.SLOTS * self.stride, np.uint8)
        self.key = 0x1000 + connection.data_queue_pairs[0]
        self.nic.add_region(self.key, connection.base_address, self.slots)
        self.pairs = adapter.queue_pairs(
            connection.backward, connection.data_queue_pairs, connection.credit_queue_pairs, 0, connection.psn[0]
        )
        self.elements = np.zeros((_CREDITS_HELD, struct.calcsize(self.form)), np.uint8)
        self.credits = self.message = self.step = self.credit_step = 0

    def give_credit(self, steps: int) -> None:
        """Tell the sender where the next message without a credit goes."""
        protocol = schedule.PROTOCOLS[self.layout.protocol]
        element = self.elements[self.credits % _CREDITS_HELD]
        slot = self.connection.base_address + self.credit_step % layouts.SLOTS * self.stride
        room = protocol.slot_bytes * protocol.slice_steps
        struct.pack_into(self.form, element, 0, slot, room, self.key, 1, self.connection.rank, self.credits + 1)
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


class _Channel:
    """One channel's part of an operation, in progress."""

    def __init__(
        self,
        sender: _Sender,
        receiver: _Receiver,
        sizes: tuple[list[int], list[int]],
        steps: int,
        needs: list[int],
        source: Callable[[int], np.ndarray],
        deliver: Callable[[int, np.ndarray], None],
    ) -> None:
        self.sender, self.receiver, self.steps = sender, receiver, steps
        self.sizes_out, self.sizes_in = sizes
        self.needs, self.source, self.deliver = needs, source, deliver
        self.sent = self.taken = self.credited = 0
        self.ahead = layouts.SLOTS // steps

    @property
    def done(self) -> bool:
        return self.sent == len(self.sizes_out) and self.taken == len(self.sizes_in)

    def advance(self) -> bool:
        """Do what can be done now; return whether that was anything."""
        before = self.sent + self.taken + self.credited
        while self.credited < len(self.sizes_in) and self.credited < self.taken + self.ahead:
            self.receiver.give_credit(self.steps)
            self.credited += 1
        while self.taken < len(self.sizes_in):
            data = self.receiver.take(self.sizes_in[self.taken], self.steps)
            if data is None:
                break
            self.deliver(self.taken, data)
            self.taken += 1
        while self.sent < len(self.sizes_out) and self.needs[self.sent] <= self.taken:
            slot = self.sender.ready()
            if slot is None:
                break
            self.sender.send(self.source(self.sent), *slot, self.steps)
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
        messages: which elements each message carries; a module like `flowcheck.schedule`.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        nic: Nic,
        connections: Callable[[int], Iterable[wire.Connection]],
        timeout_s: float = 60.0,
        messages: ModuleType = schedule,
    ) -> None:
        self.layout, self.rank, self.size, self.timeout_s = layout, rank, len(layout.ring), timeout_s
        self._nic, self._messages = nic, messages
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

    def _run(self, op: str, channels: list[_Channel]) -> None:
        """Move an operation's channels until each has sent and got everything."""
        heard = time.monotonic()
        left = channels
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

    def _channels(
        self,
        op: str,
        schedules: Callable[[int, int], np.ndarray],
        width: int,
        needs: Callable[[int], list[int]],
        source: Callable[[np.void, int], np.ndarray],
        deliver: Callable[[np.void, int, np.ndarray], None],
    ) -> list[_Channel]:
        """Return the channels that take part in an operation.

        `schedules` gives the messages of (edge, channel), `needs` per message how many must have come before; `source`
        and `deliver` take a message and its number.
        """
        out = []
        _, steps = layouts.first_step(self.layout, op, 0)
        for sender, receiver in zip(self._senders, self._receivers, strict=True):
            channel = sender.connection.channel
            going, coming = schedules(self.rank, channel), schedules((self.rank - 1) % self.size, channel)
            for end, messages in ((sender, going), (receiver, coming)):
                if len(messages):
                    end.step, _ = layouts.first_step(self.layout, op, end.step)
            receiver.credit_step = receiver.step
            sizes = [(messages["elements"] * width).tolist() for messages in (going, coming)]
            out.append(
                _Channel(
                    sender, receiver, tuple(sizes), steps, needs(len(going)),
                    lambda number, going=going: source(going[number], number),
                    lambda number, data, coming=coming: deliver(coming[number], number, data),
                )
            )  # fmt: skip
        return out

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""
        own = tensor.view(-1)
        width, sends = own.element_size(), 2 * (self.size - 1)
        slices = schedule.PROTOCOLS[self.layout.protocol].slices
        partial, result = own.clone(), torch.empty_like(own)
        bodies = [_bytes(partial), _bytes(result)]

        def source(message: np.void, number: int) -> np.ndarray:
            begin = int(message["first"]) * width
            final = number // slices % sends >= self.size - 1
            return bodies[final][begin : begin + int(message["elements"]) * width]

        def deliver(message: np.void, number: int, data: np.ndarray) -> None:
            send = number // slices % sends
            begin, end = int(message["first"]), int(message["first"] + message["elements"])
            if begin == end:
                return
            received = torch.from_numpy(data).view(own.dtype)
            if send >= self.size - 1:
                result[begin:end] = received
            else:
                torch.add(own[begin:end], received, out=(partial if send < self.size - 2 else result)[begin:end])

        def needs(count: int) -> list[int]:
            loop = sends * slices
            # A send of a loop's first wave is the rank's own; any other passes on what came one wave before.
            return [0 if number % loop < slices else number - slices + 1 for number in range(count)]

        channels = self._channels(
            "all_reduce",
            lambda edge, channel: self._messages.all_reduce(self.layout, edge, channel, own.numel(), width),
            width, needs, source, deliver,
        )  # fmt: skip
        self._run("all-reduce", channels)
        own.copy_(result)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Give every rank the contiguous tensor of rank `root`."""
        data = _bytes(tensor.view(-1))

        def deliver(message: np.void, _: int, received: np.ndarray) -> None:
            data[int(message["first"]) : int(message["first"] + message["elements"])] = received

        channels = self._channels(
            "broadcast",
            lambda edge, channel: self._messages.broadcast(self.layout, edge, channel, data.size, root),
            1,
            lambda count: [0 if self.rank == root else number + 1 for number in range(count)],
            lambda message, _: data[int(message["first"]) : int(message["first"] + message["elements"])],
            deliver,
        )
        self._run("broadcast", channels)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the contiguous tensor of every rank, in the order of ranks."""
        size = tensor.nbytes
        data = np.zeros(self.size * size, np.uint8)
        data[self.rank * size : (self.rank + 1) * size] = _bytes(tensor.view(-1))
        slices = schedule.PROTOCOLS[self.layout.protocol].slices
        loop = (self.size - 1) * slices

        def deliver(message: np.void, _: int, received: np.ndarray) -> None:
            data[int(message["first"]) : int(message["first"] + message["elements"])] = received

        channels = self._channels(
            "all_gather",
            lambda edge, channel: self._messages.all_gather(self.layout, edge, channel, size),
            1,
            lambda count: [0 if number % loop < slices else number - slices + 1 for number in range(count)],
            lambda message, _: data[int(message["first"]) : int(message["first"] + message["elements"])],
            deliver,
        )
        self._run("all-gather", channels)
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
