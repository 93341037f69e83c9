# SPDX-License-Identifier: MIT
"""What a plan's collectives look like on each queue pair: messages compiled into the parser's tables.

`flowcheck.schedule` says which elements each message carries; this module strings the operations of a plan together
into segments of rows (`fc_segment`, `fc_row`): steps, slots, queue pairs, packets. A learned layout gives the same
messages from its own table (`_reduced`); nothing after this module knows.

Facts: NCCL src/transport/net_ib.cc (src/transport/net_ib/ from 2.29), src/transport/net.cc, prims_ll.h, prims_ll128.h.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from flowcheck import schedule
from flowcheck.formats import ROW, SEGMENT
from flowcheck.plan import (
    DTYPE_BYTES,
    Bucket,
    Collective,
    Layout,
    LearnedLayout,
    Plan,
    RawOperation,
    Revision,
    UnlearnedLayout,
)
from flowcheck.schedule import MESSAGE, PROTOCOLS
from flowcheck.verdicts import VERDICTS

__all__ = [
    "SLOTS",
    "Credit",
    "FinalMessages",
    "Pieces",
    "Program",
    "carried",
    "compile_programs",
    "final_messages",
    "first_step",
    "frames_per_iteration",
    "mirrored_ranges",
    "packet_count",
    "queue_pair_pieces",
    "sent_messages",
    "single_sources",
    "wire_bytes",
]

#: A ring holds so many iterations' bytes, twice, while a layout is learned: two rounds of passes of each revision and the
#: first iteration are about eighteen.
ITERATIONS_OF_LEARNING = 10
#: And so many frames at least: small messages are packets of their own.
LEAST_FRAMES_OF_LEARNING = 32768
#: Slots of a connection's buffer (NCCL_STEPS).
SLOTS = 8
#: A message that is split over queue pairs is cut on such boundaries.
PIECE_ALIGNMENT = 128

AnyLayout = Layout | LearnedLayout

_NUMBER = {name: number for number, name in enumerate(VERDICTS)}
_ENCODINGS = {"simple": 1, "ll": 2, "ll128": 3}


@dataclass(frozen=True)
class Credit:
    """Where a credit write of a library version holds the sender's rank (`tag`) and the message number + 1 (`index`).

    Offsets and size in bytes; the fields are little-endian, 4 and 8 bytes (net_ib.cc, struct ncclIbSendFifo).
    """

    bytes: int
    tag: int
    index: int

    @classmethod
    def of(cls, layout: AnyLayout) -> Credit:
        """Return the form that a layout's version writes, or that was seen."""
        if isinstance(layout, LearnedLayout):
            return cls(layout.credit.bytes, layout.credit.tag, layout.credit.index)
        for last, form in ((19, cls(32, 20, 24)), (23, cls(64, 24, 32)), (29, cls(64, 36, 40))):
            if layout.minor <= last:
                return form
        return cls(64, 52, 56)


@dataclass
class Program:
    """The tables of one connection: per queue pair its segments and rows.

    `clean`, LL only: per queue pair offset, length, address offset, packets and bulk split of its piece of a message that
    fills its slot. `enter_before`, of an attempt that follows another: per queue pair the number of the packet that ends its first
    message of the first iteration. A ring that begins with the attempt shows one before that.
    """

    connection: int
    edge: int
    channel: int
    source: bytes
    destination: bytes
    data_queue_pairs: list[int]
    credit_queue_pairs: list[int]
    sender_rank: int
    credit: Credit
    start_psn: list[int]  # per queue pair
    encoding: int = 2
    slot_stride: int = PROTOCOLS["ll"].slot_bytes
    slots: int = SLOTS
    big_endian_immediate: bool = False
    numbered_immediate: bool = False  # of the message on its connection; else its bytes
    clean: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    segments: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    enter_before: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Pieces:
    """What one queue pair carries of a list of messages: arrays of equal length.

    `index`: which message; `offset` and `length`: the piece's wire bytes in the message; `address`: what is added to the
    slot's address; `packets`: how many, with the empty write that ends the adaptive-routing form (`bulk_split`).
    """

    index: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    address: np.ndarray
    packets: np.ndarray
    bulk_split: np.ndarray


def wire_bytes(layout: AnyLayout, data: np.ndarray) -> np.ndarray:
    """Return the payload bytes of messages of so many data bytes; LL's clean steps, which fill their slot, aside."""
    if layout.protocol == "ll":
        return 16 * -(-data // 8)
    return 2048 * -(-data // 1920) if layout.protocol == "ll128" else data


def first_step(layout: AnyLayout, op: str, step: int) -> tuple[int, int]:
    """Return (step of the first message, steps per message) of an operation that begins at step counter `step`.

    Simple's chunk-wise operations take two steps a message and begin on a multiple of a chunk's four (prims_simple.h). A
    learned raw operation says itself how far its last message moves the counter on.
    """
    if isinstance(layout, LearnedLayout):
        return step if op == "raw" else -(
            -step // layout.operation_steps
        ) * layout.operation_steps, layout.message_steps
    protocol = PROTOCOLS[layout.protocol]
    if op == "broadcast":
        return step, 1
    chunk = protocol.slices * protocol.slice_steps
    return -(-step // chunk) * chunk, protocol.slice_steps


def queue_pair_pieces(layout: AnyLayout, queue_pair: int, first_message: int, wire: np.ndarray) -> Pieces:
    """Return what a queue pair carries of messages of `wire` bytes, the first of them number `first_message`.

    Either every message is cut over all queue pairs, or each goes whole over one in turn (ncclIbMultiSend).
    """
    count, mtu = layout.queue_pairs, layout.mtu
    if layout.splits:
        index = np.arange(len(wire))
        piece = -(-wire // (count * PIECE_ALIGNMENT)) * PIECE_ALIGNMENT
        offset = queue_pair * piece
        length = np.clip(wire - offset, 0, piece)
        # Up to 2.29.3 the address moves on by a whole piece for each queue pair, from 2.29.7 by what it carried.
        address = np.minimum(offset, wire) if layout.exact_addresses else offset
        offset = np.minimum(offset, wire)
    else:
        index = np.flatnonzero((first_message + np.arange(len(wire))) % count == queue_pair)
        length = wire[index]
        offset = address = np.zeros(len(index), np.int64)
    bulk = np.zeros(len(index), bool) if layout.split_above is None else wire[index] > layout.split_above
    return Pieces(index, offset, length, address, np.maximum(1, -(-length // mtu)) + bulk, bulk)


@dataclass(frozen=True)
class _Operation:
    """One operation's messages on the connection, and what the parser shall say of them."""

    op: str
    messages: np.ndarray
    width: int
    destination: int
    verdicts: tuple[str, str]  # of a message that is fully reduced, and of one that is not
    settled_lag: int = 0
    iteration: int = 0  # within the segment's pass
    ends_iteration: bool = False
    counted: np.ndarray | None = None  # data bytes of each message that count, where that is not all of them
    raw: np.ndarray | None = None  # of messages known by their wire bytes alone: those, and the steps to the next

    def steps(self, stride: int) -> tuple[np.ndarray, int]:
        """Return the steps before each message, from the first, and of all together."""
        strides = np.full(len(self.messages), stride) if self.raw is None else self.raw[:, 1]
        return np.cumsum(strides) - strides, int(strides.sum())

    def rows(self, layout: AnyLayout, steps: np.ndarray, first_message: int) -> np.ndarray:
        """Return a row per message, without what depends on the queue pair."""
        rows = np.zeros(len(self.messages), ROW)
        data = self.messages["elements"] * self.width
        rows["step"], rows["message"] = steps, first_message + np.arange(len(rows))
        rows["message_bytes"] = data if self.counted is None else self.counted
        rows["message_wire_bytes"] = wire_bytes(layout, data) if self.raw is None else self.raw[:, 0]
        rows["destination"] = self.destination + self.messages["first"] * self.width
        final, partial = (_NUMBER[verdict] for verdict in self.verdicts)
        rows["verdict"] = np.where(self.messages["final"], final, partial)
        rows["encoding"], rows["settled_lag"] = _ENCODINGS[layout.protocol], self.settled_lag
        rows["iteration"] = self.iteration
        if self.ends_iteration:
            rows["last_pieces"][-1] = layout.queue_pairs if layout.splits else 1
        return rows


class _Table:
    """Rows and segments of one connection under construction; counters run over its whole life."""

    def __init__(self, layout: AnyLayout, message: int, step: int) -> None:
        self.layout, self.message, self.step = layout, message, step
        self.psn = [0] * layout.queue_pairs
        self.rows: list[list[np.ndarray]] = [[] for _ in self.psn]
        self.segments: list[list[np.ndarray]] = [[] for _ in self.psn]

    def add(self, operations: list[_Operation], first_iteration: int, period: int, repeats: int) -> None:
        """Append a segment that passes through `operations`, `period` iterations long, `repeats` times (0: for ever)."""
        operations = [operation for operation in operations if len(operation.messages)]
        if not operations:
            return
        self.step, _ = first_step(self.layout, operations[0].op, self.step)
        step, message, messages = self.step, self.message, []
        for operation in operations:
            begin, stride = first_step(self.layout, operation.op, step)
            before, total = operation.steps(stride)
            messages.append(operation.rows(self.layout, begin - self.step + before, message - self.message))
            step, message = begin + total, message + len(operation.messages)
        rows = np.concatenate(messages)
        # The next pass begins where its first operation does, which may skip steps.
        steps = first_step(self.layout, operations[0].op, step)[0] - self.step
        for number in range(len(self.psn)):
            packets = self._append(number, rows, steps, (first_iteration, period, repeats))
            self.psn[number] += packets * repeats
        self.step = step + steps * (repeats - 1)
        self.message += len(rows) * repeats

    def _append(self, number: int, messages: np.ndarray, steps: int, iterations: tuple[int, int, int]) -> int:
        """Append a queue pair's part of a pass through `messages`; return its packets."""
        pieces = queue_pair_pieces(self.layout, number, self.message, messages["message_wire_bytes"].astype(np.int64))
        rows = messages[pieces.index]
        rows["message_wire_offset"], rows["wire_bytes"] = pieces.offset, pieces.length
        rows["address_offset"], rows["packets"] = pieces.address, pieces.packets
        rows["bulk_split"] = pieces.bulk_split
        rows["psn"] = np.cumsum(pieces.packets) - pieces.packets
        packets = int(pieces.packets.sum())
        if packets:
            segment = np.zeros(1, SEGMENT)
            segment["first_psn"], segment["period_psn"] = self.psn[number], packets
            segment["first_step"], segment["period_steps"] = self.step, steps
            segment["first_message"], segment["period_messages"] = self.message, len(messages)
            segment["first_row"], segment["rows"] = sum(map(len, self.rows[number])), len(rows)
            segment["first_iteration"], segment["period_iterations"], segment["repeats"] = iterations
            self.segments[number].append(segment)
            self.rows[number].append(rows)
        return packets


def _reduced(plan: Plan, index: int, dtype: str, elements: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an all-reduce's messages (MESSAGE) on a connection, and which carry the sum of all ranks but their receiver."""
    connection, layout = plan.shard.connections[index], plan.shard.layout
    if isinstance(layout, Layout):
        messages = schedule.all_reduce(layout, connection.edge, connection.channel, elements, DTYPE_BYTES[dtype])
        return messages, schedule.last_partial_sums(layout, messages)
    learned, ranks = layout.tables[dtype, elements][index], len(layout.ring)
    messages = np.zeros(len(learned), MESSAGE)
    messages["first"], messages["elements"] = np.maximum(learned["first"], 0), learned["elements"]
    messages["final"] = (learned["ranks"] == ranks) | (learned["elements"] == 0)  # of nothing, nothing is missing
    return messages, (learned["ranks"] == ranks - 1) & (learned["first"] >= 0)


def _collective(plan: Plan, index: int, op: Collective | RawOperation, destination: int) -> _Operation:
    connection, layout = plan.shard.connections[index], plan.shard.layout
    where = (layout, connection.edge, connection.channel)
    verdict = op.carries or "other_collective"
    if isinstance(op, RawOperation):
        raw = np.array(op.messages[index], np.int64).reshape(-1, 2)
        messages = np.zeros(len(raw), MESSAGE)
        return _Operation(op.op, messages, 1, destination, (verdict, verdict), raw=raw)
    width = 1
    if op.op == "all_reduce":
        width = DTYPE_BYTES[op.dtype]
        messages, _ = _reduced(plan, index, op.dtype, op.elements)
    elif op.op == "broadcast":
        messages = schedule.broadcast(*where, op.bytes, op.root)
    else:
        messages = schedule.all_gather(*where, op.bytes)
    return _Operation(op.op, messages, width, destination, (verdict, verdict))


def _iteration(plan: Plan, index: int, revision: Revision) -> list[_Operation]:
    """Return one iteration's all-reduces on a connection; the last that uses it ends the iteration there."""
    operations = []
    for reduction in range(1, revision.reductions + 1):
        verdicts = ("placed", "partial_sum") if reduction == revision.reductions else ("other_collective",) * 2
        for bucket, offset in zip(revision.buckets, revision.bucket_offsets, strict=True):
            messages, _ = _reduced(plan, index, bucket.dtype, bucket.elements)
            operations.append(_Operation("all_reduce", messages, DTYPE_BYTES[bucket.dtype], offset, verdicts, 1))
    if plan.record_form is not None:
        operations.append(_record(plan, index, revision))
    # Past an iteration is who has sent something of the next one after its first operation.
    operations[0] = replace(operations[0], settled_lag=2)
    operations = [operation for operation in operations if len(operation.messages)]
    return operations[:-1] + [replace(operation, ends_iteration=True) for operation in operations[-1:]]


def _record(plan: Plan, index: int, revision: Revision) -> _Operation:
    """Return the all-reduce of the step record.

    A sum that lacks only the rank which gets it is the record already, unless that rank fills it: the others add zeros.
    Not so for the digests behind it, to which every rank adds.
    """
    layout, form = plan.shard.layout, plan.record_form
    messages, early = _reduced(plan, index, "float32", form.elements)
    receiver = layout.ring[(plan.shard.connections[index].edge + 1) % len(layout.ring)]
    counted = messages["elements"] * 4
    if receiver != plan.shard.step_record.contributor:
        filled = np.clip(2 * form.words - messages["first"], 0, messages["elements"]) * 4
        filled -= filled % 8  # a learned partial sum may not show its last element, and half a unit cannot be brought
        messages["final"] |= early & (filled > 0)
        counted = np.where(early, filled, counted)
    begin, _ = plan.record_range(revision)
    return _Operation("all_reduce", messages, 4, begin, ("step_record", "partial_sum"), 1, counted=counted)


def compile_programs(plan: Plan) -> list[Program]:
    """Return the programs of a plan's connections, in plan order."""
    return [_compile(plan, index) for index in range(len(plan.shard.connections))]


def _slot_bytes(layout: AnyLayout) -> int:
    return layout.slot_bytes if isinstance(layout, LearnedLayout) else PROTOCOLS[layout.protocol].slot_bytes


def _clean(layout: AnyLayout) -> list[tuple[int, int, int, int, int]]:
    if layout.protocol != "ll":
        return []
    full = np.array([_slot_bytes(layout)])
    pieces = [queue_pair_pieces(layout, number, number, full) for number in range(layout.queue_pairs)]
    return [
        (int(p.offset[0]), int(p.length[0]), int(p.address[0]), int(p.packets[0]), int(p.bulk_split[0])) for p in pieces
    ]


def _compile(plan: Plan, index: int) -> Program:
    shard = plan.shard
    connection, layout = shard.connections[index], shard.layout
    anchor = layout.anchors[index] if isinstance(layout, LearnedLayout) else None
    table = _Table(layout, anchor.message, anchor.step) if anchor else _Table(layout, 0, 0)
    initial = iter(plan.initial_ranges)
    startup = [_collective(plan, index, op, next(initial)[0] if op.carries else 0) for op in shard.startup]
    table.add(startup, 0, 0, 1)
    for number, revision in enumerate(shard.revisions):
        first = revision.from_iteration
        table.add([_collective(plan, index, op, 0) for op in revision.before], first, 0, 1)
        buckets = _iteration(plan, index, revision)
        # Where messages take turns on the queue pairs, so many iterations pass until the same one begins again.
        messages = sum(len(operation.messages) for operation in buckets)
        turn = 1 if layout.splits else layout.queue_pairs // math.gcd(layout.queue_pairs, messages or 1)
        last = number + 1 == len(shard.revisions)
        count = 0 if last else shard.revisions[number + 1].from_iteration - first
        full, rest = divmod(count, turn)
        for passes, iterations in ((full, turn), (1, rest)) if not last else ((0, turn),):
            operations = [replace(op, iteration=i) for i in range(iterations) for op in buckets]
            if passes or last:
                table.add(operations, first, iterations, passes)
            first += passes * iterations
    segments = [np.concatenate(part) if part else np.empty(0, SEGMENT) for part in table.segments]
    rows = [np.concatenate(part) if part else np.empty(0, ROW) for part in table.rows]
    follows = shard.revisions and plan.job.attempt > 1
    return Program(
        connection=index,
        edge=connection.edge,
        channel=connection.channel,
        source=connection.source_bytes,
        destination=connection.destination_bytes,
        data_queue_pairs=list(connection.proof.data),
        credit_queue_pairs=list(connection.proof.credit),
        sender_rank=layout.ring[connection.edge],
        credit=Credit.of(layout),
        start_psn=list(anchor.psn) if anchor else [connection.start_psn] * layout.queue_pairs,
        encoding=_ENCODINGS[layout.protocol],
        slot_stride=_slot_bytes(layout),
        big_endian_immediate=layout.big_endian_immediate,
        numbered_immediate=layout.numbered_immediate,
        clean=_clean(layout),
        segments=segments,
        rows=rows,
        enter_before=[_first_message(*part, plan.first_step) for part in zip(segments, rows, strict=True)]
        if follows
        else [],
    )


def _first_message(segments: np.ndarray, rows: np.ndarray, first_step: int) -> int:
    """Return how many packets of a queue pair have passed when its first message with payload of the iterations has."""
    for segment in segments[segments["first_iteration"] >= first_step]:
        own = rows[segment["first_row"] :][: segment["rows"]]
        if (carrying := own[own["wire_bytes"] > 0]).size:
            return int(segment["first_psn"]) + int(carrying[0]["psn"]) + int(carrying[0]["packets"])
    return 0


def frames_per_iteration(plan: Plan, stream: str) -> int:
    """Return how many frames an iteration's gradients are on a stream, at most: data, credits, acknowledgements.

    Of a layout that is yet to be learned: all that comes until it is.
    """
    if isinstance(plan.shard.layout, UnlearnedLayout):
        return _frames_of_learning(plan, stream)
    shown, most = plan.shard.stream_connections(stream), 0
    for revision in plan.shard.revisions:
        count = 0
        for index in shown:
            for times, wire in sent_messages(plan, index, revision):
                # Per message a credit and its acknowledgement; per data packet, at worst, one of its own.
                count += times * 2 * (len(wire) + packet_count(plan.shard.layout, wire))
        most = max(most, count)
    return most


def sent_messages(plan: Plan, index: int, revision: Revision) -> list[tuple[int, np.ndarray]]:
    """Return what a connection sends in an iteration: (times, payload bytes of each message) of every form of all-reduce."""
    layout, out = plan.shard.layout, []
    for (dtype, elements), times in Counter((bucket.dtype, bucket.elements) for bucket in revision.buckets).items():
        messages, _ = _reduced(plan, index, dtype, elements)
        out.append((times * revision.reductions, wire_bytes(layout, messages["elements"] * DTYPE_BYTES[dtype])))
    if plan.record_form is not None:
        record = _record(plan, index, revision)
        out.append((1, wire_bytes(layout, record.messages["elements"] * record.width)))
    return out


def packet_count(layout: AnyLayout, wire: np.ndarray) -> int:
    """Return the packets of messages of so many payload bytes, over all queue pairs."""
    return sum(int(queue_pair_pieces(layout, n, 0, wire).packets.sum()) for n in range(layout.queue_pairs))


def _frames_of_learning(plan: Plan, stream: str) -> int:
    layout = plan.shard.layout
    ranks, gradient = len(layout.ring), plan.shard.revisions[0].gradient_bytes
    # In LL, which doubles the bytes; and a quarter more for credits and acknowledgements.
    packets = -(-2 * (ranks - 1) * 2 * gradient // (ranks * layout.mtu)) * 5 // 4
    return max(LEAST_FRAMES_OF_LEARNING, len(plan.shard.stream(stream).links) * packets * ITERATIONS_OF_LEARNING)


@dataclass(frozen=True)
class FinalMessages:
    """The messages of an all-reduce that a connection carries fully reduced, without empty ones: arrays of equal length.

    `begin`: byte of the tensor where a message's data begins; `bytes`: how many of them count; `wire`: payload bytes.
    """

    begin: np.ndarray
    bytes: np.ndarray
    wire: np.ndarray


def final_messages(plan: Plan, index: int, bucket: Bucket | None) -> FinalMessages:
    """Return what connection `index` carries fully reduced of a bucket, or (None) of the last revision's step record."""
    if bucket is None:
        operation = _record(plan, index, plan.shard.revisions[-1])
    else:
        messages, _ = _reduced(plan, index, bucket.dtype, bucket.elements)
        operation = _Operation("all_reduce", messages, DTYPE_BYTES[bucket.dtype], 0, ("placed", "partial_sum"))
    data = operation.messages["elements"] * operation.width
    counted = data if operation.counted is None else operation.counted
    final = operation.messages["final"] & (counted > 0)
    begin = operation.messages["first"][final] * operation.width
    return FinalMessages(begin, counted[final], wire_bytes(plan.shard.layout, data[final]))


def _final_ranges(plan: Plan, index: int, revision: Revision) -> Iterator[tuple[int, int]]:
    """Yield the ranges of slot bytes that a connection carries fully reduced in an iteration, the step record aside."""
    for bucket, offset in zip(revision.buckets, revision.bucket_offsets, strict=True):
        final = final_messages(plan, index, bucket)
        begin = offset + final.begin
        yield from zip(begin.tolist(), (begin + final.bytes).tolist(), strict=True)


def mirrored_ranges(plan: Plan, iteration: int) -> list[list[int]]:
    """Return the byte ranges of an iteration's flat gradient that some mirrored connection carries fully reduced."""
    shard, ranges = plan.shard, []
    for index in shard.mirrored_connections:
        ranges += _final_ranges(plan, index, shard.revision(iteration))
    return plan.flat_ranges(iteration, ranges)


def single_sources(plan: Plan, revision: Revision) -> list[tuple[int, int, int]]:
    """Return what of a flat gradient only one mirrored edge carries fully reduced: (begin, end, edge), by begin.

    Whatever is lost of it no other edge repairs.
    """
    shard = plan.shard
    per_edge: dict[int, list[tuple[int, int]]] = {}
    for index in shard.mirrored_connections:
        per_edge.setdefault(shard.connections[index].edge, []).extend(_final_ranges(plan, index, revision))
    turns = []
    for edge, ranges in per_edge.items():
        for begin, end in plan.flat_ranges(revision.from_iteration, ranges):
            turns += [(begin, edge), (end, edge)]
    out: list[tuple[int, int, int]] = []
    carrying: set[int] = set()
    before = 0
    for at, edge in sorted(turns):
        if len(carrying) == 1 and before < at:
            (only,) = carrying
            joins = bool(out) and out[-1][1:] == (before, only)
            out.append((out.pop()[0] if joins else before, at, only))
        carrying ^= {edge}
        before = at
    return out


def carried(plan: Plan, iteration: int) -> list[int]:
    """Return the indices of the connections that send anything of an iteration; 0 is the initial state."""
    shard, out = plan.shard, []
    for index in range(len(shard.connections)):
        if iteration:
            operations = _iteration(plan, index, shard.revision(iteration))
        else:
            operations = [_collective(plan, index, op, 0) for op in shard.startup if op.carries]
        if any(len(operation.messages) for operation in operations):
            out.append(index)
    return out
