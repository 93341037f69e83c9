# SPDX-License-Identifier: MIT
"""Which elements the library's ring collectives send on a connection, message by message: the modelled schedules.

A message is one send of a connection: for LL and LL128 a chunk, for Simple one slice of a chunk. How a message lies in
slots and packets is `flowcheck.layout`'s.

Facts: NCCL src/device/all_reduce.h, broadcast.h, all_gather.h (src/collectives/device up to 2.19), prims_simple.h, and
src/enqueue.cc. The order of sends never changed from 2.12 to 2.30; the split of an operation over its channels did:
up to 2.19 the kernel interleaves them, 2.20 and 2.21 give each channel a run of whole loops' alignment, and from 2.22
channels are filled with cells, one after another, until each has its share of the traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowcheck.plan import Layout

__all__ = [
    "MESSAGE",
    "PROTOCOLS",
    "Protocol",
    "all_gather",
    "all_reduce",
    "broadcast",
    "last_partial_sums",
    "threads_and_channels",
]

#: One message: `elements` from `first` on (bytes for broadcast and all-gather), all their sums complete if `final`.
MESSAGE = np.dtype([("first", "<i8"), ("elements", "<i8"), ("final", "?")])

WARP = 32
LEAST_THREADS = 96


@dataclass(frozen=True)
class Protocol:
    """What a protocol fixes: its slots, what a chunk holds, and the thread counts it starts from.

    Attributes:
        slot_bytes: of one of the eight slots of a connection (init.cc, computeBuffSizes; the default sizes).
        chunk_bytes: data bytes of a full chunk of an all-reduce or all-gather.
        root_chunk_bytes: data bytes of a full chunk of a broadcast.
        threads: before small operations give some up.
        slices: messages of an all-reduce's or all-gather's chunk.
        slice_steps: by how much such a message moves the step counter.
    """

    slot_bytes: int
    chunk_bytes: int
    root_chunk_bytes: int
    threads: int
    slices: int
    slice_steps: int


PROTOCOLS = {
    "ll": Protocol(65536, 32768, 32768, 512, 1, 1),
    "ll128": Protocol(614400, 576000, 576000, 640, 1, 1),
    "simple": Protocol(524288, 4 * 524288, 524288, 512, 2, 2),
}


def _up(value, multiple: int):
    return -(-value // multiple) * multiple


def threads_and_channels(layout: Layout, data_bytes: int) -> tuple[int, int]:
    """Return (threads, channels) that the library uses for an operation of so many bytes (enqueue.cc, getAlgoInfo).

    Small operations give up channels first, then threads, until each thread has its threshold of bytes. Simple's count
    includes the warp that synchronises.
    """
    threads, channels = layout.threads or PROTOCOLS[layout.protocol].threads, layout.channels
    if not layout.pin_channels:
        threshold = {"ll": 8 * len(layout.ring), "ll128": 8, "simple": 64}[layout.protocol]
        while data_bytes < channels * threads * threshold and channels >= 2:
            channels -= 1
        while data_bytes < channels * threads * threshold and threads % 128 == 0:
            threads //= 2
    if layout.protocol == "simple":
        threads += WARP
    return max(threads, LEAST_THREADS), channels


@dataclass(frozen=True)
class _Loops:
    """A channel's loops over an operation: chunk c of loop i is `real[i]` elements from `base[i] + c * stride[i]`.

    What lies at or behind `end` belongs to nobody: chunks are cut there.
    """

    base: np.ndarray
    stride: np.ndarray
    real: np.ndarray
    end: int

    def chunks(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (first, elements), each shaped (loops, numbers), of the chunks of these numbers in each loop."""
        first = np.minimum(self.base[:, None] + numbers[None, :] * self.stride[:, None], self.end)
        return first, np.minimum(self.real[:, None], self.end - first)


_NO_LOOPS = _Loops(*(np.empty(0, np.int64) for _ in range(3)), 0)


def _loops(
    layout: Layout, channel: int, count: int, width: int, parts: int, *, traffic: int, weight: int, chunk: int
) -> _Loops:
    """Return a channel's loops over `count` elements of `width` bytes, cut into `parts` chunks a loop.

    `traffic` is the operation's data bytes as the library counts them, `weight` its traffic per byte, `chunk` the
    elements of a full chunk.
    """
    threads, channels = threads_and_channels(layout, traffic)
    if channel >= channels:
        return _NO_LOOPS
    if layout.minor <= 19:
        return _interleaved(layout, channel, channels, threads, count, width, parts, traffic, chunk)
    if layout.minor <= 21:
        grains = {"ll": 8 // width * threads, "ll128": 480 // width * (threads // WARP), "simple": 4096 // width}
        grain = grains[layout.protocol]
        begin, share = _runs(channel, channels, count, width, grain)
    else:
        begin, share = _cells(layout, channel, channels, count, width, weight)
        grain = 16 // width
    at = np.arange(0, share, parts * chunk, dtype=np.int64)
    real = np.full(len(at), chunk, np.int64)
    if share % (parts * chunk):
        real[-1] = _up(-(-(share % (parts * chunk)) // parts), grain)
    return _Loops(begin + at, real, real, begin + share)


def _interleaved(
    layout: Layout,
    channel: int,
    channels: int,
    threads: int,
    count: int,
    width: int,
    parts: int,
    traffic: int,
    chunk: int,
) -> _Loops:
    """2.12 to 2.19: every channel takes its part of every loop; the last loop is spread over all of them."""
    base = np.arange(0, count, channels * parts * chunk, dtype=np.int64)
    left = count - base
    if layout.protocol == "simple":
        real = _up(np.minimum(chunk, -(-left // (channels * parts))), (threads - WARP) * 8 // width)
        return _Loops(base + channel * parts * real, real, real, count)
    if parts > 1:
        grain = threads * (8 // width) if layout.protocol == "ll" else threads * (60 // width) // 2
        real = np.minimum(chunk, -(-left // (channels * parts * grain)) * grain)
    elif layout.protocol == "ll":
        # The host computes the last loop's chunk, from the traffic of all ranks (enqueue.cc, lastChunkSize).
        ranks = traffic // count
        rest = traffic % (channels * ranks * chunk)
        last = min(chunk, _up(-(-rest // (channels * ranks)), threads * 8))
        real = np.where(left < channels * chunk, last, chunk)
    else:
        grain = threads * (60 // width) // 2
        real = np.minimum(chunk, -(-left // (channels * grain)) * grain)
    return _Loops(base + channel * real, channels * real, real, count)


def _runs(channel: int, channels: int, count: int, width: int, grain: int) -> tuple[int, int]:
    """2.20 and 2.21: return (first element, elements) of a channel's run; each takes an equal share, rounded up."""
    share = _up(-(-count * width // channels), 16)
    begin = 0
    for number in range(channels):
        left = count - begin
        run = min(_up(-(-min(share, left * width) // width), grain), left)
        if number == channel:
            return begin, run
        begin += run
    raise AssertionError("no such channel")


def _cells(layout: Layout, channel: int, channels: int, count: int, width: int, weight: int) -> tuple[int, int]:
    """2.22 on: return (first element, elements) of a channel's cells (enqueue.cc, scheduleCollTasksToPlan).

    One operation alone in its group: it begins on channel 0 with that channel's whole budget.
    """
    least = 0 if layout.minor == 22 else 16384 if layout.minor <= 28 else 32768
    if layout.protocol == "ll" and layout.minor >= 26:
        weight *= 4
    cell = _up(-(-least // weight), 16) if least else 16
    traffic = max(least, count * width * weight)
    budget = traffic // channels
    if layout.minor >= 29:
        budget = _up(budget, 16)
    budget = max(least or 512, budget)
    cells = -(-count * width // cell)
    per = min(cells, -(-budget // (cell * weight)))
    if channels == 1:
        low = cells
    else:
        low = min(cells, budget // (cell * weight) if layout.minor == 22 else per)
    middle, high = divmod(cells - low, per)
    if (low > 0) + middle + (high > 0) > channels:
        middle = channels - 2
        per = (cells - low) // (middle + 1)
        high = cells - low - middle * per
    if high == 0 and middle > 0:
        middle, high = middle - 1, per
    skipped = low == 0
    if skipped:  # the first channel has no room for a single cell: all moves on by one
        low, middle, high = (per, middle - 1, high) if middle else (high, 0, 0)
    parts = [0] * skipped + [low] + [per] * middle + [high] * (high > 0)
    begin = sum(parts[:channel]) * cell // width
    if channel >= len(parts):
        return count, 0
    return begin, min(parts[channel] * cell // width, count - begin)


def _slices(first: np.ndarray, elements: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut Simple's chunks into two slices along a new last axis; the second may be empty (prims_simple.h)."""
    size = np.maximum(16 * -(-elements // 32), 2 * PROTOCOLS["simple"].slot_bytes // width // 32)
    one = np.minimum(size, elements)
    return np.stack([first, first + one], -1), np.stack([one, elements - one], -1)


def _messages(layout: Layout, first: np.ndarray, elements: np.ndarray, width: int, final: np.ndarray) -> np.ndarray:
    """Return chunks shaped (loops, sends) as messages in the order sent; `final` per send."""
    final = np.broadcast_to(final, first.shape)
    if PROTOCOLS[layout.protocol].slices == 2:
        first, elements = _slices(first, elements, width)
        final = np.repeat(final[..., None], 2, -1)
    messages = np.empty(first.size, MESSAGE)
    messages["first"], messages["elements"], messages["final"] = first.ravel(), elements.ravel(), final.ravel()
    return messages


def all_reduce(layout: Layout, edge: int, channel: int, count: int, width: int) -> np.ndarray:
    """Return the messages (MESSAGE) of a ring all-reduce of `count` elements of `width` bytes on one connection.

    In the order sent. Per loop 2(n-1) sends; send s carries chunk (edge - 1 - s) mod n, fully reduced from s = n-1 on.
    Empty chunks are sent as empty messages.
    """
    ranks = len(layout.ring)
    chunk = PROTOCOLS[layout.protocol].chunk_bytes // width
    data = count * width
    loops = _loops(layout, channel, count, width, ranks, traffic=data, weight=2, chunk=chunk)
    sends = np.arange(2 * (ranks - 1))
    first, elements = loops.chunks((edge - 1 - sends) % ranks)
    return _messages(layout, first, elements, width, sends >= ranks - 1)


def last_partial_sums(layout: Layout, messages: np.ndarray) -> np.ndarray:
    """Return which messages of an all-reduce carry sums of all ranks but the one that gets them."""
    ranks = len(layout.ring)
    sends = np.arange(len(messages)) // PROTOCOLS[layout.protocol].slices % (2 * (ranks - 1))
    return sends == ranks - 2


def broadcast(layout: Layout, edge: int, channel: int, data_bytes: int, root: int) -> np.ndarray:
    """Return the messages (MESSAGE, in bytes) of a broadcast from rank `root`; none on the edge that leads into it."""
    if layout.ring[(edge + 1) % len(layout.ring)] == root:
        return np.empty(0, MESSAGE)
    chunk = PROTOCOLS[layout.protocol].root_chunk_bytes
    loops = _loops(layout, channel, data_bytes, 1, 1, traffic=data_bytes, weight=1, chunk=chunk)
    messages = np.empty(len(loops.base), MESSAGE)
    first, elements = loops.chunks(np.zeros(1, np.int64))
    messages["first"], messages["elements"], messages["final"] = first[:, 0], elements[:, 0], True
    return messages


def all_gather(layout: Layout, edge: int, channel: int, data_bytes: int) -> np.ndarray:
    """Return the messages (MESSAGE, in bytes) of an all-gather of `data_bytes` per rank.

    `first` counts in the gathered vector, whose blocks are in the order of ranks.
    """
    ranks = len(layout.ring)
    chunk = PROTOCOLS[layout.protocol].chunk_bytes
    traffic = data_bytes * ranks
    loops = _loops(layout, channel, data_bytes, 1, 1, traffic=traffic, weight=ranks, chunk=chunk)
    first, elements = (np.repeat(part, ranks - 1, 1) for part in loops.chunks(np.zeros(1, np.int64)))
    owners = np.array([layout.ring[(edge - send) % ranks] for send in range(ranks - 1)])
    return _messages(layout, first + owners * data_bytes, elements, 1, np.ones(ranks - 1, bool))
