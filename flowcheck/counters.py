# SPDX-License-Identifier: MIT
"""The `packets` document of commands.md, read from the state that the stages publish in their rings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flowcheck import _atomics
from flowcheck.formats import DUMP_STATE, EXTRACT_STATE, PARSE_COUNTS, RING_HEADER
from flowcheck.ring import PacketRing
from flowcheck.verdicts import COUNTERS, VERDICTS

__all__ = ["dump_state", "extract_state", "packet_counters", "parse_counts"]


def _published(ring: PacketRing, stage: str, cursor: str, dtype: np.dtype) -> np.void:
    """Return the newest state that a stage has published, which it does before it moves its cursor; zeros if there is none."""
    header = np.frombuffer(ring.memory, RING_HEADER, 1)[0]
    block, copy_bytes = int(header[f"{stage}_state_offset"]), int(header[f"{stage}_state_bytes"])
    while True:
        begun = getattr(ring, cursor)
        state = _atomics.published(ring.memory, block, copy_bytes, dtype.itemsize)
        if state is not None or not begun:
            return np.frombuffer(state or bytes(dtype.itemsize), dtype)[0]


def dump_state(ring: PacketRing) -> np.void:
    """Return the dump's newest state, a record of DUMP_STATE."""
    return _published(ring, "dump", "written", DUMP_STATE)


def parse_counts(ring: PacketRing) -> np.void:
    """Return the parser's newest counters, a record of PARSE_COUNTS."""
    return _published(ring, "parse", "parsed", PARSE_COUNTS)


def extract_state(ring: PacketRing) -> np.void:
    """Return the extractor's newest state on a ring, a record of EXTRACT_STATE."""
    return _published(ring, "extract", "extracted", EXTRACT_STATE)


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
