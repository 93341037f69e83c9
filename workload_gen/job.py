# SPDX-License-Identifier: MIT
"""The example job: a GPT under DDP, the same on every rank, whatever carries its collectives."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.nn.parallel import DistributedDataParallel

import flowcheck
from flowcheck import attempts
from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from workload_gen import gpt
from workload_gen.truth import digest

if TYPE_CHECKING:
    from workload_gen.fabric import Network

__all__ = ["OPTIMIZERS", "Job", "Recording", "write"]

#: Class and options by the name that the command takes.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8}),
    "adamw": ("AdamW", {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
    "adagrad": ("Adagrad", {"lr": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 0.001, "momentum": 0.9}),
    "adamax": ("Adamax", {"lr": 0.002}),
    "nadam": ("NAdam", {"lr": 0.002}),
    "radam": ("RAdam", {"lr": 0.001}),
}

#: No link of a network that one machine carries is faster: raw senders were seen to reach 12.
FABRIC_GBPS = 20


@dataclass(frozen=True)
class Recording:
    """What to train and how the network carries it; the options of `flowcheck-workload record`."""

    out: Path
    ranks: int = 2
    iterations: int = 10
    protocol: str = "ll"
    nccl: str = "2.19"
    channels: int = 1
    pin_channels: bool = False
    queue_pairs: int = 1
    split_queue_pairs: bool | None = None
    mtu: int = 1024
    ip: int = 6
    vlan: int | None = None
    adaptive_routing: bool = False
    dtype: str = "float32"
    optimizer: str = "sgd"
    fused: bool = False
    parameters: int = 20_000
    bucket_mb: float = 25.0
    links: tuple[int, ...] | None = None
    #: Leave beside each capture file which frame carries what (workload_gen/frame_index.py).
    index: bool = False
    startup: bool = True
    start_psn: int = 0
    seed: int = 1
    #: Go on from this state as a new attempt of its run, with this number; none: the one after the newest that it knows of.
    resume: Path | None = None
    attempt: int | None = None
    #: For the plan: iterations between two snapshots of the checkpoint directory.
    snapshot_iterations: int | None = None
    #: Hosts that carry the collectives; none: the ranks sum without a network.
    network: Network | None = None
    #: A whole state for every iteration in `truth`, or only its digest in `steps.jsonl`, or nothing.
    truth: Literal["states", "digests", "none"] = "states"
    steps: bool = False
    #: The hook writes the plan and sends step records; without it the plan of a recording is written from what was seen.
    hook: bool = False
    #: The hook's: a full state goes into `states` after every so many iterations, 0: none does; and how long to wait for
    #: a shadow.
    full_state_every: int = 0
    shadow_s: float = 0.0
    #: The plan says nothing of the library: the shadow learns the layout from passes that the hook has reduced.
    learn: bool = False
    #: Over a network, messages are cut as no library does it, drawn by lot from this seed.
    permute: int | None = None

    def layout(self) -> plans.Layout:
        """Return the library's layout; ConfigError if the version cannot have the options.

        Up to 2.15 long messages are always split as for adaptive routing (net_ib.cc).
        """
        document = {
            "source": "modelled",
            "library": "nccl",
            "version": self.nccl,
            "protocol": self.protocol,
            "ring": list(range(self.ranks)),
            "channels": self.channels,
            "pin_channels": self.pin_channels,
            "queue_pairs": self.queue_pairs,
            "split_queue_pairs": self.split_queue_pairs,
            "mtu": self.mtu,
            "adaptive_routing": self.adaptive_routing or int(self.nccl.split(".")[1]) <= 15,
        }
        if self.network is not None:
            document["link_gbps"] = FABRIC_GBPS
        try:
            return plans.Layout.model_validate_json(json.dumps(document))
        except ValidationError as error:
            raise ConfigError(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")) from error

    def run_id(self) -> str:
        """Return the name of a run that begins with this job."""
        return f"{'trained' if self.hook else 'recorded'}-gpt-seed{self.seed}"

    def checkpoints(self) -> dict[str, Any]:
        """Return the plan's `checkpoints`."""
        return {"snapshot_iterations": self.snapshot_iterations} if self.snapshot_iterations else {}


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    save(temporary)
    os.chmod(temporary, 0o600)
    os.replace(temporary, path)


class Job:
    """One rank's part: make -> resume -> run -> digest.

    Attributes:
        begin: the iteration that it goes on from; 0 unless it is resumed.

    Args:
        recording: what to train; rank 0 leaves its truth there.
        rank: of this process.
        group: that DDP reduces on.
        device: where it trains.
    """

    def __init__(
        self, recording: Recording, rank: int, group: dist.ProcessGroup, device: torch.device | str = "cpu"
    ) -> None:
        self.recording, self.rank, self.device = recording, rank, torch.device(device)
        dtype = getattr(torch, recording.dtype)
        self.model = gpt.build(recording.parameters, recording.seed).to(self.device, dtype)
        name, options = OPTIMIZERS[recording.optimizer]
        form = {"fused": True} if recording.fused else {}
        self.optimizer = getattr(torch.optim, name)(self.model.parameters(), **options, **form)
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=recording.bucket_mb, process_group=group)
        self.begin = 0

    def backward(self, iteration: int) -> None:
        """Do an iteration's forward and backward pass."""
        inputs, targets = (part.to(self.device) for part in gpt.batch(self.recording.seed, self.rank, iteration))
        torch.nn.functional.cross_entropy(self.ddp(inputs).flatten(0, 1), targets.flatten()).backward()

    def resume(self) -> None:
        """Go on after the state that the recording names, if it does; ConfigError if it cannot.

        A state that names no run, such as those of `truth`, is taken as one of this job's run, of the attempt before.
        """
        recording = self.recording
        if not recording.resume:
            return
        self.begin = flowcheck.resume(self.ddp, self.optimizer, recording.resume, lambda: self.backward(1))
        if self.begin >= recording.iterations:
            raise ConfigError(
                f"{recording.resume}: is the state after iteration {self.begin} of {recording.iterations}: nothing is left to train"
            )
        loaded = attempts.loaded(self.optimizer)
        if loaded.run_id is None:
            loaded.run_id = recording.run_id()
            loaded.attempt = loaded.latest_attempt = max(1, (recording.attempt or 2) - 1)
        if recording.attempt:
            if recording.attempt <= loaded.attempt:
                raise ConfigError(
                    f"attempt {recording.attempt} cannot go on from attempt {loaded.attempt}, of which {recording.resume} is: expected "
                    "a later one"
                )
            loaded.latest_attempt = recording.attempt - 1

    def entry(self) -> dict[str, Any]:
        """Return run id, attempt and, if it is resumed, its origin, as the plan has them; before the first step."""
        return attempts.job_entry(self.optimizer, None) or {"run_id": self.recording.run_id(), "attempt": 1}

    def attach(self, wire: dict[str, Any] | Path, *, required: bool) -> flowcheck.training.Attached:
        """Have the job shadowed, its plan left in the recording's folder; `required`: or fail."""
        recording = self.recording
        return flowcheck.attach(
            self.ddp,
            self.optimizer,
            plan_url=recording.out,
            wire=wire,
            run_id=self.entry()["run_id"],
            full_state_every=recording.full_state_every,
            checkpoints=recording.checkpoints(),
            wait_s=recording.shadow_s,
            required=required,
        )

    def run(self, done: Callable[[int], None], before_step: Callable[[int], None] = lambda iteration: None) -> None:
        """Train; rank 0 notes every step, and calls `done` with its number. `before_step` has the reduced gradients."""
        for iteration in range(self.begin + 1, self.recording.iterations + 1):
            self.optimizer.zero_grad(set_to_none=True)
            self.backward(iteration)
            before_step(iteration)
            self.optimizer.step()
            if self.rank == 0:
                self._note(iteration)
                done(iteration)

    def state(self, iteration: int) -> dict[str, Any]:
        """Return the whole state as it is, that after an iteration."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "iteration": iteration}

    def _note(self, iteration: int) -> None:
        """Leave what this iteration's truth is."""
        recording, ended = self.recording, time.time_ns()
        state = self.state(iteration)
        if recording.steps:
            row = {"iteration": iteration, "ended_ns": ended}
            if recording.truth == "digests":
                row["digest"] = digest(state)
            path = recording.out / "steps.jsonl"
            with open(path, "a", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(json.dumps(row) + "\n")
        if recording.truth == "states":
            truth = recording.out / "truth" / f"iteration-{iteration:06}.pt"
            write(truth, lambda path: torch.save(state, path))

    def digest(self) -> str:
        """Return a digest of the parameters as they are."""
        result = hashlib.sha256()
        for parameter in self.model.parameters():
            result.update(parameter.detach().cpu().view(-1).view(torch.uint8).numpy().tobytes())
        return result.hexdigest()
