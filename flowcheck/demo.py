# SPDX-License-Identifier: MIT
"""The product in one go, live: a job trains over a mirrored network, is checkpointed from it, killed, restored, resumed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowcheck.errors import FlowCheckError

__all__ = ["demo"]

RANKS, ITERATIONS, KILL_AFTER, MIRRORED = 4, 60, 35, 0
PARAMETERS = 400_000
PATIENCE_S = 120
#: Steps at the start of a run that its median step time leaves out.
WARM_UP = 5

Progress = Callable[[str, int, int], None]


class _Job:
    """A trainer of the demonstration, a process group of its own so that it can be killed like a job."""

    def __init__(self, network: Path, out: Path, *options: str) -> None:
        self.out = out
        words = ["--ranks", RANKS, "--iterations", ITERATIONS, "--params", PARAMETERS, "--bucket-mb", "0.5", "--fused"]
        command = [sys.executable, "-c", "from workload_gen.cli import main; main()", "train", "--network", network]
        self.process = subprocess.Popen(
            [*map(str, [*command, *words, "--out", out]), *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def steps(self) -> list[dict[str, Any]]:
        """Return what the job has noted of each step: iteration, ended_ns, digest of the state after it."""
        path = self.out / "steps.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def follow(self, what: str, last: int, progress: Progress) -> None:
        """Wait until iteration `last` is done; FlowCheckError if the job ends before, or takes too long."""
        end = time.monotonic() + PATIENCE_S
        first = done = None
        while done is None or done < last:
            steps = self.steps()
            if steps:
                first = steps[0]["iteration"] if first is None else first
                done = steps[-1]["iteration"]
                progress(what, done - first + 1, last - first + 1)
            if (done or 0) < last and self.process.poll() is not None and self.steps() == steps:
                raise FlowCheckError(f"the trainer ended: {self.process.stderr.read().strip()}")
            if time.monotonic() > end:
                raise FlowCheckError(f"the trainer has not finished iteration {last} after {PATIENCE_S} seconds")
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill every process of the job with SIGKILL; one that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until the job has ended."""
        self.process.wait()


def _start_shadow(plan: Path, out: Path, trainer: _Job) -> subprocess.Popen[str]:
    end = time.monotonic() + PATIENCE_S
    while not plan.exists():
        if trainer.process.poll() is not None or time.monotonic() > end:
            raise FlowCheckError("the trainer has written no plan")
        time.sleep(0.02)
    command = [sys.executable, "-m", "flowcheck", "run", str(plan), "--out", str(out), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _stop(shadow: subprocess.Popen[str]) -> dict[str, Any]:
    """End a shadow as a user would; return its last status."""
    shadow.send_signal(signal.SIGTERM)
    report, errors = shadow.communicate(timeout=PATIENCE_S)
    if shadow.returncode:
        raise FlowCheckError(f"flowcheck run failed: {errors.strip()[-500:]}")
    return json.loads(report)


def _step_ms(steps: list[dict[str, Any]]) -> float:
    times = [row["ended_ns"] for row in steps[WARM_UP:]]
    return round(statistics.median(b - a for a, b in itertools.pairwise(times)) / 1e6, 1)


def _most_behind(out: Path, steps: list[dict[str, Any]]) -> int:
    """Return how many iterations were not yet in the log when a step ended, at most."""
    from updater.directory import Directory

    logged = {row.number: row.entry.header.time_ns for row in Directory(out).iterations if row.entry}
    behind = 0
    for row in steps:
        now, last = row["ended_ns"], row["iteration"]
        behind = max(behind, sum(logged.get(i, now + 1) > now for i in range(max(1, last - 10), last + 1)))
    return behind


def _compare(out: Path, truth: dict[int, str], progress: Progress) -> bool:
    """Return whether the state after every committed iteration has the digest that the trainer noted."""
    from updater.directory import Directory
    from updater.restore import states_after
    from workload_gen.truth import digest

    committed = sum(row.state == "committed" for row in Directory(out).iterations)
    equal = True
    for number, (iteration, state) in enumerate(states_after(out), 1):
        equal = digest(state) == truth.get(iteration) and equal
        progress("comparing every iteration", number, committed)
    return equal


def demo(directory: Path | None, transport: str, progress: Progress) -> dict[str, Any]:
    """Run the demonstration in a folder (a new temporary one if None) and return the document of `demo --json`.

    Args:
        directory: where everything goes; kept.
        transport: what carries the job's frames: "fabric", or "in-process".
        progress: called with (what, steps done, steps in all).

    Raises:
        DeviceError: the network cannot be built here.
        FlowCheckError: a part of it failed.
    """
    from updater.export import export
    from updater.listing import listing
    from updater.restore import restore_state
    from workload_gen.fabric import Fabric
    from workload_gen.switch import Switch

    folder = Path(directory or tempfile.mkdtemp(prefix="flowcheck-demo-"))
    checkpoints, network = folder / "checkpoints", folder / "network.json"
    kind = Switch if transport == "in-process" else Fabric
    with kind(RANKS, (MIRRORED,)) as wire:
        folder.mkdir(parents=True, exist_ok=True)
        wire.network.store(network)
        running: list[Any] = []
        try:
            whole = _Job(network, folder / "uninterrupted", "--shadow", "0")
            running.append(whole)
            whole.follow("training, never stopped", ITERATIONS, progress)
            whole.wait()

            _, seen = wire.mirrored(MIRRORED)
            killed = _Job(network, folder / "killed")
            running.append(killed)
            shadow = _start_shadow(killed.out / "plan.json", checkpoints, killed)
            running.append(shadow)
            killed.follow("training, then SIGKILL", KILL_AFTER, progress)
            time.sleep(random.uniform(0.2, 0.8) * _step_ms(killed.steps()) / 1e3)  # somewhere in the next iteration
            killed.kill()
            killed.wait()
            seen = wire.mirrored(MIRRORED)[1] - seen
            packets = _stop(shadow)["packets"]

            steps = killed.steps()
            finished, report = steps[-1]["iteration"], listing(checkpoints)
            # A gradient that was whole on the wire is committed even where no rank lived to apply it.
            truth = {row["iteration"]: row["digest"] for row in [*whole.steps(), *steps]}
            exact = _compare(checkpoints, truth, progress)
            state = restore_state(checkpoints)
            export(state, "torch", folder / "restored.pt")
            same = True
            if state.iteration < ITERATIONS:
                resumed = _Job(network, folder / "resumed", "--resume", str(folder / "restored.pt"), "--shadow", "0")
                running.append(resumed)
                resumed.follow("training, resumed", ITERATIONS, progress)
                resumed.wait()
                same = resumed.steps()[-1]["digest"] == whole.steps()[-1]["digest"]
        finally:
            for process in running:
                process.kill()
                process.wait()
    rows = {row["iteration"]: row["state"] for row in report["iterations"]}
    # What the kill cut off was never an iteration of the training.
    complete = [rows.get(iteration) for iteration in range(1, finished + 1)]
    return {
        "transport": transport,
        "ranks": RANKS,
        "iterations": ITERATIONS,
        "committed": list(rows.values()).count("committed"),
        "incomplete": len(complete) - complete.count("committed"),
        "bit_exact": exact and report["bit_exact"],
        "resumed_equal": same,
        "killed_at": finished + 1,
        "restored": state.iteration,
        "max_lag": _most_behind(checkpoints, steps),
        "frames": packets["received"],
        "bytes": seen,
        "step_ms": _step_ms(steps),
        "step_ms_untouched": _step_ms(whole.steps()),
        "dir": str(folder),
    }
