# SPDX-License-Identifier: MIT
"""A stage's process has a pid under which it can work."""

import os
import sys
from types import SimpleNamespace

import pytest

from flowcheck import interfaces
from flowcheck.stage_process import StageProcess
from flowcheck.supervisor import Supervisor
from tests import network


def test_a_process_whose_pid_will_not_do_is_ended_and_another_one_started(tmp_path):
    seen = []

    def third(pid):
        seen.append(pid)
        return len(seen) == 3

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    stage = StageProcess("sleep", command, tmp_path / "errors", dict(os.environ), fits=third)
    stage.start()
    assert len(set(seen)) == 3 and stage.process.pid == seen[2] and stage.look() is None
    for pid in seen[:2]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    stage.kill()


@network.needs_root
def test_dumps_of_two_interfaces_are_in_no_group_together():
    with network.cable() as names:
        streams = [SimpleNamespace(name=name, interface=name) for name in (*names, "fcnone")]
        plan = SimpleNamespace(shard=SimpleNamespace(streams=streams))
        children = [SimpleNamespace(name=f"dump {names[0]}", process=SimpleNamespace(pid=5000))]
        children.append(SimpleNamespace(name=f"dump {names[1]}", process=None))
        supervisor = SimpleNamespace(_plan=plan, _children=children)
        taken = next(
            p
            for p in range(4000, 70000)
            if interfaces.fanout_group(names[1], p) == interfaces.fanout_group(names[0], 5000)
        )
        for stage, pid, fits in (
            (f"dump {names[1]}", taken, False),
            (f"dump {names[1]}", taken + 65536, False),
            (f"dump {names[1]}", taken ^ 1, True),
            (f"dump {names[0]}", 5000, True),
            ("dump fcnone", taken, True),
            ("updater", taken, True),
        ):
            assert Supervisor._fits(supervisor, stage, pid) is fits
