# SPDX-License-Identifier: MIT
"""Small jobs for fuzz targets: one stream that shows connections of every protocol, as tables, rings and slots.

Everything is made from the example of docs/plan.md, by our own code, when a target starts.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flowcheck import plan as plans
from flowcheck.layout import Program, compile_programs
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile

__all__ = ["MTU", "example", "image_of_ring", "image_of_slots", "programs", "reduced"]

#: The smallest there is: an input of a few hundred bytes then holds several packets.
MTU = 256
#: How connections differ: what the layout of each job says beside the example's.
_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"protocol": "ll"},
    {"protocol": "ll", "version": "2.29", "queue_pairs": 2, "split_queue_pairs": True, "adaptive_routing": True},
    {"protocol": "ll128", "version": "2.24"},
    {"protocol": "simple", "version": "2.30", "queue_pairs": 2},
    {"protocol": "simple", "adaptive_routing": True},
)
_PLAN = Path(__file__).parents[1] / "docs" / "plan.md"


def example() -> dict[str, Any]:
    """Return the document of the plan that docs/plan.md shows."""
    return json.loads(re.search(r"```json\n(.*?)```", _PLAN.read_text(), re.S)[1])


def reduced(**layout: Any) -> plans.Plan:
    """Return the example's job with another layout, each connection with as many queue pairs as that says."""
    document = copy.deepcopy(example())
    shard = document["shards"][0]
    shard["layout"] |= {"mtu": MTU, **layout}
    for number, connection in enumerate(shard["connections"]):
        count = layout.get("queue_pairs", 1)
        proof = connection["proof"]
        proof["data"] = [0x1000 * (number + 1) + n for n in range(count)]
        proof["credit"] = [0x1000 * (number + 1) + 0x100]
    return plans.parse(json.dumps(document))


def programs() -> list[Program]:
    """Return the tables of every connection of every job, no queue pair number twice."""
    out: list[Program] = []
    for job, layout in enumerate(_LAYOUTS):
        for program in compile_programs(reduced(**layout)):
            program.connection = len(out)
            program.data_queue_pairs = [0x10000 * (job + 1) + number for number in program.data_queue_pairs]
            program.credit_queue_pairs = [0x10000 * (job + 1) + number for number in program.credit_queue_pairs]
            out.append(program)
    return out


def image_of_ring(records: int) -> SimpleNamespace:
    """Return the bytes of a ring just made, and what a parser asks of a ring object beside them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ring"
        with PacketRing.create(path, frame_bytes=MTU + 192, records=records, identity=bytes(128), stream="s") as ring:
            facts = {name: getattr(ring, name) for name in ("header_bytes", "record_bytes", "records")}
            return SimpleNamespace(path=path, memory=bytes(ring.memory), **facts)


def image_of_slots(slots: int, gradient_bytes: int, initial_bytes: int, edges: int) -> SimpleNamespace:
    """Return the bytes of a slot file just made, and where its slots lie."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slots"
        rooms = {"gradient_bytes": gradient_bytes, "initial_bytes": initial_bytes, "edges": edges}
        with SlotFile.create(path, slots=slots, identity=bytes(128), **rooms) as file:
            return SimpleNamespace(memory=bytes(file.memory), initial=file.offset(0), gradients=file.offset(1))
