# SPDX-License-Identifier: MIT
"""The example job under torchrun, one process a rank, on the cluster's own library: NCCL, its network and its switch.

The same job and the same hook as over the fabric; what carries the collectives is the only difference. examples/nccl/ has
the launch script, and what the environment must pin.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import flowcheck
from flowcheck.errors import ConfigError
from workload_gen.job import Job, Recording

__all__ = ["train"]


def train(recording: Recording, wire: Path, done: Callable[[int], None], backend: str = "nccl") -> None:
    """Be one rank of the job; torchrun starts one for each.

    Args:
        recording: the job; `out` is a folder that every host and the checkpoint node see.
        wire: JSON file that describes the network: `layout` and `streams`, and `connections` of a modelled layout.
        done: called on rank 0 with each iteration's number.
        backend: of torch.distributed, for the world and for DDP's own group.

    Raises:
        ConfigError: torchrun has not started this process, or the job's options do not fit what it has started.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(f"--transport {backend}: start it under torchrun, one process per rank (examples/nccl)")
    device = "cpu"
    if backend == "nccl":
        if not torch.cuda.is_available():
            raise ConfigError("--transport nccl: torch sees no CUDA device on this host")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    try:
        if dist.get_world_size() != recording.ranks:
            raise ConfigError(f"--ranks is {recording.ranks}, torchrun has started {dist.get_world_size()}")
        if dist.get_rank() == 0:
            recording.out.mkdir(mode=0o700, parents=True, exist_ok=True)
            (recording.out / "truth").mkdir(mode=0o700, exist_ok=True)
        job = Job(replace(recording, hook=True), dist.get_rank(), flowcheck.group(), device)
        job.resume()
        with job.attach(wire, required=False):
            job.run(done)
        dist.barrier()
    finally:
        dist.destroy_process_group()
