# SPDX-License-Identifier: MIT
"""The `packets` document of commands.md, read from the state that the stages publish in their rings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flowcheck.formats import DUMP_STATE, EXTRACT_STATE, PARSE_COUNTS, RING_HEADER
from flowcheck.ring import PacketRing
from flowcheck.verdicts import COUNTERS, VERDICTS

__all__ = ["dump_state", "extract_state", "packet_counters", "parse_counts"]


def _published(ring: PacketRing, stage: str, dtype: np.dtype) -> np.void:
    """Return the newest state that a stage has published whole; zeros if there is none."""
    header = np.frombuffer(ring.memory, RING_HEADER, 1)[0]
    offset, size = int(header[f"{stage}_state_offset"]), int(header[f"{stage}_state_bytes"])
    while True:
        best, state = 0, np.zeros((), dtype)[()]
        for copy in range(2):
            at = offset + copy * size
            sequence = int(np.frombuffer(ring.memory, "<u8", 1, at)[0])
            if sequence > best:
                best, state = sequence, np.frombuffer(ring.memory, dtype, 1, at + 8)[0].copy()
                where = at
        if best == 0 or int(np.frombuffer(ring.memory, "<u8", 1, where)[0]) == best:
            return state  # not written over while it was read


def dump_state(ring: PacketRing) -> np.void:
    """Return the dump's newest state, a record of DUMP_STATE."""
    return _published(ring, "dump", DUMP_STATE)


def parse_counts(ring: PacketRing) -> np.void:
    """Return the parser's newest counters, a record of PARSE_COUNTS."""
    return _published(ring, "parse", PARSE_COUNTS)


def extract_state(ring: PacketRing) -> np.void:
    """Return the extractor's newest state on a ring, a record of EXTRACT_STATE."""
    return _published(ring, "extract", EXTRACT_STATE)


def packet_counters(rings: Iterable[PacketRing]) -> dict[str, Any]:
    """Return the verdicts on all packets of some streams, in all and per stream, and what a DMA engine copied.

    While the stages run, what is in a ring has been received and has no verdict yet.
    """
    per_stream = {}
    for ring in rings:
        dump, extract = dump_state(ring), extract_state(ring)
        row: dict[str, Any] = dict.fromkeys(COUNTERS, 0)
        row.update((name, int(count)) for name, count in zip(VERDICTS[1:], extract["counters"][1:], strict=False))
        row["dropped_ring_full"], row["missed_by_port"] = int(dump["dropped_ring_full"]), int(dump["missed_by_port"])
        row["received"] = int(dump["written"]) + row["dropped_ring_full"]
        for name in ("engine_bytes", "engine_failed"):
            row[name] = {"dump": int(dump[name]), "extract": int(extract[name])}
        per_stream[ring.stream] = row
    totals: dict[str, Any] = {name: sum(row[name] for row in per_stream.values()) for name in COUNTERS}
    for name in ("engine_bytes", "engine_failed"):
        totals[name] = {stage: sum(row[name][stage] for row in per_stream.values()) for stage in ("dump", "extract")}
    return {**totals, "per_stream": per_stream}
