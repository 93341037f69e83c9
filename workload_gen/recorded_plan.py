# SPDX-License-Identifier: MIT
"""The job plan of a recording, made from what DDP did: its collectives, its buckets, the model and its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from flowcheck.plan import Layout
from workload_gen.backend import Operation
from workload_gen.wire import Connection

__all__ = ["buckets_of", "document"]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def buckets_of(model: DistributedDataParallel) -> list[list[str]]:
    """Return the names of the parameters in each bucket that DDP reduces now, in order.

    Before it has rebuilt its buckets: one with all parameters as they were registered (torch 2.13, all of one dtype).
    """
    names = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    model.logger.set_runtime_stats_and_log()
    data = model.logger._get_ddp_logging_data().strs_map
    if "rebuilt_per_bucket_param_indices" not in data:
        return [names]
    return [
        [names[int(index)] for index in part.split()] for part in data["rebuilt_per_bucket_param_indices"].split(",")
    ]


def _collective(operation: Operation, carries: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": operation.op, "dtype": _dtype(operation.dtype), "elements": operation.elements}
    if operation.op == "broadcast":
        entry["root"] = operation.root
    return entry | ({"carries": "initial_state"} if carries else {})


def _bucket(shapes: dict[str, torch.Size], names: list[str], reduced: Operation) -> dict[str, Any]:
    offset, parameters = 0, []
    for name in names:
        parameters.append({"name": name, "shape": list(shapes[name]), "offset": offset})
        offset += shapes[name].numel()
    if offset != reduced.elements:
        raise AssertionError(f"parameters of {offset} elements went into a bucket of {reduced.elements}")
    return {"dtype": _dtype(reduced.dtype), "elements": offset, "parameters": parameters}


def _revision(
    first: int, operations: list[Operation], buckets: list[list[str]], shapes: dict[str, torch.Size]
) -> dict[str, Any]:
    reduces = [operation for operation in operations if operation.op == "all_reduce"]
    before = operations[: operations.index(reduces[0])]
    if before + reduces != operations:
        raise AssertionError("a collective came between the buckets of an iteration")
    return {
        "from_iteration": first,
        "before": [_collective(operation, False) for operation in before],
        "buckets": [_bucket(shapes, names, reduced) for names, reduced in zip(buckets, reduces, strict=True)],
    }


def document(
    *,
    run_id: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    form: str,
    options: dict[str, Any],
    layout: Layout,
    links: dict[int, list[Connection]],
    startup: list[Operation] | None,
    iterations: list[tuple[list[Operation], list[list[str]]]],
) -> dict[str, Any]:
    """Return the plan's JSON document.

    Args:
        run_id: of the job.
        model: that was trained, not wrapped; all its parameters of one dtype.
        optimizer: its class and state are the trainer's.
        form: "default" or "fused".
        options: of its one param group.
        layout: the library's.
        links: the connections of each mirrored link, fresh: as they were before the first packet.
        startup: what came before the first iteration; None if nobody saw it: the initial state is then `initial.pt`.
        iterations: per revision, the operations of its first iteration and the names in its buckets.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    dtype = _dtype(next(model.parameters()).dtype)
    # DDP first compares the parameters' number and sizes, then broadcasts their values.
    carriers = [op for op in startup or [] if op.op == "broadcast" and _dtype(op.dtype) == dtype]
    return {
        "format": "flowcheck-plan",
        "version": 1,
        "job": {"run_id": run_id, "attempt": 1, "world_size": len(layout.ring)},
        "shards": [
            {
                "name": "model",
                "startup": [_collective(op, op in carriers) for op in startup or []],
                "revisions": [
                    _revision(number + 1, operations, buckets, shapes)
                    for number, (operations, buckets) in enumerate(iterations)
                ],
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
                "streams": [{"name": f"link-{link}", "links": [link]} for link in links],
            }
        ],
        "state": [
            {
                "key": key,
                "kind": "parameter",
                "dtype": dtype,
                "shape": list(value.shape),
                "parameter": owners[id(value)],
            }
            for key, value in model.state_dict(keep_vars=True).items()
        ],
        "initial_state": {"source": "broadcast", "tensors": list(shapes)}
        if startup
        else {"source": "file", "path": "initial.pt"},
        "optimizer": {
            "class": type(optimizer).__name__,
            "form": form,
            "groups": [{"parameters": list(shapes), "options": options}],
        },
        "arithmetic": {
            "torch": torch.__version__.split("+")[0],
            "device": "cpu",
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
    }
