# SPDX-License-Identifier: MIT
"""A ring of processes that does the library's collectives: the same schedule, so the same sums, bit for bit.

Each rank holds a socket to the next one. A ring all-reduce adds in a fixed order: chunk c begins at ring position c+1,
every hop adds its own value and rounds to the dtype. Data moves here a whole send at a time, over all channels and
loops together, since that changes no sum; what one link would have shown, message by message, is the tap's to write.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import socket
import struct
import tempfile
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.distributed import Store

from flowcheck import schedule
from flowcheck.plan import Layout

__all__ = ["Ring", "Tap"]

_LENGTH = struct.Struct("<Q")


class Tap(Protocol):
    """Sees each collective of one rank, as it leaves on the edge to the next one."""

    def all_reduce(self, partial: torch.Tensor, result: torch.Tensor) -> None:
        """Take the vectors of which messages that are not final, and those that are, carry their parts."""

    def broadcast(self, data: bytes, root: int) -> None:
        """Take a broadcast's bytes."""

    def all_gather(self, data: bytes, part_bytes: int) -> None:
        """Take the gathered bytes; each rank's part has `part_bytes`."""


class Ring:
    """One rank's place on the ring; every rank must call the same collectives in the same order.

    Args:
        layout: of the library, its ring in the order of ranks.
        rank: of this process.
        store: where the ranks find each other.
        tap: told of each collective after it is done.
    """

    def __init__(self, layout: Layout, rank: int, store: Store, tap: Tap | None = None) -> None:
        self.layout, self.rank, self.size, self.tap = layout, rank, len(layout.ring), tap
        # A job does the same few collectives all the time.
        self._chunks = functools.lru_cache(maxsize=128)(self._chunks_of)
        self._outgoing: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        with tempfile.TemporaryDirectory(prefix="flowcheck-ring-") as folder:
            path = str(Path(folder) / "next")
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen(1)
                store.set(f"ring-{rank}", path)
                self._next = socket.socket(socket.AF_UNIX)
                self._next.connect(store.get(f"ring-{(rank + 1) % self.size}").decode())
                self._previous, _ = listener.accept()
            store.set(f"ring-{rank}-joined", "1")
            store.wait([f"ring-{other}-joined" for other in range(self.size)])
        # A send must not wait for the neighbour to read: he may be waiting for his own.
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def _write(self) -> None:
        while (data := self._outgoing.get()) is not None:
            try:
                self._next.sendall(_LENGTH.pack(len(data)))
                self._next.sendall(data)
            except OSError:
                return  # the neighbour is gone; the reader says so

    def _send(self, data: np.ndarray) -> None:
        self._outgoing.put(memoryview(np.ascontiguousarray(data)))

    def _receive(self, room: np.ndarray) -> None:
        """Fill an array of bytes from the previous rank; ConnectionError if that one is gone."""
        view = memoryview(room)
        for part in (memoryview(head := bytearray(_LENGTH.size)), view):
            while len(part):
                count = self._previous.recv_into(part)
                if not count:
                    raise self._broken("has left the ring")
                part = part[count:]
        if _LENGTH.unpack(head)[0] != len(view):
            raise self._broken(f"does another collective than rank {self.rank}")

    def _broken(self, what: str) -> ConnectionError:
        """Tell the next rank that the ring is broken, or it would wait; return what to raise."""
        with contextlib.suppress(OSError):
            self._next.shutdown(socket.SHUT_RDWR)
        return ConnectionError(f"rank {(self.rank - 1) % self.size} {what}")

    def _chunks_of(self, count: int, width: int) -> list[list[slice]]:
        """Return per chunk number where its elements lie, over all channels and loops."""
        slices = schedule.PROTOCOLS[self.layout.protocol].slices
        chunks: list[list[slice]] = []
        for number in range(self.size):
            chunks.append([])
            for channel in range(self.layout.channels):
                # The first fully reduced chunk that position c sends in a loop is chunk c.
                messages = schedule.all_reduce(self.layout, number, channel, count, width)
                loops = messages.reshape(-1, 2 * (self.size - 1), slices)
                for first, elements, _ in loops[:, self.size - 1].ravel().tolist():
                    if elements:
                        chunks[-1].append(slice(first, first + elements))
        covered = sum(part.stop - part.start for chunk in chunks for part in chunk)
        if covered != count:
            raise AssertionError(f"the chunks hold {covered} of {count} elements")
        return chunks

    def _settle(self) -> None:
        """Wait until every rank's tap has written: no trainer is ahead of what a mirror would have shown it to get."""
        for _ in range(self.size - 1):
            self._send(np.empty(0, np.uint8))
            self._receive(np.empty(0, np.uint8))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""
        own = tensor.view(-1).clone()
        chunks = self._chunks(own.numel(), own.element_size())
        partial, result = own.clone(), torch.empty_like(own)
        for send in range(2 * (self.size - 1)):
            source = partial if send < self.size - 1 else result
            self._send(_bytes(_joined(source, chunks[(self.rank - 1 - send) % self.size])))
            chunk = chunks[(self.rank - 2 - send) % self.size]
            received = torch.empty(sum(part.stop - part.start for part in chunk), dtype=own.dtype)
            self._receive(_bytes(received))
            target = partial if send < self.size - 2 else result
            begin = 0
            for part in chunk:
                end = begin + part.stop - part.start
                target[part] = own[part] + received[begin:end] if send < self.size - 1 else received[begin:end]
                begin = end
        tensor.view(-1).copy_(result)
        if self.tap:
            self.tap.all_reduce(partial, result)
        self._settle()

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Give every rank the contiguous tensor of rank `root`."""
        data = _bytes(tensor.view(-1))
        if self.rank != root:
            self._receive(data)
        if (self.rank + 1) % self.size != root:
            self._send(data.copy())
        if self.tap:
            self.tap.broadcast(data.tobytes(), root)
        self._settle()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the contiguous tensor of every rank, in the order of ranks."""
        parts: list[torch.Tensor] = [
            tensor.clone() if rank == self.rank else torch.empty_like(tensor) for rank in range(self.size)
        ]
        for send in range(self.size - 1):
            self._send(_bytes(parts[(self.rank - send) % self.size].view(-1)).copy())
            self._receive(_bytes(parts[(self.rank - send - 1) % self.size].view(-1)))
        if self.tap:
            self.tap.all_gather(b"".join(_bytes(part.view(-1)).tobytes() for part in parts), tensor.nbytes)
        self._settle()
        return parts

    def close(self) -> None:
        """Leave the ring, when everything sent has left."""
        self._outgoing.put(None)
        self._writer.join()
        self._next.close()
        self._previous.close()


def _joined(flat: torch.Tensor, parts: list[slice]) -> torch.Tensor:
    """Return a copy of the elements of some parts, one after another."""
    return torch.cat([flat[:0], *(flat[part] for part in parts)])


def _bytes(flat: torch.Tensor) -> np.ndarray:
    """Return a flat tensor's memory as bytes."""
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
