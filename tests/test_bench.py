# SPDX-License-Identifier: MIT
"""The benchmarks run, small, and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.yardsticks import PIECE, Yardsticks

CODE = (
    "from bench import bench; bench.ELEMENTS, bench.RUNS, bench.PAIRS = 200_000, 2, 2; raise SystemExit(bench.main())"
)
NAMES = {"dump", "parse", "parse_icrc", "extract_plain", "extract_ll", "extract_ll128", "chain_1core"}
NAMES |= {"update_fused", "update_default", "log", "snapshot"}
if os.geteuid() == 0:
    NAMES |= {"step_overhead"}


@pytest.mark.dpdk
def test_every_stage_has_a_figure_and_a_yardstick(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {CODE}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "build" / "bench.json").read_text())
    assert {row["name"] for row in report["results"]} == NAMES
    for row in report["results"]:
        assert {"name", "value", "unit", "yardstick", "yardstick_value", "ratio", "runs", "spread"} <= set(row)
        assert row["value"] > 0 and row["yardstick_value"] > 0 and row["runs"] == 2
        assert row["name"] in done.stdout


def test_yardsticks_move_what_they_say(tmp_path):
    loops = Yardsticks(tmp_path)
    source = np.random.default_rng(1).integers(0, 255, 4096, np.uint8)
    pieces = np.array([(64, 64, 256), (512, 1024, 1024)], PIECE)
    for name, line, kept in (("copy", 1, 1), ("copy_half", 16, 8), ("copy_lines", 128, 120)):
        target = np.zeros(4096, np.uint8)
        getattr(loops, name)(pieces, source, target)
        expected = np.zeros(4096, np.uint8)
        for begin, to, length in pieces.tolist():
            data = source[begin : begin + length].reshape(-1, line)[:, :kept].reshape(-1)
            expected[to : to + len(data)] = data
        assert np.array_equal(target, expected), name
    target = np.full(4096, 255, np.uint8)
    loops.copy_frames(pieces, source, target)
    assert np.array_equal(target[1024:2048], source[512:1536]) and target[960:976].tolist() == [0, 4] + 14 * [0]
    assert target[976:1024].tolist() == [1] + 47 * [0]
    assert loops.compare(pieces, source, target) == 0
    target[1500] ^= 1
    assert loops.compare(pieces, source, target) == 1
    words = source.view("<u8")
    assert loops.read_all(pieces, source) == int(np.concatenate((words[8:40], words[64:192])).sum())  # modulo 2^64
    assert loops.touch(pieces, source) == int(words[[8, 16, 64, 72]].sum())


def test_compression_is_measured_on_gradients_that_are_given(tmp_path):
    script = Path(__file__).parents[1] / "bench" / "log_compression.py"
    np.save(tmp_path / "g.npy", np.random.default_rng(1).normal(0, 0.01, 300_001).astype(np.float32))
    words = [tmp_path / "g.npy", "--disk", tmp_path, "--json", "--turns", "10"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["g.npy"]
    assert found["bytes"] == 1_200_004 and found["disk"] > 0 and len(found["shares"]) == 1
    ours = next(row for row in found["rows"] if row["way"] == "updater.compression")
    assert ours["ratio"] > 1.05 and ours["pack"] > 0 and ours["unpack"] > 0
    assert os.listdir(tmp_path) == ["g.npy"]
    words[-1] = "9"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and "fewer than 10" in done.stderr


@pytest.mark.dpdk
def test_updates_are_measured_with_and_without_a_snapshot_beside_them(tmp_path):
    script = Path(__file__).parents[1] / "bench" / "snapshot_beside.py"
    command = [sys.executable, str(script), "--params", "80000", "--forms", "fused", "--rounds", "2"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["results"]
    assert row["updates_alone"] == 12 and row["updates_beside"] >= 12 and row["snapshots"] >= 2
    assert row["snapshot_bytes"] > 3 * 4 * 80_000  # parameters and two moments
    low, high = row["ratio"]["interval"]
    assert 0 < low <= row["ratio"]["value"] <= high
    assert not os.listdir(tmp_path)
