# SPDX-License-Identifier: MIT
"""Trains the GPT over a mirrored fabric, live: leaves the plan for the shadow first, then trains, and notes every step."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flowcheck import plan as plans
from flowcheck.errors import FlowCheckError
from flowcheck.files import write_private
from workload_gen.fabric import Network
from workload_gen.record import Recording, record

__all__ = ["train", "write_plan"]

#: What `flowcheck run` writes beside the plan when every frame is captured from then on.
ACKNOWLEDGEMENT = "shadow.json"


def write_plan(recording: Recording, run_id: str | None = None) -> Path:
    """Write the plan of a live job into `recording.out`, before it trains; return its path.

    Buckets and start-up collectives are those that DistributedDataParallel shows in two iterations of the same job
    without a network. A stream for each mirrored port.
    """
    network = recording.network
    ranks = recording.ranks
    links = sorted({link for rank in network.monitors for link in (rank, (rank - 1) % ranks)})
    with tempfile.TemporaryDirectory(prefix="flowcheck-plan-") as folder:
        rehearsal = replace(
            recording, out=Path(folder) / "rehearsal", iterations=2, network=None, links=tuple(links), steps=False
        )
        record(rehearsal)
        document = json.loads((rehearsal.out / "plan.json").read_text())
    document["job"]["run_id"] = run_id or f"trained-gpt-seed{recording.seed}"
    shard = document["shards"][0]
    sources = {connection["edge"]: connection["source"] for connection in shard["connections"]}
    shard["streams"] = [
        {
            "name": f"host{rank}",
            "links": [rank, (rank - 1) % ranks],
            "host": [sources[rank]],
            "interface": monitor,
        }
        for rank, monitor in network.monitors.items()
    ]
    path = recording.out / "plan.json"
    text = json.dumps(document, indent=1) + "\n"
    plans.parse(text, "the plan of the live job")
    recording.out.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, text.encode())
    return path


def _wait_for_shadow(folder: Path, patience_s: float) -> bool:
    """Wait until a shadow captures every frame; False if none does in `patience_s` seconds."""
    end = time.monotonic() + patience_s
    while not (folder / ACKNOWLEDGEMENT).exists():
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True


def train(
    recording: Recording,
    network: Network,
    *,
    shadow_s: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train over a network that stands; leave plan, truth and `steps.jsonl` in `recording.out`.

    Args:
        recording: the job.
        network: its hosts and monitor ports.
        shadow_s: so long the job waits for `flowcheck run` before it starts; 0, or a resumed job: it leaves no plan.
        say: called with a line when something happens.
        progress: called with (iterations done, in all).

    Raises:
        FlowCheckError: a rank failed, or no shadow came.
    """
    recording = replace(recording, network=network)
    if shadow_s and not recording.resume:
        path = write_plan(recording)
        say(f"plan: {path}")
        if not _wait_for_shadow(path.parent, shadow_s):
            raise FlowCheckError(f"no shadow after {shadow_s:g} seconds; flowcheck run {path} --out DIR")
    record(recording, progress)
