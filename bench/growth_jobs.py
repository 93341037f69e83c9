# SPDX-License-Identifier: MIT
"""What `bench.growth` measures at one size: stages alone, a replay, a live job; each in processes of its own.

What is returned are the values of each run: names that end in `_s` are seconds, in `_bytes` bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine, stages, training_overhead, updates
from bench.measure import seconds
from bench.training_overhead import Settings, memory_bytes
from data_extractor.extractor import Extractor
from flowcheck.eal import Eal
from flowcheck.replay import replay
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from packet_dump.dump import FileDump
from packet_parser.parser import Parser
from updater import arithmetic
from updater.listing import listing
from updater.log import LogWriter
from updater.log_format import GRADIENT
from updater.restore import restore_state
from updater.snapshot import State, write_state
from updater.updater import Updater  # noqa: F401  that what is timed need not load it
from workload_gen.fabric import Fabric
from workload_gen.record import Recording, record

__all__ = ["Values", "frames", "live_iterations", "live_job", "offline", "update"]

Values = dict[str, float]
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
#: Records of the ring that a stage alone has: the capture passes through it.
_RECORDS = 1 << 10


@contextlib.contextmanager
def _apart() -> Any:
    """Yield a call that runs a function in a new process, alone on a core, and returns what it returns."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _alone() -> None:
    os.sched_setaffinity(0, {machine.cores()[0]})
    torch.set_num_threads(1)


class _Timed:
    """A stage, and the seconds that its polls took."""

    def __init__(self, stage: Any) -> None:
        self._stage, self.seconds = stage, 0.0

    @property
    def finished(self) -> bool:
        """Whether the stage is."""
        return self._stage.finished

    def poll(self) -> None:
        """Poll it."""
        self.seconds += seconds(self._stage.poll)


def _chain(path: Path, layout: Any, data_bytes: int, folder: Path) -> Values:
    _alone()
    plan = stages.plan_of(layout, data_bytes, ["a"])
    with (
        PacketRing.for_stream(folder / "ring", plan, "a", _RECORDS) as ring,
        SlotFile.for_plan(folder / "slots", plan) as slots,
        contextlib.closing(FileDump(Eal.start(), path, ring)) as dump,
    ):
        timed = [_Timed(stage) for stage in (dump, Parser(ring, plan, "a"), Extractor([ring], plan, slots))]
        stages.drain(*timed)
        assert slots.settled_next == 2, "the iteration is not whole"
    names = ("dump_s", "parse_s", "extract_s")
    return dict(zip(names, (stage.seconds for stage in timed), strict=True)) | _peak()


def _peak() -> Values:
    return {"peak_bytes": memory_bytes("self", "VmHWM")}


def frames(parameters: int, _folder: Path, runs: int) -> list[Values]:
    """Take one iteration of two ranks from capture file to slot, both edges in one stream; each stage's polls timed."""
    data_bytes = 4 * parameters * stages.ITERATIONS
    out = []
    with tempfile.TemporaryDirectory(prefix="flowcheck-growth-", dir=_MEMORY) as folder:
        path = Path(folder) / "capture"
        with _apart() as call:
            layout = call(stages.capture, path, "simple", stages.PAYLOADS[0], data_bytes, 1)
        for run in range(runs):
            scratch = Path(folder) / str(run)
            scratch.mkdir()
            with _apart() as call:
                out.append(call(_chain, path, layout, data_bytes, scratch))
            shutil.rmtree(scratch)
    return out


def _updates(parameters: int, form: str, runs: int, folder: Path) -> list[Values]:
    _alone()
    plan, model, slot = updates.filled(form, parameters)
    revision, gradient = plan.revision(1), slot[: 4 * parameters]
    model.step(slot, revision)
    out: list[Values] = [{f"{form}_s": seconds(lambda: model.step(slot, revision))} for _ in range(runs)]
    if form == "fused":
        writer = LogWriter(folder, plan.identity(), 0)
        state = State("bench", 1, 1, True, arithmetic.current().model_dump(), model.model, model.optimizer.state_dict())

        def log(iteration: int) -> None:
            writer.append(GRADIENT, 1, iteration, 0, [gradient])
            writer.commit()

        for number, values in enumerate(out, 1):
            values["log_s"] = seconds(lambda number=number: log(number))
            # Into a new file, as a snapshot is: to write over one is faster on some disks.
            raw = folder / f"raw-{number}"
            values["raw_s"] = seconds(lambda raw=raw: updates.write_raw(raw, [gradient] * 3))
            raw.unlink()
            values["snapshot_s"] = seconds(lambda: write_state(folder / "snapshot.h5", state))
        writer.close()
    return [values | {f"{form}_{name}": value for name, value in _peak().items()} for values in out]


def update(parameters: int, folder: Path, runs: int) -> list[Values]:
    """Step a state from a slot in either form; log the gradient, write a snapshot, and as many bytes as they are."""
    parameters = -(-parameters // 8000) * 8000
    out: list[Values] = [{} for _ in range(runs)]
    for form in ("fused", "default"):
        with _apart() as call:
            for values, more in zip(out, call(_updates, parameters, form, runs, folder), strict=True):
                values |= more
    return out


def _replay(recording: Path, links: Sequence[int], out: Path) -> Values:
    _alone()
    tempfile.tempdir = _MEMORY  # for rings and slots, as in a live run
    captures = {f"link-{link}": recording / f"link-{link}.pcapng" for link in links}
    begin = time.perf_counter()
    report = replay(recording / "plan.json", captures, out, keep_gradients=True)
    taken = time.perf_counter() - begin
    assert all(row["state"] == "committed" for row in report["iterations"])
    disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"replay_s": taken, "disk_bytes": disk} | _peak()


def _read(out: Path) -> Values:
    _alone()
    gc.collect()
    gc.freeze()  # what torch has made is not `list`'s to look through: the command does without it
    return {"list_s": seconds(lambda: listing(out)), "restore_s": seconds(lambda: restore_state(out))}


def offline(folder: Path, runs: int, **job: Any) -> list[Values]:
    """Record a job into memory and replay it, dump to updater in one process."""
    out = []
    with tempfile.TemporaryDirectory(prefix="flowcheck-growth-", dir=_MEMORY) as memory:
        recording = Recording(
            out=Path(memory) / "job", protocol="simple", mtu=4096, ip=4, optimizer="adamw", fused=True, truth="none", **job
        )  # fmt: skip
        with _apart() as call:
            call(record, recording)
        links = sorted(recording.links or (0, recording.ranks - 1))
        for run in range(runs):
            with _apart() as call:
                out.append(call(_replay, recording.out, links, folder / f"checkpoints-{run}"))
            with _apart() as call:
                out[-1] |= call(_read, folder / f"checkpoints-{run}")
            shutil.rmtree(folder / f"checkpoints-{run}")
    return out


def _live(folder: Path, settings: Settings) -> dict[str, Any]:
    with Fabric(settings.ranks, settings.mirrored) as fabric:
        found = training_overhead.train(settings, "flowcheck", fabric, folder)
    if found["lost"]:
        print(f"{found['lost']} iterations were not committed", file=sys.stderr)
    return found


def live_job(folder: Path, runs: int, **job: Any) -> list[Values]:
    """Train a job with FlowCheck beside it: seconds from commit to commit, CPU of each stage, and their peaks.

    `behind_iterations` is how many that were trained were not yet committed, at most.
    """
    out = []
    for run in range(runs):
        (folder / str(run)).mkdir()
        settings = Settings(batches=1, **job)
        found = _live(folder / str(run), settings)
        times = [when for iteration, when in found["saved"] if iteration >= training_overhead.WARM_UP]
        values = {"commit_s": statistics.median(np.diff(times)) / 1e9}
        values["behind_iterations"] = training_overhead.behind(found["ended"], found["saved"])[1]
        taken, stages_at_end = training_overhead.cpu_s_per_step(found), found["samples"][-1][1]
        for name in training_overhead.STAGES:
            values |= {f"{name}_s": taken.get(name, 0), f"{name}_bytes": stages_at_end[name]["peak_bytes"]}
        out.append(values)
        shutil.rmtree(folder / str(run))
    return out


def live_iterations(iterations: int, folder: Path) -> dict[int, list[Values]]:
    """Train so many iterations with FlowCheck beside them: each stage's own memory after every tenth part."""
    found = _live(folder, Settings(steps=iterations, ranks=2, parameters=60_000, batches=1))
    out: dict[int, list[Values]] = {}
    for part in range(1, 11):
        iteration = iterations * part // 10
        near = min(found["samples"], key=lambda sample: abs(sample[0] - found["ended"][iteration - 1]))
        out[iteration] = [{f"{name}_bytes": stage["own_bytes"] for name, stage in near[1].items()}]
    return out
