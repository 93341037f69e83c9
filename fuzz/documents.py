# SPDX-License-Identifier: MIT
"""JSON documents that a fuzz input edits: made anew for each, its places known beforehand, and values to put there."""

from __future__ import annotations

import marshal
from typing import Any

__all__ = ["Document", "fresh", "value"]

#: What a value is replaced by; the edges of what fields take, and kinds that they do not.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 7, 8, 64, 95, 96, 255, 256, 1024, 4096, 2**16, 2**24 - 1, 2**24, 2**32 - 1, 2**32, 2**40 - 1, 2**40,
    2**63, 2**64, -1, 0.5, 1e300, float("inf"), float("nan"), "", "weight", "model", "fe80::1", "10.0.0.1", "fe80::zz", "2.12", "2.17",
    "2.29.7", "2.30", "2.99", "float32", "bfloat16", "float16", "int8", "uint8", "float64", "ll", "ll128", "simple", "broadcast",
    "all_reduce", "all_gather", "raw", "modelled", "learned", "unlearned", "file", "extra", "constant", "parameter", "SGD", "AdamW",
    "fused", "foreach", "lr", "inbound", "outbound", "host0", "\u0000", "\ud800", "x" * 100, [], {}, [0], [0, 1], [1, 0], [0, 0],
    ["weight"], [[0]], {"kind": "learned", "data": [5]}, {"lr": 0.1}, {"lr": [1, 2]}, {"contributor": 1}, {"attempt": 1, "iteration": 4},
)  # fmt: skip


def fresh(node: Any) -> Any:
    """Return a copy that shares nothing; several times as fast as through JSON."""
    return marshal.loads(marshal.dumps(node))


def value(number: int) -> Any:
    """Return a value to put anywhere."""
    return fresh(_VALUES[number % len(_VALUES)])


def _paths(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [found for key in keys for found in ((*path, key), *_paths(node[key], (*path, key)))]


class Document:
    """A document from which many are made by edits."""

    def __init__(self, document: Any) -> None:
        self._packed = marshal.dumps(document)
        self._paths = _paths(document)

    def fresh(self) -> Any:
        """Return the document, to be edited."""
        return marshal.loads(self._packed)

    def place(self, document: Any, number: int) -> tuple[Any, Any] | None:
        """Return (container, key) of a place that this document has, in one made of it; None if edits took it away."""
        *above, key = self._paths[number % len(self._paths)]
        node = document
        try:
            for name in above:
                node = node[name]
            if isinstance(node, (dict, list)):
                node[key]
                return node, key
        except (KeyError, IndexError, TypeError):
            pass
        return None
