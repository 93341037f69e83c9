# SPDX-License-Identifier: MIT
"""What a plan's collectives look like on each queue pair: messages compiled into the parser's tables.

`flowcheck.schedule` says which elements each message carries; this module strings the operations of a plan together
into segments of rows (`fc_segment`, `fc_row`): steps, slots, queue pairs, packets. A learned layout would give the same
messages from another source; nothing after this module would know.

Facts: NCCL src/transport/net_ib.cc (src/transport/net_ib/ from 2.29), src/transport/net.cc, prims_ll.h, prims_ll128.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from flowcheck import schedule
from flowcheck.formats import ROW, SEGMENT
from flowcheck.plan import DTYPE_BYTES, Collective, Connection, Layout, Plan, Revision
from flowcheck.schedule import PROTOCOLS
from flowcheck.verdicts import VERDICTS

__all__ = [
    "BULK_SPLIT_BYTES",
    "SLOTS",
    "Credit",
    "Pieces",
    "Program",
    "carried",
    "compile_programs",
    "first_step",
    "frames_per_iteration",
    "mirrored_ranges",
    "queue_pair_pieces",
    "wire_bytes",
]

#: A message longer than this is split in the adaptive-routing form (net_ib.cc, NCCL_IB_AR_THRESHOLD).
BULK_SPLIT_BYTES = 8192
#: Slots of a connection's buffer (NCCL_STEPS).
SLOTS = 8
#: A message that is split over queue pairs is cut on such boundaries.
PIECE_ALIGNMENT = 128

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
    def of(cls, layout: Layout) -> Credit:
        """Return the form that a layout's version writes."""
        for last, form in ((19, cls(32, 20, 24)), (23, cls(64, 24, 32)), (29, cls(64, 36, 40))):
            if layout.minor <= last:
                return form
        return cls(64, 52, 56)


@dataclass
class Program:
    """The tables of one connection: per queue pair its segments and rows.

    `clean`, LL only: per queue pair offset, length, address offset, packets and bulk split of its piece of a message that
    fills its slot.
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
    start_psn: int = 0
    encoding: int = 2
    slot_stride: int = PROTOCOLS["ll"].slot_bytes
    slots: int = SLOTS
    big_endian_immediate: bool = False
    clean: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    segments: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)


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


def wire_bytes(layout: Layout, data: np.ndarray) -> np.ndarray:
    """Return the payload bytes of messages of so many data bytes; LL's clean steps, which fill their slot, aside."""
    if layout.protocol == "ll":
        return 16 * -(-data // 8)
    return 2048 * -(-data // 1920) if layout.protocol == "ll128" else data


def first_step(layout: Layout, op: str, step: int) -> tuple[int, int]:
    """Return (step of the first message, steps per message) of an operation that begins at step counter `step`.

    Simple's chunk-wise operations take two steps a message and begin on a multiple of a chunk's four (prims_simple.h).
    """
    protocol = PROTOCOLS[layout.protocol]
    if op == "broadcast":
        return step, 1
    chunk = protocol.slices * protocol.slice_steps
    return -(-step // chunk) * chunk, protocol.slice_steps


def queue_pair_pieces(layout: Layout, queue_pair: int, first_message: int, wire: np.ndarray) -> Pieces:
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
    bulk = layout.adaptive_routing & (wire[index] > BULK_SPLIT_BYTES)
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

    def rows(self, layout: Layout, steps: np.ndarray, first_message: int) -> np.ndarray:
        """Return a row per message, without what depends on the queue pair."""
        rows = np.zeros(len(self.messages), ROW)
        data = self.messages["elements"] * self.width
        rows["step"], rows["message"] = steps, first_message + np.arange(len(rows))
        rows["message_bytes"] = data if self.counted is None else self.counted
        rows["message_wire_bytes"] = wire_bytes(layout, data)
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

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.step = self.message = 0
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
            count = len(operation.messages)
            steps = begin - self.step + np.arange(count) * stride
            messages.append(operation.rows(self.layout, steps, message - self.message))
            step, message = begin + count * stride, message + count
        rows = np.concatenate(messages)
        for number in range(len(self.psn)):
            packets = self._append(number, rows, step - self.step, (first_iteration, period, repeats))
            self.psn[number] += packets * repeats
        self.step += (step - self.step) * repeats
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


def _collective(layout: Layout, edge: int, channel: int, op: Collective, destination: int) -> _Operation:
    verdict = op.carries or "other_collective"
    width = 1
    if op.op == "all_reduce":
        width = DTYPE_BYTES[op.dtype]
        messages = schedule.all_reduce(layout, edge, channel, op.elements, width)
    elif op.op == "broadcast":
        messages = schedule.broadcast(layout, edge, channel, op.bytes, op.root)
    else:
        messages = schedule.all_gather(layout, edge, channel, op.bytes)
    return _Operation(op.op, messages, width, destination, (verdict, verdict))


def _iteration(plan: Plan, connection: Connection, revision: Revision) -> list[_Operation]:
    """Return one iteration's all-reduces on a connection; the last that uses it ends the iteration there."""
    layout, operations = plan.shard.layout, []
    for reduction in range(1, revision.reductions + 1):
        verdicts = ("placed", "partial_sum") if reduction == revision.reductions else ("other_collective",) * 2
        for bucket, offset in zip(revision.buckets, revision.bucket_offsets, strict=True):
            width = DTYPE_BYTES[bucket.dtype]
            messages = schedule.all_reduce(layout, connection.edge, connection.channel, bucket.elements, width)
            operations.append(_Operation("all_reduce", messages, width, offset, verdicts, 1))
    if plan.record_form is not None:
        operations.append(_record(plan, connection, revision))
    # Past an iteration is who has sent something of the next one after its first operation.
    operations[0] = replace(operations[0], settled_lag=2)
    operations = [operation for operation in operations if len(operation.messages)]
    return operations[:-1] + [replace(operation, ends_iteration=True) for operation in operations[-1:]]


def _record(plan: Plan, connection: Connection, revision: Revision) -> _Operation:
    """Return the all-reduce of the step record.

    A sum that lacks only the rank which gets it is the record already, unless that rank fills it: the others add zeros.
    Not so for the digests behind it, to which every rank adds.
    """
    layout, form = plan.shard.layout, plan.record_form
    messages = schedule.all_reduce(layout, connection.edge, connection.channel, form.elements, 4)
    receiver = layout.ring[(connection.edge + 1) % len(layout.ring)]
    counted = messages["elements"] * 4
    if receiver != plan.shard.step_record.contributor:
        early = schedule.last_partial_sums(layout, messages)
        filled = np.clip(2 * form.words - messages["first"], 0, messages["elements"]) * 4
        messages["final"] |= early & (filled > 0)
        counted = np.where(early, filled, counted)
    begin, _ = plan.record_range(revision)
    return _Operation("all_reduce", messages, 4, begin, ("step_record", "partial_sum"), 1, counted=counted)


def compile_programs(plan: Plan) -> list[Program]:
    """Return the programs of a plan's connections, in plan order."""
    return [_compile(plan, index) for index in range(len(plan.shard.connections))]


def _clean(layout: Layout) -> list[tuple[int, int, int, int, int]]:
    if layout.protocol != "ll":
        return []
    full = np.array([PROTOCOLS["ll"].slot_bytes])
    pieces = [queue_pair_pieces(layout, number, number, full) for number in range(layout.queue_pairs)]
    return [
        (int(p.offset[0]), int(p.length[0]), int(p.address[0]), int(p.packets[0]), int(p.bulk_split[0])) for p in pieces
    ]


def _compile(plan: Plan, index: int) -> Program:
    shard = plan.shard
    connection, layout = shard.connections[index], shard.layout
    where = (layout, connection.edge, connection.channel)
    table = _Table(layout)
    initial = iter(plan.initial_ranges)
    startup = [_collective(*where, op, next(initial)[0] if op.carries else 0) for op in shard.startup]
    table.add(startup, 0, 0, 1)
    for number, revision in enumerate(shard.revisions):
        first = revision.from_iteration
        table.add([_collective(*where, op, 0) for op in revision.before], first, 0, 1)
        buckets = _iteration(plan, connection, revision)
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
        start_psn=connection.start_psn,
        encoding=_ENCODINGS[layout.protocol],
        slot_stride=PROTOCOLS[layout.protocol].slot_bytes,
        big_endian_immediate=layout.big_endian_immediate,
        clean=_clean(layout),
        segments=[np.concatenate(part) if part else np.empty(0, SEGMENT) for part in table.segments],
        rows=[np.concatenate(part) if part else np.empty(0, ROW) for part in table.rows],
    )


def frames_per_iteration(plan: Plan, stream: str) -> int:
    """Return how many frames an iteration's gradients are on a stream, at most: data, credits, acknowledgements."""
    shown, most = plan.shard.stream_connections(stream), 0
    for revision in plan.shard.revisions:
        count = 0
        for index in shown:
            connection = plan.shard.connections[index]
            for operation in _iteration(plan, connection, revision):
                wire = wire_bytes(plan.shard.layout, operation.messages["elements"] * operation.width)
                # Per message a credit and its acknowledgement; per data packet, at worst, one of its own.
                count += 2 * len(wire)
                for number in range(plan.shard.layout.queue_pairs):
                    count += 2 * int(queue_pair_pieces(plan.shard.layout, number, 0, wire).packets.sum())
        most = max(most, count)
    return most


def mirrored_ranges(plan: Plan, iteration: int) -> list[list[int]]:
    """Return the byte ranges of an iteration's flat gradient that some mirrored connection carries fully reduced."""
    shard, ranges = plan.shard, []
    shown = sorted({index for stream in shard.streams for index in shard.stream_connections(stream.name)})
    for index in shown:
        connection = shard.connections[index]
        for operation in _iteration(plan, connection, shard.revision(iteration)):
            if operation.verdicts[0] == "other_collective":
                continue
            final = operation.messages[operation.messages["final"] & (operation.messages["elements"] > 0)]
            begin = operation.destination + final["first"] * operation.width
            ranges += zip(begin.tolist(), (begin + final["elements"] * operation.width).tolist(), strict=True)
    return plan.flat_ranges(iteration, ranges)


def carried(plan: Plan, iteration: int) -> list[int]:
    """Return the indices of the connections that send anything of an iteration; 0 is the initial state."""
    shard, out = plan.shard, []
    for index, connection in enumerate(shard.connections):
        where = (shard.layout, connection.edge, connection.channel)
        if iteration:
            operations = _iteration(plan, connection, shard.revision(iteration))
        else:
            operations = [_collective(*where, op, 0) for op in shard.startup if op.carries]
        if any(len(operation.messages) for operation in operations):
            out.append(index)
    return out
