# SPDX-License-Identifier: MIT
"""A second, slow account of which elements NCCL's rings send, for tests: it imports nothing of FlowCheck.

Element by element and chunk by chunk, in plain integers, after the library's own kernels (all_reduce.h, broadcast.h,
all_gather.h) and its host code (enqueue.cc). Where FlowCheck computes closed forms over arrays, this walks.
"""

from dataclasses import dataclass

CAPACITY = {"ll": 32768, "ll128": 576000, "simple": 2097152}  # data bytes of a full chunk
ROOT_CAPACITY = {"ll": 32768, "ll128": 576000, "simple": 524288}  # the same, of a broadcast


@dataclass(frozen=True)
class Job:
    """What the library was told, and what it is."""

    version: str
    protocol: str
    ranks: int
    channels: int = 1
    threads: int | None = None
    pin_channels: bool = False
    queue_pairs: int = 1
    split: bool = True
    mtu: int = 1024
    adaptive_routing: bool = False

    @property
    def generation(self):
        minor = int(self.version.split(".")[1])
        return next(g for g in (229, 226, 223, 222, 220, 212) if minor >= g - 200)


@dataclass(frozen=True)
class Send:
    """One message: so many elements from `first`, final or a partial sum; `chunk` is its number in the loop."""

    first: int
    elements: int
    final: bool
    chunk: int


def ceil(a, b):
    return a // b + (1 if a % b else 0)


def up(a, b):
    return ceil(a, b) * b


def resources(job, nbytes):
    """Return (channels, threads) of an operation; for Simple without the warp that is added for it. With it they are 96 at least."""
    channels = job.channels
    threads = job.threads or (640 if job.protocol == "ll128" else 512)
    least = {"ll": 8 * job.ranks, "ll128": 8, "simple": 64}[job.protocol]
    while not job.pin_channels and nbytes < channels * threads * least:
        if channels >= 2:
            channels -= 1
        elif threads % 128 == 0:
            threads //= 2
        else:
            break
    return channels, max(threads, 64 if job.protocol == "simple" else 96)


def parts(job, nbytes, count, width, factor):
    """Return per channel (first element, elements), from 2.20 on; `factor` is the traffic per byte."""
    channels, threads = resources(job, nbytes)
    total = count * width
    if job.generation == 220:
        align = {"ll": 8 // width * threads, "ll128": 480 // width * (threads // 32), "simple": 4096 // width}[
            job.protocol
        ]
        share, out, at = up(ceil(total, channels), 16), [], 0
        while len(out) < channels:
            left = count - at
            size = min(up(ceil(min(share, left * width), width), align), left)
            out.append((at, size))
            at += size
        return out, align
    if job.protocol == "ll" and job.generation >= 226:
        factor *= 4
    minimum = {222: None, 223: 16384, 226: 16384, 229: 32768}[job.generation]
    cell = 16 if minimum is None else up(ceil(minimum, factor), 16)
    traffic = total * factor if minimum is None else max(minimum, total * factor)
    budget = traffic // channels
    if job.generation == 229:
        budget = up(budget, 16)
    budget = max(512 if minimum is None else minimum, budget)
    cells = ceil(total, cell)
    per = min(cells, ceil(budget, cell * factor))
    first = (
        cells
        if channels == 1
        else min(cells, budget // (cell * factor) if job.generation == 222 else ceil(budget, cell * factor))
    )
    sizes = [first]
    rest = cells - first
    needed = (1 if first else 0) + rest // per + (1 if rest % per else 0)
    if needed > channels:
        middle = channels - 2
        each = rest // (middle + 1)
        sizes += [each] * middle + [rest - each * middle]
    else:
        while rest:
            sizes.append(min(per, rest))
            rest -= sizes[-1]
    out, at = [], 0
    for size in sizes:
        elements = min(size * cell // width, count - at)
        out.append((at, elements))
        at += elements
    return out + [(count, 0)] * (channels - len(out)), 16 // width


def slices(job, first, elements, width, final, chunk):
    """Return a chunk's messages: Simple cuts it in two."""
    if job.protocol != "simple":
        return [Send(first, elements, final, chunk)]
    size = max(16 * ceil(elements, 32), 2 * 524288 // width // 32)
    one = min(size, elements)
    return [Send(first, one, final, chunk), Send(first + one, elements - one, final, chunk)]


def all_reduce(job, edge, channel, count, width):
    """Return the sends of an all-reduce on edge `edge` of a channel, in order."""
    n, channels_threads = job.ranks, resources(job, count * width)
    channels, threads = channels_threads
    if channel >= channels:
        return []
    chunk = CAPACITY[job.protocol] // width
    out = []

    def loop(place, length, end):
        for send in range(2 * (n - 1)):
            number = (edge - 1 - send) % n
            begin = min(place(number), end)
            out.extend(slices(job, begin, max(0, min(length, end - begin)), width, send >= n - 1, number))

    if job.generation == 212:
        at = 0
        while at < count:
            left = count - at
            if job.protocol == "simple":
                length = up(min(chunk, ceil(left, channels * n)), threads * 8 // width)
                loop(lambda c, at=at, length=length: at + channel * n * length + c * length, length, count)
            else:
                grain = threads * (8 // width) if job.protocol == "ll" else threads * (60 // width) // 2
                length = min(chunk, ceil(left, channels * n * grain) * grain)
                loop(lambda c, at=at, length=length: at + (c * channels + channel) * length, length, count)
            at += channels * n * chunk
        return out
    runs, align = parts(job, count * width, count, width, 2)
    begin, share = runs[channel]
    at = 0
    while at < share:
        left = share - at
        length = chunk if left >= n * chunk else up(ceil(left, n), align)
        loop(lambda c, at=at, length=length: begin + at + c * length, length, begin + share)
        at += n * chunk
    return out


def byte_runs(job, channel, count, traffic, factor, chunk):
    """Return (first byte, bytes) per loop of a channel, of a collective that counts bytes and moves whole blocks."""
    channels, threads = resources(job, traffic)
    if channel >= channels:
        return []
    out, at = [], 0
    if job.generation == 212:
        while at < count:
            left = count - at
            if job.protocol == "ll":
                length = chunk
                if left < channels * chunk:
                    rest = traffic % (channels * factor * chunk)
                    length = min(chunk, up(ceil(rest, channels * factor), threads * 8))
            elif job.protocol == "ll128":
                grain = threads * 60 // 2
                length = min(chunk, ceil(left, channels * grain) * grain)
            else:
                length = up(min(chunk, ceil(left, channels)), threads * 8)
            begin = min(at + channel * length, count)
            out.append((begin, min(length, count - begin)))
            at += channels * chunk
        return out
    begin, share = parts(job, traffic, count, 1, factor)[0][channel]
    while at < share:
        out.append((begin + at, min(chunk, share - at)))
        at += chunk
    return out


def broadcast(job, edge, channel, nbytes, root=0):
    """Return the sends of a broadcast from a ring position; nothing leads back into it."""
    if (edge + 1) % job.ranks == root:
        return []
    runs = byte_runs(job, channel, nbytes, nbytes, 1, ROOT_CAPACITY[job.protocol])
    return [Send(first, size, True, 0) for first, size in runs]


def all_gather(job, edge, channel, nbytes):
    """Return the sends of an all-gather of so many bytes a rank; `first` counts in the gathered vector."""
    out = []
    for first, size in byte_runs(job, channel, nbytes, nbytes * job.ranks, job.ranks, CAPACITY[job.protocol]):
        for send in range(job.ranks - 1):
            block = (edge - send) % job.ranks
            out += slices(job, block * nbytes + first, size, 1, True, block)
    return out
