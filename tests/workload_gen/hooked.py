# SPDX-License-Identifier: MIT
"""DDP scripts with the hook, a process per rank, on the ring without a network: captures, plan and the trainers' truth."""

import json
import multiprocessing
import os
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import flowcheck
from flowcheck.plan import Layout
from flowcheck.replay import replay
from updater.restore import states_after
from workload_gen import backend
from workload_gen.ring import Ring
from workload_gen.truth import digest
from workload_gen.wire import LinkTap, connections

LAYOUT = {"source": "modelled", "library": "nccl", "version": "2.19", "protocol": "ll", "mtu": 1024}


@dataclass
class Rank:
    """What a script is given: where it is, how to attach, and where to note the truth of a step."""

    rank: int
    ranks: int
    folder: Path
    wire: dict
    group: dist.ProcessGroup
    tap: LinkTap | None
    truth: list = field(default_factory=list)

    def ddp(self, model, **options):
        return DistributedDataParallel(model, process_group=self.group, **options)

    def attach(self, ddp, optimizer, **options):
        options.setdefault("wait_s", 0)
        return flowcheck.attach(ddp, optimizer, plan_url=self.folder, wire=self.wire, **options)

    def note(self, ddp, optimizer, extra=()):
        state = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict()}
        self.truth.append((digest(state), [value.tolist() for value in extra]))


def _one(script, rank, ranks, folder, layout, links, queue):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        layout = Layout(**{**LAYOUT, "ring": tuple(range(ranks)), **layout})
        ends = {link: connections(layout, link, 6, None, 0) for link in range(ranks)}
        tap = LinkTap(layout, ends[rank], folder / f"link-{rank}.pcapng") if rank in links else None
        backend.register(layout, lambda layout, rank, store: Ring(layout, rank, store, tap))
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
        wire = {
            "layout": layout.model_dump(mode="json", exclude_none=True),
            "connections": [
                {
                    "edge": c.edge, "channel": c.channel, "source": c.forward.source, "destination": c.forward.destination,
                    "proof": {"kind": "queue_pair", "data": c.data_queue_pairs, "credit": c.credit_queue_pairs},
                }
                for link in links for c in ends[link]
            ],
            "streams": [{"name": f"link-{link}", "links": [link]} for link in links],
        }  # fmt: skip
        here = Rank(rank, ranks, folder, wire, flowcheck.group(backend.NAME), tap)
        value = script(here)
        dist.barrier()  # who is gone has sent nothing more: none goes before all have got everything
        if tap:
            tap.close()
        queue.put((rank, None, (here.truth, value)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))


def run(script, folder, ranks=3, links=(0, 2), **layout):
    """Run `script(Rank)` on every rank; return what each noted and returned."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_one, args=(script, rank, ranks, folder, layout, links, queue), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    out = {}
    try:
        while len(out) < ranks:
            rank, error, value = queue.get(timeout=120)
            assert error is None, error
            out[rank] = value
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    return [out[rank] for rank in range(ranks)]


def replayed(folder, links=(0, 2)):
    """Replay what a job left; return the listing."""
    return replay(
        folder / "plan.json", {f"link-{link}": folder / f"link-{link}.pcapng" for link in links}, folder / "out"
    )


def shadowed(folder):
    """Return the digest of every committed state and its extra state, by iteration."""
    return {
        i: (digest(state), {name: value.clone() for name, value in state["extra"].items()})
        for i, state in states_after(folder / "out")
    }


def plan_of(folder):
    return json.loads((folder / "plan.json").read_text())
