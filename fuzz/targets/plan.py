# SPDX-License-Identifier: MIT
"""Input: a JSON text, or edits on a plan. Only a plan comes out, or a ConfigError; and a plan means the same, written again."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from fuzz.fixture import example

__all__ = ["one", "seeds"]

#: What a value is replaced by; the edges of what fields take, and kinds that they do not.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 7, 8, 64, 95, 96, 255, 256, 1024, 4096, 2**16, 2**24 - 1, 2**24, 2**32 - 1, 2**32, 2**40 - 1, 2**40,
    2**63, 2**64, -1, 0.5, 1e300, float("inf"), float("nan"), "", "weight", "model", "fe80::1", "10.0.0.1", "fe80::zz", "2.12", "2.17",
    "2.29.7", "2.30", "2.99", "float32", "bfloat16", "float16", "int8", "uint8", "float64", "ll", "ll128", "simple", "broadcast",
    "all_reduce", "all_gather", "raw", "modelled", "learned", "unlearned", "file", "extra", "constant", "parameter", "SGD", "AdamW",
    "fused", "foreach", "lr", "inbound", "outbound", "host0", "\u0000", "\ud800", "x" * 100, [], {}, [0], [0, 1], [1, 0], [0, 0],
    ["weight"], [[0]], {"kind": "learned", "data": [5]}, {"lr": 0.1}, {"lr": [1, 2]}, {"contributor": 1}, {"attempt": 1, "iteration": 4},
)  # fmt: skip


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
def _texts() -> tuple[str, ...]:
    return tuple(json.dumps(made()) for made in (example, _with_record, _resumed, _unlearned, _without_model))


def _places(node: Any, out: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a document, outer ones first."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        out.append((node, key))
        _places(node[key], out)
    return out


def _edited(data: bytes) -> str:
    texts = _texts()
    document = json.loads(texts[data[0] % len(texts)])
    for at in range(1, len(data) - 3, 4):
        high, low, kind, value = data[at : at + 4]
        places = _places(document, [])
        container, key = places[(high << 8 | low) % len(places)]
        new = _VALUES[value % len(_VALUES)]
        if kind % 8 < 3:
            container[key] = new
        elif kind % 8 == 3:
            del container[key]
            if not document:
                break
        elif kind % 8 == 4 and isinstance(container, list):
            container.insert(key, json.loads(json.dumps(container[key])))
        elif kind % 8 == 5 and isinstance(container, dict):
            container[str(new)] = container[key]
        elif kind % 8 == 6 and isinstance(container[key], int):
            container[key] += value - 128
        else:
            other, name = places[value * 7 % len(places)]
            container[key] = json.loads(json.dumps(other[name]))
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
    again = plans.parse(plan.canonical())
    if again.identity() != plan.identity() or again.canonical() != plan.canonical():
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
    return [*(text.encode() for text in _texts()), *(bytes([base]) for base in range(len(_texts()))), b"\0\0\5\0\4"]
