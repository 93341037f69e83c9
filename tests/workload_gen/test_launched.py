# SPDX-License-Identifier: MIT
"""The example job under torchrun: the code path of a cluster, here on the CPU with gloo in the place of NCCL."""

import json
import subprocess
import sys
from pathlib import Path

from flowcheck import plan as plans

SCRIPT = """
import sys
from pathlib import Path
from workload_gen.job import Recording
from workload_gen.launched import train
out, wire = map(Path, sys.argv[1:])
train(Recording(out=out, ranks=2, iterations=5, parameters=5000, bucket_mb=0.01, optimizer="adamw", steps=True,
                truth="digests", full_state_every=2), wire, lambda done: None, backend="gloo")
"""


def wire(folder):
    def connection(edge):
        ends = [f"10.0.0.{edge + 1}", f"10.0.0.{2 - edge}"]
        proof = {"kind": "queue_pair", "data": [100 + edge], "credit": [200 + edge]}
        return {"edge": edge, "channel": 0, "source": ends[0], "destination": ends[1], "proof": proof}

    layout = {
        "source": "modelled",
        "library": "nccl",
        "version": "2.27",
        "protocol": "simple",
        "ring": [0, 1],
        "mtu": 4096,
    }
    streams = [{"name": "host0", "links": [0, 1], "host": ["10.0.0.1"], "interface": "mirror0"}]
    path = folder / "wire.json"
    path.write_text(json.dumps({"layout": layout, "connections": [connection(0), connection(1)], "streams": streams}))
    return path


def test_under_torchrun_it_leaves_a_plan_and_full_states(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "job"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "script.py", out, wire(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = plans.load(out / "plan.json")
    assert plan.complete and len(plan.shard.revisions) == 2 and plan.record_form
    assert plan.shard.streams[0].interface == "mirror0"
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in steps] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in (out / "states").iterdir()) == ["state-000002.pt", "state-000004.pt"]
    assert (out / "initial.pt").exists()


def test_what_is_missing_for_a_cluster_is_named(tmp_path):
    words = ["train", "--transport", "nccl", "--out", str(tmp_path / "out")]
    code = [sys.executable, "-c", "from workload_gen.cli import main; main()"]
    done = subprocess.run([*code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--wire goes with --transport nccl" in done.stderr
    done = subprocess.run(
        [*code, *words, "--wire", str(wire(Path(tmp_path)))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3 and "start it under torchrun" in done.stderr
