# SPDX-License-Identifier: MIT
"""A ring schedule that no library has: what is on the wire can then only be learned from the wire.

Everything that `flowcheck.schedule` knows of a library is drawn by lot here: where a vector is cut, which channel a piece
goes over and how much a channel carries, at which rank a piece's sum begins, in which order pieces leave, and how each
hop cuts a piece into messages. It is a ring all the same: a piece takes 2(n-1) hops from edge to edge, n-1 of them with
partial sums. A piece's hops have increasing moments and every edge sends in the order of moments, so nothing can wait in
a circle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from flowcheck.plan import Layout
from flowcheck.schedule import MESSAGE, PROTOCOLS

__all__ = ["PermutedSchedule"]

#: Cuts are at multiples of this: a gradient slot's coverage is not finer, and libraries cut no finer either.
_GRAIN_BYTES = 16

_Region = tuple[int, int, int | None]
_Table = dict[tuple[int, int], np.ndarray]


def _cuts(chance: np.random.Generator, first: int, count: int, grain: int, longest: int) -> Iterator[tuple[int, int]]:
    """Cut `count` elements from `first` on into (first, elements) of at most `longest`, and half of that but for the last."""
    most = max(1, longest // grain)
    end = first + count
    while first < end:
        elements = min(grain * int(chance.integers((most + 1) // 2, most + 1)), end - first)
        yield first, elements
        first += elements


class PermutedSchedule:
    """The messages of collectives, for `FabricRing(messages=...)`; equal seeds give equal schedules on every rank."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._table = functools.lru_cache(maxsize=128)(self._table_of)

    def all_reduce(self, layout: Layout, edge: int, channel: int, count: int, width: int) -> np.ndarray:
        """Return the messages of an all-reduce of `count` elements of `width` bytes on one connection, in the order sent."""
        protocol = PROTOCOLS[layout.protocol]
        most = protocol.chunk_bytes // protocol.slices
        return self._of(layout, edge, channel, ((0, count, None),), width, most, 2)

    def broadcast(self, layout: Layout, edge: int, channel: int, data_bytes: int, root: int) -> np.ndarray:
        """Return the messages of a broadcast from rank `root`, in bytes; none on the edge that leads into it."""
        region = (0, data_bytes, layout.ring.index(root))
        return self._of(layout, edge, channel, (region,), 1, PROTOCOLS[layout.protocol].root_chunk_bytes, 1)

    def all_gather(self, layout: Layout, edge: int, channel: int, data_bytes: int) -> np.ndarray:
        """Return the messages of an all-gather of `data_bytes` per rank, in bytes of the gathered vector."""
        protocol = PROTOCOLS[layout.protocol]
        regions = tuple((rank * data_bytes, data_bytes, position) for position, rank in enumerate(layout.ring))
        return self._of(layout, edge, channel, regions, 1, protocol.chunk_bytes // protocol.slices, 1)

    def _of(
        self, layout: Layout, edge: int, channel: int, regions: tuple[_Region, ...], width: int, most: int, rounds: int
    ) -> np.ndarray:
        table = self._table(len(layout.ring), layout.channels, regions, width, most // width, rounds)
        return table.get((edge, channel), np.empty(0, MESSAGE))

    def _table_of(
        self, ranks: int, channels: int, regions: tuple[_Region, ...], width: int, most: int, rounds: int
    ) -> _Table:
        """Return the messages of each (edge, channel).

        Args:
            ranks: on the ring.
            channels: of it.
            regions: (first, elements, edge that they leave on first; None: any).
            width: bytes of an element.
            most: elements in a message.
            rounds: that a piece makes, each over all edges but one; only the last has final values.
        """
        numbers = [
            self.seed,
            ranks,
            channels,
            width,
            most,
            rounds,
            *(number or 0 for part in regions for number in part),
        ]
        chance = np.random.default_rng(numbers)
        shares = chance.dirichlet(np.ones(channels))
        grain = max(1, _GRAIN_BYTES // width)
        pieces = [
            (first, elements, start)
            for begin, count, start in regions
            for first, elements in _cuts(chance, begin, count, grain, min(2 * most, count // (ranks * channels)))
        ]
        sent: dict[tuple[int, int], list[tuple[float, int, int, bool]]] = {}
        for first, elements, start in pieces:
            channel = int(chance.choice(channels, p=shares))
            edge = int(chance.integers(ranks)) if start is None else start
            moment = chance.uniform(0, len(pieces))
            for hop in range(rounds * (ranks - 1)):
                messages = sent.setdefault(((edge + hop) % ranks, channel), [])
                slices = list(_cuts(chance, first, elements, grain, min(most, elements * 2 // 3)))
                for part in chance.permutation(len(slices)):
                    moment += chance.uniform(0.1, 1)
                    messages.append((moment, *slices[part], hop >= (rounds - 1) * (ranks - 1)))
        return {where: np.array([message[1:] for message in sorted(found)], MESSAGE) for where, found in sent.items()}
