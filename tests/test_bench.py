# SPDX-License-Identifier: MIT
"""The benchmark runs, small, and writes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
