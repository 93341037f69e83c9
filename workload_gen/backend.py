# SPDX-License-Identifier: MIT
"""A `torch.distributed` backend over `workload_gen.ring`: any DDP script runs on it, with the library's sums.

register(layout)
torch.distributed.init_process_group("flowcheck", ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from flowcheck.plan import Layout
from workload_gen.ring import Ring

__all__ = ["NAME", "Operation", "RingGroup", "register"]

NAME = "flowcheck"


class AnyRing(Protocol):
    """What a group needs of a ring: `workload_gen.ring.Ring`, or one over a network."""

    size: int

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Give every rank the contiguous tensor of rank `root`."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the contiguous tensor of every rank."""

    def close(self) -> None:
        """Leave the ring."""


@dataclass(frozen=True)
class Operation:
    """A collective that a group has done: `elements` per rank of `dtype`, from rank `root` if a broadcast."""

    op: str
    dtype: torch.dtype
    elements: int
    root: int = 0


class _Done(dist._Work):
    """The handle of a collective that is done."""

    def __init__(self, result: list[Any]) -> None:
        super().__init__()
        self._future: torch.futures.Future[list[Any]] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[list[Any]]:
        return self._future


class RingGroup(dist.ProcessGroup):
    """A process group whose collectives go round the ring; each is done when its call returns.

    Sums only. `operations` lists what was done, in order.
    """

    def __init__(self, rank: int, ring: AnyRing) -> None:
        super().__init__(rank, ring.size)
        self.ring = ring
        self.operations: list[Operation] = []

    def getBackendName(self) -> str:
        """Return the name that torch knows the backend by."""
        return NAME

    def _note(self, op: str, tensor: torch.Tensor, root: int = 0) -> None:
        self.operations.append(Operation(op, tensor.dtype, tensor.numel(), root))

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> _Done:
        """Sum tensors over all ranks, in place."""
        if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
            raise ValueError(f"the {NAME} backend reduces by SUM only, not by {opts.reduceOp}")
        for tensor in tensors:
            dense = tensor.contiguous()
            self._note("all_reduce", dense)
            self.ring.all_reduce(dense)
            if dense is not tensor:
                tensor.copy_(dense)
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> _Done:
        """Sum tensors one after another."""
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> _Done:
        """Give every rank the tensors of rank opts.rootRank."""
        for tensor in tensors:
            dense = tensor.detach().contiguous()
            self._note("broadcast", dense, opts.rootRank)
            self.ring.broadcast(dense, opts.rootRank)
            if dense is not tensor:
                tensor.detach().copy_(dense)
        return _Done(tensors)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> _Done:
        """Give every rank the tensors of all."""
        for rooms, tensor in zip(outputs, inputs, strict=True):
            self._note("all_gather", tensor)
            for room, part in zip(rooms, self.ring.all_gather(tensor.contiguous()), strict=True):
                room.copy_(part)
        return _Done(outputs)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> _Done:
        """Give every rank the tensors of all, one after another in one tensor."""
        self._note("all_gather", tensor)
        output.copy_(torch.cat([part.view(-1) for part in self.ring.all_gather(tensor.contiguous())]).view_as(output))
        return _Done([output])

    _allgather_base = all_gather_single  # torch's name for it before 2.13

    def barrier(self, opts: Any = None) -> _Done:
        """Wait for all ranks: an all-reduce of one element, as the library does it."""
        return self.allreduce([torch.zeros(1)])


def register(layout: Layout, make_ring: Callable[[Layout, int, dist.Store], AnyRing] = Ring) -> list[RingGroup]:
    """Make the backend known to torch in this process; return the list that its groups will be added to.

    Args:
        layout: the library's; its ring is replaced by the group's ranks in order.
        make_ring: called with layout, rank and store when a group is made.
    """
    groups: list[RingGroup] = []

    def make(store: dist.Store, rank: int, size: int, timeout: Any) -> RingGroup:
        ring = make_ring(layout.model_copy(update={"ring": tuple(range(size))}), rank, store)
        groups.append(RingGroup(rank, ring))
        return groups[-1]

    dist.Backend.register_backend(NAME, make, devices=["cpu"])
    return groups
