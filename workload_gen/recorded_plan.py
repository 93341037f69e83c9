# SPDX-License-Identifier: MIT
"""The job plan of a recording, made from what DDP did: its collectives, its buckets, the model and its optimizer."""

from __future__ import annotations

from typing import Any

import torch

from flowcheck import describe
from flowcheck.plan import Layout
from workload_gen.backend import Operation
from workload_gen.wire import Connection

__all__ = ["document", "network"]


def _collective(operation: Operation, carries: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "op": operation.op,
        "dtype": describe.dtype_name(operation.dtype),
        "elements": operation.elements,
    }
    if operation.op == "broadcast":
        entry["root"] = operation.root
    return entry | ({"carries": "initial_state"} if carries else {})


def _revision(
    first: int, operations: list[Operation], buckets: list[list[str]], parameters: dict[str, torch.Tensor]
) -> dict[str, Any]:
    reduces = [operation for operation in operations if operation.op == "all_reduce"]
    before = operations[: operations.index(reduces[0])]
    if before + reduces != operations:
        raise AssertionError("a collective came between the buckets of an iteration")
    return {
        "from_iteration": first,
        "before": [_collective(operation, False) for operation in before],
        "buckets": [describe.bucket(parameters, names) for names, _ in zip(buckets, reduces, strict=True)],
    }


def network(layout: Layout, links: dict[int, list[Connection]], streams: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parts of a plan that describe the network.

    Args:
        layout: the library's.
        links: the connections of each mirrored link, fresh: as they were before the first packet.
        streams: the plan's entries.
    """
    return {
        "layout": layout.model_dump(mode="json", exclude_none=True),
        "connections": [
            {
                "edge": c.edge,
                "channel": c.channel,
                "source": c.forward.source,
                "destination": c.forward.destination,
                "proof": {"kind": "queue_pair", "data": c.data_queue_pairs, "credit": c.credit_queue_pairs},
                "start_psn": c.psn[0],
            }
            for connections in links.values()
            for c in connections
        ],
        "streams": streams,
    }


def document(
    *,
    job: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    links: dict[int, list[Connection]],
    startup: list[Operation],
    from_file: bool,
    first: int,
    iterations: list[tuple[list[Operation], list[list[str]]]],
) -> dict[str, Any]:
    """Return the plan's JSON document.

    Args:
        job: run id, attempt and origin, as the plan's `job` has them.
        model: that was trained, not wrapped; all its parameters of one dtype.
        optimizer: the trainer's.
        layout: the library's.
        links: the connections of each mirrored link, fresh: as they were before the first packet.
        startup: what came before the first iteration, as far as anybody saw it.
        from_file: the initial state is `initial.pt`, else what was broadcast in `startup`.
        first: the attempt's first iteration.
        iterations: per revision, the operations of its first iteration and the names in its buckets.
    """
    parameters = dict(model.named_parameters())
    dtype = describe.dtype_name(next(model.parameters()).dtype)
    # DDP first compares the parameters' number and sizes, then broadcasts their values.
    carriers = [op for op in startup if op.op == "broadcast" and describe.dtype_name(op.dtype) == dtype]
    return {
        "format": "flowcheck-plan",
        "version": 1,
        "job": {**job, "world_size": len(layout.ring)},
        "shards": [
            {
                "name": "model",
                "startup": [_collective(op, op in carriers and not from_file) for op in startup],
                "revisions": [
                    _revision(number, operations, buckets, parameters)
                    for number, (operations, buckets) in enumerate(iterations, first)
                ],
                **network(layout, links, [{"name": f"link-{link}", "links": [link]} for link in links]),
            }
        ],
        "state": describe.state_entries(model),
        "initial_state": {"source": "file", "path": "initial.pt"}
        if from_file
        else {"source": "broadcast", "tensors": list(parameters)},
        "optimizer": describe.optimizer_entry(optimizer, {id(p): name for name, p in parameters.items()}),
        "arithmetic": describe.arithmetic("cpu"),
    }
