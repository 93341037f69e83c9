# SPDX-License-Identifier: MIT
"""Input: a JSON text, or edits on a plan. Only a plan comes out, or a ConfigError; and a plan means the same, written again."""

from __future__ import annotations

import itertools
import json
import zlib
from functools import cache
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from fuzz.documents import Document, fresh, value
from fuzz.fixture import example

__all__ = ["one", "seeds"]

#: From this first byte on the example is edited, before a small job.
_EXAMPLES = 0xF0
#: Edits that copy copies make documents of any length: what is longer takes a second and more, and says no more.
_LONGEST_TEXT = 1 << 20


def _small() -> dict[str, Any]:
    """Return the example with as little of everything as a plan has: parsed in a fraction of its time."""
    document = example()
    shard = document["shards"][0]
    shapes = {"weight": [2, 2], "bias": [2]}
    parameters = [{"name": name, "shape": shape, "offset": 4 * n} for n, (name, shape) in enumerate(shapes.items())]
    shard["startup"] = [shard["startup"][2] | {"elements": 6}]
    shard["revisions"] = [
        {"from_iteration": 1, "buckets": [{"dtype": "float32", "elements": 6, "parameters": parameters}]}
    ]
    shard["connections"] = shard["connections"][:1]
    shard["streams"][0]["links"] = [0]
    document["state"] = [
        document["state"][0] | {"key": k, "parameter": k, "shape": shape} for k, shape in shapes.items()
    ]
    document["initial_state"]["tensors"] = list(shapes)
    document["optimizer"]["groups"][0]["parameters"] = list(shapes)
    return document


def _begun_from_a_file(document: dict[str, Any]) -> None:
    document["initial_state"] = {"source": "file", "path": "initial.pt"}
    document["shards"][0]["startup"] = []


def _with_record(document: dict[str, Any]) -> None:
    document["shards"][0]["step_record"] = {
        "contributor": 1, "extra": [{"name": "seen", "dtype": "int64", "shape": []}], "audit": {"every": 3, "groups": 2},
    }  # fmt: skip
    document["state"].append({"key": "seen", "kind": "extra", "dtype": "int64", "shape": []})
    _begun_from_a_file(document)
    document["optimizer"]["groups"][0]["varying"] = ["lr"]
    document["checkpoints"] = {"snapshot_iterations": 10, "retention": {"last_iterations": 5}}


def _resumed(document: dict[str, Any]) -> None:
    _with_record(document)
    document["job"] |= {"attempt": 2, "resumed": {"attempt": 1, "iteration": 6}}
    document["shards"][0]["revisions"] = document["shards"][0]["revisions"][:1]
    document["shards"][0]["revisions"][0]["from_iteration"] = 7


def _unlearned(document: dict[str, Any]) -> None:
    _with_record(document)
    document["complete"] = False
    document["shards"][0]["layout"] = {"source": "unlearned", "ring": [0, 1], "mtu": 1024}
    document["shards"][0]["connections"] = []


def _learned(document: dict[str, Any]) -> None:
    _begun_from_a_file(document)
    shard = document["shards"][0]
    connections, elements = len(shard["connections"]), shard["revisions"][0]["buckets"][0]["elements"]
    messages = [[0, elements // 2, 1], [-1, elements // 2, 2]]
    shard["layout"] = {
        "source": "learned", "protocol": "ll", "ring": [0, 1], "mtu": 1024, "slot_bytes": 4096, "message_steps": 1,
        "immediate": "little_endian_bytes", "credit": {"bytes": 32, "tag": 28, "index": 0},
        "operations": [{"dtype": "float32", "elements": elements, "messages": connections * [messages]}],
        "anchors": connections * [{"psn": [5], "message": 0, "step": 0}],
    }  # fmt: skip
    shard["revisions"] = shard["revisions"][:1]
    shard["startup"] = [{"op": "raw", "messages": connections * [[[64, 1]]]}]


def _without_model(document: dict[str, Any]) -> None:
    for name in ("state", "initial_state", "optimizer", "arithmetic"):
        del document[name]
    document["shards"][0]["startup"][-1].pop("carries")


@cache
def _documents() -> tuple[Document, ...]:
    out = []
    for base in (_small, example):
        out.append(Document(base()))
        for change in (_with_record, _resumed, _unlearned, _learned, _without_model):
            document = base()
            change(document)
            out.append(Document(document))
    return tuple(out)


def _text(document: Any) -> str | bytes:
    try:
        return to_json(document, inf_nan_mode="constants")  # several times as fast
    except PydanticSerializationError:  # half a surrogate pair
        return json.dumps(document)


def _edited(data: bytes) -> str | bytes:
    kinds = len(_documents()) // 2
    made = _documents()[data[0] % kinds + (kinds if data[0] >= _EXAMPLES else 0)]
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
    return _text(document)


def one(data: bytes) -> None:
    """Parse the plan that an input is."""
    if not data:
        return
    text = data if data[:1] in b'{["' else _edited(data)
    if len(text) > _LONGEST_TEXT:
        return
    try:
        plan = plans.parse(text)
    except ConfigError as error:
        if "\n" in str(error):
            raise AssertionError("an error is one line") from error
        return
    if zlib.crc32(data) % 16 == 0:  # it takes several times as long as all else
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
    texts = [json.dumps(document.fresh()).encode() for document in _documents()]
    kinds = range(len(_documents()) // 2)
    return [*texts, *(bytes([first + kind]) for first in (0, _EXAMPLES) for kind in kinds), b"\0\0\5\0\4"]
