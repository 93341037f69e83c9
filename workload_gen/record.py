# SPDX-License-Identifier: MIT
"""Trains a GPT with DDP on several ranks of one machine; leaves what a mirrored network would have shown, and the truth.

Each rank is a process of its own, on the ring of `workload_gen.ring`; a rank whose outgoing link is mirrored writes
that link's capture file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import flowcheck
from flowcheck import describe
from flowcheck import plan as plans
from flowcheck.errors import ConfigError, FlowCheckError
from workload_gen import backend, gpt, recorded_plan
from workload_gen.ring import Ring
from workload_gen.truth import digest
from workload_gen.wire import Connection, LinkTap, connections

if TYPE_CHECKING:
    from workload_gen.fabric import Network

__all__ = ["OPTIMIZERS", "Recording", "record"]

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
    startup: bool = True
    start_psn: int = 0
    seed: int = 1
    resume: Path | None = None
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
        try:
            return plans.Layout.model_validate_json(json.dumps(document))
        except ValueError as error:
            raise ConfigError(str(error).splitlines()[2].strip().removeprefix("Value error, ")) from error


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    save(temporary)
    os.chmod(temporary, 0o600)
    os.replace(temporary, path)


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process when the one that wants the recording is gone, however it went."""

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Rank:
    """One rank of the job."""

    def __init__(self, recording: Recording, rank: int, links: tuple[int, ...], rendezvous: str) -> None:
        self.recording, self.rank, self.layout = recording, rank, recording.layout()
        self.links = {link: self._connections(link) for link in links}
        self.tap = LinkTap(self.layout, self._connections(rank), self._capture) if rank in links else None
        self._groups = backend.register(self.layout, self._ring)
        store = dist.FileStore(rendezvous, recording.ranks)
        # What is not the training's goes over a group of its own, inside this machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=recording.ranks)
        self._group = flowcheck.group(backend.NAME)

    def _ring(self, layout: plans.Layout, rank: int, store: dist.Store) -> backend.AnyRing:
        if self.recording.network is None:
            return Ring(layout, rank, store, self.tap)
        # What needs a compiler is for those who have one: a recording needs none.
        from workload_gen._nic import Nic
        from workload_gen.fabric import adapter_socket
        from workload_gen.transport import FabricRing

        raw = adapter_socket(self.recording.network.hosts[rank], self.recording.network.interface)
        return FabricRing(layout, rank, Nic(raw, layout.mtu), self._connections)

    @property
    def _capture(self) -> Path:
        return self.recording.out / f"link-{self.rank}.pcapng"

    def _connections(self, link: int) -> list[Connection]:
        recording = self.recording
        return connections(self.layout, link, recording.ip, recording.vlan, recording.start_psn)

    def train(self, done: Callable[[int], None]) -> str:
        """Train; return a digest of the final state."""
        recording = self.recording
        model = gpt.build(recording.parameters, recording.seed).to(getattr(torch, recording.dtype))
        name, options = OPTIMIZERS[recording.optimizer]
        form = {"fused": True} if recording.fused else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), **options, **form)
        if self.tap:
            self.tap.recording = recording.startup
        ddp = DistributedDataParallel(model, bucket_cap_mb=recording.bucket_mb, process_group=self._group)
        if self.tap:
            self.tap.recording = True
        if self.rank == 0 and not recording.startup:
            state = {"model": model.state_dict()}
            _write(recording.out / "initial.pt", lambda path: torch.save(state, path))

        def backward(iteration: int) -> None:
            inputs, targets = gpt.batch(recording.seed, self.rank, iteration)
            torch.nn.functional.cross_entropy(ddp(inputs).flatten(0, 1), targets.flatten()).backward()

        begin = 0
        if recording.resume:
            begin = flowcheck.resume(ddp, optimizer, recording.resume, lambda: backward(1))
        operations = self._groups[0].operations
        startup, seen = list(operations), []
        with self._attach(ddp, optimizer) if recording.hook else contextlib.nullcontext():
            for iteration in range(begin + 1, recording.iterations + 1):
                operations.clear()
                optimizer.zero_grad(set_to_none=True)
                backward(iteration)
                if self.rank == 0 and self.links and not recording.hook and iteration <= 2:
                    seen.append((list(operations), describe.rebuilt_buckets(ddp) or describe.first_buckets(ddp)))
                    if iteration == min(2, recording.iterations):
                        self._write_plan(model, optimizer, startup if recording.startup else None, seen)
                optimizer.step()
                if self.rank == 0:
                    self._note(iteration, model, optimizer)
                    done(iteration)
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().view(-1).view(torch.uint8).numpy().tobytes())
        dist.barrier()  # an adapter that is gone can repeat nothing: none goes before all have got everything
        self._groups[0].ring.close()
        if self.tap:
            self.tap.close()
        return digest.hexdigest()

    def _attach(self, ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> flowcheck.training.Attached:
        """Have the job shadowed: live by the monitor ports' streams, else by the links' capture files."""
        recording = self.recording
        if recording.network:
            shown = {rank: [rank, (rank - 1) % recording.ranks] for rank in recording.network.monitors}
            streams = [
                {
                    "name": f"host{rank}",
                    "links": links,
                    "host": [self._connections(rank)[0].forward.source],
                    "interface": recording.network.monitors[rank],
                }
                for rank, links in shown.items()
            ]
        else:
            shown = {link: [link] for link in sorted(recording.links or (0, recording.ranks - 1))}
            streams = [{"name": f"link-{link}", "links": [link]} for link in shown]
        links = sorted({link for some in shown.values() for link in some})
        wire = recorded_plan.network(self.layout, {link: self._connections(link) for link in links}, streams)
        if not recording.startup:
            wire["startup"] = []  # the tap has counted nothing before this
        return flowcheck.attach(
            ddp,
            optimizer,
            plan_url=recording.out,
            wire=wire,
            run_id=f"trained-gpt-seed{recording.seed}",
            full_state_every=recording.full_state_every,
            wait_s=recording.shadow_s,
            required=True,
        )

    def _note(self, iteration: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Leave what this iteration's truth is."""
        recording, ended = self.recording, time.time_ns()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
        if recording.steps:
            row = {"iteration": iteration, "ended_ns": ended}
            if recording.truth == "digests":
                row["digest"] = digest(state)
            with open(
                recording.out / "steps.jsonl", "a", opener=lambda path, flags: os.open(path, flags, 0o600)
            ) as file:
                file.write(json.dumps(row) + "\n")
        if recording.truth == "states":
            truth = recording.out / "truth" / f"iteration-{iteration:06}.pt"
            _write(truth, lambda path: torch.save(state, path))

    def _write_plan(self, model: Any, optimizer: Any, startup: Any, seen: Any) -> None:
        recording = self.recording
        document = recorded_plan.document(
            run_id=f"recorded-gpt-seed{recording.seed}",
            model=model,
            optimizer=optimizer,
            layout=self.layout,
            links={link: self._connections(link) for link in self.links},
            startup=startup,
            iterations=seen,
        )
        plans.parse(json.dumps(document), "the recorded plan")
        _write(recording.out / "plan.json", lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))


def _run_rank(recording: Recording, rank: int, links: tuple[int, ...], rendezvous: str, pipe: Any) -> None:
    """Be one rank, in a process of its own; what it has to say goes into the pipe."""
    _die_with(multiprocessing.parent_process())
    torch.set_num_threads(1)
    try:
        job = _Rank(recording, rank, links, rendezvous)
        pipe.send(("digest", job.train(lambda iteration: pipe.send(("iteration", iteration)))))
    except FlowCheckError as error:
        pipe.send(("error", error))
    except Exception as error:
        pipe.send(("error", FlowCheckError(f"rank {rank}: {type(error).__name__}: {error}")))
        raise


def record(recording: Recording, progress: Callable[[int, int], None] | None = None) -> None:
    """Train, and write plan, captures and truth into `recording.out`, which must be new or empty.

    With `resume` the job goes on after the iteration of a restored state; then only the truth is written, since a plan
    counts its iterations from the start of the job.

    Raises:
        ConfigError: the folder is not empty, the options contradict each other, or the state to resume from does not fit.
        FlowCheckError: a rank failed.
    """
    out = recording.out
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: not empty; name a new folder")
    links = (
        () if recording.resume or recording.network else tuple(sorted(set(recording.links or (0, recording.ranks - 1))))
    )
    if any(not 0 <= link < recording.ranks for link in links):
        raise ConfigError(
            f"links {list(links)}: a ring of {recording.ranks} ranks has links 0 to {recording.ranks - 1}"
        )
    recording.layout()
    (out / "truth").mkdir(parents=True, mode=0o700)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workload_gen.record"])
    with tempfile.TemporaryDirectory(prefix="flowcheck-record-") as folder:
        pipes, processes = [], []
        for rank in range(recording.ranks):
            pipe, theirs = context.Pipe(duplex=False)
            arguments = (recording, rank, links, f"{folder}/rendezvous", theirs)
            processes.append(context.Process(target=_run_rank, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(pipe)
        try:
            digests = _follow(pipes, lambda done: progress and progress(done, recording.iterations))
        finally:
            for process in processes:
                process.join(None if len(pipes) == 0 else 0.1)
                process.kill()
                process.join()
    if len(set(digests)) != 1:
        raise FlowCheckError("the ranks ended with different parameters")


def _follow(pipes: list[Any], progress: Callable[[int], None]) -> list[str]:
    """Return each rank's digest; removes the pipes of those that are done. Raises what a rank failed with."""
    digests, errors = [], []
    while pipes and not errors:
        for pipe in multiprocessing.connection.wait(pipes):
            try:
                kind, value = pipe.recv()
            except EOFError:
                errors.append(FlowCheckError("a rank was killed"))
                pipes.remove(pipe)
                continue
            if kind == "iteration":
                progress(value)
                continue
            (digests if kind == "digest" else errors).append(value)
            pipes.remove(pipe)
    # A rank that fails takes its neighbours with it: what they say of it is not the cause.
    for error in sorted(errors, key=lambda error: "ConnectionError" in str(error)):
        raise error
    return digests
