# SPDX-License-Identifier: MIT
"""Trains a GPT with DDP on several ranks of one machine; leaves what a mirrored network would have shown, and the truth.

Each rank is a process of its own, on the ring of `workload_gen.ring`; a rank whose outgoing link is mirrored writes
that link's capture file.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flowcheck
from flowcheck import describe, schedule
from flowcheck import plan as plans
from flowcheck.errors import CheckpointError, ConfigError, FlowCheckError
from flowcheck.run_folder import PLAN
from workload_gen import backend, recorded_plan
from workload_gen.frame_index import IndexedTap
from workload_gen.job import Job, Recording, write
from workload_gen.permuted_schedule import PermutedSchedule
from workload_gen.ring import Ring
from workload_gen.wire import Connection, LinkTap, connections

__all__ = ["Recording", "record"]


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
        tap = IndexedTap if recording.index else LinkTap
        self.tap = tap(self.layout, self._connections(rank), self._capture) if rank in links else None
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
        seed = self.recording.permute
        messages = schedule if seed is None else PermutedSchedule(seed)
        return FabricRing(layout, rank, Nic(raw, layout.mtu), self._connections, messages=messages)

    @property
    def _capture(self) -> Path:
        return self.recording.out / f"link-{self.rank}.pcapng"

    def _connections(self, link: int) -> list[Connection]:
        recording = self.recording
        return connections(self.layout, link, recording.ip, recording.vlan, recording.start_psn)

    def train(self, done: Callable[[int], None]) -> str:
        """Train; return a digest of the final parameters."""
        recording = self.recording
        if self.tap:
            self.tap.recording = recording.startup
        job = Job(recording, self.rank, self._group)
        if not recording.startup:
            self._groups[0].operations.clear()  # the tap has counted none of them
        if self.tap:
            self.tap.recording = True
        job.resume()
        if self.rank == 0 and self.links and not recording.hook and self._begins_from_file(job):
            entry = job.entry()
            whose = {"run_id": entry["run_id"], "attempt": entry.get("resumed", entry)["attempt"]}
            state = job.state(job.begin) | whose
            write(recording.out / "initial.pt", lambda path: torch.save(state, path))
        if recording.hook:
            with self._attach(job):
                job.run(done)
        else:
            job.run(done, self._observer(job))
        dist.barrier()  # an adapter that is gone can repeat nothing: none goes before all have got everything
        self._groups[0].ring.close()
        if self.tap:
            self.tap.close()
        return job.digest()

    def _begins_from_file(self, job: Job) -> bool:
        """Whether the plan's initial state is not the one that the job has broadcast at start-up."""
        return not self.recording.startup or "resumed" in job.entry()

    def _observer(self, job: Job) -> Callable[[int], None]:
        """Return what is called before each step of a job without the hook, and writes the plan from what it sees."""
        operations, seen = self._groups[0].operations, []
        startup, entry, from_file = list(operations), job.entry(), self._begins_from_file(job)
        operations.clear()
        # What was resumed has its final buckets already.
        last = min(job.begin + (2 if describe.rebuilt_buckets(job.ddp) is None else 1), self.recording.iterations)

        def observe(iteration: int) -> None:
            if self.rank == 0 and self.links and iteration <= last:
                buckets = describe.rebuilt_buckets(job.ddp) or describe.first_buckets(job.ddp)
                seen.append((list(operations), buckets))
                if iteration == last:
                    self._write_plan(job, entry, startup, from_file, seen)
            operations.clear()

        return observe

    def _attach(self, job: Job) -> flowcheck.training.Attached:
        """Have the job shadowed: live by the monitor ports' streams, else by the links' capture files."""
        recording = self.recording
        if recording.network:
            shown = {rank: [rank, (rank - 1) % recording.ranks] for rank in recording.network.monitors}
            streams = [
                {
                    "name": f"host{rank}",
                    "links": links,
                    "host": [self._connections(rank)[0].forward.source],
                    **recording.network.source(rank),
                }
                for rank, links in shown.items()
            ]
        else:
            shown = {link: [link] for link in sorted(recording.links or (0, recording.ranks - 1))}
            streams = [{"name": f"link-{link}", "links": [link]} for link in shown]
        links = sorted({link for some in shown.values() for link in some})
        wire = recorded_plan.network(self.layout, {link: self._connections(link) for link in links}, streams)
        if recording.learn:
            known = {name: wire["layout"][name] for name in ("ring", "mtu", "link_gbps") if name in wire["layout"]}
            wire |= {"layout": {"source": "unlearned", **known}, "connections": []}
        if not recording.startup:
            wire["startup"] = []  # the tap has counted nothing before this
        return job.attach(wire, required=True)

    def _write_plan(self, job: Job, entry: dict[str, Any], startup: Any, from_file: bool, seen: Any) -> None:
        recording = self.recording
        document = recorded_plan.document(
            job=entry,
            model=job.model,
            optimizer=job.optimizer,
            layout=self.layout,
            links={link: self._connections(link) for link in self.links},
            startup=startup,
            from_file=from_file,
            first=job.begin + 1,
            iterations=seen,
        )
        if checkpoints := recording.checkpoints():
            document["checkpoints"] = checkpoints
        plans.parse(json.dumps(document), "the recorded plan")
        write(recording.out / "plan.json", lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))


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
    """Train, and write plan, captures and truth into `recording.out`, which must be new or empty, or hold the attempt resumed.

    With `resume` the job goes on after the iteration of a state, as a new attempt of its run. The step that
    `flowcheck.resume` throws away is on the wire, too: the plan lists its collectives at start-up.

    Raises:
        ConfigError: the folder is not empty, the options contradict each other, or the state to resume from does not fit.
        FlowCheckError: a rank failed.
    """
    out = recording.out
    # An attempt that is trained live may follow another one in its folder; captures of two would not be told apart.
    follows = recording.network and recording.hook and recording.resume and (out / PLAN).exists()
    if out.exists() and any(out.iterdir()) and not follows:
        raise ConfigError(f"{out}: not empty; name a new folder")
    links = () if recording.network else tuple(sorted(set(recording.links or (0, recording.ranks - 1))))
    if any(not 0 <= link < recording.ranks for link in links):
        raise ConfigError(
            f"links {list(links)}: a ring of {recording.ranks} ranks has links 0 to {recording.ranks - 1}"
        )
    recording.layout()
    existed, trained = out.exists(), 0
    (out / "truth").mkdir(parents=True, mode=0o700, exist_ok=True)

    def note(done: int) -> None:
        nonlocal trained
        trained = done
        if progress is not None:
            progress(done, recording.iterations)

    try:
        digests = _train(recording, links, note)
    except (CheckpointError, ConfigError):
        if not trained and not follows:  # it could not begin: a corrected call may have the folder
            _clear(out, and_itself=not existed)
        raise
    if len(set(digests)) != 1:
        raise FlowCheckError("the ranks ended with different parameters")


def _train(recording: Recording, links: tuple[int, ...], progress: Callable[[int], None]) -> list[str]:
    """Run the ranks to their end; return the digest of each."""
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
            return _follow(pipes, progress)
        finally:
            for process in processes:
                process.join(None if len(pipes) == 0 else 0.1)
                process.kill()
                process.join()


def _clear(folder: Path, *, and_itself: bool) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if and_itself:
        folder.rmdir()


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
