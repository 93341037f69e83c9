# SPDX-License-Identifier: MIT
"""A state of every kind of tensor, name and option, and for each format a reader of its own library that gives it back."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.pipeline.recordings import same
from updater.snapshot import State, read_state

FOLDERS = ("dcp", "huggingface")


def bits(tensor_bits, dtype):
    return torch.tensor(tensor_bits, dtype=torch.int16).view(dtype)


def state(iteration=12):
    """A state of every kind of tensor, name and option that a format could stumble over."""
    torch.manual_seed(iteration)
    tied = torch.nn.Parameter(torch.randn(7, 5))
    # -0.0, subnormal, a NaN with a payload, infinity
    odd = [-0x8000, 1, 0x7FC1, 0x7F80]
    model = {
        "wte.weight": tied,
        "larger.than.a.buffer": torch.randn(20, 1000),
        "a/b.c": torch.randn(6),
        "bfloat16": bits(odd, torch.bfloat16),
        "float16": bits(odd, torch.float16),
        "float64": torch.randn(2, 3, dtype=torch.float64),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "int32": torch.arange(3, dtype=torch.int32),
        "int8": torch.arange(-2, 1, dtype=torch.int8),
        "uint8": torch.arange(250, 255, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 3),
        "turned": torch.randn(4, 3).t(),
        "every.other": torch.arange(9.0)[::2],
        ".": torch.ones(2),
        "head.weight": tied,
    }
    optimizer = {
        "state": {
            0: {"step": torch.tensor(12.0), "exp_avg": torch.randn(7, 5), "exp_avg.sq/x": bits(odd, torch.bfloat16)},
            1: {"step": 12, "momentum_buffer": None, "eta": 0.1 + 0.2},
            10: {"step": torch.tensor(3), "sum": torch.randn(20, 1000)},
        },
        "param_groups": [
            {"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "eps": 1e-8, "foreach": None, "amsgrad": False, "params": [0, 1]},
            {"lr": 1, "betas": (0.5, 0.75), "weight_decay": float("inf"), "fused": True, "params": [10]},
        ],
    }
    extra = {"rng/cpu.state": torch.randint(0, 256, (40,), dtype=torch.uint8), "at": torch.tensor(iteration)}
    return State("run-7", 2, iteration, False, {"torch": "2"}, model, optimizer, extra, [["wte.weight"], ["a/b.c"]])


def whole(of):
    return {"model": of.model, "optimizer": of.optimizer, "extra": of.extra, "iteration": of.iteration}


def read_torch(path):
    return torch.load(path, weights_only=True)


def read_two_safetensors(path):
    with safe_open(path.with_suffix(".optimizer.safetensors"), "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    values = {int(number): values for number, values in json.loads(metadata["scalars"]).items()}
    for name in [name for name in tensors if name.startswith("state.")]:
        _, number, rest = name.split(".", 2)
        values[int(number)][rest] = tensors.pop(name)
    groups = json.loads(metadata["param_groups"])
    for group in groups:
        group["betas"] = tuple(group["betas"])
    return {
        "model": load_file(path),
        "optimizer": {"state": values, "param_groups": groups},
        "extra": {name.removeprefix("extra."): tensor for name, tensor in tensors.items()},
        "iteration": int(metadata["iteration"]),
    }


def read_dcp(path):
    dcp_to_torch_save(path, path.with_name("from-dcp.pt"))
    found = torch.load(path.with_name("from-dcp.pt"), weights_only=True)
    # The library makes names of all keys.
    found["optimizer"]["state"] = {int(number): values for number, values in found["optimizer"]["state"].items()}
    return found


def read_huggingface(path):
    model = load_file(path / "model.safetensors")
    return {
        "model": model | {"head.weight": model["wte.weight"]},
        "optimizer": torch.load(path / "optimizer.pt", weights_only=True),
        "extra": torch.load(path / "extra.pt", weights_only=True),
        "iteration": json.loads((path / "trainer_state.json").read_text())["global_step"],
    }


READERS = {
    "torch": read_torch,
    "safetensors": read_two_safetensors,
    "dcp": read_dcp,
    "hdf5": lambda path: whole(read_state(path)),
    "huggingface": read_huggingface,
}


def target(folder, form):
    return folder / ("state" if form in FOLDERS else f"state.{form}")


def different(ours, theirs):
    """Return what differs between two whole states: the bits of each tensor, type and value of everything else."""
    extras = ({"model": part["extra"], "optimizer": {}} for part in (ours, theirs))
    groups = [repr([sorted(group.items()) for group in part["optimizer"]["param_groups"]]) for part in (ours, theirs)]
    found = same(ours, theirs) + same(*extras)
    return found + [
        name for name, a, b in (("groups", *groups), ("at", ours["iteration"], theirs["iteration"])) if a != b
    ]
