# SPDX-License-Identifier: MIT
"""A `torch.distributed` backend over `workload_gen.ring`: any DDP script runs on it, with the library's sums.

register(layout)
torch.distributed.init_process_group("flowcheck", ...)
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
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
    """A collective that a group was given: `elements` per rank of `dtype`, from rank `root` if a broadcast."""

    op: str
    dtype: torch.dtype
    elements: int
    root: int = 0


class _Work(dist._Work):
    """The handle of a collective that the group's worker does, now or later."""

    def __init__(self, done: concurrent.futures.Future[None], result: list[Any]) -> None:
        super().__init__()
        self._done, self._result = done, result

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._done.result(timeout.total_seconds() if timeout else None)
        return True

    def is_completed(self) -> bool:
        return self._done.done()

    def is_success(self) -> bool:
        return self._done.done() and self._done.exception() is None

    def result(self) -> list[Any]:
        return self._result

    def get_future(self) -> torch.futures.Future[list[Any]]:
        # Only a callback that raises makes a future that has failed for C++ too; `set_exception` makes one whose value
        # is the exception, which DistributedDataParallel would take for its tensors.
        begin: torch.futures.Future[None] = torch.futures.Future()
        answer = begin.then(lambda _: self._done.result() or self._result)
        self._done.add_done_callback(lambda _: begin.set_result(None))
        return answer


class RingGroup(dist.ProcessGroup):
    """A process group whose collectives go round the ring, one after another as they were issued, in a thread of their own.

    Sums only. A tensor belongs to the group until its handle is done. A collective that fails (`ConnectionError` where a
    neighbour is gone) fails all that follow. The handle's `wait` raises what happened; its future, and so DDP's backward,
    a RuntimeError that quotes it. `operations` lists what was issued, in order.
    """

    def __init__(self, rank: int, ring: AnyRing) -> None:
        super().__init__(rank, ring.size)
        self.ring = ring
        self.operations: list[Operation] = []
        # Its exit handler does what is left of the work before the process ends.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=NAME)
        self._failure: Exception | None = None

    def getBackendName(self) -> str:
        """Return the name that torch knows the backend by."""
        return NAME

    def _issue(self, operations: list[Operation], work: Callable[[], None], result: list[Any]) -> _Work:
        self.operations += operations
        return _Work(self._worker.submit(self._do, work), result)

    def _do(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            raise ConnectionError(f"an earlier collective failed: {self._failure}") from self._failure
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            self._failure = error
            raise

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> _Work:
        """Sum tensors over all ranks, in place."""
        if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
            raise ValueError(f"the {NAME} backend reduces by SUM only, not by {opts.reduceOp}")

        def work() -> None:
            for tensor in tensors:
                dense = tensor.contiguous()
                self.ring.all_reduce(dense)
                if dense is not tensor:
                    tensor.copy_(dense)

        return self._issue([_operation("all_reduce", tensor) for tensor in tensors], work, tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> _Work:
        """Sum tensors one after another."""
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> _Work:
        """Give every rank the tensors of rank opts.rootRank."""
        root = opts.rootRank

        def work() -> None:
            for tensor in tensors:
                dense = tensor.contiguous()
                self.ring.broadcast(dense, root)
                if dense is not tensor:
                    tensor.copy_(dense)

        return self._issue([_operation("broadcast", tensor, root) for tensor in tensors], work, tensors)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> _Work:
        """Give every rank the tensors of all."""

        def work() -> None:
            for rooms, tensor in zip(outputs, inputs, strict=True):
                for room, part in zip(rooms, self.ring.all_gather(tensor.contiguous()), strict=True):
                    room.copy_(part)

        return self._issue([_operation("all_gather", tensor) for tensor in inputs], work, outputs)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> _Work:
        """Give every rank the tensors of all, one after another in one tensor."""

        def work() -> None:
            parts = self.ring.all_gather(tensor.contiguous())
            output.copy_(torch.cat([part.view(-1) for part in parts]).view_as(output))

        return self._issue([_operation("all_gather", tensor)], work, [output])

    _allgather_base = all_gather_single  # torch's name for it before 2.13

    def barrier(self, opts: Any = None) -> _Work:
        """Wait for all ranks: an all-reduce of one element, as the library does it."""
        return self.allreduce([torch.zeros(1)])

    def shutdown(self) -> None:
        """Do what was issued, then leave the ring."""
        self._worker.shutdown()
        self.ring.close()


def _operation(op: str, tensor: torch.Tensor, root: int = 0) -> Operation:
    return Operation(op, tensor.dtype, tensor.numel(), root)


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
