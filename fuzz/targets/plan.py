# SPDX-License-Identifier: MIT
"""Input: a JSON text, or edits on a plan. Only a plan comes out, or a ConfigError; and a plan means the same, written again."""

from __future__ import annotations

import itertools
import json
import zlib
from functools import cache
from typing import Any

from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from fuzz.documents import Document, fresh, value
from fuzz.fixture import example

__all__ = ["one", "seeds"]


def _with_record() -> dict[str, Any]:
    document = example()
    document["shards"][0]["step_record"] = {
        "contributor": 1, "extra": [{"name": "seen", "dtype": "int64", "shape": []}], "audit": {"every": 3, "groups": 2},
    }  # fmt: skip
    document["state"].append({"key": "seen", "kind": "extra", "dtype": "int64", "shape": []})
    document["initial_state"] = {"source": "file", "path": "initial.pt"}
    document["shards"][0]["startup"] = []
    document["optimizer"]["groups"][0]["varying"] = ["lr"]
    document["checkpoints"] = {"snapshot_iterations": 10, "retention": {"last_iterations": 5}}
    return document


def _resumed() -> dict[str, Any]:
    document = _with_record()
    document["job"] |= {"attempt": 2, "resumed": {"attempt": 1, "iteration": 6}}
    document["shards"][0]["revisions"] = document["shards"][0]["revisions"][:1]
    document["shards"][0]["revisions"][0]["from_iteration"] = 7
    return document


def _unlearned() -> dict[str, Any]:
    document = _with_record()
    document["complete"] = False
    document["shards"][0]["layout"] = {"source": "unlearned", "ring": [0, 1], "mtu": 1024}
    document["shards"][0]["connections"] = []
    return document


def _without_model() -> dict[str, Any]:
    document = example()
    for name in ("state", "initial_state", "optimizer", "arithmetic"):
        del document[name]
    document["shards"][0]["startup"][2].pop("carries")
    return document


@cache
def _documents() -> tuple[Document, ...]:
    return tuple(Document(made()) for made in (example, _with_record, _resumed, _unlearned, _without_model))


def _edited(data: bytes) -> str:
    made = _documents()[data[0] % len(_documents())]
    document = made.fresh()
    for at in range(1, len(data) - 3, 4):
        high, low, kind, number = data[at : at + 4]
        place = made.place(document, high << 8 | low)
        if place is None:
            continue
        container, key = place
        if kind % 8 < 3:
            container[key] = value(number)
        elif kind % 8 == 3:
            del container[key]
        elif kind % 8 == 4 and isinstance(container, list):
            container.insert(key, fresh(container[key]))
        elif kind % 8 == 5 and isinstance(container, dict):
            container[str(value(number))] = container[key]
        elif kind % 8 == 6 and isinstance(container[key], int):
            container[key] += number - 128
        elif other := made.place(document, number * 7):
            container[key] = fresh(other[0][other[1]])
    return json.dumps(document)


def one(data: bytes) -> None:
    """Parse the plan that an input is."""
    if not data:
        return
    text = data if data[:1] in b'{["' else _edited(data)
    try:
        plan = plans.parse(text)
    except ConfigError as error:
        if "\n" in str(error):
            raise AssertionError("an error is one line") from error
        return
    if zlib.crc32(data) % 4 == 0:  # it takes longer than all else
        written = plan.canonical()
        again = plans.parse(written)
        if again.identity() != plan.identity() or again.canonical() != written:
            raise AssertionError("a plan written again is another one")
    if not 0 < plan.revision(plan.first_step).gradient_bytes <= plan.slot_bytes:
        raise AssertionError("a gradient does not fit its slot")
    for revision in plan.shard.revisions:
        pieces = plan.slot_pieces(revision)
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(pieces)):
            raise AssertionError("buckets overlap in a slot")
    for stream in plan.shard.streams:
        plan.shard.stream_connections(stream.name)


def seeds() -> list[bytes]:
    """Return inputs to begin from."""
    documents = _documents()
    texts = [json.dumps(document.fresh()).encode() for document in documents]
    return [*texts, *(bytes([base]) for base in range(len(documents))), b"\0\0\5\0\4"]
