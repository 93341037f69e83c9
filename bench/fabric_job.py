# SPDX-License-Identifier: MIT
"""The example job on a fabric of this machine, as the benchmarks train it: a process per rank, forked, torch loaded."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workload_gen._nic import Nic

import flowcheck
from workload_gen import backend, gpt, recorded_plan
from workload_gen.fabric import Fabric, adapter_socket
from workload_gen.record import Recording
from workload_gen.transport import FabricRing
from workload_gen.wire import Connection, connections

__all__ = ["Rank", "ranks"]

_PATIENCE_S = 3600


class Rank:
    """One rank: its model, wrapped in `ddp`, and its `optimizer`, AdamW in its fused form. Collectives of others go over gloo.

    Args:
        recording: what to train; its store is in `out`.
        rank: of this process.
        host: of this rank on the fabric.
        batches: of the example job's, of 4 short sequences, a step.
    """

    def __init__(self, recording: Recording, rank: int, host: str, batches: int) -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self.recording, self.rank, self._batches, self._layout = recording, rank, batches, recording.layout()
        nic = Nic(adapter_socket(host, Fabric.INTERFACE), self._layout.mtu)
        self._groups = backend.register(
            self._layout, lambda layout, rank, store: FabricRing(layout, rank, nic, self._ends)
        )
        store = dist.FileStore(str(recording.out / "store"), recording.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=recording.ranks)
        self.model = gpt.build(recording.parameters, recording.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.001, fused=True)
        self.ddp = DistributedDataParallel(
            self.model, bucket_cap_mb=recording.bucket_mb, process_group=flowcheck.group(backend.NAME)
        )

    def _ends(self, edge: int) -> list[Connection]:
        return connections(self._layout, edge, self.recording.ip, None, 0)

    def wire(self, streams: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `flowcheck.attach` must know of the network, where these streams of a plan show it."""
        links = sorted({link for stream in streams for link in stream["links"]})
        return recorded_plan.network(self._layout, {link: self._ends(link) for link in links}, streams)

    def step(self, iteration: int) -> None:
        """Train one iteration."""
        parts = [
            gpt.batch(self.recording.seed, self.rank, self._batches * iteration + part) for part in range(self._batches)
        ]
        inputs, targets = (torch.cat(some) for some in zip(*parts, strict=True))
        self.optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(self.ddp(inputs).flatten(0, 1), targets.flatten()).backward()
        self.optimizer.step()

    def close(self) -> None:
        """End this rank once all have come to their end: an adapter that is gone can repeat nothing."""
        dist.barrier()
        self._groups[0].ring.close()
        dist.destroy_process_group()


def _be(function: Callable[..., Any], rank: int, arguments: tuple[Any, ...], answers: Any) -> None:
    answer = function(rank, *arguments)
    if rank == 0:
        answers.put(answer)


@contextlib.contextmanager
def ranks(count: int, function: Callable[..., Any], *arguments: Any) -> Iterator[Callable[[], Any]]:
    """Call `function(rank, *arguments)` on every rank; yield a call that waits for what rank 0 returns.

    The call raises RuntimeError if a rank fails.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=_be, args=(function, rank, arguments, answers), daemon=True) for rank in range(count)
    ]
    for process in processes:
        process.start()

    def answer() -> Any:
        for _ in range(_PATIENCE_S):
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=1)
            if any(process.exitcode for process in processes):
                raise RuntimeError("a rank failed")
        raise RuntimeError(f"no answer after {_PATIENCE_S} seconds")

    try:
        yield answer
    finally:
        for process in processes:
            process.join(10)
            process.kill()
            process.join()
