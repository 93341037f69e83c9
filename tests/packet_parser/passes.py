# SPDX-License-Identifier: MIT
"""What mirrored links show of the learner's passes: every edge's frames, written by the recorder's own tap.

The sums are worked out here, element by element, from who has contributed where: nothing of the learner.
"""

import contextlib
import os
from dataclasses import dataclass, field

import numpy as np
import torch

from flowcheck import learning, schedule
from flowcheck.plan import Layout
from packet_parser.learn import Learner
from workload_gen.pcapng import PcapngWriter
from workload_gen.wire import LinkTap, connections

TORCH = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
}


def layout(protocol="ll", ranks=2, channels=1, queue_pairs=1, version="2.19", **more):
    return Layout(
        source="modelled", library="nccl", version=version, protocol=protocol, ring=tuple(more.pop("ring", range(ranks))),
        channels=channels, queue_pairs=queue_pairs, mtu=more.pop("mtu", 1024), pin_channels=True, **more,
    )  # fmt: skip


class Tap(LinkTap):
    """Keeps frames in a list. `tails` says what is behind a message's last element in its last line or group.

    `last`: the bytes sent last, as the recorder has it; `next`: the true final values of the elements that follow;
    `once`: those, but not in the passes that `lying` names.
    """

    def __init__(self, shape, links, messages, tails):
        super().__init__(shape, links, os.devnull, messages)
        self.frames, self.tails, self.lying = [], tails, False
        self._following = None

    def all_reduce(self, partial, result):
        if self.tails != "last":
            width, body = result.element_size(), result.view(torch.uint8).numpy().tobytes()
            self._following = {}
            for c in self._links:
                messages = self._messages.all_reduce(self._layout, c.edge, c.channel, result.numel(), width)
                ends = ((messages["first"] + messages["elements"]) * width).tolist()
                self._following[c.channel] = iter([(body[end : end + 2048] + body)[:2048] for end in ends])
        super().all_reduce(partial, result)
        self._following = None

    def _send(self, link, data):
        if self._following is not None:
            following = next(self._following[link.channel])
            link.stale = b"\x17" * 8 if self.lying else following
        super()._send(link, data)

    def _write(self, written):
        for frame in written:
            self._clock_ns += 700
            self.frames.append((frame, self._clock_ns))


@dataclass
class Job:
    """Links of a job on which passes and other collectives run; `frames` are all of them, in order."""

    layout: Layout
    links: tuple = (0, 1)
    messages: object = schedule
    tails: str = "last"
    ip: int = 6
    start_psn: int = 0
    taps: dict = field(default_factory=dict)
    passes: list = field(default_factory=list)

    def __post_init__(self):
        for edge in self.links:
            of_link = connections(self.layout, edge, self.ip, None, self.start_psn)
            self.taps[edge] = Tap(self.layout, of_link, self.messages, self.tails)

    @property
    def frames(self):
        return sorted((pair for tap in self.taps.values() for pair in tap.frames), key=lambda pair: pair[1])

    def summed(self, parts):
        """Reduce arrays, one per rank (numpy; bfloat16 as torch), over the ring: on every mirrored link what it shows."""
        ranks, ring = len(self.layout.ring), self.layout.ring
        count, width = len(parts[0]), parts[0].element_size()
        # Each element is a partial sum on all edges but one: behind that one its sum begins.
        begins = np.full(count, -1)
        for edge in range(ranks):
            absent = np.ones(count, bool)
            for channel in range(self.layout.channels):
                for first, elements, final in self.messages.all_reduce(
                    self.layout, edge, channel, count, width
                ).tolist():
                    if not final:
                        absent[first : first + elements] = False
            begins[absent] = (edge + 1) % ranks
        assert (begins >= 0).all()
        result = parts[ring[0]].clone()
        for rank in ring[1:]:
            result += parts[rank]
        for edge, tap in self.taps.items():
            partial = torch.zeros_like(result)
            for hop in range(ranks):
                position = torch.from_numpy((begins + hop) % ranks)
                takes = torch.from_numpy(hop <= (edge - begins) % ranks)
                part = torch.stack([parts[rank] for rank in ring])[position, torch.arange(count)]
                partial = torch.where(takes, partial + part, partial)
            tap.all_reduce(partial, result)
        now = max(tap._clock_ns for tap in self.taps.values())
        for tap in self.taps.values():
            tap._clock_ns = now
        return result

    def reduce(self, step):
        """Do a pass."""
        ranks = len(self.layout.ring)
        parts = [
            torch.from_numpy(learning.contribution(step, rank, ranks)).view(TORCH[step.dtype]) for rank in range(ranks)
        ]
        for tap in self.taps.values():
            tap.lying = self.tails == "once" and step.sort == "check" and step.number % 2 == 1
        self.summed(parts)
        self.passes.append(step)

    def broadcast(self, elements, seed=0):
        """Do a broadcast of float32 that the learner is not told of."""
        data = np.random.default_rng(seed).standard_normal(elements).astype("<f4").tobytes()
        for tap in self.taps.values():
            tap.broadcast(data, self.layout.ring[0])

    def round(self, kinds, number):
        for step in learning.round_of(kinds, len(self.layout.ring), number):
            self.reduce(step)

    def iteration(self, kinds, seed):
        """Reduce random gradients; return what each all-reduce gave."""
        generator = torch.Generator().manual_seed(seed)
        results = []
        for dtype, elements in kinds:
            parts = [torch.randn(elements, generator=generator).to(TORCH[dtype]) for _ in self.layout.ring]
            results.append(self.summed(parts))
            self.passes.append(learning.Pass(dtype, elements, "iteration"))
        return results

    def learned(self, frames=None, passes=None):
        """Return what the learner makes of the frames, all by default."""
        with contextlib.closing(Learner(self.layout.ring, self.layout.mtu)) as learner:
            for frame, time_ns in self.frames if frames is None else frames:
                learner.add(frame, time_ns)
            return learner.learn(self.passes if passes is None else passes)

    def capture(self, folder):
        """Write a capture file per link; return them by stream name."""
        out = {}
        for edge, tap in self.taps.items():
            out[f"link-{edge}"] = folder / f"link-{edge}.pcapng"
            writer = PcapngWriter(out[f"link-{edge}"])
            for frame, time_ns in tap.frames:
                writer.write(frame, time_ns)
            writer.close()
        return out


def plan_document(job, learned, buckets, **more):
    """Return a plan without a model, of a learned job that reduces `buckets`."""
    revision = {"from_iteration": 1, "buckets": [{"dtype": dtype, "elements": elements} for dtype, elements in buckets]}
    shard = {
        "name": "all",
        "startup": learned.startup,
        "revisions": [revision],
        "layout": learned.layout,
        "connections": learned.connections,
        "streams": [{"name": f"link-{edge}", "links": [edge]} for edge in job.links],
    }
    return {
        "format": "flowcheck-plan",
        "version": 1,
        "job": {"run_id": "learned", "attempt": 1, "world_size": len(job.layout.ring)},
        "shards": [shard | more],
    }
