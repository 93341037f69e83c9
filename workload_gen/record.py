# SPDX-License-Identifier: MIT
"""Trains a GPT on several ranks in one process, and leaves what a mirrored network would have shown, and the truth."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from workload_gen import gpt
from workload_gen.wire import Fabric, make_senders

__all__ = ["Recording", "record"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
}
_CLASSES = {"sgd": "SGD", "adamw": "AdamW"}
_MEBI = 1 << 20


@dataclass(frozen=True)
class Recording:
    """What to train and how the network carries it; the options of `flowcheck-workload record`."""

    out: Path
    ranks: int = 2
    iterations: int = 10
    nccl: str = "2.19"
    channels: int = 1
    pin_channels: bool = False
    mtu: int = 1024
    ip: int = 6
    adaptive_routing: bool = False
    optimizer: str = "sgd"
    fused: bool = False
    parameters: int = 20_000
    bucket_mb: float = 25.0
    links: tuple[int, ...] | None = None
    start_psn: int = 0
    seed: int = 1
    resume: Path | None = None


def _buckets(model: gpt.GPT, limit_bytes: float) -> list[list[str]]:
    """Return the rebuilt buckets: parameters in the order their gradients are ready, last first, up to a size."""
    buckets: list[list[str]] = [[]]
    size = 0
    for name, parameter in reversed(list(model.named_parameters())):
        if buckets[-1] and size + parameter.nbytes > limit_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += parameter.nbytes
    return buckets


def _bucket_plan(shapes: dict[str, tuple[int, ...]], names: list[str]) -> dict[str, Any]:
    offset, parameters = 0, []
    for name in names:
        parameters.append({"name": name, "shape": list(shapes[name]), "offset": offset})
        offset += int(np.prod(shapes[name]))
    return {"dtype": "float32", "elements": offset, "parameters": parameters}


def _plan(recording: Recording, model: gpt.GPT, links: list[int], senders: list[Any]) -> dict[str, Any]:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    owners = {id(p): name for name, p in model.named_parameters()}
    keys = model.state_dict(keep_vars=True)
    total = sum(p.numel() for p in model.parameters())
    described = sum(2 * len(shape) for shape in shapes.values())
    rebuilt = _buckets(model, recording.bucket_mb * _MEBI)
    connections = [
        {
            "edge": s.edge, "channel": s.channel, "source": s.forward.source, "destination": s.forward.destination,
            "proof": {"kind": "queue_pair", "data": [s.data_queue_pair], "credit": [s.credit_queue_pair]},
        }
        for s in senders
    ]  # fmt: skip
    return {
        "format": "flowcheck-plan",
        "version": 1,
        "job": {"run_id": f"recorded-gpt-seed{recording.seed}", "attempt": 1, "world_size": recording.ranks},
        "shards": [
            {
                "name": "model",
                "startup": [
                    {"op": "all_gather", "dtype": "int64", "elements": 1},
                    {"op": "broadcast", "dtype": "int64", "elements": described},
                    {"op": "broadcast", "dtype": "float32", "elements": total, "carries": "initial_state"},
                ],
                "revisions": [
                    {"from_iteration": 1, "buckets": [_bucket_plan(shapes, list(shapes))]},
                    {
                        "from_iteration": 2,
                        "before": [
                            {"op": "broadcast", "dtype": "int32", "elements": len(shapes) + 1},
                            {"op": "broadcast", "dtype": "int32", "elements": len(rebuilt)},
                        ],
                        "buckets": [_bucket_plan(shapes, names) for names in rebuilt],
                    },
                ],
                "layout": {
                    "source": "modelled", "library": "nccl", "version": recording.nccl, "protocol": "ll",
                    "ring": list(range(recording.ranks)), "channels": recording.channels,
                    "pin_channels": recording.pin_channels, "mtu": recording.mtu,
                    "adaptive_routing": recording.adaptive_routing,
                },
                "connections": connections,
                "streams": [{"name": f"link-{link}", "links": [link]} for link in links],
            }
        ],
        "state": [
            {"key": key, "kind": "parameter", "dtype": "float32", "shape": list(value.shape), "parameter": owners[id(value)]}
            for key, value in keys.items()
        ],
        "initial_state": {"source": "broadcast", "tensors": list(shapes)},
        "optimizer": {
            "class": _CLASSES[recording.optimizer],
            "form": "fused" if recording.fused else "default",
            "groups": [{"parameters": list(shapes), "options": _OPTIONS[recording.optimizer]}],
        },
        "arithmetic": {
            "torch": torch.__version__.split("+")[0],
            "device": "cpu",
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
    }  # fmt: skip


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    save(temporary)
    os.chmod(temporary, 0o600)
    os.replace(temporary, path)


def _load_resume(path: Path, model: gpt.GPT, optimizer: torch.optim.Optimizer) -> int:
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["iteration"])
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: cannot resume from it: {str(error).splitlines()[0]}") from error


def record(recording: Recording, progress: Callable[[int, int], None] | None = None) -> None:
    """Train, and write plan, captures and truth into `recording.out`, which must be new or empty.

    With `resume` the job goes on after the iteration of a restored state, with the buckets it had; then only the truth
    is written, since a plan counts its iterations from the start of the job.

    Raises:
        ConfigError: the folder is not empty, the options contradict each other, or the state to resume from does not fit.
    """
    out = recording.out
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: not empty; name a new folder")
    links = [] if recording.resume else sorted(set(recording.links or (0, recording.ranks - 1)))
    if any(not 0 <= link < recording.ranks for link in links):
        raise ConfigError(f"links {links}: a ring of {recording.ranks} ranks has links 0 to {recording.ranks - 1}")
    model = gpt.build(recording.parameters, recording.seed)
    form = {"fused": True} if recording.fused else {}
    kind = getattr(torch.optim, _CLASSES[recording.optimizer])
    optimizer = kind(model.parameters(), **_OPTIONS[recording.optimizer], **form)
    begin = _load_resume(recording.resume, model, optimizer) if recording.resume else 0
    (out / "truth").mkdir(parents=True, mode=0o700)
    layout = plans.Layout(
        source="modelled", library="nccl", version=recording.nccl, protocol="ll", ring=tuple(range(recording.ranks)),
        channels=recording.channels, pin_channels=recording.pin_channels, mtu=recording.mtu,
        adaptive_routing=recording.adaptive_routing,
    )  # fmt: skip
    senders = make_senders(layout, links, out, recording.ip, recording.start_psn)
    if links:
        document = _plan(recording, model, links, senders)
        plans.parse(json.dumps(document), "the recorded plan")
        _write(out / "plan.json", lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))
    fabric = Fabric(layout, senders)
    if not recording.resume:
        _start_up(fabric, model, recording.ranks)
    rebuilt = _buckets(model, recording.bucket_mb * _MEBI)
    for iteration in range(begin + 1, recording.iterations + 1):
        if iteration == 2:
            fabric.broadcast(np.arange(len(list(model.named_parameters())) + 1, dtype="<i4").tobytes())
            fabric.broadcast(np.array([len(names) for names in rebuilt], "<i4").tobytes())
        buckets = rebuilt if iteration > 1 else [[name for name, _ in model.named_parameters()]]
        _step(fabric, model, optimizer, recording, iteration, buckets)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
        _write(out / "truth" / f"iteration-{iteration:06}.pt", lambda path, state=state: torch.save(state, path))
        if progress:
            progress(iteration, recording.iterations)
    fabric.close()


def _start_up(fabric: Fabric, model: gpt.GPT, ranks: int) -> None:
    """Record what DDP does when it is made: check the parameter count and shapes, broadcast the values."""
    parameters = list(model.parameters())
    fabric.all_gather([np.array([len(parameters)], "<i8").tobytes()] * ranks)
    described = itertools.chain(
        itertools.chain(*(p.shape for p in parameters)), itertools.chain(*(p.stride() for p in parameters))
    )
    fabric.broadcast(np.array(list(described), "<i8").tobytes())
    fabric.broadcast(torch.cat([p.detach().reshape(-1) for p in parameters]).numpy().tobytes())


def _step(
    fabric: Fabric,
    model: gpt.GPT,
    optimizer: torch.optim.Optimizer,
    recording: Recording,
    iteration: int,
    buckets: list[list[str]],
) -> None:
    """Do one iteration of all ranks: backward on each one's batch, all-reduce of each bucket, one optimizer step."""
    named = dict(model.named_parameters())
    flats: list[list[np.ndarray]] = []
    for rank in range(recording.ranks):
        inputs, targets = gpt.batch(recording.seed, rank, iteration)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        scaled = {name: p.grad / recording.ranks for name, p in named.items()}
        flats.append([torch.cat([scaled[name].reshape(-1) for name in names]).numpy() for names in buckets])
    for number, names in enumerate(buckets):
        reduced = torch.from_numpy(fabric.all_reduce([flat[number] for flat in flats]))
        for name, piece in zip(names, reduced.split([named[name].numel() for name in names]), strict=True):
            named[name].grad = piece.view_as(named[name])
    optimizer.step()
