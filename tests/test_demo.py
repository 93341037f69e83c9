# SPDX-License-Identifier: MIT
"""`flowcheck demo` holds what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.dpdk
def test_the_demonstration_kills_restores_resumes_and_compares(tmp_path):
    command = [sys.executable, "-m", "flowcheck", "demo", "--json", "--dir", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {
        "transport", "ranks", "iterations", "committed", "incomplete", "bit_exact", "resumed_equal", "killed_at",
        "restored", "max_lag", "frames", "dir",
    }  # fmt: skip
    assert report["bit_exact"] and report["resumed_equal"] and report["transport"] == "offline"
    assert report["restored"] == report["committed"] >= report["killed_at"] - 1 > 0
    folder = Path(report["dir"])
    state = torch.load(folder / "restored.pt", weights_only=True)
    truth = torch.load(folder / "uninterrupted" / "truth" / f"iteration-{report['restored']:06}.pt", weights_only=True)
    assert all(torch.equal(state["model"][key], value) for key, value in truth["model"].items())
    # What the recording never saw cannot be in it: the killed job wrote no truth of the last iterations.
    assert not (folder / "killed" / "truth" / f"iteration-{report['iterations']:06}.pt").exists()
