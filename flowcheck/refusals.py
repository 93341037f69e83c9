# SPDX-License-Identifier: MIT
"""What `flowcheck.attach` refuses, each by name: training whose state cannot be rebuilt from reduced gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from flowcheck.errors import ConfigError
from flowcheck.plan import DTYPE_BYTES, OptimizerName

__all__ = ["check_model", "check_optimizer", "wire_dtype"]

#: DDP's own compression hooks, and what they put on the wire.
_HOOKS = {default_hooks.fp16_compress_hook: "float16", default_hooks.bf16_compress_hook: "bfloat16"}


def check_model(model: Any, groups: Iterable[dist.ProcessGroup], changing: Iterable[str]) -> None:
    """Refuse a model that is not reduced whole, by all-reduce, on a group of its own; `changing` names declared buffers."""
    if not isinstance(model, DistributedDataParallel):
        what = type(model).__name__
        raise ConfigError(
            f"the model is a {what}: expected DistributedDataParallel, whose gradients are reduced whole; sharded ones "
            "(FSDP, ZeRO) never are on the wire"
        )
    if model.process_group not in list(groups):
        where = "the world group" if model.process_group is dist.group.WORLD else "a group of the script's own"
        raise ConfigError(
            f"the model is reduced on {where}, where other collectives move the packets' numbers on: give it one of its "
            "own, DistributedDataParallel(..., process_group=flowcheck.group())"
        )
    if model.find_unused_parameters:
        raise ConfigError("find_unused_parameters is set: a changing set of used parameters cannot be followed")
    if getattr(model, "mixed_precision", None) is not None:
        raise ConfigError("DDP's mixed_precision is set: its gradients cannot be followed")
    if getattr(model, "_delay_all_reduce_params", None):
        raise ConfigError(
            "delay_all_reduce_named_params is set: reductions in the script's own order cannot be followed"
        )
    for name, module in model.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            raise ConfigError(f"module {name!r} has sparse gradients: they are not reduced by all-reduce")
    for name, parameter in model.module.named_parameters():
        if str(parameter.dtype).removeprefix("torch.") not in DTYPE_BYTES:
            raise ConfigError(f"parameter {name!r} is {parameter.dtype}: such gradients cannot be followed")
        if getattr(parameter, "_in_backward_optimizers", None):
            raise ConfigError(f"parameter {name!r} is stepped in the backward pass: the step cannot be followed")
    _check_buffers(model, set(changing))


def _check_buffers(model: DistributedDataParallel, changing: set[str]) -> None:
    broadcast = getattr(model, "forward_sync_buffers", getattr(model, "broadcast_buffers", True))
    if broadcast and len(model.modules_buffers):
        raise ConfigError(
            "the model has buffers that DDP broadcasts at every forward pass, evaluation too: pass forward_sync_buffers=False "
            "(broadcast_buffers=False where torch does not know it)"
        )
    keys = set(model.module.state_dict())
    if unknown := sorted(changing - keys):
        raise ConfigError(f"buffers: {unknown[0]!r} is no key of the model's state_dict")
    for name, module in model.module.named_modules():
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
            statistics = {f"{name}.{part}" if name else part for part, _ in module.named_buffers(recurse=False)}
            if missing := sorted((statistics & keys) - changing):
                raise ConfigError(
                    f"buffer {missing[0]!r} changes in training and is not reduced: declare it, buffers=[{missing[0]!r}, ..]"
                )


def wire_dtype(model: DistributedDataParallel) -> str | None:
    """Return the dtype that a compression hook puts on the wire, None without one; ConfigError for any other hook."""
    hooks = list(model._comm_hooks)
    if not hooks:
        # A hook built into torch leaves only its name, and DDP's own statistics know it only after they are taken.
        model.logger.set_runtime_stats_and_log()
        named = model.logger._get_ddp_logging_data().strs_map.get("comm_hook", "")
        if named:
            raise ConfigError(f"communication hook {named!r}: expected none, or fp16_compress_hook, bf16_compress_hook")
        return None
    hook, state = hooks[-1]
    if hook not in _HOOKS:
        name = getattr(hook, "__qualname__", hook)
        raise ConfigError(f"communication hook {name!r}: expected none, or fp16_compress_hook, bf16_compress_hook")
    if state is not model.process_group:
        raise ConfigError(
            f"{hook.__name__} was registered with another group than DDP's, so it reduces on that one: pass "
            "register_comm_hook(model.process_group, hook)"
        )
    return _HOOKS[hook]


def check_optimizer(optimizer: Any, model: DistributedDataParallel) -> None:
    """Refuse an optimizer whose step is not torch.optim's own, from reduced gradients and numbers."""
    name = type(optimizer).__name__
    if name not in get_args(OptimizerName) or type(optimizer) is not getattr(torch.optim, name):
        raise ConfigError(
            f"the optimizer is a {name}: expected one of torch.optim: {', '.join(get_args(OptimizerName))}"
        )
    known = {id(parameter) for parameter in model.module.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        if any(id(parameter) not in known for parameter in group["params"]):
            raise ConfigError(f"optimizer: param group {number} has a parameter that is not the model's")
        tensors = [key for key, value in group.items() if isinstance(value, torch.Tensor)]
        if tensors:
            raise ConfigError(f"optimizer: {tensors[0]} of param group {number} is a tensor: pass a number")
