# SPDX-License-Identifier: MIT
"""The product in one go where no network can be built: the job is recorded into capture files, which are replayed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowcheck.errors import FlowCheckError

__all__ = ["demo"]

RANKS, ITERATIONS, KILL_AFTER = 4, 16, 9
PARAMETERS = 50_000
PATIENCE_S = 120

Progress = Callable[[str, int, int], None]


def _recorder(out: Path, *options: str) -> subprocess.Popen[str]:
    """Start a recorder process; a process of its own, so that it can be killed like a job."""
    command = [sys.executable, "-c", "from workload_gen.cli import main; main()", "record", "--out", str(out)]
    command += [
        "--ranks",
        str(RANKS),
        "--iterations",
        str(ITERATIONS),
        "--params",
        str(PARAMETERS),
        "--bucket-mb",
        "0.1",
    ]
    command += ["--optimizer", "adamw", "--fused", "--mtu", "4096", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _truth(out: Path, iteration: int) -> Path:
    return out / "truth" / f"iteration-{iteration:06}.pt"


def _follow(process: subprocess.Popen[str], out: Path, what: str, first: int, last: int, progress: Progress) -> None:
    """Wait until a recorder has finished iteration `last`; FlowCheckError if it ends before or takes too long."""
    end = time.monotonic() + PATIENCE_S
    for iteration in range(first, last + 1):
        while not _truth(out, iteration).exists():
            if process.poll() is not None and not _truth(out, iteration).exists():
                raise FlowCheckError(f"the recorder ended in iteration {iteration}: {process.stderr.read().strip()}")
            if time.monotonic() > end:
                process.kill()
                raise FlowCheckError(f"the recorder has not finished iteration {iteration} after {PATIENCE_S} seconds")
            time.sleep(0.002)
        progress(what, iteration - first + 1, last - first + 1)


def demo(directory: Path | None, progress: Progress) -> dict[str, Any]:
    """Run the demonstration in a folder (a new temporary one if None) and return the document of `demo --json`.

    Args:
        directory: where recordings, checkpoints and restored states go; kept.
        progress: called with (what, steps done, steps in all).
    """
    from flowcheck.replay import replay
    from updater.diff import diff
    from updater.export import export
    from updater.restore import restore_state
    from workload_gen.pcapng import trim

    folder = Path(directory or tempfile.mkdtemp(prefix="flowcheck-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    whole, cut, resumed, checkpoints = (folder / name for name in ("uninterrupted", "killed", "resumed", "checkpoints"))

    process = _recorder(whole)
    _follow(process, whole, "training, never stopped", 1, ITERATIONS, progress)
    process.communicate()

    process = _recorder(cut)
    _follow(process, cut, "training, then SIGKILL", 1, KILL_AFTER, progress)
    process.kill()
    process.communicate()
    finished = sum(1 for _ in (cut / "truth").glob("iteration-*.pt"))

    plan = json.loads((cut / "plan.json").read_text())
    captures = {stream["name"]: cut / f"{stream['name']}.pcapng" for stream in plan["shards"][0]["streams"]}
    for capture in captures.values():
        trim(capture)
    report = replay(
        cut / "plan.json",
        captures,
        checkpoints,
        progress=lambda done, total: progress("shadowing from packets", done, total),
    )
    committed = [row["iteration"] for row in report["iterations"] if row["state"] == "committed"]
    if not committed:
        raise FlowCheckError(f"no iteration was committed; the files are in {folder}")

    # A gradient that was whole on the wire is committed even where no rank lived to apply it: its truth is the other run's.
    exact = True
    for number, iteration in enumerate(committed, 1):
        truth = _truth(cut if iteration <= finished else whole, iteration)
        exact = diff(f"{checkpoints}@{iteration}", str(truth))["equal"] and exact
        progress("comparing every iteration", number, len(committed))
    last = committed[-1]
    state = folder / "restored.pt"
    export(restore_state(checkpoints, last), "torch", state)

    same = True
    if last < ITERATIONS:
        process = _recorder(resumed, "--resume", str(state))
        _follow(process, resumed, "training, resumed", last + 1, ITERATIONS, progress)
        process.communicate()
        same = diff(str(_truth(resumed, ITERATIONS)), str(_truth(whole, ITERATIONS)))["equal"]
    return {
        "transport": "offline",
        "ranks": RANKS,
        "iterations": ITERATIONS,
        "committed": len(committed),
        "incomplete": sum(row["state"] != "committed" for row in report["iterations"] if row["iteration"] <= finished),
        "bit_exact": exact and report["bit_exact"],
        "resumed_equal": same,
        "killed_at": finished + 1,
        "restored": last,
        "max_lag": max(0, finished - last),
        "frames": report["packets"]["received"],
        "dir": str(folder),
    }
