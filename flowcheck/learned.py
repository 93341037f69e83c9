# SPDX-License-Identifier: MIT
"""The layout that frames of index patterns have shown: a table of messages instead of a library's version.

What `packet_parser.learn` finds and a plan holds as `"layout": {"source": "learned", ..}`; docs/plan.md describes the
fields. It says itself what a modelled layout derives from its version: credits, immediates, slots, splits.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Anchor", "CreditForm", "LearnedLayout", "LearnedOperation", "RawOperation", "UnlearnedLayout"]

Count = Annotated[int, Field(ge=0, lt=2**40)]
Positive = Annotated[int, Field(gt=0, lt=2**40)]
Immediate = Literal["little_endian_bytes", "big_endian_bytes", "little_endian_number", "big_endian_number"]

#: [first element, elements, how many ranks' contributions]. Where no pass has shown the first it is -1, and the elements
#: are as many as the message has room for.
_Message = tuple[Annotated[int, Field(ge=-1, lt=2**40)], Count, Count]
_TABLE = np.dtype([("first", "<i8"), ("elements", "<i8"), ("ranks", "<i8")])


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CreditForm(_Model):
    """Where a credit write holds the sender's rank (`tag`) and the message number + 1 (`index`): offsets in its bytes."""

    bytes: Literal[32, 64]
    tag: Annotated[int, Field(ge=0, le=60)]
    index: Annotated[int, Field(ge=0, le=56)]


class Anchor(_Model):
    """Where a connection stands before the shard's `startup`: per queue pair the PSN, message number, step."""

    psn: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**24)], ...], Field(min_length=1, max_length=8)]
    message: Count
    step: Count


class LearnedOperation(_Model):
    """An all-reduce of so many elements: per connection, in the plan's order, its messages in the order sent."""

    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64", "int32"]
    elements: Positive
    messages: tuple[tuple[_Message, ...], ...]

    @model_validator(mode="after")
    def _inside(self) -> LearnedOperation:
        for connection, messages in enumerate(self.messages):
            for number, (first, elements, _) in enumerate(messages):
                if first >= 0 and first + elements > self.elements:
                    raise ValueError(
                        f"messages[{connection}][{number}] ends at element {first + elements} of {self.elements}"
                    )
        return self


class RawOperation(_Model):
    """What else was sent: per connection, its messages as [bytes on the wire, steps to the next message]."""

    op: Literal["raw"]
    messages: tuple[tuple[tuple[Count, Annotated[int, Field(ge=1, le=8)]], ...], ...]
    carries: None = None


class UnlearnedLayout(_Model):
    """A layout that is yet to be learned, in a plan that is not complete: what the learner must know before."""

    source: Literal["unlearned"]
    ring: Annotated[tuple[Count, ...], Field(min_length=2)]
    mtu: Literal[256, 512, 1024, 2048, 4096]
    link_gbps: Annotated[int, Field(ge=1, le=3200)] = 400


class LearnedLayout(_Model):
    """How the library was seen to lay the all-reduces of this shard on the wire."""

    source: Literal["learned"]
    protocol: Literal["ll", "ll128", "simple"]
    ring: Annotated[tuple[Count, ...], Field(min_length=2)]
    queue_pairs: Annotated[int, Field(ge=1, le=8)] = 1
    split_queue_pairs: bool = False
    exact_addresses: bool = False
    mtu: Literal[256, 512, 1024, 2048, 4096]
    credit: CreditForm
    immediate: Immediate
    slot_bytes: Annotated[int, Field(ge=16, lt=2**32)]
    message_steps: Literal[1, 2, 4]
    operation_steps: Literal[1, 2, 4, 8] = 1
    split_above: Count | None = None
    link_gbps: Annotated[int, Field(ge=1, le=3200)] = 400
    operations: Annotated[tuple[LearnedOperation, ...], Field(min_length=1)]
    anchors: Annotated[tuple[Anchor, ...], Field(min_length=1)]

    @property
    def splits(self) -> bool:
        """Whether each message is cut over all queue pairs; else each goes over one in turn."""
        return self.split_queue_pairs

    @property
    def big_endian_immediate(self) -> bool:
        """Whether the immediate is in network order."""
        return self.immediate.startswith("big")

    @property
    def numbered_immediate(self) -> bool:
        """Whether the immediate is the message's number on its connection; else its bytes."""
        return self.immediate.endswith("number")

    @cached_property
    def tables(self) -> dict[tuple[str, int], list[np.ndarray]]:
        """Per kind of all-reduce (dtype, elements) and connection, the messages: first, elements, ranks."""
        return {
            (operation.dtype, operation.elements): [np.array(list(m), _TABLE) for m in operation.messages]
            for operation in self.operations
        }

    @model_validator(mode="after")
    def _consistent(self) -> LearnedLayout:
        ranks, connections = len(self.ring), len(self.anchors)
        if sorted(self.ring) != list(range(ranks)):
            raise ValueError(f"ring {list(self.ring)} is not an order of the ranks 0 to {ranks - 1}")
        for number, anchor in enumerate(self.anchors):
            if len(anchor.psn) != self.queue_pairs:
                raise ValueError(
                    f"anchors[{number}].psn has {len(anchor.psn)} numbers for {self.queue_pairs} queue pair(s)"
                )
        for number, operation in enumerate(self.operations):
            if len(operation.messages) != connections:
                raise ValueError(
                    f"operations[{number}].messages are of {len(operation.messages)} connections, anchors of {connections}"
                )
            most = max((count for messages in operation.messages for _, _, count in messages), default=0)
            if most > ranks:
                raise ValueError(f"operations[{number}].messages: the sum of {most} ranks in a ring of {ranks}")
        if len(self.tables) != len(self.operations):
            raise ValueError("operations: two are of the same dtype and elements")
        return self

    def check_operations(self, where: str, kinds: list[tuple[str, int]]) -> None:
        """ValueError if an all-reduce of one of these kinds was not learned."""
        for dtype, elements in kinds:
            if (dtype, elements) not in self.tables:
                known = ", ".join(f"{count} {name}" for name, count in self.tables)
                raise ValueError(
                    f"{where}: an all-reduce of {elements} {dtype} was not learned; layout.operations has {known}"
                )
