# SPDX-License-Identifier: MIT
"""The extractor stage: annotated packet rings into gradient slots."""

from __future__ import annotations

from typing import Any

import numpy as np
from flowcheck._copy import CopyEngine

from data_extractor._extractor import ExtractLoop
from flowcheck.formats import DUMP_STATE, RING_HEADER
from flowcheck.layout import carried
from flowcheck.plan import Plan
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from flowcheck.verdicts import COUNTERS, VERDICTS

__all__ = ["Extractor"]


class Extractor:
    """Puts payload bytes where they belong and says when an iteration is whole; polled like every stage.

    Args:
        rings: the packet rings of the plan's streams, in any order.
        plan: the job plan.
        slots: the slot file.
        engine: copies plain payloads; the CPU if none is given. LL lines are always stripped by the CPU.
        kernel: which LL kernel: "auto", "scalar", "avx2" or "avx512".
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
            (revision.from_iteration, revision.slot_ranges, _bits(carried(plan, revision.from_iteration)))
            for revision in plan.shard.revisions
        ]
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
        per_stream = {}
        for ring, (verdicts, engine_bytes, engine_failed) in zip(self._rings, self._loop.states(), strict=True):
            dump = _dump_state(ring)
            row = dict.fromkeys(COUNTERS, 0)
            row.update(zip(VERDICTS[1:], verdicts[1:], strict=True))
            row["dropped_ring_full"], row["missed_by_port"] = dump["dropped_ring_full"], dump["missed_by_port"]
            row["received"] = dump["written"] + dump["dropped_ring_full"]
            row["engine_bytes"] = {"dump": dump["engine_bytes"], "extract": engine_bytes}
            row["engine_failed"] = {"dump": dump["engine_failed"], "extract": engine_failed}
            per_stream[ring.stream] = row
        totals: dict[str, Any] = {name: sum(row[name] for row in per_stream.values()) for name in COUNTERS}
        for name in ("engine_bytes", "engine_failed"):
            totals[name] = {
                stage: sum(row[name][stage] for row in per_stream.values()) for stage in ("dump", "extract")
            }
        return {**totals, "per_stream": per_stream}

    def close(self) -> None:
        """Give the engine back."""
        if self._owns_engine:
            self._engine.close()


def _bits(numbers: list[int]) -> int:
    return sum(1 << number for number in numbers)


def _dump_state(ring: PacketRing) -> dict[str, int]:
    """Return the dump's newest published state; zeros if there is none."""
    header = np.frombuffer(ring.memory, RING_HEADER, 1)[0]
    best, state = 0, np.zeros((), DUMP_STATE)
    for copy in range(2):
        offset = int(header["dump_state_offset"]) + copy * int(header["dump_state_bytes"])
        sequence = int(np.frombuffer(ring.memory, "<u8", 1, offset)[0])
        if sequence > best:
            best, state = sequence, np.frombuffer(ring.memory, DUMP_STATE, 1, offset + 8)[0].copy()
    return {name: int(state[name]) for name in DUMP_STATE.names}
