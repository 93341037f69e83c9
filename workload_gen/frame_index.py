# SPDX-License-Identifier: MIT
"""Which frame of a recorded link carries which bytes of which collective: the recorder's own account, for judges.

Beside `link-N.pcapng` stands `link-N.frames.npz`: `frames`, a row (FRAME) per data packet in the order of the file, and
`operations`, a row (OPERATION) per collective. Nothing in it comes from a parser: the one who writes a message notes
what it has written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path as FilePath
from types import ModuleType

import numpy as np
import torch

from flowcheck import schedule
from flowcheck.plan import Layout
from workload_gen.wire import Connection, LinkTap

__all__ = ["FRAME", "OPERATION", "IndexedTap", "index_path"]

#: Per data packet: its number in the file; the collective it is of; its message's number there and on the connection;
#: which elements' bytes [first, first + size) the message carries; where in the message's payload the packet lies;
#: whether the bytes are the collective's result (for a sum: fully reduced).
FRAME = np.dtype([
    ("frame", "<u4"), ("operation", "<u4"), ("message", "<u4"), ("number", "<u4"), ("channel", "<u2"), ("queue_pair", "<u2"),
    ("first", "<u8"), ("size", "<u4"), ("wire_offset", "<u4"), ("wire_bytes", "<u4"), ("final", "?"), ("same", "?"),
])  # fmt: skip
#: Per collective: its name, the bytes of its result and their SHA-256.
OPERATION = np.dtype([("op", "S16"), ("bytes", "<u8"), ("sha256", "V32")])


def index_path(capture: FilePath) -> FilePath:
    """Return where the index of a capture file lies."""
    return capture.with_name(f"{capture.stem}.frames.npz")


class IndexedTap(LinkTap):
    """A tap that also leaves the index of its capture file; arguments are those of LinkTap.

    `same` says of a message with a partial sum whether its bytes are the result's all the same (others added zeros).
    """

    def __init__(
        self, layout: Layout, links: list[Connection], path: FilePath, messages: ModuleType = schedule
    ) -> None:
        super().__init__(layout, links, path, messages)
        self._path, self._written = index_path(path), 0
        self._frames: list[tuple] = []
        self._operations: list[tuple] = []
        self._places: dict[int, Iterator[tuple]] = {}
        self._message: tuple = ()
        self._at = 0

    def all_reduce(self, partial: torch.Tensor, result: torch.Tensor) -> None:
        """Record an all-reduce."""
        width = result.element_size()
        bodies = [vector.view(torch.uint8).numpy() for vector in (partial, result)]
        per_link = []
        for link in self._links:
            messages = self._messages.all_reduce(self._layout, link.edge, link.channel, result.numel(), width)
            places = []
            for number, (first, elements, final) in enumerate(messages.tolist()):
                begin, end = first * width, (first + elements) * width
                places.append(
                    (number, begin, end - begin, final, bool((bodies[0][begin:end] == bodies[1][begin:end]).all()))
                )
            per_link.append(places)
        self._note("all_reduce", bodies[1].tobytes(), per_link)
        super().all_reduce(partial, result)

    def _bytes(self, op: str, data: bytes, per_link: list[np.ndarray]) -> None:
        places = [
            [(number, first, count, True, True) for number, (first, count, _) in enumerate(messages.tolist())]
            for messages in per_link
        ]
        self._note(op, data, places)
        super()._bytes(op, data, per_link)

    def _note(self, op: str, result: bytes, per_link: list[list[tuple]]) -> None:
        if self.recording:
            self._operations.append((op.encode(), len(result), np.void(hashlib.sha256(result).digest())))
            self._places = {id(link): iter(places) for link, places in zip(self._links, per_link, strict=True)}

    def _send(self, link: Connection, data: bytes) -> None:
        self._message, self._at = next(self._places[id(link)]), 0
        super()._send(link, data)

    def _data(self, link: Connection, number: int, opcode: int, extended: bytes, payload: bytes) -> None:
        message, first, size, final, same = self._message
        row = (self._written, len(self._operations) - 1, message, link.messages, link.channel, number)
        self._frames.append((*row, first, size, self._at, len(payload), final, same))
        self._at += len(payload)
        super()._data(link, number, opcode, extended, payload)

    def _write(self, written: list[bytes]) -> None:
        self._written += len(written)
        super()._write(written)

    def close(self) -> None:
        """Close the capture file and write its index."""
        super().close()
        frames, operations = np.array(self._frames, FRAME), np.array(self._operations, OPERATION)
        np.savez(self._path, frames=frames, operations=operations)
