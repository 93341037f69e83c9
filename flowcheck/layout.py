# SPDX-License-Identifier: MIT
"""What a plan's collectives look like on each queue pair: the modelled layouts, compiled into the parser's tables.

Two steps. `all_reduce`, `broadcast` and `all_gather` give the ordered messages of one operation on one connection;
`compile_programs` strings the operations of a plan together into segments of rows (`fc_segment`, `fc_row`). A learned
layout would give the same messages from another source; nothing after this module would know.

Facts: NCCL 2.12 to 2.19, src/collectives/device/all_reduce.h and prims_ll.h, src/enqueue.cc. The schedule is that of
its ring algorithm; the split over channels is the kernel's, interleaved, and depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from flowcheck.formats import ROW, SEGMENT
from flowcheck.plan import DTYPE_BYTES, Bucket, Collective, Layout, Plan, Shard
from flowcheck.verdicts import VERDICTS

__all__ = [
    "Message",
    "Program",
    "all_gather",
    "all_reduce",
    "broadcast",
    "compile_programs",
    "mirrored_ranges",
    "threads_and_channels",
]

#: LL: a slot holds 64 KiB of lines, each line 8 data bytes in 16 (prims_ll.h; init.cc computeBuffSizes).
LL_SLOT_BYTES = 65536
LL_CHUNK_BYTES = LL_SLOT_BYTES // 2
LL_MOST_THREADS = 512
WARP = 32
LEAST_THREADS = 96
#: A message longer than this is split in the adaptive-routing form (net_ib.cc, NCCL_IB_AR_THRESHOLD).
BULK_SPLIT_BYTES = 8192
#: Slots of a connection's buffer (NCCL_STEPS).
SLOTS = 8

_NUMBER = {name: number for number, name in enumerate(VERDICTS)}
_ENCODING_LL = 2


@dataclass(frozen=True)
class Message:
    """One message of an operation on one connection: `elements` from `first` on, `final` if fully reduced."""

    first: int
    elements: int
    final: bool


@dataclass
class Program:
    """The tables of one connection: per queue pair its segments and rows."""

    connection: int
    edge: int
    channel: int
    source: bytes
    destination: bytes
    data_queue_pairs: list[int]
    credit_queue_pairs: list[int]
    sender_rank: int
    segments: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    slot_stride: int = LL_SLOT_BYTES
    slots: int = SLOTS


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def threads_and_channels(layout: Layout, data_bytes: int) -> tuple[int, int]:
    """Return (threads, channels) that the library uses for an operation of so many bytes (enqueue.cc, getAlgoInfo).

    Small operations give up channels first, then threads, until each thread has its threshold of bytes.
    """
    threads, channels = layout.threads or LL_MOST_THREADS, layout.channels
    if layout.pin_channels:
        return threads, channels
    threshold = 8 * len(layout.ring)
    while data_bytes < channels * threads * threshold and channels >= 2:
        channels -= 1
    while data_bytes < channels * threads * threshold and threads % 128 == 0:
        threads //= 2
    return max(threads, LEAST_THREADS), channels


def _loops(count: int, span: int) -> Iterator[int]:
    return iter(range(0, count, span))


def all_reduce(layout: Layout, edge: int, channel: int, count: int, element_bytes: int) -> list[Message]:
    """Return the messages of a ring all-reduce of `count` elements on one connection, in the order sent.

    Per loop 2(n-1) messages; number s carries chunk (edge - 1 - s) mod n, fully reduced from s = n-1 on. Empty chunks
    are sent as empty messages.
    """
    ranks = len(layout.ring)
    threads, channels = threads_and_channels(layout, count * element_bytes)
    if channel >= channels:
        return []
    chunk = LL_CHUNK_BYTES // element_bytes
    grain = threads * (8 // element_bytes)
    messages = []
    for begin in _loops(count, channels * ranks * chunk):
        real = min(chunk, -(-(count - begin) // (channels * ranks * grain)) * grain)
        for send in range(2 * (ranks - 1)):
            number = (edge - 1 - send) % ranks
            first = min(begin + (number * channels + channel) * real, count)
            messages.append(Message(first, min(real, count - first), final=send >= ranks - 1))
    return messages


def broadcast(layout: Layout, edge: int, channel: int, data_bytes: int, root: int) -> list[Message]:
    """Return the messages of a broadcast of bytes from rank `root`; nothing on the edge that leads back into it."""
    ranks = len(layout.ring)
    if layout.ring[(edge + 1) % ranks] == root:
        return []
    return [
        Message(first, length, True) for _, first, length in _byte_chunks(layout, channel, data_bytes, data_bytes, 1)
    ]


def all_gather(layout: Layout, edge: int, channel: int, data_bytes: int) -> list[Message]:
    """Return the messages of an all-gather of `data_bytes` per rank; `first` counts in the gathered vector."""
    ranks = len(layout.ring)
    messages = []
    for _, first, length in _byte_chunks(layout, channel, data_bytes, data_bytes * ranks, ranks):
        for send in range(ranks - 1):
            rank = layout.ring[(edge - send) % ranks]
            messages.append(Message(rank * data_bytes + first, length, True))
    return messages


def _byte_chunks(layout: Layout, channel: int, count: int, traffic: int, factor: int) -> Iterator[tuple[int, int, int]]:
    """Yield (loop begin, first byte, bytes) of this channel's part of each loop over `count` bytes.

    The last loop's chunk is the host's: its bytes spread over the channels, rounded up to eight bytes a thread
    (enqueue.cc, lastChunkSize; `factor` is the number of ranks for an all-gather, 1 for a broadcast).
    """
    threads, channels = threads_and_channels(layout, traffic)
    if channel >= channels:
        return
    span = channels * LL_CHUNK_BYTES
    for begin in _loops(count, span):
        chunk = LL_CHUNK_BYTES
        if count - begin < span:
            rest = traffic % (channels * factor * LL_CHUNK_BYTES)
            chunk = min(chunk, _up(-(-rest // (channels * factor)), threads * 8))
        first = min(begin + channel * chunk, count)
        yield begin, first, min(chunk, count - first)


class _Table:
    """Rows of one queue pair under construction; counters run over the whole life of the connection."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.rows: list[np.void] = []
        self.segments: list[np.void] = []
        self.psn = self.step = 0
        self._open: np.void | None = None

    def begin(self, first_iteration: int, period_iterations: int, repeats: int) -> None:
        segment = np.zeros((), SEGMENT)
        segment["first_psn"], segment["first_step"] = self.psn, self.step
        segment["first_row"], segment["first_iteration"] = len(self.rows), first_iteration
        segment["period_iterations"], segment["repeats"] = period_iterations, repeats
        self._open, self._psn, self._step = segment, 0, 0

    def add(self, message: Message, element_bytes: int, destination: int, verdict: str, settled_lag: int) -> None:
        row = np.zeros((), ROW)
        valid = message.elements * element_bytes
        wire = 16 * -(-valid // 8)
        row["psn"], row["step"], row["wire_bytes"], row["message_bytes"] = self._psn, self._step, wire, valid
        row["bulk_split"] = self.layout.adaptive_routing and wire > BULK_SPLIT_BYTES
        row["packets"] = max(1, -(-wire // self.layout.mtu)) + int(row["bulk_split"])
        row["destination"] = destination + message.first * element_bytes
        row["verdict"], row["encoding"], row["settled_lag"] = _NUMBER[verdict], _ENCODING_LL, settled_lag
        self._psn += int(row["packets"])
        self._step += 1
        self.rows.append(row)

    def end(self) -> None:
        segment = self._open
        segment["rows"] = len(self.rows) - int(segment["first_row"])
        segment["period_psn"], segment["period_steps"] = self._psn, self._step
        if not segment["rows"]:
            return
        self.segments.append(segment)
        repeats = int(segment["repeats"])
        self.psn += self._psn * repeats
        self.step += self._step * repeats


def compile_programs(plan: Plan) -> list[Program]:
    """Return the programs of a plan's connections, in plan order."""
    return [_compile(plan, plan.shard, index) for index in range(len(plan.shard.connections))]


def _compile(plan: Plan, shard: Shard, index: int) -> Program:
    connection, layout = shard.connections[index], shard.layout
    table = _Table(layout)

    def collective(op: Collective, destination: int) -> None:
        if op.op == "all_reduce":
            width = DTYPE_BYTES[op.dtype]
            messages = all_reduce(layout, connection.edge, connection.channel, op.elements, width)
        elif op.op == "broadcast":
            width, messages = 1, broadcast(layout, connection.edge, connection.channel, op.bytes, op.root)
        else:
            width, messages = 1, all_gather(layout, connection.edge, connection.channel, op.bytes)
        for message in messages:
            table.add(message, width, destination, op.carries or "other_collective", 0)

    def bucket(tensor: Bucket, destination: int, number: int) -> None:
        width = DTYPE_BYTES[tensor.dtype]
        for message in all_reduce(layout, connection.edge, connection.channel, tensor.elements, width):
            # Past an iteration is who has sent something of the next one after its first operation.
            verdict = "placed" if message.final else "partial_sum"
            table.add(message, width, destination, verdict, 1 if number else 2)

    table.begin(0, 0, 1)
    initial = iter(plan.initial_ranges)
    for op in shard.startup:
        collective(op, next(initial)[0] if op.carries else 0)
    table.end()
    for number, revision in enumerate(shard.revisions):
        if revision.before:
            table.begin(revision.from_iteration, 0, 1)
            for op in revision.before:
                collective(op, 0)
            table.end()
        last = number + 1 == len(shard.revisions)
        repeats = 0 if last else shard.revisions[number + 1].from_iteration - revision.from_iteration
        table.begin(revision.from_iteration, 1, repeats)
        for order, (tensor, offset) in enumerate(zip(revision.buckets, revision.bucket_offsets, strict=True)):
            bucket(tensor, offset, order)
        table.end()
    return Program(
        connection=index,
        edge=connection.edge,
        channel=connection.channel,
        source=connection.source_bytes,
        destination=connection.destination_bytes,
        data_queue_pairs=list(connection.proof.data),
        credit_queue_pairs=list(connection.proof.credit),
        sender_rank=layout.ring[connection.edge],
        segments=[np.array(table.segments, SEGMENT)],
        rows=[np.array(table.rows, ROW)],
    )


def mirrored_ranges(plan: Plan, iteration: int) -> list[list[int]]:
    """Return the byte ranges of an iteration's flat gradient that some mirrored connection carries fully reduced."""
    shard, ranges = plan.shard, []
    revision = shard.revision(iteration)
    shown = sorted({index for stream in shard.streams for index in shard.stream_connections(stream.name)})
    for index in shown:
        connection = shard.connections[index]
        for tensor, offset in zip(revision.buckets, revision.bucket_offsets, strict=True):
            width = DTYPE_BYTES[tensor.dtype]
            for message in all_reduce(shard.layout, connection.edge, connection.channel, tensor.elements, width):
                if message.final and message.elements:
                    ranges.append((offset + message.first * width, offset + (message.first + message.elements) * width))
    return plan.flat_ranges(iteration, ranges)
