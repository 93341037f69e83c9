# SPDX-License-Identifier: MIT
"""`flowcheck demo` holds what it says, live and offline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import network

KEYS = {
    "transport", "ranks", "iterations", "committed", "incomplete", "bit_exact", "resumed_equal", "killed_at", "restored",
    "max_lag", "frames", "dir",
}  # fmt: skip
pytestmark = pytest.mark.dpdk


def demo(*options, prefix=()):
    command = [*prefix, sys.executable, "-m", "flowcheck", "demo", "--json", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) >= KEYS
    assert report["bit_exact"] and report["resumed_equal"]
    assert report["restored"] == report["committed"] >= report["killed_at"] - 1 > 0 == report["incomplete"]
    return report


@pytest.mark.parametrize(
    "transport", [pytest.param("fabric", marks=network.needs_root), pytest.param("in-process", marks=pytest.mark.slow)]
)
def test_live_it_kills_restores_resumes_and_compares(tmp_path, transport):
    # Without privileges it finds by itself what it can do.
    report = demo("--dir", tmp_path / "demo", prefix=network.bare if transport == "in-process" else ())
    folder = Path(report["dir"])
    assert report["transport"] == transport and report["frames"] > 1000 and report["bytes"] > 10**6
    state = torch.load(folder / "restored.pt", weights_only=True)
    assert state["iteration"] == report["restored"]
    ended = {
        part: (folder / part / "steps.jsonl").read_text().splitlines()
        for part in ("uninterrupted", "killed", "resumed")
    }
    last = {part: json.loads(lines[-1]) for part, lines in ended.items()}
    assert last["killed"]["iteration"] == report["killed_at"] - 1 < report["iterations"]
    assert last["resumed"] | {"ended_ns": 0} == last["uninterrupted"] | {"ended_ns": 0}
    # The digests are worth something: they differ from step to step.
    assert len({json.loads(line)["digest"] for line in ended["uninterrupted"]}) == report["iterations"]


@pytest.mark.slow
def test_offline_it_does_the_same_from_a_recording(tmp_path):
    report = demo("--dir", tmp_path / "demo", "--transport", "offline")
    assert report["transport"] == "offline"
    folder = Path(report["dir"])
    state = torch.load(folder / "restored.pt", weights_only=True)
    truth = torch.load(folder / "uninterrupted" / "truth" / f"iteration-{report['restored']:06}.pt", weights_only=True)
    assert all(torch.equal(state["model"][key], value) for key, value in truth["model"].items())
    # What the recording never saw cannot be in it: the killed job wrote no truth of the last iterations.
    assert not (folder / "killed" / "truth" / f"iteration-{report['iterations']:06}.pt").exists()
