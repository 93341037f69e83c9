# SPDX-License-Identifier: MIT
"""The extractor stage: annotated packet rings into gradient slots."""

from __future__ import annotations

from typing import Any

from flowcheck._copy import CopyEngine

from data_extractor._extractor import ExtractLoop
from flowcheck.counters import packet_counters
from flowcheck.layout import carried
from flowcheck.plan import Plan
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile

__all__ = ["Extractor"]


class Extractor:
    """Puts payload bytes where they belong and says when an iteration is whole; polled like every stage.

    Args:
        rings: the packet rings of the plan's streams, in any order.
        plan: the job plan.
        slots: the slot file.
        engine: copies plain payloads that are new; the CPU if none is given. Lines are always stripped, and second copies compared, by the CPU.
        kernel: whose instructions place payloads: "auto", "scalar" or "avx2".
    """

    def __init__(
        self,
        rings: list[PacketRing],
        plan: Plan,
        slots: SlotFile,
        engine: CopyEngine | None = None,
        kernel: str = "auto",
    ) -> None:
        self._rings, self._slots = rings, slots
        self._engine, self._owns_engine = engine or CopyEngine(), engine is None
        for memory in (*(ring.memory for ring in rings), slots.memory):
            self._engine.register(memory)
        shown = [_bits(plan.shard.stream_connections(ring.stream)) for ring in rings]
        revisions = [
            (
                revision.from_iteration,
                plan.slot_pieces(revision),
                len(revision.buckets),
                _bits(carried(plan, revision.from_iteration)),
            )
            for revision in plan.shard.revisions
        ]
        edges = plan.shard.mirrored_edges
        places = [edges.index(c.edge) if c.edge in edges else 0 for c in plan.shard.connections]
        self._loop = ExtractLoop(
            rings,
            [ring.memory for ring in rings],
            shown,
            slots.memory,
            slots.offset(0) if slots.initial_bytes else 0,
            slots.offset(1),
            revisions,
            plan.initial_ranges,
            _bits(carried(plan, 0)),
            places,
            plan.silence_ms * 1_000_000,
            self._engine,
            kernel,
        )

    def poll(self) -> int:
        """Do one burst of each ring; return how many records and iterations were done."""
        return self._loop.poll()

    @property
    def finished(self) -> bool:
        """Whether every stream is over and everything seen of it is decided."""
        return self._slots.ended

    def counters(self) -> dict[str, Any]:
        """Return the `packets` document of commands.md, with what a DMA engine copied beside it."""
        return packet_counters(self._rings)

    def close(self) -> None:
        """Give the engine back."""
        if self._owns_engine:
            self._engine.close()


def _bits(numbers: list[int]) -> int:
    return sum(1 << number for number in numbers)
