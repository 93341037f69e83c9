# SPDX-License-Identifier: MIT
"""A job's frames as they would be had any number of iterations passed before them: what a mirror shows after an outage.

The job is the witness's, which imports no FlowCheck; its frames are moved on as the fault campaign moves those of its jobs
(`fault_injection.moved`). IPv6 without VLAN.
"""

import struct
from dataclasses import dataclass

import torch

from fault_injection.frames import Header
from fault_injection.moved import Mover
from tests.witness.capture import Capture, Wire

BTH = 14 + 40 + 8
#: A credit of 2.18 or 2.19: address, size, key, requests, tag, index.
CREDIT = "<QIIIIQ"
#: Opcodes whose packets have a RETH, and those that have an immediate.
WITH_RETH, WITH_IMMEDIATE = (6, 10, 11), (9, 11)


@dataclass(frozen=True)
class Frame:
    """One frame, whose it is (connection, queue pair; a credit: the connection's), and of which iteration."""

    data: bytes
    connection: int
    queue_pair: int
    credit: bool
    iteration: int

    @property
    def psn(self):
        return int.from_bytes(self.data[BTH + 9 : BTH + 12])

    @property
    def has_reth(self):
        return self.data[BTH] in WITH_RETH

    @property
    def payload_at(self):
        return BTH + 12 + 16 * self.has_reth + 4 * (self.data[BTH] in WITH_IMMEDIATE)


class Collected(Capture):
    """A capture in memory, one list of frames; acknowledgements are left out."""

    def __init__(self, folder, job, links, wire):
        super().__init__(folder, job, links, wire)
        self.close()
        self._writers = dict.fromkeys(links, self)
        self.frames, self.iteration, self._last = [], 0, None

    def write(self, data):
        self._last = data

    def _frame(self, c, qp, forward, opcode, psn, headers, data):
        if opcode != 17:
            super()._frame(c, qp, forward, opcode, psn, headers, data)
            self.frames.append(Frame(self._last, self.connections.index(c), qp, not forward, self.iteration))


class Job:
    """A job of `before` iterations, then `own` ones that can be shown as any later ones.

    Attributes:
        frames: all frames, in the order sent.
        gradients: the sum of each iteration, bytes.
        steps, messages: by connection, how many `own` iterations take.
        packets: by connection and queue pair, how many PSNs they take.
    """

    def __init__(self, folder, job, *, counts=(2000, 1601), before=4, own=4, start_psn=0):
        folder.mkdir(parents=True)
        self.job, self.before, self.own, links = job, before, own, sorted({0, job.ranks - 1})
        self.capture = capture = Collected(folder, job, links, Wire(6, None, start_psn))
        generator, self.gradients, self.counts = torch.Generator().manual_seed(3), {}, counts
        self.startup = struct.pack("<q", 1)
        capture.all_gather("all_gather count", [self.startup] * job.ranks)
        for iteration in range(1, before + own + 1):
            if iteration == before + 1:
                known = [(c.step, c.sent, list(c.psn)) for c in capture.connections]
            capture.iteration = iteration
            flat = b""
            for number, count in enumerate(counts):
                vectors = [torch.rand(count, generator=generator) - 0.5 for _ in range(job.ranks)]
                flat += capture.all_reduce(f"all_reduce {iteration}.{number}", vectors).numpy().tobytes()
            self.gradients[iteration] = flat
        self.frames = capture.frames
        self.steps, self.messages, self.packets = {}, {}, {}
        for index, (c, (step, sent, psn)) in enumerate(zip(capture.connections, known, strict=True)):
            self.steps[index], self.messages[index] = c.step - step, c.sent - sent
            self.packets |= {(index, qp): now - then for qp, (now, then) in enumerate(zip(c.psn, psn, strict=True))}
        self.start_psn = start_psn

    def document(self):
        """Return the job's plan, all links in one stream."""
        job, capture = self.job, self.capture
        return {
            "format": "flowcheck-plan", "version": 1, "job": {"run_id": "later", "attempt": 1, "world_size": job.ranks},
            "shards": [{
                "name": "model",
                "startup": [{"op": "all_gather", "dtype": "int64", "elements": 1}],
                "revisions": [{"from_iteration": 1, "buckets": [{"dtype": "float32", "elements": n} for n in self.counts]}],
                "layout": {
                    "source": "modelled", "library": "nccl", "version": job.version, "protocol": job.protocol,
                    "ring": list(range(job.ranks)), "channels": job.channels, "threads": job.threads,
                    "pin_channels": job.pin_channels, "queue_pairs": job.queue_pairs, "split_queue_pairs": job.split,
                    "mtu": job.mtu, "adaptive_routing": job.adaptive_routing,
                },
                "connections": [
                    {"edge": c.edge, "channel": c.channel, "source": c.source, "destination": c.destination,
                     "proof": {"kind": "queue_pair", "data": c.data, "credit": c.credit}, "start_psn": self.start_psn}
                    for c in capture.connections
                ],
                "streams": [{"name": f"link-{link}", "links": [link]} for link in capture.files],
            }],
        }  # fmt: skip

    def edge(self, frame):
        """Return the link that shows a frame."""
        return self.capture.connections[frame.connection].edge

    def later(self, frame, turns):
        """Return a frame as it is `turns` times `own` iterations later."""
        number = frame.connection
        mover = Mover(self.job.protocol, self.capture.connections[number].base, CREDIT)
        header, messages = Header.of(frame.data), turns * self.messages[number]
        if frame.credit:
            data = mover.credits(frame.data, header, messages)
        else:
            data = mover.data(frame.data, header, turns * self.packets[number, frame.queue_pair], messages)
        return Frame(data, number, frame.queue_pair, frame.credit, frame.iteration + turns * self.own)
