# SPDX-License-Identifier: MIT
"""A live job without a single privilege: ranks, switch and all stages, against the trainer's own digests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.live import digests, states, until

pytestmark = pytest.mark.dpdk

#: Of root, as the tests may run, nothing is left.
BARE = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--") if os.geteuid() == 0 else ()

JOB = """
import sys
from dataclasses import replace
from pathlib import Path
from workload_gen.record import Recording, record
from workload_gen.switch import Switch
import json
import os

folder = Path(sys.argv[1])
job = Recording(out=folder / "rehearsal", ranks=4, iterations=10, protocol="simple", mtu=4096, ip=4, optimizer="adamw",
                fused=True, parameters=60_000, bucket_mb=0.1)
if __name__ == "__main__":
    record(job)
    plan = json.loads((job.out / "plan.json").read_text())
    with Switch(4, (0,)) as switch:
        source = switch.network.source(0)
        address = next(c["source"] for c in plan["shards"][0]["connections"] if c["edge"] == 0)
        plan["shards"][0]["streams"] = [{"name": "host0", "links": [0, 3], "host": [address], **source}]
        (folder / "plan.json").write_text(json.dumps(plan))
        print("plan", flush=True)
        sys.stdin.readline()
        record(replace(job, out=folder / "job", network=switch.network, truth="digests", steps=True))
        print("lost", switch.unmirrored)
"""


def test_every_iteration_of_a_job_without_privileges_has_the_trainers_bits(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen([*BARE, sys.executable, str(tmp_path / "job.py"), str(tmp_path)], **piped)
    run = [*BARE, sys.executable, "-m", "flowcheck", "run", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    shadow = None
    try:
        assert job.stdout.readline() == "plan\n", job.communicate()
        shadow = subprocess.Popen([*run, "--json"], **piped)
        until(lambda: (tmp_path / "shadow.json").exists() or shadow.poll() is not None, "the shadow")
        assert shadow.poll() is None, shadow.communicate()
        held = [line for line in Path(f"/proc/{shadow.pid}/status").read_text().splitlines() if line.startswith("Cap")]
        assert held and all(int(line.split()[1], 16) == 0 for line in held)
        said, errors = job.communicate("go\n", timeout=120)
        assert job.returncode == 0, errors
        until(lambda: states(tmp_path / "out")[0].get(10) == "committed", "the last iteration")
        shadow.terminate()
        report = json.loads(shadow.communicate(timeout=60)[0])
    finally:
        for process in (job, shadow):
            if process is not None:
                process.kill()
                process.communicate()
    truth = map(json.loads, (tmp_path / "job" / "steps.jsonl").read_text().splitlines())
    assert said == "lost 0\n"
    assert digests(tmp_path / "out") == {row["iteration"]: row["digest"] for row in truth}
    packets = report["packets"]
    assert packets["dropped_ring_full"] == packets["missed_by_port"] == 0 < packets["placed"]
    assert packets["bad_icrc"] == 0, packets
