# SPDX-License-Identifier: MIT
"""What a training script has, as parts of a job plan: model, optimizer, arithmetic, and what DDP does on its group.

Facts on DistributedDataParallel: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp. Everything
here imports torch when it is called, and returns what goes into plan.json.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowcheck.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "arithmetic",
    "bucket",
    "dtype_name",
    "first_buckets",
    "optimizer_entry",
    "options",
    "rebuild_operations",
    "rebuilt_buckets",
    "startup_operations",
    "state_entries",
    "thrown_away_operations",
]

#: Options that say how a step is computed, not what; the plan has them as the optimizer's form.
_FORMS = {"foreach", "fused", "capturable", "differentiable"}
#: DDP broadcasts its module in coalesced pieces of so many bytes (DistributedDataParallel.broadcast_bucket_size).
_BROADCAST_BYTES = 250 << 20


def dtype_name(dtype: torch.dtype) -> str:
    """Return the plan's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def _reduced(model: DistributedDataParallel) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters that DDP reduces, in its own order, with their names in the module."""
    return [(name, parameter) for name, parameter in model.module.named_parameters() if parameter.requires_grad]


def first_buckets(model: DistributedDataParallel) -> list[list[str]]:
    """Return the names in the buckets that a new DDP begins with: one per dtype, the last first."""
    import torch.distributed as dist

    named = _reduced(model)
    tensors = [parameter for _, parameter in named]
    assigned, _ = dist._compute_bucket_assignment_by_size(tensors, [sys.maxsize], [False] * len(tensors))
    return [[named[index][0] for index in indices] for indices in reversed(assigned)]


def rebuilt_buckets(model: DistributedDataParallel) -> list[list[str]] | None:
    """Return the names in the buckets that DDP has rebuilt after its first backward pass; None before."""
    model.logger.set_runtime_stats_and_log()
    text = model.logger._get_ddp_logging_data().strs_map.get("rebuilt_per_bucket_param_indices")
    if not text:
        return None
    names = [name for name, _ in _reduced(model)]
    return [[names[int(index)] for index in part.split()] for part in text.split(",")]


def bucket(parameters: Mapping[str, torch.Tensor], names: Iterable[str], dtype: str | None = None) -> dict[str, Any]:
    """Return the plan's entry of a bucket: these parameters one after another, in their own dtype or the one on the wire."""
    offset, places = 0, []
    for name in names:
        places.append({"name": name, "shape": list(parameters[name].shape), "offset": offset})
        offset += parameters[name].numel()
    first = parameters[places[0]["name"]]
    return {"dtype": dtype or dtype_name(first.dtype), "elements": offset, "parameters": places}


def startup_operations(model: DistributedDataParallel) -> list[dict[str, Any]]:
    """Return the collectives that DDP's constructor does on its group: shapes compared, then values broadcast.

    Buffers with them, but for a torch that knows no `forward_sync_buffers` and was told `broadcast_buffers=False`; where
    it knows both, nothing in the model tells which was given, and the one that is not deprecated is assumed.
    """
    import torch.distributed as dist

    parameters = [parameter for _, parameter in _reduced(model)]
    synchronised = getattr(model, "broadcast_buffers", True) or hasattr(model, "forward_sync_buffers")
    states = [*model.module.parameters(), *(model.module.buffers() if synchronised else ())]
    assigned, _ = dist._compute_bucket_assignment_by_size(states, [_BROADCAST_BYTES])
    return [
        {"op": "all_gather", "dtype": "int64", "elements": 1},
        {"op": "broadcast", "dtype": "int64", "elements": sum(2 * parameter.dim() for parameter in parameters)},
        *(
            {
                "op": "broadcast",
                "dtype": dtype_name(states[indices[0]].dtype),
                "elements": sum(states[index].numel() for index in indices),
            }
            for indices in assigned
        ),
    ]


def thrown_away_operations(
    model: DistributedDataParallel, first: list[list[str]], dtype: str | None
) -> list[dict[str, Any]]:
    """Return the collectives of the step that `flowcheck.resume` throws away: first buckets reduced, then buckets rebuilt.

    Args:
        model: after that step.
        first: names in the buckets that it had before.
        dtype: on the wire; the parameters' own if None.
    """
    parameters, rebuilt = dict(model.module.named_parameters()), rebuilt_buckets(model)
    entries = [bucket(parameters, names, dtype) for names in first]
    reduced = [{"op": "all_reduce", "dtype": e["dtype"], "elements": e["elements"]} for e in entries]
    return reduced + (rebuild_operations(rebuilt) if rebuilt else [])


def rebuild_operations(buckets: list[list[str]]) -> list[dict[str, Any]]:
    """Return the collectives by which DDP agrees on rebuilt buckets: indices with their count, then sizes."""
    return [
        {"op": "broadcast", "dtype": "int32", "elements": sum(map(len, buckets)) + 1},
        {"op": "broadcast", "dtype": "int32", "elements": len(buckets)},
    ]


def state_entries(module: torch.nn.Module, extra: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return the plan's entry of every state_dict key; those named `extra` change, other buffers do not."""
    import torch

    owners = {id(parameter): name for name, parameter in module.named_parameters()}
    entries, extra = [], set(extra)
    for key, value in module.state_dict(keep_vars=True).items():
        entry = {"key": key, "dtype": dtype_name(value.dtype), "shape": list(value.shape)}
        if isinstance(value, torch.nn.Parameter):
            entry |= {"kind": "parameter", "parameter": owners[id(value)]}
        else:
            entry["kind"] = "extra" if key in extra else "constant"
        entries.append(entry)
    return entries


def options(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a param group that the class takes; what a script has added of its own is none."""
    known = set(inspect.signature(type(optimizer)).parameters) - _FORMS - {"params"}
    return {name: value for name, value in group.items() if name in known}


def _form(optimizer: torch.optim.Optimizer) -> str:
    """Return in which form an optimizer steps, all of its groups alike."""
    forms = set()
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("differentiable"):
            raise ConfigError("the optimizer is capturable or differentiable; only its plain forms can be followed")
        if group.get("fused"):
            forms.add("fused")
        elif group.get("foreach") is None:
            # torch's own choice: foreach on an accelerator (torch/optim/optimizer.py, _default_to_fused_or_foreach).
            cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
            forms.add("default" if cpu or "foreach" not in group else "foreach")
        else:
            forms.add("foreach" if group["foreach"] else "default")
    if len(forms) != 1:
        raise ConfigError(f"the optimizer's param groups step in different forms: {', '.join(sorted(forms))}")
    return forms.pop()


def optimizer_entry(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], varying: Iterable[str] | None = ()
) -> dict[str, Any]:
    """Return the plan's entry of an optimizer.

    Args:
        optimizer: of torch.optim.
        names: of the parameters, by their id.
        varying: options whose value may differ from step to step; None: all that are numbers.
    """
    groups = []
    for group in optimizer.param_groups:
        found = options(optimizer, group)
        numbers = [n for n, v in found.items() if isinstance(v, (int, float, tuple)) and not isinstance(v, bool)]
        entry = {"parameters": [names[id(parameter)] for parameter in group["params"]], "options": found}
        if chosen := [name for name in numbers if varying is None or name in set(varying)]:
            entry["varying"] = chosen
        groups.append(entry)
    return {"class": type(optimizer).__name__, "form": _form(optimizer), "groups": groups}


def arithmetic(device: str) -> dict[str, str | None]:
    """Return the named arithmetic of this process on a type of device."""
    import torch

    found = {"torch": torch.__version__.split("+")[0], "device": device}
    if device == "cuda":
        return found | {"capability": ".".join(map(str, torch.cuda.get_device_capability()))}
    return found | {"capability": torch.backends.cpu.get_cpu_capability(), "vendor": _cpu_vendor()}


def _cpu_vendor() -> str | None:
    """Return the processor's vendor as the kernel names it; None where it names none."""
    try:
        found = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return None
    return found and found[1]
