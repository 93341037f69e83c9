# SPDX-License-Identifier: MIT
"""A job of many ranks as the frames of its mirrored links, without a trainer: gradients drawn by lot, and no model."""

import contextlib
import json

import numpy as np
import torch
from scapy.utils import RawPcapNgReader

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from packet_parser.parser import Parser
from tests import jobs
from workload_gen import recorded_plan
from workload_gen.wire import LinkTap, connections

MTU = 512


class RingJob:
    """Frames of each of some links of a ring: `frames`, by link; the gradient of each iteration, from 1: `gradients`.

    Nothing comes before the first iteration, so a capture may begin at any frame.
    """

    def __init__(self, folder, links, *, ranks=8, iterations=6, elements=3001, protocol="ll", channels=1, seed=0):
        self.elements = elements
        layout = {"source": "modelled", "library": "nccl", "version": "2.19", "protocol": protocol, "mtu": MTU}
        self.layout = plans.Layout(**layout, ring=tuple(range(ranks)), channels=channels)
        generator = torch.Generator().manual_seed(seed)
        sums = [torch.randn(elements, generator=generator) for _ in range(2 * iterations)]
        self.gradients = {i + 1: sums[2 * i + 1].numpy().tobytes() for i in range(iterations)}
        self.frames = {}
        for link in links:
            tap = LinkTap(self.layout, self.connections(link), folder / f"link-{link}.pcapng")
            for partial, result in zip(sums[::2], sums[1::2], strict=True):
                tap.all_reduce(partial, result)
            tap.close()
            with contextlib.closing(RawPcapNgReader(str(folder / f"link-{link}.pcapng"))) as reader:
                self.frames[link] = [bytes(frame) for frame, _ in reader]

    def connections(self, link):
        return connections(self.layout, link, 6, None, 0)

    def plan(self, streams):
        """Return the plan of the job with these streams: links by name."""
        links = {link: self.connections(link) for some in streams.values() for link in some}
        shown = [{"name": name, "links": list(some)} for name, some in streams.items()]
        shard = {
            "name": "model",
            "revisions": [{"from_iteration": 1, "buckets": [{"dtype": "float32", "elements": self.elements}]}],
            **recorded_plan.network(self.layout, links, shown),
        }
        job = {"run_id": "ring", "world_size": len(self.layout.ring)}
        return plans.parse(json.dumps({"format": "flowcheck-plan", "version": 1, "job": job, "shards": [shard]}))


def stages(folder, plan, frames):
    """Return parsers and extractor over the frames of each stream, and the slots, in a new folder."""
    folder.mkdir()
    rings = [jobs.ring_of(folder, plan, some, name) for name, some in frames.items()]
    slots = jobs.slots_of(folder, plan)
    return [*(Parser(ring, plan, ring.stream) for ring in rings), Extractor(rings, plan, slots)], slots


def settled(folder, plan, frames):
    """Take the frames of each stream through the stages; return per iteration its state, bytes, their coverage and sources.

    The coverage is a bool per byte of the gradient.
    """
    loops, slots = stages(folder, plan, frames)
    out = {}
    size = plan.shard.revisions[-1].gradient_bytes
    for _ in range(100_000):
        for stage in loops:
            stage.poll()
        while (number := slots.consumed_next) < slots.settled_next:
            out[number] = what(slots, number, size)
            slots.consumed_next = number + 1
        if loops[-1].finished:
            return out
    raise AssertionError("the stages do not finish")


def what(slots, number, size):
    """Return what `settled` does of one iteration."""
    covered = np.ones(size, bool)
    for begin, end in slots.missing(number):
        covered[begin:end] = False
    slot = slots.slot(number)
    return int(slot["state"]), slots.gradient(number)[:size].tobytes(), covered, slot["source_bytes"].tolist()
